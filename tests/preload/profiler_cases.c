/*
 * profiler_cases.c: drives the engine library as NCCL drives a profiler plugin, and compares what was recorded with
 * what was told.
 *
 *   profiler_cases CASE ENGINE FOLDER
 *
 * CASE: v4, v5, v6: several ranks, a thread each, on two communicators, with groups that are exchanges and groups that
 * are not; cost: how long the events of an exchange take; loads: what NCCL's dlopen() does to the process; second: the
 * preload's engine is there already; idle: nothing to record.
 *
 * The job runs in a child process, since a trace is complete only when its process has ended; the parent reads it. This
 * program exports railyard_emu_version, so that the engine takes host memory for the device: events are time stamps
 * then.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "hooks.h"
#include "nccl_profiler.h"
#include "record/trace.h"

#define RANKS 4
#define EXCHANGES 240  /* of each rank on its first communicator */
#define CE_COUNT 12345 /* of one more at the end, in version 6 */
#define COMM_A 0x1234567890abcdefull
#define COMM_B 0xfedcba0987654321ull

#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond);                                                 \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

int railyard_emu_version(void);
bool railyard_emu_capturing(void *stream);
__attribute__((visibility("default"))) int railyard_emu_version(void)
{
    return 1;
}
__attribute__((visibility("default"))) bool railyard_emu_capturing(void *stream)
{
    return false;
}

static int version;
static const char *engine_path;
static struct ry_prof_v4 *v4;
static struct ry_prof_v5 *v5;

/* ---- what is exchanged ---- */

enum kind { PLAIN, IN_PLACE, LATE, LATE_IN_PLACE, MIXED, UNNAMED, KINDS };

static uint64_t mix(uint64_t v)
{
    v ^= v >> 31;
    v *= 0x9e3779b97f4a7c15ull;
    v ^= v >> 29;
    v *= 0xbf58476d1ce4e5b9ull;
    return v ^ v >> 32;
}

/* Elements of exchange n; every eighth is nothing. */
static uint64_t elements(uint64_t comm, int n, int from, int to)
{
    uint64_t v = mix(comm ^ mix((uint64_t)n * 1000003u + (uint64_t)from * 1009 + (uint64_t)to));
    return v % 8 ? v % 5000 : 0;
}

static enum kind kind_of(int n)
{
    enum kind k = (enum kind)(n % KINDS);
    return version == 4 && (k == IN_PLACE || k == LATE || k == LATE_IN_PLACE) ? PLAIN : k;
}

static const char *type_of(int n, int from, int to)
{
    enum kind k = kind_of(n);
    return k == MIXED && (from + to) % 2 == 0 ? "ncclInt8" : k == UNNAMED ? "Unknown" : "ncclBfloat16";
}

static uint64_t bytes(uint64_t comm, int n, int from, int to)
{
    return elements(comm, n, from, to) * (strcmp(type_of(n, from, to), "ncclBfloat16") ? 1 : 2);
}

/* ---- as NCCL tells of it ---- */

static void start(void *context, void **handle, struct ry_prof_event *e)
{
    *handle = NULL;
    CHECK((version == 4 ? v4->start : v5->start)(context, handle, e) == 0, "start");
}

static void stop(void *handle)
{
    if (handle)
        CHECK((version == 4 ? v4->stop : v5->stop)(handle) == 0, "stop");
}

struct call {
    void *context, *handle;
    bool send, hidden; /* not launched: to itself, in place */
    int peer;
    size_t count;
    const char *type;
};
#define CALLS (8 * RANKS)

struct rank {
    int rank;
    void *a, *b; /* contexts */
    /* the group */
    void *group;
    struct call call[CALLS];
    int n;
};

static void group_start(struct rank *r)
{
    r->n = 0;
    r->group = NULL;
    if (version == 4)
        return;
    struct ry_prof_event e = {.type.v5 = RY_PROF_GROUP_API, .rank = 0};
    start(r->a, &r->group, &e);
    CHECK(r->group, "a group has a handle, or nobody would stop it");
}

static void p2p(struct rank *r, void *context, bool send, int peer, size_t count, const char *type, void *stream,
                bool captured)
{
    struct call *c = &r->call[r->n++];
    *c = (struct call){context, NULL, send, false, peer, count, type};
    if (version == 4)
        return;
    struct ry_prof_event e = {
        .type.v5 = RY_PROF_P2P_API,
        .parent = r->group,
        .p2p_api = {
            .func = send ? "Send" : "Recv", .count = count, .type = type, .stream = stream, .captured = captured}};
    start(context, &c->handle, &e);
    stop(c->handle); /* as soon as the call returns; NCCL keeps the handle for the launch */
}

static void launch(struct rank *r, int from, int to)
{
    void *plan[2] = {NULL, NULL}, *none;
    void *context[2] = {r->a, r->b};
    for (int k = 0; k < 2; k++) {
        bool any = false;
        for (int i = from; i < to; i++)
            any |= r->call[i].context == context[k];
        if (!any)
            continue;
        struct ry_prof_event e = {.type.v5 = RY_PROF_GROUP};
        if (version == 4) {
            memset(&e.type, 0xa5, sizeof e.type); /* NCCL fills one byte there */
            e.type.v4 = RY_PROF_GROUP;
            start(context[k], &plan[k], &e);
        }
        for (int i = from; i < to; i++) {
            const struct call *c = &r->call[i];
            if (c->context != context[k] || c->hidden)
                continue;
            struct ry_prof_event p = {
                .type.v5 = RY_PROF_P2P,
                .parent = version == 4 ? plan[k] : c->handle,
                .rank = r->rank,
                .p2p = {.func = c->send ? "Send" : "Recv", .count = c->count, .type = c->type, .peer = c->peer}};
            if (version == 4) {
                memset(&p.type, 0x5a, sizeof p.type);
                p.type.v4 = RY_PROF_P2P;
            }
            start(c->context, &none, &p);
            stop(none);
        }
        stop(plan[k]);
    }
}

static void *launch_late(void *arg)
{
    struct rank *r = arg;
    launch(r, 0, r->n);
    return NULL;
}

static void group_end(struct rank *r)
{
    stop(r->group);
}

static void calls_of_exchange(struct rank *r, void *context, uint64_t comm, int n, bool captured)
{
    for (int k = 0; k < RANKS; k++) {
        int p = (r->rank + k) % RANKS;
        p2p(r, context, true, p, elements(comm, n, r->rank, p), type_of(n, r->rank, p), NULL, captured);
        p2p(r, context, false, p, elements(comm, n, p, r->rank), type_of(n, p, r->rank), NULL, captured);
    }
}

static void exchange(struct rank *r, void *context, uint64_t comm, int n)
{
    enum kind k = kind_of(n);
    group_start(r);
    calls_of_exchange(r, context, comm, n, false);
    if (k == IN_PLACE || k == LATE_IN_PLACE)
        r->call[0].hidden = r->call[1].hidden = true;
    if (k == LATE || k == LATE_IN_PLACE) {
        pthread_t t;
        bool after = n / KINDS % 2;
        if (after)
            group_end(r);
        CHECK(!pthread_create(&t, NULL, launch_late, r), "thread");
        pthread_join(t, NULL);
        if (!after)
            group_end(r);
    } else if (version == 4 && n % 3 == 0) { /* in two launches; NCCL begins with the copy to itself */
        launch(r, 0, RANKS);
        launch(r, RANKS, r->n);
    } else {
        launch(r, 0, r->n);
        group_end(r);
    }
}

static void collective(struct rank *r, const char *func, size_t count, const char *type)
{
    void *handle;
    struct ry_prof_event e = {
        .type.v5 = RY_PROF_COLL_API, .parent = r->group, .coll_api = {.func = func, .count = count, .type = type}};
    if (version == 4) {
        e = (struct ry_prof_event){.coll = {.func = func, .count = count, .type = type}};
        e.type.v4 = RY_PROF_COLL;
    }
    start(r->a, &handle, &e);
    stop(handle);
}

/* Groups on the first communicator that are no exchange; how many of them count as groups with p2p. */
static int others(struct rank *r, int n)
{
    switch (n % 7) {
    case 0: /* a pipeline's neighbours */
        group_start(r);
        p2p(r, r->a, true, (r->rank + 1) % RANKS, 77, "ncclFloat32", NULL, false);
        p2p(r, r->a, false, (r->rank + RANKS - 1) % RANKS, 77, "ncclFloat32", NULL, false);
        launch(r, 0, r->n);
        group_end(r);
        return 1;
    case 1: /* one peer twice */
        group_start(r);
        calls_of_exchange(r, r->a, COMM_A, n, false);
        r->call[2].peer = r->call[4].peer;
        launch(r, 0, r->n);
        group_end(r);
        return 1;
    case 2: /* a collective; an all-gather as expert counts travel in */
        group_start(r);
        collective(r, "AllGather", 64, "ncclInt64");
        group_end(r);
        return 0;
    case 3: /* an exchange and a collective in one group */
        if (version == 4)
            return 0; /* cannot be told there: two launches */
        group_start(r);
        calls_of_exchange(r, r->a, COMM_A, n, false);
        collective(r, "AllReduce", 1000, "ncclFloat32");
        launch(r, 0, r->n);
        group_end(r);
        return 1;
    case 4: /* captured into a graph: launched when nobody expects it, perhaps twice */
        if (version == 4)
            return 0;
        group_start(r);
        calls_of_exchange(r, r->a, COMM_A, n, true);
        group_end(r);
        launch(r, 0, r->n);
        launch(r, 0, r->n);
        return 0;
    case 5: /* two communicators in one group */
        if (version == 4)
            return 0;
        group_start(r);
        calls_of_exchange(r, r->a, COMM_A, n, false);
        calls_of_exchange(r, r->b, COMM_B, n, false);
        launch(r, 0, r->n);
        group_end(r);
        return 1;
    default: { /* all but itself, as neighbours of a ring of two do */
        group_start(r);
        for (int p = 0; p < RANKS; p++) {
            if (p == r->rank)
                continue;
            p2p(r, r->a, true, p, 5, "ncclInt8", NULL, false);
            p2p(r, r->a, false, p, 5, "ncclInt8", NULL, false);
        }
        launch(r, 0, r->n);
        group_end(r);
        launch(r, 0, r->n); /* events that come after all is over */
        return version == 4 ? 2 : 1;
    }
    }
}

static void init(struct rank *r, void **context, uint64_t id, const char *name, bool wanted)
{
    int mask = 0;
    int bad = version == 4 ? v4->init(context, &mask, name, id, 2, RANKS, r->rank, NULL)
                           : v5->init(context, id, &mask, name, 2, RANKS, r->rank, NULL);
    CHECK(!bad, "init");
    CHECK((*context != NULL) == wanted && (mask != 0) == wanted, "context %p, mask %x", *context, (unsigned)mask);
    CHECK(!(mask & (1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7)),
          "events of proxies and kernels would slow NCCL down: %x", (unsigned)mask);
}

static void fini(void *context)
{
    CHECK(!(version == 4 ? v4->finalize(context) : v5->finalize(context)), "finalize");
}

static void *run_rank(void *arg)
{
    struct rank r = {.rank = *(int *)arg};
    init(&r, &r.a, COMM_A, "experts", true);
    init(&r, &r.b, COMM_B, NULL, true);
    for (int n = 0; n < EXCHANGES; n++) {
        exchange(&r, r.a, COMM_A, n);
        others(&r, n);
        if (n % 4 == 0)
            exchange(&r, r.b, COMM_B, n / 4);
    }
    if (version == 6) { /* by copy engines: no p2p calls */
        void *none;
        struct ry_prof_event e = {.type.v5 = RY_PROF_CE_COLL,
                                  .coll = {.func = "AlltoAll", .count = CE_COUNT, .type = "ncclFloat16"}};
        start(r.a, &none, &e);
        e.coll.func = "AllGather";
        start(r.a, &none, &e);
    }
    fini(r.a);
    if (r.rank % 2)
        fini(r.b); /* the others end with the process */
    return NULL;
}

/* What NCCL's other threads might do. */
static void *meddle(void *arg)
{
    _Atomic bool *over = arg;
    uint64_t n = 1;
    while (!atomic_load(over)) {
        void *handle = (void *)(uintptr_t)(mix(n++) % 5000);
        if (version == 4) {
            v4->record(handle, 13, NULL);
            v4->stop(handle);
        } else {
            v5->record(handle, 13, NULL);
            v5->stop(handle);
        }
        usleep(50);
    }
    return NULL;
}

static void *load(int flags)
{
    void *lib = dlopen(engine_path, flags);
    CHECK(lib, "%s", dlerror());
    v4 = dlsym(lib, "ncclProfiler_v4");
    v5 = dlsym(lib, version == 6 ? "ncclProfiler_v6" : "ncclProfiler_v5");
    CHECK(v4 && v5 && v5->name && v4->name, "the plugin's symbols");
    return lib;
}

static void job(void)
{
    void *lib = load(RTLD_NOW | RTLD_LOCAL);
    pthread_t t[RANKS], other;
    int number[RANKS];
    _Atomic bool over = false;
    CHECK(!pthread_create(&other, NULL, meddle, &over), "thread");
    for (int i = 0; i < RANKS; i++) {
        number[i] = i;
        CHECK(!pthread_create(&t[i], NULL, run_rank, &number[i]), "thread");
    }
    for (int i = 0; i < RANKS; i++)
        pthread_join(t[i], NULL);
    atomic_store(&over, true);
    pthread_join(other, NULL);
    CHECK(!dlclose(lib), "NCCL closes the plugin with its last communicator"); /* its threads live on */
    usleep(100000);
    exit(0);
}

/* ---- what was recorded ---- */

static struct ry_trace_comm *find(const struct ry_trace *trace, uint64_t key)
{
    char id[17];
    snprintf(id, sizeof id, "%016llx", (unsigned long long)key);
    for (int i = 0; i < trace->ncomms; i++)
        if (!strcmp(trace->comms[i]->id, id))
            return trace->comms[i];
    CHECK(false, "communicator %s is not in the trace", id);
    return NULL;
}

static void check_comm(const struct ry_trace *trace, uint64_t key, int exchanges, int plain, int by_copy_engine)
{
    struct ry_trace_comm *c = find(trace, key);
    CHECK(c->nranks == RANKS && c->present == RANKS, "%d of %d ranks", c->present, c->nranks);
    CHECK(!strcmp(c->birth, "seen") && !c->mapped, "%s", c->birth);
    uint64_t timed = 0;
    for (int r = 0; r < RANKS; r++) {
        CHECK(c->ranks[r]->exchanges == (uint64_t)(exchanges + by_copy_engine), "rank %d: %llu exchanges, %d were told",
              r, (unsigned long long)c->ranks[r]->exchanges, exchanges);
        timed += c->ranks[r]->times.n;
        for (int p = 0; p < RANKS; p++) {
            uint64_t sent = (uint64_t)by_copy_engine * CE_COUNT * 2, got = sent;
            for (int n = 0; n < exchanges; n++) {
                sent += bytes(key, n, r, p);
                got += bytes(key, n, p, r);
            }
            CHECK(c->ranks[r]->sent[p] == sent && c->ranks[r]->received[p] == got,
                  "rank %d, peer %d: %llu and %llu bytes instead of %llu and %llu", r, p,
                  (unsigned long long)c->ranks[r]->sent[p], (unsigned long long)c->ranks[r]->received[p],
                  (unsigned long long)sent, (unsigned long long)got);
        }
    }
    CHECK(c->one_call == (uint64_t)by_copy_engine * RANKS, "%llu by one call", (unsigned long long)c->one_call);
    if (version == 4)
        CHECK(timed == 0, "version 4 does not tell of streams");
    else
        CHECK(timed >= (uint64_t)exchanges / 8, "%llu times", (unsigned long long)timed);
    json_int_t groups = json_integer_value(json_object_get(c->counters, "plain_groups"));
    CHECK(groups == plain * RANKS, "%lld plain groups instead of %d", (long long)groups, plain * RANKS);
}

static void check_trace(const char *folder)
{
    struct ry_err err;
    struct ry_trace *trace = ry_trace_open(folder, &err);
    CHECK(trace, "%s", err.msg);
    CHECK(trace->ncomms == 2, "%d communicators", trace->ncomms);
    int a = 0, b = 0;
    for (int n = 0; n < EXCHANGES; n++) {
        a += n % 7 == 0 || n % 7 == 1 || (version != 4 && (n % 7 == 3 || n % 7 == 5)) || n % 7 == 6;
        a += version == 4 && n % 7 == 6;
        b += version != 4 && n % 7 == 5;
    }
    check_comm(trace, COMM_A, EXCHANGES, a, version == 6);
    check_comm(trace, COMM_B, (EXCHANGES + 3) / 4, b, 0);
    const struct ry_trace_comm *c = find(trace, COMM_A);
    CHECK(c->name && !strcmp(c->name, "experts"), "name %s", c->name ? c->name : "(none)");
    if (version != 4)
        CHECK(c->gathers, "all-gathers of int64 before exchanges");
    CHECK(json_integer_value(json_object_get(c->counters, "calls.allgather")) == RANKS * ((EXCHANGES + 4) / 7),
          "all-gathers");
    ry_trace_close(trace);
}

/* ---- the other cases ---- */

static void loads(void)
{
    static const char *const names[] = {"mmap", "munmap", "brk", "madvise"};
    unsigned char before[4][16];
    struct sigaction was[NSIG], is;
    for (int i = 0; i < 4; i++)
        memcpy(before[i], dlsym(RTLD_DEFAULT, names[i]), 16);
    for (int s = 1; s < NSIG; s++)
        sigaction(s, NULL, &was[s]);
    char **env = environ;
    load(RTLD_NOW | RTLD_LOCAL);
    for (int i = 0; i < 4; i++)
        CHECK(!memcmp(before[i], dlsym(RTLD_DEFAULT, names[i]), 16), "UCX has overwritten %s", names[i]);
    for (int s = 1; s < NSIG; s++)
        CHECK(sigaction(s, NULL, &is) || is.sa_handler == was[s].sa_handler, "UCX has taken signal %d", s);
    struct rank r = {.rank = 0};
    init(&r, &r.a, COMM_A, NULL, true);
    CHECK(environ == env && !getenv("UCX_MEM_EVENTS"), "the environment is as it was");
    exit(0);
}

static void *nothing(const char *name)
{
    return !strcmp(name, "railyard_emu_version") ? (void *)railyard_emu_version : NULL;
}

static void second(void)
{
    static struct ry_host host = {
        .version = RY_HOOKS_VERSION, .size = sizeof host, .find = nothing, .nccl_path = "none"};
    struct ry_hooks hooks;
    char why[256] = "";
    void *lib = load(RTLD_NOW | RTLD_LOCAL);
    ry_engine_open_fn open_engine = (ry_engine_open_fn)dlsym(lib, RY_ENGINE_ENTRY);
    CHECK(!open_engine(&host, &hooks, why, sizeof why), "%s", why);
    struct rank r = {.rank = 0};
    init(&r, &r.a, COMM_A, NULL, false);
    CHECK(open_engine(&host, &hooks, why, sizeof why) && strstr(why, "already"), "one at a time: %s", why);
    exit(0);
}

static void idle(void)
{
    load(RTLD_NOW | RTLD_LOCAL);
    struct rank r = {.rank = 0};
    init(&r, &r.a, COMM_A, NULL, false);
    exit(0);
}

/* Of a plugin that slows NCCL down nobody would want a report. */
static void cost(void)
{
    enum { ROUNDS = 4000 };
    load(RTLD_NOW | RTLD_LOCAL);
    struct rank r = {.rank = 0};
    init(&r, &r.a, COMM_A, NULL, true);
    init(&r, &r.b, COMM_B, NULL, true);
    double best = 1e9;
    for (int n = 0; n < ROUNDS; n++) {
        uint64_t began = ry_now_ns();
        exchange(&r, r.a, COMM_A, KINDS); /* PLAIN */
        double took = (double)(ry_now_ns() - began);
        best = took < best ? took : best;
    }
    printf("events of an exchange of %d ranks, recording included: %.0f ns at best\n", RANKS, best);
    CHECK(best < 20000, "%.0f ns", best);
    exit(0);
}

static int in_child(void (*f)(void))
{
    fflush(NULL);
    pid_t child = fork();
    int status;
    if (!child)
        f();
    CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(int argc, char **argv)
{
    CHECK(argc == 4, "usage: profiler_cases CASE ENGINE FOLDER");
    engine_path = argv[2];
    version = argv[1][0] == 'v' ? atoi(argv[1] + 1) : 5;
    setenv("RAILYARD_TRACE", argv[3], 1);
    setenv("RAILYARD_SAMPLE", "1", 1);
    if (!strcmp(argv[1], "loads"))
        return in_child(loads);
    if (!strcmp(argv[1], "cost")) {
        unsetenv("RAILYARD_SAMPLE");
        return in_child(cost);
    }
    if (!strcmp(argv[1], "second"))
        return in_child(second);
    if (!strcmp(argv[1], "idle")) {
        unsetenv("RAILYARD_TRACE");
        int bad = in_child(idle);
        setenv("RAILYARD_TRACE", argv[3], 1);
        setenv("RAILYARD_DISABLE", "1", 1);
        return bad ? bad : in_child(idle);
    }
    int bad = in_child(job);
    CHECK(!bad, "the job ended with %d", bad);
    check_trace(argv[3]);
    return 0;
}
