/*
 * internal.h: what the files of the control plane share: control.c (the thread, starting and stopping), lines.c (lines
 * and their handlers) and peers.c (other processes and UCX).
 *
 * One mutex, `lock`, guards everything here and is held around every call of UCX, by the progress thread, by threads
 * that send, and by those that lend a hand: UCX then needs no locks (which would spin) of its own, and the order of
 * messages is the order in which senders took it. UCX's callbacks run under it and only put messages into a line's
 * inbox; the line's handlers are called afterwards, without it (ry_lines_dispatch()). All functions here are called
 * with it held.
 *
 * Another process is a *peer*, under the number of its slot in `peers`. To a yardmaster's process we make the peer;
 * those who made us theirs get another slot here, even if it is the same process. A peer begins with a tie (watch.h);
 * what is sent before that is up waits, so that whoever is heard of is also watched.
 */
#ifndef RY_CONTROL_INTERNAL_H
#define RY_CONTROL_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "control/control.h"
#include "control/tame.h"
#include "control/watch.h"

#define RY_FLUSH_NS 100000000ull /* what closing may take */

enum kind { HELLO, DATA, BYE };

/* Goes before every message. Both ends are of one machine type, as NCCL demands. */
struct header {
    uint64_t key, uid; /* of the line; of the sending process */
    uint32_t slot;     /* the receiver's for the sender */
    uint32_t from, to, seq;
    uint32_t kind, spare;
};

struct item { /* a message that came */
    struct item *next;
    struct header h;
    struct peer *peer; /* NULL: from this process */
    uint64_t born;
    size_t size;
    char bytes[];
};
struct list {
    struct item *first, **end;
};

struct out { /* a message that goes */
    struct out *next;
    struct peer *peer;
    struct header h;
    size_t size;
    char bytes[];
};

struct peer {
    struct ry_control *control;
    uint64_t uid;
    uint32_t slot, theirs;
    bool ours; /* we made it: it is where a yardmaster lives */
    bool up, gone;
    struct ry_tie *tie;
    ucp_ep_h ep; /* made when the first message is sent */
    bool ep_failed;
    void *address;            /* UCX's */
    struct out *queue, **end; /* sent before it was up */
    unsigned flying;
    char why[RY_WATCH_REASON];
};

struct way { /* between a line and one of its ranks */
    struct peer *peer;
    bool known, here; /* has spoken; lives in this process */
    bool lost, told;
    uint32_t out, in; /* messages so far */
    const char *why;
};

struct ry_line {
    struct ry_line *next;
    struct ry_control *control;
    struct ry_line_handlers on;
    uint64_t key;
    uint32_t nranks, rank, ways;
    struct list inbox;
    uint32_t untold; /* losses */
    uint64_t wake_at;
    bool due, ready, dispatching, closing;
    struct way way[]; /* rank 0: to all; others: to rank 0 */
};

struct ry_control {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a line is not dispatching any more; something that was sent is through */
    pthread_t thread;
    int wake;
    bool stop;
    unsigned waiters;
    struct ry_own_ucx ucx;
    struct ry_watch *watch;
    uint64_t uid;
    char *address;
    size_t address_size;
    struct peer **peers;
    uint32_t npeers;
    struct ry_line *lines;
    struct list unclaimed;
    size_t unclaimed_bytes;
    uint64_t asleep_until;  /* 0: the thread is awake */
    bool napping;           /* asleep, but looks again within NAP_NS */
    _Atomic uint32_t ready; /* lines with something to tell */
    _Atomic uint64_t polled_at;
};

/* What ry_control_address() gives: this, then the watch's part, then UCX's. */
struct address_head {
    char magic[8];
    uint32_t watch_size, ucx_size;
};

static inline void ry_list_init(struct list *l)
{
    l->first = NULL;
    l->end = &l->first;
}

static inline void ry_list_put(struct list *l, struct item *i)
{
    i->next = NULL;
    *l->end = i;
    l->end = &i->next;
}

static inline struct item *ry_list_take(struct list *l)
{
    struct item *i = l->first;
    if (i && !(l->first = i->next))
        l->end = &l->first;
    return i;
}

static inline void ry_wake(struct ry_control *c)
{
    if (c->asleep_until)
        eventfd_write(c->wake, 1);
}

static inline struct item *ry_item_new(const struct header *h, struct peer *peer, const void *bytes, size_t size)
{
    struct item *i = malloc(sizeof *i + size);
    if (!i)
        return NULL;
    i->h = *h, i->peer = peer, i->size = size;
    if (size)
        memcpy(i->bytes, bytes, size);
    return i;
}

/* ---- lines.c ---- */

/** A message came, from another process or from this one; takes it over. */
void ry_lines_deliver(struct ry_control *c, struct item *i);
/** All lines that reach a rank by `p` lose it. */
void ry_lines_lose(struct ry_control *c, const struct peer *p);
/** Calls the handlers of lines with something to tell, without the lock meanwhile. Those that another thread is telling
 * are left to it. */
bool ry_lines_dispatch(struct ry_control *c);
/** Timers that have come, messages that nobody claimed; returns when to look again. */
uint64_t ry_lines_look_at_clock(struct ry_control *c, uint64_t now);

/* ---- peers.c ---- */

int ry_peers_start(struct ry_control *c, struct ry_err *err);
/** The peer at a yardmaster's address; made if need be. */
struct peer *ry_peer_at(struct ry_control *c, const char *address, const struct address_head *head, uint64_t uid,
                        struct ry_err *err);
void ry_peer_send(struct peer *p, const struct header *h, const void *bytes, size_t size);
void ry_peer_gone(struct peer *p, const char *why);
/** Closes the endpoints of peers that are gone: not from inside UCX's callbacks. */
void ry_peers_close_broken(struct ry_control *c);

/* The watch's hooks. */
int64_t ry_peers_arrived(void *context, struct ry_tie *tie, uint64_t uid, uint32_t number, const void *card,
                         size_t card_size);
void ry_peers_tied(void *context, uint32_t mine, uint32_t theirs);
void ry_peers_gone(void *context, uint32_t mine, const char *why);

#endif
