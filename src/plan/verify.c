/*
 * verify.c: see verify.h.
 *
 * First each plan by itself (form, ranges, what a group touches), then sends against receives, which NCCL matches by
 * order within each ordered pair, then all plans together as a machine: a rank copies, or starts all transfers of a
 * group and waits until each of them has met its partner. Memory is kept as intervals that tell which byte of which
 * send buffer they hold, so the work grows with the number of steps, not of bytes. Receive segments need no such
 * memory: only the right byte may ever be written there, and it is checked when it is.
 */
#include "verify.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A byte of a send buffer: `off` into segment `seg`; where addresses are known, seg is -1 and `off` the address, so
   that it does not matter by which segment it was reached. */
struct token {
    int rank, seg;
    uint64_t off;
};
struct span { /* [lo, hi) of some memory holds the bytes from `token` on */
    uint64_t lo, hi;
    struct token token;
};
struct spans { /* sorted, apart from each other */
    struct span *v;
    size_t n, cap;
};

/* What a step of a group touches. */
struct touch {
    int space; /* RECV_BY_ADDRESS, STAGE, or the receive segment */
    int step;
    bool write;
    uint64_t lo, hi;
};
#define STAGE (-1)
#define RECV_BY_ADDRESS (-2)

struct machine {
    int n;
    const uint64_t *matrix;
    struct ry_plan *const *plans;
    const uintptr_t *const *send_at, *const *recv_at;
    struct ry_err *err;

    /* Receive segments that are not empty, by rank, then peer: which peer, what of it is written. */
    size_t *seg_start; /* [n + 1] */
    int *seg_from;
    struct spans *seg;
    struct spans *stage; /* [n] */

    /* Transfers, by rank, then step. */
    size_t *first; /* [n + 1] */
    struct transfer {
        int rank, step;
        bool started;
        size_t partner;
    } * transfers;

    /* The machine. */
    struct state {
        int step;    /* next to do; of a group: its first */
        int end;     /* one past the group that is running */
        size_t next; /* transfer of that step */
        size_t left; /* transfers of the running group that have not met their partner */
    } * states;
    int *queue, head, queued;

    struct span *pieces; /* scratch: what a transfer or copy carries, lo and hi counted from its start */
    size_t npieces, pieces_cap;
    struct touch *touches; /* scratch */
    size_t touches_cap;
};

static int no_memory(struct machine *m)
{
    return ry_fail(m->err, "verifying a plan: no memory");
}

/* Grow `*v` to hold `want` elements. */
static int room(struct machine *m, void *v, size_t *cap, size_t want, size_t each)
{
    if (want <= *cap)
        return 0;
    size_t grown = *cap * 2 > want ? *cap * 2 : want < 4 ? want : want + 4;
    void *p = realloc(*(void **)v, grown * each);
    if (!p)
        return no_memory(m);
    *(void **)v = p;
    *cap = grown;
    return 0;
}

/* "rank 3, step 7 (group 1: receive 4096 bytes from rank 2)" */
struct text {
    char s[160];
};
static struct text name(const struct machine *m, int rank, int i)
{
    struct text t;
    const struct ry_step *s = &m->plans[rank]->steps[i];
    if (s->kind == RY_STEP_COPY)
        snprintf(t.s, sizeof t.s, "rank %d, step %d (copy %" PRIu64 " bytes)", rank, i, s->bytes);
    else
        snprintf(t.s, sizeof t.s, "rank %d, step %d (group %d: %s %" PRIu64 " bytes %s rank %d)", rank, i, s->group,
                 s->kind == RY_STEP_SEND ? "send" : "receive", s->bytes, s->kind == RY_STEP_SEND ? "to" : "from",
                 s->peer);
    return t;
}

static struct text token_name(struct token is)
{
    struct text t;
    if (is.seg < 0)
        snprintf(t.s, sizeof t.s, "the byte at address %#" PRIx64 " of rank %d", is.off, is.rank);
    else
        snprintf(t.s, sizeof t.s, "offset %" PRIu64 " of what rank %d sends to rank %d", is.off, is.rank, is.seg);
    return t;
}

/* ---- spans ---- */

/* The first that ends beyond `lo`. */
static size_t spans_find(const struct spans *s, uint64_t lo)
{
    size_t a = 0, b = s->n;
    while (a < b) {
        size_t mid = (a + b) / 2;
        if (s->v[mid].hi > lo)
            b = mid;
        else
            a = mid + 1;
    }
    return a;
}

static struct token token_after(struct token t, uint64_t bytes)
{
    t.off += bytes;
    return t;
}

static bool same(struct token a, struct token b)
{
    return a.rank == b.rank && a.seg == b.seg && a.off == b.off;
}

/* Put `put` in, over whatever is there. */
static int spans_put(struct machine *m, struct spans *s, struct span put)
{
    struct span parts[3];
    size_t n = 0, i = spans_find(s, put.lo), j = i;
    while (j < s->n && s->v[j].lo < put.hi)
        j++;
    if (j > i && s->v[i].lo < put.lo)
        parts[n++] = (struct span){s->v[i].lo, put.lo, s->v[i].token};
    else if (i > 0 && s->v[i - 1].hi == put.lo &&
             same(token_after(s->v[i - 1].token, put.lo - s->v[i - 1].lo), put.token)) /* goes on from the one before */
        put = (struct span){s->v[i - 1].lo, put.hi, s->v[i - 1].token}, i--;
    size_t at = n++;
    if (j > i && s->v[j - 1].hi > put.hi)
        parts[n++] = (struct span){put.hi, s->v[j - 1].hi, token_after(s->v[j - 1].token, put.hi - s->v[j - 1].lo)};
    else if (j < s->n && s->v[j].lo == put.hi && same(token_after(put.token, put.hi - put.lo), s->v[j].token))
        put.hi = s->v[j++].hi;
    parts[at] = put;
    if (room(m, &s->v, &s->cap, s->n - (j - i) + n, sizeof *s->v))
        return -1;
    memmove(s->v + i + n, s->v + j, (s->n - j) * sizeof *s->v);
    memcpy(s->v + i, parts, n * sizeof *parts);
    s->n = s->n - (j - i) + n;
    return 0;
}

/* ---- places ---- */

static uint64_t segment_bytes(const struct machine *m, enum ry_place place, int rank, int peer)
{
    size_t from = (size_t)(place == RY_AT_SEND ? rank : peer), to = (size_t)(place == RY_AT_SEND ? peer : rank);
    return m->matrix[from * (size_t)m->n + to];
}

/* Addresses of a rank's segments; NULL: unknown, and they all lie apart. */
static const uintptr_t *addresses(const struct machine *m, enum ry_place place, int rank)
{
    const uintptr_t *const *at = place == RY_AT_SEND ? m->send_at : m->recv_at;
    return at ? at[rank] : NULL;
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

/*
 * Takes the next part of [*at, + *left) that lies in one segment of the send or receive buffer: returns its length and
 * moves on both; *seg and *offset tell where it is. 0: it runs over the end of the segment, with nothing behind it.
 */
static uint64_t next_part(const struct machine *m, int rank, struct ry_at *at, uint64_t *left, int *seg,
                          uint64_t *offset)
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
        return ry_fail(m->err, "%s: names no place", name(m, rank, step).s);
    if (at.place == RY_AT_STAGE) {
        uint64_t size = m->plans[rank]->stage_bytes;
        if (at.peer != -1)
            return ry_fail(m->err, "%s: a place in staging memory with a peer, %d", name(m, rank, step).s, at.peer);
        if (at.offset > size || bytes > size - at.offset)
            return ry_fail(m->err, "%s: overruns staging memory: offset %" PRIu64 " in %" PRIu64 " bytes",
                           name(m, rank, step).s, at.offset, size);
        return 0;
    }
    if (at.peer < 0 || at.peer >= m->n)
        return ry_fail(m->err, "%s: %s %d does not exist", name(m, rank, step).s, what[at.place], at.peer);
    struct ry_at walk = at;
    uint64_t left = bytes, offset;
    bool inside = at.offset < segment_bytes(m, at.place, rank, at.peer);
    for (int seg; inside && left;)
        inside = next_part(m, rank, &walk, &left, &seg, &offset) > 0;
    if (!inside)
        return ry_fail(m->err, "%s: overruns %s %d of %" PRIu64 " bytes, from offset %" PRIu64 " on",
                       name(m, rank, step).s, what[at.place], walk.peer, segment_bytes(m, at.place, rank, walk.peer),
                       at.offset);
    return 0;
}

/* ---- each plan by itself ---- */

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
    if (room(m, &m->touches, &m->touches_cap, (size_t)(to - from), sizeof *m->touches))
        return -1;
    for (int i = from; i < to; i++)
        if (steps[i].kind == RY_STEP_RECV)
            m->touches[n++] = touch_of(m, rank, i, steps[i].to, true);
        else if (steps[i].from.place != RY_AT_SEND)
            m->touches[n++] = touch_of(m, rank, i, steps[i].from, false);
    if (collide(m->touches, n, &one, &other, &at))
        return ry_fail(m->err, "%s and step %d of the same group touch the same memory, at offset %" PRIu64,
                       name(m, rank, one).s, other, at);
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
    if (room(m, &m->touches, &m->touches_cap, 2 * (size_t)m->n, sizeof *m->touches))
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

static int check_plan(struct machine *m, int rank)
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
    if (check_buffers(m, rank))
        return -1;
    for (int i = 0; i < p->nsteps; i++) {
        const struct ry_step *s = &p->steps[i];
        bool copy = s->kind == RY_STEP_COPY;
        if ((unsigned)s->kind > RY_STEP_RECV)
            return ry_fail(m->err, "rank %d, step %d: is of no known kind", rank, i);
        if (!s->bytes)
            return ry_fail(m->err, "%s: nothing to do", name(m, rank, i).s);
        if (copy ? s->peer != -1 || s->group != -1
                 : s->peer < 0 || s->peer >= m->n || s->group < 0 || s->group >= p->ngroups)
            return ry_fail(m->err, "%s: peer %d and group %d do not exist", name(m, rank, i).s, s->peer, s->group);
        /* Consecutive transfers of one group are one group; no group comes again after something else. */
        bool goes_on = i && !copy && p->steps[i - 1].kind != RY_STEP_COPY && s->group == group;
        if (!copy && !goes_on && s->group <= group)
            return ry_fail(m->err, "%s: comes after group %d was begun", name(m, rank, i).s, group);
        if (!goes_on) {
            if (check_group(m, rank, start, i))
                return -1;
            start = copy ? i + 1 : i;
        }
        group = copy ? group : s->group;
        if ((s->kind != RY_STEP_SEND && check_range(m, rank, i, s->to, s->bytes)) ||
            (s->kind != RY_STEP_RECV && check_range(m, rank, i, s->from, s->bytes)))
            return -1;
        if (s->kind != RY_STEP_SEND && s->to.place == RY_AT_SEND)
            return ry_fail(m->err, "%s: writes into send segment %d", name(m, rank, i).s, s->to.peer);
        if (copy && s->from.place != RY_AT_SEND) {
            struct touch t[2] = {touch_of(m, rank, i, s->to, true), touch_of(m, rank, i, s->from, false)};
            int one, other;
            uint64_t at;
            if (collide(t, 2, &one, &other, &at))
                return ry_fail(m->err, "%s: onto itself, at offset %" PRIu64, name(m, rank, i).s, at);
        }
    }
    return check_group(m, rank, start, p->nsteps);
}

/* ---- sends against receives ---- */

static const struct ry_step *step_of(const struct machine *m, size_t t)
{
    return &m->plans[m->transfers[t].rank]->steps[m->transfers[t].step];
}

/* The sends to `to` and its receives, both by sender and then in order, must be the same. */
static int pair(struct machine *m, int to, const size_t *sends, size_t nsends, size_t *recvs, size_t *count)
{
    size_t nrecvs = 0, i = 0;
    memset(count, 0, ((size_t)m->n + 1) * sizeof *count);
    for (size_t t = m->first[to]; t < m->first[to + 1]; t++)
        if (step_of(m, t)->kind == RY_STEP_RECV)
            count[step_of(m, t)->peer + 1]++, nrecvs++;
    for (int r = 0; r < m->n; r++)
        count[r + 1] += count[r];
    for (size_t t = m->first[to]; t < m->first[to + 1]; t++)
        if (step_of(m, t)->kind == RY_STEP_RECV)
            recvs[count[step_of(m, t)->peer]++] = t;
    for (; i < nsends || i < nrecvs; i++) {
        const struct transfer *s = i < nsends ? &m->transfers[sends[i]] : NULL;
        const struct transfer *r = i < nrecvs ? &m->transfers[recvs[i]] : NULL;
        int from = r ? step_of(m, recvs[i])->peer : -1;
        if (s && (!r || s->rank < from))
            return ry_fail(m->err, "%s: rank %d has no receive for it", name(m, s->rank, s->step).s, to);
        if (!s || s->rank > from)
            return ry_fail(m->err, "%s: rank %d sends nothing for it", name(m, to, r->step).s, from);
        if (step_of(m, sends[i])->bytes != step_of(m, recvs[i])->bytes)
            return ry_fail(m->err, "%s: is met by %s", name(m, s->rank, s->step).s, name(m, to, r->step).s);
        m->transfers[sends[i]].partner = recvs[i];
        m->transfers[recvs[i]].partner = sends[i];
    }
    return 0;
}

static int pair_all(struct machine *m)
{
    size_t total = 0, n = (size_t)m->n;
    for (int r = 0; r < m->n; r++) {
        m->first[r] = total;
        for (int i = 0; i < m->plans[r]->nsteps; i++)
            total += m->plans[r]->steps[i].kind != RY_STEP_COPY;
    }
    m->first[m->n] = total;
    m->transfers = calloc(total + 1, sizeof *m->transfers);
    size_t *sends = malloc((2 * total + 2 * (n + 2)) * sizeof *sends);
    if (!m->transfers || !sends) {
        free(sends);
        return no_memory(m);
    }
    size_t *recvs = sends + total, *start = recvs + total, *count = start + n + 2;
    memset(start, 0, (n + 2) * sizeof *start);
    size_t t = 0;
    for (int r = 0; r < m->n; r++)
        for (int i = 0; i < m->plans[r]->nsteps; i++) {
            const struct ry_step *s = &m->plans[r]->steps[i];
            if (s->kind == RY_STEP_COPY)
                continue;
            m->transfers[t++] = (struct transfer){.rank = r, .step = i};
            if (s->kind == RY_STEP_SEND)
                start[s->peer + 2]++;
        }
    for (int r = 0; r < m->n; r++)
        start[r + 2] += start[r + 1];
    for (t = 0; t < total; t++) /* start[p + 1] moves from where p's sends begin to where they end */
        if (step_of(m, t)->kind == RY_STEP_SEND)
            sends[start[step_of(m, t)->peer + 1]++] = t;
    int rc = 0;
    for (int r = 0; !rc && r < m->n; r++)
        rc = pair(m, r, sends + start[r], start[r + 1] - start[r], recvs, count);
    free(sends);
    return rc;
}

/* ---- all together ---- */

static struct token sent(const struct machine *m, int from, int to, uint64_t offset)
{
    const uintptr_t *at = addresses(m, RY_AT_SEND, from);
    return at ? (struct token){from, -1, at[to] + offset} : (struct token){from, to, offset};
}

static struct spans *segment(struct machine *m, int rank, int from)
{
    size_t a = m->seg_start[rank], b = m->seg_start[rank + 1];
    while (b - a > 1) {
        size_t mid = (a + b) / 2;
        if (m->seg_from[mid] <= from)
            a = mid;
        else
            b = mid;
    }
    return &m->seg[a];
}

static int add_piece(struct machine *m, uint64_t bytes, struct token token)
{
    uint64_t lo = m->npieces ? m->pieces[m->npieces - 1].hi : 0;
    if (room(m, &m->pieces, &m->pieces_cap, m->npieces + 1, sizeof *m->pieces))
        return -1;
    m->pieces[m->npieces++] = (struct span){lo, lo + bytes, token};
    return 0;
}

/* What is in a step's source, into m->pieces. */
static int read_from(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    struct ry_at at = s->from;
    uint64_t left = s->bytes, offset;
    m->npieces = 0;
    if (at.place == RY_AT_SEND)
        return add_piece(m, left, sent(m, rank, at.peer, at.offset)); /* one run in memory, even over segments */
    if (at.place == RY_AT_STAGE) {
        const struct spans *st = &m->stage[rank];
        for (size_t i = spans_find(st, at.offset); left; i++) {
            if (i == st->n || st->v[i].lo > at.offset)
                return ry_fail(m->err, "%s: reads what was never written, at offset %" PRIu64 " of staging memory",
                               name(m, rank, step).s, at.offset);
            uint64_t part = st->v[i].hi - at.offset < left ? st->v[i].hi - at.offset : left;
            if (add_piece(m, part, token_after(st->v[i].token, at.offset - st->v[i].lo)))
                return -1;
            at.offset += part;
            left -= part;
        }
        return 0;
    }
    for (int from; left;) {
        uint64_t part = next_part(m, rank, &at, &left, &from, &offset);
        const struct spans *seg = segment(m, rank, from);
        size_t i = spans_find(seg, offset);
        if (i == seg->n || seg->v[i].lo > offset || seg->v[i].hi < offset + part)
            return ry_fail(m->err, "%s: reads what was never written, at offset %" PRIu64 " of receive segment %d",
                           name(m, rank, step).s, offset, from);
        if (add_piece(m, part, sent(m, from, rank, offset)))
            return -1;
    }
    return 0;
}

/* m->pieces into a step's destination. */
static int write_to(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    struct ry_at at = s->to;
    if (at.place == RY_AT_STAGE) {
        for (size_t k = 0; k < m->npieces; k++) {
            struct span p = m->pieces[k];
            if (spans_put(m, &m->stage[rank], (struct span){at.offset + p.lo, at.offset + p.hi, p.token}))
                return -1;
        }
        return 0;
    }
    uint64_t left = s->bytes, offset;
    size_t k = 0;
    for (int from; left;) {
        uint64_t done = s->bytes - left, part = next_part(m, rank, &at, &left, &from, &offset);
        for (; k < m->npieces && m->pieces[k].lo < done + part; k++) {
            uint64_t lo = m->pieces[k].lo > done ? m->pieces[k].lo : done;
            struct token is = token_after(m->pieces[k].token, lo - m->pieces[k].lo);
            if (!same(is, sent(m, from, rank, offset + (lo - done))))
                return ry_fail(m->err, "%s: wrong source: offset %" PRIu64 " of receive segment %d gets %s",
                               name(m, rank, step).s, offset + (lo - done), from, token_name(is).s);
            if (m->pieces[k].hi > done + part)
                break; /* goes on in the next segment */
        }
        struct spans *seg = segment(m, rank, from);
        size_t i = spans_find(seg, offset);
        if (i < seg->n && seg->v[i].lo < offset + part)
            return ry_fail(m->err, "%s: offset %" PRIu64 " of receive segment %d is written twice",
                           name(m, rank, step).s, seg->v[i].lo > offset ? seg->v[i].lo : offset, from);
        if (spans_put(m, seg, (struct span){offset, offset + part, {0, 0, offset}}))
            return -1;
    }
    return 0;
}

static int deliver(struct machine *m, size_t send, size_t recv)
{
    return read_from(m, m->transfers[send].rank, m->transfers[send].step) ||
                   write_to(m, m->transfers[recv].rank, m->transfers[recv].step)
               ? -1
               : 0;
}

/* Carries on with a rank that waits for nothing, until it does or is through. */
static int advance(struct machine *m, int rank)
{
    const struct ry_plan *p = m->plans[rank];
    struct state *s = &m->states[rank];
    for (s->step = s->end; s->step < p->nsteps; s->step = s->end) {
        s->end = s->step + 1;
        if (p->steps[s->step].kind == RY_STEP_COPY) {
            if (read_from(m, rank, s->step) || write_to(m, rank, s->step))
                return -1;
            continue;
        }
        while (s->end < p->nsteps && p->steps[s->end].kind != RY_STEP_COPY &&
               p->steps[s->end].group == p->steps[s->step].group)
            s->end++;
        s->left = (size_t)(s->end - s->step);
        size_t begin = s->next;
        s->next += s->left;
        for (size_t t = begin; t < s->next; t++) {
            struct transfer *own = &m->transfers[t], *other = &m->transfers[own->partner];
            own->started = true;
            if (!other->started)
                continue;
            bool sends = step_of(m, t)->kind == RY_STEP_SEND;
            if (deliver(m, sends ? t : own->partner, sends ? own->partner : t))
                return -1;
            s->left--;
            if (--m->states[other->rank].left == 0 && other->rank != rank)
                m->queue[(m->head + m->queued++) % m->n] = other->rank;
        }
        if (s->left)
            return 0;
    }
    return 0;
}

/* The rank that `rank`, whose group does not end, waits for: the first whose partner was not started. */
static int waits_for(const struct machine *m, int rank)
{
    size_t t = m->states[rank].next - (size_t)(m->states[rank].end - m->states[rank].step);
    while (m->transfers[m->transfers[t].partner].started)
        t++;
    return m->transfers[m->transfers[t].partner].rank;
}

/* `rank` waits, and every rank that is waited for waits itself: else its plan would have ended with a transfer not
 * started. */
static int fail_circle(struct machine *m, int rank)
{
    for (int i = 0; i < m->n; i++) /* after that many it is a rank of the circle itself */
        rank = waits_for(m, rank);
    char list[256];
    int n = 0, r = rank;
    do {
        int next = waits_for(m, r);
        n += snprintf(list + n, sizeof list - (size_t)n, "%srank %d (step %d, group %d) for rank %d", n ? ", " : "", r,
                      m->states[r].step, m->plans[r]->steps[m->states[r].step].group, next);
        r = next;
    } while (r != rank && n < (int)sizeof list - 64);
    return ry_fail(m->err, "waits in a circle: %s%s", list, r == rank ? "" : " …");
}

static int run_all(struct machine *m)
{
    for (int r = 0; r < m->n; r++) {
        m->states[r].next = m->first[r];
        m->queue[m->queued++] = r;
    }
    while (m->queued) {
        int rank = m->queue[m->head];
        m->head = (m->head + 1) % m->n;
        m->queued--;
        if (advance(m, rank))
            return -1;
    }
    for (int r = 0; r < m->n; r++)
        if (m->states[r].step < m->plans[r]->nsteps)
            return fail_circle(m, r);
    for (int r = 0; r < m->n; r++)
        for (size_t i = m->seg_start[r]; i < m->seg_start[r + 1]; i++) {
            const struct spans *s = &m->seg[i];
            uint64_t missing = s->n && s->v[0].lo == 0 ? s->v[0].hi : 0;
            if (missing < segment_bytes(m, RY_AT_RECV, r, m->seg_from[i]))
                return ry_fail(m->err, "rank %d: offset %" PRIu64 " of receive segment %d is never written", r, missing,
                               m->seg_from[i]);
        }
    return 0;
}

/* The receive segments that are not empty. */
static int list_segments(struct machine *m)
{
    size_t n = (size_t)m->n, total = 0;
    for (size_t i = 0; i < n * n; i++)
        if (m->matrix[i])
            m->seg_start[i % n + 1]++, total++;
    m->seg_from = malloc((total + 1) * sizeof *m->seg_from);
    m->seg = calloc(total + 1, sizeof *m->seg);
    if (!m->seg_from || !m->seg)
        return no_memory(m);
    for (size_t r = 0; r < n; r++)
        m->seg_start[r + 1] += m->seg_start[r];
    for (size_t i = 0; i < n * n; i++) /* seg_start[r] moves to where r's end, which is where r + 1's begin */
        if (m->matrix[i])
            m->seg_from[m->seg_start[i % n]++] = (int)(i / n);
    memmove(m->seg_start + 1, m->seg_start, n * sizeof *m->seg_start);
    m->seg_start[0] = 0;
    return 0;
}

int ry_plan_verify_at(const struct ry_cluster *cluster, const uint64_t *matrix, struct ry_plan *const *plans,
                      const uintptr_t *const *send_at, const uintptr_t *const *recv_at, struct ry_err *err)
{
    size_t n = (size_t)cluster->nranks;
    struct machine m = {.n = cluster->nranks, .matrix = matrix, .plans = plans, .send_at = send_at, .recv_at = recv_at};
    m.err = err;
    m.seg_start = calloc(n + 1, sizeof *m.seg_start);
    m.first = calloc(n + 1, sizeof *m.first);
    m.stage = calloc(n, sizeof *m.stage);
    m.states = calloc(n, sizeof *m.states);
    m.queue = calloc(n, sizeof *m.queue);
    int rc = m.seg_start && m.first && m.stage && m.states && m.queue ? 0 : no_memory(&m);
    for (int r = 0; !rc && r < m.n; r++)
        rc = check_plan(&m, r);
    rc = rc || list_segments(&m) || pair_all(&m) || run_all(&m) ? -1 : 0;

    for (size_t i = 0; m.seg && i < m.seg_start[n]; i++)
        free(m.seg[i].v);
    for (size_t r = 0; m.stage && r < n; r++)
        free(m.stage[r].v);
    free(m.seg_start);
    free(m.seg_from);
    free(m.seg);
    free(m.stage);
    free(m.first);
    free(m.transfers);
    free(m.states);
    free(m.queue);
    free(m.pieces);
    free(m.touches);
    return rc;
}

int ry_plan_verify(const struct ry_cluster *cluster, const uint64_t *matrix, struct ry_plan *const *plans,
                   struct ry_err *err)
{
    return ry_plan_verify_at(cluster, matrix, plans, NULL, NULL, err);
}
