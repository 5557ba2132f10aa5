/*
 * random.h: numbers that are a pure function of where they are used.
 *
 * Owns: keys (a hash of a few numbers, in order) and streams of numbers drawn from a key. All of it is xxHash, so a
 * receiver on any machine computes what the sender computed, in any order, with nothing remembered.
 */
#ifndef RY_BENCH_RANDOM_H
#define RY_BENCH_RANDOM_H

#include <stddef.h>
#include <stdint.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

/** The key of up to a handful of numbers; different lists give different keys. */
#define ry_key(seed, ...)                                                                                              \
    XXH3_64bits_withSeed((const uint64_t[]){__VA_ARGS__}, sizeof((const uint64_t[]){__VA_ARGS__}), (seed))

/** Number `i` of the stream that belongs to `key`. */
static inline uint64_t ry_random_at(uint64_t key, uint64_t i)
{
    return XXH3_64bits_withSeed(&i, sizeof i, key);
}

struct ry_random {
    uint64_t key, next;
};

/** The next number below `n` (n > 0), evenly: the rest that would favour small numbers is drawn again. */
static inline uint64_t ry_random_below(struct ry_random *r, uint64_t n)
{
    uint64_t limit = UINT64_MAX - UINT64_MAX % n, v;
    do
        v = ry_random_at(r->key, r->next++);
    while (v >= limit);
    return v % n;
}

#endif
