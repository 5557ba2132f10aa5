/*
 * ring.h: a ring of records between one producing and one consuming thread, without locks.
 *
 * Owns: the bytes and the two positions. Not: what a record holds, who is woken, or what happens when there is no room.
 *
 * Records lie contiguous, 8-byte aligned, each behind an 8-byte header; one that would cross the end of the buffer
 * starts at its beginning instead, so a record of up to half the ring always fits into an empty ring. Positions only
 * grow.
 */
#ifndef RY_RECORD_RING_H
#define RY_RECORD_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

struct ry_ring {
    unsigned char *data;
    uint64_t size; /* a power of two */
    /* The producer's side, on its own cache line. */
    _Alignas(64) _Atomic uint64_t head;
    uint64_t tail_seen; /* the last tail that the producer looked at */
    uint64_t next;      /* where head goes on commit */
    /* The consumer's. */
    _Alignas(64) _Atomic uint64_t tail;
    uint64_t head_seen;
};

static inline bool ry_ring_init(struct ry_ring *r, uint64_t bytes)
{
    r->size = 4096;
    while (r->size < bytes && r->size < UINT64_C(1) << 40)
        r->size *= 2;
    r->data = aligned_alloc(64, r->size);
    return r->data;
}

/** Producer: room for a record of `bytes`, or NULL when the ring is too full. Nothing is seen before the commit. */
static inline void *ry_ring_reserve(struct ry_ring *r, uint64_t bytes)
{
    uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
    uint64_t at = head & (r->size - 1), need = 8 + ((bytes + 7) & ~UINT64_C(7)), skip = 0;
    if (need > r->size)
        return NULL;
    if (need > r->size - at)
        skip = r->size - at;
    if (head + skip + need - r->tail_seen > r->size) {
        r->tail_seen = atomic_load_explicit(&r->tail, memory_order_acquire);
        if (head + skip + need - r->tail_seen > r->size)
            return NULL;
    }
    if (skip) {
        *(uint64_t *)(r->data + at) = 0; /* "go to the beginning" */
        at = 0;
    }
    *(uint64_t *)(r->data + at) = need;
    r->next = head + skip + need;
    return r->data + at + 8;
}

/** Producer: hand over what was reserved. Sequentially consistent, so that a consumer about to sleep is seen after it.
 */
static inline void ry_ring_commit(struct ry_ring *r)
{
    atomic_store(&r->head, r->next);
}

/** Producer: bytes in use, as far as it knows (the truth may be less). */
static inline uint64_t ry_ring_used(const struct ry_ring *r)
{
    return r->next - r->tail_seen;
}

/** Consumer: the oldest record, or NULL. It stays in place until the pop. */
static inline void *ry_ring_peek(struct ry_ring *r)
{
    for (;;) {
        uint64_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
        if (tail == r->head_seen && tail == (r->head_seen = atomic_load(&r->head)))
            return NULL;
        uint64_t at = tail & (r->size - 1);
        if (*(uint64_t *)(r->data + at))
            return r->data + at + 8;
        atomic_store_explicit(&r->tail, tail + (r->size - at), memory_order_release);
    }
}

static inline void ry_ring_pop(struct ry_ring *r)
{
    uint64_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
    atomic_store_explicit(&r->tail, tail + *(uint64_t *)(r->data + (tail & (r->size - 1))), memory_order_release);
}

#endif
