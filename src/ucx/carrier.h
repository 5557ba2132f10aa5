/*
 * carrier.h: transfers between nodes over UCX, beside NCCL (docs/ucx-transport.md).
 *
 * Owns: the process's UCX worker for data and the one thread that drives it (the hub); for each communicator its
 * endpoints, its staging memory, and the carrier that a plan's steps are handed to (run/cross.h). Not: who meets whom
 * and when that may be used (engine/across.c), control messages, which have a worker of their own (control/).
 *
 * Staged, a transfer goes through pinned host memory in chunks:
 *     the stream    [copy out, READY = k] ... [wait for DONE >= d, copy in] ... [wait for DONE >= the last]
 *     the thread    polls READY, sends what is there, receives; writes DONE as far as all before has come
 * and the thread makes no call of CUDA's, so that nothing the job does there can hold it up. Direct, UCX reads and
 * writes the job's memory itself; the stream only says when and waits. That is for host memory, and for GPUs where UCX
 * says that it can.
 *
 * A stream is let go when the bytes are there, or when the communicator was aborted, and for no other reason.
 *
 * Thread-safety: what belongs to the exchanges of a communicator by one thread at a time; the rest as said.
 */
#ifndef RY_UCX_CARRIER_H
#define RY_UCX_CARRIER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "device/device.h"
#include "run/cross.h"

/* ---- the process's ---- */

struct ry_hub;
/** `ordinal`: the device that UCX shall see if `direct`, i.e. if device memory is wanted. NULL with `err`: no UCX. */
struct ry_hub *ry_hub_start(const struct ry_device *device, int ordinal, bool direct, struct ry_err *err);
/** At the end of the process: a moment for what is under way, then the thread ends; UCX is left as it is (control.h
 * says why). */
void ry_hub_abandon(struct ry_hub *hub);

/* ---- a communicator's ---- */

enum ry_cross_state { RY_CROSS_CANNOT, RY_CROSS_COULD, RY_CROSS_HAS }; /* COULD: has not heard of all its peers yet */

struct ry_carrier_config {
    struct ry_hub *hub;
    const struct ry_device *device;
    int ordinal;
    int nranks, rank;
    const bool *with; /* [nranks]: the ranks that it exchanges data with; copied */
    bool staged;      /* even where UCX can reach the device's memory */
    double patience;  /* seconds */
    const char *name; /* of the communicator, for what is said; copied */
    /** On the hub's thread, which must not be kept waiting. Transfers of exchange `number` will never end, as rank
     * `peer` is lost (-1: for another reason). Not told where the job's call itself can still fail (host memory). */
    void (*failed)(void *context, uint64_t number, int peer, const char *why);
    /** The same, `patience` later, and nobody has aborted the communicator. */
    void (*hopeless)(void *context, uint64_t number);
    void *context;
};
struct ry_carrier;
/** May wait for the device, whose streams must be able to wait for a word. NULL with `err`. */
struct ry_carrier *ry_carrier_new(const struct ry_carrier_config *config, struct ry_err *err);
/** How others reach this rank: owned by the carrier. */
const void *ry_carrier_card(const struct ry_carrier *c, size_t *size);
/** Rank `rank`'s card (copied). When all peers' have come, they are connected and greeted, in the background. Any
 * thread. -1 with `err` for a card that is none. */
int ry_carrier_meet(struct ry_carrier *c, int rank, const void *card, size_t size, struct ry_err *err);
/** Rank `rank` has gone: what is under way with it fails. Any thread. */
void ry_carrier_lost(struct ry_carrier *c, int rank, const char *why);
/** Any thread. CANNOT is for ever. NULL: CANNOT. */
enum ry_cross_state ry_carrier_state(const struct ry_carrier *c);

/** Staging memory of one exchange: what it holds, UINT64_MAX if it needs none; and what it is to hold, sooner or later
 * (taken by a thread of its own, as that may wait for the device). */
uint64_t ry_carrier_held(const struct ry_carrier *c);
void ry_carrier_want(struct ry_carrier *c, uint64_t bytes);
/** The most that transfers of so many bytes, in so many messages, take of it. */
static inline uint64_t ry_carrier_need(uint64_t bytes, uint64_t messages)
{
    return bytes + 256 * messages;
}

struct ry_cross *ry_carrier_face(struct ry_carrier *c);
/** Bytes given to be sent, all in all. By the thread that begins exchanges. */
uint64_t ry_carrier_sent(const struct ry_carrier *c);

/** The job aborts the communicator: streams are let go, nothing waits for this any more. Any thread. NULL is fine. */
void ry_carrier_abort(struct ry_carrier *c);
/** The communicator ends; what streams still do with it may end later. `leak`: the process ends. NULL is fine. */
void ry_carrier_end(struct ry_carrier *c, bool leak);

#endif
