/*
 * run.c: a plan's steps as NCCL calls and device copies, in stream order.
 *
 * Owns: the runner, ry_run(), whether buffers allow it, and the stream on which some steps overlap the others. Not: staging memory (staging.c), many copies in one launch
 * (batch.c), packed messages (packed.c), sums (kept.c), verify mode (checks.c).
 */
#include "internal.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

int ry_nccl_find(struct ry_nccl *nccl, void *(*find)(const char *), struct ry_err *err)
{
    static const struct {
        const char *name;
        size_t offset;
    } calls[] = {
        {"ncclGroupStart", offsetof(struct ry_nccl, group_start)},
        {"ncclGroupEnd", offsetof(struct ry_nccl, group_end)},
        {"ncclSend", offsetof(struct ry_nccl, send)},
        {"ncclRecv", offsetof(struct ry_nccl, recv)},
        {"ncclGetErrorString", offsetof(struct ry_nccl, error_string)},
    };
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        void *f = find(calls[i].name);
        if (!f)
            return ry_fail(err, "the job's NCCL has no %s", calls[i].name);
        memcpy((char *)nccl + calls[i].offset, &f, sizeof f);
    }
    void *split = find("ncclCommSplit"), *destroy = find("ncclCommDestroy"), *abort = find("ncclCommAbort");
    void *id = find("ncclGetUniqueId"), *init = find("ncclCommInitRank");
    bool splits = split && destroy && abort, meets = splits && id && init;
    memcpy(&nccl->get_unique_id, &(void *){meets ? id : NULL}, sizeof id);
    memcpy(&nccl->comm_init_rank, &(void *){meets ? init : NULL}, sizeof init);
    memcpy(&nccl->comm_split, &(void *){splits ? split : NULL}, sizeof split);
    memcpy(&nccl->comm_destroy, &(void *){splits ? destroy : NULL}, sizeof destroy);
    memcpy(&nccl->comm_abort, &(void *){splits ? abort : NULL}, sizeof abort);
    return 0;
}

struct ry_runner *ry_runner_new(const struct ry_nccl *nccl, const struct ry_device *device, int ordinal, void *comm,
                                struct ry_err *err)
{
    struct ry_err why;
    struct ry_runner *r = calloc(1, sizeof *r);
    if (!r) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    r->nccl = *nccl;
    r->device = device;
    r->comm = comm;
    if (device->prepare(ordinal, NULL, err) || device->event_create_untimed(&r->stage_used, err)) {
        free(r);
        return NULL;
    }
    /* What follows makes things faster or is for verify mode: exchanges go without it. */
    r->kernels = !device->prepare(ordinal, &ry_run_kernels, &why) && !checks_prepare(device, &why);
    if (!r->kernels)
        ry_warn_once("plans run without Railyard's own kernels: %s", why.msg);
    else
        scan_prepare(r, ordinal);
    return r;
}

static void beside_free(struct ry_runner *r)
{
    struct ry_err err;
    for (int k = 0; k < RY_CHUNKS; k++)
        if (r->beside.over[k])
            r->device->event_destroy(r->beside.over[k]);
    if (r->beside.begun)
        r->device->event_destroy(r->beside.begun);
    if (r->beside.joined)
        r->device->event_destroy(r->beside.joined);
    if (r->beside.stream && r->device->stream_destroy(r->beside.stream, &err))
        ry_debug("a stream is lost: %s", err.msg);
    r->beside.stream = NULL;
}

void ry_runner_free(struct ry_runner *r, bool aborted)
{
    if (!r)
        return;
    /* Aborted or not, nothing waits: memory is given back behind an event. If that never comes, the memory never does.
     */
    if (aborted && r->stage)
        ry_debug("staging memory of an aborted communicator: %llu bytes", (unsigned long long)r->stage_bytes);
    digest_free(r);
    checks_free(r);
    scan_free(r);
    staging_free(r);
    beside_free(r);
    free(r);
}

/* ---- may it be done? ---- */

struct range {
    uintptr_t from, to;
    bool recv;
};

static int by_address(const void *a, const void *b)
{
    const struct range *x = a, *y = b;
    return x->from < y->from ? -1 : x->from > y->from;
}

/* Ascending in memory, as frameworks lay them out, and disjoint? Gives the first and last byte's address. */
static bool ascending(void *const *buf, const uint64_t *bytes, int n, bool disjoint, uintptr_t *from, uintptr_t *to)
{
    *from = *to = 0;
    for (int p = 0; p < n; p++) {
        uintptr_t at = (uintptr_t)buf[p];
        if (!bytes[p])
            continue;
        if (!*to)
            *from = at;
        else if (disjoint ? at < *to : at < *from)
            return false;
        if (at + bytes[p] > *to)
            *to = at + bytes[p];
    }
    return true;
}

bool ry_run_safe(const struct ry_buffers *b)
{
    uintptr_t sends, sends_end, recvs, recvs_end;
    int n = 0;
    for (int p = 0; p < b->nranks; p++)
        if ((b->send_bytes[p] && !b->send[p]) || (b->recv_bytes[p] && !b->recv[p]))
            return false;
    if (ascending((void *const *)b->send, b->send_bytes, b->nranks, false, &sends, &sends_end) &&
        ascending(b->recv, b->recv_bytes, b->nranks, true, &recvs, &recvs_end) &&
        (sends_end <= recvs || recvs_end <= sends))
        return true;
    struct range *ranges = malloc(2 * (size_t)b->nranks * sizeof *ranges);
    if (!ranges)
        return false;
    for (int p = 0; p < b->nranks; p++) {
        uintptr_t s = (uintptr_t)b->send[p], r = (uintptr_t)b->recv[p];
        if (b->send_bytes[p])
            ranges[n++] = (struct range){s, s + b->send_bytes[p], false};
        if (b->recv_bytes[p])
            ranges[n++] = (struct range){r, r + b->recv_bytes[p], true};
    }
    qsort(ranges, (size_t)n, sizeof *ranges, by_address);
    /* Each against what reaches furthest of those before it; sends may overlap sends. */
    uintptr_t any_end = 0, recv_end = 0;
    bool safe = true;
    for (int i = 0; i < n && safe; i++) {
        safe = ranges[i].from >= recv_end && (!ranges[i].recv || ranges[i].from >= any_end);
        if (ranges[i].to > any_end)
            any_end = ranges[i].to;
        if (ranges[i].recv && ranges[i].to > recv_end)
            recv_end = ranges[i].to;
    }
    free(ranges);
    return safe;
}

/* ---- doing it ---- */

static void *address(const struct ry_runner *r, const struct ry_buffers *b, const struct ry_at *at)
{
    char *base = at->place == RY_AT_STAGE  ? r->stage
                 : at->place == RY_AT_SEND ? (char *)(uintptr_t)b->send[at->peer]
                                           : b->recv[at->peer];
    return base + at->offset;
}

static bool fits(const struct ry_plan *plan, const struct ry_buffers *b, const struct ry_at *at, uint64_t bytes,
                 bool written)
{
    if (at->place == RY_AT_STAGE)
        return bytes <= plan->stage_bytes && at->offset <= plan->stage_bytes - bytes;
    if (at->peer < 0 || at->peer >= b->nranks || (written && at->place == RY_AT_SEND))
        return false;
    /* Its end may lie in a later segment: the plan knew the addresses. */
    return at->place == RY_AT_SEND ? b->send[at->peer] && at->offset < b->send_bytes[at->peer]
                                   : b->recv[at->peer] && at->offset < b->recv_bytes[at->peer];
}

/* Before anything is enqueued: after that there is no way back. */
static int check(const struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b,
                 const struct ry_run_node *node, struct ry_err *err)
{
    if (plan->rank != b->rank || plan->nranks != b->nranks)
        return ry_fail(err, "a plan for rank %d of %d does not fit rank %d of %d", plan->rank, plan->nranks, b->rank,
                       b->nranks);
    if ((plan->strategy == RY_REPLICA) != (node && !node->local))
        return ry_fail(err, "the plan is not for the communicators at hand");
    if (plan->beside < 0 || plan->beside > plan->nsteps)
        return ry_fail(err, "a plan of %d steps, %d of which may overlap others", plan->nsteps, plan->beside);
    if (plan->stage_bytes > r->stage_bytes)
        return ry_fail(err, "the plan needs %llu bytes of staging memory, %llu are held",
                       (unsigned long long)plan->stage_bytes, (unsigned long long)r->stage_bytes);
    for (int i = 0; i < plan->nsteps; i++) {
        const struct ry_step *s = &plan->steps[i];
        struct ry_err why;
        if (s->kind == RY_STEP_PACK || s->kind == RY_STEP_EXPAND || s->kind == RY_STEP_SUM) {
            if (packed_check(r, plan, b, s, &why))
                return ry_fail(err, "step %d of the plan, which %s: %s", i,
                               s->kind == RY_STEP_PACK  ? "packs a message"
                               : s->kind == RY_STEP_SUM ? "sums rows"
                                                        : "expands a message",
                               why.msg);
            continue;
        }
        bool reads = s->kind != RY_STEP_RECV, writes = s->kind != RY_STEP_SEND;
        int peers = node && !node->local && ry_inside(plan->inside, s->group) ? node->twins : b->nranks;
        if ((s->kind != RY_STEP_COPY && (s->peer < 0 || s->peer >= peers)) ||
            (reads && !fits(plan, b, &s->from, s->bytes, false)) || (writes && !fits(plan, b, &s->to, s->bytes, true)))
            return ry_fail(err, "step %d of the plan does not fit the job's buffers", i);
        if (plan->beside && i < ry_second(plan) ? s->group >= RY_CHUNKS
                                                : i >= ry_second(plan) && (unsigned)s->after >= RY_CHUNKS)
            return ry_fail(err, "step %d of the plan is in, or waits for, a group that nothing can wait for", i);
        if (node && node->local && ry_inside(plan->inside, s->group) && node->local[s->peer] < 0)
            return ry_fail(err, "step %d of the plan leaves the node in a group that stays inside", i);
    }
    return 0;
}

/*
 * Copies that follow each other go in one batch as long as none may depend on another; so do messages to pack, in a
 * launch of their own, and pieces to expand, without copies among them. Send segments are never written; a batch that
 * reads from the staging memory or the receive buffer does not write there as well, and staging memory is written in
 * ascending order (what is not, is still right, in a batch of its own).
 */
struct copying {
    struct batch batch;
    struct packed
        packed; /* messages to pack count as copies; beside pieces to expand, or sums, there is nothing else */
    bool reads[3], writes[3]; /* by enum ry_place */
    uint64_t stage_end;
};

static void start_batch(struct copying *c, struct ry_runner *r, const struct ry_buffers *b)
{
    memset(c->reads, 0, sizeof c->reads);
    memset(c->writes, 0, sizeof c->writes);
    c->stage_end = 0;
    batch_start_copy(&c->batch, r, b->stream);
    packed_start(&c->packed, r, b);
}

static int end_batch(struct copying *c, struct ry_err *err)
{
    memset(c->reads, 0, sizeof c->reads);
    memset(c->writes, 0, sizeof c->writes);
    c->stage_end = 0;
    int rc = batch_flush(&c->batch, err);
    return packed_flush(&c->packed, rc ? NULL : err) ? -1 : rc;
}

/* Before a copy, or a message that is packed, joins the batch. */
static int join(struct copying *c, const struct ry_step *s, enum ry_place from, struct ry_err *err)
{
    enum ry_place to = s->to.place;
    bool overlaps = to == RY_AT_STAGE && s->to.offset < c->stage_end;
    if ((overlaps || c->writes[from] || c->reads[to] || c->packed.npieces || c->packed.nsums) && end_batch(c, err))
        return -1;
    c->reads[from] = true;
    c->writes[to] = true;
    if (to == RY_AT_STAGE)
        c->stage_end = s->to.offset + s->bytes;
    return 0;
}

static int copy(struct copying *c, struct ry_runner *r, const struct ry_buffers *b, const struct ry_step *s,
                struct ry_err *err)
{
    if (join(c, s, s->from.place, err) ||
        batch_add(&c->batch, address(r, b, &s->to), address(r, b, &s->from), s->bytes, 0, err))
        return -1;
    return s->from.place == s->to.place ? end_batch(c, err) : 0; /* whatever comes next may depend on it */
}

static int pack(struct copying *c, struct ry_runner *r, const struct ry_buffers *b, const struct ry_step *s,
                struct ry_err *err)
{
    return join(c, s, RY_AT_SEND, err) || packed_pack(&c->packed, s->peer, address(r, b, &s->to), err) ? -1 : 0;
}

static int expand(struct copying *c, struct ry_runner *r, const struct ry_buffers *b, const struct ry_step *s,
                  struct ry_err *err)
{
    if (!c->packed.npieces && end_batch(c, err))
        return -1;
    struct ry_rows_piece piece = {.message = address(r, b, &s->from),
                                  .row_bytes = s->repeats.row_bytes,
                                  .distinct = s->repeats.distinct,
                                  .skip = s->skip,
                                  .bytes = s->bytes,
                                  .to = address(r, b, &s->to)};
    return packed_expand(&c->packed, &piece, ry_rows_message_bytes(piece.row_bytes, piece.distinct, s->rows), err);
}

static int sum(struct copying *c, struct ry_runner *r, const struct ry_buffers *b, const struct ry_step *s,
               struct ry_err *err)
{
    if (!c->packed.nsums && end_batch(c, err))
        return -1;
    return packed_sum(&c->packed, s->peer, address(r, b, &s->from), address(r, b, &s->to), s->bytes, err);
}

/* The steps of one group, from `first` on: returns how many. `local`: its ranks by other numbers, on `comm`. Those that `cross`
   carries are left out; if there is nothing else NCCL is not called. */
static int transfer(struct ry_runner *r, const struct ry_buffers *b, const struct ry_plan *plan, int first, void *comm,
                    const int *local, const struct ry_cross *cross, int *result)
{
    const struct ry_step *s = &plan->steps[first], *end = plan->steps + plan->nsteps;
    int group = s->group;
    bool began = false;
    for (; s < end && ry_is_transfer(s) && s->group == group; s++) {
        int peer = local ? local[s->peer] : s->peer;
        if (*result || (cross && cross->with[s->peer]))
            continue;
        if (!began && (*result = r->nccl.group_start()))
            continue;
        began = true;
        *result = s->kind == RY_STEP_SEND
                      ? r->nccl.send(address(r, b, &s->from), s->bytes, RY_NCCL_UINT8, peer, comm, b->stream)
                      : r->nccl.recv(address(r, b, &s->to), s->bytes, RY_NCCL_UINT8, peer, comm, b->stream);
    }
    int ended = began ? r->nccl.group_end() : 0;
    if (!*result)
        *result = ended;
    return (int)(s - plan->steps) - first;
}

/* The same on the communicator of the node's ranks, which may be aborted at any time: not while it is being called. */
static int transfer_inside(struct ry_runner *r, const struct ry_buffers *b, const struct ry_plan *plan, int first,
                           struct ry_run_node *node, int *result)
{
    int done = 0;
    atomic_fetch_add(&node->users, 1);
    void *comm = atomic_load(&node->comm);
    if (comm)
        done = transfer(r, b, plan, first, comm, node->local, NULL, result);
    else
        *result = RY_NCCL_SYSTEM_ERROR;
    atomic_fetch_sub(&node->users, 1);
    return done;
}

/* The same where something else than NCCL carries what crosses nodes: that begins first and is waited for last, as it is
   the slower one. -1 with `err`. */
static int transfer_across(struct ry_runner *r, const struct ry_buffers *b, const struct ry_plan *plan, int first,
                           struct ry_cross *cross, int *result, struct ry_err *err)
{
    const struct ry_step *s = &plan->steps[first], *end = plan->steps + plan->nsteps;
    int group = s->group, n = 0, rc = 0;
    for (; s < end && ry_is_transfer(s) && s->group == group; s++)
        n += cross->with[s->peer];
    struct ry_cross_transfer *list = n ? malloc((size_t)n * sizeof *list) : NULL;
    if (n && !list)
        return ry_fail(err, "out of memory for %d transfers", n);
    n = 0;
    for (s = &plan->steps[first]; s < end && ry_is_transfer(s) && s->group == group; s++) {
        bool send = s->kind == RY_STEP_SEND;
        if (cross->with[s->peer])
            list[n++] = (struct ry_cross_transfer){send, s->peer, address(r, b, send ? &s->from : &s->to), s->bytes};
    }
    if (n)
        rc = cross->begin(cross, list, n, b->stream, err);
    free(list);
    if (rc)
        return -1;
    int done = transfer(r, b, plan, first, r->comm, NULL, cross, result);
    return n && !*result && cross->end(cross, b->stream, err) ? -1 : done;
}

/* ---- some steps beside the others ---- */

/*
 * A stream of our own for the second part of the plan. Two communicators are then at work at once, which cannot hang as
 * long as all ranks enqueue in the same order and one order suffices for all kernels: each rank enqueues the whole
 * first part before the second, and nothing in the first waits for anything in the second. So even where the device
 * runs kernels strictly in the order in which they were enqueued (CUDA_DEVICE_MAX_CONNECTIONS=1,
 * CUDA_LAUNCH_BLOCKING=1), everything ends; it is then merely no faster. Whether a rank does so is its own affair: what
 * is sent, and in which order on each communicator, is the same.
 */
static bool has_beside(struct ry_runner *r)
{
    struct ry_err why;
    const struct ry_device *d = r->device;
    if (r->beside.tried)
        return r->beside.stream;
    r->beside.tried = true;
    int rc = d->stream_create(&r->beside.stream, &why) || d->event_create_untimed(&r->beside.begun, &why) ||
             d->event_create_untimed(&r->beside.joined, &why);
    for (int k = 0; !rc && k < RY_CHUNKS; k++)
        rc = d->event_create_untimed(&r->beside.over[k], &why);
    if (!rc)
        return true;
    ry_info("steps inside the node do not overlap those between nodes: %s", why.msg);
    beside_free(r);
    return false;
}

enum part { ALL, FIRST, SECOND };

/* Before a step of the second part: what it comes after. A rank need not have a transfer in every group. */
static int wait_for(struct ry_runner *r, void *stream, int after, int *waited, struct ry_err *err)
{
    int group = after;
    while (group > *waited && !(r->beside.recorded >> group & 1))
        group--;
    if (group <= *waited)
        return 0;
    *waited = group;
    return r->device->stream_wait(stream, r->beside.over[group], err);
}

/* Steps of one part, or all of them, on b->stream. */
static int carry_out(struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b,
                     struct ry_run_node *node, enum part part, int *result, struct ry_err *err)
{
    struct copying copying;
    int rc = 0, waited = -1, end = part == FIRST ? ry_second(plan) : plan->nsteps;
    start_batch(&copying, r, b);
    for (int i = part == SECOND ? ry_second(plan) : 0; i < end && !rc && !*result;) {
        const struct ry_step *s = &plan->steps[i];
        if (part == SECOND && s->after > waited &&
            (end_batch(&copying, err) || wait_for(r, b->stream, s->after, &waited, err)))
            return -1;
        if (ry_is_transfer(s)) {
            bool inside = node && ry_inside(plan->inside, s->group);
            if (end_batch(&copying, err))
                return -1;
            int done = inside     ? transfer_inside(r, b, plan, i, node, result)
                       : r->cross ? transfer_across(r, b, plan, i, r->cross, result, err)
                                  : transfer(r, b, plan, i, r->comm, NULL, NULL, result);
            if (done < 0)
                return -1;
            i += done;
            if (part == FIRST && !*result) {
                rc = r->device->event_record(r->beside.over[s->group], b->stream, err);
                r->beside.recorded |= 1u << s->group;
            }
            continue;
        }
        rc = s->kind == RY_STEP_COPY   ? copy(&copying, r, b, s, err)
             : s->kind == RY_STEP_PACK ? pack(&copying, r, b, s, err)
             : s->kind == RY_STEP_SUM  ? sum(&copying, r, b, s, err)
                                       : expand(&copying, r, b, s, err);
        i++;
    }
    if (!rc && !*result)
        rc = end_batch(&copying, err);
    return rc ? -1 : 0;
}

/* Both parts, the second on its own stream, which begins with the first; the job's stream waits for it, even after a
 * failure. */
static int carry_out_beside(struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b,
                            struct ry_run_node *node, int *result, struct ry_err *err)
{
    struct ry_buffers own = *b;
    own.stream = r->beside.stream;
    r->beside.recorded = 0;
    if (r->device->event_record(r->beside.begun, b->stream, err) ||
        r->device->stream_wait(own.stream, r->beside.begun, err) || carry_out(r, plan, b, node, FIRST, result, err))
        return -1;
    int rc = *result ? 0 : carry_out(r, plan, &own, node, SECOND, result, err);
    if (r->device->event_record(r->beside.joined, own.stream, rc ? NULL : err) ||
        r->device->stream_wait(b->stream, r->beside.joined, rc ? NULL : err))
        rc = -1;
    return rc;
}

static int to_itself(const struct ry_runner *r, void *comm, int rank, const void *from, void *to, uint64_t bytes,
                     void *stream)
{
    int result = r->nccl.group_start();
    if (result)
        return result;
    result = r->nccl.send(from, bytes, RY_NCCL_UINT8, rank, comm, stream);
    if (!result)
        result = r->nccl.recv(to, bytes, RY_NCCL_UINT8, rank, comm, stream);
    int ended = r->nccl.group_end();
    return result ? result : ended;
}

int ry_run_to_itself(struct ry_runner *r, struct ry_run_node *node, int rank, const void *from, void *to,
                     uint64_t bytes, void *stream, int *result, struct ry_err *err)
{
    const struct ry_device *d = r->device;
    *result = to_itself(r, r->comm, rank, from, to, bytes, stream);
    if (*result || !node || !node->local)
        return 0;
    atomic_fetch_add(&node->users, 1);
    void *comm = atomic_load(&node->comm);
    *result = comm ? to_itself(r, comm, node->local[rank], from, to, bytes, stream) : 0;
    atomic_fetch_sub(&node->users, 1);
    if (*result || !has_beside(r))
        return 0;
    return d->event_record(r->beside.begun, stream, err) || d->stream_wait(r->beside.stream, r->beside.begun, err) ||
                   d->event_record(r->beside.joined, r->beside.stream, err) ||
                   d->stream_wait(stream, r->beside.joined, err)
               ? -1
               : 0;
}

void ry_run_localize(struct ry_plan *plan, int replicas)
{
    int each = plan->nranks / replicas;
    plan->rank %= each;
    plan->nranks = each;
    for (int i = 0; i < plan->nsteps; i++) {
        struct ry_step *s = &plan->steps[i];
        s->peer = ry_inside(plan->inside, s->group) ? s->peer / each : s->peer % each;
        s->from.peer %= each;
        s->to.peer %= each;
    }
}

void ry_run_cross(struct ry_runner *r, struct ry_cross *cross)
{
    r->cross = cross;
}

int ry_run(struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b, struct ry_run_node *node,
           int *result, struct ry_err *err)
{
    *result = 0;
    if (check(r, plan, b, node, err))
        return -1;
    bool enters = plan->stage_bytes || r->cross; /* a carrier's memory is one exchange's at a time, too */
    if (enters && staging_enter(r, b->stream, err))
        return -1;
    int rc = plan->beside && node && has_beside(r) ? carry_out_beside(r, plan, b, node, result, err)
                                                   : carry_out(r, plan, b, node, ALL, result, err);
    /* Even after a failure: what was enqueued may still use the memory. */
    if (enters && staging_leave(r, b->stream, rc ? NULL : err))
        rc = -1;
    return rc;
}
