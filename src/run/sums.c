/*
 * sums.c: keeping the lists of packed messages and adding up rows by them: which kernel runs when, on what memory, and
 * the twins of sums.cu's kernels for host memory, written so that they are easy to believe.
 */
#include "sums.h"

#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "rows_internal.h"
#include "sums_kernels.h"

#define ALIGN 256

_Static_assert(sizeof(struct ry_sums_keep) <= 4096 && sizeof(struct ry_sums_add) <= 4096, "kernel parameters");

struct ry_sums {
    const struct ry_device *device;
    struct ry_event *used; /* after the last use of the memory */
    void *memory;          /* NULL: no rows */
    struct ry_sums_lists lists;
    int n;
    struct kept {
        uint32_t first_row, first_distinct, rows, distinct;
        uint64_t row_bytes;
    } of[]; /* [n] */
};

/* ---- the kernels, for host memory ---- */

#define HOST(type, address) ((type *)(uintptr_t)(address))

static void host_list(const void *param)
{
    const struct ry_sums_keep *s = param;
    for (uint32_t k = 0; k < s->n; k++)
        for (uint32_t row = 0; row < s->first_row[k + 1] - s->first_row[k]; row++) {
            uint32_t d = HOST(const uint32_t, s->list[k])[row];
            HOST(uint32_t, s->lists.index)[s->first_row[k] + row] = d;
            if (d < s->first_distinct[k + 1] - s->first_distinct[k])
                HOST(uint32_t, s->lists.count)[s->first_distinct[k] + d]++;
            else
                ++*HOST(uint64_t, s->errors);
        }
}

static void host_place(const void *param)
{
    const struct ry_sums_keep *s = param;
    for (uint32_t d = s->first_distinct[0]; d < s->first_distinct[s->n]; d++) {
        HOST(uint32_t, s->lists.end)[d] = (uint32_t)*HOST(uint64_t, s->lists.placed);
        *HOST(uint64_t, s->lists.placed) += HOST(uint32_t, s->lists.count)[d];
    }
}

static void host_fill(const void *param)
{
    const struct ry_sums_keep *s = param;
    for (uint32_t k = 0; k < s->n; k++)
        for (uint32_t row = 0; row < s->first_row[k + 1] - s->first_row[k]; row++) {
            uint32_t d = HOST(const uint32_t, s->lists.index)[s->first_row[k] + row];
            if (d < s->first_distinct[k + 1] - s->first_distinct[k])
                HOST(uint32_t, s->lists.order)[HOST(uint32_t, s->lists.end)[s->first_distinct[k] + d]++] = row;
        }
}

/* They were put there in order. */
static void host_order(const void *param)
{
    (void)param;
}

static void sum_row(const struct ry_sums_add *s, const uint32_t *order, uint32_t n, const unsigned char *from,
                    unsigned char *to)
{
    uint32_t size = ry_sums_bytes(s->type);
    if (n == 1)
        memcpy(to, from + order[0] * s->row_bytes, s->row_bytes);
    for (uint64_t at = 0; at < s->row_bytes && n != 1; at += size) {
        float sum = 0;
        uint32_t bits = 0;
        for (uint32_t c = 0; c < n; c++) {
            memcpy(&bits, from + order[c] * s->row_bytes + at, size);
            sum = c ? sum + ry_sums_widen(s->type, bits) : ry_sums_widen(s->type, bits);
        }
        bits = n ? ry_sums_round(s->type, sum) : 0;
        memcpy(to + at, &bits, size);
    }
}

static void host_add(const void *param)
{
    const struct ry_sums_add *s = param;
    for (uint32_t k = 0; k < s->n; k++) {
        uint32_t distinct = s->first_unit[k + 1] - s->first_unit[k] - 1, rows = s->first_row[k + 1] - s->first_row[k];
        uint64_t list_at = ry_rows_list_at(s->row_bytes, distinct + 1);
        uint32_t *list = HOST(uint32_t, s->to[k] + list_at);
        unsigned char *to = HOST(unsigned char, s->to[k]);
        memset(to + distinct * s->row_bytes, 0, list_at - distinct * s->row_bytes);
        for (uint32_t row = 0; row < rows; row++)
            list[row] = distinct;
        for (uint32_t d = 0; d < distinct; d++) {
            uint32_t n = HOST(const uint32_t, s->lists.count)[s->kept_distinct[k] + d];
            const uint32_t *order =
                HOST(const uint32_t, s->lists.order) + HOST(const uint32_t, s->lists.end)[s->kept_distinct[k] + d] - n;
            sum_row(s, order, n, HOST(const unsigned char, s->from[k]), to + d * s->row_bytes);
            if (n)
                list[order[0]] = d;
        }
    }
}

static struct ry_kernel sums_list = {.name = "ry_list_rows", .host = host_list};
static struct ry_kernel sums_place = {.name = "ry_place_rows", .host = host_place};
static struct ry_kernel sums_fill = {.name = "ry_fill_rows", .host = host_fill};
static struct ry_kernel sums_order = {.name = "ry_order_rows", .host = host_order};
static struct ry_kernel sums_add = {.name = "ry_sum_rows", .host = host_add};

#ifdef RY_HAVE_FATBIN
extern const unsigned long long ry_sums_fatbin[]; /* made from sums.cu by nvcc */
#else
#define ry_sums_fatbin NULL
#endif

const struct ry_kernels sums_kernels = {
    .image = ry_sums_fatbin,
    .kernel = (struct ry_kernel *const[]){&sums_list, &sums_place, &sums_fill, &sums_order, &sums_add},
    .n = 5,
};

/* ---- lists ---- */

static uint64_t round_up(uint64_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

/* Where what lies in memory from `base` on. Returns the bytes in all. What begins as zeros comes first, *zeros bytes.
 */
static uint64_t divide(uint64_t rows, uint64_t distinct, uint64_t base, struct ry_sums_lists *lists, uint64_t *zeros)
{
    *zeros = round_up(sizeof(uint64_t)) + round_up(distinct * 4);
    lists->placed = base;
    lists->count = base + round_up(sizeof(uint64_t));
    lists->end = base + *zeros;
    lists->index = lists->end + round_up(distinct * 4);
    lists->order = lists->index + round_up(rows * 4);
    return lists->order + round_up(rows * 4) - base;
}

static bool total(const struct ry_sums_message *messages, int n, uint64_t *rows, uint64_t *distinct)
{
    *rows = *distinct = 0;
    for (int i = 0; i < n; i++) {
        *rows += messages[i].rows;
        *distinct += messages[i].distinct;
        if (messages[i].rows > RY_ROWS_MOST || messages[i].distinct > RY_ROWS_MOST || *rows > RY_ROWS_MOST ||
            *distinct > RY_ROWS_MOST)
            return false;
    }
    return true;
}

uint64_t ry_sums_memory(const struct ry_sums_message *messages, int n)
{
    uint64_t rows, distinct, zeros;
    struct ry_sums_lists lists;
    if (!total(messages, n, &rows, &distinct))
        return UINT64_MAX;
    return rows ? divide(rows, distinct, 0, &lists, &zeros) : 0;
}

static int keep_some(struct ry_rows *rows, struct ry_sums_keep *p, void *stream, struct ry_err *err)
{
    uint64_t nrows = p->first_row[p->n] - p->first_row[0], distinct = p->first_distinct[p->n] - p->first_distinct[0];
    p->errors = rows_errors_at(rows);
    return (nrows && rows_launch(rows, &sums_list, nrows, p, stream, err)) ||
                   (distinct && rows_launch(rows, &sums_place, distinct, p, stream, err)) ||
                   (nrows && rows_launch(rows, &sums_fill, nrows, p, stream, err)) ||
                   (distinct && rows_launch(rows, &sums_order, distinct, p, stream, err))
               ? -1
               : 0;
}

static int keep_all(struct ry_rows *rows, struct ry_sums *sums, const struct ry_sums_message *messages, void *stream,
                    struct ry_err *err)
{
    struct ry_sums_keep p = {.lists = sums->lists};
    for (int i = 0; i < sums->n; i++) {
        const struct kept *k = &sums->of[i];
        p.list[p.n] = (uint64_t)(uintptr_t)messages[i].message + ry_rows_list_at(k->row_bytes, k->distinct);
        p.first_row[p.n] = k->first_row;
        p.first_distinct[p.n] = k->first_distinct;
        p.n++;
        p.first_row[p.n] = k->first_row + k->rows;
        p.first_distinct[p.n] = k->first_distinct + k->distinct;
        if (p.n < RY_SUMS_MESSAGES && i + 1 < sums->n)
            continue;
        if (keep_some(rows, &p, stream, err))
            return -1;
        p.n = 0;
    }
    return 0;
}

struct ry_sums *ry_sums_keep(struct ry_rows *rows, const struct ry_sums_message *messages, int n, void *stream,
                             struct ry_err *err)
{
    const struct ry_device *device = rows_device(rows);
    uint64_t nrows, ndistinct, zeros;
    if (!total(messages, n, &nrows, &ndistinct)) {
        ry_fail(err, "more than %llu rows", (unsigned long long)RY_ROWS_MOST);
        return NULL;
    }
    for (int i = 0; i < n; i++)
        if ((uintptr_t)messages[i].message % 16) {
            ry_fail(err, "a message at %p, which is no multiple of 16", messages[i].message);
            return NULL;
        }
    struct ry_sums *sums = calloc(1, sizeof *sums + (size_t)n * sizeof *sums->of);
    if (!sums) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    sums->device = device;
    sums->n = n;
    for (int i = 0; i < n; i++) {
        struct kept *k = &sums->of[i];
        k->rows = (uint32_t)messages[i].rows;
        k->distinct = (uint32_t)messages[i].distinct;
        k->row_bytes = messages[i].row_bytes;
        if (i + 1 < n) {
            k[1].first_row = k->first_row + k->rows;
            k[1].first_distinct = k->first_distinct + k->distinct;
        }
    }
    if (!nrows)
        return sums;
    uint64_t bytes = divide(nrows, ndistinct, 0, &sums->lists, &zeros);
    if (device->event_create_untimed(&sums->used, err) || device->alloc_async(&sums->memory, bytes, stream, err)) {
        ry_sums_free(sums);
        return NULL;
    }
    divide(nrows, ndistinct, (uint64_t)(uintptr_t)sums->memory, &sums->lists, &zeros);
    int rc = rows_enter(rows, stream, err) || device->fill(sums->memory, 0, zeros, stream, err) ||
             keep_all(rows, sums, messages, stream, err);
    /* Even after a failure: what was enqueued may still use the memory. */
    if (device->event_record(sums->used, stream, rc ? NULL : err) || rows_leave(rows, stream, rc ? NULL : err) || rc) {
        ry_sums_free(sums);
        return NULL;
    }
    return sums;
}

void ry_sums_free(struct ry_sums *sums)
{
    struct ry_err why;
    if (!sums)
        return;
    if (sums->memory && sums->device->free_after(sums->memory, sums->used, &why))
        ry_info("the memory of lists of equal rows is lost: %s", why.msg);
    if (sums->used)
        sums->device->event_destroy(sums->used);
    free(sums);
}

/* ---- sums ---- */

uint64_t ry_sums_element(int type)
{
    return type < 0 ? 0 : ry_sums_bytes((uint32_t)type);
}

static int add_some(struct ry_rows *rows, struct ry_sums_add *p, void *stream, struct ry_err *err)
{
    uint64_t chunks = (p->row_bytes + RY_ROWS_CHUNK - 1) / RY_ROWS_CHUNK,
             work = p->first_unit[p->n] * chunks * p->lanes, list = p->first_row[p->n];
    int rc = p->n ? rows_launch(rows, &sums_add, work > list ? work : list, p, stream, err) : 0;
    p->n = 0;
    return rc;
}

int ry_sums_add(struct ry_rows *rows, struct ry_sums *sums, int type, const struct ry_sums_job *jobs, int n,
                void *stream, struct ry_err *err)
{
    struct ry_sums_add p = {.lists = sums->lists, .type = (uint32_t)type};
    uint64_t size = ry_sums_element(type);
    if (!size)
        return ry_fail(err, "elements of NCCL's type %d cannot be summed", type);
    for (int i = 0; i < n; i++) {
        if (jobs[i].message < 0 || jobs[i].message >= sums->n)
            return ry_fail(err, "message %d of %d that were kept", jobs[i].message, sums->n);
        uint64_t row_bytes = sums->of[jobs[i].message].row_bytes;
        if (!row_bytes || row_bytes % size)
            return ry_fail(err, "rows of %llu bytes are not whole elements", (unsigned long long)row_bytes);
        if ((uintptr_t)jobs[i].to % 16)
            return ry_fail(err, "a message at %p, which is no multiple of 16", jobs[i].to);
    }
    if (!sums->memory)
        return 0;
    if (sums->device->stream_wait(stream, sums->used, err) || rows_enter(rows, stream, err))
        return -1;
    int rc = 0;
    for (int i = 0; i < n && !rc; i++) {
        const struct kept *k = &sums->of[jobs[i].message];
        bool words = k->row_bytes % 16 == 0 && (uintptr_t)jobs[i].from % 16 == 0;
        if (!k->rows)
            continue;
        if (p.n == RY_SUMS_JOBS || (p.n && (p.row_bytes != k->row_bytes || p.words != words)) ||
            UINT32_MAX - p.first_row[p.n] < k->rows || UINT32_MAX - p.first_unit[p.n] < k->distinct + 1)
            rc = add_some(rows, &p, stream, err);
        p.row_bytes = k->row_bytes;
        p.words = words;
        p.lanes = rows_lanes_for(k->row_bytes);
        p.kept_row[p.n] = k->first_row;
        p.kept_distinct[p.n] = k->first_distinct;
        p.from[p.n] = (uint64_t)(uintptr_t)jobs[i].from;
        p.to[p.n] = (uint64_t)(uintptr_t)jobs[i].to;
        p.first_row[p.n + 1] = p.first_row[p.n] + k->rows;
        p.first_unit[p.n + 1] = p.first_unit[p.n] + k->distinct + 1;
        p.n++;
    }
    rc = rc || add_some(rows, &p, stream, err) ? -1 : 0;
    if (sums->device->event_record(sums->used, stream, rc ? NULL : err) || rows_leave(rows, stream, rc ? NULL : err))
        rc = -1;
    return rc;
}
