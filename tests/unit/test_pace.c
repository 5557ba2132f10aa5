/*
 * test_pace.c: how fast exchanges follow each other, either way (src/engine/pace.h).
 */
#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>

#include "engine/pace.h"

static struct ry_pace *pace;
static uint64_t number;
static double ratio;
static unsigned rest;

static void start(void)
{
    pace = ry_pace_new();
    ck_assert_ptr_nonnull(pace);
    number = 0;
}

static void stop(void)
{
    ry_pace_free(pace);
}

/* So many exchanges in a row, each `us` after the one before; what nobody wants is not measured. */
static void go(enum ry_pace_way way, int exchanges, uint64_t before, uint64_t bytes, double us)
{
    for (int i = 0; i < exchanges; i++, number++)
        if (ry_pace_wants(pace, way)) {
            ry_pace_began(pace, number, way, before, bytes, false);
            ry_pace_took(pace, number, us);
        }
}

static enum ry_pace_advice ask(bool engaged)
{
    return ry_pace_ask(pace, number, engaged, &ratio, &rest);
}

START_TEST(plain_ones_are_watched_first)
{
    ck_assert(ry_pace_wants(pace, RY_PACE_ENGAGED) && !ry_pace_wants(pace, RY_PACE_PLAIN));
    go(RY_PACE_ENGAGED, 12, 5 << 20, 5 << 20, 90);
    ck_assert_int_eq(ask(true), RY_PACE_WATCH);
    ck_assert_uint_eq(rest, 16);
    ck_assert(ratio <= 0); /* not known */
    go(RY_PACE_PLAIN, 40, 5 << 20, 5 << 20, 100);
    ck_assert(!ry_pace_wants(pace, RY_PACE_PLAIN)); /* 16 were enough */
    ck_assert_int_eq(ask(false), RY_PACE_STAY);
    ck_assert_double_eq_tol(ratio, 0.9, 1e-6);
    go(RY_PACE_ENGAGED, 12, 5 << 20, 5 << 20, 90);
    ck_assert_int_eq(ask(true), RY_PACE_STAY);
}
END_TEST

/* By 1 % it does not pay, nor where plain is faster; before and after it was engaged again. */
START_TEST(leaves_where_nothing_is_gained)
{
    go(RY_PACE_ENGAGED, 12, 1 << 20, 1 << 20, 99);
    ck_assert_int_eq(ask(true), RY_PACE_WATCH);
    go(RY_PACE_PLAIN, 16, 1 << 20, 1 << 20, 100);
    ck_assert_int_eq(ask(false), RY_PACE_LEAVE);
    go(RY_PACE_ENGAGED, 12, 1 << 20, 1 << 20, 120);
    ck_assert_int_eq(ask(true), RY_PACE_LEAVE);
    ck_assert(ratio > 1);
}
END_TEST

/* Stalls are no pace: the median counts, up to half of the exchanges. */
START_TEST(stalls_do_not_count)
{
    for (int i = 0; i < 16; i++)
        go(RY_PACE_ENGAGED, 1, 1, 1, i % 3 ? 80 : 1e6);
    ck_assert_int_eq(ask(true), RY_PACE_WATCH);
    for (int i = 0; i < 16; i++)
        go(RY_PACE_PLAIN, 1, 1, 1, i % 3 ? 100 : 1e7);
    ck_assert_int_eq(ask(false), RY_PACE_STAY);
    ck_assert_double_eq_tol(ratio, 0.8, 1e-6);
}
END_TEST

/* Each kind counts by how often it comes, and is compared with its own kind only. */
START_TEST(kinds)
{
    for (int i = 0; i < 12; i++) { /* three of one kind, that gains a tenth, to one of another, that loses a quarter */
        go(RY_PACE_ENGAGED, 3, 1 << 20, 1 << 20, 90);
        go(RY_PACE_ENGAGED, 1, 1 << 20, 64 << 20, 1250);
    }
    ck_assert_int_eq(ask(true), RY_PACE_WATCH);
    ck_assert_uint_eq(rest, 24);
    go(RY_PACE_PLAIN, 20, 1 << 20, 1 << 20, 100);
    ck_assert_int_eq(ask(false), RY_PACE_STAY);
    ck_assert(ratio <= 0); /* of what takes most of the time too little is known */
    go(RY_PACE_PLAIN, 4, 1 << 20, 64 << 20, 1000);
    ck_assert_int_eq(ask(false), RY_PACE_STAY);
    go(RY_PACE_ENGAGED, 1, 1 << 20, 64 << 20, 1250);
    ck_assert_int_eq(ask(true), RY_PACE_WATCH); /* once more */
    go(RY_PACE_PLAIN, 12, 1 << 20, 1 << 20, 100);
    go(RY_PACE_PLAIN, 12, 1 << 20, 64 << 20, 1000);
    ck_assert_int_eq(ask(false), RY_PACE_LEAVE);
    ck_assert_double_eq_tol(ratio, (36 * 90 + 13 * 1250) / (36 * 100.0 + 13 * 1000), 1e-6);
}
END_TEST

/* Where watching does not teach anything, the estimates are left alone after a while. */
START_TEST(does_not_watch_for_ever)
{
    int watched = 0;
    for (int i = 0; i < 50; i++) {
        go(RY_PACE_ENGAGED, 12, 1, 1, 90);
        watched += ask(true) == RY_PACE_WATCH;
        go(RY_PACE_PLAIN, 16, 2, 2, 100); /* of another kind */
        ck_assert_int_eq(ask(false), RY_PACE_STAY);
    }
    ck_assert_int_eq(watched, RY_PACE_WATCHES);
}
END_TEST

/* A network changes: what is known of plain exchanges is renewed, ever more rarely; and before it is held against
 * engaging. */
START_TEST(watches_again)
{
    uint64_t at[8], n = 0;
    go(RY_PACE_ENGAGED, 12, 1, 1, 90);
    while (n < 8) {
        ck_assert(number < 10000000);
        enum ry_pace_advice advice = ask(true);
        ck_assert_int_ne(advice, RY_PACE_LEAVE);
        if (advice == RY_PACE_WATCH) {
            at[n++] = number;
            go(RY_PACE_PLAIN, (int)rest, 1, 1, 100);
            ck_assert_int_eq(ask(false), RY_PACE_STAY);
        }
        go(RY_PACE_ENGAGED, 64, 1, 1, 90);
    }
    ck_assert_uint_ge(at[1] - at[0], RY_PACE_GAP);
    ck_assert_uint_le(at[1] - at[0], RY_PACE_GAP + 128);
    ck_assert_uint_ge(at[2] - at[1], 2 * RY_PACE_GAP);
    ck_assert_uint_ge(at[7] - at[6], 64 * RY_PACE_GAP);
    ck_assert_uint_le(at[7] - at[6], 64 * RY_PACE_GAP + 128);
    go(RY_PACE_ENGAGED, RY_PACE_FRESH, 1, 1, 130); /* long after that all is slower: is plain NCCL, too? */
    ck_assert_int_eq(ask(true), RY_PACE_WATCH);
    go(RY_PACE_PLAIN, (int)rest, 1, 1, 150);
    ck_assert_int_eq(ask(false), RY_PACE_STAY);
}
END_TEST

START_TEST(forgets_what_went_another_way)
{
    go(RY_PACE_ENGAGED, 12, 1, 1, 150);
    ck_assert_int_eq(ask(true), RY_PACE_WATCH);
    go(RY_PACE_PLAIN, 16, 1, 1, 100);
    ry_pace_changed(pace);
    ck_assert_int_eq(ask(false), RY_PACE_STAY);
    ck_assert(ratio <= 0);
    go(RY_PACE_ENGAGED, 12, 1, 1, 50);
    ck_assert_int_eq(ask(true), RY_PACE_STAY);
    ck_assert_double_eq_tol(ratio, 0.5, 1e-6);
}
END_TEST

/* Nobody said that it began, it began too long ago, or it is no time. */
START_TEST(nonsense)
{
    for (int i = 0; i < 100; i++)
        ry_pace_took(pace, (uint64_t)i, 100);
    for (uint64_t i = 0; i < 12; i++) {
        ry_pace_began(pace, i, RY_PACE_ENGAGED, 1, 1, false);
        ry_pace_took(pace, i + 256, 1);
        ry_pace_took(pace, i, i % 2 ? NAN : i % 3 ? 0 : -1);
    }
    ck_assert_int_eq(ask(true), RY_PACE_WATCH);
    go(RY_PACE_PLAIN, 16, 1, 1, 100);
    ck_assert_int_eq(ask(true), RY_PACE_WATCH); /* nothing is known of engaged ones */
    ck_assert(ratio <= 0);
}
END_TEST

/* More kinds than are kept, from two threads, while a third asks. */
static void *many(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    for (uint64_t i = 0; i < 20000; i++) {
        uint64_t n = 2 * i + seed % 2;
        ry_pace_began(pace, n, RY_PACE_ENGAGED, UINT64_C(1) << rand_r(&seed) % 64, UINT64_C(1) << rand_r(&seed) % 64, false);
        ry_pace_took(pace, n, 1 + rand_r(&seed) % 100);
    }
    return NULL;
}

START_TEST(threads)
{
    pthread_t t[2];
    for (uintptr_t i = 0; i < 2; i++)
        ck_assert_int_eq(pthread_create(&t[i], NULL, many, (void *)(i + 6)), 0);
    for (int i = 0; i < 200; i++)
        ask(i % 2);
    for (int i = 0; i < 2; i++)
        pthread_join(t[i], NULL);
    number = 40000;
    ck_assert_int_eq(ask(true), RY_PACE_STAY); /* watched in vain often enough, meanwhile */
    ry_pace_changed(pace);
    go(RY_PACE_ENGAGED, 12, 0, UINT64_MAX, 100);
    ask(true);
    ck_assert_uint_le(rest, 256);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("pace");
    TCase *t = tcase_create("pace");
    tcase_add_checked_fixture(t, start, stop);
    tcase_add_test(t, plain_ones_are_watched_first);
    tcase_add_test(t, leaves_where_nothing_is_gained);
    tcase_add_test(t, stalls_do_not_count);
    tcase_add_test(t, kinds);
    tcase_add_test(t, does_not_watch_for_ever);
    tcase_add_test(t, watches_again);
    tcase_add_test(t, forgets_what_went_another_way);
    tcase_add_test(t, nonsense);
    tcase_add_test(t, threads);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
