/*
 * topo_internal.h: what the files of topo/ share: the opened topology, and the one road from any source to it.
 *
 * Every source (this machine, hwloc XML of any version, NCCL XML) first becomes a loaded hwloc topology whose links are
 * hwloc distance matrices; ry_topo_from_hwloc() then derives GPUs, NICs and paths from that alone. So what is written as
 * XML and read again gives the same answers.
 *
 * How things are marked in the hwloc tree, beyond what hwloc itself says:
 *   matrix "NVLinkBandwidth"  MB/s in one direction between GPUs, NVSwitches and packages (as hwloc's own NVML part).
 *                             Below RY_LINK_UNKNOWN MB/s: there is a link, of unknown speed.
 *   matrix "PCIePath"         the path class without NVLink (enum ry_path) between GPUs and NICs, GPUs first
 *   subtype "NVSwitch"        on a PCI device, or on a Misc object where the switch cannot be seen on PCI
 *   subtype "PCISwitch"       on a bridge that stands for one whole PCIe switch (NCCL's way), not for one of its ports
 *   subtype "GPU"             on a Misc object: a GPU that is not in the PCI tree; infos as on a PCI GPU, and PCIBusID
 *   info RailyardNote on the machine: what a reader should know about the source
 *   infos GPUModel, NVIDIAUUID on a GPU; LinkSpeedMbps on a NIC's OS device, the speed of its link; LinkState "down"
 */
#ifndef RY_TOPO_INTERNAL_H
#define RY_TOPO_INTERNAL_H

#include <stdint.h>

#include "topo.h"

#define RY_LINK_UNKNOWN 1000

struct ry_topo {
    hwloc_topology_t hw;
    char *source;
    int ngpus, nnics;
    struct ry_topo_gpu *gpus;
    struct ry_topo_nic *nics;
    hwloc_obj_t *gpu_obj, *nic_obj; /* PCI device, OS device or Misc object */
    enum ry_path *gpu_path;         /* [ngpus × ngpus] */
    enum ry_path *nic_path;         /* [ngpus × nnics] */
    double *gpu_gbs;                /* [ngpus × ngpus] */
    double *switch_gbs;             /* [ngpus]: to NVSwitches */
    bool *switch_linked;            /* [ngpus]: it has links to NVSwitches, of whatever speed */
    double *cpu_gbs;                /* [ngpus]: to processors */
    int nswitches;                  /* NVSwitches */
    int nunknown;                   /* PCI devices of which the source does not say what they are */
};

/**
 * Derive everything from a loaded topology, which it takes over (also on failure). Adds the matrix PCIePath where it is
 * missing. NULL with `err` only when out of memory.
 */
struct ry_topo *ry_topo_from_hwloc(hwloc_topology_t hw, const char *source, struct ry_err *err);

/** A topology set up the way all of Railyard's are: with I/O, NVSwitches and Misc objects kept. NULL: no memory. */
hwloc_topology_t ry_topo_hwloc_new(bool live, struct ry_err *err);

/** Add one distance matrix to `hw`. Values are copied. 0, or -1 when hwloc refuses it. */
int ry_topo_add_matrix(hwloc_topology_t hw, const char *name, unsigned long kind, unsigned n, hwloc_obj_t *objs,
                       const uint64_t *values);

/** What a reader should know about the source, or NULL: the info RailyardNote of the machine. */
const char *ry_topo_note(const struct ry_topo *topo);

/** "Package", "NUMANode" or "Machine" object that a device hangs from. */
hwloc_obj_t ry_topo_home(hwloc_obj_t obj);

/** A marked switch: subtype NVSwitch, or NVIDIA's bridge class without PCI behind it. */
bool ry_topo_is_nvswitch(hwloc_obj_t obj);
bool ry_topo_is_gpu(hwloc_obj_t obj);

/** OS devices: a verbs device ("mlx5_0") or a network interface ("eth0"). */
bool ry_topo_is_verbs(hwloc_obj_t obj);
bool ry_topo_is_net(hwloc_obj_t obj);

int ry_topo_write_text(const struct ry_topo *topo, FILE *f, struct ry_err *err);
int ry_topo_write_json(const struct ry_topo *topo, FILE *f, struct ry_err *err);
int ry_topo_write_svg(const struct ry_topo *topo, FILE *f, struct ry_err *err);

#endif
