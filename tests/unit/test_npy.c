/* test_npy.c: .npy files: our own round trip, NumPy's files both ways, the shared traces, and everything malformed. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/npy.h"

static char dir[64], path[128];
static struct ry_err err;

static void setup(void)
{
    strcpy(dir, "/tmp/ry-npy-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/a.npy", dir);
}

static void teardown(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    ck_assert_int_eq(system(cmd), 0);
}

static void put(const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(data, 1, n, f), n);
    fclose(f);
}

START_TEST(round_trip)
{
    uint64_t data[24];
    for (int i = 0; i < 24; i++)
        data[i] = UINT64_C(0x1122334455667788) * (uint64_t)(i + 1);
    static const size_t shapes[][RY_NPY_DIMS] = {{1}, {24}, {4, 6}, {2, 3, 4}, {2, 1, 3, 4}};
    for (int ndim = 0; ndim <= 4; ndim++) {
        for (int type = RY_NPY_U8; type <= RY_NPY_F64; type++) {
            struct ry_npy a;
            ck_assert_int_eq(ry_npy_save(AT_FDCWD, path, (enum ry_npy_type)type, ndim, shapes[ndim], data, &err), 0);
            struct stat st;
            ck_assert_int_eq(stat(path, &st), 0);
            ck_assert_uint_eq((size_t)st.st_size, ry_npy_file_bytes((enum ry_npy_type)type, ndim, shapes[ndim]));
            ck_assert_msg(!ry_npy_open(&a, path, &err), "%s", err.msg);
            ck_assert_int_eq(a.type, type);
            ck_assert_int_eq(a.ndim, ndim);
            for (int i = 0; i < ndim; i++)
                ck_assert_uint_eq(a.shape[i], shapes[ndim][i]);
            ck_assert_uint_eq(a.count, ndim ? 24 : 1);
            ck_assert_mem_eq(a.data, data, a.count * ry_npy_type_bytes((enum ry_npy_type)type));
            ry_npy_close(&a);
            ry_npy_close(&a);
        }
    }
}
END_TEST

START_TEST(elements_as_numbers)
{
    int32_t i32[] = {-5, 7};
    int64_t i64[] = {-5, INT64_MAX};
    uint16_t u16[] = {65535, 1};
    double f64[] = {3.5, 1};
    struct ry_npy a;
    size_t two = 2;
    struct {
        enum ry_npy_type type;
        const void *data;
        uint64_t want[2];
    } t[] = {{RY_NPY_I32, i32, {0, 7}},
             {RY_NPY_I64, i64, {0, INT64_MAX}},
             {RY_NPY_U16, u16, {65535, 1}},
             {RY_NPY_F64, f64, {0, 0}}};
    for (size_t i = 0; i < 4; i++) {
        ck_assert_int_eq(ry_npy_save(AT_FDCWD, path, t[i].type, 1, &two, t[i].data, &err), 0);
        ck_assert_int_eq(ry_npy_open(&a, path, &err), 0);
        ck_assert_uint_eq(ry_npy_get(&a, 0), t[i].want[0]);
        ck_assert_uint_eq(ry_npy_get(&a, 1), t[i].want[1]);
        ry_npy_close(&a);
    }
}
END_TEST

static void refused(const void *data, size_t n, const char *why)
{
    struct ry_npy a;
    put(data, n);
    err.msg[0] = 0;
    ck_assert_msg(ry_npy_open(&a, path, &err) == -1, "taken: expected '%s'", why);
    ck_assert_msg(strstr(err.msg, why) && strstr(err.msg, path), "'%s' does not say '%s'", err.msg, why);
    ck_assert_ptr_null(a.data);
}

/* A file of version 1.0 with this header text and `n` bytes of elements. */
static size_t compose(char *out, const char *dict, size_t n)
{
    size_t len = strlen(dict);
    size_t pad = (64 - (10 + len + 1) % 64) % 64;
    memcpy(out, "\x93NUMPY\1\0", 8);
    out[8] = (char)((len + pad + 1) & 0xff);
    out[9] = (char)((len + pad + 1) >> 8);
    memcpy(out + 10, dict, len);
    memset(out + 10 + len, ' ', pad);
    out[10 + len + pad] = '\n';
    memset(out + 11 + len + pad, 7, n);
    return 11 + len + pad + n;
}

START_TEST(malformed)
{
    static const struct {
        const char *dict;
        size_t bytes;
        const char *why;
    } cases[] = {
        {"{'descr': '<u8', 'fortran_order': True, 'shape': (2, 2), }", 32, "Fortran order"},
        {"{'descr': '>u8', 'fortran_order': False, 'shape': (2,), }", 16, "'>u8' are not supported"},
        {"{'descr': '<f2', 'fortran_order': False, 'shape': (2,), }", 4, "'<f2' are not supported"},
        {"{'descr': '', 'fortran_order': False, 'shape': (2,), }", 4, "'' are not supported"},
        {"{'descr': [('a', '<u8')], 'fortran_order': False, 'shape': (2,), }", 16, "structures"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (2,), }", 15,
         "promises 16 bytes of elements, 15 are there"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1), }", 8, "more than 4 dimensions"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (4294967296, 4294967296), }", 8, "more elements than"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (99999999999999999999999,), }", 8, "more elements than"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (2305843009213693952,), }", 8, "more elements than"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (-1,), }", 8, "damaged"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (2 2), }", 8, "damaged"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (2,", 8, "damaged"},
        {"{'descr': '<u8', 'fortran_order': Maybe, 'shape': (2,), }", 8, "damaged"},
        {"{'descr': '<u8', 'shape': (1,), }", 8, "damaged"},
        {"{'descr': '<u8', 'fortran_order': False, }", 8, "damaged"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (1,), 'more': 1, }", 8, "damaged"},
        {"{'descr': '<u8' 'fortran_order': False, 'shape': (1,), }", 8, "damaged"},
        {"{'descr: ", 8, "damaged"},
        {"", 8, "damaged"},
    };
    char buf[1024];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(buf, compose(buf, cases[i].dict, cases[i].bytes), cases[i].why);
    refused("hello, world, this is text", 26, "magic");
    refused("\x93NUMPY", 6, "truncated");
    refused("\x93NUMPY\1\0\xff\xff{'descr'", 18, "truncated inside");
    refused("\x93NUMPY\2\0\xff\xff\xff\xff{'descr'", 20, "truncated inside");
    refused("\x93NUMPY\x09\0\x10\0{'descr'        ", 26, "version 9.0");
    refused("", 0, "empty");
    memcpy(buf, "\x93NUMPY\1\0\x3b\0{'descr': '<u8', 'fortran_order': False, 'shape': (1,), }   \n\0\0\0\0\0\0\0\0\0",
           80);
    refused(buf, 80, "not aligned");
    struct ry_npy a;
    snprintf(path, sizeof path, "%s", dir);
    ck_assert_int_eq(ry_npy_open(&a, path, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "not a regular file"));
    snprintf(path, sizeof path, "%s/none.npy", dir);
    ck_assert_int_eq(ry_npy_open(&a, path, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "No such file"));
}
END_TEST

START_TEST(unusual_but_valid)
{
    static const char *const dicts[] = {
        "{\"shape\":(3,1),\"fortran_order\":False,\"descr\":\"<u4\"}",
        "{'descr': '=u4', 'fortran_order': False, 'shape': (3L, 1L)}",
        "{'descr': 'u4','fortran_order':False,'shape':( 3 , 1 , ) , } ",
    };
    char buf[1024];
    for (size_t i = 0; i < 3; i++) {
        struct ry_npy a;
        put(buf, compose(buf, dicts[i], 15)); /* three bytes too many are no harm: NumPy ignores them too */
        ck_assert_msg(!ry_npy_open(&a, path, &err), "%s: %s", dicts[i], err.msg);
        ck_assert_uint_eq(a.count, 3);
        ck_assert_int_eq(a.ndim, 2);
        ck_assert_uint_eq(ry_npy_get(&a, 2), 0x07070707);
        ry_npy_close(&a);
    }
}
END_TEST

/* Every prefix of a good file is refused, and never read beyond its end (the sanitizers watch). */
START_TEST(truncated_anywhere)
{
    uint64_t data[6] = {1, 2, 3, 4, 5, 6};
    size_t shape[] = {2, 3};
    ck_assert_int_eq(ry_npy_save(AT_FDCWD, path, RY_NPY_U64, 2, shape, data, &err), 0);
    size_t size = ry_npy_file_bytes(RY_NPY_U64, 2, shape);
    for (size_t n = size; n-- > 0;) {
        struct ry_npy a;
        ck_assert_int_eq(truncate(path, (off_t)n), 0);
        ck_assert_msg(ry_npy_open(&a, path, &err) == -1, "cut at %zu of %zu was taken", n, size);
    }
}
END_TEST

START_TEST(failed_save_leaves_nothing)
{
    uint64_t data[2] = {1, 2};
    size_t two = 2;
    ck_assert_int_eq(ry_npy_save(AT_FDCWD, path, RY_NPY_U64, 1, &two, data, &err), 0);
    char missing[160], cmd[256];
    snprintf(missing, sizeof missing, "%s/none/a.npy", dir);
    ck_assert_int_eq(ry_npy_save(AT_FDCWD, missing, RY_NPY_U64, 1, &two, data, &err), -1);
    ck_assert_int_eq(errno, ENOENT);
    ck_assert_ptr_nonnull(strstr(err.msg, missing));
    /* PATH.tmp is a full device: the old file must survive */
    snprintf(cmd, sizeof cmd, "ln -s /dev/full %s.tmp", path);
    ck_assert_int_eq(system(cmd), 0);
    data[0] = 9;
    ck_assert_int_eq(ry_npy_save(AT_FDCWD, path, RY_NPY_U64, 1, &two, data, &err), -1);
    ck_assert_int_eq(errno, ENOSPC);
    struct ry_npy a;
    ck_assert_int_eq(ry_npy_open(&a, path, &err), 0);
    ck_assert_uint_eq(ry_npy_get(&a, 0), 1);
    ry_npy_close(&a);
    snprintf(cmd, sizeof cmd, "%s.tmp", path);
    ck_assert_int_eq(access(cmd, F_OK), -1);
}
END_TEST

START_TEST(numpy_agrees)
{
    if (system("python3 -c 'import numpy' 2>/dev/null")) {
        fprintf(stderr, "SKIPPED numpy_agrees: python3 cannot import numpy\n");
        return;
    }
    char cmd[1024];
    static const char *const names[] = {"uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32", "float64"};
    for (int t = 0; t < 8; t++) {
        struct ry_npy a;
        snprintf(cmd, sizeof cmd,
                 "python3 -c \"import numpy as n; a = n.arange(60).astype('%s').reshape(3, 4, 5); n.save('%s', a); "
                 "n.lib.format.write_array(open('%s/v2.npy', 'wb'), a, version=(2, 0))\"",
                 names[t], path, dir);
        ck_assert_int_eq(system(cmd), 0);
        for (int v = 1; v <= 2; v++) {
            char file[128];
            snprintf(file, sizeof file, "%s/%s", dir, v == 1 ? "a.npy" : "v2.npy");
            ck_assert_msg(!ry_npy_open(&a, file, &err), "%s", err.msg);
            ck_assert_str_eq(ry_npy_type_name(a.type), names[t]);
            ck_assert_int_eq(a.ndim, 3);
            ck_assert_uint_eq(a.shape[1], 4);
            ck_assert_uint_eq(ry_npy_get(&a, 37), t < 6 ? 37 : 0);
            if (v == 1)
                ck_assert_int_eq(
                    ry_npy_save(dir[0] == '/' ? AT_FDCWD : -1, path, a.type, a.ndim, a.shape, a.data, &err), 0);
            ry_npy_close(&a);
        }
        snprintf(cmd, sizeof cmd,
                 "python3 -c \"import numpy as n; a = n.load('%s'); assert a.dtype == '%s' and "
                 "(a == n.arange(60).reshape(3, 4, 5)).all()\"",
                 path, names[t]);
        ck_assert_int_eq(system(cmd), 0);
    }
}
END_TEST

START_TEST(shared_traces)
{
    const char *shared = getenv("RY_SHARED");
    char file[4096];
    snprintf(file, sizeof file, "%s/traces/gpt-e32-k2/counts.npy", shared ? shared : "");
    if (!shared || access(file, R_OK)) {
        fprintf(stderr, "SKIPPED shared_traces: no routing traces in RY_SHARED\n");
        return;
    }
    struct ry_npy a;
    ck_assert_msg(!ry_npy_open(&a, file, &err), "%s", err.msg);
    ck_assert_int_eq(a.type, RY_NPY_U16);
    ck_assert_int_eq(a.ndim, 3);
    size_t experts = a.shape[2];
    /* every sample routes 512 tokens to 2 experts in each layer */
    for (size_t row = 0; row < a.shape[0] * a.shape[1]; row++) {
        uint64_t sum = 0;
        for (size_t e = 0; e < experts; e++)
            sum += ry_npy_get(&a, row * experts + e);
        ck_assert_uint_eq(sum, 1024);
    }
    ry_npy_close(&a);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("npy");
    TCase *t = tcase_create("npy");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, round_trip);
    tcase_add_test(t, elements_as_numbers);
    tcase_add_test(t, malformed);
    tcase_add_test(t, unusual_but_valid);
    tcase_add_test(t, truncated_anywhere);
    tcase_add_test(t, failed_save_leaves_nothing);
    tcase_add_test(t, numpy_agrees);
    tcase_add_test(t, shared_traces);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
