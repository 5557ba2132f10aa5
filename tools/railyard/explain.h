/* explain.h: the picture of `railyard explain`. Owns nothing; see cmd_explain.c (words) and explain_svg.c (picture). */
#ifndef RY_TOOLS_EXPLAIN_H
#define RY_TOOLS_EXPLAIN_H

#include <stdio.h>

#include "plan/plan.h"

/** Who sends what in each group: one panel for every group of every set of plans, sets[k][rank]. -1 without memory. */
int explain_svg(const struct ry_cluster *cluster, struct ry_plan *const *const *sets, int nsets, FILE *f);

#endif
