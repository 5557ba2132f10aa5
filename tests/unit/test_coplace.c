/* test_coplace.c: experts to nodes and ranks: the search against brute force and its bound, what must hold for every
 * map, the files, when nothing is to be moved, and the recorded traces. */
#include <check.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/npy.h"
#include "place/anneal.h"
#include "place/coplace.h"
#include "place/crossing_bound.h"
#include "place/expert_load.h"
#include "place/expert_map.h"
#include "place/random.h"
#include "place/study.h"

static struct ry_err err;
static uint64_t rng;
static char dir[64], path[128];

static void setup(void)
{
    const char *text = getenv("RY_TEST_SEED");
    rng = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("RY_TEST_SEED=%llu\n", (unsigned long long)rng);
    strcpy(dir, "/tmp/ry-coplace-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void teardown(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    ck_assert_int_eq(system(cmd), 0);
}

static int below(int n)
{
    return (int)ry_random_below(&rng, (uint64_t)n);
}

/* Routing in which sample s likes the experts of one of `groups` groups, `part` of 256 of its tokens; which experts
 * make up a group differs by layer, and is not what lies next to each other. */
static struct ry_routing *made_up(int samples, int layers, int experts, int topk, int tokens, int groups, int part)
{
    struct ry_routing *r = ry_routing_new(samples, layers, experts, topk, tokens, samples, &err);
    ck_assert_msg(r != NULL, "%s", err.msg);
    uint16_t *counts = (uint16_t *)r->counts;
    uint8_t *choices = (uint8_t *)r->choices8;
    uint32_t order[256];
    for (int l = 0; l < layers; l++) {
        for (int e = 0; e < experts; e++)
            order[e] = (uint32_t)e;
        ry_shuffle(order, (size_t)experts, &rng);
        for (int s = 0; s < samples; s++) {
            for (int t = 0; t < tokens; t++) {
                size_t at = (((size_t)s * (size_t)layers + (size_t)l) * (size_t)tokens + (size_t)t) * (size_t)topk;
                for (int k = 0; k < topk; k++) {
                    int each = experts / groups, pick = s * 7 % groups * each + below(each), fresh = 0;
                    while (!fresh) {
                        choices[at + (size_t)k] = (uint8_t)order[below(256) < part ? pick : below(experts)];
                        fresh = 1;
                        for (int j = 0; j < k; j++)
                            fresh &= choices[at + (size_t)j] != choices[at + (size_t)k];
                        pick = below(experts);
                    }
                    counts[((size_t)s * (size_t)layers + (size_t)l) * (size_t)experts + choices[at + (size_t)k]]++;
                }
            }
        }
    }
    return r;
}

static struct ry_cluster *cluster(int nodes, int ranks)
{
    struct ry_cluster *c = ry_place_cluster(nodes, ranks, 0, 0, &err);
    ck_assert_msg(c != NULL, "%s", err.msg);
    return c;
}

/* Nodes of three, two and one ranks, not next to each other. */
static struct ry_cluster *odd_cluster(void)
{
    static const char *const nodes[] = {"a", "b", "a", "c", "b", "a"};
    struct ry_seat seats[6] = {0};
    for (int i = 0; i < 6; i++) {
        seats[i].version = RY_SEAT_VERSION;
        seats[i].rank = i;
        snprintf(seats[i].node, sizeof seats[i].node, "%s", nodes[i]);
    }
    struct ry_cluster *c = ry_cluster_build(seats, 6, &err);
    ck_assert_msg(c != NULL, "%s", err.msg);
    return c;
}

static struct ry_coplace *learn(const struct ry_cluster *c, const struct ry_routing *r, struct ry_coplace_options o)
{
    o.moves = o.moves ? o.moves : 4000;
    o.starts = o.starts ? o.starts : 2;
    struct ry_coplace *p = ry_coplace_learn(c, r, NULL, r->samples, NULL, &o, &err);
    ck_assert_msg(p != NULL, "%s", err.msg);
    return p;
}

/* Copies that ranks get in a layer, all samples together. */
static void rank_loads(const struct ry_routing *r, const int *expert_rank, int layer, int64_t *load, int ranks)
{
    memset(load, 0, (size_t)ranks * sizeof *load);
    for (int s = 0; s < r->samples; s++)
        for (int e = 0; e < r->experts; e++)
            load[expert_rank[layer * r->experts + e]] += ry_counts_at(r, s, layer)[e];
}

/* Equal numbers on every rank, and no node or rank above `times` the contiguous map's busiest in the layer. */
static void check_map(const struct ry_cluster *c, const struct ry_routing *r, const struct ry_coplace *p, double times)
{
    int *blocks = malloc((size_t)r->layers * (size_t)r->experts * sizeof *blocks);
    ck_assert_int_eq(ry_experts_contiguous(blocks, r->layers, r->experts, c->nranks, &err), 0);
    for (int l = 0; l < r->layers; l++) {
        int64_t load[64], was[64];
        int held[64] = {0};
        for (int e = 0; e < r->experts; e++) {
            int at = p->expert_rank[l * r->experts + e];
            ck_assert(at >= 0 && at < c->nranks);
            held[at]++;
        }
        for (int i = 0; i < c->nranks; i++)
            ck_assert_int_eq(held[i], r->experts / c->nranks);
        if (times <= 0)
            continue;
        rank_loads(r, p->expert_rank, l, load, c->nranks);
        rank_loads(r, blocks, l, was, c->nranks);
        double node[64] = {0}, node_was[64] = {0}, top = 0, top_was = 0, rank = 0, rank_was = 0;
        for (int i = 0; i < c->nranks; i++) {
            node[c->node[i]] += (double)load[i] / c->node_size[c->node[i]];
            node_was[c->node[i]] += (double)was[i] / c->node_size[c->node[i]];
            rank = fmax(rank, (double)load[i]);
            rank_was = fmax(rank_was, (double)was[i]);
        }
        for (int m = 0; m < c->nnodes; m++) {
            top = fmax(top, node[m]);
            top_was = fmax(top_was, node_was[m]);
        }
        ck_assert_msg(top <= top_was * times + 1e-6, "layer %d: a node's load %g, bound %g", l, top, top_was * times);
        if (p->bound_held)
            ck_assert_msg(rank <= rank_was * times + 1e-6, "layer %d: a rank's load %g, bound %g", l, rank,
                          rank_was * times);
    }
    free(blocks);
}

/* A small problem of random numbers, in the search's own terms. */
struct small {
    struct ry_anneal a;
    uint16_t counts[4 * 8 * 16];
    int homes[4];
    int64_t bound[8 * 4];
};

static void small_make(struct small *t, int samples, int layers, int experts, int nodes)
{
    t->a = (struct ry_anneal){.samples = samples,
                              .layers = layers,
                              .experts = experts,
                              .nodes = nodes,
                              .counts = t->counts,
                              .homes = t->homes};
    for (int i = 0; i < samples * layers * experts; i++)
        t->counts[i] = (uint16_t)(below(4) ? below(10) : below(200));
    ry_share_out(t->homes, (int[4]){0}, nodes, samples);
}

/* What crosses with the best homes, by trying all of them. */
static int64_t best_homes(const struct small *t, const int *map, int s, int *room)
{
    const struct ry_anneal *a = &t->a;
    if (s == a->samples)
        return 0;
    int64_t least = INT64_MAX;
    for (int m = 0; m < a->nodes; m++) {
        if (!room[m])
            continue;
        int64_t cross = 0;
        for (int j = 0; j < a->layers * a->experts; j++)
            cross += map[j] == m ? 0 : t->counts[j * a->samples + s];
        room[m]--;
        cross += best_homes(t, map, s + 1, room);
        room[m]++;
        least = cross < least ? cross : least;
    }
    return least;
}

static int64_t exact_value(const struct small *t, const int *map)
{
    int room[4];
    memcpy(room, t->homes, sizeof room);
    return best_homes(t, map, 0, room);
}

/* All balanced maps, slot by slot. */
static int64_t best_map(const struct small *t, int *map, int slot)
{
    const struct ry_anneal *a = &t->a;
    if (slot == a->layers * a->experts)
        return exact_value(t, map);
    int64_t least = INT64_MAX;
    for (int m = 0; m < a->nodes; m++) {
        int held = 0, layer = slot / a->experts;
        for (int j = layer * a->experts; j < slot; j++)
            held += map[j] == m;
        if (held == a->experts / a->nodes)
            continue;
        map[slot] = m;
        int64_t v = best_map(t, map, slot + 1);
        least = v < least ? v : least;
    }
    return least;
}

START_TEST(search_finds_the_optimum_of_small_problems)
{
    double worse = 0;
    int cases = 40;
    for (int i = 0; i < cases; i++) {
        struct small t;
        int nodes = 2, experts = 4, layers = 1 + below(2), map[64], found[64];
        small_make(&t, 10 + 2 * below(2), layers, experts, nodes);
        int64_t best = best_map(&t, map, 0), reached = INT64_MAX;
        int slots[2] = {2, 2};
        double bound = ry_crossing_bound(&t.a, slots);
        ck_assert_msg(bound <= (double)best + 1e-6, "bound %g, but the optimum is %ld", bound, (long)best);
        for (int start = 0; start < 4; start++) {
            for (int j = 0; j < layers * experts; j++)
                found[j] = j % experts / 2;
            double v = ry_anneal_run(&t.a, found, 2000, (uint64_t)start);
            int64_t exact = exact_value(&t, found);
            ck_assert_msg(v <= (double)exact, "value %g, but with the best homes %ld cross", v, (long)exact);
            reached = exact < reached ? exact : reached;
        }
        ck_assert_int_ge(reached, best);
        worse += (double)reached / (double)(best ? best : 1) - 1;
    }
    /* Prices leave ties between homes open, which a dozen samples feel; a thousand do not. */
    ck_assert_msg(worse / cases <= 0.05, "on average %.1f %% above the optimum", 100 * worse / cases);
}
END_TEST

/* No map, however found, goes below the bound; three nodes, numbers of samples that they do not divide. */
START_TEST(bound_holds)
{
    for (int i = 0; i < 300; i++) {
        struct small t;
        int nodes = 2 + below(3), experts = nodes * (1 + below(2)), layers = 1 + below(3), map[64], slots[4];
        small_make(&t, 5 + below(4), layers, experts, nodes);
        ry_share_out(slots, (int[4]){0}, nodes, experts);
        for (int l = 0; l < layers; l++) {
            uint32_t at[16];
            for (int e = 0; e < experts; e++)
                at[e] = (uint32_t)(e % nodes);
            ry_shuffle(at, (size_t)experts, &rng);
            for (int e = 0; e < experts; e++)
                map[l * experts + e] = (int)at[e];
        }
        if (i % 2)
            ck_assert(ry_anneal_run(&t.a, map, 500, rng) >= 0);
        double bound = ry_crossing_bound(&t.a, slots), value = ry_anneal_value(&t.a, map);
        int64_t exact = exact_value(&t, map);
        ck_assert_msg(bound <= (double)exact + 1e-6, "bound %g, %ld cross", bound, (long)exact);
        ck_assert_msg(value <= (double)exact, "value %g, %ld cross", value, (long)exact);
    }
}
END_TEST

/* Counting distinct pairs, the value kept up to date over thousands of swaps is that of the map counted afresh. */
START_TEST(distinct_value_is_counted_right)
{
    for (int i = 0; i < 10; i++) {
        struct ry_routing *r = made_up(12, 2, 8, 1 + below(4), 20, 2, below(256));
        int which[12], nodes = 2 << below(2), map[16], homes[4], share[4];
        uint16_t *counts = malloc(sizeof *counts * 16 * 12);
        for (int s = 0; s < 12; s++) {
            which[s] = s;
            for (int j = 0; j < 16; j++)
                counts[j * 12 + s] = ry_counts_at(r, s, 0)[j];
        }
        struct ry_token_sets sets;
        ck_assert_int_eq(ry_token_sets_make(&sets, r, which, 12), 0);
        int tokens = 0;
        for (int u = 0; u < sets.count; u++)
            tokens += sets.weight[u];
        ck_assert_int_eq(tokens, 12 * 2 * 20);
        ry_share_out(homes, (int[4]){0}, nodes, 12);
        struct ry_anneal a = {12, 2, 8, nodes, counts, homes, NULL, &sets};
        for (int j = 0; j < 16; j++)
            map[j] = j % 8 / (8 / nodes);
        double v = ry_anneal_run(&a, map, 3000, rng), again = ry_anneal_value(&a, map);
        ck_assert_msg(fabs(v - again) <= 0.02 * again, "%g while searching, %g afresh", v, again);
        struct ry_batches b = {r, which, 12, nodes, share, map, RY_DISTINCT};
        double crossing[12], all = 0;
        ry_share_out(share, (int[4]){0}, nodes, 12);
        ck_assert_int_eq(ry_study_cross(&b, RY_HOMES_KNOWN, NULL, crossing, &err), 12);
        for (int s = 0; s < 12; s++)
            all += crossing[s] / 2;
        ck_assert_msg(again <= all && all <= 1.1 * again + 4, "by prices %g, by exact homes %g", again, all);
        ry_token_sets_free(&sets);
        free(counts);
        ry_routing_close(r);
    }
}
END_TEST

START_TEST(maps_are_balanced_bounded_and_pay)
{
    for (int i = 0; i < 6; i++) {
        int nodes = 2 << below(2), ranks = 1 + below(2);
        struct ry_cluster *c = cluster(nodes, ranks);
        struct ry_routing *r = made_up(301 + below(40), 3, 16, 2, 40, nodes, 200);
        struct ry_coplace_options o = {.counting = i % 2 ? RY_DISTINCT : RY_COPIES, .seed = rng, .batch = 32};
        struct ry_coplace *p = learn(c, r, o), *q = learn(c, r, o);
        ck_assert_msg(p->move_experts && p->move_samples, "%s", p->why);
        ck_assert_mem_eq(p->expert_rank, q->expert_rank, (size_t)(3 * 16) * sizeof *p->expert_rank);
        ck_assert_str_eq(p->why, q->why);
        check_map(c, r, p, 1);
        ck_assert(p->node_load <= p->node_load_was + 1e-9);
        ck_assert_msg(p->fit < 0.8 && p->held_out < 0.92, "fit %g, held out %g", p->fit, p->held_out);
        ck_assert(p->least <= p->fit);
        ry_coplace_free(p);
        ry_coplace_free(q);
        o.load_from = RY_BOUND_NONE;
        p = learn(c, r, o);
        check_map(c, r, p, 0);
        ry_coplace_free(p);
        ry_routing_close(r);
        ry_cluster_free(c);
    }
}
END_TEST

/* Groups that are there to be found are found: every group's experts together, nothing crosses but what is random. */
START_TEST(planted_groups_are_found)
{
    struct ry_cluster *c = cluster(4, 1);
    struct ry_routing *r = made_up(128, 4, 16, 1, 64, 4, 256);
    struct ry_coplace *p = learn(c, r, (struct ry_coplace_options){.load_from = RY_BOUND_NONE, .moves = 20000});
    ck_assert_msg(p->fit < 1e-9 && p->held_out < 0.3, "fit %g, held out %g", p->fit, p->held_out);
    ry_coplace_free(p);
    ry_routing_close(r);
    ry_cluster_free(c);
}
END_TEST

START_TEST(unequal_nodes_and_capacities)
{
    struct ry_cluster *c = odd_cluster();
    struct ry_routing *r = made_up(101, 2, 12, 2, 40, 3, 220);
    int capacity[6] = {3, 0, 1, 4, 2, 5};
    struct ry_coplace_options o = {.moves = 4000, .starts = 2, .batch = 15};
    struct ry_coplace *p = ry_coplace_learn(c, r, NULL, r->samples, capacity, &o, &err);
    ck_assert_msg(p != NULL, "%s", err.msg);
    check_map(c, r, p, 1);
    ck_assert_msg(p->least <= p->fit + 1e-9, "least %g, fit %g", p->least, p->fit);
    ry_coplace_free(p);
    int only_one[6] = {0, 0, 0, 1, 0, 0}; /* all samples live on one node */
    p = ry_coplace_learn(c, r, NULL, r->samples, only_one, &o, &err);
    ck_assert_msg(p != NULL, "%s", err.msg);
    ck_assert_msg(!p->move_samples, "%s", p->why);
    ry_coplace_free(p);
    ry_routing_close(r);
    ry_cluster_free(c);
}
END_TEST

START_TEST(nothing_to_gain_moves_nothing)
{
    struct ry_cluster *c = cluster(4, 2), *one = cluster(1, 4);
    struct ry_routing *local = made_up(256, 4, 16, 2, 128, 4, 200), *r = ry_routing_shuffled(local, 1, &err);
    ck_assert_msg(r != NULL, "%s", err.msg);
    struct ry_coplace *p = learn(c, r, (struct ry_coplace_options){.seed = rng});
    ck_assert_msg(!p->move_experts && !p->move_samples && strstr(p->why, "nothing is moved"), "%s", p->why);
    for (int i = 0; i < 4 * 16; i++)
        ck_assert_int_eq(p->expert_rank[i], i % 16 / 2);
    ry_coplace_free(p);
    p = learn(one, local, (struct ry_coplace_options){0});
    ck_assert_msg(!p->move_experts && strstr(p->why, "one node"), "%s", p->why);
    ry_coplace_free(p);
    p = ry_coplace_learn(c, local, NULL, 7, NULL, &(struct ry_coplace_options){0}, &err);
    ck_assert_msg(p && !p->move_experts && strstr(p->why, "too few"), "%s", p ? p->why : err.msg);
    ry_coplace_free(p);
    ry_routing_close(r);
    ry_routing_close(local);
    ry_cluster_free(c);
    ry_cluster_free(one);
}
END_TEST

START_TEST(contradictions_are_refused)
{
    struct ry_cluster *c = cluster(3, 1);
    struct ry_routing *r = ry_routing_new(8, 1, 8, 1, 4, 0, &err), *six = ry_routing_new(8, 1, 6, 1, 4, 0, &err);
    int which[] = {0, 8};
    struct ry_coplace_options o = {0}, distinct = {.counting = RY_DISTINCT}, nan = {.load_times = NAN};
    ck_assert_ptr_null(ry_coplace_learn(c, r, NULL, 8, NULL, &o, &err));
    ck_assert_msg(strstr(err.msg, "8 experts") && strstr(err.msg, "3 ranks"), "%s", err.msg);
    ck_assert_ptr_null(ry_coplace_learn(c, six, NULL, 9, NULL, &o, &err));
    ck_assert_ptr_null(ry_coplace_learn(c, six, NULL, 0, NULL, &o, &err));
    ck_assert_ptr_null(ry_coplace_learn(c, six, which, 2, NULL, &o, &err));
    ck_assert_msg(strstr(err.msg, "sample 8"), "%s", err.msg);
    ck_assert_ptr_null(ry_coplace_learn(c, six, NULL, 8, NULL, &distinct, &err));
    ck_assert_msg(strstr(err.msg, "choices"), "%s", err.msg);
    ck_assert_ptr_null(ry_coplace_learn(c, six, NULL, 8, NULL, &nan, &err));
    ry_routing_close(r);
    ry_routing_close(six);
    ry_cluster_free(c);
}
END_TEST

/* n numbers to k ranks: equal numbers, the load that is told, and never far above the best there is. */
START_TEST(rank_balance_against_brute_force)
{
    for (int i = 0; i < 300; i++) {
        int64_t w[8], best = INT64_MAX;
        int rank[8], n = 4 + 2 * below(3);
        for (int e = 0; e < n; e++)
            w[e] = below(3) ? below(100) : below(1000);
        int64_t got = ry_rank_balance(w, n, 2, rank), load[2] = {0};
        int held[2] = {0};
        for (int e = 0; e < n; e++) {
            load[rank[e]] += w[e];
            held[rank[e]]++;
        }
        ck_assert_int_eq(held[0], n / 2);
        ck_assert_int_eq(held[1], n / 2);
        ck_assert_int_eq(got, load[0] > load[1] ? load[0] : load[1]);
        for (int set = 0; set < 1 << n; set++) {
            int64_t a = 0, b = 0;
            for (int e = 0; e < n; e++)
                *(set >> e & 1 ? &a : &b) += w[e];
            if (__builtin_popcount((unsigned)set) == n / 2 && (a > b ? a : b) < best)
                best = a > b ? a : b;
        }
        ck_assert_int_ge(got, best);
        ck_assert_msg((double)got <= 1.34 * (double)best, "%ld, best %ld", (long)got, (long)best);
    }
}
END_TEST

static void put(const char *name, const char *text)
{
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
}

START_TEST(map_files)
{
    int layers = 3, experts = 8, ranks = 4, map[24], back[24], wrong[24];
    for (int l = 0; l < layers; l++) {
        uint32_t at[8];
        for (int e = 0; e < experts; e++)
            at[e] = (uint32_t)e / 2;
        ry_shuffle(at, 8, &rng);
        for (int e = 0; e < experts; e++)
            map[l * experts + e] = (int)at[e];
    }
    const char *const names[] = {"m.json", "m.npy"};
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        ck_assert_msg(!ry_expert_map_save(path, map, layers, experts, ranks, &err), "%s", err.msg);
        ck_assert_msg(!ry_expert_map_open(path, back, layers, experts, ranks, &err), "%s", err.msg);
        ck_assert_mem_eq(map, back, sizeof map);
        memset(wrong, 7, sizeof wrong);
        memcpy(back, wrong, sizeof back);
        ck_assert_int_eq(ry_expert_map_open(path, back, layers + 1, experts, ranks, &err), -1);
        ck_assert_msg(strstr(err.msg, names[i]) != NULL, "%s", err.msg);
        ck_assert_int_eq(truncate(path, 60), 0);
        ck_assert_int_eq(ry_expert_map_open(path, back, layers, experts, ranks, &err), -1);
        ck_assert_mem_eq(back, wrong, sizeof back);
    }
    ck_assert_int_eq(ry_expert_map_save("/tmp/map.txt", map, layers, experts, ranks, &err), -1);
    ck_assert_int_eq(ry_expert_map_save("/nowhere/m.json", map, layers, experts, ranks, &err), -1);
    ck_assert_int_eq(ry_expert_map_open("/nowhere/m.npy", back, layers, experts, ranks, &err), -1);

    static const char *const bad[] = {
        "{\"version\":1,\"layers\":1,\"experts\":2,\"ranks\":2,\"permutation\":[[0,0]]}",
        "{\"version\":1,\"layers\":1,\"experts\":2,\"ranks\":2,\"permutation\":[[0,2]]}",
        "{\"version\":1,\"layers\":1,\"experts\":2,\"ranks\":2,\"permutation\":[[0,-1]]}",
        "{\"version\":1,\"layers\":1,\"experts\":2,\"ranks\":2,\"permutation\":[[0,1.0]]}",
        "{\"version\":1,\"layers\":1,\"experts\":2,\"ranks\":2,\"permutation\":[[0]]}",
        "{\"version\":1,\"layers\":1,\"experts\":2,\"ranks\":2,\"permutation\":[]}",
        "{\"version\":2,\"layers\":1,\"experts\":2,\"ranks\":2,\"permutation\":[[0,1]]}",
        "{\"version\":1,\"layers\":1,\"experts\":2,\"ranks\":2}",
        "[]",
        "",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        put("bad.json", bad[i]);
        ck_assert_msg(ry_expert_map_open(path, back, 1, 2, 2, &err) == -1, "%s was taken", bad[i]);
    }
    put("slots.json", "{\"version\":1,\"layers\":2,\"experts\":4,\"ranks\":2,\"permutation\":[[3,1,2,0],[1,0,3,2]]}");
    int slots[8];
    ck_assert_msg(!ry_expert_map_slots(path, slots, 2, 4, 2, &err), "%s", err.msg);
    ck_assert_mem_eq(slots, ((int[]){3, 1, 2, 0, 1, 0, 3, 2}), sizeof slots); /* as in the file, not sorted */
    ck_assert_int_eq(ry_expert_map_slots(path, slots, 2, 4, 4, &err), -1);
    ck_assert_int_eq(ry_expert_map_slots(path, slots, 2, 4, 3, &err), -1);
    ck_assert_int_eq(ry_expert_map_slots(path, slots, 0, 4, 2, &err), -1);

    size_t shape[] = {1, 2};
    snprintf(path, sizeof path, "%s/bad.npy", dir);
    ck_assert_int_eq(ry_npy_save(AT_FDCWD, path, RY_NPY_F64, 2, shape, (double[]){NAN, 1}, &err), 0);
    ck_assert_int_eq(ry_expert_map_open(path, back, 1, 2, 2, &err), -1);
    ck_assert_int_eq(ry_npy_save(AT_FDCWD, path, RY_NPY_I32, 2, shape, (int32_t[]){-1, 1}, &err), 0);
    ck_assert_int_eq(ry_expert_map_open(path, back, 1, 2, 2, &err), -1);
}
END_TEST

/* The figures that co-placement was measured to reach, on recorded routing, with the bound on loads held. */
START_TEST(recorded_traces)
{
    const char *shared = getenv("RY_SHARED");
    char folder[512];
    snprintf(folder, sizeof folder, "%s/traces/gpt-e32-k2", shared ? shared : "");
    struct ry_routing *r = shared ? ry_routing_open(folder, &err) : NULL;
    if (!r) {
        fprintf(stderr, "SKIPPED recorded_traces: no routing traces in RY_SHARED\n");
        return;
    }
    struct ry_cluster *c = cluster(4, 2);
    struct ry_coplace_options o = {.starts = 1, .moves = 60000};
    struct ry_coplace *p = ry_coplace_learn(c, r, NULL, 1024, NULL, &o, &err);
    ck_assert_msg(p != NULL, "%s", err.msg);
    ck_assert_msg(p->move_experts && p->move_samples && p->bound_held, "%s", p->why);
    ck_assert_msg(p->fit < 0.70 && p->held_out < 0.73, "fit %g, held out %g", p->fit, p->held_out);
    ck_assert_msg(p->least > 0.4 && p->least <= p->fit, "at least %g crosses", p->least);
    ry_coplace_free(p);
    ry_routing_close(r);
    ry_cluster_free(c);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("coplace");
    TCase *t = tcase_create("coplace");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 100);
    tcase_add_test(t, search_finds_the_optimum_of_small_problems);
    tcase_add_test(t, bound_holds);
    tcase_add_test(t, distinct_value_is_counted_right);
    tcase_add_test(t, maps_are_balanced_bounded_and_pay);
    tcase_add_test(t, planted_groups_are_found);
    tcase_add_test(t, unequal_nodes_and_capacities);
    tcase_add_test(t, nothing_to_gain_moves_nothing);
    tcase_add_test(t, contradictions_are_refused);
    tcase_add_test(t, rank_balance_against_brute_force);
    tcase_add_test(t, map_files);
    tcase_add_test(t, recorded_traces);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
