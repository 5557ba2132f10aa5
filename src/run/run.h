/*
 * run.h: carrying out a plan.
 *
 * Owns: turning a plan's steps into NCCL calls and device copies on the caller's stream; staging memory; running an
 * exchange both ways and comparing (verify mode). Not: building the plan (plan/), deciding (control/), the device itself.
 *
 * Everything is enqueued on the exchange's own stream and communicator, in order: work that the job enqueued before is seen,
 * work that it enqueues after waits. That holds for groups inside the node on a communicator of their own, too, and for the second
 * part of a plan (ry_second()), which may go on a stream of the runner's: it begins after, and the exchange's stream waits for it. Nothing here synchronizes the host, but ry_run_verify()'s answer is fetched later,
 * without blocking, by ry_run_checks(). NCCL is called through the table, never by its public names.
 *
 * Thread-safety: a struct ry_runner may be used by one thread at a time for one communicator, as NCCL itself; different
 * runners are independent. The staging limit is shared by all runners of the process.
 */
#ifndef RY_RUN_RUN_H
#define RY_RUN_RUN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "cross.h"
#include "device/device.h"
#include "plan/plan.h"

/* ncclUniqueId, which is passed by value. */
struct ry_nccl_id {
    char bytes[128];
};

/* NCCL's functions that a plan needs; results are ncclResult_t as int, types ncclDataType_t. */
struct ry_nccl {
    int (*group_start)(void);
    int (*group_end)(void);
    int (*send)(const void *buf, size_t count, int type, int peer, void *comm, void *stream);
    int (*recv)(void *buf, size_t count, int type, int peer, void *comm, void *stream);
    const char *(*error_string)(int result);
    /* Not needed for any plan; NULL where the job's NCCL has no ncclCommSplit (before 2.18), all three. */
    int (*comm_split)(void *comm, int color, int key, void **newcomm, void *config);
    int (*comm_destroy)(void *comm);
    int (*comm_abort)(void *comm);
    /* For communicators of twins; NULL where the former are. */
    int (*get_unique_id)(struct ry_nccl_id *id);
    int (*comm_init_rank)(void **newcomm, int nranks, struct ry_nccl_id id, int rank);
};
/** Fill from `find` (symbol of the real NCCL, or NULL). -1 with `err` naming what is missing. */
int ry_nccl_find(struct ry_nccl *nccl, void *(*find)(const char *), struct ry_err *err);

struct ry_kept;

/* The job's buffers: element p is the segment for / from rank p; entries of empty segments may be NULL. */
struct ry_buffers {
    int nranks, rank;
    const void *const *send;
    void *const *recv;
    const uint64_t *send_bytes, *recv_bytes;
    void *stream;
    /* For plans that sum; others do not look at them. */
    int type;             /* the elements' ncclDataType_t */
    struct ry_kept *kept; /* of the exchange that this one returns */
};
/** Can elements of this ncclDataType_t be summed: fp16, bf16, fp32? */
bool ry_run_sums(int type);
/** Bytes of such an element; 0 for types that cannot be summed. */
uint64_t ry_run_sums_bytes(int type);

/** Host memory that transfers are staged in counts as staging memory does: all of it, or false. */
bool ry_run_staging_reserve(uint64_t bytes);
void ry_run_staging_unreserve(uint64_t bytes);

struct ry_runner; /* one per communicator */
struct ry_runner *ry_runner_new(const struct ry_nccl *nccl, const struct ry_device *device, int ordinal, void *comm,
                                struct ry_err *err);
/** The communicator ends (`aborted`: its stream may never get there). Staging memory still in use is given back in stream order. */
void ry_runner_free(struct ry_runner *runner, bool aborted);

/*
 * Staging memory. Once a verdict is out nobody can back down, so a rank must hold its memory before it says that it is able.
 * Each runner keeps one buffer, taken from the device's stream-ordered pool and grown between exchanges: a manifest tells how
 * much is held, the yardmaster knows what every rank would need, decides direct where it is too little and tells the need, and
 * the rank grows before its next manifest.
 */
/** Bytes of staging that all runners of this process may hold together (RAILYARD_STAGING); 0: none. */
void ry_run_staging_limit(uint64_t bytes);
/** What this runner holds now. */
uint64_t ry_run_staging(const struct ry_runner *runner);
/** Hold at least `bytes` (growing in generous steps), in order of `stream`. -1 with `err` at the limit or out of memory:
 *  what was held stays. */
int ry_run_staging_grow(struct ry_runner *runner, uint64_t bytes, void *stream, struct ry_err *err);

/*
 * Digests (digest.h): 128 bits that stand for all that this rank sends to other nodes; equal bytes there, equal digests,
 * whatever their addresses. What it sends to its own node and itself does not count. One at a time.
 */
struct ry_digest {
    uint64_t word[2];
};
/** Can this rank make them? */
bool ry_run_digests(const struct ry_runner *runner);
/** Enqueue one on b->stream. -1 with `err`: not possible now, nothing can be asked for. An earlier one is forgotten. */
int ry_run_digest(struct ry_runner *runner, const struct ry_cluster *map, const struct ry_buffers *b, struct ry_err *err);
/** True: it is there. False: it is not yet, or *failed tells that it will never be. Never blocks. */
bool ry_run_digest_over(struct ry_runner *runner, struct ry_digest *digest, bool *failed);

/*
 * Equal rows (rows.h). A runner holds one scanner, whose memory is taken at the first scan, grows with the rows and counts as
 * staging memory. What was found is valid until the next scan, and the PACK steps of a plan refer to the latest, whose result
 * must have been waited for; they are refused if buffers or counts are not those of the scan.
 */
/** Can this rank scan, pack and expand? If not (no kernels), it must not be given a plan that does. */
bool ry_run_packs(const struct ry_runner *runner);
/** Enqueue the search of what goes to other nodes of `map` on b->stream, for messages in so many parts (0: 1). -1 with `err`: not possible now (memory, too many rows);
 *  nothing was enqueued, and the exchange goes without. */
int ry_run_scan(struct ry_runner *runner, const struct ry_cluster *map, const struct ry_buffers *b, uint64_t row_bytes,
                int parts, struct ry_err *err);
/** Is the latest search over? Never blocks. */
bool ry_run_scan_over(struct ry_runner *runner);
/** Wait for it on the host. repeats[nnodes] is filled in; *rows, *distinct, *zero are sums over the nodes searched
 *  (zero: rows of zero bytes only). -1 with `err` if the device failed. */
struct ry_scan_sums {
    uint64_t rows, distinct, zero;
};
int ry_run_scan_wait(struct ry_runner *runner, struct ry_repeats *repeats, struct ry_scan_sums *sums, struct ry_err *err);

/*
 * How often each distinct row occurs among all that this rank sends, to its own node and itself as well: a second scanner, whose
 * memory counts as the first one's does. For whoever must know that rows are equal only because they are copies of one.
 */
/** Enqueue that search on b->stream; before ry_run_scan()'s its answer is there when that one's is. `times`: how often a token's row
 *  occurs, where that is known; else 0. The next ry_run_scan(), if of the same buffers, then takes rows of several tokens that have the same bytes for
 *  distinct: those that occur a multiple of `times`, where they are few and all others occur `times` (struct ry_copies, apart). -1 with `err`: not
 *  possible now, nothing was enqueued, there is no answer. The answer of an earlier search is forgotten either way. */
int ry_run_copies(struct ry_runner *runner, const struct ry_buffers *b, uint64_t row_bytes, uint32_t times,
                  struct ry_err *err);
struct ry_copies {
    uint64_t rows, distinct, zero; /* of all rows; of them distinct; of them zero bytes only */
    uint64_t least, most;          /* times that a distinct row occurs, those of zeros aside; 0 and 0 if there is no other */
    uint32_t times;                /* as it was asked */
    bool apart;                    /* each row occurs `times`, or is one of few that occur a multiple of that and went as distinct ones */
};
/** True: that search is over, and *copies says what it found. False: it is not, or there was none. Never blocks. */
bool ry_run_copies_over(struct ry_runner *runner, struct ry_copies *copies);

/*
 * What a relay keeps of an exchange that went by dedup, so that the one that returns its rows can be summed: which of those that it
 * passed on were equal. It lies in memory of its own, which counts as staging memory does.
 */
/** Right after ry_run() or ry_run_verify() of `plan`, on the same buffers. 0: *kept is there, even where this rank relayed nothing.
 *  -1 with `err`, *kept NULL: not possible now (no kernels, memory), or the device failed; the exchange itself went well, but no plan
 *  of its return may sum. */
int ry_run_keep(struct ry_runner *runner, const struct ry_plan *plan, const struct ry_buffers *b, struct ry_kept **kept,
                struct ry_err *err);
/** Bytes of device memory that it holds. */
uint64_t ry_kept_bytes(const struct ry_kept *kept);
/** Its memory goes back in stream order. May be called after the runner has gone; NULL is fine. */
void ry_kept_free(struct ry_kept *kept);

/**
 * May a plan be run on these buffers? False when a receive segment overlaps a send segment or another receive segment:
 * NCCL's result is then not ours to repeat. O(nranks log nranks).
 */
bool ry_run_safe(const struct ry_buffers *b);

/*
 * A communicator of the ranks of this node, for the groups of a plan that stay inside the nodes (struct ry_plan's `inside`): NCCL gives
 * a pair of ranks more channels there than on one that spans nodes. Whether it is used must be the same on all ranks of the node.
 */
struct ry_run_node {
    const int *local;     /* [nranks of the job's]: each rank's number there; -1: of another node. NULL for plans by replica: it has the
                             ranks of the twins at this position, and the peers in those groups are its ranks */
    int twins;            /* local NULL: so many */
    _Atomic(void *) comm; /* NULL: there is none, or it is being aborted */
    _Atomic int users;    /* groups that are being enqueued on it now: whoever sets comm to NULL may wait for them */
};

/**
 * This rank sends itself `bytes` bytes, `from` to `to`, by everything that a plan may go over: the job's communicator, the node's and the
 * stream for steps beside the others, where there are such. No other rank has a part in it: it ends on `stream` unless something on this
 * rank's own device keeps it from running. Errors as ry_run()'s.
 */
int ry_run_to_itself(struct ry_runner *runner, struct ry_run_node *node, int rank, const void *from, void *to, uint64_t bytes,
                     void *stream, int *result, struct ry_err *err);

/**
 * A plan by replica, which is in the numbers of all twins' ranks together (plan.h), becomes one in those of the communicators that
 * it goes over: its twin's own, and that of the twins at its position. For ry_run(), with a `node` as just said.
 */
void ry_run_localize(struct ry_plan *plan, int replicas);

/** What carries transfers between nodes in the exchanges from here on (cross.h); NULL, as at first: NCCL. The same on all ranks in each
 *  exchange. Verify mode's second run is NCCL's alone. */
void ry_run_cross(struct ry_runner *runner, struct ry_cross *cross);

/**
 * Enqueue the plan, whose stage_bytes must be held. `node`: NULL, or where its groups inside the node go; if that was taken
 * away, the result is ncclSystemError. 0: enqueued, *result is the first ncclResult_t that was not ncclSuccess, or 0.
 * -1 with `err`: the device refused a copy or the plan does not fit, and the stream is in an unknown state: the caller must make the
 * job's call fail, since the other ranks go on.
 */
int ry_run(struct ry_runner *runner, const struct ry_plan *plan, const struct ry_buffers *b, struct ry_run_node *node, int *result,
           struct ry_err *err);

/**
 * The same, then the exchange once more directly, all of it on the job's communicator, into scratch memory, and a comparison
 * on the device. All ranks do this for the
 * same exchange (the verdict says so), since the second run needs all of them. Where scratch cannot be had on a rank, that rank receives the
 * second run into its own receive buffers and its comparison is skipped (said once). `number` names the exchange in the answer.
 */
int ry_run_verify(struct ry_runner *runner, const struct ry_plan *plan, const struct ry_buffers *b, struct ry_run_node *node,
                  uint64_t number, int *result, struct ry_err *err);

struct ry_mismatch {
    uint64_t number;
    int peer;        /* whose bytes differ */
    uint64_t offset; /* of the first differing byte in that segment */
};
/** Comparisons finished since the last call: *equal more were equal. True if one was not: *bad tells. Also true, with peer -1, if a
 *  packed message, or an index list that was kept, turned out to be damaged (verified or not); this was said in a warning then. Never blocks. */
bool ry_run_checks(struct ry_runner *runner, uint64_t *equal, struct ry_mismatch *bad);

#endif
