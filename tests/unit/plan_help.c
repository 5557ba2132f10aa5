/* plan_help.c: see plan_help.h. */
#include "plan_help.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static unsigned seed;

/* ---- random jobs ---- */

static uint64_t state;
uint64_t rnd(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state * UINT64_C(0x2545F4914F6CDD1D) >> 20) % below;
}

struct ry_cluster *cluster_of(int n, int (*node)(int rank, int n, int nodes), int nodes)
{
    struct ry_err err = {""};
    struct ry_seat *s = calloc((size_t)n, sizeof *s);
    for (int r = 0; r < n; r++) {
        s[r].rank = r;
        snprintf(s[r].node, sizeof s[r].node, "n%d", node(r, n, nodes));
    }
    struct ry_cluster *c = ry_cluster_build(s, n, &err);
    ck_assert_msg(c != NULL, "%s", err.msg);
    free(s);
    return c;
}

int blocks(int r, int n, int nodes)
{
    return (int)((long)r * nodes / n);
}
int dealt(int r, int n, int nodes)
{
    return r % nodes;
}
int anywhere(int r, int n, int nodes)
{
    return (int)rnd((uint64_t)nodes);
}
/* node 0 has half of the ranks, node 1 a quarter, … */
int uneven(int r, int n, int nodes)
{
    int node = 0;
    for (int left = n, begin = 0; node < nodes - 1 && r >= begin + (left + 1) / 2; node++) {
        begin += (left + 1) / 2;
        left -= (left + 1) / 2;
    }
    return node;
}

struct ry_cluster *random_cluster(int n)
{
    static int (*const how[])(int, int, int) = {blocks, dealt, anywhere, uneven};
    int nodes = rnd(8) == 0 ? 1 : rnd(8) == 0 ? n : 1 + (int)rnd((uint64_t)n);
    return cluster_of(n, how[rnd(4)], nodes);
}

static uint64_t *random_matrix(int n, uint64_t most)
{
    uint64_t *m = calloc((size_t)n * (size_t)n, sizeof *m);
    int how = (int)rnd(7), special = (int)rnd((uint64_t)n), zero_row = (int)rnd((uint64_t)n),
        zero_col = (int)rnd((uint64_t)n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            uint64_t *cell = &m[(size_t)i * (size_t)n + (size_t)j], any = 1 + rnd(most);
            switch (how) {
            case 0: /* uniform */
                *cell = most;
                break;
            case 1: /* all to one */
                *cell = j == special ? any : 0;
                break;
            case 2: /* one to all */
                *cell = i == special ? any : 0;
                break;
            case 3: /* sparse */
                *cell = rnd(8) == 0 ? any : 0;
                break;
            case 4: /* empty rows and columns */
                *cell = i == zero_row || j == zero_col ? 0 : any;
                break;
            case 5: /* skewed */
                *cell = 1 + any / (1 + (uint64_t)((i + j) % n) * (uint64_t)(1 + (i + j) % n));
                break;
            default:
                *cell = any;
            }
        }
    return m;
}

/* Lay the segments `bytes` (stride apart in the matrix) out in memory from `base` on. Returns how much that takes. */
static uint64_t lay_out(uintptr_t *at, int n, const uint64_t *bytes, int stride, uintptr_t base,
                        const struct ry_cluster *c, int how)
{
    uintptr_t end = base;
    int *order = malloc((size_t)n * sizeof *order), k = 0;
    for (int node = 0; node < c->nnodes; node++)
        for (int r = 0; r < n; r++)
            if (how == 1 && c->node[r] == node)
                order[k++] = r; /* by node: the neighbours that hierarchical hopes for, however the ranks are dealt */
    for (int r = 0; how != 1 && r < n; r++)
        order[r] = r;
    for (int i = n - 1; how == 2 && i > 0; i--) { /* in any order */
        int j = (int)rnd((uint64_t)i + 1), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (int i = 0; i < n; i++) {
        if (how == 3 && rnd(3) == 0) /* gaps here and there */
            end += 1 + rnd(64);
        at[order[i]] = end;
        end += bytes[(size_t)order[i] * (size_t)stride];
    }
    free(order);
    return end - base;
}

static uint64_t *transposed(const struct job *job)
{
    size_t n = (size_t)job->n;
    uint64_t *t = malloc(n * n * sizeof *t);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++)
            t[j * n + i] = job->matrix[i * n + j];
    return t;
}

void turn_round(struct job *job)
{
    uint64_t *back = transposed(job);
    free(job->matrix);
    job->matrix = back;
    job->sums = !job->sums;
}

/* `went`: for sum, the matrix of the exchange that this one returns. */
static struct ry_plan *build_one(const struct job *job, int r, enum ry_strategy strategy, const uint64_t *went,
                                 struct ry_err *err)
{
    int n = job->n;
    struct ry_slice slice;
    uint64_t *column = malloc((size_t)n * sizeof *column);
    for (int i = 0; i < n; i++)
        column[i] = job->matrix[(size_t)i * (size_t)n + (size_t)r];
    ck_assert_int_eq(ry_slice_init(&slice, job->cluster, r, strategy == RY_SUM ? RY_DEDUP : strategy, err), 0);
    ry_slice_fill(&slice, job->cluster, strategy == RY_SUM ? went : job->matrix, job->repeats);
    struct ry_plan_input in = {.cluster = job->cluster,
                               .rank = r,
                               .strategy = strategy,
                               .send = job->matrix + (size_t)r * (size_t)n,
                               .recv = column,
                               .slice = &slice,
                               .send_at = job->send_at && !job->blind ? job->send_at[r] : NULL,
                               .recv_at = job->recv_at && !job->blind ? job->recv_at[r] : NULL,
                               .repeats = job->repeats ? job->repeats + r * job->cluster->nnodes : NULL,
                               .chunks = job->chunks};
    struct ry_plan *plan = ry_plan_build(&in, err);
    if (plan && strategy == RY_SUM) {
        ck_assert_uint_eq(plan->stage_bytes, ry_plan_stage_sum(job->cluster, r, &slice, column, in.repeats));
        ck_assert_uint_eq(ry_plan_stage_bytes(job->cluster, r, RY_SUM, job->matrix, job->repeats), 0);
    }
    ry_slice_free(&slice);
    free(column);
    return plan;
}

void build_all(struct job *job, enum ry_strategy strategy)
{
    struct ry_err err = {""};
    uint64_t *went = strategy == RY_SUM ? transposed(job) : NULL;
    job->plans = calloc((size_t)job->n, sizeof(struct ry_plan *));
    for (int r = 0; r < job->n; r++) {
        job->plans[r] = build_one(job, r, strategy, went, &err);
        ck_assert_msg(job->plans[r] != NULL, "%s", err.msg);
    }
    free(went);
}

int verify(const struct job *job, struct ry_err *err)
{
    if (job->sums)
        return ry_plan_verify_sum(job->cluster, job->matrix, job->maps, job->plans,
                                  job->blind ? NULL : (const uintptr_t *const *)job->send_at,
                                  job->blind ? NULL : (const uintptr_t *const *)job->recv_at, err);
    return ry_plan_verify_rows_at(job->cluster, job->matrix, job->maps, job->plans,
                                  job->blind ? NULL : (const uintptr_t *const *)job->send_at,
                                  job->blind ? NULL : (const uintptr_t *const *)job->recv_at, err);
}

void free_plans(struct job *job)
{
    for (int r = 0; job->plans && r < job->n; r++)
        ry_plan_free(job->plans[r]);
    free(job->plans);
    job->plans = NULL;
}

void free_job(struct job *job)
{
    free_plans(job);
    for (int r = 0; r < job->n; r++) {
        if (job->send_at)
            free(job->send_at[r]);
        if (job->recv_at)
            free(job->recv_at[r]);
    }
    for (int i = 0; job->maps && i < job->n * job->cluster->nnodes; i++)
        free((void *)job->maps[i].first);
    free(job->maps);
    free(job->repeats);
    free(job->send_at);
    free(job->recv_at);
    free(job->matrix);
    ry_cluster_free(job->cluster);
}

/* With addresses unless `apart`; the memory they speak of does not exist. */
struct job random_job(int n, uint64_t most, bool apart)
{
    struct job job = {.n = n, .cluster = random_cluster(n), .matrix = random_matrix(n, most)};
    if (apart)
        return job;
    int how = (int)rnd(4);
    job.send_at = calloc((size_t)n, sizeof *job.send_at);
    job.recv_at = calloc((size_t)n, sizeof *job.recv_at);
    for (int r = 0; r < n; r++) {
        job.send_at[r] = malloc((size_t)n * sizeof **job.send_at);
        job.recv_at[r] = malloc((size_t)n * sizeof **job.recv_at);
        lay_out(job.send_at[r], n, job.matrix + (size_t)r * (size_t)n, 1, 0x1000, job.cluster, how);
        lay_out(job.recv_at[r], n, job.matrix + r, n, (uintptr_t)1 << 62, job.cluster, (int)rnd(4));
    }
    return job;
}

/* ---- equal rows ---- */

static uint64_t cell(const struct job *job, int from, int to)
{
    return job->matrix[(size_t)from * (size_t)job->n + (size_t)to];
}

static int index_of(const struct job *job, int from, int node)
{
    return from * job->cluster->nnodes + node;
}

/* Rows that `from` sends to ranks of `to`'s node below `to`; of `to` == n: to all of `node`. */
static uint64_t rows_below(const struct job *job, int from, int node, int to, uint64_t row_bytes)
{
    uint64_t rows = 0;
    for (int p = 0; p < to; p++)
        rows += job->cluster->node[p] == node ? ry_rows_of(cell(job, from, p), row_bytes) : 0;
    return rows;
}

enum { DISTINCT, EQUAL, SOME_ZERO, TOP_K, NEXT, SORTS };

/* Rows with the same label are equal; `width` labels in use where that says anything. */
static uint64_t label(int sort, uint64_t row, uint64_t rows, uint64_t width)
{
    switch (sort) {
    case EQUAL:
        return 0;
    case SOME_ZERO:
        return rnd(2) ? 0 : 1 + row;
    case TOP_K:
        return rnd(1 + rows / width);
    case NEXT:
        return row / width;
    }
    return row;
}

static void map_rows(struct job *job, int from, int node, uint64_t row_bytes, int sort, uint64_t width)
{
    uint64_t rows = rows_below(job, from, node, job->n, row_bytes), row = 0, distinct = 0;
    uint32_t *first = malloc((rows + 1) * sizeof *first), *of_label = malloc((rows + 2) * sizeof *of_label);
    memset(of_label, 0xFF, (rows + 2) * sizeof *of_label);
    for (int p = 0; p < job->n; p++)
        for (uint64_t at = 0; job->cluster->node[p] == node && at < cell(job, from, p); at += row_bytes, row++) {
            uint64_t l = label(sort, row, rows, width);
            bool whole = cell(job, from, p) - at >= row_bytes;
            if (whole && of_label[l] == UINT32_MAX)
                of_label[l] = (uint32_t)row;
            first[row] = whole ? of_label[l] : (uint32_t)row;
            distinct += first[row] == row;
        }
    free(of_label);
    int i = index_of(job, from, node);
    uint64_t parts = job->parts < 0 ? UINT64_C(1) << rnd(3) : job->parts ? (uint64_t)job->parts : 1;
    struct ry_repeats *r = &job->maps[i].repeats;
    job->maps[i] = (struct ry_row_map){{.row_bytes = row_bytes, .distinct = distinct, .parts = parts}, first};
    bool *known = calloc(rows + 1, sizeof *known);
    distinct = row = 0;
    for (int part = 0; part < (int)parts - 1; part++) {
        row = 0;
        for (int p = 0; p < job->n; p++) {
            uint64_t n = job->cluster->node[p] == node ? ry_rows_of(cell(job, from, p), row_bytes) : 0;
            for (uint64_t k = ry_part_at(n, part, (int)parts); k < ry_part_at(n, part + 1, (int)parts); k++) {
                distinct += !known[first[row + k]];
                known[first[row + k]] = true;
            }
            row += n;
        }
        r->early[part] = distinct;
    }
    free(known);
    job->repeats[i] = job->maps[i].repeats;
}

static void make_maps(struct job *job)
{
    size_t n = (size_t)job->n * (size_t)job->cluster->nnodes;
    job->maps = calloc(n, sizeof *job->maps);
    job->repeats = calloc(n, sizeof *job->repeats);
}

void random_rows(struct job *job)
{
    make_maps(job);
    for (int from = 0; from < job->n; from++) {
        static const uint64_t widths[] = {1, 2, 7, 16, 17, 64, 100, 257};
        uint64_t row_bytes = rnd(4) ? widths[rnd(8)] : 1 + rnd(3000);
        if (rnd(8) == 0)
            continue;
        for (int p = 0; p < job->n && rnd(3); p++) {
            uint64_t *bytes = &job->matrix[(size_t)from * (size_t)job->n + (size_t)p];
            if (rnd(3)) /* else ragged */
                *bytes = *bytes / row_bytes * row_bytes;
        }
        for (int node = 0; node < job->cluster->nnodes; node++)
            if (node != job->cluster->node[from] && rnd(8))
                map_rows(job, from, node, row_bytes, rnd(2) ? TOP_K : (int)rnd(SORTS), 1 + rnd(9));
    }
}

void random_whole_rows(struct job *job)
{
    make_maps(job);
    for (int from = 0; from < job->n; from++) {
        uint64_t row_bytes = 4 * (rnd(3) ? 1 + rnd(8) : 1 + rnd(100));
        for (int node = 0; node < job->cluster->nnodes; node++) {
            if (rnd(6) == 0) /* not looked at, and ragged */
                continue;
            for (int p = 0; p < job->n; p++) {
                uint64_t *bytes = &job->matrix[(size_t)from * (size_t)job->n + (size_t)p];
                *bytes = job->cluster->node[p] == node ? *bytes / row_bytes * row_bytes : *bytes;
            }
            if (node != job->cluster->node[from])
                map_rows(job, from, node, row_bytes, rnd(3) ? TOP_K : (int)rnd(SORTS), 1 + rnd(9));
        }
    }
}

void even_rows(struct job *job, uint64_t row_bytes, uint64_t equal)
{
    make_maps(job);
    for (int from = 0; from < job->n; from++)
        for (int node = 0; node < job->cluster->nnodes; node++)
            if (node != job->cluster->node[from])
                map_rows(job, from, node, row_bytes, NEXT, equal);
}

/* ---- carrying plans out, on real memory and without a thought for proofs ---- */

static unsigned char content(int from, int to, uint64_t offset)
{
    uint64_t x = ((uint64_t)from * 131 + (uint64_t)to) * 1000003 + offset;
    x = (x ^ x >> 15) * UINT64_C(0x9E3779B97F4A7C15);
    return (unsigned char)(x >> 40);
}

/* Of sums: numbers of fp32, wherever in a row they are. */
static float number(int from, int to, uint64_t offset)
{
    uint64_t x = ((uint64_t)from * 131 + (uint64_t)to) * 1000003 + offset / 4;
    x = (x ^ x >> 15) * UINT64_C(0x9E3779B97F4A7C15);
    return (float)(int64_t)(x >> 24) * 1e-9f; /* up to 1100: adding rounds */
}

static unsigned char byte_of(float f, uint64_t offset)
{
    unsigned char bytes[4];
    memcpy(bytes, &f, 4);
    return bytes[offset % 4];
}

/* Of the rows that `to` got from the node of `from`, those that are copies of the first of them, added up. */
static unsigned char right_sum(const struct job *job, const struct ry_row_map *map, int from, int to, uint64_t offset)
{
    int node = job->cluster->node[from];
    uint64_t row_bytes = map->repeats.row_bytes, row = offset / row_bytes, i = 0;
    float sum = 0;
    for (int p = 0; p < from; p++)
        row += job->cluster->node[p] == node ? cell(job, p, to) / row_bytes : 0;
    for (int p = 0; map->first[row] == row && p < job->n; p++)
        for (uint64_t at = 0; job->cluster->node[p] == node && at < cell(job, p, to); at += row_bytes, i++)
            sum += map->first[i] == row ? number(p, to, at + offset % row_bytes) : 0;
    return byte_of(sum, offset);
}

static bool summed(const struct job *job, int from, int to)
{
    int node = job->cluster->node[from];
    struct ry_repeats found = job->repeats[index_of(job, to, node)];
    uint64_t rows = 0, bytes = 0;
    if (node == job->cluster->node[to] || !found.row_bytes)
        return false;
    for (int p = 0; p < job->n; p++)
        if (job->cluster->node[p] == node) {
            rows += ry_rows_of(cell(job, p, to), found.row_bytes);
            bytes += cell(job, p, to);
        }
    return ry_packs(found, rows, bytes);
}

/* What really is there: equal rows have equal bytes. */
static unsigned char right(const struct job *job, int from, int to, uint64_t offset)
{
    int node = job->cluster->node[to];
    if (job->twins)
        return content(from % job->twins, to % job->twins, offset);
    if (job->sums)
        return byte_of(number(from, to, offset), offset);
    const struct ry_row_map *map = job->maps ? &job->maps[index_of(job, from, node)] : NULL;
    uint64_t row_bytes = map ? map->repeats.row_bytes : 0;
    if (!row_bytes)
        return content(from, to, offset);
    uint64_t row = rows_below(job, from, node, to, row_bytes) + offset / row_bytes;
    return content(from, job->n + node, map->first[row] * row_bytes + offset % row_bytes);
}

/* What is to be there in the end. */
static unsigned char wanted(const struct job *job, int from, int to, uint64_t offset)
{
    return job->sums && summed(job, from, to)
               ? right_sum(job, &job->maps[index_of(job, to, job->cluster->node[from])], from, to, offset)
               : right(job, from, to, offset);
}

/* The packed message, from the bytes that are there; which rows are equal, the map tells. */
static void pack(const struct job *job, int rank, const struct ry_step *s, unsigned char *to)
{
    const struct ry_row_map *map = &job->maps[index_of(job, rank, s->peer)];
    uint64_t row_bytes = map->repeats.row_bytes, row = 0, distinct = 0, entry = 0;
    unsigned char *list = to + (map->repeats.distinct * row_bytes + 15) / 16 * 16;
    uint32_t *number = malloc((s->rows + 1) * sizeof *number);
    memset(number, 0xFF, s->rows * sizeof *number);
    for (int part = 0; part < ry_parts(&map->repeats); part++) {
        row = 0;
        for (int p = 0; p < job->n; p++) {
            uint64_t all = cell(job, rank, p), n = job->cluster->node[p] == s->peer ? ry_rows_of(all, row_bytes) : 0;
            uint64_t k = ry_part_at(n, part, ry_parts(&map->repeats));
            for (; k < ry_part_at(n, part + 1, ry_parts(&map->repeats)); k++, entry++) {
                uint64_t at = k * row_bytes, bytes = all - at < row_bytes ? all - at : row_bytes;
                uint32_t *it = &number[map->first[row + k]];
                if (*it == UINT32_MAX) {
                    *it = (uint32_t)distinct;
                    memset(to + distinct * row_bytes, 0, row_bytes);
                    memcpy(to + distinct++ * row_bytes, (unsigned char *)job->send_at[rank][p] + at, bytes);
                }
                memcpy(list + 4 * entry, it, 4);
            }
            row += n;
        }
    }
    free(number);
}

static void expand(const struct ry_step *s, const unsigned char *from, unsigned char *to)
{
    uint64_t row_bytes = s->repeats.row_bytes;
    const unsigned char *list = from + (s->repeats.distinct * row_bytes + 15) / 16 * 16 + 4 * s->skip;
    for (uint64_t at = 0; at < s->bytes; at += row_bytes, list += 4) {
        uint32_t k;
        memcpy(&k, list, 4);
        if (k < s->repeats.distinct)
            memcpy(to + at, from + k * row_bytes, s->bytes - at < row_bytes ? s->bytes - at : row_bytes);
    }
}

/* By the map, which stands for the index list that the relay keeps. */
static void add_up(const struct job *job, int rank, const struct ry_step *s, const unsigned char *from,
                   unsigned char *to)
{
    const struct ry_row_map *map = &job->maps[index_of(job, s->peer, job->cluster->node[rank])];
    uint64_t row_bytes = s->repeats.row_bytes, sums = s->repeats.distinct * row_bytes, distinct = 0;
    uint32_t *list = malloc((s->rows + 1) * sizeof *list), *of = malloc((s->rows + 1) * sizeof *of);
    memset(to, 0, s->bytes - 4 * s->rows);
    for (uint64_t i = 0; i < s->rows; i++) {
        of[i] = map->first[i] == i ? (uint32_t)distinct++ : of[map->first[i]];
        list[i] = map->first[i] == i ? of[i] : (uint32_t)s->repeats.distinct;
        for (uint64_t k = 0; k + 4 <= row_bytes; k += 4) {
            float sum, more;
            memcpy(&sum, to + of[i] * row_bytes + k, 4);
            memcpy(&more, from + i * row_bytes + k, 4);
            sum += more;
            memcpy(to + of[i] * row_bytes + k, &sum, 4);
        }
    }
    memcpy(to + (sums + row_bytes + 15) / 16 * 16, list, s->rows * sizeof *list);
    free(list);
    free(of);
}

void make_real(struct job *job, struct memory *mem, int how)
{
    size_t n = (size_t)job->n;
    job->send_at = calloc(n, sizeof *job->send_at);
    job->recv_at = calloc(n, sizeof *job->recv_at);
    mem->send = calloc(n, sizeof *mem->send);
    mem->recv = calloc(n, sizeof *mem->recv);
    mem->stage = calloc(n, sizeof *mem->stage);
    for (int r = 0; r < job->n; r++) {
        job->send_at[r] = malloc(n * sizeof **job->send_at);
        job->recv_at[r] = malloc(n * sizeof **job->recv_at);
        uint64_t out = lay_out(job->send_at[r], job->n, job->matrix + (size_t)r * n, 1, 0, job->cluster, how);
        uint64_t in = lay_out(job->recv_at[r], job->n, job->matrix + r, job->n, 0, job->cluster, (int)rnd(4));
        mem->send[r] = malloc(out + 1);
        mem->recv[r] = malloc(in + 1);
        for (int p = 0; p < job->n; p++) {
            job->send_at[r][p] += (uintptr_t)mem->send[r];
            job->recv_at[r][p] += (uintptr_t)mem->recv[r];
        }
    }
}

static unsigned char *place(const struct job *job, const struct memory *mem, int rank, struct ry_at at)
{
    return at.place == RY_AT_STAGE  ? mem->stage[rank] + at.offset
           : at.place == RY_AT_SEND ? (unsigned char *)job->send_at[rank][at.peer] + at.offset
                                    : (unsigned char *)job->recv_at[rank][at.peer] + at.offset;
}

static int group_end(const struct ry_plan *p, int begin)
{
    int end = begin;
    while (end < p->nsteps && ry_is_transfer(&p->steps[end]) && p->steps[end].group == p->steps[begin].group)
        end++;
    return end;
}

/* May the step of the second part be begun, with the first part before step `at`? */
static bool may_begin(const struct ry_plan *p, const struct ry_step *s, int at)
{
    for (; at < ry_second(p); at++)
        if (ry_is_transfer(&p->steps[at]) && p->steps[at].group <= s->after)
            return false;
    return true;
}

/* "" or what went wrong. Both parts of all ranks' plans take turns at random; in a group, each turn does one transfer,
 * in random order between pairs. */
const char *interpret(const struct job *job, const struct memory *mem)
{
    static char why[200];
    int n = job->n, *at = calloc(2 * (size_t)n, sizeof *at), idle = 0;
    bool **done = calloc((size_t)n, sizeof *done);
    why[0] = 0;
    for (int r = 0; r < n; r++) {
        at[n + r] = ry_second(job->plans[r]);
        done[r] = calloc((size_t)job->plans[r]->nsteps + 1, sizeof **done);
        mem->stage[r] = malloc(job->plans[r]->stage_bytes + 1);
        memset(mem->stage[r], 0xEE, job->plans[r]->stage_bytes + 1);
        for (int p = 0; p < n; p++) {
            for (uint64_t k = 0, b = job->matrix[r * n + p]; k < b; k++)
                ((unsigned char *)job->send_at[r][p])[k] = right(job, r, p, k);
            memset((unsigned char *)job->recv_at[r][p], 0x55, job->matrix[p * n + r]);
        }
    }
    while (idle < 400 * n) { /* that many turns in a row without progress: stuck, or through */
        int part = (int)rnd(2), r = (int)rnd((uint64_t)n), *own = &at[part * n + r];
        const struct ry_plan *p = job->plans[r];
        const struct ry_step *s = &p->steps[*own];
        idle++;
        if (*own == (part ? p->nsteps : ry_second(p)) || (part && !may_begin(p, s, at[r])))
            continue;
        if (!ry_is_transfer(s)) {
            if (s->kind == RY_STEP_COPY)
                memcpy(place(job, mem, r, s->to), place(job, mem, r, s->from), s->bytes);
            else if (s->kind == RY_STEP_PACK)
                pack(job, r, s, place(job, mem, r, s->to));
            else if (s->kind == RY_STEP_SUM)
                add_up(job, r, s, place(job, mem, r, s->from), place(job, mem, r, s->to));
            else
                expand(s, place(job, mem, r, s->from), place(job, mem, r, s->to));
            ++*own;
            idle = 0;
            continue;
        }
        int end = group_end(p, *own), left = 0, start = (int)rnd((uint64_t)(end - *own));
        for (int k = 0; k < end - *own; k++) {
            int i = *own + (start + k) % (end - *own), q = p->steps[i].peer;
            const struct ry_plan *pq = job->plans[q];
            for (int j = *own; j < i; j++) /* only the first open one of its pair and direction */
                if (!done[r][j] && p->steps[j].peer == q && p->steps[j].kind == p->steps[i].kind)
                    i = j;
            int its_part = at[n + q] < pq->nsteps && pq->steps[at[n + q]].group == p->steps[i].group;
            int its_at = at[its_part * n + q];
            if (done[r][i] || its_at == (its_part ? pq->nsteps : ry_second(pq)) ||
                !ry_is_transfer(&pq->steps[its_at]) || (its_part && !may_begin(pq, &pq->steps[its_at], at[q])))
                continue;
            for (int j = its_at, e = group_end(pq, its_at); j < e; j++) {
                const struct ry_step *mine = &p->steps[i], *its = &pq->steps[j];
                if (done[q][j] || its->peer != r || its->kind == mine->kind)
                    continue;
                const struct ry_step *out = mine->kind == RY_STEP_SEND ? mine : its, *in = out == mine ? its : mine;
                memcpy(place(job, mem, in == mine ? r : q, in->to), place(job, mem, out == mine ? r : q, out->from),
                       in->bytes);
                done[r][i] = done[q][j] = true;
                idle = 0;
                k = end; /* one a turn */
                break;
            }
        }
        for (int k = *own; k < end; k++)
            left += !done[r][k];
        if (!left) {
            *own = end;
            idle = 0;
        }
    }
    for (int r = 0; r < n; r++) {
        if (at[r] < ry_second(job->plans[r]) || at[n + r] < job->plans[r]->nsteps)
            snprintf(why, sizeof why, "rank %d is stuck at steps %d and %d", r, at[r], at[n + r]);
        for (int p = 0; p < n && !why[0]; p++)
            for (uint64_t k = 0; k < job->matrix[p * n + r]; k++)
                if (((unsigned char *)job->recv_at[r][p])[k] != wanted(job, p, r, k)) {
                    snprintf(why, sizeof why, "rank %d: byte %llu from rank %d is wrong", r, (unsigned long long)k, p);
                    break;
                }
        free(done[r]);
        free(mem->stage[r]);
    }
    free(done);
    free(at);
    return why;
}

void free_memory(struct job *job, struct memory *mem)
{
    for (int r = 0; r < job->n; r++) {
        free(mem->send[r]);
        free(mem->recv[r]);
    }
    free(mem->send);
    free(mem->recv);
    free(mem->stage);
}

static void reseed(void)
{
    state = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
}

/* ---- time ---- */

double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); /* whoever else is busy on this machine */
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

void builds_within(const struct ry_plan_input *in, double fastest_us, double limit_us)
{
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    mallopt(M_PERTURB, 0); /* meson has memory filled, which takes as long as planning does */
    for (int i = 0; fastest_us >= limit_us && i < 2000; i++) {
        double begun = seconds(), took;
        ry_plan_free(ry_plan_build(in, NULL));
        took = (seconds() - begun) * 1e6;
        fastest_us = took < fastest_us ? took : fastest_us;
    }
    ck_assert_msg(fastest_us < limit_us, "%.0f us", fastest_us);
#endif
}

int run_tests(const char *name, const TTest *const *tests)
{
    const char *set = getenv("RY_TEST_SEED");
    seed = set ? (unsigned)strtoul(set, NULL, 0) : (unsigned)time(NULL);
    printf("RY_TEST_SEED=%u\n", seed);
    fflush(stdout);
    Suite *suite = suite_create(name);
    TCase *t = tcase_create(name);
    tcase_add_checked_fixture(t, reseed, NULL);
    while (*tests)
        tcase_add_test(t, *tests++);
    tcase_set_timeout(t, 110);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
