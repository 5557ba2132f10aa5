/*
 * later_stream.h: what the two files of later.h share.
 *
 * Owns: an exchange that is given away or tried (struct ry_later_task), and what later.c (queues, waiting, ends) and
 * later_stream.c (a communicator's stream and words, trials of the job's streams) need of each other. Not for anybody
 * else.
 */
#ifndef RY_ENGINE_LATER_STREAM_H
#define RY_ENGINE_LATER_STREAM_H

#include "engine.h"

struct ry_later_task {
    struct ry_later_task *next;
    struct comm *c;
    struct ry_exchange x; /* its arrays lie behind */
    struct way way;
    struct ry_event *before; /* on the job's stream */
    uint32_t ticket;
};

/* ---- later.c ---- */

void ry_later_nap(unsigned us);
bool ry_later_is_aborted(const struct comm *c);
/** The host lets a stream go. */
void ry_later_let_go(const struct comm *c, int word, uint32_t ticket);
/** A copy that outlives the call; NULL: out of memory. */
struct ry_later_task *ry_later_task_new(struct comm *c, const struct ry_exchange *x, const struct way *way);
void ry_later_task_free(struct ry_later_task *t);

/** From BEGUN on it counts as pending, and the job's stream waits for its ticket in that word. */
enum ry_later_begun {
    RY_LATER_BEGUN,
    RY_LATER_NOT_NOW,
    RY_LATER_NOT_HERE
}; /* somebody is freeing memory; the device cannot */
enum ry_later_begun ry_later_begin(struct ry_later_task *t, int word);
/** It is tried on the thread that began it, which the watch knows from here; it is over. */
void ry_later_trying(const struct ry_later_task *t);
void ry_later_tried(struct ry_later_task *t);
/** The communicator has words that can be looked at; it has not any more. */
void ry_later_watch(struct comm *c, bool on);

/* ---- later_stream.c ---- */

/** Was the job's stream tried, and can it wait? */
bool ry_later_stream_good(struct comm *c, void *stream);
/** Try it with this exchange, where that has a point. True: it was carried out, *result is the job's. */
bool ry_later_try(struct comm *c, const struct ry_exchange *x, const struct way *way, int *result);

#endif
