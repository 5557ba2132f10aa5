/* test_agree.c: agreement, one situation at a time. Random schedules: test_agree_random.c; all schedules of a small
 * model: tests/model. */
#include <malloc.h>
#include <stdio.h>
#include <time.h>

#include "agree_world.h"

#define PATIENCE 8000

static struct world w;

static void open_world(int n)
{
    world_open(&w, n, 0, 4, PATIENCE);
}
static void teardown(void)
{
    world_close(&w);
}

static struct ry_yard_counts counts(void)
{
    struct ry_yard_counts c;
    ry_yard_counts(w.yard, &c);
    return c;
}

/* One exchange on every rank, mail delivered in between; all must go direct. */
static void observe_once(void)
{
    for (int r = 0; r < w.n; r++) {
        ck_assert_int_eq(world_exchange(&w, r, NULL), RY_GO_DIRECT);
        world_flush(&w);
    }
}

/* Up to where the next exchange of every rank is m; returns it. */
static uint64_t engage(void)
{
    for (int i = 0; i < 1000 && !ry_agree_hold(w.rank[0]); i++)
        observe_once();
    uint64_t m = w.next[0] + 4; /* the yardmaster puts it that far beyond what has begun */
    while (w.next[0] < m)
        observe_once();
    for (int r = 0; r < w.n; r++) {
        ck_assert(ry_agree_hold(w.rank[r]));
        ck_assert_uint_eq(w.next[r], m);
    }
    return m;
}

static void wait_all(void)
{
    for (int r = 0; r < w.n; r++)
        ck_assert_int_eq(world_exchange(&w, r, NULL), RY_WAIT_VERDICT);
}

static struct ry_verdict verdict(int r)
{
    struct ry_verdict v;
    ck_assert_msg(ry_agree_verdict(w.rank[r], &v), "rank %d still waits", r);
    ck_assert_uint_eq(v.number, w.next[r] - 1);
    return v;
}
static bool waits(int r)
{
    struct ry_verdict v;
    return !ry_agree_verdict(w.rank[r], &v);
}
/* Rank r is answered: direct, and (over) observes again. */
static void direct(int r, bool over, enum ry_agree_reason why)
{
    struct ry_verdict v = verdict(r);
    ck_assert_int_eq(v.strategy, 0);
    ck_assert_int_eq(v.last, over);
    ck_assert_str_eq(v.reason, ry_agree_why(why));
    if (why != RY_WHY_CHOSEN) /* otherwise the policy may have something to say with it */
        ck_assert_ptr_null(v.extra);
    ck_assert_int_eq(ry_agree_hold(w.rank[r]), !over);
}
static void agreed(int r)
{
    struct ry_verdict v = verdict(r);
    ck_assert_msg(v.strategy == 1, "rank %d goes direct: %s", r, v.reason);
    ck_assert_str_eq(v.reason, "");
    ck_assert_uint_eq(v.extra_bytes, 24);
    const uint64_t *note = v.extra;
    ck_assert_uint_eq(note[0], v.number);
    ck_assert_uint_eq(note[1], (uint64_t)r);
}
static void one_agreed(void)
{
    wait_all();
    world_flush(&w);
    for (int r = 0; r < w.n; r++)
        agreed(r);
}

START_TEST(engages_decides_and_stops)
{
    open_world(4);
    w.lean.verify = true;
    engage();
    for (int i = 0; i < 20; i++) {
        uint64_t send[4][4], recv[4][4];
        for (int r = 0; r < 4; r++)
            for (int p = 0; p < 4; p++)
                send[r][p] = recv[p][r] = (uint64_t)(i * 100 + r * 10 + p);
        uint64_t x = w.next[0];
        for (int r = 0; r < 4; r++) {
            struct ry_manifest m = {.type = 9, .ordinal = x, .send = send[r], .recv = recv[r]};
            w.now += 10;
            ck_assert_int_eq(world_exchange(&w, r, &m), RY_WAIT_VERDICT);
            ck_assert(waits(r));
            world_flush(&w);
        }
        for (int r = 0; r < 4; r++) {
            struct ry_verdict v = verdict(r);
            agreed(r);
            ck_assert(v.verify && !v.last);
            ck_assert_uint_eq(v.waited_ns, (uint64_t)(30 - 10 * r));
            ck_assert_uint_eq(((const uint64_t *)v.extra)[2], send[(r + 1) % 4][r]);
            for (int p = 0; p < 4; p++)
                ck_assert_uint_eq(w.lean.matrix[r * 4 + p], send[r][p]);
        }
    }
    ck_assert_uint_eq(counts().verdicts, 20);
    ck_assert_uint_eq(counts().gather_ns, 20 * 30);
    ck_assert_uint_eq(counts().gather_most_ns, 30);
    w.lean.last = true;
    wait_all();
    world_flush(&w);
    for (int r = 0; r < 4; r++) {
        agreed(r);
        ck_assert(verdict(r).last && !ry_agree_hold(w.rank[r]));
    }
    w.lean.last = false;
    engage(); /* nothing was bad about that, so it comes back */
    one_agreed();
    ck_assert_uint_eq(counts().commits, 2);
    ck_assert_uint_eq(counts().aborts, 0);
}
END_TEST

/* The policy wants some to pass by: it is not asked sooner, then it is, and no sooner than usual where it names few. */
START_TEST(passes_by_for_a_while)
{
    for (int i = 0; i < 2; i++) {
        open_world(4);
        engage();
        w.lean.last = true;
        w.lean.rest = i ? 20 : 0;
        wait_all();
        world_flush(&w);
        w.lean.last = false;
        int asked = w.lean.asked, passed = 0;
        for (; w.lean.asked == asked && passed < 100; passed++) {
            for (int r = 0; r < 4; r++) {
                uint64_t none[4] = {0};
                struct ry_manifest m = {.type = 9, .ordinal = w.next[r], .send = none, .recv = none};
                ck_assert_int_eq(world_exchange(&w, r, &m), RY_GO_DIRECT);
            }
            world_flush(&w);
        }
        ck_assert_int_eq(passed, i ? 21 : 4);
        if (!i)
            world_close(&w);
    }
}
END_TEST

START_TEST(policy_says_direct)
{
    open_world(3);
    engage();
    w.lean.strategy = 0;
    wait_all();
    world_flush(&w);
    for (int r = 0; r < 3; r++)
        direct(r, false, RY_WHY_CHOSEN);
    w.lean.strategy = 1;
    one_agreed();
}
END_TEST

START_TEST(not_worth_while_is_asked_ever_more_rarely)
{
    open_world(3);
    w.lean.worth = false;
    for (int i = 0; i < 10000; i++)
        observe_once();
    ck_assert_uint_eq(counts().proposals, 0);
    ck_assert_int_gt(w.lean.asked, 15);
    ck_assert_int_lt(w.lean.asked, 30);
    ck_assert_int_lt(w.sent_to_yard, 3 * 30);
    w.lean.worth = true;
    engage();
    one_agreed();
}
END_TEST

/* A star, a pipeline: one rank alone has exchanges, the others none. */
START_TEST(one_rank_alone_costs_next_to_nothing)
{
    open_world(3);
    for (int i = 0; i < 10000; i++) {
        ck_assert_int_eq(world_exchange(&w, 1, NULL), RY_GO_DIRECT);
        world_flush(&w);
    }
    ck_assert_int_lt(w.sent_to_yard, 30);
    ck_assert_uint_eq(counts().proposals, 0);
}
END_TEST

/* A rank that is past m refuses, however far it is, and a later m is found. */
START_TEST(ranks_far_apart_engage_beyond_the_first)
{
    open_world(3);
    for (int i = 0; i < 5000; i++)
        ck_assert_int_eq(world_exchange(&w, 2, NULL), RY_GO_DIRECT);
    world_flush(&w);
    for (int i = 0; i < 10000 && !ry_agree_hold(w.rank[0]); i++)
        for (int r = 0; r < 2; r++) {
            ck_assert_int_eq(world_exchange(&w, r, NULL), RY_GO_DIRECT);
            world_flush(&w);
        }
    ck_assert(ry_agree_hold(w.rank[2]));
    for (int r = 0; r < 3; r++)
        while (world_exchange(&w, r, NULL) == RY_GO_DIRECT)
            ;
    world_flush(&w);
    for (int r = 0; r < 3; r++)
        agreed(r);
    ck_assert_uint_ge(w.next[2], 5000);
}
END_TEST

/* PROPOSE crosses exchanges already begun: refused and tried again, while one that promised the first m waits at it. */
START_TEST(refused_while_another_waits_at_m)
{
    open_world(2);
    while (counts().proposals == 0) {
        world_exchange(&w, 0, NULL);
        world_exchange(&w, 1, NULL);
        for (int i = 0; i < w.nmail;) /* proposals stay in the mail */
            if (w.mail[i].to == YARD)
                world_deliver(&w, i, false), i = 0;
            else
                i++;
    }
    for (int i = 0; i < 6; i++) /* rank 1 passes m before it hears of it */
        ck_assert_int_eq(world_exchange(&w, 1, NULL), RY_GO_DIRECT);
    world_deliver(&w, w.mail[0].to == 0 ? 0 : 1, false);
    while (world_exchange(&w, 0, NULL) == RY_GO_DIRECT)
        ;
    ck_assert(waits(0));
    world_flush(&w);
    struct ry_verdict v = verdict(0);
    ck_assert_int_eq(v.strategy, 0);
    ck_assert_str_eq(v.reason, ry_agree_why(RY_WHY_REFUSED));
    ck_assert_uint_eq(counts().aborts, 1);
    for (int r = 0; r < 2; r++) {
        ck_assert(ry_agree_hold(w.rank[r]));
        while (world_exchange(&w, r, NULL) == RY_GO_DIRECT)
            ;
    }
    world_flush(&w);
    agreed(0), agreed(1);
}
END_TEST

/* Manifests of m come before the last promise; nothing is decided without it, and then at once. */
START_TEST(manifest_overtakes_promises)
{
    open_world(3);
    for (int i = 0; counts().proposals == 0; i++)
        for (int r = 0; r < 3; r++) {
            world_exchange(&w, r, NULL);
            while (w.nmail && counts().proposals == 0)
                world_deliver(&w, 0, false);
        }
    for (int i = 0; i < w.nmail;) /* all ranks are told, no answer arrives yet */
        if (w.mail[i].to != YARD)
            world_deliver(&w, i, false);
        else
            i++;
    for (int r = 0; r < 3; r++)
        while (world_exchange(&w, r, NULL) == RY_GO_DIRECT)
            ;
    ck_assert_uint_eq(counts().commits, 0);
    while (w.nmail > 1)
        world_deliver(&w, w.nmail - 1, false); /* latest first */
    world_flush(&w);
    for (int r = 0; r < 3; r++)
        agreed(r);
    ck_assert_uint_eq(counts().commits, 1);
}
END_TEST

START_TEST(proposal_without_answer)
{
    open_world(3);
    while (counts().proposals == 0) {
        for (int r = 0; r < 3; r++)
            world_exchange(&w, r, NULL);
        world_flush_but(&w, 2, false);
    }
    while (world_exchange(&w, 0, NULL) == RY_GO_DIRECT)
        ;
    world_flush_but(&w, 2, false);
    world_pass(&w, PATIENCE - 1);
    ck_assert(waits(0));
    world_pass(&w, 1);
    world_flush_but(&w, 2, false);
    ck_assert(!waits(0));
    direct(0, true, RY_WHY_NO_ANSWER);
    ck_assert_uint_eq(counts().impatient, 1);
    world_flush(&w); /* rank 2 hears of the proposal, and right after that it is over */
    ck_assert(!ry_agree_hold(w.rank[2]));
    while (w.next[2] < w.next[0] + 3)
        ck_assert_int_eq(world_exchange(&w, 2, NULL), RY_GO_DIRECT);
}
END_TEST

START_TEST(late_rank_goes_direct_without_waiting)
{
    open_world(3);
    engage();
    one_agreed();
    ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_WAIT_VERDICT);
    ck_assert_int_eq(world_exchange(&w, 1, NULL), RY_WAIT_VERDICT);
    world_flush(&w);
    world_pass(&w, PATIENCE - 1);
    ck_assert(waits(0) && waits(1));
    world_pass(&w, 1);
    world_flush(&w);
    direct(0, true, RY_WHY_PATIENCE);
    direct(1, true, RY_WHY_PATIENCE);
    ck_assert(!ry_agree_hold(w.rank[2]));
    ck_assert_int_eq(world_exchange(&w, 2, NULL), RY_GO_DIRECT);
    ck_assert_uint_eq(counts().impatient, 1);
    engage();
    one_agreed();
}
END_TEST

/* The same, and it comes there while the END is on its way: its manifest is for nobody, END answers it. */
START_TEST(late_rank_meets_the_end_on_its_way)
{
    open_world(3);
    engage();
    world_exchange(&w, 0, NULL);
    world_exchange(&w, 1, NULL);
    world_flush(&w);
    world_pass(&w, PATIENCE);
    ck_assert_int_eq(world_exchange(&w, 2, NULL), RY_WAIT_VERDICT);
    world_flush_but(&w, 2, false);
    direct(0, true, RY_WHY_PATIENCE);
    ck_assert(waits(2));
    world_flush(&w);
    direct(2, true, RY_WHY_PATIENCE);
    observe_once();
}
END_TEST

START_TEST(not_me_goes_on_and_nobody_waits_for_it)
{
    open_world(3);
    engage();
    struct ry_manifest no = {.not_me = true};
    ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_WAIT_VERDICT);
    world_flush(&w);
    ck_assert_int_eq(world_exchange(&w, 1, &no), RY_GO_DIRECT);
    world_flush(&w);
    direct(0, false, RY_WHY_NOT_ME);
    ck_assert_int_eq(world_exchange(&w, 2, NULL), RY_WAIT_VERDICT); /* later, and answered at once */
    world_flush(&w);
    direct(2, false, RY_WHY_NOT_ME);
    one_agreed();
    ck_assert_uint_eq(counts().not_me, 1);
    for (int r = 0; r < 3; r++) /* all of them: a graph is captured */
        ck_assert_int_eq(world_exchange(&w, r, &no), RY_GO_DIRECT);
    world_flush(&w);
    one_agreed();
    ck_assert_uint_eq(counts().verdicts, 3); /* nobody waited for the captured one */
}
END_TEST

/* The group at m began before the proposal came: its calls are with NCCL already, so "not me", and m is direct for all.
 */
START_TEST(group_begun_before_the_promise_ends_at_m)
{
    open_world(2);
    uint64_t m = engage();
    struct ry_manifest no = {.not_me = true};
    ck_assert_int_eq(world_exchange(&w, 0, &no), RY_GO_DIRECT);
    ck_assert_uint_eq(w.next[0] - 1, m);
    ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_WAIT_VERDICT); /* already at m + 1 */
    ck_assert_int_eq(world_exchange(&w, 1, NULL), RY_WAIT_VERDICT); /* m */
    world_flush(&w);
    direct(1, false, RY_WHY_NOT_ME);
    ck_assert(waits(0));
    ck_assert_int_eq(world_exchange(&w, 1, NULL), RY_WAIT_VERDICT);
    world_flush(&w);
    agreed(0), agreed(1);
}
END_TEST

/* An exchange decided by "not me" that a rank has yet to come to is answered by an END that was sent before. */
START_TEST(end_meets_a_rank_behind_a_not_me)
{
    open_world(3);
    engage();
    struct ry_manifest no = {.not_me = true};
    world_exchange(&w, 0, &no);
    world_exchange(&w, 1, NULL);
    world_flush(&w);
    direct(1, false, RY_WHY_NOT_ME);
    world_exchange(&w, 1, NULL); /* the next one */
    world_flush(&w);
    ry_agree_stray(w.rank[0]);
    world_flush_but(&w, 2, false);
    direct(1, true, RY_WHY_STRAY);
    ck_assert_int_eq(world_exchange(&w, 2, NULL), RY_WAIT_VERDICT);
    world_flush(&w);
    direct(2, true, RY_WHY_STRAY);
}
END_TEST

/* not_me while the proposal is still open, then it fails: everything is direct, before and after. */
START_TEST(not_me_in_an_open_proposal)
{
    open_world(3);
    while (counts().proposals == 0) {
        for (int r = 0; r < 3; r++)
            world_exchange(&w, r, NULL);
        world_flush_but(&w, 2, false);
    }
    struct ry_manifest no = {.not_me = true};
    uint64_t m = w.next[0] + 5;
    while (w.next[0] < m)
        ck_assert_int_eq(world_exchange(&w, 0, &no), RY_GO_DIRECT);
    while (world_exchange(&w, 1, NULL) == RY_GO_DIRECT)
        ;
    world_flush_but(&w, 2, false);
    direct(1, false, RY_WHY_NOT_ME); /* of m; still promised */
    ck_assert_int_eq(world_exchange(&w, 1, NULL), RY_WAIT_VERDICT);
    world_flush_but(&w, 2, false);
    world_pass(&w, PATIENCE);
    world_flush(&w);
    ck_assert_int_eq(verdict(1).strategy, 0);
    ck_assert(!ry_agree_hold(w.rank[1]) && !ry_agree_hold(w.rank[2]));
}
END_TEST

START_TEST(not_me_for_thousands_of_exchanges)
{
    open_world(2);
    engage();
    struct ry_manifest no = {.not_me = true};
    for (int i = 0; i < 4000; i++)
        ck_assert_int_eq(world_exchange(&w, 1, &no), RY_GO_DIRECT);
    world_flush(&w);
    int direct_ones = 0; /* rank 0 comes after, is answered each time, and tires of it */
    while (ry_agree_hold(w.rank[0]) && direct_ones < 4000) {
        direct_ones++;
        ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_WAIT_VERDICT);
        world_flush(&w);
        ck_assert_int_eq(verdict(0).strategy, 0);
    }
    ck_assert_int_eq(direct_ones, 64);
    ck_assert(!ry_agree_hold(w.rank[1]));
}
END_TEST

/* Both ways round the window: marks of old exchanges must not be seen on new ones. */
START_TEST(not_me_window_wraps)
{
    open_world(2);
    engage();
    struct ry_manifest no = {.not_me = true};
    for (int i = 0; i < 9000; i++) {
        bool skip = i % 3 == 0;
        for (int r = 0; r < 2; r++) {
            bool me = !skip || (i / 3 % 2) == r;
            ck_assert_int_eq(world_exchange(&w, r, me ? NULL : &no), me ? RY_WAIT_VERDICT : RY_GO_DIRECT);
        }
        world_flush(&w);
        for (int r = 0; r < 2; r++)
            if (!skip)
                agreed(r);
            else if ((i / 3 % 2) == r)
                direct(r, false, RY_WHY_NOT_ME);
    }
    for (int i = 0; i < 5000; i++)
        ck_assert_int_eq(world_exchange(&w, 1, &no), RY_GO_DIRECT);
    world_flush(&w); /* further than the window holds */
    ck_assert(!ry_agree_hold(w.rank[0]) && !ry_agree_hold(w.rank[1]));
    ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_GO_DIRECT);
}
END_TEST

/* The window moves on while ranks are apart. */
START_TEST(not_me_window_slides)
{
    open_world(2);
    engage();
    struct ry_manifest no = {.not_me = true};
    const int steps[][2] = {{1, 4000}, {0, 200}, {1, 96}, {1, 100}, {0, 3996}};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        for (int k = 0; k < steps[i][1]; k++) {
            ck_assert_int_eq(world_exchange(&w, steps[i][0], &no), RY_GO_DIRECT);
            world_flush(&w);
        }
    ck_assert_uint_eq(w.next[0], w.next[1]); /* 4196 later: where marks were set that must be gone */
    for (int k = 0; k < 50; k++)
        one_agreed();
}
END_TEST

/*
 * What a rank says at the end of one epoch bears the very number that the next one begins with. The rank itself goes
 * direct there and refuses the next epoch, but its REFUSE comes late.
 */
START_TEST(manifest_of_the_epoch_before)
{
    open_world(2);
    while (counts().proposals == 0)
        for (int r = 0; r < 2; r++) {
            world_exchange(&w, r, NULL);
            for (int i = 0; i < w.nmail;)
                if (w.mail[i].to == YARD)
                    world_deliver(&w, i, false), i = 0;
                else
                    i++;
        }
    uint64_t m = ry_get64(w.mail[0].bytes + 16);
    while (w.next[0] <= m)
        world_exchange(&w, 0, NULL); /* past m: will refuse */
    for (int i = 0; i < w.nmail; i++)
        if (w.mail[i].to == 1) {
            world_deliver(&w, i, false);
            break;
        }
    uint64_t later = m + 1 + 8; /* the next m, twice as far beyond */
    struct ry_manifest no = {.not_me = true};
    while (w.next[1] < later)
        ck_assert_int_eq(world_exchange(&w, 1, &no), RY_GO_DIRECT);
    ck_assert_int_eq(world_exchange(&w, 1, NULL), RY_WAIT_VERDICT);
    world_flush_but(&w, 1, true); /* all but what rank 1 said: rank 0 refuses, END, PROPOSE, all promise but 1 */
    ck_assert_uint_eq(counts().proposals, 2);
    ck_assert_int_eq(verdict(1).strategy, 0);
    while (w.next[0] < later)
        ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_GO_DIRECT);
    ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_WAIT_VERDICT);
    for (int i = 0; i < w.nmail;) /* then rank 0's manifest, then rank 1's old ones, its REFUSE last */
        if (w.mail[i].from == 0)
            world_deliver(&w, i, false);
        else
            i++;
    world_flush(&w);
    ck_assert_int_eq(w.lean.chosen, 0);
    ck_assert_int_eq(verdict(0).strategy, 0);
}
END_TEST

START_TEST(stray_frees_those_who_wait)
{
    open_world(3);
    engage();
    world_exchange(&w, 0, NULL);
    world_exchange(&w, 1, NULL);
    world_flush(&w);
    ry_agree_stray(w.rank[2]);
    ck_assert(!ry_agree_hold(w.rank[2])); /* at once */
    ck_assert_int_eq(world_exchange(&w, 2, NULL), RY_GO_DIRECT);
    world_flush(&w);
    direct(0, true, RY_WHY_STRAY);
    direct(1, true, RY_WHY_STRAY);
    ck_assert_uint_eq(counts().strays, 1);
    engage();
    one_agreed();
}
END_TEST

START_TEST(stray_before_m_withdraws_the_promise)
{
    open_world(2);
    while (!ry_agree_hold(w.rank[0]))
        observe_once();
    ry_agree_stray(w.rank[1]);
    while (world_exchange(&w, 0, NULL) == RY_GO_DIRECT)
        ;
    world_flush(&w);
    direct(0, true, RY_WHY_STRAY);
    ry_agree_stray(w.rank[1]); /* observing: of no interest */
    ck_assert_int_eq(w.nmail, 0);
}
END_TEST

START_TEST(last_verdict_on_its_way)
{
    open_world(3);
    engage();
    w.lean.last = true;
    wait_all();
    world_flush_but(&w, 2, false);
    agreed(0), agreed(1);
    for (int i = 0; i < 3; i++) /* the others go on observing, and rank 2 has yet to hear */
        for (int r = 0; r < 2; r++)
            ck_assert_int_eq(world_exchange(&w, r, NULL), RY_GO_DIRECT);
    ck_assert(waits(2));
    world_flush(&w);
    agreed(2);
    ck_assert_int_eq(world_exchange(&w, 2, NULL), RY_GO_DIRECT);
}
END_TEST

START_TEST(rank_leaves_while_others_wait)
{
    open_world(3);
    engage();
    world_exchange(&w, 0, NULL);
    world_exchange(&w, 1, NULL);
    ry_agree_leave(w.rank[1]); /* aborted while it waits itself */
    w.silent[1] = true;
    direct(1, true, RY_WHY_LEFT);
    ry_agree_leave(w.rank[1]);
    ry_agree_fail(w.rank[1], "twice");
    world_flush(&w);
    direct(0, true, RY_WHY_LEFT);
    for (int i = 0; i < 5000; i++)
        observe_once();
    ck_assert_uint_eq(counts().proposals, 1); /* never again */
}
END_TEST

START_TEST(lost_rank_frees_the_others)
{
    for (int yard_first = 0; yard_first < 2; yard_first++) {
        if (yard_first)
            teardown();
        open_world(3);
        engage();
        wait_all();
        world_flush_but(&w, 2, true); /* its manifest is still on its way */
        world_cut(&w, 2, yard_first, !yard_first);
        world_flush(&w);
        if (!yard_first) {
            ck_assert_str_eq(verdict(2).reason, "connection lost");
            ck_assert(waits(0));
        }
        world_cut(&w, 2, !yard_first, yard_first);
        world_flush(&w);
        direct(0, true, RY_WHY_LOST);
        direct(1, true, RY_WHY_LOST);
        ck_assert(!ry_agree_hold(w.rank[2]) && !waits(2));
        for (int i = 0; i < 100; i++)
            observe_once();
        ck_assert_uint_eq(counts().lost, 1);
        ck_assert_uint_eq(counts().proposals, 1);
    }
}
END_TEST

/* Two ranks, the second of them the yardmaster; then its own rank goes. */
START_TEST(two_ranks_and_the_yardmasters_own)
{
    world_open(&w, 2, 1, 1, PATIENCE);
    engage();
    one_agreed();
    ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_WAIT_VERDICT);
    world_flush(&w);
    ry_agree_leave(w.rank[1]);
    w.silent[1] = true;
    w.cut[1] = true;
    ry_yard_lost(w.yard, w.now, 1);
    world_flush(&w);
    direct(0, true, RY_WHY_LOST);
}
END_TEST

/* SIGSTOP: everybody's manifests wait in the sockets, and the first thing called is the timer. */
START_TEST(stopped_yardmaster_uses_what_came)
{
    open_world(3);
    engage();
    world_exchange(&w, 0, NULL);
    world_flush(&w);
    uint64_t next = world_tick(&w);
    ck_assert_uint_le(next, w.now + PATIENCE / 8 + 1);
    world_pass(&w, PATIENCE - 10);
    ck_assert(waits(0));
    world_exchange(&w, 1, NULL);
    world_exchange(&w, 2, NULL);
    w.now += 50 * PATIENCE;
    next = world_tick(&w);
    ck_assert_uint_ge(next, w.now + PATIENCE / 8);
    w.now += PATIENCE / 16;
    world_flush(&w);
    for (int r = 0; r < 3; r++)
        agreed(r);
    ck_assert_uint_eq(counts().impatient, 0);
}
END_TEST

/* A yardmaster that always stands still decides all the same. */
START_TEST(yardmaster_that_is_always_late_still_ends_waits)
{
    open_world(2);
    engage();
    world_exchange(&w, 0, NULL);
    world_flush(&w);
    int calls = 0;
    for (; waits(0); calls++) {
        ck_assert_int_lt(calls, 20);
        w.now += 3 * PATIENCE;
        world_tick(&w);
        world_flush(&w);
    }
    ck_assert_int_gt(calls, 4);
    direct(0, true, RY_WHY_PATIENCE);
}
END_TEST

/* Each way in which two sides can differ, alone: no verdict but direct, the moment it is known. */
START_TEST(what_does_not_match_is_direct)
{
    enum { SENDS_MORE, EXPECTS_MORE, TYPE, ONE_CALL, ORDINAL, SENT, RECEIVED, SELF, KINDS };
    for (int kind = 0; kind < KINDS; kind++)
        for (int culprit = 0; culprit < 3; culprit++)
            for (int victim = 0; victim < 3; victim++) {
                if ((victim == culprit) != (kind == SELF))
                    continue;
                if (kind || culprit || victim != 1)
                    teardown();
                open_world(3);
                engage();
                for (int i = 0; i < 3; i++) {
                    int r = (i + culprit) % 3;
                    uint64_t a[3] = {64, 64, 64}, b[3] = {64, 64, 64};
                    uint32_t s[3] = {0}, t[3] = {0};
                    struct ry_manifest m = {.type = 7, .ordinal = w.next[r], .send = a, .recv = b};
                    if (r == culprit) {
                        a[victim] += kind == SENDS_MORE || kind == SELF;
                        b[victim] += kind == EXPECTS_MORE;
                        m.type += kind == TYPE;
                        m.one_call = kind == ONE_CALL;
                        m.ordinal += kind == ORDINAL;
                        s[victim] += kind == SENT;
                        t[victim] += kind == RECEIVED;
                        if (kind == SENT || kind == RECEIVED)
                            m.sent = s, m.received = t;
                    }
                    ck_assert_int_eq(world_exchange(&w, r, &m), RY_WAIT_VERDICT);
                }
                world_flush(&w);
                for (int r = 0; r < 3; r++)
                    direct(r, true, RY_WHY_MISMATCH);
                ck_assert_int_eq(w.lean.chosen, 0);
                ck_assert_uint_eq(counts().mismatched, 1);
            }
}
END_TEST

/* p2p issued before, counted alike on both sides (in exchanges or beside them), matches. */
START_TEST(p2p_issued_before_is_no_obstacle)
{
    open_world(2);
    engage();
    for (int i = 0; i < 3; i++) {
        uint32_t sent[2] = {0, 5}, received[2] = {0, 0}, none[2] = {0}, five[2] = {5, 0};
        struct ry_manifest m0 = {.type = 7, .ordinal = w.next[0], .sent = sent, .received = i == 0 ? received : NULL};
        struct ry_manifest m1 = {.type = 7, .ordinal = w.next[1], .sent = i == 0 ? none : NULL, .received = five};
        world_exchange(&w, i % 2, i % 2 ? &m1 : &m0);
        world_exchange(&w, 1 - i % 2, i % 2 ? &m0 : &m1);
        world_flush(&w);
        agreed(0), agreed(1);
    }
    /* A star of rank 0 that looked like an exchange there: its number is one ahead, the pairs' ordinals are equal. */
    uint32_t one[2] = {1, 0};
    struct ry_manifest ahead = {.type = 7, .ordinal = w.next[0] + 1};
    struct ry_manifest beside = {.type = 7, .ordinal = w.next[1], .sent = one, .received = one};
    world_exchange(&w, 0, &ahead);
    world_exchange(&w, 1, &beside);
    world_flush(&w);
    agreed(0), agreed(1);
}
END_TEST

/* Equal sizes everywhere, and rank 0's star counted as an exchange on it alone: two different exchanges bear one
 * number. */
START_TEST(star_that_looks_like_an_exchange)
{
    open_world(3);
    engage();
    ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_WAIT_VERDICT); /* the star, held as its group looks right */
    uint32_t one[3] = {1, 0, 0};
    for (int r = 1; r < 3; r++)
        ry_agree_stray(w.rank[r]);
    world_flush(&w);
    direct(0, true, RY_WHY_STRAY);
    while (!ry_agree_hold(w.rank[0])) /* numbers are one apart from now on */
        observe_once();
    while (world_exchange(&w, 0, NULL) == RY_GO_DIRECT)
        ;
    uint64_t x = w.next[0] - 1;
    for (int r = 1; r < 3; r++)
        while (w.next[r] < x)
            ck_assert_int_eq(world_exchange(&w, r, NULL), RY_GO_DIRECT);
    for (int r = 1; r < 3; r++) {
        struct ry_manifest m = {.type = 7, .ordinal = x, .sent = one, .received = one};
        world_exchange(&w, r, &m);
    }
    world_flush(&w);
    for (int r = 0; r < 3; r++)
        direct(r, true, RY_WHY_MISMATCH);
}
END_TEST

/* Two communicators of two ranks, used in opposite orders: each waits in another. */
START_TEST(crossed_communicators)
{
    struct world other;
    open_world(2);
    engage();
    other = w;
    open_world(2);
    engage();
    for (int r = 0; r < 2; r++) { /* the pens must know where their world is */
        other.pen[r].w = &other;
        other.yard_pen.w = &other;
    }
    world_close(&other);
    world_open(&other, 2, 0, 4, PATIENCE);
    while (!ry_agree_hold(other.rank[0]) || other.next[0] < w.next[0])
        for (int r = 0; r < 2; r++) {
            ck_assert_int_eq(world_exchange(&other, r, NULL), RY_GO_DIRECT);
            world_flush(&other);
        }
    world_exchange(&w, 0, NULL);
    world_exchange(&other, 1, NULL);
    world_flush(&w), world_flush(&other);
    world_pass(&w, PATIENCE), world_pass(&other, PATIENCE);
    world_flush(&w), world_flush(&other);
    direct(0, true, RY_WHY_PATIENCE);
    ck_assert_int_eq(world_exchange(&other, 0, NULL), RY_GO_DIRECT);
    ck_assert_int_eq(world_exchange(&w, 1, NULL), RY_GO_DIRECT);
    struct ry_verdict v;
    ck_assert(ry_agree_verdict(other.rank[1], &v) && v.strategy == 0);
    world_close(&other);
}
END_TEST

/* One bad end after the other: ever longer until the next attempt, and then silence. */
START_TEST(backs_off_and_gives_up)
{
    open_world(2);
    uint64_t gap = 0;
    for (int i = 0; i < RY_AGREE_GIVE_UP; i++) {
        uint64_t from = w.next[0], m = engage();
        if (i > 0)
            ck_assert_uint_ge(m - from, gap);
        gap = (m - from) * 3 / 2;
        world_exchange(&w, 0, NULL);
        ry_agree_stray(w.rank[1]);
        world_exchange(&w, 1, NULL);
        world_flush(&w);
        direct(0, true, RY_WHY_STRAY);
    }
    long before = w.sent_to_yard;
    for (int i = 0; i < 10000; i++) {
        ck_assert(!ry_agree_wants_seen(w.rank[0], w.next[0]));
        observe_once();
    }
    ck_assert_int_eq(w.sent_to_yard, before);
    ck_assert_uint_eq(counts().proposals, RY_AGREE_GIVE_UP);
}
END_TEST

START_TEST(a_long_engagement_forgives)
{
    open_world(2);
    for (int i = 0; i < 3 * RY_AGREE_GIVE_UP; i++) {
        engage();
        for (int k = 0; k < 256; k++)
            one_agreed();
        ry_agree_stray(w.rank[1]);
        world_flush(&w);
    }
    engage();
    one_agreed();
}
END_TEST

START_TEST(every_letter_comes_twice)
{
    open_world(3);
    struct ry_manifest no = {.not_me = true};
    int agreements = 0;
    for (int i = 0; i < 200; i++) {
        for (int r = 0; r < 3; r++) {
            world_exchange(&w, r, i % 7 == r ? &no : NULL);
            while (w.nmail) {
                world_deliver(&w, 0, true);
                world_deliver(&w, 0, false);
            }
        }
        for (int r = 0; r < 3; r++)
            agreements += verdict(r).strategy;
    }
    ck_assert_int_gt(agreements, 3 * 50);
    ck_assert_int_eq(agreements % 3, 0);
    ck_assert_uint_eq(counts().commits, 1);
}
END_TEST

/* A letter saved up from an epoch and delivered in the next ones must change nothing. */
START_TEST(letters_of_an_earlier_epoch)
{
    open_world(2);
    struct letter saved[64];
    int nsaved = 0;
    for (int i = 0; i < 12; i++) {
        for (int r = 0; r < 2; r++)
            world_exchange(&w, r, NULL);
        while (w.nmail) {
            if (nsaved < 64) {
                saved[nsaved] = w.mail[0];
                saved[nsaved].bytes = malloc(w.mail[0].size);
                memcpy(saved[nsaved++].bytes, w.mail[0].bytes, w.mail[0].size);
            }
            world_deliver(&w, 0, false);
        }
    }
    ck_assert_int_gt(w.lean.chosen, 0);
    w.lean.last = true;
    wait_all();
    world_flush(&w);
    w.lean.last = false;
    uint64_t chosen = (uint64_t)w.lean.chosen;
    engage();
    world_exchange(&w, 0, NULL);
    for (int i = 0; i < nsaved; i++) {
        if (saved[i].to == YARD)
            ry_yard_message(w.yard, w.now, saved[i].from, saved[i].bytes, saved[i].size, NULL);
        else
            ry_agree_message(w.rank[saved[i].to], saved[i].bytes, saved[i].size, NULL);
        free(saved[i].bytes);
    }
    ck_assert_uint_eq((uint64_t)w.lean.chosen, chosen);
    ck_assert(waits(0));
    world_exchange(&w, 1, NULL);
    world_flush(&w);
    agreed(0), agreed(1);
}
END_TEST

/* A small END may overtake a large VERDICT, and a PROPOSE the last VERDICT. */
START_TEST(overtaken_verdicts)
{
    open_world(2);
    engage();
    wait_all();
    world_flush_but(&w, 1, false);
    agreed(0);
    ry_agree_stray(w.rank[0]);
    world_flush_but(&w, 1, false);
    ck_assert_int_eq(w.nmail, 2);
    world_deliver(&w, 1, false); /* END first */
    ck_assert(waits(1));
    world_flush(&w);
    agreed(1); /* on the same path as rank 0 */
    ck_assert(verdict(1).last && !ry_agree_hold(w.rank[1]));

    engage();
    w.lean.last = true;
    wait_all();
    world_flush_but(&w, 1, false);
    uint8_t early[RY_AGREE_HEAD]; /* from the next epoch */
    ry_agree_put(early, &(struct ry_agree_msg){.kind = RY_SAY_PROPOSE, .epoch = 3, .number = w.next[1] + 9}, 2);
    ck_assert_int_eq(ry_agree_message(w.rank[1], early, sizeof early, NULL), 0);
    ck_assert_int_eq(w.mail[w.nmail - 1].bytes[0], RY_SAY_REFUSE);
    ck_assert(waits(1));
    world_flush(&w);
    agreed(1);
    ck_assert(!ry_agree_hold(w.rank[1]));
    /* And an END that comes before its PROPOSE: the proposal is dead on arrival. */
    uint8_t late[RY_AGREE_HEAD];
    ry_agree_put(late, &(struct ry_agree_msg){.kind = RY_SAY_END, .epoch = 9, .number = 100, .a = 200}, 2);
    ry_agree_put(early, &(struct ry_agree_msg){.kind = RY_SAY_PROPOSE, .epoch = 9, .number = 100}, 2);
    ck_assert_int_eq(ry_agree_message(w.rank[1], late, sizeof late, NULL), 0);
    ck_assert_int_eq(ry_agree_message(w.rank[1], early, sizeof early, NULL), 0);
    ck_assert(!ry_agree_hold(w.rank[1]));
}
END_TEST

/* The same exchange begun twice, or one left out: numbers that cannot be trusted end the engagement. */
START_TEST(duplicated_and_missing_starts)
{
    for (int jump = -1; jump <= 1; jump += 2) {
        if (jump > 0)
            teardown();
        open_world(2);
        observe_once();
        w.next[0]--;
        observe_once(); /* while observing it does no harm */
        w.next[0]++;
        engage();
        one_agreed();
        world_exchange(&w, 1, NULL);
        w.next[0] += (uint64_t)jump;
        ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_GO_DIRECT);
        world_flush(&w);
        direct(1, true, RY_WHY_STRAY);
    }
}
END_TEST

START_TEST(abandoned_wait_is_a_leave)
{
    open_world(2);
    engage();
    world_exchange(&w, 0, NULL);
    ck_assert_int_eq(world_exchange(&w, 0, NULL), RY_GO_DIRECT);
    w.silent[0] = true;
    world_exchange(&w, 1, NULL);
    world_flush(&w);
    direct(1, true, RY_WHY_LEFT);
}
END_TEST

START_TEST(memory_until_engaged)
{
    enum { N = 512 };
    struct ry_policy policy = {&w, world_worth, world_choose, world_slice};
    struct ry_agree_port port = {NULL, NULL};
    open_world(2);
    struct ry_yard_config config = {N, 4, PATIENCE};
    size_t before = mallinfo2().uordblks + mallinfo2().hblkhd;
    struct ry_yard *y = ry_yard_new(&config, &policy, &port);
    uint8_t bytes[RY_AGREE_HEAD + 64] = {0};
    for (int round = 0; round < 200; round++)
        for (int r = 0; r < N - 1; r++) { /* rank N - 1 never comes, the others are far ahead */
            struct ry_agree_msg m = {.kind = RY_SAY_SEEN, .number = (uint64_t)round};
            ry_agree_put(bytes, &m, N);
            ck_assert_int_eq(ry_yard_message(y, 1, r, bytes, sizeof bytes, NULL), 0);
        }
    size_t used = mallinfo2().uordblks + mallinfo2().hblkhd - before;
    ck_assert_msg(used < N * 512, "%zu bytes for %d ranks", used, N);
    ry_yard_free(y);
}
END_TEST

/* Whatever comes: no crash (sanitizers watch), and what is refused leaves things as they were. */
START_TEST(bytes_from_nowhere)
{
    const char *env = getenv("RY_TEST_SEED");
    unsigned seed = env ? (unsigned)atoi(env) : (unsigned)time(NULL);
    printf("agree: bytes_from_nowhere: seed %u (repeat with RY_TEST_SEED)\n", seed);
    srand(seed);
    static const char kinds[] = "SPRMXLpve";
    int taken = 0, refused = 0;
    for (int round = 0; round < 300; round++) {
        if (round)
            teardown();
        open_world(3);
        w.lean.bent = true;
        if (round % 2)
            engage();
        world_exchange(&w, 0, NULL);
        memset(w.spoke, 1, sizeof w.spoke);
        memset(w.cut, 0, sizeof w.cut);
        for (int i = 0; i < 200; i++) {
            uint8_t bytes[RY_AGREE_HEAD + 160];
            size_t size = (size_t)rand() % (sizeof bytes + 1);
            if (rand() % 2 && w.nmail) { /* a real one, bent */
                struct letter *l = &w.mail[rand() % w.nmail];
                size = l->size < sizeof bytes ? l->size : sizeof bytes;
                memcpy(bytes, l->bytes, size);
                for (int k = rand() % 3; k > 0; k--)
                    bytes[(size_t)rand() % size] = (uint8_t)rand();
            } else {
                for (size_t k = 0; k < size; k++)
                    bytes[k] = (uint8_t)rand();
                if (rand() % 4)
                    ry_agree_put(bytes,
                                 &(struct ry_agree_msg){.kind = (uint8_t)kinds[rand() % 9],
                                                        .flags = (uint8_t)(rand() % 3 ? 0 : rand() % 32),
                                                        .value = (uint8_t)(rand() % 3),
                                                        .reason = (uint8_t)(rand() % 4),
                                                        .epoch = (uint64_t)(rand() % 4),
                                                        .number = (uint64_t)(rand() % 20),
                                                        .a = (uint64_t)(rand() % 20) << (rand() % 64)},
                                 3);
            }
            if (rand() % 2)
                size = size < RY_AGREE_HEAD ? size : rand() % 2 ? RY_AGREE_HEAD : RY_AGREE_HEAD + 48;
            uint8_t *exact = malloc(size ? size : 1);
            memcpy(exact, bytes, size);
            struct ry_err err = {""};
            int rc = rand() % 2 ? ry_yard_message(w.yard, w.now, rand() % 4, exact, size, &err)
                                : ry_agree_message(w.rank[rand() % 3], exact, size, &err);
            free(exact);
            ck_assert(rc == 0 || (rc == -1 && err.msg[0]));
            *(rc ? &refused : &taken) += 1;
            w.now += (uint64_t)(rand() % 100);
            if (rand() % 10 == 0)
                world_tick(&w);
            if (w.nmail > 500)
                break;
        }
    }
    ck_assert_int_gt(taken, 1000);
    ck_assert_int_gt(refused, 1000);
}
END_TEST

START_TEST(every_cut_manifest_is_refused)
{
    open_world(2);
    engage();
    uint32_t none[2] = {0};
    struct ry_manifest m = {.type = 7, .ordinal = w.next[0], .sent = none};
    world_exchange(&w, 0, &m);
    struct letter *l = &w.mail[0];
    ck_assert_uint_eq(l->size, RY_AGREE_HEAD + 32 + 16 + 8);
    for (size_t size = 0; size < RY_AGREE_HEAD + 32 + 16; size++)
        ck_assert_int_eq(ry_yard_message(w.yard, w.now, 0, l->bytes, size, NULL), -1);
    l->bytes[4] = 3; /* of a communicator of three */
    ck_assert_int_eq(ry_yard_message(w.yard, w.now, 0, l->bytes, l->size, NULL), -1);
    l->bytes[4] = 2;
    world_exchange(&w, 1, NULL);
    world_flush(&w);
    agreed(0), agreed(1);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("agree");
    TCase *t = tcase_create("agree");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, NULL, teardown);
    tcase_add_test(t, engages_decides_and_stops);
    tcase_add_test(t, passes_by_for_a_while);
    tcase_add_test(t, policy_says_direct);
    tcase_add_test(t, not_worth_while_is_asked_ever_more_rarely);
    tcase_add_test(t, one_rank_alone_costs_next_to_nothing);
    tcase_add_test(t, ranks_far_apart_engage_beyond_the_first);
    tcase_add_test(t, refused_while_another_waits_at_m);
    tcase_add_test(t, manifest_overtakes_promises);
    tcase_add_test(t, proposal_without_answer);
    tcase_add_test(t, late_rank_goes_direct_without_waiting);
    tcase_add_test(t, late_rank_meets_the_end_on_its_way);
    tcase_add_test(t, not_me_goes_on_and_nobody_waits_for_it);
    tcase_add_test(t, group_begun_before_the_promise_ends_at_m);
    tcase_add_test(t, end_meets_a_rank_behind_a_not_me);
    tcase_add_test(t, not_me_in_an_open_proposal);
    tcase_add_test(t, not_me_for_thousands_of_exchanges);
    tcase_add_test(t, not_me_window_wraps);
    tcase_add_test(t, not_me_window_slides);
    tcase_add_test(t, manifest_of_the_epoch_before);
    tcase_add_test(t, stray_frees_those_who_wait);
    tcase_add_test(t, stray_before_m_withdraws_the_promise);
    tcase_add_test(t, last_verdict_on_its_way);
    tcase_add_test(t, rank_leaves_while_others_wait);
    tcase_add_test(t, lost_rank_frees_the_others);
    tcase_add_test(t, two_ranks_and_the_yardmasters_own);
    tcase_add_test(t, stopped_yardmaster_uses_what_came);
    tcase_add_test(t, yardmaster_that_is_always_late_still_ends_waits);
    tcase_add_test(t, what_does_not_match_is_direct);
    tcase_add_test(t, p2p_issued_before_is_no_obstacle);
    tcase_add_test(t, star_that_looks_like_an_exchange);
    tcase_add_test(t, crossed_communicators);
    tcase_add_test(t, backs_off_and_gives_up);
    tcase_add_test(t, a_long_engagement_forgives);
    tcase_add_test(t, every_letter_comes_twice);
    tcase_add_test(t, letters_of_an_earlier_epoch);
    tcase_add_test(t, overtaken_verdicts);
    tcase_add_test(t, duplicated_and_missing_starts);
    tcase_add_test(t, abandoned_wait_is_a_leave);
    tcase_add_test(t, memory_until_engaged);
    tcase_add_test(t, bytes_from_nowhere);
    tcase_add_test(t, every_cut_manifest_is_refused);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
