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

/* The least busiest place: what all functions below are given. */
struct busiest {
    struct ry_assign *w;
    const struct ry_assign_problem *p;
    int groups;
    const int32_t *affinity;
};

static const int32_t *affinity_of(const struct busiest *b, int g, int i)
{
    return b->affinity + ((size_t)g * (size_t)b->p->nsamples + (size_t)i) * (size_t)b->p->nplaces;
}

static int64_t *flow_of(const struct busiest *b, int g)
{
    return b->w->flow + (size_t)g * 2 * (size_t)b->p->nplaces;
}

static int32_t total_of(const struct busiest *b, int g, int i)
{
    return b->w->total[(size_t)g * (size_t)b->p->nsamples + (size_t)i];
}

static void find_totals(const struct busiest *b)
{
    for (int g = 0; g < b->groups; g++) {
        for (int i = 0; i < b->p->nsamples; i++) {
            int32_t sum = 0;
            for (int a = 0; a < b->p->nplaces; a++)
                sum += affinity_of(b, g, i)[a];
            b->w->total[(size_t)g * (size_t)b->p->nsamples + (size_t)i] = sum;
        }
    }
}

/* w->flow: for each group what each place sends, then what each receives. Returns the sum of the greatest. */
static int64_t flows(const struct busiest *b, const int *place)
{
    int P = b->p->nplaces;
    int64_t sum = 0;
    for (int g = 0; g < b->groups; g++) {
        int64_t *flow = flow_of(b, g), busiest = 0;
        memset(flow, 0, 2 * (size_t)P * sizeof *flow);
        for (int i = 0; i < b->p->nsamples; i++) {
            const int32_t *a = affinity_of(b, g, i);
            for (int m = 0; m < P; m++)
                flow[P + m] += a[m];
            flow[P + place[i]] -= a[place[i]];
            flow[place[i]] += total_of(b, g, i) - a[place[i]];
        }
        for (int k = 0; k < 2 * P; k++)
            busiest = flow[k] > busiest ? flow[k] : busiest;
        sum += busiest;
    }
    return sum;
}

int64_t ry_assign_busiest_load(struct ry_assign *w, const struct ry_assign_problem *p, int groups,
                               const int32_t *affinity, const int *place)
{
    struct busiest b = {w, p, groups, affinity};
    find_totals(&b);
    return flows(&b, place);
}

static int64_t greater(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Load of place a in group g if sample `out` (-1: none) went and `come` came. */
static int64_t load_after(const struct busiest *b, int g, int a, int out, int come)
{
    const int64_t *flow = flow_of(b, g);
    int64_t sends = flow[a], receives = flow[b->p->nplaces + a];
    if (out >= 0) {
        sends -= total_of(b, g, out) - affinity_of(b, g, out)[a];
        receives += affinity_of(b, g, out)[a];
    }
    if (come >= 0) {
        sends += total_of(b, g, come) - affinity_of(b, g, come)[a];
        receives -= affinity_of(b, g, come)[a];
    }
    return greater(sends, receives);
}

/* The three busiest places of each group: two may be touched by a swap, the third still counts. */
struct top {
    int place[3];
    int64_t load[3];
};

static void find_top(const struct busiest *b, struct top *top, int32_t *critical)
{
    int P = b->p->nplaces;
    memset(critical, 0, (size_t)P * sizeof *critical);
    for (int g = 0; g < b->groups; g++) {
        top[g] = (struct top){{-1, -1, -1}, {0, 0, 0}};
        for (int a = 0; a < P; a++) {
            int64_t load = load_after(b, g, a, -1, -1);
            int k = 3;
            while (k > 0 && (top[g].place[k - 1] < 0 || load > top[g].load[k - 1]))
                k--;
            for (int j = 2; j > k; j--) {
                top[g].place[j] = top[g].place[j - 1];
                top[g].load[j] = top[g].load[j - 1];
            }
            if (k < 3) {
                top[g].place[k] = a;
                top[g].load[k] = load;
            }
        }
        critical[top[g].place[0]] = 1;
    }
}

/* Sum over groups of the busiest if i goes from a to c, and j (-1: nobody) from c to a; given up when not below
 * `limit`. */
static int64_t sum_after(const struct busiest *b, const struct top *top, int a, int i, int c, int j, int64_t limit)
{
    int64_t sum = 0;
    for (int g = 0; g < b->groups && sum < limit; g++) {
        int k = 0;
        while (k < 2 && (top[g].place[k] == a || top[g].place[k] == c))
            k++;
        int64_t rest = top[g].place[k] == a || top[g].place[k] == c ? 0 : top[g].load[k];
        sum += greater(rest, greater(load_after(b, g, a, i, j), load_after(b, g, c, j, i)));
    }
    return sum;
}

/* While it pays, swap a sample of a busiest place with one of another, or move it to where room is: the best of all
 * each time. */
static int64_t relieve(const struct busiest *b, int *place)
{
    int P = b->p->nplaces, n = b->p->nsamples;
    struct ry_assign *w = b->w;
    struct top top[RY_ASSIGN_GROUPS];
    int64_t sum = flows(b, place);
    for (int step = 0; step < n; step++) {
        int64_t best = sum;
        int best_i = -1, best_j = -1, best_c = -1;
        find_top(b, top, w->full);
        memcpy(w->spare, b->p->capacity, (size_t)P * sizeof *w->spare);
        for (int i = 0; i < n; i++)
            w->spare[place[i]]--;
        for (int i = 0; i < n; i++) {
            int a = place[i];
            if (!w->full[a])
                continue;
            for (int k = 0; k < P + (n <= SWAP_SAMPLES ? n : 0); k++) {
                int j = k < P ? -1 : k - P, c = j < 0 ? k : place[j];
                if (c == a || (j < 0 && w->spare[c] <= 0))
                    continue;
                int64_t after = sum_after(b, top, a, i, c, j, best);
                if (after < best) {
                    best = after;
                    best_i = i;
                    best_j = j;
                    best_c = c;
                }
            }
        }
        if (best_i < 0)
            break;
        if (best_j >= 0)
            place[best_j] = place[best_i];
        place[best_i] = best_c;
        sum = flows(b, place);
    }
    return sum;
}

/* w->priced by the weights, which are made to sum to 1 in each group: they are the prices of the flows. Scaled to whole
 * numbers. */
static void set_prices(const struct busiest *b, double scale)
{
    int P = b->p->nplaces;
    struct ry_assign *w = b->w;
    for (int g = 0; g < b->groups; g++) {
        const double *weight = w->weight + (size_t)g * 2 * (size_t)P;
        double *price = w->price + (size_t)g * 2 * (size_t)P, greatest = -INFINITY, sum = 0;
        for (int k = 0; k < 2 * P; k++)
            greatest = fmax(greatest, weight[k]);
        for (int k = 0; k < 2 * P; k++)
            sum += price[k] = exp(weight[k] - greatest);
        for (int k = 0; k < 2 * P; k++)
            price[k] /= sum;
    }
    for (int i = 0; i < b->p->nsamples; i++) {
        for (int a = 0; a < P; a++) {
            double cost = 0;
            for (int g = 0; g < b->groups; g++) {
                const double *price = w->price + (size_t)g * 2 * (size_t)P;
                cost += price[a] * total_of(b, g, i) - (price[a] + price[P + a]) * affinity_of(b, g, i)[a];
            }
            w->priced[(size_t)i * (size_t)P + (size_t)a] = (int32_t)lrint(scale * cost);
        }
    }
}

int64_t ry_assign_busiest(struct ry_assign *w, const struct ry_assign_problem *p, int groups, const int32_t *affinity,
                          int iterations, int *place, double *bound)
{
    struct busiest b = {w, p, groups, affinity};
    int P = p->nplaces, n = p->nsamples;
    double most = 1, lower = 0;
    find_totals(&b);
    for (int k = 0; k < groups * n; k++)
        most = fmax(most, w->total[k]);
    double scale = RY_ASSIGN_COST_MAX / (2.0 * groups * most);
    int64_t best = flows(&b, place);
    for (int k = 0; k < 2 * P * groups; k++)
        w->weight[k] = 0; /* logarithms */
    struct ry_assign_problem priced = *p;
    priced.cost = w->priced;
    for (int t = 0; t < iterations; t++) {
        set_prices(&b, scale);
        /* A mean of the flows by these prices, at its least: no sum of greatest flows is below. Half a unit for each
         * rounding. */
        double value = ((double)ry_assign_exact(w, &priced, w->trial) - 0.5 * n) / scale, step = 8 / sqrt(t + 1.0);
        int64_t sum = flows(&b, w->trial);
        for (int g = 0; g < groups; g++) {
            const int64_t *flow = flow_of(&b, g);
            double greatest = 1;
            for (int a = 0; a < P; a++) {
                int64_t all =
                    flow[P + a]; /* what p's experts get from everybody: what it receives, and from its own samples */
                for (int i = 0; i < n; i++)
                    all += w->trial[i] == a ? affinity_of(&b, g, i)[a] : 0;
                value += w->price[g * 2 * P + P + a] * (double)all;
            }
            for (int k = 0; k < 2 * P; k++)
                greatest = fmax(greatest, (double)flow[k]);
            for (int k = 0; k < 2 * P; k++)
                w->weight[g * 2 * P + k] += step * ((double)flow[k] / greatest - 1);
        }
        lower = fmax(lower, value);
        if (sum < best) {
            best = sum;
            memcpy(place, w->trial, (size_t)n * sizeof *place);
        }
    }
    if (bound)
        *bound = lower;
    return relieve(&b, place);
}
