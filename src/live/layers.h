/*
 * layers.h: layer placement (NetMoE) as a running job asks for it: where the samples of a micro-batch shall be when the
 * next layer with experts begins, by what the layers so far have shown. Exported as live.h is, and by its rules: plain
 * types, -1 and railyard_live_error() after a failure, a lock of its own, no I/O, no threads.
 *
 * Owns: learning and deciding for one expert-parallel group. Not: moving samples, and how ranks come to do the same
 * (plugin/python/railyard/layers.py); the solver (place/assign.h).
 *
 * Words: a slot is a position in a rank's micro-batch, numbered rank by rank; a sample is named by its home, the slot
 * where it was when the micro-batch began and where it is again before the loss. Samples move between the dispatches of
 * two layers, as hidden states; so both exchanges of a layer are to and from the same rank, unless they move inside combine.
 *
 * What is minimized, in rows that cross between places: of each sample that is at place a, has its home at h and goes
 * to p,
 *
 *     2 · Σ over the layers to come of (rows that it will send, less those to p) + tokens · ([p ≠ a] + [p ≠ h])
 *
 * as if it stayed at p for the rest of the micro-batch and then went home; where samples may move inside combine, both that
 * and, with the layer's own results going to p instead of a, the whole again, and what is less of the two. Where the residual
 * rides along, a sample may be elsewhere in each layer for nothing: then it is this layer's rows and the next dispatch's, less
 * those to p, and everybody is home behind the last layer's combine. It may be decided otherwise a layer later;
 * what it costs to go home counts from the first move, so that samples do not go for a gain that is eaten on the way
 * back, and do not go to and fro. The backward pass mirrors all of it. Rows to come are told from the counts of the
 * last layers by a ridge regression, learned as the job runs; where it knows nothing it says that all places are alike,
 * and nobody moves. Samples to places under equal counts is a transportation problem, solved exactly.
 */
#ifndef RY_LIVE_LAYERS_H
#define RY_LIVE_LAYERS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

struct railyard_live_layers;

struct railyard_live_layers_job {
    uint32_t size;    /* sizeof of this structure as the caller knows it */
    int32_t ranks;    /* of the group */
    int32_t samples;  /* of each rank in a micro-batch */
    int32_t tokens;   /* of each sample, <= 65536 */
    int32_t layers;   /* with experts, >= 2 */
    int32_t experts;  /* of a layer */
    int32_t topk;     /* experts that a token goes to */
    int32_t places;   /* >= 2 */
    int32_t distinct; /* 1: rows are (token, place) pairs, what is sent where equal rows cross once; 0: copies */
    int32_t combine;  /* 1: samples may move inside combine, which then brings a layer's results to where the sample is next;
                         2: they do, and nothing else of them has to be sent for that (the residual rides along) */
    const int32_t *rank_place;   /* [ranks] */
    const int32_t *expert_place; /* [experts], of every layer, as routers number them */
};

struct railyard_live_layers_plan {
    uint32_t size;
    int32_t moved; /* samples that change places; 0: all stay */
    int32_t inside; /* 1: inside combine; 0: behind it */
    double stay;   /* rows predicted to cross from here to the micro-batch's end, going home included, if all stay */
    double go;     /* the same with `next`, moving included */
    char why[192]; /* in words, one line */
};

struct railyard_live_layers_state {
    uint32_t size;
    int32_t sure;     /* 1: enough was learned to move samples, and lately it paid */
    uint64_t samples; /* learned from */
    uint64_t batches; /* micro-batches in which samples moved */
    double home;      /* share of rows that would have crossed with everyone at home; of these, running means */
    double crossed;   /* share that did cross */
    double carried;   /* rows that samples' moves sent across, by all rows of the exchanges */
    char why[192];
};

/** Pointers inside `job` are copied. NULL with an error. */
struct railyard_live_layers *railyard_live_layers_new(const struct railyard_live_layers_job *job);
void railyard_live_layers_free(struct railyard_live_layers *layers);

/**
 * In layer `layer` of the current micro-batch slot s had sample[s], whose tokens went counts[s][experts] to experts,
 * and, where job->distinct, distinct[s][places] of them to at least one expert of each place. Layers are told from 0
 * on, in order; 0 begins a micro-batch, whatever became of the one before. next[slot]: the sample that the slot shall
 * have when the next layer begins; sample[] where plan->moved is 0, as it is after the last layer. Samples that stay in
 * their place stay in their slot. Whether `next` came about is told by the next call's sample[]. Deterministic. After
 * the last layer it learns from the micro-batch, which may take tens of milliseconds.
 */
int railyard_live_layers_next(struct railyard_live_layers *layers, int32_t layer, const uint32_t *sample,
                              const uint32_t *counts, const uint32_t *distinct, uint32_t *next,
                              struct railyard_live_layers_plan *plan);

int railyard_live_layers_state(struct railyard_live_layers *layers, struct railyard_live_layers_state *state);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
