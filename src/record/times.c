/* times.c: see times.h. */
#include "times.h"

#include <math.h>
#include <stdlib.h>

#define CLASSES_PER_OCTAVE 32
#define OCTAVES 44 /* of nanoseconds: five hours */

static int class_of(double us)
{
    double ns = us * 1000;
    if (!(ns >= 1))
        return 0;
    int octave;
    double m = frexp(ns, &octave); /* ns = m * 2^octave, 0.5 <= m < 1 */
    int c = (octave - 1) * CLASSES_PER_OCTAVE + (int)((m - 0.5) * 2 * CLASSES_PER_OCTAVE);
    return c < OCTAVES * CLASSES_PER_OCTAVE ? c : OCTAVES * CLASSES_PER_OCTAVE - 1;
}

static double class_middle_us(int c)
{
    return ldexp(0.5 + ((c % CLASSES_PER_OCTAVE) + 0.5) / (2.0 * CLASSES_PER_OCTAVE), c / CLASSES_PER_OCTAVE + 1) /
           1000;
}

void ry_trace_times_add(struct ry_trace_times *t, double us)
{
    if (!t->classes && !(t->classes = calloc(OCTAVES * CLASSES_PER_OCTAVE, sizeof *t->classes)))
        return;
    t->classes[class_of(us)]++;
    t->min_us = t->n && t->min_us < us ? t->min_us : us;
    t->max_us = t->n && t->max_us > us ? t->max_us : us;
    t->sum_us += us;
    t->n++;
}

double ry_trace_quantile(const struct ry_trace_times *t, double q)
{
    if (!t->n)
        return 0;
    uint64_t want = (uint64_t)(q * (double)(t->n - 1)), seen = 0;
    for (int c = 0; c < OCTAVES * CLASSES_PER_OCTAVE; c++) {
        seen += t->classes[c];
        if (seen > want) {
            double v = class_middle_us(c);
            return v < t->min_us ? t->min_us : v > t->max_us ? t->max_us : v;
        }
    }
    return t->max_us;
}

double ry_bin_from(int bin)
{
    static const double steps[] = {1, 2, 5};
    double v = bin > 0 ? steps[(bin - 1) % 3] : 0;
    for (int decade = (bin - 1) / 3; decade > 0; decade--)
        v *= 10;
    return v;
}

int ry_bin_of(double v)
{
    int bin = 0;
    while (bin < RY_BINS - 1 && v >= ry_bin_from(bin + 1))
        bin++;
    return bin;
}
