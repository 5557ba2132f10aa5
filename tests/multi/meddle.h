/*
 * meddle.h: what the tests of the engaged engine use to see, and to spoil, what the engine asks NCCL for.
 *
 * Owns: a library that lies between librailyard.so and the emulated NCCL. It tells the engine's own calls from the
 * job's by the library that they come from, counts them per thread, and can flip a byte of what the engine received or
 * let one of its calls fail. So the product needs no hook for tests. Not: the program that says when.
 */
#ifndef RY_TESTS_MEDDLE_H
#define RY_TESTS_MEDDLE_H

#include <stdatomic.h>
#include <stdbool.h>

#include <nccl.h>

/* Calls on this thread, and by any thread on communicators that it watches, since it last set them to zero: of the engine, and of the job (passed on by librailyard.so). */
#define MEDDLE_PEERS 64
void meddle_watch(ncclComm_t comm);
extern _Thread_local struct meddle_counts {
    unsigned engine, job;
    unsigned inside; /* of the engine's: on a communicator that it made itself */
    unsigned long long sent[MEDDLE_PEERS]; /* bytes of the engine to each peer, on the job's communicators */
} meddle_counts;

/* The next group of the engine that receives this byte, on any thread, gets it with its lowest bit flipped; NULL then.
 */
extern _Atomic(unsigned char *) meddle_flip;

/* The engine's next call of that kind on any thread fails with ncclSystemError (the end of a group after NCCL has done
   it, a split after it was made); back to none then. */
enum meddle_failure { MEDDLE_NONE, MEDDLE_START, MEDDLE_SEND, MEDDLE_END, MEDDLE_SPLIT };
extern _Atomic int meddle_fail;

/* While it is set the engine's groups do not begin. */
extern _Atomic int meddle_block;

/* Communicators that the engine made, and that it destroyed or aborted; threads that are in ncclCommSplit or
   ncclCommInitRank for it now. */
/* While `hold` is set they do not get to NCCL. */
extern _Atomic int meddle_hold, meddle_made, meddle_ended, meddle_splitting;

#endif
