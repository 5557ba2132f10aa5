/*
 * group.h: what one thread has put into its current NCCL group.
 *
 * Owns: the per-thread capture, and the decision whether the group was an exchange: exactly one send to and one receive
 * from every rank of one communicator on one stream, zero counts too, or one ncclAlltoAll, and nothing else. Also the
 * counts of calls per communicator. Not: calling NCCL, nor the engine (preload.c).
 *
 * A communicator that is only watched has its calls passed on at once, in the job's order: capturing just notes them.
 * One whose face says `hold` has them kept back as long as the group may still become an exchange; the moment it
 * cannot, ry_group_no_exchange passes on what was held, before the call that spoilt it. Nothing here locks; memory is
 * allocated when a thread meets a larger communicator than before.
 */
#ifndef RY_PLUGIN_GROUP_H
#define RY_PLUGIN_GROUP_H

#include "comms.h"
#include "nccl_abi.h"

enum ry_capture {
    RY_CAPTURE_EMPTY,
    RY_CAPTURE_P2P,  /* only p2p so far, of one communicator and stream, no peer twice */
    RY_CAPTURE_CALL, /* one ncclAlltoAll */
    RY_CAPTURE_MIXED /* something else: no exchange */
};

/* Element [0] of the arrays is about sends, [1] about receives. */
struct ry_group {
    int depth;  /* of the job's ncclGroupStart */
    int inside; /* > 0: this thread is in the real NCCL, whose own calls of public functions only pass */
    enum ry_capture capture;
    void *nccl;           /* the communicator of the group's first call */
    void *latest;         /* that of the thread's latest exchange; NULL: there was none */
    uint64_t exchanges;   /* of the thread so far */
    struct ry_comm *comm; /* its entry, with a reference; NULL if it is not followed */
    void *stream;
    bool hold;    /* its face said so at the group's first call: calls are kept back while this may be an exchange */
    bool strayed; /* the engine knows of p2p of `comm` in this group that is no exchange */
    int held;     /* calls kept back: the first of `order`, or one ncclAlltoAll */
    ncclResult_t failed; /* of the first held call that NCCL refused when it was passed on at last */
    int calls[2];       /* noted since the last tally */
    uint64_t bytes[2];
    bool mixed_types;
    int type;
    uint32_t epoch; /* of this group: named[d][r] == epoch says that r was named */
    int capacity;   /* ranks that the arrays hold */
    uint32_t *named[2];
    uint64_t *count[2];
    void **buf[2];
    uint8_t *peer_type[2];
    uint64_t *scaled[2]; /* counts in bytes, where types are mixed */
    uint32_t *order;     /* the group's sends (2 * peer) and receives (2 * peer + 1) in the job's order */
    int ordered;
    /* communicators made in this group: their handles are written by NCCL until the group has ended */
    struct ry_birth_note *births;
    int nbirths, births_capacity;
};

/* A communicator that is being made. */
struct ry_birth_note {
    ncclComm_t *where;
    struct ry_comm *parent; /* with a reference, or NULL */
    enum ry_birth birth;
    int nranks, rank, device; /* -1: to be asked for */
    uint32_t ordinal;
    int color;
    bool blocking, has_id, has_name;
    bool late; /* child of a non-blocking one: its group is over, yet NCCL has still to write its handle */
    uint8_t unique_id[RY_NCCL_ID_BYTES];
    char name[64];
};

extern __thread struct ry_group ry_group __attribute__((tls_model("initial-exec")));

/** railyard_pause(): nothing is kept back, and the engine is only told of what other ranks may wait for. */
extern _Atomic int ry_group_paused;

/**
 * Implemented by who calls NCCL and the engine (preload.c). p2p of g->comm turned out to belong to no exchange, while
 * its calls were held or the engine wants them held: tell the engine if `tell`, pass on what is held (ry_group_replay).
 */
void ry_group_no_exchange(struct ry_group *g, bool tell);
/** Does the engine want the calls of this communicator held? */
bool ry_group_wanted(const struct ry_comm *comm);

/* After each of these: with g->held > 0 the call is kept back and must not be passed on; with g->failed set one that
   was held failed, and this one must return that instead. */
/** Note a send (direction 0) or receive (1). */
void ry_group_p2p(struct ry_group *g, int direction, const void *buf, size_t count, int type, int peer, ncclComm_t comm,
                  cudaStream_t stream);
/** Note an ncclAlltoAll. */
void ry_group_alltoall(struct ry_group *g, const void *send, void *recv, size_t count, int type, ncclComm_t comm,
                       cudaStream_t stream);
/** Note any other call: the group is no exchange. */
void ry_group_other(struct ry_group *g);
/** Give every held call to `pass`, in the job's order, until one fails; none is held afterwards. Direction 2: the
 * ncclAlltoAll. */
ncclResult_t ry_group_replay(struct ry_group *g,
                             ncclResult_t (*pass)(const struct ry_group *g, int direction, int peer));
/**
 * The outermost group is about to end. If it is an exchange, `x` describes it (pointing into `g`, valid until
 * ry_group_reset) and g->comm is its communicator: true. If it is none, what was held has been passed on.
 */
bool ry_group_exchange(struct ry_group *g, struct ry_exchange *x);
/** Forget the group: after it has ended. */
void ry_group_reset(struct ry_group *g);

/** A place for a communicator made in this thread; NULL when out of memory. */
struct ry_birth_note *ry_group_birth(struct ry_group *g);

#endif
