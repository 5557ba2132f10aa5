/* test_plan_verify.c: the verifier on plans that are wrong: broken on purpose, at random, and by hand. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan_help.h"

static void insert(struct ry_plan **pp, int at, struct ry_step step)
{
    struct ry_plan *p = realloc(*pp, sizeof *p + ((size_t)(*pp)->nsteps + 1) * sizeof step);
    p->steps = (struct ry_step *)(p + 1);
    memmove(p->steps + at + 1, p->steps + at, (size_t)(p->nsteps - at) * sizeof step);
    p->steps[at] = step;
    p->nsteps++;
    *pp = p;
}

static void drop(struct ry_plan *p, int at)
{
    memmove(p->steps + at, p->steps + at + 1, (size_t)(p->nsteps - at - 1) * sizeof *p->steps);
    p->nsteps--;
}

/* Where the partner of `rank`'s transfer `i` is: the same in number of those between the two. */
static struct ry_step *partner(struct job *job, int rank, int i, int *index)
{
    const struct ry_step *s = &job->plans[rank]->steps[i];
    struct ry_plan *q = job->plans[s->peer];
    int nth = 0;
    for (int k = 0; k < i; k++)
        nth += job->plans[rank]->steps[k].kind == s->kind && job->plans[rank]->steps[k].peer == s->peer;
    for (int k = 0; k < q->nsteps; k++)
        if (q->steps[k].kind != RY_STEP_COPY && q->steps[k].kind != s->kind && q->steps[k].peer == rank && !nth--) {
            *index = k;
            return &q->steps[k];
        }
    ck_abort_msg("no partner");
    return NULL;
}

/* Group 1 comes first and is called 0. */
static void swap_groups(struct ry_plan *p)
{
    struct ry_step *old = malloc((size_t)p->nsteps * sizeof *old);
    int n = 0;
    memcpy(old, p->steps, (size_t)p->nsteps * sizeof *old);
    for (int group = -1; group < 2; group++)
        for (int i = 0; i < p->nsteps; i++)
            if (old[i].group == (group < 0 ? -1 : 1 - group)) {
                p->steps[n] = old[i];
                p->steps[n++].group = group;
            }
    free(old);
}

enum {
    DROP,
    DROP_BOTH,
    DUPLICATE,
    DUPLICATE_BOTH,
    SHORTER,
    SHORTER_BOTH,
    LONGER,
    ZERO,
    PEER,
    FROM_OFFSET,
    TO_OFFSET,
    FROM_SEGMENT,
    TO_SEGMENT,
    SWAP_IN_PAIR,
    COPY_LATE,
    SWAP_GROUPS,
    ONE_GROUP,
    NO_GROUP,
    NGROUPS,
    STAGE_BYTES,
    KIND,
    INSIDE,
    LEAVES,
    MUTATIONS
};

/* Break step `i` of `rank` in way `how`; false where that cannot be done, or need not make the plan wrong. */
static bool mutate(struct job *job, int rank, int i, int how)
{
    struct ry_plan *p = job->plans[rank];
    struct ry_step *s = &p->steps[i], copy = *s;
    bool transfer = s->kind != RY_STEP_COPY;
    int other = (rank + 1 + (int)rnd((uint64_t)(job->n - 1))) % job->n, j;
    switch (how) {
    case DROP:
        drop(p, i);
        return true;
    case DROP_BOTH:
        if (!transfer || s->peer == rank)
            return false;
        partner(job, rank, i, &j);
        drop(job->plans[s->peer], j);
        drop(p, i);
        return true;
    case DUPLICATE: /* a copy once more is the same copy */
        if (transfer)
            insert(&job->plans[rank], i, copy);
        return transfer;
    case DUPLICATE_BOTH:
        if (!transfer || s->peer == rank)
            return false;
        copy = *partner(job, rank, i, &j);
        insert(&job->plans[s->peer], j, copy);
        insert(&job->plans[rank], i, *s);
        return true;
    case SHORTER:
        s->bytes--;
        return true;
    case SHORTER_BOTH:
        if (!transfer)
            return false;
        partner(job, rank, i, &j)->bytes--;
        s->bytes--;
        return true;
    case LONGER:
        s->bytes++;
        return transfer;
    case ZERO:
        s->bytes = 0;
        return true;
    case PEER:
        s->peer = transfer && s->peer == other ? rank : other;
        return true;
    case FROM_OFFSET:
        s->from.offset++;
        return s->kind != RY_STEP_RECV;
    case TO_OFFSET:
        s->to.offset++;
        return transfer && s->kind != RY_STEP_SEND;
    case FROM_SEGMENT:
        s->from.peer = s->from.peer == other ? rank : other;
        return s->kind != RY_STEP_RECV;
    case TO_SEGMENT:
        s->to.peer = s->to.peer == other ? rank : other;
        return s->kind != RY_STEP_SEND;
    case SWAP_IN_PAIR:
        for (j = i + 1; transfer && j < p->nsteps; j++)
            if (p->steps[j].kind == s->kind && p->steps[j].peer == s->peer && p->steps[j].group == s->group) {
                *s = p->steps[j];
                p->steps[j] = copy;
                return true;
            }
        return false;
    case COPY_LATE:
        if (transfer)
            return false;
        drop(p, i);
        insert(&job->plans[rank], p->nsteps, copy);
        return true;
    case SWAP_GROUPS: /* of a relay: it passes on before anything came */
        if (!transfer || s->group != 1 || s->from.place != RY_AT_STAGE || s->kind != RY_STEP_SEND)
            return false;
        swap_groups(p);
        return true;
    case ONE_GROUP: /* a relay passes on while it receives */
        if (s->group != 1 || s->kind != RY_STEP_SEND || s->from.place != RY_AT_STAGE)
            return false;
        for (j = 0; j < p->nsteps; j++)
            p->steps[j].group = p->steps[j].group < 0 ? -1 : 0;
        return true;
    case NO_GROUP:
        s->group = p->ngroups;
        return true;
    case NGROUPS:
        p->ngroups++;
        return true;
    case STAGE_BYTES:
        if (!p->stage_bytes)
            return false;
        p->stage_bytes -= 256; /* into the last message */
        return true;
    case KIND:
        s->kind = s->kind == RY_STEP_SEND ? RY_STEP_RECV : RY_STEP_SEND;
        return true;
    case INSIDE: /* the others take another communicator for a group */
        p->inside ^= 1;
        return true;
    case LEAVES:
        if (!transfer || s->group != 0 || job->cluster->node[s->peer] == job->cluster->node[rank])
            return false;
        for (int r = 0; r < job->n; r++)
            job->plans[r]->inside |= 1;
        return true;
    }
    return false;
}

static const char *const mutation_names[MUTATIONS] = {
    "drop",      "drop both",   "duplicate", "duplicate both", "shorter",    "shorter both", "longer",    "zero",
    "peer",      "from offset", "to offset", "from segment",   "to segment", "swap in pair", "copy late", "swap groups",
    "one group", "no group",    "ngroups",   "stage bytes",    "kind",       "inside",       "leaves"};

/* Every way to break a plan, often; each must be found. */
START_TEST(mutations)
{
    int tried[MUTATIONS] = {0};
    for (int round = 0; round < ROUNDS_OF(6000) || (round < 10 * 6000 && fewest(tried, MUTATIONS) < ROUNDS_OF(5)); round++) {
        struct ry_err err = {""};
        struct job job = random_job(2 + (int)rnd(11), 1 + rnd(600), rnd(2));
        int rank = (int)rnd((uint64_t)job.n), how = round % MUTATIONS;
        build_all(&job, rnd(4) ? RY_HIERARCHICAL : RY_DIRECT);
        int n = job.plans[rank]->nsteps, at = n ? (int)rnd((uint64_t)n) : 0;
        for (int k = 0; k < n; k++) {                    /* the first step from there on that it can be done to */
            int i = how == COPY_LATE ? k : (at + k) % n; /* copies come first */
            struct ry_step before = job.plans[rank]->steps[i];
            if (mutate(&job, rank, i, how)) {
                tried[how]++;
                ck_assert_msg(verify(&job, &err), "round %d: rank %d, step %d broken by '%s': not found", round, rank,
                              i, mutation_names[how]);
                ck_assert_msg(strstr(err.msg, "rank ") != NULL, "names no rank: %s", err.msg);
                break;
            }
            job.plans[rank]->steps[i] = before;
        }
        free_job(&job);
    }
    for (int how = 0; how < MUTATIONS; how++)
        ck_assert_msg(tried[how] >= ROUNDS_OF(5), "'%s' was tried %d times only", mutation_names[how], tried[how]);
}
END_TEST

/* Whatever was changed: what the verifier accepts gives the right bytes. */
START_TEST(accepted_is_right)
{
    int accepted = 0, refused = 0;
    for (int round = 0; round < 3000; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(2 + (int)rnd(7), 1 + rnd(60), true);
        make_real(&job, &mem, (int)rnd(4));
        build_all(&job, RY_HIERARCHICAL);
        for (int k = 1 + (int)rnd(2); k; k--) {
            int rank = (int)rnd((uint64_t)job.n), n = job.plans[rank]->nsteps;
            struct ry_step *steps = job.plans[rank]->steps;
            if (!n)
                continue;
            int i = (int)rnd((uint64_t)n), j = (int)rnd((uint64_t)n), how = (int)rnd(MUTATIONS + 8);
            if (how < MUTATIONS && how != DROP_BOTH && how != DUPLICATE_BOTH &&
                how != SHORTER_BOTH) { /* pairs may be gone */
                mutate(&job, rank, i, how);
            } else { /* swap any two steps: harmless within a group, mostly */
                struct ry_step t = steps[i];
                steps[i] = steps[j];
                steps[j] = t;
            }
        }
        if (verify(&job, &err)) {
            refused++;
        } else {
            accepted++;
            const char *why = interpret(&job, &mem);
            ck_assert_msg(!*why, "round %d: accepted, but %s", round, why);
        }
        free_memory(&job, &mem);
        free_job(&job);
    }
    printf("changed plans: %d accepted and right, %d refused\n", accepted, refused);
    ck_assert_int_gt(accepted, 100);
    ck_assert_int_gt(refused, 1000);
}
END_TEST

/* Plans by hand: what they end in is known to the letter. */
static void expect_refused(int n, const uint64_t *matrix, struct ry_plan *plans, const char *text)
{
    struct ry_err err = {""};
    struct ry_cluster *c = cluster_of(n, blocks, 1);
    struct ry_plan *p[4];
    for (int r = 0; r < n; r++)
        p[r] = &plans[r];
    int rc = ry_plan_verify(c, matrix, p, &err);
    if (text)
        ck_assert_msg(rc && strstr(err.msg, text), "wanted '%s', got '%s'", text, rc ? err.msg : "(accepted)");
    else
        ck_assert_msg(!rc, "%s", err.msg);
    ry_cluster_free(c);
}

#define SEND(g, p, b)                                                                                                  \
    {                                                                                                                  \
        .kind = RY_STEP_SEND, .group = g, .peer = p, .from = {RY_AT_SEND, p, 0}, .bytes = b                            \
    }
#define RECV(g, p, b)                                                                                                  \
    {                                                                                                                  \
        .kind = RY_STEP_RECV, .group = g, .peer = p, .to = {RY_AT_RECV, p, 0}, .bytes = b                              \
    }
#define AT(place, peer, offset)                                                                                        \
    {                                                                                                                  \
        place, peer, offset                                                                                            \
    }
#define COPY(t, f, b)                                                                                                  \
    {                                                                                                                  \
        .kind = RY_STEP_COPY, .group = -1, .peer = -1, .to = t, .from = f, .bytes = b                                  \
    }
#define PLAN(r, n, groups, stage, steps)                                                                               \
    {                                                                                                                  \
        RY_DIRECT, r, n, groups, stage, (int)(sizeof steps / sizeof *steps), steps, 0, 0                               \
    }

START_TEST(by_hand)
{
    uint64_t m2[] = {0, 8, 8, 0};
    { /* each sends in a group of its own first: NCCL's sends wait for their receives */
        struct ry_step a[] = {SEND(0, 1, 8), RECV(1, 1, 8)}, b[] = {SEND(0, 0, 8), RECV(1, 0, 8)};
        struct ry_plan p[] = {PLAN(0, 2, 2, 0, a), PLAN(1, 2, 2, 0, b)};
        expect_refused(2, m2, p,
                       "waits in a circle: rank 0 (step 0, group 0) for rank 1, rank 1 (step 0, group 0) for rank 0");
        b[0] = (struct ry_step)RECV(0, 0, 8);
        b[1] = (struct ry_step)SEND(1, 0, 8);
        expect_refused(2, m2, p, NULL);
        b[1].bytes = 7;
        expect_refused(2, m2, p, "rank 1, step 1 (group 1: send 7 bytes to rank 0): is met by rank 0, step 1");
        b[1].bytes = 8;
        a[0].from.offset = 4;
        expect_refused(
            2, m2, p,
            "rank 0, step 0 (group 0: send 8 bytes to rank 1): overruns send segment 1 of 8 bytes, from offset 4");
    }
    { /* three in a circle, each fine with one neighbour */
        uint64_t m[] = {0, 8, 0, 0, 0, 8, 8, 0, 0};
        struct ry_step a[] = {SEND(0, 1, 8), RECV(1, 2, 8)}, b[] = {SEND(0, 2, 8), RECV(1, 0, 8)},
                       c[] = {SEND(0, 0, 8), RECV(1, 1, 8)};
        struct ry_plan p[] = {PLAN(0, 3, 2, 0, a), PLAN(1, 3, 2, 0, b), PLAN(2, 3, 2, 0, c)};
        expect_refused(3, m, p, "waits in a circle");
    }
    { /* the same bytes twice, by halves that overlap, in two groups */
        uint64_t m[] = {0, 8, 0, 0};
        struct ry_step a[] = {SEND(0, 1, 6), SEND(1, 1, 4)}, b[] = {RECV(0, 0, 6), RECV(1, 0, 4)};
        struct ry_plan p[] = {PLAN(0, 2, 2, 0, a), PLAN(1, 2, 2, 0, b)};
        a[1].from.offset = 4, b[1].to.offset = 4;
        expect_refused(
            2, m, p,
            "rank 1, step 1 (group 1: receive 4 bytes from rank 0): offset 4 of receive segment 0 is written twice");
        a[1].group = b[1].group = 0;
        expect_refused(2, m, p, "touch the same memory, at offset 4");
        a[1] = (struct ry_step)SEND(1, 1, 1), b[1] = (struct ry_step)RECV(1, 0, 1);
        a[1].from.offset = 6, b[1].to.offset = 6;
        expect_refused(2, m, p, "rank 1: offset 7 of receive segment 0 is never written");
        a[1].bytes = b[1].bytes = 2;
        expect_refused(2, m, p, NULL);
        a[1].from.offset = 5;
        expect_refused(2, m, p,
                       "wrong source: offset 6 of receive segment 0 gets offset 5 of what rank 0 sends to rank 1");
    }
    { /* through staging memory, which may be used again; and what was received may be read */
        uint64_t m[] = {8, 0, 0, 0};
        struct ry_step a[] = {COPY(AT(RY_AT_STAGE, -1, 0), AT(RY_AT_SEND, 0, 0), 8),
                              COPY(AT(RY_AT_STAGE, -1, 0), AT(RY_AT_SEND, 0, 4), 4),
                              COPY(AT(RY_AT_RECV, 0, 0), AT(RY_AT_SEND, 0, 0), 4),
                              COPY(AT(RY_AT_RECV, 0, 4), AT(RY_AT_STAGE, -1, 0), 4)};
        struct ry_plan p[] = {PLAN(0, 2, 0, 8, a), {RY_DIRECT, 1, 2, 0, 0, 0, NULL, 0, 0}};
        expect_refused(2, m, p, NULL);
        a[3].from.offset = 4;
        expect_refused(2, m, p, NULL); /* the first copy left the same bytes there */
        a[3].from.offset = 3;
        expect_refused(2, m, p,
                       "wrong source: offset 4 of receive segment 0 gets offset 7 of what rank 0 sends to rank 0");
        a[0].bytes = 6, a[3].from.offset = 4;
        expect_refused(2, m, p,
                       "rank 0, step 3 (copy 4 bytes): reads what was never written, at offset 6 of staging memory");
        a[3].from = (struct ry_at){RY_AT_RECV, 0, 2};
        expect_refused(2, m, p, "rank 0, step 3 (copy 4 bytes): onto itself, at offset 4");
        a[3].from = (struct ry_at){RY_AT_RECV, 0, 0};
        expect_refused(2, m, p, "wrong source: offset 4 of receive segment 0 gets offset 0 of");
        a[0].bytes = 9;
        expect_refused(2, m, p, "overruns staging memory: offset 0 in 8 bytes");
        p[0].stage_bytes = 9;
        expect_refused(2, m, p, "overruns send segment 0 of 8 bytes");
    }
}
END_TEST

/* Buffers that overlap, and steps that run on into the next segment where there is none, or one that is not meant. */
START_TEST(addresses)
{
    uint64_t m[] = {4, 8, 0, 0};
    uintptr_t send[] = {100, 104}, recv0[] = {200, 0}, recv1[] = {300, 0};
    const uintptr_t *send_at[] = {send, NULL}, *recv_at[] = {recv0, recv1};
    struct ry_err err = {""};
    struct ry_cluster *c = cluster_of(2, blocks, 1);
    struct ry_step a[] = {SEND(0, 1, 8), SEND(0, 0, 4), RECV(0, 0, 4)}, b[] = {RECV(0, 0, 8)};
    struct ry_plan pa = PLAN(0, 2, 1, 0, a), pb = PLAN(1, 2, 1, 0, b), *p[] = {&pa, &pb};
#define REFUSED(text)                                                                                                  \
    do {                                                                                                               \
        ck_assert_int_eq(ry_plan_verify_at(c, m, p, send_at, recv_at, &err), -1);                                      \
        ck_assert_msg(strstr(err.msg, text) != NULL, "%s", err.msg);                                                   \
    } while (0)
    ck_assert_msg(!ry_plan_verify_at(c, m, p, send_at, recv_at, &err), "%s", err.msg);
    a[0].from = (struct ry_at){RY_AT_SEND, 0, 3}; /* one byte of another segment */
    REFUSED("wrong source: offset 0 of receive segment 0 gets the byte at address 0x67 of rank 0");
    a[0].from = (struct ry_at){RY_AT_SEND, 1, 1};
    REFUSED("overruns send segment 1 of 8 bytes, from offset 1");
    a[0].from.offset = 0;
    recv0[0] = 107; /* in place */
    REFUSED("rank 0: its buffers overlap");
    recv0[0] = 112;
    ck_assert_msg(!ry_plan_verify_at(c, m, p, send_at, recv_at, &err), "%s", err.msg);
    send[0] = 104; /* the same bytes to two ranks */
    ck_assert_msg(!ry_plan_verify_at(c, m, p, send_at, recv_at, &err), "%s", err.msg);
    a[0].from.peer = 0; /* begins in the one, runs on into the other: right, as they lie */
    ck_assert_msg(!ry_plan_verify_at(c, m, p, send_at, recv_at, &err), "%s", err.msg);
    send[0] = 96; /* nothing follows any more */
    REFUSED("overruns send segment 0 of 4 bytes");
    ry_cluster_free(c);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {by_hand, addresses, mutations, accepted_is_right, NULL};
    return run_tests("plan_verify", tests);
}
