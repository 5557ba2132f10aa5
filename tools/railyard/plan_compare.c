/* plan_compare.c: `railyard plan --compare`: every way of placing, side by side, on samples that none was learned from.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "place/coplace.h"
#include "place/expert_load.h"
#include "place/expert_map.h"
#include "place/home_model.h"
#include "plan.h"

#define MAX_ROWS 24

struct row {
    const char *key, *name; /* NULL: not asked for */
    double value[PLAN_SIZES];
};

struct table {
    struct row rows[MAX_ROWS];
    int nrows, nsizes, at; /* `at`: the size that is being filled in */
};

static void put(struct table *t, const char *key, const char *name, double value)
{
    int i = 0;
    while (i < t->nrows && strcmp(t->rows[i].key, key))
        i++;
    if (i == t->nrows) {
        t->rows[t->nrows++] = (struct row){.key = key, .name = name};
        for (int k = 0; k < PLAN_SIZES; k++)
            t->rows[i].value[k] = NAN;
    }
    t->rows[i].value[t->at] = value;
}

/* One size of cluster, and what is reused in it. */
struct scene {
    const struct ry_study *study;
    const struct ry_routing *routing;
    struct ry_cluster *cluster;
    int *blocks; /* contiguous experts → rank */
    int *node;   /* room for an expert → node map */
    int *share;  /* [nodes] of a batch */
};

static const int *nodes_of(struct scene *s, const int *expert_rank)
{
    for (int j = 0; j < s->routing->layers * s->routing->experts; j++)
        s->node[j] = s->cluster->node[expert_rank[j]];
    return s->node;
}

static double total(const double *v, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += v[i];
    return sum;
}

/* A model of homes under expert_rank, learned from samples [0, fit) less [skip, end). */
static struct ry_home_model *model_of(struct scene *s, const int *expert_rank, int fit, int skip, int end,
                                      struct ry_err *err)
{
    const struct ry_routing *r = s->routing;
    const int *node = nodes_of(s, expert_rank), nodes = s->cluster->nnodes;
    struct ry_home_options o = {
        .seed = s->study->seed, .window = fit, .map = ry_home_map_id(node, r->layers, r->experts)};
    struct ry_home_model *m = ry_home_model_new(nodes, &o, err);
    uint32_t *affinity = malloc((size_t)r->layers * (size_t)nodes * sizeof *affinity);
    uint32_t *tokens = malloc((size_t)r->tokens_per_sample * sizeof *tokens);
    bool failed = !m || !affinity || !tokens;
    if (m && failed)
        ry_fail(err, "out of memory for samples of %d tokens", r->tokens_per_sample);
    for (int i = 0; i < fit && !failed; i++) {
        double rows[RY_HOME_NODES] = {0};
        if (i >= skip && i < end)
            continue;
        ry_affinity_by(r, i, node, nodes, RY_COPIES, affinity);
        for (int j = 0; j < r->layers * nodes; j++)
            rows[j % nodes] += affinity[j];
        failed = ry_home_model_observe(m, ry_tokens_at(r, i, tokens), r->tokens_per_sample, rows, err);
    }
    free(affinity);
    free(tokens);
    if (failed || !isfinite(ry_home_model_settle(m, 200, 1e-6))) {
        if (!failed)
            ry_fail(err, "out of memory for homes from tokens");
        ry_home_model_free(m);
        return NULL;
    }
    return m;
}

static int write_homes(struct scene *s, const int *expert_rank, const char *path, struct ry_err *err)
{
    if (!path)
        return 0;
    if (!ry_has_tokens(s->routing))
        return ry_fail(err, "%s: not written: the recording has no tokens to tell homes from", path);
    struct ry_home_model *m = model_of(s, expert_rank, s->routing->samples, 0, 0, err);
    int failed = !m || ry_home_model_save(m, path, err);
    ry_home_model_free(m);
    return failed ? -1 : 0;
}

/* What crosses in batches of which[n], summed: homes in order; known; or as the model tells from tokens. */
static int cross(struct scene *s, const int *which, int n, const int *expert_rank, enum ry_counting counting,
                 enum ry_homes_by homes, const struct ry_home_model *model, double *sum, struct ry_err *err)
{
    const struct ry_routing *r = s->routing;
    size_t nodes = (size_t)s->cluster->nnodes;
    struct ry_batches b = {r, which, n, (int)nodes, s->share, nodes_of(s, expert_rank), counting};
    double *crossing = malloc((size_t)n * sizeof *crossing);
    int32_t *guess = calloc((size_t)n * nodes, sizeof *guess);
    uint32_t *tokens = malloc((size_t)r->tokens_per_sample * sizeof *tokens);
    int done = -1;
    for (int i = 0; guess && tokens && homes == RY_HOMES_GUESSED && i < n; i++) {
        float shares[RY_HOME_NODES];
        ry_home_model_predict(model, ry_tokens_at(r, which[i], tokens), r->tokens_per_sample, shares);
        for (size_t k = 0; k < nodes; k++)
            guess[(size_t)i * nodes + k] = (int32_t)lrintf(shares[k] * 1e6f);
    }
    free(tokens);
    if (!crossing || !guess || !tokens)
        ry_fail(err, "out of memory for %d samples", n);
    else if ((done = ry_study_cross(&b, homes, guess, crossing, err)) >= 0)
        *sum = total(crossing, done);
    free(crossing);
    free(guess);
    return done < 0 ? -1 : 0;
}

/* The busiest node of any layer over the mean, all samples of which[n] together. */
static int busiest_node(struct scene *s, const int *which, int n, const int *expert_rank, double *out)
{
    const struct ry_routing *r = s->routing;
    size_t slots = (size_t)r->layers * (size_t)r->experts, nodes = (size_t)s->cluster->nnodes;
    int64_t *weight = calloc(slots + nodes, sizeof *weight);
    double *layers = malloc((size_t)r->layers * sizeof *layers);
    if (!weight || !layers) {
        free(weight);
        free(layers);
        return -1;
    }
    for (int i = 0; i < n; i++)
        for (size_t j = 0; j < slots; j++)
            weight[j] += ry_counts_at(r, which[i], 0)[j];
    *out = ry_expert_busiest(weight, nodes_of(s, expert_rank), r->layers, r->experts, (int)nodes, s->cluster->node_size,
                             layers, weight + slots);
    free(weight);
    free(layers);
    return 0;
}

static int netmoe(struct scene *s, struct table *t, struct ry_err *err)
{
    static const struct {
        const char *key, *name;
        enum ry_scatter scatter;
    } ways[] = {{"netmoe_gather", "NetMoE, gather only", RY_SCATTER_OFF},
                {"netmoe_predicted", "NetMoE, next layer predicted", RY_SCATTER_PREDICTED},
                {"netmoe_known", "NetMoE, next layer known", RY_SCATTER_GIVEN}};
    struct ry_study study = *s->study;
    study.cluster = s->cluster;
    study.expert_rank = s->blocks;
    struct ry_predictor *p = ry_study_predictor(&study, 4, err);
    struct ry_study_result still, placed;
    struct ry_netmoe_options o = {.predictor = p, .homes = {.solver = RY_SOLVE_EXACT, .max_moved = -1}};
    int failed = !p || ry_study_netmoe(&study, &o, RY_WHEN_NEVER, &still, err);
    for (size_t i = 0; i < sizeof ways / sizeof *ways && !failed; i++) {
        o.scatter = ways[i].scatter;
        failed = ry_study_netmoe(&study, &o, RY_WHEN_EACH_LAYER, &placed, err);
        if (!failed)
            put(t, ways[i].key, ways[i].name, (double)placed.traffic.cross / (double)still.traffic.cross);
    }
    ry_predictor_free(p);
    return failed ? -1 : 0;
}

struct kind {
    enum ry_load_bound from;
    const char *keys[6], *names[6];
};
static const struct kind kinds[] = {
    {RY_BOUND_NONE,
     {"coplaced_known", "coplaced_tokens", "coplaced_node_load", "coplaced_seconds", "distinct_tokens",
      "distinct_node_load"},
     {"co-placed experts, homes known", "co-placed experts, homes from tokens", "  busiest node / mean",
      "  learning the map, seconds", "distinct: dedup, co-placed, homes from tokens", "  busiest node / mean"}},
    {RY_BOUND_CONTIGUOUS,
     {"bounded_known", "bounded_tokens", "bounded_node_load", "bounded_seconds", "distinct_bounded_tokens",
      "distinct_bounded_node_load"},
     {"the same, loads held, homes known", "the same, loads held, homes from tokens", "  busiest node / mean",
      "  learning the map, seconds", "distinct: the same, loads held", "  busiest node / mean"}},
};

/* Copies: learn from the first samples, judge by batches of the rest. */
static int copies(struct scene *s, struct table *t, json_t *why, const struct plan_files *files,
                  struct ry_err *err)
{
    const struct ry_study *y = s->study;
    const struct ry_routing *r = s->routing;
    int n = y->batches * y->batch, rc = -1, *which = malloc((size_t)n * sizeof *which);
    double base, sum, load;
    struct ry_coplace *p = NULL;
    struct ry_home_model *m = NULL;
    ry_share_out(s->share, s->cluster->node_size, s->cluster->nnodes, y->batch);
    for (int k = 0; which && k < y->batches; k++)
        ry_study_batch(y, k, which + k * y->batch);
    if (!which || cross(s, which, n, s->blocks, RY_COPIES, RY_HOMES_IN_ORDER, NULL, &base, err))
        goto out;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const struct kind *k = &kinds[i];
        struct ry_coplace_options o = {.load_from = k->from, .batch = y->batch, .seed = y->seed};
        clock_t start = clock();
        if (!(p = ry_coplace_learn(s->cluster, r, NULL, y->fit, NULL, &o, err)))
            goto out;
        double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        if (cross(s, which, n, p->expert_rank, RY_COPIES, RY_HOMES_KNOWN, NULL, &sum, err))
            goto out;
        put(t, k->keys[0], k->names[0], sum / base);
        if (ry_has_tokens(r)) {
            if (!(m = model_of(s, p->expert_rank, y->fit, 0, 0, err)) ||
                cross(s, which, n, p->expert_rank, RY_COPIES, RY_HOMES_GUESSED, m, &sum, err))
                goto out;
            put(t, k->keys[1], k->names[1], sum / base);
        }
        if (busiest_node(s, which, n, p->expert_rank, &load))
            goto out;
        put(t, k->keys[2], k->names[2], load);
        put(t, k->keys[3], k->names[3], seconds);
        if (k->from == RY_BOUND_CONTIGUOUS) {
            if (busiest_node(s, which, n, s->blocks, &load))
                goto out;
            put(t, "contiguous_node_load", "  busiest node / mean of contiguous experts", load);
            put(t, "fit", "on the samples learned from, homes balanced", p->fit);
            put(t, "least", "  nothing goes below (relaxation)", p->least);
            struct ry_home_trust trust = {0};
            if (m)
                ry_home_model_trust(m, &trust);
            json_array_append_new(why,
                                  json_pack("{si ss sb sb sb ss sf sf}", "nodes", s->cluster->nnodes, "experts", p->why,
                                            "move_experts", p->move_experts, "move_samples", p->move_samples,
                                            "loads_held", p->bound_held, "homes", m ? trust.why : "no tokens",
                                            "explained", trust.explained, "captured", trust.captured));
            if ((files->map &&
                 ry_expert_map_save(files->map, p->expert_rank, r->layers, r->experts, s->cluster->nranks, err)) ||
                write_homes(s, p->expert_rank, files->homes, err) || write_homes(s, s->blocks, files->unmoved, err))
                goto out;
        }
        ry_coplace_free(p);
        ry_home_model_free(m);
        p = NULL;
        m = NULL;
    }
    rc = 0;
out:
    free(which);
    ry_coplace_free(p);
    ry_home_model_free(m);
    return rc;
}

/* Distinct pairs need token-level choices, which few samples have: each half of them is judged by a map learned from
   the other half, in batches of half a half; homes are told by a model of all samples to learn from but those judged.
 */
static int distinct(struct scene *s, struct table *t, struct ry_err *err)
{
    const struct ry_routing *r = s->routing;
    int half = r->choice_samples / 2, batch = half / 2, n = 8 * batch, rc = -1;
    int *which = malloc((size_t)n * sizeof *which), *learn = malloc((size_t)(half + 1) * sizeof *learn);
    double base[2], alone[2], sum[2][2], load[2][2];
    struct ry_coplace *p = NULL;
    struct ry_home_model *m = NULL;
    if (!which || !learn) {
        ry_fail(err, "out of memory for %d samples", n);
        goto out;
    }
    ry_share_out(s->share, s->cluster->node_size, s->cluster->nnodes, batch);
    for (int f = 0; f < 2; f++) {
        struct ry_study y = *s->study;
        y.fit = f * half;
        y.end = y.fit + half;
        y.batch = batch;
        for (int k = 0; k < 8; k++)
            ry_study_batch(&y, k, which + k * batch);
        for (int i = 0; i < half; i++)
            learn[i] = (1 - f) * half + i;
        if (cross(s, which, n, s->blocks, RY_COPIES, RY_HOMES_IN_ORDER, NULL, &base[f], err) ||
            cross(s, which, n, s->blocks, RY_DISTINCT, RY_HOMES_IN_ORDER, NULL, &alone[f], err))
            goto out;
        for (int i = 0; i < 2; i++) {
            struct ry_coplace_options o = {
                .counting = RY_DISTINCT, .load_from = kinds[i].from, .batch = batch, .seed = y.seed};
            if (!(p = ry_coplace_learn(s->cluster, r, learn, half, NULL, &o, err)) ||
                !(m = model_of(s, p->expert_rank, s->study->fit, y.fit, y.end, err)) ||
                cross(s, which, n, p->expert_rank, RY_DISTINCT, RY_HOMES_GUESSED, m, &sum[i][f], err) ||
                busiest_node(s, which, n, p->expert_rank, &load[i][f]))
                goto out;
            ry_coplace_free(p);
            ry_home_model_free(m);
            p = NULL;
            m = NULL;
        }
    }
    put(t, "distinct_alone", "distinct: dedup alone, samples in order", (alone[0] + alone[1]) / (base[0] + base[1]));
    for (int i = 0; i < 2; i++) {
        put(t, kinds[i].keys[4], kinds[i].names[4], (sum[i][0] + sum[i][1]) / (base[0] + base[1]));
        put(t, kinds[i].keys[5], kinds[i].names[5], fmax(load[i][0], load[i][1]));
    }
    rc = 0;
out:
    free(which);
    free(learn);
    ry_coplace_free(p);
    ry_home_model_free(m);
    return rc;
}

/* The same trace with its tokens dealt out anew: what would the planner do? */
static int shuffled(struct scene *s, const struct ry_routing *anew, json_t *list, struct ry_err *err)
{
    struct ry_coplace_options o = {.batch = s->study->batch, .seed = s->study->seed, .starts = 1};
    struct ry_coplace *p = ry_coplace_learn(s->cluster, anew, NULL, s->study->fit, NULL, &o, err);
    if (p)
        json_array_append_new(list, json_pack("{si ss sb sb}", "nodes", s->cluster->nnodes, "experts", p->why,
                                              "move_experts", p->move_experts, "move_samples", p->move_samples));
    int rc = p ? 0 : -1;
    ry_coplace_free(p);
    return rc;
}

static int one_size(const struct ry_study *study, const struct ry_routing *anew, int nodes, int ranks,
                    const struct plan_files *files, struct table *t, json_t *why, json_t *shuffle, struct ry_err *err)
{
    const struct ry_routing *r = study->routing;
    size_t slots = (size_t)r->layers * (size_t)r->experts;
    struct scene s = {.study = study, .routing = r, .cluster = ry_place_cluster(nodes, ranks, 0, 0, err)};
    s.blocks = malloc(slots * sizeof *s.blocks);
    s.node = malloc(slots * sizeof *s.node);
    s.share = malloc((size_t)nodes * sizeof *s.share);
    int rc = -1;
    if (!s.cluster)
        goto out;
    if (!s.blocks || !s.node || !s.share) {
        ry_fail(err, "out of memory for %d nodes", nodes);
        goto out;
    }
    if (nodes > RY_HOME_NODES)
        ry_fail(err, "homes are told from tokens for up to %d nodes, not %d", RY_HOME_NODES, nodes);
    else if (!ry_experts_contiguous(s.blocks, r->layers, r->experts, s.cluster->nranks, err) && !netmoe(&s, t, err) &&
             !copies(&s, t, why, files, err) && !shuffled(&s, anew, shuffle, err))
        rc = r->choice_samples >= 64 && ry_has_tokens(r) ? distinct(&s, t, err) : 0;
out:
    ry_cluster_free(s.cluster);
    free(s.blocks);
    free(s.node);
    free(s.share);
    return rc;
}

static void print(const struct table *t, const int *nodes, json_t *why, json_t *shuffle)
{
    size_t i;
    json_t *at;
    printf("%-48s", "nodes");
    for (int k = 0; k < t->nsizes; k++)
        printf(" %8d", nodes[k]);
    putchar('\n');
    for (int row = 0; row < t->nrows; row++) {
        printf("%-48s", t->rows[row].name);
        bool seconds = strstr(t->rows[row].key, "seconds") != NULL;
        for (int k = 0; k < t->nsizes; k++)
            printf(isnan(t->rows[row].value[k]) ? "        -" : seconds ? " %8.1f" : " %8.3f", t->rows[row].value[k]);
        putchar('\n');
    }
    json_array_foreach(why, i, at)
        printf("%d nodes: %s; %s\n", nodes[i], json_string_value(json_object_get(at, "experts")),
               json_string_value(json_object_get(at, "homes")));
    json_array_foreach(shuffle, i, at) printf("%d nodes, tokens shuffled among samples: %s\n", nodes[i],
                                              json_string_value(json_object_get(at, "experts")));
}

json_t *plan_compare(const struct ry_study *study, const int *nodes, int nsizes, int ranks,
                     const struct plan_files *files, bool quiet, struct ry_err *err)
{
    struct table t = {.nsizes = nsizes};
    json_t *why = json_array(), *shuffle = json_array(), *rows = json_array(), *sizes = json_array();
    struct ry_routing *anew = ry_study_check(study, err) ? NULL : ry_routing_shuffled(study->routing, study->seed, err);
    int failed = !anew;
    for (int i = 0; i < nsizes && !failed; i++) {
        t.at = i;
        json_array_append_new(sizes, json_integer(nodes[i]));
        failed = one_size(study, anew, nodes[i], ranks, files, &t, why, shuffle, err);
    }
    ry_routing_close(anew);
    for (int i = 0; i < t.nrows; i++) {
        json_t *values = json_array();
        for (int k = 0; k < nsizes; k++)
            json_array_append_new(values, isnan(t.rows[i].value[k]) ? json_null() : json_real(t.rows[i].value[k]));
        json_array_append_new(rows,
                              json_pack("{ss ss so}", "key", t.rows[i].key, "name", t.rows[i].name, "values", values));
    }
    if (!quiet && !failed)
        print(&t, nodes, why, shuffle);
    json_t *out = json_pack("{so so so so}", "nodes", sizes, "rows", rows, "decisions", why, "shuffled", shuffle);
    if (failed) {
        json_decref(out);
        return NULL;
    }
    return out;
}
