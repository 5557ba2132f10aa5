/* cost.c: see cost.h. How the loads of an exchange become microseconds, by strategy. Choosing is in choose.c. */
#include "cost.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cost_parts.h"

const char *ry_link_name(enum ry_link link)
{
    static const char *const names[RY_LINKS] = {"self", "local", "node", "nic"};
    return (unsigned)link < RY_LINKS ? names[link] : "?";
}

/* ---- the guess ---- */

/*
 * NCCL's transfers reach some 3/4 of what a link's data sheet says. What is not known is taken so that direct looks
 * better than it may be: slow links inside the node, cheap messages, a fast NIC.
 */
#define REACHED 0.75
#define LOCAL_GBS 10.0 /* PCIe */
#define NIC_GBS 50.0

/* Bandwidth of a node's NICs: those of its ranks, each name once. */
static double node_nic_gbs(const struct ry_cluster *c, int node)
{
    double sum = 0;
    for (int r = c->node_first[node]; r < c->nranks; r++) {
        if (c->node[r] != node || c->seats[r].nic_gbs <= 0)
            continue;
        int twin = c->node_first[node];
        while (twin < r && (c->node[twin] != node || strcmp(c->seats[twin].nic, c->seats[r].nic)))
            twin++;
        if (twin == r)
            sum += c->seats[r].nic_gbs;
    }
    return sum;
}

void ry_cost_guess(struct ry_cost_model *model, const struct ry_cluster *cluster)
{
    double nvlink = 0, nic = 0, rank_nic = 0;
    for (int r = 0; r < cluster->nranks; r++) {
        const struct ry_seat *s = &cluster->seats[r];
        if (s->nvlink_gbs > 0 && (!nvlink || s->nvlink_gbs < nvlink))
            nvlink = s->nvlink_gbs;
        if (s->nic_gbs > 0 && (!rank_nic || s->nic_gbs < rank_nic))
            rank_nic = s->nic_gbs;
    }
    for (int n = 0; n < cluster->nnodes; n++) {
        double gbs = node_nic_gbs(cluster, n);
        if (gbs > 0 && (!nic || gbs < nic))
            nic = gbs;
    }
    /* One rank without NVLink is enough to slow down all. */
    for (int r = 0; r < cluster->nranks && nvlink > 0; r++)
        if (cluster->seats[r].nvlink_gbs <= 0)
            nvlink = LOCAL_GBS;
    const double gbs = 1000 * REACHED; /* GB/s are 1000 bytes per microsecond */
    *model = (struct ry_cost_model){
        .link = {[RY_LINK_SELF] = {.bytes_per_us = 100e3, .message_us = 1},
                 [RY_LINK_LOCAL] = {.alpha_us = 5,
                                    .bytes_per_us = (nvlink > 0 ? nvlink : LOCAL_GBS) * gbs,
                                    .message_us = 1},
                 [RY_LINK_NIC] = {.alpha_us = 15, .bytes_per_us = (nic > 0 ? nic : NIC_GBS) * gbs, .message_us = 2}},
        .nic_rank_bytes_per_us = (rank_nic > 0 ? rank_nic : NIC_GBS) * gbs,
        .copy_us = 3,
        .copy_bytes_per_us = 300e3,
        .group_us = 15,
        /* over TCP: seen on hosts with H200, 4 ranks 60 to 90 us, 8 ranks 110 to 150: the yardmaster hears and tells
           one by one */
        .agreement_us = 40 + 13 * cluster->nranks,
        .plan_us_per_rank = 0.2,
    };
    model->link[RY_LINK_NODE] = model->link[RY_LINK_LOCAL];
    model->ucx = model->link[RY_LINK_NIC];
    model->ucx_rank_bytes_per_us = model->nic_rank_bytes_per_us;
}

double ry_cost_nic_slope(const struct ry_cost_model *model, const struct ry_cluster *cluster, const struct ry_load *loads)
{
    const double much = 64; /* so that it is the NIC that takes longest, and not a link beside it */
    struct ry_cost_model slow = *model;
    ry_cost_slow_nic(&slow, much);
    return (ry_cost_estimate(&slow, cluster, loads, NULL, RY_DIRECT) - ry_cost_estimate(model, cluster, loads, NULL, RY_DIRECT)) / (much - 1);
}

void ry_cost_slow_nic(struct ry_cost_model *model, double times)
{
    model->link[RY_LINK_NIC].bytes_per_us /= times;
    model->nic_rank_bytes_per_us /= times;
    model->ucx.bytes_per_us /= times;
    model->ucx_rank_bytes_per_us /= times;
}

struct ry_cost_model ry_cost_over_ucx(const struct ry_cost_model *model)
{
    struct ry_cost_model m = *model;
    m.link[RY_LINK_NIC] = m.ucx;
    m.nic_rank_bytes_per_us = m.ucx_rank_bytes_per_us;
    return m;
}

/* ---- loads ---- */

#define SEEN_NODES 4096

/* How many nodes other than `node` have a rank with bytes in `cells`. */
static uint32_t count_nodes(const struct ry_cluster *c, int node, const uint64_t *cells)
{
    uint32_t n = 0;
    for (int first = 0; first < c->nnodes; first += SEEN_NODES) {
        uint64_t seen[SEEN_NODES / 64] = {0};
        for (int r = 0; r < c->nranks; r++) {
            int at = c->node[r] - first;
            if (!cells[r] || c->node[r] == node || at < 0 || at >= SEEN_NODES)
                continue;
            uint64_t bit = UINT64_C(1) << (at % 64);
            n += !(seen[at / 64] & bit);
            seen[at / 64] |= bit;
        }
    }
    return n;
}

#define PACKED_NODES 512

/* What crosses to each node as it is or packed, and how much of it was searched. Chunks of nodes, as there is no
 * memory. */
static void find_packed(struct ry_load *l, const struct ry_cluster *c, int node, const uint64_t *send,
                        const struct ry_repeats *repeats)
{
    l->packed_out = 0;
    for (int first = 0; first < c->nnodes; first += PACKED_NODES) {
        struct {
            uint64_t bytes, rows;
        } to[PACKED_NODES] = {0};
        int n = c->nnodes - first < PACKED_NODES ? c->nnodes - first : PACKED_NODES;
        for (int r = 0; r < c->nranks; r++) {
            int at = c->node[r] - first;
            if (!send[r] || c->node[r] == node || at < 0 || at >= n)
                continue;
            to[at].bytes += send[r];
            to[at].rows += repeats[c->node[r]].row_bytes ? ry_rows_of(send[r], repeats[c->node[r]].row_bytes) : 0;
        }
        for (int i = 0; i < n; i++) {
            struct ry_repeats found = repeats[first + i];
            l->scanned += found.row_bytes ? to[i].bytes : 0;
            l->packed_out +=
                ry_packs(found, to[i].rows, to[i].bytes) ? ry_packed_bytes(found, to[i].rows) : to[i].bytes;
        }
    }
}

void ry_load_of(struct ry_load *load, const struct ry_cluster *cluster, int rank, const uint64_t *send,
                const uint64_t *recv, const struct ry_repeats *repeats)
{
    int node = cluster->node[rank];
    struct ry_load l = {.self = send[rank]};
    for (int r = 0; r < cluster->nranks; r++) {
        if (r == rank)
            continue;
        if (cluster->node[r] == node) {
            l.local_out += send[r];
            l.local_in += recv[r];
            l.local_sends += send[r] > 0;
            l.local_recvs += recv[r] > 0;
        } else {
            l.cross_out += send[r];
            l.cross_in += recv[r];
            l.cross_sends += send[r] > 0;
            l.cross_recvs += recv[r] > 0;
        }
    }
    l.nodes_out = l.cross_sends ? count_nodes(cluster, node, send) : 0;
    l.nodes_in = l.cross_recvs ? count_nodes(cluster, node, recv) : 0;
    l.packed_out = l.cross_out;
    if (repeats && l.cross_out)
        find_packed(&l, cluster, node, send, repeats);
    *load = l;
}

/* ---- estimates ---- */

/* Counts stay below 2^63; converting from unsigned takes the processor several steps more. */
static inline double number(uint64_t n)
{
    return (double)(int64_t)n;
}

static inline double larger(double a, double b)
{
    return a > b ? a : b;
}

static inline double smaller(double a, double b)
{
    return a < b ? a : b;
}

/* ---- others on the same NICs ---- */

static double taken(uint64_t others, uint64_t own, double share)
{
    return others && share > 0 ? smaller(number(others) / (own ? number(own) : 1), share) : 0;
}

static inline double slower_out(const struct ry_beside *b)
{
    return 1 + taken(b->out, b->own_out, b->share);
}

static inline double slower_in(const struct ry_beside *b)
{
    return 1 + taken(b->in, b->own_in, b->share);
}

double ry_beside_more(const struct ry_beside *beside)
{
    return larger(slower_out(beside), slower_in(beside)) - 1;
}

static inline void add_beside(struct ry_beside *sum, const struct ry_beside *b)
{
    sum->out += b->out;
    sum->in += b->in;
    sum->own_out += b->own_out;
    sum->own_in += b->own_in;
    sum->share = larger(sum->share, b->share);
}

struct ry_beside ry_cost_beside(const struct ry_cluster *cluster, const struct ry_load *loads)
{
    struct ry_beside sum = {0};
    for (int r = 0; r < cluster->nranks; r++)
        add_beside(&sum, &loads[r].beside);
    return sum;
}

struct pace { /* a link of the model, ready to be multiplied with */
    double alpha, per_message, per_byte;
};

static struct pace pace_of(const struct ry_cost_model *m, enum ry_link link)
{
    return (struct pace){m->link[link].alpha_us, m->link[link].message_us, 1 / m->link[link].bytes_per_us};
}

/*
 * LOCAL or SELF as they are over the job's communicator, or over the node's own. A rank's transfers to itself are as
 * short of channels as those to its neighbours (both halve from 2 to 4 virtual nodes), and with enough no slower than
 * those.
 */
static struct pace inside_pace(const struct ry_cost_model *m, enum ry_link link, bool node_comm)
{
    struct pace p = pace_of(m, node_comm && link == RY_LINK_LOCAL ? RY_LINK_NODE : link);
    if (node_comm)
        p.per_byte = smaller(p.per_byte, 1 / m->link[RY_LINK_NODE].bytes_per_us);
    return p;
}

static inline double link_us(struct pace p, double messages, double bytes)
{
    return messages > 0 ? p.alpha + messages * p.per_message + bytes * p.per_byte : 0;
}

/* Of the ranks of one node: sums, and of the rank that has most. */
struct node_sum {
    uint64_t out, in;             /* bytes across nodes */
    uint64_t most_out, most_in;   /* of its busiest rank */
    uint64_t packed, most_packed; /* out, dedup */
    uint64_t most_relayed;        /* 0 where that is not known */
    uint64_t most_arriving;       /* the same */
    uint64_t pieces;              /* messages of direct that come for its ranks from other nodes */
    uint32_t sends, recvs, nodes; /* of the rank that has most: messages of direct, remote nodes that it sends to */
    uint32_t heard;               /* and that it gets from */
    struct ry_beside beside;
    double slower_out, slower_in; /* a byte over its NIC, for what others have on it; 1: nobody has */
};

/* How many nodes are summed at a time: there is no memory to allocate, and a node's ranks need not be neighbours. */
#define CHUNK 512

#define SEARCH_KERNELS 8 /* that a search for equal rows enqueues: src/run/rows.c */

static inline uint64_t more(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static inline uint64_t fewer(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static void sum_up(struct node_sum *sum, const struct ry_cluster *c, const struct ry_load *loads,
                   const uint64_t *relayed, const uint64_t *arriving, int first, int n)
{
    memset(sum, 0, (size_t)n * sizeof *sum);
    for (int r = 0; r < c->nranks; r++) {
        unsigned at = (unsigned)(c->node[r] - first);
        if (at >= (unsigned)n)
            continue;
        const struct ry_load *l = &loads[r];
        struct node_sum *s = &sum[at];
        s->out += l->cross_out;
        s->in += l->cross_in;
        s->pieces += l->cross_recvs;
        s->most_out = more(s->most_out, l->cross_out);
        uint64_t packed = fewer(l->packed_out, l->cross_out);
        s->packed += packed;
        s->most_packed = more(s->most_packed, packed);
        s->most_in = more(s->most_in, l->cross_in);
        s->sends = l->cross_sends > s->sends ? l->cross_sends : s->sends;
        s->recvs = l->cross_recvs > s->recvs ? l->cross_recvs : s->recvs;
        s->nodes = l->nodes_out > s->nodes ? l->nodes_out : s->nodes;
        s->heard = l->nodes_in > s->heard ? l->nodes_in : s->heard;
        add_beside(&s->beside, &l->beside);
        if (relayed)
            s->most_relayed = more(s->most_relayed, relayed[r]);
        if (relayed && arriving)
            s->most_arriving = more(s->most_arriving, arriving[r]);
    }
    for (int i = 0; i < n; i++) {
        sum[i].slower_out = slower_out(&sum[i].beside);
        sum[i].slower_in = slower_in(&sum[i].beside);
    }
}

struct paces {
    struct pace self, local, nic;
    struct pace passed, passed_self; /* what relays pass on: to others of the node, to themselves */
    double rank_per_byte;            /* over the NIC, of one rank alone */
    double incast;
};

/* How much longer it takes where so many nodes send to one. */
static inline double crowded(double incast, double nodes)
{
    return incast > 0 && nodes > 1 ? 1 / (1 - incast * (1 - 1 / nodes)) : 1;
}

static inline void nic_us(struct ry_cost_parts *p, const struct paces *k, int node, bool in, uint64_t messages,
                          uint64_t bytes, double rank_bytes, uint32_t nodes, double slower)
{
    if (!messages)
        return;
    double transfer =
        larger(number(bytes) * k->nic.per_byte, rank_bytes * k->rank_per_byte) * crowded(k->incast, in ? nodes : 1) * slower;
    double us = k->nic.alpha + number(messages) * k->nic.per_message + transfer;
    if (us <= p->nic)
        return;
    p->nic = us;
    p->nic_node = node;
    p->nic_in = in;
    p->nic_bytes = bytes;
    p->nic_messages = messages;
}

/*
 * Two groups: one message for each remote node, beside the in-node segments; then what relays got goes on in the node,
 * one message for each piece, a relay's own pieces to itself. Loads do not tell who relays what. A node of S ranks is
 * taken to share its relaying evenly, but for `relayed` where that is known: 1/S of what comes in is at its target at
 * once.
 *
 * Dedup: the same with the bytes of packed messages: `out`, of the node's busiest rank `most_out`, and `in`. They go on
 * to those of S - 1 ranks for which that is shorter than their rows, and a relay writes its own pieces out of the
 * message.
 */
static inline void relaying_us(struct ry_cost_parts *p, const struct paces *k, int node, int node_size,
                               const struct node_sum *s, bool relays_known, uint64_t out, uint64_t most_out,
                               uint64_t in)
{
    double share = 1.0 / node_size, others = 1 - share, plain = number(s->in) * share;
    double relayed = relays_known ? number(s->most_relayed) : plain * others;
    double arrives = s->most_arriving ? number(s->most_arriving) : relayed + plain * share;
    bool packed = in < s->in;
    if (packed)
        arrives *= number(in) / number(s->in);
    /* The node hears of at least as many remote ranks as its best-connected rank does. */
    uint64_t heard = (uint64_t)(int64_t)(s->recvs * share + 0.999);
    nic_us(p, k, node, false, s->nodes, out, number(most_out), s->nodes, s->slower_out);
    nic_us(p, k, node, true, heard, in, arrives, s->heard, s->slower_in);
    if (!s->in || node_size < 2)
        return;
    double gets = s->recvs * others, passes = number(s->pieces) * share * others;
    double passed = packed ? smaller(relayed, arrives * (node_size - 1)) : relayed;
    double bytes = larger(passed, number(fewer(s->most_in, in)) * others);
    double us = link_us(k->passed, larger(gets, passes), bytes);
    if (!packed)
        us = larger(us, link_us(k->passed_self, number(heard), number(s->most_in) * share));
    if (us > p->forward) {
        p->forward = us;
        p->forward_node = node;
        p->forward_bytes = (uint64_t)bytes;
    }
}

/*
 * Balanced: groups inside the node before and after, and stages between. Each rail of a node carries as much, so its ranks' own sums
 * do not matter to the NIC. As many stages as the best-connected node has partners would do, and all together would take as long as
 * the busiest node needs, if all were alike; reckoned with are half as many more, and a 16th more time
 * (birkhoff.h), and that more than 32 share groups (balanced.c). Loads tell sums
 * over nodes only: of what ranks have above their share, for each node, at least the sum moves.
 */
struct balancing {
    double spread, nic; /* of the node that takes longest */
    int nic_node;
    bool nic_in;
    uint64_t nic_bytes;
    uint32_t partners;
};

static inline void across_us(struct balancing *x, const struct paces *k, int node, bool in, uint64_t bytes, int node_size,
                             double slower)
{
    double us = number(bytes) * larger(k->nic.per_byte, k->rank_per_byte / node_size) * slower;
    if (us <= x->nic)
        return;
    x->nic = us;
    x->nic_node = node;
    x->nic_in = in;
    x->nic_bytes = bytes;
}

static inline void balancing_us(struct balancing *x, struct ry_cost_parts *p, const struct paces *k, int node, int node_size,
                                const struct node_sum *s)
{
    double share = 1.0 / node_size, others = 1 - share;
    double above = larger(number(s->most_out) - number(s->out) * share, 0);
    across_us(x, k, node, false, s->out, node_size, s->slower_out);
    across_us(x, k, node, true, s->in, node_size, s->slower_in);
    x->partners = s->nodes > x->partners ? s->nodes : x->partners;
    x->partners = s->heard > x->partners ? s->heard : x->partners;
    if (node_size < 2)
        return;
    if (above > 0)
        x->spread = larger(x->spread, link_us(k->passed, s->nodes, above));
    if (!s->in)
        return;
    double bytes = larger(number(s->in) * share, number(s->most_in)) * others;
    double us = link_us(k->passed, larger(s->recvs, number(s->pieces) * share) * others, bytes);
    us = larger(us, link_us(k->passed_self, s->recvs * share, number(s->most_in) * share));
    if (us > p->forward) {
        p->forward = us;
        p->forward_node = node;
        p->forward_bytes = (uint64_t)bytes;
    }
}

/* What the stages cost: a message of its own bytes, and one of others', from each rank. */
static void add_stages(struct ry_cost_parts *p, const struct ry_cost_model *m, const struct balancing *x)
{
    double partners = x->partners, stages = partners > 1 ? smaller(partners * 1.5, 32) : partners;
    p->spread = x->spread;
    p->stages = stages;
    p->nic = 0;
    if (stages > 0)
        p->nic = x->nic * (partners > 1 ? 1.0625 : 1) +
                 stages * (m->link[RY_LINK_NIC].alpha_us + (x->spread > 0 ? 2 : 1) * m->link[RY_LINK_NIC].message_us);
    p->nic_node = x->nic_node;
    p->nic_in = x->nic_in;
    p->nic_bytes = x->nic_bytes;
    p->nic_messages = (uint64_t)(stages * (x->spread > 0 ? 2 : 1));
}

/*
 * Rows of packed messages are written out once, each source's in a step: by the relay before it passes them on, where
 * the message is longer than one rank's rows, else by whom they are for. The busiest rank's of a node.
 */
static inline double writing_us(const struct ry_cost_model *m, int node_size, const struct node_sum *s,
                                bool relays_known, uint64_t in)
{
    if (in >= s->in)
        return 0;
    double share = 1.0 / node_size, bytes = number(s->most_in), own = number(s->most_in) * share;
    double relayed = relays_known ? number(s->most_relayed) : number(s->in) * share * (1 - share);
    bool by_relay = number(in) * (node_size - 1) > number(s->in) * (1 - share);
    if (by_relay)
        bytes = larger(relayed + own, bytes);
    return s->recvs * m->copy_us + bytes / m->copy_bytes_per_us;
}

static inline uint64_t busiest_way(const struct ry_load *l)
{
    return l->self + more(l->local_out + l->cross_out, l->local_in + l->cross_in);
}

/*
 * How much of the distinct rows are among the first `share` of all, with `copies` of each: whoever has as many at
 * random places is not among them with (1 - share)^copies.
 */
static double early(double share, double copies)
{
    return 1 - pow(1 - share, copies);
}

/*
 * Into the number of chunks that is the fastest. The transfers between nodes follow each other, as do the passing on
 * and writing out inside the nodes, each chunk's after its transfer; the first chunks are the longest, as most rows are
 * new there, while inside all are alike.
 */
static void cut(struct ry_cost_parts *p, const struct ry_cost_model *m, double copies)
{
    const struct ry_cost_link *nic = &m->link[RY_LINK_NIC], *node = &m->link[RY_LINK_NODE];
    double across = larger(p->self, larger(p->local, p->nic)), inside = p->forward + p->written, once = p->total;
    /* what does not become less with the bytes */
    double messages = number(p->nic_messages), again = nic->alpha_us + messages * nic->message_us,
           again_inside = node->alpha_us + messages * node->message_us + 2 * m->copy_us;
    if (!m->node_comm || !(p->forward > 0))
        return;
    for (int chunks = 2; chunks <= m->chunks && chunks <= RY_CHUNKS; chunks *= 2) {
        double crossed = 0, passed = 0;
        for (int k = 0; k < chunks; k++) {
            double share = early((k + 1.0) / chunks, copies) - early((double)k / chunks, copies);
            crossed += larger(across - again, 0) * share + again + m->group_us;
            passed = larger(passed, crossed) + larger(inside - again_inside, 0) / chunks + again_inside + m->group_us;
        }
        double total = once - p->groups - across - inside + passed;
        if (total >= p->total)
            continue;
        p->total = total;
        p->chunks = chunks;
    }
    if (p->chunks > 1) {
        double groups = 2 * p->chunks * m->group_us;
        p->hidden = once - p->groups + groups - p->total;
        p->groups = groups;
    }
}

static struct paces paces_of(const struct ry_cost_model *m)
{
    return (struct paces){.self = pace_of(m, RY_LINK_SELF),
                          .local = pace_of(m, RY_LINK_LOCAL),
                          .nic = pace_of(m, RY_LINK_NIC),
                          .passed = inside_pace(m, RY_LINK_LOCAL, m->node_comm),
                          .passed_self = inside_pace(m, RY_LINK_SELF, m->node_comm),
                          .rank_per_byte = 1 / m->nic_rank_bytes_per_us,
                          .incast = m->nic_incast};
}

uint64_t ry_cost_parts_of(struct ry_cost_parts parts[RY_STRATEGIES], const struct ry_cost_model *model,
                          const struct ry_cluster *c, const struct ry_load *loads, const struct ry_cost_matrix *matrix)
{
    const struct ry_cost_model plans = model->by_ucx ? ry_cost_over_ucx(model) : *model, *m = &plans;
    const uint64_t *relayed = matrix ? matrix->relayed : NULL, *arriving = matrix ? matrix->arriving : NULL;
    const uint64_t *packed_in = matrix ? matrix->packed_in : NULL;
    struct ry_cost_parts *direct = &parts[RY_DIRECT], *hier = &parts[RY_HIERARCHICAL], *dedup = &parts[RY_DEDUP],
                         *balanced = &parts[RY_BALANCED];
    struct balancing even = {.nic_node = -1};
    const struct paces k = paces_of(m), by_nccl = paces_of(model);
    uint64_t most_self = 0, most_out = 0, busiest = 0, all = 0, packed = 0, most_packed = 0, most_scanned = 0;
    uint32_t most_nodes = 0;
    double local = 0, written = 0;
    int runs = 0, last = -1;
    for (int r = 0; r < c->nranks; r++) {
        const struct ry_load *l = &loads[r];
        most_self = more(most_self, l->self);
        most_out = more(most_out, l->cross_out);
        all += l->cross_out;
        if (l->packed_out < l->cross_out) {
            packed += l->packed_out;
            most_packed = more(most_packed, l->packed_out);
            most_nodes = l->nodes_out > most_nodes ? l->nodes_out : most_nodes;
        } else {
            packed += l->cross_out;
        }
        most_scanned = more(most_scanned, l->scanned);
        busiest = more(busiest, busiest_way(l));
        double out = link_us(k.local, l->local_sends, number(l->local_out));
        double in = link_us(k.local, l->local_recvs, number(l->local_in));
        local = larger(local, larger(out, in));
        runs += c->node[r] != last;
        last = c->node[r];
    }
    *direct = (struct ry_cost_parts){.self = link_us(k.self, most_self > 0, number(most_self)),
                                     .local = local,
                                     .overhead = m->agreement_us,
                                     .nic_node = -1,
                                     .forward_node = -1};
    *hier = *dedup = *balanced = parts[RY_SUM] = parts[RY_REPLICA] = *direct;
    double scale = packed < all ? number(packed) / number(all) : 1;
    for (int first = 0; first < c->nnodes; first += CHUNK) {
        struct node_sum sum[CHUNK];
        int n = c->nnodes - first < CHUNK ? c->nnodes - first : CHUNK;
        sum_up(sum, c, loads, relayed, arriving, first, n);
        for (int i = 0; i < n; i++) {
            nic_us(direct, &by_nccl, first + i, false, sum[i].sends, sum[i].out, number(sum[i].most_out), sum[i].nodes,
                   sum[i].slower_out);
            nic_us(direct, &by_nccl, first + i, true, sum[i].recvs, sum[i].in, number(sum[i].most_in), sum[i].heard,
                   sum[i].slower_in);
            int size = c->node_size[first + i];
            relaying_us(hier, &k, first + i, size, &sum[i], relayed != NULL, sum[i].out, sum[i].most_out, sum[i].in);
            balancing_us(&even, balanced, &k, first + i, size, &sum[i]);
            if (packed >= all)
                continue;
            uint64_t in = packed_in ? fewer(packed_in[first + i], sum[i].in) : (uint64_t)(number(sum[i].in) * scale);
            relaying_us(dedup, &k, first + i, size, &sum[i], relayed != NULL, sum[i].packed, sum[i].most_packed, in);
            written = larger(written, writing_us(m, size, &sum[i], relayed != NULL, in));
        }
    }
    /* Segments for one node are neighbours in memory if its ranks have neighbouring numbers; otherwise they are packed.
     */
    if (hier->nic > 0 && runs != c->nnodes)
        hier->copies = c->nranks * m->copy_us + number(most_out) / m->copy_bytes_per_us;
    hier->overhead += m->plan_us_per_rank * c->nranks;
    dedup->overhead = hier->overhead;
    add_stages(balanced, m, &even);
    balanced->copies = hier->copies;
    balanced->overhead = hier->overhead + RY_STAGES_US * c->nnodes * c->nnodes * c->nnodes;
    dedup->copies = most_nodes * m->copy_us + number(most_packed) / m->copy_bytes_per_us + written;
    dedup->written = written;
    if (most_scanned)
        dedup->search = SEARCH_KERNELS * m->copy_us + number(most_scanned) / m->copy_bytes_per_us;
    for (int s = 0; s < RY_STRATEGIES; s++) {
        struct ry_cost_parts *p = &parts[s];
        double links = larger(p->self, larger(p->local, p->nic));
        p->chunks = 1;
        double groups = s == RY_BALANCED ? larger(p->stages, links > 0) + (p->spread > 0) : links > 0;
        p->groups = m->group_us * (groups + (p->forward > 0));
        p->total = p->groups + links + p->copies + p->spread + p->forward + p->overhead + p->search;
    }
    cut(dedup, m, packed && packed < all ? number(all) / number(packed) : 1);
    if (packed >= all)
        dedup->total = INFINITY;
    parts[RY_SUM].total = parts[RY_REPLICA].total = INFINITY; /* not a matter of this cost: plan.h, cost_replica.h */
    return busiest;
}

uint64_t ry_cost_busiest(const struct ry_cluster *cluster, const struct ry_load *loads)
{
    uint64_t most = 0;
    for (int r = 0; r < cluster->nranks; r++)
        most = more(most, busiest_way(&loads[r]));
    return most;
}

double ry_cost_estimate(const struct ry_cost_model *model, const struct ry_cluster *cluster,
                        const struct ry_load *loads, const struct ry_cost_matrix *matrix, enum ry_strategy strategy)
{
    struct ry_cost_parts parts[RY_STRATEGIES];
    ry_cost_parts_of(parts, model, cluster, loads, matrix);
    return parts[strategy].total;
}

/* ---- from the steps ---- */

struct side {
    double messages[RY_LINKS], bytes[RY_LINKS];
};
struct walker {
    int next;            /* step */
    struct side out, in; /* of the present group */
    int nodes_in;        /* that it gets from */
};

static void add(struct side *s, enum ry_link link, uint64_t bytes)
{
    s->messages[link]++;
    s->bytes[link] += (double)bytes;
}

static bool transfers(const struct ry_step *s)
{
    return s->kind == RY_STEP_SEND || s->kind == RY_STEP_RECV;
}

/* The copies that rank's plan has next, in microseconds: whatever is no transfer. */
static double copies_us(const struct ry_cost_model *m, const struct ry_plan *plan, struct walker *w)
{
    double n = 0, bytes = 0;
    for (; w->next < plan->nsteps && !transfers(&plan->steps[w->next]); w->next++) {
        n++;
        bytes += (double)plan->steps[w->next].bytes;
    }
    return n * m->copy_us + bytes / m->copy_bytes_per_us;
}

/* Its transfers of group `group`. */
static void take_group(const struct ry_cluster *c, const struct ry_plan *plan, struct walker *w, int group, long *heard)
{
    long now = (long)group * c->nranks + plan->rank + 1; /* heard[node]: when last */
    w->nodes_in = 0;
    w->out = w->in = (struct side){0};
    for (; w->next < plan->nsteps; w->next++) {
        const struct ry_step *s = &plan->steps[w->next];
        if (!transfers(s) || s->group != group)
            return;
        enum ry_link link = s->peer == plan->rank                     ? RY_LINK_SELF
                            : c->node[s->peer] == c->node[plan->rank] ? RY_LINK_LOCAL
                                                                      : RY_LINK_NIC;
        add(s->kind == RY_STEP_SEND ? &w->out : &w->in, link, s->bytes);
        if (s->kind == RY_STEP_RECV && link == RY_LINK_NIC && heard[c->node[s->peer]] != now) {
            heard[c->node[s->peer]] = now;
            w->nodes_in++;
        }
    }
}

static double group_us(const struct ry_cost_model *m, const struct ry_cluster *c, const struct walker *walkers,
                       bool inside, double *node_bytes)
{
    double most = 0;
    struct pace nic = pace_of(m, RY_LINK_NIC);
    for (int in = 0; in < 2; in++) {
        memset(node_bytes, 0, (size_t)c->nnodes * sizeof *node_bytes);
        for (int r = 0; r < c->nranks; r++)
            node_bytes[c->node[r]] += (in ? walkers[r].in : walkers[r].out).bytes[RY_LINK_NIC];
        for (int r = 0; r < c->nranks; r++) {
            const struct side *s = in ? &walkers[r].in : &walkers[r].out;
            for (int link = RY_LINK_SELF; link <= RY_LINK_LOCAL; link++)
                most = larger(most,
                              link_us(inside_pace(m, (enum ry_link)link, inside), s->messages[link], s->bytes[link]));
            if (s->messages[RY_LINK_NIC] > 0)
                most = larger(most, nic.alpha + s->messages[RY_LINK_NIC] * nic.per_message +
                                        larger(node_bytes[c->node[r]] * nic.per_byte,
                                               s->bytes[RY_LINK_NIC] / m->nic_rank_bytes_per_us) *
                                            crowded(m->nic_incast, in ? walkers[r].nodes_in : 1));
        }
    }
    return most > 0 ? most + m->group_us : 0;
}

double ry_cost_plans(const struct ry_cost_model *model, const struct ry_cluster *cluster, struct ry_plan *const *plans)
{
    int n = cluster->nranks, groups = n ? plans[0]->ngroups : 0;
    const struct ry_cost_model across = ry_cost_over_ucx(model);
    if (model->by_ucx && n && plans[0]->strategy != RY_DIRECT)
        model = &across;
    struct walker *walkers = calloc((size_t)(n ? n : 1), sizeof *walkers);
    double *node_bytes = calloc((size_t)(n ? n : 1), sizeof *node_bytes);
    double *over = calloc((size_t)groups + 1, sizeof *over); /* when groups are over, of the first part */
    long *heard = calloc((size_t)n + 1, sizeof *heard);
    double us = NAN;
    if (!walkers || !node_bytes || !over || !heard)
        goto out;
    double first = model->agreement_us, second = 0;
    if (n && plans[0]->strategy != RY_DIRECT)
        first += model->plan_us_per_rank * n;
    for (int g = 0; g <= groups; g++) {
        double copies = 0;
        int after = -1; /* of the second part's */
        for (int r = 0; r < n; r++) {
            const struct ry_plan *p = plans[r];
            bool beside = model->node_comm && walkers[r].next >= ry_second(p) && walkers[r].next < p->nsteps;
            if (beside && p->steps[walkers[r].next].after > after)
                after = p->steps[walkers[r].next].after;
            copies = larger(copies, copies_us(model, plans[r], &walkers[r]));
            beside = model->node_comm && walkers[r].next >= ry_second(p) && walkers[r].next < p->nsteps;
            if (beside && p->steps[walkers[r].next].after > after)
                after = p->steps[walkers[r].next].after;
            take_group(cluster, plans[r], &walkers[r], g, heard);
        }
        double *now = after < 0 ? &first : &second;
        bool inside = model->node_comm && n && ry_inside(plans[0]->inside, g);
        if (after >= 0)
            second = larger(second, over[after]);
        *now += copies + (g < groups ? group_us(model, cluster, walkers, inside, node_bytes) : 0);
        over[g] = first;
    }
    us = larger(first, second);
out:
    free(walkers);
    free(node_bytes);
    free(over);
    free(heard);
    return us;
}
