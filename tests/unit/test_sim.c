/* test_sim.c: the simulator: workloads, who sends what to whom, each strategy's time by hand and against plans, whole
 * runs. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "measure/fabric.h"
#include "place/random.h"
#include "plan_help.h"
#include "sim/sim.h"

static struct ry_err err;

static const struct ry_fabric small = {"small", "", "GPU", 4, 2, 1, 400, 100};

/* A workload of random choices, with copies dropped here and there, for `c` with `per_rank` experts on each. */
static struct ry_workload random_workload(const struct ry_cluster *c, int per_rank, int samples, int tokens, int topk)
{
    struct ry_workload w = {.layers = 1,
                            .experts = c->nranks * per_rank,
                            .topk = topk,
                            .tokens = tokens,
                            .samples = samples,
                            .pairs = true,
                            .split = 1};
    size_t n = (size_t)samples * (size_t)tokens * (size_t)topk;
    w.choice = malloc(n * sizeof *w.choice);
    for (size_t i = 0; i < n; i++) {
        bool twin = true;
        while (twin) {
            w.choice[i] = (uint16_t)rnd((uint64_t)w.experts);
            twin = false;
            for (size_t k = i - i % (size_t)topk; k < i; k++)
                twin |= w.choice[k] == w.choice[i];
        }
        if (rnd(20) == 0)
            w.choice[i] = RY_NO_EXPERT;
    }
    return w;
}

/* ---- exchanges ---- */

/* The loads, relays and distinct rows are what the matrix gives by the engine's own functions, on any cluster. */
START_TEST(same_loads_as_the_engine)
{
    for (int round = 0; round < ROUNDS_OF(60); round++) {
        int n = 2 + (int)rnd(14), topk = 1 + (int)rnd(3), samples = 1 + (int)rnd(20), tokens = 1 + (int)rnd(30);
        struct ry_cluster *c = random_cluster(n);
        struct ry_workload w = random_workload(c, 2, samples, tokens, topk > 2 * n ? 1 : topk);
        struct ry_exchange *x = ry_exchange_new(c, true, &err);
        struct ry_exchange_cost costs[RY_WAYS][RY_SIM_STRATEGIES];
        struct ry_cost_model model;
        int *home = malloc((size_t)samples * sizeof *home), *rank = malloc((size_t)w.experts * sizeof *rank);
        size_t R = (size_t)n;
        uint64_t *m = calloc(R * R, sizeof *m), *column = malloc(R * sizeof *column),
                 *relays = calloc(R, sizeof *relays);
        ry_cost_guess(&model, c);
        for (int i = 0; i < samples; i++)
            home[i] = (int)rnd((uint64_t)n);
        for (int e = 0; e < w.experts; e++)
            rank[e] = (int)rnd((uint64_t)n);
        uint64_t crossing = 0, distinct = 0, said;
        for (int i = 0; i < samples; i++)
            for (int t = 0; t < tokens; t++) {
                uint64_t nodes = 0;
                for (int k = 0; k < w.topk; k++) {
                    uint16_t e = ry_workload_at(&w, 0, i)[t * w.topk + k];
                    if (e == RY_NO_EXPERT)
                        continue;
                    m[(size_t)rank[e] * R + (size_t)home[i]] += 10; /* the way back, rows of 10 bytes */
                    crossing += c->node[rank[e]] != c->node[home[i]];
                    nodes |= c->node[rank[e]] != c->node[home[i]] ? UINT64_C(1) << c->node[rank[e]] : 0;
                }
                distinct += (uint64_t)__builtin_popcountll(nodes);
            }
        ry_exchange_count(x, &w, 0, home, rank);
        ck_assert_uint_eq(ry_exchange_crossing(x, &said), crossing);
        ck_assert_uint_eq(said, distinct);
        ry_exchange_costs(x, &model, 10, false, costs);
        const uint64_t *passed;
        const struct ry_load *load = ry_exchange_loads(x, &passed);
        for (int from = 0; from < n; from++)
            for (int to = 0; to < n; to++)
                if (c->node[from] != c->node[to] && ry_relay(c, from, c->node[to]) != to)
                    relays[ry_relay(c, from, c->node[to])] += m[(size_t)from * R + (size_t)to];
        double nic = 0;
        for (int r = 0; r < n; r++) {
            struct ry_load want;
            for (size_t from = 0; from < R; from++)
                column[from] = m[from * R + (size_t)r];
            ry_load_of(&want, c, r, m + (size_t)r * R, column, NULL);
            ck_assert_mem_eq(&want, &load[r], sizeof want);
            ck_assert_uint_eq(passed[r], relays[r]);
            nic += (double)want.cross_out;
        }
        ck_assert_double_eq(costs[RY_BACK][RY_SIM_PLAIN].cross_bytes, nic);
        ck_assert_double_eq(costs[RY_THERE][RY_SIM_HIERARCHICAL].cross_bytes, nic);
        ck_assert_double_eq(costs[RY_THERE][RY_SIM_DEDUP].cross_bytes,
                            10.0 * (double)distinct + 4.0 * (double)crossing);
        free(home);
        free(rank);
        free(m);
        free(column);
        free(relays);
        free(w.choice);
        ry_exchange_free(x);
        ry_cluster_free(c);
    }
}
END_TEST

/* Times against the steps of all ranks' plans: plain within 2 %; hierarchical within half, since the estimate that jobs
 * decide by takes means over a node (test_cost). */
START_TEST(same_times_as_plans)
{
    double worst = 0;
    for (int round = 0; round < ROUNDS_OF(30); round++) {
        struct ry_fabric f = small;
        f.nodes = 2 + (int)rnd(4);
        f.gpus = 1 + (int)rnd(4);
        struct ry_cluster *c = ry_fabric_cluster(&f, &err);
        struct ry_cost_model model;
        ck_assert(c && !ry_fabric_model(&model, c, NULL, &err));
        struct ry_workload w = random_workload(c, 2, 2 * c->nranks, 40 + (int)rnd(200), 2);
        struct ry_exchange *x = ry_exchange_new(c, true, &err);
        struct ry_exchange_cost costs[RY_WAYS][RY_SIM_STRATEGIES];
        size_t R = (size_t)c->nranks;
        int *home = malloc(2 * R * sizeof *home), *rank = malloc((size_t)w.experts * sizeof *rank);
        for (size_t i = 0; i < 2 * R; i++)
            home[i] = (int)i / 2;
        ck_assert(!ry_experts_contiguous(rank, 1, w.experts, c->nranks, &err));
        ry_exchange_count(x, &w, 0, home, rank);
        ry_exchange_costs(x, &model, 4096, false, costs);
        for (int way = 0; way < RY_WAYS; way++) {
            struct job job = {.n = (int)R, .cluster = c, .matrix = calloc(R * R, sizeof(uint64_t))};
            for (size_t h = 0; h < R; h++)
                for (size_t e = 0; e < R; e++)
                    job.matrix[way ? e * R + h : h * R + e] = 4096u * (uint64_t)ry_exchange_rows(x)[h * R + e];
            build_all(&job, RY_DIRECT);
            double direct = ry_cost_plans(&model, c, job.plans);
            free_plans(&job);
            build_all(&job, RY_HIERARCHICAL);
            double hierarchical = ry_cost_plans(&model, c, job.plans);
            free_plans(&job);
            free(job.matrix);
            ck_assert_msg(fabs(costs[way][RY_SIM_PLAIN].us + model.agreement_us - direct) < 0.02 * direct,
                          "plain takes %g us, its plans %g", costs[way][RY_SIM_PLAIN].us, direct);
            worst = fmax(worst, fabs(log(costs[way][RY_SIM_HIERARCHICAL].us / hierarchical)));
        }
        free(home);
        free(rank);
        free(w.choice);
        ry_exchange_free(x);
        ry_cluster_free(c);
    }
    printf("hierarchical is off from its plans by %.1f %% at most\n", 100 * (exp(worst) - 1));
    ck_assert_double_lt(worst, log(1.5));
}
END_TEST

/* 2 nodes of 2: one sample at rank 0, 100 tokens, each to the experts of ranks 2 and 3. */
START_TEST(dedup_by_hand)
{
    struct ry_fabric f = {.nodes = 2, .gpus = 2, .nics = 1, .local_gbs = 1, .node_gbs = 1};
    struct ry_cluster *c = ry_fabric_cluster(&f, &err);
    const struct ry_cost_model m = {.link = {[RY_LINK_SELF] = {.bytes_per_us = 1000},
                                             [RY_LINK_LOCAL] = {.bytes_per_us = 100},
                                             [RY_LINK_NIC] = {.alpha_us = 10, .bytes_per_us = 10, .message_us = 1}},
                                    .nic_rank_bytes_per_us = 10,
                                    .copy_us = 0.5,
                                    .copy_bytes_per_us = 1000,
                                    .group_us = 5,
                                    .agreement_us = 20,
                                    .plan_us_per_rank = 0.25};
    uint16_t choice[200];
    for (int i = 0; i < 200; i++)
        choice[i] = (uint16_t)(2 + i % 2);
    struct ry_workload w = {
        .layers = 1, .experts = 4, .topk = 2, .tokens = 100, .samples = 1, .choice = choice, .pairs = true};
    struct ry_exchange *x = ry_exchange_new(c, true, &err);
    struct ry_exchange_cost k[RY_WAYS][RY_SIM_STRATEGIES];
    ry_exchange_count(x, &w, 0, (int[]){0}, (int[]){0, 1, 2, 3});
    ry_exchange_costs(x, &m, 1000, false, k);
    /* 200,000 B in two messages */
    ck_assert_double_eq_tol(k[RY_THERE][RY_SIM_PLAIN].us, 5 + 10 + 2 + 20000, 1e-6);
    /* 100 rows and 200 places in one; read and hash 200,000 B, gather 100,800, write out 200,000; rank 2 passes 100,000
       on while its own 50,000, by the model's mean, go to itself; two groups; agreement and plans of 4 ranks */
    double links = 10 + 1 + 10080, forward = 1000;
    double mirrored = 10 + links + (0.5 + 100.8) + (0.5 + 200) + forward + 20 + 1;
    ck_assert_double_eq_tol(k[RY_THERE][RY_SIM_DEDUP].us, mirrored + 200.5, 1e-6);
    ck_assert_double_eq_tol(k[RY_THERE][RY_SIM_SUM].us, mirrored + 200.5, 1e-6);
    ck_assert_double_eq_tol(k[RY_BACK][RY_SIM_SUM].us, mirrored, 1e-6);
    ck_assert_double_eq_tol(k[RY_BACK][RY_SIM_DEDUP].us, 5 + 10 + 2 + 20000 + 20, 1e-6); /* direct, engaged */
    ck_assert_double_eq(k[RY_THERE][RY_SIM_PLAIN].cross_bytes, 200000);
    ck_assert_double_eq(k[RY_THERE][RY_SIM_DEDUP].cross_bytes, 100800);
    ck_assert_double_eq(k[RY_BACK][RY_SIM_SUM].cross_bytes, 100800);
    ck_assert_double_eq(k[RY_BACK][RY_SIM_DEDUP].cross_bytes, 200000);
    ck_assert_double_eq(k[RY_THERE][RY_SIM_DEDUP].local_bytes, 100000);
    /* One of two nodes sends all: the busiest over the mean; with rails one of four NICs. */
    ck_assert_double_eq(k[RY_THERE][RY_SIM_PLAIN].nic_most / k[RY_THERE][RY_SIM_PLAIN].nic_mean, 2);
    ry_exchange_costs(x, &m, 1000, true, k);
    ck_assert_double_eq(k[RY_THERE][RY_SIM_PLAIN].nic_most / k[RY_THERE][RY_SIM_PLAIN].nic_mean, 4);
    ry_exchange_free(x);
    ry_cluster_free(c);
}
END_TEST

/* ---- workloads ---- */

static struct ry_routing *recorded(int samples, int choice_samples)
{
    struct ry_routing *r = ry_routing_new(samples, 2, 8, 2, 16, choice_samples, &err);
    ck_assert_msg(r != NULL, "%s", err.msg);
    uint16_t *counts = (uint16_t *)r->counts;
    for (int s = 0; s < samples; s++)
        for (int l = 0; l < 2; l++)
            for (int t = 0; t < 16; t++) {
                int a = (int)rnd(8), b = (a + 1 + (int)rnd(7)) % 8;
                for (int k = 0; k < 2; k++) {
                    counts[(s * 2 + l) * 8 + (k ? b : a)]++;
                    if (s < choice_samples)
                        ((uint8_t *)r->choices8)[((s * 2 + l) * 16 + t) * 2 + k] = (uint8_t)(k ? b : a);
                }
            }
    return r;
}

/* Whatever experts and samples stand for, a recorded sample's counts stay what they are; no token gets an expert twice.
 */
START_TEST(recorded_counts_stay)
{
    for (int with = 0; with < 2; with++) {
        struct ry_routing *r = recorded(200, with ? 80 : 0);
        struct ry_source s = {.routing = r, .experts = 24, .samples = 300, .fit = 60, .seed = 5};
        struct ry_workload w, again;
        ck_assert_msg(!ry_workload_init(&w, &s, &err), "%s", err.msg);
        ck_assert(!ry_workload_init(&again, &s, &err));
        ck_assert_int_eq(w.pairs, with);
        ck_assert_int_eq(w.split, 3);
        ck_assert_int_eq(w.pool, with ? 80 : 140);
        ck_assert(!ry_workload_draw(&w, 0, &err) && !ry_workload_draw(&w, 3, &err) &&
                  !ry_workload_draw(&again, 3, &err));
        ck_assert_mem_eq(w.choice, again.choice, 2u * 300 * 16 * 2 * sizeof *w.choice);
        int times[200] = {0};
        for (int i = 0; i < 300; i++) {
            int rec = w.recorded[i];
            times[rec]++;
            ck_assert(with ? rec < 80 : rec >= 60);
            for (int l = 0; l < 2; l++) {
                uint16_t seen[8] = {0};
                const uint16_t *c = ry_workload_at(&w, l, i);
                for (int k = 0; k < 32; k++)
                    seen[c[k] / 3]++;
                for (int t = 0; t < 16; t++)
                    ck_assert_int_ne(c[2 * t] / 3, c[2 * t + 1] / 3);
                ck_assert_mem_eq(seen, ry_counts_at(r, rec, l), sizeof seen);
            }
        }
        for (int k = with ? 0 : 60; k < (with ? 80 : 200); k++)
            ck_assert(times[k] == 300 / w.pool || times[k] == 300 / w.pool + 1);
        struct ry_routing *fit = ry_workload_fit(&w, &err);
        ck_assert_msg(fit != NULL, "%s", err.msg);
        for (int i = 0; i < 60; i++)
            for (int e = 0; e < 8; e++) {
                const uint16_t *c = ry_counts_at(fit, i, 1) + 3 * e;
                ck_assert_int_eq(c[0] + c[1] + c[2], ry_counts_at(r, w.fit_first + i, 1)[e]);
            }
        ry_routing_close(fit);
        ry_workload_free(&w);
        ry_workload_free(&again);
        ry_routing_close(r);
    }
}
END_TEST

START_TEST(made_up_locality)
{
    double before = -1;
    for (int step = 0; step <= 4; step++) {
        struct ry_source s = {.layers = 3,
                              .topk = 2,
                              .tokens = 64,
                              .experts = 64,
                              .samples = 64,
                              .locality = step / 4.0,
                              .fit = 8,
                              .seed = 9};
        struct ry_workload w;
        ck_assert_msg(!ry_workload_init(&w, &s, &err), "%s", err.msg);
        ck_assert_int_eq(w.groups, 8);
        ck_assert(!ry_workload_draw(&w, 0, &err));
        double own = 0, n = 0;
        for (int l = 0; l < 3; l++)
            for (int i = 0; i < 64; i++)
                for (int k = 0; k < 128; k++, n++)
                    own += w.group[l * 64 + ry_workload_at(&w, l, i)[k]] == w.recorded[i];
        double want = s.locality + (1 - s.locality) / 8; /* less a little: a token's second expert is another one */
        ck_assert_double_eq_tol(own / n, want, 0.04);
        ck_assert_double_gt(own / n, before);
        before = own / n;
        ry_workload_free(&w);
    }
    ck_assert_double_eq(before, 1);
}
END_TEST

static void refuses(struct ry_source s, const char *part)
{
    struct ry_workload w;
    ck_assert_int_eq(ry_workload_init(&w, &s, &err), -1);
    ck_assert_msg(strstr(err.msg, part) != NULL, "'%s' does not say '%s'", err.msg, part);
}

START_TEST(errors_are_named)
{
    struct ry_routing *r = recorded(100, 70);
    struct ry_source s = {.layers = 1, .topk = 2, .tokens = 4, .experts = 16, .samples = 4, .fit = 10, .locality = 0.5};
    struct ry_source t = s;
    t.samples = 0;
    refuses(t, "a step of 0 samples");
    t = s, t.locality = 1.5;
    refuses(t, "a locality of 1.5");
    t = s, t.locality = NAN;
    refuses(t, "a locality of");
    t = s, t.groups = 3;
    refuses(t, "3 groups do not divide 16 experts");
    t = s, t.groups = 16;
    refuses(t, "groups of 1 experts are too small for top-2");
    t = s, t.routing = r, t.experts = 12;
    refuses(t, "8 experts were recorded");
    t = s, t.routing = r, t.fit = 31;
    refuses(t, "at most 30 can be");
    t = s, t.experts = 70000;
    refuses(t, "70000 experts cannot be simulated");
    struct ry_fabric f = small;
    f.nics = 3;
    ck_assert(!ry_fabric_cluster(&f, &err) && strstr(err.msg, "3 NICs for the 2 GPUs"));
    f = small, f.node_gbs = 0;
    ck_assert(!ry_fabric_cluster(&f, &err) && strstr(err.msg, "must be above zero"));
    ck_assert(!ry_fabric_named("tpu", &err) && strstr(err.msg, "netmoe, h100-pod, ethernet"));
    struct ry_cost_model model;
    ck_assert(ry_fabric_model(&model, NULL, "/nonexistent/cost.json", &err) &&
              strstr(err.msg, "/nonexistent/cost.json: there is no such file"));
    ry_routing_close(r);
}
END_TEST

/* ---- the presets ---- */

START_TEST(presets)
{
    struct ry_cost_model m;
    for (int i = 0; ry_fabric_at(i); i++) {
        const struct ry_fabric *f = ry_fabric_at(i);
        struct ry_cluster *c = ry_fabric_cluster(f, &err);
        ck_assert_msg(c && !ry_fabric_model(&m, c, NULL, &err), "%s", err.msg);
        ck_assert_int_eq(c->nnodes, f->nodes);
        ck_assert_double_eq_tol(m.link[RY_LINK_LOCAL].bytes_per_us, 750 * f->local_gbs, 1e-6);
        ck_assert_double_eq_tol(m.link[RY_LINK_NIC].bytes_per_us, 750 * f->node_gbs, 1e-6);
        ck_assert_double_eq_tol(m.nic_rank_bytes_per_us, 750 * f->node_gbs / f->nics, 1e-6);
        ry_cluster_free(c);
    }
    ck_assert_ptr_eq(ry_fabric_named("h100-pod", &err), ry_fabric_at(1));
}
END_TEST

/* ---- whole runs ---- */

static void run(struct ry_sim_result *out, int nodes, double locality, struct ry_routing *r)
{
    struct ry_fabric f = small;
    struct ry_cost_model model;
    f.nodes = nodes;
    struct ry_cluster *c = ry_fabric_cluster(&f, &err);
    ck_assert(c && !ry_fabric_model(&model, c, NULL, &err));
    struct ry_sim sim = {.cluster = c,
                         .model = &model,
                         .source = {.routing = r,
                                    .layers = 3,
                                    .topk = 2,
                                    .tokens = 32,
                                    .experts = 4 * c->nranks,
                                    .samples = 8 * c->nranks,
                                    .locality = locality,
                                    .fit = r ? 20 : 96,
                                    .seed = 3},
                         .row_bytes = 2048,
                         .steps = 2};
    memset(sim.placings, true, sizeof sim.placings);
    ck_assert_msg(!ry_sim_run(&sim, out, &err), "%s", err.msg);
    ry_cluster_free(c);
}

START_TEST(locality_helps)
{
    static struct ry_sim_result at[5], again;
    const int step = ROUNDS_OF(5) < 5 ? 2 : 1;
    for (int i = 0; i < 5; i += step) {
        run(&at[i], 4, i / 4.0, NULL);
        const struct ry_sim_placed *p = at[i].at;
        ck_assert(p[RY_PLACE_IN_ORDER].done && p[RY_PLACE_COPLACED].done && !p[RY_PLACE_NETMOE_PREDICTED].done);
        ck_assert_ptr_nonnull(strstr(p[RY_PLACE_NETMOE_PREDICTED].note, "left out: "));
        ck_assert_double_eq(p[RY_PLACE_IN_ORDER].cross, 1);
        ck_assert_double_eq(p[RY_PLACE_IN_ORDER].moved, 0);
        ck_assert_double_lt(p[RY_PLACE_NETMOE_KNOWN].cross, p[RY_PLACE_NETMOE_GATHER].cross);
        ck_assert_double_lt(p[RY_PLACE_NETMOE_GATHER].cross, 1);
        ck_assert_double_le(p[RY_PLACE_HOMES].cross, 1);
        for (int s = 0; s < RY_SIM_STRATEGIES; s++) {
            const struct ry_sim_sums *b = &p[RY_PLACE_IN_ORDER].by[s];
            ck_assert_double_eq_tol(b->step_us, b->us[0] + b->us[1] + b->us[2] + b->us[3], 1e-6);
            ck_assert_double_eq_tol(b->layer_us * 3, b->step_us, 1e-6);
            ck_assert_double_ge(b->nic_imbalance, 1);
        }
        ck_assert_double_eq_tol(p[RY_PLACE_IN_ORDER].by[RY_SIM_PLAIN].cross_bytes,
                                p[RY_PLACE_IN_ORDER].by[RY_SIM_HIERARCHICAL].cross_bytes, 1e-3);
        ck_assert_double_lt(p[RY_PLACE_IN_ORDER].by[RY_SIM_SUM].cross_bytes,
                            p[RY_PLACE_IN_ORDER].by[RY_SIM_DEDUP].cross_bytes);
        ck_assert_double_lt(p[RY_PLACE_IN_ORDER].by[RY_SIM_DEDUP].cross_bytes,
                            p[RY_PLACE_IN_ORDER].by[RY_SIM_PLAIN].cross_bytes);
        if (i)
            ck_assert_double_lt(p[RY_PLACE_COPLACED].cross, at[i - step].at[RY_PLACE_COPLACED].cross);
        if (i)
            ck_assert_double_lt(p[RY_PLACE_HOMES].cross, at[i - step].at[RY_PLACE_HOMES].cross + 0.01);
    }
    ck_assert_double_gt(at[0].at[RY_PLACE_COPLACED].cross, 0.85); /* nothing to gain but chance */
    ck_assert_double_lt(at[4].at[RY_PLACE_COPLACED].cross, 0.1);
    run(&again, 4, 0.5, NULL);
    ck_assert_mem_eq(&again, &at[2], sizeof again);
}
END_TEST

/* Beyond what is learned in time, experts are co-placed by the groups that were made: at full locality nothing crosses.
 */
START_TEST(groups_where_learning_is_too_long)
{
    static struct ry_sim_result r;
    run(&r, 32, 1, NULL);
    ck_assert_ptr_nonnull(strstr(r.at[RY_PLACE_COPLACED].note, "groups"));
    ck_assert_double_eq_tol(r.at[RY_PLACE_COPLACED].cross, 0, 1e-9);
}
END_TEST

START_TEST(from_recorded)
{
    static struct ry_sim_result r;
    struct ry_routing *trace = recorded(200, 100);
    run(&r, 4, 0, trace);
    ck_assert(r.at[RY_PLACE_NETMOE_PREDICTED].done && !r.at[RY_PLACE_COPLACED_TOKENS].done);
    ck_assert_ptr_nonnull(strstr(r.at[RY_PLACE_COPLACED_TOKENS].note, "no token ids"));
    ck_assert_int_eq(r.split, 4);
    ck_assert_int_eq(r.pool, 100);
    ck_assert(r.pairs);
    ry_routing_close(trace);
    trace = recorded(200, 0);
    run(&r, 4, 0, trace);
    ck_assert(!r.pairs);
    ck_assert_double_eq(r.at[RY_PLACE_IN_ORDER].by[RY_SIM_DEDUP].step_us, 0);
    ry_routing_close(trace);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {same_loads_as_the_engine,
                                  same_times_as_plans,
                                  dedup_by_hand,
                                  recorded_counts_stay,
                                  made_up_locality,
                                  errors_are_named,
                                  presets,
                                  locality_helps,
                                  groups_where_learning_is_too_long,
                                  from_recorded,
                                  NULL};
    return run_tests("sim", tests);
}
