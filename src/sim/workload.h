/*
 * workload.h: the tokens of one step of a simulated job: which experts each token of each sample goes to, in each
 * layer.
 *
 * Owns: where they come from (recorded routing, or made up with a set locality), how few recorded experts and samples
 * become as many as a large cluster needs, and how many samples each rank has. Not: where samples and experts are.
 *
 * Recorded routing with E experts on a cluster that needs m · E: each expert stands for m, and every copy of a token
 * chooses among these by chance. That keeps what a sample wants of each m together, and has no locality among them: a
 * placement finds less to gain than a model that was trained with so many experts would have. Recorded samples are
 * drawn without replacement; when none are left all are drawn once more, with other chances. Where token-level choices
 * are recorded the samples that have them are drawn and the others learned from; elsewhere the first are learned from,
 * the rest drawn, and which experts share a token is not known (pairs is false).
 *
 * Made up: experts come in groups, in each layer by chance; a sample belongs to one group for good, and each copy of
 * its tokens goes into the group with probability `locality`, else to any expert.
 *
 * Everything follows from the seed. Threads: one workload per thread.
 */
#ifndef RY_SIM_WORKLOAD_H
#define RY_SIM_WORKLOAD_H

#include <stdbool.h>

#include "place/routing.h"

#define RY_NO_EXPERT UINT16_MAX /* a copy that was dropped */
#define RY_MOST_EXPERTS 65535

struct ry_source {
    const struct ry_routing *routing; /* NULL: made up by what follows */
    int layers, topk, tokens;
    double locality; /* 0 to 1 */
    int groups;      /* 0: one for every 8 experts; divides `experts` */
    /* for both */
    int experts; /* a multiple of the recorded ones */
    int samples; /* of a step, all ranks together */
    int fit;     /* samples to learn from */
    uint64_t seed;
};

struct ry_workload {
    int layers, experts, topk, tokens, samples;
    uint16_t *choice;   /* [layers][samples][tokens][topk] */
    bool pairs;         /* which experts share a token is known */
    int split;          /* experts that a recorded one stands for; 1: made up, too */
    int pool;           /* recorded samples drawn from; 0: made up */
    int *recorded;      /* [samples]: the recorded sample that each is; made up: its group */
    int fit_first, fit; /* recorded samples [fit_first, fit_first + fit) may be learned from */
    int *group;         /* [layers][experts]: made up: the group of each expert; else NULL */
    int groups;
    struct ry_source source;
    uint32_t *order; /* [pool or samples]: scratch */
};

/** -1 with `err` naming the field that cannot be, and what could. Nothing is drawn yet. */
int ry_workload_init(struct ry_workload *workload, const struct ry_source *source, struct ry_err *err);
void ry_workload_free(struct ry_workload *workload);

/** Step `k`: every k is drawn alike, whichever were drawn before. -1 when out of memory. */
int ry_workload_draw(struct ry_workload *workload, int k, struct ry_err *err);

/** Samples to learn from, of the same kind as those drawn, with as many experts: none of them is ever drawn. With
 * choices where pairs are known. Closed by ry_routing_close(). Memory: 2 bytes · fit · layers · (experts + tokens ·
 * topk). */
struct ry_routing *ry_workload_fit(const struct ry_workload *workload, struct ry_err *err);

static inline const uint16_t *ry_workload_at(const struct ry_workload *w, int layer, int sample)
{
    return w->choice + ((size_t)layer * (size_t)w->samples + (size_t)sample) * (size_t)w->tokens * (size_t)w->topk;
}

#endif
