/*
 * preload_cases.c: an NCCL program that does, on purpose, everything that the preload must tell apart, and writes down what it
 * did: preload_check.py compares that with what was recorded. One case per run, named by the argument:
 *
 *   groups   which groups are exchanges and which only look like one
 *   lives    every way in which communicators begin and end
 *   threads  one communicator per thread, all at once; forked children; communicators alive at exit
 *   patient  communicators made non-blocking, and their children
 *   process  several ranks in one process (ncclCommInitAll)
 */
#include <dirent.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>

#include "emu_common.h"

#define MAX_RANKS 64

/* What should be found in the trace of one communicator, as this rank sees it. */
struct expected {
    struct expected *next;
    char name[64];
    const char *birth, *end;
    int nranks, rank;
    uint64_t exchanges, plain_groups;
    uint64_t sent[MAX_RANKS], received[MAX_RANKS]; /* bytes in exchanges */
    ncclComm_t comm;
};
static struct expected *list;
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;

static struct expected *expect(ncclComm_t comm, const char *name, const char *birth)
{
    struct expected *e = calloc(1, sizeof *e);
    snprintf(e->name, sizeof e->name, "%s", name);
    e->birth = birth;
    e->end = "exit";
    e->comm = comm;
    NCCL(ncclCommCount(comm, &e->nranks));
    NCCL(ncclCommUserRank(comm, &e->rank));
    pthread_mutex_lock(&list_lock);
    e->next = list;
    list = e;
    pthread_mutex_unlock(&list_lock);
    return e;
}

static void write_expected(void)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/expected-%d.json", getenv("RY_EXPECTED"), who.rank);
    FILE *f = fopen(path, "w");
    CHECK(f, "%s", path);
    fprintf(f, "[");
    for (struct expected *e = list; e; e = e->next) {
        fprintf(f, "%s\n{\"name\": \"%s\", \"birth\": \"%s\", \"end\": \"%s\", \"nranks\": %d, \"rank\": %d, \"exchanges\": %lu, "
                   "\"plain_groups\": %lu, \"pid\": %d, \"sent\": [", e == list ? "" : ",", e->name, e->birth, e->end,
                e->nranks, e->rank, e->exchanges, e->plain_groups, (int)getpid());
        for (int i = 0; i < e->nranks; i++)
            fprintf(f, "%s%lu", i ? ", " : "", e->sent[i]);
        fprintf(f, "], \"received\": [");
        for (int i = 0; i < e->nranks; i++)
            fprintf(f, "%s%lu", i ? ", " : "", e->received[i]);
        fprintf(f, "]}");
    }
    fprintf(f, "\n]\n");
    CHECK(fclose(f) == 0, "%s", path);
}

static ncclConfig_t named(const char *name)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.commName = name;
    return config;
}

static size_t elements(int from, int to, int salt)
{
    return (size_t)((from * 5 + to * 3 + salt) % 4) * 7; /* zero for some pairs */
}

/* The calls of one exchange, without the group around them; real data, checked by finish(). */
struct traffic {
    int *out[MAX_RANKS], *in[MAX_RANKS];
};
static void issue(struct traffic *t, const struct expected *e, int salt, void *stream)
{
    for (int r = 0; r < e->nranks; r++) {
        size_t no = elements(e->rank, r, salt), ni = elements(r, e->rank, salt);
        t->out[r] = malloc((no + 1) * sizeof(int));
        t->in[r] = malloc((ni + 1) * sizeof(int));
        for (size_t i = 0; i < no; i++)
            t->out[r][i] = e->rank * 1000 + r * 10 + (int)i + salt;
        memset(t->in[r], 0xee, (ni + 1) * sizeof(int));
        NCCL(ncclSend(t->out[r], no, ncclInt32, r, e->comm, stream));
        NCCL(ncclRecv(t->in[r], ni, ncclInt32, r, e->comm, stream));
    }
}
static void finish(struct traffic *t, const struct expected *e, int salt)
{
    for (int r = 0; r < e->nranks; r++) {
        size_t ni = elements(r, e->rank, salt);
        for (size_t i = 0; i < ni; i++)
            CHECK(t->in[r][i] == r * 1000 + e->rank * 10 + (int)i + salt, "element %zu from %d", i, r);
        CHECK(t->in[r][ni] == (int)0xeeeeeeee, "written past the end");
        free(t->out[r]);
        free(t->in[r]);
    }
}
static void count(struct expected *e, int salt)
{
    e->exchanges++;
    for (int r = 0; r < e->nranks; r++) {
        e->sent[r] += elements(e->rank, r, salt) * sizeof(int);
        e->received[r] += elements(r, e->rank, salt) * sizeof(int);
    }
}
static void exchange(struct expected *e, int salt)
{
    struct traffic t;
    NCCL(ncclGroupStart());
    issue(&t, e, salt, NULL);
    NCCL(ncclGroupEnd());
    finish(&t, e, salt);
    count(e, salt);
}

static struct expected *world(const char *name)
{
    ncclComm_t comm;
    ncclConfig_t config = named(name);
    NCCL(ncclCommInitRankConfig(&comm, who.world, shared_id(), who.rank, &config));
    return expect(comm, name, "init");
}

static void destroy(struct expected *e)
{
    NCCL(ncclCommFinalize(e->comm));
    NCCL(ncclCommDestroy(e->comm));
    e->end = "destroy";
}

static void alltoall(struct expected *e)
{
    enum { N = 3 };
    int out[MAX_RANKS * N], in[MAX_RANKS * N];
    for (int i = 0; i < e->nranks * N; i++)
        out[i] = e->rank * 100 + i;
    NCCL(ncclAlltoAll(out, in, N, ncclInt32, e->comm, NULL));
    for (int r = 0; r < e->nranks; r++)
        for (int i = 0; i < N; i++)
            CHECK(in[r * N + i] == r * 100 + e->rank * N + i, "all-to-all from %d", r);
    e->exchanges++;
    for (int r = 0; r < e->nranks; r++)
        e->sent[r] += N * sizeof(int), e->received[r] += N * sizeof(int);
}

/* A group with one send and one receive by every rank: no exchange, unless a rank is alone and that is everybody. */
static void ring_or_all(struct expected *e)
{
    if (e->nranks > 1) {
        e->plain_groups++;
        return;
    }
    e->exchanges++;
    e->sent[0] += sizeof(int), e->received[0] += sizeof(int);
}

static void groups(void)
{
    struct expected *e = world("groups"), *other = world("other");
    struct traffic t, u;
    float one = 1, two;
    int a = who.rank, b = -1, n = who.world, next = (who.rank + 1) % n, last = (who.rank + n - 1) % n;

    exchange(e, 0);
    exchange(e, 1);
    alltoall(e);

    /* nested: only the outermost counts */
    NCCL(ncclGroupStart());
    NCCL(ncclGroupStart());
    issue(&t, e, 2, NULL);
    NCCL(ncclGroupEnd());
    NCCL(ncclGroupEnd());
    finish(&t, e, 2);
    count(e, 2);

    /* a ring, a star around rank 0, and everybody but oneself are no exchanges */
    NCCL(ncclGroupStart());
    NCCL(ncclSend(&a, 1, ncclInt32, next, e->comm, NULL));
    NCCL(ncclRecv(&b, 1, ncclInt32, last, e->comm, NULL));
    NCCL(ncclGroupEnd());
    CHECK(b == last, "ring gave %d", b);
    ring_or_all(e);
    NCCL(ncclGroupStart());
    for (int r = 0; r < n; r++) {
        static int in[MAX_RANKS];
        if (who.rank == 0)
            NCCL(ncclRecv(&in[r], 1, ncclInt32, r, e->comm, NULL));
    }
    NCCL(ncclSend(&a, 1, ncclInt32, 0, e->comm, NULL));
    NCCL(ncclGroupEnd());
    ring_or_all(e);
    /* the other way round: rank 0 sends to everybody, and receives once */
    NCCL(ncclGroupStart());
    for (int r = 0; r < n && who.rank == 0; r++)
        NCCL(ncclSend(&a, 1, ncclInt32, r, e->comm, NULL));
    NCCL(ncclRecv(&b, 1, ncclInt32, 0, e->comm, NULL));
    NCCL(ncclGroupEnd());
    CHECK(b == 0, "rank 0 sent %d", b);
    ring_or_all(e);
    if (n > 1) {
        static int in[MAX_RANKS];
        NCCL(ncclGroupStart());
        for (int r = 0; r < n; r++) {
            if (r == who.rank)
                continue;
            NCCL(ncclSend(&a, 1, ncclInt32, r, e->comm, NULL));
            NCCL(ncclRecv(&in[r], 1, ncclInt32, r, e->comm, NULL));
        }
        NCCL(ncclGroupEnd());
        e->plain_groups++;
        /* as many calls as ranks, but one peer twice and one never */
        NCCL(ncclGroupStart());
        for (int i = 0; i < n; i++) {
            NCCL(ncclSend(&a, 1, ncclInt32, next, e->comm, NULL));
            NCCL(ncclRecv(&in[i], 1, ncclInt32, last, e->comm, NULL));
        }
        NCCL(ncclGroupEnd());
        e->plain_groups++;
    }

    /* an exchange and one send more; an exchange and a collective, before and after */
    NCCL(ncclGroupStart());
    issue(&t, e, 3, NULL);
    NCCL(ncclSend(&a, 1, ncclInt32, next, e->comm, NULL));
    NCCL(ncclRecv(&b, 1, ncclInt32, last, e->comm, NULL));
    NCCL(ncclGroupEnd());
    finish(&t, e, 3);
    CHECK(b == last, "send more gave %d", b);
    e->plain_groups++;
    NCCL(ncclGroupStart());
    issue(&t, e, 4, NULL);
    NCCL(ncclAllReduce(&one, &two, 1, ncclFloat, ncclSum, e->comm, NULL));
    NCCL(ncclGroupEnd());
    finish(&t, e, 4);
    CHECK(two == (float)n, "sum %f", two);
    e->plain_groups++;
    NCCL(ncclGroupStart());
    NCCL(ncclBroadcast(&one, &two, 1, ncclFloat, 0, e->comm, NULL));
    issue(&t, e, 5, NULL);
    NCCL(ncclGroupEnd());
    finish(&t, e, 5);
    e->plain_groups++;

    /* two communicators in one group: two exchanges for NCCL, none for us */
    NCCL(ncclGroupStart());
    issue(&t, e, 6, NULL);
    issue(&u, other, 7, NULL);
    NCCL(ncclGroupEnd());
    finish(&t, e, 6);
    finish(&u, other, 7);
    e->plain_groups++;
    other->plain_groups++;
    /* taking turns within the group changes nothing; each turn is told as a group of its own */
    exchange(other, 8);

    /* two streams */
    NCCL(ncclGroupStart());
    issue(&t, e, 9, NULL);
    NCCL(ncclSend(&a, 0, ncclInt32, next, e->comm, (cudaStream_t)(uintptr_t)0x10));
    NCCL(ncclRecv(&b, 0, ncclInt32, last, e->comm, (cudaStream_t)(uintptr_t)0x10));
    NCCL(ncclGroupEnd());
    finish(&t, e, 9);
    e->plain_groups++;
    NCCL(ncclGroupStart());
    for (int r = 0; r < n; r++) {
        cudaStream_t stream = (cudaStream_t)(uintptr_t)(r == n - 1 ? 0x20 : 0x10);
        NCCL(ncclSend(&a, 0, ncclInt32, r, e->comm, stream));
        NCCL(ncclRecv(&b, 0, ncclInt32, r, e->comm, stream));
    }
    NCCL(ncclGroupEnd());
    if (n > 1) {
        e->plain_groups++;
    } else {
        e->exchanges++;
    }

    /* one ncclAlltoAll in a group is an exchange; two, or one and a send, are not */
    NCCL(ncclGroupStart());
    int out[MAX_RANKS], in[MAX_RANKS], in2[MAX_RANKS];
    for (int r = 0; r < n; r++)
        out[r] = who.rank * 100 + r;
    NCCL(ncclAlltoAll(out, in, 1, ncclInt32, e->comm, NULL));
    NCCL(ncclGroupEnd());
    e->exchanges++;
    for (int r = 0; r < n; r++)
        e->sent[r] += sizeof(int), e->received[r] += sizeof(int);
    NCCL(ncclGroupStart());
    NCCL(ncclAlltoAll(out, in, 1, ncclInt32, e->comm, NULL));
    NCCL(ncclAlltoAll(out, in2, 1, ncclInt32, e->comm, NULL));
    NCCL(ncclGroupEnd());
    NCCL(ncclGroupStart());
    NCCL(ncclAlltoAll(out, in, 1, ncclInt32, e->comm, NULL));
    NCCL(ncclSend(&a, 1, ncclInt32, next, e->comm, NULL));
    NCCL(ncclRecv(&b, 1, ncclInt32, last, e->comm, NULL));
    NCCL(ncclGroupEnd());
    e->plain_groups++;

    /* types may differ between peers: bytes then */
    NCCL(ncclGroupStart());
    double dout[MAX_RANKS] = {1}, din[MAX_RANKS];
    for (int r = 0; r < n; r++) {
        ncclDataType_t type = (who.rank + r) % 2 ? ncclFloat64 : ncclInt32;
        NCCL(ncclSend(&dout[r], 1, type, r, e->comm, NULL));
        NCCL(ncclRecv(&din[r], 1, type, r, e->comm, NULL));
    }
    NCCL(ncclGroupEnd());
    e->exchanges++;
    for (int r = 0; r < n; r++) {
        uint64_t bytes = (who.rank + r) % 2 ? 8 : 4;
        e->sent[r] += bytes, e->received[r] += bytes;
    }

    /* outside of groups, and a group of nothing */
    if (n > 1 && n % 2 == 0) {
        int peer = who.rank ^ 1;
        if (who.rank & 1) {
            NCCL(ncclRecv(&b, 1, ncclInt32, peer, e->comm, NULL));
            NCCL(ncclSend(&a, 1, ncclInt32, peer, e->comm, NULL));
        } else {
            NCCL(ncclSend(&a, 1, ncclInt32, peer, e->comm, NULL));
            NCCL(ncclRecv(&b, 1, ncclInt32, peer, e->comm, NULL));
        }
    }
    NCCL(ncclGroupStart());
    NCCL(ncclGroupEnd());
    exchange(e, 10);
    destroy(other);
    destroy(e);
}

static void wait_ready(ncclComm_t comm)
{
    ncclResult_t st = ncclInProgress;
    while (st == ncclInProgress) {
        NCCL(ncclCommGetAsyncError(comm, &st));
        usleep(1000);
    }
    CHECK(st == ncclSuccess, "not ready: %d", st);
}

static void lives(void)
{
    ncclComm_t c[4];
    int n = who.world;
    struct expected *e[16];
    int ne = 0;

    /* plain init; it has no name of its own */
    NCCL(ncclCommInitRank(&c[0], n, shared_id(), who.rank));
    struct expected *root = e[ne++] = expect(c[0], "", "init");
    exchange(root, 0);

    /* two in one group, known only when the group has ended */
    ncclUniqueId id1 = shared_id(), id2 = shared_id();
    ncclConfig_t config1 = named("grouped one"), config2 = named("grouped two");
    NCCL(ncclGroupStart());
    NCCL(ncclCommInitRankConfig(&c[1], n, id1, who.rank, &config1));
    NCCL(ncclCommInitRankConfig(&c[2], n, id2, n - 1 - who.rank, &config2));
    NCCL(ncclGroupEnd());
    e[ne++] = expect(c[1], "grouped one", "init");
    e[ne++] = expect(c[2], "grouped two", "init");
    exchange(e[1], 1);
    exchange(e[2], 2);

    /* several ids */
    ncclUniqueId ids[2] = {shared_id(), shared_id()};
    ncclConfig_t config = named("scalable");
    NCCL(ncclCommInitRankScalable(&c[3], n, who.rank, 2, ids, &config));
    e[ne++] = expect(c[3], "scalable", "init");
    exchange(e[3], 3);

    /* not blocking */
    config = named("not blocking");
    config.blocking = 0;
    ncclComm_t nb;
    ncclResult_t r = ncclCommInitRankConfig(&nb, n, shared_id(), who.rank, &config);
    CHECK(r == ncclSuccess || r == ncclInProgress, "gave %d", r);
    wait_ready(nb);
    e[ne] = expect(nb, "not blocking", "init");
    exchange(e[ne], 4);
    ne++;

    /* split by parity, in reversed order; then again with one rank left out; then a child's child */
    ncclComm_t half, most, child;
    config = named(who.rank % 2 ? "odd" : "even");
    NCCL(ncclCommSplit(root->comm, who.rank % 2, -who.rank, &half, &config));
    struct expected *eh = e[ne++] = expect(half, who.rank % 2 ? "odd" : "even", "split");
    exchange(eh, 5);
    config = named("all but the last");
    NCCL(ncclCommSplit(root->comm, who.rank == n - 1 ? NCCL_SPLIT_NOCOLOR : 7, who.rank, &most, &config));
    if (who.rank < n - 1) {
        e[ne] = expect(most, "all but the last", "split");
        exchange(e[ne], 6);
        ne++;
    } else {
        CHECK(!most, "a communicator for a rank without color");
    }
    config = named(who.rank % 2 ? "odd's child" : "even's child");
    NCCL(ncclCommSplit(half, 0, 0, &child, &config));
    e[ne] = expect(child, who.rank % 2 ? "odd's child" : "even's child", "split");
    exchange(e[ne], 7);
    ne++;

    /* shrunk: without rank 0 */
    ncclComm_t fewer = NULL;
    int exclude = 0;
    config = named("without rank 0");
    if (n > 1 && who.rank) {
        NCCL(ncclCommShrink(root->comm, &exclude, 1, &fewer, &config, NCCL_SHRINK_DEFAULT));
        e[ne] = expect(fewer, "without rank 0", "shrink");
        exchange(e[ne], 8);
        ne++;
    }
    /* the parent lives on; a later split is counted alike by all, whoever was at the shrinking */
    config = named("late");
    ncclComm_t late;
    NCCL(ncclCommSplit(root->comm, 0, who.rank, &late, &config));
    e[ne] = expect(late, "late", "split");
    exchange(e[ne], 9);
    ne++;
    exchange(root, 10);

    /* ends: destroyed, aborted, revoked and destroyed, left to the exit */
    for (int i = 1; i < ne; i++) {
        if (i % 4 == 0)
            continue;
        if (i % 4 == 1) {
            destroy(e[i]);
            continue;
        }
        if (i % 4 == 3) {
            r = ncclCommRevoke(e[i]->comm, NCCL_REVOKE_DEFAULT);
            CHECK(r == ncclSuccess || r == ncclInProgress, "revoke gave %d", r);
            wait_ready(e[i]->comm);
            NCCL(ncclCommDestroy(e[i]->comm));
            e[i]->end = "revoke";
            continue;
        }
        NCCL(ncclCommAbort(e[i]->comm));
        e[i]->end = "abort";
    }
    /* made and destroyed again and again: NCCL may hand out the same address */
    for (int i = 0; i < 20; i++) {
        char name[32];
        snprintf(name, sizeof name, "short life %d", i);
        struct expected *s = world(name);
        exchange(s, i);
        destroy(s);
    }
    barrier(root->comm);
}

/* Nothing is ready when a call returns; a child's handle is not even written before its parent is. */
static struct expected *later(ncclResult_t r, ncclComm_t parent, ncclComm_t *comm, const char *name, const char *birth)
{
    CHECK(r == ncclSuccess || r == ncclInProgress, "gave %d", r);
    wait_ready(parent ? parent : *comm);
    wait_ready(*comm);
    return expect(*comm, name, birth);
}

static void patient(void)
{
    int n = who.world;
    for (int round = 0; round < 2; round++) {
        char name[4][32];
        static const char *const what[] = {"parent", "child", "grandchild", "grouped child"};
        ncclConfig_t config[4];
        for (int i = 0; i < 4; i++) {
            snprintf(name[i], sizeof name[i], "%s %d", what[i], round);
            config[i] = named(name[i]);
            if (!round)
                config[i].blocking = 0;
        }
        if (round) /* the user's word, not the program's */
            setenv("NCCL_COMM_BLOCKING", "0", 1);
        ncclComm_t c[4] = {0};
        struct expected *e[4];
        ncclResult_t r = ncclCommInitRankConfig(&c[0], n, shared_id(), who.rank, &config[0]);
        e[0] = later(r, NULL, &c[0], name[0], "init");
        /* the parent itself is never used for p2p; its children are */
        r = ncclCommSplit(c[0], 0, -who.rank, &c[1], &config[1]);
        e[1] = later(r, c[0], &c[1], name[1], "split");
        r = ncclCommSplit(c[1], 0, 0, &c[2], &config[2]);
        e[2] = later(r, c[1], &c[2], name[2], "split");
        NCCL(ncclGroupStart());
        NCCL(ncclCommSplit(c[0], 0, who.rank, &c[3], &config[3]));
        r = ncclGroupEnd();
        e[3] = later(r, c[0], &c[3], name[3], "split");
        ncclComm_t none = NULL;
        r = ncclCommSplit(c[0], NCCL_SPLIT_NOCOLOR, 0, &none, NULL);
        CHECK(r == ncclSuccess || r == ncclInProgress, "gave %d", r);
        wait_ready(c[0]);
        CHECK(!none, "a communicator for a rank without color");
        for (int i = 0; i < 60; i++)
            for (int k = 1; k < 4; k++)
                exchange(e[k], i + k);
        barrier(c[0]);
        for (int i = 0; i < 4; i++) {
            NCCL(ncclCommDestroy(c[i]));
            e[i]->end = "destroy";
        }
    }
}

/* In a forked child what only the parent's threads can reach looks lost: LeakSanitizer asks whether it should look. */
static bool forked;
int __lsan_is_turned_off(void);
__attribute__((visibility("default"))) int __lsan_is_turned_off(void)
{
    return forked;
}

struct job {
    pthread_t thread;
    ncclUniqueId id;
    int number;
};
static void *one_thread(void *arg)
{
    struct job *j = arg;
    char name[32];
    snprintf(name, sizeof name, "thread %d", j->number);
    ncclConfig_t config = named(name);
    ncclComm_t comm;
    NCCL(ncclCommInitRankConfig(&comm, who.world, j->id, who.rank, &config));
    struct expected *e = expect(comm, name, "init");
    for (int i = 0; i < 200; i++) {
        if (i % 7 == 3)
            alltoall(e);
        else
            exchange(e, i);
    }
    if (j->number % 2)
        destroy(e);
    return NULL;
}

static void threads(void)
{
    enum { THREADS = 6 };
    struct job jobs[THREADS];
    for (int i = 0; i < THREADS; i++)
        jobs[i] = (struct job){.id = shared_id(), .number = i};
    struct expected *e = world("main thread");
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&jobs[i].thread, NULL, one_thread, &jobs[i]), "pthread_create");
    for (int i = 0; i < 100; i++)
        exchange(e, i);
    for (int i = 0; i < THREADS; i++)
        pthread_join(jobs[i].thread, NULL);
#ifndef RY_NO_FORK
    /* children that exit the ordinary way, as data workers do, one of them calling NCCL */
    for (int i = 0; i < 3; i++) {
        fflush(NULL);
        pid_t pid = fork();
        if (!pid) {
            int version;
            forked = true;
            if (i == 1)
                ncclGroupStart(), ncclGroupEnd(), ncclGetVersion(&version);
            exit(0);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && !WEXITSTATUS(status), "child ended with %x", status);
    }
#endif
    exchange(e, 5);
    barrier(e->comm);
}

/* A signal sent to the process is for the job's threads: those of ours block all that can be blocked. */
static void signals_are_the_jobs(void)
{
    int ours = 0;
    DIR *tasks = opendir("/proc/self/task");
    CHECK(tasks, "/proc/self/task");
    for (struct dirent *d; (d = readdir(tasks));) {
        char path[300], line[256], name[32] = "";
        unsigned long blocked = 0;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", d->d_name);
        FILE *f = *d->d_name == '.' ? NULL : fopen(path, "r");
        while (f && fgets(line, sizeof line, f)) {
            sscanf(line, "Name: %31s", name);
            sscanf(line, "SigBlk: %lx", &blocked);
        }
        if (f)
            fclose(f);
        if (strncmp(name, "ry-", 3) && strncmp(name, "railyard", 8))
            continue;
        ours++;
        for (int s = 1; s < 32; s++)
            CHECK(s == SIGKILL || s == SIGSTOP || blocked >> (s - 1) & 1, "thread %s does not block signal %d", name, s);
    }
    closedir(tasks);
    CHECK(ours >= 3, "%d threads of Railyard's", ours); /* rendezvous, record, sampler */
}

/* Single process, several ranks: groups that hold the calls of all of them are no exchanges by definition. */
static void process(void)
{
    enum { N = 3 };
    ncclComm_t comms[N];
    int devices[N] = {0, 1, 2};
    for (int round = 0; round < 2; round++) {
        NCCL(ncclCommInitAll(comms, N, devices));
        struct expected *e[N];
        int out[N][N], in[N][N];
        for (int i = 0; i < N; i++)
            e[i] = expect(comms[i], "", "init_all");
        NCCL(ncclGroupStart());
        for (int i = 0; i < N; i++) {
            for (int r = 0; r < N; r++) {
                out[i][r] = i * 10 + r;
                NCCL(ncclSend(&out[i][r], 1, ncclInt32, r, comms[i], NULL));
                NCCL(ncclRecv(&in[i][r], 1, ncclInt32, r, comms[i], NULL));
            }
            e[i]->plain_groups++;
        }
        NCCL(ncclGroupEnd());
        for (int i = 0; i < N; i++)
            for (int r = 0; r < N; r++)
                CHECK(in[i][r] == r * 10 + i, "from %d to %d", r, i);
        for (int i = 0; i < N && round == 0; i++) {
            NCCL(ncclCommDestroy(comms[i]));
            e[i]->end = "destroy";
        }
    }
    signals_are_the_jobs();
    /* Ranks of other nodes must find those who meet for an id made later: where NCCL itself listens, not on loopback. */
    ncclUniqueId id;
    struct sockaddr_in at;
    setenv("NCCL_SOCKET_IFNAME", "^lo", 1);
    if (ncclGetUniqueId(&id) != ncclSuccess) { /* this machine has no other interface */
        unsetenv("NCCL_SOCKET_IFNAME");
        NCCL(ncclGetUniqueId(&id));
    }
    memcpy(&at, id.internal + 8, sizeof at);
    CHECK(!memcmp(id.internal + 64, "RAILYARD", 8), "no ticket in the id");
    CHECK(at.sin_family != AF_INET || !memcmp(id.internal + 80, &at.sin_addr, 4), "the ticket's address is another than NCCL's");
    usleep(300000); /* the ranks' seats are swapped in the background: do not exit before */
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {{"groups", groups}, {"lives", lives}, {"threads", threads}, {"patient", patient}, {"process", process}};
    start_rank();
    CHECK(argc == 2 && getenv("RY_EXPECTED"), "usage: RY_EXPECTED=DIR preload_cases CASE");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (strcmp(argv[1], cases[i].name))
            continue;
        cases[i].run();
        write_expected();
        return 0;
    }
    CHECK(false, "no case '%s'", argv[1]);
}
