/*
 * redirect.h: an exchange whose rows go to other ranks than the job says (plugin/railyard.h, railyard_redirect()).
 *
 * Owns: what the job has asked for, and that the right exchange gets it: the next one on the communicator, of the
 * counts that were told. Not: moving rows on the device (run/redirect.h), how the exchange is carried out: what is
 * redirected is an exchange of memory of ours, of other counts, that goes the way of any (exchange.c), engaged or not.
 *
 * In front of it rows are gathered, behind it written out; all in order of the exchange's stream. Nothing is agreed on
 * here: that all ranks redirect the same exchange is promised by who asks for it. One that cannot be redirected after
 * all fails, since others go on.
 */
#ifndef RY_ENGINE_REDIRECT_H
#define RY_ENGINE_REDIRECT_H

#include "run/redirect.h"

struct comm;
struct reissue;

/* Of a communicator; zeroed at the start. */
struct ry_redirected {
    struct ry_redirect *memory; /* NULL: never asked for */
    _Atomic bool due;           /* the next exchange is to be redirected, as follows */
    bool done;                  /* the latest that was to be, was */
    struct ry_redirect_rows rows;
    uint64_t *sends, *receives, *goes, *comes; /* [nranks], rows; then elements of `x` */
    const void **send_buf;
    void **recv_buf;
    struct ry_exchange x; /* what is exchanged instead */
};

/* hooks */
int ry_redirect_ready(void *handle, uint64_t bytes, uint64_t rows, void *stream);
int ry_redirect_next(void *handle, const struct railyard_redirect *how);
int ry_redirect_done(void *handle);

/** Exchange `x` comes. `x` itself: it goes as it is. Another one: rows were gathered, exchange that one, and then call
 *  ry_redirect_end(). NULL: it fails, *result is the job's. */
const struct ry_exchange *ry_redirect_begin(struct comm *c, struct reissue *r, const struct ry_exchange *x,
                                            int *result);
/** It was exchanged, with *result. */
void ry_redirect_end(const struct comm *c, struct reissue *r, const struct ry_exchange *x, int *result);
void ry_redirected_free(struct ry_redirected *redirected);

#endif
