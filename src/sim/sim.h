/*
 * sim.h: a job's MoE exchanges on a cluster that need not be here: every placement with every strategy.
 *
 * Owns: going through steps, layers and exchanges, and the sums. Not: routing (workload.h), placing (placing.h), what
 * an exchange costs (exchange.h), printing (tools/railyard/cmd_sim.c).
 *
 * A layer has four exchanges: dispatch (homes → experts), combine (back, to the next layer's homes where samples move),
 * the gradient of combine, which takes combine's way the other way round, and that of dispatch. They do not overlap,
 * and nothing but exchanges is counted.
 */
#ifndef RY_SIM_SIM_H
#define RY_SIM_SIM_H

#include "sim/exchange.h"
#include "sim/placing.h"

enum { RY_DISPATCH, RY_COMBINE, RY_COMBINE_GRAD, RY_DISPATCH_GRAD, RY_EXCHANGES };
const char *ry_sim_exchange_name(int exchange);

struct ry_sim {
    const struct ry_cluster *cluster;
    const struct ry_cost_model *model;
    bool rails;
    struct ry_source source;
    double row_bytes;
    int steps;                 /* simulated, each with samples of its own */
    enum ry_counting counting; /* what homes are chosen by */
    bool placings[RY_PLACINGS];
    void (*progress)(void *context, const char *what, double done); /* 0 to 1; or NULL */
    void *context;
};

struct ry_sim_sums { /* per step: all layers, means over steps */
    double us[RY_EXCHANGES];
    double step_us, layer_us;
    double cross_bytes, local_bytes;
    double nic_imbalance; /* busiest NIC over mean, of bytes summed over exchanges */
};

struct ry_sim_placed {
    bool done;
    char note[400];   /* why it was not done; or what is to be known of it; "" */
    double moved;     /* part of the samples that change ranks after a layer */
    double cross;     /* (token, expert) copies that cross nodes, over those of the first placement done */
    double node_load; /* copies that the busiest node's experts get in a layer, over the mean; mean over layers */
    struct ry_sim_sums by[RY_SIM_STRATEGIES];
};

struct ry_sim_result {
    bool pairs; /* dedup and sum are there */
    int layers, experts, topk, tokens, samples, split, pool, fit, groups;
    double repeats;  /* times that each recorded sample stands in a step; 0: made up */
    double distinct; /* (token, node) pairs that cross over copies that do, of the first placement done */
    double memory;   /* bytes, about */
    struct ry_sim_placed at[RY_PLACINGS];
};

int ry_sim_run(const struct ry_sim *sim, struct ry_sim_result *out, struct ry_err *err);

#endif
