/*
 * warp.h: the 32 threads of a warp as fibers of one host thread.
 *
 * Owns: running them, and the one way in which they talk: each of those in a mask gives a value and gets everybody's. A
 * warp in which some wait for others that never come is a bug of the kernel, and aborts.
 */
#ifndef RY_TESTS_WARP_H
#define RY_TESTS_WARP_H

#include <cstdint>

/** Call `what(param)` on 32 fibers; *thread is `first` to `first` + 31, as each of them sees it. */
void warp_run(void (*what)(const void *), const void *param, unsigned *thread, unsigned first);

/** By a fiber: the values [32] that the lanes of `mask` gave. Valid until the lane's next call. */
const uint64_t *warp_exchange(uint32_t mask, uint64_t value);

#endif
