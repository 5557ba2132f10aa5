/*
 * traffic.h: what a placement puts on the links: rows that cross nodes, the busiest NIC, and the model's exchange time.
 *
 * Owns: the count of one batch's exchanges. Not: choosing the placement.
 *
 * Each layer has two exchanges: dispatch from the samples' homes to the experts, combine back to homes that may be
 * others by then. A row crosses if home and expert are on different nodes, is in-node if on different ranks of one
 * node. Counted as the problem says: copies, or distinct (token, node) pairs across and (token, rank) pairs within the
 * home's node. The time of an exchange is NetMoE's max(t_intra, t_inter), t_x = α_x + s_x / v_x with s_x the bytes of
 * the busiest rank (intra) or node (inter), either way; 0 where nothing is sent.
 */
#ifndef RY_PLACE_TRAFFIC_H
#define RY_PLACE_TRAFFIC_H

#include "place/problem.h"

struct ry_traffic {
    uint64_t rows;        /* all, both exchanges of all layers */
    uint64_t cross;       /* of these, across nodes */
    uint64_t in_node;     /* between ranks of one node */
    uint64_t busiest_nic; /* Σ over exchanges of the busiest node's rows, the greater of out and in */
    uint64_t even_nic;    /* the same if all nodes were equally busy: busiest / even is the imbalance */
    uint64_t moved;       /* samples that changed ranks between two exchanges, all layers */
    double us;            /* Σ over exchanges of the model's time; 0 without a model */
};

/**
 * Add the batch's traffic to `sum` (zeroed by the caller before the first). home[l * stride + i] is the rank of the
 * i-th sample in layer l's dispatch, home[(l + 1) * stride + i] in its combine: stride is nsamples for (layers + 1)
 * different homes, 0 for one home in all layers. -1 when out of memory.
 */
int ry_traffic_add(struct ry_traffic *sum, const struct ry_problem *problem, const int *home, size_t stride,
                   struct ry_err *err);

#endif
