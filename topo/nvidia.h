/*
 * nvidia.h: what NVIDIA's driver says about the GPUs of this machine, without linking it or touching a GPU.
 *
 * Owns: NVML and the CUDA driver, both opened at run time: NVML tells names, UUIDs, NVLinks and PCIe neighbourhood of
 * all GPUs, whatever CUDA_VISIBLE_DEVICES says; the CUDA driver only names and UUIDs of those it sees, and is asked only
 * where there is no NVML. No CUDA context is created. Not: where GPUs sit in the machine (hwloc).
 */
#ifndef RY_TOPO_NVIDIA_H
#define RY_TOPO_NVIDIA_H

#include <stdbool.h>

#include "topo.h"

struct ry_pci {
    unsigned domain, bus, device;
};

enum ry_link_end { RY_LINK_GPU, RY_LINK_CPU, RY_LINK_SWITCH };

struct ry_nv_link {
    enum ry_link_end end;
    bool has_pci;      /* the remote end told its address (a virtual machine hides switches) */
    struct ry_pci pci; /* of the remote end */
    unsigned mbs;      /* MB/s in one direction, 0 unknown */
};

#define RY_NV_LINKS 64
struct ry_nv_gpu {
    struct ry_pci pci;
    char name[64], uuid[48];
    int nlinks;
    struct ry_nv_link link[RY_NV_LINKS]; /* active ones */
};

struct ry_nv {
    const char *backend; /* "NVML", "CUDA" or NULL: neither is there */
    int n;
    struct ry_nv_gpu *gpu;
    enum ry_path *path; /* [n × n] without NVLink, RY_PATH_UNKNOWN where not told */
};

/** Never fails: what is not there is absent. Freed by ry_nv_free(). */
void ry_nv_read(struct ry_nv *out);
void ry_nv_free(struct ry_nv *nv);

#endif
