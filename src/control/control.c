/*
 * control.c: see control.h.
 *
 * One mutex, `lock`, guards everything here and is held around every call of UCX, by the progress thread, by threads
 * that send, and by those that lend a hand: UCX then needs no locks (which would spin) of its own, and the order of
 * messages is the order in which senders took it. UCX's callbacks run under it and only put messages into a line's
 * inbox; the line's handlers are called afterwards, without it (dispatch()).
 *
 * Another process is a *peer*, under the number of its slot in `peers`. To a yardmaster's process we make the peer;
 * those who made us theirs get another slot here, even if it is the same process. A peer begins with a tie (watch.h);
 * what is sent before that is up waits, so that whoever is heard of is also watched.
 */
#include "control/control.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <time.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/thread.h"
#include "control/tame.h"
#include "control/watch.h"

#define AM_ID 0
#define NAP_NS 500000ull            /* between looks while others poll, or UCX cannot sleep */
#define FLUSH_NS 100000000ull       /* what closing may take */
#define UNCLAIMED_NS 60000000000ull /* messages to a line that is not open here are kept so long, */
#define UNCLAIMED_BYTES (64u << 20) /* and so many bytes of them */

enum kind { HELLO, DATA, BYE };

/* Goes before every message. Both ends are of one machine type, as NCCL demands. */
struct header {
    uint64_t key, uid; /* of the line; of the sending process */
    uint32_t slot;     /* the receiver's for the sender */
    uint32_t from, to, seq;
    uint32_t kind, spare;
};

struct item { /* a message that came */
    struct item *next;
    struct header h;
    struct peer *peer; /* NULL: from this process */
    uint64_t born;
    size_t size;
    char bytes[];
};
struct list {
    struct item *first, **end;
};

struct out { /* a message that goes */
    struct out *next;
    struct peer *peer;
    struct header h;
    size_t size;
    char bytes[];
};

struct peer {
    struct ry_control *control;
    uint64_t uid;
    uint32_t slot, theirs;
    bool ours; /* we made it: it is where a yardmaster lives */
    bool up, gone;
    struct ry_tie *tie;
    ucp_ep_h ep; /* made when the first message is sent */
    bool ep_failed;
    void *address;            /* UCX's */
    struct out *queue, **end; /* sent before it was up */
    unsigned flying;
    char why[RY_WATCH_REASON];
};

struct way { /* between a line and one of its ranks */
    struct peer *peer;
    bool known, here; /* has spoken; lives in this process */
    bool lost, told;
    uint32_t out, in; /* messages so far */
    const char *why;
};

struct ry_line {
    struct ry_line *next;
    struct ry_control *control;
    struct ry_line_handlers on;
    uint64_t key;
    uint32_t nranks, rank, ways;
    struct list inbox;
    uint32_t untold; /* losses */
    uint64_t wake_at;
    bool due, ready, dispatching, closing;
    struct way way[]; /* rank 0: to all; others: to rank 0 */
};

struct ry_control {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a line is not dispatching any more; something that was sent is through */
    pthread_t thread;
    int wake;
    bool stop;
    unsigned waiters;
    ucp_context_h context;
    ucp_worker_h worker;
    int efd;
    struct ry_watch *watch;
    uint64_t uid;
    ucp_address_t *ucx_address;
    size_t ucx_size;
    char *address;
    size_t address_size;
    struct peer **peers;
    uint32_t npeers;
    struct ry_line *lines;
    struct list unclaimed;
    size_t unclaimed_bytes;
    bool broken_eps;
    uint64_t asleep_until;  /* 0: the thread is awake */
    bool napping;           /* asleep, but looks again within NAP_NS */
    _Atomic uint32_t ready; /* lines with something to tell */
    _Atomic uint64_t polled_at;
};

/* What ry_control_address() gives: this, then the watch's part, then UCX's. */
struct address_head {
    char magic[8];
    uint32_t watch_size, ucx_size;
};

static void list_init(struct list *l)
{
    l->first = NULL;
    l->end = &l->first;
}

static void list_put(struct list *l, struct item *i)
{
    i->next = NULL;
    *l->end = i;
    l->end = &i->next;
}

static struct item *list_take(struct list *l)
{
    struct item *i = l->first;
    if (i && !(l->first = i->next))
        l->end = &l->first;
    return i;
}

static void wake(struct ry_control *c)
{
    if (c->asleep_until)
        eventfd_write(c->wake, 1);
}

/* ---- telling lines ---- */

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
    wake(l->control);
}

static void peer_gone(struct peer *p, const char *why)
{
    struct ry_control *c = p->control;
    if (p->gone)
        return;
    p->gone = true;
    snprintf(p->why, sizeof p->why, "%s", why);
    if (p->tie)
        ry_watch_untie(c->watch, p->tie);
    p->tie = NULL;
    for (struct out *o = p->queue, *next; o; o = next) {
        next = o->next;
        free(o);
    }
    p->queue = NULL;
    p->ep_failed = p->ep != NULL;
    c->broken_eps |= p->ep_failed; /* closed outside of UCX's callbacks */
    for (struct ry_line *l = c->lines; l; l = l->next)
        for (uint32_t i = 0; i < l->ways; i++)
            if (l->way[i].peer == p)
                way_lost(l, &l->way[i], p->why);
    pthread_cond_broadcast(&c->changed);
}

/* ---- sending ---- */

static void on_sent(void *request, ucs_status_t status, void *arg)
{
    struct out *o = arg;
    o->peer->flying--;
    if (o->peer->control->waiters)
        pthread_cond_broadcast(&o->peer->control->changed);
    free(o);
    ucp_request_free(request); /* a failure is the error handler's to tell */
}

static void on_error(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    char why[RY_WATCH_REASON];
    snprintf(why, sizeof why, "UCX lost its process: %s", ucs_status_string(status));
    peer_gone(arg, why);
}

static ucs_status_t peer_connect(struct peer *p)
{
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLER,
                              .address = p->address,
                              .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                              .err_handler = {on_error, p}};
    return ucp_ep_create(p->control->worker, &params, &p->ep);
}

static void transmit(struct peer *p, struct out *o)
{
    ucs_status_t st = p->ep ? UCS_OK : peer_connect(p);
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                                 UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                 .flags = UCP_AM_SEND_FLAG_EAGER,
                                 .cb.send = on_sent,
                                 .user_data = o,
                                 .memory_type = UCS_MEMORY_TYPE_HOST};
    o->h.slot = p->theirs;
    void *request = NULL;
    if (st == UCS_OK) {
        request = ucp_am_send_nbx(p->ep, AM_ID, &o->h, sizeof o->h, o->bytes, o->size, &param);
        if (UCS_PTR_IS_PTR(request)) {
            p->flying++;
            wake(p->control); /* UCX has work to do */
            return;
        }
        st = UCS_PTR_STATUS(request);
    }
    free(o);
    if (st != UCS_OK)
        on_error(p, p->ep, st);
}

static struct item *item_new(const struct header *h, struct peer *peer, const void *bytes, size_t size)
{
    struct item *i = malloc(sizeof *i + size);
    if (!i)
        return NULL;
    i->h = *h, i->peer = peer, i->size = size;
    if (size)
        memcpy(i->bytes, bytes, size);
    return i;
}

static void deliver(struct ry_control *c, struct item *i);

static void send_to_peer(struct peer *p, const struct header *h, const void *bytes, size_t size)
{
    if (p->gone)
        return;
    struct out *o = malloc(sizeof *o + size);
    if (!o)
        return peer_gone(p, "out of memory for a message");
    o->next = NULL, o->peer = p, o->h = *h, o->size = size;
    if (size)
        memcpy(o->bytes, bytes, size);
    if (p->up) {
        transmit(p, o);
    } else {
        *p->end = o;
        p->end = &o->next;
    }
}

static void say(struct ry_line *l, uint32_t to, enum kind kind, const void *bytes, size_t size)
{
    struct way *w = way_to(l, to);
    if (!w || w->lost || (!w->peer && !w->here))
        return;
    struct header h = {.key = l->key, .uid = l->control->uid, .from = l->rank, .to = to, .seq = w->out++, .kind = kind};
    if (w->peer)
        return send_to_peer(w->peer, &h, bytes, size);
    struct item *i = item_new(&h, NULL, bytes, size);
    if (!i)
        return way_lost(l, w, "out of memory for a message");
    deliver(l->control, i);
    if (!l->control->napping)
        wake(l->control);
}

void ry_line_send(struct ry_line *line, int to, const void *bytes, size_t size)
{
    struct ry_control *c = line->control;
    pthread_mutex_lock(&c->lock);
    if (!line->closing && to >= 0)
        say(line, (uint32_t)to, DATA, bytes, size);
    pthread_mutex_unlock(&c->lock);
}

/* ---- receiving ---- */

/* A line was not, or is no longer, open here: whoever spoke to it must not wait for an answer. */
static void turn_away(struct ry_control *c, const struct item *i)
{
    if (i->h.kind == BYE || !i->peer)
        return;
    struct header h = {
        .key = i->h.key, .uid = c->uid, .from = i->h.to, .to = i->h.from, .seq = UINT32_MAX, .kind = BYE};
    send_to_peer(i->peer, &h, NULL, 0);
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
        way_lost(l, w, "it has left the communicator");
    } else if (i->h.kind == DATA) {
        list_put(&l->inbox, i);
        line_ready(l);
        return;
    }
drop:
    free(i);
}

static void deliver(struct ry_control *c, struct item *i)
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
        list_put(&c->unclaimed, i);
    }
}

static ucs_status_t on_message(void *arg, const void *header, size_t header_size, void *data, size_t size,
                               const ucp_am_recv_param_t *param)
{
    struct ry_control *c = arg;
    struct header h;
    if (header_size != sizeof h || param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)
        return UCS_OK; /* not of our making */
    memcpy(&h, header, sizeof h);
    if (h.slot >= c->npeers || c->peers[h.slot]->uid != h.uid || c->peers[h.slot]->gone)
        return UCS_OK;
    struct item *i = item_new(&h, c->peers[h.slot], data, size);
    if (i)
        deliver(c, i);
    else
        peer_gone(c->peers[h.slot], "out of memory for a message");
    return UCS_OK;
}

/* ---- peers ---- */

static struct peer *peer_new(struct ry_control *c, uint64_t uid, const void *ucx_address, size_t size)
{
    struct peer *p = calloc(1, sizeof *p);
    struct peer **more = c->peers;
    if ((c->npeers & (c->npeers - 1)) == 0) /* full at every power of two */
        more = realloc(c->peers, (c->npeers ? 2 * c->npeers : 1) * sizeof *more);
    if (more)
        c->peers = more;
    if (!p || !more || !(p->address = malloc(size))) {
        free(p);
        return NULL;
    }
    memcpy(p->address, ucx_address, size);
    p->control = c, p->uid = uid, p->slot = c->npeers, p->end = &p->queue;
    return c->peers[c->npeers++] = p;
}

static int64_t on_arrived(void *context, struct ry_tie *tie, uint64_t uid, uint32_t number, const void *card,
                          size_t card_size)
{
    struct peer *p = peer_new(context, uid, card, card_size);
    if (!p)
        return -1;
    p->tie = tie, p->theirs = number, p->up = true;
    return p->slot;
}

static void on_tied(void *context, uint32_t mine, uint32_t theirs)
{
    struct ry_control *c = context;
    struct peer *p = c->peers[mine];
    p->up = true;
    p->theirs = theirs;
    struct out *o = p->queue;
    p->queue = NULL;
    p->end = &p->queue;
    for (struct out *next; o; o = next) {
        next = o->next;
        if (p->gone)
            free(o);
        else
            transmit(p, o);
    }
}

static void on_gone(void *context, uint32_t mine, const char *why)
{
    struct ry_control *c = context;
    c->peers[mine]->tie = NULL;
    peer_gone(c->peers[mine], why);
}

static void close_broken(struct ry_control *c)
{
    c->broken_eps = false;
    for (uint32_t i = 0; i < c->npeers; i++) {
        struct peer *p = c->peers[i];
        if (!p->ep_failed || !p->ep)
            continue;
        ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_EP_CLOSE_FLAG_FORCE};
        void *request = ucp_ep_close_nbx(p->ep, &param);
        if (UCS_PTR_IS_PTR(request))
            ucp_request_free(request); /* goes on by itself */
        p->ep = NULL;
    }
}

/* ---- lines ---- */

/* The peer of a yardmaster's address; made if need be. */
static struct peer *peer_at(struct ry_control *c, const char *address, const struct address_head *head, uint64_t uid,
                            struct ry_err *err)
{
    for (uint32_t i = 0; i < c->npeers; i++)
        if (c->peers[i]->ours && c->peers[i]->uid == uid && !c->peers[i]->gone)
            return c->peers[i];
    struct peer *p = peer_new(c, uid, address + sizeof *head + head->watch_size, head->ucx_size);
    if (!p) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    p->ours = true;
    p->tie = ry_watch_tie(c->watch, address + sizeof *head, head->watch_size, p->slot, err);
    if (p->tie)
        return p;
    peer_gone(p, "no connection");
    return NULL;
}

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
    else if (!(l->way[0].peer = peer_at(l->control, address, &head, uid, err)))
        return -1;
    return 0;
}

static void claim(struct ry_control *c, struct ry_line *l)
{
    struct list rest;
    list_init(&rest);
    for (struct item *i; (i = list_take(&c->unclaimed));) {
        if (i->h.key != l->key || i->h.to != l->rank) {
            list_put(&rest, i);
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
    list_init(&l->inbox);
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
    wake(c);
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

void ry_line_close(struct ry_line *l)
{
    struct ry_control *c = l->control;
    pthread_mutex_lock(&c->lock);
    l->closing = true;
    while (l->dispatching)
        pthread_cond_wait(&c->changed, &c->lock);
    for (uint32_t r = 0; r < l->ways; r++)
        if (l->rank || r) /* not to itself */
            say(l, r, BYE, NULL, 0);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += FLUSH_NS;
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
    for (struct item *i; (i = list_take(&l->inbox));)
        free(i);
    free(l);
}

void ry_line_wake_at(struct ry_line *l, uint64_t ns)
{
    struct ry_control *c = l->control;
    pthread_mutex_lock(&c->lock);
    l->wake_at = ns;
    l->due = false;
    if (ns < c->asleep_until)
        wake(c);
    pthread_mutex_unlock(&c->lock);
}

/* ---- calling the handlers ---- */

/* With the lock; gives it up during each call. */
static void dispatch_line(struct ry_control *c, struct ry_line *l)
{
    uint32_t looked = 0; /* for losses that were not told */
    l->dispatching = true;
    while (!l->closing) {
        struct item *i = list_take(&l->inbox);
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
static bool dispatch(struct ry_control *c)
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

bool ry_control_poll(struct ry_control *c)
{
    atomic_store_explicit(&c->polled_at, ry_now_ns(), memory_order_relaxed);
    if (pthread_mutex_trylock(&c->lock))
        return false;
    bool any = ucp_worker_progress(c->worker) != 0;
    if (c->broken_eps)
        close_broken(c);
    any |= dispatch(c);
    pthread_mutex_unlock(&c->lock);
    return any;
}

/* ---- the thread ---- */

/* Timers that have come, messages that nobody claimed; when to look again. */
static uint64_t look_at_clock(struct ry_control *c, uint64_t now)
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
        struct item *i = list_take(&c->unclaimed);
        c->unclaimed_bytes -= i->size + sizeof *i;
        turn_away(c, i);
        free(i);
    }
    if (c->unclaimed.first && c->unclaimed.first->born + UNCLAIMED_NS < next)
        next = c->unclaimed.first->born + UNCLAIMED_NS;
    return next;
}

static void *progress(void *arg)
{
    struct ry_control *c = arg;
    struct pollfd fds[] = {{.fd = c->wake, .events = POLLIN},
                           {.fd = ry_watch_fd(c->watch), .events = POLLIN},
                           {.fd = c->efd, .events = POLLIN}};
    unsigned busy = 0; /* times in a row that UCX would not sleep though it had nothing to do */
    pthread_mutex_lock(&c->lock);
    while (!c->stop) {
        bool moved = false;
        for (int i = 0; i < 64 && ucp_worker_progress(c->worker); i++)
            moved = true;
        uint64_t now = ry_now_ns();
        if (fds[1].revents || ry_watch_deadline(c->watch) <= now)
            ry_watch_drive(c->watch, now);
        fds[1].revents = 0;
        if (c->broken_eps)
            close_broken(c);
        uint64_t until = look_at_clock(c, now);
        if (dispatch(c) || moved) {
            busy = 0;
            continue;
        }
        /* Whoever polls does our work: do not let UCX wake us for each message. */
        c->napping = now - atomic_load_explicit(&c->polled_at, memory_order_relaxed) < NAP_NS;
        if (!c->napping) {
            ucs_status_t st = ucp_worker_arm(c->worker);
            if (st == UCS_ERR_BUSY && ++busy < 100)
                continue;
            c->napping = st != UCS_OK; /* something cannot be sent now, to a process that was stopped maybe */
        }
        if (c->napping && now + NAP_NS < until)
            until = now + NAP_NS;
        c->asleep_until = until;
        pthread_mutex_unlock(&c->lock);
        now = ry_now_ns();
        uint64_t ns = until > now ? until - now : 0;
        struct timespec timeout = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
        fds[2].fd = c->napping ? -1 : c->efd;
        ppoll(fds, 3, until == UINT64_MAX ? NULL : &timeout, NULL);
        pthread_mutex_lock(&c->lock);
        c->asleep_until = 0;
        c->napping = false;
        if (fds[0].revents) {
            eventfd_t ignored;
            eventfd_read(c->wake, &ignored);
        }
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

/* ---- starting and stopping ---- */

static int start_ucx(struct ry_control *c, struct ry_err *err)
{
    ucp_config_t *config;
    const char *what = "ucp_config_read";
    ucs_status_t st = ucp_config_read(NULL, NULL, &config);
    if (st != UCS_OK)
        goto fail;
    ry_tame_ucx(config);
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME,
                           .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP,
                           .name = "railyard"};
    what = "ucp_init";
    st = ucp_init(&params, config, &c->context);
    ucp_config_release(config);
    if (st != UCS_OK)
        goto fail;
    ucp_worker_params_t wp = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                              .thread_mode = UCS_THREAD_MODE_SERIALIZED};
    ucp_am_handler_param_t hp = {.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                                               UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG,
                                 .id = AM_ID,
                                 .flags = UCP_AM_FLAG_WHOLE_MSG,
                                 .cb = on_message,
                                 .arg = c};
    what = "ucp_worker_create";
    if ((st = ucp_worker_create(c->context, &wp, &c->worker)) != UCS_OK)
        goto fail;
    what = "ucp_worker_set_am_recv_handler";
    if ((st = ucp_worker_set_am_recv_handler(c->worker, &hp)) != UCS_OK)
        goto fail;
    what = "ucp_worker_get_efd";
    if ((st = ucp_worker_get_efd(c->worker, &c->efd)) != UCS_OK)
        goto fail;
    what = "ucp_worker_get_address";
    if ((st = ucp_worker_get_address(c->worker, &c->ucx_address, &c->ucx_size)) != UCS_OK)
        goto fail;
    return 0;
fail:
    return ry_fail(err, "UCX cannot be used (%s: %s): see UCX_TLS and UCX_NET_DEVICES, or RAILYARD_LOG=debug", what,
                   ucs_status_string(st));
}

static int make_address(struct ry_control *c)
{
    char watch[RY_WATCH_ADDRESS_MAX];
    struct address_head head = {.magic = "RYCTRL01", .ucx_size = (uint32_t)c->ucx_size};
    head.watch_size = (uint32_t)ry_watch_address(c->watch, watch);
    c->address_size = sizeof head + head.watch_size + head.ucx_size;
    if (!(c->address = malloc(c->address_size)))
        return -1;
    memcpy(c->address, &head, sizeof head);
    memcpy(c->address + sizeof head, watch, head.watch_size);
    memcpy(c->address + sizeof head + head.watch_size, c->ucx_address, c->ucx_size);
    return 0;
}

static void control_free(struct ry_control *c)
{
    if (c->watch)
        ry_watch_stop(c->watch);
    for (uint32_t i = 0; i < c->npeers; i++) {
        free(c->peers[i]->address);
        free(c->peers[i]);
    }
    for (struct item *i; (i = list_take(&c->unclaimed));)
        free(i);
    if (c->ucx_address)
        ucp_worker_release_address(c->worker, c->ucx_address);
    if (c->worker)
        ucp_worker_destroy(c->worker);
    if (c->context)
        ucp_cleanup(c->context);
    if (c->wake >= 0)
        close(c->wake);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->changed);
    free(c->peers);
    free(c->address);
    free(c);
}

struct ry_control *ry_control_start(struct ry_err *err)
{
    struct ry_control *c = calloc(1, sizeof *c);
    if (!c) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, &attr);
    pthread_condattr_destroy(&attr);
    list_init(&c->unclaimed);
    c->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->wake < 0 || getrandom(&c->uid, sizeof c->uid, 0) != (ssize_t)sizeof c->uid) {
        ry_fail(err, "cannot start the control plane: %s", strerror(errno));
        goto fail;
    }
    c->uid |= 1; /* 0 is nobody */
    /* UCX starts a thread, too: the job's signals are not for it. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = start_ucx(c, err);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status)
        goto fail;
    struct ry_watch_hooks hooks = {c, on_arrived, on_tied, on_gone};
    c->watch = ry_watch_start(&hooks, c->uid, c->ucx_address, c->ucx_size, err);
    if (!c->watch)
        goto fail;
    if (make_address(c)) {
        ry_fail(err, "out of memory");
        goto fail;
    }
    int e = ry_thread_start(&c->thread, progress, c);
    if (e) {
        ry_fail(err, "cannot start the control thread: %s", strerror(e));
        goto fail;
    }
    pthread_setname_np(c->thread, "ry-control");
    return c;
fail:
    control_free(c);
    return NULL;
}

const void *ry_control_address(const struct ry_control *control, size_t *size)
{
    *size = control->address_size;
    return control->address;
}

static void drive_until(struct ry_control *c, void **request, uint64_t until)
{
    while (UCS_PTR_IS_PTR(*request) && ucp_request_check_status(*request) == UCS_INPROGRESS && ry_now_ns() < until)
        if (!ucp_worker_progress(c->worker))
            usleep(100);
    if (UCS_PTR_IS_PTR(*request))
        ucp_request_free(*request);
}

void ry_control_stop(struct ry_control *c)
{
    pthread_mutex_lock(&c->lock);
    c->stop = true;
    eventfd_write(c->wake, 1);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
    pthread_mutex_lock(&c->lock); /* for the checkers of locks: nobody else is here */
    ucp_request_param_t none = {0};
    void *flush = ucp_worker_flush_nbx(c->worker, &none);
    drive_until(c, &flush, ry_now_ns() + FLUSH_NS);
    for (uint32_t i = 0; i < c->npeers; i++)
        peer_gone(c->peers[i], "stopped");
    close_broken(c);
    for (uint64_t until = ry_now_ns() + FLUSH_NS; ry_now_ns() < until;) {
        unsigned flying = 0;
        for (uint32_t i = 0; i < c->npeers; i++)
            flying += c->peers[i]->flying;
        if (!ucp_worker_progress(c->worker) && !flying)
            break;
    }
    pthread_mutex_unlock(&c->lock);
    control_free(c);
}
