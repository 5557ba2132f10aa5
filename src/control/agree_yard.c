/*
 * agree_yard.c: agree.h as the yardmaster runs it. See agree.h for the protocol, agree_wire.h for the bytes.
 *
 * Two facts keep its memory small. A rank that waits sends nothing more about exchanges until it is answered, and it
 * goes on only past exchanges that are decided; so at any time all undecided manifests are for one and the same number,
 * the one being gathered. And ranks run ahead of that only by saying "not me", which is one bit per exchange in a
 * window.
 */
#include "agree.h"

#include <stdlib.h>

#include "agree_wire.h"

#define FIRST_SLACK 4     /* how far beyond the highest number known m lies; doubled with each refusal */
#define TRIES 10          /* proposals in a row, all refused, before that counts as a failure */
#define WINDOW 4096       /* exchanges that ranks can be apart while engaged */
#define GOOD 256          /* verdicts after which an engagement makes earlier failures forgotten */
#define NEVER_ABLE 64     /* exchanges in a row that ranks waited for although one had said "not me" */
#define STALLS 8          /* times that one wait is lengthened because the yardmaster itself stood still */
#define TYPE_UNKNOWN (-1) /* no manifest yet */

enum state { WATCHING, PROPOSED, ENGAGED, CLOSED };

/* What is known of one rank. */
struct side {
    bool gone;     /* lost or left: nothing is sent to it any more */
    bool promised; /* this epoch */
    bool in;       /* its manifest of the exchange being gathered has come */
    bool told;     /* its SEEN of `target` has come */
    bool p2p;      /* `rest` begins with sent[] and received[] */
    uint64_t at;   /* the next exchange that it will send a manifest for */
    uint64_t came; /* when its manifest did */
    uint64_t ordinal;
    struct ry_blob seen; /* what came with SEEN */
    struct ry_blob rest; /* of its manifest, after send[] and recv[] */
};

struct ry_yard {
    struct ry_yard_config config;
    struct ry_policy policy;
    struct ry_agree_port port;
    struct ry_yard_counts counts;
    enum state state;
    uint64_t epoch;
    uint64_t begun; /* one more than the highest number that any rank is known to have begun */
    int failures;
    uint64_t last_now;
    int stalls;

    uint64_t target; /* SEEN of this exchange is being collected */
    int ntold;

    int tries;
    int npromised;
    uint64_t answers_by; /* while PROPOSED */

    uint64_t agreed; /* verdicts of this epoch with all manifests */
    uint64_t base;   /* no rank's `at` is lower */
    uint64_t not_me[WINDOW / 64];
    int wasted; /* exchanges in a row decided direct by "not me" with somebody waiting */
    uint64_t wasted_at;
    uint64_t gathering; /* the exchange, if nin > 0 */
    int nin;
    uint64_t first_came, manifests_by;
    int type;
    bool one_call;
    uint64_t *matrix;

    const void **extra; /* [nranks], for the policy */
    size_t *extra_bytes;
    struct side *side; /* [nranks] */
    struct ry_blob out;
};

struct ry_yard *ry_yard_new(const struct ry_yard_config *config, const struct ry_policy *policy,
                            const struct ry_agree_port *port)
{
    if (config->nranks < 1)
        return NULL;
    struct ry_yard *y = calloc(1, sizeof *y);
    if (!y)
        return NULL;
    y->config = *config;
    if (y->config.engage_after < 1)
        y->config.engage_after = 1;
    y->policy = *policy;
    y->port = *port;
    y->target = ry_agree_next_seen(0, (uint64_t)y->config.engage_after - 1);
    y->side = calloc((size_t)config->nranks, sizeof *y->side);
    y->extra = calloc((size_t)config->nranks, sizeof *y->extra);
    y->extra_bytes = calloc((size_t)config->nranks, sizeof *y->extra_bytes);
    if (!y->side || !y->extra || !y->extra_bytes) {
        ry_yard_free(y);
        return NULL;
    }
    return y;
}

/* Back to memory in proportion to the ranks. */
static void forget_manifests(struct ry_yard *y)
{
    for (int r = 0; r < y->config.nranks; r++)
        ry_blob_free(&y->side[r].rest);
    free(y->matrix);
    y->matrix = NULL;
}

void ry_yard_free(struct ry_yard *y)
{
    if (!y)
        return;
    if (y->side) {
        forget_manifests(y);
        for (int r = 0; r < y->config.nranks; r++)
            ry_blob_free(&y->side[r].seen);
    }
    ry_blob_free(&y->out);
    free(y->side);
    free(y->extra);
    free(y->extra_bytes);
    free(y);
}

void ry_yard_counts(const struct ry_yard *y, struct ry_yard_counts *out)
{
    *out = y->counts;
}

static bool active(const struct ry_yard *y)
{
    return y->state == PROPOSED || y->state == ENGAGED;
}

/* ---- time ---- */

/*
 * While it waits the yardmaster asks to be called every patience / 8. Twice that without a call means that it stood
 * still itself (stopped, or starved), and what came meanwhile may not have been handed in yet: then its waits are
 * longer by as much, and an eighth of the patience is left in any case. Not without end, for the sake of a machine that
 * always stands still.
 */
static void lengthen(uint64_t *deadline, uint64_t gap, uint64_t least)
{
    *deadline = *deadline > UINT64_MAX - gap ? UINT64_MAX : *deadline + gap;
    if (*deadline < least)
        *deadline = least;
}

static void see_time(struct ry_yard *y, uint64_t now)
{
    uint64_t gap = now > y->last_now ? now - y->last_now : 0;
    uint64_t eighth = y->config.patience_ns / 8;
    if (now > y->last_now)
        y->last_now = now;
    if ((y->state != PROPOSED && y->nin == 0) || gap <= 2 * eighth || y->stalls >= STALLS)
        return;
    y->stalls++;
    lengthen(&y->answers_by, gap, now + eighth);
    lengthen(&y->manifests_by, gap, now + eighth);
}

static uint64_t deadline(struct ry_yard *y)
{
    if (y->state != PROPOSED && y->nin == 0)
        y->stalls = 0; /* the first wait after none */
    uint64_t now = y->last_now, patience = y->config.patience_ns;
    return now > UINT64_MAX - patience ? UINT64_MAX : now + patience;
}

/* ---- epochs ---- */

static void say_all(struct ry_yard *y, const struct ry_agree_msg *m)
{
    uint8_t bytes[RY_AGREE_HEAD];
    ry_agree_put(bytes, m, y->config.nranks);
    for (int r = 0; r < y->config.nranks; r++)
        if (!y->side[r].gone)
            y->port.send(y->port.context, r, bytes, sizeof bytes);
}

static void collect_seen_at(struct ry_yard *y, uint64_t target)
{
    y->target = target;
    y->ntold = 0;
    for (int r = 0; r < y->config.nranks; r++)
        y->side[r].told = false;
}

static void stop_gathering(struct ry_yard *y)
{
    y->nin = 0;
    for (int r = 0; r < y->config.nranks; r++)
        y->side[r].in = false;
}

static uint64_t lowest(const struct ry_yard *y)
{
    uint64_t low = UINT64_MAX;
    for (int r = 0; r < y->config.nranks; r++)
        if (y->side[r].at < low)
            low = y->side[r].at;
    return low;
}

/* The epoch is over: everything not decided yet goes direct. `watch`: from which exchange on SEEN is wanted again. */
static void end_epoch(struct ry_yard *y, enum ry_agree_reason why, uint64_t watch)
{
    uint64_t unanswered = lowest(y); /* every rank has its verdicts for all exchanges below */
    if (y->state == PROPOSED)
        y->counts.aborts++;
    if (y->nin > 0) {
        y->counts.verdicts++;
        y->counts.direct++;
    }
    y->state = watch == RY_AGREE_NEVER ? CLOSED : WATCHING;
    stop_gathering(y);
    forget_manifests(y);
    collect_seen_at(y, watch);
    say_all(y, &(struct ry_agree_msg){
                   .kind = RY_SAY_END, .reason = (uint8_t)why, .epoch = y->epoch, .number = unanswered, .a = watch});
}

/* It ended badly: wait longer before the next proposal, or for ever. */
static void end_badly(struct ry_yard *y, enum ry_agree_reason why)
{
    if (y->agreed >= GOOD)
        y->failures = 0;
    y->failures++;
    end_epoch(y, why,
              y->failures >= RY_AGREE_GIVE_UP ? RY_AGREE_NEVER
                                              : y->begun + ((uint64_t)y->config.engage_after << y->failures));
}

static void propose(struct ry_yard *y)
{
    uint64_t m = y->begun + (FIRST_SLACK << y->tries);
    y->answers_by = deadline(y);
    y->state = PROPOSED;
    y->epoch++;
    y->npromised = 0;
    y->agreed = 0;
    y->wasted = 0;
    y->base = m;
    y->type = TYPE_UNKNOWN;
    memset(y->not_me, 0, sizeof y->not_me);
    for (int r = 0; r < y->config.nranks; r++) {
        y->side[r].promised = false;
        y->side[r].at = m;
    }
    y->counts.proposals++;
    say_all(y, &(struct ry_agree_msg){.kind = RY_SAY_PROPOSE, .epoch = y->epoch, .number = m});
}

static void begun(struct ry_yard *y, uint64_t number)
{
    if (number >= y->begun)
        y->begun = number + 1;
}

static void seen(struct ry_yard *y, struct side *s, const struct ry_agree_msg *m)
{
    begun(y, m->number);
    if (y->state != WATCHING || m->epoch != y->epoch || s->told || m->number < y->target)
        return;
    if (m->number > y->target || !ry_blob_set(&s->seen, m->extra, m->extra_bytes)) {
        /* It had passed the target before it was told (or there was no memory to keep what it says). */
        collect_seen_at(y, ry_agree_next_seen(y->target, y->begun));
        return;
    }
    s->told = true;
    if (++y->ntold < y->config.nranks)
        return;
    for (int r = 0; r < y->config.nranks; r++) {
        y->extra_bytes[r] = y->side[r].seen.size;
        y->extra[r] = y->extra_bytes[r] ? y->side[r].seen.bytes : NULL;
    }
    y->tries = 0;
    if (y->policy.worth(y->policy.context, y->target, y->extra, y->extra_bytes))
        propose(y);
    else
        collect_seen_at(y, ry_agree_next_seen(y->target, y->begun));
}

static void promised(struct ry_yard *y, struct side *s)
{
    if (y->state != PROPOSED || s->promised)
        return;
    s->promised = true;
    if (++y->npromised < y->config.nranks)
        return;
    y->state = ENGAGED;
    y->counts.commits++;
}

static void refused(struct ry_yard *y, const struct ry_agree_msg *m)
{
    if (m->a > 0)
        begun(y, m->a - 1);
    if (m->epoch != y->epoch || y->state != PROPOSED)
        return;
    if (++y->tries >= TRIES) {
        end_badly(y, RY_WHY_REFUSED);
        return;
    }
    end_epoch(y, RY_WHY_REFUSED, y->begun);
    propose(y);
}

/* ---- manifests ---- */

static bool window_holds(struct ry_yard *y, uint64_t number)
{
    if (number - y->base < WINDOW)
        return true;
    uint64_t low = lowest(y);
    if (low - y->base >= WINDOW)
        memset(y->not_me, 0, sizeof y->not_me);
    else
        for (uint64_t i = y->base; i < low; i++)
            y->not_me[i % WINDOW / 64] &= ~(UINT64_C(1) << (i % 64));
    y->base = low;
    return number - y->base < WINDOW;
}

static bool is_not_me(struct ry_yard *y, uint64_t number)
{
    return window_holds(y, number) && (y->not_me[number % WINDOW / 64] >> (number % 64) & 1);
}

/* Somebody waits for an exchange in which another rank does not take part. */
static void answer_not_me(struct ry_yard *y, int rank, uint64_t number, uint64_t waited)
{
    uint8_t bytes[RY_AGREE_HEAD];
    struct ry_agree_msg m = {
        .kind = RY_SAY_VERDICT, .reason = RY_WHY_NOT_ME, .epoch = y->epoch, .number = number, .b = waited};
    ry_agree_put(bytes, &m, y->config.nranks);
    y->port.send(y->port.context, rank, bytes, sizeof bytes);
    if (y->wasted && y->wasted_at == number)
        return;
    y->wasted_at = number;
    y->wasted++;
    y->counts.verdicts++;
    y->counts.direct++;
}

static void not_me(struct ry_yard *y, uint64_t number)
{
    y->counts.not_me++;
    if (!window_holds(y, number)) {
        end_badly(y, RY_WHY_APART);
        return;
    }
    y->not_me[number % WINDOW / 64] |= UINT64_C(1) << (number % 64);
    if (y->nin == 0 || y->gathering != number)
        return;
    for (int r = 0; r < y->config.nranks; r++)
        if (y->side[r].in)
            answer_not_me(y, r, number, y->last_now - y->side[r].came);
    stop_gathering(y);
}

static void out_of_memory(struct ry_yard *y)
{
    end_epoch(y, RY_WHY_MEMORY, RY_AGREE_NEVER);
}

static void decide(struct ry_yard *y)
{
    int n = y->config.nranks;
    uint64_t took = y->last_now - y->first_came;
    struct ry_agreed x = {.number = y->gathering,
                          .nranks = n,
                          .type = y->type,
                          .matrix = y->matrix,
                          .extra = y->extra,
                          .extra_bytes = y->extra_bytes};
    for (int r = 0; r < n; r++) {
        size_t skip = y->side[r].p2p ? 8 * (size_t)n : 0;
        y->extra_bytes[r] = y->side[r].rest.size - skip;
        y->extra[r] = y->extra_bytes[r] ? y->side[r].rest.bytes + skip : NULL;
    }
    bool verify = false;
    unsigned rest = 0;
    int strategy = y->policy.choose(y->policy.context, &x, &verify, &rest);
    bool last = rest > 0;
    if (strategy < 0 || strategy > UINT8_MAX)
        strategy = 0;
    y->agreed++;
    y->wasted = 0;
    y->counts.verdicts++;
    y->counts.direct += strategy == 0;
    y->counts.gather_ns += took;
    if (took > y->counts.gather_most_ns)
        y->counts.gather_most_ns = took;

    unsigned least = (unsigned)y->config.engage_after;
    uint64_t watch = y->begun + (rest > least ? rest : least) - 1;
    for (int r = 0; r < n; r++) {
        size_t bytes = 0;
        const void *slice = NULL;
        if (y->policy.slice)
            slice = y->policy.slice(y->policy.context, &x, strategy, r, &bytes);
        if (!slice)
            bytes = 0;
        /* Once one rank has its verdict, the others must get theirs; before that, there is still a way back. */
        if (!ry_blob_fit(&y->out, RY_AGREE_HEAD + bytes)) {
            if (r == 0) {
                out_of_memory(y);
                return;
            }
            y->side[r].gone = true; /* it hears END; the others go on as if it had died here */
            struct ry_agree_msg m = {
                .kind = RY_SAY_END, .reason = RY_WHY_MEMORY, .epoch = y->epoch, .a = RY_AGREE_NEVER};
            uint8_t head[RY_AGREE_HEAD];
            ry_agree_put(head, &m, n);
            y->port.send(y->port.context, r, head, sizeof head);
            continue;
        }
        struct ry_agree_msg m = {.kind = RY_SAY_VERDICT,
                                 .flags = (verify ? RY_FLAG_VERIFY : 0) | (last ? RY_FLAG_LAST : 0),
                                 .value = (uint8_t)strategy,
                                 .reason = strategy ? RY_WHY_NONE : RY_WHY_CHOSEN,
                                 .epoch = y->epoch,
                                 .number = y->gathering,
                                 .a = last ? watch : 0,
                                 .b = y->last_now - y->side[r].came};
        ry_agree_put(y->out.bytes, &m, n);
        if (bytes)
            memcpy(y->out.bytes + RY_AGREE_HEAD, slice, bytes);
        y->port.send(y->port.context, r, y->out.bytes, RY_AGREE_HEAD + bytes);
    }
    stop_gathering(y);
    if (last) {
        y->state = WATCHING;
        forget_manifests(y);
        collect_seen_at(y, watch);
    }
}

static uint32_t p2p(const struct ry_yard *y, int rank, bool received, int peer)
{
    const struct side *s = &y->side[rank];
    size_t n = (size_t)y->config.nranks;
    return s->p2p ? ry_get32(s->rest.bytes + 4 * ((received ? n : 0) + (size_t)peer)) : 0;
}

/* Would NCCL match what `from` sends to `to` in this exchange with what `to` receives from `from` in it? */
static bool same_turn(const struct ry_yard *y, int from, int to)
{
    return y->side[from].ordinal + p2p(y, from, false, to) == y->side[to].ordinal + p2p(y, to, true, from);
}

/* Enter a manifest's cells. Each has two sides: who comes first writes it, who comes second must agree. */
static bool fits(struct ry_yard *y, int rank, const struct ry_agree_msg *m)
{
    size_t n = (size_t)y->config.nranks, me = (size_t)rank;
    if (y->nin == 0) {
        y->type = m->value;
        y->one_call = m->flags & RY_FLAG_ONE_CALL;
    } else if (y->type != m->value || y->one_call != !!(m->flags & RY_FLAG_ONE_CALL)) {
        return false;
    }
    for (size_t r = 0; r < n; r++) {
        uint64_t send = ry_get64(m->send + 8 * r), recv = ry_get64(m->recv + 8 * r);
        uint64_t *out = &y->matrix[me * n + r], *in = &y->matrix[r * n + me];
        if (r == me) {
            if (send != recv || !same_turn(y, rank, rank))
                return false;
            *out = send;
        } else if (!y->side[r].in) {
            *out = send;
            *in = recv;
        } else if (*out != send || *in != recv || !same_turn(y, rank, (int)r) || !same_turn(y, (int)r, rank)) {
            return false;
        }
    }
    return true;
}

static void gather(struct ry_yard *y, int rank, const struct ry_agree_msg *m)
{
    struct side *s = &y->side[rank];
    size_t n = (size_t)y->config.nranks;
    size_t lead = m->sent ? 8 * n : 0;
    if (!y->matrix)
        y->matrix = malloc(n * n * sizeof *y->matrix);
    /* In the message, the policy's part follows right after sent[] and received[]. */
    if (!y->matrix || !ry_blob_set(&s->rest, m->sent ? m->sent : m->extra, lead + m->extra_bytes)) {
        out_of_memory(y);
        return;
    }
    s->p2p = m->sent;
    s->ordinal = m->a;
    s->came = y->last_now;
    if (!fits(y, rank, m)) {
        y->counts.mismatched++;
        end_badly(y, RY_WHY_MISMATCH);
        return;
    }
    if (y->nin == 0) {
        y->manifests_by = deadline(y);
        y->gathering = m->number;
        y->first_came = y->last_now;
    }
    s->in = true;
    if (++y->nin == y->config.nranks)
        decide(y);
}

static void manifest(struct ry_yard *y, int rank, const struct ry_agree_msg *m)
{
    struct side *s = &y->side[rank];
    begun(y, m->number);
    if (!active(y) || m->epoch != y->epoch || m->number < s->at)
        return;                       /* of an epoch that is over, or a second time */
    promised(y, s);                   /* it would not speak of this epoch otherwise; its PROMISE is still to come */
    if (m->number > s->at || s->in) { /* a gap; or it speaks while it waits */
        end_badly(y, RY_WHY_ORDER);
        return;
    }
    if (m->flags & RY_FLAG_NOT_ME) {
        not_me(y, m->number);
    } else if (is_not_me(y, m->number)) {
        answer_not_me(y, rank, m->number, 0);
    } else if (y->nin > 0 && y->gathering != m->number) {
        end_badly(y, RY_WHY_ORDER); /* cannot be, see above; but it came from outside */
    } else {
        gather(y, rank, m);
    }
    s->at = m->number + 1; /* only now: an END sent above must find this exchange unanswered */
    if (active(y) && y->wasted >= NEVER_ABLE)
        end_badly(y, RY_WHY_NEVER_ABLE);
}

/* ---- events ---- */

static void gone(struct ry_yard *y, int rank, enum ry_agree_reason why)
{
    y->side[rank].gone = true;
    if (active(y))
        end_epoch(y, why, RY_AGREE_NEVER);
    y->state = CLOSED;
}

int ry_yard_message(struct ry_yard *y, uint64_t now, int from, const void *bytes, size_t size, struct ry_err *err)
{
    struct ry_agree_msg m;
    see_time(y, now);
    if (from < 0 || from >= y->config.nranks)
        return ry_fail(err, "agreement: a message from rank %d of %d", from, y->config.nranks);
    if (ry_agree_get(&m, bytes, size, y->config.nranks, true, err) != 0)
        return -1;
    struct side *s = &y->side[from];
    if (s->gone)
        return 0;
    switch (m.kind) {
    case RY_SAY_SEEN:
        seen(y, s, &m);
        break;
    case RY_SAY_PROMISE:
        if (m.epoch == y->epoch)
            promised(y, s);
        break;
    case RY_SAY_REFUSE:
        refused(y, &m);
        break;
    case RY_SAY_MANIFEST:
        manifest(y, from, &m);
        break;
    case RY_SAY_STRAY:
        if (active(y) && m.epoch == y->epoch) {
            y->counts.strays++;
            end_badly(y, RY_WHY_STRAY);
        }
        break;
    default:
        gone(y, from, RY_WHY_LEFT);
    }
    return 0;
}

void ry_yard_lost(struct ry_yard *y, uint64_t now, int rank)
{
    see_time(y, now);
    if (rank < 0 || rank >= y->config.nranks || y->side[rank].gone)
        return;
    y->counts.lost++;
    gone(y, rank, RY_WHY_LOST);
}

uint64_t ry_yard_tick(struct ry_yard *y, uint64_t now)
{
    see_time(y, now);
    bool answers = y->state == PROPOSED, manifests = y->nin > 0;
    if ((answers && y->last_now >= y->answers_by) || (manifests && y->last_now >= y->manifests_by)) {
        y->counts.impatient++;
        end_badly(y, answers && y->last_now >= y->answers_by ? RY_WHY_NO_ANSWER : RY_WHY_PATIENCE);
        return UINT64_MAX;
    }
    uint64_t next = UINT64_MAX;
    if (answers)
        next = y->answers_by;
    if (manifests && y->manifests_by < next)
        next = y->manifests_by;
    uint64_t step = y->config.patience_ns / 8 + 1;
    if (next != UINT64_MAX && next - y->last_now > step)
        next = y->last_now + step;
    return next;
}
