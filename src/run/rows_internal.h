/*
 * rows_internal.h: shared by rows.c and rows_host.c only.
 */
#ifndef RY_RUN_ROWS_INTERNAL_H
#define RY_RUN_ROWS_INTERNAL_H

#include "device/device.h"
#include "rows_kernels.h"

extern struct ry_kernel rows_put, rows_sample, rows_compare, rows_recompare, rows_count, rows_number, rows_pack,
    rows_expand;
extern const struct ry_kernels rows_kernels;

#endif
