/*
 * test_run_order.c: whole exchanges of several ranks, also verified, on a simulated device whose streams run late
 * (sim_device.h), since on host memory every order would seem right.
 */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cluster.h"
#include "plan/plan.h"
#include "run/internal.h"
#include "sim_device.h"

static struct ry_err err;

#define ok(call)                                                                                                       \
    do {                                                                                                               \
        if (call)                                                                                                      \
            ck_abort_msg("%s: %s", #call, err.msg);                                                                    \
    } while (0)

struct world {
    struct ry_cluster *cluster;
    struct sim_comm *comms;
    struct ry_runner **runners;
    void *(*streams)[3];
    int verified, skipped, expected_bad;
    uint64_t equal, bad;
};
static int packed, expanded; /* steps */

static void world_start(struct world *w, int nranks, int nodes)
{
    struct ry_seat *seats = calloc((size_t)nranks, sizeof *seats);
    *w = (struct world){0};
    for (int r = 0; r < nranks; r++) {
        seats[r].rank = r;
        snprintf(seats[r].node, sizeof seats[r].node, "%d", (int)draw((uint64_t)nodes));
    }
    w->cluster = ry_cluster_build(seats, nranks, &err);
    free(seats);
    w->comms = calloc((size_t)nranks, sizeof *w->comms);
    w->runners = calloc((size_t)nranks, sizeof(void *));
    w->streams = calloc((size_t)nranks, sizeof *w->streams);
    for (int r = 0; r < nranks; r++) {
        w->comms[r] = (struct sim_comm){.rank = r, .world = nranks};
        w->runners[r] = ry_runner_new(&sim_nccl, &sim_device, 0, &w->comms[r], &err);
        ck_assert_ptr_nonnull(w->runners[r]);
        for (int s = 0; s < 3; s++)
            sim_stream_create(&w->streams[r][s], NULL);
    }
}

static void world_end(struct world *w, bool aborted)
{
    for (int r = 0; r < w->cluster->nranks; r++)
        ry_runner_free(w->runners[r], aborted);
    ry_cluster_free(w->cluster);
    free(w->comms), free(w->runners), free(w->streams);
}

/* Every third exchange is of rows, of which a rank sends the same few to all. */
enum { WIDTH = 24 };
static bool of_rows(int number)
{
    return number % 3 == 0;
}

static unsigned char content(int from, int to, uint64_t i, int number)
{
    if (of_rows(number)) {
        uint64_t token = (i / WIDTH * 5 + (uint64_t)to) % 7;
        return (unsigned char)(token ? i % WIDTH * 37 + token * 11 + (uint64_t)(from * 71 + number * 5) : 0);
    }
    return (unsigned char)(i * 37 + (i >> 8) * 11 + (uint64_t)(from * 71 + to * 13 + number * 5));
}

/* One rank's side: buffers in one block, with gaps at times, and what it looked like afterwards. */
struct side {
    unsigned char *memory, *source, *seen;
    const void **send;
    void **recv;
    size_t bytes, recv_at, recv_bytes;
    struct ry_buffers b;
};

static void side_start(struct side *s, const uint64_t *matrix, int n, int rank, int number, void *stream)
{
    size_t gap = draw(2) ? 0 : draw(40), at = 0;
    uint64_t *bytes = calloc(2 * (size_t)n, sizeof *bytes);
    size_t *offset = calloc(2 * (size_t)n, sizeof *offset);
    for (int k = 0; k < 2; k++) {
        s->recv_at = at;
        for (int p = 0; p < n; p++) {
            size_t i = (size_t)(k * n + p);
            bytes[i] = k ? matrix[p * n + rank] : matrix[rank * n + p];
            offset[i] = at;
            at += bytes[i] + gap;
        }
    }
    s->bytes = at;
    s->recv_bytes = at - s->recv_at;
    s->memory = malloc(at + 1), s->source = malloc(at + 1), s->seen = calloc(1, at + 1);
    memset(s->memory, 0xee, at), memset(s->source, 0xee, at);
    s->send = calloc((size_t)n, sizeof(void *)), s->recv = calloc((size_t)n, sizeof(void *));
    for (int p = 0; p < n; p++) {
        s->send[p] = bytes[p] ? s->memory + offset[p] : NULL;
        s->recv[p] = bytes[n + p] ? s->memory + offset[n + p] : NULL;
        for (uint64_t i = 0; i < bytes[p]; i++)
            s->source[offset[p] + i] = content(rank, p, i, number);
    }
    free(offset);
    s->b = (struct ry_buffers){n, rank, s->send, s->recv, bytes, bytes + n, stream, 0, NULL};
}

static void side_check(struct side *s, int number)
{
    unsigned char *want = malloc(s->bytes + 1);
    memset(want, 0xee, s->bytes);
    for (int p = 0; p < s->b.nranks; p++)
        for (uint64_t i = 0; i < s->b.recv_bytes[p]; i++)
            want[(size_t)((unsigned char *)s->recv[p] - s->memory) + i] = content(p, s->b.rank, i, number);
    for (size_t i = s->recv_at; i < s->bytes; i++)
        if (want[i] != s->seen[i])
            ck_abort_msg("exchange %d, rank %d: byte %zu is %02x, not %02x", number, s->b.rank, i, s->seen[i], want[i]);
    free(want), free(s->memory), free(s->source), free(s->seen), free(s->send), free(s->recv);
    free((void *)(uintptr_t)s->b.send_bytes);
}

static struct ry_plan *plan_of(const struct ry_cluster *cluster, const uint64_t *matrix, const struct side *s,
                               enum ry_strategy strategy, const struct ry_repeats *repeats)
{
    struct ry_slice slice;
    ok(ry_slice_init(&slice, cluster, s->b.rank, strategy, &err));
    ry_slice_fill(&slice, cluster, matrix, repeats);
    struct ry_plan_input in = {.cluster = cluster,
                               .rank = s->b.rank,
                               .strategy = strategy,
                               .send = s->b.send_bytes,
                               .recv = s->b.recv_bytes,
                               .slice = &slice,
                               .repeats = repeats ? repeats + s->b.rank * cluster->nnodes : NULL};
    if (draw(2)) {
        in.send_at = (const uintptr_t *)s->send;
        in.recv_at = (const uintptr_t *)s->recv;
    }
    struct ry_plan *plan = ry_plan_build(&in, &err);
    sim_check(plan, "%s", err.msg);
    ry_slice_free(&slice);
    return plan;
}

static void look(struct world *w)
{
    struct ry_mismatch bad;
    for (int r = 0; r < w->cluster->nranks; r++) {
        uint64_t equal;
        bool wrong;
        do {
            wrong = ry_run_checks(w->runners[r], &equal, &bad);
            w->equal += equal;
            if (!wrong)
                continue;
            w->bad++;
            uint64_t hidden = bad.number - 1000; /* numbered so that all of it is told */
            sim_check(hidden / 100000 == (uint64_t)bad.peer && hidden % 100000 == bad.offset,
                      "%llu: peer %d, offset %llu", (unsigned long long)bad.number, bad.peer,
                      (unsigned long long)bad.offset);
        } while (wrong);
    }
}

/* What a rank finds before the exchange, if it can look; nothing else need be over by then. */
static void scan(struct world *w, const struct side *s, struct ry_repeats *repeats)
{
    struct ry_runner *r = w->runners[s->b.rank];
    struct ry_scan_sums sums;
    if (!ry_run_packs(r) || ry_run_scan(r, w->cluster, &s->b, draw(6) ? WIDTH : 1 + draw(50), 1, &err))
        return;
    while (!ry_run_scan_over(r))
        sim_run(3);
    ok(ry_run_scan_wait(r, repeats, &sums, &err));
}

static void exchange(struct world *w, struct side *sides, int number)
{
    int n = w->cluster->nranks, result;
    uint64_t *matrix = calloc((size_t)(n * n), sizeof *matrix), base = draw(5) ? 100 : 5000;
    enum ry_strategy strategy = of_rows(number) ? RY_DEDUP : draw(4) ? RY_HIERARCHICAL : RY_DIRECT;
    struct ry_repeats *repeats = calloc((size_t)(n * w->cluster->nnodes), sizeof *repeats);
    struct ry_plan **plans = calloc((size_t)n, sizeof(void *));
    bool too_little = false;
    for (int i = 0; i < n * n; i++) {
        matrix[i] = draw(4) ? draw(base) : 0;
        matrix[i] = of_rows(number) && draw(4) ? matrix[i] * 8 / WIDTH * WIDTH : matrix[i];
    }
    for (int r = 0; r < n; r++) {
        int s = (int)draw(3);
        if (draw(6) == 0) { /* the job gives up a stream, though work is on it */
            sim_stream_destroy(w->streams[r][s], NULL);
            sim_stream_create(&w->streams[r][s], NULL);
        }
        side_start(&sides[r], matrix, n, r, number, w->streams[r][s]);
        sim_copy(sides[r].memory, sides[r].source, sides[r].bytes, sides[r].b.stream, NULL); /* the job's work before */
        if (of_rows(number))
            scan(w, &sides[r], repeats + r * w->cluster->nnodes);
    }
    for (int r = 0; r < n; r++) {
        plans[r] = plan_of(w->cluster, matrix, &sides[r], strategy, of_rows(number) ? repeats : NULL);
        if (ry_run_staging_grow(w->runners[r], plans[r]->stage_bytes, sides[r].b.stream, &err))
            too_little = true;
    }
    bool verify = draw(3) == 0;
    /* In a verified exchange one byte of the second run may arrive wrong: where it does is the exchange's number. */
    int bad_rank = verify && draw(2) ? (int)draw((uint64_t)n) : -1, bad_peer = (int)draw((uint64_t)n);
    uint64_t bad_bytes = bad_rank >= 0 ? matrix[bad_peer * n + bad_rank] : 0, bad_at = bad_bytes ? draw(bad_bytes) : 0;
    if (!bad_bytes || w->comms[bad_rank].corrupt.group > w->comms[bad_rank].ran)
        bad_rank = -1;
    for (int r = 0; r < n; r++) {
        struct side *s = &sides[r];
        uint64_t checks = (uint64_t)w->runners[r]->nchecks;
        if (too_little) { /* the verdict for all: direct */
            ry_plan_free(plans[r]);
            plans[r] = plan_of(w->cluster, matrix, s, RY_DIRECT, NULL);
        }
        for (int i = 0; i < plans[r]->nsteps; i++) {
            packed += plans[r]->steps[i].kind == RY_STEP_PACK;
            expanded += plans[r]->steps[i].kind == RY_STEP_EXPAND;
        }
        if (verify)
            ok(ry_run_verify(w->runners[r], plans[r], &s->b, NULL, 1000 + (uint64_t)bad_peer * 100000 + bad_at, &result,
                             &err));
        else
            ok(ry_run(w->runners[r], plans[r], &s->b, NULL, &result, &err));
        ck_assert_int_eq(result, 0);
        sim_copy(s->seen, s->memory, s->bytes, s->b.stream, NULL); /* the job's work after */
        ry_plan_free(plans[r]);
        bool held = (uint64_t)w->runners[r]->nchecks > checks;
        w->verified += verify;
        w->skipped += verify && !held;
        if (r == bad_rank && held) {
            w->comms[r].corrupt.group = w->comms[r].issued;
            w->comms[r].corrupt.peer = bad_peer;
            w->comms[r].corrupt.offset = bad_at;
            w->expected_bad++;
        }
        sim_run(draw(20));
        if (draw(4) == 0)
            look(w);
    }
    free(matrix), free(plans), free(repeats);
}

static void exchanges(int nranks, int nodes, int count, uint64_t limit)
{
    struct world w;
    ry_run_staging_limit(limit);
    world_start(&w, nranks, nodes);
    struct side *sides = calloc((size_t)(count * nranks), sizeof *sides);
    for (int x = 0; x < count; x++) {
        exchange(&w, sides + x * nranks, x);
        if (draw(5) == 0)
            sim_check(sim_run(UINT64_MAX), "exchange %d: streams wait for each other", x);
    }
    bool early = draw(2); /* runners may go before their work is done */
    if (!early) {
        sim_check(sim_run(UINT64_MAX), "streams wait for each other");
        look(&w);
        ck_assert_int_eq((int)(w.equal + w.bad), w.verified - w.skipped);
        ck_assert_int_eq((int)w.bad, w.expected_bad);
        ck_assert_int_gt((int)w.equal + w.skipped, 0);
    }
    struct sim_comm *comms = w.comms;
    w.comms = NULL; /* needed until all is done */
    world_end(&w, false);
    sim_check(sim_run(UINT64_MAX), "streams wait for each other");
    for (int i = 0; i < count * nranks; i++)
        side_check(&sides[i], i / nranks);
    free(comms), free(sides);
}

START_TEST(any_order)
{
    sim_begin();
    for (int round = 0; round < 12; round++)
        exchanges(2 + (int)draw(5), 1 + (int)draw(3), 25, draw(3) ? UINT64_C(1) << 30 : draw(2) ? 3 << 20 : 0);
    ck_assert_msg(packed && expanded, "%d messages packed, %d times expanded", packed, expanded);
    sim_end();
}
END_TEST

/* Ranks without kernels take part in everything, and say nothing about what they cannot compare. */
START_TEST(without_kernels)
{
    sim_begin();
    sim.no_kernels = true;
    exchanges(4, 2, 25, UINT64_C(1) << 30);
    sim_end();
}
END_TEST

/* Comparisons that nobody asks about are left out beyond a few, on this rank alone. */
START_TEST(too_many_comparisons)
{
    struct world w;
    struct side sides[2 * 40];
    uint64_t matrix[4] = {0, 300, 200, 100}, equal = 0;
    struct ry_mismatch bad;
    int result;
    sim_begin();
    ry_run_staging_limit(UINT64_C(1) << 30);
    world_start(&w, 2, 1);
    for (int x = 0; x < 40; x++)
        for (int r = 0; r < 2; r++) {
            struct side *s = &sides[2 * x + r];
            side_start(s, matrix, 2, r, x, w.streams[r][0]);
            struct ry_plan *plan = plan_of(w.cluster, matrix, s, RY_DIRECT, NULL);
            sim_copy(s->memory, s->source, s->bytes, s->b.stream, NULL);
            ok(ry_run_verify(w.runners[r], plan, &s->b, NULL, (uint64_t)x, &result, &err));
            sim_copy(s->seen, s->memory, s->bytes, s->b.stream, NULL);
            ry_plan_free(plan);
        }
    ck_assert(!ry_run_checks(w.runners[0], &equal, &bad));
    ck_assert_uint_eq(equal, 0);
    ck_assert(sim_run(UINT64_MAX));
    for (int r = 0; r < 2; r++) {
        ck_assert(!ry_run_checks(w.runners[r], &equal, &bad));
        ck_assert_uint_eq(equal, 16);
        ck_assert(!ry_run_checks(w.runners[r], &equal, &bad));
        ck_assert_uint_eq(equal, 0);
    }
    for (int i = 0; i < 2 * 40; i++)
        side_check(&sides[i], i / 2);
    world_end(&w, false);
    sim_end();
}
END_TEST

/* A peer never comes: the runner goes at once, its memory when the abort has ended NCCL's kernels. */
START_TEST(aborted)
{
    struct world w;
    struct side s;
    uint64_t matrix[9] = {10, 300, 200, 100, 50, 60, 70, 80, 90};
    int result;
    sim_begin();
    ry_run_staging_limit(UINT64_C(1) << 30);
    do { /* until rank 0 has a remote node with two ranks */
        world_start(&w, 3, 2);
        if (w.cluster->nnodes == 2 && w.cluster->node[1] == w.cluster->node[2])
            break;
        world_end(&w, true);
    } while (true);
    side_start(&s, matrix, 3, 0, 0, w.streams[0][0]);
    struct ry_plan *plan = plan_of(w.cluster, matrix, &s, RY_HIERARCHICAL, NULL);
    ok(ry_run_staging_grow(w.runners[0], 1000, s.b.stream, &err));
    ok(ry_run_verify(w.runners[0], plan, &s.b, NULL, 7, &result, &err));
    ck_assert(!sim_run(UINT64_MAX)); /* stuck */
    sim_stream_destroy(w.streams[0][0], NULL);
    w.comms[0].aborted = true;
    struct sim_comm *comms = w.comms;
    w.comms = NULL;
    world_end(&w, true);
    while (sim.messages) { /* what it sent before is lost with the communicator */
        struct sim_message *m = sim.messages;
        sim.messages = m->next;
        free(m->data), free(m);
    }
    ck_assert(sim_run(UINT64_MAX));
    ry_plan_free(plan);
    free(s.memory), free(s.source), free(s.seen), free(s.send), free(s.recv), free((void *)(uintptr_t)s.b.send_bytes);
    free(comms);
    sim_end();
}
END_TEST

/* A comparison under way outlives its runner: nobody else gets the memory that its answer goes to. */
START_TEST(late_answers)
{
    struct world w, w2;
    struct side sides[2];
    uint64_t matrix[1] = {500}, equal;
    struct ry_mismatch bad;
    int result;
    sim_begin();
    ry_run_staging_limit(UINT64_C(1) << 30);
    world_start(&w, 1, 1);
    world_start(&w2, 1, 1);
    struct world *of[] = {&w, &w2};
    const struct check *used[2];
    struct sim_comm *comms[] = {w.comms, w2.comms};
    comms[1]->world = 7; /* so that their messages are told apart */
    for (int i = 0; i < 2; i++) {
        side_start(&sides[i], matrix, 1, 0, i, of[i]->streams[0][0]);
        struct ry_plan *plan = plan_of(of[i]->cluster, matrix, &sides[i], RY_DIRECT, NULL);
        sim_copy(sides[i].memory, sides[i].source, sides[i].bytes, sides[i].b.stream, NULL);
        ok(ry_run_verify(of[i]->runners[0], plan, &sides[i].b, NULL, 1, &result, &err));
        sim_copy(sides[i].seen, sides[i].memory, sides[i].bytes, sides[i].b.stream, NULL);
        ry_plan_free(plan);
        used[i] = of[i]->runners[0]->oldest;
        ck_assert_ptr_nonnull(used[i]);
        if (i == 0) {
            w.comms = NULL;
            world_end(&w, false);
        }
    }
    ck_assert_ptr_ne(used[0], used[1]);
    ck_assert(sim_run(UINT64_MAX));
    ck_assert(!ry_run_checks(w2.runners[0], &equal, &bad));
    ck_assert_uint_eq(equal, 1);
    w2.comms = NULL;
    world_end(&w2, false);
    for (int i = 0; i < 2; i++) {
        side_check(&sides[i], i);
        free(comms[i]);
    }
    sim_end();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("run_order");
    TCase *t = tcase_create("run_order");
    tcase_set_timeout(t, 100);
    tcase_add_test(t, any_order);
    tcase_add_test(t, without_kernels);
    tcase_add_test(t, too_many_comparisons);
    tcase_add_test(t, aborted);
    tcase_add_test(t, late_answers);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
