/*
 * agree.h: how the ranks of one communicator come to carry out each exchange in the same way.
 *
 * Owns: the agreement as two pure state machines, one for every rank (struct ry_agree) and one more for the yardmaster
 * (struct ry_yard, beside its own rank's): messages in, messages and decisions out. No I/O, no threads, no clock but the
 * `now` that is passed in (nanoseconds, any monotonic origin). Driven by control.h in production, by a random scheduler in
 * tests/unit/test_agree.c, and mirrored in tests/model/agree.pml. Not: what a strategy is worth (the yardmaster's caller
 * chooses, through a callback), how messages travel.
 *
 * The protocol.
 *   Observing    Exchanges pass. Each rank tells the yardmaster SEEN x (with its loads), without waiting.
 *   Proposed     When all ranks were seen for `engage_after` consecutive exchanges and the caller's policy finds it
 *                worth while, the yardmaster sends PROPOSE m, m beyond any number seen. A rank that has not begun exchange m
 *                answers PROMISE: from m on it will wait for the outcome. One that has answers REFUSE with its own next
 *                number, and a later m is tried. All promises in: COMMIT m; a refusal, or patience over: ABORT m.
 *   Engaged      From m on, each rank sends a MANIFEST for each exchange and waits for the VERDICT. The yardmaster sends one
 *                when all manifests are in; when one is missing for `patience` after the first came, or a rank said
 *                "not me", went STRAY or was lost, it decides direct. Such a verdict may also end the engagement: then all
 *                ranks are back to observing after x, those who come to x late as well.
 *   Failed       Connection to the yardmaster lost, communicator aborted, communicator ending: every wait ends at once with
 *                "direct", and nothing of this communicator is ever waited for again.
 * One engagement is one epoch, carried by every message, so that what comes late from an earlier one is recognized.
 *
 * The same exchange? Numbers can drift apart when a group looks like an exchange on one rank only. NCCL matches p2p by
 * order within each pair. So a manifest tells for each peer how many sends and receives this rank has issued on the
 * communicator *before* this exchange, passed through or not; the yardmaster wants, for every pair, the sender's ordinal,
 * bytes and type to equal the receiver's. Anything else is direct, and back to observing.
 *
 * A rank that is engaged and issues p2p that is no exchange says STRAY at once: whatever the yardmaster still waits for
 * is then decided direct, and the engagement ends.
 *
 * After an engagement that ended badly the yardmaster waits longer before it proposes again (twice as many exchanges each
 * time, for ever after RY_AGREE_GIVE_UP failures): a communicator whose traffic does not fit is soon left alone.
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
    bool not_me;     /* this rank will go direct whatever is decided: captured, odd buffers, p2p already passed on */
    bool one_call;   /* ncclAlltoAll */
    int type;        /* ncclDataType_t */
    const uint64_t *send, *recv; /* bytes */
    uint64_t ordinal; /* exchanges issued before on this communicator */
    const uint32_t *sent, *received; /* p2p calls to / from each peer issued before, beyond those exchanges; NULL: none */
    const void *extra; /* for the policy (loads, measured durations); opaque here */
    size_t extra_bytes;
};

/* The yardmaster's decision, as one rank gets it. */
struct ry_verdict {
    uint64_t number;     /* of the exchange */
    uint8_t strategy;    /* enum ry_strategy; RY_DIRECT (0) whenever anything was not right */
    bool verify;         /* run it both ways and compare */
    bool last;           /* back to observing after this exchange */
    const char *reason;  /* why direct although engaged; "" otherwise. For logs */
    const void *extra;   /* the rank's slice of the matrices and whatever else the policy sent it; NULL on direct */
    size_t extra_bytes;
};

/* What the machines want done. All are called from inside the function that was called on the machine. */
struct ry_agree_port {
    void *context;
    /** Send `bytes` to rank `to` (may be the own rank: must then be delivered later, not from inside this call). */
    void (*send)(void *context, int to, const void *bytes, size_t size);
};

/* ---- every rank ---- */

struct ry_agree; /* opaque */
struct ry_agree *ry_agree_new(int nranks, int rank, int yardmaster, const struct ry_agree_port *port);
void ry_agree_free(struct ry_agree *a);

/** How the p2p calls of this rank's groups must be treated from now on: true once it promised, until it observes again. Cheap;
 *  the caller mirrors it into the preload's flag after every call on the machine. */
bool ry_agree_hold(const struct ry_agree *a);

enum ry_path { RY_GO_DIRECT, RY_WAIT_VERDICT };
/**
 * Exchange `number` (0, 1, … in the order of this rank) is about to be issued, with `m`. RY_GO_DIRECT: pass it on; nothing to
 * wait for (also whenever m->not_me). RY_WAIT_VERDICT: ask ry_agree_verdict() until it answers.
 * `seen` is what SEEN carries while observing (opaque, for the policy; may be NULL with 0 bytes).
 */
enum ry_path ry_agree_exchange(struct ry_agree *a, uint64_t number, const struct ry_manifest *m, const void *seen,
                               size_t seen_bytes);
/** The outcome for the exchange being waited for: true and *v (valid until the next exchange), or false: not yet. */
bool ry_agree_verdict(struct ry_agree *a, struct ry_verdict *v);
/** p2p that was no exchange was issued on the communicator. */
void ry_agree_stray(struct ry_agree *a);
/** A message came from the yardmaster. Malformed ones are refused (-1 with `err`) and leave the state as it was. */
int ry_agree_message(struct ry_agree *a, const void *bytes, size_t size, struct ry_err *err);
/** The connection to the yardmaster is gone, or the communicator is aborted: waits end, nothing is waited for again. */
void ry_agree_fail(struct ry_agree *a, const char *reason);
/** The communicator is ending here: tells the yardmaster, then as ry_agree_fail(). */
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
    /** All ranks were seen at exchange `number` with these SEEN extras: would reissuing pay? Called while observing. */
    bool (*worth)(void *context, uint64_t number, const void *const *seen, const size_t *seen_bytes);
    /** Decide exchange: the strategy; *verify; *last: no longer worth it, go back to observing. */
    int (*choose)(void *context, const struct ry_agreed *x, bool *verify, bool *last);
    /** What to tell `rank` with the verdict just chosen: *size bytes, owned by the policy, valid until its next call. */
    const void *(*slice)(void *context, const struct ry_agreed *x, int strategy, int rank, size_t *size);
};
struct ry_yard_config {
    int nranks;
    int engage_after;     /* consecutive exchanges of all ranks before the first proposal: 4 */
    uint64_t patience_ns;
};
struct ry_yard; /* opaque */
struct ry_yard *ry_yard_new(const struct ry_yard_config *config, const struct ry_policy *policy,
                            const struct ry_agree_port *port);
void ry_yard_free(struct ry_yard *y);
int ry_yard_message(struct ry_yard *y, uint64_t now, int from, const void *bytes, size_t size, struct ry_err *err);
/** Rank `rank` cannot be reached any more. */
void ry_yard_lost(struct ry_yard *y, uint64_t now, int rank);
/** Time passes. Returns when to be called again at the latest (UINT64_MAX: only after another event). */
uint64_t ry_yard_tick(struct ry_yard *y, uint64_t now);

/* For reports and tests. */
struct ry_yard_counts {
    uint64_t proposals, commits, aborts, verdicts, direct, impatient, mismatched, strays, not_me, lost;
};
void ry_yard_counts(const struct ry_yard *y, struct ry_yard_counts *out);

#endif
