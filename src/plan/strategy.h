/*
 * strategy.h: what a strategy is to plan.c: one file that says which cells it needs, how much memory, and builds steps.
 *
 * Owns: the interface between plan.c and the strategies. Not part of the contract: only src/plan includes it.
 * To add a strategy: a name in enum ry_strategy (plan.h), a file with its struct ry_strategy_ops, a line in plan.c's
 * table.
 */
#ifndef RY_PLAN_STRATEGY_H
#define RY_PLAN_STRATEGY_H

#include "plan.h"

/* Every message in staging memory begins at a multiple of this: what NCCL and copies like best. */
#define RY_STAGE_ALIGN 256

/* A plan while it is built. */
struct ry_building {
    const struct ry_plan_input *in;
    const struct ry_cluster *cluster;
    int rank, node, size; /* of `in`; the node that it is on; ranks there */
    const int *start;     /* [nnodes]: where a node's ranks begin in `members` */
    const int *members;   /* [nranks]: ranks by node, then local index, which is ascending rank */
    struct ry_plan *plan; /* room for most_steps() steps */
    struct ry_err *err;
    const struct ry_strategy_ops *ops;
    const struct ry_repeats *repeats; /* those of `in`, where the strategy has to do with them */
    int chunks;                       /* 1 or more */
};

struct ry_strategy_ops {
    const char *name;
    /* The cells that a rank needs: is `other` one of the rows, one of the columns? NULL: none at all. */
    bool (*row)(const struct ry_cluster *cluster, int rank, int other);
    bool (*column)(const struct ry_cluster *cluster, int rank, int other);
    /* An upper bound that is not far off: the steps are allocated by it. */
    size_t (*most_steps)(const struct ry_building *b);
    /* Fills plan->steps, nsteps, ngroups, stage_bytes; -1 with err. The input was checked by plan.c. */
    int (*build)(struct ry_building *b);
    /* See ry_plan_stage_relay(), _pack(), _all() (the results are zero before). NULL: no staging memory at all. */
    uint64_t (*stage_relay)(const struct ry_cluster *cluster, int rank, const uint64_t *matrix,
                            const struct ry_repeats *repeats);
    uint64_t (*stage_pack)(const struct ry_cluster *cluster, int rank, const uint64_t *send, const uintptr_t *send_at,
                           const struct ry_repeats *repeats);
    int (*stage_all)(const struct ry_cluster *cluster, const uint64_t *matrix, const struct ry_repeats *repeats,
                     uint64_t *relay, uint64_t *pack, struct ry_err *err);
    /* How many words a slice has, and the words themselves, all zero before. NULL: none. */
    size_t (*words)(const struct ry_cluster *cluster, int node);
    void (*fill_words)(const struct ry_cluster *cluster, int node, const uint64_t *matrix, uint64_t *words);
    bool repeats; /* has to do with repeats: slices hold what the rows' ranks found. Without it, no operation gets any.
                   */
};
extern const struct ry_strategy_ops ry_direct_ops, ry_hierarchical_ops, ry_balanced_ops, ry_dedup_ops, ry_sum_ops;

/* Append a step; one without bytes is left out. */
static inline void ry_step_add(struct ry_plan *plan, struct ry_step step)
{
    if (step.bytes)
        plan->steps[plan->nsteps++] = step;
}

static inline void ry_step_copy(struct ry_plan *plan, struct ry_at to, struct ry_at from, uint64_t bytes)
{
    ry_step_add(
        plan, (struct ry_step){.kind = RY_STEP_COPY, .group = -1, .peer = -1, .to = to, .from = from, .bytes = bytes});
}

static inline void ry_step_send(struct ry_plan *plan, int group, int peer, struct ry_at from, uint64_t bytes)
{
    ry_step_add(plan,
                (struct ry_step){.kind = RY_STEP_SEND, .group = group, .peer = peer, .from = from, .bytes = bytes});
}

static inline void ry_step_recv(struct ry_plan *plan, int group, int peer, struct ry_at to, uint64_t bytes)
{
    ry_step_add(plan, (struct ry_step){.kind = RY_STEP_RECV, .group = group, .peer = peer, .to = to, .bytes = bytes});
}

static inline struct ry_at ry_at_send(int peer)
{
    return (struct ry_at){RY_AT_SEND, peer, 0};
}

static inline struct ry_at ry_at_recv(int peer)
{
    return (struct ry_at){RY_AT_RECV, peer, 0};
}

static inline struct ry_at ry_at_stage(uint64_t offset)
{
    return (struct ry_at){RY_AT_STAGE, -1, offset};
}

/* Sums that stay at UINT64_MAX once they got there: no memory is ever that large. */
static inline uint64_t ry_sum(uint64_t a, uint64_t b)
{
    return a > UINT64_MAX - b ? UINT64_MAX : a + b;
}

/* What a message of `bytes` takes in staging memory. */
static inline uint64_t ry_stage_room(uint64_t bytes)
{
    return bytes > UINT64_MAX - RY_STAGE_ALIGN ? UINT64_MAX
                                               : (bytes + RY_STAGE_ALIGN - 1) / RY_STAGE_ALIGN * RY_STAGE_ALIGN;
}

#endif
