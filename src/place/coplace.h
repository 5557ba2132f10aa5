/*
 * coplace.h: which experts of each layer share a node, and a GPU, learned from observed routing together with where
 * samples live.
 *
 * Owns: the whole of learning a map: the search (anneal.h) from several starts, the choice among them, the bound on
 * loads, experts to the ranks of a node, a lower bound on what any map could reach, and the decision whether moving
 * anything is worth while. Not: where a new sample lives (home_model.h says what it will need, assign.h decides), what
 * becomes of the map's files (expert_map.h).
 *
 * The aim is that what a sample's tokens need is on its node: over all layers, for samples as they are met, one home
 * each. Every rank gets the same number of experts of every layer. A node's load is the copies that its experts
 * receive; it is what a map that only looks at traffic drives up, so by default no node and no rank may, on the samples
 * learned from, get more in a layer than the busiest one gets under contiguous blocks.
 *
 * Deterministic for a seed, on any machine. Time grows with samples · nodes · moves · starts: seconds on one core for
 * 1024 samples, 8 layers, 64 experts and 8 nodes. Learn from some thousand samples, not from all that were ever seen.
 *
 * Threads: none of its own, no state outside the arguments.
 */
#ifndef RY_PLACE_COPLACE_H
#define RY_PLACE_COPLACE_H

#include <stdbool.h>

#include "place/problem.h"

enum ry_load_bound { RY_BOUND_CONTIGUOUS, RY_BOUND_MEAN, RY_BOUND_NONE };

struct ry_coplace_options {
    enum ry_counting counting;    /* RY_DISTINCT: learns from samples with token-level choices only */
    enum ry_load_bound load_from; /* what the bound is a multiple of: the contiguous map's busiest, or the mean */
    double load_times;            /* that many times; 0: 1 */
    double load_margin; /* part of a node's bound that is left free, as other samples differ from those learned
                           from (but at most half of what the bound is above the mean); 0: 0.03, < 0: none */
    double least_gain;  /* what held-out samples must save to move anything; 0: 0.02 of what crosses */
    int batch;          /* samples per iteration of the job, all ranks together; 0: 128 */
    int starts;         /* 0: 24 counting copies, 3 counting distinct pairs */
    long moves; /* of each start; 0: 600 for each expert of each layer, at most 150,000; distinct: 160 and 40,000 */
    uint64_t seed;
};

struct ry_coplace {
    int layers, experts, ranks;
    int *expert_rank;  /* [layers][experts]; contiguous blocks where experts had better stay */
    bool move_experts; /* the map differs from contiguous blocks, and pays */
    bool move_samples; /* choosing samples' homes pays, given the map */
    char why[320];     /* what was seen on held-out samples, and what follows */
    /* All as shares of what crosses nodes with contiguous blocks and samples dealt out in order (copies: always that
       many copies, whatever is counted). */
    double held_out;       /* batches of samples that a first map was not learned from, homes chosen knowing routing */
    double held_out_error; /* standard error of the mean over these batches */
    double fit;            /* on the samples learned from, homes balanced over all of them */
    double least;          /* no map and homes, balanced the same way, go below this there; 0 when counting distinct */
    /* The busiest node and rank of any layer, over the mean, on the samples learned from; `was`: contiguous blocks. */
    double node_load, node_load_was, rank_load, rank_load_was;
    bool bound_held;
};

/**
 * Learn from samples which[0 … n) of `routing` (NULL: the first n). `capacity` [nranks] gives the samples that ranks
 * take in proportion; NULL: equally many. NULL with `err` where the problem contradicts itself: experts that ranks do
 * not divide, too few samples, no choices to count distinct pairs from. Nothing worth moving is no error.
 */
struct ry_coplace *ry_coplace_learn(const struct ry_cluster *cluster, const struct ry_routing *routing,
                                    const int *which, int n, const int *capacity,
                                    const struct ry_coplace_options *options, struct ry_err *err);
void ry_coplace_free(struct ry_coplace *coplace);

/** `total` shared out in proportion to share[n] (equally if all are 0), whole numbers, exactly `total` together. */
void ry_share_out(int *out, const int *share, int n, int total);

#endif
