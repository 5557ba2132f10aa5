/*
 * capacity.h: how many tokens an expert must have room for: what theory says from gate weights and tokens, and what
 * routing really took.
 *
 * Owns: the lower bounds that LocMoE published, the check of what they assume against data, and the loads of experts in
 * recorded routing. Not: reading files (base/npy.h, routing.h), wording (tools/railyard/cmd_capacity.c).
 *
 * The bounds. n experts, hidden size d, cos(token, gate) the affinity of a token for an expert, delta the largest
 * affinity of all tokens and experts. If gate weights are orthogonal to each other and tokens lie evenly on the sphere,
 * a token is within angle arccos(delta) of a given gate (either way) with probability P = 1 - I_{delta^2}(1/2,
 * (d-1)/2), I being the regularized incomplete beta function, and an expert's share of a batch's tokens has to be at
 * least
 *
 *     sphere   1 / (n P)                                       LocMoE (arXiv 2401.13920), its theorem on the expert
 * capacity erfc     1 / (n erfc(sqrt(delta^2 d / (2 - delta^2))))    the same theorem, for large d exp      exp(d
 * delta^2 / (2 - delta^2)) / n               LocMoE+ (arXiv 2406.00023), Remark 7
 *
 * exp is below erfc always, since erfc(x) <= exp(-x^2). erfc is near sphere for large d, but can lie above it for small
 * ones. Here they are given as capacity factors: n times that, 1 being an even share. They grow without limit in delta:
 * at n and above (an expert with room for every token) they say nothing. So they are kept as logarithms.
 */
#ifndef RY_PLACE_CAPACITY_H
#define RY_PLACE_CAPACITY_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "place/routing.h"

/** Logarithm of P above; 0 <= delta <= 1, d >= 2. -INFINITY for delta = 1. */
double ry_capacity_log_beyond(double delta, double d);

struct ry_capacity_bounds {
    double sphere, erfc, exp; /* natural logarithms of the capacity factors */
};
struct ry_capacity_bounds ry_capacity_bounds(double delta, double d);

/* What gates and tokens are like. Measured values have beside them what the bounds assume. */
struct ry_affinity {
    int experts, hidden;
    size_t tokens, zero_tokens; /* those without direction are left out */
    double delta;               /* largest cos(token, gate) */
    double best[3];             /* of each token's largest: median, 90 %, 99 % */
    double negative;            /* share of tokens whose largest is below 0 */
    /* gate weights */
    double gate_cos_max, gate_cos_mean;  /* |cos| between two; assumed 0 */
    double gate_norm_min, gate_norm_max; /* a larger one wins tokens by its length; assumed equal */
    /* tokens */
    double norm_spread; /* standard deviation of their lengths over the mean; says nothing of angles */
    double drift;       /* length of the mean of all directions; 1 / sqrt(tokens) for an even sphere */
    double dimensions;  /* 1 / mean cos^2 of two tokens; the hidden size for an even sphere */
    /* cos(token, gate) over all pairs, in units of 1 / sqrt(d) */
    double cos_mean, cos_sd; /* assumed 0 and 1 */
    double ks;               /* greatest distance of its distribution from the sphere's */
};

/**
 * gates[experts][hidden], tokens[tokens][hidden], of type float (bytes 4) or double (8). -1 with `err` for numbers that
 * are not finite (naming the row) or gates without length. Pairs of tokens are drawn from a fixed seed.
 */
int ry_affinity_measure(struct ry_affinity *out, const void *gates, size_t gate_bytes, int experts, const void *tokens,
                        size_t token_bytes, size_t ntokens, int hidden, struct ry_err *err);

/** LocMoE's grouped average pooling as gate weights, out[experts][hidden]: experts / hidden for the expert's own part.
 */
void ry_capacity_grap(float *out, int experts, int hidden);

/* What one layer of recorded routing took, batch by batch. Loads are copies per expert over the mean of experts in that
 * batch, had nothing been dropped: capacity factors. */
struct ry_capacity_used {
    int batches;
    double mean_tokens;  /* copies per expert and batch, the mean that factors refer to */
    double busiest_mean; /* the busiest expert's, mean over batches */
    double busiest[3];   /* median, 95 %, 99 % over batches */
    double most;         /* the greatest of all: the factor with which nothing would have been dropped */
    double load[5];      /* over all experts and batches: 5 %, 25 %, 50 %, 75 %, 95 % */
    double missing;      /* share of tokens x topk that is not there: dropped when it was recorded */
};

/** Batches of `batch` consecutive samples from the first on; what does not fill one is left out. */
int ry_capacity_used(struct ry_capacity_used *out, const struct ry_routing *routing, int layer, int batch,
                     struct ry_err *err);
/** Share of the copies that experts with room for `factor` times the even share would have dropped. */
double ry_capacity_dropped(const struct ry_routing *routing, int layer, int batch, double factor);

#endif
