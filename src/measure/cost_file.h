/*
 * cost_file.h: measured cost models, kept per cluster.
 *
 * Owns: the cluster's fingerprint, and the file $XDG_CACHE_HOME/railyard/cost-FINGERPRINT.json (~/.cache where that is not
 * set), written by `railyard calibrate` and read by the yardmaster. JSON through jansson, written to a temporary name and
 * renamed. Not: what the numbers mean (cost.h).
 */
#ifndef RY_MEASURE_COST_FILE_H
#define RY_MEASURE_COST_FILE_H

#include "plan/cost.h"

/** Equal for equal clusters: node count and sizes, GPU and NIC names and speeds; not host names, ranks' order or pids. */
uint64_t ry_cluster_fingerprint(const struct ry_cluster *cluster);
/** Path for a fingerprint; the folder need not exist. */
int ry_cost_path(uint64_t fingerprint, char *out, size_t size, struct ry_err *err);
/** 0; 1 when there is none; -1 with `err` naming file and field when it cannot be used. */
int ry_cost_load(struct ry_cost_model *model, uint64_t fingerprint, struct ry_err *err);
/** The same from a file by name, for whichever cluster it was measured on: a missing one is an error, too. */
int ry_cost_read(struct ry_cost_model *model, const char *path, struct ry_err *err);
int ry_cost_save(const struct ry_cost_model *model, const struct ry_cluster *cluster, struct ry_err *err);

#endif
