/* traffic.c: see traffic.h. */
#include "place/traffic.h"

#include <stdlib.h>

struct counters {
    uint32_t *nodes, *ranks;     /* one sample's affinities, [layers][…] */
    uint64_t *node_io, *rank_io; /* [layers][2 exchanges][…][out, in] */
    size_t nnodes, nranks;
};

/* Rows that `home` sends or gets, in exchange `x` (0 dispatch, 1 combine) of a layer. */
static void count(struct ry_traffic *sum, struct counters *c, const struct ry_cluster *cl, size_t layer, int x,
                  int home)
{
    const uint32_t *nodes = c->nodes + layer * c->nnodes, *ranks = c->ranks + layer * c->nranks;
    uint64_t *nio = c->node_io + (2 * layer + (size_t)x) * 2 * c->nnodes,
             *rio = c->rank_io + (2 * layer + (size_t)x) * 2 * c->nranks;
    int here = cl->node[home], out = x, in = !x; /* combine goes the other way */
    for (size_t m = 0; m < c->nnodes; m++) {
        sum->rows += nodes[m];
        if ((int)m == here)
            continue;
        sum->cross += nodes[m];
        nio[2 * (size_t)here + (size_t)out] += nodes[m];
        nio[2 * m + (size_t)in] += nodes[m];
    }
    for (size_t r = 0; r < c->nranks; r++) {
        if (cl->node[r] != here || (int)r == home)
            continue;
        sum->in_node += ranks[r];
        rio[2 * (size_t)home + (size_t)out] += ranks[r];
        rio[2 * r + (size_t)in] += ranks[r];
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

int ry_traffic_add(struct ry_traffic *sum, const struct ry_problem *p, const int *home, size_t stride,
                   struct ry_err *err)
{
    const struct ry_cluster *cl = p->cluster;
    size_t L = (size_t)p->routing->layers;
    struct counters c = {.nnodes = (size_t)cl->nnodes, .nranks = (size_t)cl->nranks};
    c.nodes = malloc(L * c.nnodes * sizeof *c.nodes);
    c.ranks = malloc(L * c.nranks * sizeof *c.ranks);
    c.node_io = calloc(4 * L * c.nnodes, sizeof *c.node_io);
    c.rank_io = calloc(4 * L * c.nranks, sizeof *c.rank_io);
    int failed = c.nodes && c.ranks && c.node_io && c.rank_io ? 0 : ry_fail(err, "out of memory for counting traffic");
    for (int i = 0; i < p->nsamples && !failed; i++) {
        ry_affinity(p, RY_NODES, i, c.nodes);
        ry_affinity(p, RY_RANKS, i, c.ranks);
        for (size_t l = 0; l < L; l++) {
            int from = home[l * stride + (size_t)i], to = home[(l + 1) * stride + (size_t)i];
            count(sum, &c, cl, l, 0, from);
            count(sum, &c, cl, l, 1, to);
            sum->moved += from != to;
        }
    }
    for (size_t x = 0; x < 2 * L && !failed; x++) {
        const uint64_t *nio = c.node_io + x * 2 * c.nnodes, *rio = c.rank_io + x * 2 * c.nranks;
        uint64_t nic = busiest(nio, c.nnodes), all = 0;
        for (size_t m = 0; m < c.nnodes; m++)
            all += nio[2 * m];
        sum->busiest_nic += nic;
        sum->even_nic += (all + c.nnodes - 1) / c.nnodes;
        if (p->model) {
            double intra = link_us(p, RY_LINK_LOCAL, busiest(rio, c.nranks)), inter = link_us(p, RY_LINK_NIC, nic);
            sum->us += intra > inter ? intra : inter;
        }
    }
    free(c.nodes);
    free(c.ranks);
    free(c.node_io);
    free(c.rank_io);
    return failed;
}
