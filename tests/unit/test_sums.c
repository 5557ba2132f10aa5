/*
 * test_sums.c: rows added up by the lists of packed messages (run/sums.h), on every backend that this machine has:
 * against sums in double precision rounded once, bit by bit against the twins on host memory, and closer to the truth
 * than what receivers do themselves. On a real GPU it also prints how fast that is beside a plain copy; RY_TEST_SMALL=1
 * leaves that out.
 */
#include <check.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "on_devices.h"
#include "run/sums.h"
#include "run/sums_kernels.h"

static void *stream;
static uint64_t seed;

static uint64_t draw(uint64_t below)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (seed >> 11) % below;
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

/* ---- numbers, once more and otherwise ---- */

static const uint32_t types[] = {RY_SUMS_FP16, RY_SUMS_BF16, RY_SUMS_FP32};
static const char *const names[] = {"fp16", "bf16", "fp32"};

/* Bits of the fraction, and the least exponent of a normal number. */
static int fraction(uint32_t type)
{
    return type == RY_SUMS_FP16 ? 10 : type == RY_SUMS_BF16 ? 7 : 23;
}

static int least_exponent(uint32_t type)
{
    return type == RY_SUMS_FP16 ? -14 : -126;
}

static double value_of(uint32_t type, uint32_t bits)
{
    int f = fraction(type), sign = type == RY_SUMS_FP32 ? 31 : 15, e = (int)(bits >> f & ((1u << (sign - f)) - 1));
    uint32_t m = bits & ((1u << f) - 1);
    double v = e == (1 << (sign - f)) - 1 ? (m ? (double)NAN : (double)INFINITY)
               : e                        ? ldexp(1 + ldexp(m, -f), e - 1 + least_exponent(type))
                                          : ldexp(m, least_exponent(type) - f);
    return bits >> sign ? -v : v;
}

static double ulp_at(uint32_t type, double v)
{
    int e = v != 0 ? ilogb(v) : least_exponent(type);
    return ldexp(1, (e < least_exponent(type) ? least_exponent(type) : e) - fraction(type));
}

/* To the nearest, ties to even: rint() does just that. */
static double nearest(uint32_t type, double v)
{
    if (!isfinite(v))
        return v;
    double ulp = ulp_at(type, v), r = rint(v / ulp) * ulp;
    double most = ldexp(2 - ldexp(1, -fraction(type)), type == RY_SUMS_FP16 ? 15 : 127);
    return fabs(r) > most ? copysign((double)INFINITY, r) : r;
}

static uint32_t get(uint32_t type, const unsigned char *p, uint64_t i)
{
    uint32_t bits = 0;
    memcpy(&bits, p + i * ry_sums_bytes(type), ry_sums_bytes(type));
    return bits;
}

static void put(uint32_t type, unsigned char *p, uint64_t i, uint32_t bits)
{
    memcpy(p + i * ry_sums_bytes(type), &bits, ry_sums_bytes(type));
}

static bool same_value(double a, double b)
{
    return isnan(a) ? isnan(b) : a == b && signbit(a) == signbit(b);
}

/* Every fp16 and bf16, the neighbours of every rounding boundary between them, and any bits at all. */
START_TEST(numbers)
{
    start();
    for (int t = 0; t < 2; t++)
        for (uint32_t bits = 0; bits < 0x10000; bits++) {
            uint32_t type = types[t];
            double v = value_of(type, bits), next = value_of(type, bits + 1 < 0x10000 ? bits + 1 : bits);
            float f = ry_sums_widen(type, bits), middle = (float)((v + next) / 2);
            if (!same_value(f, v))
                ck_abort_msg("%s %04x is %g, not %g", names[t], bits, (double)f, v);
            const float near[] = {f,      nextafterf(f, INFINITY),      nextafterf(f, -INFINITY),
                                  middle, nextafterf(middle, INFINITY), nextafterf(middle, -INFINITY)};
            for (int i = 0; i < 6; i++) {
                uint32_t r = ry_sums_round(type, near[i]);
                if (!same_value(value_of(type, r), nearest(type, (double)near[i])))
                    ck_abort_msg("%s of %a is %04x, %a", names[t], (double)near[i], r, value_of(type, r));
                if (isnan(near[i]))
                    ck_assert_uint_eq(r, 0x7fff);
            }
        }
    for (int i = 0; i < 2000000; i++) {
        float f = ry_float_of((uint32_t)draw(UINT64_C(1) << 32));
        for (int t = 0; t < 3; t++)
            if (!same_value(value_of(types[t], ry_sums_round(types[t], f)), nearest(types[t], (double)f)))
                ck_abort_msg("%s of %a is %04x", names[t], (double)f, ry_sums_round(types[t], f));
    }
    ck_assert_uint_eq(ry_sums_round(RY_SUMS_FP32, NAN), 0x7fffffff);
    ck_assert_uint_eq(ry_sums_element(9), 2);
    ck_assert_uint_eq(ry_sums_element(8) + ry_sums_element(-1) + ry_sums_element(0), 0);
}
END_TEST

/* ---- messages to sum ---- */

enum { MESSAGES = 8 };
struct job {
    uint32_t type;
    int n;
    uint64_t row_bytes, rows[MESSAGES], distinct[MESSAGES], from[MESSAGES], size; /* rows in `data`, of `size` bytes */
    uint32_t *list[MESSAGES];
    unsigned char *data;
    unsigned blocks;
};

/* Numbers that make sums interesting: halves of what others round at, infinities, NaNs, zeros of both signs. */
static uint32_t element(uint32_t type, bool tame)
{
    static const double special[] = {0,    -0.0,  1,      -1,   256,   2048,  16777216, 0.5,
                                     1e-7, 65504, -65504, 3e38, -3e38, 1e-40, 6e-8};
    uint64_t kind = tame ? 9 : draw(12);
    if (kind == 0)
        return draw(2) ? ry_sums_round(type, draw(2) ? INFINITY : -INFINITY)
                       : ry_sums_round(type, NAN) ^ (uint32_t)draw(2);
    if (kind < 4)
        return ry_sums_round(type, (float)special[draw(sizeof special / sizeof *special)]);
    if (kind == 4)
        return (uint32_t)draw(type == RY_SUMS_FP32 ? UINT64_C(1) << 32 : 1 << 16);
    if (kind == 5) /* ties when added */
        return ry_sums_round(type, (float)ldexp(1 + (double)draw(2), -(int)draw(2) * (fraction(type) + 1)));
    double u = ((double)draw(1 << 24) + 1) / (1 << 24), v = (double)draw(1 << 24) / (1 << 24);
    return ry_sums_round(type, (float)(sqrt(-2 * log(u)) * cos(6.2831853 * v)));
}

/* Each distinct row has 1 to `most` copies, anywhere; they appear in order, as in a message. */
static void make(struct job *j, uint32_t type, int n, uint64_t row_bytes, uint64_t distinct, uint64_t most,
                 bool aligned, bool tame)
{
    *j = (struct job){.type = type, .n = n, .row_bytes = row_bytes, .blocks = (unsigned)draw(4)};
    for (int m = 0; m < n; m++) {
        uint64_t d = draw(6) ? 1 + draw(distinct) : draw(2), rows = 0;
        uint32_t *name = calloc(d + 1, sizeof *name), next = 0;
        j->list[m] = malloc((d * most + 1) * sizeof *j->list[m]);
        for (uint64_t i = 0; i < d; i++)
            for (uint64_t c = draw(3) ? 1 + draw(most) : most; c; c--)
                j->list[m][rows++] = (uint32_t)i;
        for (uint64_t i = rows; i > 1; i--) {
            uint64_t k = draw(i);
            uint32_t was = j->list[m][k];
            j->list[m][k] = j->list[m][i - 1], j->list[m][i - 1] = was;
        }
        for (uint64_t i = 0; i < rows; i++) { /* numbered as they appear */
            uint32_t *its = &name[j->list[m][i]];
            *its = *its ? *its : ++next;
            j->list[m][i] = *its - 1;
        }
        free(name);
        j->rows[m] = rows;
        j->distinct[m] = d;
        j->from[m] = (j->size + 15) / 16 * 16 + (aligned ? 0 : draw(16) / ry_sums_bytes(type) * ry_sums_bytes(type));
        j->size = j->from[m] + rows * row_bytes;
    }
    j->data = malloc(j->size + 1);
    for (uint64_t i = 0; i < j->size; i++)
        j->data[i] = 0x77;
    for (int m = 0; m < n; m++)
        for (uint64_t i = 0; i < j->rows[m] * row_bytes / ry_sums_bytes(type); i++)
            put(type, j->data + j->from[m], i, element(type, tame));
}

static void unmake(struct job *j)
{
    for (int m = 0; m < j->n; m++)
        free(j->list[m]);
    free(j->data);
}

/* What came of all messages, 64 bytes of 0xee behind each. */
struct result {
    unsigned char *message[MESSAGES];
    uint64_t bytes[MESSAGES];
};

static struct ry_rows *scanner(const struct ry_device *on, unsigned blocks)
{
    struct ry_rows *rows = ry_rows_new(on, 0, 0, 0, NULL, &err);
    ck_assert_msg(rows, "%s", err.msg);
    ry_rows_for_tests(rows, ~0ull, ~0ull, blocks);
    return rows;
}

/* Only the lists of the messages are read: their rows are not there. */
static struct ry_sums *kept(const struct ry_device *on, struct ry_rows *rows, const struct job *j, void *s)
{
    struct ry_sums_message messages[MESSAGES];
    void *memory[MESSAGES];
    for (int m = 0; m < j->n; m++) {
        uint64_t bytes = ry_rows_message_bytes(j->row_bytes, j->distinct[m], j->rows[m]), list = 4 * j->rows[m];
        ok(on->alloc(&memory[m], bytes + 1, &err));
        ok(on->copy((char *)memory[m] + bytes - list, j->list[m], list, s, &err));
        messages[m] = (struct ry_sums_message){memory[m], j->row_bytes, j->distinct[m], j->rows[m]};
    }
    struct ry_sums *sums = ry_sums_keep(rows, messages, j->n, s, &err);
    ck_assert_msg(sums, "%s", err.msg);
    for (int m = 0; m < j->n; m++) {
        uint64_t bytes = ry_rows_message_bytes(j->row_bytes, j->distinct[m], j->rows[m]);
        ok(on->fill(memory[m], 0xdd, bytes + 1, s, &err)); /* they may go */
        ok(on->stream_sync(s, &err));
        ok(on->release(memory[m], &err));
    }
    return sums;
}

static void sum_on(const struct ry_device *on, const struct job *j, void *s, struct result *r)
{
    struct ry_sums_job jobs[MESSAGES];
    struct ry_rows *rows = scanner(on, j->blocks);
    struct ry_sums *sums = kept(on, rows, j, s);
    void *from;
    ok(on->alloc(&from, j->size + 1, &err));
    ok(on->copy(from, j->data, j->size + 1, s, &err));
    for (int m = 0; m < j->n; m++) {
        r->bytes[m] = ry_rows_message_bytes(j->row_bytes, j->distinct[m] + 1, j->rows[m]);
        jobs[m] = (struct ry_sums_job){.message = m, .from = (char *)from + j->from[m]};
        ok(on->alloc(&jobs[m].to, r->bytes[m] + 64, &err));
        ok(on->fill(jobs[m].to, 0xee, r->bytes[m] + 64, s, &err));
    }
    ok(ry_sums_add(rows, sums, (int)j->type, jobs, j->n, s, &err));
    for (int m = 0; m < j->n; m++) {
        r->message[m] = malloc(r->bytes[m] + 64);
        ok(on->copy(r->message[m], jobs[m].to, r->bytes[m] + 64, s, &err));
        ok(on->stream_sync(s, &err));
        ok(on->release(jobs[m].to, &err));
        for (int i = 0; i < 64 && j->rows[m]; i++)
            ck_assert_uint_eq(r->message[m][r->bytes[m] + (uint64_t)i], 0xee);
    }
    ck_assert_uint_eq(ry_rows_expand_errors(rows), 0);
    ok(on->release(from, &err));
    ry_sums_free(sums);
    ry_rows_free(rows);
}

static void free_result(const struct job *j, struct result *r)
{
    for (int m = 0; m < j->n; m++)
        free(r->message[m]);
}

static void check_element(const struct job *j, int m, uint64_t d, uint64_t i, uint32_t got)
{
    uint64_t per = j->row_bytes / ry_sums_bytes(j->type), n = 0;
    uint32_t only = 0;
    double exact = 0, abs_sum = 0;
    for (uint64_t row = 0; row < j->rows[m]; row++)
        if (j->list[m][row] == d) {
            only = get(j->type, j->data + j->from[m], row * per + i);
            double v = value_of(j->type, only);
            exact = n++ ? exact + v : v;
            abs_sum += fabs(v);
        }
    double value = value_of(j->type, got);
    if (n == 1 ? got == only : isnan(exact) && isnan(value))
        return;
    /* fp32's own error is at most half an ulp of each partial sum; and what overflowed on the way stays infinite. */
    double own = (double)(n - 1) * ldexp(abs_sum, -24) * 1.01, allowed = own + ulp_at(j->type, exact) / 2;
    if (j->type == RY_SUMS_FP32)
        allowed = own + ldexp(1, -149);
    if (isfinite(value) && isfinite(exact) && fabs(value - exact) <= allowed)
        return;
    if (!isfinite(exact) && value == exact)
        return;
    if (abs_sum > 3.3e38 || (j->type == RY_SUMS_FP16 && nearest(j->type, exact + copysign(own, exact)) == value))
        return; /* partial sums beyond fp32, and sums that are beyond fp16, or by fp32's error may be */
    ck_abort_msg("%s: message %d, distinct row %llu of %llu copies, element %llu: %a, not %a",
                 names[j->type == 9   ? 1
                       : j->type == 7 ? 2
                                      : 0],
                 m, (unsigned long long)d, (unsigned long long)n, (unsigned long long)i, value, exact);
}

static void check_message(const struct job *j, int m, const struct result *r)
{
    uint64_t per = j->row_bytes / ry_sums_bytes(j->type), d = j->distinct[m], at = (d + 1) * j->row_bytes;
    const unsigned char *got = r->message[m];
    if (!j->rows[m])
        return;
    for (uint64_t k = 0; k < d; k++)
        for (uint64_t i = 0; i < per; i++)
            check_element(j, m, k, i, get(j->type, got + k * j->row_bytes, i));
    for (uint64_t i = d * j->row_bytes; i < (at + 15) / 16 * 16; i++)
        ck_assert_msg(!got[i], "byte %llu of the row of zeros", (unsigned long long)i);
    uint32_t next = 0;
    for (uint64_t row = 0; row < j->rows[m]; row++) {
        uint32_t want = j->list[m][row] == next ? next++ : (uint32_t)d, entry;
        memcpy(&entry, got + (at + 15) / 16 * 16 + 4 * row, 4);
        ck_assert_uint_eq(entry, want);
    }
}

static void run(struct job *j)
{
    struct result r, again;
    sum_on(device, j, stream, &r);
    for (int m = 0; m < j->n; m++)
        check_message(j, m, &r);
    sum_on(device, j, stream, &again);
    for (int m = 0; m < j->n; m++)
        ck_assert_msg(!j->rows[m] || !memcmp(r.message[m], again.message[m], r.bytes[m]), "not the same every time");
    free_result(j, &again);
    if (device != ry_device_host()) {
        sum_on(ry_device_host(), j, NULL, &again);
        for (int m = 0; m < j->n; m++)
            for (uint64_t i = 0; i < r.bytes[m] && j->rows[m]; i++)
                if (r.message[m][i] != again.message[m][i])
                    ck_abort_msg("type %u, rows of %llu bytes: byte %llu of message %d is %02x, on the host %02x",
                                 j->type, (unsigned long long)j->row_bytes, (unsigned long long)i, m, r.message[m][i],
                                 again.message[m][i]);
        free_result(j, &again);
    }
    free_result(j, &r);
    unmake(j);
}

START_TEST(widths)
{
    static const uint64_t width[] = {4,   8,   12,  16,   20,   32,   48,   64,   100,  128,  256,
                                     496, 512, 516, 1024, 2048, 4096, 4100, 4112, 8192, 14336};
    struct job j;
    start();
    for (int t = 0; t < 3; t++)
        for (int i = 0; i < (int)(sizeof width / sizeof *width); i++) {
            make(&j, types[t], 1 + (int)draw(4), width[i], 2 + 4000 / width[i], 1 + draw(6), draw(3) > 0, false);
            run(&j);
        }
    make(&j, RY_SUMS_BF16, 3, 2, 30, 5, false, false);
    run(&j);
}
END_TEST

/* One copy to more than a thread sorts, and everything in one row. */
START_TEST(copies)
{
    struct job j;
    start();
    for (int t = 0; t < 3; t++)
        for (int round = 0; round < 8; round++) {
            make(&j, types[t], 1 + (int)draw(MESSAGES), 16 + 16 * draw(3), 1 + draw(12), round ? 1 + draw(64) : 64,
                 true, round % 2);
            run(&j);
        }
    make(&j, RY_SUMS_FP32, 1, 16, 1, 3000, true, true);
    run(&j);
    make(&j, RY_SUMS_FP16, 2, 64, 400, 4, true, true);
    j.blocks = 1;
    run(&j);
    make(&j, RY_SUMS_FP16, 0, 64, 4, 4, true, true); /* nothing */
    run(&j);
}
END_TEST

/* What can be told exactly: the order of adding, ties, signs of zero, NaNs. */
START_TEST(exactly)
{
    static const struct {
        uint32_t type, row[3], sum;
    } is[] = {
        {RY_SUMS_BF16, {0x3f80, 0x3b80, 0}, 0x3f80},      /* 1 + 2^-8: a tie, to even */
        {RY_SUMS_BF16, {0x3f81, 0x3b80, 0}, 0x3f82},      /* the next tie, up */
        {RY_SUMS_BF16, {0x3f80, 0x3b80, 0x3b80}, 0x3f81}, /* each alone would be lost */
        {RY_SUMS_FP16, {0x3c00, 0x1000, 0}, 0x3c00},      /* 1 + 2^-11 */
        {RY_SUMS_FP16, {0x3c01, 0x1000, 0}, 0x3c02},
        {RY_SUMS_FP16, {0x7bff, 0x4c00, 0}, 0x7c00},                      /* 65504 + 16: a tie, to infinity */
        {RY_SUMS_FP16, {0x7bff, 0x4bff, 0}, 0x7bff},                      /* 65504 + 15.99 */
        {RY_SUMS_FP16, {0x7bff, 0x7bff, 0xfbff}, 0x7bff},                 /* fp16 would overflow on the way */
        {RY_SUMS_FP16, {0x0001, 0x0001, 0x03ff}, 0x0401},                 /* out of the subnormal */
        {RY_SUMS_FP32, {0x4b800000, 0x3f800000, 0x3f800000}, 0x4b800000}, /* 2^24 + 1 + 1, in this order */
        {RY_SUMS_FP32, {0x3f800000, 0x3f800000, 0x4b800000}, 0x4b800001}, /* in that one */
        {RY_SUMS_BF16, {0x8000, 0x8000, 0x8000}, 0x8000},                 /* -0 */
        {RY_SUMS_BF16, {0x8000, 0, 0x8000}, 0},
        {RY_SUMS_BF16, {0xff81, 0x3f80, 0}, 0x7fff}, /* any NaN */
        {RY_SUMS_FP16, {0x7c00, 0xfc00, 0}, 0x7fff},
        {RY_SUMS_FP32, {0x7f800000, 0x3f800000, 0xff800000}, 0x7fffffff},
        {RY_SUMS_FP32, {0x7f7fffff, 0x7f7fffff, 0xff7fffff}, 0x7f800000}, /* as fp32 does */
    };
    start();
    for (int i = 0; i < (int)(sizeof is / sizeof *is); i++)
        for (int odd = 0; odd < 2; odd++) {
            struct job j;
            struct result r;
            uint64_t row_bytes = 16 + 4 * (uint64_t)odd, size = ry_sums_bytes(is[i].type), per = row_bytes / size;
            j = (struct job){.type = is[i].type,
                             .n = 1,
                             .row_bytes = row_bytes,
                             .rows = {4},
                             .distinct = {2},
                             .size = 4 * row_bytes};
            j.list[0] = malloc(16), j.data = malloc(j.size + 1);
            memcpy(j.list[0], (uint32_t[]){0, 0, 1, 0}, 16);
            for (uint64_t k = 0; k < per; k++) {
                const uint32_t bits[] = {is[i].row[0], is[i].row[1], 0xffabcd01, is[i].row[2]};
                for (uint64_t row = 0; row < 4; row++)
                    put(j.type, j.data, row * per + k, bits[row]);
            }
            sum_on(device, &j, stream, &r);
            for (uint64_t k = 0; k < per; k++) {
                if (get(j.type, r.message[0], k) != is[i].sum)
                    ck_abort_msg("case %d: %08x, not %08x", i, get(j.type, r.message[0], k), is[i].sum);
                ck_assert_uint_eq(get(j.type, r.message[0], per + k),
                                  size == 4 ? 0xffabcd01 : 0xcd01); /* alone: no NaN is touched */
            }
            free_result(&j, &r);
            unmake(&j);
        }
}
END_TEST

/* Summed in the node, with one rounding, and by the receiver in its own type, one rounding for each row. */
START_TEST(closer)
{
    struct job j;
    struct result r;
    start();
    for (int t = 0; t < 2; t++)
        for (uint64_t k = 2; k <= 8; k *= 2) {
            double mean[2] = {0, 0};
            uint64_t n = 0, per = 128;
            for (make(&j, types[t], 1, per * 2, 80, k, true, true); j.distinct[0] < 20;
                 make(&j, types[t], 1, per * 2, 80, k, true, true))
                unmake(&j);
            sum_on(device, &j, stream, &r);
            for (uint64_t d = 0; d < j.distinct[0]; d++)
                for (uint64_t i = 0; i < per; i++, n++) {
                    double exact = 0, in_type = 0;
                    for (uint64_t row = 0; row < j.rows[0]; row++)
                        if (j.list[0][row] == d) {
                            double v = value_of(j.type, get(j.type, j.data + j.from[0], row * per + i));
                            exact += v;
                            in_type = nearest(j.type, in_type + v);
                        }
                    mean[0] += fabs(value_of(j.type, get(j.type, r.message[0] + d * j.row_bytes, i)) - exact);
                    mean[1] += fabs(in_type - exact);
                }
            printf("%s, up to %llu copies: mean error %.3g summed in fp32 and rounded once, %.3g summed in %s: %.2f "
                   "times\n",
                   names[t], (unsigned long long)k, mean[0] / (double)n, mean[1] / (double)n, names[t],
                   mean[1] / mean[0]);
            ck_assert(k == 2 ? mean[0] <= mean[1] : mean[0] < mean[1]);
            free_result(&j, &r);
            unmake(&j);
        }
    fflush(stdout);
}
END_TEST

/* Entries beyond the distinct rows: in no sum, counted, and nothing else is touched. */
START_TEST(damage)
{
    start();
    for (int odd = 0; odd < 2; odd++) {
        struct job j;
        struct ry_sums_job add = {.message = 0};
        uint64_t bad = 0;
        make(&j, RY_SUMS_FP32, 1, 32 + 4 * (uint64_t)odd, 40, 5, true, true);
        for (uint64_t row = 0; row < j.rows[0]; row++)
            if (!draw(5)) {
                j.list[0][row] = draw(2) ? (uint32_t)j.distinct[0] : 0xffffffff - (uint32_t)draw(2);
                bad++;
            }
        for (uint64_t row = 0; row < j.rows[0]; row++) /* this one has none left */
            if (j.list[0][row] == 0)
                j.list[0][row] = 1u << 30, bad++;
        uint64_t bytes = ry_rows_message_bytes(j.row_bytes, j.distinct[0] + 1, j.rows[0]);
        struct ry_rows *rows = scanner(device, 0);
        struct ry_sums *sums = kept(device, rows, &j, stream);
        ck_assert_uint_eq(ry_rows_expand_errors(rows), bad);
        void *from;
        ok(device->alloc(&from, j.size + 1, &err));
        ok(device->alloc(&add.to, bytes + 64, &err));
        ok(device->copy(from, j.data, j.size + 1, stream, &err));
        ok(device->fill(add.to, 0xee, bytes + 64, stream, &err));
        add.from = (char *)from + j.from[0];
        ok(ry_sums_add(rows, sums, RY_SUMS_FP32, &add, 1, stream, &err));
        unsigned char *got = malloc(bytes + 64);
        ok(device->copy(got, add.to, bytes + 64, stream, &err));
        ok(device->stream_sync(stream, &err));
        for (uint64_t i = 0; i < 64; i++)
            ck_assert_uint_eq(got[bytes + i], 0xee);
        for (uint64_t i = 0; i < j.row_bytes && j.distinct[0]; i++)
            ck_assert_uint_eq(got[i], 0);
        for (uint64_t d = 1; d < j.distinct[0]; d++) {
            bool any = false;
            for (uint64_t row = 0; row < j.rows[0]; row++)
                any |= j.list[0][row] == d;
            for (uint64_t i = 0; i < j.row_bytes / 4 && any; i++)
                check_element(&j, 0, d, i, get(j.type, got + d * j.row_bytes, i));
        }
        for (uint64_t row = 0; row < j.rows[0]; row++) {
            uint32_t entry;
            memcpy(&entry, got + bytes - 4 * (j.rows[0] - row), 4);
            ck_assert(entry == j.distinct[0] || entry == j.list[0][row]);
        }
        ck_assert_int_eq(ry_sums_add(rows, sums, 8, &add, 1, stream, &err), -1);
        add.to = (char *)add.to + 4;
        ck_assert_int_eq(ry_sums_add(rows, sums, 7, &add, 1, stream, &err), -1);
        add.to = (char *)add.to - 4, add.message = 1;
        ck_assert_int_eq(ry_sums_add(rows, sums, 7, &add, 1, stream, &err), -1);
        ry_rows_free(rows); /* before the lists */
        ry_sums_free(sums);
        ok(device->release(from, &err));
        ok(device->release(add.to, &err));
        free(got);
        unmake(&j);
    }
    ry_sums_free(NULL);
}
END_TEST

/* ---- with a real GPU only ---- */

static bool is_large_gpu(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    bool fake = lib && dlsym(lib, "fake_cuda_depth");
    if (lib)
        dlclose(lib);
    return device != ry_device_host() && !fake && !getenv("RY_TEST_SMALL");
}

enum { RUNS = 15, COLD = 256 << 20 };
struct work {
    struct ry_rows *rows;
    struct ry_sums *sums;
    struct ry_sums_message message;
    struct ry_sums_job add;
    int type;
    void *from, *to, *cold;
    uint64_t bytes;
};

static void plain_copy(struct work *w)
{
    ok(device->copy(w->to, w->from, w->bytes, stream, &err));
}

static void keeping(struct work *w)
{
    ry_sums_free(w->sums);
    w->sums = ry_sums_keep(w->rows, &w->message, 1, stream, &err);
    ck_assert_msg(w->sums, "%s", err.msg);
}

static void adding(struct work *w)
{
    ok(ry_sums_add(w->rows, w->sums, w->type, &w->add, 1, stream, &err));
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Median in microseconds, as in test_rows.c: the cache emptied, and the host's part hidden, by filling other memory
 * before. */
static double timed(void (*what)(struct work *), struct work *w)
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

START_TEST(speed)
{
    enum { MIB = 1 << 20 };
    static const struct {
        const char *name;
        uint32_t type;
        uint64_t width, bytes, copies, shift;
    } list[] = {
        {"bf16, 4 KiB rows, 4 copies", RY_SUMS_BF16, 4 << 10, 64 * MIB, 4, 0},
        {"bf16, 4 KiB rows, 2 copies", RY_SUMS_BF16, 4 << 10, 64 * MIB, 2, 0},
        {"bf16, 4 KiB rows, 8 copies", RY_SUMS_BF16, 4 << 10, 64 * MIB, 8, 0},
        {"bf16, 14 KiB rows, 4 copies", RY_SUMS_BF16, 14 << 10, 112 * MIB, 4, 0},
        {"bf16, 1 KiB rows, 4 copies", RY_SUMS_BF16, 1 << 10, 64 * MIB, 4, 0},
        {"bf16, all distinct", RY_SUMS_BF16, 4 << 10, 64 * MIB, 1, 0},
        {"fp16, 4 KiB rows, 4 copies", RY_SUMS_FP16, 4 << 10, 64 * MIB, 4, 0},
        {"fp32, 8 KiB rows, 4 copies", RY_SUMS_FP32, 8 << 10, 64 * MIB, 4, 0},
        {"large, 4 copies", RY_SUMS_BF16, 4 << 10, 512ull * MIB, 4, 0},
        {"unaligned, 4 copies", RY_SUMS_BF16, 4 << 10, 64 * MIB, 4, 2},
        {"width of 4098, 4 copies", RY_SUMS_BF16, 4098, 64 * MIB, 4, 0},
        {"all of 4 rows", RY_SUMS_BF16, 4 << 10, 64 * MIB, 4096, 0},
    };
    const uint64_t most = 512ull * MIB;
    struct ry_device_id id;
    struct work w = {.sums = NULL};
    if (!is_large_gpu())
        return;
    start();
    ok(device->identify(0, &id, &err));
    ok(device->alloc(&w.from, most + 256, &err));
    ok(device->alloc(&w.to, most + 256, &err));
    ok(device->alloc(&w.cold, COLD, &err));
    ok(device->fill(w.from, 0x3c, most + 256, stream, &err));
    printf(
        "%s: medians of %d, cache cold. GB/s of rows read and sums written, x: time over the copy's of as many bytes\n"
        "%-28s %6s %4s | %6s %5s | %6s | %6s %5s %5s\n",
        id.name, RUNS, "", "row", "MiB", "copy", "GB/s", "keep", "sum", "GB/s", "x");
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        uint64_t k = list[i].width, rows = list[i].bytes / k, distinct = rows / list[i].copies;
        uint32_t *index = malloc(rows * sizeof *index);
        void *message;
        /* As of `copies` ranks, each with the same rows in an order of its own. */
        rows = distinct * list[i].copies;
        for (uint64_t c = 0; c < list[i].copies; c++) {
            uint32_t *own = index + c * distinct;
            for (uint64_t r = 0; r < distinct; r++)
                own[r] = (uint32_t)r;
            for (uint64_t r = distinct; c && r > 1; r--) {
                uint64_t with = draw(r);
                uint32_t was = own[r - 1];
                own[r - 1] = own[with], own[with] = was;
            }
        }
        w.bytes = rows * k;
        w.type = (int)list[i].type;
        w.rows = scanner(device, 0);
        uint64_t bytes = ry_rows_message_bytes(k, distinct, rows), sent = ry_rows_message_bytes(k, distinct + 1, rows);
        ok(device->alloc(&message, bytes, &err));
        ok(device->alloc(&w.add.to, sent, &err));
        ok(device->copy((char *)message + bytes - 4 * rows, index, 4 * rows, stream, &err));
        w.message = (struct ry_sums_message){message, k, distinct, rows};
        w.add.from = (char *)w.from + list[i].shift;
        double copy = timed(plain_copy, &w), keep = timed(keeping, &w), add = timed(adding, &w);
        double moved = (double)(w.bytes + sent), x = add / (copy * moved / (2.0 * (double)w.bytes));
        printf("%-28s %6llu %4llu | %6.1f %5.0f | %6.1f | %6.1f %5.0f %5.2f\n", list[i].name, (unsigned long long)k,
               (unsigned long long)(w.bytes >> 20), copy, 2.0 * (double)w.bytes / copy / 1e3, keep, add,
               moved / add / 1e3, x);
        fflush(stdout);
        ck_assert_uint_eq(ry_rows_expand_errors(w.rows), 0);
        ry_sums_free(w.sums);
        w.sums = NULL;
        ry_rows_free(w.rows);
        ok(device->release(message, &err));
        ok(device->release(w.add.to, &err));
        free(index);
        /* Loose, since the machine may be shared. */
        if (k % 16 == 0 && !list[i].shift && distinct > 1000)
            ck_assert_msg(add < 4 * copy + 100, "far slower than a copy");
    }
    ok(device->release(w.from, &err));
    ok(device->release(w.to, &err));
    ok(device->release(w.cold, &err));
}
END_TEST

static void add_tests(TCase *t, bool cuda)
{
    if (!cuda)
        tcase_add_test(t, numbers);
    tcase_add_test(t, widths);
    tcase_add_test(t, copies);
    tcase_add_test(t, exactly);
    tcase_add_test(t, closer);
    tcase_add_test(t, damage);
    if (cuda)
        tcase_add_test(t, speed);
}

int main(void)
{
    return on_devices("sums", add_tests);
}
