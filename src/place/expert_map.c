/* expert_map.c: see expert_map.h. */
#include "place/expert_map.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/npy.h"

static bool ends_in(const char *path, const char *end)
{
    size_t n = strlen(path), m = strlen(end);
    return n > m && !strcmp(path + n - m, end);
}

void ry_expert_permutation(int *permutation, const int *expert_rank, int layers, int experts, int ranks)
{
    for (int l = 0; l < layers; l++, permutation += experts, expert_rank += experts) {
        int slot = 0;
        for (int r = 0; r < ranks; r++)
            for (int e = 0; e < experts; e++)
                if (expert_rank[e] == r)
                    permutation[slot++] = e;
    }
}

json_t *ry_expert_map_json(const int *expert_rank, int layers, int experts, int ranks)
{
    int *permutation = malloc((size_t)layers * (size_t)experts * sizeof *permutation);
    if (!permutation)
        return NULL;
    ry_expert_permutation(permutation, expert_rank, layers, experts, ranks);
    json_t *rows = json_array();
    for (int l = 0; l < layers; l++) {
        json_t *row = json_array();
        for (int e = 0; e < experts; e++)
            json_array_append_new(row, json_integer(permutation[l * experts + e]));
        json_array_append_new(rows, row);
    }
    free(permutation);
    return json_pack("{s:i, s:i, s:i, s:i, s:o}", "version", 1, "layers", layers, "experts", experts, "ranks", ranks,
                     "permutation", rows);
}

static int save_json(const char *path, json_t *map, struct ry_err *err)
{
    char part[4096];
    if (!map)
        return ry_fail(err, "%s: out of memory", path);
    if ((size_t)snprintf(part, sizeof part, "%s.tmp", path) >= sizeof part)
        return ry_fail(err, "%s: the name is too long", path);
    if (json_dump_file(map, part, JSON_COMPACT) || rename(part, path)) {
        unlink(part);
        return ry_fail(err, "%s: cannot be written: %m", path);
    }
    return 0;
}

int ry_expert_map_save(const char *path, const int *expert_rank, int layers, int experts, int ranks, struct ry_err *err)
{
    int rc;
    if (ends_in(path, ".json")) {
        json_t *map = ry_expert_map_json(expert_rank, layers, experts, ranks);
        rc = save_json(path, map, err);
        json_decref(map);
        return rc;
    }
    if (!ends_in(path, ".npy"))
        return ry_fail(err, "%s: name it .json or .npy, which says how the expert map is to be written", path);
    size_t shape[] = {(size_t)layers, (size_t)experts};
    int *permutation = malloc(shape[0] * shape[1] * sizeof *permutation);
    if (!permutation)
        return ry_fail(err, "%s: out of memory", path);
    ry_expert_permutation(permutation, expert_rank, layers, experts, ranks);
    rc = ry_npy_save(AT_FDCWD, path, RY_NPY_I32, 2, shape, permutation, err);
    free(permutation);
    return rc;
}

static int read_json(const char *path, long *out, int layers, int experts, int ranks, struct ry_err *err)
{
    json_error_t at;
    json_t *map = json_load_file(path, 0, &at), *rows;
    int version, l, e, r, rc = -1;
    if (!map)
        return ry_fail(err, "%s: line %d: %s", path, at.line, at.text);
    if (json_unpack_ex(map, &at, 0, "{s:i, s:i, s:i, s:i, s:o}", "version", &version, "layers", &l, "experts", &e,
                       "ranks", &r, "permutation", &rows))
        ry_fail(err, "%s: %s", path, at.text);
    else if (version != 1)
        ry_fail(err, "%s: version %d, this Railyard reads version 1", path, version);
    else if (l != layers || e != experts || r != ranks)
        ry_fail(err, "%s: for %d layers of %d experts on %d ranks; needed are %d layers of %d experts on %d ranks",
                path, l, e, r, layers, experts, ranks);
    else {
        rc = json_is_array(rows) && json_array_size(rows) == (size_t)layers ? 0 : -1;
        for (int i = 0; !rc && i < layers; i++) {
            json_t *row = json_array_get(rows, (size_t)i);
            if (!json_is_array(row) || json_array_size(row) != (size_t)experts)
                rc = -1;
            for (int j = 0; !rc && j < experts; j++) {
                json_t *number = json_array_get(row, (size_t)j);
                out[i * experts + j] = json_is_integer(number) ? (long)json_integer_value(number) : -1;
            }
        }
        if (rc)
            ry_fail(err, "%s: permutation is not %d lists of %d numbers", path, layers, experts);
    }
    json_decref(map);
    return rc;
}

static int read_npy(const char *path, long *out, int layers, int experts, struct ry_err *err)
{
    struct ry_npy npy;
    if (ry_npy_open(&npy, path, err))
        return -1;
    int rc = 0;
    if (npy.type != RY_NPY_I32 && npy.type != RY_NPY_I64)
        rc = ry_fail(err, "%s: holds %s, an expert map holds int32 or int64", path, ry_npy_type_name(npy.type));
    else if (npy.ndim != 2 || npy.shape[0] != (size_t)layers || npy.shape[1] != (size_t)experts)
        rc = ry_fail(err, "%s: an array of another shape than [%d layers][%d experts]", path, layers, experts);
    for (size_t i = 0; !rc && i < npy.count; i++)
        out[i] = npy.type == RY_NPY_I32 ? ((const int32_t *)npy.data)[i] : (long)((const int64_t *)npy.data)[i];
    ry_npy_close(&npy);
    return rc;
}

int ry_expert_map_slots(const char *path, int *permutation, int layers, int experts, int ranks, struct ry_err *err)
{
    if (layers < 1 || experts < 1 || ranks < 1 || experts % ranks)
        return ry_fail(err, "%s: %d ranks cannot hold equally many of %d experts", path, ranks, experts);
    size_t n = (size_t)layers * (size_t)experts;
    long *read = malloc(n * sizeof *read);
    int *seen = calloc(n, sizeof *seen), rc = -1;
    if (!read || !seen)
        ry_fail(err, "%s: out of memory", path);
    else
        rc = ends_in(path, ".json") ? read_json(path, read, layers, experts, ranks, err)
                                    : read_npy(path, read, layers, experts, err);
    for (int l = 0; !rc && l < layers; l++) {
        for (int slot = 0; !rc && slot < experts; slot++) {
            long e = read[l * experts + slot];
            if (e < 0 || e >= experts || seen[l * experts + e]++)
                rc = ry_fail(err, "%s: layer %d, slot %d: no permutation of the experts 0 to %d", path, l, slot,
                             experts - 1);
        }
    }
    for (size_t i = 0; !rc && i < n; i++)
        permutation[i] = (int)read[i];
    free(read);
    free(seen);
    return rc;
}

int ry_expert_map_open(const char *path, int *expert_rank, int layers, int experts, int ranks, struct ry_err *err)
{
    size_t n = (size_t)layers * (size_t)experts;
    int *permutation = malloc(n * sizeof *permutation);
    if (!permutation)
        return ry_fail(err, "%s: out of memory", path);
    int rc = ry_expert_map_slots(path, permutation, layers, experts, ranks, err);
    for (size_t i = 0; !rc && i < n; i++)
        expert_rank[i / (size_t)experts * (size_t)experts + (size_t)permutation[i]] =
            (int)(i % (size_t)experts) / (experts / ranks);
    free(permutation);
    return rc;
}
