/*
 * segments.h: what the kernels of kernels.cu are given, in C and in CUDA C: a table of memory segments, by value.
 *
 * The table travels as the kernel's parameter (4 KiB at most, the limit that every driver keeps). The driver copies it
 * at the launch, so there is no ring of pinned memory that could run full and make the host wait, no copy to the device
 * ahead of the kernel and no event to tell when an entry may be reused: stream order is the launch's own. Longer lists
 * take one launch for every RY_SEGMENTS.
 *
 * Work is dealt out in tiles: RY_TILE bytes of the first address's memory, counted from that address rounded down to
 * 16, so that every tile but the ends of a segment is whole 16-byte words there.
 */
#ifndef RY_RUN_SEGMENTS_H
#define RY_RUN_SEGMENTS_H

#include <stdint.h>

#define RY_SEGMENTS 126
#define RY_TILE 16384u
#define RY_BLOCK 256u /* threads of a block: 4 words each in a whole tile */
#define RY_GRID 1056u /* blocks at most: 8 on each of the 132 multiprocessors of an H100 */

struct ry_segments {
    uint64_t a[RY_SEGMENTS];              /* copy: to; compare: one side; digest: 0 */
    uint64_t b[RY_SEGMENTS];              /* copy: from; compare: the other; digest: what is read */
    uint64_t bytes[RY_SEGMENTS];          /* > 0 */
    uint32_t first_tile[RY_SEGMENTS + 1]; /* of each segment; [n] is the number of tiles */
    uint32_t tag[RY_SEGMENTS];            /* compare: what the segment is called in the answer, < 2^24; digest: digest.h's */
    uint32_t n;
    uint64_t answer; /* compare: address of the uint64_t that becomes the least of itself and ry_difference(); digest: of
                        the two that the segments' is added to */
};

/* The least one is the first difference of the lowest tag; offsets beyond 1 TiB are told as that. */
#define RY_NO_DIFFERENCE UINT64_MAX
#define RY_DIFFERENCE_BITS 40

#endif
