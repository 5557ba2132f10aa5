/*
 * cost.h: how long an exchange takes by each strategy, and which is the fastest.
 *
 * Owns: the α–β model (Hockney: t = α + bytes / β) per link class, with costs per message and per plan; what it is fed with
 * (loads); choosing; saying why; learning from measured durations. Not: measuring links (railyard calibrate), where the
 * figures are stored (cost_file.h). No I/O, no clock.
 *
 * Times are microseconds, bandwidths bytes per microsecond (= MB/s), one direction.
 */
#ifndef RY_PLAN_COST_H
#define RY_PLAN_COST_H

#include "plan.h"

enum ry_link { RY_LINK_SELF, RY_LINK_LOCAL, RY_LINK_NIC, RY_LINKS };
const char *ry_link_name(enum ry_link link); /* "self", "local", "nic" */

struct ry_cost_model {
    struct {
        double alpha_us;    /* of one transfer over an idle link, beyond `message_us` */
        double bytes_per_us; /* SELF, LOCAL: one rank's, each way. NIC: shared by the ranks of a node, each way */
        double message_us;  /* each further message of the same group, per rank */
    } link[RY_LINKS];
    double group_us;     /* of each NCCL group (a kernel launch) */
    double agreement_us; /* manifest to verdict, as far as the exchange has to wait for it; direct pays it too once engaged */
    double plan_us_per_rank; /* building a plan: times nranks */
    bool measured;       /* by railyard calibrate, rather than guessed from the topology */
};

/** A guess from what the seats say (NVLink and NIC bandwidth), conservative where they say nothing. */
void ry_cost_guess(struct ry_cost_model *model, const struct ry_cluster *cluster);

/* What one rank's side of an exchange puts on the links: computed by each rank from its own row and column, O(nranks). */
struct ry_load {
    uint64_t self;
    uint64_t local_out, local_in, cross_out, cross_in;          /* bytes */
    uint32_t local_sends, local_recvs, cross_sends, cross_recvs; /* messages of direct that carry bytes */
    uint32_t nodes_out, nodes_in; /* remote nodes that it sends anything to, gets anything from */
};
void ry_load_of(struct ry_load *load, const struct ry_cluster *cluster, int rank, const uint64_t *send, const uint64_t *recv);

/**
 * Estimate `strategy` for an exchange in which rank r has loads[r]. `relayed[r]` (may be NULL: assumed even among the
 * node's ranks) is what r relays for others, in bytes. With `engaged` the agreement is added.
 */
double ry_cost_estimate(const struct ry_cost_model *model, const struct ry_cluster *cluster, const struct ry_load *loads,
                        const uint64_t *relayed, enum ry_strategy strategy);

/** The same from the steps themselves: all ranks' plans. For simulation and for tests of the estimate. */
double ry_cost_plans(const struct ry_cost_model *model, const struct ry_cluster *cluster, struct ry_plan *const *plans);

/* Learned while running, by the yardmaster: measured over estimated, per strategy and size class (power of two of the
   busiest rank's bytes). */
struct ry_cost_learned {
    struct {
        double log_ratio;  /* running mean */
        uint32_t samples;
    } at[RY_STRATEGIES][64];
};
void ry_cost_learn(struct ry_cost_learned *learned, enum ry_strategy strategy, uint64_t busiest_bytes, double estimated_us,
                   double measured_us);
uint64_t ry_cost_busiest(const struct ry_cluster *cluster, const struct ry_load *loads);

struct ry_choice {
    enum ry_strategy strategy;
    double us[RY_STRATEGIES]; /* corrected estimates */
    char why[160];            /* "hierarchical 310 us, direct 420 us: NIC of node 1 sends 24 MiB in 6 instead of 12 messages" */
};
/** The fastest; direct unless another is at least `margin` (0.05: 5 %) faster, `learned` may be NULL. */
void ry_cost_choose(struct ry_choice *choice, const struct ry_cost_model *model, const struct ry_cost_learned *learned,
                    const struct ry_cluster *cluster, const struct ry_load *loads, const uint64_t *relayed, double margin);

#endif
