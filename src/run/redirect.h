/*
 * redirect.h: rows put into another order in front of an exchange, and behind it.
 *
 * Owns: the memory that this takes, gathering what is to be sent and writing out what came, by lists of indices on the
 * device. Not: why (engine/redirect.h), the exchange between the two.
 *
 * In stream order: ry_redirect_gather() lays the rows to be sent down one after the other; whoever calls exchanges
 * them, and what arrives goes, one row after the other, to where it says; ry_redirect_scatter() writes these into the
 * job's buffers. The kernel is the one that expands packed messages (rows.h): a message and its list are laid down in
 * memory of ours, so that one copy is made on the way out that a kernel of its own would spare.
 *
 * Memory is held beforehand, ry_redirect_hold(): what comes after does not fail for want of it. It counts as staging
 * memory, and stays with the runner. By one thread at a time, as the runner.
 */
#ifndef RY_RUN_REDIRECT_H
#define RY_RUN_REDIRECT_H

#include "run.h"

struct ry_redirect_rows {
    uint64_t row_bytes;        /* > 0 */
    uint64_t has, takes;       /* rows that the job's buffers hold to be sent, and are to hold when all is over */
    uint64_t goes, comes;      /* rows sent, and received */
    const uint32_t *send_from; /* [goes], device: which of `has` each is */
    const uint32_t *recv_from; /* [takes], device: which of `comes` */
};

struct ry_redirect; /* a runner's memory for it; NULL: none yet */

/** Hold memory for exchanges with up to so many bytes and rows, each way and both in the job's buffers and on the wire;
 *  what is more stays. In order of `stream`. -1 with `err`: what was held before stays. */
int ry_redirect_hold(struct ry_redirect **redirect, struct ry_runner *runner, uint64_t bytes, uint64_t rows,
                     void *stream, struct ry_err *err);
/** Is enough held for this? `redirect` may be NULL. */
bool ry_redirect_holds(const struct ry_redirect *redirect, const struct ry_redirect_rows *rows);
/** Gives the memory back in stream order. */
void ry_redirect_free(struct ry_redirect *redirect);

/** Enqueue the first half. `job`: its buffers, segments of whole rows that make `has` and `takes`. *send: the rows to
 * be sent, *recv: where those that come are to be put, both 16-byte aligned. -1 with `err`: it does not fit, or the
 * device refused. */
int ry_redirect_gather(struct ry_redirect *redirect, const struct ry_redirect_rows *rows, const struct ry_buffers *job,
                       char **send, char **recv, struct ry_err *err);
/** Enqueue the second half. An index beyond what there is writes nothing and is told of as ry_run_checks() says. */
int ry_redirect_scatter(struct ry_redirect *redirect, const struct ry_redirect_rows *rows, const struct ry_buffers *job,
                        struct ry_err *err);

#endif
