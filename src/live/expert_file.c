/*
 * expert_file.c: an expert map as the framework adapter asks for it (live.h).
 *
 * Owns: railyard_live_expert_map(). Not: the file format (place/expert_map.h), moving experts (plugin/python/railyard/experts.py).
 */
#include <stdio.h>

#include "live/live.h"
#include "place/expert_map.h"

int railyard_live_expert_map(const char *path, int32_t layers, int32_t experts, int32_t ranks, int32_t *permutation,
                             char *why, size_t size)
{
    struct ry_err err;
    if (!ry_expert_map_slots(path, permutation, layers, experts, ranks, &err))
        return 0;
    snprintf(why, size, "%s", err.msg);
    return -1;
}
