/* random.h: the planner's random numbers: splitmix64, so that results are the same everywhere for a seed. The state is
 * one uint64_t of the caller's, any value. */
#ifndef RY_PLACE_RANDOM_H
#define RY_PLACE_RANDOM_H

#include <stddef.h>
#include <stdint.h>

static inline uint64_t ry_random(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

/** Uniform below n > 0 (the bias, n / 2^64, is of no consequence). */
static inline uint64_t ry_random_below(uint64_t *state, uint64_t n)
{
    return (uint64_t)((unsigned __int128)ry_random(state) * n >> 64);
}

static inline void ry_shuffle(uint32_t *a, size_t n, uint64_t *state)
{
    for (size_t i = n; i > 1; i--) {
        size_t j = ry_random_below(state, i);
        uint32_t t = a[i - 1];
        a[i - 1] = a[j];
        a[j] = t;
    }
}

#endif
