/* problem.c: see problem.h. */
#include "place/problem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *ry_counting_name(enum ry_counting counting)
{
    return counting == RY_DISTINCT ? "distinct" : "copies";
}

int ry_places(const struct ry_cluster *cluster, enum ry_level level)
{
    return level == RY_NODES ? cluster->nnodes : cluster->nranks;
}

int ry_problem_check(const struct ry_problem *p, struct ry_err *err)
{
    const struct ry_routing *r = p->routing;
    if (p->nsamples < 1)
        return ry_fail(err, "placement: nsamples is %d: there is nothing to place", p->nsamples);
    if (!p->sample && p->nsamples > r->samples)
        return ry_fail(err, "placement: nsamples is %d, but the routing holds %d samples", p->nsamples, r->samples);
    for (int i = 0; i < p->nsamples; i++) {
        int s = ry_problem_sample(p, i);
        if (s < 0 || s >= r->samples)
            return ry_fail(err, "placement: sample[%d] is %d, but the routing holds %d samples", i, s, r->samples);
        if (p->counting == RY_DISTINCT && s >= r->choice_samples)
            return ry_fail(
                err,
                "placement: counting distinct pairs needs token-level choices, which sample %d has not (the first %d "
                "samples have): count copies instead",
                s, r->choice_samples);
    }
    long room = 0;
    for (int i = 0; i < p->cluster->nranks; i++) {
        if (p->capacity[i] < 0)
            return ry_fail(err, "placement: capacity[%d] is %d", i, p->capacity[i]);
        room += p->capacity[i];
    }
    if (room < p->nsamples)
        return ry_fail(err, "placement: the capacities hold %ld samples, %d are to be placed", room, p->nsamples);
    for (int l = 0; l < r->layers; l++) {
        for (int e = 0; e < r->experts; e++) {
            int at = p->expert_rank[(size_t)l * (size_t)r->experts + (size_t)e];
            if (at < 0 || at >= p->cluster->nranks)
                return ry_fail(err, "placement: expert %d of layer %d is on rank %d, of %d ranks", e, l, at,
                               p->cluster->nranks);
        }
    }
    return 0;
}

struct ry_cluster *ry_place_cluster(int nnodes, int ranks_per_node, double nvlink_gbs, double nic_gbs,
                                    struct ry_err *err)
{
    if (nnodes < 1 || ranks_per_node < 1 || nnodes > (1 << 20) / ranks_per_node) {
        ry_fail(err, "a cluster of %d nodes with %d ranks each cannot be planned for (up to %d ranks can)", nnodes,
                ranks_per_node, 1 << 20);
        return NULL;
    }
    int n = nnodes * ranks_per_node;
    struct ry_seat *seats = calloc((size_t)n, sizeof *seats);
    if (!seats) {
        ry_fail(err, "out of memory for a cluster of %d ranks", n);
        return NULL;
    }
    for (int i = 0; i < n; i++) {
        seats[i].version = RY_SEAT_VERSION;
        seats[i].rank = i;
        snprintf(seats[i].node, sizeof seats[i].node, "node%d", i / ranks_per_node);
        snprintf(seats[i].host, sizeof seats[i].host, "node%d", i / ranks_per_node);
        seats[i].nvlink_gbs = nvlink_gbs;
        seats[i].nic_gbs = nic_gbs;
    }
    struct ry_cluster *c = ry_cluster_build(seats, n, err);
    free(seats);
    return c;
}

void ry_capacity_even(int *capacity, int nranks, int nsamples)
{
    for (int64_t r = 0; r < nranks; r++)
        capacity[r] = (int)((r + 1) * nsamples / nranks - r * nsamples / nranks);
}

void ry_home_in_order(int *home, const int *capacity, int nranks, int nsamples)
{
    int i = 0;
    for (int r = 0; r < nranks && i < nsamples; r++)
        for (int k = 0; k < capacity[r] && i < nsamples; k++)
            home[i++] = r;
}

int ry_experts_contiguous(int *expert_rank, int layers, int experts, int nranks, struct ry_err *err)
{
    if (experts % nranks)
        return ry_fail(
            err,
            "%d experts cannot be dealt out evenly to %d ranks: choose a number of nodes and ranks per node whose "
            "product divides it",
            experts, nranks);
    for (int l = 0; l < layers; l++)
        for (int e = 0; e < experts; e++)
            expert_rank[(size_t)l * (size_t)experts + (size_t)e] = e / (experts / nranks);
    return 0;
}

/* One layer. `place_of` maps what expert_at holds to the place counted; NULL: it is the place. */
static void affinity(const struct ry_routing *r, int s, int l, const int *expert_at, const int *place_of, int places,
                     enum ry_counting counting, uint32_t *out)
{
    memset(out, 0, (size_t)places * sizeof *out);
    if (counting == RY_COPIES) {
        const uint16_t *counts = ry_counts_at(r, s, l);
        for (int e = 0; e < r->experts; e++)
            out[place_of ? place_of[expert_at[e]] : expert_at[e]] += counts[e];
        return;
    }
    for (int t = 0; t < r->tokens_per_sample; t++) {
        int seen[RY_ROUTING_TOPK];
        for (int k = 0; k < r->topk; k++) {
            int at = expert_at[ry_choice(r, s, l, t, k)], j = 0;
            seen[k] = place_of ? place_of[at] : at;
            while (seen[j] != seen[k])
                j++;
            out[seen[k]] += j == k;
        }
    }
}

void ry_affinity_layer(const struct ry_problem *p, enum ry_level level, int i, int layer, uint32_t *out)
{
    affinity(p->routing, ry_problem_sample(p, i), layer, p->expert_rank + (size_t)layer * (size_t)p->routing->experts,
             level == RY_NODES ? p->cluster->node : NULL, ry_places(p->cluster, level), p->counting, out);
}

void ry_affinity(const struct ry_problem *p, enum ry_level level, int i, uint32_t *out)
{
    for (int l = 0; l < p->routing->layers; l++, out += ry_places(p->cluster, level))
        ry_affinity_layer(p, level, i, l, out);
}

void ry_affinity_by(const struct ry_routing *r, int s, const int *expert_place, int places, enum ry_counting counting,
                    uint32_t *out)
{
    for (int l = 0; l < r->layers; l++, expert_place += r->experts, out += places)
        affinity(r, s, l, expert_place, NULL, places, counting, out);
}
