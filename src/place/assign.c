/* assign.c: the workspace, the choice of solver, and the exact one. See assign.h. */
#include "place/assign_internal.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* Places that are not reached yet, arcs that no sample makes. Keys of 2 · (FAR + any distance) still fit. */
#define FAR (INT32_MAX / 4)

/* With base NULL, only adds up what is needed. */
static void *take(char *base, size_t *at, size_t count, size_t size)
{
    size_t from = (*at + 63) & ~(size_t)63;
    *at = from + count * size;
    return base ? base + from : NULL;
}

static size_t lay_out(struct ry_assign *w, char *base)
{
    size_t at = 0, I = (size_t)w->max_samples, P = (size_t)w->max_places, Q = (size_t)w->max_slots;
#define TAKE(field, n) w->field = take(base, &at, n, sizeof *w->field)
    TAKE(arc, P * P);
    TAKE(mover, P * P);
    TAKE(arcs_known, P);
    TAKE(first, P);
    TAKE(next, I);
    TAKE(before, I);
    TAKE(load, P);
    TAKE(potential, P);
    TAKE(distance, P);
    TAKE(key, P);
    TAKE(full, P);
    TAKE(from, P);
    TAKE(settled, P);
    TAKE(stale, P);
    TAKE(order, I);
    TAKE(spare, P);
    TAKE(trial, I);
    TAKE(priced, I * P);
    TAKE(total, RY_ASSIGN_GROUPS * I);
    TAKE(weight, RY_ASSIGN_GROUPS * 2 * P);
    TAKE(price, RY_ASSIGN_GROUPS * 2 * P);
    TAKE(flow, RY_ASSIGN_GROUPS * 2 * P);
    if (Q) {
        TAKE(square, Q * Q);
        TAKE(u, Q + 1);
        TAKE(v, Q + 1);
        TAKE(slack, Q + 1);
        TAKE(match, Q + 1);
        TAKE(way, Q + 1);
        TAKE(used, Q + 1);
    }
#undef TAKE
    return at;
}

struct ry_assign *ry_assign_new(int max_samples, int max_places, int max_slots, struct ry_err *err)
{
    struct ry_assign *w = calloc(1, sizeof *w);
    if (w) {
        w->max_samples = max_samples;
        w->max_places = max_places;
        w->max_slots = max_slots;
        size_t bytes = (lay_out(w, NULL) + 63) & ~(size_t)63;
        if ((w->memory = aligned_alloc(64, bytes))) {
            lay_out(w, w->memory);
            return w;
        }
    }
    free(w);
    ry_fail(err, "out of memory for assigning %d samples to %d places", max_samples, max_places);
    return NULL;
}

void ry_assign_free(struct ry_assign *ws)
{
    if (ws)
        free(ws->memory);
    free(ws);
}

int64_t ry_assign_cost(const struct ry_assign_problem *p, const int *place)
{
    int64_t sum = 0;
    for (int i = 0; i < p->nsamples; i++)
        sum += p->cost[(size_t)i * (size_t)p->nplaces + (size_t)place[i]];
    return sum;
}

static void enter(struct ry_assign *w, int i, int a)
{
    w->next[i] = w->first[a];
    w->before[i] = -1;
    if (w->first[a] >= 0)
        w->before[w->first[a]] = i;
    w->first[a] = i;
    w->load[a]++;
}

static void leave(struct ry_assign *w, int i, int a)
{
    if (w->before[i] >= 0)
        w->next[w->before[i]] = w->next[i];
    else
        w->first[a] = w->next[i];
    if (w->next[i] >= 0)
        w->before[w->next[i]] = w->before[i];
    w->load[a]--;
}

/* Sample i is at a: the arcs that it makes better. */
static void offer(const struct ry_assign_problem *p, int32_t *restrict arc, int *restrict mover, int i, int a)
{
    const int32_t *cost = p->cost + (size_t)i * (size_t)p->nplaces;
    int32_t here = cost[a];
    for (int b = 0; b < p->nplaces; b++) {
        int32_t length = cost[b] - here;
        mover[b] = length < arc[b] ? i : mover[b];
        arc[b] = length < arc[b] ? length : arc[b];
    }
}

static void find_arcs(struct ry_assign *w, const struct ry_assign_problem *p, int a)
{
    int32_t *arc = w->arc + (size_t)a * (size_t)p->nplaces;
    int *mover = w->mover + (size_t)a * (size_t)p->nplaces;
    for (int b = 0; b < p->nplaces; b++) {
        arc[b] = FAR;
        mover[b] = -1;
    }
    for (int i = w->first[a]; i >= 0; i = w->next[i])
        offer(p, arc, mover, i, a);
    w->arcs_known[a] = true;
}

/* Sample i has left a: only the arcs that it made have to be found again. */
static void forget(struct ry_assign *w, const struct ry_assign_problem *p, int i, int a)
{
    int32_t *arc = w->arc + (size_t)a * (size_t)p->nplaces;
    int *mover = w->mover + (size_t)a * (size_t)p->nplaces;
    int n = 0;
    for (int b = 0; b < p->nplaces; b++)
        if (mover[b] == i)
            w->stale[n++] = b;
    for (int k = 0; k < n; k++) {
        arc[w->stale[k]] = FAR;
        mover[w->stale[k]] = -1;
    }
    for (int j = w->first[a]; j >= 0 && n; j = w->next[j]) {
        const int32_t *cost = p->cost + (size_t)j * (size_t)p->nplaces;
        for (int k = 0; k < n; k++) {
            int b = w->stale[k];
            int32_t length = cost[b] - cost[a];
            if (length < arc[b]) {
                arc[b] = length;
                mover[b] = j;
            }
        }
    }
}

/* The hot loops below are compiled for AVX2, too, and the machine's best is taken when the program is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VECTORIZED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORIZED
#endif

/* Distances of all places by way of a, of which `start` is distance plus potential, where that is shorter. */
VECTORIZED static void relax(const int32_t *restrict arc, const int32_t *restrict potential,
                             const int32_t *restrict full, int32_t *restrict distance, int32_t *restrict key,
                             int *restrict from, int32_t start, int a, int n)
{
    for (int b = 0; b < n; b++) {
        int32_t d = start + arc[b] - potential[b];
        bool shorter = d < distance[b];
        from[b] = shorter ? a : from[b];
        key[b] = shorter ? 2 * d + full[b] : key[b];
        distance[b] = shorter ? d : distance[b];
    }
}

VECTORIZED static int32_t least_of(const int32_t *key, int n)
{
    int32_t least = INT32_MAX;
    for (int b = 0; b < n; b++)
        least = key[b] < least ? key[b] : least;
    return least;
}

/* The place with the least key: by blocks, so that little has to be searched one by one. */
static int nearest(const int32_t *key, int n)
{
    int32_t least = INT32_MAX;
    int block = 0, b;
    for (int from = 0; from < n; from += 64) {
        int32_t here = least_of(key + from, n - from < 64 ? n - from : 64);
        if (here < least) {
            least = here;
            block = from;
        }
    }
    for (b = block; key[b] != least; b++)
        ;
    return b;
}

/*
 * The nearest place with room, seen from sample i that is nowhere yet; w->from leads back, -1 where it enters. Keys are
 * distances, twice, and one more for full places, so that of equals the one with room ends the search; those of final
 * distances are INT32_MAX. Potentials are brought up to date.
 */
static int shortest_path(struct ry_assign *w, const struct ry_assign_problem *p, int i)
{
    int nsettled = 0, P = p->nplaces, a;
    const int32_t *cost = p->cost + (size_t)i * (size_t)P;
    int32_t least = least_of(cost, P);
    for (int b = 0; b < P; b++) {
        w->distance[b] = cost[b] - least - w->potential[b];
        w->key[b] = 2 * w->distance[b] + w->full[b];
        w->from[b] = -1;
    }
    while (w->full[a = nearest(w->key, P)]) {
        w->settled[nsettled++] = a;
        w->key[a] = INT32_MAX;
        if (!w->arcs_known[a])
            find_arcs(w, p, a);
        relax(w->arc + (size_t)a * (size_t)P, w->potential, w->full, w->distance, w->key, w->from,
              w->distance[a] + w->potential[a], a, P);
    }
    for (int k = 0; k < nsettled; k++)
        w->potential[w->settled[k]] += w->distance[w->settled[k]] - w->distance[a];
    return a;
}

/* Sample i enters, and one sample moves along each arc of the path. From its end: none that has come goes on. */
static void move_along(struct ry_assign *w, const struct ry_assign_problem *p, int i, int target, int *place)
{
    for (int b = target;;) {
        int a = w->from[b], moves = a < 0 ? i : w->mover[(size_t)a * (size_t)p->nplaces + (size_t)b];
        if (a >= 0) {
            leave(w, moves, a);
            forget(w, p, moves, a);
        }
        enter(w, moves, b);
        if (w->arcs_known[b])
            offer(p, w->arc + (size_t)b * (size_t)p->nplaces, w->mover + (size_t)b * (size_t)p->nplaces, moves, b);
        place[moves] = b;
        if (a < 0)
            break;
        b = a;
    }
    w->full[target] = w->load[target] >= p->capacity[target];
}

int64_t ry_assign_exact(struct ry_assign *w, const struct ry_assign_problem *p, int *place)
{
    int P = p->nplaces, left = 0;
    for (int a = 0; a < P; a++) {
        w->first[a] = -1;
        w->load[a] = 0;
        w->full[a] = p->capacity[a] <= 0;
        w->potential[a] = 0;
        w->arcs_known[a] = false;
    }
    for (int i = 0; i < p->nsamples; i++) {
        int best = nearest(p->cost + (size_t)i * (size_t)P, P);
        if (w->full[best]) {
            w->order[left++] = i;
            continue;
        }
        place[i] = best;
        enter(w, i, best);
        w->full[best] = w->load[best] >= p->capacity[best];
    }
    for (int k = 0; k < left; k++)
        move_along(w, p, w->order[k], shortest_path(w, p, w->order[k]), place);
    return ry_assign_cost(p, place);
}
