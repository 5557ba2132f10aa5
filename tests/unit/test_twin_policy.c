/*
 * test_twin_policy.c: what the yardmaster of twins decides: only what is equal goes by replica, communicators are made
 * first and once, what is measured counts for more than the model, and what does not pay is given up.
 */
#include <check.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/twin_policy.h"

#define TWINS 3
#define EACH 2
#define N (TWINS * EACH)

static struct ry_cluster *map;
static struct ry_twin_chooser *chooser;
static struct ry_policy policy;
static _Atomic int forced;
static struct ry_twin_side side[N];
static uint64_t matrix[N * N], bytes, number, packed; /* bytes left if equal rows go once; 0: not known */
static bool verify;
static unsigned last; /* exchanges that nobody asks about, after this one */
static struct ry_agreed agreed;
static enum ry_strategy alone; /* what twins do, each for itself */

static void start(int how, double nic_bytes_per_us, uint64_t verify_every)
{
    static struct ry_seat seats[N];
    struct ry_err err;
    for (int i = 0; i < N; i++) {
        seats[i].rank = i;
        snprintf(seats[i].node, sizeof seats[i].node, "n%d", i % EACH);
    }
    map = ry_cluster_build(seats, N, &err);
    forced = how;
    struct ry_twin_config config = {
        .map = map, .twins = TWINS, .forced = &forced, .verify = verify_every, .name = "test"};
    ry_cost_guess(&config.model, map);
    config.model.node_comm = true;
    config.model.link[RY_LINK_NIC].bytes_per_us = config.model.nic_rank_bytes_per_us = nic_bytes_per_us;
    config.model.agreement_us = 50;
    chooser = ry_twin_chooser_new(&config, &err);
    policy = ry_twin_chooser_policy(chooser);
    bytes = 1 << 20;
    number = packed = 0;
    alone = RY_DIRECT;
    memset(side, 0, sizeof side);
    for (int r = 0; r < N; r++)
        side[r].node_comm = RY_NODE_HAS;
}

static void stop(void)
{
    ry_twin_chooser_free(chooser);
    ry_cluster_free(map);
}

/* All alike: exchange `number`, each rank sending `bytes` to the other of its twin. */
static void fill(void)
{
    memset(matrix, 0, sizeof matrix);
    for (int r = 0; r < N; r++) {
        uint64_t send[N] = {0};
        int peer = r ^ 1;
        send[peer] = matrix[r * N + peer] = bytes;
        ry_load_of(&side[r].load, map, r, send, send, NULL);
        side[r].digest = (struct ry_digest){{number * 10 + (uint64_t)(r % EACH), 5}};
        side[r].digested = number + 1;
        side[r].packed = packed;
        side[r].id[0] = r < EACH ? (uint8_t)(r + 1) : 0;
    }
}

static int decide(void)
{
    static const void *extra[N];
    static size_t sizes[N];
    for (int r = 0; r < N; r++) {
        extra[r] = &side[r];
        sizes[r] = sizeof side[r];
    }
    agreed = (struct ry_agreed){
        .number = number, .nranks = N, .type = 1, .matrix = matrix, .extra = extra, .extra_bytes = sizes};
    verify = false;
    last = 0;
    int s = policy.choose(policy.context, &agreed, &verify, &last);
    number++;
    return s;
}

static struct ry_twin_order order_of(int rank)
{
    struct ry_twin_order o;
    size_t size;
    const void *p = policy.slice(policy.context, &agreed, RY_DIRECT, rank, &size);
    ck_assert_uint_eq(size, sizeof o);
    memcpy(&o, p, sizeof o);
    return o;
}

static bool worth(void)
{
    const void *extra[N];
    size_t sizes[N];
    for (int r = 0; r < N; r++) {
        extra[r] = &side[r];
        sizes[r] = sizeof side[r];
    }
    return policy.worth(policy.context, number, extra, sizes);
}

/* The exchange before took as long, on all ranks. `told_late`: they hear of it a few exchanges later, each at other ones, of several at a time. */
static bool told_late;
static void took(double us)
{
    static struct ry_twin_took waiting[N][RY_TOOK];
    for (int r = 0; r < N && told_late; r++) {
        bool now = (number + 3 * (unsigned)r) % RY_TOOK == 0;
        waiting[r][number % RY_TOOK] = (struct ry_twin_took){number, alone, us};
        memset(side[r].took, 0, sizeof side[r].took);
        if (now) {
            memcpy(side[r].took, waiting[r], sizeof side[r].took);
            memset(waiting[r], 0, sizeof waiting[r]);
        }
    }
    for (int r = 0; r < N && !told_late; r++) {
        memset(side[r].took, 0, sizeof side[r].took);
        side[r].took[r % RY_TOOK] = (struct ry_twin_took){number, alone, us};
    }
}

START_TEST(only_what_is_equal)
{
    start(RY_REPLICA, 3000, 0);
    fill();
    ck_assert_int_eq(decide(), RY_REPLICA);
    for (int r = 0; r < N; r++) {
        fill();
        side[r].digest.word[r % 2] ^= 1;
        ck_assert_int_eq(decide(), RY_DIRECT);
        fill();
        side[r].digested--; /* of the exchange before */
        ck_assert_int_eq(decide(), RY_DIRECT);
        fill();
        matrix[r * N + (r ^ 1)]++; /* both ends say so, as the agreement makes sure */
        ck_assert_int_eq(decide(), RY_DIRECT);
        ck_assert(!last); /* it was asked for by name */
        fill();
        ck_assert_int_eq(decide(), RY_REPLICA);
    }
    fill();
    for (int r = 0; r < N; r++)
        side[r].digested = 0;
    ck_assert_int_eq(decide(), RY_DIRECT);
    stop();
}
END_TEST

START_TEST(sizes_that_are_wrong)
{
    start(RY_REPLICA, 3000, 0);
    fill();
    const void *extra[N] = {0};
    size_t sizes[N] = {0};
    ck_assert(!policy.worth(policy.context, 0, extra, sizes));
    agreed = (struct ry_agreed){.nranks = N, .matrix = matrix, .extra = extra, .extra_bytes = sizes};
    ck_assert_int_eq(policy.choose(policy.context, &agreed, &verify, &last), RY_DIRECT);
    ck_assert(last);
    stop();
}
END_TEST

START_TEST(communicators_first)
{
    start(RY_REPLICA, 3000, 0);
    for (int r = 0; r < N; r++)
        side[r].node_comm = RY_NODE_COULD;
    fill();
    side[2].digest.word[0]++;
    ck_assert_int_eq(decide(), RY_DIRECT); /* not for what is not equal */
    ck_assert_uint_eq(order_of(0).make, 0);
    fill();
    ck_assert_int_eq(decide(), RY_DIRECT);
    for (int r = 0; r < N; r++) {
        ck_assert_uint_eq(order_of(r).make, 1);
        ck_assert_uint_eq(order_of(r).id[0], r % EACH + 1);
        side[r].node_comm = RY_NODE_MAKING;
    }
    for (int r = 0; r < N; r++) {
        fill();
        ck_assert_int_eq(decide(), RY_DIRECT);
        ck_assert(!last);
        ck_assert_uint_eq(order_of(r).make, 0);
        side[r].node_comm = RY_NODE_HAS;
    }
    fill();
    ck_assert_int_eq(decide(), RY_REPLICA);
    side[4].node_comm = RY_NODE_CANNOT;
    fill();
    ck_assert_int_eq(decide(), RY_DIRECT);
    ck_assert(last);
    ck_assert(!worth());
    stop();
}
END_TEST

START_TEST(by_name)
{
    start(-1, 3000, 3);
    fill();
    ck_assert(worth());
    for (int s = 0; s < RY_REPLICA; s++) {
        forced = s;
        fill();
        ck_assert(!worth());
        ck_assert_int_eq(decide(), RY_DIRECT);
        ck_assert(last);
    }
    forced = RY_REPLICA;
    ck_assert(worth());
    for (int i = 0, verified = 0; i < 9; i++) {
        fill();
        ck_assert_int_eq(decide(), RY_REPLICA);
        verified += verify;
        ck_assert_int_eq(verified, i / 3 + 1);
    }
    stop();
}
END_TEST

/* By the model, on a slow network and a fast one. */
START_TEST(by_cost)
{
    start(-1, 3000, 0);
    fill();
    ck_assert(worth());
    side[3].digest.word[1]++;
    ck_assert(!worth());
    fill();
    side[3].load.cross_out++;
    ck_assert(!worth());
    bytes = 100; /* agreeing takes longer */
    fill();
    ck_assert(!worth());
    stop();
    start(-1, 1e6, 0);
    fill();
    ck_assert(!worth());
    for (int r = 0; r < N; r++) /* but it takes far longer than that: find out */
        side[r].plain_us = 5000;
    ck_assert(worth());
    side[1].plain_us = 100;
    ck_assert(!worth());
    stop();
}
END_TEST

/* Exchanges until `n` were made; how many of the last 50 went by replica. */
static int go(int n, double replica_us, double apart_us)
{
    int late = 0;
    for (int i = 0; i < n; i++) {
        fill();
        int s = decide();
        ck_assert(s == RY_REPLICA || s == RY_DIRECT);
        took(s == RY_REPLICA ? replica_us : apart_us);
        late += i >= n - 50 && s == RY_REPLICA;
        if (last)
            return -1;
    }
    return late;
}

START_TEST(by_measure)
{
    start(-1, 3000, 0);
    ck_assert_int_ge(go(200, 300, 1000), 49);
    ck_assert_int_ge(go(200, 300, 320), -1);
    stop();
    start(-1, 3000, 0); /* the model says that it pays; it does not */
    ck_assert_int_eq(go(200, 1000, 300), -1);
    fill();
    for (int i = 0, asked = 0; i < 20; i++) { /* and is not tried again at once */
        asked += worth();
        ck_assert(i || !asked);
    }
    stop();
    start(-1, 1e6, 0); /* the model says that it does not pay; it does */
    ck_assert_int_ge(go(200, 300, 1000), 49);
    stop();
    start(-1, 3000, 0); /* what paid does not any more, and the other way */
    ck_assert_int_ge(go(200, 300, 1000), 49);
    ck_assert_int_eq(go(2000, 1000, 300), -1);
    stop();
}
END_TEST

/* Durations become known some at a time, and each rank tells of them when it knows. */
START_TEST(by_late_measures)
{
    told_late = true;
    start(-1, 3000, 0); /* the model says that it pays; it does not */
    ck_assert_int_eq(go(200, 1000, 300), -1);
    stop();
    start(-1, 1e6, 0); /* and the other way */
    ck_assert_int_ge(go(200, 300, 1000), 48);
    stop();
    told_late = false;
}
END_TEST

/* Plain NCCL's exchanges are timed before anything is agreed on: a guess of the NIC does not stand in the way. */
START_TEST(knows_plain)
{
    start(-1, 1e6, 0);
    for (int i = 0; i < 8; i++, number += 5) {
        fill();
        bool yes = worth();
        ck_assert(i ? i < 5 || yes : !yes);
        number++;
        took(3000);
        number--;
    }
    stop();
}
END_TEST

/* Where rows repeat more often than there are twins, each for itself leaves more out. */
START_TEST(repeated_rows)
{
    start(-1, 300, 0);
    alone = RY_DEDUP;
    packed = bytes / 16;
    fill();
    ck_assert(!worth());
    packed = bytes * 3 / 4; /* less often: by replica */
    fill();
    ck_assert(worth());
    side[2].packed = bytes; /* twins need not know the same of it */
    ck_assert(worth());
    ck_assert_int_ge(go(200, 1300, 3000), 49);
    packed = bytes / 16; /* found out while they go by replica; each for itself is as the model says then */
    ck_assert_int_eq(go(200, 1300, 400), -1);
    packed = bytes * 3 / 4;
    fill();
    for (int i = 0; i < 20 && !worth(); i++)
        ck_assert_int_lt(i, 10);
    ck_assert_int_ge(go(400, 1300, 3000), 49);
    stop();
}
END_TEST

/* What each for itself is best at counts as such even while they have not come to it; how they went is told with how long it took. */
START_TEST(each_comes_to_it)
{
    start(-1, 300, 0);
    packed = bytes / 16;
    int replica = 0, i = 0;
    double us[RY_STRATEGIES] = {[RY_DIRECT] = 10000, [RY_DEDUP] = 1500, [RY_REPLICA] = 5500};
    for (last = 0; i < 200 && !last; i++) {
        alone = i < 30 ? RY_DIRECT : RY_DEDUP; /* now their own yardmasters know enough */
        fill();
        int s = decide();
        replica += s == RY_REPLICA;
        took(s == RY_REPLICA ? us[RY_REPLICA] : us[alone]);
    }
    ck_assert_int_lt(i, 100); /* and nobody is asked about twins any more */
    ck_assert_int_le(replica, 12);
    stop();
    start(-1, 300, 0); /* where each does far better for itself already, replica is not even tried */
    packed = bytes / 16;
    alone = RY_DEDUP;
    for (i = 0; i < 20; i++, number++) {
        fill();
        for (int r = 0; r < N; r++)
            side[r].plain_us = us[RY_DIRECT];
        ck_assert(!worth());
    }
    for (last = 0, i = 0; i < 60 && !last; i++) {
        fill();
        ck_assert_int_eq(decide(), RY_DIRECT);
        took(us[RY_DEDUP]);
    }
    ck_assert(last);
    stop();
    start(-1, 1e6, 0); /* the model thinks that it comes close, which is known to be wrong as soon as a few were measured */
    for (last = 0, replica = i = 0; i < 60 && !last; i++) {
        fill();
        int s = decide();
        replica += s == RY_REPLICA;
        took(s == RY_REPLICA ? 20000 : 3000);
    }
    ck_assert_int_le(replica, 5);
    stop();
    start(-1, 300, 0); /* they never do: then replica it is, which is better than plain NCCL */
    packed = bytes / 16;
    replica = 0;
    for (i = 0; i < 200; i++) {
        fill();
        int s = decide();
        ck_assert(!last);
        replica += i >= 150 && s == RY_REPLICA;
        took(s == RY_REPLICA ? us[RY_REPLICA] : us[RY_DIRECT]);
    }
    ck_assert_int_ge(replica, 49);
    stop();
    start(-1, 300, 0); /* ranks that say different things of how they went: nothing is learned from it, nobody hangs on it */
    for (i = 0; i < 200; i++) {
        fill();
        took(decide() == RY_REPLICA ? us[RY_REPLICA] : us[RY_DIRECT]);
        side[i % N].took[i % N % RY_TOOK].as = RY_DEDUP;
    }
    stop();
}
END_TEST

/* One twin does early what is best for each, the others later: until all do, nothing is known of it, and it is not left for replica. */
START_TEST(some_come_later)
{
    start(-1, 300, 0);
    packed = bytes / 3; /* as much as replica leaves out, by the model */
    int replica = 0;
    for (int i = 0; i < 200 && !last; i++) {
        fill();
        int s = decide();
        replica += s == RY_REPLICA;
        alone = RY_DEDUP;
        took(s == RY_REPLICA ? 2600 : i < 30 ? 8000 : 1500);
        for (int r = EACH; r < N && i < 30; r++)
            side[r].took[r % RY_TOOK].as = RY_DIRECT;
    }
    ck_assert(last);
    ck_assert_int_le(replica, 12);
    stop();
}
END_TEST

START_TEST(given_up)
{
    start(-1, 3000, 0);
    int n = 0;
    do {
        fill();
        side[5].digest.word[0]++;
        ck_assert_int_eq(decide(), RY_DIRECT);
    } while (!last && ++n < 100);
    ck_assert_int_lt(n, 20);
    stop();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("twin_policy");
    TCase *t = tcase_create("twin_policy");
    tcase_add_test(t, only_what_is_equal);
    tcase_add_test(t, sizes_that_are_wrong);
    tcase_add_test(t, communicators_first);
    tcase_add_test(t, by_name);
    tcase_add_test(t, by_cost);
    tcase_add_test(t, by_measure);
    tcase_add_test(t, by_late_measures);
    tcase_add_test(t, knows_plain);
    tcase_add_test(t, repeated_rows);
    tcase_add_test(t, each_comes_to_it);
    tcase_add_test(t, some_come_later);
    tcase_add_test(t, given_up);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
