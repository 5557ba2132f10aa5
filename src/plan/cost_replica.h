/*
 * cost_replica.h: what an exchange of twin communicators takes by `replica` (plan.h).
 *
 * Owns: that formula, which belongs to no single communicator and so is not among cost.h's. Not: the model's links, nor
 * what the same exchanges take otherwise: ry_cost_estimate() of the map of all twins, which then knows that they share
 * their nodes' NICs. No I/O.
 */
#ifndef RY_PLAN_COST_REPLICA_H
#define RY_PLAN_COST_REPLICA_H

#include "cost.h"

/**
 * Microseconds of `replicas` twins at once, agreement included; *chunks: how many are the fastest, of 1, 2 and
 * RY_CHUNKS. `cluster` has the ranks of all twins, loads[k] (of one twin, nranks / replicas of them) is what rank k of
 * each has to do. Shares are passed on over communicators of their own, as the links NODE. O(ranks of a twin); INFINITY
 * where nothing crosses.
 */
double ry_cost_replica(const struct ry_cost_model *model, const struct ry_cluster *cluster, int replicas,
                       const struct ry_load *loads, int *chunks);

#endif
