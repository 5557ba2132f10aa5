/*
 * preload.c: the NCCL functions that librailyard.so stands in front of, and what happens around each.
 *
 * Owns: the intercepted functions of groups, p2p and collectives, and telling the engine of exchanges. Not: communicators
 * (births.c), opening the engine (start.c), finding NCCL (real.c), what a group holds (group.c), anything done with an
 * exchange (the engine).
 *
 * The way of one exchange: ncclGroupStart → ncclSend/ncclRecv, noted by group.c and passed on at once → the outermost
 * ncclGroupEnd: begin_exchange() asks group.c whether it was an exchange and tells the engine; end_exchange() does so
 * again after the real call. Where the engine wants to carry it out by itself, group.c keeps the calls back, and
 * offer_exchange() gives it to the engine, or to NCCL after all.
 *
 * In a process that never calls NCCL nothing here ever runs, but for one look at RAILYARD_HOLD (start.c). Every failure of ours ends in
 * plain NCCL with one warning; from then on, and in forked children, each function is one test and a jump.
 */
#include <stdatomic.h>
#include <string.h>

#include "preload.h"
#include "railyard.h"

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
void ry_preload_pass_held(struct ry_group *g)
{
    ncclResult_t r = ncclInternalError; /* as NCCL's own waits end */
    ry_preload_settle(g->nccl);
    g->inside++;
    if (!atomic_load(&g->comm->aborted))
        r = ry_group_replay(g, pass_one);
    g->held = 0;
    g->inside--;
    if (g->failed == ncclSuccess)
        g->failed = r;
}

ncclResult_t ry_preload_failure(struct ry_group *g)
{
    ncclResult_t r = g->failed;
    g->failed = ncclSuccess;
    return r;
}

void ry_preload_settle_slowly(ncclComm_t comm)
{
    struct ry_comm *c = comm ? ry_comms_get(comm) : NULL;
    ry_preload_hooks.settle(c && atomic_load(&c->pending) == RY_SETTLED ? c->engine : NULL);
    if (c)
        ry_comms_put(c);
}

void ry_preload_own_thread(void)
{
    ry_group.inside++;
}

/* As the job asked for it, in another order: which one makes no difference within a group. */
int ry_preload_plain(void *nccl, const struct ry_exchange *x)
{
    struct ry_group *g = &ry_group;
    ncclDataType_t type = (ncclDataType_t)x->type;
    if (x->one_call)
        return REAL(ncclAlltoAll, x->send_buf[0], x->recv_buf[0], x->send_count[0], type, nccl, x->stream);
    ncclResult_t r = REAL(ncclGroupStart);
    if (r != ncclSuccess)
        return r;
    for (int p = 0; p < x->nranks && r == ncclSuccess; p++) {
        r = REAL(ncclSend, x->send_buf[p], x->send_count[p], type, p, nccl, x->stream);
        if (r == ncclSuccess)
            r = REAL(ncclRecv, x->recv_buf[p], x->recv_count[p], type, p, nccl, x->stream);
    }
    ncclResult_t end = REAL(ncclGroupEnd);
    return r != ncclSuccess ? r : end;
}

void ry_group_no_exchange(struct ry_group *g, bool tell)
{
    ry_preload_settle(g->nccl);
    if (tell && ry_preload_hooks.stray) {
        g->inside++;
        ry_preload_hooks.stray(g->comm->engine);
        g->inside--;
    }
    if (g->held)
        ry_preload_pass_held(g);
}

/* ---- groups and exchanges ---- */

struct running {
    bool on;   /* it is an exchange */
    bool told; /* the engine knows of it */
    void *cookie;
    struct ry_exchange x;
};

/* The engine sees nothing where it does not want to, and while paused, but what the other ranks may wait for. */
static inline bool unseen(const struct ry_comm *c)
{
    const struct ry_comm_face *face = c->engine;
    return !atomic_load_explicit(&face->wants, memory_order_relaxed) ||
           (atomic_load_explicit(&ry_group_paused, memory_order_relaxed) && !ry_group_wanted(c));
}

static inline void tell_begin(struct ry_group *g, struct running *run)
{
    run->told = g->comm->engine && (g->held || !unseen(g->comm));
    run->cookie = NULL;
    if (!run->told || !ry_preload_hooks.exchange_begin)
        return;
    g->inside++;
    run->cookie = ry_preload_hooks.exchange_begin(g->comm->engine, &run->x);
    g->inside--;
}

/* True: the engine has done it, with result *r. Means nothing where NCCL has the calls already. */
static inline bool offer(struct ry_group *g, struct running *run, ncclResult_t *r)
{
    int result = ncclSuccess;
    if (!run->told || !ry_preload_hooks.exchange_take)
        return false;
    g->inside++;
    bool taken = ry_preload_hooks.exchange_take(g->comm->engine, &run->x, run->cookie, &result);
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
        ry_preload_pass_held(g);
    g->held = 0;
    atomic_fetch_sub(&c->offering, 1);
    if (go && grouped && r == ncclSuccess)
        r = REAL(ncclGroupEnd);
    ncclResult_t failed = ry_preload_failure(g);
    return failed != ncclSuccess ? failed : r != ncclSuccess ? r : empty;
}

static inline void end_exchange(struct ry_group *g, struct running *run, ncclResult_t r)
{
    if (run->on) {
        if (run->told && ry_preload_hooks.exchange_end) {
            g->inside++;
            ry_preload_hooks.exchange_end(g->comm->engine, &run->x, run->cookie, (int)r);
            g->inside--;
        }
        if (r == ncclSuccess || r == ncclInProgress)
            ry_comms_add_to(&g->comm->exchanges, 1);
        g->latest = g->nccl;
        g->exchanges++;
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
    return atomic_load(&ry_preload_state) == RY_WATCHING && ry_preload_hooks.strategy ? ry_preload_hooks.strategy(name) : -1;
}

/* ---- redirected exchanges ---- */

/* The communicator, with a reference, if exchanges on it can be kept back. */
static struct ry_comm *followed(const void *nccl)
{
    if (!nccl || atomic_load(&ry_preload_state) != RY_WATCHING)
        return NULL;
    struct ry_comm *c = ry_comms_get(nccl);
    if (c && atomic_load(&c->pending) == RY_SETTLED && c->engine && c->blocking && !atomic_load(&c->miscounted))
        return c;
    if (c)
        ry_comms_put(c);
    return NULL;
}

API uint64_t railyard_latest_exchange(const void **comm, int32_t *nranks, int32_t *rank)
{
    struct ry_comm *c = followed(ry_group.latest);
    *comm = c ? ry_group.latest : NULL;
    *nranks = c ? c->nranks : 0;
    *rank = c ? c->rank : -1;
    if (c)
        ry_comms_put(c);
    return ry_group.exchanges;
}

API int railyard_redirect_ready(const void *comm, uint64_t bytes, uint64_t rows, void *stream)
{
    struct ry_comm *c = ry_preload_hooks.redirect_ready && !atomic_load(&ry_group_paused) ? followed(comm) : NULL;
    if (!c)
        return 1;
    ry_group.inside++;
    int no = ry_preload_hooks.redirect_ready(c->engine, bytes, rows, stream);
    ry_group.inside--;
    ry_comms_put(c);
    return no;
}

API int railyard_redirect(const void *comm, const struct railyard_redirect *how)
{
    struct ry_comm *c = ry_preload_hooks.redirect ? followed(comm) : NULL;
    int r = c ? ry_preload_hooks.redirect(c->engine, how) : -1;
    if (c)
        ry_comms_put(c);
    return r;
}

API int railyard_redirect_done(const void *comm)
{
    struct ry_comm *c = ry_preload_hooks.redirect_done ? followed(comm) : NULL;
    int r = c ? ry_preload_hooks.redirect_done(c->engine) : -1;
    if (c)
        ry_comms_put(c);
    return r;
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
    bool births = g->nbirths > 0;
    if (births)
        FREEING(0);
    ncclResult_t r = g->held ? offer_exchange(g, &run, true) : REAL(ncclGroupEnd);
    if (__builtin_expect(g->failed, 0)) /* of what was held until now; NCCL says the same, if all is well */
        r = ry_preload_failure(g);
    end_exchange(g, &run, r);
    if (births)
        FREED();
    if (__builtin_expect(g->nbirths, 0))
        ry_births_adopt_all(g, r);
    return r;
}

API ncclResult_t ncclGroupSimulateEnd(ncclSimInfo_t *info)
{
    PASS_UNLESS_WATCHING(ncclGroupSimulateEnd, info)
    if (g->depth > 1)
        ry_group_other(g);
    if (g->held)
        ry_preload_pass_held(g);
    ncclResult_t failed = ry_preload_failure(g),
                 r = REAL(ncclGroupSimulateEnd, info); /* ends the group; nothing of it is run */
    g->depth -= g->depth > 0;
    if (!g->depth) {
        g->calls[0] = g->calls[1] = 0, g->bytes[0] = g->bytes[1] = 0;
        ry_group_reset(g);
        ry_births_adopt_all(g, ncclInvalidUsage);
    }
    return failed != ncclSuccess ? failed : r;
}

/* A send or receive outside any group is one call, never an exchange. */
static inline void note_p2p(struct ry_group *g, int direction, const void *buf, size_t count, ncclDataType_t type,
                            int peer, ncclComm_t comm, cudaStream_t stream)
{
    ry_births_settle(g, comm);
    ry_group_p2p(g, direction, buf, count, (int)type, peer, comm, stream);
    if (!g->held)
        ry_preload_settle(comm);
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
    ry_births_settle(g, comm);
    struct ry_comm *c = count_call(RY_CALL_ALLTOALL, count, type, comm);
    if (c) /* count is per peer */
        atomic_fetch_add_explicit(&c->bytes[RY_CALL_ALLTOALL],
                                  count * ry_nccl_type_bytes((int)type) * (size_t)(c->nranks > 0 ? c->nranks - 1 : 0),
                                  memory_order_relaxed);
    ry_group_alltoall(g, send, recv, count, (int)type, comm, stream);
    if (!g->held)
        ry_preload_settle(comm);
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
    ry_births_settle(g, comm);
    ry_preload_settle(comm);
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
    if ((type == ncclInt64 || type == ncclUint64) && ry_preload_hooks.int64_allgather &&
        !atomic_load_explicit(&ry_group_paused, memory_order_relaxed)) {
        struct ry_comm *c = ry_comms_get(comm);
        if (c && c->engine) {
            g->inside++;
            ry_preload_hooks.int64_allgather(c->engine, count);
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
