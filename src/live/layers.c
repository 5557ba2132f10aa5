/* layers.c: see layers.h. */
#include "live/layers.h"

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "live/internal.h"
#include "place/assign.h"
#include "place/ridge.h"

#define MOST_SLOTS (1 << 14)
#define MOST_CELLS (1 << 26)
#define MOST_TOKENS 65536
#define HISTORY 4         /* layers that a prediction looks back, */
#define MOST_FEATURES 256 /* as far as they have no more experts than that together */
#define RIDGE 100.0       /* λ in units of the mean count, as place/predict.c has it */
#define BUDGET 2e7        /* multiplications that learning may take per micro-batch, or it would be late for the next */
#define FIRST 256         /* samples learned from until anything moves, and the first fit */
#define REFIT 4096        /* samples after which all is fitted anew; until then whenever they have doubled */
#define FADE 16384        /* samples after which older ones begin to count half */
#define LEAST_GAIN 0.02   /* of what crosses */
#define TRIED 16          /* micro-batches in which samples moved, after which it must have paid, */
#define REST 256          /* or none does for so many */
#define MEMORY (1.0 / 64) /* weight of the newest micro-batch in running means */
#define COST (1 << 24)

struct step { /* what comes after a layer */
    int first, features;
    double *xx, *xy; /* [features][features], lower half; [features][places] */
    float *b;        /* [features][places] */
    bool fitted;
};

struct railyard_live_layers {
    pthread_mutex_t lock;
    int ranks, samples, slots, tokens, layers, experts, topk, places;
    bool distinct, combine, rides;
    int *slot_place;    /* [slots] */
    int *expert_place;  /* [experts] */
    int *capacity;      /* [places] */
    struct step *steps; /* [layers - 1] */
    double *factor, *solution;
    /* the micro-batch: of samples */
    int next_layer; /* that is to be told; 0: none is under way */
    float *counts;  /* [slots][layers][experts] */
    float *rows;    /* [slots][layers][places] */
    int *was;       /* [layers][slots]: places */
    bool *inside;   /* [layers]: whoever moved after it moved inside its combine */
    /* learning */
    uint64_t learned, since, fit_at;
    double weight, total; /* of samples in the sums, and of their counts */
    int fitting;          /* the next layer to be fitted; layers - 1: none */
    int turn;             /* sample to learn from next, where not all can be */
    /* what came of it */
    uint64_t batches, tried, rest;
    double sent, home, crossed, carried, earned;
    /* room for solving */
    struct ry_assign *assign;
    float *future; /* [slots][places], by slot */
    int32_t *cost; /* [slots][places] */
    int *to;       /* [slots] */
    uint32_t *left;
    int *at;
};

/* ---- making ---- */

static int check_job(const struct railyard_live_layers_job *j)
{
    if (j->size != sizeof *j)
        return ry_fail(&ry_live_err,
                       "layers: a job of %u bytes, but %zu are known: adapter and library are of two versions", j->size,
                       sizeof *j);
    if (j->ranks < 2 || j->samples < 1 || (int64_t)j->ranks * j->samples > MOST_SLOTS)
        return ry_fail(&ry_live_err, "layers: %d ranks of %d samples: 2 ranks and up to %d samples are possible",
                       j->ranks, j->samples, MOST_SLOTS);
    if (j->places < 2 || j->places > j->ranks || j->tokens < 1 || j->tokens > MOST_TOKENS)
        return ry_fail(&ry_live_err, "layers: %d places of %d ranks, samples of %d tokens", j->places, j->ranks,
                       j->tokens);
    if (j->layers < 2 || j->experts < 1 || j->topk < 1 || j->topk > j->experts || j->experts > MOST_CELLS / j->layers ||
        (int64_t)j->ranks * j->samples * j->layers > MOST_CELLS / (j->experts + j->places))
        return ry_fail(&ry_live_err, "layers: %d layers of %d experts, each token to %d of them, %d samples", j->layers,
                       j->experts, j->topk, j->ranks * j->samples);
    if (!j->rank_place || !j->expert_place)
        return ry_fail(&ry_live_err, "layers: no places of %s", j->rank_place ? "experts" : "ranks");
    for (int r = 0; r < j->ranks; r++)
        if (j->rank_place[r] < 0 || j->rank_place[r] >= j->places)
            return ry_fail(&ry_live_err, "layers: rank %d is at place %d of %d", r, j->rank_place[r], j->places);
    for (int e = 0; e < j->experts; e++)
        if (j->expert_place[e] < 0 || j->expert_place[e] >= j->places)
            return ry_fail(&ry_live_err, "layers: expert %d is at place %d of %d", e, j->expert_place[e], j->places);
    return 0;
}

static bool make_steps(struct railyard_live_layers *l)
{
    size_t P = (size_t)l->places, most = 0;
    int history = MOST_FEATURES / l->experts;
    history = history > HISTORY ? HISTORY : history < 1 ? 1 : history;
    l->steps = calloc((size_t)l->layers, sizeof *l->steps);
    for (int k = 0; l->steps && k + 1 < l->layers; k++) {
        struct step *s = &l->steps[k];
        s->first = k + 1 > history ? k + 1 - history : 0;
        s->features = (k + 1 - s->first) * l->experts;
        size_t F = (size_t)s->features;
        most = F > most ? F : most;
        s->xx = calloc(F * F, sizeof *s->xx);
        s->xy = calloc(F * P, sizeof *s->xy);
        s->b = calloc(F * P, sizeof *s->b);
        if (!s->xx || !s->xy || !s->b)
            return false;
    }
    l->factor = malloc(most * most * sizeof *l->factor);
    l->solution = malloc(most * P * sizeof *l->solution);
    return l->steps && l->factor && l->solution;
}

static bool make_room(struct railyard_live_layers *l)
{
    size_t S = (size_t)l->slots, L = (size_t)l->layers, E = (size_t)l->experts, P = (size_t)l->places;
    l->slot_place = malloc(S * sizeof *l->slot_place);
    l->expert_place = malloc(E * sizeof *l->expert_place);
    l->capacity = calloc(P, sizeof *l->capacity);
    l->counts = malloc(S * L * E * sizeof *l->counts);
    l->rows = malloc(S * L * P * sizeof *l->rows);
    l->was = malloc(S * L * sizeof *l->was);
    l->inside = calloc(L, sizeof *l->inside);
    l->future = malloc(S * P * sizeof *l->future);
    l->cost = malloc(S * P * sizeof *l->cost);
    l->to = malloc(S * sizeof *l->to);
    l->left = malloc(S * sizeof *l->left);
    l->at = malloc(P * sizeof *l->at);
    l->assign = ry_assign_new(l->slots, l->places, 0, &ry_live_err);
    return l->slot_place && l->expert_place && l->capacity && l->counts && l->rows && l->was && l->inside && l->future && l->cost &&
           l->to && l->left && l->at && l->assign;
}

struct railyard_live_layers *railyard_live_layers_new(const struct railyard_live_layers_job *j)
{
    if (check_job(j))
        return NULL;
    struct railyard_live_layers *l = calloc(1, sizeof *l);
    if (!l) {
        ry_fail(&ry_live_err, "layers: out of memory");
        return NULL;
    }
    pthread_mutex_init(&l->lock, NULL);
    l->ranks = j->ranks;
    l->samples = j->samples;
    l->slots = j->ranks * j->samples;
    l->tokens = j->tokens;
    l->layers = j->layers;
    l->experts = j->experts;
    l->topk = j->topk;
    l->places = j->places;
    l->distinct = j->distinct != 0;
    l->combine = j->combine != 0;
    l->rides = j->combine == 2;
    l->fit_at = FIRST;
    l->fitting = l->layers - 1;
    if (!make_steps(l) || !make_room(l)) {
        railyard_live_layers_free(l);
        ry_fail(&ry_live_err, "layers: out of memory for %d layers of %d experts", j->layers, j->experts);
        return NULL;
    }
    for (int s = 0; s < l->slots; s++)
        l->capacity[l->slot_place[s] = j->rank_place[s / l->samples]]++;
    for (int e = 0; e < l->experts; e++)
        l->expert_place[e] = j->expert_place[e];
    return l;
}

void railyard_live_layers_free(struct railyard_live_layers *l)
{
    if (!l)
        return;
    for (int k = 0; l->steps && k + 1 < l->layers; k++) {
        free(l->steps[k].xx);
        free(l->steps[k].xy);
        free(l->steps[k].b);
    }
    free(l->steps);
    free(l->factor);
    free(l->solution);
    free(l->slot_place);
    free(l->expert_place);
    free(l->capacity);
    free(l->counts);
    free(l->rows);
    free(l->was);
    free(l->inside);
    free(l->future);
    free(l->cost);
    free(l->to);
    free(l->left);
    free(l->at);
    ry_assign_free(l->assign);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

/* ---- a layer ---- */

static float *counts_of(const struct railyard_live_layers *l, int sample, int layer)
{
    return l->counts + ((size_t)sample * (size_t)l->layers + (size_t)layer) * (size_t)l->experts;
}

static float *rows_of(const struct railyard_live_layers *l, int sample, int layer)
{
    return l->rows + ((size_t)sample * (size_t)l->layers + (size_t)layer) * (size_t)l->places;
}

/* Nothing is changed by what is refused. */
static int check_layer(struct railyard_live_layers *l, int layer, const uint32_t *sample, const uint32_t *counts,
                       const uint32_t *distinct)
{
    if (!sample || !counts || (l->distinct && !distinct))
        return ry_fail(&ry_live_err, "layers: layer %d without %s", layer, !sample ? "samples" : "counts");
    if (layer < 0 || layer >= l->layers || (layer && layer != l->next_layer))
        return ry_fail(&ry_live_err, "layers: layer %d of %d, but %d is the next", layer, l->layers, l->next_layer);
    for (int s = 0; s < l->slots; s++)
        l->to[s] = 0;
    for (int s = 0; s < l->slots; s++) {
        if (sample[s] >= (uint32_t)l->slots || l->to[sample[s]]++)
            return ry_fail(&ry_live_err, "layers: slot %d has sample %u of %d%s", s, sample[s], l->slots,
                           sample[s] < (uint32_t)l->slots ? ", as another one has" : "");
        uint64_t copies = 0;
        for (int e = 0; e < l->experts; e++)
            copies += counts[(size_t)s * (size_t)l->experts + (size_t)e];
        if (copies > (uint64_t)l->tokens * (uint64_t)l->topk)
            return ry_fail(&ry_live_err, "layers: %llu copies of a sample of %d tokens that go to %d experts each",
                           (unsigned long long)copies, l->tokens, l->topk);
        for (int p = 0; l->distinct && p < l->places; p++)
            if (distinct[(size_t)s * (size_t)l->places + (size_t)p] > (uint32_t)l->tokens)
                return ry_fail(&ry_live_err, "layers: %u distinct tokens of a sample of %d",
                               distinct[(size_t)s * (size_t)l->places + (size_t)p], l->tokens);
    }
    return 0;
}

static void keep_layer(struct railyard_live_layers *l, int layer, const uint32_t *sample, const uint32_t *counts,
                       const uint32_t *distinct)
{
    size_t E = (size_t)l->experts, P = (size_t)l->places;
    for (int s = 0; s < l->slots; s++) {
        float *c = counts_of(l, (int)sample[s], layer), *r = rows_of(l, (int)sample[s], layer);
        memset(r, 0, P * sizeof *r);
        for (size_t e = 0; e < E; e++) {
            c[e] = (float)counts[(size_t)s * E + e];
            if (!l->distinct)
                r[l->expert_place[e]] += c[e];
        }
        for (size_t p = 0; l->distinct && p < P; p++)
            r[p] = (float)distinct[(size_t)s * P + p];
        l->was[(size_t)layer * (size_t)l->slots + sample[s]] = l->slot_place[s];
    }
}

/* ---- deciding ---- */

/* Rows of all layers to come, or of the next one where that is all that matters, by place. */
static void foresee(const struct railyard_live_layers *l, int layer, int sample, float *out)
{
    const struct step *step = &l->steps[layer];
    const float *x = counts_of(l, sample, step->first);
    size_t P = (size_t)l->places;
    float most = (float)(l->rides ? 1 : l->layers - 1 - layer) * (float)l->tokens * (float)(l->distinct ? 1 : l->topk);
    memset(out, 0, P * sizeof *out);
    for (size_t i = 0; i < (size_t)step->features; i++)
        for (size_t p = 0; p < P && x[i] > 0; p++)
            out[p] += x[i] * step->b[i * P + p];
    for (size_t p = 0; p < P; p++)
        out[p] = fminf(fmaxf(out[p], 0), most);
}

/* Rows that sample `sample`, now in slot s, is predicted to send across if it goes to place p after this layer. Where it may go
   inside combine, the rows of that are among them. */
static double price(const struct railyard_live_layers *l, int layer, int s, uint32_t sample, int p, bool inside)
{
    const float *f = l->future + (size_t)s * (size_t)l->places, *r = rows_of(l, (int)sample, layer);
    int brought = inside ? p : l->slot_place[s];
    double rows = 0;
    for (int q = 0; l->rides && q < l->places; q++)
        rows += q == p ? 0 : (double)f[q] + (double)r[q];
    if (l->rides)
        return rows;
    for (int q = 0; q < l->places; q++)
        rows += (q == p ? 0 : 2 * (double)f[q]) + (l->combine && q != brought ? (double)r[q] : 0);
    return rows + (double)l->tokens * ((p != l->slot_place[s]) + (p != l->slot_place[sample]));
}

/* Where samples go: l->to[slot]. Returns what it costs. */
static double solve(struct railyard_live_layers *l, int layer, const uint32_t *sample, bool inside)
{
    double most = 2.0 * l->layers * l->tokens * (l->distinct ? l->places : l->topk * l->places) + 2.0 * l->tokens;
    for (int s = 0; s < l->slots; s++) {
        int32_t *cost = l->cost + (size_t)s * (size_t)l->places;
        for (int p = 0; p < l->places; p++)
            cost[p] = 2 * (int32_t)lrint(price(l, layer, s, sample[s], p, inside) / most * COST);
        cost[l->slot_place[s]]--; /* of equal solutions, one that moves less */
    }
    struct ry_assign_problem problem = {
        .nsamples = l->slots, .nplaces = l->places, .cost = l->cost, .capacity = l->capacity};
    ry_assign(l->assign, RY_SOLVE_EXACT, &problem, l->to);
    double go = 0;
    for (int s = 0; s < l->slots; s++)
        go += price(l, layer, s, sample[s], l->to[s], inside);
    return go;
}

/* next[] from to[], places of slots' samples; returns how many move. A place has as many leaving as coming. */
static int arrange(struct railyard_live_layers *l, const uint32_t *sample, uint32_t *next)
{
    int moved = 0;
    for (int round = 0; round < 2; round++) {
        for (int p = 0, begin = 0; p < l->places; begin += l->capacity[p++])
            l->at[p] = begin;
        for (int s = 0; s < l->slots; s++) {
            int from = l->slot_place[s], to = l->to[s];
            if (from == to)
                continue;
            if (round)
                next[l->left[l->at[to]++]] = sample[s], moved++;
            else
                l->left[l->at[from]++] = (uint32_t)s;
        }
    }
    return moved;
}

static bool sure(const struct railyard_live_layers *l)
{
    for (int k = 0; k + 1 < l->layers; k++)
        if (!l->steps[k].fitted)
            return false;
    return l->learned >= FIRST;
}

static void decide(struct railyard_live_layers *l, int layer, const uint32_t *sample, uint32_t *next,
                   struct railyard_live_layers_plan *plan)
{
    if (!sure(l)) {
        snprintf(plan->why, sizeof plan->why, "all stay: %llu samples learned from so far",
                 (unsigned long long)l->learned);
        return;
    }
    for (int s = 0; s < l->slots; s++)
        foresee(l, layer, (int)sample[s], l->future + (size_t)s * (size_t)l->places);
    double to_come = 0;
    for (int s = 0; s < l->slots; s++) {
        const float *f = l->future + (size_t)s * (size_t)l->places;
        plan->stay += price(l, layer, s, sample[s], l->slot_place[s], false);
        if (l->rides) {
            to_come = plan->stay;
            continue;
        }
        for (int p = 0; p < l->places; p++)
            to_come += p == l->slot_place[s] ? 0 : 2 * (double)f[p];
        to_come += l->slot_place[s] == l->slot_place[sample[s]] ? 0 : l->tokens;
    }
    plan->go = plan->stay;
    if (l->rest) {
        snprintf(plan->why, sizeof plan->why, "all stay: moving did not pay lately");
        return;
    }
    double inside = l->combine ? solve(l, layer, sample, true) : 0, go = l->rides ? inside : solve(l, layer, sample, false);
    bool better = l->combine && inside <= go; /* of equal ones the one that is hidden by experts */
    if (better && !l->rides)
        go = solve(l, layer, sample, true);
    double gain = to_come > 0 ? (plan->stay - go) / to_come : 0; /* this layer's combine is no part of what it is held against */
    if (gain < LEAST_GAIN) {
        snprintf(plan->why, sizeof plan->why, "all stay: moving samples would keep %.1f %% of what is to cross",
                 100 * fmax(gain, 0));
        return;
    }
    plan->go = go;
    plan->moved = arrange(l, sample, next);
    plan->inside = l->inside[layer] = better;
    snprintf(plan->why, sizeof plan->why,
             "%d of %d samples change places after layer %d: %.0f rows are to cross rather than %.0f, it is predicted",
             plan->moved, l->slots, layer, go, plan->stay);
}

/* ---- learning ---- */

static void learn_sample(struct railyard_live_layers *l, int sample)
{
    size_t P = (size_t)l->places;
    double *to_come = l->solution; /* no fit is under way */
    memset(to_come, 0, P * sizeof *to_come);
    for (int k = l->layers - 2; k >= 0; k--) {
        const struct step *s = &l->steps[k];
        const float *x = counts_of(l, sample, s->first), *after = rows_of(l, sample, k + 1);
        size_t F = (size_t)s->features;
        for (size_t p = 0; p < P; p++)
            to_come[p] = (l->rides ? 0 : to_come[p]) + (double)after[p];
        for (size_t i = 0; i < F; i++) {
            double xi = (double)x[i];
            for (size_t j = 0; j <= i && xi > 0; j++)
                s->xx[i * F + j] += xi * (double)x[j];
            for (size_t p = 0; p < P && xi > 0; p++)
                s->xy[i * P + p] += xi * to_come[p];
        }
    }
    const float *all = counts_of(l, sample, 0);
    for (size_t i = 0; i < (size_t)l->layers * (size_t)l->experts; i++)
        l->total += (double)all[i];
    l->weight++;
    l->learned++;
    l->since++;
}

static void fade(struct railyard_live_layers *l)
{
    for (int k = 0; k + 1 < l->layers; k++) {
        struct step *s = &l->steps[k];
        for (size_t i = 0; i < (size_t)s->features * (size_t)s->features; i++)
            s->xx[i] /= 2;
        for (size_t i = 0; i < (size_t)s->features * (size_t)l->places; i++)
            s->xy[i] /= 2;
    }
    l->weight /= 2;
    l->total /= 2;
}

static void learn(struct railyard_live_layers *l)
{
    double each = 0, spent = 0;
    for (int k = 0; k + 1 < l->layers; k++)
        each += l->steps[k].features * (0.5 * l->steps[k].features + l->places);
    int n = (int)fmin(fmax(BUDGET / fmax(each, 1), 1), l->slots);
    for (int i = 0; i < n; i++, l->turn = (l->turn + 1) % l->slots)
        learn_sample(l, l->turn);
    if (l->weight >= 2 * FADE)
        fade(l);
    if (l->since >= l->fit_at && l->fitting == l->layers - 1) {
        l->fit_at = l->learned < REFIT ? l->learned : REFIT;
        l->since = 0;
        l->fitting = 0;
    }
    double mean = l->total / (l->weight * l->layers * l->experts);
    while (l->fitting < l->layers - 1 && mean > 0 && spent < BUDGET) {
        struct step *s = &l->steps[l->fitting++];
        ry_ridge(s->xx, s->xy, (size_t)s->features, (size_t)l->places, RIDGE * mean, l->factor, l->solution, s->b);
        s->fitted = true;
        spent += (double)s->features * s->features * (s->features / 3.0 + l->places);
    }
}

/* What the micro-batch sent, what crossed, what would have with everyone at home, what its moves sent. */
static void account(struct railyard_live_layers *l)
{
    double sent = 0, home = 0, crossed = 0, carried = 0;
    for (int i = 0; i < l->slots; i++) {
        for (int k = 0, at = l->slot_place[i]; k < l->layers; k++) {
            const float *r = rows_of(l, i, k);
            int now = l->was[(size_t)k * (size_t)l->slots + (size_t)i];
            bool moves = l->inside[k] && k + 1 < l->layers; /* its results went to where it was next */
            int then = l->rides && k + 1 == l->layers ? l->slot_place[i] : moves ? l->was[(size_t)(k + 1) * (size_t)l->slots + (size_t)i] : now;
            double all = 0;
            for (int p = 0; p < l->places; p++)
                all += 2 * (double)r[p];
            sent += all;
            home += all - 2 * (double)r[l->slot_place[i]];
            crossed += all - (double)r[now] - (double)r[then];
            carried += at != now && !(l->rides && k && l->inside[k - 1]) ? l->tokens : 0;
            at = now;
            if (k + 1 == l->layers && !l->rides)
                carried += at != l->slot_place[i] ? l->tokens : 0;
        }
    }
    double rate = fmax(MEMORY, 1.0 / (double)(++l->batches));
    l->sent += rate * (sent - l->sent);
    l->home += rate * (home - l->home);
    l->crossed += rate * (crossed - l->crossed);
    l->carried += rate * (carried - l->carried);
    if (l->rest && --l->rest == 0)
        l->tried = 0, l->earned = 0;
    if (carried > 0) {
        rate = fmax(MEMORY, 1.0 / (double)(++l->tried));
        l->earned += rate * (home - crossed - carried - l->earned);
        if (l->tried >= TRIED && l->earned < 0)
            l->rest = REST;
    }
}

int railyard_live_layers_next(struct railyard_live_layers *l, int32_t layer, const uint32_t *sample,
                              const uint32_t *counts, const uint32_t *distinct, uint32_t *next,
                              struct railyard_live_layers_plan *plan)
{
    if (plan->size != sizeof *plan)
        return ry_fail(&ry_live_err,
                       "layers: a plan of %u bytes, but %zu are known: adapter and library are of two versions",
                       plan->size, sizeof *plan);
    pthread_mutex_lock(&l->lock);
    int rc = check_layer(l, layer, sample, counts, distinct);
    if (!rc) {
        *plan = (struct railyard_live_layers_plan){.size = sizeof *plan};
        memcpy(next, sample, (size_t)l->slots * sizeof *next);
        keep_layer(l, layer, sample, counts, distinct);
        l->next_layer = layer + 1;
        l->inside[layer] = false;
        if (layer + 1 < l->layers) {
            decide(l, layer, sample, next, plan);
        } else {
            l->next_layer = 0;
            account(l);
            learn(l);
            snprintf(plan->why, sizeof plan->why, "the last layer");
        }
    }
    pthread_mutex_unlock(&l->lock);
    return rc;
}

int railyard_live_layers_state(struct railyard_live_layers *l, struct railyard_live_layers_state *s)
{
    if (s->size != sizeof *s)
        return ry_fail(&ry_live_err,
                       "layers: a state of %u bytes, but %zu are known: adapter and library are of two versions",
                       s->size, sizeof *s);
    pthread_mutex_lock(&l->lock);
    s->sure = sure(l) && !l->rest;
    s->samples = l->learned;
    s->batches = l->tried;
    s->home = l->sent > 0 ? l->home / l->sent : 0;
    s->crossed = l->sent > 0 ? l->crossed / l->sent : 0;
    s->carried = l->sent > 0 ? l->carried / l->sent : 0;
    snprintf(s->why, sizeof s->why, "%s",
             !sure(l)  ? "not enough was seen yet"
             : l->rest ? "moving did not pay lately: a rest"
                       : "samples move where it is predicted to pay");
    pthread_mutex_unlock(&l->lock);
    return 0;
}
