/*
 * verify_replica.c: the verifier's part about twin communicators: is the exchange one of twins, and do transfers keep
 * to the communicators that they will go over? That a byte may come from a twin is in verify_internal.h: from_twin().
 */
#include <inttypes.h>

#include "verify_internal.h"

static int check_twins(const struct machine *m)
{
    int each = m->n / m->replicas;
    const struct ry_cluster *c = m->cluster;
    for (int i = 0; i < m->n; i++) {
        if (c->node[i] != c->node[i % each])
            return ry_fail(m->err, "rank %d sits on node %d, its twin %d on node %d", i, c->node[i], i % each,
                           c->node[i % each]);
        for (int j = 0; j < m->n; j++) {
            uint64_t bytes = segment_bytes(m, RY_AT_SEND, i, j);
            uint64_t wanted = i / each != j / each ? 0 : segment_bytes(m, RY_AT_SEND, i % each, j % each);
            if (bytes != wanted)
                return ry_fail(m->err, "rank %d sends %" PRIu64 " bytes to rank %d, among twins %" PRIu64, i, bytes, j,
                               wanted);
        }
    }
    return 0;
}

static int check_ways(const struct machine *m, int rank)
{
    const struct ry_plan *p = m->plans[rank];
    int each = m->n / m->replicas;
    for (int i = 0; i < p->nsteps; i++) {
        const struct ry_step *s = &p->steps[i];
        if (!ry_is_transfer(s) || s->peer < 0 || s->peer >= m->n)
            continue; /* the latter is found to be wrong elsewhere */
        if (ry_inside(p->inside, s->group) ? s->peer % each != rank % each : s->peer / each != rank / each)
            return ry_fail(m->err, "%s: that is %s", ry_verify_name(m, rank, i).s,
                           ry_inside(p->inside, s->group) ? "another position" : "another twin's rank");
    }
    return 0;
}

int ry_plan_verify_replicas(const struct ry_cluster *cluster, const uint64_t *matrix, int replicas,
                            struct ry_plan *const *plans, const uintptr_t *const *send_at,
                            const uintptr_t *const *recv_at, struct ry_err *err)
{
    struct machine m = {.n = cluster->nranks,
                        .cluster = cluster,
                        .matrix = matrix,
                        .plans = plans,
                        .send_at = send_at,
                        .recv_at = recv_at,
                        .err = err,
                        .replicas = replicas,
                        .went = matrix};
    bool overlap = false;
    if (replicas < 2 || m.n % replicas)
        return ry_fail(err, "%d ranks are not %d twins", m.n, replicas);
    if (check_twins(&m))
        return -1;
    for (int r = 0; r < m.n; r++) {
        if (check_ways(&m, r))
            return -1;
        overlap |= plans[r]->beside > 0;
    }
    return ry_verify_all(&m) ? -1 : overlap ? ry_verify_early(&m) : 0;
}
