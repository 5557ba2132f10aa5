/*
 * verify_internal.h: what the verifier's two files share: verify_plan.c looks at each plan by itself, verify.c at all
 * together.
 */
#ifndef RY_PLAN_VERIFY_INTERNAL_H
#define RY_PLAN_VERIFY_INTERNAL_H

#include "verify.h"

/* A byte of a send buffer: `off` into segment `seg`; where addresses are known, seg is -1 and `off` the address, so
   that it does not matter by which segment it was reached. */
struct token {
    int rank, seg;
    uint64_t off;
};
struct span { /* [lo, hi) of some memory holds the bytes from `token` on */
    uint64_t lo, hi;
    struct token token;
};
struct spans { /* sorted, apart from each other */
    struct span *v;
    size_t n, cap;
};

struct machine {
    int n;
    const uint64_t *matrix;
    struct ry_plan *const *plans;
    const uintptr_t *const *send_at, *const *recv_at;
    struct ry_err *err;

    /* Receive segments that are not empty, by rank, then peer: which peer, what of it is written. */
    size_t *seg_start; /* [n + 1] */
    int *seg_from;
    struct spans *seg;
    struct spans *stage; /* [n] */

    /* Transfers, by rank, then step. */
    size_t *first; /* [n + 1] */
    struct transfer {
        int rank, step;
        bool started;
        size_t partner;
    } * transfers;

    /* The machine. */
    struct state {
        int step;    /* next to do; of a group: its first */
        int end;     /* one past the group that is running */
        size_t next; /* transfer of that step */
        size_t left; /* transfers of the running group that have not met their partner */
    } * states;
    int *queue, head, queued;

    struct span *pieces; /* scratch: what a transfer or copy carries, lo and hi counted from its start */
    size_t npieces, pieces_cap;
    struct touch *touches; /* scratch of verify_plan.c */
    size_t touches_cap;
};

struct text {
    char s[160];
};
/* "rank 3, step 7 (group 1: receive 4096 bytes from rank 2)" */
struct text ry_verify_name(const struct machine *m, int rank, int step);

/** Grow the array at `v` (a pointer to a pointer), of `*cap` elements of `each` bytes, to hold `want`. */
int ry_verify_room(struct machine *m, void *v, size_t *cap, size_t want, size_t each);

/** A plan's form, its ranges, and what its groups touch. Nothing about other ranks. */
int ry_verify_plan(struct machine *m, int rank);

/*
 * Takes the next part of [*at, + *left) that lies in one segment of the send or receive buffer: returns its length and
 * moves on both; *seg and *offset tell where it is. 0: it runs over the end of the segment, with nothing behind it.
 */
uint64_t ry_verify_part(const struct machine *m, int rank, struct ry_at *at, uint64_t *left, int *seg,
                        uint64_t *offset);

static inline uint64_t segment_bytes(const struct machine *m, enum ry_place place, int rank, int peer)
{
    size_t from = (size_t)(place == RY_AT_SEND ? rank : peer), to = (size_t)(place == RY_AT_SEND ? peer : rank);
    return m->matrix[from * (size_t)m->n + to];
}

/* Addresses of a rank's segments; NULL: unknown, and they all lie apart. */
static inline const uintptr_t *addresses(const struct machine *m, enum ry_place place, int rank)
{
    const uintptr_t *const *at = place == RY_AT_SEND ? m->send_at : m->recv_at;
    return at ? at[rank] : NULL;
}

static inline int no_memory(struct machine *m)
{
    return ry_fail(m->err, "verifying a plan: no memory");
}

#endif
