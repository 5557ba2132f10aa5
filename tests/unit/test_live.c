/* test_live.c: live placement: homes learned and dealt by, every order a lawful one, files, refusals, threads. */
#include <math.h>
#include <pthread.h>

#include "live_world.h"

#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define SANITIZED true
#else
#define SANITIZED false
#endif

static int place_of(const struct world *w, int slot)
{
    return w->rank_place[slot / w->job.samples];
}

static void deal(const struct world *w, struct list *x, bool mixed)
{
    struct sample s;
    x->n = w->job.ranks * w->job.samples;
    ck_assert_int_le(x->n, MOST);
    for (int i = 0; i < x->n; i++)
        x->home[i] = place_of(w, i);
    for (int i = x->n; mixed && i-- > 1;) {
        int j = below(i + 1), t = x->home[i];
        x->home[i] = x->home[j];
        x->home[j] = t;
    }
    x->first[0] = 0;
    for (int i = 0; i < x->n; i++) {
        draw(w, &s, x->home[i]);
        memcpy(x->tokens + x->first[i], s.tokens, (size_t)w->tokens * sizeof *s.tokens);
        x->first[i + 1] = x->first[i] + w->tokens;
    }
}

static void place(const struct world *w, struct list *x)
{
    memset(x->order, 0xff, sizeof x->order);
    memset(&x->plan, 0x7f, sizeof x->plan);
    x->plan.size = sizeof x->plan;
    ck_assert_msg(!railyard_live_place(w->live, x->tokens, x->first, x->order, &x->plan), "%s", railyard_live_error());
}

/* What the header promises of any order. */
static void check_lawful(const struct world *w, const struct list *x)
{
    int slot_of[MOST], moved = 0, last[MOST];
    memset(slot_of, 0xff, sizeof slot_of);
    for (int slot = 0; slot < x->n; slot++) {
        ck_assert_uint_lt(x->order[slot], (uint32_t)x->n);
        ck_assert_msg(slot_of[x->order[slot]] < 0, "sample %u is dealt twice", x->order[slot]);
        slot_of[x->order[slot]] = slot;
    }
    memset(last, 0xff, sizeof last);
    for (int i = 0; i < x->n; i++) {
        int slot = slot_of[i], p = place_of(w, slot);
        moved += slot / w->job.samples != i / w->job.samples;
        if (p == place_of(w, i)) {
            ck_assert_msg(slot == i, "sample %d stays at place %d, yet goes from slot %d to %d", i, p, i, slot);
        } else {
            ck_assert_msg(slot > last[p], "samples new at place %d are not in order", p);
            last[p] = slot;
        }
    }
    ck_assert_int_eq(moved, x->plan.moved);
    ck_assert_int_gt((int)strlen(x->plan.why), 10);
    ck_assert(x->plan.dealt >= 0 && x->plan.dealt <= 1);
    if (moved)
        ck_assert_msg(x->plan.placed < 0.981 * x->plan.dealt, "%g moved for %g", x->plan.placed, x->plan.dealt);
    else
        ck_assert(x->plan.placed == x->plan.dealt);
}

static int at_home(const struct world *w, const struct list *x)
{
    int n = 0;
    for (int slot = 0; slot < x->n; slot++)
        n += x->home[x->order[slot]] == place_of(w, slot);
    return n;
}

START_TEST(learns_homes)
{
    static struct world w;
    static struct list x;
    for (int distinct = 0; distinct < 2; distinct++) {
        make(&w, 8, 4, 2 + 2 * distinct, distinct);
        w.noise = 64;
        w.shift = distinct ? 17 : 3; /* ids beyond 16 bits, whose low bits tell nothing */
        start(&w);
        teach(&w, 600);
        struct railyard_live_state s = state_of(&w);
        ck_assert_msg(s.sure && s.samples == 600 && s.captured > 0.8, "%s: captured %g", s.why, s.captured);
        /* They were at places by lot, in no proportion to ranks: what left is about what leaves by lot. */
        ck_assert_msg(fabs(s.crossed - s.even) < 0.08, "%g left, %g would by lot", s.crossed, s.even);
        int right = 0, all = 0;
        for (int i = 0; i < 20; i++) {
            deal(&w, &x, true);
            place(&w, &x);
            check_lawful(&w, &x);
            right += at_home(&w, &x);
            all += x.n;
        }
        ck_assert_msg(right > 0.98 * all, "%d of %d samples are at home: %s", right, all, x.plan.why);
        ck_assert_msg(strstr(x.plan.why, "change ranks"), "%s", x.plan.why);
        deal(&w, &x, false);
        place(&w, &x);
        check_lawful(&w, &x);
        ck_assert_msg(!x.plan.moved && strstr(x.plan.why, "as dealt: moving"), "all are at home, yet: %s", x.plan.why);
        railyard_live_free(w.live);
    }
}
END_TEST

START_TEST(as_dealt_when_not_sure)
{
    static struct world w;
    static struct list x;
    make(&w, 4, 4, 2, 0);
    start(&w);
    for (int i = 0; i < 3; i++) {
        deal(&w, &x, true);
        place(&w, &x);
        check_lawful(&w, &x);
        ck_assert_msg(!x.plan.moved && strstr(x.plan.why, "as dealt, not sure"), "%s", x.plan.why);
        ck_assert(!state_of(&w).sure);
        teach(&w, 20);
    }
    railyard_live_free(w.live);
    w.noise = 256; /* tokens and copies go anywhere */
    start(&w);
    teach(&w, 600);
    deal(&w, &x, true);
    place(&w, &x);
    check_lawful(&w, &x);
    ck_assert_msg(!x.plan.moved && strstr(x.plan.why, "not sure"), "%s", x.plan.why);
    railyard_live_free(w.live);
}
END_TEST

START_TEST(any_job)
{
    static struct world w;
    static struct list x;
    int moved = 0, rounds = SANITIZED ? 40 : 150;
    for (int round = 0; round < rounds; round++) {
        uint64_t seed = rng;
        int ranks = 2 + below(23), places = 2 + below(ranks < 8 ? ranks - 1 : 7);
        make(&w, ranks, 1 + below(8), places, below(2));
        w.noise = below(200);
        start(&w);
        teach(&w, 40 + below(100));
        deal(&w, &x, true);
        for (int i = 0; i < x.n; i++) /* of any length, also none */
            if (!below(3))
                x.first[i] = below(4) ? x.first[i] + below(64) : x.first[i + 1];
        for (int i = x.n; i-- > 0;)
            if (x.first[i] > x.first[i + 1])
                x.first[i] = x.first[i + 1];
        place(&w, &x);
        check_lawful(&w, &x);
        moved += x.plan.moved > 0;
        static struct list again;
        again = x;
        place(&w, &again);
        ck_assert_msg(!memcmp(x.order, again.order, sizeof x.order), "seed %llu: another order for the same list",
                      (unsigned long long)seed);
        railyard_live_free(w.live);
    }
    ck_assert_int_gt(moved, rounds / 4);
}
END_TEST

/* Long samples decide where they compete with short ones, though these are surer of what they want. */
START_TEST(long_samples_first)
{
    static struct world w;
    static struct list x;
    struct sample s;
    make(&w, 2, 1, 2, 0);
    w.rank_place[0] = 0;
    w.rank_place[1] = 1;
    start(&w);
    teach(&w, 400);
    for (int longer = 0; longer < 2; longer++) { /* both want place 1 */
        x.n = 2;
        x.first[0] = 0;
        for (int i = 0; i < 2; i++) {
            int n = i == longer ? 64 : 16;
            draw(&w, &s, 1);
            memcpy(x.tokens + x.first[i], s.tokens, (size_t)n * sizeof *s.tokens);
            draw(&w, &s, 0);
            if (i == longer)
                memcpy(x.tokens + x.first[i], s.tokens, (size_t)(n / 4) * sizeof *s.tokens);
            x.first[i + 1] = x.first[i] + n;
        }
        place(&w, &x);
        check_lawful(&w, &x);
        ck_assert_msg((int)x.order[1] == longer, "%s", x.plan.why);
    }
    railyard_live_free(w.live);
}
END_TEST

/* Nothing moves that need not: of twelve equal samples that want one place, those that are there stay. */
START_TEST(few_moves)
{
    static struct world w;
    static struct list x;
    struct sample s[2];
    for (int round = 0; round < 20; round++) {
        make(&w, 4, 4, 2, 0);
        for (int r = 0; r < 4; r++)
            w.rank_place[r] = r / 2 == round % 2;
        start(&w);
        teach(&w, 200);
        draw(&w, &s[0], 0);
        draw(&w, &s[1], 1);
        x.n = 16;
        x.first[0] = 0;
        for (int i = 0, other = 0; i < 16;
             i++) { /* at place 0 are four that want place 1, and all others want place 0 */
            bool wants = place_of(&w, i) == 0 && other < 4 && (below(2) || i % 8 >= 4);
            other += wants;
            memcpy(x.tokens + x.first[i], s[wants].tokens, 64 * sizeof *s[0].tokens);
            x.first[i + 1] = x.first[i] + 64;
        }
        place(&w, &x);
        check_lawful(&w, &x);
        ck_assert_int_eq(x.plan.moved, 8);
        railyard_live_free(w.live);
    }
}
END_TEST

START_TEST(saved_and_loaded)
{
    static struct world w, other;
    static struct list x, y;
    make(&w, 8, 4, 4, 0);
    start(&w);
    teach(&w, 300);
    ck_assert_msg(!railyard_live_save(w.live, path), "%s", railyard_live_error());
    deal(&w, &x, true);
    y = x;
    place(&w, &x);
    other = w;
    other.job.rank_place = other.rank_place;
    other.job.expert_place = other.expert_place;
    start(&other);
    ck_assert_msg(!railyard_live_load(other.live, path), "%s", railyard_live_error());
    place(&other, &y);
    ck_assert_int_gt(x.plan.moved, 0);
    ck_assert_int_eq(x.plan.moved, y.plan.moved);
    ck_assert_int_ge(at_home(&other, &y), at_home(&w, &x) - 2); /* weights were rounded to 32 bits */
    ck_assert_uint_eq(state_of(&other).samples, 300);
    ck_assert(state_of(&other).sure && state_of(&other).crossed == 0);
    railyard_live_free(other.live);

    other.expert_place[0] = (other.expert_place[0] + 1) % 4;
    start(&other);
    ck_assert_int_eq(railyard_live_load(other.live, path), -1);
    ck_assert_msg(strstr(railyard_live_error(), "another expert map") && strstr(railyard_live_error(), path), "%s",
                  railyard_live_error());
    ck_assert_int_eq(railyard_live_load(other.live, "/nowhere/model"), -1);
    ck_assert_int_eq(railyard_live_save(other.live, "/nowhere/model"), -1);
    ck_assert_uint_eq(state_of(&other).samples, 0); /* as it was */
    railyard_live_free(other.live);
    make(&other, 8, 4, 2, 0);
    start(&other);
    ck_assert_int_eq(railyard_live_load(other.live, path), -1);
    railyard_live_free(other.live);
    railyard_live_free(w.live);
}
END_TEST

/* ---- what is refused ---- */

START_TEST(refuses)
{
    static struct world w, x;
    static struct list l;
    make(&w, 4, 2, 2, 1);
    static const struct {
        size_t field;
        int32_t value;
        const char *why;
    } bad[] = {
#define FIELD(f) offsetof(struct railyard_live_job, f)
        {FIELD(size), 8, "two versions"},       {FIELD(ranks), 0, "0 ranks"},
        {FIELD(ranks), 1, "places of 1 ranks"}, {FIELD(samples), 0, "ranks of 0 samples"},
        {FIELD(samples), 1 << 30, "a list"},    {FIELD(layers), 0, "0 layers"},
        {FIELD(experts), -1, "-1 experts"},     {FIELD(topk), 0, "each token to 0"},
        {FIELD(topk), 99, "each token to 99"},  {FIELD(places), 1, "1 places"},
        {FIELD(places), 1000, "1000 places"},   {FIELD(places), 3, "no rank is at place 2 of 3"},
#undef FIELD
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct railyard_live_job job = w.job;
        memcpy((char *)&job + bad[i].field, &bad[i].value, sizeof bad[i].value);
        ck_assert_msg(!railyard_live_new(&job), "taken: expected '%s'", bad[i].why);
        ck_assert_msg(strstr(railyard_live_error(), bad[i].why), "'%s' does not say '%s'", railyard_live_error(),
                      bad[i].why);
    }
    x = w;
    x.job.rank_place = x.rank_place;
    x.rank_place[2] = 2;
    ck_assert_ptr_null(railyard_live_new(&x.job));
    ck_assert_ptr_nonnull(strstr(railyard_live_error(), "rank 2 is at place 2 of 2"));
    x = w;
    x.job.expert_place = x.expert_place;
    x.expert_place[1] = -1;
    ck_assert_ptr_null(railyard_live_new(&x.job));
    ck_assert_ptr_nonnull(strstr(railyard_live_error(), "expert 1 of layer 0 is at place -1 of 2"));
    x.job.expert_place = NULL;
    ck_assert_ptr_null(railyard_live_new(&x.job));

    struct sample s;
    start(&w);
    teach(&w, 100);
    struct railyard_live_state before = state_of(&w);
    draw(&w, &s, 0);
    ck_assert_int_eq(railyard_live_observe(w.live, s.tokens, 0, s.counts, NULL, 0), -1);
    ck_assert_int_eq(railyard_live_observe(w.live, s.tokens, w.tokens, NULL, NULL, 0), -1);
    ck_assert_int_eq(railyard_live_observe(w.live, s.tokens, w.tokens, s.counts, NULL, 2), -1);
    ck_assert_int_eq(railyard_live_observe(w.live, s.tokens, w.tokens, s.counts, NULL, -1), -1);
    ck_assert_int_eq(railyard_live_observe(w.live, s.tokens, w.tokens - 1, s.counts, NULL, 0), -1);
    ck_assert_msg(strstr(railyard_live_error(), "copies of a sample of 63 tokens"), "%s", railyard_live_error());
    s.distinct[1] = 65;
    ck_assert_int_eq(railyard_live_observe(w.live, s.tokens, w.tokens, s.counts, s.distinct, 0), -1);
    ck_assert_msg(strstr(railyard_live_error(), "65 distinct tokens at place 1"), "%s", railyard_live_error());
    memset(s.counts, 0, sizeof s.counts);
    ck_assert_int_eq(railyard_live_observe(w.live, s.tokens, w.tokens, s.counts, NULL, 0), -1);
    struct railyard_live_state after = state_of(&w);
    ck_assert_mem_eq(&before, &after, sizeof before);
    after.size--;
    ck_assert_int_eq(railyard_live_state(w.live, &after), -1);

    deal(&w, &l, true);
    l.plan.size = 4;
    ck_assert_int_eq(railyard_live_place(w.live, l.tokens, l.first, l.order, &l.plan), -1);
    l.plan.size = sizeof l.plan;
    l.first[3] = l.first[4] + 1;
    ck_assert_int_eq(railyard_live_place(w.live, l.tokens, l.first, l.order, &l.plan), -1);
    ck_assert_msg(strstr(railyard_live_error(), "sample 3 has tokens ["), "%s", railyard_live_error());
    railyard_live_free(w.live);
    railyard_live_free(NULL);
    ck_assert_int_eq(railyard_live_abi(), RAILYARD_LIVE_ABI);
}
END_TEST

START_TEST(settings)
{
    char out[32];
    ck_assert_int_eq(railyard_live_setting("RAILYARD_PLACEMENT", out, sizeof out), 3);
    ck_assert_str_eq(out, "off");
    setenv("RAILYARD_PLACEMENT", "Batch", 1);
    ck_assert_int_eq(railyard_live_setting("RAILYARD_PLACEMENT", out, sizeof out), 5);
    ck_assert_str_eq(out, "batch");
    setenv("RAILYARD_PLACEMENT", "bacth", 1);
    ck_assert_int_eq(railyard_live_setting("RAILYARD_PLACEMENT", out, sizeof out), -1);
    ck_assert_str_eq(railyard_live_error(), "RAILYARD_PLACEMENT='bacth' is not off, watch, batch or layer");
    setenv("RAILYARD_EXPERTS", "/a/file", 1);
    ck_assert_int_eq(railyard_live_setting("RAILYARD_EXPERTS", out, sizeof out), 7);
    ck_assert_int_eq(railyard_live_setting("RAILYARD_EXPERTS", out, 7), -1);
    ck_assert_int_eq(railyard_live_setting("RAILYARD_PATIENCE", out, sizeof out), 2);
    ck_assert_int_eq(railyard_live_setting("RAILYARD_PLACE", out, sizeof out), -1);
    ck_assert_str_eq(railyard_live_error(), "there is no setting RAILYARD_PLACE");
}
END_TEST

/* ---- threads ---- */

struct hammer {
    struct world *w;
    uint64_t rng;
    int kind;
};

static void *hammer(void *arg)
{
    struct hammer *h = arg;
    struct world *w = h->w;
    char mine[160];
    uint32_t tokens[8 * 16], counts[MOST] = {0}, order[8];
    int64_t first[9];
    snprintf(mine, sizeof mine, "%s-%d", path, h->kind);
    for (int i = 0; i <= 8; i++)
        first[i] = 16 * i;
    for (int round = 0; round < 60; round++) {
        for (int i = 0; i < 8 * 16; i++)
            tokens[i] = (uint32_t)ry_random_below(&h->rng, 100);
        counts[ry_random_below(&h->rng, (uint64_t)w->job.experts)] = 1;
        struct railyard_live_plan plan = {.size = sizeof plan};
        struct railyard_live_state state = {.size = sizeof state};
        int bad = 0;
        if (h->kind % 2)
            bad |= railyard_live_observe(w->live, tokens, 16, counts, NULL, 0);
        else
            bad |= railyard_live_place(w->live, tokens, first, order, &plan);
        bad |= railyard_live_state(w->live, &state);
        if (round % 20 == 19)
            bad |= railyard_live_save(w->live, mine) | railyard_live_record_flush(w->live) |
                   (h->kind == 2 ? railyard_live_load(w->live, mine) : 0);
        if (bad)
            return "failed";
        railyard_live_place(w->live, NULL, first, order, &plan); /* every thread has its own error */
        if (!strstr(railyard_live_error(), "without tokens"))
            return "another thread's error";
    }
    return NULL;
}

START_TEST(threads)
{
    static struct world w;
    struct hammer h[4];
    pthread_t t[4];
    make(&w, 4, 2, 2, 0);
    start(&w);
    ck_assert_int_eq(railyard_live_record(w.live, folder, 16, 0), 0);
    for (int i = 0; i < 4; i++) {
        h[i] = (struct hammer){&w, rng + (uint64_t)i, i};
        ck_assert_int_eq(pthread_create(&t[i], NULL, hammer, &h[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(t[i], &wrong);
        ck_assert_msg(!wrong, "thread %d: %s", i, (char *)wrong);
    }
    railyard_live_free(w.live);
    ry_routing_close(opened(120));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("live");
    TCase *t = tcase_create("live");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, learns_homes);
    tcase_add_test(t, as_dealt_when_not_sure);
    tcase_add_test(t, any_job);
    tcase_add_test(t, long_samples_first);
    tcase_add_test(t, few_moves);
    tcase_add_test(t, saved_and_loaded);
    tcase_add_test(t, refuses);
    tcase_add_test(t, settings);
    tcase_add_test(t, threads);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
