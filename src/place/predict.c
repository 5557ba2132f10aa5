/* predict.c: see predict.h. In the regression X are counts of some layers, Y those of the next. */
#include "place/predict.h"

#include <stdlib.h>
#include <string.h>

#include "place/ridge.h"

#define MOST_FEATURES 512
/* λ in units of the mean count: a count's own chance variance is about its mean, and coefficients are about 0.1. */
#define RIDGE 100.0

struct step {            /* to layer l + 1 */
    int first, features; /* layers [first, l] are looked at */
    double *xx;          /* [features][features], lower half */
    double *xy;          /* [features][experts] */
    float *b;            /* [features][experts] */
};

struct ry_predictor {
    int layers, experts;
    uint64_t observed;
    double counts;             /* Σ of all counts, for the mean */
    struct step *steps;        /* [layers - 1] */
    double *factor, *solution; /* scratch of ry_predictor_fit() */
};

struct ry_predictor *ry_predictor_new(int layers, int experts, int history, struct ry_err *err)
{
    struct ry_predictor *p = calloc(1, sizeof *p);
    size_t E = (size_t)experts, most = 0;
    if (!p)
        goto no_memory;
    p->layers = layers;
    p->experts = experts;
    if (history * experts > MOST_FEATURES)
        history = MOST_FEATURES / experts;
    if (history < 1)
        history = 1;
    p->steps = calloc((size_t)layers, sizeof *p->steps);
    for (int l = 0; p->steps && l + 1 < layers; l++) {
        struct step *s = &p->steps[l];
        s->first = l + 1 > history ? l + 1 - history : 0;
        s->features = (l + 1 - s->first) * experts;
        size_t F = (size_t)s->features;
        most = F > most ? F : most;
        s->xx = calloc(F * F, sizeof *s->xx);
        s->xy = calloc(F * E, sizeof *s->xy);
        s->b = calloc(F * E, sizeof *s->b);
        if (!s->xx || !s->xy || !s->b)
            goto no_memory;
    }
    p->factor = malloc((most * most + 1) * sizeof *p->factor);
    p->solution = malloc((most * E + 1) * sizeof *p->solution);
    if (p->steps && p->factor && p->solution)
        return p;
no_memory:
    ry_predictor_free(p);
    ry_fail(err, "out of memory for predicting %d layers of %d experts", layers, experts);
    return NULL;
}

void ry_predictor_free(struct ry_predictor *p)
{
    if (!p)
        return;
    for (int l = 0; p->steps && l + 1 < p->layers; l++) {
        free(p->steps[l].xx);
        free(p->steps[l].xy);
        free(p->steps[l].b);
    }
    free(p->steps);
    free(p->factor);
    free(p->solution);
    free(p);
}

void ry_predictor_observe(struct ry_predictor *p, const uint16_t *counts)
{
    size_t E = (size_t)p->experts;
    for (int l = 0; l + 1 < p->layers; l++) {
        struct step *s = &p->steps[l];
        const uint16_t *x = counts + (size_t)s->first * E, *y = counts + (size_t)(l + 1) * E;
        for (size_t i = 0; i < (size_t)s->features; i++) {
            double xi = x[i], *xx = s->xx + i * (size_t)s->features, *xy = s->xy + i * E;
            if (x[i] == 0)
                continue;
            for (size_t j = 0; j <= i; j++)
                xx[j] += xi * x[j];
            for (size_t e = 0; e < E; e++)
                xy[e] += xi * y[e];
        }
    }
    for (size_t k = 0; k < (size_t)p->layers * E; k++)
        p->counts += counts[k];
    p->observed++;
}

void ry_predictor_fit(struct ry_predictor *p)
{
    if (!p->observed || p->counts <= 0)
        return;
    double mean = p->counts / ((double)p->observed * p->layers * p->experts);
    for (int l = 0; l + 1 < p->layers; l++) {
        struct step *s = &p->steps[l];
        ry_ridge(s->xx, s->xy, (size_t)s->features, (size_t)p->experts, RIDGE * mean, p->factor, p->solution, s->b);
    }
}

void ry_predictor_next(const struct ry_predictor *p, int layer, const uint16_t *counts, float *out)
{
    const struct step *s = &p->steps[layer];
    size_t E = (size_t)p->experts;
    const uint16_t *x = counts + (size_t)s->first * E;
    memset(out, 0, E * sizeof *out);
    for (size_t i = 0; i < (size_t)s->features; i++) {
        const float *b = s->b + i * E;
        float xi = x[i];
        for (size_t e = 0; e < E && x[i]; e++)
            out[e] += xi * b[e];
    }
}
