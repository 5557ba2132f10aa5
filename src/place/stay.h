/*
 * stay.h: how much of recorded routing stays where it is, layer by layer and over time.
 *
 * Owns: the count. Not: the distance (base/kl.h), placements (study.h), wording (tools/railyard/plan_local.c).
 *
 * Samples are taken in the order in which they were recorded, `batch` at a time, each batch dealt out in order to the
 * ranks: as a job without placement does. Dispatch only: combine takes the same ways back.
 */
#ifndef RY_PLACE_STAY_H
#define RY_PLACE_STAY_H

#include "place/problem.h"

struct ry_stay {
    uint64_t copies, on_rank, on_node;       /* (token, expert) */
    uint64_t pairs, pairs_on_node;           /* different (token, node): what crosses if equal rows cross once */
    uint64_t rank_pairs, rank_pairs_on_rank; /* different (token, rank); all of these 0 without choices */
    uint64_t *nodes;                         /* [nnodes * nnodes] copies, from x to; the caller's, zeroed, or NULL */
};

/**
 * Add the batches [first, last) of one layer to `sum`. expert_rank[layers][experts]. -1 with `err` out of memory, or if
 * there are fewer samples.
 */
int ry_stay_add(struct ry_stay *sum, const struct ry_routing *routing, const struct ry_cluster *cluster,
                const int *expert_rank, int layer, int batch, int first, int last, struct ry_err *err);

#endif
