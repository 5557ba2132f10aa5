/*
 * look.c: looking for equal rows in what an exchange sends to other nodes.
 *
 * Owns: what is known of the rows of the exchange at hand (width, direction); starting a search where one is due
 * (repeats.h), its answer, whether somebody waits for it or it is picked up at a later exchange; telling the trace.
 * Not: the search (run/run.h), what comes of it (exchange.c).
 *
 * A search runs on the exchange's stream, in front of it. Who waits for the answer waits for all that the job enqueued
 * there before, on the calling thread: as in plan and agreement nothing here depends on which thread that is.
 */
#include <inttypes.h>
#include <sched.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#include "base/clock.h"
#include "engine.h"

#define SPIN_NS 2000000 /* most searches are over by then, where the stream has little before them */
#define MOST_WAIT 1.0 /* seconds */

void ry_look_see(struct comm *c, struct reissue *r, const struct ry_exchange *x, struct rows_seen *rows)
{
    *rows = (struct rows_seen){0};
    rows->elems = ry_row_width_see(&c->rows, x->send_count, x->recv_count, x->type_bytes, &rows->source);
    rows->bytes = ry_row_width_search(rows->elems * x->type_bytes, rows->source);
    rows->direction = ry_directions_see(&c->directions, x->ordinal, x->send_count, x->recv_count, x->nranks,
                                        x->type_bytes, &rows->answered);
    if (!r)
        return;
    rows->habit = ry_habits_next(&r->habits, rows->direction, rows->bytes);
    for (int p = 0; p < x->nranks; p++)
        if (r->map->node[p] != r->map->node[x->rank])
            rows->cross += r->send[p];
}

static void tell(const struct comm *c, const struct searched *s)
{
    struct ry_record_rows line = {.number = s->number,
                                  .direction = ry_direction_name(s->direction),
                                  .row_bytes = s->row_bytes,
                                  .rows = s->sums.rows,
                                  .distinct = s->sums.distinct,
                                  .zero = s->sums.zero,
                                  .cross = s->cross,
                                  .packed = s->packed,
                                  .waited_us = s->waited_us,
                                  .strategy = s->strategy};
    if (c->record)
        ry_record_rows(ry_engine.record, c->record, &line);
}

/* The answer is there: what would cross if all that pays were packed. */
static bool take_answer(const struct comm *c, struct reissue *r, struct searched *s)
{
    struct ry_err err;
    struct ry_load load;
    if (ry_run_scan_wait(r->runner, r->repeats, &s->sums, &err)) {
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": the search for equal rows failed: %s", c->id,
               s->number, err.msg);
        return false;
    }
    ry_load_of(&load, r->map, c->info.rank, s->send, s->send, r->repeats);
    s->packed = load.packed_out;
    ry_habits_found(&r->habits, s->direction, s->row_bytes, s->cross, s->packed);
    return true;
}

void ry_look_pick_up(const struct comm *c, struct reissue *r)
{
    struct searched *s = &r->searched;
    if (!s->aside || !ry_run_scan_over(r->runner))
        return;
    s->aside = false;
    if (take_answer(c, r, s))
        tell(c, s);
}

bool ry_look(const struct comm *c, struct reissue *r, const struct ry_buffers *b, const struct rows_seen *rows,
             uint64_t number, bool engaged)
{
    struct ry_err err;
    struct searched *s = &r->searched;
    int forced = atomic_load(&ry_engine.forced);
    engaged &= forced < 0 || forced == RY_DEDUP; /* else nobody has a use for the answer now */
    if (s->aside && !engaged)
        return false; /* one at a time */
    enum ry_look look = ry_habits_look(&r->habits, rows->habit, rows->cross, engaged, forced == RY_DEDUP);
    if (look == RY_LOOK_NOT || (look == RY_LOOK_ASIDE && s->aside))
        return false;
    bool captured = true; /* a search answers once, a graph runs many times */
    if (ry_engine.device->stream_capturing(b->stream, &captured, NULL) || captured)
        return false;
    s->aside = false; /* what nobody waited for is given up for what somebody waits for */
    if (look == RY_LOOK_FIRST)
        ry_sum_count(c, r, b, rows, number);
    if (ry_run_scan(r->runner, r->map, b, rows->bytes, r->parts, &err)) {
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": no search for equal rows: %s", c->id, number,
               err.msg);
        ry_habit_failed(rows->habit);
        return false;
    }
    *s = (struct searched){.aside = look == RY_LOOK_ASIDE,
                           .number = number,
                           .direction = rows->direction,
                           .row_bytes = rows->bytes,
                           .cross = rows->cross,
                           .send = s->send};
    memcpy(s->send, b->send_bytes, (size_t)b->nranks * sizeof *s->send);
    return look == RY_LOOK_FIRST;
}

/* What the job enqueued before may wait for other ranks, and these, in a job that is made so, for this one to go on:
   then looking must end, and early enough for the others not to lose their patience. */
static uint64_t longest_wait_ns(void)
{
    double patience = ry_engine.settings.patience / 4;
    return (uint64_t)((patience < MOST_WAIT ? patience : MOST_WAIT) * 1e9);
}

bool ry_look_wait(const struct comm *c, struct reissue *r, const struct rows_seen *rows)
{
    struct searched *s = &r->searched;
    uint64_t begun = ry_now_ns(), waited = 0;
    int slack = -1;
    bool over;
    while (!(over = ry_run_scan_over(r->runner)) && !atomic_load(&r->aborted) && waited <= longest_wait_ns()) {
        waited = ry_now_ns() - begun;
        if (waited < SPIN_NS) {
            sched_yield();
            continue;
        }
        if (slack < 0 && (slack = prctl(PR_GET_TIMERSLACK)) >= 0)
            prctl(PR_SET_TIMERSLACK, 1000ul); /* or a nap takes 50 us longer, and the exchange with it */
        nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
    }
    if (slack >= 0)
        prctl(PR_SET_TIMERSLACK, (unsigned long)slack);
    if (!over && atomic_load(&r->aborted)) /* its stream may never get there */
        return false;
    if (!over) {
        ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": not waited any longer for its equal rows", c->id,
               s->number);
        ry_habit_failed(rows->habit);
        s->aside = true;
        return false;
    }
    s->waited_us = (double)(ry_now_ns() - begun) / 1e3;
    return take_answer(c, r, s);
}

void ry_look_done(const struct comm *c, struct reissue *r, struct rows_seen *rows, bool waited, const char *strategy,
                  bool packed)
{
    struct searched *s = &r->searched;
    if (s->aside)
        s->strategy = s->strategy ? s->strategy : strategy; /* told when it is picked up */
    if (strategy && rows->habit)
        ry_habit_went(rows->habit, packed);
    if (!waited)
        return;
    s->strategy = strategy;
    ry_habit_used(rows->habit, packed);
    tell(c, s);
}

/* Not every exchange is asked about with SEEN, and the ones that are may all be of the same kind: so SEEN tells of the
   one since the last that packing would save most of. */
void ry_look_expect(struct reissue *r, const struct rows_seen *rows, int rank)
{
    double saving = ry_habit_share(rows->habit) * (double)rows->cross;
    if (saving <= r->promising.saving)
        return;
    ry_load_of(&r->promising.load, r->map, rank, r->send, r->recv, NULL);
    r->promising.load.scanned = r->promising.load.cross_out;
    r->promising.load.packed_out = rows->cross - (uint64_t)saving;
    r->promising.saving = saving;
}
