/* sim.c: see sim.h. */
#include "sim/sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *ry_sim_exchange_name(int exchange)
{
    static const char *const names[RY_EXCHANGES] = {"dispatch", "combine", "combine_grad", "dispatch_grad"};
    return exchange >= 0 && exchange < RY_EXCHANGES ? names[exchange] : "?";
}

struct run {
    const struct ry_sim *sim;
    struct ry_workload w;
    struct ry_placer *placer;
    struct ry_exchange *x;
    double nic_most[RY_PLACINGS][RY_SIM_STRATEGIES], nic_mean[RY_PLACINGS][RY_SIM_STRATEGIES];
    double crossing[RY_PLACINGS], distinct[RY_PLACINGS]; /* rows, all exchanges counted */
    uint64_t moved[RY_PLACINGS];
};

static void take(struct run *run, enum ry_placing p, struct ry_sim_sums *by, int exchange,
                 const struct ry_exchange_cost costs[RY_SIM_STRATEGIES])
{
    for (int s = 0; s < RY_SIM_STRATEGIES; s++) {
        by[s].us[exchange] += costs[s].us;
        by[s].cross_bytes += costs[s].cross_bytes;
        by[s].local_bytes += costs[s].local_bytes;
        run->nic_most[p][s] += costs[s].nic_most;
        run->nic_mean[p][s] += costs[s].nic_mean;
    }
}

/* What was counted in copies: that cross; the load of the nodes' experts. */
static void take_rows(struct run *run, enum ry_placing p, struct ry_sim_placed *out)
{
    int N = run->sim->cluster->nnodes;
    const uint64_t *rows = ry_exchange_node_rows(run->x);
    uint64_t all = 0, most = 0, distinct;
    run->crossing[p] += (double)ry_exchange_crossing(run->x, &distinct);
    run->distinct[p] += (double)distinct;
    for (int n = 0; n < N; n++) {
        all += rows[n];
        most = rows[n] > most ? rows[n] : most;
    }
    out->node_load += all ? (double)most * N / (double)all : 1;
}

static void simulate(struct run *run, enum ry_placing p, struct ry_sim_placed *out)
{
    const struct ry_sim *s = run->sim;
    const struct ry_workload *w = &run->w;
    struct ry_exchange_cost costs[RY_WAYS][RY_SIM_STRATEGIES];
    struct ry_placed at;
    ry_placer_step(run->placer, p, &at);
    run->moved[p] += at.moved;
    for (int l = 0; l < w->layers; l++) {
        const int *expert_rank = at.expert_rank + (size_t)l * (size_t)w->experts;
        for (int next = 0; next < 2; next++) { /* homes of the dispatch, homes of the combine */
            if (next == 0 || at.stride) {
                ry_exchange_count(run->x, w, l, at.home + (size_t)(l + next) * at.stride, expert_rank);
                ry_exchange_costs(run->x, s->model, s->row_bytes, s->rails, costs);
            }
            take(run, p, out->by, next ? RY_COMBINE_GRAD : RY_DISPATCH, costs[RY_THERE]);
            take(run, p, out->by, next ? RY_COMBINE : RY_DISPATCH_GRAD, costs[RY_BACK]);
            take_rows(run, p, out);
        }
    }
}

static void finish(struct run *run, struct ry_sim_result *out)
{
    double steps = run->sim->steps, layers = run->w.layers, base = 0;
    out->distinct = 1;
    for (int p = RY_PLACINGS - 1; p >= 0; p--)
        if (out->at[p].done) {
            base = run->crossing[p];
            out->distinct = base > 0 && run->w.pairs ? run->distinct[p] / base : 1;
        }
    for (int p = 0; p < RY_PLACINGS; p++) {
        struct ry_sim_placed *at = &out->at[p];
        if (!at->done)
            continue;
        at->moved = (double)run->moved[p] / (steps * layers * run->w.samples);
        at->cross = base > 0 ? run->crossing[p] / base : 1;
        at->node_load /= 2 * steps * layers;
        for (int s = 0; s < RY_SIM_STRATEGIES; s++) {
            struct ry_sim_sums *b = &at->by[s];
            for (int e = 0; e < RY_EXCHANGES; e++) {
                b->us[e] /= steps;
                b->step_us += b->us[e];
            }
            b->layer_us = b->step_us / layers;
            b->cross_bytes /= steps;
            b->local_bytes /= steps;
            b->nic_imbalance = run->nic_mean[p][s] > 0 ? run->nic_most[p][s] / run->nic_mean[p][s] : 1;
        }
    }
}

static void tell(const struct ry_sim *s, const char *what, double done)
{
    if (s->progress)
        s->progress(s->context, what, done);
}

static int go(struct run *run, struct ry_sim_result *out, struct ry_err *err)
{
    const struct ry_sim *s = run->sim;
    struct ry_err why = {""};
    char what[100];
    int wanted = 0, done = 0;
    for (int p = 0; p < RY_PLACINGS; p++) {
        if (!s->placings[p])
            continue;
        snprintf(what, sizeof what, "learning for %s", ry_placing_name((enum ry_placing)p));
        tell(s, what, 0);
        int cannot = ry_placer_learn(run->placer, (enum ry_placing)p, out->at[p].note, &why);
        if (cannot < 0)
            return ry_fail(err, "%s: %s", ry_placing_name((enum ry_placing)p), why.msg);
        if (cannot)
            snprintf(out->at[p].note, sizeof out->at[p].note, "left out: %.320s", why.msg);
        out->at[p].done = !cannot;
        wanted += !cannot;
    }
    if (!wanted)
        return ry_fail(err, "none of the placements can be simulated here: %s", why.msg);
    for (int k = 0; k < s->steps; k++) {
        tell(s, "drawing samples", (double)done / (wanted * s->steps));
        if (ry_workload_draw(&run->w, k, err))
            return -1;
        for (int p = 0; p < RY_PLACINGS; p++) {
            if (!out->at[p].done)
                continue;
            snprintf(what, sizeof what, "%s, step %d of %d", ry_placing_name((enum ry_placing)p), k + 1, s->steps);
            tell(s, what, (double)done++ / (wanted * s->steps));
            simulate(run, (enum ry_placing)p, &out->at[p]);
        }
    }
    finish(run, out);
    return 0;
}

int ry_sim_run(const struct ry_sim *s, struct ry_sim_result *out, struct ry_err *err)
{
    struct run *run = calloc(1, sizeof *run);
    int failed = -1;
    *out = (struct ry_sim_result){0};
    if (!run)
        return ry_fail(err, "out of memory");
    run->sim = s;
    if (s->steps < 1 || !(s->row_bytes > 0)) {
        ry_fail(err, "%d steps, rows of %g bytes: both must be above zero", s->steps, s->row_bytes);
    } else if (ry_workload_init(&run->w, &s->source, err)) {
        free(run);
        return -1;
    } else if (s->counting == RY_DISTINCT && !run->w.pairs) {
        ry_fail(err, "counting distinct pairs needs token-level choices, which the routing does not have");
    } else if ((run->x = ry_exchange_new(s->cluster, run->w.pairs, err)) &&
               (run->placer = ry_placer_new(s->cluster, &run->w, s->counting, err))) {
        const struct ry_workload *w = &run->w;
        failed = go(run, out, err);
        out->pairs = w->pairs;
        out->layers = w->layers;
        out->experts = w->experts;
        out->topk = w->topk;
        out->tokens = w->tokens;
        out->samples = w->samples;
        out->split = w->split;
        out->pool = w->pool;
        out->fit = w->fit;
        out->groups = w->groups;
        out->repeats = w->pool ? (double)w->samples / w->pool : 0;
        out->memory = (double)ry_exchange_memory(s->cluster) + (double)ry_placer_memory(s->cluster, w) +
                      2.0 * w->layers * w->samples * w->tokens * w->topk;
    }
    ry_placer_free(run->placer);
    ry_exchange_free(run->x);
    ry_workload_free(&run->w);
    free(run);
    return failed;
}
