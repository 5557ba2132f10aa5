/*
 * verify_rows.c: the verifier's part about packed messages: what PACK writes, what EXPAND reads, and which rows are as
 * good as each other.
 *
 * A packed message consists of bytes of the send buffer, known by where the first of equal rows lies; of entries of the
 * index list, known by sender, node and place in that list; and of bytes that mean nothing. An entry is taken to hold
 * what the row map says that the scan finds, so it can be followed wherever it was sent.
 */
#include <inttypes.h>
#include <stdlib.h>

#include "verify_internal.h"

struct text ry_verify_packed_name(struct token t)
{
    struct text s;
    if (t.seg == FILLED_IN) {
        snprintf(s.s, sizeof s.s, "a byte that rank %d filled its message in with", t.rank);
        return s;
    }
    int node = NODE_OF(t.seg);
    switch (SORT_OF(t.seg)) {
    case LIST_OF_ROWS:
        snprintf(s.s, sizeof s.s, "byte %" PRIu64 " of the index list of what rank %d packed for node %d", t.off,
                 t.rank, node);
        break;
    case SUMS:
        snprintf(s.s, sizeof s.s, "byte %" PRIu64 " of the sums for rank %d from node %d", t.off, t.rank, node);
        break;
    case LIST_OF_SUMS:
        snprintf(s.s, sizeof s.s, "byte %" PRIu64 " of the index list of the sums for rank %d from node %d", t.off,
                 t.rank, node);
        break;
    default:
        snprintf(s.s, sizeof s.s, "a zero beside the sums for rank %d from node %d", t.rank, node);
    }
    return s;
}

/* A row that `from` sends to `node`, in the order of the message: of which segment, which of its rows, in which part.
 */
struct at_row {
    int part, to;
    uint64_t row, bytes; /* from its beginning to the segment's end */
};

/* The first, then the next. */
static bool next_row(const struct machine *m, int from, int node, const struct ry_repeats *r, struct at_row *at)
{
    int parts = ry_parts(r);
    at->row++;
    for (; at->part < parts; at->part++, at->to = -1) {
        for (;; at->row = 0) {
            if (at->to >= 0 && m->cluster->node[at->to] == node) {
                uint64_t bytes = went(m, from, at->to), rows = ry_rows_of(bytes, r->row_bytes),
                         first = ry_part_at(rows, at->part, parts);
                at->row = at->row < first ? first : at->row;
                at->bytes = bytes - at->row * r->row_bytes;
                if (at->row < ry_part_at(rows, at->part + 1, parts))
                    return true;
            }
            if (++at->to == m->n)
                break;
        }
    }
    return false;
}
#define BEFORE_ROWS ((struct at_row){.to = -1})

/* Numbers the distinct rows as packing does. */
static int read_map(struct machine *m, int from, int node)
{
    struct packed *p = packed(m, from, node);
    const struct ry_repeats *r = &p->map->repeats;
    uint64_t rows = 0, bytes = 0, distinct = 0, early[RY_CHUNKS] = {0};
    for (int to = 0; to < m->n; to++)
        if (m->cluster->node[to] == node) {
            *rows_before(m, from, to) = rows;
            rows += ry_rows_of(went(m, from, to), r->row_bytes);
            bytes += went(m, from, to);
        }
    p->rows = rows;
    p->summed = m->sums && ry_packs(*r, rows, bytes);
    p->number = malloc((size_t)(rows + 1) * sizeof *p->number);
    bool *shorter = calloc((size_t)(rows + 1), sizeof *shorter);
    uint32_t *of_class = malloc((size_t)(rows + 1) * sizeof *of_class);
    uint64_t i = 0;
    bool fits = p->number && shorter && of_class && (r->parts <= 2 || r->parts == RY_CHUNKS);
    for (uint64_t k = 0; fits && k < rows; k++)
        of_class[k] = UINT32_MAX;
    for (struct at_row at = BEFORE_ROWS; fits && next_row(m, from, node, r, &at); i++) {
        uint64_t row = *rows_before(m, from, at.to) + at.row, first = p->map->first ? p->map->first[row] : UINT64_MAX;
        shorter[row] = at.bytes < r->row_bytes;
        if (first > row || p->map->first[first] != first)
            break;
        if (of_class[first] == UINT32_MAX)
            early[at.part] = distinct + 1, of_class[first] = (uint32_t)distinct++;
        p->number[i] = of_class[first];
    }
    for (uint64_t k = 0; fits && i == rows && k < rows; k++) /* equal rows are whole */
        if (p->map->first[k] != k && (shorter[k] || shorter[p->map->first[k]]))
            i = k;
    bool memory = p->number && shorter && of_class;
    free(shorter);
    free(of_class);
    if (!memory)
        return no_memory(m);
    if (i < rows || !fits)
        return ry_fail(m->err, "the map of the rows that rank %d sends to node %d contradicts itself at row %" PRIu64,
                       from, node, i);
    if (distinct != r->distinct)
        return ry_fail(m->err,
                       "of the rows that rank %d sends to node %d, %" PRIu64 " are distinct by their map, not %" PRIu64,
                       from, node, distinct, r->distinct);
    for (int k = 1; k < ry_parts(r); k++) {
        early[k] = early[k] > early[k - 1] ? early[k] : early[k - 1];
        if (r->early[k - 1] != early[k - 1])
            return ry_fail(m->err,
                           "of the distinct rows that rank %d sends to node %d, %" PRIu64
                           " are in the first %d of %d parts by their map, not %" PRIu64,
                           from, node, early[k - 1], k, ry_parts(r), r->early[k - 1]);
    }
    return 0;
}

/* Where the index list begins. */
static uint64_t index_at(struct ry_repeats r)
{
    return ry_packed_bytes(r, 0);
}

int ry_verify_pack(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    const struct packed *p = packed(m, rank, s->peer);
    uint64_t entry = 0, row_bytes = s->repeats.row_bytes, filled = 0, distinct = 0;
    m->npieces = 0;
    for (struct at_row at = BEFORE_ROWS; next_row(m, rank, s->peer, &p->map->repeats, &at); entry++) {
        if (p->number[entry] < distinct)
            continue;
        distinct++;
        if (ry_verify_piece(m, at.bytes < row_bytes ? at.bytes : row_bytes, sent(m, rank, at.to, at.row * row_bytes)))
            return -1;
        if (at.bytes < row_bytes && ry_verify_piece(m, row_bytes - at.bytes, (struct token){rank, FILLED_IN, filled++}))
            return -1;
    }
    uint64_t gap = index_at(s->repeats) - row_bytes * s->repeats.distinct;
    if (gap && ry_verify_piece(m, gap, (struct token){rank, FILLED_IN, 0}))
        return -1;
    return ry_verify_piece(m, 4 * p->rows, (struct token){rank, SEG(LIST_OF_ROWS, s->peer), 0});
}

int ry_verify_expand(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    /* The message's rows went, or its sums come back for those that went, from which rank to which node? */
    int from = m->sums ? rank : s->peer, node = m->cluster->node[m->sums ? s->peer : rank];
    int list = SEG(m->sums ? LIST_OF_SUMS : LIST_OF_ROWS, node);
    uint64_t row_bytes = s->repeats.row_bytes, rows = ry_rows_of(s->bytes, row_bytes);
    m->npieces = 0;
    if (ry_verify_stage(m, rank, step, s->from.offset + index_at(s->repeats) + 4 * s->skip, 4 * rows))
        return -1;
    for (size_t i = 0; i < m->npieces; i++) {
        struct token t = m->pieces[i].token;
        if (t.rank != from || t.seg != list || t.off != 4 * s->skip + m->pieces[i].lo)
            return ry_fail(m->err, "%s: wrong source: where entry %" PRIu64 " of the index list should be, there is %s",
                           ry_verify_name(m, rank, step).s, s->skip + m->pieces[i].lo / 4, ry_verify_token_name(t).s);
    }
    m->npieces = 0;
    const struct packed *p = packed(m, from, node);
    for (uint64_t i = s->skip, at = 0; i < s->skip + rows; i++, at += row_bytes) {
        uint64_t number = m->sums && p->map->first[i] != i ? p->map->repeats.distinct : p->number[i];
        if (ry_verify_stage(m, rank, step, s->from.offset + number * row_bytes,
                            s->bytes - at < row_bytes ? s->bytes - at : row_bytes))
            return -1;
    }
    return 0;
}

int ry_verify_message(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    int node = m->cluster->node[rank];
    struct token last = m->npieces ? m->pieces[m->npieces - 1].token : (struct token){-1, 0, 0};
    bool comes =
        last.rank == s->peer && last.seg == SEG(LIST_OF_ROWS, node) && rank == ry_relay(m->cluster, s->peer, node);
    if (!comes && !s->repeats.row_bytes && !s->repeats.distinct && !s->rows)
        return 0;
    if (!comes)
        return ry_fail(m->err, "%s: takes what comes for a packed message to relay", ry_verify_name(m, rank, step).s);
    const struct packed *p = packed(m, s->peer, node);
    struct ry_repeats is = p->map->repeats;
    if (s->repeats.row_bytes != is.row_bytes || s->repeats.distinct != is.distinct || s->rows != p->rows)
        return ry_fail(m->err,
                       "%s: takes it for %" PRIu64 " of %" PRIu64 " rows of %" PRIu64 " bytes, but it is %" PRIu64
                       " of %" PRIu64 " of %" PRIu64 " bytes, packed",
                       ry_verify_name(m, rank, step).s, s->repeats.distinct, s->rows, s->repeats.row_bytes, is.distinct,
                       p->rows, is.row_bytes);
    uint64_t bytes = ry_packed_bytes(is, p->rows);
    if (s->from.place != RY_AT_STAGE || s->to.place != RY_AT_STAGE || s->to.offset < s->from.offset ||
        s->to.offset - s->from.offset + s->bytes != bytes)
        return ry_fail(m->err, "%s: the message does not begin at %" PRIu64, ry_verify_name(m, rank, step).s,
                       s->from.offset);
    return 0;
}

uint64_t ry_verify_equal(const struct machine *m, struct token t, int from, int to, uint64_t offset)
{
    int node = m->cluster->node[to];
    const uintptr_t *at = addresses(m, RY_AT_SEND, from);
    if (!m->maps || m->sums || t.rank != from || t.seg < -1 || node == m->cluster->node[from])
        return 0;
    const struct ry_row_map *map = packed(m, from, node)->map;
    uint64_t row_bytes = map->repeats.row_bytes, wanted = offset / (row_bytes ? row_bytes : 1);
    /* By its address it may be a byte of several segments. */
    for (int seg = at ? m->cluster->node_first[node] : t.seg; row_bytes && seg < (at ? m->n : t.seg + 1); seg++) {
        uint64_t off = t.off - (at ? at[seg] : 0);
        if (m->cluster->node[seg] == node && off < segment_bytes(m, RY_AT_SEND, from, seg) &&
            off % row_bytes == offset % row_bytes &&
            map->first[*rows_before(m, from, seg) + off / row_bytes] == map->first[*rows_before(m, from, to) + wanted])
            return row_bytes - offset % row_bytes;
    }
    return 0;
}

/* The form of a step that packs or writes out, and that it fits the row map. */
int ry_verify_row_step(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    const struct ry_cluster *c = m->cluster;
    bool packs = s->kind == RY_STEP_PACK, adds = s->kind == RY_STEP_SUM;
    int own = c->node[rank];
    struct text name = ry_verify_name(m, rank, step);
    if (!m->maps)
        return ry_fail(m->err, "%s: cannot be proved without knowing which rows are equal (ry_plan_verify_rows())",
                       name.s);
    if (s->group != -1)
        return ry_fail(m->err, "%s: is in group %d", name.s, s->group);
    if (s->peer < 0 || s->peer >= (packs ? c->nnodes : c->nranks) || (packs ? s->peer : c->node[s->peer]) == own)
        return ry_fail(m->err, "%s: there is no such %s elsewhere", name.s, packs ? "node" : "rank");
    if (m->sums ? packs : adds)
        return ry_fail(m->err, "%s: no such step belongs to an exchange that %s", name.s,
                       m->sums ? "returns rows" : "returns nothing");
    /* Rows went from `from` to `node`; what is expanded of sums has come back. */
    bool back = m->sums && !adds;
    int node = packs ? s->peer : back ? c->node[s->peer] : own, from = packs || back ? rank : s->peer;
    const struct packed *p = packed(m, from, node);
    struct ry_repeats is = p->map->repeats;
    is.distinct += back;
    if (!is.row_bytes)
        return ry_fail(m->err, "%s: rank %d did not look for equal rows", name.s, from);
    if (s->repeats.row_bytes != is.row_bytes || s->repeats.distinct != is.distinct || s->rows != p->rows)
        return ry_fail(m->err,
                       "%s: takes the message for %" PRIu64 " of %" PRIu64 " rows of %" PRIu64
                       " bytes, but it has %" PRIu64 " of %" PRIu64 " of %" PRIu64 " bytes",
                       name.s, s->repeats.distinct, s->rows, s->repeats.row_bytes, is.distinct, p->rows, is.row_bytes);
    struct ry_at message = packs || adds ? s->to : s->from;
    if (message.place != RY_AT_STAGE || message.offset % 16)
        return ry_fail(m->err, "%s: a packed message lies in staging memory, at a multiple of 16", name.s);
    if (m->sums && !p->summed)
        return ry_fail(m->err, "%s: what went from rank %d to node %d was not packed", name.s, from, node);
    if (adds)
        return ry_verify_sum_step(m, rank, step);
    if (back && s->peer != ry_relay(c, rank, node))
        return ry_fail(m->err, "%s: rank %d adds up what comes from there", name.s, ry_relay(c, rank, node));
    uint64_t bytes = ry_packed_bytes(is, p->rows), rows = ry_rows_of(s->bytes, is.row_bytes);
    if (packs)
        return s->bytes == bytes ? 0 : ry_fail(m->err, "%s: the packed message has %" PRIu64 " bytes", name.s, bytes);
    if (s->skip > p->rows || rows > p->rows - s->skip)
        return ry_fail(m->err, "%s: %" PRIu64 " rows after %" PRIu64 " are more than %" PRIu64, name.s, rows, s->skip,
                       p->rows);
    if (s->to.place == RY_AT_STAGE && s->to.offset < s->from.offset + bytes && s->from.offset < s->to.offset + s->bytes)
        return ry_fail(m->err, "%s: onto the message itself", name.s);
    return 0;
}

int ry_verify_with_rows(struct machine *m)
{
    const struct ry_cluster *c = m->cluster;
    size_t n = (size_t)c->nranks, nnodes = (size_t)c->nnodes;
    m->packed = calloc(n * nnodes, sizeof *m->packed);
    m->rows_before = calloc(n * n, sizeof *m->rows_before);
    int rc = m->packed && m->rows_before ? 0 : no_memory(m);
    for (int from = 0; !rc && from < c->nranks; from++)
        for (int node = 0; !rc && node < c->nnodes; node++) {
            const struct ry_row_map *map = &m->maps[(size_t)from * nnodes + (size_t)node];
            packed(m, from, node)->map = map;
            if (node != c->node[from] && map->repeats.row_bytes)
                rc = read_map(m, from, node);
        }
    rc = rc || ry_verify_all(m) ? -1 : 0;
    for (size_t i = 0; m->packed && i < n * nnodes; i++)
        free(m->packed[i].number);
    free(m->packed);
    free(m->rows_before);
    return rc;
}

int ry_plan_verify_rows_at(const struct ry_cluster *cluster, const uint64_t *matrix, const struct ry_row_map *maps,
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
                        .maps = maps,
                        .went = matrix};
    bool overlap = false;
    if (maps ? ry_verify_with_rows(&m) : ry_verify_all(&m))
        return -1;
    for (int r = 0; r < cluster->nranks; r++)
        overlap |= plans[r]->beside > 0;
    return overlap ? ry_verify_early(&m) : 0;
}

int ry_plan_verify_rows(const struct ry_cluster *cluster, const uint64_t *matrix, const struct ry_row_map *maps,
                        struct ry_plan *const *plans, struct ry_err *err)
{
    return ry_plan_verify_rows_at(cluster, matrix, maps, plans, NULL, NULL, err);
}
