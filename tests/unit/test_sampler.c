/* test_sampler.c: durations of exchanges, on the host-memory device. */
#include <check.h>
#include <math.h>
#include <stdatomic.h>
#include <unistd.h>

#include "base/clock.h"
#include "engine/sampler.h"

static struct ry_sampler *sampler;
static struct ry_err err;
static _Atomic int calls;
static double began[8];

static void done(void *context, uint64_t number, double began_us, double us)
{
    ck_assert_ptr_eq(context, &calls);
    ck_assert_uint_eq(number, 7);
    ck_assert(us >= 0);
    began[calls % 8] = began_us;
    calls++;
}

static void setup(void)
{
    calls = 0;
    ck_assert_ptr_nonnull(sampler = ry_sampler_start(ry_device_host(), &err));
}

static void teardown(void)
{
    ry_sampler_stop(sampler); /* what it holds is never freed: the process is about to end */
}

/* Which device a communicator is on is not always known (ordinal -1): its exchanges are timed all the same. */
START_TEST(any_ordinal)
{
    for (int ordinal = -1; ordinal < 2; ordinal++) {
        struct ry_sample *s = ry_sampler_begin(sampler, ordinal, NULL);
        ck_assert_ptr_nonnull(s);
        ry_sampler_end(sampler, s, NULL, 1, done, &calls, 7);
    }
    for (int i = 0; i < 500 && calls < 3; i++)
        usleep(10000);
    ck_assert_int_eq(calls, 3);
}
END_TEST

/* Neither a sample given back nor one that was forgotten is told. */
START_TEST(given_back)
{
    ry_sampler_end(sampler, ry_sampler_begin(sampler, 0, NULL), NULL, 0, done, &calls, 7);
    ry_sampler_end(sampler, ry_sampler_begin(sampler, 0, NULL), NULL, 1, done, &calls, 7);
    ry_sampler_forget(sampler, &calls);
    ck_assert_int_eq(calls, 1); /* the last look */
    usleep(60000);
    ck_assert_int_eq(calls, 1);
}
END_TEST

static void until(int n)
{
    for (int i = 0; i < 500 && calls < n; i++)
        usleep(10000);
    ck_assert_int_eq(calls, n);
}

/* When they began is told only where it is wanted, on one clock for a device, from what is sampled after it was made. */
START_TEST(clock_of_a_device)
{
    ry_sampler_end(sampler, ry_sampler_begin(sampler, 0, NULL), NULL, 1, done, &calls, 7);
    until(1);
    ck_assert(isnan(began[0]));
    ry_sampler_clock(sampler);
    for (int ordinal = -1; ordinal < 1; ordinal++) { /* -1: a device of which that is not known */
        calls = 0;
        ry_sampler_end(sampler, ry_sampler_begin(sampler, ordinal, NULL), NULL, 1, done, &calls, 7);
        until(1); /* its clock is there now; it began before that */
        ck_assert(isnan(began[0]));
        uint64_t before[3], after[3];
        for (int i = 0; i < 3; i++) {
            before[i] = ry_now_ns();
            struct ry_sample *s = ry_sampler_begin(sampler, ordinal, NULL);
            after[i] = ry_now_ns();
            ry_sampler_end(sampler, s, NULL, 1, done, &calls, 7);
            until(2 + i);
        }
        for (int i = 1; i < 3; i++) {
            double us = began[1 + i] - began[i];
            ck_assert_msg(us >= (double)(before[i] - after[i - 1]) / 1e3 - 1 && us <= (double)(after[i] - before[i - 1]) / 1e3 + 1,
                          "%f us apart, not %f to %f", us, (double)(before[i] - after[i - 1]) / 1e3, (double)(after[i] - before[i - 1]) / 1e3);
        }
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("sampler");
    TCase *t = tcase_create("sampler");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, any_ordinal);
    tcase_add_test(t, given_back);
    tcase_add_test(t, clock_of_a_device);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
