/*
 * fit.h: fitting a guessed model of links to what plain NCCL took.
 *
 * Owns: how slow the NIC seemed, by the size of exchanges, and when to believe it. Not: the formulas (plan/cost.h:
 * ry_cost_nic_slope()), where durations come from, what is to be forgotten when the model is another (policy_learn.c,
 * twin_policy.c). Pure state; zeroed at the start.
 */
#ifndef RY_ENGINE_FIT_H
#define RY_ENGINE_FIT_H

#include "plan/cost.h"

#define RY_FIT_LARGE (256u << 10) /* bytes: what shorter exchanges take says nothing of a NIC's bandwidth */

struct ry_fit {
    double times[RY_COST_CLASSES]; /* the least of what was seen of that size: by so much each byte took the NIC longer
                                      than by the model */
    uint32_t samples[RY_COST_CLASSES];
    int fitted; /* 1 + the power of two of the size that the model was fitted to; 0: to none */
};

/** An exchange by plain NCCL, whose busiest rank had so many bytes, took `us` where the model says `model_us`; slope:
 * ry_cost_nic_slope(). True: the model is another now. Only for one whose links nobody measured. */
static inline bool ry_fit_note(struct ry_fit *f, struct ry_cost_model *model, uint64_t busiest, double slope,
                               double model_us, double us)
{
    const double most_slower = 1000, most_faster = 16;
    const int much_larger = 2; /* powers of two: soon no exchange is so much larger than all before */
    if (model->measured || busiest < RY_FIT_LARGE || !(slope > 0) || !(us > 0) || us > 1e12)
        return false;
    int class = 63 - __builtin_clzll(busiest);
    double times = 1 + (us - model_us) / slope;
    times = times > most_slower ? most_slower : times > 1 / most_faster ? times : 1 / most_faster;
    if (!f->samples[class]++ || times < f->times[class])
        f->times[class] = times;
    if (f->samples[class] < RY_COST_ENOUGH || (f->fitted && class + 1 < f->fitted + much_larger))
        return false;
    ry_cost_slow_nic(model, f->times[class]);
    *f = (struct ry_fit){.fitted = class + 1};
    return true;
}

#endif
