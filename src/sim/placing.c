/* placing.c: see placing.h. */
#include "sim/placing.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "place/coplace.h"
#include "place/home_model.h"
#include "place/homes.h"
#include "place/predict.h"

#define HISTORY 4
/* Learning which experts share a node grows with their product: seconds, and up to a minute or so at these limits. */
#define COPLACE_NODES 16
#define COPLACE_EXPERTS 512
#define COPLACE_QUICK 512 /* nodes · experts beyond which fewer starts must do */
#define COPLACE_STARTS 2
#define COPLACE_MOST 4096 /* nodes · experts */

static const struct {
    const char *name, *about;
} ways[RY_PLACINGS] = {
    {"in-order", "samples in order"},
    {"netmoe-gather", "NetMoE, gather only"},
    {"netmoe-predicted", "NetMoE, next layer predicted"},
    {"netmoe-known", "NetMoE, next layer known"},
    {"homes", "one home each, known"},
    {"coplaced", "experts co-placed, homes known"},
    {"coplaced-tokens", "experts co-placed, homes from tokens"},
};

const char *ry_placing_name(enum ry_placing p)
{
    return (unsigned)p < RY_PLACINGS ? ways[p].name : "?";
}

const char *ry_placing_about(enum ry_placing p)
{
    return (unsigned)p < RY_PLACINGS ? ways[p].about : "?";
}

int ry_placing_parse(const char *name, enum ry_placing *out, struct ry_err *err)
{
    char known[200] = "";
    for (int p = 0; p < RY_PLACINGS; p++) {
        if (!strcmp(name, ways[p].name))
            return *out = (enum ry_placing)p, 0;
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, "%s%s", p ? ", " : "", ways[p].name);
    }
    return ry_fail(err, "no placement '%s': there are %s", name, known);
}

struct ry_placer {
    const struct ry_cluster *cluster;
    const struct ry_workload *w;
    enum ry_counting counting;
    int *contiguous, *coplaced; /* [layers][experts] → rank */
    bool learned;               /* coplaced is valid */
    char coplace_note[400];
    struct ry_predictor *predictor; /* of recorded experts */
    struct ry_home_model *model;
    struct ry_homes *homes;
    int *capacity;      /* [ranks] */
    int *home;          /* [layers + 1][samples] */
    float *nodes;       /* [samples][nodes] */
    float *ranks;       /* [samples][ranks] */
    uint16_t *recorded; /* [layers][recorded experts]: one sample's counts */
    float *next;        /* [recorded experts] */
    uint32_t *tokens;   /* [tokens]: one sample's */
};

size_t ry_placer_memory(const struct ry_cluster *c, const struct ry_workload *w)
{
    size_t I = (size_t)w->samples, N = (size_t)c->nnodes, R = (size_t)c->nranks;
    return I * N * 4 * 4 + I * R * 4 + (size_t)(w->layers + 1) * I * 4 + 2 * (size_t)w->layers * (size_t)w->experts * 4;
}

struct ry_placer *ry_placer_new(const struct ry_cluster *c, const struct ry_workload *w, enum ry_counting counting,
                                struct ry_err *err)
{
    size_t I = (size_t)w->samples, N = (size_t)c->nnodes, R = (size_t)c->nranks, L = (size_t)w->layers,
           E = (size_t)w->experts, base = w->pool ? E / (size_t)w->split : 1;
    struct ry_placer *p = calloc(1, sizeof *p);
    if (!p)
        return ry_fail(err, "out of memory"), NULL;
    *p = (struct ry_placer){.cluster = c, .w = w, .counting = counting};
    p->contiguous = malloc(L * E * sizeof *p->contiguous);
    p->coplaced = malloc(L * E * sizeof *p->coplaced);
    p->capacity = malloc(R * sizeof *p->capacity);
    p->home = malloc((L + 1) * I * sizeof *p->home);
    p->nodes = malloc(I * N * sizeof *p->nodes);
    p->ranks = malloc(I * R * sizeof *p->ranks);
    p->recorded = malloc(L * base * sizeof *p->recorded);
    p->next = malloc(base * sizeof *p->next);
    p->tokens = malloc((size_t)w->tokens * sizeof *p->tokens);
    if (!p->contiguous || !p->coplaced || !p->capacity || !p->home || !p->nodes || !p->ranks || !p->recorded ||
        !p->next || !p->tokens) {
        ry_fail(err, "out of memory for placing %d samples on %d GPUs: it takes %.1f GB", w->samples, c->nranks,
                (double)ry_placer_memory(c, w) / 1e9);
    } else if (!ry_experts_contiguous(p->contiguous, w->layers, w->experts, c->nranks, err) &&
               (p->homes = ry_homes_new(c, w->samples, 1, 0, err))) {
        ry_capacity_even(p->capacity, c->nranks, w->samples);
        return p;
    }
    ry_placer_free(p);
    return NULL;
}

void ry_placer_free(struct ry_placer *p)
{
    if (!p)
        return;
    ry_homes_free(p->homes);
    ry_predictor_free(p->predictor);
    ry_home_model_free(p->model);
    free(p->contiguous);
    free(p->coplaced);
    free(p->capacity);
    free(p->home);
    free(p->nodes);
    free(p->ranks);
    free(p->recorded);
    free(p->next);
    free(p->tokens);
    free(p);
}

/* ---- learning ---- */

static int learn_predictor(struct ry_placer *p, struct ry_err *err)
{
    const struct ry_routing *r = p->w->source.routing;
    if (!r)
        return ry_fail(err, "made-up routing has nothing that leads from layer to layer but the sample's group"), 1;
    if (p->predictor)
        return 0;
    if (p->w->fit < 1)
        return ry_fail(err, "nothing to learn from"), 1;
    p->predictor = ry_predictor_new(r->layers, r->experts, HISTORY, err);
    if (!p->predictor)
        return -1;
    for (int i = 0; i < p->w->fit; i++)
        ry_predictor_observe(p->predictor, ry_counts_at(r, p->w->fit_first + i, 0));
    ry_predictor_fit(p->predictor);
    return 0;
}

/* Groups one after the other into equal blocks: what learning would find, were it given time. */
static void coplace_groups(struct ry_placer *p)
{
    const struct ry_workload *w = p->w;
    int E = w->experts, each = E / p->cluster->nranks, size = E / w->groups;
    for (int l = 0; l < w->layers; l++) {
        const int *group = w->group + (size_t)l * (size_t)E;
        int *rank = p->coplaced + (size_t)l * (size_t)E;
        for (int g = 0, slot = 0; g < w->groups; g++, slot = g * size)
            for (int e = 0; e < E; e++)
                if (group[e] == g)
                    rank[e] = slot++ / each;
    }
}

static int learn_coplaced(struct ry_placer *p, struct ry_err *err)
{
    const struct ry_workload *w = p->w;
    size_t cells = (size_t)w->layers * (size_t)w->experts;
    if (p->learned)
        return 0;
    if (p->cluster->nnodes > COPLACE_NODES || w->experts > COPLACE_EXPERTS ||
        p->cluster->nnodes * w->experts > COPLACE_MOST) {
        if (w->pool)
            return ry_fail(err,
                           "learning which of %d experts share a node, of %d nodes, takes too long: it is done up "
                           "to %d experts and %d nodes",
                           w->experts, p->cluster->nnodes, COPLACE_EXPERTS, COPLACE_NODES),
                   1;
        coplace_groups(p);
        p->learned = true;
        snprintf(p->coplace_note, sizeof p->coplace_note,
                 "co-placed by the groups that the routing was made of: learning them takes too long at this size");
        return 0;
    }
    if (w->fit < 1)
        return ry_fail(err, "nothing to learn from"), 1;
    struct ry_routing *fit = ry_workload_fit(w, err);
    if (!fit)
        return -1;
    bool distinct = p->counting == RY_DISTINCT && fit->choice_samples;
    struct ry_coplace_options o = {.counting = distinct ? RY_DISTINCT : RY_COPIES,
                                   .batch = w->samples,
                                   .starts = p->cluster->nnodes * w->experts > COPLACE_QUICK ? COPLACE_STARTS : 0,
                                   .seed = w->source.seed};
    struct ry_coplace *map = ry_coplace_learn(p->cluster, fit, NULL, w->fit, NULL, &o, err);
    ry_routing_close(fit);
    if (!map)
        return -1;
    memcpy(p->coplaced, map->expert_rank, cells * sizeof *p->coplaced);
    snprintf(p->coplace_note, sizeof p->coplace_note, "%.320s", map->why);
    ry_coplace_free(map);
    p->learned = true;
    return 0;
}

/* Rows of a sample to each node, from its recorded counts: experts that it stands for get equal parts. */
static int learn_homes(struct ry_placer *p, struct ry_err *err)
{
    const struct ry_workload *w = p->w;
    const struct ry_routing *r = w->source.routing;
    int N = p->cluster->nnodes;
    if (!r || !ry_has_tokens(r))
        return ry_fail(err, "the routing has no token ids"), 1;
    if (N > RY_HOME_NODES)
        return ry_fail(err, "homes are told from tokens for up to %d nodes", RY_HOME_NODES), 1;
    if (p->model)
        return 0;
    struct ry_home_options o = {.seed = w->source.seed};
    if (!(p->model = ry_home_model_new(N, &o, err)))
        return -1;
    for (int i = 0; i < w->fit; i++) {
        double rows[RY_HOME_NODES] = {0};
        for (int l = 0; l < w->layers; l++) {
            const uint16_t *counts = ry_counts_at(r, w->fit_first + i, l);
            const int *rank = p->coplaced + (size_t)l * (size_t)w->experts;
            for (int e = 0; e < w->experts; e++)
                rows[p->cluster->node[rank[e]]] += (double)counts[e / w->split] / w->split;
        }
        if (ry_home_model_observe(p->model, ry_tokens_at(r, w->fit_first + i, p->tokens), w->tokens, rows, err))
            return -1;
    }
    return 0;
}

int ry_placer_learn(struct ry_placer *p, enum ry_placing placing, char note[400], struct ry_err *err)
{
    int failed = 0;
    *note = 0;
    if (placing == RY_PLACE_NETMOE_PREDICTED)
        return learn_predictor(p, err);
    if (placing == RY_PLACE_COPLACED || placing == RY_PLACE_COPLACED_TOKENS) {
        failed = learn_coplaced(p, err);
        snprintf(note, 400, "%s", p->coplace_note);
    }
    return failed || placing != RY_PLACE_COPLACED_TOKENS ? failed : learn_homes(p, err);
}

/* ---- a step ---- */

/* Rows that a layer's exchange takes from each sample to each node and rank, added up. */
static void want_known(struct ry_placer *p, const int *expert_rank, int layer)
{
    const struct ry_workload *w = p->w;
    const struct ry_cluster *c = p->cluster;
    const int *rank = expert_rank + (size_t)layer * (size_t)w->experts;
    bool distinct = p->counting == RY_DISTINCT;
    for (int i = 0; i < w->samples; i++) {
        const uint16_t *expert = ry_workload_at(w, layer, i);
        float *nodes = p->nodes + (size_t)i * (size_t)c->nnodes, *ranks = p->ranks + (size_t)i * (size_t)c->nranks;
        for (int t = 0; t < w->tokens; t++, expert += w->topk) {
            int at[RY_ROUTING_TOPK];
            for (int k = 0; k < w->topk; k++) {
                bool new_node = true, new_rank = true;
                at[k] = -1;
                if (expert[k] == RY_NO_EXPERT)
                    continue;
                at[k] = rank[expert[k]];
                for (int j = 0; distinct && j < k; j++) {
                    new_rank &= at[j] != at[k];
                    new_node &= at[j] < 0 || c->node[at[j]] != c->node[at[k]];
                }
                nodes[c->node[at[k]]] += new_node;
                ranks[at[k]] += new_rank;
            }
        }
    }
}

static void want_predicted(struct ry_placer *p, const int *expert_rank, int layer)
{
    const struct ry_workload *w = p->w;
    const struct ry_cluster *c = p->cluster;
    int base = w->experts / w->split;
    const int *rank = expert_rank + (size_t)(layer + 1) * (size_t)w->experts;
    for (int i = 0; i < w->samples; i++) {
        float *nodes = p->nodes + (size_t)i * (size_t)c->nnodes, *ranks = p->ranks + (size_t)i * (size_t)c->nranks;
        memset(p->recorded, 0, (size_t)w->layers * (size_t)base * sizeof *p->recorded);
        for (int l = 0; l <= layer; l++) {
            const uint16_t *expert = ry_workload_at(w, l, i);
            for (int k = 0; k < w->tokens * w->topk; k++)
                if (expert[k] != RY_NO_EXPERT)
                    p->recorded[l * base + expert[k] / w->split]++;
        }
        ry_predictor_next(p->predictor, layer, p->recorded, p->next);
        for (int e = 0; e < w->experts; e++) {
            float part = p->next[e / w->split] / (float)w->split;
            if (part <= 0)
                continue;
            nodes[c->node[rank[e]]] += part;
            ranks[rank[e]] += part;
        }
    }
}

static void want_from_tokens(struct ry_placer *p)
{
    const struct ry_workload *w = p->w;
    const struct ry_cluster *c = p->cluster;
    const struct ry_routing *r = w->source.routing;
    double copies = (double)w->layers * w->tokens * w->topk;
    for (int i = 0; i < w->samples; i++) {
        float share[RY_HOME_NODES];
        ry_home_model_predict(p->model, ry_tokens_at(r, (int)w->recorded[i], p->tokens), w->tokens, share);
        for (int n = 0; n < c->nnodes; n++)
            p->nodes[(size_t)i * (size_t)c->nnodes + (size_t)n] = share[n] > 0 ? (float)(share[n] * copies) : 0;
    }
}

static void forget_wants(struct ry_placer *p)
{
    size_t I = (size_t)p->w->samples;
    memset(p->nodes, 0, I * (size_t)p->cluster->nnodes * sizeof *p->nodes);
    memset(p->ranks, 0, I * (size_t)p->cluster->nranks * sizeof *p->ranks);
}

static void solve(struct ry_placer *p, const int *from, int *to)
{
    static const struct ry_homes_options exact = {.solver = RY_SOLVE_EXACT, .max_moved = -1};
    ry_homes_solve(p->homes, &exact, p->w->samples, p->capacity, 1, p->nodes, p->ranks, from, to);
}

void ry_placer_step(struct ry_placer *p, enum ry_placing placing, struct ry_placed *out)
{
    const struct ry_workload *w = p->w;
    size_t I = (size_t)w->samples;
    bool coplaced = placing == RY_PLACE_COPLACED || placing == RY_PLACE_COPLACED_TOKENS;
    *out = (struct ry_placed){.home = p->home, .expert_rank = coplaced ? p->coplaced : p->contiguous};
    ry_home_in_order(p->home, p->capacity, p->cluster->nranks, w->samples);
    switch (placing) {
    case RY_PLACE_NETMOE_GATHER:
    case RY_PLACE_NETMOE_PREDICTED:
    case RY_PLACE_NETMOE_KNOWN:
        out->stride = I;
        for (int l = 0; l < w->layers; l++) {
            int *from = p->home + (size_t)l * I, *to = from + I;
            forget_wants(p);
            want_known(p, out->expert_rank, l);
            if (l + 1 < w->layers && placing == RY_PLACE_NETMOE_KNOWN)
                want_known(p, out->expert_rank, l + 1);
            if (l + 1 < w->layers && placing == RY_PLACE_NETMOE_PREDICTED)
                want_predicted(p, out->expert_rank, l);
            solve(p, from, to);
            for (size_t i = 0; i < I; i++)
                out->moved += from[i] != to[i];
        }
        return;
    case RY_PLACE_HOMES:
    case RY_PLACE_COPLACED:
    case RY_PLACE_COPLACED_TOKENS:
        forget_wants(p);
        if (placing == RY_PLACE_COPLACED_TOKENS)
            want_from_tokens(p);
        for (int l = 0; l < w->layers && placing != RY_PLACE_COPLACED_TOKENS; l++)
            want_known(p, out->expert_rank, l);
        solve(p, p->home, p->home);
        return;
    case RY_PLACE_IN_ORDER:
    case RY_PLACINGS:
        return;
    }
}
