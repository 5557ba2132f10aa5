/*
 * rendezvous.h: the ranks of a communicator swap a small record each, without the job noticing, and all get one more from
 * rank 0.
 *
 * Owns: the ticket that tells where to meet, and the one thread that hosts and attends meetings over TCP. Not: what is
 * swapped, nor what is done with it.
 *
 * Why not an all-gather on the new communicator itself: a rank without Railyard (not preloaded there, disabled, or its
 * engine failed) would meet that all-gather with its own first collective, and the job would hang or mix data; a
 * non-blocking or grouped communicator is not ready yet; and it would make NCCL connect and allocate on communicators that
 * the job may never use. Instead the process that calls ncclGetUniqueId hosts the meeting, and writes its address into the
 * part of the 128-byte id that NCCL leaves zero (its handle takes 48 bytes at most in 2.18 to 2.30). Whoever was given
 * the id knows where to go; children of a communicator meet where their parent did, under a key of their own. A rank that
 * never comes costs nothing but its name in a message: nobody waits but our own thread.
 *
 * Security: as NCCL's own bootstrap, anybody on the network who knows the port and the 128-bit cookie can attend.
 */
#ifndef RY_CONTROL_RENDEZVOUS_H
#define RY_CONTROL_RENDEZVOUS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "base/error.h"

struct ry_rendezvous; /* one per process */

/* Where to meet. Travels in the tail of a unique id; fixed layout, all zero where nobody hosts. */
struct ry_ticket {
    char magic[8]; /* "RAILYARD" */
    uint8_t version;
    uint8_t family; /* 4 or 6 */
    uint16_t port;  /* network order, as are all numbers here */
    uint32_t scope; /* IPv6 scope id, host order of the local machine */
    uint8_t address[16];
    uint8_t cookie[16];
};
#define RY_TICKET_VERSION 2
bool ry_ticket_valid(const struct ry_ticket *ticket);

/** Start the thread. NULL with `err` on failure. */
struct ry_rendezvous *ry_rendezvous_start(struct ry_err *err);

/**
 * Be the host, at `address` (the port is chosen), and describe it in `ticket`. Later calls give the first one's ticket.
 */
int ry_rendezvous_host(struct ry_rendezvous *rv, const struct sockaddr *address, struct ry_ticket *ticket,
                       struct ry_err *err);

/**
 * How a meeting ended. all != NULL: `size` bytes from each rank, in rank order, owned by the caller of this callback, and the
 * `extra_size` bytes that rank 0 brought besides (`extra` is NULL if none; aligned for any type). NULL: `why` says which
 * ranks are missing or what failed. Called once, on the rendezvous thread.
 */
typedef void (*ry_rendezvous_done)(void *context, const void *all, const void *extra, size_t extra_size, const char *why);

/**
 * Meet the `nranks` ranks that use the same `ticket` and `key`, bringing `size` bytes (equal on all ranks, copied), waiting at
 * most `seconds`. Rank 0's `extra` (of any size up to RY_RENDEZVOUS_EXTRA_MAX, copied) goes to everybody, so that an address
 * that only rank 0's matters of is not sent once per rank to each; other ranks' is not even sent. Returns at once; -1 with `err` if that could not even be tried (`done` is then not called).
 */
int ry_rendezvous_attend(struct ry_rendezvous *rv, const struct ry_ticket *ticket, uint64_t key, int nranks, int rank,
                         const void *bytes, size_t size, const void *extra, size_t extra_size, double seconds,
                         ry_rendezvous_done done, void *context, struct ry_err *err);
#define RY_RENDEZVOUS_EXTRA_MAX (64u << 10)

/** Forget the meetings of `context`: when this returns, its `done` is not running and will not be called. */
void ry_rendezvous_cancel(struct ry_rendezvous *rv, void *context);

/** End all meetings and the thread. */
void ry_rendezvous_stop(struct ry_rendezvous *rv);

#endif
