/* assign_limits.c: placing under a limit on moves, and for the least busiest place: prices around the exact solver. See
 * assign.h. */
#include <limits.h>
#include <math.h>
#include <string.h>

#include "place/assign_internal.h"

#define SWAP_SAMPLES 4096 /* pairs of more samples are not tried one by one */

static const int32_t *row(const int32_t *cells, const struct ry_assign_problem *p, int i)
{
    return cells + (size_t)i * (size_t)p->nplaces;
}

static int moved(const int *home, const int *place, int n)
{
    int m = 0;
    for (int i = 0; i < n; i++)
        m += place[i] != home[i];
    return m;
}

/* What is left of the limit goes into swaps, and moves to where room is, that pay. */
static void spend_rest(struct ry_assign *w, const struct ry_assign_problem *p, const int *home, int rest, int *place)
{
    int n = p->nsamples;
    memcpy(w->spare, p->capacity, (size_t)p->nplaces * sizeof *w->spare);
    for (int i = 0; i < n; i++)
        w->spare[place[i]]--;
    for (int i = 0; i < n && rest > 0; i++) {
        const int32_t *c = row(p->cost, p, i);
        for (int b = 0; b < p->nplaces; b++) {
            int more = (b != home[i]) - (place[i] != home[i]);
            if (w->spare[b] <= 0 || c[b] >= c[place[i]] || more > rest)
                continue;
            w->spare[place[i]]++;
            w->spare[b]--;
            place[i] = b;
            rest -= more;
        }
        for (int j = i + 1; j < n && n <= SWAP_SAMPLES; j++) {
            int a = place[i], b = place[j];
            const int32_t *d = row(p->cost, p, j);
            int more = (b != home[i]) + (a != home[j]) - (a != home[i]) - (b != home[j]);
            if (more > rest || c[b] + d[a] >= c[a] + d[b])
                continue;
            place[i] = b;
            place[j] = a;
            rest -= more;
        }
    }
}

int64_t ry_assign_moving(struct ry_assign *w, const struct ry_assign_problem *p, const int *home, int max_moved,
                         int *place, double *bound)
{
    int n = p->nsamples, P = p->nplaces;
    int64_t total = ry_assign_exact(w, p, place);
    if (bound)
        *bound = (double)total;
    if (moved(home, place, n) <= max_moved)
        return total;
    /* The least whole price per move at which few enough move; with the greatest, none does. */
    struct ry_assign_problem priced = *p;
    priced.cost = w->priced;
    int32_t low = 0, high = 1;
    for (int i = 0; i < n; i++)
        for (int a = 0; a < P; a++)
            if (row(p->cost, p, i)[home[i]] - row(p->cost, p, i)[a] >= high)
                high = row(p->cost, p, i)[home[i]] - row(p->cost, p, i)[a] + 1;
    memcpy(place, home, (size_t)n * sizeof *place);
    while (high - low > 1) {
        int32_t price = low + (high - low) / 2;
        for (int i = 0; i < n; i++)
            for (int a = 0; a < P; a++) /* rather a discount for staying: the same, and the range stays small */
                w->priced[(size_t)i * (size_t)P + (size_t)a] = row(p->cost, p, i)[a] - (a == home[i] ? price : 0);
        double value = (double)ry_assign_exact(w, &priced, w->trial) + (double)price * ((double)n - max_moved);
        if (bound && value > *bound)
            *bound = value;
        if (moved(home, w->trial, n) > max_moved) {
            low = price;
        } else {
            high = price;
            memcpy(place, w->trial, (size_t)n * sizeof *place);
        }
    }
    spend_rest(w, p, home, max_moved - moved(home, place, n), place);
    return ry_assign_cost(p, place);
}

/* w->flow: what each place sends, then what each receives. */
static int64_t flows(struct ry_assign *w, const struct ry_assign_problem *p, const int32_t *affinity, const int64_t *in,
                     const int *place)
{
    int P = p->nplaces;
    int64_t busiest = 0;
    for (int a = 0; a < P; a++) {
        w->flow[a] = 0;
        w->flow[P + a] = in[a];
    }
    for (int i = 0; i < p->nsamples; i++) {
        w->flow[place[i]] += row(p->cost, p, i)[place[i]];
        w->flow[P + place[i]] -= row(affinity, p, i)[place[i]];
    }
    for (int k = 0; k < 2 * P; k++)
        busiest = w->flow[k] > busiest ? w->flow[k] : busiest;
    return busiest;
}

int64_t ry_assign_busiest_load(struct ry_assign *w, const struct ry_assign_problem *p, const int32_t *affinity,
                               const int64_t *in, const int *place)
{
    return flows(w, p, affinity, in, place);
}

static int64_t greater(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Load of place a if sample `out` (-1: none) went and `come` came. */
static int64_t load_after(const struct ry_assign *w, const struct ry_assign_problem *p, const int32_t *affinity, int a,
                          int out, int come)
{
    int64_t sends = w->flow[a], receives = w->flow[p->nplaces + a];
    if (out >= 0) {
        sends -= row(p->cost, p, out)[a];
        receives += row(affinity, p, out)[a];
    }
    if (come >= 0) {
        sends += row(p->cost, p, come)[a];
        receives -= row(affinity, p, come)[a];
    }
    return greater(sends, receives);
}

/* Swap a sample of the busiest place with one of another, or move it to where room is, while the greater of both loads
 * shrinks. */
static int64_t relieve(struct ry_assign *w, const struct ry_assign_problem *p, const int32_t *affinity,
                       const int64_t *in, int *place)
{
    int P = p->nplaces, n = p->nsamples;
    for (int step = 0; step < 4 * n; step++) {
        int64_t busiest = flows(w, p, affinity, in, place), best = busiest;
        int a = 0, best_i = -1, best_j = -1, best_b = -1;
        while (w->flow[a] != busiest && w->flow[P + a] != busiest)
            a++;
        memcpy(w->spare, p->capacity, (size_t)P * sizeof *w->spare);
        for (int i = 0; i < n; i++)
            w->spare[place[i]]--;
        for (int i = 0; i < n; i++) {
            if (place[i] != a)
                continue;
            for (int b = 0; b < P; b++) {
                if (b == a || w->spare[b] <= 0)
                    continue;
                int64_t load = greater(load_after(w, p, affinity, a, i, -1), load_after(w, p, affinity, b, -1, i));
                if (load < best) {
                    best = load;
                    best_i = i;
                    best_j = -1;
                    best_b = b;
                }
            }
            for (int j = 0; j < n && n <= SWAP_SAMPLES; j++) {
                int b = place[j];
                if (b == a)
                    continue;
                int64_t load = greater(load_after(w, p, affinity, a, i, j), load_after(w, p, affinity, b, j, i));
                if (load < best) {
                    best = load;
                    best_i = i;
                    best_j = j;
                    best_b = b;
                }
            }
        }
        if (best_i < 0)
            return busiest;
        place[best_i] = best_b;
        if (best_j >= 0)
            place[best_j] = a;
    }
    return flows(w, p, affinity, in, place);
}

int64_t ry_assign_busiest(struct ry_assign *w, const struct ry_assign_problem *p, const int32_t *affinity,
                          const int64_t *in, int iterations, int *place, double *bound)
{
    int P = p->nplaces, n = p->nsamples;
    double most = 1, lower = 0;
    for (size_t k = 0; k < (size_t)n * (size_t)P; k++)
        most = fmax(most, fmax(fabs((double)p->cost[k]), fabs((double)affinity[k])));
    double scale = RY_ASSIGN_COST_MAX / 2 / most;
    int64_t best = flows(w, p, affinity, in, place);
    for (int k = 0; k < 2 * P; k++)
        w->weight[k] = 0; /* logarithms */
    struct ry_assign_problem priced = *p;
    priced.cost = w->priced;
    for (int t = 0; t < iterations; t++) {
        double greatest = -INFINITY, sum = 0, constant = 0;
        for (int k = 0; k < 2 * P; k++)
            greatest = fmax(greatest, w->weight[k]);
        for (int k = 0; k < 2 * P; k++)
            sum += exp(w->weight[k] - greatest);
        for (int a = 0; a < P; a++) {
            double out = exp(w->weight[a] - greatest) / sum, into = exp(w->weight[P + a] - greatest) / sum;
            constant += into * (double)in[a];
            for (int i = 0; i < n; i++)
                w->priced[(size_t)i * (size_t)P + (size_t)a] =
                    (int32_t)lrint(scale * (out * row(p->cost, p, i)[a] - into * row(affinity, p, i)[a]));
        }
        /* A mean of the loads, by these weights, at its least: no busiest load is below. Half a unit for each rounding.
         */
        double value = ((double)ry_assign_exact(w, &priced, w->trial) - 0.5 * n) / scale + constant;
        lower = fmax(lower, value);
        int64_t busiest = flows(w, p, affinity, in, w->trial);
        if (busiest < best) {
            best = busiest;
            memcpy(place, w->trial, (size_t)n * sizeof *place);
        }
        double step = 8 / sqrt(t + 1.0);
        for (int k = 0; k < 2 * P && busiest > 0; k++)
            w->weight[k] += step * ((double)w->flow[k] / (double)busiest - 1);
    }
    if (bound)
        *bound = lower;
    return relieve(w, p, affinity, in, place);
}
