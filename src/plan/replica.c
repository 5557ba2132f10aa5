/*
 * replica.c: the strategy `replica`: twin communicators whose ranks send the same bytes each send a share of them.
 *
 * Ranks are those of all twins together: rank t * W + k is rank k of twin t. In K chunks, groups 0 … K - 1 bring, one
 * after the other, the K parts of this twin's share of every message from another node, straight into place; the first
 * of them also has everything that stays on the node, whole. Group K + k passes on what group k brought to the ranks of
 * the other twins at this position, and gets their shares from them, beside group k + 1. The former go over the twin's
 * own communicator, the latter over one of the ranks at this position. No staging memory: what is passed on is sent
 * from the receive buffer.
 */
#include "strategy.h"

static size_t most_steps(const struct ry_building *b)
{
    return 2 * (size_t)b->chunks *
           (size_t)b->cluster->nranks; /* to and from each rank of a twin, of which one share is its own */
}

static int check(const struct ry_building *b)
{
    const struct ry_plan_input *in = b->in;
    const struct ry_cluster *c = b->cluster;
    if (in->replicas < 2 || c->nranks % in->replicas)
        return ry_fail(b->err, "plan of rank %d: %d ranks are not %d twins", b->rank, c->nranks, in->replicas);
    int each = c->nranks / in->replicas, twin = b->rank / each;
    for (int r = 0; r < c->nranks; r++) {
        if (c->node[r] != c->node[r % each])
            return ry_fail(b->err, "plan of rank %d: rank %d sits on another node than its twin %d", b->rank, r,
                           r % each);
        if (r / each != twin && (in->send[r] || in->recv[r]))
            return ry_fail(b->err, "plan of rank %d: it has to do with rank %d, which is of another twin", b->rank, r);
    }
    return 0;
}

static int build(struct ry_building *b)
{
    const struct ry_plan_input *in = b->in;
    const struct ry_cluster *c = b->cluster;
    struct ry_plan *plan = b->plan;
    if (check(b))
        return -1;
    int n = in->replicas, each = c->nranks / n, twin = b->rank / each, own = b->rank % each, chunks = b->chunks;
    int first = twin * each, end = first + each;
    plan->ngroups = 2 * chunks;
    plan->inside = ((UINT64_C(1) << chunks) - 1) << chunks;
    for (int k = 0; k < chunks; k++)
        for (int p = first; p < end; p++) {
            bool near = c->node[p] == b->node;
            if (near && k)
                continue;
            int i = twin * chunks + k, of = n * chunks; /* this part of this share */
            uint64_t out = near ? 0 : ry_replica_at(in->send[p], i, of),
                     back = near ? 0 : ry_replica_at(in->recv[p], i, of);
            uint64_t out_end = near ? in->send[p] : ry_replica_at(in->send[p], i + 1, of);
            uint64_t back_end = near ? in->recv[p] : ry_replica_at(in->recv[p], i + 1, of);
            ry_step_send(plan, k, p, (struct ry_at){RY_AT_SEND, p, out}, out_end - out);
            ry_step_recv(plan, k, p, (struct ry_at){RY_AT_RECV, p, back}, back_end - back);
        }
    int second = plan->nsteps;
    for (int k = 0; k < chunks; k++)
        for (int p = first; p < end; p++) {
            if (c->node[p] == b->node)
                continue;
            int i = twin * chunks + k, of = n * chunks;
            uint64_t at = ry_replica_at(in->recv[p], i, of), bytes = ry_replica_at(in->recv[p], i + 1, of) - at;
            for (int t = 0; t < n; t++) {
                if (t == twin)
                    continue;
                uint64_t its = ry_replica_at(in->recv[p], t * chunks + k, of);
                ry_step_send(plan, chunks + k, t * each + own, (struct ry_at){RY_AT_RECV, p, at}, bytes);
                ry_step_recv(plan, chunks + k, t * each + own, (struct ry_at){RY_AT_RECV, p, its},
                             ry_replica_at(in->recv[p], t * chunks + k + 1, of) - its);
            }
        }
    for (int i = second; i < plan->nsteps; i++)
        plan->steps[i].after = plan->steps[i].group - chunks;
    plan->beside = chunks > 1 ? plan->nsteps - second : 0;
    return 0;
}

const struct ry_strategy_ops ry_replica_ops = {.name = "replica", .most_steps = most_steps, .build = build};
