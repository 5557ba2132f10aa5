/*
 * problem.h: the placement problem: which rank holds which sample, and which rank holds which expert of each layer.
 *
 * Owns: what a problem is made of, the default capacities and maps, and the affinities that every solver starts from.
 * Not: where routing comes from (routing.h), solving (assign.h, netmoe.h, …), what a placement costs in the end
 * (traffic.h).
 *
 * The picture: samples live on ranks (GPUs), ranks on nodes (struct ry_cluster, topo/cluster.h). In each layer a sample
 * sends its tokens from its home to the ranks of the experts chosen (dispatch, NetMoE's "scatter") and gets them back
 * to its home, which may by then be another one (combine, NetMoE's "gather"). What crosses nodes is slow, so it is what
 * is counted.
 *
 * Affinity: a[i][l][m] is what sample i sends to place m (a node or a rank) in layer l. With home h, what crosses is
 * Σ_m a[i][l][m] − a[i][l][h]: minimizing traffic is maximizing the affinity of the homes, under capacities. This holds
 * for both ways of counting: copies    (token, expert): what a plain all-to-all sends, and what NetMoE's paper counts
 *   distinct  (token, place) pairs: what an exchange sends that sends no row twice to one place (dedup). Needs
 * token-level choices.
 *
 * Threads: nothing here has state; a problem is read-only to all who are given it.
 */
#ifndef RY_PLACE_PROBLEM_H
#define RY_PLACE_PROBLEM_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "cluster.h"
#include "place/routing.h"
#include "plan/cost.h"

enum ry_counting { RY_COPIES, RY_DISTINCT };
const char *ry_counting_name(enum ry_counting counting); /* "copies", "distinct" */

enum ry_level { RY_NODES, RY_RANKS };

/* One batch of samples to be placed. All pointers are borrowed and must outlive the problem. */
struct ry_problem {
    const struct ry_cluster *cluster;
    const struct ry_routing *routing;
    int nsamples;
    const int *sample;   /* [nsamples]: which samples of `routing`; NULL: the first nsamples */
    const int *capacity; /* [nranks]: samples that each rank takes at most; may differ, 0 is allowed; Σ >= nsamples */
    const int *expert_rank; /* [layers][experts]: who holds the expert */
    enum ry_counting counting;
    double row_bytes;                  /* of one token copy on the wire */
    const struct ry_cost_model *model; /* α–β of the links, for exchange times; NULL where only traffic matters */
};

/** -1 with `err` naming the field when the problem contradicts itself; every function below relies on it holding. */
int ry_problem_check(const struct ry_problem *problem, struct ry_err *err);

static inline int ry_problem_sample(const struct ry_problem *p, int i)
{
    return p->sample ? p->sample[i] : i;
}

/** A cluster of `nnodes` equal nodes, ranks numbered node by node, for planning without a job. Freed by
 * ry_cluster_free(). */
struct ry_cluster *ry_place_cluster(int nnodes, int ranks_per_node, double nvlink_gbs, double nic_gbs,
                                    struct ry_err *err);

/** Capacities that hold exactly `nsamples`, as even as can be; the ranks with one more are spread over the nodes. */
void ry_capacity_even(int *capacity, int nranks, int nsamples);

/** Samples dealt out in order: rank 0 is filled up first, then rank 1, … The baseline. home[nsamples]: ranks. */
void ry_home_in_order(int *home, const int *capacity, int nranks, int nsamples);

/** Experts in contiguous blocks of equal size, the same in every layer. -1 with `err` if nranks does not divide
 * `experts`. */
int ry_experts_contiguous(int *expert_rank, int layers, int experts, int nranks, struct ry_err *err);

/** Places at a level: nodes or ranks. */
int ry_places(const struct ry_cluster *cluster, enum ry_level level);

/** a[layer of `layers`][place]: affinities of the problem's i-th sample; out is [layers][places], overwritten. O(layers
 * · experts) for copies, O(layers · tokens · k) for distinct. */
void ry_affinity(const struct ry_problem *problem, enum ry_level level, int i, uint32_t *out);

/** The same of one layer: out[place]. */
void ry_affinity_layer(const struct ry_problem *problem, enum ry_level level, int i, int layer, uint32_t *out);

/** The same for an arbitrary sample `s` of a routing under a map [layers][experts] → place, of `places` many. */
void ry_affinity_by(const struct ry_routing *routing, int s, const int *expert_place, int places,
                    enum ry_counting counting, uint32_t *out);

#endif
