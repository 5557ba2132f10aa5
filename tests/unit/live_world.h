/*
 * live_world.h: a made-up job for tests of live placement, whose samples have homes that their tokens tell.
 *
 * Owns: the job, its samples, a folder for files, the seed. Not: lists and what is expected of them.
 */
#ifndef RY_TESTS_LIVE_WORLD_H
#define RY_TESTS_LIVE_WORLD_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "live/live.h"
#include "place/random.h"
#include "place/routing.h"

static struct ry_err err;
static uint64_t rng;
static char dir[64], path[128], folder[128];

static inline void setup(void)
{
    const char *text = getenv("RY_TEST_SEED");
    rng = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("RY_TEST_SEED=%llu\n", (unsigned long long)rng);
    strcpy(dir, "/tmp/ry-live-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/model", dir);
    snprintf(folder, sizeof folder, "%s/routing", dir);
}

static inline void teardown(void)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
    ck_assert_int_eq(system(cmd), 0);
}

static inline int below(int n)
{
    return (int)ry_random_below(&rng, (uint64_t)n);
}

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

static inline void make(struct world *w, int ranks, int samples, int places, int distinct)
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

static inline void start(struct world *w)
{
    w->live = railyard_live_new(&w->job);
    ck_assert_msg(w->live != NULL, "%s", railyard_live_error());
}

static inline void draw(const struct world *w, struct sample *s, int home)
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

static inline void teach(const struct world *w, int samples)
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

static inline struct railyard_live_state state_of(const struct world *w)
{
    struct railyard_live_state s = {.size = sizeof s};
    ck_assert_msg(!railyard_live_state(w->live, &s), "%s", railyard_live_error());
    return s;
}

/* The recording, of so many samples. */
static inline struct ry_routing *opened(int samples)
{
    struct ry_routing *r = ry_routing_open(folder, &err);
    ck_assert_msg(r != NULL, "%s", err.msg);
    ck_assert_int_eq(r->samples, samples);
    return r;
}

#endif
