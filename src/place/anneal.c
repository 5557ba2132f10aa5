/* anneal.c: see anneal.h. */
#include "place/anneal.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "place/random.h"

/* Temperatures, as shares of what the average expert receives: at the first, most swaps pass; at the last, hardly any.
 */
#define HOT 0.25
#define COLD 0.001
/* What a copy above the bound costs, in crossing copies, from the first move to the last: low at first, so that the way
   to a good map may lead through maps that break the bound. */
#define PENALTY_FIRST 0.1
#define PENALTY_LAST 4.0
#define MOVES_PER_PRICING 200
#define PRICING_ROUNDS 20
#define FAR (INT32_MAX / 4) /* beyond any affinity */
#define BLOCK 512           /* samples that a swap is judged for at a time: what is made for them stays in the cache */

/* The loops over samples, with the widest vectors that the machine has: they are nearly all of a search's time.
   (Sanitizers instrument the choice, which is made before they are ready.) */
#if defined __x86_64__ && !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

/* A set, seen from one of its experts. */
struct member {
    int set, sample, weight;
};

struct search {
    const struct ry_anneal *a;
    int *map;
    int32_t *affinity; /* [node][sample] */
    int32_t *best;     /* [sample]: the highest affinity less price */
    int32_t *price;    /* [node] */
    int32_t *others;   /* [sample]: the same among the nodes that a swap does not touch */
    int32_t *give;     /* [sample]: how a swap changes the affinity to the first expert's node … */
    int32_t *take;     /* … and to the second's */
    int64_t *weight;   /* [layer][expert]: copies */
    int64_t *load;     /* [layer][node]: copies */
    int words, stride; /* of a row of rows: 64-bit words that tell the set's experts, and those with what nodes hold */
    uint64_t *rows; /* [set][stride]: a bit per expert, then a byte per node: how many of the set's experts it holds */
    int *first;     /* sets that an expert is in: list[first[layer · experts + e] …] */
    struct member *list;
};

static void search_free(struct search *s)
{
    void *all[] = {s->affinity, s->best, s->price, s->others, s->give, s->take,
                   s->weight,   s->load, s->rows,  s->first,  s->list};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static uint64_t *row_of(const struct search *s, int set)
{
    return s->rows + (size_t)set * (size_t)s->stride;
}

static uint8_t *held_by(const struct search *s, uint64_t *row)
{
    return (uint8_t *)(row + s->words);
}

static int search_sets(struct search *s)
{
    const struct ry_anneal *a = s->a;
    const struct ry_token_sets *t = a->sets;
    size_t slots = (size_t)a->layers * (size_t)a->experts;
    s->words = (a->experts + 63) / 64;
    s->stride = s->words + (a->nodes + 7) / 8;
    s->rows = calloc((size_t)t->count + 1, (size_t)s->stride * sizeof *s->rows);
    s->first = calloc(slots + 2, sizeof *s->first);
    s->list = malloc(((size_t)t->count * (size_t)t->topk + 1) * sizeof *s->list);
    if (!s->rows || !s->first || !s->list)
        return -1;
    /* Counted two slots ahead, so that filling the list leaves first[slot] where the slot begins. */
    for (int pass = 0; pass < 2; pass++) {
        for (int u = 0; u < t->count; u++) {
            const uint16_t *set = t->experts + (size_t)u * (size_t)t->topk;
            for (int k = 0; k < t->topk; k++) {
                if (k && set[k] == set[k - 1]) /* a token that chose an expert twice holds it once */
                    continue;
                size_t slot = (size_t)t->layer[u] * (size_t)a->experts + set[k];
                if (pass) {
                    s->list[s->first[slot + 1]++] = (struct member){u, t->sample[u], t->weight[u]};
                } else {
                    uint64_t *row = row_of(s, u);
                    s->first[slot + 2]++;
                    row[set[k] / 64] |= UINT64_C(1) << set[k] % 64;
                    held_by(s, row)[s->map[slot]]++;
                }
            }
        }
        for (size_t i = 2; !pass && i < slots + 2; i++)
            s->first[i] += s->first[i - 1];
    }
    for (int u = 0; u < t->count; u++)
        for (int n = 0; n < a->nodes; n++)
            if (held_by(s, row_of(s, u))[n])
                s->affinity[(size_t)n * (size_t)a->samples + (size_t)t->sample[u]] += t->weight[u];
    return 0;
}

static int search_init(struct search *s, const struct ry_anneal *a, int *map)
{
    size_t samples = (size_t)a->samples, nodes = (size_t)a->nodes, slots = (size_t)a->layers * (size_t)a->experts;
    *s = (struct search){.a = a, .map = map};
    s->affinity = calloc(nodes * samples, sizeof *s->affinity);
    s->best = calloc(samples, sizeof *s->best);
    s->price = calloc(nodes, sizeof *s->price);
    s->others = calloc(samples, sizeof *s->others);
    s->give = calloc(samples, sizeof *s->give);
    s->take = calloc(samples, sizeof *s->take);
    s->weight = calloc(slots, sizeof *s->weight);
    s->load = calloc((size_t)a->layers * nodes, sizeof *s->load);
    if (!s->affinity || !s->best || !s->price || !s->others || !s->give || !s->take || !s->weight || !s->load)
        return -1;
    for (size_t j = 0; j < slots; j++) {
        const uint16_t *column = a->counts + j * samples;
        int32_t *at = s->affinity + (size_t)map[j] * samples;
        for (size_t i = 0; i < samples; i++) {
            s->weight[j] += column[i];
            at[i] += a->sets ? 0 : column[i];
        }
        s->load[j / (size_t)a->experts * nodes + (size_t)map[j]] += s->weight[j];
    }
    return a->sets ? search_sets(s) : 0;
}

WIDE static int at_least(const int32_t *v, int n, int32_t least)
{
    int count = 0;
    for (int i = 0; i < n; i++)
        count += v[i] >= least;
    return count;
}

/* The least of those that are `at` or more, the greatest of those that are less. */
WIDE static void beside(const int32_t *v, int n, int32_t at, int32_t *least, int32_t *greatest)
{
    int32_t lo = INT32_MAX, hi = INT32_MIN;
    for (int i = 0; i < n; i++) {
        int32_t above = v[i] >= at ? v[i] : INT32_MAX, below = v[i] >= at ? INT32_MIN : v[i];
        lo = above < lo ? above : lo;
        hi = below > hi ? below : hi;
    }
    *least = lo;
    *greatest = hi;
}

/* The k-th largest (from 1) of v, and the one after it; 0 < k < n. Halving the range of values, not the array: no
   branch hangs on an element. */
static void split_at(const int32_t *v, int n, int k, int32_t *kth, int32_t *next)
{
    int32_t least, greatest, ignored;
    beside(v, n, INT32_MIN, &least, &ignored);
    beside(v, n, INT32_MAX, &ignored, &greatest);
    int64_t lo = least, hi = (int64_t)greatest + 1; /* at least k are lo or more, fewer are hi or more */
    while (hi - lo > 1) {
        int64_t middle = lo + (hi - lo) / 2;
        int count = at_least(v, n, (int32_t)middle);
        *(count >= k ? &lo : &hi) = middle;
        if (count == k)
            break;
    }
    beside(v, n, (int32_t)lo, kth, next);
    if (at_least(v, n, (int32_t)lo) > k)
        *next = *kth; /* equal ones */
}

/* out[sample - from] = the highest affinity less price over all nodes but two (-1: none is left out). */
static inline __attribute__((always_inline)) void best_without(const struct search *s, int n, int m, int from, int to,
                                                               int32_t *restrict out)
{
    for (int i = 0; i < to - from; i++)
        out[i] = -FAR;
    for (int q = 0; q < s->a->nodes; q++) {
        if (q == n || q == m)
            continue;
        const int32_t *restrict at = s->affinity + (size_t)q * (size_t)s->a->samples + (size_t)from;
        int32_t price = s->price[q];
        for (int i = 0; i < to - from; i++)
            out[i] = at[i] - price > out[i] ? at[i] - price : out[i];
    }
}

/* What each sample gains by living on node n rather than on the best other one, price aside. */
WIDE static void preference(const struct search *s, int n, int32_t *restrict out)
{
    const int32_t *restrict at = s->affinity + (size_t)n * (size_t)s->a->samples;
    best_without(s, n, -1, 0, s->a->samples, out);
    for (int i = 0; i < s->a->samples; i++)
        out[i] = at[i] - out[i];
}

WIDE static void set_best(const struct search *s)
{
    best_without(s, -1, -1, 0, s->a->samples, s->best);
}

/* Prices by coordinate descent: each in turn such that its node is preferred by as many samples as shall live there. */
static void set_prices(struct search *s, int rounds)
{
    int samples = s->a->samples;
    for (int r = 0; r < rounds && s->a->nodes > 1; r++) {
        bool changed = false;
        for (int n = 0; n < s->a->nodes; n++) {
            int homes = s->a->homes[n];
            int32_t was = s->price[n];
            preference(s, n, s->others);
            if (homes == 0 || homes == samples) {
                int32_t least, greatest;
                beside(s->others, samples, homes ? INT32_MIN : INT32_MAX, &least, &greatest);
                s->price[n] = homes ? least - 1 : greatest + 1;
            } else {
                int32_t in, out;
                split_at(s->others, samples, homes, &in, &out);
                s->price[n] = out + (in - out) / 2;
            }
            changed |= s->price[n] != was;
        }
        if (!changed)
            break;
    }
    set_best(s);
}

/* Moving expert x from node `from` to `to`, expert y going the other way: what it changes for sets that hold x. Without
   a branch on what a set is like, which nothing predicts; a sample's sets follow each other. */
static void set_deltas(const struct search *s, int layer, int x, int y, int from, int to, int32_t *lose, int32_t *win)
{
    const int *first = s->first + (size_t)layer * (size_t)s->a->experts + (size_t)x;
    const struct member *at = s->list + first[0], *end = s->list + first[1];
    while (at < end) {
        int32_t lost = 0, won = 0;
        int sample = at->sample;
        for (; at < end && at->sample == sample; at++) {
            uint64_t *row = row_of(s, at->set);
            const uint8_t *held = held_by(s, row);
            int enters = held[to] == 0, both = (int)(row[y / 64] >> y % 64 & 1);
            int leaves = (held[from] == 1) & (enters | !both); /* a set that holds both only exchanges them */
            lost += -leaves & at->weight;
            won += -enters & at->weight;
        }
        lose[sample] -= lost;
        win[sample] += won;
    }
}

/* What exchanging experts x and y changes for samples [from, to), whose tokens choose them cx and cy times; with sets,
   give and take are filled in already. Fills give, take and others; returns what it saves. */
WIDE static int64_t block_gain(const struct search *s, const uint16_t *restrict cx, const uint16_t *restrict cy, int n,
                               int m, int from, int to)
{
    int32_t *restrict give = s->give + from, *restrict take = s->take + from, *restrict others = s->others + from;
    const int32_t *restrict an = s->affinity + (size_t)n * (size_t)s->a->samples + (size_t)from;
    const int32_t *restrict am = s->affinity + (size_t)m * (size_t)s->a->samples + (size_t)from;
    const int32_t *restrict best = s->best + from;
    int32_t pn = s->price[n], pm = s->price[m], gain = 0; /* 32 bits hold the sum over a block */
    best_without(s, n, m, from, to, others);
    for (int i = 0; cx && i < to - from; i++) {
        give[i] = cy[i] - cx[i];
        take[i] = cx[i] - cy[i];
    }
    for (int i = 0; i < to - from; i++) {
        int32_t v = an[i] - pn + give[i], w = am[i] - pm + take[i];
        v = v > w ? v : w;
        v = v > others[i] ? v : others[i];
        gain += v - best[i] - give[i] - take[i];
    }
    return gain;
}

/* Crossing tokens that exchanging experts x (on node n) and y (on m) of a layer saves; fills give, take and others. */
static int64_t swap_gain(struct search *s, int layer, int x, int y, int n, int m)
{
    const struct ry_anneal *a = s->a;
    size_t samples = (size_t)a->samples, slot = (size_t)layer * (size_t)a->experts;
    const uint16_t *cx = a->sets ? NULL : a->counts + (slot + (size_t)x) * samples;
    const uint16_t *cy = a->sets ? NULL : a->counts + (slot + (size_t)y) * samples;
    if (a->sets) {
        memset(s->give, 0, samples * sizeof *s->give);
        memset(s->take, 0, samples * sizeof *s->take);
        set_deltas(s, layer, x, y, n, m, s->give, s->take);
        set_deltas(s, layer, y, x, m, n, s->take, s->give);
    }
    int64_t gain = 0;
    for (int from = 0; from < a->samples; from += BLOCK) {
        int to = from + BLOCK < a->samples ? from + BLOCK : a->samples;
        gain += block_gain(s, cx ? cx + from : NULL, cy ? cy + from : NULL, n, m, from, to);
    }
    return gain;
}

WIDE static void shift_samples(struct search *s, int n, int m)
{
    int samples = s->a->samples;
    int32_t *restrict an = s->affinity + (size_t)n * (size_t)samples;
    int32_t *restrict am = s->affinity + (size_t)m * (size_t)samples, *restrict best = s->best;
    const int32_t *restrict give = s->give, *restrict take = s->take, *restrict others = s->others;
    int32_t pn = s->price[n], pm = s->price[m];
    for (int i = 0; i < samples; i++) {
        an[i] += give[i];
        am[i] += take[i];
        int32_t v = an[i] - pn, w = am[i] - pm;
        v = v > w ? v : w;
        best[i] = v > others[i] ? v : others[i];
    }
}

/* Carry out what swap_gain() has just judged. */
static void swap_apply(struct search *s, int layer, int x, int y)
{
    const struct ry_anneal *a = s->a;
    size_t slot = (size_t)layer * (size_t)a->experts;
    int n = s->map[slot + (size_t)x], m = s->map[slot + (size_t)y];
    int64_t shift = s->weight[slot + (size_t)x] - s->weight[slot + (size_t)y];
    shift_samples(s, n, m);
    for (int pass = 0; a->sets && pass < 2; pass++) {
        const int *first = s->first + slot + (pass ? y : x);
        for (int i = first[0]; i < first[1]; i++) {
            uint8_t *held = held_by(s, row_of(s, s->list[i].set));
            held[pass ? m : n]--;
            held[pass ? n : m]++;
        }
    }
    s->load[layer * a->nodes + n] -= shift;
    s->load[layer * a->nodes + m] += shift;
    s->map[slot + (size_t)x] = m;
    s->map[slot + (size_t)y] = n;
}

static int64_t over(int64_t load, int64_t bound)
{
    return load > bound ? load - bound : 0;
}

/* What exchanging experts x (on node n) and y (on m) adds to the copies above bounds. */
static int64_t excess_change(const struct search *s, int layer, int x, int y, int n, int m)
{
    const struct ry_anneal *a = s->a;
    const int64_t *weight = s->weight + (size_t)layer * (size_t)a->experts;
    const int64_t *load = s->load + layer * a->nodes, *bound = a->bound + layer * a->nodes,
                  shift = weight[x] - weight[y];
    return over(load[n] - shift, bound[n]) + over(load[m] + shift, bound[m]) - over(load[n], bound[n]) -
           over(load[m], bound[m]);
}

/* A random swap: taken if it gains, or by luck. */
static void try_swap(struct search *s, double penalty, double heat, uint64_t *random)
{
    const struct ry_anneal *a = s->a;
    int layer = (int)ry_random_below(random, (uint64_t)a->layers);
    int x = (int)ry_random_below(random, (uint64_t)a->experts), y = (int)ry_random_below(random, (uint64_t)a->experts);
    int n = s->map[layer * a->experts + x], m = s->map[layer * a->experts + y];
    if (n == m)
        return;
    double gain = (double)swap_gain(s, layer, x, y, n, m);
    if (a->bound)
        gain -= penalty * (double)excess_change(s, layer, x, y, n, m);
    if (gain >= 0 || (double)(ry_random(random) >> 11) * 0x1p-53 < exp(gain / heat))
        swap_apply(s, layer, x, y);
}

/* What crosses, after `rounds` of pricing. */
static double value(struct search *s, int rounds)
{
    const struct ry_anneal *a = s->a;
    set_prices(s, rounds);
    int64_t crossing = 0;
    if (a->sets)
        for (size_t i = 0; i < (size_t)a->nodes * (size_t)a->samples; i++)
            crossing += s->affinity[i];
    for (size_t j = 0; !a->sets && j < (size_t)a->layers * (size_t)a->experts; j++)
        crossing += s->weight[j];
    for (int i = 0; i < a->samples; i++)
        crossing -= s->best[i];
    for (int n = 0; n < a->nodes; n++)
        crossing -= (int64_t)s->price[n] * a->homes[n];
    return (double)crossing;
}

double ry_anneal_value(const struct ry_anneal *a, const int *map)
{
    struct search s;
    double v = search_init(&s, a, (int *)map) ? -1 : value(&s, PRICING_ROUNDS);
    search_free(&s);
    return v;
}

/* Bounds first, then gains, until no pair is left that helps. Prices are reconsidered for each swap: under fixed ones,
   crowding what many samples need on one node looks good until nobody else may live there. */
static void descend(struct search *s)
{
    const struct ry_anneal *a = s->a;
    double best = value(s, PRICING_ROUNDS);
    bool again = true;
    for (int round = 0; again && round < 20; round++) {
        again = false;
        for (int l = 0; l < a->layers; l++) {
            for (int x = 0; x < a->experts; x++) {
                for (int y = x + 1; y < a->experts; y++) {
                    const int *map = s->map + (size_t)l * (size_t)a->experts;
                    int n = map[x], m = map[y];
                    int64_t excess = a->bound ? excess_change(s, l, x, y, n, m) : 0;
                    if (n == m || excess > 0 || (excess == 0 && swap_gain(s, l, x, y, n, m) <= 0))
                        continue;
                    if (excess < 0)
                        swap_gain(s, l, x, y, n, m);
                    swap_apply(s, l, x, y);
                    double now = value(s, 3);
                    if (excess == 0 && now >= best) {
                        swap_gain(s, l, x, y, m, n);
                        swap_apply(s, l, x, y);
                        set_prices(s, 1);
                        continue;
                    }
                    best = now;
                    again = true;
                }
            }
        }
    }
}

double ry_anneal_run(const struct ry_anneal *a, int *map, long moves, uint64_t seed)
{
    struct search s;
    if (search_init(&s, a, map)) {
        search_free(&s);
        return -1;
    }
    uint64_t random = seed;
    int64_t copies = 0;
    for (size_t j = 0; j < (size_t)a->layers * (size_t)a->experts; j++)
        copies += s.weight[j];
    double unit = (double)copies / a->layers / a->experts;
    for (long i = 0; i < moves; i++) {
        double done = (double)i / (double)moves;
        if (i % MOVES_PER_PRICING == 0)
            set_prices(&s, 2);
        try_swap(&s, PENALTY_FIRST * pow(PENALTY_LAST / PENALTY_FIRST, done), unit * HOT * pow(COLD / HOT, done),
                 &random);
    }
    descend(&s);
    double v = value(&s, PRICING_ROUNDS);
    search_free(&s);
    return v;
}
