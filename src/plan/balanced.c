/*
 * balanced.c: the strategy `balanced`: every rail carries as much, and stages of one-to-one transfers between nodes.
 *
 * Owns: its steps, its staging memory, and the words of its slices. Not: which rank carries what across
 * (balanced_line.h), nor in which stage (birkhoff.h).
 *
 * Before group 0 what goes to each node is copied together unless it is neighbours in the send buffer. Group 0: what
 * ranks have more of than their share goes to those that have less, inside the node. Groups 1 … K, the stages: of the
 * bytes that cross between two nodes in a stage each pair of ranks has its part, by the length of its flow; a flow is
 * what of a sender's share, kept or moved, is in one receiver's. So between nodes of one size a rank sends in each
 * stage at most two messages, both to its rail: of its own bytes, from where they lie, and of others', from staging
 * memory. What stays in the node goes beside them, in the group in which its node has most to send or get. Group K + 1:
 * receivers pass on what is for others of their node, and to themselves what is for them, unless a flow is one piece
 * for them: it is received straight into place. A rank that is alone on its node, and may have no communicator for
 * that, copies.
 *
 * Each group costs its latency, so there are no more than MOST_TURNS between nodes: if there are more stages, some are
 * carried out at once, as many in each group, and in such a group a node has so many partners at most. Groups 0 and K +
 * 1 stay inside the nodes. Staging memory: what is packed, by node; what others give to be sent, by node; what comes,
 * by node. Nothing in it is used twice.
 *
 * Words of a slice: [ranks of the node][nodes] bytes, then three for each stage that there could be: its node's
 * partners (0: there is no such stage), bytes out, bytes in.
 */
#include <stdlib.h>
#include <string.h>

#include "balanced_line.h"
#include "birkhoff.h"
#include "relayed.h"

#define MOST_TURNS 32 /* groups between nodes */
#define STAGE_WORDS 3
#define STAGE_IS (UINT64_C(1) << 63)

/* ---- the slice ---- */

static bool row(const struct ry_cluster *c, int rank, int other)
{
    return c->node[other] != c->node[rank];
}

static size_t words(const struct ry_cluster *c, int node)
{
    return (size_t)c->node_size[node] * (size_t)c->nnodes + STAGE_WORDS * (size_t)ry_stages_most(c->nnodes);
}

struct ry_balance {
    uint64_t *sums; /* [nranks][nnodes] what each rank sends to each node */
    struct ry_stages stages;
};

struct ry_balance *ry_balance_of(const struct ry_cluster *c, const uint64_t *matrix, struct ry_err *err)
{
    size_t nranks = (size_t)c->nranks, nnodes = (size_t)c->nnodes;
    struct ry_balance *b = calloc(1, sizeof *b + (nranks + nnodes) * nnodes * sizeof *b->sums);
    if (!b)
        return ry_fail(err, "no memory for the stages of %d nodes", c->nnodes), NULL;
    b->sums = (uint64_t *)(b + 1);
    uint64_t *nodes = b->sums + nranks * nnodes;
    for (size_t from = 0; from < nranks; from++) {
        uint64_t *sums = b->sums + from * nnodes, *node = nodes + (size_t)c->node[from] * nnodes;
        for (size_t to = 0; to < nranks; to++)
            sums[c->node[to]] = ry_sum(sums[c->node[to]], matrix[from * nranks + to]);
        for (size_t n = 0; n < nnodes; n++)
            node[n] = ry_sum(node[n], sums[n]);
    }
    if (!ry_stages_find(&b->stages, c->nnodes, nodes, err))
        return b;
    free(b);
    return NULL;
}

void ry_balance_free(struct ry_balance *b)
{
    if (b)
        ry_stages_free(&b->stages);
    free(b);
}

void ry_balance_words(const struct ry_balance *b, const struct ry_cluster *c, int node, uint64_t *out)
{
    size_t nnodes = (size_t)c->nnodes;
    for (int r = c->node_first[node]; r < c->nranks; r++)
        if (c->node[r] == node)
            memcpy(out + (size_t)c->local[r] * nnodes, b->sums + (size_t)r * nnodes, nnodes * sizeof *out);
    out += (size_t)c->node_size[node] * nnodes;
    memset(out, 0, STAGE_WORDS * (size_t)ry_stages_most(c->nnodes) * sizeof *out);
    for (int s = 0; s < b->stages.count; s++, out += STAGE_WORDS) {
        const struct ry_stage *at = b->stages.at + (size_t)s * nnodes;
        out[0] = STAGE_IS | (uint64_t)(at[node].to + 1) << 31;
        out[1] = at[node].bytes;
        for (int from = 0; from < c->nnodes; from++)
            if (at[from].to == node) {
                out[0] |= (uint64_t)(from + 1);
                out[2] = at[from].bytes;
            }
    }
}

static void fill_words(const struct ry_cluster *c, int node, const uint64_t *matrix, uint64_t *out)
{
    struct ry_balance *b = ry_balance_of(c, matrix, NULL);
    if (b)
        ry_balance_words(b, c, node, out);
    ry_balance_free(b);
}

/* A stage as the node's words tell it. */
struct turn {
    int to, from; /* -1: none */
    uint64_t out, in;
};
static bool get_turn(const struct ry_building *b, int stage, struct turn *t)
{
    const struct ry_cluster *c = b->cluster;
    const uint64_t *w = b->in->slice->words + (size_t)b->size * (size_t)c->nnodes + STAGE_WORDS * (size_t)stage;
    if (stage >= ry_stages_most(c->nnodes) || !(w[0] & STAGE_IS))
        return false;
    *t = (struct turn){(int)(w[0] >> 31 & 0x7FFFFFFF) - 1, (int)(w[0] & 0x7FFFFFFF) - 1, w[1], w[2]};
    return t->to < c->nnodes && t->from < c->nnodes;
}

/* Stages share groups if there are too many. */
static int group_of(int stage, int stages)
{
    return 1 + (stages < MOST_TURNS ? stage : (int)((long)stage * MOST_TURNS / stages));
}

static size_t most_steps(const struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    size_t size = (size_t)b->size, nnodes = (size_t)c->nnodes, n = (size_t)c->nranks + 2 * size * (nnodes + 1);
    struct turn t;
    if (nnodes < 2)
        return n;
    for (int s = 0; get_turn(b, s, &t); s++)
        n += (t.to < 0 ? 0 : (size_t)c->node_size[t.to] + 1) +
             (t.from < 0 ? 0 : 2 * (size_t)c->node_size[t.from] + size);
    for (size_t a = 0; a < nnodes; a++) /* cells, cut where parts and shares begin */
        n += 2 * ((size_t)c->node_size[a] * (size + 3) + size);
    return n;
}

/* ---- staging memory ---- */

struct scratch {
    struct ry_line line;
    const uint64_t **cells; /* [largest node] */
    uint64_t *bytes;        /* [largest node] */
};

static int get_scratch(struct scratch *s, const struct ry_cluster *c, struct ry_err *err)
{
    size_t most = 1;
    for (int n = 0; n < c->nnodes; n++)
        most = (size_t)c->node_size[n] > most ? (size_t)c->node_size[n] : most;
    struct ry_line_part *parts =
        malloc(RY_LINE_PARTS(most) * sizeof *parts + 2 * most * sizeof(uint64_t) + most * sizeof *s->cells);
    if (!parts)
        return ry_fail(err, "no memory to balance %d ranks", c->nranks);
    uint64_t *numbers = (uint64_t *)(parts + RY_LINE_PARTS(most));
    *s = (struct scratch){.line = {.parts = parts, .ends = numbers}, .bytes = numbers + most};
    s->cells = (const uint64_t **)(numbers + 2 * most);
    return 0;
}

static void free_scratch(struct scratch *s)
{
    free(s->line.parts);
}

/* Of the shares on the line: for what others give its holder; for what its receiver gets. */
static uint64_t room_to_send(const struct ry_line *l, int holder)
{
    for (int i = 0; i < l->nparts; i++)
        if (l->parts[i].holder == holder && l->parts[i].moved)
            return ry_stage_room(l->parts[i].range_end - l->parts[i].range_at);
    return 0;
}

static uint64_t room_to_get(const struct ry_line *l, int receiver)
{
    return ry_stage_room(l->ends[receiver] - (receiver ? l->ends[receiver - 1] : 0));
}

/* Which ranks of which node are where: as struct ry_building has it, for those who have none. */
struct seats {
    int *start, *members;
};
static int get_seats(struct seats *s, const struct ry_cluster *c, struct ry_err *err)
{
    s->start = malloc(((size_t)c->nnodes + (size_t)c->nranks) * sizeof *s->start);
    if (!s->start)
        return ry_fail(err, "no memory for the staging needs of %d ranks", c->nranks);
    s->members = s->start + c->nnodes;
    for (int n = 0, at = 0; n < c->nnodes; at += c->node_size[n++])
        s->start[n] = at;
    for (int r = 0; r < c->nranks; r++)
        s->members[s->start[c->node[r]] + c->local[r]] = r;
    return 0;
}

/* What node `from` sends to node `to`, by the full matrix: adds what `rank` (-1: each of them) needs to need[rank]. */
static void need_of_pair(struct scratch *s, const struct ry_cluster *c, const struct seats *seats,
                         const uint64_t *matrix, int from, int to, int rank, uint64_t *need)
{
    const int *senders = seats->members + seats->start[from], *receivers = seats->members + seats->start[to];
    int nsenders = c->node_size[from], nreceivers = c->node_size[to];
    for (int i = 0; i < nsenders; i++) {
        s->cells[i] = matrix + (size_t)senders[i] * (size_t)c->nranks;
        s->bytes[i] = 0;
        for (int j = 0; j < nreceivers; j++)
            s->bytes[i] = ry_sum(s->bytes[i], s->cells[i][receivers[j]]);
    }
    ry_line_lay(&s->line, s->bytes, 1, nsenders, nreceivers);
    bool too_much = s->line.total == UINT64_MAX;
    for (int i = 0; i < nsenders; i++)
        if (rank < 0 || senders[i] == rank)
            need[senders[i]] = ry_sum(need[senders[i]], too_much ? UINT64_MAX : room_to_send(&s->line, i));
    struct ry_line_walk w = {.line = &s->line, .cells = s->cells, .columns = receivers};
    while (!too_much && (rank < 0 || c->node[rank] == to) && ry_line_next(&w)) {
        int m = w.piece.receiver;
        if (ry_line_straight(&w.piece))
            continue;
        ry_line_skip(&w, s->line.ends[m]); /* it needs room, whatever else comes */
        if (rank < 0 || receivers[m] == rank)
            need[receivers[m]] = ry_sum(need[receivers[m]], room_to_get(&s->line, m));
    }
}

static int stage_all(const struct ry_cluster *c, const uint64_t *matrix, const struct ry_repeats *repeats,
                     uint64_t *relay, uint64_t *pack, struct ry_err *err)
{
    struct scratch s;
    struct seats seats;
    (void)repeats;
    if (get_scratch(&s, c, err))
        return -1;
    if (get_seats(&seats, c, err)) {
        free_scratch(&s);
        return -1;
    }
    for (int from = 0; from < c->nnodes; from++)
        for (int to = 0; to < c->nnodes; to++)
            if (from != to)
                need_of_pair(&s, c, &seats, matrix, from, to, -1, relay);
    for (int r = 0; r < c->nranks; r++)
        pack[r] = ry_relayed_stage_pack(c, r, matrix + (size_t)r * (size_t)c->nranks, NULL, NULL);
    free(seats.start);
    free_scratch(&s);
    return 0;
}

static uint64_t stage_relay(const struct ry_cluster *c, int rank, const uint64_t *matrix,
                            const struct ry_repeats *repeats)
{
    struct scratch s;
    struct seats seats;
    uint64_t *need = calloc((size_t)c->nranks, sizeof *need), most = UINT64_MAX;
    (void)repeats;
    if (need && !get_scratch(&s, c, NULL)) {
        if (!get_seats(&seats, c, NULL)) {
            for (int n = 0; n < c->nnodes; n++) {
                if (n == c->node[rank])
                    continue;
                need_of_pair(&s, c, &seats, matrix, c->node[rank], n, rank, need);
                need_of_pair(&s, c, &seats, matrix, n, c->node[rank], rank, need);
            }
            most = need[rank];
            free(seats.start);
        }
        free_scratch(&s);
    }
    free(need);
    return most;
}

/* ---- building ---- */

/* What this rank sends to, or gets from, one rank of another node over all stages. */
struct flow {
    int peer;
    uint64_t bytes;
    bool first_of_all; /* a sender's own: `at` is where in what it sends to the node, packed or not */
    struct ry_at at;   /* where it begins */
};
/* All flows to or from a node, and how far they have come. */
struct flows {
    struct flow *flow;
    int count;
    uint64_t total, done; /* of all bytes between the two nodes */
};
struct balancing {
    struct ry_building *b;
    struct scratch s;
    struct ry_departure *departures;          /* [nnodes] */
    struct flows *out, *in;                   /* [nnodes] */
    uint64_t *packed_at, *moved_at, *come_at; /* [nnodes] in staging memory */
    struct flow *flow;
    int *row_of; /* [nranks] in the slice */
    int self;    /* local index */
    uint64_t stage;
};

static int too_many(const struct ry_building *b)
{
    return ry_fail(b->err, "plan of rank %d: what nodes send to each other adds up to more than 64 bits of bytes",
                   b->rank);
}

static void lay_out(struct balancing *x, int to)
{
    const struct ry_cluster *c = x->b->cluster;
    ry_line_lay(&x->s.line, x->b->in->slice->words + to, (size_t)c->nnodes, x->b->size, c->node_size[to]);
}

/* What node `from` sends to this one. */
static struct ry_line_walk lay_in(struct balancing *x, int from)
{
    const struct ry_building *b = x->b;
    const struct ry_slice *slice = b->in->slice;
    int senders = b->cluster->node_size[from];
    for (int i = 0; i < senders; i++) {
        const uint64_t *cells = slice->cells + (size_t)x->row_of[b->members[b->start[from] + i]] * (size_t)slice->ncols;
        x->s.cells[i] = cells;
        x->s.bytes[i] = 0;
        for (int j = 0; j < b->size; j++)
            x->s.bytes[i] = ry_sum(x->s.bytes[i], cells[j]);
    }
    ry_line_lay(&x->s.line, x->s.bytes, 1, senders, b->size);
    return (struct ry_line_walk){.line = &x->s.line, .cells = x->s.cells};
}

/* Where the byte at `offset` of what goes to `node` lies. */
static struct ry_at own_at(const struct balancing *x, int node, uint64_t offset)
{
    const struct ry_building *b = x->b;
    if (x->departures[node].room)
        return ry_at_stage(x->packed_at[node] + offset);
    const int *rank = b->members + b->start[node];
    while (b->in->send[*rank] <= offset)
        offset -= b->in->send[*rank++];
    return (struct ry_at){RY_AT_SEND, *rank, offset};
}

static int depart(struct balancing *x)
{
    struct ry_building *b = x->b;
    const struct ry_cluster *c = b->cluster;
    for (int n = 0; n < c->nnodes; n++) {
        struct ry_pieces pieces = {.bytes = b->in->send, .left = c->node_size[n], .ranks = b->members + b->start[n]};
        if (n == b->node)
            continue;
        x->departures[n] = ry_departure_of(pieces, b->in->send_at, (struct ry_repeats){0});
        uint64_t told = b->in->slice->words[(size_t)x->self * (size_t)c->nnodes + (size_t)n];
        if (told != x->departures[n].m.bytes)
            return ry_fail(
                b->err,
                "plan of rank %d: its slice of the matrix says that it sends node %d %llu bytes, but it sends %llu",
                b->rank, n, (unsigned long long)told, (unsigned long long)x->departures[n].m.bytes);
        x->packed_at[n] = x->stage;
        if (x->departures[n].room)
            ry_gather(b, pieces, x->stage);
        x->stage = ry_sum(x->stage, x->departures[n].room);
    }
    return 0;
}

/* Group 0, and what this rank will send across. */
static int spread(struct balancing *x)
{
    struct ry_building *b = x->b;
    const struct ry_cluster *c = b->cluster;
    const struct ry_line *l = &x->s.line;
    for (int n = 0; n < c->nnodes; n++) {
        if (n == b->node)
            continue;
        lay_out(x, n);
        if (l->total == UINT64_MAX)
            return too_many(b);
        struct flows *out = &x->out[n];
        *out = (struct flows){.flow = x->flow, .total = l->total};
        x->moved_at[n] = x->stage;
        x->stage = ry_sum(x->stage, room_to_send(l, x->self));
        uint64_t range_at = UINT64_MAX; /* whose flows are known */
        for (int i = 0; i < l->nparts; i++) {
            const struct ry_line_part *p = &l->parts[i];
            int holder = b->members[b->start[b->node] + p->holder], source = b->members[b->start[b->node] + p->source];
            if (p->moved && p->source == x->self)
                ry_step_send(b->plan, 0, holder, own_at(x, n, p->from), p->bytes);
            if (p->holder != x->self)
                continue;
            if (p->moved)
                ry_step_recv(b->plan, 0, source, ry_at_stage(x->moved_at[n] + p->at - p->range_at), p->bytes);
            if (p->range_at == range_at)
                continue;
            range_at = p->range_at;
            int m = 0;
            for (uint64_t at = range_at; at < p->range_end; m++) {
                if (l->ends[m] <= at)
                    continue;
                uint64_t end = l->ends[m] < p->range_end ? l->ends[m] : p->range_end;
                *x->flow++ =
                    (struct flow){.peer = b->members[b->start[n] + m],
                                  .bytes = end - at,
                                  .first_of_all = !p->moved,
                                  .at = ry_at_stage(p->moved ? x->moved_at[n] + at - range_at : at - range_at)};
                out->count++;
                at = end;
            }
        }
    }
    return 0;
}

/* What this rank will get from other nodes, and where that goes. */
static int expect(struct balancing *x)
{
    struct ry_building *b = x->b;
    const struct ry_cluster *c = b->cluster;
    for (int n = 0; n < c->nnodes; n++) {
        if (n == b->node)
            continue;
        struct ry_line_walk w = lay_in(x, n);
        struct flows *in = &x->in[n];
        if (w.line->total == UINT64_MAX)
            return too_many(b);
        *in = (struct flows){.flow = x->flow, .total = w.line->total};
        x->come_at[n] = x->stage;
        uint64_t begin = UINT64_MAX, room = 0, share = x->self ? w.line->ends[x->self - 1] : 0;
        while (ry_line_next(&w) && w.piece.receiver <= x->self) {
            const struct ry_line_piece *p = &w.piece;
            const int *senders = b->members + b->start[n];
            if (p->receiver < x->self || p->begin == begin)
                continue;
            begin = p->begin;
            bool straight = ry_line_straight(p);
            room = straight ? room : room_to_get(w.line, x->self);
            *x->flow++ = (struct flow){.peer = senders[p->part->holder],
                                       .bytes = p->end - begin,
                                       .at = straight ? (struct ry_at){RY_AT_RECV, senders[p->part->source], p->from}
                                                      : ry_at_stage(x->stage + begin - share)};
            in->count++;
        }
        x->stage = ry_sum(x->stage, room);
    }
    return 0;
}

static uint64_t part_of(uint64_t bytes, uint64_t done, uint64_t total)
{
    uint64_t at = (uint64_t)((unsigned __int128)bytes * done / total);
    return done == total ? bytes : at - at % RY_GRAIN;
}

/* So many bytes between two nodes cross in group `group`: -1 if there are not as many. */
static int cross(struct balancing *x, int group, int node, bool sends, uint64_t bytes)
{
    struct ry_building *b = x->b;
    struct flows *f = sends ? &x->out[node] : &x->in[node];
    if (node == b->node || bytes > f->total - f->done)
        return -1;
    for (int i = 0; i < f->count; i++) {
        const struct flow *flow = &f->flow[i];
        uint64_t from = part_of(flow->bytes, f->done, f->total), end = part_of(flow->bytes, f->done + bytes, f->total);
        struct ry_at at = flow->at;
        if (from == end)
            continue;
        at.offset += from;
        if (flow->first_of_all)
            at = own_at(x, node, at.offset);
        if (sends)
            ry_step_send(b->plan, group, flow->peer, at, end - from);
        else
            ry_step_recv(b->plan, group, flow->peer, at, end - from);
    }
    f->done += bytes;
    return 0;
}

/* What stays in the node. */
static void stay(struct ry_building *b, int group)
{
    for (int j = 0; j < b->size; j++) {
        int p = b->members[b->start[b->node] + j];
        ry_step_send(b->plan, group, p, ry_at_send(p), b->in->send[p]);
        ry_step_recv(b->plan, group, p, ry_at_recv(p), b->in->recv[p]);
    }
}

/* The stages; returns how many groups they take, or -1. */
static int carry_across(struct balancing *x)
{
    struct ry_building *b = x->b;
    struct turn t;
    int stages = 0, groups, longest = 1;
    uint64_t bytes[1 + MOST_TURNS] = {0};
    while (get_turn(b, stages, &t))
        stages++;
    groups = stages < 1 ? 1 : stages < MOST_TURNS ? stages : MOST_TURNS;
    for (int s = 0; s < stages && get_turn(b, s, &t); s++) {
        int group = group_of(s, stages);
        bytes[group] = ry_sum(bytes[group], t.out > t.in ? t.out : t.in);
        longest = bytes[group] > bytes[longest] ? group : longest;
    }
    for (int group = 1, s = 0; group <= groups; group++) {
        if (group == longest)
            stay(b, group);
        for (; s < stages && group_of(s, stages) == group && get_turn(b, s, &t); s++)
            if ((t.to >= 0 && cross(x, group, t.to, true, t.out)) ||
                (t.from >= 0 && cross(x, group, t.from, false, t.in)))
                return -1;
    }
    for (int n = 0; n < b->cluster->nnodes; n++)
        if (x->out[n].done != x->out[n].total || x->in[n].done != x->in[n].total)
            return -1;
    return groups;
}

static void pass_on(struct balancing *x, int group)
{
    struct ry_building *b = x->b;
    const int *members = b->members + b->start[b->node];
    for (int n = 0; n < b->cluster->nnodes; n++) {
        if (n == b->node || !x->in[n].total)
            continue;
        struct ry_line_walk w = lay_in(x, n);
        uint64_t share = x->self ? w.line->ends[x->self - 1] : 0;
        while (ry_line_next(&w)) {
            const struct ry_line_piece *p = &w.piece;
            if ((p->receiver != x->self && p->target != x->self) || ry_line_straight(p))
                continue;
            struct ry_at here = ry_at_stage(x->come_at[n] + p->at - share),
                         place = {RY_AT_RECV, b->members[b->start[n] + p->part->source], p->from};
            if (b->size == 1)
                ry_step_copy(b->plan, place, here, p->bytes);
            else if (p->receiver == x->self)
                ry_step_send(b->plan, group, members[p->target], here, p->bytes);
            if (b->size > 1 && p->target == x->self)
                ry_step_recv(b->plan, group, members[p->receiver], place, p->bytes);
        }
    }
}

static int get_balancing(struct balancing *x, struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    size_t nnodes = (size_t)c->nnodes, flows = (size_t)c->nranks * 3 + nnodes * ((size_t)b->size + 1);
    *x = (struct balancing){.b = b, .self = c->local[b->rank]};
    if (get_scratch(&x->s, c, b->err))
        return -1;
    x->departures = malloc(nnodes * (sizeof *x->departures + 2 * sizeof *x->out + 3 * sizeof *x->packed_at) +
                           flows * sizeof *x->flow + (size_t)c->nranks * sizeof *x->row_of);
    if (!x->departures) {
        free_scratch(&x->s);
        return ry_fail(b->err, "no memory for the plan of rank %d", b->rank);
    }
    x->out = (struct flows *)(x->departures + nnodes);
    x->in = x->out + nnodes;
    memset(x->out, 0, 2 * nnodes * sizeof *x->out);
    x->packed_at = (uint64_t *)(x->in + nnodes);
    x->moved_at = x->packed_at + nnodes;
    x->come_at = x->moved_at + nnodes;
    x->flow = (struct flow *)(x->come_at + nnodes);
    x->row_of = (int *)(x->flow + flows);
    for (int i = 0; i < b->in->slice->nrows; i++)
        x->row_of[b->in->slice->rows[i]] = i;
    return 0;
}

static int build(struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    struct ry_plan *plan = b->plan;
    struct balancing x;
    plan->ngroups = 1;
    if (c->nnodes < 2) {
        stay(b, 0);
        return 0;
    }
    if (get_balancing(&x, b))
        return -1;
    int groups = 0, rc = depart(&x) || spread(&x) || expect(&x) ? -1 : 0;
    if (!rc && x.stage == UINT64_MAX)
        rc = ry_fail(b->err, "plan of rank %d: staging memory adds up to more than 64 bits of bytes", b->rank);
    if (!rc && (groups = carry_across(&x)) < 0)
        rc = ry_fail(b->err, "plan of rank %d: the stages do not fit to what its node sends or gets", b->rank);
    int last = 1 + groups;
    if (!rc)
        pass_on(&x, last);
    plan->ngroups = last + 1;
    plan->inside = !rc && c->nnodes < c->nranks ? 1 | UINT64_C(1) << last : 0;
    plan->stage_bytes = x.stage;
    free(x.departures);
    free_scratch(&x.s);
    return rc;
}

const struct ry_strategy_ops ry_balanced_ops = {.name = "balanced",
                                                .row = row,
                                                .column = ry_relayed_column,
                                                .most_steps = most_steps,
                                                .build = build,
                                                .stage_relay = stage_relay,
                                                .stage_pack = ry_relayed_stage_pack,
                                                .stage_all = stage_all,
                                                .words = words,
                                                .fill_words = fill_words};
