/*
 * verify.h: proves a whole exchange's plans right, without running them.
 *
 * Owns: the symbolic execution of the plans of all ranks together: which bytes of which send segment lie where after
 * each step. Finds: a byte of a receive buffer not written, written twice, or from the wrong source; reading what was
 * never written; overruns of segments and staging; sends and receives of a pair of ranks that differ in number, order
 * or size (NCCL matches them in order within each pair); two steps of one group that touch the same memory; waits in a
 * circle.
 */
#ifndef RY_PLAN_VERIFY_H
#define RY_PLAN_VERIFY_H

#include "plan.h"

/**
 * plans[r] is rank r's; matrix[from * nranks + to] in bytes. 0, or -1 with `err` naming the first thing wrong: rank,
 * step, peer and offset. All segments are taken to lie apart: a step that runs on from one into the next is an overrun.
 */
int ry_plan_verify(const struct ry_cluster *cluster, const uint64_t *matrix, struct ry_plan *const *plans,
                   struct ry_err *err);

/** The same for plans that were built with addresses: send_at[r][p], recv_at[r][p] as in rank r's ry_plan_input; either
 * may be NULL, and so may any rank's. Buffers that overlap (but for send segments among themselves) are refused. */
int ry_plan_verify_at(const struct ry_cluster *cluster, const uint64_t *matrix, struct ry_plan *const *plans,
                      const uintptr_t *const *send_at, const uintptr_t *const *recv_at, struct ry_err *err);

#endif
