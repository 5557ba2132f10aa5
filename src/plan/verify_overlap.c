/*
 * verify_overlap.c: the verifier's part about plans whose second part may be carried out beside the first (plan.h).
 *
 * Such a plan is proved twice: in the order of its list, where each step of the second part comes as late as can be,
 * and in another order, made here, where it comes as early as can be. A step of one part and a step of the other that
 * nothing orders meet in both ways round; if one wrote what the other reads or writes, and it mattered, one of the two
 * would be wrong.
 */
#include <inttypes.h>
#include <stdlib.h>

#include "verify_internal.h"

/* What a step comes after: it stands behind others of its part, which may have to wait longer. */
static int comes_after(const struct ry_plan *p, int step)
{
    int after = 0;
    for (int i = ry_second(p); i <= step; i++)
        after = p->steps[i].after > after ? p->steps[i].after : after;
    return after;
}

/* By group: the group of the first part that it comes after, or itself if it is one; -1: no rank has a transfer in it.
 */
static int find_groups(const struct machine *m, int *after)
{
    for (int g = 0; g < m->plans[0]->ngroups; g++)
        after[g] = -1;
    for (int r = 0; r < m->n; r++) {
        const struct ry_plan *p = m->plans[r];
        for (int i = 0; i < p->nsteps; i++) {
            const struct ry_step *s = &p->steps[i];
            bool second = i >= ry_second(p);
            if (second && (s->after < 0 || s->after >= p->ngroups))
                return ry_fail(m->err, "%s: is to come after group %d", ry_verify_name(m, r, i).s, s->after);
            if (!ry_is_transfer(s))
                continue;
            int is = second ? comes_after(p, i) : s->group;
            if (second && !ry_inside(p->inside, s->group))
                return ry_fail(m->err, "%s: belongs to the second part, whose groups stay inside the nodes",
                               ry_verify_name(m, r, i).s);
            if ((second && is >= s->group) || (after[s->group] >= 0 && after[s->group] != is))
                return ry_fail(m->err, "%s: comes after group %d, on another rank after group %d",
                               ry_verify_name(m, r, i).s, is, after[s->group]);
            after[s->group] = is;
        }
    }
    return 0;
}

/* New numbers, so that groups are in order once more. */
static void number(const int *after, int n, int *as)
{
    for (int g = 0, next = 0; g < n; g++) {
        if (after[g] >= 0 && after[g] != g)
            continue;
        as[g] = next++;
        for (int h = g + 1; h < n; h++)
            if (after[h] == g)
                as[h] = next++;
    }
    for (int h = 0; h < n; h++) /* after a group in which nobody has a transfer: it was given a number all the same */
        if (after[h] >= 0 && after[h] != h && as[after[h]] > as[h])
            as[h] = as[after[h]];
}

static struct ry_plan *early(const struct ry_plan *p, const int *as)
{
    struct ry_plan *e = malloc(sizeof *e + (size_t)(p->nsteps ? p->nsteps : 1) * sizeof *e->steps);
    if (!e)
        return NULL;
    *e = *p;
    e->steps = (struct ry_step *)(e + 1);
    e->inside = 0;
    int n = 0, second = ry_second(p);
    for (int i = 0; i <= ry_second(p); i++) {
        /* Before a group is begun, and at the end: what came after one before it. */
        bool begins = i < ry_second(p) && ry_is_transfer(&p->steps[i]) &&
                      (!i || !ry_is_transfer(&p->steps[i - 1]) || p->steps[i - 1].group != p->steps[i].group);
        for (; (begins || i == ry_second(p) || !i) && second < p->nsteps; second++) {
            int after = comes_after(p, second), first = -1; /* the next group, which it does not wait for */
            for (int j = i; j < ry_second(p) && first < 0; j++)
                first = ry_is_transfer(&p->steps[j]) ? p->steps[j].group : -1;
            if (first >= 0 && after >= first)
                break;
            e->steps[n++] = p->steps[second];
        }
        if (i < ry_second(p))
            e->steps[n++] = p->steps[i];
    }
    for (int i = 0; i < n; i++)
        if (ry_is_transfer(&e->steps[i]))
            e->steps[i].group = as[e->steps[i].group];
    for (int g = 0; g < p->ngroups; g++)
        e->inside |= ry_inside(p->inside, g) ? UINT64_C(1) << as[g] : 0;
    e->beside = 0;
    return e;
}

int ry_verify_early(const struct machine *as_listed)
{
    struct machine m = {.n = as_listed->n,
                        .cluster = as_listed->cluster,
                        .matrix = as_listed->matrix,
                        .replicas = as_listed->replicas,
                        .send_at = as_listed->send_at,
                        .recv_at = as_listed->recv_at,
                        .err = as_listed->err,
                        .maps = as_listed->maps,
                        .went = as_listed->went};
    int ngroups = as_listed->plans[0]->ngroups;
    struct ry_err why = {""};
    struct ry_plan **plans = calloc((size_t)m.n, sizeof *plans);
    int *after = malloc(2 * (size_t)(ngroups + 1) * sizeof *after), *as = after + ngroups + 1;
    int rc = plans && after ? find_groups(as_listed, after) : no_memory(&m);
    if (!rc)
        number(after, ngroups, as);
    for (int r = 0; !rc && r < m.n; r++)
        if (!(plans[r] = early(as_listed->plans[r], as)))
            rc = no_memory(&m);
    m.plans = plans;
    if (!rc) {
        m.err = &why;
        if ((rc = m.maps ? ry_verify_with_rows(&m) : ry_verify_all(&m)))
            ry_fail(as_listed->err, "with the second part as early as it may be: %.400s", why.msg);
    }
    for (int r = 0; plans && r < m.n; r++)
        free(plans[r]);
    free(plans);
    free(after);
    return rc ? -1 : 0;
}
