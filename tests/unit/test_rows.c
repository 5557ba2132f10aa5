/*
 * test_rows.c: equal rows found, packed and expanded (run/rows.h), on every backend that this machine has: against an
 * oracle that compares each row with all others, against the twins on host memory bit for bit, and there and back. On
 * a real GPU it also prints how fast the kernels are beside a plain copy; RY_TEST_SMALL=1 leaves that out, for
 * compute-sanitizer.
 */
#include <check.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "on_devices.h"
#include "run/internal.h"
#include "plan/plan.h"
#include "run/rows.h"
#include "run/rows_kernels.h"

static void *stream;
static uint64_t seed;

static uint64_t draw(uint64_t below)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (seed >> 11) % below;
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
    ok(device->stream_create(&stream, &err));
}

/* ---- an exchange to scan ---- */

enum { RANKS = 300 };
struct job {
    int nranks, nnodes;
    int node[RANKS];
    uint64_t row_bytes, bytes[RANKS], at[RANKS], size; /* segments in a buffer of `size` bytes */
    unsigned char *data;
    uint64_t sample_mask, full_mask;
    unsigned blocks;
    bool scan[RANKS];
    /* what the oracle says of each node */
    uint64_t rows[RANKS], distinct[RANKS], zero[RANKS], least[RANKS], most[RANKS], early[RANKS][3];
    bool copies; /* asked for, too */
    int parts;
    uint32_t told;       /* K, where it is told how often rows occur among all */
    uint64_t odd, many;  /* what the oracle says of that */
    bool *alone;         /* [all rows, rank after rank]: goes by itself; NULL: none does */
};

enum mix { ANY, EQUAL, DISTINCT, ZERO, TOKENS };

static uint64_t rows_of(uint64_t bytes, uint64_t row_bytes)
{
    return (bytes + row_bytes - 1) / row_bytes;
}

static uint64_t all_rows(const struct job *j)
{
    uint64_t n = 0;
    for (int r = 0; r < j->nranks; r++)
        n += rows_of(j->bytes[r], j->row_bytes);
    return n;
}

static void noise(unsigned char *p, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        p[i] = (unsigned char)draw(256);
}

/* Rows of a segment: new ones, tokens of a pool, all zero, the token before with one bit changed, or sparse. */
static void write_rows(struct job *j, int rank, enum mix mix, const unsigned char *pool, uint64_t tokens)
{
    for (uint64_t at = 0, n; at < j->bytes[rank]; at += n) {
        unsigned char *row = j->data + j->at[rank] + at;
        n = j->bytes[rank] - at < j->row_bytes ? j->bytes[rank] - at : j->row_bytes;
        uint64_t kind = mix == ANY ? draw(10) : mix == TOKENS ? 7 : 0;
        if (mix == EQUAL || kind > 4)
            memcpy(row, pool + (mix == EQUAL ? 0 : draw(tokens)) * j->row_bytes, n);
        else if (mix == ZERO || kind == 4)
            memset(row, 0, n);
        else
            noise(row, n);
        if (kind == 3)
            memset(row, 0, n);
        if (kind == 3 || kind == 9 || kind == 8)
            row[draw(4) ? draw(n) : draw(2) ? 0 : n - 1] ^= (unsigned char)(1u << draw(8));
    }
}

static void make(struct job *j, int nranks, int nnodes, uint64_t row_bytes, uint64_t most_rows, enum mix mix)
{
    uint64_t tokens = 1 + draw(20);
    *j = (struct job){
        .nranks = nranks, .nnodes = nnodes, .row_bytes = row_bytes, .sample_mask = ~0ull, .full_mask = ~0ull};
    j->copies = draw(2);
    j->parts = draw(2) ? 1 : 1 << draw(3);
    j->blocks = (unsigned)draw(4); /* often so few that each thread takes several rows */
    unsigned char *pool = malloc(tokens * row_bytes);
    noise(pool, tokens * row_bytes);
    for (int n = 0; n < nnodes; n++)
        j->scan[n] = true;
    for (int r = 0; r < nranks; r++) {
        j->node[r] = draw(2) ? (int)draw((uint64_t)nnodes) : r * nnodes / nranks;
        uint64_t rows = draw(5) ? draw(most_rows + 1) : 0;
        j->bytes[r] = rows * row_bytes;
        if (rows && !draw(4))
            j->bytes[r] -= draw(row_bytes); /* a shorter last row */
        j->at[r] = j->size + 1 + (draw(2) ? (15 - j->size % 16) : draw(40));
        j->size = j->at[r] + j->bytes[r];
    }
    j->data = malloc(j->size + 1);
    memset(j->data, 0x5a, j->size + 1);
    for (int r = 0; r < nranks; r++)
        write_rows(j, r, mix, pool, tokens);
    free(pool);
}

/* ---- the oracle ---- */

struct seen {
    const unsigned char *row;
    bool whole, nothing;
    uint64_t times;
};

static bool is_zero(const unsigned char *p, uint64_t n)
{
    while (n && !*p)
        p++, n--;
    return !n;
}

static bool sample_is_zero(const unsigned char *row, uint64_t row_bytes)
{
    for (uint32_t i = 0; i < RY_ROWS_SAMPLE; i++) {
        uint64_t at = ry_rows_sample_at(row_bytes, i);
        if (at < row_bytes && !is_zero(row + at, row_bytes - at < 16 ? row_bytes - at : 16))
            return false;
    }
    return true;
}

/* Which rows go by themselves, by comparing all with all. */
static void tell(struct job *j)
{
    uint64_t n = 0, total = all_rows(j);
    const unsigned char **row = calloc(total + 1, sizeof *row);
    uint64_t *times = calloc(total + 1, sizeof *times);
    bool *whole = calloc(total + 1, sizeof *whole);
    j->alone = calloc(total + 1, sizeof *j->alone);
    j->odd = j->many = 0;
    for (int r = 0; r < j->nranks; r++)
        for (uint64_t at = 0; at < j->bytes[r]; at += j->row_bytes, n++) {
            row[n] = j->data + j->at[r] + at;
            whole[n] = j->bytes[r] - at >= j->row_bytes;
            times[n] = is_zero(row[n], whole[n] ? j->row_bytes : j->bytes[r] - at) ? 0 : 1;
        }
    for (uint64_t i = 0; i < n; i++)
        for (uint64_t k = 0; k < n && times[i] && whole[i]; k++)
            times[i] += k != i && whole[k] && !memcmp(row[i], row[k], j->row_bytes);
    for (uint64_t i = 0; i < n; i++) {
        j->odd += times[i] % j->told != 0;
        j->many += times[i] && times[i] % j->told == 0 && times[i] != j->told;
    }
    for (uint64_t i = 0; i < n; i++)
        j->alone[i] = times[i] && times[i] != j->told && !j->odd && 8 * j->many <= n;
    free(row), free(times), free(whole);
}

/* The message that each node should get; hashes are perfect, or (both masks 0) all the same. */
static unsigned char *expected(struct job *j, int node, uint64_t *bytes)
{
    struct seen *seen = NULL;
    uint32_t *list = NULL;
    uint64_t n = 0, rows = 0, zero = 0;
    bool blind = !j->sample_mask && !j->full_mask;
    const unsigned char *leader = NULL, *second = NULL;
    uint64_t before[RANKS + 1] = {0};
    for (int r = 0; r < j->nranks; r++)
        before[r + 1] = before[r] + rows_of(j->bytes[r], j->row_bytes);
    j->parts = j->parts ? j->parts : 1;
    for (int turn = 0; turn < j->nranks * j->parts && j->scan[node]; turn++) {
        int r = turn % j->nranks, part = turn / j->nranks;
        uint64_t all = j->node[r] == node ? rows_of(j->bytes[r], j->row_bytes) : 0;
        uint64_t first_row = ry_part_at(all, part, j->parts), count = ry_part_at(all, part + 1, j->parts) - first_row;
        if (part && !r)
            j->early[node][part - 1] = n;
        if (!count)
            continue;
        seen = realloc(seen, (rows + count) * sizeof *seen);
        list = realloc(list, (rows + count) * sizeof *list);
        for (uint64_t i = first_row; i < first_row + count; i++, rows++) {
            const unsigned char *row = j->data + j->at[r] + i * j->row_bytes;
            uint64_t left = j->bytes[r] - i * j->row_bytes, d = n;
            bool whole = left >= j->row_bytes, nothing = is_zero(row, whole ? j->row_bytes : left);
            zero += nothing;
            bool may = whole && !(j->alone && j->alone[before[r] + i]);
            if (blind && whole && !nothing) {
                if (!leader && !sample_is_zero(row, j->row_bytes))
                    leader = row;
                bool first = leader && !sample_is_zero(row, j->row_bytes) && !memcmp(row, leader, j->row_bytes);
                if (!second && !first)
                    second = row;
                may = first || !memcmp(row, second, j->row_bytes);
            }
            if (may)
                for (d = 0; d < n && !(seen[d].whole && !memcmp(seen[d].row, row, j->row_bytes)); d++)
                    ;
            if (d == n)
                seen[n++] = (struct seen){row, whole, nothing, 0};
            seen[d].times++;
            if (d + 1 == n && seen[d].row == row)
                seen[d].whole = may;
            list[rows] = (uint32_t)d;
        }
    }
    j->rows[node] = rows;
    j->distinct[node] = n;
    j->zero[node] = zero;
    j->least[node] = j->most[node] = 0;
    for (uint64_t d = 0; d < n; d++)
        if (!seen[d].nothing) {
            j->most[node] = seen[d].times > j->most[node] ? seen[d].times : j->most[node];
            j->least[node] = !j->least[node] || seen[d].times < j->least[node] ? seen[d].times : j->least[node];
        }
    *bytes = ry_rows_message_bytes(j->row_bytes, n, rows);
    unsigned char *message = calloc(1, *bytes + 1);
    ck_assert_uint_eq(*bytes, (n * j->row_bytes + 15) / 16 * 16 + 4 * rows);
    for (uint64_t d = 0; d < n; d++) {
        uint64_t left = j->row_bytes;
        for (int r = 0; r < j->nranks; r++) {
            const unsigned char *from = j->data + j->at[r];
            if (j->bytes[r] && seen[d].row >= from && seen[d].row < from + j->bytes[r])
                left = (uint64_t)(from + j->bytes[r] - seen[d].row);
        }
        memcpy(message + d * j->row_bytes, seen[d].row, left < j->row_bytes ? left : j->row_bytes);
    }
    if (rows)
        memcpy(message + (n * j->row_bytes + 15) / 16 * 16, list, 4 * rows);
    free(seen), free(list);
    return message;
}

/* ---- one job through one backend ---- */

static void *filled(const struct ry_device *on, uint64_t bytes, void *s)
{
    void *p;
    ok(on->alloc(&p, bytes, &err));
    ok(on->fill(p, 0xee, bytes, s, &err));
    return p;
}

static unsigned char *fetched(const struct ry_device *on, const void *from, uint64_t bytes, void *s)
{
    unsigned char *p = malloc(bytes + 1);
    ok(on->copy(p, from, bytes, s, &err));
    ok(on->stream_sync(s, &err));
    return p;
}

static void same(const unsigned char *got, const unsigned char *want, uint64_t n, const char *what, int node)
{
    for (uint64_t i = 0; i < n; i++)
        if (got[i] != want[i])
            ck_abort_msg("node %d: byte %llu of %llu of %s is %02x, not %02x", node, (unsigned long long)i,
                         (unsigned long long)n, what, got[i], want[i]);
}

/* Write the message out again at the far end, at other alignments, and some pieces not at all. */
static void there_and_back(struct ry_rows *rows, const struct job *j, int node, const void *message)
{
    uint64_t counts[RANKS], bytes[RANKS], at[RANKS], from[RANKS], size = 32, skip = 0;
    struct ry_rows_piece pieces[4 * RANKS];
    int n = 0, npieces = 0;
    for (int r = 0; r < j->nranks; r++)
        if (j->node[r] == node) {
            counts[n] = rows_of(j->bytes[r], j->row_bytes);
            bytes[n] = j->bytes[r];
            from[n] = j->at[r];
            at[n++] = size = size + draw(20);
            size += j->bytes[r];
        }
    size += 32;
    unsigned char *want = malloc(size);
    void *received = filled(device, size, stream);
    memset(want, 0xee, size);
    for (int part = 0; part < j->parts; part++)
        for (int i = 0; i < n; i++) {
            uint64_t first = ry_part_at(counts[i], part, j->parts), rest = ry_part_at(counts[i], part + 1, j->parts);
            uint64_t begin = first * j->row_bytes, end = rest == counts[i] ? bytes[i] : rest * j->row_bytes;
            skip += rest - first;
            if (rest == first || !draw(8))
                continue;
            memcpy(want + at[i] + begin, j->data + from[i] + begin, end - begin);
            pieces[npieces++] = (struct ry_rows_piece){.message = message,
                                                       .row_bytes = j->row_bytes,
                                                       .distinct = j->distinct[node],
                                                       .skip = skip - (rest - first),
                                                       .bytes = end - begin,
                                                       .to = (char *)received + at[i] + begin};
        }
    ok(ry_rows_expand(rows, pieces, npieces, stream, &err));
    unsigned char *got = fetched(device, received, size, stream);
    same(got, want, size, "what was expanded", node);
    ck_assert_uint_eq(ry_rows_expand_errors(rows), 0);
    free(got), free(want);
    ok(device->release(received, &err));
}

static struct ry_rows *scanner(const struct ry_device *on, const struct job *j, void *s)
{
    uint64_t total = all_rows(j);
    struct ry_rows *rows = ry_rows_new(on, 0, j->nranks, j->nnodes, j->node, &err);
    ck_assert_msg(rows, "%s", err.msg);
    ok(ry_rows_grow(rows, total, s, &err));
    ck_assert_uint_ge(ry_rows_capacity(rows), total);
    return rows;
}

/* What tells how often rows occur. */
static struct ry_rows *teller(const struct ry_device *on, const struct job *j, const void *const *send, void *s)
{
    static const int one_node[RANKS];
    struct ry_rows_found found;
    struct ry_rows *told = ry_rows_new(on, 0, j->nranks, 1, one_node, &err);
    ck_assert_msg(told, "%s", err.msg);
    ok(ry_rows_grow(told, all_rows(j), s, &err));
    ry_rows_for_tests(told, j->sample_mask ? j->sample_mask : ~0ull, ~0ull, j->blocks);
    struct ry_rows_input in = {
        .send = send, .send_bytes = j->bytes, .row_bytes = j->row_bytes, .copies = true, .times = j->told};
    ok(ry_rows_scan(told, &in, s, &err));
    ok(ry_rows_found_wait(told, &found, &err));
    ck_assert_msg(found.odd == j->odd && found.many == j->many, "%llu odd, %llu many, not %llu and %llu",
                  (unsigned long long)found.odd, (unsigned long long)found.many, (unsigned long long)j->odd,
                  (unsigned long long)j->many);
    return told;
}

/* The messages of all nodes from backend `on`, 0xee beyond their ends. */
static void messages(const struct ry_device *on, struct ry_rows *rows, const struct job *j, void *s,
                     unsigned char **message, uint64_t *bytes, bool back)
{
    const void *send[RANKS];
    struct ry_rows_found found;
    void *buffer;
    ok(on->alloc(&buffer, j->size + 1, &err));
    ok(on->copy(buffer, j->data, j->size + 1, s, &err));
    for (int r = 0; r < j->nranks; r++)
        send[r] = j->bytes[r] ? (char *)buffer + j->at[r] : NULL;
    ry_rows_for_tests(rows, j->sample_mask, j->full_mask, j->blocks);
    struct ry_rows_input in = {.send = send,
                               .send_bytes = j->bytes,
                               .row_bytes = j->row_bytes,
                               .scan_node = j->scan,
                               .copies = j->copies && !j->told,
                               .parts = j->parts};
    if (j->told)
        in.told = teller(on, j, send, s);
    ok(ry_rows_scan(rows, &in, s, &err));
    ok(ry_rows_found_wait(rows, &found, &err));
    ck_assert(ry_rows_found_ready(rows));
    uint64_t least = 0, most = 0;
    for (int n = 0; n < j->nnodes && in.copies; n++) {
        most = j->most[n] > most ? j->most[n] : most;
        least = j->least[n] && (!least || j->least[n] < least) ? j->least[n] : least;
    }
    ck_assert_msg(found.least == least && found.most == most, "%llu to %llu copies, not %llu to %llu",
                  (unsigned long long)found.least, (unsigned long long)found.most, (unsigned long long)least,
                  (unsigned long long)most);
    for (int n = 0; n < j->nnodes; n++) {
        ck_assert_msg(found.rows[n] == j->rows[n] && found.distinct[n] == j->distinct[n] && found.zero[n] == j->zero[n],
                      "node %d of %d, %llu bytes: %llu rows, %llu distinct, %llu zero; not %llu, %llu, %llu", n,
                      j->nnodes, (unsigned long long)j->row_bytes, (unsigned long long)found.rows[n],
                      (unsigned long long)found.distinct[n], (unsigned long long)found.zero[n],
                      (unsigned long long)j->rows[n], (unsigned long long)j->distinct[n],
                      (unsigned long long)j->zero[n]);
        for (int p = 1; p < j->parts && j->scan[n]; p++)
            ck_assert_uint_eq(found.early[(p - 1) * j->nnodes + n], j->early[n][p - 1]);
        bytes[n] = ry_rows_message_bytes(j->row_bytes, found.distinct[n], found.rows[n]);
        void *packed = filled(on, bytes[n] + 64, s);
        ok(ry_rows_pack(rows, &(struct ry_rows_packing){n, packed}, 1, s, &err));
        if (back && j->scan[n])
            there_and_back(rows, j, n, packed);
        message[n] = fetched(on, packed, bytes[n] + 64, s);
        for (int i = 0; i < 64; i++)
            ck_assert_uint_eq(message[n][bytes[n] + (uint64_t)i], 0xee);
        ok(on->release(packed, &err));
    }
    ok(on->release(buffer, &err));
    ry_rows_free(in.told);
}

static void run(struct job *j)
{
    unsigned char *message[RANKS], *again[RANKS];
    uint64_t bytes[RANKS], bytes_again[RANKS], want_bytes;
    unsigned char *want[RANKS];
    if (j->told)
        tell(j);
    for (int n = 0; n < j->nnodes; n++)
        want[n] = expected(j, n, &want_bytes);
    struct ry_rows *rows = scanner(device, j, stream);
    messages(device, rows, j, stream, message, bytes, true);
    messages(device, rows, j, stream, again, bytes_again, false); /* the same every time */
    for (int n = 0; n < j->nnodes; n++) {
        ck_assert_uint_eq(bytes[n], bytes_again[n]);
        same(message[n], want[n], bytes[n], "the message", n);
        same(again[n], message[n], bytes[n], "the message, packed again,", n);
        free(again[n]);
    }
    ry_rows_free(rows);
    if (device != ry_device_host()) {
        rows = scanner(ry_device_host(), j, NULL);
        messages(ry_device_host(), rows, j, NULL, again, bytes_again, false);
        for (int n = 0; n < j->nnodes; n++) {
            ck_assert_uint_eq(bytes[n], bytes_again[n]);
            same(message[n], again[n], bytes[n], "the message, against the host's,", n);
            free(again[n]);
        }
        ry_rows_free(rows);
    }
    for (int n = 0; n < j->nnodes; n++)
        free(message[n]), free(want[n]);
    free(j->data);
    free(j->alone);
    j->alone = NULL;
}

static const uint64_t widths[] = {1,    2,    3,    4,    7,    15,    16,    17,    18,    24,   31,
                                  32,   33,   64,   100,  127,  128,   129,   144,   160,   200,  256,
                                  500,  512,  514,  520,  1000, 1024,  1032,  2048,  2050,  4094, 4096,
                                  4097, 4112, 6000, 8192, 8208, 12289, 14336, 16384, 65536, 70001};
enum { WIDTHS = sizeof widths / sizeof *widths };

/* Few enough rows that the oracle and the fake driver are quick, enough that warps take several. */
static uint64_t some_rows(uint64_t row_bytes)
{
    uint64_t n = 40000 / row_bytes;
    return n > 90 ? 90 : n < 3 ? 3 : n;
}

START_TEST(all_widths)
{
    struct job j;
    start();
    for (int i = 0; i < WIDTHS; i++) {
        make(&j, 6, 3, widths[i], some_rows(widths[i]), ANY);
        run(&j);
    }
}
END_TEST

START_TEST(mixes)
{
    struct job j;
    start();
    for (enum mix mix = EQUAL; mix <= ZERO; mix++)
        for (int i = 0; i < WIDTHS; i += 3) {
            make(&j, 4, 2, widths[i], some_rows(widths[i]), mix);
            run(&j);
        }
}
END_TEST

START_TEST(shapes)
{
    struct job j;
    start();
    for (int round = 0; round < 25; round++) {
        int nranks = 1 + (int)draw(20), nnodes = 1 + (int)draw((uint64_t)nranks + 2);
        make(&j, nranks, nnodes, 1 + draw(300), 1 + draw(40), ANY);
        for (int n = 0; n < nnodes; n++)
            j.scan[n] = draw(5) != 0;
        run(&j);
    }
    make(&j, RANKS, 150, 40, 3, ANY); /* tables and pieces of several launches */
    run(&j);
    make(&j, RANKS, 1, 20, 2, ANY);
    run(&j);
    make(&j, 1, 1, 64, 0, ANY); /* nothing at all */
    run(&j);
    do /* one row in all */
        make(&j, 1, 1, 1024, 1, DISTINCT);
    while (!j.size && (free(j.data), true));
    run(&j);
}
END_TEST

/* All rows K times, anywhere, but for the first token, whose bytes `twins` others have, and `odd` rows that occur once; no shorter last rows. */
static void make_tokens(struct job *j, uint64_t row_bytes, uint32_t k, uint64_t tokens, uint64_t twins, uint64_t odd, bool zeros)
{
    uint64_t each[RANKS] = {0}, rows = tokens * k, at = 0;
    make(j, 1 + (int)draw(9), 1 + (int)draw(4), row_bytes, 0, DISTINCT);
    free(j->data);
    for (uint64_t i = 0; i < rows + odd; i++)
        each[draw((uint64_t)j->nranks)]++;
    j->size = 0;
    for (int r = 0; r < j->nranks; r++) {
        j->at[r] = j->size + draw(20);
        j->bytes[r] = each[r] * row_bytes;
        j->size = j->at[r] + j->bytes[r];
    }
    j->data = calloc(1, j->size + 1);
    unsigned char **place = calloc(rows + odd, sizeof *place), *token = malloc(row_bytes);
    for (int r = 0; r < j->nranks; r++)
        for (uint64_t i = 0; i < each[r]; i++)
            place[at++] = j->data + j->at[r] + i * row_bytes;
    for (uint64_t i = at; i > 1; i--) {
        uint64_t other = draw(i);
        unsigned char *was = place[i - 1];
        place[i - 1] = place[other], place[other] = was;
    }
    at = 0;
    for (uint64_t t = 0; t < tokens; t++) {
        if (!t || t > twins)
            noise(token, row_bytes);
        if (zeros && t + 1 == tokens)
            memset(token, 0, row_bytes);
        for (uint32_t i = 0; i < k; i++)
            memcpy(place[at++], token, row_bytes);
    }
    for (uint64_t i = 0; i < odd; i++)
        noise(place[at++], row_bytes);
    j->told = k;
    free(place), free(token);
}

/* Several tokens with the same bytes: they go by themselves where they are few, and all others as often as a token. */
START_TEST(tokens_apart)
{
    struct job j;
    int apart = 0, packed = 0;
    start();
    for (int i = -2; i < WIDTHS; i += i < 0 ? 1 : 3) {
        uint32_t k = 2 + (uint32_t)draw(7);
        uint64_t row_bytes = i < 0 || widths[i] < 15 ? 15 : widths[i], tokens = some_rows(row_bytes) / k * 2 + 4;
        if (i < 0) /* two tokens of 100 are few, of 8 too many, whatever is drawn */
            make_tokens(&j, row_bytes, k, i == -2 ? 100 : 8, 1, 0, false);
        else
            make_tokens(&j, row_bytes, k, tokens, draw(3), !draw(4) ? 1 + draw(2) : 0, !draw(3));
        tell(&j);
        for (uint64_t n = 0; n < all_rows(&j); n++)
            apart += j.alone[n];
        packed += !j.odd && j.many * 8 > all_rows(&j);
        free(j.alone);
        run(&j);
    }
    ck_assert_int_gt(apart, 0);  /* there were such rows, */
    ck_assert_int_gt(packed, 0); /* and too many of them */
    for (int i = 1; i < WIDTHS; i += 6) { /* rows of any kinds: as often as it comes */
        make(&j, 5, 3, widths[i], some_rows(widths[i]), TOKENS);
        j.told = 2 + (uint32_t)draw(2);
        run(&j);
    }
}
END_TEST

/* Of other bytes, or another width, nothing is told. */
START_TEST(told_of_others)
{
    const void *send[RANKS];
    struct ry_rows_found found;
    struct job j;
    void *buffer;
    start();
    make_tokens(&j, 64, 2, 40, 2, 0, false);
    tell(&j);
    ok(device->alloc(&buffer, j.size + 1, &err));
    ok(device->copy(buffer, j.data, j.size + 1, stream, &err));
    for (int r = 0; r < j.nranks; r++)
        send[r] = (char *)buffer + j.at[r], j.node[r] = 0;
    struct ry_rows *told = teller(device, &j, send, stream), *rows = scanner(device, &j, stream);
    struct ry_rows_input in = {.send = send, .send_bytes = j.bytes, .row_bytes = 64, .told = told};
    ok(ry_rows_scan(rows, &in, stream, &err));
    ok(ry_rows_found_wait(rows, &found, &err));
    ck_assert_uint_eq(found.distinct[0], 37 + 6); /* three tokens with the same bytes: their six rows */
    ok(ry_rows_scan(rows, &(struct ry_rows_input){.send = send, .send_bytes = j.bytes, .row_bytes = 64}, stream, &err));
    ok(ry_rows_found_wait(rows, &found, &err));
    ck_assert_uint_eq(found.distinct[0], 38);
    for (int r = 0; r < j.nranks; r++)
        if (j.bytes[r]) {
            send[r] = (const char *)send[r] + 64, j.bytes[r] -= 64;
            break;
        }
    ok(ry_rows_scan(rows, &(struct ry_rows_input){.send = send, .send_bytes = j.bytes, .row_bytes = 64, .told = told}, stream, &err));
    ok(ry_rows_found_wait(rows, &found, &err));
    ck_assert_uint_le(found.distinct[0], 38);
    ry_rows_free(rows);
    ry_rows_free(told);
    ok(device->release(buffer, &err));
    free(j.alone), free(j.data);
}
END_TEST

/* Hashes that collide: any bytes may then look alike, and only comparing tells. */
START_TEST(collisions)
{
    struct job j;
    start();
    for (int i = 0; i < WIDTHS; i++) {
        make(&j, 5, 2, widths[i], some_rows(widths[i]) / 2 + 2, ANY);
        j.sample_mask = 0; /* the hash of all bytes makes up for it, completely */
        j.full_mask = i % 2 ? ~0ull : 0;
        run(&j);
    }
}
END_TEST

/* Many more rows than the threads of a launch: each warp takes batches of several. */
START_TEST(many)
{
    static const uint64_t width[] = {20, 100, 300, 500};
    struct job j;
    start();
    for (int i = 0; i < 8; i++) {
        make(&j, 2, 2, width[i % 4], 1500, i < 4 ? TOKENS : DISTINCT);
        j.blocks = 1 + (unsigned)draw(2);
        if (i >= 4)
            j.sample_mask = 0;
        run(&j);
    }
}
END_TEST

/* With hashes of few bits, what is found depends on them; never the bytes, nor from one backend to the other. */
START_TEST(few_bits)
{
    struct job j;
    start();
    for (int round = 0; round < 12; round++) {
        make(&j, 5, 2, 1 + draw(1200), 40, ANY);
        j.copies = false;
        j.parts = 1; /* what collides depends on what comes first */
        j.sample_mask = draw(16), j.full_mask = draw(16);
        unsigned char *message[2], *other[2];
        uint64_t bytes[2], least[2];
        for (int n = 0; n < 2; n++)
            free(expected(&j, n, &bytes[n])), least[n] = j.distinct[n];
        const void *send[RANKS];
        for (int r = 0; r < j.nranks; r++)
            send[r] = j.data + j.at[r];
        struct ry_rows_input in = {.send = send, .send_bytes = j.bytes, .row_bytes = j.row_bytes};
        struct ry_rows_found found;
        struct ry_rows *host = scanner(ry_device_host(), &j, NULL), *rows = scanner(device, &j, stream);
        ry_rows_for_tests(host, j.sample_mask, j.full_mask, 0);
        ok(ry_rows_scan(host, &in, NULL, &err));
        ok(ry_rows_found_wait(host, &found, &err));
        for (int n = 0; n < 2; n++) {
            ck_assert_uint_ge(found.distinct[n], least[n]);
            ck_assert_uint_eq(found.zero[n], j.zero[n]);
            j.distinct[n] = found.distinct[n];
        }
        messages(device, rows, &j, stream, message, bytes, true);
        messages(ry_device_host(), host, &j, NULL, other, bytes, false);
        for (int n = 0; n < 2; n++) {
            same(message[n], other[n], bytes[n], "the message, against the host's,", n);
            free(message[n]), free(other[n]);
        }
        ry_rows_free(host), ry_rows_free(rows);
        free(j.data);
    }
}
END_TEST

/* Equal as numbers is not equal as bytes, and the other way about: -0 and +0, and NaNs. */
START_TEST(bits_not_numbers)
{
    static const uint32_t value[] = {0x00000000, 0x80000000, 0x7fc00000, 0x7fc00001, 0x7fc00000, 0x00000000};
    enum { N = 64 };
    struct job j = {
        .nranks = 1, .nnodes = 1, .scan = {true}, .row_bytes = 4 * N, .sample_mask = ~0ull, .full_mask = ~0ull};
    start();
    j.bytes[0] = j.size = sizeof value * N;
    uint32_t *row = malloc(j.size + 1);
    j.data = (unsigned char *)row;
    for (uint64_t i = 0; i < j.size / 4; i++)
        row[i] = value[i / N];
    uint64_t bytes;
    free(expected(&j, 0, &bytes));
    ck_assert_uint_eq(j.distinct[0], 4);
    ck_assert_uint_eq(j.zero[0], 2);
    run(&j);
}
END_TEST

/* Memory before a segment, where it begins misaligned: only whole groups of 8 bytes can be told to a sanitizer. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define FORBID(p, n) __asan_poison_memory_region(p, (n) / 8 * 8)
#define ALLOW(p, n) __asan_unpoison_memory_region(p, n)
#else
#define FORBID(p, n) (void)0
#define ALLOW(p, n) (void)0
#endif

/* Segments and pieces that end where memory does: nothing beyond may be read or written (a sanitizer tells). */
START_TEST(nothing_beyond)
{
    static const uint64_t row_bytes[] = {1, 9, 16, 33, 100, 130, 513, 4100};
    start();
    for (int i = 0; i < (int)(sizeof row_bytes / sizeof *row_bytes); i++)
        for (uint64_t shift = 0; shift < 16; shift += 3) {
            uint64_t width = row_bytes[i], n = 5, bytes = n * width - (width > 2 ? width / 3 : 0);
            void *segment, *message, *piece;
            ok(device->alloc(&segment, bytes + shift, &err));
            ok(device->alloc(&piece, bytes + shift, &err));
            ok(device->fill(segment, 3, bytes + shift, stream, &err));
            FORBID(segment, shift);
            const void *send[] = {(char *)segment + shift};
            struct ry_rows_input in = {.send = send, .send_bytes = &bytes, .row_bytes = width};
            struct ry_rows_found found;
            struct ry_rows *rows = ry_rows_new(device, 0, 1, 1, (int[]){0}, &err);
            ck_assert_msg(rows, "%s", err.msg);
            ok(ry_rows_grow(rows, n, stream, &err));
            ok(ry_rows_scan(rows, &in, stream, &err));
            ok(ry_rows_found_wait(rows, &found, &err));
            ck_assert_uint_eq(found.distinct[0], bytes % width ? 2 : 1);
            ok(device->alloc(&message, ry_rows_message_bytes(width, found.distinct[0], n), &err));
            ok(ry_rows_pack(rows, &(struct ry_rows_packing){0, message}, 1, stream, &err));
            struct ry_rows_piece out = {message, width, found.distinct[0], 0, bytes, (char *)piece + shift};
            ok(ry_rows_expand(rows, &out, 1, stream, &err));
            unsigned char *got = fetched(device, (char *)piece + shift, bytes, stream);
            for (uint64_t k = 0; k < bytes; k++)
                ck_assert_msg(got[k] == 3, "byte %llu is %d", (unsigned long long)k, got[k]);
            free(got);
            ry_rows_free(rows);
            ALLOW(segment, shift);
            ok(device->release(segment, &err));
            ok(device->release(message, &err));
            ok(device->release(piece, &err));
        }
}
END_TEST

/* A message that was damaged: its bad indices write nothing and are counted, the others are as good as ever. */
START_TEST(damage)
{
    enum { WIDTH = 4500, DISTINCT_ROWS = 3, ROWS = 40, LIST = (WIDTH * DISTINCT_ROWS + 15) / 16 * 16 };
    uint64_t bytes = ry_rows_message_bytes(WIDTH, DISTINCT_ROWS, ROWS), bad = 0;
    start();
    unsigned char *message = malloc(bytes), *want = malloc(ROWS * WIDTH);
    uint32_t *list = (uint32_t *)(message + LIST);
    noise(message, LIST);
    memset(want, 0xee, ROWS * WIDTH);
    for (int i = 0; i < ROWS; i++) {
        list[i] = draw(3) ? (uint32_t)draw(3) : draw(2) ? 3 : 0xffffffff - (uint32_t)draw(2);
        if (list[i] < DISTINCT_ROWS)
            memcpy(want + i * WIDTH, message + list[i] * WIDTH, WIDTH);
        else
            bad++;
    }
    void *on_device, *to = filled(device, ROWS * WIDTH, stream);
    ok(device->alloc(&on_device, bytes, &err));
    ok(device->copy(on_device, message, bytes, stream, &err));
    struct ry_rows *rows = ry_rows_new(device, 0, 1, 1, (int[]){0}, &err);
    ck_assert_msg(rows, "%s", err.msg);
    struct ry_rows_piece pieces[] = {
        {on_device, WIDTH, DISTINCT_ROWS, 0, 25 * WIDTH, to},
        {on_device, WIDTH, DISTINCT_ROWS, 25, 0, NULL},
        {on_device, WIDTH, DISTINCT_ROWS, 25, 15 * WIDTH, (char *)to + 25 * WIDTH},
    };
    for (int round = 0; round < 3; round++) {
        ok(ry_rows_expand(rows, pieces, 3, stream, &err));
        unsigned char *got = fetched(device, to, ROWS * WIDTH, stream);
        same(got, want, ROWS * WIDTH, "what was expanded", 0);
        free(got);
        ck_assert_uint_eq(ry_rows_expand_errors(rows), bad);
    }
    ck_assert_uint_eq(ry_rows_expand_errors(rows), 0);
    pieces[2].skip = RY_ROWS_MOST + 1;
    ck_assert_int_eq(ry_rows_expand(rows, pieces, 3, stream, &err), -1);
    ck_assert_msg(strstr(err.msg, "piece 2"), "%s", err.msg);
    pieces[1].message = (char *)on_device + 4;
    ck_assert_int_eq(ry_rows_expand(rows, pieces, 3, stream, &err), -1);
    ck_assert_msg(strstr(err.msg, "multiple of 16"), "%s", err.msg);
    ry_rows_free(rows);
    ok(device->release(on_device, &err));
    ok(device->release(to, &err));
    free(message), free(want);
}
END_TEST

/* Capacity, errors, and a scanner that grows between scans. */
START_TEST(life)
{
    struct job j;
    start();
    make(&j, 2, 2, 32, 30, EQUAL);
    j.node[0] = 0, j.node[1] = 1;
    j.bytes[0] = j.bytes[1] = 0;
    const void *send[] = {j.data, j.data};
    uint64_t bytes[] = {32 * 5000, 0};
    struct ry_rows_input in = {.send = send, .send_bytes = bytes, .row_bytes = 32};
    struct ry_rows_found found;
    struct ry_rows *rows = ry_rows_new(device, 0, 2, 2, j.node, &err);
    ck_assert_msg(rows, "%s", err.msg);
    ck_assert_uint_eq(ry_rows_capacity(rows), 0);
    ck_assert(!ry_rows_found_ready(rows));
    ck_assert_int_eq(ry_rows_found_wait(rows, &found, &err), -1);
    ck_assert_int_eq(ry_rows_scan(rows, &in, stream, &err), -1);
    ck_assert_msg(strstr(err.msg, "5000 rows"), "%s", err.msg);
    ck_assert_int_eq(ry_rows_pack(rows, &(struct ry_rows_packing){0, NULL}, 1, stream, &err), -1);
    ok(ry_rows_grow(rows, 10, stream, &err));
    ck_assert_int_eq(ry_rows_scan(rows, &in, stream, &err), -1);
    uint64_t held = ry_rows_capacity(rows);
    ck_assert_int_eq(ry_rows_grow(rows, RY_ROWS_MOST + 1, stream, &err), -1);
    ck_assert_uint_eq(ry_rows_capacity(rows), held);
    ok(ry_rows_grow(rows, 5000, stream, &err));
    void *buffer, *message;
    ok(device->alloc(&buffer, 32 * 5000, &err));
    ok(device->fill(buffer, 0, 32 * 5000, stream, &err));
    send[0] = send[1] = buffer;
    ok(ry_rows_scan(rows, &in, stream, &err));
    ok(ry_rows_found_wait(rows, &found, &err));
    ck_assert_uint_eq(found.rows[0], 5000);
    ck_assert_uint_eq(found.distinct[0], 1);
    ck_assert_uint_eq(found.zero[0], 5000);
    ck_assert_uint_eq(found.rows[1] + found.distinct[1] + found.zero[1], 0);
    ok(device->alloc(&message, 32 + 4 * 5000, &err));
    struct ry_rows_packing packing[] = {{1, message}, {0, (char *)message + 8}};
    ck_assert_int_eq(ry_rows_pack(rows, packing, 2, stream, &err), -1);
    packing[1] = (struct ry_rows_packing){2, message};
    ck_assert_int_eq(ry_rows_pack(rows, packing, 2, stream, &err), -1);
    ok(ry_rows_pack(rows, packing, 1, stream, &err));
    in.row_bytes = 0;
    ck_assert_int_eq(ry_rows_scan(rows, &in, stream, &err), -1);
    ck_assert(!ry_rows_new(device, 0, 2, 1, j.node, &err));
    ck_assert_msg(strstr(err.msg, "rank 1"), "%s", err.msg);
    ry_rows_free(rows);
    ry_rows_free(NULL);
    ok(device->release(buffer, &err));
    ok(device->release(message, &err));
    free(j.data);
}
END_TEST

/* ---- with a real GPU only ---- */

/* More bytes than 32 bits count, in one segment; a scanner for more rows than 16 bits of blocks. */
START_TEST(huge)
{
    enum { WIDTH = 64 };
    const uint64_t n = UINT64_C(5) << 30, rows_all = n / WIDTH, far = rows_all - 3;
    unsigned char row[WIDTH];
    void *from, *to, *message;
    uint64_t *answer, difference;
    if (!is_large_gpu())
        return;
    start();
    ok(device->prepare(0, &ry_run_kernels, &err));
    ok(device->alloc(&from, n, &err));
    ok(device->alloc(&to, n, &err));
    ok(device->alloc((void **)&answer, 256, &err));
    ok(device->fill(from, 0, n, stream, &err));
    ok(device->fill(to, 0xee, n, stream, &err));
    noise(row, WIDTH);
    const uint64_t at[] = {5, rows_all / 2, far};
    for (int i = 0; i < 3; i++)
        ok(device->copy((char *)from + at[i] * WIDTH, row, WIDTH, stream, &err));
    row[9] ^= 1;
    ok(device->copy((char *)from + (far + 1) * WIDTH, row, WIDTH, stream, &err));
    struct ry_rows *rows = ry_rows_new(device, 0, 1, 1, (int[]){0}, &err);
    ck_assert_msg(rows, "%s", err.msg);
    ok(ry_rows_grow(rows, rows_all, stream, &err));
    struct ry_rows_found found;
    struct ry_rows_input in = {.send = (const void *[]){from}, .send_bytes = &n, .row_bytes = WIDTH};
    ok(ry_rows_scan(rows, &in, stream, &err));
    ok(ry_rows_found_wait(rows, &found, &err));
    ck_assert_uint_eq(found.rows[0], rows_all);
    ck_assert_uint_eq(found.distinct[0], 3);
    ck_assert_uint_eq(found.zero[0], rows_all - 4);
    ok(device->alloc(&message, ry_rows_message_bytes(WIDTH, 3, rows_all), &err));
    ok(ry_rows_pack(rows, &(struct ry_rows_packing){0, message}, 1, stream, &err));
    struct ry_rows_piece out = {message, WIDTH, 3, 0, n, to};
    ok(ry_rows_expand(rows, &out, 1, stream, &err));
    ok(device->fill(answer, 0xff, 8, stream, &err));
    struct ry_runner runner = {.device = device, .kernels = true};
    struct batch batch;
    batch_start_compare(&batch, &runner, stream, answer);
    ok(batch_add(&batch, to, from, n, 0, &err));
    ok(batch_flush(&batch, &err));
    ok(device->copy(&difference, answer, 8, stream, &err));
    ok(device->stream_sync(stream, &err));
    ck_assert_uint_eq(difference, RY_NO_DIFFERENCE);
    ry_rows_free(rows);
    ok(device->release(from, &err));
    ok(device->release(to, &err));
    ok(device->release(message, &err));
    ok(device->release(answer, &err));
}
END_TEST

/* Dispatch as it is: each row goes to `copies` ranks of its node, in an order of each rank's own; or half of the rows
 * are padding. */
enum { SPEED_RANKS = 64, RUNS = 15, COLD = 256 << 20 };
struct shape {
    const char *name;
    uint64_t width, bytes, copies, shift;
    int nranks, nnodes;
    bool padded;
};
struct work {
    struct ry_rows *rows;
    struct ry_rows_input in;
    struct ry_rows_packing packing[SPEED_RANKS];
    struct ry_rows_piece piece[SPEED_RANKS];
    int npackings, npieces;
    void *from, *to, *cold;
    uint64_t bytes;
};

static void plain_copy(const struct work *w)
{
    ok(device->copy(w->to, w->from, w->bytes, stream, &err));
}

static void scanning(const struct work *w)
{
    ok(ry_rows_scan(w->rows, &w->in, stream, &err));
}

static void packing(const struct work *w)
{
    ok(ry_rows_pack(w->rows, w->packing, w->npackings, stream, &err));
}

static void expanding(const struct work *w)
{
    ok(ry_rows_expand(w->rows, w->piece, w->npieces, stream, &err));
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/*
 * Median in microseconds. Before each run other memory is filled: that empties the cache of what the last run left, and
 * keeps the device busy while the host enqueues, so that the host's part does not show.
 */
static double timed(void (*what)(const struct work *), const struct work *w)
{
    double us[RUNS];
    struct ry_event *from, *to;
    ok(device->event_create(&from, &err));
    ok(device->event_create(&to, &err));
    for (int i = -2; i < RUNS; i++) {
        double t;
        ok(device->fill(w->cold, (unsigned char)i, COLD, stream, &err));
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

/* One launch of a scan after the other, timed alone: where the time goes. */
static struct {
    struct ry_event *at[9];
    const char *name[9];
    int n;
} parts;

static int parted_launch(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *s,
                         struct ry_err *e)
{
    if (parts.n < 8) {
        parts.name[parts.n] = kernel->name + 3;
        ok(device->event_record(parts.at[parts.n++], s, &err));
    }
    return device->launch(kernel, grid, block, param, s, e);
}

static void print_parts(struct work *w, const struct shape *shape, const int *node, uint64_t nrows)
{
    struct ry_device parted = *device;
    struct ry_rows *usual = w->rows;
    double us[9][RUNS];
    parted.launch = parted_launch;
    for (int i = 0; i < 9; i++)
        ok(device->event_create(&parts.at[i], &err));
    w->rows = ry_rows_new(&parted, 0, shape->nranks, shape->nnodes, node, &err);
    ck_assert_msg(w->rows, "%s", err.msg);
    ok(ry_rows_grow(w->rows, nrows, stream, &err));
    for (int i = -1; i < RUNS; i++) {
        parts.n = 0;
        ok(device->fill(w->cold, (unsigned char)i, COLD, stream, &err));
        scanning(w);
        ok(device->event_record(parts.at[parts.n], stream, &err));
        ok(device->stream_sync(stream, &err));
        for (int k = 0; k < parts.n && i >= 0; k++)
            ok(device->event_elapsed(parts.at[k], parts.at[k + 1], &us[k][i], &err));
    }
    printf("    its launches, events between them:");
    for (int k = 0; k < parts.n; k++) {
        qsort(us[k], RUNS, sizeof *us[k], by_size);
        printf(" %s %.1f", parts.name[k], us[k][RUNS / 2]);
    }
    printf(" us\n");
    for (int i = 0; i < 9; i++)
        device->event_destroy(parts.at[i]);
    ok(device->stream_sync(stream, &err));
    ry_rows_free(w->rows);
    w->rows = usual;
}

/* Returns how many rows are distinct. */
static uint64_t lay_out_dispatch(unsigned char *data, const struct shape *shape)
{
    uint64_t width = shape->width, per_rank = shape->bytes / (uint64_t)shape->nranks / width, distinct = 0;
    uint32_t *place = malloc(per_rank * sizeof *place);
    for (int r = 0; r < shape->nranks; r++) {
        unsigned char *segment = data + (uint64_t)r * per_rank * width;
        bool first = (uint64_t)r % shape->copies == 0; /* of those that get the same rows */
        for (uint64_t i = 0; i < per_rank; i++)
            place[i] = (uint32_t)i;
        for (uint64_t i = per_rank; i > 1; i--) {
            uint64_t k = draw(i);
            uint32_t t = place[i - 1];
            place[i - 1] = place[k], place[k] = t;
        }
        for (uint64_t i = 0; i < per_rank; i++)
            if (!first) {
                memcpy(segment + place[i] * width, segment - (uint64_t)r % shape->copies * per_rank * width + i * width,
                       width);
            } else if (shape->padded && i >= per_rank / 2) {
                memset(segment + i * width, 0, width);
            } else {
                for (uint64_t at = 0; at < width; at += sizeof seed) {
                    draw(2);
                    memcpy(segment + i * width + at, &seed, width - at < sizeof seed ? width - at : sizeof seed);
                }
                distinct++;
            }
    }
    free(place);
    return distinct + (shape->padded ? (uint64_t)shape->nnodes : 0);
}

static void speed_of(const struct shape *shape, struct work *w, unsigned char *data)
{
    uint64_t k = shape->width, per_rank = shape->bytes / (uint64_t)shape->nranks / k, bytes[SPEED_RANKS], total = 0;
    const void *send[SPEED_RANKS];
    int node[SPEED_RANKS], per_node = shape->nranks / shape->nnodes;
    uint64_t rows = per_rank * (uint64_t)shape->nranks, want = lay_out_dispatch(data, shape);
    w->bytes = rows * k;
    ok(device->copy((char *)w->from + shape->shift, data, w->bytes, stream, &err));
    for (int r = 0; r < shape->nranks; r++) {
        node[r] = r / per_node;
        bytes[r] = per_rank * k;
        send[r] = (char *)w->from + shape->shift + (uint64_t)r * bytes[r];
    }
    w->in = (struct ry_rows_input){.send = send, .send_bytes = bytes, .row_bytes = k};
    w->rows = ry_rows_new(device, 0, shape->nranks, shape->nnodes, node, &err);
    ck_assert_msg(w->rows, "%s", err.msg);
    ok(ry_rows_grow(w->rows, rows, stream, &err));
    double us[4] = {timed(plain_copy, w), timed(scanning, w)};
    struct ry_rows_found found;
    ok(ry_rows_found_wait(w->rows, &found, &err));
    w->npackings = w->npieces = 0;
    for (int n = 0; n < shape->nnodes; n++) {
        void *message;
        ok(device->alloc(&message, ry_rows_message_bytes(k, found.distinct[n], found.rows[n]), &err));
        w->packing[w->npackings++] = (struct ry_rows_packing){n, message};
        total += found.distinct[n];
        for (int i = 0; i < per_node; i++, w->npieces++)
            w->piece[w->npieces] = (struct ry_rows_piece){
                message,           k,
                found.distinct[n], (uint64_t)i * per_rank,
                bytes[0],          (char *)w->to + shape->shift + (uint64_t)w->npieces * bytes[0]};
    }
    ck_assert_uint_eq(total, want);
    us[2] = timed(packing, w);
    us[3] = timed(expanding, w);
    unsigned char *got = fetched(device, (char *)w->to + shape->shift, w->bytes, stream);
    ck_assert(!memcmp(got, data, w->bytes));
    free(got);
    uint64_t begun = ry_now_ns();
    scanning(w);
    double enqueue = (double)(ry_now_ns() - begun) / 1e3;
    ok(device->stream_sync(stream, &err));
    /* scan: samples, then each row that has an equal one before it (not zero ones: they are read alone), and that one,
     * which may come out of the cache. pack and expand: rows once in, once out. */
    double twice = shape->padded ? 1 : 2, once = (double)(total * k);
    double moved[4] = {2.0 * (double)w->bytes, (double)(rows * 128) + twice * (double)((rows - total) * k), 2 * once,
                       once + (double)w->bytes};
    printf("%-22s %6llu %4llu %5.1f%% %4dx%-2d", shape->name, (unsigned long long)k,
           (unsigned long long)(w->bytes >> 20), 100.0 - 100.0 * (double)total / (double)rows, shape->nnodes, per_node);
    for (int m = 0; m < 4; m++) {
        printf(" | %6.1f %5.0f", us[m], moved[m] / us[m] / 1e3);
        if (m)
            printf(" %5.2f", us[m] / us[0]);
    }
    printf(" | %5.1f\n", enqueue);
    print_parts(w, shape, node, rows);
    fflush(stdout);
    ry_rows_free(w->rows);
    for (int n = 0; n < w->npackings; n++)
        ok(device->release(w->packing[n].message, &err));
    /* Loose, since the machine may be shared and small work is mostly launches; beyond, something is wrong. */
    for (int m = 1; m < 4; m++)
        ck_assert_msg(us[m] < 4 * us[0] + 100, "far slower than a copy");
}

START_TEST(speed)
{
    enum { MIB = 1 << 20 };
    static const struct shape list[] = {
        {"4 KiB rows, 4 copies", 4 << 10, 64 * MIB, 4, 0, 8, 2, false},
        {"14 KiB rows, 4 copies", 14 << 10, 112 * MIB, 4, 0, 8, 2, false},
        {"1 KiB rows, 4 copies", 1 << 10, 64 * MIB, 4, 0, 8, 2, false},
        {"unaligned, 4 copies", 4 << 10, 64 * MIB, 4, 2, 8, 2, false},
        {"width of 4098", 4098, 64 * MIB, 4, 0, 8, 2, false},
        {"all distinct", 4 << 10, 64 * MIB, 1, 0, 8, 2, false},
        {"all distinct, 1 KiB", 1 << 10, 64 * MIB, 1, 0, 8, 2, false},
        {"half padding", 4 << 10, 64 * MIB, 1, 0, 8, 2, true},
        {"8 nodes, 4 copies", 4 << 10, 64 * MIB, 4, 0, 64, 8, false},
        {"large, 4 copies", 4 << 10, 512ull * MIB, 4, 0, 8, 2, false},
        {"large, all distinct", 4 << 10, 512ull * MIB, 1, 0, 8, 2, false},
    };
    const uint64_t most = 512ull * MIB;
    if (!is_large_gpu())
        return;
    start();
    struct ry_device_id id;
    struct work w;
    unsigned char *data = malloc(most);
    ok(device->identify(0, &id, &err));
    ok(device->prepare(0, &ry_run_kernels, &err));
    ok(device->alloc(&w.from, most + 256, &err));
    ok(device->alloc(&w.to, most + 256, &err));
    ok(device->alloc(&w.cold, COLD, &err));
    printf("%s: medians of %d, cache cold. GB/s of bytes that must be read and written, x: time over the copy's\n"
           "%-22s %6s %4s %6s %7s | %6s %5s | %6s %5s %5s | %6s %5s %5s | %6s %5s %5s | %s\n",
           id.name, RUNS, "", "row", "MiB", "equal", "nodes", "copy", "GB/s", "scan", "GB/s", "x", "pack", "GB/s", "x",
           "expand", "GB/s", "x", "host us");
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        speed_of(&list[i], &w, data);
    ok(device->release(w.from, &err));
    ok(device->release(w.to, &err));
    ok(device->release(w.cold, &err));
    free(data);
}
END_TEST

static void add_tests(TCase *t, bool cuda)
{
    tcase_add_test(t, all_widths);
    tcase_add_test(t, mixes);
    tcase_add_test(t, shapes);
    tcase_add_test(t, tokens_apart);
    tcase_add_test(t, told_of_others);
    tcase_add_test(t, collisions);
    tcase_add_test(t, many);
    tcase_add_test(t, few_bits);
    tcase_add_test(t, bits_not_numbers);
    tcase_add_test(t, nothing_beyond);
    tcase_add_test(t, damage);
    tcase_add_test(t, life);
    if (cuda) {
        tcase_add_test(t, huge);
        tcase_add_test(t, speed);
    }
}

int main(void)
{
    return on_devices("rows", add_tests);
}
