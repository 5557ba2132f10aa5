/*
 * agree.h: how the ranks of one communicator come to carry out each exchange in the same way.
 *
 * Owns: the agreement as two pure state machines, one for every rank (struct ry_agree) and one more for the yardmaster
 * (struct ry_yard, beside its own rank's): messages in, messages and decisions out. No I/O, no threads, no clock but
 * the `now` that is passed in (nanoseconds, any monotonic origin). Driven by control.h in production, by a random
 * scheduler in tests/unit/test_agree_random.c, and mirrored in tests/model/agree.pml. Not: what a strategy is worth (the
 * yardmaster's caller chooses, through a callback), how messages travel.
 *
 * The protocol.
 *
 * Observing: exchanges pass. Now and then each rank tells the yardmaster SEEN x, without waiting: all of them at the same
 * numbers, dense at first (0, 1, 2, 4, 7, 11, …), then one in 1021, so that a communicator that never engages costs next to
 * nothing; none at all after giving up.
 *
 * Proposed: when SEEN x has come from all ranks (x ≥ engage_after - 1 exchanges after the last engagement: numbers are
 * consecutive, so all have issued the ones before as well) and the caller's policy finds it worth while, the yardmaster
 * sends PROPOSE m, m beyond any number it knows of. A rank that has not begun exchange m answers PROMISE: from m on it
 * sends a MANIFEST for each exchange and waits for the outcome. One that has answers REFUSE with its own next number: END,
 * and a later m is tried at once. Patience over: END. All promises in: committed. That is the yardmaster's knowledge only;
 * a rank that promised does the same before and after, so no message tells it and there is no race between COMMIT and
 * whatever else is on its way.
 *
 * Engaged: the yardmaster sends a VERDICT when all manifests of an exchange are in and fit. It may be the last: back to
 * observing after it. A rank that says "not me" goes direct without waiting; those who do wait for that exchange, early
 * or late, get the verdict "direct", and nothing else changes. A manifest missing for `patience` after the first came,
 * manifests that do not fit, a STRAY, a rank lost or leaving: END.
 *
 * END: everything not yet decided in this epoch goes direct, on ranks that wait and on those that come there later, and
 * all observe again.
 *
 * Failed: connection to the yardmaster lost, communicator aborted, communicator ending: every wait ends at once with
 * "direct", and nothing of this communicator is ever waited for again.
 *
 * Each proposal opens an epoch, carried by every message, so that what comes late or twice from an earlier one is
 * recognized. Why all ranks take the same path: a verdict other than direct needs the manifests of all ranks for that
 * exchange, so all wait for it, and it is sent to all at once; END names the first undecided exchange, so a rank that END
 * reaches before a verdict given earlier goes on waiting for that verdict. The order in which messages of one pair arrive
 * therefore matters only for how soon, never for what; but none may be lost without ry_yard_lost() on the one side and
 * ry_agree_fail() on the other.
 *
 * The same exchange? Numbers can drift apart when a group looks like an exchange on one rank only. NCCL matches p2p by
 * order within each pair. So a manifest tells for each peer how many sends and receives this rank has issued on the
 * communicator *before* this exchange, passed through or not; the yardmaster wants, for every pair, the sender's
 * ordinal, bytes and type to equal the receiver's, and ncclAlltoAll on all ranks or on none. Anything else is END.
 *
 * A rank that promised and issues p2p that is no exchange says STRAY at once, and observes again: END for the others.
 *
 * After an epoch that ended badly (by anything but the policy or a refusal) the yardmaster waits longer before it
 * proposes again: engage_after exchanges, doubled with each failure in a row, for ever after RY_AGREE_GIVE_UP of them;
 * an engagement of 256 verdicts wipes out the failures before it. A communicator whose traffic does not fit is soon
 * left alone.
 *
 * Time. Hand in the messages that have come before calling ry_yard_tick(). As a yardmaster that was stopped cannot know
 * what waits in its sockets, it also notices: while waiting it asks to be called every patience / 8, and where it was
 * not for twice as long, the time without a call does not count (up to 8 times per wait), and at least patience / 8 is
 * left.
 *
 * Memory. A rank: one message. The yardmaster: O(nranks) and what came with SEEN, until it is engaged; then 8 bytes per
 * pair and one manifest's tail per rank. Ranks may be any number of exchanges apart while observing; while engaged only
 * "not me" lets a rank run ahead, by up to 4096 exchanges (END beyond that).
 */
#ifndef RY_CONTROL_AGREE_H
#define RY_CONTROL_AGREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define RY_AGREE_GIVE_UP 5

/* What a rank tells about its side of an exchange. Arrays are the caller's, [nranks], copied. */
struct ry_manifest {
    bool not_me;   /* this rank will go direct whatever is decided: captured, odd buffers, p2p already passed on */
    bool one_call; /* ncclAlltoAll */
    int type;      /* ncclDataType_t */
    const uint64_t *send, *recv; /* bytes */
    uint64_t ordinal;            /* exchanges issued before on this communicator */
    const uint32_t *sent,
        *received;     /* p2p calls to / from each peer issued before, beyond those exchanges; NULL: none */
    const void *extra; /* for the policy (loads, measured durations); opaque here; reaches it aligned to 8 */
    size_t extra_bytes;
};

/* The yardmaster's decision, as one rank gets it. */
struct ry_verdict {
    uint64_t number;    /* of the exchange */
    uint8_t strategy;   /* enum ry_strategy; RY_DIRECT (0) whenever anything was not right */
    bool verify;        /* run it both ways and compare */
    bool last;          /* back to observing after this exchange */
    const char *reason; /* why direct although engaged; "" otherwise. For logs */
    uint64_t waited_ns; /* of the time since ry_agree_exchange(): from this rank's manifest reaching the yardmaster to
                           the decision, so waiting for other ranks; the rest is messages. 0 where END decided */
    const void *extra;  /* the rank's slice of the matrices and whatever else the policy sent it, aligned to 8; NULL if it
                           sent nothing, and whenever direct was not its choice */
    size_t extra_bytes;
};

/* What the machines want done. All are called from inside the function that was called on the machine. */
struct ry_agree_port {
    void *context;
    /** Send `bytes` to rank `to` (may be the own rank: must then be delivered later, not from inside this call). A rank
     * sends to the yardmaster only; the yardmaster first to a rank after that rank's first message, and never after it
     * was told that the rank is lost. */
    void (*send)(void *context, int to, const void *bytes, size_t size);
};

/* ---- every rank ---- */

struct ry_agree; /* opaque. Calls on one machine must not overlap: the caller holds a lock */
/** NULL when out of memory, or where the numbers make no sense. */
struct ry_agree *ry_agree_new(int nranks, int rank, int yardmaster, const struct ry_agree_port *port);
void ry_agree_free(struct ry_agree *a);

/** How the p2p calls of this rank's groups must be treated from now on: true once it promised, until it observes again.
 * Cheap; the caller mirrors it into the preload's flag after every call on the machine. */
bool ry_agree_hold(const struct ry_agree *a);

enum ry_way { RY_GO_DIRECT, RY_WAIT_VERDICT };
/**
 * Exchange `number` (0, 1, … in the order of this rank) is about to be issued, with `m`. RY_GO_DIRECT: pass it on;
 * nothing to wait for (also whenever m->not_me). RY_WAIT_VERDICT: ask ry_agree_verdict() until it answers; whoever does
 * not want to wait that long must call ry_agree_leave() first. Numbers out of sequence while hold is set count as a
 * stray. `m` is read only if ry_agree_hold(), and may be NULL otherwise; NULL is "not me" as well. An exchange whose
 * group began before hold was set (calls already passed on) is "not me". `seen` is what SEEN carries if it is due
 * (opaque, for the policy; may be NULL with 0 bytes). As most exchanges are not asked about, it had better sum up all
 * since the last one asked about.
 */
enum ry_way ry_agree_exchange(struct ry_agree *a, uint64_t number, const struct ry_manifest *m, const void *seen,
                               size_t seen_bytes);
/** Would exchange `number` carry SEEN? To spare the work of making up what it says. */
bool ry_agree_wants_seen(const struct ry_agree *a, uint64_t number);
/** The outcome for the exchange being waited for: true and *v (valid until the next exchange), or false: not yet. */
bool ry_agree_verdict(struct ry_agree *a, struct ry_verdict *v);
/** p2p that was no exchange was issued on the communicator. Nothing while hold is not set. */
void ry_agree_stray(struct ry_agree *a);
/** A message came from the yardmaster. Malformed ones are refused (-1 with `err`) and leave the state as it was. */
int ry_agree_message(struct ry_agree *a, const void *bytes, size_t size, struct ry_err *err);
/** The connection to the yardmaster is gone: waits end, nothing is waited for again, nothing is sent. `reason` is not
 * copied. */
void ry_agree_fail(struct ry_agree *a, const char *reason);
/** The communicator is ending or being aborted here: tells the yardmaster, so that others need not wait out the
 * patience, then as ry_agree_fail(). Where the yardmaster's own rank ends, ry_yard_lost() of it does the same without a
 * message. */
void ry_agree_leave(struct ry_agree *a);

/* ---- the yardmaster ---- */

/* All manifests of one exchange, consistent with each other. matrix[from * nranks + to] in bytes. */
struct ry_agreed {
    uint64_t number;
    int nranks;
    int type;
    const uint64_t *matrix;
    const void *const *extra; /* [nranks], what each rank's manifest carried */
    const size_t *extra_bytes;
};
struct ry_policy {
    void *context;
    /** All ranks were seen at exchange `number` with these SEEN extras (NULL where none came): would reissuing pay?
     * Called while observing. None of these callbacks may call the machines. */
    bool (*worth)(void *context, uint64_t number, const void *const *seen, const size_t *seen_bytes);
    /** Decide exchange: the strategy (0 … 255); *verify; *rest: go back to observing after it, and do not ask worth() before so
     * many more exchanges; 0: stay engaged. */
    int (*choose)(void *context, const struct ry_agreed *x, bool *verify, unsigned *rest);
    /** What to tell `rank` with the verdict just chosen, direct (0) as well: *size bytes, owned by the policy, valid
     * until its next call; NULL: nothing. */
    const void *(*slice)(void *context, const struct ry_agreed *x, int strategy, int rank, size_t *size);
};
struct ry_yard_config {
    int nranks;
    int engage_after;     /* consecutive exchanges of all ranks before the first proposal: 4 */
    uint64_t patience_ns; /* for manifests, and for answers to a proposal */
};
struct ry_yard; /* opaque */
struct ry_yard *ry_yard_new(const struct ry_yard_config *config, const struct ry_policy *policy,
                            const struct ry_agree_port *port);
void ry_yard_free(struct ry_yard *y);
/** Malformed ones are refused (-1 with `err`) and change nothing. Never trusts a size or a number in a message. */
int ry_yard_message(struct ry_yard *y, uint64_t now, int from, const void *bytes, size_t size, struct ry_err *err);
/** Rank `rank` cannot be reached any more. */
void ry_yard_lost(struct ry_yard *y, uint64_t now, int rank);
/** Time passes. Returns when to be called again at the latest (UINT64_MAX: only after another event). */
uint64_t ry_yard_tick(struct ry_yard *y, uint64_t now);

/* For reports and tests. */
struct ry_yard_counts {
    uint64_t proposals, commits, aborts; /* aborts: END of epochs that were not committed */
    uint64_t verdicts;                   /* exchanges decided that somebody waited for; of these */
    uint64_t direct;
    uint64_t impatient, mismatched, strays, not_me, lost;
    uint64_t gather_ns, gather_most_ns; /* first manifest to verdict, over the verdicts with all manifests: how far the
                                           ranks are apart in time, to be told from what agreement costs */
};
void ry_yard_counts(const struct ry_yard *y, struct ry_yard_counts *out);

#endif
