/*
 * exchange.c: the way of one exchange, from the job's outermost ncclGroupEnd to its last byte.
 *
 * Owns: the order in which the parts are asked. Not: what they do.
 *
 *   ry_exchange_begin()  numbers it.
 *   ry_exchange_take()   A short one that nobody asks about passes at once. by_twins(): perhaps it goes out together with other
 *                        communicators (twins.h). Else:
 *                        ry_exchange_describe() this rank's side and what its rows are; where that is due, look for equal ones (look.c);
 *                        agree() with the other ranks (control/talk.h), which may wait: for the search, for the others; where all
 *                        agreed on another strategy than direct, carry_out(): build the plan (plan/plan.h) and enqueue it on
 *                        the caller's stream (run/run.h), once, if all are to, after a communicator of the node's ranks was made
 *                        (node_comm.h). Otherwise the preload passes the exchange on to NCCL as it is. What a summed return
 *                        takes besides is in sum.c: ry_sum_begin() before all this finds what it answers, ry_sum_keep()
 *                        after a packed exchange keeps what its return will need.
 *                        May start the clock (sampler.c), once nothing is waited for any more. Where the job has asked for its
 *                        rows to go elsewhere, all that is done to another exchange in its place (redirect.h).
 *   ry_exchange_end()    records it, and stops the clock; what it took goes to the yardmaster, who also times from one end to
 *                        the next (durations.c).
 *
 * With RAILYARD_HOLD=no the thread that the job calls on may be spared all of that (later.h): ry_exchange_take() then gives the
 * exchange away, and ry_exchange_carry() does take and end, and what the preload would have done between them, on another
 * thread and another stream.
 *
 * Between a verdict and its plan nothing may be left to chance: the other ranks go the same way whatever happens here. So
 * memory is held before the manifest is sent, and what fails all the same makes the job's call fail, with a line that says
 * why, instead of letting this rank go direct alone and hang the job or mix up its data.
 */
#include <inttypes.h>
#include <string.h>

#include "base/clock.h"
#include "engine.h"

enum { NCCL_OK = 0, NCCL_SYSTEM_ERROR = 2, NCCL_IN_PROGRESS = 7 };

/* Of the exchange at hand on this thread. */
static __thread struct way now;

/* ---- begin ---- */

/* A call into the driver: only for exchanges that are recorded or agreed on. */
static void ask_captured(const struct ry_exchange *x)
{
    if (ry_engine.device)
        ry_engine.device->stream_capturing(x->stream, &now.captured, NULL);
}

void *ry_exchange_begin(void *handle, const struct ry_exchange *x)
{
    struct comm *c = handle;
    if (!ry_engine_enter())
        return NULL;
    now.number = x->ordinal; /* counts those, too, that were not told of here */
    now.wall_ns = c->record ? ry_wall_ns() : 0;
    now.passed = now.captured = now.together = now.timed = now.met = now.given_away = now.cross = now.redirected = false;
    now.strategy = NULL;
    now.verify = false;
    now.node = RY_NODE_NOTHING;
    now.waited_us = now.late_us = now.twins_us = now.twins_late_us = now.plain_us = 0;
    now.rows = (struct rows_seen){0};
    now.sample = NULL;
    if (c->record)
        ask_captured(x);
    ry_engine_leave();
    return c;
}

/* The clock starts when the exchange is enqueued, not when it begins to be agreed on. */
static void start_clock(struct comm *c, const struct ry_exchange *x, const struct reissue *r)
{
    bool turn = ry_engine.settings.sample && now.number % ry_engine.settings.sample == 0;
    bool large = now.met && now.rows.cross >= RY_CONTENTION_LARGE;
    if (!ry_engine.sampler || now.captured || !(now.timed || turn || large))
        return;
    now.sample = ry_sampler_begin(ry_engine.sampler, c->info.device, x->stream);
    now.met &= now.sample != NULL;
    if (now.met)
        ry_durations_cross(c, r, &now, large ? 1 : turn ? (unsigned)ry_engine.settings.sample : 0);
}

/* ---- take ---- */

/* This rank's side of the exchange, in bytes. */
struct ry_buffers ry_exchange_describe(struct reissue *r, const struct ry_exchange *x)
{
    for (int p = 0; p < x->nranks; p++) {
        r->send[p] = x->send_count[p] * x->type_bytes;
        r->recv[p] = x->recv_count[p] * x->type_bytes;
        r->send_at[p] = (uintptr_t)x->send_buf[p];
        r->recv_at[p] = (uintptr_t)x->recv_buf[p];
    }
    return (struct ry_buffers){.nranks = x->nranks,
                               .rank = x->rank,
                               .send = x->send_buf,
                               .recv = x->recv_buf,
                               .send_bytes = r->send,
                               .recv_bytes = r->recv,
                               .stream = x->stream,
                               .type = x->type};
}

/* What verify mode found since the last exchange. */
void ry_exchange_look_at_checks(struct comm *c, struct reissue *r)
{
    struct ry_mismatch bad;
    uint64_t equal;
    if (ry_run_checks(r->runner, &equal, &bad) && !r->quit) {
        if (bad.peer < 0)
            ry_warn("communicator %s: a packed message that came by exchange %" PRIu64 " names rows that it does not hold: what "
                    "was received is incomplete. Railyard keeps off this communicator from here. Please report this",
                    c->id, bad.number);
        else
            ry_warn("communicator %s: exchange %" PRIu64 " differs from plain NCCL in what came from rank %d, from byte %" PRIu64
                    " on: Railyard keeps off this communicator from here. Please report this",
                    c->id, bad.number, bad.peer, bad.offset);
        ry_talk_leave(r->talk);
        ry_twins_leave(r->twins, false);
        r->quit = true;
    }
    r->verified += equal;
}

/* More staging memory, before this rank tells what it has. */
static void grow_staging(const struct comm *c, struct reissue *r, void *stream)
{
    struct ry_err err;
    if (r->staging_wanted > ry_run_staging(r->runner) && ry_run_staging_grow(r->runner, r->staging_wanted, stream, &err))
        ry_log(RY_LOG_PLAN, "communicator %s: %s", c->id, err.msg);
    r->staging_wanted = 0;
}

/* The yardmaster is to be told how long the exchange at hand takes. */
static void expect_duration(struct reissue *r)
{
    uint64_t sent = 0, got = 0;
    for (int p = 0; p < r->map->nranks; p++) {
        sent += r->send[p];
        got += r->recv[p];
    }
    atomic_store(&r->moved[now.number % 64].number, now.number + 1);
    atomic_store(&r->moved[now.number % 64].bytes, sent > got ? sent : got);
    atomic_store(&r->moved[now.number % 64].us, 0);
}

/* `repeats`: what was found equal in what goes to each node, or NULL. */
static struct ry_side side_of(struct comm *c, struct reissue *r, const struct ry_exchange *x, const struct ry_repeats *repeats)
{
    struct ry_side side = {0};
    ry_durations_tell(r, side.took);
    side.messages_us = ry_waits_quantile(&r->messages, 0.5);
    side.node_comm = ry_later_node(c, ry_node_comm_state(r->node));
    side.staging = ry_run_staging(r->runner);
    side.cross = ry_across_state(r->across);
    side.cross_held = ry_across_held(r->across);
    for (int i = 0; i < RY_STRATEGIES; i++)
        side.pack[i] = ry_plan_stage_pack(r->map, x->rank, (enum ry_strategy)i, r->send, r->send_at, repeats);
    ry_load_of(&side.load, r->map, x->rank, r->send, r->recv, repeats);
    side.load.beside = ry_contention_of(ry_engine.contention, c->seat_beside, ry_now_ns());
    side.cannot_pack = !ry_run_packs(r->runner);
    side.row_bytes = repeats ? now.rows.bytes : 0;
    side.parts = repeats ? (uint64_t)ry_parts(&repeats[r->map->node[x->rank]]) : 0;
    return side;
}

/* Has this rank promised nothing to its own yardmaster? (The twins' has a bit of its own.) */
static bool observing(const struct comm *c)
{
    return !(atomic_load_explicit(&c->face.hold, memory_order_acquire) & 1u);
}

/* What SEEN carries; `plain`: the exchange at hand is NCCL's, and will be timed. */
static struct ry_seen seen_of(struct reissue *r, const struct ry_side *side, bool plain)
{
    struct ry_seen seen = {.side = *side, .own = side->load, .plain = plain};
    if (r->promising.saving > 0)
        seen.side.load = r->promising.load, seen.side.load.beside = side->load.beside;
    r->promising.saving = 0;
    return seen;
}

static bool agree(struct comm *c, struct reissue *r, const struct ry_exchange *x, const struct ry_buffers *b,
                  const struct ry_repeats *repeats, struct ry_verdict *verdict)
{
    bool able = x->held && !now.captured && !r->quit;
    if (able)
        grow_staging(c, r, x->stream);
    struct ry_side side = side_of(c, r, x, repeats);
    now.packed_out = side.load.packed_out;
    ry_sum_offer(r, &side);
    struct ry_seen seen = seen_of(r, &side, !now.captured);
    bool observes = observing(c);
    struct ry_manifest m = {.not_me = !able || !ry_run_safe(b),
                            .one_call = x->one_call,
                            .type = x->type,
                            .send = r->send,
                            .recv = r->recv,
                            .ordinal = x->ordinal,
                            .sent = x->sent,
                            .received = x->received,
                            .extra = r->manifest,
                            .extra_bytes = ry_side_pack(r->manifest, &side, r->map->nnodes, repeats)};
    if (!ry_talk_exchange(r->talk, now.number, &m, &seen, sizeof seen, verdict, &now.waited_us)) {
        if (observes && !now.captured) { /* it was seen: how long does plain NCCL take? */
            expect_duration(r);
            now.timed = true;
        }
        return false;
    }
    now.late_us = (double)verdict->waited_ns / 1e3;
    ry_waits_add(&r->waits, now.waited_us);
    if (!verdict->last) /* where the end of the engagement decided, nobody knows what the wait was for */
        ry_waits_add(&r->messages, now.waited_us - now.late_us);
    return true;
}

/* The plan of the verdict, from what this rank was told of the other ranks' counts and found itself. */
static struct ry_plan *plan_of(struct reissue *r, const struct ry_verdict *verdict, int rank,
                               const struct ry_repeats *repeats, struct ry_err *err)
{
    enum ry_strategy strategy = (enum ry_strategy)verdict->strategy;
    if (strategy == RY_SUM)
        return ry_sum_plan(r, err);
    struct ry_slice *slice = &r->slices[strategy];
    if ((!slice->rows && ry_slice_init(slice, r->map, rank, strategy, err)) ||
        ry_order_unpack(slice, verdict->extra, verdict->extra_bytes, err))
        return NULL;
    struct ry_plan_input in = {.cluster = r->map,
                               .rank = rank,
                               .strategy = strategy,
                               .send = r->send,
                               .recv = r->recv,
                               .slice = slice,
                               .send_at = r->send_at,
                               .recv_at = r->recv_at,
                               .repeats = repeats,
                               .chunks = now.chunks};
    return ry_plan_build(&in, err);
}

/* What the yardmaster wants besides. */
static void obey(struct reissue *r, const struct ry_verdict *verdict)
{
    struct ry_order order = {0};
    if (verdict->extra_bytes >= sizeof order)
        memcpy(&order, verdict->extra, sizeof order);
    r->staging_wanted = order.staging_wanted;
    ry_across_want(r->across, order.cross_wanted);
    now.cross = order.cross && verdict->strategy != RY_DIRECT;
    now.timed |= order.timed;
    now.node = (enum ry_node_order)order.node_comm;
    now.chunks = (int)order.chunks;
    if (order.parts && !r->pairs.combine.sum) /* sums are not made of parts */
        r->parts = (int)order.parts;
    now.plain_us = verdict->strategy == RY_DIRECT ? 0 : order.plain_us;
    expect_duration(r);
}

/* Enqueue it, `plan` NULL telling that it could not be built, as `why` says. True: it is under way, and NCCL has nothing against it. */
static bool run_plan(struct comm *c, const struct reissue *r, const struct ry_exchange *x, const struct ry_buffers *b,
                     const struct ry_plan *plan, struct ry_run_node *node, struct ry_err *why, int *result)
{
    start_clock(c, x, r);
    ry_run_cross(r->runner, now.cross ? ry_across_face(r->across, now.number) : NULL);
    if (plan && !(now.verify ? ry_run_verify(r->runner, plan, b, node, now.number, result, why)
                             : ry_run(r->runner, plan, b, node, result, why)))
        return !*result;
    ry_log(RY_LOG_ERROR, "communicator %s, exchange %" PRIu64 " fails on rank %d, while the other ranks go on: %s", c->id,
           now.number, x->rank, why->msg);
    *result = NCCL_SYSTEM_ERROR;
    return false;
}

static void carry_out(struct comm *c, struct reissue *r, const struct ry_exchange *x, const struct ry_buffers *b,
                      const struct ry_verdict *verdict, const struct ry_repeats *repeats, int *result)
{
    struct ry_err err;
    struct ry_run_node *node = now.node == RY_NODE_USE ? ry_node_comm_face(r->node) : NULL;
    struct ry_plan *plan = plan_of(r, verdict, x->rank, repeats, &err);
    bool good = run_plan(c, r, x, b, plan, node, &err, result);
    if (good && plan->strategy == RY_DEDUP && !now.redirected) /* its return will not be */
        ry_sum_keep(c, r, b, plan, repeats, &now.rows, now.number);
    else if (good && plan->strategy == RY_SUM)
        ry_sum_tell(c, r, plan, &now.rows, now.number);
    r->carried_out[verdict->strategy]++;
    r->over_node += node != NULL;
    r->over_ucx += now.cross;
    ry_plan_free(plan);
}

/* As all ranks do now. False: the job aborts, and NCCL must not be asked for anything more on this communicator. */
static bool make_node_comm(const struct reissue *r, const struct ry_exchange *x)
{
    if (r->node) /* else this rank did not say that it could, and is not asked */
        ry_node_comm_make(r->node, x->stream, ry_engine.settings.patience / 4, &r->aborted);
    return !atomic_load(&r->aborted);
}

/* From the search for equal rows to the plan. True: it was carried out, *result is the job's. */
static bool reissue(struct comm *c, struct reissue *r, const struct ry_exchange *x, const struct ry_buffers *b, int *result)
{
    struct ry_verdict verdict;
    ry_look_pick_up(c, r);
    bool looks = !r->quit && !r->summing.plan && ry_look(c, r, b, &now.rows, now.number, x->held);
    if (!x->held)
        ry_look_expect(r, &now.rows, x->rank);
    if (!r->talk || now.passed || ry_talk_passes(r->talk, now.number)) {
        r->searched.aside |= looks; /* the engagement has just ended */
        ry_look_done(c, r, &now.rows, false, NULL, false);
        return false;
    }
    if (!c->record)
        ask_captured(x);
    ry_exchange_look_at_checks(c, r);
    looks = looks && ry_look_wait(c, r, &now.rows);
    const struct ry_repeats *repeats = looks ? r->repeats : NULL;
    bool taken = false, agreed = agree(c, r, x, b, repeats, &verdict);
    if (agreed) {
        now.strategy = ry_strategy_name((enum ry_strategy)verdict.strategy);
        ry_twins_went(r->twins, now.number, verdict.strategy);
        now.verify = verdict.verify && verdict.strategy != RY_DIRECT;
        obey(r, &verdict);
        taken = verdict.strategy != RY_DIRECT;
        if (taken && now.node == RY_NODE_MAKE && !make_node_comm(r, x))
            *result = NCCL_SYSTEM_ERROR;
        else if (taken)
            carry_out(c, r, x, b, &verdict, repeats, result);
        else if (*verdict.reason)
            ry_log(RY_LOG_PLAN, "communicator %s, exchange %" PRIu64 ": direct: %s", c->id, now.number, verdict.reason);
    }
    ry_look_done(c, r, &now.rows, looks, now.strategy, agreed && verdict.strategy == RY_DEDUP);
    return taken;
}

/* Whether rows repeat must be known even while twins go by replica: each for itself may come to be better. Nobody waits for it. */
static void look_beside(struct comm *c, struct reissue *r, const struct ry_buffers *b)
{
    ry_look_pick_up(c, r);
    if (!r->quit)
        ry_look(c, r, b, &now.rows, now.number, false);
    ry_look_done(c, r, &now.rows, false, ry_strategy_name(RY_REPLICA), false);
}

/* An exchange that goes together with the twins: all ranks of the communicator do that, so that nobody waits there. Its own yardmaster is told what
   it would have liked to know, so that by the time it is asked it has something to say. */
static void tell_own(struct comm *c, struct reissue *r, const struct ry_exchange *x)
{
    struct ry_verdict none;
    struct ry_seen seen;
    double waited;
    bool observes = observing(c);
    ry_look_expect(r, &now.rows, x->rank);
    if (now.passed || ry_talk_passes(r->talk, now.number))
        return;
    if (observes) {
        struct ry_side side = side_of(c, r, x, NULL);
        seen = seen_of(r, &side, false);
    }
    ry_talk_exchange(r->talk, now.number, NULL, observes ? &seen : NULL, observes ? sizeof seen : 0, &none, &waited);
}

/* Together with the communicator's twins, if all their ranks agree on that. True: it was carried out, *result is the job's. */
static bool by_twins(struct comm *c, struct reissue *r, const struct ry_exchange *x, const struct ry_buffers *b, int *result)
{
    struct ry_twins_verdict v;
    struct ry_twins_wait wait;
    if (!r->twins)
        return false;
    ry_exchange_look_at_checks(c, r);
    uint64_t repeated = now.rows.habit ? (uint64_t)(ry_habit_share(now.rows.habit) * (double)now.rows.cross) : 0;
    now.together = ry_twins_agree(r->twins, x, b, now.number, now.rows.cross - repeated, &v, &wait);
    now.timed = wait.timed;
    if (!now.together) {
        ry_twins_went(r->twins, now.number, RY_DIRECT); /* unless something else is agreed on */
        now.twins_us = wait.asked ? wait.waited_us : 0;
        now.twins_late_us = wait.late_us;
        return false;
    }
    now.waited_us = wait.waited_us;
    now.late_us = wait.late_us;
    look_beside(c, r, b);
    tell_own(c, r, x);
    ry_waits_add(&r->waits, now.waited_us);
    ry_waits_add(&r->messages, now.waited_us - now.late_us);
    now.strategy = ry_strategy_name(RY_REPLICA);
    now.verify = v.verify;
    now.plain_us = v.plain_us;
    now.cross = v.cross;
    run_plan(c, r, x, b, v.plan, v.node, &v.why, result);
    r->carried_out[RY_REPLICA]++;
    r->over_ucx += now.cross;
    ry_plan_free(v.plan);
    return true;
}

/*
 * Short ones, one after the other, of which nothing is recorded and nobody asks: all that is found out about rows would be for nothing, and what
 * that costs is mostly code and data that are not in the caches. No search is made for so few bytes, but on demand of a verdict. Between a
 * short one and a long one all is looked at: their ratio tells how wide rows are.
 */
static bool passes_quietly(struct comm *c, struct reissue *r, const struct ry_exchange *x)
{
    uint64_t sent = 0, got = 0;
    for (int p = 0; p < x->nranks; p++) {
        sent += r->send[p];
        got += r->recv[p];
    }
    bool before = r->short_before;
    r->short_before = sent < RY_LOOK_BYTES && got < RY_LOOK_BYTES;
    if (!before || !r->short_before || !r->talk || c->record || x->held || now.redirected || r->searched.aside || r->pairs.combine.sum)
        return false;
    now.passed = ry_talk_passes(r->talk, now.number);
    if (!now.passed || !ry_twins_pass(r->twins, now.number))
        return false;
    ry_row_width_note(&c->rows, x->send_count, x->recv_count);
    return true;
}

/* `x` as the job has it; `y` as it goes: the same, unless it was redirected. */
static bool take(struct comm *c, const struct ry_exchange *x, const struct ry_exchange *y, int *result)
{
    struct reissue *r = atomic_load_explicit(&c->reissue, memory_order_acquire);
    bool taken = false;
    struct ry_buffers b;
    if (r)
        b = ry_exchange_describe(r, y);
    bool quietly = r && passes_quietly(c, r, y);
    if ((r || c->record) && !quietly)
        ry_look_see(c, r, x, &now.rows);
    now.met = r && r->talk && ry_contention_several(ry_engine.contention, c->seat_beside) &&
              ry_contention_wants(ry_engine.contention, c->seat_beside, ry_now_ns(), c->record != NULL);
    if (now.met)
        ry_sampler_clock(ry_engine.sampler);
    if (r && !quietly) {
        taken = by_twins(c, r, y, &b, result);
        if (!taken) {
            ry_sum_begin(c, r, &b, &now.rows, now.number, y->held && !now.redirected);
            taken = reissue(c, r, y, &b, result);
            ry_sum_end(r);
        }
    }
    /* nobody asks how long others take */
    if (!taken && (c->record || now.strategy || now.timed || now.met))
        start_clock(c, y, r);
    return taken;
}

/* Its rows go elsewhere (redirect.h); or they do not, or it fails. True: *result is the job's. */
static bool take_redirected(struct comm *c, const struct ry_exchange *x, int *result)
{
    struct reissue *r = atomic_load_explicit(&c->reissue, memory_order_acquire);
    const struct ry_exchange *y = ry_redirect_begin(c, r, x, result);
    now.redirected = y != x;
    if (!now.redirected)
        return take(c, x, x, result);
    if (!y)
        return true;
    if (!take(c, x, y, result))
        *result = atomic_load(&r->aborted) ? NCCL_SYSTEM_ERROR : ry_engine.host.plain(c->info.nccl, y);
    ry_redirect_end(c, r, x, result);
    return true;
}

bool ry_exchange_take(void *handle, const struct ry_exchange *x, void *cookie, int *result)
{
    struct comm *c = handle;
    if (!cookie || !ry_engine_enter())
        return false;
    bool taken = now.given_away = ry_later_take(c, x, &now, result);
    if (taken)
        now.gather_count = 0;
    else
        taken = take_redirected(c, x, result);
    ry_engine_leave();
    return taken;
}

/* ---- end ---- */

static void end(struct comm *c, const struct ry_exchange *x, int result)
{
    bool ok = result == NCCL_OK || result == NCCL_IN_PROGRESS;
    if (ok && c->record) {
        struct ry_record_exchange r = {.number = now.number,
                                       .wall_ns = now.wall_ns,
                                       .type = x->type,
                                       .type_bytes = x->type_bytes,
                                       .one_call = x->one_call,
                                       .captured = now.captured,
                                       .send_count = x->send_count,
                                       .recv_count = x->recv_count,
                                       .gather_count = now.gather_count,
                                       .strategy = now.strategy,
                                       .waited_us = now.waited_us + now.twins_us,
                                       .late_us = now.late_us + now.twins_late_us,
                                       .plain_us = now.plain_us,
                                       .verify = now.verify,
                                       .row_elems = now.rows.elems,
                                       .row_source = now.rows.source,
                                       .direction = ry_direction_name(now.rows.direction)};
        memcpy(r.gather_comm, now.gather_comm, sizeof r.gather_comm);
        ry_record_exchange(ry_engine.record, c->record, &r);
        now.gather_count = 0;
    }
    /* After the record: a duration must not come before its exchange. While NCCL still works on a group in the background
       (ncclInProgress) its kernels are not on the stream yet, and the end cannot be marked. */
    if (now.sample)
        ry_sampler_end(ry_engine.sampler, now.sample, x->stream, result == NCCL_OK, ry_durations_took, c, now.number);
    if (now.sample && now.met && result != NCCL_OK)
        ry_contention_lost(ry_engine.contention, c->seat_beside);
    struct reissue *r = atomic_load_explicit(&c->reissue, memory_order_acquire);
    if (r && r->pace)
        ry_durations_pace(c, r, &now, x, result == NCCL_OK);
}

void ry_exchange_end(void *handle, const struct ry_exchange *x, void *cookie, int result)
{
    if (!cookie || now.given_away || !ry_engine_enter())
        return;
    struct comm *c = handle;
    struct reissue *r = atomic_load_explicit(&c->reissue, memory_order_acquire);
    end(c, now.redirected && r && !result ? &r->redirected.x : x, result); /* as it went */
    ry_engine_leave();
}

int ry_exchange_carry(struct comm *c, const struct ry_exchange *x, const struct way *way)
{
    const struct reissue *r = atomic_load_explicit(&c->reissue, memory_order_acquire);
    int result = NCCL_OK;
    now = *way;
    if (!take(c, x, x, &result)) /* NCCL must not see a communicator that is being aborted: its handle may be gone */
        result = r && !atomic_load(&r->aborted) ? ry_engine.host.plain(c->info.nccl, x) : NCCL_SYSTEM_ERROR;
    end(c, x, result);
    return result;
}

/* ---- seen from afar (plugin/profiler.c) ---- */

void *ry_exchange_clock(void *handle, uint64_t ordinal, void *stream)
{
    const struct comm *c = handle;
    struct ry_sample *sample = NULL;
    if (!ry_engine_enter())
        return NULL;
    if (ry_engine.sampler && ordinal % ry_engine.settings.sample == 0)
        sample = ry_sampler_begin(ry_engine.sampler, c->info.device, stream);
    ry_engine_leave();
    return sample;
}

void ry_exchange_seen(void *handle, const struct ry_exchange *x, void *clock, uint64_t wall_ns, bool ok)
{
    struct comm *c = handle;
    if (!ry_engine_enter())
        return;
    if (!x) {
        if (clock)
            ry_sampler_end(ry_engine.sampler, clock, NULL, false, NULL, NULL, 0);
        ry_engine_leave();
        return;
    }
    now.number = x->ordinal;
    now.wall_ns = wall_ns;
    now.captured = now.timed = now.met = now.verify = now.given_away = now.redirected = false;
    now.strategy = NULL;
    now.waited_us = now.late_us = now.plain_us = 0;
    now.sample = clock;
    ry_look_see(c, NULL, x, &now.rows);
    ry_exchange_end(handle, x, c, ok ? NCCL_OK : NCCL_SYSTEM_ERROR);
    ry_engine_leave();
}

/* ---- besides ---- */

void ry_exchange_stray(void *handle)
{
    struct comm *c = handle;
    struct reissue *r = atomic_load_explicit(&c->reissue, memory_order_acquire);
    if (!r || !r->talk || !ry_engine_enter())
        return;
    ry_talk_stray(r->talk);
    ry_twins_stray(r->twins);
    ry_engine_leave();
}

void ry_exchange_aborting(void *handle)
{
    struct comm *c = handle;
    struct reissue *r = atomic_load_explicit(&c->reissue, memory_order_acquire);
    if (!r || !ry_engine_enter())
        return;
    atomic_store(&r->aborted, true);
    ry_node_comm_abort(r->node);
    ry_across_abort(r->across);
    ry_twins_leave(r->twins, true);
    if (r->talk)
        ry_talk_leave(r->talk);
    ry_later_aborting(c);
    ry_engine_leave();
}

void ry_exchange_int64_allgather(void *handle, uint64_t count)
{
    const struct comm *c = handle;
    memcpy(now.gather_comm, c->id, sizeof now.gather_comm);
    now.gather_count = count;
}
