/*
 * cost_file.h: measured cost models, kept per cluster.
 *
 * Owns: the cluster's fingerprint and its kind, and the files $XDG_CACHE_HOME/railyard/cost-FINGERPRINT.json and cost-kind-KIND.json
 * (~/.cache where that is not set), written by `railyard calibrate` and read by the yardmaster. JSON through jansson, written to a
 * temporary name and renamed. Not: what the numbers mean (cost.h).
 *
 * What is calibrated is a job's world; what asks are its communicators, most of which have some of its ranks only: expert parallel groups, twins.
 * Links are the same for them, so a file for the kind of hardware serves all that nobody measured by themselves.
 */
#ifndef RY_MEASURE_COST_FILE_H
#define RY_MEASURE_COST_FILE_H

#include "plan/cost.h"

/** Equal for equal clusters: node count and sizes, GPU and NIC names and speeds; not host names, ranks' order or pids. */
uint64_t ry_cluster_fingerprint(const struct ry_cluster *cluster);
/** Equal for clusters of the same hardware, however many nodes and ranks: which GPUs, NICs (numbers in their names left out) and speeds
 *  there are. */
uint64_t ry_cluster_kind(const struct ry_cluster *cluster);
/** Path for a fingerprint; the folder need not exist. */
int ry_cost_path(uint64_t fingerprint, char *out, size_t size, struct ry_err *err);
/** 0; 1 when there is none; -1 with `err` naming file and field when it cannot be used. */
int ry_cost_load(struct ry_cost_model *model, uint64_t fingerprint, struct ry_err *err);
/** The same from a file by name, for whichever cluster it was measured on: a missing one is an error, too. */
int ry_cost_read(struct ry_cost_model *model, const char *path, struct ry_err *err);
/**
 * The model that was measured on a cluster like this one, else on one of its kind, which `other` then describes ("4 nodes, 32 ranks,
 * NVIDIA H200, mlx5_0"; else it is empty). 0; 1 when there is neither; -1 as above.
 */
int ry_cost_find(struct ry_cost_model *model, const struct ry_cluster *cluster, char other[128], struct ry_err *err);
/** Keeps it for clusters like this one; and for its kind, unless what is kept there knows the NICs and this does not, or has more ranks on a
 *  node: what a node's ranks get out of its NICs together is not known from fewer. Damaged files are replaced. */
int ry_cost_save(const struct ry_cost_model *model, const struct ry_cluster *cluster, struct ry_err *err);

#endif
