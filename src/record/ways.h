/*
 * ways.h: what a trace tells of equal rows, by direction: what was found, and what packing them saved or would save.
 *
 * Owns: gathering it over all ranks of one communicator, and the shares. Not: reading lines (trace.c), the wording of
 * reports (tools).
 *
 * Only some exchanges are searched. What those of one direction had in common stands for the others of it; but what was
 * saved counts only what did cross packed.
 */
#ifndef RY_RECORD_WAYS_H
#define RY_RECORD_WAYS_H

#include <stdint.h>

#define RY_TRACE_WAYS 2

struct ry_trace_way {
    char name[8];                            /* "go", "return" */
    uint64_t lines, cross;                   /* exchange lines, all ranks; bytes across nodes */
    uint64_t searched;                       /* searches, all ranks */
    uint64_t rows, distinct, zero;           /* in them */
    uint64_t from_bytes, to_bytes;           /* across nodes: as they were, and with equal rows sent once */
    uint64_t waited;                         /* searches that a thread of the job waited for */
    double waited_us;                        /* sum */
    uint64_t packed, packed_from, packed_to; /* the same of those that did cross so */
    uint64_t summed, summed_from, summed_to; /* sides of exchanges whose rows were added up before they crossed; their bytes */
    /* timed exchanges that went another way than plain NCCL and of which the model said what plain NCCL would take */
    uint64_t estimated;
    double plain_us, took_us; /* sums */
};

/* Zeroed at the start. */
struct ry_trace_ways {
    int n;
    struct ry_trace_way way[RY_TRACE_WAYS];
};

/** The one of that name; NULL if it has none or there are too many. */
struct ry_trace_way *ry_ways_of(struct ry_trace_ways *ways, const char *name);

/** Shares, 0 to 1: rows equal to an earlier one; rows of zeros; bytes that packing leaves. 0, 0 and 1 where none was
 * searched. */
double ry_way_repeated(const struct ry_trace_way *way);
double ry_way_padding(const struct ry_trace_way *way);
double ry_way_left(const struct ry_trace_way *way);
/** Bytes that were saved, by either; and that packing every exchange like those searched would save. */
uint64_t ry_way_saved(const struct ry_trace_way *way);
uint64_t ry_way_could_save(const struct ry_trace_way *way);

#endif
