/*
 * reissue_later.c: exchanges whose calls return before they are carried out (RAILYARD_HOLD=no).
 *
 * usage: reissue_later CASE SHAPE [RANK]   as reissue_right; RANK: to whom it happens
 */
#define cudaFree header_cudaFree /* nccl.h may bring the real ones along, of another type */
#define cudaFreeHost header_cudaFreeHost
#define cudaHostUnregister header_cudaHostUnregister
#include "reissue.h"
#undef cudaFree
#undef cudaFreeHost
#undef cudaHostUnregister

#include "fake_cudart.h"

static int victim = 1;
static const struct exchange large = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclFloat, .most = 300};

/* Until exchanges are given away: the calls then return while another rank stays away. */
static struct side *ready(ncclComm_t comm, uint64_t tag)
{
    const char *strategy = getenv("RAILYARD_STRATEGY");
    bool direct = strategy && !strcmp(strategy, "direct"); /* then nobody can tell whether it is engaged */
    struct side *s = new_side(comm, tag);
    engage(s, !direct, direct ? 0.3 : 6);
    for (int i = 0; i < 16; i++) /* the nodes' communicators are made and used, the stream is tried */
        exchange(s, &usual);
    s->engaged_at = s->number;
    s->engaged_by = s->reissued;
    return s;
}

/* Its calls, without waiting for what comes of it; seconds that took. */
static double give_away(struct side *s, const struct exchange *x, struct buffers *b)
{
    make_buffers(s, x, b);
    AT("giving away exchange %llu of communicator %llu", (unsigned long long)b->number, (unsigned long long)s->tag);
    watch_way(s);
    uint64_t t = ry_now_ns();
    NCCL(ncclGroupStart());
    NCCL(issue(s, x, b));
    NCCL(ncclGroupEnd());
    return seconds_since(t);
}

static void take_back(struct side *s, const struct exchange *x, struct buffers *b)
{
    AT("waiting for exchange %llu of communicator %llu", (unsigned long long)b->number, (unsigned long long)s->tag);
    railyard_emu_synchronize(s->stream);
    check_buffers(s, x, b);
    free_buffers(b);
}

static void result(struct side *s)
{
    if (s->rank == 0)
        print_result(s);
    end_side(s);
}

/* So late are some ranks; a call that does not wait for them takes less than SOON on a busy machine, too. */
#define LATE_US 1000000
#define SOON 0.5

/* The thread goes on at once, and the stream does not. */
static void at_once(void)
{
    struct side *s = ready(world_comm(), 1);
    for (int late = 0; late < s->n; late++) {
        struct buffers b;
        barrier(s->comm);
        if (s->rank == late)
            usleep(LATE_US);
        uint64_t t = ry_now_ns();
        double call = give_away(s, &large, &b);
        CHECK(s->rank == late || call < SOON, "the call took %.3f s although rank %d is late", call, late);
#ifndef __SANITIZE_THREAD__ /* looks where a job must not */
        CHECK(s->rank == late || b.recv[0] == GUARD, "it cannot be there yet");
#endif
        take_back(s, &large, &b);
        CHECK(s->rank == late || seconds_since(t) > 0.2, "the stream did not wait for rank %d", late);
    }
    result(s);
}

/*
 * Up to six on their way, on two communicators and three streams, in an order that only the calls give. An all-reduce
 * now and then, which finds all before it enqueued.
 */
struct under_way {
    struct side *s;
    struct exchange x;
    struct buffers b;
};

static void ahead(void)
{
    static char streams[3];
    ncclComm_t other;
    struct side *side[2] = {ready(world_comm(), 1), NULL};
    NCCL(ncclCommSplit(side[0]->comm, 0, -who.rank, &other, NULL));
    side[1] = ready(other, 2);
    uint64_t random = 11;
    double calls = 0, all = 0;
    for (int round = 0; round < 60; round++) {
        struct under_way way[6];
        int n = 1 + (int)below(&random, 6);
        uint64_t t = ry_now_ns();
        for (int i = 0; i < n; i++) {
            struct under_way *w = &way[i];
            w->s = side[below(&random, 2)];
            w->s->stream = (cudaStream_t)&streams[below(&random, 3)];
            w->x = random_exchange(w->s);
            unsigned late = below(&random, 40), by = 1000 + below(&random, 3000); /* the same numbers on all ranks */
            if (late == (unsigned)who.rank)
                usleep(by);
            calls += give_away(w->s, &w->x, &w->b);
            if (below(&random, 9) == 0) {
                int one = 1;
                NCCL(ncclAllReduce(&one, &one, 1, ncclInt, ncclSum, w->s->comm, w->s->stream));
                CHECK(one == w->s->n, "the all-reduce gave %d", one);
            }
        }
        for (int i = 0; i < 3; i++)
            railyard_emu_synchronize(&streams[i]);
        all += seconds_since(t);
        for (int i = 0; i < n; i++)
            take_back(way[i].s, &way[i].x, &way[i].b);
    }
    if (who.rank == 0)
        printf("calls took %.1f of %.1f ms\n", calls * 1e3, all * 1e3);
    for (int i = 1; i >= 0; i--)
        result(side[i]);
}

/* What arrives by one is sent on by the next, which is called before it has arrived: from rank to rank around the ring.
 */
static void chained(void)
{
    enum { N = 1000 };
    struct side *s = ready(world_comm(), 1);
    int *a = malloc(sizeof(int) * N * (size_t)s->n), *b = malloc(sizeof(int) * N * (size_t)s->n);
    CHECK(a && b, "no memory");
    for (int round = 0; round < 20; round++) {
        for (int p = 0; p < s->n; p++)
            for (int i = 0; i < N; i++)
                a[p * N + i] = round * 1000000 + s->rank * 10000 + p * 1000 + i;
        barrier(s->comm);
        for (int hop = 0; hop < 4; hop++) { /* transposing it an even number of times changes nothing */
            if (s->rank == (round + hop) % s->n)
                usleep(2000);
            NCCL(ncclGroupStart());
            for (int p = 0; p < s->n; p++) {
                NCCL(ncclSend((hop & 1 ? b : a) + p * N, N, ncclInt, p, s->comm, s->stream));
                NCCL(ncclRecv((hop & 1 ? a : b) + p * N, N, ncclInt, p, s->comm, s->stream));
            }
            NCCL(ncclGroupEnd());
        }
        AT("waiting for round %d", round);
        railyard_emu_synchronize(s->stream);
        for (int p = 0; p < s->n; p++)
            for (int i = 0; i < N; i++)
                CHECK(a[p * N + i] == round * 1000000 + s->rank * 10000 + p * 1000 + i,
                      "round %d: element %d for %d is %d", round, i, p, a[p * N + i]);
    }
    free(a);
    free(b);
    result(s);
}

/* The victim gave an exchange away that nobody else makes, and aborts. */
static void aborted(void)
{
    struct side *s = ready(world_comm(), 1);
    struct buffers b[2];
    barrier(s->comm);
    if (s->rank != victim) {
        AT("waiting for the victim's abort");
        sleep(3);
    } else {
        for (int i = 0; i < 2; i++)
            CHECK(give_away(s, &large, &b[i]) < SOON, "the call did not return at once");
        usleep(200000);
        uint64_t t = ry_now_ns();
        AT("aborting");
        EXPECT(ncclSuccess, ncclCommAbort(s->comm));
        AT("waiting for the stream of an aborted communicator");
        railyard_emu_synchronize(s->stream);
        CHECK(seconds_since(t) < 2, "that took %.2f s", seconds_since(t));
        for (int i = 0; i < 2; i++) {
            CHECK(b[i].recv[b[i].recv_at[(s->rank + 1) % s->n]] == GUARD, "something arrived that nobody sent");
            free_buffers(&b[i]);
        }
        /* and the thread gives others away as before */
        return;
    }
    EXPECT(ncclSuccess, ncclCommAbort(s->comm));
}

/* Aborted with something pending; another communicator of the same thread goes on as before. */
static void aborted_one(void)
{
    ncclComm_t other;
    struct side *s = ready(world_comm(), 1), *t;
    struct buffers b;
    NCCL(ncclCommSplit(s->comm, 0, who.rank, &other, NULL));
    t = ready(other, 2);
    barrier(s->comm);
    if (s->rank == victim)
        give_away(s, &large, &b);
    else
        usleep(200000);
    EXPECT(ncclSuccess, ncclCommAbort(s->comm));
    railyard_emu_synchronize(s->stream);
    for (int i = 0; i < 20; i++)
        exchange(t, &large);
    if (s->rank == victim)
        free_buffers(&b);
    result(t);
}

/* A rank dies. The job notices and aborts, or does not. */
static void killed(bool notices)
{
    bool is = who.rank == victim;
    if (is || !notices) {
        watch_over(is ? SIGKILL : SIGABRT);
        alarm(100 * SLOW);
    }
    struct side *s = ready(world_comm(), 1);
    struct buffers b;
    barrier(s->comm);
    if (is) {
        usleep(200000); /* the barrier ends for all */
        raise(SIGKILL);
    }
    CHECK(give_away(s, &large, &b) < SOON, "the call did not return at once");
    ncclResult_t state = ncclSuccess;
    AT("waiting for NCCL to notice");
    for (int i = 0; i < 10000 && state == ncclSuccess; i++) {
        usleep(2000);
        NCCL(ncclCommGetAsyncError(s->comm, &state));
    }
    CHECK(state != ncclSuccess, "nobody noticed");
    if (!notices) {
        AT("waiting for bytes of the dead");
        railyard_emu_synchronize(s->stream);
        CHECK(0, "the stream was let go without them");
    }
    NCCL(ncclCommAbort(s->comm));
    railyard_emu_synchronize(s->stream);
    free_buffers(&b);
}

static void killed_noticed(void)
{
    killed(true);
}
static void killed_unnoticed(void)
{
    killed(false);
}

/* The thread of Railyard's does not get on. */
static void stuck(void)
{
    watch_over(SIGABRT);
    alarm(100 * SLOW);
    struct side *s = ready(world_comm(), 1);
    struct buffers b;
    barrier(s->comm);
    atomic_store(&meddle_block, 1);
    CHECK(give_away(s, &large, &b) < SOON, "the call did not return at once");
    AT("waiting for what cannot be enqueued");
    railyard_emu_synchronize(s->stream);
    CHECK(0, "the stream was let go");
}

/* ---- what frees memory ---- */

static struct buffers *awaited;
static int entered;
static _Atomic bool inside, beside_over;
static struct side *beside_side;

static void there(const char *name)
{
    entered++;
    if (awaited)
        CHECK(awaited->recv[0] != GUARD, "%s got through while an exchange was pending", name);
    atomic_store(&inside, true);
    for (int i = 0; beside_side && !atomic_load(&beside_over) && i < 20000; i++)
        usleep(1000);
    atomic_store(&inside, false);
}

/* While memory is being freed nothing waits on the device: the call does. */
static void *beside(void *arg)
{
    struct buffers b;
    AT("waiting for the other thread to free something");
    while (!atomic_load(&inside))
        usleep(100);
    if (beside_side->rank != victim)
        usleep(LATE_US);
    double took = give_away(beside_side, &large, &b);
    if (beside_side->rank == victim)
        CHECK(took > 0.05, "given away while memory is freed: the call took %.3f s", took);
    check_buffers(beside_side, &large, &b); /* at once */
    free_buffers(&b);
    atomic_store(&beside_over, true);
    return arg;
}

static void frees(void)
{
    static int (*const calls[])(void *) = {cudaFree, cudaFreeHost, cudaHostUnregister, cuMemFreeHost};
    struct side *s = ready(world_comm(), 1);
    ncclComm_t other;
    fake_cudart_entered = there;
    for (int i = 0; i < 4; i++) {
        struct buffers b;
        barrier(s->comm);
        if (s->rank != victim)
            usleep(LATE_US);
        CHECK(give_away(s, &large, &b) < SOON, "the call did not return at once");
        awaited = &b;
        uint64_t t = ry_now_ns();
        AT("freeing %d", i);
        CHECK(calls[i](NULL) == 17, "call %d does not return what the real one does", i);
        CHECK(s->rank != victim || seconds_since(t) > 0.15, "call %d took %.3f s", i, seconds_since(t));
        awaited = NULL;
        take_back(s, &large, &b);
    }
    CHECK(entered == 4, "%d calls got through", entered);
    NCCL(ncclCommSplit(s->comm, 0, who.rank, &other, NULL));
    beside_side = ready(other, 2);
    pthread_t thread;
    barrier(s->comm);
    CHECK(!pthread_create(&thread, NULL, beside, NULL), "no thread");
    CHECK(cudaFree(NULL) == 17, "something else came back");
    pthread_join(thread, NULL);
    CHECK(atomic_load(&beside_over), "the other thread did not get on");
    for (int i = 0; i < 10; i++)
        exchange(beside_side, &large);
    result(beside_side);
    result(s);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"at_once", at_once},
                 {"ahead", ahead},
                 {"chained", chained},
                 {"aborted", aborted},
                 {"aborted_one", aborted_one},
                 {"killed", killed_noticed},
                 {"killed_unnoticed", killed_unnoticed},
                 {"stuck", stuck},
                 {"frees", frees}};
    start_reissue(15);
    CHECK(argc >= 3, "which case, which shape?");
    take_shape(argv[2]);
    if (argc > 3)
        victim = atoi(argv[3]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!strcmp(argv[1], cases[i].name))
            return cases[i].run(), 0;
    CHECK(0, "no case %s", argv[1]);
}
