/*
 * pace.h: how fast exchanges follow each other, agreed on and not.
 *
 * Owns: the latest intervals between the ends of successive exchanges on the device, by kind, and their comparison.
 * Not: the clock (sampler.h), what comes of the advice (policy.h).
 *
 * What an exchange took on the device, which the cost model learns from (plan/cost.h), is not what it costs a job.
 * Exchanges of plain NCCL overlap: a rank that is done early starts the next, where agreeing keeps all in step; and
 * what agreeing keeps the host from doing in the meantime shows in no duration either. All of it shows from the end of
 * one exchange to the end of the next, in which there is also the job's own work; that is the same either way. So
 * intervals are compared kind by kind, a kind being the size classes (powers of two) of the exchange and the one before
 * it, by their medians: a step that ends with a checkpoint does not count for more than another. One rank's are enough,
 * ranks being in step over any number of exchanges: the yardmaster's own, and nothing has to be sent.
 *
 * What other communicators have on the links at the time makes up a kind, too: an interval that ended beside their
 * exchanges is compared with such intervals only. Otherwise watching plain NCCL while they happen to rest would look
 * like a gain of plain NCCL, and the other way round.
 *
 * Thread-safety: any thread; ry_pace_began() and ry_pace_wants() take no lock.
 */
#ifndef RY_ENGINE_PACE_H
#define RY_ENGINE_PACE_H

#include <stdbool.h>
#include <stdint.h>

enum ry_pace_way { RY_PACE_PLAIN, RY_PACE_ENGAGED, RY_PACE_WAYS };

#define RY_PACE_KINDS 64
#define RY_PACE_MEMORY 16  /* intervals remembered of a kind, each way */
#define RY_PACE_ENOUGH 6   /* fewer tell nothing */
#define RY_PACE_SHARE 0.75 /* of the engaged time: where kinds with enough both ways make up less, nothing is known */

struct ry_pace; /* opaque */
/** NULL when out of memory. */
struct ry_pace *ry_pace_new(void);
void ry_pace_free(struct ry_pace *p);

/** Are intervals of this way wanted? Engaged ones always, plain ones while they are watched. */
bool ry_pace_wants(const struct ry_pace *p, enum ry_pace_way way);
/** The interval that ends with exchange `number` is being measured; bytes: what this rank had to send or get, whichever
 * is more, in it and in the one before it; beside: others run beside this communicator's exchanges (plan/cost.h). */
void ry_pace_began(struct ry_pace *p, uint64_t number, enum ry_pace_way way, uint64_t before, uint64_t bytes, bool beside);
/** It was `us` microseconds. Ignored unless it was told of, lately, and is above zero. */
void ry_pace_took(struct ry_pace *p, uint64_t number, double us);

/*
 * Does agreeing pay, by the pace? Asked of exchanges for which the cost model expects a gain, engaged or about to be.
 *   STAY   it does, by RY_PACE_GAIN at least; or too little is known, and watching did not change that RY_PACE_WATCHES
 * times. WATCH  (engaged only) let *rest exchanges pass by without agreeing, then ask again: plain ones are watched
 * meanwhile. At first; then when what is known of them is RY_PACE_GAP exchanges old, or twice, four times, ... 64 times
 * as many; and before a LEAVE for which it would not be fresh. LEAVE  it does not. *ratio: the time of engaged
 * exchanges over that of plain ones, the job's own work included; 0: too little is known.
 */
#define RY_PACE_GAIN 0.02 /* less is not told from nothing by so few */
#define RY_PACE_WATCHES 3
#define RY_PACE_GAP 1024
#define RY_PACE_FRESH 512 /* exchanges */
enum ry_pace_advice { RY_PACE_STAY, RY_PACE_WATCH, RY_PACE_LEAVE };
enum ry_pace_advice ry_pace_ask(struct ry_pace *p, uint64_t number, bool engaged, double *ratio, unsigned *rest);
/** From here on engaged exchanges go another way: forget those seen. */
void ry_pace_changed(struct ry_pace *p);

#endif
