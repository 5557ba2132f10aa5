/*
 * cost_parts.h: what an estimate is made of, so that a choice can say why. Shared by cost.c, choose.c and the simulator (src/sim) only.
 */
#ifndef RY_PLAN_COST_PARTS_H
#define RY_PLAN_COST_PARTS_H

#include "cost.h"

#define RY_STAGES_US 0.004 /* finding the stages of `balanced`, by the cube of the nodes: seen 8 ms at 128 */

/* Microseconds. Links of the first group work side by side; all else follows one after the other. */
struct ry_cost_parts {
    double total, groups, self, local, nic, copies, forward, overhead;
    double search;  /* for equal rows; copies: packing them and writing them out as well, */
    double written; /* of which this is the latter */
    double hidden;  /* what chunks save of all that; groups: of all of them */
    int chunks;     /* 1 or more */
    double spread;  /* balanced: inside the nodes, before the stages; */
    double stages;  /* of which there are about so many */
    /* the busiest NIC: bytes in that direction, messages of its rank that has most; -1 where nothing crosses */
    int nic_node;
    bool nic_in;
    uint64_t nic_bytes, nic_messages;
    /* the node that takes longest to pass on what came, and its busiest rank's bytes; -1 where nothing is passed on */
    int forward_node;
    uint64_t forward_bytes;
};

/** All strategies' estimates: see ry_cost_estimate(). At once, since they need the same sums.
 *  Returns ry_cost_busiest(). */
uint64_t ry_cost_parts_of(struct ry_cost_parts parts[RY_STRATEGIES], const struct ry_cost_model *model,
                          const struct ry_cluster *cluster, const struct ry_load *loads, const struct ry_cost_matrix *matrix);

#endif
