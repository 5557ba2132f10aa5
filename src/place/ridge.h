/*
 * ridge.h: ridge regression from sums: B = (XᵀX + λ)⁻¹ XᵀY.
 *
 * Owns: solving. Not: what X and Y are, nor λ. Threads: no state; nothing is allocated.
 */
#ifndef RY_PLACE_RIDGE_H
#define RY_PLACE_RIDGE_H

#include <stddef.h>

/**
 * xx[features][features], of which the lower half is read; xy[features][outputs]; lambda > 0; b[features][outputs] is
 * overwritten. Scratch: factor[features²], solution[features · outputs]. O(features² · (features / 3 + outputs)).
 */
void ry_ridge(const double *xx, const double *xy, size_t features, size_t outputs, double lambda, double *factor,
              double *solution, float *b);

#endif
