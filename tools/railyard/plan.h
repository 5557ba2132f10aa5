/* plan.h: what the files of `railyard plan` share. */
#ifndef RY_TOOLS_PLAN_H
#define RY_TOOLS_PLAN_H

#include <jansson.h>

#include "place/study.h"

/** Time the exact solver beside Kuhn–Munkres, and alone as the problem grows: a table on stdout unless `quiet`, and as
 * JSON. On routing recorded (NULL: none) and made up. NULL with `err` when out of memory. */
json_t *plan_speed(const struct ry_routing *routing, uint64_t seed, bool quiet, struct ry_err *err);

#define PLAN_SIZES 16 /* at most, of clusters */

/* What a comparison writes for jobs; NULL: not that. */
struct plan_files {
    const char *map;     /* the bounded expert map */
    const char *homes;   /* the home model under that map, learned from all samples recorded */
    const char *unmoved; /* the one for experts in contiguous blocks */
};

/**
 * Compare NetMoE, co-placed experts with and without the bound on loads, and de-duplicated exchanges, on clusters of
 * nodes[nsizes] with `ranks` GPUs each; study->cluster and ->expert_rank are not looked at. A table on stdout unless
 * `quiet`, and as JSON. NULL with `err`.
 */
json_t *plan_compare(const struct ry_study *study, const int *nodes, int nsizes, int ranks,
                     const struct plan_files *files, bool quiet, struct ry_err *err);

/** What stays on its rank and node, layer by layer and over the recording, on the same clusters: a table on stdout unless
 *  `quiet`, and as JSON. NULL with `err`. */
json_t *plan_local(const struct ry_study *study, const int *nodes, int nsizes, int ranks, bool quiet, struct ry_err *err);

#endif
