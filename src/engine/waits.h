/*
 * waits.h: a histogram of how long the job's thread waited for verdicts.
 *
 * Owns: the buckets, eight to each doubling, from 1 us to beyond an hour: a quantile is off by 9 % at most. Pure state, one
 * writer; no allocation.
 */
#ifndef RY_ENGINE_WAITS_H
#define RY_ENGINE_WAITS_H

#include <math.h>
#include <stdint.h>

#define RY_WAITS 256

struct ry_waits {
    uint64_t count, at[RY_WAITS];
};

static inline void ry_waits_add(struct ry_waits *w, double us)
{
    double i = us > 1 ? 8 * log2(us) + 1 : 0;
    w->at[i < RY_WAITS - 1 ? (int)i : RY_WAITS - 1]++;
    w->count++;
}

/** The wait, in microseconds, that a share `q` (0 to 1) of all waits did not exceed; 0 when there were none. */
static inline double ry_waits_quantile(const struct ry_waits *w, double q)
{
    uint64_t seen = 0;
    for (int i = 0; w->count && i < RY_WAITS; i++)
        if ((seen += w->at[i]) >= q * (double)w->count)
            return i ? exp2((i - 0.5) / 8) : 1;
    return 0;
}

#endif
