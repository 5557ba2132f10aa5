/* test_device.c: the device interface, run on every backend that this machine has; CUDA's cases skip visibly without a
 * GPU. */
#include <check.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "on_devices.h"

START_TEST(identity)
{
    int n = 0;
    struct ry_device_id id;
    ok(device->count(&n, &err));
    ck_assert_int_ge(n, 1);
    for (int i = 0; i < n; i++) {
        ok(device->identify(i, &id, &err));
        ck_assert_str_ne(id.name, "");
        if (device == ry_device_host()) {
            ck_assert_str_eq(id.pci, "");
            ck_assert_str_eq(id.uuid, "");
        } else {
            unsigned domain, bus, slot, function;
            ck_assert_msg(sscanf(id.pci, "%x:%x:%x.%x", &domain, &bus, &slot, &function) == 4, "pci '%s'", id.pci);
            ck_assert_uint_eq(strlen(id.uuid), strlen("GPU-01234567-0123-0123-0123-0123456789ab"));
            ck_assert_msg(!strncmp(id.uuid, "GPU-", 4), "uuid '%s'", id.uuid);
        }
    }
}
END_TEST

/* Bytes go to the device, between two of its buffers, and back, unchanged; fill fills exactly what it was told. */
START_TEST(memory)
{
    enum { N = 100003 };
    unsigned char *out = malloc(N), *back = malloc(N);
    void *a, *b, *stream, *nothing = out;
    for (int i = 0; i < N; i++)
        out[i] = (unsigned char)(i * 7 + i / 251);
    ok(device->use(0, &err));
    ok(device->stream_create(&stream, &err));
    ok(device->alloc(&nothing, 0, &err));
    ck_assert_ptr_null(nothing);
    ok(device->release(nothing, &err));
    ok(device->alloc(&a, N, &err));
    ok(device->alloc(&b, N, &err));
    ck_assert_uint_eq((uintptr_t)a % 256, 0);
    void *const streams[] = {stream, NULL};
    for (int s = 0; s < 2; s++) {
        memset(back, 0, N);
        ok(device->copy(a, out, N, streams[s], &err));
        ok(device->copy(b, a, N, streams[s], &err));
        ok(device->copy(NULL, NULL, 0, streams[s], &err));
        ok(device->copy(back, b, N, streams[s], &err));
        ok(device->stream_sync(streams[s], &err));
        ck_assert_mem_eq(out, back, N);
        ok(device->fill((char *)b + 1, 0xa5, N - 2, streams[s], &err));
        ok(device->fill(NULL, 0, 0, streams[s], &err));
        ok(device->copy(back, b, N, streams[s], &err));
        ok(device->stream_sync(streams[s], &err));
        ck_assert_uint_eq(back[0], out[0]);
        ck_assert_uint_eq(back[N - 1], out[N - 1]);
        for (int i = 1; i < N - 1; i++)
            ck_assert_uint_eq(back[i], 0xa5);
    }
    ok(device->release(a, &err));
    ok(device->release(b, &err));
    ok(device->stream_destroy(stream, &err));
    free(out);
    free(back);
}
END_TEST

START_TEST(streams_and_events)
{
    void *s1, *s2;
    bool capturing = true, done = false;
    struct ry_event *a, *b;
    double us = -1;
    ok(device->use(0, &err));
    ok(device->stream_create(&s1, &err));
    ok(device->stream_create(&s2, &err));
    ck_assert_ptr_ne(s1, s2);
    ok(device->stream_capturing(s1, &capturing, &err));
    ck_assert(!capturing);
    capturing = true;
    ok(device->stream_capturing(NULL, &capturing, &err));
    ck_assert(!capturing);
    ok(device->event_create(&a, &err));
    ok(device->event_create(&b, &err));
    ck_assert_int_eq(device->event_elapsed(a, b, &us, &err), -1);
    ok(device->event_done(a, &done, &err));
    ok(device->event_record(a, s1, &err));
    usleep(2000);
    ok(device->event_record(b, s1, &err));
    ok(device->stream_sync(s1, &err));
    ok(device->event_done(b, &done, &err));
    ck_assert(done);
    ok(device->event_elapsed(a, b, &us, &err));
    ck_assert_double_ge(us, 1500);
    ck_assert_double_lt(us, 60e6);
    device->event_destroy(a);
    device->event_destroy(b);
    ok(device->stream_destroy(s1, &err));
    ok(device->stream_destroy(s2, &err));
}
END_TEST

/* Memory that comes and goes in stream order, also between streams, pinned memory, and events without timing. */
START_TEST(stream_order)
{
    enum { N = 70001 };
    unsigned char *out = malloc(N), *back;
    void *a, *b, *s1, *s2, *nothing = out;
    struct ry_event *ev, *never;
    for (int i = 0; i < N; i++)
        out[i] = (unsigned char)(i * 5 + i / 251);
    ok(device->use(0, &err));
    ok(device->prepare(0, NULL, &err));
    ok(device->prepare(0, NULL, &err));
    ok(device->prepare(-1, NULL, &err));
    ok(device->stream_create(&s1, &err));
    ok(device->stream_create(&s2, &err));
    ok(device->event_create_untimed(&ev, &err));
    ok(device->event_create_untimed(&never, &err));
    ok(device->pinned_alloc((void **)&back, N, &err));
    ok(device->alloc_async(&nothing, 0, s1, &err));
    ck_assert_ptr_null(nothing);
    ok(device->free_async(nothing, s1, &err));
    ok(device->free_after(nothing, ev, &err));
    for (int round = 0; round < 20; round++) {
        memset(back, 0, N);
        ok(device->alloc_async(&a, N, s1, &err));
        ck_assert_uint_eq((uintptr_t)a % 256, 0);
        ok(device->copy(a, out, N, s1, &err));
        ok(device->event_record(ev, s1, &err));
        ok(device->stream_wait(s2, ev, &err));
        ok(device->stream_wait(s2, never, &err));
        ok(device->alloc_async(&b, N, s2, &err));
        ok(device->copy(b, a, N, s2, &err));
        ok(device->copy(back, b, N, s2, &err));
        ok(device->event_record(ev, s2, &err));
        ok(device->free_async(b, s2, &err));
        ok(device->free_after(a, ev, &err));
        ok(device->stream_sync(s2, &err));
        ck_assert_mem_eq(out, back, N);
    }
    /* The streams may be gone by the time that memory is given back. */
    ok(device->alloc_async(&a, N, s1, &err));
    ok(device->event_record(ev, s1, &err));
    ok(device->stream_destroy(s1, &err));
    ok(device->free_after(a, ev, &err));
    ok(device->stream_destroy(s2, &err));
    if (device != ry_device_host()) {
        ck_assert_int_eq(device->event_elapsed(ev, ev, &(double){0}, &err), -1);
        ck_assert_int_eq(device->alloc_async(&a, SIZE_MAX / 2 + 2, NULL, &err), -1);
        ck_assert_ptr_null(a);
    }
    device->event_destroy(ev);
    device->event_destroy(never);
    ok(device->pinned_free(back, &err));
    free(out);
}
END_TEST

static bool passed(struct ry_event *ev)
{
    bool done;
    ok(device->event_done(ev, &done, &err));
    return done;
}

/* A stream waits for a word, whoever writes it, and for no other stream's; beyond is as good as there, past the wrap, too. */
START_TEST(words)
{
    void *a, *b, *page;
    struct ry_event *ev, *other;
    ok(device->use(0, &err));
    ok(device->stream_create(&a, &err));
    ok(device->stream_create(&b, &err));
    ok(device->event_create_untimed(&ev, &err));
    ok(device->event_create_untimed(&other, &err));
    ok(device->pinned_alloc(&page, 64, &err));
    uint32_t *word = page;
    memset(page, 0, 64);
    if (device->stream_wait_value(a, word, 1, &err)) {
        ck_assert_msg(strstr(err.msg, "cuStreamWaitValue32"), "%s", err.msg);
        fprintf(stderr, "words: left out: %s\n", err.msg);
        goto out;
    }
    ok(device->event_record(ev, a, &err));
    ok(device->event_record(other, b, &err));
    ok(device->stream_sync(b, &err));
    usleep(20000);
    ck_assert(!passed(ev) && passed(other));
    ok(device->stream_write_value(b, word, 1, &err));
    ok(device->stream_sync(a, &err));
    ck_assert(passed(ev));
    ok(device->stream_wait_value(a, word, 2, &err));
    ok(device->stream_wait_value(a, word + 1, 1, &err));
    ok(device->event_record(ev, a, &err));
    __atomic_store_n(word, 3, __ATOMIC_RELEASE);
    usleep(20000);
    ck_assert(!passed(ev));
    __atomic_store_n(word + 1, 1, __ATOMIC_RELEASE);
    ok(device->stream_sync(a, &err));
    ck_assert(passed(ev));
    ok(device->stream_wait_value(a, word, UINT32_MAX - 5, &err)); /* 3 comes after that */
    ok(device->stream_sync(a, &err));
out:
    ok(device->stream_destroy(a, &err));
    ok(device->stream_destroy(b, &err));
    device->event_destroy(ev);
    device->event_destroy(other);
    ok(device->pinned_free(page, &err));
}
END_TEST

/* A thread that never chose a device uses and frees what another made. */
static void *other_thread(void *p)
{
    void **given = p; /* stream, memory */
    struct ry_event *ev;
    bool done = false;
    device->relax_thread();
    ok(device->event_create(&ev, &err));
    ok(device->fill(given[1], 1, 64, given[0], &err));
    ok(device->event_record(ev, given[0], &err));
    ok(device->stream_sync(given[0], &err));
    ok(device->event_done(ev, &done, &err));
    ck_assert(done);
    device->event_destroy(ev);
    ok(device->release(given[1], &err));
    ok(device->stream_destroy(given[0], &err));
    return NULL;
}

START_TEST(from_another_thread)
{
    void *given[2];
    pthread_t thread;
    ok(device->use(0, &err));
    ok(device->stream_create(&given[0], &err));
    ok(device->alloc(&given[1], 64, &err));
    ck_assert_int_eq(pthread_create(&thread, NULL, other_thread, given), 0);
    pthread_join(thread, NULL);
}
END_TEST

/* An event made on one device is recorded on a stream of another: needs two devices. */
START_TEST(event_moves_between_devices)
{
    int n = 0;
    void *stream;
    struct ry_event *a, *b;
    double us;
    bool done = false;
    ok(device->count(&n, &err));
    if (n < 2 && device != ry_device_host()) {
        printf("SKIP event_moves_between_devices: one CUDA device only\n");
        return;
    }
    ok(device->use(0, &err));
    ok(device->event_create(&a, &err));
    ok(device->event_create(&b, &err));
    ok(device->use(1, &err));
    ok(device->stream_create(&stream, &err));
    ok(device->use(0, &err));
    ok(device->event_record(a, stream, &err));
    ok(device->event_record(b, stream, &err));
    ok(device->stream_sync(stream, &err));
    ok(device->event_done(b, &done, &err));
    ck_assert(done);
    ok(device->event_elapsed(a, b, &us, &err));
    device->event_destroy(a);
    device->event_destroy(b);
    ok(device->stream_destroy(stream, &err));
}
END_TEST

/* ---- only with the fake driver, which can be asked what it saw ---- */

static int (*fake_depth)(void), (*fake_device)(void), (*fake_mode)(void);
static void (*fake_capture)(void *stream, int result, int status), (*fake_elsewhere)(int captures);
static int64_t (*fake_pool)(int device, uint64_t *threshold, int *internal_dependencies);

static bool is_fake(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (!lib)
        return false;
    *(void **)&fake_depth = dlsym(lib, "fake_cuda_depth");
    *(void **)&fake_device = dlsym(lib, "fake_cuda_device");
    *(void **)&fake_mode = dlsym(lib, "fake_cuda_mode");
    *(void **)&fake_capture = dlsym(lib, "fake_cuda_capture");
    *(void **)&fake_pool = dlsym(lib, "fake_cuda_pool");
    *(void **)&fake_elsewhere = dlsym(lib, "fake_cuda_elsewhere");
    dlclose(lib);
    return fake_depth;
}

/* A stream's capture, an error that says that somebody captures, and any other error. */
START_TEST(capture)
{
    void *stream;
    bool capturing;
    if (!is_fake())
        return;
    ok(device->use(0, &err));
    ok(device->stream_create(&stream, &err));
    static const struct {
        int result, status, rc;
        bool capturing;
    } cases[] = {
        {0, 0, 0, false},                      /* none */
        {0, 1, 0, true},                       /* active */
        {0, 2, 0, true},                       /* invalidated */
        {906, 0, 0, true},                     /* CUDA_ERROR_STREAM_CAPTURE_IMPLICIT */
        {900, 0, 0, true}, {719, 0, -1, true}, /* a launch failed earlier: not known, so hands off */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fake_capture(stream, cases[i].result, cases[i].status);
        capturing = !cases[i].capturing;
        ck_assert_msg(device->stream_capturing(stream, &capturing, &err) == cases[i].rc, "case %zu", i);
        ck_assert_msg(capturing == cases[i].capturing, "case %zu", i);
    }
    ck_assert_ptr_nonnull(strstr(err.msg, "cuStreamIsCapturing: CUDA_ERROR_FAKE (719)"));
    ok(device->stream_destroy(stream, &err));
}
END_TEST

/* Asking an event, on whatever thread, spoils no other thread's capture, and leaves the thread's mode as it was. */
START_TEST(capture_elsewhere)
{
    struct ry_event *a, *b;
    bool flag = false;
    double us;
    if (!is_fake())
        return;
    ok(device->use(0, &err));
    ok(device->event_create(&a, &err));
    ok(device->event_create(&b, &err));
    ok(device->event_record(a, NULL, &err));
    ok(device->event_record(b, NULL, &err));
    fake_elsewhere(1);
    ok(device->event_done(b, &flag, &err));
    ck_assert(flag);
    ok(device->event_elapsed(a, b, &us, &err));
    fake_elsewhere(0);
    ck_assert_int_eq(fake_mode(), 0);
    device->event_destroy(a);
    device->event_destroy(b);
}
END_TEST

/* Whatever is called, the thread's current context is afterwards what it was, also after failures. */
START_TEST(contexts_are_left_alone)
{
    void *stream, *p = NULL;
    struct ry_event *ev;
    bool flag;
    if (!is_fake())
        return;
    ck_assert_int_eq(fake_depth(), 0);
    ok(device->alloc(&p, 64, &err)); /* no context: device 0 */
    ck_assert_int_eq(fake_depth(), 0);
    ok(device->release(p, &err));
    ok(device->use(1, &err));
    ok(device->stream_create(&stream, &err));
    ok(device->use(0, &err));
    ok(device->alloc(&p, 64, &err));
    ck_assert_int_eq(device->alloc(&(void *){NULL}, SIZE_MAX - 4096, &err), -1);
    ck_assert_msg(strstr(err.msg, "cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY (2)"), "%s", err.msg);
    ok(device->fill(p, 1, 64, stream, &err));
    ok(device->event_create(&ev, &err));
    ok(device->event_record(ev, stream, &err)); /* moves to device 1 */
    ok(device->event_done(ev, &flag, &err));
    ok(device->event_record(ev, NULL, &err)); /* and back to 0 */
    ok(device->stream_capturing(stream, &flag, &err));
    fake_capture(stream, 719, 0);
    ck_assert_int_eq(device->stream_capturing(stream, &flag, &err), -1);
    device->event_destroy(ev);
    ok(device->use(1, &err));
    ok(device->release(p, &err)); /* of device 0 */
    ck_assert_int_eq(fake_device(), 1);
    ok(device->use(0, &err));
    ok(device->stream_destroy(stream, &err)); /* of device 1 */
    ck_assert_int_eq(fake_device(), 0);
    ck_assert_int_eq(fake_depth(), 1);
    ck_assert_int_eq(device->use(2, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "cuDeviceGet"));
    ck_assert_int_eq(device->use(-1, &err), -1);
    ck_assert_int_eq(device->stream_destroy(NULL, &err), -1);
    device->relax_thread();
    ck_assert_int_eq(fake_mode(), 2);
}
END_TEST

/* Pools as they must be, one for each device; kernels loaded ahead, whoever captures; and the errors. */
START_TEST(pool_and_kernels)
{
    static struct ry_kernel none = {.name = "no_such_kernel"}, copy = {.name = "ry_copy_segments"};
    static const uint32_t image[4] = {0xba55ed50};
    const struct ry_kernels bad = {image, (struct ry_kernel *const[]){&none}, 1}, no_image = {NULL, bad.kernel, 1};
    const struct ry_kernels good = {image, (struct ry_kernel *const[]){&copy}, 1};
    uint64_t threshold = 1;
    int internal = 1;
    void *stream, *p, *q, *pinned;
    struct ry_event *ev;
    if (!is_fake())
        return;
    ok(device->use(0, &err));
    ck_assert_int_eq(fake_pool(1, &threshold, &internal), -1);
    ck_assert_int_eq(device->alloc_async(&p, 64, NULL, &err), -1);
    ck_assert_msg(strstr(err.msg, "device 0 was not prepared"), "%s", err.msg);
    ck_assert_int_eq(device->launch(&copy, 1, 1, "", NULL, &err), -1);
    ck_assert_msg(strstr(err.msg, "ry_copy_segments was not loaded on CUDA device 0"), "%s", err.msg);

    fake_elsewhere(1);
    ok(device->prepare(1, &good, &err));
    ok(device->pinned_alloc(&pinned, 64, &err));
    fake_elsewhere(0);
    ck_assert_int_eq(fake_mode(), 0);
    ck_assert_int_eq(fake_pool(1, &threshold, &internal), 0);
    ck_assert_uint_eq(threshold, 0);
    ck_assert_int_eq(internal, 0);
    ck_assert_ptr_nonnull(copy.loaded[1]);
    ck_assert_ptr_null(copy.loaded[0]);
    ck_assert_int_eq(device->prepare(0, &bad, &err), -1);
    ck_assert_msg(strstr(err.msg, "cuModuleGetFunction"), "%s", err.msg);
    ck_assert_int_eq(device->prepare(0, &no_image, &err), -1);
    ck_assert_msg(strstr(err.msg, "built without nvcc"), "%s", err.msg);
    ck_assert_int_eq(device->prepare(RY_DEVICES, NULL, &err), -1);

    /* All of it on a thread whose device is another one. */
    ok(device->use(1, &err));
    ok(device->stream_create(&stream, &err));
    ok(device->use(0, &err));
    ok(device->event_create_untimed(&ev, &err));
    ok(device->alloc_async(&p, 1000, stream, &err));
    ok(device->alloc_async(&q, 24, NULL, &err));
    ck_assert_int_eq(fake_pool(1, &threshold, &internal), 1000);
    ck_assert_int_eq(fake_pool(0, &threshold, &internal), 24);
    ok(device->event_record(ev, stream, &err));
    ok(device->stream_wait(NULL, ev, &err));
    ok(device->free_after(p, ev, &err));
    ok(device->free_async(q, NULL, &err));
    ck_assert_int_eq(fake_pool(1, &threshold, &internal), 0);
    ck_assert_int_eq(fake_pool(0, &threshold, &internal), 0);
    ck_assert_int_eq(device->alloc_async(&p, SIZE_MAX / 2 + 2, stream, &err), -1);
    ck_assert_msg(strstr(err.msg, "cuMemAllocFromPoolAsync: CUDA_ERROR_OUT_OF_MEMORY (2)"), "%s", err.msg);
    device->event_destroy(ev);
    ok(device->stream_destroy(stream, &err));
    ok(device->pinned_free(pinned, &err));
    ck_assert_int_eq(fake_device(), 0);
    ck_assert_int_eq(fake_depth(), 1);
}
END_TEST

/* Without a driver the CUDA backend is absent, says why, and says the same again. */
START_TEST(cuda_or_a_reason)
{
    struct ry_err first = {""}, second = {""};
    const struct ry_device *cuda = ry_device_cuda(&first);
    ck_assert_ptr_eq(ry_device_cuda(&second), cuda);
    if (!cuda) {
        ck_assert_str_ne(first.msg, "");
        ck_assert_str_eq(first.msg, second.msg);
        ck_assert_ptr_null(strchr(first.msg, '\n'));
    }
    ck_assert_ptr_eq(ry_device_cuda(NULL), cuda);
}
END_TEST

static void add_tests(TCase *t, bool cuda)
{
    tcase_add_test(t, identity);
    tcase_add_test(t, memory);
    tcase_add_test(t, streams_and_events);
    tcase_add_test(t, stream_order);
    tcase_add_test(t, words);
    tcase_add_test(t, from_another_thread);
    tcase_add_test(t, event_moves_between_devices);
    tcase_add_test(t, cuda_or_a_reason);
    if (cuda) {
        tcase_add_test(t, capture);
        tcase_add_test(t, capture_elsewhere);
        tcase_add_test(t, contexts_are_left_alone);
        tcase_add_test(t, pool_and_kernels);
    }
}

int main(void)
{
    return on_devices("device", add_tests);
}
