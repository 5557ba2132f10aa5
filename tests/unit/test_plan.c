/* test_plan.c: plans of random jobs, proved by the verifier and carried out on host memory; what plan.h promises
 * besides. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "plan_help.h"

/* What a plan promises beyond being right. */
static void check_promises(const struct job *job)
{
    const struct ry_cluster *c = job->cluster;
    uint64_t *relay = malloc(2 * (size_t)job->n * sizeof *relay), *pack = relay + job->n;
    ck_assert_int_eq(ry_plan_stage_all(c, job->plans[0]->strategy, job->matrix, NULL, relay, pack, NULL), 0);
    for (int r = 0; r < job->n; r++) {
        const struct ry_plan *p = job->plans[r];
        const uint64_t *row = job->matrix + (size_t)r * (size_t)job->n;
        const uintptr_t *at = job->send_at ? job->send_at[r] : NULL;
        uint64_t cross = 0, crossed = 0, most = ry_plan_stage_bytes(c, r, p->strategy, job->matrix, NULL);
        int messages = 0;
        for (int i = 0; i < job->n; i++)
            cross += c->node[i] != c->node[r] ? row[i] : 0;
        for (int i = 0; i < p->nsteps; i++)
            if (p->steps[i].kind == RY_STEP_SEND && c->node[p->steps[i].peer] != c->node[r]) {
                ck_assert_int_eq(p->steps[i].group, 0);
                crossed += p->steps[i].bytes;
                messages++;
            }
        ck_assert_uint_eq(crossed, cross);
        if (p->strategy != RY_DIRECT)
            ck_assert_int_lt(messages, c->nnodes);
        ck_assert_uint_eq(p->stage_bytes, ry_plan_stage_relay(c, r, p->strategy, job->matrix, NULL) +
                                              ry_plan_stage_pack(c, r, p->strategy, row, at, NULL));
        ck_assert_uint_le(p->stage_bytes, most);
        ck_assert_uint_eq(most, relay[r] + pack[r]);
        ck_assert_uint_eq(pack[r], ry_plan_stage_pack(c, r, p->strategy, row, NULL, NULL));
        if (!at)
            ck_assert_uint_eq(p->stage_bytes, most);
        for (int i = 0; i < p->nsteps; i++) {
            const struct ry_step *s = &p->steps[i];
            if (s->kind == RY_STEP_SEND && s->group == 0 && s->from.place == RY_AT_STAGE)
                ck_assert_uint_eq(s->from.offset % 256, 0);
            if (s->kind == RY_STEP_RECV && s->to.place == RY_AT_STAGE)
                ck_assert_uint_eq(s->to.offset % 256, 0);
        }
    }
    free(relay);
}

static void check_job(struct job *job)
{
    for (enum ry_strategy s = 0; s < RY_SUM; s++) {
        struct ry_err err = {""};
        build_all(job, s);
        ck_assert_msg(!verify(job, &err), "%s, %d ranks on %d nodes: %s", ry_strategy_name(s), job->n,
                      job->cluster->nnodes, err.msg);
        if (s != RY_BALANCED) /* its own are in test_plan_balanced.c */
            check_promises(job);
        free_plans(job);
    }
}

START_TEST(random_jobs)
{
    for (int round = 0; round < ROUNDS_OF(400); round++) {
        int n = round % 2 ? 1 + (int)rnd(12) : 1 + (int)rnd(64);
        static const uint64_t most[] = {1, 7, 4099, UINT64_C(1) << 33, (UINT64_C(1) << 40) + 3};
        struct job job = random_job(n, most[rnd(5)], rnd(3) == 0);
        check_job(&job);
        free_job(&job);
    }
}
END_TEST

START_TEST(large_jobs)
{
    static const struct {
        int n, nodes;
        int (*node)(int, int, int);
        int sparse; /* one cell in so many */
    } jobs[] = {{256, 32, blocks, 1},   {256, 19, anywhere, 1},   {1024, 128, blocks, 16},
                {1024, 128, dealt, 32}, {4096, 512, blocks, 512}, {2048, 300, uneven, 256}};
    for (size_t k = 0; k < sizeof jobs / sizeof *jobs; k++) {
        int n = jobs[k].n;
        if (ROUNDS_OF(6) < 6 && n > 2048)
            continue; /* the largest is half of this program's time under a sanitizer */
        struct job job = {.n = n, .cluster = cluster_of(n, jobs[k].node, jobs[k].nodes)};
        job.matrix = calloc((size_t)n * (size_t)n, sizeof *job.matrix);
        for (size_t i = 0; i < (size_t)n * (size_t)n; i++)
            job.matrix[i] = rnd((uint64_t)jobs[k].sparse) == 0 ? 1 + rnd(100000) : 0;
        double begin = seconds();
        build_all(&job, RY_HIERARCHICAL);
        double built = seconds();
        struct ry_err err = {""};
        ck_assert_msg(!verify(&job, &err), "%s", err.msg);
        printf("%4d ranks, %3d nodes, 1 cell in %4d: built in %.2f s, verified in %.2f s\n", n, job.cluster->nnodes,
               jobs[k].sparse, built - begin, seconds() - built);
        free_job(&job);
    }
}
END_TEST

static int by_time(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* Of building one plan at 128 x 8 with no empty cell, addresses unknown: the most steps. */
START_TEST(build_time)
{
    enum { ROUNDS = 41 };
    struct job job = {.n = 1024, .cluster = cluster_of(1024, blocks, 128)};
    job.matrix = malloc(1024 * 1024 * sizeof *job.matrix);
    for (size_t i = 0; i < 1024 * 1024; i++)
        job.matrix[i] = 1 + rnd(1000000);
    for (enum ry_strategy s = 0; s < RY_SUM; s++) {
        double us[ROUNDS], stage = 0;
        int steps = 0, r = 77;
        uint64_t column[1024];
        struct ry_slice slice;
        for (int i = 0; i < 1024; i++)
            column[i] = job.matrix[i * 1024 + r];
        ck_assert_int_eq(ry_slice_init(&slice, job.cluster, r, s, NULL), 0);
        ry_slice_fill(&slice, job.cluster, job.matrix, NULL);
        struct ry_plan_input in = {.cluster = job.cluster,
                                   .rank = r,
                                   .strategy = s,
                                   .send = job.matrix + 1024 * r,
                                   .recv = column,
                                   .slice = &slice};
        for (int i = 0; i < ROUNDS; i++) {
            double begin = seconds();
            struct ry_plan *plan = ry_plan_build(&in, NULL);
            us[i] = (seconds() - begin) * 1e6;
            steps = plan->nsteps;
            ry_plan_free(plan);
        }
        double begin = seconds();
        uint64_t relay[1024], pack[1024], sum = 0;
        ck_assert_int_eq(ry_plan_stage_all(job.cluster, s, job.matrix, NULL, relay, pack, NULL), 0);
        for (int i = 0; i < 1024; i++)
            sum += relay[i] + pack[i];
        stage = (seconds() - begin) * 1e6;
        qsort(us, ROUNDS, sizeof *us, by_time);
        printf("%s at 128 x 8: %d steps built in %.0f us (median; slowest %.0f); staging of all ranks (%.1f GB) in "
               "%.0f us\n",
               ry_strategy_name(s), steps, us[ROUNDS / 2], us[ROUNDS - 1], (double)sum / 1e9, stage);
        builds_within(&in, us[0], s == RY_BALANCED ? 10000 : 1000);
        ry_slice_free(&slice);
    }
    free_job(&job);
}
END_TEST

START_TEST(real_memory)
{
    for (int round = 0; round < ROUNDS_OF(120); round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(1 + (int)rnd(16), 1 + rnd(rnd(2) ? 9 : 700), true);
        make_real(&job, &mem, (int)rnd(4));
        for (enum ry_strategy s = 0; s < RY_SUM; s++) {
            build_all(&job, s);
            ck_assert_msg(!verify(&job, &err), "%s", err.msg);
            const char *why = interpret(&job, &mem);
            ck_assert_msg(!*why, "%s, %d ranks: %s", ry_strategy_name(s), job.n, why);
            free_plans(&job);
        }
        free_memory(&job, &mem);
        free_job(&job);
    }
}
END_TEST

START_TEST(names)
{
    struct ry_err err = {""};
    enum ry_strategy s = RY_STRATEGIES;
    for (enum ry_strategy k = 0; k < RY_SUM; k++) {
        ck_assert_int_eq(ry_strategy_parse(ry_strategy_name(k), &s, &err), 0);
        ck_assert_int_eq(s, k);
    }
    ck_assert_int_eq(ry_strategy_parse("sum", &s, &err), -1);
    ck_assert_str_eq(ry_strategy_name(RY_SUM), "sum");
    ck_assert_int_eq(ry_strategy_parse("diagonal", &s, &err), -1);
    ck_assert_str_eq(err.msg, "unknown strategy 'diagonal': there are direct, hierarchical, balanced, dedup");
}
END_TEST

START_TEST(relays)
{
    for (int round = 0; round < 100; round++) {
        struct ry_cluster *c = random_cluster(1 + (int)rnd(40));
        for (int from = 0; from < c->nranks; from++)
            for (int node = 0; node < c->nnodes; node++) {
                int relay = ry_relay(c, from, node);
                ck_assert_int_eq(c->node[relay], node);
                ck_assert_int_eq(c->local[relay], c->local[from] % c->node_size[node]);
            }
        ry_cluster_free(c);
    }
}
END_TEST

START_TEST(contradictions)
{
    /* ranks 0 and 1 on node 0, 2 and 3 on node 1 */
    struct ry_cluster *c = cluster_of(4, blocks, 2);
    uint64_t m[16], send[4], recv[4];
    struct ry_slice slice;
    struct ry_err err = {""};
    for (int i = 0; i < 16; i++)
        m[i] = 10 + (uint64_t)i;
    for (int p = 0; p < 4; p++) {
        send[p] = m[4 + p];
        recv[p] = m[p * 4 + 1];
    }
    ck_assert_int_eq(ry_slice_init(&slice, c, 1, RY_HIERARCHICAL, &err), 0);
    ry_slice_fill(&slice, c, m, NULL);
    ck_assert_int_eq(slice.nrows, 1);
    ck_assert_int_eq(slice.ncols, 2);
    ck_assert_int_eq(slice.rows[0], 3);
    ck_assert_int_eq(slice.cols[1], 1);
    ck_assert_uint_eq(slice.cells[0], m[12]);
    struct ry_plan_input in = {
        .cluster = c, .rank = 1, .strategy = RY_HIERARCHICAL, .send = send, .recv = recv, .slice = &slice};
    struct ry_plan *p = ry_plan_build(&in, &err);
    ck_assert_ptr_nonnull(p);
    ry_plan_free(p);
#define REFUSED(text)                                                                                                  \
    do {                                                                                                               \
        ck_assert_ptr_null(ry_plan_build(&in, &err));                                                                  \
        ck_assert_msg(strstr(err.msg, text) != NULL, "%s", err.msg);                                                   \
    } while (0)
    send[1]++;
    REFUSED("plan of rank 1: it sends itself 16 bytes, but receives 15");
    send[1]--;
    slice.cells[1]++;
    REFUSED("says that rank 3 sends it 24 bytes, but it receives 23");
    slice.cells[1]--;
    slice.cells[0] = UINT64_MAX;
    REFUSED("more than 64 bits");
    slice.cells[0] = UINT64_MAX - 40; /* the sum fits, but no staging memory of that size begins anywhere */
    REFUSED("staging memory adds up");
    slice.cells[0] = m[12];
    slice.rows[0] = 2;
    REFUSED("lacks the row of rank 3");
    slice.rows[0] = 3;
    slice.cols[0] = 2;
    REFUSED("lacks the column of rank 0");
    slice.cols[0] = 0;
    slice.ncols = 1;
    REFUSED("lacks the column of rank 1");
    slice.ncols = 2;
    in.slice = NULL;
    REFUSED("needs cells");
    in.strategy = RY_DIRECT;
    p = ry_plan_build(&in, &err);
    ck_assert_ptr_nonnull(p);
    ry_plan_free(p);
    send[0] = UINT64_MAX;
    REFUSED("more than 64 bits");
    in.rank = 4;
    REFUSED("no rank 4");
    in.rank = 0;
    in.strategy = (enum ry_strategy)9;
    REFUSED("no strategy 9");
    ry_slice_free(&slice);
    ry_cluster_free(c);
}
END_TEST

/* Neighbours in memory are sent from where they lie; a relay that gets everything receives it in place. */
START_TEST(zero_copy)
{
    struct job job = {.n = 4, .cluster = cluster_of(4, blocks, 2), .matrix = calloc(16, sizeof *job.matrix)};
    uintptr_t at[4] = {1000, 1005, 1010, 1015}, apart[4] = {1000, 1005, 1010, 1016}, *all[4] = {at, at, at, at};
    for (int i = 0; i < 16; i++)
        job.matrix[i] = 5;
    job.send_at = all;
    build_all(&job, RY_HIERARCHICAL);
    struct ry_plan *p = job.plans[0];
    ck_assert_int_eq(p->steps[0].kind, RY_STEP_SEND); /* no copies */
    ck_assert_int_eq(p->steps[0].peer, 2);
    ck_assert_int_eq(p->steps[0].from.place, RY_AT_SEND);
    ck_assert_int_eq(p->steps[0].from.peer, 2);
    ck_assert_uint_eq(p->steps[0].bytes, 10);
    ck_assert_uint_eq(p->stage_bytes, 256);
    free_plans(&job);
    all[0] = apart;
    job.matrix[2 * 4 + 1] = 0; /* rank 2 has nothing for rank 1 */
    build_all(&job, RY_HIERARCHICAL);
    p = job.plans[0];
    ck_assert_int_eq(p->steps[0].kind, RY_STEP_COPY);
    ck_assert_int_eq(p->steps[1].kind, RY_STEP_COPY);
    ck_assert_uint_eq(p->stage_bytes, 256);
    bool straight = false;
    for (int i = 0; i < p->nsteps; i++)
        straight |= p->steps[i].kind == RY_STEP_RECV && p->steps[i].peer == 2 && p->steps[i].to.place == RY_AT_RECV;
    ck_assert(straight);
    free_plans(&job);
    job.send_at = NULL;
    free_job(&job);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {names,       relays,     contradictions, zero_copy, random_jobs,
                                  real_memory, large_jobs, build_time,     NULL};
    return run_tests("plan", tests);
}
