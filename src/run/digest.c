/*
 * digest.c: the digest of what a rank sends to other nodes, on its way to the host.
 *
 * Owns: which segments are in it, the memory for it on the device, when it is there. Not: the sum (digest.h,
 * kernels.cu).
 */
#include "internal.h"

#include "base/log.h"
#include "digest.h"

bool ry_run_digests(const struct ry_runner *r)
{
    return r->kernels;
}

int ry_run_digest(struct ry_runner *r, const struct ry_cluster *map, const struct ry_buffers *b, struct ry_err *err)
{
    struct batch batch;
    struct ry_err lost;
    struct check *c;
    void *sum;
    digest_free(r);
    if (!r->kernels)
        return ry_fail(err, "Railyard's kernels are not loaded");
    if (b->nranks >= 1 << RY_DIGEST_TAG_BITS)
        return ry_fail(err, "%d ranks are too many", b->nranks);
    if (!(c = checks_take(r->device, err)))
        return -1;
    if (r->device->alloc_async(&sum, sizeof(struct ry_digest), b->stream, err)) {
        checks_put_back(c, false);
        return -1;
    }
    int rc = r->device->fill(sum, 0, sizeof(struct ry_digest), b->stream, err);
    batch_start_digest(&batch, r, b->stream, sum);
    for (int p = 0; p < b->nranks && !rc; p++)
        if (map->node[p] != map->node[b->rank])
            rc = batch_add(&batch, NULL, b->send[p], b->send_bytes[p], (uint32_t)p, err);
    if (!rc)
        rc = batch_flush(&batch, err) ||
             r->device->copy((void *)c->answer, sum, sizeof(struct ry_digest), b->stream, err) ||
             r->device->event_record(c->event, b->stream, err);
    if (r->device->free_async(sum, b->stream, &lost))
        ry_info("%zu bytes are lost: %s", sizeof(struct ry_digest), lost.msg);
    if (!rc)
        r->digest = c;
    else
        r->device->event_destroy(c->event); /* a copy may be under way, with no event after it: never used again */
    return rc ? -1 : 0;
}

bool ry_run_digest_over(struct ry_runner *r, struct ry_digest *digest, bool *failed)
{
    bool done = false;
    *failed = !r->digest || r->device->event_done(r->digest->event, &done, NULL);
    if (*failed || !done) {
        if (*failed)
            digest_free(r);
        return false;
    }
    *digest = (struct ry_digest){{r->digest->answer[0], r->digest->answer[1]}};
    checks_put_back(r->digest, false);
    r->digest = NULL;
    return true;
}

void digest_free(struct ry_runner *r)
{
    if (r->digest)
        checks_put_back(r->digest, true);
    r->digest = NULL;
}
