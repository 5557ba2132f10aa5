/*
 * comms.h: the communicators of this process, as the preload knows them.
 *
 * Owns: the table ncclComm_t → what we know of it, and how long an entry lives. Not: when communicators are made or end
 * (preload.c), nor what the engine keeps about them (its handle is just carried here).
 *
 * Looking one up takes no lock: it happens in every NCCL call of the job. The table has a fixed size and lives in .bss,
 * which costs nothing until it is touched; a communicator too many is simply not seen. Entries are counted by references:
 * a group that holds one keeps the engine's handle alive while another thread aborts the communicator.
 */
#ifndef RY_PLUGIN_COMMS_H
#define RY_PLUGIN_COMMS_H

#include <stdatomic.h>

#include "hooks.h"

/* Made non-blocking, a communicator is asked for its ranks when it is ready, by one thread. */
enum ry_pending { RY_SETTLED, RY_PENDING, RY_ASKING };

struct ry_comm {
    _Atomic(void *) nccl; /* ncclComm_t; NULL: the entry is free or its communicator has ended */
    _Atomic int refs;     /* 0: free, < 0: ending. One for being in the table, one for each group that holds it */
    void *engine;         /* handle of the engine, NULL: not followed */
    int nranks, rank, device;
    _Atomic int pending; /* enum ry_pending: not 0 while nranks, the rest and `engine` are not known */
    _Atomic bool aborted, revoked;
    _Atomic int offering;             /* threads that hold an exchange back and have not given it to NCCL yet */
    _Atomic uint32_t splits, shrinks; /* children made so far; all ranks count alike */
    /* what comm_created needs, kept while pending */
    enum ry_birth birth;
    uint32_t ordinal;
    int color;
    struct ry_comm *parent; /* holds a reference while pending */
    bool has_id, has_name, blocking;
    uint8_t unique_id[RY_NCCL_ID_BYTES];
    char name[64];
    _Atomic uint64_t calls[RY_CALLS], bytes[RY_CALLS], exchanges, plain_groups;
    /* p2p calls to each peer [0 .. nranks) and from each [nranks .. 2 nranks), beyond those of exchanges; NULL: none
     * yet */
    _Atomic(uint32_t *) p2p;
    _Atomic bool miscounted; /* there was no memory for them */
};

/* Counting, on the job's way. NCCL wants the calls on one communicator one after the other, whatever thread makes them:
   no locked instruction is needed. */
static inline void ry_comms_add_to(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n, memory_order_relaxed);
}

/** The entry of a live communicator, with no reference taken: good for counting. NULL if it is not followed. */
struct ry_comm *ry_comms_find(const void *nccl);
/** The same with a reference, to be given back by ry_comms_put(). */
struct ry_comm *ry_comms_get(const void *nccl);
void ry_comms_put(struct ry_comm *comm);

/** A new, empty entry with two references: one for the table (ry_comms_remove drops it), one for the caller. NULL: full. */
struct ry_comm *ry_comms_add(void *nccl);
/** Takes the communicator out of the table: later look-ups miss. What it had ends when the last reference goes. */
void ry_comms_remove(struct ry_comm *comm);

/** Called with an entry whose last reference went; it is free afterwards. Set once, before the first entry. */
extern void (*ry_comms_last)(struct ry_comm *comm);

/** Count a send to (direction 0) or receive from (1) `peer` that belongs to no exchange. */
void ry_comms_p2p(struct ry_comm *comm, int direction, int peer);

void ry_comms_counts(const struct ry_comm *comm, struct ry_comm_counts *out);

/** Call `f` for every entry in the table. */
void ry_comms_each(void (*f)(struct ry_comm *comm));

#endif
