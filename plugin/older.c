/* older.c: see older.h. Everything here calls the real NCCL only, and runs with its caller's re-entrancy guard up. */
#include "older.h"

#include "real.h"

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        ncclResult_t r_ = (call);                                                                                      \
        if (r_ != ncclSuccess && r_ != ncclInProgress)                                                                 \
            return r_;                                                                                                 \
    } while (0)

/* End the group in any case, or everything that the job does next would wait in it. */
static ncclResult_t end_group(ncclResult_t so_far)
{
    ncclResult_t r = ry_real.ncclGroupEnd();
    return so_far != ncclSuccess && so_far != ncclInProgress ? so_far : r;
}

/* Within a group: the first failure is kept, and nothing is called after it. */
#define ADD(r, call)                                                                                                   \
    do {                                                                                                               \
        if (r == ncclSuccess || r == ncclInProgress)                                                                   \
            r = (call);                                                                                                \
    } while (0)

static ncclResult_t all_to_all(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                               cudaStream_t stream)
{
    int n;
    size_t step = count * ry_nccl_type_bytes((int)type);
    TRY(ry_real.ncclCommCount(comm, &n));
    ncclResult_t st = ncclSuccess;
    TRY(ry_real.ncclGroupStart());
    for (int r = 0; r < n; r++) {
        ADD(st, ry_real.ncclSend((const char *)send + (size_t)r * step, count, type, r, comm, stream));
        ADD(st, ry_real.ncclRecv((char *)recv + (size_t)r * step, count, type, r, comm, stream));
    }
    return end_group(st);
}

static ncclResult_t gather(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream)
{
    int n, rank;
    size_t step = count * ry_nccl_type_bytes((int)type);
    TRY(ry_real.ncclCommCount(comm, &n));
    TRY(ry_real.ncclCommUserRank(comm, &rank));
    ncclResult_t st = ncclSuccess;
    TRY(ry_real.ncclGroupStart());
    ADD(st, ry_real.ncclSend(send, count, type, root, comm, stream));
    for (int r = 0; rank == root && r < n; r++)
        ADD(st, ry_real.ncclRecv((char *)recv + (size_t)r * step, count, type, r, comm, stream));
    return end_group(st);
}

static ncclResult_t scatter(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                            cudaStream_t stream)
{
    int n, rank;
    size_t step = count * ry_nccl_type_bytes((int)type);
    TRY(ry_real.ncclCommCount(comm, &n));
    TRY(ry_real.ncclCommUserRank(comm, &rank));
    ncclResult_t st = ncclSuccess;
    TRY(ry_real.ncclGroupStart());
    ADD(st, ry_real.ncclRecv(recv, count, type, root, comm, stream));
    for (int r = 0; rank == root && r < n; r++)
        ADD(st, ry_real.ncclSend((const char *)send + (size_t)r * step, count, type, r, comm, stream));
    return end_group(st);
}

/* Several ids only spread the work of making the communicator: all ranks have all of them, so the first will do. */
static ncclResult_t init_scalable(ncclComm_t *comm, int nranks, int rank, int nids, ncclUniqueId *ids,
                                  ncclConfig_t *config)
{
    if (nids < 1 || !ids)
        return ncclInvalidArgument;
    return ry_real.ncclCommInitRankConfig(comm, nranks, ids[0], rank, config);
}

void ry_older_fill(void)
{
    if (!ry_real.ncclAlltoAll)
        ry_real.ncclAlltoAll = all_to_all;
    if (!ry_real.ncclGather)
        ry_real.ncclGather = gather;
    if (!ry_real.ncclScatter)
        ry_real.ncclScatter = scatter;
    if (!ry_real.ncclCommInitRankScalable)
        ry_real.ncclCommInitRankScalable = init_scalable;
}
