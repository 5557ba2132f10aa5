/* homes.c: see homes.h. */
#include "place/homes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define BUSIEST_ITERATIONS 30

struct ry_homes {
    const struct ry_cluster *cluster;
    struct ry_assign *assign;
    int32_t *cost;       /* [samples][nodes] */
    int32_t *affinity;   /* [groups][samples][nodes] */
    int32_t *inner;      /* [samples][ranks of the largest node] */
    int *room, *rank_of; /* [nodes or ranks of a node] */
    int *node, *before;  /* [samples] */
    int *member, *place; /* [samples] */
    double solver_us;
    uint64_t solves;
};

struct ry_homes *ry_homes_new(const struct ry_cluster *cluster, int max_samples, int max_groups, int max_slots,
                              struct ry_err *err)
{
    struct ry_homes *w = calloc(1, sizeof *w);
    size_t I = (size_t)max_samples, N = (size_t)cluster->nnodes, largest = 0;
    for (size_t m = 0; m < N; m++)
        largest = (size_t)cluster->node_size[m] > largest ? (size_t)cluster->node_size[m] : largest;
    size_t places = N > largest ? N : largest;
    if (w) {
        w->cluster = cluster;
        w->assign = ry_assign_new(max_samples, (int)places, max_slots, err);
        w->cost = malloc(I * N * sizeof *w->cost);
        w->affinity = malloc((size_t)max_groups * I * N * sizeof *w->affinity);
        w->inner = malloc(I * largest * sizeof *w->inner);
        w->room = malloc(places * sizeof *w->room);
        w->rank_of = malloc(places * sizeof *w->rank_of);
        w->node = malloc(I * sizeof *w->node);
        w->before = malloc(I * sizeof *w->before);
        w->member = malloc(I * sizeof *w->member);
        w->place = malloc(I * sizeof *w->place);
        if (w->assign && w->cost && w->affinity && w->inner && w->room && w->rank_of && w->node && w->before &&
            w->member && w->place)
            return w;
    }
    ry_homes_free(w);
    ry_fail(err, "out of memory for placing %d samples on %d ranks", max_samples, cluster->nranks);
    return NULL;
}

void ry_homes_free(struct ry_homes *w)
{
    if (!w)
        return;
    ry_assign_free(w->assign);
    free(w->cost);
    free(w->affinity);
    free(w->inner);
    free(w->room);
    free(w->rank_of);
    free(w->node);
    free(w->before);
    free(w->member);
    free(w->place);
    free(w);
}

/* Rows times this are whole numbers fine enough for predictions, and no sample's cost leaves the solver's range. */
static double unit_of(const float *affinity, int nsamples, int places)
{
    double most = 1;
    for (int i = 0; i < nsamples; i++) {
        double sum = 0;
        for (int m = 0; m < places; m++)
            sum += affinity[(size_t)i * (size_t)places + (size_t)m];
        most = fmax(most, sum);
    }
    return fmin(64, (RY_ASSIGN_COST_MAX - places) / most);
}

static void to_nodes(struct ry_homes *w, const struct ry_homes_options *o, int n, const int *capacity, int groups,
                     const float *nodes, const int *from)
{
    const struct ry_cluster *c = w->cluster;
    int N = c->nnodes;
    size_t cells = (size_t)n * (size_t)N;
    double unit = unit_of(nodes, n * groups, N) / groups;
    memset(w->room, 0, (size_t)N * sizeof *w->room);
    memset(w->cost, 0, cells * sizeof *w->cost);
    for (size_t k = 0; k < (size_t)groups * cells; k++) {
        w->affinity[k] = (int32_t)lrint(unit * nodes[k]);
        w->cost[k % cells] -= w->affinity[k];
    }
    for (int r = 0; r < c->nranks; r++)
        w->room[c->node[r]] += capacity[r];
    for (int i = 0; i < n; i++)
        w->before[i] = c->node[from[i]];
    struct ry_assign_problem p = {n, N, w->cost, w->room, o->seed};
    bool exact = o->solver == RY_SOLVE_EXACT;
    uint64_t start = ry_now_ns();
    if (exact && o->max_moved >= 0)
        ry_assign_moving(w->assign, &p, w->before, o->max_moved, w->node, NULL);
    else
        ry_assign(w->assign, o->solver, &p, w->node);
    if (exact && o->max_moved < 0 && o->busiest)
        ry_assign_busiest(w->assign, &p, groups, w->affinity, BUSIEST_ITERATIONS, w->node, NULL);
    w->solver_us += (double)(ry_now_ns() - start) / 1e3;
    w->solves++;
}

static void within_node(struct ry_homes *w, const struct ry_homes_options *o, int m, int nsamples, const int *capacity,
                        const float *ranks, double unit, int *to)
{
    const struct ry_cluster *c = w->cluster;
    int n = 0, size = 0;
    for (int r = c->node_first[m]; size < c->node_size[m]; r++) {
        if (c->node[r] != m)
            continue;
        w->room[size] = capacity[r];
        w->rank_of[size++] = r;
    }
    for (int i = 0; i < nsamples; i++) {
        if (w->node[i] != m)
            continue;
        const float *want = ranks + (size_t)i * (size_t)c->nranks;
        for (int k = 0; k < size; k++)
            w->inner[(size_t)n * (size_t)size + (size_t)k] = -(int32_t)lrint(unit * want[w->rank_of[k]]);
        w->member[n++] = i;
    }
    struct ry_assign_problem p = {n, size, w->inner, w->room, o->seed + (uint64_t)m + 1};
    ry_assign(w->assign, o->solver, &p, w->place);
    for (int k = 0; k < n; k++)
        to[w->member[k]] = w->rank_of[w->place[k]];
}

void ry_homes_solve(struct ry_homes *w, const struct ry_homes_options *o, int nsamples, const int *capacity, int groups,
                    const float *nodes, const float *ranks, const int *from, int *to)
{
    if (o->solver == RY_SOLVE_NONE) {
        memmove(to, from, (size_t)nsamples * sizeof *to);
        return;
    }
    to_nodes(w, o, nsamples, capacity, groups, nodes, from);
    double unit = unit_of(ranks, nsamples, w->cluster->nranks);
    for (int m = 0; m < w->cluster->nnodes; m++)
        within_node(w, o, m, nsamples, capacity, ranks, unit, to);
}

int ry_homes_groups(int layers)
{
    return layers < RY_ASSIGN_GROUPS ? layers : RY_ASSIGN_GROUPS;
}

int ry_homes_affinities(const struct ry_problem *p, float *nodes, float *ranks, struct ry_err *err)
{
    size_t N = (size_t)p->cluster->nnodes, R = (size_t)p->cluster->nranks, L = (size_t)p->routing->layers,
           I = (size_t)p->nsamples, G = (size_t)ry_homes_groups(p->routing->layers);
    uint32_t *a = malloc(L * R * sizeof *a);
    if (!a)
        return ry_fail(err, "out of memory for the affinities of %d samples", p->nsamples);
    memset(nodes, 0, G * I * N * sizeof *nodes);
    memset(ranks, 0, I * R * sizeof *ranks);
    for (size_t i = 0; i < I; i++) {
        ry_affinity(p, RY_NODES, (int)i, a);
        for (size_t k = 0; k < L * N; k++)
            nodes[(k / N % G * I + i) * N + k % N] += (float)a[k];
        ry_affinity(p, RY_RANKS, (int)i, a);
        for (size_t k = 0; k < L * R; k++)
            ranks[i * R + k % R] += (float)a[k];
    }
    free(a);
    return 0;
}

double ry_homes_solver_us(const struct ry_homes *w, uint64_t *calls)
{
    *calls = w->solves;
    return w->solver_us;
}
