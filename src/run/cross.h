/*
 * cross.h: what carries a plan's transfers between nodes, where that is not NCCL.
 *
 * Owns: the seam between a plan's steps (run.c) and such a carrier (ucx/carrier.h). Not: who decides that it is used,
 * the same on all ranks (engine/policy.h).
 *
 * Of a group of transfers, those with ranks that are `with` go this way, the rest over NCCL as ever; both are under way
 * at once. What holds for NCCL's holds for these: between two ranks they match in the order in which they are given,
 * what the stream did before is sent, and what it does after the group finds the bytes received, and may write what was
 * sent.
 */
#ifndef RY_RUN_CROSS_H
#define RY_RUN_CROSS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct ry_cross_transfer {
    bool send;
    int peer;
    void *at; /* device memory */
    uint64_t bytes;
};

struct ry_cross {
    const bool *with; /* [nranks] */
    uint64_t number;  /* of the exchange, for what is said; set by whoever hands it to the runner */
    /** The transfers of one group begin when `stream` gets there. -1 with `err`: the call of the job's must fail. */
    int (*begin)(struct ry_cross *cross, const struct ry_cross_transfer *list, int n, void *stream, struct ry_err *err);
    /** What `stream` does next waits for those of the last begin(). The same. */
    int (*end)(struct ry_cross *cross, void *stream, struct ry_err *err);
};

#endif
