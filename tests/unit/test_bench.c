/*
 * test_bench.c: what the benchmark stands on: routing (counts, skew, the same again), rows, and that its content check
 * sees a single wrong byte.
 */
#include <check.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/npy.h"
#include "content.h"
#include "random.h"
#include "routing.h"

#include <fcntl.h>

static uint64_t seed;
static struct ry_err err;

static struct ry_routing *open_routing(struct ry_routing_config *c)
{
    struct ry_routing *r = ry_routing_open(c, &err);
    ck_assert_msg(r, "%s", err.msg);
    return r;
}

/* Every token has top_k different experts that exist; the draw is the same again, and another one elsewhere. */
static void check_choices(const char *how, int experts, int top_k)
{
    struct ry_routing_config c = {
        .how = how, .ranks = 4, .experts = experts, .top_k = top_k, .layers = 3, .tokens = 500, .seed = seed};
    size_t n = (size_t)c.tokens * (size_t)top_k;
    uint16_t *a = calloc(n, sizeof *a), *b = calloc(n, sizeof *b);
    struct ry_routing *r = open_routing(&c), *again = open_routing(&c);
    ry_routing_choose(r, 7, 2, 3, a);
    for (int t = 0; t < c.tokens; t++)
        for (int j = 0; j < top_k; j++) {
            ck_assert_int_lt(a[t * top_k + j], experts);
            for (int i = 0; i < j; i++)
                ck_assert_msg(a[t * top_k + j] != a[t * top_k + i], "%s: token %d has expert %d twice", how, t,
                              a[t * top_k + j]);
        }
    ry_routing_choose(again, 7, 2, 3, b);
    ck_assert_mem_eq(a, b, n * sizeof *a);
    /* with hardly any choice, two draws may well be equal: all experts taken, or one of them nearly always */
    if (top_k < experts && strcmp(how, "zipf:12")) {
        const int other[][3] = {{8, 2, 3}, {7, 1, 3}, {7, 2, 0}};
        for (int i = 0; i < 3; i++) {
            ry_routing_choose(r, (uint64_t)other[i][0], other[i][1], other[i][2], b);
            ck_assert_msg(memcmp(a, b, n * sizeof *a), "%s: case %d repeats the draw", how, i);
        }
        ry_routing_close(again);
        c.seed++;
        again = open_routing(&c);
        ry_routing_choose(again, 7, 2, 3, b);
        ck_assert_msg(memcmp(a, b, n * sizeof *a), "%s: another seed, the same draw", how);
    }
    ry_routing_close(r);
    ry_routing_close(again);
    free(a);
    free(b);
}

START_TEST(choices)
{
    static const char *const hows[] = {"uniform", "zipf:0", "zipf:1.2", "zipf:12"};
    for (size_t i = 0; i < sizeof hows / sizeof *hows; i++) {
        check_choices(hows[i], 16, 2);
        check_choices(hows[i], 64, 8);
        check_choices(hows[i], 4, 4);
        check_choices(hows[i], 4, 1);
        check_choices(hows[i], 1000, 5);
    }
}
END_TEST

static void count_experts(const char *how, int experts, int top_k, int tokens, uint64_t *count)
{
    struct ry_routing_config c = {
        .how = how, .ranks = 1, .experts = experts, .top_k = top_k, .layers = 1, .tokens = tokens, .seed = seed};
    struct ry_routing *r = open_routing(&c);
    uint16_t *choice = calloc((size_t)tokens * (size_t)top_k, sizeof *choice);
    ry_routing_choose(r, 0, 0, 0, choice);
    memset(count, 0, (size_t)experts * sizeof *count);
    for (int i = 0; i < tokens * top_k; i++)
        count[choice[i]]++;
    free(choice);
    ry_routing_close(r);
}

static int descending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

/* Frequencies are those that were asked for: within 6 standard deviations, for any seed. */
START_TEST(frequencies)
{
    enum { E = 32, T = 40000 };
    uint64_t count[E];
    for (int k = 1; k <= 4; k += 3) {
        count_experts("uniform", E, k, T, count);
        double p = (double)k / E;
        for (int e = 0; e < E; e++)
            ck_assert_double_eq_tol((double)count[e], T * p, 6 * sqrt(T * p * (1 - p)));
    }
    count_experts("zipf:1.2", E, 1, T, count);
    qsort(count, E, sizeof *count, descending);
    double sum = 0;
    for (int e = 1; e <= E; e++)
        sum += pow(e, -1.2);
    for (int e = 0; e < 6; e++) { /* ranks far enough apart not to change places */
        double p = pow(e + 1, -1.2) / sum;
        ck_assert_double_eq_tol((double)count[e], T * p, 6 * sqrt(T * p * (1 - p)));
    }
}
END_TEST

/* Layers have different favourites. */
START_TEST(zipf_shuffles)
{
    enum { E = 64, T = 2000, L = 8 };
    struct ry_routing_config c = {
        .how = "zipf:2", .ranks = 1, .experts = E, .top_k = 1, .layers = L, .tokens = T, .seed = seed};
    struct ry_routing *r = open_routing(&c);
    uint16_t choice[T];
    bool differs = false;
    int first = -1;
    for (int l = 0; l < L; l++) {
        uint64_t count[E] = {0};
        int best = 0;
        ry_routing_choose(r, 0, l, 0, choice);
        for (int t = 0; t < T; t++)
            count[choice[t]]++;
        for (int e = 0; e < E; e++)
            best = count[e] > count[best] ? e : best;
        differs |= first >= 0 && best != first;
        first = best;
    }
    ck_assert(differs);
    ry_routing_close(r);
}
END_TEST

START_TEST(bad_routing)
{
    static const struct {
        struct ry_routing_config config;
        const char *says;
    } bad[] = {
        {{.how = "even", .ranks = 2}, "uniform, zipf:S"},
        {{.how = "zipf:", .ranks = 2}, "exponent"},
        {{.how = "zipf:-1", .ranks = 2}, "exponent"},
        {{.how = "zipf:1x", .ranks = 2}, "exponent"},
        {{.how = "zipf:nan", .ranks = 2}, "exponent"},
        {{.how = "trace:", .ranks = 2}, "trace:DIR"},
        {{.how = "trace:/nonexistent", .ranks = 2}, "/nonexistent/meta.json"},
        {{.how = "uniform", .ranks = 3, .experts = 16}, "multiple"},
        {{.how = "uniform", .ranks = 4, .experts = 4, .top_k = 5}, "--top-k=5"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct ry_routing_config c = bad[i].config;
        err.msg[0] = 0;
        ck_assert_ptr_null(ry_routing_open(&c, &err));
        ck_assert_msg(strstr(err.msg, bad[i].says), "case %zu says: %s", i, err.msg);
    }
}
END_TEST

/* A trace of our own making: 3 samples of 4 tokens, 2 layers, 4 experts, top-2; choices for 2 samples only. */
static char dir[] = "/tmp/railyard-test-XXXXXX";

static void write_meta(const char *text)
{
    char path[64];
    snprintf(path, sizeof path, "%s/meta.json", dir);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
}

#define META "{\"layers\": 2, \"experts\": 4, \"topk\": 2, \"tokens_per_sample\": 4}"
static const size_t counts_shape[] = {3, 2, 4}, choices_shape[] = {2, 2, 4, 2};
static uint8_t recorded[2][2][4][2];

static void save(const char *name, enum ry_npy_type type, int ndim, const size_t *shape, const void *data)
{
    char path[64];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    ck_assert_msg(!ry_npy_save(AT_FDCWD, path, type, ndim, shape, data, &err), "%s", err.msg);
}

static void make_trace(void)
{
    uint16_t counts[3][2][4] = {0};
    ck_assert_ptr_nonnull(mkdtemp(dir));
    for (int s = 0; s < 2; s++)
        for (int l = 0; l < 2; l++)
            for (int t = 0; t < 4; t++) {
                recorded[s][l][t][0] = (uint8_t)((s + t) % 4);
                recorded[s][l][t][1] = (uint8_t)((s + t + 1 + l) % 4);
                for (int j = 0; j < 2; j++)
                    counts[s][l][recorded[s][l][t][j]]++;
            }
    counts[2][0][1] = counts[2][0][3] = 4; /* the third sample: only experts 1 and 3 */
    counts[2][1][2] = 4;                   /* and one that has a single expert with any count */
    write_meta(META);
    save("counts.npy", RY_NPY_U16, 3, counts_shape, counts);
    save("choices.npy", RY_NPY_U8, 4, choices_shape, recorded);
}

static void remove_trace(void)
{
    static const char *const names[] = {"meta.json", "counts.npy", "choices.npy"};
    char path[64];
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        unlink(path);
    }
    rmdir(dir);
    memcpy(dir + strlen(dir) - 6, "XXXXXX", 6);
}

START_TEST(trace)
{
    char how[64];
    snprintf(how, sizeof how, "trace:%s", dir);
    struct ry_routing_config c = {.how = how, .ranks = 2, .tokens = 2, .seed = seed};
    struct ry_routing *r = open_routing(&c);
    ck_assert_int_eq(c.experts, 4);
    ck_assert_int_eq(c.top_k, 2);
    ck_assert_int_eq(c.layers, 2);
    uint16_t choice[4];
    for (int i = 0; i < 6;
         i++) /* two ranks of two tokens: one sample per iteration, from the start again after three */
        for (int l = 0; l < 2; l++)
            for (int rank = 0; rank < 2; rank++) {
                ry_routing_choose(r, (uint64_t)i, l, rank, choice);
                for (int t = 0; t < 2; t++)
                    if (i % 3 < 2)
                        for (int j = 0; j < 2; j++)
                            ck_assert_uint_eq(choice[t * 2 + j], recorded[i % 3][l][rank * 2 + t][j]);
                    else if (l == 0)
                        ck_assert_msg(choice[t * 2] + choice[t * 2 + 1] == 4 &&
                                          abs(choice[t * 2] - choice[t * 2 + 1]) == 2,
                                      "drawn experts without counts: %d %d", choice[t * 2], choice[t * 2 + 1]);
                    else
                        ck_assert_msg(choice[t * 2] == 2 && choice[t * 2 + 1] != 2, "%d %d", choice[t * 2],
                                      choice[t * 2 + 1]);
            }
    ry_routing_close(r);
}
END_TEST

static void refuse(struct ry_routing_config c, const char *says)
{
    char how[64];
    snprintf(how, sizeof how, "trace:%s", dir);
    c.how = how;
    c.ranks = c.ranks ? c.ranks : 2;
    c.tokens = 2;
    err.msg[0] = 0;
    ck_assert_ptr_null(ry_routing_open(&c, &err));
    ck_assert_msg(strstr(err.msg, says), "expected '%s' in: %s", says, err.msg);
}

START_TEST(bad_trace)
{
    refuse((struct ry_routing_config){.experts = 8}, "--experts=8 contradicts");
    refuse((struct ry_routing_config){.top_k = 1}, "--top-k=1 contradicts");
    refuse((struct ry_routing_config){.layers = 3}, "has only 2");
    refuse((struct ry_routing_config){.ranks = 3}, "multiple");
    write_meta("{\"layers\": 2, \"experts\": 4, \"tokens_per_sample\": 4}");
    refuse((struct ry_routing_config){0}, "\"topk\"");
    write_meta("{\"layers\": 2, \"experts\": 4, \"topk\": 2.5, \"tokens_per_sample\": 4}");
    refuse((struct ry_routing_config){0}, "\"topk\"");
    write_meta("{\"layers\": 2,");
    refuse((struct ry_routing_config){0}, "meta.json");
    write_meta("{\"layers\": 2, \"experts\": 4, \"topk\": 2, \"tokens_per_sample\": 5}");
    refuse((struct ry_routing_config){0}, "choices.npy: holds uint8 (2, 2, 4, 2)");
    write_meta("{\"layers\": 3, \"experts\": 4, \"topk\": 2, \"tokens_per_sample\": 4}");
    refuse((struct ry_routing_config){0}, "counts.npy: holds uint16 (3, 2, 4)");
    write_meta(META);
    recorded[1][0][2][1] = 4;
    save("choices.npy", RY_NPY_U8, 4, choices_shape, recorded);
    refuse((struct ry_routing_config){0}, "element 21 is expert 4");
    recorded[1][0][2][1] = recorded[1][0][2][0];
    save("choices.npy", RY_NPY_U8, 4, choices_shape, recorded);
    refuse((struct ry_routing_config){0}, "twice");
}
END_TEST

/* Rows come expert by expert and, in each, by token; together they are the routing, no more and no less. */
START_TEST(rows)
{
    enum { E = 12, K = 3, T = 200 };
    struct ry_routing_config c = {
        .how = "zipf:1", .ranks = 3, .experts = E, .top_k = K, .layers = 1, .tokens = T, .seed = seed};
    struct ry_routing *r = open_routing(&c);
    uint16_t choice[T * K];
    struct ry_row row[T * K], part[T * K];
    uint64_t count[E];
    ry_routing_choose(r, 0, 0, 1, choice);
    size_t n = ry_rows_list(row, count, choice, T, K, 1, 0, E, 0), at = 0;
    ck_assert_uint_eq(n, T * K);
    for (int e = 0; e < E; e++)
        for (uint64_t i = 0; i < count[e]; i++, at++) {
            ck_assert_int_eq(row[at].expert, e);
            ck_assert_int_eq(row[at].owner, 1);
            if (i)
                ck_assert_int_gt(row[at].token, row[at - 1].token);
            bool found = false;
            for (int j = 0; j < K; j++)
                found |= choice[row[at].token * K + j] == e;
            ck_assert(found);
        }
    ck_assert_uint_eq(at, n);
    at = 0; /* what the experts' ranks list is the same, cut at their borders */
    for (int rank = 0; rank < 3; rank++) {
        size_t m = ry_rows_list(part, NULL, choice, T, K, 1, rank * 4, rank * 4 + 4, 0);
        ck_assert_mem_eq(part, row + at, m * sizeof *part);
        at += m;
    }
    ck_assert_uint_eq(at, n);

    enum { CAPACITY = 40 };
    struct ry_row padded[E * CAPACITY];
    size_t m = ry_rows_list(padded, NULL, choice, T, K, 1, 0, E, CAPACITY), start = 0;
    ck_assert_uint_eq(m, E * CAPACITY);
    for (int e = 0; e < E; start += count[e++])
        for (size_t i = 0; i < CAPACITY; i++) {
            const struct ry_row *p = padded + e * CAPACITY + i;
            ck_assert_int_eq(p->expert, e);
            ck_assert_int_eq(p->token, i < count[e] ? row[start + i].token : RY_PADDING);
        }
    ry_routing_close(r);
}
END_TEST

/* Exactly what a receiver computes is right, and any one changed byte is wrong. */
START_TEST(content)
{
    enum { N = 5 };
    static const struct ry_row row[N] = {{0, 3, 1}, {0, 4, 1}, {2, 3, 1}, {0, RY_PADDING, 1}, {0, 3, 2}};
    static const size_t widths[] = {1, 2, 4, 7, 8, 30, 1024};
    unsigned char buf[N * 1024];
    struct ry_wrong wrong;
    for (int flow = 0; flow < RY_FLOWS; flow++)
        for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
            struct ry_content c = {
                .seed = seed, .iteration = 5, .layer = 1, .flow = (enum ry_flow)flow, .row_bytes = widths[w]};
            size_t bytes = N * widths[w];
            ry_content_fill(&c, row, N, buf);
            ck_assert(ry_content_check(&c, row, N, buf, &wrong));
            ck_assert_uint_eq(wrong.bytes, 0);
            for (int i = 0; i < 20; i++) {
                size_t at = ry_random_at(seed, (uint64_t)i) % bytes;
                unsigned char was = buf[at];
                buf[at] ^= (unsigned char)(1 << i % 8);
                ck_assert(!ry_content_check(&c, row, N, buf, &wrong));
                ck_assert_uint_eq(wrong.bytes, 1);
                ck_assert_uint_eq(wrong.first, at);
                ck_assert_uint_eq(wrong.got, buf[at]);
                ck_assert_uint_eq(wrong.expected, was);
                buf[at] = was;
            }
            if (widths[w] < 8)
                continue; /* short rows may be equal by chance */
            bool copies = flow == RY_FLOW_DISPATCH || flow == RY_FLOW_COMBINE_GRAD;
            ck_assert_int_eq(!memcmp(buf, buf + 4 * widths[w], widths[w]), copies); /* one token, two experts */
            ck_assert_mem_ne(buf, buf + widths[w], widths[w]);                      /* two tokens */
            ck_assert_mem_ne(buf, buf + 2 * widths[w], widths[w]);                  /* two owners */
            bool zero = true;
            for (size_t i = 0; i < widths[w]; i++)
                zero &= !buf[3 * widths[w] + i];
            ck_assert_int_eq(zero, flow != RY_FLOW_COMBINE); /* padding */
            /* each coordinate matters */
            struct ry_content other[] = {c, c, c, c};
            other[0].seed++;
            other[1].iteration++;
            other[2].layer++;
            other[3].flow = (enum ry_flow)((flow + 1) % RY_FLOWS);
            for (int i = 0; i < 4; i++)
                ck_assert_msg(!ry_content_check(&other[i], row, 1, buf, &wrong), "coordinate %d does not matter", i);
        }
}
END_TEST

/* Elements of floating-point types are finite, so that code that adds them up meets no NaN. */
START_TEST(finite_elements)
{
    const struct ry_row row = {0, 1, 0};
    float f[256];
    struct ry_content c = {.seed = seed, .row_bytes = sizeof f, .mask = UINT64_C(0x4000000040000000)};
    ry_content_fill(&c, &row, 1, f);
    for (int i = 0; i < 256; i++)
        ck_assert(isfinite(f[i]) && fabsf(f[i]) < 2);
}
END_TEST

/* The recorded routing that comes with the project's other material, where it is at hand. */
START_TEST(shared_traces)
{
    static const char *const names[] = {"gpt-e32-k2", "gpt-e64-k6"};
    const char *shared = getenv("RY_SHARED");
    for (int i = 0; i < 2; i++) {
        char how[4096];
        struct stat st;
        snprintf(how, sizeof how, "trace:%s/traces/%s", shared ? shared : "", names[i]);
        if (!shared || stat(how + 6, &st)) {
            printf("SKIP shared_traces: no folder %s\n", how + 6);
            continue;
        }
        struct ry_routing_config c = {.how = how, .ranks = 8, .tokens = 512, .seed = seed};
        struct ry_routing *r = open_routing(&c);
        uint16_t *choice = calloc(512 * (size_t)c.top_k, sizeof *choice);
        for (uint64_t iteration = 0; iteration < 64; iteration += 21) /* recorded samples, then drawn ones */
            ry_routing_choose(r, iteration, c.layers - 1, 7, choice);
        ry_routing_close(r);
        free(choice);
    }
}
END_TEST

int main(void)
{
    const char *set = getenv("RY_TEST_SEED");
    seed = set ? strtoull(set, NULL, 10) : (uint64_t)time(NULL) ^ (uint64_t)getpid() << 32;
    printf("RY_TEST_SEED=%llu\n", (unsigned long long)seed);
    fflush(stdout);
    Suite *suite = suite_create("bench");
    TCase *t = tcase_create("bench"), *on_disk = tcase_create("trace");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, choices);
    tcase_add_test(t, frequencies);
    tcase_add_test(t, zipf_shuffles);
    tcase_add_test(t, bad_routing);
    tcase_add_test(t, rows);
    tcase_add_test(t, content);
    tcase_add_test(t, finite_elements);
    tcase_add_test(t, shared_traces);
    tcase_add_checked_fixture(on_disk, make_trace, remove_trace);
    tcase_add_test(on_disk, trace);
    tcase_add_test(on_disk, bad_trace);
    suite_add_tcase(suite, t);
    suite_add_tcase(suite, on_disk);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
