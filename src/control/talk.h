/*
 * talk.h: one communicator's agreement, in production: the state machines of agree.h driven by the messages of control.h.
 *
 * Owns: the lock around the machines, the waiting of the job's thread, which rank is the yardmaster (rank 0), and mirroring
 * "hold" to where the preload reads it. Not: the protocol (agree.h), how messages travel (control.h), what a strategy is worth
 * (the policy, handed in).
 *
 * Thread-safety: ry_talk_exchange() by one thread at a time, as NCCL itself wants of a communicator; ry_talk_leave() from any
 * thread while another is in ry_talk_exchange(); ry_talk_close() when none is.
 */
#ifndef RY_CONTROL_TALK_H
#define RY_CONTROL_TALK_H

#include <stdatomic.h>

#include "agree.h"
#include "control.h"

struct ry_talk;

struct ry_talk_config {
    struct ry_control *control;
    uint64_t key; /* of the communicator: equal on all ranks */
    int nranks, rank;
    const void *address; /* the yardmaster's; ignored on rank 0 */
    size_t address_size;
    double patience;                /* seconds */
    const struct ry_policy *policy; /* used on rank 0 only; called under the communicator's lock, on any thread */
    _Atomic uint32_t *hold;         /* set and cleared as the agreement goes: */
    uint32_t hold_bit;              /* this bit of it; 0: the lowest. Several talks may share one `hold` */
    /** While engaged: rank `peer` is lost or talks nonsense, `why` says how; on ranks other than 0 it is the yardmaster. Any thread. */
    void (*trouble)(void *context, int peer, const char *why);
    void *context;
};

/** Join in. The yardmaster can be talked to from here on; other ranks connect when they first have something to say. NULL with `err`: this rank then never engages, and so nobody does. */
struct ry_talk *ry_talk_open(const struct ry_talk_config *config, struct ry_err *err);
/** Tells the others that this rank is out, and frees it. */
void ry_talk_close(struct ry_talk *talk);

/**
 * Exchange `number` is about to be issued. True: nobody asks about it, it passes, and all is said. False: ask
 * ry_talk_exchange() now. So that what most exchanges cost, where nothing is agreed on, is one lock that is hardly ever taken by
 * anybody else.
 */
bool ry_talk_passes(struct ry_talk *talk, uint64_t number);
/**
 * Exchange `number` is about to be issued. False: pass it on as it is. True: `verdict` holds what all ranks agreed on (its
 * pointers are valid until the next call), and *waited_us how long that took from here.
 * Waits for other ranks while engaged: until the verdict, at most the yardmaster's patience, or ry_talk_leave().
 */
bool ry_talk_exchange(struct ry_talk *talk, uint64_t number, const struct ry_manifest *m, const void *seen, size_t seen_bytes,
                      struct ry_verdict *verdict, double *waited_us);
/** p2p that is no exchange was issued. */
void ry_talk_stray(struct ry_talk *talk);
/**
 * This rank wants no more of it: its communicator is being aborted, or what the engine does there was found to be wrong. Ends the
 * wait of ry_talk_exchange() at once, and the engagement for all ranks, in order; nothing waits here again.
 */
void ry_talk_leave(struct ry_talk *talk);

#endif
