/*
 * internal.h: what the files of run/ share: the runner, batches of segments and of packed messages, comparisons under
 * way.
 */
#ifndef RY_RUN_INTERNAL_H
#define RY_RUN_INTERNAL_H

#include "rows.h"
#include "run.h"
#include "segments.h"
#include "sums.h"

#define RY_NCCL_UINT8 1 /* ncclUint8: counts are bytes */
#define RY_NCCL_SYSTEM_ERROR 2

struct check;

struct ry_runner {
    struct ry_nccl nccl;
    const struct ry_device *device;
    void *comm;
    struct ry_cross *cross; /* NULL: NCCL carries everything */
    bool kernels; /* loaded: else copies go one by one, and nothing can be compared */
    /* staging.c */
    void *stage;
    uint64_t stage_bytes;
    struct ry_event *stage_used; /* recorded after each use of `stage` */
    /* run.c: where steps of a plan are carried out beside the others; made when first needed */
    struct {
        bool tried;
        void *stream; /* NULL: there is none, and all steps go one after the other */
        struct ry_event *begun, *joined;
        struct ry_event *over[RY_CHUNKS]; /* groups of the others, by their number, */
        unsigned recorded;                /* those of this exchange */
    } beside;
    /* checks.c: comparisons under way, oldest first */
    struct check *oldest, *newest;
    int nchecks;
    struct check *digest; /* digest.c: the latest, under way or over; NULL: none */
    /* scan.c */
    struct ry_rows *rows; /* NULL: no kernels */
    struct {
        uint64_t row_bytes; /* 0: none */
        uint64_t parts;
        int own_node, count;
        bool known; /* the result is here: */
        int nnodes; /* that there is room for */
        struct ry_repeats *repeats;
        uint64_t *rows;
        bool *scan_node;
    } scan;                   /* the latest */
    struct ry_rows *all_rows; /* the scanner of what goes to all ranks; NULL: there is none */
    int *one_node;            /* its map */
    int one_node_ranks;
    bool counting; /* it was given something */
    bool telling;  /* and the next search for equal rows is to hear of it */
    uint32_t times;
};

/* ---- batch.c ---- */

/** The kernels, and why they cannot be loaded on CUDA if the build had no nvcc. */
extern const struct ry_kernels ry_run_kernels;

/* Segments collected until they are worth a launch; those of one batch must not depend on each other. */
struct batch {
    const struct ry_runner *runner;
    void *stream;
    struct ry_kernel *kernel;
    struct ry_segments table;
};
void batch_start_copy(struct batch *batch, const struct ry_runner *runner, void *stream);
/** Differences go to `answer`, memory of the device. Only where runner->kernels. */
void batch_start_compare(struct batch *batch, const struct ry_runner *runner, void *stream, uint64_t *answer);
/** What digest.h says of the segments, which lie at `b` (`a`: NULL), is added to `answer`, memory of the device. The same. */
void batch_start_digest(struct batch *batch, const struct ry_runner *runner, void *stream, uint64_t answer[2]);
int batch_add(struct batch *batch, void *a, const void *b, uint64_t bytes, uint32_t tag, struct ry_err *err);
/** Launch what is collected. */
int batch_flush(struct batch *batch, struct ry_err *err);

/* ---- staging.c ---- */

/** Before and after a plan uses the staging memory on `stream`. */
int staging_enter(struct ry_runner *runner, void *stream, struct ry_err *err);
int staging_leave(struct ry_runner *runner, void *stream, struct ry_err *err);
void staging_free(struct ry_runner *runner);

/* ---- scan.c ---- */

/** Load what scanning and expanding need, so that neither ever waits for the device. */
void scan_prepare(struct ry_runner *runner, int ordinal);
void scan_free(struct ry_runner *runner);
/** Is this what the latest search found for `node`? */
bool scan_says(const struct ry_runner *runner, int node, struct ry_repeats repeats, uint64_t rows);
/** Did expansions that are over meet a damaged message since the last call? Then it is said, too. */
bool scan_damage(struct ry_runner *runner);

/* ---- packed.c ---- */

/** May this step, to pack or expand, be carried out? -1 with `err`. */
int packed_check(const struct ry_runner *runner, const struct ry_plan *plan, const struct ry_buffers *b,
                 const struct ry_step *step, struct ry_err *err);

#define PACKED 64
/* Messages to pack, pieces to expand, or rows to sum, collected until something else must come first. */
struct packed {
    struct ry_runner *runner;
    const struct ry_buffers *buffers;
    int npacks, npieces, nsums; /* only one of them is not 0 */
    struct ry_rows_packing pack[PACKED];
    struct ry_rows_piece piece[PACKED];
    uint64_t message_bytes[PACKED]; /* of each piece's message */
    struct ry_sums_job sum[PACKED];
    uint64_t sum_bytes[PACKED][2]; /* read and written */
};
void packed_start(struct packed *packed, struct ry_runner *runner, const struct ry_buffers *b);
int packed_pack(struct packed *packed, int node, void *message, struct ry_err *err);
int packed_expand(struct packed *packed, const struct ry_rows_piece *piece, uint64_t message_bytes, struct ry_err *err);
int packed_sum(struct packed *packed, int peer, const void *from, void *to, uint64_t bytes, struct ry_err *err);
int packed_flush(struct packed *packed, struct ry_err *err);

/* ---- kept.c ---- */

/** May this step, to sum, be carried out by b->kept? -1 with `err`. */
int kept_check(const struct ry_runner *runner, const struct ry_plan *plan, const struct ry_buffers *b,
               const struct ry_step *step, struct ry_err *err);
/** Name the message of `peer` in `job`. Returns the bytes of its rows. */
uint64_t kept_job(const struct ry_kept *kept, int peer, struct ry_sums_job *job);
int kept_sum(struct ry_runner *runner, const struct ry_buffers *b, const struct ry_sums_job *jobs, int n,
             struct ry_err *err);

/* ---- checks.c ---- */

/** Make sure that a few answers can be held later: may wait for the device. */
int checks_prepare(const struct ry_device *device, struct ry_err *err);
void checks_free(struct ry_runner *runner);

/* An answer on its way to the host. */
struct check {
    struct check *next;
    volatile uint64_t *answer; /* pinned, two words */
    struct ry_event *event;    /* after the copy to it */
    uint64_t number;
};
/** One that is not in use. NULL with `err` if there is none. */
struct check *checks_take(const struct ry_device *device, struct ry_err *err);
/** It came, or will never be asked for (`under_way`: the device may still write). */
void checks_put_back(struct check *check, bool under_way);

/* ---- digest.c ---- */

void digest_free(struct ry_runner *runner);

#endif
