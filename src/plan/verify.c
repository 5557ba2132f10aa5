/*
 * verify.c: see verify.h.
 *
 * First each plan by itself (form, ranges, what a group touches), then sends against receives, which NCCL matches by
 * order within each ordered pair, then all plans together as a machine: a rank copies, or starts all transfers of a
 * group and waits until each of them has met its partner. Memory is kept as intervals that tell which byte of which
 * send buffer they hold, so the work grows with the number of steps, not of bytes. Receive segments need no such
 * memory: only the right byte may ever be written there, and it is checked when it is.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "verify_internal.h"

struct text ry_verify_token_name(struct token is)
{
    struct text t;
    if (is.seg < -1)
        return ry_verify_packed_name(is);
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
    if (ry_verify_room(m, &s->v, &s->cap, s->n - (j - i) + n, sizeof *s->v))
        return -1;
    memmove(s->v + i + n, s->v + j, (s->n - j) * sizeof *s->v);
    memcpy(s->v + i, parts, n * sizeof *parts);
    s->n = s->n - (j - i) + n;
    return 0;
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
            return ry_fail(m->err, "%s: rank %d has no receive for it", ry_verify_name(m, s->rank, s->step).s, to);
        if (!s || s->rank > from)
            return ry_fail(m->err, "%s: rank %d sends nothing for it", ry_verify_name(m, to, r->step).s, from);
        if (step_of(m, sends[i])->bytes != step_of(m, recvs[i])->bytes)
            return ry_fail(m->err, "%s: is met by %s", ry_verify_name(m, s->rank, s->step).s,
                           ry_verify_name(m, to, r->step).s);
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
            total += ry_is_transfer(&m->plans[r]->steps[i]);
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
            if (!ry_is_transfer(s))
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

int ry_verify_piece(struct machine *m, uint64_t bytes, struct token token)
{
    uint64_t lo = m->npieces ? m->pieces[m->npieces - 1].hi : 0;
    if (ry_verify_room(m, &m->pieces, &m->pieces_cap, m->npieces + 1, sizeof *m->pieces))
        return -1;
    m->pieces[m->npieces++] = (struct span){lo, lo + bytes, token};
    return 0;
}

int ry_verify_stage(struct machine *m, int rank, int step, uint64_t offset, uint64_t left)
{
    const struct spans *st = &m->stage[rank];
    for (size_t i = spans_find(st, offset); left; i++) {
        if (i == st->n || st->v[i].lo > offset)
            return ry_fail(m->err, "%s: reads what was never written, at offset %" PRIu64 " of staging memory",
                           ry_verify_name(m, rank, step).s, offset);
        uint64_t part = st->v[i].hi - offset < left ? st->v[i].hi - offset : left;
        if (ry_verify_piece(m, part, token_after(st->v[i].token, offset - st->v[i].lo)))
            return -1;
        offset += part;
        left -= part;
    }
    return 0;
}

/* What is in a step's source, into m->pieces. */
static int read_from(struct machine *m, int rank, int step)
{
    const struct ry_step *s = &m->plans[rank]->steps[step];
    struct ry_at at = s->from;
    uint64_t left = s->bytes, offset;
    if (s->kind == RY_STEP_PACK)
        return ry_verify_pack(m, rank, step);
    if (s->kind == RY_STEP_EXPAND)
        return ry_verify_expand(m, rank, step);
    if (s->kind == RY_STEP_SUM)
        return ry_verify_sum(m, rank, step);
    m->npieces = 0;
    if (at.place == RY_AT_SEND)
        return ry_verify_piece(m, left, sent(m, rank, at.peer, at.offset)); /* one run in memory, even over segments */
    if (at.place == RY_AT_STAGE)
        return ry_verify_stage(m, rank, step, at.offset, left);
    for (int from; left;) {
        uint64_t part = ry_verify_part(m, rank, &at, &left, &from, &offset);
        const struct spans *seg = segment(m, rank, from);
        size_t i = spans_find(seg, offset);
        if (i == seg->n || seg->v[i].lo > offset || seg->v[i].hi < offset + part)
            return ry_fail(m->err, "%s: reads what was never written, at offset %" PRIu64 " of receive segment %d",
                           ry_verify_name(m, rank, step).s, offset, from);
        if (ry_verify_sums(m, from, rank))
            return ry_fail(m->err, "%s: reads sums, from receive segment %d", ry_verify_name(m, rank, step).s, from);
        if (ry_verify_piece(m, part, sent(m, from, rank, offset)))
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
        uint64_t done = s->bytes - left, part = ry_verify_part(m, rank, &at, &left, &from, &offset);
        bool sums = ry_verify_sums(m, from, rank);
        for (; k < m->npieces && m->pieces[k].lo < done + part; k++) {
            uint64_t lo = m->pieces[k].lo > done ? m->pieces[k].lo : done;
            uint64_t hi = m->pieces[k].hi < done + part ? m->pieces[k].hi : done + part;
            for (uint64_t right; lo < hi; lo = hi - lo < right ? hi : lo + right) {
                struct token is = token_after(m->pieces[k].token, lo - m->pieces[k].lo);
                bool just = !sums && (same(is, sent(m, from, rank, offset + (lo - done))) ||
                                      from_twin(m, is, from, rank, offset + (lo - done)));
                right = just   ? hi - lo
                        : sums ? ry_verify_summed(m, is, from, rank, offset + (lo - done))
                               : ry_verify_equal(m, is, from, rank, offset + (lo - done));
                if (!right)
                    return ry_fail(m->err, "%s: wrong source: offset %" PRIu64 " of receive segment %d gets %s",
                                   ry_verify_name(m, rank, step).s, offset + (lo - done), from,
                                   ry_verify_token_name(is).s);
            }
            if (m->pieces[k].hi > done + part)
                break; /* goes on in the next segment */
        }
        struct spans *seg = segment(m, rank, from);
        size_t i = spans_find(seg, offset);
        if (i < seg->n && seg->v[i].lo < offset + part)
            return ry_fail(m->err, "%s: offset %" PRIu64 " of receive segment %d is written twice",
                           ry_verify_name(m, rank, step).s, seg->v[i].lo > offset ? seg->v[i].lo : offset, from);
        if (spans_put(m, seg, (struct span){offset, offset + part, {0, 0, offset}}))
            return -1;
    }
    return 0;
}

static int deliver(struct machine *m, size_t send, size_t recv)
{
    return read_from(m, m->transfers[send].rank, m->transfers[send].step) ||
                   ry_verify_message(m, m->transfers[recv].rank, m->transfers[recv].step) ||
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
        if (!ry_is_transfer(&p->steps[s->step])) {
            if (read_from(m, rank, s->step) || write_to(m, rank, s->step))
                return -1;
            continue;
        }
        while (s->end < p->nsteps && ry_is_transfer(&p->steps[s->end]) &&
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

int ry_verify_all(struct machine *m)
{
    size_t n = (size_t)m->n;
    m->seg_start = calloc(n + 1, sizeof *m->seg_start);
    m->first = calloc(n + 1, sizeof *m->first);
    m->stage = calloc(n, sizeof *m->stage);
    m->states = calloc(n, sizeof *m->states);
    m->queue = calloc(n, sizeof *m->queue);
    int rc = m->seg_start && m->first && m->stage && m->states && m->queue ? 0 : no_memory(m);
    for (int r = 0; !rc && r < m->n; r++)
        rc = ry_verify_plan(m, r);
    rc = rc || list_segments(m) || pair_all(m) || run_all(m) ? -1 : 0;

    for (size_t i = 0; m->seg && i < m->seg_start[n]; i++)
        free(m->seg[i].v);
    for (size_t r = 0; m->stage && r < n; r++)
        free(m->stage[r].v);
    free(m->seg_start);
    free(m->seg_from);
    free(m->seg);
    free(m->stage);
    free(m->first);
    free(m->transfers);
    free(m->states);
    free(m->queue);
    free(m->pieces);
    free(m->touches);
    return rc;
}

int ry_plan_verify_at(const struct ry_cluster *cluster, const uint64_t *matrix, struct ry_plan *const *plans,
                      const uintptr_t *const *send_at, const uintptr_t *const *recv_at, struct ry_err *err)
{
    return ry_plan_verify_rows_at(cluster, matrix, NULL, plans, send_at, recv_at, err);
}

int ry_plan_verify(const struct ry_cluster *cluster, const uint64_t *matrix, struct ry_plan *const *plans,
                   struct ry_err *err)
{
    return ry_plan_verify_at(cluster, matrix, plans, NULL, NULL, err);
}
