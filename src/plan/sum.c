/*
 * sum.c: the strategy `sum`: rows that came back for copies of one row are added up before they cross.
 *
 * Group 0, inside the nodes: a node's ranks give their rows for a rank `s` of another node to the relay by which these
 * rows came, which lays them one behind the other as they were counted then. It adds up those that belong together.
 * Group 1: the relay sends `s` its sums; beside them, all at once, whatever is not summed goes directly: pairs of a
 * rank and a node for which nothing was packed, and what stays on the node. It is in that group, and not in the first,
 * so that the sums do not wait for it. In the end `s` writes out what it got.
 *
 * A relay whose own rows are all there is adds them up from where they lie in its send buffer. Where others give it
 * theirs, its own go beside them as a transfer to itself: NCCL copies them while the others travel.
 *
 * Staging memory: first, source by source of the exchange that is answered, the rows and what is made of them; then
 * what comes in, node by node. Nothing in it is used twice.
 */
#include "relayed.h"

#include <stdlib.h>

/* The same on all ranks, so from the map alone. Where every rank is alone on its node, or all are on one, there is
 * nothing to be given to a relay. */
static int groups(const struct ry_cluster *c)
{
    return c->nnodes > 1 && c->nnodes < c->nranks ? 2 : 1;
}

/* What is written for a message of D: its sums and the row of zeros. */
static struct ry_repeats sums_of(struct ry_repeats repeats)
{
    return (struct ry_repeats){.row_bytes = repeats.row_bytes, .distinct = repeats.distinct + 1};
}

static uint64_t sums_bytes(const struct ry_message *m)
{
    return ry_packed_bytes(sums_of(m->repeats), m->rows);
}

static bool divides(struct ry_pieces p, uint64_t row_bytes)
{
    for (int r; ry_next_piece(&p, &r);)
        if (p.bytes[r] % row_bytes)
            return false;
    return true;
}

static struct ry_pieces pieces_of(const struct ry_slice *slice, int row)
{
    return (struct ry_pieces){.bytes = slice->cells + (size_t)row * (size_t)slice->ncols, .left = slice->ncols};
}

static struct ry_message message_of(const struct ry_slice *slice, int row)
{
    return ry_message_of(pieces_of(slice, row), slice->repeats ? slice->repeats[row] : (struct ry_repeats){0});
}

/* Room for the rows that a relay, `own` by local index, adds up; none where they are its own. */
static uint64_t room_to_gather(const struct ry_message *m, uint64_t own)
{
    return m->bytes == own ? 0 : ry_stage_room(m->bytes);
}

uint64_t ry_plan_stage_sum(const struct ry_cluster *c, int rank, const struct ry_slice *slice, const uint64_t *recv,
                           const struct ry_repeats *repeats)
{
    uint64_t stage = 0;
    int node = c->node[rank], own = c->local[rank];
    for (int i = 0; i < slice->nrows; i++) {
        if (!ry_relays(c, rank, slice->rows[i]))
            continue;
        struct ry_message m = message_of(slice, i);
        if (m.packed)
            stage = ry_sum(ry_sum(stage, room_to_gather(&m, pieces_of(slice, i).bytes[own])),
                           ry_stage_room(sums_bytes(&m)));
    }
    for (int n = 0; repeats && n < c->nnodes; n++) {
        if (n == node || !repeats[n].row_bytes)
            continue;
        struct ry_message m = ry_message_of(ry_pieces_of(c, recv, n), repeats[n]);
        stage = ry_sum(stage, m.packed ? ry_stage_room(sums_bytes(&m)) : 0);
    }
    return stage;
}

static int refuse_width(const struct ry_building *b, int from, int node, uint64_t row_bytes)
{
    return ry_fail(
        b->err,
        "plan of rank %d: rows of %llu bytes do not divide all segments between rank %d and node %d, so they "
        "cannot be summed",
        b->rank, (unsigned long long)row_bytes, from, node);
}

/* D's slice against its layout, and against what this exchange brings back. */
static int check_slice(const struct ry_building *b)
{
    const struct ry_slice *s = b->in->slice;
    const struct ry_cluster *c = b->cluster;
    int own = c->local[b->rank], row = 0;
    bool fits = c->nnodes < 2 || (s && s->repeats && s->nrows == c->nranks - b->size && s->ncols == b->size);
    for (int j = 0; fits && c->nnodes > 1 && j < b->size; j++)
        fits = s->cols[j] == b->members[b->start[b->node] + j];
    for (int r = 0; fits && r < c->nranks; r++)
        fits = c->node[r] == b->node || s->rows[row++] == r;
    if (!fits)
        return ry_fail(b->err,
                       "plan of rank %d: sum needs the slice of the matrix of the exchange that is returned, by dedup",
                       b->rank);
    for (int i = 0; c->nnodes > 1 && i < s->nrows; i++) {
        uint64_t came = s->cells[(size_t)i * (size_t)s->ncols + (size_t)own];
        if (came != b->in->send[s->rows[i]])
            return ry_fail(b->err, "plan of rank %d: rank %d sent it %llu bytes, but it returns %llu", b->rank,
                           s->rows[i], (unsigned long long)came, (unsigned long long)b->in->send[s->rows[i]]);
    }
    return 0;
}

static int refuse_distinct(const struct ry_building *b, int from, int node, const struct ry_message *m)
{
    return ry_fail(
        b->err,
        "plan of rank %d: rank %d says that it found %llu distinct rows among what it sent to node %d, which was "
        "%llu rows of %llu bytes",
        b->rank, from, (unsigned long long)m->repeats.distinct, node, (unsigned long long)m->rows,
        (unsigned long long)m->repeats.row_bytes);
}

static int check_message(const struct ry_building *b, int from, int node, const struct ry_message *m,
                         struct ry_pieces p)
{
    if (m->repeats.row_bytes && m->repeats.distinct > m->rows)
        return refuse_distinct(b, from, node, m);
    if (m->packed && ry_parts(&m->repeats) > 1)
        return ry_fail(
            b->err,
            "plan of rank %d: what rank %d sent to node %d was a message in %d parts: rows that come back are in "
            "another order than its list",
            b->rank, from, node, ry_parts(&m->repeats));
    return m->packed && !divides(p, m->repeats.row_bytes) ? refuse_width(b, from, node, m->repeats.row_bytes) : 0;
}

/* What goes to one rank of another node, or comes from one node, summed or not. */
struct part {
    struct ry_message m;
    uint64_t gather, message; /* where they lie in staging memory */
};

/* All parts, and where they lie: first the remote ranks', then the nodes'. */
static int list(const struct ry_building *b, struct part *to, struct part *from, uint64_t *stage)
{
    const struct ry_cluster *c = b->cluster;
    const struct ry_slice *slice = b->in->slice;
    int own = c->local[b->rank];
    for (int i = 0; c->nnodes > 1 && i < slice->nrows; i++) {
        to[i] = (struct part){.m = message_of(slice, i), .gather = *stage};
        if (check_message(b, slice->rows[i], b->node, &to[i].m, pieces_of(slice, i)))
            return -1;
        if (!to[i].m.packed || !ry_relays(c, b->rank, slice->rows[i]))
            continue;
        *stage = ry_sum(*stage, room_to_gather(&to[i].m, pieces_of(slice, i).bytes[own]));
        to[i].message = *stage;
        *stage = ry_sum(*stage, ry_stage_room(sums_bytes(&to[i].m)));
    }
    for (int n = 0; n < c->nnodes; n++) {
        from[n] = (struct part){0};
        if (n == b->node || !b->repeats)
            continue;
        struct ry_pieces pieces = {.bytes = b->in->recv, .left = c->node_size[n], .ranks = b->members + b->start[n]};
        from[n] = (struct part){.m = ry_message_of(pieces, b->repeats[n]), .message = *stage};
        if (check_message(b, b->rank, n, &from[n].m, pieces))
            return -1;
        *stage = ry_sum(*stage, from[n].m.packed ? ry_stage_room(sums_bytes(&from[n].m)) : 0);
    }
    return *stage == UINT64_MAX
               ? ry_fail(b->err, "plan of rank %d: staging memory adds up to more than 64 bits of bytes", b->rank)
               : 0;
}

/* Rows for a rank of another node to its relay; the relay lays them out. */
static void give(struct ry_building *b, const struct part *part, int row)
{
    const struct ry_slice *slice = b->in->slice;
    const uint64_t *cells = pieces_of(slice, row).bytes;
    int s = slice->rows[row], own = b->cluster->local[b->rank], relay = b->cluster->local[s] % b->size;
    uint64_t at = part->gather;
    if (!part->m.packed || part->m.bytes == cells[relay])
        return;
    ry_step_send(b->plan, 0, slice->cols[relay], ry_at_send(s), cells[own]);
    for (int j = 0; relay == own && j < b->size; at += cells[j++])
        ry_step_recv(b->plan, 0, slice->cols[j], ry_at_stage(at), cells[j]);
}

static void add_up(struct ry_building *b, const struct part *part, int row)
{
    const struct ry_slice *slice = b->in->slice;
    int s = slice->rows[row];
    bool alone = part->m.bytes == pieces_of(slice, row).bytes[b->cluster->local[b->rank]];
    if (part->m.packed && ry_relays(b->cluster, b->rank, s))
        ry_step_add(b->plan, (struct ry_step){.kind = RY_STEP_SUM,
                                              .group = -1,
                                              .peer = s,
                                              .to = ry_at_stage(part->message),
                                              .from = alone ? ry_at_send(s) : ry_at_stage(part->gather),
                                              .bytes = sums_bytes(&part->m),
                                              .repeats = part->m.repeats,
                                              .rows = part->m.rows});
}

/* The last group: sums, and whatever goes directly. */
static void exchange(struct ry_building *b, const struct part *to, const struct part *from)
{
    const struct ry_cluster *c = b->cluster;
    int group = b->plan->ngroups - 1;
    for (int r = 0, row = 0; r < c->nranks; r++) {
        int n = c->node[r];
        const struct part *out = n == b->node ? NULL : &to[row++], *in = n == b->node ? NULL : &from[n];
        if (!out || !out->m.packed)
            ry_step_send(b->plan, group, r, ry_at_send(r), b->in->send[r]);
        else if (ry_relays(c, b->rank, r))
            ry_step_send(b->plan, group, r, ry_at_stage(out->message), sums_bytes(&out->m));
        if (!in || !in->m.packed)
            ry_step_recv(b->plan, group, r, ry_at_recv(r), b->in->recv[r]);
        else if (ry_relays(c, r, b->rank))
            ry_step_recv(b->plan, group, r, ry_at_stage(in->message), sums_bytes(&in->m));
    }
}

static void write_out(struct ry_building *b, const struct part *from)
{
    const struct ry_cluster *c = b->cluster;
    for (int n = 0; n < c->nnodes; n++) {
        const struct part *in = &from[n];
        const int *ranks = b->members + b->start[n];
        uint64_t skip = 0;
        for (int j = 0; in->m.packed && j < c->node_size[n]; j++) {
            uint64_t bytes = b->in->recv[ranks[j]];
            ry_step_add(b->plan, (struct ry_step){.kind = RY_STEP_EXPAND,
                                                  .group = -1,
                                                  .peer = ranks[c->local[b->rank] % c->node_size[n]],
                                                  .to = ry_at_recv(ranks[j]),
                                                  .from = ry_at_stage(in->message),
                                                  .bytes = bytes,
                                                  .repeats = sums_of(in->m.repeats),
                                                  .rows = in->m.rows,
                                                  .skip = skip});
            skip += ry_rows_of(bytes, in->m.repeats.row_bytes);
        }
    }
}

static size_t most_steps(const struct ry_building *b)
{
    size_t nranks = (size_t)b->cluster->nranks, size = (size_t)b->size,
           steps = 3 * nranks; /* last group, written out */
    for (int r = 0; r < b->cluster->nranks; r++)
        if (b->cluster->node[r] != b->node)
            steps += ry_relays(b->cluster, b->rank, r) ? size + 2 : 1; /* received, added up; given */
    return steps;
}

static int build(struct ry_building *b)
{
    size_t nnodes = (size_t)b->cluster->nnodes, remote = (size_t)(b->cluster->nranks - b->size);
    uint64_t stage = 0;
    if (check_slice(b))
        return -1;
    struct part *to = malloc((remote + nnodes) * sizeof *to), *from = to + remote;
    if (!to)
        return ry_fail(b->err, "no memory for the plan of rank %d", b->rank);
    int rc = list(b, to, from, &stage);
    if (!rc) {
        b->plan->ngroups = groups(b->cluster);
        b->plan->inside = b->plan->ngroups > 1 ? 1 : 0;
        b->plan->stage_bytes = stage;
        for (size_t i = 0; i < remote; i++)
            give(b, &to[i], (int)i);
        for (size_t i = 0; i < remote; i++)
            add_up(b, &to[i], (int)i);
        exchange(b, to, from);
        write_out(b, from);
    }
    free(to);
    return rc;
}

/* It needs no cells but those that were told before, so the yardmaster sends none. */
const struct ry_strategy_ops ry_sum_ops = {.name = "sum", .most_steps = most_steps, .build = build, .repeats = true};
