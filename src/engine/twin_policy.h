/*
 * twin_policy.h: what the yardmaster of twin communicators decides by: are their bytes equal, and does it pay.
 *
 * Owns: the callbacks that the agreement among all ranks of all twins asks (control/agree.h: struct ry_policy), the
 * content of what a rank adds to its manifest there and of what a verdict adds. Not: the formulas (plan/cost_replica.h,
 * plan/cost.h), who the twins are (twin_find.h), what a communicator does by itself where the verdict is not replica
 * (policy.h).
 *
 * Ranks are numbered through: t * W + k is rank k of twin t. No I/O, no clock. Thread-safety: none of its own;
 * everything is called under the lock of the twins' agreement.
 */
#ifndef RY_ENGINE_TWIN_POLICY_H
#define RY_ENGINE_TWIN_POLICY_H

#include "control/agree.h"
#include "plan/cost.h"
#include "plan/plan.h"
#include "policy.h"
#include "run/run.h"

#define RY_TWIN_ID_BYTES 128 /* ncclUniqueId */

/* What a rank adds to SEEN and to its manifest; all ranks lay memory out alike. */
struct ry_twin_side {
    struct ry_load load;     /* of its own communicator's exchange */
    uint64_t packed;         /* what would be left of what it sends to other nodes if equal rows went once, as far as it knows; 0: not known.
                                Not part of `load`, where twins must say the same: they look for rows when they come to it */
    struct ry_digest digest; /* of what it sends to other nodes: */
    uint64_t digested;  /* 1 + the number of that exchange; in a manifest always the one at hand; 0: there is none */
    uint64_t node_comm; /* enum ry_node_state, of the communicator of the ranks at its position */
    struct ry_twin_took { /* exchanges timed here of which nothing was told yet, in any order */
        uint64_t number; /* 1 + it; 0: none */
        uint64_t as;     /* enum ry_strategy: how it went in the end, where each twin did what was best for itself */
        double us;
    } took[RY_TOOK];
    double plain_us; /* the latest duration known of an exchange that plain NCCL carried out, or direct; 0: none yet */
    double messages_us;           /* what agreeing takes this rank, its digest included; 0: not known */
    uint64_t cross, cross_held;   /* as struct ry_side's */
    uint8_t id[RY_TWIN_ID_BYTES]; /* of twin 0's rank at each position: to make that communicator by. Zeros: none */
};

/* What a verdict adds, direct's too. */
struct ry_twin_order {
    uint32_t chunks; /* of the plan */
    uint32_t make;   /* 1: make the communicator of your position, by this id, while the job goes on */
    uint32_t timed;  /* 1: time this exchange */
    uint32_t cross;  /* 1: UCX carries what crosses nodes */
    uint64_t cross_wanted;
    double plain_us; /* what the exchange would take by the twins each for itself, as far as known; 0: not told */
    uint8_t id[RY_TWIN_ID_BYTES];
};

struct ry_twin_config {
    const struct ry_cluster *map; /* of all ranks; must live as long */
    int twins;
    const _Atomic int *forced; /* enum ry_strategy, or -1: choose; may change. RY_REPLICA: whenever the bytes are equal,
                                  whatever it costs; another one: never */
    uint64_t verify;           /* every n-th exchange by replica, 0: never */
    int chunks;                /* of plans; 0: by the model */
    const _Atomic int *transport; /* enum ry_transport; may change. NULL: RY_BY_NCCL */
    struct ry_cost_model model;
    const char *name; /* for RAILYARD_LOG=plan; copied */
};

/** What a rank must hold for UCX to carry its shares of such an exchange. */
uint64_t ry_twin_cross_need(const struct ry_load *load, int twins);

struct ry_twin_chooser; /* opaque */
struct ry_twin_chooser *ry_twin_chooser_new(const struct ry_twin_config *config, struct ry_err *err);
void ry_twin_chooser_free(struct ry_twin_chooser *c);
/** The callbacks, with `c` as their context. Verdicts are RY_REPLICA or RY_DIRECT: everybody for itself. */
struct ry_policy ry_twin_chooser_policy(struct ry_twin_chooser *c);

#endif
