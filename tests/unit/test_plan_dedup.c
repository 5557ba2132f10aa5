/*
 * test_plan_dedup.c: plans that pack: proved for random jobs and rows, carried out on host memory, broken in every way
 * that a verifier must find, and what plan.h promises of their memory.
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

/* What crosses from a rank to a node. */
static uint64_t crosses(const struct job *job, int from, int node, bool *packed)
{
    struct ry_repeats r = job->repeats[from * job->cluster->nnodes + node];
    uint64_t rows = 0, bytes = 0;
    for (int p = 0; p < job->n; p++)
        if (job->cluster->node[p] == node) {
            rows += r.row_bytes ? ry_rows_of(cell(job, from, p), r.row_bytes) : 0;
            bytes += cell(job, from, p);
        }
    *packed = ry_packs(r, rows, bytes);
    return *packed ? ry_packed_bytes(r, rows) : bytes;
}

/* Staging as promised, and every packed message once across, to the relay. Adds up how often what happened. */
struct seen {
    long packed, plain, whole, pieces, kept, later;
};
static void check_promises(const struct job *job, struct seen *seen)
{
    const struct ry_cluster *c = job->cluster;
    uint64_t *relay = malloc(2 * (size_t)job->n * sizeof *relay), *pack = relay + job->n;
    ck_assert_int_eq(ry_plan_stage_all(c, RY_DEDUP, job->matrix, job->repeats, relay, pack, NULL), 0);
    for (int r = 0; r < job->n; r++) {
        const struct ry_plan *p = job->plans[r];
        const uint64_t *row = job->matrix + (size_t)r * (size_t)job->n;
        const uintptr_t *at = job->send_at && !job->blind ? job->send_at[r] : NULL;
        const struct ry_repeats *own = job->repeats + r * c->nnodes;
        ck_assert_uint_eq(relay[r], ry_plan_stage_relay(c, r, RY_DEDUP, job->matrix, job->repeats));
        ck_assert_uint_eq(pack[r], ry_plan_stage_pack(c, r, RY_DEDUP, row, NULL, own));
        ck_assert_uint_eq(p->stage_bytes, relay[r] + ry_plan_stage_pack(c, r, RY_DEDUP, row, at, own));
        ck_assert_uint_eq(relay[r] + pack[r], ry_plan_stage_bytes(c, r, RY_DEDUP, job->matrix, job->repeats));
        uint64_t *sends = calloc((size_t)c->nnodes, sizeof *sends);
        int chunks = job->chunks > 1 && c->nnodes > 1 && c->nnodes < c->nranks ? job->chunks : 1;
        ck_assert_int_eq(p->ngroups, c->nnodes > 1 && c->nnodes < c->nranks ? 2 * chunks : 1);
        ck_assert(chunks > 1 || ry_second(p) == p->nsteps);
        for (int i = 0; i < p->nsteps; i++) {
            const struct ry_step *s = &p->steps[i];
            int node = ry_is_transfer(s) ? c->node[s->peer] : -1;
            bool packed;
            if (s->kind == RY_STEP_SEND && node != c->node[r]) {
                ck_assert_int_lt(s->group, chunks);
                ck_assert_int_eq(s->peer, ry_relay(c, r, node));
                ck_assert(chunks > 1 || !sends[node]);
                sends[node] += s->bytes;
                crosses(job, r, node, &packed);
                seen->packed += packed;
                seen->plain += !packed;
            }
            if (s->kind == RY_STEP_PACK || (chunks == 1 && s->kind == RY_STEP_RECV && s->to.place == RY_AT_STAGE))
                ck_assert_uint_eq(s->to.offset % 256, 0);
            if (i >= ry_second(p)) {
                ck_assert(s->after >= (i > ry_second(p) ? s[-1].after : 0) && s->after < chunks);
                ck_assert(!ry_is_transfer(s) || (s->group == chunks + s->after && ry_inside(p->inside, s->group)));
            }
            seen->later += s->kind == RY_STEP_SEND && node != c->node[r] && s->group > 0;
            seen->whole += s->kind == RY_STEP_RECV && s->group >= chunks && s->to.place == RY_AT_STAGE;
            seen->pieces += s->kind == RY_STEP_EXPAND && s->to.place == RY_AT_STAGE;
            seen->kept +=
                s->kind == RY_STEP_EXPAND && s->to.place == RY_AT_RECV && ry_relay(c, s->peer, c->node[r]) == r;
        }
        for (int node = 0; node < c->nnodes; node++) {
            bool packed;
            uint64_t whole = crosses(job, r, node, &packed);
            if (packed && chunks > 1 && ry_parts(&own[node]) == chunks) /* but what fills the rows up to the list */
                whole -= ry_packed_bytes(own[node], 0) - own[node].row_bytes * own[node].distinct;
            if (node != c->node[r])
                ck_assert_uint_eq(sends[node], whole);
        }
        free(sends);
    }
    free(relay);
}

START_TEST(random_jobs)
{
    struct seen seen = {0};
    for (int round = 0; round < 500; round++) {
        static const uint64_t most[] = {7, 300, 4099};
        int n = round % 8 ? 1 + (int)rnd(12) : 1 + (int)rnd(48);
        struct job job = random_job(n, most[n > 20 ? 1 : rnd(3)], true);
        struct ry_err err = {""};
        job.chunks = 1 << rnd(3);
        job.parts = rnd(3) ? job.chunks : -1;
        random_rows(&job);
        for (enum ry_strategy s = 0; s < RY_SUM; s++) {
            build_all(&job, s);
            ck_assert_msg(!verify(&job, &err), "round %d, %s, %d ranks on %d nodes: %s", round, ry_strategy_name(s), n,
                          job.cluster->nnodes, err.msg);
            if (s == RY_DEDUP)
                check_promises(&job, &seen);
            free_plans(&job);
        }
        free_job(&job);
    }
    printf("messages across: %ld packed, %ld as they are; in the node: %ld passed on packed, %ld written out first, "
           "%ld kept; %ld in later chunks\n",
           seen.packed, seen.plain, seen.whole, seen.pieces, seen.kept, seen.later);
    ck_assert(seen.later > 200 && seen.packed > 1000 && seen.plain > 1000 && seen.whole > 100 && seen.pieces > 1000 && seen.kept > 1000);
}
END_TEST

START_TEST(real_memory)
{
    struct seen seen = {0};
    for (int round = 0; round < 200; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(1 + (int)rnd(12), 1 + rnd(rnd(2) ? 40 : 900), true);
        job.chunks = 1 << rnd(3);
        job.parts = rnd(3) ? job.chunks : -1;
        random_rows(&job);
        make_real(&job, &mem, (int)rnd(4));
        job.blind = rnd(2);
        build_all(&job, RY_DEDUP);
        ck_assert_msg(!verify(&job, &err), "%s", err.msg);
        check_promises(&job, &seen);
        const char *why = interpret(&job, &mem);
        ck_assert_msg(!*why, "%d ranks: %s", job.n, why);
        free_memory(&job, &mem);
        free_job(&job);
    }
}
END_TEST

/* ---- plans that are wrong ---- */

enum {
    SKIP,
    DISTINCT,
    ROW_BYTES,
    ROWS,
    SENDER,
    NODE,
    SEGMENT,
    EXPAND_EARLY,
    PACK_LATE,
    CUT_SHORT,
    MESSAGE_AT,
    OTHER_ENTRIES,
    DROPPED,
    IN_A_GROUP,
    NOT_STAGED,
    TOO_SHORT,
    TOO_LONG,
    ONTO_ITSELF,
    RECEIPT,
    MUTATIONS
};
static const char *const mutation_names[MUTATIONS] = {
    "skip",         "distinct",  "row bytes", "rows",        "sender",        "node",    "segment",
    "expand early", "pack late", "cut short", "message at",  "other entries", "dropped", "in a group",
    "not staged",   "too short", "too long",  "onto itself", "receipt"};

static void move(struct ry_plan *p, int from, int to)
{
    struct ry_step s = p->steps[from];
    memmove(p->steps + from, p->steps + from + 1, (size_t)(p->nsteps - from - 1) * sizeof s);
    memmove(p->steps + to + 1, p->steps + to, (size_t)(p->nsteps - to - 1) * sizeof s);
    p->steps[to] = s;
}

/* The step of that kind and that number of bytes whose peer is `peer`. */
static struct ry_step *meeting(struct ry_plan *p, enum ry_step_kind kind, int group, int peer, uint64_t bytes)
{
    for (int i = 0; i < p->nsteps; i++) {
        struct ry_step *s = &p->steps[i];
        if (s->kind == kind && s->group == group && s->peer == peer && s->bytes == bytes)
            return s;
    }
    return NULL;
}

/* Break step `i`, false where `how` says nothing of such a step. Rows next to each other differ where `even_rows` made
 * them. */
static bool mutate(struct job *job, int rank, int i, int how)
{
    struct ry_plan *p = job->plans[rank];
    struct ry_step *s = &p->steps[i], *other;
    bool expands = s->kind == RY_STEP_EXPAND, packs = s->kind == RY_STEP_PACK, rows = expands || packs;
    uint64_t own_rows = expands ? ry_rows_of(s->bytes, s->repeats.row_bytes) : 0;
    switch (how) {
    case SKIP: /* by a run of equal rows */
        s->skip = s->skip >= 3 ? s->skip - 3 : s->skip + 3;
        return expands && own_rows + 3 <= s->rows;
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
        return expands;
    case NODE:
        if (packs)
            s->peer = (s->peer + 1 + (int)rnd((uint64_t)job->cluster->nnodes - 1)) % job->cluster->nnodes;
        return packs;
    case SEGMENT:
        s->to.peer = (s->to.peer + 1) % job->n;
        return expands && s->to.place == RY_AT_RECV;
    case EXPAND_EARLY:
        if (expands)
            move(p, i, 0);
        return expands;
    case PACK_LATE:
        if (packs)
            move(p, i, p->nsteps - 1);
        return packs;
    case CUT_SHORT: /* the message that is passed on, at both ends: the last entry that is needed is missing */
        if (s->kind != RY_STEP_RECV || s->group != 1 || s->to.place != RY_AT_STAGE)
            return false;
        other = meeting(job->plans[s->peer], RY_STEP_SEND, 1, rank, s->bytes);
        for (int k = i + 1; k < p->nsteps; k++)
            if (p->steps[k].kind == RY_STEP_EXPAND && p->steps[k].from.offset == s->to.offset) {
                const struct ry_step *e = &p->steps[k];
                s->bytes -= 4 * (e->rows - e->skip - ry_rows_of(e->bytes, e->repeats.row_bytes)) + 1;
            }
        other->bytes = s->bytes;
        return true;
    case MESSAGE_AT:
        s->from.offset += 256;
        return expands && (s->from.offset + ry_packed_bytes(s->repeats, s->rows) <= p->stage_bytes || rnd(2));
    case OTHER_ENTRIES: /* the relay passes on the message from four bytes further on */
        if (s->kind != RY_STEP_SEND || s->group != 1)
            return false;
        s->from.offset += 4;
        return meeting(job->plans[s->peer], RY_STEP_RECV, 1, rank, s->bytes)->to.place == RY_AT_STAGE;
    case DROPPED:
        if (rows) {
            move(p, i, p->nsteps - 1);
            p->nsteps--;
        }
        return rows;
    case IN_A_GROUP:
        s->group = 0;
        return rows;
    case NOT_STAGED:
        *(packs ? &s->to : &s->from) = (struct ry_at){RY_AT_SEND, 0, 0};
        return rows;
    case TOO_SHORT:
        s->bytes--;
        return rows;
    case TOO_LONG:
        s->bytes += expands ? s->rows * s->repeats.row_bytes : 1;
        return rows;
    case ONTO_ITSELF:
        s->to.offset = s->from.offset;
        return expands && s->to.place == RY_AT_STAGE;
    case RECEIPT: /* says that it is another message, or none, or one where none is */
        if (rnd(2))
            s->repeats.distinct += 1;
        else if (rnd(2))
            s->rows -= 1;
        else
            s->repeats = (struct ry_repeats){.row_bytes = s->repeats.row_bytes ? 0 : 4, .distinct = 0};
        return s->kind == RY_STEP_RECV;
    }
    return false;
}

/* Jobs in which two rows in a row are equal, the third is not: every mistake shows. */
START_TEST(mutations)
{
    int tried[MUTATIONS] = {0};
    for (int round = 0; round < ROUNDS_OF(4000) || (round < 10 * 4000 && fewest(tried, MUTATIONS) < ROUNDS_OF(10)); round++) {
        struct ry_err err = {""};
        struct job job = random_job(2 + (int)rnd(9), 20 + rnd(3000), true);
        int rank = (int)rnd((uint64_t)job.n), how = round % MUTATIONS;
        even_rows(&job, 1 + rnd(150), 3);
        build_all(&job, RY_DEDUP);
        ck_assert_msg(!verify(&job, &err), "%s", err.msg);
        int n = job.plans[rank]->nsteps;
        for (int k = 0, at = n ? (int)rnd((uint64_t)n) : 0; k < n; k++) {
            struct ry_step *s = &job.plans[rank]->steps[(at + k) % n], before = *s;
            if (mutate(&job, rank, (at + k) % n, how)) {
                tried[how]++;
                ck_assert_msg(verify(&job, &err), "round %d: rank %d, step %d broken by '%s': not found", round, rank,
                              (at + k) % n, mutation_names[how]);
                ck_assert_msg(strstr(err.msg, "rank ") != NULL, "names no rank: %s", err.msg);
                break;
            }
            *s = before;
        }
        free_job(&job);
    }
    for (int how = 0; how < MUTATIONS; how++)
        ck_assert_msg(tried[how] >= ROUNDS_OF(10), "'%s' was tried %d times only", mutation_names[how], tried[how]);
}
END_TEST

/* Whatever was changed in steps that pack, write out or send: what the verifier accepts gives the right bytes. */
START_TEST(accepted_is_right)
{
    int accepted = 0, refused = 0;
    for (int round = 0; round < 3000; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(3 + (int)rnd(6), 1 + rnd(400), true);
        if (rnd(4) == 0)
            random_rows(&job);
        else
            even_rows(&job, 4 + rnd(9), 3 + rnd(40));
        make_real(&job, &mem, (int)rnd(4));
        job.blind = rnd(2);
        build_all(&job, RY_DEDUP);
        for (int k = 1 + (int)rnd(2); k; k--) {
            struct ry_plan *p = job.plans[rnd((uint64_t)job.n)];
            if (!p->nsteps)
                continue;
            struct ry_step *s = &p->steps[rnd((uint64_t)p->nsteps)], *t = &p->steps[rnd((uint64_t)p->nsteps)];
            for (int tries = 8; tries && s->kind != RY_STEP_EXPAND; tries--)
                s = &p->steps[rnd((uint64_t)p->nsteps)];
            struct ry_step copy = *s;
            bool rows = s->kind == RY_STEP_EXPAND;
            switch (rnd(6)) {
            case 0:
                *s = *t, *t = copy;
                break;
            case 1:
                s->skip = rows ? rnd(s->rows) : 0;
                break;
            case 2:
                s->from.offset += s->kind == RY_STEP_RECV ? 0 : rows ? 16 * rnd(40) : rnd(3);
                break;
            case 3:
                s->to.offset += s->kind == RY_STEP_SEND ? 0 : rnd(3) * 16;
                break;
            case 4:
                if (rows)
                    s->from = t->kind == RY_STEP_RECV ? t->to : s->from;
                break;
            default:
                if (rows && t->kind == RY_STEP_EXPAND)
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

/* Plans in chunks of which a part comes too early, or is not where it is taken to be: found, or right all the same. */
START_TEST(overlap)
{
    int accepted = 0, refused = 0, early = 0;
    for (int round = 0; round < 1500; round++) {
        struct memory mem;
        struct ry_err err = {""};
        struct job job = random_job(3 + (int)rnd(6), 1 + rnd(400), true);
        job.parts = job.chunks = 1 << (1 + rnd(2));
        if (rnd(4) == 0)
            random_rows(&job);
        else
            even_rows(&job, 4 + rnd(9), 3 + rnd(40));
        make_real(&job, &mem, (int)rnd(4));
        /* as if fewer distinct rows had appeared early, the same for all ranks */
        struct ry_repeats *lie = &job.repeats[rnd((uint64_t)(job.n * job.cluster->nnodes))], truth = *lie;
        int what = (int)rnd(3), k = 1 + (int)rnd((uint64_t)job.chunks - 1);
        for (int i = 0; what == 0 && i < job.chunks - 1; i++)
            lie->early[i] -= lie->early[i] > 1;
        build_all(&job, RY_DEDUP);
        *lie = truth; /* which its steps are told */
        for (int r = 0; what == 0 && r < job.n; r++)
            for (int i = 0; i < job.plans[r]->nsteps; i++) {
                struct ry_step *s = &job.plans[r]->steps[i];
                bool its =
                    s->kind == RY_STEP_PACK
                        ? lie == &job.repeats[r * job.cluster->nnodes + s->peer]
                        : s->peer >= 0 && lie == &job.repeats[s->peer * job.cluster->nnodes + job.cluster->node[r]];
                if (its && s->repeats.row_bytes)
                    s->repeats = truth;
            }
        for (int r = 0; what == 1 && r < job.n; r++)
            for (int i = ry_second(job.plans[r]); i < job.plans[r]->nsteps; i++)
                job.plans[r]->steps[i].after -= job.plans[r]->steps[i].after == k;
        struct ry_plan *p = job.plans[rnd((uint64_t)job.n)];
        if (what == 2 && p->nsteps > ry_second(p)) {
            struct ry_step *s = &p->steps[ry_second(p) + (int)rnd((uint64_t)(p->nsteps - ry_second(p)))];
            s->after = s->after ? s->after - 1 : s->after;
            if (rnd(3) == 0)
                s->to.offset += s->kind == RY_STEP_SEND ? 0 : 16;
        }
        if (verify(&job, &err)) {
            refused++;
            early += strstr(err.msg, "early") != NULL;
        } else {
            accepted++;
            for (int times = 0; times < 3; times++) {
                const char *why = interpret(&job, &mem);
                ck_assert_msg(!*why, "round %d: accepted, but %s", round, why);
            }
        }
        free_memory(&job, &mem);
        free_job(&job);
    }
    printf("changed plans in chunks: %d accepted and right, %d refused, %d of them only where parts overlap\n",
           accepted, refused, early);
    ck_assert(accepted > 100 && refused > 100 && early > 50);
}
END_TEST

/* Plans are right for the row map that they were built with, and no other. */
START_TEST(other_maps)
{
    struct ry_err err = {""};
    int caught = 0, same = 0;
    for (int round = 0; round < 300; round++) {
        struct job job = random_job(3 + (int)rnd(6), 64 + rnd(500), true);
        even_rows(&job, 1 + rnd(9), 4);
        build_all(&job, RY_DEDUP);
        bool packs = false;
        for (int r = 0; r < job.n; r++)
            for (int i = 0; i < job.plans[r]->nsteps; i++)
                packs |= job.plans[r]->steps[i].kind == RY_STEP_PACK;
        if (packs) {
            ck_assert(!verify(&job, &err));
            ck_assert_int_eq(ry_plan_verify(job.cluster, job.matrix, job.plans, &err), -1);
            ck_assert_msg(strstr(err.msg, "cannot be proved without knowing which rows are equal"), "%s", err.msg);
            for (int i = 0; i < job.n * job.cluster->nnodes; i++)
                free((void *)job.maps[i].first);
            free(job.maps);
            free(job.repeats);
            even_rows(&job, 1 + rnd(9), 7);
            struct ry_plan **old = job.plans;
            build_all(&job, RY_DEDUP);
            ck_assert(!verify(&job, &err));
            free_plans(&job);
            job.plans = old;
            bool differ = false;
            for (int r = 0; r < job.n; r++)
                for (int i = 0; i < old[r]->nsteps; i++) {
                    const struct ry_step *s = &old[r]->steps[i];
                    if (s->kind != RY_STEP_PACK)
                        continue;
                    const struct ry_repeats *now = &job.repeats[r * job.cluster->nnodes + s->peer];
                    differ |= s->repeats.row_bytes != now->row_bytes || s->repeats.distinct != now->distinct;
                }
            ck_assert_int_eq(verify(&job, &err), differ ? -1 : 0);
            *(differ ? &caught : &same) += 1;
        }
        free_job(&job);
    }
    ck_assert_int_gt(caught, 30);
    printf("plans for other rows: %d refused, %d right for those too\n", caught, same);

    /* and maps that are none */
    struct job job = random_job(2, 100, true);
    ry_cluster_free(job.cluster);
    job.cluster = cluster_of(2, blocks, 2);
    job.matrix[1] = 100;
    even_rows(&job, 16, 2);
    build_all(&job, RY_DEDUP);
    ck_assert_msg(!verify(&job, &err), "%s", err.msg);
    uint32_t *first = (uint32_t *)job.maps[1].first; /* of 0 for node 1: 0 0 2 2 4 4 6, the last shorter */
#define REFUSED(row, now, text)                                                                                        \
    do {                                                                                                               \
        uint32_t before = first[row];                                                                                  \
        first[row] = now;                                                                                              \
        ck_assert_int_eq(verify(&job, &err), -1);                                                                      \
        ck_assert_msg(strstr(err.msg, text) != NULL, "%s", err.msg);                                                   \
        first[row] = before;                                                                                           \
    } while (0)
    REFUSED(0, 1, "contradicts itself at row 0");
    REFUSED(3, 1, "contradicts itself at row 3");
    REFUSED(6, 0, "contradicts itself at row 6");
    REFUSED(3, 3, "5 are distinct by their map, not 4");
    free_job(&job);
}
END_TEST

/* ---- by hand ---- */

/* Two nodes of two; 100 rows of 64 bytes from rank 0 to ranks 2 and 3 each, 50 distinct: the message of 50 * 64 + 4 *
   200 = 4000 bytes is shorter than what rank 3 gets, so it is passed on whole. With 90 distinct ones it is not. */
START_TEST(to_the_letter)
{
    struct job job = {.n = 4, .cluster = cluster_of(4, blocks, 2), .matrix = calloc(16, sizeof *job.matrix)};
    job.matrix[2] = job.matrix[3] = 6400;
    job.repeats = calloc(8, sizeof *job.repeats);
    job.repeats[1] = (struct ry_repeats){.row_bytes = 64, .distinct = 50};
    build_all(&job, RY_DEDUP);
    const struct ry_step *s = job.plans[0]->steps;
    ck_assert_int_eq(job.plans[0]->nsteps, 2);
    ck_assert(s[0].kind == RY_STEP_PACK && s[0].peer == 1 && s[0].bytes == 4000 && s[0].rows == 200);
    ck_assert(s[1].kind == RY_STEP_SEND && s[1].group == 0 && s[1].peer == 2 && s[1].bytes == 4000);
    s = job.plans[2]->steps;
    ck_assert_int_eq(job.plans[2]->nsteps, 3);
    ck_assert(s[0].kind == RY_STEP_RECV && s[0].group == 0 && s[0].peer == 0 && s[0].to.place == RY_AT_STAGE &&
              s[0].rows == 200 && s[0].repeats.row_bytes == 64 && s[0].repeats.distinct == 50);
    ck_assert(s[1].kind == RY_STEP_SEND && s[1].group == 1 && s[1].peer == 3 && s[1].bytes == 4000);
    ck_assert(s[2].kind == RY_STEP_EXPAND && s[2].peer == 0 && s[2].bytes == 6400 && s[2].skip == 0 &&
              s[2].to.place == RY_AT_RECV && s[2].to.peer == 0);
    s = job.plans[3]->steps;
    ck_assert_int_eq(job.plans[3]->nsteps, 2);
    ck_assert(s[0].kind == RY_STEP_RECV && s[0].group == 1 && s[0].peer == 2 && s[0].to.place == RY_AT_STAGE);
    ck_assert(s[1].kind == RY_STEP_EXPAND && s[1].peer == 0 && s[1].bytes == 6400 && s[1].skip == 100 &&
              s[1].rows == 200);
    ck_assert_uint_eq(job.plans[0]->stage_bytes, 4096);
    ck_assert_uint_eq(job.plans[3]->stage_bytes, 4096);
    free_plans(&job);

    job.repeats[1].distinct = 90; /* 6560 bytes: written out for rank 3 before group 1 */
    build_all(&job, RY_DEDUP);
    s = job.plans[2]->steps;
    ck_assert_int_eq(job.plans[2]->nsteps, 4);
    ck_assert(s[1].kind == RY_STEP_EXPAND && s[1].to.place == RY_AT_STAGE && s[1].skip == 100 && s[1].bytes == 6400);
    ck_assert(s[2].kind == RY_STEP_SEND && s[2].group == 1 && s[2].from.offset == s[1].to.offset && s[2].bytes == 6400);
    ck_assert(s[3].kind == RY_STEP_EXPAND && s[3].to.place == RY_AT_RECV && s[3].skip == 0);
    s = job.plans[3]->steps;
    ck_assert_int_eq(job.plans[3]->nsteps, 1);
    ck_assert(s[0].kind == RY_STEP_RECV && s[0].to.place == RY_AT_RECV);
    free_plans(&job);

    struct ry_err err = {""};
    struct ry_slice slice;
    uint64_t nothing[4] = {0}, column[4] = {6400};
    job.repeats[1].distinct = 201; /* what cannot be, both sides refuse */
    struct ry_plan_input in = {.cluster = job.cluster,
                               .strategy = RY_DEDUP,
                               .send = job.matrix,
                               .recv = nothing,
                               .slice = &slice,
                               .repeats = job.repeats};
    ck_assert_int_eq(ry_slice_init(&slice, job.cluster, 0, RY_DEDUP, &err), 0);
    ck_assert_ptr_null(ry_plan_build(&in, &err));
    ck_assert_msg(strstr(err.msg, "rank 0 says that it found 201 distinct rows among what it sends to node 1"), "%s",
                  err.msg);
    ry_slice_free(&slice);
    ck_assert_int_eq(ry_slice_init(&slice, job.cluster, 3, RY_DEDUP, &err), 0);
    ry_slice_fill(&slice, job.cluster, job.matrix, job.repeats);
    in.rank = 3, in.send = nothing, in.recv = column, in.repeats = NULL;
    ck_assert_ptr_null(ry_plan_build(&in, &err));
    ck_assert_msg(strstr(err.msg, "plan of rank 3: rank 0 says that it found 201"), "%s", err.msg);
    slice.repeats = NULL;
    ck_assert_ptr_null(ry_plan_build(&in, &err));
    ck_assert_msg(strstr(err.msg, "lacks what other ranks found"), "%s", err.msg);
    ry_slice_free(&slice);
    free_job(&job);
}
END_TEST

/* ---- speed ---- */

static int by_time(const void *a, const void *b)
{
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* At 128 x 8 with no empty cell and everything packed: passed on whole, or written out by relays, which are the most
 * steps. */
START_TEST(build_time)
{
    enum { ROUNDS = 41, N = 1024 };
    for (int distinct = 10; distinct <= 70; distinct += 60) {
        struct job job = {.n = N, .cluster = cluster_of(N, blocks, 128), .matrix = malloc(N * N * sizeof *job.matrix)};
        job.repeats = calloc(N * 128, sizeof *job.repeats);
        for (size_t i = 0; i < N * N; i++)
            job.matrix[i] = 4096 * (10 + rnd(20));
        for (size_t i = 0; i < N * 128; i++)
            job.repeats[i] = (struct ry_repeats){.row_bytes = 4096, .distinct = (uint64_t)distinct};
        double us[ROUNDS], begin;
        uint64_t column[N], relay[N], pack[N];
        int steps = 0, r = 77;
        struct ry_slice slice;
        for (int i = 0; i < N; i++)
            column[i] = job.matrix[i * N + r];
        ck_assert_int_eq(ry_slice_init(&slice, job.cluster, r, RY_DEDUP, NULL), 0);
        ry_slice_fill(&slice, job.cluster, job.matrix, job.repeats);
        struct ry_plan_input in = {.cluster = job.cluster,
                                   .rank = r,
                                   .strategy = RY_DEDUP,
                                   .send = job.matrix + N * r,
                                   .recv = column,
                                   .slice = &slice,
                                   .repeats = job.repeats + 128 * r};
        for (int i = 0; i < ROUNDS; i++) {
            begin = seconds();
            struct ry_plan *plan = ry_plan_build(&in, NULL);
            us[i] = (seconds() - begin) * 1e6;
            steps = plan->nsteps;
            ry_plan_free(plan);
        }
        begin = seconds();
        ck_assert_int_eq(ry_plan_stage_all(job.cluster, RY_DEDUP, job.matrix, job.repeats, relay, pack, NULL), 0);
        double all = seconds() - begin;
        qsort(us, ROUNDS, sizeof *us, by_time);
        printf("dedup at 128 x 8, %d rows distinct: %d steps built in %.0f us (median; slowest %.0f); staging of all "
               "ranks in "
               "%.0f us\n",
               distinct, steps, us[ROUNDS / 2], us[ROUNDS - 1], all * 1e6);
        builds_within(&in, us[0], 1000);
        ry_slice_free(&slice);
        free_job(&job);
    }
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {to_the_letter, random_jobs, real_memory, mutations, accepted_is_right,
                                  overlap,       other_maps,  build_time,  NULL};
    return run_tests("plan_dedup", tests);
}
