/*
 * test_digest.c: the digest of an exchange as the runner makes it: of every byte that goes to another node, and no other; when it is
 * there; what becomes of one that nobody waits for. (The sum itself: test_kernels.c.)
 */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "on_devices.h"
#include "run/run.h"

enum { RANKS = 6, OWN = 1, MOST = 70 };

static struct ry_cluster *map;
static struct ry_runner *runner;
static void *stream;
static unsigned char *memory; /* the device's */
static const void *send[RANKS];
static void *recv[RANKS];
static uint64_t bytes[RANKS], none[RANKS];
static struct ry_buffers buffers;

static int refuse(void *c)
{
    (void)c;
    return 1;
}

static void start(void)
{
    static const char nodes[] = "abaccb";
    static const uint64_t sizes[RANKS] = {70, 64, 0, 17, 1, 33};
    struct ry_seat seats[RANKS];
    struct ry_nccl nccl = {.comm_destroy = refuse};
    memset(seats, 0, sizeof seats);
    for (int r = 0; r < RANKS; r++) {
        seats[r].rank = r;
        snprintf(seats[r].node, sizeof seats[r].node, "%c", nodes[r]);
    }
    ck_assert_ptr_nonnull(map = ry_cluster_build(seats, RANKS, &err));
    ok(device->use(0, &err));
    ok(device->stream_create(&stream, &err));
    ck_assert_msg((runner = ry_runner_new(&nccl, device, 0, NULL, &err)) != NULL, "%s", err.msg);
    ok(device->alloc((void **)&memory, RANKS * (MOST + 3), &err));
    ok(device->fill(memory, 7, RANKS * (MOST + 3), stream, &err));
    for (int r = 0; r < RANKS; r++) {
        bytes[r] = sizes[r];
        send[r] = bytes[r] ? memory + r * (MOST + 3) : NULL;
    }
    buffers = (struct ry_buffers){.nranks = RANKS,
                                  .rank = OWN,
                                  .send = send,
                                  .recv = recv,
                                  .send_bytes = bytes,
                                  .recv_bytes = none,
                                  .stream = stream};
}

static void stop(void)
{
    ry_runner_free(runner, false);
    ok(device->stream_sync(stream, &err));
    ok(device->release(memory, &err));
    ok(device->stream_destroy(stream, &err));
    ry_cluster_free(map);
}

static struct ry_digest digest(void)
{
    struct ry_digest d;
    bool failed;
    ok(ry_run_digest(runner, map, &buffers, &err));
    while (!ry_run_digest_over(runner, &d, &failed))
        ck_assert(!failed);
    return d;
}

static bool equal(struct ry_digest a, struct ry_digest b)
{
    return !memcmp(&a, &b, sizeof a);
}

START_TEST(what_leaves_the_node)
{
    start();
    struct ry_digest before = digest();
    ck_assert(equal(before, digest()));
    for (int r = 0; r < RANKS; r++)
        for (uint64_t k = 0; k < bytes[r]; k++) {
            unsigned char was = 7, is = 8;
            ok(device->copy((char *)(uintptr_t)send[r] + k, &is, 1, stream, &err));
            ok(device->stream_sync(stream, &err));
            bool leaves = map->node[r] != map->node[OWN];
            ck_assert_msg(equal(before, digest()) != leaves, "byte %d for rank %d", (int)k, r);
            ok(device->copy((char *)(uintptr_t)send[r] + k, &was, 1, stream, &err));
            ok(device->stream_sync(stream, &err));
        }
    const void *at = send[0]; /* elsewhere, by another alignment */
    ok(device->fill(memory + RANKS * (MOST + 3) - MOST, 7, MOST, stream, &err));
    send[0] = memory + RANKS * (MOST + 3) - MOST;
    ck_assert(equal(before, digest()));
    send[0] = at;
    const void *other = send[3]; /* to another rank is another thing */
    uint64_t n = bytes[3];
    send[3] = send[4], send[4] = other, bytes[3] = bytes[4], bytes[4] = n;
    ck_assert(!equal(before, digest()));
    stop();
}
END_TEST

START_TEST(never_fetched)
{
    start();
    struct ry_digest d;
    bool failed;
    ck_assert(!ry_run_digest_over(runner, &d, &failed) && failed); /* there is none */
    for (int i = 0; i < 1000; i++) /* no memory is lost: there are fewer of them */
        ok(ry_run_digest(runner, map, &buffers, &err));
    digest();
    ck_assert(!ry_run_digest_over(runner, &d, &failed) && failed); /* told once */
    ok(ry_run_digest(runner, map, &buffers, &err));
    stop();
}
END_TEST

static void add_tests(TCase *t, bool cuda)
{
    (void)cuda;
    tcase_add_test(t, what_leaves_the_node);
    tcase_add_test(t, never_fetched);
}

int main(void)
{
    return on_devices("digest", add_tests);
}
