/*
 * verify_internal.h: what the verifier's files share: verify_plan.c looks at each plan by itself, verify.c at all
 * together, verify_rows.c knows packed messages, verify_sum.c sums, verify_overlap.c plans in two parts.
 */
#ifndef RY_PLAN_VERIFY_INTERNAL_H
#define RY_PLAN_VERIFY_INTERNAL_H

#include "verify.h"

/* A byte of a send buffer: `off` into segment `seg`; where addresses are known, seg is -1 and `off` the address, so
   that it does not matter by which segment it was reached. Lower ones stand for other bytes of packed messages. */
struct token {
    int rank, seg;
    uint64_t off;
};
/* `seg` of tokens that are no bytes of a send buffer. By a token's rank and a node: of the message of rows that went
   that way. */
#define FILLED_IN (-2)
enum {
    LIST_OF_ROWS, /* its index list; `off` bytes into it */
    SUMS,         /* of what came back for its distinct rows; `off` bytes into those */
    LIST_OF_SUMS, /* the index list of the message with the sums */
    ZEROS,        /* whatever `off` is */
    SORTS
};
#define SEG(sort, node) (-3 - (sort)-SORTS * (node))
#define SORT_OF(seg) ((-3 - (seg)) % SORTS)
#define NODE_OF(seg) ((-3 - (seg)) / SORTS)

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
    const struct ry_cluster *cluster;
    const uint64_t *matrix;
    struct ry_plan *const *plans;
    const uintptr_t *const *send_at, *const *recv_at;
    struct ry_err *err;

    int replicas; /* twin communicators in it; 0: none */

    /* Rows, where it is known which are equal. */
    const struct ry_row_map *maps;
    const uint64_t *went; /* [n * n] bytes of the exchange whose rows these are: `matrix`, or the one that it returns */
    bool sums;            /* it returns one, and plans may add up rows */
    struct packed {
        const struct ry_row_map *map;
        uint64_t rows;
        uint32_t *number;  /* [rows], as they are listed: which of the distinct rows */
        bool summed;       /* sums: what comes back for them */
    } * packed;            /* [n * nnodes] */
    uint64_t *rows_before; /* [n * n] */

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

struct text ry_verify_token_name(struct token is);

/* Everything, by m->n, cluster, matrix, plans, addresses, err and the rows; frees what it makes. */
int ry_verify_all(struct machine *m);
/* The same, and what follows from the maps. */
int ry_verify_with_rows(struct machine *m);

/* Once more, for plans whose second part may overlap the first, in another order; after they were found right as
 * listed. */
int ry_verify_early(const struct machine *as_listed);

/** Append to m->pieces. */
int ry_verify_piece(struct machine *m, uint64_t bytes, struct token token);
/** Append what is in staging memory of `rank`. */
int ry_verify_stage(struct machine *m, int rank, int step, uint64_t offset, uint64_t bytes);

/* Of packed messages: a step's form; */
int ry_verify_row_step(struct machine *m, int rank, int step);
/* what it writes, into m->pieces; */
int ry_verify_pack(struct machine *m, int rank, int step);
int ry_verify_expand(struct machine *m, int rank, int step);
int ry_verify_sum(struct machine *m, int rank, int step);
/* is what a rank receives, m->pieces, the message that its step says it is? */
int ry_verify_message(struct machine *m, int rank, int step);
/* how many bytes from `t` on are as good as those from `offset` on of what `from` sends to `to`, the next row left
 * aside; */
uint64_t ry_verify_equal(const struct machine *m, struct token t, int from, int to, uint64_t offset);
/* the same where what `from` sends to `to` is summed; is it? */
uint64_t ry_verify_summed(const struct machine *m, struct token t, int from, int to, uint64_t offset);
bool ry_verify_sums(const struct machine *m, int from, int to);
/* What is beyond the form of a step that adds up. */
int ry_verify_sum_step(struct machine *m, int rank, int step);
/* a token with a segment below -1. */
struct text ry_verify_packed_name(struct token t);

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

static inline struct token sent(const struct machine *m, int from, int to, uint64_t offset)
{
    const uintptr_t *at = addresses(m, RY_AT_SEND, from);
    return at ? (struct token){from, -1, at[to] + offset} : (struct token){from, to, offset};
}

static inline struct token token_after(struct token t, uint64_t bytes)
{
    t.off += bytes;
    return t;
}

static inline bool same(struct token a, struct token b)
{
    return a.rank == b.rank && a.seg == b.seg && a.off == b.off;
}

/* Are the bytes at `is` those that a twin of `from` sends at `offset` to the same twin of `to`? */
static inline bool from_twin(const struct machine *m, struct token is, int from, int to, uint64_t offset)
{
    if (m->replicas < 2)
        return false;
    int each = m->n / m->replicas;
    return is.rank % each == from % each && same(is, sent(m, is.rank, is.rank / each * each + to % each, offset));
}

static inline struct packed *packed(const struct machine *m, int from, int node)
{
    return &m->packed[(size_t)from * (size_t)m->cluster->nnodes + (size_t)node];
}

/* Rows of what `from` sends to ranks below `to` on `to`'s node. */
static inline uint64_t *rows_before(const struct machine *m, int from, int to)
{
    return &m->rows_before[(size_t)from * (size_t)m->n + (size_t)to];
}

static inline uint64_t went(const struct machine *m, int from, int to)
{
    return m->went[(size_t)from * (size_t)m->n + (size_t)to];
}

static inline int no_memory(struct machine *m)
{
    return ry_fail(m->err, "verifying a plan: no memory");
}

#endif
