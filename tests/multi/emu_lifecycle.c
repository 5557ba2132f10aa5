/*
 * emu_lifecycle.c: every way in which a communicator of the emulated NCCL comes to be and ends.
 */
#include <netinet/in.h>
#include <sys/wait.h>
#include <time.h>

#include "emu_common.h"

/* The communicator works, has this size, and its ranks are in this order (by their rank in the world). */
static void works(ncclComm_t comm, int nranks, const int *order)
{
    int n, rank, seen[64], device;
    NCCL(ncclCommCount(comm, &n));
    NCCL(ncclCommUserRank(comm, &rank));
    NCCL(ncclCommCuDevice(comm, &device));
    CHECK(n == nranks, "%d ranks, not %d", n, nranks);
    CHECK(device == who.local_rank, "device %d", device);
    NCCL(ncclAllGather(&who.rank, seen, 1, ncclInt32, comm, NULL));
    CHECK(seen[rank] == who.rank, "%d", seen[rank]);
    for (int i = 0; order && i < n; i++)
        CHECK(seen[i] == order[i], "rank %d is %d, not %d", i, seen[i], order[i]);
}

static void wait_ready(ncclComm_t comm)
{
    ncclResult_t state;
    for (int i = 0; i < 20000; i++) {
        NCCL(ncclCommGetAsyncError(comm, &state));
        if (state != ncclInProgress)
            break;
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    CHECK(state == ncclSuccess, "%d: %s", state, ncclGetLastError(comm));
}

static void unique_id(void)
{
    ncclUniqueId id;
    struct sockaddr_in a;
    NCCL(ncclGetUniqueId(&id));
    memcpy(&a, id.internal + 8, sizeof a);
    CHECK(a.sin_family == AF_INET && a.sin_port && a.sin_addr.s_addr == htonl(INADDR_LOOPBACK), "family %d",
          a.sin_family);
    for (int i = 64; i < 128; i++)
        CHECK(!id.internal[i], "byte %d is not zero", i);
    EXPECT(ncclInvalidArgument, ncclGetUniqueId(NULL));
    int version;
    NCCL(ncclGetVersion(&version));
    CHECK(version == 22809, "%d", version);
    CHECK(strstr(ncclGetErrorString(ncclRemoteError), "remote"), "%s", ncclGetErrorString(ncclRemoteError));
}

static void plain(void)
{
    ncclUniqueId id = shared_id();
    ncclComm_t comm;
    memset(id.internal + 64, who.rank + 1, 64); /* the tail is somebody else's */
    NCCL(ncclCommInitRank(&comm, who.world, id, who.rank));
    works(comm, who.world, NULL);
    NCCL(ncclCommFinalize(comm));
    EXPECT(ncclInvalidArgument, ncclCommFinalize(comm));
    NCCL(ncclCommDestroy(comm));
    EXPECT(ncclInvalidArgument, ncclCommInitRank(&comm, who.world, id, who.world));
    EXPECT(ncclInvalidArgument, ncclCommInitRank(&comm, 0, id, 0));
    EXPECT(ncclInvalidArgument, ncclCommInitRank(NULL, who.world, id, who.rank));
}

static void config(void)
{
    ncclConfig_t c = NCCL_CONFIG_INITIALIZER, bad = NCCL_CONFIG_INITIALIZER, old = NCCL_CONFIG_INITIALIZER;
    ncclComm_t comm;
    c.commName = "the name";
    ncclUniqueId id = shared_id();
    NCCL(ncclCommInitRankConfig(&comm, who.world, id, who.rank, &c));
    works(comm, who.world, NULL);
    NCCL(ncclCommAbort(comm));
    bad.magic = 1;
    EXPECT(ncclInvalidArgument, ncclCommInitRankConfig(&comm, who.world, id, who.rank, &bad));
    bad = c;
    bad.blocking = 7;
    EXPECT(ncclInvalidArgument, ncclCommInitRankConfig(&comm, who.world, id, who.rank, &bad));
    old.size = offsetof(ncclConfig_t, blocking); /* a header that ended there: what lies beyond is not read */
    old.blocking = 7;
    NCCL(ncclCommInitRankConfig(&comm, who.world, shared_id(), who.rank, &old));
    NCCL(ncclCommDestroy(comm));
}

static void nonblocking(void)
{
    ncclConfig_t c = NCCL_CONFIG_INITIALIZER;
    ncclComm_t comm, child;
    c.blocking = 0;
    ncclUniqueId id = shared_id();
    if (who.rank == who.world - 1 && who.world > 1)
        nanosleep(&(struct timespec){0, 200000000}, NULL); /* the others are in progress for a while */
    EXPECT(ncclInProgress, ncclCommInitRankConfig(&comm, who.world, id, who.rank, &c));
    CHECK(comm != NULL, "no communicator to ask");
    ncclResult_t state;
    NCCL(ncclCommGetAsyncError(comm, &state));
    if (who.rank == 0 && who.world > 1) {
        int n;
        CHECK(state == ncclInProgress, "%d", state);
        EXPECT(ncclInvalidArgument, ncclCommCount(comm, &n));
    }
    wait_ready(comm);
    works(comm, who.world, NULL);
    ncclResult_t r = ncclCommSplit(comm, 0, -who.rank, &child, NULL);
    CHECK(r == ncclInProgress || r == ncclSuccess, "%d", r);
    wait_ready(comm);
    wait_ready(child);
    int order[64];
    for (int i = 0; i < who.world; i++)
        order[i] = who.world - 1 - i;
    works(child, who.world, order);
    NCCL(ncclCommDestroy(child));
    NCCL(ncclCommFinalize(comm));
    wait_ready(comm);
    NCCL(ncclCommDestroy(comm));
}

static void scalable(void)
{
    ncclUniqueId ids[2] = {shared_id(), shared_id()};
    ncclComm_t comm;
    int n = who.world > 1 ? 2 : 1;
    NCCL(ncclCommInitRankScalable(&comm, who.world, who.rank, n, ids, NULL));
    works(comm, who.world, NULL);
    NCCL(ncclCommDestroy(comm));
    EXPECT(ncclInvalidArgument, ncclCommInitRankScalable(&comm, who.world, who.rank, 0, ids, NULL));
}

/* Several ranks in one process: each process makes a clique of its own. */
static void init_all(void)
{
    enum { N = 3 };
    ncclComm_t comms[N];
    int devices[N] = {4, 2, 0}, twice[2] = {1, 1}, x[N], y[N], v;
    NCCL(ncclCommInitAll(comms, N, devices));
    for (int i = 0; i < N; i++) {
        NCCL(ncclCommUserRank(comms[i], &v));
        CHECK(v == i, "%d", v);
        NCCL(ncclCommCuDevice(comms[i], &v));
        CHECK(v == devices[i], "%d", v);
        x[i] = i + 1;
    }
    NCCL(ncclGroupStart());
    for (int i = 0; i < N; i++)
        NCCL(ncclAllReduce(&x[i], &y[i], 1, ncclInt32, ncclSum, comms[i], NULL));
    NCCL(ncclGroupEnd());
    for (int i = 0; i < N; i++)
        CHECK(y[i] == 6, "%d", y[i]);
    NCCL(ncclGroupStart());
    for (int i = 0; i < N; i++) {
        NCCL(ncclSend(&x[i], 1, ncclInt32, (i + 1) % N, comms[i], NULL));
        NCCL(ncclRecv(&y[i], 1, ncclInt32, (i + N - 1) % N, comms[i], NULL));
    }
    NCCL(ncclGroupEnd());
    for (int i = 0; i < N; i++)
        CHECK(y[i] == (i + N - 1) % N + 1, "%d", y[i]);
    /* children of all of them, in a group */
    ncclComm_t child[N];
    NCCL(ncclGroupStart());
    for (int i = 0; i < N; i++)
        NCCL(ncclCommSplit(comms[i], i == 1 ? NCCL_SPLIT_NOCOLOR : 7, 0, &child[i], NULL));
    NCCL(ncclGroupEnd());
    CHECK(!child[1] && child[0] && child[2], "%p", (void *)child[1]);
    NCCL(ncclCommCount(child[2], &v));
    CHECK(v == 2, "%d", v);
    NCCL(ncclCommDestroy(child[0]));
    NCCL(ncclCommDestroy(child[2]));
    for (int i = 0; i < N; i++)
        NCCL(ncclCommDestroy(comms[i]));
    EXPECT(ncclInvalidUsage, ncclCommInitAll(comms, 2, twice));
    EXPECT(ncclInvalidArgument, ncclCommInitAll(comms, 0, NULL));
}

/* Two communicators of the world made in one group. */
static void grouped_init(void)
{
    ncclUniqueId a = shared_id(), b = shared_id();
    ncclComm_t ca, cb;
    NCCL(ncclGroupStart());
    NCCL(ncclCommInitRank(&ca, who.world, a, who.rank));
    NCCL(ncclCommInitRank(&cb, who.world, b, who.world - 1 - who.rank));
    NCCL(ncclGroupEnd());
    works(ca, who.world, NULL);
    works(cb, who.world, NULL);
    NCCL(ncclCommDestroy(ca));
    NCCL(ncclCommDestroy(cb));
}

static void split(void)
{
    ncclComm_t world = world_comm(), halves, part, part2;
    int odd = who.rank % 2, order[64], n = 0;
    /* odd and even, in reverse order */
    NCCL(ncclCommSplit(world, odd, 1000 - who.rank, &halves, NULL));
    for (int r = who.world - 1; r >= 0; r--)
        if (r % 2 == odd)
            order[n++] = r;
    works(halves, n, order);
    /* the first rank stays out; equal keys keep the parent's order */
    NCCL(ncclCommSplit(world, who.rank ? 3 : NCCL_SPLIT_NOCOLOR, 0, &part, NULL));
    CHECK((part == NULL) == (who.rank == 0), "%p", (void *)part);
    for (int r = 1; r < who.world; r++)
        order[r - 1] = r;
    if (part)
        works(part, who.world - 1, order);
    EXPECT(ncclInvalidArgument, ncclCommSplit(world, -5, 0, &part, NULL));
    /* a group that fails makes nothing, and leaves the parent as it was */
    NCCL(ncclGroupStart());
    NCCL(ncclCommSplit(world, 0, 0, &part2, NULL));
    EXPECT(ncclInvalidArgument, ncclCommSplit(world, -5, 0, &part2, NULL));
    EXPECT(ncclInvalidArgument, ncclGroupEnd());
    CHECK(!part2, "a child of a failed group");
    barrier(world);
    /* a child outlives its parent */
    NCCL(ncclCommDestroy(world));
    works(halves, n, NULL);
    NCCL(ncclCommDestroy(halves));
    if (part)
        NCCL(ncclCommDestroy(part));
}

static void shrink(void)
{
    ncclComm_t world = world_comm(), rest = NULL;
    int out[1] = {who.world - 1}, order[64];
    if (who.world == 1) {
        NCCL(ncclCommDestroy(world));
        return;
    }
    for (int r = 0; r + 1 < who.world; r++)
        order[r] = r;
    if (who.rank != who.world - 1) {
        NCCL(ncclCommShrink(world, out, 1, &rest, NULL, NCCL_SHRINK_DEFAULT));
        works(rest, who.world - 1, order);
        NCCL(ncclCommDestroy(rest));
    } else {
        EXPECT(ncclInvalidArgument, ncclCommShrink(world, out, 1, &rest, NULL, NCCL_SHRINK_DEFAULT));
    }
    barrier(world);
    NCCL(ncclCommDestroy(world));
}

static void revoking(void)
{
    ncclComm_t world = world_comm(), child;
    float x = 0;
    EXPECT(ncclInvalidArgument, ncclCommRevoke(world, 4));
    NCCL(ncclCommRevoke(world, NCCL_REVOKE_DEFAULT));
    wait_ready(world);
    EXPECT(ncclInvalidUsage, ncclAllReduce(&x, &x, 1, ncclFloat32, ncclSum, world, NULL));
    EXPECT(ncclInvalidArgument, ncclCommFinalize(world));
    NCCL(ncclCommSplit(world, 0, who.rank, &child, NULL));
    works(child, who.world, NULL);
    NCCL(ncclCommDestroy(child));
    NCCL(ncclCommDestroy(world));
}

static void memory(void)
{
    ncclComm_t comm = world_comm();
    void *p = NULL, *handle = NULL;
    ncclWindow_t w = NULL;
    NCCL(ncclMemAlloc(&p, 10000));
    CHECK(p && (uintptr_t)p % 4096 == 0, "%p", p);
    memset(p, 1, 10000);
    NCCL(ncclCommRegister(comm, p, 10000, &handle));
    NCCL(ncclCommWindowRegister(comm, p, 10000, &w, NCCL_WIN_COLL_SYMMETRIC));
    CHECK(handle && w, "%p %p", handle, (void *)w);
    EXPECT(ncclInvalidArgument, ncclCommRegister(comm, NULL, 1, &handle));
    NCCL(ncclCommDeregister(comm, handle));
    NCCL(ncclCommWindowDeregister(comm, w));
    NCCL(ncclMemFree(p));
    NCCL(ncclCommDestroy(comm));
    NCCL(ncclCommDestroy(NULL));
    NCCL(ncclCommAbort(NULL));
    EXPECT(ncclInvalidArgument, ncclCommFinalize(NULL));
}

/* A data worker: a forked child that lives and ends beside a rank at work, and is told no when it tries to join in. */
static void forking(void)
{
    ncclComm_t comm = world_comm(), other;
    ncclUniqueId id;
    int st;
    works(comm, who.world, NULL);
    pid_t pid = fork();
    if (!pid) {
        memset(&id, 0, sizeof id);
        EXPECT(ncclInvalidUsage, ncclCommInitRank(&other, 1, id, 0));
        EXPECT(ncclInvalidUsage, ncclRecv(&st, 1, ncclInt32, 0, comm, NULL));
        NCCL(ncclCommAbort(comm));
#ifdef __SANITIZE_ADDRESS__
        _exit(0); /* the leak check takes what the parent's threads hold for lost */
#endif
        exit(0); /* with exit handlers and destructors */
    }
    works(comm, who.world, NULL);
    CHECK(waitpid(pid, &st, 0) == pid && WIFEXITED(st) && !WEXITSTATUS(st), "status %x", st);
    works(comm, who.world, NULL);
    NCCL(ncclCommDestroy(comm));
}

int main(void)
{
    start_rank();
    unique_id();
    plain();
    config();
    nonblocking();
    scalable();
    init_all();
    grouped_init();
    split();
    shrink();
    revoking();
    memory();
    forking();
    ncclComm_t left_open = world_comm(); /* a program may exit without ending it */
    works(left_open, who.world, NULL);
    return 0;
}
