/* study.c: see study.h. */
#include "place/study.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "place/assign.h"
#include "place/locality.h"
#include "place/random.h"

int ry_study_check(const struct ry_study *s, struct ry_err *err)
{
    if (s->fit < 0 || s->batches < 1 || s->batch < 1)
        return ry_fail(err,
                       "a study needs samples to learn from (%d), batches (%d) and samples in each (%d) above zero",
                       s->fit, s->batches, s->batch);
    bool distinct = s->counting == RY_DISTINCT;
    int have = distinct ? s->routing->choice_samples : s->routing->samples;
    if (s->end > have || s->end - s->fit < s->batch)
        return ry_fail(
            err,
            "%d samples are recorded%s: with %d to learn from, %d are left, but a batch has %d: learn from fewer "
            "or make batches smaller",
            have, distinct ? " with token-level choices, which distinct pairs need" : "", s->fit,
            have > s->fit ? have - s->fit : 0, s->batch);
    return 0;
}

void ry_study_batch(const struct ry_study *s, int k, int *sample)
{
    uint64_t rng = s->seed * UINT64_C(1000003) + (uint64_t)k;
    int n = s->end - s->fit;
    for (int i = 0; i < s->batch; i++) {
        /* Floyd's way of drawing without replacement, then an insertion at a random position for a random order. */
        int last = n - s->batch + i, pick = (int)ry_random_below(&rng, (uint64_t)last + 1) + s->fit;
        for (int j = 0; j < i; j++)
            if (sample[j] == pick)
                pick = last + s->fit;
        int at = (int)ry_random_below(&rng, (uint64_t)i + 1);
        sample[i] = sample[at];
        sample[at] = pick;
    }
}

/* What a run over the batches needs. */
struct run {
    int *sample, *capacity, *home;
    struct ry_netmoe *netmoe;
    struct ry_homes *homes;
    float *nodes, *ranks;
};

static void run_free(struct run *r)
{
    free(r->sample);
    free(r->capacity);
    free(r->home);
    free(r->nodes);
    free(r->ranks);
    ry_netmoe_free(r->netmoe);
    ry_homes_free(r->homes);
}

static int run_new(struct run *r, const struct ry_study *s, bool layers, bool square, struct ry_err *err)
{
    size_t B = (size_t)s->batch;
    int slots = square ? s->batch : 0;
    *r = (struct run){0};
    if (ry_study_check(s, err))
        return -1;
    r->sample = malloc(B * sizeof *r->sample);
    r->capacity = malloc((size_t)s->cluster->nranks * sizeof *r->capacity);
    r->home = malloc((size_t)(s->routing->layers + 1) * B * sizeof *r->home);
    r->nodes = malloc((size_t)ry_homes_groups(s->routing->layers) * B * (size_t)s->cluster->nnodes * sizeof *r->nodes);
    r->ranks = malloc(B * (size_t)s->cluster->nranks * sizeof *r->ranks);
    if (!r->sample || !r->capacity || !r->home || !r->nodes || !r->ranks) {
        run_free(r);
        return ry_fail(err, "out of memory for a batch of %d samples", s->batch);
    }
    if (layers)
        r->netmoe = ry_netmoe_new(s->cluster, s->routing->layers, s->routing->experts, s->batch, slots, err);
    else
        r->homes = ry_homes_new(s->cluster, s->batch, ry_homes_groups(s->routing->layers), slots, err);
    if (!r->netmoe && !r->homes) {
        run_free(r);
        return -1;
    }
    ry_capacity_even(r->capacity, s->cluster->nranks, s->batch);
    return 0;
}

static struct ry_problem problem_of(const struct ry_study *s, const struct run *r)
{
    return (struct ry_problem){.cluster = s->cluster,
                               .routing = s->routing,
                               .nsamples = s->batch,
                               .sample = r->sample,
                               .capacity = r->capacity,
                               .expert_rank = s->expert_rank,
                               .counting = s->counting,
                               .row_bytes = s->row_bytes,
                               .model = s->model};
}

/* One batch's layers; once: the first layer's choice stays. */
static void place_layers(struct run *r, const struct ry_study *s, const struct ry_netmoe_options *o, enum ry_when when)
{
    size_t B = (size_t)s->batch;
    for (size_t l = 0; l < (size_t)s->routing->layers; l++) {
        int *from = r->home + l * B, *to = from + B;
        if (when == RY_WHEN_EACH_LAYER || (when == RY_WHEN_ONCE && l == 0))
            ry_netmoe_layer(r->netmoe, o, (int)l, from, to);
        else
            memcpy(to, from, B * sizeof *to);
    }
}

static void account(struct ry_study_result *out, double us, uint64_t calls, double *us_before, uint64_t *calls_before)
{
    double mean = calls > *calls_before ? (us - *us_before) / (double)(calls - *calls_before) : 0;
    out->worst_us = mean > out->worst_us ? mean : out->worst_us;
    out->solver_us = calls ? us / (double)calls : 0;
    *us_before = us;
    *calls_before = calls;
}

int ry_study_netmoe(const struct ry_study *s, const struct ry_netmoe_options *o, enum ry_when when,
                    struct ry_study_result *out, struct ry_err *err)
{
    struct run r;
    double before = 0;
    uint64_t calls = 0, calls_before = 0;
    if (run_new(&r, s, true, o->homes.solver == RY_SOLVE_KUHN_MUNKRES, err))
        return -1;
    *out = (struct ry_study_result){0};
    int failed = 0;
    for (int k = 0; k < s->batches && !failed; k++) {
        struct ry_netmoe_options here = *o;
        here.homes.seed += (uint64_t)k << 40;
        ry_study_batch(s, k, r.sample);
        struct ry_problem p = problem_of(s, &r);
        ry_home_in_order(r.home, r.capacity, s->cluster->nranks, s->batch);
        if (!(failed = ry_netmoe_start(r.netmoe, &p, err))) {
            place_layers(&r, s, &here, when);
            failed = ry_traffic_add(&out->traffic, &p, r.home, (size_t)s->batch, err);
            double us = ry_netmoe_solver_us(r.netmoe, &calls);
            account(out, us, calls, &before, &calls_before);
        }
    }
    run_free(&r);
    return failed;
}

int ry_study_homes(const struct ry_study *s, const struct ry_homes_options *o, struct ry_study_result *out,
                   struct ry_err *err)
{
    struct run r;
    double before = 0;
    uint64_t calls = 0, calls_before = 0;
    if (run_new(&r, s, false, o->solver == RY_SOLVE_KUHN_MUNKRES, err))
        return -1;
    *out = (struct ry_study_result){0};
    int failed = 0;
    for (int k = 0; k < s->batches && !failed; k++) {
        ry_study_batch(s, k, r.sample);
        struct ry_problem p = problem_of(s, &r);
        ry_home_in_order(r.home, r.capacity, s->cluster->nranks, s->batch);
        failed = ry_problem_check(&p, err) || ry_homes_affinities(&p, r.nodes, r.ranks, err) ? -1 : 0;
        if (!failed) {
            ry_homes_solve(r.homes, o, s->batch, r.capacity, ry_homes_groups(s->routing->layers), r.nodes, r.ranks,
                           r.home, r.home);
            failed = ry_traffic_add(&out->traffic, &p, r.home, 0, err);
            double us = ry_homes_solver_us(r.homes, &calls);
            account(out, us, calls, &before, &calls_before);
        }
    }
    run_free(&r);
    return failed;
}

struct ry_predictor *ry_study_predictor(const struct ry_study *s, int history, struct ry_err *err)
{
    struct ry_predictor *p = ry_predictor_new(s->routing->layers, s->routing->experts, history, err);
    for (int i = 0; p && i < s->fit; i++)
        ry_predictor_observe(p, ry_counts_at(s->routing, i, 0));
    if (p)
        ry_predictor_fit(p);
    return p;
}

int ry_study_worth(const struct ry_study *s, const struct ry_netmoe_options *options, int history, double margin,
                   struct ry_worth *out, struct ry_err *err)
{
    struct ry_study trial = *s;
    struct ry_netmoe_options o = *options;
    struct ry_study_result still, placed;
    struct ry_predictor *learned = NULL;
    *out = (struct ry_worth){.dispersion = ry_locality(s->routing, 0, s->fit)};
    trial.fit = s->fit * 3 / 4;
    trial.end = s->fit;
    if (trial.end - trial.fit < trial.batch)
        trial.batch = trial.end - trial.fit;
    if (trial.batch < s->cluster->nnodes) {
        snprintf(out->why, sizeof out->why,
                 "declined: %d samples to learn from are too few to tell whether placing helps", s->fit);
        return 0;
    }
    if (o.scatter == RY_SCATTER_PREDICTED && !(o.predictor = learned = ry_study_predictor(&trial, history, err)))
        return -1;
    int failed = ry_study_netmoe(&trial, &o, RY_WHEN_NEVER, &still, err) ||
                 ry_study_netmoe(&trial, &o, RY_WHEN_EACH_LAYER, &placed, err);
    ry_predictor_free(learned);
    if (failed)
        return -1;
    bool busiest = o.homes.busiest;
    double before = (double)(busiest ? still.traffic.busiest_nic : still.traffic.cross);
    double after = (double)(busiest ? placed.traffic.busiest_nic : placed.traffic.cross);
    const char *what = busiest ? "busiest NIC's rows" : "cross-node rows";
    out->gain = before > 0 ? 1 - after / before : 0;
    if (out->dispersion < RY_LOCALITY_LEAST)
        snprintf(out->why, sizeof out->why,
                 "declined: samples choose experts as alike as chance makes them (dispersion %.2f, 1 is chance): "
                 "nothing to place by; a trial saved %.1f %% of the %s",
                 out->dispersion, 100 * out->gain, what);
    else if (out->gain < margin)
        snprintf(out->why, sizeof out->why,
                 "declined: a trial on %d batches of the samples learned from saved %.1f %% of the %s, less than "
                 "the %.1f %% that it must (dispersion %.2f)",
                 trial.batches, 100 * out->gain, what, 100 * margin, out->dispersion);
    else
        snprintf(
            out->why, sizeof out->why,
            "worth while: a trial on %d batches of the samples learned from saved %.1f %% of the %s (dispersion %.2f)",
            trial.batches, 100 * out->gain, what, out->dispersion);
    out->worth = out->dispersion >= RY_LOCALITY_LEAST && out->gain >= margin;
    return 0;
}

/* The node affinities of samples under an expert map, all layers together, and their sums. */
static int affinities(const struct ry_routing *r, const int *which, int n, const int *expert_node, size_t nodes,
                      enum ry_counting counting, int32_t *affinity, int64_t *rows)
{
    uint32_t *layers = malloc((size_t)r->layers * nodes * sizeof *layers);
    for (int i = 0; layers && i < n; i++) {
        ry_affinity_by(r, which[i], expert_node, (int)nodes, counting, layers);
        for (size_t j = 0; j < (size_t)r->layers * nodes; j++) {
            affinity[(size_t)i * nodes + j % nodes] += (int32_t)layers[j];
            rows[i] += layers[j];
        }
    }
    free(layers);
    return layers ? 0 : -1;
}

int ry_study_cross(const struct ry_batches *b, enum ry_homes_by by, const int32_t *guess, double *crossing,
                   struct ry_err *err)
{
    size_t nodes = (size_t)b->nodes, size = 0;
    for (size_t m = 0; m < nodes; m++)
        size += (size_t)b->share[m];
    int batches = b->n / (int)size, rc = -1;
    int32_t *affinity = calloc((size_t)b->n * nodes, sizeof *affinity), *cost = calloc(size * nodes, sizeof *cost);
    int64_t *rows = calloc((size_t)b->n, sizeof *rows);
    int *home = malloc(size * sizeof *home);
    struct ry_assign *ws = ry_assign_new((int)size, b->nodes, 0, err);
    if (!ws || !affinity || !cost || !rows || !home ||
        affinities(b->routing, b->which, b->n, b->expert_node, nodes, b->counting, affinity, rows)) {
        ry_fail(err, "out of memory for batches of %zu samples", size);
        goto out;
    }
    const int32_t *by_what = by == RY_HOMES_KNOWN ? affinity : guess;
    for (int i = 0; i < batches; i++) {
        size_t first = (size_t)i * size;
        for (size_t j = 0; by != RY_HOMES_IN_ORDER && j < size * nodes; j++)
            cost[j] = -by_what[first * nodes + j];
        struct ry_assign_problem p = {.nsamples = (int)size, .nplaces = b->nodes, .cost = cost, .capacity = b->share};
        ry_assign(ws, by == RY_HOMES_IN_ORDER ? RY_SOLVE_NONE : RY_SOLVE_EXACT, &p, home);
        for (size_t s = first; s < first + size; s++)
            crossing[s] = 2.0 * (double)(rows[s] - affinity[s * nodes + (size_t)home[s - first]]);
    }
    rc = batches * (int)size;
out:
    ry_assign_free(ws);
    free(affinity);
    free(cost);
    free(rows);
    free(home);
    return rc;
}
