/* plan.h: what the files of `railyard plan` share. */
#ifndef RY_TOOLS_PLAN_H
#define RY_TOOLS_PLAN_H

#include <jansson.h>

#include "place/study.h"

/** Time the exact solver beside Kuhn–Munkres, and alone as the problem grows: a table on stdout unless `quiet`, and as
 * JSON. On routing recorded (NULL: none) and made up. NULL with `err` when out of memory. */
json_t *plan_speed(const struct ry_routing *routing, uint64_t seed, bool quiet, struct ry_err *err);

#endif
