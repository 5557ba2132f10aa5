/* stay.c: see stay.h. */
#include "place/stay.h"

#include <stdlib.h>
#include <string.h>

/* One sample at `home`, in one layer. `to`: room for a count of each rank. */
static void add_sample(struct ry_stay *sum, const struct ry_problem *p, int i, int layer, int home, uint32_t *to)
{
    struct ry_problem q = *p;
    const struct ry_cluster *c = p->cluster;
    q.counting = RY_COPIES;
    ry_affinity_layer(&q, RY_RANKS, i, layer, to);
    for (int r = 0; r < c->nranks; r++) {
        sum->copies += to[r];
        sum->on_rank += r == home ? to[r] : 0;
        sum->on_node += c->node[r] == c->node[home] ? to[r] : 0;
        if (sum->nodes)
            sum->nodes[c->node[home] * c->nnodes + c->node[r]] += to[r];
    }
    if (ry_problem_sample(p, i) >= p->routing->choice_samples)
        return;
    q.counting = RY_DISTINCT;
    ry_affinity_layer(&q, RY_NODES, i, layer, to);
    for (int n = 0; n < c->nnodes; n++)
        sum->pairs += to[n];
    sum->pairs_on_node += to[c->node[home]];
    ry_affinity_layer(&q, RY_RANKS, i, layer, to);
    for (int r = 0; r < c->nranks; r++)
        sum->rank_pairs += to[r];
    sum->rank_pairs_on_rank += to[home];
}

int ry_stay_add(struct ry_stay *sum, const struct ry_routing *routing, const struct ry_cluster *cluster,
                const int *expert_rank, int layer, int batch, int first, int last, struct ry_err *err)
{
    if (batch < 1 || first < 0 || (int64_t)last * batch > routing->samples)
        return ry_fail(err, "%d samples are not %d batches of %d", routing->samples, last, batch);
    int *capacity = malloc((size_t)cluster->nranks * sizeof *capacity), *home = malloc((size_t)batch * sizeof *home),
        *sample = malloc((size_t)batch * sizeof *sample);
    uint32_t *to = malloc((size_t)cluster->nranks * sizeof *to);
    int rc = capacity && home && sample && to ? 0 : ry_fail(err, "out of memory");
    if (!rc) {
        ry_capacity_even(capacity, cluster->nranks, batch);
        ry_home_in_order(home, capacity, cluster->nranks, batch);
    }
    for (int b = first; b < last && !rc; b++) {
        for (int i = 0; i < batch; i++)
            sample[i] = b * batch + i;
        struct ry_problem p = {.cluster = cluster,
                               .routing = routing,
                               .nsamples = batch,
                               .sample = sample,
                               .capacity = capacity,
                               .expert_rank = expert_rank};
        for (int i = 0; i < batch; i++)
            add_sample(sum, &p, i, layer, home[i], to);
    }
    free(capacity);
    free(home);
    free(sample);
    free(to);
    return rc;
}
