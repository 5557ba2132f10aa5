/*
 * sum.c: what one rank does so that returns can be summed (RAILYARD_COMBINE=sum).
 *
 * Owns: on the way out, counting how often rows occur and keeping what the return will need; on the way back, finding
 * it again and building the plan, before the manifest, so that what cannot be planned is not offered. Not: the rule
 * (pairing.h, returns.h), what is kept on the device and the adding up (run/run.h), the plan (plan/sum.c).
 *
 * Copies are counted in front of the search for equal rows, which is waited for anyway, so nobody ever waits for them;
 * and where the count says that the return will not be summed, nothing is kept.
 */
#include <inttypes.h>

#include "engine.h"

/* Rows so narrow are never looked for on any rank: probabilities, whose returns need no place among what is kept. */
static bool may_return_summed(const struct reissue *r, const struct ry_buffers *b, const struct rows_seen *rows)
{
    return r->pairs.combine.sum && r->talk && rows->direction == RY_GO && ry_run_sums(b->type) &&
           rows->bytes >= RY_LOOK_ROW_FORCED;
}

void ry_sum_count(const struct comm *c, struct reissue *r, const struct ry_buffers *b, const struct rows_seen *rows,
                  uint64_t number)
{
    struct ry_err err;
    if (!may_return_summed(r, b, rows))
        return;
    if (ry_run_copies(r->runner, b, rows->bytes, ry_pairs_wanted(&r->pairs), &err))
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": its return will not be summed: %s", c->id, number,
               err.msg);
}

void ry_sum_keep(const struct comm *c, struct reissue *r, const struct ry_buffers *b, const struct ry_plan *plan,
                 const struct ry_repeats *repeats, const struct rows_seen *rows, uint64_t number)
{
    struct ry_err err;
    struct ry_pair d = {.number = number,
                        .type = b->type,
                        .send = r->send,
                        .recv = r->recv,
                        .slice = r->slices[RY_DEDUP],
                        .repeats = r->repeats};
    /* Where nothing of this rank's was packed, nothing of it is summed, and its rows may be what they are. */
    bool packed = repeats && r->searched.packed < r->searched.cross;
    const char *why = NULL;
    if (!may_return_summed(r, b, rows))
        return;
    if (packed && !ry_run_copies_over(r->runner, &d.copies))
        why = "it is not known how often rows went out";
    else if (!ry_pairs_learn(&r->pairs, &d.copies))
        why = "rows went out unequally often";
    else if (ry_run_keep(r->runner, plan, b, &d.kept, &err))
        why = err.msg;
    if (!repeats)
        d.repeats = NULL;
    if (!why && ry_pairs_add(&r->pairs, r->map, b->rank, &d))
        why = "out of memory";
    if (why)
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": its return will not be summed: %s", c->id, number,
               why);
}

/* Why the exchange at hand may not be summed as the return of r->summing.pair; NULL: it may, and everything is there.
 */
static const char *prepare(struct reissue *r, const struct ry_buffers *b, const struct rows_seen *rows,
                           struct ry_err *err)
{
    struct summing *s = &r->summing;
    const char *why = rows->answered.ambiguous ? "it may answer another exchange as well" : NULL;
    if (!why)
        why = ry_pair_refuses(s->pair, r->map, r->send, r->recv, b->type);
    if (!why)
        why = ry_pairs_copies(&r->pairs, s->pair, &s->copies);
    if (why)
        return why;
    struct ry_plan_input in = {.cluster = r->map,
                               .rank = b->rank,
                               .strategy = RY_SUM,
                               .send = r->send,
                               .recv = r->recv,
                               .slice = &s->pair->slice,
                               .send_at = r->send_at,
                               .recv_at = r->recv_at,
                               .repeats = s->pair->repeats};
    s->plan = ry_plan_build(&in, err);
    return s->plan ? NULL : err->msg;
}

void ry_sum_begin(const struct comm *c, struct reissue *r, struct ry_buffers *b, const struct rows_seen *rows,
                  uint64_t number, bool engaged)
{
    struct ry_err err;
    struct summing *s = &r->summing;
    *s = (struct summing){0};
    if (!rows->answered.any || !(s->pair = ry_pairs_take(&r->pairs, rows->answered.number)) || !engaged || r->quit)
        return;
    const char *why = prepare(r, b, rows, &err);
    b->kept = s->plan ? s->pair->kept : NULL;
    if (why)
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ", the return of %" PRIu64 ": not summed: %s", c->id,
               number, rows->answered.number, why);
}

void ry_sum_offer(const struct reissue *r, struct ry_side *side)
{
    const struct summing *s = &r->summing;
    side->pack[RY_SUM] = s->plan ? s->plan->stage_bytes : 0;
    side->answers = s->plan ? 1 + s->pair->number : 0;
    side->copies = s->copies;
}

struct ry_plan *ry_sum_plan(struct reissue *r, struct ry_err *err)
{
    struct ry_plan *plan = r->summing.plan;
    r->summing.plan = NULL;
    if (!plan)
        ry_fail(err, "it is to be summed, which this rank did not offer");
    return plan;
}

void ry_sum_tell(const struct comm *c, const struct reissue *r, const struct ry_plan *plan,
                 const struct rows_seen *rows, uint64_t number)
{
    struct ry_record_rows line = {.number = number,
                                  .direction = ry_direction_name(rows->direction),
                                  .row_bytes = rows->bytes,
                                  .cross = rows->cross,
                                  .strategy = ry_strategy_name(RY_SUM)};
    for (int i = 0; i < plan->nsteps; i++)
        if (plan->steps[i].kind == RY_STEP_SEND && r->map->node[plan->steps[i].peer] != r->map->node[plan->rank])
            line.packed += plan->steps[i].bytes;
    if (c->record)
        ry_record_rows(ry_engine.record, c->record, &line);
}

void ry_sum_end(struct reissue *r)
{
    ry_plan_free(r->summing.plan);
    ry_pair_free(&r->pairs, r->summing.pair);
    r->summing = (struct summing){0};
}
