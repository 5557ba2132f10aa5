/*
 * test_plan_dedup.c: plans that pack: proved for random jobs and rows, carried out on host memory, broken in every way that a
 * verifier must find, and what plan.h promises of their memory.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "plan_help.h"

static uint64_t cell(const struct job *job, int from, int to)
{
    return job->matrix[(size_t)from * (size_t)job->n + (size_t)to];
}

/* What crosses from a rank to a node. */
static uint64_t crosses(const struct job *job, int from, int node, bool *packed)
{
    struct ry_repeats r = job->repeats[from * job->cluster->nnodes + node];
    uint64_t rows = 0, bytes = 0;
    for (int p = 0; p < job->n; p++)
        if (job->cluster->node[p] == node) {
            rows += r.row_bytes ? ry_rows_of(cell(job, from, p), r.row_bytes) : 0;
            bytes += cell(job, from, p);
        }
    *packed = ry_packs(r, rows, bytes);
    return *packed ? ry_packed_bytes(r, rows) : bytes;
}

/* Staging as promised, and every packed message once across, to the relay. Adds up how often what happened. */
struct seen {
    long packed, plain, whole, pieces, kept;
};
static void check_promises(const struct job *job, struct seen *seen)
{
    const struct ry_cluster *c = job->cluster;
    uint64_t *relay = malloc(2 * (size_t)job->n * sizeof *relay), *pack = relay + job->n;
    ck_assert_int_eq(ry_plan_stage_all(c, RY_DEDUP, job->matrix, job->repeats, relay, pack, NULL), 0);
    for (int r = 0; r < job->n; r++) {
        const struct ry_plan *p = job->plans[r];
        const uint64_t *row = job->matrix + (size_t)r * (size_t)job->n;
        const uintptr_t *at = job->send_at && !job->blind ? job->send_at[r] : NULL;
        const struct ry_repeats *own = job->repeats + r * c->nnodes;
        ck_assert_uint_eq(relay[r], ry_plan_stage_relay(c, r, RY_DEDUP, job->matrix, job->repeats));
        ck_assert_uint_eq(pack[r], ry_plan_stage_pack(c, r, RY_DEDUP, row, NULL, own));
        ck_assert_uint_eq(p->stage_bytes, relay[r] + ry_plan_stage_pack(c, r, RY_DEDUP, row, at, own));
        ck_assert_uint_eq(relay[r] + pack[r], ry_plan_stage_bytes(c, r, RY_DEDUP, job->matrix, job->repeats));
        int *sends = calloc((size_t)c->nnodes, sizeof *sends);
        for (int i = 0; i < p->nsteps; i++) {
            const struct ry_step *s = &p->steps[i];
            int node = ry_is_transfer(s) ? c->node[s->peer] : -1;
            bool packed;
            if (s->kind == RY_STEP_SEND && node != c->node[r]) {
                ck_assert_int_eq(s->group, 0);
                ck_assert_int_eq(s->peer, ry_relay(c, r, node));
                ck_assert_int_eq(sends[node]++, 0);
                ck_assert_uint_eq(s->bytes, crosses(job, r, node, &packed));
                seen->packed += packed;
                seen->plain += !packed;
            }
            if (s->kind == RY_STEP_PACK || (s->kind == RY_STEP_RECV && s->to.place == RY_AT_STAGE))
                ck_assert_uint_eq(s->to.offset % 256, 0);
            seen->whole += s->kind == RY_STEP_RECV && s->group == 1 && s->to.place == RY_AT_STAGE;
            seen->pieces += s->kind == RY_STEP_EXPAND && s->to.place == RY_AT_STAGE;
            seen->kept += s->kind == RY_STEP_EXPAND && s->to.place == RY_AT_RECV && ry_relay(c, s->peer, c->node[r]) == r;
        }
        for (int node = 0; node < c->nnodes; node++) {
            bool packed;
            if (node != c->node[r])
                ck_assert_int_eq(sends[node], crosses(job, r, node, &packed) > 0);
        }
        free(sends);
    }
    free(relay);
}

START_TEST(random_jobs)
{
    struct seen seen = {0};
    for (int round = 0; round < 500; round++) {
        static const uint64_t most[] = {7, 300, 4099};
        int n = round % 8 ? 1 + (int)rnd(12) : 1 + (int)rnd(48);
        struct job job = random_job(n, most[n > 20 ? 1 : rnd(3)], true);
        struct ry_err err = {""};
        random_rows(&job);
        for (enum ry_strategy s = 0; s < RY_STRATEGIES; s++) {
            build_all(&job, s);
            ck_assert_msg(!verify(&job, &err), "round %d, %s, %d ranks on %d nodes: %s", round, ry_strategy_name(s), n,
                          job.cluster->nnodes, err.msg);
            if (s == RY_DEDUP)
                check_promises(&job, &seen);
            free_plans(&job);
        }
        free_job(&job);
    }
    printf("messages across: %ld packed, %ld as they are; in the node: %ld passed on packed, %ld written out first, %ld kept\n",
           seen.packed, seen.plain, seen.whole, seen.pieces, seen.kept);
    ck_assert(seen.packed > 1000 && seen.plain > 1000 && seen.whole > 100 && seen.pieces > 1000 && seen.kept > 1000);
}
END_TEST

START_TEST(real_memory)
{
    struct seen seen = {0};
    for (int round = 0; round < 200; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(1 + (int)rnd(12), 1 + rnd(rnd(2) ? 40 : 900), true);
        random_rows(&job);
        make_real(&job, &mem, (int)rnd(4));
        job.blind = rnd(2);
        build_all(&job, RY_DEDUP);
        if (job.blind)
            ck_assert_msg(!verify(&job, &err), "%s", err.msg);
        check_promises(&job, &seen);
        const char *why = interpret(&job, &mem);
        ck_assert_msg(!*why, "%d ranks: %s", job.n, why);
        free_memory(&job, &mem);
        free_job(&job);
    }
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {random_jobs, real_memory, NULL};
    return run_tests("plan_dedup", tests);
}
