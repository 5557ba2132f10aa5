/*
 * verify.h: proves a whole exchange's plans right, without running them.
 *
 * Owns: the symbolic execution of the plans of all ranks together: which bytes of which send segment lie where after
 * each step. Finds: a byte of a receive buffer not written, written twice, or from the wrong source; reading what was
 * never written; overruns of segments and staging; sends and receives of a pair of ranks that differ in number, order
 * or size (NCCL matches them in order within each pair); two steps of one group that touch the same memory; waits in a
 * circle; a transfer between nodes in a group that is said to stay inside them; and, where a plan has a second part
 * that may overlap the first, anything of this in whatever order the two meet.
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

/*
 * Which rows are equal, for plans that pack: rows are numbered through what a rank sends to a node, segment by segment
 * in ascending rank, from 0; first[] gives for each row the lowest row equal to it (itself where there is none before).
 * A byte is then as good as the byte at the same place of an equal row, and no other. What is proved: every byte of
 * every receive segment comes from the right row or an equal one, given that the scan (run/rows.h) finds just these
 * equal.
 */
struct ry_row_map {
    struct ry_repeats repeats; /* as the plans were built with: distinct = the rows with first[i] == i */
    const uint32_t *first;     /* [rows]; NULL where row_bytes is 0 */
};
/** maps[from * nnodes + node]. All segments lie apart. Work and memory grow with the number of rows. */
int ry_plan_verify_rows(const struct ry_cluster *cluster, const uint64_t *matrix, const struct ry_row_map *maps,
                        struct ry_plan *const *plans, struct ry_err *err);
/** The same for plans that were built with addresses, as ry_plan_verify_at(). `maps` may be NULL. */
int ry_plan_verify_rows_at(const struct ry_cluster *cluster, const uint64_t *matrix, const struct ry_row_map *maps,
                           struct ry_plan *const *plans, const uintptr_t *const *send_at,
                           const uintptr_t *const *recv_at, struct ry_err *err);

/*
 * Plans by `sum`, of an exchange that returns what an earlier one brought: `matrix` is that of the return, `maps` are
 * those of the rows that went ([from * nnodes + node], by the earlier exchange's sender), as are the repeats that plans
 * were built with. What is proved: where rows went packed from rank s to node n, the first of equal rows gets, in s's
 * receive segments from n's ranks, the sum of what all of n's ranks send back for those rows, each once, and the others
 * zeros; all else comes as it is. `maps` may be NULL: nobody looked; and so may addresses: segments lie apart.
 */
int ry_plan_verify_sum(const struct ry_cluster *cluster, const uint64_t *matrix, const struct ry_row_map *maps,
                       struct ry_plan *const *plans, const uintptr_t *const *send_at, const uintptr_t *const *recv_at,
                       struct ry_err *err);

/*
 * Plans by `replica`, of so many twin communicators: cluster, matrix and ranks are those of all together, as plan.h numbers
 * them. A byte is then as good as the byte at the same place of what the twins of its rank send to the twins of its
 * target. Proved besides: the matrix is that of twins; what leaves a node stays on a twin's own communicator, and what a group
 * passes on inside a node goes between ranks that sit at one position. Either of the addresses may be NULL.
 */
int ry_plan_verify_replicas(const struct ry_cluster *cluster, const uint64_t *matrix, int replicas,
                            struct ry_plan *const *plans, const uintptr_t *const *send_at,
                            const uintptr_t *const *recv_at, struct ry_err *err);

#endif
