/*
 * content.h: what every row holds, and whether it does.
 *
 * Owns: the rows that one rank has for another (which tokens, in which order), and their bytes as a pure function of
 * (seed, iteration, layer, flow, source rank, token, expert, element), so that a receiver recomputes exactly what must
 * be there. Not: how rows travel.
 */
#ifndef RY_BENCH_CONTENT_H
#define RY_BENCH_CONTENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The exchanges of one MoE layer, in the order in which Megatron-core issues them; the last three are backward. */
enum ry_flow {
    RY_FLOW_DISPATCH,      /* tokens to experts: all copies of a token are equal */
    RY_FLOW_PROBS,         /* the router's probability of each copy: the same splits, one element per row */
    RY_FLOW_COMBINE,       /* expert outputs back: every copy differs */
    RY_FLOW_COMBINE_GRAD,  /* as dispatch: all copies of a token's gradient are equal */
    RY_FLOW_PROBS_GRAD,    /* as combine, one element per row */
    RY_FLOW_DISPATCH_GRAD, /* as combine */
    RY_FLOWS
};
const char *ry_flow_name(enum ry_flow flow); /* "dispatch", "probs", …, "dispatch-gradient" */
/** From the experts' rank back to the token's rank? */
bool ry_flow_is_back(enum ry_flow flow);

/* One row: which token, for which expert. */
struct ry_row {
    int32_t owner; /* rank that the token lives on */
    int32_t token; /* -1: padding up to the capacity */
    int32_t expert;
};
#define RY_PADDING (-1)

/**
 * List the rows of `owner`'s tokens for the experts [first, last): expert by expert, tokens in increasing order.
 * `choice` is [tokens][top_k]. `capacity` > 0: exactly so many rows per expert, the tokens beyond it left out and the
 * rest padding. Returns the number of rows; count[e - first] (may be NULL) is that of each expert. `rows` has room for
 * tokens * top_k, or capacity * (last - first).
 */
size_t ry_rows_list(struct ry_row *rows, uint64_t *count, const uint16_t *choice, int tokens, int top_k, int owner,
                    int first, int last, size_t capacity);

struct ry_content {
    uint64_t seed, iteration;
    int layer;
    enum ry_flow flow;
    size_t row_bytes;
    uint64_t mask; /* cleared from every 8 bytes, so that floating-point elements are finite; 0 for integers */
};

/** Write the content of `n` rows, one after the other. */
void ry_content_fill(const struct ry_content *c, const struct ry_row *rows, size_t n, void *out);

struct ry_wrong {
    uint64_t bytes; /* how many are wrong */
    size_t first;   /* offset of the first one */
    unsigned char got, expected;
};

/** Compare `n` rows at `got` with what they must hold. True if every byte is right; else `wrong` tells. */
bool ry_content_check(const struct ry_content *c, const struct ry_row *rows, size_t n, const void *got,
                      struct ry_wrong *wrong);

#endif
