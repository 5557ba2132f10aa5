/* test_home_model.c: homes from token ids: the ridge regression it must reach, forgetting, sureness, the file. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "place/home_model.h"
#include "place/random.h"
#include "place/routing.h"

#define BUCKETS 64
#define NODES 3
#define TOKENS 60

static struct ry_err err;
static uint64_t rng;
static char dir[64], path[128];

static void setup(void)
{
    const char *text = getenv("RY_TEST_SEED");
    rng = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("RY_TEST_SEED=%llu\n", (unsigned long long)rng);
    strcpy(dir, "/tmp/ry-home-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/model", dir);
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

static struct ry_home_model *fresh(struct ry_home_options o)
{
    struct ry_home_model *m = ry_home_model_new(NODES, &o, &err);
    ck_assert_msg(m != NULL, "%s", err.msg);
    return m;
}

/* A sample that likes one node, its tokens telling which, all but `noise` of 256 of them. */
static int sample(uint32_t *tokens, double *rows, int noise)
{
    int node = below(NODES);
    for (int i = 0; i < TOKENS; i++)
        tokens[i] = (uint32_t)(below(256) < noise ? below(90) : node * 30 + below(30));
    for (int k = 0; k < NODES; k++)
        rows[k] = k == node ? 60 + below(20) : 20 + below(20);
    return node;
}

/* The regression as a textbook has it: (XᵀX + ridge) w = Xᵀy by Gauss–Jordan, X from the hash seen through the model:
 * one-token samples tell which bucket a token is in, as their features are equal if the bucket is. */
struct direct {
    int n;
    double x[200][BUCKETS + 1], y[200][NODES], w[BUCKETS + 1][NODES];
};

/* The bucket of each token, found by what a model that learned a single one-token sample predicts for the others. */
static void find_buckets(int *bucket, int tokens, uint64_t seed)
{
    int found = 0;
    for (int t = 0; t < tokens; t++)
        bucket[t] = -1;
    for (int t = 0; t < tokens; t++) {
        if (bucket[t] >= 0)
            continue;
        struct ry_home_model *m = fresh((struct ry_home_options){.buckets = BUCKETS, .seed = seed, .replay = 0});
        uint32_t one = (uint32_t)t;
        float self[NODES], other[NODES];
        ck_assert_int_eq(ry_home_model_observe(m, &one, 1, (double[NODES]){1, 0, 0}, &err), 0);
        ry_home_model_predict(m, &one, 1, self);
        for (int u = t; u < tokens; u++) {
            uint32_t two = (uint32_t)u;
            ry_home_model_predict(m, &two, 1, other);
            if (other[0] == self[0])
                bucket[u] = found;
        }
        found++;
        ry_home_model_free(m);
    }
    ck_assert_int_le(found, BUCKETS);
}

static void solve(struct direct *d, double ridge)
{
    static double a[BUCKETS + 1][BUCKETS + 1 + NODES];
    int n = BUCKETS + 1;
    memset(a, 0, sizeof a);
    for (int i = 0; i < n; i++) {
        a[i][i] = ridge;
        for (int s = 0; s < d->n; s++) {
            for (int j = 0; j < n; j++)
                a[i][j] += d->x[s][i] * d->x[s][j];
            for (int k = 0; k < NODES; k++)
                a[i][n + k] += d->x[s][i] * d->y[s][k];
        }
    }
    for (int i = 0; i < n; i++) { /* positive definite: no pivoting needed */
        for (int j = n + NODES - 1; j >= i; j--)
            a[i][j] /= a[i][i];
        for (int r = 0; r < n; r++)
            for (int j = n + NODES - 1; r != i && j >= i; j--)
                a[r][j] -= a[r][i] * a[i][j];
    }
    for (int i = 0; i < n; i++)
        for (int k = 0; k < NODES; k++)
            d->w[i][k] = a[i][n + k];
}

static void vector(double *x, const uint32_t *tokens, const int *bucket)
{
    memset(x, 0, (BUCKETS + 1) * sizeof *x);
    for (int i = 0; i < TOKENS; i++)
        x[bucket[tokens[i]]] += 1.0 / TOKENS;
    for (int i = 0; i < BUCKETS; i++)
        x[i] = sqrt(x[i]);
    x[BUCKETS] = 1;
}

/* Settled, the model predicts what the regression solved directly does. */
START_TEST(reaches_the_ridge_regression)
{
    static struct direct d;
    int bucket[90];
    uint64_t seed = rng;
    double ridge = 0.05 + below(100) / 100.0;
    find_buckets(bucket, 90, seed);
    struct ry_home_model *m =
        fresh((struct ry_home_options){.buckets = BUCKETS, .window = 150, .ridge = ridge, .seed = seed});
    uint32_t tokens[TOKENS];
    double rows[NODES];
    d.n = 0;
    for (int s = 0; s < 150; s++) {
        sample(tokens, rows, 128);
        ck_assert_int_eq(ry_home_model_observe(m, tokens, TOKENS, rows, &err), 0);
        vector(d.x[d.n], tokens, bucket);
        for (int k = 0; k < NODES; k++)
            d.y[d.n][k] = rows[k] / (rows[0] + rows[1] + rows[2]) - 1.0 / NODES;
        d.n++;
    }
    solve(&d, ridge);
    double online = 0, settled = 0, size = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < 100; i++) {
            double x[BUCKETS + 1];
            float got[NODES];
            sample(tokens, rows, 128);
            vector(x, tokens, bucket);
            ry_home_model_predict(m, tokens, TOKENS, got);
            for (int k = 0; k < NODES; k++) {
                double want = 1.0 / NODES;
                for (int j = 0; j <= BUCKETS; j++)
                    want += x[j] * d.w[j][k];
                *(pass ? &settled : &online) = fmax(pass ? settled : online, fabs(got[k] - want));
                size = fmax(size, fabs(want - 1.0 / NODES));
            }
        }
        double moved = ry_home_model_settle(m, 1000, 1e-9);
        ck_assert_msg(moved <= 1e-9, "multipliers are still off by %g", moved);
    }
    ck_assert_msg(settled < 1e-4 * size, "settled, predictions are off by %g", settled);
    ck_assert_msg(online < 0.5 * size, "before, predictions are off by %g, their size is %g", online, size);
    ry_home_model_free(m);
}
END_TEST

START_TEST(knows_how_sure_it_is)
{
    for (int noise = 0; noise <= 256; noise += 128) {
        struct ry_home_model *m = fresh((struct ry_home_options){.seed = rng});
        struct ry_home_trust t;
        uint32_t tokens[TOKENS];
        double rows[NODES], total;
        ry_home_model_trust(m, &t);
        ck_assert(!t.sure);
        for (int s = 0; s < 1500; s++) {
            sample(tokens, rows, noise);
            ck_assert_int_eq(ry_home_model_observe(m, tokens, TOKENS, rows, &err), 0);
        }
        ry_home_model_trust(m, &t);
        ck_assert_int_eq((int)t.samples, 1500);
        ck_assert_msg(t.sure == (noise < 256), "noise %d: %s", noise, t.why);
        if (noise == 256)
            ck_assert_msg(t.explained < 0.05 && t.captured < 0.15,
                          "tokens tell nothing, yet explained is %g, captured %g", t.explained, t.captured);
        else
            ck_assert_msg(t.explained > 0.6 && t.captured > 0.9, "explained %g, captured %g", t.explained, t.captured);

        /* What it says of its error is what samples that it never saw show. */
        double square = 0;
        for (int i = 0; i < 1000; i++) {
            float got[NODES];
            sample(tokens, rows, noise);
            ry_home_model_predict(m, tokens, TOKENS, got);
            total = rows[0] + rows[1] + rows[2];
            for (int k = 0; k < NODES; k++)
                square += (got[k] - rows[k] / total) * (got[k] - rows[k] / total) / NODES / 1000;
        }
        ck_assert_msg(sqrt(square) < 1.6 * t.error && t.error < 1.6 * sqrt(square), "noise %d: error %g said, %g seen", noise, t.error,
                      sqrt(square));
        ry_home_model_free(m);
    }
}
END_TEST

START_TEST(refuses_what_is_no_sample)
{
    struct ry_home_model *m = fresh((struct ry_home_options){.seed = rng});
    uint32_t tokens[TOKENS];
    double rows[NODES];
    float before[NODES], after[NODES];
    for (int i = 0; i < 20; i++) {
        sample(tokens, rows, 0);
        ck_assert_int_eq(ry_home_model_observe(m, tokens, TOKENS, rows, &err), 0);
    }
    ry_home_model_predict(m, tokens, TOKENS, before);
    static const double bad[][NODES] = {{NAN, 1, 1}, {1, -1, 1}, {0, 0, 0}, {INFINITY, 1, 1}};
    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(ry_home_model_observe(m, tokens, TOKENS, bad[i], &err), -1);
    ck_assert_int_eq(ry_home_model_observe(m, tokens, 0, rows, &err), -1);
    ry_home_model_predict(m, tokens, TOKENS, after);
    ck_assert_mem_eq(before, after, sizeof before);
    ry_home_model_predict(m, tokens, 0, after); /* nothing known of the sample */
    for (int k = 0; k < NODES; k++)
        ck_assert(isfinite(after[k]));
    ry_home_model_free(m);

    struct ry_home_options wrong[] = {{.buckets = 100}, {.buckets = 32}, {.window = -1}, {.ridge = -1}, {.ridge = NAN}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        ck_assert_ptr_null(ry_home_model_new(NODES, &wrong[i], &err));
    ck_assert_ptr_null(ry_home_model_new(0, &(struct ry_home_options){0}, &err));
}
END_TEST

static void damage(long at, int xor)
{
    FILE *f = fopen(path, "r+b");
    ck_assert_ptr_nonnull(f);
    ck_assert_int_eq(fseek(f, at, at < 0 ? SEEK_END : SEEK_SET), 0);
    int c = fgetc(f);
    ck_assert_int_eq(fseek(f, -1, SEEK_CUR), 0);
    fputc(c ^ xor, f);
    fclose(f);
}

START_TEST(file)
{
    struct ry_home_model *m = fresh((struct ry_home_options){.seed = rng, .map = 77}), *l;
    uint32_t tokens[TOKENS];
    double rows[NODES];
    for (int i = 0; i < 300; i++) {
        sample(tokens, rows, 64);
        ck_assert_int_eq(ry_home_model_observe(m, tokens, TOKENS, rows, &err), 0);
    }
    ck_assert_msg(!ry_home_model_save(m, path, &err), "%s", err.msg);
    l = ry_home_model_load(path, NODES, 77, &err);
    ck_assert_msg(l != NULL, "%s", err.msg);
    struct ry_home_trust a, b;
    ry_home_model_trust(m, &a);
    ry_home_model_trust(l, &b);
    ck_assert(a.samples == b.samples && a.error == b.error && a.captured == b.captured && !strcmp(a.why, b.why));
    for (int i = 0; i < 50; i++) {
        float x[NODES], y[NODES];
        sample(tokens, rows, 64);
        ry_home_model_predict(m, tokens, TOKENS, x);
        ry_home_model_predict(l, tokens, TOKENS, y);
        for (int k = 0; k < NODES; k++)
            ck_assert_msg(fabsf(x[k] - y[k]) < 1e-5, "%g saved, %g loaded", x[k], y[k]);
    }
    for (int i = 0; i < 200; i++) { /* learning goes on, and does not get worse */
        sample(tokens, rows, 64);
        ck_assert_int_eq(ry_home_model_observe(l, tokens, TOKENS, rows, &err), 0);
    }
    ry_home_model_trust(l, &b);
    ck_assert_msg(b.samples == 500 && b.error < 1.1 * a.error, "error %g before, %g after", a.error, b.error);
    ry_home_model_free(l);

    ck_assert_ptr_null(ry_home_model_load(path, NODES, 78, &err));
    ck_assert_msg(strstr(err.msg, "another expert map") && strstr(err.msg, path), "%s", err.msg);
    ck_assert_ptr_null(ry_home_model_load(path, NODES + 1, 77, &err));
    ck_assert_ptr_null(ry_home_model_load("/nowhere/model", NODES, 77, &err));
    static const long places[] = {0, 6, 8, 12, 200, -1, -1000};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        damage(places[i], 0x41);
        ck_assert_msg(!ry_home_model_load(path, NODES, 77, &err), "damage at %ld went unseen", places[i]);
        damage(places[i], 0x41);
    }
    static const long lengths[] = {30000, 100, 7, 0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        ck_assert_int_eq(truncate(path, lengths[i]), 0);
        ck_assert_ptr_null(ry_home_model_load(path, NODES, 77, &err));
    }
    ck_assert_int_eq(ry_home_model_save(m, "/nowhere/model", &err), -1);
    ry_home_model_free(m);
}
END_TEST

/* On recorded routing: tokens tell which half of the experts a sample will use more. */
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
    struct ry_home_model *m = fresh((struct ry_home_options){0});
    struct ry_home_trust t;
    uint32_t *room = malloc((size_t)r->tokens_per_sample * sizeof *room);
    for (int s = 0; s < 1024; s++) {
        double rows[NODES] = {1, 1, 1};
        for (int e = 0; e < r->experts; e++)
            rows[e % NODES] += ry_counts_at(r, s, 3)[e];
        ck_assert_int_eq(
            ry_home_model_observe(m, ry_tokens_at(r, s, room), r->tokens_per_sample, rows, &err), 0);
    }
    free(room);
    ry_home_model_trust(m, &t);
    ck_assert_msg(t.sure && t.explained > 0.7, "%s: explained %g", t.why, t.explained);
    ry_home_model_free(m);
    ry_routing_close(r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("home_model");
    TCase *t = tcase_create("home_model");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, reaches_the_ridge_regression);
    tcase_add_test(t, knows_how_sure_it_is);
    tcase_add_test(t, refuses_what_is_no_sample);
    tcase_add_test(t, file);
    tcase_add_test(t, recorded_traces);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
