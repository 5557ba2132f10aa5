/*
 * packed.c: the steps of a plan that pack and expand messages of distinct rows, or sum rows to such messages.
 *
 * Owns: whether such a step may be carried out, and collecting those that follow each other into as few launches as can
 * be. Not: the kernels (rows.c, sums.c), what was found to pack (scan.c) or kept to sum by (kept.c), which messages go packed (plan/dedup.c).
 */
#include "internal.h"

static bool in_stage(const struct ry_plan *plan, uint64_t offset, uint64_t bytes)
{
    return bytes <= plan->stage_bytes && offset <= plan->stage_bytes - bytes;
}

/* Messages are words of 16 bytes: staging memory's own address must be a multiple, too. */
static bool message_fits(const struct ry_runner *r, const struct ry_plan *plan, const struct ry_at *at,
                         const struct ry_step *s)
{
    uint64_t bytes = ry_rows_message_bytes(s->repeats.row_bytes, s->repeats.distinct, s->rows);
    return at->place == RY_AT_STAGE && ((uintptr_t)r->stage + at->offset) % 16 == 0 &&
           in_stage(plan, at->offset, bytes) && s->repeats.row_bytes && s->rows <= RY_ROWS_MOST &&
           s->repeats.distinct <= RY_ROWS_MOST;
}

static int check_pack(const struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b,
                      const struct ry_step *s, struct ry_err *err)
{
    if (!message_fits(r, plan, &s->to, s) ||
        s->bytes != ry_rows_message_bytes(s->repeats.row_bytes, s->repeats.distinct, s->rows))
        return ry_fail(err, "its message does not fit the staging memory");
    if (!scan_says(r, s->peer, s->repeats, s->rows))
        return ry_fail(err, "it is not what the latest search found for node %d", s->peer);
    if (!ry_rows_scanned(r->rows, s->peer, b->send, b->send_bytes))
        return ry_fail(err, "the latest search was of other buffers");
    return 0;
}

static int check_expand(const struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b,
                        const struct ry_step *s, struct ry_err *err)
{
    const struct ry_at *to = &s->to;
    if (!message_fits(r, plan, &s->from, s) || s->peer < 0 || s->peer >= b->nranks)
        return ry_fail(err, "its message does not fit the staging memory");
    uint64_t rows = ry_rows_of(s->bytes, s->repeats.row_bytes),
             message = ry_rows_message_bytes(s->repeats.row_bytes, s->repeats.distinct, s->rows);
    if (!s->bytes || rows > s->rows || s->skip > s->rows - rows)
        return ry_fail(err, "its rows are not in the message");
    if (to->place == RY_AT_STAGE)
        return in_stage(plan, to->offset, s->bytes) &&
                       (to->offset + s->bytes <= s->from.offset || s->from.offset + message <= to->offset)
                   ? 0
                   : ry_fail(err, "its rows do not fit the staging memory");
    return to->place == RY_AT_RECV && to->peer >= 0 && to->peer < b->nranks && b->recv[to->peer] &&
                   s->bytes <= b->recv_bytes[to->peer] && to->offset <= b->recv_bytes[to->peer] - s->bytes
               ? 0
               : ry_fail(err, "its rows do not fit the job's buffers");
}

int packed_check(const struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b,
                 const struct ry_step *s, struct ry_err *err)
{
    if (!r->rows)
        return ry_fail(err, "Railyard's kernels are not loaded");
    return s->kind == RY_STEP_PACK  ? check_pack(r, plan, b, s, err)
           : s->kind == RY_STEP_SUM ? kept_check(r, plan, b, s, err)
                                    : check_expand(r, plan, b, s, err);
}

/* ---- doing it ---- */

void packed_start(struct packed *p, struct ry_runner *r, const struct ry_buffers *b)
{
    p->runner = r;
    p->buffers = b;
    p->npacks = p->npieces = p->nsums = 0;
}

int packed_flush(struct packed *p, struct ry_err *err)
{
    int packs = p->npacks, pieces = p->npieces, sums = p->nsums;
    p->npacks = p->npieces = p->nsums = 0;
    if (packs && ry_rows_pack(p->runner->rows, p->pack, packs, p->buffers->stream, err))
        return -1;
    if (sums && kept_sum(p->runner, p->buffers, p->sum, sums, err))
        return -1;
    return pieces ? ry_rows_expand(p->runner->rows, p->piece, pieces, p->buffers->stream, err) : 0;
}

/* Messages of one exchange lie apart: steps that pack never depend on each other. */
int packed_pack(struct packed *p, int node, void *message, struct ry_err *err)
{
    if ((p->npieces || p->nsums || p->npacks == PACKED) && packed_flush(p, err))
        return -1;
    p->pack[p->npacks++] = (struct ry_rows_packing){node, message};
    return 0;
}

static bool meet(const void *a, uint64_t a_bytes, const void *b, uint64_t b_bytes)
{
    return (uintptr_t)a < (uintptr_t)b + b_bytes && (uintptr_t)b < (uintptr_t)a + a_bytes;
}

/* Those of one launch are written in no order, so none may write what another reads or writes. */
int packed_expand(struct packed *p, const struct ry_rows_piece *piece, uint64_t message_bytes, struct ry_err *err)
{
    bool depends = p->npacks || p->nsums || p->npieces == PACKED;
    for (int i = 0; i < p->npieces && !depends; i++)
        depends = meet(p->piece[i].to, p->piece[i].bytes, piece->to, piece->bytes) ||
                  meet(p->piece[i].to, p->piece[i].bytes, piece->message, message_bytes) ||
                  meet(p->piece[i].message, p->message_bytes[i], piece->to, piece->bytes);
    if (depends && packed_flush(p, err))
        return -1;
    p->message_bytes[p->npieces] = message_bytes;
    p->piece[p->npieces++] = *piece;
    return 0;
}

/* As with pieces. */
int packed_sum(struct packed *p, int peer, const void *from, void *to, uint64_t bytes, struct ry_err *err)
{
    struct ry_sums_job job = {.from = from, .to = to};
    uint64_t rows = kept_job(p->buffers->kept, peer, &job);
    bool depends = p->npacks || p->npieces || p->nsums == PACKED;
    for (int i = 0; i < p->nsums && !depends; i++)
        depends = meet(p->sum[i].to, p->sum_bytes[i][1], to, bytes) ||
                  meet(p->sum[i].to, p->sum_bytes[i][1], from, rows) ||
                  meet(p->sum[i].from, p->sum_bytes[i][0], to, bytes);
    if (depends && packed_flush(p, err))
        return -1;
    p->sum_bytes[p->nsums][0] = rows;
    p->sum_bytes[p->nsums][1] = bytes;
    p->sum[p->nsums++] = job;
    return 0;
}
