/*
 * watch.h: telling at once when another process is gone.
 *
 * Owns: one idle TCP connection (a *tie*) between two processes that exchange control messages, and the handshake on it
 * in which they learn each other's number and UCX address. Nothing travels on it afterwards: the kernel of whoever dies
 * closes it, the moment the process dies, and the other side hears of it within a round trip. Not: the messages
 * (control.c).
 *
 * Why this beside UCX, which has error handlers. Seen with 1.13.1: over shared memory UCX leaves it to its keepalive,
 * which looks for /proc/PID, so that a process that was killed counts as alive until its parent has waited for it (a
 * launcher may take seconds), and which means a wake-up per interval in every process; RDMA transports notice when a
 * message was sent again for seconds; TCP hears nothing while a forked child (a data loader) still holds a copy of the
 * socket. Here a child gives up its copies in fork(). A process that is merely stopped keeps its ties: its kernel
 * answers.
 *
 * Threads: none of its own, and no lock: the owner calls everything under one lock of its own, and polls ry_watch_fd().
 * Hooks are called from inside ry_watch_drive() only.
 */
#ifndef RY_CONTROL_WATCH_H
#define RY_CONTROL_WATCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define RY_WATCH_REASON 160

struct ry_watch; /* one per control */
struct ry_tie;

struct ry_watch_hooks {
    void *context;
    /** Process `uid` made a tie to us and calls it `number`; `card` is its UCX address. Returns our number for it, or
     * -1. */
    int64_t (*arrived)(void *context, struct ry_tie *tie, uint64_t uid, uint32_t number, const void *card,
                       size_t card_size);
    /** The process that `mine` was tied to answered: it calls us `theirs`. */
    void (*tied)(void *context, uint32_t mine, uint32_t theirs);
    /** The tie is broken (and freed), or could not be made. */
    void (*gone)(void *context, uint32_t mine, const char *why);
};

/** Listen on all interfaces. `card` (kept by the caller) is what others get to know when we tie to them. */
struct ry_watch *ry_watch_start(const struct ry_watch_hooks *hooks, uint64_t uid, const void *card, size_t card_size,
                                struct ry_err *err);
void ry_watch_stop(struct ry_watch *w);

/** Where to find us, at most RY_WATCH_ADDRESS_MAX bytes; returns the size. */
#define RY_WATCH_ADDRESS_MAX 512
size_t ry_watch_address(const struct ry_watch *w, void *into);
/** The process that an address belongs to; 0 if that is no address. */
uint64_t ry_watch_uid(const void *address, size_t size);

/** Tie to the process at `address` in the background. NULL with `err` if that could not even be tried. */
struct ry_tie *ry_watch_tie(struct ry_watch *w, const void *address, size_t size, uint32_t mine, struct ry_err *err);
/** Break a tie: the other side hears of it; `gone` is not called here. */
void ry_watch_untie(struct ry_watch *w, struct ry_tie *tie);

/** Readable when there is something to do. */
int ry_watch_fd(const struct ry_watch *w);
/** Do it. */
void ry_watch_drive(struct ry_watch *w, uint64_t now_ns);
/** When to drive again at the latest; UINT64_MAX: never. */
uint64_t ry_watch_deadline(const struct ry_watch *w);

/** Is this interface one for talking to other nodes: by NCCL_SOCKET_IFNAME where set, else not those of containers. */
bool ry_watch_wants(const char *interface);

#endif
