/*
 * predict.h: the next layer's routing of a sample, from its routing so far: affinity from layer to layer, learned
 * online.
 *
 * Owns: the model, a ridge regression from the counts of the last `history` layers to the counts of the next one, kept
 * as sums so that it can be brought up to date at any time. Experts, not nodes, are predicted: a prediction holds under
 * any expert map. Not: predicting from tokens before the forward pass.
 *
 * Memory: 8 bytes · layers · (history · experts + experts)² or so; `history` is cut so that history · experts <= 512.
 *
 * Threads: none of its own; observing and fitting change it, predicting does not.
 */
#ifndef RY_PLACE_PREDICT_H
#define RY_PLACE_PREDICT_H

#include <stdint.h>

#include "base/error.h"

struct ry_predictor;

/** history 1 is plain layer-to-layer affinity; 4 is a good choice. NULL with `err` when out of memory. */
struct ry_predictor *ry_predictor_new(int layers, int experts, int history, struct ry_err *err);
void ry_predictor_free(struct ry_predictor *predictor);

/** Learn from one sample: counts[layers][experts]. O(layers · (history · experts)²). */
void ry_predictor_observe(struct ry_predictor *predictor, const uint16_t *counts);

/** Bring the coefficients up to date with what was observed; predictions are of the state at the last call, 0 before
 * the first. */
void ry_predictor_fit(struct ry_predictor *predictor);

/** Expected counts of layer `layer` + 1, from counts[0 … layer][experts]; out[experts], negative where the model is
 * unsure of few. */
void ry_predictor_next(const struct ry_predictor *predictor, int layer, const uint16_t *counts, float *out);

#endif
