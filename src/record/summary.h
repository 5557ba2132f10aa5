/*
 * summary.h: what a trace says about one communicator, in the numbers a report shows.
 *
 * Owns: the arithmetic (sums, shares, imbalance, times) and the inference of what a communicator is for. All forms of
 * the report (text, JSON, picture) are written from this, so that they cannot differ. Not: reading (trace.h), wording
 * of reports (tools/railyard).
 *
 * Bytes are bytes of the job's send buffers, self included in the total. A node's cross-node bytes are counted at the
 * sender and at the receiver separately. Imbalance is max / mean, 1.0 being even; 0 where nothing was sent.
 */
#ifndef RY_RECORD_SUMMARY_H
#define RY_RECORD_SUMMARY_H

#include "trace.h"

struct ry_peak { /* the largest of several values, and how much above their mean */
    int who;     /* -1: all zero */
    uint64_t value;
    double over_mean;
};

struct ry_summary {
    const struct ry_trace_comm *comm;
    char kind[64], why[160];                            /* inferred: "expert-parallel (all-to-all)", and from what */
    uint64_t exchanges;                                 /* of the rank that counted most */
    uint64_t bytes, self, in_node, cross_node, unknown; /* unknown: between ranks of which a node is not known */
    uint64_t *sent, *received;                          /* [nranks], self left out */
    uint64_t *nodes;                                    /* [nnodes * nnodes], from × to; NULL where no node is known */
    struct ry_peak peak_sent, peak_received;            /* ranks, self left out */
    struct ry_peak node_out, node_in;                   /* nodes, cross-node bytes */
    uint64_t dropped, dropped_durations;
    /* time, of the ranks with samples */
    int timed_ranks, longest, shortest; /* ranks by median; -1 without samples */
    double median_longest, median_shortest, p95,
        median;       /* us; p95: the largest of the ranks'; median: of the ranks' medians */
    double cross_gbs; /* cross-node GB/s per rank while an exchange runs, mean; 0 unknown */
    /* exchanges that were agreed on, of the rank that saw most: by strategy as in comm->agreed, all, those that were verified */
    uint64_t by_strategy[RY_TRACE_STRATEGIES], agreed, verified;
    uint64_t verify_differs, short_of_staging, over_ucx; /* by the counters; 0 where no rank gave any */
    uint64_t clocked_us, beside_us; /* the same, all ranks: what exchanges took of which it is known what ran beside; of it beside others' */
    /* do senders and receivers agree? */
    uint64_t pairs_checked, pairs_differ, differ_sent, differ_received;
    int differ_from, differ_to; /* the first such pair */
    bool same_exchanges;        /* all ranks that are there counted the same number */
};

/** 0, or -1 without memory. */
int ry_summary_make(struct ry_summary *out, const struct ry_trace *trace, const struct ry_trace_comm *comm,
                    struct ry_err *err);
void ry_summary_free(struct ry_summary *summary);

#endif
