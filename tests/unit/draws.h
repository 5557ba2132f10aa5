/* draws.h: chance in tests that must be fast, and the same for the same `rng`, which the test sets from its seed. */
#ifndef RY_TESTS_DRAWS_H
#define RY_TESTS_DRAWS_H

#include <stdbool.h>
#include <stdint.h>

static uint64_t rng;

/* From 0 to below `below`. */
static inline uint32_t pick(uint32_t below)
{
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    return (uint32_t)((rng >> 32) * below >> 32);
}

static inline bool one_in(uint32_t n)
{
    return n && pick(n) == 0;
}

#endif
