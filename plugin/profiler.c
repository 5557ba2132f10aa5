/*
 * profiler.c: Railyard as NCCL's profiler plugin: NCCL_PROFILER_PLUGIN=librailyard-engine.so, for jobs under which
 * nothing can be preloaded (NCCL linked statically, or reached by ctypes).
 *
 * Owns: what each event that NCCL tells of means, and the engine behind it, which is told by the same hooks
 * (hooks.h) as by the preload. Nothing can be changed from here: the engine only observes. Not: what the events look
 * like (nccl_profiler.h), putting them together (watched.h), what is recorded (src/engine, src/record).
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

#include "base/log.h"
#include "control/load.h"
#include "hooks.h"
#include "watched.h"

int railyard_engine_open(const struct ry_host *host, struct ry_hooks *hooks, char *why, size_t why_size);

static struct {
    pthread_once_t once;
    pthread_mutex_t lock; /* guards the list, and `used` of its entries */
    struct ry_watched *all;
    struct ry_hooks hooks;
    _Atomic bool watching;
    _Atomic uint64_t groups;
} plugin = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER};

/* The group that this thread is in. */
#define COMMS 16
static __thread struct {
    uint64_t number;
    struct ry_watched *comm[COMMS];
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

/* ---- events, version 5 and later ---- */

static void enlist(struct ry_watched *w)
{
    for (int i = 0; i < group.comms; i++)
        if (group.comm[i] == w)
            return;
    if (group.comms < COMMS)
        group.comm[group.comms++] = w;
    else
        group.others++;
}

static void *call_made(struct ry_watched *w, const struct ry_prof_event *e)
{
    int d = ry_prof_direction(e->p2p_api.func);
    uint64_t number = number_of(e->parent);
    const struct ry_prof_kind *t = ry_prof_type_of(e->p2p_api.type);
    pthread_mutex_lock(&w->lock);
    ry_watched_count(w, e->p2p_api.func, e->p2p_api.count, e->p2p_api.type);
    if (d < 0 || !number || number != group.number || e->p2p_api.captured) {
        pthread_mutex_unlock(&w->lock);
        if (e->p2p_api.captured)
            ry_warn_once("NCCL calls captured into CUDA graphs are not seen by the profiler plugin: their exchanges "
                         "are missing in "
                         "the trace");
        return NULL;
    }
    if (w->group != number) {
        if (w->group && w->stopped && ry_watched_is_exchange(w, true))
            ry_watched_hand_over(w, false);
        ry_watched_enter(w, number);
        enlist(w);
        w->stream = e->p2p_api.stream;
        if (w->likely)
            w->clock = plugin.hooks.exchange_clock(w->engine, w->counts.exchanges, w->stream);
    }
    if (w->stream != e->p2p_api.stream)
        w->no_exchange = true;
    ry_watched_type(w, t);
    w->calls[d]++;
    w->called_bytes[d] += (uint64_t)e->p2p_api.count * t->bytes;
    pthread_mutex_unlock(&w->lock);
    return handle_of(number, true);
}

static void call_launched(struct ry_watched *w, const struct ry_prof_event *e)
{
    int d = ry_prof_direction(e->p2p.func);
    uint64_t number = number_of(e->parent);
    pthread_mutex_lock(&w->lock);
    if (number && number == w->group && d >= 0) {
        ry_watched_peer(w, d, e->p2p.peer, (uint64_t)e->p2p.count * ry_prof_type_of(e->p2p.type)->bytes);
        if (w->stopped && ry_watched_is_exchange(w, false)) /* launched behind the job's back */
            ry_watched_hand_over(w, false);
    }
    pthread_mutex_unlock(&w->lock);
}

static void group_over(void)
{
    bool alone = group.comms == 1 && !group.others;
    for (int i = 0; i < group.comms; i++) {
        struct ry_watched *w = group.comm[i];
        pthread_mutex_lock(&w->lock);
        if (w->group == group.number) {
            w->stopped = true;
            w->no_exchange |= !alone;
            if (ry_watched_is_exchange(w, true))
                ry_watched_hand_over(w, true);
            else if (w->told[RY_SEND] + w->told[RY_RECV] < w->calls[RY_SEND] + w->calls[RY_RECV])
                ry_watched_drop_clock(w); /* what is missing may come yet */
            else
                ry_watched_leave(w);
        }
        pthread_mutex_unlock(&w->lock);
    }
    group.number = 0;
}

static void collective(struct ry_watched *w, const struct ry_prof_event *e)
{
    group.others++;
    pthread_mutex_lock(&w->lock);
    ry_watched_count(w, e->coll_api.func, e->coll_api.count, e->coll_api.type);
    void *engine = w->engine;
    pthread_mutex_unlock(&w->lock);
    if (plugin.hooks.int64_allgather && e->coll_api.func && !strcmp(e->coll_api.func, "AllGather") &&
        ry_prof_type_of(e->coll_api.type)->type == 4)
        plugin.hooks.int64_allgather(engine, e->coll_api.count);
}

/* An all-to-all by copy engines: one call, equal counts. */
static void by_copy_engine(struct ry_watched *w, const struct ry_prof_event *e)
{
    if (!e->coll.func || strcmp(e->coll.func, "AlltoAll"))
        return;
    const struct ry_prof_kind *t = ry_prof_type_of(e->coll.type);
    pthread_mutex_lock(&w->lock);
    ry_watched_enter(w, atomic_fetch_add(&plugin.groups, 1) + 1);
    w->type = t->type;
    w->one_call = true;
    for (int p = 0; p < w->nranks; p++)
        w->count[RY_SEND][p] = w->count[RY_RECV][p] = (uint64_t)e->coll.count * t->bytes;
    ry_watched_hand_over(w, false);
    pthread_mutex_unlock(&w->lock);
}

/* `handle` was cleared: what is not of interest is not stopped. */
static int start_v5(void *context, void **handle, struct ry_prof_event *e)
{
    struct ry_watched *w = context;
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
static bool begun(const struct ry_watched *w)
{
    return w->group && !w->no_exchange && w->seen[w->rank] == (1 << RY_SEND | 1 << RY_RECV);
}

static void launch_begins(struct ry_watched *w, uint64_t number)
{
    pthread_mutex_lock(&w->lock);
    if (begun(w))
        w->group = number;
    else
        ry_watched_enter(w, number);
    pthread_mutex_unlock(&w->lock);
    group.number = number;
    group.comm[0] = w;
}

static void launch_holds(struct ry_watched *w, const struct ry_prof_event *e)
{
    int d = ry_prof_direction(e->p2p.func);
    const struct ry_prof_kind *t = ry_prof_type_of(e->p2p.type);
    pthread_mutex_lock(&w->lock);
    if (d >= 0 && number_of(e->parent) == w->group) {
        ry_watched_count(w, e->p2p.func, e->p2p.count, e->p2p.type);
        ry_watched_type(w, t);
        w->calls[d]++;
        ry_watched_peer(w, d, e->p2p.peer, (uint64_t)e->p2p.count * t->bytes);
    }
    pthread_mutex_unlock(&w->lock);
}

static void launch_ends(struct ry_watched *w, uint64_t number)
{
    pthread_mutex_lock(&w->lock);
    if (w->group == number) {
        if (ry_watched_is_exchange(w, false))
            ry_watched_hand_over(w, false);
        else if (!begun(w))
            ry_watched_leave(w);
    }
    pthread_mutex_unlock(&w->lock);
    group.number = 0;
}

static int start_v4(void *context, void **handle, struct ry_prof_event *e)
{
    struct ry_watched *w = context;
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
        ry_watched_count(w, e->coll.func, e->coll.count, e->coll.type);
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

/*
 * NCCL opens us knowing nothing of control/load.h. So the engine is linked with -z initfirst: this runs before the
 * constructors of all libraries that the same dlopen() brings along, UCX's among them. Where it is opened quietly, by
 * the preload or by Python, it finds nothing to do. Ends when NCCL first calls.
 */
static struct ry_quiet quiet;

__attribute__((constructor)) static void opened(void)
{
    quiet = ry_quiet_begin();
}

static void *find(const char *name)
{
    return dlsym(RTLD_DEFAULT, name); /* NULL where NCCL is linked statically, as is to be expected here */
}

static void counts_of(void *nccl, struct ry_comm_counts *out)
{
    struct ry_watched *w = nccl;
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
    ry_quiet_end(quiet);
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

static bool make_room(struct ry_watched *w, int nranks)
{
    size_t n = (size_t)nranks;
    for (int d = RY_SEND; d <= RY_RECV; d++)
        w->count[d] = calloc(n, sizeof *w->count[d]);
    w->seen = calloc(n, sizeof *w->seen);
    return w->count[RY_SEND] && w->count[RY_RECV] && w->seen;
}

static void free_room(struct ry_watched *w)
{
    for (int d = RY_SEND; d <= RY_RECV; d++) {
        free(w->count[d]);
        w->count[d] = NULL;
    }
    free(w->seen);
    w->seen = NULL;
}

static struct ry_watched *take(void)
{
    struct ry_watched *w;
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

static void give_back(struct ry_watched *w)
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
    struct ry_watched *w = take();
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
    w->hooks = &plugin.hooks;
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
    struct ry_watched *w = context;
    if (!w || !atomic_load_explicit(&plugin.watching, memory_order_acquire))
        return 0; /* at the process's end closing() sees to it */
    pthread_mutex_lock(&w->lock);
    if (w->group && w->stopped && ry_watched_is_exchange(w, true))
        ry_watched_hand_over(w, false);
    ry_watched_leave(w);
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
