/* routing.c: see routing.h. */
#include "place/routing.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "place/random.h"

enum { COUNTS, CHOICES, TOKENS, DOMAIN };
#define PATH_SIZE 4096

struct meta {
    const char *dir;
    char path[PATH_SIZE]; /* of meta.json */
    json_t *json;
    struct ry_err *err;
};

static int read_int(const struct meta *m, const char *key, int least, int most, bool required, int *out)
{
    json_t *v = json_object_get(m->json, key);
    if (!v && !required)
        return 0;
    if (!v)
        return ry_fail(m->err, "%s: '%s' is missing", m->path, key);
    if (!json_is_integer(v) || json_integer_value(v) < least || json_integer_value(v) > most)
        return ry_fail(m->err, "%s: '%s' must be a whole number from %d to %d", m->path, key, least, most);
    *out = (int)json_integer_value(v);
    return 0;
}

static double float_at(const struct ry_npy *a, size_t i)
{
    return a->type == RY_NPY_F32 ? (double)((const float *)a->data)[i] : ((const double *)a->data)[i];
}

/* Element i as [2][0][31], for messages. */
static const char *index_text(const struct ry_npy *a, size_t i, char out[128])
{
    size_t stride = a->count;
    int n = 0;
    out[0] = 0;
    for (int d = 0; d < a->ndim; d++) {
        stride /= a->shape[d];
        n += snprintf(out + n, 128 - (size_t)n, "[%zu]", i / stride);
        i %= stride;
    }
    return out;
}

/* All elements as whole numbers up to `most`, of `bytes` (1, 2, 4) each: in place if they are so already. */
static const void *elements(struct ry_npy *a, const char *path, const char *key, uint64_t most, size_t bytes,
                            void **owned, struct ry_err *err)
{
    char at[128];
    bool in_place = a->type == (bytes == 1 ? RY_NPY_U8 : bytes == 2 ? RY_NPY_U16 : RY_NPY_U32);
    uint64_t limit = bytes == 1 ? UINT8_MAX : bytes == 2 ? UINT16_MAX : UINT32_MAX;
    if (!in_place) {
        *owned = malloc(a->count * bytes + 1);
        if (!*owned) {
            ry_fail(err, "%s: out of memory for %zu elements", path, a->count);
            return NULL;
        }
    } else if (most >= limit) {
        return a->data;
    }
    if (most > limit)
        most = limit;
    for (size_t i = 0; i < a->count; i++) {
        uint64_t v;
        if (a->type == RY_NPY_F32 || a->type == RY_NPY_F64) {
            double f = float_at(a, i);
            if (!(f >= 0 && f <= (double)most && f == floor(f))) {
                ry_fail(err, "%s: %s%s is %g, not a whole number from 0 to %llu", path, key, index_text(a, i, at), f,
                        (unsigned long long)most);
                return NULL;
            }
            v = (uint64_t)f;
        } else {
            bool negative = (a->type == RY_NPY_I32 && ((const int32_t *)a->data)[i] < 0) ||
                            (a->type == RY_NPY_I64 && ((const int64_t *)a->data)[i] < 0);
            v = ry_npy_get(a, i);
            if (negative || v > most) {
                ry_fail(err, "%s: %s%s is %s%llu, not a whole number from 0 to %llu", path, key, index_text(a, i, at),
                        negative ? "negative, " : "", (unsigned long long)v, (unsigned long long)most);
                return NULL;
            }
        }
        if (in_place)
            continue;
        if (bytes == 1)
            ((uint8_t *)*owned)[i] = (uint8_t)v;
        else if (bytes == 2)
            ((uint16_t *)*owned)[i] = (uint16_t)v;
        else
            ((uint32_t *)*owned)[i] = (uint32_t)v;
    }
    return in_place ? a->data : *owned;
}

/* Map the array that `key` names; 1 if the key is absent. */
static int open_array(const struct meta *m, const char *key, int ndim, const size_t *shape, char path[PATH_SIZE],
                      struct ry_npy *out)
{
    json_t *v = json_object_get(m->json, key);
    if (!v)
        return 1;
    const char *text = json_string_value(v);
    size_t n = text ? strcspn(text, " \t") : 0;
    if (!n || memchr(text, '/', n))
        return ry_fail(m->err, "%s: '%s' must begin with the name of a .npy file in the same folder", m->path, key);
    if (snprintf(path, PATH_SIZE, "%s/%.*s", m->dir, (int)n, text) >= PATH_SIZE)
        return ry_fail(m->err, "%s: '%s' is too long", m->path, key);
    if (ry_npy_open(out, path, m->err))
        return -1;
    bool same = out->ndim == ndim;
    if (same && json_is_true(json_object_get(m->json, "growing")) && out->shape[0] > shape[0]) {
        out->count = out->count / out->shape[0] * shape[0];
        out->shape[0] = shape[0];
    }
    for (int d = 0; d < ndim && same; d++)
        same = out->shape[d] == shape[d];
    if (same)
        return 0;
    char want[128] = "", have[128] = "";
    for (int d = 0, w = 0; d < ndim; d++)
        w += snprintf(want + w, sizeof want - (size_t)w, "%s%zu", d ? ", " : "", shape[d]);
    for (int d = 0, w = 0; d < out->ndim; d++)
        w += snprintf(have + w, sizeof have - (size_t)w, "%s%zu", d ? ", " : "", out->shape[d]);
    return ry_fail(m->err, "%s: has shape (%s), but by meta.json '%s' must have (%s)", path, have, key, want);
}

static int read_domains(struct ry_routing *r, const struct meta *m)
{
    json_t *list = json_object_get(m->json, "domains"), *v;
    size_t i;
    if (!list)
        return 0;
    if (!json_is_array(list) || json_array_size(list) > 256)
        return ry_fail(m->err, "%s: 'domains' must be a list of up to 256 names", m->path);
    r->domains = calloc(json_array_size(list) + 1, sizeof *r->domains);
    if (!r->domains)
        return ry_fail(m->err, "%s: out of memory", m->path);
    json_array_foreach(list, i, v)
    {
        if (!json_is_string(v))
            return ry_fail(m->err, "%s: 'domains'[%zu] is no text", m->path, i);
        r->domains[i] = strdup(json_string_value(v));
        if (!r->domains[i])
            return ry_fail(m->err, "%s: out of memory", m->path);
        r->ndomains++;
    }
    return 0;
}

/* No sample can have sent more copies than it has, and choices must add up to counts. */
static int check_sums(const struct ry_routing *r, const char *counts_path, struct ry_err *err)
{
    uint64_t most = (uint64_t)r->tokens_per_sample * (uint64_t)r->topk;
    uint32_t *tally = malloc((size_t)r->experts * sizeof *tally);
    if (!tally)
        return ry_fail(err, "%s: out of memory", counts_path);
    for (int s = 0; s < r->samples; s++) {
        for (int l = 0; l < r->layers; l++) {
            const uint16_t *c = ry_counts_at(r, s, l);
            uint64_t sum = 0;
            for (int e = 0; e < r->experts; e++)
                sum += c[e];
            if (sum > most) {
                free(tally);
                return ry_fail(err,
                               "%s: counts[%d][%d] adds up to %llu, but a sample of %d tokens with topk %d has %llu "
                               "copies at most",
                               counts_path, s, l, (unsigned long long)sum, r->tokens_per_sample, r->topk,
                               (unsigned long long)most);
            }
            if (s >= r->choice_samples)
                continue;
            memset(tally, 0, (size_t)r->experts * sizeof *tally);
            for (int t = 0; t < r->tokens_per_sample; t++)
                for (int k = 0; k < r->topk; k++)
                    tally[ry_choice(r, s, l, t, k)]++;
            for (int e = 0; e < r->experts; e++) {
                if (tally[e] >= c[e]) /* more choices than counts: the rest was dropped by a capacity */
                    continue;
                uint32_t n = tally[e];
                free(tally);
                return ry_fail(err, "%s: counts[%d][%d][%d] is %d, but only %u choices are for that expert",
                               counts_path, s, l, e, c[e], n);
            }
        }
    }
    free(tally);
    return 0;
}

static int read_arrays(struct ry_routing *r, const struct meta *m)
{
    char path[PATH_SIZE], counts_path[PATH_SIZE];
    size_t S = (size_t)r->samples, L = (size_t)r->layers, E = (size_t)r->experts, T = (size_t)r->tokens_per_sample,
           K = (size_t)r->topk;
    int got = open_array(m, "counts", 3, (size_t[]){S, L, E}, counts_path, &r->maps[COUNTS]);
    if (got == 1)
        return ry_fail(m->err, "%s: 'counts' is missing", m->path);
    if (got ||
        !(r->counts = elements(&r->maps[COUNTS], counts_path, "counts", UINT16_MAX, 2, &r->owned[COUNTS], m->err)))
        return -1;
    if (json_object_get(m->json, "choices") && !json_object_get(m->json, "choice_samples"))
        r->choice_samples = r->samples;
    got = open_array(m, "choices", 4, (size_t[]){(size_t)r->choice_samples, L, T, K}, path, &r->maps[CHOICES]);
    if (got < 0)
        return -1;
    if (got == 1) {
        r->choice_samples = 0;
    } else {
        bool wide = r->maps[CHOICES].type != RY_NPY_U8;
        const void *e = elements(&r->maps[CHOICES], path, "choices", E - 1, wide ? 2 : 1, &r->owned[CHOICES], m->err);
        if (!e)
            return -1;
        if (wide)
            r->choices16 = e;
        else
            r->choices8 = e;
    }
    got = open_array(m, "tokens", 2, (size_t[]){S, T}, path, &r->maps[TOKENS]);
    if (got < 0)
        return -1;
    if (!got) {
        bool narrow = r->maps[TOKENS].type == RY_NPY_U8 || r->maps[TOKENS].type == RY_NPY_U16;
        const void *t =
            elements(&r->maps[TOKENS], path, "tokens", r->vocabulary ? (uint64_t)r->vocabulary - 1 : UINT32_MAX,
                     narrow ? 2 : 4, &r->owned[TOKENS], m->err);
        if (!t)
            return -1;
        if (narrow)
            r->tokens16 = t;
        else
            r->tokens32 = t;
    }
    got = open_array(m, "domain", 1, (size_t[]){S}, path, &r->maps[DOMAIN]);
    if (got < 0)
        return -1;
    if (!got &&
        !(r->domain = elements(&r->maps[DOMAIN], path, "domain", r->ndomains ? (uint64_t)r->ndomains - 1 : UINT8_MAX, 1,
                               &r->owned[DOMAIN], m->err)))
        return -1;
    return check_sums(r, counts_path, m->err);
}

static int read_meta(struct ry_routing *r, const struct meta *m)
{
    if (!json_is_object(m->json))
        return ry_fail(m->err, "%s: is no JSON object", m->path);
    if (read_int(m, "samples", 1, RY_ROUTING_SAMPLES, true, &r->samples) || read_int(m, "layers", 1, RY_ROUTING_LAYERS, true, &r->layers) ||
        read_int(m, "experts", 1, RY_ROUTING_EXPERTS, true, &r->experts) ||
        read_int(m, "topk", 1, RY_ROUTING_TOPK < r->experts ? RY_ROUTING_TOPK : r->experts, true, &r->topk) ||
        read_int(m, "tokens_per_sample", 1, RY_ROUTING_TOKENS, true, &r->tokens_per_sample) ||
        read_int(m, "choice_samples", 0, r->samples, false, &r->choice_samples) ||
        read_int(m, "vocabulary", 1, 1 << 30, false, &r->vocabulary))
        return -1;
    return read_domains(r, m);
}

struct ry_routing *ry_routing_open(const char *dir, struct ry_err *err)
{
    struct meta m = {.dir = dir, .err = err};
    struct ry_routing *r = calloc(1, sizeof *r);
    json_error_t bad;
    if (!r || snprintf(m.path, sizeof m.path, "%s/meta.json", dir) >= (int)sizeof m.path) {
        ry_fail(err, "%s: %s", dir, r ? "the path is too long" : "out of memory");
        free(r);
        return NULL;
    }
    errno = 0;
    m.json = json_load_file(m.path, JSON_REJECT_DUPLICATES, &bad);
    int failed = 0;
    if (!m.json && json_error_code(&bad) == json_error_cannot_open_file)
        failed = ry_fail(err, "%s: cannot be opened: %s. A routing folder holds meta.json and .npy files", m.path,
                         strerror(errno));
    else if (!m.json)
        failed = ry_fail(err, "%s: line %d: %s", m.path, bad.line, bad.text);
    if (failed || read_meta(r, &m) || read_arrays(r, &m)) {
        ry_routing_close(r);
        r = NULL;
    }
    json_decref(m.json);
    return r;
}

void ry_routing_close(struct ry_routing *r)
{
    if (!r)
        return;
    for (int i = 0; i < 4; i++) {
        ry_npy_close(&r->maps[i]);
        free(r->owned[i]);
    }
    for (int i = 0; i < r->ndomains; i++)
        free(r->domains[i]);
    free(r->domains);
    free(r);
}

struct ry_routing *ry_routing_new(int samples, int layers, int experts, int topk, int tokens_per_sample,
                                  int choice_samples, struct ry_err *err)
{
    struct ry_routing *r = calloc(1, sizeof *r);
    if (!r)
        goto no_memory;
    *r = (struct ry_routing){.samples = samples,
                             .layers = layers,
                             .experts = experts,
                             .topk = topk,
                             .tokens_per_sample = tokens_per_sample,
                             .choice_samples = choice_samples};
    if (!(r->owned[COUNTS] = calloc((size_t)samples * (size_t)layers, (size_t)experts * sizeof *r->counts)))
        goto no_memory;
    r->counts = r->owned[COUNTS];
    size_t choices = (size_t)choice_samples * (size_t)layers * (size_t)tokens_per_sample * (size_t)topk;
    if (!choices)
        return r;
    if (!(r->owned[CHOICES] = calloc(choices, experts > 256 ? 2 : 1)))
        goto no_memory;
    if (experts > 256)
        r->choices16 = r->owned[CHOICES];
    else
        r->choices8 = r->owned[CHOICES];
    return r;
no_memory:
    ry_routing_close(r);
    ry_fail(err, "out of memory for the routing of %d samples", samples);
    return NULL;
}

int ry_routing_save(const struct ry_routing *r, const char *dir, struct ry_err *err)
{
    char path[PATH_SIZE];
    size_t S = (size_t)r->samples, L = (size_t)r->layers, T = (size_t)r->tokens_per_sample;
    json_t *meta = json_pack("{si si si si si ss}", "samples", r->samples, "layers", r->layers, "experts", r->experts,
                             "topk", r->topk, "tokens_per_sample", r->tokens_per_sample, "counts",
                             "counts.npy uint16 [sample][layer][expert]: tokens of the sample routed to the expert");
    int failed = meta ? 0 : ry_fail(err, "%s: out of memory", dir);
#define SAVE(name, type, ndim, data, ...)                                                                              \
    if (!failed && (data)) {                                                                                           \
        snprintf(path, sizeof path, "%s/" name, dir);                                                                  \
        failed = ry_npy_save(AT_FDCWD, path, type, ndim, (size_t[]){__VA_ARGS__}, data, err);                          \
    }
    SAVE("counts.npy", RY_NPY_U16, 3, r->counts, S, L, (size_t)r->experts)
    SAVE("choices.npy", RY_NPY_U8, 4, r->choices8, (size_t)r->choice_samples, L, T, (size_t)r->topk)
    SAVE("choices.npy", RY_NPY_U16, 4, r->choices16, (size_t)r->choice_samples, L, T, (size_t)r->topk)
    SAVE("tokens.npy", RY_NPY_U16, 2, r->tokens16, S, T)
    SAVE("tokens.npy", RY_NPY_U32, 2, r->tokens32, S, T)
    SAVE("domain.npy", RY_NPY_U8, 1, r->domain, S)
#undef SAVE
    if (failed) {
        json_decref(meta);
        return -1;
    }
    if (r->vocabulary)
        json_object_set_new(meta, "vocabulary", json_integer(r->vocabulary));
    if (r->choice_samples) {
        json_object_set_new(meta, "choice_samples", json_integer(r->choice_samples));
        json_object_set_new(meta, "choices", json_string("choices.npy [sample][layer][token][k]: experts chosen"));
    }
    if (ry_has_tokens(r))
        json_object_set_new(meta, "tokens", json_string("tokens.npy [sample][token]: token ids"));
    if (r->domain)
        json_object_set_new(meta, "domain", json_string("domain.npy uint8 [sample]: index into domains"));
    if (r->ndomains) {
        json_t *list = json_array();
        for (int i = 0; i < r->ndomains; i++)
            json_array_append_new(list, json_string(r->domains[i]));
        json_object_set_new(meta, "domains", list);
    }
    /* Last, so that an interrupted save leaves no folder that looks whole. */
    snprintf(path, sizeof path, "%s/meta.json", dir);
    if (json_dump_file(meta, path, JSON_INDENT(1)))
        failed = ry_fail(err, "%s: cannot be written: %s", path, strerror(errno));
    json_decref(meta);
    return failed;
}

/* The tokens of the first choice_samples samples change places as wholes, all their layers with them. */
static void shuffle_tokens(struct ry_routing *to, const struct ry_routing *from, uint64_t *rng, uint32_t *order)
{
    size_t n = (size_t)from->choice_samples * (size_t)from->tokens_per_sample, T = (size_t)from->tokens_per_sample;
    size_t each = from->choices8 ? 1 : 2, K = (size_t)from->topk * each, L = (size_t)from->layers;
    const char *src = from->choices8 ? (const char *)from->choices8 : (const char *)from->choices16;
    char *dst = to->owned[CHOICES];
    for (size_t i = 0; i < n; i++)
        order[i] = (uint32_t)i;
    ry_shuffle(order, n, rng);
    for (size_t i = 0; i < n; i++)
        for (size_t l = 0; l < L; l++)
            memcpy(dst + ((i / T * L + l) * T + i % T) * K, src + ((order[i] / T * L + l) * T + order[i] % T) * K, K);
    uint16_t *counts = to->owned[COUNTS];
    for (int s = 0; s < to->choice_samples; s++)
        for (int l = 0; l < to->layers; l++)
            for (int t = 0; t < to->tokens_per_sample; t++)
                for (int k = 0; k < to->topk; k++)
                    counts[((size_t)s * L + (size_t)l) * (size_t)to->experts + (size_t)ry_choice(to, s, l, t, k)]++;
}

/* One layer's copies of samples `first` and up, dealt out anew; each sample keeps its number of copies. */
static void shuffle_copies(struct ry_routing *to, const struct ry_routing *from, int first, int layer, uint64_t *rng,
                           uint32_t *copies)
{
    size_t n = 0;
    for (int s = first; s < from->samples; s++)
        for (int e = 0; e < from->experts; e++)
            for (int c = ry_counts_at(from, s, layer)[e]; c; c--)
                copies[n++] = (uint32_t)e;
    ry_shuffle(copies, n, rng);
    for (int s = first; s < from->samples; s++) {
        uint16_t *out = (uint16_t *)to->owned[COUNTS] + (ry_counts_at(to, s, layer) - to->counts);
        for (int e = 0; e < from->experts; e++)
            for (int c = ry_counts_at(from, s, layer)[e]; c; c--)
                out[copies[--n]]++;
    }
}

struct ry_routing *ry_routing_shuffled(const struct ry_routing *from, uint64_t seed, struct ry_err *err)
{
    struct ry_routing *to = ry_routing_new(from->samples, from->layers, from->experts, from->topk,
                                           from->tokens_per_sample, from->choice_samples, err);
    size_t most = (size_t)from->samples * (size_t)from->tokens_per_sample * (size_t)from->topk;
    uint32_t *work = to ? malloc(most * sizeof *work) : NULL;
    if (!work) {
        ry_routing_close(to);
        ry_fail(err, "out of memory for shuffling %d samples", from->samples);
        return NULL;
    }
    if (to->choice_samples)
        shuffle_tokens(to, from, &seed, work);
    for (int l = 0; l < from->layers && to->choice_samples < to->samples; l++)
        shuffle_copies(to, from, to->choice_samples, l, &seed, work);
    free(work);
    return to;
}
