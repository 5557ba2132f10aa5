/*
 * railyard.h: what a program may tell Railyard. Nothing needs to be told: a job runs under Railyard without a change.
 *
 * These functions are in librailyard.so, which is preloaded, not linked. They are declared weak, so that a program that
 * calls them also runs without Railyard: test the address first.
 *
 *     if (railyard_pause)
 *         railyard_pause(1);
 */
#ifndef RAILYARD_H
#define RAILYARD_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/**
 * Only some steps are to be observed, as with cudaProfilerStart and cudaProfilerStop: while `on` is not 0 exchanges and
 * all-gathers of this process pass without being recorded, timed or learned from. They are still counted. Returns what
 * was set before; 0 at the start. It does not nest: one railyard_pause(0) ends it.
 *
 * All ranks must call it between the same exchanges. Exchanges of a communicator that Railyard is engaged on go to NCCL as
 * they are, too; the other ranks are told that this one takes no part in them. Thread-safe; counts for all threads.
 */
int railyard_pause(int on) __attribute__((weak));

/**
 * From the next exchange on, what RAILYARD_STRATEGY=name would have said at the start ("auto", "direct", "hierarchical"), for
 * programs that compare strategies. "name/ucx" and "name/nccl": the same with what crosses nodes carried by one or the other, where
 * RAILYARD_TRANSPORT is not nccl; without either, as that says. Rank 0 of a communicator decides for all its ranks, so it counts for those communicators whose
 * rank 0 is in this process, and matters while exchanges are being agreed on. 0; -1 for an unknown name, or where there is
 * nothing to reissue (no communicator yet, RAILYARD_STRATEGY=observe). Thread-safe.
 */
int railyard_strategy(const char *name) __attribute__((weak));

/*
 * Redirected exchanges: the rows of one exchange go to other ranks, and to other positions there, than its caller says,
 * who sends and receives as ever and need not know. docs/live-placement.md, "Inside the combine", is what for.
 *
 * All ranks of the communicator redirect the same exchange, or nobody does: to see to that is the caller's, and what can
 * keep a rank from it, it learns beforehand from railyard_redirect_ready(), which it can tell the others. After that
 * nobody can back down. By the thread that issues the exchange, or one after the other.
 */

/** How many exchanges the calling thread has issued so far, and, for who has no handle of its own, the communicator (ncclComm_t) of
 *  the latest, its ranks, and which of them this is. *comm is NULL if there was none, or it is not followed. */
uint64_t railyard_latest_exchange(const void **comm, int32_t *nranks, int32_t *rank) __attribute__((weak));

/**
 * Can exchanges of `comm` be redirected here, with up to `bytes` bytes and `rows` rows each way, sent, received, and in the
 * buffers? Holds the memory for it (twice the bytes, from RAILYARD_STAGING), in order of `stream`, from where it is used by any.
 * Never waits. 0; 1 if not (Railyard is not engaged between these ranks, RAILYARD_STRATEGY=observe, RAILYARD_HOLD=no, paused, no
 * memory, …). What was answered with 0 holds for the exchanges up to the communicator's end.
 */
int railyard_redirect_ready(const void *comm, uint64_t bytes, uint64_t rows, void *stream) __attribute__((weak));

struct railyard_redirect {
    uint32_t size;   /* sizeof of this structure as the caller knows it */
    int32_t nranks;  /* of the communicator */
    uint64_t row_bytes;
    /* [nranks] each, copied. Rows that the exchange's calls send to each rank and receive from it, by which it is known */
    const uint64_t *sends, *receives;
    /* The rows that shall be sent to each rank, and that will come from it */
    const uint64_t *goes, *comes;
    /* Lists on the device, to stay there until the exchange is over; what made them must be before the exchange in stream order.
     * Entry i of send_from: which row of the exchange's send segments, taken in ascending rank, is the i-th that is sent (in
     * ascending destination, [sum of goes]). Of recv_from: which of the rows that come (in ascending source) is put into row i of
     * the receive segments, taken in ascending rank ([sum of receives]). */
    const uint32_t *send_from, *recv_from;
};

/** The next exchange on `comm` is redirected so. If it turns out to be another one than said, or cannot be redirected after all,
 *  it fails. 0; -1: the numbers contradict themselves or were not asked for by railyard_redirect_ready(). */
int railyard_redirect(const void *comm, const struct railyard_redirect *how) __attribute__((weak));

/** After that exchange: 0 if it was carried out so. -1 if not, and if none was: what was to be redirected is forgotten, and data
 *  may be anywhere. */
int railyard_redirect_done(const void *comm) __attribute__((weak));

#ifdef __cplusplus
}
#endif
#endif
