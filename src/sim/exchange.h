/*
 * exchange.h: one MoE layer's exchanges as bytes on links, and how long each strategy takes for them.
 *
 * Owns: counting who sends how many rows to whom, the loads that src/plan's cost model is fed with, and dedup as a byte
 * model. Not: the cost model itself (plan/cost.h): times of plain, hierarchical and balanced are ry_cost_estimate()'s.
 *
 * Dedup and sum are modelled by the parts of hierarchical's estimate, and not by ry_cost_estimate(), which knows less of who
 * relays what and has nothing for sum:
 *   dedup   there (samples' homes → experts: dispatch, and the gradient of combine), where copies of a token are equal.
 *           Rows that cross are read once to find equal ones; each token goes once to each remote node, with 4 bytes of
 *           index for each of its copies, to its rail's relay; that one writes the copies out and passes them on in the
 *           node as hierarchical does. So only the NIC's bytes shrink, and three passes over memory are added. Back
 *           (combine, and the gradient of dispatch) rows differ: the faster of direct and hierarchical.
 *   sum     there as dedup. Back the mirror image: rows of one token are added up in the node before they cross, which
 *           changes rounding (opt-in).
 *
 * Threads: one workspace per thread. Nothing but ry_exchange_new() allocates.
 */
#ifndef RY_SIM_EXCHANGE_H
#define RY_SIM_EXCHANGE_H

#include "plan/cost.h"
#include "sim/workload.h"

enum ry_sim_strategy { RY_SIM_PLAIN, RY_SIM_HIERARCHICAL, RY_SIM_BALANCED, RY_SIM_DEDUP, RY_SIM_SUM, RY_SIM_STRATEGIES };
const char *ry_sim_strategy_name(enum ry_sim_strategy strategy); /* "plain", "hierarchical", "balanced", … */

enum ry_way { RY_THERE, RY_BACK, RY_WAYS }; /* samples' homes → experts, and the other way */

struct ry_exchange; /* workspace */

/** `pairs`: token-level choices are known, else there is no dedup. Memory: 4 bytes for each pair of ranks, and of rank
 * and node. NULL with `err` when out of memory. */
struct ry_exchange *ry_exchange_new(const struct ry_cluster *cluster, bool pairs, struct ry_err *err);
void ry_exchange_free(struct ry_exchange *x);
size_t ry_exchange_memory(const struct ry_cluster *cluster);

/** Count a layer: home[samples] and expert_rank[experts] are ranks. */
void ry_exchange_count(struct ry_exchange *x, const struct ry_workload *workload, int layer, const int *home,
                       const int *expert_rank);

/** The matrix counted, rows from rank to rank, [ranks][ranks]; distinct (token, node) rows, [ranks][nodes], 0 for the
 * own node; rows that a node's experts get, [nodes]. */
const uint32_t *ry_exchange_rows(const struct ry_exchange *x);
const uint32_t *ry_exchange_distinct(const struct ry_exchange *x);
const uint64_t *ry_exchange_node_rows(const struct ry_exchange *x);
/** Rows that cross nodes: copies; and distinct. */
uint64_t ry_exchange_crossing(const struct ry_exchange *x, uint64_t *distinct);
/** The loads of a way as the cost model was last given them by ry_exchange_costs(), which ends with the way back; and
 * what each relays for others. For tests. */
const struct ry_load *ry_exchange_loads(const struct ry_exchange *x, const uint64_t **relayed);

struct ry_exchange_cost {
    double us;                 /* the job waits so long */
    double cross_bytes;        /* between nodes, index lists included */
    double local_bytes;        /* between ranks of one node, what relays pass on included */
    double nic_most, nic_mean; /* bytes of the busiest NIC, either way, and of the mean one */
};

/**
 * What was counted, by each strategy and way, if rows are row_bytes long; dedup and sum only with pairs. Without
 * `rails` a node's ranks share one NIC, with them each rank has its own: for the balance only, the times follow the
 * model.
 */
void ry_exchange_costs(struct ry_exchange *x, const struct ry_cost_model *model, double row_bytes, bool rails,
                       struct ry_exchange_cost out[RY_WAYS][RY_SIM_STRATEGIES]);

#endif
