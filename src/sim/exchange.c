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
    uint32_t *rows;       /* [ranks][ranks] */
    uint32_t *distinct;   /* [ranks][nodes] */
    uint32_t *crossing;   /* [ranks][nodes]: copies that go there from here, to other nodes only */
    /* of one way; dedup's beside the full ones */
    struct ry_load *load, *less;
    uint64_t *relayed, *relayed_less; /* passed on to others */
    uint64_t *arriving;               /* over the NIC of a relay, its own pieces included */
    uint64_t *arriving_less, *leaving_less;
    uint8_t *seen; /* [ranks][nodes] */
    double *nic[2];
};

const char *ry_sim_strategy_name(enum ry_sim_strategy s)
{
    static const char *const names[RY_SIM_STRATEGIES] = {"plain", "hierarchical", "dedup", "sum"};
    return (unsigned)s < RY_SIM_STRATEGIES ? names[s] : "?";
}

size_t ry_exchange_memory(const struct ry_cluster *c)
{
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes;
    return R * R * 4 + R * N * 9 + R * (2 * sizeof(struct ry_load) + 5 * 8 + 2 * 8);
}

struct ry_exchange *ry_exchange_new(const struct ry_cluster *c, bool pairs, struct ry_err *err)
{
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes;
    struct ry_exchange *x = calloc(1, sizeof *x);
    if (x) {
        x->cluster = c;
        x->pairs = pairs;
        x->first = calloc(N + 1, sizeof *x->first);
        x->rank_at = malloc(R * sizeof *x->rank_at);
        x->rows = malloc(R * R * sizeof *x->rows);
        x->distinct = malloc(R * N * sizeof *x->distinct);
        x->crossing = malloc(R * N * sizeof *x->crossing);
        x->load = malloc(R * sizeof *x->load);
        x->less = malloc(R * sizeof *x->less);
        x->relayed = malloc(R * sizeof *x->relayed);
        x->relayed_less = malloc(R * sizeof *x->relayed_less);
        x->arriving = malloc(R * sizeof *x->arriving);
        x->arriving_less = malloc(R * sizeof *x->arriving_less);
        x->leaving_less = malloc(R * sizeof *x->leaving_less);
        x->seen = malloc(R * N);
        x->nic[0] = malloc(R * sizeof *x->nic[0]);
        x->nic[1] = malloc(R * sizeof *x->nic[1]);
        if (x->first && x->rank_at && x->rows && x->distinct && x->crossing && x->load && x->less && x->relayed &&
            x->relayed_less && x->arriving && x->arriving_less && x->leaving_less && x->seen && x->nic[0] &&
            x->nic[1]) {
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
    free(x->load);
    free(x->less);
    free(x->relayed);
    free(x->relayed_less);
    free(x->arriving);
    free(x->arriving_less);
    free(x->leaving_less);
    free(x->seen);
    free(x->nic[0]);
    free(x->nic[1]);
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

/* ---- counting ---- */

void ry_exchange_count(struct ry_exchange *x, const struct ry_workload *w, int layer, const int *home,
                       const int *expert_rank)
{
    const struct ry_cluster *c = x->cluster;
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes;
    memset(x->rows, 0, R * R * sizeof *x->rows);
    memset(x->distinct, 0, R * N * sizeof *x->distinct);
    memset(x->crossing, 0, R * N * sizeof *x->crossing);
    for (int i = 0; i < w->samples; i++) {
        size_t from = (size_t)home[i];
        int here = c->node[from], K = w->topk;
        uint32_t *rows = x->rows + from * R, *distinct = x->distinct + from * N, *crossing = x->crossing + from * N;
        const uint16_t *expert = ry_workload_at(w, layer, i);
        for (int t = 0; t < w->tokens; t++, expert += K) {
            int node[RY_ROUTING_TOPK];
            for (int k = 0; k < K; k++) {
                node[k] = -1;
                if (expert[k] == RY_NO_EXPERT)
                    continue;
                int to = expert_rank[expert[k]], twin = 0;
                rows[to]++;
                node[k] = c->node[to];
                if (node[k] == here)
                    continue;
                crossing[node[k]]++;
                while (node[twin] != node[k])
                    twin++;
                distinct[node[k]] += twin == k;
            }
        }
    }
}

/* ---- loads ---- */

/* ry_load_of() for all ranks in one pass over the matrix, and what each relays: `there`, or the matrix transposed. */
static void loads(struct ry_exchange *x, enum ry_way way, double row_bytes)
{
    const struct ry_cluster *c = x->cluster;
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes;
    bool there = way == RY_THERE;
    memset(x->load, 0, R * sizeof *x->load);
    memset(x->relayed, 0, R * sizeof *x->relayed);
    memset(x->arriving, 0, R * sizeof *x->arriving);
    memset(x->seen, 0, R * N); /* by [expert's rank][home's node] */
    for (size_t h = 0; h < R; h++) {
        const uint32_t *rows = x->rows + h * R;
        struct ry_load *home = &x->load[h];
        int hn = c->node[h];
        for (size_t e = 0; e < R; e++) {
            if (!rows[e])
                continue;
            uint64_t bytes = (uint64_t)llrint(rows[e] * row_bytes);
            struct ry_load *expert = &x->load[e];
            int en = c->node[e];
            if (h == e) {
                home->self += bytes;
            } else if (en == hn) {
                home->local_out += bytes;
                home->local_sends++;
                expert->local_in += bytes;
                expert->local_recvs++;
            } else {
                home->cross_out += bytes;
                home->cross_sends++;
                expert->cross_in += bytes;
                expert->cross_recvs++;
                uint8_t *seen = &x->seen[e * N + (size_t)hn];
                expert->nodes_in += !*seen;
                *seen = 1;
                size_t from = there ? h : e, to = there ? e : h;
                int node = there ? en : hn;
                size_t relay = (size_t)x->rank_at[x->first[node] + c->local[from] % c->node_size[node]];
                x->arriving[relay] += bytes;
                x->relayed[relay] += relay != to ? bytes : 0;
            }
        }
        for (size_t n = 0; n < N; n++)
            home->nodes_out += x->crossing[h * N + n] > 0;
    }
    for (size_t r = 0; r < R && !there; r++) {
        struct ry_load l = x->load[r];
        x->load[r] = (struct ry_load){.self = l.self,
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
    }
}

/* The way there with each token once per node, on top of loads(): `less` has the NIC's bytes where they really pass. */
static void loads_less(struct ry_exchange *x, double row_bytes)
{
    const struct ry_cluster *c = x->cluster;
    size_t R = (size_t)c->nranks, N = (size_t)c->nnodes;
    memset(x->arriving_less, 0, R * sizeof *x->arriving_less);
    memset(x->leaving_less, 0, R * sizeof *x->leaving_less);
    for (size_t h = 0; h < R; h++)
        for (size_t n = 0; n < N; n++) {
            if (!x->crossing[h * N + n])
                continue;
            uint64_t bytes =
                (uint64_t)llrint(x->distinct[h * N + n] * row_bytes + x->crossing[h * N + n] * (double)INDEX_BYTES);
            x->leaving_less[h] += bytes;
            x->arriving_less[x->rank_at[x->first[n] + c->local[h] % c->node_size[n]]] += bytes;
        }
    for (size_t r = 0; r < R; r++) {
        x->less[r] = x->load[r];
        x->less[r].cross_out = x->leaving_less[r];
        x->less[r].cross_in = x->arriving_less[r];
    }
    /* The model adds an even share of the node's bytes to what a relay passes on: it is to come to what arrives. */
    for (size_t n = 0; n < N; n++) {
        uint64_t in = 0;
        for (int k = x->first[n]; k < x->first[n + 1]; k++)
            in += x->arriving_less[x->rank_at[k]];
        uint64_t share = in / (uint64_t)c->node_size[n];
        for (int k = x->first[n]; k < x->first[n + 1]; k++) {
            uint64_t arriving = x->arriving_less[x->rank_at[k]];
            x->relayed_less[x->rank_at[k]] = arriving > share ? arriving - share : 0;
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
    ry_cost_parts_of(full, m, x->cluster, x->load, x->relayed);
    ry_cost_parts_of(less, m, x->cluster, x->less, x->relayed_less);
    const struct ry_cost_parts *f = &full[RY_HIERARCHICAL], *l = &less[RY_HIERARCHICAL];
    uint64_t most_out = 0;
    for (int r = 0; r < x->cluster->nranks; r++)
        most_out = x->load[r].cross_out > most_out ? x->load[r].cross_out : most_out;
    double search = mirrored || !most_out ? 0 : m->copy_us + (double)most_out / m->copy_bytes_per_us;
    double links = fmax(f->self, fmax(f->local, l->nic));
    return f->groups + search + pass_us(m, x, x->leaving_less) + links + pass_us(m, x, x->arriving) + f->forward +
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
        double local = 0, relayed = total(x->relayed, R);
        for (int r = 0; r < R; r++)
            local += (double)x->load[r].local_out;
        double direct = ry_cost_estimate(m, x->cluster, x->load, NULL, RY_DIRECT);
        o[RY_SIM_PLAIN].us = direct - m->agreement_us;
        o[RY_SIM_HIERARCHICAL].us = ry_cost_estimate(m, x->cluster, x->load, x->relayed, RY_HIERARCHICAL);
        fill_nics(x, NULL, NULL);
        balance(x, rails, &o[RY_SIM_PLAIN]);
        o[RY_SIM_PLAIN].local_bytes = local;
        fill_nics(x, x->arriving, NULL);
        balance(x, rails, &o[RY_SIM_HIERARCHICAL]);
        o[RY_SIM_HIERARCHICAL].local_bytes = local + relayed;
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
        fill_nics(x, x->arriving_less, x->leaving_less);
        balance(x, rails, dedup);
        dedup->local_bytes = local + relayed;
        dedup->us = dedup_us(m, x, false);
        *sum = *dedup;
        sum->us = dedup_us(m, x, true);
    }
    out[RY_THERE][RY_SIM_SUM].us = out[RY_THERE][RY_SIM_DEDUP].us;
}
