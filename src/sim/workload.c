/* workload.c: see workload.h. */
#include "sim/workload.h"

#include <stdlib.h>
#include <string.h>

#include "place/random.h"

#define LEAST_WITH_CHOICES 64 /* so few are drawn over and over, where more would be without choices */

/* Each use of the seed has a stream of its own. */
static uint64_t stream(const struct ry_workload *w, uint64_t use, uint64_t k)
{
    uint64_t state = w->source.seed * UINT64_C(0x9e3779b97f4a7c15) + use;
    return ry_random(&state) + k * UINT64_C(0xd1342543de82ef95);
}
enum { USE_GROUPS = 1, USE_ORDER, USE_TOKENS, USE_FIT };

static int check(const struct ry_source *s, struct ry_err *err)
{
    if (s->samples < 1)
        return ry_fail(err, "a step of %d samples: there must be one at least", s->samples);
    if (s->experts < 1 || s->experts > RY_MOST_EXPERTS)
        return ry_fail(err, "%d experts cannot be simulated: up to %d can", s->experts, RY_MOST_EXPERTS);
    if (s->fit < 0)
        return ry_fail(err, "%d samples to learn from: that is less than none", s->fit);
    if (s->routing && s->experts % s->routing->experts)
        return ry_fail(err, "%d experts were recorded: they can stand for a multiple of that, not for %d",
                       s->routing->experts, s->experts);
    if (s->routing)
        return 0;
    if (s->layers < 1 || s->tokens < 1 || s->topk < 1 || s->topk > RY_ROUTING_TOPK || s->tokens > UINT16_MAX)
        return ry_fail(err,
                       "made-up routing of %d layers, %d tokens a sample, top-%d: each must be 1 at least, tokens "
                       "at most %d, top at most %d",
                       s->layers, s->tokens, s->topk, UINT16_MAX, RY_ROUTING_TOPK);
    if (!(s->locality >= 0 && s->locality <= 1))
        return ry_fail(err, "a locality of %g: it goes from 0 (none) to 1 (every token stays in its sample's group)",
                       s->locality);
    if (s->groups < 0 || (s->groups > 0 && s->experts % s->groups))
        return ry_fail(err, "%d groups do not divide %d experts", s->groups, s->experts);
    return 0;
}

static void make_groups(struct ry_workload *w)
{
    uint64_t rng = stream(w, USE_GROUPS, 0);
    size_t E = (size_t)w->experts;
    for (int l = 0; l < w->layers; l++) {
        int *g = w->group + (size_t)l * E;
        for (size_t e = 0; e < E; e++)
            g[e] = (int)(e / (E / (size_t)w->groups));
        ry_shuffle((uint32_t *)g, E, &rng);
    }
}

int ry_workload_init(struct ry_workload *w, const struct ry_source *s, struct ry_err *err)
{
    *w = (struct ry_workload){.source = *s, .experts = s->experts, .samples = s->samples, .split = 1};
    if (check(s, err))
        return -1;
    const struct ry_routing *r = s->routing;
    if (r) {
        w->layers = r->layers;
        w->topk = r->topk;
        w->tokens = r->tokens_per_sample;
        w->split = s->experts / r->experts;
        w->pairs = r->choice_samples >= LEAST_WITH_CHOICES && r->choice_samples < r->samples;
        w->fit_first = w->pairs ? r->choice_samples : 0;
        w->fit = s->fit;
        int left = r->samples - w->fit_first - s->fit;
        if (left < (w->pairs ? 0 : 1))
            return ry_fail(err,
                           "%d samples are recorded, %d of them drawn from: %d to learn from are too many, at most %d "
                           "can be",
                           r->samples, w->pairs ? r->choice_samples : 1, s->fit,
                           r->samples - (w->pairs ? r->choice_samples : 1));
        w->pool = w->pairs ? r->choice_samples : left;
    } else {
        w->layers = s->layers;
        w->topk = s->topk;
        w->tokens = s->tokens;
        w->pairs = true;
        w->fit = s->fit;
        w->groups = s->groups ? s->groups : s->experts % 8 ? 1 : s->experts / 8;
        if (w->experts / w->groups < w->topk)
            return ry_fail(err, "groups of %d experts are too small for top-%d: make fewer", w->experts / w->groups,
                           w->topk);
        w->group = malloc((size_t)w->layers * (size_t)w->experts * sizeof *w->group);
    }
    size_t n = (size_t)w->samples, order = (size_t)(w->pool > w->groups ? w->pool : w->groups);
    w->choice = malloc((size_t)w->layers * n * (size_t)w->tokens * (size_t)w->topk * sizeof *w->choice);
    w->recorded = malloc(n * sizeof *w->recorded);
    w->order = malloc(order * sizeof *w->order);
    if (!w->choice || !w->recorded || !w->order || (!r && !w->group)) {
        ry_workload_free(w);
        return ry_fail(err, "out of memory for %d samples of %d tokens in %d layers", w->samples, w->tokens, w->layers);
    }
    if (!r)
        make_groups(w);
    return 0;
}

void ry_workload_free(struct ry_workload *w)
{
    free(w->choice);
    free(w->recorded);
    free(w->order);
    free(w->group);
    *w = (struct ry_workload){0};
}

/* Recorded samples, or groups: each of [first, first + n) once before any comes again. */
static void deal(int *out, int samples, uint32_t *order, int n, int first, uint64_t *rng)
{
    for (int i = 0; i < samples; i++) {
        if (i % n == 0) {
            for (int k = 0; k < n; k++)
                order[k] = (uint32_t)k;
            ry_shuffle(order, (size_t)n, rng);
        }
        out[i] = first + (int)order[i % n];
    }
}

/* One recorded sample's copies in a layer: [tokens][topk]. */
static void recorded_copies(const struct ry_workload *w, int sample, int layer, uint64_t *rng, uint16_t *out)
{
    const struct ry_routing *r = w->source.routing;
    int copies = w->tokens * w->topk, n = 0;
    if (sample < r->choice_samples) {
        for (int t = 0; t < w->tokens; t++)
            for (int k = 0; k < w->topk; k++)
                out[n++] = (uint16_t)ry_choice(r, sample, layer, t, k);
    } else {
        /* No expert gets more copies than there are tokens: dealt out one by one, none comes twice to a token. */
        const uint16_t *counts = ry_counts_at(r, sample, layer);
        for (int i = 0; i < copies; i++)
            out[i] = RY_NO_EXPERT;
        for (int e = 0; e < r->experts; e++)
            for (int c = 0; c < counts[e]; c++, n++)
                out[n % w->tokens * w->topk + n / w->tokens] = (uint16_t)e;
    }
    for (int i = 0; w->split > 1 && i < copies; i++)
        if (out[i] != RY_NO_EXPERT)
            out[i] = (uint16_t)(out[i] * w->split + (int)ry_random_below(rng, (uint64_t)w->split));
}

static void made_up_copies(const struct ry_workload *w, const uint16_t *members, int group, uint64_t *rng,
                           uint16_t *out)
{
    size_t size = (size_t)(w->experts / w->groups);
    const uint16_t *mine = members + (size_t)group * size;
    uint64_t within = (uint64_t)(w->source.locality * 4294967296.0);
    for (int t = 0; t < w->tokens; t++, out += w->topk)
        for (int k = 0; k < w->topk; k++) {
            int twin = 0;
            do {
                bool in = ry_random(rng) >> 32 < within;
                out[k] = in ? mine[ry_random_below(rng, size)] : (uint16_t)ry_random_below(rng, (uint64_t)w->experts);
                for (twin = 0; out[twin] != out[k]; twin++)
                    ;
            } while (twin < k);
        }
}

/* The experts of each group, in a layer. */
static void list_members(const struct ry_workload *w, int layer, uint16_t *members, int *next)
{
    const int *g = w->group + (size_t)layer * (size_t)w->experts;
    int size = w->experts / w->groups;
    for (int i = 0; i < w->groups; i++)
        next[i] = i * size;
    for (int e = 0; e < w->experts; e++)
        members[next[g[e]]++] = (uint16_t)e;
}

/* All copies of samples that `of` names; `members` (NULL: recorded) is scratch for the groups. Every sample and layer
 * has chances of its own, whatever else is drawn. */
static void copies_of(const struct ry_workload *w, const int *of, int n, uint64_t use, int k, uint16_t *members,
                      int *next, uint16_t *out)
{
    size_t row = (size_t)w->tokens * (size_t)w->topk;
    for (int l = 0; l < w->layers; l++) {
        if (members)
            list_members(w, l, members, next);
        for (int i = 0; i < n; i++, out += row) {
            uint64_t rng =
                stream(w, use, ((uint64_t)k * (uint64_t)w->layers + (uint64_t)l) * (uint64_t)n + (uint64_t)i);
            if (members)
                made_up_copies(w, members, of[i], &rng, out);
            else
                recorded_copies(w, of[i], l, &rng, out);
        }
    }
}

static uint16_t *scratch_of(const struct ry_workload *w, int **next)
{
    /* One block for both, so that drawing has one thing to fail at. */
    char *at = malloc((size_t)w->groups * sizeof(int) + (size_t)w->experts * sizeof(uint16_t) + 1);
    *next = (int *)at;
    return at ? (uint16_t *)(at + (size_t)w->groups * sizeof(int)) : NULL;
}

int ry_workload_draw(struct ry_workload *w, int k, struct ry_err *err)
{
    uint64_t rng = stream(w, USE_ORDER, (uint64_t)k);
    int first = w->pool && !w->pairs ? w->fit : 0, *next;
    uint16_t *members = scratch_of(w, &next);
    if (!members)
        return ry_fail(err, "out of memory for drawing a step");
    deal(w->recorded, w->samples, w->order, w->pool ? w->pool : w->groups, first, &rng);
    copies_of(w, w->recorded, w->samples, USE_TOKENS, k, w->pool ? NULL : members, next, w->choice);
    free(next);
    return 0;
}

struct ry_routing *ry_workload_fit(const struct ry_workload *w, struct ry_err *err)
{
    int n = w->fit, *next, *of = malloc(((size_t)n + 1) * sizeof *of);
    size_t row = (size_t)w->tokens * (size_t)w->topk, L = (size_t)w->layers, E = (size_t)w->experts;
    uint16_t *all = malloc(L * ((size_t)n + 1) * row * sizeof *all), *members = scratch_of(w, &next);
    uint32_t *order = malloc(((size_t)w->groups + 1) * sizeof *order);
    struct ry_routing *r = NULL;
    if (!of || !all || !members || !order) {
        ry_fail(err, "out of memory for %d samples to learn from", n);
        goto out;
    }
    r = ry_routing_new(n, w->layers, w->experts, w->topk, w->tokens, w->pairs && !w->pool ? n : 0, err);
    if (!r)
        goto out;
    uint64_t rng = stream(w, USE_FIT, 0);
    if (w->pool)
        for (int i = 0; i < n; i++)
            of[i] = w->fit_first + i;
    else
        deal(of, n, order, w->groups, 0, &rng);
    copies_of(w, of, n, USE_FIT, 1, w->pool ? NULL : members, next, all);
    uint16_t *counts = (uint16_t *)r->counts;
    memset(counts, 0, (size_t)n * L * E * sizeof *counts);
    for (size_t l = 0; l < L; l++)
        for (size_t i = 0; i < (size_t)n; i++) {
            const uint16_t *from = all + (l * (size_t)n + i) * row;
            for (size_t c = 0; c < row; c++)
                if (from[c] != RY_NO_EXPERT)
                    counts[(i * L + l) * E + from[c]]++;
            for (size_t c = 0; r->choice_samples && c < row; c++) {
                if (r->choices8)
                    ((uint8_t *)r->choices8)[(i * L + l) * row + c] = (uint8_t)from[c];
                else
                    ((uint16_t *)r->choices16)[(i * L + l) * row + c] = from[c];
            }
        }
out:
    free(of);
    free(all);
    free(next);
    free(order);
    return r;
}
