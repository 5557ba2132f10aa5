/* netmoe.c: see netmoe.h. */
#include "place/netmoe.h"

#include <stdlib.h>
#include <string.h>

struct ry_netmoe {
    const struct ry_cluster *cluster;
    int layers, experts, max_samples;
    struct ry_homes *homes;
    const struct ry_problem *problem;
    uint32_t *nodes, *ranks;        /* [samples][layers][…]: affinities */
    float *want_nodes, *want_ranks; /* [samples][…]: of the exchanges that a home counts for */
    float *next;                    /* [experts] */
};

struct ry_netmoe *ry_netmoe_new(const struct ry_cluster *cluster, int layers, int experts, int max_samples,
                                int max_slots, struct ry_err *err)
{
    struct ry_netmoe *w = calloc(1, sizeof *w);
    size_t I = (size_t)max_samples, N = (size_t)cluster->nnodes, R = (size_t)cluster->nranks, L = (size_t)layers;
    if (w) {
        *w = (struct ry_netmoe){.cluster = cluster, .layers = layers, .experts = experts, .max_samples = max_samples};
        w->homes = ry_homes_new(cluster, max_samples, max_slots, err);
        w->nodes = malloc(I * L * N * sizeof *w->nodes);
        w->ranks = malloc(I * L * R * sizeof *w->ranks);
        w->want_nodes = malloc(I * N * sizeof *w->want_nodes);
        w->want_ranks = malloc(I * R * sizeof *w->want_ranks);
        w->next = malloc((size_t)experts * sizeof *w->next);
        if (w->homes && w->nodes && w->ranks && w->want_nodes && w->want_ranks && w->next)
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
    free(w->nodes);
    free(w->ranks);
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
    for (int i = 0; i < p->nsamples; i++) {
        ry_affinity(p, RY_NODES, i, w->nodes + (size_t)i * (size_t)w->layers * (size_t)w->cluster->nnodes);
        ry_affinity(p, RY_RANKS, i, w->ranks + (size_t)i * (size_t)w->layers * (size_t)w->cluster->nranks);
    }
    return 0;
}

/* want += layer l's affinities of all samples */
static void add_known(const struct ry_netmoe *w, const uint32_t *affinities, int places, int l, float *want)
{
    for (int i = 0; i < w->problem->nsamples; i++, want += places) {
        const uint32_t *a = affinities + ((size_t)i * (size_t)w->layers + (size_t)l) * (size_t)places;
        for (int m = 0; m < places; m++)
            want[m] += (float)a[m];
    }
}

/* The predicted dispatch of layer `layer` + 1. Predictions are of copies; where distinct pairs count, they are scaled
   by how many of its copies the sample had in pairs in this layer. */
static void add_predicted(const struct ry_netmoe *w, const struct ry_predictor *predictor, int layer)
{
    const struct ry_problem *p = w->problem;
    size_t N = (size_t)w->cluster->nnodes, R = (size_t)w->cluster->nranks, E = (size_t)w->experts;
    const int *rank = p->expert_rank + (size_t)(layer + 1) * E;
    for (size_t i = 0; i < (size_t)p->nsamples; i++) {
        const uint16_t *counts = ry_counts_at(p->routing, ry_problem_sample(p, (int)i), 0);
        float node_part = 1, rank_part = 1;
        if (p->counting == RY_DISTINCT) {
            float copies = 1, node_pairs = 0, rank_pairs = 0;
            for (size_t e = 0; e < E; e++)
                copies += counts[(size_t)layer * E + e];
            for (size_t m = 0; m < N; m++)
                node_pairs += (float)w->nodes[(i * (size_t)w->layers + (size_t)layer) * N + m];
            for (size_t r = 0; r < R; r++)
                rank_pairs += (float)w->ranks[(i * (size_t)w->layers + (size_t)layer) * R + r];
            node_part = node_pairs / copies;
            rank_part = rank_pairs / copies;
        }
        ry_predictor_next(predictor, layer, counts, w->next);
        for (size_t e = 0; e < E; e++) {
            if (w->next[e] <= 0)
                continue;
            w->want_nodes[i * N + (size_t)w->cluster->node[rank[e]]] += node_part * w->next[e];
            w->want_ranks[i * R + (size_t)rank[e]] += rank_part * w->next[e];
        }
    }
}

void ry_netmoe_layer(struct ry_netmoe *w, const struct ry_netmoe_options *o, int layer, const int *from, int *to)
{
    const struct ry_problem *p = w->problem;
    int N = w->cluster->nnodes, R = w->cluster->nranks;
    memset(w->want_nodes, 0, (size_t)p->nsamples * (size_t)N * sizeof *w->want_nodes);
    memset(w->want_ranks, 0, (size_t)p->nsamples * (size_t)R * sizeof *w->want_ranks);
    add_known(w, w->nodes, N, layer, w->want_nodes);
    add_known(w, w->ranks, R, layer, w->want_ranks);
    if (layer + 1 < w->layers && o->scatter == RY_SCATTER_GIVEN) {
        add_known(w, w->nodes, N, layer + 1, w->want_nodes);
        add_known(w, w->ranks, R, layer + 1, w->want_ranks);
    } else if (layer + 1 < w->layers && o->scatter == RY_SCATTER_PREDICTED) {
        add_predicted(w, o->predictor, layer);
    }
    struct ry_homes_options homes = o->homes;
    homes.seed += (uint64_t)layer << 32;
    ry_homes_solve(w->homes, &homes, p->nsamples, p->capacity, w->want_nodes, w->want_ranks, from, to);
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
