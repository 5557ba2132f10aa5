/*
 * topo.h: what one node is made of, as far as communication is concerned.
 *
 * Owns: reading a node's topology (live through hwloc, NVML and the CUDA driver; or saved, as hwloc XML or NCCL topology
 * XML), the list of its GPUs and NICs, how far they are from each other, and writing all of it out (text, JSON, hwloc XML,
 * SVG). Not: which rank sits where (cluster.h).
 *
 * Numbers: bandwidths are GB/s (10^9 bytes per second) in one direction; 0 means "not known". A path class orders the
 * ways two devices reach each other, fastest first; names follow NCCL and nvidia-smi.
 *
 * Thread-safety: an opened topology is read-only and may be shared; opening may be done from any thread.
 */
#ifndef RY_TOPO_TOPO_H
#define RY_TOPO_TOPO_H

#include <stdbool.h>
#include <stdio.h>

#include <hwloc.h>

#include "base/error.h"

enum ry_path {
    RY_PATH_LOC, /* the same device */
    RY_PATH_NVL, /* NVLink, direct or through NVSwitch */
    RY_PATH_PIX, /* one PCIe switch */
    RY_PATH_PXB, /* several PCIe switches, no host bridge */
    RY_PATH_PHB, /* through the host bridge / same NUMA node */
    RY_PATH_SYS, /* across sockets */
    RY_PATH_UNKNOWN
};
const char *ry_path_name(enum ry_path path); /* "LOC", "NVL", … "?" */

struct ry_topo_gpu {
    int index;      /* position in the list: PCI order, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID */
    char name[64];  /* "NVIDIA H200", or the PCI id where no better name is known */
    char pci[16];   /* "0000:19:00.0", lower case */
    char uuid[48];  /* "" when unknown (saved topologies) */
    int numa;       /* NUMA node os index, -1 unknown */
    int nearest_nic; /* index into nics of the nearest one; -1 where there is none */
    enum ry_path nic_path;
    double nvlink_gbs; /* sum of its NVLinks' bandwidth, 0 if none or unknown */
};

struct ry_topo_nic {
    int index;
    char name[64]; /* "mlx5_0", "eth0", or the PCI id */
    char pci[16];  /* "" for a NIC that is not on PCI (veth, loopback are left out unless nothing else exists) */
    char kind[16]; /* "verbs", "net", or "unknown" (NCCL topology files do not say) */
    int numa;
    double gbs; /* link bandwidth in GB/s, 0 unknown */
};

struct ry_topo; /* opaque; owns everything it hands out */

/** This machine. Never fails for lack of NVML, CUDA or NICs: what cannot be seen is simply absent. */
struct ry_topo *ry_topo_open_live(struct ry_err *err);
/** A saved topology, hwloc XML or NCCL topology XML (told apart by the root element), of any size of machine. */
struct ry_topo *ry_topo_open_file(const char *path, struct ry_err *err);
void ry_topo_close(struct ry_topo *topo);

const char *ry_topo_source(const struct ry_topo *topo); /* "live", or the file's path */
hwloc_topology_t ry_topo_hwloc(const struct ry_topo *topo);
int ry_topo_ngpus(const struct ry_topo *topo);
int ry_topo_nnics(const struct ry_topo *topo);
const struct ry_topo_gpu *ry_topo_gpu(const struct ry_topo *topo, int i);
const struct ry_topo_nic *ry_topo_nic(const struct ry_topo *topo, int i);
/** The GPU with this PCI address (any case, domain may be short), or NULL. */
const struct ry_topo_gpu *ry_topo_gpu_by_pci(const struct ry_topo *topo, const char *pci);
enum ry_path ry_topo_gpu_path(const struct ry_topo *topo, int a, int b);
double ry_topo_gpu_gbs(const struct ry_topo *topo, int a, int b); /* direct link bandwidth, 0 unknown */
enum ry_path ry_topo_nic_path(const struct ry_topo *topo, int gpu, int nic);

enum ry_topo_format { RY_TOPO_TEXT, RY_TOPO_JSON, RY_TOPO_XML, RY_TOPO_SVG };
/** -1 for an unknown name; the error lists the known ones. */
int ry_topo_format_parse(const char *name, enum ry_topo_format *out, struct ry_err *err);
int ry_topo_write(const struct ry_topo *topo, enum ry_topo_format format, FILE *f, struct ry_err *err);

#endif
