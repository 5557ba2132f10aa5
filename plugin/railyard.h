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
 * All ranks must call it between the same exchanges. On a communicator whose exchanges Railyard carries out by itself
 * at this moment it has no effect: the other ranks count on this one. Thread-safe; counts for all threads.
 */
int railyard_pause(int on) __attribute__((weak));

#ifdef __cplusplus
}
#endif
#endif
