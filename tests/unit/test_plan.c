/*
 * test_plan.c: plans of random jobs, proved by the verifier and carried out on host memory by an interpreter of its
 * own; the verifier on plans that were broken on purpose.
 */
#include <check.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cluster.h"
#include "plan/plan.h"
#include "plan/verify.h"

static unsigned seed;

/* ---- random jobs ---- */

static uint64_t state;
static uint64_t rnd(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state * UINT64_C(0x2545F4914F6CDD1D) >> 20) % below;
}

struct job {
    int n;
    struct ry_cluster *cluster;
    uint64_t *matrix;
    uintptr_t **send_at, **recv_at; /* NULL: apart */
    struct ry_plan **plans;
};

static struct ry_cluster *cluster_of(int n, int (*node)(int rank, int n, int nodes), int nodes)
{
    struct ry_err err = {""};
    struct ry_seat *s = calloc((size_t)n, sizeof *s);
    for (int r = 0; r < n; r++) {
        s[r].rank = r;
        snprintf(s[r].node, sizeof s[r].node, "n%d", node(r, n, nodes));
    }
    struct ry_cluster *c = ry_cluster_build(s, n, &err);
    ck_assert_msg(c != NULL, "%s", err.msg);
    free(s);
    return c;
}

static int blocks(int r, int n, int nodes)
{
    return (int)((long)r * nodes / n);
}
static int dealt(int r, int n, int nodes)
{
    return r % nodes;
}
static int anywhere(int r, int n, int nodes)
{
    return (int)rnd((uint64_t)nodes);
}
static int uneven(int r, int n, int nodes) /* node 0 has half of the ranks, node 1 a quarter, … */
{
    int node = 0;
    for (int left = n, begin = 0; node < nodes - 1 && r >= begin + (left + 1) / 2; node++) {
        begin += (left + 1) / 2;
        left -= (left + 1) / 2;
    }
    return node;
}

static struct ry_cluster *random_cluster(int n)
{
    static int (*const how[])(int, int, int) = {blocks, dealt, anywhere, uneven};
    int nodes = rnd(8) == 0 ? 1 : rnd(8) == 0 ? n : 1 + (int)rnd((uint64_t)n);
    return cluster_of(n, how[rnd(4)], nodes);
}

static uint64_t *random_matrix(int n, uint64_t most)
{
    uint64_t *m = calloc((size_t)n * (size_t)n, sizeof *m);
    int how = (int)rnd(7), special = (int)rnd((uint64_t)n), zero_row = (int)rnd((uint64_t)n),
        zero_col = (int)rnd((uint64_t)n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            uint64_t *cell = &m[(size_t)i * (size_t)n + (size_t)j], any = 1 + rnd(most);
            switch (how) {
            case 0: /* uniform */
                *cell = most;
                break;
            case 1: /* all to one */
                *cell = j == special ? any : 0;
                break;
            case 2: /* one to all */
                *cell = i == special ? any : 0;
                break;
            case 3: /* sparse */
                *cell = rnd(8) == 0 ? any : 0;
                break;
            case 4: /* empty rows and columns */
                *cell = i == zero_row || j == zero_col ? 0 : any;
                break;
            case 5: /* skewed */
                *cell = 1 + any / (1 + (uint64_t)((i + j) % n) * (uint64_t)(1 + (i + j) % n));
                break;
            default:
                *cell = any;
            }
        }
    return m;
}

/* Lay the segments `bytes` (stride apart in the matrix) out in memory from `base` on. Returns how much that takes. */
static uint64_t lay_out(uintptr_t *at, int n, const uint64_t *bytes, int stride, uintptr_t base,
                        const struct ry_cluster *c, int how)
{
    uintptr_t end = base;
    int *order = malloc((size_t)n * sizeof *order), k = 0;
    for (int node = 0; node < c->nnodes; node++)
        for (int r = 0; r < n; r++)
            if (how == 1 && c->node[r] == node)
                order[k++] = r; /* by node: the neighbours that hierarchical hopes for, however the ranks are dealt */
    for (int r = 0; how != 1 && r < n; r++)
        order[r] = r;
    for (int i = n - 1; how == 2 && i > 0; i--) { /* in any order */
        int j = (int)rnd((uint64_t)i + 1), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (int i = 0; i < n; i++) {
        if (how == 3 && rnd(3) == 0) /* gaps here and there */
            end += 1 + rnd(64);
        at[order[i]] = end;
        end += bytes[(size_t)order[i] * (size_t)stride];
    }
    free(order);
    return end - base;
}

static struct ry_plan *build_one(const struct job *job, int r, enum ry_strategy strategy, struct ry_err *err)
{
    int n = job->n;
    struct ry_slice slice;
    uint64_t *column = malloc((size_t)n * sizeof *column);
    for (int i = 0; i < n; i++)
        column[i] = job->matrix[(size_t)i * (size_t)n + (size_t)r];
    ck_assert_int_eq(ry_slice_init(&slice, job->cluster, r, strategy, err), 0);
    ry_slice_fill(&slice, job->matrix, n);
    struct ry_plan_input in = {job->cluster,
                               r,
                               strategy,
                               job->matrix + (size_t)r * (size_t)n,
                               column,
                               &slice,
                               job->send_at ? job->send_at[r] : NULL,
                               job->recv_at ? job->recv_at[r] : NULL};
    struct ry_plan *plan = ry_plan_build(&in, err);
    ry_slice_free(&slice);
    free(column);
    return plan;
}

static void build_all(struct job *job, enum ry_strategy strategy)
{
    struct ry_err err = {""};
    job->plans = calloc((size_t)job->n, sizeof(struct ry_plan *));
    for (int r = 0; r < job->n; r++) {
        job->plans[r] = build_one(job, r, strategy, &err);
        ck_assert_msg(job->plans[r] != NULL, "%s", err.msg);
    }
}

static int verify(const struct job *job, struct ry_err *err)
{
    return ry_plan_verify_at(job->cluster, job->matrix, job->plans, (const uintptr_t *const *)job->send_at,
                             (const uintptr_t *const *)job->recv_at, err);
}

static void free_plans(struct job *job)
{
    for (int r = 0; job->plans && r < job->n; r++)
        ry_plan_free(job->plans[r]);
    free(job->plans);
    job->plans = NULL;
}

static void free_job(struct job *job)
{
    free_plans(job);
    for (int r = 0; r < job->n; r++) {
        if (job->send_at)
            free(job->send_at[r]);
        if (job->recv_at)
            free(job->recv_at[r]);
    }
    free(job->send_at);
    free(job->recv_at);
    free(job->matrix);
    ry_cluster_free(job->cluster);
}

/* With addresses unless `apart`; the memory they speak of does not exist. */
static struct job random_job(int n, uint64_t most, bool apart)
{
    struct job job = {.n = n, .cluster = random_cluster(n), .matrix = random_matrix(n, most)};
    if (apart)
        return job;
    int how = (int)rnd(4);
    job.send_at = calloc((size_t)n, sizeof *job.send_at);
    job.recv_at = calloc((size_t)n, sizeof *job.recv_at);
    for (int r = 0; r < n; r++) {
        job.send_at[r] = malloc((size_t)n * sizeof **job.send_at);
        job.recv_at[r] = malloc((size_t)n * sizeof **job.recv_at);
        lay_out(job.send_at[r], n, job.matrix + (size_t)r * (size_t)n, 1, 0x1000, job.cluster, how);
        lay_out(job.recv_at[r], n, job.matrix + r, n, (uintptr_t)1 << 62, job.cluster, (int)rnd(4));
    }
    return job;
}

/* What a plan promises beyond being right. */
static void check_promises(const struct job *job)
{
    const struct ry_cluster *c = job->cluster;
    uint64_t *relay = malloc(2 * (size_t)job->n * sizeof *relay), *pack = relay + job->n;
    ck_assert_int_eq(ry_plan_stage_all(c, job->plans[0]->strategy, job->matrix, relay, pack, NULL), 0);
    for (int r = 0; r < job->n; r++) {
        const struct ry_plan *p = job->plans[r];
        const uint64_t *row = job->matrix + (size_t)r * (size_t)job->n;
        const uintptr_t *at = job->send_at ? job->send_at[r] : NULL;
        uint64_t cross = 0, crossed = 0, most = ry_plan_stage_bytes(c, r, p->strategy, job->matrix);
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
        if (p->strategy == RY_HIERARCHICAL)
            ck_assert_int_lt(messages, c->nnodes);
        ck_assert_uint_eq(p->stage_bytes, ry_plan_stage_relay(c, r, p->strategy, job->matrix) +
                                              ry_plan_stage_pack(c, r, p->strategy, row, at));
        ck_assert_uint_le(p->stage_bytes, most);
        ck_assert_uint_eq(most, relay[r] + pack[r]);
        ck_assert_uint_eq(pack[r], ry_plan_stage_pack(c, r, p->strategy, row, NULL));
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
    for (enum ry_strategy s = 0; s < RY_STRATEGIES; s++) {
        struct ry_err err = {""};
        build_all(job, s);
        ck_assert_msg(!verify(job, &err), "%s, %d ranks on %d nodes: %s", ry_strategy_name(s), job->n,
                      job->cluster->nnodes, err.msg);
        check_promises(job);
        free_plans(job);
    }
}

START_TEST(random_jobs)
{
    for (int round = 0; round < 400; round++) {
        int n = round < 200 ? 1 + (int)rnd(12) : 1 + (int)rnd(64);
        static const uint64_t most[] = {1, 7, 4099, UINT64_C(1) << 33, (UINT64_C(1) << 40) + 3};
        struct job job = random_job(n, most[rnd(5)], rnd(3) == 0);
        check_job(&job);
        free_job(&job);
    }
}
END_TEST

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

START_TEST(large_jobs)
{
    static const struct {
        int n, nodes;
        int (*node)(int, int, int);
        int sparse; /* one cell in so many */
    } jobs[] = {{256, 32, blocks, 1},   {256, 19, anywhere, 1},   {1024, 128, blocks, 16},
                {1024, 128, dealt, 32}, {4096, 512, blocks, 512}, {4096, 300, uneven, 2048}};
    for (size_t k = 0; k < sizeof jobs / sizeof *jobs; k++) {
        int n = jobs[k].n;
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
    for (enum ry_strategy s = 0; s < RY_STRATEGIES; s++) {
        double us[ROUNDS], stage = 0;
        int steps = 0, r = 77;
        uint64_t column[1024];
        struct ry_slice slice;
        for (int i = 0; i < 1024; i++)
            column[i] = job.matrix[i * 1024 + r];
        ck_assert_int_eq(ry_slice_init(&slice, job.cluster, r, s, NULL), 0);
        ry_slice_fill(&slice, job.matrix, 1024);
        struct ry_plan_input in = {job.cluster, r, s, job.matrix + 1024 * r, column, &slice, NULL, NULL};
        for (int i = 0; i < ROUNDS; i++) {
            double begin = seconds();
            struct ry_plan *plan = ry_plan_build(&in, NULL);
            us[i] = (seconds() - begin) * 1e6;
            steps = plan->nsteps;
            ry_plan_free(plan);
        }
        double begin = seconds();
        uint64_t relay[1024], pack[1024], sum = 0;
        ck_assert_int_eq(ry_plan_stage_all(job.cluster, s, job.matrix, relay, pack, NULL), 0);
        for (int i = 0; i < 1024; i++)
            sum += relay[i] + pack[i];
        stage = (seconds() - begin) * 1e6;
        qsort(us, ROUNDS, sizeof *us, by_time);
        printf("%s at 128 x 8: %d steps built in %.0f us (median; slowest %.0f); staging of all ranks (%.1f GB) in "
               "%.0f us\n",
               ry_strategy_name(s), steps, us[ROUNDS / 2], us[ROUNDS - 1], (double)sum / 1e9, stage);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
        ck_assert_msg(us[ROUNDS / 2] < 1000, "%.0f us", us[ROUNDS / 2]);
#endif
        ry_slice_free(&slice);
    }
    free_job(&job);
}
END_TEST

/* ---- carrying plans out, on real memory and without a thought for proofs ---- */

static unsigned char content(int from, int to, uint64_t offset)
{
    uint64_t x = ((uint64_t)from * 131 + (uint64_t)to) * 1000003 + offset;
    x = (x ^ x >> 15) * UINT64_C(0x9E3779B97F4A7C15);
    return (unsigned char)(x >> 40);
}

/* The machine of `job`: its addresses are made real, and plans built by them. */
struct memory {
    unsigned char **send, **recv, **stage; /* one block per rank */
};

static void make_real(struct job *job, struct memory *mem, int how)
{
    size_t n = (size_t)job->n;
    job->send_at = calloc(n, sizeof *job->send_at);
    job->recv_at = calloc(n, sizeof *job->recv_at);
    mem->send = calloc(n, sizeof *mem->send);
    mem->recv = calloc(n, sizeof *mem->recv);
    mem->stage = calloc(n, sizeof *mem->stage);
    for (int r = 0; r < job->n; r++) {
        job->send_at[r] = malloc(n * sizeof **job->send_at);
        job->recv_at[r] = malloc(n * sizeof **job->recv_at);
        uint64_t out = lay_out(job->send_at[r], job->n, job->matrix + (size_t)r * n, 1, 0, job->cluster, how);
        uint64_t in = lay_out(job->recv_at[r], job->n, job->matrix + r, job->n, 0, job->cluster, (int)rnd(4));
        mem->send[r] = malloc(out + 1);
        mem->recv[r] = malloc(in + 1);
        for (int p = 0; p < job->n; p++) {
            job->send_at[r][p] += (uintptr_t)mem->send[r];
            job->recv_at[r][p] += (uintptr_t)mem->recv[r];
        }
    }
}

static unsigned char *place(const struct job *job, const struct memory *mem, int rank, struct ry_at at)
{
    return at.place == RY_AT_STAGE  ? mem->stage[rank] + at.offset
           : at.place == RY_AT_SEND ? (unsigned char *)job->send_at[rank][at.peer] + at.offset
                                    : (unsigned char *)job->recv_at[rank][at.peer] + at.offset;
}

static int group_end(const struct ry_plan *p, int begin)
{
    int end = begin;
    while (end < p->nsteps && p->steps[end].kind != RY_STEP_COPY && p->steps[end].group == p->steps[begin].group)
        end++;
    return end;
}

/* "" or what went wrong. Ranks take turns at random; in a group, each turn does one transfer, in random order between
 * pairs. */
static const char *interpret(const struct job *job, const struct memory *mem)
{
    static char why[200];
    int n = job->n, *at = calloc((size_t)n, sizeof *at), idle = 0;
    bool **done = calloc((size_t)n, sizeof *done);
    why[0] = 0;
    for (int r = 0; r < n; r++) {
        done[r] = calloc((size_t)job->plans[r]->nsteps + 1, sizeof **done);
        mem->stage[r] = malloc(job->plans[r]->stage_bytes + 1);
        memset(mem->stage[r], 0xEE, job->plans[r]->stage_bytes + 1);
        for (int p = 0; p < n; p++) {
            for (uint64_t k = 0, b = job->matrix[r * n + p]; k < b; k++)
                ((unsigned char *)job->send_at[r][p])[k] = content(r, p, k);
            memset((unsigned char *)job->recv_at[r][p], 0x55, job->matrix[p * n + r]);
        }
    }
    while (idle < 200 * n) { /* that many turns in a row without progress: stuck, or through */
        int r = (int)rnd((uint64_t)n);
        const struct ry_plan *p = job->plans[r];
        idle++;
        if (at[r] == p->nsteps)
            continue;
        const struct ry_step *s = &p->steps[at[r]];
        if (s->kind == RY_STEP_COPY) {
            memcpy(place(job, mem, r, s->to), place(job, mem, r, s->from), s->bytes);
            at[r]++;
            idle = 0;
            continue;
        }
        int end = group_end(p, at[r]), left = 0, start = (int)rnd((uint64_t)(end - at[r]));
        for (int k = 0; k < end - at[r]; k++) {
            int i = at[r] + (start + k) % (end - at[r]), q = p->steps[i].peer;
            const struct ry_plan *pq = job->plans[q];
            for (int j = at[r]; j < i; j++) /* only the first open one of its pair and direction */
                if (!done[r][j] && p->steps[j].peer == q && p->steps[j].kind == p->steps[i].kind)
                    i = j;
            if (done[r][i] || at[q] == pq->nsteps || pq->steps[at[q]].kind == RY_STEP_COPY)
                continue;
            for (int j = at[q], e = group_end(pq, at[q]); j < e; j++) {
                const struct ry_step *mine = &p->steps[i], *its = &pq->steps[j];
                if (done[q][j] || its->peer != r || its->kind == mine->kind)
                    continue;
                const struct ry_step *out = mine->kind == RY_STEP_SEND ? mine : its, *in = out == mine ? its : mine;
                memcpy(place(job, mem, in == mine ? r : q, in->to), place(job, mem, out == mine ? r : q, out->from),
                       in->bytes);
                done[r][i] = done[q][j] = true;
                idle = 0;
                k = end; /* one a turn */
                break;
            }
        }
        for (int k = at[r]; k < end; k++)
            left += !done[r][k];
        if (!left) {
            at[r] = end;
            idle = 0;
        }
    }
    for (int r = 0; r < n; r++) {
        if (at[r] < job->plans[r]->nsteps)
            snprintf(why, sizeof why, "rank %d is stuck at step %d", r, at[r]);
        for (int p = 0; p < n && !why[0]; p++)
            for (uint64_t k = 0; k < job->matrix[p * n + r]; k++)
                if (((unsigned char *)job->recv_at[r][p])[k] != content(p, r, k)) {
                    snprintf(why, sizeof why, "rank %d: byte %llu from rank %d is wrong", r, (unsigned long long)k, p);
                    break;
                }
        free(done[r]);
        free(mem->stage[r]);
    }
    free(done);
    free(at);
    return why;
}

static void free_memory(struct job *job, struct memory *mem)
{
    for (int r = 0; r < job->n; r++) {
        free(mem->send[r]);
        free(mem->recv[r]);
    }
    free(mem->send);
    free(mem->recv);
    free(mem->stage);
}

START_TEST(real_memory)
{
    for (int round = 0; round < 120; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(1 + (int)rnd(16), 1 + rnd(rnd(2) ? 9 : 700), true);
        make_real(&job, &mem, (int)rnd(4));
        for (enum ry_strategy s = 0; s < RY_STRATEGIES; s++) {
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

/* ---- the verifier on plans that are wrong ---- */

static void insert(struct ry_plan **pp, int at, struct ry_step step)
{
    struct ry_plan *p = realloc(*pp, sizeof *p + ((size_t)(*pp)->nsteps + 1) * sizeof step);
    p->steps = (struct ry_step *)(p + 1);
    memmove(p->steps + at + 1, p->steps + at, (size_t)(p->nsteps - at) * sizeof step);
    p->steps[at] = step;
    p->nsteps++;
    *pp = p;
}

static void drop(struct ry_plan *p, int at)
{
    memmove(p->steps + at, p->steps + at + 1, (size_t)(p->nsteps - at - 1) * sizeof *p->steps);
    p->nsteps--;
}

/* Where the partner of `rank`'s transfer `i` is: the same in number of those between the two. */
static struct ry_step *partner(struct job *job, int rank, int i, int *index)
{
    const struct ry_step *s = &job->plans[rank]->steps[i];
    struct ry_plan *q = job->plans[s->peer];
    int nth = 0;
    for (int k = 0; k < i; k++)
        nth += job->plans[rank]->steps[k].kind == s->kind && job->plans[rank]->steps[k].peer == s->peer;
    for (int k = 0; k < q->nsteps; k++)
        if (q->steps[k].kind != RY_STEP_COPY && q->steps[k].kind != s->kind && q->steps[k].peer == rank && !nth--) {
            *index = k;
            return &q->steps[k];
        }
    ck_abort_msg("no partner");
    return NULL;
}

/* Group 1 comes first and is called 0. */
static void swap_groups(struct ry_plan *p)
{
    struct ry_step *old = malloc((size_t)p->nsteps * sizeof *old);
    int n = 0;
    memcpy(old, p->steps, (size_t)p->nsteps * sizeof *old);
    for (int group = -1; group < 2; group++)
        for (int i = 0; i < p->nsteps; i++)
            if (old[i].group == (group < 0 ? -1 : 1 - group)) {
                p->steps[n] = old[i];
                p->steps[n++].group = group;
            }
    free(old);
}

enum {
    DROP,
    DROP_BOTH,
    DUPLICATE,
    DUPLICATE_BOTH,
    SHORTER,
    SHORTER_BOTH,
    LONGER,
    ZERO,
    PEER,
    FROM_OFFSET,
    TO_OFFSET,
    FROM_SEGMENT,
    TO_SEGMENT,
    SWAP_IN_PAIR,
    COPY_LATE,
    SWAP_GROUPS,
    ONE_GROUP,
    NO_GROUP,
    NGROUPS,
    STAGE_BYTES,
    KIND,
    MUTATIONS
};

/* Break step `i` of `rank` in way `how`; false where that cannot be done, or need not make the plan wrong. */
static bool mutate(struct job *job, int rank, int i, int how)
{
    struct ry_plan *p = job->plans[rank];
    struct ry_step *s = &p->steps[i], copy = *s;
    bool transfer = s->kind != RY_STEP_COPY;
    int other = (rank + 1 + (int)rnd((uint64_t)(job->n - 1))) % job->n, j;
    switch (how) {
    case DROP:
        drop(p, i);
        return true;
    case DROP_BOTH:
        if (!transfer || s->peer == rank)
            return false;
        partner(job, rank, i, &j);
        drop(job->plans[s->peer], j);
        drop(p, i);
        return true;
    case DUPLICATE: /* a copy once more is the same copy */
        if (transfer)
            insert(&job->plans[rank], i, copy);
        return transfer;
    case DUPLICATE_BOTH:
        if (!transfer || s->peer == rank)
            return false;
        copy = *partner(job, rank, i, &j);
        insert(&job->plans[s->peer], j, copy);
        insert(&job->plans[rank], i, *s);
        return true;
    case SHORTER:
        s->bytes--;
        return true;
    case SHORTER_BOTH:
        if (!transfer)
            return false;
        partner(job, rank, i, &j)->bytes--;
        s->bytes--;
        return true;
    case LONGER:
        s->bytes++;
        return transfer;
    case ZERO:
        s->bytes = 0;
        return true;
    case PEER:
        s->peer = transfer && s->peer == other ? rank : other;
        return true;
    case FROM_OFFSET:
        s->from.offset++;
        return s->kind != RY_STEP_RECV;
    case TO_OFFSET:
        s->to.offset++;
        return transfer && s->kind != RY_STEP_SEND;
    case FROM_SEGMENT:
        s->from.peer = s->from.peer == other ? rank : other;
        return s->kind != RY_STEP_RECV;
    case TO_SEGMENT:
        s->to.peer = s->to.peer == other ? rank : other;
        return s->kind != RY_STEP_SEND;
    case SWAP_IN_PAIR:
        for (j = i + 1; transfer && j < p->nsteps; j++)
            if (p->steps[j].kind == s->kind && p->steps[j].peer == s->peer && p->steps[j].group == s->group) {
                *s = p->steps[j];
                p->steps[j] = copy;
                return true;
            }
        return false;
    case COPY_LATE:
        if (transfer)
            return false;
        drop(p, i);
        insert(&job->plans[rank], p->nsteps, copy);
        return true;
    case SWAP_GROUPS: /* of a relay: it passes on before anything came */
        if (!transfer || s->group != 1 || s->from.place != RY_AT_STAGE || s->kind != RY_STEP_SEND)
            return false;
        swap_groups(p);
        return true;
    case ONE_GROUP: /* a relay passes on while it receives */
        if (s->group != 1 || s->kind != RY_STEP_SEND || s->from.place != RY_AT_STAGE)
            return false;
        for (j = 0; j < p->nsteps; j++)
            p->steps[j].group = p->steps[j].group < 0 ? -1 : 0;
        return true;
    case NO_GROUP:
        s->group = p->ngroups;
        return true;
    case NGROUPS:
        p->ngroups++;
        return true;
    case STAGE_BYTES:
        if (!p->stage_bytes)
            return false;
        p->stage_bytes -= 256; /* into the last message */
        return true;
    case KIND:
        s->kind = s->kind == RY_STEP_SEND ? RY_STEP_RECV : RY_STEP_SEND;
        return true;
    }
    return false;
}

static const char *const mutation_names[MUTATIONS] = {
    "drop",      "drop both",   "duplicate",   "duplicate both", "shorter",      "shorter both", "longer",
    "zero",      "peer",        "from offset", "to offset",      "from segment", "to segment",   "swap in pair",
    "copy late", "swap groups", "one group",   "no group",       "ngroups",      "stage bytes",  "kind"};

/* Every way to break a plan, often; each must be found. */
START_TEST(mutations)
{
    int tried[MUTATIONS] = {0};
    for (int round = 0; round < 6000; round++) {
        struct ry_err err = {""};
        struct job job = random_job(2 + (int)rnd(11), 1 + rnd(600), rnd(2));
        int rank = (int)rnd((uint64_t)job.n), how = round % MUTATIONS;
        build_all(&job, rnd(4) ? RY_HIERARCHICAL : RY_DIRECT);
        if (job.plans[rank]->nsteps) {
            int i = how == COPY_LATE ? 0 : (int)rnd((uint64_t)job.plans[rank]->nsteps); /* copies come first */
            if (mutate(&job, rank, i, how)) {
                tried[how]++;
                ck_assert_msg(verify(&job, &err), "round %d: rank %d, step %d broken by '%s': not found", round, rank,
                              i, mutation_names[how]);
                ck_assert_msg(strstr(err.msg, "rank ") != NULL, "names no rank: %s", err.msg);
            }
        }
        free_job(&job);
    }
    for (int how = 0; how < MUTATIONS; how++)
        ck_assert_msg(tried[how] >= 5, "'%s' was tried %d times only", mutation_names[how], tried[how]);
}
END_TEST

/* Whatever was changed: what the verifier accepts gives the right bytes. */
START_TEST(accepted_is_right)
{
    int accepted = 0, refused = 0;
    for (int round = 0; round < 3000; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(2 + (int)rnd(7), 1 + rnd(60), true);
        make_real(&job, &mem, (int)rnd(4));
        build_all(&job, RY_HIERARCHICAL);
        for (int k = 1 + (int)rnd(2); k; k--) {
            int rank = (int)rnd((uint64_t)job.n), n = job.plans[rank]->nsteps;
            struct ry_step *steps = job.plans[rank]->steps;
            if (!n)
                continue;
            int i = (int)rnd((uint64_t)n), j = (int)rnd((uint64_t)n), how = (int)rnd(MUTATIONS + 8);
            if (how < MUTATIONS && how != DROP_BOTH && how != DUPLICATE_BOTH &&
                how != SHORTER_BOTH) { /* pairs may be gone */
                mutate(&job, rank, i, how);
            } else { /* swap any two steps: harmless within a group, mostly */
                struct ry_step t = steps[i];
                steps[i] = steps[j];
                steps[j] = t;
            }
        }
        if (verify(&job, &err)) {
            refused++;
        } else {
            accepted++;
            const char *why = interpret(&job, &mem);
            ck_assert_msg(!*why, "round %d: accepted, but %s", round, why);
        }
        free_memory(&job, &mem);
        free_job(&job);
    }
    printf("changed plans: %d accepted and right, %d refused\n", accepted, refused);
    ck_assert_int_gt(accepted, 100);
    ck_assert_int_gt(refused, 1000);
}
END_TEST

/* Plans by hand: what they end in is known to the letter. */
static void expect_refused(int n, const uint64_t *matrix, struct ry_plan *plans, const char *text)
{
    struct ry_err err = {""};
    struct ry_cluster *c = cluster_of(n, blocks, 1);
    struct ry_plan *p[4];
    for (int r = 0; r < n; r++)
        p[r] = &plans[r];
    int rc = ry_plan_verify(c, matrix, p, &err);
    if (text)
        ck_assert_msg(rc && strstr(err.msg, text), "wanted '%s', got '%s'", text, rc ? err.msg : "(accepted)");
    else
        ck_assert_msg(!rc, "%s", err.msg);
    ry_cluster_free(c);
}

#define SEND(g, p, b)                                                                                                  \
    {                                                                                                                  \
        RY_STEP_SEND, g, p, {0}, {RY_AT_SEND, p, 0}, b                                                                 \
    }
#define RECV(g, p, b)                                                                                                  \
    {                                                                                                                  \
        RY_STEP_RECV, g, p, {RY_AT_RECV, p, 0}, {0}, b                                                                 \
    }
#define PLAN(r, n, groups, stage, steps)                                                                               \
    {                                                                                                                  \
        RY_DIRECT, r, n, groups, stage, (int)(sizeof steps / sizeof *steps), steps                                     \
    }

START_TEST(by_hand)
{
    uint64_t m2[] = {0, 8, 8, 0};
    { /* each sends in a group of its own first: NCCL's sends wait for their receives */
        struct ry_step a[] = {SEND(0, 1, 8), RECV(1, 1, 8)}, b[] = {SEND(0, 0, 8), RECV(1, 0, 8)};
        struct ry_plan p[] = {PLAN(0, 2, 2, 0, a), PLAN(1, 2, 2, 0, b)};
        expect_refused(2, m2, p,
                       "waits in a circle: rank 0 (step 0, group 0) for rank 1, rank 1 (step 0, group 0) for rank 0");
        b[0] = (struct ry_step)RECV(0, 0, 8);
        b[1] = (struct ry_step)SEND(1, 0, 8);
        expect_refused(2, m2, p, NULL);
        b[1].bytes = 7;
        expect_refused(2, m2, p, "rank 1, step 1 (group 1: send 7 bytes to rank 0): is met by rank 0, step 1");
        b[1].bytes = 8;
        a[0].from.offset = 4;
        expect_refused(
            2, m2, p,
            "rank 0, step 0 (group 0: send 8 bytes to rank 1): overruns send segment 1 of 8 bytes, from offset 4");
    }
    { /* three in a circle, each fine with one neighbour */
        uint64_t m[] = {0, 8, 0, 0, 0, 8, 8, 0, 0};
        struct ry_step a[] = {SEND(0, 1, 8), RECV(1, 2, 8)}, b[] = {SEND(0, 2, 8), RECV(1, 0, 8)},
                       c[] = {SEND(0, 0, 8), RECV(1, 1, 8)};
        struct ry_plan p[] = {PLAN(0, 3, 2, 0, a), PLAN(1, 3, 2, 0, b), PLAN(2, 3, 2, 0, c)};
        expect_refused(3, m, p, "waits in a circle");
    }
    { /* the same bytes twice, by halves that overlap, in two groups */
        uint64_t m[] = {0, 8, 0, 0};
        struct ry_step a[] = {SEND(0, 1, 6), SEND(1, 1, 4)}, b[] = {RECV(0, 0, 6), RECV(1, 0, 4)};
        struct ry_plan p[] = {PLAN(0, 2, 2, 0, a), PLAN(1, 2, 2, 0, b)};
        a[1].from.offset = 4, b[1].to.offset = 4;
        expect_refused(
            2, m, p,
            "rank 1, step 1 (group 1: receive 4 bytes from rank 0): offset 4 of receive segment 0 is written twice");
        a[1].group = b[1].group = 0;
        expect_refused(2, m, p, "touch the same memory, at offset 4");
        a[1] = (struct ry_step)SEND(1, 1, 1), b[1] = (struct ry_step)RECV(1, 0, 1);
        a[1].from.offset = 6, b[1].to.offset = 6;
        expect_refused(2, m, p, "rank 1: offset 7 of receive segment 0 is never written");
        a[1].bytes = b[1].bytes = 2;
        expect_refused(2, m, p, NULL);
        a[1].from.offset = 5;
        expect_refused(2, m, p,
                       "wrong source: offset 6 of receive segment 0 gets offset 5 of what rank 0 sends to rank 1");
    }
    { /* through staging memory, which may be used again; and what was received may be read */
        uint64_t m[] = {8, 0, 0, 0};
        struct ry_step a[] = {{RY_STEP_COPY, -1, -1, {RY_AT_STAGE, -1, 0}, {RY_AT_SEND, 0, 0}, 8},
                              {RY_STEP_COPY, -1, -1, {RY_AT_STAGE, -1, 0}, {RY_AT_SEND, 0, 4}, 4},
                              {RY_STEP_COPY, -1, -1, {RY_AT_RECV, 0, 0}, {RY_AT_SEND, 0, 0}, 4},
                              {RY_STEP_COPY, -1, -1, {RY_AT_RECV, 0, 4}, {RY_AT_STAGE, -1, 0}, 4}};
        struct ry_plan p[] = {PLAN(0, 2, 0, 8, a), {RY_DIRECT, 1, 2, 0, 0, 0, NULL}};
        expect_refused(2, m, p, NULL);
        a[3].from.offset = 4;
        expect_refused(2, m, p, NULL); /* the first copy left the same bytes there */
        a[3].from.offset = 3;
        expect_refused(2, m, p,
                       "wrong source: offset 4 of receive segment 0 gets offset 7 of what rank 0 sends to rank 0");
        a[0].bytes = 6, a[3].from.offset = 4;
        expect_refused(2, m, p,
                       "rank 0, step 3 (copy 4 bytes): reads what was never written, at offset 6 of staging memory");
        a[3].from = (struct ry_at){RY_AT_RECV, 0, 2};
        expect_refused(2, m, p, "rank 0, step 3 (copy 4 bytes): onto itself, at offset 4");
        a[3].from = (struct ry_at){RY_AT_RECV, 0, 0};
        expect_refused(2, m, p, "wrong source: offset 4 of receive segment 0 gets offset 0 of");
        a[0].bytes = 9;
        expect_refused(2, m, p, "overruns staging memory: offset 0 in 8 bytes");
        p[0].stage_bytes = 9;
        expect_refused(2, m, p, "overruns send segment 0 of 8 bytes");
    }
}
END_TEST

/* ---- the rest of plan.h ---- */

START_TEST(names)
{
    struct ry_err err = {""};
    enum ry_strategy s = RY_STRATEGIES;
    for (enum ry_strategy k = 0; k < RY_STRATEGIES; k++) {
        ck_assert_int_eq(ry_strategy_parse(ry_strategy_name(k), &s, &err), 0);
        ck_assert_int_eq(s, k);
    }
    ck_assert_int_eq(ry_strategy_parse("diagonal", &s, &err), -1);
    ck_assert_str_eq(err.msg, "unknown strategy 'diagonal': there are direct, hierarchical");
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
    ry_slice_fill(&slice, m, 4);
    ck_assert_int_eq(slice.nrows, 1);
    ck_assert_int_eq(slice.ncols, 2);
    ck_assert_int_eq(slice.rows[0], 3);
    ck_assert_int_eq(slice.cols[1], 1);
    ck_assert_uint_eq(slice.cells[0], m[12]);
    struct ry_plan_input in = {c, 1, RY_HIERARCHICAL, send, recv, &slice, NULL, NULL};
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

static void reseed(void)
{
    state = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
}

int main(void)
{
    const char *set = getenv("RY_TEST_SEED");
    seed = set ? (unsigned)strtoul(set, NULL, 0) : (unsigned)time(NULL);
    printf("RY_TEST_SEED=%u\n", seed);
    fflush(stdout);
    Suite *suite = suite_create("plan");
    TCase *t = tcase_create("plan");
    tcase_add_checked_fixture(t, reseed, NULL);
    tcase_add_test(t, names);
    tcase_add_test(t, relays);
    tcase_add_test(t, contradictions);
    tcase_add_test(t, zero_copy);
    tcase_add_test(t, random_jobs);
    tcase_add_test(t, real_memory);
    tcase_add_test(t, by_hand);
    tcase_add_test(t, mutations);
    tcase_add_test(t, accepted_is_right);
    tcase_add_test(t, large_jobs);
    tcase_add_test(t, build_time);
    tcase_set_timeout(t, 110);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
