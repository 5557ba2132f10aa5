/*
 * fabric.h: the links of a cluster that need not be here: what `railyard plan` and `railyard sim` reckon with.
 *
 * Owns: the presets, and the one way from link figures to a cluster map and a cost model: what data sheets say goes
 * into the map's seats, and ry_cost_guess() makes the model of it, as the engine does for a cluster that was never
 * measured; or a file that `railyard calibrate` wrote takes its place. Not: the model (plan/cost.h), the file's format
 * (cost_file.h).
 *
 * Rails: where every GPU has a NIC of its own (nics == gpus), the model is exact about them, since a rank gets no more
 * than its own NIC and the node no more than all of them: max(node / (n · v), busiest rank / v) is the busiest rank's.
 * What it does not know is what lies between the nodes: a message to another rail counts as one on the rail (NCCL's PXN
 * changes rails over NVLink, else it goes through the spine, which may be oversubscribed).
 */
#ifndef RY_MEASURE_FABRIC_H
#define RY_MEASURE_FABRIC_H

#include "plan/cost.h"

struct ry_fabric {
    const char *name;  /* of the preset */
    const char *about; /* one line: where the figures come from */
    const char *gpu;
    int nodes, gpus;  /* nodes; GPUs in each */
    int nics;         /* of a node; GPU g of a node uses NIC g modulo this */
    double local_gbs; /* of a GPU to others of its node, each way, GB/s, as data sheets say */
    double node_gbs;  /* all NICs of a node together, each way */
};

/** Presets in order, the one after the last is NULL. */
const struct ry_fabric *ry_fabric_at(int i);
/** NULL with `err` listing the known ones. */
const struct ry_fabric *ry_fabric_named(const char *name, struct ry_err *err);

/** Its cluster map, ranks numbered node by node. NULL with `err` naming the figure that cannot be. Freed by
 * ry_cluster_free(). */
struct ry_cluster *ry_fabric_cluster(const struct ry_fabric *fabric, struct ry_err *err);

/** Its cost model: a guess from the figures, or what the file at `measured` (not NULL) says, for whichever cluster it
 * was measured on. */
int ry_fabric_model(struct ry_cost_model *model, const struct ry_cluster *cluster, const char *measured,
                    struct ry_err *err);

#endif
