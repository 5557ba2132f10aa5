/*
 * hold_engine.c: an engine for tests, to lie beside librailyard.so under the engine's name. It holds communicators when
 * the program says so, and takes or declines exchanges as told by spy_how, with NCCL's own functions.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nccl.h>

#include "hooks.h"
#include "spy.h"

struct comm {
    struct ry_comm_face face;
    struct comm *next;
    void *nccl;
    bool aborting, in_hook;
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct comm *comms;
    ncclResult_t (*start)(void), (*end)(void);
    ncclResult_t (*send)(const void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
    ncclResult_t (*recv)(void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
} engine = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void hold(void *nccl, bool on)
{
    pthread_mutex_lock(&engine.lock);
    for (struct comm *c = engine.comms; c; c = c->next)
        if (c->nccl == nccl)
            atomic_store(&c->face.hold, on);
    pthread_mutex_unlock(&engine.lock);
}

static void *comm_created(const struct ry_comm_info *info)
{
    struct comm *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->nccl = info->nccl;
    atomic_store(&c->face.wants, 1);
    pthread_mutex_lock(&engine.lock);
    c->next = engine.comms;
    engine.comms = c;
    pthread_mutex_unlock(&engine.lock);
    return c;
}

static void comm_ended(void *comm, enum ry_death how, const struct ry_comm_counts *counts)
{
    struct comm *c = comm;
    pthread_mutex_lock(&engine.lock);
    if (c->in_hook) {
        fprintf(stderr, "comm_ended while a thread is in a hook of the communicator\n");
        abort();
    }
    for (struct comm **p = &engine.comms; *p; p = &(*p)->next)
        if (*p == c) {
            *p = c->next;
            break;
        }
    pthread_mutex_unlock(&engine.lock);
    free(c);
    spy_note("ended");
}

static void *exchange_begin(void *comm, const struct ry_exchange *x)
{
    struct spy_exchange *s = &spy_latest;
    *s = (struct spy_exchange){.nranks = x->nranks,
                               .rank = x->rank,
                               .type = x->type,
                               .held = x->held,
                               .one_call = x->one_call,
                               .counted = x->sent && x->received,
                               .ordinal = x->ordinal};
    for (int r = 0; r < x->nranks; r++) {
        s->send_count[r] = x->send_count[r];
        s->recv_count[r] = x->recv_count[r];
        s->sent[r] = s->counted ? x->sent[r] : 0;
        s->received[r] = s->counted ? x->received[r] : 0;
    }
    spy_note("begin");
    return comm;
}

static void p2p(const struct ry_exchange *x, void *nccl, int r, ncclResult_t *result)
{
    ncclResult_t a = engine.recv(x->recv_buf[r], x->recv_count[r], (ncclDataType_t)x->type, r, nccl, x->stream);
    ncclResult_t b = engine.send(x->send_buf[r], x->send_count[r], (ncclDataType_t)x->type, r, nccl, x->stream);
    if (*result == ncclSuccess)
        *result = a != ncclSuccess ? a : b;
}

static void carry_out(const struct comm *c, const struct ry_exchange *x, int how, ncclResult_t *result)
{
    int parts = how == SPY_TWO ? 2 : 1;
    for (int part = 0; part < parts; part++) {
        engine.start();
        for (int r = x->nranks - 1; r >= 0; r--)
            if (parts == 1 || (r + x->rank) % 2 == part)
                p2p(x, c->nccl, r, result);
        ncclResult_t end = engine.end();
        if (*result == ncclSuccess)
            *result = end;
    }
}

static bool exchange_take(void *comm, const struct ry_exchange *x, void *cookie, int *out)
{
    struct comm *c = comm;
    int how = atomic_load(&spy_how);
    ncclResult_t result = ncclSuccess;
    spy_note("take");
    if (cookie != comm)
        abort();
    if (!x->held)
        return true; /* one that is not held can only be told of: our saying so must change nothing */
    c->in_hook = true;
    if (atomic_load(&spy_delay_us))
        usleep((useconds_t)(rand() % atomic_load(&spy_delay_us)));
    if (how == SPY_MANY)
        how = (int)(x->ordinal % 3);
    if (how == SPY_REVERSED || how == SPY_TWO)
        carry_out(c, x, how, &result);
    if (how == SPY_FAIL)
        result = ncclSystemError;
    if (how == SPY_UNTIL_END) {
        pthread_mutex_lock(&engine.lock);
        atomic_store(&spy_waiting, true);
        while (!c->aborting)
            pthread_cond_wait(&engine.changed, &engine.lock);
        pthread_mutex_unlock(&engine.lock);
        usleep(50000);
    }
    c->in_hook = false;
    *out = (int)result;
    return how != SPY_DECLINE && how != SPY_UNTIL_END;
}

static void exchange_end(void *comm, const struct ry_exchange *x, void *cookie, int result)
{
    spy_note("end%d", result);
}

static void stray(void *comm)
{
    spy_note("stray");
}

static void comm_aborting(void *comm)
{
    struct comm *c = comm;
    spy_note("aborting");
    pthread_mutex_lock(&engine.lock);
    c->aborting = true;
    pthread_cond_broadcast(&engine.changed);
    pthread_mutex_unlock(&engine.lock);
}

int railyard_engine_open(const struct ry_host *host, struct ry_hooks *hooks, char *why, size_t why_size);

__attribute__((visibility("default"))) int railyard_engine_open(const struct ry_host *host, struct ry_hooks *hooks,
                                                                char *why, size_t why_size)
{
    engine.start = (ncclResult_t(*)(void))host->find("ncclGroupStart");
    engine.end = (ncclResult_t(*)(void))host->find("ncclGroupEnd");
    engine.send = (__typeof__(engine.send))host->find("ncclSend");
    engine.recv = (__typeof__(engine.recv))host->find("ncclRecv");
    if (host->version != RY_HOOKS_VERSION || !engine.start || !engine.end || !engine.send || !engine.recv)
        return snprintf(why, why_size, "the test engine lacks something"), -1;
    atomic_store(&spy_hold, hold);
    *hooks = (struct ry_hooks){.version = RY_HOOKS_VERSION,
                               .size = sizeof *hooks,
                               .comm_created = comm_created,
                               .comm_ended = comm_ended,
                               .exchange_begin = exchange_begin,
                               .exchange_end = exchange_end,
                               .exchange_take = exchange_take,
                               .stray = stray,
                               .comm_aborting = comm_aborting};
    return 0;
}
