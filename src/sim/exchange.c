/* exchange.c: see exchange.h. */
#include "sim/exchange.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "plan/cost_parts.h"

#define INDEX_BYTES 4 /* of each copy that a relay writes out */

struct ry_exchange {
    const struct ry_cluster *cluster;
    bool pairs;
    int *first, *rank_at; /* [nodes + 1], [ranks]: a node's ranks by local index */
    /* in rows */
    uint32_t *rows;                                 /* [ranks][ranks] */
    uint32_t *distinct;                             /* [ranks][nodes] */
    uint32_t *crossing;                             /* [ranks][nodes]: copies that go there, to other nodes only */
    uint64_t *node_rows;                            /* [nodes] */
    struct ry_load *count;                          /* [ranks]: the way there */
    uint64_t *arriving[RY_WAYS], *relayed[RY_WAYS]; /* [ranks]: over a relay's NIC; of that, passed on to others */
    int *stamp;                                     /* [ranks]: scratch */
    /* in bytes, of one way */
    struct ry_load *load, *less; /* less: dedup's */
    uint64_t *passed, *comes;    /* relayed, arriving */
    uint64_t *passed_less, *comes_less, *leaves_less;
    double *nic[2];
};

const char *ry_sim_strategy_name(enum ry_sim_strategy s)
{
    static const char *const names[RY_SIM_STRATEGIES] = {"plain", "hierarchical", "balanced", "dedup", "sum"};
    return (unsigned)s < RY_SIM_STRATEGIES ? names[s] : "?";
}

size_t ry_exchange_memory(const struct ry_cluster *c)
{
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes;
    return R * R * 4 + R * N * 8 + R * (3 * sizeof(struct ry_load) + 11 * 8);
}

struct ry_exchange *ry_exchange_new(const struct ry_cluster *c, bool pairs, struct ry_err *err)
{
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes;
    struct ry_exchange *x = calloc(1, sizeof *x);
    if (x) {
        *x = (struct ry_exchange){.cluster = c, .pairs = pairs};
        x->first = calloc(N + 1, sizeof *x->first);
        x->rank_at = malloc(R * sizeof *x->rank_at);
        x->rows = malloc(R * R * sizeof *x->rows);
        x->distinct = malloc(R * N * sizeof *x->distinct);
        x->crossing = malloc(R * N * sizeof *x->crossing);
        x->node_rows = malloc(N * sizeof *x->node_rows);
        x->count = malloc(3 * R * sizeof *x->count);
        x->stamp = malloc(R * sizeof *x->stamp);
        x->passed = malloc(9 * R * sizeof *x->passed);
        x->nic[0] = malloc(2 * R * sizeof *x->nic[0]);
        if (x->first && x->rank_at && x->rows && x->distinct && x->crossing && x->node_rows && x->count && x->stamp &&
            x->passed && x->nic[0]) {
            x->load = x->count + R;
            x->less = x->load + R;
            x->comes = x->passed + R;
            x->passed_less = x->comes + R;
            x->comes_less = x->passed_less + R;
            x->leaves_less = x->comes_less + R;
            for (int way = 0; way < RY_WAYS; way++) {
                x->arriving[way] = x->leaves_less + (size_t)(1 + way) * R;
                x->relayed[way] = x->arriving[way] + 2 * R;
            }
            x->nic[1] = x->nic[0] + R;
            for (size_t n = 0; n < N; n++)
                x->first[n + 1] = x->first[n] + c->node_size[n];
            for (size_t r = 0; r < R; r++)
                x->rank_at[x->first[c->node[r]] + c->local[r]] = (int)r;
            return x;
        }
    }
    ry_exchange_free(x);
    ry_fail(err, "out of memory for the exchanges of %d ranks: they take %.1f GB", c->nranks,
            (double)ry_exchange_memory(c) / 1e9);
    return NULL;
}

void ry_exchange_free(struct ry_exchange *x)
{
    if (!x)
        return;
    free(x->first);
    free(x->rank_at);
    free(x->rows);
    free(x->distinct);
    free(x->crossing);
    free(x->node_rows);
    free(x->count);
    free(x->stamp);
    free(x->passed);
    free(x->nic[0]);
    free(x);
}

const uint32_t *ry_exchange_rows(const struct ry_exchange *x)
{
    return x->rows;
}

const uint32_t *ry_exchange_distinct(const struct ry_exchange *x)
{
    return x->distinct;
}

const uint64_t *ry_exchange_node_rows(const struct ry_exchange *x)
{
    return x->node_rows;
}

uint64_t ry_exchange_crossing(const struct ry_exchange *x, uint64_t *distinct)
{
    uint64_t copies = 0;
    *distinct = 0;
    for (size_t k = 0; k < (size_t)x->cluster->nranks * (size_t)x->cluster->nnodes; k++) {
        copies += x->crossing[k];
        *distinct += x->distinct[k];
    }
    return copies;
}

const struct ry_load *ry_exchange_loads(const struct ry_exchange *x, const uint64_t **relayed)
{
    *relayed = x->passed;
    return x->load;
}

/* ---- counting ---- */

static void count_sample(struct ry_exchange *x, const struct ry_workload *w, const uint16_t *expert, int home,
                         const int *expert_rank)
{
    const struct ry_cluster *c = x->cluster;
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes, from = (size_t)home;
    int here = c->node[home], K = w->topk;
    uint32_t *rows = x->rows + from * R, *distinct = x->distinct + from * N, *crossing = x->crossing + from * N;
    for (int t = 0; t < w->tokens; t++, expert += K) {
        int node[RY_ROUTING_TOPK];
        for (int k = 0; k < K; k++) {
            node[k] = -1;
            if (expert[k] == RY_NO_EXPERT)
                continue;
            int to = expert_rank[expert[k]], twin = 0;
            rows[to]++;
            node[k] = c->node[to];
            x->node_rows[node[k]]++;
            if (node[k] == here)
                continue;
            crossing[node[k]]++;
            while (node[twin] != node[k])
                twin++;
            distinct[node[k]] += twin == k;
        }
    }
}

static int relay_on(const struct ry_exchange *x, int node, int local)
{
    int size = x->cluster->node_size[node];
    return x->rank_at[x->first[node] + (local < size ? local : local % size)]; /* dividing is slow */
}

/* What goes from rank h to the ranks of node n, another one; and who relays it, there and back. */
static void count_crossing(struct ry_exchange *x, size_t h, size_t n)
{
    const struct ry_cluster *c = x->cluster;
    int hn = c->node[h], relay = relay_on(x, (int)n, c->local[h]);
    const uint32_t *rows = x->rows + h * (size_t)c->nranks;
    uint32_t crossing = x->crossing[h * (size_t)c->nnodes + n], sends = 0;
    x->arriving[RY_THERE][relay] += crossing;
    x->relayed[RY_THERE][relay] += crossing - rows[relay];
    for (int k = x->first[n]; k < x->first[n + 1]; k++) {
        int e = x->rank_at[k];
        if (!rows[e])
            continue;
        struct ry_load *expert = &x->count[e];
        int back = relay_on(x, hn, c->local[e]);
        sends++;
        expert->cross_in += rows[e];
        expert->cross_recvs++;
        expert->nodes_in += x->stamp[e] != hn;
        x->stamp[e] = hn;
        x->arriving[RY_BACK][back] += rows[e];
        x->relayed[RY_BACK][back] += back != (int)h ? rows[e] : 0;
    }
    x->count[h].nodes_out++;
    x->count[h].cross_out += crossing;
    x->count[h].cross_sends += sends;
}

static void count_in_node(struct ry_exchange *x, size_t h)
{
    const struct ry_cluster *c = x->cluster;
    const uint32_t *rows = x->rows + h * (size_t)c->nranks;
    struct ry_load *home = &x->count[h];
    for (int k = x->first[c->node[h]]; k < x->first[c->node[h] + 1]; k++) {
        size_t e = (size_t)x->rank_at[k];
        if (!rows[e])
            continue;
        if (e == h) {
            home->self = rows[e];
            continue;
        }
        home->local_out += rows[e];
        home->local_sends++;
        x->count[e].local_in += rows[e];
        x->count[e].local_recvs++;
    }
}

void ry_exchange_count(struct ry_exchange *x, const struct ry_workload *w, int layer, const int *home,
                       const int *expert_rank)
{
    size_t R = (size_t)x->cluster->nranks, N = (size_t)x->cluster->nnodes;
    memset(x->rows, 0, R * R * sizeof *x->rows);
    memset(x->distinct, 0, R * N * sizeof *x->distinct);
    memset(x->crossing, 0, R * N * sizeof *x->crossing);
    memset(x->node_rows, 0, N * sizeof *x->node_rows);
    memset(x->count, 0, R * sizeof *x->count);
    for (int way = 0; way < RY_WAYS; way++) {
        memset(x->arriving[way], 0, R * sizeof *x->arriving[way]);
        memset(x->relayed[way], 0, R * sizeof *x->relayed[way]);
    }
    for (int i = 0; i < w->samples; i++)
        count_sample(x, w, ry_workload_at(w, layer, i), home[i], expert_rank);
    for (size_t r = 0; r < R; r++)
        x->stamp[r] = -1;
    for (size_t k = 0; k < R; k++) { /* node by node, so that one stamp tells whether a node was heard of before */
        size_t h = (size_t)x->rank_at[k];
        count_in_node(x, h);
        for (size_t n = 0; n < N; n++)
            if (x->crossing[h * N + n])
                count_crossing(x, h, n);
    }
}

/* ---- loads ---- */

static uint64_t bytes_of(uint64_t rows, double row_bytes)
{
    return (uint64_t)llrint((double)rows * row_bytes);
}

/* As ry_load_of() gives them for the matrix, or the matrix transposed. */
static void loads(struct ry_exchange *x, enum ry_way way, double row_bytes)
{
    for (int r = 0; r < x->cluster->nranks; r++) {
        struct ry_load l = x->count[r];
        if (way == RY_BACK)
            l = (struct ry_load){.self = l.self,
                                 .local_out = l.local_in,
                                 .local_in = l.local_out,
                                 .cross_out = l.cross_in,
                                 .cross_in = l.cross_out,
                                 .local_sends = l.local_recvs,
                                 .local_recvs = l.local_sends,
                                 .cross_sends = l.cross_recvs,
                                 .cross_recvs = l.cross_sends,
                                 .nodes_out = l.nodes_in,
                                 .nodes_in = l.nodes_out};
        l.self = bytes_of(l.self, row_bytes);
        l.local_out = bytes_of(l.local_out, row_bytes);
        l.local_in = bytes_of(l.local_in, row_bytes);
        l.cross_out = bytes_of(l.cross_out, row_bytes);
        l.cross_in = bytes_of(l.cross_in, row_bytes);
        l.packed_out = l.cross_out; /* nobody looked */
        x->load[r] = l;
        x->comes[r] = bytes_of(x->arriving[way][r], row_bytes);
        x->passed[r] = bytes_of(x->relayed[way][r], row_bytes);
    }
}

/* The way there with each token once per node, on top of loads(): `less` has the NIC's bytes where they really pass. */
static void loads_less(struct ry_exchange *x, double row_bytes)
{
    const struct ry_cluster *c = x->cluster;
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes;
    memset(x->comes_less, 0, R * sizeof *x->comes_less);
    memset(x->leaves_less, 0, R * sizeof *x->leaves_less);
    for (size_t h = 0; h < R; h++)
        for (size_t n = 0; n < N; n++) {
            if (!x->crossing[h * N + n])
                continue;
            uint64_t bytes =
                (uint64_t)llrint(x->distinct[h * N + n] * row_bytes + x->crossing[h * N + n] * (double)INDEX_BYTES);
            x->leaves_less[h] += bytes;
            x->comes_less[x->rank_at[x->first[n] + c->local[h] % c->node_size[n]]] += bytes;
        }
    for (size_t r = 0; r < R; r++) {
        x->less[r] = x->load[r];
        x->less[r].cross_out = x->leaves_less[r];
        x->less[r].cross_in = x->comes_less[r];
    }
    /* The model adds an even share of the node's bytes to what a relay passes on: it is to come to what arrives. */
    for (size_t n = 0; n < N; n++) {
        uint64_t in = 0;
        for (int k = x->first[n]; k < x->first[n + 1]; k++)
            in += x->comes_less[x->rank_at[k]];
        uint64_t share = in / (uint64_t)c->node_size[n];
        for (int k = x->first[n]; k < x->first[n + 1]; k++) {
            uint64_t arriving = x->comes_less[x->rank_at[k]];
            x->passed_less[x->rank_at[k]] = arriving > share ? arriving - share : 0;
        }
    }
}

/* ---- costs ---- */

/* Microseconds of reading or writing the most of `bytes` that any rank has. */
static double pass_us(const struct ry_cost_model *m, const struct ry_exchange *x, const uint64_t *bytes)
{
    uint64_t most = 0;
    for (int r = 0; r < x->cluster->nranks; r++)
        most = bytes[r] > most ? bytes[r] : most;
    return most ? m->copy_us + (double)most / m->copy_bytes_per_us : 0;
}

/* `mirrored`: the way back, by sums: the same bytes and messages, but nothing is searched for. */
static double dedup_us(const struct ry_cost_model *m, struct ry_exchange *x, bool mirrored)
{
    struct ry_cost_parts full[RY_STRATEGIES], less[RY_STRATEGIES];
    ry_cost_parts_of(full, m, x->cluster, x->load, &(struct ry_cost_matrix){.relayed = x->passed});
    ry_cost_parts_of(less, m, x->cluster, x->less, &(struct ry_cost_matrix){.relayed = x->passed_less});
    const struct ry_cost_parts *f = &full[RY_HIERARCHICAL], *l = &less[RY_HIERARCHICAL];
    uint64_t most_out = 0;
    for (int r = 0; r < x->cluster->nranks; r++)
        most_out = x->load[r].cross_out > most_out ? x->load[r].cross_out : most_out;
    double search = mirrored || !most_out ? 0 : m->copy_us + (double)most_out / m->copy_bytes_per_us;
    double links = fmax(f->self, fmax(f->local, l->nic));
    return f->groups + search + pass_us(m, x, x->leaves_less) + links + pass_us(m, x, x->comes) + f->forward +
           f->overhead;
}

/* out, in: bytes over each rank's NIC. */
static void balance(struct ry_exchange *x, bool rails, struct ry_exchange_cost *cost)
{
    const struct ry_cluster *c = x->cluster;
    double sum = 0, most = 0;
    int units = rails ? c->nranks : c->nnodes;
    for (int way = 0; way < 2; way++) {
        double *nic = x->nic[way];
        for (int r = 0; r < c->nranks && way == 0; r++)
            sum += nic[r];
        for (int n = 0; n < units; n++) {
            double unit = rails ? nic[n] : 0;
            for (int k = rails ? 1 : x->first[n]; k < (rails ? 1 : x->first[n + 1]); k++)
                unit += nic[x->rank_at[k]];
            most = fmax(most, unit);
        }
    }
    cost->cross_bytes = sum;
    cost->nic_most = most;
    cost->nic_mean = sum / units;
}

static void fill_nics(struct ry_exchange *x, const uint64_t *in, const uint64_t *out)
{
    for (int r = 0; r < x->cluster->nranks; r++) {
        x->nic[0][r] = (double)(out ? out[r] : x->load[r].cross_out);
        x->nic[1][r] = (double)(in ? in[r] : x->load[r].cross_in);
    }
}

/* Balanced: every rank of a node has its share, each way. Returns what moves inside nodes for that, about: what ranks send above
 * their share, and what comes to others than it is for. */
static double even_nics(struct ry_exchange *x)
{
    const struct ry_cluster *c = x->cluster;
    double moves = 0;
    fill_nics(x, NULL, NULL);
    for (int way = 0; way < 2; way++)
        for (int n = 0; n < c->nnodes; n++) {
            double sum = 0;
            for (int k = x->first[n]; k < x->first[n + 1]; k++)
                sum += x->nic[way][x->rank_at[k]];
            for (int k = x->first[n]; k < x->first[n + 1]; k++) {
                double *nic = &x->nic[way][x->rank_at[k]], share = sum / c->node_size[n];
                moves += way == 0 ? fmax(*nic - share, 0) : *nic * (1 - 1.0 / c->node_size[n]);
                *nic = share;
            }
        }
    return moves;
}

static double total(const uint64_t *bytes, int n)
{
    double sum = 0;
    for (int r = 0; r < n; r++)
        sum += (double)bytes[r];
    return sum;
}

void ry_exchange_costs(struct ry_exchange *x, const struct ry_cost_model *m, double row_bytes, bool rails,
                       struct ry_exchange_cost out[RY_WAYS][RY_SIM_STRATEGIES])
{
    int R = x->cluster->nranks;
    memset(out, 0, RY_WAYS * sizeof *out);
    for (int way = RY_THERE; way <= RY_BACK; way++) {
        struct ry_exchange_cost *o = out[way];
        loads(x, (enum ry_way)way, row_bytes);
        double local = 0, relayed = total(x->passed, R);
        for (int r = 0; r < R; r++)
            local += (double)x->load[r].local_out;
        double direct = ry_cost_estimate(m, x->cluster, x->load, NULL, RY_DIRECT);
        o[RY_SIM_PLAIN].us = direct - m->agreement_us;
        o[RY_SIM_HIERARCHICAL].us = ry_cost_estimate(m, x->cluster, x->load, &(struct ry_cost_matrix){.relayed = x->passed}, RY_HIERARCHICAL);
        fill_nics(x, NULL, NULL);
        balance(x, rails, &o[RY_SIM_PLAIN]);
        o[RY_SIM_PLAIN].local_bytes = local;
        fill_nics(x, x->comes, NULL);
        balance(x, rails, &o[RY_SIM_HIERARCHICAL]);
        o[RY_SIM_HIERARCHICAL].local_bytes = local + relayed;
        o[RY_SIM_BALANCED].us = ry_cost_estimate(m, x->cluster, x->load, NULL, RY_BALANCED);
        o[RY_SIM_BALANCED].local_bytes = local + even_nics(x);
        balance(x, rails, &o[RY_SIM_BALANCED]);
        if (!x->pairs)
            continue;
        struct ry_exchange_cost *dedup = &o[RY_SIM_DEDUP], *sum = &o[RY_SIM_SUM];
        if (way == RY_BACK) {
            bool hierarchical = o[RY_SIM_HIERARCHICAL].us < direct;
            *dedup = o[hierarchical ? RY_SIM_HIERARCHICAL : RY_SIM_PLAIN];
            dedup->us = hierarchical ? dedup->us : direct;
            /* The mirror image of what was found on the way there, which comes first; NICs swap their ways. */
            *sum = out[RY_THERE][RY_SIM_DEDUP];
            sum->us = out[RY_THERE][RY_SIM_SUM].us;
            continue;
        }
        loads_less(x, row_bytes);
        fill_nics(x, x->comes_less, x->leaves_less);
        balance(x, rails, dedup);
        dedup->local_bytes = local + relayed;
        dedup->us = dedup_us(m, x, false);
        *sum = *dedup;
        sum->us = dedup_us(m, x, true);
    }
    out[RY_THERE][RY_SIM_SUM].us = out[RY_THERE][RY_SIM_DEDUP].us;
}
