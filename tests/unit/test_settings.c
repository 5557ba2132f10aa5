/* test_settings.c: the table of settings: defaults, every type's good and bad values, unknown names. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "base/settings.h"

static struct ry_settings s;
static char problems[2048];

static int parse(char *a, char *b)
{
    char *env[] = {"HOME=/root", a, b, NULL};
    return ry_settings_parse(&s, env, problems, sizeof problems);
}

START_TEST(defaults)
{
    ck_assert_int_eq(ry_settings_parse(&s, NULL, problems, sizeof problems), 0);
    ck_assert_str_eq(problems, "");
    ck_assert(!s.disable);
    ck_assert_uint_eq(s.trace_max, UINT64_C(1) << 30);
    ck_assert_int_eq(s.log, RY_LOG_WARN);
    ck_assert_str_eq(s.trace, "");
}
END_TEST

START_TEST(good_values)
{
    ck_assert_int_eq(parse("RAILYARD_DISABLE=Yes", "RAILYARD_TRACE_MAX=64M"), 0);
    ck_assert(s.disable);
    ck_assert_uint_eq(s.trace_max, 64u << 20);
    ck_assert_int_eq(parse("RAILYARD_TRACE_MATRIX=0.25", "RAILYARD_LOG=debug"), 0);
    ck_assert_double_eq(s.trace_matrix, 0.25);
    ck_assert_int_eq(s.log, RY_LOG_DEBUG);
    ck_assert_int_eq(parse("RAILYARD_ROW_BYTES=14336", "RAILYARD_TRACE=/tmp/x"), 0);
    ck_assert_uint_eq(s.row_bytes, 14336);
    ck_assert_str_eq(s.trace, "/tmp/x");
}
END_TEST

/* A malformed value keeps the default and is named with what was expected. */
START_TEST(bad_values)
{
    static char *const bad[] = {"RAILYARD_SAMPLE=-1",      "RAILYARD_SAMPLE=",         "RAILYARD_SAMPLE=8x",
                                "RAILYARD_DISABLE=maybe",  "RAILYARD_TRACE_MAX=1X",    "RAILYARD_TRACE_MAX=99999999999999999999",
                                "RAILYARD_TRACE_MAX=18446744073709551615G", "RAILYARD_PATIENCE=nan", "RAILYARD_PATIENCE=-2",
                                "RAILYARD_LOG=loud",       "RAILYARD_SAMPLE= 3"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ck_assert_msg(parse(bad[i], NULL) == 1, "%s was taken", bad[i]);
        ck_assert_ptr_nonnull(strstr(problems, "RAILYARD_"));
        ck_assert_uint_eq(s.sample, 8);
        ck_assert(!s.disable);
        ck_assert_uint_eq(s.trace_max, UINT64_C(1) << 30);
        ck_assert_double_eq(s.patience, 30);
    }
}
END_TEST

START_TEST(one_by_name)
{
    char out[64];
    char *env[] = {"RAILYARD_LOGS=x", "RAILYARD_PLACEMENT=Watch", "RAILYARD_STAGING=65536K", "RAILYARD_NODE_COMM=maybe", NULL};
    struct ry_err err;
    ck_assert_int_eq(ry_settings_get("RAILYARD_PLACEMENT", env, out, sizeof out, &err), 5);
    ck_assert_str_eq(out, "watch");
    ck_assert_int_eq(ry_settings_get("RAILYARD_STAGING", env, out, sizeof out, &err), 3);
    ck_assert_str_eq(out, "64M");
    ck_assert_int_eq(ry_settings_get("RAILYARD_LOG", env, out, sizeof out, &err), 4);
    ck_assert_str_eq(out, "warn");
    ck_assert_int_eq(ry_settings_get("RAILYARD_ROUTING", NULL, out, sizeof out, &err), 0);
    ck_assert_int_eq(ry_settings_get("RAILYARD_NODE_COMM", env, out, sizeof out, &err), -1);
    ck_assert_str_eq(err.msg, "RAILYARD_NODE_COMM='maybe' is not 0 or 1");
    ck_assert_int_eq(ry_settings_get("RAILYARD_PLACEMENT", env, out, 5, &err), -1);
    ck_assert_int_eq(ry_settings_get("RAILYARD_LOGS", env, out, sizeof out, &err), -1);
}
END_TEST

START_TEST(unknown_names)
{
    ck_assert_int_eq(parse("RAILYARD_TRAICE=/x", "RAILYARD_NOTHINGLIKEIT=1"), 2);
    ck_assert_ptr_nonnull(strstr(problems, "unknown RAILYARD_TRAICE (did you mean RAILYARD_TRACE?)"));
    ck_assert_ptr_nonnull(strstr(problems, "unknown RAILYARD_NOTHINGLIKEIT"));
    ck_assert_ptr_null(strstr(strstr(problems, "NOTHINGLIKEIT"), "did you mean"));
}
END_TEST

START_TEST(long_problems_are_cut)
{
    char small[32], *env[] = {"RAILYARD_A=1", "RAILYARD_B=1", "RAILYARD_C=1", NULL};
    memset(small, 'x', sizeof small);
    ck_assert_int_eq(ry_settings_parse(&s, env, small, sizeof small), 3);
    ck_assert_uint_lt(strlen(small), sizeof small);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("settings");
    TCase *t = tcase_create("settings");
    tcase_add_test(t, defaults);
    tcase_add_test(t, good_values);
    tcase_add_test(t, bad_values);
    tcase_add_test(t, one_by_name);
    tcase_add_test(t, unknown_names);
    tcase_add_test(t, long_problems_are_cut);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
