/*
 * emu.h: the parts of the emulated NCCL and what they know of each other.
 *
 *   api.c         the exported functions: argument checks, then a call into one of the parts below
 *   group.c       groups, and running a batch of operations until all are done
 *   collective.c  collectives as phases of sends and receives
 *   reduce.c      arithmetic of all NCCL types
 *   comm.c        communicators: making, splitting, failing, ending
 *   bootstrap.c   the first meeting of the ranks, over TCP
 *   transfer.c    matching sends with receives, moving the bytes, holding them back for the virtual links
 *   wire.c        the UCX worker, its thread that sleeps, endpoints, timers
 *   links.c       the virtual links
 *   capture.c     streams being captured: operations put off until their graph is launched
 *
 * Threads and the one lock: everything marked [lock] is called with ry_emu_lock held, which guards all shared state,
 * UCX included. Callers wait on their batch's condition variable; the one thread of wire.c sleeps in epoll. Nothing
 * spins: 16 ranks must live on 2 cores.
 *
 * Streams are host memory's: an operation is complete when the outermost ncclGroupEnd (or the ungrouped call) returns,
 * and the stream argument is ignored, unless that stream is being captured (capture.h).
 */
#ifndef RY_EMU_H
#define RY_EMU_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <nccl.h>

#include "links.h"

/* Sends and receives are matched in order per pair of ranks within one channel of a communicator. */
enum ry_emu_channel { RY_EMU_P2P, RY_EMU_COLLECTIVE, RY_EMU_CONTROL, RY_EMU_CHANNELS };

struct ry_emu_proc; /* a process that holds ranks; wire.c */
struct ry_emu_req;  /* one send or receive; transfer.c */
struct ry_emu_cts;  /* "clear to send": a peer's receive that no send of ours has met yet; transfer.c */
struct ry_emu_batch;

struct ry_emu_lane {
    uint64_t sends, recvs;      /* how many were posted */
    struct ry_emu_req *waiting; /* sends that no receive has met yet */
    struct ry_emu_cts *ready;
};

struct ry_emu_peer {
    struct ry_emu_proc *proc;
    uint64_t node_key, gpu_key;
    struct ry_emu_link *nic, *gpu; /* NULL: unshaped */
    int pid, device;
    char node[64];
    bool met;      /* something went to or came from it on this communicator */
    bool departed; /* it has ended the communicator: its process may go */
    struct ry_emu_lane lane[RY_EMU_CHANNELS];
};

#define RY_EMU_COMM_MAGIC UINT64_C(0x6d6d6f63756d6572)

struct ry_emu_redop {
    bool used, on_device; /* on_device: read the scalar when it is used */
    ncclDataType_t type;
    const void *where;
    uint64_t value; /* the scalar's bytes */
};

struct ncclComm {
    uint64_t magic;
    uint64_t uid; /* the same on all ranks */
    int rank, nranks, device;
    bool blocking;
    char name[64];
    struct ry_emu_peer *peers; /* NULL until ready */
    ncclResult_t state;        /* async error: success, in progress, or what went wrong */
    char error[320];
    atomic_bool aborted; /* read without the lock while the ranks first meet */
    bool revoked, finalized;
    int users; /* batches and jobs at work on it; it is freed when none is left */
    struct ry_emu_redop *ops;
    int nops;
    struct ncclComm *next; /* all that are ready */
};

/* ---- errors ---- */

/** Remember `fmt` as this thread's last error (and print it where NCCL_DEBUG is set); returns `result`. */
ncclResult_t ry_emu_error(ncclResult_t result, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
const char *ry_emu_last_error(void);

/* ---- wire.c ---- */

extern pthread_mutex_t ry_emu_lock;

struct ry_emu_address {
    uint64_t proc; /* random, one per process */
    uint32_t len;
    const void *worker;
};

/** Start the worker and its thread, once per process. Not under the lock. */
ncclResult_t ry_emu_wire_start(struct ry_emu_address *mine);
/** Fails in a forked child of a process whose transport had started. */
ncclResult_t ry_emu_wire_usable(void);
/** [lock] The process of that address, connected. NULL on failure. */
struct ry_emu_proc *ry_emu_wire_proc(const struct ry_emu_address *address);
bool ry_emu_proc_is_self(const struct ry_emu_proc *proc);
/** [lock] NULL while it lives, else why it is held dead. */
const char *ry_emu_proc_dead(const struct ry_emu_proc *proc);
/** [lock] Cut the connection: everything in flight with it completes with an error. */
void ry_emu_proc_kill(struct ry_emu_proc *proc, const char *why);
/** [lock] Let UCX and the timers do what can be done now, and arm the wake-up for what cannot. */
void ry_emu_wire_drive(void);

/** Wait (2 s at most) until what was sent has left this process. Not under the lock. */
void ry_emu_wire_flush(void);

enum ry_emu_am { RY_EMU_AM_CTS = 1, RY_EMU_AM_DATA, RY_EMU_AM_REFUSE };
/** [lock] Send header (copied) + payload (borrowed until done). done(arg, ok) is called once, perhaps at once. */
void ry_emu_wire_send(struct ry_emu_proc *to, enum ry_emu_am id, const void *header, size_t header_bytes,
                      const void *payload, size_t bytes, void (*done)(void *arg, bool ok), void *arg);
/** [lock] Take the payload of an incoming message that did not come with it. */
void ry_emu_wire_take(void *handle, void *into, size_t bytes, void (*done)(void *arg, bool ok), void *arg);

struct ry_emu_timer {
    uint64_t when;
    void (*fire)(struct ry_emu_timer *timer);
    size_t place; /* in the heap, from 1; 0: not set */
};
/** [lock] Set or move; fire() is called under the lock, once. */
void ry_emu_timer_set(struct ry_emu_timer *timer, uint64_t when);
void ry_emu_timer_stop(struct ry_emu_timer *timer);

/* ---- transfer.c ---- */

struct ry_emu_op;

struct ry_emu_req {
    /* filled by who posts */
    struct ry_emu_op *op;
    bool is_send;
    int peer;
    char *buf;
    size_t bytes;
    /* transfer.c's */
    uint64_t seq, id; /* id: the receiver's name for it */
    struct ry_emu_req *next;
    struct ry_emu_timer timer;
    size_t offset; /* handed to the wire, or arrived */
    uint64_t flow; /* when the flow's next bytes may start */
    uint64_t hold; /* not complete before */
    int in_flight; /* UCX still uses buf */
    bool matched, touched, cancelled, done;
};

/** [lock] Post; the op's `pending` falls by one when it is done. */
void ry_emu_post(struct ry_emu_req *req);
/** [lock] Give up on it; it is done when UCX has let go of its buffer. */
void ry_emu_cancel(struct ry_emu_req *req);
/** [lock] Messages that came before the communicator was known here. */
void ry_emu_replay(struct ncclComm *comm);
/** [lock] Tell the peers that this rank ends the communicator, so that its process going away is no failure to them. */
void ry_emu_say_goodbye(struct ncclComm *comm);
/** [lock] Forget what peers said about a communicator that ends. */
void ry_emu_forget(struct ncclComm *comm);
/** [lock] wire.c calls these. */
void ry_emu_on_cts(const void *header, size_t bytes);
void ry_emu_on_refuse(const void *header, size_t bytes);
/** payload: the bytes, or with `rndv` a handle for ry_emu_wire_take(). True when the handle was taken. */
bool ry_emu_on_data(const void *header, size_t header_bytes, void *payload, size_t bytes, bool rndv);

/* ---- group.c, collective.c ---- */

enum ry_emu_kind {
    RY_EMU_SEND,
    RY_EMU_RECV,
    RY_EMU_ALLTOALL,
    RY_EMU_ALLGATHER,
    RY_EMU_ALLREDUCE,
    RY_EMU_REDUCESCATTER,
    RY_EMU_REDUCE,
    RY_EMU_BROADCAST,
    RY_EMU_GATHER,
    RY_EMU_SCATTER,
};

struct ry_emu_op {
    enum ry_emu_kind kind;
    struct ncclComm *comm;
    const void *send;
    void *recv;
    size_t count;
    ncclDataType_t type;
    void *stream; /* only told from others, for capturing */
    ncclRedOp_t redop; /* a built-in one; a PreMulSum is a sum with a scalar */
    bool scaled;
    struct ry_emu_redop scalar;
    int root; /* or the peer */
    enum ry_emu_channel channel;
    const int *members; /* CONTROL all-gathers among some ranks only (ascending); NULL: all */
    int nmembers;
    bool survive; /* goes on though the communicator has failed or was revoked, as long as its own peers live */
    /* while it runs */
    int phase;
    bool last; /* no phase follows */
    char *scratch;
    struct ry_emu_req *reqs, one; /* reqs: &one for p2p */
    int nreqs, pending;
    bool over;
    ncclResult_t result;
    struct ry_emu_batch *batch;
};

struct ry_emu_batch {
    struct ry_emu_op *ops;
    int nops, open;
    bool wake, failing;
    pthread_cond_t cond;
    struct ry_emu_batch *next;
};

/** Prepare the next phase: fill reqs (not posted). Local copies and sums happen here, without the lock. */
ncclResult_t ry_emu_prepare(struct ry_emu_op *op);
void ry_emu_op_free(struct ry_emu_op *op);
/** Run now, wait for all. The first failure is the result. Any thread, not under the lock. */
ncclResult_t ry_emu_run(struct ry_emu_op *ops, int nops);
/** [lock] One request of `op` is done. */
void ry_emu_op_progress(struct ry_emu_op *op);
/** [lock] Is anybody here still waiting for something from `peer`? */
bool ry_emu_waits_for(const struct ncclComm *comm, int peer);
/** [lock] A communicator failed: whoever waits shall look. */
void ry_emu_wake_all(void);
/** [lock] A job or batch leaves `comm`; and the wait until all have. */
void ry_emu_release(struct ncclComm *comm);
void ry_emu_wait_users(struct ncclComm *comm);
/** Queue in this thread's group, or run at once outside of one. */
ncclResult_t ry_emu_submit(const struct ry_emu_op *op);

/* ---- capture.c ---- */

/** Take those operations away whose stream is being captured; returns how many are left, at the beginning of `ops`. */
int ry_emu_capture(struct ry_emu_op *ops, int nops);

/* ---- jobs ---- */

/* Making of communicators, perhaps put off to the end of the group. */
struct ry_emu_job {
    ncclResult_t (*run)(struct ry_emu_job *job);
    struct ncclComm *comm;   /* to be made */
    struct ncclComm *parent; /* or NULL */
    ncclComm_t *out;
    ncclUniqueId id;
    int color, key;
    int *exclude, nexclude, flags;
    bool detached; /* not waited for */
    ncclResult_t result;
    struct ry_emu_job *next;
};
ncclResult_t ry_emu_submit_job(struct ry_emu_job *job); /* takes ownership */

ncclResult_t ry_emu_group_start(void);
ncclResult_t ry_emu_group_end(void);
bool ry_emu_group_active(void);
void ry_emu_group_fail(ncclResult_t result);
int ry_emu_group_drop(void); /* closes the innermost group without running it; returns the number of operations */

/* ---- comm.c ---- */

/** [lock] Mark failed and wake whoever waits on it. */
void ry_emu_comm_fail(struct ncclComm *comm, ncclResult_t result, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/** [lock] All communicators that reach into `proc` fail. */
void ry_emu_proc_lost(struct ry_emu_proc *proc, const char *why);
struct ncclComm *ry_emu_comm_find(uint64_t uid, int rank); /* [lock] */
struct ncclComm *ry_emu_comm_first(void);                  /* [lock] head of the list of the ready ones */
/** A communicator that is not ready yet. NULL: no memory. */
struct ncclComm *ry_emu_comm_new(int rank, int nranks, int device, bool blocking, const char *name);
/** Jobs that make them. */
ncclResult_t ry_emu_job_init(struct ry_emu_job *job);
ncclResult_t ry_emu_job_split(struct ry_emu_job *job);
ncclResult_t ry_emu_job_shrink(struct ry_emu_job *job);
/** End it, after waiting for whoever is at work on it; `abort` makes them stop. */
void ry_emu_comm_end(struct ncclComm *comm, bool abort);
void ry_emu_comm_revoke(struct ncclComm *comm);
/** [lock] Why `op` cannot go on: success while it can. */
ncclResult_t ry_emu_comm_check(const struct ry_emu_op *op);

/* ---- bootstrap.c ---- */

extern const int ry_emu_nccl_version; /* version.c, one per variant of the library */

/** Make an id and start serving it. Up to 2.22 only its first bytes are written, since then the rest is cleared. */
ncclResult_t ry_emu_bootstrap_id(ncclUniqueId *id);
/** Swap one record per rank. *all (the caller frees it): for each a uint32 length and its bytes, padded to 8. */
ncclResult_t ry_emu_bootstrap_swap(const ncclUniqueId *id, int rank, int nranks, const void *mine, uint32_t bytes,
                                   const atomic_bool *aborted, char **all);
uint64_t ry_emu_bootstrap_uid(const ncclUniqueId *id);

/* ---- reduce.c ---- */

size_t ry_emu_type_bytes(ncclDataType_t type); /* 0: no such type */
/** dst[i] = src[0][i] op src[1][i] ...; scalar != NULL: every input is multiplied by it first (op is a sum then). */
void ry_emu_reduce(void *dst, const void *const *src, int n, size_t count, ncclDataType_t type, ncclRedOp_t op,
                   const void *scalar);

#endif
