/*
 * checks.c: an exchange done both ways, and whether the bytes are the same.
 *
 * Owns: the second, direct run, the scratch memory it goes to, comparing on the device, and the answers on their way to
 * the host. Not: what a mismatch leads to.
 *
 * An answer is one word, or two (digest.c), that the stream copies to pinned memory, and an event after it. Pinned memory is taken when a
 * runner is made and belongs to the process for good: taking or giving it back may wait for the device, which a rank
 * must not do while others wait for it, and a communicator that was aborted may still have a copy under way to it.
 */
#include "internal.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "base/log.h"

#define SLAB 4096     /* bytes of pinned memory that are taken at once */
#define PER_RUNNER 16 /* comparisons under way at most: further ones are left out */
#define ALIGN 256     /* of each segment in scratch memory: copies there are then as fast as they get */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct check *idle;               /* ready for use */
static struct check *orphan;             /* their runner has gone, but the device may still write */
static const struct ry_device *slabs_of; /* a process has one kind of device */

int checks_prepare(const struct ry_device *device, struct ry_err *err)
{
    int rc = 0;
    pthread_mutex_lock(&lock);
    if (slabs_of != device) {
        void *slab = NULL;
        size_t n = SLAB / (2 * sizeof(uint64_t));
        struct check *checks = calloc(n, sizeof *checks);
        if (!checks)
            rc = ry_fail(err, "out of memory for %zu comparisons", n);
        else
            rc = device->pinned_alloc(&slab, SLAB, err);
        for (size_t i = 0; !rc && i < n; i++) {
            checks[i].answer = (volatile uint64_t *)slab + 2 * i;
            checks[i].next = i + 1 < n ? &checks[i + 1] : NULL;
        }
        if (!rc) {
            idle = checks;
            orphan = NULL;
            slabs_of = device;
        } else {
            free(checks);
        }
    }
    pthread_mutex_unlock(&lock);
    return rc;
}

struct check *checks_take(const struct ry_device *device, struct ry_err *err)
{
    pthread_mutex_lock(&lock);
    if (!idle) {
        for (struct check **at = &orphan, *c; (c = *at);) {
            bool done = false;
            if (device->event_done(c->event, &done, NULL) || !done) {
                at = &c->next;
                continue;
            }
            *at = c->next;
            c->next = idle;
            idle = c;
        }
    }
    struct check *c = idle;
    if (c)
        idle = c->next;
    pthread_mutex_unlock(&lock);
    if (!c) {
        ry_fail(err, "too many comparisons are under way in this process");
        return NULL;
    }
    c->next = NULL;
    if (!c->event && device->event_create_untimed(&c->event, err)) {
        pthread_mutex_lock(&lock);
        c->next = idle;
        idle = c;
        pthread_mutex_unlock(&lock);
        return NULL;
    }
    return c;
}

static void put_back(struct check *c, struct check **list)
{
    pthread_mutex_lock(&lock);
    c->next = *list;
    *list = c;
    pthread_mutex_unlock(&lock);
}

void checks_put_back(struct check *c, bool under_way)
{
    put_back(c, under_way ? &orphan : &idle);
}

/* The whole exchange as plain NCCL does it: empty segments are left out on both sides, since both know their size. */
static void direct(struct ry_runner *r, const struct ry_buffers *b, void *const *recv, int *result)
{
    if ((*result = r->nccl.group_start()))
        return;
    for (int p = 0; p < b->nranks && !*result; p++) {
        if (b->send_bytes[p])
            *result = r->nccl.send(b->send[p], b->send_bytes[p], RY_NCCL_UINT8, p, r->comm, b->stream);
        if (b->recv_bytes[p] && !*result)
            *result = r->nccl.recv(recv[p], b->recv_bytes[p], RY_NCCL_UINT8, p, r->comm, b->stream);
    }
    int end = r->nccl.group_end();
    if (!*result)
        *result = end;
}

/* Where the second run goes: the answer, then the segments. Freed with `free`, on the host. */
struct scratch {
    void *memory;
    uint64_t bytes;
    uint64_t *answer;
    struct check *check;
    void **recv; /* [nranks] */
};

static int scratch_take(struct scratch *s, struct ry_runner *r, const struct ry_buffers *b, struct ry_err *err)
{
    *s = (struct scratch){.bytes = ALIGN};
    if (!r->kernels)
        return ry_fail(err, "Railyard's kernels are not loaded");
    if (r->nchecks >= PER_RUNNER)
        return ry_fail(err, "%d comparisons are under way already", PER_RUNNER);
    for (int p = 0; p < b->nranks; p++)
        s->bytes += (b->recv_bytes[p] + ALIGN - 1) / ALIGN * ALIGN;
    if (!ry_run_staging_reserve(s->bytes))
        return ry_fail(err, "%llu bytes are beyond what RAILYARD_STAGING leaves", (unsigned long long)s->bytes);
    s->recv = malloc((size_t)b->nranks * sizeof *s->recv);
    if (!s->recv)
        ry_fail(err, "out of memory");
    if (!s->recv || !(s->check = checks_take(r->device, err)) ||
        r->device->alloc_async(&s->memory, s->bytes, b->stream, err)) {
        if (s->check)
            put_back(s->check, &idle);
        free(s->recv);
        ry_run_staging_unreserve(s->bytes);
        return -1;
    }
    s->answer = s->memory;
    char *at = (char *)s->memory + ALIGN;
    for (int p = 0; p < b->nranks; at += (b->recv_bytes[p] + ALIGN - 1) / ALIGN * ALIGN, p++)
        s->recv[p] = at;
    return 0;
}

static int compare(struct scratch *s, struct ry_runner *r, const struct ry_buffers *b, struct ry_err *err)
{
    struct batch batch;
    if (r->device->fill(s->answer, 0xff, sizeof *s->answer, b->stream, err)) /* RY_NO_DIFFERENCE */
        return -1;
    batch_start_compare(&batch, r, b->stream, s->answer);
    for (int p = 0; p < b->nranks; p++)
        if (batch_add(&batch, b->recv[p], s->recv[p], b->recv_bytes[p], (uint32_t)p, err))
            return -1;
    if (batch_flush(&batch, err) ||
        r->device->copy((void *)s->check->answer, s->answer, sizeof *s->answer, b->stream, err) ||
        r->device->event_record(s->check->event, b->stream, err))
        return -1;
    return 0;
}

int ry_run_verify(struct ry_runner *r, const struct ry_plan *plan, const struct ry_buffers *b, struct ry_run_node *node,
                  uint64_t number, int *result, struct ry_err *err)
{
    struct scratch s;
    struct ry_err why, lost;
    if (ry_run(r, plan, b, node, result, err))
        return -1;
    if (*result)
        return 0;
    if (scratch_take(&s, r, b, &why)) {
        ry_warn_once("verify: exchange %llu was not compared on this rank, nor may later ones be: %s",
                     (unsigned long long)number, why.msg);
        direct(r, b, b->recv, result);
        return 0;
    }
    direct(r, b, s.recv, result);
    int rc = *result ? 0 : compare(&s, r, b, err);
    if (*result) {
        put_back(s.check, &idle);
    } else if (!rc) {
        s.check->number = number;
        if (r->newest)
            r->newest->next = s.check;
        else
            r->oldest = s.check;
        r->newest = s.check;
        r->nchecks++;
    } else {
        r->device->event_destroy(
            s.check->event); /* a copy may be under way, with no event after it: never used again */
    }
    if (r->device->free_async(s.memory, b->stream, &lost))
        ry_info("%llu bytes of scratch memory are lost: %s", (unsigned long long)s.bytes, lost.msg);
    ry_run_staging_unreserve(s.bytes);
    free(s.recv);
    return rc;
}

bool ry_run_checks(struct ry_runner *r, uint64_t *equal, struct ry_mismatch *bad)
{
    *equal = 0;
    if (scan_damage(r)) {
        *bad = (struct ry_mismatch){.peer = -1};
        return true;
    }
    for (struct check *c; (c = r->oldest);) {
        bool done = false;
        int broken = r->device->event_done(c->event, &done, NULL);
        if (!broken && !done)
            return false;
        uint64_t answer = *c->answer, number = c->number;
        if (!(r->oldest = c->next))
            r->newest = NULL;
        r->nchecks--;
        put_back(c, broken ? &orphan : &idle);
        if (broken)
            continue; /* the device is in no state to say */
        if (answer != RY_NO_DIFFERENCE) {
            *bad = (struct ry_mismatch){.number = number,
                                        .peer = (int)(answer >> RY_DIFFERENCE_BITS),
                                        .offset = answer & ((UINT64_C(1) << RY_DIFFERENCE_BITS) - 1)};
            return true;
        }
        ++*equal;
    }
    return false;
}

void checks_free(struct ry_runner *r)
{
    for (struct check *c; (c = r->oldest);) {
        r->oldest = c->next;
        put_back(c, &orphan);
    }
    r->newest = NULL;
    r->nchecks = 0;
}
