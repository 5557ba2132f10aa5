/*
 * scan.c: looking for equal rows in what an exchange sends to other nodes, and for how often they occur in all of it.
 *
 * Owns: the runner's scanners and their memory, which counts against the limit of the process as staging memory does;
 * what was found; telling of damage that expanding met. Not: how rows are found (rows.c), whether to look (the policy).
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "rows_kernels.h"

_Static_assert(RY_ROWS_PARTS == RY_CHUNKS, "messages have as many parts as there may be chunks");

void scan_prepare(struct ry_runner *r, int ordinal)
{
    struct ry_err why;
    r->rows = ry_rows_new(r->device, ordinal, 0, 0, NULL, &why);
    if (!r->rows)
        ry_info("equal rows cannot be looked for: %s", why.msg);
    else if (!(r->all_rows = ry_rows_new(r->device, ordinal, 0, 0, NULL, &why)))
        ry_info("how often rows occur cannot be told: %s", why.msg);
}

void scan_free(struct ry_runner *r)
{
    if (!r->rows)
        return;
    scan_damage(r);
    uint64_t held = ry_rows_held(r->rows) + (r->all_rows ? ry_rows_held(r->all_rows) : 0);
    ry_rows_free(r->rows);
    ry_rows_free(r->all_rows);
    ry_run_staging_unreserve(held);
    free(r->one_node);
    free(r->scan.repeats);
    free(r->scan.rows);
    free(r->scan.scan_node);
    r->rows = NULL;
}

bool ry_run_packs(const struct ry_runner *r)
{
    return r->rows;
}

bool scan_damage(struct ry_runner *r)
{
    uint64_t lost = r->rows ? ry_rows_expand_errors(r->rows) : 0;
    if (lost)
        ry_warn("%llu rows of messages between nodes could not be written out, since what tells which rows they equal "
                "was damaged on its way: results of this job's all-to-alls are wrong. Set RAILYARD=observe or "
                "RAILYARD_STRATEGY=hierarchical, and please report this",
                (unsigned long long)lost);
    return lost > 0;
}

/* The scanner for this map: another one than before only in tests. */
static int lay_out(struct ry_runner *r, const struct ry_cluster *map, struct ry_err *err)
{
    uint64_t held = ry_rows_held(r->rows);
    if (ry_rows_layout(r->rows, map->nranks, map->nnodes, map->node, err))
        return -1;
    ry_run_staging_unreserve(held - ry_rows_held(r->rows));
    if (r->scan.nnodes >= map->nnodes && r->scan.repeats)
        return 0;
    struct ry_repeats *repeats = realloc(r->scan.repeats, (size_t)map->nnodes * sizeof *repeats);
    if (repeats)
        r->scan.repeats = repeats;
    uint64_t *rows = realloc(r->scan.rows, (size_t)map->nnodes * sizeof *rows);
    if (rows)
        r->scan.rows = rows;
    bool *scan_node = realloc(r->scan.scan_node, (size_t)map->nnodes * sizeof *scan_node);
    if (scan_node)
        r->scan.scan_node = scan_node;
    if (!repeats || !rows || !scan_node)
        return ry_fail(err, "out of memory for %d nodes", map->nnodes);
    r->scan.nnodes = map->nnodes;
    return 0;
}

/* Room for `nrows` and some more, since sizes of exchanges differ a little, or at least for them. */
static int make_room(struct ry_rows *rows, uint64_t nrows, void *stream, struct ry_err *err)
{
    uint64_t had = ry_rows_held(rows);
    if (had && nrows <= ry_rows_capacity(rows))
        return 0;
    for (uint64_t want = nrows + nrows / 4;; want = nrows) {
        uint64_t more = ry_rows_memory(rows, want) - had;
        if (want <= RY_ROWS_MOST) {
            if (!ry_run_staging_reserve(more)) {
                ry_fail(
                    err,
                    "%llu bytes more are needed to look for equal rows, beyond what is left: raise RAILYARD_STAGING",
                    (unsigned long long)more);
            } else if (!ry_rows_grow(rows, want, stream, err)) {
                return 0;
            } else {
                ry_run_staging_unreserve(had + more - ry_rows_held(rows));
            }
        }
        if (want == nrows)
            return -1;
    }
}

int ry_run_scan(struct ry_runner *r, const struct ry_cluster *map, const struct ry_buffers *b, uint64_t row_bytes,
                int parts, struct ry_err *err)
{
    uint64_t nrows = 0;
    bool telling = r->telling;
    r->telling = false;
    r->scan.row_bytes = 0;
    r->scan.known = false;
    if (!r->rows)
        return ry_fail(err, "Railyard's kernels are not loaded");
    scan_damage(r);
    if (!row_bytes || map->nranks != b->nranks)
        return ry_fail(err, "rows of %llu bytes, a map of %d ranks for %d", (unsigned long long)row_bytes, map->nranks,
                       b->nranks);
    if (lay_out(r, map, err))
        return -1;
    memset(r->scan.scan_node, 0, (size_t)map->nnodes * sizeof *r->scan.scan_node);
    for (int p = 0; p < b->nranks; p++)
        if (b->send_bytes[p] && map->node[p] != map->node[b->rank]) {
            nrows += ry_rows_of(b->send_bytes[p], row_bytes);
            r->scan.scan_node[map->node[p]] = true;
            if (nrows > RY_ROWS_MOST)
                return ry_fail(err, "more than %llu rows of %llu bytes", (unsigned long long)RY_ROWS_MOST,
                               (unsigned long long)row_bytes);
        }
    if (make_room(r->rows, nrows, b->stream, err))
        return -1;
    struct ry_rows_input in = {.send = b->send,
                               .send_bytes = b->send_bytes,
                               .row_bytes = row_bytes,
                               .scan_node = r->scan.scan_node,
                               .parts = parts,
                               .told = telling ? r->all_rows : NULL};
    if (ry_rows_scan(r->rows, &in, b->stream, err))
        return -1;
    r->scan.row_bytes = row_bytes;
    r->scan.parts = parts > 1 ? (uint64_t)parts : 1;
    r->scan.own_node = map->node[b->rank];
    r->scan.count = map->nnodes;
    return 0;
}

bool ry_run_scan_over(struct ry_runner *r)
{
    return r->scan.row_bytes && ry_rows_found_ready(r->rows);
}

int ry_run_scan_wait(struct ry_runner *r, struct ry_repeats *repeats, struct ry_scan_sums *sums, struct ry_err *err)
{
    struct ry_rows_found found;
    if (!r->scan.row_bytes)
        return ry_fail(err, "nothing was searched for equal rows");
    if (ry_rows_found_wait(r->rows, &found, err))
        return -1;
    *sums = (struct ry_scan_sums){0, 0, 0};
    for (int n = 0; n < r->scan.count; n++) {
        bool own = n == r->scan.own_node;
        struct ry_repeats *is = &r->scan.repeats[n];
        *is = (struct ry_repeats){
            .row_bytes = own ? 0 : r->scan.row_bytes, .distinct = found.distinct[n], .parts = r->scan.parts};
        for (uint64_t k = 0; k + 1 < r->scan.parts; k++)
            is->early[k] = found.early[k * (size_t)r->scan.count + (size_t)n];
        r->scan.rows[n] = found.rows[n];
        sums->rows += found.rows[n];
        sums->distinct += found.distinct[n];
        sums->zero += found.zero[n];
    }
    memcpy(repeats, r->scan.repeats, (size_t)r->scan.count * sizeof *repeats);
    r->scan.known = true;
    return 0;
}

bool scan_says(const struct ry_runner *r, int node, struct ry_repeats repeats, uint64_t rows)
{
    return r->scan.known && node >= 0 && node < r->scan.count && repeats.row_bytes == r->scan.repeats[node].row_bytes &&
           repeats.distinct == r->scan.repeats[node].distinct && rows == r->scan.rows[node] &&
           ry_parts(&repeats) == ry_parts(&r->scan.repeats[node]);
}

/* ---- copies ---- */

/* All ranks on one node. */
static int one_node(struct ry_runner *r, int nranks, struct ry_err *err)
{
    if (nranks > r->one_node_ranks) {
        int *node = calloc((size_t)nranks, sizeof *node);
        if (!node)
            return ry_fail(err, "out of memory for %d ranks", nranks);
        free(r->one_node);
        r->one_node = node;
        r->one_node_ranks = nranks;
    }
    uint64_t held = ry_rows_held(r->all_rows);
    if (ry_rows_layout(r->all_rows, nranks, 1, r->one_node, err))
        return -1;
    ry_run_staging_unreserve(held - ry_rows_held(r->all_rows));
    return 0;
}

int ry_run_copies(struct ry_runner *r, const struct ry_buffers *b, uint64_t row_bytes, uint32_t times,
                  struct ry_err *err)
{
    uint64_t nrows = 0;
    r->counting = r->telling = false;
    if (!r->all_rows)
        return ry_fail(err, "Railyard's kernels are not loaded");
    if (!row_bytes)
        return ry_fail(err, "rows of no bytes");
    for (int p = 0; p < b->nranks; p++) {
        nrows += ry_rows_of(b->send_bytes[p], row_bytes);
        if (nrows > RY_ROWS_MOST)
            return ry_fail(err, "more than %llu rows of %llu bytes", (unsigned long long)RY_ROWS_MOST,
                           (unsigned long long)row_bytes);
    }
    struct ry_rows_input in = {.send = b->send, .send_bytes = b->send_bytes, .row_bytes = row_bytes, .copies = true, .times = times};
    if (one_node(r, b->nranks, err) || make_room(r->all_rows, nrows, b->stream, err) ||
        ry_rows_scan(r->all_rows, &in, b->stream, err))
        return -1;
    r->counting = r->telling = true;
    r->times = times;
    return 0;
}

bool ry_run_copies_over(struct ry_runner *r, struct ry_copies *copies)
{
    struct ry_rows_found found;
    if (!r->counting || !ry_rows_found_ready(r->all_rows) || ry_rows_found_wait(r->all_rows, &found, NULL))
        return false;
    *copies = (struct ry_copies){.rows = found.rows[0],
                                 .distinct = found.distinct[0],
                                 .zero = found.zero[0],
                                 .least = found.least,
                                 .most = found.most,
                                 .times = r->times,
                                 .apart = r->times > 1 && ry_rows_apart(found.odd, found.many, found.rows[0])};
    return true;
}
