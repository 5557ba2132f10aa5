/*
 * test_kernels.c: the kernels of run/ against memmove() and memcmp(), at all alignments and around all sizes at which
 * they change their way, on every backend that this machine has. On a real GPU it also prints how fast they are beside
 * a plain copy, and does what takes more memory than a test here should; RY_TEST_SMALL=1 leaves that out, for
 * compute-sanitizer.
 */
#include <check.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "on_devices.h"
#include "rounds.h"
#include "run/digest.h"
#include "run/internal.h"

static struct ry_runner runner;
static void *stream;
static uint64_t seed;

static uint64_t draw(uint64_t below)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed % below;
}

static bool is_large_gpu(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    bool fake = lib && dlsym(lib, "fake_cuda_depth");
    if (lib)
        dlclose(lib);
    return device != ry_device_host() && !fake && !getenv("RY_TEST_SMALL");
}

static void start(void)
{
    const char *given = getenv("RY_TEST_SEED");
    seed = given ? strtoull(given, NULL, 0) | 1 : (uint64_t)getpid() * 2654435761u | 1;
    printf("seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    ok(device->use(0, &err));
    ok(device->prepare(0, &ry_run_kernels, &err));
    ok(device->stream_create(&stream, &err));
    runner = (struct ry_runner){.device = device, .kernels = true};
}

struct piece {
    size_t a, b, bytes; /* where in two buffers */
};

static const size_t sizes[] = {1,  2,   3,   15,   16,    17,          31,      32,          33,    47,
                               64, 100, 255, 4096, 16368, RY_TILE - 1, RY_TILE, RY_TILE + 1, 16400, 40001};
enum { SIZES = sizeof sizes / sizeof *sizes, SHIFTS = 16, PIECES = SIZES * SHIFTS * SHIFTS };

/* Every size at every pair of alignments, with a few bytes between that nobody may touch. */
static size_t lay_out(struct piece *pieces)
{
    size_t at = 0;
    for (size_t i = 0; i < PIECES; i++) {
        size_t bytes = sizes[i / (SHIFTS * SHIFTS)];
        at = (at + 15) / 16 * 16 + 16;
        pieces[i] = (struct piece){at + i % SHIFTS, at + i / SHIFTS % SHIFTS, bytes};
        at += bytes + 16;
    }
    return at + 32;
}

static unsigned char *noise(size_t n)
{
    unsigned char *p = malloc(n);
    for (size_t i = 0; i < n; i++)
        p[i] = (unsigned char)(i * 131 + (i >> 8) * 29 + (i >> 16));
    return p;
}

START_TEST(copies)
{
    start();
    struct piece *pieces = calloc(PIECES, sizeof *pieces);
    size_t n = lay_out(pieces);
    unsigned char *from = noise(n), *want = malloc(n), *got = malloc(n);
    void *a, *b;
    struct batch batch;
    memset(want, 0xee, n);
    ok(device->alloc_async(&a, n, stream, &err));
    ok(device->alloc_async(&b, n, stream, &err));
    ok(device->fill(a, 0xee, n, stream, &err));
    ok(device->copy(b, from, n, stream, &err));
    batch_start_copy(&batch, &runner, stream);
    for (size_t i = 0; i < PIECES; i++) {
        const struct piece *p = &pieces[i];
        memcpy(want + p->a, from + p->b, p->bytes);
        ok(batch_add(&batch, (char *)a + p->a, (char *)b + p->b, p->bytes, 0, &err));
        if (draw(50) == 0) /* tables of all lengths, of one segment too */
            ok(batch_flush(&batch, &err));
    }
    ok(batch_flush(&batch, &err));
    ok(batch_flush(&batch, &err));
    ok(device->copy(got, a, n, stream, &err));
    ok(device->free_async(a, stream, &err));
    ok(device->free_async(b, stream, &err));
    ok(device->stream_sync(stream, &err));
    for (size_t i = 0; i < n; i++)
        if (want[i] != got[i])
            ck_abort_msg("byte %zu of %zu: %02x, not %02x", i, n, got[i], want[i]);
    ok(device->stream_destroy(stream, &err));
    free(pieces), free(from), free(want), free(got);
}
END_TEST

static uint64_t compared(const struct piece *pieces, size_t first, size_t end, void *a, void *b, uint64_t *answer)
{
    uint64_t value = 0;
    struct batch batch;
    ok(device->fill(answer, 0xff, sizeof *answer, stream, &err));
    batch_start_compare(&batch, &runner, stream, answer);
    for (size_t i = first; i < end; i++)
        ok(batch_add(&batch, (char *)a + pieces[i].a, (char *)b + pieces[i].b, pieces[i].bytes, (uint32_t)i, &err));
    ok(batch_flush(&batch, &err));
    ok(device->copy(&value, answer, sizeof value, stream, &err));
    ok(device->stream_sync(stream, &err));
    return value;
}

static void flip(void *at)
{
    unsigned char v;
    ok(device->copy(&v, at, 1, stream, &err));
    ok(device->stream_sync(stream, &err));
    v ^= (unsigned char)(1u << draw(8));
    ok(device->copy(at, &v, 1, stream, &err));
    ok(device->stream_sync(stream, &err));
}

START_TEST(comparisons)
{
    start();
    struct piece *pieces = calloc(PIECES, sizeof *pieces);
    size_t n = lay_out(pieces);
    unsigned char *from = noise(n), *other = malloc(n);
    void *a, *b;
    uint64_t *answer;
    memset(other, 0x33, n); /* around the pieces the two differ everywhere */
    for (size_t i = 0; i < PIECES; i++)
        memcpy(other + pieces[i].b, from + pieces[i].a, pieces[i].bytes);
    ok(device->alloc_async(&a, n, stream, &err));
    ok(device->alloc_async(&b, n, stream, &err));
    ok(device->alloc_async((void **)&answer, 256, stream, &err));
    ok(device->copy(a, from, n, stream, &err));
    ok(device->copy(b, other, n, stream, &err));
    ck_assert_uint_eq(compared(pieces, 0, PIECES, a, b, answer), RY_NO_DIFFERENCE);
    for (int round = 0; round < ROUNDS_OF(150); round++) {
        size_t i = draw(PIECES), j = draw(PIECES), first = i < 60 ? 0 : i - draw(60), end = i + 1 + draw(60);
        size_t at = draw(4) ? draw(pieces[i].bytes) : draw(2) ? 0 : pieces[i].bytes - 1, at_2 = draw(pieces[j].bytes);
        end = end > PIECES ? PIECES : end;
        flip((char *)a + pieces[i].a + at);
        flip((char *)b + pieces[j].b + at_2);
        uint64_t want = (uint64_t)i << RY_DIFFERENCE_BITS | at, second = (uint64_t)j << RY_DIFFERENCE_BITS | at_2;
        if (j >= first && j < end && second < want)
            want = second;
        uint64_t got = compared(pieces, first, end, a, b, answer);
        if (i != j || at != at_2) /* else the two may have cancelled each other */
            ck_assert_msg(got == want, "piece %zu (%zu bytes) at %zu and %zu at %zu: %llx, not %llx", i,
                          pieces[i].bytes, at, j, at_2, (unsigned long long)got, (unsigned long long)want);
        ok(device->copy((char *)a + pieces[i].a + at, from + pieces[i].a + at, 1, stream, &err));
        ok(device->copy((char *)b + pieces[j].b + at_2, other + pieces[j].b + at_2, 1, stream, &err));
    }
    ok(device->free_async(a, stream, &err));
    ok(device->free_async(b, stream, &err));
    ok(device->free_async(answer, stream, &err));
    ok(device->stream_sync(stream, &err));
    ok(device->stream_destroy(stream, &err));
    free(pieces), free(from), free(other);
}
END_TEST

static void digest_of(const struct piece *pieces, size_t n, const void *base, bool shifted, uint64_t sum[2], void *answer)
{
    struct batch batch;
    ok(device->fill(answer, 0, 16, stream, &err));
    batch_start_digest(&batch, &runner, stream, answer);
    for (size_t i = 0; i < n; i++)
        ok(batch_add(&batch, NULL, (const char *)base + (shifted ? pieces[i].b : pieces[i].a), pieces[i].bytes, (uint32_t)i, &err));
    ok(batch_flush(&batch, &err));
    ok(device->copy(sum, answer, 16, stream, &err));
    ok(device->stream_sync(stream, &err));
}

/* The same bytes at other addresses: the same digest, that of digest.h. One bit, one length, two pieces swapped: another one. */
START_TEST(digests)
{
    start();
    struct piece *pieces = calloc(PIECES, sizeof *pieces);
    size_t n = lay_out(pieces), used = 0;
    for (size_t i = 0; i < PIECES; i += getenv("RY_FAKE_CUDA") ? 7 : 1) /* a GPU that is played takes its time */
        pieces[used++] = pieces[i];
    unsigned char *from = noise(n), *other = malloc(n);
    uint64_t want[2] = {0, 0}, got[2];
    void *a, *b, *answer;
    memset(other, 0x33, n);
    for (size_t i = 0; i < used; i++) {
        const unsigned char *p = from + pieces[i].a;
        memcpy(other + pieces[i].b, p, pieces[i].bytes);
        for (size_t at = 0; at < pieces[i].bytes; at += at + 16 <= pieces[i].bytes ? 16 : 1) {
            uint64_t word[2];
            if (at + 16 > pieces[i].bytes) {
                ry_digest_byte(want, p[at], (uint32_t)i, at);
                continue;
            }
            memcpy(word, p + at, 16);
            ry_digest_word(want, word[0], word[1], (uint32_t)i, at);
        }
    }
    ok(device->alloc_async(&a, n, stream, &err));
    ok(device->alloc_async(&b, n, stream, &err));
    ok(device->alloc_async(&answer, 256, stream, &err));
    ok(device->copy(a, from, n, stream, &err));
    ok(device->copy(b, other, n, stream, &err));
    digest_of(pieces, used, a, false, got, answer);
    ck_assert(got[0] == want[0] && got[1] == want[1]);
    digest_of(pieces, used, b, true, got, answer);
    ck_assert(got[0] == want[0] && got[1] == want[1]);
    for (int round = 0; round < ROUNDS_OF(getenv("RY_FAKE_CUDA") ? 30 : 60); round++) {
        size_t i = draw(used), first = i < 60 ? 0 : i - draw(60), many = i + 1 - first, at = draw(pieces[i].bytes);
        uint64_t before[2], again[2];
        digest_of(pieces + first, many, a, false, before, answer);
        flip((char *)a + pieces[i].a + at);
        digest_of(pieces + first, many, a, false, got, answer);
        ck_assert(got[0] != before[0] && got[1] != before[1]);
        ok(device->copy((char *)a + pieces[i].a + at, from + pieces[i].a + at, 1, stream, &err));
        digest_of(pieces + first, many, a, false, again, answer);
        ck_assert(again[0] == before[0] && again[1] == before[1]);
        struct piece two[2] = {{pieces[i].a, 0, pieces[i].bytes}, {pieces[first].a, 0, pieces[first].bytes}};
        digest_of(two, 2, a, false, before, answer);
        struct piece swapped[2] = {two[1], two[0]};
        digest_of(swapped, 2, a, false, got, answer);
        bool same = pieces[i].bytes == pieces[first].bytes && !memcmp(from + pieces[i].a, from + pieces[first].a, pieces[i].bytes);
        ck_assert(same == !memcmp(got, before, 16)); /* pieces of a byte may well be the same */
        if (pieces[i].bytes > 1 && from[pieces[i].a + pieces[i].bytes - 1]) {
            two[0].bytes--;
            digest_of(two, 2, a, false, got, answer);
            ck_assert(memcmp(got, before, 16));
        }
    }
    ok(device->free_async(a, stream, &err));
    ok(device->free_async(b, stream, &err));
    ok(device->free_async(answer, stream, &err));
    ok(device->stream_sync(stream, &err));
    ok(device->stream_destroy(stream, &err));
    free(pieces), free(from), free(other);
}
END_TEST

/* Segments that end where memory does: nothing beyond may be read (a sanitizer of the host or of the GPU tells). */
START_TEST(nothing_beyond)
{
    start();
    static const size_t ends[] = {1, 15, 17, 40, 100, 1003, RY_TILE + 9};
    uint64_t *answer;
    ok(device->alloc(&(*(void **)&answer), 16, &err));
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        for (size_t shift = 0; shift < 16; shift++) {
            void *a, *b;
            size_t n = ends[i];
            ok(device->alloc(&a, n + 16, &err));
            ok(device->alloc(&b, n + shift, &err));
            ok(device->fill(b, 7, n + shift, stream, &err));
            ok(device->fill(answer, 0xff, 8, stream, &err));
            struct batch batch;
            const struct piece two[] = {{0, shift, n / 2}, {n / 2, shift + n / 2, n - n / 2}};
            batch_start_copy(&batch, &runner, stream);
            for (int k = 0; k < 2; k++)
                ok(batch_add(&batch, (char *)a + two[k].a, (char *)b + two[k].b, two[k].bytes, 0, &err));
            ok(batch_flush(&batch, &err));
            ck_assert_uint_eq(compared(two, n < 2, 2, a, b, answer), RY_NO_DIFFERENCE);
            uint64_t sum[2];
            digest_of(two, 2, b, true, sum, answer);
            ok(device->release(a, &err));
            ok(device->release(b, &err));
        }
    ok(device->release(answer, &err));
    ok(device->stream_destroy(stream, &err));
}
END_TEST

/* ---- with a real GPU only ---- */

/* One segment of more bytes than 32 bits count. */
START_TEST(huge)
{
    const size_t n = (size_t)5 << 30, at = n - 12345;
    void *a, *b;
    uint64_t *answer;
    if (!is_large_gpu())
        return;
    start();
    ok(device->alloc_async(&a, n, stream, &err));
    ok(device->alloc_async(&b, n, stream, &err));
    ok(device->alloc_async((void **)&answer, 256, stream, &err));
    ok(device->fill(a, 1, n, stream, &err));
    ok(device->fill(b, 2, n, stream, &err));
    const struct piece whole[] = {{0, 3, n - 3}, {n - 3, n - 3, 0}};
    struct batch batch;
    batch_start_copy(&batch, &runner, stream);
    ok(batch_add(&batch, b, a, 1, 0, &err)); /* so that it is no batch of one */
    ok(batch_add(&batch, (char *)b + 3, a, n - 3, 0, &err));
    ok(batch_flush(&batch, &err));
    ck_assert_uint_eq(compared(whole, 0, 1, a, b, answer), RY_NO_DIFFERENCE);
    flip((char *)a + at);
    ck_assert_uint_eq(compared(whole, 0, 1, a, b, answer), at);
    ok(device->free_async(a, stream, &err));
    ok(device->free_async(b, stream, &err));
    ok(device->free_async(answer, stream, &err));
    ok(device->stream_sync(stream, &err));
    ok(device->stream_destroy(stream, &err));
}
END_TEST

struct work {
    void *a, *b;
    uint64_t *answer;
    size_t pieces, bytes, stride, shift; /* bytes of a piece; from one to the next; `b` against `a` */
};

static void plain_copies(const struct work *w)
{
    for (size_t i = 0; i < w->pieces; i++)
        ok(device->copy((char *)w->a + i * w->stride, (char *)w->b + w->shift + i * w->stride, w->bytes, stream, &err));
}

static void batched(const struct work *w, bool compare)
{
    struct batch batch;
    if (compare)
        batch_start_compare(&batch, &runner, stream, w->answer);
    else
        batch_start_copy(&batch, &runner, stream);
    for (size_t i = 0; i < w->pieces; i++)
        ok(batch_add(&batch, (char *)w->a + i * w->stride, (char *)w->b + w->shift + i * w->stride, w->bytes, 0, &err));
    ok(batch_flush(&batch, &err));
}

static void batched_copies(const struct work *w)
{
    batched(w, false);
}

static void batched_comparison(const struct work *w)
{
    batched(w, true);
}

static void batched_digest(const struct work *w)
{
    struct batch batch;
    batch_start_digest(&batch, &runner, stream, w->answer + 2);
    for (size_t i = 0; i < w->pieces; i++)
        ok(batch_add(&batch, NULL, (char *)w->b + w->shift + i * w->stride, w->bytes, 0, &err));
    ok(batch_flush(&batch, &err));
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Median of 15, in microseconds. */
static double timed(void (*what)(const struct work *), const struct work *w)
{
    enum { RUNS = 15 };
    double us[RUNS];
    struct ry_event *from, *to;
    ok(device->event_create(&from, &err));
    ok(device->event_create(&to, &err));
    for (int i = -2; i < RUNS; i++) {
        double t;
        ok(device->event_record(from, stream, &err));
        what(w);
        ok(device->event_record(to, stream, &err));
        ok(device->stream_sync(stream, &err));
        ok(device->event_elapsed(from, to, &t, &err));
        if (i >= 0)
            us[i] = t;
    }
    device->event_destroy(from);
    device->event_destroy(to);
    qsort(us, RUNS, sizeof *us, by_size);
    return us[RUNS / 2];
}

START_TEST(speed)
{
    static const struct {
        size_t pieces, bytes, shift;
    } cases[] = {
        {1, 1 << 30, 0},      {64, 4 << 20, 0},     {64, 4 << 20, 2},  {64, 4 << 20, 1},
        {1024, 256 << 10, 0}, {1024, 256 << 10, 4}, {64, 64 << 10, 0}, {64, 64 << 10, 2},
        {64, 4 << 10, 0},     {256, 1 << 10, 0},    {1024, 512, 2},    {8, 1 << 20, 0},
    };
    if (!is_large_gpu())
        return;
    start();
    struct ry_device_id id;
    ok(device->identify(0, &id, &err));
    printf("%s: medians of 15; bytes moved count twice (read and written, or read from both)\n"
           "%22s %5s   %20s   %20s   %20s   %20s\n",
           id.name, "pieces", "shift", "copies one by one", "one batch", "comparison", "digest (read once)");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct work w = {.pieces = cases[i].pieces, .bytes = cases[i].bytes, .shift = cases[i].shift};
        w.stride = (w.bytes + 511) / 256 * 256;
        size_t n = w.pieces * w.stride + 256;
        ok(device->alloc_async(&w.a, n, stream, &err));
        ok(device->alloc_async(&w.b, n, stream, &err));
        ok(device->alloc_async((void **)&w.answer, 256, stream, &err));
        ok(device->fill(w.a, 1, n, stream, &err));
        ok(device->fill(w.b, 1, n, stream, &err));
        ok(device->fill(w.answer, 0xff, 8, stream, &err));
        double us[3] = {timed(plain_copies, &w), timed(batched_copies, &w), timed(batched_comparison, &w)};
        printf("%8zu x %11zu %5zu", w.pieces, w.bytes, w.shift);
        for (int k = 0; k < 3; k++)
            printf("   %9.1f us %5.0f GB/s", us[k], 2e-3 * (double)(w.pieces * w.bytes) / us[k]);
        double digest_us = timed(batched_digest, &w);
        printf("   %9.1f us %5.0f GB/s\n", digest_us, 1e-3 * (double)(w.pieces * w.bytes) / digest_us);
        uint64_t answer = 0;
        ok(device->copy(&answer, w.answer, 8, stream, &err));
        ok(device->free_async(w.a, stream, &err));
        ok(device->free_async(w.b, stream, &err));
        ok(device->free_async(w.answer, stream, &err));
        ok(device->stream_sync(stream, &err));
        ck_assert_uint_eq(answer, RY_NO_DIFFERENCE);
        /* Loose, since the machine may be shared; far below means that something is wrong. */
        if (w.pieces > 1 && w.pieces * w.bytes >= 256 << 20)
            ck_assert_msg(us[1] < 2 * us[0] && us[2] < 2 * us[0], "%.1f, %.1f, %.1f us", us[0], us[1], us[2]);
    }
    ok(device->stream_destroy(stream, &err));
}
END_TEST

static void add_tests(TCase *t, bool cuda)
{
    tcase_add_test(t, copies);
    tcase_add_test(t, comparisons);
    tcase_add_test(t, digests);
    tcase_add_test(t, nothing_beyond);
    if (cuda) {
        tcase_add_test(t, huge);
        tcase_add_test(t, speed);
    }
}

int main(void)
{
    return on_devices("kernels", add_tests);
}
