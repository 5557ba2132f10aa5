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
    if (m->repeats.row_bytes && m->repeats.distinct > m->rows)
        return ry_fail(b->err,
                       "plan of rank %d: rank %d says that it found %llu distinct rows among what it sends to node %d, "
                       "which is %llu rows of %llu bytes",
                       b->rank, from, (unsigned long long)m->repeats.distinct, node, (unsigned long long)m->rows,
                       (unsigned long long)m->repeats.row_bytes);
    return 0;
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

/* Copies that lay it out at `at`; neighbours in one. */
static void gather(struct ry_building *b, struct ry_pieces p, uint64_t at)
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

/* Write out the piece for local index `local`, which has `skip` rows before it. */
static void expand(struct ry_building *b, const struct arrival *a, int local, uint64_t skip, struct ry_at to)
{
    ry_step_add(b->plan, (struct ry_step){.kind = RY_STEP_EXPAND,
                                          .group = -1,
                                          .peer = a->from,
                                          .to = to,
                                          .from = ry_at_stage(a->stage),
                                          .bytes = a->cells[local],
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
            gather(b, pieces, *stage);
        *stage = ry_sum(*stage, d->room);
    }
    uint64_t at = 0;
    for (int n = 0; n < c->nnodes; n++) {
        const struct ry_departure *d = &all[n];
        if (n == b->node)
            continue;
        int relay = b->members[b->start[n] + c->local[b->rank] % c->node_size[n]];
        ry_step_send(b->plan, 0, relay, d->room ? ry_at_stage(at) : ry_at_send(d->first),
                     d->m.packed ? d->m.packed : d->m.bytes);
        at = ry_sum(at, d->room);
    }
    return 0;
}

static bool straight(const struct ry_building *b, const struct arrival *a)
{
    return !a->m.packed && a->m.bytes == b->in->recv[a->from];
}

/* What a relay writes out in its staging memory (group < 0), and sends on to the others (group 1). */
static void pass_on(struct ry_building *b, const struct arrival *a, int group)
{
    uint64_t at = a->stage + (a->m.packed ? ry_stage_room(a->m.packed) : 0), skip = 0;
    const int *members = b->members + b->start[b->node];
    for (int j = 0; j < b->size; j++) {
        bool whole = ry_passed_packed(&a->m, a->cells[j]);
        if (a->m.packed && members[j] == b->rank)
            whole = true; /* written out at the end, from where it lies */
        else if (group >= 0)
            ry_step_send(b->plan, group, members[j], ry_at_stage(whole ? a->stage : at),
                         whole ? a->m.packed : a->cells[j]);
        else if (!whole)
            expand(b, a, j, skip, ry_at_stage(at));
        if (!whole)
            at += a->m.packed ? ry_stage_room(a->cells[j]) : a->cells[j];
        skip += group < 0 ? ry_rows_of(a->cells[j], a->m.repeats.row_bytes) : 0;
    }
}

static void arrive(struct ry_building *b, const struct arrival *all, size_t n)
{
    const uint64_t *recv = b->in->recv;
    int own = b->cluster->local[b->rank];
    const int *members = b->members + b->start[b->node];
    struct ry_plan *plan = b->plan;
    for (const struct arrival *a = all; a < all + n; a++)
        if (a->mine && a->m.packed)
            ry_step_add(plan, (struct ry_step){.kind = RY_STEP_RECV,
                                               .peer = a->from,
                                               .to = ry_at_stage(a->stage),
                                               .bytes = a->m.packed,
                                               .repeats = a->m.repeats,
                                               .rows = a->m.rows});
        else if (a->mine)
            ry_step_recv(plan, 0, a->from, straight(b, a) ? ry_at_recv(a->from) : ry_at_stage(a->stage), a->m.bytes);
    for (const struct arrival *a = all; a < all + n; a++)
        if (a->mine && a->m.packed)
            pass_on(b, a, -1);
    /* Group 1. Both sides of each pair go through the sources in ascending order. */
    for (const struct arrival *a = all; a < all + n; a++) {
        bool whole = ry_passed_packed(&a->m, recv[a->from]);
        if (a->mine && !straight(b, a))
            pass_on(b, a, 1);
        if (!a->mine || (!a->m.packed && !straight(b, a)))
            ry_step_recv(plan, 1, members[b->cluster->local[a->from] % b->size],
                         whole ? ry_at_stage(a->stage) : ry_at_recv(a->from), whole ? a->m.packed : recv[a->from]);
    }
    for (const struct arrival *a = all; a < all + n; a++) {
        uint64_t skip = 0;
        if (!a->m.packed || (!a->mine && !ry_passed_packed(&a->m, recv[a->from])))
            continue;
        for (int j = 0; j < own; j++)
            skip += ry_rows_of(a->cells[j], a->m.repeats.row_bytes);
        expand(b, a, own, skip, ry_at_recv(a->from));
    }
}

size_t ry_relayed_most_steps(const struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    size_t nranks = (size_t)c->nranks, size = (size_t)b->size, relayed = 0;
    for (int r = 0; r < c->nranks; r++)
        relayed += c->node[r] != b->node && ry_relays(c, b->rank, r) ? size : 0;
    return nranks                                      /* laid out */
           + (size_t)c->nnodes                         /* across nodes, out */
           + nranks                                    /* and in */
           + 2 * size                                  /* in-node */
           + relayed + nranks                          /* passed on, received */
           + (b->ops->repeats ? relayed + nranks : 0); /* written out */
}

int ry_relayed_build(struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    const struct ry_plan_input *in = b->in;
    size_t nnodes = (size_t)c->nnodes, remote = (size_t)(c->nranks - b->size);
    struct arrival *arrivals = malloc(remote * sizeof *arrivals + nnodes * sizeof(struct ry_departure));
    if (!arrivals)
        return ry_fail(b->err, "no memory for the plan of rank %d", b->rank);
    uint64_t stage = 0;
    b->plan->ngroups = groups(c);
    b->plan->inside = b->plan->ngroups > 1 ? 1u << 1 : 0;
    int rc =
        depart(b, (struct ry_departure *)(arrivals + remote), &stage) || list_arrivals(b, arrivals, &stage) ? -1 : 0;
    if (!rc && stage == UINT64_MAX)
        rc = ry_fail(b->err, "plan of rank %d: staging memory adds up to more than 64 bits of bytes", b->rank);
    if (!rc) {
        b->plan->stage_bytes = stage;
        for (int j = 0; j < b->size; j++) {
            int p = b->members[b->start[b->node] + j];
            ry_step_send(b->plan, 0, p, ry_at_send(p), in->send[p]);
            ry_step_recv(b->plan, 0, p, ry_at_recv(p), in->recv[p]);
        }
        arrive(b, arrivals, remote);
    }
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
