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
        free(g->scaled[d]);
        g->named[d] = NULL, g->count[d] = NULL, g->buf[d] = NULL, g->peer_type[d] = NULL, g->scaled[d] = NULL;
    }
    free(g->order);
    g->order = NULL;
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
        ok &= (g->scaled[d] = malloc((size_t)n * sizeof *g->scaled[d])) != NULL;
    }
    ok &= (g->order = malloc(2 * (size_t)n * sizeof *g->order)) != NULL;
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
            ry_comms_add_to(&g->comm->calls[d], (uint64_t)g->calls[d]);
            ry_comms_add_to(&g->comm->bytes[d], g->bytes[d]);
        }
        g->calls[d] = 0, g->bytes[d] = 0;
    }
}

_Atomic int ry_group_paused;

bool ry_group_wanted(const struct ry_comm *c)
{
    if (atomic_load_explicit(&c->pending, memory_order_acquire) != RY_SETTLED)
        return false;
    const struct ry_comm_face *face = c->engine;
    return face && atomic_load_explicit(&face->hold, memory_order_acquire);
}

/* Paused or not. */
static bool insisted(const struct ry_comm *c)
{
    const struct ry_comm_face *face = c->engine;
    return atomic_load_explicit(&face->hold, memory_order_relaxed) & RY_HOLD_ALWAYS;
}

static void maybe_stray(struct ry_group *g)
{
    if (!g->held && (!g->comm || g->strayed || !(g->hold || ry_group_wanted(g->comm))))
        return;
    ry_group_no_exchange(g, !g->strayed);
    g->strayed = true;
}

/* One in no exchange: a send to and a receive from everybody. */
static void count_alltoall(struct ry_comm *c)
{
    for (int i = 0; i < 2 * c->nranks; i++)
        ry_comms_p2p(c, i & 1, i >> 1);
}

/* What was noted belongs to no exchange: its calls count for the ordinals, the engine may want to know, NCCL gets them.
 */
static void spoil(struct ry_group *g)
{
    for (int i = 0; i < g->ordered; i++)
        ry_comms_p2p(g->comm, g->order[i] & 1, (int)(g->order[i] >> 1));
    if (g->capture == RY_CAPTURE_CALL)
        count_alltoall(g->comm);
    g->capture = RY_CAPTURE_MIXED;
    maybe_stray(g);
    g->ordered = 0;
    g->hold = false;
}

/* The group's first call, or one on another communicator than those before. */
static void turn_to(struct ry_group *g, ncclComm_t comm, cudaStream_t stream, enum ry_capture what)
{
    if (g->capture != RY_CAPTURE_EMPTY)
        spoil(g);
    if (g->comm && g->calls[0] + g->calls[1])
        ry_comms_add_to(&g->comm->plain_groups, 1);
    tally(g);
    if (g->comm)
        ry_comms_put(g->comm);
    g->nccl = comm;
    g->comm = ry_comms_get(comm);
    g->strayed = false;
    if (g->capture != RY_CAPTURE_EMPTY || !g->comm || g->comm->pending || !reserve(g, g->comm->nranks)) {
        g->capture = RY_CAPTURE_MIXED;
        return;
    }
    g->capture = what;
    g->stream = stream;
    g->mixed_types = false;
    /* alone, a send or receive is no exchange; a communicator that does not block may answer "in progress" to each call
     */
    g->hold = ry_group_wanted(g->comm) && (!atomic_load_explicit(&ry_group_paused, memory_order_relaxed) || insisted(g->comm)) &&
              g->comm->blocking && !atomic_load(&g->comm->miscounted) && (g->depth || what == RY_CAPTURE_CALL);
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
    unsigned size = ry_nccl_type_bytes(type);
    g->calls[d]++;
    g->bytes[d] += count * size;
    if (g->capture == RY_CAPTURE_P2P && stream == g->stream && (unsigned)peer < (unsigned)g->comm->nranks &&
        g->named[d][peer] != g->epoch && size) {
        if (type != g->type)
            g->mixed_types = true;
        g->named[d][peer] = g->epoch;
        g->count[d][peer] = count;
        g->buf[d][peer] = (void *)(uintptr_t)buf;
        g->peer_type[d][peer] = (uint8_t)type;
        g->order[g->ordered++] = (uint32_t)peer << 1 | (uint32_t)d;
        g->held += g->hold;
        return;
    }
    ry_group_other(g);
    if (!g->comm)
        return;
    ry_comms_p2p(g->comm, d, peer);
    maybe_stray(g);
}

void ry_group_alltoall(struct ry_group *g, const void *send, void *recv, size_t count, int type, ncclComm_t comm,
                       cudaStream_t stream)
{
    bool first = g->capture == RY_CAPTURE_EMPTY;
    if (first || comm != g->nccl)
        turn_to(g, comm, stream, RY_CAPTURE_CALL);
    else
        ry_group_other(g);
    size_t step = count * ry_nccl_type_bytes(type);
    if (!first || g->capture != RY_CAPTURE_CALL || !ry_nccl_type_bytes(type)) {
        g->capture = RY_CAPTURE_MIXED;
        if (g->comm) {
            count_alltoall(g->comm);
            maybe_stray(g);
        }
        return;
    }
    g->type = type;
    g->held = g->hold;
    for (int r = 0; r < g->comm->nranks; r++) {
        g->count[0][r] = g->count[1][r] = count;
        g->buf[0][r] = (char *)(uintptr_t)send + (size_t)r * step;
        g->buf[1][r] = (char *)recv + (size_t)r * step;
    }
}

void ry_group_other(struct ry_group *g)
{
    if (g->capture == RY_CAPTURE_P2P || g->capture == RY_CAPTURE_CALL)
        spoil(g);
    g->capture = RY_CAPTURE_MIXED;
}

ncclResult_t ry_group_replay(struct ry_group *g,
                             ncclResult_t (*pass)(const struct ry_group *g, int direction, int peer))
{
    ncclResult_t r = ncclSuccess;
    int held = g->held;
    g->held = 0;
    for (int i = 0; i < held && (r == ncclSuccess || r == ncclInProgress); i++)
        r = g->ordered ? pass(g, g->order[i] & 1, (int)(g->order[i] >> 1)) : pass(g, 2, -1);
    return r;
}

bool ry_group_exchange(struct ry_group *g, struct ry_exchange *x)
{
    if (g->capture == RY_CAPTURE_EMPTY)
        return false;
    /* no peer was named twice, so as many calls as ranks means every rank */
    int n = g->capture == RY_CAPTURE_MIXED ? -1 : g->comm->nranks;
    if (n < 0 || (g->capture == RY_CAPTURE_P2P && (g->calls[0] != n || g->calls[1] != n))) {
        spoil(g);
        return false;
    }
    for (int d = 0; g->mixed_types && d < 2; d++)
        for (int r = 0; r < n; r++)
            g->scaled[d][r] = g->count[d][r] * ry_nccl_type_bytes(g->peer_type[d][r]);
    uint64_t **count = g->mixed_types ? g->scaled : g->count;
    int type = g->mixed_types ? ncclUint8 : g->type;
    const uint32_t *p2p = atomic_load_explicit(&g->comm->p2p, memory_order_acquire);
    *x = (struct ry_exchange){
        .nranks = n,
        .rank = g->comm->rank,
        .type = type,
        .type_bytes = ry_nccl_type_bytes(type),
        .one_call = g->capture == RY_CAPTURE_CALL,
        .send_count = count[0],
        .recv_count = count[1],
        .send_buf = (const void *const *)g->buf[0],
        .recv_buf = g->buf[1],
        .stream = g->stream,
        .held = g->held > 0,
        .ordinal = atomic_load_explicit(&g->comm->exchanges, memory_order_relaxed),
        .sent = p2p,
        .received = p2p ? p2p + n : NULL,
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
    g->held = g->ordered = 0;
    g->hold = g->strayed = false;
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
