/*
 * options.h: what the benchmark was asked to do, and which rank of the job it is.
 *
 * Owns: the command line, its help, and torchrun's environment variables. Not: what can only be judged with the trace
 * or the device at hand (routing.h and main.c check that).
 */
#ifndef RY_BENCH_OPTIONS_H
#define RY_BENCH_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include <nccl.h>

#include "rendezvous.h"
#include "routing.h"

struct ry_bench_type {
    const char *name;
    ncclDataType_t nccl;
    unsigned bytes;
    uint64_t mask; /* see content.h */
};

enum ry_bench_check { RY_CHECK_EVERY, RY_CHECK_FIRST, RY_CHECK_NONE };
extern const char *const ry_bench_check_names[];

struct ry_bench_options {
    struct ry_routing_config routing;
    int hidden, iterations, warmup;
    const struct ry_bench_type *type, *probs_type;
    double pad; /* capacity factor; 0: no padding, exact counts */
    enum ry_bench_check check;
    bool digest, barrier;
    const char *json, *matrix; /* files, or NULL */
    uint64_t corrupt;          /* 1 + number of the exchange after which a received byte is flipped; 0: none */
    struct ry_ranks ranks;     /* of the job */
};

/**
 * Read the command line and the environment. 0: go on. Otherwise *status is the exit status (0 after --help, 2 for
 * wrong usage), and what there was to say has been said, by rank 0 only.
 */
int ry_bench_options(int argc, char **argv, struct ry_bench_options *out, int *status);

/**
 * Called by other ranks before they exit with the same complaint as rank 0: a launcher ends all ranks when the first
 * one fails, and that must be the one with something to say.
 */
void ry_bench_let_rank_0_speak(void);

#endif
