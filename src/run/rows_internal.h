/*
 * rows_internal.h: shared by rows.c, rows_host.c and sums.c only.
 */
#ifndef RY_RUN_ROWS_INTERNAL_H
#define RY_RUN_ROWS_INTERNAL_H

#include "device/device.h"
#include "rows_kernels.h"

extern struct ry_kernel rows_put, rows_sample, rows_compare, rows_recompare, rows_count, rows_number, rows_tally,
    rows_extremes, rows_pack, rows_expand;
extern const struct ry_kernels rows_kernels, sums_kernels;

struct ry_rows;
/** What this scanner does next comes after what it did last, whatever the streams. */
int rows_enter(struct ry_rows *rows, void *stream, struct ry_err *err);
int rows_leave(struct ry_rows *rows, void *stream, struct ry_err *err);
int rows_launch(const struct ry_rows *rows, struct ry_kernel *kernel, uint64_t threads, const void *param, void *stream,
                struct ry_err *err);
const struct ry_device *rows_device(const struct ry_rows *rows);
/** Where damage is counted: a uint64_t in pinned memory. */
uint64_t rows_errors_at(const struct ry_rows *rows);
/** Threads that should share a row of so many bytes. */
uint32_t rows_lanes_for(uint64_t row_bytes);

#endif
