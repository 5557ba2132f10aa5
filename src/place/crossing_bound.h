/*
 * crossing_bound.h: how little can cross nodes, whatever the map of experts and the homes of samples.
 *
 * Owns: a lower bound by a spectral relaxation, for copies. Not: maps (coplace.h).
 *
 * With X [sample][node] and Y [layer, expert][node] saying who is where, what stays on its node is tr(XᵀAY). Let p and
 * q be the shares of samples and experts that nodes hold; less these, X' = X − 1pᵀ and Y' = Y − 1qᵀ have columns that
 * sum to 0 (Y' in every layer), so that A may be centred by sample and by layer, and X'ᵀX' ≤ max homes, Y'ᵀY' ≤ layers
 * · max slots as matrices, both of rank nodes − 1. Hence (von Neumann)
 *
 *     tr(XᵀAY) ≤ copies · Σ_n p_n q_n + √(max homes · layers · max slots) · Σ_{i < nodes} σ_i(A centred),
 *
 * plus the spread of p and of q times the copies where they are not even. It does not use that X and Y are 0 or 1, and
 * so is below what can be reached: the gap to a map found is at most the distance to the best one, not an estimate of
 * it.
 */
#ifndef RY_PLACE_CROSSING_BOUND_H
#define RY_PLACE_CROSSING_BOUND_H

#include "place/anneal.h"

/** Copies (one direction) that cross at least; slots[nodes]: experts of a layer that nodes hold. -1 out of memory. */
double ry_crossing_bound(const struct ry_anneal *a, const int *slots);

#endif
