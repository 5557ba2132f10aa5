/*
 * kuhn_munkres.c: the Hungarian method as textbooks give it, on the square matrix with one column per slot: rows one by
 * one, an alternating tree grown by slacks, O(n³). Here to be compared with, as NetMoE's paper uses it; the exact
 * solver needs no such matrix (assign.h). Rows beyond the samples stand for slots that stay free and cost nothing.
 */
#include <string.h>

#include "place/assign_internal.h"

int64_t ry_assign_kuhn_munkres(struct ry_assign *w, const struct ry_assign_problem *p, int *place)
{
    int n = 0;
    for (int a = 0; a < p->nplaces; a++)
        n += p->capacity[a];
    for (int a = 0, slot = 0; a < p->nplaces; a++)
        for (int c = 0; c < p->capacity[a]; c++, slot++)
            for (int i = 0; i < n; i++)
                w->square[(size_t)i * (size_t)n + (size_t)slot] =
                    i < p->nsamples ? p->cost[(size_t)i * (size_t)p->nplaces + (size_t)a] : 0;
    /* Rows and columns count from 1; match[0] is the row being placed, column 0 the root of its tree. */
    for (int j = 0; j <= n; j++) {
        w->u[j] = w->v[j] = 0;
        w->match[j] = 0;
    }
    for (int row = 1; row <= n; row++) {
        int column = 0;
        w->match[0] = row;
        for (int j = 0; j <= n; j++) {
            w->slack[j] = INT64_MAX;
            w->used[j] = false;
        }
        do {
            int i = w->match[column], next = 0;
            const int32_t *cost = w->square + (size_t)(i - 1) * (size_t)n;
            int64_t delta = INT64_MAX;
            w->used[column] = true;
            for (int j = 1; j <= n; j++) {
                if (w->used[j])
                    continue;
                int64_t reduced = cost[j - 1] - w->u[i] - w->v[j];
                if (reduced < w->slack[j]) {
                    w->slack[j] = reduced;
                    w->way[j] = column;
                }
                if (w->slack[j] < delta) {
                    delta = w->slack[j];
                    next = j;
                }
            }
            for (int j = 0; j <= n; j++) {
                if (w->used[j]) {
                    w->u[w->match[j]] += delta;
                    w->v[j] -= delta;
                } else {
                    w->slack[j] -= delta;
                }
            }
            column = next;
        } while (w->match[column]);
        for (; column; column = w->way[column])
            w->match[column] = w->match[w->way[column]];
    }
    for (int a = 0, slot = 1; a < p->nplaces; a++)
        for (int c = 0; c < p->capacity[a]; c++, slot++)
            if (w->match[slot] <= p->nsamples)
                place[w->match[slot] - 1] = a;
    return ry_assign_cost(p, place);
}
