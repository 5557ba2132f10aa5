/*
 * test_calibrate.c: calibration against a simulated cluster whose true cost model is known, with noise and with points
 * that are far off; patterns on clusters of any shape; the fit by itself.
 */
#include <check.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "measure/calibrate.h"

static unsigned seed;

static double uniform(double low, double high)
{
    return low + (high - low) * rand() / RAND_MAX;
}

static struct ry_cluster *cluster_of(const int *nodes, int n)
{
    struct ry_err err = {""};
    struct ry_seat *s = calloc((size_t)n, sizeof *s);
    for (int i = 0; i < n; i++) {
        s[i].version = RY_SEAT_VERSION;
        s[i].rank = i;
        snprintf(s[i].node, sizeof s[i].node, "n%d", nodes[i]);
    }
    struct ry_cluster *c = ry_cluster_build(s, n, &err);
    ck_assert_msg(c != NULL, "%s", err.msg);
    free(s);
    return c;
}

static struct ry_cluster *regular(int nodes, int size)
{
    int at[256];
    for (int i = 0; i < nodes * size; i++)
        at[i] = i / size;
    return cluster_of(at, nodes * size);
}

/* ---- the simulated cluster ---- */

struct world {
    struct ry_cost_model truth;
    const struct ry_cluster *cluster;
    double noise; /* up to so much longer */
    double wild;  /* share of the measurements that take ten times as long */
    double spent_us;
    int calls, fail_at;
};

/* Worked out from the messages alone, apart from the code under test: bytes and messages of the busiest rank and NIC.
 */
static double true_us(const struct world *w, const struct ry_cal_point *p)
{
    const struct ry_cost_model over = ry_cost_over_ucx(&w->truth), *m = p->kind == RY_CAL_UCX_ONE || p->kind == RY_CAL_UCX_ALL ? &over : &w->truth;
    const struct ry_cluster *c = w->cluster;
    static struct ry_cal_message list[1 << 16];
    double rank[256][2][RY_LINKS] = {0}, count[256][2][RY_LINKS] = {0}, node[256][2] = {0}, most = 0;
    if (p->kind == RY_CAL_COPY)
        return m->copy_us + (double)p->bytes / m->copy_bytes_per_us;
    size_t n = ry_cal_messages(c, p, -1, list, sizeof list / sizeof *list);
    ck_assert_uint_le(n, sizeof list / sizeof *list);
    for (size_t i = 0; i < n; i++) {
        int from = list[i].from, to = list[i].to;
        int link = from == to                     ? RY_LINK_SELF
                   : c->node[from] != c->node[to] ? RY_LINK_NIC
                   : p->kind == RY_CAL_NODE       ? RY_LINK_NODE
                                                  : RY_LINK_LOCAL;
        double bytes = (double)list[i].bytes;
        rank[from][0][link] += bytes;
        rank[to][1][link] += bytes;
        count[from][0][link]++;
        count[to][1][link]++;
        if (link == RY_LINK_NIC) {
            node[c->node[from]][0] += bytes;
            node[c->node[to]][1] += bytes;
        }
    }
    for (int r = 0; r < c->nranks; r++)
        for (int way = 0; way < 2; way++)
            for (int l = 0; l < RY_LINKS; l++) {
                if (!count[r][way][l])
                    continue;
                double us = rank[r][way][l] / m->link[l].bytes_per_us;
                if (l == RY_LINK_NIC)
                    us = fmax(node[c->node[r]][way] / m->link[l].bytes_per_us,
                              rank[r][way][l] / m->nic_rank_bytes_per_us);
                most = fmax(most, us + m->link[l].alpha_us + count[r][way][l] * m->link[l].message_us);
            }
    return m->group_us + most;
}

static int simulate(void *context, const struct ry_cal_point *point, int rounds, double *us, struct ry_err *err)
{
    struct world *w = context;
    if (++w->calls == w->fail_at)
        return ry_fail(err, "the simulated NCCL fails at call %d", w->calls);
    *us = true_us(w, point) * (1 + uniform(0, w->noise)) * (uniform(0, 1) < w->wild ? 10 : 1);
    w->spent_us += *us * rounds;
    return 0;
}

static double log_uniform(double low, double high)
{
    return exp(uniform(log(low), log(high)));
}

static struct ry_cost_model random_truth(void)
{
    struct ry_cost_model m = {
        .link = {[RY_LINK_SELF] = {0, log_uniform(20e3, 1e6), uniform(0.1, 3), false},
                 [RY_LINK_LOCAL] = {uniform(1, 20), log_uniform(5e3, 400e3), uniform(0.3, 5), false},
                 [RY_LINK_NODE] = {uniform(1, 20), log_uniform(5e3, 400e3), uniform(0.3, 5), false},
                 [RY_LINK_NIC] = {uniform(5, 200), log_uniform(1e3, 100e3), uniform(1, 30), false}},
        .copy_us = uniform(1, 5),
        .copy_bytes_per_us = log_uniform(100e3, 2e6),
        .group_us = uniform(5, 30),
    };
    m.nic_rank_bytes_per_us = m.link[RY_LINK_NIC].bytes_per_us * uniform(0.3, 1);
    m.ucx = (struct ry_cost_link){uniform(5, 200), log_uniform(1e3, 100e3), uniform(1, 30), false};
    m.ucx_rank_bytes_per_us = m.ucx.bytes_per_us * uniform(0.3, 1);
    return m;
}

static void within(double got, double truth, double factor, const char *what)
{
    ck_assert_msg(got > truth / factor && got < truth * factor, "seed %u: %s is %.4g, in truth %.4g", seed, what, got,
                  truth);
}

/* 64 messages tell it from the noise of what one takes. */
static void message_near(const struct ry_cost_model *m, const struct ry_cost_model *truth, enum ry_link link)
{
    double got = m->link[link].message_us, is = truth->link[link].message_us;
    double noise = 0.1 * (truth->group_us + truth->link[link].alpha_us) / 64;
    ck_assert_msg(fabs(got - is) < 0.25 * is + 2 * noise, "seed %u: a message over %s is %.3f us, in truth %.3f", seed,
                  ry_link_name(link), got, is);
}

START_TEST(finds_the_truth)
{
    static const int shapes[][2] = {{2, 2}, {2, 8}, {4, 4}, {3, 1}, {1, 8}, {8, 2}};
    for (int round = 0; round < 60; round++) {
        const int *shape = shapes[round % 6];
        bool node_comm = round % 4 < 2; /* else NCCL is too old to make one */
        bool ucx = round % 3 != 1;
        struct ry_err err = {""};
        struct world w = {.truth = random_truth(), .noise = 0.1, .wild = 0.05, .cluster = regular(shape[0], shape[1])};
        struct ry_calibration *cal = calloc(1, sizeof *cal);
        const struct ry_cal_runner runner = {&w, simulate, node_comm, ucx};
        struct ry_cost_model guess;
        ry_cost_guess(&guess, w.cluster);
        ck_assert_msg(!ry_calibrate(cal, w.cluster, &runner, 5, &err), "%s", err.msg);
        const struct ry_cost_model *m = &cal->model, *t = &w.truth;
        ck_assert(m->measured && m->link[RY_LINK_SELF].measured);
        within(m->link[RY_LINK_SELF].bytes_per_us, t->link[RY_LINK_SELF].bytes_per_us, 1.15, "self bandwidth");
        within(m->copy_bytes_per_us, t->copy_bytes_per_us, 1.15, "copy bandwidth");
        within(m->group_us, t->group_us, 1.25, "group");
        if (shape[1] > 1) {
            within(m->link[RY_LINK_LOCAL].bytes_per_us, t->link[RY_LINK_LOCAL].bytes_per_us, 1.15, "local bandwidth");
            within(m->group_us + m->link[RY_LINK_LOCAL].alpha_us + m->link[RY_LINK_LOCAL].message_us,
                   t->group_us + t->link[RY_LINK_LOCAL].alpha_us + t->link[RY_LINK_LOCAL].message_us, 1.2,
                   "local latency");
            message_near(m, t, RY_LINK_LOCAL);
        }
        bool node = shape[0] > 1 && shape[1] > 1 && node_comm;
        ck_assert(m->link[RY_LINK_NODE].measured == node && !m->node_comm);
        ck_assert((cal->fit[RY_CAL_NODE].points > 0) == node);
        if (node) {
            within(m->link[RY_LINK_NODE].bytes_per_us, t->link[RY_LINK_NODE].bytes_per_us, 1.15, "node bandwidth");
            within(m->group_us + m->link[RY_LINK_NODE].alpha_us + m->link[RY_LINK_NODE].message_us,
                   t->group_us + t->link[RY_LINK_NODE].alpha_us + t->link[RY_LINK_NODE].message_us, 1.2,
                   "node latency");
            message_near(m, t, RY_LINK_NODE);
        } else { /* no better than what is known */
            ck_assert(m->link[RY_LINK_NODE].bytes_per_us == m->link[RY_LINK_LOCAL].bytes_per_us &&
                      m->link[RY_LINK_NODE].alpha_us == m->link[RY_LINK_LOCAL].alpha_us);
        }
        if (shape[0] > 1) {
            within(m->nic_rank_bytes_per_us, t->nic_rank_bytes_per_us, 1.15, "NIC bandwidth of a rank");
            /* a node whose ranks together cannot fill the NIC does not show what it could do */
            double shown = fmin(t->link[RY_LINK_NIC].bytes_per_us, shape[1] * t->nic_rank_bytes_per_us);
            within(m->link[RY_LINK_NIC].bytes_per_us, shown, 1.15, "NIC bandwidth");
            within(m->group_us + m->link[RY_LINK_NIC].alpha_us + m->link[RY_LINK_NIC].message_us,
                   t->group_us + t->link[RY_LINK_NIC].alpha_us + t->link[RY_LINK_NIC].message_us, 1.2, "NIC latency");
            message_near(m, t, RY_LINK_NIC);
        }
        ck_assert(m->ucx.measured == (ucx && shape[0] > 1));
        ck_assert((cal->fit[RY_CAL_UCX_ONE].points > 0) == m->ucx.measured);
        if (m->ucx.measured) {
            within(m->ucx_rank_bytes_per_us, t->ucx_rank_bytes_per_us, 1.15, "bandwidth of a rank over UCX");
            within(m->ucx.bytes_per_us, fmin(t->ucx.bytes_per_us, shape[1] * t->ucx_rank_bytes_per_us), 1.15, "bandwidth over UCX");
            within(m->group_us + m->ucx.alpha_us + m->ucx.message_us, t->group_us + t->ucx.alpha_us + t->ucx.message_us, 1.2,
                   "latency over UCX");
        } else {
            ck_assert(m->ucx.bytes_per_us == m->link[RY_LINK_NIC].bytes_per_us);
        }
        /* links that are not there keep the guess and say so */
        ck_assert(m->link[RY_LINK_LOCAL].measured == (shape[1] > 1) && m->link[RY_LINK_NIC].measured == (shape[0] > 1));
        if (shape[1] == 1)
            ck_assert(m->link[RY_LINK_LOCAL].bytes_per_us == guess.link[RY_LINK_LOCAL].bytes_per_us);
        if (shape[0] == 1)
            ck_assert(m->link[RY_LINK_NIC].bytes_per_us == guess.link[RY_LINK_NIC].bytes_per_us &&
                      m->nic_rank_bytes_per_us == guess.nic_rank_bytes_per_us);
        for (int k = 0; k < RY_CAL_KINDS; k++)
            ck_assert_msg(cal->fit[k].median < 0.15, "seed %u: %s fits by %.2f", seed, ry_cal_name((enum ry_cal_kind)k),
                          cal->fit[k].median);
        ck_assert_msg(w.spent_us < 8e6, "%.1f s of simulated time instead of 5", w.spent_us / 1e6);
        free(cal);
        ry_cluster_free((struct ry_cluster *)w.cluster);
    }
}
END_TEST

/* A slow network: large sizes are left out, and the time is kept. */
START_TEST(slow_links)
{
    struct ry_err err = {""};
    struct world w = {.truth = random_truth(), .noise = 0.1, .cluster = regular(2, 4)};
    w.truth.link[RY_LINK_NIC].bytes_per_us = w.truth.nic_rank_bytes_per_us = 10; /* 10 MB/s */
    struct ry_calibration *cal = calloc(1, sizeof *cal);
    const struct ry_cal_runner runner = {&w, simulate, true, false};
    ck_assert(!ry_calibrate(cal, w.cluster, &runner, 2, &err));
    within(cal->model.link[RY_LINK_NIC].bytes_per_us, 10, 1.15, "bandwidth");
    ck_assert_msg(w.spent_us < 4e6, "%.1f s", w.spent_us / 1e6);
    ck_assert_int_lt(cal->fit[RY_CAL_NIC_ALL].points, 16);
    /* a failed call ends it, wherever it comes */
    int calls = w.calls;
    for (w.fail_at = 1; w.fail_at < calls; w.fail_at += 1 + calls / 20) {
        w.calls = 0;
        *err.msg = 0;
        ck_assert_int_eq(ry_calibrate(cal, w.cluster, &runner, 2, &err), -1);
        ck_assert_msg(strstr(err.msg, "the simulated NCCL fails") != NULL, "%s", err.msg);
    }
    free(cal);
    ry_cluster_free((struct ry_cluster *)w.cluster);
}
END_TEST

/* Both sides of each pair must see the same messages in the same order, on any cluster; and take the links that they
 * name. */
START_TEST(patterns)
{
    static struct ry_cal_message all[1 << 15], of[2][1 << 15];
    for (int round = 0; round < 200; round++) {
        int at[12], n = 1 + rand() % 12, nodes = 1 + rand() % n;
        for (int i = 0; i < n; i++)
            at[i] = rand() % nodes;
        struct ry_cluster *c = cluster_of(at, n);
        struct ry_cal_point p = {
            .kind = (enum ry_cal_kind)(rand() % RY_CAL_KINDS), .bytes = 65536, .messages = rand() % 20};
        size_t total = ry_cal_messages(c, &p, -1, all, 1 << 15);
        ck_assert_uint_eq(total, ry_cal_messages(c, &p, -1, NULL, 0));
        for (int a = 0; a < n; a++) {
            int b = rand() % n;
            size_t count[2] = {ry_cal_messages(c, &p, a, of[0], 1 << 15), ry_cal_messages(c, &p, b, of[1], 1 << 15)},
                   i = 0;
            for (size_t k = 0; k < count[0]; k++) { /* a's messages to b are b's from a, in this order */
                if (of[0][k].from != a || of[0][k].to != b)
                    continue;
                while (i < count[1] && (of[1][i].from != a || of[1][i].to != b))
                    i++;
                ck_assert(i < count[1] && of[1][i].bytes == of[0][k].bytes);
                i++;
            }
            for (; i < count[1]; i++)
                ck_assert(of[1][i].from != a || of[1][i].to != b);
        }
        for (size_t k = 0; k < total; k++) {
            bool same = all[k].from == all[k].to, node = c->node[all[k].from] == c->node[all[k].to];
            ck_assert_uint_gt(all[k].bytes, 0);
            ck_assert(p.kind != RY_CAL_SELF || same);
            ck_assert((p.kind != RY_CAL_PAIR && p.kind != RY_CAL_LOCAL && p.kind != RY_CAL_NODE) || (node && !same));
            ck_assert((p.kind != RY_CAL_NIC_ONE && p.kind != RY_CAL_NIC_ALL) || !node);
            ck_assert(p.kind != RY_CAL_NIC_ONE || c->local[all[k].from] == 0);
        }
        ry_cluster_free(c);
    }
}
END_TEST

START_TEST(fit)
{
    double x[10], t[10], a, b;
    for (int i = 0; i < 10; i++) {
        x[i] = 1024 * pow(4, i);
        t[i] = 20 + x[i] / 5000;
    }
    ry_cal_fit(10, x, t, &a, &b);
    ck_assert(fabs(a - 20) < 1e-6 && fabs(b * 5000 - 1) < 1e-6);
    t[4] *= 5; /* one point far off does not bend the line */
    ry_cal_fit(10, x, t, &a, &b);
    ck_assert_msg(fabs(a - 20) < 3 && fabs(b * 5000 - 1) < 0.15, "a %f, 1/b %f", a, 1 / b);
    for (int i = 0; i < 10; i++)
        t[i] = x[i] > 100000 ? (x[i] - 100000) / 5000 : 0.01; /* would begin below zero */
    ry_cal_fit(10, x, t, &a, &b);
    ck_assert(a >= 0 && b >= 0 && isfinite(a) && isfinite(b));
    for (int i = 0; i < 10; i++)
        t[i] = 100 - 5 * i; /* would fall */
    ry_cal_fit(10, x, t, &a, &b);
    ck_assert(b == 0 && a > 50 && a < 100);
    ry_cal_fit(1, x, t, &a, &b);
    ck_assert(b == 0 && fabs(a - 100) < 1e-9);
}
END_TEST

int main(void)
{
    const char *given = getenv("RY_TEST_SEED");
    seed = given ? (unsigned)strtoul(given, NULL, 0) : (unsigned)(time(NULL) ^ getpid());
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("RY_TEST_SEED=%u\n", seed);
    srand(seed);
    Suite *s = suite_create("calibrate");
    TCase *t = tcase_create("all");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, fit);
    tcase_add_test(t, patterns);
    tcase_add_test(t, finds_the_truth);
    tcase_add_test(t, slow_links);
    suite_add_tcase(s, t);
    SRunner *run = srunner_create(s);
    srunner_run_all(run, CK_NORMAL);
    int failed = srunner_ntests_failed(run);
    srunner_free(run);
    return failed != 0;
}
