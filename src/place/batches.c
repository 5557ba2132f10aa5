/* batches.c: see batches.h. */
#include "place/batches.h"

#include <stdlib.h>

#include "place/assign.h"

int ry_batches_make(struct ry_batches *b, const struct ry_routing *r, const int *which, int n, const int *expert_node,
                    const int *share, int nodes, enum ry_counting counting, struct ry_err *err)
{
    *b = (struct ry_batches){.samples = n, .nodes = nodes, .share = share};
    for (int m = 0; m < nodes; m++)
        b->batch += share[m];
    size_t places = (size_t)nodes;
    uint32_t *layers = malloc((size_t)r->layers * places * sizeof *layers);
    b->affinity = calloc((size_t)n * places, sizeof *b->affinity);
    b->rows = calloc((size_t)n, sizeof *b->rows);
    if (!layers || !b->affinity || !b->rows) {
        free(layers);
        ry_batches_free(b);
        return ry_fail(err, "out of memory for the affinities of %d samples", n);
    }
    for (int i = 0; i < n; i++) {
        ry_affinity_by(r, which[i], expert_node, nodes, counting, layers);
        for (size_t j = 0; j < (size_t)r->layers * places; j++) {
            b->affinity[(size_t)i * places + j % places] += (int32_t)layers[j];
            b->rows[i] += layers[j];
        }
    }
    free(layers);
    return 0;
}

void ry_batches_free(struct ry_batches *b)
{
    free(b->affinity);
    free(b->rows);
    b->affinity = NULL;
    b->rows = NULL;
}

int ry_batches_cross(const struct ry_batches *b, const int32_t *guess, double *crossing, struct ry_err *err)
{
    int batches = b->samples / b->batch;
    size_t places = (size_t)b->nodes, size = (size_t)b->batch;
    struct ry_assign *ws = ry_assign_new(b->batch, b->nodes, 0, err);
    int32_t *cost = calloc(size * places, sizeof *cost);
    int *home = malloc(size * sizeof *home);
    if (!ws || !cost || !home) {
        ry_assign_free(ws);
        free(cost);
        free(home);
        return ry_fail(err, "out of memory for batches of %d samples", b->batch);
    }
    for (int i = 0; i < batches; i++) {
        size_t first = (size_t)i * size;
        for (size_t j = 0; guess && j < size * places; j++)
            cost[j] = -guess[first * places + j];
        struct ry_assign_problem p = {.nsamples = b->batch, .nplaces = b->nodes, .cost = cost, .capacity = b->share};
        ry_assign(ws, guess ? RY_SOLVE_EXACT : RY_SOLVE_NONE, &p, home);
        for (size_t s = 0; s < size; s++)
            crossing[first + s] =
                2.0 * (double)(b->rows[first + s] - b->affinity[(first + s) * places + (size_t)home[s]]);
    }
    ry_assign_free(ws);
    free(cost);
    free(home);
    return batches * b->batch;
}
