/*
 * internal.h: what the files of run/ share: the runner, batches of segments, and comparisons under way.
 */
#ifndef RY_RUN_INTERNAL_H
#define RY_RUN_INTERNAL_H

#include "run.h"
#include "segments.h"

#define RY_NCCL_UINT8 1 /* ncclUint8: counts are bytes */

struct check;

struct ry_runner {
    struct ry_nccl nccl;
    const struct ry_device *device;
    void *comm;
    bool kernels; /* loaded: else copies go one by one, and nothing can be compared */
    /* staging.c */
    void *stage;
    uint64_t stage_bytes;
    struct ry_event *stage_used; /* recorded after each use of `stage` */
    /* checks.c: comparisons under way, oldest first */
    struct check *oldest, *newest;
    int nchecks;
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
int batch_add(struct batch *batch, void *a, const void *b, uint64_t bytes, uint32_t tag, struct ry_err *err);
/** Launch what is collected. */
int batch_flush(struct batch *batch, struct ry_err *err);

/* ---- staging.c ---- */

/** Count `bytes` against the process's limit: all of it, or false. */
bool staging_reserve(uint64_t bytes);
void staging_unreserve(uint64_t bytes);
/** Before and after a plan uses the staging memory on `stream`. */
int staging_enter(struct ry_runner *runner, void *stream, struct ry_err *err);
int staging_leave(struct ry_runner *runner, void *stream, struct ry_err *err);
void staging_free(struct ry_runner *runner);

/* ---- checks.c ---- */

/** Make sure that a few answers can be held later: may wait for the device. */
int checks_prepare(const struct ry_device *device, struct ry_err *err);
void checks_free(struct ry_runner *runner);

#endif
