/*
 * older_calls.c: calls functions that NCCL 2.18 does not have, on a library that exports only what 2.18 had, preloaded: what
 * can be done another way works, what cannot is refused.
 */
#include "emu_common.h"

int main(void)
{
    start_rank();
    int version, n = who.world;
    NCCL(ncclGetVersion(&version));
    CHECK(version < 22000, "this is NCCL %d", version);
    ncclUniqueId ids[2] = {shared_id(), shared_id()};
    ncclComm_t comm;
    NCCL(ncclCommInitRankScalable(&comm, n, who.rank, 2, ids, NULL));
    int *out = calloc((size_t)n * 2, sizeof *out), *in = calloc((size_t)n * 2, sizeof *in), mine[2] = {-1, -1};
    for (int i = 0; i < 2 * n; i++)
        out[i] = who.rank * 100 + i;
    NCCL(ncclAlltoAll(out, in, 2, ncclInt32, comm, NULL));
    for (int r = 0; r < n; r++)
        CHECK(in[2 * r] == r * 100 + 2 * who.rank && in[2 * r + 1] == r * 100 + 2 * who.rank + 1, "all-to-all from %d", r);
    memset(in, 0, (size_t)n * 2 * sizeof *in);
    NCCL(ncclGather(out, in, 2, ncclInt32, 1, comm, NULL));
    for (int r = 0; r < n; r++)
        CHECK(in[2 * r] == (who.rank == 1 ? r * 100 : 0) && in[2 * r + 1] == (who.rank == 1 ? r * 100 + 1 : 0), "gather");
    NCCL(ncclScatter(out, mine, 2, ncclInt32, 1, comm, NULL));
    CHECK(mine[0] == 100 + 2 * who.rank && mine[1] == 100 + 2 * who.rank + 1, "scatter gave %d %d", mine[0], mine[1]);
    /* a refused call leaves no group open, in which what follows would wait for ever */
    EXPECT(ncclInvalidArgument, ncclAlltoAll(out, in, 2, (ncclDataType_t)99, comm, NULL));
    EXPECT(ncclInvalidArgument, ncclGather(out, in, 2, ncclInt32, n, comm, NULL));
    EXPECT(ncclInvalidArgument, ncclScatter(out, in, 2, ncclInt32, -1, comm, NULL));
    EXPECT(ncclInvalidUsage, ncclGroupEnd());
    mine[0] = 0;
    NCCL(ncclAllReduce(&n, &mine[0], 1, ncclInt32, ncclSum, comm, NULL));
    CHECK(mine[0] == n * n, "sum is %d", mine[0]);
    EXPECT(ncclInvalidUsage, ncclCommRevoke(comm, 0));
    NCCL(ncclCommDestroy(comm));
    free(out), free(in);
    return 0;
}
