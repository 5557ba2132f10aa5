/*
 * home_model.h: which node a sample will want to live on, from its token ids alone, before any forward pass.
 *
 * Owns: the model, learning it online, how sure it is, and its file. Not: who gets which home (assign.h), what the
 * affinities are (problem.h), the next layer's routing from this layer's (predict.h).
 *
 * Tokens are hashed into buckets; a sample is the vector of the square roots of its buckets' shares (so of length 1),
 * and a constant. The model is linear: a ridge regression to the shares of the sample's traffic that go to each node,
 * less the even share. Learning keeps the last `window` samples and solves their regression by dual coordinate ascent:
 * each sample has a multiplier per node, a step makes one sample's multipliers right given all others. Every observed
 * sample takes a step and has some earlier ones take another, so the model is close to the regression at any time, and
 * ry_home_model_settle() carries it there. A sample that leaves the window leaves its part of the weights behind: from
 * then on the regression is one towards these weights rather than towards zero. (Taking its part out would be the
 * regression of the window alone, but between two samples all others would have to take over: the model is then always
 * behind.)
 *
 * Sureness comes from samples at the moment before they are learned from: the model has not seen them then.
 *
 * Weights take buckets · nodes · 4 bytes (128 KiB for 4096 and 8 nodes), which is what is saved; the window about 2 KiB
 * per sample while learning. Predicting 512 tokens takes microseconds.
 *
 * Threads: observing and settling change the model; predicting does not.
 */
#ifndef RY_PLACE_HOME_MODEL_H
#define RY_PLACE_HOME_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

#define RY_HOME_NODES 256 /* at most */

struct ry_home_options {
    int buckets;   /* a power of two, 64 to 16384; 0: 4096 */
    int window;    /* samples kept to learn from; 0: 1024 */
    int replay;    /* earlier samples that take a step per sample observed; 0: 16 */
    double ridge;  /* > 0; 0: 0.1 */
    uint64_t seed; /* of the hash and of the replay */
    uint64_t map;  /* the expert map that the affinities are of (ry_home_map_id()); a file for another one is refused */
};

struct ry_home_model;

struct ry_home_model *ry_home_model_new(int nodes, const struct ry_home_options *options, struct ry_err *err);
void ry_home_model_free(struct ry_home_model *model);

/** A number that names an expert map [layers][experts] → node. */
uint64_t ry_home_map_id(const int *expert_node, int layers, int experts);

/** Learn from one sample: rows that it exchanged with each node, in any unit. -1 with `err` where one is negative, no
 * number, or all are 0; the model is then as it was. */
int ry_home_model_observe(struct ry_home_model *model, const uint32_t *tokens, int n, const double *rows,
                          struct ry_err *err);

/** Solve the window's regression: conjugate gradients until no multiplier is off by more than `tolerance` (shares; 1e-6
 * is exact for practice) or `rounds` are over. Returns what the worst is still off by; infinity when out of memory. */
double ry_home_model_settle(struct ry_home_model *model, int rounds, double tolerance);

/** Expected shares[nodes] of the sample's traffic; they sum to 1 or nearly so. Even shares before anything is learned.
 */
void ry_home_model_predict(const struct ry_home_model *model, const uint32_t *tokens, int n, float *shares);

/** How sure it is, from the last thousand samples or so, each predicted before it was learned from. */
struct ry_home_trust {
    uint64_t samples; /* observed */
    double error;     /* root mean square of share predicted − share seen */
    double explained; /* part of the shares' variance that predictions explain: 1 all, 0 or less none */
    double captured;  /* of what the best node of each sample keeps beyond an even share, what the predicted one does */
    double gain;      /* the same in shares of all traffic */
    bool sure;        /* enough samples, and both `captured` and `gain` worth while */
    char why[160];    /* in words */
};
void ry_home_model_trust(const struct ry_home_model *model, struct ry_home_trust *trust);

/** Save the weights and what is known of their sureness; the window is left out. */
int ry_home_model_save(const struct ry_home_model *model, const char *path, struct ry_err *err);
/** Load; learning goes on from there with an empty window. `map` is what the caller's experts are placed by, `nodes`
 * their number; NULL with `err` naming the file and what is wrong with it. */
struct ry_home_model *ry_home_model_load(const char *path, int nodes, uint64_t map, struct ry_err *err);

#endif
