/* traffic.c: see traffic.h. */
#include "place/traffic.h"

#include <stdlib.h>
#include <string.h>

struct counters {
    uint32_t *nodes, *ranks;     /* one sample's affinities in one layer */
    uint64_t *node_io, *rank_io; /* [2 exchanges][places][out, in] of one layer */
};

/* Rows that `home` sends or gets, in exchange `x` (0 dispatch, 1 combine). */
static void count(struct ry_traffic *sum, const struct counters *c, const struct ry_cluster *cl, int x, int home)
{
    size_t N = (size_t)cl->nnodes, R = (size_t)cl->nranks, here = (size_t)cl->node[home];
    uint64_t *nio = c->node_io + (size_t)x * 2 * N, *rio = c->rank_io + (size_t)x * 2 * R;
    int out = x, in = !x; /* combine goes the other way */
    for (size_t m = 0; m < N; m++) {
        sum->rows += c->nodes[m];
        if (m == here)
            continue;
        sum->cross += c->nodes[m];
        nio[2 * here + (size_t)out] += c->nodes[m];
        nio[2 * m + (size_t)in] += c->nodes[m];
    }
    for (size_t r = (size_t)cl->node_first[here], left = (size_t)cl->node_size[here]; left; r++) {
        if ((size_t)cl->node[r] != here)
            continue;
        left--;
        if ((int)r == home)
            continue;
        sum->in_node += c->ranks[r];
        rio[2 * (size_t)home + (size_t)out] += c->ranks[r];
        rio[2 * r + (size_t)in] += c->ranks[r];
    }
}

static uint64_t busiest(const uint64_t *io, size_t n)
{
    uint64_t most = 0;
    for (size_t k = 0; k < 2 * n; k++)
        most = io[k] > most ? io[k] : most;
    return most;
}

static double link_us(const struct ry_problem *p, enum ry_link link, uint64_t rows)
{
    return rows ? p->model->link[link].alpha_us + (double)rows * p->row_bytes / p->model->link[link].bytes_per_us : 0;
}

static void sum_up(struct ry_traffic *sum, const struct counters *c, const struct ry_problem *p, int x)
{
    size_t N = (size_t)p->cluster->nnodes, R = (size_t)p->cluster->nranks;
    const uint64_t *nio = c->node_io + (size_t)x * 2 * N, *rio = c->rank_io + (size_t)x * 2 * R;
    uint64_t nic = busiest(nio, N), all = 0;
    for (size_t m = 0; m < N; m++)
        all += nio[2 * m];
    sum->busiest_nic += nic;
    sum->even_nic += (all + N - 1) / N;
    if (p->model) {
        double intra = link_us(p, RY_LINK_LOCAL, busiest(rio, R)), inter = link_us(p, RY_LINK_NIC, nic);
        sum->us += intra > inter ? intra : inter;
    }
}

int ry_traffic_add(struct ry_traffic *sum, const struct ry_problem *p, const int *home, size_t stride,
                   struct ry_err *err)
{
    const struct ry_cluster *cl = p->cluster;
    size_t N = (size_t)cl->nnodes, R = (size_t)cl->nranks;
    struct counters c = {malloc(N * sizeof *c.nodes), malloc(R * sizeof *c.ranks), malloc(4 * N * sizeof *c.node_io),
                         malloc(4 * R * sizeof *c.rank_io)};
    int failed = c.nodes && c.ranks && c.node_io && c.rank_io ? 0 : ry_fail(err, "out of memory for counting traffic");
    for (int l = 0; l < p->routing->layers && !failed; l++) {
        memset(c.node_io, 0, 4 * N * sizeof *c.node_io);
        memset(c.rank_io, 0, 4 * R * sizeof *c.rank_io);
        for (int i = 0; i < p->nsamples; i++) {
            int from = home[(size_t)l * stride + (size_t)i], to = home[(size_t)(l + 1) * stride + (size_t)i];
            ry_affinity_layer(p, RY_NODES, i, l, c.nodes);
            ry_affinity_layer(p, RY_RANKS, i, l, c.ranks);
            count(sum, &c, cl, 0, from);
            count(sum, &c, cl, 1, to);
            sum->moved += from != to;
        }
        sum_up(sum, &c, p, 0);
        sum_up(sum, &c, p, 1);
    }
    free(c.nodes);
    free(c.ranks);
    free(c.node_io);
    free(c.rank_io);
    return failed;
}
