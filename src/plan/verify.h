/*
 * verify.h: proves a whole exchange's plans right, without running them.
 *
 * Owns: the symbolic execution of the plans of all ranks together: which bytes of which send segment lie where after each
 * step. Finds: a byte of a receive buffer not written, written twice, or from the wrong source; reading what was never
 * written; overruns of segments and staging; sends and receives of a pair of ranks that differ in number, order or size
 * (NCCL matches them in order within each pair); two steps of one group that touch the same memory; waits in a circle.
 */
#ifndef RY_PLAN_VERIFY_H
#define RY_PLAN_VERIFY_H

#include "plan.h"

/**
 * plans[r] is rank r's; matrix[from * nranks + to] in bytes. 0, or -1 with `err` naming the first thing wrong: rank, step,
 * peer and offset.
 */
int ry_plan_verify(const struct ry_cluster *cluster, const uint64_t *matrix, struct ry_plan *const *plans,
                   struct ry_err *err);

#endif
