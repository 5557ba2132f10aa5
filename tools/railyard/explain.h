/* explain.h: the picture of `railyard explain`. Owns nothing; see cmd_explain.c (words) and explain_svg.c (picture). */
#ifndef RY_TOOLS_EXPLAIN_H
#define RY_TOOLS_EXPLAIN_H

#include <stdio.h>

#include "plan/plan.h"

/** Who sends what in each group: one panel for every group of every set of plans, sets[k][rank]. -1 without memory. */
int explain_svg(const struct ry_cluster *cluster, struct ry_plan *const *const *sets, int nsets, FILE *f);

/** The same exchange done by so many communicators whose k-th ranks share a node and send the same: the plans by replica in words, of
 * rank `rank` of all twins together or of every rank, and what they change. */
int explain_twins(const struct ry_cluster *cluster, const uint64_t *matrix, int twins, int chunks, int rank, bool every,
                  struct ry_err *err);

#endif
