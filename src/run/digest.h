/*
 * digest.h: 128 bits that stand for the bytes of a list of segments, in C and in CUDA C: shared by the kernel of
 * kernels.cu and its twin in batch.c.
 *
 * A digest is the sum, in two words of 64 bits, of what each 16-byte word adds: threads may add them in any order. What
 * one word adds depends on its bytes, its offset and its segment's tag, and never on where in memory it lies. For one
 * place the 128 bits of the word and the 128 that it adds determine each other, so that two lists which differ in one
 * word always have different digests, and others with a chance of 2^-128: by accident, that is; this is no
 * cryptography. The bytes behind the last whole word count one by one. How long segments are is not in it: compare that
 * as well.
 */
#ifndef RY_RUN_DIGEST_H
#define RY_RUN_DIGEST_H

#include <stdint.h>

#ifdef __CUDACC__
#define RY_DIGEST_BOTH static __device__ inline
#else
#define RY_DIGEST_BOTH static inline
#endif

#define RY_DIGEST_TAG_BITS 23 /* of a tag, and 40 of an offset: those of words and of bytes never meet */

RY_DIGEST_BOTH uint64_t ry_digest_mix(uint64_t x)
{
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93ull;
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93ull;
    return x ^ x >> 32;
}

RY_DIGEST_BOTH void ry_digest_add(uint64_t sum[2], uint64_t low, uint64_t high, uint64_t place)
{
    uint64_t p = (place + 1) * 0x9e3779b97f4a7c15ull;
    uint64_t a = ry_digest_mix(low + p), b = ry_digest_mix(high + (a ^ (p << 32 | p >> 32)));
    sum[0] += b;
    sum[1] += a + ry_digest_mix(b ^ 0x8bb84b93962eacc9ull);
}

/* The whole word at `offset`, a multiple of 16, of a segment; */
RY_DIGEST_BOTH void ry_digest_word(uint64_t sum[2], uint64_t low, uint64_t high, uint32_t tag, uint64_t offset)
{
    ry_digest_add(sum, low, high, (uint64_t)tag << 40 | offset / 16);
}

/* a byte behind the last of those. */
RY_DIGEST_BOTH void ry_digest_byte(uint64_t sum[2], uint8_t byte, uint32_t tag, uint64_t offset)
{
    ry_digest_add(sum, byte, 0, 1ull << 63 | (uint64_t)tag << 40 | offset);
}

#endif
