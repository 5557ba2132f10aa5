/*
 * group.c: NCCL's groups, and running a batch of operations to its end.
 *
 * Owns: what a thread has queued between ncclGroupStart and ncclGroupEnd, and the wait of a caller. A batch may hold
 * operations of several communicators, and of several ranks of one.
 */
#include "emu.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define DRAIN_NS 300000000u /* how long a cancelled operation waits for UCX before the connection is cut */

static _Thread_local struct {
    int depth;
    struct ry_emu_op *ops;
    int nops, room;
    struct ry_emu_job *jobs, **jobs_end;
    ncclResult_t failed;
} group;

static struct ry_emu_batch *running;
static pthread_cond_t users_gone = PTHREAD_COND_INITIALIZER;

/* ---- waiting ---- */

void ry_emu_op_progress(struct ry_emu_op *op)
{
    if (--op->pending)
        return;
    struct ry_emu_batch *b = op->batch;
    if (op->last)
        b->open--;
    if (!op->last || !b->open || b->failing) {
        b->wake = true;
        pthread_cond_signal(&b->cond);
    }
}

void ry_emu_wake_all(void)
{
    for (struct ry_emu_batch *b = running; b; b = b->next) {
        b->wake = true;
        pthread_cond_signal(&b->cond);
    }
}

bool ry_emu_waits_for(const struct ncclComm *comm, int peer)
{
    for (struct ry_emu_batch *b = running; b; b = b->next)
        for (int i = 0; i < b->nops; i++) {
            const struct ry_emu_op *op = &b->ops[i];
            for (int k = 0; op->comm == comm && op->pending && k < op->nreqs; k++) {
                const struct ry_emu_req *r = &op->reqs[k];
                bool settled = r->is_send ? r->matched && r->offset == r->bytes : r->touched && r->offset == r->bytes;
                if (r->peer == peer && !r->done && !r->cancelled && !settled)
                    return true;
            }
        }
    return false;
}

void ry_emu_wait_users(struct ncclComm *comm)
{
    if (ry_emu_wire_usable() != ncclSuccess)
        return; /* whoever uses it is in the parent */
    while (comm->users)
        pthread_cond_wait(&users_gone, &ry_emu_lock);
}

void ry_emu_release(struct ncclComm *comm)
{
    if (--comm->users == 0)
        pthread_cond_broadcast(&users_gone);
}

static void post_all(struct ry_emu_op *op)
{
    op->pending = op->nreqs;
    if (!op->nreqs) {
        op->batch->open -= op->last;
        op->batch->wake = true;
    }
    for (int i = 0; i < op->nreqs; i++)
        ry_emu_post(&op->reqs[i]);
}

/* One look at every operation. Returns how many are still on their way. */
static int advance(struct ry_emu_batch *b)
{
    int open = 0;
    for (int i = 0; i < b->nops; i++) {
        struct ry_emu_op *op = &b->ops[i];
        if (op->over)
            continue;
        ncclResult_t r = op->result != ncclSuccess ? op->result : ry_emu_comm_check(op);
        while (r == ncclSuccess && !op->pending && !op->last) {
            pthread_mutex_unlock(&ry_emu_lock); /* nobody else looks at an operation without pending requests */
            r = ry_emu_prepare(op);
            pthread_mutex_lock(&ry_emu_lock);
            if (r != ncclSuccess)
                ry_emu_comm_fail(op->comm, r, "%s", ry_emu_last_error());
            else
                post_all(op);
        }
        if (r != ncclSuccess) {
            op->result = r;
            b->failing = true;
            for (int k = 0; k < op->nreqs; k++)
                ry_emu_cancel(&op->reqs[k]);
        }
        op->over = !op->pending && (op->last || r != ncclSuccess);
        open += !op->over;
    }
    return open;
}

static void cut_off(struct ry_emu_batch *b)
{
    for (int i = 0; i < b->nops; i++)
        for (int k = 0; k < b->ops[i].nreqs && b->ops[i].result != ncclSuccess; k++)
            if (!b->ops[i].reqs[k].done && b->ops[i].comm->peers)
                ry_emu_proc_kill(b->ops[i].comm->peers[b->ops[i].reqs[k].peer].proc,
                                 "it did not take its data in time");
}

static ncclResult_t lonely_self_send(const struct ry_emu_op *ops, int nops)
{
    for (int i = 0; i < nops; i++) {
        int balance = 0;
        if (ops[i].kind > RY_EMU_RECV || ops[i].root != ops[i].comm->rank)
            continue;
        for (int k = 0; k < nops; k++)
            if (ops[k].kind <= RY_EMU_RECV && ops[k].comm == ops[i].comm && ops[k].root == ops[i].root)
                balance += ops[k].kind == RY_EMU_SEND ? 1 : -1;
        if (balance)
            return ry_emu_error(ncclInvalidUsage, "rank %d: a send to itself and its receive belong into one group",
                                ops[i].root);
    }
    return ncclSuccess;
}

ncclResult_t ry_emu_run(struct ry_emu_op *ops, int nops)
{
    ncclResult_t result = ry_emu_wire_usable();
    if (result == ncclSuccess)
        result = lonely_self_send(ops, nops);
    if (result != ncclSuccess)
        return result;
    struct ry_emu_batch b = {.ops = ops, .nops = nops, .open = nops};
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&b.cond, &monotonic);

    pthread_mutex_lock(&ry_emu_lock);
    for (int i = 0; i < nops && result == ncclSuccess; i++)
        result = ry_emu_comm_check(&ops[i]);
    if (result == ncclSuccess) {
        for (int i = 0; i < nops; i++) {
            ops[i].comm->users++;
            ops[i].batch = &b;
        }
        b.next = running;
        running = &b;
        uint64_t deadline = 0;
        while (advance(&b)) {
            ry_emu_wire_drive();
            if (b.failing && !deadline)
                deadline = ry_now_ns() + DRAIN_NS;
            while (!b.wake && deadline != UINT64_MAX) {
                struct timespec at = {(time_t)(deadline / 1000000000u), (long)(deadline % 1000000000u)};
                if (!deadline) {
                    pthread_cond_wait(&b.cond, &ry_emu_lock);
                } else if (pthread_cond_timedwait(&b.cond, &ry_emu_lock, &at)) {
                    cut_off(&b);
                    deadline = UINT64_MAX;
                }
            }
            while (!b.wake && deadline == UINT64_MAX) {
                ry_emu_wire_drive(); /* closes what was cut; every request ends with it */
                if (!b.wake)
                    pthread_cond_wait(&b.cond, &ry_emu_lock);
            }
            b.wake = false;
        }
        for (struct ry_emu_batch **p = &running; *p; p = &(*p)->next)
            if (*p == &b) {
                *p = b.next;
                break;
            }
        for (int i = 0; i < nops; i++) {
            if (result == ncclSuccess)
                result = ops[i].result;
            ry_emu_release(ops[i].comm);
        }
    }
    pthread_mutex_unlock(&ry_emu_lock);
    for (int i = 0; i < nops; i++)
        ry_emu_op_free(&ops[i]);
    pthread_cond_destroy(&b.cond);
    return result;
}

/* ---- groups ---- */

bool ry_emu_group_active(void)
{
    return group.depth > 0;
}

void ry_emu_group_fail(ncclResult_t result)
{
    if (group.depth && group.failed == ncclSuccess)
        group.failed = result;
}

ncclResult_t ry_emu_submit(const struct ry_emu_op *op)
{
    if (!group.depth) {
        struct ry_emu_op one = *op;
        return ry_emu_capture(&one, 1) ? ry_emu_run(&one, 1) : ncclSuccess;
    }
    if (group.nops == group.room) {
        int room = group.room ? 2 * group.room : 32;
        struct ry_emu_op *ops = realloc(group.ops, (size_t)room * sizeof *ops);
        if (!ops)
            return ry_emu_error(ncclSystemError, "out of memory");
        group.ops = ops;
        group.room = room;
    }
    group.ops[group.nops++] = *op;
    return ncclSuccess;
}

static void *run_job(void *arg)
{
    struct ry_emu_job *job = arg;
    job->result = job->run(job);
    return NULL;
}

static void job_free(struct ry_emu_job *job)
{
    free(job->exclude);
    free(job);
}

/* A job that is not done after all: its group failed. */
static void job_drop(struct ry_emu_job *job)
{
    pthread_mutex_lock(&ry_emu_lock);
    if (job->parent) {
        if (job->parent->state == ncclInProgress)
            job->parent->state = ncclSuccess;
        ry_emu_release(job->parent);
    }
    pthread_mutex_unlock(&ry_emu_lock);
    *job->out = NULL;
    free(job->comm);
    job_free(job);
}

static void *run_detached(void *arg)
{
    run_job(arg);
    job_free(arg);
    return NULL;
}

/* Ranks meet each other in these: every job of a group needs a thread of its own. */
static ncclResult_t run_jobs(struct ry_emu_job *jobs)
{
    ncclResult_t result = ncclSuccess;
    bool background = false;
    int n = 0, i = 0;
    for (struct ry_emu_job *j = jobs; j; j = j->next)
        n++;
    pthread_t *threads = calloc((size_t)n, sizeof *threads);
    struct ry_emu_job **waited = calloc((size_t)n, sizeof *waited);
    if (!threads || !waited)
        abort();
    for (struct ry_emu_job *j = jobs, *next; j; j = next) {
        next = j->next;
        pthread_t t;
        if (j->detached) {
            background = true;
            if (pthread_create(&t, NULL, run_detached, j) == 0)
                pthread_detach(t);
            else
                run_detached(j);
        } else {
            waited[i] = j;
            bool own = next != NULL; /* the last one in this thread */
            if (!own || pthread_create(&threads[i], NULL, run_job, j)) {
                threads[i] = pthread_self();
                run_job(j);
            }
            i++;
        }
    }
    for (int k = 0; k < i; k++) {
        if (!pthread_equal(threads[k], pthread_self()))
            pthread_join(threads[k], NULL);
        if (result == ncclSuccess)
            result = waited[k]->result;
        job_free(waited[k]);
    }
    free(threads);
    free(waited);
    return result == ncclSuccess && background ? ncclInProgress : result;
}

ncclResult_t ry_emu_submit_job(struct ry_emu_job *job)
{
    job->next = NULL;
    if (!group.depth)
        return run_jobs(job);
    if (!group.jobs)
        group.jobs_end = &group.jobs;
    *group.jobs_end = job;
    group.jobs_end = &job->next;
    return ncclSuccess;
}

ncclResult_t ry_emu_group_start(void)
{
    group.depth++;
    return ncclSuccess;
}

ncclResult_t ry_emu_group_end(void)
{
    if (!group.depth)
        return ry_emu_error(ncclInvalidUsage, "ncclGroupEnd: no group was started in this thread");
    if (--group.depth)
        return ncclSuccess;
    struct ry_emu_op *ops = group.ops;
    struct ry_emu_job *jobs = group.jobs;
    int nops = group.nops;
    ncclResult_t result = group.failed;
    memset(&group, 0, sizeof group); /* what runs below may start groups of its own */
    if (jobs && result == ncclSuccess)
        result = run_jobs(jobs);
    else
        for (struct ry_emu_job *next; jobs; jobs = next) {
            next = jobs->next;
            job_drop(jobs);
        }
    if (nops && (result == ncclSuccess || result == ncclInProgress) && (nops = ry_emu_capture(ops, nops))) {
        ncclResult_t r = ry_emu_run(ops, nops);
        result = r == ncclSuccess ? result : r;
    }
    free(ops);
    return result;
}

int ry_emu_group_drop(void)
{
    if (!group.depth)
        return -1;
    int n = group.nops;
    if (--group.depth)
        return n;
    for (struct ry_emu_job *j = group.jobs, *next; j; j = next) {
        next = j->next;
        job_drop(j);
    }
    free(group.ops);
    memset(&group, 0, sizeof group);
    return n;
}
