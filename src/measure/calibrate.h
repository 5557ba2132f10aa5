/*
 * calibrate.h: finds out what the links of a cluster cost (the cost model of plan/cost.h) by trying them.
 *
 * Owns: which patterns of messages are tried in which sizes and how often, the fit, and the judgement how well it fits.
 * Not: carrying a pattern out and timing it (tools/calibrate does, through NCCL; unit tests simulate it), nor keeping
 * the result (cost_file.h).
 *
 * Patterns, each a group of messages with traffic both ways at once:
 *     self       to itself                                       -> group_us, SELF
 *     pair       ranks of a node in pairs                        (shown only)
 *     local      every rank of a node to all others of it        -> LOCAL
 *     node       the same over the node's own communicator       -> NODE
 *     nic-one    one rank of each node to one of the next node   -> NIC alpha, nic_rank_bytes_per_us
 *     nic-all    all ranks of a node to those of the next node   -> NIC
 *     ucx-one, ucx-all   as the latter two, by way of UCX -> UCX alpha, ucx_rank_bytes_per_us; UCX
 *     exchange   everyone to everyone, itself included           (checks the model)
 * and copies on the device without NCCL. `self`, `local`, `node`, `nic-all` and `ucx-all` are tried with many small messages, too
 * (-> message_us).
 *
 * A point is measured some times over, and the lower quartile counts: other load on the machine only adds time. (Not
 * the least: a traffic shaper lets a burst pass.) A line t = a + x * b is fitted by weighted least squares, with
 * weights 1 / (t * line): the square of the residual is then about that of the logarithm of line / t, so that 1 KiB and
 * 64 MiB, and too much and too little, count alike. Weights are lowered after Huber so that single points far off the
 * line hardly bend it. a and b are not below zero.
 */
#ifndef RY_MEASURE_CALIBRATE_H
#define RY_MEASURE_CALIBRATE_H

#include "plan/cost.h"

enum ry_cal_kind {
    RY_CAL_COPY,
    RY_CAL_SELF,
    RY_CAL_PAIR,
    RY_CAL_LOCAL,
    RY_CAL_NODE,
    RY_CAL_NIC_ONE,
    RY_CAL_NIC_ALL,
    RY_CAL_UCX_ONE,
    RY_CAL_UCX_ALL,
    RY_CAL_EXCHANGE,
    RY_CAL_KINDS
};
const char *ry_cal_name(enum ry_cal_kind kind); /* "copy", "self", … */

struct ry_cal_message {
    int from, to;
    uint64_t bytes;
};

struct ry_cal_point {
    enum ry_cal_kind kind;
    uint64_t bytes; /* that a rank sends, all messages together */
    int messages;   /* of a rank; 0: one for each of its peers in this pattern */
    int repeats;
    double us;        /* lower quartile of the repeats */
    double low, high; /* least and greatest */
    double model_us;  /* what the fitted model says of it */
};

/**
 * The messages of a pattern from or to `rank` (-1: of all ranks), in an order that is the same for both sides of each
 * pair. Returns their number; `out` holds up to `most` of them and may be NULL.
 */
size_t ry_cal_messages(const struct ry_cluster *cluster, const struct ry_cal_point *point, int rank,
                       struct ry_cal_message *out, size_t most);

struct ry_cal_runner {
    void *context;
    /** Do it `rounds` times in a row. *us: what one took, the same on all ranks (the slowest one's mean). -1 with
     * `err`. */
    int (*run)(void *context, const struct ry_cal_point *point, int rounds, double *us, struct ry_err *err);
    bool node_comm; /* there is a communicator of each node's ranks for RY_CAL_NODE; the same on all ranks */
    bool ucx;       /* all ranks can exchange over UCX what crosses nodes */
};

#define RY_CAL_POINTS 140 /* 10 patterns in 9 sizes, 5 in 7 numbers of messages */
struct ry_calibration {
    struct ry_cost_model model; /* what could not be measured is as ry_cost_guess() has it */
    int npoints;
    struct ry_cal_point points[RY_CAL_POINTS];
    /* relative errors of the model, by pattern: half of the points have less, the worst; 0 points: not measured */
    struct {
        int points;
        double median, worst;
    } fit[RY_CAL_KINDS];
};

/** All ranks call it together and get the same model. Takes about `seconds`, connecting to peers for the first time not
 *  included. -1 with `err` if the runner failed. */
int ry_calibrate(struct ry_calibration *out, const struct ry_cluster *cluster, const struct ry_cal_runner *runner,
                 double seconds, struct ry_err *err);

/** The fit: t[i] = *a + x[i] * *b, as above. n > 0. */
void ry_cal_fit(int n, const double *x, const double *t, double *a, double *b);

#endif
