/* test_comms.c: the preload's table of communicators, when it is full. */
#include <check.h>
#include <stdlib.h>

#include "base/clock.h"
#include "comms.h"

#define FULL 4096

static char *handles; /* addresses as an allocator would give them */
static void *handle(int i)
{
    return handles + (size_t)i * 464;
}

static void setup(void)
{
    handles = malloc((size_t)(2 * FULL) * 464);
    ck_assert_ptr_nonnull(handles);
}

static void teardown(void)
{
    free(handles);
}

static void fill(int from, int to)
{
    for (int i = from; i < to; i++) {
        struct ry_comm *c = ry_comms_add(handle(i));
        ck_assert_ptr_nonnull(c);
        ry_comms_put(c);
    }
}

/* One too many is not seen, and nothing happens to the others. */
START_TEST(full)
{
    fill(0, FULL);
    ck_assert_ptr_null(ry_comms_add(handle(FULL)));
    ck_assert_ptr_null(ry_comms_find(handle(FULL)));
    for (int i = 0; i < FULL; i++)
        ck_assert_ptr_eq(ry_comms_find(handle(i))->nccl, handle(i));
    for (int i = 0; i < FULL; i += 2)
        ry_comms_remove(ry_comms_find(handle(i)));
    for (int i = 0; i < FULL; i++)
        ck_assert_int_eq(ry_comms_find(handle(i)) != NULL, i % 2);
    fill(FULL, FULL + FULL / 2);
    ck_assert_ptr_null(ry_comms_add(handle(0)));
}
END_TEST

static struct ry_comm *ending, *reused;
static void add_another(struct ry_comm *c)
{
    ending = c;
    reused = ry_comms_add(handle(FULL)); /* as another thread may, while this one tells the engine of the end */
}

/* An entry whose end is being told is not given to a new communicator before that is over. */
START_TEST(not_reused_too_soon)
{
    fill(0, FULL);
    ry_comms_last = add_another;
    ry_comms_remove(ry_comms_find(handle(17)));
    ck_assert_ptr_nonnull(ending);
    ck_assert_ptr_null(reused);
    ck_assert_ptr_null(ry_comms_get(handle(17)));
    ck_assert_ptr_nonnull(ry_comms_add(handle(FULL)));
}
END_TEST

/* The fastest of ten: others may have the processor now and then. */
static double look_up(int times)
{
    uint64_t best = UINT64_MAX;
    for (int k = 0; k < 10; k++) {
        int found = 0;
        uint64_t t = ry_now_ns();
        for (int i = 0; i < times; i++)
            found += ry_comms_find(handle(FULL + i % FULL)) != NULL;
        t = ry_now_ns() - t;
        ck_assert_int_eq(found, 0);
        best = t < best ? t : best;
    }
    return (double)best / times;
}

/* Calls on communicators that did not fit stay cheap. */
START_TEST(looking_in_vain)
{
    look_up(FULL);
    double empty = look_up(20 * FULL);
    fill(0, FULL);
    double crowded = look_up(20 * FULL);
    ck_assert_msg(crowded < 30 * empty + 30, "%.0f ns in a full table, %.0f in an empty one", crowded, empty);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("comms");
    TCase *t = tcase_create("comms");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, full);
    tcase_add_test(t, not_reused_too_soon);
    tcase_add_test(t, looking_in_vain);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
