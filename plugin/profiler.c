/*
 * profiler.c: Railyard as NCCL's profiler plugin: NCCL_PROFILER_PLUGIN=librailyard-engine.so, for jobs under which
 * nothing can be preloaded (NCCL linked statically, or reached by ctypes).
 *
 * Owns: recognizing exchanges in the events that NCCL tells of, and handing them to the engine by the same hooks
 * (hooks.h) as the preload does. Nothing can be changed from here: the engine only observes. Not: what the events look
 * like (nccl_profiler.h), what is recorded of an exchange (src/engine, src/record).
 *
 * From version 5 on the job's thread tells of a group (GROUP_API), then of each of its calls (P2P_API; no peer), and,
 * as the group is launched, of the same calls with their peers (P2P), which name the group they belong to; then the
 * group stops. That launch may be late, on another thread: for communicators made without blocking, and while graphs
 * run. What was captured into a graph is left out. A send and a receive to oneself in place never show up in P2P; they
 * are taken from the calls. Version 4 only tells of launches; an exchange may be several of them there.
 *
 * Threads: any, at once; a communicator's state is under its lock, held for a few hundred instructions, never while
 * anything is waited for. Handles given to NCCL are numbers, not addresses: an event that comes too late finds nothing
 * and is passed over. Communicators' states are kept for reuse, never freed.
 */
#include "nccl_profiler.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/clock.h"
#include "base/log.h"
#include "hooks.h"

int railyard_engine_open(const struct ry_host *host, struct ry_hooks *hooks, char *why, size_t why_size);

enum { SEND, RECV };

/* A communicator, and what of the group at hand concerns it. */
struct watched {
    struct watched *next; /* all there ever were */
    pthread_mutex_t lock;
    bool used, groups_told; /* version 5 or later */
    void *engine;           /* its handle */
    int nranks, rank;
    struct ry_comm_counts counts;
    bool likely; /* the group before was an exchange: this one is timed if it is its turn */
    /* the group */
    uint64_t group;             /* its number; 0: none yet */
    uint64_t calls[2], told[2]; /* p2p calls the job made; of which the peers are known */
    uint64_t called_bytes[2];   /* of the calls */
    uint64_t told_bytes[2];
    bool stopped, no_exchange; /* over, as far as the job's thread goes; holds what no exchange does */
    bool mixed;                /* types */
    int type;
    void *stream, *clock;
    uint64_t wall_ns;
    uint64_t *count[2]; /* [nranks], bytes */
    uint8_t *seen;      /* [nranks], bit of SEND and RECV */
};

static struct {
    pthread_once_t once;
    pthread_mutex_t lock; /* guards the list, and `used` of its entries */
    struct watched *all;
    struct ry_hooks hooks;
    _Atomic bool watching;
    _Atomic uint64_t groups;
} plugin = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER};

/* The group that this thread is in. */
#define COMMS 16
static __thread struct {
    uint64_t number;
    struct watched *comm[COMMS];
    int comms, others; /* with p2p calls in it; collectives, and what found no place */
} group;

/* Handles: a number, and whether it is of a call or of the group. NCCL does not stop events whose handle is NULL. */
static void *handle_of(uint64_t number, bool call)
{
    return (void *)(uintptr_t)(number << 1 | call);
}

static uint64_t number_of(const void *handle)
{
    return (uintptr_t)handle >> 1;
}

/* ---- names ---- */

/* NCCL tells types by name, and has none for ncclUint8 before 2.29: "Unknown". */
static const struct type {
    const char *name;
    int type;
    unsigned bytes;
} types[] = {{"ncclBfloat16", 9, 2},   {"ncclFloat32", 7, 4}, {"ncclFloat16", 6, 2}, {"ncclInt64", 4, 8},
             {"ncclInt8", 0, 1},       {"ncclUint8", 1, 1},   {"ncclInt32", 2, 4},   {"ncclUint32", 3, 4},
             {"ncclUint64", 5, 8},     {"ncclFloat64", 8, 8}, {"Unknown", 1, 1},     {"ncclFloat8e4m3", 10, 1},
             {"ncclFloat8e5m2", 11, 1}};
#define TYPE_UINT8 1

static const struct type *type_of(const char *name)
{
    static const struct type unknown = {"", TYPE_UINT8, 1};
    for (size_t i = 0; name && i < sizeof types / sizeof *types; i++)
        if (!strcmp(name, types[i].name))
            return &types[i];
    ry_warn_once("NCCL's profiler interface names a type that is not known here, %s: its elements are counted as bytes",
                 name ? name : "(none)");
    return &unknown;
}

static unsigned bytes_of(int type)
{
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (types[i].type == type)
            return types[i].bytes;
    return 1;
}

static void count_call(struct watched *w, const char *func, size_t count, const char *type)
{
    static const struct {
        const char *name;
        enum ry_call call;
    } calls[] = {{"Send", RY_CALL_SEND},           {"Recv", RY_CALL_RECV},
                 {"AlltoAll", RY_CALL_ALLTOALL},   {"AllGather", RY_CALL_ALLGATHER},
                 {"AllReduce", RY_CALL_ALLREDUCE}, {"Broadcast", RY_CALL_BROADCAST},
                 {"Reduce", RY_CALL_REDUCE},       {"Gather", RY_CALL_GATHER},
                 {"Scatter", RY_CALL_SCATTER},     {"ReduceScatter", RY_CALL_REDUCESCATTER}};
    for (size_t i = 0; func && i < sizeof calls / sizeof *calls; i++) {
        if (strcmp(func, calls[i].name))
            continue;
        w->counts.calls[calls[i].call]++;
        w->counts.bytes[calls[i].call] += count * type_of(type)->bytes;
        return;
    }
}

/* ---- what a group comes to; the communicator's lock is held ---- */

static void drop_clock(struct watched *w)
{
    if (w->clock)
        plugin.hooks.exchange_seen(w->engine, NULL, w->clock, 0, false);
    w->clock = NULL;
}

/* One send to and one receive from every rank; in place, those to oneself are not told of. */
static bool is_exchange(struct watched *w, bool without_self)
{
    uint64_t n = (uint64_t)w->nranks;
    if (w->no_exchange || w->calls[SEND] != n || w->calls[RECV] != n || w->told[SEND] != w->told[RECV])
        return false;
    if (w->told[SEND] == n)
        return true;
    if (!without_self || w->told[SEND] != n - 1 || w->seen[w->rank] ||
        w->called_bytes[SEND] - w->told_bytes[SEND] != w->called_bytes[RECV] - w->told_bytes[RECV])
        return false;
    for (int d = SEND; d <= RECV; d++)
        w->count[d][w->rank] = w->called_bytes[d] - w->told_bytes[d];
    return true;
}

static void leave_group(struct watched *w)
{
    drop_clock(w);
    if (w->group && (w->calls[SEND] || w->calls[RECV])) {
        w->counts.plain_groups++;
        w->likely = false;
    }
    w->group = 0;
}

static void enter_group(struct watched *w, uint64_t number)
{
    leave_group(w);
    w->group = number;
    for (int d = SEND; d <= RECV; d++) {
        w->calls[d] = w->told[d] = w->called_bytes[d] = w->told_bytes[d] = 0;
        memset(w->count[d], 0, (size_t)w->nranks * sizeof *w->count[d]);
    }
    memset(w->seen, 0, (size_t)w->nranks);
    w->stopped = w->no_exchange = w->mixed = false;
    w->type = -1;
    w->stream = NULL;
    w->wall_ns = ry_wall_ns();
}

static void hand_over(struct watched *w, bool in_time)
{
    struct ry_exchange x = {.nranks = w->nranks,
                            .rank = w->rank,
                            .type = w->mixed ? TYPE_UINT8 : w->type,
                            .type_bytes = w->mixed ? 1 : bytes_of(w->type),
                            .send_count = w->count[SEND],
                            .recv_count = w->count[RECV],
                            .stream = w->stream,
                            .ordinal = w->counts.exchanges++};
    for (int d = SEND; d <= RECV; d++)
        for (int p = 0; p < w->nranks; p++)
            w->count[d][p] /= x.type_bytes;
    if (!in_time)
        drop_clock(w);
    plugin.hooks.exchange_seen(w->engine, &x, w->clock, w->wall_ns, true);
    w->clock = NULL;
    w->likely = true;
    w->group = 0;
}

static void see_type(struct watched *w, const struct type *t)
{
    if (w->type >= 0 && w->type != t->type)
        w->mixed = true;
    w->type = t->type;
}

/* A call and its peer. */
static void see_peer(struct watched *w, int direction, int peer, uint64_t bytes)
{
    if (peer < 0 || peer >= w->nranks || w->seen[peer] & 1u << direction) {
        w->no_exchange = true;
        return;
    }
    w->seen[peer] |= (uint8_t)(1u << direction);
    w->count[direction][peer] = bytes;
    w->told[direction]++;
    w->told_bytes[direction] += bytes;
}

static int direction_of(const char *func)
{
    return !func ? -1 : !strcmp(func, "Send") ? SEND : !strcmp(func, "Recv") ? RECV : -1;
}

/* ---- events, version 5 and later ---- */

static void enlist(struct watched *w)
{
    for (int i = 0; i < group.comms; i++)
        if (group.comm[i] == w)
            return;
    if (group.comms < COMMS)
        group.comm[group.comms++] = w;
    else
        group.others++;
}

static void *call_made(struct watched *w, const struct ry_prof_event *e)
{
    int d = direction_of(e->p2p_api.func);
    uint64_t number = number_of(e->parent);
    const struct type *t = type_of(e->p2p_api.type);
    pthread_mutex_lock(&w->lock);
    count_call(w, e->p2p_api.func, e->p2p_api.count, e->p2p_api.type);
    if (d < 0 || !number || number != group.number || e->p2p_api.captured) {
        pthread_mutex_unlock(&w->lock);
        if (e->p2p_api.captured)
            ry_warn_once("NCCL calls captured into CUDA graphs are not seen by the profiler plugin: their exchanges "
                         "are missing in "
                         "the trace");
        return NULL;
    }
    if (w->group != number) {
        if (w->group && w->stopped && is_exchange(w, true))
            hand_over(w, false);
        enter_group(w, number);
        enlist(w);
        w->stream = e->p2p_api.stream;
        if (w->likely)
            w->clock = plugin.hooks.exchange_clock(w->engine, w->counts.exchanges, w->stream);
    }
    if (w->stream != e->p2p_api.stream)
        w->no_exchange = true;
    see_type(w, t);
    w->calls[d]++;
    w->called_bytes[d] += (uint64_t)e->p2p_api.count * t->bytes;
    pthread_mutex_unlock(&w->lock);
    return handle_of(number, true);
}

static void call_launched(struct watched *w, const struct ry_prof_event *e)
{
    int d = direction_of(e->p2p.func);
    uint64_t number = number_of(e->parent);
    pthread_mutex_lock(&w->lock);
    if (number && number == w->group && d >= 0) {
        see_peer(w, d, e->p2p.peer, (uint64_t)e->p2p.count * type_of(e->p2p.type)->bytes);
        if (w->stopped && is_exchange(w, false)) /* launched behind the job's back */
            hand_over(w, false);
    }
    pthread_mutex_unlock(&w->lock);
}

static void group_over(void)
{
    bool alone = group.comms == 1 && !group.others;
    for (int i = 0; i < group.comms; i++) {
        struct watched *w = group.comm[i];
        pthread_mutex_lock(&w->lock);
        if (w->group == group.number) {
            w->stopped = true;
            w->no_exchange |= !alone;
            if (is_exchange(w, true))
                hand_over(w, true);
            else if (w->told[SEND] + w->told[RECV] < w->calls[SEND] + w->calls[RECV])
                drop_clock(w); /* what is missing may come yet */
            else
                leave_group(w);
        }
        pthread_mutex_unlock(&w->lock);
    }
    group.number = 0;
}

static void collective(struct watched *w, const struct ry_prof_event *e)
{
    group.others++;
    pthread_mutex_lock(&w->lock);
    count_call(w, e->coll_api.func, e->coll_api.count, e->coll_api.type);
    void *engine = w->engine;
    pthread_mutex_unlock(&w->lock);
    if (plugin.hooks.int64_allgather && e->coll_api.func && !strcmp(e->coll_api.func, "AllGather") &&
        type_of(e->coll_api.type)->type == 4)
        plugin.hooks.int64_allgather(engine, e->coll_api.count);
}

/* An all-to-all by copy engines: one call, equal counts. */
static void by_copy_engine(struct watched *w, const struct ry_prof_event *e)
{
    if (!e->coll.func || strcmp(e->coll.func, "AlltoAll"))
        return;
    const struct type *t = type_of(e->coll.type);
    pthread_mutex_lock(&w->lock);
    enter_group(w, atomic_fetch_add(&plugin.groups, 1) + 1);
    w->type = t->type;
    for (int p = 0; p < w->nranks; p++)
        w->count[SEND][p] = w->count[RECV][p] = (uint64_t)e->coll.count * t->bytes;
    hand_over(w, false);
    pthread_mutex_unlock(&w->lock);
}

/* `handle` was cleared: what is not of interest is not stopped. */
static int start_v5(void *context, void **handle, struct ry_prof_event *e)
{
    struct watched *w = context;
    *handle = NULL;
    if (!w || !atomic_load_explicit(&plugin.watching, memory_order_acquire))
        return 0;
    switch (e->type.v5) {
    case RY_PROF_GROUP_API:
        group.number = atomic_fetch_add_explicit(&plugin.groups, 1, memory_order_relaxed) + 1;
        group.comms = group.others = 0;
        *handle = handle_of(group.number, false);
        break;
    case RY_PROF_P2P_API:
        *handle = call_made(w, e);
        break;
    case RY_PROF_P2P:
        call_launched(w, e);
        break;
    case RY_PROF_COLL_API:
        collective(w, e);
        break;
    case RY_PROF_CE_COLL:
        by_copy_engine(w, e);
        break;
    default:
        break;
    }
    return 0;
}

static int stop_v5(void *handle)
{
    if (atomic_load_explicit(&plugin.watching, memory_order_acquire) && group.number && !((uintptr_t)handle & 1) &&
        number_of(handle) == group.number)
        group_over();
    return 0;
}

/* ---- events, version 4 ---- */

/* What a large group does is launched in pieces: the one with the self-copy is taken for the beginning of an exchange.
 */
static bool begun(const struct watched *w)
{
    return w->group && !w->no_exchange && w->seen[w->rank] == (1 << SEND | 1 << RECV);
}

static void launch_begins(struct watched *w, uint64_t number)
{
    pthread_mutex_lock(&w->lock);
    if (begun(w))
        w->group = number;
    else
        enter_group(w, number);
    pthread_mutex_unlock(&w->lock);
    group.number = number;
    group.comm[0] = w;
}

static void launch_holds(struct watched *w, const struct ry_prof_event *e)
{
    int d = direction_of(e->p2p.func);
    const struct type *t = type_of(e->p2p.type);
    pthread_mutex_lock(&w->lock);
    if (d >= 0 && number_of(e->parent) == w->group) {
        count_call(w, e->p2p.func, e->p2p.count, e->p2p.type);
        see_type(w, t);
        w->calls[d]++;
        see_peer(w, d, e->p2p.peer, (uint64_t)e->p2p.count * t->bytes);
    }
    pthread_mutex_unlock(&w->lock);
}

static void launch_ends(struct watched *w, uint64_t number)
{
    pthread_mutex_lock(&w->lock);
    if (w->group == number) {
        if (is_exchange(w, false))
            hand_over(w, false);
        else if (!begun(w))
            leave_group(w);
    }
    pthread_mutex_unlock(&w->lock);
    group.number = 0;
}

static int start_v4(void *context, void **handle, struct ry_prof_event *e)
{
    struct watched *w = context;
    *handle = NULL;
    if (!w || !atomic_load_explicit(&plugin.watching, memory_order_acquire))
        return 0;
    switch (e->type.v4) {
    case RY_PROF_GROUP: {
        uint64_t number = atomic_fetch_add_explicit(&plugin.groups, 1, memory_order_relaxed) + 1;
        launch_begins(w, number);
        *handle = handle_of(number, false);
        break;
    }
    case RY_PROF_P2P:
        launch_holds(w, e);
        break;
    case RY_PROF_COLL:
        pthread_mutex_lock(&w->lock);
        count_call(w, e->coll.func, e->coll.count, e->coll.type);
        w->no_exchange = true; /* in the same launch */
        pthread_mutex_unlock(&w->lock);
        break;
    default:
        break;
    }
    return 0;
}

static int stop_v4(void *handle)
{
    if (atomic_load_explicit(&plugin.watching, memory_order_acquire) && group.number &&
        number_of(handle) == group.number)
        launch_ends(group.comm[0], group.number);
    return 0;
}

/* Nothing that changes its state is asked for. */
static int record(void *handle, int state, void *args)
{
    return 0;
}

/* ---- the plugin comes and goes ---- */

void ry_quiet_over(void);

/* When NCCL opens the engine: what it needs has run its constructors by now, see quiet.c. */
__attribute__((constructor)) static void opened(void)
{
    ry_quiet_over();
}

static void *find(const char *name)
{
    return dlsym(RTLD_DEFAULT, name); /* NULL where NCCL is linked statically, as is to be expected here */
}

static void counts_of(void *nccl, struct ry_comm_counts *out)
{
    struct watched *w = nccl;
    pthread_mutex_lock(&w->lock);
    *out = w->counts;
    pthread_mutex_unlock(&w->lock);
}

static void at_exit(void)
{
    if (atomic_exchange(&plugin.watching, false))
        plugin.hooks.closing(counts_of);
}

/* A forked child has none of the engine's threads, and must not write its parent's trace. */
static void in_child(void)
{
    atomic_store(&plugin.watching, false);
}

/* As the preload reads it. */
static bool disabled(void)
{
    const char *v = getenv("RAILYARD_DISABLE");
    return v && (!strcmp(v, "1") || !strcasecmp(v, "yes") || !strcasecmp(v, "on") || !strcasecmp(v, "true"));
}

/* An address in the NCCL that calls us. */
static _Atomic(void *) caller;

/* Which library that is (libtorch_cuda.so, the program itself, …), and its version if it tells. */
static void name_nccl(struct ry_host *host)
{
    Dl_info at;
    int (*version)(int *);
    void *lib, *symbol;
    if (!dladdr(atomic_load(&caller), &at) || !at.dli_fname || !(host->nccl_path = strdup(at.dli_fname)))
        return;
    if (!(lib = dlopen(at.dli_fname, RTLD_LAZY | RTLD_NOLOAD)))
        return;
    if ((symbol = dlsym(lib, "ncclGetVersion"))) {
        memcpy(&version, &symbol, sizeof version);
        version(&host->nccl_version);
    }
    dlclose(lib);
}

static void open_engine(void)
{
    static struct ry_host host = {
        .version = RY_HOOKS_VERSION, .size = sizeof host, .find = find, .observe_only = true, .nccl_path = "(unknown)"};
    char why[512] = "";
    if (disabled())
        return;
    if (!getenv("RAILYARD_TRACE") || !*getenv("RAILYARD_TRACE")) {
        ry_warn("the profiler plugin has nothing to do: set RAILYARD_TRACE to the folder to record in");
        return;
    }
    name_nccl(&host);
    if (railyard_engine_open(&host, &plugin.hooks, why, sizeof why)) {
        ry_log(strstr(why, "already") ? RY_LOG_INFO : RY_LOG_WARN, "the profiler plugin observes nothing: %s", why);
        return;
    }
    if (!plugin.hooks.exchange_seen) /* nothing is recorded: said already */
        return;
    pthread_atfork(NULL, NULL, in_child);
    atexit(at_exit);
    atomic_store_explicit(&plugin.watching, true, memory_order_release);
}

static bool make_room(struct watched *w, int nranks)
{
    size_t n = (size_t)nranks;
    for (int d = SEND; d <= RECV; d++)
        w->count[d] = calloc(n, sizeof *w->count[d]);
    w->seen = calloc(n, sizeof *w->seen);
    return w->count[SEND] && w->count[RECV] && w->seen;
}

static void free_room(struct watched *w)
{
    for (int d = SEND; d <= RECV; d++) {
        free(w->count[d]);
        w->count[d] = NULL;
    }
    free(w->seen);
    w->seen = NULL;
}

static struct watched *take(void)
{
    struct watched *w;
    pthread_mutex_lock(&plugin.lock);
    for (w = plugin.all; w && w->used; w = w->next)
        ;
    if (!w && (w = calloc(1, sizeof *w))) {
        pthread_mutex_init(&w->lock, NULL);
        w->next = plugin.all;
        plugin.all = w;
    }
    if (w)
        w->used = true;
    pthread_mutex_unlock(&plugin.lock);
    return w;
}

static void give_back(struct watched *w)
{
    pthread_mutex_lock(&plugin.lock);
    w->used = false;
    pthread_mutex_unlock(&plugin.lock);
}

static int communicator(void **context, int *mask, const char *name, uint64_t id, int nranks, int rank,
                        bool groups_told)
{
    *context = NULL;
    pthread_once(&plugin.once, open_engine);
    if (!atomic_load_explicit(&plugin.watching, memory_order_acquire) || nranks < 1)
        return 0;
    struct watched *w = take();
    if (!w)
        return 0;
    struct ry_comm_info info = {.nccl = w,
                                .birth = RY_BIRTH_SEEN,
                                .nranks = nranks,
                                .rank = rank,
                                .device = RY_DEVICE_CURRENT,
                                .blocking = true,
                                .name = name,
                                .key = id ? id : 1};
    pthread_mutex_lock(&w->lock);
    w->nranks = nranks;
    w->rank = rank;
    w->counts = (struct ry_comm_counts){0};
    w->group = 0;
    w->likely = false;
    w->clock = NULL;
    bool room = make_room(w, nranks);
    pthread_mutex_unlock(&w->lock);
    w->engine = room ? plugin.hooks.comm_created(&info) : NULL;
    if (!w->engine) {
        free_room(w);
        give_back(w);
        return 0;
    }
    *context = w;
    /* one for all communicators of the process; what is not asked for costs NCCL nothing, above all no events of
     * kernels and proxies */
    *mask = groups_told ? RY_PROF_GROUP_API | RY_PROF_COLL_API | RY_PROF_P2P_API | RY_PROF_P2P | RY_PROF_CE_COLL
                        : RY_PROF_GROUP | RY_PROF_COLL | RY_PROF_P2P;
    return 0;
}

static int init_v4(void **context, int *mask, const char *name, uint64_t id, int nnodes, int nranks, int rank,
                   void *logger)
{
    atomic_store(&caller, __builtin_return_address(0));
    return communicator(context, mask, name, id, nranks, rank, false);
}

static int init_v5(void **context, uint64_t id, int *mask, const char *name, int nnodes, int nranks, int rank,
                   void *logger)
{
    atomic_store(&caller, __builtin_return_address(0));
    return communicator(context, mask, name, id, nranks, rank, true);
}

static int finalize(void *context)
{
    struct watched *w = context;
    if (!w || !atomic_load_explicit(&plugin.watching, memory_order_acquire))
        return 0; /* at the process's end closing() sees to it */
    pthread_mutex_lock(&w->lock);
    if (w->group && w->stopped && is_exchange(w, true))
        hand_over(w, false);
    leave_group(w);
    struct ry_comm_counts counts = w->counts;
    void *engine = w->engine;
    w->engine = NULL;
    pthread_mutex_unlock(&w->lock);
    plugin.hooks.comm_ended(engine, RY_DEATH_DESTROY, &counts);
    free_room(w);
    give_back(w);
    return 0;
}

#define EXPORT __attribute__((visibility("default")))
EXPORT struct ry_prof_v4 ncclProfiler_v4 = {"Railyard", init_v4, start_v4, stop_v4, record, finalize};
EXPORT struct ry_prof_v5 ncclProfiler_v5 = {"Railyard", init_v5, start_v5, stop_v5, record, finalize};
EXPORT struct ry_prof_v5 ncclProfiler_v6 = {"Railyard", init_v5, start_v5, stop_v5, record, finalize};
