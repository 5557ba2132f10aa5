/*
 * study.h: how good a placement is on recorded routing: learn from the first samples, place batches drawn from the
 * rest.
 *
 * Owns: the protocol (which samples are learned from, which batches are drawn, what crosses of them), running NetMoE
 * and homes by it, and the decision whether placing is worth while at all. Not: printing (tools/railyard/cmd_plan.c).
 *
 * Everything follows from the seed.
 */
#ifndef RY_PLACE_STUDY_H
#define RY_PLACE_STUDY_H

#include "place/netmoe.h"
#include "place/traffic.h"

struct ry_study {
    const struct ry_routing *routing;
    const struct ry_cluster *cluster;
    const int *expert_rank; /* [layers][experts] */
    int fit;                /* samples [0, fit) are learned from */
    int end;                /* batches are drawn from [fit, end) */
    int batches, batch;     /* how many, and samples in each */
    uint64_t seed;
    enum ry_counting counting;
    double row_bytes;
    const struct ry_cost_model *model; /* or NULL */
};

int ry_study_check(const struct ry_study *study, struct ry_err *err);

/** The k-th batch: `batch` different samples of [fit, end), in random order. Independent of all else in the study. */
void ry_study_batch(const struct ry_study *study, int k, int *sample);

struct ry_study_result {
    struct ry_traffic traffic;  /* over all batches */
    double solver_us, worst_us; /* of one assignment to nodes: mean, and the slowest batch's mean */
};

enum ry_when { RY_WHEN_NEVER, RY_WHEN_ONCE, RY_WHEN_EACH_LAYER }; /* once: after the first layer */

/** NetMoE by these options; RY_WHEN_NEVER: samples stay where they are dealt out in order, the baseline. */
int ry_study_netmoe(const struct ry_study *study, const struct ry_netmoe_options *options, enum ry_when when,
                    struct ry_study_result *out, struct ry_err *err);

/** One home per sample and batch, all layers' routing known: what no prediction can beat under this expert map. */
int ry_study_homes(const struct ry_study *study, const struct ry_homes_options *options, struct ry_study_result *out,
                   struct ry_err *err);

/* Samples in the order in which batches take them. */
struct ry_batches {
    const struct ry_routing *routing;
    const int *which; /* [n]; a last part of a batch is left out */
    int n, nodes;
    const int *share;       /* [nodes]: how many of each batch live on each node, together the batch */
    const int *expert_node; /* [layers][experts] */
    enum ry_counting counting;
};

enum ry_homes_by { RY_HOMES_IN_ORDER, RY_HOMES_KNOWN, RY_HOMES_GUESSED };

/**
 * What crosses nodes of each sample, both directions, with one home per sample: in order, chosen exactly by what the
 * sample sends, or by guess [n][nodes] (NULL otherwise) of it. Returns the number of samples that crossing[n] was
 * filled for, -1 with `err`.
 */
int ry_study_cross(const struct ry_batches *batches, enum ry_homes_by by, const int32_t *guess, double *crossing,
                   struct ry_err *err);

/** A predictor that has learned from [0, fit). */
struct ry_predictor *ry_study_predictor(const struct ry_study *study, int history, struct ry_err *err);

struct ry_worth {
    bool worth;
    double dispersion; /* locality.h */
    double gain;       /* part of the cross-node rows, or of the busiest NIC's, that a trial saved */
    char why[240];     /* one line, either way */
};

/**
 * Is layer placement worth while, as far as the samples to learn from show? First by locality: routing that differs
 * between samples no more than chance has it is declined. Then by a trial: learned from the first three quarters of [0,
 * fit), tried on batches from the last. Declined if that saves less than `margin` (0.03). For `options->predictor` the
 * trial learns one of its own.
 */
int ry_study_worth(const struct ry_study *study, const struct ry_netmoe_options *options, int history, double margin,
                   struct ry_worth *out, struct ry_err *err);

#endif
