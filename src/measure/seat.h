/*
 * seat.h: what this rank tells of where it sits, for the cluster map.
 *
 * Owns: filling struct ry_seat, in the same way wherever a cluster map is made: in a job's engine and when calibrating,
 * so that both arrive at the same fingerprint. Not: how seats travel.
 */
#ifndef RY_MEASURE_SEAT_H
#define RY_MEASURE_SEAT_H

#include "cluster.h"
#include "device/device.h"
#include "topo.h"

/** `device` and `topo` may be NULL: then the seat does not tell of them. `ordinal`: of the device, -1 unknown. */
void ry_seat_take(struct ry_seat *seat, const struct ry_device *device, const struct ry_topo *topo, int rank,
                  int ordinal, uint32_t settings_hash);

#endif
