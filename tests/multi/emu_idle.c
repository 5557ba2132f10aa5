/*
 * emu_idle.c: many ranks on few cores: exchanges among all of them end in time, and a rank that waits uses next to no
 * processor time, with nothing spinning in it.
 */
#include <sys/resource.h>
#include <time.h>

#include "emu_common.h"

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

int main(void)
{
    start_rank();
    ncclComm_t comm = world_comm();
    size_t count = 16384, n = (size_t)who.world;
    int *out = calloc(count * n, sizeof *out), *in = calloc(count * n, sizeof *in);
    uint64_t t0 = ry_now_ns();
    for (int k = 0; k < 5; k++) {
        for (size_t i = 0; i < count * n; i++)
            out[i] = (int)(i + (size_t)who.rank * 7919 + (size_t)k);
        NCCL(ncclAlltoAll(out, in, count, ncclInt32, comm, NULL));
        for (size_t i = 0; i < count * n; i++)
            CHECK(in[i] == (int)(count * (size_t)who.rank + i % count + i / count * 7919 + (size_t)k),
                  "round %d at %zu", k, i);
    }
    double took = seconds_since(t0);
    CHECK(took < 100, "5 all-to-all of %zu bytes per pair took %g s", count * 4, took);

    barrier(comm);
    double before = cpu_seconds();
    int v = 5;
    if (who.rank == 0) {
        nanosleep(&(struct timespec){1, 500000000}, NULL);
        NCCL(ncclGroupStart());
        for (int r = 1; r < who.world; r++)
            NCCL(ncclSend(&v, 1, ncclInt32, r, comm, NULL));
        NCCL(ncclGroupEnd());
    } else {
        NCCL(ncclRecv(&v, 1, ncclInt32, 0, comm, NULL));
    }
    double used = cpu_seconds() - before;
    CHECK(used < 0.1, "1.5 s of waiting used %g s of processor time", used);
    if (who.rank == 1)
        printf("%d ranks: all-to-all of %zu bytes per pair %.1f ms; 1.5 s of waiting used %.1f ms of processor time\n",
               who.world, count * 4, took / 5 * 1e3, used * 1e3);
    NCCL(ncclCommDestroy(comm));
    return 0;
}
