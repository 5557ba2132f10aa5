/*
 * test_twin_find.c: cards of twin communicators, of several processes: who is found, who is not, and what is left of
 * processes that died.
 */
#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/twin_find.h"

static char folder[64];

static void set_up(void)
{
    strcpy(folder, "/tmp/railyard-twins-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(folder));
    rmdir(folder); /* the first card makes it */
    ry_twin_folder(folder);
}

static void tear_down(void)
{
    char command[100];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    ck_assert_int_eq(system(command), 0);
}

/* Ranks on the nodes that letters say. */
static struct ry_cluster *map_of(const char *nodes, uint32_t settings)
{
    struct ry_seat seats[16];
    struct ry_err err;
    memset(seats, 0, sizeof seats);
    for (int r = 0; nodes[r]; r++) {
        seats[r].rank = r;
        seats[r].settings_hash = settings;
        snprintf(seats[r].node, sizeof seats[r].node, "node %c", nodes[r]);
    }
    return ry_cluster_build(seats, (int)strlen(nodes), &err);
}

struct helper {
    pid_t pid;
    int to[2], from[2];
};

/* A process that puts up cards, and takes them down when told. */
static struct helper another(const char *nodes, int rank, uint64_t key, uint32_t settings, int before)
{
    struct helper h;
    char c = 0;
    ck_assert(!pipe(h.to) && !pipe(h.from));
    h.pid = fork();
    if (!h.pid) {
        struct ry_err err;
        struct ry_cluster *map = map_of(nodes, settings);
        char address[32];
        close(h.to[1]); /* so that it hears of the test's end */
        snprintf(address, sizeof address, "address of %d", (int)key);
        for (int i = 0; i < before; i++) /* of that kind, and gone again */
            ry_twin_card_free(ry_twin_card_new(map, rank, 1000 + (uint64_t)i, address, sizeof address, &err));
        struct ry_twin_card *card = ry_twin_card_new(map, rank, key, address, sizeof address, &err);
        if (!card || write(h.from[1], "c", 1) != 1 || read(h.to[0], &c, 1) != 1)
            _exit(1);
        ry_twin_card_free(card);
        _exit(write(h.from[1], "d", 1) != 1);
    }
    ck_assert_int_eq(read(h.from[0], &c, 1), 1);
    return h;
}

static void ends(struct helper *h)
{
    char c;
    ck_assert(write(h->to[1], "x", 1) == 1 && read(h->from[0], &c, 1) == 1);
    waitpid(h->pid, NULL, 0);
}

static void dies(struct helper *h)
{
    kill(h->pid, SIGKILL);
    waitpid(h->pid, NULL, 0);
}

static int found(const struct ry_twin_card *card, struct ry_twin_found *f)
{
    ry_twin_look(card, f);
    return f->n;
}

static int files(void)
{
    int n = 0;
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));)
        n += e->d_name[0] != '.';
    if (d)
        closedir(d);
    return n;
}

START_TEST(come_and_go)
{
    static struct ry_twin_found f;
    struct ry_err err;
    struct ry_cluster *map = map_of("ab", 7);
    /* Forked before this process counts a card of its own. */
    struct helper high = another("ab", 1, 90, 7, 0), low = another("ab", 1, 20, 7, 0);
    struct ry_twin_card *own = ry_twin_card_new(map, 1, 50, "own", 4, &err);
    ck_assert_msg(own != NULL, "%s", err.msg);
    ck_assert_int_eq(found(own, &f), 3);
    ck_assert(f.key[0] == 20 && f.key[1] == 50 && f.key[2] == 90);
    ck_assert_str_eq(f.first, "address of 20");
    ck_assert_uint_eq(f.first_size, 32);
    ends(&low);
    ck_assert_int_eq(found(own, &f), 2);
    ck_assert_str_eq(f.first, "own");
    ck_assert_int_eq(files(), 2);
    dies(&high);
    ck_assert_int_eq(files(), 2);
    ck_assert_int_eq(found(own, &f), 1);
    ck_assert_uint_eq(f.key[0], 50);
    ck_assert_int_eq(files(), 1); /* what it left is gone */
    ry_twin_card_free(own);
    struct stat st;
    ck_assert_int_eq(stat(folder, &st), -1); /* with the last */
    ry_cluster_free(map);
}
END_TEST

/* A child of a process that died keeps nothing of it alive. */
START_TEST(forked)
{
    static struct ry_twin_found f;
    struct ry_err err;
    struct ry_cluster *map = map_of("ab", 7);
    struct ry_twin_card *own = ry_twin_card_new(map, 0, 50, "", 0, &err);
    int tie[2], up[2];
    char c;
    ck_assert(!pipe(tie) && !pipe(up));
    pid_t pid = fork();
    if (!pid) {
        struct ry_twin_card *card = ry_twin_card_new(map, 0, 60, "", 0, &err);
        close(tie[1]);
        if (!fork()) { /* a data loader */
            ck_assert_int_eq(read(tie[0], &c, 1), 0);
            _exit(0);
        }
        _exit(!card || write(up[1], "u", 1) != 1 || (pause(), 0));
    }
    ck_assert_int_eq(read(up[0], &c, 1), 1);
    /* its card has another number than ours: the kind was counted here before the fork */
    ck_assert_int_eq(found(own, &f), 1);
    struct ry_twin_card *second = ry_twin_card_new(map, 0, 51, "", 0, &err);
    ck_assert_int_eq(found(second, &f), 2);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    ck_assert_int_eq(found(second, &f), 1);
    close(tie[1]);
    ry_twin_card_free(second);
    ry_twin_card_free(own);
    ry_cluster_free(map);
}
END_TEST

/* Other nodes, position, settings, job; the second of a kind; one's own. */
START_TEST(not_twins)
{
    static struct ry_twin_found f;
    struct ry_err err;
    struct ry_cluster *map = map_of("aabb", 7);
    struct helper others[] = {another("abab", 1, 11, 7, 0), another("aabb", 0, 12, 7, 0), another("aabb", 1, 13, 8, 0),
                              another("aab", 1, 14, 7, 0), another("aabb", 1, 15, 7, 1)};
    setenv("MASTER_PORT", "1234", 1);
    struct helper job = another("aabb", 1, 16, 7, 0);
    unsetenv("MASTER_PORT");
    struct ry_twin_card *own = ry_twin_card_new(map, 1, 50, "", 0, &err),
                        *second = ry_twin_card_new(map, 1, 51, "", 0, &err);
    ck_assert_int_eq(found(own, &f), 1);
    ck_assert_int_eq(found(second, &f), 2); /* the other process's second */
    ck_assert(f.key[0] == 15 && f.key[1] == 51);
    ck_assert_int_eq(found(own, &f), 1); /* and looking takes nothing down */
    struct helper last = another("aabb", 1, 17, 7, 0);
    (void)last;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        ends(&others[i]);
    ends(&job);
    ends(&last);
    ry_twin_card_free(second);
    ry_twin_card_free(own);
    ry_cluster_free(map);
}
END_TEST

/* What others left is swept away by whoever comes next, of whatever kind; what is being made is not; nor is anything
 * that is no card. */
START_TEST(swept)
{
    struct ry_err err;
    struct ry_cluster *map = map_of("ab", 7);
    struct helper dead = another("abc", 2, 60, 9, 0), alive = another("abcd", 2, 61, 9, 0);
    char path[300];
    static const char *const others[] = {"notes", "0000000000000001.0.0000000000000002.99999999.new",
                                         "0000000000000001.0.x.99999999"};
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, others[i]);
        close(open(path, O_CREAT | O_WRONLY, 0600));
    }
    dies(&dead);
    ck_assert_int_eq(files(), 5);
    struct ry_twin_card *own = ry_twin_card_new(map, 0, 50, "", 0, &err);
    ck_assert_int_eq(files(), 5); /* one gone, one come */
    ck_assert_int_eq(utimes(path, NULL), 0);
    snprintf(path, sizeof path, "%s/%s", folder, others[1]);
    ck_assert_int_eq(utimes(path, (struct timeval[2]){{0, 0}, {0, 0}}), 0); /* an old one */
    struct ry_twin_card *second = ry_twin_card_new(map, 1, 51, "", 0, &err);
    ck_assert_int_eq(files(), 5);
    ends(&alive);
    ry_twin_card_free(second);
    ry_twin_card_free(own);
    ck_assert_int_eq(files(), 2);
    ck_assert_int_eq(chmod(folder, 0777), 0);
    ck_assert_ptr_null(ry_twin_card_new(map, 0, 50, "", 0, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "only this user"));
    ry_cluster_free(map);
}
END_TEST

/* Files that are no cards, and cards that nobody could have written. */
START_TEST(rubbish)
{
    static struct ry_twin_found f;
    struct ry_err err;
    struct ry_cluster *map = map_of("ab", 7);
    struct helper twin = another("ab", 0, 60, 7, 0);
    struct ry_twin_card *own = ry_twin_card_new(map, 0, 50, "", 0, &err);
    char name[64] = "", path[300];
    DIR *d = opendir(folder);
    for (struct dirent *e; (e = readdir(d));)
        if (strstr(e->d_name, "000000000000003c")) /* 60 */
            snprintf(name, sizeof name, "%.*s", 19, e->d_name);
    closedir(d);
    ck_assert_int_eq(found(own, &f), 2);
    static const char *const odd[] = {
        "", "x", "000000000000003d", "000000000000003d.1.2", "zz.1", "000000000000003d.99999999"};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        snprintf(path, sizeof path, "%s/%s%s", folder, name, odd[i]);
        int fd = open(path, O_CREAT | O_WRONLY, 0600);
        ck_assert_int_ge(fd, 0);
        close(fd);
        ck_assert_int_eq(found(own, &f), 2);
    }
    ck_assert_ptr_null(ry_twin_card_new(map, 0, 1, path, RY_TWIN_ADDRESS + 1, &err));
    ends(&twin);
    ry_twin_card_free(own);
    ry_twin_folder("/proc/nowhere");
    ck_assert_ptr_null(ry_twin_card_new(map, 0, 50, "", 0, &err));
    ck_assert_ptr_nonnull(strstr(err.msg, "/proc/nowhere"));
    ry_cluster_free(map);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("twin_find");
    TCase *t = tcase_create("twin_find");
    tcase_add_checked_fixture(t, set_up, tear_down);
    tcase_add_test(t, come_and_go);
    tcase_add_test(t, forked);
    tcase_add_test(t, not_twins);
    tcase_add_test(t, rubbish);
    tcase_add_test(t, swept);
    tcase_set_timeout(t, 60);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
