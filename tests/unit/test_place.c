/* test_place.c: from affinities to homes to traffic: NetMoE's two stages, the predictor, counting, the protocol on
 * recorded routing. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "place/random.h"
#include "place/study.h"

static struct ry_err err;
static uint64_t rng;

static void setup(void)
{
    const char *text = getenv("RY_TEST_SEED");
    rng = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("RY_TEST_SEED=%llu\n", (unsigned long long)rng);
}

static int below(int n)
{
    return (int)ry_random_below(&rng, (uint64_t)n);
}

/* Routing in which sample s likes the experts of group s % groups, `part` of 256 of its tokens; the group changes by
 * `turn` a layer. */
static struct ry_routing *made_up(int samples, int layers, int experts, int topk, int tokens, int groups, int part,
                                  int turn)
{
    struct ry_routing *r = ry_routing_new(samples, layers, experts, topk, tokens, samples, &err);
    ck_assert_msg(r != NULL, "%s", err.msg);
    uint16_t *counts = (uint16_t *)r->counts;
    uint8_t *choices = (uint8_t *)r->choices8;
    int each = experts / groups;
    for (int s = 0; s < samples; s++) {
        for (int l = 0; l < layers; l++) {
            for (int t = 0; t < tokens; t++) {
                uint8_t *c =
                    choices + (((size_t)s * (size_t)layers + (size_t)l) * (size_t)tokens + (size_t)t) * (size_t)topk;
                for (int k = 0; k < topk; k++) {
                    int liked = (s + l * turn) % groups * each + below(each);
                    c[k] = (uint8_t)(below(256) < part ? liked : below(experts));
                    for (int j = 0; j < k; j++) {
                        if (c[j] == c[k]) { /* k experts of a token differ */
                            c[k] = (uint8_t)((c[k] + 1) % experts);
                            j = -1;
                        }
                    }
                    counts[((size_t)s * (size_t)layers + (size_t)l) * (size_t)experts + c[k]]++;
                }
            }
        }
    }
    return r;
}

/* Nodes of different sizes, ranks of one node not next to each other. */
static struct ry_cluster *odd_cluster(void)
{
    static const char *const nodes[] = {"a", "b", "a", "c", "b", "a", "b", "a"};
    struct ry_seat seats[8] = {0};
    for (int i = 0; i < 8; i++) {
        seats[i].version = RY_SEAT_VERSION;
        seats[i].rank = i;
        snprintf(seats[i].node, sizeof seats[i].node, "%s", nodes[i]);
    }
    struct ry_cluster *c = ry_cluster_build(seats, 8, &err);
    ck_assert_msg(c != NULL, "%s", err.msg);
    return c;
}

START_TEST(traffic_counts_every_row)
{
    struct ry_routing *r = made_up(11, 3, 8, 3, 20, 4, 128, 1);
    struct ry_cluster *c = odd_cluster();
    int rank[3 * 8], capacity[8] = {3, 0, 1, 2, 5, 1, 4, 2}, home[4 * 11];
    for (int i = 0; i < 3 * 8; i++)
        rank[i] = below(8);
    for (int i = 0; i < 4 * 11; i++)
        home[i] = below(8);
    struct ry_cost_model model = {.link = {[RY_LINK_LOCAL] = {.alpha_us = 1, .bytes_per_us = 50},
                                           [RY_LINK_NIC] = {.alpha_us = 7, .bytes_per_us = 20}}};
    for (int counting = RY_COPIES; counting <= RY_DISTINCT; counting++) {
        struct ry_problem p = {.cluster = c,
                               .routing = r,
                               .nsamples = 11,
                               .capacity = capacity,
                               .expert_rank = rank,
                               .counting = (enum ry_counting)counting,
                               .row_bytes = 10,
                               .model = &model};
        struct ry_traffic got = {0};
        ck_assert_int_eq(ry_traffic_add(&got, &p, home, 11, &err), 0);
        uint64_t rows = 0, cross = 0, in_node = 0, busiest = 0;
        double us = 0;
        for (int x = 0; x < 6; x++) {
            int l = x / 2;
            uint64_t nio[3][2] = {0}, rio[8][2] = {0}, nic = 0, local = 0;
            for (int i = 0; i < 11; i++) {
                int h = home[(l + x % 2) * 11 + i], here = c->node[h];
                for (int t = 0; t < 20; t++) {
                    bool node_seen[3] = {0}, rank_seen[8] = {0};
                    for (int k = 0; k < 3; k++) {
                        int to = rank[l * 8 + ry_choice(r, i, l, t, k)], there = c->node[to];
                        bool node_new = counting == RY_COPIES || !node_seen[there],
                             rank_new = counting == RY_COPIES || !rank_seen[to];
                        node_seen[there] = rank_seen[to] = true;
                        rows += node_new;
                        if (there != here && node_new) {
                            cross++;
                            nio[here][x % 2]++;
                            nio[there][!(x % 2)]++;
                        }
                        if (there == here && to != h && rank_new) {
                            in_node++;
                            rio[h][x % 2]++;
                            rio[to][!(x % 2)]++;
                        }
                    }
                }
            }
            for (int k = 0; k < 6; k++)
                nic = nio[k / 2][k % 2] > nic ? nio[k / 2][k % 2] : nic;
            for (int k = 0; k < 16; k++)
                local = rio[k / 2][k % 2] > local ? rio[k / 2][k % 2] : local;
            busiest += nic;
            us += fmax(nic ? 7 + (double)nic * 10 / 20 : 0, local ? 1 + (double)local * 10 / 50 : 0);
        }
        ck_assert_uint_eq(got.rows, rows);
        ck_assert_uint_eq(got.cross, cross);
        ck_assert_uint_eq(got.in_node, in_node);
        ck_assert_uint_eq(got.busiest_nic, busiest);
        ck_assert_double_eq_tol(got.us, us, 1e-6);
        ck_assert_uint_le(got.even_nic, got.busiest_nic);
        uint64_t moved = 0;
        for (int i = 0; i < 33; i++)
            moved += home[i] != home[i + 11];
        ck_assert_uint_eq(got.moved, moved);
    }
    ry_cluster_free(c);
    ry_routing_close(r);
}
END_TEST

/* On unequal nodes and capacities, all solvers: capacities hold, and the exact one's gather traffic is least. */
START_TEST(netmoe_on_an_odd_cluster)
{
    struct ry_routing *r = made_up(24, 3, 16, 2, 30, 8, 160, 1);
    struct ry_cluster *c = odd_cluster();
    int rank[3 * 16], capacity[8] = {3, 0, 1, 6, 5, 1, 4, 6}, home[4 * 24];
    ck_assert_int_eq(ry_experts_contiguous(rank, 3, 16, 8, &err), 0);
    struct ry_netmoe *w = ry_netmoe_new(c, 3, 16, 24, 26, &err);
    ck_assert_msg(w != NULL, "%s", err.msg);
    struct ry_problem p = {.cluster = c, .routing = r, .nsamples = 24, .capacity = capacity, .expert_rank = rank};
    uint64_t best = 0;
    for (int s = RY_SOLVERS - 1; s > RY_SOLVE_NONE; s--) {
        struct ry_netmoe_options o = {.homes = {.solver = (enum ry_solver)s, .max_moved = -1, .seed = 3}};
        ry_home_in_order(home, capacity, 8, 24);
        ck_assert_msg(!ry_netmoe_batch(w, &p, &o, home, &err), "%s", err.msg);
        for (int l = 0; l <= 3; l++) {
            int load[8] = {0};
            for (int i = 0; i < 24; i++)
                load[home[l * 24 + i]]++;
            for (int k = 0; k < 8; k++)
                ck_assert_int_le(load[k], capacity[k]);
        }
        struct ry_traffic t = {0};
        ck_assert_int_eq(ry_traffic_add(&t, &p, home, 24, &err), 0);
        /* gather only, so that each layer's combine is least by itself */
        uint64_t gather = 0;
        for (int l = 0; l < 3; l++) {
            for (int i = 0; i < 24; i++) {
                uint32_t a[3 * 3];
                ry_affinity(&p, RY_NODES, i, a);
                for (int m = 0; m < 3; m++)
                    gather += m != c->node[home[(l + 1) * 24 + i]] ? a[l * 3 + m] : 0;
            }
        }
        if (s == RY_SOLVE_EXACT)
            best = gather;
        ck_assert_uint_ge(gather, best);
        if (s == RY_SOLVE_KUHN_MUNKRES)
            ck_assert_uint_eq(gather, best);
    }
    /* Nobody may move: nobody changes nodes. */
    struct ry_netmoe_options o = {.homes = {.solver = RY_SOLVE_EXACT, .max_moved = 0}};
    ry_home_in_order(home, capacity, 8, 24);
    ck_assert_int_eq(ry_netmoe_batch(w, &p, &o, home, &err), 0);
    for (int k = 0; k < 72; k++)
        ck_assert_int_eq(c->node[home[k]], c->node[home[k + 24]]);
    p.nsamples = 25;
    ck_assert_int_eq(ry_netmoe_start(w, &p, &err), -1);
    ry_netmoe_free(w);
    ry_cluster_free(c);
    ry_routing_close(r);
}
END_TEST

/* Groups of samples that turn by one a layer: the predictor must find out, and placing by it must save all but noise.
 */
START_TEST(predicts_what_turns)
{
    struct ry_routing *r = made_up(200, 4, 16, 2, 64, 4, 256, 1);
    struct ry_predictor *p = ry_predictor_new(4, 16, 1, &err);
    ck_assert_msg(p != NULL, "%s", err.msg);
    float next[16], none[16] = {0};
    ry_predictor_fit(p);
    ry_predictor_next(p, 0, ry_counts_at(r, 0, 0), next);
    ck_assert_mem_eq(next, none, sizeof next);
    for (int s = 0; s < 100; s++)
        ry_predictor_observe(p, ry_counts_at(r, s, 0));
    ry_predictor_fit(p);
    for (int s = 100; s < 200; s++) {
        for (int l = 0; l < 3; l++) {
            float off = 0, total = 0;
            ry_predictor_next(p, l, ry_counts_at(r, s, 0), next);
            for (int g = 0; g < 4; g++) {
                float want = 0, got = 0;
                for (int e = 4 * g; e < 4 * g + 4; e++) {
                    want += ry_counts_at(r, s, l + 1)[e];
                    got += next[e];
                }
                off += fabsf(want - got);
                total += want;
            }
            ck_assert_msg(off < 0.25f * total, "sample %d layer %d: off by %g of %g", s, l, (double)off, (double)total);
        }
    }
    ry_predictor_free(p);

    struct ry_cluster *c = ry_place_cluster(4, 2, 0, 0, &err);
    int rank[4 * 16];
    ck_assert_int_eq(ry_experts_contiguous(rank, 4, 16, 8, &err), 0);
    struct ry_study study = {
        .routing = r, .cluster = c, .expert_rank = rank, .fit = 100, .end = 200, .batches = 4, .batch = 40, .seed = 1};
    struct ry_predictor *learned = ry_study_predictor(&study, 2, &err);
    struct ry_netmoe_options o = {
        .scatter = RY_SCATTER_PREDICTED, .predictor = learned, .homes = {.solver = RY_SOLVE_EXACT, .max_moved = -1}};
    struct ry_study_result still, blind, predicted, known;
    ck_assert_int_eq(ry_study_netmoe(&study, &o, RY_WHEN_NEVER, &still, &err), 0);
    ck_assert_int_eq(ry_study_netmoe(&study, &o, RY_WHEN_EACH_LAYER, &predicted, &err), 0);
    o.scatter = RY_SCATTER_OFF;
    ck_assert_int_eq(ry_study_netmoe(&study, &o, RY_WHEN_EACH_LAYER, &blind, &err), 0);
    o.scatter = RY_SCATTER_GIVEN;
    ck_assert_int_eq(ry_study_netmoe(&study, &o, RY_WHEN_EACH_LAYER, &known, &err), 0);
    ck_assert_uint_eq(still.traffic.moved, 0);
    ck_assert_uint_lt(known.traffic.cross, blind.traffic.cross);
    ck_assert_double_lt((double)predicted.traffic.cross, 1.02 * (double)known.traffic.cross);
    ck_assert_double_lt((double)known.traffic.cross, 0.85 * (double)still.traffic.cross);
    ry_predictor_free(learned);
    ry_cluster_free(c);
    ry_routing_close(r);
}
END_TEST

START_TEST(batches_are_drawn_fairly)
{
    struct ry_routing *r = ry_routing_new(50, 1, 2, 1, 1, 0, &err);
    struct ry_study s = {
        .routing = r, .fit = 20, .end = 50, .batches = 1, .batch = 12, .seed = (uint64_t)below(1 << 20)};
    int seen[50] = {0}, first[50] = {0}, sample[12], again[12];
    for (int k = 0; k < 5000; k++) {
        bool here[50] = {0};
        ry_study_batch(&s, k, sample);
        for (int i = 0; i < 12; i++) {
            ck_assert(sample[i] >= 20 && sample[i] < 50 && !here[sample[i]]);
            here[sample[i]] = true;
            seen[sample[i]]++;
        }
        first[sample[0]]++;
    }
    for (int i = 20; i < 50; i++) { /* 2000 ± 35, 167 ± 13 */
        ck_assert_int_lt(abs(seen[i] - 2000), 250);
        ck_assert_int_lt(abs(first[i] - 167), 90);
    }
    ry_study_batch(&s, 3, sample);
    ry_study_batch(&s, 3, again);
    ck_assert_mem_eq(sample, again, sizeof sample);
    s.batch = 31;
    ck_assert_int_eq(ry_study_check(&s, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "30 are left, but a batch has 31"));
    ry_routing_close(r);
}
END_TEST

START_TEST(declines_what_is_shuffled)
{
    struct ry_routing *r = made_up(400, 4, 16, 2, 64, 4, 128, 0), *shuffled = ry_routing_shuffled(r, 9, &err);
    struct ry_cluster *c = ry_place_cluster(4, 1, 0, 0, &err);
    int rank[4 * 16];
    ck_assert_int_eq(ry_experts_contiguous(rank, 4, 16, 4, &err), 0);
    for (int k = 0; k < 2; k++) {
        struct ry_study s = {.routing = k ? shuffled : r,
                             .cluster = c,
                             .expert_rank = rank,
                             .fit = 300,
                             .end = 400,
                             .batches = 4,
                             .batch = 40,
                             .seed = 1};
        struct ry_netmoe_options o = {.scatter = RY_SCATTER_PREDICTED,
                                      .homes = {.solver = RY_SOLVE_EXACT, .max_moved = -1}};
        struct ry_worth worth;
        ck_assert_msg(!ry_study_worth(&s, &o, 2, 0.03, &worth, &err), "%s", err.msg);
        ck_assert_int_eq(worth.worth, k == 0);
        ck_assert_msg(strstr(worth.why, k ? "declined: samples choose experts as alike as chance" : "worth while") !=
                          NULL,
                      "%s", worth.why);
        if (k == 0) {
            ck_assert_int_eq(ry_study_worth(&s, &o, 2, 0.9, &worth, &err), 0);
            ck_assert(!worth.worth && strstr(worth.why, "less than the 90.0 % that it must"));
        }
    }
    ry_cluster_free(c);
    ry_routing_close(shuffled);
    ry_routing_close(r);
}
END_TEST

/* The figures that issue and design name, for the seed that `railyard plan` takes by itself. */
START_TEST(recorded_traces)
{
    static const struct {
        const char *name;
        int nodes;
        double gather, predicted;
    } want[] = {{"gpt-e32-k2", 2, 0.909, 0.874},     {"gpt-e32-k2", 4, 0.906, 0.881},
                {"gpt-e32-k2", 8, 0.913, 0.890},     {"gpt-e64-k6", 2, 0.952, 0.926},
                {"gpt-e64-k6", 4, 0.951, 0.933},     {"gpt-e64-k6", 8, 0.954, 0.939},
                {"gpt-e32-k2-english", 2, 0, 0.899}, {"gpt-e32-k2-english", 4, 0.923, 0.905},
                {"gpt-e32-k2-english", 8, 0, 0.916}};
    const char *shared = getenv("RY_SHARED");
    char path[4096];
    for (size_t k = 0; k < sizeof want / sizeof *want; k++) {
        snprintf(path, sizeof path, "%s/traces/%s", shared ? shared : "", want[k].name);
        if (!shared || access(path, R_OK)) {
            fprintf(stderr, "SKIPPED recorded_traces: no routing traces in RY_SHARED\n");
            return;
        }
        struct ry_routing *r = ry_routing_open(path, &err);
        ck_assert_msg(r != NULL, "%s", err.msg);
        struct ry_cluster *c = ry_place_cluster(want[k].nodes, 4, 0, 0, &err);
        int *rank = malloc((size_t)(r->layers * r->experts) * sizeof *rank);
        ck_assert_int_eq(ry_experts_contiguous(rank, r->layers, r->experts, c->nranks, &err), 0);
        struct ry_study s = {.routing = r,
                             .cluster = c,
                             .expert_rank = rank,
                             .fit = 1024,
                             .end = r->samples,
                             .batches = 16,
                             .batch = 128,
                             .seed = 1};
        struct ry_predictor *p = ry_study_predictor(&s, 4, &err);
        struct ry_netmoe_options o = {.predictor = p, .homes = {.solver = RY_SOLVE_EXACT, .max_moved = -1}};
        struct ry_study_result still, gather, predicted;
        ck_assert_int_eq(ry_study_netmoe(&s, &o, RY_WHEN_NEVER, &still, &err), 0);
        ck_assert_int_eq(ry_study_netmoe(&s, &o, RY_WHEN_EACH_LAYER, &gather, &err), 0);
        o.scatter = RY_SCATTER_PREDICTED;
        ck_assert_int_eq(ry_study_netmoe(&s, &o, RY_WHEN_EACH_LAYER, &predicted, &err), 0);
        double g = (double)gather.traffic.cross / (double)still.traffic.cross,
               q = (double)predicted.traffic.cross / (double)still.traffic.cross;
        printf("%s, %d nodes: gather only %.4f, predicted %.4f\n", want[k].name, want[k].nodes, g, q);
        if (want[k].gather > 0)
            ck_assert_double_le(fabs(g - want[k].gather), 0.005);
        ck_assert_double_le(q, want[k].predicted);
        ry_predictor_free(p);
        free(rank);
        ry_cluster_free(c);
        ry_routing_close(r);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("place");
    TCase *t = tcase_create("place");
    tcase_set_timeout(t, 100);
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_test(t, traffic_counts_every_row);
    tcase_add_test(t, netmoe_on_an_odd_cluster);
    tcase_add_test(t, predicts_what_turns);
    tcase_add_test(t, batches_are_drawn_fairly);
    tcase_add_test(t, declines_what_is_shuffled);
    tcase_add_test(t, recorded_traces);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
