/*
 * control.h: messages between the ranks' engines, over UCX.
 *
 * Owns: the process's one UCX worker and its one progress thread, endpoints made on demand, active messages in host memory,
 * timers, and telling when a peer is lost. Not: what is said (agree.h), how addresses get around (the rendezvous), which
 * transport is used: UCX picks shared memory, TCP or RDMA itself, and needs no GPU support.
 *
 * A *line* is one communicator's part of it. The ranks of a communicator talk in a star: every rank to and from the
 * yardmaster (rank 0), whose address all ranks learn when they swap seats. The yardmaster needs nobody's address: it
 * answers on the endpoint that a rank's first message came over. Messages between a pair arrive in order, once, or the
 * line is lost. A rank's messages to itself are delivered by the progress thread as well.
 *
 * The worker sleeps (ucp_worker_arm, ppoll) when there is nothing to do: no core is burnt. A thread that waits for an
 * answer may lend a hand with ry_control_poll(), which saves two context switches per message: while somebody does, the progress
 * thread stays out of the way, for half a millisecond after the last call.
 *
 * Loss. A peer is lost when its process ends, however that happens, when its node does not answer for half a minute, or when
 * UCX gives up on it. The first is not left to UCX but to an idle TCP connection between the two processes (watch.h says why), whose
 * end is seen within milliseconds over every transport, also of a process that nobody has waited for yet, or whose forked
 * children live on. A process that is stopped (SIGSTOP) is not lost. A rank that closes its line is lost to the yardmaster
 * ("has left"), and so is the yardmaster to the others when it closes its.
 *
 * As a guest: tame.h says what is done about UCX's signal handlers, log and memory hooks. Whoever opens the library that links
 * this does so by load.h. In a forked child nothing here may be used; the parent's is not harmed.
 *
 * Thread-safety: everything may be called from any thread, also from inside callbacks, except ry_control_stop() and
 * ry_line_close(), which must not be called from callbacks. Callbacks run on the progress thread or inside ry_control_poll(),
 * never two at once for one line, without any lock of ours. They may begin before ry_line_open() has returned.
 */
#ifndef RY_CONTROL_CONTROL_H
#define RY_CONTROL_CONTROL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct ry_control; /* one per process */
struct ry_line;    /* one per communicator and rank of this process */

/** Start the worker and its thread. NULL with `err` when UCX cannot be used. UCX's own settings (UCX_*) apply. */
struct ry_control *ry_control_start(struct ry_err *err);
/** Ends the thread and closes everything; lines must be closed before. */
void ry_control_stop(struct ry_control *control);
/** The same at the end of the process: the thread ends, UCX is left as it is. Taking it down while peers do the same, or while
 *  connections are being made, ends in assertions of UCX 1.13.1, and so in the job's abort. */
void ry_control_abandon(struct ry_control *control);

/** The worker's address, to be handed to others (some hundred bytes, more with RDMA): owned by `control`. */
const void *ry_control_address(const struct ry_control *control, size_t *size);

extern const char ry_line_left[];

struct ry_line_handlers {
    void *context;
    void (*message)(void *context, int from, const void *bytes, size_t size); /* `bytes` valid during the call */
    /** Rank `peer` (on other ranks than the yardmaster: the yardmaster) cannot be reached any more; `why` is ry_line_left if it closed
     *  its line in good order. Called once per peer. */
    void (*lost)(void *context, int peer, const char *why);
    /** The time asked for by ry_line_wake_at() has come. */
    void (*timer)(void *context, uint64_t now_ns);
};

/**
 * Join the line `key` (equal on all ranks, unique in the job) as `rank` of `nranks`. On rank 0, the yardmaster, `address` is
 * ignored; on others it is the yardmaster's, and the connection is made now, in the background. Messages that came
 * before the line was opened here are kept (for a minute, 64 MiB in all; beyond that the senders are told that the
 * rank is lost) and delivered.
 */
struct ry_line *ry_line_open(struct ry_control *control, uint64_t key, int nranks, int rank, const void *address,
                             size_t address_size, const struct ry_line_handlers *handlers, struct ry_err *err);
/** Messages sent before are still flushed for up to 100 ms; when this returns, no callback runs or will run. No other thread may
 *  use the line meanwhile. */
void ry_line_close(struct ry_line *line);
/** The same where the others close theirs, too, and their processes may be ending: says so only where there is a connection. To make one
 *  to a peer that is going makes UCX 1.13.1 assert. */
void ry_line_close_with_all(struct ry_line *line);

/** Send to rank `to` (the yardmaster to anybody who has spoken to it; others only to the yardmaster). Copies; never blocks.
 *  To a peer that is lost, or has not spoken yet: nothing. */
void ry_line_send(struct ry_line *line, int to, const void *bytes, size_t size);
/** Call `timer` at `ns` (ry_now_ns()'s clock); replaces the time asked for before; UINT64_MAX: never. */
void ry_line_wake_at(struct ry_line *line, uint64_t ns);
/** Drive the worker from this thread for a moment: true if something happened. For a thread that waits. */
bool ry_control_poll(struct ry_control *control);
/** That thread stops driving it, and waits in another way: the progress thread, which rests while others drive, takes over at
 *  once. */
void ry_control_rest(struct ry_control *control);

#endif
