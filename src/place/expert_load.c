/* expert_load.c: see expert_load.h. */
#include "place/expert_load.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* The heaviest that has no rank yet to the lightest rank that has room, and so on. */
static void deal(const int64_t *weight, int n, int ranks, int *rank, int64_t *load, int *held)
{
    for (int i = 0; i < n; i++)
        rank[i] = -1;
    for (int k = 0; k < n; k++) {
        int x = -1, at = -1;
        for (int i = 0; i < n; i++)
            if (rank[i] < 0 && (x < 0 || weight[i] > weight[x]))
                x = i;
        for (int r = 0; r < ranks; r++)
            if (held[r] < n / ranks && (at < 0 || load[r] < load[at]))
                at = r;
        rank[x] = at;
        load[at] += weight[x];
        held[at]++;
    }
}

/* Exchange an expert of the busiest rank with a lighter one elsewhere, such that both ranks end below it. */
static bool relieve(const int64_t *weight, int n, int *rank, int64_t *load, int busiest)
{
    int best_x = -1, best_y = -1;
    int64_t best = load[busiest];
    for (int x = 0; x < n; x++) {
        for (int y = 0; rank[x] == busiest && y < n; y++) {
            int64_t shift = weight[x] - weight[y];
            if (rank[y] == busiest || shift <= 0)
                continue;
            int64_t here = load[busiest] - shift, there = load[rank[y]] + shift, top = here > there ? here : there;
            if (top < best) {
                best = top;
                best_x = x;
                best_y = y;
            }
        }
    }
    if (best_x < 0)
        return false;
    int other = rank[best_y];
    load[busiest] -= weight[best_x] - weight[best_y];
    load[other] += weight[best_x] - weight[best_y];
    rank[best_x] = other;
    rank[best_y] = busiest;
    return true;
}

int64_t ry_rank_balance(const int64_t *weight, int n, int ranks, int *rank)
{
    int64_t *load = calloc((size_t)ranks, sizeof *load);
    int *held = calloc((size_t)ranks, sizeof *held), busiest;
    if (!load || !held) {
        free(load);
        free(held);
        return -1;
    }
    deal(weight, n, ranks, rank, load, held);
    do {
        busiest = 0;
        for (int r = 1; r < ranks; r++)
            busiest = load[r] > load[busiest] ? r : busiest;
    } while (relieve(weight, n, rank, load, busiest));
    int64_t top = load[busiest];
    free(load);
    free(held);
    return top;
}

int64_t ry_expert_load(const int64_t *weight, const int *expert_place, int experts, int places, int64_t *load)
{
    int64_t total = 0;
    memset(load, 0, (size_t)places * sizeof *load);
    for (int e = 0; e < experts; e++) {
        load[expert_place[e]] += weight[e];
        total += weight[e];
    }
    return total;
}

double ry_expert_busiest(const int64_t *weight, const int *expert_place, int layers, int experts, int places,
                         const int *size, double *busiest, int64_t *room)
{
    double worst = 0;
    for (int l = 0; l < layers; l++) {
        int64_t total = ry_expert_load(weight + l * experts, expert_place + l * experts, experts, places, room);
        double ranks = 0;
        busiest[l] = 0;
        for (int p = 0; p < places; p++) {
            busiest[l] = fmax(busiest[l], (double)room[p] / (size ? size[p] : 1));
            ranks += size ? size[p] : 1;
        }
        worst = fmax(worst, total ? busiest[l] * ranks / (double)total : 0);
    }
    return worst;
}

int ry_experts_to_ranks(const struct ry_cluster *c, int layers, int experts, const int64_t *weight,
                        const int *expert_node, int *expert_rank)
{
    int rc = -1, *mine = malloc((size_t)experts * sizeof *mine), *rank = malloc((size_t)experts * sizeof *rank);
    int *seat = malloc((size_t)c->nranks * sizeof *seat);
    int64_t *weights = malloc((size_t)experts * sizeof *weights);
    if (!mine || !rank || !seat || !weights)
        goto out;
    for (int l = 0; l < layers; l++, weight += experts, expert_node += experts, expert_rank += experts) {
        for (int m = 0; m < c->nnodes; m++) {
            int n = 0, seats = 0;
            for (int r = 0; r < c->nranks; r++)
                if (c->node[r] == m)
                    seat[seats++] = r;
            for (int e = 0; e < experts; e++) {
                if (expert_node[e] == m) {
                    weights[n] = weight[e];
                    mine[n++] = e;
                }
            }
            if (ry_rank_balance(weights, n, seats, rank) < 0)
                goto out;
            for (int i = 0; i < n; i++)
                expert_rank[mine[i]] = seat[rank[i]];
        }
    }
    rc = 0;
out:
    free(mine);
    free(rank);
    free(seat);
    free(weights);
    return rc;
}
