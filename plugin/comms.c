/* comms.c: see comms.h. Open addressing; removal leaves the key's place as a tombstone until it is used again. */
#include "comms.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 4096u      /* communicators alive at once */
#define KEYS (2 * SLOTS) /* a power of two; half of the places are empty, so that looking in vain ends soon */
#define ENDING (-1)      /* refs of an entry whose last reference has gone, while ry_comms_last still reads it */
#define TOMB ((void *)1)

static struct ry_comm entries[SLOTS];
static _Atomic(void *) keys[KEYS];
static _Atomic uint16_t entry_of[KEYS]; /* keys[i]'s entry */
static unsigned next_entry;              /* entries are handed out round-robin, so that a stale pointer stays stale long */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* writers only */

void (*ry_comms_last)(struct ry_comm *comm);

static unsigned hash(const void *p)
{
    return (unsigned)(((uintptr_t)p >> 4) * UINT64_C(0x9e3779b97f4a7c15) >> 40) % KEYS;
}

struct ry_comm *ry_comms_find(const void *nccl)
{
    if (!nccl)
        return NULL;
    for (unsigned i = hash(nccl), n = 0; n < KEYS; i = (i + 1) % KEYS, n++) {
        void *key = atomic_load_explicit(&keys[i], memory_order_acquire);
        if (key == nccl)
            return &entries[atomic_load_explicit(&entry_of[i], memory_order_relaxed)];
        if (!key)
            break;
    }
    return NULL;
}

struct ry_comm *ry_comms_get(const void *nccl)
{
    struct ry_comm *c = ry_comms_find(nccl);
    if (!c)
        return NULL;
    int refs = atomic_load_explicit(&c->refs, memory_order_relaxed);
    do {
        if (refs <= 0)
            return NULL;
    } while (!atomic_compare_exchange_weak_explicit(&c->refs, &refs, refs + 1, memory_order_acquire,
                                                    memory_order_relaxed));
    if (atomic_load_explicit(&c->nccl, memory_order_relaxed) != nccl) { /* ended and reused meanwhile */
        ry_comms_put(c);
        return NULL;
    }
    return c;
}

void ry_comms_put(struct ry_comm *c)
{
    int refs = atomic_load_explicit(&c->refs, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&c->refs, &refs, refs == 1 ? ENDING : refs - 1, memory_order_acq_rel,
                                                  memory_order_relaxed))
        ;
    if (refs != 1)
        return;
    if (ry_comms_last)
        ry_comms_last(c);
    free(atomic_exchange_explicit(&c->p2p, NULL, memory_order_relaxed));
    atomic_store_explicit(&c->refs, 0, memory_order_release);
}

static struct ry_comm *free_entry(void)
{
    for (unsigned n = 0; n < SLOTS; n++) {
        struct ry_comm *c = &entries[next_entry++ % SLOTS];
        if (!atomic_load_explicit(&c->refs, memory_order_acquire))
            return c;
    }
    return NULL;
}

static void clear(struct ry_comm *c)
{
    c->engine = NULL;
    c->nranks = c->rank = c->device = -1;
    atomic_store_explicit(&c->pending, RY_ASKING, memory_order_relaxed); /* by who adds it */
    c->has_id = c->has_name = false;
    atomic_store_explicit(&c->aborted, false, memory_order_relaxed);
    atomic_store_explicit(&c->revoked, false, memory_order_relaxed);
    atomic_store_explicit(&c->miscounted, false, memory_order_relaxed);
    atomic_store_explicit(&c->offering, 0, memory_order_relaxed);
    c->blocking = true;
    c->parent = NULL;
    c->ordinal = 0;
    c->color = 0;
    atomic_store_explicit(&c->splits, 0, memory_order_relaxed);
    atomic_store_explicit(&c->shrinks, 0, memory_order_relaxed);
    atomic_store_explicit(&c->exchanges, 0, memory_order_relaxed);
    atomic_store_explicit(&c->plain_groups, 0, memory_order_relaxed);
    for (int i = 0; i < RY_CALLS; i++) {
        atomic_store_explicit(&c->calls[i], 0, memory_order_relaxed);
        atomic_store_explicit(&c->bytes[i], 0, memory_order_relaxed);
    }
}

static void drop_key(const struct ry_comm *c, const void *nccl)
{
    for (unsigned i = hash(nccl), n = 0; n < KEYS; i = (i + 1) % KEYS, n++) {
        void *key = atomic_load_explicit(&keys[i], memory_order_relaxed);
        if (!key)
            return;
        if (key != nccl || &entries[atomic_load_explicit(&entry_of[i], memory_order_relaxed)] != c)
            continue;
        /* before an empty place no chain goes on, so tombstones there can be emptied: look-ups stay short */
        bool tail = !atomic_load_explicit(&keys[(i + 1) % KEYS], memory_order_relaxed);
        atomic_store_explicit(&keys[i], tail ? NULL : TOMB, memory_order_release);
        for (unsigned j = (i + KEYS - 1) % KEYS; tail && atomic_load_explicit(&keys[j], memory_order_relaxed) == TOMB;
             j = (j + KEYS - 1) % KEYS)
            atomic_store_explicit(&keys[j], NULL, memory_order_release);
        return;
    }
}

struct ry_comm *ry_comms_add(void *nccl)
{
    pthread_mutex_lock(&lock);
    struct ry_comm *c = NULL;
    for (unsigned i = hash(nccl), n = 0; n < KEYS; i = (i + 1) % KEYS, n++) {
        void *key = atomic_load_explicit(&keys[i], memory_order_relaxed);
        if (key && key != TOMB)
            continue;
        c = free_entry();
        if (!c)
            break;
        clear(c);
        atomic_store_explicit(&c->nccl, nccl, memory_order_relaxed);
        atomic_store_explicit(&c->refs, 2, memory_order_release);
        atomic_store_explicit(&entry_of[i], (uint16_t)(c - entries), memory_order_relaxed);
        atomic_store_explicit(&keys[i], nccl, memory_order_release);
        break;
    }
    pthread_mutex_unlock(&lock);
    return c;
}

void ry_comms_remove(struct ry_comm *c)
{
    pthread_mutex_lock(&lock);
    void *nccl = atomic_exchange_explicit(&c->nccl, NULL, memory_order_relaxed);
    if (nccl)
        drop_key(c, nccl);
    pthread_mutex_unlock(&lock);
    if (nccl)
        ry_comms_put(c);
}

void ry_comms_p2p(struct ry_comm *c, int direction, int peer)
{
    if (atomic_load_explicit(&c->pending, memory_order_acquire) != RY_SETTLED || peer < 0 || peer >= c->nranks)
        return;
    uint32_t *p = atomic_load_explicit(&c->p2p, memory_order_acquire);
    if (__builtin_expect(!p, 0)) {
        uint32_t *fresh = calloc(2 * (size_t)c->nranks, sizeof *fresh);
        if (!fresh)
            return atomic_store(&c->miscounted, true);
        if (atomic_compare_exchange_strong(&c->p2p, &p, fresh))
            p = fresh;
        else
            free(fresh);
    }
    p += (direction ? c->nranks : 0) + peer;
    __atomic_store_n(p, __atomic_load_n(p, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
}

void ry_comms_counts(const struct ry_comm *c, struct ry_comm_counts *out)
{
    for (int i = 0; i < RY_CALLS; i++) {
        out->calls[i] = atomic_load_explicit(&c->calls[i], memory_order_relaxed);
        out->bytes[i] = atomic_load_explicit(&c->bytes[i], memory_order_relaxed);
    }
    out->exchanges = atomic_load_explicit(&c->exchanges, memory_order_relaxed);
    out->plain_groups = atomic_load_explicit(&c->plain_groups, memory_order_relaxed);
}

void ry_comms_each(void (*f)(struct ry_comm *comm))
{
    for (unsigned i = 0; i < SLOTS; i++) {
        struct ry_comm *c = ry_comms_get(atomic_load_explicit(&entries[i].nccl, memory_order_acquire));
        if (!c)
            continue;
        f(c);
        ry_comms_put(c);
    }
}
