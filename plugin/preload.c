/*
 * preload.c: the NCCL functions that librailyard.so stands in front of, and what happens around each.
 *
 * Owns: the intercepted functions, opening the engine when the first communicator is made, and telling it of
 * communicators and exchanges. Not: finding NCCL (real.c), what a group holds (group.c), the table of communicators
 * (comms.c), anything done with an exchange (the engine).
 *
 * The way of one exchange: ncclGroupStart → ncclSend/ncclRecv, noted by group.c and passed on at once → the outermost
 * ncclGroupEnd: begin_exchange() asks group.c whether it was an exchange and tells the engine; end_exchange() does so
 * again after the real call. Where the engine wants to carry it out by itself, group.c keeps the calls back, and
 * offer_exchange() gives it to the engine, or to NCCL after all.
 *
 * In a process that never calls NCCL nothing here ever runs: there is no constructor. Every failure of ours ends in
 * plain NCCL with one warning; from then on, and in forked children, each function is one test and a jump.
 */
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "base/log.h"
#include "control/load.h"
#include "group.h"
#include "railyard.h"
#include "real.h"

enum { UNBORN, WATCHING, PASSIVE };
static _Atomic int state = UNBORN;
static struct ry_hooks hooks;

/* ---- starting ---- */

static bool disabled(void)
{
    const char *v = getenv("RAILYARD_DISABLE");
    return v && (!strcmp(v, "1") || !strcasecmp(v, "yes") || !strcasecmp(v, "on") || !strcasecmp(v, "true"));
}

/* The first NCCL call of the process. */
static __attribute__((noinline)) bool start(void)
{
    if (!ry_real_load())
        return false;
    int unborn = UNBORN;
    atomic_compare_exchange_strong(&state, &unborn, disabled() ? PASSIVE : WATCHING);
    return true;
}

static inline bool started(void)
{
    return __builtin_expect(atomic_load_explicit(&state, memory_order_acquire) != UNBORN, 1) || start();
}

static inline bool watching(const struct ry_group *g)
{
    return atomic_load_explicit(&state, memory_order_relaxed) == WATCHING && !g->inside;
}

/* ---- calls held back ---- */

static ncclResult_t pass_one(const struct ry_group *g, int d, int peer)
{
    if (d == 2)
        return ry_real.ncclAlltoAll(g->buf[0][0], g->buf[1][0], g->count[0][0], (ncclDataType_t)g->type, g->nccl,
                                    g->stream);
    ncclDataType_t type = (ncclDataType_t)g->peer_type[d][peer];
    return d ? ry_real.ncclRecv(g->buf[1][peer], g->count[1][peer], type, peer, g->nccl, g->stream)
             : ry_real.ncclSend(g->buf[0][peer], g->count[0][peer], type, peer, g->nccl, g->stream);
}

/*
 * To NCCL with what is held, within the group that is open there. A failure is kept until a call of the job can return
 * it. NCCL must not see a communicator that another thread has aborted: its handle may be gone.
 */
static __attribute__((noinline)) void pass_held_on(struct ry_group *g)
{
    ncclResult_t r = ncclInternalError; /* as NCCL's own waits end */
    g->inside++;
    if (!atomic_load(&g->comm->aborted))
        r = ry_group_replay(g, pass_one);
    g->held = 0;
    g->inside--;
    if (g->failed == ncclSuccess)
        g->failed = r;
}

static ncclResult_t take_failure(struct ry_group *g)
{
    ncclResult_t r = g->failed;
    g->failed = ncclSuccess;
    return r;
}

void ry_group_no_exchange(struct ry_group *g, bool tell)
{
    if (tell && hooks.stray) {
        g->inside++;
        hooks.stray(g->comm->engine);
        g->inside--;
    }
    if (g->held)
        pass_held_on(g);
}

/* The beginning of every intercepted function: only calls that the job itself makes, while we watch, go further. */
#define PASS_UNLESS_WATCHING(name, ...)                                                                                \
    struct ry_group *g = &ry_group;                                                                                    \
    if (!started() || !ry_real.name)                                                                                   \
        return ry_real_missing(#name);                                                                                 \
    if (!watching(g)) {                                                                                                \
        if (__builtin_expect(g->held, 0) && !g->inside)                                                                \
            pass_held_on(g);                                                                                           \
        return ry_real.name(__VA_ARGS__);                                                                              \
    }

/* Where a call was noted in a group: it is held back, or others were and NCCL refused one of them. */
#define RETURN_IF_KEPT(g)                                                                                              \
    do {                                                                                                               \
        if (__builtin_expect(g->held | (int)g->failed, 0))                                                             \
            return take_failure(g);                                                                                    \
    } while (0)

/* At the beginning of what cannot be part of an exchange. */
#define NO_EXCHANGE(g)                                                                                                 \
    do {                                                                                                               \
        if (g->depth) {                                                                                                \
            ry_group_other(g);                                                                                         \
            RETURN_IF_KEPT(g);                                                                                         \
        }                                                                                                              \
    } while (0)

/* The real function. What NCCL calls of its own public functions meanwhile is not the job's doing. */
#define REAL(name, ...)                                                                                                \
    ({                                                                                                                 \
        g->inside++;                                                                                                   \
        ncclResult_t result_ = ry_real.name(__VA_ARGS__);                                                              \
        g->inside--;                                                                                                   \
        result_;                                                                                                       \
    })

#define API __attribute__((visibility("default")))

/* ---- the engine ---- */

static void comm_gone(struct ry_comm *c)
{
    if (!c->engine || !hooks.comm_ended || atomic_load(&state) != WATCHING)
        return;
    struct ry_comm_counts counts;
    ry_comms_counts(c, &counts);
    hooks.comm_ended(c->engine, c->aborted ? RY_DEATH_ABORT : c->revoked ? RY_DEATH_REVOKE : RY_DEATH_DESTROY, &counts);
    c->engine = NULL;
}

static void counts_of(void *nccl, struct ry_comm_counts *out)
{
    const struct ry_comm *c = ry_comms_find(nccl);
    memset(out, 0, sizeof *out);
    if (c)
        ry_comms_counts(c, out);
}

static void at_exit(void)
{
    if (atomic_exchange(&state, PASSIVE) == WATCHING && hooks.closing)
        hooks.closing(counts_of);
}

/* A forked child (a data worker) has none of the engine's threads, and must not write its parent's trace. */
static void in_child(void)
{
    atomic_store(&state, PASSIVE);
}

static bool load_engine(char *why, size_t size)
{
    Dl_info self;
    char path[PATH_MAX];
    if (!dladdr((void *)load_engine, &self) || !self.dli_fname)
        return snprintf(why, size, "cannot tell where librailyard.so lies"), false;
    const char *slash = strrchr(self.dli_fname, '/');
    int dir = slash ? (int)(slash - self.dli_fname + 1) : 0;
    snprintf(path, sizeof path, "%.*slibrailyard-engine.so", dir, self.dli_fname);
    void *engine = ry_load_quietly(path, RTLD_NOW | RTLD_LOCAL); /* it brings UCX along */
    if (!engine)
        return snprintf(why, size, "%s", dlerror()), false;
    ry_engine_open_fn open_engine = (ry_engine_open_fn)dlsym(engine, RY_ENGINE_ENTRY);
    if (!open_engine)
        return snprintf(why, size, "%s has no " RY_ENGINE_ENTRY ": not Railyard's engine", path), false;
    static struct ry_host host = {.version = RY_HOOKS_VERSION, .size = sizeof host, .find = ry_real_find};
    host.nccl_path = ry_real_path();
    if (ry_real.ncclGetVersion)
        ry_real.ncclGetVersion(&host.nccl_version);
    return open_engine(&host, &hooks, why, size) == 0;
}

static void open_engine_once(void)
{
    char why[512] = "";
    ry_comms_last = comm_gone;
    ry_group.inside++;
    bool ok = load_engine(why, sizeof why);
    ry_group.inside--;
    if (ok) {
        pthread_atfork(NULL, NULL, in_child);
        atexit(at_exit);
        return;
    }
    memset(&hooks, 0, sizeof hooks);
    atomic_store(&state, PASSIVE);
    ry_warn("the engine did not start (%s): the job runs on plain NCCL", why);
}

static void open_engine(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_engine_once);
}

/* ---- communicators come ---- */

/* Tell the engine of a communicator whose ranks are known. */
static void introduce(struct ry_group *g, struct ry_comm *c)
{
    struct ry_comm_info info = {
        .nccl = atomic_load(&c->nccl),
        .birth = c->birth,
        .nranks = c->nranks,
        .rank = c->rank,
        .device = c->device,
        .blocking = c->blocking,
        .name = c->has_name ? c->name : NULL,
        .unique_id = c->has_id ? c->unique_id : NULL,
        .parent = c->parent ? c->parent->engine : NULL,
        .ordinal = c->ordinal,
        .color = c->color,
    };
    g->inside++;
    c->engine = hooks.comm_created ? hooks.comm_created(&info) : NULL;
    g->inside--;
    atomic_store(&c->pending, RY_SETTLED);
    if (c->parent)
        ry_comms_put(c->parent);
    c->parent = NULL;
}

/* Ask NCCL what we do not know yet. A communicator that is still being made must not be asked: NCCL would complain. */
static bool ask(struct ry_group *g, struct ry_comm *c)
{
    ncclComm_t nccl = atomic_load(&c->nccl);
    ncclResult_t st = ncclSuccess;
    if (!c->blocking && ry_real.ncclCommGetAsyncError &&
        (REAL(ncclCommGetAsyncError, nccl, &st) != ncclSuccess || st != ncclSuccess))
        return false;
    if (c->nranks < 0 && (!ry_real.ncclCommCount || REAL(ncclCommCount, nccl, &c->nranks) != ncclSuccess))
        return false;
    if (c->rank < 0 && (!ry_real.ncclCommUserRank || REAL(ncclCommUserRank, nccl, &c->rank) != ncclSuccess))
        return false;
    if (c->device < 0 && ry_real.ncclCommCuDevice)
        REAL(ncclCommCuDevice, nccl, &c->device);
    return true;
}

/* A communicator that was not ready when it was made may be now. Another thread may abort it meanwhile. */
static __attribute__((noinline)) void settle_pending(struct ry_group *g, ncclComm_t comm)
{
    struct ry_comm *c = ry_comms_get(comm);
    int pending = RY_PENDING;
    if (c && atomic_compare_exchange_strong(&c->pending, &pending, RY_ASKING)) {
        if (ask(g, c))
            introduce(g, c);
        else
            atomic_store(&c->pending, RY_PENDING);
    }
    if (c)
        ry_comms_put(c);
}

/* False when the handle is not there yet. */
static bool adopt(struct ry_group *g, struct ry_birth_note *b, ncclResult_t r)
{
    ncclComm_t nccl = b->where ? __atomic_load_n(b->where, __ATOMIC_ACQUIRE) : NULL;
    if (!nccl && r == ncclInProgress && b->where && b->parent && b->color != NCCL_SPLIT_NOCOLOR)
        return false;
    if (r == ncclInProgress) /* NCCL_COMM_BLOCKING may have decided so */
        b->blocking = false;
    struct ry_comm *old = nccl ? ry_comms_find(nccl) : NULL;
    if (old) /* it ended in a way that we did not see, and NCCL uses its memory again */
        ry_comms_remove(old);
    struct ry_comm *c = nccl ? ry_comms_add(nccl) : NULL;
    if (!c) {
        if (b->parent)
            ry_comms_put(b->parent);
        return true;
    }
    c->birth = b->birth, c->ordinal = b->ordinal, c->color = b->color, c->parent = b->parent;
    c->nranks = b->nranks, c->rank = b->rank, c->device = b->device;
    c->blocking = b->blocking, c->has_id = b->has_id, c->has_name = b->has_name;
    memcpy(c->unique_id, b->unique_id, sizeof c->unique_id);
    memcpy(c->name, b->name, sizeof c->name);
    if (ask(g, c))
        introduce(g, c);
    else
        atomic_store(&c->pending, RY_PENDING);
    ry_comms_put(c);
    return true;
}

/* The call that made communicators has returned, or the group that held it has ended. */
static void adopt_all(struct ry_group *g, ncclResult_t r)
{
    int kept = 0;
    for (int i = 0; i < g->nbirths; i++) {
        struct ry_birth_note *b = &g->births[i];
        bool done = false;
        if (!b->late && (r == ncclSuccess || r == ncclInProgress))
            done = adopt(g, b, r);
        else if (!b->late && (done = true) && b->parent)
            ry_comms_put(b->parent);
        if (done)
            continue;
        b->late = true;
        g->births[kept++] = *b;
    }
    g->nbirths = kept;
}

/*
 * The job has heard that `comm` is ready (or broken): if that was a non-blocking parent, its children's handles have been
 * written. Their places are the job's memory, which the job still needs at this moment, as this is the thread that gave
 * them. One whose handle comes even later is known by that handle, when it is asked after or used.
 */
static __attribute__((noinline)) void adopt_late(struct ry_group *g, ncclComm_t comm, ncclResult_t found)
{
    bool known = ry_comms_find(comm) != NULL;
    int kept = 0;
    for (int i = 0; i < g->nbirths; i++) {
        struct ry_birth_note *b = &g->births[i];
        bool ours = b->late && atomic_load(&b->parent->nccl) == comm, gone = b->late && !atomic_load(&b->parent->nccl);
        if (gone || (ours && found != ncclSuccess)) {
            ry_comms_put(b->parent);
            continue;
        }
        ncclComm_t nccl = ours || (b->late && !known) ? __atomic_load_n(b->where, __ATOMIC_ACQUIRE) : NULL;
        if (nccl && (ours || nccl == comm)) {
            adopt(g, b, ncclInProgress);
            continue;
        }
        g->births[kept++] = *b;
    }
    g->nbirths = kept;
}

static inline void settle(struct ry_group *g, ncclComm_t comm)
{
    if (comm == g->nccl)
        return;
    struct ry_comm *c = ry_comms_find(comm);
    if (__builtin_expect(!c && g->nbirths, 0))
        adopt_late(g, comm, ncclSuccess);
    else if (c && __builtin_expect(atomic_load_explicit(&c->pending, memory_order_relaxed) != RY_SETTLED, 0))
        settle_pending(g, comm);
}

/* Outside a group a communicator is there when the call returns; inside, when the group has ended. */
static ncclResult_t born(struct ry_group *g, ncclResult_t r)
{
    if (!g->depth)
        adopt_all(g, r);
    return r;
}

/* Within a group a failed call leaves nothing to adopt, whatever the others do. */
static void unborn(struct ry_group *g, ncclResult_t r, struct ry_birth_note *b)
{
    if (b && r != ncclSuccess && r != ncclInProgress)
        b->where = NULL;
}

static void note_config(struct ry_birth_note *b, const void *config)
{
    const struct ry_nccl_config *c = config;
    if (!b || !c || c->magic != RY_NCCL_CONFIG_MAGIC)
        return;
    if (c->size >= offsetof(struct ry_nccl_config, blocking) + sizeof c->blocking)
        b->blocking = c->blocking != 0;
    if (c->version >= 22700 && c->size >= sizeof *c && c->comm_name) {
        b->has_name = true;
        snprintf(b->name, sizeof b->name, "%s", c->comm_name);
    }
}

static struct ry_birth_note *note_init(struct ry_group *g, ncclComm_t *where, int nranks, int rank,
                                       const ncclUniqueId *id, const void *config)
{
    open_engine();
    struct ry_birth_note *b = ry_group_birth(g);
    if (!b)
        return NULL;
    b->where = where;
    b->birth = RY_BIRTH_INIT;
    b->nranks = nranks;
    b->rank = rank;
    b->has_id = true;
    memcpy(b->unique_id, id, sizeof b->unique_id);
    note_config(b, config);
    return b;
}

static struct ry_birth_note *note_child(struct ry_group *g, ncclComm_t *where, ncclComm_t parent, enum ry_birth birth,
                                        int color, const void *config)
{
    settle(g, parent); /* it need not have been used for anything else yet */
    struct ry_comm *p = ry_comms_get(parent);
    struct ry_birth_note *b = ry_group_birth(g);
    if (!b) {
        if (p)
            ry_comms_put(p);
        return NULL;
    }
    b->where = where;
    b->birth = birth;
    b->parent = p;
    b->color = color;
    if (p) /* every rank of the parent makes this call, so they all count alike */
        b->ordinal = atomic_fetch_add(birth == RY_BIRTH_SPLIT ? &p->splits : &p->shrinks, 1);
    if (p)
        b->blocking = p->blocking; /* a child without a config of its own inherits */
    note_config(b, config);
    return b;
}

API ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    PASS_UNLESS_WATCHING(ncclGetUniqueId, id)
    open_engine();
    /* Before 2.23 NCCL writes its 40 bytes only, and programs seldom clear the rest: there the engine could not tell ours */
    if (id && hooks.unique_id)
        memset(id, 0, sizeof *id);
    ncclResult_t r = REAL(ncclGetUniqueId, id);
    if (r == ncclSuccess && hooks.unique_id)
        hooks.unique_id((uint8_t *)id->internal);
    return r;
}

API ncclResult_t ncclCommInitRank(ncclComm_t *comm, int nranks, ncclUniqueId id, int rank)
{
    PASS_UNLESS_WATCHING(ncclCommInitRank, comm, nranks, id, rank)
    NO_EXCHANGE(g);
    struct ry_birth_note *b = note_init(g, comm, nranks, rank, &id, NULL);
    ncclResult_t r = REAL(ncclCommInitRank, comm, nranks, id, rank);
    unborn(g, r, b);
    return born(g, r);
}

API ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    PASS_UNLESS_WATCHING(ncclCommInitRankConfig, comm, nranks, id, rank, config)
    NO_EXCHANGE(g);
    struct ry_birth_note *b = note_init(g, comm, nranks, rank, &id, config);
    ncclResult_t r = REAL(ncclCommInitRankConfig, comm, nranks, id, rank, config);
    unborn(g, r, b);
    return born(g, r);
}

API ncclResult_t ncclCommInitRankScalable(ncclComm_t *newcomm, int nranks, int rank, int nids, ncclUniqueId *ids,
                                          ncclConfig_t *config)
{
    PASS_UNLESS_WATCHING(ncclCommInitRankScalable, newcomm, nranks, rank, nids, ids, config)
    NO_EXCHANGE(g);
    struct ry_birth_note *b = nids > 0 && ids ? note_init(g, newcomm, nranks, rank, &ids[0], config) : NULL;
    ncclResult_t r = REAL(ncclCommInitRankScalable, newcomm, nranks, rank, nids, ids, config);
    unborn(g, r, b);
    return born(g, r);
}

API ncclResult_t ncclCommInitAll(ncclComm_t *comms, int ndev, const int *devlist)
{
    PASS_UNLESS_WATCHING(ncclCommInitAll, comms, ndev, devlist)
    NO_EXCHANGE(g);
    static _Atomic uint32_t ordinal;
    open_engine();
    uint32_t o = atomic_fetch_add(&ordinal, 1);
    ncclResult_t r = REAL(ncclCommInitAll, comms, ndev, devlist);
    for (int i = 0; r == ncclSuccess && i < ndev; i++) {
        struct ry_birth_note *b = ry_group_birth(g);
        if (!b)
            break;
        b->where = &comms[i];
        b->birth = RY_BIRTH_INIT_ALL;
        b->nranks = ndev, b->rank = i;
        b->device = devlist ? devlist[i] : i;
        b->ordinal = o;
    }
    return born(g, r);
}

API ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *newcomm, ncclConfig_t *config)
{
    PASS_UNLESS_WATCHING(ncclCommSplit, comm, color, key, newcomm, config)
    NO_EXCHANGE(g);
    struct ry_birth_note *b = note_child(g, newcomm, comm, RY_BIRTH_SPLIT, color, config);
    ncclResult_t r = REAL(ncclCommSplit, comm, color, key, newcomm, config);
    unborn(g, r, b);
    return born(g, r);
}

API ncclResult_t ncclCommShrink(ncclComm_t comm, int *exclude, int nexclude, ncclComm_t *newcomm, ncclConfig_t *config,
                                int flags)
{
    PASS_UNLESS_WATCHING(ncclCommShrink, comm, exclude, nexclude, newcomm, config, flags)
    NO_EXCHANGE(g);
    struct ry_birth_note *b = note_child(g, newcomm, comm, RY_BIRTH_SHRINK, 0, config);
    ncclResult_t r = REAL(ncclCommShrink, comm, exclude, nexclude, newcomm, config, flags);
    unborn(g, r, b);
    return born(g, r);
}

/* ---- communicators go ---- */

API ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    PASS_UNLESS_WATCHING(ncclCommFinalize, comm)
    NO_EXCHANGE(g);
    return REAL(ncclCommFinalize, comm); /* it lives on until it is destroyed */
}

/* Out of the table before NCCL frees the handle: another thread may be given the same address at once. */
static void ended(ncclComm_t comm)
{
    struct ry_comm *c = ry_comms_find(comm);
    if (c)
        ry_comms_remove(c);
}

/* Another thread may wait for the engine's word on this communicator: end that wait. */
static void aborting(struct ry_group *g, struct ry_comm *c)
{
    if (atomic_load(&c->pending) != RY_SETTLED || !c->engine || !hooks.comm_aborting)
        return;
    g->inside++;
    hooks.comm_aborting(c->engine);
    g->inside--;
}

/*
 * A thread that holds an exchange back would go to NCCL with the handle as soon as the engine lets go of it, and must
 * not after NCCL has freed it; once `aborted` is seen it does not. It may also be in NCCL, on the engine's behalf,
 * where only the abort frees it: so this does not wait for long.
 */
static void wait_for_offers(struct ry_comm *c)
{
    for (int i = 0; i < 200 && atomic_load(&c->offering); i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

API ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    PASS_UNLESS_WATCHING(ncclCommDestroy, comm)
    NO_EXCHANGE(g);
    ended(comm);
    return REAL(ncclCommDestroy, comm);
}

API ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    PASS_UNLESS_WATCHING(ncclCommAbort, comm)
    NO_EXCHANGE(g);
    struct ry_comm *c = ry_comms_get(comm);
    if (c) {
        atomic_store(&c->aborted, true);
        aborting(g, c);
        wait_for_offers(c);
        ry_comms_remove(c);
        ry_comms_put(c);
    }
    return REAL(ncclCommAbort, comm);
}

API ncclResult_t ncclCommRevoke(ncclComm_t comm, int flags)
{
    PASS_UNLESS_WATCHING(ncclCommRevoke, comm, flags)
    NO_EXCHANGE(g);
    struct ry_comm *c = ry_comms_get(comm); /* stays: it can still be split, shrunk and must be destroyed */
    if (c) {
        atomic_store(&c->revoked, true);
        aborting(g, c);
        ry_comms_put(c);
    }
    return REAL(ncclCommRevoke, comm, flags);
}

/* Where a job that does not block learns that it may go on. */
API ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *now)
{
    PASS_UNLESS_WATCHING(ncclCommGetAsyncError, comm, now)
    ncclResult_t r = REAL(ncclCommGetAsyncError, comm, now);
    if (__builtin_expect(g->nbirths, 0) && r == ncclSuccess && *now != ncclInProgress)
        adopt_late(g, comm, *now);
    return r;
}

/* ---- groups and exchanges ---- */

struct running {
    bool on;   /* it is an exchange */
    bool told; /* the engine knows of it */
    void *cookie;
    struct ry_exchange x;
};

/* While paused the engine sees nothing, but what the other ranks may wait for. */
static inline bool unseen(const struct ry_comm *c)
{
    return atomic_load_explicit(&ry_group_paused, memory_order_relaxed) && !ry_group_wanted(c);
}

static inline void tell_begin(struct ry_group *g, struct running *run)
{
    run->told = g->comm->engine && (g->held || !unseen(g->comm));
    run->cookie = NULL;
    if (!run->told || !hooks.exchange_begin)
        return;
    g->inside++;
    run->cookie = hooks.exchange_begin(g->comm->engine, &run->x);
    g->inside--;
}

/* True: the engine has done it, with result *r. Means nothing where NCCL has the calls already. */
static inline bool offer(struct ry_group *g, struct running *run, ncclResult_t *r)
{
    int result = ncclSuccess;
    if (!run->told || !hooks.exchange_take)
        return false;
    g->inside++;
    bool taken = hooks.exchange_take(g->comm->engine, &run->x, run->cookie, &result);
    g->inside--;
    if (taken)
        *r = (ncclResult_t)result;
    return taken;
}

static inline void begin_exchange(struct ry_group *g, struct running *run)
{
    run->told = false;
    run->on = ry_group_exchange(g, &run->x);
    if (!run->on || run->x.held)
        return;
    ncclResult_t none;
    tell_begin(g, run);
    offer(g, run, &none);
}

/*
 * An exchange whose calls NCCL has not seen. The job's group, open there and empty, is ended first: the engine makes
 * groups of its own. What the engine does not want gets a new one.
 */
static __attribute__((noinline)) ncclResult_t offer_exchange(struct ry_group *g, struct running *run, bool grouped)
{
    struct ry_comm *c = g->comm;
    atomic_fetch_add(&c->offering, 1);
    ncclResult_t empty = grouped ? REAL(ncclGroupEnd) : ncclSuccess, r = empty;
    bool go = r == ncclSuccess || r == ncclInProgress;
    if (go) {
        tell_begin(g, run);
        go = !offer(g, run, &r);
    }
    if (go && grouped)
        r = REAL(ncclGroupStart);
    else if (go)
        r = ncclSuccess;
    if (go && r == ncclSuccess)
        pass_held_on(g);
    g->held = 0;
    atomic_fetch_sub(&c->offering, 1);
    if (go && grouped && r == ncclSuccess)
        r = REAL(ncclGroupEnd);
    ncclResult_t failed = take_failure(g);
    return failed != ncclSuccess ? failed : r != ncclSuccess ? r : empty;
}

static inline void end_exchange(struct ry_group *g, struct running *run, ncclResult_t r)
{
    if (run->on) {
        if (run->told && hooks.exchange_end) {
            g->inside++;
            hooks.exchange_end(g->comm->engine, &run->x, run->cookie, (int)r);
            g->inside--;
        }
        if (r == ncclSuccess || r == ncclInProgress)
            ry_comms_add_to(&g->comm->exchanges, 1);
    } else if (g->comm && g->calls[0] + g->calls[1]) {
        ry_comms_add_to(&g->comm->plain_groups, 1);
    }
    ry_group_reset(g);
}

API int railyard_pause(int on)
{
    return atomic_exchange(&ry_group_paused, on != 0);
}

API int railyard_strategy(const char *name)
{
    return atomic_load(&state) == WATCHING && hooks.strategy ? hooks.strategy(name) : -1;
}

API ncclResult_t ncclGroupStart(void)
{
    PASS_UNLESS_WATCHING(ncclGroupStart)
    ncclResult_t r = REAL(ncclGroupStart);
    if (r == ncclSuccess)
        g->depth++;
    return r;
}

API ncclResult_t ncclGroupEnd(void)
{
    PASS_UNLESS_WATCHING(ncclGroupEnd)
    if (g->depth != 1) {
        g->depth -= g->depth > 0;
        return REAL(ncclGroupEnd);
    }
    struct running run;
    begin_exchange(g, &run);
    g->depth = 0;
    ncclResult_t r = g->held ? offer_exchange(g, &run, true) : REAL(ncclGroupEnd);
    if (__builtin_expect(g->failed, 0)) /* of what was held until now; NCCL says the same, if all is well */
        r = take_failure(g);
    end_exchange(g, &run, r);
    if (__builtin_expect(g->nbirths, 0))
        adopt_all(g, r);
    return r;
}

API ncclResult_t ncclGroupSimulateEnd(ncclSimInfo_t *info)
{
    PASS_UNLESS_WATCHING(ncclGroupSimulateEnd, info)
    if (g->depth > 1)
        ry_group_other(g);
    if (g->held)
        pass_held_on(g);
    ncclResult_t failed = take_failure(g),
                 r = REAL(ncclGroupSimulateEnd, info); /* ends the group; nothing of it is run */
    g->depth -= g->depth > 0;
    if (!g->depth) {
        g->calls[0] = g->calls[1] = 0, g->bytes[0] = g->bytes[1] = 0;
        ry_group_reset(g);
        adopt_all(g, ncclInvalidUsage);
    }
    return failed != ncclSuccess ? failed : r;
}

/* A send or receive outside any group is one call, never an exchange. */
static inline void note_p2p(struct ry_group *g, int direction, const void *buf, size_t count, ncclDataType_t type,
                            int peer, ncclComm_t comm, cudaStream_t stream)
{
    settle(g, comm);
    ry_group_p2p(g, direction, buf, count, (int)type, peer, comm, stream);
    if (!g->depth) {
        ry_group_other(g);
        ry_group_reset(g);
    }
}

API ncclResult_t ncclSend(const void *buf, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                          cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclSend, buf, count, type, peer, comm, stream)
    note_p2p(g, 0, buf, count, type, peer, comm, stream);
    RETURN_IF_KEPT(g);
    return REAL(ncclSend, buf, count, type, peer, comm, stream);
}

API ncclResult_t ncclRecv(void *buf, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclRecv, buf, count, type, peer, comm, stream)
    note_p2p(g, 1, buf, count, type, peer, comm, stream);
    RETURN_IF_KEPT(g);
    return REAL(ncclRecv, buf, count, type, peer, comm, stream);
}

static inline struct ry_comm *count_call(enum ry_call call, size_t count, ncclDataType_t type, ncclComm_t comm)
{
    struct ry_comm *c = ry_comms_find(comm);
    if (!c)
        return NULL;
    atomic_fetch_add_explicit(&c->calls[call], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->bytes[call], count * ry_nccl_type_bytes((int)type), memory_order_relaxed);
    return c;
}

API ncclResult_t ncclAlltoAll(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                              cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclAlltoAll, send, recv, count, type, comm, stream)
    settle(g, comm);
    struct ry_comm *c = count_call(RY_CALL_ALLTOALL, count, type, comm);
    if (c) /* count is per peer */
        atomic_fetch_add_explicit(&c->bytes[RY_CALL_ALLTOALL],
                                  count * ry_nccl_type_bytes((int)type) * (size_t)(c->nranks > 0 ? c->nranks - 1 : 0),
                                  memory_order_relaxed);
    ry_group_alltoall(g, send, recv, count, (int)type, comm, stream);
    if (g->depth) {
        RETURN_IF_KEPT(g);
        return REAL(ncclAlltoAll, send, recv, count, type, comm, stream);
    }
    struct running run;
    begin_exchange(g, &run);
    ncclResult_t r =
        g->held ? offer_exchange(g, &run, false) : REAL(ncclAlltoAll, send, recv, count, type, comm, stream);
    end_exchange(g, &run, r);
    return r;
}

/* ---- everything else is counted ---- */

static inline void note_call(struct ry_group *g, enum ry_call call, size_t count, ncclDataType_t type, ncclComm_t comm)
{
    settle(g, comm);
    count_call(call, count, type, comm);
    if (g->depth)
        ry_group_other(g);
}

API ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                               cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclAllGather, send, recv, count, type, comm, stream)
    note_call(g, RY_CALL_ALLGATHER, count, type, comm);
    RETURN_IF_KEPT(g);
    if ((type == ncclInt64 || type == ncclUint64) && hooks.int64_allgather &&
        !atomic_load_explicit(&ry_group_paused, memory_order_relaxed)) {
        struct ry_comm *c = ry_comms_get(comm);
        if (c && c->engine) {
            g->inside++;
            hooks.int64_allgather(c->engine, count);
            g->inside--;
        }
        if (c)
            ry_comms_put(c);
    }
    return REAL(ncclAllGather, send, recv, count, type, comm, stream);
}

API ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclAllReduce, send, recv, count, type, op, comm, stream)
    note_call(g, RY_CALL_ALLREDUCE, count, type, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclAllReduce, send, recv, count, type, op, comm, stream);
}

API ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root,
                               ncclComm_t comm, cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclBroadcast, send, recv, count, type, root, comm, stream)
    note_call(g, RY_CALL_BROADCAST, count, type, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclBroadcast, send, recv, count, type, root, comm, stream);
}

API ncclResult_t ncclBcast(void *buf, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclBcast, buf, count, type, root, comm, stream)
    note_call(g, RY_CALL_BROADCAST, count, type, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclBcast, buf, count, type, root, comm, stream);
}

API ncclResult_t ncclReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                            ncclComm_t comm, cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclReduce, send, recv, count, type, op, root, comm, stream)
    note_call(g, RY_CALL_REDUCE, count, type, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclReduce, send, recv, count, type, op, root, comm, stream);
}

API ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                   ncclComm_t comm, cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclReduceScatter, send, recv, count, type, op, comm, stream)
    note_call(g, RY_CALL_REDUCESCATTER, count, type, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclReduceScatter, send, recv, count, type, op, comm, stream);
}

API ncclResult_t ncclGather(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                            cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclGather, send, recv, count, type, root, comm, stream)
    note_call(g, RY_CALL_GATHER, count, type, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclGather, send, recv, count, type, root, comm, stream);
}

API ncclResult_t ncclScatter(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                             cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclScatter, send, recv, count, type, root, comm, stream)
    note_call(g, RY_CALL_SCATTER, count, type, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclScatter, send, recv, count, type, root, comm, stream);
}

API ncclResult_t ncclPutSignal(const void *local, size_t count, ncclDataType_t type, int peer, ncclWindow_t window,
                               size_t offset, int signal, int ctx, unsigned int flags, ncclComm_t comm,
                               cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclPutSignal, local, count, type, peer, window, offset, signal, ctx, flags, comm, stream)
    note_call(g, RY_CALL_ONESIDED, count, type, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclPutSignal, local, count, type, peer, window, offset, signal, ctx, flags, comm, stream);
}

API ncclResult_t ncclSignal(int peer, int signal, int ctx, unsigned int flags, ncclComm_t comm, cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclSignal, peer, signal, ctx, flags, comm, stream)
    note_call(g, RY_CALL_ONESIDED, 0, ncclInt8, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclSignal, peer, signal, ctx, flags, comm, stream);
}

API ncclResult_t ncclWaitSignal(int n, ncclWaitSignalDesc_t *descs, ncclComm_t comm, cudaStream_t stream)
{
    PASS_UNLESS_WATCHING(ncclWaitSignal, n, descs, comm, stream)
    note_call(g, RY_CALL_ONESIDED, 0, ncclInt8, comm);
    RETURN_IF_KEPT(g);
    return REAL(ncclWaitSignal, n, descs, comm, stream);
}
