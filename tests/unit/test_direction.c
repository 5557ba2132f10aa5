/* test_direction.c: going and returning, in the orders in which frameworks send. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "engine/direction.h"

#define RANKS 4

static struct ry_directions d;
static uint64_t number;             /* of the next exchange */
static struct ry_answered answered; /* by the latest */

static void setup(void)
{
    memset(&d, 0, sizeof d);
    number = 0;
}

/* Rows to and from each rank of layer `l`, rank 1's side of some matrix. */
static void splits(int l, uint64_t out[RANKS], uint64_t in[RANKS])
{
    for (uint64_t i = 0; i < RANKS; i++) {
        out[i] = 10 + ((uint64_t)l * 7 + i * 5) % 13;
        in[i] = 11 + ((uint64_t)l * 3 + i * 11) % 17;
    }
    in[1] = out[1];
}

static char see(const uint64_t *send, const uint64_t *recv, uint64_t width, uint32_t type_bytes)
{
    uint64_t s[RANKS], r[RANKS];
    for (int i = 0; i < RANKS; i++) {
        s[i] = send[i] * width;
        r[i] = recv[i] * width;
    }
    return ry_directions_see(&d, number++, s, r, RANKS, type_bytes, &answered) == RY_RETURN ? '<' : '>';
}

/* One letter each: D dispatch, P probabilities, C combine, c its gradient, p, d. */
static void layer(int l, const char *what, const char *expected)
{
    uint64_t out[RANKS], in[RANKS];
    splits(l, out, in);
    for (int i = 0; what[i]; i++) {
        char got;
        switch (what[i]) {
        case 'D':
        case 'c':
            got = see(out, in, 2048, 2);
            break;
        case 'P':
            got = see(out, in, 1, 4);
            break;
        case 'p':
            got = see(in, out, 1, 4);
            break;
        default:
            got = see(in, out, 2048, 2);
        }
        ck_assert_msg(got == expected[i], "layer %d, %c of %s: %c instead of %c", l, what[i], what, got, expected[i]);
    }
}

START_TEST(megatron)
{
    for (int step = 0; step < 3; step++) {
        for (int l = 0; l < 6; l++)
            layer(l, "DPC", ">><");
        for (int l = 5; l >= 0; l--)
            layer(l, "cpd", "><<");
    }
    ck_assert_int_eq(d.n, 0);
}
END_TEST

/* The forward pass once more in front of each layer's backward pass: the first pass's probabilities are never answered,
   and forgotten in the end. */
START_TEST(recompute)
{
    for (int step = 0; step < 40; step++) {
        for (int l = 0; l < 6; l++)
            layer(l + 6 * step, "DPC", ">><");
        for (int l = 5; l >= 0; l--) {
            layer(l + 6 * step, "DPC", ">><");
            layer(l + 6 * step, "cpd", "><<");
        }
    }
}
END_TEST

/* Two micro-batches take turns: combined 1F1B. */
START_TEST(interleaved)
{
    layer(0, "DPC", ">><");
    for (int i = 0; i < 20; i++) {
        layer(i, "c", ">");
        layer(i + 1, "DP", ">>");
        layer(i, "pd", "<<");
        layer(i + 1, "C", "<");
    }
}
END_TEST

START_TEST(inference)
{
    for (int i = 0; i < 500; i++)
        layer(i, "DPC", ">><");
}
END_TEST

/* Equal splits: whatever comes answers what was there before. */
START_TEST(equal_splits)
{
    uint64_t e[RANKS] = {64, 64, 64, 64};
    for (int i = 0; i < 10; i++) {
        ck_assert_int_eq(see(e, e, 1024, 2), '>');
        ck_assert_int_eq(see(e, e, 1024, 2), '<');
    }
    for (int i = 0; i < 4; i++) { /* with probabilities, dropped and padded: D P C, then c p d */
        ck_assert_int_eq(see(e, e, 1024, 2), '>');
        ck_assert_int_eq(see(e, e, 1, 4), '>');
        ck_assert_int_eq(see(e, e, 1024, 2), '<');
        ck_assert_int_eq(see(e, e, 1024, 2), '>');
        ck_assert_int_eq(see(e, e, 1, 4), '<');
        ck_assert_int_eq(see(e, e, 1024, 2), '<');
    }
}
END_TEST

/* The latest of equal ones is answered, and more than there is room for push out the oldest. */
START_TEST(forgets_the_oldest)
{
    uint64_t out[RANKS], in[RANKS];
    for (int l = 0; l < RY_GONE + 10; l++) {
        uint64_t width = 16 + (uint64_t)l;
        splits(0, out, in);
        ck_assert_int_eq(see(out, in, width, 2), '>');
    }
    ck_assert_int_eq(d.n, RY_GONE);
    ck_assert_int_eq(see(in, out, 16 + 10, 2), '<');
    ck_assert_int_eq(see(in, out, 16 + 9, 2), '>');
}
END_TEST

/* Which one is answered, and whether it could be another. */
static void answers(int l, const char *what, bool any, uint64_t which, bool ambiguous)
{
    layer(l, what, any ? "<" : ">");
    ck_assert(answered.any == any);
    if (any)
        ck_assert_uint_eq(answered.number, which);
    ck_assert(answered.ambiguous == ambiguous);
}

START_TEST(tells_which)
{
    answers(0, "D", false, 0, false); /* 0 */
    answers(0, "P", false, 0, false);
    answers(1, "D", false, 0, false); /* 2 */
    answers(2, "D", false, 0, false);
    answers(1, "C", true, 2, false);
    answers(0, "C", true, 0, false);
    answers(2, "C", true, 3, false);
    answers(2, "c", false, 0, false); /* 7: the same counts as what was answered are no matter */
    answers(2, "d", true, 7, false);
    answers(0, "p", true, 1, false);
}
END_TEST

/* Two with the same counts: whichever comes back first, neither return is sure, and what came after them is. */
START_TEST(ambiguous_twice)
{
    answers(0, "D", false, 0, false); /* 0 */
    answers(0, "D", false, 0, false); /* 1 */
    answers(1, "D", false, 0, false); /* 2 */
    answers(0, "C", true, 1, true);
    answers(1, "C", true, 2, false);
    answers(0, "C", true, 0, true);
    answers(0, "D", false, 0, false); /* 6 */
    answers(0, "C", true, 6, false);
    for (int i = 0; i < 3; i++)
        answers(3, "D", false, 0, false); /* 8, 9, 10 */
    answers(3, "C", true, 10, true);
    answers(3, "D", false, 0, false); /* 12 */
    answers(3, "C", true, 12, true);
    answers(3, "C", true, 9, true);
    answers(3, "C", true, 8, true);
}
END_TEST

int main(void)
{
    TCase *t = tcase_create("direction");
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_test(t, megatron);
    tcase_add_test(t, recompute);
    tcase_add_test(t, interleaved);
    tcase_add_test(t, inference);
    tcase_add_test(t, equal_splits);
    tcase_add_test(t, forgets_the_oldest);
    tcase_add_test(t, tells_which);
    tcase_add_test(t, ambiguous_twice);
    Suite *s = suite_create("direction");
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
