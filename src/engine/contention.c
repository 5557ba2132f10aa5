/* contention.c: see contention.h. */
#include "contention.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define KEEPS 0.875 /* of what is known when one more comes: the last eight count for two thirds */

struct seat {
    bool taken;
    uint64_t key;
    int device;
    ry_contention_settled settled;
    void *context;
    _Atomic uint32_t begun, over;
    _Atomic bool much;
    double n, out, in, own_out, own_in, met_us, us; /* sums over its exchanges, older ones counting less */
};

struct record {
    int seat; /* -1: free */
    bool settled;
    struct ry_contention_run run;
    double out, in, met_us; /* of others, beside it */
    uint64_t came_ns;
    uint32_t until[RY_CONTENTION_SEATS]; /* settled once as many of each are over */
};

struct ry_contention {
    _Atomic int members; /* distinct communicators */
    _Atomic uint64_t asked_ns;
    pthread_mutex_t lock; /* guards what follows, but for atomics */
    struct seat seat[RY_CONTENTION_SEATS];
    struct record record[RY_CONTENTION_RECORDS];
    unsigned next;
};

struct ry_contention *ry_contention_new(void)
{
    struct ry_contention *q = calloc(1, sizeof *q);
    if (!q)
        return NULL;
    pthread_mutex_init(&q->lock, NULL);
    for (int i = 0; i < RY_CONTENTION_RECORDS; i++)
        q->record[i].seat = -1;
    return q;
}

void ry_contention_free(struct ry_contention *q)
{
    if (!q)
        return;
    pthread_mutex_destroy(&q->lock);
    free(q);
}

/* ---- coming and going ---- */

static void count_members(struct ry_contention *q)
{
    int n = 0;
    for (int i = 0; i < RY_CONTENTION_SEATS; i++) {
        bool first = q->seat[i].taken;
        for (int k = 0; k < i; k++)
            first &= !q->seat[k].taken || q->seat[k].key != q->seat[i].key;
        n += first;
    }
    atomic_store_explicit(&q->members, n, memory_order_relaxed);
}

int ry_contention_join(struct ry_contention *q, uint64_t key, int device, ry_contention_settled settled, void *context)
{
    int seat = 0;
    pthread_mutex_lock(&q->lock);
    while (seat < RY_CONTENTION_SEATS && q->seat[seat].taken)
        seat++;
    if (seat < RY_CONTENTION_SEATS) {
        struct seat *s = &q->seat[seat];
        s->taken = true, s->key = key, s->device = device, s->settled = settled, s->context = context;
        s->n = s->out = s->in = s->own_out = s->own_in = s->met_us = s->us = 0;
        atomic_store(&s->begun, 0);
        atomic_store(&s->over, 0);
        atomic_store(&s->much, false);
        count_members(q);
    }
    pthread_mutex_unlock(&q->lock);
    return seat < RY_CONTENTION_SEATS ? seat : -1;
}

void ry_contention_leave(struct ry_contention *q, int seat)
{
    if (seat < 0)
        return;
    pthread_mutex_lock(&q->lock);
    q->seat[seat].taken = false;
    for (int i = 0; i < RY_CONTENTION_RECORDS; i++)
        if (q->record[i].seat == seat)
            q->record[i].seat = -1;
    count_members(q);
    pthread_mutex_unlock(&q->lock);
}

/* ---- on the job's threads ---- */

bool ry_contention_several(const struct ry_contention *q, int seat)
{
    return seat >= 0 && atomic_load_explicit(&q->members, memory_order_relaxed) > 1;
}

bool ry_contention_wants(const struct ry_contention *q, int seat, uint64_t now_ns, bool always)
{
    if (!ry_contention_several(q, seat))
        return false;
    uint64_t asked = atomic_load_explicit(&q->asked_ns, memory_order_relaxed);
    return always || (asked && (int64_t)(now_ns - asked) < (int64_t)RY_CONTENTION_LATELY_NS);
}

void ry_contention_began(struct ry_contention *q, int seat)
{
    if (seat >= 0)
        atomic_fetch_add_explicit(&q->seat[seat].begun, 1, memory_order_relaxed);
}

void ry_contention_lost(struct ry_contention *q, int seat)
{
    if (seat >= 0)
        atomic_fetch_add_explicit(&q->seat[seat].over, 1, memory_order_relaxed);
}

bool ry_contention_much(const struct ry_contention *q, int seat)
{
    return seat >= 0 && atomic_load_explicit(&q->seat[seat].much, memory_order_relaxed);
}

/* ---- who met whom ---- */

static bool may_meet(const struct ry_contention *q, int a, int b)
{
    const struct seat *s = &q->seat[a], *t = &q->seat[b];
    return a != b && s->key != t->key && s->device == t->device;
}

static void meet(struct record *a, const struct record *b, double met_us)
{
    double part = met_us * b->run.weight;
    a->met_us += part;
    a->out += (double)b->run.out * part / b->run.us;
    a->in += (double)b->run.in * part / b->run.us;
}

static uint64_t whole(double v)
{
    return v > 0 ? (uint64_t)(v + 0.5) : 0;
}

static struct ry_beside figure(const struct seat *s)
{
    if (!(s->n > 0) || !(s->us > 0) || !(s->met_us > 0))
        return (struct ry_beside){0};
    return (struct ry_beside){.out = whole(s->out / s->n),
                              .in = whole(s->in / s->n),
                              .own_out = whole(s->own_out / s->n),
                              .own_in = whole(s->own_in / s->n),
                              .share = s->met_us / s->us};
}

static void settle_one(struct ry_contention *q, struct record *r)
{
    struct seat *s = &q->seat[r->seat];
    const struct ry_contention_run *run = &r->run;
    struct ry_beside beside = {0};
    double *sums[] = {&s->n, &s->out, &s->in, &s->own_out, &s->own_in, &s->met_us, &s->us};
    double more[] = {1, r->out, r->in, (double)run->out, (double)run->in, r->met_us, run->us};
    r->settled = true;
    for (int i = 0; i < 7; i++)
        *sums[i] = *sums[i] * KEEPS + more[i];
    if (r->met_us > 0)
        beside = (struct ry_beside){whole(r->out), whole(r->in), run->out, run->in, r->met_us / run->us};
    struct ry_beside all = figure(s);
    atomic_store_explicit(&s->much, ry_beside_more(&all) >= RY_BESIDE_MUCH, memory_order_relaxed);
    s->settled(s->context, run->number, run->us, r->met_us < run->us ? r->met_us : run->us, &beside);
}

static bool due(const struct ry_contention *q, const struct record *r, uint64_t now_ns)
{
    if ((int64_t)(now_ns - r->came_ns) >= (int64_t)RY_CONTENTION_WAIT_NS)
        return true;
    for (int i = 0; i < RY_CONTENTION_SEATS; i++)
        if (q->seat[i].taken && may_meet(q, r->seat, i) &&
            (int32_t)(atomic_load_explicit(&q->seat[i].over, memory_order_relaxed) - r->until[i]) < 0)
            return false;
    return true;
}

static void settle(struct ry_contention *q, uint64_t now_ns)
{
    for (unsigned i = 0; i < RY_CONTENTION_RECORDS; i++) {
        struct record *r = &q->record[(q->next + i) % RY_CONTENTION_RECORDS]; /* the oldest first */
        if (r->seat >= 0 && !r->settled && due(q, r, now_ns))
            settle_one(q, r);
    }
}

void ry_contention_took(struct ry_contention *q, int seat, const struct ry_contention_run *run, uint64_t now_ns)
{
    if (seat < 0)
        return;
    pthread_mutex_lock(&q->lock);
    ry_contention_lost(q, seat); /* it is over, whatever it tells */
    bool good = q->seat[seat].taken && run->us > 0 && isfinite(run->us) && isfinite(run->began_us);
    if (good) {
        struct record *r = &q->record[q->next++ % RY_CONTENTION_RECORDS];
        if (r->seat >= 0 && !r->settled)
            settle_one(q, r);
        *r = (struct record){.seat = seat, .run = *run, .came_ns = now_ns};
        for (int i = 0; i < RY_CONTENTION_SEATS; i++)
            r->until[i] = atomic_load_explicit(&q->seat[i].begun, memory_order_relaxed);
        for (int i = 0; i < RY_CONTENTION_RECORDS; i++) {
            struct record *o = &q->record[i];
            if (o->seat < 0 || !may_meet(q, seat, o->seat))
                continue;
            double met = fmin(run->began_us + run->us, o->run.began_us + o->run.us) - fmax(run->began_us, o->run.began_us);
            if (!(met > 0))
                continue;
            meet(r, o, met);
            if (!o->settled)
                meet(o, r, met);
        }
    }
    settle(q, now_ns);
    pthread_mutex_unlock(&q->lock);
}

struct ry_beside ry_contention_of(struct ry_contention *q, int seat, uint64_t now_ns)
{
    struct ry_beside now = {0};
    if (!ry_contention_several(q, seat))
        return now;
    pthread_mutex_lock(&q->lock);
    atomic_store_explicit(&q->asked_ns, now_ns ? now_ns : 1, memory_order_relaxed);
    settle(q, now_ns);
    now = figure(&q->seat[seat]);
    pthread_mutex_unlock(&q->lock);
    return now;
}
