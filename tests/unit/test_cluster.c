/* test_cluster.c: node identity and the cluster map, by hand and against a plain model on random jobs. */
#include <check.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cluster.h"

static unsigned seed;

/* Seats whose node is named by one letter each: "aabb" is 4 ranks on 2 nodes. */
static struct ry_seat *seats_of(const char *nodes)
{
    size_t n = strlen(nodes);
    struct ry_seat *s = calloc(n, sizeof *s);
    for (size_t i = 0; i < n; i++) {
        s[i].version = RY_SEAT_VERSION;
        s[i].rank = (int)i;
        snprintf(s[i].node, sizeof s[i].node, "node-%c", nodes[i]);
    }
    return s;
}

static struct ry_cluster *build(const char *nodes)
{
    struct ry_err err = {""};
    struct ry_seat *s = seats_of(nodes);
    struct ry_cluster *c = ry_cluster_build(s, (int)strlen(nodes), &err);
    ck_assert_msg(c != NULL, "%s", err.msg);
    free(s); /* seats are copied */
    return c;
}

/* "0011" for the node numbers, "0101" for the local indices. */
static void expect(const char *nodes, int nnodes, const char *node, const char *local)
{
    struct ry_cluster *c = build(nodes);
    ck_assert_int_eq(c->nnodes, nnodes);
    ck_assert_int_eq(c->nranks, (int)strlen(nodes));
    for (int i = 0; i < c->nranks; i++) {
        ck_assert_msg(c->node[i] == node[i] - '0', "%s: rank %d is on node %d", nodes, i, c->node[i]);
        ck_assert_msg(c->local[i] == local[i] - '0', "%s: rank %d has local index %d", nodes, i, c->local[i]);
        ck_assert_int_eq(c->seats[i].rank, i);
    }
    ry_cluster_free(c);
}

START_TEST(shapes)
{
    expect("a", 1, "0", "0");
    expect("aaaa", 1, "0000", "0123");
    expect("abcd", 4, "0123", "0000");
    expect("aabb", 2, "0011", "0101");
    expect("abab", 2, "0101", "0011");       /* interleaved */
    expect("aabbb", 2, "00111", "01012");    /* unequal */
    expect("baab", 2, "0110", "0011");       /* numbered by lowest rank, not by name */
    expect("zaazmz", 3, "011020", "001102"); /* all of it */
}
END_TEST

START_TEST(sizes_and_firsts)
{
    struct ry_cluster *c = build("zaazmz");
    int size[] = {3, 2, 1}, first[] = {0, 1, 4};
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(c->node_size[i], size[i]);
        ck_assert_int_eq(c->node_first[i], first[i]);
    }
    ry_cluster_free(c);
}
END_TEST

START_TEST(wrong_seats)
{
    struct ry_err err = {""};
    struct ry_seat *s = seats_of("aabb");
    s[2].rank = 3;
    ck_assert_ptr_null(ry_cluster_build(s, 4, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "place 2"));
    ck_assert_ptr_nonnull(strstr(err.msg, "rank 3"));
    ck_assert_ptr_null(ry_cluster_build(s, 4, NULL));
    ck_assert_ptr_null(ry_cluster_build(s, 0, &err));
    ck_assert_ptr_null(ry_cluster_build(s, -1, &err));
    free(s);
    ry_cluster_free(NULL);
}
END_TEST

/* A seat off the wire may hold texts without an end; the map's copies must be safe to print. */
START_TEST(unterminated_texts)
{
    struct ry_seat *s = seats_of("ab");
    memset(s[1].node, 'x', sizeof s[1].node);
    memset(s[1].nic, 'y', sizeof s[1].nic);
    memset(s[1].railyard, 'z', sizeof s[1].railyard);
    struct ry_cluster *c = ry_cluster_build(s, 2, NULL);
    ck_assert_ptr_nonnull(c);
    ck_assert_int_eq(c->nnodes, 2);
    ck_assert_uint_eq(strlen(c->seats[1].node), sizeof s[1].node - 1);
    ck_assert_uint_eq(strlen(c->seats[1].nic), sizeof s[1].nic - 1);
    ck_assert_uint_eq(strlen(c->seats[1].railyard), sizeof s[1].railyard - 1);
    ry_cluster_free(c);
    free(s);
}
END_TEST

/* Against the definition, read off the header word by word, on random jobs. */
START_TEST(random_jobs)
{
    srandom(seed);
    for (int round = 0; round < 300; round++) {
        int n = 1 + (int)(random() % 200), names = 1 + (int)(random() % n);
        struct ry_seat *s = calloc((unsigned)n, sizeof *s);
        for (int i = 0; i < n; i++) {
            s[i].rank = i;
            snprintf(s[i].node, sizeof s[i].node, "%lx/%d", random() % names * 7919 % names, 5);
        }
        struct ry_cluster *c = ry_cluster_build(s, n, NULL);
        ck_assert_ptr_nonnull(c);
        int seen = 0;
        for (int i = 0; i < n; i++) {
            int lower = 0, first = i;
            for (int j = 0; j < n; j++) {
                bool same = !strcmp(s[i].node, s[j].node);
                if (same != (c->node[i] == c->node[j])) /* an assertion takes long, and there are millions */
                    ck_abort_msg("round %d: ranks %d and %d", round, i, j);
                lower += same && j < i;
                first = same && j < first ? j : first;
            }
            ck_assert_int_eq(c->local[i], lower);
            if (first == i)
                ck_assert_int_eq(c->node[i], seen++);
            ck_assert_int_eq(c->node_first[c->node[i]], first);
        }
        ck_assert_int_eq(c->nnodes, seen);
        int total = 0;
        for (int k = 0; k < c->nnodes; k++) {
            int ranks = 0;
            for (int i = 0; i < n; i++)
                ranks += c->node[i] == k;
            ck_assert_int_eq(c->node_size[k], ranks);
            total += ranks;
        }
        ck_assert_int_eq(total, n);
        ry_cluster_free(c);
        free(s);
    }
}
END_TEST

START_TEST(identity)
{
    char a[64], b[64], host[256] = "";
    unsetenv("NCCL_HOSTID");
    ry_node_identity(a);
    ry_node_identity(b);
    ck_assert_str_eq(a, b);
    gethostname(host, sizeof host - 1);
    ck_assert_msg(strlen(a) > 0, "no identity");
    if (strlen(host) < 26) /* the boot id takes 36, the slash 1 */
        ck_assert_msg(strstr(a, host) != NULL, "'%s' lacks the host name '%s'", a, host);

    setenv("NCCL_HOSTID", "rack7-virtual-3", 1);
    ry_node_identity(b);
    ck_assert_str_eq(b, "rack7-virtual-3");
    setenv("NCCL_HOSTID", "", 1);
    ry_node_identity(b);
    ck_assert_str_eq(a, b);
}
END_TEST

START_TEST(long_identity)
{
    char id[200], a[64], b[64];
    for (size_t n = 60; n < 70; n++) {
        memset(id, 'h', n);
        id[n] = 0;
        setenv("NCCL_HOSTID", id, 1);
        ry_node_identity(a);
        ck_assert_uint_eq(strlen(a), 63 < n ? 63 : n);
        if (n < 64)
            ck_assert_str_eq(a, id);
    }
    memset(id, 'h', 199);
    id[199] = 0;
    setenv("NCCL_HOSTID", id, 1);
    ry_node_identity(a);
    ry_node_identity(b);
    ck_assert_str_eq(a, b);
    id[198] = 'i'; /* differs only where it is cut */
    setenv("NCCL_HOSTID", id, 1);
    ry_node_identity(b);
    ck_assert_str_ne(a, b);
}
END_TEST

int main(void)
{
    const char *set = getenv("RY_TEST_SEED");
    seed = set ? (unsigned)strtoul(set, NULL, 0) : (unsigned)time(NULL);
    printf("RY_TEST_SEED=%u\n", seed);
    Suite *suite = suite_create("cluster");
    TCase *t = tcase_create("cluster");
    tcase_add_test(t, shapes);
    tcase_add_test(t, sizes_and_firsts);
    tcase_add_test(t, wrong_seats);
    tcase_add_test(t, unterminated_texts);
    tcase_add_test(t, random_jobs);
    tcase_add_test(t, identity);
    tcase_add_test(t, long_identity);
    tcase_set_timeout(t, 60);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
