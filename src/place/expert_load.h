/*
 * expert_load.h: what experts receive, summed by the nodes or ranks that hold them, and a node's experts dealt out to
 * its ranks.
 *
 * Owns: that and nothing else. weight[layers][experts] is in copies, here and below. Threads: no state.
 */
#ifndef RY_PLACE_EXPERT_LOAD_H
#define RY_PLACE_EXPERT_LOAD_H

#include <stdint.h>

#include "cluster.h"

/** load[place] of one layer: weight[experts], expert_place[experts]. Returns their sum. */
int64_t ry_expert_load(const int64_t *weight, const int *expert_place, int experts, int places, int64_t *load);

/**
 * The busiest place per rank it consists of: size[places], NULL: 1 each. busiest[layers] in copies; returns the
 * greatest over all layers, relative to the layer's mean per rank. room[places].
 */
double ry_expert_busiest(const int64_t *weight, const int *expert_place, int layers, int experts, int places,
                         const int *size, double *busiest, int64_t *room);

/**
 * weight[n] → rank[n], 0 … ranks − 1, n / ranks of each (ranks must divide n), the busiest as little busy as can be.
 * The problem is NP-hard (it partitions numbers): greedy, then swaps with the busiest rank until none helps. Returns
 * the busiest rank's weight, -1 out of memory.
 */
int64_t ry_rank_balance(const int64_t *weight, int n, int ranks, int *rank);

/** expert_node[layers][experts] → expert_rank: each node's experts to its ranks, layer by layer, as above; nodes must
 * hold experts in proportion to their ranks. -1 out of memory. */
int ry_experts_to_ranks(const struct ry_cluster *cluster, int layers, int experts, const int64_t *weight,
                        const int *expert_node, int *expert_rank);

#endif
