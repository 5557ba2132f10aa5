/*
 * verify_sum.c: the verifier's part about rows that are added up (plan.h, strategy sum).
 *
 * A message of sums consists of sums, known by whom they are for, the node that made them and where they lie in the
 * message; of zeros; and of an index list. A sum is one of the right rows because SUM is refused unless just these lie
 * where it reads, in order; the index list that it goes by is the one that the row map says D's sender made.
 */
#include <inttypes.h>
#include <stdlib.h>

#include "verify_internal.h"

bool ry_verify_sums(const struct machine *m, int from, int to)
{
    return m->sums && m->cluster->node[from] != m->cluster->node[to] && packed(m, to, m->cluster->node[from])->summed;
}

int ry_verify_sum_step(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    int node = m->cluster->node[rank];
    struct text name = ry_verify_name(m, rank, step);
    uint64_t row_bytes = s->repeats.row_bytes,
             bytes = ry_packed_bytes((struct ry_repeats){.row_bytes = row_bytes, .distinct = s->repeats.distinct + 1},
                                     s->rows);
    if (rank != ry_relay(m->cluster, s->peer, node))
        return ry_fail(m->err, "%s: rank %d knows which belong together", name.s, ry_relay(m->cluster, s->peer, node));
    for (int j = 0; j < m->n; j++)
        if (m->cluster->node[j] == node && went(m, s->peer, j) % row_bytes)
            return ry_fail(m->err, "%s: of what rank %d returns, the last row of %" PRIu64 " bytes is cut short",
                           name.s, j, row_bytes);
    if (s->bytes != bytes)
        return ry_fail(m->err, "%s: the message has %" PRIu64 " bytes, not %" PRIu64, name.s, bytes, s->bytes);
    if (s->from.place == RY_AT_RECV)
        return ry_fail(m->err, "%s: reads the receive buffer", name.s);
    if (s->from.place == RY_AT_STAGE && s->to.offset < s->from.offset + s->rows * row_bytes &&
        s->from.offset < s->to.offset + bytes)
        return ry_fail(m->err, "%s: onto the rows themselves", name.s);
    return 0;
}

/* Are the pieces what the node's ranks return to `to`, in ascending rank? */
static int check_rows(struct machine *m, int rank, int step, int to)
{
    uint64_t at = 0;
    size_t k = 0;
    for (int j = 0; j < m->n; j++) {
        uint64_t end = at + segment_bytes(m, RY_AT_SEND, j, to), begin = at;
        if (m->cluster->node[j] != m->cluster->node[rank])
            continue;
        while (at < end) {
            struct token is = token_after(m->pieces[k].token, at - m->pieces[k].lo);
            if (!same(is, sent(m, j, to, at - begin)))
                return ry_fail(
                    m->err, "%s: wrong source: where offset %" PRIu64 " of what rank %d sends should be, there is %s",
                    ry_verify_name(m, rank, step).s, at - begin, j, ry_verify_token_name(is).s);
            at = m->pieces[k].hi < end ? m->pieces[k].hi : end;
            k += at == m->pieces[k].hi;
        }
    }
    return 0;
}

int ry_verify_sum(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    int node = m->cluster->node[rank];
    uint64_t row_bytes = s->repeats.row_bytes, sums = s->repeats.distinct * row_bytes, read = s->rows * row_bytes;
    uint64_t gap = s->bytes - 4 * s->rows - sums - row_bytes;
    m->npieces = 0;
    if (s->from.place == RY_AT_SEND ? ry_verify_piece(m, read, sent(m, rank, s->from.peer, s->from.offset))
                                    : ry_verify_stage(m, rank, step, s->from.offset, read))
        return -1;
    if (check_rows(m, rank, step, s->peer))
        return -1;
    m->npieces = 0;
    return ry_verify_piece(m, sums, (struct token){s->peer, SEG(SUMS, node), 0}) ||
                   ry_verify_piece(m, row_bytes, (struct token){s->peer, SEG(ZEROS, node), 0}) ||
                   (gap && ry_verify_piece(m, gap, (struct token){rank, FILLED_IN, 0})) ||
                   ry_verify_piece(m, 4 * s->rows, (struct token){s->peer, SEG(LIST_OF_SUMS, node), 0})
               ? -1
               : 0;
}

uint64_t ry_verify_summed(const struct machine *m, struct token t, int from, int to, uint64_t offset)
{
    int node = m->cluster->node[from];
    const struct packed *p = packed(m, to, node);
    uint64_t row_bytes = p->map->repeats.row_bytes, in_row = offset % row_bytes;
    uint64_t row = *rows_before(m, to, from) + offset / row_bytes;
    bool right = p->map->first[row] != row
                     ? t.seg < FILLED_IN && SORT_OF(t.seg) == ZEROS
                     : t.rank == to && t.seg == SEG(SUMS, node) && t.off == p->number[row] * row_bytes + in_row;
    return right ? row_bytes - in_row : 0;
}

int ry_plan_verify_sum(const struct ry_cluster *cluster, const uint64_t *matrix, const struct ry_row_map *maps,
                       struct ry_plan *const *plans, const uintptr_t *const *send_at, const uintptr_t *const *recv_at,
                       struct ry_err *err)
{
    size_t n = (size_t)cluster->nranks;
    uint64_t *went = malloc(n * n * sizeof *went);
    struct machine m = {.n = cluster->nranks,
                        .cluster = cluster,
                        .matrix = matrix,
                        .plans = plans,
                        .send_at = send_at,
                        .recv_at = recv_at,
                        .err = err,
                        .maps = maps,
                        .went = went,
                        .sums = maps != NULL};
    if (!went)
        return no_memory(&m);
    for (size_t from = 0; from < n; from++)
        for (size_t to = 0; to < n; to++)
            went[to * n + from] = matrix[from * n + to];
    int rc = maps ? ry_verify_with_rows(&m) : ry_verify_all(&m);
    free(went);
    return rc;
}
