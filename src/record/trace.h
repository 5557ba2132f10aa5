/*
 * trace.h: reading a folder of traces back: all ranks' files, merged by communicator.
 *
 * Owns: parsing docs/trace-format.md, the merge, and telling what was missing or unreadable (notes). Not: what the
 * numbers mean (summary.h), nor how they are shown (tools).
 *
 * Reading is a stream: memory holds matrices and statistics per communicator and rank, never the lines. A damaged line
 * is skipped, a damaged or missing file likewise, and each is noted; ry_trace_open() fails only when nothing can be
 * read.
 *
 * Threads: an opened trace is read-only.
 */
#ifndef RY_RECORD_TRACE_H
#define RY_RECORD_TRACE_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "agreed.h"
#include "base/error.h"
#include "local.h"
#include "times.h"
#include "ways.h"

/* What one rank of a communicator recorded. */
struct ry_trace_rank {
    int process; /* index into ry_trace.processes */
    int device;
    char *node, *host, *gpu, *nic; /* of its seat; "" unknown */
    double nvlink_gbs, nic_gbs;
    char *matrix;       /* file name */
    uint64_t lines;     /* exchange lines that could be used */
    uint64_t exchanges; /* all it counted, dropped ones and those over the limit included */
    uint64_t saved;     /* how many of them its matrix file holds, as its last matrix line says */
    uint64_t dropped, dropped_durations;
    char how[16]; /* of its end: "destroy", …; "open" the process ended first; "" no end was seen */
    /* [nranks] bytes to and from each peer, and how many transfers with a count above zero */
    uint64_t *sent, *received, *sends, *receives;
    struct ry_trace_times times;
    uint64_t by_strategy[RY_TRACE_STRATEGIES], verified; /* of its exchange lines; index: ry_trace_agreed.strategy */
};

struct ry_trace_row { /* a row width that was seen */
    uint64_t bytes, exchanges;
    char source[8];
};
#define RY_TRACE_ROWS 8
#define RY_TRACE_TYPES 16

struct ry_trace_comm {
    char id[17], parent[17], birth[16];
    char *name;                   /* or NULL */
    int nranks, present;          /* ranks, and those that were read */
    struct ry_trace_rank **ranks; /* [nranks], NULL where missing */
    int nnodes, *node;            /* node of each rank; -1 where it is not known */
    char **hosts;                 /* [nnodes] */
    bool mapped;                 /* the nodes come from a cluster map, not from the seats of the ranks that were read */
    uint64_t first_ns, last_ns;  /* wall clock of the first and last exchange line; 0 none */
    uint64_t one_call, captured; /* exchange lines that were ncclAlltoAll; under graph capture (all ranks) */
    struct ry_trace_row rows[RY_TRACE_ROWS]; /* by first appearance, all ranks */
    int nrows;
    struct {
        char name[16];
        uint64_t exchanges;
    } types[RY_TRACE_TYPES];
    int ntypes;
    char gather_comm[17]; /* where the int64 all-gathers before its exchanges went, the last one seen */
    uint64_t gathers, gather_count;
    struct ry_trace_agreed agreed; /* what its exchange lines tell of the agreement */
    struct ry_trace_ways ways;     /* of equal rows, by direction */
    struct ry_trace_local local;   /* what stays on its rank and node, by direction and over time */
    json_t *counters;              /* object: sums over the ranks */
    bool counted;                  /* at least one rank gave counters */
};

struct ry_trace_process {
    char *file, *host;
    int pid, nccl, env_rank, env_world; /* env_*: -1 when not set */
    char railyard[16];
    uint64_t wall_ns;
    bool ended;        /* it has an end line */
    char stopped[160]; /* why it stopped recording, "" it did not */
    uint64_t dropped, not_written, bad_lines, orphan_lines;
};

struct ry_trace {
    char *dir;
    int nprocesses, ncomms, nnotes;
    struct ry_trace_process *processes;
    struct ry_trace_comm **comms; /* in order of first appearance */
    char **notes;                 /* what was skipped or missing, one line each */
    uint64_t lines, bytes;        /* read in all */
};

/** Read every trace-*.jsonl in `dir`. NULL with `err` when there is none, or none can be read. */
struct ry_trace *ry_trace_open(const char *dir, struct ry_err *err);
void ry_trace_close(struct ry_trace *trace);

/** Bytes that rank `from` sent to rank `to`: as the sender saw it or, where more is known there, the receiver. */
uint64_t ry_trace_bytes(const struct ry_trace_comm *comm, int from, int to);

#endif
