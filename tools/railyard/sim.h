/* sim.h: what the files of `railyard sim` share. */
#ifndef RY_TOOLS_SIM_H
#define RY_TOOLS_SIM_H

#include <stdio.h>

#include <jansson.h>

#include "measure/fabric.h"
#include "sim/sim.h"

#define SIM_SIZES 12

/* One size of cluster, simulated. */
struct sim_point {
    struct ry_fabric fabric;
    struct ry_cost_model model;
    struct ry_sim sim;
    struct ry_sim_result result;
    double seconds;
};

struct sim_study {
    const char *dir;  /* recorded routing, or NULL */
    const char *cost; /* calibrated file, or NULL */
    struct sim_point *points;
    int npoints;
};

/* --exchange: one exchange instead of a job. */
#define SIM_SKEWED_MOST 1024
struct sim_skewed {
    double bytes; /* that every GPU sends; 0: a job it is */
    double exponent, incast;
    uint64_t seed;
};
/** Its table on stdout, for each of the study's points, of which only fabric and model are looked at. */
int sim_skewed(const struct sim_skewed *skewed, const struct sim_study *study, struct ry_err *err);

/** All tables on stdout. */
void sim_print(const struct sim_study *study);
/** Schema railyard-sim (docs/routing-format.md); NULL without memory. The same for equal input: no clock in it. */
json_t *sim_json(const struct sim_study *study);
/** One size: bars for each placement and strategy. Several: time over GPUs, a panel for each strategy. */
void sim_svg(const struct sim_study *study, FILE *f);

/** How the routing was brought to the cluster's size, in words; "" where it fits as it is. */
void sim_scaling(const struct sim_study *study, const struct sim_point *point, char *out, size_t size);

#endif
