/*
 * routing.h: which experts the tokens of a rank are sent to.
 *
 * Owns: the three ways of routing (uniform, Zipf, recorded), as a pure function of (seed, iteration, layer, rank), so
 * that every rank knows every other's routing without being told. Not: rows, buffers, exchanges.
 *
 * Thread-safety: an opened routing is read-only.
 */
#ifndef RY_BENCH_ROUTING_H
#define RY_BENCH_ROUTING_H

#include <stdint.h>

#include "base/error.h"

struct ry_routing_config {
    const char *how; /* "uniform", "zipf:S" with S ≥ 0, or "trace:DIR" with a folder of recorded routing */
    int ranks;
    int experts; /* 0: what the trace says, else 4 per rank */
    int top_k;   /* 0: what the trace says, else 2 */
    int layers;  /* 0: what the trace says, else 2 */
    int tokens;  /* per rank and iteration */
    uint64_t seed;
};

struct ry_routing; /* opaque */

/**
 * Open a routing and fill the zeros of `config`. NULL with `err` naming the option at fault: an unknown `how`, numbers
 * that contradict the trace, experts that the ranks cannot share evenly, more experts per token than there are.
 */
struct ry_routing *ry_routing_open(struct ry_routing_config *config, struct ry_err *err);
void ry_routing_close(struct ry_routing *routing);

/**
 * choice[t * top_k + j]: the experts (all different) of token t of `rank`. Uniform and Zipf draw them one after the
 * other without putting back; with Zipf the order of popularity is a shuffle of its own for each layer. A trace is
 * dealt out in order: token t of rank r in iteration i is token (i * ranks + r) * tokens + t of the recorded samples,
 * from the start again at their end; samples with counts but no recorded choices are drawn with the counts as weights.
 */
void ry_routing_choose(const struct ry_routing *routing, uint64_t iteration, int layer, int rank, uint16_t *choice);

#endif
