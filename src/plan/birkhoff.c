/* birkhoff.c: see birkhoff.h. */
#include "birkhoff.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define MORE_TIME 32                               /* all have L and so much of it */
#define FIRST_STAGES(n) ((n) > 64 ? (n) / 2 : (n)) /* by matchings; finding them takes longer than all else */
#define MOST (UINT64_C(1) << 62)

int ry_stages_most(int n)
{
    return n < 2 ? 0 : FIRST_STAGES(n) + 2 * (n - 1) - 1;
}

struct finder {
    int n;
    uint64_t *left;                /* [n][n] bytes to be sent, yet */
    uint64_t *row_idle, *col_idle; /* [n]: time that the node need not send, or get */
    int *to, *from;                /* [n]: the present matching, -1: none */
    int *queue, *reached_by;       /* [n] of a search */
    struct ry_stages *out;
};

/* For how long could a pair go on? Sending first, or idle where both can afford it. */
static inline uint64_t can_last(const struct finder *f, int a, int b)
{
    uint64_t idle = f->row_idle[a] < f->col_idle[b] ? f->row_idle[a] : f->col_idle[b];
    return f->left[(size_t)a * (size_t)f->n + (size_t)b] + idle;
}

/* A partner of its own for node `a`, the one with most left to be sent, among those that nobody sends to; of equal ones
 * the next in number, so that even matrices become shifts. */
static bool find_free(struct finder *f, int a, uint64_t least)
{
    const uint64_t *left = f->left + (size_t)a * (size_t)f->n;
    int best = -1;
    for (int half = 0; half < 2; half++)
        for (int b = half ? 0 : a + 1, end = half ? a + 1 : f->n; b < end; b++)
            if (f->from[b] < 0 && (best < 0 || left[b] > left[best]) && can_last(f, a, b) >= least)
                best = b;
    if (best < 0)
        return false;
    f->to[a] = best;
    f->from[best] = a;
    return true;
}

/* A partner for `a` by making others change theirs: the shortest alternating path. */
static bool find_by_changes(struct finder *f, int a, uint64_t least)
{
    int n = f->n, head = 0, tail = 0;
    for (int b = 0; b < n; b++)
        f->reached_by[b] = -1;
    f->queue[tail++] = a;
    while (head < tail) {
        int at = f->queue[head++];
        for (int b = 0; b < n; b++) {
            if (f->reached_by[b] >= 0 || can_last(f, at, b) < least)
                continue;
            f->reached_by[b] = at;
            if (f->from[b] >= 0) {
                f->queue[tail++] = f->from[b];
                continue;
            }
            for (int free = b; free >= 0;) { /* back to a */
                int by = f->reached_by[free], before = f->to[by];
                f->to[by] = free;
                f->from[free] = by;
                free = by == a ? -1 : before;
            }
            return true;
        }
    }
    return false;
}

/* All nodes a partner with which they can go on for `least`. */
static bool match(struct finder *f, uint64_t least)
{
    bool all = true;
    for (int a = 0; a < f->n; a++) {
        int b = f->to[a];
        if (b < 0 || (f->left[(size_t)a * (size_t)f->n + (size_t)b] && can_last(f, a, b) >= least))
            continue;
        f->to[a] = f->from[b] = -1; /* who is idle may have something better to do */
    }
    for (int a = 0; a < f->n; a++)
        if (f->to[a] < 0)
            find_free(f, a, least);
    for (int a = 0; a < f->n && all; a++)
        all = f->to[a] >= 0 || find_by_changes(f, a, least);
    return all;
}

/* All could be idle where those who still send cannot go on for as long. */
static bool any_sends(const struct finder *f)
{
    bool any = false;
    for (int a = 0; a < f->n && !any; a++)
        any = f->left[(size_t)a * (size_t)f->n + (size_t)f->to[a]] > 0;
    return any;
}

static struct ry_stage *new_stage(struct finder *f)
{
    struct ry_stage *s = f->out->at + (size_t)f->out->count++ * (size_t)f->n;
    for (int a = 0; a < f->n; a++)
        s[a] = (struct ry_stage){.to = -1};
    return s;
}

/* Let the pairs go on for as long as all of them can. Returns the bytes sent. */
static uint64_t carry_out(struct finder *f)
{
    uint64_t time = UINT64_MAX, most = 0, sent = 0;
    for (int a = 0; a < f->n; a++) {
        uint64_t lasts = can_last(f, a, f->to[a]), left = f->left[(size_t)a * (size_t)f->n + (size_t)f->to[a]];
        time = lasts < time ? lasts : time;
        most = left > most ? left : most;
    }
    time = time < most ? time : most;
    struct ry_stage *s = new_stage(f);
    for (int a = 0; a < f->n; a++) {
        int b = f->to[a];
        uint64_t *left = &f->left[(size_t)a * (size_t)f->n + (size_t)b], bytes = *left < time ? *left : time;
        *left -= bytes;
        f->row_idle[a] -= time - bytes;
        f->col_idle[b] -= time - bytes;
        if (bytes)
            s[a] = (struct ry_stage){b, bytes};
        sent += bytes;
    }
    return sent;
}

struct pair {
    uint64_t bytes;
    int from, to, shift; /* how much further on `to` is, going round */
};
/* Of equal ones those with one shift together: they get into no one's way. */
static int by_bytes(const void *x, const void *y)
{
    const struct pair *a = x, *b = y;
    if (a->bytes != b->bytes)
        return a->bytes > b->bytes ? -1 : 1;
    return a->shift != b->shift ? a->shift - b->shift : a->from - b->from;
}

/* What is left, each pair at once: the longest first, and with it whatever fits. */
static int send_rest(struct finder *f, struct ry_err *err)
{
    size_t n = (size_t)f->n, count = 0;
    struct pair *pairs = malloc(n * n * sizeof *pairs);
    if (!pairs)
        return ry_fail(err, "out of memory for the stages of %d nodes", f->n);
    for (size_t i = 0; i < n * n; i++)
        if (f->left[i])
            pairs[count++] = (struct pair){f->left[i], (int)(i / n), (int)(i % n), (int)((i % n + n - i / n) % n)};
    qsort(pairs, count, sizeof *pairs, by_bytes);
    while (count) {
        struct ry_stage *s = new_stage(f);
        size_t kept = 0;
        memset(f->from, -1, n * sizeof *f->from);
        for (size_t i = 0; i < count; i++) {
            struct pair p = pairs[i];
            if (s[p.from].to >= 0 || f->from[p.to] >= 0) {
                pairs[kept++] = p;
                continue;
            }
            s[p.from] = (struct ry_stage){p.to, p.bytes};
            f->from[p.to] = p.from;
        }
        count = kept;
    }
    free(pairs);
    return 0;
}

/* Row and column sums, and what idle time follows from them. Returns all bytes; UINT64_MAX: too many. */
static uint64_t sum_up(struct finder *f, uint64_t *time)
{
    size_t n = (size_t)f->n;
    uint64_t most = 0, all = 0;
    for (size_t a = 0; a < n; a++)
        for (size_t b = 0; b < n; b++) {
            uint64_t bytes = f->left[a * n + b];
            if (bytes > MOST || (all += bytes) > MOST)
                return UINT64_MAX;
            f->row_idle[a] += bytes;
            f->col_idle[b] += bytes;
        }
    for (size_t a = 0; a < n; a++) {
        most = f->row_idle[a] > most ? f->row_idle[a] : most;
        most = f->col_idle[a] > most ? f->col_idle[a] : most;
    }
    *time = most + most / MORE_TIME;
    for (size_t a = 0; a < n; a++) {
        f->row_idle[a] = *time - f->row_idle[a];
        f->col_idle[a] = *time - f->col_idle[a];
    }
    return all;
}

int ry_stages_find(struct ry_stages *out, int nnodes, const uint64_t *matrix, struct ry_err *err)
{
    size_t n = (size_t)nnodes;
    *out = (struct ry_stages){.nnodes = nnodes};
    if (nnodes < 2)
        return 0;
    struct finder f = {.n = nnodes, .out = out};
    uint64_t *numbers = calloc(n * n + 2 * n, sizeof *numbers);
    int *places = malloc(4 * n * sizeof *places), rc = 0;
    out->at = malloc((size_t)ry_stages_most(nnodes) * n * sizeof *out->at);
    if (!numbers || !places || !out->at) {
        rc = ry_fail(err, "out of memory for the stages of %d nodes", nnodes);
        goto out;
    }
    f.row_idle = numbers;
    f.col_idle = f.row_idle + n;
    f.left = f.col_idle + n;
    f.to = places;
    f.from = f.to + n;
    f.queue = f.from + n;
    f.reached_by = f.queue + n;
    memcpy(f.left, matrix, n * n * sizeof *matrix);
    memset(f.to, -1, 2 * n * sizeof *f.to);
    for (size_t a = 0; a < n; a++)
        f.left[a * n + a] = 0;
    uint64_t least, left = sum_up(&f, &least);
    if (left == UINT64_MAX) {
        rc = ry_fail(err, "what nodes send to each other adds up to more than 62 bits of bytes");
        goto out;
    }
    while (left && least && out->count < FIRST_STAGES(nnodes)) {
        if (match(&f, least) && any_sends(&f))
            left -= carry_out(&f);
        else
            least -= least / 4 + 1;
    }
    rc = left ? send_rest(&f, err) : 0;
out:
    free(numbers);
    free(places);
    if (rc)
        ry_stages_free(out);
    return rc;
}

void ry_stages_free(struct ry_stages *stages)
{
    free(stages->at);
    *stages = (struct ry_stages){0};
}
