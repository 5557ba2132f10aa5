/*
 * local.h: how much of a communicator's traffic stays on its rank and on its node, by direction and over time.
 *
 * Owns: gathering it from exchange lines. Not: reading those (trace.c), the distance (base/kl.h), wording (tools).
 *
 * Time is counted in exchanges, in which ranks agree: RY_LOCAL_BINS bins of equal width, a power of two that grows with
 * the communicator. Memory is bounded: matrices of nodes are kept for up to RY_LOCAL_NODES nodes only.
 */
#ifndef RY_RECORD_LOCAL_H
#define RY_RECORD_LOCAL_H

#include <stdbool.h>
#include <stdint.h>

#define RY_LOCAL_BINS 32
#define RY_LOCAL_WAYS 3 /* "go", "return", and "" where the direction is not known */
#define RY_LOCAL_NODES 64

struct ry_local_bin {
    uint64_t lines, self, in_node, cross, unknown; /* bytes sent; unknown: to ranks of which the node is not known */
    uint64_t *nodes;                               /* [n * n], from x to; NULL where nothing is kept */
};

struct ry_trace_local {
    uint64_t width; /* exchanges in a bin; 0: nothing yet */
    int nways;
    struct {
        char name[8];
        struct ry_local_bin bin[RY_LOCAL_BINS];
    } way[RY_LOCAL_WAYS];
};

/** One rank's side of exchange `number`: bytes[nranks] that it sent; node[r] -1 where not known. */
void ry_local_add(struct ry_trace_local *local, const char *way, uint64_t number, int rank, int nranks, const int *node,
                  int nnodes, const uint64_t *count, uint64_t type_bytes);
void ry_local_free(struct ry_trace_local *local);

/** Bins [from, to) of a direction together; sum->nodes is the caller's array of nnodes * nnodes, or NULL. False: no
 * matrix. */
bool ry_local_sum(const struct ry_trace_local *local, int way, int from, int to, int nnodes, struct ry_local_bin *sum);

#endif
