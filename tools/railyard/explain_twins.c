/*
 * explain_twins.c: `railyard explain --twins`: what the strategy replica makes of an exchange that several
 * communicators do alike.
 *
 * Owns: the map and matrix of all of them, their plans, proved, and the figures beside each for itself. Not: options,
 * input (cmd_explain.c), words for steps (plan/explain.c).
 */
#include <inttypes.h>
#include <stdlib.h>

#include "explain.h"
#include "plan/verify.h"
#include "report.h"

struct twins {
    int n, each, all; /* communicators, ranks of each, of all */
    struct ry_cluster *map;
    uint64_t *matrix, *column;
    struct ry_plan **plans;
};

static int expand(struct twins *t, const struct ry_cluster *one, const uint64_t *matrix, struct ry_err *err)
{
    size_t all = (size_t)t->all, each = (size_t)t->each;
    struct ry_seat *seats = calloc(all, sizeof *seats);
    t->matrix = calloc(all * all, sizeof *t->matrix);
    t->column = calloc(all, sizeof *t->column);
    t->plans = calloc(all, sizeof(struct ry_plan *));
    if (!seats || !t->matrix || !t->column || !t->plans) {
        free(seats);
        return ry_fail(err, "out of memory");
    }
    for (size_t i = 0; i < all; i++) {
        seats[i] = one->seats[i % each];
        seats[i].rank = (int32_t)i;
        for (size_t j = i / each * each; j < i / each * each + each; j++)
            t->matrix[i * all + j] = matrix[i % each * each + j % each];
    }
    t->map = ry_cluster_build(seats, t->all, err);
    free(seats);
    return t->map ? 0 : -1;
}

static int build(struct twins *t, int chunks, struct ry_err *err)
{
    struct ry_err wrong = {""};
    for (int r = 0; r < t->all; r++) {
        for (int p = 0; p < t->all; p++)
            t->column[p] = t->matrix[(size_t)p * (size_t)t->all + (size_t)r];
        struct ry_plan_input in = {.cluster = t->map,
                                   .rank = r,
                                   .strategy = RY_REPLICA,
                                   .send = t->matrix + (size_t)r * (size_t)t->all,
                                   .recv = t->column,
                                   .chunks = chunks,
                                   .replicas = t->n};
        if (!(t->plans[r] = ry_plan_build(&in, err)))
            return -1;
    }
    if (ry_plan_verify_replicas(t->map, t->matrix, t->n, t->plans, NULL, NULL, &wrong))
        return ry_fail(err, "the replica plan is WRONG, please report it with the matrix: %.380s", wrong.msg);
    return 0;
}

struct sum {
    uint64_t messages, bytes;
};

static void show(const char *label, struct sum apart, struct sum replica)
{
    char cell[2][64], b[16];
    snprintf(cell[0], sizeof cell[0], "%" PRIu64 ", %s", apart.messages, ry_report_bytes((double)apart.bytes, b));
    snprintf(cell[1], sizeof cell[1], "%" PRIu64 ", %s", replica.messages, ry_report_bytes((double)replica.bytes, b));
    printf("  %-26s  %24s  %24s\n", label, cell[0], cell[1]);
}

static void summary(const struct twins *t)
{
    enum { ACROSS, NEAR, SELF };
    static const char *const links[] = {"across nodes", "in the node", "to itself"};
    struct sum apart[3] = {{0}}, replica[3] = {{0}};
    const int *node = t->map->node;
    for (int r = 0; r < t->all; r++) {
        for (int p = 0; p < t->all; p++) {
            uint64_t bytes = t->matrix[(size_t)r * (size_t)t->all + (size_t)p];
            struct sum *s = &apart[p == r ? SELF : node[p] == node[r] ? NEAR : ACROSS];
            s->messages += bytes > 0;
            s->bytes += bytes;
        }
        for (int i = 0; i < t->plans[r]->nsteps; i++) {
            const struct ry_step *step = &t->plans[r]->steps[i];
            struct sum *s = &replica[step->peer == r ? SELF : node[step->peer] == node[r] ? NEAR : ACROSS];
            if (step->kind != RY_STEP_SEND)
                continue;
            s->messages++;
            s->bytes += step->bytes;
        }
    }
    printf("\n  %-26s  %24s  %24s\n", "messages, bytes", "direct, each for itself", "replica");
    for (int k = ACROSS; k <= SELF; k++)
        show(links[k], apart[k], replica[k]);
}

int explain_twins(const struct ry_cluster *cluster, const uint64_t *matrix, int twins, int chunks, int rank, bool every,
                  struct ry_err *err)
{
    struct twins t = {.n = twins, .each = cluster->nranks, .all = twins * cluster->nranks};
    int rc = rank >= t.all ? ry_fail(err, "there is no rank %d: the last of %d is %d", rank, t.all, t.all - 1)
                           : expand(&t, cluster, matrix, err) || build(&t, chunks, err);
    if (!rc) {
        printf("%d twins of %d ranks on %d node%s: rank %d of all is rank 0 of the second; the plans of all ranks were "
               "verified\n",
               t.n, t.each, cluster->nnodes, cluster->nnodes == 1 ? "" : "s", t.each);
        for (int r = every ? 0 : rank; r <= (every ? t.all - 1 : rank); r++) {
            puts("");
            ry_plan_explain(t.plans[r], t.map, stdout);
        }
        summary(&t);
        if (fflush(stdout))
            rc = ry_fail(err, "standard output cannot be written to");
    }
    for (int r = 0; t.plans && r < t.all; r++)
        ry_plan_free(t.plans[r]);
    free(t.plans);
    free(t.matrix);
    free(t.column);
    ry_cluster_free(t.map);
    return rc ? -1 : 0;
}
