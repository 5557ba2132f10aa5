/*
 * contention.h: what a process' communicators have on the NICs at the same time.
 *
 * Owns: when the latest exchanges of all of them ran on the device and how many bytes they moved across nodes; what ran beside
 * what, and for how long; the figure that a rank puts into its manifest (struct ry_beside, plan/cost.h). Not: the clock
 * (sampler.h), which exchanges are timed (exchange.c), what is made of the figure (plan/cost.c, policy.c).
 *
 * Two exchanges run beside each other while both are between their begin and end on the device, whatever the host
 * enqueued when: a host that runs ahead has many under way that will never meet. Of an exchange's bytes as large a part
 * counts as the time that they met is of its own time. What ran beside an exchange is known only when the others are over, too, so
 * its figure is settled, and told of, after all that had begun to be timed when it came in; or after RY_CONTENTION_WAIT_NS.
 * Short exchanges may be timed one in so many; each then counts for as many (`weight`).
 *
 * Communicators with the same key are ranks of one and the same in this process, and not beside each other; nor are those of
 * different devices, whose clocks differ.
 *
 * Costs: nothing while a process has one communicator, or nobody asked lately. No device, no I/O, no clock but the one passed in.
 *
 * Thread-safety: any thread; functions marked [job] take no lock.
 */
#ifndef RY_ENGINE_CONTENTION_H
#define RY_ENGINE_CONTENTION_H

#include <stdbool.h>
#include <stdint.h>

#include "plan/cost.h"

#define RY_CONTENTION_SEATS 16        /* communicators that are followed */
#define RY_CONTENTION_RECORDS 128     /* exchanges remembered; what one meets beyond them is lost */
#define RY_CONTENTION_LARGE (1 << 20) /* bytes across nodes, from which on each exchange is worth being timed */
#define RY_CONTENTION_WAIT_NS UINT64_C(200000000)
#define RY_CONTENTION_LATELY_NS UINT64_C(5000000000) /* nobody asked for so long: nothing is timed for this */

struct ry_contention; /* one per process */
/** NULL when out of memory. */
struct ry_contention *ry_contention_new(void);
void ry_contention_free(struct ry_contention *q);

/** An exchange took `us`, and `beside` ran beside it; met_us of that time another one did. Called under the lock: must not call back. */
typedef void (*ry_contention_settled)(void *context, uint64_t number, double us, double met_us, const struct ry_beside *beside);

/** A communicator's seat; -1: none is free, and it is not followed (all functions take that). */
int ry_contention_join(struct ry_contention *q, uint64_t key, int device, ry_contention_settled settled, void *context);
/** When this returns `settled` is not called any more. */
void ry_contention_leave(struct ry_contention *q, int seat);

/** [job] Is there another communicator at all? */
bool ry_contention_several(const struct ry_contention *q, int seat);
/** [job] Are its exchanges to be timed, for others' sake or its own? `always`: even though nobody asked lately. */
bool ry_contention_wants(const struct ry_contention *q, int seat, uint64_t now_ns, bool always);
/** [job] One has begun to be timed; ry_contention_took() or _lost() follows. */
void ry_contention_began(struct ry_contention *q, int seat);
void ry_contention_lost(struct ry_contention *q, int seat);

struct ry_contention_run {
    uint64_t number;
    double began_us, us; /* on the device's clock */
    uint64_t out, in;    /* bytes that this rank moved across nodes, as they went */
    unsigned weight;     /* exchanges like it that this one stands for; 0: it only wants to know what ran beside it */
};
void ry_contention_took(struct ry_contention *q, int seat, const struct ry_contention_run *run, uint64_t now_ns);

/** What runs beside its exchanges, of late; all 0: nothing. Counts as asking. */
struct ry_beside ry_contention_of(struct ry_contention *q, int seat, uint64_t now_ns);
/** [job] Is that much (RY_BESIDE_MUCH), by the last one settled? */
bool ry_contention_much(const struct ry_contention *q, int seat);

#endif
