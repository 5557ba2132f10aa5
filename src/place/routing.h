/*
 * routing.h: observed routing: how many tokens of each sample went to which expert of each layer, and which token went
 * where.
 *
 * Owns: reading and writing routing folders (meta.json and .npy files), their validation, and shuffling tokens among
 * samples (what a trace without locality looks like). Not: what follows from routing (problem.h).
 *
 * A folder holds meta.json, an object with
 *   layers, experts, topk, tokens_per_sample, samples   required, whole numbers above zero
 *   counts        required: "FILE anything": [sample][layer][expert], tokens of the sample routed to the expert
 *   choices       optional: "FILE …": [sample][layer][token][k], experts chosen, for the first choice_samples samples
 *   tokens        optional: "FILE …": [sample][token], token ids, below `vocabulary` if that is given
 *   domain        optional: "FILE …": [sample], what kind of text the sample is: index into the list `domains`
 *   growing       optional: true while samples may be appended (routing_writer.h): the arrays may then hold more samples
 *                 than `samples` already, which are passed over
 * FILE is relative to the folder. Integer types are free; uint16 (counts, tokens, choices), uint8 (choices, domain) and
 * uint32 (tokens) are used in place, memory-mapped, others are converted, and refused where a value does not fit or is
 * no whole number.
 *
 * Threads: a routing is read-only once opened.
 */
#ifndef RY_PLACE_ROUTING_H
#define RY_PLACE_ROUTING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/npy.h"

/* At most. */
#define RY_ROUTING_TOPK 64
#define RY_ROUTING_SAMPLES (1 << 28)
#define RY_ROUTING_LAYERS 65536
#define RY_ROUTING_EXPERTS 65536
#define RY_ROUTING_TOKENS (1 << 24) /* of a sample */

struct ry_routing {
    int samples, layers, experts, topk, tokens_per_sample;
    int choice_samples;      /* samples with token-level choices: the first ones; 0 without choices */
    int vocabulary;          /* 0 unknown */
    int ndomains;            /* 0 without domains */
    char **domains;          /* [ndomains] */
    const uint16_t *counts;  /* [samples][layers][experts] */
    const uint8_t *choices8; /* [choice_samples][layers][tokens][topk]; exactly one of the two, or none */
    const uint16_t *choices16;
    const uint16_t *tokens16; /* [samples][tokens_per_sample]; exactly one of the two, or none */
    const uint32_t *tokens32;
    const uint8_t *domain; /* [samples], or NULL */
    /* private: what the pointers above point into */
    struct ry_npy maps[4];
    void *owned[4];
};

/** Open and validate a folder. NULL with `err` naming file and field. */
struct ry_routing *ry_routing_open(const char *dir, struct ry_err *err);
/** Closes mapped, shuffled and built ones alike. NULL is fine. */
void ry_routing_close(struct ry_routing *routing);

/** Write a folder (which must exist) that ry_routing_open() reads. */
int ry_routing_save(const struct ry_routing *routing, const char *dir, struct ry_err *err);

/** An empty routing in memory with room for counts, and for choices of the first `choice_samples` samples; fill through
 * the pointers, cast: they are writable. Domains and tokens are absent. */
struct ry_routing *ry_routing_new(int samples, int layers, int experts, int topk, int tokens_per_sample,
                                  int choice_samples, struct ry_err *err);

/** A copy in which every sample's tokens come from random samples: the same load on every expert, no locality. Choices
 * are shuffled as whole tokens among the samples that have them (their counts follow), the other samples' counts copy
 * by copy. Without domains and tokens. Deterministic for a seed. */
struct ry_routing *ry_routing_shuffled(const struct ry_routing *routing, uint64_t seed, struct ry_err *err);

static inline const uint16_t *ry_counts_at(const struct ry_routing *r, int sample, int layer)
{
    return r->counts + ((size_t)sample * (size_t)r->layers + (size_t)layer) * (size_t)r->experts;
}

static inline bool ry_has_tokens(const struct ry_routing *r)
{
    return r->tokens16 || r->tokens32;
}

/** A sample's token ids, of a routing that has them: in place, or copied to room[tokens_per_sample]. */
static inline const uint32_t *ry_tokens_at(const struct ry_routing *r, int sample, uint32_t *room)
{
    size_t n = (size_t)r->tokens_per_sample, at = (size_t)sample * n;
    if (r->tokens32)
        return r->tokens32 + at;
    for (size_t i = 0; i < n; i++)
        room[i] = r->tokens16[at + i];
    return room;
}

/** The k-th expert of a token; `sample` < choice_samples. */
static inline int ry_choice(const struct ry_routing *r, int sample, int layer, int token, int k)
{
    size_t at = (((size_t)sample * (size_t)r->layers + (size_t)layer) * (size_t)r->tokens_per_sample + (size_t)token) *
                    (size_t)r->topk +
                (size_t)k;
    return r->choices8 ? r->choices8[at] : r->choices16[at];
}

#endif
