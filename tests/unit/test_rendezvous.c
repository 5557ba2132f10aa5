/*
 * test_rendezvous.c: ranks that meet, ranks that never come, and visitors that are no ranks. Each rank has a rendezvous of
 * its own, as in a process of its own; all talk over loopback sockets.
 */
#include <arpa/inet.h>
#include <check.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "control/rendezvous.h"

#define N 6
static struct ry_rendezvous *rv[N];
static struct ry_ticket ticket;
static struct ry_err err;

struct outcome {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int calls, ok;
    char why[256];
    uint64_t all[N];
    int nranks;
    size_t extra_size;
    unsigned char extra[RY_RENDEZVOUS_EXTRA_MAX];
};
static struct outcome outcomes[N];

static void done(void *context, const void *all, const void *extra, size_t extra_size, const char *why)
{
    struct outcome *o = context;
    pthread_mutex_lock(&o->lock);
    o->calls++;
    o->ok = all != NULL;
    o->extra_size = extra_size;
    if (extra)
        memcpy(o->extra, extra, extra_size);
    if (all)
        memcpy(o->all, all, (size_t)o->nranks * sizeof *o->all);
    else
        snprintf(o->why, sizeof o->why, "%s", why);
    pthread_cond_broadcast(&o->changed);
    pthread_mutex_unlock(&o->lock);
}

static void setup(void)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    for (int i = 0; i < N; i++) {
        ck_assert_ptr_nonnull(rv[i] = ry_rendezvous_start(&err));
        outcomes[i] = (struct outcome){.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    }
    ck_assert_int_eq(ry_rendezvous_host(rv[0], (struct sockaddr *)&here, &ticket, &err), 0);
    ck_assert(ry_ticket_valid(&ticket));
}

static void teardown(void)
{
    for (int i = 0; i < N; i++)
        ry_rendezvous_stop(rv[i]);
}

static uint64_t word(int rank)
{
    return 0x1111111111111111u * (uint64_t)(rank + 1);
}

static int attend_with(int i, uint64_t key, int nranks, int rank, double seconds, const void *extra, size_t extra_size)
{
    uint64_t mine = word(rank);
    outcomes[i].nranks = nranks;
    return ry_rendezvous_attend(rv[i], &ticket, key, nranks, rank, &mine, sizeof mine, extra, extra_size, seconds, done,
                                &outcomes[i], &err);
}

static int attend(int i, uint64_t key, int nranks, int rank, double seconds)
{
    return attend_with(i, key, nranks, rank, seconds, NULL, 0);
}

static void wait_for(struct outcome *o)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 10;
    pthread_mutex_lock(&o->lock);
    while (!o->calls)
        ck_assert_int_eq(pthread_cond_timedwait(&o->changed, &o->lock, &until), 0);
    pthread_mutex_unlock(&o->lock);
}

static int knock(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = ticket.port};
    memcpy(&at.sin_addr, ticket.address, 4);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&at, sizeof at), 0);
    return fd;
}

START_TEST(everybody_hears_everybody)
{
    for (int i = N - 1; i >= 0; i--)
        ck_assert_int_eq(attend(i, 7, N, i, 10), 0);
    for (int i = 0; i < N; i++) {
        wait_for(&outcomes[i]);
        ck_assert_msg(outcomes[i].ok, "%s", outcomes[i].why);
        for (int r = 0; r < N; r++)
            ck_assert_uint_eq(outcomes[i].all[r], word(r));
    }
}
END_TEST

/* Of the extras only rank 0's gets around, whatever its size. */
START_TEST(rank_0_brings_more)
{
    static unsigned char extra[RY_RENDEZVOUS_EXTRA_MAX + 1];
    for (size_t i = 0; i < sizeof extra; i++)
        extra[i] = (unsigned char)(i * 7 + i / 256);
    const size_t sizes[] = {0, 1, 331, RY_RENDEZVOUS_EXTRA_MAX};
    for (unsigned k = 0; k < 4; k++) {
        for (int i = N - 1; i >= 0; i--) {
            outcomes[i].calls = 0;
            ck_assert_int_eq(attend_with(i, 40 + k, N, i, 10, extra + i, i ? 100 : sizes[k]), 0);
        }
        for (int i = 0; i < N; i++) {
            wait_for(&outcomes[i]);
            ck_assert_msg(outcomes[i].ok, "%s", outcomes[i].why);
            ck_assert_uint_eq(outcomes[i].extra_size, sizes[k]);
            ck_assert_mem_eq(outcomes[i].extra, extra, sizes[k]);
            for (int r = 0; r < N; r++)
                ck_assert_uint_eq(outcomes[i].all[r], word(r));
        }
    }
    ck_assert_int_eq(attend_with(0, 50, N, 0, 10, extra, sizeof extra), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "address"));
    /* An outcome without all ranks has no extra. */
    outcomes[0].calls = 0;
    attend_with(0, 51, N, 0, 0.2, extra, 100);
    wait_for(&outcomes[0]);
    ck_assert(!outcomes[0].ok);
    ck_assert_uint_eq(outcomes[0].extra_size, 0);
}
END_TEST

/* Whoever knows the cookie and still talks nonsense is shown the door before anything is kept for it. */
START_TEST(absurd_sizes_are_refused)
{
    struct {
        uint8_t cookie[16];
        uint64_t key;
        uint32_t nranks, rank, size, patience_ms, extra, spare;
    } hellos[] = {{.nranks = 2, .rank = 0, .size = 8, .extra = RY_RENDEZVOUS_EXTRA_MAX + 1},
                  {.nranks = 2, .rank = 1, .size = 8, .extra = 1},
                  {.nranks = 2, .rank = 1, .size = UINT32_MAX, .extra = 0},
                  {.nranks = UINT32_MAX, .rank = 1, .size = 4096, .extra = 0},
                  {.nranks = 2, .rank = 0, .size = 0, .extra = 8}};
    for (unsigned i = 0; i < sizeof hellos / sizeof *hellos; i++) {
        char c;
        int fd = knock();
        memcpy(hellos[i].cookie, ticket.cookie, sizeof ticket.cookie);
        hellos[i].key = 60, hellos[i].patience_ms = 60000;
        ck_assert_int_eq(send(fd, &hellos[i], sizeof hellos[i], MSG_NOSIGNAL), sizeof hellos[i]);
        ck_assert_int_le(recv(fd, &c, 1, 0), 0);
        close(fd);
    }
    for (int i = 0; i < 2; i++)
        attend(i, 60, 2, i, 10);
    for (int i = 0; i < 2; i++) {
        wait_for(&outcomes[i]);
        ck_assert_msg(outcomes[i].ok, "%s", outcomes[i].why);
    }
}
END_TEST

/* Two communicators at once, one host; a process may bring several ranks. */
START_TEST(meetings_do_not_mix)
{
    for (int i = 0; i < N; i++)
        ck_assert_int_eq(attend(i, (uint64_t)(i % 2), N / 2, i / 2, 10), 0);
    for (int i = 0; i < N; i++) {
        wait_for(&outcomes[i]);
        ck_assert(outcomes[i].ok);
        for (int r = 0; r < N / 2; r++)
            ck_assert_uint_eq(outcomes[i].all[r], word(r));
    }
}
END_TEST

START_TEST(missing_ranks_are_named)
{
    uint64_t t = ry_now_ns();
    attend(1, 9, N, 1, 0.3);
    attend(4, 9, N, 4, 0.3);
    for (int i = 1; i <= 4; i += 3) {
        wait_for(&outcomes[i]);
        ck_assert(!outcomes[i].ok);
        ck_assert_msg(strstr(outcomes[i].why, "ranks 0, 2-3, 5 of 6"), "%s", outcomes[i].why);
    }
    ck_assert_uint_lt(ry_now_ns() - t, 20000000000u);
}
END_TEST

START_TEST(disagreement_is_refused)
{
    attend(1, 3, 4, 1, 5);
    usleep(100000);
    attend(2, 3, 5, 2, 5); /* says the communicator has 5 ranks */
    wait_for(&outcomes[2]);
    ck_assert(!outcomes[2].ok);
    ck_assert_ptr_nonnull(strstr(outcomes[2].why, "disagree"));
    attend(3, 3, 4, 1, 5); /* rank 1 again */
    wait_for(&outcomes[3]);
    ck_assert_ptr_nonnull(strstr(outcomes[3].why, "two ranks"));
}
END_TEST

/* Strangers, half a hello, a hello with a wrong cookie, a flood of bytes: the meeting goes on. */
START_TEST(strangers_do_no_harm)
{
    char junk[4096];
    memset(junk, 0x5a, sizeof junk);
    int half = knock(), wrong = knock(), gone = knock(), flood = knock();
    ck_assert_int_eq(send(half, junk, 10, MSG_NOSIGNAL), 10);
    ck_assert_int_gt(send(wrong, junk, 200, MSG_NOSIGNAL), 0);
    close(gone);
    for (int i = 0; i < 64; i++)
        if (send(flood, junk, sizeof junk, MSG_NOSIGNAL) < 0)
            break;
    for (int i = 0; i < 4; i++)
        attend(i, 1, 4, i, 10);
    for (int i = 0; i < 4; i++) {
        wait_for(&outcomes[i]);
        ck_assert(outcomes[i].ok);
    }
    char c;
    ck_assert_int_le(recv(wrong, &c, 1, 0), 0); /* shown the door */
    close(half), close(wrong), close(flood);
}
END_TEST

/* The host's process ends while others wait: they hear of it at once. */
START_TEST(host_goes_away)
{
    attend(1, 5, 3, 1, 60);
    attend(2, 5, 3, 2, 60);
    usleep(100000);
    ry_rendezvous_stop(rv[0]);
    for (int i = 1; i < 3; i++) {
        wait_for(&outcomes[i]);
        ck_assert(!outcomes[i].ok);
        ck_assert_ptr_nonnull(strstr(outcomes[i].why, "went away"));
    }
    ck_assert_ptr_nonnull(rv[0] = ry_rendezvous_start(&err)); /* for teardown */
    /* nobody listens there any more */
    outcomes[1].calls = 0;
    if (!attend(1, 5, 3, 1, 60))
        wait_for(&outcomes[1]);
    ck_assert(!outcomes[1].ok);
}
END_TEST

START_TEST(cancelled_means_silent)
{
    attend(1, 11, 2, 1, 0.8);
    ry_rendezvous_cancel(rv[1], &outcomes[1]);
    usleep(1000000);
    ck_assert_int_eq(outcomes[1].calls, 0);
}
END_TEST

static void open_files(rlim_t more)
{
    struct rlimit limit;
    int next = open("/dev/null", O_RDONLY | O_CLOEXEC);
    ck_assert_int_ge(next, 0);
    close(next);
    ck_assert_int_eq(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = more ? (rlim_t)next + more : limit.rlim_max;
    ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

/* The job has used up its file descriptors: the thread waits for better times, and does not spin. */
START_TEST(no_descriptors_left)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0), filled[8], n = 0;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = ticket.port};
    memcpy(&at.sin_addr, ticket.address, 4);
    open_files(4);
    while ((filled[n] = dup(fd)) >= 0)
        ck_assert_int_lt(++n, 8);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&at, sizeof at), 0);
    struct timespec cpu[2];
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu[0]);
    usleep(500000);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu[1]);
    int64_t us = (cpu[1].tv_sec - cpu[0].tv_sec) * 1000000 + (cpu[1].tv_nsec - cpu[0].tv_nsec) / 1000;
    ck_assert_msg(us < 100000, "%lld us of CPU in half a second of waiting", (long long)us);
    while (n)
        close(filled[--n]);
    open_files(0);
    for (int i = 0; i < N; i++)
        attend(i, 7, N, i, 10);
    for (int i = 0; i < N; i++) {
        wait_for(&outcomes[i]);
        ck_assert_msg(outcomes[i].ok, "%s", outcomes[i].why);
    }
    close(fd);
}
END_TEST

/* However many come (the ranks of a large communicator, all at once), the job can still open files. */
START_TEST(descriptors_left_for_the_job)
{
    pid_t crowd = fork();
    if (!crowd) {
        for (int i = 0; i < 200; i++)
            knock();
        usleep(700000);
        _exit(0);
    }
    open_files(100);
    usleep(500000);
    int mine[20];
    for (int i = 0; i < 20; i++)
        ck_assert_msg((mine[i] = open("/dev/null", O_RDONLY)) >= 0, "no descriptor left for file %d", i);
    for (int i = 0; i < 20; i++)
        close(mine[i]);
    int status;
    ck_assert_int_eq(waitpid(crowd, &status, 0), crowd);
    open_files(0);
    for (int i = 0; i < N; i++)
        attend(i, 7, N, i, 10);
    for (int i = 0; i < N; i++) {
        wait_for(&outcomes[i]);
        ck_assert_msg(outcomes[i].ok, "%s", outcomes[i].why);
    }
}
END_TEST

START_TEST(no_ticket_no_meeting)
{
    memset(&ticket, 0, sizeof ticket);
    ck_assert_int_eq(attend(1, 1, 2, 1, 1), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "was not preloaded"));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("rendezvous");
    TCase *t = tcase_create("rendezvous");
    tcase_set_timeout(t, 30);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, everybody_hears_everybody);
    tcase_add_test(t, rank_0_brings_more);
    tcase_add_test(t, absurd_sizes_are_refused);
    tcase_add_test(t, meetings_do_not_mix);
    tcase_add_test(t, missing_ranks_are_named);
    tcase_add_test(t, disagreement_is_refused);
    tcase_add_test(t, strangers_do_no_harm);
    tcase_add_test(t, host_goes_away);
    tcase_add_test(t, cancelled_means_silent);
    tcase_add_test(t, no_ticket_no_meeting);
    tcase_add_test(t, no_descriptors_left);
    tcase_add_test(t, descriptors_left_for_the_job);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
