/*
 * emu_p2p.c: sends and receives of the emulated NCCL: order within a pair, groups (nested, of two communicators, with a
 * collective in between), zero counts, sends to oneself, sizes from nothing to megabytes, and what is refused.
 */
#include "emu_common.h"

static uint8_t byte_of(int from, int to, size_t i, int salt)
{
    return (uint8_t)(i * 31 + (i >> 11) + (size_t)(from * 7 + to * 13 + salt));
}

/* One exchange with sizes that depend on both ranks, zero among them; `base` bytes at most per pair. */
static void exchange(ncclComm_t comm, int rank, int n, size_t base, int salt)
{
    uint8_t **out = calloc((size_t)n, sizeof *out), **in = calloc((size_t)n, sizeof *in);
    size_t *ns = calloc((size_t)n, sizeof *ns), *nr = calloc((size_t)n, sizeof *nr);
    for (int r = 0; r < n; r++) {
        ns[r] = base * (size_t)((rank + 2 * r + salt) % 4) / 3;
        nr[r] = base * (size_t)((r + 2 * rank + salt) % 4) / 3;
        out[r] = malloc(ns[r] + 1);
        in[r] = malloc(nr[r] + 1);
        for (size_t i = 0; i < ns[r]; i++)
            out[r][i] = byte_of(rank, r, i, salt);
        memset(in[r], 0xee, nr[r] + 1);
    }
    NCCL(ncclGroupStart());
    for (int r = 0; r < n; r++) {
        NCCL(ncclSend(out[r], ns[r], ncclUint8, r, comm, NULL));
        NCCL(ncclRecv(in[r], nr[r], ncclUint8, r, comm, NULL));
    }
    NCCL(ncclGroupEnd());
    for (int r = 0; r < n; r++) {
        for (size_t i = 0; i < nr[r]; i++)
            CHECK(in[r][i] == byte_of(r, rank, i, salt), "byte %zu of %zu from %d", i, nr[r], r);
        CHECK(in[r][nr[r]] == 0xee, "written past the end");
        free(out[r]);
        free(in[r]);
    }
    free(out), free(in), free(ns), free(nr);
}

static void in_order(ncclComm_t comm)
{
    int next = (who.rank + 1) % who.world, last = (who.rank + who.world - 1) % who.world;
    int out[64], in[64];
    NCCL(ncclGroupStart());
    for (int i = 0; i < 64; i++) {
        out[i] = who.rank * 1000 + i;
        NCCL(ncclSend(&out[i], 1, ncclInt32, next, comm, NULL));
    }
    for (int i = 0; i < 64; i++)
        NCCL(ncclRecv(&in[i], 1, ncclInt32, last, comm, NULL));
    NCCL(ncclGroupEnd());
    for (int i = 0; i < 64; i++)
        CHECK(in[i] == last * 1000 + i, "message %d is %d", i, in[i]);
}

/* Outside of groups, in an order that only works when both ends keep it. */
static void ungrouped(ncclComm_t comm)
{
    int v = who.rank;
    if (who.world < 2 || who.rank > 1)
        return;
    for (int i = 0; i < 50; i++) {
        if (who.rank == i % 2) {
            NCCL(ncclSend(&i, 1, ncclInt32, 1 - who.rank, comm, NULL));
        } else {
            NCCL(ncclRecv(&v, 1, ncclInt32, 1 - who.rank, comm, NULL));
            CHECK(v == i, "%d", v);
        }
    }
}

/* Nested groups, two communicators, and a collective whose place among the p2p calls differs between the ranks. */
static void mixed(ncclComm_t a, ncclComm_t b)
{
    int next = (who.rank + 1) % who.world, last = (who.rank + who.world - 1) % who.world;
    int x = who.rank, y = -1, p = who.rank + 100, q = -1, sum = 1;
    NCCL(ncclGroupStart());
    if (who.rank % 2)
        NCCL(ncclAllReduce(&sum, &sum, 1, ncclInt32, ncclSum, a, NULL));
    NCCL(ncclGroupStart());
    NCCL(ncclSend(&x, 1, ncclInt32, next, a, NULL));
    NCCL(ncclRecv(&q, 1, ncclInt32, last, b, NULL));
    NCCL(ncclGroupEnd());
    CHECK(y == -1 && q == -1, "an inner group ran");
    NCCL(ncclRecv(&y, 1, ncclInt32, last, a, NULL));
    NCCL(ncclSend(&p, 1, ncclInt32, next, b, NULL));
    if (who.rank % 2 == 0)
        NCCL(ncclAllReduce(&sum, &sum, 1, ncclInt32, ncclSum, a, NULL));
    NCCL(ncclGroupEnd());
    CHECK(y == last && q == last + 100 && sum == who.world, "%d %d %d", y, q, sum);
}

static void refused(ncclComm_t comm)
{
    int v = 0;
    EXPECT(ncclInvalidArgument, ncclSend(&v, 1, ncclInt32, who.world, comm, NULL));
    CHECK(strstr(ncclGetLastError(NULL), "peer") != NULL, "%s", ncclGetLastError(NULL));
    EXPECT(ncclInvalidArgument, ncclSend(&v, 1, ncclInt32, -1, comm, NULL));
    EXPECT(ncclInvalidArgument, ncclSend(&v, 1, ncclNumTypes, 0, comm, NULL));
    EXPECT(ncclInvalidArgument, ncclRecv(&v, 1, ncclInt32, 0, NULL, NULL));
    EXPECT(ncclInvalidArgument, ncclRecv(NULL, 1, ncclInt32, 0, comm, NULL));
    EXPECT(ncclInvalidUsage, ncclGroupEnd());
    EXPECT(ncclInvalidUsage, ncclSend(&v, 1, ncclInt32, who.rank, comm, NULL));
    /* an error in a group is told at its end, and nothing of the group is done */
    NCCL(ncclGroupStart());
    NCCL(ncclSend(&v, 1, ncclInt32, (who.rank + 1) % who.world, comm, NULL));
    EXPECT(ncclInvalidArgument, ncclRecv(&v, 1, ncclInt32, 99, comm, NULL));
    EXPECT(ncclInvalidArgument, ncclGroupEnd());
    ncclSimInfo_t info = NCCL_SIM_INFO_INITIALIZER;
    NCCL(ncclGroupStart());
    NCCL(ncclSend(&v, 1, ncclInt32, (who.rank + 1) % who.world, comm, NULL));
    NCCL(ncclGroupSimulateEnd(&info));
    EXPECT(ncclInvalidUsage, ncclGroupSimulateEnd(&info));
}

/* The two ends name different sizes: both are told, nobody hangs. Spoils the communicator. */
static void mismatch(ncclComm_t comm)
{
    int v[4] = {0};
    if (who.world < 2 || who.rank > 1)
        return;
    ncclResult_t r = who.rank ? ncclRecv(v, 2, ncclInt32, 0, comm, NULL) : ncclSend(v, 3, ncclInt32, 1, comm, NULL),
                 state;
    CHECK(r == ncclInvalidUsage, "%d", r);
    CHECK(strstr(ncclGetLastError(comm), "8") && strstr(ncclGetLastError(comm), "12"), "%s", ncclGetLastError(comm));
    NCCL(ncclCommGetAsyncError(comm, &state));
    CHECK(state == ncclInvalidUsage, "%d", state);
}

int main(void)
{
    start_rank();
    ncclComm_t a = world_comm(), b = world_comm();
    int rank, n;
    NCCL(ncclCommUserRank(a, &rank));
    NCCL(ncclCommCount(a, &n));
    CHECK(rank == who.rank && n == who.world, "%d of %d", rank, n);
    static const size_t sizes[] = {0, 3, 300, 9000, 70000, 3000000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        exchange(a, rank, n, n > 8 ? sizes[i] / 8 : sizes[i], (int)i);
    in_order(a);
    ungrouped(b);
    mixed(a, b);
    refused(a);
    barrier(a);
    mismatch(b);
    barrier(a);
    NCCL(ncclCommAbort(b));
    NCCL(ncclCommDestroy(a));
    return 0;
}
