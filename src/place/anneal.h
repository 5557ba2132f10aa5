/*
 * anneal.h: the search behind co-placement: experts of each layer to nodes, by annealed swaps.
 *
 * Owns: the state of the search (which node an expert is on, what each sample finds on each node, what each node's
 * experts receive), the gain of a swap, the schedule. Not: what is searched over and what becomes of it (coplace.h).
 *
 * Samples' homes are not part of the state. Each node has a price, and a sample lives where affinity less price is
 * highest; prices are set so that every node gets its number of samples (the dual of the transportation problem of
 * homes). A swap is thus judged with all homes already reconsidered, at O(samples), which is what alternating between
 * experts and homes cannot do, and the value is never above what the best homes let cross.
 *
 * Threads: no state outside the arguments.
 */
#ifndef RY_PLACE_ANNEAL_H
#define RY_PLACE_ANNEAL_H

#include <stdint.h>

#include "place/routing.h"

/* The expert sets that tokens were sent to, equal ones of one sample and layer merged: for counting distinct pairs. */
struct ry_token_sets {
    int count, topk;
    const uint16_t *experts; /* [count][topk], ascending */
    const int *sample;       /* [count] */
    const int *layer;        /* [count] */
    const int *weight;       /* [count]: tokens */
    void *owned;
};

/** The sets of samples which[0 … n): set.sample is the index into `which`. -1 out of memory. */
int ry_token_sets_make(struct ry_token_sets *sets, const struct ry_routing *routing, const int *which, int n);
void ry_token_sets_free(struct ry_token_sets *sets);

struct ry_anneal {
    int samples, layers, experts, nodes;
    const uint16_t *counts;           /* [layer][expert][sample]: tokens */
    const int *homes;                 /* [nodes]: samples that live on each, together all of them */
    const int64_t *bound;             /* [layer][node]: copies that a node may get; NULL: as many as come */
    const struct ry_token_sets *sets; /* count distinct (token, node) pairs; NULL: copies */
};

/**
 * Improve `map` ([layer][expert] → node) by `moves` random swaps within layers while cooling, then by all pairs until
 * no swap helps; the number of experts that each node holds in each layer stays what it is. Bounds may be broken on the
 * way and are held at the end wherever swaps can hold them, which is the caller's to see. Returns what crosses nodes
 * (copies or distinct pairs, one direction), homes being where prices put them; -1 out of memory.
 */
double ry_anneal_run(const struct ry_anneal *a, int *map, long moves, uint64_t seed);

/** What crosses under `map`: a lower bound over homes, exact up to ties between them. -1 out of memory. */
double ry_anneal_value(const struct ry_anneal *a, const int *map);

#endif
