/* routing_writer.c: see routing_writer.h. */
#include "place/routing_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/npy.h"
#include "place/routing.h"

enum { COUNTS, TOKENS, ARRAYS };
static const char *const names[ARRAYS] = {"counts.npy", "tokens.npy"};
static const enum ry_npy_type types[ARRAYS] = {RY_NPY_U16, RY_NPY_U32};

struct ry_routing_writer {
    char dir[PATH_MAX - 32];
    struct ry_routing_shape shape;
    int fd[ARRAYS];
    int64_t samples, left_out;
    uint16_t *narrow; /* [layers][experts] */
};

static size_t sample_bytes(const struct ry_routing_writer *w, int array)
{
    return array == COUNTS ? (size_t)w->shape.layers * (size_t)w->shape.experts * sizeof(uint16_t)
                           : (size_t)w->shape.tokens_per_sample * sizeof(uint32_t);
}

static off_t end_of(const struct ry_routing_writer *w, int array)
{
    return RY_NPY_HEADER_BYTES + (off_t)sample_bytes(w, array) * (off_t)w->samples;
}

static int write_at(const struct ry_routing_writer *w, int array, const void *data, size_t n, off_t at,
                    struct ry_err *err)
{
    for (const char *p = data; n;) {
        ssize_t done = pwrite(w->fd[array], p, n, at);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return ry_fail(err, "%s/%s: cannot be written: %s", w->dir, names[array], strerror(errno));
        p += done;
        at += done;
        n -= (size_t)done;
    }
    return 0;
}

static int write_headers(const struct ry_routing_writer *w, struct ry_err *err)
{
    char header[RY_NPY_HEADER_BYTES];
    for (int a = 0; a < ARRAYS; a++) {
        size_t shape[3] = {(size_t)w->samples, (size_t)w->shape.tokens_per_sample};
        if (a == COUNTS) {
            shape[1] = (size_t)w->shape.layers;
            shape[2] = (size_t)w->shape.experts;
        }
        ry_npy_header(header, types[a], a == COUNTS ? 3 : 2, shape);
        if (write_at(w, a, header, sizeof header, 0, err))
            return -1;
    }
    return 0;
}

static int write_meta(const struct ry_routing_writer *w, struct ry_err *err)
{
    char path[PATH_MAX], part[PATH_MAX + 8];
    snprintf(path, sizeof path, "%s/meta.json", w->dir);
    snprintf(part, sizeof part, "%s.tmp", path);
    json_t *meta = json_pack("{si si si si sI sI sb ss ss}", "layers", w->shape.layers, "experts", w->shape.experts,
                             "topk", w->shape.topk, "tokens_per_sample", w->shape.tokens_per_sample, "samples",
                             (json_int_t)w->samples, "left_out", (json_int_t)w->left_out, "growing", 1, "counts",
                             "counts.npy uint16 [sample][layer][expert]: tokens of the sample routed to the expert",
                             "tokens", "tokens.npy uint32 [sample][token]: token ids");
    errno = 0; /* which jansson need not set */
    int bad = !meta ? ENOMEM : 0;
    if (meta && (json_dump_file(meta, part, JSON_INDENT(1)) || rename(part, path)))
        bad = errno ? errno : EIO;
    json_decref(meta);
    return bad ? ry_fail(err, "%s: cannot be written: %s", path, strerror(bad)) : 0;
}

/* ---- opening ---- */

/* Does the array of an earlier job hold its samples, where they are looked for? */
static int check_array(const struct ry_routing_writer *w, int array, struct ry_err *err)
{
    char path[PATH_MAX];
    struct ry_npy npy;
    snprintf(path, sizeof path, "%s/%s", w->dir, names[array]);
    if (ry_npy_open(&npy, path, err))
        return -1;
    bool ok = npy.type == types[array] && (const char *)npy.data - (const char *)npy.map == RY_NPY_HEADER_BYTES &&
              npy.ndim == (array == COUNTS ? 3 : 2) && npy.shape[0] >= (size_t)w->samples &&
              npy.count / (npy.shape[0] ? npy.shape[0] : 1) * ry_npy_type_bytes(types[array]) == sample_bytes(w, array);
    ry_npy_close(&npy);
    return ok ? 0 : ry_fail(err, "%s: is not what its meta.json tells of; record into another folder", path);
}

/* 1: the folder's meta.json is of a recording that can be continued; 0: there is none. */
static int read_meta(struct ry_routing_writer *w, struct ry_err *err)
{
    char path[PATH_MAX];
    json_error_t bad;
    const struct {
        const char *key;
        int want;
    } keys[] = {{"layers", w->shape.layers},
                {"experts", w->shape.experts},
                {"topk", w->shape.topk},
                {"tokens_per_sample", w->shape.tokens_per_sample}};
    snprintf(path, sizeof path, "%s/meta.json", w->dir);
    if (access(path, F_OK) && errno == ENOENT)
        return 0;
    json_t *meta = json_load_file(path, 0, &bad);
    int rc = -1;
    if (!meta) {
        ry_fail(err, "%s: line %d: %s", path, bad.line, bad.text);
        goto out;
    }
    if (!json_is_true(json_object_get(meta, "growing"))) {
        ry_fail(err, "%s: not of a recording that can be continued ('growing' is not true); record into another folder",
                path);
        goto out;
    }
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        json_int_t have = json_integer_value(json_object_get(meta, keys[i].key));
        if (have != keys[i].want) {
            ry_fail(err, "%s: '%s' is %lld, but this job has %d; record into another folder", path, keys[i].key,
                    (long long)have, keys[i].want);
            goto out;
        }
    }
    w->samples = json_integer_value(json_object_get(meta, "samples"));
    w->left_out = json_integer_value(json_object_get(meta, "left_out"));
    if (w->samples < 0 || w->samples > RY_ROUTING_SAMPLES) {
        ry_fail(err, "%s: 'samples' is %lld", path, (long long)w->samples);
        goto out;
    }
    rc = 1;
out:
    json_decref(meta);
    return rc;
}

static int open_arrays(struct ry_routing_writer *w, bool again, struct ry_err *err)
{
    char path[PATH_MAX];
    for (int a = 0; a < ARRAYS; a++) {
        snprintf(path, sizeof path, "%s/%s", w->dir, names[a]);
        if (!again && !access(path, F_OK))
            return ry_fail(err, "%s: exists, but no meta.json beside it; record into another folder", path);
        if (w->samples && check_array(w, a, err))
            return -1;
        if ((w->fd[a] = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666)) < 0)
            return ry_fail(err, "%s: cannot be opened: %s", path, strerror(errno));
        /* Refused only where somebody else has it: some file systems know no locks. */
        struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        if (fcntl(w->fd[a], F_SETLK, &whole) && (errno == EACCES || errno == EAGAIN))
            return ry_fail(err, "%s: another process is recording into it; give each job a folder of its own", path);
    }
    return 0;
}

static int start(struct ry_routing_writer *w, struct ry_err *err)
{
    if (mkdir(w->dir, 0777) && errno != EEXIST)
        return ry_fail(err, "%s: cannot be made: %s", w->dir, strerror(errno));
    char *whole = realpath(w->dir, NULL); /* the job may change its working folder */
    if (!whole || snprintf(w->dir, sizeof w->dir, "%s", whole) >= (int)sizeof w->dir) {
        free(whole);
        return ry_fail(err, "%s: cannot be used: %s", w->dir, whole ? "the path is too long" : strerror(errno));
    }
    free(whole);
    int again = read_meta(w, err);
    if (again < 0 || open_arrays(w, again, err))
        return -1;
    if (write_meta(w, err) || write_headers(w, err))
        return -1;
    for (int a = 0; a < ARRAYS; a++) /* what a job that died had not flushed */
        if (ftruncate(w->fd[a], end_of(w, a)))
            return ry_fail(err, "%s/%s: cannot be written: %s", w->dir, names[a], strerror(errno));
    return 0;
}

static void discard(struct ry_routing_writer *w)
{
    for (int a = 0; a < ARRAYS; a++)
        if (w->fd[a] >= 0)
            close(w->fd[a]);
    free(w->narrow);
    free(w);
}

struct ry_routing_writer *ry_routing_writer_open(const char *dir, const struct ry_routing_shape *s, struct ry_err *err)
{
    if (s->layers < 1 || s->layers > RY_ROUTING_LAYERS || s->experts < 1 || s->experts > RY_ROUTING_EXPERTS ||
        s->topk < 1 || s->topk > RY_ROUTING_TOPK || s->topk > s->experts || s->tokens_per_sample < 1 ||
        s->tokens_per_sample > RY_ROUTING_TOKENS) {
        ry_fail(err, "%s: no recording can have %d layers of %d experts, topk %d, samples of %d tokens", dir, s->layers,
                s->experts, s->topk, s->tokens_per_sample);
        return NULL;
    }
    struct ry_routing_writer *w = calloc(1, sizeof *w);
    uint16_t *narrow = calloc((size_t)s->layers * (size_t)s->experts, sizeof *narrow);
    if (!w || !narrow || snprintf(w->dir, sizeof w->dir, "%s", dir) >= (int)sizeof w->dir) {
        ry_fail(err, "%s: %s", dir, w && narrow ? "the path is too long" : "out of memory");
        free(narrow);
        free(w);
        return NULL;
    }
    w->shape = *s;
    w->narrow = narrow;
    for (int a = 0; a < ARRAYS; a++)
        w->fd[a] = -1;
    if (start(w, err)) {
        discard(w);
        return NULL;
    }
    return w;
}

/* ---- writing ---- */

int ry_routing_writer_add(struct ry_routing_writer *w, const uint32_t *tokens, const uint32_t *counts,
                          struct ry_err *err)
{
    size_t n = (size_t)w->shape.layers * (size_t)w->shape.experts;
    if (w->samples == RY_ROUTING_SAMPLES) {
        w->left_out++;
        return 0;
    }
    for (size_t i = 0; i < n; i++) {
        if (counts[i] > UINT16_MAX) {
            w->left_out++;
            return 0;
        }
        w->narrow[i] = (uint16_t)counts[i];
    }
    /* Written but not counted is not there: a sample that fails halfway leaves the recording as it was. */
    if (write_at(w, COUNTS, w->narrow, sample_bytes(w, COUNTS), end_of(w, COUNTS), err) ||
        write_at(w, TOKENS, tokens, sample_bytes(w, TOKENS), end_of(w, TOKENS), err))
        return -1;
    w->samples++;
    return 1;
}

void ry_routing_writer_left_out(struct ry_routing_writer *w)
{
    w->left_out++;
}

int64_t ry_routing_writer_samples(const struct ry_routing_writer *w)
{
    return w->samples;
}

int ry_routing_writer_flush(struct ry_routing_writer *w, struct ry_err *err)
{
    return write_headers(w, err) || write_meta(w, err) ? -1 : 0;
}

int ry_routing_writer_close(struct ry_routing_writer *w, struct ry_err *err)
{
    int rc = w ? ry_routing_writer_flush(w, err) : 0;
    if (w)
        discard(w);
    return rc;
}
