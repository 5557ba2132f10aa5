/*
 * rows.h: equal rows of a send buffer, found, packed once, and expanded again.
 *
 * Owns: the kernels (rows.cu) and their host twins that tell, for each destination node, which rows of what is sent to its ranks
 * are equal byte by byte; that pack the distinct ones with a list of who is which; and that write the rows out again at the
 * other end. Not: what a row is (engine/row_width.c), whether looking pays (the policy), how the packed message travels
 * (plan/dedup.c).
 *
 * Equality. Rows are candidates when a 62-bit hash of 128 bytes sampled from them is equal, or, where such candidates turned out to
 * differ, a hash of all their bytes; a row counts as equal to the first row of its hash (in the order of the message's list) only after all bytes were compared. Rows whose hash collides without being equal stay distinct. So a
 * hash can cost savings, never bytes. Segments that are no whole number of rows end in a shorter last row, which is
 * distinct; in the message it is filled up with zeros. The result is the same on every run and every backend.
 *
 * The message to a node, as ry_rows_pack() writes and ry_rows_expand() reads it, all ranks alike:
 *   distinct rows in order of their first appearance, row_bytes each, the first at offset 0;
 *   padding to 16 bytes;
 *   for every part (as a rule there is one), for every destination rank of the node in ascending order, for every row of its
 *   segment: uint32_t, the distinct row.
 * Its size follows from the counts alone: ry_rows_message_bytes().
 *
 * Everything is enqueued on the caller's stream; nothing waits but ry_rows_found_wait() and, perhaps, ry_rows_new(). Memory is
 * taken when the scanner is made or grown, never during an exchange. One scanner is used by one thread at a time.
 */
#ifndef RY_RUN_ROWS_H
#define RY_RUN_ROWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "device/device.h"

#define RY_ROWS_MOST (1ull << 31) /* rows of a scan, or of a message */
#define RY_ROWS_NODES 1023        /* of a communicator that scans, at least; more if ry_rows_new() was told so */

struct ry_rows; /* a scanner: one per communicator */

/** For a communicator of `nranks` ranks, rank r on node[r] (copied), on device `ordinal`. 0 ranks: expands, and scans after
 *  ry_rows_layout(). May wait for the device, which loads the kernels. */
struct ry_rows *ry_rows_new(const struct ry_device *device, int ordinal, int nranks, int nnodes, const int *node,
                            struct ry_err *err);
/** Other ranks and nodes from here on, of which there may be RY_ROWS_NODES at least. What was found before is forgotten; memory
 *  goes back in stream order if they are not the same as before. Never waits. */
int ry_rows_layout(struct ry_rows *rows, int nranks, int nnodes, const int *node, struct ry_err *err);
/** Memory goes back in stream order. */
void ry_rows_free(struct ry_rows *rows);
/** Be able to scan up to `nrows` rows (2^31 at most) at once, in order of `stream`. -1 with `err` when memory is short: what was
 *  there stays. Takes 45 to 77 bytes per row. What was found before is forgotten. */
int ry_rows_grow(struct ry_rows *rows, uint64_t nrows, void *stream, struct ry_err *err);
uint64_t ry_rows_capacity(const struct ry_rows *rows);
/** Bytes of device memory for such a capacity; bytes held now. */
uint64_t ry_rows_memory(const struct ry_rows *rows, uint64_t nrows);
uint64_t ry_rows_held(const struct ry_rows *rows);

struct ry_rows_input {
    const void *const *send;    /* [nranks] */
    const uint64_t *send_bytes; /* [nranks] */
    uint64_t row_bytes;         /* > 0 */
    const bool *scan_node;      /* [nnodes]: nodes to look at; NULL: all */
    bool copies;                /* count how often rows occur, too, */
    uint32_t times;             /* beside how often a token's do, if that is known */
    struct ry_rows *told;       /* a scanner whose latest scan was the same rows', all ranks on one node, copies counted; or NULL. Where rows
                                   that occur a multiple of its `times` are few, and all others occur `times`, those few go as distinct ones */
    int parts;                  /* that rows are taken in, as struct ry_repeats has it (plan/plan.h); 0: 1 */
};
/** Enqueue the search. -1 with `err`: too many rows for the capacity, or the device refused. */
int ry_rows_scan(struct ry_rows *rows, const struct ry_rows_input *in, void *stream, struct ry_err *err);

struct ry_rows_found {
    const uint64_t *rows;     /* [nnodes] rows sent to each node (of nodes scanned; 0 for others) */
    const uint64_t *distinct; /* [nnodes] of them distinct */
    const uint64_t *zero;     /* [nnodes] of them all zero bytes: padding, as a rule */
    const uint64_t *early;    /* [3][nnodes] of the distinct ones, those in the first part, in the first two, in the first three */
    uint64_t least, most;     /* copies of a distinct row on its node, over all nodes but without rows of zero bytes. 0 and 0
                                 if there are none, or they were not to be counted */
    uint64_t odd, many;       /* of those rows: no multiple of `times`, several times that; 0 where `times` was not known */
};
/** Is the search over? Never blocks. */
bool ry_rows_found_ready(struct ry_rows *rows);
/** Wait for it on the host; the result is owned by the scanner and valid until the next scan. */
int ry_rows_found_wait(struct ry_rows *rows, struct ry_rows_found *found, struct ry_err *err);

/** Does what the last scan found for `node` still hold for these buffers, by their addresses and sizes? O(ranks of the node). */
bool ry_rows_scanned(const struct ry_rows *rows, int node, const void *const *send, const uint64_t *send_bytes);

/** Bytes of the message to a node with `distinct` distinct rows among `nrows`; UINT64_MAX if that is beyond 64 bits. */
uint64_t ry_rows_message_bytes(uint64_t row_bytes, uint64_t distinct, uint64_t nrows);

/* A message to write: what the last scan found for `node` goes to `message` (device memory, 16-byte aligned). */
struct ry_rows_packing {
    int node;
    void *message;
};
/** Enqueue packing `n` messages, as a rule in one launch. Need not wait until what was found is known on the host; room for
 *  ry_rows_message_bytes(row_bytes, nrows, nrows) is always enough. */
int ry_rows_pack(struct ry_rows *rows, const struct ry_rows_packing *packings, int n, void *stream, struct ry_err *err);

/*
 * A piece of a message received, to be written out: `bytes` bytes to `to` (any alignment), the rows that entries skip, skip + 1, …
 * of the message's list name; the last may be cut short.
 */
struct ry_rows_piece {
    const void *message;
    uint64_t row_bytes, distinct; /* of the message */
    uint64_t skip, bytes;
    void *to;
};
/** Enqueue writing out `n` pieces, of any messages: one launch where they are of one width and not too many. They are written in
 *  no order. An index beyond `distinct` (a damaged message) writes nothing and is reported by ry_rows_expand_errors(): rows
 *  not written, of expansions that are over by then. */
int ry_rows_expand(struct ry_rows *rows, const struct ry_rows_piece *pieces, int n, void *stream, struct ry_err *err);
uint64_t ry_rows_expand_errors(struct ry_rows *rows);

/** For tests: let only these bits of the two hashes count, so that unequal rows collide; launch so many blocks at most, so that few
 *  rows are many (0: as usual). */
void ry_rows_for_tests(struct ry_rows *rows, uint64_t sample_mask, uint64_t full_mask, unsigned blocks);

#endif
