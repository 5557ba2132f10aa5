/*
 * row_width.h: how many elements one row (one token's vector) has, learned from the counts of successive exchanges.
 *
 * NCCL is told elements, never rows. Three sources, best first (design, section 5):
 *   set    RAILYARD_ROW_BYTES;
 *   ratio  frameworks send the tokens' probabilities in a second exchange with the same splits, one element per row: where two
 *          successive exchanges have counts that are in one constant ratio H > 1 for every peer, both ways, rows have H elements
 *          in the larger. Zero counts must be zero in both; at least one must not be zero.
 *   gcd    the greatest common divisor of all counts seen: a multiple of the row width, so an upper bound only. Exchanges of a
 *          few numbers, or of a sort that has nothing in common with those before, are kept apart.
 *
 * Pure state, no I/O; one per communicator, used by one thread at a time.
 */
#ifndef RY_ENGINE_ROW_WIDTH_H
#define RY_ENGINE_ROW_WIDTH_H

#include <stdint.h>

struct ry_row_width {
    int nranks;
    uint64_t set_bytes;  /* RAILYARD_ROW_BYTES, 0 if not set */
    uint64_t learned;    /* by ratio: elements per row, 0 until then */
    uint64_t gcd;
    uint64_t *last;      /* [2 * nranks]: send and receive counts of the exchange before */
    int has_last;
};

/** -1 when out of memory. */
int ry_row_width_init(struct ry_row_width *w, int nranks, uint64_t set_bytes);
void ry_row_width_free(struct ry_row_width *w);

/**
 * Look at one exchange (counts in elements) and say how many elements its rows have: 0 if that is not known. `*source` is
 * "set", "ratio", "gcd" or NULL. An exchange whose counts are no multiples of the learned width gets its own gcd.
 */
uint64_t ry_row_width_see(struct ry_row_width *w, const uint64_t *send, const uint64_t *recv, uint32_t type_bytes,
                          const char **source);

/** Only remember its counts: for one that is of interest at most for what comes after it. */
void ry_row_width_note(struct ry_row_width *w, const uint64_t *send, const uint64_t *recv);

/**
 * The width by which to look for equal rows, in bytes, of rows that are so wide by that source. Where splits are always equal the
 * gcd is the whole segment; then pieces of up to 1 KiB are compared that, for most hidden sizes there are, add up to a row: equal
 * rows are found as so many equal pieces.
 */
uint64_t ry_row_width_search(uint64_t row_bytes, const char *source);

#endif
