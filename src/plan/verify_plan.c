/*
 * verify_plan.c: each plan by itself: its form, whether every step stays inside the memory that it names, and whether
 * two transfers of a group touch the same bytes.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "verify_internal.h"

/* What a step of a group touches. */
struct touch {
    int space; /* RECV_BY_ADDRESS, STAGE, or the receive segment */
    int step;
    bool write;
    uint64_t lo, hi;
};
#define STAGE (-1)
#define RECV_BY_ADDRESS (-2)

struct text ry_verify_name(const struct machine *m, int rank, int i)
{
    struct text t;
    const struct ry_step *s = &m->plans[rank]->steps[i];
    if (s->kind == RY_STEP_COPY)
        snprintf(t.s, sizeof t.s, "rank %d, step %d (copy %" PRIu64 " bytes)", rank, i, s->bytes);
    else if (s->kind == RY_STEP_PACK)
        snprintf(t.s, sizeof t.s, "rank %d, step %d (pack %" PRIu64 " bytes for node %d)", rank, i, s->bytes, s->peer);
    else if (s->kind == RY_STEP_EXPAND)
        snprintf(t.s, sizeof t.s, "rank %d, step %d (expand %" PRIu64 " bytes of what rank %d packed)", rank, i,
                 s->bytes, s->peer);
    else if (s->kind == RY_STEP_SUM)
        snprintf(t.s, sizeof t.s, "rank %d, step %d (sum %" PRIu64 " rows for rank %d)", rank, i, s->rows, s->peer);
    else
        snprintf(t.s, sizeof t.s, "rank %d, step %d (group %d: %s %" PRIu64 " bytes %s rank %d)", rank, i, s->group,
                 s->kind == RY_STEP_SEND ? "send" : "receive", s->bytes, s->kind == RY_STEP_SEND ? "to" : "from",
                 s->peer);
    return t;
}

int ry_verify_room(struct machine *m, void *v, size_t *cap, size_t want, size_t each)
{
    if (want <= *cap)
        return 0;
    size_t grown = *cap * 2 > want ? *cap * 2 : want < 4 ? want : want + 4;
    void *p;
    memcpy(&p, v, sizeof p);
    p = realloc(p, grown * each);
    if (!p)
        return no_memory(m);
    memcpy(v, &p, sizeof p);
    *cap = grown;
    return 0;
}

/* The segment that holds the byte at `address`, tried from `after` on since neighbours mostly follow each other; -1:
 * none. */
static int segment_at(const struct machine *m, enum ry_place place, int rank, int after, uint64_t address)
{
    const uintptr_t *at = addresses(m, place, rank);
    for (int k = 1; at && k < m->n; k++) {
        int p = (after + k) % m->n;
        if (at[p] <= address && address - at[p] < segment_bytes(m, place, rank, p))
            return p;
    }
    return -1;
}

uint64_t ry_verify_part(const struct machine *m, int rank, struct ry_at *at, uint64_t *left, int *seg, uint64_t *offset)
{
    uint64_t bytes = segment_bytes(m, at->place, rank, at->peer);
    if (at->offset == bytes && addresses(m, at->place, rank)) {
        uint64_t address = addresses(m, at->place, rank)[at->peer] + bytes;
        int next = segment_at(m, at->place, rank, at->peer, address);
        if (next < 0)
            return 0;
        *at = (struct ry_at){at->place, next, address - addresses(m, at->place, rank)[next]};
        bytes = segment_bytes(m, at->place, rank, next);
    }
    if (at->offset >= bytes)
        return 0;
    *seg = at->peer;
    *offset = at->offset;
    uint64_t part = bytes - at->offset < *left ? bytes - at->offset : *left;
    at->offset += part;
    *left -= part;
    return part;
}

/* Does a step's place lie inside the memory that it names? */
static int check_range(struct machine *m, int rank, int step, struct ry_at at, uint64_t bytes)
{
    static const char *const what[] = {"send segment", "receive segment", "staging memory"};
    if ((unsigned)at.place > RY_AT_STAGE)
        return ry_fail(m->err, "%s: names no place", ry_verify_name(m, rank, step).s);
    if (at.place == RY_AT_STAGE) {
        uint64_t size = m->plans[rank]->stage_bytes;
        if (at.peer != -1)
            return ry_fail(m->err, "%s: a place in staging memory with a peer, %d", ry_verify_name(m, rank, step).s,
                           at.peer);
        if (at.offset > size || bytes > size - at.offset)
            return ry_fail(m->err, "%s: overruns staging memory: offset %" PRIu64 " in %" PRIu64 " bytes",
                           ry_verify_name(m, rank, step).s, at.offset, size);
        return 0;
    }
    if (at.peer < 0 || at.peer >= m->n)
        return ry_fail(m->err, "%s: %s %d does not exist", ry_verify_name(m, rank, step).s, what[at.place], at.peer);
    struct ry_at walk = at;
    uint64_t left = bytes, offset;
    bool inside = at.offset < segment_bytes(m, at.place, rank, at.peer);
    for (int seg; inside && left;)
        inside = ry_verify_part(m, rank, &walk, &left, &seg, &offset) > 0;
    if (!inside)
        return ry_fail(m->err, "%s: overruns %s %d of %" PRIu64 " bytes, from offset %" PRIu64 " on",
                       ry_verify_name(m, rank, step).s, what[at.place], walk.peer,
                       segment_bytes(m, at.place, rank, walk.peer), at.offset);
    return 0;
}

static int by_place(const void *a, const void *b)
{
    const struct touch *x = a, *y = b;
    if (x->space != y->space)
        return x->space < y->space ? -1 : 1;
    return x->lo != y->lo ? (x->lo < y->lo ? -1 : 1) : (x->step > y->step) - (x->step < y->step);
}

/* Two that touch the same memory, one of them writing? `*one` and `*other` are their `step`s, `*at` where. Sorts. */
static bool collide(struct touch *t, size_t n, int *one, int *other, uint64_t *at)
{
    if (n < 2)
        return false;
    qsort(t, n, sizeof *t, by_place);
    const struct touch *any = NULL, *write = NULL; /* so far: what reaches furthest in this space */
    for (size_t i = 0; i < n; i++) {
        if (any && any->space != t[i].space)
            any = write = NULL;
        const struct touch *before = t[i].write ? any : write;
        if (before && before->hi > t[i].lo) {
            *one = before->step;
            *other = t[i].step;
            *at = t[i].lo;
            return true;
        }
        if (!any || t[i].hi > any->hi)
            any = &t[i];
        if (t[i].write && (!write || t[i].hi > write->hi))
            write = &t[i];
    }
    return false;
}

static struct touch touch_of(const struct machine *m, int rank, int step, struct ry_at at, bool write)
{
    uint64_t bytes = m->plans[rank]->steps[step].bytes;
    const uintptr_t *addr = at.place == RY_AT_STAGE ? NULL : addresses(m, at.place, rank);
    uint64_t lo = at.offset + (addr ? addr[at.peer] : 0);
    int space = at.place == RY_AT_STAGE ? STAGE : addr ? RECV_BY_ADDRESS : at.peer;
    return (struct touch){space, step, write, lo, lo + bytes};
}

/* Steps [from, to) are one group. Send buffers are only read, so they cannot collide. */
static int check_group(struct machine *m, int rank, int from, int to)
{
    const struct ry_step *steps = m->plans[rank]->steps;
    size_t n = 0;
    int one, other;
    uint64_t at;
    if (ry_verify_room(m, &m->touches, &m->touches_cap, (size_t)(to - from), sizeof *m->touches))
        return -1;
    for (int i = from; i < to; i++)
        if (steps[i].kind == RY_STEP_RECV)
            m->touches[n++] = touch_of(m, rank, i, steps[i].to, true);
        else if (steps[i].from.place != RY_AT_SEND)
            m->touches[n++] = touch_of(m, rank, i, steps[i].from, false);
    if (collide(m->touches, n, &one, &other, &at))
        return ry_fail(m->err, "%s and step %d of the same group touch the same memory, at offset %" PRIu64,
                       ry_verify_name(m, rank, one).s, other, at);
    return 0;
}

/* Buffers that overlap cannot be proved: what is received first may be sent later. */
static int check_buffers(struct machine *m, int rank)
{
    const uintptr_t *recv = addresses(m, RY_AT_RECV, rank), *send = addresses(m, RY_AT_SEND, rank);
    size_t n = 0;
    int one, other;
    uint64_t at;
    if (!recv)
        return 0;
    if (ry_verify_room(m, &m->touches, &m->touches_cap, 2 * (size_t)m->n, sizeof *m->touches))
        return -1;
    for (int p = 0; p < m->n; p++) {
        uint64_t in = segment_bytes(m, RY_AT_RECV, rank, p), out = segment_bytes(m, RY_AT_SEND, rank, p);
        if (in)
            m->touches[n++] = (struct touch){0, p, true, recv[p], recv[p] + in};
        if (send && out)
            m->touches[n++] = (struct touch){0, p, false, send[p], send[p] + out};
    }
    if (collide(m->touches, n, &one, &other, &at))
        return ry_fail(m->err, "rank %d: its buffers overlap: the segments of peers %d and %d", rank, one, other);
    return 0;
}

int ry_verify_plan(struct machine *m, int rank)
{
    const struct ry_plan *p = m->plans[rank];
    int group = -1, start = 0;
    if (!p)
        return ry_fail(m->err, "rank %d: has no plan", rank);
    if (p->rank != rank || p->nranks != m->n)
        return ry_fail(m->err, "rank %d: its plan is for rank %d of %d, not of %d", rank, p->rank, p->nranks, m->n);
    if (p->strategy != m->plans[0]->strategy || p->ngroups != m->plans[0]->ngroups)
        return ry_fail(m->err, "rank %d: its plan is %s in %d groups, that of rank 0 %s in %d", rank,
                       ry_strategy_name(p->strategy), p->ngroups, ry_strategy_name(m->plans[0]->strategy),
                       m->plans[0]->ngroups);
    if (p->inside != m->plans[0]->inside || (p->ngroups < 64 && p->inside >> p->ngroups))
        return ry_fail(m->err, "rank %d: groups 0x%" PRIx64 " of %d stay inside its node, on rank 0 groups 0x%" PRIx64,
                       rank, p->inside, p->ngroups, m->plans[0]->inside);
    if (p->beside < 0 || p->beside > p->nsteps)
        return ry_fail(m->err, "rank %d: %d of the %d steps of its plan may overlap others", rank, p->beside, p->nsteps);
    if (check_buffers(m, rank))
        return -1;
    for (int i = 0; i < p->nsteps; i++) {
        const struct ry_step *s = &p->steps[i];
        bool copy = s->kind == RY_STEP_COPY, transfer = ry_is_transfer(s);
        if ((unsigned)s->kind >= RY_STEP_KINDS)
            return ry_fail(m->err, "rank %d, step %d: is of no known kind", rank, i);
        if (!s->bytes)
            return ry_fail(m->err, "%s: nothing to do", ry_verify_name(m, rank, i).s);
        if ((copy && (s->peer != -1 || s->group != -1)) ||
            (transfer && (s->peer < 0 || s->peer >= m->n || s->group < 0 || s->group >= p->ngroups)))
            return ry_fail(m->err, "%s: peer %d and group %d do not exist", ry_verify_name(m, rank, i).s, s->peer,
                           s->group);
        if (transfer && ry_inside(p->inside, s->group) && m->cluster->node[s->peer] != m->cluster->node[rank])
            return ry_fail(m->err, "%s: leaves the node in a group that stays inside", ry_verify_name(m, rank, i).s);
        if (!copy && !transfer && ry_verify_row_step(m, rank, i))
            return -1;
        /* Consecutive transfers of one group are one group; no group comes again after something else. */
        bool goes_on = i && transfer && ry_is_transfer(s - 1) && s->group == group;
        if (transfer && !goes_on && s->group <= group)
            return ry_fail(m->err, "%s: comes after group %d was begun", ry_verify_name(m, rank, i).s, group);
        if (!goes_on) {
            if (check_group(m, rank, start, i))
                return -1;
            start = transfer ? i : i + 1;
        }
        group = transfer ? s->group : group;
        uint64_t source = s->kind == RY_STEP_EXPAND ? ry_packed_bytes(s->repeats, s->rows)
                          : s->kind == RY_STEP_SUM  ? s->rows * s->repeats.row_bytes
                                                    : s->bytes;
        bool reads = s->kind != RY_STEP_RECV && s->kind != RY_STEP_PACK;
        if ((s->kind != RY_STEP_SEND && check_range(m, rank, i, s->to, s->bytes)) ||
            (reads && check_range(m, rank, i, s->from, source)))
            return -1;
        if (s->kind != RY_STEP_SEND && s->to.place == RY_AT_SEND)
            return ry_fail(m->err, "%s: writes into send segment %d", ry_verify_name(m, rank, i).s, s->to.peer);
        if (copy && s->from.place != RY_AT_SEND) {
            struct touch t[2] = {touch_of(m, rank, i, s->to, true), touch_of(m, rank, i, s->from, false)};
            int one, other;
            uint64_t at;
            if (collide(t, 2, &one, &other, &at))
                return ry_fail(m->err, "%s: onto itself, at offset %" PRIu64, ry_verify_name(m, rank, i).s, at);
        }
    }
    return check_group(m, rank, start, p->nsteps);
}
