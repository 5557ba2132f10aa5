/*
 * cluster.h: the cluster map of one communicator: rank → node → local index → GPU → NIC.
 *
 * Owns: what a rank tells about where it sits (struct ry_seat), node identity, and the pure function from all seats to
 * the map. Not: how seats travel between ranks (control/), nor what a node looks like inside (topo.h).
 */
#ifndef RY_TOPO_CLUSTER_H
#define RY_TOPO_CLUSTER_H

#include <stdint.h>

#include "base/error.h"

/* What one rank says of itself. Fixed layout: it goes over the wire and between versions; grow only at `spare`. */
struct ry_seat {
    uint32_t version;       /* RY_SEAT_VERSION */
    uint32_t settings_hash; /* of the settings that all ranks must share; differing ones keep Railyard passive */
    int32_t rank;           /* in the communicator */
    int32_t pid;
    char railyard[16]; /* version of Railyard, "0.1.0" */
    char node[64];     /* node identity: ry_node_identity() */
    char host[64];     /* host name, for people */
    char gpu_name[64];
    char gpu_pci[16];  /* "" on the emulated cluster */
    char gpu_uuid[48];
    char nic[64];      /* nearest NIC, "" if none is known */
    double nvlink_gbs; /* of its GPU, GB/s, 0 unknown */
    double nic_gbs;    /* GB/s, 0 unknown */
    uint8_t able; /* 1: exchanges of this rank's side may be reissued */
    uint8_t spare[63];
};
#define RY_SEAT_VERSION 1

/**
 * Node identity: NCCL_HOSTID where set (as NCCL itself does), else boot id + host name. Two ranks with equal identity
 * share fast links. Writes a NUL-terminated text; longer ones are shortened by a hash, so that equality is kept.
 */
void ry_node_identity(char out[64]);

struct ry_cluster {
    int nranks, nnodes;
    struct ry_seat *seats; /* [nranks] */
    int *node;             /* [nranks]: nodes are numbered in order of their lowest rank */
    int *local;            /* [nranks]: how many lower ranks sit on the same node; the rail */
    int *node_size;        /* [nnodes] */
    int *node_first;       /* [nnodes]: lowest rank of the node */
};

/** Build the map from one seat per rank, in rank order (seats are copied). NULL with `err` on seats[i].rank != i or no memory. */
struct ry_cluster *ry_cluster_build(const struct ry_seat *seats, int nranks, struct ry_err *err);
void ry_cluster_free(struct ry_cluster *cluster);

#endif
