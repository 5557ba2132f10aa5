/*
 * over_ucx.h: the patterns that cross nodes, carried by UCX, as the engine does it (ucx/carrier.h).
 *
 * Owns: that a job of this program's has such carriers, its ranks having met through NCCL. Not: which patterns, and
 * timing.
 */
#ifndef RY_CALIBRATE_OVER_UCX_H
#define RY_CALIBRATE_OVER_UCX_H

#include <nccl.h>

#include "cluster.h"
#include "device/device.h"
#include "measure/calibrate.h"

/** All ranks do this. Through host memory, unless that is what the device has. False, on all ranks alike, with `err` on
 * those that know why: it cannot be had. */
bool ry_ucx_open(const struct ry_device *device, int ordinal, const struct ry_cluster *cluster, int rank,
                 ncclComm_t comm, void *stream, struct ry_err *err);
/** Messages from and to this rank, out of and into consecutive memory, on the stream. All ranks together; may wait for
 * them. */
int ry_ucx_issue(const struct ry_cal_message *messages, size_t n, char *send, char *recv, void *stream,
                 struct ry_err *err);
/** Have memory for that: before it is timed. */
int ry_ucx_prepare(uint64_t bytes, size_t messages, struct ry_err *err);
/** When nobody needs anybody any more. */
void ry_ucx_close(void);

#endif
