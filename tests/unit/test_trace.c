/*
 * test_trace.c: reading traces back: random jobs give equal totals; files cut anywhere, damaged anywhere, missing,
 * doubled or of another version are survived and told; and how fast it is.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "base/npy.h"
#include "record/summary.h"
#include "trace_help.h"

/* ---- a job whose truth is known ---- */

#define MAX_RANKS 24
#define MAX_COMMS 3

struct truth {
    int nranks, per_node;
    uint64_t exchanges, salt;
    char id[17];
};

static void record_job(const struct truth *comms, int ncomms, int skip_rank, const struct ry_record_config *config)
{
    for (int rank = 0; rank < MAX_RANKS; rank++) {
        struct ry_record *rec = NULL;
        struct ry_record_comm *comm[MAX_COMMS] = {0};
        uint64_t most = 0, send[MAX_RANKS], recv[MAX_RANKS];
        for (int k = 0; k < ncomms; k++) {
            if (rank >= comms[k].nranks || rank == skip_rank)
                continue;
            if (!rec && !(rec = ry_record_open(config, &err)))
                ck_abort_msg("%s", err.msg);
            struct ry_record_comm_info info =
                info_for(comms[k].id, comms[k].nranks, rank, k ? NULL : "first", comms[k].per_node);
            comm[k] = ry_record_comm(rec, &info);
            most = comms[k].exchanges > most ? comms[k].exchanges : most;
        }
        for (uint64_t x = 0; x < most; x++)
            for (int k = 0; k < ncomms; k++) {
                if (!comm[k] || x >= comms[k].exchanges)
                    continue;
                fill(comms[k].salt, x, comms[k].nranks, rank, send, recv);
                struct ry_record_exchange e = {.number = x,
                                               .wall_ns = 1000 + x,
                                               .type = 7,
                                               .type_bytes = 4,
                                               .send_count = send,
                                               .recv_count = recv};
                ry_record_exchange(rec, comm[k], &e);
                if (x % 2)
                    ry_record_duration(rec, comm[k], x, 10);
            }
        for (int k = 0; k < ncomms; k++)
            if (comm[k])
                ry_record_comm_end(rec, comm[k], "destroy", NULL, 0);
        ry_record_close(rec);
    }
}

/* What rank i sent to rank j. */
static uint64_t sent(const struct truth *c, int i, int j)
{
    uint64_t sum = 0;
    for (uint64_t x = 0; x < c->exchanges; x++)
        sum += 4 * count_of(c->salt, x, i, j);
    return sum;
}

static struct ry_trace_comm *comm_of(const struct ry_trace *t, const char *id)
{
    for (int i = 0; i < t->ncomms; i++)
        if (!strcmp(t->comms[i]->id, id))
            return t->comms[i];
    return NULL;
}

static bool noted(const struct ry_trace *t, const char *words)
{
    for (int i = 0; i < t->nnotes; i++)
        if (strstr(t->notes[i], words))
            return true;
    return false;
}

static void compare(const struct ry_trace *t, const struct truth *c, int missing)
{
    const struct ry_trace_comm *got = comm_of(t, c->id);
    ck_assert_ptr_nonnull(got);
    struct ry_summary s;
    ck_assert_int_eq(ry_summary_make(&s, t, got, &err), 0);
    uint64_t total = 0, cross = 0, self = 0;
    for (int i = 0; i < c->nranks; i++)
        for (int j = 0; j < c->nranks; j++) {
            uint64_t b = i == missing && j == missing ? 0 : sent(c, i, j); /* else one of the two told */
            ck_assert_uint_eq(ry_trace_bytes(got, i, j), b);
            total += b;
            self += i == j ? b : 0;
            cross += i / c->per_node != j / c->per_node && i != missing && j != missing ? b : 0;
        }
    ck_assert_uint_eq(s.bytes, total);
    ck_assert_uint_eq(s.cross_node, cross);
    ck_assert_uint_eq(s.self, self);
    ck_assert_uint_eq(s.in_node + s.cross_node + s.self + s.unknown, total);
    ck_assert(missing >= 0 ? s.unknown > 0 || !c->exchanges : s.unknown == 0);
    ck_assert_uint_eq(s.pairs_differ, 0);
    ck_assert_uint_eq(s.exchanges, c->exchanges);
    ry_summary_free(&s);
}

START_TEST(random_jobs)
{
    uint64_t s = seed;
    for (int round = 0; round < 12; round++) {
        struct truth c[MAX_COMMS];
        int n = 1 + (int)(next(&s) % MAX_COMMS);
        for (int k = 0; k < n; k++) {
            c[k] = (struct truth){.nranks = 2 + (int)(next(&s) % (MAX_RANKS - 1)),
                                  .per_node = 1 + (int)(next(&s) % 8),
                                  .exchanges = 1 + next(&s) % 20,
                                  .salt = next(&s)};
            snprintf(c[k].id, sizeof c[k].id, "%016llx", (unsigned long long)next(&s));
        }
        int missing = round % 3 ? -1 : 1;
        struct ry_record_config config = config_for(dir);
        record_job(c, n, missing, &config);
        struct ry_trace *t = ry_trace_open(dir, &err);
        ck_assert_msg(t, "%s", err.msg);
        ck_assert_int_eq(t->ncomms, n);
        for (int k = 0; k < n; k++)
            compare(t, &c[k], missing);
        ck_assert_int_eq(t->nnotes, missing < 0 ? 0 : n);
        if (missing >= 0)
            ck_assert(noted(t, "ranks are missing: 1"));
        ry_trace_close(t);
        teardown();
        setup();
    }
}
END_TEST

/* ---- files of our own spelling ---- */

static void put(const char *name, const char *text, size_t n)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    unlink(path); /* some file systems write a truncated file back at once, which is slow */
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(text, 1, n, f), n);
    fclose(f);
}

static char *get(const char *name, size_t *n)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "rb");
    ck_assert_ptr_nonnull(f);
    char *text = malloc(1 << 20);
    *n = fread(text, 1, 1 << 20, f);
    fclose(f);
    return text;
}

#define HEAD "{\"t\":\"head\",\"schema\":\"railyard-trace\",\"version\":1,\"host\":\"h\",\"pid\":7,\"wall_ns\":1}\n"
#define COMM(r)                                                                                                        \
    "{\"t\":\"comm\",\"comm\":\"aa\",\"rank\":" r                                                                      \
    ",\"nranks\":3,\"birth\":\"init\",\"seat\":{\"node\":\"n\",\"host\":\"h\"}}\n"
#define X(n)                                                                                                           \
    "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":" n                                                                 \
    ",\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send\":[1,2,3],\"recv\":[4,5,6]}\n"

static struct ry_trace *read_text(const char *text)
{
    put("trace-h-7.jsonl", text, strlen(text));
    struct ry_trace *t = ry_trace_open(dir, &err);
    ck_assert_msg(t, "%s", err.msg);
    return t;
}

START_TEST(other_spellings)
{
    struct ry_trace *t = read_text(
        HEAD COMM("0") X("0") " { \"t\" : \"x\", \"rank\": 0, \"type_bytes\": 4, \"comm\": \"aa\", \"recv\": [4, 5, "
                              "6], \"n\": 1, \"send\": [1, 2, 3], \"later\": {} }\n"
                              "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":2,\"wall_ns\":5,\"type\":\"float32\","
                              "\"type_bytes\":4,\"send_pairs\":[2,3,0,1,1,2],\"recv_pairs\":[],\"name\":\"a\\\"}\"}\n"
                              "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":3,\"type_bytes\":4,\"send_pairs\":[1,2,0,"
                              "1,2,3],\"recv\":[0,0,0]}\n"
                              "{\"t\":\"us\",\"comm\":\"aa\",\"rank\":0,\"n\":3,\"us\":2}\n"
                              "{\"t\":\"us\",\"comm\":\"aa\",\"rank\":0,\"n\":4,\"us\":2.000}\n" X(
                                  "4") "{\"t\":\"weather\",\"sun\":true}\n"
                                       "{\"t\":\"end\"}");
    ck_assert_int_eq(t->nnotes, 1); /* two ranks are missing; a last line without newline but whole is no fault */
    const struct ry_trace_rank *r = t->comms[0]->ranks[0];
    ck_assert_uint_eq(r->lines, 5);
    ck_assert_uint_eq(r->sent[0], 20);
    ck_assert_uint_eq(r->sent[2], 60);
    ck_assert_uint_eq(r->received[0], 48);
    ck_assert_uint_eq(r->times.n, 2);
    ck_assert_double_eq(r->times.matched_us, 4); /* whichever of line and duration came first */
    ck_assert_uint_eq(r->times.bytes, 48);
    ry_trace_close(t);
}
END_TEST

#define AGREED(n, more)                                                                                                \
    "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":" n                                                                 \
    ",\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send\":[1,2,3],\"recv\":[4,5,6]" more "}\n"

/* What lines say of the agreement, in the writer's spelling and in others. */
START_TEST(agreed_lines)
{
    struct ry_trace *t = read_text(
        HEAD COMM("0") X("0") AGREED("1", ",\"strategy\":\"hierarchical\",\"waited_us\":30.500,\"late_us\":10.250")
            AGREED("2", ",\"late_us\":2, \"waited_us\":1.5e2,\"verify\":true,\"strategy\":\"direct\"")
                AGREED("3", ",\"strategy\":\"direct\",\"waited_us\":7.000,\"late_us\":9.000,\"verify\":true,\"name\":\"x\"")
                    AGREED("4", ",\"strategy\":\"direct\"") AGREED("5", ",\"waited_us\":4.000,\"late_us\":1.000")
                        "{\"t\":\"end\"}\n");
    const struct ry_trace_comm *c = t->comms[0];
    const struct ry_trace_agreed *a = &c->agreed;
    ck_assert_uint_eq(c->ranks[0]->lines, 6);
    ck_assert_int_eq(a->nstrategies, 3);
    ck_assert_str_eq(a->strategy[1], "hierarchical");
    ck_assert_uint_eq(c->ranks[0]->by_strategy[1], 1);
    ck_assert_uint_eq(c->ranks[0]->by_strategy[2], 3);
    ck_assert_uint_eq(c->ranks[0]->verified, 2);
    ck_assert_uint_eq(a->waited.n, 4);
    ck_assert_double_eq_tol(a->waited.sum_us, 30.5 + 150 + 7, 1e-9);
    ck_assert_double_eq_tol(a->late.sum_us, 10.25 + 2 + 7, 1e-9); /* never more than was waited */
    ck_assert_double_eq_tol(a->messages.sum_us, 20.25 + 148, 1e-9);
    ry_trace_close(t);
}
END_TEST

#define ROWS(n, more)                                                                                                  \
    "{\"t\":\"rows\",\"comm\":\"aa\",\"rank\":0,\"n\":" n                                                              \
    ",\"way\":\"go\",\"row_bytes\":64,\"rows\":10,\"distinct\":4,\"zero\":2,\"cross\":640,\"packed\":300" more "}\n"

/* What searches for equal rows found, in the writer's spelling and in others; what is damaged counts for nothing. */
START_TEST(rows_lines)
{
    struct ry_trace *t = read_text(
        HEAD COMM("0") AGREED("0", ",\"way\":\"go\"")
            AGREED("1", ",\"way\":\"return\",\"strategy\":\"dedup\",\"waited_us\":1.000,\"late_us\":0.000,\"plain_us\":80.000")
                AGREED("2", ",\"plain_us\":40, \"way\":\"go\",\"strategy\":\"dedup\"")
                    AGREED("3", ",\"way\":\"go\",\"strategy\":\"direct\",\"waited_us\":1.000,\"late_us\":0.000,\"plain_us\":7.000")
                        ROWS("1", "") ROWS("2", ",\"waited_us\":5.000,\"strategy\":\"dedup\"") ROWS("3", ", \"waited_us\":7,\"strategy\":\"dedup\"")
                            "{\"t\":\"rows\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"way\":\"return\",\"row_bytes\":64,\"rows\":0,"
                            "\"distinct\":0,\"zero\":0,\"cross\":900,\"packed\":250,\"strategy\":\"sum\"}\n"
                            ROWS("4", ",\"strategy\":\"direct\"") ROWS("5", ",\"packed\":-1") ROWS("-1", "")
                                "{\"t\":\"us\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"us\":20.000}\n"
                                "{\"t\":\"us\",\"comm\":\"aa\",\"rank\":0,\"n\":2,\"us\":10.000}\n"
                                "{\"t\":\"us\",\"comm\":\"aa\",\"rank\":0,\"n\":3,\"us\":5.000}\n"
                                "{\"t\":\"rows\",\"comm\":\"aa\",\"rank\":1,\"n\":1}\n"
                                "{\"t\":\"end\"}\n");
    struct ry_trace_ways *w = &t->comms[0]->ways;
    ck_assert_int_eq(w->n, 2);
    struct ry_trace_way *go = ry_ways_of(w, "go"), *back = ry_ways_of(w, "return");
    ck_assert_ptr_null(ry_ways_of(w, "up"));
    ck_assert_uint_eq(go->lines, 3);
    ck_assert_uint_eq(back->lines, 1);
    ck_assert_uint_eq(go->searched, 4);
    ck_assert_uint_eq(go->rows, 40);
    ck_assert_uint_eq(go->packed, 2);
    ck_assert_uint_eq(go->waited, 2);
    ck_assert_double_eq_tol(go->waited_us, 12, 1e-9);
    ck_assert_double_eq_tol(ry_way_repeated(go), 0.6, 1e-9);
    ck_assert_double_eq_tol(ry_way_padding(go), 0.2, 1e-9);
    ck_assert_double_eq_tol(ry_way_left(go), 300 / 640.0, 1e-9);
    ck_assert_uint_eq(ry_way_saved(go), 680);
    ck_assert_uint_eq(back->searched, 0);
    ck_assert_uint_eq(back->summed, 1);
    ck_assert_uint_eq(back->packed, 0);
    ck_assert_uint_eq(ry_way_saved(back), 650);
    ck_assert_double_eq(ry_way_left(back), 1);
    ck_assert_double_eq(ry_way_repeated(back), 0);
    ck_assert_uint_eq(ry_way_could_save(back), 0);
    ck_assert_uint_eq(go->estimated, 1);
    ck_assert_double_eq(go->plain_us / go->took_us, 4);
    ck_assert_uint_eq(back->estimated, 1);
    ck_assert_double_eq(back->plain_us / back->took_us, 4);
    ck_assert_uint_eq(t->processes[0].bad_lines, 2);
    ck_assert_uint_eq(t->processes[0].orphan_lines, 1);
    ry_trace_close(t);
}
END_TEST

START_TEST(bins)
{
    static const double from[] = {0, 1, 2, 5, 10, 20, 50, 100, 200};
    for (int i = 0; i < 9; i++) {
        ck_assert_double_eq(ry_bin_from(i), from[i]);
        ck_assert_int_eq(ry_bin_of(from[i]), i);
        ck_assert_int_eq(ry_bin_of(from[i] + 0.99), i);
    }
    ck_assert_int_eq(ry_bin_of(1e30), RY_BINS - 1);
    ck_assert_int_eq(ry_bin_of(ry_bin_from(RY_BINS - 1)), RY_BINS - 1);
}
END_TEST

/* Durations of all ranks become those of exchanges, by strategy and size. */
START_TEST(durations_by_strategy)
{
    struct ry_trace_agreed a;
    struct ry_trace_ways ways = {0};
    ry_agreed_init(&a);
    int hier = ry_agreed_strategy(&a, "hierarchical");
    ck_assert_int_eq(ry_agreed_strategy(&a, ""), RY_TRACE_PLAIN);
    for (uint64_t x = 0; x < 3000; x++) { /* exchange x takes 100 + x % 10 us; 8 ranks, of which one is last, one idle */
        for (uint64_t rank = 0; rank < 8; rank++) {
            uint64_t busy = rank == (x + 3) % 8 ? 10 : 1500 + 100 * (rank % 3);
            double late = rank == x % 8 ? 0 : 1000;
            ry_agreed_duration(&a, x, x % 3 ? hier : RY_TRACE_PLAIN, busy, busy == 10 ? 5 : 100 + (double)(x % 10) + late,
                               (struct ry_agreed_plain){x % 3 ? 2 : 0, x % 3 ? 300 : 0});
        }
    }
    ry_agreed_finish(&a, &ways);
    ck_assert_int_eq(a.ndurations, 2);
    ck_assert_uint_eq(ways.way[1].estimated, 2000);
    ck_assert_double_eq_tol(ways.way[1].plain_us, 2000 * 300, 1e-3);
    ck_assert_double_eq_tol(ways.way[1].took_us, 2000 * 104.5, 2000);
    ck_assert_uint_eq(ways.way[0].estimated, 0);
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(a.durations[i].strategy, i ? hier : RY_TRACE_PLAIN);
        ck_assert_double_eq(ry_bin_from(a.durations[i].bin), 1000);
        ck_assert_uint_eq(a.durations[i].exchanges, i ? 2000 : 1000);
        ck_assert_double_eq(a.durations[i].median_us, 105);
    }
    ry_agreed_free(&a);
    /* no more names than there is room for */
    ry_agreed_init(&a);
    for (int i = 0; i < 2 * RY_TRACE_STRATEGIES; i++) {
        char name[16];
        snprintf(name, sizeof name, "s%d", i);
        ck_assert_int_eq(ry_agreed_strategy(&a, name), i + 1 < RY_TRACE_STRATEGIES ? i + 1 : RY_TRACE_PLAIN);
    }
    /* nor more exchanges, and it ends */
    for (uint64_t x = 0; x < 300000; x++)
        ry_agreed_duration(&a, x, RY_TRACE_PLAIN, 1, 1, (struct ry_agreed_plain){0});
    ry_agreed_finish(&a, &ways);
    ck_assert_int_eq(a.ndurations, 1);
    ck_assert_uint_eq(a.durations[0].exchanges, 262144);
    ry_agreed_free(&a);
}
END_TEST

START_TEST(damaged_lines)
{
    static const char *const bad[] = {
        "\n",
        "{\n",
        "garbage\n",
        "[1]\n",
        "{\"t\":\"x\"}\n",
        "{\"t\":\"us\"}\n",
        "\"x\"\n",
        "{}}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send\":["
        "1,2],\"recv\":[4,5,6]}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send\":["
        "1,2,3,4],\"recv\":[4,5,6]}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send\":["
        "1,2,-3],\"recv\":[4,5,6]}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send\":["
        "1,2,9223372036854775807],\"recv\":[4,5,6]}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":0,\"send\":["
        "1,2,3],\"recv\":[4,5,6]}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send_"
        "pairs\":[3,1],\"recv\":[4,5,6]}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send_"
        "pairs\":[1],\"recv\":[4,5,6]}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send\":["
        "1,2,3],\"recv\":[4,5,6]}}\n",
        "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"wall_ns\":5,\"type\":\"float32\",\"type_bytes\":4,\"send\":["
        "1,2,3],\"recv\":[4,5,6\n",
        "{\"t\":\"us\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"us\":\"2\"}\n",
        AGREED("1", ",\"strategy\":\"direct\",\"waited_us\":-1,\"late_us\":0"),
        AGREED("1", ",\"strategy\":\"direct\",\"waited_us\":\"1\",\"late_us\":0"),
        AGREED("1", ",\"strategy\":\"direct\",\"waited_us\":1.000,\"late_us\":"),
        "{\"t\":\"us\",\"comm\":\"aa\",\"rank\":0,\"n\":1,\"us\":-2}\n",
        "{\"t\":\"comm\",\"comm\":\"bb\",\"rank\":4,\"nranks\":3}\n",
        "{\"t\":\"comm\",\"comm\":\"bb\",\"rank\":0,\"nranks\":2000000000}\n",
        "{\"t\":\"comm\",\"comm\":\"12345678901234567\",\"rank\":0,\"nranks\":2}\n",
        "{\"t\":\"map\",\"comm\":\"aa\",\"rank\":0,\"nodes\":2,\"node\":[0,1,2],\"hosts\":[\"a\",\"b\"]}\n",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[4096];
        snprintf(text, sizeof text, "%s%s%s%s%s", HEAD, COMM("0"), X("0"), bad[i], X("1") "{\"t\":\"end\"}\n");
        struct ry_trace *t = read_text(text);
        ck_assert_msg(t->processes[0].bad_lines == 1, "%llu bad lines for: %s",
                      (unsigned long long)t->processes[0].bad_lines, bad[i]);
        ck_assert(noted(t, "1 damaged line skipped"));
        ck_assert_uint_eq(t->comms[0]->ranks[0]->lines, 2);
        ck_assert_int_eq(t->ncomms, 1);
        ry_trace_close(t);
    }
    struct ry_trace *t = read_text(HEAD X("0") "{\"t\":\"drop\",\"comm\":\"zz\",\"rank\":0}\n");
    ck_assert(noted(t, "2 lines of communicators whose first line is missing"));
    ry_trace_close(t);
}
END_TEST

START_TEST(unreadable_folders)
{
    ck_assert_ptr_null(ry_trace_open("/nonexistent/folder", &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "/nonexistent/folder"));
    ck_assert_ptr_null(ry_trace_open(dir, &err));
    ck_assert_msg(strstr(err.msg, dir) && strstr(err.msg, "holds no trace"), "%s", err.msg);
    put("trace-a-1.jsonl", "", 0);
    ck_assert_ptr_null(ry_trace_open(dir, &err));
    ck_assert_msg(strstr(err.msg, "trace-a-1.jsonl") && strstr(err.msg, "empty"), "%s", err.msg);
    const char *later = "{\"t\":\"head\",\"schema\":\"railyard-trace\",\"version\":2,\"railyard\":\"9.1\"}\n";
    put("trace-a-1.jsonl", later, strlen(later));
    ck_assert_ptr_null(ry_trace_open(dir, &err));
    ck_assert_msg(strstr(err.msg, "version 2") && strstr(err.msg, "9.1"), "%s", err.msg);
    put("trace-a-2.jsonl", "\x89PNG\r\n\n\n", 8);
    char path[128];
    snprintf(path, sizeof path, "%s/trace-folder.jsonl", dir);
    ck_assert_int_eq(mkdir(path, 0700), 0);
    ck_assert_ptr_null(ry_trace_open(dir, &err));
    struct ry_trace *t = read_text(HEAD COMM("0") "{\"t\":\"end\"}\n"); /* one good file is enough */
    ck_assert(noted(t, "version 2"));
    ck_assert(noted(t, "trace-a-2.jsonl: does not begin with the head"));
    ck_assert_int_eq(t->nprocesses, 1);
    ry_trace_close(t);
}
END_TEST

START_TEST(contradictions)
{
    const char *other = HEAD COMM("0") X("0") "{\"t\":\"end\"}\n",
               *wide = HEAD "{\"t\":\"comm\",\"comm\":\"aa\",\"rank\":4,\"nranks\":5}\n{\"t\":\"end\"}\n";
    put("trace-h-8.jsonl", other, strlen(other));
    put("trace-h-9.jsonl", wide, strlen(wide));
    struct ry_trace *t =
        read_text(HEAD COMM("0") X("0") COMM("1") "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":1,\"n\":0,\"type_bytes\":4,"
                                                  "\"send\":[5,0,0],\"recv\":[3,0,0]}\n{\"t\":\"end\"}\n");
    ck_assert(noted(t, "rank 0 of communicator aa is in trace-h-7.jsonl already"));
    ck_assert(noted(t, "says that communicator aa has 5 ranks, others say 3"));
    ck_assert_uint_eq(t->comms[0]->ranks[0]->lines, 1);
    struct ry_summary s;
    ck_assert_int_eq(ry_summary_make(&s, t, t->comms[0], &err), 0);
    ck_assert_uint_eq(s.pairs_checked,
                      4); /* rank 0 to 0: sent 4 bytes, received 16; 0 to 1: sent 8, received 12; 1 to 0 agree */
    ck_assert_uint_eq(s.pairs_differ, 2);
    ck_assert_int_eq(s.differ_from, 0);
    ck_assert_int_eq(s.differ_to, 0);
    ry_summary_free(&s);
    ry_trace_close(t);
}
END_TEST

/* Two sparse and one dense exchange of a real writer, with everything else that a file can hold. */
static char *small_trace(size_t *n, char name[64])
{
    struct ry_record_config config = config_for(dir);
    struct truth c = {.nranks = 4, .per_node = 2, .exchanges = 3, .salt = 1, .id = "00000000000000aa"};
    struct ry_record *rec = ry_record_open(&config, &err);
    struct ry_record_comm_info info = info_for(c.id, 4, 1, "a \"name\"", 2);
    struct ry_record_comm *comm = ry_record_comm(rec, &info);
    struct ry_seat seats[4];
    for (int r = 0; r < 4; r++)
        seats[r] = info_for(c.id, 4, r, NULL, 2).seat;
    struct ry_cluster *map = ry_cluster_build(seats, 4, &err);
    ry_record_map(rec, comm, map, NULL);
    ry_cluster_free(map);
    for (uint64_t x = 0; x < 3; x++) {
        uint64_t send[4], recv[4];
        fill(1, x, 4, 1, send, recv);
        struct ry_record_exchange e = {
            .number = x, .wall_ns = 1000 + x, .type = 7, .type_bytes = 4, .send_count = send, .recv_count = recv};
        ry_record_exchange(rec, comm, &e);
        ry_record_duration(rec, comm, x, 12.5);
    }
    struct ry_record_counter counter = {"calls.allreduce", 2};
    ry_record_comm_end(rec, comm, "destroy", &counter, 1);
    ry_record_close(rec);
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));)
        if (!strncmp(e->d_name, "trace-", 6))
            snprintf(name, 64, "%.63s", e->d_name);
    closedir(d);
    return get(name, n);
}

START_TEST(cut_anywhere)
{
    size_t n;
    char name[64], *text = small_trace(&n, name);
    for (size_t cut = 0; cut <= n; cut++) {
        put(name, text, cut);
        struct ry_trace *t = ry_trace_open(dir, &err);
        size_t head = (size_t)(strchr(text, '\n') - text);
        ck_assert_msg(!t == (cut < head), "cut at %zu", cut);
        if (!t)
            continue;
        size_t whole = 0, exchanges = 0;
        for (const char *p = text, *end; (end = memchr(p, '\n', n - (size_t)(p - text))); p = end + 1)
            if ((size_t)(end - text) <= cut) { /* complete, with or without the newline */
                whole = (size_t)(end - text);
                exchanges += !strncmp(p, "{\"t\":\"x\"", 8);
            }
        bool in_line = cut > whole + 1;
        ck_assert_msg(noted(t, "last line is cut off") == in_line, "cut at %zu of %zu", cut, n);
        ck_assert_uint_eq(t->processes[0].bad_lines, 0);
        if (t->ncomms)
            ck_assert_uint_eq(t->comms[0]->ranks[1]->lines, exchanges);
        else
            ck_assert_uint_eq(exchanges, 0);
        ry_trace_close(t);
    }
    free(text);
}
END_TEST

START_TEST(damaged_anywhere)
{
    size_t n;
    char name[64], *text = small_trace(&n, name), *copy = malloc(n);
    uint64_t s = seed;
    for (int round = 0; round < 3000; round++) {
        memcpy(copy, text, n);
        for (int k = 1 + (int)(next(&s) % 4); k; k--) {
            size_t at = next(&s) % n;
            static const char tricky[] = "\n\0\"{}[],:0123456789-e.\\ua";
            copy[at] = next(&s) % 2 ? (char)next(&s) : tricky[next(&s) % (sizeof tricky - 1)];
        }
        put(name, copy, n);
        struct ry_trace *t = ry_trace_open(dir, &err);
        for (int i = 0; t && i < t->ncomms; i++) {
            struct ry_summary sum;
            ck_assert_int_eq(ry_summary_make(&sum, t, t->comms[i], &err), 0);
            ry_summary_free(&sum);
        }
        ry_trace_close(t);
    }
    free(copy);
    free(text);
}
END_TEST

/* The matrix alone, the lines alone, a damaged matrix, and one that contradicts the lines. */
START_TEST(matrix_files)
{
    size_t n;
    char name[64], file[300] = "", *text = small_trace(&n, name);
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));)
        if (!strncmp(e->d_name, "matrix-", 7))
            snprintf(file, sizeof file, "%s/%.200s", dir, e->d_name);
    closedir(d);
    struct truth c = {.nranks = 4, .exchanges = 3, .salt = 1};
    struct ry_npy npy;
    ck_assert_msg(!ry_npy_open(&npy, file, &err), "%s", err.msg);
    for (int j = 0; j < 4; j++)
        ck_assert_uint_eq(ry_npy_get(&npy, (size_t)j), sent(&c, 1, j));
    ry_npy_close(&npy);
    /* no lines: the sums come from the file */
    char *only = malloc(n);
    size_t len = 0;
    for (const char *p = text; p < text + n; p = strchr(p, '\n') + 1) {
        size_t line = (size_t)(strchr(p, '\n') - p) + 1;
        if (strncmp(p, "{\"t\":\"x\"", 8))
            len += (size_t)((char *)mempcpy(only + len, p, line) - (only + len));
    }
    put(name, only, len);
    struct ry_trace *t = ry_trace_open(dir, &err);
    for (int j = 0; j < 4; j++)
        ck_assert_uint_eq(t->comms[0]->ranks[1]->sent[j], sent(&c, 1, j));
    ry_trace_close(t);
    put(name, text, n);
    /* a cell that contradicts */
    size_t shape[] = {4, 4};
    uint64_t wrong[16] = {1};
    ck_assert_int_eq(ry_npy_save(AT_FDCWD, file, RY_NPY_U64, 2, shape, wrong, &err), 0);
    t = ry_trace_open(dir, &err);
    ck_assert(noted(t, "its lines and its matrix differ"));
    ry_trace_close(t);
    /* of another shape, cut, gone: the lines are enough */
    shape[1] = 3;
    ck_assert_int_eq(ry_npy_save(AT_FDCWD, file, RY_NPY_U64, 2, shape, wrong, &err), 0);
    t = ry_trace_open(dir, &err);
    ck_assert(noted(t, "is no matrix of 4 ranks"));
    ck_assert_uint_eq(t->comms[0]->ranks[1]->sent[2], sent(&c, 1, 2));
    ry_trace_close(t);
    ck_assert_int_eq(truncate(file, 100), 0);
    t = ry_trace_open(dir, &err);
    ck_assert(noted(t, "truncated"));
    ry_trace_close(t);
    ck_assert_int_eq(unlink(file), 0);
    t = ry_trace_open(dir, &err);
    ck_assert(noted(t, "No such file"));
    for (int j = 0; j < 4; j++)
        ck_assert_uint_eq(t->comms[0]->ranks[1]->sent[j], sent(&c, 1, j));
    ry_trace_close(t);
    free(only);
    free(text);
}
END_TEST

START_TEST(quantiles)
{
    char text[1 << 16] = HEAD COMM("0");
    size_t n = strlen(text);
    for (int i = 1; i <= 1000; i++)
        n += (size_t)snprintf(text + n, sizeof text - n,
                              "{\"t\":\"us\",\"comm\":\"aa\",\"rank\":0,\"n\":%d,\"us\":%d.500}\n", i,
                              (i * 7919) % 1000 * 100);
    struct ry_trace *t = read_text(text);
    const struct ry_trace_times *times = &t->comms[0]->ranks[0]->times;
    ck_assert_uint_eq(times->n, 1000);
    for (int q = 0; q <= 100; q += 5) {
        double exact = q * 999 / 100 * 100 + 0.5, got = ry_trace_quantile(times, q / 100.0);
        ck_assert_msg(got >= exact * 0.984 - 1e-9 && got <= exact * 1.016 + 1e-9, "quantile %d: %f for %f", q, got,
                      exact);
    }
    ck_assert_double_eq(ry_trace_quantile(&(struct ry_trace_times){0}, 0.5), 0);
    ry_trace_close(t);
}
END_TEST

static const char *kind_of(const char *lines)
{
    static char kind[64];
    char text[4096];
    snprintf(text, sizeof text, "%s%s%s", HEAD, lines, "{\"t\":\"end\"}\n");
    struct ry_trace *t = read_text(text);
    struct ry_summary s;
    ck_assert_int_eq(ry_summary_make(&s, t, t->comms[0], &err), 0);
    strcpy(kind, s.kind);
    ry_summary_free(&s);
    ry_trace_close(t);
    return kind;
}

#define END(counters)                                                                                                  \
    "{\"t\":\"comm_end\",\"comm\":\"aa\",\"rank\":0,\"how\":\"destroy\",\"counters\":{" counters "}}\n"

START_TEST(kinds)
{
    ck_assert_str_eq(kind_of(COMM("0") X("0")), "expert-parallel (all-to-all)");
    ck_assert_str_eq(kind_of(COMM("0") X("0") END("\"calls.allreduce\":5")), "mixed (all-to-all and reductions)");
    ck_assert_str_eq(kind_of(COMM("0") END("\"calls.allreduce\":5")), "data-parallel (all-reduce)");
    ck_assert_str_eq(kind_of(COMM("0") END("\"calls.reducescatter\":5,\"calls.allgather\":5")),
                     "sharded data-parallel (reduce-scatter)");
    ck_assert_str_eq(kind_of(COMM("0") END("\"calls.send\":5,\"plain_groups\":5")), "pipeline (point-to-point)");
    ck_assert_str_eq(kind_of(COMM("0") END("\"calls.broadcast\":5")), "broadcast");
    ck_assert_str_eq(kind_of(COMM("0") END("\"calls.allreduce\":0")), "unused");
    ck_assert_str_eq(kind_of(COMM("0")), "unknown");
    ck_assert_str_eq(kind_of("{\"t\":\"comm\",\"comm\":\"aa\",\"rank\":0,\"nranks\":1}\n"), "single rank");
    ck_assert_str_eq(
        kind_of(COMM("0") END(
            "\"calls.allgather\":1") "{\"t\":\"comm\",\"comm\":\"bb\",\"rank\":0,\"nranks\":1}\n"
                                     "{\"t\":\"x\",\"comm\":\"bb\",\"rank\":0,\"n\":0,\"type_bytes\":4,\"send\":[1],"
                                     "\"recv\":[1],\"gather_comm\":\"aa\",\"gather_count\":64}\n"),
        "expert counts (int64 all-gather)");
}
END_TEST

/* Prints lines a second; fails only if memory grows with the lines. */
START_TEST(speed)
{
    char path[128];
    snprintf(path, sizeof path, "%s/trace-h-7.jsonl", dir);
    FILE *f = fopen(path, "w");
    enum { N = 100000, RANKS = 64 };
    fprintf(f, HEAD "{\"t\":\"comm\",\"comm\":\"aa\",\"rank\":0,\"nranks\":%d}\n", RANKS);
    for (int i = 0; i < N; i++) {
        fprintf(f,
                "{\"t\":\"x\",\"comm\":\"aa\",\"rank\":0,\"n\":%d,\"wall_ns\":1795320165058508696,\"type\":"
                "\"bfloat16\",\"type_bytes\":2,\"send\":[",
                i);
        for (int r = 0; r < RANKS; r++)
            fprintf(f, "%s%d", r ? "," : "", (i * 31 + r * 17) % 900000);
        fprintf(f, "],\"recv\":[");
        for (int r = 0; r < RANKS; r++)
            fprintf(f, "%s%d", r ? "," : "", (i * 17 + r * 31) % 900000);
        fprintf(f, "]}\n");
    }
    fclose(f);
    uint64_t t0 = ry_now_ns();
    struct ry_trace *t = ry_trace_open(dir, &err);
    double s = (double)(ry_now_ns() - t0) / 1e9;
    ck_assert_uint_eq(t->comms[0]->ranks[0]->lines, N);
    printf("reading: %.0f lines/s of %d ranks (%.0f MB/s)\n", N / s, RANKS, (double)t->bytes / s / 1e6);
    fflush(stdout);
    ry_trace_close(t);
}
END_TEST

int main(void)
{
    choose_seed();
    Suite *suite = suite_create("trace");
    TCase *t = tcase_create("trace");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, random_jobs);
    tcase_add_test(t, other_spellings);
    tcase_add_test(t, agreed_lines);
    tcase_add_test(t, rows_lines);
    tcase_add_test(t, bins);
    tcase_add_test(t, durations_by_strategy);
    tcase_add_test(t, damaged_lines);
    tcase_add_test(t, unreadable_folders);
    tcase_add_test(t, contradictions);
    tcase_add_test(t, cut_anywhere);
    tcase_add_test(t, damaged_anywhere);
    tcase_add_test(t, matrix_files);
    tcase_add_test(t, quantiles);
    tcase_add_test(t, kinds);
    tcase_add_test(t, speed);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
