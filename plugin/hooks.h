/*
 * hooks.h: the boundary between the preloaded library (librailyard.so, libc only) and the engine
 * (librailyard-engine.so, everything else).
 *
 * Owns: the structures that cross it, and their version. Both sides are always installed together, but an LD_PRELOAD path
 * may outlive an upgrade: the engine refuses a host of another version, and the job then runs on plain NCCL with one
 * warning. Types of NCCL appear here as plain integers and pointers, so that neither side depends on the header of the
 * NCCL it meets at run time.
 *
 * Who calls: the preload calls hooks from whatever thread the job calls NCCL on, several at once for different
 * communicators. Pointers passed in are valid during the call only.
 */
#ifndef RY_HOOKS_H
#define RY_HOOKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RY_HOOKS_VERSION 5u
#define RY_ENGINE_ENTRY "railyard_engine_open"
#define RY_NCCL_ID_BYTES 128

struct railyard_redirect;

/* NCCL calls other than p2p that are noted as counts. Order is recorded by name only (see record/), so it may grow. */
enum ry_call {
    RY_CALL_SEND,
    RY_CALL_RECV,
    RY_CALL_ALLTOALL,
    RY_CALL_ALLGATHER,
    RY_CALL_ALLREDUCE,
    RY_CALL_BROADCAST,
    RY_CALL_REDUCE,
    RY_CALL_REDUCESCATTER,
    RY_CALL_GATHER,
    RY_CALL_SCATTER,
    RY_CALL_ONESIDED, /* ncclPutSignal, ncclSignal, ncclWaitSignal */
    RY_CALLS
};

/* How a communicator came to be. */
enum ry_birth { RY_BIRTH_INIT, RY_BIRTH_INIT_ALL, RY_BIRTH_SPLIT, RY_BIRTH_SHRINK, RY_BIRTH_SEEN /* nobody told how */ };
/* How it ended. */
enum ry_death { RY_DEATH_DESTROY, RY_DEATH_ABORT, RY_DEATH_REVOKE, RY_DEATH_EXIT };

struct ry_comm_info {
    void *nccl; /* ncclComm_t */
    enum ry_birth birth;
    int nranks, rank;
    int device;      /* CUDA ordinal, -1 unknown; RY_DEVICE_CURRENT: the calling thread's */
    bool blocking;   /* false: made with ncclConfig_t.blocking = 0 */
    const char *name; /* ncclConfig_t.commName where the job set one, else NULL */
    const uint8_t *unique_id; /* RY_NCCL_ID_BYTES; INIT: the (first) id that all ranks were given; else NULL */
    void *parent;    /* engine's handle of the parent (SPLIT, SHRINK); NULL if it is not known */
    uint32_t ordinal; /* which of the parent's children this is, counted alike by all ranks; INIT_ALL: in this process */
    int color;       /* SPLIT */
    uint64_t key;    /* SEEN: a number that all ranks have alike, never 0; else 0 */
};
#define RY_DEVICE_CURRENT (-2)

/* One side of an exchange: element r of each array concerns peer r. */
struct ry_exchange {
    int nranks, rank;
    int type;            /* ncclDataType_t; ncclUint8 where the group mixed types (counts are bytes then) */
    uint32_t type_bytes; /* bytes per element */
    bool one_call;       /* ncclAlltoAll rather than a group */
    const uint64_t *send_count, *recv_count; /* elements */
    const void *const *send_buf;             /* NULL entries where the count is 0 are allowed */
    void *const *recv_buf;
    void *stream; /* cudaStream_t */
    bool held;    /* none of its calls has been passed to NCCL yet: the engine may carry it out by itself */
    uint64_t ordinal; /* exchanges that this rank issued on the communicator before this one */
    /* p2p calls to / from each peer issued on the communicator before, beyond those of exchanges; NULL: none at all */
    const uint32_t *sent, *received;
};

/*
 * The head of what comm_created() returns: the engine's part that the preload reads on every group, without a call.
 * hold: from the next group on, keep p2p calls back until the outermost ncclGroupEnd and offer the exchange to
 * exchange_take(). A group that turns out to be no exchange is passed on in the job's order.
 * wants: exchanges are to be told of at all; where it is 0 they cost what plain groups do.
 */
struct ry_comm_face {
    _Atomic uint32_t hold, wants;
};
/* This bit of `hold`: even while the job has paused Railyard. */
#define RY_HOLD_ALWAYS (1u << 31)

/* What the preload counts by itself on each communicator, handed over when it ends. */
struct ry_comm_counts {
    uint64_t calls[RY_CALLS];
    uint64_t bytes[RY_CALLS]; /* count × type size as passed in; send side only for all-to-all */
    uint64_t exchanges;       /* recognized */
    uint64_t plain_groups;    /* outermost groups with p2p that were no exchange */
};

/* What the preload offers the engine. */
struct ry_host {
    uint32_t version;
    uint32_t size;               /* of this structure */
    void *(*find)(const char *); /* symbol of the real NCCL, or NULL */
    const char *nccl_path;       /* where the real NCCL was found */
    int nccl_version;            /* ncclGetVersion's number, 0 unknown */
    /** The calling thread is the engine's own: what NCCL calls of its public functions there is not the job's doing. */
    void (*own_thread)(void);
    /** On such a thread: pass the exchange on to NCCL as it is. An ncclResult_t. */
    int (*plain)(void *nccl, const struct ry_exchange *x);
    bool observe_only;           /* nothing can be reissued, whatever the settings say: the profiler plugin */
};

/* What the engine offers the preload. Every member may be NULL: nothing to call then. */
struct ry_hooks {
    uint32_t version;
    uint32_t size;
    /** A unique id, all zero before the real NCCL made it; the engine may write where NCCL left zeros. */
    void (*unique_id)(uint8_t id[RY_NCCL_ID_BYTES]);
    /** A communicator is ready. Returns the engine's handle, which begins with a struct ry_comm_face; NULL to be left alone
     *  about it. */
    void *(*comm_created)(const struct ry_comm_info *info);
    void (*comm_ended)(void *comm, enum ry_death how, const struct ry_comm_counts *counts);
    /** An exchange, before and after it is carried out, by NCCL or by exchange_take(). The cookie that `begin` returns is given
     *  to `take` and `end`. */
    void *(*exchange_begin)(void *comm, const struct ry_exchange *x);
    void (*exchange_end)(void *comm, const struct ry_exchange *x, void *cookie, int result);
    /**
     * Called between the two for every exchange, held or not (one that is not held can only be told of). True: the engine has
     * carried it out, or is about to (settle()), *result is the ncclResult_t for the job. False: the preload passes it on as it is. May wait for other ranks.
     */
    bool (*exchange_take)(void *comm, const struct ry_exchange *x, void *cookie, int *result);
    /** For who learns of an exchange only when NCCL has it, the profiler plugin: start the clock, if it is the turn of exchange
     *  `ordinal`, before it is known whether it will be one; NULL if not. */
    void *(*exchange_clock)(void *comm, uint64_t ordinal, void *stream);
    /** It was one, issued at `wall_ns`, instead of the three above; or (`x` NULL) it was none. `clock` is done with, NULL is fine. */
    void (*exchange_seen)(void *comm, const struct ry_exchange *x, void *clock, uint64_t wall_ns, bool ok);
    /** p2p that is no exchange was issued on a communicator while `hold` was set (before it is passed on). */
    void (*stray)(void *comm);
    /** The job aborts or revokes the communicator, or shrinks it with NCCL_SHRINK_ABORT, perhaps while another thread waits in
     *  exchange_take(): end that wait. Comes before NCCL is called; comm_ended() comes later, when no thread is in a hook of it any more. */
    void (*comm_aborting)(void *comm);
    /** An all-gather of 64-bit integers, `count` per rank: the shape in which frameworks swap expert counts. */
    void (*int64_allgather)(void *comm, uint64_t count);
    /** NULL unless exchanges may be taken and carried out after exchange_take() has returned (RAILYARD_HOLD=no). Any other call of NCCL
     *  is about to be made, on this communicator (NULL: none that is followed): waits until what the calling thread gave away,
     *  and what anybody did on that communicator, has been enqueued. */
    void (*settle)(void *comm);
    /** As above; NULL alike. A call is about to be made, on any thread, that keeps all other threads from launching until the device is
     *  idle: waits until all that was given away has been enqueued, `most` seconds at most (0: as long as it takes). Until freed() nothing more is
     *  given away. */
    void (*freeing)(double most);
    void (*freed)(void);
    /** railyard_strategy() of railyard.h: 0, or -1. */
    int (*strategy)(const char *name);
    /** railyard_redirect_ready(), railyard_redirect(), railyard_redirect_done() of railyard.h, for a communicator that does not
     *  change under them. */
    int (*redirect_ready)(void *comm, uint64_t bytes, uint64_t rows, void *stream);
    int (*redirect)(void *comm, const struct railyard_redirect *how);
    int (*redirect_done)(void *comm);
    /** The process is about to exit: `counts(handle, out)` reads the counts of a communicator still alive. */
    void (*closing)(void (*counts)(void *nccl, struct ry_comm_counts *out));
};

/** The engine's one export. Returns 0 and fills `hooks`, or -1 with a one-line reason in `why`. */
typedef int (*ry_engine_open_fn)(const struct ry_host *host, struct ry_hooks *hooks, char *why, size_t why_size);

#endif
