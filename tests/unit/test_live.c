/* test_live.c: live placement: homes learned and dealt by, every order a lawful one, recordings, refusals, threads,
 * time. */
#include <check.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/npy.h"
#include "live/live.h"
#include "place/coplace.h"
#include "place/random.h"
#include "place/routing.h"
#include "place/routing_writer.h"

#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define SANITIZED true
#else
#define SANITIZED false
#endif

static struct ry_err err;
static uint64_t rng;
static char dir[64], path[128], folder[128];

static void setup(void)
{
    const char *text = getenv("RY_TEST_SEED");
    rng = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("RY_TEST_SEED=%llu\n", (unsigned long long)rng);
    strcpy(dir, "/tmp/ry-live-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/model", dir);
    snprintf(folder, sizeof folder, "%s/routing", dir);
}

static void teardown(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    ck_assert_int_eq(system(cmd), 0);
}

static int below(int n)
{
    return (int)ry_random_below(&rng, (uint64_t)n);
}

/* ---- a made-up job, whose samples have homes that their tokens tell ---- */

#define MOST 512 /* of anything below */

struct world {
    struct railyard_live_job job;
    int32_t rank_place[MOST], expert_place[MOST];
    int tokens;     /* of a sample */
    int noise;      /* of 256 tokens, and of 256 copies, that many go anywhere */
    uint32_t shift; /* token ids are multiples of 1 << shift, so that only high bits tell */
    struct railyard_live *live;
};

struct sample {
    int home;
    uint32_t tokens[MOST], counts[MOST], distinct[MOST];
};

static void make(struct world *w, int ranks, int samples, int places, int distinct)
{
    memset(w, 0, sizeof *w);
    w->job = (struct railyard_live_job){.size = sizeof w->job,
                                        .ranks = ranks,
                                        .samples = samples,
                                        .layers = 1 + below(4),
                                        .experts = places * (2 + below(3)),
                                        .topk = 2,
                                        .places = places,
                                        .distinct = distinct,
                                        .rank_place = w->rank_place,
                                        .expert_place = w->expert_place};
    w->tokens = 64;
    for (int r = 0; r < ranks; r++)
        w->rank_place[r] = r < places ? r : below(places);
    for (int r = ranks; r-- > 1;) {
        int j = below(r + 1), t = w->rank_place[r];
        w->rank_place[r] = w->rank_place[j];
        w->rank_place[j] = t;
    }
    for (int l = 0; l < w->job.layers; l++)
        for (int e = 0; e < w->job.experts; e++)
            w->expert_place[l * w->job.experts + e] = (e + l) % places;
}

static void start(struct world *w)
{
    w->live = railyard_live_new(&w->job);
    ck_assert_msg(w->live != NULL, "%s", railyard_live_error());
}

static void draw(const struct world *w, struct sample *s, int home)
{
    int E = w->job.experts, P = w->job.places;
    memset(s->counts, 0, sizeof s->counts);
    memset(s->distinct, 0, sizeof s->distinct);
    s->home = home;
    for (int t = 0; t < w->tokens; t++)
        s->tokens[t] = (uint32_t)(below(256) < w->noise ? below(40 * P) : 40 * home + below(40)) << w->shift;
    for (int l = 0; l < w->job.layers; l++) {
        for (int t = 0; t < w->tokens; t++) {
            int chosen[2];
            for (int k = 0; k < 2; k++) {
                do
                    chosen[k] = below(E);
                while ((k && chosen[1] == chosen[0] && E > 1) ||
                       (w->expert_place[l * E + chosen[k]] != home && below(256) >= w->noise && below(8)));
                s->counts[l * E + chosen[k]]++;
            }
            int a = w->expert_place[l * E + chosen[0]], b = w->expert_place[l * E + chosen[1]];
            s->distinct[l * P + a]++;
            s->distinct[l * P + b] += a != b;
        }
    }
}

static void teach(const struct world *w, int samples)
{
    struct sample s;
    for (int i = 0; i < samples; i++) {
        draw(w, &s, below(w->job.places));
        ck_assert_msg(!railyard_live_observe(w->live, s.tokens, w->tokens, s.counts,
                                             w->job.distinct && below(8) ? s.distinct : NULL, below(w->job.places)),
                      "%s", railyard_live_error());
    }
}

/* A list: samples of all homes in proportion to what places take, mixed, or each at its home. */
struct list {
    int n, home[MOST];
    uint32_t tokens[MOST * 64], order[MOST];
    int64_t first[MOST + 1];
    struct railyard_live_plan plan;
};

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

static struct railyard_live_state state_of(const struct world *w)
{
    struct railyard_live_state s = {.size = sizeof s};
    ck_assert_msg(!railyard_live_state(w->live, &s), "%s", railyard_live_error());
    return s;
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

/* ---- recording ---- */

static struct ry_routing *opened(int samples)
{
    struct ry_routing *r = ry_routing_open(folder, &err);
    ck_assert_msg(r != NULL, "%s", err.msg);
    ck_assert_int_eq(r->samples, samples);
    return r;
}

static int left_out(void)
{
    char file[160], text[2048], *at;
    snprintf(file, sizeof file, "%s/meta.json", folder);
    FILE *f = fopen(file, "r");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    ck_assert_ptr_nonnull(at = strstr(text, "\"left_out\": "));
    return atoi(at + 12);
}

static void observe(const struct world *w, struct sample *s, int n)
{
    draw(w, s, below(w->job.places));
    for (int i = 0; n < w->tokens && i < w->job.layers * w->job.experts; i++)
        s->counts[i] = s->counts[i] * (uint32_t)n / (uint32_t)w->tokens; /* of a shorter sample */
    ck_assert_msg(!railyard_live_observe(w->live, s->tokens, n, s->counts, NULL, 0), "%s", railyard_live_error());
}

START_TEST(records)
{
    static struct world w;
    static struct sample seen[20], s;
    make(&w, 4, 2, 2, 0);
    w.shift = 20;
    int n = 0, cells = w.job.layers * w.job.experts;
    for (int life = 0; life < 3; life++) { /* three jobs, one after the other */
        start(&w);
        ck_assert_int_eq(railyard_live_record_flush(w.live), -1);
        ck_assert_msg(!railyard_live_record(w.live, folder, w.tokens, 14), "%s", railyard_live_error());
        for (int i = 0; i < 5; i++)
            observe(&w, &seen[n++], w.tokens);
        observe(&w, &s, w.tokens / 2);
        if (life == 1)
            ck_assert_int_eq(railyard_live_record_flush(w.live), 0);
        else
            railyard_live_free(w.live);
        n = n > 14 ? 14 : n;
        struct ry_routing *r = opened(n);
        ck_assert_int_eq(left_out(), life + 1 + (life == 2)); /* the last one of 15 is beyond the limit */
        ck_assert(r->tokens32 && (const void *)r->tokens32 == r->maps[2].data); /* in place */
        ck_assert_int_eq(r->topk, 2);
        for (int i = 0; i < n; i++) {
            ck_assert_mem_eq(ry_tokens_at(r, i, NULL), seen[i].tokens, (size_t)w.tokens * sizeof *s.tokens);
            for (int c = 0; c < cells; c++)
                ck_assert_uint_eq(ry_counts_at(r, i, 0)[c], seen[i].counts[c]);
        }
        ry_routing_close(r);
        if (life == 1)
            railyard_live_free(w.live);
    }
    /* Another shape, and folders of others, are left alone. */
    start(&w);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens + 1, 0), -1);
    ck_assert_msg(strstr(railyard_live_error(), "'tokens_per_sample' is 64, but this job has 65"), "%s",
                  railyard_live_error());
    ck_assert_int_eq(railyard_live_record(w.live, "/nowhere/at/all", w.tokens, 0), -1);
    ck_assert_int_eq(railyard_live_record(w.live, folder, 0, 0), -1);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens, -1), -1);
    char file[160];
    snprintf(file, sizeof file, "%s/meta.json", folder);
    ck_assert_int_eq(unlink(file), 0);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens, 0), -1);
    ck_assert_ptr_nonnull(strstr(railyard_live_error(), "no meta.json beside it"));
    FILE *f = fopen(file, "w");
    fprintf(f, "{\"layers\": %d, \"samples\": 3}", w.job.layers);
    fclose(f);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens, 0), -1);
    ck_assert_ptr_nonnull(strstr(railyard_live_error(), "'growing' is not true"));
    railyard_live_free(w.live);
}
END_TEST

static void add(struct ry_routing_writer *w, uint32_t x, int expected)
{
    uint32_t tokens[4] = {x, x, x, x}, counts[4] = {4, 4, 0, 0};
    if (!expected)
        counts[0] = 65536;
    ck_assert_msg(ry_routing_writer_add(w, tokens, counts, &err) == expected, "%s", err.msg);
}

/* Whatever a job that is killed leaves behind, and whatever a reader meets while one writes. */
START_TEST(recordings_survive)
{
    struct ry_routing_shape shape = {1, 4, 2, 4};
    int ready[2];
    ck_assert_int_eq(pipe(ready), 0);
    pid_t child = fork();
    if (!child) {
        struct ry_routing_writer *w = ry_routing_writer_open(folder, &shape, &err);
        if (!w)
            _exit(1);
        for (uint32_t i = 0; i < 5; i++)
            add(w, i, 1);
        add(w, 9, 0);
        if (ry_routing_writer_flush(w, &err))
            _exit(2);
        add(w, 77, 1); /* never told of */
        if (write(ready[1], "x", 1) != 1)
            _exit(3);
        pause();
        _exit(4);
    }
    char c;
    ck_assert_int_eq((int)read(ready[0], &c, 1), 1);
    ck_assert_ptr_null(ry_routing_writer_open(folder, &shape, &err));
    ck_assert_msg(strstr(err.msg, "another process is recording"), "%s", err.msg);
    ry_routing_close(opened(5));
    ck_assert_int_eq(kill(child, SIGKILL), 0);
    ck_assert_int_eq(waitpid(child, NULL, 0), child);
    close(ready[0]);
    close(ready[1]);

    char header[RY_NPY_HEADER_BYTES], file[160]; /* killed between the headers and meta.json */
    ry_npy_header(header, RY_NPY_U16, 3, (size_t[]){6, 1, 4});
    snprintf(file, sizeof file, "%s/counts.npy", folder);
    int fd = open(file, O_RDWR);
    ck_assert_int_eq((int)pwrite(fd, header, sizeof header, 0), (int)sizeof header);
    close(fd);
    ry_routing_close(opened(5));
    struct ry_routing_writer *w = ry_routing_writer_open(folder, &shape, &err);
    ck_assert_msg(w != NULL, "%s", err.msg);
    ry_routing_close(opened(5));
    add(w, 5, 1);
    ry_routing_close(opened(5));
    ck_assert_int_eq((int)ry_routing_writer_samples(w), 6);
    ck_assert_int_eq(ry_routing_writer_close(w, &err), 0);
    struct ry_routing *r = opened(6);
    for (int i = 0; i < 6; i++)
        ck_assert_uint_eq(ry_tokens_at(r, i, NULL)[3], (uint32_t)i);
    ry_routing_close(r);
    ck_assert_int_eq(left_out(), 1);
    ck_assert_int_eq(truncate(file, 200), 0);
    ck_assert_ptr_null(ry_routing_writer_open(folder, &shape, &err));
    ck_assert_msg(strstr(err.msg, "counts.npy"), "%s", err.msg);
}
END_TEST

/* A full disk ends the recording, with one error; what was flushed stays readable, and learning goes on. */
START_TEST(disk_full)
{
    static struct world w;
    static struct sample s;
    make(&w, 4, 2, 2, 0);
    start(&w);
    ck_assert_int_eq(railyard_live_record(w.live, folder, w.tokens, 0), 0);
    for (int i = 0; i < 10; i++)
        observe(&w, &s, w.tokens);
    ck_assert_int_eq(railyard_live_record_flush(w.live), 0);
    struct rlimit before, low;
    getrlimit(RLIMIT_FSIZE, &before);
    low = before;
    low.rlim_cur = RY_NPY_HEADER_BYTES + 10 * 64 * 4 + 100;
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &low), 0);
    draw(&w, &s, 0);
    int got = railyard_live_observe(w.live, s.tokens, w.tokens, s.counts, NULL, 0);
    int next = railyard_live_observe(w.live, s.tokens, w.tokens, s.counts, NULL, 0);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &before), 0);
    ck_assert_int_eq(got, -1);
    ck_assert_msg(strstr(railyard_live_error(), "cannot be written"), "%s", railyard_live_error());
    ck_assert_int_eq(next, 0);
    ck_assert_uint_eq(state_of(&w).samples, 12);
    railyard_live_free(w.live);
    ry_routing_close(opened(10));
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
    ck_assert_str_eq(railyard_live_error(), "RAILYARD_PLACEMENT='bacth' is not off, watch or batch");
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

/* ---- time ---- */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

START_TEST(fast_enough)
{
    enum { RANKS = 128, SAMPLES = 8, PLACES = 16, TOKENS = 4096, N = RANKS * SAMPLES, LAYERS = 24, EXPERTS = 64 };
    static int32_t rank_place[RANKS], expert_place[LAYERS * EXPERTS];
    static uint32_t counts[LAYERS * EXPERTS], order[N];
    static int64_t first[N + 1];
    struct railyard_live_job job = {sizeof job, RANKS,  SAMPLES, LAYERS,     EXPERTS,
                                    8,          PLACES, 0,       rank_place, expert_place};
    uint32_t *tokens = malloc((size_t)N * TOKENS * sizeof *tokens);
    for (int r = 0; r < RANKS; r++)
        rank_place[r] = r / (RANKS / PLACES);
    for (int i = 0; i < LAYERS * EXPERTS; i++)
        expert_place[i] = i % EXPERTS / (EXPERTS / PLACES);
    for (int i = 0; i < N; i++) { /* natural language: a few words make up most of a text, and its own words the rest */
        int home = i * 7 % PLACES;
        first[i + 1] = first[i] + TOKENS;
        for (int t = 0; t < TOKENS; t++) {
            double u = (double)below(1 << 30) / (1 << 30);
            tokens[first[i] + t] = (uint32_t)(exp(u * log(128000)) - 1) * (t % 4 ? 1u : (uint32_t)home + 2);
        }
    }
    struct railyard_live *live = railyard_live_new(&job);
    double best = 1e9, observing = 1e9, each;
    for (int i = 0; i < N; i++) {
        memset(counts, 0, sizeof counts);
        for (int l = 0; l < LAYERS; l++)
            for (int e = 0; e < EXPERTS; e++)
                counts[l * EXPERTS + e] =
                    TOKENS * 8 / EXPERTS / (expert_place[l * EXPERTS + e] == i * 7 % PLACES ? 1 : 2);
        each = now();
        ck_assert_int_eq(railyard_live_observe(live, tokens + first[i], TOKENS, counts, NULL, 0), 0);
        each = now() - each;
        if (i > N / 2)
            observing = fmin(observing, each);
    }
    struct railyard_live_plan plan = {.size = sizeof plan};
    for (int i = 0; i < 5; i++) {
        each = now();
        ck_assert_int_eq(railyard_live_place(live, tokens, first, order, &plan), 0);
        best = fmin(best, now() - each);
    }
    printf("%d samples of %d tokens, %d places: dealt in %.1f ms, one learned from in %.2f ms (%s)\n", N, TOKENS,
           PLACES, 1e3 * best, 1e3 * observing, plan.why);
    /* Many times of what it takes, for slow and busy machines. */
    ck_assert_msg(best < 2, "dealing a list takes %g s", best);
    ck_assert_msg(observing < 0.5, "learning from a sample takes %g s", observing);
    railyard_live_free(live);
    free(tokens);
}
END_TEST

/* ---- recorded traces ---- */

enum { BATCHES = 16 };

/* What leaves its place of batches drawn from the samples after the first 1024, which are learned from: by homes over
 * as dealt. */
static double crossing(const struct ry_routing *r, const int *expert_rank, uint64_t seed)
{
    enum { RANKS = 8, SAMPLES = 16, PLACES = 2, N = RANKS * SAMPLES };
    int cells = r->layers * r->experts, T = r->tokens_per_sample;
    int32_t rank_place[RANKS], *expert_place = malloc((size_t)cells * sizeof *expert_place);
    uint32_t *room = malloc((size_t)T * sizeof *room), *counts = malloc((size_t)cells * sizeof *counts), order[N];
    uint32_t *tokens = malloc((size_t)N * (size_t)T * sizeof *tokens),
             *rest = malloc((size_t)r->samples * sizeof *rest);
    double sum[2] = {0, 0};
    for (int i = 0; i < RANKS; i++)
        rank_place[i] = i / (RANKS / PLACES);
    for (int i = 0; i < cells; i++)
        expert_place[i] = expert_rank[i];
    struct railyard_live_job job = {sizeof job, RANKS,  SAMPLES, r->layers,  r->experts,
                                    r->topk,    PLACES, 0,       rank_place, expert_place};
    struct railyard_live *live = railyard_live_new(&job);
    ck_assert_msg(live != NULL, "%s", railyard_live_error());
    for (int i = 0; i < 1024; i++) {
        for (int c = 0; c < cells; c++)
            counts[c] = ry_counts_at(r, i, 0)[c];
        ck_assert_msg(!railyard_live_observe(live, ry_tokens_at(r, i, room), T, counts, NULL, i % 2), "%s",
                      railyard_live_error());
    }
    int n = r->samples - 1024;
    for (int i = 0; i < n; i++)
        rest[i] = (uint32_t)(1024 + i);
    ry_shuffle(rest, (size_t)n, &seed);
    struct railyard_live_plan plan = {.size = sizeof plan};
    for (int b = 0; b < BATCHES; b++) {
        int64_t first[N + 1] = {0};
        for (int i = 0; i < N; i++) {
            memcpy(tokens + first[i], ry_tokens_at(r, (int)rest[b * N + i], room), (size_t)T * sizeof *room);
            first[i + 1] = first[i] + T;
        }
        ck_assert_int_eq(railyard_live_place(live, tokens, first, order, &plan), 0);
        for (int placed = 0; placed < 2; placed++)
            for (int slot = 0; slot < N; slot++)
                for (int c = 0; c < cells; c++)
                    if (expert_place[c] != rank_place[slot / SAMPLES])
                        sum[placed] += ry_counts_at(r, (int)rest[b * N + (placed ? (int)order[slot] : slot)], 0)[c];
    }
    railyard_live_free(live);
    free(expert_place);
    free(room);
    free(counts);
    free(tokens);
    free(rest);
    return sum[1] / sum[0];
}

START_TEST(recorded_traces)
{
    const char *shared = getenv("RY_SHARED");
    char trace[512];
    snprintf(trace, sizeof trace, "%s/traces/gpt-e32-k2", shared ? shared : "");
    struct ry_routing *r = shared ? ry_routing_open(trace, &err) : NULL;
    if (!r) {
        fprintf(stderr, "SKIPPED recorded_traces: no routing traces in RY_SHARED\n");
        return;
    }
    struct ry_cluster *c = ry_place_cluster(2, 1, 0, 0, &err);
    struct ry_coplace_options o = {.starts = 2, .seed = rng};
    struct ry_coplace *map = ry_coplace_learn(c, r, NULL, 1024, NULL, &o, &err);
    ck_assert_msg(map != NULL, "%s", err.msg);
    int *blocks = malloc((size_t)r->layers * (size_t)r->experts * sizeof *blocks);
    ck_assert_int_eq(ry_experts_contiguous(blocks, r->layers, r->experts, 2, &err), 0);
    double plain = crossing(r, blocks, rng), together = crossing(r, map->expert_rank, rng);
    printf("gpt-e32-k2, 2 places, of what leaves as dealt: %.3f with experts in blocks, %.3f co-placed\n", plain,
           together);
    ck_assert_double_lt(plain, 0.95);
    ck_assert_double_lt(together, 0.7);
    free(blocks);
    ry_coplace_free(map);
    ry_cluster_free(c);
    ry_routing_close(r);
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
    tcase_add_test(t, records);
    tcase_add_test(t, recordings_survive);
    tcase_add_test(t, disk_full);
    tcase_add_test(t, refuses);
    tcase_add_test(t, settings);
    tcase_add_test(t, threads);
    if (SANITIZED)
        printf("SKIPPED fast_enough, recorded_traces: they tell nothing more of a sanitized build\n");
    tcase_add_loop_test(t, fast_enough, 0, !SANITIZED);
    tcase_add_loop_test(t, recorded_traces, 0, !SANITIZED);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
