/*
 * batches.h: what crosses nodes when samples come in batches, each with its own homes under capacities.
 *
 * Owns: the node affinities of many samples under an expert map, and the crossing of each batch with homes in order or
 * chosen exactly. Not: the times of exchanges (traffic.h).
 */
#ifndef RY_PLACE_BATCHES_H
#define RY_PLACE_BATCHES_H

#include "place/problem.h"

struct ry_batches {
    int samples, nodes, batch;
    const int *share;  /* [nodes]: batch's samples for each node, Σ = batch */
    int32_t *affinity; /* [sample][node], all layers together */
    int64_t *rows;     /* [sample]: their sum */
};

/** The affinities of which[0 … n) under expert_node [layers][experts]. -1 with `err`. */
int ry_batches_make(struct ry_batches *b, const struct ry_routing *routing, const int *which, int n,
                    const int *expert_node, const int *share, int nodes, enum ry_counting counting, struct ry_err *err);
void ry_batches_free(struct ry_batches *b);

/**
 * What crosses of each sample, both directions, in batches of consecutive samples; a last part of a batch is left out.
 * Homes maximize `guess` [sample][node] (b->affinity: what is known afterwards); NULL: in order. Returns the number of
 * samples that crossing[samples] was filled for, -1 with `err`.
 */
int ry_batches_cross(const struct ry_batches *b, const int32_t *guess, double *crossing, struct ry_err *err);

#endif
