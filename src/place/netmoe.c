/* netmoe.c: see netmoe.h. */
#include "place/netmoe.h"

#include <stdlib.h>
#include <string.h>

struct ry_netmoe {
    const struct ry_cluster *cluster;
    int layers, experts, max_samples;
    struct ry_homes *homes;
    const struct ry_problem *problem;
    uint32_t *row;     /* [nodes or ranks]: one sample's affinities */
    float *want_nodes; /* [gather, scatter][samples][nodes] */
    float *want_ranks; /* [samples][ranks]: of both */
    float *next;       /* [experts] */
};

struct ry_netmoe *ry_netmoe_new(const struct ry_cluster *cluster, int layers, int experts, int max_samples,
                                int max_slots, struct ry_err *err)
{
    struct ry_netmoe *w = calloc(1, sizeof *w);
    size_t I = (size_t)max_samples, N = (size_t)cluster->nnodes, R = (size_t)cluster->nranks;
    if (w) {
        *w = (struct ry_netmoe){.cluster = cluster, .layers = layers, .experts = experts, .max_samples = max_samples};
        w->homes = ry_homes_new(cluster, max_samples, 2, max_slots, err);
        w->row = malloc(R * sizeof *w->row);
        w->want_nodes = malloc(2 * I * N * sizeof *w->want_nodes);
        w->want_ranks = malloc(I * R * sizeof *w->want_ranks);
        w->next = malloc((size_t)experts * sizeof *w->next);
        if (w->homes && w->row && w->want_nodes && w->want_ranks && w->next)
            return w;
    }
    ry_netmoe_free(w);
    ry_fail(err, "out of memory for placing %d samples on %d ranks", max_samples, cluster->nranks);
    return NULL;
}

void ry_netmoe_free(struct ry_netmoe *w)
{
    if (!w)
        return;
    ry_homes_free(w->homes);
    free(w->row);
    free(w->want_nodes);
    free(w->want_ranks);
    free(w->next);
    free(w);
}

int ry_netmoe_start(struct ry_netmoe *w, const struct ry_problem *p, struct ry_err *err)
{
    if (ry_problem_check(p, err))
        return -1;
    if (p->cluster != w->cluster || p->routing->layers != w->layers || p->routing->experts != w->experts ||
        p->nsamples > w->max_samples)
        return ry_fail(err,
                       "placement: the problem (%d layers, %d experts, %d samples) is not of the workspace's shape",
                       p->routing->layers, p->routing->experts, p->nsamples);
    w->problem = p;
    return 0;
}

/* want += layer l's affinities of all samples */
static void add_known(struct ry_netmoe *w, enum ry_level level, int l, float *want)
{
    int places = ry_places(w->cluster, level);
    for (int i = 0; i < w->problem->nsamples; i++, want += places) {
        ry_affinity_layer(w->problem, level, i, l, w->row);
        for (int m = 0; m < places; m++)
            want[m] += (float)w->row[m];
    }
}

/* How many of its copies sample i had in distinct pairs in a layer. */
static float part_distinct(struct ry_netmoe *w, enum ry_level level, int i, int layer)
{
    const uint16_t *counts = ry_counts_at(w->problem->routing, ry_problem_sample(w->problem, i), layer);
    float copies = 0, pairs = 0;
    for (int e = 0; e < w->experts; e++)
        copies += counts[e];
    ry_affinity_layer(w->problem, level, i, layer, w->row);
    for (int m = 0; m < ry_places(w->cluster, level); m++)
        pairs += (float)w->row[m];
    return copies > 0 ? pairs / copies : 1;
}

/* The predicted dispatch of layer `layer` + 1. Predictions are of copies; where distinct pairs count, they are scaled
   by how many of its copies the sample had in pairs in this layer. */
static void add_predicted(struct ry_netmoe *w, const struct ry_predictor *predictor, int layer)
{
    const struct ry_problem *p = w->problem;
    size_t N = (size_t)w->cluster->nnodes, R = (size_t)w->cluster->nranks, E = (size_t)w->experts;
    const int *rank = p->expert_rank + (size_t)(layer + 1) * E;
    float *want = w->want_nodes + (size_t)p->nsamples * N;
    for (size_t i = 0; i < (size_t)p->nsamples; i++) {
        const uint16_t *counts = ry_counts_at(p->routing, ry_problem_sample(p, (int)i), 0);
        float node_part = 1, rank_part = 1;
        if (p->counting == RY_DISTINCT) {
            node_part = part_distinct(w, RY_NODES, (int)i, layer);
            rank_part = part_distinct(w, RY_RANKS, (int)i, layer);
        }
        ry_predictor_next(predictor, layer, counts, w->next);
        for (size_t e = 0; e < E; e++) {
            if (w->next[e] <= 0)
                continue;
            want[i * N + (size_t)w->cluster->node[rank[e]]] += node_part * w->next[e];
            w->want_ranks[i * R + (size_t)rank[e]] += rank_part * w->next[e];
        }
    }
}

void ry_netmoe_layer(struct ry_netmoe *w, const struct ry_netmoe_options *o, int layer, const int *from, int *to)
{
    const struct ry_problem *p = w->problem;
    int N = w->cluster->nnodes, R = w->cluster->nranks;
    size_t cells = (size_t)p->nsamples * (size_t)N;
    bool last = layer + 1 == w->layers;
    memset(w->want_nodes, 0, 2 * cells * sizeof *w->want_nodes);
    memset(w->want_ranks, 0, (size_t)p->nsamples * (size_t)R * sizeof *w->want_ranks);
    add_known(w, RY_NODES, layer, w->want_nodes);
    add_known(w, RY_RANKS, layer, w->want_ranks);
    if (!last && o->scatter == RY_SCATTER_GIVEN) {
        add_known(w, RY_NODES, layer + 1, w->want_nodes + cells);
        add_known(w, RY_RANKS, layer + 1, w->want_ranks);
    } else if (!last && o->scatter == RY_SCATTER_PREDICTED) {
        add_predicted(w, o->predictor, layer);
    }
    struct ry_homes_options homes = o->homes;
    homes.seed += (uint64_t)layer << 32;
    ry_homes_solve(w->homes, &homes, p->nsamples, p->capacity, last || o->scatter == RY_SCATTER_OFF ? 1 : 2,
                   w->want_nodes, w->want_ranks, from, to);
}

int ry_netmoe_batch(struct ry_netmoe *w, const struct ry_problem *p, const struct ry_netmoe_options *o, int *homes,
                    struct ry_err *err)
{
    size_t n = (size_t)p->nsamples;
    if (ry_netmoe_start(w, p, err))
        return -1;
    for (size_t l = 0; l < (size_t)w->layers; l++)
        ry_netmoe_layer(w, o, (int)l, homes + l * n, homes + (l + 1) * n);
    return 0;
}

double ry_netmoe_solver_us(const struct ry_netmoe *w, uint64_t *calls)
{
    return ry_homes_solver_us(w->homes, calls);
}
