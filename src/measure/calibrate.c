/* calibrate.c: see calibrate.h. */
#include "calibrate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LEAST_BYTES ((uint64_t)1 << 10)
#define MOST_BYTES ((uint64_t)64 << 20)
#define SMALL_BYTES 64 /* of each of many small messages */
#define MOST_MESSAGES 64
#define REPEATS 9
#define LEAST_REPEATS 3
#define MOST_ROUNDS 64
#define SIZES 9 /* LEAST_BYTES to MOST_BYTES by fours */

const char *ry_cal_name(enum ry_cal_kind kind)
{
    static const char *const names[RY_CAL_KINDS] = {"copy", "self",    "pair",    "local",
                                                    "node", "nic-one", "nic-all", "ucx-one", "ucx-all", "exchange"};
    return (unsigned)kind < RY_CAL_KINDS ? names[kind] : "?";
}

/* ---- patterns ---- */

static int rank_at(const struct ry_cluster *c, int node, int local)
{
    int r = c->node_first[node];
    while (c->node[r] != node || c->local[r] != local)
        r++;
    return r;
}

/* How many messages rank sends by itself in this pattern. */
static int peers(const struct ry_cluster *c, enum ry_cal_kind kind, int rank)
{
    int size = c->node_size[c->node[rank]], local = c->local[rank];
    switch (kind) {
    case RY_CAL_SELF:
        return 1;
    case RY_CAL_PAIR:
        return (local ^ 1) < size;
    case RY_CAL_LOCAL:
    case RY_CAL_NODE:
        return size - 1;
    case RY_CAL_NIC_ONE:
    case RY_CAL_UCX_ONE:
        return c->nnodes > 1 && local == 0;
    case RY_CAL_NIC_ALL:
    case RY_CAL_UCX_ALL:
        return c->nnodes > 1;
    case RY_CAL_EXCHANGE:
        return c->nranks;
    default:
        return 0;
    }
}

/* Whom the k-th message of `rank` goes to. More messages than peers go round again; nic-all goes through all remote
 * ranks. */
static int target(const struct ry_cluster *c, enum ry_cal_kind kind, int rank, int k)
{
    int node = c->node[rank], local = c->local[rank], size = c->node_size[node];
    switch (kind) {
    case RY_CAL_PAIR:
        return rank_at(c, node, local ^ 1);
    case RY_CAL_LOCAL:
    case RY_CAL_NODE:
        return rank_at(c, node, (local + 1 + k % (size - 1)) % size);
    case RY_CAL_NIC_ONE:
    case RY_CAL_NIC_ALL:
    case RY_CAL_UCX_ONE:
    case RY_CAL_UCX_ALL:
        node = (node + 1 + k % (c->nnodes - 1)) % c->nnodes;
        return rank_at(c, node, (local + k / (c->nnodes - 1)) % c->node_size[node]);
    case RY_CAL_EXCHANGE:
        return k % c->nranks;
    default:
        return rank;
    }
}

size_t ry_cal_messages(const struct ry_cluster *cluster, const struct ry_cal_point *point, int rank,
                       struct ry_cal_message *out, size_t most)
{
    size_t n = 0;
    for (int from = 0; from < cluster->nranks; from++) {
        int of_itself = peers(cluster, point->kind, from);
        int messages = point->messages && of_itself ? point->messages : of_itself;
        for (int k = 0; k < messages; k++) {
            int to = target(cluster, point->kind, from, k);
            if (rank >= 0 && from != rank && to != rank)
                continue;
            if (out && n < most)
                out[n] = (struct ry_cal_message){from, to, point->bytes / (uint64_t)messages};
            n++;
        }
    }
    return n;
}

/* What the links have to carry: the cost model's own view of a pattern. */
static int loads_of(struct ry_load *loads, const struct ry_cluster *c, const struct ry_cal_point *point)
{
    size_t n = ry_cal_messages(c, point, -1, NULL, 0);
    struct ry_cal_message *m = calloc(n ? n : 1, sizeof *m);
    if (!m)
        return -1;
    ry_cal_messages(c, point, -1, m, n);
    memset(loads, 0, (size_t)c->nranks * sizeof *loads);
    for (size_t i = 0; i < n; i++) {
        struct ry_load *from = &loads[m[i].from], *to = &loads[m[i].to];
        if (from == to) {
            from->self += m[i].bytes;
        } else if (c->node[m[i].from] == c->node[m[i].to]) {
            from->local_out += m[i].bytes;
            from->local_sends++;
            to->local_in += m[i].bytes;
            to->local_recvs++;
        } else {
            from->cross_out += m[i].bytes;
            from->cross_sends++;
            to->cross_in += m[i].bytes;
            to->cross_recvs++;
        }
    }
    free(m);
    return 0;
}

/* ---- measuring ---- */

struct calibration {
    struct ry_calibration *out;
    const struct ry_cluster *cluster;
    const struct ry_cal_runner *runner;
    double point_us; /* time for one point */
    struct ry_load *loads;
    struct ry_err *err;
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* All ranks see the same times, so they all decide alike. *slow: larger sizes would take too long. */
static int measure(struct calibration *c, struct ry_cal_point point, bool *slow)
{
    double us[REPEATS], once;
    struct ry_cal_runner run = *c->runner;
    if (c->out->npoints == RY_CAL_POINTS)
        return 0;
    /* The first time may connect peers; the second tells how long it takes. */
    if (run.run(run.context, &point, 1, &once, c->err) || run.run(run.context, &point, 1, &once, c->err))
        return -1;
    int repeats = (int)fmin(REPEATS, fmax(LEAST_REPEATS, c->point_us / fmax(once, 1)));
    int rounds = (int)fmin(MOST_ROUNDS, fmax(1, c->point_us / repeats / fmax(once, 1)));
    for (int i = 0; i < repeats; i++)
        if (run.run(run.context, &point, rounds, &us[i], c->err))
            return -1;
    qsort(us, (size_t)repeats, sizeof *us, by_value);
    point.repeats = repeats;
    point.us = us[(repeats - 1) / 4];
    point.low = us[0];
    point.high = us[repeats - 1];
    c->out->points[c->out->npoints++] = point;
    *slow = point.low * 4 * (2 + LEAST_REPEATS) > 3 * c->point_us; /* the next size, four times this one */
    return 0;
}

static int sweep_sizes(struct calibration *c, enum ry_cal_kind kind)
{
    bool slow = false;
    for (uint64_t bytes = LEAST_BYTES; bytes <= MOST_BYTES && !slow; bytes *= 4)
        if (measure(c, (struct ry_cal_point){.kind = kind, .bytes = bytes}, &slow))
            return -1;
    return 0;
}

static int sweep_messages(struct calibration *c, enum ry_cal_kind kind)
{
    bool slow = false;
    for (int n = 1; n <= MOST_MESSAGES && !slow; n *= 2)
        if (measure(c, (struct ry_cal_point){.kind = kind, .bytes = (uint64_t)n * SMALL_BYTES, .messages = n}, &slow))
            return -1;
    return 0;
}

/* ---- fitting ---- */

/* One weighted fit; where a line would begin or slope below zero, the best one that does not. */
static void fit_once(int n, const double *x, const double *t, const double *w, double *a, double *b)
{
    double sw = 0, sx = 0, st = 0, sxx = 0, sxt = 0;
    for (int i = 0; i < n; i++) {
        sw += w[i];
        sx += w[i] * x[i];
        st += w[i] * t[i];
        sxx += w[i] * x[i] * x[i];
        sxt += w[i] * x[i] * t[i];
    }
    double d = sw * sxx - sx * sx;
    *b = d > 1e-12 * sw * sxx ? (sw * sxt - sx * st) / d : 0;
    *a = (st - *b * sx) / sw;
    if (*b < 0) {
        *b = 0;
        *a = st / sw;
    } else if (*a < 0) {
        *a = 0;
        *b = sxx > 0 ? sxt / sxx : 0;
    }
}

#define HUBER 0.3 /* points that are off by more than this factor's logarithm count less */

void ry_cal_fit(int n, const double *x, const double *t, double *a, double *b)
{
    double w[RY_CAL_POINTS];
    n = n < RY_CAL_POINTS ? n : RY_CAL_POINTS;
    for (int i = 0; i < n; i++)
        w[i] = 1 / (t[i] * t[i]);
    fit_once(n, x, t, w, a, b);
    for (int round = 0; round < 30; round++) {
        for (int i = 0; i < n; i++) {
            double line = fmax(*a + *b * x[i], 1e-3 * t[i]), off = fabs(log(line / t[i]));
            w[i] = (off > HUBER ? HUBER / off : 1) / (t[i] * line);
        }
        fit_once(n, x, t, w, a, b);
    }
}

/* The line through a pattern's points, by bytes or by messages. False: not measured. */
static bool line(const struct calibration *c, enum ry_cal_kind kind, bool by_messages, double *a, double *b)
{
    double x[RY_CAL_POINTS], t[RY_CAL_POINTS];
    int n = 0;
    for (int i = 0; i < c->out->npoints; i++) {
        const struct ry_cal_point *p = &c->out->points[i];
        if (p->kind != kind || (p->messages > 0) != by_messages)
            continue;
        x[n] = by_messages ? p->messages : (double)p->bytes;
        t[n++] = p->us;
    }
    if (n < 2)
        return false;
    ry_cal_fit(n, x, t, a, b);
    return true;
}

/* What a message costs beyond its bytes. */
static double message_us(double each, double us_per_byte)
{
    return fmax(each - SMALL_BYTES * us_per_byte, 0);
}

static double per(double us_per_byte)
{
    return 1 / fmax(us_per_byte, 1e-9); /* a link that shows no cost per byte */
}

/* The most that any rank sends or gets over a link, or any node over its NIC, for each byte of a point; its messages.
 */
static void widths(struct calibration *c, enum ry_cal_kind kind, double *local, double *nic, double *messages)
{
    const struct ry_cluster *map = c->cluster;
    struct ry_cal_point unit = {.kind = kind, .bytes = (uint64_t)1 << 30};
    *local = *nic = *messages = 0;
    if (loads_of(c->loads, map, &unit))
        return;
    for (int node = 0; node < map->nnodes; node++) {
        double out = 0, in = 0;
        for (int r = 0; r < map->nranks; r++) {
            const struct ry_load *l = &c->loads[r];
            if (map->node[r] != node)
                continue;
            out += (double)l->cross_out;
            in += (double)l->cross_in;
            *local = fmax(*local, fmax((double)l->local_out, (double)l->local_in));
            *messages =
                fmax(*messages, fmax(fmax(l->local_sends, l->local_recvs), fmax(l->cross_sends, l->cross_recvs)));
        }
        *nic = fmax(*nic, fmax(out, in));
    }
    *local /= (double)unit.bytes;
    *nic /= (double)unit.bytes;
}

/* A link inside nodes, from the pattern that goes over it. False: not measured. */
static bool fit_inside(struct calibration *c, enum ry_cal_kind kind, struct ry_cost_link *out)
{
    double a, b, start, each, local, nic, messages;
    if (!line(c, kind, false, &a, &b) || !line(c, kind, true, &start, &each))
        return false;
    widths(c, kind, &local, &nic, &messages);
    each = message_us(each, b);
    *out = (struct ry_cost_link){fmax(a - c->out->model.group_us - messages * each, 0), per(b / local), each, true};
    return true;
}

/* The NIC, by way of NCCL or of UCX. The same. */
static bool fit_across(struct calibration *c, enum ry_cal_kind one, enum ry_cal_kind all, struct ry_cost_link *out, double *rank)
{
    double a, b, start, each, local, nic, messages, together;
    if (!line(c, one, false, &a, &b) || !line(c, all, true, &start, &each))
        return false;
    widths(c, one, &local, &nic, &messages);
    *rank = per(b / nic);
    if (line(c, all, false, &together, &b)) /* else every node has one rank, and `one` was all */
        widths(c, all, &local, &nic, &messages);
    each = message_us(each, b);
    *out = (struct ry_cost_link){fmax(a - c->out->model.group_us - each, 0), per(b / nic), each, true};
    return true;
}

static void fit_model(struct calibration *c)
{
    struct ry_cost_model *m = &c->out->model;
    double a, b, start, each;
    if (line(c, RY_CAL_COPY, false, &a, &b)) {
        m->copy_us = a;
        m->copy_bytes_per_us = per(b);
    }
    if (line(c, RY_CAL_SELF, false, &a, &b) && line(c, RY_CAL_SELF, true, &start, &each)) {
        each = message_us(each, b);
        m->link[RY_LINK_SELF] = (struct ry_cost_link){0, per(b), each, true};
        m->group_us = fmax(a - each, 0);
    }
    fit_inside(c, RY_CAL_LOCAL, &m->link[RY_LINK_LOCAL]);
    if (!fit_inside(c, RY_CAL_NODE, &m->link[RY_LINK_NODE])) {
        m->link[RY_LINK_NODE] = m->link[RY_LINK_LOCAL];
        m->link[RY_LINK_NODE].measured = false;
    }
    fit_across(c, RY_CAL_NIC_ONE, RY_CAL_NIC_ALL, &m->link[RY_LINK_NIC], &m->nic_rank_bytes_per_us);
    if (!fit_across(c, RY_CAL_UCX_ONE, RY_CAL_UCX_ALL, &m->ucx, &m->ucx_rank_bytes_per_us)) {
        m->ucx = m->link[RY_LINK_NIC];
        m->ucx.measured = false;
        m->ucx_rank_bytes_per_us = m->nic_rank_bytes_per_us;
    }
    m->measured = true;
}

/* ---- judging ---- */

static void judge(struct calibration *c)
{
    struct ry_calibration *out = c->out;
    struct ry_cost_model inside = out->model; /* where NODE carries what stays on a node */
    struct ry_cost_model across = ry_cost_over_ucx(&out->model);
    double error[RY_CAL_POINTS];
    inside.link[RY_LINK_LOCAL] = inside.link[RY_LINK_NODE];
    for (int i = 0; i < out->npoints; i++) {
        struct ry_cal_point *p = &out->points[i];
        if (p->kind == RY_CAL_COPY)
            p->model_us = out->model.copy_us + (double)p->bytes / out->model.copy_bytes_per_us;
        else if (!loads_of(c->loads, c->cluster, p))
            p->model_us = ry_cost_estimate(p->kind == RY_CAL_NODE                                   ? &inside
                                           : p->kind == RY_CAL_UCX_ONE || p->kind == RY_CAL_UCX_ALL ? &across
                                                                                                    : &out->model,
                                           c->cluster, c->loads, NULL, RY_DIRECT) -
                          out->model.agreement_us;
        if (p->kind == RY_CAL_SELF && p->messages) /* loads do not count messages to oneself */
            p->model_us += (p->messages - 1) * out->model.link[RY_LINK_SELF].message_us;
    }
    for (int k = 0; k < RY_CAL_KINDS; k++) {
        int n = 0;
        for (int i = 0; i < out->npoints; i++)
            if ((int)out->points[i].kind == k)
                error[n++] = fabs(out->points[i].model_us / out->points[i].us - 1);
        if (!n)
            continue;
        qsort(error, (size_t)n, sizeof *error, by_value);
        out->fit[k].points = n;
        out->fit[k].median = error[n / 2];
        out->fit[k].worst = error[n - 1];
    }
}

int ry_calibrate(struct ry_calibration *out, const struct ry_cluster *cluster, const struct ry_cal_runner *runner,
                 double seconds, struct ry_err *err)
{
    int largest = 0, bad = 0;
    for (int n = 0; n < cluster->nnodes; n++)
        largest = cluster->node_size[n] > largest ? cluster->node_size[n] : largest;
    *out = (struct ry_calibration){0};
    ry_cost_guess(&out->model, cluster);
    struct calibration c = {.out = out, .cluster = cluster, .runner = runner, .err = err};
    c.loads = calloc((size_t)cluster->nranks, sizeof *c.loads);
    if (!c.loads)
        return ry_fail(err, "out of memory for the loads of %d ranks", cluster->nranks);
    bool has[RY_CAL_KINDS] = {[RY_CAL_COPY] = true, [RY_CAL_SELF] = true, [RY_CAL_EXCHANGE] = cluster->nranks > 1};
    has[RY_CAL_PAIR] = largest > 2; /* otherwise node is the same */
    has[RY_CAL_LOCAL] = largest > 1;
    has[RY_CAL_NODE] = largest > 1 && cluster->nnodes > 1 && runner->node_comm;
    has[RY_CAL_NIC_ONE] = cluster->nnodes > 1;
    has[RY_CAL_NIC_ALL] = cluster->nnodes > 1 && largest > 1;
    has[RY_CAL_UCX_ONE] = has[RY_CAL_NIC_ONE] && runner->ucx;
    has[RY_CAL_UCX_ALL] = has[RY_CAL_NIC_ALL] && runner->ucx;
    int points = 0;
    for (int k = 0; k < RY_CAL_KINDS; k++)
        points += has[k] * SIZES;
    c.point_us = seconds * 1e6 / (points + 20);
    for (int k = 0; k < RY_CAL_KINDS && !bad; k++)
        if (has[k])
            bad = sweep_sizes(&c, (enum ry_cal_kind)k);
    if (!bad)
        bad = sweep_messages(&c, RY_CAL_SELF);
    if (!bad && has[RY_CAL_LOCAL])
        bad = sweep_messages(&c, RY_CAL_LOCAL);
    if (!bad && has[RY_CAL_NODE])
        bad = sweep_messages(&c, RY_CAL_NODE);
    if (!bad && cluster->nnodes > 1)
        bad = sweep_messages(&c, RY_CAL_NIC_ALL);
    if (!bad && has[RY_CAL_UCX_ONE])
        bad = sweep_messages(&c, RY_CAL_UCX_ALL);
    if (!bad) {
        fit_model(&c);
        judge(&c);
    }
    free(c.loads);
    return bad;
}
