/*
 * birkhoff.h: a matrix between nodes cut into stages, in each of which a node sends to at most one node and gets from
 * at most one.
 *
 * Owns: which node sends how many bytes to which in which stage. Not: ranks, steps (balanced.c), what a stage costs
 * (cost.h).
 *
 * Birkhoff and von Neumann: a matrix whose rows and columns all have the same sum L is a sum of weighted permutations,
 * whose weights add up to L; and any matrix becomes such a one by adding idle time, L being its largest row or column
 * sum. So stages one after the other need not take longer than the busiest node must, whatever the others do. Exact
 * decompositions are of up to n² - 2n + 2 stages, the last of which are short, and each costs its latency. So (1) all
 * nodes get a 32nd more time than the busiest one needs, which lets stages be longer; (2) each stage is the longest
 * that there is, roughly: a perfect matching by the least time that pairs could go on, found again from the one before;
 * and (3) after n stages (n / 2 of more than 64 nodes) pairs send all that they have left, the longest first, which is
 * in less than 2n more.
 *
 * Deterministic: integers only. Thread-safety: a function of its arguments.
 */
#ifndef RY_PLAN_BIRKHOFF_H
#define RY_PLAN_BIRKHOFF_H

#include <stdint.h>

#include "base/error.h"

struct ry_stages {
    int nnodes, count;
    struct ry_stage {
        int to;         /* -1: idle */
        uint64_t bytes; /* > 0 unless idle */
    } * at;             /* [count][nnodes]: what each node sends */
};
/** The most stages that there can be of n nodes. */
int ry_stages_most(int nnodes);
/** Of matrix[from * nnodes + to], whose diagonal is ignored. -1 when out of memory, or if a sum takes more than 62
 * bits. */
int ry_stages_find(struct ry_stages *out, int nnodes, const uint64_t *matrix, struct ry_err *err);
void ry_stages_free(struct ry_stages *stages);

#endif
