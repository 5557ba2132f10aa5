/*
 * test_record.c: writing traces: what is on disk afterwards equals what was recorded, from many threads, with drops, at
 * the size limit, on a full disk, in a removed folder, after SIGKILL and in forked children; and what a record costs.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "base/npy.h"
#include "record/summary.h"
#include "record/lines.h"
#include "trace_help.h"

#define MAX_RANKS 64
#ifdef __SANITIZE_THREAD__
#define UNDER_TSAN 1
#else
#define UNDER_TSAN 0
#endif

#define AGREED_FROM 10 /* exchanges are agreed on from here */

/* The trace of `rank` of a communicator of `nranks`, `n` exchanges; durations for every 4th. */
static void record_rank(struct ry_record *rec, const char *id, int nranks, int rank, uint64_t n, uint64_t salt)
{
    struct ry_record_comm_info info = info_for(id, nranks, rank, "EXPERT \"group\" \xc3\xa9", 4);
    struct ry_record_comm *comm = ry_record_comm(rec, &info);
    ck_assert_ptr_nonnull(comm);
    struct ry_seat seats[MAX_RANKS];
    for (int r = 0; r < nranks; r++)
        seats[r] = info_for(id, nranks, r, NULL, 4).seat;
    struct ry_cluster *map = ry_cluster_build(seats, nranks, &err);
    ck_assert_ptr_nonnull(map);
    ry_record_map(rec, comm, map, NULL);
    ry_cluster_free(map);
    uint64_t send[MAX_RANKS], recv[MAX_RANKS];
    for (uint64_t x = 0; x < n; x++) {
        fill(salt, x, nranks, rank, send, recv);
        struct ry_record_exchange e = {.number = x,
                                       .wall_ns = ry_wall_ns(),
                                       .type = 9,
                                       .type_bytes = 2,
                                       .send_count = send,
                                       .recv_count = recv,
                                       .row_elems = x % 2 ? 2048 : 0,
                                       .row_source = "ratio",
                                       .one_call = x % 5 == 0,
                                       .captured = x % 7 == 0,
                                       .gather_count = x % 3 ? 0 : 64};
        strcpy(e.gather_comm, "00000000000000cc");
        if (x >= AGREED_FROM) {
            e.strategy = x % 3 ? "hierarchical" : "direct";
            e.waited_us = 20.125 + rank;
            e.late_us = 5.0625;
            e.verify = x % 12 == 4;
        }
        ry_record_exchange(rec, comm, &e);
        if (x % 4 == 0)
            ry_record_duration(rec, comm, x, 100.0 + rank);
    }
    struct ry_record_counter counters[] = {{"calls.allreduce", 3}, {"calls.allgather", (uint64_t)rank}};
    ry_record_comm_end(rec, comm, "destroy", counters, 2);
}

/* What record_rank() said of the agreement, n exchanges by each of 8 ranks. */
static void check_agreed(const struct ry_trace_comm *c, const struct ry_summary *s, uint64_t n)
{
    uint64_t by[2] = {0}, verified = 0, timed[3] = {0}, told[3] = {0};
    for (uint64_t x = 0; x < n; x++) {
        bool verify = x >= AGREED_FROM && x % 12 == 4;
        by[x % 3 != 0] += x >= AGREED_FROM;
        verified += verify;
        if (x % 4 == 0 && !verify)
            timed[x < AGREED_FROM ? RY_TRACE_PLAIN : 1 + !(x % 3)]++;
    }
    ck_assert_int_eq(c->agreed.nstrategies, 3); /* exchange 10 is hierarchical, so that comes first */
    ck_assert_str_eq(c->agreed.strategy[RY_TRACE_PLAIN], "");
    ck_assert_str_eq(c->agreed.strategy[1], "hierarchical");
    ck_assert_str_eq(c->agreed.strategy[2], "direct");
    ck_assert_uint_eq(s->agreed, n - AGREED_FROM);
    ck_assert_uint_eq(s->by_strategy[1], by[1]);
    ck_assert_uint_eq(s->by_strategy[2], by[0]);
    ck_assert_uint_eq(s->verified, verified);
    ck_assert_uint_eq(c->agreed.waited.n, 8 * (n - AGREED_FROM));
    ck_assert_double_eq(c->agreed.waited.min_us, 20.125);
    ck_assert_double_eq(c->agreed.waited.max_us, 27.125);
    ck_assert_double_eq_tol(c->agreed.late.max_us, 5.063, 1e-9); /* three decimals */
    ck_assert_double_eq_tol(c->agreed.messages.min_us, 20.125 - 5.063, 1e-9);
    ck_assert_uint_eq(c->agreed.waited_bins[ry_bin_of(20)], 8 * (n - AGREED_FROM));
    ck_assert_uint_eq(c->agreed.messages_bins[ry_bin_of(15)], 5 * (n - AGREED_FROM)); /* below 20: ranks 0 to 4 */
    for (int i = 0; i < c->agreed.ndurations; i++) {
        const struct ry_trace_duration *d = &c->agreed.durations[i];
        told[d->strategy] += d->exchanges;
        /* the busiest rank decides, and those with half as much: not always rank 0, which measured the least */
        ck_assert(d->median_us >= 100 && d->median_us <= 107);
    }
    for (int k = 0; k < 3; k++)
        ck_assert_uint_eq(told[k], timed[k]);
}

static void check_matrix(const struct ry_trace_comm *c, uint64_t n, uint64_t salt)
{
    for (int i = 0; i < c->nranks; i++) {
        if (!c->ranks[i])
            continue;
        for (int j = 0; j < c->nranks; j++) {
            uint64_t out = 0, in = 0, sends = 0;
            for (uint64_t x = 0; x < n; x++) {
                out += 2 * count_of(salt, x, i, j);
                in += 2 * count_of(salt, x, j, i);
                sends += count_of(salt, x, i, j) != 0;
            }
            ck_assert_uint_eq(c->ranks[i]->sent[j], out);
            ck_assert_uint_eq(c->ranks[i]->received[j], in);
            ck_assert_uint_eq(c->ranks[i]->sends[j], sends);
        }
    }
}

/* Nothing was found wrong; that ranks are missing is so where a test records one only. */
static void no_notes(const struct ry_trace *t)
{
    for (int i = 0; i < t->nnotes; i++)
        if (!strstr(t->notes[i], "ranks are missing"))
            ck_abort_msg("unexpected note: %s", t->notes[i]);
}

START_TEST(round_trip)
{
    struct ry_record_config config = config_for(dir);
    for (int rank = 0; rank < 8; rank++) {
        struct ry_record *rec =
            ry_record_open(&config, &err); /* one after the other: the same pid, so files get -2, -3 … */
        ck_assert_msg(rec, "%s", err.msg);
        record_rank(rec, "0123456789abcdef", 8, rank, 100, seed);
        ry_record_close(rec);
        ry_record_close(rec); /* twice is no harm */
    }
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    no_notes(t);
    ck_assert_int_eq(t->nprocesses, 8);
    ck_assert_int_eq(t->ncomms, 1);
    const struct ry_trace_comm *c = t->comms[0];
    ck_assert_int_eq(c->present, 8);
    ck_assert_int_eq(c->nnodes, 2);
    ck_assert(c->mapped);
    ck_assert_str_eq(c->hosts[1], "host1");
    ck_assert_str_eq(c->name, "EXPERT \"group\" \xc3\xa9");
    ck_assert_uint_eq(c->one_call, 8 * 20);
    ck_assert_uint_eq(c->captured, 8 * 15);
    ck_assert_int_eq(c->nrows, 1);
    ck_assert_uint_eq(c->rows[0].bytes, 4096);
    ck_assert_uint_eq(c->rows[0].exchanges, 8 * 50);
    ck_assert_str_eq(c->types[0].name, "bfloat16");
    ck_assert_str_eq(c->gather_comm, "00000000000000cc");
    ck_assert_int_eq(json_integer_value(json_object_get(c->counters, "calls.allreduce")), 24);
    check_matrix(c, 100, seed);
    for (int r = 0; r < 8; r++) {
        ck_assert_uint_eq(c->ranks[r]->exchanges, 100);
        ck_assert_uint_eq(c->ranks[r]->saved, 100);
        ck_assert_str_eq(c->ranks[r]->how, "destroy");
        ck_assert_uint_eq(c->ranks[r]->times.n, 25);
        ck_assert_double_eq_tol(ry_trace_quantile(&c->ranks[r]->times, 0.5), 100.0 + r, 1e-9);
        ck_assert_double_eq_tol(c->ranks[r]->times.matched_us, 25 * (100.0 + r), 1e-6);
    }
    struct ry_summary s;
    ck_assert_int_eq(ry_summary_make(&s, t, c, &err), 0);
    uint64_t total = 0, cross = 0, self = 0;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++)
            for (uint64_t x = 0; x < 100; x++) {
                uint64_t b = 2 * count_of(seed, x, i, j);
                total += b;
                cross += i / 4 != j / 4 ? b : 0;
                self += i == j ? b : 0;
            }
    ck_assert_uint_eq(s.bytes, total);
    ck_assert_uint_eq(s.cross_node, cross);
    ck_assert_uint_eq(s.self, self);
    ck_assert_uint_eq(s.in_node, total - cross - self);
    ck_assert_uint_eq(s.nodes[1] + s.nodes[2], cross);
    ck_assert_uint_eq(s.pairs_differ, 0);
    ck_assert_uint_eq(s.exchanges, 100);
    ck_assert_int_eq(s.longest, 7);
    ck_assert_int_eq(s.shortest, 0);
    ck_assert_str_eq(s.kind, "expert-parallel (all-to-all)");
    check_agreed(c, &s, 100);
    ry_summary_free(&s);
    ry_trace_close(t);
}
END_TEST

/* A trace of exchanges that nobody agreed on does not grow: its lines are as they always were. */
START_TEST(observed_lines)
{
    static const uint64_t counts[2] = {3, 4};
    struct ry_record_exchange e = {.number = 7, .wall_ns = 9, .type = 9, .type_bytes = 2, .send_count = counts,
                                   .recv_count = counts, .waited_us = 5, .late_us = 5, .verify = true};
    struct ry_text text = {0};
    ry_line_exchange(&text, "aa", 1, 2, NULL, &e);
    e.strategy = "direct";
    ry_line_exchange(&text, "aa", 1, 2, "\"n\"", &e);
    ry_text_add(&text, "", 1);
    ck_assert_str_eq(text.at, "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":1,\"n\":7,\"wall_ns\":9,\"type\":\"bfloat16\",\"type_bytes\":2,"
                              "\"send\":[3,4],\"recv\":[3,4]}\n"
                              "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":1,\"n\":7,\"wall_ns\":9,\"type\":\"bfloat16\",\"type_bytes\":2,"
                              "\"send\":[3,4],\"recv\":[3,4],\"strategy\":\"direct\",\"waited_us\":5.000,\"late_us\":5.000,"
                              "\"verify\":true,\"name\":\"n\"}\n");
    free(text.at);
}
END_TEST

/* Rings far too small for the burst: lines are lost and counted, sums are exact. */
START_TEST(lines_of_rows)
{
    static const uint64_t counts[2] = {3, 4};
    struct ry_record_exchange e = {.number = 7, .wall_ns = 9, .type = 9, .type_bytes = 2, .send_count = counts,
                                   .recv_count = counts, .row_elems = 1, .row_source = "gcd", .direction = "go",
                                   .strategy = "dedup", .plain_us = 12.5};
    struct ry_record_rows rows = {.number = 7, .direction = "return", .row_bytes = 2048, .rows = 100, .distinct = 30, .zero = 5,
                                  .cross = 204800, .packed = 62000};
    struct ry_text text = {0};
    ry_line_exchange(&text, "aa", 1, 2, NULL, &e);
    ry_line_rows(&text, "aa", 1, &rows);
    rows.strategy = "dedup";
    rows.waited_us = 33;
    ry_line_rows(&text, "aa", 0, &rows);
    ry_text_add(&text, "", 1);
    ck_assert_str_eq(text.at, "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":1,\"n\":7,\"wall_ns\":9,\"type\":\"bfloat16\",\"type_bytes\":2,"
                              "\"send\":[3,4],\"recv\":[3,4],\"row\":1,\"row_by\":\"gcd\",\"way\":\"go\",\"strategy\":\"dedup\","
                              "\"waited_us\":0.000,\"late_us\":0.000,\"plain_us\":12.500}\n"
                              "{\"t\":\"rows\",\"comm\":\"aa\",\"rank\":1,\"n\":7,\"way\":\"return\",\"row_bytes\":2048,\"rows\":100,"
                              "\"distinct\":30,\"zero\":5,\"cross\":204800,\"packed\":62000}\n"
                              "{\"t\":\"rows\",\"comm\":\"aa\",\"rank\":0,\"n\":7,\"way\":\"return\",\"row_bytes\":2048,\"rows\":100,"
                              "\"distinct\":30,\"zero\":5,\"cross\":204800,\"packed\":62000,\"waited_us\":33.000,\"strategy\":\"dedup\"}\n");
    free(text.at);
}
END_TEST

START_TEST(drops_are_counted)
{
    struct ry_record_config config = config_for(dir);
    config.buffer_bytes = 1;
    struct ry_record *rec = ry_record_open(&config, &err);
    ck_assert_ptr_nonnull(rec);
    record_rank(rec, "00000000000000aa", 64, 3, 3000, seed);
    ry_record_close(rec);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    const struct ry_trace_rank *r = t->comms[0]->ranks[3];
    ck_assert_uint_gt(r->dropped, 0);
    ck_assert_uint_eq(r->lines + r->dropped, 3000);
    ck_assert_uint_eq(r->exchanges, 3000);
    ck_assert_uint_eq(r->times.n + r->dropped_durations, 750);
    ck_assert_uint_eq(t->processes[0].dropped, r->dropped);
    check_matrix(t->comms[0], 3000, seed);
    ry_trace_close(t);
}
END_TEST

/* ---- threads ---- */

#define THREADS 4

struct worker {
    pthread_t thread;
    struct ry_record *rec;
    struct ry_record_comm *shared, *own;
    int index;
    uint64_t n;
    _Atomic bool *go_on; /* NULL: n exchanges */
};

static void *work(void *arg)
{
    struct worker *w = arg;
    uint64_t send[8], recv[8];
    for (uint64_t x = 0; w->go_on ? atomic_load(w->go_on) : x < w->n; x++) {
        uint64_t number = x * THREADS + (uint64_t)w->index;
        fill(seed, number, 8, 2, send, recv);
        struct ry_record_exchange e = {
            .number = number, .wall_ns = 1, .type = 7, .type_bytes = 2, .send_count = send, .recv_count = recv};
        ry_record_exchange(w->rec, w->shared, &e);
        if (w->own)
            ry_record_exchange(w->rec, w->own, &e);
        ry_record_duration(w->rec, w->shared, number, 5);
        w->n = w->go_on ? x : w->n;
        if (x % 64 == 0)
            sched_yield();
    }
    return NULL;
}

START_TEST(many_threads)
{
    struct ry_record_config config = config_for(dir);
    config.buffer_bytes = 16384; /* full at times */
    config.matrix_seconds = 0.05;
    struct ry_record *rec = ry_record_open(&config, &err);
    ck_assert_ptr_nonnull(rec);
    struct ry_record_comm_info info = info_for("00000000000000aa", 8, 2, NULL, 4);
    struct ry_record_comm *shared = ry_record_comm(rec, &info);
    enum { ROUNDS = 3, EACH = 4000 };
    for (int round = 0; round < ROUNDS; round++) { /* later threads take the lanes of ended ones */
        struct worker w[THREADS];
        for (int i = 0; i < THREADS; i++) {
            snprintf(info.id, sizeof info.id, "%016x", 256 + round * THREADS + i);
            w[i] =
                (struct worker){.rec = rec, .shared = shared, .own = ry_record_comm(rec, &info), .index = i, .n = EACH};
            ck_assert_int_eq(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
        }
        for (int i = 0; i < THREADS; i++) {
            pthread_join(w[i].thread, NULL);
            ry_record_comm_end(rec, w[i].own, "destroy", NULL, 0);
        }
    }
    ry_record_comm_end(rec, shared, "destroy", NULL, 0);
    ry_record_close(rec);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    ck_assert_int_eq(t->ncomms, 1 + ROUNDS * THREADS);
    no_notes(t);
    for (int i = 0; i < t->ncomms; i++) {
        const struct ry_trace_comm *c = t->comms[i];
        const struct ry_trace_rank *r = c->ranks[2];
        bool all = !strcmp(c->id, "00000000000000aa");
        ck_assert_uint_eq(r->lines + r->dropped, all ? ROUNDS * THREADS * EACH : EACH);
        if (all) {
            uint64_t want = 0, got = 0;
            for (uint64_t x = 0; x < THREADS * EACH; x++)
                for (int j = 0; j < 8; j++)
                    want += 2 * ROUNDS * count_of(seed, x, 2, j);
            for (int j = 0; j < 8; j++)
                got += r->sent[j];
            ck_assert_uint_eq(got, want);
        }
    }
    ry_trace_close(t);
}
END_TEST

START_TEST(close_while_recording)
{
    for (int round = 0; round < 5; round++) {
        struct ry_record_config config = config_for(dir);
        struct ry_record *rec = ry_record_open(&config, &err);
        ck_assert_ptr_nonnull(rec);
        struct ry_record_comm_info info = info_for("00000000000000aa", 8, 2, NULL, 4);
        snprintf(info.id, sizeof info.id, "%016x", round);
        struct ry_record_comm *shared = ry_record_comm(rec, &info);
        struct worker w[THREADS];
        _Atomic bool go_on = true;
        for (int i = 0; i < THREADS; i++) {
            w[i] = (struct worker){.rec = rec, .shared = shared, .index = i, .go_on = &go_on};
            ck_assert_int_eq(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
        }
        usleep(30000);
        ry_record_close(rec);
        ry_record_map(rec, shared, NULL, "late"); /* the communicator is gone, and this must not matter */
        ry_record_comm_end(rec, shared, "destroy", NULL, 0);
        ck_assert_ptr_null(ry_record_comm(rec, &info));
        usleep(2000);
        atomic_store(&go_on, false);
        for (int i = 0; i < THREADS; i++)
            pthread_join(w[i].thread, NULL);
    }
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    ck_assert_int_eq(t->ncomms, 5);
    for (int i = 0; i < 5; i++) {
        const struct ry_trace_rank *r = t->comms[i]->ranks[2];
        ck_assert_str_eq(r->how, "open");
        ck_assert_uint_gt(r->lines, 0);
        ck_assert_uint_eq(r->lines + r->dropped, r->saved);
        ck_assert(t->processes[i].ended);
    }
    ry_trace_close(t);
}
END_TEST

/* ---- limits and failures ---- */

static uint64_t folder_bytes(void)
{
    uint64_t sum = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));) {
        struct stat st;
        char path[512];
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (*e->d_name != '.' && !stat(path, &st))
            sum += (uint64_t)st.st_size;
    }
    closedir(d);
    return sum;
}

/* Run `body` with stderr in a file, and return that text. */
static char *told(void (*body)(void))
{
    static char text[8192];
    FILE *f = tmpfile();
    int saved = dup(STDERR_FILENO);
    dup2(fileno(f), STDERR_FILENO);
    body();
    dup2(saved, STDERR_FILENO);
    close(saved);
    rewind(f);
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    return text;
}

static int count(const char *text, const char *word)
{
    int n = 0;
    for (; (text = strstr(text, word)); text++)
        n++;
    return n;
}

static void exceed_limit(void)
{
    struct ry_record_config config = config_for(dir);
    config.max_bytes = 100000;
    config.matrix_seconds = 0.02;
    struct ry_record *rec = ry_record_open(&config, &err);
    ck_assert_ptr_nonnull(rec);
    for (uint64_t i = 0; i < 4; i++) {
        char id[17];
        snprintf(id, sizeof id, "%016x", (unsigned)i);
        record_rank(rec, id, 8, 0, 1000, seed);
    }
    ry_record_close(rec);
}

/* Communicators come and go, far more than the limit has room for: matrix files count, too. */
static void many_communicators(void)
{
    struct ry_record_config config = config_for(dir);
    config.max_bytes = 60000;
    struct ry_record *rec = ry_record_open(&config, &err);
    ck_assert_ptr_nonnull(rec);
    for (uint64_t i = 0; i < 400; i++) {
        char id[17];
        snprintf(id, sizeof id, "%016x", (unsigned)i);
        record_rank(rec, id, 8, 0, 2, seed);
        if (i == 0)
            usleep(1000000); /* the writer is through with it before the others come */
    }
    ry_record_close(rec);
}

START_TEST(size_limit_of_matrices)
{
    const char *text = told(many_communicators);
    ck_assert_msg(count(text, "warning") == 1 && strstr(text, "RAILYARD_TRACE_MAX"), "said: %s", text);
    ck_assert_uint_le(folder_bytes(), 60000);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    ck_assert_str_eq(t->processes[0].stopped, "limit");
    ck_assert_int_gt(t->ncomms, 5);
    check_matrix(t->comms[0], 2, seed); /* it was there before the limit */
    ry_trace_close(t);
}
END_TEST

START_TEST(size_limit)
{
    const char *text = told(exceed_limit);
    ck_assert_msg(count(text, "warning") == 1 && strstr(text, "RAILYARD_TRACE_MAX"), "said: %s", text);
    ck_assert_uint_le(folder_bytes(), 100000);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    ck_assert_int_eq(t->ncomms, 4);
    ck_assert_str_eq(t->processes[0].stopped, "limit");
    uint64_t lines = 0;
    for (int i = 0; i < 4; i++) {
        lines += t->comms[i]->ranks[0]->lines + t->comms[i]->ranks[0]->dropped;
        ck_assert_uint_eq(t->comms[i]->ranks[0]->exchanges, 1000);
        check_matrix(t->comms[i], 1000, seed); /* exact, from the matrix files */
    }
    ck_assert_uint_eq(lines + t->processes[0].not_written, 4000);
    ck_assert_int_eq(t->nnotes, 4 + 1); /* missing ranks; the limit */
    ry_trace_close(t);
}
END_TEST

static struct ry_record *failing;
static struct ry_record_comm *failing_comm;

static void record_until_stopped(void)
{
    uint64_t send[8], recv[8];
    for (uint64_t x = 0; x < 3000; x++) {
        fill(seed, x, 8, 0, send, recv);
        struct ry_record_exchange e = {
            .number = x, .wall_ns = 1, .type = 7, .type_bytes = 2, .send_count = send, .recv_count = recv};
        ry_record_exchange(failing, failing_comm, &e);
        if (x % 500 == 0)
            usleep(60000);
    }
    usleep(600000);
    ry_record_close(failing);
}

static void start_failing(void)
{
    struct ry_record_config config = config_for(dir);
    config.matrix_seconds = 0.1;
    failing = ry_record_open(&config, &err);
    ck_assert_msg(failing, "%s", err.msg);
    struct ry_record_comm_info info = info_for("00000000000000aa", 8, 0, NULL, 4);
    failing_comm = ry_record_comm(failing, &info);
    ck_assert_ptr_nonnull(failing_comm);
}

START_TEST(full_disk)
{
    if (mount("tmpfs", dir, "tmpfs", 0, "size=64k")) {
        fprintf(stderr, "SKIPPED full_disk: cannot mount a tmpfs (%s)\n", strerror(errno));
        return;
    }
    start_failing();
    const char *text = told(record_until_stopped);
    ck_assert_msg(count(text, "warning") == 1 && strstr(text, "No space left"), "said: %s", text);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    const struct ry_trace_rank *r = t->comms[0]->ranks[0];
    ck_assert_uint_gt(r->lines, 20);
    ck_assert_uint_eq(t->processes[0].bad_lines, 0);
    for (int i = 0; i < t->nnotes; i++)
        ck_assert_ptr_null(strstr(t->notes[i], "cut off"));
    ry_trace_close(t);
    ck_assert_int_eq(umount2(dir, MNT_DETACH), 0);
}
END_TEST

START_TEST(file_size_limit)
{
    struct rlimit limit = {20000, 20000};
    start_failing();
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    const char *text = told(record_until_stopped);
    ck_assert_msg(count(text, "warning") == 1 && strstr(text, "File too large"), "said: %s", text);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    ck_assert_uint_gt(t->comms[0]->ranks[0]->lines, 20);
    ry_trace_close(t);
}
END_TEST

static void remove_and_record(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    ck_assert_int_eq(system(cmd), 0);
    record_until_stopped();
}

START_TEST(folder_removed)
{
    start_failing();
    const char *text = told(remove_and_record);
    ck_assert_msg(count(text, "warning") == 1, "said: %s", text);
    ck_assert_int_eq(access(dir, F_OK), -1);
}
END_TEST

static void steal_descriptor(void)
{
    /* a job that closes descriptors it does not own, and gets the number again for a file of its own */
    struct stat want, st;
    DIR *d = opendir(dir);
    char path[512] = "";
    for (struct dirent *e; (e = readdir(d));)
        if (strstr(e->d_name, ".jsonl"))
            snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
    closedir(d);
    ck_assert_int_eq(stat(path, &want), 0);
    for (int fd = 3; fd < 64; fd++)
        if (!fstat(fd, &st) && st.st_ino == want.st_ino && st.st_dev == want.st_dev) {
            snprintf(path, sizeof path, "%s/of-the-job", dir);
            int own = open(path, O_WRONLY | O_CREAT, 0600);
            dup2(own, fd);
            close(own);
        }
    record_until_stopped();
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert_int_eq(st.st_size, 0);
}

START_TEST(descriptor_stolen)
{
    start_failing();
    const char *text = told(steal_descriptor);
    ck_assert_msg(count(text, "warning") == 1 && strstr(text, "the job closed the file"), "said: %s", text);
}
END_TEST

START_TEST(cannot_open)
{
    char path[128];
    struct ry_record_config config = config_for(path);
    snprintf(path, sizeof path, "%s/none/deeper", dir);
    ck_assert_ptr_null(ry_record_open(&config, &err));
    ck_assert_msg(strstr(err.msg, path) && strstr(err.msg, "RAILYARD_TRACE"), "%s", err.msg);
    snprintf(path, sizeof path, "%s/file", dir);
    fclose(fopen(path, "w"));
    ck_assert_ptr_null(ry_record_open(&config, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "Not a directory"));
    snprintf(path, sizeof path, "/proc/self");
    ck_assert_ptr_null(ry_record_open(&config, &err));
    /* nothing to record: every function takes it */
    ry_record_exchange(NULL, NULL, NULL);
    ry_record_duration(NULL, NULL, 0, 0);
    ry_record_comm_end(NULL, NULL, "destroy", NULL, 0);
    ry_record_map(NULL, NULL, NULL, NULL);
    ry_record_close(NULL);
}
END_TEST

/* ---- processes ---- */

START_TEST(killed)
{
    int pipes[2];
    ck_assert_int_eq(pipe(pipes), 0);
    pid_t child = fork();
    if (!child) {
        struct ry_record_config config = config_for(dir);
        config.matrix_seconds = 0.5;
        struct ry_record *rec = ry_record_open(&config, &err);
        struct ry_record_comm_info info = info_for("00000000000000aa", 8, 0, NULL, 4);
        struct ry_record_comm *comm = ry_record_comm(rec, &info);
        for (uint64_t x = 0;; x++) {
            uint64_t send[8], recv[8];
            fill(seed, x, 8, 0, send, recv);
            struct ry_record_exchange e = {.number = x,
                                           .wall_ns = ry_wall_ns(),
                                           .type = 7,
                                           .type_bytes = 2,
                                           .send_count = send,
                                           .recv_count = recv};
            ry_record_exchange(rec, comm, &e);
            usleep(200);
        }
    }
    sleep(4);
    kill(child, SIGKILL);
    uint64_t at = ry_wall_ns();
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    const struct ry_trace_comm *c = t->comms[0];
    ck_assert_uint_gt(c->ranks[0]->lines, 100);
    ck_assert_msg(at - c->last_ns < 3000000000u, "the last line is %.3f s old", (double)(at - c->last_ns) / 1e9);
    ck_assert(!t->processes[0].ended);
    ck_assert_uint_gt(c->ranks[0]->saved, 0);
    bool said = false;
    for (int i = 0; i < t->nnotes; i++)
        said |= strstr(t->notes[i], "killed, or still running") != NULL;
    ck_assert(said);
    ry_trace_close(t);
}
END_TEST

/* A forked child (a data worker) inherits everything and must leave the trace alone; it may open its own. */
START_TEST(forked_child)
{
    struct ry_record_config config = config_for(dir);
    struct ry_record *rec = ry_record_open(&config, &err);
    struct ry_record_comm_info info = info_for("00000000000000aa", 8, 0, NULL, 4);
    struct ry_record_comm *comm = ry_record_comm(rec, &info);
    uint64_t send[8], recv[8];
    fill(seed, 0, 8, 0, send, recv);
    struct ry_record_exchange e = {
        .number = 0, .wall_ns = 1, .type = 7, .type_bytes = 2, .send_count = send, .recv_count = recv};
    ry_record_exchange(rec, comm, &e);
    pid_t child = fork();
    if (!child) {
        for (int i = 0; i < 100; i++)
            ry_record_exchange(rec, comm, &e);
        ry_record_comm_end(rec, comm, "destroy", NULL, 0);
        if (ry_record_comm(rec, &info))
            _exit(1);
        ry_record_close(rec);
        if (UNDER_TSAN) /* it allows no threads in a forked child */
            _exit(0);
        struct ry_record *own = ry_record_open(&config, &err);
        if (!own)
            _exit(2);
        info.rank = 1;
        comm = ry_record_comm(own, &info);
        ry_record_exchange(own, comm, &e);
        ry_record_comm_end(own, comm, "destroy", NULL, 0);
        ry_record_close(own);
        _exit(0);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert_msg(WIFEXITED(status) && !WEXITSTATUS(status), "child: %d", status);
    ry_record_comm_end(rec, comm, "destroy", NULL, 0);
    ry_record_close(rec);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_int_eq(t->nprocesses, UNDER_TSAN ? 1 : 2);
    ck_assert_int_eq(t->ncomms, 1);
    ck_assert_uint_eq(t->comms[0]->ranks[0]->lines, 1);
    if (!UNDER_TSAN) {
        ck_assert_uint_eq(t->comms[0]->ranks[1]->lines, 1);
        ck_assert_int_ne(t->processes[0].pid, t->processes[1].pid);
    }
    ry_trace_close(t);
}
END_TEST

START_TEST(large_communicator)
{
    enum { N = 4096 };
    struct ry_record_config config = config_for(dir);
    config.buffer_bytes = 4096; /* less than one record: the ring is made larger then */
    struct ry_record *rec = ry_record_open(&config, &err);
    struct ry_record_comm_info info = info_for("00000000000000aa", N, 17, NULL, 8);
    struct ry_record_comm *comm = ry_record_comm(rec, &info);
    uint64_t *send = calloc(2 * N, sizeof *send), *recv = send + N, sum = 0;
    for (uint64_t x = 0; x < 20; x++) {
        uint64_t s = seed + x;
        memset(send, 0, 2 * N * sizeof *send);
        for (int i = 0; i < (x % 2 ? 40 : N); i++) { /* in turn sparse and dense */
            send[next(&s) % N] += 7;
            recv[next(&s) % N] += 9;
            sum += 7 * 4;
        }
        struct ry_record_exchange e = {
            .number = x, .wall_ns = 1, .type = 7, .type_bytes = 4, .send_count = send, .recv_count = recv};
        ry_record_exchange(rec, comm, &e);
        usleep(20000);
    }
    ry_record_comm_end(rec, comm, "destroy", NULL, 0);
    ry_record_close(rec);
    free(send);
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    const struct ry_trace_rank *r = t->comms[0]->ranks[17];
    ck_assert_uint_eq(r->lines, 20);
    uint64_t got = 0;
    for (int i = 0; i < N; i++)
        got += r->sent[i];
    ck_assert_uint_eq(got, sum);
    ck_assert_int_eq(t->nnotes, 1); /* the 4095 missing ranks */
    ry_trace_close(t);
}
END_TEST

static void usage_of_writer(long *switches, double *cpu)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    *switches = u.ru_nvcsw;
    *cpu =
        (double)u.ru_utime.tv_sec + (double)u.ru_stime.tv_sec + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

START_TEST(idle_sleeps)
{
    if (UNDER_TSAN) {
        fprintf(stderr, "SKIPPED idle_sleeps: the thread sanitizer has a thread of its own that does not sleep\n");
        return;
    }
    struct ry_record_config config = config_for(dir);
    config.matrix_seconds = 10;
    struct ry_record *rec = ry_record_open(&config, &err);
    usleep(600000);
    long before, after;
    double cpu0, cpu1;
    usage_of_writer(&before, &cpu0);
    usleep(1000000);
    usage_of_writer(&after, &cpu1);
    ck_assert_int_le(after - before, 3); /* our own sleep among them */
    ck_assert_double_lt(cpu1 - cpu0, 0.05);
    ry_record_close(rec);
}
END_TEST

/* Not a pass/fail of speed (machines differ); it prints the figure that the README may quote. */
START_TEST(cost)
{
    static const int sizes[] = {8, 64};
    for (int k = 0; k < 2; k++) {
        struct ry_record_config config = config_for(dir);
        config.buffer_bytes = 4 << 20;
        struct ry_record *rec = ry_record_open(&config, &err);
        char id[17];
        snprintf(id, sizeof id, "%016x", k);
        struct ry_record_comm_info info = info_for(id, sizes[k], 0, "EP", 4);
        struct ry_record_comm *comm = ry_record_comm(rec, &info);
        uint64_t send[MAX_RANKS], recv[MAX_RANKS];
        fill(seed, 1, sizes[k], 0, send, recv);
        struct ry_record_exchange e = {
            .wall_ns = 1, .type = 9, .type_bytes = 2, .send_count = send, .recv_count = recv};
        double best = 1e9;
        for (int round = 0; round < 60; round++) {
            enum { N = 300 };
            uint64_t t0 = ry_now_ns();
            for (int i = 0; i < N; i++) {
                e.number = (uint64_t)(round * N + i);
                ry_record_exchange(rec, comm, &e);
            }
            double ns = (double)(ry_now_ns() - t0) / N;
            best = ns < best ? ns : best;
            usleep(5000); /* the writer comes four times a second: 64 ranks × 60 rounds go around the ring about five
                             times */
        }
        ry_record_comm_end(rec, comm, "destroy", NULL, 0);
        ry_record_close(rec);
        printf("ry_record_exchange, %d ranks: %.0f ns\n", sizes[k], best);
    }
    fflush(stdout);
}
END_TEST

int main(void)
{
    choose_seed();
    Suite *suite = suite_create("record");
    TCase *t = tcase_create("record");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, round_trip);
    tcase_add_test(t, observed_lines);
    tcase_add_test(t, lines_of_rows);
    tcase_add_test(t, drops_are_counted);
    tcase_add_test(t, many_threads);
    tcase_add_test(t, close_while_recording);
    tcase_add_test(t, size_limit);
    tcase_add_test(t, size_limit_of_matrices);
    tcase_add_test(t, full_disk);
    tcase_add_test(t, file_size_limit);
    tcase_add_test(t, folder_removed);
    tcase_add_test(t, descriptor_stolen);
    tcase_add_test(t, cannot_open);
    tcase_add_test(t, killed);
    tcase_add_test(t, forked_child);
    tcase_add_test(t, large_communicator);
    tcase_add_test(t, idle_sleeps);
    tcase_add_test(t, cost);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
