/*
 * later.h: exchanges that are carried out after the job's call has returned (RAILYARD_HOLD=no).
 *
 * Owns: one queue and one thread for each thread of the job that gives exchanges away; letting the job's stream wait
 * for them and letting it go; who has to wait for whom on the host meanwhile; whether a stream can be used so at all;
 * and the end of a process where nothing else is left. Not: the way of an exchange (exchange.c), which is the same on
 * any thread.
 *
 *   the job's stream S    ... [event] [wait for OVER >= n] what the job enqueues next ...
 *   Railyard's stream R   [wait for the event] [CAME = n] the exchange [OVER = n]
 *
 * R belongs to the communicator, the thread to the job's thread: a thread's exchanges are agreed on and enqueued one
 * after the other in the order in which it made them, and any other call of NCCL that it makes waits for that first. So
 * what waits for what is the same as when the thread itself is held: docs/holding-the-host.md.
 *
 * S is let go when the bytes are there, or when the communicator was aborted, and for no other reason. What cannot be
 * done any more after the call has returned success ends the process, with a line.
 */
#ifndef RY_ENGINE_LATER_H
#define RY_ENGINE_LATER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "hooks.h"
#include "policy.h"

struct comm;
struct way;

enum { RY_LATER_STREAMS = 4 }; /* of the job's that are told apart on one communicator */
enum {
    RY_LATER_CAME,  /* the latest ticket whose turn came on its S */
    RY_LATER_OVER,  /* the latest that S need not wait for any more: written by R */
    RY_LATER_TRIED, /* the same of trials: written by the host */
    RY_LATER_FROM,  /* what a rank sends itself in a trial, and where to */
    RY_LATER_TO,
    RY_LATER_WORDS = 8
};

/* A communicator's part. */
struct ry_later {
    void *stream;                 /* R; NULL: none yet */
    uint32_t *word;               /* [RY_LATER_WORDS], in memory that streams can wait for */
    uint32_t ticket, trial;       /* given to the latest exchange, and to the latest trial */
    struct ry_later_queue *queue; /* where those pending are */
    _Atomic int pending;          /* given away, and not enqueued */
    struct {
        void *stream;
        int trials; /* that did not come out well */
        bool good;
    } tried[RY_LATER_STREAMS];
    int ntried;
    int kept;          /* exchanges that were not given away because of the node's communicator: */
    bool settled;      /* until it has been used, or is not to be waited for, */
    bool no_split;     /* and not to be made any more */
    struct comm *next; /* of those with a stream */
    uint32_t late;     /* the ticket that is looked at, and for how many ticks S has waited for it */
    unsigned late_ticks;
    bool late_said;
    uint64_t given; /* away, all in all */
    bool ended;     /* comm_ended() came while some were pending */
    enum ry_death how;
    struct ry_comm_counts *counts;
};

/** The option is on; before the first communicator. */
void ry_later_start(void);
bool ry_later_on(void);

/**
 * On the job's thread, in exchange_take(). True: the exchange is given away, or was carried out by ry_exchange_carry()
 * to try whether it can be the next time; *result is the job's. False: it is to be carried out now, and everything that
 * must come before it has been enqueued.
 */
bool ry_later_take(struct comm *c, const struct ry_exchange *x, const struct way *way, int *result);
/** What the communicator's manifests say of the node's communicator: making it may need what a stream that waits keeps
 * busy. */
enum ry_node_state ry_later_node(const struct comm *c, enum ry_node_state state);

/** The hooks of these names (hooks.h). */
void ry_later_settle(void *comm);
void ry_later_freeing(double most);
void ry_later_freed(void);

/** The job aborts the communicator, which was told to the agreement: gives what is pending a moment to end. */
void ry_later_aborting(struct comm *c);
/** True: something is pending there, and ry_comm_end() is called when that has ended. */
bool ry_later_ends(struct comm *c, enum ry_death how, const struct ry_comm_counts *counts);
/** The communicator has ended: its stream goes. */
void ry_later_end(struct comm *c);
/** The process exits: waits a moment for what is pending; other ranks need it. Nothing is given away any more. */
void ry_later_close(void);

#endif
