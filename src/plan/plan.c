/*
 * plan.c: see plan.h. Owns what all strategies share: names, slices, checking the input, memory. Not: any steps (one
 * file per strategy), nor words for people (explain.c).
 */
#include "plan.h"

#include <stdlib.h>
#include <string.h>

#include "strategy.h"

static const struct ry_strategy_ops *const strategies[RY_STRATEGIES] = {
    [RY_DIRECT] = &ry_direct_ops,
    [RY_HIERARCHICAL] = &ry_hierarchical_ops,
    [RY_BALANCED] = &ry_balanced_ops,
    [RY_DEDUP] = &ry_dedup_ops,
    [RY_SUM] = &ry_sum_ops,
};

const char *ry_strategy_name(enum ry_strategy s)
{
    return (unsigned)s < RY_STRATEGIES ? strategies[s]->name : "unknown";
}

int ry_strategy_parse(const char *name, enum ry_strategy *out, struct ry_err *err)
{
    char known[128] = "";
    for (int s = 0; s < RY_SUM; s++) {
        if (!strcmp(name, strategies[s]->name)) {
            *out = (enum ry_strategy)s;
            return 0;
        }
        size_t n = strlen(known);
        snprintf(known + n, sizeof known - n, "%s%s", s ? ", " : "", strategies[s]->name);
    }
    return ry_fail(err, "unknown strategy '%.40s': there are %s", name, known);
}

int ry_relay(const struct ry_cluster *cluster, int from, int node)
{
    int local = cluster->local[from] % cluster->node_size[node];
    int rank = cluster->node_first[node] + local; /* where a node's ranks follow each other; else it is further on */
    while (cluster->node[rank] != node || cluster->local[rank] != local)
        rank++;
    return rank;
}

int ry_slice_init(struct ry_slice *slice, const struct ry_cluster *cluster, int rank, enum ry_strategy strategy,
                  struct ry_err *err)
{
    *slice = (struct ry_slice){0};
    const struct ry_strategy_ops *ops = strategies[strategy];
    if (!ops->row)
        return 0;
    for (int r = 0; r < cluster->nranks; r++) {
        slice->nrows += ops->row(cluster, rank, r);
        slice->ncols += ops->column(cluster, rank, r);
    }
    if (!slice->nrows || !slice->ncols) {
        slice->nrows = slice->ncols = 0;
        return 0;
    }
    size_t rows = (size_t)slice->nrows, cols = (size_t)slice->ncols, repeats = ops->repeats ? rows : 0;
    slice->nwords = ops->words ? ops->words(cluster, cluster->node[rank]) : 0;
    slice->cells = calloc(1, (rows * cols + slice->nwords) * sizeof *slice->cells + repeats * sizeof *slice->repeats +
                                 (rows + cols) * sizeof(int)); /* one block */
    if (!slice->cells)
        return ry_fail(err, "no memory for %zu cells of the matrix", rows * cols);
    slice->words = slice->nwords ? slice->cells + rows * cols : NULL;
    slice->repeats = repeats ? (struct ry_repeats *)(slice->cells + rows * cols + slice->nwords) : NULL;
    slice->rows = (int *)((struct ry_repeats *)(slice->cells + rows * cols + slice->nwords) + repeats);
    slice->cols = slice->rows + rows;
    for (int r = 0, i = 0, j = 0; r < cluster->nranks; r++) {
        if (ops->row(cluster, rank, r))
            slice->rows[i++] = r;
        if (ops->column(cluster, rank, r))
            slice->cols[j++] = r;
    }
    return 0;
}

void ry_slice_fill(struct ry_slice *slice, const struct ry_cluster *cluster, const uint64_t *matrix,
                   const struct ry_repeats *repeats)
{
    for (int i = 0; i < slice->nrows; i++) {
        size_t from = (size_t)slice->rows[i];
        for (int j = 0; j < slice->ncols; j++)
            slice->cells[(size_t)i * (size_t)slice->ncols + (size_t)j] =
                matrix[from * (size_t)cluster->nranks + (size_t)slice->cols[j]];
        if (slice->repeats)
            slice->repeats[i] = repeats
                                    ? repeats[from * (size_t)cluster->nnodes + (size_t)cluster->node[slice->cols[0]]]
                                    : (struct ry_repeats){0};
    }
    if (slice->words)
        strategies[RY_BALANCED]->fill_words(cluster, cluster->node[slice->cols[0]], matrix, slice->words);
}

void ry_slice_free(struct ry_slice *slice)
{
    free(slice->cells);
    *slice = (struct ry_slice){0};
}

uint64_t ry_packed_bytes(struct ry_repeats repeats, uint64_t rows)
{
    unsigned __int128 bytes = (unsigned __int128)repeats.row_bytes * repeats.distinct;
    bytes = (bytes + 15) / 16 * 16 + 4 * (unsigned __int128)rows;
    return bytes > UINT64_MAX ? UINT64_MAX : (uint64_t)bytes;
}

/* A sixteenth is what packing and writing out again should at least save. */
bool ry_packs(struct ry_repeats repeats, uint64_t rows, uint64_t bytes)
{
    return repeats.row_bytes && rows && repeats.distinct && ry_packed_bytes(repeats, rows) <= bytes - bytes / 16;
}

uint64_t ry_plan_stage_relay(const struct ry_cluster *cluster, int rank, enum ry_strategy strategy,
                             const uint64_t *matrix, const struct ry_repeats *repeats)
{
    const struct ry_strategy_ops *ops = strategies[strategy];
    return ops->stage_relay ? ops->stage_relay(cluster, rank, matrix, ops->repeats ? repeats : NULL) : 0;
}

uint64_t ry_plan_stage_pack(const struct ry_cluster *cluster, int rank, enum ry_strategy strategy, const uint64_t *send,
                            const uintptr_t *send_at, const struct ry_repeats *repeats)
{
    const struct ry_strategy_ops *ops = strategies[strategy];
    return ops->stage_pack ? ops->stage_pack(cluster, rank, send, send_at, ops->repeats ? repeats : NULL) : 0;
}

uint64_t ry_plan_stage_bytes(const struct ry_cluster *cluster, int rank, enum ry_strategy strategy,
                             const uint64_t *matrix, const struct ry_repeats *repeats)
{
    const uint64_t *row = matrix + (size_t)rank * (size_t)cluster->nranks;
    return ry_sum(ry_plan_stage_relay(cluster, rank, strategy, matrix, repeats),
                  ry_plan_stage_pack(cluster, rank, strategy, row, NULL,
                                     repeats ? repeats + (size_t)rank * (size_t)cluster->nnodes : NULL));
}

int ry_plan_stage_all(const struct ry_cluster *cluster, enum ry_strategy strategy, const uint64_t *matrix,
                      const struct ry_repeats *repeats, uint64_t *relay, uint64_t *pack, struct ry_err *err)
{
    const struct ry_strategy_ops *ops = strategies[strategy];
    memset(relay, 0, (size_t)cluster->nranks * sizeof *relay);
    memset(pack, 0, (size_t)cluster->nranks * sizeof *pack);
    return ops->stage_all ? ops->stage_all(cluster, matrix, ops->repeats ? repeats : NULL, relay, pack, err) : 0;
}

/* The slice against what its layout must be and against the own column: both tell what comes from a row's rank. */
static int check_slice(const struct ry_plan_input *in, struct ry_err *err)
{
    const struct ry_strategy_ops *ops = strategies[in->strategy];
    const struct ry_cluster *c = in->cluster;
    const struct ry_slice *s = in->slice;
    int rows = 0, cols = 0, own = -1;
    for (int r = 0; r < c->nranks; r++)
        rows += ops->row(c, in->rank, r);
    if (!rows)
        return 0; /* nothing is needed; whatever is there is not read */
    if (!s)
        return ry_fail(err, "plan of rank %d: strategy %s needs cells of the matrix, but there are none", in->rank,
                       ops->name);
    if (ops->words && s->nwords != ops->words(c, c->node[in->rank]))
        return ry_fail(err, "plan of rank %d: the slice of the matrix has %zu words of strategy %s, not %zu", in->rank, s->nwords,
                       ops->name, ops->words(c, c->node[in->rank]));
    rows = 0;
    for (int r = 0; r < c->nranks; r++) {
        if (ops->row(c, in->rank, r) && (rows >= s->nrows || s->rows[rows++] != r))
            return ry_fail(err, "plan of rank %d: the slice of the matrix lacks the row of rank %d", in->rank, r);
        if (ops->column(c, in->rank, r)) {
            if (cols >= s->ncols || s->cols[cols] != r)
                return ry_fail(err, "plan of rank %d: the slice of the matrix lacks the column of rank %d", in->rank,
                               r);
            own = r == in->rank ? cols : own;
            cols++;
        }
    }
    if (rows != s->nrows || cols != s->ncols)
        return ry_fail(err, "plan of rank %d: the slice of the matrix is %d x %d, not %d x %d", in->rank, s->nrows,
                       s->ncols, rows, cols);
    if (ops->repeats && !s->repeats)
        return ry_fail(err, "plan of rank %d: the slice of the matrix lacks what other ranks found in repeats",
                       in->rank);
    for (int i = 0; own >= 0 && i < rows; i++) {
        uint64_t cell = s->cells[(size_t)i * (size_t)cols + (size_t)own];
        if (cell != in->recv[s->rows[i]])
            return ry_fail(err,
                           "plan of rank %d: its slice of the matrix says that rank %d sends it %llu bytes, but it "
                           "receives %llu",
                           in->rank, s->rows[i], (unsigned long long)cell, (unsigned long long)in->recv[s->rows[i]]);
    }
    return 0;
}

static int check(const struct ry_plan_input *in, struct ry_err *err)
{
    if (in->rank < 0 || in->rank >= in->cluster->nranks)
        return ry_fail(err, "plan: there is no rank %d among %d", in->rank, in->cluster->nranks);
    if ((unsigned)in->strategy >= RY_STRATEGIES)
        return ry_fail(err, "plan of rank %d: there is no strategy %d", in->rank, (int)in->strategy);
    if (in->send[in->rank] != in->recv[in->rank])
        return ry_fail(err, "plan of rank %d: it sends itself %llu bytes, but receives %llu from itself", in->rank,
                       (unsigned long long)in->send[in->rank], (unsigned long long)in->recv[in->rank]);
    if (in->strategy == RY_DEDUP && in->chunks && in->chunks != 1 && in->chunks != 2 && in->chunks != RY_CHUNKS)
        return ry_fail(err, "plan of rank %d: a message is not cut into %d chunks, but into 1, 2 or %d", in->rank,
                       in->chunks, RY_CHUNKS);
    uint64_t out = 0, back = 0;
    for (int r = 0; r < in->cluster->nranks; r++)
        if (__builtin_add_overflow(out, in->send[r], &out) || __builtin_add_overflow(back, in->recv[r], &back))
            return ry_fail(
                err, "plan of rank %d: what it sends or receives adds up to more than 64 bits of bytes (at rank %d)",
                in->rank, r);
    return strategies[in->strategy]->row ? check_slice(in, err) : 0;
}

struct ry_plan *ry_plan_build(const struct ry_plan_input *in, struct ry_err *err)
{
    if (check(in, err))
        return NULL;
    const struct ry_cluster *c = in->cluster;
    const struct ry_strategy_ops *ops = strategies[in->strategy];
    size_t nranks = (size_t)c->nranks, nnodes = (size_t)c->nnodes;
    int *start = malloc((nnodes + nranks) * sizeof *start), *members = start + nnodes;
    if (!start)
        return ry_fail(err, "no memory for the plan of rank %d", in->rank), NULL;
    for (int n = 0, at = 0; n < c->nnodes; at += c->node_size[n++])
        start[n] = at;
    for (int r = 0; r < c->nranks; r++)
        members[start[c->node[r]] + c->local[r]] = r;
    int node = c->node[in->rank];
    struct ry_building b = {
        .in = in,
        .cluster = c,
        .rank = in->rank,
        .node = node,
        .size = c->node_size[node],
        .start = start,
        .members = members,
        .err = err,
        .ops = ops,
        .repeats = ops->repeats ? in->repeats : NULL,
        .chunks = in->strategy == RY_DEDUP && c->nnodes > 1 && c->nnodes < c->nranks && in->chunks ? in->chunks : 1};

    /* The plan and its steps are one block, cut to size when done. */
    struct ry_plan *plan = malloc(sizeof *plan + ops->most_steps(&b) * sizeof *plan->steps);
    if (!plan) {
        free(start);
        return ry_fail(err, "no memory for the plan of rank %d", in->rank), NULL;
    }
    *plan = (struct ry_plan){.strategy = in->strategy, .rank = in->rank, .nranks = c->nranks};
    plan->steps = (struct ry_step *)(plan + 1);
    b.plan = plan;
    int rc = ops->build(&b);
    free(start);
    if (rc) {
        free(plan);
        return NULL;
    }
    struct ry_plan *fit = realloc(plan, sizeof *plan + (size_t)plan->nsteps * sizeof *plan->steps);
    plan = fit ? fit : plan;
    plan->steps = (struct ry_step *)(plan + 1);
    return plan;
}

void ry_plan_free(struct ry_plan *plan)
{
    free(plan);
}
