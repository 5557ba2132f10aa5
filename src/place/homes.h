/*
 * homes.h: from what each sample sends where to which rank is its home, in two stages: samples to nodes, as what
 * crosses nodes is slow, then each node's samples to its ranks.
 *
 * Owns: the two stages, for a batch at a time; costs as the solvers take them. Not: what the affinities are made of
 * (netmoe.h: of two layers' exchanges; summed over all layers: one home per sample and batch), nor solving (assign.h).
 *
 * Threads: one workspace per thread. Nothing but ry_homes_new() allocates.
 */
#ifndef RY_PLACE_HOMES_H
#define RY_PLACE_HOMES_H

#include "place/assign.h"
#include "place/problem.h"

struct ry_homes_options {
    enum ry_solver solver; /* RY_SOLVE_NONE: samples stay where they are */
    int max_moved;         /* samples that may change nodes; < 0: any number. Exact solver only */
    bool busiest;          /* minimize the busiest NIC rather than the sum. Exact solver only, and not with max_moved */
    uint64_t seed;         /* of the random solver */
};

struct ry_homes;

/** For batches of up to `max_samples`, in up to max_groups <= RY_ASSIGN_GROUPS groups. Kuhn–Munkres needs max_slots >=
 * Σ capacities, else it is 0. */
struct ry_homes *ry_homes_new(const struct ry_cluster *cluster, int max_samples, int max_groups, int max_slots,
                              struct ry_err *err);
void ry_homes_free(struct ry_homes *homes);

/**
 * nodes[groups][nsamples][nnodes], ranks[nsamples][nranks]: rows that a sample exchanges with each place, none
 * negative; ranks are sums over the groups. Groups are exchanges that come one after the other: only `busiest` tells
 * them apart. from[nsamples]: homes so far, which respect capacity[nranks]; to[nsamples]: homes chosen, may be the same
 * array.
 */
void ry_homes_solve(struct ry_homes *homes, const struct ry_homes_options *options, int nsamples, const int *capacity,
                    int groups, const float *nodes, const float *ranks, const int *from, int *to);

/** Groups for one home in all layers: the layers, or a part of them together if there are more than ry_homes_solve()
 * takes. */
int ry_homes_groups(int layers);
/** Affinities of a batch for that: nodes[ry_homes_groups()][nsamples][nnodes], ranks[nsamples][nranks]. */
int ry_homes_affinities(const struct ry_problem *problem, float *nodes, float *ranks, struct ry_err *err);

/** Microseconds of the first stage's solver alone, all calls so far, and how many those were. */
double ry_homes_solver_us(const struct ry_homes *homes, uint64_t *calls);

#endif
