/*
 * policy.h: what the yardmaster decides by: the cost model, what it learned, and what the user forced.
 *
 * Owns: the callbacks that the agreement asks (control/agree.h: struct ry_policy), the content of what a rank adds to
 * its manifest and of what a verdict adds for each rank. Not: the formulas (plan/cost.h), when it is asked (the
 * agreement).
 *
 * Thread-safety: none of its own; everything is called under the communicator's lock (control/talk.h).
 */
#ifndef RY_ENGINE_POLICY_H
#define RY_ENGINE_POLICY_H

#include "control/agree.h"
#include "pace.h"
#include "plan/cost.h"
#include "plan/plan.h"

/* A communicator of the ranks of each node (node_comm.h): how far a rank is with it, and what the yardmaster wants of all. MAKING: only one of
   twins, which comes about while the job goes on. */
enum ry_node_state { RY_NODE_CANNOT, RY_NODE_COULD, RY_NODE_HAS, RY_NODE_MAKING };
enum ry_node_order { RY_NODE_NOTHING, RY_NODE_MAKE, RY_NODE_USE };
/* What carries what crosses nodes in a plan (RAILYARD_TRANSPORT). */
enum ry_transport { RY_BY_NCCL, RY_BY_UCX, RY_BY_FASTER };

/*
 * What a rank adds to SEEN (struct ry_seen) and to its manifest. Same machine type on all ranks: sent as it lies in memory; in a
 * manifest followed by uint32_t [nnodes][RY_CHUNKS], `early` and `distinct` of struct ry_repeats, where row_bytes is not
 * 0 (0 for its own node and for nodes that were not searched). In SEEN, load.scanned and packed_out may be an expectation from earlier
 * exchanges, and nothing follows.
 */
#define RY_TOOK 8
struct ry_side {
    struct ry_load load;
    uint64_t staging;             /* bytes that it holds */
    uint64_t pack[RY_STRATEGIES]; /* staging that it needs for what it packs itself: ry_plan_stage_pack(); RY_SUM: for all */
    struct ry_took { /* exchanges timed here of which nothing was told yet, in any order */
        uint64_t number; /* 1 + it; 0: none */
        uint64_t bytes;  /* how much this rank had to send or get in it, whichever is more */
        double us;       /* on the device, the search for equal rows not included */
        struct ry_beside beside; /* what ran beside it */
    } took[RY_TOOK]; /* several, since they become known some at a time */
    uint64_t row_bytes;           /* that this rank looked for equal rows by; 0: it did not look */
    uint64_t parts;               /* that it took them in */
    uint64_t node_comm;           /* enum ry_node_state */
    double messages_us;           /* what agreeing takes this rank, without waiting for others; 0: not known */
    uint64_t cannot_pack;         /* 1: it has no kernels to pack rows and write them out; nobody packs then */
    uint64_t answers; /* 1 + the exchange whose return this is, if for all this rank knows it may be summed; 0: it may not */
    uint64_t copies;  /* of each token in that one; 0: as many as the others say */
    uint64_t cross, cross_held; /* enum ry_cross_state (ucx/carrier.h); bytes of host memory that it holds for that */
};
/* With SEEN: `side.load` may be that of the most promising exchange since the last SEEN. `own` is always that of the exchange at hand; `plain`: which
   plain NCCL carries out, and which is timed: side.took of a later one says how long it took. */
struct ry_seen {
    struct ry_side side;
    struct ry_load own;
    uint64_t plain;
};
/** The most that ry_side_pack() writes, any row width. */
static inline size_t ry_side_most(int nnodes)
{
    return sizeof(struct ry_side) + (size_t)nnodes * RY_CHUNKS * sizeof(uint32_t);
}
/** For the manifest: `side`, and behind it what was found ([nnodes]; NULL or side->row_bytes 0: nothing). `out` has
 * room for ry_side_most() bytes. Returns how many they are. */
size_t ry_side_pack(void *out, const struct ry_side *side, int nnodes, const struct ry_repeats *repeats);
/** The other way. repeats[nnodes]; all zero where it did not look. -1 where the size is wrong. */
int ry_side_unpack(struct ry_side *side, struct ry_repeats *repeats, int nnodes, const void *extra, size_t bytes);

/* What a verdict adds, followed by the cells of the rank's slice (none for direct and sum), then, balanced, its words, or, dedup, its repeats: row widths
 * as uint64_t, with the parts in the highest byte, and behind these numbers as in manifests. */
struct ry_order {
    uint64_t staging_wanted; /* hold as much before the next exchange; 0: no wish */
    uint64_t timed;          /* 1: time this exchange, whether it is the turn of RAILYARD_SAMPLE or not */
    uint64_t node_comm;      /* enum ry_node_order; the same for all ranks. MAKE: before the plan, which does not use it yet */
    double plain_us;         /* what plain NCCL would take, not engaged, by all that is known */
    uint64_t cross_wanted;   /* as staging_wanted, for what UCX carries */
    uint64_t cross;          /* 1: UCX carries what crosses nodes in this plan; the same for all ranks */
    uint32_t chunks;         /* of the plan; dedup only, else 0 */
    uint32_t parts;          /* to look for equal rows in, from the next exchange on; 0: as before */
};
/** Bytes of an order for a slice as ry_slice_init() laid it out; NULL: none. */
size_t ry_order_bytes(const struct ry_slice *slice);
/** Read the cells and repeats that follow an order. -1 with `err` unless `bytes` is just ry_order_bytes(). */
int ry_order_unpack(struct ry_slice *slice, const void *extra, size_t bytes, struct ry_err *err);

struct ry_policy_config {
    const struct ry_cluster *map; /* must live as long as the policy */
    const _Atomic int *forced;    /* enum ry_strategy, or -1: choose; may change */
    uint64_t verify;              /* every n-th engaged exchange, 0: never */
    uint64_t staging_limit;
    int chunks; /* of plans by dedup; 0: by the model */
    const _Atomic int *transport; /* enum ry_transport; may change. NULL: RY_BY_NCCL */
    struct ry_cost_model model;
    struct ry_pace *pace; /* of the yardmaster's own rank; must live as long. NULL: only estimates count */
    const char *name; /* of the communicator, for RAILYARD_LOG=plan; copied */
};

/** The most host memory that a rank's transfers between nodes take in a group of a plan, staged (ucx/carrier.h). Hierarchical, balanced
 *  and dedup. O(nranks^2). */
uint64_t ry_cross_need(const struct ry_cluster *map, int rank, enum ry_strategy strategy, const uint64_t *matrix);

struct ry_chooser; /* opaque */
struct ry_chooser *ry_chooser_new(const struct ry_policy_config *config, struct ry_err *err);
void ry_chooser_free(struct ry_chooser *c);
/** The callbacks, with `c` as their context. */
struct ry_policy ry_chooser_policy(struct ry_chooser *c);

struct ry_chooser_counts {
    uint64_t chosen[RY_STRATEGIES]; /* exchanges by strategy, while engaged */
    uint64_t short_of_staging;
    uint64_t beside;  /* exchanges decided as run beside others: RY_BESIDE_MUCH */
    uint64_t dropped; /* durations that were not learned from, for they were taken under another load */
};
void ry_chooser_counts(const struct ry_chooser *c, struct ry_chooser_counts *out);

#endif
