/*
 * rows_kernels.h: what the kernels of rows.cu and their twins in rows_host.c share, in C and in CUDA C: their
 * parameters, the scanner's memory, and the hash.
 *
 * Rows that are scanned are numbered through: nodes in order, in each its parts in order, in each its ranks in order, in
 * each the rows by position. So a lower number is an earlier appearance, and a node's rows are a range. A part of a
 * rank's rows is a segment of its own.
 *
 * How equal rows are found, each step a kernel:
 *   sample     hash 128 bytes of each row; the first row with a hash leads all that have it, by atomicMin in a table
 *   compare    each other row with its leader, in full. Rows that differ, and rows whose sample is zero, get a second
 *              hash of all their bytes, which are at hand; rows of nothing but zeros are found here
 *   recompare  the former with the first of their second hash
 *   count      distinct rows and zero rows of each tile (a share of a node's rows)
 *   number     the distinct ones, tile after tile: no result depends on which thread came first
 *
 * Why samples, not a hash of everything: a row with no equal is then never read but for its sample (4 KiB rows: 6 % of
 * memory traffic), which is what makes looking cheap where there is nothing to find; and a row that has one is read
 * for the comparison anyway, which no hash spares us. A full hash would add one reading of everything to both cases and
 * save only where samples are equal and rows are not; the second hash, which costs no further reading, covers that.
 *
 * How much is read: of n rows, d of them distinct, each of the n - d others once and the row that leads it beside it, then
 * the d once to pack them: 2n - d rows, so no more than twice the send buffer, besides samples and rows whose samples are
 * equal and they are not. A leader of many is read for each, from the cache where it stays there.
 */
#ifndef RY_RUN_ROWS_KERNELS_H
#define RY_RUN_ROWS_KERNELS_H

#include <stdint.h>

#define RY_ROWS_SAMPLE 8u         /* words of a sample: whole for rows of up to 128 bytes, else in four places */
#define RY_ROWS_BLOCK 256u        /* threads of a block */
#define RY_ROWS_GRID 1056u        /* blocks at most: 8 on each of the 132 multiprocessors of an H100 */
#define RY_ROWS_DEEP 4u           /* words of a row that a thread has under way */
#define RY_ROWS_CHUNK 4096u       /* bytes that one warp copies at a time */
#define RY_ROWS_TILES 4096u
#define RY_ROWS_PUT 500u
#define RY_ROWS_PACKS 192u
#define RY_ROWS_PIECES 112u
#define RY_ROWS_EMPTY (~0ull)
#define RY_ROWS_PARTS 4u          /* of a message, at most */
#define RY_ROWS_ANSWERS (1u + RY_ROWS_PARTS) /* for each node */

struct ry_rows_segment {
    uint64_t at, bytes; /* > 0 */
    uint64_t first_row;
    uint64_t node;
    uint64_t told; /* its first row's number in the scan that tells how often rows occur */
};
struct ry_rows_node {
    uint64_t first_row, rows;
    uint64_t distinct; /* found */
    uint64_t part[RY_ROWS_PARTS - 1]; /* where the second part begins, the third, …, among its rows; `rows`: there is none */
};
struct ry_rows_slot {
    uint64_t key; /* RY_ROWS_EMPTY: free */
    uint64_t row; /* the least that has it */
};

/* state[row], between the kernels */
#define RY_ROWS_LOOK 1u    /* the sample is zero: look at all of it */
#define RY_ROWS_PARTIAL 2u /* the shorter last row of a segment, or one that goes by itself: distinct, but may be zero */
#define RY_ROWS_ZERO 4u    /* found to be zero */
#define RY_ROWS_SLOT 8u    /* where[row] is a slot yet */

/* All addresses are the device's. */
struct ry_rows_scan {
    uint64_t segments; /* struct ry_rows_segment[nsegments], in order of their rows */
    uint64_t nodes;    /* struct ry_rows_node[nnodes] */
    uint64_t table;    /* struct ry_rows_slot[1 << table_bits], at least twice as many as rows: never full */
    uint64_t where; /* uint32_t[nrows]: the slot of the row's hash, in the end the first row equal to it, or itself */
    uint64_t index; /* uint32_t[nrows]: of a distinct row, its number among its node's */
    uint64_t order; /* uint32_t[nrows]: from each node's first row on, its distinct rows; before that: the pending */
    uint64_t state; /* uint8_t[nrows] */
    uint64_t npending; /* uint64_t: rows for recompare */
    uint64_t tiles;    /* uint64_t[nnodes * tiles_per_node]: distinct rows | zero rows << 32 */
    uint64_t found; /* uint64_t[RY_ROWS_ANSWERS][nnodes], pinned: distinct rows of each node; zero rows; of the distinct
                       ones those before each part but the first, which is not written where it begins at the end */
    uint64_t row_bytes, nrows;
    uint64_t sample_mask, full_mask; /* bits of the hashes that count: all, but in tests */
    uint32_t nsegments, nnodes;
    uint32_t table_bits;
    uint32_t tiles_per_node;
    /* How often rows occur, as another scan of the same rows, all on one node, has found. Its where, its table and its extremes;
       0: nobody tells */
    uint64_t told_where, told_times, told_extremes, told_rows;
    uint32_t copies; /* of a token's row, K; 0: not known */
    uint32_t lanes; /* threads that compare or copy a row together: a power of 2, up to a warp */
    uint32_t batch; /* rows that a warp takes at a time: a power of 2, 32 / lanes to 32 */
};

/*
 * What is told of a scan's rows, those of zero bytes aside: how often one occurs at most, the complement of how often at least; of rows that do
 * not occur K times, how many do not occur a multiple of K times, and how many do.
 */
struct ry_rows_extremes {
    uint32_t most, not_least, odd, many;
};

/* Messages to write. Each has the rows before it counted, as many as there are in its list, or may be (no fewer than are)
 * distinct. */
struct ry_rows_pack {
    struct ry_rows_scan scan;
    uint32_t n;
    uint32_t first_row[RY_ROWS_PACKS + 1];
    uint32_t first_distinct[RY_ROWS_PACKS + 1];
    uint32_t node[RY_ROWS_PACKS];
    uint64_t message[RY_ROWS_PACKS];
};

/* A table on its way to the device: as parameters it needs no memory that would have to outlive the call. And memory to
 * be filled with ones on the way, which spares a launch. */
struct ry_rows_put {
    uint64_t fill, nfill; /* 16-byte words */
    uint64_t to; /* uint64_t[n] */
    uint64_t n;
    uint64_t word[RY_ROWS_PUT];
};

/* Pieces of messages to write out, all of one width. */
struct ry_rows_expand {
    uint64_t row_bytes;
    uint64_t errors; /* uint64_t, pinned */
    uint32_t n, lanes;
    uint32_t first_row[RY_ROWS_PIECES + 1]; /* of each piece among those here; [n] is their sum */
    uint32_t distinct[RY_ROWS_PIECES];
    uint32_t skip[RY_ROWS_PIECES]; /* where its indices begin in the message's list */
    uint64_t message[RY_ROWS_PIECES];
    uint64_t to[RY_ROWS_PIECES];
    uint64_t bytes[RY_ROWS_PIECES];
};

#ifdef __CUDACC__
#define RY_ROWS_BOTH static __device__ inline
#else
#define RY_ROWS_BOTH static inline
#endif

#define RY_ROWS_FEW 8u /* so many rows of which one occurs a multiple of K times: then those may go by themselves */

/* Do rows that occur a multiple of K times, of several tokens with the same bytes, go by themselves? */
RY_ROWS_BOTH int ry_rows_apart(uint64_t odd, uint64_t many, uint64_t rows)
{
    return !odd && many * RY_ROWS_FEW <= rows;
}

RY_ROWS_BOTH uint64_t ry_rows_list_at(uint64_t row_bytes, uint64_t distinct)
{
    return (row_bytes * distinct + 15) / 16 * 16;
}

/* Where word `i` of the sample lies in a row. */
RY_ROWS_BOTH uint64_t ry_rows_sample_at(uint64_t row_bytes, uint32_t i)
{
    if (row_bytes <= 16 * RY_ROWS_SAMPLE)
        return 16 * i;
    return (row_bytes - 32) * (i / 2) / (RY_ROWS_SAMPLE / 2 - 1) / 32 * 32 + 16 * (i % 2);
}

/* One word's share of a hash, which is their sum: threads may add them in any order. `i`: the word's number in the row.
 */
RY_ROWS_BOTH uint64_t ry_rows_hash_word(uint64_t low, uint64_t high, uint64_t i)
{
    uint64_t a = low ^ (0x2d358dccaa6c78a5ull + i * 0x9e3779b97f4a7c15ull);
    uint64_t b = high ^ (0x8bb84b93962eacc9ull + i * 0xd1b54a32d192ed03ull);
#ifdef __CUDA_ARCH__
    uint64_t top = __umul64hi(a, b);
#else
    uint64_t top = (uint64_t)((unsigned __int128)a * b >> 64);
#endif
    return ((a * b) ^ top) + low + (high << 32 | high >> 32); /* a or b may be 0 */
}

RY_ROWS_BOTH uint64_t ry_rows_hash_end(uint64_t sum)
{
    sum = (sum ^ sum >> 33) * 0xff51afd7ed558ccdull;
    sum = (sum ^ sum >> 33) * 0xc4ceb9fe1a85ec53ull;
    return sum ^ sum >> 33;
}

/*
 * Keys of three kinds that never meet. Equal rows of different nodes have different keys, since the node's factor is
 * odd; so whatever has the same key and the same bytes is the same node's. Zero rows need no comparison: only they have
 * theirs.
 */
RY_ROWS_BOTH uint64_t ry_rows_sample_key(uint64_t hash, uint64_t mask, uint64_t node)
{
    return ((hash & mask) + node * 0x9e3779b97f4a7c15ull) << 2;
}

RY_ROWS_BOTH uint64_t ry_rows_full_key(uint64_t hash, uint64_t mask, uint64_t node)
{
    return ((hash & mask) + node * 0x9e3779b97f4a7c15ull) << 2 | 1;
}

RY_ROWS_BOTH uint64_t ry_rows_zero_key(uint64_t node)
{
    return node << 2 | 2;
}

RY_ROWS_BOTH uint64_t ry_rows_home(uint64_t key, uint32_t table_bits)
{
    return key * 0x9e3779b97f4a7c15ull >> (64 - table_bits);
}

#endif
