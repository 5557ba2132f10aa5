/*
 * dedup.c: the strategy `dedup`, and the steps of `hierarchical`, which is dedup with nothing packed.
 *
 * Before group 0 each message to another node is laid out in staging memory: packed (PACK) where that is shorter, or
 * copied together as it is unless its pieces are neighbours in the send buffer. Group 0: to every remote node one
 * message with the pieces for all its ranks, in ascending rank order, to the relay there; and, at the same time,
 * everything that stays on the node. The two belong in one group: they use different links, so the in-node part is
 * hidden behind the slower one, where a group of its own would cost a launch and be seen. Between the groups a relay
 * writes out (EXPAND), in staging memory, the rows for those ranks that get less that way than with the whole packed
 * message. Group 1: the relays pass on the pieces, or packed messages, from where they lie in staging memory. Of
 * messages that came as they are, a relay's own pieces go the same way, as a transfer to itself: NCCL copies them while
 * the others travel, where copies of their own would come before or after. After group 1 whoever holds a packed message
 * writes out its own rows straight into place: only then, so that the links of the node do not wait for it.
 *
 * A message that goes as it is is received straight into place where the relay itself is the only one to get any of it.
 * Staging memory: first what a rank sends, then, source by source, what it gets, each followed by what of it is written
 * out. Nothing in it is used twice.
 *
 * There is at most one message per pair of ranks in group 0. In group 1 a relay sends each rank of its node one per
 * source: to merge them both sides would have to hold them as neighbours, but sources lie apart at the relay (each
 * message carries other pieces between), and the receiver cannot know otherwise.
 *
 * In K chunks, groups 0 … K - 1 bring the parts of those packed messages that have K, one after the other, and group
 * K + k passes on what group k brought, beside group k + 1. With the first part comes the index list. Everything goes
 * to the same memory as in one chunk: where parts begin follows from the counts and from how many distinct rows come
 * before them, which all ranks of the node know of all messages that come to it. Messages that are not packed go with
 * the first chunk: to send a part of each of their pieces would take a transfer for each.
 */
#include <stdlib.h>

#include "relayed.h"

static bool row(const struct ry_cluster *c, int rank, int other)
{
    return c->node[other] != c->node[rank];
}

bool ry_relayed_column(const struct ry_cluster *c, int rank, int other)
{
    return c->node[other] == c->node[rank];
}

/* The same on all ranks, so from the map alone. Where every rank is alone on its node, nothing is passed on. */
static int groups(const struct ry_cluster *c)
{
    return c->nnodes > 1 && c->nnodes < c->nranks ? 2 : 1;
}

/* What comes in from rank `from` of another node. */
struct arrival {
    int from;
    bool mine;             /* this rank is its relay */
    const uint64_t *cells; /* [size] its pieces; NULL where this rank need not know */
    struct ry_message m;
    uint64_t stage; /* where it lies */
};

static struct ry_pieces pieces_of(const struct ry_building *b, const struct arrival *a)
{
    return (struct ry_pieces){.bytes = a->cells, .left = b->size};
}

static int check_repeats(const struct ry_building *b, int from, int node, const struct ry_message *m)
{
    if (!m->repeats.row_bytes)
        return 0;
    if (m->repeats.distinct > m->rows)
        return ry_fail(b->err,
                       "plan of rank %d: rank %d says that it found %llu distinct rows among what it sends to node %d, "
                       "which is %llu rows of %llu bytes",
                       b->rank, from, (unsigned long long)m->repeats.distinct, node, (unsigned long long)m->rows,
                       (unsigned long long)m->repeats.row_bytes);
    bool ascending = m->repeats.parts <= 2 || m->repeats.parts == RY_CHUNKS;
    for (int p = 0; ascending && p < ry_parts(&m->repeats); p++)
        ascending = ry_part_distinct(&m->repeats, p) <= ry_part_distinct(&m->repeats, p + 1);
    if (!ascending)
        return ry_fail(b->err, "plan of rank %d: the parts of what rank %d sends to node %d contradict each other",
                       b->rank, from, node);
    return 0;
}

/* Part of something: from here, so much. */
struct range {
    uint64_t from, length;
};

/* Does the message cross in chunks? Else it goes with the first. */
static bool cut(const struct ry_building *b, const struct ry_message *m)
{
    return b->chunks > 1 && m->packed && ry_parts(&m->repeats) == b->chunks;
}

/* Of a packed message's distinct rows, those that come with chunk `k`. */
static struct range distinct_in(const struct ry_building *b, const struct ry_message *m, int k)
{
    if (!cut(b, m))
        return (struct range){0, k ? 0 : m->repeats.distinct};
    uint64_t from = ry_part_distinct(&m->repeats, k);
    return (struct range){from, ry_part_distinct(&m->repeats, k + 1) - from};
}

/* Of a piece of `bytes`, what is in part `p`: in bytes of the piece. */
static struct range part_of(const struct ry_message *m, uint64_t bytes, int p)
{
    int parts = ry_parts(&m->repeats);
    if (parts == 1)
        return (struct range){0, bytes};
    uint64_t width = m->repeats.row_bytes, rows = ry_rows_of(bytes, width), from = ry_part_at(rows, p, parts) * width,
             end = p + 1 == parts ? bytes : ry_part_at(rows, p + 1, parts) * width;
    return (struct range){from, end - from};
}

/* The same for chunk `k`. */
static struct range piece_in(const struct ry_building *b, const struct ry_message *m, uint64_t bytes, int k)
{
    return cut(b, m) ? part_of(m, bytes, k) : (struct range){0, k ? 0 : bytes};
}

/* The parts of a packed message that chunk `k` brings. */
static struct range parts_in(const struct ry_building *b, const struct ry_message *m, int k)
{
    return cut(b, m) ? (struct range){(uint64_t)k, 1} : (struct range){0, k ? 0 : (uint64_t)ry_parts(&m->repeats)};
}

/* Rows that are listed before part `p`. */
static uint64_t listed_before(const struct ry_building *b, const struct arrival *a, int p)
{
    uint64_t rows = 0;
    for (int j = 0; p && j < b->size; j++)
        rows += ry_part_at(ry_rows_of(a->cells[j], a->m.repeats.row_bytes), p, ry_parts(&a->m.repeats));
    return rows;
}

static uint64_t list_at(const struct ry_message *m)
{
    return ry_packed_bytes(m->repeats, 0);
}

/* All arrivals, in ascending rank, staged from *stage on. */
static int list_arrivals(const struct ry_building *b, struct arrival *a, uint64_t *stage)
{
    const struct ry_cluster *c = b->cluster;
    const struct ry_slice *slice = b->in->slice;
    for (int from = 0, i = 0; from < c->nranks; from++) {
        if (c->node[from] == b->node)
            continue;
        *a = (struct arrival){.from = from, .mine = ry_relays(c, b->rank, from), .stage = *stage};
        struct ry_repeats its = {0};
        if (b->ops->row(c, b->rank, from)) {
            a->cells = slice->cells + (size_t)i * (size_t)slice->ncols;
            its = slice->repeats ? slice->repeats[i] : its;
            i++;
        } else if (a->mine) { /* alone on its node */
            a->cells = b->in->recv + from;
        }
        if (a->cells) {
            a->m = ry_message_of(pieces_of(b, a), its);
            if (a->m.bytes == UINT64_MAX)
                return ry_fail(b->err,
                               "plan of rank %d: what rank %d sends to node %d adds up to more than 64 bits of bytes",
                               b->rank, from, b->node);
            if (check_repeats(b, from, b->node, &a->m))
                return -1;
            *stage = ry_sum(*stage, a->mine ? ry_room_on_relay(&a->m, pieces_of(b, a), c->local[b->rank])
                                            : ry_room_behind_relay(&a->m, b->in->recv[from]));
        }
        a++;
    }
    return 0;
}

void ry_gather(struct ry_building *b, struct ry_pieces p, uint64_t at)
{
    const uintptr_t *send_at = b->in->send_at;
    int first = -1;
    uint64_t bytes = 0;
    for (int r; ry_next_piece(&p, &r);) {
        if (!p.bytes[r])
            continue;
        if (bytes && send_at && send_at[r] == send_at[first] + bytes) {
            bytes += p.bytes[r];
            continue;
        }
        ry_step_copy(b->plan, ry_at_stage(at), ry_at_send(first), bytes);
        at += bytes;
        first = r;
        bytes = p.bytes[r];
    }
    ry_step_copy(b->plan, ry_at_stage(at), ry_at_send(first), bytes);
}

/* Write out `part` of a piece, which is listed after `skip` rows of the message. */
static void expand(struct ry_building *b, const struct arrival *a, uint64_t skip, struct range part, struct ry_at to)
{
    to.offset += part.from;
    ry_step_add(b->plan, (struct ry_step){.kind = RY_STEP_EXPAND,
                                          .group = -1,
                                          .peer = a->from,
                                          .to = to,
                                          .from = ry_at_stage(a->stage),
                                          .bytes = part.length,
                                          .repeats = a->m.repeats,
                                          .rows = a->m.rows,
                                          .skip = skip});
}

/* Before group 0, and its messages to other nodes: all are laid out before the first is sent. */
static int depart(struct ry_building *b, struct ry_departure *all, uint64_t *stage)
{
    const struct ry_cluster *c = b->cluster;
    for (int n = 0; n < c->nnodes; n++) {
        struct ry_departure *d = &all[n];
        struct ry_pieces pieces = {.bytes = b->in->send, .left = c->node_size[n], .ranks = b->members + b->start[n]};
        if (n == b->node)
            continue;
        *d = ry_departure_of(pieces, b->in->send_at, b->repeats ? b->repeats[n] : (struct ry_repeats){0});
        if (check_repeats(b, b->rank, n, &d->m))
            return -1;
        if (d->m.packed)
            ry_step_add(b->plan, (struct ry_step){.kind = RY_STEP_PACK,
                                                  .group = -1,
                                                  .peer = n,
                                                  .to = ry_at_stage(*stage),
                                                  .bytes = d->m.packed,
                                                  .repeats = d->m.repeats,
                                                  .rows = d->m.rows});
        else if (d->room)
            ry_gather(b, pieces, *stage);
        *stage = ry_sum(*stage, d->room);
    }
    return 0;
}

/* Chunk `k` of the messages to other nodes. */
static void leave(struct ry_building *b, const struct ry_departure *all, int k)
{
    const struct ry_cluster *c = b->cluster;
    uint64_t at = 0;
    for (int n = 0; n < c->nnodes; n++) {
        const struct ry_departure *d = &all[n];
        if (n == b->node)
            continue;
        int relay = b->members[b->start[n] + c->local[b->rank] % c->node_size[n]];
        if (cut(b, &d->m)) {
            struct range rows = distinct_in(b, &d->m, k);
            uint64_t list = list_at(&d->m);
            ry_step_send(b->plan, k, relay, ry_at_stage(at + rows.from * d->m.repeats.row_bytes),
                         rows.length * d->m.repeats.row_bytes);
            ry_step_send(b->plan, k, relay, ry_at_stage(at + list), k ? 0 : d->m.packed - list);
        } else if (!k) {
            ry_step_send(b->plan, k, relay, d->room ? ry_at_stage(at) : ry_at_send(d->first),
                         d->m.packed ? d->m.packed : d->m.bytes);
        }
        at = ry_sum(at, d->room);
    }
}

static bool straight(const struct ry_building *b, const struct arrival *a)
{
    return !a->m.packed && a->m.bytes == b->in->recv[a->from];
}

/* What chunk `k` brings of a packed message, from a relay to rank `to`, or on its way from rank `from`: where it lies
 * is the same. */
static void move_packed(struct ry_building *b, const struct arrival *a, int group, int k, int to, int from,
                        bool relayed)
{
    struct range rows = distinct_in(b, &a->m, k);
    uint64_t width = a->m.repeats.row_bytes, list = list_at(&a->m);
    struct range parts[2] = {{rows.from * width, rows.length * width}, {list, k ? 0 : a->m.packed - list}};
    if (!cut(b, &a->m))
        parts[0] = (struct range){0, k ? 0 : a->m.packed}, parts[1].length = 0;
    for (int i = 0; i < 2; i++) {
        struct ry_step s = {.kind = to >= 0 ? RY_STEP_SEND : RY_STEP_RECV,
                            .group = group,
                            .peer = to >= 0 ? to : from,
                            .bytes = parts[i].length};
        *(to >= 0 ? &s.from : &s.to) = ry_at_stage(a->stage + parts[i].from);
        if (relayed && parts[i].from + parts[i].length == a->m.packed) { /* with the list */
            s.from = ry_at_stage(a->stage);
            s.repeats = a->m.repeats;
            s.rows = a->m.rows;
        }
        ry_step_add(b->plan, s);
    }
}

/* What a relay writes out, in its staging memory, of what chunk `k` brought. */
static void write_out(struct ry_building *b, const struct arrival *a, int k)
{
    struct range parts = parts_in(b, &a->m, k);
    const int *members = b->members + b->start[b->node];
    for (uint64_t p = parts.from; p < parts.from + parts.length; p++) {
        uint64_t at = a->stage + ry_stage_room(a->m.packed), skip = listed_before(b, a, (int)p);
        for (int j = 0; j < b->size; j++) {
            struct range part = part_of(&a->m, a->cells[j], (int)p);
            bool here = members[j] != b->rank && !ry_passed_packed(&a->m, a->cells[j]);
            if (here)
                expand(b, a, skip, part, ry_at_stage(at));
            at += here ? ry_stage_room(a->cells[j]) : 0;
            skip += ry_rows_of(part.length, a->m.repeats.row_bytes);
        }
    }
}

/* And what it sends on. */
static void pass_on(struct ry_building *b, const struct arrival *a, int group, int k)
{
    uint64_t at = a->stage + (a->m.packed ? ry_stage_room(a->m.packed) : 0);
    const int *members = b->members + b->start[b->node];
    for (int j = 0; j < b->size; j++) {
        struct range part = piece_in(b, &a->m, a->cells[j], k);
        if (a->m.packed && members[j] == b->rank)
            continue; /* written out at the end, from where it lies */
        if (ry_passed_packed(&a->m, a->cells[j])) {
            move_packed(b, a, group, k, members[j], -1, false);
            continue;
        }
        ry_step_send(b->plan, group, members[j], ry_at_stage(at + part.from), part.length);
        at += a->m.packed ? ry_stage_room(a->cells[j]) : a->cells[j];
    }
}

/* Whoever holds a packed message writes its own rows into place. */
static void put_in_place(struct ry_building *b, const struct arrival *a, int k)
{
    struct range parts = parts_in(b, &a->m, k);
    int own = b->cluster->local[b->rank];
    for (uint64_t p = parts.from; p < parts.from + parts.length; p++) {
        uint64_t skip = listed_before(b, a, (int)p);
        for (int j = 0; j < own; j++)
            skip += ry_rows_of(part_of(&a->m, a->cells[j], (int)p).length, a->m.repeats.row_bytes);
        expand(b, a, skip, part_of(&a->m, a->cells[own], (int)p), ry_at_recv(a->from));
    }
}

/* What chunk `k` brings from other nodes to be relayed. */
static void arrive(struct ry_building *b, const struct arrival *all, size_t n, int k)
{
    for (const struct arrival *a = all; a < all + n; a++) {
        if (a->mine && a->m.packed)
            move_packed(b, a, k, k, -1, a->from, true);
        else if (a->mine && !k)
            ry_step_recv(b->plan, 0, a->from, straight(b, a) ? ry_at_recv(a->from) : ry_at_stage(a->stage), a->m.bytes);
    }
}

/* What chunk `k` brought: written out, passed on, and put in place. Both sides of each pair go through the sources in
 * ascending order. */
static void deliver(struct ry_building *b, const struct arrival *all, size_t n, int k)
{
    const uint64_t *recv = b->in->recv;
    const int *members = b->members + b->start[b->node];
    int group = b->chunks + k;
    for (const struct arrival *a = all; a < all + n; a++)
        if (a->mine && a->m.packed)
            write_out(b, a, k);
    for (const struct arrival *a = all; a < all + n; a++) {
        int relay = members[b->cluster->local[a->from] % b->size];
        if (a->mine && !straight(b, a))
            pass_on(b, a, group, k);
        if (a->mine && (a->m.packed || straight(b, a)))
            continue;
        struct range part = piece_in(b, &a->m, recv[a->from], k);
        if (ry_passed_packed(&a->m, recv[a->from]))
            move_packed(b, a, group, k, -1, relay, false);
        else
            ry_step_recv(b->plan, group, relay, (struct ry_at){RY_AT_RECV, a->from, part.from}, part.length);
    }
    for (const struct arrival *a = all; a < all + n; a++)
        if (a->m.packed && (a->mine || ry_passed_packed(&a->m, recv[a->from])))
            put_in_place(b, a, k);
}

/* Of any message that comes here. */
static size_t most_parts(const struct ry_building *b)
{
    size_t most = 1;
    const struct ry_slice *slice = b->ops->repeats ? b->in->slice : NULL;
    for (int i = 0; slice && slice->repeats && i < slice->nrows; i++)
        if (slice->repeats[i].parts > most && slice->repeats[i].parts <= RY_CHUNKS)
            most = (size_t)slice->repeats[i].parts;
    return most;
}

size_t ry_relayed_most_steps(const struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    size_t nranks = (size_t)c->nranks, size = (size_t)b->size, relayed = 0;
    for (int r = 0; r < c->nranks; r++)
        relayed += c->node[r] != b->node && ry_relays(c, b->rank, r) ? size : 0;
    size_t transfers = (size_t)c->nnodes                  /* across nodes, out */
                       + nranks                           /* and in */
                       + relayed + nranks,                /* passed on, received */
        writing = b->ops->repeats ? relayed + nranks : 0; /* written out */
    size_t chunks = (size_t)b->chunks;
    return nranks     /* laid out */
           + 2 * size /* in-node */
           + (chunks > 1 ? (chunks + 1) * transfers : transfers) + most_parts(b) * writing;
}

int ry_relayed_build(struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    const struct ry_plan_input *in = b->in;
    size_t nnodes = (size_t)c->nnodes, remote = (size_t)(c->nranks - b->size);
    struct arrival *arrivals = malloc(remote * sizeof *arrivals + nnodes * sizeof(struct ry_departure));
    if (!arrivals)
        return ry_fail(b->err, "no memory for the plan of rank %d", b->rank);
    struct ry_departure *departures = (struct ry_departure *)(arrivals + remote);
    struct ry_plan *plan = b->plan;
    uint64_t stage = 0;
    plan->ngroups = groups(c) * b->chunks;
    plan->inside = groups(c) > 1 ? ((1u << b->chunks) - 1) << b->chunks : 0;
    int rc = depart(b, departures, &stage) || list_arrivals(b, arrivals, &stage) ? -1 : 0;
    if (!rc && stage == UINT64_MAX)
        rc = ry_fail(b->err, "plan of rank %d: staging memory adds up to more than 64 bits of bytes", b->rank);
    for (int k = 0; !rc && k < b->chunks; k++) {
        leave(b, departures, k);
        for (int j = 0; !k && j < b->size; j++) {
            int p = b->members[b->start[b->node] + j];
            ry_step_send(plan, 0, p, ry_at_send(p), in->send[p]);
            ry_step_recv(plan, 0, p, ry_at_recv(p), in->recv[p]);
        }
        arrive(b, arrivals, remote, k);
    }
    plan->stage_bytes = stage;
    int second = plan->nsteps;
    for (int k = 0; !rc && k < b->chunks; k++) {
        int first = plan->nsteps;
        deliver(b, arrivals, remote, k);
        for (int i = first; i < plan->nsteps; i++)
            plan->steps[i].after = k;
    }
    plan->beside = b->chunks > 1 ? plan->nsteps - second : 0;
    free(arrivals);
    return rc;
}

const struct ry_strategy_ops ry_dedup_ops = {.name = "dedup",
                                             .row = row,
                                             .column = ry_relayed_column,
                                             .most_steps = ry_relayed_most_steps,
                                             .build = ry_relayed_build,
                                             .stage_relay = ry_relayed_stage_relay,
                                             .stage_pack = ry_relayed_stage_pack,
                                             .stage_all = ry_relayed_stage_all,
                                             .repeats = true};
