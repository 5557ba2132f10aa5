/*
 * plan.h: a verdict turned into steps, as data.
 *
 * Owns: what a plan is, building one rank's plan for a strategy, and the parts of the matrix that it needs. Not: choosing
 * the strategy (cost.h), carrying a plan out (run/), how a rank learns the matrices (control/agree.h). No I/O, no clock, no
 * device here: a plan is a pure function of (cluster map, counts, strategy, addresses), so that the same steps can be
 * run on GPUs, run on host memory, verified (verify.h), costed, simulated and explained.
 *
 * Words: the cluster map numbers nodes and gives each rank its local index on its node (topo/cluster.h). All counts are
 * bytes. "Segment p of the send buffer" is what this rank sends to rank p in the job's exchange, wherever it lies.
 *
 * Strategies:
 *   direct        what plain NCCL does: one group, one message for every pair of ranks.
 *   hierarchical  rank (n, l) sends node m one message with everything for m's ranks, to its relay there: the rank with
 *                 local index l mod size(m), which is rank l of the same rail where nodes are alike. The relay passes each
 *                 piece on inside its node. Messages across nodes: one per remote node instead of one per remote rank.
 *                 In-node segments go directly.
 *   balanced      what node a has for node b is spread evenly over a's ranks first, inside the node, so that every rail carries
 *                 as much; then it crosses, evenly to b's ranks, in stages, in each of which a node sends to at most one node and gets
 *                 from at most one (birkhoff.h); last it is passed on inside b. A group each: spreading, the stages, passing on; if
 *                 there are more than 32 stages, neighbours share a group.
 *                 In-node segments go beside the longest stage.
 *   dedup         hierarchical, but what a rank sends to a node is cut into rows, and of equal rows only one crosses: the
 *                 packed message of run/rows.h, for every message where that is shorter (ry_packs()). The relay hands the
 *                 packed message on to those ranks of its node for which that is shorter than their rows, and writes
 *                 out the rows of the others; whoever holds the message writes its own rows straight into place.
 *                 In several `chunks`, a message of as many parts crosses part by part, each in a group of its own, and what
 *                 one brought is passed on inside the node while the next crosses. Each part has rows for all ranks of the
 *                 node, so that all of them are at work all the time. Other messages go with the first.
 *   sum           of an exchange C that returns what an earlier one D brought by dedup, one row back for each and in the same
 *                 order, where the receiver only adds up the rows that are copies of one: for every pair of a rank s and a
 *                 node n for which D packed a message, the ranks of n give their rows for s to D's relay there, which adds up
 *                 those that D's index list calls equal and sends s a packed message with the sums and one row of zeros: a
 *                 sum comes in the place of the first of its rows, zeros in the place of the others. Everything else goes
 *                 directly. It is never chosen by its cost, nor asked for by name: who knows what the job does with the rows
 *                 decides (engine/). RY_STRATEGIES counts it; those that can be chosen are below RY_SUM.
 *
 * Thread-safety: everything is a function of its arguments; a plan is read-only once built.
 */
#ifndef RY_PLAN_PLAN_H
#define RY_PLAN_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"
#include "cluster.h"

enum ry_strategy { RY_DIRECT, RY_HIERARCHICAL, RY_BALANCED, RY_DEDUP, RY_SUM, RY_STRATEGIES };
const char *ry_strategy_name(enum ry_strategy s);
/** -1 for a name that cannot be asked for; the error lists those that can. */
int ry_strategy_parse(const char *name, enum ry_strategy *out, struct ry_err *err);

/** The relay on `node` for what rank `from` (of another node) sends to that node's ranks. */
int ry_relay(const struct ry_cluster *cluster, int from, int node);

/*
 * What a rank found (run/rows.h) among what it sends to the ranks of one other node: taken segment by segment in ascending
 * rank, each cut into rows of row_bytes, the last of a segment perhaps shorter, so many rows differ from all before them.
 * Whatever the numbers, a plan is right as long as all ranks build theirs from the same ones.
 */
#define RY_CHUNKS 4 /* that plans may be in, and parts that messages may be made of: 1, 2 or 4 */
struct ry_repeats {
    uint64_t row_bytes; /* 0: it did not look; the message goes as it is */
    uint64_t distinct;
    /*
     * Parts that the rows were taken in, 0: 1. Part p has, of the rows of each segment, those from ry_part_at(rows, p, parts)
     * on: the first parts of all segments come first, in ascending rank, then the second ones, and so on. In that order
     * rows are listed in the message, and equal to those before them. early[p]: the distinct rows of the first p + 1 parts.
     */
    uint64_t parts, early[RY_CHUNKS - 1];
};
static inline int ry_parts(const struct ry_repeats *r)
{
    return r->parts > 1 ? (int)r->parts : 1;
}
/** Where part `i` of `parts` begins among the rows of a segment. */
static inline uint64_t ry_part_at(uint64_t rows, int i, int parts)
{
    return rows / (unsigned)parts * (unsigned)i + rows % (unsigned)parts * (unsigned)i / (unsigned)parts;
}
/** How many distinct rows there are before part `i`. */
static inline uint64_t ry_part_distinct(const struct ry_repeats *r, int i)
{
    return !i ? 0 : i == ry_parts(r) ? r->distinct : r->early[i - 1];
}
/** Rows of a segment: whole ones and the rest. */
static inline uint64_t ry_rows_of(uint64_t bytes, uint64_t row_bytes)
{
    if (!((bytes | row_bytes) >> 32)) /* the shorter division is several times as fast, and there are many of them */
        return (uint32_t)bytes / (uint32_t)row_bytes + ((uint32_t)bytes % (uint32_t)row_bytes != 0);
    return bytes / row_bytes + (bytes % row_bytes != 0);
}
/** Bytes of the packed message: distinct rows, 16-byte alignment, a uint32_t for each of `rows`. */
uint64_t ry_packed_bytes(struct ry_repeats repeats, uint64_t rows);
/** Does a message of `bytes` in `rows` rows go packed? The same answer for sender, relay and receiver. */
bool ry_packs(struct ry_repeats repeats, uint64_t rows, uint64_t bytes);

/*
 * The part of the byte matrix, beyond a rank's own row and column, that its plan depends on: cells (from, to) for `from` in
 * rows and `to` in cols, both ascending. For hierarchical: rows = the remote ranks that this rank relays for, cols = its
 * node's ranks; empty for a rank that is alone on its node. For dedup: rows = all remote ranks, cols = its node's ranks, and
 * what each row's rank found among what it sends to this node. The yardmaster sends each rank just these. For sum: none; its
 * plan is built from the slice that D's was. For balanced: rows and cols as for dedup, and `words`: what each of its node's ranks
 * sends to each node, and its node's part in each stage. In all 8 bytes * (W S + S N + 9 N) of W ranks, N nodes, S on its own.
 */
struct ry_slice {
    int nrows, ncols;
    int *rows, *cols;
    uint64_t *cells;            /* [nrows][ncols], bytes */
    struct ry_repeats *repeats; /* [nrows]; NULL but for dedup */
    size_t nwords;
    uint64_t *words; /* balanced, and only its file knows what they say; equal on all ranks of a node */
};
/** Which cells rank `rank` needs; `cells` and `repeats` are allocated and zero. Freed by ry_slice_free(). -1 when out of memory. */
int ry_slice_init(struct ry_slice *slice, const struct ry_cluster *cluster, int rank, enum ry_strategy strategy,
                  struct ry_err *err);
/** Fill in from the full matrix, matrix[from * nranks + to], and repeats[from * nnodes + node] (NULL: nobody looked). */
void ry_slice_fill(struct ry_slice *slice, const struct ry_cluster *cluster, const uint64_t *matrix,
                   const struct ry_repeats *repeats);
/** What the words of all ranks' slices are made of, to be found once for all of them; O(nranks^2 + nnodes^3). NULL with `err` when
 *  out of memory or if bytes add up to more than 62 bits. ry_slice_fill() does it for a single slice, which then has none where that
 *  fails, and no plan can be built from it. */
struct ry_balance *ry_balance_of(const struct ry_cluster *cluster, const uint64_t *matrix, struct ry_err *err);
void ry_balance_free(struct ry_balance *balance);
/** The words of the slices of a node's ranks: slice->nwords of them to `words`. */
void ry_balance_words(const struct ry_balance *balance, const struct ry_cluster *cluster, int node, uint64_t *words);
void ry_slice_free(struct ry_slice *slice);

struct ry_plan_input {
    const struct ry_cluster *cluster;
    int rank;
    enum ry_strategy strategy;
    const uint64_t *send, *recv; /* [nranks], bytes: this rank's row and column of the matrix */
    const struct ry_slice *slice; /* as ry_slice_init() laid it out, filled in; may be NULL for direct. Sum: that of D */
    /* Addresses of the segments, so that neighbours in memory can go without packing; NULL: assume all lie apart.
       They change which bytes are packed first, never what crosses the wire. */
    const uintptr_t *send_at, *recv_at;
    const struct ry_repeats *repeats; /* [nnodes], dedup: what this rank found itself; NULL: it did not look. Sum: in D */
    int chunks; /* dedup: 1 (or 0), 2 or 4, the same on all ranks. Where nothing is passed on there is one, whatever is asked */
};

/* Where bytes lie. */
enum ry_place {
    RY_AT_SEND,  /* `offset` bytes into segment `peer` of the send buffer (a step may run on into the next segments
                    where those follow in memory) */
    RY_AT_RECV,  /* the same of the receive buffer */
    RY_AT_STAGE, /* `offset` bytes into the staging memory of this plan; `peer` is -1 */
};
struct ry_at {
    enum ry_place place;
    int peer;
    uint64_t offset;
};

enum ry_step_kind { RY_STEP_COPY, RY_STEP_SEND, RY_STEP_RECV, RY_STEP_PACK, RY_STEP_EXPAND, RY_STEP_SUM, RY_STEP_KINDS };

/*
 * PACK: write the packed message for node `peer` to `to` (staging memory, 16-byte aligned): `bytes` is its length.
 * EXPAND: `from` is a packed message of rank `peer` in staging memory; write `bytes` bytes to `to` (its receive segment, or
 * staging memory for a rank that it is passed on to): the rows that entries skip, skip + 1, … of the index list name, the last
 * perhaps shorter.
 * SUM (of a message in one part): at `from` begin the rows that this node's ranks send to rank `peer` of another node, all of them whole, one rank's after
 * the other in ascending rank, `rows` rows of repeats.row_bytes: in staging memory, or this rank's send segment for `peer` where
 * all of them are its own (and aligned as the job's buffer is). `repeats` and `rows` are those of the message that `peer` packed
 * for this node in D, and row i belongs to the distinct row that entry i of that message's index list names: the runner
 * keeps it. Write to `to` (staging memory, 16-byte aligned, apart from `from`) a packed message for `peer`: for each of D's distinct
 * rows the sum of those that belong to it, a row of zeros, padding to 16 bytes, and the index list: for the first row of each distinct
 * row its sum, for the others the row of zeros, which is number `distinct`. `bytes` is its length, ry_packed_bytes() of distinct + 1
 * rows. `peer` EXPANDs it with `peer` the rank that wrote it and repeats of distinct + 1.
 */

/*
 * Steps are carried out in order, or in two orders side by side as struct ry_plan's `beside` allows. Consecutive SEND and RECV steps of the same `group` are one NCCL group: they start
 * together and none may depend on another. A step sees the results of all steps before it, other than those of its group.
 */
struct ry_step {
    enum ry_step_kind kind;
    int group;         /* transfers: 0, 1, …, ascending along the list; -1 for others */
    int peer;          /* the other rank of a transfer; PACK: a node; EXPAND: the message's sender; SUM: whom it is for; -1 for copies */
    struct ry_at to;   /* COPY, RECV, PACK, EXPAND, SUM */
    struct ry_at from; /* COPY, SEND, EXPAND, SUM */
    uint64_t bytes;    /* > 0; SUM: of the message written */
    int after;         /* of steps in the plan's second part (ry_second()): a group; else it means nothing */
    struct ry_repeats repeats; /* PACK, EXPAND: of the message; SUM: of D's. RECV, dedup, on the relay, of the index list, alone
                                  or with all of the message: of what `peer` packed, which begins at `from`; else zeros */
    uint64_t rows, skip;       /* PACK, RECV, SUM: rows of the message. EXPAND: its rows in all; entries of its index list before `to`'s */
};

static inline bool ry_is_transfer(const struct ry_step *step)
{
    return step->kind == RY_STEP_SEND || step->kind == RY_STEP_RECV;
}

/** Does group `group` stay inside the nodes? Such a group may go over a communicator of each node's ranks (run/run.h). */
static inline bool ry_inside(uint64_t inside, int group)
{
    return group >= 0 && group < 64 && (inside >> group & 1);
}

struct ry_plan {
    enum ry_strategy strategy;
    int rank, nranks;
    int ngroups;          /* equal on all ranks of the exchange, even where one has nothing to do in a group */
    uint64_t stage_bytes; /* staging memory needed */
    int nsteps;
    struct ry_step *steps;
    uint64_t inside; /* bit g: on no rank does group g hold a transfer between nodes; equal on all ranks */
    int beside;      /* so many steps at the end may also be carried out beside those before them, in their own order, each
                        once the groups up to its `after` are over; their groups all stay inside the nodes */
};
/** Where the second part begins, that may overlap the first; nsteps: there is none. */
static inline int ry_second(const struct ry_plan *plan)
{
    return plan->nsteps - plan->beside;
}

/**
 * Build rank `in->rank`'s plan. NULL with `err` when out of memory or if the input contradicts itself. O(nranks). Sum: O(cells)
 * where several ranks share a node, and refused as well where rows to be summed are cut short: row_bytes must divide every segment
 * of such a pair. All ranks that the pair has to do with see that, others do not.
 */
struct ry_plan *ry_plan_build(const struct ry_plan_input *in, struct ry_err *err);
void ry_plan_free(struct ry_plan *plan);

/**
 * Staging memory that a rank's plan needs, without building it: exactly ry_plan_stage_relay() + ry_plan_stage_pack().
 * The first is what it gets to relay or to write out, which only the full matrix tells (matrix[from * nranks + to],
 * repeats[from * nnodes + node] or NULL). The second is what it packs itself: its own row, addresses (NULL: all apart) and
 * repeats ([nnodes] or NULL), so known to it before the verdict; 0 where the pieces for each node are neighbours in the send
 * buffer and go as they are. UINT64_MAX when the counts add up to more than 64 bits. Nothing is allocated; O(nranks) where
 * the ranks of a node follow each other (dedup: times the node's ranks).
 */
uint64_t ry_plan_stage_relay(const struct ry_cluster *cluster, int rank, enum ry_strategy strategy, const uint64_t *matrix,
                             const struct ry_repeats *repeats);
uint64_t ry_plan_stage_pack(const struct ry_cluster *cluster, int rank, enum ry_strategy strategy, const uint64_t *send,
                            const uintptr_t *send_at, const struct ry_repeats *repeats);
/** Their sum, addresses not known: an upper bound. */
uint64_t ry_plan_stage_bytes(const struct ry_cluster *cluster, int rank, enum ry_strategy strategy, const uint64_t *matrix,
                             const struct ry_repeats *repeats);
/** Sum needs what follows from the rank's own knowledge, by the input of its plan: D's slice, what it receives in C and what it
 *  found in D. Exact. The functions above say 0. */
uint64_t ry_plan_stage_sum(const struct ry_cluster *cluster, int rank, const struct ry_slice *slice, const uint64_t *recv,
                           const struct ry_repeats *repeats);
/** Both parts for all ranks in one go through the matrix (pack: all apart), [nranks] each. -1 when out of memory. */
int ry_plan_stage_all(const struct ry_cluster *cluster, enum ry_strategy strategy, const uint64_t *matrix,
                      const struct ry_repeats *repeats, uint64_t *relay, uint64_t *pack, struct ry_err *err);

/** The plan in words, one line per step or run of like steps ("group 0: send 1.0 MiB to rank 5 (node 1, rail 1) …"). */
void ry_plan_explain(const struct ry_plan *plan, const struct ry_cluster *cluster, FILE *f);

#endif
