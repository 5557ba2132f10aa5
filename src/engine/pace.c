/* pace.c: see pace.h. */
#include "pace.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define UNDER_WAY 256 /* intervals that may be measured at a time; a power of two */
#define LEAST_WINDOW 16
#define MOST_WINDOW 256
#define MOST_GAP (64 * RY_PACE_GAP)

struct kind {
    uint32_t key; /* 1 + classes of both exchanges, and whether others ran beside; 0: free */
    uint32_t seen[RY_PACE_WAYS];
    float us[RY_PACE_WAYS][RY_PACE_MEMORY];
};

struct ry_pace {
    _Atomic int wanted; /* plain ones */
    /* What is under way, one word each, so that the job's thread takes no lock: 32 bits of 1 + number, 16 of the kind,
     * the way. */
    _Atomic uint64_t under_way[UNDER_WAY];
    pthread_mutex_t lock; /* guards what follows */
    struct kind kind[RY_PACE_KINDS];
    uint64_t plain_at; /* one past the latest plain exchange measured since watching began; 0: none */
    int watches;       /* in a row that left too little known */
    uint64_t gap, due; /* exchanges from one watch to the next; the number it is due at */
};

struct ry_pace *ry_pace_new(void)
{
    struct ry_pace *p = calloc(1, sizeof *p);
    if (p)
        pthread_mutex_init(&p->lock, NULL);
    return p;
}

void ry_pace_free(struct ry_pace *p)
{
    if (!p)
        return;
    pthread_mutex_destroy(&p->lock);
    free(p);
}

bool ry_pace_wants(const struct ry_pace *p, enum ry_pace_way way)
{
    return way == RY_PACE_ENGAGED || atomic_load_explicit(&p->wanted, memory_order_relaxed) > 0;
}

static unsigned class_of(uint64_t bytes)
{
    return bytes ? 64 - (unsigned)__builtin_clzll(bytes) : 0;
}

void ry_pace_began(struct ry_pace *p, uint64_t number, enum ry_pace_way way, uint64_t before, uint64_t bytes, bool beside)
{
    uint64_t kind = (uint64_t)beside << 14 | class_of(before) << 7 | class_of(bytes);
    if (way == RY_PACE_PLAIN)
        atomic_fetch_sub_explicit(&p->wanted, 1, memory_order_relaxed);
    atomic_store_explicit(&p->under_way[number % UNDER_WAY], (number + 1) << 32 | kind << 8 | (uint64_t)way,
                          memory_order_release);
}

static struct kind *find(struct ry_pace *p, uint32_t key)
{
    for (int i = 0; i < RY_PACE_KINDS; i++) {
        if (!p->kind[i].key)
            p->kind[i].key = key;
        if (p->kind[i].key == key)
            return &p->kind[i];
    }
    return NULL; /* too many of them: what is left out counts for neither way */
}

void ry_pace_took(struct ry_pace *p, uint64_t number, double us)
{
    uint64_t word = atomic_exchange_explicit(&p->under_way[number % UNDER_WAY], 0, memory_order_acquire);
    if (word >> 32 != (uint32_t)(number + 1) || !(us > 0) || !isfinite(us))
        return;
    enum ry_pace_way way = (enum ry_pace_way)(word & 0xFF);
    pthread_mutex_lock(&p->lock);
    struct kind *k = find(p, 1 + (uint32_t)(word >> 8 & 0xFFFF));
    if (k)
        k->us[way][k->seen[way]++ % RY_PACE_MEMORY] = (float)us;
    if (way == RY_PACE_PLAIN)
        p->plain_at = number + 1;
    pthread_mutex_unlock(&p->lock);
}

static void forget(struct ry_pace *p, enum ry_pace_way way)
{
    for (int i = 0; i < RY_PACE_KINDS; i++)
        p->kind[i].seen[way] = 0;
}

void ry_pace_changed(struct ry_pace *p)
{
    pthread_mutex_lock(&p->lock);
    forget(p, RY_PACE_ENGAGED);
    pthread_mutex_unlock(&p->lock);
}

static double median(const struct kind *k, enum ry_pace_way way)
{
    float sorted[RY_PACE_MEMORY];
    uint32_t n = k->seen[way] < RY_PACE_MEMORY ? k->seen[way] : RY_PACE_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = i;
        for (; at > 0 && sorted[at - 1] > k->us[way][i]; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = k->us[way][i];
    }
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

/* The time of engaged exchanges over that of plain ones; 0: too little is known. */
static double compare(const struct ry_pace *p)
{
    double engaged = 0, plain = 0, all = 0;
    for (int i = 0; i < RY_PACE_KINDS; i++) {
        const struct kind *k = &p->kind[i];
        double count = k->seen[RY_PACE_ENGAGED];
        if (!(count > 0))
            continue;
        double us = count * median(k, RY_PACE_ENGAGED);
        all += us;
        if (k->seen[RY_PACE_ENGAGED] < RY_PACE_ENOUGH || k->seen[RY_PACE_PLAIN] < RY_PACE_ENOUGH)
            continue;
        engaged += us;
        plain += count * median(k, RY_PACE_PLAIN);
    }
    return engaged > 0 && engaged >= RY_PACE_SHARE * all ? engaged / plain : 0;
}

/* How many it takes to learn enough of plain exchanges, by the kinds seen while engaged. */
static unsigned window(const struct ry_pace *p)
{
    unsigned kinds = 0;
    for (int i = 0; i < RY_PACE_KINDS; i++)
        kinds += p->kind[i].seen[RY_PACE_ENGAGED] > 0;
    unsigned n = 2 * RY_PACE_ENOUGH * kinds; /* twice: they do not come equally often */
    return n < LEAST_WINDOW ? LEAST_WINDOW : n > MOST_WINDOW ? MOST_WINDOW : n;
}

static unsigned watch(struct ry_pace *p, uint64_t number)
{
    forget(p, RY_PACE_PLAIN);
    p->plain_at = 0;
    p->watches++;
    p->gap = !p->gap ? RY_PACE_GAP : p->gap < MOST_GAP ? 2 * p->gap : MOST_GAP;
    p->due = number + p->gap;
    unsigned n = window(p);
    atomic_store_explicit(&p->wanted, (int)n, memory_order_relaxed);
    return n;
}

enum ry_pace_advice ry_pace_ask(struct ry_pace *p, uint64_t number, bool engaged, double *ratio, unsigned *rest)
{
    enum ry_pace_advice advice = RY_PACE_STAY;
    *rest = 0;
    pthread_mutex_lock(&p->lock);
    *ratio = compare(p);
    bool fresh = p->plain_at && number<p->plain_at + RY_PACE_FRESH, gains = *ratio> 0 && *ratio <= 1 - RY_PACE_GAIN;
    if (*ratio > 0 && fresh) {
        p->watches = 0;
        advice = gains ? RY_PACE_STAY : RY_PACE_LEAVE;
    } else if (engaged && (!gains || number >= p->due) && p->watches < RY_PACE_WATCHES) {
        *rest = watch(p, number);
        advice = RY_PACE_WATCH;
    }
    pthread_mutex_unlock(&p->lock);
    return advice;
}
