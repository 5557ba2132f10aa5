/*
 * sampler.c: see sampler.h. A fixed array of samples, each with an atomic state; whoever moves a state on owns the sample:
 * FREE → TAKEN (job) → FLYING (job) → FREE (watcher). The watcher looks now and then while anything flies.
 *
 * When a sample began is the time since an event that the watcher recorded on an idle stream of its own. Drivers give times between
 * events as 32-bit floating point numbers of milliseconds, half a microsecond apart after eight seconds; so every half a minute
 * another event takes over, which samples under way will not have begun before.
 */
#include "sampler.h"

#include <math.h>

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/thread.h"

#define SAMPLES 256
#define CLOCKS 16      /* devices of one process whose samples know when they began */
#define CLOCK_US 30e6  /* that an event serves, */
#define HANDOVER_US 5e6 /* and how old the next one must be: no exchange takes longer, or it is not told when it began */
#define LOOK_MS 20 /* nobody waits for a duration; each look asks the driver, whose locks the job wants */

enum { FREE, TAKEN, FLYING };

struct ry_sample {
    _Atomic int state;
    int ordinal; /* of the device its events were made on */
    struct ry_event *start, *stop;
    ry_sampler_done done;
    void *context;
    uint64_t number;
};

struct clock {
    bool used, failed;
    int ordinal;
    void *stream;
    struct ry_event *zero, *next; /* next: NULL, or recorded to take over */
    double zero_us;               /* on the clock */
};

struct ry_sampler {
    const struct ry_device *device;
    pthread_t thread;
    pthread_mutex_t lock; /* held while samples are looked at and delivered; never taken by [job] functions */
    sem_t work;
    _Atomic bool stop;
    _Atomic unsigned next;
    _Atomic int flying;
    _Atomic bool clock;
    struct clock clocks[CLOCKS]; /* the watcher's */
    struct ry_sample samples[SAMPLES];
};

static void drop_events(struct ry_sampler *s, struct ry_sample *p)
{
    if (p->start)
        s->device->event_destroy(p->start);
    if (p->stop)
        s->device->event_destroy(p->stop);
    p->start = p->stop = NULL;
    p->ordinal = -1;
}

static bool make_events(struct ry_sampler *s, struct ry_sample *p, int ordinal)
{
    if (p->start && p->ordinal == ordinal) /* a communicator's device may be unknown, which is -1 too */
        return true;
    drop_events(s, p);
    if (s->device->event_create(&p->start, NULL) || s->device->event_create(&p->stop, NULL)) {
        drop_events(s, p);
        return false;
    }
    p->ordinal = ordinal;
    return true;
}

void ry_sampler_clock(struct ry_sampler *s)
{
    if (!atomic_load_explicit(&s->clock, memory_order_relaxed))
        atomic_store(&s->clock, true);
}

/* ---- the clock ---- */

static struct ry_event *mark(struct ry_sampler *s, const struct clock *k)
{
    struct ry_event *ev = NULL;
    if (s->device->event_create(&ev, NULL))
        return NULL;
    if (!s->device->event_record(ev, k->stream, NULL))
        return ev;
    s->device->event_destroy(ev);
    return NULL;
}

/* Made at the first look that finds it wanted: what began before that does not know when. */
static struct clock *clock_of(struct ry_sampler *s, int ordinal)
{
    for (int i = 0; i < CLOCKS; i++) {
        struct clock *k = &s->clocks[i];
        if (k->used && k->ordinal == ordinal)
            return k->failed ? NULL : k;
        if (k->used)
            continue;
        *k = (struct clock){.used = true, .failed = true, .ordinal = ordinal};
        if ((ordinal >= 0 && s->device->use(ordinal, NULL)) || s->device->stream_create(&k->stream, NULL) ||
            !(k->zero = mark(s, k)))
            return NULL;
        k->failed = false;
        return k;
    }
    return NULL;
}

static void hand_over(struct ry_sampler *s, struct clock *k, double now_us)
{
    double at;
    bool done = false;
    if (!k->next && now_us > CLOCK_US && (k->ordinal < 0 || !s->device->use(k->ordinal, NULL)))
        k->next = mark(s, k);
    else if (k->next && !s->device->event_done(k->next, &done, NULL) && done &&
             !s->device->event_elapsed(k->zero, k->next, &at, NULL) && now_us > at + HANDOVER_US) {
        s->device->event_destroy(k->zero);
        k->zero = k->next;
        k->next = NULL;
        k->zero_us += at;
    }
}

/* When a sample that is done began; `us` it took. */
static double began(struct ry_sampler *s, const struct ry_sample *p, double us)
{
    double at;
    struct clock *k = atomic_load_explicit(&s->clock, memory_order_relaxed) ? clock_of(s, p->ordinal) : NULL;
    if (!k || s->device->event_elapsed(k->zero, p->start, &at, NULL) || !(at >= 0))
        return NAN;
    double us_at = k->zero_us + at;
    hand_over(s, k, at + us);
    return us_at;
}

struct ry_sample *ry_sampler_begin(struct ry_sampler *s, int ordinal, void *stream)
{
    bool capturing = true;
    if (s->device->stream_capturing(stream, &capturing, NULL) || capturing)
        return NULL;
    /* Prefer a free pair whose events are of this device already; take any in the last resort. */
    unsigned at = atomic_fetch_add_explicit(&s->next, 1, memory_order_relaxed);
    for (unsigned i = 0; i < 16; i++) {
        struct ry_sample *p = &s->samples[(at + i) % SAMPLES];
        int expected = FREE;
        if (!atomic_compare_exchange_strong_explicit(&p->state, &expected, TAKEN, memory_order_acquire,
                                                     memory_order_relaxed))
            continue;
        if (make_events(s, p, ordinal) && !s->device->event_record(p->start, stream, NULL))
            return p;
        atomic_store_explicit(&p->state, FREE, memory_order_release);
        return NULL;
    }
    return NULL;
}

void ry_sampler_end(struct ry_sampler *s, struct ry_sample *p, void *stream, int ok, ry_sampler_done done,
                    void *context, uint64_t number)
{
    if (!ok || s->device->event_record(p->stop, stream, NULL)) {
        atomic_store_explicit(&p->state, FREE, memory_order_release);
        return;
    }
    p->done = done, p->context = context, p->number = number;
    atomic_store_explicit(&p->state, FLYING, memory_order_release);
    if (atomic_fetch_add_explicit(&s->flying, 1, memory_order_relaxed) == 0)
        sem_post(&s->work);
}

/* Deliver what is done; with `context`, drop all of its samples besides. */
static void look(struct ry_sampler *s, const void *context)
{
    for (int i = 0; i < SAMPLES; i++) {
        struct ry_sample *p = &s->samples[i];
        if (atomic_load_explicit(&p->state, memory_order_acquire) != FLYING)
            continue;
        bool done = false;
        double us;
        bool broken = s->device->event_done(p->stop, &done, NULL) != 0;
        if (done && !broken && !s->device->event_elapsed(p->start, p->stop, &us, NULL))
            p->done(p->context, p->number, began(s, p, us), us);
        if (done || broken || (context && p->context == context)) {
            if (!done)
                drop_events(s, p); /* a pair that is still pending must not be recorded anew yet */
            atomic_fetch_sub_explicit(&s->flying, 1, memory_order_relaxed);
            atomic_store_explicit(&p->state, FREE, memory_order_release);
        }
    }
}

static void *watch(void *arg)
{
    struct ry_sampler *s = arg;
    s->device->relax_thread();
    while (!atomic_load(&s->stop)) {
        if (!atomic_load_explicit(&s->flying, memory_order_relaxed)) {
            sem_wait(&s->work);
            continue;
        }
        pthread_mutex_lock(&s->lock);
        look(s, NULL);
        pthread_mutex_unlock(&s->lock);
        nanosleep(&(struct timespec){.tv_nsec = LOOK_MS * 1000000}, NULL);
    }
    return NULL;
}

struct ry_sampler *ry_sampler_start(const struct ry_device *device, struct ry_err *err)
{
    struct ry_sampler *s = calloc(1, sizeof *s);
    if (!s) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    s->device = device;
    for (int i = 0; i < SAMPLES; i++)
        s->samples[i].ordinal = -1;
    pthread_mutex_init(&s->lock, NULL);
    sem_init(&s->work, 0, 0);
    int e = ry_thread_start(&s->thread, watch, s);
    if (e) {
        ry_fail(err, "cannot start the sampler thread: %s", strerror(e));
        free(s);
        return NULL;
    }
    pthread_setname_np(s->thread, "ry-sampler");
    return s;
}

void ry_sampler_forget(struct ry_sampler *s, void *context)
{
    pthread_mutex_lock(&s->lock);
    look(s, context);
    pthread_mutex_unlock(&s->lock);
}

void ry_sampler_stop(struct ry_sampler *s)
{
    atomic_store(&s->stop, true);
    sem_post(&s->work);
    pthread_join(s->thread, NULL);
    look(s, NULL);
}
