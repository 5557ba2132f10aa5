/*
 * test_plan_sum.c: plans that add up rows on their way back: proved for random jobs and rows, carried out on host
 * memory with numbers, broken in every way that a verifier must find, and what plan.h promises of them.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "plan_help.h"

static uint64_t cell(const struct job *job, int from, int to)
{
    return job->matrix[(size_t)from * (size_t)job->n + (size_t)to];
}

/* What rank `to` got from a node by dedup: the message that comes back for it, 0 where nothing was packed. */
static uint64_t sums(const struct job *job, int node, int to)
{
    struct ry_repeats r = job->repeats[to * job->cluster->nnodes + node];
    uint64_t rows = 0, bytes = 0;
    for (int p = 0; p < job->n; p++)
        if (job->cluster->node[p] == node) {
            rows += r.row_bytes ? ry_rows_of(cell(job, p, to), r.row_bytes) : 0;
            bytes += cell(job, p, to);
        }
    if (node == job->cluster->node[to] || !ry_packs(r, rows, bytes))
        return 0;
    r.distinct++;
    return ry_packed_bytes(r, rows);
}

/* Groups, and that nothing crosses but sums, and what was not packed. Adds up how often what happened. */
struct seen {
    long sums, alone, plain, given, out;
};
static void check_promises(const struct job *job, struct seen *seen)
{
    const struct ry_cluster *c = job->cluster;
    for (int r = 0; r < job->n; r++) {
        const struct ry_plan *p = job->plans[r];
        ck_assert_int_eq(p->ngroups, c->nnodes > 1 && c->nnodes < c->nranks ? 2 : 1);
        ck_assert_uint_eq(p->inside, p->ngroups > 1 ? 1 : 0);
        int *crossed = calloc((size_t)job->n, sizeof *crossed);
        for (int i = 0; i < p->nsteps; i++) {
            const struct ry_step *s = &p->steps[i];
            bool across = ry_is_transfer(s) && c->node[s->peer] != c->node[r];
            uint64_t message = across ? sums(job, c->node[r], s->peer) : 0;
            ck_assert_int_ne(s->kind, RY_STEP_PACK);
            ck_assert_int_ne(s->kind, RY_STEP_COPY);
            ck_assert(!across || s->group == p->ngroups - 1);
            if (s->kind == RY_STEP_SEND && across) {
                ck_assert_int_eq(crossed[s->peer]++, 0);
                ck_assert_uint_eq(s->bytes, message ? message : cell(job, r, s->peer));
                ck_assert(!message || ry_relay(c, s->peer, c->node[r]) == r);
                seen->plain += !message;
            }
            if (s->kind == RY_STEP_SUM) {
                ck_assert_uint_eq(s->to.offset % 256, 0);
                ck_assert(s->from.place == RY_AT_SEND || s->from.offset % 256 == 0);
                *(s->from.place == RY_AT_SEND ? &seen->alone : &seen->sums) += 1;
            }
            seen->given += s->kind == RY_STEP_SEND && p->ngroups > 1 && s->group == 0;
            seen->out += s->kind == RY_STEP_EXPAND;
        }
        for (int to = 0; to < job->n; to++)
            if (c->node[to] != c->node[r])
                ck_assert_int_eq(crossed[to],
                                 sums(job, c->node[r], to) ? ry_relay(c, to, c->node[r]) == r : cell(job, r, to) > 0);
        free(crossed);
    }
}

START_TEST(random_jobs)
{
    struct seen seen = {0};
    for (int round = 0; round < 500; round++) {
        static const uint64_t most[] = {7, 300, 4099};
        int n = round % 8 ? 1 + (int)rnd(12) : 1 + (int)rnd(48);
        struct job job = random_job(n, most[n > 20 ? 1 : rnd(3)], true);
        struct ry_err err = {""};
        random_whole_rows(&job);
        turn_round(&job);
        build_all(&job, RY_SUM);
        ck_assert_msg(!verify(&job, &err), "round %d, %d ranks on %d nodes: %s", round, n, job.cluster->nnodes,
                      err.msg);
        check_promises(&job, &seen);
        free_job(&job);
    }
    printf("across: %ld sums, %ld of them of a relay's own rows alone, %ld pieces as they are; %ld given to relays; "
           "%ld pieces "
           "written out\n",
           seen.sums + seen.alone, seen.alone, seen.plain, seen.given, seen.out);
    ck_assert(seen.sums > 1000 && seen.alone > 300 && seen.plain > 1000 && seen.given > 1000 && seen.out > 1000);
}
END_TEST

START_TEST(real_memory)
{
    struct seen seen = {0};
    for (int round = 0; round < 200; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(1 + (int)rnd(12), 1 + rnd(rnd(2) ? 80 : 900), true);
        random_whole_rows(&job);
        turn_round(&job);
        make_real(&job, &mem, (int)rnd(4));
        job.blind = rnd(2);
        build_all(&job, RY_SUM);
        ck_assert_msg(!verify(&job, &err), "%s", err.msg);
        check_promises(&job, &seen);
        const char *why = interpret(&job, &mem);
        ck_assert_msg(!*why, "%d ranks: %s", job.n, why);
        free_memory(&job, &mem);
        free_job(&job);
    }
    ck_assert(seen.sums > 50);
}
END_TEST

/* ---- plans that are wrong ---- */

enum {
    SKIP,
    DISTINCT,
    ROW_BYTES,
    ROWS,
    SENDER,
    SEGMENT,
    SUM_EARLY,
    SUM_LATE,
    EXPAND_EARLY,
    DROPPED,
    RANK_MISSING,
    PIECE_ORDER,
    PIECES_SWAPPED,
    GIVEN_TO_OTHER,
    SOURCES_SWAPPED,
    MESSAGES_SWAPPED,
    NOT_ADDED_UP,
    IN_A_GROUP,
    NOT_STAGED,
    TOO_SHORT,
    TOO_LONG,
    ONTO_ITSELF,
    GROUP_LEAVES,
    PACKS,
    MUTATIONS
};
static const char *const mutation_names[MUTATIONS] = {
    "skip",           "distinct",       "row bytes",       "rows",
    "sender",         "segment",        "sum early",       "sum late",
    "expand early",   "dropped",        "rank missing",    "piece order",
    "pieces swapped", "given to other", "sources swapped", "messages swapped",
    "not added up",   "in a group",     "not staged",      "too short",
    "too long",       "onto itself",    "group leaves",    "packs"};

static void move(struct ry_plan *p, int from, int to)
{
    struct ry_step s = p->steps[from];
    memmove(p->steps + from, p->steps + from + 1, (size_t)(p->nsteps - from - 1) * sizeof s);
    memmove(p->steps + to + 1, p->steps + to, (size_t)(p->nsteps - to - 1) * sizeof s);
    p->steps[to] = s;
}

static void drop(struct ry_plan *p, int i)
{
    move(p, i, p->nsteps - 1);
    p->nsteps--;
}

/* Another step like `s`, whose field `kind` and group are the same; NULL. */
static struct ry_step *another(struct ry_plan *p, const struct ry_step *s)
{
    for (int i = 0, at = (int)rnd((uint64_t)p->nsteps); i < p->nsteps; i++) {
        struct ry_step *t = &p->steps[(at + i) % p->nsteps];
        if (t != s && t->kind == s->kind && t->group == s->group)
            return t;
    }
    return NULL;
}

static void swap(struct ry_at *a, struct ry_at *b)
{
    struct ry_at t = *a;
    *a = *b;
    *b = t;
}

/* Break step `i`, false where `how` says nothing of such a step. */
static bool mutate(struct job *job, int rank, int i, int how)
{
    struct ry_plan *p = job->plans[rank], *q;
    struct ry_step *s = &p->steps[i], *other = another(p, s);
    bool expands = s->kind == RY_STEP_EXPAND, adds = s->kind == RY_STEP_SUM, rows = expands || adds;
    bool gathers = s->kind == RY_STEP_RECV && s->group == 0 && p->ngroups == 2;
    uint64_t own_rows = expands ? ry_rows_of(s->bytes, s->repeats.row_bytes) : 0;
    switch (how) {
    case SKIP: /* by a run of equal rows, of a piece that gets a sum */
        s->skip = s->skip >= 3 ? s->skip - 3 : s->skip + 3;
        return own_rows >= 3 && own_rows + 3 <= s->rows;
    case DISTINCT:
        s->repeats.distinct += rnd(2) ? 1 : UINT64_MAX;
        return rows;
    case ROW_BYTES:
        s->repeats.row_bytes += rnd(2) ? 1 : UINT64_MAX;
        return rows;
    case ROWS:
        s->rows += rnd(2) ? 1 : UINT64_MAX;
        return rows;
    case SENDER:
        s->peer = (s->peer + 1 + (int)rnd((uint64_t)job->n - 1)) % job->n;
        return rows;
    case SEGMENT:
        s->to.peer = (s->to.peer + 1) % job->n;
        return expands;
    case SUM_EARLY:
        if (!adds || s->from.place == RY_AT_SEND)
            return false;
        move(p, i, 0);
        return true;
    case SUM_LATE:
        if (adds)
            move(p, i, p->nsteps - 1);
        return adds;
    case EXPAND_EARLY:
        if (expands)
            move(p, i, 0);
        return expands;
    case DROPPED:
        if (rows)
            drop(p, i);
        return rows;
    case RANK_MISSING: /* one rank's rows are not given to the relay, on both sides */
        if (!gathers)
            return false;
        q = job->plans[s->peer];
        for (int k = 0, nth = 0, seen = 0; k < q->nsteps; k++) {
            nth = 0;
            for (int j = 0; j < i; j++)
                nth += p->steps[j].kind == RY_STEP_RECV && p->steps[j].peer == s->peer;
            if (q->steps[k].kind == RY_STEP_SEND && q->steps[k].peer == rank && seen++ == nth) {
                bool before = q == p && k < i;
                drop(q, k);
                drop(p, i - before);
                return true;
            }
        }
        return false;
    case PIECE_ORDER: /* two ranks' rows of one gather, the other way round */
        other = s + 1;
        if (!gathers || i + 1 == p->nsteps || other->kind != s->kind || other->group ||
            other->to.offset != s->to.offset + s->bytes)
            return false;
        other->to.offset = s->to.offset;
        s->to.offset += other->bytes;
        return true;
    case PIECES_SWAPPED: /* of whichever gathers */
        if (!gathers || !other || other->bytes != s->bytes)
            return false;
        swap(&s->to, &other->to);
        return true;
    case GIVEN_TO_OTHER: /* rows for another rank */
        if (s->kind != RY_STEP_SEND || s->group || p->ngroups < 2)
            return false;
        for (int to = 0; to < job->n; to++)
            if (to != s->from.peer && cell(job, rank, to) == s->bytes) {
                s->from.peer = to;
                return true;
            }
        return false;
    case SOURCES_SWAPPED:
        if (!adds || !other)
            return false;
        if (rnd(2))
            swap(&s->from, &other->from);
        else
            swap(&s->to, &other->to);
        return s->bytes == other->bytes;
    case MESSAGES_SWAPPED:
        if (!expands || !other || other->peer == s->peer)
            return false;
        swap(&s->from, &other->from);
        return true;
    case NOT_ADDED_UP: /* the rows themselves are sent */
        if (s->kind != RY_STEP_SEND || s->from.place != RY_AT_STAGE)
            return false;
        for (int k = 0; k < p->nsteps; k++)
            if (p->steps[k].kind == RY_STEP_SUM && p->steps[k].to.offset == s->from.offset)
                s->from = p->steps[k].from;
        return true;
    case IN_A_GROUP:
        s->group = 0;
        return rows;
    case NOT_STAGED:
        *(adds ? &s->to : &s->from) = (struct ry_at){RY_AT_SEND, 0, 0};
        return rows;
    case TOO_SHORT:
        s->bytes--;
        return rows;
    case TOO_LONG:
        s->bytes += expands ? s->rows * s->repeats.row_bytes : 1;
        return rows;
    case ONTO_ITSELF:
        s->to.offset = s->from.offset + 16 * rnd(1 + s->bytes / 16);
        return adds && s->from.place == RY_AT_STAGE && s->to.offset < s->from.offset + s->rows * s->repeats.row_bytes;
    case GROUP_LEAVES:
        for (int r = 0; p->ngroups == 2 && r < job->n; r++)
            job->plans[r]->inside = 3;
        return p->ngroups == 2 && s->kind == RY_STEP_SEND && job->cluster->node[s->peer] != job->cluster->node[rank];
    case PACKS:
        s->kind = RY_STEP_PACK;
        return rows;
    }
    return false;
}

/* Jobs in which two rows in a row are equal, the third is not: every mistake shows. */
START_TEST(mutations)
{
    int tried[MUTATIONS] = {0};
    for (int round = 0; round < ROUNDS_OF(6000) || (round < 10 * 6000 && fewest(tried, MUTATIONS) < ROUNDS_OF(10)); round++) {
        struct ry_err err = {""};
        struct job job = random_job(2 + (int)rnd(9), 20 + rnd(3000), true);
        int rank = (int)rnd((uint64_t)job.n), how = round % MUTATIONS;
        uint64_t row_bytes = 1 + rnd(100);
        for (int k = 0; k < job.n * job.n; k++)
            job.matrix[k] = job.matrix[k] / row_bytes * row_bytes;
        even_rows(&job, row_bytes, 3);
        turn_round(&job);
        build_all(&job, RY_SUM);
        ck_assert_msg(!verify(&job, &err), "%s", err.msg);
        int n = job.plans[rank]->nsteps;
        for (int k = 0, at = n ? (int)rnd((uint64_t)n) : 0; k < n; k++) {
            struct ry_plan *p = job.plans[rank];
            size_t size = (size_t)n * sizeof *p->steps;
            struct ry_step *before = malloc(size);
            memcpy(before, p->steps, size);
            bool done = mutate(&job, rank, (at + k) % n, how);
            if (done) {
                tried[how]++;
                ck_assert_msg(verify(&job, &err), "round %d: rank %d, step %d broken by '%s': not found", round, rank,
                              (at + k) % n, mutation_names[how]);
                ck_assert_msg(strstr(err.msg, "rank ") != NULL, "names no rank: %s", err.msg);
            } else {
                memcpy(p->steps, before, size);
                for (int r = 0; r < job.n; r++)
                    job.plans[r]->inside = p->ngroups == 2;
            }
            free(before);
            if (done)
                break;
        }
        free_job(&job);
    }
    for (int how = 0; how < MUTATIONS; how++)
        ck_assert_msg(tried[how] >= ROUNDS_OF(10), "'%s' was tried %d times only", mutation_names[how], tried[how]);
}
END_TEST

/* Whatever was changed: what the verifier accepts gives the right numbers. */
START_TEST(accepted_is_right)
{
    int accepted = 0, refused = 0;
    for (int round = 0; round < 3000; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(3 + (int)rnd(6), 1 + rnd(400), true);
        random_whole_rows(&job);
        turn_round(&job);
        make_real(&job, &mem, (int)rnd(4));
        job.blind = rnd(2);
        build_all(&job, RY_SUM);
        for (int k = 1 + (int)rnd(2); k; k--) {
            struct ry_plan *p = job.plans[rnd((uint64_t)job.n)];
            if (!p->nsteps)
                continue;
            struct ry_step *s = &p->steps[rnd((uint64_t)p->nsteps)], *t = &p->steps[rnd((uint64_t)p->nsteps)], copy;
            for (int tries = 8; tries && s->kind != RY_STEP_EXPAND && s->kind != RY_STEP_SUM; tries--)
                s = &p->steps[rnd((uint64_t)p->nsteps)];
            copy = *s;
            bool expands = s->kind == RY_STEP_EXPAND;
            switch (rnd(6)) {
            case 0:
                *s = *t, *t = copy;
                break;
            case 1:
                s->skip = expands ? rnd(s->rows) : 0;
                break;
            case 2:
                s->from.offset += s->kind == RY_STEP_RECV ? 0 : 16 * rnd(40);
                break;
            case 3:
                s->to.offset += s->kind == RY_STEP_SEND ? 0 : rnd(3) * 16;
                break;
            case 4:
                if (expands || s->kind == RY_STEP_SUM)
                    s->from = t->kind == RY_STEP_RECV ? t->to : s->from;
                break;
            default:
                if (expands && t->kind == RY_STEP_EXPAND)
                    s->skip = t->skip, s->peer = t->peer;
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
    ck_assert_int_gt(refused, 500);
}
END_TEST

/* ---- by hand ---- */

/* Two nodes of two; rank 0 sent 100 rows of 64 bytes to rank 2 and 60 to rank 3, 50 of them distinct: what comes back
   of them is 51 rows and 160 entries. Rank 1 sent 10 rows to rank 3, its relay, 5 distinct, and rank 3 alone adds them
   up. */
START_TEST(to_the_letter)
{
    struct ry_err err = {""};
    struct job job = {.n = 4, .cluster = cluster_of(4, blocks, 2), .matrix = calloc(16, sizeof *job.matrix)};
    job.matrix[2] = 6400, job.matrix[3] = 3840, job.matrix[4 + 3] = 640, job.matrix[8 + 3] = 77;
    job.repeats = calloc(8, sizeof *job.repeats);
    job.repeats[1] = (struct ry_repeats){.row_bytes = 64, .distinct = 50};
    job.repeats[2 + 1] = (struct ry_repeats){.row_bytes = 64, .distinct = 5};
    turn_round(&job);
    build_all(&job, RY_SUM);
    const struct ry_step *s = job.plans[2]->steps;
    ck_assert_int_eq(job.plans[2]->nsteps, 6);
    ck_assert(s[0].kind == RY_STEP_SEND && s[0].group == 0 && s[0].peer == 2 && s[0].bytes == 6400 &&
              s[0].from.peer == 0);
    ck_assert(s[1].kind == RY_STEP_RECV && s[1].group == 0 && s[1].peer == 2 && s[1].to.offset == 0);
    ck_assert(s[2].kind == RY_STEP_RECV && s[2].group == 0 && s[2].peer == 3 && s[2].to.offset == 6400 &&
              s[2].bytes == 3840);
    ck_assert(s[3].kind == RY_STEP_SUM && s[3].peer == 0 && s[3].from.place == RY_AT_STAGE && s[3].from.offset == 0 &&
              s[3].to.offset == 10240 && s[3].bytes == 51 * 64 + 160 * 4 && s[3].rows == 160 &&
              s[3].repeats.distinct == 50);
    ck_assert(s[4].kind == RY_STEP_SEND && s[4].group == 1 && s[4].peer == 0 && s[4].from.offset == 10240 &&
              s[4].bytes == s[3].bytes);
    ck_assert(s[5].kind == RY_STEP_RECV && s[5].group == 1 && s[5].peer == 3 && s[5].bytes == 77);
    ck_assert_uint_eq(job.plans[2]->stage_bytes, 10240 + 4096);
    s = job.plans[3]->steps;
    ck_assert_int_eq(job.plans[3]->nsteps, 4);
    ck_assert(s[0].kind == RY_STEP_SEND && s[0].group == 0 && s[0].peer == 2 && s[0].bytes == 3840);
    ck_assert(s[1].kind == RY_STEP_SUM && s[1].peer == 1 && s[1].from.place == RY_AT_SEND && s[1].from.peer == 1 &&
              s[1].to.offset == 0 && s[1].bytes == 6 * 64 + 40 && s[1].rows == 10);
    ck_assert(s[2].kind == RY_STEP_SEND && s[2].group == 1 && s[2].peer == 1 && s[2].bytes == s[1].bytes);
    ck_assert(s[3].kind == RY_STEP_SEND && s[3].group == 1 && s[3].peer == 2 && s[3].bytes == 77);
    s = job.plans[0]->steps;
    ck_assert_int_eq(job.plans[0]->nsteps, 3);
    ck_assert(s[0].kind == RY_STEP_RECV && s[0].group == 1 && s[0].peer == 2 && s[0].to.place == RY_AT_STAGE);
    ck_assert(s[1].kind == RY_STEP_EXPAND && s[1].peer == 2 && s[1].skip == 0 && s[1].bytes == 6400 &&
              s[1].to.peer == 2 && s[1].repeats.distinct == 51 && s[1].rows == 160);
    ck_assert(s[2].kind == RY_STEP_EXPAND && s[2].peer == 2 && s[2].skip == 100 && s[2].bytes == 3840 &&
              s[2].to.peer == 3);

    /* what it says of it */
    char *text;
    size_t length;
    FILE *f = open_memstream(&text, &length);
    for (int r = 0; r < 4; r++)
        ry_plan_explain(job.plans[r], job.cluster, f);
    fclose(f);
    static const char *const lines[] = {
        "rank 2 of 4 (node 1, rail 0): sum, 0 copies, 1 messages of sums, 0 pieces written out and 5 transfers in 2 "
        "groups",
        "  group 0, inside the node:\n    send 6400 B to itself: what goes to rank 0\n",
        "    receive 3840 B from rank 3 in the node: into staging at 6400\n",
        "  then:\n    add up 160 rows of 64 B for rank 0 to 50, 3904 B, into staging at 10240\n",
        "  group 1:\n    send 3904 B to rank 0 (node 0, rail 0): sums from staging at 10240\n",
        "    add up 10 rows of 64 B for rank 1, all of them its own, to 5, 424 B, into staging at 0\n",
        "    receive 3904 B from rank 2 (node 1, rail 0): sums, into staging at 0\n",
        "    write out 60 of 160 rows that rank 2 added up, 3840 B, from staging at 0 into place of what rank 3 "
        "sent\n"};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        ck_assert_msg(strstr(text, lines[i]) != NULL, "'%s' is not in:\n%s", lines[i], text);
    free(text);
    free_plans(&job);

    /* what contradicts itself, or cannot be summed, is refused by all that it has to do with */
    struct ry_slice slice;
    uint64_t went[16], send[4], recv[4];
    for (int i = 0; i < 16; i++)
        went[i] = job.matrix[i % 4 * 4 + i / 4];
    went[3] = 3839;
    job.repeats[2 + 1].distinct = 11;
    static const char *const refused[] = {
        "rows of 64 bytes do not divide all segments between rank 0 and node 1",
        "rank 1 says that it found 11 distinct rows among what it sent to node 1, which was 10 rows of 64 bytes",
        "rows of 64 bytes do not divide all segments between rank 0 and node 1",
        "rows of 64 bytes do not divide all segments between rank 0 and node 1"};
    for (int r = 0; r < 4; r++) {
        ck_assert_int_eq(ry_slice_init(&slice, job.cluster, r, RY_DEDUP, &err), 0);
        ry_slice_fill(&slice, job.cluster, went, job.repeats);
        for (int p = 0; p < 4; p++) {
            send[p] = went[p * 4 + r];
            recv[p] = went[r * 4 + p];
        }
        struct ry_plan_input in = {.cluster = job.cluster,
                                   .rank = r,
                                   .strategy = RY_SUM,
                                   .send = send,
                                   .recv = recv,
                                   .slice = &slice,
                                   .repeats = job.repeats + 2 * r};
        ck_assert_ptr_null(ry_plan_build(&in, &err));
        ck_assert_msg(strstr(err.msg, refused[r]) != NULL, "%s", err.msg);
        send[r ^ 2]++; /* not what came */
        ck_assert_ptr_null(ry_plan_build(&in, &err));
        ck_assert_msg(strstr(err.msg, "bytes, but it returns ") != NULL, "%s", err.msg);
        slice.ncols--;
        ck_assert_ptr_null(ry_plan_build(&in, &err));
        ck_assert_msg(strstr(err.msg, "needs the slice of the matrix of the exchange that is returned") != NULL, "%s",
                      err.msg);
        in.slice = NULL;
        ck_assert_ptr_null(ry_plan_build(&in, &err));
        ck_assert_msg(strstr(err.msg, "needs the slice of the matrix of the exchange that is returned") != NULL, "%s",
                      err.msg);
        ry_slice_free(&slice);
    }
    ck_assert_int_eq(ry_slice_init(&slice, job.cluster, 0, RY_SUM, &err), 0);
    ck_assert_int_eq(slice.nrows, 0); /* nothing to be told */
    free_job(&job);
}
END_TEST

/* ---- speed ---- */

static int by_time(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* At 128 x 8 with no empty cell and everything summed. */
START_TEST(build_time)
{
    enum { ROUNDS = 41, N = 1024, RANK = 77 };
    struct job job = {.n = N, .cluster = cluster_of(N, blocks, 128), .matrix = malloc(N * N * sizeof *job.matrix)};
    struct ry_repeats *repeats = job.repeats = calloc(N * 128, sizeof *job.repeats);
    uint64_t send[N];
    double us[ROUNDS];
    struct ry_slice slice;
    for (size_t i = 0; i < N * N; i++)
        job.matrix[i] = 4096 * (10 + rnd(20));
    for (size_t i = 0; i < N * 128; i++)
        repeats[i] = (struct ry_repeats){.row_bytes = 4096, .distinct = 60};
    for (size_t i = 0; i < N; i++)
        send[i] = job.matrix[i * N + RANK];
    send[RANK] = job.matrix[RANK * N + RANK];
    ck_assert_int_eq(ry_slice_init(&slice, job.cluster, RANK, RY_DEDUP, NULL), 0);
    ry_slice_fill(&slice, job.cluster, job.matrix, repeats);
    struct ry_plan_input in = {.cluster = job.cluster,
                               .rank = RANK,
                               .strategy = RY_SUM,
                               .send = send,
                               .recv = job.matrix + N * RANK,
                               .slice = &slice,
                               .repeats = repeats + 128 * RANK};
    int steps = 0;
    for (int i = 0; i < ROUNDS; i++) {
        struct ry_err err = {""};
        double begin = seconds();
        struct ry_plan *plan = ry_plan_build(&in, &err);
        us[i] = (seconds() - begin) * 1e6;
        ck_assert_msg(plan != NULL, "%s", err.msg);
        steps = plan->nsteps;
        ry_plan_free(plan);
    }
    qsort(us, ROUNDS, sizeof *us, by_time);
    printf("sum at 128 x 8: %d steps built in %.0f us (median; slowest %.0f)\n", steps, us[ROUNDS / 2], us[ROUNDS - 1]);
    builds_within(&in, us[0], 1000);
    ry_slice_free(&slice);
    free_job(&job);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {to_the_letter,     random_jobs, real_memory, mutations,
                                  accepted_is_right, build_time,  NULL};
    return run_tests("plan_sum", tests);
}
