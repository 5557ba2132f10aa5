/*
 * links.h: the virtual links of the emulated cluster and their reservation clocks.
 *
 * Owns: the layout of the segment that the launcher makes and all ranks map, and the arithmetic that says when bytes
 * sent now would have arrived over links of the bandwidth and latency asked for. Not: who waits until then
 * (transfer.c).
 *
 * Each link keeps, for either direction, the time until which it is taken. A reservation moves that time on by the
 * duration of the bytes and so queues behind all that was reserved before, whichever process did it. Times are
 * CLOCK_MONOTONIC nanoseconds, which all processes of a machine share. A node has one NIC, used by all of its ranks for
 * what leaves or enters the node; every rank's GPU has one NVLink port for what stays inside.
 */
#ifndef RY_EMU_LINKS_H
#define RY_EMU_LINKS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RY_EMU_LINKS_ENV "RYEMU_LINKS" /* path of the segment; the launcher's /proc/PID/fd/N */
#define RY_EMU_LINKS_MAGIC UINT64_C(0x31306b6e696c7972)
#define RY_EMU_MAX_NODES 256
#define RY_EMU_MAX_GPUS 4096

struct ry_emu_link {
    _Atomic uint64_t key;               /* whose it is, 0 free: claimed by whoever asks first */
    _Atomic uint64_t out_free, in_free; /* taken until then, ns */
};

struct ry_emu_rate {
    double bytes_per_ns; /* 0: as fast as the machine is */
    uint64_t latency_ns;
};

struct ry_emu_links {
    uint64_t magic;
    struct ry_emu_rate nic, nvlink;
    struct ry_emu_link node[RY_EMU_MAX_NODES], gpu[RY_EMU_MAX_GPUS];
};

/** Fill a zeroed segment (the launcher). Gbit/s and microseconds; 0 means "not limited". */
void ry_emu_links_init(struct ry_emu_links *seg, double nic_gbit, double nic_us, double nvlink_gbit, double nvlink_us);

/** Map the segment that RYEMU_LINKS names, once per process. NULL without one: nothing is shaped then. */
struct ry_emu_links *ry_emu_links_map(void);

/** The link that belongs to `key` (not 0) in a table of n; NULL when the table is full. Any process, any thread. */
struct ry_emu_link *ry_emu_link_claim(struct ry_emu_link *table, size_t n, uint64_t key);

/* What a reservation of some bytes says. */
struct ry_emu_slot {
    uint64_t left;    /* the last byte has left the sender's port */
    uint64_t through; /* ... and has gone through the receiver's: the next bytes of this flow may follow then */
    uint64_t arrives; /* through + latency: the receiver may see the bytes */
};

/** Reserve `bytes` from port `from` to port `to`, to start no earlier than `ready`. */
struct ry_emu_slot ry_emu_links_reserve(struct ry_emu_link *from, struct ry_emu_link *to,
                                        const struct ry_emu_rate *rate, uint64_t ready, size_t bytes);

#endif
