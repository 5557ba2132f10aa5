/* live.c: see live.h. */
#include "live/live.h"

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/settings.h"
#include "live/internal.h"
#include "place/assign.h"
#include "place/home_model.h"
#include "place/routing_writer.h"

#define MEMORY (1.0 / 1024)  /* weight of the newest sample in running means */
#define LEAST_GAIN 0.02      /* of what leaves, for samples to be moved */
#define COST (1 << 24)       /* a whole sample leaves; twice that is within RY_ASSIGN_COST_MAX */
#define MOST_SLOTS (1 << 20) /* of a list */
#define MOST_CELLS (1 << 26) /* slots · places */

struct railyard_live {
    pthread_mutex_t lock;
    int ranks, samples, slots, layers, experts, topk, places;
    bool distinct;
    int *rank_place;   /* [ranks] */
    int *expert_place; /* [layers][experts] */
    int *capacity;     /* [places]: slots there */
    struct ry_home_model *model;
    uint64_t observed;          /* here; what a loaded model saw is not counted */
    double sent, crossed, even; /* running means, rows of a sample */
    double *rows;               /* [places]: room for one sample's */
    /* room for a list */
    struct ry_assign *assign;
    float *share;   /* [slots][places] */
    float *weight;  /* [slots]: of the samples, the longest 1 */
    int32_t *cost;  /* [slots][places] */
    int *to;        /* [slots]: places */
    uint32_t *left; /* [slots]: slots that samples leave, by place */
    int *next;      /* [places]: the next of these */
    struct ry_routing_writer *writer;
    int tokens_per_sample;
    int64_t most_samples;
};

_Thread_local struct ry_err ry_live_err;

int railyard_live_abi(void)
{
    return RAILYARD_LIVE_ABI;
}

const char *railyard_live_error(void)
{
    return ry_live_err.msg;
}

int railyard_live_setting(const char *name, char *out, size_t size)
{
    return ry_settings_get(name, environ, out, size, &ry_live_err);
}

/* ---- making ---- */

static int check_job(const struct railyard_live_job *j)
{
    if (j->size != sizeof *j)
        return ry_fail(&ry_live_err, "live: a job of %u bytes, but %zu are known: adapter and library are of two versions",
                       j->size, sizeof *j);
    if (j->ranks < 1 || j->samples < 1 || (int64_t)j->ranks * j->samples > MOST_SLOTS)
        return ry_fail(&ry_live_err, "live: %d ranks of %d samples: a list has 1 to %d", j->ranks, j->samples, MOST_SLOTS);
    if (j->places < 2 || j->places > RY_HOME_NODES || j->places > j->ranks)
        return ry_fail(&ry_live_err, "live: %d places of %d ranks: 2 to %d are possible, and no more than ranks", j->places,
                       j->ranks, RY_HOME_NODES);
    if ((int64_t)j->ranks * j->samples * j->places > MOST_CELLS)
        return ry_fail(&ry_live_err, "live: lists of %d samples are too long for %d places", j->ranks * j->samples,
                       j->places);
    if (j->layers < 1 || j->experts < 1 || j->topk < 1 || j->topk > j->experts ||
        (int64_t)j->layers * j->experts > MOST_CELLS)
        return ry_fail(&ry_live_err, "live: %d layers of %d experts, each token to %d of them", j->layers, j->experts,
                       j->topk);
    if (!j->rank_place || !j->expert_place)
        return ry_fail(&ry_live_err, "live: no places of %s", j->rank_place ? "experts" : "ranks");
    for (int r = 0; r < j->ranks; r++)
        if (j->rank_place[r] < 0 || j->rank_place[r] >= j->places)
            return ry_fail(&ry_live_err, "live: rank %d is at place %d of %d", r, j->rank_place[r], j->places);
    for (int i = 0; i < j->layers * j->experts; i++)
        if (j->expert_place[i] < 0 || j->expert_place[i] >= j->places)
            return ry_fail(&ry_live_err, "live: expert %d of layer %d is at place %d of %d", i % j->experts, i / j->experts,
                           j->expert_place[i], j->places);
    return 0;
}

static int *copied(const int32_t *from, size_t n)
{
    int *to = malloc(n * sizeof *to);
    for (size_t i = 0; to && i < n; i++)
        to[i] = from[i];
    return to;
}

static uint64_t map_id(const struct railyard_live *l)
{
    return ry_home_map_id(l->expert_place, l->layers, l->experts);
}

struct railyard_live *railyard_live_new(const struct railyard_live_job *j)
{
    if (check_job(j))
        return NULL;
    struct railyard_live *l = calloc(1, sizeof *l);
    if (!l) {
        ry_fail(&ry_live_err, "live: out of memory");
        return NULL;
    }
    pthread_mutex_init(&l->lock, NULL);
    l->ranks = j->ranks;
    l->samples = j->samples;
    l->slots = j->ranks * j->samples;
    l->layers = j->layers;
    l->experts = j->experts;
    l->topk = j->topk;
    l->places = j->places;
    l->distinct = j->distinct;
    size_t slots = (size_t)l->slots, places = (size_t)l->places;
    l->rank_place = copied(j->rank_place, (size_t)j->ranks);
    l->expert_place = copied(j->expert_place, (size_t)j->layers * (size_t)j->experts);
    l->capacity = calloc(places, sizeof *l->capacity);
    l->rows = malloc(places * sizeof *l->rows);
    l->share = malloc(slots * places * sizeof *l->share);
    l->weight = malloc(slots * sizeof *l->weight);
    l->cost = malloc(slots * places * sizeof *l->cost);
    l->to = malloc(slots * sizeof *l->to);
    l->left = malloc(slots * sizeof *l->left);
    l->next = malloc(places * sizeof *l->next);
    if (!l->rank_place || !l->expert_place || !l->capacity || !l->rows || !l->share || !l->weight || !l->cost ||
        !l->to || !l->left || !l->next) {
        ry_fail(&ry_live_err, "live: out of memory for lists of %zu samples and %zu places", slots, places);
        goto failed;
    }
    for (int r = 0; r < l->ranks; r++)
        l->capacity[l->rank_place[r]] += l->samples;
    for (int p = 0; p < l->places; p++) {
        if (!l->capacity[p]) {
            ry_fail(&ry_live_err, "live: no rank is at place %d of %d", p, l->places);
            goto failed;
        }
    }
    if (!(l->assign = ry_assign_new(l->slots, l->places, 0, &ry_live_err)) ||
        !(l->model = ry_home_model_new(l->places, &(struct ry_home_options){.map = map_id(l)}, &ry_live_err)))
        goto failed;
    return l;
failed:
    railyard_live_free(l);
    return NULL;
}

void railyard_live_free(struct railyard_live *l)
{
    if (!l)
        return;
    ry_routing_writer_close(l->writer, &ry_live_err);
    ry_home_model_free(l->model);
    ry_assign_free(l->assign);
    free(l->rank_place);
    free(l->expert_place);
    free(l->capacity);
    free(l->rows);
    free(l->share);
    free(l->weight);
    free(l->cost);
    free(l->to);
    free(l->left);
    free(l->next);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

/* ---- learning ---- */

/* rows[places]: what the sample sends where, all layers. */
static int add_rows(struct railyard_live *l, int n, const uint32_t *counts, const uint32_t *distinct)
{
    double *rows = l->rows;
    uint64_t layer[RY_HOME_NODES], most = (uint64_t)n * (uint64_t)l->topk;
    memset(rows, 0, (size_t)l->places * sizeof *rows);
    for (int i = 0; i < l->layers; i++) {
        const uint32_t *count = counts + (size_t)i * (size_t)l->experts;
        const uint32_t *given = l->distinct && distinct ? distinct + (size_t)i * (size_t)l->places : NULL;
        const int *place = l->expert_place + (size_t)i * (size_t)l->experts;
        uint64_t copies = 0;
        memset(layer, 0, (size_t)l->places * sizeof *layer);
        for (int e = 0; e < l->experts; e++) {
            layer[place[e]] += count[e];
            copies += count[e];
        }
        if (copies > most)
            return ry_fail(&ry_live_err, "live: layer %d: %llu copies of a sample of %d tokens that go to %d experts each", i,
                           (unsigned long long)copies, n, l->topk);
        for (int p = 0; p < l->places; p++) {
            if (given && given[p] > (uint32_t)n)
                return ry_fail(&ry_live_err, "live: layer %d: %u distinct tokens at place %d, of a sample of %d", i, given[p],
                               p, n);
            if (given)
                rows[p] += given[p];
            else
                rows[p] += (double)(l->distinct && layer[p] > (uint64_t)n ? (uint64_t)n : layer[p]);
        }
    }
    return 0;
}

static void average(struct railyard_live *l, int at)
{
    double rate = fmax(MEMORY, 1.0 / (double)++l->observed), sent = 0, kept = 0;
    for (int p = 0; p < l->places; p++) {
        sent += l->rows[p];
        kept += l->rows[p] * l->capacity[p] / l->slots;
    }
    l->sent += rate * (sent - l->sent);
    l->crossed += rate * (sent - l->rows[at] - l->crossed);
    l->even += rate * (sent - kept - l->even);
}

static int record_sample(struct railyard_live *l, const uint32_t *tokens, int n, const uint32_t *counts)
{
    if (n != l->tokens_per_sample || (l->most_samples && ry_routing_writer_samples(l->writer) >= l->most_samples)) {
        ry_routing_writer_left_out(l->writer);
        return 0;
    }
    if (ry_routing_writer_add(l->writer, tokens, counts, &ry_live_err) >= 0)
        return 0;
    ry_routing_writer_close(l->writer, NULL); /* what was written before is told of, if that much is possible */
    l->writer = NULL;
    return -1;
}

int railyard_live_observe(struct railyard_live *l, const uint32_t *tokens, int32_t n, const uint32_t *counts,
                          const uint32_t *distinct, int32_t at)
{
    if (!tokens || !counts || n < 1)
        return ry_fail(&ry_live_err, "live: a sample of %d tokens%s", n, counts ? "" : " without counts");
    if (at < 0 || at >= l->places)
        return ry_fail(&ry_live_err, "live: a sample at place %d of %d", at, l->places);
    pthread_mutex_lock(&l->lock);
    int rc = -1;
    if (!add_rows(l, n, counts, distinct) && !ry_home_model_observe(l->model, tokens, n, l->rows, &ry_live_err)) {
        average(l, at);
        rc = l->writer ? record_sample(l, tokens, n, counts) : 0;
    }
    pthread_mutex_unlock(&l->lock);
    return rc;
}

/* ---- dealing ---- */

static int check_list(const struct railyard_live *l, const uint32_t *tokens, const int64_t *first)
{
    if (!tokens || !first)
        return ry_fail(&ry_live_err, "live: a list without tokens");
    for (int i = 0; i < l->slots; i++)
        if (first[i] < 0 || first[i + 1] < first[i] || first[i + 1] - first[i] > INT32_MAX)
            return ry_fail(&ry_live_err, "live: sample %d has tokens [%lld, %lld)", i, (long long)first[i],
                           (long long)first[i + 1]);
    return 0;
}

static int place_of_slot(const struct railyard_live *l, int slot)
{
    return l->rank_place[slot / l->samples];
}

static void predict(struct railyard_live *l, const uint32_t *tokens, const int64_t *first)
{
    int64_t longest = 1;
    for (int i = 0; i < l->slots; i++)
        longest = first[i + 1] - first[i] > longest ? first[i + 1] - first[i] : longest;
    for (int i = 0; i < l->slots; i++) {
        float *share = l->share + (size_t)i * (size_t)l->places;
        int n = (int)(first[i + 1] - first[i]);
        l->weight[i] = (float)n / (float)longest;
        ry_home_model_predict(l->model, tokens + first[i], n, share);
        for (int p = 0; p < l->places; p++)
            share[p] = fminf(fmaxf(share[p], 0), 1);
    }
}

/* Share of what is sent that leaves, of samples at the places to[slots]; NULL: as dealt. */
static double leaves(const struct railyard_live *l, const int *to)
{
    double left = 0, all = 0;
    for (int i = 0; i < l->slots; i++) {
        int p = to ? to[i] : place_of_slot(l, i);
        left += (double)l->weight[i] * (1 - (double)l->share[(size_t)i * (size_t)l->places + (size_t)p]);
        all += (double)l->weight[i];
    }
    return all > 0 ? left / all : 0;
}

static void solve(struct railyard_live *l)
{
    for (int i = 0; i < l->slots; i++) {
        int32_t *cost = l->cost + (size_t)i * (size_t)l->places;
        const float *share = l->share + (size_t)i * (size_t)l->places;
        for (int p = 0; p < l->places; p++)
            cost[p] = 2 * (int32_t)lrintf(l->weight[i] * (1 - share[p]) * COST);
        cost[place_of_slot(l, i)]--; /* of equal solutions, one that moves less */
    }
    struct ry_assign_problem problem = {
        .nsamples = l->slots, .nplaces = l->places, .cost = l->cost, .capacity = l->capacity};
    ry_assign(l->assign, RY_SOLVE_EXACT, &problem, l->to);
}

static void as_dealt(const struct railyard_live *l, uint32_t *order)
{
    for (int i = 0; i < l->slots; i++)
        order[i] = (uint32_t)i;
}

/* order[] from to[]; returns how many move. */
static int arrange(struct railyard_live *l, uint32_t *order)
{
    int moved = 0, begin = 0;
    for (int p = 0; p < l->places; p++) { /* a place has as many samples leaving as coming: it is full both times */
        l->next[p] = begin;
        begin += l->capacity[p];
    }
    as_dealt(l, order);
    for (int i = 0; i < l->slots; i++) {
        int from = place_of_slot(l, i);
        if (l->to[i] != from)
            l->left[l->next[from]++] = (uint32_t)i;
    }
    begin = 0;
    for (int p = 0; p < l->places; p++) {
        l->next[p] = begin;
        begin += l->capacity[p];
    }
    for (int i = 0; i < l->slots; i++) {
        if (l->to[i] == place_of_slot(l, i))
            continue;
        order[l->left[l->next[l->to[i]]++]] = (uint32_t)i;
        moved++;
    }
    return moved;
}

static void deal(struct railyard_live *l, uint32_t *order, struct railyard_live_plan *plan)
{
    struct ry_home_trust trust;
    ry_home_model_trust(l->model, &trust);
    plan->moved = 0;
    plan->dealt = plan->placed = leaves(l, NULL);
    as_dealt(l, order);
    if (!trust.sure) {
        snprintf(plan->why, sizeof plan->why, "as dealt, %s", trust.why);
        return;
    }
    solve(l);
    double placed = leaves(l, l->to), gain = plan->dealt > 0 ? 1 - placed / plan->dealt : 0;
    if (gain < LEAST_GAIN) {
        snprintf(plan->why, sizeof plan->why, "as dealt: moving samples would keep %.1f %% of what leaves its place",
                 100 * fmax(gain, 0));
        return;
    }
    plan->placed = placed;
    plan->moved = arrange(l, order);
    snprintf(plan->why, sizeof plan->why,
             "%d of %d samples change ranks: %.1f %% of what is sent leaves its place rather than %.1f %%, it is "
             "predicted",
             plan->moved, l->slots, 100 * placed, 100 * plan->dealt);
}

int railyard_live_place(struct railyard_live *l, const uint32_t *tokens, const int64_t *first, uint32_t *order,
                        struct railyard_live_plan *plan)
{
    if (plan->size != sizeof *plan)
        return ry_fail(&ry_live_err, "live: a plan of %u bytes, but %zu are known: adapter and library are of two versions",
                       plan->size, sizeof *plan);
    if (check_list(l, tokens, first))
        return -1;
    pthread_mutex_lock(&l->lock);
    predict(l, tokens, first);
    deal(l, order, plan);
    pthread_mutex_unlock(&l->lock);
    return 0;
}

/* ---- state, files ---- */

int railyard_live_state(struct railyard_live *l, struct railyard_live_state *s)
{
    struct ry_home_trust trust;
    if (s->size != sizeof *s)
        return ry_fail(&ry_live_err, "live: a state of %u bytes, but %zu are known: adapter and library are of two versions",
                       s->size, sizeof *s);
    pthread_mutex_lock(&l->lock);
    ry_home_model_trust(l->model, &trust);
    s->sure = trust.sure;
    s->samples = trust.samples;
    s->crossed = l->sent > 0 ? l->crossed / l->sent : 0;
    s->even = l->sent > 0 ? l->even / l->sent : 0;
    s->captured = trust.captured;
    snprintf(s->why, sizeof s->why, "%s", trust.why);
    pthread_mutex_unlock(&l->lock);
    return 0;
}

int railyard_live_save(struct railyard_live *l, const char *path)
{
    pthread_mutex_lock(&l->lock);
    int rc = ry_home_model_save(l->model, path, &ry_live_err);
    pthread_mutex_unlock(&l->lock);
    return rc;
}

int railyard_live_load(struct railyard_live *l, const char *path)
{
    struct ry_home_model *model = ry_home_model_load(path, l->places, map_id(l), &ry_live_err);
    if (!model)
        return -1;
    pthread_mutex_lock(&l->lock);
    ry_home_model_free(l->model);
    l->model = model;
    pthread_mutex_unlock(&l->lock);
    return 0;
}

int railyard_live_record(struct railyard_live *l, const char *dir, int32_t tokens_per_sample, int64_t max_samples)
{
    struct ry_routing_shape shape = {l->layers, l->experts, l->topk, tokens_per_sample};
    if (max_samples < 0)
        return ry_fail(&ry_live_err, "live: at most %lld samples to record", (long long)max_samples);
    pthread_mutex_lock(&l->lock);
    int rc = ry_routing_writer_close(l->writer, &ry_live_err);
    l->writer = rc ? NULL : ry_routing_writer_open(dir, &shape, &ry_live_err);
    l->tokens_per_sample = tokens_per_sample;
    l->most_samples = max_samples;
    rc = l->writer ? 0 : -1;
    pthread_mutex_unlock(&l->lock);
    return rc;
}

int railyard_live_record_flush(struct railyard_live *l)
{
    pthread_mutex_lock(&l->lock);
    int rc =
        l->writer ? ry_routing_writer_flush(l->writer, &ry_live_err) : ry_fail(&ry_live_err, "live: nothing is being recorded");
    pthread_mutex_unlock(&l->lock);
    return rc;
}
