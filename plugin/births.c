/*
 * births.c: communicators come and go.
 *
 * Owns: the intercepted functions that make, split, shrink and end communicators, learning of each as soon as it is ready
 * (which is later than the call for those made in a group or without blocking), and telling the engine. Not: the table of
 * communicators (comms.c), what is done with them (preload.c).
 */
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "preload.h"

#define SOON 1.0 /* seconds: an abort does not wait for long for exchanges of other communicators */

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
    c->engine = ry_preload_hooks.comm_created ? ry_preload_hooks.comm_created(&info) : NULL;
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
void ry_births_settle_pending(struct ry_group *g, ncclComm_t comm)
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
void ry_births_adopt_all(struct ry_group *g, ncclResult_t r)
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
void ry_births_adopt_late(struct ry_group *g, ncclComm_t comm, ncclResult_t found)
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

/* Outside a group a communicator is there when the call returns; inside, when the group has ended. */
static ncclResult_t born(struct ry_group *g, ncclResult_t r)
{
    if (!g->depth)
        ry_births_adopt_all(g, r);
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
    ry_preload_open_engine();
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
    ry_births_settle(g, parent); /* it need not have been used for anything else yet */
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
    ry_preload_open_engine();
    /* Before 2.23 NCCL writes its 40 bytes only, and programs seldom clear the rest: there the engine could not tell ours */
    if (id && ry_preload_hooks.unique_id)
        memset(id, 0, sizeof *id);
    ncclResult_t r = REAL(ncclGetUniqueId, id);
    if (r == ncclSuccess && ry_preload_hooks.unique_id)
        ry_preload_hooks.unique_id((uint8_t *)id->internal);
    return r;
}

API ncclResult_t ncclCommInitRank(ncclComm_t *comm, int nranks, ncclUniqueId id, int rank)
{
    PASS_UNLESS_WATCHING(ncclCommInitRank, comm, nranks, id, rank)
    NO_EXCHANGE(g);
    struct ry_birth_note *b = note_init(g, comm, nranks, rank, &id, NULL);
    FREEING(0);
    ncclResult_t r = REAL(ncclCommInitRank, comm, nranks, id, rank);
    FREED();
    unborn(g, r, b);
    return born(g, r);
}

API ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int nranks, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    PASS_UNLESS_WATCHING(ncclCommInitRankConfig, comm, nranks, id, rank, config)
    NO_EXCHANGE(g);
    struct ry_birth_note *b = note_init(g, comm, nranks, rank, &id, config);
    FREEING(0);
    ncclResult_t r = REAL(ncclCommInitRankConfig, comm, nranks, id, rank, config);
    FREED();
    unborn(g, r, b);
    return born(g, r);
}

API ncclResult_t ncclCommInitRankScalable(ncclComm_t *newcomm, int nranks, int rank, int nids, ncclUniqueId *ids,
                                          ncclConfig_t *config)
{
    PASS_UNLESS_WATCHING(ncclCommInitRankScalable, newcomm, nranks, rank, nids, ids, config)
    NO_EXCHANGE(g);
    struct ry_birth_note *b = nids > 0 && ids ? note_init(g, newcomm, nranks, rank, &ids[0], config) : NULL;
    FREEING(0);
    ncclResult_t r = REAL(ncclCommInitRankScalable, newcomm, nranks, rank, nids, ids, config);
    FREED();
    unborn(g, r, b);
    return born(g, r);
}

API ncclResult_t ncclCommInitAll(ncclComm_t *comms, int ndev, const int *devlist)
{
    PASS_UNLESS_WATCHING(ncclCommInitAll, comms, ndev, devlist)
    NO_EXCHANGE(g);
    static _Atomic uint32_t ordinal;
    ry_preload_open_engine();
    uint32_t o = atomic_fetch_add(&ordinal, 1);
    FREEING(0);
    ncclResult_t r = REAL(ncclCommInitAll, comms, ndev, devlist);
    FREED();
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
    FREEING(0);
    ncclResult_t r = REAL(ncclCommSplit, comm, color, key, newcomm, config);
    FREED();
    unborn(g, r, b);
    return born(g, r);
}

/* Another thread may wait for the engine's word on this communicator: end that wait. */
static void aborting(struct ry_group *g, struct ry_comm *c)
{
    if (atomic_load(&c->pending) != RY_SETTLED || !c->engine || !ry_preload_hooks.comm_aborting)
        return;
    g->inside++;
    ry_preload_hooks.comm_aborting(c->engine);
    g->inside--;
}

API ncclResult_t ncclCommShrink(ncclComm_t comm, int *exclude, int nexclude, ncclComm_t *newcomm, ncclConfig_t *config,
                                int flags)
{
    PASS_UNLESS_WATCHING(ncclCommShrink, comm, exclude, nexclude, newcomm, config, flags)
    NO_EXCHANGE(g);
    struct ry_comm *c = flags & NCCL_SHRINK_ABORT ? ry_comms_get(comm) : NULL;
    if (c) { /* what is under way there ends; what the engine has under way for it must as well */
        aborting(g, c);
        ry_comms_put(c);
    }
    struct ry_birth_note *b = note_child(g, newcomm, comm, RY_BIRTH_SHRINK, 0, config);
    FREEING(flags & NCCL_SHRINK_ABORT ? SOON : 0);
    ncclResult_t r = REAL(ncclCommShrink, comm, exclude, nexclude, newcomm, config, flags);
    FREED();
    unborn(g, r, b);
    return born(g, r);
}

/* ---- communicators go ---- */

API ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    PASS_UNLESS_WATCHING(ncclCommFinalize, comm)
    NO_EXCHANGE(g);
    ry_preload_settle(comm);
    return REAL(ncclCommFinalize, comm); /* it lives on until it is destroyed */
}

/* Out of the table before NCCL frees the handle: another thread may be given the same address at once. */
static void ended(ncclComm_t comm)
{
    struct ry_comm *c = ry_comms_find(comm);
    if (c)
        ry_comms_remove(c);
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
    FREEING(0);
    ended(comm);
    ncclResult_t r = REAL(ncclCommDestroy, comm);
    FREED();
    return r;
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
    }
    FREEING(SOON);
    if (c) {
        ry_comms_remove(c);
        ry_comms_put(c);
    }
    ncclResult_t r = REAL(ncclCommAbort, comm);
    FREED();
    return r;
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
        ry_births_adopt_late(g, comm, *now);
    return r;
}
