/*
 * internal.h: what hub.c (UCX and its thread) and carrier.c (streams, words, staging memory) share.
 *
 * One thread, the hub's, makes every call of UCX. What other threads want of it they leave in a carrier under the
 * carrier's lock and set `news`. Members are the hub's thread's unless it says otherwise.
 */
#ifndef RY_UCX_INTERNAL_H
#define RY_UCX_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "carrier.h"
#include "control/tame.h"

enum { READY, DONE }; /* words: written by the stream; by the hub */

/* What goes to or comes from one rank in one piece. */
struct op {
    struct ry_carrier *c;
    bool send, done;
    int peer;
    uint32_t ready; /* to begin when READY is there */
    ucp_tag_t tag;
    void *at;
    size_t bytes;
    void *request; /* under way */
    ucp_tag_recv_info_t info;
};

/* The transfers of one group. */
struct job {
    struct job *next;
    uint64_t number; /* of the exchange */
    uint32_t
        before; /* DONE is beyond it by one for each receive, in order, that is over, and by one more when all is */
    int nrecv, nops; /* receives come first; sends in ascending order of `ready` */
    int recvs_begun, sends_begun, recvs_over, flying;
    uint64_t since; /* it came; 0: not yet */
    bool said;      /* that it takes long */
    struct op op[];
};

/* Another process. */
struct remote {
    struct remote *next;
    struct ry_hub *hub;
    uint64_t uid;
    ucp_ep_h ep;
    bool dead;
    char why[120];
};

struct card { /* as it travels, followed by UCX's address */
    uint64_t uid;
    uint32_t port, size;
};

struct peer {
    struct card *card; /* under the lock, until all have come */
    char *gone;        /* under the lock: why, as told */
    const char *why;   /* it is lost */
    struct remote *remote;
    uint32_t port, out, in; /* pieces so far: of the thread that begins exchanges */
    struct op hello[2];
    uint64_t greeting[2];
    bool lost;
};

struct block {
    struct block *next;
    void *memory;
    uint64_t bytes;
};

struct copied { /* a piece, out of or into the job's memory */
    void *to, *from;
    uint64_t bytes;
    uint32_t value; /* of READY that says so, or of DONE to wait for */
};

struct ry_carrier {
    struct ry_cross face;
    struct ry_carrier *next;
    struct ry_carrier_config config;
    char name[24];
    bool staged, at_once; /* at_once: the caller is the stream (host memory) */
    ucs_memory_type_t memory_type;
    uint32_t port;
    struct card *card;
    size_t card_size;
    _Atomic uint32_t *word; /* [2], pinned */
    struct peer *peer;      /* [nranks] */
    int npeers;
    _Atomic int state;
    _Atomic bool news, aborted;
    _Atomic int owners; /* the engine's, the hub's, one for a thread that takes memory */

    pthread_mutex_t lock; /* of what comes next */
    pthread_cond_t changed;
    struct job *jobs, **jobs_end; /* handed over */
    int cards;                    /* that have come */
    bool failed, ended, leak;
    int failed_peer;
    char why[200];
    struct block *block; /* the one in use, then those before it */
    bool growing;
    uint32_t done_given; /* the last value of DONE that somebody waits for */

    /* of the thread that begins exchanges */
    uint32_t ready_next;
    struct copied *landing; /* what has come */
    int nlandings, landings_room;
    uint32_t last_done;
    uint64_t sent; /* bytes */

    /* the hub's */
    bool told, hopeless_told; /* told: greeted its peers */
    int greetings;            /* still to come */
    uint64_t made_at;
    struct job *first, **end;
    uint64_t failed_at, failed_number;
};

struct ry_hub {
    const struct ry_device *device;
    int ordinal;
    bool direct;
    pthread_t thread;
    int wake;
    _Atomic bool sleeping, stop, over;
    _Atomic bool news;
    struct ry_own_ucx ucx;
    uint64_t uid, memory_types;
    pthread_mutex_t lock;        /* of: */
    struct ry_carrier *arriving; /* made, and not in the list yet */
    uint32_t ports;
    struct ry_carrier *carriers;
    struct remote *remotes;
};

/** Something was left for the hub in `c`. Any thread. */
void ry_hub_tell(struct ry_carrier *c);
/** A number of this process's for a communicator; 0: there are no more. */
uint32_t ry_hub_port(struct ry_hub *hub);
void ry_hub_add(struct ry_carrier *c);
/** Of piece number `count` to or from a rank. Once all cards have come: any thread. */
ucp_tag_t ry_hub_tag(const struct ry_carrier *c, bool send, int peer, uint32_t count);

/* carrier.c, on the hub's thread */
/** DONE moves on, unless the communicator was aborted meanwhile. */
void ry_carrier_done(struct ry_carrier *c, uint32_t value);
void ry_carrier_fail(struct ry_carrier *c, uint64_t number, int peer, const char *why);
/** It failed long ago, and nobody has aborted the communicator. */
void ry_carrier_give_up(struct ry_carrier *c);
void ry_carrier_unref(struct ry_carrier *c);

#endif
