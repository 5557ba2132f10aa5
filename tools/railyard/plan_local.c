/*
 * plan_local.c: `railyard plan --locality`: how much of recorded routing stays on its rank and node, layer by layer and
 * over the recording.
 *
 * Owns: wording. Not: the counts (place/stay.h), the distance (base/kl.h).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/kl.h"
#include "place/locality.h"
#include "place/stay.h"
#include "plan.h"

#define WINDOWS 8

static double share(uint64_t part, uint64_t of)
{
    return of ? (double)part / (double)of : NAN;
}

static json_t *real(double v)
{
    return isnan(v) ? json_null() : json_real(v);
}

static json_t *cell(const struct ry_stay *s, int nnodes)
{
    return json_pack("{so so so so so}", "on_rank", real(share(s->on_rank, s->copies)), "on_node",
                     real(share(s->on_node, s->copies)), "distinct_on_rank",
                     real(share(s->rank_pairs_on_rank, s->rank_pairs)), "distinct_on_node",
                     real(share(s->pairs_on_node, s->pairs)), "kl", real(ry_distance_to_local(s->nodes, nnodes)));
}

static void print_share(double v)
{
    if (isnan(v))
        printf(" %10s", "-");
    else
        printf(" %8.1f %%", 100 * v);
}

static void add(struct ry_stay *into, const struct ry_stay *s, int cells)
{
    into->copies += s->copies;
    into->on_rank += s->on_rank;
    into->on_node += s->on_node;
    into->pairs += s->pairs;
    into->pairs_on_node += s->pairs_on_node;
    into->rank_pairs += s->rank_pairs;
    into->rank_pairs_on_rank += s->rank_pairs_on_rank;
    for (int i = 0; i < cells; i++)
        into->nodes[i] += s->nodes[i];
}

static void print_line(const char *name, const struct ry_stay *s, int nnodes, const double *windows, int n)
{
    printf("    %-6s", name);
    print_share(share(s->on_rank, s->copies));
    print_share(share(s->on_node, s->copies));
    print_share(share(s->rank_pairs_on_rank, s->rank_pairs));
    print_share(share(s->pairs_on_node, s->pairs));
    printf(" %9.2f   ", ry_distance_to_local(s->nodes, nnodes));
    for (int i = 0; i < n; i++)
        printf(" %5.1f", 100 * windows[i]);
    puts(n ? " %" : "");
}

/* One cluster. */
static json_t *one_size(const struct ry_study *study, const struct ry_cluster *cluster, bool quiet, struct ry_err *err)
{
    const struct ry_routing *r = study->routing;
    int batches = r->samples / study->batch, n = batches < WINDOWS ? batches : WINDOWS,
        cells = cluster->nnodes * cluster->nnodes;
    if (!batches) {
        ry_fail(err, "%d samples do not fill one batch of %d: take a smaller --batch", r->samples, study->batch);
        return NULL;
    }
    struct ry_stay all = {.nodes = calloc((size_t)cells, sizeof(uint64_t))},
                   layer = {.nodes = calloc((size_t)cells, sizeof(uint64_t))},
                   window = {.nodes = calloc((size_t)cells, sizeof(uint64_t))};
    json_t *layers = json_array();
    int rc = all.nodes && layer.nodes && window.nodes ? 0 : ry_fail(err, "out of memory");
    if (!quiet && !rc)
        printf("\n  %d nodes of %d GPUs (KL to local: 0 if all stays on its node, %.2f if it spreads evenly)\n"
               "    layer    on rank    on node  distinct on  distinct on  KL to     on node, over the recording\n"
               "             (copies)   (copies)  its rank     its node    local\n",
               cluster->nnodes, cluster->nranks / cluster->nnodes, ry_distance_of_even(cluster->nnodes));
    for (int l = 0; l < r->layers && !rc; l++) {
        double of[WINDOWS];
        json_t *time = json_array();
        uint64_t *kept = layer.nodes;
        memset(kept, 0, (size_t)cells * sizeof *kept);
        layer = (struct ry_stay){.nodes = kept};
        for (int w = 0; w < n && !rc; w++) {
            kept = window.nodes;
            memset(kept, 0, (size_t)cells * sizeof *kept);
            window = (struct ry_stay){.nodes = kept};
            int first = (int)((int64_t)batches * w / n), last = (int)((int64_t)batches * (w + 1) / n);
            rc = ry_stay_add(&window, r, cluster, study->expert_rank, l, study->batch, first, last, err);
            of[w] = share(window.on_node, window.copies);
            json_t *c = cell(&window, cluster->nnodes);
            json_object_set_new(c, "from_sample", json_integer((json_int_t)first * study->batch));
            json_array_append_new(time, c);
            add(&layer, &window, cells);
        }
        json_t *c = cell(&layer, cluster->nnodes);
        json_object_set_new(c, "layer", json_integer(l));
        json_object_set_new(c, "over_time", time);
        json_array_append_new(layers, c);
        add(&all, &layer, cells);
        char name[16];
        snprintf(name, sizeof name, "%d", l);
        if (!quiet && !rc)
            print_line(name, &layer, cluster->nnodes, of, n);
    }
    json_t *out = NULL;
    if (!rc) {
        if (!quiet)
            print_line("all", &all, cluster->nnodes, NULL, 0);
        out = cell(&all, cluster->nnodes);
        json_object_update_new(out, json_pack("{si si sf sO}", "nodes", cluster->nnodes, "gpus",
                                              cluster->nranks / cluster->nnodes, "kl_even",
                                              ry_distance_of_even(cluster->nnodes), "layers", layers));
    }
    json_decref(layers);
    free(all.nodes);
    free(layer.nodes);
    free(window.nodes);
    return out;
}

json_t *plan_local(const struct ry_study *study, const int *nodes, int nsizes, int ranks, bool quiet,
                   struct ry_err *err)
{
    const struct ry_routing *r = study->routing;
    json_t *list = json_array();
    double dispersion = ry_locality(r, 0, r->samples < 1024 ? r->samples : 1024);
    if (!quiet)
        printf("samples in the order recorded, %d at a time dealt out in order, experts in contiguous blocks; samples "
               "differ %.1f times as "
               "much as chance makes them\n",
               study->batch, dispersion);
    for (int i = 0; i < nsizes; i++) {
        struct ry_cluster *cluster = ry_place_cluster(nodes[i], ranks, 1, 1, err);
        int *expert_rank = malloc((size_t)r->layers * (size_t)r->experts * sizeof *expert_rank);
        struct ry_study one = *study;
        one.expert_rank = expert_rank;
        json_t *c = NULL;
        if (!expert_rank)
            ry_fail(err, "out of memory");
        else if (cluster && !ry_experts_contiguous(expert_rank, r->layers, r->experts, cluster->nranks, err))
            c = one_size(&one, cluster, quiet, err);
        free(expert_rank);
        ry_cluster_free(cluster);
        if (!c) {
            json_decref(list);
            return NULL;
        }
        json_array_append_new(list, c);
    }
    return json_pack("{sf si so}", "dispersion", dispersion, "batch", study->batch, "clusters", list);
}
