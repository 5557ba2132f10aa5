/* repeats.c: see repeats.h. */
#include "repeats.h"

#include <stddef.h>

#define RARELY 64     /* of so many exchanges one is looked at aside, all in all */
#define AT_FIRST 12   /* so many more at the beginning */
#define MOST_GAP 1024 /* turns */

struct ry_habit *ry_habits_next(struct ry_habits *h, enum ry_direction direction, uint64_t row_bytes)
{
    struct ry_habit *habit = NULL, *oldest = &h->of[0];
    for (int i = 0; i < h->n && !habit; i++) {
        if (h->of[i].direction == direction && h->of[i].row_bytes == row_bytes)
            habit = &h->of[i];
        if (h->of[i].used_at < oldest->used_at)
            oldest = &h->of[i];
    }
    if (!habit) {
        habit = h->n < RY_HABITS ? &h->of[h->n++] : oldest;
        *habit = (struct ry_habit){.direction = direction, .row_bytes = row_bytes, .due = 1, .gap = 1};
    }
    h->exchanges++;
    habit->used_at = h->exchanges;
    habit->turn++;
    h->spent -= 1.0 / RARELY;
    if (h->exchanges == 1 || h->spent < -AT_FIRST) /* a long silence is no reason to look at everything after it */
        h->spent = -AT_FIRST;
    return habit;
}

double ry_habit_share(const struct ry_habit *habit)
{
    return habit->looks && habit->share >= RY_REPEATING ? habit->share : 0;
}

static void put_off(struct ry_habit *habit)
{
    habit->due = habit->turn + habit->gap;
    habit->gap = 2 * habit->gap < MOST_GAP ? 2 * habit->gap : MOST_GAP;
}

enum ry_look ry_habits_look(struct ry_habits *h, struct ry_habit *habit, uint64_t cross, bool engaged, bool always)
{
    if (always && engaged)
        return habit->row_bytes >= RY_LOOK_ROW_FORCED && cross ? RY_LOOK_FIRST : RY_LOOK_NOT;
    if (habit->row_bytes < RY_LOOK_ROW)
        return RY_LOOK_NOT;
    if (cross < RY_LOOK_BYTES) {
        bool may_repeat = !habit->looks || ry_habit_share(habit) > 0;
        return engaged && habit->packs && may_repeat && cross >= RY_LOOK_LITTLE && habit->unused < RY_UNUSED
                   ? RY_LOOK_FIRST
                   : RY_LOOK_NOT;
    }
    bool repeats = ry_habit_share(habit) > 0, due = habit->turn >= habit->due;
    if (repeats && engaged) {
        if (habit->unused < RY_UNUSED)
            return RY_LOOK_FIRST;
        if (due)
            put_off(habit);
        return due ? RY_LOOK_FIRST : RY_LOOK_NOT;
    }
    if (!due || h->spent > -1)
        return RY_LOOK_NOT;
    h->spent++;
    put_off(habit);
    return RY_LOOK_ASIDE;
}

void ry_habit_failed(struct ry_habit *habit)
{
    habit->gap = MOST_GAP;
    habit->unused = RY_UNUSED; /* while engaged it is not tried at every exchange either */
    put_off(habit);
}

void ry_habits_found(struct ry_habits *h, enum ry_direction direction, uint64_t row_bytes, uint64_t cross,
                     uint64_t packed)
{
    double saved = cross && packed < cross ? 1 - (double)packed / (double)cross : 0;
    for (int i = 0; i < h->n; i++) {
        struct ry_habit *habit = &h->of[i];
        if (habit->direction != direction || habit->row_bytes != row_bytes)
            continue;
        bool repeated = ry_habit_share(habit) > 0;
        habit->share = habit->looks++ ? (habit->share + saved) / 2 : saved;
        if (!repeated && ry_habit_share(habit) > 0)
            habit->unused = 0; /* let the yardmaster say */
        return;
    }
}

void ry_habit_went(struct ry_habit *habit, bool packed)
{
    habit->packs = packed;
}

void ry_habit_used(struct ry_habit *habit, bool packed)
{
    if (packed) {
        habit->unused = 0;
        habit->gap = 64;
    } else if (++habit->unused == RY_UNUSED) {
        habit->gap = 64;
        put_off(habit);
    }
}
