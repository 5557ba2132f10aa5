/*
 * durations.c: what exchanges took, on its way to whoever learns of it.
 *
 * Owns: what a rank remembers of its latest exchanges until their durations come in (on the sampler's thread), what ran beside them
 * is settled, and the next manifest takes them to the yardmaster; on the yardmaster, the intervals that the pace is made
 * of. Not: the clock (sampler.h), who ran beside whom (contention.h), what is learned (policy.h, pace.h, twin_policy.h).
 */
#include <math.h>
#include <string.h>

#include "base/clock.h"
#include "engine.h"

/* Bytes that this rank moves across nodes, as they go: of those that it gets packed, as large a part as of those that it sends. */
void ry_durations_cross(struct comm *c, const struct reissue *r, const struct way *w, unsigned weight)
{
    bool packed = w->strategy && !strcmp(w->strategy, ry_strategy_name(RY_DEDUP));
    uint64_t in = 0, out = packed ? w->packed_out : w->rows.cross;
    for (int p = 0; p < r->map->nranks; p++)
        in += r->map->node[p] != r->map->node[c->info.rank] ? r->recv[p] : 0;
    if (packed && w->rows.cross)
        in = (uint64_t)((double)in * (double)out / (double)w->rows.cross);
    atomic_store(&c->crossing[w->number % 64].out, out);
    atomic_store(&c->crossing[w->number % 64].in, in);
    atomic_store(&c->crossing[w->number % 64].weight, weight);
    atomic_store(&c->crossing[w->number % 64].number, w->number + 1);
    ry_contention_began(ry_engine.contention, c->seat_beside);
}

/* What became known since the last manifest. */
void ry_durations_tell(struct reissue *r, struct ry_took took[RY_TOOK])
{
    int n = 0;
    for (size_t i = 0; i < sizeof r->moved / sizeof *r->moved && n < RY_TOOK; i++) {
        if (!(atomic_load(&r->moved[i].us) > 0))
            continue;
        took[n++] = (struct ry_took){.number = atomic_load(&r->moved[i].number),
                                     .bytes = atomic_load(&r->moved[i].bytes),
                                     .beside = {.out = atomic_load(&r->moved[i].out),
                                                .in = atomic_load(&r->moved[i].in),
                                                .own_out = atomic_load(&r->moved[i].own_out),
                                                .own_in = atomic_load(&r->moved[i].own_in),
                                                .share = atomic_load(&r->moved[i].share)},
                                     .us = atomic_exchange(&r->moved[i].us, 0)};
    }
}

/* Goes to the yardmaster with the next manifest. */
static void tell_yardmaster(struct comm *c, uint64_t number, double us, const struct ry_beside *beside)
{
    struct reissue *r = atomic_load(&c->reissue);
    if (!r || atomic_load(&r->moved[number % 64].number) != number + 1)
        return;
    atomic_store(&r->moved[number % 64].out, beside->out);
    atomic_store(&r->moved[number % 64].in, beside->in);
    atomic_store(&r->moved[number % 64].own_out, beside->own_out);
    atomic_store(&r->moved[number % 64].own_in, beside->own_in);
    atomic_store(&r->moved[number % 64].share, beside->share);
    atomic_store(&r->moved[number % 64].us, us);
}

/* What ran beside an exchange is known. Calls do not overlap. */
static void settled(void *context, uint64_t number, double us, double met_us, const struct ry_beside *beside)
{
    struct comm *c = context;
    atomic_store(&c->clocked_us, atomic_load(&c->clocked_us) + us);
    atomic_store(&c->met_us, atomic_load(&c->met_us) + met_us);
    tell_yardmaster(c, number, us, beside);
}

void ry_durations_meet_others(struct comm *c)
{
    if (ry_engine.contention)
        c->seat_beside = ry_contention_join(ry_engine.contention, c->key, c->info.device, settled, c);
}

/* On the sampler's thread. */
void ry_durations_took(void *context, uint64_t number, double began_us, double us)
{
    struct comm *c = context;
    struct reissue *r = atomic_load(&c->reissue);
    if (c->record)
        ry_record_duration(ry_engine.record, c->record, number, us);
    if (r)
        ry_twins_took(r->twins, number, us);
    struct ry_contention_run run = {number, began_us, us, atomic_load(&c->crossing[number % 64].out),
                                    atomic_load(&c->crossing[number % 64].in), atomic_load(&c->crossing[number % 64].weight)};
    bool met = atomic_load(&c->crossing[number % 64].number) == number + 1;
    if (met)
        ry_contention_took(ry_engine.contention, c->seat_beside, &run, ry_now_ns());
    if (!met || !isfinite(began_us))
        tell_yardmaster(c, number, us, &(struct ry_beside){0});
}

/* On the sampler's thread. */
static void followed(void *context, uint64_t number, double began_us, double us)
{
    struct comm *c = context;
    struct reissue *r = atomic_load(&c->reissue);
    if (r && r->pace)
        ry_pace_took(r->pace, number, us);
}

static uint64_t busier_way(const struct ry_exchange *x)
{
    uint64_t sent = 0, got = 0;
    for (int p = 0; p < x->nranks; p++) {
        sent += x->send_count[p];
        got += x->recv_count[p];
    }
    return (sent > got ? sent : got) * x->type_bytes;
}

/* On the yardmaster: the time from the end of the last exchange to the end of this one, if both went the same way, and the
   start of the next such interval. What is tried to find out is neither one. */
void ry_durations_pace(struct comm *c, struct reissue *r, const struct way *w, const struct ry_exchange *x, bool ok)
{
    bool plain = !w->strategy && !atomic_load_explicit(&c->face.hold, memory_order_relaxed);
    ok = ok && !w->together && !w->redirected; /* which are neither this communicator's agreement nor NCCL alone */
    enum ry_pace_way way = plain ? RY_PACE_PLAIN : RY_PACE_ENGAGED;
    bool good = ok && !w->captured && (plain || (w->strategy && !w->timed)), wanted = good && ry_pace_wants(r->pace, way);
    uint64_t bytes = wanted || (good && r->pacing.sample) ? busier_way(x) : 0;
    if (r->pacing.sample) {
        bool follows = good && r->pacing.way == way && r->pacing.number + 1 == w->number && r->pacing.stream == x->stream;
        if (follows)
            ry_pace_began(r->pace, w->number, way, r->pacing.bytes, bytes,
                          ry_contention_much(ry_engine.contention, c->seat_beside));
        ry_sampler_end(ry_engine.sampler, r->pacing.sample, x->stream, follows, followed, c, w->number);
    }
    r->pacing.sample = wanted ? ry_sampler_begin(ry_engine.sampler, c->info.device, x->stream) : NULL;
    r->pacing.number = w->number, r->pacing.bytes = bytes, r->pacing.way = way, r->pacing.stream = x->stream;
}
