/* test_routing.c: routing folders: what is read, what is refused and with which words; writing; shuffling; affinities.
 */
#include <check.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "place/locality.h"
#include "place/problem.h"
#include "place/random.h"

static char dir[64], cmd[128];
static struct ry_err err;
static uint64_t rng;

enum { S = 6, L = 2, E = 4, T = 8, K = 2, C = 3 };
static const char good[] =
    "{\"samples\": 6, \"layers\": 2, \"experts\": 4, \"tokens_per_sample\": 8, \"topk\": 2, \"choice_samples\": 3,"
    "\"vocabulary\": 100, \"domains\": [\"a\", \"b\"], \"counts\": \"counts.npy uint16\", \"choices\": "
    "\"choices.npy\", \"domain\": \"domain.npy\", \"tokens\": \"tokens.npy\"}";

static void put(const char *name, const char *text)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
}

static void save(const char *name, enum ry_npy_type type, int ndim, const size_t *shape, const void *data)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    ck_assert_msg(!ry_npy_save(AT_FDCWD, path, type, ndim, shape, data, &err), "%s", err.msg);
}

static uint16_t counts[S][L][E], tokens[S][T];
static uint8_t choices[C][L][T][K], domain[S];

static void save_all(void)
{
    save("counts.npy", RY_NPY_U16, 3, (size_t[]){S, L, E}, counts);
    save("choices.npy", RY_NPY_U8, 4, (size_t[]){C, L, T, K}, choices);
    save("tokens.npy", RY_NPY_U16, 2, (size_t[]){S, T}, tokens);
    save("domain.npy", RY_NPY_U8, 1, (size_t[]){S}, domain);
    put("meta.json", good);
}

static void fill(void)
{
    rng = 5;
    memset(counts, 0, sizeof counts);
    for (int s = 0; s < S; s++) {
        domain[s] = (uint8_t)(s % 2);
        for (int t = 0; t < T; t++)
            tokens[s][t] = (uint16_t)ry_random_below(&rng, 100);
        for (int l = 0; l < L; l++) {
            for (int t = 0; t < T; t++) {
                int a = (int)ry_random_below(&rng, E), b = (a + 1 + (int)ry_random_below(&rng, E - 1)) % E;
                counts[s][l][a]++;
                counts[s][l][b]++;
                if (s < C) {
                    choices[s][l][t][0] = (uint8_t)a;
                    choices[s][l][t][1] = (uint8_t)b;
                }
            }
        }
    }
    save_all();
}

static void setup(void)
{
    snprintf(dir, sizeof dir, "/tmp/test_routing.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    fill();
}

static void teardown(void)
{
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    ck_assert_int_eq(system(cmd), 0);
}

static struct ry_routing *opened(void)
{
    struct ry_routing *r = ry_routing_open(dir, &err);
    ck_assert_msg(r != NULL, "%s", err.msg);
    return r;
}

/* Refused, with both texts in the message: the file, and what is wrong. */
static void refused(const char *file, const char *why)
{
    struct ry_routing *r = ry_routing_open(dir, &err);
    ck_assert_msg(!r, "was taken: expected '%s'", why);
    ck_assert_msg(strstr(err.msg, file) && strstr(err.msg, why), "'%s' does not name '%s' and say '%s'", err.msg, file,
                  why);
    save_all();
}

START_TEST(reads)
{
    struct ry_routing *r = opened();
    ck_assert_int_eq(r->samples, S);
    ck_assert_int_eq(r->choice_samples, C);
    ck_assert_int_eq(r->vocabulary, 100);
    ck_assert_int_eq(r->ndomains, 2);
    ck_assert_str_eq(r->domains[1], "b");
    ck_assert_mem_eq(r->counts, counts, sizeof counts);
    ck_assert_mem_eq(r->choices8, choices, sizeof choices);
    ck_assert_mem_eq(r->tokens16, tokens, sizeof tokens);
    ck_assert_mem_eq(r->domain, domain, sizeof domain);
    ck_assert_int_eq(ry_choice(r, 2, 1, 7, 1), choices[2][1][7][1]);
    ry_routing_close(r);
    /* Only what is required. */
    put("meta.json",
        "{\"samples\": 6, \"layers\": 2, \"experts\": 4, \"tokens_per_sample\": 8, \"topk\": 2, \"choice_samples\": 3, "
        "\"counts\": \"counts.npy\"}");
    r = opened();
    ck_assert_int_eq(r->choice_samples, 0);
    ck_assert(!ry_has_tokens(r));
    ry_routing_close(r);
}
END_TEST

START_TEST(other_types)
{
    float f32[S * L * E];
    int64_t i64[C * L * T * K];
    for (size_t i = 0; i < sizeof f32 / sizeof *f32; i++)
        f32[i] = ((const uint16_t *)counts)[i];
    for (size_t i = 0; i < sizeof i64 / sizeof *i64; i++)
        i64[i] = ((const uint8_t *)choices)[i];
    save("counts.npy", RY_NPY_F32, 3, (size_t[]){S, L, E}, f32);
    save("choices.npy", RY_NPY_I64, 4, (size_t[]){C, L, T, K}, i64);
    struct ry_routing *r = opened();
    ck_assert_mem_eq(r->counts, counts, sizeof counts);
    ck_assert_ptr_null(r->choices8);
    ck_assert_int_eq(ry_choice(r, 1, 1, 3, 0), choices[1][1][3][0]);
    ry_routing_close(r);

    f32[S * L * E - 1] = NAN;
    save("counts.npy", RY_NPY_F32, 3, (size_t[]){S, L, E}, f32);
    refused("counts.npy", "counts[5][1][3] is nan");
    f32[S * L * E - 1] = 0.5f;
    save("counts.npy", RY_NPY_F32, 3, (size_t[]){S, L, E}, f32);
    refused("counts.npy", "counts[5][1][3] is 0.5");
    i64[5] = -1;
    save("choices.npy", RY_NPY_I64, 4, (size_t[]){C, L, T, K}, i64);
    refused("choices.npy", "choices[0][0][2][1] is negative");
    i64[5] = INT64_MAX;
    save("choices.npy", RY_NPY_I64, 4, (size_t[]){C, L, T, K}, i64);
    refused("choices.npy", "not a whole number from 0 to 3");
}
END_TEST

/* Token ids of large vocabularies: in place as uint32, converted from int64. */
START_TEST(wide_tokens)
{
    uint32_t u32[S][T], room[T];
    int64_t i64[S][T];
    for (int s = 0; s < S; s++)
        for (int t = 0; t < T; t++)
            i64[s][t] = u32[s][t] = (uint32_t)(s * T + t) * 4000;
    for (int wide = 0; wide < 3; wide++) {
        if (wide == 1)
            save("tokens.npy", RY_NPY_U32, 2, (size_t[]){S, T}, u32);
        else if (wide == 2)
            save("tokens.npy", RY_NPY_I64, 2, (size_t[]){S, T}, i64);
        else
            save("tokens.npy", RY_NPY_U16, 2, (size_t[]){S, T}, tokens);
        if (wide) {
            struct ry_routing *r = ry_routing_open(dir, &err);
            ck_assert_ptr_null(r);
            ck_assert_msg(strstr(err.msg, "tokens[0][1] is 4000, not a whole number from 0 to 99"), "%s", err.msg);
        }
        put("meta.json",
            "{\"samples\": 6, \"layers\": 2, \"experts\": 4, \"tokens_per_sample\": 8, \"topk\": 2, \"counts\": "
            "\"counts.npy\", \"tokens\": \"tokens.npy\"}");
        struct ry_routing *r = opened();
        ck_assert(ry_has_tokens(r) && !r->tokens16 == !!wide && !r->tokens32 == !wide);
        ck_assert((wide == 1) == ((const void *)r->tokens32 == r->maps[2].data));
        for (int s = 0; s < S; s++)
            for (int t = 0; t < T; t++)
                ck_assert_uint_eq(ry_tokens_at(r, s, room)[t], wide ? u32[s][t] : tokens[s][t]);
        char other[96];
        snprintf(other, sizeof other, "%s/saved%d", dir, wide);
        snprintf(cmd, sizeof cmd, "mkdir %s", other);
        ck_assert_int_eq(system(cmd), 0);
        ck_assert_msg(!ry_routing_save(r, other, &err), "%s", err.msg);
        struct ry_routing *b = ry_routing_open(other, &err);
        ck_assert_msg(b != NULL, "%s", err.msg);
        ck_assert_uint_eq(ry_tokens_at(b, 5, room)[7], wide ? u32[5][7] : tokens[5][7]);
        ry_routing_close(b);
        ry_routing_close(r);
        put("meta.json", good);
    }
    i64[5][7] = INT64_C(1) << 32;
    put("meta.json", "{\"samples\": 6, \"layers\": 2, \"experts\": 4, \"tokens_per_sample\": 8, \"topk\": 2, \"counts\": "
                     "\"counts.npy\", \"tokens\": \"tokens.npy\"}");
    save("tokens.npy", RY_NPY_I64, 2, (size_t[]){S, T}, i64);
    refused("tokens.npy", "tokens[5][7] is 4294967296");
}
END_TEST

/* More samples than meta.json tells of are passed over where it says that the folder grows, and only there. */
START_TEST(growing)
{
    static const char text[] = "{\"samples\": %d, \"layers\": 2, \"experts\": 4, \"tokens_per_sample\": 8, \"topk\": 2, "
                               "\"growing\": %s, \"counts\": \"counts.npy\", \"tokens\": \"tokens.npy\"}";
    char meta[sizeof text + 16];
    static const struct {
        int samples;
        const char *growing;
        bool good;
    } cases[] = {{6, "true", true}, {4, "true", true}, {7, "true", false}, {4, "false", false}, {4, "1", false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(meta, sizeof meta, text, cases[i].samples, cases[i].growing);
        put("meta.json", meta);
        if (cases[i].good) {
            struct ry_routing *r = opened();
            ck_assert_int_eq(r->samples, cases[i].samples);
            ck_assert_mem_eq(r->counts, counts, sizeof counts[0] * (size_t)cases[i].samples);
            ry_routing_close(r);
        } else {
            refused("counts.npy", "has shape (6, 2, 4)");
        }
    }
}
END_TEST

START_TEST(refuses)
{
    static const struct {
        const char *from, *to, *why;
    } edits[] = {
        {"\"samples\": 6", "\"samples\": 0", "'samples' must be a whole number from 1"},
        {"\"samples\": 6", "\"samples\": \"6\"", "'samples' must be"},
        {"\"samples\": 6, ", "", "'samples' is missing"},
        {"\"experts\": 4", "\"experts\": -4", "'experts' must be"},
        {"\"topk\": 2", "\"topk\": 5", "'topk' must be a whole number from 1 to 4"},
        {"\"layers\": 2", "\"layers\": 2.5", "'layers' must be"},
        {"\"choice_samples\": 3", "\"choice_samples\": 7", "'choice_samples' must be"},
        {"\"counts\": \"counts.npy uint16\", ", "", "'counts' is missing"},
        {"counts.npy uint16", "../counts.npy", "'counts' must begin with the name of a .npy file"},
        {"\"counts.npy uint16\"", "7", "'counts' must begin"},
        {"[\"a\", \"b\"]", "\"a\"", "'domains' must be a list"},
        {"[\"a\", \"b\"]", "[\"a\", 1]", "'domains'[1] is no text"},
        {"}", "", "line 1"},
        {"{\"samples\"", "[\"samples\"", "line 1"},
    };
    char text[1024];
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        const char *at = strstr(good, edits[i].from);
        ck_assert_ptr_nonnull(at);
        snprintf(text, sizeof text, "%.*s%s%s", (int)(at - good), good, edits[i].to, at + strlen(edits[i].from));
        put("meta.json", text);
        refused("meta.json", edits[i].why);
    }
    put("meta.json", "[]");
    refused("meta.json", "is no JSON object");
    put("meta.json", "");
    refused("meta.json", "line 1");
    snprintf(cmd, sizeof cmd, "%s/meta.json", dir);
    unlink(cmd);
    refused("meta.json", "cannot be opened");

    save("counts.npy", RY_NPY_U16, 3, (size_t[]){S, E, L}, counts);
    refused("counts.npy", "has shape (6, 4, 2), but by meta.json 'counts' must have (6, 2, 4)");
    save("counts.npy", RY_NPY_U16, 2, (size_t[]){S, L * E}, counts);
    refused("counts.npy", "has shape (6, 8)");
    snprintf(cmd, sizeof cmd, "truncate -s -1 %s/counts.npy", dir);
    ck_assert_int_eq(system(cmd), 0);
    refused("counts.npy", "is truncated");
    snprintf(cmd, sizeof cmd, "%s/tokens.npy", dir);
    unlink(cmd);
    refused("tokens.npy", "No such file");

    choices[1][0][2][1] = 4;
    save("choices.npy", RY_NPY_U8, 4, (size_t[]){C, L, T, K}, choices);
    refused("choices.npy", "choices[1][0][2][1] is 4, not a whole number from 0 to 3");
    fill();
    tokens[5][7] = 100;
    save("tokens.npy", RY_NPY_U16, 2, (size_t[]){S, T}, tokens);
    tokens[5][7] = 0;
    refused("tokens.npy", "tokens[5][7] is 100");
    domain[0] = 2;
    save("domain.npy", RY_NPY_U8, 1, (size_t[]){S}, domain);
    domain[0] = 0;
    refused("domain.npy", "domain[0] is 2");
    counts[4][1][0] += 1;
    save("counts.npy", RY_NPY_U16, 3, (size_t[]){S, L, E}, counts);
    counts[4][1][0] -= 1;
    refused("counts.npy", "counts[4][1] adds up to 17, but a sample of 8 tokens with topk 2 has 16");
    uint16_t *c = counts[1][1];
    int a = c[0] ? 0 : 1, b = a + 1;
    c[a]--;
    c[b]++;
    save("counts.npy", RY_NPY_U16, 3, (size_t[]){S, L, E}, counts);
    c[a]++;
    c[b]--;
    refused("counts.npy", "choices are for that expert");
}
END_TEST

START_TEST(saves)
{
    struct ry_routing *r = opened();
    char other[96];
    snprintf(other, sizeof other, "%s/other", dir);
    ck_assert_int_eq(ry_routing_save(r, other, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, other));
    snprintf(cmd, sizeof cmd, "mkdir %s", other);
    ck_assert_int_eq(system(cmd), 0);
    ck_assert_msg(!ry_routing_save(r, other, &err), "%s", err.msg);
    struct ry_routing *b = ry_routing_open(other, &err);
    ck_assert_msg(b != NULL, "%s", err.msg);
    ck_assert_int_eq(b->choice_samples, C);
    ck_assert_int_eq(b->vocabulary, 100);
    ck_assert_str_eq(b->domains[0], "a");
    ck_assert_mem_eq(b->counts, counts, sizeof counts);
    ck_assert_mem_eq(b->choices8, choices, sizeof choices);
    ck_assert_mem_eq(b->tokens16, tokens, sizeof tokens);
    ck_assert_mem_eq(b->domain, domain, sizeof domain);
    ry_routing_close(b);
    ry_routing_close(r);
}
END_TEST

START_TEST(shuffles)
{
    struct ry_routing *r = opened(), *a = ry_routing_shuffled(r, 1, &err), *b = ry_routing_shuffled(r, 1, &err),
                      *other = ry_routing_shuffled(r, 2, &err);
    ck_assert_mem_eq(a->counts, b->counts, sizeof counts);
    ck_assert_mem_ne(a->counts, other->counts, sizeof counts);
    for (int l = 0; l < L; l++) {
        int before[2][E] = {0}, after[2][E] = {0}; /* with and without choices */
        for (int s = 0; s < S; s++) {
            int sum = 0;
            for (int e = 0; e < E; e++) {
                before[s < C][e] += counts[s][l][e];
                after[s < C][e] += ry_counts_at(a, s, l)[e];
                sum += ry_counts_at(a, s, l)[e];
            }
            ck_assert_int_eq(sum, T * K);
        }
        ck_assert_mem_eq(before, after, sizeof before);
    }
    /* Tokens stay whole: each layer's pair of choices goes with the other layer's. */
    int seen[2][E * E * E * E] = {0};
    for (int s = 0; s < C; s++) {
        for (int t = 0; t < T; t++) {
            for (int x = 0; x < 2; x++) {
                const struct ry_routing *q = x ? a : r;
                int code = 0;
                for (int l = 0; l < L; l++)
                    for (int k = 0; k < K; k++)
                        code = code * E + ry_choice(q, s, l, t, k);
                seen[x][code]++;
            }
        }
    }
    ck_assert_mem_eq(seen[0], seen[1], sizeof seen[0]);
    ry_routing_close(r);
    ry_routing_close(a);
    ry_routing_close(b);
    ry_routing_close(other);
}
END_TEST

START_TEST(affinities)
{
    struct ry_routing *r = opened();
    struct ry_cluster *c = ry_place_cluster(2, 2, 0, 0, &err);
    int map[L][E] = {{0, 1, 2, 3}, {3, 1, 0, 2}}, capacity[4] = {1, 1, 1, 0};
    struct ry_problem p = {.cluster = c, .routing = r, .nsamples = 3, .capacity = capacity, .expert_rank = map[0]};
    uint32_t got[L * 4];
    for (int i = 0; i < 3; i++) {
        for (int counting = RY_COPIES; counting <= RY_DISTINCT; counting++) {
            p.counting = (enum ry_counting)counting;
            ck_assert_msg(!ry_problem_check(&p, &err), "%s", err.msg);
            for (int level = RY_NODES; level <= RY_RANKS; level++) {
                int places = level == RY_NODES ? 2 : 4;
                uint32_t want[L * 4] = {0};
                for (int l = 0; l < L; l++) {
                    for (int t = 0; t < T; t++) {
                        int a = map[l][choices[i][l][t][0]], b = map[l][choices[i][l][t][1]];
                        if (level == RY_NODES) {
                            a /= 2;
                            b /= 2;
                        }
                        want[l * places + a]++;
                        want[l * places + b] += counting == RY_COPIES || a != b;
                    }
                }
                ry_affinity(&p, (enum ry_level)level, i, got);
                ck_assert_mem_eq(got, want, (size_t)(L * places) * sizeof *got);
            }
        }
    }
    static const struct {
        int nsamples, cap, expert, counting;
        const char *why;
    } bad[] = {{0, 1, 0, 0, "nothing to place"},
               {7, 9, 0, 0, "the routing holds 6 samples"},
               {4, 1, 0, 0, "the capacities hold 3 samples, 4 are to be placed"},
               {3, -1, 0, 0, "capacity[0] is -1"},
               {3, 1, 4, 0, "expert 0 of layer 0 is on rank 4"},
               {4, 9, 0, 1, "token-level choices, which sample 3 has not"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        p.nsamples = bad[i].nsamples;
        p.counting = (enum ry_counting)bad[i].counting;
        capacity[0] = bad[i].cap;
        map[0][0] = bad[i].expert;
        ck_assert_int_eq(ry_problem_check(&p, &err), -1);
        ck_assert_msg(strstr(err.msg, bad[i].why) != NULL, "'%s' does not say '%s'", err.msg, bad[i].why);
    }
    ck_assert_int_eq(ry_experts_contiguous(map[0], L, E, 3, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "4 experts cannot be dealt out evenly to 3 ranks"));
    ck_assert_ptr_null(ry_place_cluster(0, 4, 0, 0, &err));
    ry_cluster_free(c);
    ry_routing_close(r);
}
END_TEST

START_TEST(capacities)
{
    for (int n = 0; n < 100; n++) {
        int cap[7], home[100], load[7] = {0}, sum = 0;
        ry_capacity_even(cap, 7, n);
        for (int r = 0; r < 7; r++) {
            ck_assert_int_ge(cap[r], n / 7);
            ck_assert_int_le(cap[r], (n + 6) / 7);
            sum += cap[r];
        }
        ck_assert_int_eq(sum, n);
        ry_home_in_order(home, cap, 7, n);
        for (int i = 0; i < n; i++) {
            load[home[i]]++;
            ck_assert(i == 0 || home[i] >= home[i - 1]);
        }
        ck_assert_mem_eq(load, cap, sizeof cap);
    }
}
END_TEST

START_TEST(shared_traces)
{
    static const struct {
        const char *name;
        int experts, topk;
    } traces[] = {{"gpt-e32-k2", 32, 2}, {"gpt-e64-k6", 64, 6}, {"gpt-e32-k2-english", 32, 2}};
    const char *shared = getenv("RY_SHARED");
    char path[4096];
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/traces/%s", shared ? shared : "", traces[i].name);
        if (!shared || access(path, R_OK)) {
            fprintf(stderr, "SKIPPED shared_traces: no routing traces in RY_SHARED\n");
            return;
        }
        struct ry_routing *r = ry_routing_open(path, &err);
        ck_assert_msg(r != NULL, "%s", err.msg);
        ck_assert_int_eq(r->samples, 3072);
        ck_assert_int_eq(r->experts, traces[i].experts);
        ck_assert_int_eq(r->topk, traces[i].topk);
        ck_assert_ptr_eq(r->counts, r->maps[0].data); /* in place, not copied */
        ck_assert_double_gt(ry_locality(r, 0, 1024), 20);
        struct ry_routing *shuffled = ry_routing_shuffled(r, 1, &err);
        ck_assert_double_lt(fabs(ry_locality(shuffled, 0, 1024) - 1), 0.15);
        ck_assert_double_lt(fabs(ry_locality(shuffled, 1024, 1024) - 1), 0.05);
        ry_routing_close(shuffled);
        ry_routing_close(r);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("routing");
    TCase *t = tcase_create("routing");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, reads);
    tcase_add_test(t, other_types);
    tcase_add_test(t, wide_tokens);
    tcase_add_test(t, growing);
    tcase_add_test(t, refuses);
    tcase_add_test(t, saves);
    tcase_add_test(t, shuffles);
    tcase_add_test(t, affinities);
    tcase_add_test(t, capacities);
    tcase_add_test(t, shared_traces);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
