/* agree_rank.c: agree.h as every rank runs it. See agree.h for the protocol, agree_wire.h for the bytes. */
#include "agree.h"

#include <stdlib.h>

#include "agree_wire.h"

struct ry_agree {
    int nranks, rank, yardmaster;
    struct ry_agree_port port;
    uint64_t next; /* one more than the highest number begun */
    bool begun;    /* any at all */
    uint64_t seen; /* the exchange that SEEN is due at */

    bool failed;
    const char *failure;
    bool held;      /* promised `epoch`: manifests and waits from `m` on */
    uint64_t epoch; /* of the last promise */
    uint64_t m;
    uint64_t ended; /* the highest epoch known to be over */
    bool over;      /* the epoch is, but the verdict being waited for was given before and is still to come */

    bool waiting; /* for the verdict of exchange next - 1 */
    struct ry_verdict verdict;
    struct ry_blob extra; /* of the verdict */
    struct ry_blob out;
};

struct ry_agree *ry_agree_new(int nranks, int rank, int yardmaster, const struct ry_agree_port *port)
{
    if (nranks < 1 || rank < 0 || rank >= nranks || yardmaster < 0 || yardmaster >= nranks)
        return NULL;
    struct ry_agree *a = calloc(1, sizeof *a);
    if (!a)
        return NULL;
    a->nranks = nranks;
    a->rank = rank;
    a->yardmaster = yardmaster;
    a->port = *port;
    a->failure = "";
    a->verdict.reason = "";
    return a;
}

void ry_agree_free(struct ry_agree *a)
{
    if (!a)
        return;
    ry_blob_free(&a->extra);
    ry_blob_free(&a->out);
    free(a);
}

bool ry_agree_hold(const struct ry_agree *a)
{
    return a->held;
}

bool ry_agree_wants_seen(const struct ry_agree *a, uint64_t number)
{
    return !a->failed && !a->held && number == a->seen;
}

static void say(struct ry_agree *a, uint8_t kind, uint64_t number, uint64_t value)
{
    uint8_t bytes[RY_AGREE_HEAD];
    struct ry_agree_msg m = {.kind = kind, .epoch = a->epoch, .number = number, .a = value};
    ry_agree_put(bytes, &m, a->nranks);
    a->port.send(a->port.context, a->yardmaster, bytes, sizeof bytes);
}

static void tell_seen(struct ry_agree *a, uint64_t number, const void *seen, size_t seen_bytes)
{
    struct ry_agree_msg m = {.kind = RY_SAY_SEEN, .epoch = a->ended, .number = number};
    if (!seen || !ry_blob_fit(&a->out, RY_AGREE_HEAD + seen_bytes)) {
        seen_bytes = 0;
        if (!ry_blob_fit(&a->out, RY_AGREE_HEAD))
            return;
    }
    ry_agree_put(a->out.bytes, &m, a->nranks);
    if (seen_bytes)
        memcpy(a->out.bytes + RY_AGREE_HEAD, seen, seen_bytes);
    a->port.send(a->port.context, a->yardmaster, a->out.bytes, RY_AGREE_HEAD + seen_bytes);
}

/* False: this rank does not take part (it said so, or cannot even say more than that). */
static bool tell_manifest(struct ry_agree *a, uint64_t number, const struct ry_manifest *m)
{
    size_t n = (size_t)a->nranks;
    bool able = m && !m->not_me && m->send && m->recv && m->type >= 0 && m->type <= UINT8_MAX;
    bool p2p = able && (m->sent || m->received);
    size_t extra = able && m->extra ? m->extra_bytes : 0;
    size_t size = RY_AGREE_HEAD + 16 * n + (p2p ? 8 * n : 0) + extra;
    struct ry_agree_msg msg = {.kind = RY_SAY_MANIFEST, .epoch = a->epoch, .number = number};
    if (!able || !ry_blob_fit(&a->out, size)) {
        uint8_t bytes[RY_AGREE_HEAD];
        msg.flags = RY_FLAG_NOT_ME;
        ry_agree_put(bytes, &msg, a->nranks);
        a->port.send(a->port.context, a->yardmaster, bytes, sizeof bytes);
        return false;
    }
    msg.flags = (m->one_call ? RY_FLAG_ONE_CALL : 0) | (p2p ? RY_FLAG_P2P : 0);
    msg.value = (uint8_t)m->type;
    msg.a = m->ordinal;
    uint8_t *p = a->out.bytes;
    ry_agree_put(p, &msg, a->nranks);
    p += RY_AGREE_HEAD;
    for (size_t i = 0; i < n; i++) {
        ry_put64(p + 8 * i, m->send[i]);
        ry_put64(p + 8 * (n + i), m->recv[i]);
    }
    p += 16 * n;
    if (p2p) {
        for (size_t i = 0; i < n; i++) {
            ry_put32(p + 4 * i, m->sent ? m->sent[i] : 0);
            ry_put32(p + 4 * (n + i), m->received ? m->received[i] : 0);
        }
        p += 8 * n;
    }
    if (extra)
        memcpy(p, m->extra, extra);
    a->port.send(a->port.context, a->yardmaster, a->out.bytes, size);
    return true;
}

/* The wait, if there is one, ends with direct. */
static void answer_direct(struct ry_agree *a, bool last, const char *reason)
{
    if (!a->waiting)
        return;
    a->waiting = false;
    a->verdict = (struct ry_verdict){.number = a->next - 1, .last = last, .reason = reason};
}

static void observe(struct ry_agree *a)
{
    a->held = false;
    a->over = false;
}

enum ry_way ry_agree_exchange(struct ry_agree *a, uint64_t number, const struct ry_manifest *m, const void *seen,
                               size_t seen_bytes)
{
    if (a->waiting) /* the caller gave up on a wait: what others were told about that exchange, it cannot know */
        ry_agree_leave(a);
    bool in_order = !a->begun || number == a->next;
    if (!a->begun || number >= a->next)
        a->next = number + 1;
    a->begun = true;
    a->verdict = (struct ry_verdict){.number = number, .reason = a->failure};
    if (a->failed)
        return RY_GO_DIRECT;
    if (!a->held) {
        if (number == a->seen)
            tell_seen(a, number, seen, seen_bytes);
        a->seen = ry_agree_next_seen(a->seen, a->next);
        return RY_GO_DIRECT;
    }
    if (!in_order) {
        ry_agree_stray(a);
        return RY_GO_DIRECT;
    }
    if (number < a->m || !tell_manifest(a, number, m))
        return RY_GO_DIRECT;
    a->waiting = true;
    return RY_WAIT_VERDICT;
}

bool ry_agree_verdict(struct ry_agree *a, struct ry_verdict *v)
{
    if (a->waiting)
        return false;
    *v = a->verdict;
    return true;
}

void ry_agree_stray(struct ry_agree *a)
{
    if (!a->held || a->over)
        return;
    say(a, RY_SAY_STRAY, a->next, 0);
    a->seen = RY_AGREE_NEVER; /* until the yardmaster's END tells */
    /* All that was asked before is answered and nothing more will be asked, so nothing from here on can be decided
       otherwise than direct. A verdict being waited for, however, may be on its way. */
    if (a->waiting)
        a->over = true;
    else
        observe(a);
}

static void propose(struct ry_agree *a, const struct ry_agree_msg *m)
{
    if (m->epoch <= a->ended || m->epoch <= a->epoch)
        return; /* told before, or over already */
    if (a->held || a->next > m->number) {
        struct ry_agree_msg no = {.kind = RY_SAY_REFUSE, .epoch = m->epoch, .number = m->number, .a = a->next};
        uint8_t bytes[RY_AGREE_HEAD];
        ry_agree_put(bytes, &no, a->nranks);
        a->port.send(a->port.context, a->yardmaster, bytes, sizeof bytes);
        return;
    }
    a->held = true;
    a->over = false;
    a->epoch = m->epoch;
    a->m = m->number;
    say(a, RY_SAY_PROMISE, m->number, 0);
}

static void epoch_over(struct ry_agree *a, uint64_t epoch, uint64_t watch)
{
    if (epoch <= a->ended)
        return;
    a->ended = epoch;
    a->seen = ry_agree_next_seen(watch, a->next);
}

static int verdict(struct ry_agree *a, const struct ry_agree_msg *m, struct ry_err *err)
{
    if (!a->held || m->epoch != a->epoch || !a->waiting || m->number != a->next - 1)
        return 0;
    if (!ry_blob_set(&a->extra, m->extra, m->extra_bytes)) {
        /* The others will do what this rank cannot: the same as if it had died here. */
        ry_agree_leave(a);
        return ry_fail(err, "agreement: rank %d is out of memory for a verdict of %zu bytes", a->rank, m->extra_bytes);
    }
    bool last = a->over || (m->flags & RY_FLAG_LAST);
    a->waiting = false;
    a->verdict = (struct ry_verdict){.number = m->number,
                                     .strategy = m->value,
                                     .verify = m->flags & RY_FLAG_VERIFY,
                                     .last = last,
                                     .reason = m->value ? "" : ry_agree_why(m->reason),
                                     .waited_ns = m->b,
                                     .extra = m->extra_bytes ? a->extra.bytes : NULL,
                                     .extra_bytes = m->extra_bytes};
    if (m->flags & RY_FLAG_LAST)
        epoch_over(a, m->epoch, m->a);
    if (last)
        observe(a);
    return 0;
}

static void end(struct ry_agree *a, const struct ry_agree_msg *m)
{
    epoch_over(a, m->epoch, m->a);
    if (!a->held || m->epoch != a->epoch)
        return;
    if (a->waiting && a->next - 1 < m->number) {
        a->over = true; /* this END has overtaken the verdict */
        return;
    }
    answer_direct(a, true, ry_agree_why(m->reason));
    observe(a);
}

int ry_agree_message(struct ry_agree *a, const void *bytes, size_t size, struct ry_err *err)
{
    struct ry_agree_msg m;
    if (ry_agree_get(&m, bytes, size, a->nranks, false, err) != 0)
        return -1;
    if (a->failed)
        return 0;
    switch (m.kind) {
    case RY_SAY_PROPOSE:
        propose(a, &m);
        return 0;
    case RY_SAY_VERDICT:
        return verdict(a, &m, err);
    default:
        end(a, &m);
        return 0;
    }
}

void ry_agree_fail(struct ry_agree *a, const char *reason)
{
    if (a->failed)
        return;
    a->failed = true;
    a->failure = reason ? reason : "";
    answer_direct(a, true, a->failure);
    observe(a);
}

void ry_agree_leave(struct ry_agree *a)
{
    if (a->failed)
        return;
    say(a, RY_SAY_LEAVE, a->next, 0);
    ry_agree_fail(a, ry_agree_why(RY_WHY_LEFT));
}
