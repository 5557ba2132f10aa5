/*
 * hub.c: UCX for data: the process's worker, its one thread, endpoints, and the transfers of all carriers. See
 * carrier.h.
 *
 * Sends are synchronous: one is over when its receive has been matched, as NCCL's are, so that whoever has ended an
 * exchange and leaves takes nothing along that others still wait for. (What acknowledges that is flushed when the
 * process ends.) Endpoints are shared by communicators and never closed, for the reasons in control/peers.c.
 *
 * Tags: the receiver's number for the communicator, the sender's rank, and a count of what went that way: what is
 * matched is independent of what other pairs, or communicators, do.
 */
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/thread.h"
#include "internal.h"

#define SPIN_NS 30000u     /* without anything happening, before it sleeps */
#define NAP_NS 20000u      /* while a stream is waited for, */
#define LONG_NAP_NS 60000u /* and has been for long */
#define LONG_NS 50000000u
#define LOOK_MS 200           /* at the clock, while something is under way */
#define END_NS 1000000000ull  /* for what is under way when the process ends */
#define FLUSH_NS 300000000ull /* for acknowledgements */
#define BUSY_MOST 100

#define TAG_PORT 48
#define TAG_RANK 28
#define TAG_COUNT ((1u << TAG_RANK) - 1)

void ry_hub_tell(struct ry_carrier *c)
{
    struct ry_hub *h = c->config.hub;
    atomic_store(&c->news, true);
    atomic_store(&h->news, true);
    if (atomic_load(&h->sleeping))
        eventfd_write(h->wake, 1);
}

uint32_t ry_hub_port(struct ry_hub *h)
{
    pthread_mutex_lock(&h->lock);
    uint32_t port = h->ports < (1u << (64 - TAG_PORT)) - 1 ? ++h->ports : 0;
    pthread_mutex_unlock(&h->lock);
    return port;
}

void ry_hub_add(struct ry_carrier *c)
{
    struct ry_hub *h = c->config.hub;
    pthread_mutex_lock(&h->lock);
    c->next = h->arriving;
    h->arriving = c;
    pthread_mutex_unlock(&h->lock);
    ry_hub_tell(c);
}

/* ---- losing somebody ---- */

/* Is anything of the job still to come from, or go to, that rank? */
static bool needs(const struct job *j, int peer)
{
    for (int i = 0; i < j->nops; i++)
        if (j->op[i].peer == peer && !j->op[i].done)
            return true;
    return false;
}

static void lose(struct ry_carrier *c, int rank, const char *why)
{
    struct peer *p = &c->peer[rank];
    if (p->lost)
        return;
    p->lost = true;
    p->why = why;
    atomic_store(&c->state, RY_CROSS_CANNOT);
    for (struct job *j = c->first; j; j = j->next)
        if (needs(j, rank))
            return ry_carrier_fail(c, j->number, rank, why);
}

static void on_error(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    struct remote *r = arg;
    if (r->dead)
        return;
    r->dead = true;
    snprintf(r->why, sizeof r->why, "UCX lost its process: %s", ucs_status_string(status));
    for (struct ry_carrier *c = r->hub->carriers; c; c = c->next)
        for (int i = 0; i < c->config.nranks; i++)
            if (c->peer[i].remote == r)
                lose(c, i, r->why);
}

static struct remote *remote_at(struct ry_hub *h, const struct card *card)
{
    for (struct remote *r = h->remotes; r; r = r->next)
        if (r->uid == card->uid)
            return r;
    struct remote *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->uid = card->uid;
    r->hub = h;
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLER,
                              .address = (const ucp_address_t *)(card + 1),
                              .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                              .err_handler = {on_error, r}};
    ucs_status_t st = ucp_ep_create(h->ucx.worker, &params, &r->ep);
    if (st != UCS_OK) {
        r->dead = true;
        snprintf(r->why, sizeof r->why, "ucp_ep_create: %s", ucs_status_string(st));
    }
    r->next = h->remotes;
    return h->remotes = r;
}

/* ---- one piece ---- */

static struct job *job_of(struct op *op)
{
    return op->c->first; /* only the first is under way: what is handed over later waits for it on the device */
}

static void is_over(struct op *op, ucs_status_t status)
{
    struct ry_carrier *c = op->c;
    bool greeting = op == &c->peer[op->peer].hello[0] || op == &c->peer[op->peer].hello[1];
    struct job *j = greeting ? NULL : job_of(op);
    op->request = NULL;
    if (j)
        j->flying--;
    if (status == UCS_OK && !op->send && op->info.sender_tag &&
        op->info.length != op->bytes) /* 1.13.1 does not tell at once */
        status = UCS_ERR_MESSAGE_TRUNCATED;
    if (status == UCS_OK) {
        op->done = true;
        if (greeting && !--c->greetings && !atomic_load(&c->aborted)) {
            int could = RY_CROSS_COULD;
            if (atomic_compare_exchange_strong(&c->state, &could, RY_CROSS_HAS))
                ry_info("communicator %s: %d ranks of other nodes can be reached over UCX, %s; that took %.1f ms",
                        c->name, c->npeers, c->staged ? "through host memory" : "from and to the job's memory",
                        (double)(ry_now_ns() - c->made_at) / 1e6);
        }
        return;
    }
    if (atomic_load(&c->aborted))
        return;
    struct peer *p = &c->peer[op->peer];
    char why[120];
    snprintf(why, sizeof why, "%s %zu bytes: %s", op->send ? "sending" : "receiving", op->bytes,
             ucs_status_string(status));
    atomic_store(&c->state, RY_CROSS_CANNOT);
    if (j)
        ry_carrier_fail(c, j->number, op->peer, p->remote && p->remote->dead ? p->remote->why : why);
}

static void on_sent(void *request, ucs_status_t status, void *arg)
{
    ucp_request_free(request);
    is_over(arg, status);
}

static void on_received(void *request, ucs_status_t status, const ucp_tag_recv_info_t *info, void *arg)
{
    struct op *op = arg;
    op->info = *info;
    ucp_request_free(request);
    is_over(op, status);
}

static void begin_op(struct op *op, ucs_memory_type_t memory)
{
    struct ry_carrier *c = op->c;
    struct ry_hub *h = c->config.hub;
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                                 UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                 .user_data = op,
                                 .memory_type = memory};
    if (op->send) {
        struct remote *r = c->peer[op->peer].remote;
        param.cb.send = on_sent;
        op->request = r->dead ? UCS_STATUS_PTR(UCS_ERR_CONNECTION_RESET)
                              : ucp_tag_send_sync_nbx(r->ep, op->at, op->bytes, op->tag, &param);
    } else {
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_RECV_INFO;
        param.cb.recv = on_received;
        param.recv_info.tag_info = &op->info;
        op->request = ucp_tag_recv_nbx(h->ucx.worker, op->at, op->bytes, op->tag, ~(ucp_tag_t)0, &param);
    }
    if (!UCS_PTR_IS_PTR(op->request))
        is_over(op, UCS_PTR_STATUS(op->request));
}

/* ---- meeting ---- */

static ucp_tag_t tag_of(uint32_t port, int from, uint32_t count)
{
    return (ucp_tag_t)port << TAG_PORT | (ucp_tag_t)(uint32_t)from << TAG_RANK | (count & TAG_COUNT);
}

ucp_tag_t ry_hub_tag(const struct ry_carrier *c, bool send, int peer, uint32_t count)
{
    return send ? tag_of(c->peer[peer].port, c->config.rank, count) : tag_of(c->port, peer, count);
}

static bool greet(struct ry_carrier *c, struct peer *p, int rank)
{
    p->remote = remote_at(c->config.hub, p->card);
    p->port = p->card->port;
    if (!p->remote)
        return lose(c, rank, "out of memory"), false;
    if (p->remote->dead)
        return lose(c, rank, p->remote->why), false;
    for (int i = 0; i < 2; i++) {
        p->greeting[i] = 0;
        p->hello[i] = (struct op){.c = c,
                                  .send = i,
                                  .peer = rank,
                                  .tag = ry_hub_tag(c, i, rank, 0),
                                  .at = &p->greeting[i],
                                  .bytes = sizeof p->greeting[i]};
        begin_op(&p->hello[i], UCS_MEMORY_TYPE_HOST);
    }
    return true;
}

/* ---- the transfers of a carrier ---- */

/* What other threads left. */
static void take_news(struct ry_carrier *c)
{
    bool meet = false;
    struct job *had;
    pthread_mutex_lock(&c->lock);
    had = *c->end = c->jobs;
    if (c->jobs)
        c->end = c->jobs_end;
    c->jobs = NULL;
    c->jobs_end = &c->jobs;
    meet = c->cards == c->npeers && !c->told && !atomic_load(&c->aborted);
    pthread_mutex_unlock(&c->lock);
    for (int r = 0; r < c->config.nranks; r++) {
        pthread_mutex_lock(&c->lock);
        const char *gone = c->peer[r].gone;
        pthread_mutex_unlock(&c->lock);
        if (gone)
            lose(c, r, gone);
    }
    if (meet) {
        c->told = true;
        c->greetings = 2 * c->npeers;
        for (int r = 0; r < c->config.nranks; r++)
            if (c->config.with[r] && !greet(c, &c->peer[r], r))
                break;
    }
    for (struct job *j = had; j; j = j->next)
        for (int i = 0; i < j->nops; i++)
            if (c->peer[j->op[i].peer].lost)
                return ry_carrier_fail(c, j->number, j->op[i].peer, c->peer[j->op[i].peer].why);
}

static bool there(const struct ry_carrier *c, uint32_t ready)
{
    return (int32_t)(atomic_load_explicit(&c->word[READY], memory_order_acquire) - ready) >= 0;
}

/* Begins what the stream has got ready, and lets it go where all has come. Returns whether anything happened; *waits:
   something is still to come from the stream. */
static bool drive_job(struct ry_carrier *c, struct job *j, uint64_t now, bool *waits)
{
    bool moved = false;
    while (j->recvs_begun < j->nrecv && there(c, j->op[j->recvs_begun].ready)) {
        j->flying++;
        begin_op(&j->op[j->recvs_begun++], c->memory_type);
        moved = true;
    }
    if (moved)
        j->since = now;
    while (j->sends_begun < j->nops - j->nrecv && there(c, j->op[j->nrecv + j->sends_begun].ready)) {
        j->flying++;
        begin_op(&j->op[j->nrecv + j->sends_begun++], c->memory_type);
        j->since = now;
        moved = true;
    }
    *waits |= j->recvs_begun < j->nrecv || j->sends_begun < j->nops - j->nrecv;
    int over = j->recvs_over;
    while (over < j->recvs_begun && j->op[over].done)
        over++;
    if (over > j->recvs_over) {
        j->recvs_over = over;
        ry_carrier_done(c, j->before + (uint32_t)over);
        moved = true;
    }
    return moved;
}

static bool all_done(const struct job *j)
{
    return j->recvs_over == j->nrecv && j->sends_begun == j->nops - j->nrecv && !j->flying;
}

static void say_late(struct ry_carrier *c, struct job *j)
{
    for (int i = 0; i < j->nops; i++)
        if (!j->op[i].done) {
            ry_warn("communicator %s, exchange %llu: a transfer %s rank %d over UCX has not ended in %g s", c->name,
                    (unsigned long long)j->number, j->op[i].send ? "to" : "from", j->op[i].peer, c->config.patience);
            break;
        }
    j->said = true;
}

static void cancel(struct ry_carrier *c)
{
    for (struct job *j = c->first; j; j = j->next)
        for (int i = 0; i < j->recvs_begun; i++)
            if (j->op[i].request)
                ucp_request_cancel(c->config.hub->ucx.worker, j->op[i].request);
    for (int r = 0; r < c->config.nranks; r++)
        if (c->peer[r].hello[0].request)
            ucp_request_cancel(c->config.hub->ucx.worker, c->peer[r].hello[0].request);
}

/* Is nothing of it with UCX any more? What cannot be called back stays, and with it the memory. */
static bool idle(const struct ry_carrier *c)
{
    for (int r = 0; r < c->config.nranks; r++)
        if (c->peer[r].hello[0].request || c->peer[r].hello[1].request)
            return false;
    return !c->first || !c->first->flying;
}

static bool drive(struct ry_carrier *c, uint64_t now, bool *flies, bool *waits)
{
    bool moved = atomic_exchange(&c->news, false),
         aborted = atomic_load(&c->aborted); /* in this order: an abort is news */
    if (moved)
        take_news(c);
    if (moved && aborted)
        cancel(c);
    for (struct job *j; !aborted && !c->failed_at && (j = c->first);) {
        moved |= drive_job(c, j, now, waits);
        if (c->failed_at)
            break;
        if (!all_done(j)) {
            *flies = true;
            if (!j->said && j->since && now - j->since > (uint64_t)(c->config.patience * 1e9))
                say_late(c, j);
            break;
        }
        if (!(c->first = j->next))
            c->end = &c->first;
        ry_carrier_done(c, j->before + (uint32_t)j->nrecv + 1);
        free(j);
        moved = true;
    }
    *flies |= c->greetings > 0 && atomic_load(&c->state) == RY_CROSS_COULD && !atomic_load(&c->config.hub->stop);
    if (c->failed_at && !aborted && !c->hopeless_told) {
        *flies = true;
        if (now - c->failed_at > (uint64_t)(c->config.patience * 1e9)) {
            c->hopeless_told = true;
            ry_carrier_give_up(c);
        }
    }
    return moved;
}

/* Those whose communicator is no more. */
static void bury(struct ry_hub *h)
{
    for (struct ry_carrier **p = &h->carriers, *c; (c = *p);) {
        pthread_mutex_lock(&c->lock);
        bool ended = c->ended, stopped = atomic_load(&c->aborted) || c->failed;
        bool more = c->jobs != NULL;
        pthread_mutex_unlock(&c->lock);
        if (!ended || (!stopped && (more || c->first)) || !idle(c)) {
            p = &c->next;
            continue;
        }
        *p = c->next;
        for (struct job *j; (j = c->first);) {
            c->first = j->next;
            free(j);
        }
        ry_carrier_unref(c);
    }
}

/* ---- the thread ---- */

static void take_arriving(struct ry_hub *h)
{
    pthread_mutex_lock(&h->lock);
    for (struct ry_carrier *c; (c = h->arriving);) {
        h->arriving = c->next;
        c->next = h->carriers;
        h->carriers = c;
    }
    pthread_mutex_unlock(&h->lock);
}

static bool wait_for_network(struct ry_hub *h, int timeout_ms, unsigned *busy)
{
    struct pollfd fds[] = {{.fd = h->wake, .events = POLLIN}, {.fd = h->ucx.efd, .events = POLLIN}};
    eventfd_t ignored;
    atomic_store(&h->sleeping, true);
    if (!atomic_load(&h->news) && !atomic_load(&h->stop)) {
        ucs_status_t st = ucp_worker_arm(h->ucx.worker);
        if (st == UCS_OK) {
            poll(fds, 2, timeout_ms);
            *busy = 0;
        } else if (++*busy > BUSY_MOST) { /* something cannot be sent now */
            nanosleep(&(struct timespec){.tv_nsec = LONG_NAP_NS}, NULL);
        }
    }
    atomic_store(&h->sleeping, false);
    if (fds[0].revents)
        eventfd_read(h->wake, &ignored);
    return true;
}

static bool round_of(struct ry_hub *h, uint64_t now, bool *flies, bool *waits)
{
    bool moved = false;
    *flies = *waits = false;
    for (int i = 0; i < 64 && ucp_worker_progress(h->ucx.worker); i++)
        moved = true;
    if (atomic_exchange(&h->news, false)) {
        take_arriving(h);
        moved = true;
    }
    for (struct ry_carrier *c = h->carriers; c; c = c->next)
        moved |= drive(c, now, flies, waits);
    if (moved)
        bury(h);
    return moved;
}

static void flush(struct ry_hub *h)
{
    ucp_request_param_t none = {0};
    void *request = ucp_worker_flush_nbx(h->ucx.worker, &none);
    uint64_t until = ry_now_ns() + FLUSH_NS;
    while (UCS_PTR_IS_PTR(request) && ucp_request_check_status(request) == UCS_INPROGRESS && ry_now_ns() < until)
        if (!ucp_worker_progress(h->ucx.worker))
            nanosleep(&(struct timespec){.tv_nsec = LONG_NAP_NS}, NULL);
    if (UCS_PTR_IS_PTR(request))
        ucp_request_free(request);
}

static void *work(void *arg)
{
    struct ry_hub *h = arg;
    prctl(PR_SET_TIMERSLACK, 1000ul); /* of this thread: naps are to be as short as they say */
    uint64_t last = 0, stop_at = 0;
    unsigned busy = 0;
    bool flies, waits;
    for (;;) {
        uint64_t now = ry_now_ns();
        bool moved = round_of(h, now, &flies, &waits);
        if (atomic_load(&h->stop) && !stop_at)
            stop_at = now + END_NS;
        if (stop_at && ((!flies && !waits) || now > stop_at))
            break;
        if (moved || now - last < SPIN_NS) {
            last = moved ? now : last;
            if (!moved)
                sched_yield();
        } else if (waits) {
            nanosleep(&(struct timespec){.tv_nsec = now - last < LONG_NS ? NAP_NS : LONG_NAP_NS}, NULL);
        } else if (stop_at) {
            nanosleep(&(struct timespec){.tv_nsec = LONG_NAP_NS}, NULL);
        } else {
            wait_for_network(h, flies ? LOOK_MS : -1, &busy);
        }
    }
    flush(h);
    atomic_store(&h->over, true);
    return NULL;
}

/* ---- starting ---- */

static void configure(ucp_config_t *config, void *hub)
{
    const struct ry_hub *h = hub;
    if (h->direct && !getenv("UCX_TLS"))
        ucp_config_modify(config, "TLS", "self,tcp,ib,cuda");
    /* Over TCP a fifth more than with UCX 1.13.1's 8 and 64 KiB. (Its transports' own settings go by their names
     * without UCX_TCP_.) */
    if (!getenv("UCX_TCP_TX_SEG_SIZE"))
        ucp_config_modify(config, "TX_SEG_SIZE", "64k");
    if (!getenv("UCX_TCP_RX_SEG_SIZE"))
        ucp_config_modify(config, "RX_SEG_SIZE", "256k");
}

static int open_ucx(struct ry_hub *h, struct ry_err *err)
{
    if (ry_own_ucx_open(&h->ucx, "railyard-data", UCP_FEATURE_TAG, " for data", configure, h, err))
        return -1;
    ucp_context_attr_t attr = {.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES};
    if (ucp_context_query(h->ucx.context, &attr) == UCS_OK)
        h->memory_types = attr.memory_types;
    return 0;
}

struct starting {
    struct ry_hub *hub;
    struct ry_err err;
    int rc;
};

/* On a thread of its own, whose device may be set. */
static void *open_it(void *arg)
{
    struct starting *s = arg;
    if (s->hub->direct && s->hub->device->relax_thread)
        s->hub->device->relax_thread();
    s->rc = (s->hub->direct && s->hub->device->use(s->hub->ordinal, &s->err)) || open_ucx(s->hub, &s->err) ? -1 : 0;
    return NULL;
}

static void *open_and_work(void *arg)
{
    struct ry_hub *h = arg;
    if (h->direct) {
        h->device->relax_thread();
        h->device->use(h->ordinal, NULL);
    }
    return work(h);
}

struct ry_hub *ry_hub_start(const struct ry_device *device, int ordinal, bool direct, struct ry_err *err)
{
    struct ry_hub *h = calloc(1, sizeof *h);
    pthread_t thread;
    if (!h) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    h->device = device;
    h->ordinal = ordinal;
    h->direct = direct && device != ry_device_host();
    pthread_mutex_init(&h->lock, NULL);
    struct starting s = {.hub = h, .rc = -1};
    h->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int e = h->wake < 0 || getrandom(&h->uid, sizeof h->uid, 0) != (ssize_t)sizeof h->uid ? errno : 0;
    if (!e && !(e = ry_thread_start(&thread, open_it, &s)))
        pthread_join(thread, NULL);
    if (!e && !s.rc)
        e = ry_thread_start(&h->thread, open_and_work, h);
    if (!e && !s.rc) {
        pthread_setname_np(h->thread, "ry-data");
        return h;
    }
    if (e)
        ry_fail(err, "cannot start the data thread: %s", strerror(e));
    else
        ry_fail(err, "%s", s.err.msg);
    if (h->wake >= 0)
        close(h->wake);
    pthread_mutex_destroy(&h->lock);
    free(h); /* and what UCX has got so far stays as it is */
    return NULL;
}

void ry_hub_abandon(struct ry_hub *h)
{
    static struct ry_hub *volatile abandoned; /* for leak checkers */
    if (!h)
        return;
    abandoned = h;
    atomic_store(&h->stop, true);
    eventfd_write(h->wake, 1);
    pthread_join(abandoned->thread, NULL);
}
