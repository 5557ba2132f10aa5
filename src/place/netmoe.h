/*
 * netmoe.h: NetMoE's layer placement (ICLR'25): after each layer's experts, each sample's tokens are gathered at a new
 * home.
 *
 * Owns: the objective, gather(l) + scatter(l + 1), the latter as far as it is known. Not: the two stages in which homes
 * follow from it (homes.h), predicting (predict.h), counting what came of it (traffic.h).
 *
 * Threads: one workspace per thread.
 */
#ifndef RY_PLACE_NETMOE_H
#define RY_PLACE_NETMOE_H

#include "place/homes.h"
#include "place/predict.h"

enum ry_scatter {
    RY_SCATTER_OFF,       /* gather only */
    RY_SCATTER_PREDICTED, /* what the predictor says */
    RY_SCATTER_GIVEN, /* what the routing says: perfect knowledge. The paper comes near it by running the next router
                         early */
};

struct ry_netmoe_options {
    enum ry_scatter scatter;
    const struct ry_predictor *predictor; /* for RY_SCATTER_PREDICTED */
    struct ry_homes_options homes;
};

struct ry_netmoe; /* workspace */

/** For batches of up to `max_samples` of routings of this shape; max_slots as for ry_homes_new(). */
struct ry_netmoe *ry_netmoe_new(const struct ry_cluster *cluster, int layers, int experts, int max_samples,
                                int max_slots, struct ry_err *err);
void ry_netmoe_free(struct ry_netmoe *netmoe);

/** Take up a batch; it must stay until the next call. -1 with `err` if it is malformed or of another shape. */
int ry_netmoe_start(struct ry_netmoe *netmoe, const struct ry_problem *problem, struct ry_err *err);

/** Homes for the combine of layer `layer` (and so for the dispatch of the next), given those of its dispatch. Looks at
 * no later layer than `layer` unless the scatter is given. from, to: [nsamples], ranks. */
void ry_netmoe_layer(struct ry_netmoe *netmoe, const struct ry_netmoe_options *options, int layer, const int *from,
                     int *to);

/** A whole batch from homes[0], which is the caller's: homes[layers + 1][nsamples], as ry_traffic_add() takes them. */
int ry_netmoe_batch(struct ry_netmoe *netmoe, const struct ry_problem *problem, const struct ry_netmoe_options *options,
                    int *homes, struct ry_err *err);

/** As ry_homes_solver_us(). */
double ry_netmoe_solver_us(const struct ry_netmoe *netmoe, uint64_t *calls);

#endif
