/*
 * hierarchical.c: the strategy `hierarchical`: one message per remote node instead of one per remote rank.
 *
 * Group 0: to every remote node one message with the pieces for all its ranks, in ascending rank order, to the relay
 * there; and, at the same time, everything that stays on the node. The two belong in one group: they use different
 * links, so the in-node part is hidden behind the slower one, where a group of its own would cost a launch and be seen.
 * Group 1: the relays pass on the pieces from where they lie in staging memory. A relay's own pieces go the same way,
 * as a transfer to itself: NCCL copies them while the others travel, where copies of their own would come before or
 * after.
 *
 * A message is packed into staging memory first unless its pieces are neighbours in the send buffer. It is received
 * straight into place where the relay itself is the only one to get any of it. Staging memory: first what is packed,
 * then what is relayed.
 *
 * There is at most one message per pair of ranks in group 0. In group 1 a relay sends each rank of its node one per
 * source: to merge them both sides would have to hold them as neighbours, but sources lie apart at the relay (each
 * message carries other pieces between), and the receiver cannot know otherwise.
 */
#include <stdlib.h>

#include "strategy.h"

static bool row(const struct ry_cluster *c, int rank, int other)
{
    int size = c->node_size[c->node[rank]];
    /* Alone on its node, a rank relays for nobody: its own column says what it gets. */
    return size > 1 && c->node[other] != c->node[rank] && c->local[other] % size == c->local[rank];
}

static bool column(const struct ry_cluster *c, int rank, int other)
{
    return c->node[other] == c->node[rank];
}

/* The same on all ranks, so from the map alone. Where every rank is alone on its node, nothing is relayed. */
static int groups(const struct ry_cluster *c)
{
    return c->nnodes > 1 && c->nnodes < c->nranks ? 2 : 1;
}

/* What this rank sends to another node. */
struct outgoing {
    uint64_t bytes;
    int first;       /* rank that gets the first piece */
    bool neighbours; /* the pieces follow each other in memory: nothing to pack */
};

static struct outgoing outgoing(const struct ry_building *b, int node)
{
    const struct ry_plan_input *in = b->in;
    const int *to = b->members + b->start[node];
    struct outgoing out = {0, -1, true};
    uintptr_t end = 0;
    for (int i = 0; i < b->cluster->node_size[node]; i++) {
        int p = to[i];
        if (!in->send[p])
            continue;
        if (out.first < 0)
            out.first = p;
        else if (!in->send_at || in->send_at[p] != end)
            out.neighbours = false;
        out.bytes += in->send[p]; /* cannot overflow: plan.c added up the row */
        end = in->send_at ? in->send_at[p] + in->send[p] : 0;
    }
    return out;
}

/* Copies that pack it at `at`; neighbours in one. */
static void pack(struct ry_building *b, int node, uint64_t at)
{
    const struct ry_plan_input *in = b->in;
    const int *to = b->members + b->start[node];
    int first = -1;
    uint64_t bytes = 0;
    for (int i = 0; i < b->cluster->node_size[node]; i++) {
        int p = to[i];
        if (!in->send[p])
            continue;
        if (bytes && in->send_at && in->send_at[p] == in->send_at[first] + bytes) {
            bytes += in->send[p];
            continue;
        }
        ry_step_copy(b->plan, ry_at_stage(at), ry_at_send(first), bytes);
        at += bytes;
        first = p;
        bytes = in->send[p];
    }
    ry_step_copy(b->plan, ry_at_stage(at), ry_at_send(first), bytes);
}

/* What this rank gets in group 0 from rank `from` of another node, whose relay it is; `cells` is the row in the slice,
   NULL where the rank is alone. */
struct incoming {
    uint64_t bytes;
    bool straight; /* all of it is for this rank */
};

static int incoming(const struct ry_building *b, int from, const uint64_t *cells, struct incoming *in)
{
    uint64_t own = b->in->recv[from];
    in->bytes = own;
    if (cells) {
        in->bytes = 0;
        for (int j = 0; j < b->size; j++)
            if (__builtin_add_overflow(in->bytes, cells[j], &in->bytes))
                return ry_fail(b->err,
                               "plan of rank %d: what rank %d sends to node %d adds up to more than 64 bits of bytes",
                               b->rank, from, b->node);
    }
    in->straight = in->bytes == own;
    return 0;
}

static size_t most_steps(const struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    size_t nranks = (size_t)c->nranks, size = (size_t)b->size, relayed = 0;
    for (int r = 0; r < c->nranks; r++)
        relayed += row(c, b->rank, r) ? size : 0;
    return nranks              /* packing */
           + (size_t)c->nnodes /* across nodes, out */
           + nranks            /* and in */
           + 2 * size          /* in-node */
           + relayed + nranks; /* passed on, received */
}

static int build(struct ry_building *b)
{
    const struct ry_cluster *c = b->cluster;
    const struct ry_plan_input *in = b->in;
    struct ry_plan *plan = b->plan;
    uint64_t stage = 0;
    struct incoming msg;
    plan->ngroups = groups(c);

    for (int n = 0; n < c->nnodes; n++) {
        struct outgoing out = outgoing(b, n);
        if (n == b->node || out.neighbours)
            continue;
        pack(b, n, stage);
        stage = ry_sum(stage, ry_stage_room(out.bytes));
    }

    stage = 0;
    for (int n = 0; n < c->nnodes; n++) {
        if (n == b->node)
            continue;
        struct outgoing out = outgoing(b, n);
        int relay = b->members[b->start[n] + c->local[b->rank] % c->node_size[n]];
        ry_step_send(plan, 0, relay, out.neighbours ? ry_at_send(out.first) : ry_at_stage(stage), out.bytes);
        if (!out.neighbours)
            stage = ry_sum(stage, ry_stage_room(out.bytes));
    }
    for (int j = 0; j < b->size; j++) {
        int p = b->members[b->start[b->node] + j];
        ry_step_send(plan, 0, p, ry_at_send(p), in->send[p]);
        ry_step_recv(plan, 0, p, ry_at_recv(p), in->recv[p]);
    }
    uint64_t relayed = stage;
    const uint64_t *cells = b->size > 1 && in->slice ? in->slice->cells : NULL;
    for (int from = 0; from < c->nranks; from++) {
        if (c->node[from] == b->node || c->local[from] % b->size != c->local[b->rank])
            continue;
        if (incoming(b, from, cells, &msg))
            return -1;
        ry_step_recv(plan, 0, from, msg.straight ? ry_at_recv(from) : ry_at_stage(stage), msg.bytes);
        if (!msg.straight)
            stage = ry_sum(stage, ry_stage_room(msg.bytes));
        cells += cells ? b->size : 0;
    }
    if (stage == UINT64_MAX)
        return ry_fail(b->err, "plan of rank %d: staging memory adds up to more than 64 bits of bytes", b->rank);
    plan->stage_bytes = stage;

    /* Group 1. Both sides of each pair go through the sources in ascending order. */
    stage = relayed;
    cells = b->size > 1 && in->slice ? in->slice->cells : NULL;
    for (int from = 0; from < c->nranks; from++) {
        if (c->node[from] == b->node)
            continue;
        int relay = b->members[b->start[b->node] + c->local[from] % b->size];
        if (relay != b->rank) {
            ry_step_recv(plan, 1, relay, ry_at_recv(from), in->recv[from]);
            continue;
        }
        incoming(b, from, cells, &msg);
        if (!msg.straight) {
            uint64_t at = stage;
            for (int j = 0; j < b->size; at += cells[j++])
                ry_step_send(plan, 1, b->members[b->start[b->node] + j], ry_at_stage(at), cells[j]);
            ry_step_recv(plan, 1, b->rank, ry_at_recv(from), in->recv[from]);
            stage += ry_stage_room(msg.bytes);
        }
        cells += cells ? b->size : 0;
    }
    return 0;
}

static uint64_t stage_relay(const struct ry_cluster *c, int rank, const uint64_t *matrix, const struct ry_repeats *repeats)
{
    (void)repeats;
    uint64_t stage = 0;
    int node = c->node[rank], size = c->node_size[node];
    for (int from = 0; from < c->nranks; from++) {
        if (!row(c, rank, from))
            continue;
        const uint64_t *cells = matrix + (size_t)from * (size_t)c->nranks;
        uint64_t bytes = 0;
        for (int r = c->node_first[node], left = size; left; r++) {
            if (c->node[r] != node)
                continue;
            bytes = ry_sum(bytes, cells[r]);
            left--;
        }
        if (bytes != cells[rank])
            stage = ry_sum(stage, ry_stage_room(bytes));
    }
    return stage;
}

/* What a rank packs, without a list of each node's ranks: nodes are walked from their lowest rank. */
static uint64_t stage_pack(const struct ry_cluster *c, int rank, const uint64_t *send, const uintptr_t *send_at,
                           const struct ry_repeats *repeats)
{
    (void)repeats;
    uint64_t stage = 0;
    for (int n = 0; n < c->nnodes; n++) {
        if (n == c->node[rank])
            continue;
        uint64_t bytes = 0;
        uintptr_t end = 0;
        bool neighbours = true;
        for (int p = c->node_first[n], left = c->node_size[n]; left; p++) {
            if (c->node[p] != n)
                continue;
            left--;
            if (!send[p])
                continue;
            if (bytes && (!send_at || send_at[p] != end))
                neighbours = false;
            bytes = ry_sum(bytes, send[p]);
            end = send_at ? send_at[p] + send[p] : 0;
        }
        if (!neighbours)
            stage = ry_sum(stage, ry_stage_room(bytes));
    }
    return stage;
}

/* Each row of the matrix once, added up by node. */
static int stage_all(const struct ry_cluster *c, const uint64_t *matrix, const struct ry_repeats *repeats, uint64_t *relay,
                     uint64_t *pack, struct ry_err *err)
{
    (void)repeats;
    struct sum {
        uint64_t bytes;
        uint32_t pieces, start; /* the node's ranks begin there in `members` */
    } *sums = calloc((size_t)c->nnodes, sizeof *sums);
    int *members = malloc((size_t)c->nranks * sizeof *members);
    if (!sums || !members) {
        free(sums);
        free(members);
        return ry_fail(err, "no memory for the staging needs of %d ranks", c->nranks);
    }
    for (int n = 0, at = 0; n < c->nnodes; at += c->node_size[n++])
        sums[n].start = (uint32_t)at;
    for (int r = 0; r < c->nranks; r++)
        members[sums[c->node[r]].start + (uint32_t)c->local[r]] = r;
    for (int from = 0; from < c->nranks; from++) {
        const uint64_t *cells = matrix + (size_t)from * (size_t)c->nranks;
        for (int p = 0; p < c->nranks;) { /* node after node, or what follows each other of one */
            struct sum *s = &sums[c->node[p]], run = *s;
            for (int node = c->node[p]; p < c->nranks && c->node[p] == node; p++) {
                run.bytes = ry_sum(run.bytes, cells[p]);
                run.pieces += cells[p] > 0;
            }
            *s = run;
        }
        for (int n = 0; n < c->nnodes; n++) {
            struct sum *s = &sums[n];
            int to = members[s->start + (uint32_t)(c->local[from] % c->node_size[n])];
            if (n != c->node[from] && s->bytes != cells[to])
                relay[to] = ry_sum(relay[to], ry_stage_room(s->bytes));
            if (n != c->node[from] && s->pieces > 1)
                pack[from] = ry_sum(pack[from], ry_stage_room(s->bytes));
            s->bytes = s->pieces = 0;
        }
    }
    free(sums);
    free(members);
    return 0;
}

const struct ry_strategy_ops ry_hierarchical_ops = {"hierarchical", row, column, most_steps, build, stage_relay, stage_pack, stage_all, false};

/* Until dedup.c is there: what hierarchical does, which packs nothing. */
const struct ry_strategy_ops ry_dedup_ops = {"dedup", row, column, most_steps, build, stage_relay, stage_pack, stage_all, false};
