/*
 * times.h: many durations, kept small: in logarithmic classes, 32 to the octave.
 *
 * Owns: the classes and the quantiles taken from them, right to 1.6 %, whatever the number of samples; and the round
 * classes (1, 2, 5, 10, …) in which reports show how something is spread. Not: where the samples come from.
 */
#ifndef RY_RECORD_TIMES_H
#define RY_RECORD_TIMES_H

#include <stdint.h>

struct ry_trace_times {
    uint64_t n;
    double sum_us, min_us, max_us;
    uint32_t *classes;           /* NULL while n is 0; freed by the owner */
    uint64_t bytes, cross_bytes; /* sent by this rank in those timed exchanges whose line was found */
    double matched_us;           /* the time they took */
};

/** Add a sample; left out when there is no memory for the classes. */
void ry_trace_times_add(struct ry_trace_times *times, double us);
/** Quantile 0 ≤ q ≤ 1 in microseconds; 0 when there are no samples. */
double ry_trace_quantile(const struct ry_trace_times *times, double q);

#define RY_BINS 40
/** The round class of `v`, 0 ≤ … < RY_BINS: class i holds ry_bin_from(i) ≤ v < ry_bin_from(i + 1), the last all above.
 */
int ry_bin_of(double v);
double ry_bin_from(int bin);

#endif
