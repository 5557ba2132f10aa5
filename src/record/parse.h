/*
 * parse.h: the kinds of line of which a trace holds millions: exchanges, durations, and what searches for equal rows found.
 *
 * Owns: their parsing. A line spelled as lines.c does is scanned directly; any other order or spacing of the same JSON
 * is read by jansson, more slowly. Not: what is done with them (trace.c).
 */
#ifndef RY_RECORD_PARSE_H
#define RY_RECORD_PARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ry_parsed {
    uint64_t number, wall_ns, type_bytes;
    char type[16];
    uint64_t row;
    char row_by[8];
    char gather_comm[17];
    uint64_t gather_count;
    bool one_call, captured, verify;
    char strategy[16];         /* "": it was not agreed on, and the next two are 0 */
    double waited_us, late_us; /* for the verdict; of it for other ranks */
    double plain_us;           /* what the model said plain NCCL would take; 0: nothing */
    char way[8];               /* "go", "return"; "": not known */
    uint64_t row_bytes, rows, distinct, zero, cross, packed; /* of a search */
    double us;
    int room;              /* of the next two, kept from line to line */
    uint64_t *send, *recv; /* [nranks] elements; count × type_bytes never overflows */
};

enum ry_parsed_kind {
    RY_PARSED_BAD,
    RY_PARSED_ORPHAN, /* whole, but `pick` does not know whose it is */
    RY_PARSED_EXCHANGE,
    RY_PARSED_DURATION,
    RY_PARSED_ROWS
};

/** Is this line (without newline) one of them? */
bool ry_parse_is_frequent(const char *line, size_t n);

/** Parse such a line. `pick` is told the communicator and rank and returns the number of ranks, 0 for an unknown one.
 */
enum ry_parsed_kind ry_parse_frequent(struct ry_parsed *x, const char *line, size_t n,
                                      int (*pick)(void *ctx, const char *id, uint64_t rank), void *ctx);
void ry_parsed_free(struct ry_parsed *x);

#endif
