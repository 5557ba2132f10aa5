/*
 * rows.c: scanning, packing and expanding: which kernel runs when, on what memory.
 *
 * Owns: the scanner's memory, the tables that kernels get, results on their way to the host. Not: the kernels (rows.cu;
 * for host memory rows_host.c).
 *
 * Tables go to the device as parameters of a small kernel, so nothing on the host must outlive a call. Results are
 * written by the last kernel to pinned memory, which stays with the process for good: taking it or giving it back may
 * wait for the device, and a kernel of a communicator that has gone may still write to it.
 */
#include "rows.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/log.h"
#include "plan/plan.h"
#include "rows_internal.h"

#define ALIGN 256
#define BEFORE (1 + sizeof(struct ry_rows_extremes) / sizeof(uint64_t))

_Static_assert(sizeof(struct ry_rows_put) <= 4096 && sizeof(struct ry_rows_expand) <= 4096 &&
                   sizeof(struct ry_rows_pack) <= 4096,
               "kernel parameters");
_Static_assert(sizeof(struct ry_rows_segment) % 8 == 0 && sizeof(struct ry_rows_node) % 8 == 0, "put as words");

/* Pinned memory, and when it may be used again. */
struct answers {
    struct answers *next;
    const struct ry_device *device;
    struct ry_event *used;
    int nnodes;
    volatile uint64_t *word; /* [BEFORE + RY_ROWS_ANSWERS nnodes]: errors, extremes, distinct, zero, … */
};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct answers *idle;

struct ry_rows {
    const struct ry_device *device;
    int nranks, nnodes;
    int *node;     /* [nranks] */
    int *by_node;  /* [nranks]: the ranks, node after node */
    int *first_of; /* [nnodes + 1]: where each node's begin in it */
    struct answers *answers;
    uint64_t errors_seen;
    unsigned blocks;        /* of a launch, at most */
    struct ry_event *found; /* after the last scan */
    bool used, scanned;
    uint64_t *host;   /* the tables: pending counter, nodes, segments */
    uint64_t *nrows;  /* [nnodes]: of the last scan */
    uint64_t *before; /* [nranks]: rows of ranks below, while tables are laid out */
    uint64_t *copies; /* [RY_ROWS_ANSWERS][nnodes]: the answers, for the caller */
    bool known;       /* they are there */
    bool counted;     /* copies of rows as well */
    int parts;        /* of the last scan */
    void *memory;
    uint64_t capacity, held;  /* rows, bytes */
    struct ry_rows_scan scan; /* of the last scan; addresses from ry_rows_grow() */
};

static size_t table_words(const struct ry_rows *rows)
{
    return 1 + (size_t)rows->nnodes * sizeof(struct ry_rows_node) / 8 +
           RY_ROWS_PARTS * (size_t)rows->nranks * sizeof(struct ry_rows_segment) / 8;
}

/* ---- life ---- */

static struct answers *take_answers(const struct ry_device *device, int nnodes, struct ry_err *err)
{
    struct answers *a;
    pthread_mutex_lock(&lock);
    for (struct answers **at = &idle; (a = *at); at = &a->next) {
        bool done = false;
        if (a->device == device && a->nnodes >= nnodes && !device->event_done(a->used, &done, NULL) && done) {
            *at = a->next;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    if (a)
        return a;
    if (!(a = calloc(1, sizeof *a))) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    void *word = NULL;
    if (device->event_create_untimed(&a->used, err)) {
        free(a);
        return NULL;
    }
    if (device->pinned_alloc(&word, (BEFORE + RY_ROWS_ANSWERS * (size_t)nnodes) * sizeof *a->word, err)) {
        device->event_destroy(a->used);
        free(a);
        return NULL;
    }
    a->device = device;
    a->nnodes = nnodes;
    a->word = word;
    return a;
}

static void give_memory_back(struct ry_rows *rows)
{
    struct ry_err why;
    if (rows->memory && rows->device->free_after(rows->memory, rows->answers->used, &why))
        ry_info("the memory of a row scanner is lost: %s", why.msg);
    rows->memory = NULL;
    rows->capacity = rows->held = 0;
}

void ry_rows_free(struct ry_rows *rows)
{
    if (!rows)
        return;
    give_memory_back(rows);
    if (rows->answers) {
        pthread_mutex_lock(&lock);
        rows->answers->next = idle;
        idle = rows->answers;
        pthread_mutex_unlock(&lock);
    }
    if (rows->found)
        rows->device->event_destroy(rows->found);
    free(rows->node);
    free(rows->by_node);
    free(rows->first_of);
    free(rows->host);
    free(rows->nrows);
    free(rows->before);
    free(rows->copies);
    free(rows);
}

struct ry_rows *ry_rows_new(const struct ry_device *device, int ordinal, int nranks, int nnodes, const int *node,
                            struct ry_err *err)
{
    struct ry_rows *rows = calloc(1, sizeof *rows);
    if (!rows) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    rows->device = device;
    rows->nnodes = -1;
    if (!device->prepare(ordinal, &rows_kernels, err) && !device->prepare(ordinal, &sums_kernels, err) &&
        !device->event_create_untimed(&rows->found, err))
        rows->answers = take_answers(device, nnodes > RY_ROWS_NODES ? nnodes : RY_ROWS_NODES, err);
    if (!rows->answers || ry_rows_layout(rows, nranks, nnodes, node, err)) {
        ry_rows_free(rows);
        return NULL;
    }
    memset((void *)(uintptr_t)rows->answers->word, 0,
           (BEFORE + RY_ROWS_ANSWERS * (size_t)nnodes) * sizeof *rows->answers->word);
    ry_rows_for_tests(rows, ~UINT64_C(0), ~UINT64_C(0), 0);
    return rows;
}

int ry_rows_layout(struct ry_rows *rows, int nranks, int nnodes, const int *node, struct ry_err *err)
{
    if (nranks == rows->nranks && nnodes == rows->nnodes &&
        (!nranks || !memcmp(node, rows->node, (size_t)nranks * sizeof *node)))
        return 0;
    if (nnodes > rows->answers->nnodes)
        return ry_fail(err, "%d nodes are more than the %d that a scan is made for", nnodes, rows->answers->nnodes);
    for (int r = 0; r < nranks; r++)
        if (node[r] < 0 || node[r] >= nnodes)
            return ry_fail(err, "rank %d is on node %d of %d", r, node[r], nnodes);
    struct ry_rows to = {.nranks = nranks, .nnodes = nnodes};
    to.node = calloc((size_t)nranks + 1, sizeof *to.node);
    to.by_node = calloc((size_t)nranks + 1, sizeof *to.by_node);
    to.first_of = calloc((size_t)nnodes + 1, sizeof *to.first_of);
    to.host = calloc(table_words(&to), sizeof *to.host);
    to.nrows = calloc((size_t)nnodes + 1, sizeof *to.nrows);
    to.before = calloc((size_t)nranks + 1, sizeof *to.before);
    to.copies = calloc(RY_ROWS_ANSWERS * (size_t)nnodes + 1, sizeof *to.copies);
    bool have = to.node && to.by_node && to.first_of && to.host && to.nrows && to.before && to.copies;
    /* Those in use go, or, if there is no memory for new ones, the new ones. */
    int **own[] = {&rows->node, &rows->by_node, &rows->first_of}, *new[] = {to.node, to.by_node, to.first_of};
    uint64_t **own64[] = {&rows->host, &rows->nrows, &rows->before, &rows->copies};
    uint64_t *new64[] = {to.host, to.nrows, to.before, to.copies};
    for (int i = 0; i < 3; i++) {
        free(have ? *own[i] : new[i]);
        if (have)
            *own[i] = new[i];
    }
    for (int i = 0; i < 4; i++) {
        free(have ? *own64[i] : new64[i]);
        if (have)
            *own64[i] = new64[i];
    }
    if (!have)
        return ry_fail(err, "out of memory for %d ranks", nranks);
    give_memory_back(rows); /* its tables have other sizes */
    rows->nranks = nranks;
    rows->nnodes = nnodes;
    rows->scanned = false;
    for (int r = 0; r < nranks; r++) {
        rows->node[r] = node[r];
        rows->first_of[node[r] + 1]++;
    }
    for (int n = 0; n < nnodes; n++)
        rows->first_of[n + 1] += rows->first_of[n];
    for (int r = 0; r < nranks; r++) /* first_of is off by what is filled in, for now */
        rows->by_node[rows->first_of[node[r]]++] = r;
    for (int n = nnodes; n > 0; n--)
        rows->first_of[n] = rows->first_of[n - 1];
    rows->first_of[0] = 0;
    return 0;
}

void ry_rows_for_tests(struct ry_rows *rows, uint64_t sample_mask, uint64_t full_mask, unsigned blocks)
{
    rows->blocks = blocks ? blocks : RY_ROWS_GRID;
    rows->scan.sample_mask = sample_mask;
    rows->scan.full_mask = full_mask;
}

uint64_t ry_rows_capacity(const struct ry_rows *rows)
{
    return rows->capacity;
}

int rows_enter(struct ry_rows *rows, void *stream, struct ry_err *err)
{
    return rows->used ? rows->device->stream_wait(stream, rows->answers->used, err) : 0;
}

int rows_leave(struct ry_rows *rows, void *stream, struct ry_err *err)
{
    rows->used = true;
    return rows->device->event_record(rows->answers->used, stream, err);
}

static uint64_t round_up(uint64_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

/* The least power of 2 that is not below n. */
static uint64_t power_of_2(uint64_t n)
{
    uint64_t p = 1;
    while (p < n)
        p *= 2;
    return p;
}

static size_t most_tiles(const struct ry_rows *rows)
{
    return rows->nnodes > (int)RY_ROWS_TILES ? (size_t)rows->nnodes : RY_ROWS_TILES;
}

static uint64_t capacity_for(uint64_t nrows)
{
    return nrows ? (nrows + 1023) / 1024 * 1024 : 1024;
}

/* Where what lies in memory from `base` on, with room for `capacity` rows. Returns the bytes in all. */
static uint64_t divide(const struct ry_rows *rows, uint64_t capacity, uint64_t base, struct ry_rows_scan *s)
{
    const struct {
        uint64_t *address, bytes;
    } parts[] = {
        {&s->npending, table_words(rows) * 8},
        {&s->table, power_of_2(2 * capacity) * sizeof(struct ry_rows_slot)},
        {&s->where, capacity * 4},
        {&s->index, capacity * 4},
        {&s->order, capacity * 4},
        {&s->state, capacity},
        {&s->tiles, most_tiles(rows) * 8},
    };
    uint64_t at = base;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].address = at;
        at += round_up(parts[i].bytes);
    }
    s->nodes = s->npending + 8;
    s->segments = s->nodes + (uint64_t)rows->nnodes * sizeof(struct ry_rows_node);
    return at - base;
}

uint64_t ry_rows_memory(const struct ry_rows *rows, uint64_t nrows)
{
    struct ry_rows_scan s;
    return divide(rows, capacity_for(nrows), 0, &s);
}

uint64_t ry_rows_held(const struct ry_rows *rows)
{
    return rows->held;
}

int ry_rows_grow(struct ry_rows *rows, uint64_t nrows, void *stream, struct ry_err *err)
{
    const struct ry_device *device = rows->device;
    struct ry_err lost;
    if (nrows <= rows->capacity && rows->memory)
        return 0;
    if (nrows > RY_ROWS_MOST)
        return ry_fail(err, "%llu rows are beyond the %llu of a scan", (unsigned long long)nrows,
                       (unsigned long long)RY_ROWS_MOST);
    if (rows_enter(rows, stream, err))
        return -1;
    uint64_t capacity = capacity_for(nrows), bytes = ry_rows_memory(rows, nrows);
    void *memory;
    if (device->alloc_async(&memory, bytes, stream, err))
        return -1;
    if (rows->memory && device->free_async(rows->memory, stream, &lost))
        ry_info("the memory of a row scanner is lost: %s", lost.msg);
    divide(rows, capacity, (uint64_t)(uintptr_t)memory, &rows->scan);
    rows->memory = memory;
    rows->capacity = capacity;
    rows->held = bytes;
    rows->scanned = false;
    return rows_leave(rows, stream, err);
}

/* ---- scan ---- */

int rows_launch(const struct ry_rows *rows, struct ry_kernel *kernel, uint64_t threads, const void *param, void *stream,
                struct ry_err *err)
{
    uint64_t blocks = (threads + RY_ROWS_BLOCK - 1) / RY_ROWS_BLOCK;
    return rows->device->launch(kernel, blocks < rows->blocks ? (unsigned)blocks : rows->blocks, RY_ROWS_BLOCK, param,
                                stream, err);
}

/* The tables of `n` words, and `fill` bytes of ones for the scan's hash table. */
static int put(const struct ry_rows *rows, const struct ry_rows_scan *s, size_t n, uint64_t fill, void *stream,
               struct ry_err *err)
{
    struct ry_rows_put p = {.fill = s->table, .nfill = fill / 16};
    for (size_t done = 0; done < n; done += p.n, p.nfill = 0) {
        p.n = n - done < RY_ROWS_PUT ? n - done : RY_ROWS_PUT;
        p.to = s->npending + done * 8;
        memcpy(p.word, rows->host + done, p.n * 8);
        if (rows_launch(rows, &rows_put, p.n > p.nfill ? p.n : p.nfill, &p, stream, err))
            return -1;
    }
    return 0;
}

/* As few threads as have all of a row under way at once: a warp then waits for several rows together. */
uint32_t rows_lanes_for(uint64_t row_bytes)
{
    uint64_t words = (row_bytes + 15) / 16, all = (words + RY_ROWS_DEEP - 1) / RY_ROWS_DEEP;
    if (all < 4) /* threads side by side should still reach whole lines of memory */
        all = words < 4 ? words : 4;
    return all >= 32 ? 32 : (uint32_t)power_of_2(all);
}

/* Part `p` of what goes to a rank: address and size. */
static struct ry_rows_segment part_of(const void *send, uint64_t bytes, uint64_t row_bytes, int p, int parts)
{
    uint64_t rows = ry_rows_of(bytes, row_bytes), from = ry_part_at(rows, p, parts),
             to = ry_part_at(rows, p + 1, parts), begin = from == rows ? bytes : from * row_bytes,
             end = to == rows ? bytes : to * row_bytes;
    return (struct ry_rows_segment){.at = (uint64_t)(uintptr_t)send + from * row_bytes, .bytes = end - begin};
}

/* Fill the tables and what depends on them. Returns the words of the tables. */
static size_t lay_out(struct ry_rows *rows, struct ry_rows_scan *s, const struct ry_rows_input *in)
{
    struct ry_rows_node *node = (struct ry_rows_node *)(rows->host + 1);
    struct ry_rows_segment *segment = (struct ry_rows_segment *)(node + rows->nnodes);
    uint64_t most = 0, before = 0;
    int parts = in->parts > 1 ? in->parts : 1;
    for (int r = 0; r < rows->nranks; r++) {
        rows->before[r] = before;
        before += ry_rows_of(in->send_bytes[r], in->row_bytes);
    }
    rows->host[0] = 0; /* none pending */
    s->nrows = 0;
    s->nsegments = 0;
    for (int n = 0; n < rows->nnodes; n++) {
        bool scan = !in->scan_node || in->scan_node[n];
        node[n] = (struct ry_rows_node){.first_row = s->nrows};
        for (int p = 0; p < parts; p++) {
            if (p)
                node[n].part[p - 1] = s->nrows - node[n].first_row;
            for (int i = rows->first_of[n]; i < rows->first_of[n + 1] && scan; i++) {
                int r = rows->by_node[i];
                struct ry_rows_segment is = part_of(in->send[r], in->send_bytes[r], in->row_bytes, p, parts);
                if (!is.bytes)
                    continue;
                is.first_row = s->nrows;
                is.node = (uint64_t)n;
                is.told = rows->before[r] + ry_part_at(ry_rows_of(in->send_bytes[r], in->row_bytes), p, parts);
                segment[s->nsegments++] = is;
                s->nrows += ry_rows_of(is.bytes, in->row_bytes);
            }
        }
        node[n].rows = s->nrows - node[n].first_row;
        for (int p = parts; p < (int)RY_ROWS_PARTS; p++)
            node[n].part[p - 1] = node[n].rows;
        most = node[n].rows > most ? node[n].rows : most;
    }
    uint64_t tiles = rows->nnodes ? RY_ROWS_TILES / (uint64_t)rows->nnodes : 1, wanted = (most + 255) / 256;
    tiles = wanted < tiles ? wanted : tiles;
    s->tiles_per_node = tiles ? (uint32_t)tiles : 1;
    s->row_bytes = in->row_bytes;
    s->nnodes = (uint32_t)rows->nnodes;
    s->lanes = rows_lanes_for(in->row_bytes);
    s->batch = 32 / s->lanes;
    while (s->batch < 32 && s->nrows > (uint64_t)s->batch * (RY_ROWS_BLOCK / 32) * rows->blocks)
        s->batch *= 2;
    s->table_bits = 1;
    while ((UINT64_C(1) << s->table_bits) < 2 * s->nrows)
        s->table_bits++;
    return 1 + (size_t)((uint64_t *)(segment + s->nsegments) - (uint64_t *)node);
}

/* What the table and the tiles were for is over by then. */
static int count_copies(struct ry_rows *rows, const struct ry_rows_scan *s, void *stream, struct ry_err *err)
{
    void *table = (void *)(uintptr_t)s->table, *extremes = (void *)(uintptr_t)s->tiles;
    return rows->device->fill(extremes, 0, sizeof(struct ry_rows_extremes), stream, err) ||
                   (s->nrows && (rows->device->fill(table, 0, s->nrows * sizeof(uint32_t), stream, err) ||
                                 rows_launch(rows, &rows_tally, s->nrows, s, stream, err) ||
                                 rows_launch(rows, &rows_extremes, s->nrows, s, stream, err))) ||
                   rows->device->copy((void *)(uintptr_t)(rows->answers->word + 1), extremes,
                                      sizeof(struct ry_rows_extremes), stream, err)
               ? -1
               : 0;
}

/* Where `told` has found how often rows of these buffers occur: nothing, if it was not these, or not asked that. */
static bool tell(struct ry_rows_scan *s, const struct ry_rows *told, const struct ry_rows_input *in)
{
    s->told_where = s->told_times = s->told_extremes = s->told_rows = 0;
    s->copies = in->copies ? in->times : 0;
    if (!told || !told->counted || told->scan.copies < 2 || told->scan.row_bytes != in->row_bytes || told->nnodes != 1 ||
        told->parts != 1 || !ry_rows_scanned(told, 0, in->send, in->send_bytes))
        return false;
    s->told_where = told->scan.where;
    s->told_times = told->scan.table;
    s->told_extremes = told->scan.tiles;
    s->told_rows = told->scan.nrows;
    s->copies = told->scan.copies;
    return true;
}

int ry_rows_scan(struct ry_rows *rows, const struct ry_rows_input *in, void *stream, struct ry_err *err)
{
    struct ry_rows_scan s = rows->scan;
    if (!in->row_bytes)
        return ry_fail(err, "rows of no bytes");
    if (in->parts < 0 || in->parts > (int)RY_ROWS_PARTS)
        return ry_fail(err, "%d parts are more than %u", in->parts, RY_ROWS_PARTS);
    size_t words = lay_out(rows, &s, in);
    if (!rows->memory || s.nrows > rows->capacity)
        return ry_fail(err, "%llu rows are more than the %llu that there is memory for", (unsigned long long)s.nrows,
                       (unsigned long long)rows->capacity);
    s.found = (uint64_t)(uintptr_t)(rows->answers->word + BEFORE);
    rows->scanned = false;
    uint64_t tiles = (uint64_t)s.nnodes * s.tiles_per_node;
    uint64_t table = s.nrows ? sizeof(struct ry_rows_slot) << s.table_bits : 0;
    bool told = tell(&s, in->told, in);
    if (rows_enter(rows, stream, err) || (told && rows_enter(in->told, stream, err)) ||
        put(rows, &s, words, table, stream, err))
        return -1;
    if (s.nrows && (rows_launch(rows, &rows_sample, s.nrows * RY_ROWS_SAMPLE, &s, stream, err) ||
                    rows_launch(rows, &rows_compare, (s.nrows + s.batch - 1) / s.batch * 32, &s, stream, err) ||
                    rows_launch(rows, &rows_recompare, s.nrows * s.lanes, &s, stream, err) ||
                    rows_launch(rows, &rows_count, tiles * 32, &s, stream, err)))
        return -1;
    if (rows_launch(rows, &rows_number, tiles * 32, &s, stream, err) ||
        (in->copies && count_copies(rows, &s, stream, err)) || rows->device->event_record(rows->found, stream, err) ||
        rows_leave(rows, stream, err) || (told && rows_leave(in->told, stream, err)))
        return -1;
    rows->scan = s;
    rows->scanned = true;
    rows->known = false;
    rows->counted = in->copies;
    rows->parts = in->parts > 1 ? in->parts : 1;
    for (int n = 0; n < rows->nnodes; n++)
        rows->nrows[n] = ((struct ry_rows_node *)(rows->host + 1))[n].rows;
    return 0;
}

bool ry_rows_found_ready(struct ry_rows *rows)
{
    bool done = false;
    return rows->scanned && !rows->device->event_done(rows->found, &done, NULL) && done;
}

int ry_rows_found_wait(struct ry_rows *rows, struct ry_rows_found *found, struct ry_err *err)
{
    if (!rows->scanned)
        return ry_fail(err, "nothing was scanned");
    uint64_t begun = ry_now_ns();
    for (bool done = false;;) {
        if (rows->device->event_done(rows->found, &done, err))
            return -1;
        if (done)
            break;
        if (ry_now_ns() - begun < 100000)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    for (int i = 0; i < (int)RY_ROWS_ANSWERS * rows->nnodes; i++)
        rows->copies[i] = rows->answers->word[BEFORE + (size_t)i];
    const struct ry_rows_node *node = (const struct ry_rows_node *)(rows->host + 1);
    for (int n = 0; n < rows->nnodes; n++)
        for (int k = 0; k < (int)RY_ROWS_PARTS - 1; k++)
            if (node[n].part[k] == node[n].rows) /* nothing is beyond */
                rows->copies[(2 + k) * rows->nnodes + n] = rows->copies[n];
    rows->known = true;
    struct ry_rows_extremes extremes;
    memcpy(&extremes, (const void *)(uintptr_t)(rows->answers->word + 1), sizeof extremes);
    *found = (struct ry_rows_found){.rows = rows->nrows,
                                    .distinct = rows->copies,
                                    .zero = rows->copies + rows->nnodes,
                                    .early = rows->copies + 2 * rows->nnodes};
    if (rows->counted && extremes.most) {
        found->most = extremes.most;
        found->least = ~extremes.not_least;
        found->odd = extremes.odd;
        found->many = extremes.many;
    }
    return 0;
}

/* ---- messages ---- */

bool ry_rows_scanned(const struct ry_rows *rows, int node, const void *const *send, const uint64_t *send_bytes)
{
    if (!rows->scanned || node < 0 || node >= rows->nnodes)
        return false;
    const struct ry_rows_node *nodes = (const struct ry_rows_node *)(rows->host + 1);
    const struct ry_rows_segment *all = (const struct ry_rows_segment *)(nodes + rows->nnodes);
    uint32_t low = 0, high = rows->scan.nsegments; /* the first segment that is not of an earlier node */
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (all[middle].node < (uint64_t)node)
            low = middle + 1;
        else
            high = middle;
    }
    int size = rows->first_of[node + 1] - rows->first_of[node];
    for (int i = 0; i < rows->parts * size; i++) {
        int r = rows->by_node[rows->first_of[node] + i % size];
        struct ry_rows_segment is = part_of(send[r], send_bytes[r], rows->scan.row_bytes, i / size, rows->parts);
        if (!is.bytes)
            continue;
        if (low >= rows->scan.nsegments || all[low].node != (uint64_t)node || all[low].bytes != is.bytes ||
            all[low].at != is.at)
            return false;
        low++;
    }
    return low >= rows->scan.nsegments || all[low].node != (uint64_t)node;
}

uint64_t ry_rows_message_bytes(uint64_t row_bytes, uint64_t distinct, uint64_t nrows)
{
    unsigned __int128 bytes = (unsigned __int128)row_bytes * distinct;
    bytes = (bytes + 15) / 16 * 16 + (unsigned __int128)nrows * sizeof(uint32_t);
    return bytes > UINT64_MAX ? UINT64_MAX : (uint64_t)bytes;
}

static uint64_t chunks_of(uint64_t row_bytes)
{
    return (row_bytes + RY_ROWS_CHUNK - 1) / RY_ROWS_CHUNK;
}

static int pack_some(struct ry_rows *rows, struct ry_rows_pack *p, void *stream, struct ry_err *err)
{
    uint64_t units = p->first_distinct[p->n] * chunks_of(p->scan.row_bytes) * p->scan.lanes, list = p->first_row[p->n];
    int rc = p->n ? rows_launch(rows, &rows_pack, units > list ? units : list, p, stream, err) : 0;
    p->n = 0;
    return rc;
}

int ry_rows_pack(struct ry_rows *rows, const struct ry_rows_packing *packings, int n, void *stream, struct ry_err *err)
{
    struct ry_rows_pack p = {.scan = rows->scan, .n = 0};
    for (int i = 0; i < n; i++) {
        if (!rows->scanned || packings[i].node < 0 || packings[i].node >= rows->nnodes)
            return ry_fail(err, "nothing was found for node %d", packings[i].node);
        if ((uintptr_t)packings[i].message % 16)
            return ry_fail(err, "a message at %p, which is no multiple of 16", packings[i].message);
    }
    if (rows_enter(rows, stream, err))
        return -1;
    for (int i = 0; i < n; i++) {
        uint32_t node = (uint32_t)packings[i].node, nrows = (uint32_t)rows->nrows[node];
        if (!nrows)
            continue;
        if ((p.n == RY_ROWS_PACKS || UINT32_MAX - p.first_row[p.n] < nrows) && pack_some(rows, &p, stream, err))
            return -1;
        p.node[p.n] = node;
        p.message[p.n] = (uint64_t)(uintptr_t)packings[i].message;
        p.first_row[p.n + 1] = p.first_row[p.n] + nrows;
        p.first_distinct[p.n + 1] = p.first_distinct[p.n] + (rows->known ? (uint32_t)rows->copies[node] : nrows);
        p.n++;
    }
    return pack_some(rows, &p, stream, err) ? -1 : rows_leave(rows, stream, err);
}

static int expand_some(struct ry_rows *rows, struct ry_rows_expand *e, void *stream, struct ry_err *err)
{
    uint64_t units = e->first_row[e->n] * chunks_of(e->row_bytes);
    int rc = e->n ? rows_launch(rows, &rows_expand, units * e->lanes, e, stream, err) : 0;
    e->n = 0;
    return rc;
}

int ry_rows_expand(struct ry_rows *rows, const struct ry_rows_piece *pieces, int n, void *stream, struct ry_err *err)
{
    struct ry_rows_expand e = {.errors = rows_errors_at(rows)};
    for (int i = 0; i < n; i++) {
        const struct ry_rows_piece *p = &pieces[i];
        if (!p->row_bytes)
            return ry_fail(err, "rows of no bytes");
        if ((uintptr_t)p->message % 16)
            return ry_fail(err, "a message at %p, which is no multiple of 16", p->message);
        if (ry_rows_of(p->bytes, p->row_bytes) > RY_ROWS_MOST || p->skip > RY_ROWS_MOST || p->distinct > RY_ROWS_MOST)
            return ry_fail(err, "piece %d: a message of more than %llu rows", i, (unsigned long long)RY_ROWS_MOST);
    }
    if (rows_enter(rows, stream, err))
        return -1;
    for (int i = 0; i < n; i++) {
        const struct ry_rows_piece *p = &pieces[i];
        uint32_t count = (uint32_t)ry_rows_of(p->bytes, p->row_bytes);
        if (!count)
            continue;
        if ((e.n == RY_ROWS_PIECES || UINT32_MAX - e.first_row[e.n] < count || e.row_bytes != p->row_bytes) &&
            expand_some(rows, &e, stream, err))
            return -1;
        e.row_bytes = p->row_bytes;
        e.lanes = rows_lanes_for(p->row_bytes);
        e.message[e.n] = (uint64_t)(uintptr_t)p->message;
        e.distinct[e.n] = (uint32_t)p->distinct;
        e.skip[e.n] = (uint32_t)p->skip;
        e.to[e.n] = (uint64_t)(uintptr_t)p->to;
        e.bytes[e.n] = p->bytes;
        e.first_row[e.n + 1] = e.first_row[e.n] + count;
        e.n++;
    }
    return expand_some(rows, &e, stream, err) ? -1 : rows_leave(rows, stream, err);
}

const struct ry_device *rows_device(const struct ry_rows *rows)
{
    return rows->device;
}

uint64_t rows_errors_at(const struct ry_rows *rows)
{
    return (uint64_t)(uintptr_t)rows->answers->word;
}

uint64_t ry_rows_expand_errors(struct ry_rows *rows)
{
    uint64_t now = *rows->answers->word, more = now - rows->errors_seen;
    rows->errors_seen = now;
    return more;
}
