/*
 * test_cost_file.c: the file of measured costs, and the fingerprint of the cluster that it is named by.
 */
#include <sys/stat.h>

#include "cost_help.h"
#include "measure/cost_file.h"

static char scratch[] = "/tmp/railyard-cost-XXXXXX";

static void in_scratch(void)
{
    strcpy(scratch + strlen(scratch) - 6, "XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(scratch));
    setenv("XDG_CACHE_HOME", scratch, 1);
}

static void out_of_scratch(void)
{
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", scratch);
    ck_assert_int_eq(system(command), 0);
}

START_TEST(round_trip)
{
    struct ry_err err = {""};
    struct ry_cluster *c = regular(2, 4);
    struct ry_cost_model got, m = typical;
    uint64_t print = ry_cluster_fingerprint(c);
    ck_assert_int_eq(ry_cost_load(&got, print, &err), 1);
    m.link[RY_LINK_NIC].measured = m.link[RY_LINK_SELF].measured = true;
    m.link[RY_LINK_NIC].alpha_us = 1.0 / 3;
    for (int i = 0; i < 2; i++) /* the second time over the first */
        ck_assert_msg(!ry_cost_save(&m, c, &err), "%s", err.msg);
    ck_assert_msg(!ry_cost_load(&got, print, &err), "%s", err.msg);
    near(got.link[RY_LINK_NIC].alpha_us, 1.0 / 3, "alpha");
    near(got.link[RY_LINK_LOCAL].bytes_per_us, 200e3, "beta");
    near(got.link[RY_LINK_NODE].bytes_per_us, 800e3, "node");
    near(got.nic_rank_bytes_per_us, 2e3, "rank");
    near(got.plan_us_per_rank, 0.2, "plan");
    ck_assert(got.measured && got.link[RY_LINK_NIC].measured && !got.link[RY_LINK_LOCAL].measured);
    char path[4096], command[8192];
    ck_assert(!ry_cost_path(print, path, sizeof path, &err));
    snprintf(command, sizeof command, "test $(ls %s/railyard | wc -l) = 2", scratch); /* its kind's; no temporary file is left */
    ck_assert_int_eq(system(command), 0);
    ry_cluster_free(c);
}
END_TEST

/* Where UCX was not measured it is taken to be like NCCL, and not to be measured. */
START_TEST(with_and_without_ucx)
{
    struct ry_err err = {""};
    struct ry_cluster *c = regular(2, 4);
    uint64_t print = ry_cluster_fingerprint(c);
    struct ry_cost_model got, m = typical;
    ck_assert(!ry_cost_save(&m, c, &err));
    ck_assert_msg(!ry_cost_load(&got, print, &err), "%s", err.msg);
    ck_assert(!got.ucx.measured && !got.by_ucx);
    near(got.ucx.bytes_per_us, got.link[RY_LINK_NIC].bytes_per_us, "as NCCL");
    near(got.ucx_rank_bytes_per_us, got.nic_rank_bytes_per_us, "as NCCL");
    m.ucx = (struct ry_cost_link){7, 9e3, 3, true};
    m.ucx_rank_bytes_per_us = 8e3;
    ck_assert(!ry_cost_save(&m, c, &err));
    ck_assert_msg(!ry_cost_load(&got, print, &err), "%s", err.msg);
    ck_assert(got.ucx.measured);
    near(got.ucx.alpha_us, 7, "alpha");
    near(got.ucx.bytes_per_us, 9e3, "beta");
    near(got.ucx.message_us, 3, "message");
    near(got.ucx_rank_bytes_per_us, 8e3, "rank");
    m.ucx.bytes_per_us = 0;
    ck_assert(!ry_cost_save(&m, c, &err));
    ck_assert_int_eq(ry_cost_load(&got, print, &err), -1);
    ck_assert_msg(strstr(err.msg, "ucx.bytes_per_us") != NULL, "%s", err.msg);
    ry_cluster_free(c);
}
END_TEST

/* A file from before there were node communicators: they are taken to be like the job's. */
START_TEST(without_node)
{
    struct ry_err err = {""};
    struct ry_cluster *c = regular(2, 4);
    uint64_t print = ry_cluster_fingerprint(c);
    struct ry_cost_model got, m = typical;
    char path[4096], text[4096], *at, *end;
    m.link[RY_LINK_LOCAL].measured = m.link[RY_LINK_NODE].measured = m.node_comm = true;
    ck_assert(!ry_cost_save(&m, c, &err) && !ry_cost_path(print, path, sizeof path, &err));
    ck_assert(!ry_cost_load(&got, print, &err) && got.link[RY_LINK_NODE].measured && !got.node_comm);
    FILE *f = fopen(path, "r");
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = 0;
    ck_assert((at = strstr(text, "\"node\": {")) && (end = strchr(at, '}')));
    f = fopen(path, "w");
    fprintf(f, "%.*s%s", (int)(at - text), text, end + 2); /* and the comma */
    fclose(f);
    ck_assert_msg(!ry_cost_load(&got, print, &err), "%s", err.msg);
    near(got.link[RY_LINK_NODE].bytes_per_us, 200e3, "node as local");
    near(got.link[RY_LINK_NODE].alpha_us, 5, "node as local");
    ck_assert(got.link[RY_LINK_LOCAL].measured && !got.link[RY_LINK_NODE].measured);
    /* there but without its numbers is damage */
    f = fopen(path, "w");
    fprintf(f, "%.*s\"node\": {}%s", (int)(at - text), text, end + 1);
    fclose(f);
    ck_assert_int_eq(ry_cost_load(&got, print, &err), -1);
    ck_assert_msg(strstr(err.msg, "node.alpha_us is missing") != NULL, "%s", err.msg);
    ry_cluster_free(c);
}
END_TEST

/* Cut anywhere, or with any byte changed: an error that names the file, or sound numbers; never a crash. */
START_TEST(damaged)
{
    struct ry_err err = {""};
    struct ry_cluster *c = regular(2, 4);
    uint64_t print = ry_cluster_fingerprint(c);
    char path[4096], text[4096];
    ck_assert(!ry_cost_save(&typical, c, &err) && !ry_cost_path(print, path, sizeof path, &err));
    FILE *f = fopen(path, "r");
    size_t n = fread(text, 1, sizeof text, f);
    fclose(f);
    ck_assert(n > 100 && n < sizeof text);
    int refused = 0, tries = 0;
    for (size_t i = 0; i < 2 * n; i++) {
        char changed[4096];
        memcpy(changed, text, n);
        size_t at = i % n, size = i < n ? i : n;
        if (i >= n)
            changed[at] = (char)(rand() % 256);
        f = fopen(path, "w");
        ck_assert(fwrite(changed, 1, size, f) == size && !fclose(f));
        struct ry_cost_model got;
        int r = ry_cost_load(&got, print, &err);
        tries++;
        refused += r == -1;
        ck_assert(r == 0 || r == -1);
        if (r == -1)
            ck_assert_msg(strstr(err.msg, path) != NULL, "%s", err.msg);
        else
            for (int l = 0; l < RY_LINKS; l++)
                ck_assert(isfinite(got.link[l].alpha_us) && got.link[l].alpha_us >= 0 && got.link[l].bytes_per_us > 0);
        if (i < n - 2) /* cut short: never taken */
            ck_assert_int_eq(r, -1);
    }
    ck_assert_int_gt(refused, tries / 2);
    /* each field must be there and sound */
    static const char *const bad[] = {"\"alpha_us\": 40",    "\"alpha_us\": -1",       "\"group_us\": 15",
                                      "\"group_us\": \"x\"", "\"bytes_per_us\": 3000", "\"bytes_per_us\": 0",
                                      "\"version\": 1",      "\"version\": 2"};
    for (int i = 0; i < 8; i += 2) {
        char *at = strstr(text, bad[i]);
        ck_assert_msg(at != NULL, "no %s in %s", bad[i], text);
        f = fopen(path, "w");
        fprintf(f, "%.*s%s%s", (int)(at - text), text, bad[i + 1],
                strchr(at, ',') ? strpbrk(at + strlen(bad[i]), ",\n") : "");
        fclose(f);
        struct ry_cost_model got;
        ck_assert_int_eq(ry_cost_load(&got, print, &err), -1);
        ck_assert_msg(strstr(err.msg, path) && strstr(err.msg, "railyard calibrate"), "%s", err.msg);
    }
    ry_cluster_free(c);
}
END_TEST

START_TEST(no_place)
{
    struct ry_err err = {""};
    char path[4096];
    unsetenv("XDG_CACHE_HOME");
    setenv("HOME", "/somewhere", 1);
    ck_assert(!ry_cost_path(0xabc, path, sizeof path, &err));
    ck_assert_str_eq(path, "/somewhere/.cache/railyard/cost-0000000000000abc.json");
    setenv("XDG_CACHE_HOME", "relative", 1);
    ck_assert(!ry_cost_path(0xabc, path, sizeof path, &err));
    ck_assert_str_eq(path, "/somewhere/.cache/railyard/cost-0000000000000abc.json");
    unsetenv("HOME");
    ck_assert_int_eq(ry_cost_path(1, path, sizeof path, &err), -1);
    setenv("XDG_CACHE_HOME", "/proc/nowhere", 1);
    struct ry_cluster *c = regular(1, 1);
    ck_assert_int_eq(ry_cost_save(&typical, c, &err), -1);
    ck_assert_msg(strstr(err.msg, "/proc/nowhere") != NULL, "%s", err.msg);
    ry_cluster_free(c);
}
END_TEST

START_TEST(fingerprint)
{
    static const int a[] = {0, 0, 1, 1}, b[] = {7, 3, 3, 7}, other[] = {0, 0, 0, 1}, four[] = {0, 1, 2, 3};
    struct ry_cluster *ca = cluster_of(a, 4, "x"), *cb = cluster_of(b, 4, "y"), *co = cluster_of(other, 4, "x"),
                      *cf = cluster_of(four, 4, "x");
    uint64_t p = ry_cluster_fingerprint(ca);
    cb->seats[2].pid = 77;
    cb->seats[2].settings_hash = 5;
    strcpy(cb->seats[1].gpu_pci, "0000:01:00.0");
    ck_assert_uint_eq(p, ry_cluster_fingerprint(cb));
    ck_assert_uint_ne(p, ry_cluster_fingerprint(co));
    ck_assert_uint_ne(p, ry_cluster_fingerprint(cf));
    strcpy(ca->seats[3].gpu_name, "Other GPU");
    ck_assert_uint_ne(p, ry_cluster_fingerprint(ca));
    cb->seats[0].nic_gbs = 12.5;
    uint64_t named = ry_cluster_fingerprint(cb);
    ck_assert_uint_ne(p, named);
    cb->seats[0].nic_gbs = 12.501;
    ck_assert_uint_eq(named, ry_cluster_fingerprint(cb));
    ry_cluster_free(ca);
    ry_cluster_free(cb);
    ry_cluster_free(co);
    ry_cluster_free(cf);
}
END_TEST

/* Other ranks of the same hardware: by what was measured on as many as there are, with NICs. */
START_TEST(of_a_kind)
{
    static const int pair[] = {0, 1};
    struct ry_err err = {""};
    struct ry_cluster *all = regular(2, 4), *twins = cluster_of(pair, 2, "t"), *alone = regular(1, 8), *wide = regular(3, 6);
    struct ry_cluster *every[] = {all, twins, alone, wide};
    struct ry_cost_model got, m = typical;
    char other[128] = "x", path[4096], command[8192];
    for (size_t i = 0; i < 4; i++)
        for (int r = 0; r < every[i]->nranks; r++) {
            strcpy(every[i]->seats[r].gpu_name, "NVIDIA H200");
            snprintf(every[i]->seats[r].nic, sizeof every[i]->seats[r].nic, "mlx5_%d", r);
        }
    ck_assert_uint_eq(ry_cluster_kind(all), ry_cluster_kind(twins));
    ck_assert_uint_eq(ry_cluster_kind(all), ry_cluster_kind(alone));
    ck_assert_int_eq(ry_cost_find(&got, twins, other, &err), 1);
    ck_assert_str_eq(other, "");
    m.link[RY_LINK_NIC].measured = true;
    m.group_us = 11;
    ck_assert_msg(!ry_cost_save(&m, all, &err), "%s", err.msg);
    ck_assert_msg(!ry_cost_find(&got, twins, other, &err), "%s", err.msg);
    near(got.group_us, 11, "of the kind");
    ck_assert(got.measured);
    ck_assert_str_eq(other, "2 nodes, 8 ranks, NVIDIA H200, mlx5_0");
    ck_assert(!ry_cost_find(&got, all, other, &err));
    ck_assert_str_eq(other, "");

    m.group_us = 12; /* fewer ranks of a node know less, and so does who has no NIC; for themselves both count */
    ck_assert(!ry_cost_save(&m, twins, &err));
    m.link[RY_LINK_NIC].measured = false;
    ck_assert(!ry_cost_save(&m, alone, &err));
    ck_assert(!ry_cost_find(&got, twins, other, &err));
    near(got.group_us, 12, "its own");
    ck_assert(!ry_cost_find(&got, wide, other, &err));
    near(got.group_us, 11, "of the kind, still");
    m.link[RY_LINK_NIC].measured = true;
    m.group_us = 13;
    ck_assert(!ry_cost_save(&m, all, &err)); /* measured anew */
    ck_assert(!ry_cost_find(&got, wide, other, &err));
    near(got.group_us, 13, "of the kind, anew");

    strcpy(wide->seats[5].gpu_name, "NVIDIA A100");
    ck_assert_int_eq(ry_cost_find(&got, wide, other, &err), 1);
    strcpy(wide->seats[5].gpu_name, "NVIDIA H200");
    snprintf(path, sizeof path, "%s/railyard/cost-kind-%016llx.json", scratch, (unsigned long long)ry_cluster_kind(all));
    snprintf(command, sizeof command, "sed -i 's/\"kind\": \"./\"kind\": \"x/' %s", path);
    ck_assert_int_eq(system(command), 0);
    ck_assert_int_eq(ry_cost_find(&got, wide, other, &err), -1);
    ck_assert_msg(strstr(err.msg, path) && strstr(err.msg, "kind is x"), "%s", err.msg);
    m.group_us = 14; /* what is damaged tells nothing */
    ck_assert(!ry_cost_save(&m, twins, &err));
    ck_assert(!ry_cost_find(&got, wide, other, &err));
    near(got.group_us, 14, "of the kind, mended");
    for (size_t i = 0; i < 4; i++)
        ry_cluster_free(every[i]);
}
END_TEST

int main(void)
{
    begin_seed();
    Suite *s = suite_create("cost_file");
    TCase *t = tcase_create("file");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, in_scratch, out_of_scratch);
    tcase_add_test(t, round_trip);
    tcase_add_test(t, with_and_without_ucx);
    tcase_add_test(t, without_node);
    tcase_add_test(t, damaged);
    tcase_add_test(t, no_place);
    tcase_add_test(t, fingerprint);
    tcase_add_test(t, of_a_kind);
    suite_add_tcase(s, t);
    SRunner *run = srunner_create(s);
    srunner_run_all(run, CK_NORMAL);
    int failed = srunner_ntests_failed(run);
    srunner_free(run);
    return failed != 0;
}
