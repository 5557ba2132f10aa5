/*
 * node_comm.h: a communicator of the ranks of one node, which Railyard makes itself from the job's.
 *
 * Owns: making it, by ncclCommSplit on all ranks of the job's communicator at once, or, for twins, by an id; how far that came; ending and aborting it. Not:
 * when it is made and used (the yardmaster: policy.h), what goes over it (run/run.h).
 *
 * Thread-safety: all by one thread at a time, but ry_node_comm_abort(): by any, at any time before ry_node_comm_end().
 */
#ifndef RY_ENGINE_NODE_COMM_H
#define RY_ENGINE_NODE_COMM_H

#include <stdatomic.h>
#include <stdbool.h>

#include "cluster.h"
#include "policy.h"
#include "run/run.h"

struct ry_node_comm;

/** For rank `rank` of the job's communicator `comm`, named `name` in what is said; nothing is made yet. NULL where none is of any use,
 *  the job's NCCL cannot, or out of memory: RY_NODE_CANNOT then. `nccl`, `device` and `map` must live as long. */
struct ry_node_comm *ry_node_comm_new(const struct ry_nccl *nccl, const struct ry_device *device, const struct ry_cluster *map,
                                      int rank, void *comm, const char *name);
enum ry_node_state ry_node_comm_state(const struct ry_node_comm *node);
/**
 * All ranks of the job's communicator do this, none before it has issued what the others have. Waits for what was enqueued on
 * `stream`, `patience` seconds at most: a rank that does not get there gives up, but lets the others split. Then for the other ranks, as
 * any ncclCommSplit does. *aborted, set before ry_node_comm_abort(), ends the first wait; the abort of `comm` itself the second.
 */
void ry_node_comm_make(struct ry_node_comm *node, void *stream, double patience, const _Atomic bool *aborted);
/**
 * The same kind of thing for twin communicators (twins.h): of the ranks that sit at one position of `twins` of them, on one node, this one
 * being number `twin`. NULL: RY_NODE_CANNOT. `nccl` and `device` must live as long.
 */
struct ry_node_comm *ry_node_comm_of_twins(const struct ry_nccl *nccl, const struct ry_device *device, int ordinal, int twins,
                                           int twin, const char *name);
/**
 * All its ranks do this at some time, with the id that one of them made. A thread of its own makes it while the job goes on:
 * RY_NODE_MAKING, then RY_NODE_HAS or RY_NODE_CANNOT. As NCCL does it for non-blocking communicators: nobody waits, so nothing can
 * be waited for in a circle; if a rank never comes, that thread is all that waits for it.
 */
void ry_node_comm_start(struct ry_node_comm *node, const struct ry_nccl_id *id);
/** For ry_run(). Only if RY_NODE_HAS was said. */
struct ry_run_node *ry_node_comm_face(struct ry_node_comm *node);
/** The job aborts its communicator: kernels on this one may wait for ever for a rank that is gone. Does not wait. */
void ry_node_comm_abort(struct ry_node_comm *node);
/** The job's communicator ends; `leak`: nothing may be asked of NCCL any more. */
void ry_node_comm_end(struct ry_node_comm *node, bool leak);
/** The process exits: give aborts that are under way a moment. */
void ry_node_comm_settle(void);

#endif
