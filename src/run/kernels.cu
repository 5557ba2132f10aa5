/*
 * kernels.cu: copying, comparing and digesting the segments of a table (segments.h) at memory bandwidth, at any alignment.
 *
 * A block takes tile after tile. In a tile, memory at `a` is reached in 16-byte words from its own alignment on; bytes
 * before the first and after the last whole word go one by one. Where `b` lies otherwise aligned, each of its words is
 * put together from the two aligned ones that it straddles: both are read coalesced, and the second comes out of the
 * cache, since the neighbouring thread reads it as its first. No byte outside of a segment is read.
 *
 * The twins for host memory are in batch.c.
 */
#include "digest.h"
#include "segments.h"

#include "words.cuh"

#define WORDS (RY_TILE / WORD / RY_BLOCK) /* of each thread in a tile */

/* A segment's part that lies in one tile. */
struct part {
    byte *a;
    const byte *b;
    uint64_t at;   /* offset in the segment */
    uint64_t left; /* bytes of the segment from there on, `bytes` of them in this tile */
    uint32_t bytes;
};

/* Which segment a tile belongs to: the last whose first tile is not beyond it. */
static __device__ uint32_t segment_of(const ry_segments &t, uint32_t tile)
{
    uint32_t low = 0, high = t.n;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (t.first_tile[middle] <= tile)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static __device__ part part_of(const ry_segments &t, uint32_t segment, uint32_t tile)
{
    uint64_t skew = t.a[segment] % WORD; /* tiles are counted from the whole word that `a` begins in */
    uint64_t from = (uint64_t)(tile - t.first_tile[segment]) * RY_TILE, to = from + RY_TILE,
             end = skew + t.bytes[segment];
    from = from > skew ? from - skew : 0;
    to = (to < end ? to : end) - skew;
    return part{(byte *)t.a[segment] + from, (const byte *)t.b[segment] + from, from, t.bytes[segment] - from,
                (uint32_t)(to - from)};
}

/*
 * Hand every byte of a part to `op`: op.word(a, b's 16 bytes, offset) for whole words of `a`, op.one(a, b's byte,
 * offset) for what is left at the ends.
 */
template <class Op> static __device__ void each(const part &p, Op &op)
{
    uint32_t thread = threadIdx.x, head = (uint32_t)(-(uint64_t)p.a % WORD);
    head = head < p.bytes ? head : p.bytes;
    uint32_t words = (p.bytes - head) / WORD, tail = head + words * WORD;
    if (thread < head)
        op.one(p.a + thread, p.b[thread], p.at + thread);
    if (thread >= 32 && tail + (thread - 32) < p.bytes) { /* by another warp */
        uint32_t i = tail + (thread - 32);
        op.one(p.a + i, p.b[i], p.at + i);
    }
    uint4 *a = (uint4 *)(p.a + head);
    const byte *b = p.b + head;
    uint32_t shift = (uint32_t)((uint64_t)b % WORD);
    const uint4 *aligned = (const uint4 *)(b - shift);
    uint4 v[WORDS];
    if (!shift) {
#pragma unroll
        for (uint32_t k = 0; k < WORDS; k++)
            if (thread + k * RY_BLOCK < words)
                v[k] = aligned[thread + k * RY_BLOCK];
    } else {
        uint4 high[WORDS];
        /* The first and last word of a segment may straddle its ends, beyond which nothing need be readable. */
        uint32_t first = p.at + head < shift ? 1 : 0;
        uint64_t room = p.left - head + shift, most = room < 2 * WORD ? 0 : room / WORD - 1;
        uint32_t end = most < words ? (uint32_t)most : words;
#pragma unroll
        for (uint32_t k = 0; k < WORDS; k++) {
            uint32_t i = thread + k * RY_BLOCK;
            if (i >= first && i < end) {
                v[k] = aligned[i];
                high[k] = aligned[i + 1];
            }
        }
#pragma unroll
        for (uint32_t k = 0; k < WORDS; k++) {
            uint32_t i = thread + k * RY_BLOCK;
            if (i >= first && i < end)
                v[k] = joined(v[k], high[k], shift);
            else if (i < words)
                v[k] = by_bytes(b + i * WORD);
        }
    }
#pragma unroll
    for (uint32_t k = 0; k < WORDS; k++) {
        uint32_t i = thread + k * RY_BLOCK;
        if (i < words)
            op.word(a + i, v[k], p.at + head + i * WORD);
    }
}

struct copy_op {
    __device__ void one(byte *a, byte b, uint64_t)
    {
        *a = b;
    }
    __device__ void word(uint4 *a, uint4 b, uint64_t)
    {
        *a = b;
    }
};

struct compare_op {
    uint64_t tag, least;
    __device__ void differ(uint64_t at)
    {
        const uint64_t most = (1ull << RY_DIFFERENCE_BITS) - 1;
        uint64_t difference = tag << RY_DIFFERENCE_BITS | (at < most ? at : most);
        least = difference < least ? difference : least;
    }
    __device__ void one(const byte *a, byte b, uint64_t at)
    {
        if (*a != b)
            differ(at);
    }
    __device__ void word(const uint4 *a, uint4 b, uint64_t at)
    {
        uint4 v = *a;
        const uint32_t x[4] = {v.x ^ b.x, v.y ^ b.y, v.z ^ b.z, v.w ^ b.w};
        if (!(x[0] | x[1] | x[2] | x[3]))
            return;
        for (int i = 0; i < 4; i++)
            if (x[i]) {
                differ(at + 4 * i + (__ffs(x[i]) - 1) / 8);
                return;
            }
    }
};

extern "C" __global__ void __launch_bounds__(RY_BLOCK) ry_copy_segments(const __grid_constant__ ry_segments t)
{
    copy_op op;
    for (uint32_t tile = blockIdx.x, tiles = t.first_tile[t.n]; tile < tiles; tile += gridDim.x)
        each(part_of(t, segment_of(t, tile), tile), op);
}

extern "C" __global__ void __launch_bounds__(RY_BLOCK) ry_compare_segments(const __grid_constant__ ry_segments t)
{
    compare_op op = {0, RY_NO_DIFFERENCE};
    for (uint32_t tile = blockIdx.x, tiles = t.first_tile[t.n]; tile < tiles; tile += gridDim.x) {
        uint32_t segment = segment_of(t, tile);
        op.tag = t.tag[segment];
        each(part_of(t, segment, tile), op);
    }
    if (op.least != RY_NO_DIFFERENCE)
        atomicMin((unsigned long long *)t.answer, (unsigned long long)op.least);
}

/* Nothing lies at `a`, so that words are counted from where a segment begins, however it is aligned. */
struct digest_op {
    uint32_t tag;
    uint64_t sum[2];
    __device__ void one(const byte *, byte b, uint64_t at)
    {
        ry_digest_byte(sum, b, tag, at);
    }
    __device__ void word(const uint4 *, uint4 b, uint64_t at)
    {
        ry_digest_word(sum, (uint64_t)b.y << 32 | b.x, (uint64_t)b.w << 32 | b.z, tag, at);
    }
};

extern "C" __global__ void __launch_bounds__(RY_BLOCK) ry_digest_segments(const __grid_constant__ ry_segments t)
{
    digest_op op = {0, {0, 0}};
    for (uint32_t tile = blockIdx.x, tiles = t.first_tile[t.n]; tile < tiles; tile += gridDim.x) {
        uint32_t segment = segment_of(t, tile);
        op.tag = t.tag[segment];
        each(part_of(t, segment, tile), op);
    }
    for (int i = 0; i < 2; i++) {
        unsigned long long sum = op.sum[i];
        for (uint32_t x = 16; x; x /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, x);
        if (threadIdx.x % 32 == 0)
            atomicAdd((unsigned long long *)t.answer + i, sum);
    }
}
