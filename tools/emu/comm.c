/*
 * comm.c: communicators: how they come to be, fail, and end.
 *
 * Owns: the list of all that live in this process, and what ranks tell each other when they meet. Not: the meeting
 * itself (bootstrap.c), nor config and argument checks (api.c).
 */
#include "emu.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

static struct ncclComm *all; /* the ready ones */

/* What a rank tells the others; its worker address follows. */
struct seat {
    uint64_t proc, node_key, gpu_key;
    int32_t pid, device;
    uint32_t address_bytes, spare;
    char node[64];
};

/* ---- failing ---- */

struct ncclComm *ry_emu_comm_find(uint64_t uid, int rank)
{
    for (struct ncclComm *c = all; c; c = c->next)
        if (c->uid == uid && c->rank == rank)
            return c;
    return NULL;
}

struct ncclComm *ry_emu_comm_first(void)
{
    return all;
}

void ry_emu_comm_fail(struct ncclComm *comm, ncclResult_t result, const char *fmt, ...)
{
    if (comm->state == ncclSuccess || comm->state == ncclInProgress) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(comm->error, sizeof comm->error, fmt, ap);
        va_end(ap);
        comm->state = result;
    }
    ry_emu_wake_all();
}

void ry_emu_proc_lost(struct ry_emu_proc *proc, const char *why)
{
    for (struct ncclComm *c = all; c; c = c->next)
        for (int r = 0; r < c->nranks; r++)
            if (c->peers[r].proc == proc && !c->peers[r].departed) {
                ry_emu_comm_fail(c, ncclRemoteError, "rank %d (process %d on node %s) is gone: %s", r, c->peers[r].pid,
                                 c->peers[r].node, why);
                break;
            }
}

ncclResult_t ry_emu_comm_check(const struct ry_emu_op *op)
{
    const struct ncclComm *c = op->comm;
    if (c->aborted)
        return ry_emu_error(ncclInternalError, "rank %d: the communicator was aborted", c->rank);
    if (op->survive) {
        for (int i = 0; i < (op->members ? op->nmembers : c->nranks); i++) {
            int r = op->members ? op->members[i] : i;
            const char *dead = ry_emu_proc_dead(c->peers[r].proc);
            if (dead)
                return ry_emu_error(ncclRemoteError, "rank %d (process %d on node %s) is gone: %s", r, c->peers[r].pid,
                                    c->peers[r].node, dead);
        }
        return ncclSuccess;
    }
    if (c->revoked)
        return ry_emu_error(ncclInvalidUsage, "rank %d: the communicator was revoked", c->rank);
    if (c->state != ncclSuccess && c->state != ncclInProgress)
        return ry_emu_error(c->state, "%s", c->error);
    return ncclSuccess;
}

/* ---- making ---- */

static uint64_t hash(uint64_t h, const void *data, size_t n)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * UINT64_C(0x100000001b3);
    return h ? h : 1;
}
#define HASH_START UINT64_C(0xcbf29ce484222325)

struct ncclComm *ry_emu_comm_new(int rank, int nranks, int device, bool blocking, const char *name)
{
    struct ncclComm *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->magic = RY_EMU_COMM_MAGIC;
    c->rank = rank;
    c->nranks = nranks;
    c->device = device;
    c->blocking = blocking;
    c->state = ncclInProgress;
    c->users = 1; /* the job that makes it */
    snprintf(c->name, sizeof c->name, "%s", name ? name : "");
    return c;
}

static void claim_links(struct ry_emu_peer *p)
{
    struct ry_emu_links *links = ry_emu_links_map();
    if (!links)
        return;
    p->nic = ry_emu_link_claim(links->node, RY_EMU_MAX_NODES, p->node_key);
    p->gpu = ry_emu_link_claim(links->gpu, RY_EMU_MAX_GPUS, p->gpu_key);
}

/* The end of a job: `comm` becomes usable, or known as failed. Jobs hold one use of it, given back here. */
static ncclResult_t settle(struct ncclComm *comm, struct ry_emu_peer *peers, ncclResult_t result)
{
    pthread_mutex_lock(&ry_emu_lock);
    if (result == ncclSuccess) {
        comm->peers = peers;
        comm->state = ncclSuccess;
        comm->next = all;
        all = comm;
        ry_emu_replay(comm);
        for (int r = 0; r < comm->nranks; r++) {
            const char *dead = ry_emu_proc_dead(peers[r].proc);
            if (dead && !peers[r].departed)
                ry_emu_comm_fail(comm, ncclRemoteError, "rank %d (process %d on node %s) is gone: %s", r, peers[r].pid,
                                 peers[r].node, dead);
        }
        ry_emu_wire_drive();
    } else {
        comm->state = result;
        snprintf(comm->error, sizeof comm->error, "%s", ry_emu_last_error());
    }
    ry_emu_release(comm);
    pthread_mutex_unlock(&ry_emu_lock);
    return result;
}

/* A blocking call that failed leaves no communicator behind; a non-blocking one leaves it, to tell what happened. */
static ncclResult_t finish(struct ry_emu_job *job, struct ry_emu_peer *peers, ncclResult_t result)
{
    struct ncclComm *comm = job->comm;
    settle(comm, peers, result);
    if (!job->detached) {
        *job->out = result == ncclSuccess ? comm : NULL;
        if (result != ncclSuccess)
            ry_emu_comm_end(comm, false);
    } else if (job->parent) {
        __atomic_store_n(job->out, comm, __ATOMIC_RELEASE);
    }
    return result;
}

static ncclResult_t meet(struct ry_emu_job *job, struct ry_emu_peer *peers)
{
    struct ncclComm *comm = job->comm;
    struct ry_emu_address own;
    ncclResult_t result = ry_emu_wire_start(&own);
    if (result != ncclSuccess)
        return result;
    comm->uid = ry_emu_bootstrap_uid(&job->id);

    struct {
        struct seat seat;
        char address[4096];
    } mine = {.seat = {.proc = own.proc, .pid = getpid(), .device = comm->device, .address_bytes = own.len}};
    if (own.len > sizeof mine.address)
        return ry_emu_error(ncclInternalError, "UCX's worker address has %u bytes, more than expected", own.len);
    memcpy(mine.address, own.worker, own.len);
    const char *host_id = getenv("NCCL_HOSTID");
    char host[65] = "";
    gethostname(host, sizeof host - 1);
    host_id = host_id && *host_id ? host_id : host;
    snprintf(mine.seat.node, sizeof mine.seat.node, "%s", host_id);
    mine.seat.node_key = hash(HASH_START, host_id, strlen(host_id));
    mine.seat.gpu_key = hash(hash(mine.seat.node_key, &own.proc, sizeof own.proc), &comm->device, sizeof comm->device);

    char *records;
    result = ry_emu_bootstrap_swap(&job->id, comm->rank, comm->nranks, &mine, (uint32_t)sizeof mine.seat + own.len,
                                   &comm->aborted, &records);
    if (result != ncclSuccess)
        return result;
    char *at = records;
    pthread_mutex_lock(&ry_emu_lock);
    for (int r = 0; r < comm->nranks && result == ncclSuccess; r++) {
        uint32_t bytes;
        struct seat seat;
        memcpy(&bytes, at, 4);
        memcpy(&seat, at + 4, sizeof seat);
        struct ry_emu_address address = {seat.proc, seat.address_bytes, at + 4 + sizeof seat};
        struct ry_emu_peer *p = &peers[r];
        *p = (struct ry_emu_peer){
            .node_key = seat.node_key, .gpu_key = seat.gpu_key, .pid = seat.pid, .device = seat.device};
        memcpy(p->node, seat.node, sizeof p->node);
        p->proc = ry_emu_wire_proc(&address);
        if (!p->proc)
            result = ry_emu_error(ncclSystemError, "cannot connect to rank %d", r);
        claim_links(p);
        at += (4 + bytes + 7) / 8 * 8;
    }
    pthread_mutex_unlock(&ry_emu_lock);
    free(records);
    return result;
}

ncclResult_t ry_emu_job_init(struct ry_emu_job *job)
{
    struct ry_emu_peer *peers = calloc((size_t)job->comm->nranks, sizeof *peers);
    ncclResult_t result = peers ? meet(job, peers) : ry_emu_error(ncclSystemError, "out of memory");
    if (result != ncclSuccess)
        free(peers);
    return finish(job, peers, result);
}

/* ---- children ---- */

struct ballot {
    int32_t color, key;
    uint64_t uid; /* the child takes its first member's */
};

/* The parent's ranks `members` (in the child's order) become the child. */
static struct ry_emu_peer *inherit(struct ncclComm *child, const struct ncclComm *parent, const int *members, int n)
{
    struct ry_emu_peer *peers = calloc((size_t)n, sizeof *peers);
    if (!peers)
        return NULL;
    pthread_mutex_lock(&ry_emu_lock); /* others may use the parent meanwhile */
    for (int i = 0; i < n; i++) {
        peers[i] = parent->peers[members[i]];
        peers[i].met = peers[i].departed = false;
        memset(peers[i].lane, 0, sizeof peers[i].lane);
        if (members[i] == parent->rank)
            child->rank = i;
    }
    pthread_mutex_unlock(&ry_emu_lock);
    child->nranks = n;
    return peers;
}

static ncclResult_t cast(struct ry_emu_job *job, struct ballot *mine, struct ballot *votes, const int *members, int n,
                         bool survive)
{
    while (!mine->uid)
        if (getrandom(&mine->uid, sizeof mine->uid, 0) < 0 && errno != EINTR)
            return ry_emu_error(ncclSystemError, "getrandom: %m");
    struct ry_emu_op op = {.kind = RY_EMU_ALLGATHER,
                           .comm = job->parent,
                           .send = mine,
                           .recv = votes,
                           .count = sizeof *mine,
                           .type = ncclUint8,
                           .channel = RY_EMU_CONTROL,
                           .members = members,
                           .nmembers = n,
                           .survive = survive};
    return ry_emu_run(&op, 1);
}

static void leave(struct ncclComm *parent)
{
    pthread_mutex_lock(&ry_emu_lock);
    if (parent->state == ncclInProgress)
        parent->state = ncclSuccess;
    ry_emu_release(parent);
    pthread_mutex_unlock(&ry_emu_lock);
}

ncclResult_t ry_emu_job_split(struct ry_emu_job *job)
{
    struct ncclComm *parent = job->parent;
    struct ballot mine = {job->color, job->key, 0};
    struct ballot *votes = calloc((size_t)parent->nranks, sizeof *votes);
    int *members = calloc((size_t)parent->nranks, sizeof *members), n = 0;
    struct ry_emu_peer *peers = NULL;
    ncclResult_t result = ncclSystemError;
    if (votes && members)
        result = cast(job, &mine, votes, NULL, 0, parent->revoked);
    if (result == ncclSuccess && job->color != NCCL_SPLIT_NOCOLOR) {
        for (int r = 0; r < parent->nranks; r++) {
            if (votes[r].color != job->color)
                continue;
            int i = n++; /* insertion sort, stable: equal keys keep the parent's order */
            for (; i && votes[members[i - 1]].key > votes[r].key; i--)
                members[i] = members[i - 1];
            members[i] = r;
        }
        job->comm->uid = votes[members[0]].uid;
        peers = inherit(job->comm, parent, members, n);
        if (!peers)
            result = ry_emu_error(ncclSystemError, "out of memory");
    }
    if (job->comm)
        result = finish(job, peers, result);
    leave(parent);
    free(votes);
    free(members);
    return result;
}

ncclResult_t ry_emu_job_shrink(struct ry_emu_job *job)
{
    struct ncclComm *parent = job->parent;
    struct ballot mine = {0};
    struct ballot *votes = calloc((size_t)parent->nranks, sizeof *votes);
    int *members = calloc((size_t)parent->nranks, sizeof *members), n = 0;
    struct ry_emu_peer *peers = NULL;
    ncclResult_t result = ncclSystemError;
    if (votes && members) {
        for (int r = 0; r < parent->nranks; r++) {
            bool out = false;
            for (int i = 0; i < job->nexclude; i++)
                out |= job->exclude[i] == r;
            if (!out)
                members[n++] = r;
        }
        result = cast(job, &mine, votes, members, n, parent->revoked || (job->flags & NCCL_SHRINK_ABORT));
    }
    if (result == ncclSuccess) {
        job->comm->uid = votes[0].uid;
        peers = inherit(job->comm, parent, members, n);
        if (!peers)
            result = ry_emu_error(ncclSystemError, "out of memory");
    }
    result = finish(job, peers, result);
    leave(parent);
    free(votes);
    free(members);
    return result;
}

/* ---- ending ---- */

void ry_emu_comm_end(struct ncclComm *comm, bool abort)
{
    pthread_mutex_lock(&ry_emu_lock);
    if (abort) {
        atomic_store(&comm->aborted, true);
        ry_emu_wake_all();
    }
    ry_emu_wait_users(comm);
    if (comm->peers) {
        ry_emu_say_goodbye(comm);
        ry_emu_wire_drive();
    }
    for (struct ncclComm **p = &all; *p; p = &(*p)->next)
        if (*p == comm) {
            *p = comm->next;
            break;
        }
    ry_emu_forget(comm);
    comm->magic = 0;
    pthread_mutex_unlock(&ry_emu_lock);
    free(comm->peers);
    free(comm->ops);
    free(comm);
}

void ry_emu_comm_revoke(struct ncclComm *comm)
{
    pthread_mutex_lock(&ry_emu_lock);
    comm->revoked = true;
    ry_emu_wake_all();
    ry_emu_wait_users(comm);
    pthread_mutex_unlock(&ry_emu_lock);
}
