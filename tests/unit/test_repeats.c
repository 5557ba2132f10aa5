/* test_repeats.c: when exchanges are searched for equal rows: what repeats is, what does not hardly ever is. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "engine/repeats.h"

#define LARGE (16u << 20)
#define ROW 4096

static struct ry_habits h;
static int aside, first;

static void setup(void)
{
    memset(&h, 0, sizeof h);
    aside = first = 0;
}

/* An exchange of which packing would leave `left` of the bytes; what was looked at is found at once. */
static enum ry_look exchange(enum ry_direction direction, uint64_t row, uint64_t cross, double left, bool engaged,
                             bool dedup)
{
    struct ry_habit *habit = ry_habits_next(&h, direction, row);
    enum ry_look look = ry_habits_look(&h, habit, cross, engaged, false);
    if (look != RY_LOOK_NOT)
        ry_habits_found(&h, direction, row, cross, (uint64_t)((double)cross * left));
    if (look == RY_LOOK_FIRST)
        ry_habit_used(habit, dedup);
    aside += look == RY_LOOK_ASIDE;
    first += look == RY_LOOK_FIRST;
    return look;
}

/* All rows distinct: a few looks, then one in 64 at first and one in 1024 later; engaged or not. */
START_TEST(nothing_to_gain)
{
    bool engaged = _i;
    for (int i = 0; i < 64; i++)
        exchange(i % 2, ROW, LARGE, 1, engaged, false);
    ck_assert_int_ge(aside, 4);
    ck_assert_int_le(aside, 13);
    aside = 0;
    for (int i = 0; i < 1000; i++)
        exchange(i % 2, ROW, LARGE, 1, engaged, false);
    ck_assert_int_ge(aside, 2);
    ck_assert_int_le(aside, 1000 / 64);
    for (int i = 0; i < 4000; i++)
        exchange(i % 2, ROW, LARGE, 1, engaged, false);
    aside = 0;
    for (int i = 0; i < 20480; i++)
        exchange(i % 2, ROW, LARGE, 1, engaged, false);
    ck_assert_int_ge(aside, 16);
    ck_assert_int_le(aside, 24);
    ck_assert_int_eq(first, 0);
}
END_TEST

/* Widths that change with every exchange are new kinds each time, and still no more than one in 64 is looked at. */
START_TEST(ever_new_kinds)
{
    for (uint64_t i = 0; i < 6400; i++)
        exchange(RY_GO, 64 + 2 * i, LARGE, 1, true, false);
    ck_assert_int_le(aside, 12 + 100);
    ck_assert_int_ge(aside, 80);
}
END_TEST

/* A silence of small exchanges does not save up looks. */
START_TEST(no_savings)
{
    for (int i = 0; i < 100000; i++)
        exchange(RY_GO, ROW, RY_LOOK_BYTES - 1, 1, false, false);
    ck_assert_int_eq(aside, 0);
    for (uint64_t i = 0; i < 64; i++)
        exchange(RY_GO, 64 + 2 * i, LARGE, 1, false, false);
    ck_assert_int_le(aside, 13);
}
END_TEST

/* Dispatch repeats, combine does not: once engaged every dispatch is looked at first, no combine ever. */
START_TEST(what_repeats)
{
    for (int i = 0; i < 20; i++) {
        exchange(RY_GO, ROW, LARGE, 0.25, false, false);
        exchange(RY_RETURN, ROW, LARGE, 1, false, false);
    }
    ck_assert_int_eq(first, 0);
    ck_assert_int_ge(aside, 4);
    for (int i = 0; i < 500; i++) {
        ck_assert_int_eq(exchange(RY_GO, ROW, LARGE, 0.25, true, true), RY_LOOK_FIRST);
        ck_assert_int_ne(exchange(RY_RETURN, ROW, LARGE, 1, true, false), RY_LOOK_FIRST);
        ck_assert_int_eq(exchange(RY_GO, 4, RY_LOOK_BYTES * 2, 0.25, true, true), RY_LOOK_NOT); /* probabilities */
    }
    ck_assert_double_eq_tol(ry_habit_share(ry_habits_next(&h, RY_GO, ROW)), 0.75, 0.01);
    ck_assert_double_eq(ry_habit_share(ry_habits_next(&h, RY_RETURN, ROW)), 0);
}
END_TEST

/* It repeats, but the yardmaster makes nothing of it: looked at first 32 times, then hardly; and always again from
 * where it does. */
START_TEST(no_use)
{
    for (int i = 0; i < 5; i++)
        exchange(RY_GO, ROW, LARGE, 0.9, false, false);
    for (int i = 0; i < 6400; i++)
        exchange(RY_GO, ROW, LARGE, 0.9, true, false);
    ck_assert_int_ge(first, RY_UNUSED + 6);
    ck_assert_int_le(first, RY_UNUSED + 14);
    int i = 0;
    while (exchange(RY_GO, ROW, LARGE, 0.9, true, true) != RY_LOOK_FIRST)
        ck_assert_int_le(++i, 1024);
    for (i = 0; i < 100; i++)
        ck_assert_int_eq(exchange(RY_GO, ROW, LARGE, 0.9, true, true), RY_LOOK_FIRST);
}
END_TEST

/* What stops repeating is soon left alone; what begins to is found, at the latest after 1024 of its kind. */
START_TEST(it_changes)
{
    for (int i = 0; i < 50; i++)
        exchange(RY_GO, ROW, LARGE, 0.3, true, true);
    first = 0;
    for (int i = 0; i < 100; i++)
        exchange(RY_GO, ROW, LARGE, 1, true, false);
    ck_assert_int_le(first, 8);
    for (int i = 0; i < 5000; i++)
        exchange(RY_GO, ROW, LARGE, 1, true, false);
    int i = 0;
    while (exchange(RY_GO, ROW, LARGE, 0.3, true, true) != RY_LOOK_FIRST)
        ck_assert_int_le(++i, 1025);
}
END_TEST

START_TEST(forced)
{
    struct ry_habit *habit;
    for (int i = 0; i < 300; i++) {
        habit = ry_habits_next(&h, RY_GO, 64);
        ck_assert_int_eq(ry_habits_look(&h, habit, 100, true, true), RY_LOOK_FIRST);
        ck_assert_int_eq(ry_habits_look(&h, habit, 0, true, true), RY_LOOK_NOT);
        ck_assert_int_ne(ry_habits_look(&h, habit, 100, false, true), RY_LOOK_FIRST);
        ry_habits_found(&h, RY_GO, 64, 100, 100);
        ry_habit_used(habit, false);
        habit = ry_habits_next(&h, RY_GO, 2);
        ck_assert_int_eq(ry_habits_look(&h, habit, 100, true, true), RY_LOOK_NOT);
        habit = ry_habits_next(&h, RY_GO, 0);
        ck_assert_int_eq(ry_habits_look(&h, habit, 100, true, true), RY_LOOK_NOT);
    }
}
END_TEST

/* A rank that sends little goes along with those that send more: while they go packed, and unless its rows do not repeat. */
START_TEST(little)
{
    const uint64_t cross = RY_LOOK_BYTES / 2;
    for (int i = 0; i < 20; i++)
        ck_assert_int_eq(exchange(RY_GO, ROW, cross, 0.25, i % 2, false), RY_LOOK_NOT);
    for (int i = 0; i < 20; i++) { /* other ranks' do, the verdict says */
        ry_habit_went(ry_habits_next(&h, RY_GO, ROW), true);
        ck_assert_int_eq(exchange(RY_GO, ROW, cross, 0.25, true, true), RY_LOOK_FIRST);
        ck_assert_int_eq(exchange(RY_GO, ROW, cross, 0.25, false, true), RY_LOOK_NOT);
        ck_assert_int_eq(exchange(RY_GO, ROW, RY_LOOK_LITTLE - 1, 0.25, true, true), RY_LOOK_NOT);
        ck_assert_int_eq(exchange(RY_RETURN, ROW, cross, 0.25, true, true), RY_LOOK_NOT); /* of another kind */
    }
    ry_habit_went(ry_habits_next(&h, RY_GO, ROW), false);
    ck_assert_int_eq(exchange(RY_GO, ROW, cross, 0.25, true, true), RY_LOOK_NOT);
    ry_habit_went(ry_habits_next(&h, RY_RETURN, ROW), true);
    ck_assert_int_eq(exchange(RY_RETURN, ROW, cross, 1, true, true), RY_LOOK_FIRST);
    for (int i = 0; i < 20; i++) /* once is enough */
        ck_assert_int_eq(exchange(RY_RETURN, ROW, cross, 1, true, true), RY_LOOK_NOT);
    ry_habit_went(ry_habits_next(&h, RY_GO, 2 * ROW), true);
    ry_habit_failed(ry_habits_next(&h, RY_GO, 2 * ROW));
    ck_assert_int_eq(exchange(RY_GO, 2 * ROW, cross, 0.25, true, true), RY_LOOK_NOT);
}
END_TEST

/* Searches that are not possible are not tried every time. */
START_TEST(failing)
{
    int tried = 0;
    for (int i = 0; i < 4096; i++) {
        struct ry_habit *habit = ry_habits_next(&h, RY_GO, ROW);
        if (ry_habits_look(&h, habit, LARGE, true, false) == RY_LOOK_NOT)
            continue;
        tried++;
        if (i < 3)
            ry_habits_found(&h, RY_GO, ROW, LARGE, LARGE / 4);
        else
            ry_habit_failed(habit);
    }
    ck_assert_int_le(tried, 3 + 5);
}
END_TEST

/* Two ranks that send different amounts of the same kinds come to the same turns. */
START_TEST(ranks_agree)
{
    static struct ry_habits other;
    memset(&other, 0, sizeof other);
    for (int i = 0; i < 5000; i++) {
        bool engaged = i > 20, used = i < 100 || i > 4000;
        enum ry_look look[2];
        for (int k = 0; k < 2; k++) {
            struct ry_habits *s = k ? &other : &h;
            uint64_t cross = k ? LARGE : LARGE / 3;
            struct ry_habit *habit = ry_habits_next(s, i % 2, ROW);
            look[k] = ry_habits_look(s, habit, cross, engaged, false);
            if (look[k] != RY_LOOK_NOT)
                ry_habits_found(s, i % 2, ROW, cross, cross / (i % 2 ? 1 : 2 + (uint64_t)k));
            if (look[k] == RY_LOOK_FIRST)
                ry_habit_used(habit, used);
        }
        ck_assert_int_eq(look[0], look[1]);
    }
}
END_TEST

int main(void)
{
    TCase *t = tcase_create("repeats");
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_loop_test(t, nothing_to_gain, 0, 2);
    tcase_add_test(t, ever_new_kinds);
    tcase_add_test(t, no_savings);
    tcase_add_test(t, what_repeats);
    tcase_add_test(t, no_use);
    tcase_add_test(t, it_changes);
    tcase_add_test(t, forced);
    tcase_add_test(t, little);
    tcase_add_test(t, failing);
    tcase_add_test(t, ranks_agree);
    Suite *s = suite_create("repeats");
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
