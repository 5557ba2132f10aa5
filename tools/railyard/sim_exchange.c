/*
 * sim_exchange.c: `railyard sim --exchange BYTES`: one skewed exchange by each strategy that needs no rows, from the
 * steps of all ranks' plans.
 *
 * Owns: the matrices, the table. Not: what steps cost (plan/cost.h).
 *
 * Two matrices, both by Zipf: what a rank sends to its k-th favourite goes with 1 / k^s. Popular: all ranks have the
 * same favourites, as experts are popular. Pairs: each rank has favourites of its own. Favourites are drawn, so a few
 * draws are taken and their means shown.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "plan/cost_parts.h"
#include "sim.h"

#define DRAWS 3

enum { POPULAR, PAIRS, MATRICES };

static uint64_t draw(uint64_t *state, uint64_t below)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (*state * UINT64_C(0x2545F4914F6CDD1D) >> 20) % below;
}

static void shuffle(int *order, int n, uint64_t *state)
{
    for (int i = 0; i < n; i++)
        order[i] = i;
    for (int i = n - 1; i > 0; i--) {
        int j = (int)draw(state, (uint64_t)i + 1), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
}

/* `order` and `weight`: [n], scratch. */
static void fill(uint64_t *matrix, int n, int kind, const struct sim_skewed *s, uint64_t *state, int *order,
                 double *weight)
{
    double sum = 0;
    for (int k = 0; k < n; k++)
        sum += weight[k] = pow(k + 1, -s->exponent);
    for (int from = 0; from < n; from++) {
        if (kind == PAIRS || !from)
            shuffle(order, n, state);
        for (int k = 0; k < n; k++) /* rows of 16 bytes, as buffers of frameworks are cut */
            matrix[(size_t)from * (size_t)n + (size_t)order[k]] = (uint64_t)(s->bytes * weight[k] / sum / 16) * 16;
    }
}

/* All ranks' plans, carried out by the model: microseconds, or NAN. *groups and *plan_us: of the plans. */
static double by_steps(const struct ry_cost_model *m, const struct ry_cluster *c, const uint64_t *matrix,
                       uint64_t *columns, enum ry_strategy strategy, int *groups, double *plan_us, struct ry_err *err)
{
    size_t n = (size_t)c->nranks;
    double us = NAN;
    struct ry_plan **plans = calloc(n, sizeof(struct ry_plan *));
    uintptr_t *at = malloc(n * sizeof *at);
    uint64_t begun = ry_now_ns();
    struct ry_balance *balance = strategy == RY_BALANCED ? ry_balance_of(c, matrix, err) : NULL;
    double stages_us = (double)(ry_now_ns() - begun) / 1e3, built_us = 0;
    if (!plans || !at || (strategy == RY_BALANCED && !balance))
        goto out;
    for (size_t r = 0; r < n; r++) {
        struct ry_slice slice;
        if (ry_slice_init(&slice, c, (int)r, strategy, err))
            goto out;
        for (size_t i = 0; i < (size_t)slice.nrows * (size_t)slice.ncols; i++)
            slice.cells[i] =
                matrix[(size_t)slice.rows[i / (size_t)slice.ncols] * n + (size_t)slice.cols[i % (size_t)slice.ncols]];
        if (balance && slice.nwords)
            ry_balance_words(balance, c, c->node[r], slice.words);
        at[0] = 4096; /* segments follow each other */
        for (size_t p = 1; p < n; p++)
            at[p] = at[p - 1] + matrix[r * n + p - 1];
        struct ry_plan_input in = {.cluster = c,
                                   .rank = (int)r,
                                   .strategy = strategy,
                                   .send = matrix + r * n,
                                   .recv = columns + r * n,
                                   .slice = &slice,
                                   .send_at = at};
        begun = ry_now_ns();
        plans[r] = ry_plan_build(&in, err);
        built_us = fmax(built_us, (double)(ry_now_ns() - begun) / 1e3);
        ry_slice_free(&slice);
        if (!plans[r])
            goto out;
    }
    *groups = plans[0]->ngroups;
    *plan_us = stages_us + built_us;
    us = ry_cost_plans(m, c, plans);
    if (isnan(us))
        ry_fail(err, "out of memory");
out:
    for (size_t r = 0; plans && r < n; r++)
        ry_plan_free(plans[r]);
    free(plans);
    free(at);
    ry_balance_free(balance);
    return us;
}

/* What jobs would choose, by the estimate from loads. */
static enum ry_strategy chosen(const struct ry_cost_model *m, const struct ry_cluster *c, const uint64_t *matrix,
                               const uint64_t *columns, struct ry_load *loads)
{
    struct ry_choice choice;
    uint64_t *relayed = calloc(2 * (size_t)c->nranks, sizeof *relayed), *arriving = relayed ? relayed + c->nranks : NULL;
    for (int from = 0; relayed && from < c->nranks; from++) /* as the yardmaster knows it */
        for (int to = 0; to < c->nranks; to++) {
            int relay = c->node[from] == c->node[to] ? to : ry_relay(c, from, c->node[to]);
            arriving[relay] += c->node[from] == c->node[to] ? 0 : matrix[(size_t)from * (size_t)c->nranks + (size_t)to];
            relayed[relay] += relay == to ? 0 : matrix[(size_t)from * (size_t)c->nranks + (size_t)to];
        }
    for (int r = 0; r < c->nranks; r++)
        ry_load_of(&loads[r], c, r, matrix + (size_t)r * (size_t)c->nranks, columns + (size_t)r * (size_t)c->nranks,
                   NULL);
    ry_cost_choose(&choice, m, NULL, c, loads, &(struct ry_cost_matrix){.relayed = relayed, .arriving = arriving}, 0.05);
    free(relayed);
    return choice.strategy;
}

static int one_size(const struct sim_skewed *s, const struct ry_cost_model *given, const struct ry_cluster *c,
                    struct ry_err *err)
{
    static const char *const kinds[MATRICES] = {"popular", "pairs"};
    static const enum ry_strategy ways[] = {RY_DIRECT, RY_HIERARCHICAL, RY_BALANCED};
    size_t n = (size_t)c->nranks;
    struct ry_cost_model model = *given;
    uint64_t *matrix = malloc(2 * n * n * sizeof *matrix), *columns = matrix + n * n;
    struct ry_load *loads = malloc(n * sizeof *loads);
    int *order = malloc(n * sizeof *order), rc = 0;
    double *weight = malloc(n * sizeof *weight);
    if (!matrix || !loads || !order || !weight)
        rc = ry_fail(err, "out of memory for %d GPUs", c->nranks);
    model.node_comm = true; /* jobs split them off */
    model.measured = true;  /* no doubt about made-up figures */
    for (int kind = 0; kind < MATRICES && !rc; kind++) {
        double us[RY_STRATEGIES] = {0}, plan_us = INFINITY, took, by_auto = 0, by_best = 0;
        int groups = 0, stages = 0, choices[RY_STRATEGIES] = {0};
        uint64_t state = s->seed * 2654435761u + 88172645463325252u;
        for (int d = 0; d < DRAWS && !rc; d++) {
            fill(matrix, c->nranks, kind, s, &state, order, weight);
            for (size_t i = 0; i < n * n; i++)
                columns[i % n * n + i / n] = matrix[i];
            enum ry_strategy taken = chosen(&model, c, matrix, columns, loads);
            double best = INFINITY;
            choices[taken]++;
            for (size_t w = 0; w < sizeof ways / sizeof *ways && !rc; w++) {
                double t = by_steps(&model, c, matrix, columns, ways[w], &groups, &took, err);
                rc = isnan(t) ? -1 : 0;
                us[ways[w]] += t / DRAWS;
                t += ways[w] == RY_BALANCED ? RY_STAGES_US * pow(c->nnodes, 3) : 0; /* which jobs wait for, as for the exchange */
                best = fmin(best, t);
                by_auto += ways[w] == taken ? t : 0;
            }
            by_best += best;
            stages += groups; /* balanced was last */
            plan_us = fmin(plan_us, took);
        }
        if (rc)
            break;
        char choice[64] = "";
        for (int w = 0; w < RY_STRATEGIES; w++)
            if (choices[w])
                snprintf(choice + strlen(choice), sizeof choice - strlen(choice), "%s%s", *choice ? ", " : "",
                         ry_strategy_name((enum ry_strategy)w));
        printf("  %4d  %-7s  %10.0f  %12.0f  %10.0f  %8.2fx  %8.2fx  %6.1f  %10.0f  %+11.1f %%  %s\n", c->nranks, kinds[kind],
               us[RY_DIRECT], us[RY_HIERARCHICAL], us[RY_BALANCED], us[RY_DIRECT] / us[RY_BALANCED],
               us[RY_HIERARCHICAL] / us[RY_BALANCED], (double)stages / DRAWS, plan_us, 100 * (by_auto / by_best - 1), choice);
    }
    free(matrix);
    free(loads);
    free(order);
    free(weight);
    return rc;
}

int sim_skewed(const struct sim_skewed *s, const struct sim_study *study, struct ry_err *err)
{
    const struct ry_fabric *f = &study->points[0].fabric;
    printf("one exchange of %.4g MiB from every GPU, Zipf with exponent %g; nodes of %d GPUs, %d NIC%s of %.4g GB/s "
           "together, %.4g GB/s "
           "inside",
           s->bytes / 1048576, s->exponent, f->gpus, f->nics, f->nics == 1 ? "" : "s", f->node_gbs, f->local_gbs);
    if (s->incast > 0)
        printf(";\na NIC that many nodes send to loses up to %g %%", 100 * s->incast);
    printf("\n\n  %4s  %-7s  %10s  %12s  %10s  %9s  %9s  %6s  %10s  %13s  %s\n", "GPUs", "matrix", "direct us",
           "hierarchical", "balanced", "to direct", "to hier.", "groups", "planned us", "auto to best", "auto takes");
    for (int i = 0; i < study->npoints; i++) {
        struct sim_point *p = &study->points[i];
        struct ry_cluster *c = ry_fabric_cluster(&p->fabric, err);
        if (!c)
            return -1;
        p->model.nic_incast = s->incast;
        int rc = c->nranks > SIM_SKEWED_MOST
                     ? ry_fail(err, "%d GPUs are more than the %d whose plans are built: give fewer --nodes", c->nranks,
                               SIM_SKEWED_MOST)
                     : one_size(s, &p->model, c, err);
        ry_cluster_free(c);
        if (rc)
            return -1;
    }
    return 0;
}
