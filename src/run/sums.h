/*
 * sums.h: adding up rows that a packed message (rows.h) said are equal, or that came in the places of such rows.
 *
 * Owns: the lists that are kept of a packed message, and the sums: of the rows whose entries in its index list are
 * equal, in fp32, added in ascending order of position, rounded once to the type (to nearest, ties to even). A row that
 * is alone goes as it is, bit by bit; of others a NaN comes out as 0x7fff or 0x7fffffff, as hardware gives it. The same
 * on every run and every backend. Not: which message belongs to which exchange (kept.c), memory limits.
 *
 * Written is a packed message: a row for each distinct row, one row of zeros (so distinct + 1 of row_bytes), and a list
 * with an entry for each row: the first of each distinct row has its sum, the others the row of zeros. EXPANDed, it
 * puts each sum in the place of the first of its rows.
 *
 * An entry beyond `distinct` (a damaged message) belongs to no sum, its row gets zeros; it is counted by
 * ry_rows_expand_errors(). Everything is enqueued on the caller's stream and nothing waits.
 */
#ifndef RY_RUN_SUMS_H
#define RY_RUN_SUMS_H

#include "rows.h"

struct ry_sums; /* the lists of some messages */

struct ry_sums_message {
    const void *message; /* 16-byte aligned */
    uint64_t row_bytes, distinct, rows;
};
/** Bytes of device memory that the lists of `n` messages take; UINT64_MAX: there are more rows than can be kept. */
uint64_t ry_sums_memory(const struct ry_sums_message *messages, int n);
/** Keep their lists: once `stream` is there the messages may go. They need no more than their lists, so `row_bytes` and
 *  `message` tell where that is. NULL with `err`: out of memory, or the device refused. */
struct ry_sums *ry_sums_keep(struct ry_rows *rows, const struct ry_sums_message *messages, int n, void *stream,
                             struct ry_err *err);
/** Memory goes back in stream order. The scanner may have gone before. */
void ry_sums_free(struct ry_sums *sums);

/** Bytes of an element of ncclDataType_t `type`; 0: cannot be summed. */
uint64_t ry_sums_element(int type);

struct ry_sums_job {
    int message;      /* which of those kept; a row of it as wide as then, and of whole elements */
    const void *from; /* its rows, one after the other, at any address */
    void *to; /* 16-byte aligned; ry_rows_message_bytes(row_bytes, distinct + 1, rows), apart from all that is read */
};
/** Enqueue writing the messages of `n` jobs, as a rule in one launch. -1 with `err`. */
int ry_sums_add(struct ry_rows *rows, struct ry_sums *sums, int type, const struct ry_sums_job *jobs, int n,
                void *stream, struct ry_err *err);

#endif
