/*
 * live.h: what the framework adapter asks of Railyard: learn from observed routing where samples want to live, deal a
 * list of samples to the places, record what was seen. Exported by librailyard-engine.so, called from Python through
 * ctypes: plain types only, no structure by value. docs/live-placement.md has the words (place, list) and the picture.
 *
 * Owns: the exported functions, the leader's state. Not: who talks to whom (plugin/python/railyard), learning and
 * solving themselves (src/place).
 *
 * Every function returns 0 or a count, and -1 after a failure; railyard_live_error() then says what was wrong, for the
 * calling thread. Nothing here does I/O but loading, saving and recording, prints, starts threads, or ends the process.
 *
 * Threads: a `struct railyard_live` has a lock of its own; any thread may call at any time. Dealing a list holds it for
 * as long as that takes (tens of milliseconds for a thousand long samples). Not across fork().
 */
#ifndef RY_LIVE_H
#define RY_LIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define RAILYARD_LIVE_ABI 3 /* changed whenever anything below, or in layers.h, is; the adapter refuses another one */

struct railyard_live;

struct railyard_live_job {
    uint32_t size;       /* sizeof of this structure as the caller knows it */
    int32_t ranks;       /* data-parallel ranks */
    int32_t samples;     /* of each rank in a list */
    int32_t layers;      /* with experts */
    int32_t experts;     /* of a layer, all ranks together */
    int32_t topk;        /* experts that a token goes to */
    int32_t places;      /* >= 2 */
    int32_t distinct;    /* 1: count (token, place) pairs, what is sent where equal rows cross once; 0: copies */
    const int32_t *rank_place;   /* [ranks] */
    const int32_t *expert_place; /* [layers][experts], experts numbered as the checkpoint does */
};

struct railyard_live_plan {
    uint32_t size;
    int32_t moved;    /* samples that change ranks; 0: as dealt */
    double dealt;     /* predicted share of what is sent that leaves its place: as dealt */
    double placed;    /* the same with `order` (equal to `dealt` where nothing moves) */
    char why[192];    /* in words, one line */
};

struct railyard_live_state {
    uint32_t size;
    int32_t sure;      /* 1: predictions are good enough to act on */
    uint64_t samples;  /* observed, those that a loaded model had learned from included */
    double crossed;    /* share of what the last thousand samples or so sent that left the place they were at; of those
                          observed here only, as `even` */
    double even;       /* the same had each been at a place by lot, in proportion to the places' ranks */
    double captured;   /* of what knowing routing beforehand could keep beyond that, what predictions keep (home_model.h) */
    char why[192];
};

int railyard_live_abi(void);
const char *railyard_live_error(void);

/** A setting of Railyard as this process' environment has it (base/settings.def), by its RAILYARD_ name, as text into
 * out[size]; returns its length, -1 for no such setting or a malformed value. */
int railyard_live_setting(const char *name, char *out, size_t size);

/** Pointers inside `job` are copied. NULL with an error. */
struct railyard_live *railyard_live_new(const struct railyard_live_job *job);
void railyard_live_free(struct railyard_live *live);

/**
 * Learn from one sample that was at place `at`, 0 <= at < places: tokens[n], counts[layers][experts] of its tokens, and
 * distinct[layers][places], tokens with at least one expert there (NULL: not known; an upper bound from counts is taken;
 * not looked at where job->distinct is 0). A sample that contradicts itself is refused, and nothing learned from it.
 */
int railyard_live_observe(struct railyard_live *live, const uint32_t *tokens, int32_t n, const uint32_t *counts,
                          const uint32_t *distinct, int32_t at);

/**
 * Deal a list: tokens of sample i are tokens[first[i] … first[i + 1]), i < ranks · samples. Sample i is dealt to slot
 * i, slots being numbered rank by rank. order[slot]: the sample that gets it; a permutation, and the identity where
 * plan->moved is 0. Samples that stay in their place stay in their slot, the others fill the slots that become free in
 * their new place, both ascending. Longer samples weigh more, as they send more. As dealt where the model is not sure, or
 * what leaves its place would become less by under 2 %. Deterministic.
 */
int railyard_live_place(struct railyard_live *live, const uint32_t *tokens, const int64_t *first, uint32_t *order,
                        struct railyard_live_plan *plan);

int railyard_live_state(struct railyard_live *live, struct railyard_live_state *state);

/** The home model's file (home_model.h); loading refuses one for other places or another expert map. */
int railyard_live_save(struct railyard_live *live, const char *path);
int railyard_live_load(struct railyard_live *live, const char *path);

/**
 * Record observations into folder `dir` (made if absent), readable by `railyard plan` at any time after
 * railyard_live_record_flush(): counts.npy, tokens.npy, meta.json. A folder that holds a recording of the same shape is
 * continued, any other refused. Afterwards every railyard_live_observe() with exactly `tokens_per_sample` tokens is
 * recorded too, until the folder holds `max_samples` (0: no limit); others, and those in which an expert got more than
 * 65,535 tokens in a layer, are counted as left out in meta.json. When writing fails, that observe() returns -1 though
 * the sample was learned from, and recording is over. Called again, it ends the recording before.
 */
int railyard_live_record(struct railyard_live *live, const char *dir, int32_t tokens_per_sample, int64_t max_samples);
int railyard_live_record_flush(struct railyard_live *live);

/**
 * An expert map (place/expert_map.h) for so many layers, experts of each, and expert-parallel ranks: permutation[layers]
 * [experts], the expert that each slot is to hold, untouched on failure. -1 with what is wrong in why[size].
 */
int railyard_live_expert_map(const char *path, int32_t layers, int32_t experts, int32_t ranks, int32_t *permutation,
                             char *why, size_t size);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
