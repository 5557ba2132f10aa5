/*
 * peers.c: see internal.h. Owns: UCX's context, worker and endpoints, and what is known of other processes.
 */
#include <stdio.h>

#include "control/internal.h"

#define AM_ID 0

void ry_peer_gone(struct peer *p, const char *why)
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
    ry_lines_lose(c, p);
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
    ry_peer_gone(arg, why);
}

static ucs_status_t peer_connect(struct peer *p)
{
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLER,
                              .address = p->address,
                              .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                              .err_handler = {on_error, p}};
    return ucp_ep_create(p->control->ucx.worker, &params, &p->ep);
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
            ry_wake(p->control); /* UCX has work to do */
            return;
        }
        st = UCS_PTR_STATUS(request);
    }
    free(o);
    if (st != UCS_OK)
        on_error(p, p->ep, st);
}

void ry_peer_send(struct peer *p, const struct header *h, const void *bytes, size_t size)
{
    if (p->gone)
        return;
    struct out *o = malloc(sizeof *o + size);
    if (!o)
        return ry_peer_gone(p, "out of memory for a message");
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

/* ---- receiving ---- */

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
    struct item *i = ry_item_new(&h, c->peers[h.slot], data, size);
    if (i)
        ry_lines_deliver(c, i);
    else
        ry_peer_gone(c->peers[h.slot], "out of memory for a message");
    return UCS_OK;
}

/* ---- coming and going ---- */

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

int64_t ry_peers_arrived(void *context, struct ry_tie *tie, uint64_t uid, uint32_t number, const void *card,
                         size_t card_size)
{
    struct peer *p = peer_new(context, uid, card, card_size);
    if (!p)
        return -1;
    p->tie = tie, p->theirs = number, p->up = true;
    return p->slot;
}

void ry_peers_tied(void *context, uint32_t mine, uint32_t theirs)
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

void ry_peers_gone(void *context, uint32_t mine, const char *why)
{
    struct ry_control *c = context;
    c->peers[mine]->tie = NULL;
    ry_peer_gone(c->peers[mine], why);
}

/* Only when all is over: to close an endpoint by force while the other side is still connecting ends in an assertion of UCX 1.13.1. A
   failed one costs a few KiB. */
void ry_peers_close_broken(struct ry_control *c)
{
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

/* The peer of a yardmaster's address; made if need be. */
struct peer *ry_peer_at(struct ry_control *c, const char *address, const struct address_head *head, uint64_t uid,
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
    ry_peer_gone(p, "no connection");
    return NULL;
}

int ry_peers_start(struct ry_control *c, struct ry_err *err)
{
    ucp_am_handler_param_t hp = {.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                                               UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG,
                                 .id = AM_ID,
                                 .flags = UCP_AM_FLAG_WHOLE_MSG,
                                 .cb = on_message,
                                 .arg = c};
    if (ry_own_ucx_open(&c->ucx, "railyard", UCP_FEATURE_AM, "", NULL, NULL, err))
        return -1;
    ucs_status_t st = ucp_worker_set_am_recv_handler(c->ucx.worker, &hp); /* nobody knows the address yet */
    return st == UCS_OK ? 0 : ry_fail(err, "UCX takes no messages: %s", ucs_status_string(st));
}
