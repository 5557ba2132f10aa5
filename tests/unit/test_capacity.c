/*
 * test_capacity.c: the bounds against closed forms, data made to be what they assume and data made not to be, loads
 * against counts by hand, and the shared traces where they are.
 */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "place/capacity.h"
#include "place/random.h"
#include "place/stay.h"

static uint64_t state;

static void seed(void)
{
    const char *given = getenv("RY_TEST_SEED");
    state = given ? strtoull(given, NULL, 0) : 20261122;
    printf("RY_TEST_SEED=%llu\n", (unsigned long long)state);
}

static double uniform(void)
{
    return ((double)(ry_random(&state) >> 11) + 0.5) * 0x1p-53;
}

static double normal(void)
{
    return sqrt(-2 * log(uniform())) * cos(2 * M_PI * uniform());
}

static void near(double a, double b, double relative)
{
    ck_assert_msg(fabs(a - b) <= relative * fmax(fabs(b), 1e-300), "%.17g is not %.17g", a, b);
}

START_TEST(closed_forms)
{
    for (double delta = 0.001; delta < 1; delta += 0.0371) {
        /* a circle, a sphere (Archimedes), the sphere in five dimensions, and in seven */
        double x = delta;
        near(exp(ry_capacity_log_beyond(x, 2)), 1 - asin(x) * 2 / M_PI, 1e-12);
        near(exp(ry_capacity_log_beyond(x, 3)), 1 - x, 1e-12);
        near(exp(ry_capacity_log_beyond(x, 5)), 1 - (3 * x - x * x * x) / 2, 1e-10);
        near(exp(ry_capacity_log_beyond(x, 7)), 1 - (15 * x - 10 * pow(x, 3) + 3 * pow(x, 5)) / 8, 1e-8);
    }
    ck_assert_double_eq(ry_capacity_log_beyond(0, 100), 0);
    ck_assert(isinf(ry_capacity_log_beyond(1, 100)));
    /* far out, where 1 - I would be 0: the density's tail, (1 - x^2)^((d - 1) / 2) / ((d - 1) x B(1/2, (d-1)/2) / 2) */
    double d = 4096, x = 0.5, b = (d - 1) / 2;
    double tail = b * log1p(-x * x) - log(b) - log(x) - (lgamma(0.5) + lgamma(b) - lgamma(0.5 + b));
    ck_assert_double_lt(tail, -580);
    near(ry_capacity_log_beyond(x, d), tail, 1e-4);
}
END_TEST

START_TEST(three_forms)
{
    /* as published for delta = 0.03 */
    struct ry_capacity_bounds b = ry_capacity_bounds(0.03, 4096);
    double x = 4096 * 0.0009 / (2 - 0.0009);
    near(exp(b.erfc), 1 / erfc(sqrt(x)), 1e-12);
    near(exp(b.exp), exp(x), 1e-12);
    near(exp(b.sphere), exp(b.erfc), 0.01); /* d is large */
    for (double d = 2; d < 1e5; d *= 1.7)
        for (double delta = 0.0007; delta < 0.9; delta *= 1.31) {
            b = ry_capacity_bounds(delta, d);
            ck_assert_double_ge(b.erfc, b.exp); /* erfc(x) <= exp(-x^2) */
            ck_assert_double_ge(b.sphere, 0);
            ck_assert(isfinite(b.sphere) && isfinite(b.erfc) && isfinite(b.exp));
            struct ry_capacity_bounds more = ry_capacity_bounds(delta * 1.01, d);
            ck_assert(more.sphere > b.sphere && more.erfc > b.erfc && more.exp > b.exp);
        }
    b = ry_capacity_bounds(0, 64);
    ck_assert(b.sphere == 0 && b.erfc == 0 && b.exp == 0);
    /* erfc's asymptotic branch joins the other */
    double d = 2e6, at = 20;
    double lo = sqrt(2 * (at - 1e-9) * (at - 1e-9) / (d + (at - 1e-9) * (at - 1e-9)));
    double hi = sqrt(2 * (at + 1e-9) * (at + 1e-9) / (d + (at + 1e-9) * (at + 1e-9)));
    near(ry_capacity_bounds(lo, d).erfc, ry_capacity_bounds(hi, d).erfc, 1e-6);
}
END_TEST

/* By drawing tokens: P is what it says. */
START_TEST(drawn)
{
    enum { D = 24, N = 40000 };
    const double delta = 0.3;
    int beyond = 0;
    for (int t = 0; t < N; t++) {
        double first = 0, sum = 0;
        for (int j = 0; j < D; j++) {
            double v = normal();
            sum += v * v;
            first = j ? first : v;
        }
        beyond += fabs(first) / sqrt(sum) >= delta;
    }
    double p = exp(ry_capacity_log_beyond(delta, D)), seen = (double)beyond / N;
    ck_assert_msg(fabs(seen - p) < 5 * sqrt(p * (1 - p) / N), "%g instead of %g", seen, p);
}
END_TEST

START_TEST(even_tokens)
{
    enum { N = 16, D = 256, T = 4000 };
    float *gates = calloc(N * D, sizeof *gates);
    double *tokens = malloc(sizeof *tokens * T * D);
    struct ry_affinity a;
    struct ry_err err;
    ry_capacity_grap(gates, N, D);
    for (int j = 0; j < D; j++) { /* the paper's matrix: every number belongs to one expert */
        int owners = 0;
        for (int i = 0; i < N; i++) {
            float w = gates[i * D + j];
            ck_assert(w == 0 || w == (float)N / D);
            owners += w != 0;
        }
        ck_assert_int_eq(owners, 1);
    }
    for (int i = 0; i < T * D; i++)
        tokens[i] = normal();
    memset(tokens + 5 * D, 0, D * sizeof *tokens);
    ck_assert_msg(!ry_affinity_measure(&a, gates, 4, N, tokens, 8, T, D, &err), "%s", err.msg);
    ck_assert_uint_eq(a.tokens, T - 1);
    ck_assert_uint_eq(a.zero_tokens, 1);
    ck_assert_double_eq(a.gate_cos_max, 0);
    near(a.gate_norm_max, a.gate_norm_min, 1e-6);
    ck_assert_double_lt(fabs(a.cos_mean), 0.02);
    near(a.cos_sd, 1, 0.02);
    ck_assert_double_lt(a.ks, 0.01);
    ck_assert_double_lt(a.drift, 2 / sqrt(T));
    near(a.dimensions, D, 0.05);
    /* delta as the greatest of all, by hand */
    double most = -1;
    for (int t = 0; t < T; t++) {
        double sum = 0;
        for (int j = 0; j < D; j++)
            sum += tokens[t * D + j] * tokens[t * D + j];
        for (int i = 0; i < N && sum > 0; i++) {
            double dot = 0;
            for (int j = 0; j < D; j++)
                dot += tokens[t * D + j] * (double)gates[i * D + j];
            most = fmax(most, dot / sqrt(sum) / sqrt((double)D / N) / ((double)N / D));
        }
    }
    near(a.delta, most, 1e-5);
    ck_assert(a.best[0] < a.best[1] && a.best[1] < a.best[2] && a.best[2] < a.delta);
    free(gates);
    free(tokens);
}
END_TEST

/* Each assumption broken by itself, and seen. */
START_TEST(uneven_tokens)
{
    enum { N = 8, D = 64, T = 2000 };
    float *gates = malloc(sizeof *gates * N * D), *tokens = malloc(sizeof *tokens * T * D);
    struct ry_affinity a;
    struct ry_err err;
    for (int i = 0; i < N * D; i++)
        gates[i] = i % D < 16 ? (float)normal() : 0; /* in a quarter of the dimensions */
    for (int j = 0; j < D; j++) {
        gates[D + j] = gates[j] + 0.1f * (float)normal(); /* two experts alike */
        gates[2 * D + j] *= 7;                            /* one louder */
    }
    for (int t = 0; t < T; t++)
        for (int j = 0; j < D; j++) /* eight dimensions of 64, a direction in common, one token ten times as long */
            tokens[t * D + j] = (j < 8 ? (float)normal() + 2 : 0) * (t ? 1 : 10);
    ck_assert(!ry_affinity_measure(&a, gates, 4, N, tokens, 4, T, D, &err));
    ck_assert_double_gt(a.gate_cos_max, 0.95);
    ck_assert_double_gt(a.gate_norm_max, 4 * a.gate_norm_min);
    ck_assert_double_gt(a.drift, 0.5);
    ck_assert_double_lt(a.dimensions, 8);
    ck_assert_double_gt(a.cos_sd, 1.25);
    ck_assert_double_gt(a.ks, 0.05);
    ck_assert_double_gt(a.norm_spread, 0.2);
    tokens[7 * D + 3] = NAN;
    ck_assert(ry_affinity_measure(&a, gates, 4, N, tokens, 4, T, D, &err) && strstr(err.msg, "token 7"));
    memset(gates + 5 * D, 0, D * sizeof *gates);
    ck_assert(ry_affinity_measure(&a, gates, 4, N, tokens, 4, T, D, &err) && strstr(err.msg, "expert 5"));
    ck_assert(ry_affinity_measure(&a, gates, 4, N, tokens, 4, 0, D, &err));
    free(gates);
    free(tokens);
}
END_TEST

START_TEST(loads)
{
    struct ry_err err;
    struct ry_capacity_used u;
    /* 5 samples of 6 tokens, top-2, 3 experts: even is 4 a sample */
    static const uint16_t counts[5][2][3] = {{{4, 4, 4}, {6, 6, 0}},
                                             {{4, 4, 4}, {6, 0, 6}},
                                             {{6, 3, 3}, {6, 6, 0}},
                                             {{6, 6, 0}, {6, 4, 0}},
                                             {{0, 6, 6}, {6, 6, 0}}};
    struct ry_routing *r = ry_routing_new(5, 2, 3, 2, 6, 0, &err);
    ck_assert(r != NULL);
    memcpy((void *)r->counts, counts, sizeof counts);
    ck_assert(
        !ry_capacity_used(&u, r, 0, 2, &err)); /* batches (8 8 8) and (12 9 3) over 8; the fifth sample is left out */
    ck_assert_int_eq(u.batches, 2);
    near(u.mean_tokens, 8, 1e-12);
    near(u.busiest_mean, (1 + 1.5) / 2, 1e-12);
    near(u.most, 1.5, 1e-12);
    near(u.busiest[0], 1.25, 1e-12);
    near(u.load[2], 1, 1e-12);
    ck_assert_double_lt(fabs(u.missing), 1e-12);
    near(ry_capacity_dropped(r, 0, 2, 1), 5.0 / 48, 1e-12); /* 4 of the 12 and 1 of the 9 */
    near(ry_capacity_dropped(r, 0, 2, 1.25), 2.0 / 48, 1e-12);
    ck_assert_double_eq(ry_capacity_dropped(r, 0, 2, 1.5), 0);
    ck_assert(!ry_capacity_used(&u, r, 1, 4, &err)); /* (24 16 6) over 16; two were dropped */
    near(u.most, 1.5, 1e-12);
    near(u.missing, 2.0 / 48, 1e-12);
    ck_assert(ry_capacity_used(&u, r, 0, 6, &err) == -1 && strstr(err.msg, "5 samples"));
    ry_routing_close(r);
}
END_TEST

/* Two nodes of two ranks, an expert each; a layer in which all stays, one by hand. */
START_TEST(stays)
{
    enum { S = 4, T = 3, E = 4 };
    struct ry_err err;
    struct ry_routing *r = ry_routing_new(S, 2, E, 2, T, S, &err);
    struct ry_cluster *c = ry_place_cluster(2, 2, 1, 1, &err);
    int expert_rank[2 * E];
    uint64_t nodes[4] = {0};
    ck_assert(r && c && !ry_experts_contiguous(expert_rank, 2, E, 4, &err));
    uint16_t *counts = (uint16_t *)r->counts;
    uint8_t *choices = (uint8_t *)r->choices8;
    for (int s = 0; s < S; s++)
        for (int l = 0; l < 2; l++)
            for (int t = 0; t < T; t++)
                for (int k = 0; k < 2; k++) { /* layer 0: the sample's rank and its neighbour; layer 1: expert 0, then t + s */
                    int e = l ? k ? 1 + (t + s) % 3 : 0 : s / 2 * 2 + (k ? (s + 1) % 2 : s % 2);
                    counts[(s * 2 + l) * E + e]++;
                    choices[((s * 2 + l) * T + t) * 2 + k] = (uint8_t)e;
                }
    struct ry_stay all = {.nodes = nodes};
    ck_assert_msg(!ry_stay_add(&all, r, c, expert_rank, 0, S, 0, 1, &err), "%s", err.msg);
    ck_assert(all.copies == S * T * 2 && all.on_rank == S * T && all.on_node == S * T * 2);
    ck_assert(all.pairs == S * T && all.pairs_on_node == S * T && all.rank_pairs == S * T * 2 && all.rank_pairs_on_rank == S * T);
    ck_assert(nodes[0] == S * T && nodes[1] == 0 && nodes[2] == 0 && nodes[3] == S * T);
    /* layer 1: each sample sends 3 to expert 0, and one to each of 1, 2, 3: 4 to node 0, 2 to node 1; tokens with expert 1 reach
       node 0 only, the others both */
    memset(nodes, 0, sizeof nodes);
    int capacity[4], home[2];
    ry_capacity_even(capacity, 4, 2);
    ry_home_in_order(home, capacity, 4, 2);
    ck_assert(c->node[home[0]] == 0 && c->node[home[1]] == 1); /* the batches' two samples live on different nodes */
    struct ry_stay by_hand = {.nodes = nodes};
    ck_assert(!ry_stay_add(&by_hand, r, c, expert_rank, 1, 2, 0, 2, &err));
    uint64_t on_rank = 0;
    for (int i = 0; i < 2; i++)
        on_rank += home[i] == 0 ? 3 : 1;
    ck_assert(by_hand.copies == 24 && by_hand.on_rank == 2 * on_rank && by_hand.on_node == 4 + 2 + 4 + 2);
    ck_assert(by_hand.pairs == 4 * 5 && by_hand.pairs_on_node == 3 + 2 + 3 + 2);
    ck_assert(by_hand.rank_pairs == 24 && by_hand.rank_pairs_on_rank == 2 * on_rank);
    ck_assert(nodes[0] == 8 && nodes[1] == 4 && nodes[2] == 8 && nodes[3] == 4);
    memset(nodes, 0, sizeof nodes); /* layer 0 in two batches: samples 0 and 2 live on node 0, 1 and 3 on node 1 */
    struct ry_stay two = {.nodes = nodes};
    ck_assert(!ry_stay_add(&two, r, c, expert_rank, 0, 2, 0, 2, &err));
    ck_assert(nodes[0] == 6 && nodes[1] == 6 && nodes[2] == 6 && nodes[3] == 6 && two.on_node == 12);
    ck_assert(ry_stay_add(&by_hand, r, c, expert_rank, 1, 3, 0, 2, &err) == -1);
    ry_cluster_free(c);
    ry_routing_close(r);
}
END_TEST

START_TEST(shared_traces)
{
    static const char *const names[] = {"gpt-e32-k2", "gpt-e64-k6"};
    const char *shared = getenv("RY_SHARED");
    for (int i = 0; i < 2; i++) {
        char path[4096];
        struct ry_err err;
        snprintf(path, sizeof path, "%s/traces/%s", shared ? shared : "", names[i]);
        if (!shared || access(path, R_OK)) {
            fprintf(stderr, "SKIPPED shared_traces: no routing traces in RY_SHARED\n");
            return;
        }
        struct ry_routing *r = ry_routing_open(path, &err);
        ck_assert_msg(r != NULL, "%s", err.msg);
        for (int l = 0; l < r->layers; l++) {
            struct ry_capacity_used small, large;
            ck_assert(!ry_capacity_used(&small, r, l, 1, &err) && !ry_capacity_used(&large, r, l, 64, &err));
            ck_assert_int_eq(large.batches, r->samples / 64);
            ck_assert_double_lt(large.busiest_mean, small.busiest_mean); /* larger batches are more even */
            ck_assert_double_ge(large.busiest_mean, 1);
            double before = 1;
            for (double f = 0.25; f < 4; f *= 2) { /* the more room, the less is lost */
                double lost = ry_capacity_dropped(r, l, 8, f);
                ck_assert(lost <= before && lost >= 1 - f - 1e-9);
                before = lost;
            }
            ck_assert_double_eq(ry_capacity_dropped(r, l, 64, large.most + 1e-9), 0);
            printf("%s layer %d: batches of 64: busiest %.3f in the mean, %.3f at most; single samples %.3f\n",
                   names[i], l, large.busiest_mean, large.most, small.busiest_mean);
        }
        ry_routing_close(r);
    }
}
END_TEST

int main(void)
{
    seed();
    Suite *suite = suite_create("capacity");
    TCase *t = tcase_create("capacity");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, closed_forms);
    tcase_add_test(t, three_forms);
    tcase_add_test(t, drawn);
    tcase_add_test(t, even_tokens);
    tcase_add_test(t, uneven_tokens);
    tcase_add_test(t, loads);
    tcase_add_test(t, stays);
    tcase_add_test(t, shared_traces);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
