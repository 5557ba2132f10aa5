/* agree_wire.c: see agree_wire.h. */
#include "agree_wire.h"

#include <stdlib.h>

const char *ry_agree_why(enum ry_agree_reason reason)
{
    static const char *const text[RY_WHYS] = {
        [RY_WHY_NONE] = "",
        [RY_WHY_CHOSEN] = "direct is the best choice",
        [RY_WHY_NOT_ME] = "a rank cannot take part in this exchange",
        [RY_WHY_NEVER_ABLE] = "a rank could not take part again and again",
        [RY_WHY_REFUSED] = "a rank was past the proposed exchange already",
        [RY_WHY_NO_ANSWER] = "a rank did not answer the proposal in time",
        [RY_WHY_PATIENCE] = "a rank did not come to the exchange in time",
        [RY_WHY_MISMATCH] = "the ranks' sends and receives do not match",
        [RY_WHY_STRAY] = "a rank issued p2p that is no exchange",
        [RY_WHY_LOST] = "the connection to a rank is lost",
        [RY_WHY_LEFT] = "a rank left the communicator",
        [RY_WHY_ORDER] = "a rank's messages came out of order",
        [RY_WHY_APART] = "the ranks' exchange numbers are too far apart",
        [RY_WHY_MEMORY] = "out of memory",
    };
    return reason < RY_WHYS ? text[reason] : "";
}

void ry_agree_put(uint8_t *head, const struct ry_agree_msg *m, int nranks)
{
    head[0] = m->kind;
    head[1] = m->flags;
    head[2] = m->value;
    head[3] = m->reason;
    ry_put32(head + 4, (uint32_t)nranks);
    ry_put64(head + 8, m->epoch);
    ry_put64(head + 16, m->number);
    ry_put64(head + 24, m->a);
    ry_put64(head + 32, m->b);
}

/* What each kind may carry. */
struct rule {
    uint8_t kind, flags;
    bool to_yardmaster, value, extra;
};
static const struct rule rules[] = {
    {RY_SAY_SEEN, 0, true, false, true},
    {RY_SAY_PROMISE, 0, true, false, false},
    {RY_SAY_REFUSE, 0, true, false, false},
    {RY_SAY_MANIFEST, RY_FLAG_NOT_ME | RY_FLAG_ONE_CALL | RY_FLAG_P2P, true, true, true},
    {RY_SAY_STRAY, 0, true, false, false},
    {RY_SAY_LEAVE, 0, true, false, false},
    {RY_SAY_PROPOSE, 0, false, false, false},
    {RY_SAY_VERDICT, RY_FLAG_VERIFY | RY_FLAG_LAST, false, true, true},
    {RY_SAY_END, 0, false, false, false},
};

int ry_agree_get(struct ry_agree_msg *m, const void *bytes, size_t size, int nranks, bool to_yardmaster,
                 struct ry_err *err)
{
    const uint8_t *p = bytes;
    memset(m, 0, sizeof *m);
    if (size < RY_AGREE_HEAD)
        return ry_fail(err, "agreement: a message of %zu bytes, shorter than its head", size);
    const struct rule *rule = NULL;
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (rules[i].kind == p[0] && rules[i].to_yardmaster == to_yardmaster)
            rule = &rules[i];
    if (!rule)
        return ry_fail(err, "agreement: a message of unknown kind %u", p[0]);
    if (ry_get32(p + 4) != (uint32_t)nranks)
        return ry_fail(err, "agreement: message '%c' of a communicator of %u ranks, this one has %d", p[0],
                       ry_get32(p + 4), nranks);
    m->kind = p[0];
    m->flags = p[1];
    m->value = p[2];
    m->reason = p[3];
    m->epoch = ry_get64(p + 8);
    m->number = ry_get64(p + 16);
    m->a = ry_get64(p + 24);
    m->b = ry_get64(p + 32);
    if ((m->flags & ~rule->flags) || (m->value && !rule->value) || m->reason >= RY_WHYS ||
        m->number >= RY_AGREE_NUMBERS || m->epoch >= RY_AGREE_NUMBERS ||
        (m->kind == RY_SAY_REFUSE && m->a >= RY_AGREE_NUMBERS))
        return ry_fail(err, "agreement: message '%c' with fields that cannot be", p[0]);

    size_t left = size - RY_AGREE_HEAD;
    p += RY_AGREE_HEAD;
    if (m->kind == RY_SAY_MANIFEST && !(m->flags & RY_FLAG_NOT_ME)) {
        size_t n = (size_t)nranks, need = 16 * n + (m->flags & RY_FLAG_P2P ? 8 * n : 0);
        if (left < need)
            return ry_fail(err, "agreement: a manifest of %zu bytes where %d ranks need %zu", size, nranks,
                           RY_AGREE_HEAD + need);
        m->send = p;
        m->recv = p + 8 * n;
        p += 16 * n;
        if (m->flags & RY_FLAG_P2P) {
            m->sent = p;
            m->received = p + 4 * n;
            p += 8 * n;
        }
        left -= need;
    } else if (left && (!rule->extra || (m->flags & RY_FLAG_NOT_ME))) {
        return ry_fail(err, "agreement: message '%c' is %zu bytes too long", m->kind, left);
    }
    m->extra = left ? p : NULL;
    m->extra_bytes = left;
    return 0;
}

bool ry_blob_fit(struct ry_blob *b, size_t size)
{
    if (size > b->room) {
        uint8_t *grown = malloc(size);
        if (!grown)
            return false;
        free(b->bytes);
        b->bytes = grown;
        b->room = size;
    }
    b->size = size;
    return true;
}

bool ry_blob_set(struct ry_blob *b, const void *bytes, size_t size)
{
    if (!ry_blob_fit(b, size))
        return false;
    if (size)
        memcpy(b->bytes, bytes, size);
    return true;
}

void ry_blob_free(struct ry_blob *b)
{
    free(b->bytes);
    *b = (struct ry_blob){0};
}

#define SPARSEST 1021

uint64_t ry_agree_next_seen(uint64_t watch, uint64_t least)
{
    if (watch >= RY_AGREE_NUMBERS || least >= RY_AGREE_NUMBERS)
        return RY_AGREE_NEVER;
    while (watch < least && watch / 2 + 1 < SPARSEST)
        watch += watch / 2 + 1;
    if (watch < least)
        watch += (least - watch + SPARSEST - 1) / SPARSEST * SPARSEST;
    return watch;
}
