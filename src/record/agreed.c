/* agreed.c: see agreed.h. */
#include "agreed.h"

#include <stdlib.h>
#include <string.h>

#define MOST                                                                                                           \
    (1u << 18) /* exchanges of a communicator whose durations are kept: the same ones of all ranks, since files are    \
                  read one after the other */

struct ry_agreed_timed {
    uint64_t number; /* + 1; 0: free */
    uint64_t busy;
    double us;
    int strategy;
    struct ry_agreed_plain plain;
};

void ry_agreed_init(struct ry_trace_agreed *a)
{
    memset(a, 0, sizeof *a);
    a->nstrategies = 1;
}

void ry_agreed_free(struct ry_trace_agreed *a)
{
    free(a->waited.classes);
    free(a->messages.classes);
    free(a->late.classes);
    free(a->durations);
    free(a->table.slots);
}

int ry_agreed_strategy(struct ry_trace_agreed *a, const char *name)
{
    for (int i = 0; i < a->nstrategies; i++)
        if (!strcmp(a->strategy[i], name))
            return i;
    if (a->nstrategies == RY_TRACE_STRATEGIES || strlen(name) >= sizeof a->strategy[0])
        return RY_TRACE_PLAIN;
    strcpy(a->strategy[a->nstrategies], name);
    return a->nstrategies++;
}

void ry_agreed_wait(struct ry_trace_agreed *a, double waited_us, double late_us)
{
    double late = late_us < waited_us ? late_us : waited_us;
    ry_trace_times_add(&a->waited, waited_us);
    ry_trace_times_add(&a->late, late);
    ry_trace_times_add(&a->messages, waited_us - late);
    a->waited_bins[ry_bin_of(waited_us)]++;
    a->messages_bins[ry_bin_of(waited_us - late)]++;
}

/* ---- durations ---- */

static struct ry_agreed_timed *slot_of(struct ry_agreed_table *t, uint64_t number)
{
    uint64_t at = (number + 1) * UINT64_C(0x9e3779b97f4a7c15) >> 20 & (t->room - 1);
    while (t->slots[at].number && t->slots[at].number != number + 1)
        at = (at + 1) & (t->room - 1);
    return &t->slots[at];
}

static bool grow(struct ry_agreed_table *t)
{
    struct ry_agreed_table more = {.room = t->room ? 2 * t->room : 64, .used = t->used};
    if (t->used >= MOST || !(more.slots = calloc(more.room, sizeof *more.slots)))
        return false;
    for (uint64_t i = 0; i < t->room; i++)
        if (t->slots[i].number)
            *slot_of(&more, t->slots[i].number - 1) = t->slots[i];
    free(t->slots);
    *t = more;
    return true;
}

void ry_agreed_duration(struct ry_trace_agreed *a, uint64_t number, int strategy, uint64_t busy, double us,
                        struct ry_agreed_plain plain)
{
    struct ry_agreed_table *t = &a->table;
    if (!t->room && !grow(t))
        return;
    struct ry_agreed_timed *s = slot_of(t, number);
    if (!s->number) {
        if (2 * t->used >= t->room) {
            if (!grow(t))
                return;
            s = slot_of(t, number);
        }
        *s = (struct ry_agreed_timed){number + 1, busy, us, strategy, plain};
        t->used++;
        return;
    }
    /* A rank with little to do may be through before the others have begun. */
    if (busy / 2 > s->busy || (busy >= s->busy / 2 && us < s->us))
        s->us = us;
    s->busy = busy > s->busy ? busy : s->busy;
}

static int by_kind(const void *x, const void *y)
{
    const struct ry_agreed_timed *a = x, *b = y;
    int size = ry_bin_of((double)a->busy) - ry_bin_of((double)b->busy);
    if (size || a->strategy != b->strategy)
        return size ? size : a->strategy - b->strategy;
    return (a->us > b->us) - (a->us < b->us);
}

static bool same_kind(const struct ry_agreed_timed *a, const struct ry_agreed_timed *b)
{
    return a->strategy == b->strategy && ry_bin_of((double)a->busy) == ry_bin_of((double)b->busy);
}

void ry_agreed_finish(struct ry_trace_agreed *a, struct ry_trace_ways *ways)
{
    struct ry_agreed_timed *s = a->table.slots;
    uint64_t n = 0;
    for (uint64_t i = 0; i < a->table.room; i++)
        if (s[i].number)
            s[n++] = s[i];
    for (uint64_t i = 0; i < n; i++) {
        if (!s[i].plain.way || s[i].plain.us <= 0)
            continue;
        struct ry_trace_way *way = &ways->way[s[i].plain.way - 1];
        way->estimated++;
        way->plain_us += s[i].plain.us;
        way->took_us += s[i].us;
    }
    if (n && !(a->durations = calloc((size_t)RY_BINS * RY_TRACE_STRATEGIES, sizeof *a->durations)))
        n = 0;
    if (n)
        qsort(s, n, sizeof *s, by_kind);
    for (uint64_t from = 0, to; from < n; from = to) {
        for (to = from + 1; to < n && same_kind(&s[from], &s[to]);)
            to++;
        a->durations[a->ndurations++] = (struct ry_trace_duration){.strategy = s[from].strategy,
                                                                   .bin = ry_bin_of((double)s[from].busy),
                                                                   .exchanges = to - from,
                                                                   .median_us = s[from + (to - from) / 2].us};
    }
    free(s);
    a->table = (struct ry_agreed_table){0};
}
