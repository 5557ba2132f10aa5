/*
 * test_control.c: ranks that are processes of their own, talking to a yardmaster in another; some are killed or
 * stopped. Run over the transports that UCX picks and once more over TCP alone (UCX_TLS). Check runs every test in a
 * process of its own, so that UCX is started after the ranks were forked.
 */
#include <arpa/inet.h>
#include <check.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "control/control.h"

#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

#define MAX_RANKS 8
#define KEY 0x1234567812345678u
#define SECOND 1000000000ull

/* What the processes of a test share. */
static struct shared {
    _Atomic size_t address_size; /* the yardmaster's, once known */
    char address[8192];
    _Atomic int step[MAX_RANKS];
    _Atomic uint64_t when, other;
    _Atomic int failed;
} * shared;

static struct ry_control *control;
static struct ry_err err;
static pid_t kids[MAX_RANKS];

#define must(condition, ...)                                                                                           \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "pid %d, line %d: ", (int)getpid(), __LINE__);                                             \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fprintf(stderr, "\n");                                                                                     \
            atomic_store(&shared->failed, __LINE__);                                                                   \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

/* Waits until `condition`, looking 2000 times a second. */
#define wait_until(condition, seconds)                                                                                 \
    do {                                                                                                               \
        uint64_t limit_ = ry_now_ns() + (uint64_t)((seconds)*1e9);                                                     \
        while (!(condition)) {                                                                                         \
            must(ry_now_ns() < limit_, "in vain: %s", #condition);                                                     \
            usleep(500);                                                                                               \
        }                                                                                                              \
    } while (0)

/* What one line heard. */
struct ear {
    struct ry_line *_Atomic line;
    int rank;
    _Atomic int inside; /* callbacks at this moment */
    _Atomic uint64_t heard[MAX_RANKS], bytes, timers, timer_at;
    _Atomic int lost[MAX_RANKS], losses;
    _Atomic uint64_t lost_at;
    _Atomic int closed;
    char why[200];
    bool echo;
    void (*on_message)(struct ear *e, int from, const void *bytes, size_t size);
};

static void enter(struct ear *e)
{
    must(atomic_fetch_add(&e->inside, 1) == 0, "two callbacks at once");
    must(!atomic_load(&e->closed), "a callback after the line was closed");
    while (!atomic_load(&e->line)) /* ry_line_open() has not returned yet */
        sched_yield();
}

/* Messages begin with their number, from 0 on. */
static void message(void *context, int from, const void *bytes, size_t size)
{
    struct ear *e = context;
    uint64_t n;
    enter(e);
    if (e->on_message) {
        e->on_message(e, from, bytes, size);
    } else {
        must(size >= sizeof n, "%zu bytes", size);
        memcpy(&n, bytes, sizeof n);
        must(n == atomic_load(&e->heard[from]), "message %llu of rank %d came as number %llu", (unsigned long long)n,
             from, (unsigned long long)e->heard[from]);
    }
    if (e->echo)
        ry_line_send(e->line, from, bytes, size);
    atomic_fetch_add(&e->bytes, size);
    atomic_fetch_add(&e->heard[from], 1);
    atomic_fetch_sub(&e->inside, 1);
}

static void lost(void *context, int peer, const char *why)
{
    struct ear *e = context;
    enter(e);
    must(atomic_fetch_add(&e->lost[peer], 1) == 0, "rank %d lost twice", peer);
    snprintf(e->why, sizeof e->why, "%s", why);
    atomic_store(&e->lost_at, ry_now_ns());
    atomic_fetch_add(&e->losses, 1);
    atomic_fetch_sub(&e->inside, 1);
}

static void timer(void *context, uint64_t now)
{
    struct ear *e = context;
    enter(e);
    atomic_store(&e->timer_at, now);
    atomic_fetch_add(&e->timers, 1);
    atomic_fetch_sub(&e->inside, 1);
}

static void start(void)
{
    must((control = ry_control_start(&err)), "%s", err.msg);
}

static void join(struct ear *e, uint64_t key, int nranks, int rank)
{
    struct ry_line_handlers on = {e, message, lost, timer};
    e->rank = rank;
    e->line = ry_line_open(control, key, nranks, rank, rank ? shared->address : NULL,
                           atomic_load(&shared->address_size), &on, &err);
    must(e->line, "%s", err.msg);
}

static void leave(struct ear *e)
{
    ry_line_close(e->line);
    atomic_store(&e->closed, 1);
}

static void publish(void)
{
    size_t size;
    const void *address = ry_control_address(control, &size);
    must(size <= sizeof shared->address, "an address of %zu bytes", size);
    memcpy(shared->address, address, size);
    atomic_store(&shared->address_size, size);
}

static void await_address(void)
{
    wait_until(atomic_load(&shared->address_size), 20);
}

static void fork_rank(int rank, void (*run)(int rank))
{
    fflush(NULL);
    kids[rank] = fork();
    if (kids[rank])
        return;
    run(rank);
    _exit(0);
}

static void reap(int rank)
{
    int status;
    ck_assert_int_eq(waitpid(kids[rank], &status, 0), kids[rank]);
    ck_assert_msg(WIFEXITED(status) && !WEXITSTATUS(status), "rank %d ended with status %x", rank, status);
}

static void setup(void)
{
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(shared != MAP_FAILED);
}

static void teardown(void)
{
    ck_assert_int_eq(atomic_load(&shared->failed), 0);
}

static uint64_t sum(const _Atomic uint64_t *v, int n)
{
    uint64_t s = 0;
    for (int i = 0; i < n; i++)
        s += atomic_load(&v[i]);
    return s;
}

/* ---- order, number, size ---- */

#define MANY (SANITIZED ? 1500u : 7200u)

static void sends_many(int rank)
{
    struct ear e = {0};
    start();
    await_address();
    join(&e, KEY, MAX_RANKS, rank);
    char text[300];
    for (uint64_t n = 0; n < MANY; n++) {
        memset(text, (int)n, sizeof text);
        memcpy(text, &n, sizeof n);
        ry_line_send(e.line, 0, text, sizeof n + n % (sizeof text - sizeof n));
        if (n % 64 == 63) /* an echo each: some order of the two directions */
            wait_until(atomic_load(&e.heard[0]) + 2000 > n, 20);
    }
    wait_until(atomic_load(&e.heard[0]) == MANY, 30);
    leave(&e);
    ry_control_stop(control);
}

START_TEST(star_of_eight)
{
    for (int r = 1; r < MAX_RANKS; r++)
        fork_rank(r, sends_many);
    struct ear e = {.echo = true};
    start();
    join(&e, KEY, MAX_RANKS, 0);
    publish();
    uint64_t t = ry_now_ns();
    wait_until(sum(e.heard, MAX_RANKS) == (MAX_RANKS - 1) * (uint64_t)MANY, 60);
    printf("%u messages and as many echoes in %.2f s\n", (MAX_RANKS - 1) * MANY, (double)(ry_now_ns() - t) * 1e-9);
    for (int r = 1; r < MAX_RANKS; r++)
        reap(r);
    wait_until(atomic_load(&e.losses) == MAX_RANKS - 1, 5);
    ck_assert_ptr_nonnull(strstr(e.why, "left"));
    leave(&e);
    ry_control_stop(control);
}
END_TEST

#define LARGE (1u << 20)

static void check_large(struct ear *e, int from, const void *bytes, size_t size)
{
    uint64_t n = atomic_load(&e->heard[from]);
    const uint64_t *word = bytes;
    must(size == LARGE - n * 8, "%zu bytes came", size);
    for (size_t i = 0; i < size / 8; i += 97)
        must(word[i] == n * 1000003 + i, "wrong bytes in message %llu", (unsigned long long)n);
}

static void sends_large(int rank)
{
    struct ear e = {.on_message = check_large};
    uint64_t *word = malloc(LARGE);
    start();
    await_address();
    join(&e, KEY, 3, rank);
    for (uint64_t n = 0; n < 30; n++) {
        for (size_t i = 0; i < LARGE / 8; i++)
            word[i] = n * 1000003 + i;
        ry_line_send(e.line, 0, word, LARGE - n * 8);
        memset(word, 0xee, LARGE); /* it was copied */
    }
    free(word);
    wait_until(atomic_load(&e.heard[0]) == 30, 30);
    leave(&e);
    ry_control_stop(control);
}

START_TEST(large_messages)
{
    fork_rank(1, sends_large);
    fork_rank(2, sends_large);
    struct ear e = {.echo = true, .on_message = check_large};
    start();
    join(&e, KEY, 3, 0);
    publish();
    reap(1), reap(2);
    ck_assert_uint_eq(sum(e.heard, 3), 60);
    leave(&e);
    ry_control_stop(control);
}
END_TEST

/* ---- early, late, own ---- */

static void speaks_early(int rank)
{
    struct ear e = {0};
    start();
    await_address();
    join(&e, KEY, 3, rank);
    for (uint64_t n = 0; n < 500; n++)
        ry_line_send(e.line, 0, &n, sizeof n);
    wait_until(atomic_load(&e.heard[0]) == 500, 20);
    leave(&e);
    ry_control_stop(control);
}

START_TEST(early_messages_are_kept)
{
    fork_rank(1, speaks_early);
    fork_rank(2, speaks_early);
    struct ear e = {.echo = true}, other = {0};
    start();
    join(&other, KEY + 1, 3, 0);
    publish();
    usleep(400000);
    ck_assert_uint_eq(sum(other.heard, 3), 0);
    join(&e, KEY, 3, 0);
    reap(1), reap(2);
    ck_assert_uint_eq(sum(e.heard, 3), 1000);
    ck_assert_uint_eq(sum(other.heard, 3), 0);
    leave(&e), leave(&other);
    ry_control_stop(control);
}
END_TEST

static void sends_to_itself(struct ear *e, int from, const void *bytes, size_t size)
{
    uint64_t n;
    memcpy(&n, bytes, sizeof n);
    must(n == atomic_load(&e->heard[from]), "order");
    if (from == 2)
        ry_line_send(e->line, from, &n, sizeof n);
    else if (++n < 1000)
        ry_line_send(e->line, from, &n, sizeof n); /* must not come from inside this call: enter() would tell */
}

/* The yardmaster's own rank; and all ranks in one process. */
START_TEST(within_one_process)
{
    struct ear e[3] = {{.on_message = sends_to_itself}, {0}, {0}};
    start();
    publish();
    join(&e[2], KEY, 3, 2); /* before the yardmaster */
    uint64_t n = 0;
    ry_line_send(e[2].line, 0, &n, sizeof n);
    join(&e[0], KEY, 3, 0);
    join(&e[1], KEY, 3, 1);
    ry_line_send(e[0].line, 0, &n, sizeof n);
    wait_until(atomic_load(&e[0].heard[0]) == 1000, 10);
    wait_until(atomic_load(&e[0].heard[2]) == 1 && atomic_load(&e[2].heard[0]) == 1, 10);
    leave(&e[1]);
    wait_until(atomic_load(&e[0].lost[1]), 5);
    ry_line_send(e[0].line, 1, &n, sizeof n); /* nothing */
    leave(&e[0]);
    wait_until(atomic_load(&e[2].lost[0]), 5);
    leave(&e[2]);
    ry_control_stop(control);
}
END_TEST

/* ---- death and sleep ---- */

static void waits_to_die(int rank)
{
    struct ear e = {0};
    start();
    await_address();
    join(&e, KEY, MAX_RANKS, rank);
    uint64_t n = 0;
    ry_line_send(e.line, 0, &n, sizeof n);
    wait_until(atomic_load(&e.heard[0]) == 1, 20);
    if (rank == 2 && !fork()) { /* a data loader: has copies of all descriptors, and lives on for a while */
        sleep(3);
        _exit(0);
    }
    atomic_store(&shared->step[rank], 1);
    for (;;)
        pause();
}

START_TEST(killed_ranks_are_lost)
{
    for (int r = 1; r < 4; r++)
        fork_rank(r, waits_to_die);
    struct ear e = {.echo = true};
    start();
    join(&e, KEY, MAX_RANKS, 0);
    publish();
    for (int r = 1; r < 4; r++)
        wait_until(atomic_load(&shared->step[r]), 20);
    uint64_t best = UINT64_MAX;   /* others may have the processors now and then */
    for (int r = 1; r < 4; r++) { /* not waited for: a zombie is dead, too */
        uint64_t t = ry_now_ns();
        kill(kids[r], SIGKILL);
        wait_until(atomic_load(&e.losses) == r, 5); /* the last thing that lost() says */
        uint64_t took = atomic_load(&e.lost_at) - t;
        printf("rank %d: lost %.2f ms after kill -9: %s\n", r, (double)took * 1e-6, e.why);
        best = took < best ? took : best;
        ck_assert_int_eq(atomic_load(&e.losses), r);
        ry_line_send(e.line, r, &t, sizeof t); /* nothing */
    }
    ck_assert_uint_lt(best, SECOND / 10);
    leave(&e);
    ry_control_stop(control);
}
END_TEST

static void mourns(int rank)
{
    struct ear e = {0};
    start();
    await_address();
    join(&e, KEY, MAX_RANKS, rank);
    uint64_t n = 0;
    ry_line_send(e.line, 0, &n, sizeof n);
    wait_until(atomic_load(&e.heard[0]) == 1, 20);
    atomic_store(&shared->step[rank], 1);
    wait_until(atomic_load(&e.losses), 20); /* the last thing that lost() says */
    uint64_t took = atomic_load(&e.lost_at) - atomic_load(&shared->when);
    printf("rank %d: yardmaster lost %.2f ms after kill -9: %s\n", rank, (double)took * 1e-6, e.why);
    must(took < 2 * SECOND, "%llu ns", (unsigned long long)took);
    leave(&e);
    /* Nor can it be joined again, or by another line. */
    struct ear late = {0};
    struct ry_line_handlers on = {&late, message, lost, timer};
    late.line = ry_line_open(control, KEY + 1, 2, 1, shared->address, shared->address_size, &on, &err);
    if (late.line) {
        wait_until(atomic_load(&late.lost[0]), 5);
        leave(&late);
    }
    ry_control_stop(control);
}

static void yardmaster(int rank)
{
    struct ear e = {.echo = true};
    start();
    join(&e, KEY, MAX_RANKS, rank);
    publish();
    for (;;)
        pause();
}

START_TEST(killed_yardmaster_is_lost)
{
    fork_rank(0, yardmaster);
    for (int r = 1; r < 5; r++)
        fork_rank(r, mourns);
    for (int r = 1; r < 5; r++)
        wait_until(atomic_load(&shared->step[r]), 20);
    atomic_store(&shared->when, ry_now_ns());
    kill(kids[0], SIGKILL);
    for (int r = 1; r < 5; r++)
        reap(r);
    waitpid(kids[0], NULL, 0);
}
END_TEST

static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

/* Number 0 goes from here to rank 0, instead of from there: before it has come nothing is sent to a rank that nobody has heard of. */
static void sleeper(int rank)
{
    struct ear e = {.echo = true, .heard = {1}};
    uint64_t zero = 0;
    start();
    await_address();
    join(&e, KEY, 2, rank);
    ry_line_send(e.line, 0, &zero, sizeof zero);
    wait_until(atomic_load(&e.losses), 60);
    leave(&e);
    ry_control_stop(control);
}

/* Two seconds without a sign of life, and more messages for it than any queue of UCX's holds. */
START_TEST(stopped_is_not_lost)
{
    fork_rank(1, sleeper);
    struct ear e = {0};
    start();
    join(&e, KEY, 2, 0);
    publish();
    wait_until(atomic_load(&e.heard[1]), 20);
    kill(kids[1], SIGSTOP);
    uint64_t n, cpu = cpu_ns(), text[64] = {0};
    for (n = 1; n < 20000; n++) {
        text[0] = n;
        ry_line_send(e.line, 1, text, sizeof text);
    }
    uint64_t sent = cpu_ns() - cpu;
    usleep(2000000);
    cpu = cpu_ns() - cpu - sent;
    printf("with a stopped peer: %.1f ms of CPU to send, %.1f ms in 2 s of waiting\n", (double)sent * 1e-6,
           (double)cpu * 1e-6);
    ck_assert_int_eq(atomic_load(&e.losses), 0);
    ck_assert_uint_lt(cpu, SECOND / 5);
    kill(kids[1], SIGCONT);
    wait_until(atomic_load(&e.heard[1]) == n, 20);
    ck_assert_int_eq(atomic_load(&e.losses), 0);
    leave(&e);
    reap(1);
    ry_control_stop(control);
}
END_TEST

/* Closing does not wait for a peer that was stopped, either. */
START_TEST(closing_takes_no_time)
{
    fork_rank(1, sleeper);
    struct ear e = {0};
    start();
    join(&e, KEY, 2, 0);
    publish();
    wait_until(atomic_load(&e.heard[1]), 20);
    kill(kids[1], SIGSTOP);
    uint64_t text[64] = {1};
    for (; text[0] < 20000; text[0]++) /* a few may come before it stops */
        ry_line_send(e.line, 1, text, sizeof text);
    uint64_t t = ry_now_ns();
    leave(&e);
    ck_assert_uint_lt(ry_now_ns() - t, 2 * SECOND);
    ry_control_stop(control);
    ck_assert_uint_lt(ry_now_ns() - t, 3 * SECOND);
    kill(kids[1], SIGKILL);
    waitpid(kids[1], NULL, 0);
}
END_TEST

static _Atomic bool go_on;

static void *keeps_sending(void *arg)
{
    struct ear *e = arg;
    uint64_t n = 0;
    do {
        ry_line_send(e->line, 0, &n, sizeof n);
        n++;
        if (n % 32 == 0)
            ry_control_poll(control);
        if (n % 256 == 0)
            usleep(100);
    } while (atomic_load(&go_on));
    return NULL;
}

static void comes_and_goes(int rank)
{
    start();
    await_address();
    for (int round = 0; round < 20; round++) {
        struct ear *e = calloc(1, sizeof *e);
        pthread_t thread;
        join(e, KEY + (uint64_t)round, 4, rank);
        atomic_store(&go_on, true);
        pthread_create(&thread, NULL, keeps_sending, e);
        usleep((useconds_t)(rank * 3000 + round * 500));
        atomic_store(&go_on, false); /* sending on a line that was closed is not allowed; hearing goes on */
        pthread_join(thread, NULL);
        leave(e);
        usleep(1000);
        free(e); /* a callback now would be seen */
    }
    wait_until(atomic_load(&shared->step[0]), 40); /* a process that ends is lost for another reason */
    ry_control_stop(control);
}

START_TEST(closing_while_messages_fly)
{
    for (int r = 1; r < 4; r++)
        fork_rank(r, comes_and_goes);
    start();
    publish();
    struct ear *e = calloc(20, sizeof *e);
    for (int round = 0; round < 20; round++) {
        e[round].echo = true;
        join(&e[round], KEY + (uint64_t)round, 4, 0);
    }
    for (int round = 0; round < 20; round++) {
        if (round % 3 == 2) { /* leaves first */
            wait_until(atomic_load(&e[round].heard[1]), 20);
            leave(&e[round]);
            continue;
        }
        wait_until(atomic_load(&e[round].losses) == 3, 20);
        ck_assert_msg(strstr(e[round].why, "left"), "%s", e[round].why);
        leave(&e[round]);
    }
    atomic_store(&shared->step[0], 1);
    for (int r = 1; r < 4; r++)
        reap(r);
    ry_control_stop(control);
    free(e);
}
END_TEST

/* ---- time ---- */

START_TEST(idle_costs_nothing)
{
    fork_rank(1, sleeper);
    struct ear e = {0};
    start();
    join(&e, KEY, 2, 0);
    publish();
    wait_until(atomic_load(&e.heard[1]), 20);
    usleep(300000);
    struct rusage before, after;
    uint64_t cpu = cpu_ns();
    getrusage(RUSAGE_SELF, &before);
    sleep(2);
    getrusage(RUSAGE_SELF, &after);
    cpu = cpu_ns() - cpu;
    long switches = after.ru_nvcsw - before.ru_nvcsw;
    printf("idle for 2 s: %.3f ms of CPU, %ld wake-ups\n", (double)cpu * 1e-6, switches);
    ck_assert_uint_lt(cpu, 10000000);
    ck_assert_int_lt(switches, SANITIZED ? 200 : 20); /* ThreadSanitizer has a thread of its own */
    leave(&e);
    reap(1);
    ry_control_stop(control);
}
END_TEST

START_TEST(timers_come_in_time)
{
    struct ear e = {0};
    start();
    join(&e, KEY, 2, 0);
    uint64_t best = UINT64_MAX; /* others may have the processors now and then */
    for (int i = 0; i < 10; i++) {
        uint64_t at = ry_now_ns() + 20000000;
        ry_line_wake_at(e.line, at);
        wait_until(atomic_load(&e.timers) == (uint64_t)i + 1, 5);
        ck_assert_uint_ge(atomic_load(&e.timer_at), at);
        best = atomic_load(&e.timer_at) - at < best ? atomic_load(&e.timer_at) - at : best;
    }
    ck_assert_uint_lt(best, SECOND / 20);
    uint64_t at = ry_now_ns();
    ry_line_wake_at(e.line, at + 300000000);
    ry_line_wake_at(e.line, at + 2 * SECOND); /* instead */
    usleep(500000);
    ck_assert_uint_eq(atomic_load(&e.timers), 10);
    ry_line_wake_at(e.line, UINT64_MAX);
    usleep(1700000);
    ck_assert_uint_eq(atomic_load(&e.timers), 10);
    ry_line_wake_at(e.line, 1); /* long ago: now */
    wait_until(atomic_load(&e.timers) == 11, 1);
    leave(&e);
    ry_control_stop(control);
}
END_TEST

static void any_message(struct ear *e, int from, const void *bytes, size_t size)
{
}

static _Atomic int left_to_send;

/* The answer to an answer, at once. */
static void next_ping(struct ear *e, int from, const void *bytes, size_t size)
{
    if (atomic_fetch_sub(&left_to_send, 1) > 0)
        ry_line_send(e->line, from, bytes, size);
}

static void ping_server(int rank)
{
    struct ear e = {.echo = true, .on_message = any_message};
    start();
    await_address();
    join(&e, KEY, 2, rank);
    atomic_store(&shared->step[rank], 1);
    while (!atomic_load(&e.losses)) {
        if (atomic_load(&shared->step[0])) /* lend a hand */
            ry_control_poll(control);
        else
            usleep(10000);
    }
    leave(&e);
    ry_control_stop(control);
}

/* The progress threads alone, asleep between messages; then a thread on each side that lends a hand. */
START_TEST(ping)
{
    enum { ROUNDS = SANITIZED ? 200 : 3000 };
    fork_rank(1, ping_server);
    struct ear e = {.on_message = next_ping};
    start();
    join(&e, KEY, 2, 0);
    publish();
    wait_until(atomic_load(&shared->step[1]), 20);
    usleep(200000);
    uint64_t text[8] = {0};
    for (int polled = 0; polled < 2; polled++) {
        uint64_t n = atomic_load(&e.heard[1]);
        atomic_store(&shared->step[0], polled);
        usleep(20000);
        atomic_store(&left_to_send, ROUNDS);
        uint64_t t = ry_now_ns(), cpu = cpu_ns();
        ry_line_send(e.line, 1, text, sizeof text);
        while (atomic_load(&e.heard[1]) < n + ROUNDS + 1) {
            if (polled)
                ry_control_poll(control);
            else
                usleep(1000);
            must(ry_now_ns() - t < 20 * SECOND, "no echo");
        }
        printf("round trip %s: %.1f us, %.1f us of CPU here\n",
               polled ? "with both sides polling" : "through the threads", (double)(ry_now_ns() - t) * 1e-3 / ROUNDS,
               (double)(cpu_ns() - cpu) * 1e-3 / ROUNDS);
    }
    leave(&e);
    reap(1);
    ry_control_stop(control);
}
END_TEST

/* ---- manners ---- */

/* LeakSanitizer does not bear exit() in a child of a process with threads. */
static void end_child(bool properly)
{
    if (properly && !SANITIZED)
        exit(0);
    _exit(0);
}

static void job_handler(int signal)
{
}

START_TEST(a_good_guest)
{
    struct sigaction before[NSIG], after;
    struct sigaction mine = {.sa_handler = job_handler};
    const void *code[] = {mmap, munmap, brk, sbrk, malloc, free, madvise, mremap};
    char text[8][16];
    sigaction(SIGUSR1, &mine, NULL);
    for (int s = 1; s < NSIG; s++)
        sigaction(s, NULL, &before[s]);
    for (int i = 0; i < 8; i++)
        memcpy(text[i], code[i], 16);
    int pipes[2], out = dup(1), size;
    ck_assert_int_eq(pipe2(pipes, O_NONBLOCK), 0);
    fflush(stdout);
    dup2(pipes[1], 1);
    fork_rank(1, sleeper);
    struct ear e = {0};
    start();
    join(&e, KEY, 2, 0);
    publish();
    wait_until(atomic_load(&e.heard[1]), 20);
    for (int s = 1; s < NSIG; s++) {
        if (sigaction(s, NULL, &after))
            continue; /* libc's own */
        if (s == SIGSEGV || s == SIGBUS || s == SIGFPE || s == SIGILL ||
            s == SIGHUP) { /* libucs is loaded before main() here */
            ck_assert_msg(SANITIZED || after.sa_handler == SIG_DFL || after.sa_handler == SIG_IGN /* as under nohup */,
                          "signal %d has a handler", s);
            continue;
        }
        ck_assert_msg(after.sa_handler == before[s].sa_handler, "signal %d has another handler", s);
    }
    for (int i = 0; i < 8; i++)
        ck_assert_msg(!memcmp(text[i], code[i], 16), "function %d of libc was changed", i);
    /* A child that ends as programs do: the parent's line is not harmed. */
    pid_t child = fork();
    if (!child)
        end_child(true);
    waitpid(child, NULL, 0);
    kill(kids[1], SIGKILL);
    wait_until(atomic_load(&e.losses), 5);
    waitpid(kids[1], NULL, 0);
    leave(&e);
    ry_control_stop(control);
    fflush(stdout);
    dup2(out, 1);
    char said[512];
    size = (int)read(pipes[0], said, sizeof said - 1);
    ck_assert_msg(size <= 0, "on stdout: %.*s", size, said);
}
END_TEST

static void answers_once(int rank)
{
    speaks_early(rank);
}

/* After a fork without exec (data loaders) the parent's line goes on. */
START_TEST(forked_children_do_no_harm)
{
    fork_rank(1, answers_once);
    fork_rank(2, answers_once);
    struct ear e = {.echo = true};
    start();
    join(&e, KEY, 3, 0);
    publish();
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (!child) {
            free(malloc(100000));
            end_child(i % 2);
        }
        ck_assert_int_eq(waitpid(child, NULL, 0), child);
    }
    reap(1), reap(2);
    wait_until(atomic_load(&e.losses) == 2, 5);
    ck_assert_ptr_nonnull(strstr(e.why, "left"));
    leave(&e);
    ry_control_stop(control);
}
END_TEST

START_TEST(absurd_addresses_are_refused)
{
    struct ear e = {0};
    struct ry_line_handlers on = {&e, message, lost, timer};
    char junk[600];
    size_t size;
    start();
    const char *own = ry_control_address(control, &size);
    printf("an address has %zu bytes\n", size);
    ck_assert_uint_lt(size, 4096);
    ck_assert_ptr_null(ry_line_open(control, KEY, 2, 1, NULL, 0, &on, &err));
    memset(junk, 0x5a, sizeof junk);
    ck_assert_ptr_null(ry_line_open(control, KEY, 2, 1, junk, sizeof junk, &on, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "same version"));
    for (size_t cut = 0; cut < size; cut++)
        ck_assert_ptr_null(ry_line_open(control, KEY, 2, 1, own, cut, &on, &err));
    ck_assert_ptr_null(ry_line_open(control, KEY, 2, 2, own, size, &on, &err));
    ck_assert_ptr_null(ry_line_open(control, KEY, 2, -1, own, size, &on, &err));
    join(&e, KEY, 2, 0);
    ck_assert_ptr_null(ry_line_open(control, KEY, 2, 0, NULL, 0, &on, &err)); /* twice */
    /* One whose process is long gone: nobody listens there. */
    char gone[4096];
    memcpy(gone, own, size);
    gone[16 + 8] ^= 2;                    /* another process */
    gone[16 + 40] = 0, gone[16 + 41] = 1; /* port 1 */
    struct ear f = {0};
    on.context = &f;
    f.line = ry_line_open(control, KEY, 2, 1, gone, size, &on, &err);
    if (f.line) {
        wait_until(atomic_load(&f.losses), 20);
        ck_assert_msg(strstr(f.why, "connect"), "%s", f.why);
        leave(&f);
    }
    leave(&e);
    ry_control_stop(control);
}
END_TEST

/* The port of an address, for those who are not ranks. */
static int knock(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    memcpy(&at.sin_port, shared->address + 16 + 40, 2);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&at, sizeof at), 0);
    return fd;
}

START_TEST(strangers_do_no_harm)
{
    char junk[4096], c;
    memset(junk, 0x5a, sizeof junk);
    fork_rank(1, speaks_early);
    struct ear e = {.echo = true};
    start();
    join(&e, KEY, 3, 0);
    publish();
    int half = knock(), wrong = knock(), gone = knock();
    ck_assert_int_eq(send(half, junk, 10, MSG_NOSIGNAL), 10);
    ck_assert_int_gt(send(wrong, junk, sizeof junk, MSG_NOSIGNAL), 0);
    close(gone);
    ck_assert_int_le(recv(wrong, &c, 1, 0), 0); /* shown the door */
    reap(1);
    ck_assert_uint_eq(atomic_load(&e.heard[1]), 500);
    close(half), close(wrong);
    leave(&e);
    ry_control_stop(control);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("control");
    TCase *t = tcase_create("control");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, within_one_process);
    tcase_add_test(t, star_of_eight);
    tcase_add_test(t, large_messages);
    tcase_add_test(t, early_messages_are_kept);
    tcase_add_test(t, killed_ranks_are_lost);
    tcase_add_test(t, killed_yardmaster_is_lost);
    tcase_add_test(t, stopped_is_not_lost);
    tcase_add_test(t, closing_takes_no_time);
    tcase_add_test(t, closing_while_messages_fly);
    tcase_add_test(t, idle_costs_nothing);
    tcase_add_test(t, timers_come_in_time);
    tcase_add_test(t, ping);
    tcase_add_test(t, a_good_guest);
    tcase_add_test(t, forked_children_do_no_harm);
    tcase_add_test(t, absurd_addresses_are_refused);
    tcase_add_test(t, strangers_do_no_harm);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
