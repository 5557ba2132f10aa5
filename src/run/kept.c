/*
 * kept.c: the index lists of packed messages that a relay passed on, kept until the rows come back to be summed.
 *
 * Owns: which messages of a plan those are, their share of the staging limit, whether a step may sum by them. Not: the
 * lists and the sums themselves (sums.c).
 */
#include "internal.h"

#include <stdlib.h>

#include "sums.h"

struct ry_kept {
    struct ry_sums *sums;
    uint64_t bytes;
    int n;
    struct of {
        int peer; /* whose message it was: no two of one rank */
        struct ry_repeats repeats;
        uint64_t rows;
    } of[]; /* [n] */
};

bool ry_run_sums(int type)
{
    return ry_sums_element(type) > 0;
}

uint64_t ry_run_sums_bytes(int type)
{
    return ry_sums_element(type);
}

/* A plan says so of what a relay receives: the whole message, or its list, and where it begins. */
static bool is_packed(const struct ry_step *s)
{
    return s->kind == RY_STEP_RECV && s->repeats.row_bytes && s->to.place == RY_AT_STAGE;
}

static int list_messages(const struct ry_runner *r, const struct ry_plan *plan, struct ry_kept *kept,
                         struct ry_sums_message *messages, struct ry_err *err)
{
    for (int i = 0; i < plan->nsteps; i++) {
        const struct ry_step *s = &plan->steps[i];
        if (!is_packed(s))
            continue;
        uint64_t bytes = ry_rows_message_bytes(s->repeats.row_bytes, s->repeats.distinct, s->rows),
                 skipped = s->to.offset - s->from.offset;
        if (s->from.place != RY_AT_STAGE || s->to.offset < s->from.offset || s->bytes + skipped != bytes ||
            bytes > r->stage_bytes || s->from.offset > r->stage_bytes - bytes)
            return ry_fail(err, "step %d of the plan receives a message that is none", i);
        kept->of[kept->n] = (struct of){s->peer, s->repeats, s->rows};
        messages[kept->n++] = (struct ry_sums_message){.message = (const char *)r->stage + s->from.offset,
                                                       .row_bytes = s->repeats.row_bytes,
                                                       .distinct = s->repeats.distinct,
                                                       .rows = s->rows};
    }
    return 0;
}

static int keep(struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b, struct ry_kept *kept,
                struct ry_sums_message *messages, struct ry_err *err)
{
    if (list_messages(r, plan, kept, messages, err))
        return -1;
    uint64_t bytes = ry_sums_memory(messages, kept->n);
    if (bytes == UINT64_MAX)
        return ry_fail(err, "more than %llu rows", (unsigned long long)RY_ROWS_MOST);
    if (!ry_run_staging_reserve(bytes))
        return ry_fail(err,
                       "%llu bytes more are needed to keep which rows are equal, beyond what is left: raise "
                       "RAILYARD_STAGING",
                       (unsigned long long)bytes);
    if (staging_enter(r, b->stream, err) || !(kept->sums = ry_sums_keep(r->rows, messages, kept->n, b->stream, err))) {
        ry_run_staging_unreserve(bytes);
        return -1;
    }
    kept->bytes = bytes;
    return staging_leave(r, b->stream, err);
}

int ry_run_keep(struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b, struct ry_kept **out,
                struct ry_err *err)
{
    size_t n = 0;
    *out = NULL;
    if (!r->rows)
        return ry_fail(err, "Railyard's kernels are not loaded");
    if (plan->rank != b->rank || plan->nranks != b->nranks)
        return ry_fail(err, "a plan for rank %d of %d does not fit rank %d of %d", plan->rank, plan->nranks, b->rank,
                       b->nranks);
    for (int i = 0; i < plan->nsteps; i++)
        n += is_packed(&plan->steps[i]);
    struct ry_kept *kept = calloc(1, sizeof *kept + n * sizeof *kept->of);
    struct ry_sums_message *messages = calloc(n + 1, sizeof *messages);
    int rc = kept && messages ? keep(r, plan, b, kept, messages, err) : ry_fail(err, "out of memory");
    free(messages);
    if (rc) {
        ry_kept_free(kept);
        return -1;
    }
    *out = kept;
    return 0;
}

uint64_t ry_kept_bytes(const struct ry_kept *kept)
{
    return kept ? kept->bytes : 0;
}

void ry_kept_free(struct ry_kept *kept)
{
    if (!kept)
        return;
    ry_sums_free(kept->sums);
    ry_run_staging_unreserve(kept->bytes);
    free(kept);
}

/* ---- steps ---- */

static int find(const struct ry_kept *kept, int peer)
{
    for (int i = 0; kept && i < kept->n; i++)
        if (kept->of[i].peer == peer)
            return i;
    return -1;
}

int kept_check(const struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b,
               const struct ry_step *s, struct ry_err *err)
{
    uint64_t size = ry_sums_element(b->type), bytes, message;
    int i = find(b->kept, s->peer);
    if (!r->rows)
        return ry_fail(err, "Railyard's kernels are not loaded");
    if (i < 0)
        return ry_fail(err, "no list was kept of what rank %d sent", s->peer);
    const struct of *of = &b->kept->of[i];
    if (of->repeats.row_bytes != s->repeats.row_bytes || of->repeats.distinct != s->repeats.distinct ||
        of->rows != s->rows)
        return ry_fail(err, "the list that was kept of what rank %d sent is another one", s->peer);
    if (!size || s->repeats.row_bytes % size)
        return ry_fail(err, "rows of %llu bytes of NCCL's type %d cannot be summed",
                       (unsigned long long)s->repeats.row_bytes, b->type);
    message = ry_rows_message_bytes(s->repeats.row_bytes, s->repeats.distinct + 1, s->rows);
    if (s->to.place != RY_AT_STAGE || s->bytes != message || message > plan->stage_bytes ||
        s->to.offset > plan->stage_bytes - message || ((uintptr_t)r->stage + s->to.offset) % 16)
        return ry_fail(err, "its message does not fit the staging memory");
    if (__builtin_mul_overflow(s->rows, s->repeats.row_bytes, &bytes))
        return ry_fail(err, "its rows do not fit");
    if (s->from.place == RY_AT_STAGE)
        return bytes <= plan->stage_bytes && s->from.offset <= plan->stage_bytes - bytes &&
                       (s->from.offset + bytes <= s->to.offset || s->to.offset + message <= s->from.offset)
                   ? 0
                   : ry_fail(err, "its rows do not fit the staging memory");
    return s->from.place == RY_AT_SEND && s->from.peer >= 0 && s->from.peer < b->nranks && b->send[s->from.peer] &&
                   bytes <= b->send_bytes[s->from.peer] && s->from.offset <= b->send_bytes[s->from.peer] - bytes
               ? 0
               : ry_fail(err, "its rows do not fit the job's buffers");
}

uint64_t kept_job(const struct ry_kept *kept, int peer, struct ry_sums_job *job)
{
    job->message = find(kept, peer);
    const struct of *of = &kept->of[job->message];
    return of->rows * of->repeats.row_bytes;
}

int kept_sum(struct ry_runner *r, const struct ry_buffers *b, const struct ry_sums_job *jobs, int n, struct ry_err *err)
{
    return ry_sums_add(r->rows, b->kept->sums, b->type, jobs, n, b->stream, err);
}
