/*
 * clock.h: the two clocks, in nanoseconds.
 *
 * ry_now_ns() is monotonic and the same in all processes of one machine: for durations and waits.
 * ry_wall_ns() is the time of day (UNIX epoch): for what is written down.
 */
#ifndef RY_BASE_CLOCK_H
#define RY_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t ry_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint64_t ry_wall_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
