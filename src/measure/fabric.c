/* fabric.c: see fabric.h. */
#include "measure/fabric.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "measure/cost_file.h"

#define MOST_RANKS (1 << 20)

static const struct ry_fabric presets[] = {
    {"netmoe", "NetMoE's setting (ICLR'25): 4 nodes of 8 A800, NVLink 400 GB/s, InfiniBand 100 GB/s a node, shared",
     "A800", 4, 8, 1, 400, 100},
    {"h100-pod", "rail-optimized: nodes of 8 H100, NVLink 450 GB/s each way, a 400 Gbit/s NIC for every GPU", "H100",
     16, 8, 8, 450, 400},
    {"ethernet", "nodes of 4 GPUs on PCIe 4.0 (20 GB/s), one 25 Gbit/s NIC a node", "PCIe GPU", 8, 4, 1, 20, 3.125},
};
#define PRESETS ((int)(sizeof presets / sizeof *presets))

const struct ry_fabric *ry_fabric_at(int i)
{
    return i >= 0 && i < PRESETS ? &presets[i] : NULL;
}

const struct ry_fabric *ry_fabric_named(const char *name, struct ry_err *err)
{
    char known[200] = "";
    for (int i = 0; i < PRESETS; i++) {
        if (!strcmp(presets[i].name, name))
            return &presets[i];
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, "%s%s", i ? ", " : "", presets[i].name);
    }
    ry_fail(err, "no preset '%s': there are %s", name, known);
    return NULL;
}

struct ry_cluster *ry_fabric_cluster(const struct ry_fabric *f, struct ry_err *err)
{
    if (f->nodes < 1 || f->gpus < 1 || f->nodes > MOST_RANKS / f->gpus)
        return ry_fail(err, "%d nodes of %d GPUs: there must be from 1 to %d GPUs", f->nodes, f->gpus, MOST_RANKS),
               NULL;
    if (f->nics < 1 || f->nics > f->gpus)
        return ry_fail(err, "%d NICs for the %d GPUs of a node: each must have one, each be used", f->nics, f->gpus),
               NULL;
    if (!(f->local_gbs > 0 && f->node_gbs > 0 && isfinite(f->local_gbs) && isfinite(f->node_gbs)))
        return ry_fail(err, "links of %g GB/s in the node and %g GB/s between nodes: both must be above zero",
                       f->local_gbs, f->node_gbs),
               NULL;
    int n = f->nodes * f->gpus;
    struct ry_seat *seats = calloc((size_t)n, sizeof *seats);
    if (!seats)
        return ry_fail(err, "out of memory for a cluster of %d GPUs", n), NULL;
    for (int r = 0; r < n; r++) {
        struct ry_seat *s = &seats[r];
        s->version = RY_SEAT_VERSION;
        s->rank = r;
        snprintf(s->node, sizeof s->node, "node%d", r / f->gpus);
        snprintf(s->host, sizeof s->host, "node%d", r / f->gpus);
        snprintf(s->gpu_name, sizeof s->gpu_name, "%s", f->gpu ? f->gpu : "");
        snprintf(s->nic, sizeof s->nic, "nic%d", r % f->gpus % f->nics);
        s->nvlink_gbs = f->local_gbs;
        s->nic_gbs = f->node_gbs / f->nics;
    }
    struct ry_cluster *c = ry_cluster_build(seats, n, err);
    free(seats);
    return c;
}

int ry_fabric_model(struct ry_cost_model *model, const struct ry_cluster *cluster, const char *measured,
                    struct ry_err *err)
{
    if (measured) {
        int bad = ry_cost_read(model, measured, err);
        model->node_comm = !bad && model->link[RY_LINK_NODE].measured; /* then jobs there have such communicators */
        return bad;
    }
    ry_cost_guess(model, cluster);
    return 0;
}
