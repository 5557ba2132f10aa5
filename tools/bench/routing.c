/* routing.c: see routing.h. */
#include "routing.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "base/npy.h"
#include "random.h"

#define MAX_EXPERTS 65535
#define MAX_TOP_K 64
/* After so many draws that hit an expert already chosen, the rest of the weights is walked instead. */
#define PATIENCE 8

enum how { UNIFORM, ZIPF, TRACE };

struct ry_routing {
    struct ry_routing_config config;
    enum how how;
    uint64_t *weight; /* ZIPF: [layers][experts] */
    uint64_t *total;  /* ZIPF: [layers] */
    uint64_t *upto;   /* ZIPF: [layers][experts], weight summed up to and including the expert */
    /* TRACE */
    size_t samples, choice_samples, sample_tokens;
    struct ry_npy counts, choices;
};

static bool is_chosen(const uint16_t *choice, int n, size_t expert)
{
    for (int j = 0; j < n; j++)
        if (choice[j] == expert)
            return true;
    return false;
}

/* One expert by weight among those not chosen yet; every weight walked. Their sum must not be 0. */
static uint16_t walk(struct ry_random *random, const uint64_t *weight, int experts, const uint16_t *choice, int n)
{
    uint64_t left = 0;
    for (int e = 0; e < experts; e++)
        left += is_chosen(choice, n, (size_t)e) ? 0 : weight[e];
    uint64_t v = ry_random_below(random, left);
    for (int e = 0;; e++) {
        uint64_t w = is_chosen(choice, n, (size_t)e) ? 0 : weight[e];
        if (v < w)
            return (uint16_t)e;
        v -= w;
    }
}

static uint16_t search(uint64_t v, const uint64_t *upto, int experts)
{
    int low = 0, high = experts - 1;
    while (low < high) {
        int mid = (low + high) / 2;
        if (v < upto[mid])
            high = mid;
        else
            low = mid + 1;
    }
    return (uint16_t)low;
}

static void choose_zipf(const struct ry_routing *r, struct ry_random *random, int layer, uint16_t *choice)
{
    int experts = r->config.experts;
    const uint64_t *upto = r->upto + (size_t)layer * (size_t)experts;
    for (int j = 0; j < r->config.top_k; j++) {
        int tries = 0;
        do
            choice[j] = search(ry_random_below(random, r->total[layer]), upto, experts);
        while (is_chosen(choice, j, choice[j]) && ++tries < PATIENCE);
        if (tries == PATIENCE)
            choice[j] = walk(random, r->weight + (size_t)layer * (size_t)experts, experts, choice, j);
    }
}

static void choose_uniform(const struct ry_routing *r, struct ry_random *random, uint16_t *choice)
{
    for (int j = 0; j < r->config.top_k; j++) {
        /* the v-th of those not chosen: pass over the chosen ones at or below it, smallest first */
        uint64_t v = ry_random_below(random, (uint64_t)(r->config.experts - j));
        uint16_t sorted[MAX_TOP_K];
        memcpy(sorted, choice, (size_t)j * sizeof *sorted);
        for (int a = 1; a < j; a++)
            for (int b = a; b > 0 && sorted[b] < sorted[b - 1]; b--) {
                uint16_t t = sorted[b];
                sorted[b] = sorted[b - 1];
                sorted[b - 1] = t;
            }
        for (int a = 0; a < j && sorted[a] <= v; a++)
            v++;
        choice[j] = (uint16_t)v;
    }
}

/* Draw by the counts of the token's sample. Experts without any count are taken only when all others are chosen. */
static void choose_by_counts(const struct ry_routing *r, struct ry_random *random, size_t row, uint64_t *weight,
                             uint16_t *choice)
{
    int experts = r->config.experts;
    uint64_t left = 0;
    for (int e = 0; e < experts; e++)
        left += weight[e] = ry_npy_get(&r->counts, row * (size_t)experts + (size_t)e);
    for (int j = 0; j < r->config.top_k; j++) {
        if (!left)
            for (int e = 0; e < experts; e++)
                left += weight[e] = !is_chosen(choice, j, (size_t)e);
        choice[j] = walk(random, weight, experts, choice, j);
        left -= weight[choice[j]];
    }
}

static void choose_traced(const struct ry_routing *r, uint64_t key, uint64_t iteration, int layer, int rank, int token,
                          uint64_t *weight, uint16_t *choice)
{
    const struct ry_routing_config *c = &r->config;
    size_t layers = r->counts.shape[1];
    uint64_t place = (iteration * (uint64_t)c->ranks + (uint64_t)rank) * (uint64_t)c->tokens + (uint64_t)token;
    size_t sample = place / r->sample_tokens % r->samples, at = place % r->sample_tokens;
    size_t row = sample * layers + (size_t)layer;
    if (sample < r->choice_samples) {
        for (int j = 0; j < c->top_k; j++)
            choice[j] = (uint16_t)ry_npy_get(&r->choices, (row * r->sample_tokens + at) * (size_t)c->top_k + (size_t)j);
        return;
    }
    struct ry_random random = {.key = ry_random_at(key, (uint64_t)token)};
    choose_by_counts(r, &random, row, weight, choice);
}

void ry_routing_choose(const struct ry_routing *r, uint64_t iteration, int layer, int rank, uint16_t *choice)
{
    uint64_t key = ry_key(r->config.seed, 'r', iteration, (uint64_t)layer, (uint64_t)rank);
    uint64_t *weight = NULL;
    if (r->how == TRACE && !(weight = calloc((size_t)r->config.experts, sizeof *weight)))
        abort(); /* a few kilobytes */
    for (int t = 0; t < r->config.tokens; t++, choice += r->config.top_k) {
        struct ry_random random = {.key = ry_random_at(key, (uint64_t)t)};
        if (r->how == UNIFORM)
            choose_uniform(r, &random, choice);
        else if (r->how == ZIPF)
            choose_zipf(r, &random, layer, choice);
        else
            choose_traced(r, key, iteration, layer, rank, t, weight, choice);
    }
    free(weight);
}

static int open_zipf(struct ry_routing *r, double s, struct ry_err *err)
{
    size_t experts = (size_t)r->config.experts, layers = (size_t)r->config.layers;
    r->weight = calloc(layers * experts, sizeof *r->weight);
    r->upto = calloc(layers * experts, sizeof *r->upto);
    r->total = calloc(layers, sizeof *r->total);
    if (!r->weight || !r->upto || !r->total)
        return ry_fail(err, "out of memory for the weights of %zu experts in %zu layers", experts, layers);
    for (size_t l = 0; l < layers; l++) {
        uint64_t *w = r->weight + l * experts;
        /* Whole numbers: ranks with different math libraries must not disagree about the last bit. */
        for (size_t i = 0; i < experts; i++) {
            double x = pow((double)(i + 1), -s) * 0x1p32;
            w[i] = x < 1 ? 1 : (uint64_t)llround(x);
        }
        struct ry_random random = {.key = ry_key(r->config.seed, 'z', l)};
        for (size_t i = experts - 1; i > 0; i--) {
            size_t k = ry_random_below(&random, i + 1);
            uint64_t t = w[i];
            w[i] = w[k];
            w[k] = t;
        }
        for (size_t i = 0; i < experts; i++)
            r->upto[l * experts + i] = r->total[l] += w[i];
    }
    return 0;
}

/* A number that a trace's meta.json must have. */
static int meta_number(const json_t *meta, const char *file, const char *name, int *out, struct ry_err *err)
{
    json_t *v = json_object_get(meta, name);
    if (!json_is_integer(v) || json_integer_value(v) < 1 || json_integer_value(v) > 1 << 30)
        return ry_fail(err, "%s: no usable \"%s\" (a whole number above 0)", file, name);
    *out = (int)json_integer_value(v);
    return 0;
}

static int check_shape(const struct ry_npy *a, const char *file, int ndim, const size_t *shape, struct ry_err *err)
{
    bool good = a->ndim == ndim && a->type <= RY_NPY_I64;
    for (int d = 1; good && d < ndim; d++)
        good = a->shape[d] == shape[d];
    if (good && a->shape[0] > 0)
        return 0;
    char want[128] = "", got[128] = "";
    for (int d = 0, n = 0; d < ndim; d++)
        n +=
            d ? snprintf(want + n, sizeof want - (size_t)n, ", %zu", shape[d]) : snprintf(want, sizeof want, "samples");
    for (int d = 0, n = 0; d < a->ndim; d++)
        n += snprintf(got + n, sizeof got - (size_t)n, "%s%zu", d ? ", " : "", a->shape[d]);
    return ry_fail(err, "%s: holds %s (%s), but meta.json calls for whole numbers (%s)", file,
                   ry_npy_type_name(a->type), got, want);
}

static int agree(int *option, int trace, const char *name, const char *dir, struct ry_err *err)
{
    if (*option && *option != trace)
        return ry_fail(err, "--%s=%d contradicts %s, which has %d: leave the option out", name, *option, dir, trace);
    *option = trace;
    return 0;
}

static int open_trace(struct ry_routing *r, const char *dir, struct ry_err *err)
{
    struct ry_routing_config *c = &r->config;
    char path[4096];
    int layers, experts, top_k, sample_tokens;
    json_error_t why;
    snprintf(path, sizeof path, "%s/meta.json", dir);
    FILE *f = fopen(path, "r");
    if (!f)
        return ry_fail(err, "cannot read %s: %s: is %s a folder of recorded routing?", path, strerror(errno), dir);
    json_t *meta = json_loadf(f, 0, &why);
    fclose(f);
    if (!meta)
        return ry_fail(err, "%s, line %d: %s", path, why.line, why.text);
    int rc = meta_number(meta, path, "layers", &layers, err) || meta_number(meta, path, "experts", &experts, err) ||
             meta_number(meta, path, "topk", &top_k, err) ||
             meta_number(meta, path, "tokens_per_sample", &sample_tokens, err);
    json_decref(meta);
    if (rc)
        return -1;
    if (experts > MAX_EXPERTS || top_k > experts || top_k > MAX_TOP_K)
        return ry_fail(err, "%s: top-%d of %d experts cannot be", path, top_k, experts);
    if (agree(&c->experts, experts, "experts", dir, err) || agree(&c->top_k, top_k, "top-k", dir, err))
        return -1;
    if (c->layers > layers)
        return ry_fail(err, "--layers=%d, but %s has only %d", c->layers, dir, layers);
    if (!c->layers)
        c->layers = layers;
    r->sample_tokens = (size_t)sample_tokens;

    const size_t counts_shape[] = {0, (size_t)layers, (size_t)experts};
    snprintf(path, sizeof path, "%s/counts.npy", dir);
    if (ry_npy_open(&r->counts, path, err) || check_shape(&r->counts, path, 3, counts_shape, err))
        return -1;
    r->samples = r->counts.shape[0];

    const size_t choices_shape[] = {0, (size_t)layers, (size_t)sample_tokens, (size_t)top_k};
    snprintf(path, sizeof path, "%s/choices.npy", dir);
    if (ry_npy_open(&r->choices, path, err) || check_shape(&r->choices, path, 4, choices_shape, err))
        return -1;
    r->choice_samples = r->choices.shape[0];
    /* Rows are addressed by expert, and a token goes to each of its experts once: do not trust the file with that. */
    for (size_t row = 0; row < r->choices.count; row += (size_t)top_k)
        for (size_t j = 0; j < (size_t)top_k; j++) {
            uint64_t e = ry_npy_get(&r->choices, row + j);
            bool twice = false;
            for (size_t i = 0; i < j; i++)
                twice |= ry_npy_get(&r->choices, row + i) == e;
            if (e >= (uint64_t)experts || twice)
                return ry_fail(err, "%s: element %zu is expert %llu: %s", path, row + j, (unsigned long long)e,
                               twice ? "chosen twice by one token" : "there are fewer");
        }
    return 0;
}

struct ry_routing *ry_routing_open(struct ry_routing_config *config, struct ry_err *err)
{
    struct ry_routing *r = calloc(1, sizeof *r);
    if (!r) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    r->config = *config;
    struct ry_routing_config *c = &r->config;
    double s = 0;
    char *end;
    if (!strcmp(c->how, "uniform")) {
        r->how = UNIFORM;
    } else if (!strncmp(c->how, "zipf:", 5)) {
        r->how = ZIPF;
        s = strtod(c->how + 5, &end);
        if (end == c->how + 5 || *end || !isfinite(s) || s < 0) {
            ry_fail(err, "--routing=%s: zipf needs an exponent of 0 or more, as in zipf:1.2", c->how);
            goto fail;
        }
    } else if (!strncmp(c->how, "trace:", 6) && c->how[6]) {
        r->how = TRACE;
        if (open_trace(r, c->how + 6, err))
            goto fail;
    } else {
        ry_fail(err, "--routing=%s is not known: uniform, zipf:S (S is the exponent) or trace:DIR", c->how);
        goto fail;
    }
    if (!c->experts)
        c->experts = 4 * c->ranks;
    if (!c->top_k)
        c->top_k = 2;
    if (!c->layers)
        c->layers = 2;
    if (c->experts > MAX_EXPERTS || c->experts % c->ranks) {
        ry_fail(err,
                "%d experts cannot be shared evenly by %d ranks: choose --experts as a multiple of the ranks, up to %d",
                c->experts, c->ranks, MAX_EXPERTS);
        goto fail;
    }
    if (c->top_k > c->experts || c->top_k > MAX_TOP_K) {
        ry_fail(err, "--top-k=%d, but there are %d experts, and %d is the most", c->top_k, c->experts, MAX_TOP_K);
        goto fail;
    }
    if (r->how == ZIPF && open_zipf(r, s, err))
        goto fail;
    *config = *c;
    return r;
fail:
    ry_routing_close(r);
    return NULL;
}

void ry_routing_close(struct ry_routing *r)
{
    if (!r)
        return;
    ry_npy_close(&r->counts);
    ry_npy_close(&r->choices);
    free(r->weight);
    free(r->upto);
    free(r->total);
    free(r);
}
