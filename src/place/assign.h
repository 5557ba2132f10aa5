/*
 * assign.h: samples to places (nodes, or the ranks of one node) under capacities, at least total cost.
 *
 * Owns: the exact solver, the simpler ones that it is held against, the limit on moves, and the variant that minimizes
 * the busiest place. Not: where costs come from (problem.h, netmoe.h).
 *
 * The problem is one of transportation with many sources and few sinks: cost[i][p] for sample i at place p, at most
 * capacity[p] samples at p, every sample somewhere. NetMoE solves it as an assignment on the square matrix that has one
 * column per slot; the exact solver here never builds that matrix:
 *
 *   1. Every sample whose cheapest place has room goes there: optimal for these samples. In the graph of places, with
 * an arc a→b of length min over samples i at a of cost[i][b] − cost[i][a], no cycle is negative.
 *   2. Each sample left enters by the shortest path from it over places to any place with room (Dijkstra with
 * potentials, dense), one sample moving along each arc. Shortest paths keep all cycles non-negative, so every step is
 * optimal for its samples.
 *
 * A path costs O(places²) at most and mostly far less, and only a sample that finds its place taken needs one.
 *
 * Costs are whole numbers, |cost| <= RY_ASSIGN_COST_MAX, so that "optimal" is exact; scale fractions up before. All
 * solvers are deterministic. Memory is a workspace's, taken once; solving allocates nothing.
 *
 * Threads: one workspace per thread.
 */
#ifndef RY_PLACE_ASSIGN_H
#define RY_PLACE_ASSIGN_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

#define RY_ASSIGN_COST_MAX (1 << 26) /* so that twice a distance over places fits 32 bits */

enum ry_solver {
    RY_SOLVE_NONE,      /* in order: place 0 is filled up first */
    RY_SOLVE_RANDOM,    /* from the seed */
    RY_SOLVE_GREEDY,    /* in order, each to the cheapest place with room */
    RY_SOLVE_HEURISTIC, /* those that lose most by their second choice first, then swaps of two samples while one pays
                         */
    RY_SOLVE_KUHN_MUNKRES, /* the textbook's O(n³) on the square matrix, n = all slots */
    RY_SOLVE_EXACT,
    RY_SOLVERS
};
const char *
ry_solver_name(enum ry_solver solver); /* "none", "random", "greedy", "heuristic", "kuhn-munkres", "exact" */
int ry_solver_parse(const char *name, enum ry_solver *out, struct ry_err *err);

struct ry_assign; /* a workspace */

/** A workspace for problems up to this size. Kuhn–Munkres needs max_slots² more
 *  numbers, one slot per unit of capacity; 0: without it. */
struct ry_assign *ry_assign_new(int max_samples, int max_places, int max_slots, struct ry_err *err);
void ry_assign_free(struct ry_assign *ws);

struct ry_assign_problem {
    int nsamples, nplaces;
    const int32_t *cost; /* [nsamples][nplaces] */
    const int *capacity; /* [nplaces], >= 0, Σ >= nsamples */
    uint64_t seed;       /* RY_SOLVE_RANDOM only */
};

/** Solve into place[nsamples]; returns the total cost. The problem must fit the workspace and its capacities the
 * samples. */
int64_t ry_assign(struct ry_assign *ws, enum ry_solver solver, const struct ry_assign_problem *problem, int *place);

int64_t ry_assign_cost(const struct ry_assign_problem *problem, const int *place);

/**
 * As RY_SOLVE_EXACT, but at most `max_moved` samples may leave home[nsamples] (which must respect the capacities).
 * Exact where the limit does not bind; else by a price per move, which is best for the number of moves that it makes:
 * `*bound` (may be NULL) is a lower bound on what any solution within the limit costs. In total about 30 solves.
 */
int64_t ry_assign_moving(struct ry_assign *ws, const struct ry_assign_problem *problem, const int *home, int max_moved,
                         int *place, double *bound);

/* Exchanges that ry_assign_busiest() takes apart, at most. */
#define RY_ASSIGN_GROUPS 64

/**
 * Minimize what the busiest place sends or receives rather than the total. affinity[groups][nsamples][nplaces], none
 * negative: in exchange (group) g, sample i sends affinity[g][i][p] rows to place p; with i at q, those of all p but q
 * cross. A place's load in g is the greater of what it sends and receives; the sum over g of the greatest load is
 * minimized, as exchanges come one after the other. `problem->cost` is not looked at. The problem is NP-hard: this is a
 * solution by prices on flows (each of the `iterations` an exact solve) and swaps. `place` must be a solution on entry,
 * and is never made worse; returns the sum of its greatest loads.
 * `*bound` (may be NULL): no solution is below it.
 */
int64_t ry_assign_busiest(struct ry_assign *ws, const struct ry_assign_problem *problem, int groups,
                          const int32_t *affinity, int iterations, int *place, double *bound);
int64_t ry_assign_busiest_load(struct ry_assign *ws, const struct ry_assign_problem *problem, int groups,
                               const int32_t *affinity, const int *place);

#endif
