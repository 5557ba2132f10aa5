/*
 * test_contention.c: what runs beside what (src/engine/contention.h), by hand and against sums over all pairs.
 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "engine/contention.h"

static struct ry_contention *q;
static uint64_t now = 1;
#define MS UINT64_C(1000000)

#define TOLD 256
struct told {
    int n;
    uint64_t number[TOLD];
    double us[TOLD], met_us[TOLD];
    struct ry_beside beside[TOLD];
};
static struct told told[4];

static void settled(void *context, uint64_t number, double us, double met_us, const struct ry_beside *beside)
{
    struct told *t = context;
    ck_assert_int_lt(t->n, TOLD);
    t->number[t->n] = number;
    t->us[t->n] = us;
    t->met_us[t->n] = met_us;
    t->beside[t->n++] = *beside;
}

static void start(void)
{
    ck_assert_ptr_nonnull(q = ry_contention_new());
    for (int i = 0; i < 4; i++)
        told[i].n = 0;
    now = 1;
}

static void stop(void)
{
    ry_contention_free(q);
}

static int join(uint64_t key, int device, int who)
{
    return ry_contention_join(q, key, device, settled, &told[who]);
}

static void took(int seat, uint64_t number, double began, double us, uint64_t out, uint64_t in, unsigned weight)
{
    struct ry_contention_run run = {number, began, us, out, in, weight};
    ry_contention_took(q, seat, &run, now);
}

/* 0 to 100 us with 1000 bytes, beside 50 to 250 us with 4000: they meet for 50 us. */
START_TEST(by_hand)
{
    int a = join(1, 0, 0), b = join(2, 0, 1);
    ry_contention_began(q, a);
    ry_contention_began(q, b);
    took(a, 7, 0, 100, 1000, 900, 1);
    ck_assert_int_eq(told[0].n, 0); /* the other is still under way: nobody knows for how long */
    took(b, 3, 50, 200, 4000, 400, 1);
    ck_assert_int_eq(told[0].n, 1);
    ck_assert_int_eq(told[1].n, 1);
    ck_assert_uint_eq(told[0].number[0], 7);
    ck_assert_double_eq_tol(told[0].us[0], 100, 1e-9);
    ck_assert_double_eq_tol(told[0].met_us[0], 50, 1e-9);
    ck_assert_uint_eq(told[0].beside[0].out, 1000); /* a quarter of 4000 */
    ck_assert_uint_eq(told[0].beside[0].in, 100);
    ck_assert_uint_eq(told[0].beside[0].own_out, 1000);
    ck_assert_uint_eq(told[0].beside[0].own_in, 900);
    ck_assert_double_eq_tol(told[0].beside[0].share, 0.5, 1e-9);
    /* others took as much as it had itself on the way out, but ran for half of its time only */
    ck_assert_double_eq_tol(ry_beside_more(&told[0].beside[0]), 0.5, 1e-9);
    ck_assert(ry_contention_much(q, a));
    ck_assert_uint_eq(told[1].beside[0].out, 500); /* half of 1000 */
    ck_assert_double_eq_tol(ry_beside_more(&told[1].beside[0]), 450.0 / 400 < 0.25 ? 450.0 / 400 : 0.25, 1e-9);
    /* what a manifest says: the average, of which there is one exchange */
    struct ry_beside f = ry_contention_of(q, a, now);
    ck_assert_uint_eq(f.out, 1000);
    ck_assert_double_eq_tol(f.share, 0.5, 1e-9);
    /* more and more of them have nothing beside them */
    for (uint64_t i = 8; i < 60; i++) {
        ry_contention_began(q, a);
        took(a, i, 1000.0 * (double)i, 100, 1000, 900, 1);
    }
    ck_assert(!ry_contention_much(q, a));
    f = ry_contention_of(q, a, now);
    ck_assert_double_le(ry_beside_more(&f), 0.01);
}
END_TEST

/* Short ones of which one in eight is timed stand for eight; one that only wants to know stands for none. */
START_TEST(weights)
{
    int a = join(1, 0, 0), b = join(2, 0, 1);
    took(b, 0, 10, 5, 100, 100, 8);
    took(b, 1, 20, 5, 100, 100, 0);
    took(a, 0, 0, 100, 1000, 1000, 1);
    ck_assert_uint_eq(told[0].beside[0].out, 800);
    ck_assert_double_eq_tol(told[0].met_us[0], 40, 1e-9);
    ck_assert_double_eq_tol(told[0].beside[0].share, 0.4, 1e-9);
}
END_TEST

/* Ranks of one communicator in one process, and other devices, are not beside each other; nor what has left. */
START_TEST(who_counts)
{
    int a = join(1, 0, 0), same = join(1, 0, 1), far = join(2, 1, 2);
    ck_assert(!ry_contention_wants(q, -1, now, true));
    took(a, 0, 0, 100, 1000, 1000, 1);
    took(same, 0, 0, 100, 1000, 1000, 1);
    took(far, 0, 0, 100, 1000, 1000, 1);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(told[i].n, 1);
        ck_assert_uint_eq(told[i].beside[0].out, 0);
    }
    int b = join(3, 0, 3);
    ry_contention_began(q, b); /* and never comes to an end */
    took(a, 1, 200, 100, 1000, 1000, 1);
    ck_assert_int_eq(told[0].n, 1);
    ry_contention_leave(q, b);
    took(a, 2, 400, 100, 1000, 1000, 1);
    ck_assert_int_eq(told[0].n, 3);
    ry_contention_leave(q, a);
    took(same, 1, 200, 100, 1, 1, 1);
    ck_assert_int_eq(told[0].n, 3);
    ck_assert_int_eq(told[1].n, 2);
}
END_TEST

/* Nobody is waited for for ever. */
START_TEST(patience)
{
    int a = join(1, 0, 0), b = join(2, 0, 1);
    ry_contention_began(q, b);
    ry_contention_began(q, a);
    took(a, 0, 0, 100, 1000, 1000, 1);
    now += RY_CONTENTION_WAIT_NS / 2;
    ry_contention_of(q, a, now);
    ck_assert_int_eq(told[0].n, 0);
    now += RY_CONTENTION_WAIT_NS / 2;
    ry_contention_of(q, a, now);
    ck_assert_int_eq(told[0].n, 1);
    /* what was lost is not waited for */
    ry_contention_began(q, b);
    ry_contention_lost(q, b);
    ry_contention_lost(q, b); /* the first one */
    took(a, 1, 200, 100, 1000, 1000, 1);
    ck_assert_int_eq(told[0].n, 2);
    /* nonsense is nothing */
    took(a, 2, NAN, 100, 1, 1, 1);
    took(a, 3, 300, -1, 1, 1, 1);
    ck_assert_int_eq(told[0].n, 2);
}
END_TEST

/* Only while there are several, and somebody asked lately. */
START_TEST(wanted)
{
    int a = join(1, 0, 0), again = join(1, 0, 0), b;
    ry_contention_of(q, a, now);
    ck_assert(!ry_contention_wants(q, a, now, true));
    b = join(2, 0, 1);
    ck_assert(!ry_contention_wants(q, b, now, false));
    ck_assert(ry_contention_wants(q, b, now, true));
    ry_contention_of(q, a, now);
    ck_assert(ry_contention_wants(q, b, now + 1000 * MS, false));
    ck_assert(!ry_contention_wants(q, b, now + RY_CONTENTION_LATELY_NS, false));
    ry_contention_leave(q, b);
    ck_assert(!ry_contention_wants(q, a, now, true));
    ry_contention_leave(q, again);
    int last = 0, seats = 0;
    while ((last = join(100 + (uint64_t)seats, 0, 1)) >= 0)
        seats++;
    ck_assert_int_eq(seats, RY_CONTENTION_SEATS - 1);
}
END_TEST

struct drawn {
    int who;
    uint64_t number;
    double began, us;
    uint64_t out, in;
};

/* Random exchanges of three communicators, each with those of a fourth seat of the same key as the first, told of in a random order: every
 * figure is the sum over all that it met. */
START_TEST(all_pairs)
{
    const char *given = getenv("RY_TEST_SEED");
    unsigned seed = given ? (unsigned)strtoul(given, NULL, 0) : (unsigned)(time(NULL) ^ getpid());
    printf("RY_TEST_SEED=%u\n", seed);
    for (int round = 0; round < 300; round++) {
        start();
        int seat[4] = {join(1, 0, 0), join(2, 0, 1), join(3, 0, 2), join(1, 0, 3)}, n = 1 + rand_r(&seed) % (RY_CONTENTION_RECORDS - 1);
        struct drawn d[RY_CONTENTION_RECORDS];
        uint64_t key[4] = {1, 2, 3, 1};
        for (int i = 0; i < n; i++) {
            d[i] = (struct drawn){rand_r(&seed) % 4, (uint64_t)i, rand_r(&seed) % 10000, 1 + rand_r(&seed) % 3000, rand_r(&seed) % 100000, rand_r(&seed) % 100000};
            ry_contention_began(q, seat[d[i].who]);
        }
        for (int i = n - 1; i > 0; i--) {
            int k = rand_r(&seed) % (i + 1);
            struct drawn t = d[i];
            d[i] = d[k];
            d[k] = t;
        }
        for (int i = 0; i < n; i++)
            took(seat[d[i].who], d[i].number, d[i].began, d[i].us, d[i].out, d[i].in, 1);
        int all = 0;
        for (int w = 0; w < 4; w++) {
            all += told[w].n;
            for (int t = 0; t < told[w].n; t++) {
                const struct drawn *x = d;
                while (x->number != told[w].number[t])
                    x++;
                double out = 0, met = 0;
                for (int k = 0; k < n; k++) {
                    double both = fmin(d[k].began + d[k].us, x->began + x->us) - fmax(d[k].began, x->began);
                    if (key[d[k].who] == key[x->who] || both <= 0)
                        continue;
                    out += (double)d[k].out * both / d[k].us;
                    met += both;
                }
                ck_assert_double_eq_tol((double)told[w].beside[t].out, out, 0.51);
                ck_assert_double_eq_tol(told[w].beside[t].share, met / x->us, 1e-6);
                ck_assert_double_le(told[w].met_us[t], x->us + 1e-9);
            }
        }
        ck_assert_int_eq(all, n); /* each once */
        stop();
    }
    start();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("contention");
    TCase *t = tcase_create("contention");
    tcase_add_checked_fixture(t, start, stop);
    tcase_add_test(t, by_hand);
    tcase_add_test(t, weights);
    tcase_add_test(t, who_counts);
    tcase_add_test(t, patience);
    tcase_add_test(t, wanted);
    tcase_add_test(t, all_pairs);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
