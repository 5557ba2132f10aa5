/*
 * repeats.h: which exchanges repeat rows, as far as was seen, and when to look again.
 *
 * Owns: for each kind of exchange of a communicator (direction and row width) the share of the cross-node bytes that
 * packing would save, and the decision whether the next exchange of the kind is searched for equal rows (run/rows.h),
 * and whether its job waits for the answer. Not: the search, nor whether packing pays (the yardmaster's cost model).
 *
 * Aside: the search is enqueued, nobody waits for it, a later exchange picks up what it found. This is how kinds are
 * learned of: the first few exchanges of a communicator, then rarely: of each kind after 1, 2, 4, … and in the end 1024
 * more of its exchanges, and never more than one of 64 exchanges in all, whatever the kinds. A search reads what
 * crosses once or twice at the speed of memory, a tenth of what the exchange takes at most; so this costs well below
 * 1 % of it.
 *
 * First: the rank waits for the answer before it tells the others about the exchange, which therefore can go packed.
 * Only while engaged, only kinds that are known to repeat, and only as long as the verdicts make use of it: after
 * RY_UNUSED verdicts for another strategy in a row just after 64, 128, … 1024 more.
 *
 * Exchanges that send less than RY_LOOK_BYTES to other nodes from here are not looked at, nor rows so short that the
 * list of who is which would be as long. But while those of a kind go packed, since other ranks send more, a rank with
 * RY_LOOK_LITTLE or more looks first, too, unless it knows that its rows do not repeat: nobody waits longer for it than
 * for the others. `always` (RAILYARD_STRATEGY=dedup) looks first at every exchange while engaged, however small.
 *
 * What counts turns counts all exchanges of a kind, so all ranks come to it at the same ones, if they tell the same
 * kinds apart. Where they do not, fewer rows are found than there are, and that is all.
 *
 * Pure state, no I/O, no clock, no allocation; one per communicator, used by one thread at a time.
 */
#ifndef RY_ENGINE_REPEATS_H
#define RY_ENGINE_REPEATS_H

#include <stdbool.h>
#include <stdint.h>

#include "direction.h"

#define RY_LOOK_BYTES (256u << 10)
#define RY_LOOK_LITTLE (16u << 10) /* less is not worth the launches */
#define RY_LOOK_ROW 64        /* bytes: shorter rows are not looked for */
#define RY_LOOK_ROW_FORCED 16 /* nor these, whatever the user wants: a scan takes memory for each row */
#define RY_REPEATING 0.03     /* of the bytes: less is not worth a wait */
#define RY_UNUSED 32
#define RY_HABITS 16

struct ry_habit { /* of one kind */
    enum ry_direction direction;
    uint64_t row_bytes;
    uint64_t used_at;  /* exchange of the communicator, for making room */
    uint64_t turn;     /* exchanges of this kind so far */
    uint64_t due, gap; /* turn at which it is looked at next, unless at every one; turns until the one after that */
    uint32_t looks;    /* answers that came */
    uint32_t unused;   /* verdicts in a row that made no use of a look */
    bool packs;        /* the latest that was agreed on went packed */
    double share;      /* of the cross-node bytes that packing saves, latest looks first; 0 to 1 */
};

/* Zeroed at the start. */
struct ry_habits {
    int n;
    struct ry_habit of[RY_HABITS];
    uint64_t exchanges;
    double spent; /* looks aside beyond what the exchanges so far allow; negative: to spare */
};

enum ry_look { RY_LOOK_NOT, RY_LOOK_ASIDE, RY_LOOK_FIRST };

/** An exchange of this kind comes, of any size (row_bytes 0: not known, which is a kind as well). Valid until the next
 * call. */
struct ry_habit *ry_habits_next(struct ry_habits *h, enum ry_direction direction, uint64_t row_bytes);
/** Shall it be looked at? `cross`: bytes that it sends to other nodes from here. Never RY_LOOK_FIRST unless `engaged`.
 */
enum ry_look ry_habits_look(struct ry_habits *h, struct ry_habit *habit, uint64_t cross, bool engaged, bool always);
/** It was not possible after all: for want of memory, as a rule. */
void ry_habit_failed(struct ry_habit *habit);
/** An answer: of `cross` bytes `packed` would be left. A kind that was forgotten meanwhile stays so. */
void ry_habits_found(struct ry_habits *h, enum ry_direction direction, uint64_t row_bytes, uint64_t cross,
                     uint64_t packed);
/** What came of a look first: the exchange went packed, or not. */
void ry_habit_used(struct ry_habit *habit, bool packed);
/** An exchange of this kind was agreed on, and went packed, or not, whether this rank looked or did not. */
void ry_habit_went(struct ry_habit *habit, bool packed);
/** The share that packing is expected to save; 0 where the kind is not known to repeat. */
double ry_habit_share(const struct ry_habit *habit);

#endif
