/*
 * test_plan_replica.c: plans by `replica`: proved, carried out on host memory, counted and costed; and the verifier
 * made to find what is wrong with them.
 */
#include <stdlib.h>
#include <string.h>

#include "plan/cost_replica.h"
#include "plan_help.h"

struct twins {
    int n, each; /* twins, ranks of each */
    struct job job;
};

/* The job of one communicator, `n` times over: rank t * each + k is rank k of twin t. */
static struct twins make_twins(int n, int each, uint64_t most)
{
    struct twins t = {.n = n, .each = each};
    struct job one = random_job(each, most, true);
    size_t all = (size_t)(n * each);
    struct ry_seat *seats = calloc(all, sizeof *seats);
    struct ry_err err;
    for (size_t i = 0; i < all; i++) {
        seats[i] = one.cluster->seats[i % (size_t)each];
        seats[i].rank = (int)i;
    }
    t.job = (struct job){.n = (int)all, .chunks = 1};
    t.job.cluster = ry_cluster_build(seats, (int)all, &err);
    ck_assert_ptr_nonnull(t.job.cluster);
    t.job.matrix = calloc(all * all, sizeof *t.job.matrix);
    for (size_t i = 0; i < all; i++)
        for (size_t j = 0; j < all; j++)
            if (i / (size_t)each == j / (size_t)each)
                t.job.matrix[i * all + j] = one.matrix[i % (size_t)each * (size_t)each + j % (size_t)each];
    t.job.plans = calloc(all, sizeof *t.job.plans);
    free(seats);
    free_job(&one);
    return t;
}

static struct ry_plan *build(const struct twins *t, int rank, int chunks, struct ry_err *err)
{
    size_t n = (size_t)t->job.n;
    uint64_t *recv = calloc(n, sizeof *recv);
    for (size_t p = 0; p < n; p++)
        recv[p] = t->job.matrix[p * n + (size_t)rank];
    struct ry_plan_input in = {.cluster = t->job.cluster,
                               .rank = rank,
                               .strategy = RY_REPLICA,
                               .send = t->job.matrix + (size_t)rank * n,
                               .recv = recv,
                               .chunks = chunks,
                               .replicas = t->n};
    struct ry_plan *p = ry_plan_build(&in, err);
    free(recv);
    return p;
}

static void build_twins(struct twins *t, int chunks)
{
    struct ry_err err = {""};
    for (int r = 0; r < t->job.n; r++) {
        t->job.plans[r] = build(t, r, chunks, &err);
        ck_assert_msg(t->job.plans[r] != NULL, "%s", err.msg);
    }
}

static int prove(const struct twins *t, struct ry_err *err)
{
    return ry_plan_verify_replicas(t->job.cluster, t->job.matrix, t->n, t->job.plans,
                                   (const uintptr_t *const *)t->job.send_at, (const uintptr_t *const *)t->job.recv_at,
                                   err);
}

static uint64_t crossing(const struct twins *t)
{
    uint64_t bytes = 0;
    for (int r = 0; r < t->job.n; r++)
        for (int i = 0; i < t->job.plans[r]->nsteps; i++) {
            const struct ry_step *s = &t->job.plans[r]->steps[i];
            if (s->kind == RY_STEP_SEND && t->job.cluster->node[s->peer] != t->job.cluster->node[r])
                bytes += s->bytes;
        }
    return bytes;
}

START_TEST(proved)
{
    static const int chunks[] = {1, 2, RY_CHUNKS};
    for (int round = 0; round < ROUNDS_OF(300); round++) {
        struct twins t = make_twins(2 + (int)rnd(7), 1 + (int)rnd(8), rnd(3) ? 5000 : 40);
        struct ry_err err = {""};
        build_twins(&t, chunks[rnd(3)]);
        ck_assert_msg(!prove(&t, &err), "%d twins of %d: %s", t.n, t.each, err.msg);
        uint64_t plain = 0, n = (uint64_t)t.job.n;
        for (uint64_t i = 0; i < n * n; i++)
            plain += t.job.cluster->node[i / n] != t.job.cluster->node[i % n] ? t.job.matrix[i] : 0;
        ck_assert_uint_eq(crossing(&t) * (uint64_t)t.n, plain); /* each byte crosses once, not once for each twin */
        for (int r = 0; r < t.job.n; r++) {
            ck_assert_uint_eq(t.job.plans[r]->stage_bytes, 0);
            ck_assert_int_eq(t.job.plans[r]->ngroups, t.job.plans[0]->ngroups);
            ck_assert_uint_eq(t.job.plans[r]->inside, t.job.plans[0]->inside);
        }
        free_job(&t.job);
    }
}
END_TEST

/* Twins' send buffers hold the same bytes. */
START_TEST(carried_out)
{
    for (int round = 0; round < ROUNDS_OF(100); round++) {
        struct twins t = make_twins(2 + (int)rnd(4), 2 + (int)rnd(4), 300);
        struct memory mem;
        struct ry_err err = {""};
        make_real(&t.job, &mem, (int)rnd(4));
        t.job.twins = t.each;
        build_twins(&t, rnd(2) ? RY_CHUNKS : 1);
        ck_assert_msg(!prove(&t, &err), "by address: %s", err.msg);
        const char *why = interpret(&t.job, &mem);
        ck_assert_msg(!*why, "%s", why);
        free_memory(&t.job, &mem);
        free_job(&t.job);
    }
}
END_TEST

static struct twins fixed(int chunks)
{
    struct twins t = {.n = 2, .each = 2};
    struct ry_seat seats[4] = {0};
    struct ry_err err;
    for (int i = 0; i < 4; i++) {
        seats[i].rank = i;
        snprintf(seats[i].node, sizeof seats[i].node, "node %d", i % 2);
    }
    t.job = (struct job){.n = 4, .chunks = 1};
    t.job.cluster = ry_cluster_build(seats, 4, &err);
    t.job.matrix = calloc(16, sizeof *t.job.matrix);
    t.job.plans = calloc(4, sizeof *t.job.plans);
    for (int i = 0; i < 4; i++)
        for (int j = i / 2 * 2; j < i / 2 * 2 + 2; j++)
            t.job.matrix[i * 4 + j] = 1000;
    build_twins(&t, chunks);
    return t;
}

static struct ry_step *step_of(const struct twins *t, int rank, enum ry_step_kind kind, bool inside)
{
    struct ry_plan *p = t->job.plans[rank];
    for (int i = 0; i < p->nsteps; i++)
        if (p->steps[i].kind == kind && ry_inside(p->inside, p->steps[i].group) == inside && p->steps[i].peer != rank)
            return &p->steps[i];
    ck_abort_msg("no such step");
}

START_TEST(found_wrong)
{
    struct ry_err err = {""};
    for (int chunks = 1; chunks <= 2; chunks++) {
        struct twins t = fixed(chunks);
        ck_assert_int_eq(prove(&t, &err), 0);
        /* not known to be twins, it is wrong */
        ck_assert_int_eq(ry_plan_verify(t.job.cluster, t.job.matrix, t.job.plans, &err), -1);
        ck_assert_ptr_nonnull(strstr(err.msg, "wrong source"));
        struct ry_step *s = step_of(&t, 0, RY_STEP_SEND, true), was = *s;
#define WRONG(text)                                                                                                    \
    do {                                                                                                               \
        ck_assert_int_eq(prove(&t, &err), -1);                                                                         \
        ck_assert_msg(strstr(err.msg, text) != NULL, "'%s', not '%s'", err.msg, text);                                 \
        *s = was;                                                                                                      \
        ck_assert_int_eq(prove(&t, &err), 0);                                                                          \
    } while (0)
        s->from.offset += 16; /* not the share that it received */
        WRONG("");
        s->from = (struct ry_at){RY_AT_RECV, 0, 0}; /* of another rank */
        WRONG("");
        s->from = (struct ry_at){RY_AT_SEND, 1, 0};
        WRONG("wrong source");
        s->peer = 3;
        WRONG("another position");
        s = step_of(&t, 0, RY_STEP_SEND, false), was = *s;
        s->from.offset += 16;
        WRONG("");
        s->peer = 3;
        WRONG("another twin's rank");
        s = step_of(&t, 1, RY_STEP_RECV, true), was = *s;
        s->bytes -= 16;
        WRONG("");
        t.job.matrix[1] = 999;
        ck_assert_int_eq(prove(&t, &err), -1);
        ck_assert_ptr_nonnull(strstr(err.msg, "among twins"));
        free_job(&t.job);
    }
}
END_TEST

START_TEST(refused)
{
    struct twins t = fixed(1);
    struct ry_err err;
    for (t.n = -1; t.n < 6; t.n++) {
        struct ry_plan *p = build(&t, 1, 1, &err);
        ck_assert_int_eq(p != NULL, t.n == 2);
        ry_plan_free(p);
    }
    t.n = 2;
    ck_assert_ptr_null(build(&t, 1, 3, &err));
    t.job.matrix[1 * 4 + 2] = 1;
    ck_assert_ptr_null(build(&t, 1, 1, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "another twin"));
    free_job(&t.job);
}
END_TEST

/* The formula against the steps themselves, in as many chunks as it says. */
START_TEST(estimated)
{
    for (int round = 0; round < ROUNDS_OF(200); round++) {
        struct twins t = make_twins(2 + (int)rnd(7), 2 + (int)rnd(7), rnd(2) ? 100 : 4000000);
        struct ry_cost_model m;
        struct ry_load *loads = calloc((size_t)t.job.n, sizeof *loads);
        uint64_t recv[128];
        int chunks;
        ry_cost_guess(&m, t.job.cluster);
        m.node_comm = true;
        for (int r = 0; r < t.job.n; r++) {
            for (int p = 0; p < t.job.n; p++)
                recv[p] = t.job.matrix[p * t.job.n + r];
            ry_load_of(&loads[r], t.job.cluster, r, t.job.matrix + (size_t)(r * t.job.n), recv, NULL);
        }
        double us = ry_cost_replica(&m, t.job.cluster, t.n, loads, &chunks);
        uint64_t out = 0;
        for (int r = 0; r < t.job.n; r++)
            out += loads[r].cross_out;
        ck_assert_int_eq(out > 0, us < INFINITY);
        if (out) {
            build_twins(&t, chunks);
            double steps = ry_cost_plans(&m, t.job.cluster, t.job.plans);
            ck_assert_msg(us > 0.9 * steps && us < 1.1 * steps, "%.1f us, by its steps %.1f (%d chunks)", us, steps,
                          chunks);
        }
        free(loads);
        free_job(&t.job);
    }
}
END_TEST

START_TEST(pays)
{
    struct twins t = fixed(1);
    struct ry_cost_model m;
    struct ry_load loads[4];
    uint64_t recv[4];
    int chunks;
    ry_cost_guess(&m, t.job.cluster);
    m.link[RY_LINK_NIC].bytes_per_us = m.nic_rank_bytes_per_us = 3000; /* 25 Gbit/s */
    for (int big = 0; big < 2; big++) {
        for (int i = 0; i < 16; i++)
            t.job.matrix[i] = t.job.matrix[i] ? (big ? 64 << 20 : 64) : 0;
        for (int r = 0; r < 4; r++) {
            for (int p = 0; p < 4; p++)
                recv[p] = t.job.matrix[p * 4 + r];
            ry_load_of(&loads[r], t.job.cluster, r, t.job.matrix + r * 4, recv, NULL);
        }
        double replica = ry_cost_replica(&m, t.job.cluster, 2, loads, &chunks),
               direct = ry_cost_estimate(&m, t.job.cluster, loads, NULL, RY_DIRECT);
        ck_assert_int_eq(replica < direct, big);
        ck_assert_int_eq(chunks > 1, big);
    }
    free_job(&t.job);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {proved, carried_out, found_wrong, refused, estimated, pays, NULL};
    return run_tests("plan_replica", tests);
}
