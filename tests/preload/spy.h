/*
 * spy.h: what the tests of held groups use to look from below and from behind.
 *
 * Owns: a library that lies between librailyard.so and the emulated NCCL, and writes down the calls that NCCL gets, in
 * words, per thread; the test engine (hold_engine.c) writes its hooks into the same line. Also how the program tells
 * that engine what to do. Not: the engine, nor the cases.
 *
 * Words: ( and ) start and end a group, ~ simulates its end, s2 and r2 send to and receive from rank 2, A all-to-all,
 * R all-reduce, B broadcast, G all-gather, I the making of a communicator, P put-signal; with ' on the communicator
 * that spy_other names. Hooks have a name of their own: begin, take, end, stray, aborting, ended.
 */
#ifndef RY_TESTS_SPY_H
#define RY_TESTS_SPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SPY_RANKS 16

/** A word for this thread's line. */
void spy_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/** This thread's line so far; it begins anew. Valid until the next call in this thread. */
const char *spy_line(void);

extern void *_Atomic spy_other;

/* What the engine does with the next exchanges. */
enum spy_how {
    SPY_DECLINE,
    SPY_REVERSED,  /* take it: one group, in reversed order */
    SPY_TWO,       /* take it: two groups, in each the peers whose distance is even, or odd */
    SPY_FAIL,      /* take it, and say that it failed */
    SPY_UNTIL_END, /* wait for the abort, a while longer, and decline */
    SPY_MANY,      /* one of the first three, by the exchange's number */
};
extern _Atomic int spy_how, spy_delay_us;
extern _Atomic bool spy_waiting; /* a thread waits in SPY_UNTIL_END */

/* The latest exchange of this thread that the engine was told of. */
struct spy_exchange {
    int nranks, rank, type;
    bool held, one_call, counted; /* counted: sent and received were given */
    uint64_t ordinal, send_count[SPY_RANKS], recv_count[SPY_RANKS];
    uint32_t sent[SPY_RANKS], received[SPY_RANKS];
};
extern _Thread_local struct spy_exchange spy_latest;

/** Set by the engine: hold or let go of the communicator with this NCCL handle. */
extern void (*_Atomic spy_hold)(void *nccl, bool on);

#endif
