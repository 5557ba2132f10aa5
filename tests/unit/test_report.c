/*
 * test_report.c: `railyard report` as a whole: the text, the JSON against the truth, the picture as XML, for 1 to 200
 * ranks, odd names, missing ranks, and files that cannot be written.
 */
#include <fcntl.h>
#include <libxml/parser.h>
#include <math.h>
#include <stdarg.h>
#include <sys/stat.h>

#include "base/kl.h"
#include "command.h"
#include "trace_help.h"

static char said[4096]; /* by command_fail, which main.c of the tool has otherwise */

int command_fail(const char *argv0, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(said, sizeof said, fmt, ap);
    va_end(ap);
    return 1;
}

/* Run the command; returns its text. */
static char *report(int want, const char *option, const char *value, const char *option2, const char *value2)
{
    char *argv[] = {"railyard report", dir, (char *)option, (char *)value, (char *)option2, (char *)value2, NULL};
    int argc = 2 + (option ? 2 : 0) + (option2 ? 2 : 0);
    FILE *f = tmpfile();
    fflush(stdout);
    int saved = dup(STDOUT_FILENO);
    dup2(fileno(f), STDOUT_FILENO);
    said[0] = 0;
    int rc = cmd_report(argc, argv);
    fflush(stdout);
    dup2(saved, STDOUT_FILENO);
    close(saved);
    ck_assert_msg(rc == want, "exit %d: %s", rc, said);
    rewind(f);
    char *text = malloc(8 << 20);
    text[fread(text, 1, (8 << 20) - 1, f)] = 0;
    fclose(f);
    return text;
}

/* Rank i sends i + j + 1 elements of 2 bytes to rank j in each exchange; rank 0 sends ten times that. */
static uint64_t elements(int i, int j)
{
    return (uint64_t)(i + j + 1) * (i ? 1 : 10);
}

static void record_job(int nranks, int per_node, int exchanges, const char *name, int skip)
{
    uint64_t *send = malloc(2 * (size_t)nranks * sizeof *send), *recv = send + nranks;
    for (int r = 0; r < nranks; r++) {
        if (r == skip)
            continue;
        struct ry_record_config config = config_for(dir);
        config.buffer_bytes = 1 << 16;
        struct ry_record *rec = ry_record_open(&config, &err);
        ck_assert_msg(rec, "%s", err.msg);
        struct ry_record_comm_info info = info_for("00000000000000aa", nranks, r, name, per_node);
        struct ry_record_comm *comm = ry_record_comm(rec, &info);
        for (int j = 0; j < nranks; j++) {
            send[j] = elements(r, j);
            recv[j] = elements(j, r);
        }
        for (int x = 0; x < exchanges; x++) {
            struct ry_record_exchange e = {.number = (uint64_t)x,
                                           .wall_ns = 1,
                                           .type = 9,
                                           .type_bytes = 2,
                                           .send_count = send,
                                           .recv_count = recv};
            ry_record_exchange(rec, comm, &e);
            ry_record_duration(rec, comm, (uint64_t)x, r == 1 ? 50 : 100);
        }
        ry_record_comm_end(rec, comm, "destroy", NULL, 0);
        ry_record_close(rec);
    }
    free(send);
}

static json_int_t integer(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);
    ck_assert_msg(json_is_integer(v), "%s is no integer", key);
    return json_integer_value(v);
}

static void check_picture(const char *file)
{
    char *text = report(0, "--svg", file, NULL, NULL);
    free(text);
    xmlDocPtr doc = xmlReadFile(file, NULL, XML_PARSE_NONET);
    ck_assert_msg(doc, "%s is no XML", file);
    ck_assert_str_eq((const char *)xmlDocGetRootElement(doc)->name, "svg");
    int cells = 0;
    for (xmlNodePtr n = xmlDocGetRootElement(doc)->children; n; n = n->next)
        cells += n->type == XML_ELEMENT_NODE && !strcmp((const char *)n->name, "rect");
    ck_assert_int_gt(cells, 4);
    xmlFreeDoc(doc);
}

START_TEST(numbers)
{
    enum { N = 6, X = 10 };
    record_job(N, 3, X, "EP group", -1);
    char *text = report(0, "--json", "-", NULL, NULL);
    json_t *o = json_loads(text, 0, NULL);
    ck_assert_msg(o, "not JSON: %.200s", text);
    uint64_t total = 0, cross = 0, self = 0, received[N] = {0};
    const json_t *c = json_array_get(json_object_get(o, "communicators"), 0), *m = json_object_get(c, "rank_matrix");
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            uint64_t b = 2 * X * elements(i, j);
            total += b;
            self += i == j ? b : 0;
            cross += i / 3 != j / 3 ? b : 0;
            received[j] += i != j ? b : 0;
            ck_assert_uint_eq((uint64_t)json_integer_value(json_array_get(json_array_get(m, (size_t)i), (size_t)j)), b);
        }
    ck_assert_str_eq(json_string_value(json_object_get(o, "schema")), "railyard-report");
    ck_assert_int_eq(integer(o, "version"), 1);
    ck_assert_int_eq(integer(o, "nodes"), 2);
    ck_assert_int_eq(integer(o, "ranks"), N);
    ck_assert_int_eq(integer(o, "processes"), N);
    ck_assert_int_eq(integer(o, "exchanges"), X);
    ck_assert_uint_eq((uint64_t)integer(o, "bytes_total"), total);
    ck_assert_uint_eq((uint64_t)integer(o, "bytes_cross_node"), cross);
    ck_assert_uint_eq((uint64_t)integer(c, "bytes_self"), self);
    ck_assert_uint_eq((uint64_t)integer(c, "bytes_in_node"), total - cross - self);
    ck_assert_int_eq(integer(json_object_get(c, "agreement"), "pairs_differ"), 0);
    ck_assert_int_eq(integer(json_object_get(c, "agreement"), "pairs_checked"), N * N);
    const json_t *peak = json_object_get(json_object_get(c, "imbalance"), "sent"), *time = json_object_get(c, "time");
    ck_assert_int_eq(integer(peak, "who"), 0);
    peak = json_object_get(json_object_get(c, "imbalance"), "received");
    uint64_t most = 0, sum = 0;
    for (int j = 0; j < N; j++) {
        most = received[j] > most ? received[j] : most;
        sum += received[j];
    }
    ck_assert_double_eq_tol(json_number_value(json_object_get(peak, "over_mean")), (double)most * N / (double)sum,
                            1e-6);
    ck_assert_int_eq(integer(json_object_get(time, "shortest"), "rank"), 1);
    ck_assert_double_eq_tol(json_number_value(json_object_get(time, "median_us")), 100, 1e-9);
    ck_assert_uint_eq(json_array_size(json_object_get(c, "ranks")), N);
    ck_assert_int_eq((int)json_array_size(json_object_get(o, "notes")), 0);
    json_decref(o);
    free(text);
    text = report(0, NULL, NULL, NULL, NULL);
    ck_assert_ptr_nonnull(strstr(text, "\"EP group\": expert-parallel (all-to-all), inferred"));
    ck_assert_ptr_nonnull(strstr(text, "6 ranks on 2 nodes"));
    ck_assert_ptr_nonnull(strstr(text, "rank 0 sends"));
    ck_assert_ptr_nonnull(strstr(text, "rank 1 arrives last"));
    ck_assert_ptr_null(strstr(text, "contradicts"));
    free(text);
}
END_TEST

START_TEST(pictures)
{
    static const struct {
        int nranks, per_node;
    } sizes[] = {{1, 1}, {2, 1}, {5, 2}, {16, 16}, {64, 8}, {130, 1}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char file[128];
        record_job(
            sizes[i].nranks, sizes[i].per_node, 1,
            "<&\"'>\x01 \xc3\xa9\xe2\x82\xac and a name that is longer than sixty byte\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9",
            i == 2 ? 3 : -1);
        snprintf(file, sizeof file, "%s/picture.svg", dir);
        check_picture(file);
        teardown();
        setup();
    }
}
END_TEST

/* 2 ranks on 2 nodes; from the 4th exchange on they agree, rank 1 waiting longer. */
static void record_agreed(int exchanges, uint64_t differs, uint64_t short_of_staging)
{
    static const uint64_t counts[2] = {1000, 2000};
    for (int r = 0; r < 2; r++) {
        struct ry_record_config config = config_for(dir);
        struct ry_record *rec = ry_record_open(&config, &err);
        struct ry_record_comm_info info = info_for("00000000000000aa", 2, r, NULL, 1);
        struct ry_record_comm *comm = ry_record_comm(rec, &info);
        for (int x = 0; x < exchanges; x++) {
            struct ry_record_exchange e = {.number = (uint64_t)x, .wall_ns = 1, .type = 9, .type_bytes = 2,
                                           .send_count = counts, .recv_count = counts};
            if (x >= 3) {
                e.direction = x % 2 ? "go" : "return";
                e.plain_us = 150;
                e.strategy = x % 2 ? "hierarchical" : "<odd>"; /* of a later Railyard; must not break the picture */
                e.waited_us = r ? 3000 : 30;
                e.late_us = r ? 2900 : 0;
                e.verify = x == 5;
            }
            ry_record_exchange(rec, comm, &e);
            struct ry_record_rows rows = {.number = (uint64_t)x, .direction = "go", .row_bytes = 100, .rows = 20, .distinct = 5,
                                          .zero = 2, .cross = 2000, .packed = 600, .waited_us = x == 5 ? 40 : 0, .strategy = x == 5 ? "dedup" : "direct"};
            if (x == 5 || x == 7)
                ry_record_rows(rec, comm, &rows);
            struct ry_record_rows sum = {.number = (uint64_t)x, .direction = "return", .row_bytes = 100, .cross = 3000, .packed = 900,
                                         .strategy = "sum"};
            if (x == 6)
                ry_record_rows(rec, comm, &sum);
            ry_record_duration(rec, comm, (uint64_t)x, x < 3 ? 400 : x == 5 ? 9000 : 100);
        }
        struct ry_record_counter counters[] = {{"verify_differs", r ? differs : 0}, {"short_of_staging", r ? 0 : short_of_staging}, {"over_ucx", r ? 0 : short_of_staging / 2}};
        ry_record_comm_end(rec, comm, "destroy", counters, 3);
        ry_record_close(rec);
    }
}

static json_t *agreed_on(void)
{
    char *text = report(0, "--json", "-", NULL, NULL);
    json_t *o = json_loads(text, 0, NULL);
    ck_assert_msg(o, "not JSON: %.200s", text);
    json_t *a = json_object_get(json_array_get(json_object_get(o, "communicators"), 0), "agreed_on");
    json_incref(a);
    json_decref(o);
    free(text);
    return a;
}

START_TEST(agreed)
{
    char file[128];
    record_agreed(103, 0, 0);
    json_t *o = agreed_on();
    ck_assert_int_eq(integer(o, "exchanges"), 100);
    ck_assert_int_eq(integer(json_object_get(o, "by_strategy"), "hierarchical"), 50);
    ck_assert_int_eq(integer(json_object_get(o, "by_strategy"), "<odd>"), 50);
    ck_assert_int_eq(integer(o, "verified"), 1);
    const json_t *waits = json_object_get(o, "waits"), *bin, *d;
    json_int_t sum[2] = {0};
    size_t i;
    ck_assert_int_eq(integer(waits, "n"), 200);
    ck_assert_double_eq_tol(json_number_value(json_object_get(json_object_get(waits, "in_all"), "p90_us")), 3000, 3000 * 0.016);
    ck_assert_double_eq_tol(json_number_value(json_object_get(json_object_get(waits, "in_all"), "p99_us")), 3000, 3000 * 0.016);
    ck_assert_double_eq_tol(json_number_value(json_object_get(json_object_get(waits, "messages"), "p99_us")), 100, 1.6);
    ck_assert_double_eq_tol(json_number_value(json_object_get(json_object_get(waits, "late_ranks"), "median_us")), 0, 2e-3);
    json_array_foreach(json_object_get(waits, "histogram"), i, bin)
    {
        double from = json_number_value(json_object_get(bin, "from_us"));
        ck_assert_int_eq(integer(bin, "waits"), from == 20 || from == 2000 ? 100 : 0);
        ck_assert_int_eq(integer(bin, "messages"), from == 20 || from == 100 ? 100 : 0);
        sum[0] += integer(bin, "waits");
        sum[1] += integer(bin, "messages");
    }
    ck_assert_int_eq(sum[0], 200);
    ck_assert_int_eq(sum[1], 200);
    ck_assert_uint_eq(json_array_size(json_object_get(o, "durations")), 3);
    json_array_foreach(json_object_get(o, "durations"), i, d)
    {
        const char *strategy = json_string_value(json_object_get(d, "strategy"));
        ck_assert_double_eq(json_number_value(json_object_get(d, "from_bytes")), 2000); /* 4000 and 2000 to the other rank */
        ck_assert_double_eq(json_number_value(json_object_get(d, "median_us")), strcmp(strategy, "plain") ? 100 : 400);
        ck_assert_int_eq(integer(d, "exchanges"), !strcmp(strategy, "plain") ? 3 : !strcmp(strategy, "<odd>") ? 50 : 49);
    }
    json_decref(o);
    char *text = report(0, NULL, NULL, NULL, NULL);
    ck_assert_msg(strstr(text, "agreed on  100 of 103 exchanges: 50 <odd>, 50 hierarchical; 1 verified"), "%s", text);
    ck_assert_ptr_nonnull(strstr(text, "99 %\n             in all"));
    ck_assert_ptr_nonnull(strstr(text, "2 ms to 5 ms           100 ########################"));
    ck_assert_ptr_nonnull(strstr(text, "100 us (49)"));
    ck_assert_ptr_null(strstr(text, "RAILYARD_STAGING"));
    free(text);
    snprintf(file, sizeof file, "%s/picture.svg", dir);
    check_picture(file);
}
END_TEST

/* Equal rows: exchanges 5 and 7 of 50 that go were searched, 5 went packed. Nodes of one rank each: 4000 or 2000 bytes cross. */
START_TEST(equal_rows)
{
    char file[128];
    record_agreed(103, 0, 0);
    char *text = report(0, "--json", "-", NULL, NULL);
    json_t *o = json_loads(text, 0, NULL), *way;
    const json_t *ways = json_object_get(json_array_get(json_object_get(o, "communicators"), 0), "directions");
    size_t i;
    ck_assert_uint_eq(json_array_size(ways), 2);
    json_array_foreach(ways, i, way)
    {
        bool go = !strcmp(json_string_value(json_object_get(way, "direction")), "go");
        const json_t *searched = json_object_get(way, "searched"), *estimate = json_object_get(way, "estimate");
        ck_assert_int_eq(integer(way, "lines"), 100);
        ck_assert_int_eq(integer(way, "bytes_cross_node"), 50 * 6000);
        ck_assert_int_eq(integer(way, "packed"), go ? 2 : 0);
        ck_assert_int_eq(integer(way, "bytes_saved"), go ? 2800 : 4200);
        ck_assert_int_eq(integer(way, "summed"), go ? 0 : 2);
        ck_assert_int_eq(integer(way, "bytes_could_save"), go ? 210000 : 0);
        ck_assert_int_eq(integer(estimate, "exchanges"), go ? 49 : 50); /* one was verified */
        ck_assert_double_eq(json_number_value(json_object_get(estimate, "plain_us")), 150);
        ck_assert_double_eq(json_number_value(json_object_get(estimate, "took_us")), 100);
        ck_assert_int_eq(json_is_null(searched), !go);
        if (!go)
            continue;
        ck_assert_int_eq(integer(searched, "searches"), 4);
        ck_assert_int_eq(integer(searched, "rows"), 80);
        ck_assert_double_eq_tol(json_number_value(json_object_get(searched, "repeated")), 0.75, 1e-9);
        ck_assert_double_eq_tol(json_number_value(json_object_get(searched, "padding")), 0.1, 1e-9);
    }
    json_decref(o);
    free(text);
    text = report(0, NULL, NULL, NULL, NULL);
    ck_assert_msg(strstr(text, "go              300 kB   8.00 kB    75.0 %    10.0 %     30.0 %    2.80 kB     210 kB"), "%s", text);
    ck_assert_msg(strstr(text, "return          300 kB      none                                   4.20 kB"), "%s", text);
    ck_assert_msg(strstr(text, "return: rows of one token were added up before they crossed in 2 sides of exchanges: 6.00 kB as 1.80 kB"), "%s", text);
    ck_assert_msg(strstr(text, "go: the job's threads waited for 2 of 4 searches, 40.0 us on average"), "%s", text);
    ck_assert_msg(strstr(text, "took 100 us on average, plain NCCL 150 us by the model: 1.50x"), "%s", text);
    free(text);
    snprintf(file, sizeof file, "%s/picture.svg", dir);
    check_picture(file);
}
END_TEST

static double real(const json_t *o, const char *key)
{
    return json_number_value(json_object_get(o, key));
}

/* Two nodes of a rank each: of 6000 bytes that each rank sends, rank 0 keeps 2000, rank 1 4000. */
START_TEST(locality)
{
    char file[128];
    record_agreed(103, 0, 0);
    char *text = report(0, "--json", "-", NULL, NULL);
    json_t *o = json_loads(text, 0, NULL), *way, *bin;
    const json_t *local = json_object_get(json_array_get(json_object_get(o, "communicators"), 0), "locality");
    double kl = (2 * log(1 / 3.0 / 0.995) + 4 * log(2 / 3.0 / 0.005) + 2 * log(1 / 3.0 / 0.005) + 4 * log(2 / 3.0 / 0.995)) / 12;
    size_t i, k;
    ck_assert_int_eq(integer(local, "exchanges_per_bin"), 4);
    ck_assert_double_eq_tol(real(local, "kl_even"), (log(0.5 / 0.995) + log(0.5 / 0.005)) / 2, 1e-6);
    ck_assert_uint_eq(json_array_size(json_object_get(local, "directions")), 3);
    json_array_foreach(json_object_get(local, "directions"), i, way)
    {
        const char *name = json_string_value(json_object_get(way, "direction"));
        json_int_t bytes = 0;
        ck_assert_int_eq(integer(way, "bytes"), name ? 50 * 12000 : 3 * 12000);
        ck_assert_double_eq_tol(real(way, "on_rank"), 0.5, 1e-6);
        ck_assert_double_eq_tol(real(way, "on_node"), 0.5, 1e-6);
        ck_assert_double_eq_tol(real(way, "leaves"), 0.5, 1e-6);
        ck_assert_double_eq_tol(real(way, "kl"), kl, 1e-6);
        if (name && !strcmp(name, "go")) /* searches found 600 of 2000 bytes left */
            ck_assert_double_eq_tol(real(way, "leaves_distinct"), 0.15 / 0.65, 1e-6);
        else
            ck_assert(json_is_null(json_object_get(way, "leaves_distinct")));
        ck_assert_uint_eq(json_array_size(json_object_get(way, "over_time")), 26);
        json_array_foreach(json_object_get(way, "over_time"), k, bin)
        {
            ck_assert_int_eq(integer(bin, "from"), 4 * (json_int_t)k);
            bytes += integer(bin, "bytes");
        }
        ck_assert_int_eq(bytes, integer(way, "bytes"));
    }
    json_decref(o);
    free(text);
    text = report(0, NULL, NULL, NULL, NULL);
    ck_assert_msg(strstr(text, "go               50.0 %        50.0 %    50.0 %           23.1 %           2.02"), "%s", text);
    free(text);
    snprintf(file, sizeof file, "%s/picture.svg", dir);
    check_picture(file);
}
END_TEST

/* Traffic that comes home little by little, and bins that grow. */
START_TEST(locality_over_time)
{
    static struct ry_trace_local l;
    static const int node[4] = {0, 0, 1, -1};
    uint64_t matrix[4];
    struct ry_local_bin b = {.nodes = matrix};
    for (uint64_t x = 0; x < 1000; x++) {
        uint64_t count[4] = {10, x, 1000 - x, 7};
        ry_local_add(&l, "go", x, 0, 4, node, 2, count, 2);
    }
    ry_local_add(&l, "go", UINT64_MAX, 0, 4, node, 2, (uint64_t[4]){1, 1, 1, 1}, 2); /* damaged */
    ck_assert_uint_eq(l.width, 32);
    uint64_t before = 0, lines = 0;
    for (int i = 0; i < RY_LOCAL_BINS; i++) {
        ck_assert(ry_local_sum(&l, 0, i, i + 1, 2, &b));
        uint64_t n = i < 31 ? 32 : 8;
        ck_assert_uint_eq(b.lines, n);
        ck_assert_uint_eq(b.self, 20 * n);
        ck_assert_uint_eq(b.unknown, 14 * n);
        ck_assert_uint_eq(b.in_node + b.cross, 2000 * n);
        ck_assert_uint_eq(matrix[0], b.self + b.in_node);
        ck_assert_uint_eq(matrix[1], b.cross);
        ck_assert(b.in_node / n > before || !i);
        before = b.in_node / n;
        lines += b.lines;
    }
    ck_assert_uint_eq(lines, 1000);
    ck_assert(ry_local_sum(&l, 0, 0, RY_LOCAL_BINS, 2, &b));
    ck_assert_uint_eq(b.in_node, 2 * 999 * 1000 / 2);
    ry_local_free(&l);
    /* the distance: nothing leaves, all leaves, and nothing there */
    ck_assert_double_lt(ry_distance_to_local((uint64_t[4]){5, 0, 0, 9}, 2), 0.01);
    ck_assert_double_eq_tol(ry_distance_to_local((uint64_t[4]){0, 5, 9, 0}, 2), log(1 / 0.005), 1e-9);
    ck_assert_double_eq_tol(ry_distance_to_local((uint64_t[9]){4, 4, 4, 4, 4, 4, 4, 4, 4}, 3), ry_distance_of_even(3), 1e-9);
    ck_assert(isnan(ry_distance_to_local((uint64_t[4]){0}, 2)));
}
END_TEST

START_TEST(agreed_few)
{
    record_agreed(52, 1, 30);
    json_t *o = agreed_on(), *waits = json_object_get(o, "waits");
    ck_assert_int_eq(integer(waits, "n"), 98);
    ck_assert(json_is_null(json_object_get(json_object_get(waits, "in_all"), "p99_us")));
    ck_assert_int_eq(integer(o, "verify_differs"), 1);
    ck_assert_int_eq(integer(o, "short_of_staging"), 30);
    ck_assert_int_eq(integer(o, "over_ucx"), 15);
    json_decref(o);
    char *text = report(0, NULL, NULL, NULL, NULL);
    ck_assert_ptr_null(strstr(text, "99 %"));
    ck_assert_ptr_nonnull(strstr(text, "differed from plain NCCL"));
    ck_assert_ptr_nonnull(strstr(text, "30 exchanges went direct for want of staging memory: raise RAILYARD_STAGING"));
    ck_assert_ptr_nonnull(strstr(text, "UCX carried what crosses nodes in 15 of the 49 exchanges"));
    free(text);
}
END_TEST

START_TEST(agreed_never)
{
    record_agreed(3, 0, 0);
    json_t *o = agreed_on();
    ck_assert(json_is_null(o));
    json_decref(o);
    char *text = report(0, NULL, NULL, NULL, NULL);
    static const char *const words[] = {"agreed", "verdict", "durations", "equal rows"};
    for (size_t i = 0; i < 4; i++)
        ck_assert_msg(!strstr(text, words[i]), "%s", text);
    free(text);
}
END_TEST

START_TEST(missing_ranks)
{
    record_job(6, 3, 2, NULL, 4);
    char *text = report(0, NULL, NULL, NULL, NULL);
    ck_assert_ptr_nonnull(strstr(text, "1 of its 6 ranks are missing: 4"));
    ck_assert_ptr_nonnull(strstr(text, "nodes unknown"));
    ck_assert_ptr_nonnull(strstr(text, "5 of them read"));
    free(text);
}
END_TEST

START_TEST(failures)
{
    free(report(1, NULL, NULL, NULL, NULL));
    ck_assert_msg(strstr(said, "holds no trace"), "%s", said);
    record_job(2, 1, 1, NULL, -1);
    free(report(1, "--json", "/nonexistent/x.json", NULL, NULL));
    ck_assert_msg(strstr(said, "/nonexistent/x.json: cannot be written: No such file"), "%s", said);
    free(report(1, "--svg", "/nonexistent/x.svg", NULL, NULL));
    ck_assert_msg(strstr(said, "/nonexistent/x.svg"), "%s", said);
    free(report(1, "--svg", "/dev/full", NULL, NULL));
    ck_assert_msg(strstr(said, "No space left"), "%s", said);
    free(report(1, "--json", "/dev/full", NULL, NULL));
    ck_assert_msg(strstr(said, "No space left"), "%s", said);
    free(report(1, "--comm", "ff", NULL, NULL));
    ck_assert_msg(strstr(said, "no communicator whose id begins with 'ff'"), "%s", said);
    free(report(0, "--comm", "0000", "--json", "/dev/null"));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("report");
    TCase *t = tcase_create("report");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, numbers);
    tcase_add_test(t, pictures);
    tcase_add_test(t, agreed);
    tcase_add_test(t, agreed_few);
    tcase_add_test(t, agreed_never);
    tcase_add_test(t, equal_rows);
    tcase_add_test(t, locality);
    tcase_add_test(t, locality_over_time);
    tcase_add_test(t, missing_ranks);
    tcase_add_test(t, failures);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
