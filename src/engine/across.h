/*
 * across.h: the ranks of one communicator come to know each other over UCX, so that it can carry what crosses nodes.
 *
 * Owns: which pairs of ranks do, how their addresses get around (over a line of the control plane, the yardmaster in
 * the middle), telling the carrier who is lost, and what is said, and done, where transfers fail. Not: the transfers
 * (ucx/carrier.h), when they go that way (the yardmaster: policy.h).
 *
 * Thread-safety: as ucx/carrier.h has it.
 */
#ifndef RY_ENGINE_ACROSS_H
#define RY_ENGINE_ACROSS_H

#include "cluster.h"
#include "policy.h"
#include "ucx/carrier.h"

struct comm;
struct ry_across;

/** RAILYARD_TRANSPORT, which is nccl where it is none of those that are known: said. */
enum ry_transport ry_transport_read(const char *value, bool *staged);

/** For a communicator whose ranks have met; `address`: its yardmaster's, on all ranks. NULL: it stays with NCCL, as it
 * was told, or as a line says. */
struct ry_across *ry_across_open(struct comm *c, const struct ry_cluster *map, const void *address, size_t size);
/** What this rank's manifests say. NULL is fine: it cannot. */
enum ry_cross_state ry_across_state(const struct ry_across *a);
uint64_t ry_across_held(const struct ry_across *a);
void ry_across_want(struct ry_across *a, uint64_t bytes);
/** For exchange `number`, where all agreed on it. */
struct ry_cross *ry_across_face(struct ry_across *a, uint64_t number);
/** Bytes that this rank has sent so, all in all. */
uint64_t ry_across_sent(const struct ry_across *a);
/** The job aborts the communicator; any thread. NULL is fine. */
void ry_across_abort(struct ry_across *a);
/** `leak`: the process ends. NULL is fine. */
void ry_across_close(struct ry_across *a, bool leak);

#endif
