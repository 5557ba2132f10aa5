/*
 * test_run.c: running plans: what NCCL is told, errors, which copies go together, which buffers are safe, staging
 * memory and its limit. Whole exchanges: test_run_order.c.
 */
#include <check.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "run/internal.h"
#include "sim_device.h"

static struct ry_err err;

#define ok(call)                                                                                                       \
    do {                                                                                                               \
        if (call)                                                                                                      \
            ck_abort_msg("%s: %s", #call, err.msg);                                                                    \
    } while (0)

/* ---- what NCCL is told: calls written down ---- */

static char told[4096];
static int calls, fails_at, fails_with;

static int tell(const char *fmt, ...)
{
    va_list ap;
    size_t n = strlen(told);
    va_start(ap, fmt);
    vsnprintf(told + n, sizeof told - n, fmt, ap);
    va_end(ap);
    return ++calls == fails_at ? fails_with : 0;
}

static int tell_start(void)
{
    return tell("(");
}
static int tell_end(void)
{
    return tell(")");
}
static int tell_send(const void *buf, size_t bytes, int type, int peer, void *comm, void *stream)
{
    return tell(" s%d%s:%zu@%zx/%d", peer, comm ? "!" : "", bytes, (size_t)(uintptr_t)buf, type);
}
static int tell_recv(void *buf, size_t bytes, int type, int peer, void *comm, void *stream)
{
    return tell(" r%d%s:%zu@%zx/%d", peer, comm ? "!" : "", bytes, (size_t)(uintptr_t)buf, type);
}
static int tell_copy(void *dst, const void *src, size_t bytes, void *stream, struct ry_err *e)
{
    return tell(" c%zu", bytes) ? ry_fail(e, "no copy") : 0;
}
static int tell_launch(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *stream,
                       struct ry_err *e)
{
    const struct ry_segments *t = param;
    return tell(" %s%u", kernel->name + 3, t->n) ? ry_fail(e, "no launch") : 0;
}
/* Where streams and events are told apart: "+" is a stream that is not the job's (NULL); events are a, b, … as they
 * come. */
static bool named;
static const char *name_of(const struct ry_event *ev, const void *stream)
{
    static const struct ry_event *known[16];
    static char name[2][3];
    static int turn;
    int i = 0;
    if (!named)
        return memset(known, 0, sizeof known), "";
    while (known[i] && known[i] != ev)
        i++;
    known[i] = ev;
    char *to = name[turn ^= 1];
    snprintf(to, sizeof name[0], "%c%s", 'a' + i % 16, stream ? "+" : "");
    return to;
}
static int tell_record(struct ry_event *ev, void *stream, struct ry_err *e)
{
    if (named)
        return tell(" !%s", name_of(ev, stream)) ? ry_fail(e, "no event") : 0;
    return tell(" e") ? ry_fail(e, "no event") : 0;
}
static int tell_wait(void *stream, struct ry_event *ev, struct ry_err *e)
{
    return tell(named ? " ?%s" : " w", name_of(ev, stream)) ? ry_fail(e, "no wait") : 0;
}
static int host_event(struct ry_event **ev, struct ry_err *e)
{
    return ry_device_host()->event_create_untimed(ev, e);
}

static const struct ry_nccl telling = {
    .group_start = tell_start, .group_end = tell_end, .send = tell_send, .recv = tell_recv};
static struct ry_device telling_device;

static void telling_start(void)
{
    telling_device = *ry_device_host();
    telling_device.copy = tell_copy;
    telling_device.launch = tell_launch;
    telling_device.event_create_untimed = host_event;
    telling_device.event_record = tell_record;
    telling_device.stream_wait = tell_wait;
    ry_run_staging_limit(1 << 30);
}

#define AT_SEND(p, o)                                                                                                  \
    {                                                                                                                  \
        RY_AT_SEND, p, o                                                                                               \
    }
#define AT_RECV(p, o)                                                                                                  \
    {                                                                                                                  \
        RY_AT_RECV, p, o                                                                                               \
    }
#define AT_STAGE(o)                                                                                                    \
    {                                                                                                                  \
        RY_AT_STAGE, -1, o                                                                                             \
    }
#define COPY(t, f, n)                                                                                                  \
    {                                                                                                                  \
        .kind = RY_STEP_COPY, .group = -1, .peer = -1, .to = t, .from = f, .bytes = n                                  \
    }
#define SEND(g, p, f, n)                                                                                               \
    {                                                                                                                  \
        .kind = RY_STEP_SEND, .group = g, .peer = p, .from = f, .bytes = n                                             \
    }
#define RECV(g, p, t, n)                                                                                               \
    {                                                                                                                  \
        .kind = RY_STEP_RECV, .group = g, .peer = p, .to = t, .bytes = n                                               \
    }

#define HUGE (UINT64_C(5) << 30)
static const void *two_sends[] = {(void *)0x100000, (void *)0x200000};
static void *two_recvs[] = {(void *)0x1000000000, (void *)0x3000000000};
static const uint64_t two_bytes[] = {1000, HUGE};
static const struct ry_buffers two = {2, 0, two_sends, two_recvs, two_bytes, two_bytes, NULL, 0, NULL};

static void run_told(struct ry_step *steps, int n, uint64_t stage, int rc, int result, const char *want)
{
    struct ry_plan plan = {.strategy = RY_HIERARCHICAL, .nranks = 2, .stage_bytes = stage, .nsteps = n, .steps = steps};
    struct ry_runner *r = ry_runner_new(&telling, &telling_device, 0, NULL, &err);
    int got = -1, sent;
    ck_assert_ptr_nonnull(r);
    fails_at = stage ? fails_at + 1 : fails_at; /* growing records an event */
    calls = 0;
    ok(ry_run_staging_grow(r, stage, NULL, &err));
    *told = 0;
    err.msg[0] = 0;
    sent = ry_run(r, &plan, &two, NULL, &got, &err);
    ck_assert_msg(sent == rc && (rc || got == result), "%d, %d: %s", sent, got, err.msg);
    ck_assert_str_eq(told, want);
    ck_assert_int_eq(!*err.msg, !rc);
    fails_at = 0;
    ry_runner_free(r, false);
}

START_TEST(what_nccl_is_told)
{
    telling_start();
    struct ry_step steps[] = {
        COPY(AT_STAGE(0), AT_SEND(0, 0), 10), COPY(AT_STAGE(10), AT_SEND(0, 10), 20), SEND(0, 1, AT_SEND(1, 0), HUGE),
        RECV(0, 1, AT_RECV(1, 0), HUGE),      SEND(1, 0, AT_SEND(0, 16), 5),          RECV(1, 0, AT_RECV(0, 32), 5),
        COPY(AT_RECV(0, 40), AT_STAGE(0), 7),
    };
    run_told(
        steps, 7, 64, 0, 0,
        " w copy_segments2( s1:5368709120@200000/1 r1:5368709120@3000000000/1)( s0:5@100010/1 r0:5@1000000020/1) c7 e");
    run_told(steps + 2, 4, 0, 0, 0,
             "( s1:5368709120@200000/1 r1:5368709120@3000000000/1)( s0:5@100010/1 r0:5@1000000020/1)");
    run_told(steps, 0, 0, 0, 0, "");
    /* The first error is told, its group is ended, and nothing follows. */
    fails_with = 5;
    fails_at = 2;
    run_told(steps + 2, 4, 0, 0, 5, "( s1:5368709120@200000/1)");
    fails_at = 3;
    run_told(steps + 2, 4, 0, 0, 5, "( s1:5368709120@200000/1 r1:5368709120@3000000000/1)");
    fails_at = 4;
    run_told(steps + 2, 4, 0, 0, 5, "( s1:5368709120@200000/1 r1:5368709120@3000000000/1)");
    fails_at = 1;
    run_told(steps + 2, 4, 0, 0, 5, "(");
    /* With staging memory in use, an event follows all the same. */
    fails_at = 4;
    run_told(steps, 7, 64, 0, 5, " w copy_segments2( s1:5368709120@200000/1) e");
    /* The device refuses: -1. */
    fails_at = 2;
    run_told(steps, 7, 64, -1, 0, " w copy_segments2 e");
    fails_at = 1;
    run_told(steps, 7, 64, -1, 0, " w");
}
END_TEST

/* Copies that depend on each other are not put into one launch; those that do not, are. */
START_TEST(batches)
{
    telling_start();
    struct ry_step through[] = {
        COPY(AT_STAGE(0), AT_SEND(0, 0), 8),   COPY(AT_STAGE(8), AT_SEND(0, 8), 8), COPY(AT_RECV(0, 0), AT_STAGE(4), 8),
        COPY(AT_RECV(0, 8), AT_SEND(0, 0), 4), COPY(AT_STAGE(0), AT_SEND(1, 0), 8), COPY(AT_STAGE(4), AT_SEND(1, 0), 8),
        COPY(AT_STAGE(16), AT_STAGE(0), 4),    COPY(AT_STAGE(20), AT_STAGE(16), 4),
    };
    run_told(through, 8, 64, 0, 0, " w copy_segments2 copy_segments2 c8 c8 c4 c4 e");
    struct ry_step many[300];
    for (int i = 0; i < 300; i++)
        many[i] = (struct ry_step)COPY(AT_STAGE((uint64_t)i), AT_SEND(1, (uint64_t)i), 1);
    run_told(many, 300, 300, 0, 0, " w copy_segments126 copy_segments126 copy_segments48 e");
}
END_TEST

/* What does not fit is refused before NCCL or the device hear of it. */
START_TEST(misfits)
{
    telling_start();
    struct ry_step good = SEND(0, 1, AT_SEND(1, 0), 4);
    struct ry_step bad[] = {
        SEND(0, 2, AT_SEND(1, 0), 4),        SEND(0, -1, AT_SEND(1, 0), 4),        RECV(0, 1, AT_RECV(2, 0), 4),
        RECV(0, 1, AT_SEND(1, 0), 4),        SEND(0, 1, AT_SEND(0, 1000), 4),      RECV(0, 1, AT_STAGE(61), 4),
        RECV(0, 1, AT_STAGE(UINT64_MAX), 4), COPY(AT_RECV(0, 0), AT_STAGE(0), 65), COPY(AT_SEND(0, 0), AT_STAGE(0), 4),
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct ry_step steps[] = {good, bad[i]};
        run_told(steps, 2, 64, -1, 0, "");
        ck_assert_str_eq(err.msg, "step 1 of the plan does not fit the job's buffers");
    }
    const void *none[] = {NULL, NULL};
    struct ry_buffers b = two;
    struct ry_plan plan = {.nranks = 2, .nsteps = 1, .steps = &good};
    struct ry_runner *r = ry_runner_new(&telling, &telling_device, 0, NULL, &err);
    int result;
    *told = 0;
    b.send = none;
    ck_assert_int_eq(ry_run(r, &plan, &b, NULL, &result, &err), -1);
    b = two, plan.rank = 1;
    ck_assert_int_eq(ry_run(r, &plan, &b, NULL, &result, &err), -1);
    ck_assert_str_eq(err.msg, "a plan for rank 1 of 2 does not fit rank 0 of 2");
    plan.rank = 0, plan.stage_bytes = 100;
    ck_assert_int_eq(ry_run(r, &plan, &b, NULL, &result, &err), -1);
    ck_assert_str_eq(err.msg, "the plan needs 100 bytes of staging memory, 0 are held");
    ck_assert_str_eq(told, "");
    ry_runner_free(r, false);
}
END_TEST

/* The second part of a plan on a stream of its own, behind the groups that it waits for; or after the first, where the
 * groups inside the node have no communicator of their own. */
START_TEST(beside)
{
    static const int local[] = {0, 1};
    struct ry_run_node node = {.local = local, .comm = (void *)0x77};
    struct ry_step steps[] = {SEND(0, 1, AT_SEND(1, 0), 1), SEND(1, 1, AT_SEND(1, 0), 2), SEND(2, 1, AT_SEND(1, 0), 3),
                              SEND(3, 1, AT_SEND(1, 0), 4), SEND(4, 1, AT_SEND(1, 0), 5), SEND(5, 1, AT_SEND(1, 0), 6)};
    struct ry_plan plan = {
        .strategy = RY_DEDUP, .nranks = 2, .ngroups = 6, .nsteps = 6, .steps = steps, .inside = 7 << 3, .beside = 3};
    const char *first[3] = {"( s1:1@200000/1)", "( s1:2@200000/1)", "( s1:3@200000/1)"};
    char want[512];
    int result;
    telling_start();
    named = false, name_of(NULL, NULL), named = true;
    calls = 0, fails_at = -1;
    struct ry_runner *r = ry_runner_new(&telling, &telling_device, 0, NULL, &err);
    steps[3].after = 0, steps[4].after = 2, steps[5].after = 1;
    *told = 0;
    ok(ry_run(r, &plan, &two, &node, &result, &err));
    /* begun a; groups are over b, c, d; joined e. The last step waited with the one before it. */
    snprintf(want, sizeof want,
             " !a ?a+%s !b%s !c%s !d ?b+( s1!:4@200000/1) ?d+( s1!:5@200000/1)( s1!:6@200000/1) !e+ ?e", first[0],
             first[1], first[2]);
    ck_assert_str_eq(told, want);
    /* a group in which this rank has nothing: what comes after it waits for the one before */
    steps[4].after = 1, steps[1].group = 0;
    *told = 0;
    ok(ry_run(r, &plan, &two, &node, &result, &err));
    snprintf(
        want, sizeof want,
        " !a ?a+( s1:1@200000/1 s1:2@200000/1) !b%s !d ?b+( s1!:4@200000/1)( s1!:5@200000/1)( s1!:6@200000/1) !e+ ?e",
        first[2]);
    ck_assert_str_eq(told, want);
    steps[1].group = 1;
    /* without the node's communicator: one after the other, on the job's stream */
    *told = 0;
    ok(ry_run(r, &plan, &two, NULL, &result, &err));
    snprintf(want, sizeof want, "%s%s%s( s1:4@200000/1)( s1:5@200000/1)( s1:6@200000/1)", first[0], first[1], first[2]);
    ck_assert_str_eq(told, want);
    /* a failure inside: the job's stream waits all the same */
    *told = 0, calls = 0, fails_at = 17, fails_with = 5;
    ok(ry_run(r, &plan, &two, &node, &result, &err));
    ck_assert_int_eq(result, 5);
    ck_assert_str_eq(told + strlen(told) - 8, ") !e+ ?e");
    /* and between nodes: nothing of the second part is begun */
    *told = 0, calls = 0, fails_at = 4;
    ok(ry_run(r, &plan, &two, &node, &result, &err));
    ck_assert_int_eq(result, 5);
    ck_assert_str_eq(told, " !a ?a+( s1:1@200000/1) !e+ ?e");
    fails_at = -1;
    /* what nobody could wait for */
    *told = 0, plan.beside = 7;
    ck_assert_int_eq(ry_run(r, &plan, &two, &node, &result, &err), -1);
    plan.beside = 3, steps[5].after = 4;
    ck_assert_int_eq(ry_run(r, &plan, &two, &node, &result, &err), -1);
    ck_assert_str_eq(told, "");
    ry_runner_free(r, false);
    named = false;
}
END_TEST

/* Groups inside the node on the other communicator, by its numbers; the others where they were. */
START_TEST(inside_the_node)
{
    static const int local[] = {1, 0}, other[] = {-1, 0};
    struct ry_run_node node = {.local = local, .comm = (void *)0x77};
    struct ry_step steps[] = {SEND(0, 1, AT_SEND(1, 0), 7), RECV(0, 1, AT_RECV(1, 0), 7), SEND(1, 0, AT_SEND(0, 0), 5),
                              RECV(1, 1, AT_RECV(0, 0), 5)};
    struct ry_plan plan = {
        .strategy = RY_HIERARCHICAL, .nranks = 2, .ngroups = 2, .nsteps = 4, .steps = steps, .inside = 2};
    const char *first = "( s1:7@200000/1 r1:7@3000000000/1)";
    char want[256];
    int result;
    telling_start();
    struct ry_runner *r = ry_runner_new(&telling, &telling_device, 0, NULL, &err);
    ck_assert_ptr_nonnull(r);
    *told = 0;
    ok(ry_run(r, &plan, &two, &node, &result, &err));
    snprintf(want, sizeof want, "%s( s1!:5@100000/1 r0!:5@1000000000/1)", first);
    ck_assert_str_eq(told, want);
    ck_assert_int_eq(result, 0);
    *told = 0;
    ok(ry_run(r, &plan, &two, NULL, &result, &err));
    snprintf(want, sizeof want, "%s( s0:5@100000/1 r1:5@1000000000/1)", first);
    ck_assert_str_eq(told, want);
    /* One of another node: nothing is done. */
    *told = 0;
    node.local = other;
    ck_assert_int_eq(ry_run(r, &plan, &two, &node, &result, &err), -1);
    ck_assert_str_eq(err.msg, "step 2 of the plan leaves the node in a group that stays inside");
    ck_assert_str_eq(told, "");
    /* NCCL's error is told, and the communicator is free to be aborted. */
    node.local = local;
    calls = 0, fails_at = 6, fails_with = 5;
    ok(ry_run(r, &plan, &two, &node, &result, &err));
    ck_assert_int_eq(result, 5);
    ck_assert_int_eq(node.users, 0);
    fails_at = 0;
    /* It is being aborted: the job's call fails, and never goes another way. */
    *told = 0;
    node.comm = NULL;
    ok(ry_run(r, &plan, &two, &node, &result, &err));
    ck_assert_int_eq(result, 2);
    ck_assert_str_eq(told, first);
    ck_assert_int_eq(node.users, 0);
    ry_runner_free(r, false);
}
END_TEST

static void *find_some(const char *name)
{
    return strcmp(name, "ncclRecv") ? (void *)(uintptr_t)0x1234 : NULL;
}
static void *find_old(const char *name)
{
    return strcmp(name, "ncclCommSplit") ? (void *)(uintptr_t)0x1234 : NULL;
}
static void *find_all(const char *name)
{
    return (void *)(uintptr_t)(strlen(name) * 16);
}

START_TEST(find)
{
    struct ry_nccl nccl;
    ck_assert_int_eq(ry_nccl_find(&nccl, find_some, &err), -1);
    ck_assert_str_eq(err.msg, "the job's NCCL has no ncclRecv");
    ok(ry_nccl_find(&nccl, find_all, &err));
    ck_assert_uint_eq((uintptr_t)nccl.group_start, strlen("ncclGroupStart") * 16);
    ck_assert_uint_eq((uintptr_t)nccl.error_string, strlen("ncclGetErrorString") * 16);
    ck_assert_uint_eq((uintptr_t)nccl.comm_split, strlen("ncclCommSplit") * 16);
    ck_assert_uint_eq((uintptr_t)nccl.comm_abort, strlen("ncclCommAbort") * 16);
    ok(ry_nccl_find(&nccl, find_old, &err)); /* NCCL before 2.18 does for the rest */
    ck_assert(!nccl.comm_split && !nccl.comm_destroy && !nccl.comm_abort);
}
END_TEST

/* ---- buffers ---- */

START_TEST(safe)
{
    enum { MOST = 6 };
    sim_begin();
    for (int round = 0; round < 100000; round++) {
        int n = 1 + (int)draw(MOST);
        uintptr_t at[2][MOST];
        uint64_t bytes[2][MOST];
        bool want = true, in_order = draw(2);
        uintptr_t next = 64;
        uint64_t room = 20 + draw(400);
        for (int k = 0; k < 2; k++)
            for (int p = 0; p < n; p++) {
                bytes[k][p] = draw(4) ? draw(12) : 0;
                at[k][p] = in_order ? next : 64 + draw(room);
                next += bytes[k][p] - (bytes[k][p] && draw(15) == 0) + draw(3);
                if (!bytes[k][p] && draw(2))
                    at[k][p] = 0;
            }
        for (int p = 0; p < n; p++)
            for (int k = 0; k < 2; k++)
                for (int q = 0; q < n; q++)
                    if ((k == 0 || p != q) && bytes[1][p] && bytes[k][q] && at[1][p] < at[k][q] + bytes[k][q] &&
                        at[k][q] < at[1][p] + bytes[1][p])
                        want = false;
        struct ry_buffers b = {n, 0,   (const void *const *)at[0], (void *const *)at[1], bytes[0], bytes[1], NULL,
                               0, NULL};
        if (ry_run_safe(&b) != want)
            ck_abort_msg("round %d: %d segments are %ssafe", round, n, want ? "" : "not ");
    }
    uint64_t one = 1;
    const void *null = NULL;
    void *some = &one;
    ck_assert(!ry_run_safe(&(struct ry_buffers){1, 0, &null, &some, &one, &one, NULL, 0, NULL}));
    sim_end();
}
END_TEST

/* ---- staging memory ---- */

START_TEST(staging)
{
    enum { M = 1 << 20 };
    struct sim_comm comm = {.world = 1};
    void *s1, *s2;
    sim_begin();
    sim_stream_create(&s1, NULL);
    sim_stream_create(&s2, NULL);
    struct ry_runner *a = ry_runner_new(&sim_nccl, &sim_device, 0, &comm, &err),
                     *b = ry_runner_new(&sim_nccl, &sim_device, 0, &comm, &err);
    ry_run_staging_limit(0);
    ck_assert_int_eq(ry_run_staging_grow(a, 1, s1, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "RAILYARD_STAGING"));
    ok(ry_run_staging_grow(a, 0, s1, &err));
    ry_run_staging_limit(10 * M);
    ok(ry_run_staging_grow(a, 1, s1, &err));
    ck_assert_uint_eq(ry_run_staging(a), M);
    ok(ry_run_staging_grow(a, M, s1, &err));
    ck_assert_uint_eq(ry_run_staging(a), M);
    ok(ry_run_staging_grow(a, 3 * M, s2, &err)); /* generous */
    ck_assert_uint_eq(ry_run_staging(a), 4 * M);
    sim_stream_destroy(s2, NULL);
    ok(ry_run_staging_grow(b, 5 * M, s1, &err)); /* as much as there is */
    ck_assert_uint_eq(ry_run_staging(b), 5 * M);
    ck_assert_int_eq(ry_run_staging_grow(b, 7 * M, s1, &err), -1);
    ck_assert_msg(strstr(err.msg, "7340032 bytes") && strstr(err.msg, "9437184 of the process's 10485760"), "%s",
                  err.msg);
    ck_assert_uint_eq(ry_run_staging(b), 5 * M);
    ry_runner_free(a, false);
    sim.most = 6 * M;
    ok(ry_run_staging_grow(b, 6 * M, s1, &err));
    ck_assert_uint_eq(ry_run_staging(b), 6 * M);
    ck_assert_int_eq(ry_run_staging_grow(b, 7 * M, s1, &err), -1);
    ck_assert_str_eq(err.msg, "out of simulated memory");
    ck_assert_uint_eq(ry_run_staging(b), 6 * M);
    ry_runner_free(b, true);
    /* All of it is free again. */
    sim.most = 0;
    struct ry_runner *c = ry_runner_new(&sim_nccl, &sim_device, 0, &comm, &err);
    ok(ry_run_staging_grow(c, 10 * M, s1, &err));
    ry_runner_free(c, false);
    sim_end();
}
END_TEST

/* Runners of several threads share the limit and the memory of answers: for ThreadSanitizer, too. */
static int nothing(void)
{
    return 0;
}
static __thread struct {
    const void *from;
    size_t bytes;
} sent; /* to itself, which is all that these do */
static int keep(const void *buf, size_t bytes, int type, int peer, void *comm, void *stream)
{
    sent.from = buf, sent.bytes = bytes;
    return 0;
}
static int deliver(void *buf, size_t bytes, int type, int peer, void *comm, void *stream)
{
    memcpy(buf, sent.from, bytes);
    return 0;
}

static void *one_thread(void *arg)
{
    static const struct ry_nccl alone = {.group_start = nothing, .group_end = nothing, .send = keep, .recv = deliver};
    struct ry_err e;
    unsigned char out[3000], in[3000];
    const void *send[] = {out};
    void *recv[] = {in};
    uint64_t bytes[] = {sizeof out}, more, equal = 0, verified = 0;
    struct ry_step steps[] = {COPY(AT_STAGE(0), AT_SEND(0, 0), 3000), SEND(0, 0, AT_STAGE(0), 3000),
                              RECV(0, 0, AT_RECV(0, 0), 3000)};
    struct ry_plan plan = {.nranks = 1, .stage_bytes = 3000, .nsteps = 3, .steps = steps};
    struct ry_buffers b = {1, 0, send, recv, bytes, bytes, NULL, 0, NULL};
    struct ry_mismatch bad;
    int result;
    memset(out, (int)(uintptr_t)arg, sizeof out);
    for (int round = 0; round < 200; round++) {
        struct ry_runner *r = ry_runner_new(&alone, ry_device_host(), 0, NULL, &e);
        if (!r)
            return (void *)1;
        for (int i = 0; i < 5 && !ry_run_staging_grow(r, 3000, NULL, &e); i++) {
            if (ry_run_verify(r, &plan, &b, NULL, (uint64_t)i, &result, &e) || result || memcmp(in, out, sizeof in))
                return (void *)2;
            verified++;
            if (i < 4 && ry_run_checks(r, &more, &bad))
                return (void *)3;
            equal += i < 4 ? more : 0;
        }
        ry_runner_free(r, round % 2);
    }
    return equal && equal < verified ? NULL : (void *)4;
}

START_TEST(threads)
{
    pthread_t thread[4];
    ry_run_staging_limit((3 << 20) + (64 << 10)); /* not enough for all to be generous */
    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(pthread_create(&thread[i], NULL, one_thread, (void *)(uintptr_t)(i + 1)), 0);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(thread[i], &wrong);
        ck_assert_msg(!wrong, "thread %d: %d", i, (int)(uintptr_t)wrong);
    }
    /* Everything was given back. */
    struct ry_runner *r = ry_runner_new(&telling, ry_device_host(), 0, NULL, &err);
    ok(ry_run_staging_grow(r, 3 << 20, NULL, &err));
    ry_runner_free(r, false);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("run");
    TCase *t = tcase_create("run");
    tcase_set_timeout(t, 100);
    tcase_add_test(t, what_nccl_is_told);
    tcase_add_test(t, batches);
    tcase_add_test(t, misfits);
    tcase_add_test(t, beside);
    tcase_add_test(t, inside_the_node);
    tcase_add_test(t, find);
    tcase_add_test(t, safe);
    tcase_add_test(t, staging);
    tcase_add_test(t, threads);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
