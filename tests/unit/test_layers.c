/* test_layers.c: layer placement: samples follow what their layers show where that pays for their moves, and nobody moves
 * where it does not. Every decision is held against what layers.h promises of any. */
#include <check.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "live/layers.h"
#include "live/live.h"
#include "place/random.h"

#define SLOTS 64
#define EXPERTS 32
#define PLACES 8
#define LAYERS 8

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

/* A job, and what its samples are: each of a domain; in layer l domain d chooses experts of place target[l][d]. */
struct world {
    struct railyard_live_layers_job job;
    int32_t rank_place[SLOTS], expert_place[EXPERTS];
    int target[LAYERS][PLACES];
    int noise; /* of 256 choices, that many are any expert */
    struct railyard_live_layers *layers;
    uint32_t counts[LAYERS][SLOTS][EXPERTS], distinct[LAYERS][SLOTS][PLACES]; /* of samples */
    double went[LAYERS][SLOTS];                                                  /* rows that crossed, one way */
};

static void make(struct world *w, int ranks, int samples, int places, int layers, int distinct, int noise)
{
    *w = (struct world){.noise = noise};
    for (int r = 0; r < ranks; r++)
        w->rank_place[r] = r * places / ranks;
    for (int e = 0; e < EXPERTS; e++)
        w->expert_place[e] = e * places / EXPERTS;
    for (int l = 0; l < layers; l++)
        for (int d = 0; d < places; d++)
            w->target[l][d] = d;
    w->job = (struct railyard_live_layers_job){.size = sizeof w->job,
                                               .ranks = ranks,
                                               .samples = samples,
                                               .tokens = 128,
                                               .layers = layers,
                                               .experts = EXPERTS,
                                               .topk = 2,
                                               .places = places,
                                               .distinct = distinct,
                                               .rank_place = w->rank_place,
                                               .expert_place = w->expert_place};
}

static void start(struct world *w)
{
    w->layers = railyard_live_layers_new(&w->job);
    ck_assert_msg(w->layers != NULL, "%s", railyard_live_error());
}

static int slots(const struct world *w)
{
    return w->job.ranks * w->job.samples;
}

static int place_of(const struct world *w, uint32_t slot)
{
    return w->rank_place[(int)slot / w->job.samples];
}

static void draw(struct world *w)
{
    int per = EXPERTS / w->job.places;
    memset(w->counts, 0, sizeof w->counts);
    memset(w->distinct, 0, sizeof w->distinct);
    for (int i = 0; i < slots(w); i++) {
        int domain = below(w->job.places);
        for (int l = 0; l < w->job.layers; l++) {
            for (int t = 0; t < w->job.tokens; t++) {
                bool there[PLACES] = {false};
                for (int k = 0; k < w->job.topk; k++) {
                    int e = below(256) < w->noise ? below(EXPERTS) : w->target[l][domain] * per + below(per);
                    w->counts[l][i][e]++;
                    if (!there[w->expert_place[e]])
                        w->distinct[l][i][w->expert_place[e]]++;
                    there[w->expert_place[e]] = true;
                }
            }
        }
    }
}

static void tell(struct world *w, struct railyard_live_layers *to, int l, const uint32_t *sample, uint32_t *next,
                 struct railyard_live_layers_plan *plan)
{
    static uint32_t counts[SLOTS * EXPERTS], distinct[SLOTS * PLACES];
    for (int s = 0; s < slots(w); s++) {
        memcpy(counts + s * EXPERTS, w->counts[l][sample[s]], EXPERTS * sizeof *counts);
        memcpy(distinct + s * w->job.places, w->distinct[l][sample[s]], (size_t)w->job.places * sizeof *distinct);
    }
    memset(next, 0xff, (size_t)slots(w) * sizeof *next);
    plan->size = sizeof *plan;
    ck_assert_msg(!railyard_live_layers_next(to, l, sample, counts, w->job.distinct ? distinct : NULL, next, plan), "%s",
                  railyard_live_error());
}

/* Rows that cross in layer l, both exchanges, with the samples so. */
static double crossing(const struct world *w, int l, const uint32_t *sample)
{
    double rows = 0;
    for (int s = 0; s < slots(w); s++)
        for (int e = 0; e < EXPERTS && !w->job.distinct; e++)
            rows += w->expert_place[e] != place_of(w, (uint32_t)s) ? 2 * w->counts[l][sample[s]][e] : 0;
    for (int s = 0; s < slots(w); s++)
        for (int p = 0; p < w->job.places && w->job.distinct; p++)
            rows += p != place_of(w, (uint32_t)s) ? 2 * w->distinct[l][sample[s]][p] : 0;
    return rows;
}

struct outcome {
    double home, crossed, carried;
    int moved, inside;
};

/* One micro-batch, decisions carried out, but for those after layer `late`. */
static struct outcome run(struct world *w, int late)
{
    uint32_t sample[SLOTS], next[SLOTS], home[SLOTS];
    struct railyard_live_layers_plan plan;
    struct outcome o = {0};
    draw(w);
    for (int s = 0; s < slots(w); s++)
        sample[s] = home[s] = (uint32_t)s;
    for (int l = 0; l < w->job.layers; l++) {
        o.home += crossing(w, l, home);
        tell(w, w->layers, l, sample, next, &plan);
        bool inside = plan.inside && l != late;
        ck_assert(!plan.inside || (w->job.combine && plan.moved));
        o.inside += inside;
        if (w->job.combine == 2 && l + 1 == w->job.layers) { /* home, inside combine */
            o.crossed += (crossing(w, l, home) - crossing(w, l, sample)) / 2;
            memcpy(sample, home, sizeof sample);
            continue;
        }
        o.crossed += (crossing(w, l, sample) + crossing(w, l, inside ? next : sample)) / 2;
        int seen[SLOTS] = {0}, moved = 0;
        for (int s = 0; s < slots(w); s++) {
            ck_assert_uint_lt(next[s], (uint32_t)slots(w));
            ck_assert_msg(!seen[next[s]]++, "sample %u twice", next[s]);
        }
        for (int s = 0; s < slots(w); s++) {
            int to = -1;
            for (int t = 0; t < slots(w); t++)
                to = next[t] == sample[s] ? t : to;
            bool crosses = place_of(w, (uint32_t)s) != place_of(w, (uint32_t)to);
            ck_assert_msg(crosses || to == s, "a sample that stays in its place leaves its slot");
            moved += crosses;
        }
        ck_assert_int_eq(moved, plan.moved);
        ck_assert_msg(plan.go <= plan.stay, "worse by its own prediction");
        ck_assert_msg(l + 1 < w->job.layers || !moved, "a move after the last layer");
        if (l == late)
            continue;
        o.moved += moved;
        o.carried += inside && w->job.combine == 2 ? 0 : moved * w->job.tokens;
        memcpy(sample, next, sizeof sample);
    }
    for (int s = 0; s < slots(w); s++)
        o.carried += place_of(w, (uint32_t)s) != place_of(w, sample[s]) ? w->job.tokens : 0;
    return o;
}

static struct outcome runs(struct world *w, int n)
{
    struct outcome sum = {0};
    for (int i = 0; i < n; i++) {
        struct outcome o = run(w, below(4) ? -1 : below(w->job.layers));
        sum = (struct outcome){sum.home + o.home, sum.crossed + o.crossed, sum.carried + o.carried, sum.moved + o.moved,
                               sum.inside + o.inside};
    }
    return sum;
}

START_TEST(follows_what_is_seen)
{
    static struct world w;
    for (int distinct = 0; distinct < 2; distinct++) {
        make(&w, 4, 8, 2, 6, distinct, 32);
        start(&w);
        struct outcome before = runs(&w, 7);
        ck_assert_int_eq(before.moved, 0); /* 7 · 32 samples are too few */
        runs(&w, 8);
        struct outcome after = runs(&w, 20);
        ck_assert_msg(after.moved > 0 && after.crossed + after.carried < 0.75 * after.home, "%g + %g of %g", after.crossed,
                      after.carried, after.home);
        struct railyard_live_layers_state s = {.size = sizeof s};
        ck_assert_int_eq(railyard_live_layers_state(w.layers, &s), 0);
        ck_assert(s.sure && s.batches > 15 && s.crossed + s.carried < s.home);
        railyard_live_layers_free(w.layers);
    }
}
END_TEST

/* Domains whose experts are elsewhere in each layer: a sample that knows where to go next would run for ever. */
START_TEST(moves_are_paid_for)
{
    static struct world w;
    make(&w, 4, 8, 2, 8, 1, 0);
    for (int l = 0; l < w.job.layers; l++)
        for (int d = 0; d < 2; d++)
            w.target[l][d] = (d + l) % 2;
    start(&w);
    runs(&w, 12);
    for (int i = 0; i < 40; i++) {
        struct outcome o = run(&w, -1);
        ck_assert_msg(o.crossed + o.carried <= o.home, "%g + %g of %g", o.crossed, o.carried, o.home);
    }
    railyard_live_layers_free(w.layers);
    make(&w, 4, 8, 2, 6, 1, 256); /* nothing to learn */
    start(&w);
    struct outcome any = runs(&w, 40);
    ck_assert_msg(any.crossed + any.carried < 1.01 * any.home, "%g + %g of %g", any.crossed, any.carried, any.home);
    railyard_live_layers_free(w.layers);
}
END_TEST

/* A move costs a sample's tokens, and as many on the way home. Of tokens with one expert each, 7 of 8 at another place, one
 * layer to come is worth 1.5 times its tokens, two 3 times. */
START_TEST(the_way_home_counts)
{
    static struct world w;
    for (int layers = 2; layers <= 3; layers++) {
        make(&w, 4, 8, 2, layers, 0, 64);
        w.job.topk = 1;
        start(&w);
        runs(&w, 20);
        struct outcome o = runs(&w, 20);
        ck_assert_msg(layers == 2 ? o.moved == 0 : o.moved > 50, "%d layers: %d moves", layers, o.moved);
        railyard_live_layers_free(w.layers);
    }
}
END_TEST

/* Inside combine, this layer's results are on their way already: three exchanges instead of two, 2.25 times its tokens. */
START_TEST(results_go_along)
{
    static struct world w;
    for (int distinct = 0; distinct < 2; distinct++) {
        make(&w, 4, 8, 2, 2, distinct, 64);
        w.job.topk = 1;
        w.job.combine = 1;
        start(&w);
        runs(&w, 20);
        struct outcome o = runs(&w, 60);
        ck_assert_msg(o.moved > 50 && o.inside && o.crossed + o.carried < o.home, "%d moves, %g + %g of %g", o.moved, o.crossed,
                      o.carried, o.home);
        struct railyard_live_layers_state s = {.size = sizeof s};
        ck_assert_int_eq(railyard_live_layers_state(w.layers, &s), 0);
        ck_assert_msg(s.crossed + s.carried < s.home, "accounted: %g + %g of %g", s.crossed, s.carried, s.home);
        railyard_live_layers_free(w.layers);
    }
}
END_TEST

/* Domains whose experts are elsewhere in each layer: worth while to go there where going is free, and home it is as well. */
START_TEST(rides_anywhere)
{
    static struct world w;
    make(&w, 4, 8, 2, 6, 0, 32);
    for (int l = 0; l < w.job.layers; l++)
        for (int d = 0; d < 2; d++)
            w.target[l][d] = (d + l / 2) % 2;
    w.job.combine = 2;
    start(&w);
    runs(&w, 20);
    struct outcome o = runs(&w, 40);
    ck_assert_msg(o.crossed + o.carried < 0.8 * o.home, "%g + %g of %g", o.crossed, o.carried, o.home);
    struct railyard_live_layers_state s = {.size = sizeof s};
    ck_assert_int_eq(railyard_live_layers_state(w.layers, &s), 0);
    ck_assert_msg(s.crossed < 0.8 * s.home && s.carried < 0.1 * s.home, "accounted: %g + %g of %g", s.crossed, s.carried, s.home);
    railyard_live_layers_free(w.layers);
}
END_TEST

/* Domains whose experts change their place between two layers: results had better come back before the sample goes. */
START_TEST(results_come_back_first)
{
    static struct world w;
    make(&w, 4, 8, 2, 8, 0, 32);
    for (int l = 4; l < 8; l++)
        for (int d = 0; d < 2; d++)
            w.target[l][d] = 1 - w.target[l][d];
    w.job.combine = 1;
    start(&w);
    runs(&w, 20);
    int outside = 0, inside = 0;
    for (int i = 0; i < 20; i++) {
        uint32_t sample[SLOTS], next[SLOTS];
        struct railyard_live_layers_plan plan;
        draw(&w);
        for (int s = 0; s < slots(&w); s++)
            sample[s] = (uint32_t)s;
        for (int l = 0; l < w.job.layers; l++) {
            tell(&w, w.layers, l, sample, next, &plan);
            memcpy(sample, next, sizeof sample);
            outside += plan.moved && !plan.inside;
            inside += plan.moved && plan.inside;
        }
    }
    ck_assert_msg(outside > 15 && inside < outside, "%d, %d", outside, inside);
    railyard_live_layers_free(w.layers);
}
END_TEST

/* What layers to come send is no longer what it was: moving must end by itself, and begin again when it has learned. */
START_TEST(rests_when_it_does_not_pay)
{
    static struct world w;
    make(&w, 4, 8, 2, 4, 1, 16);
    start(&w);
    runs(&w, 200);
    for (int l = 1; l < w.job.layers; l++)
        for (int d = 0; d < 2; d++)
            w.target[l][d] = 1 - w.target[l][d];
    struct outcome wrong = runs(&w, 40);
    ck_assert_msg(wrong.crossed + wrong.carried > wrong.home, "nothing went wrong");
    struct outcome rest = runs(&w, 100);
    ck_assert_int_eq(rest.moved, 0);
    struct railyard_live_layers_state s = {.size = sizeof s};
    railyard_live_layers_state(w.layers, &s);
    ck_assert_msg(strstr(s.why, "rest") != NULL, "%s", s.why);
    runs(&w, 1500);
    struct outcome again = runs(&w, 20);
    ck_assert_msg(again.moved > 0 && again.crossed + again.carried < 0.9 * again.home, "%d, %g + %g of %g", again.moved,
                  again.crossed, again.carried, again.home);
    railyard_live_layers_free(w.layers);
}
END_TEST

/* Any shape: lawful (run() sees to that), and two that are told the same decide the same. */
START_TEST(any_job)
{
    static struct world w;
    for (int i = 0; i < 12; i++) {
        int places = 1 << (1 + below(3)), ranks = places * (1 + below(2));
        make(&w, ranks, 1 + below(SLOTS / ranks), places, 2 + below(LAYERS - 1), below(2), below(200));
        w.job.combine = below(3);
        start(&w);
        struct railyard_live_layers *twin = railyard_live_layers_new(&w.job);
        int n = 30 + 300 / slots(&w);
        for (int k = 0; k < n; k++) {
            uint32_t sample[SLOTS], next[SLOTS], same[SLOTS];
            struct railyard_live_layers_plan plan, other;
            draw(&w);
            for (int s = 0; s < slots(&w); s++)
                sample[s] = (uint32_t)s;
            for (int l = 0; l < w.job.layers; l++) {
                tell(&w, w.layers, l, sample, next, &plan);
                tell(&w, twin, l, sample, same, &other);
                ck_assert(!memcmp(next, same, (size_t)slots(&w) * sizeof *next));
                ck_assert(plan.stay == other.stay && plan.go == other.go);
                memcpy(sample, next, sizeof sample);
            }
        }
        runs(&w, 5);
        railyard_live_layers_free(twin);
        railyard_live_layers_free(w.layers);
    }
}
END_TEST

START_TEST(refuses)
{
    static struct world w;
    uint32_t sample[SLOTS], next[SLOTS], counts[SLOTS * EXPERTS] = {0}, distinct[SLOTS * PLACES] = {0};
    struct railyard_live_layers_plan plan = {.size = sizeof plan};
    make(&w, 4, 2, 2, 3, 1, 0);
    struct railyard_live_layers_job bad[] = {w.job, w.job, w.job, w.job, w.job, w.job};
    bad[0].size--, bad[1].places = 5, bad[2].layers = 1, bad[3].topk = 33, bad[4].rank_place = NULL, bad[5].tokens = 65537;
    for (int i = 0; i < 6; i++)
        ck_assert_msg(!railyard_live_layers_new(&bad[i]) && *railyard_live_error(), "job %d", i);
    start(&w);
    for (int s = 0; s < 8; s++)
        sample[s] = (uint32_t)s;
#define NEXT(layer, d) railyard_live_layers_next(w.layers, layer, sample, counts, d, next, &plan)
    ck_assert_int_eq(NEXT(1, distinct), -1); /* not begun */
    ck_assert_int_eq(NEXT(0, NULL), -1);
    ck_assert_int_eq(NEXT(0, distinct), 0);
    ck_assert_int_eq(NEXT(2, distinct), -1); /* one left out */
    ck_assert_int_eq(NEXT(3, distinct), -1);
    sample[0] = 1;
    ck_assert_int_eq(NEXT(1, distinct), -1);
    ck_assert_ptr_nonnull(strstr(railyard_live_error(), "as another one has"));
    sample[0] = 0, counts[3] = 257;
    ck_assert_int_eq(NEXT(1, distinct), -1);
    counts[3] = 256, distinct[1] = 129;
    ck_assert_int_eq(NEXT(1, distinct), -1);
    distinct[1] = 128;
    ck_assert_int_eq(NEXT(1, distinct), 0);
    ck_assert_int_eq(NEXT(2, distinct), 0);
    ck_assert_int_eq(NEXT(0, distinct), 0);
    plan.size = 3;
    ck_assert_int_eq(NEXT(1, distinct), -1);
    railyard_live_layers_free(w.layers);
    railyard_live_layers_free(NULL);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("layers");
    TCase *t = tcase_create("layers");
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, follows_what_is_seen);
    tcase_add_test(t, moves_are_paid_for);
    tcase_add_test(t, the_way_home_counts);
    tcase_add_test(t, results_go_along);
    tcase_add_test(t, results_come_back_first);
    tcase_add_test(t, rides_anywhere);
    tcase_add_test(t, rests_when_it_does_not_pay);
    tcase_add_test(t, any_job);
    tcase_add_test(t, refuses);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
