/*
 * agreed.h: what a trace's exchange lines tell of the agreement: strategies, waits for verdicts, durations by strategy.
 *
 * Owns: gathering them over all ranks of one communicator. Not: reading lines (trace.c), the wording of reports
 * (tools).
 *
 * A duration holds the waiting for ranks that come late, and an exchange that was agreed on begins on all ranks at
 * about the same time, one that was not does not. So that both can be compared, an exchange counts with the least
 * duration of its busy ranks: the last one to arrive waits for nobody.
 */
#ifndef RY_RECORD_AGREED_H
#define RY_RECORD_AGREED_H

#include <stdbool.h>
#include <stdint.h>

#include "times.h"
#include "ways.h"

#define RY_TRACE_STRATEGIES 8
#define RY_TRACE_PLAIN 0 /* the strategy of exchanges that were not agreed on */

/* Durations of timed exchanges of one strategy and size. */
struct ry_trace_duration {
    int strategy, bin; /* ry_bin_from(bin): bytes that the busiest rank sent to, or received from, other ranks */
    uint64_t exchanges;
    double median_us;
};

struct ry_trace_agreed {
    char strategy[RY_TRACE_STRATEGIES][16]; /* names, by first appearance; [RY_TRACE_PLAIN] is "" */
    int nstrategies;                        /* 1 while nothing was agreed on, that one included */
    /* of all ranks' waits for verdicts: as a whole; without the next; for ranks that came late */
    struct ry_trace_times waited, messages, late;
    uint64_t waited_bins[RY_BINS], messages_bins[RY_BINS];
    struct ry_trace_duration *durations; /* by size, then strategy; filled by ry_agreed_finish() */
    int ndurations;
    struct ry_agreed_table { /* exchanges with a duration, by number */
        struct ry_agreed_timed *slots;
        uint64_t room, used;
    } table;
};

void ry_agreed_init(struct ry_trace_agreed *a);
void ry_agreed_free(struct ry_trace_agreed *a);

/** The index of a strategy; RY_TRACE_PLAIN for "", and where there are too many. */
int ry_agreed_strategy(struct ry_trace_agreed *a, const char *name);
/** A rank waited for a verdict, `late_us` of it for other ranks. */
void ry_agreed_wait(struct ry_trace_agreed *a, double waited_us, double late_us);
/* What plain NCCL would have taken for it, by the model. */
struct ry_agreed_plain {
    int way; /* 1 + index in struct ry_trace_ways; 0: not known */
    double us;
};
/** Exchange `number` took `us` on a rank that sent to, or received from, others at most `busy` bytes. */
void ry_agreed_duration(struct ry_trace_agreed *a, uint64_t number, int strategy, uint64_t busy, double us,
                        struct ry_agreed_plain plain);
/** All lines were read: sums up durations, and in `ways` what they are to be compared with. */
void ry_agreed_finish(struct ry_trace_agreed *a, struct ry_trace_ways *ways);

#endif
