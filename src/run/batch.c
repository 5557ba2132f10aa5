/*
 * batch.c: many small copies, comparisons or digests in one launch.
 *
 * Owns: collecting segments into the table of segments.h, launching the kernel of kernels.cu, and the kernels' twins
 * for host memory. Not: which segments depend on each other (the caller flushes in between).
 */
#include "internal.h"

#include <string.h>

#include "digest.h"

_Static_assert(sizeof(struct ry_segments) <= 4096, "a table fits into a kernel's parameters");
_Static_assert(RY_TILE == RY_BLOCK * 16 * 4, "kernels.cu gives each thread of a block four words of a tile");

static void host_copy_segments(const void *param)
{
    const struct ry_segments *t = param;
    for (uint32_t i = 0; i < t->n; i++)
        memmove((void *)(uintptr_t)t->a[i], (const void *)(uintptr_t)t->b[i], t->bytes[i]);
}

static void host_compare_segments(const void *param)
{
    const struct ry_segments *t = param;
    uint64_t *answer = (uint64_t *)(uintptr_t)t->answer;
    for (uint32_t i = 0; i < t->n; i++) {
        const unsigned char *a = (const void *)(uintptr_t)t->a[i], *b = (const void *)(uintptr_t)t->b[i];
        uint64_t at = 0, n = t->bytes[i], most = (UINT64_C(1) << RY_DIFFERENCE_BITS) - 1;
        if (!memcmp(a, b, n))
            continue;
        while (a[at] == b[at])
            at++;
        uint64_t difference = (uint64_t)t->tag[i] << RY_DIFFERENCE_BITS | (at < most ? at : most);
        if (difference < *answer)
            *answer = difference;
    }
}

static void host_digest_segments(const void *param)
{
    const struct ry_segments *t = param;
    uint64_t *answer = (uint64_t *)(uintptr_t)t->answer;
    for (uint32_t i = 0; i < t->n; i++) {
        const unsigned char *b = (const void *)(uintptr_t)t->b[i];
        uint64_t at = 0;
        for (; t->bytes[i] - at >= 16; at += 16) {
            uint64_t word[2];
            memcpy(word, b + at, sizeof word);
            ry_digest_word(answer, word[0], word[1], t->tag[i], at);
        }
        for (; at < t->bytes[i]; at++)
            ry_digest_byte(answer, b[at], t->tag[i], at);
    }
}

static struct ry_kernel copy_kernel = {.name = "ry_copy_segments", .host = host_copy_segments};
static struct ry_kernel compare_kernel = {.name = "ry_compare_segments", .host = host_compare_segments};
static struct ry_kernel digest_kernel = {.name = "ry_digest_segments", .host = host_digest_segments};

#ifdef RY_HAVE_FATBIN
extern const unsigned long long ry_run_fatbin[]; /* made from kernels.cu by nvcc */
#else
#define ry_run_fatbin NULL
#endif

const struct ry_kernels ry_run_kernels = {
    .image = ry_run_fatbin,
    .kernel = (struct ry_kernel *const[]){&copy_kernel, &compare_kernel, &digest_kernel},
    .n = 3,
};

static void start(struct batch *batch, const struct ry_runner *runner, void *stream, struct ry_kernel *kernel)
{
    batch->runner = runner;
    batch->stream = stream;
    batch->kernel = kernel;
    batch->table.n = 0;
    batch->table.first_tile[0] = 0;
    batch->table.answer = 0;
}

void batch_start_copy(struct batch *batch, const struct ry_runner *runner, void *stream)
{
    start(batch, runner, stream, &copy_kernel);
}

void batch_start_compare(struct batch *batch, const struct ry_runner *runner, void *stream, uint64_t *answer)
{
    start(batch, runner, stream, &compare_kernel);
    batch->table.answer = (uint64_t)(uintptr_t)answer;
}

void batch_start_digest(struct batch *batch, const struct ry_runner *runner, void *stream, uint64_t answer[2])
{
    start(batch, runner, stream, &digest_kernel);
    batch->table.answer = (uint64_t)(uintptr_t)answer;
}

int batch_flush(struct batch *batch, struct ry_err *err)
{
    struct ry_segments *t = &batch->table;
    const struct ry_device *device = batch->runner->device;
    uint32_t n = t->n, tiles = t->first_tile[n];
    t->n = 0;
    if (!n)
        return 0;
    /* One segment alone is what the driver's own copy is for; without kernels, all are. */
    if (batch->kernel == &copy_kernel && (n == 1 || !batch->runner->kernels)) {
        for (uint32_t i = 0; i < n; i++)
            if (device->copy((void *)(uintptr_t)t->a[i], (const void *)(uintptr_t)t->b[i], t->bytes[i], batch->stream,
                             err))
                return -1;
        return 0;
    }
    t->n = n;
    int rc = device->launch(batch->kernel, tiles < RY_GRID ? tiles : RY_GRID, RY_BLOCK, t, batch->stream, err);
    t->n = 0;
    return rc;
}

int batch_add(struct batch *batch, void *a, const void *b, uint64_t bytes, uint32_t tag, struct ry_err *err)
{
    struct ry_segments *t = &batch->table;
    if (!bytes)
        return 0;
    if (t->n == RY_SEGMENTS && batch_flush(batch, err))
        return -1;
    uint32_t i = t->n++;
    t->a[i] = (uint64_t)(uintptr_t)a;
    t->b[i] = (uint64_t)(uintptr_t)b;
    t->bytes[i] = bytes;
    t->tag[i] = tag;
    t->first_tile[i + 1] = t->first_tile[i] + (uint32_t)((t->a[i] % 16 + bytes + RY_TILE - 1) / RY_TILE);
    return 0;
}
