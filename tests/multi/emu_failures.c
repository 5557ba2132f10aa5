/*
 * emu_failures.c: what the emulated NCCL does when something goes wrong: nobody hangs, and the error names the rank.
 *
 * A rank that is to die runs in a child process of the launcher's rank, which then ends well: the launcher must not
 * take part in what is tested here.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#include "emu_common.h"

static void nap(double s)
{
    nanosleep(&(struct timespec){(time_t)s, (long)((s - (double)(time_t)s) * 1e9)}, NULL);
}

/* ---- abort ends a wait ---- */

static void *abort_later(void *comm)
{
    nap(0.2);
    NCCL(ncclCommAbort(comm));
    return NULL;
}

static void abort_ends_waits(size_t count)
{
    ncclComm_t comm = world_comm();
    int v[4];
    pthread_t t;
    if (who.rank % 2 == 0) { /* waited for, and silent for long enough */
        nap(5);
        NCCL(ncclCommAbort(comm));
        return;
    }
    CHECK(!pthread_create(&t, NULL, abort_later, comm));
    uint64_t t0 = ry_now_ns();
    /* nobody sends; nothing is just as unmatched as something */
    EXPECT(ncclInternalError, ncclRecv(v, count, ncclInt32, who.rank - 1, comm, NULL));
    CHECK(strstr(ncclGetLastError(NULL), "abort"), "%s", ncclGetLastError(NULL));
    CHECK(!pthread_join(t, NULL));
    CHECK(seconds_since(t0) > 0.15 && seconds_since(t0) < 4.5, "%g s", seconds_since(t0));
}

/* While the ranks have not all met: the last one never comes. */
static void abort_ends_init(void)
{
    ncclConfig_t c = NCCL_CONFIG_INITIALIZER;
    ncclComm_t comm;
    ncclUniqueId id = shared_id();
    c.blocking = 0;
    if (who.rank == who.world - 1)
        return;
    EXPECT(ncclInProgress, ncclCommInitRankConfig(&comm, who.world, id, who.rank, &c));
    nap(0.2);
    uint64_t t0 = ry_now_ns();
    NCCL(ncclCommAbort(comm));
    CHECK(seconds_since(t0) < 20, "%g s", seconds_since(t0));
}

/* ---- ranks that go ---- */

/* Rank 0 ends the communicator while rank 1 waits for it. */
static void leaving(void)
{
    ncclComm_t comm = world_comm();
    barrier(comm);
    if (who.rank == 0) {
        nap(0.2);
        NCCL(ncclCommDestroy(comm));
        return;
    }
    if (who.rank == 1) {
        int v;
        EXPECT(ncclRemoteError, ncclRecv(&v, 1, ncclInt32, 0, comm, NULL));
        CHECK(strstr(ncclGetLastError(comm), "rank 0 has left"), "%s", ncclGetLastError(comm));
    }
    NCCL(ncclCommAbort(comm));
}

static void survivors(ncclComm_t comm, int dead)
{
    uint64_t t0 = ry_now_ns();
    float x = 1;
    char name[32];
    ncclResult_t state;
    EXPECT(ncclRemoteError, ncclAllReduce(&x, &x, 1, ncclFloat32, ncclSum, comm, NULL));
    CHECK(seconds_since(t0) < 40, "%g s", seconds_since(t0));
    NCCL(ncclCommGetAsyncError(comm, &state));
    snprintf(name, sizeof name, "rank %d ", dead);
    CHECK(state == ncclRemoteError && strstr(ncclGetLastError(comm), name), "%d: %s", state, ncclGetLastError(comm));
    EXPECT(ncclRemoteError, ncclAllReduce(&x, &x, 1, ncclFloat32, ncclSum, comm, NULL));
    /* those who are left go on without it */
    ncclComm_t rest;
    int n;
    NCCL(ncclCommShrink(comm, &dead, 1, &rest, NULL, NCCL_SHRINK_ABORT));
    NCCL(ncclCommCount(rest, &n));
    CHECK(n == who.world - 1, "%d", n);
    x = 1;
    NCCL(ncclAllReduce(&x, &x, 1, ncclFloat32, ncclSum, rest, NULL));
    CHECK(x == (float)n, "%g", (double)x);
    NCCL(ncclCommDestroy(rest));
    NCCL(ncclCommAbort(comm));
}

/* Run `victim` in a child that must end by SIGKILL, its own or ours after a while; the rank has done its part then. */
static void die(void (*victim)(const ncclUniqueId *id), const ncclUniqueId *id, double after)
{
    int st;
    pid_t pid = fork();
    if (!pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        victim(id);
        _exit(3);
    }
    if (after > 0) {
        nap(after);
        kill(pid, SIGKILL);
    }
    CHECK(waitpid(pid, &st, 0) == pid && WIFSIGNALED(st) && WTERMSIG(st) == SIGKILL, "status %x", st);
}

static void die_in_use(const ncclUniqueId *id)
{
    ncclComm_t comm;
    NCCL(ncclCommInitRank(&comm, who.world, *id, who.rank));
    barrier(comm);
    nap(0.3); /* the others wait for it by then */
    raise(SIGKILL);
}

static void killed(void)
{
    ncclUniqueId id = shared_id();
    ncclComm_t comm;
    if (who.rank == who.world - 1) {
        die(die_in_use, &id, 0);
        return;
    }
    NCCL(ncclCommInitRank(&comm, who.world, id, who.rank));
    barrier(comm);
    survivors(comm, who.world - 1);
}

/* A peer that stops taking what is being sent to it, its process still there: abort must not wait for it. */
enum { MUCH = 200000000 };

static void *stop_soon(void *arg)
{
    nap(0.01);
    raise(SIGSTOP);
    return NULL;
}

static void stop_receiving(const ncclUniqueId *id)
{
    ncclComm_t comm;
    pthread_t t;
    char *buf = malloc(MUCH);
    NCCL(ncclCommInitRank(&comm, who.world, *id, who.rank));
    CHECK(!pthread_create(&t, NULL, stop_soon, NULL));
    for (;;)
        NCCL(ncclRecv(buf, MUCH, ncclUint8, 0, comm, NULL));
}

static void abort_ends_sends(void)
{
    ncclUniqueId id = shared_id();
    ncclComm_t comm;
    if (who.rank == who.world - 1) {
        die(stop_receiving, &id, 6);
        return;
    }
    NCCL(ncclCommInitRank(&comm, who.world, id, who.rank));
    if (who.rank == 0) {
        char *buf = calloc(1, MUCH);
        pthread_t t;
        uint64_t t0 = ry_now_ns();
        ncclResult_t r = ncclSuccess;
        CHECK(!pthread_create(&t, NULL, abort_later, comm)); /* in 0.2 s */
        while (r == ncclSuccess)
            r = ncclSend(buf, MUCH, ncclUint8, who.world - 1, comm, NULL);
        CHECK(r == ncclInternalError && seconds_since(t0) < 5, "%d after %g s: %s", r, seconds_since(t0),
              ncclGetLastError(NULL));
        CHECK(!pthread_join(t, NULL));
        memset(buf, 1, MUCH); /* nobody reads it any more */
        free(buf);
        return;
    }
    NCCL(ncclCommAbort(comm));
}

static void die_meeting(const ncclUniqueId *id)
{
    ncclConfig_t c = NCCL_CONFIG_INITIALIZER;
    ncclComm_t comm;
    c.blocking = 0;
    ncclCommInitRankConfig(&comm, who.world, *id, who.rank, &c);
    nap(0.5); /* it has come; rank 1 has not */
    raise(SIGKILL);
}

static void killed_while_meeting(void)
{
    ncclUniqueId id = shared_id();
    ncclComm_t comm;
    uint64_t t0 = ry_now_ns();
    if (who.rank == who.world - 1) {
        die(die_meeting, &id, 0);
        return;
    }
    if (who.rank == 1) /* too late */
        return;
    EXPECT(ncclRemoteError, ncclCommInitRank(&comm, who.world, id, who.rank));
    CHECK(comm == NULL, "a communicator after a failure");
    CHECK(strstr(ncclGetLastError(NULL), "rank 3 ended"), "%s", ncclGetLastError(NULL));
    CHECK(seconds_since(t0) < 40, "%g s", seconds_since(t0));
}

/* A rank that never comes: RYEMU_TIMEOUT is 2 in this test. */
static void missing(void)
{
    ncclUniqueId id = shared_id();
    ncclComm_t comm;
    uint64_t t0 = ry_now_ns();
    if (who.rank == 2)
        return;
    EXPECT(ncclRemoteError, ncclCommInitRank(&comm, who.world, id, who.rank));
    CHECK(strstr(ncclGetLastError(NULL), "missing: 2"), "%s", ncclGetLastError(NULL));
    CHECK(seconds_since(t0) > 1 && seconds_since(t0) < 40, "%g s", seconds_since(t0));
}

/* Not all say the same number of ranks, or two say the same rank. */
static void disagreeing(void)
{
    ncclUniqueId id = shared_id();
    ncclComm_t comm;
    ncclResult_t r = ncclCommInitRank(&comm, who.world + (who.rank == 1), id, who.rank);
    CHECK(r == ncclInvalidArgument || r == ncclSystemError || r == ncclRemoteError, "%d", r);
    if (who.rank == 0)
        CHECK(strstr(ncclGetLastError(NULL), "number of ranks") || r != ncclInvalidArgument, "%s",
              ncclGetLastError(NULL));
    ncclUniqueId junk;
    memset(&junk, 7, sizeof junk);
    EXPECT(ncclInvalidArgument, ncclCommInitRank(&comm, who.world, junk, who.rank));
}

int main(void)
{
    start_rank();
    CHECK(who.world == 4);
    setenv("RYEMU_TIMEOUT", "2", 1);
    /* first what forks: the transport of a process that has one does not go on in a child */
    killed();
    killed_while_meeting();
    abort_ends_sends();
    abort_ends_init();
    abort_ends_waits(3);
    abort_ends_waits(0);
    leaving();
    missing();
    disagreeing();
    return 0;
}
