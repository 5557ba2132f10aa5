/*
 * balanced_line.h: what one node sends to another, laid out on a line that both cut into equal shares, one for each of
 * their ranks.
 *
 * Owns: which rank of the sending node carries which bytes across, which of the receiving node gets them, and whose
 * they are. Not: when they cross (birkhoff.h), steps (balanced.c). Only src/plan includes it.
 *
 * The line is cut into shares of the senders, alike but for SLACK. A sender keeps the first of its own bytes, as many
 * as fit, so that as few as possible move, and moves none where they fit but for SLACK; what is moved fills up the
 * shares of those that have less, in ascending order. So a share has a kept range and, behind it, a moved one. The
 * receivers' shares are the same where nodes are of one size, one for each rail; else they are alike.
 */
#ifndef RY_PLAN_BALANCED_LINE_H
#define RY_PLAN_BALANCED_LINE_H

#include "strategy.h"

#define RY_GRAIN 16 /* what lies at a multiple of it is copied fastest */

/* Where share `k` of `of` begins. */
static inline uint64_t ry_share_at(uint64_t total, int k, int of)
{
    unsigned n = (unsigned)of, i = (unsigned)k;
    uint64_t at = total / n * i + total % n * i / n;
    return k == of ? total : at - at % RY_GRAIN;
}

static inline uint64_t ry_share_of(uint64_t total, int k, int of)
{
    return ry_share_at(total, k + 1, of) - ry_share_at(total, k, of);
}

/* So much more than its share may stay with a rank: it is not worth a message. */
static inline uint64_t ry_share_slack(uint64_t share)
{
    return share / 32 + RY_GRAIN;
}

/* Bytes of one rank in one share. */
struct ry_line_part {
    int holder, source; /* local indices: whose share, whose bytes */
    bool moved;
    uint64_t at, bytes;           /* on the line */
    uint64_t from;                /* in what `source` sends to the node */
    uint64_t range_at, range_end; /* the kept or moved range of the share */
};
struct ry_line {
    int senders, receivers;
    uint64_t total; /* UINT64_MAX: more than 64 bits */
    int nparts;
    struct ry_line_part *parts; /* room for RY_LINE_PARTS */
    uint64_t *ends;             /* [receivers], of their shares */
};
#define RY_LINE_PARTS(senders) (3 * (size_t)(senders))

/* `bytes`: what each sender sends to the node, `stride` apart. */
static inline void ry_line_lay(struct ry_line *l, const uint64_t *bytes, size_t stride, int senders, int receivers)
{
    uint64_t at = 0, spare_at = 0, spare_end = 0; /* of what `spare` moves to others, what is next */
    int spare = -1;
    l->senders = senders;
    l->receivers = receivers;
    l->nparts = 0;
    l->total = 0;
    for (int i = 0; i < senders; i++)
        l->total = ry_sum(l->total, bytes[(size_t)i * stride]);
    if (l->total == UINT64_MAX)
        return;
    for (int k = 0; k < senders; k++) {
        uint64_t share = ry_share_of(l->total, k, senders), own = bytes[(size_t)k * stride],
                 keeps = own > share + ry_share_slack(share) ? share : own, room = share > keeps ? share - keeps : 0;
        if (keeps)
            l->parts[l->nparts++] = (struct ry_line_part){k, k, false, at, keeps, 0, at, at + keeps};
        uint64_t moved = at += keeps;
        int first = l->nparts;
        while (room) {
            for (; spare_at == spare_end && ++spare < senders; spare_end = bytes[(size_t)spare * stride]) {
                spare_at = ry_share_of(l->total, spare, senders);
                if (bytes[(size_t)spare * stride] <= spare_at + ry_share_slack(spare_at))
                    spare_at = bytes[(size_t)spare * stride]; /* keeps all */
            }
            if (spare >= senders)
                break;
            uint64_t left = spare_end - spare_at, takes = left < room ? left : room;
            l->parts[l->nparts++] = (struct ry_line_part){k, spare, true, at, takes, spare_at, moved, 0};
            spare_at += takes;
            at += takes;
            room -= takes;
        }
        for (int i = first; i < l->nparts; i++)
            l->parts[i].range_end = at;
        if (senders == receivers)
            l->ends[k] = at;
    }
    for (int m = 0; senders != receivers && m < receivers; m++)
        l->ends[m] = ry_share_at(l->total, m + 1, receivers);
}

/* What goes from one rank to another and crosses by one pair of ranks. */
struct ry_line_piece {
    const struct ry_line_part *part;
    int receiver, target; /* local indices: who gets it, whom it is for */
    uint64_t at, bytes;   /* on the line */
    uint64_t from;        /* in the segment */
    uint64_t begin, end;  /* of the flow that it is in: what the part's range and the receiver's share have in common */
};
/* All of it, in the order of the line: a walk begins with zeros but for `line` and `cells`. */
struct ry_line_walk {
    const struct ry_line *line;
    const uint64_t *const *cells; /* [senders]: to each of the node's ranks, which are `columns` (NULL: 0, 1, …) */
    const int *columns;
    int part, receiver, target;
    uint64_t done, skip; /* of the part, of the segment */
    struct ry_line_piece piece;
};
static inline bool ry_line_next(struct ry_line_walk *w)
{
    const struct ry_line *l = w->line;
    if (w->part < l->nparts && w->done == l->parts[w->part].bytes) {
        w->part++;
        w->done = 0;
    }
    if (w->part >= l->nparts)
        return false;
    const struct ry_line_part *p = &l->parts[w->part];
    const uint64_t *cells = w->cells[p->source];
    if (!w->done) {
        w->target = 0;
        w->skip = p->from;
    }
    while (w->skip >= cells[w->columns ? w->columns[w->target] : w->target]) {
        w->skip -= cells[w->columns ? w->columns[w->target] : w->target];
        w->target++;
    }
    uint64_t at = p->at + w->done, bytes = p->bytes - w->done,
             segment = cells[w->columns ? w->columns[w->target] : w->target] - w->skip;
    while (l->ends[w->receiver] <= at)
        w->receiver++;
    uint64_t share = w->receiver ? l->ends[w->receiver - 1] : 0, share_end = l->ends[w->receiver];
    bytes = bytes < segment ? bytes : segment;
    bytes = bytes < share_end - at ? bytes : share_end - at;
    w->piece = (struct ry_line_piece){.part = p,
                                      .receiver = w->receiver,
                                      .target = w->target,
                                      .at = at,
                                      .bytes = bytes,
                                      .from = w->skip,
                                      .begin = p->range_at > share ? p->range_at : share,
                                      .end = p->range_end < share_end ? p->range_end : share_end};
    w->done += bytes;
    w->skip += bytes;
    return true;
}
/* Go on from there, further on on the line. */
static inline void ry_line_skip(struct ry_line_walk *w, uint64_t at)
{
    const struct ry_line *l = w->line;
    while (w->part < l->nparts && l->parts[w->part].at + l->parts[w->part].bytes <= at) {
        w->part++;
        w->done = 0;
    }
    if (w->part >= l->nparts || l->parts[w->part].at >= at)
        return;
    w->done = at - l->parts[w->part].at;
    w->target = 0;
    w->skip = l->parts[w->part].from + w->done;
}
/* Is the piece the whole of its flow, and for who gets it? Then it is received straight into place. */
static inline bool ry_line_straight(const struct ry_line_piece *p)
{
    return p->target == p->receiver && p->at == p->begin && p->at + p->bytes == p->end;
}

#endif
