/* crossing_bound.c: see crossing_bound.h. */
#include "place/crossing_bound.h"

#include <math.h>
#include <stdlib.h>

#include "place/random.h"

#define ROUNDS 400
#define GUARD 4 /* vectors iterated beyond those needed: speeds up the last of these */
#define PARTS 8

/* Subtract from each layer's part its mean. */
static void center_layers(const struct ry_anneal *a, double *v)
{
    for (int l = 0; l < a->layers; l++, v += a->experts) {
        double mean = 0;
        for (int e = 0; e < a->experts; e++)
            mean += v[e] / a->experts;
        for (int e = 0; e < a->experts; e++)
            v[e] -= mean;
    }
}

/* out = AᵀA v, A centred both ways; room[samples]. */
static void gram(const struct ry_anneal *a, const double *v, double *room, double *out)
{
    size_t samples = (size_t)a->samples, slots = (size_t)a->layers * (size_t)a->experts;
    double mean = 0;
    for (size_t i = 0; i < samples; i++)
        room[i] = 0;
    for (size_t j = 0; j < slots; j++)
        for (size_t i = 0; i < samples; i++)
            room[i] += v[j] * a->counts[j * samples + i];
    for (size_t i = 0; i < samples; i++)
        mean += room[i] / (double)samples;
    for (size_t i = 0; i < samples; i++)
        room[i] -= mean;
    for (size_t j = 0; j < slots; j++) {
        const uint16_t *column = a->counts + j * samples;
        double part[PARTS] = {0}, sum = 0; /* sums that do not wait for each other */
        size_t i = 0;
        for (; i + PARTS <= samples; i += PARTS)
            for (size_t k = 0; k < PARTS; k++)
                part[k] += room[i + k] * column[i + k];
        for (; i < samples; i++)
            sum += room[i] * column[i];
        for (size_t k = 0; k < PARTS; k++)
            sum += part[k];
        out[j] = sum;
    }
    center_layers(a, out);
}

static double dot(const double *x, const double *y, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

/* Make v[k] orthonormal, one after the other, twice for accuracy; a vector that vanishes stays 0. */
static void orthonormalize(double *v, int k, size_t n)
{
    for (int i = 0; i < k; i++) {
        double *x = v + (size_t)i * n, before = dot(x, x, n);
        for (int pass = 0; pass < 2; pass++) {
            for (int j = 0; j < i; j++) {
                const double *y = v + (size_t)j * n;
                double c = dot(x, y, n);
                for (size_t t = 0; t < n; t++)
                    x[t] -= c * y[t];
            }
        }
        double norm = sqrt(dot(x, x, n)), scale = norm > 1e-10 * sqrt(before) && norm > 0 ? 1 / norm : 0;
        for (size_t t = 0; t < n; t++)
            x[t] *= scale;
    }
}

/* Σ of the `want` largest singular values of A centred, from above: block iteration, to which the residual is added. */
static double top_singular(const struct ry_anneal *a, int want, double *v, double *w, double *room)
{
    size_t n = (size_t)a->layers * (size_t)a->experts;
    int k = want + GUARD;
    uint64_t random = 1;
    for (size_t i = 0; i < (size_t)k * n; i++)
        v[i] = (double)(int64_t)ry_random(&random) * 0x1p-63;
    for (int i = 0; i < k; i++)
        center_layers(a, v + (size_t)i * n);
    double above = 0;
    for (int round = 0; round < ROUNDS; round++) {
        orthonormalize(v, k, n);
        double residual = 0, largest = 0;
        for (int i = 0; i < k; i++) {
            const double *x = v + (size_t)i * n;
            double *y = w + (size_t)i * n;
            gram(a, x, room, y);
            double value = dot(x, y, n);
            largest = fmax(largest, value);
            for (size_t t = 0; i < want && t < n; t++)
                residual += (y[t] - value * x[t]) * (y[t] - value * x[t]);
        }
        above = 0;
        for (int i = 0; i < want; i++)
            above += sqrt(fmax(0, dot(v + (size_t)i * n, w + (size_t)i * n, n)) + sqrt(residual));
        if (sqrt(residual) <= 1e-3 * largest)
            break;
        for (size_t t = 0; t < (size_t)k * n; t++)
            v[t] = w[t];
    }
    return above;
}

double ry_crossing_bound(const struct ry_anneal *a, const int *slots)
{
    size_t n = (size_t)a->layers * (size_t)a->experts;
    int want = a->nodes - 1;
    double *v = malloc((size_t)(want + GUARD) * n * sizeof *v), *w = malloc((size_t)(want + GUARD) * n * sizeof *w);
    double *room = malloc((size_t)a->samples * sizeof *room);
    if (!v || !w || !room) {
        free(v);
        free(w);
        free(room);
        return -1;
    }
    double copies = 0, overlap = 0, p_low = 1, p_high = 0, q_low = 1, q_high = 0;
    for (size_t i = 0; i < n * (size_t)a->samples; i++)
        copies += a->counts[i];
    for (int m = 0; m < a->nodes; m++) {
        double p = (double)a->homes[m] / a->samples, q = (double)slots[m] / a->experts;
        overlap += p * q;
        p_low = fmin(p_low, p);
        p_high = fmax(p_high, p);
        q_low = fmin(q_low, q);
        q_high = fmax(q_high, q);
    }
    double norm = sqrt(p_high * a->samples * a->layers * q_high * a->experts);
    double stays = copies * (overlap + p_high - p_low + q_high - q_low) + norm * top_singular(a, want, v, w, room);
    free(v);
    free(w);
    free(room);
    return fmax(0, copies - stays);
}
