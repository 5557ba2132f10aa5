/*
 * emu_threads.c: several threads of each rank use the emulated NCCL at once, each with a communicator of its own, and
 * make and end communicators meanwhile.
 */
#include <pthread.h>

#include "emu_common.h"

enum { THREADS = 4, ROUNDS = 40 };

struct job {
    int number;
    ncclUniqueId id;
};

static void *work(void *arg)
{
    struct job *j = arg;
    ncclComm_t comm, child;
    int n = who.world, me = (who.rank + j->number) % n, *out = calloc((size_t)n, sizeof *out),
        *in = calloc((size_t)n, sizeof *in);
    NCCL(ncclCommInitRank(&comm, n, j->id, me));
    for (int i = 0; i < ROUNDS; i++) {
        for (int r = 0; r < n; r++)
            out[r] = me * 1000000 + r * 10000 + i * 10 + j->number;
        if (i % 2) {
            NCCL(ncclAlltoAll(out, in, 1, ncclInt32, comm, NULL));
        } else {
            NCCL(ncclGroupStart());
            for (int r = 0; r < n; r++) {
                NCCL(ncclSend(&out[r], 1, ncclInt32, r, comm, NULL));
                NCCL(ncclRecv(&in[r], 1, ncclInt32, r, comm, NULL));
            }
            NCCL(ncclGroupEnd());
        }
        for (int r = 0; r < n; r++)
            CHECK(in[r] == r * 1000000 + me * 10000 + i * 10 + j->number, "round %d, thread %d: %d from %d", i,
                  j->number, in[r], r);
        if (i % 10 == j->number) {
            int64_t sum = 1;
            NCCL(ncclCommSplit(comm, me % 2, me, &child, NULL));
            NCCL(ncclAllReduce(&sum, &sum, 1, ncclInt64, ncclSum, child, NULL));
            CHECK(sum == (n + 1 - me % 2) / 2, "%lld", (long long)sum);
            NCCL(ncclCommDestroy(child));
        }
        EXPECT(ncclInvalidArgument, ncclSend(out, 1, ncclInt32, n + j->number, comm, NULL));
        char peer[16];
        snprintf(peer, sizeof peer, "peer %d ", n + j->number);
        CHECK(strstr(ncclGetLastError(NULL), peer), "another thread's error: %s", ncclGetLastError(NULL));
    }
    NCCL(ncclCommDestroy(comm));
    free(out);
    free(in);
    return NULL;
}

int main(void)
{
    pthread_t t[THREADS];
    struct job jobs[THREADS];
    start_rank();
    for (int i = 0; i < THREADS; i++)
        jobs[i] = (struct job){i, shared_id()};
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&t[i], NULL, work, &jobs[i]));
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_join(t[i], NULL));
    return 0;
}
