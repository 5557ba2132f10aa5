/* plan_speed.c: how long the exact solver takes, beside the textbook's Kuhn–Munkres on the square matrix. See plan.h.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "place/random.h"
#include "plan.h"

#define ROUNDS 15
#define SQUARE_MOST 512 /* Kuhn–Munkres takes seconds beyond */

static const struct {
    int samples, nodes;
} sizes[] = {{32, 16},   {64, 16},   {128, 16},   {256, 16},  {384, 16},   {384, 4},
             {1024, 16}, {4096, 16}, {16384, 16}, {1024, 32}, {4096, 128}, {16384, 512}};

struct times {
    double us[ROUNDS];
    int n;
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* This thread's: whoever else is busy on the machine. */
static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double median(struct times *t)
{
    qsort(t->us, (size_t)t->n, sizeof *t->us, by_value);
    return t->us[t->n / 2];
}

/* Samples that prefer nodes by chance, exponentially, half and half with none: about as uneven as recorded ones are. */
static void made_up(int32_t *cost, int samples, int nodes, uint64_t *rng)
{
    for (int i = 0; i < samples; i++) {
        double share[1024], sum = 0;
        for (int m = 0; m < nodes; m++)
            sum += share[m] = -log(1 - (double)(ry_random(rng) >> 11) * 0x1p-53);
        for (int m = 0; m < nodes; m++)
            cost[i * nodes + m] = (int32_t)(64 * 2048 * (1 - 0.5 * share[m] / sum - 0.5 / nodes));
    }
}

/* One layer's rows that cross nodes, of samples of the routing. */
static bool recorded(int32_t *cost, int samples, int nodes, const struct ry_routing *r, uint64_t *rng)
{
    if (!r || r->samples < samples || r->experts % nodes)
        return false;
    for (int i = 0; i < samples; i++) {
        const uint16_t *c = ry_counts_at(r, (int)ry_random_below(rng, (uint64_t)r->samples), r->layers / 2);
        int32_t total = 0;
        for (int m = 0; m < nodes; m++)
            cost[i * nodes + m] = 0;
        for (int e = 0; e < r->experts; e++) {
            cost[i * nodes + e / (r->experts / nodes)] -= c[e];
            total += c[e];
        }
        for (int m = 0; m < nodes; m++)
            cost[i * nodes + m] += total;
    }
    return true;
}

static json_t *one_size(int samples, int nodes, const struct ry_routing *r, bool square, uint64_t *rng, bool quiet,
                        struct ry_err *err)
{
    struct times exact = {0}, km = {0};
    struct ry_assign *ws = ry_assign_new(samples, nodes, square ? samples : 0, err);
    int32_t *cost = malloc((size_t)samples * (size_t)nodes * sizeof *cost);
    int *capacity = malloc((size_t)nodes * sizeof *capacity), *place = malloc((size_t)samples * sizeof *place);
    json_t *out = NULL;
    if (!ws || !cost || !capacity || !place) {
        ry_fail(err, "out of memory for %d samples on %d nodes", samples, nodes);
        goto done;
    }
    ry_capacity_even(capacity, nodes, samples);
    struct ry_assign_problem p = {samples, nodes, cost, capacity, 0};
    int rounds = samples > 8192 ? 5 : ROUNDS;
    for (int k = 0; k < rounds; k++) { /* in turns, each round another problem */
        if (!r || !recorded(cost, samples, nodes, r, rng))
            made_up(cost, samples, nodes, rng);
        uint64_t t0 = cpu_ns();
        int64_t best = ry_assign(ws, RY_SOLVE_EXACT, &p, place);
        uint64_t t1 = cpu_ns();
        exact.us[exact.n++] = (double)(t1 - t0) / 1e3;
        if (!square)
            continue;
        int64_t same = ry_assign(ws, RY_SOLVE_KUHN_MUNKRES, &p, place);
        km.us[km.n++] = (double)(cpu_ns() - t1) / 1e3;
        if (same != best) {
            ry_fail(err, "the solvers disagree on %d samples and %d nodes: exact %lld, Kuhn-Munkres %lld", samples,
                    nodes, (long long)best, (long long)same);
            goto done;
        }
    }
    double us = median(&exact), slow = square ? median(&km) : 0;
    if (!quiet) {
        printf("  %-9s %6d x %-4d %10.1f us (%.1f .. %.1f)", r ? "recorded" : "made up", samples, nodes, us,
               exact.us[0], exact.us[exact.n - 1]);
        if (square)
            printf(" %12.1f us (%.1f .. %.1f) %6.0f x", slow, km.us[0], km.us[km.n - 1], slow / us);
        putchar('\n');
        fflush(stdout);
    }
    out =
        json_pack("{ss si si si sf sf sf}", "routing", r ? "recorded" : "made up", "samples", samples, "nodes", nodes,
                  "rounds", rounds, "exact_us", us, "exact_min_us", exact.us[0], "exact_max_us", exact.us[exact.n - 1]);
    if (square) {
        json_object_set_new(out, "kuhn_munkres_us", json_real(slow));
        json_object_set_new(out, "kuhn_munkres_min_us", json_real(km.us[0]));
        json_object_set_new(out, "kuhn_munkres_max_us", json_real(km.us[km.n - 1]));
        json_object_set_new(out, "ratio", json_real(slow / us));
    }
done:
    ry_assign_free(ws);
    free(cost);
    free(capacity);
    free(place);
    return out;
}

json_t *plan_speed(const struct ry_routing *routing, uint64_t seed, bool quiet, struct ry_err *err)
{
    json_t *list = json_array();
    if (!quiet)
        printf("Samples to nodes, median (min .. max), one core:\n  %-9s %-13s %13s %21s\n", "routing",
               "samples x nodes", "exact", "Kuhn-Munkres");
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        int n = sizes[k].samples, m = sizes[k].nodes;
        for (int made = 0; made < 2; made++) {
            bool have = routing && routing->samples >= n && routing->experts % m == 0;
            if (!made && !have)
                continue;
            json_t *one = one_size(n, m, made ? NULL : routing, n <= SQUARE_MOST, &seed, quiet, err);
            if (!one) {
                json_decref(list);
                return NULL;
            }
            json_array_append_new(list, one);
        }
    }
    return list;
}
