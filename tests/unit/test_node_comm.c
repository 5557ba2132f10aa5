/*
 * test_node_comm.c: making, ending and aborting the communicator of a node's ranks (src/engine/node_comm.h), with an
 * NCCL that says yes, no, or waits.
 */
#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "engine/node_comm.h"

enum { RANKS = 5 }; /* two, two, and one alone */

static struct ry_cluster *map;
static _Atomic int splits, destroys, aborts, color, key, fails, waits, in_split, users_at_abort, in_abort;
static _Atomic bool aborted, done;
static void *made;
static char job, child;
static struct ry_run_node *_Atomic face;

static int split(void *comm, int c, int k, void **out, void *config)
{
    ck_assert(comm == &job && !config);
    splits++;
    color = c;
    key = k;
    in_split = 1;
    while (waits)
        usleep(1000);
    *out = c < 0 ? NULL : made;
    return fails;
}
static int destroy(void *comm)
{
    ck_assert_ptr_eq(comm, &child);
    destroys++;
    return 0;
}
static int abort_comm(void *comm)
{
    ck_assert_ptr_eq(comm, &child);
    struct ry_run_node *f = face;
    users_at_abort = f ? atomic_load(&f->users) : 0;
    while (in_abort)
        usleep(1000);
    aborts++;
    return 0;
}
static const char *text(int result)
{
    return result ? "no" : "yes";
}
static const struct ry_nccl nccl = {
    .comm_split = split, .comm_destroy = destroy, .comm_abort = abort_comm, .error_string = text};

static int event_done(struct ry_event *ev, bool *is, struct ry_err *err)
{
    *is = done;
    return 0;
}
static struct ry_device device;

static struct ry_node_comm *new_node(int rank)
{
    device = *ry_device_host();
    device.event_done = event_done;
    splits = destroys = aborts = fails = waits = in_split = in_abort = 0;
    aborted = false;
    done = true;
    made = &child;
    struct ry_node_comm *n = ry_node_comm_new(&nccl, &device, map, rank, &job, "test");
    ck_assert_ptr_nonnull(n);
    face = ry_node_comm_face(n);
    ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_COULD);
    return n;
}

/* ---- of twins ---- */

static int init(void **out, int nranks, struct ry_nccl_id id, int rank)
{
    ck_assert(nranks == 3 && rank == 1 && id.bytes[5] == 42);
    in_split = 1;
    while (waits)
        usleep(1000);
    *out = fails ? NULL : made;
    return fails;
}

static int to_be_waited_for(_Atomic int *what)
{
    for (int i = 0; i < 5000 && !*what; i++)
        usleep(1000);
    return *what;
}

static struct ry_node_comm *of_twins(bool start)
{
    static struct ry_nccl twins;
    struct ry_nccl_id id = {{0}};
    ry_node_comm_end(new_node(0), false); /* for what it sets up */
    twins = nccl;
    ck_assert_ptr_null(ry_node_comm_of_twins(&twins, &device, 0, 3, 1, "test"));
    twins.comm_init_rank = init;
    struct ry_node_comm *n = ry_node_comm_of_twins(&twins, &device, 0, 3, 1, "test");
    ck_assert_ptr_nonnull(n);
    face = ry_node_comm_face(n);
    ck_assert(!face->local && face->twins == 3);
    ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_COULD);
    id.bytes[5] = 42;
    waits = 1;
    if (start) {
        ry_node_comm_start(n, &id);
        ck_assert(to_be_waited_for(&in_split)); /* and nobody waits for it */
        ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_MAKING);
        ck_assert_ptr_null(atomic_load(&face->comm));
    }
    return n;
}

static enum ry_node_state settled(const struct ry_node_comm *n)
{
    for (int i = 0; i < 5000 && ry_node_comm_state(n) == RY_NODE_MAKING; i++)
        usleep(1000);
    return ry_node_comm_state(n);
}

START_TEST(twins)
{
    struct ry_node_comm *n = of_twins(false);
    ry_node_comm_end(n, false); /* never made */
    n = of_twins(true);
    waits = 0;
    ck_assert_int_eq(settled(n), RY_NODE_HAS);
    ck_assert_ptr_eq(atomic_load(&face->comm), &child);
    ry_node_comm_start(n, &(struct ry_nccl_id){{0}}); /* only once */
    ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_HAS);
    ry_node_comm_end(n, false);
    ck_assert_int_eq(destroys, 1);

    n = of_twins(true);
    fails = 3;
    waits = 0;
    ck_assert_int_eq(settled(n), RY_NODE_CANNOT);
    ry_node_comm_end(n, false);
    ck_assert_int_eq(destroys + aborts, 0);
}
END_TEST

/* The job's communicator ends, or is aborted, before it is there: who made it ends it. */
START_TEST(twins_too_late)
{
    for (int abort = 0; abort < 2; abort++) {
        struct ry_node_comm *n = of_twins(true);
        if (abort) {
            ry_node_comm_abort(n);
            ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_CANNOT);
        }
        face = NULL;
        ry_node_comm_end(n, false);
        waits = 0;
        ck_assert(to_be_waited_for(&aborts));
        ck_assert_int_eq(destroys, 0);
    }
}
END_TEST

static struct ry_cluster *cluster(const char *nodes, int n)
{
    struct ry_seat seats[8];
    struct ry_err err;
    memset(seats, 0, sizeof seats);
    for (int r = 0; r < n; r++) {
        seats[r] = (struct ry_seat){.version = RY_SEAT_VERSION, .rank = r, .able = 1};
        snprintf(seats[r].node, sizeof seats[r].node, "node%c", nodes[r]);
    }
    struct ry_cluster *c = ry_cluster_build(seats, n, &err);
    ck_assert_ptr_nonnull(c);
    return c;
}

START_TEST(of_no_use)
{
    struct ry_nccl old = nccl;
    struct ry_cluster *one = cluster("aaa", 3), *alone = cluster("abc", 3);
    ck_assert_ptr_null(ry_node_comm_new(&nccl, &device, one, 0, &job, ""));
    ck_assert_ptr_null(ry_node_comm_new(&nccl, &device, alone, 0, &job, ""));
    old.comm_split = NULL;
    ck_assert_ptr_null(ry_node_comm_new(&old, &device, map, 0, &job, ""));
    ck_assert_int_eq(ry_node_comm_state(NULL), RY_NODE_CANNOT);
    ck_assert_ptr_null(ry_node_comm_face(NULL));
    ry_node_comm_abort(NULL);
    ry_node_comm_end(NULL, false);
    ry_cluster_free(one);
    ry_cluster_free(alone);
}
END_TEST

START_TEST(by_node)
{
    static const int nodes[RANKS] = {0, 1, 0, 1, -1}, keys[RANKS] = {0, 0, 1, 1, 0};
    for (int r = 0; r < RANKS; r++) {
        struct ry_node_comm *n = new_node(r);
        ry_node_comm_make(n, NULL, 1, &aborted);
        ck_assert_int_eq(splits, 1);
        ck_assert_int_eq(color, nodes[r]);
        ck_assert_int_eq(key, keys[r]);
        ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_HAS);
        ck_assert_ptr_eq(atomic_load(&face->comm), nodes[r] < 0 ? NULL : &child);
        for (int p = 0; p < RANKS; p++)
            ck_assert_int_eq(face->local[p], map->node[p] == map->node[r] ? map->local[p] : -1);
        ry_node_comm_end(n, false);
        ck_assert_int_eq(destroys, nodes[r] >= 0);
        ck_assert_int_eq(aborts, 0);
    }
}
END_TEST

START_TEST(failures)
{
    struct ry_node_comm *n = new_node(0);
    fails = 3; /* NCCL's error, whatever it wrote */
    ry_node_comm_make(n, NULL, 1, &aborted);
    ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_CANNOT);
    ck_assert_ptr_null(atomic_load(&face->comm));
    ry_node_comm_end(n, false);
    n = new_node(0);
    made = NULL; /* success, but none */
    ry_node_comm_make(n, NULL, 1, &aborted);
    ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_CANNOT);
    ry_node_comm_end(n, false);
    n = new_node(2);
    done = false; /* the stream does not get there: the others are not left alone, this rank gets none */
    uint64_t t = ry_now_ns();
    ry_node_comm_make(n, NULL, 0.05, &aborted);
    ck_assert_uint_ge(ry_now_ns() - t, 50000000);
    ck_assert_int_eq(splits, 1);
    ck_assert_int_eq(color, -1);
    ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_CANNOT);
    ry_node_comm_end(n, false);
    ck_assert_int_eq(destroys + aborts, 0);
    n = new_node(2);
    ry_node_comm_make(n, NULL, 1, &aborted);
    ry_node_comm_end(n, true); /* the process exits: NCCL may be gone */
    ck_assert_int_eq(destroys + aborts, 0);
}
END_TEST

static void *make(void *arg)
{
    ry_node_comm_make(arg, NULL, 60, &aborted);
    return NULL;
}

/* While it is used, and NCCL takes its time: who aborts does not wait, NCCL hears of it once the group is enqueued. */
START_TEST(aborting)
{
    struct ry_node_comm *n = new_node(0);
    ry_node_comm_make(n, NULL, 1, &aborted);
    in_abort = 1;
    atomic_fetch_add(&face->users, 1);
    aborted = true;
    ry_node_comm_abort(n);
    ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_CANNOT);
    ck_assert_ptr_null(atomic_load(&face->comm));
    ry_node_comm_abort(n); /* revoked, then aborted */
    usleep(20000);
    atomic_fetch_sub(&face->users, 1);
    ry_node_comm_end(n, true); /* before the abort is over */
    face = NULL;
    in_abort = 0;
    ry_node_comm_settle();
    ck_assert_int_eq(aborts, 1);
    ck_assert_int_eq(users_at_abort, 0);
    ck_assert_int_eq(destroys, 0);
}
END_TEST

/* While it waits for the stream, and while it is in NCCL. */
START_TEST(aborted_while_made)
{
    pthread_t thread;
    for (int inside = 0; inside < 2; inside++) {
        struct ry_node_comm *n = new_node(0);
        done = inside;
        waits = inside;
        ck_assert(!pthread_create(&thread, NULL, make, n));
        while (inside && !in_split)
            usleep(1000);
        usleep(10000);
        aborted = true;
        ry_node_comm_abort(n);
        ck_assert_int_eq(aborts, 0);
        waits = 0; /* it was made after all */
        pthread_join(thread, NULL);
        ry_node_comm_settle();
        ck_assert_int_eq(splits, inside);
        ck_assert_int_eq(aborts, inside);
        ck_assert_int_eq(ry_node_comm_state(n), RY_NODE_CANNOT);
        ck_assert_ptr_null(atomic_load(&face->comm));
        ry_node_comm_end(n, true);
    }
}
END_TEST

static void setup(void)
{
    map = cluster("ababc", RANKS);
}

static void teardown(void)
{
    ry_cluster_free(map);
}

int main(void)
{
    Suite *s = suite_create("node_comm");
    TCase *t = tcase_create("all");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, of_no_use);
    tcase_add_test(t, by_node);
    tcase_add_test(t, failures);
    tcase_add_test(t, aborting);
    tcase_add_test(t, aborted_while_made);
    tcase_add_test(t, twins);
    tcase_add_test(t, twins_too_late);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
