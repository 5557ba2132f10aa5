/* group.c: see group.h. */
#include "group.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

__thread struct ry_group ry_group __attribute__((tls_model("initial-exec")));

static pthread_key_t thread_key;
static pthread_once_t thread_once = PTHREAD_ONCE_INIT;

static void free_arrays(struct ry_group *g)
{
    for (int d = 0; d < 2; d++) {
        free(g->named[d]);
        free(g->count[d]);
        free(g->buf[d]);
        free(g->peer_type[d]);
        g->named[d] = NULL, g->count[d] = NULL, g->buf[d] = NULL, g->peer_type[d] = NULL;
    }
    g->capacity = 0;
}

static void thread_ends(void *arg)
{
    struct ry_group *g = arg;
    free_arrays(g);
    for (int i = 0; i < g->nbirths; i++)
        if (g->births[i].parent)
            ry_comms_put(g->births[i].parent);
    free(g->births);
    g->births = NULL, g->nbirths = g->births_capacity = 0;
}

static void make_key(void)
{
    pthread_key_create(&thread_key, thread_ends);
}

/* The thread owns memory now: see to it that it is freed when the thread ends. */
static void free_at_end(struct ry_group *g)
{
    pthread_once(&thread_once, make_key);
    pthread_setspecific(thread_key, g);
}

/* Room for a communicator of `nranks`; false when out of memory: its groups are then not recognized. */
static bool reserve(struct ry_group *g, int nranks)
{
    if (nranks <= g->capacity)
        return true;
    int n = 16;
    while (n < nranks)
        n *= 2;
    free_arrays(g);
    free_at_end(g);
    bool ok = true;
    for (int d = 0; d < 2; d++) {
        ok &= (g->named[d] = calloc((size_t)n, sizeof *g->named[d])) != NULL;
        ok &= (g->count[d] = malloc((size_t)n * sizeof *g->count[d])) != NULL;
        ok &= (g->buf[d] = malloc((size_t)n * sizeof *g->buf[d])) != NULL;
        ok &= (g->peer_type[d] = malloc((size_t)n)) != NULL;
    }
    if (ok)
        g->capacity = n;
    else
        free_arrays(g);
    return ok;
}

/* Hand what was counted to the communicator it belongs to. */
static void tally(struct ry_group *g)
{
    for (int d = 0; d < 2; d++) {
        if (g->comm && g->calls[d]) {
            atomic_fetch_add_explicit(&g->comm->calls[d], (uint64_t)g->calls[d], memory_order_relaxed);
            atomic_fetch_add_explicit(&g->comm->bytes[d], g->bytes[d], memory_order_relaxed);
        }
        g->calls[d] = 0, g->bytes[d] = 0;
    }
}

/* The group's first call, or one on another communicator than those before. */
static void turn_to(struct ry_group *g, ncclComm_t comm, cudaStream_t stream, enum ry_capture what)
{
    if (g->comm && g->calls[0] + g->calls[1])
        atomic_fetch_add_explicit(&g->comm->plain_groups, 1, memory_order_relaxed);
    tally(g);
    if (g->comm)
        ry_comms_put(g->comm);
    g->nccl = comm;
    g->comm = ry_comms_get(comm);
    if (g->capture != RY_CAPTURE_EMPTY || !g->comm || g->comm->pending || !reserve(g, g->comm->nranks)) {
        g->capture = RY_CAPTURE_MIXED;
        return;
    }
    g->capture = what;
    g->stream = stream;
    g->mixed_types = false;
    if (!++g->epoch) { /* wrapped: old marks could look new */
        for (int d = 0; d < 2; d++)
            memset(g->named[d], 0, (size_t)g->capacity * sizeof *g->named[d]);
        g->epoch = 1;
    }
}

void ry_group_p2p(struct ry_group *g, int d, const void *buf, size_t count, int type, int peer, ncclComm_t comm,
                  cudaStream_t stream)
{
    if (comm != g->nccl || g->capture == RY_CAPTURE_EMPTY) {
        turn_to(g, comm, stream, RY_CAPTURE_P2P);
        g->type = type;
    }
    g->calls[d]++;
    g->bytes[d] += count * ry_nccl_type_bytes(type);
    if (g->capture != RY_CAPTURE_P2P)
        return ry_group_other(g);
    if (stream != g->stream || peer < 0 || peer >= g->comm->nranks || g->named[d][peer] == g->epoch) {
        g->capture = RY_CAPTURE_MIXED;
        return;
    }
    if (type != g->type)
        g->mixed_types = true;
    g->named[d][peer] = g->epoch;
    g->count[d][peer] = count;
    g->buf[d][peer] = (void *)(uintptr_t)buf;
    g->peer_type[d][peer] = (uint8_t)type;
}

void ry_group_alltoall(struct ry_group *g, const void *send, void *recv, size_t count, int type, ncclComm_t comm,
                       cudaStream_t stream)
{
    if (g->capture != RY_CAPTURE_EMPTY)
        return ry_group_other(g);
    turn_to(g, comm, stream, RY_CAPTURE_CALL);
    g->type = type;
    if (g->capture != RY_CAPTURE_CALL)
        return;
    size_t step = count * ry_nccl_type_bytes(type);
    for (int r = 0; r < g->comm->nranks; r++) {
        g->count[0][r] = g->count[1][r] = count;
        g->buf[0][r] = (char *)(uintptr_t)send + (size_t)r * step;
        g->buf[1][r] = (char *)recv + (size_t)r * step;
    }
}

void ry_group_other(struct ry_group *g)
{
    g->capture = RY_CAPTURE_MIXED;
}

bool ry_group_exchange(struct ry_group *g, struct ry_exchange *x)
{
    if (g->capture != RY_CAPTURE_P2P && g->capture != RY_CAPTURE_CALL)
        return false;
    int n = g->comm->nranks;
    /* no peer was named twice, so as many calls as ranks means every rank */
    if (g->capture == RY_CAPTURE_P2P && (g->calls[0] != n || g->calls[1] != n))
        return false;
    if (g->mixed_types) {
        for (int d = 0; d < 2; d++)
            for (int r = 0; r < n; r++)
                g->count[d][r] *= ry_nccl_type_bytes(g->peer_type[d][r]);
        g->type = ncclUint8;
    }
    *x = (struct ry_exchange){
        .nranks = n,
        .rank = g->comm->rank,
        .type = g->type,
        .type_bytes = ry_nccl_type_bytes(g->type),
        .one_call = g->capture == RY_CAPTURE_CALL,
        .send_count = g->count[0],
        .recv_count = g->count[1],
        .send_buf = (const void *const *)g->buf[0],
        .recv_buf = g->buf[1],
        .stream = g->stream,
    };
    return true;
}

void ry_group_reset(struct ry_group *g)
{
    if (g->capture == RY_CAPTURE_EMPTY)
        return;
    tally(g);
    if (g->comm)
        ry_comms_put(g->comm);
    g->comm = NULL;
    g->nccl = NULL;
    g->capture = RY_CAPTURE_EMPTY;
}

struct ry_birth_note *ry_group_birth(struct ry_group *g)
{
    if (g->nbirths == g->births_capacity) {
        int n = g->births_capacity ? 2 * g->births_capacity : 8;
        struct ry_birth_note *p = realloc(g->births, (size_t)n * sizeof *p);
        if (!p)
            return NULL;
        free_at_end(g);
        g->births = p;
        g->births_capacity = n;
    }
    struct ry_birth_note *b = &g->births[g->nbirths++];
    *b = (struct ry_birth_note){.nranks = -1, .rank = -1, .device = -1, .blocking = true};
    return b;
}
