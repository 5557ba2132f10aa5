/* test_row_width.c: learning rows from counts: ratio of two exchanges, the setting, the gcd, and what must not fool it. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/row_width.h"

static struct ry_row_width w;
static const char *source;

static uint64_t see(const uint64_t *send, const uint64_t *recv)
{
    return ry_row_width_see(&w, send, recv, 2, &source);
}

static void setup(void)
{
    ck_assert_int_eq(ry_row_width_init(&w, 4, 0), 0);
}
static void teardown(void)
{
    ry_row_width_free(&w);
}

/* Megatron: tokens, then probabilities with the same splits; from then on tokens are known at once. */
START_TEST(tokens_then_probabilities)
{
    uint64_t rows_out[4] = {3, 0, 7, 5}, rows_in[4] = {3, 2, 0, 11}, a[4], b[4];
    for (int i = 0; i < 4; i++)
        a[i] = rows_out[i] * 1024, b[i] = rows_in[i] * 1024;
    ck_assert_uint_eq(see(a, b), 1024);
    ck_assert_str_eq(source, "gcd");
    ck_assert_uint_eq(see(rows_out, rows_in), 1);
    ck_assert_str_eq(source, "ratio");
    ck_assert_uint_eq(see(b, a), 1024); /* the combine */
    ck_assert_str_eq(source, "ratio");
    uint64_t even[4] = {2048, 2048, 2048, 2048}; /* gcd alone would say 2048 */
    ck_assert_uint_eq(see(even, even), 1024);
    ck_assert_str_eq(source, "ratio");
}
END_TEST

START_TEST(probabilities_then_tokens)
{
    uint64_t p[4] = {4, 4, 4, 4}, t[4] = {256, 256, 256, 256};
    see(p, p);
    ck_assert_uint_eq(see(t, t), 64);
    ck_assert_str_eq(source, "ratio");
}
END_TEST

/* One that was only noted teaches what comes after it as one that was seen does, and nothing by itself. */
START_TEST(noted)
{
    uint64_t p[4] = {4, 1, 0, 9}, q[4] = {2, 0, 3, 3}, t[4], u[4], other[4] = {6, 6, 6, 6};
    for (int i = 0; i < 4; i++)
        t[i] = p[i] * 64, u[i] = q[i] * 64;
    ry_row_width_note(&w, p, q);
    ck_assert_uint_eq(w.learned, 0);
    ck_assert_uint_eq(see(t, u), 64);
    ck_assert_str_eq(source, "ratio");
    ry_row_width_note(&w, other, other); /* tokens, something else, probabilities: not their neighbours any more */
    w.learned = 0;
    see(p, q);
    ck_assert_uint_eq(w.learned, 0);
    ck_assert_uint_eq(see(t, u), 64);
}
END_TEST

/* Counts swapped in between, and tensors of another sort, do not spoil what is known of rows. */
START_TEST(other_traffic)
{
    uint64_t few[4] = {8, 8, 8, 8}, odd[4] = {100, 100, 100, 100}, a[4], b[4];
    for (uint64_t i = 0; i < 4; i++)
        a[i] = (3 + i) * 1536, b[i] = (5 + 2 * i) * 1536;
    ck_assert_uint_eq(see(few, few), 8);
    ck_assert_uint_eq(see(a, b), 1536);
    ck_assert_uint_eq(see(few, few), 8);
    ck_assert_uint_eq(see(b, a), 1536);
    ck_assert_uint_eq(see(odd, odd), 100);
    ck_assert_uint_eq(see(a, b), 1536);
}
END_TEST

/* What is looked for where the gcd is many rows: pieces that divide them. */
START_TEST(pieces)
{
    ck_assert_uint_eq(ry_row_width_search(14336, "gcd"), 14336);
    ck_assert_uint_eq(ry_row_width_search(64 * 14336, "gcd"), 1024);
    ck_assert_uint_eq(ry_row_width_search(25 * 2304, "gcd"), 256);
    ck_assert_uint_eq(ry_row_width_search(64 * 14336, "set"), 64 * 14336);
    ck_assert_uint_eq(ry_row_width_search(64 * 14336, "ratio"), 64 * 14336);
    ck_assert_uint_eq(ry_row_width_search(20002, "gcd"), 20002); /* of no use, but nothing better is known */
    ck_assert_uint_eq(ry_row_width_search(0, NULL), 0);
}
END_TEST

/* One count out of step, on either side, and it is no pair. */
START_TEST(unlike_splits_teach_nothing)
{
    uint64_t t[4] = {64, 128, 64, 192}, p[4] = {1, 2, 1, 3}, zero[4] = {0};
    for (int i = 0; i < 4; i++) {
        teardown(), setup();
        uint64_t q[4];
        memcpy(q, p, sizeof q);
        q[i] += 1;
        see(t, t);
        see(q, p);
        ck_assert_str_ne(source, "ratio");
        see(t, t);
        see(p, q);
        ck_assert_str_ne(source, "ratio");
        q[i] = 0;
        see(t, t);
        see(q, p);
        ck_assert_str_ne(source, "ratio");
    }
    teardown(), setup();
    ck_assert_uint_eq(see(zero, zero), 0);
    ck_assert_ptr_null(source);
    see(t, t);
    see(t, t); /* the same again is no ratio of 1 */
    ck_assert_str_eq(source, "gcd");
}
END_TEST

START_TEST(setting_wins_where_it_fits)
{
    w.set_bytes = 64; /* 32 elements of 2 bytes */
    uint64_t fits[4] = {32, 64, 0, 96}, not[4] = {33, 64, 0, 96};
    ck_assert_uint_eq(see(fits, fits), 32);
    ck_assert_str_eq(source, "set");
    ck_assert_uint_eq(see(not, fits), 1);
    ck_assert_str_eq(source, "gcd");
    w.set_bytes = 63; /* no whole number of elements */
    see(fits, fits);
    ck_assert_str_ne(source, "set");
}
END_TEST

/* Whatever the counts, the width divides every count of the exchange it is said for. */
START_TEST(width_always_divides)
{
    const char *env = getenv("RY_TEST_SEED");
    unsigned seed = env ? (unsigned)atoi(env) : (unsigned)time(NULL);
    printf("row_width: seed %u (repeat with RY_TEST_SEED)\n", seed);
    srand(seed);
    for (int i = 0; i < 20000; i++) {
        uint64_t a[4], b[4], h = (uint64_t)(rand() % 5 + 1) * 16;
        int kind = rand() % 3;
        for (int r = 0; r < 4; r++) {
            a[r] = (uint64_t)(rand() % 4) * (kind == 0 ? 1 : kind == 1 ? h : (uint64_t)(rand() % 100));
            b[r] = (uint64_t)(rand() % 4) * (kind == 0 ? 1 : h);
        }
        uint64_t e = see(a, b);
        for (int r = 0; r < 4 && e; r++)
            ck_assert_msg(a[r] % e == 0 && b[r] % e == 0, "width %lu does not divide %lu or %lu (%s)", e, a[r], b[r], source);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("row_width");
    TCase *t = tcase_create("row_width");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, tokens_then_probabilities);
    tcase_add_test(t, probabilities_then_tokens);
    tcase_add_test(t, unlike_splits_teach_nothing);
    tcase_add_test(t, noted);
    tcase_add_test(t, other_traffic);
    tcase_add_test(t, pieces);
    tcase_add_test(t, setting_wins_where_it_fits);
    tcase_add_test(t, width_always_divides);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
