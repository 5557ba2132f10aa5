/*
 * cost_help.h: clusters, matrices, loads and plans for the tests of the cost model.
 */
#ifndef RY_TESTS_COST_HELP_H
#define RY_TESTS_COST_HELP_H

#include <check.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "plan/cost.h"

static unsigned seed;

static inline void begin_seed(void)
{
    const char *given = getenv("RY_TEST_SEED");
    seed = given ? (unsigned)strtoul(given, NULL, 0) : (unsigned)(time(NULL) ^ getpid());
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("RY_TEST_SEED=%u\n", seed);
    fflush(stdout);
    srand(seed);
}

static inline double uniform(double low, double high)
{
    return low + (high - low) * rand() / RAND_MAX;
}

/* ---- clusters and exchanges ---- */

/* Seat i's node is nodes[i]. */
static inline struct ry_cluster *cluster_of(const int *nodes, int n, const char *prefix)
{
    struct ry_err err = {""};
    struct ry_seat *s = calloc((size_t)n, sizeof *s);
    for (int i = 0; i < n; i++) {
        s[i].version = RY_SEAT_VERSION;
        s[i].rank = i;
        snprintf(s[i].node, sizeof s[i].node, "%s%d", prefix, nodes[i]);
        snprintf(s[i].host, sizeof s[i].host, "%shost%d", prefix, nodes[i]);
        strcpy(s[i].gpu_name, "Test GPU");
    }
    struct ry_cluster *c = ry_cluster_build(s, n, &err);
    ck_assert_msg(c != NULL, "%s", err.msg);
    free(s);
    return c;
}

static inline struct ry_cluster *regular(int nodes, int size)
{
    int *at = calloc((size_t)(nodes * size), sizeof *at);
    for (int i = 0; i < nodes * size; i++)
        at[i] = i / size;
    struct ry_cluster *c = cluster_of(at, nodes * size, "n");
    free(at);
    return c;
}

static inline struct ry_cluster *random_cluster(int most)
{
    int n = 1 + rand() % most, nodes = 1 + rand() % n, *at = calloc((size_t)n, sizeof *at);
    bool scattered = rand() % 3 == 0;
    for (int i = 0; i < n; i++)
        at[i] = scattered ? rand() % nodes : i * nodes / n;
    struct ry_cluster *c = cluster_of(at, n, "n");
    free(at);
    return c;
}

/* All ranks' loads of a matrix; repeats[from][node] or NULL. */
static inline struct ry_load *loads_of(const struct ry_cluster *c, const uint64_t *matrix,
                                       const struct ry_repeats *repeats)
{
    size_t n = (size_t)c->nranks;
    struct ry_load *all = calloc(n, sizeof *all);
    uint64_t *column = calloc(n, sizeof *column);
    for (size_t r = 0; r < n; r++) {
        for (size_t from = 0; from < n; from++)
            column[from] = matrix[from * n + r];
        ry_load_of(&all[r], c, (int)r, matrix + r * n, column, repeats ? repeats + r * (size_t)c->nnodes : NULL);
    }
    free(column);
    return all;
}

static inline uint64_t *even(const struct ry_cluster *c, uint64_t bytes)
{
    size_t n = (size_t)c->nranks;
    uint64_t *m = calloc(n * n, sizeof *m);
    for (size_t i = 0; i < n * n; i++)
        m[i] = bytes;
    return m;
}

/* Two nodes behind 25 Gbit/s, NVLink inside; figures as seen on the virtual GPU cluster. */
static const struct ry_cost_model typical = {
    .link = {[RY_LINK_SELF] = {.alpha_us = 2, .bytes_per_us = 1e6, .message_us = 2},
             [RY_LINK_LOCAL] = {.alpha_us = 5, .bytes_per_us = 200e3, .message_us = 1},
             [RY_LINK_NODE] = {.alpha_us = 4, .bytes_per_us = 800e3, .message_us = 0.5},
             [RY_LINK_NIC] = {.alpha_us = 40, .bytes_per_us = 3e3, .message_us = 10}},
    .nic_rank_bytes_per_us = 2e3,
    .copy_us = 3,
    .copy_bytes_per_us = 1e6,
    .group_us = 15,
    .agreement_us = 50,
    .plan_us_per_rank = 0.2,
    .measured = true,
};

static inline void near(double got, double expected, const char *what)
{
    ck_assert_msg(fabs(got - expected) <= 1e-6 * fabs(expected), "%s: %.6f instead of %.6f", what, got, expected);
}

static int plan_chunks; /* of the plans of from_plans() */

/* What the steps cost, for all ranks' plans of a matrix; what each relays of plain bytes, and (may be NULL) what
   crosses into each node, zero before. */
static inline double from_plans(const struct ry_cost_model *model, const struct ry_cluster *c, const uint64_t *m, const struct ry_repeats *repeats,
                                enum ry_strategy strategy, uint64_t *relayed, uint64_t *packed_in)
{
    struct ry_err err = {""};
    int n = c->nranks;
    struct ry_plan **plans = calloc((size_t)n, sizeof *plans);
    uint64_t *column = calloc((size_t)n, sizeof *column);
    uintptr_t *at = calloc((size_t)n, sizeof *at);
    for (int r = 0; r < n; r++) {
        struct ry_slice slice;
        ck_assert_msg(!ry_slice_init(&slice, c, r, strategy, &err), "%s", err.msg);
        ry_slice_fill(&slice, c, m, repeats);
        for (int p = 0; p < n; p++)
            column[p] = m[p * n + r];
        at[0] = 4096; /* segments follow each other, as PyTorch lays them out */
        for (int p = 1; p < n; p++)
            at[p] = at[p - 1] + m[r * n + p - 1];
        struct ry_plan_input in = {.cluster = c,
                                   .rank = r,
                                   .strategy = strategy,
                                   .send = m + r * n,
                                   .recv = column,
                                   .slice = &slice,
                                   .send_at = at,
                                   .repeats = repeats ? repeats + r * c->nnodes : NULL,
                                   .chunks = plan_chunks};
        plans[r] = ry_plan_build(&in, &err);
        ck_assert_msg(plans[r] != NULL, "%s", err.msg);
        ry_slice_free(&slice);
        relayed[r] = 0;
        for (int from = 0; from < n; from++)
            for (int to = 0; to < n && c->node[from] != c->node[r]; to++)
                if (to != r && c->node[to] == c->node[r] && ry_relay(c, from, c->node[r]) == r)
                    relayed[r] += m[from * n + to];
    }
    for (int k = 0; packed_in && k < n; k++)
        for (int i = 0; i < plans[k]->nsteps; i++) {
            const struct ry_step *s = &plans[k]->steps[i];
            if (s->kind == RY_STEP_SEND && c->node[s->peer] != c->node[k])
                packed_in[c->node[s->peer]] += s->bytes;
        }
    double us = ry_cost_plans(model, c, plans);
    for (int r = 0; r < n; r++)
        ry_plan_free(plans[r]);
    free(plans);
    free(column);
    free(at);
    return us;
}

#endif
