/*
 * agree_world.h: a communicator's ranks and yardmaster with nothing between them but a list of letters.
 *
 * Owns: machines, mail in flight, and the rules that mail must obey whatever happens (nobody writes to where there is
 * nobody). Not: when what is delivered, or what the ranks do: the tests decide that.
 */
#ifndef RY_TESTS_AGREE_WORLD_H
#define RY_TESTS_AGREE_WORLD_H

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "control/agree.h"
#include "control/agree_wire.h"

#define MOST_RANKS 8

/* As ck_assert_msg(), which makes a system call for each assertion that holds: too slow for what is checked all the
 * time. */
#define MUST(what, ...) ((what) ? (void)0 : ck_abort_msg(__VA_ARGS__))

struct letter {
    int from, to; /* ranks; the yardmaster, beside its own rank, is YARD */
    size_t size;
    uint8_t *bytes;
};
#define YARD (-1)

struct world;
struct pen { /* whose port it is */
    struct world *w;
    int who;
};

/* What the test's policy says, and what it saw. */
struct leaning {
    bool worth, verify, last;
    int strategy;
    bool bent;        /* what comes with messages is not the test's: do not look at it */
    unsigned rest;    /* so many exchanges beyond the first pass by after the last verdict */
    uint64_t last_at; /* the verdict of this exchange is the last; UINT64_MAX none */
    int asked;        /* worth() calls */
    int chosen;
    uint64_t matrix[MOST_RANKS * MOST_RANKS];
    uint64_t note[4]; /* the slice */
};

struct world {
    int n, yardmaster;
    uint64_t now;
    struct ry_agree *rank[MOST_RANKS];
    struct ry_yard *yard;
    struct pen pen[MOST_RANKS], yard_pen;
    bool silent[MOST_RANKS]; /* failed or left: sends nothing any more */
    bool down[MOST_RANKS];   /* the connection is broken: letters vanish, whether or not its ends know */
    bool cut[MOST_RANKS];    /* the yardmaster was told that it is lost */
    bool spoke[MOST_RANKS];  /* its first letter was delivered */
    struct letter *mail;     /* in the order of sending */
    int nmail, room;
    struct leaning lean;
    uint64_t next[MOST_RANKS]; /* number of the rank's next exchange */
    long sent_to_yard;
};

static inline void world_send(void *context, int to, const void *bytes, size_t size)
{
    struct pen *p = context;
    struct world *w = p->w;
    if (p->who == YARD) {
        MUST(to >= 0 && to < w->n, "the yardmaster writes to rank %d of %d", to, w->n);
        MUST(w->spoke[to], "the yardmaster writes to rank %d, which it never heard", to);
        MUST(!w->cut[to], "the yardmaster writes to rank %d, which is lost", to);
    } else {
        MUST(to == w->yardmaster, "rank %d writes to rank %d, which is not the yardmaster", p->who, to);
        MUST(!w->silent[p->who], "rank %d writes although it is through", p->who);
        w->sent_to_yard++;
    }
    if (w->down[p->who == YARD ? to : p->who])
        return;
    if (w->nmail == w->room)
        w->mail = realloc(w->mail, (size_t)(w->room = w->room ? 2 * w->room : 64) * sizeof *w->mail);
    struct letter *l = &w->mail[w->nmail++];
    *l = (struct letter){.from = p->who, .to = p->who == YARD ? to : YARD, .size = size, .bytes = malloc(size)};
    memcpy(l->bytes, bytes, size);
}

static inline bool world_worth(void *context, uint64_t number, const void *const *seen, const size_t *bytes)
{
    struct world *w = context;
    for (int r = 0; r < w->n; r++)
        if (seen[r] && !w->lean.bent) { /* every rank told of this very exchange */
            uint64_t v;
            MUST(bytes[r] == sizeof v, "rank %d's SEEN is %zu bytes", r, bytes[r]);
            memcpy(&v, seen[r], sizeof v);
            MUST(v == number * 100 + (uint64_t)r, "rank %d's SEEN is of another exchange", r);
        }
    w->lean.asked++;
    return w->lean.worth;
}

static inline int world_choose(void *context, const struct ry_agreed *x, bool *verify, unsigned *rest)
{
    struct world *w = context;
    MUST(x->nranks == w->n, "%d ranks", x->nranks);
    for (int r = 0; r < w->n; r++)
        if (x->extra[r] && !w->lean.bent) {
            MUST(x->extra_bytes[r] == 8, "rank %d's part is %zu bytes", r, x->extra_bytes[r]);
            MUST(*(const uint64_t *)x->extra[r] == x->number * 100 + (uint64_t)r,
                 "rank %d's part is of another exchange", r);
        }
    memcpy(w->lean.matrix, x->matrix, sizeof(uint64_t) * (size_t)(w->n * w->n));
    w->lean.chosen++;
    *verify = w->lean.verify;
    *rest = w->lean.last || x->number == w->lean.last_at ? 1 + w->lean.rest : 0;
    return w->lean.strategy;
}

static inline const void *world_slice(void *context, const struct ry_agreed *x, int strategy, int rank, size_t *size)
{
    struct world *w = context;
    w->lean.note[0] = x->number;
    w->lean.note[1] = (uint64_t)rank;
    w->lean.note[2] = x->matrix[((rank + 1) % x->nranks) * x->nranks + rank]; /* what its neighbour sends it */
    *size = 24;
    return w->lean.note;
}

static inline void world_open(struct world *w, int n, int yardmaster, int engage_after, uint64_t patience)
{
    *w = (struct world){.n = n, .yardmaster = yardmaster, .now = 1000};
    w->lean = (struct leaning){.worth = true, .strategy = 1, .last_at = UINT64_MAX};
    for (int r = 0; r < n; r++) {
        w->pen[r] = (struct pen){w, r};
        struct ry_agree_port port = {&w->pen[r], world_send};
        w->rank[r] = ry_agree_new(n, r, yardmaster, &port);
        MUST(w->rank[r], "out of memory");
    }
    w->yard_pen = (struct pen){w, YARD};
    struct ry_agree_port port = {&w->yard_pen, world_send};
    struct ry_policy policy = {w, world_worth, world_choose, world_slice};
    struct ry_yard_config config = {n, engage_after, patience};
    w->yard = ry_yard_new(&config, &policy, &port);
    MUST(w->yard, "out of memory");
}

static inline void world_close(struct world *w)
{
    for (int i = 0; i < w->nmail; i++)
        free(w->mail[i].bytes);
    free(w->mail);
    for (int r = 0; r < w->n; r++)
        ry_agree_free(w->rank[r]);
    ry_yard_free(w->yard);
}

/* Letter `i` arrives. If `again`, a copy of it stays in the list to come once more. */
static inline void world_deliver(struct world *w, int i, bool again)
{
    struct letter l = w->mail[i];
    if (again) {
        l.bytes = malloc(l.size);
        memcpy(l.bytes, w->mail[i].bytes, l.size);
    } else {
        memmove(w->mail + i, w->mail + i + 1, (size_t)(--w->nmail - i) * sizeof *w->mail);
    }
    struct ry_err err = {""};
    if (l.to == YARD) {
        w->spoke[l.from] = true;
        MUST(ry_yard_message(w->yard, w->now, l.from, l.bytes, l.size, &err) == 0, "%s", err.msg);
    } else {
        MUST(ry_agree_message(w->rank[l.to], l.bytes, l.size, &err) == 0, "%s", err.msg);
    }
    free(l.bytes);
}

static inline void world_flush(struct world *w)
{
    while (w->nmail)
        world_deliver(w, 0, false);
}

/* All letters except those to (or, YARD, from) rank `r`. */
static inline void world_flush_but(struct world *w, int r, bool from_it)
{
    for (int i = 0; i < w->nmail;)
        if ((from_it ? w->mail[i].from : w->mail[i].to) == r)
            i++;
        else
            world_deliver(w, i, false), i = 0;
}

static inline uint64_t world_tick(struct world *w)
{
    return ry_yard_tick(w->yard, w->now);
}

/* Let time pass in the way a control plane does: called whenever the yardmaster asked to be. */
static inline void world_pass(struct world *w, uint64_t ns)
{
    uint64_t until = w->now + ns;
    for (;;) {
        uint64_t next = world_tick(w);
        if (next > until)
            break;
        w->now = next > w->now ? next : w->now + 1;
    }
    w->now = until;
    world_tick(w);
}

/* The connection between the yardmaster and `r` breaks: what is in flight is gone, both sides hear of it. */
static inline void world_cut(struct world *w, int r, bool yard_hears, bool rank_hears)
{
    for (int i = w->nmail - 1; i >= 0; i--)
        if (w->mail[i].from == r || w->mail[i].to == r) {
            free(w->mail[i].bytes);
            memmove(w->mail + i, w->mail + i + 1, (size_t)(--w->nmail - i) * sizeof *w->mail);
        }
    if (yard_hears) {
        w->cut[r] = true;
        ry_yard_lost(w->yard, w->now, r);
    }
    if (rank_hears) {
        ry_agree_fail(w->rank[r], "connection lost");
        w->silent[r] = true;
    }
    w->down[r] = true;
}

/* Rank `r`'s next exchange, all sizes 64 but for what `m` says (NULL: nothing else). */
static inline enum ry_way world_exchange(struct world *w, int r, const struct ry_manifest *as)
{
    uint64_t bytes[MOST_RANKS], x = w->next[r]++, note = x * 100 + (uint64_t)r;
    for (int i = 0; i < w->n; i++)
        bytes[i] = 64;
    struct ry_manifest m = {.type = 7, .ordinal = x};
    if (as)
        m = *as;
    if (!m.send)
        m.send = bytes;
    if (!m.recv)
        m.recv = bytes;
    if (!m.extra)
        m.extra = &note, m.extra_bytes = sizeof note;
    return ry_agree_exchange(w->rank[r], x, &m, &note, sizeof note);
}

#endif
