/*
 * returns.h: do all ranks agree that an exchange may be summed, and does it pay? The yardmaster's half of the rule in
 * pairing.h.
 *
 * Owns: which exchanges were chosen to go by dedup lately, and what that was estimated to take; comparing what the
 * ranks say; the estimate. Not: choosing (policy.c), what a rank knows by itself (pairing.h).
 *
 * All ranks must name the same exchange, one that went by dedup, and the same number of copies, but for those none of
 * whose rows are concerned. And the matrix must not be its own transpose: with equal splits every exchange looks like
 * the return of every other, on the way out as well.
 *
 * Pure state, no I/O, no allocation; under the communicator's lock, as the policy.
 */
#ifndef RY_ENGINE_RETURNS_H
#define RY_ENGINE_RETURNS_H

#include "policy.h"

#define RY_RETURNS 64 /* of the latest dedup exchanges; those that can still be answered are fewer: pairing.h */

/* Zeroed at the start. */
struct ry_returns {
    int next;
    struct {
        uint64_t number; /* 1 + it */
        double us;       /* estimated, without agreement and search */
    } went[RY_RETURNS];
};

/** Exchange `number` was chosen to go by dedup. */
void ry_returns_went(struct ry_returns *s, uint64_t number, double us);
/** May the exchange of this matrix be summed? NULL and *us, which D was estimated to take; or why not, "" where no rank
 *  says that it may. */
const char *ry_returns_ask(const struct ry_returns *s, const struct ry_side *sides, const uint64_t *matrix, int nranks,
                        double *us);
/** What it would take, agreement included: D turned round, after every rank has given its rows for other nodes to
 * relays, and these have read them once more to add them up. */
double ry_returns_estimate(const struct ry_cost_model *model, const struct ry_cluster *map, const struct ry_load *loads,
                        double us);

#endif
