/*
 * lines.c: see internal.h. Owns: lines, the messages that wait for one to open, and the calling of handlers.
 */
#include <stdio.h>
#include <time.h>

#include "base/clock.h"
#include "control/internal.h"

#define UNCLAIMED_NS 60000000000ull /* messages to a line that is not open here are kept so long, */
#define UNCLAIMED_BYTES (64u << 20) /* and so many bytes of them */

/* ---- what a line is to be told ---- */

const char ry_line_left[] = "it has left the communicator";

static void line_ready(struct ry_line *l)
{
    if (l->ready)
        return;
    l->ready = true;
    atomic_fetch_add(&l->control->ready, 1);
}

static struct way *way_to(struct ry_line *l, uint32_t rank)
{
    return l->rank ? (rank ? NULL : &l->way[0]) : rank < l->nranks ? &l->way[rank] : NULL;
}

static void way_lost(struct ry_line *l, struct way *w, const char *why)
{
    if (w->lost)
        return;
    w->lost = true;
    w->why = why;
    l->untold++;
    line_ready(l);
    ry_wake(l->control);
}

/* All lines that reach a rank by `p` lose it. */
void ry_lines_lose(struct ry_control *c, const struct peer *p)
{
    for (struct ry_line *l = c->lines; l; l = l->next)
        for (uint32_t i = 0; i < l->ways; i++)
            if (l->way[i].peer == p)
                way_lost(l, &l->way[i], p->why);
}

/* ---- messages ---- */

/* A line was not, or is no longer, open here: whoever spoke to it must not wait for an answer. */
static void turn_away(struct ry_control *c, const struct item *i)
{
    if (i->h.kind == BYE || !i->peer)
        return;
    struct header h = {
        .key = i->h.key, .uid = c->uid, .from = i->h.to, .to = i->h.from, .seq = UINT32_MAX, .kind = BYE};
    ry_peer_send(i->peer, &h, NULL, 0);
}

static void line_take(struct ry_line *l, struct item *i)
{
    struct way *w = way_to(l, i->h.from);
    if (!w || w->lost || l->closing)
        goto drop;
    if (!w->known) {
        w->known = true;
        if (l->rank == 0) {
            w->peer = i->peer;
            w->here = !i->peer;
            if (w->peer && w->peer->gone)
                way_lost(l, w, w->peer->why);
        }
    }
    if (w->peer != i->peer) {
        way_lost(l, w, "two processes claim to be this rank");
        goto drop;
    }
    if (i->h.kind == BYE && i->h.seq == UINT32_MAX) {
        way_lost(l, w, "it did not join this communicator's line, or not in time");
        goto drop;
    }
    if (i->h.seq != w->in) {
        way_lost(l, w, "messages from it are missing");
        goto drop;
    }
    w->in++;
    if (i->h.kind == BYE) {
        way_lost(l, w, ry_line_left);
    } else if (i->h.kind == DATA) {
        ry_list_put(&l->inbox, i);
        line_ready(l);
        return;
    }
drop:
    free(i);
}

void ry_lines_deliver(struct ry_control *c, struct item *i)
{
    for (struct ry_line *l = c->lines; l; l = l->next)
        if (l->key == i->h.key && l->rank == i->h.to)
            return line_take(l, i);
    if (i->h.kind == BYE && i->h.seq == UINT32_MAX) {
        free(i);
    } else if (c->unclaimed_bytes + i->size + sizeof *i > UNCLAIMED_BYTES) {
        turn_away(c, i);
        free(i);
    } else {
        c->unclaimed_bytes += i->size + sizeof *i;
        i->born = ry_now_ns();
        ry_list_put(&c->unclaimed, i);
    }
}

static void say(struct ry_line *l, uint32_t to, enum kind kind, const void *bytes, size_t size)
{
    struct way *w = way_to(l, to);
    if (!w || w->lost || (!w->peer && !w->here))
        return;
    struct header h = {.key = l->key, .uid = l->control->uid, .from = l->rank, .to = to, .seq = w->out++, .kind = kind};
    if (w->peer)
        return ry_peer_send(w->peer, &h, bytes, size);
    struct item *i = ry_item_new(&h, NULL, bytes, size);
    if (!i)
        return way_lost(l, w, "out of memory for a message");
    ry_lines_deliver(l->control, i);
    if (!l->control->napping)
        ry_wake(l->control);
}

void ry_line_send(struct ry_line *line, int to, const void *bytes, size_t size)
{
    struct ry_control *c = line->control;
    pthread_mutex_lock(&c->lock);
    if (!line->closing && to >= 0)
        say(line, (uint32_t)to, DATA, bytes, size);
    pthread_mutex_unlock(&c->lock);
}

/* ---- joining and leaving ---- */

static int join_yardmaster(struct ry_line *l, const void *address, size_t size, struct ry_err *err)
{
    struct address_head head;
    uint64_t uid = 0;
    if (address && size >= sizeof head) {
        memcpy(&head, address, sizeof head);
        if (!memcmp(head.magic, "RYCTRL01", 8) && head.ucx_size &&
            (uint64_t)head.watch_size + head.ucx_size + sizeof head == size)
            uid = ry_watch_uid((const char *)address + sizeof head, head.watch_size);
    }
    if (!uid)
        return ry_fail(err, "no address of a yardmaster in %zu bytes: do all ranks run the same version of Railyard?",
                       size);
    if (uid == l->control->uid)
        l->way[0].here = true;
    else if (!(l->way[0].peer = ry_peer_at(l->control, address, &head, uid, err)))
        return -1;
    return 0;
}

static void claim(struct ry_control *c, struct ry_line *l)
{
    struct list rest;
    ry_list_init(&rest);
    for (struct item *i; (i = ry_list_take(&c->unclaimed));) {
        if (i->h.key != l->key || i->h.to != l->rank) {
            ry_list_put(&rest, i);
            continue;
        }
        c->unclaimed_bytes -= i->size + sizeof *i;
        line_take(l, i);
    }
    c->unclaimed = rest;
    if (!rest.first)
        c->unclaimed.end = &c->unclaimed.first;
}

struct ry_line *ry_line_open(struct ry_control *c, uint64_t key, int nranks, int rank, const void *address,
                             size_t address_size, const struct ry_line_handlers *handlers, struct ry_err *err)
{
    if (nranks < 1 || rank < 0 || rank >= nranks) {
        ry_fail(err, "rank %d of %d cannot join a line", rank, nranks);
        return NULL;
    }
    uint32_t ways = rank ? 1 : (uint32_t)nranks;
    struct ry_line *l = calloc(1, sizeof *l + ways * sizeof *l->way);
    if (!l) {
        ry_fail(err, "out of memory for a line of %d ranks", nranks);
        return NULL;
    }
    l->control = c, l->on = *handlers, l->key = key, l->nranks = (uint32_t)nranks, l->rank = (uint32_t)rank,
    l->ways = ways;
    l->wake_at = UINT64_MAX;
    ry_list_init(&l->inbox);
    pthread_mutex_lock(&c->lock);
    for (struct ry_line *other = c->lines; other; other = other->next) {
        if (other->key != key || other->rank != l->rank)
            continue;
        ry_fail(err, "rank %d has joined this line already", rank);
        goto fail;
    }
    if (!rank)
        l->way[0].here = true; /* to itself */
    else if (join_yardmaster(l, address, address_size, err))
        goto fail;
    l->next = c->lines;
    c->lines = l;
    claim(c, l);
    if (rank)
        say(l, 0, HELLO, NULL, 0);
    ry_wake(c);
    pthread_mutex_unlock(&c->lock);
    return l;
fail:
    pthread_mutex_unlock(&c->lock);
    free(l);
    return NULL;
}

static bool in_flight(const struct ry_line *l)
{
    for (uint32_t i = 0; i < l->ways; i++) {
        const struct peer *p = l->way[i].peer;
        if (p && !p->gone && (p->flying || p->queue))
            return true;
    }
    return false;
}

static bool connected(struct ry_line *l, uint32_t rank)
{
    const struct way *w = way_to(l, rank);
    return w && (w->here || (w->peer && w->peer->ep));
}

static void close_line(struct ry_line *l, bool tell_all)
{
    struct ry_control *c = l->control;
    pthread_mutex_lock(&c->lock);
    l->closing = true;
    while (l->dispatching)
        pthread_cond_wait(&c->changed, &c->lock);
    for (uint32_t r = 0; r < l->ways; r++)
        if (l->rank || r) /* not to itself */
            if (tell_all || connected(l, r))
                say(l, r, BYE, NULL, 0);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += RY_FLUSH_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    c->waiters++;
    while (in_flight(l) && !pthread_cond_timedwait(&c->changed, &c->lock, &until))
        ;
    c->waiters--;
    for (struct ry_line **p = &c->lines; *p; p = &(*p)->next) {
        if (*p != l)
            continue;
        *p = l->next;
        break;
    }
    if (l->ready)
        atomic_fetch_sub(&c->ready, 1);
    pthread_mutex_unlock(&c->lock);
    for (struct item *i; (i = ry_list_take(&l->inbox));)
        free(i);
    free(l);
}

void ry_line_close(struct ry_line *l)
{
    close_line(l, true);
}

void ry_line_close_with_all(struct ry_line *l)
{
    close_line(l, false);
}

void ry_line_wake_at(struct ry_line *l, uint64_t ns)
{
    struct ry_control *c = l->control;
    pthread_mutex_lock(&c->lock);
    l->wake_at = ns;
    l->due = false;
    if (ns < c->asleep_until)
        ry_wake(c);
    pthread_mutex_unlock(&c->lock);
}

/* ---- calling the handlers ---- */

/* With the lock; gives it up during each call. */
static void dispatch_line(struct ry_control *c, struct ry_line *l)
{
    uint32_t looked = 0; /* for losses that were not told */
    l->dispatching = true;
    while (!l->closing) {
        struct item *i = ry_list_take(&l->inbox);
        if (i) {
            pthread_mutex_unlock(&c->lock);
            l->on.message(l->on.context, (int)i->h.from, i->bytes, i->size);
            free(i);
        } else if (l->untold) {
            struct way *w = &l->way[looked++ % l->ways];
            if (!w->lost || w->told)
                continue;
            w->told = true;
            l->untold--;
            pthread_mutex_unlock(&c->lock);
            if (l->on.lost)
                l->on.lost(l->on.context, (int)(w - l->way), w->why);
        } else if (l->due) {
            l->due = false;
            pthread_mutex_unlock(&c->lock);
            if (l->on.timer)
                l->on.timer(l->on.context, ry_now_ns());
        } else {
            break;
        }
        pthread_mutex_lock(&c->lock);
    }
    l->dispatching = false;
    if (l->ready) {
        l->ready = false;
        atomic_fetch_sub(&c->ready, 1);
    }
    pthread_cond_broadcast(&c->changed);
}

/* With the lock. Lines that another thread is telling are left to it. */
bool ry_lines_dispatch(struct ry_control *c)
{
    bool any = false;
    if (!atomic_load(&c->ready))
        return false;
    for (struct ry_line *l = c->lines; l; l = l->next) {
        if (!l->ready || l->dispatching || l->closing)
            continue;
        dispatch_line(c, l); /* `l` stays: closing waits for it, and needs the lock */
        any = true;
    }
    return any;
}

/* Timers that have come, messages that nobody claimed; when to look again. */
uint64_t ry_lines_look_at_clock(struct ry_control *c, uint64_t now)
{
    uint64_t next = ry_watch_deadline(c->watch);
    for (struct ry_line *l = c->lines; l; l = l->next) {
        if (l->wake_at <= now) {
            l->wake_at = UINT64_MAX;
            l->due = true;
            line_ready(l);
        }
        next = l->wake_at < next ? l->wake_at : next;
    }
    while (c->unclaimed.first && now - c->unclaimed.first->born >= UNCLAIMED_NS) {
        struct item *i = ry_list_take(&c->unclaimed);
        c->unclaimed_bytes -= i->size + sizeof *i;
        turn_away(c, i);
        free(i);
    }
    if (c->unclaimed.first && c->unclaimed.first->born + UNCLAIMED_NS < next)
        next = c->unclaimed.first->born + UNCLAIMED_NS;
    return next;
}
