/* coplace.c: see coplace.h. */
#include "place/coplace.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "place/anneal.h"
#include "place/crossing_bound.h"
#include "place/expert_load.h"
#include "place/locality.h"
#include "place/random.h"
#include "place/study.h"

#define LEAST_SAMPLES 16 /* below, nothing can be told from held-out samples */
#define SURE 3.0         /* standard errors by which a gain must exceed nothing */

/* What is learned from: some samples, as the search wants them. */
struct lesson {
    const struct ry_cluster *cluster;
    const struct ry_routing *routing;
    struct ry_coplace_options opt;
    int n;
    int *which;       /* [n] */
    const int *seats; /* [nodes]: samples that nodes take, in proportion */
    int *contiguous;  /* [layers][experts] → node */
    uint16_t *counts; /* [layer][expert][n] */
    int64_t *weight;  /* [layer][expert]: copies, of all samples together */
    int64_t *limit;   /* [layer][node]: copies that a node may get */
    int64_t *bound;   /* the same less a margin, as others than these samples shall keep within the limit */
    int *homes;       /* [nodes] */
    struct ry_token_sets sets;
    struct ry_anneal search;
};

void ry_share_out(int *out, const int *share, int n, int total)
{
    int64_t sum = 0, done = 0;
    for (int i = 0; i < n; i++)
        sum += share[i];
    for (int i = 0; i < n; i++) {
        int64_t before = sum ? done * total / sum : (int64_t)i * total / n;
        done += share[i];
        out[i] = (int)((sum ? done * total / sum : (int64_t)(i + 1) * total / n) - before);
    }
}

/* Copies that the busiest of equal places may get of a layer. */
static double limit_of(const struct ry_coplace_options *opt, double mean, double busiest)
{
    return opt->load_times * (opt->load_from == RY_BOUND_MEAN ? mean : busiest);
}

/* Limits are per GPU of a node, so that nodes may be of different sizes. The margin takes at most half of what a limit
   leaves above the mean: where contiguous experts are nearly even already, no map would be left. */
static void set_bounds(struct lesson *t)
{
    const struct ry_cluster *c = t->cluster;
    int experts = t->routing->experts;
    for (int l = 0; l < t->routing->layers; l++) {
        int64_t *limit = t->limit + l * c->nnodes, total;
        total = ry_expert_load(t->weight + l * experts, t->contiguous + l * experts, experts, c->nnodes, limit);
        double unit = 0, mean = (double)total / c->nranks;
        for (int m = 0; m < c->nnodes; m++)
            unit = fmax(unit, (double)limit[m] / c->node_size[m]);
        unit = limit_of(&t->opt, mean, unit);
        double within = fmin(unit, fmax(unit * (1 - t->opt.load_margin), (mean + unit) / 2));
        for (int m = 0; m < c->nnodes; m++) {
            limit[m] = (int64_t)floor(unit * c->node_size[m] + 1e-6);
            t->bound[l * c->nnodes + m] = (int64_t)floor(within * c->node_size[m] + 1e-6);
        }
    }
}

static void lesson_end(struct lesson *t)
{
    free(t->which);
    free(t->contiguous);
    free(t->counts);
    free(t->weight);
    free(t->limit);
    free(t->bound);
    free(t->homes);
    ry_token_sets_free(&t->sets);
}

static int lesson_begin(struct lesson *t, const struct ry_cluster *cluster, const struct ry_routing *r,
                        const int *which, int n, const int *seats, const struct ry_coplace_options *opt,
                        struct ry_err *err)
{
    size_t slots = (size_t)r->layers * (size_t)r->experts, nodes = (size_t)cluster->nnodes;
    *t = (struct lesson){.cluster = cluster, .routing = r, .opt = *opt, .n = n, .seats = seats};
    t->which = malloc((size_t)n * sizeof *t->which);
    t->contiguous = malloc(slots * sizeof *t->contiguous);
    t->counts = malloc(slots * (size_t)n * sizeof *t->counts);
    t->weight = calloc(slots, sizeof *t->weight);
    t->limit = malloc((size_t)r->layers * nodes * sizeof *t->limit);
    t->bound = malloc((size_t)r->layers * nodes * sizeof *t->bound);
    t->homes = malloc(nodes * sizeof *t->homes);
    if (!t->which || !t->contiguous || !t->counts || !t->weight || !t->limit || !t->bound || !t->homes ||
        (opt->counting == RY_DISTINCT && ry_token_sets_make(&t->sets, r, which, n))) {
        lesson_end(t);
        return ry_fail(err, "out of memory for learning an expert map from %d samples", n);
    }
    memcpy(t->which, which, (size_t)n * sizeof *which);
    for (size_t j = 0; j < slots; j++)
        t->contiguous[j] = cluster->node[j % (size_t)r->experts / (size_t)(r->experts / cluster->nranks)];
    for (int i = 0; i < n; i++) {
        const uint16_t *row = ry_counts_at(r, which[i], 0);
        for (size_t j = 0; j < slots; j++) {
            t->counts[j * (size_t)n + (size_t)i] = row[j];
            t->weight[j] += row[j];
        }
    }
    ry_share_out(t->homes, seats, cluster->nnodes, n);
    set_bounds(t);
    t->search = (struct ry_anneal){.samples = n,
                                   .layers = r->layers,
                                   .experts = r->experts,
                                   .nodes = cluster->nnodes,
                                   .counts = t->counts,
                                   .homes = t->homes,
                                   .bound = opt->load_from == RY_BOUND_NONE ? NULL : t->bound,
                                   .sets = opt->counting == RY_DISTINCT ? &t->sets : NULL};
    return 0;
}

/* What crosses of samples which[0 … n) in batches, per sample: map and homes as said. */
static int cross(const struct lesson *t, const int *which, int n, const int *map, enum ry_counting counting, bool homes,
                 double *crossing, struct ry_err *err)
{
    int batch = t->opt.batch < n ? t->opt.batch : n, *share = malloc((size_t)t->cluster->nnodes * sizeof *share);
    if (!share)
        return ry_fail(err, "out of memory");
    ry_share_out(share, t->seats, t->cluster->nnodes, batch);
    struct ry_batches b = {t->routing, which, n, t->cluster->nnodes, share, map, counting};
    int done = ry_study_cross(&b, homes ? RY_HOMES_KNOWN : RY_HOMES_IN_ORDER, NULL, crossing, err);
    free(share);
    return done;
}

static double sum(const double *v, int n)
{
    double s = 0;
    for (int i = 0; i < n; i++)
        s += v[i];
    return s;
}

static bool nodes_held(const struct lesson *t, int layer, const int *map, int64_t *room)
{
    int experts = t->routing->experts, nodes = t->cluster->nnodes;
    ry_expert_load(t->weight + layer * experts, map + layer * experts, experts, nodes, room);
    for (int m = 0; m < nodes && t->opt.load_from != RY_BOUND_NONE; m++)
        if (room[m] > t->limit[layer * nodes + m])
            return false;
    return true;
}

/* A map into best[layers][experts]: that of the start which lets least cross when samples come in batches, as the job's
   do. That differs a little from what the search goes by, all samples' homes in balance at once: a batch has more of
   one kind of samples than of another, and a good map bears that. */
static int search(const struct lesson *t, int starts, int *best, struct ry_err *err)
{
    size_t slots = (size_t)t->routing->layers * (size_t)t->routing->experts;
    int *map = malloc(slots * sizeof *map), rc = -1;
    int64_t *room = malloc((size_t)t->cluster->nnodes * sizeof *room);
    double *crossing = malloc((size_t)t->n * sizeof *crossing), least = INFINITY;
    if (!map || !room || !crossing) {
        ry_fail(err, "out of memory for an expert map");
        goto out;
    }
    for (int i = 0; i <= starts; i++) { /* the last one is the contiguous map as it is: never worse than that */
        memcpy(map, t->contiguous, slots * sizeof *map);
        if (i < starts && ry_anneal_run(&t->search, map, t->opt.moves, t->opt.seed * 1000003 + (uint64_t)i) < 0) {
            ry_fail(err, "out of memory for the search of an expert map");
            goto out;
        }
        for (int l = 0; l < t->routing->layers; l++) /* as a last resort; never seen to be needed */
            if (!nodes_held(t, l, map, room))
                memcpy(map + l * t->routing->experts, t->contiguous, (size_t)t->routing->experts * sizeof *map);
        int done = cross(t, t->which, t->n, map, t->opt.counting, true, crossing, err);
        if (done < 0)
            goto out;
        double crosses = sum(crossing, done);
        if (crosses < least) {
            least = crosses;
            memcpy(best, map, slots * sizeof *best);
        }
    }
    rc = 0;
out:
    free(map);
    free(room);
    free(crossing);
    return rc;
}

/* Mean of now − then over samples, relative to the mean of base, and its standard error. */
static double saving(const double *then, const double *now, const double *base, int n, double *error)
{
    double mean = (sum(then, n) - sum(now, n)) / n, spread = 0, scale = sum(base, n) / n;
    for (int i = 0; i < n; i++)
        spread += (then[i] - now[i] - mean) * (then[i] - now[i] - mean);
    *error = sqrt(spread / n / (n - 1)) / scale;
    return mean / scale;
}

static double locality(const struct lesson *t)
{
    int first = t->which[0], last = first;
    for (int i = 0; i < t->n; i++) {
        first = t->which[i] < first ? t->which[i] : first;
        last = t->which[i] > last ? t->which[i] : last;
    }
    return ry_locality(t->routing, first, last - first + 1);
}

/* Learn from three quarters, look at the last: what is worth moving? Homes only if samples differ by more than chance:
   chance makes some samples local, too, but nothing tells beforehand which. */
static int decide(const struct lesson *all, struct ry_coplace *out, struct ry_err *err)
{
    const struct ry_routing *r = all->routing;
    int nlearn = 0, nheld = 0, rc = -1, n = all->n;
    int *learn = malloc((size_t)n * sizeof *learn), *held = malloc((size_t)n * sizeof *held);
    int *map = malloc((size_t)r->layers * (size_t)r->experts * sizeof *map);
    double *room = calloc(4 * (size_t)n, sizeof *room);
    double *base = room, *was = room + n, *still = room + 2 * n, *home = room + 3 * n;
    struct lesson part = {0};
    if (!learn || !held || !map || !room) {
        ry_fail(err, "out of memory for learning an expert map");
        goto out;
    }
    uint64_t random = all->opt.seed; /* drawn, as the order that samples come in may have a rhythm */
    for (int i = 0; i < n; i++)
        *(ry_random_below(&random, (uint64_t)(n - i)) < (uint64_t)(n / 4 - nheld) ? &held[nheld++] : &learn[nlearn++]) =
            all->which[i];
    if (lesson_begin(&part, all->cluster, r, learn, nlearn, all->seats, &all->opt, err) ||
        search(&part, (all->opt.starts + 11) / 12, map, err))
        goto out;
    enum ry_counting counting = all->opt.counting;
    int done = cross(&part, held, nheld, part.contiguous, RY_COPIES, false, base, err);
    if (done < 0 || cross(&part, held, nheld, part.contiguous, counting, false, was, err) < 0 ||
        cross(&part, held, nheld, map, counting, false, still, err) < 0 ||
        cross(&part, held, nheld, map, counting, true, home, err) < 0)
        goto out;
    rc = 0;
    if (sum(base, done) <= 0) {
        snprintf(out->why, sizeof out->why, "nothing crosses nodes: nothing is moved");
        goto out;
    }
    double error, total_error, least = all->opt.least_gain;
    double homes = saving(still, home, base, done, &error), dispersion = locality(all);
    out->move_samples = homes >= least && homes >= SURE * error && dispersion >= RY_LOCALITY_LEAST;
    const double *best = out->move_samples ? home : still;
    double total = saving(was, best, base, done, &total_error);
    out->move_experts = total >= least && total >= SURE * total_error;
    out->move_samples &= out->move_experts;
    out->held_out = sum(out->move_experts ? best : was, done) / sum(base, done);
    out->held_out_error = total_error;
    snprintf(out->why, sizeof out->why,
             "a map learned from %d samples saves %.1f %% ± %.1f %% of what crosses for %d others, of which choosing "
             "their homes saves %.1f %% ± %.1f %%; samples' choices of experts scatter %.2f times as chance would: %s",
             nlearn, 100 * total, 100 * total_error, done, 100 * homes, 100 * error, dispersion,
             !out->move_experts  ? "nothing is moved"
             : out->move_samples ? "experts and samples are moved"
                                 : "experts are moved, samples stay");
out:
    lesson_end(&part);
    free(learn);
    free(held);
    free(map);
    free(room);
    return rc;
}

/* Copies that a rank may get in a layer: as nodes' bounds, but indivisible experts can make it more than is possible.
 */
static double rank_bound(const struct lesson *t, int layer, const int *blocks, int64_t *room)
{
    int experts = t->routing->experts, ranks = t->cluster->nranks;
    int64_t total = ry_expert_load(t->weight + layer * experts, blocks + layer * experts, experts, ranks, room),
            top = 0;
    for (int i = 0; i < ranks; i++)
        top = room[i] > top ? room[i] : top;
    return limit_of(&t->opt, (double)total / ranks, (double)top);
}

/* A layer's node map to ranks; returns the busiest rank's copies, and which one it is; -1 out of memory. */
static int64_t layer_to_ranks(const struct lesson *t, int layer, const int *map, int *expert_rank, int64_t *room,
                              int *busiest)
{
    int experts = t->routing->experts, at = layer * experts;
    if (ry_experts_to_ranks(t->cluster, 1, experts, t->weight + at, map + at, expert_rank + at))
        return -1;
    ry_expert_load(t->weight + at, expert_rank + at, experts, t->cluster->nranks, room);
    *busiest = 0;
    for (int i = 0; i < t->cluster->nranks; i++)
        *busiest = room[i] > room[*busiest] ? i : *busiest;
    return room[*busiest];
}

/* Where no way of dealing a node's experts out keeps a rank within its bound, the node gives one away: the exchange
   with another node that relieves the busiest rank and lets least cross. Few layers need it, if any. */
static int hold_ranks(const struct lesson *t, const int *blocks, int *map, int *expert_rank, int64_t *room)
{
    int experts = t->routing->experts, busiest;
    for (int l = 0; l < t->routing->layers && t->opt.load_from != RY_BOUND_NONE; l++) {
        double bound = rank_bound(t, l, blocks, room);
        int64_t top = layer_to_ranks(t, l, map, expert_rank, room, &busiest);
        int *at = map + l * experts;
        for (int swaps = 0; (double)top > bound && swaps < experts; swaps++) {
            int best_x = -1, best_y = -1, node = t->cluster->node[busiest], ignored;
            double least = INFINITY;
            for (int x = 0; x < experts; x++) {
                for (int y = 0; y < experts; y++) {
                    int other = at[y];
                    if (at[x] != node || other == node)
                        continue;
                    at[x] = other;
                    at[y] = node;
                    int64_t after = nodes_held(t, l, map, room) ? layer_to_ranks(t, l, map, expert_rank, room, &ignored)
                                                                : INT64_MAX;
                    if (after < top) { /* within the bound if any is, of these the one that lets least cross */
                        double cost = (double)after > bound ? 1e18 * (double)after : ry_anneal_value(&t->search, map);
                        if (cost < least) {
                            least = cost;
                            best_x = x;
                            best_y = y;
                        }
                    }
                    at[x] = node;
                    at[y] = other;
                }
            }
            if (best_x < 0)
                break;
            at[best_x] = at[best_y];
            at[best_y] = node;
            top = layer_to_ranks(t, l, map, expert_rank, room, &busiest);
        }
        if (layer_to_ranks(t, l, map, expert_rank, room, &busiest) < 0)
            return -1;
    }
    return 0;
}

/* Experts to ranks, the loads of both, and whether none is anywhere above its bound. */
static int seat_experts(const struct lesson *t, int *map, struct ry_coplace *out)
{
    const struct ry_cluster *c = t->cluster;
    int layers = t->routing->layers, experts = t->routing->experts;
    int *blocks = malloc((size_t)layers * (size_t)experts * sizeof *blocks);
    int64_t *room = malloc((size_t)c->nranks * sizeof *room);
    double *busiest = malloc(2 * (size_t)layers * sizeof *busiest), *now = busiest, *was = busiest + layers;
    int rc = -1;
    if (!blocks || !room || !busiest || ry_experts_contiguous(blocks, layers, experts, c->nranks, NULL))
        goto out;
    if (out->move_experts && (ry_experts_to_ranks(c, layers, experts, t->weight, map, out->expert_rank) ||
                              hold_ranks(t, blocks, map, out->expert_rank, room)))
        goto out;
    out->node_load_was =
        ry_expert_busiest(t->weight, t->contiguous, layers, experts, c->nnodes, c->node_size, was, room);
    out->node_load = ry_expert_busiest(t->weight, map, layers, experts, c->nnodes, c->node_size, now, room);
    out->rank_load_was = ry_expert_busiest(t->weight, blocks, layers, experts, c->nranks, NULL, was, room);
    out->rank_load = ry_expert_busiest(t->weight, out->expert_rank, layers, experts, c->nranks, NULL, now, room);
    out->bound_held = true;
    for (int l = 0; l < layers && t->opt.load_from != RY_BOUND_NONE; l++)
        out->bound_held &= now[l] <= rank_bound(t, l, blocks, room) + 1e-6 && nodes_held(t, l, map, room);
    rc = 0;
out:
    free(blocks);
    free(room);
    free(busiest);
    return rc;
}

/* Learn from everything, and say how it compares. */
static int learn(const struct lesson *t, struct ry_coplace *out, struct ry_err *err)
{
    const struct ry_cluster *c = t->cluster;
    const struct ry_routing *r = t->routing;
    size_t slots = (size_t)r->layers * (size_t)r->experts;
    int *map = malloc(slots * sizeof *map), *share = malloc((size_t)c->nnodes * sizeof *share), rc = -1;
    double *base = malloc((size_t)t->n * sizeof *base);
    if (!map || !share || !base) {
        ry_fail(err, "out of memory for an expert map");
        goto out;
    }
    memcpy(map, t->contiguous, slots * sizeof *map);
    if (ry_experts_contiguous(out->expert_rank, r->layers, r->experts, c->nranks, err) ||
        (out->move_experts && search(t, t->opt.starts, map, err)))
        goto out;
    if (seat_experts(t, map, out)) {
        ry_fail(err, "out of memory for experts to ranks");
        goto out;
    }
    int done = cross(t, t->which, t->n, t->contiguous, RY_COPIES, false, base, err);
    if (done < 0)
        goto out;
    double whole = sum(base, done) * t->n / done / 2, value = ry_anneal_value(&t->search, map);
    for (int m = 0; m < c->nnodes; m++)
        share[m] = r->experts / c->nranks * c->node_size[m];
    double least = t->search.sets || c->nnodes < 2 ? 0 : ry_crossing_bound(&t->search, share);
    if (value < 0 || least < 0) {
        ry_fail(err, "out of memory for what crosses");
        goto out;
    }
    out->fit = whole > 0 ? value / whole : 0;
    out->least = whole > 0 ? least / whole : 0;
    rc = 0;
out:
    free(map);
    free(share);
    free(base);
    return rc;
}

static int check(const struct ry_cluster *c, const struct ry_routing *r, const int *which, int n,
                 const struct ry_coplace_options *opt, struct ry_err *err)
{
    if (r->experts % c->nranks)
        return ry_fail(err,
                       "%d experts cannot be dealt out evenly to %d ranks: choose a number of nodes and ranks per node "
                       "whose product divides it",
                       r->experts, c->nranks);
    if (n < 1 || (!which && n > r->samples))
        return ry_fail(err, "expert map: %d samples to learn from, the routing holds %d", n, r->samples);
    for (int i = 0; which && i < n; i++)
        if (which[i] < 0 || which[i] >= r->samples)
            return ry_fail(err, "expert map: sample %d of %d is to be learned from", which[i], r->samples);
    if (opt->counting == RY_DISTINCT && !r->choice_samples)
        return ry_fail(err,
                       "counting distinct pairs needs token-level choices, which this routing has not: count copies");
    if (!(opt->load_times >= 0) || !(opt->load_margin < 1) || !(opt->least_gain >= 0) || opt->starts < 0 ||
        opt->moves < 0 || opt->batch < 0)
        return ry_fail(err, "expert map: an option is negative or not a number");
    return 0;
}

struct ry_coplace *ry_coplace_learn(const struct ry_cluster *c, const struct ry_routing *r, const int *which, int n,
                                    const int *capacity, const struct ry_coplace_options *options, struct ry_err *err)
{
    if (check(c, r, which, n, options, err))
        return NULL;
    struct ry_coplace_options opt = *options;
    opt.load_times = opt.load_times > 0 ? opt.load_times : 1;
    opt.load_margin = opt.load_margin ? fmax(opt.load_margin, 0) : 0.03;
    opt.least_gain = opt.least_gain > 0 ? opt.least_gain : 0.02;
    opt.batch = opt.batch ? opt.batch : 128;
    opt.starts = opt.starts ? opt.starts : opt.counting == RY_DISTINCT ? 3 : 24;
    long most = opt.counting == RY_DISTINCT ? 40000 : 150000, each = opt.counting == RY_DISTINCT ? 160 : 600;
    opt.moves = opt.moves ? opt.moves : (long)fmin((double)most, (double)each * r->layers * r->experts);

    int *use = malloc((size_t)n * sizeof *use), *seats = calloc((size_t)c->nnodes, sizeof *seats), used = 0, rc = -1;
    struct ry_coplace *out = calloc(1, sizeof *out);
    struct lesson all = {0};
    if (!use || !seats || !out || !(out->expert_rank = malloc((size_t)r->layers * (size_t)r->experts * sizeof(int)))) {
        ry_fail(err, "out of memory for an expert map");
        goto out;
    }
    out->layers = r->layers;
    out->experts = r->experts;
    out->ranks = c->nranks;
    for (int i = 0; i < n; i++) {
        int s = which ? which[i] : i;
        if (opt.counting == RY_COPIES || s < r->choice_samples)
            use[used++] = s;
    }
    for (int i = 0; i < c->nranks; i++)
        seats[c->node[i]] += capacity ? capacity[i] : 1;
    if (!used) {
        ry_fail(err, "counting distinct pairs: none of the samples to learn from has token-level choices");
        goto out;
    }
    if (lesson_begin(&all, c, r, use, used, seats, &opt, err))
        goto out;
    out->held_out = 1;
    if (c->nnodes < 2)
        snprintf(out->why, sizeof out->why, "there is one node: nothing crosses, nothing is moved");
    else if (used < LEAST_SAMPLES)
        snprintf(out->why, sizeof out->why, "%d samples are too few to learn from, %d are needed: nothing is moved",
                 used, LEAST_SAMPLES);
    else if (decide(&all, out, err))
        goto out;
    rc = learn(&all, out, err);
out:
    lesson_end(&all);
    free(use);
    free(seats);
    if (rc) {
        ry_coplace_free(out);
        return NULL;
    }
    return out;
}

void ry_coplace_free(struct ry_coplace *coplace)
{
    if (coplace)
        free(coplace->expert_rank);
    free(coplace);
}
