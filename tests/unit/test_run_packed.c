/*
 * test_run_packed.c: a runner's scans, and plans of one rank that pack and expand, written by hand: the bytes, how many
 * launches that takes, what is refused before anything is enqueued, memory and its limit, damaged messages. On every
 * backend that this machine has; whole exchanges of several ranks are in tests/multi/run_plans.c and test_run_order.c.
 */
#include "cluster.h"
#include "on_devices.h"
#include "run/internal.h"

/* Six ranks on four nodes; rank 0, alone on its node, does everything here. */
enum { RANKS = 6, NODES = 4, W = 48, M = 1 << 20 };
static int node[RANKS] = {0, 1, 1, 2, 3, 3};
static const struct ry_cluster map = {.nranks = RANKS, .nnodes = NODES, .node = node};

static int nothing(void)
{
    return 0;
}

/* What is sent arrives in the same group, in the same order. */
static struct {
    const void *buf;
    size_t bytes;
} sent[8];
static int nsent, nreceived;

static int send_it(const void *buf, size_t count, int type, int peer, void *comm, void *s)
{
    sent[nsent].buf = buf;
    sent[nsent++].bytes = count;
    return 0;
}

static int receive_it(void *buf, size_t count, int type, int peer, void *comm, void *s)
{
    ck_assert(nreceived < nsent && sent[nreceived].bytes == count);
    return device->copy(buf, sent[nreceived++].buf, count, s, &err);
}

static const struct ry_nccl nccl = {.group_start = nothing, .group_end = nothing, .send = send_it, .recv = receive_it};

static struct ry_device counting; /* the device under test, its launches written down by initial */
static char launched[256];

static int count_launch(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *s,
                        struct ry_err *e)
{
    size_t n = strlen(launched);
    launched[n] = strstr(kernel->name, "sum_rows") ? '+' : kernel->name[3], launched[n + 1] = 0;
    return device->launch(kernel, grid, block, param, s, e);
}

static int count_copy(void *dst, const void *src, size_t bytes, void *s, struct ry_err *e)
{
    strcat(launched, "C");
    return device->copy(dst, src, bytes, s, e);
}

static struct {
    void *stream;
    struct ry_runner *runner;
    unsigned char content[RANKS][8 * W], *memory; /* send segments, then where they are to arrive */
    uint64_t bytes[RANKS];
    const void *send[RANKS];
    void *recv[RANKS];
    struct ry_buffers b;
    struct ry_repeats repeats[NODES];
    struct ry_scan_sums sums;
} t;

/* Each letter a row, '.' one of zeros; a digit: so many bytes of a last one. */
static void rows(int rank, const char *text)
{
    unsigned char *at = t.content[rank];
    for (; *text; text++) {
        size_t n = *text >= '1' && *text <= '9' ? (size_t)(*text - '0') : W;
        for (size_t i = 0; i < n; i++)
            at[i] = (unsigned char)(*text == '.' ? 0 : *text + 5 * (int)i);
        at += n;
    }
    t.bytes[rank] = (uint64_t)(at - t.content[rank]);
}

static void start(void)
{
    memset(&t, 0, sizeof t);
    ok(device->use(0, &err));
    ok(device->stream_create(&t.stream, &err));
    counting = *device;
    counting.launch = count_launch;
    counting.copy = count_copy;
    ry_run_staging_limit(64 * M);
    t.runner = ry_runner_new(&nccl, &counting, 0, NULL, &err);
    ck_assert_msg(t.runner, "%s", err.msg);
    ck_assert(ry_run_packs(t.runner));
    rows(0, "ABC"), rows(1, "ABCA7"), rows(2, "BBD"), rows(3, "A...E"), rows(4, ""), rows(5, "XXXXXXXX");
    ok(device->alloc((void **)&t.memory, 2 * RANKS * sizeof t.content[0], &err));
    ok(device->fill(t.memory, 0xee, 2 * RANKS * sizeof t.content[0], t.stream, &err));
    for (int p = 0; p < RANKS; p++) {
        t.send[p] = t.bytes[p] ? t.memory + (size_t)p * sizeof t.content[0] + p : NULL;
        t.recv[p] = t.bytes[p] ? t.memory + (size_t)(RANKS + p) * sizeof t.content[0] : NULL;
        ok(device->copy((void *)(uintptr_t)t.send[p], t.content[p], t.bytes[p], t.stream, &err));
    }
    t.b = (struct ry_buffers){RANKS, 0, t.send, t.recv, t.bytes, t.bytes, t.stream, 0, NULL};
    ok(ry_run_staging_grow(t.runner, M, t.stream, &err));
    *launched = 0;
}

static void end(void)
{
    ok(device->stream_sync(t.stream, &err));
    ry_runner_free(t.runner, false);
    ok(device->release(t.memory, &err));
    ok(device->stream_destroy(t.stream, &err));
}

static void scan(uint64_t width)
{
    ok(ry_run_scan(t.runner, &map, &t.b, width, 1, &err));
    ok(ry_run_scan_wait(t.runner, t.repeats, &t.sums, &err));
    ck_assert(ry_run_scan_over(t.runner));
}

static int run(struct ry_step *steps, int n)
{
    struct ry_plan plan = {.strategy = RY_DEDUP, .nranks = RANKS, .stage_bytes = M, .nsteps = n, .steps = steps};
    int result = -1;
    *launched = 0;
    int rc = ry_run(t.runner, &plan, &t.b, NULL, &result, &err);
    ck_assert(rc || !result);
    return rc;
}

/* Has all that was sent to `rank` arrived? */
static void arrived(int rank)
{
    unsigned char got[sizeof t.content[0]];
    ok(device->copy(got, t.recv[rank], t.bytes[rank], t.stream, &err));
    ok(device->stream_sync(t.stream, &err));
    for (uint64_t i = 0; i < t.bytes[rank]; i++)
        ck_assert_msg(got[i] == t.content[rank][i], "rank %d, byte %llu of %llu: %02x, not %02x", rank,
                      (unsigned long long)i, (unsigned long long)t.bytes[rank], got[i], t.content[rank][i]);
}

/* What the scan finds for each node, and where these tests put its message. */
static const uint64_t all[NODES] = {0, 8, 5, 8}, distinct[NODES] = {0, 5, 3, 1}, at[NODES] = {0, 1024, 2048, 3072};

static uint64_t message(int n)
{
    return ry_rows_message_bytes(W, distinct[n], all[n]);
}

static struct ry_step pack(int n)
{
    return (struct ry_step){.kind = RY_STEP_PACK,
                            .group = -1,
                            .peer = n,
                            .to = {RY_AT_STAGE, -1, at[n]},
                            .bytes = message(n),
                            .repeats = {.row_bytes = W, .distinct = distinct[n]},
                            .rows = all[n]};
}

/* The piece for `rank`, which has `skip` rows before it. */
static struct ry_step expand(int rank, uint64_t skip)
{
    int n = node[rank];
    return (struct ry_step){.kind = RY_STEP_EXPAND,
                            .group = -1,
                            .peer = 1,
                            .from = {RY_AT_STAGE, -1, at[n]},
                            .to = {RY_AT_RECV, rank, 0},
                            .bytes = t.bytes[rank],
                            .repeats = {.row_bytes = W, .distinct = distinct[n]},
                            .rows = all[n],
                            .skip = skip};
}

static struct ry_step copy(int rank, uint64_t to)
{
    return (struct ry_step){.kind = RY_STEP_COPY,
                            .group = -1,
                            .peer = -1,
                            .from = {RY_AT_SEND, rank, 0},
                            .to = {RY_AT_STAGE, -1, to},
                            .bytes = t.bytes[rank]};
}

START_TEST(there_and_back)
{
    start();
    scan(W);
    ck_assert_str_eq(launched, "pscrcn"); /* put, sample, compare, recompare, count, number */
    for (int n = 0; n < NODES; n++) {
        ck_assert_uint_eq(t.repeats[n].row_bytes, n ? W : 0);
        ck_assert_uint_eq(t.repeats[n].distinct, distinct[n]);
    }
    ck_assert_uint_eq(t.sums.rows, 21);
    ck_assert_uint_eq(t.sums.distinct, 9);
    ck_assert_uint_eq(t.sums.zero, 3);
    /* All messages in one launch, all pieces in one; copies among them in one of their own. */
    struct ry_step steps[] = {pack(1),      copy(1, 1500), pack(2),      copy(0, 2900), pack(3),
                              expand(1, 0), expand(2, 5),  expand(3, 0), expand(5, 0)};
    ok(run(steps, 9));
    ck_assert_str_eq(launched, "cpe");
    for (int p = 1; p < RANKS; p++)
        arrived(p);
    end();
}
END_TEST

/* A relay writes out a piece in staging memory, whose bytes another step reads: that one must come later. */
START_TEST(what_depends)
{
    start();
    scan(W);
    struct ry_step relay = expand(2, 5), back = copy(2, 0), again = expand(2, 5);
    relay.to = (struct ry_at){RY_AT_STAGE, -1, 8192};
    back.from = relay.to, back.to = again.to;
    struct ry_step steps[] = {pack(1), relay, back, expand(1, 0)};
    ok(run(steps, 4));
    ck_assert_str_eq(launched, "peCe");
    arrived(2);
    arrived(1);
    /* Pieces that are written over each other, or over a message: one after the other. */
    struct ry_step one = expand(3, 0), over = expand(3, 0);
    one.to = over.to = relay.to;
    over.to.offset += 8;
    back.from = over.to, back.to = (struct ry_at){RY_AT_RECV, 3, 0}, back.bytes = t.bytes[3];
    struct ry_step twice[] = {pack(2), one, over, back};
    ok(run(twice, 4));
    ck_assert_str_eq(launched, "peeC");
    arrived(3);
    one.to.offset = at[1] - 64; /* runs into the message that is expanded next: it then names other rows */
    struct ry_step into[] = {pack(1), pack(2), expand(3, 0), one, expand(2, 5)};
    ok(run(into, 5));
    ck_assert_str_eq(launched, "pee");
    ok(device->stream_sync(t.stream, &err));
    ry_rows_expand_errors(t.runner->rows);
    end();
}
END_TEST

/* More messages and pieces than one collection holds. */
START_TEST(many)
{
    enum { N = 150 };
    struct ry_step steps[2 * N];
    start();
    scan(W);
    for (int i = 0; i < N; i++) {
        steps[i] = pack(3);
        steps[i].to.offset = (uint64_t)i * 256;
        steps[N + i] = expand(5, (uint64_t)i % 8);
        steps[N + i].from.offset = (uint64_t)i * 256;
        steps[N + i].bytes = W;
        steps[N + i].to = i < 8 ? (struct ry_at){RY_AT_RECV, 5, (uint64_t)i * W}
                                : (struct ry_at){RY_AT_STAGE, -1, (uint64_t)(N + i) * 256};
    }
    ok(run(steps, 2 * N));
    ck_assert_str_eq(launched, "pppeee");
    arrived(5);
    end();
}
END_TEST

static void refused(struct ry_step step, const char *why)
{
    struct ry_step steps[] = {copy(0, 0), step};
    err.msg[0] = 0;
    ck_assert_msg(run(steps, 2) == -1, "not refused: %s", why);
    ck_assert_msg(strstr(err.msg, why) && strstr(err.msg, "step 1 of the plan, which"), "%s, not %s", err.msg, why);
    ck_assert_str_eq(launched, "");
}

#define BUT(step, ...)                                                                                                 \
    ({                                                                                                                 \
        struct ry_step but = step;                                                                                     \
        but.__VA_ARGS__;                                                                                               \
        but;                                                                                                           \
    })

START_TEST(refusals)
{
    const char *fits = "its message does not fit", *found = "not what the latest search found",
               *inside = "its rows are not in the message", *rows_fit = "its rows do not fit";
    start();
    refused(pack(1), found); /* nothing was searched */
    ok(ry_run_scan(t.runner, &map, &t.b, W, 1, &err));
    refused(pack(1), found); /* the result was not waited for */
    scan(W);
    refused(BUT(pack(1), peer = 4), found);
    refused(BUT(pack(1), peer = -1), found);
    refused(BUT(pack(1), peer = 0), found);
    refused(BUT(pack(1), bytes -= 1), fits);
    refused(BUT(pack(1), to.offset += 8), fits);
    refused(BUT(pack(1), to.offset = M - 16), fits);
    refused(BUT(pack(1), to.offset = UINT64_MAX - 15), fits);
    refused(BUT(pack(1), to.place = RY_AT_RECV), fits);
    refused(BUT(pack(1), repeats.row_bytes = 0), fits);
    refused(BUT(pack(1), repeats.distinct = 4, but.bytes = ry_rows_message_bytes(W, 4, 8)), found);
    refused(BUT(pack(1), repeats.row_bytes = 24, but.bytes = ry_rows_message_bytes(24, 5, 8)), found);
    refused(BUT(pack(1), rows = 9, but.bytes = ry_rows_message_bytes(W, 5, 9)), found);
    refused(BUT(expand(2, 5), from.offset += 4), fits);
    refused(BUT(expand(2, 5), from.offset = M - 32), fits);
    refused(BUT(expand(2, 5), from.place = RY_AT_SEND), fits);
    refused(BUT(expand(2, 5), repeats.row_bytes = 0), fits);
    refused(BUT(expand(2, 5), repeats.row_bytes = UINT64_MAX / 2), fits);
    refused(BUT(expand(2, 5), repeats.distinct = UINT64_MAX / 2), fits);
    refused(BUT(expand(2, 5), rows = RY_ROWS_MOST + 1), fits);
    refused(BUT(expand(2, 5), peer = RANKS), fits);
    refused(BUT(expand(2, 5), skip = 6), inside);
    refused(BUT(expand(2, 5), skip = UINT64_MAX), inside);
    refused(BUT(expand(2, 5), bytes += 1), inside);
    refused(BUT(expand(2, 4), bytes += 1), rows_fit);
    refused(BUT(expand(2, 5), bytes = 0), inside);
    refused(BUT(expand(2, 5), to.offset = 1), rows_fit);
    refused(BUT(expand(2, 5), to.peer = RANKS), rows_fit);
    refused(BUT(expand(2, 5), to.peer = 4), rows_fit);
    refused(BUT(expand(2, 5), to.place = RY_AT_SEND), rows_fit);
    refused(BUT(expand(2, 5), to = ((struct ry_at){RY_AT_STAGE, -1, M - W})), rows_fit);
    refused(BUT(expand(2, 5), to = ((struct ry_at){RY_AT_STAGE, -1, at[1] + message(1) - 1})), rows_fit);
    refused(BUT(expand(2, 5), to = ((struct ry_at){RY_AT_STAGE, -1, at[1] - 3 * W + 1})), rows_fit);
    /* Other buffers than those that were searched: a segment elsewhere, longer, new or gone. */
    const void *there = t.send[2];
    t.send[2] = (const char *)there + 1;
    refused(pack(1), "of other buffers");
    t.send[2] = there;
    t.bytes[1]--;
    refused(pack(1), "of other buffers");
    t.bytes[1] = 0;
    refused(pack(1), "of other buffers");
    t.bytes[1] = 4 * W + 7;
    t.bytes[4] = 1;
    refused(pack(3), "of other buffers");
    t.bytes[4] = 0;
    struct ry_step good[] = {pack(1), pack(2), pack(3)};
    ok(run(good, 3));
    /* A scan that fails leaves nothing to pack. */
    ck_assert_int_eq(ry_run_scan(t.runner, &map, &t.b, 0, 1, &err), -1);
    ck_assert_int_eq(ry_run_scan_wait(t.runner, t.repeats, &t.sums, &err), -1);
    ck_assert(!ry_run_scan_over(t.runner));
    refused(pack(1), found);
    end();
}
END_TEST

/* Any width is right, and one that finds nothing says so. */
START_TEST(other_widths)
{
    start();
    for (uint64_t width = 1; width < 400; width += 1 + width / 3) {
        struct ry_step steps[2 * NODES + RANKS];
        uint64_t stage = 0;
        int n = 0;
        scan(width);
        for (int m = 1; m < NODES; m++) {
            uint64_t skip = 0, nrows = 0;
            for (int p = 0; p < RANKS; p++)
                nrows += node[p] == m ? ry_rows_of(t.bytes[p], width) : 0;
            struct ry_step step = {
                .kind = RY_STEP_PACK, .group = -1, .peer = m, .repeats = t.repeats[m], .rows = nrows};
            step.to = (struct ry_at){RY_AT_STAGE, -1, stage};
            step.bytes = ry_rows_message_bytes(width, t.repeats[m].distinct, nrows);
            steps[n++] = step;
            for (int p = 0; p < RANKS; p++)
                if (node[p] == m && t.bytes[p]) {
                    step.kind = RY_STEP_EXPAND, step.peer = p, step.from = step.to, step.skip = skip;
                    steps[n] = step;
                    steps[n].to = (struct ry_at){RY_AT_RECV, p, 0};
                    steps[n++].bytes = t.bytes[p];
                    skip += ry_rows_of(t.bytes[p], width);
                }
            stage += (step.bytes + 8191) / 4096 * 4096;
        }
        ok(device->fill(t.recv[1], 0xee, t.bytes[1], t.stream, &err));
        ok(run(steps, n));
        for (int p = 1; p < RANKS; p++)
            arrived(p);
    }
    end();
}
END_TEST

/* The scanner's memory counts as staging memory does, and goes back with the runner. */
START_TEST(memory)
{
    start();
    uint64_t stage = ry_run_staging(t.runner), big = 30000;
    ry_run_staging_limit(stage + 1000);
    ck_assert_int_eq(ry_run_scan(t.runner, &map, &t.b, W, 1, &err), -1);
    ck_assert_msg(strstr(err.msg, "RAILYARD_STAGING"), "%s", err.msg);
    ck_assert_str_eq(launched, "");
    uint64_t need = ry_rows_memory(t.runner->rows, 21);
    ry_run_staging_limit(stage + need + 100);
    scan(W);
    ck_assert_uint_eq(ry_rows_held(t.runner->rows), need);
    struct ry_cluster two = {.nranks = RANKS, .nnodes = 2, .node = (int[RANKS]){0, 1, 1, 1, 1, 1}};
    ok(ry_run_scan(t.runner, &two, &t.b, W, 1, &err)); /* another map, of the same ranks */
    ok(ry_run_scan_wait(t.runner, t.repeats, &t.sums, &err));
    ck_assert_uint_eq(t.sums.rows, 21);
    ck_assert_uint_eq(t.sums.distinct, 8); /* A, ..., E, X, zeros, the short one */
    ck_assert_uint_eq(t.repeats[1].distinct, 8);
    void *segment;
    ok(device->alloc(&segment, big, &err));
    ok(device->fill(segment, 1, big, t.stream, &err));
    t.send[3] = segment, t.bytes[3] = big;
    ck_assert_int_eq(ry_run_scan(t.runner, &map, &t.b, 1, 1, &err), -1);
    ck_assert_msg(strstr(err.msg, "RAILYARD_STAGING"), "%s", err.msg);
    ry_run_staging_limit(64 * M);
    scan(1);
    ck_assert_uint_eq(t.repeats[2].distinct, 1);
    scan(W);
    ck_assert_uint_eq(t.repeats[2].distinct, big % W ? 2 : 1);
    uint64_t held = ry_rows_held(t.runner->rows);
    ck_assert_uint_ge(ry_rows_capacity(t.runner->rows), big);
    ck_assert(!ry_run_staging_reserve(64 * M - stage - held + 1));
    end();
    ck_assert(ry_run_staging_reserve(64 * M)); /* all of it is free again */
    ok(device->release(segment, &err));
}
END_TEST

/* A list that was damaged on its way: nothing is written out of bounds, and it does not pass silently. */
START_TEST(damage)
{
    struct ry_mismatch bad;
    uint64_t equal;
    uint32_t wrong = 77;
    start();
    scan(W);
    struct ry_step steps[] = {pack(3), expand(5, 0)};
    ok(run(steps, 1));
    ok(device->copy((char *)t.runner->stage + at[3] + W + 4 * 2, &wrong, sizeof wrong, t.stream, &err));
    ok(run(steps + 1, 1));
    ok(device->stream_sync(t.stream, &err));
    ck_assert(ry_run_checks(t.runner, &equal, &bad));
    ck_assert_int_eq(bad.peer, -1);
    ck_assert_uint_eq(equal, 0);
    ck_assert(!ry_run_checks(t.runner, &equal, &bad));
    ok(run(steps, 2));
    ck_assert(!ry_run_checks(t.runner, &equal, &bad));
    arrived(5);
    end();
}
END_TEST

/* ---- sums ---- */

/* Each number a row of so many, as elements of fp32. */
static void numbers(int rank, const float *number, int n)
{
    float row[W / 4];
    t.bytes[rank] = (uint64_t)n * W;
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < W / 4; k++)
            row[k] = number[i];
        memcpy(t.content[rank] + (size_t)i * W, row, W);
    }
    ok(device->copy((void *)(uintptr_t)t.send[rank], t.content[rank], t.bytes[rank], t.stream, &err));
}

enum { FP32 = 7, BF16 = 9, GOT = 8192, BACK = 16384, SUMS = 24576 };

/* As what came from rank `peer`: the message for node n, received at GOT + at[n] and marked so. */
static void relay(struct ry_step *steps, int peer, int n)
{
    steps[0] =
        (struct ry_step){.kind = RY_STEP_SEND, .peer = peer, .from = {RY_AT_STAGE, -1, at[n]}, .bytes = message(n)};
    steps[1] = (struct ry_step){.kind = RY_STEP_RECV,
                                .peer = peer,
                                .to = {RY_AT_STAGE, -1, GOT + at[n]},
                                .from = {RY_AT_STAGE, -1, GOT + at[n]},
                                .bytes = message(n),
                                .repeats = {.row_bytes = W, .distinct = distinct[n]},
                                .rows = all[n]};
}

/* An exchange in which this rank relayed the messages for nodes 1 and 2 as ranks 1 and 3 might have sent them. */
static struct ry_kept *kept(void)
{
    struct ry_step steps[6] = {pack(1), pack(2)};
    struct ry_plan plan = {.strategy = RY_DEDUP, .nranks = RANKS, .stage_bytes = M, .nsteps = 6, .steps = steps};
    struct ry_kept *k = (struct ry_kept *)&plan;
    relay(steps + 2, 1, 1);
    relay(steps + 4, 3, 2);
    nsent = nreceived = 0;
    ok(run(steps, 6));
    *launched = 0;
    ok(ry_run_keep(t.runner, &plan, &t.b, &k, &err));
    return k;
}

static struct ry_step sum_of(int peer, int n)
{
    return (struct ry_step){.kind = RY_STEP_SUM,
                            .group = -1,
                            .peer = peer,
                            .from = {RY_AT_STAGE, -1, BACK + at[n]},
                            .to = {RY_AT_STAGE, -1, SUMS + 2 * at[n]},
                            .bytes = ry_rows_message_bytes(W, distinct[n] + 1, all[n]),
                            .repeats = {.row_bytes = W, .distinct = distinct[n]},
                            .rows = all[n]};
}

/* All rows of that sum to the receive segment of `rank`. */
static struct ry_step out_of(const struct ry_step *sum, int rank)
{
    return (struct ry_step){.kind = RY_STEP_EXPAND,
                            .group = -1,
                            .peer = 1,
                            .from = sum->to,
                            .to = {RY_AT_RECV, rank, 0},
                            .bytes = sum->rows * W,
                            .repeats = {.row_bytes = W, .distinct = sum->repeats.distinct + 1},
                            .rows = sum->rows};
}

static void got(int rank, const float *want, int n)
{
    float row[8][W / 4];
    ok(device->copy(row, t.recv[rank], (uint64_t)n * W, t.stream, &err));
    ok(device->stream_sync(t.stream, &err));
    for (int i = 0; i < n; i++)
        for (int k = 0; k < W / 4; k++)
            ck_assert_msg(row[i][k] == want[i], "rank %d, row %d: %g, not %g", rank, i, (double)row[i][k],
                          (double)want[i]);
}

START_TEST(sums)
{
    start();
    scan(W);
    struct ry_kept *k = kept();
    ck_assert_str_eq(launched, "lpfo"); /* both messages: list, place, fill, order */
    ck_assert_uint_gt(ry_kept_bytes(k), 0);
    /* Other plans run over what lay there. */
    struct ry_step over[] = {copy(1, GOT), copy(1, GOT + at[1]), copy(1, GOT + at[1] + 200), copy(2, GOT + at[2])};
    ok(run(over, 4));
    /* ABCA7BBD; A...E as the rows of rank 3, in front of which lies more. */
    numbers(5, (const float[]){1, 2, 4, 8, 16, 32, 64, 128}, 8);
    numbers(3, (const float[]){1, 2, 4, 8, 16}, 5);
    t.b.type = FP32;
    t.b.kept = k;
    struct ry_step first = sum_of(1, 1), second = sum_of(3, 2);
    second.from = (struct ry_at){RY_AT_SEND, 3, 0};
    struct ry_step steps[] = {copy(5, BACK + at[1]), first, second, out_of(&first, 5), out_of(&second, 3)};
    ok(run(steps, 5));
    ck_assert_str_eq(launched, "C++e"); /* one for what begins at an odd address */
    got(5, (const float[]){9, 98, 4, 0, 16, 0, 0, 128}, 8);
    got(3, (const float[]){1, 14, 0, 0, 16}, 5);
    /* Sums of which one reads what the other wrote come one after the other. */
    struct ry_step again = sum_of(1, 1); /* 9 98 4 16 128 0 are its rows, then the list and nothing */
    ok(device->fill((char *)t.runner->stage + SUMS, 0, 8192, t.stream, &err));
    again.from = first.to;
    again.to.offset = SUMS + 8192;
    struct ry_step chain[] = {copy(5, BACK + at[1]), first, again, out_of(&again, 5)};
    ok(run(chain, 4));
    ck_assert_str_eq(launched, "C++e");
    got(5, (const float[]){25, 98, 4}, 3);
    ry_kept_free(k);
    t.b.kept = NULL;
    end();
}
END_TEST

START_TEST(sums_refused)
{
    const char *place = "its message does not fit", *rows_fit = "its rows do not fit", *none = "no list was kept",
               *other = "is another one";
    start();
    scan(W);
    struct ry_kept *k = kept();
    t.b.type = FP32;
    refused(sum_of(1, 1), none);
    t.b.kept = k;
    refused(BUT(sum_of(1, 1), peer = 2), none);
    refused(BUT(sum_of(1, 1), peer = -1), none);
    refused(sum_of(1, 2), other);
    refused(BUT(sum_of(1, 1), rows = 7), other);
    refused(BUT(sum_of(1, 1), repeats.distinct = 6), other);
    refused(BUT(sum_of(1, 1), repeats.row_bytes = 2 * W), other);
    refused(BUT(sum_of(1, 1), bytes += 1), place);
    refused(BUT(sum_of(1, 1), to.offset += 8), place);
    refused(BUT(sum_of(1, 1), to.offset = M - 16), place);
    refused(BUT(sum_of(1, 1), to.offset = UINT64_MAX - 15), place);
    refused(BUT(sum_of(1, 1), to = ((struct ry_at){RY_AT_RECV, 5, 0})), place);
    refused(BUT(sum_of(1, 1), from.offset = M - 16), rows_fit);
    refused(BUT(sum_of(1, 1), from.offset = SUMS + 2 * at[1] - 8 * W + 1), rows_fit);
    refused(BUT(sum_of(1, 1), from.offset = SUMS + 2 * at[1] + 6 * W), rows_fit);
    refused(BUT(sum_of(1, 1), from = ((struct ry_at){RY_AT_SEND, 1, 0})), rows_fit);
    refused(BUT(sum_of(1, 1), from = ((struct ry_at){RY_AT_SEND, 5, 1})), rows_fit);
    refused(BUT(sum_of(1, 1), from = ((struct ry_at){RY_AT_SEND, 4, 0})), rows_fit);
    refused(BUT(sum_of(1, 1), from = ((struct ry_at){RY_AT_SEND, RANKS, 0})), rows_fit);
    refused(BUT(sum_of(1, 1), from = ((struct ry_at){RY_AT_RECV, 5, 0})), rows_fit);
    t.b.type = 8;
    refused(sum_of(1, 1), "cannot be summed");
    ck_assert(ry_run_sums(6) && ry_run_sums(FP32) && ry_run_sums(BF16) && !ry_run_sums(8));
    ck_assert_uint_eq(ry_run_sums_bytes(BF16), 2);
    t.b.type = FP32;
    struct ry_step good[] = {sum_of(1, 1), sum_of(3, 2)};
    ok(run(good, 2));
    ck_assert_str_eq(launched, "+");
    ry_kept_free(k);
    t.b.kept = NULL;
    /* The limit, and messages that are none. */
    ry_run_staging_limit(0);
    struct ry_step steps[6] = {pack(1), pack(2)};
    struct ry_plan plan = {.strategy = RY_DEDUP, .nranks = RANKS, .stage_bytes = M, .nsteps = 6, .steps = steps};
    relay(steps + 2, 1, 1);
    relay(steps + 4, 3, 2);
    ck_assert_int_eq(ry_run_keep(t.runner, &plan, &t.b, &k, &err), -1);
    ck_assert(!k && strstr(err.msg, "RAILYARD_STAGING"));
    ry_run_staging_limit(64 * M);
    steps[3].bytes++;
    ck_assert_int_eq(ry_run_keep(t.runner, &plan, &t.b, &k, &err), -1);
    steps[3].bytes--, steps[3].to.offset = UINT64_MAX - 15;
    ck_assert_int_eq(ry_run_keep(t.runner, &plan, &t.b, &k, &err), -1);
    ck_assert(!k);
    plan.nsteps = 2; /* nothing relayed: an empty list is one, too */
    ok(ry_run_keep(t.runner, &plan, &t.b, &k, &err));
    ck_assert(k && !ry_kept_bytes(k));
    ry_kept_free(k);
    ry_kept_free(NULL);
    end();
}
END_TEST

/* Kept lists are older than the runner's end, and damaged ones are told. */
START_TEST(sums_outlive)
{
    uint64_t equal;
    struct ry_mismatch bad;
    start();
    scan(W);
    struct ry_kept *k = kept();
    ck_assert(!ry_run_checks(t.runner, &equal, &bad));
    struct ry_step steps[6] = {pack(1), pack(2)};
    relay(steps + 2, 1, 1);
    steps[3].repeats.distinct--; /* entries then name more than there are; the list begins 48 bytes before */
    steps[3].bytes = ry_rows_message_bytes(W, distinct[1] - 1, all[1]);
    struct ry_plan plan = {.strategy = RY_DEDUP, .nranks = RANKS, .stage_bytes = M, .nsteps = 4, .steps = steps};
    struct ry_kept *damaged;
    ok(ry_run_keep(t.runner, &plan, &t.b, &damaged, &err));
    ok(device->stream_sync(t.stream, &err));
    ck_assert(ry_run_checks(t.runner, &equal, &bad));
    ck_assert_int_eq(bad.peer, -1);
    ry_kept_free(damaged);
    end();
    ry_kept_free(k);
}
END_TEST

/* All that is sent, wherever it goes: ABC ABCA7 BBD A...E XXXXXXXX. */
START_TEST(copies)
{
    struct ry_copies c;
    start();
    ck_assert(!ry_run_copies_over(t.runner, &c));
    ok(ry_run_copies(t.runner, &t.b, W, 0, &err));
    scan(W); /* the one does not disturb the other */
    ck_assert(ry_run_copies_over(t.runner, &c));
    ck_assert_uint_eq(c.rows, 24);
    ck_assert_uint_eq(c.distinct, 8);
    ck_assert_uint_eq(c.zero, 3);
    ck_assert_uint_eq(c.least, 1);
    ck_assert_uint_eq(c.most, 8);
    struct ry_step steps[] = {pack(1), pack(2), pack(3), expand(1, 0), expand(2, 5), expand(3, 0), expand(5, 0)};
    ok(run(steps, 7));
    for (int p = 1; p < RANKS; p++)
        arrived(p);
    numbers(1, (const float[]){1, 2, 3, 3}, 4);
    numbers(5, (const float[]){2, 1}, 2);
    t.bytes[0] = t.bytes[2] = t.bytes[3] = 0;
    ok(ry_run_copies(t.runner, &t.b, W, 0, &err));
    ok(device->stream_sync(t.stream, &err));
    ck_assert(ry_run_copies_over(t.runner, &c));
    ck_assert(c.rows == 6 && c.distinct == 3 && !c.zero && c.least == 2 && c.most == 2);
    t.bytes[1] = t.bytes[5] = 0;
    ok(ry_run_copies(t.runner, &t.b, W, 0, &err));
    ok(device->stream_sync(t.stream, &err));
    ck_assert(ry_run_copies_over(t.runner, &c));
    ck_assert(!c.rows && !c.distinct && !c.least && !c.most);
    ck_assert_int_eq(ry_run_copies(t.runner, &t.b, 0, 0, &err), -1);
    ck_assert(!ry_run_copies_over(t.runner, &c));
    end();
}
END_TEST

static void add_tests(TCase *c, bool cuda)
{
    tcase_add_test(c, there_and_back);
    tcase_add_test(c, what_depends);
    tcase_add_test(c, many);
    tcase_add_test(c, refusals);
    tcase_add_test(c, other_widths);
    tcase_add_test(c, memory);
    tcase_add_test(c, damage);
    tcase_add_test(c, sums);
    tcase_add_test(c, sums_refused);
    tcase_add_test(c, sums_outlive);
    tcase_add_test(c, copies);
}

int main(void)
{
    return on_devices("run_packed", add_tests);
}
