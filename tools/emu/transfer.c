/*
 * transfer.c: sends meet receives, and bytes move.
 *
 * Owns: matching and the data path. Not: what collectives are made of, nor UCX.
 *
 * The receiver speaks first: posting a receive sends "clear to send" with its number in the order of receives from that
 * peer, and the sender's equally numbered send answers with the data. So nothing arrives that has no place yet, a send
 * without its receive waits as NCCL's does, and zero bytes are matched like any other number.
 *
 * Shaping: the sender cuts the data into pieces of about a millisecond on the slowest virtual link in the way and
 * reserves time for one piece after the other, so that flows that share a link take turns. Each piece carries the time
 * before which the receiver must not call it arrived. A flow's next piece starts, in virtual time, where the last one
 * ended, even if this process woke up late: jitter of the scheduler costs no bandwidth.
 */
#include "emu.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define PLAIN_PIECE ((size_t)4 << 20)
#define AHEAD_NS 1000000u /* how early the next piece is reserved and sent */

struct cts_header {
    uint64_t comm, seq, id, bytes;
    int32_t to, from, channel, spare;
};
#define GOODBYE (-1) /* as the channel: no more will come from this rank */

struct data_header {
    uint64_t id, offset, hold;
};

struct refuse_header {
    uint64_t id, sent;
};

struct ry_emu_cts {
    struct ry_emu_cts *next;
    struct cts_header h;
};

/* Receives by id: a table of slots, each with a generation so that a late message finds nothing. */
struct slot {
    struct ry_emu_req *req;
    uint32_t generation;
};
static struct slot *slots;
static uint32_t *free_slots;
static size_t nslots, nfree;

static struct ry_emu_cts *early; /* for communicators that this process does not know yet */

static uint64_t slot_take(struct ry_emu_req *req)
{
    if (!nfree) {
        size_t n = nslots ? 2 * nslots : 64;
        struct slot *s = realloc(slots, n * sizeof *s);
        uint32_t *f = realloc(free_slots, n * sizeof *f);
        if (!s || !f)
            abort();
        slots = s;
        free_slots = f;
        memset(slots + nslots, 0, (n - nslots) * sizeof *slots);
        while (nslots < n)
            free_slots[nfree++] = (uint32_t)nslots++;
    }
    uint32_t i = free_slots[--nfree];
    slots[i].req = req;
    return (uint64_t)slots[i].generation << 32 | i;
}

static struct ry_emu_req *slot_find(uint64_t id)
{
    uint32_t i = (uint32_t)id;
    return i < nslots && slots[i].generation == id >> 32 ? slots[i].req : NULL;
}

static void slot_drop(uint64_t id)
{
    uint32_t i = (uint32_t)id;
    slots[i].req = NULL;
    slots[i].generation++;
    free_slots[nfree++] = i;
}

static struct ry_emu_peer *peer_of(const struct ry_emu_req *req)
{
    return &req->op->comm->peers[req->peer];
}

static struct ry_emu_lane *lane_of(const struct ry_emu_req *req)
{
    return &peer_of(req)->lane[req->op->channel];
}

static void complete(struct ry_emu_req *req)
{
    if (req->done)
        return;
    req->done = true;
    ry_emu_timer_stop(&req->timer);
    if (!req->is_send)
        slot_drop(req->id);
    ry_emu_op_progress(req->op);
}

/* All bytes are there (or sent): done now, or when the virtual link says so. */
static void settle(struct ry_emu_req *req)
{
    if (req->in_flight || req->done)
        return;
    if (req->cancelled || req->hold <= ry_now_ns())
        complete(req);
    else
        ry_emu_timer_set(&req->timer, req->hold);
}

/* ---- receiving ---- */

static void recv_fire(struct ry_emu_timer *timer)
{
    complete((struct ry_emu_req *)((char *)timer - offsetof(struct ry_emu_req, timer)));
}

static void recv_advance(struct ry_emu_req *req)
{
    if (req->cancelled || (req->touched && req->offset == req->bytes))
        settle(req);
}

static void on_taken(void *arg, bool ok)
{
    struct ry_emu_req *req = arg;
    req->in_flight--;
    if (!ok && !req->cancelled) {
        ry_emu_comm_fail(req->op->comm, ncclRemoteError, "rank %d stopped in the middle of sending to rank %d",
                         req->peer, req->op->comm->rank);
        return; /* the waiter cancels it */
    }
    recv_advance(req);
}

bool ry_emu_on_data(const void *header, size_t header_bytes, void *payload, size_t bytes, bool rndv)
{
    struct data_header h;
    if (header_bytes < sizeof h)
        return false;
    memcpy(&h, header, sizeof h);
    struct ry_emu_req *req = slot_find(h.id);
    if (!req || req->cancelled || h.offset > req->bytes || bytes > req->bytes - h.offset)
        return false;
    req->touched = true;
    req->offset += bytes;
    if (h.hold > req->hold)
        req->hold = h.hold;
    if (rndv) {
        req->in_flight++;
        ry_emu_wire_take(payload, req->buf + h.offset, bytes, on_taken, req);
        return true;
    }
    if (bytes)
        memcpy(req->buf + h.offset, payload, bytes);
    recv_advance(req);
    return false;
}

void ry_emu_on_refuse(const void *header, size_t bytes)
{
    struct refuse_header h;
    if (bytes < sizeof h)
        return;
    memcpy(&h, header, sizeof h);
    struct ry_emu_req *req = slot_find(h.id);
    if (req && !req->cancelled)
        ry_emu_comm_fail(req->op->comm, ncclInvalidUsage, "rank %d receives %zu bytes from rank %d, which sends %llu",
                         req->op->comm->rank, req->bytes, req->peer, (unsigned long long)h.sent);
}

/* ---- sending ---- */

static void pump(struct ry_emu_req *req);

static void send_fire(struct ry_emu_timer *timer)
{
    struct ry_emu_req *req = (struct ry_emu_req *)((char *)timer - offsetof(struct ry_emu_req, timer));
    if (req->offset < req->bytes && !req->cancelled)
        pump(req);
    else
        complete(req);
}

static void on_sent(void *arg, bool ok)
{
    struct ry_emu_req *req = arg;
    req->in_flight--;
    if (!ok && !req->cancelled) {
        const char *why = ry_emu_proc_dead(peer_of(req)->proc);
        ry_emu_comm_fail(req->op->comm, ncclRemoteError, "rank %d cannot send to rank %d: %s", req->op->comm->rank,
                         req->peer, why ? why : "connection lost");
        return;
    }
    if (req->cancelled || req->offset == req->bytes)
        settle(req);
}

static void pump(struct ry_emu_req *req)
{
    struct ry_emu_peer *me = &req->op->comm->peers[req->op->comm->rank], *to = peer_of(req);
    struct ry_emu_links *links = ry_emu_links_map();
    struct ry_emu_link *from_port = NULL, *to_port = NULL;
    const struct ry_emu_rate *rate = NULL;
    if (links && req->peer != req->op->comm->rank) {
        bool cross = me->node_key != to->node_key;
        from_port = cross ? me->nic : me->gpu;
        to_port = cross ? to->nic : to->gpu;
        rate = cross ? &links->nic : &links->nvlink;
        if (!from_port || !to_port)
            rate = NULL;
    }
    size_t piece = PLAIN_PIECE;
    if (rate && rate->bytes_per_ns > 0) {
        double ms = rate->bytes_per_ns * 1e6;
        piece = ms < 16384 ? 16384 : ms < 1048576 ? (size_t)ms : 1048576;
    }
    req->in_flight++; /* held until the end, so that no callback on the way completes it */
    do {
        if (rate && req->offset && req->flow > ry_now_ns() + AHEAD_NS) {
            ry_emu_timer_set(&req->timer, req->flow - AHEAD_NS);
            break;
        }
        size_t n = req->bytes - req->offset < piece ? req->bytes - req->offset : piece;
        struct data_header h = {.id = req->id, .offset = req->offset};
        if (rate) {
            struct ry_emu_slot s = ry_emu_links_reserve(from_port, to_port, rate, req->flow, n);
            req->flow = s.through;
            req->hold = s.left;
            h.hold = s.arrives;
        }
        const char *from = req->buf + req->offset;
        req->offset += n;
        if (ry_emu_proc_is_self(to->proc)) {
            ry_emu_on_data(&h, sizeof h, (void *)from, n, false);
        } else {
            req->in_flight++;
            ry_emu_wire_send(to->proc, RY_EMU_AM_DATA, &h, sizeof h, from, n, on_sent, req);
        }
    } while (req->offset < req->bytes && !req->cancelled);
    req->in_flight--;
    if (req->cancelled || req->offset == req->bytes)
        settle(req);
}

static void meet(struct ry_emu_req *req, const struct cts_header *h)
{
    req->matched = true;
    req->id = h->id;
    if (h->bytes != req->bytes) {
        struct refuse_header r = {.id = h->id, .sent = req->bytes};
        struct ry_emu_peer *to = peer_of(req);
        if (ry_emu_proc_is_self(to->proc))
            ry_emu_on_refuse(&r, sizeof r);
        else
            ry_emu_wire_send(to->proc, RY_EMU_AM_REFUSE, &r, sizeof r, NULL, 0, NULL, NULL);
        ry_emu_comm_fail(req->op->comm, ncclInvalidUsage, "rank %d sends %zu bytes to rank %d, which receives %llu",
                         req->op->comm->rank, req->bytes, req->peer, (unsigned long long)h->bytes);
        return;
    }
    req->flow = ry_now_ns();
    pump(req);
}

static void depart(struct ncclComm *comm, int peer)
{
    comm->peers[peer].departed = true;
    if (ry_emu_waits_for(comm, peer))
        ry_emu_comm_fail(comm, ncclRemoteError, "rank %d has left the communicator, and rank %d still waits for it",
                         peer, comm->rank);
}

static void offer(struct ncclComm *comm, const struct cts_header *h)
{
    if (h->from < 0 || h->from >= comm->nranks || h->channel < GOODBYE || h->channel >= RY_EMU_CHANNELS)
        return;
    comm->peers[h->from].met = true;
    if (h->channel == GOODBYE) {
        depart(comm, h->from);
        return;
    }
    struct ry_emu_lane *lane = &comm->peers[h->from].lane[h->channel];
    for (struct ry_emu_req **p = &lane->waiting; *p; p = &(*p)->next) {
        struct ry_emu_req *req = *p;
        if (req->seq != h->seq)
            continue;
        *p = req->next;
        meet(req, h);
        return;
    }
    struct ry_emu_cts *c = malloc(sizeof *c);
    if (!c)
        abort();
    c->h = *h;
    c->next = lane->ready;
    lane->ready = c;
}

void ry_emu_on_cts(const void *header, size_t bytes)
{
    struct cts_header h;
    if (bytes < sizeof h)
        return;
    memcpy(&h, header, sizeof h);
    struct ncclComm *comm = ry_emu_comm_find(h.comm, h.to);
    if (comm) {
        offer(comm, &h);
        return;
    }
    /* A faster peer may be ready before this rank is: keep it until the communicator is known. */
    struct ry_emu_cts *c = malloc(sizeof *c);
    if (!c)
        abort();
    c->h = h;
    c->next = early;
    early = c;
}

void ry_emu_replay(struct ncclComm *comm)
{
    struct ry_emu_cts *mine = NULL;
    for (struct ry_emu_cts **p = &early; *p;) {
        struct ry_emu_cts *c = *p;
        if (c->h.comm != comm->uid || c->h.to != comm->rank) {
            p = &c->next;
            continue;
        }
        *p = c->next;
        c->next = mine; /* turns the order round once more: as they came, goodbyes last */
        mine = c;
    }
    while (mine) {
        struct ry_emu_cts *c = mine;
        mine = c->next;
        offer(comm, &c->h);
        free(c);
    }
}

void ry_emu_say_goodbye(struct ncclComm *comm)
{
    for (int r = 0; r < comm->nranks; r++) {
        struct ry_emu_peer *p = &comm->peers[r];
        struct cts_header h = {.comm = comm->uid, .to = r, .from = comm->rank, .channel = GOODBYE};
        if (r == comm->rank || !p->met || p->departed)
            continue; /* a peer that was never met has no connection whose end it could see */
        if (ry_emu_proc_is_self(p->proc))
            ry_emu_on_cts(&h, sizeof h);
        else
            ry_emu_wire_send(p->proc, RY_EMU_AM_CTS, &h, sizeof h, NULL, 0, NULL, NULL);
    }
}

void ry_emu_forget(struct ncclComm *comm)
{
    for (int r = 0; comm->peers && r < comm->nranks; r++)
        for (int ch = 0; ch < RY_EMU_CHANNELS; ch++)
            for (struct ry_emu_cts *c = comm->peers[r].lane[ch].ready, *next; c; c = next) {
                next = c->next;
                free(c);
            }
}

void ry_emu_post(struct ry_emu_req *req)
{
    struct ry_emu_lane *lane = lane_of(req);
    if (peer_of(req)->departed)
        ry_emu_comm_fail(req->op->comm, ncclRemoteError, "rank %d has left the communicator", req->peer);
    peer_of(req)->met = true;
    req->timer.fire = req->is_send ? send_fire : recv_fire;
    if (!req->is_send) {
        struct ncclComm *comm = req->op->comm;
        req->seq = lane->recvs++;
        req->id = slot_take(req);
        struct cts_header h = {.comm = comm->uid,
                               .seq = req->seq,
                               .id = req->id,
                               .bytes = req->bytes,
                               .to = req->peer,
                               .from = comm->rank,
                               .channel = req->op->channel};
        if (ry_emu_proc_is_self(peer_of(req)->proc))
            ry_emu_on_cts(&h, sizeof h);
        else
            ry_emu_wire_send(peer_of(req)->proc, RY_EMU_AM_CTS, &h, sizeof h, NULL, 0, NULL, NULL);
        return;
    }
    req->seq = lane->sends++;
    for (struct ry_emu_cts **p = &lane->ready; *p; p = &(*p)->next) {
        struct ry_emu_cts *c = *p;
        if (c->h.seq != req->seq)
            continue;
        *p = c->next;
        meet(req, &c->h);
        free(c);
        return;
    }
    req->next = lane->waiting;
    lane->waiting = req;
}

void ry_emu_cancel(struct ry_emu_req *req)
{
    if (req->done || req->cancelled)
        return;
    req->cancelled = true;
    if (req->is_send && !req->matched)
        for (struct ry_emu_req **p = &lane_of(req)->waiting; *p; p = &(*p)->next)
            if (*p == req) {
                *p = req->next;
                break;
            }
    ry_emu_timer_stop(&req->timer);
    settle(req);
}
