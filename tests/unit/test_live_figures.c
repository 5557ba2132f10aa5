/* test_live_figures.c: live placement's figures: how long it takes, what it saves on recorded traces. */
#include <math.h>

#include "live_world.h"
#include "place/coplace.h"

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

START_TEST(fast_enough)
{
    enum { RANKS = 128, SAMPLES = 8, PLACES = 16, TOKENS = 4096, N = RANKS * SAMPLES, LAYERS = 24, EXPERTS = 64 };
    static int32_t rank_place[RANKS], expert_place[LAYERS * EXPERTS];
    static uint32_t counts[LAYERS * EXPERTS], order[N];
    static int64_t first[N + 1];
    struct railyard_live_job job = {sizeof job, RANKS,  SAMPLES, LAYERS,     EXPERTS,
                                    8,          PLACES, 0,       rank_place, expert_place};
    uint32_t *tokens = malloc((size_t)N * TOKENS * sizeof *tokens);
    for (int r = 0; r < RANKS; r++)
        rank_place[r] = r / (RANKS / PLACES);
    for (int i = 0; i < LAYERS * EXPERTS; i++)
        expert_place[i] = i % EXPERTS / (EXPERTS / PLACES);
    for (int i = 0; i < N; i++) { /* natural language: a few words make up most of a text, and its own words the rest */
        int home = i * 7 % PLACES;
        first[i + 1] = first[i] + TOKENS;
        for (int t = 0; t < TOKENS; t++) {
            double u = (double)below(1 << 30) / (1 << 30);
            tokens[first[i] + t] = (uint32_t)(exp(u * log(128000)) - 1) * (t % 4 ? 1u : (uint32_t)home + 2);
        }
    }
    struct railyard_live *live = railyard_live_new(&job);
    double best = 1e9, observing = 1e9, each;
    for (int i = 0; i < N; i++) {
        memset(counts, 0, sizeof counts);
        for (int l = 0; l < LAYERS; l++)
            for (int e = 0; e < EXPERTS; e++)
                counts[l * EXPERTS + e] =
                    TOKENS * 8 / EXPERTS / (expert_place[l * EXPERTS + e] == i * 7 % PLACES ? 1 : 2);
        each = now();
        ck_assert_int_eq(railyard_live_observe(live, tokens + first[i], TOKENS, counts, NULL, 0), 0);
        each = now() - each;
        if (i > N / 2)
            observing = fmin(observing, each);
    }
    struct railyard_live_plan plan = {.size = sizeof plan};
    for (int i = 0; i < 5; i++) {
        each = now();
        ck_assert_int_eq(railyard_live_place(live, tokens, first, order, &plan), 0);
        best = fmin(best, now() - each);
    }
    printf("%d samples of %d tokens, %d places: dealt in %.1f ms, one learned from in %.2f ms (%s)\n", N, TOKENS,
           PLACES, 1e3 * best, 1e3 * observing, plan.why);
    /* Many times of what it takes, for slow and busy machines. */
    ck_assert_msg(best < 2, "dealing a list takes %g s", best);
    ck_assert_msg(observing < 0.5, "learning from a sample takes %g s", observing);
    railyard_live_free(live);
    free(tokens);
}
END_TEST

enum { BATCHES = 16 };

/* What leaves its place of batches drawn from the samples after the first 1024, which are learned from: by homes over
 * as dealt. */
static double crossing(const struct ry_routing *r, const int *expert_rank, uint64_t seed)
{
    enum { RANKS = 8, SAMPLES = 16, PLACES = 2, N = RANKS * SAMPLES };
    int cells = r->layers * r->experts, T = r->tokens_per_sample;
    int32_t rank_place[RANKS], *expert_place = malloc((size_t)cells * sizeof *expert_place);
    uint32_t *room = malloc((size_t)T * sizeof *room), *counts = malloc((size_t)cells * sizeof *counts), order[N];
    uint32_t *tokens = malloc((size_t)N * (size_t)T * sizeof *tokens),
             *rest = malloc((size_t)r->samples * sizeof *rest);
    double sum[2] = {0, 0};
    for (int i = 0; i < RANKS; i++)
        rank_place[i] = i / (RANKS / PLACES);
    for (int i = 0; i < cells; i++)
        expert_place[i] = expert_rank[i];
    struct railyard_live_job job = {sizeof job, RANKS,  SAMPLES, r->layers,  r->experts,
                                    r->topk,    PLACES, 0,       rank_place, expert_place};
    struct railyard_live *live = railyard_live_new(&job);
    ck_assert_msg(live != NULL, "%s", railyard_live_error());
    for (int i = 0; i < 1024; i++) {
        for (int c = 0; c < cells; c++)
            counts[c] = ry_counts_at(r, i, 0)[c];
        ck_assert_msg(!railyard_live_observe(live, ry_tokens_at(r, i, room), T, counts, NULL, i % 2), "%s",
                      railyard_live_error());
    }
    int n = r->samples - 1024;
    for (int i = 0; i < n; i++)
        rest[i] = (uint32_t)(1024 + i);
    ry_shuffle(rest, (size_t)n, &seed);
    struct railyard_live_plan plan = {.size = sizeof plan};
    for (int b = 0; b < BATCHES; b++) {
        int64_t first[N + 1] = {0};
        for (int i = 0; i < N; i++) {
            memcpy(tokens + first[i], ry_tokens_at(r, (int)rest[b * N + i], room), (size_t)T * sizeof *room);
            first[i + 1] = first[i] + T;
        }
        ck_assert_int_eq(railyard_live_place(live, tokens, first, order, &plan), 0);
        for (int placed = 0; placed < 2; placed++)
            for (int slot = 0; slot < N; slot++)
                for (int c = 0; c < cells; c++)
                    if (expert_place[c] != rank_place[slot / SAMPLES])
                        sum[placed] += ry_counts_at(r, (int)rest[b * N + (placed ? (int)order[slot] : slot)], 0)[c];
    }
    railyard_live_free(live);
    free(expert_place);
    free(room);
    free(counts);
    free(tokens);
    free(rest);
    return sum[1] / sum[0];
}

START_TEST(recorded_traces)
{
    const char *shared = getenv("RY_SHARED");
    char trace[512];
    snprintf(trace, sizeof trace, "%s/traces/gpt-e32-k2", shared ? shared : "");
    struct ry_routing *r = shared ? ry_routing_open(trace, &err) : NULL;
    if (!r) {
        fprintf(stderr, "SKIPPED recorded_traces: no routing traces in RY_SHARED\n");
        return;
    }
    struct ry_cluster *c = ry_place_cluster(2, 1, 0, 0, &err);
    struct ry_coplace_options o = {.starts = 2, .seed = rng};
    struct ry_coplace *map = ry_coplace_learn(c, r, NULL, 1024, NULL, &o, &err);
    ck_assert_msg(map != NULL, "%s", err.msg);
    int *blocks = malloc((size_t)r->layers * (size_t)r->experts * sizeof *blocks);
    ck_assert_int_eq(ry_experts_contiguous(blocks, r->layers, r->experts, 2, &err), 0);
    double plain = crossing(r, blocks, rng), together = crossing(r, map->expert_rank, rng);
    printf("gpt-e32-k2, 2 places, of what leaves as dealt: %.3f with experts in blocks, %.3f co-placed\n", plain,
           together);
    ck_assert_double_lt(plain, 0.95);
    ck_assert_double_lt(together, 0.7);
    free(blocks);
    ry_coplace_free(map);
    ry_cluster_free(c);
    ry_routing_close(r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("live_figures");
    TCase *t = tcase_create("live_figures");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, fast_enough);
    tcase_add_test(t, recorded_traces);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
