/* test_pairing.c: when the rows of a return may be summed: each rank's half of the rule, and the yardmaster's. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/pairing.h"
#include "engine/returns.h"

#define RANKS 4
#define RANK 1

enum { INT8 = 0, FLOAT16 = 6, FLOAT32 = 7, FLOAT64 = 8, BFLOAT16 = 9 };

static struct ry_pairs pairs;
static struct ry_cluster *map;
static char handles[64];
static int gone; /* kept things let go */
static const uint64_t out[RANKS] = {4096, 0, 2048, 6144}, in[RANKS] = {2048, 0, 8192, 4096};

static void let_go(struct ry_kept *kept)
{
    char *h = (char *)kept;
    ck_assert(h >= handles && h < handles + sizeof handles && *h == 1);
    *h = 0;
    gone++;
}

/* Ranks 0, 1 on one node, 2, 3 on another. */
static void setup(void)
{
    struct ry_seat seats[RANKS];
    struct ry_err err;
    memset(seats, 0, sizeof seats);
    for (int r = 0; r < RANKS; r++) {
        seats[r] = (struct ry_seat){.version = RY_SEAT_VERSION, .rank = r, .able = 1};
        snprintf(seats[r].node, sizeof seats[r].node, "node%d", r / 2);
    }
    map = ry_cluster_build(seats, RANKS, &err);
    ck_assert_msg(map && map->nnodes == 2, "%s", map ? "nodes" : err.msg);
    pairs = (struct ry_pairs){.let_go = let_go, .combine.sum = true};
    gone = 0;
}

static void teardown(void)
{
    ry_pairs_free(&pairs);
    ry_cluster_free(map);
    for (size_t i = 0; i < sizeof handles; i++)
        ck_assert_int_eq(handles[i], 0);
}

static struct ry_copies copies_of(uint64_t rows, uint64_t least, uint64_t most)
{
    return (struct ry_copies){.rows = rows, .distinct = most ? rows / most : 0, .least = least, .most = most};
}

static void add(uint64_t number, int type, uint64_t row_bytes, struct ry_copies copies)
{
    struct ry_err err;
    struct ry_repeats own[2] = {[1] = {.row_bytes = row_bytes, .distinct = 3}};
    struct ry_pair d = {.number = number,
                        .type = type,
                        .send = (uint64_t *)out,
                        .recv = (uint64_t *)in,
                        .repeats = own,
                        .kept = (struct ry_kept *)&handles[number],
                        .copies = copies};
    handles[number] = 1;
    ck_assert_int_eq(ry_slice_init(&d.slice, map, RANK, RY_DEDUP, &err), 0);
    for (int i = 0; i < d.slice.nrows; i++) {
        d.slice.repeats[i] = (struct ry_repeats){.row_bytes = row_bytes, .distinct = 2};
        for (int j = 0; j < d.slice.ncols; j++)
            d.slice.cells[i * d.slice.ncols + j] = d.slice.cols[j] == RANK ? in[d.slice.rows[i]] : 512;
    }
    ck_assert_int_eq(ry_pairs_add(&pairs, map, RANK, &d), 0);
    ry_slice_free(&d.slice);
}

START_TEST(words)
{
    static const char *const bad[] = {"",         "Sum",     "sum:",   "sum:0",  "sum:1",
                                      "sum:8 ",   "sum:x",   "sum:-2", "sum:8x", "sum:99999999999999999999",
                                      "sum:1025", "exact:2", "1"};
    struct ry_combine c;
    struct ry_err err;
    ck_assert(!ry_combine_parse("exact", &c, &err) && !c.sum && !c.copies);
    ck_assert(!ry_combine_parse("sum", &c, &err) && c.sum && !c.copies);
    ck_assert(!ry_combine_parse("sum:8", &c, &err) && c.sum && c.copies == 8);
    ck_assert(!ry_combine_parse("sum:1024", &c, &err) && c.copies == 1024);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        c = (struct ry_combine){true, 5};
        ck_assert_msg(ry_combine_parse(bad[i], &c, &err) == -1 && !c.sum && !c.copies, "'%s'", bad[i]);
        ck_assert(strstr(err.msg, "exact, sum, and sum:K") && strstr(err.msg, bad[i]));
    }
}
END_TEST

START_TEST(remembers)
{
    for (uint64_t i = 0; i < RY_PAIRS + 3; i++)
        add(i, BFLOAT16, 512, copies_of(8, 2, 2));
    ck_assert_int_eq(pairs.n, RY_PAIRS);
    ck_assert_int_eq(gone, 3);
    ck_assert(!ry_pairs_take(&pairs, 2)); /* made room */
    struct ry_pair *p = ry_pairs_take(&pairs, 5);
    ck_assert(p && p->number == 5 && !ry_pairs_take(&pairs, 5));
    ck_assert_int_eq(pairs.n, RY_PAIRS - 1);
    ck_assert(!memcmp(p->send, out, sizeof out) && !memcmp(p->recv, in, sizeof in));
    ck_assert(p->repeats[1].row_bytes == 512 && p->repeats[1].distinct == 3 && !p->repeats[0].row_bytes);
    ck_assert(p->slice.nrows == 2 && p->slice.ncols == 2 && p->slice.rows[1] == 3 && p->slice.cols[1] == RANK);
    ck_assert(p->slice.cells[1] == in[2] && p->slice.cells[2] == 512 && p->slice.repeats[1].distinct == 2);
    ck_assert_int_eq(gone, 3);
    ry_pair_free(&pairs, p);
    ck_assert_int_eq(gone, 4);
    ry_pair_free(&pairs, NULL);
    for (uint64_t i = 3; i < RY_PAIRS + 3; i++)
        ry_pair_free(&pairs, ry_pairs_take(&pairs, i));
    ck_assert_int_eq(pairs.n, 0);
}
END_TEST

static const char *refuses(const uint64_t *send, const uint64_t *recv, int type)
{
    struct ry_pair *p = ry_pairs_take(&pairs, 0);
    const char *why = ry_pair_refuses(p, map, send, recv, type);
    ry_pair_free(&pairs, p);
    return why;
}

START_TEST(the_same_back)
{
    static const int types[] = {FLOAT16, FLOAT32, BFLOAT16};
    for (int i = 0; i < 3; i++) {
        add(0, types[i], 512, copies_of(8, 2, 2));
        ck_assert_ptr_null(refuses(in, out, types[i]));
        for (int k = 0; k < 2 * RANKS; k++) { /* any count another */
            uint64_t s[RANKS], r[RANKS];
            memcpy(s, in, sizeof s);
            memcpy(r, out, sizeof r);
            *(k < RANKS ? &s[k] : &r[k - RANKS]) += 512;
            add(0, types[i], 512, copies_of(8, 2, 2));
            ck_assert(strstr(refuses(s, r, types[i]), "counts"));
        }
        add(0, types[i], 512, copies_of(8, 2, 2));
        ck_assert(strstr(refuses(in, out, types[i] == FLOAT16 ? BFLOAT16 : FLOAT16), "another type"));
    }
    add(0, INT8, 512, copies_of(8, 2, 2));
    ck_assert(strstr(refuses(in, out, INT8), "none that is summed"));
    add(0, FLOAT64, 512, copies_of(8, 2, 2));
    ck_assert(strstr(refuses(in, out, FLOAT64), "none that is summed"));
    add(0, FLOAT32, 510, copies_of(8, 2, 2));
    ck_assert(strstr(refuses(in, out, FLOAT32), "no whole number"));
    add(0, FLOAT16, 510, copies_of(8, 2, 2));
    ck_assert_ptr_null(refuses(in, out, FLOAT16));
}
END_TEST

/* K by which a pair of these rows may be summed; -1: by none. Learns from them first. */
static int by(struct ry_copies copies)
{
    uint32_t k;
    bool ever = ry_pairs_learn(&pairs, &copies);
    add(0, BFLOAT16, 512, copies);
    struct ry_pair *p = ry_pairs_take(&pairs, 0);
    const char *why = ry_pairs_copies(&pairs, p, &k);
    ry_pair_free(&pairs, p);
    ck_assert(ever == !why); /* what will never be summed need not be kept */
    return why ? -1 : (int)k;
}

START_TEST(copies_learned)
{
    ck_assert_int_eq(by(copies_of(0, 0, 0)), 0); /* nothing sent: any */
    ck_assert_int_eq(by(copies_of(40, 2, 8)), -1);
    ck_assert_int_eq(by(copies_of(40, 1, 1)), -1); /* nothing to sum */
    ck_assert_int_eq(by((struct ry_copies){.rows = 40, .distinct = 6, .zero = 1, .least = 8, .most = 8}), -1);
    ck_assert_int_eq(by((struct ry_copies){.rows = 40, .distinct = 1, .zero = 40}), -1);
    ck_assert_int_eq((int)pairs.learned, 0);
    ck_assert_int_eq(by(copies_of(40, 8, 8)), 8);
    ck_assert_int_eq(by(copies_of(32, 16, 16)), -1); /* all tokens twice */
    ck_assert_int_eq(by(copies_of(30, 6, 6)), -1);   /* smaller, but no divisor */
    ck_assert_int_eq(by(copies_of(40, 8, 8)), 8);
    ck_assert_int_eq(by(copies_of(40, 4, 4)), 4); /* so it was 4 all the time */
    ck_assert_int_eq(by(copies_of(40, 8, 8)), -1);
    ck_assert_int_eq(by(copies_of(40, 4, 8)), -1);
    ck_assert_int_eq((int)pairs.learned, 4);
    ck_assert_int_eq(by(copies_of(2048, RY_COPIES_MOST + 1, RY_COPIES_MOST + 1)), -1);
}
END_TEST

/* Most rows K times, a few of several tokens with the same bytes: what the search says of them. */
static struct ry_copies apart(uint64_t least, uint64_t most, uint32_t times, bool are)
{
    return (struct ry_copies){.rows = 80, .distinct = 30, .least = least, .most = most, .times = times, .apart = are};
}

START_TEST(copies_apart)
{
    ck_assert_int_eq(by(apart(2, 4, 0, false)), -1); /* nothing is known: tried from here on */
    ck_assert_int_eq((int)ry_pairs_wanted(&pairs), 2);
    ck_assert_int_eq((int)pairs.learned, 0);
    ck_assert_int_eq(by(apart(2, 4, 2, true)), 2);
    ck_assert_int_eq(by(apart(2, 3, 2, false)), -1); /* some were dropped, or too many are equal */
    ck_assert_int_eq(by(apart(2, 4, 4, true)), -1);  /* asked by what was thought of before */
    struct ry_copies zero = apart(2, 4, 2, true);
    zero.zero = 1;
    ck_assert_int_eq(by(zero), -1);
    ck_assert_int_eq(by(copies_of(40, 6, 6)), 6); /* uniform: that is what is known */
    ck_assert_int_eq(by(apart(2, 4, 2, true)), -1);
    ck_assert_int_eq(by(apart(6, 12, 6, true)), 6);
    pairs.combine.copies = 4;
    ck_assert_int_eq(by(apart(6, 12, 6, true)), -1);
    ck_assert_int_eq(by(apart(4, 8, 4, true)), 4);
    ck_assert_int_eq(by(apart(8, 16, 4, true)), -1); /* none of them once */
}
END_TEST

START_TEST(copies_told)
{
    pairs.combine.copies = 4;
    ck_assert_int_eq(by(copies_of(0, 0, 0)), 0);
    ck_assert_int_eq(by(copies_of(40, 8, 8)), -1);
    ck_assert_int_eq(by(copies_of(40, 2, 2)), -1);
    ck_assert_int_eq(by(copies_of(40, 4, 4)), 4);
    ck_assert_int_eq(by(copies_of(40, 3, 4)), -1);
}
END_TEST

/* A pair whose K was learned before a smaller one was seen. */
START_TEST(learned_late)
{
    uint32_t k;
    struct ry_copies eight = copies_of(40, 8, 8), four = copies_of(40, 4, 4);
    ck_assert(ry_pairs_learn(&pairs, &eight));
    add(0, BFLOAT16, 512, eight);
    ck_assert(ry_pairs_learn(&pairs, &four));
    struct ry_pair *p = ry_pairs_take(&pairs, 0);
    ck_assert(ry_pairs_copies(&pairs, p, &k) && k == 0);
    ry_pair_free(&pairs, p);
}
END_TEST

/* ---- the yardmaster ---- */

static struct ry_returns sums;
static struct ry_side sides[RANKS];
static uint64_t matrix[RANKS * RANKS];
static double us;

static void all_say(uint64_t d, uint64_t copies)
{
    memset(sides, 0, sizeof sides);
    for (int r = 0; r < RANKS; r++) {
        sides[r].answers = 1 + d;
        sides[r].copies = copies;
    }
    for (int i = 0; i < RANKS * RANKS; i++)
        matrix[i] = 512 * (uint64_t)(1 + i * 7 % 11);
}

static const char *ask(void)
{
    us = -1;
    return ry_returns_ask(&sums, sides, matrix, RANKS, &us);
}

START_TEST(all_agree)
{
    memset(&sums, 0, sizeof sums);
    all_say(0, 8);
    ck_assert(strstr(ask(), "did not go packed")); /* number 0 is not what an empty table says */
    ry_returns_went(&sums, 0, 300);
    ry_returns_went(&sums, 70, 400);
    ck_assert_ptr_null(ask());
    ck_assert_double_eq(us, 300);
    all_say(70, 8);
    ck_assert_ptr_null(ask());
    ck_assert_double_eq(us, 400);
    sides[2].copies = 0; /* no rows */
    ck_assert_ptr_null(ask());
    sides[3].copies = 4;
    ck_assert(strstr(ask(), "how many copies"));
    all_say(70, 0);
    ck_assert(strstr(ask(), "no rank has rows"));
    for (int r = 0; r < RANKS; r++) {
        all_say(70, 8);
        sides[r].answers = 1;
        ck_assert(strstr(ask(), "the same exchange"));
        sides[r].answers = 0;
        ck_assert(strstr(ask(), "the same exchange"));
    }
    memset(sides, 0, sizeof sides);
    ck_assert_str_eq(ask(), "");
    all_say(71, 8);
    ck_assert(strstr(ask(), "did not go packed"));
    for (uint64_t i = 0; i < RY_RETURNS; i++)
        ry_returns_went(&sums, 100 + i, 1);
    all_say(70, 8);
    ck_assert(strstr(ask(), "did not go packed")); /* too long ago */
}
END_TEST

START_TEST(equal_splits)
{
    memset(&sums, 0, sizeof sums);
    ry_returns_went(&sums, 5, 300);
    all_say(5, 8);
    for (int i = 0; i < RANKS; i++)
        for (int j = 0; j < RANKS; j++)
            matrix[i * RANKS + j] = 512 * (uint64_t)(1 + i * j);
    ck_assert(strstr(ask(), "equal splits"));
    matrix[1] += 512; /* one cell tells */
    ck_assert_ptr_null(ask());
}
END_TEST

START_TEST(estimated)
{
    struct ry_cost_model m = {.copy_us = 2, .copy_bytes_per_us = 1000, .group_us = 10, .agreement_us = 20};
    struct ry_load loads[RANKS] = {{0}};
    m.link[RY_LINK_LOCAL] = (struct ry_cost_link){.alpha_us = 5, .bytes_per_us = 500, .message_us = 1};
    ck_assert_double_eq_tol(ry_returns_estimate(&m, map, loads, 100), 100 + 20 + 10 + 2, 1e-9);
    loads[2].cross_out = 100000;
    loads[2].cross_sends = 2;
    /* half of it is given to the other rank of the node; all of it is read */
    ck_assert_double_eq_tol(ry_returns_estimate(&m, map, loads, 100), 100 + 20 + 10 + (5 + 2 + 100) + 2 + 100, 1e-9);
    /* over the node's own communicator, where there is one: the group stays inside the nodes */
    m.link[RY_LINK_NODE] = (struct ry_cost_link){.alpha_us = 3, .bytes_per_us = 1000, .message_us = 0.5};
    ck_assert_double_eq_tol(ry_returns_estimate(&m, map, loads, 100), 100 + 20 + 10 + (5 + 2 + 100) + 2 + 100, 1e-9);
    m.node_comm = true;
    ck_assert_double_eq_tol(ry_returns_estimate(&m, map, loads, 100), 100 + 20 + 10 + (3 + 1 + 50) + 2 + 100, 1e-9);
}
END_TEST

int main(void)
{
    TCase *t = tcase_create("pairing");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, words);
    tcase_add_test(t, remembers);
    tcase_add_test(t, the_same_back);
    tcase_add_test(t, copies_learned);
    tcase_add_test(t, copies_apart);
    tcase_add_test(t, copies_told);
    tcase_add_test(t, learned_late);
    tcase_add_test(t, all_agree);
    tcase_add_test(t, equal_splits);
    tcase_add_test(t, estimated);
    Suite *s = suite_create("pairing");
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
