/*
 * run_plans.c: plans carried out by several processes over the emulated NCCL, against plain NCCL on the same data:
 * random matrices and layouts of nodes that all ranks draw alike, all strategies, verify mode, a byte that arrives
 * wrong and has to be found and named, ranks without scratch memory. For dedup, rows that repeat: tokens, padding, rows
 * cut short; ranks that look for rows of a wrong width, or do not look.
 */
#include <dlfcn.h>

#include "emu_common.h"

#include "cluster.h"
#include "plan/plan.h"
#include "run/internal.h"

static uint64_t seed; /* the same on all ranks: drawn by rank 0 */
static struct ry_err err;
static ncclComm_t comm;
static struct ry_runner *runner;
static struct ry_nccl nccl;

static uint64_t draw_from(uint64_t *from, uint64_t below)
{
    *from ^= *from << 13, *from ^= *from >> 7, *from ^= *from << 17;
    return *from % below;
}

static uint64_t draw(uint64_t below)
{
    return draw_from(&seed, below);
}

/* What the runner calls: NCCL, and a hand in it that spoils one byte of what comes from `peer` into memory not the
 * job's. */
static struct {
    int peer; /* -1: none */
    uint64_t offset;
    const char *from, *to; /* the job's receive buffer */
    char *hit;
} spoil = {.peer = -1};

static int spoiling_recv(void *buf, size_t count, int type, int peer, void *c, void *stream)
{
    char *at = buf, *stage = runner->stage;
    if (peer == spoil.peer && !(at >= spoil.from && at < spoil.to) &&
        !(stage && at >= stage && at < stage + runner->stage_bytes))
        spoil.hit = at + spoil.offset;
    return nccl.recv(buf, count, type, peer, c, stream);
}

static int spoiling_end(void)
{
    int r = nccl.group_end();
    if (spoil.hit) {
        *spoil.hit ^= 0x40;
        spoil.hit = NULL;
        spoil.peer = -1;
    }
    return r;
}

struct side {
    char *memory, *plain;
    const void **send;
    void **recv, **recv_plain;
    uint64_t *bytes; /* out, then in */
    size_t all, recv_at;
    struct ry_buffers b;
};

/* What the rows of a dedup exchange look like. */
static struct {
    uint64_t width;            /* 0: no rows */
    uint64_t tokens, distinct; /* of how many there are copies; one row in so many is like no other (0: none is) */
} rows;

/* Rows: one of this rank's tokens, zeros, a token with one bit changed, or noise. */
static void write_rows(char *to, uint64_t bytes, uint64_t *own)
{
    for (uint64_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < rows.width ? bytes - at : rows.width;
        uint64_t token = draw_from(own, rows.tokens), kind = draw_from(own, 20);
        for (uint64_t i = 0; i < n; i++)
            to[at + i] = (char)(kind == 0 ? 0 : (i * 7 + (i >> 8)) * (token + 3) + token * 11 + (uint64_t)who.rank);
        if (kind == 1)
            to[at + draw_from(own, n)] ^= (char)(1 << draw_from(own, 8));
        if (rows.distinct && !draw_from(own, rows.distinct))
            for (uint64_t i = 0; i < n; i++)
                to[at + i] = (char)draw_from(own, 256);
    }
}

static void side_start(struct side *s, const uint64_t *matrix, int n, uint64_t gap, uint64_t salt)
{
    size_t at = 0;
    uint64_t own = seed ^ ((uint64_t)who.rank + 1) * 0x9e3779b97f4a7c15u;
    s->bytes = calloc(2 * (size_t)n, sizeof *s->bytes);
    s->send = calloc((size_t)n, sizeof(void *));
    s->recv = calloc((size_t)n, sizeof(void *));
    s->recv_plain = calloc((size_t)n, sizeof(void *));
    for (int p = 0; p < n; p++) {
        s->bytes[p] = matrix[who.rank * n + p];
        s->bytes[n + p] = matrix[p * n + who.rank];
        s->all += s->bytes[p] + s->bytes[n + p] + 2 * gap;
        s->recv_at += s->bytes[p] + gap;
    }
    s->memory = malloc(s->all + 1);
    s->plain = malloc(s->all + 1);
    memset(s->memory, 0xee, s->all);
    memset(s->plain, 0xee, s->all);
    for (int k = 0; k < 2; k++)
        for (int p = 0; p < n; p++) {
            uint64_t bytes = s->bytes[k * n + p];
            if (!k) {
                s->send[p] = bytes ? s->memory + at : NULL;
                if (rows.width)
                    write_rows(s->memory + at, bytes, &own);
                for (uint64_t i = 0; i < bytes && !rows.width; i++)
                    s->memory[at + i] = (char)(i * 31 + (i >> 9) + (uint64_t)(who.rank * 7 + p * 13) + salt);
            } else {
                s->recv[p] = bytes ? s->memory + at : NULL;
                s->recv_plain[p] = bytes ? s->plain + at : NULL;
            }
            at += bytes + gap;
        }
    s->b = (struct ry_buffers){n, who.rank, s->send, s->recv, s->bytes, s->bytes + n, NULL, 0, NULL};
}

static void plainly(const struct side *s)
{
    NCCL(ncclGroupStart());
    for (int p = 0; p < who.world; p++) {
        NCCL(ncclSend(s->send[p] ? s->send[p] : s->memory, s->b.send_bytes[p], ncclUint8, p, comm, NULL));
        NCCL(ncclRecv(s->recv_plain[p] ? s->recv_plain[p] : s->plain, s->b.recv_bytes[p], ncclUint8, p, comm, NULL));
    }
    NCCL(ncclGroupEnd());
}

static void side_end(struct side *s, int number)
{
    for (size_t i = s->recv_at; i < s->all; i++)
        CHECK(s->memory[i] == s->plain[i], "exchange %d: byte %zu of %zu", number, i - s->recv_at, s->all - s->recv_at);
    free(s->memory), free(s->plain), free(s->send), free(s->recv), free(s->recv_plain), free(s->bytes);
}

static struct ry_cluster *layout(void)
{
    struct ry_seat *seats = calloc((size_t)who.world, sizeof *seats);
    uint64_t nodes = 1 + draw((uint64_t)who.world), kind = draw(3);
    for (int r = 0; r < who.world; r++) {
        seats[r].rank = r;
        snprintf(seats[r].node, sizeof seats[r].node, "%d",
                 (int)(kind == 0   ? draw(nodes)
                       : kind == 1 ? (uint64_t)r % nodes
                                   : (uint64_t)r * nodes / (uint64_t)who.world));
    }
    struct ry_cluster *cluster = ry_cluster_build(seats, who.world, &err);
    CHECK(cluster, "%s", err.msg);
    free(seats);
    return cluster;
}

static void fill(uint64_t *matrix, int n)
{
    static const uint64_t bases[] = {1, 100, 5000, 70000, 400000};
    uint64_t base = bases[draw(5)], kind = draw(4), hot = draw((uint64_t)n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            uint64_t v = draw(base + 1), empty = draw(4);
            if (kind == 0) /* uniform */
                v = base;
            else if (kind == 1 && (uint64_t)j != hot) /* all to one */
                v = 0;
            else if (kind == 2 && !empty)
                v = 0;
            uint64_t odd = draw(6);
            matrix[i * n + j] = rows.width && odd ? v / rows.width * rows.width : v;
        }
}

static struct ry_plan *plan_of(const struct ry_cluster *cluster, const uint64_t *matrix, const struct side *s,
                               enum ry_strategy strategy, bool addresses, const struct ry_repeats *repeats, int chunks)
{
    struct ry_slice slice;
    CHECK(!ry_slice_init(&slice, cluster, who.rank, strategy, &err), "%s", err.msg);
    ry_slice_fill(&slice, cluster, matrix, repeats);
    struct ry_plan_input in = {.cluster = cluster,
                               .rank = who.rank,
                               .strategy = strategy,
                               .send = s->b.send_bytes,
                               .recv = s->b.recv_bytes,
                               .slice = &slice,
                               .repeats = repeats ? repeats + who.rank * cluster->nnodes : NULL,
                               .chunks = chunks};
    if (addresses) {
        in.send_at = (const uintptr_t *)s->send;
        in.recv_at = (const uintptr_t *)s->recv;
    }
    struct ry_plan *plan = ry_plan_build(&in, &err);
    CHECK(plan, "%s", err.msg);
    ry_slice_free(&slice);
    return plan;
}

static uint64_t sent, packed; /* bytes of messages that PACK steps wrote, and of what they stand for */
static int packings, expansions;

static void count_steps(const struct ry_plan *plan, const struct ry_cluster *cluster, const uint64_t *matrix)
{
    for (int i = 0; i < plan->nsteps; i++) {
        const struct ry_step *s = &plan->steps[i];
        packings += s->kind == RY_STEP_PACK;
        expansions += s->kind == RY_STEP_EXPAND;
        packed += s->kind == RY_STEP_PACK ? s->bytes : 0;
        for (int p = 0; p < who.world && s->kind == RY_STEP_PACK; p++)
            sent += cluster->node[p] == s->peer ? matrix[who.rank * who.world + p] : 0;
    }
}

/* Every rank looks, or not, for messages in as many parts as there are chunks or in others, and all hear what each
 * found: repeats[rank * nnodes + node]. */
static struct ry_repeats *look(const struct ry_cluster *cluster, const struct side *s, int chunks)
{
    int parts = 0;
    size_t n = (size_t)cluster->nnodes;
    struct ry_repeats *all = calloc((size_t)who.world * n, sizeof *all), *own = all + (size_t)who.rank * n;
    uint64_t width = 0, want = 0;
    for (int r = 0; r < who.world; r++) {
        uint64_t kind = draw(10), wrong = 1 + draw(3 * rows.width), other = draw(6), many = draw(3);
        if (r == who.rank)
            parts = other ? chunks : 1 << many;
        if (r == who.rank)
            width = kind == 0 ? 0 : kind == 1 ? wrong : rows.width;
    }
    if (width) {
        struct ry_scan_sums sums;
        CHECK(!ry_run_scan(runner, cluster, &s->b, width, parts, &err), "%s", err.msg);
        CHECK(!ry_run_scan_wait(runner, own, &sums, &err), "%s", err.msg);
        CHECK(ry_run_scan_over(runner), "%s", "the search is over, but is not");
        for (int p = 0; p < who.world; p++)
            want += cluster->node[p] != cluster->node[who.rank] ? ry_rows_of(s->b.send_bytes[p], width) : 0;
        CHECK(sums.rows == want && sums.distinct <= want && sums.zero <= want && !want == !sums.distinct,
              "%llu rows, %llu distinct, %llu zero of %llu", (unsigned long long)sums.rows,
              (unsigned long long)sums.distinct, (unsigned long long)sums.zero, (unsigned long long)want);
        CHECK(!own[cluster->node[who.rank]].row_bytes && !own[cluster->node[who.rank]].distinct, "%s", "its own node");
    }
    NCCL(ncclGroupStart());
    for (int p = 0; p < who.world; p++) {
        NCCL(ncclSend(own, n * sizeof *own, ncclUint8, p, comm, NULL));
        NCCL(ncclRecv(all + (size_t)p * n, n * sizeof *own, ncclUint8, p, comm, NULL));
    }
    NCCL(ncclGroupEnd());
    return all;
}

static void *find(const char *name)
{
    return dlsym(RTLD_DEFAULT, name);
}

int main(int argc, char **argv)
{
    start_rank();
    int count = argc > 1 ? atoi(argv[1]) : 200, verified = 0, skipped = 0, spoiled = 0, found = 0, by_relay = 0,
        in_chunks = 0;
    uint64_t equal = 0, *matrix = calloc((size_t)(who.world * who.world), sizeof *matrix);
    const char *given = getenv("RY_TEST_SEED");
    seed = given ? strtoull(given, NULL, 0) | 1 : ry_now_ns() | 1;
    CHECK(!ry_rendezvous(&who, &seed, sizeof seed, 20, &err), "%s", err.msg);
    if (who.rank == 0)
        printf("seed %llu\n", (unsigned long long)seed);
    comm = world_comm();
    CHECK(!ry_nccl_find(&nccl, find, &err), "%s", err.msg);
    struct ry_nccl table = nccl;
    table.recv = spoiling_recv;
    table.group_end = spoiling_end;
    runner = ry_runner_new(&table, ry_device_host(), 0, comm, &err);
    CHECK(runner, "%s", err.msg);
    for (int x = 0; x < count; x++) {
        struct side s = {0};
        struct ry_cluster *cluster = layout();
        static const uint64_t widths[] = {64, 100, 513, 1024, 4098};
        static const enum ry_strategy strategies[] = {RY_DEDUP,    RY_DEDUP,    RY_DEDUP, RY_HIERARCHICAL,
                                                     RY_BALANCED, RY_BALANCED, RY_DIRECT};
        enum ry_strategy strategy = strategies[draw(7)];
        rows.width = widths[draw(5)], rows.tokens = 1 + draw(30), rows.distinct = draw(4);
        rows.width = strategy == RY_DEDUP ? rows.width : 0;
        fill(matrix, who.world);
        side_start(&s, matrix, who.world, draw(2) * draw(50), (uint64_t)x);
        CHECK(ry_run_safe(&s.b), "exchange %d", x);
        ry_run_staging_limit(UINT64_C(1) << 30);
        int chunks = 1 << draw(3);
        struct ry_repeats *repeats = strategy == RY_DEDUP ? look(cluster, &s, chunks) : NULL;
        struct ry_plan *plan = plan_of(cluster, matrix, &s, strategy, draw(2), repeats, chunks);
        in_chunks += plan->beside > 0;
        count_steps(plan, cluster, matrix);
        CHECK(!ry_run_staging_grow(runner, plan->stage_bytes, NULL, &err), "%s", err.msg);
        by_relay += plan->stage_bytes > 0;
        int result = -1, verify = draw(3) == 0, poor = (int)draw((uint64_t)who.world * 2),
            bad_rank = (int)draw((uint64_t)who.world * 2), bad_peer = (int)draw((uint64_t)who.world);
        uint64_t bad_bytes = matrix[bad_peer * who.world + bad_rank % who.world], bad_at = draw(bad_bytes + 1);
        bool bad = verify && bad_rank == who.rank && bad_bytes && bad_at < bad_bytes && poor != who.rank;
        if (bad) {
            spoil.from = s.memory + s.recv_at, spoil.to = s.memory + s.all;
            spoil.peer = bad_peer, spoil.offset = bad_at;
        }
        if (verify && poor == who.rank)
            ry_run_staging_limit(ry_run_staging(runner));
        if (verify)
            CHECK(!ry_run_verify(runner, plan, &s.b, NULL, (uint64_t)x, &result, &err), "%s", err.msg);
        else
            CHECK(!ry_run(runner, plan, &s.b, NULL, &result, &err), "%s", err.msg);
        CHECK(result == 0, "exchange %d: %s", x, nccl.error_string(result));
        verified += verify;
        skipped += verify && poor == who.rank;
        spoiled += bad;
        struct ry_mismatch what;
        uint64_t more;
        while (ry_run_checks(runner, &more, &what)) {
            equal += more;
            found++;
            CHECK(bad && what.number == (uint64_t)x && what.peer == bad_peer && what.offset == bad_at,
                  "exchange %llu, peer %d, offset %llu", (unsigned long long)what.number, what.peer,
                  (unsigned long long)what.offset);
        }
        equal += more;
        plainly(&s);
        side_end(&s, x);
        ry_plan_free(plan);
        free(repeats);
        ry_cluster_free(cluster);
    }
    CHECK(found == spoiled && (int)equal == verified - skipped - spoiled, "%d of %d found, %d equal of %d", found,
          spoiled, (int)equal, verified - skipped - spoiled);
    /* Or the test would show nothing. Over all ranks: one of many may have had nothing to pack. */
    double all[3], own[3] = {packings, expansions, in_chunks};
    NCCL(ncclAllReduce(own, all, 3, ncclFloat64, ncclSum, comm, NULL));
    CHECK(count < 40 || who.world < 4 || (all[0] > 0 && all[1] > 0), "%g messages packed, %g times expanded", all[0],
          all[1]);
    CHECK(count < 40 || who.world < 4 || all[2] > 0, "%g plans in chunks", all[2]);
    if (who.rank == 0)
        printf("rank 0 packed %d messages, %llu KiB in %llu KiB, and expanded %d times\n", packings,
               (unsigned long long)sent >> 10, (unsigned long long)packed >> 10, expansions);
    if (who.rank == 0)
        printf("%d exchanges, staging memory used in %d of them; %d verified, %d of them not compared, %d spoiled and "
               "found\n",
               count, by_relay, verified, skipped, spoiled);
    barrier(comm);
    ry_runner_free(runner, false);
    NCCL(ncclCommDestroy(comm));
    free(matrix);
    return 0;
}
