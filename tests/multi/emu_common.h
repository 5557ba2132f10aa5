/*
 * emu_common.h: what the emulator's multi-rank tests share: a failing check ends the rank with a line that names it,
 * and so the whole run.
 */
#ifndef RY_TESTS_EMU_COMMON_H
#define RY_TESTS_EMU_COMMON_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nccl.h>

#include "base/clock.h"
#include "rendezvous.h"

static struct ry_ranks who;

#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            fprintf(stderr, "rank %d: %s:%d: %s:", who.rank, __FILE__, __LINE__, #cond);                               \
            fprintf(stderr, " " __VA_ARGS__);                                                                          \
            fputc('\n', stderr);                                                                                       \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

#define NCCL(call)                                                                                                     \
    do {                                                                                                               \
        ncclResult_t nccl_ = (call);                                                                                   \
        CHECK(nccl_ == ncclSuccess, "%s gave %d: %s", #call, (int)nccl_, ncclGetLastError(NULL));                      \
    } while (0)

#define EXPECT(want, call)                                                                                             \
    do {                                                                                                               \
        ncclResult_t nccl_ = (call);                                                                                   \
        CHECK(nccl_ == (want), "%s gave %d: %s", #call, (int)nccl_, ncclGetLastError(NULL));                           \
    } while (0)

static inline void start_rank(void)
{
    struct ry_err err;
    alarm(300); /* a hang is a failure with a name */
    CHECK(!ry_ranks_from_env(&who, &err), "%s", err.msg);
}

/* An id made by rank 0, the same for all. */
static inline ncclUniqueId shared_id(void)
{
    ncclUniqueId id;
    struct ry_err err;
    memset(&id, 0xa5, sizeof id); /* as on the stack of a program that does not clear it */
    if (who.rank == 0)
        NCCL(ncclGetUniqueId(&id));
    CHECK(!ry_rendezvous(&who, &id, sizeof id, 20, &err), "%s", err.msg);
    return id;
}

static inline ncclComm_t world_comm(void)
{
    ncclComm_t comm;
    NCCL(ncclCommInitRank(&comm, who.world, shared_id(), who.rank));
    return comm;
}

#define barrier(comm) barrier_at(comm, __LINE__)
static inline void barrier_at(ncclComm_t comm, int line)
{
    float one = 1;
    ncclResult_t r = ncclAllReduce(&one, &one, 1, ncclFloat, ncclSum, comm, NULL);
    CHECK(r == ncclSuccess, "the barrier of line %d gave %d: %s", line, (int)r, ncclGetLastError(comm));
}

static inline double seconds_since(uint64_t t)
{
    return (double)(ry_now_ns() - t) * 1e-9;
}

#endif
