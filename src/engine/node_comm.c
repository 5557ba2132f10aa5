/*
 * node_comm.c: see node_comm.h.
 *
 * NCCL's own functions are called, not the intercepted ones: neither the engine nor the trace takes this communicator
 * for one of the job's, and the job's children are counted as if it were not there.
 *
 * An abort runs on a thread of its own. NCCL's abort may wait for the device, which may wait for kernels of the job's
 * communicator that only the job's own abort ends: so that must not wait for this one. If it never returns, only that
 * thread never does.
 */
#include "node_comm.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/thread.h"

#define NO_COLOR (-1)      /* NCCL_SPLIT_NOCOLOR */
#define ABORT_WAITS_MS 200 /* for a group that is being enqueued; NCCL may hold it until the abort */
#define EXIT_WAITS_MS 1000

struct ry_node_comm {
    struct ry_run_node face;
    const struct ry_nccl *nccl;
    const struct ry_device *device;
    void *job;
    int color, key;
    _Atomic int state;  /* enum ry_node_state */
    _Atomic int owners; /* its communicator's, and an abort that is under way */
    void *aborted;      /* by that */
    char name[24];
    int ordinal, twins, twin; /* of twins, else 0 */
    struct ry_nccl_id id;
    int local[]; /* [nranks]; none for twins */
};

static _Atomic int aborts; /* under way */

struct ry_node_comm *ry_node_comm_new(const struct ry_nccl *nccl, const struct ry_device *device,
                                      const struct ry_cluster *map, int rank, void *comm, const char *name)
{
    if (!nccl->comm_split || map->nnodes < 2 || map->nnodes == map->nranks)
        return NULL;
    struct ry_node_comm *n = calloc(1, sizeof *n + (size_t)map->nranks * sizeof *n->local);
    if (!n)
        return NULL;
    n->nccl = nccl;
    n->device = device;
    n->job = comm;
    n->color = map->node_size[map->node[rank]] > 1 ? map->node[rank] : NO_COLOR; /* alone, it passes nothing on */
    n->key = map->local[rank];
    for (int r = 0; r < map->nranks; r++)
        n->local[r] = map->node[r] == map->node[rank] ? map->local[r] : -1;
    n->face.local = n->local;
    atomic_store(&n->state, RY_NODE_COULD);
    atomic_store(&n->owners, 1);
    snprintf(n->name, sizeof n->name, "%s", name);
    return n;
}

enum ry_node_state ry_node_comm_state(const struct ry_node_comm *n)
{
    return n ? (enum ry_node_state)atomic_load(&n->state) : RY_NODE_CANNOT;
}

struct ry_run_node *ry_node_comm_face(struct ry_node_comm *n)
{
    return n ? &n->face : NULL;
}

/* ---- making ---- */

static void pause_since(uint64_t began)
{
    if (ry_now_ns() - began < 100000)
        sched_yield();
    else
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
}

/* NCCL wants nothing under way on a communicator that is split. */
static bool stream_is_done(const struct ry_node_comm *n, void *stream, double patience, const _Atomic bool *aborted,
                           struct ry_err *err)
{
    struct ry_event *mark;
    uint64_t began = ry_now_ns();
    bool done = false;
    if (n->device->event_create_untimed(&mark, err))
        return false;
    int rc = n->device->event_record(mark, stream, err);
    while (!rc && !(rc = n->device->event_done(mark, &done, err)) && !done && !atomic_load(aborted)) {
        if ((double)(ry_now_ns() - began) * 1e-9 > patience) {
            rc = ry_fail(err, "what the job enqueued before takes longer than %.3g s", patience);
            break;
        }
        pause_since(began);
    }
    n->device->event_destroy(mark);
    return done;
}

void ry_node_comm_make(struct ry_node_comm *n, void *stream, double patience, const _Atomic bool *aborted)
{
    struct ry_err err = {""};
    void *comm = NULL;
    bool done = stream_is_done(n, stream, patience, aborted, &err);
    atomic_store(&n->state, RY_NODE_CANNOT);
    if (atomic_load(
            aborted)) /* the others wait for this rank until they abort as well, as they would in the exchange */
        return;
    uint64_t began = ry_now_ns();
    int r = n->nccl->comm_split(n->job, done ? n->color : NO_COLOR, n->key, &comm, NULL);
    if (r)
        comm = NULL;
    if (atomic_load(aborted)) {
        /* nobody wants to know */
    } else if (r || (done && n->color != NO_COLOR && !comm)) {
        ry_warn("communicator %s: what is passed on inside the node stays on it: ncclCommSplit: %s", n->name,
                r ? n->nccl->error_string(r) : "it made none");
    } else if (!done) {
        ry_info("communicator %s: what is passed on inside the node stays on it: %s", n->name, err.msg);
    } else {
        atomic_store(&n->state, RY_NODE_HAS);
        ry_info("communicator %s: this node's ranks have one of their own now for what they pass on; made in %.1f ms",
                n->name, (double)(ry_now_ns() - began) / 1e6);
    }
    atomic_store(&n->face.comm, comm);
    if (atomic_load(aborted)) /* whoever aborts may have come before it was there */
        ry_node_comm_abort(n);
}

/* ---- making one of twins ---- */

struct ry_node_comm *ry_node_comm_of_twins(const struct ry_nccl *nccl, const struct ry_device *device, int ordinal, int twins,
                                           int twin, const char *name)
{
    struct ry_node_comm *n = nccl->comm_init_rank ? calloc(1, sizeof *n) : NULL;
    if (!n)
        return NULL;
    n->nccl = nccl;
    n->device = device;
    n->ordinal = ordinal;
    n->face.twins = n->twins = twins;
    n->twin = twin;
    atomic_store(&n->state, RY_NODE_COULD);
    atomic_store(&n->owners, 1);
    snprintf(n->name, sizeof n->name, "%s", name);
    return n;
}

static void let_go(struct ry_node_comm *n);

static void *make_it(void *arg)
{
    struct ry_node_comm *n = arg;
    struct ry_err err = {""};
    void *comm = NULL;
    int r = 0, making = RY_NODE_MAKING;
    uint64_t began = ry_now_ns();
    if (n->device->relax_thread) /* the job may capture a graph meanwhile */
        n->device->relax_thread();
    if (!n->device->use(n->ordinal, &err) && (r = n->nccl->comm_init_rank(&comm, n->twins, n->id, n->twin)))
        comm = NULL;
    if (comm)
        atomic_store(&n->face.comm, comm);
    if (atomic_compare_exchange_strong(&n->state, &making, comm ? RY_NODE_HAS : RY_NODE_CANNOT)) {
        if (comm)
            ry_info("communicator %s: its rank and those of its twins at this position have one of their own now; made in %.1f ms",
                    n->name, (double)(ry_now_ns() - began) / 1e6);
        else
            ry_warn("communicator %s: its twins cannot share what they send: ncclCommInitRank: %s", n->name,
                    r ? n->nccl->error_string(r) : err.msg);
    } else if (comm && (comm = atomic_exchange(&n->face.comm, NULL))) {
        n->nccl->comm_abort(comm); /* nobody wants it any more */
    }
    let_go(n);
    return NULL;
}

void ry_node_comm_start(struct ry_node_comm *n, const struct ry_nccl_id *id)
{
    pthread_t thread;
    if (atomic_load(&n->state) != RY_NODE_COULD)
        return;
    n->id = *id;
    atomic_store(&n->state, RY_NODE_MAKING);
    atomic_fetch_add(&n->owners, 1);
    if (!ry_thread_start(&thread, make_it, n)) {
        pthread_detach(thread);
        return;
    }
    atomic_store(&n->state, RY_NODE_CANNOT);
    atomic_fetch_sub(&n->owners, 1);
    ry_warn("communicator %s: its twins cannot share what they send: no thread to make their communicator", n->name);
}

/* ---- ending ---- */

static void let_go(struct ry_node_comm *n)
{
    if (atomic_fetch_sub(&n->owners, 1) == 1)
        free(n);
}

static void *abort_it(void *arg)
{
    struct ry_node_comm *n = arg;
    for (int i = 0; i < ABORT_WAITS_MS && atomic_load(&n->face.users); i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    n->nccl->comm_abort(n->aborted);
    let_go(n);
    atomic_fetch_sub(&aborts, 1);
    return NULL;
}

void ry_node_comm_abort(struct ry_node_comm *n)
{
    pthread_t thread;
    int making = RY_NODE_MAKING;
    if (n && atomic_compare_exchange_strong(&n->state, &making, RY_NODE_CANNOT))
        return; /* whoever makes it aborts it */
    void *comm = n ? atomic_exchange(&n->face.comm, NULL) : NULL;
    if (!comm)
        return;
    n->aborted = comm;
    atomic_store(&n->state, RY_NODE_CANNOT);
    atomic_fetch_add(&n->owners, 1);
    atomic_fetch_add(&aborts, 1);
    if (!ry_thread_start(&thread, abort_it, n)) {
        pthread_detach(thread);
        return;
    }
    ry_warn("communicator %s: no thread to abort the one of this node's ranks: what is under way there may never end",
            n->name);
    atomic_fetch_sub(&aborts, 1);
    atomic_fetch_sub(&n->owners, 1);
}

void ry_node_comm_end(struct ry_node_comm *n, bool leak)
{
    int making = RY_NODE_MAKING;
    if (!n)
        return;
    if (atomic_compare_exchange_strong(&n->state, &making, RY_NODE_CANNOT)) {
        let_go(n);
        return;
    }
    void *comm = leak ? NULL : atomic_exchange(&n->face.comm, NULL);
    if (comm)
        n->nccl->comm_destroy(comm);
    let_go(n);
}

void ry_node_comm_settle(void)
{
    for (int i = 0; i < EXIT_WAITS_MS && atomic_load(&aborts); i++)
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}
