/*
 * reissue_ends.c: what goes wrong around an engaged communicator: aborts, ranks that die, stop, exit or fork, failures
 * of NCCL, a byte that arrives wrong.
 *
 * usage: reissue_ends CASE SHAPE [RANK]   as reissue_right; RANK: to whom it happens
 */
#include <sys/wait.h>

#include "reissue.h"

static int victim = 1;
static const struct exchange large = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclFloat, .most = 300};

static struct side *engaged_world(void)
{
    struct side *s = new_side(world_comm(), 1);
    engage(s, true, 6);
    for (int i = 0; i < 12; i++) /* until the nodes' own communicators are in use */
        exchange(s, &usual);
    s->engaged_at = s->number;
    s->engaged_by = s->reissued;
    return s;
}

static void result(struct side *s)
{
    if (s->rank == 0)
        print_result(s);
}

static void result_of(struct side *s)
{
    compare_ways(s);
    result(s);
}

/* ---- a thread that may wait for ever ---- */

static struct waiting {
    struct side *side;
    struct exchange x;
    struct buffers b;
    pthread_t thread;
    _Atomic bool over;
    ncclResult_t result;
    uint64_t ended;
} waiting;

static void *wait_in_exchange(void *arg)
{
    struct waiting *w = arg;
    w->result = try_exchange(w->side, &w->x, &w->b);
    w->ended = ry_now_ns();
    atomic_store(&w->over, true);
    return NULL;
}

static void start_waiting(struct side *s, const struct exchange *x)
{
    waiting.side = s;
    waiting.x = *x;
    CHECK(!pthread_create(&waiting.thread, NULL, wait_in_exchange, &waiting), "no thread");
}

static void wait_is_over(uint64_t since, double seconds, const char *what)
{
    while (!atomic_load(&waiting.over) && seconds_since(since) < 40)
        usleep(1000);
    CHECK(atomic_load(&waiting.over), "the thread still waits 40 s after %s", what);
    pthread_join(waiting.thread, NULL);
    double took =
        waiting.ended > since ? (double)(waiting.ended - since) * 1e-9 : 0; /* NCCL may have ended it before */
    CHECK(took < seconds, "the wait ended %.3f s after %s", took, what);
    free_buffers(&waiting.b);
}

/* Everybody but the victim stays away; its thread waits for their manifests, and the communicator is aborted. */
static void aborted(void)
{
    struct side *s = engaged_world();
    barrier(s->comm);
    if (s->rank != victim) {
        AT("waiting for the victim's abort");
        sleep(3); /* longer than the victim's wait may take to end: not by what they do */
    } else {
        start_waiting(s, &large);
        AT("letting the thread wait");
        usleep(300000);
        CHECK(!atomic_load(&waiting.over), "nothing waits");
        AT("aborting");
        uint64_t t = ry_now_ns();
        EXPECT(ncclSuccess, ncclCommAbort(s->comm));
        wait_is_over(t, 2, "ncclCommAbort");
        CHECK(waiting.result != ncclSuccess, "an exchange that nobody else made succeeded");
        return;
    }
    AT("aborting after the victim");
    EXPECT(ncclSuccess, ncclCommAbort(s->comm));
}

/* The others wait in an exchange that the victim never comes to: it aborts. Their waits for the verdict end at once,
   and what they wait for in NCCL is theirs to abort. */
static void left_alone(void)
{
    struct side *s = engaged_world();
    barrier(s->comm);
    if (s->rank == victim) {
        AT("letting the others wait");
        usleep(400000);
        EXPECT(ncclSuccess, ncclCommAbort(s->comm));
        sleep(5);
        return;
    }
    start_waiting(s, &large);
    AT("waiting for a sign that NCCL has got the calls");
    sleep(1);
    uint64_t t = ry_now_ns();
    EXPECT(ncclSuccess, ncclCommAbort(s->comm));
    wait_is_over(t, 3, "ncclCommAbort");
    CHECK(waiting.result != ncclSuccess, "an exchange that a rank did not make succeeded");
}

/* A rank dies in the middle: nobody hangs, NCCL's own error comes back. */
static void killed(void)
{
    if (who.rank == victim) {
        watch_over(SIGKILL);
        alarm(100 * SLOW);
    }
    struct side *s = engaged_world();
    struct buffers b;
    for (int i = 0; i < 20; i++)
        exchange(s, &large);
    barrier(s->comm); /* all have got what the victim sent them */
    if (s->rank == victim) {
        usleep(200000); /* the barrier ends for all */
        raise(SIGKILL);
    }
    uint64_t t = ry_now_ns();
    ncclResult_t r = try_exchange(s, &large, &b);
    CHECK(r != ncclSuccess, "an exchange with the dead succeeded");
    printf("rank %d: %s after %.2f s\n", s->rank, ncclGetErrorString(r), seconds_since(t));
    CHECK(seconds_since(t) < 25, "that took %.2f s", seconds_since(t));
    free_buffers(&b);
    fflush(stdout);
    NCCL(ncclCommAbort(s->comm));
}

static void *kill_soon(void *arg)
{
    usleep((unsigned)(intptr_t)arg);
    kill(getpid(), SIGKILL);
    return NULL;
}

/* As frameworks have one: a rank that waits inside its node for one that has heard of a death waits for ever. (Where NCCL is not
   emulated its calls have returned by then, and the job waits for its stream.) */
static _Atomic bool seen_to;
static void *watchdog(void *arg)
{
    struct side *s = arg;
    ncclResult_t state = ncclSuccess;
    for (int bad = 0; bad < 100 && !atomic_load(&seen_to); bad += state != ncclSuccess) {
        usleep(2000);
        NCCL(ncclCommGetAsyncError(s->comm, &state));
    }
    if (!atomic_load(&seen_to))
        NCCL(ncclCommRevoke(s->comm, 0));
    return NULL;
}

/* At any moment. Who is left makes a communicator of its own, which engages. */
static void killed_any(void)
{
    if (who.rank == victim) {
        watch_over(SIGKILL);
        alarm(100 * SLOW);
    }
    struct side *s = engaged_world();
    struct buffers b;
    pthread_t killer, dog;
    uint64_t moment = (uint64_t)ry_now_ns();
    barrier(s->comm);
    if (s->rank == victim)
        CHECK(!pthread_create(&killer, NULL, kill_soon, (void *)(intptr_t)(1000 + moment / 1000 % 20000)), "no thread");
    CHECK(!pthread_create(&dog, NULL, watchdog, s), "no thread");
    ncclResult_t r;
    do {
        r = try_exchange(s, &large, &b);
        if (r == ncclSuccess)
            check_buffers(s, &large, &b);
        free_buffers(&b);
    } while (r == ncclSuccess && s->number < MOST_EXCHANGES - 10);
    atomic_store(&seen_to, true);
    pthread_join(dog, NULL);
    CHECK(r != ncclSuccess, "the victim lives");
    ncclComm_t rest;
    AT("shrinking");
    NCCL(ncclCommShrink(s->comm, &victim, 1, &rest, NULL, NCCL_SHRINK_ABORT));
    struct side *left = new_side(rest, 2);
    engage(left, victim != 0, 3); /* rank 0 is where the ranks of children meet */
    for (int i = 0; i < 30; i++)
        exchange(left, &large);
    result_of(left);
    end_side(left);
    NCCL(ncclCommAbort(s->comm));
}

/* A helper that does not belong to NCCL's process stops the victim for 2.5 s. */
static int stopper(void)
{
    int p[2];
    CHECK(!pipe(p), "no pipe");
    pid_t parent = getpid(), child = fork();
    CHECK(child >= 0, "cannot fork");
    if (child) {
        close(p[0]);
        return p[1];
    }
    close(p[1]);
    char c;
    while (read(p[0], &c, 1) == 1) {
        kill(parent, SIGSTOP);
        usleep(2500000);
        kill(parent, SIGCONT);
    }
    _exit(0);
}

/* Stopped for longer than the patience while the others wait for it: everything right, engaged again later. */
static void stopped(void)
{
    int pipe_end = stopper();
    struct side *s = engaged_world();
    for (int i = 0; i < 20; i++)
        exchange(s, &large);
    uint64_t before = s->number, direct = 0, t = ry_now_ns();
    if (s->rank == victim) {
        CHECK(write(pipe_end, "s", 1) == 1, "no stopper");
        while (seconds_since(t) < 2)
            usleep(1000); /* stopped in here */
    }
    exchange(s, &large);
    double waited = seconds_since(t);
    CHECK(waited > 1.9 && waited < 40, "%.2f s", waited);
    for (int i = 0; i < 20; i++)
        exchange(s, &large);
    compare_ways(s);
    for (uint64_t i = before; i < s->number; i++)
        direct += s->way[i] == 'p';
    if (s->rank == 0)
        printf("%llu direct after rank %d was stopped, the first in %.2f s\n", (unsigned long long)direct, victim,
               waited);
    engage(s, true, 4);
    result_of(s);
    end_side(s);
    close(pipe_end);
}

/* One byte of what the engine received is wrong, in an exchange that is verified. */
static void corrupted(void)
{
    struct side *s = engaged_world();
    struct buffers b;
    make_buffers(s, &large, &b);
    int peer = (victim + 1) % s->n;
    size_t offset = 77;
    if (s->rank == victim) {
        meddle_flip = b.recv + b.recv_at[peer] + offset;
        printf("exchange %llu, rank %d, byte %zu\n", (unsigned long long)b.number, peer, offset);
        fflush(stdout);
    }
    watch_way(s);
    NCCL(ncclGroupStart());
    NCCL(issue(s, &large, &b));
    NCCL(ncclGroupEnd());
    note_way(s, &b, ncclSuccess);
    CHECK(s->way[b.number] == 'e', "not reissued");
    CHECK(!meddle_flip, "the engine received no such byte");
    if (s->rank == victim)
        b.recv[b.recv_at[peer] + offset] ^= 1;
    check_buffers(s, &large, &b);
    free_buffers(&b);
    uint64_t engaged = s->reissued;
    for (int i = 0; i < 100; i++)
        exchange(s, &large);
    compare_ways(s);
    CHECK(s->reissued == engaged, "%llu exchanges were reissued after a mismatch",
          (unsigned long long)(s->reissued - engaged));
    result(s);
    end_side(s);
}

/* NCCL refuses one of the engine's calls on one rank: the job hears of it, and can abort. */
static void refused(void)
{
    for (int how = MEDDLE_START; how <= MEDDLE_END; how++) {
        struct side *s = new_side(world_comm(), (uint64_t)how);
        engage(s, true, 4);
        barrier(s->comm);
        waiting.over = false;
        if (s->rank == victim)
            meddle_fail = how;
        start_waiting(s, &large);
        AT("failure %d", how);
        if (s->rank == victim) {
            wait_is_over(ry_now_ns(), 20, "NCCL's refusal");
            CHECK(waiting.result == ncclSystemError, "failure %d came back as %d", how, (int)waiting.result);
            CHECK(!meddle_fail, "the engine made no such call");
            EXPECT(ncclSuccess, ncclCommAbort(s->comm));
        } else {
            usleep(500000);
            uint64_t t = ry_now_ns();
            EXPECT(ncclSuccess, ncclCommAbort(s->comm));
            wait_is_over(t, 20, "ncclCommAbort");
        }
        free(s);
        if (who.rank == 0)
            printf("failure %d: ok\n", how);
    }
}

/* The process ends while it is engaged, and, on the victim, while a thread waits. */
static void exiting(void)
{
    struct side *s = engaged_world();
    struct exchange x = large;
    for (int i = 0; i < 10; i++)
        exchange(s, &x);
    AT("exit");
    if (s->rank == victim) {
        start_waiting(s, &large);
        pthread_detach(waiting.thread);
        usleep(100000);
    }
    exit(0);
}

/* Children of an engaged process: of each kind that frameworks make. */
static void forking(void)
{
    struct side *s = engaged_world();
    for (int i = 0; i < 3; i++) {
        pid_t child = fork();
        CHECK(child >= 0, "cannot fork");
        if (!child && i == 0)
            _exit(0);
        if (!child && i == 1)
            exit(0); /* with its handlers */
        if (!child) {
            ncclUniqueId id; /* whatever NCCL makes of it in a child */
            ncclGetUniqueId(&id);
            ncclCommDestroy(s->comm);
            execl("/bin/sh", "sh", "-c", "exit 0", (char *)NULL);
        }
        for (int k = 0; k < 20; k++)
            exchange(s, &large);
        int status = -1;
        AT("waiting for child %d", i);
        CHECK(waitpid(child, &status, 0) == child && status == 0, "child %d ended with %x", i, status);
        CHECK(!system("true"), "system()");
    }
    CHECK(s->reissued >= 50, "only %llu were reissued", (unsigned long long)s->reissued);
    result_of(s);
    end_side(s);
}

/* Too little staging memory for the large ones. */
static void staging(void)
{
    struct side *s = engaged_world();
    struct exchange huge = {.matrix = M_EQUAL, .form = F_GROUP, .type = ncclFloat, .most = 140000};
    for (int i = 0; i < 60; i++)
        CHECK(exchange(s, i % 10 == 9 ? &huge : &large) == (i % 10 != 9), "exchange %d of the 60 on the wrong way", i);
    result_of(s);
    end_side(s);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"aborted", aborted}, {"left_alone", left_alone}, {"killed", killed},   {"killed_any", killed_any},
                 {"stopped", stopped}, {"corrupted", corrupted},   {"refused", refused}, {"exiting", exiting},
                 {"forking", forking}, {"staging", staging}};
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
