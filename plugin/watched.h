/*
 * watched.h: a communicator that the profiler plugin watches, and what the group at hand comes to.
 *
 * Owns: putting p2p calls together to an exchange, or finding that they are none; NCCL's names of types and functions.
 * Not: which event means what (profiler.c).
 *
 * Threads: everything here is called with the communicator's lock held; nothing here waits.
 */
#ifndef RY_PLUGIN_WATCHED_H
#define RY_PLUGIN_WATCHED_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "hooks.h"

enum { RY_SEND, RY_RECV };

/* A communicator, and what of the group at hand concerns it. */
struct ry_watched {
    struct ry_watched *next; /* all there ever were */
    pthread_mutex_t lock;
    bool used;
    void *engine; /* its handle */
    const struct ry_hooks *hooks;
    int nranks, rank;
    struct ry_comm_counts counts;
    bool likely; /* the group before was an exchange: this one is timed if it is its turn */
    /* the group */
    uint64_t group;             /* its number; 0: none yet */
    uint64_t calls[2], told[2]; /* p2p calls the job made; of which the peers are known */
    uint64_t called_bytes[2];   /* of the calls */
    uint64_t told_bytes[2];
    bool stopped, no_exchange; /* over, as far as the job's thread goes; holds what no exchange does */
    bool mixed, one_call;      /* types; ncclAlltoAll, as copy engines do it */
    int type;
    void *stream, *clock;
    uint64_t wall_ns;
    uint64_t *count[2]; /* [nranks], bytes */
    uint8_t *seen;      /* [nranks], bit of RY_SEND and RY_RECV */
};

/* What NCCL calls a type. */
struct ry_prof_kind {
    const char *name;
    int type; /* ncclDataType_t */
    unsigned bytes;
};
/** Never NULL: what is not known counts as bytes, with one warning. */
const struct ry_prof_kind *ry_prof_type_of(const char *name);
/** RY_SEND, RY_RECV, or -1 for any other function. */
int ry_prof_direction(const char *func);

/** A call was made: for the counters at the end. */
void ry_watched_count(struct ry_watched *w, const char *func, size_t count, const char *type);

/** A new group begins; the one before, if it is still there, was no exchange. */
void ry_watched_enter(struct ry_watched *w, uint64_t number);
void ry_watched_leave(struct ry_watched *w);
/** It holds a call of this type; one with this peer. */
void ry_watched_type(struct ry_watched *w, const struct ry_prof_kind *kind);
void ry_watched_peer(struct ry_watched *w, int direction, int peer, uint64_t bytes);
/** All of it is known, as far as is going to be told (`without_self`: a copy to oneself in place is not): is it an
 * exchange? */
bool ry_watched_is_exchange(struct ry_watched *w, bool without_self);
/** It is: tell the engine, and forget it. `in_time`: its launch has just ended, on this thread, so that it can be
 * timed. */
void ry_watched_hand_over(struct ry_watched *w, bool in_time);
/** It will not be timed. */
void ry_watched_drop_clock(struct ry_watched *w);

#endif
