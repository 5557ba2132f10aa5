/* npy.c: see npy.h. The format is NumPy's own NEP 1: magic, version, header length, a Python dict, the elements. */
#include "npy.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "npy.c reads and writes little-endian elements in place"
#endif

static const struct {
    const char *descr, *name;
    size_t bytes;
} types[] = {
    [RY_NPY_U8] = {"u1", "uint8", 1},    [RY_NPY_U16] = {"u2", "uint16", 2},  [RY_NPY_U32] = {"u4", "uint32", 4},
    [RY_NPY_U64] = {"u8", "uint64", 8},  [RY_NPY_I32] = {"i4", "int32", 4},   [RY_NPY_I64] = {"i8", "int64", 8},
    [RY_NPY_F32] = {"f4", "float32", 4}, [RY_NPY_F64] = {"f8", "float64", 8},
};
static const char magic[6] = {'\x93', 'N', 'U', 'M', 'P', 'Y'};

#define HEADER_BYTES RY_NPY_HEADER_BYTES /* padded to it; four dimensions of 20 digits each still fit */

const char *ry_npy_type_name(enum ry_npy_type type)
{
    return types[type].name;
}

size_t ry_npy_type_bytes(enum ry_npy_type type)
{
    return types[type].bytes;
}

/* The dict of the header, read by a cursor: only what NumPy writes there, in any order and spacing. */
struct cursor {
    const char *at, *end;
};

static bool eat(struct cursor *c, char want)
{
    while (c->at < c->end && isspace((unsigned char)*c->at))
        c->at++;
    if (c->at == c->end || *c->at != want)
        return false;
    c->at++;
    return true;
}

static bool read_string(struct cursor *c, char *out, size_t size)
{
    char quote = '\'';
    if (!eat(c, quote) && !eat(c, quote = '"'))
        return false;
    const char *close = memchr(c->at, quote, (size_t)(c->end - c->at));
    if (!close || (size_t)(close - c->at) >= size)
        return false;
    memcpy(out, c->at, (size_t)(close - c->at));
    out[close - c->at] = 0;
    c->at = close + 1;
    return true;
}

static bool read_word(struct cursor *c, const char *word)
{
    size_t n = strlen(word);
    eat(c, 0); /* blanks only: a NUL never stands here */
    if ((size_t)(c->end - c->at) < n || memcmp(c->at, word, n))
        return false;
    c->at += n;
    return true;
}

enum shape_result { SHAPE_OK, SHAPE_BAD, SHAPE_TOO_MANY, SHAPE_TOO_BIG };

static enum shape_result read_shape(struct cursor *c, struct ry_npy *out)
{
    if (!eat(c, '('))
        return SHAPE_BAD;
    out->ndim = 0;
    out->count = 1;
    while (!eat(c, ')')) {
        if (out->ndim == RY_NPY_DIMS)
            return SHAPE_TOO_MANY;
        size_t v = 0;
        const char *from = c->at;
        for (; c->at < c->end && *c->at >= '0' && *c->at <= '9'; c->at++)
            if (__builtin_mul_overflow(v, (size_t)10, &v) || __builtin_add_overflow(v, (size_t)(*c->at - '0'), &v))
                return SHAPE_TOO_BIG;
        if (c->at == from)
            return SHAPE_BAD;
        if (c->at < c->end && *c->at == 'L') /* Python 2 wrote long integers so */
            c->at++;
        out->shape[out->ndim++] = v;
        if (__builtin_mul_overflow(out->count, v, &out->count))
            return SHAPE_TOO_BIG;
        if (!eat(c, ',')) {
            if (!eat(c, ')'))
                return SHAPE_BAD;
            break;
        }
    }
    return SHAPE_OK;
}

static int parse_dict(struct ry_npy *out, struct cursor c, const char *path, struct ry_err *err)
{
    bool have_descr = false, have_order = false, have_shape = false;
    char key[32], descr[32];
    if (!eat(&c, '{'))
        goto bad;
    while (!eat(&c, '}')) {
        if (!read_string(&c, key, sizeof key) || !eat(&c, ':'))
            goto bad;
        if (!strcmp(key, "descr")) {
            if (!read_string(&c, descr, sizeof descr))
                return ry_fail(err, "%s: its elements are structures or of another type that Railyard does not read",
                               path);
            char order = *descr;
            const char *name = descr + (order && strchr("<>|=", order) ? 1 : 0);
            size_t t = 0;
            while (t < sizeof types / sizeof *types && strcmp(types[t].descr, name))
                t++;
            if (t == sizeof types / sizeof *types || (order == '>' && types[t].bytes > 1))
                return ry_fail(err,
                               "%s: elements of type '%s' are not supported; convert it to uint8/16/32/64, int32/64 or "
                               "float32/64, little-endian",
                               path, descr);
            out->type = (enum ry_npy_type)t;
            have_descr = true;
        } else if (!strcmp(key, "fortran_order")) {
            if (read_word(&c, "True"))
                return ry_fail(err, "%s: is in Fortran order; save numpy.ascontiguousarray(a) instead", path);
            if (!read_word(&c, "False"))
                goto bad;
            have_order = true;
        } else if (!strcmp(key, "shape")) {
            switch (read_shape(&c, out)) {
            case SHAPE_OK:
                break;
            case SHAPE_BAD:
                goto bad;
            case SHAPE_TOO_MANY:
                return ry_fail(err, "%s: has more than %d dimensions", path, RY_NPY_DIMS);
            case SHAPE_TOO_BIG:
                return ry_fail(err, "%s: its header claims more elements than a machine can hold", path);
            }
            have_shape = true;
        } else {
            goto bad;
        }
        if (!eat(&c, ',') && !(c.at < c.end && *c.at == '}'))
            goto bad;
    }
    if (have_descr && have_order && have_shape)
        return 0;
bad:
    return ry_fail(err, "%s: the header is not one that NumPy writes: is the file damaged?", path);
}

static int parse(struct ry_npy *out, const char *path, struct ry_err *err)
{
    const unsigned char *b = out->map;
    size_t size = out->map_size, before, length;
    if (size < sizeof magic || memcmp(b, magic, sizeof magic))
        return ry_fail(err, "%s: is no .npy file (it does not begin with NumPy's magic)", path);
    if (size < 12)
        return ry_fail(err, "%s: is truncated inside its header", path);
    if (b[6] == 1) {
        before = 10;
        length = (size_t)b[8] | (size_t)b[9] << 8;
    } else if (b[6] == 2 || b[6] == 3) { /* 3 is 2 with UTF-8 field names, which only structures have */
        before = 12;
        length = (size_t)b[8] | (size_t)b[9] << 8 | (size_t)b[10] << 16 | (size_t)b[11] << 24;
    } else {
        return ry_fail(err, "%s: .npy format version %d.%d is not supported (1.0 to 3.0 are)", path, b[6], b[7]);
    }
    if (length > size - before)
        return ry_fail(err, "%s: is truncated inside its header", path);
    if (parse_dict(out, (struct cursor){(const char *)b + before, (const char *)b + before + length}, path, err))
        return -1;
    size_t start = before + length, each = types[out->type].bytes, need;
    if (__builtin_mul_overflow(out->count, each, &need))
        return ry_fail(err, "%s: its header claims more elements than a machine can hold", path);
    if (need > size - start)
        return ry_fail(err, "%s: is truncated: its header promises %zu bytes of elements, %zu are there", path, need,
                       size - start);
    if (start % each)
        return ry_fail(err, "%s: its elements are not aligned; load and save it with NumPy", path);
    out->data = b + start;
    return 0;
}

int ry_npy_open(struct ry_npy *out, const char *path, struct ry_err *err)
{
    *out = (struct ry_npy){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0)
        return ry_fail(err, "%s: cannot be opened: %s", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_size == 0) {
        close(fd);
        return ry_fail(err, "%s: is %s", path, S_ISREG(st.st_mode) ? "empty, no .npy file" : "not a regular file");
    }
    out->map_size = (size_t)st.st_size;
    out->map = mmap(NULL, out->map_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int saved = errno;
    close(fd);
    if (out->map == MAP_FAILED) {
        *out = (struct ry_npy){0};
        return ry_fail(err, "%s: cannot be mapped: %s", path, strerror(saved));
    }
    if (parse(out, path, err)) {
        ry_npy_close(out);
        return -1;
    }
    return 0;
}

void ry_npy_close(struct ry_npy *npy)
{
    if (npy->map)
        munmap(npy->map, npy->map_size);
    *npy = (struct ry_npy){0};
}

uint64_t ry_npy_get(const struct ry_npy *npy, size_t i)
{
    switch (npy->type) {
    case RY_NPY_U8:
        return ((const uint8_t *)npy->data)[i];
    case RY_NPY_U16:
        return ((const uint16_t *)npy->data)[i];
    case RY_NPY_U32:
        return ((const uint32_t *)npy->data)[i];
    case RY_NPY_U64:
        return ((const uint64_t *)npy->data)[i];
    case RY_NPY_I32: {
        int32_t v = ((const int32_t *)npy->data)[i];
        return v > 0 ? (uint64_t)v : 0;
    }
    case RY_NPY_I64: {
        int64_t v = ((const int64_t *)npy->data)[i];
        return v > 0 ? (uint64_t)v : 0;
    }
    case RY_NPY_F32:
    case RY_NPY_F64:
        break;
    }
    return 0;
}

static size_t elements(int ndim, const size_t *shape)
{
    size_t n = 1;
    for (int i = 0; i < ndim; i++)
        n *= shape[i];
    return n;
}

size_t ry_npy_file_bytes(enum ry_npy_type type, int ndim, const size_t *shape)
{
    return HEADER_BYTES + elements(ndim, shape) * types[type].bytes;
}

static int write_all(int fd, const void *data, size_t n)
{
    for (const char *p = data; n;) {
        ssize_t done = write(fd, p, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -1;
        p += done;
        n -= (size_t)done;
    }
    return 0;
}

void ry_npy_header(char h[HEADER_BYTES], enum ry_npy_type type, int ndim, const size_t *shape)
{
    memcpy(h, magic, sizeof magic);
    h[6] = 1;
    h[7] = 0;
    h[8] = (char)((HEADER_BYTES - 10) & 0xff);
    h[9] = (char)((HEADER_BYTES - 10) >> 8);
    int n = 10 + snprintf(h + 10, HEADER_BYTES - 10, "{'descr': '%c%s', 'fortran_order': False, 'shape': (",
                          types[type].bytes == 1 ? '|' : '<', types[type].descr);
    for (int i = 0; i < ndim; i++)
        n += snprintf(h + n, HEADER_BYTES - (size_t)n, "%s%zu%s", i ? ", " : "", shape[i], ndim == 1 ? "," : "");
    n += snprintf(h + n, HEADER_BYTES - (size_t)n, "), }");
    memset(h + n, ' ', HEADER_BYTES - (size_t)n);
    h[HEADER_BYTES - 1] = '\n';
}

int ry_npy_save(int dirfd, const char *path, enum ry_npy_type type, int ndim, const size_t *shape, const void *data,
                struct ry_err *err)
{
    char header[HEADER_BYTES], tmp[4096];
    if (ndim < 0 || ndim > RY_NPY_DIMS || snprintf(tmp, sizeof tmp, "%s.tmp", path) >= (int)sizeof tmp) {
        errno = EINVAL;
        return ry_fail(err, "%s: cannot be written: %s", path,
                       ndim > RY_NPY_DIMS ? "too many dimensions" : "the path is too long");
    }
    ry_npy_header(header, type, ndim, shape);
    int fd = openat(dirfd, tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    int bad = fd < 0 || write_all(fd, header, sizeof header) ||
              write_all(fd, data, elements(ndim, shape) * types[type].bytes);
    int saved = bad ? errno : 0;
    if (fd >= 0 && close(fd) && !saved)
        saved = errno;
    if (!saved && renameat(dirfd, tmp, dirfd, path))
        saved = errno;
    if (!saved)
        return 0;
    if (fd >= 0)
        unlinkat(dirfd, tmp, 0);
    ry_fail(err, "%s: cannot be written: %s", path, strerror(saved));
    errno = saved;
    return -1;
}
