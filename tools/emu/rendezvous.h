/*
 * rendezvous.h: rank 0's bytes to all ranks, over TCP at MASTER_ADDR:MASTER_PORT, as torchrun's environment has them.
 *
 * Owns: what a C program needs to pass an ncclUniqueId around without MPI. Blocking, for one thread of each rank.
 */
#ifndef RY_EMU_RENDEZVOUS_H
#define RY_EMU_RENDEZVOUS_H

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"

/* From RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK. */
struct ry_ranks {
    int rank, world, local_rank, local_world, node;
};

/** -1 with `err` naming the variable that is missing or no number. */
int ry_ranks_from_env(struct ry_ranks *out, struct ry_err *err);

/**
 * Rank 0's `bytes` at `data` arrive at `data` of every rank. Every rank calls it equally often; the n-th calls meet.
 * Gives up after `timeout_s` seconds. Returns 0, or -1 with `err`.
 */
int ry_rendezvous(const struct ry_ranks *who, void *data, size_t bytes, double timeout_s, struct ry_err *err);

/**
 * Where torchrun itself listens on MASTER_PORT (its workers are meant to use its store), take the next port; all ranks alike,
 * before the first ry_rendezvous().
 */
void ry_rendezvous_beside_torchrun(void);

#endif
