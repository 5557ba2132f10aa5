/*
 * placing.h: where samples and experts are in a simulated job, by each way of placing them.
 *
 * Owns: the list of ways, learning what each needs, and homes for each step. Not: the solvers and learners (src/place),
 * what follows for the exchanges (exchange.h).
 *
 * Where recorded experts stand for several each (workload.h), the next layer's routing is predicted of the recorded
 * ones and shared out evenly among those that they stand for.
 *
 * Threads: none of its own.
 */
#ifndef RY_SIM_PLACING_H
#define RY_SIM_PLACING_H

#include "place/problem.h"
#include "sim/workload.h"

enum ry_placing {
    RY_PLACE_IN_ORDER,         /* samples as they come, experts in contiguous blocks: the baseline */
    RY_PLACE_NETMOE_GATHER,    /* moved after each layer, by this layer's routing alone */
    RY_PLACE_NETMOE_PREDICTED, /* and the next one's, predicted from layers seen */
    RY_PLACE_NETMOE_KNOWN,     /* and the next one's, known */
    RY_PLACE_HOMES,            /* one home per sample in all layers, routing known; contiguous experts */
    RY_PLACE_COPLACED,         /* and experts that share a node learned: coplace.h. Made up and too large to learn: by
                                  the groups that it was made of */
    RY_PLACE_COPLACED_TOKENS,  /* and homes told from token ids alone: home_model.h */
    RY_PLACINGS
};
const char *ry_placing_name(enum ry_placing placing);  /* "in-order", …: what options take */
const char *ry_placing_about(enum ry_placing placing); /* in words */
int ry_placing_parse(const char *name, enum ry_placing *out, struct ry_err *err);

struct ry_placer;

/** For steps of `workload` on `cluster`, samples evenly on the ranks; `counting` is what homes are chosen by. Both must
 * outlive it. NULL with `err` when experts do not divide or there is no memory. */
struct ry_placer *ry_placer_new(const struct ry_cluster *cluster, const struct ry_workload *workload,
                                enum ry_counting counting, struct ry_err *err);
void ry_placer_free(struct ry_placer *placer);
size_t ry_placer_memory(const struct ry_cluster *cluster, const struct ry_workload *workload);

/** Learn what a way needs. 0; 1 where it cannot be had here, with the reason in `err`; -1 with `err`. What is worth
 * saying of it is in note[]. */
int ry_placer_learn(struct ry_placer *placer, enum ry_placing placing, char note[400], struct ry_err *err);

struct ry_placed {
    const int *home;        /* [stride > 0 ? layers + 1 : 1][samples]: ranks; dispatch of layer l, combine of l − 1 */
    size_t stride;          /* samples, or 0 for one home in all layers */
    const int *expert_rank; /* [layers][experts] */
    uint64_t moved;         /* samples that changed ranks within the step, all layers */
};

/** Place the step that the workload holds, by a way that was learned. Overwritten by the next call; allocates nothing.
 */
void ry_placer_step(struct ry_placer *placer, enum ry_placing placing, struct ry_placed *out);

#endif
