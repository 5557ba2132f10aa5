/*
 * expert_map.h: files that say which rank holds which expert.
 *
 * Owns: writing and reading them. Not: choosing maps (coplace.h).
 *
 * What is stored is a permutation per layer: permutation[l][slot] is the expert that sits in the slot, slots being
 * numbered rank by rank, experts / ranks of each. Within a rank experts ascend. Contiguous blocks are the identity.
 *   NAME.npy    int32 [layer][slot] (int64 is read, too)
 *   NAME.json   {"version": 1, "layers": L, "experts": E, "ranks": R, "permutation": [[…], …]}; whoever writes it may
 *               add keys, which readers pass over
 */
#ifndef RY_PLACE_EXPERT_MAP_H
#define RY_PLACE_EXPERT_MAP_H

#include <jansson.h>

#include "base/error.h"

/** expert_rank[layers][experts] → permutation[layers][experts]. Every rank must hold experts / ranks of each layer. */
void ry_expert_permutation(int *permutation, const int *expert_rank, int layers, int experts, int ranks);

/** A new JSON object as above; the caller may add to it and owns it. NULL out of memory. */
json_t *ry_expert_map_json(const int *expert_rank, int layers, int experts, int ranks);

/** Write `path`: .json or .npy, by how the name ends. -1 with `err`. */
int ry_expert_map_save(const char *path, const int *expert_rank, int layers, int experts, int ranks,
                       struct ry_err *err);

/** Read either, checking that it is for this many layers, experts and ranks, and a permutation: expert_rank[layers]
 * [experts], untouched on failure. -1 with `err`. */
int ry_expert_map_open(const char *path, int *expert_rank, int layers, int experts, int ranks, struct ry_err *err);

/** The same, slots in the order in which the file has them: permutation[layers][experts]. */
int ry_expert_map_slots(const char *path, int *permutation, int layers, int experts, int ranks, struct ry_err *err);

#endif
