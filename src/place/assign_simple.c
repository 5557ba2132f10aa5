/* assign_simple.c: choosing a solver by name, and the simple ones that the exact one is held against. See assign.h. */
#include <stdlib.h>
#include <string.h>

#include "place/assign_internal.h"
#include "place/random.h"

static const char *const names[RY_SOLVERS] = {"none", "random", "greedy", "heuristic", "kuhn-munkres", "exact"};

const char *ry_solver_name(enum ry_solver solver)
{
    return names[solver];
}

int ry_solver_parse(const char *name, enum ry_solver *out, struct ry_err *err)
{
    for (int s = 0; s < RY_SOLVERS; s++) {
        if (!strcmp(name, names[s])) {
            *out = (enum ry_solver)s;
            return 0;
        }
    }
    return ry_fail(err, "no solver '%s': there are none, random, greedy, heuristic, kuhn-munkres and exact", name);
}

/* The cheapest place with room. */
static int cheapest(const struct ry_assign *w, const int32_t *cost, int nplaces)
{
    int best = -1;
    for (int a = 0; a < nplaces; a++)
        if (w->spare[a] && (best < 0 || cost[a] < cost[best]))
            best = a;
    return best;
}

static const int32_t *row(const struct ry_assign_problem *p, int i)
{
    return p->cost + (size_t)i * (size_t)p->nplaces;
}

static void in_order(struct ry_assign *w, const struct ry_assign_problem *p, int *place)
{
    for (int i = 0, a = 0; i < p->nsamples; i++) {
        while (!w->spare[a])
            a++;
        place[w->order[i]] = a;
        w->spare[a]--;
    }
}

static void greedy(struct ry_assign *w, const struct ry_assign_problem *p, int *place)
{
    for (int k = 0; k < p->nsamples; k++) {
        int i = w->order[k];
        place[i] = cheapest(w, row(p, i), p->nplaces);
        w->spare[place[i]]--;
    }
}

/* What sample i loses if it does not get its first choice. */
static int32_t regret(const struct ry_assign_problem *p, int i)
{
    const int32_t *cost = row(p, i);
    int32_t first = INT32_MAX, second = INT32_MAX;
    for (int a = 0; a < p->nplaces; a++) {
        if (cost[a] < first) {
            second = first;
            first = cost[a];
        } else if (cost[a] < second) {
            second = cost[a];
        }
    }
    return p->nplaces > 1 ? second - first : 0;
}

static void heuristic(struct ry_assign *w, const struct ry_assign_problem *p, int *place)
{
    /* Shell sort of `order` by regret, greatest first, ties by number: nothing here allocates. */
    for (int i = 0; i < p->nsamples; i++)
        w->trial[i] = regret(p, i);
    for (int gap = p->nsamples / 2; gap; gap = gap == 2 ? 1 : gap * 5 / 11) {
        for (int k = gap; k < p->nsamples; k++) {
            int i = w->order[k], j = k;
            for (; j >= gap; j -= gap) {
                int o = w->order[j - gap];
                if (w->trial[o] > w->trial[i] || (w->trial[o] == w->trial[i] && o < i))
                    break;
                w->order[j] = o;
            }
            w->order[j] = i;
        }
    }
    greedy(w, p, place);
    /* Two sweeps: what is left to gain by swaps after them is little. */
    for (int sweep = 0; sweep < 2; sweep++) {
        for (int i = 0; i < p->nsamples; i++) {
            for (int j = i + 1; j < p->nsamples; j++) {
                int a = place[i], b = place[j];
                if (row(p, i)[b] + row(p, j)[a] < row(p, i)[a] + row(p, j)[b]) {
                    place[i] = b;
                    place[j] = a;
                }
            }
        }
    }
}

int64_t ry_assign(struct ry_assign *w, enum ry_solver solver, const struct ry_assign_problem *p, int *place)
{
    if (solver == RY_SOLVE_EXACT)
        return ry_assign_exact(w, p, place);
    if (solver == RY_SOLVE_KUHN_MUNKRES)
        return ry_assign_kuhn_munkres(w, p, place);
    memcpy(w->spare, p->capacity, (size_t)p->nplaces * sizeof *w->spare);
    for (int i = 0; i < p->nsamples; i++)
        w->order[i] = i;
    uint64_t seed = p->seed;
    if (solver == RY_SOLVE_RANDOM)
        ry_shuffle((uint32_t *)w->order, (size_t)p->nsamples, &seed);
    if (solver == RY_SOLVE_GREEDY)
        greedy(w, p, place);
    else if (solver == RY_SOLVE_HEURISTIC)
        heuristic(w, p, place);
    else
        in_order(w, p, place);
    return ry_assign_cost(p, place);
}
