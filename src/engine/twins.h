/*
 * twins.h: exchanges of twin communicators, carried out together by `replica` (docs/replica.md).
 *
 * Owns: keeping to the twins that are found (twin_find.h); the agreement among all ranks of all twins, which is that of
 * control/agree.h, held beside the communicator's own; the digest of each exchange; the plan. Not: what is decided by
 * (twin_policy.h), carrying the plan out (exchange.c), what the communicator does by itself where it is not replica:
 * that is asked afterwards, in the same exchange, as if there were no twins.
 *
 * A communicator of which no twin is found costs a look into a folder now and then, ever less often; nothing is
 * digested or sent.
 *
 * Thread-safety: all by one thread at a time, as the exchanges of a communicator are, but ry_twins_leave() and
 * ry_twins_took(): by any, at any time before ry_twins_close().
 */
#ifndef RY_ENGINE_TWINS_H
#define RY_ENGINE_TWINS_H

#include <stdbool.h>
#include <stdint.h>

#include "hooks.h"
#include "plan/plan.h"
#include "run/run.h"

struct comm;
struct reissue;
struct ry_twins;

/** For a communicator that was just opened (reissue.c); `address`: its yardmaster's, on all ranks. NULL: it shall have,
 * or can have, no twins. */
struct ry_twins *ry_twins_open(struct comm *c, struct reissue *r, const void *address, size_t size);
/** `leak`: nothing may be asked of NCCL any more. NULL is fine. */
void ry_twins_close(struct ry_twins *t, bool leak);
/** The communicator is aborted (`abort`), or the engine wants no more of it, but what is under way shall end well: ends waits at once.
 * NULL is fine. */
void ry_twins_leave(struct ry_twins *t, bool abort);
void ry_twins_stray(struct ry_twins *t);

struct ry_twins_verdict {
    struct ry_plan *
        plan; /* by replica, localized; the caller's. NULL: it could not be built, and the job's call must fail: *why */
    struct ry_run_node *node;
    bool verify;
    bool cross; /* UCX carries what crosses nodes */
    double plain_us; /* what the twins would take each for itself */
    struct ry_err why;
};
struct ry_twins_wait {
    bool asked;                /* there was a verdict, whatever it says */
    bool timed;                /* somebody wants to know how long the exchange takes */
    double waited_us, late_us; /* as in exchange.c */
};
/** Exchange `number` comes; `packed`: bytes that would cross nodes from here if equal rows went once, as far as is known, else all.
 * True: all ranks of all twins carry it out by replica. False: what the communicator itself agrees on is next. May wait for other
 * ranks. NULL is fine. */
bool ry_twins_agree(struct ry_twins *t, const struct ry_exchange *x, const struct ry_buffers *b, uint64_t number,
                    uint64_t packed, struct ry_twins_verdict *verdict, struct ry_twins_wait *wait);
/** True: exchange `number` passes as far as twins go, and all is said. False: ask ry_twins_agree(). NULL is fine. */
bool ry_twins_pass(struct ry_twins *t, uint64_t number);
/** Exchange `number` is not carried out together with the twins, but by this strategy (enum ry_strategy; RY_DIRECT: plain NCCL, too). NULL is fine. */
void ry_twins_went(struct ry_twins *t, uint64_t number, int strategy);
/** How long it took on the device, whichever way it went. */
void ry_twins_took(struct ry_twins *t, uint64_t number, double us);

#endif
