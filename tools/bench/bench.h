/*
 * bench.h: one rank of the benchmark, shared by its parts.
 *
 *   main.c      starts up, and goes through iterations and layers as a training step does
 *   exchange.c  does one exchange: fills, poisons, issues, times, counts, checks
 *   summary.c   brings all ranks' results together: table, JSON, matrix
 *
 * A failed call ends the process at once by ry_bench_die(): it is a rank of a job whose launcher ends the others.
 */
#ifndef RY_BENCH_BENCH_H
#define RY_BENCH_BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <nccl.h>

#include "content.h"
#include "device/device.h"
#include "options.h"
#include "random.h"
#include "routing.h"

#define RY_NODE_NAME 64

/* The rows of one layer in one iteration. */
struct ry_layer {
    struct ry_row *mine;   /* my tokens' rows, by expert: so by rank of the expert */
    struct ry_row *theirs; /* the rows of all ranks' tokens for my experts, by rank of the token */
    uint64_t *to, *from;   /* [ranks]: how many of `mine` go to a rank, how many of `theirs` come from it */
    size_t n_mine, n_theirs;
    uint64_t *expert_count; /* [experts]: rows of `mine` for each expert */
};

/* Memory that grows: on the host and on the device. */
struct ry_buffer {
    unsigned char *host;
    void *device;
    size_t size;
};

struct ry_bench {
    struct ry_bench_options options;
    struct ry_routing *routing;
    const struct ry_device *device;
    bool emulated;
    int nccl_version;
    int rank, ranks, per_rank; /* experts per rank */
    size_t capacity;           /* rows per expert and rank; 0: no padding */
    ncclComm_t comm;
    void *stream;
    char (*node_name)[RY_NODE_NAME]; /* [ranks] */
    int *node;                       /* [ranks], numbered in order of their lowest rank */
    int nodes;

    struct ry_buffer send, recv, small;
    struct ry_event *before, *after;

    /* results of this rank */
    uint64_t exchanges; /* done, warm-up included */
    uint64_t *sent;     /* [ranks] bytes, in exchanges only */
    uint64_t flow_sent[RY_FLOWS];
    uint64_t dispatched;     /* bytes received in dispatches: the load of my experts */
    uint64_t checked, wrong; /* bytes */
    int complaints;
    XXH3_state_t *digest;
    double *us[RY_FLOWS]; /* [iterations * layers], without warm-up; NULL for flows that are not done */
    double seconds;       /* wall clock of the whole loop */
};

/** Print "railyard-bench: rank N: text" and exit with 1. */
_Noreturn void ry_bench_die(const struct ry_bench *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/** As malloc(n * size), zeroed, or die. */
void *ry_bench_memory(const struct ry_bench *b, size_t n, size_t size);
/** Make sure that `buffer` holds `size` bytes on both sides; its content may be lost. */
void ry_bench_reserve(struct ry_bench *b, struct ry_buffer *buffer, size_t size);
/** All-gather `bytes` bytes per rank (host memory) into all[ranks * bytes]. */
void ry_bench_gather(struct ry_bench *b, const void *mine, size_t bytes, void *all);

/** The counts that precede a dispatch without padding: swap, and make sure that all ranks tell the same story. */
void ry_bench_swap_counts(struct ry_bench *b, uint64_t iteration, int layer, const struct ry_layer *rows);
/** One exchange of `flow`. `us` gets the microseconds that it took; NULL: not wanted. */
void ry_bench_exchange(struct ry_bench *b, enum ry_flow flow, uint64_t iteration, int layer,
                       const struct ry_layer *rows, double *us);

/** Bring results together (every rank calls it), print and write them (rank 0). Returns the exit status of all ranks.
 */
int ry_bench_summary(struct ry_bench *b, FILE *json);

/* The device layer and NCCL, with death as the answer to failure. */
#define RY_DEVICE(b, call, ...)                                                                                        \
    do {                                                                                                               \
        struct ry_err err_ = {""};                                                                                     \
        if ((b)->device->call(__VA_ARGS__, &err_))                                                                     \
            ry_bench_die((b), "%s", err_.msg);                                                                         \
    } while (0)
#define RY_NCCL(b, call, ...)                                                                                          \
    do {                                                                                                               \
        ncclResult_t r_ = call(__VA_ARGS__);                                                                           \
        if (r_ != ncclSuccess)                                                                                         \
            ry_bench_die((b), "%s: %s: %s", #call, ncclGetErrorString(r_), ncclGetLastError((b)->comm));               \
    } while (0)

#endif
