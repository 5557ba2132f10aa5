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

#ifdef __cplusplus
}
#endif
#endif
