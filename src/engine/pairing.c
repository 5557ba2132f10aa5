/* pairing.c: see pairing.h. */
#include "pairing.h"

#include <stdlib.h>
#include <string.h>

enum { FLOAT16 = 6, FLOAT32 = 7, BFLOAT16 = 9 }; /* ncclDataType_t */

int ry_combine_parse(const char *text, struct ry_combine *out, struct ry_err *err)
{
    *out = (struct ry_combine){0};
    if (!strcmp(text, "exact"))
        return 0;
    if (!strncmp(text, "sum:", 4) && text[4] >= '1' && text[4] <= '9') {
        char *end;
        unsigned long copies = strtoul(text + 4, &end, 10);
        if (!*end && copies >= 2 && copies <= RY_COPIES_MOST) {
            *out = (struct ry_combine){true, (uint32_t)copies};
            return 0;
        }
    }
    if (!strcmp(text, "sum")) {
        out->sum = true;
        return 0;
    }
    return ry_fail(err, "'%.40s' is none of exact, sum, and sum:K, K (2 to %d) being how many experts a token goes to",
                   text, RY_COPIES_MOST);
}

/* ---- what is remembered ---- */

void ry_pair_free(struct ry_pairs *p, struct ry_pair *pair)
{
    if (!pair)
        return;
    if (pair->kept)
        p->let_go(pair->kept);
    ry_slice_free(&pair->slice);
    free(pair);
}

static void take_out(struct ry_pairs *p, int i)
{
    p->n--;
    memmove(&p->of[i], &p->of[i + 1], (size_t)(p->n - i) * sizeof p->of[0]);
}

int ry_pairs_add(struct ry_pairs *p, const struct ry_cluster *map, int rank, const struct ry_pair *d)
{
    size_t n = (size_t)map->nranks, nodes = (size_t)map->nnodes;
    struct ry_pair *pair = malloc(sizeof *pair + 2 * n * sizeof(uint64_t) + nodes * sizeof(struct ry_repeats));
    if (!pair || ry_slice_init(&pair->slice, map, rank, RY_DEDUP, NULL)) {
        free(pair);
        if (d->kept)
            p->let_go(d->kept);
        return -1;
    }
    struct ry_slice slice = pair->slice;
    *pair = *d;
    pair->slice = slice;
    pair->send = (uint64_t *)(pair + 1);
    pair->recv = pair->send + n;
    pair->repeats = (struct ry_repeats *)(pair->recv + n);
    memcpy(pair->send, d->send, n * sizeof *d->send);
    memcpy(pair->recv, d->recv, n * sizeof *d->recv);
    memset(pair->repeats, 0, nodes * sizeof *pair->repeats);
    if (d->repeats)
        memcpy(pair->repeats, d->repeats, nodes * sizeof *d->repeats);
    if (slice.nrows) {
        memcpy(slice.cells, d->slice.cells, (size_t)slice.nrows * (size_t)slice.ncols * sizeof *slice.cells);
        memcpy(slice.repeats, d->slice.repeats, (size_t)slice.nrows * sizeof *slice.repeats);
    }
    if (p->n == RY_PAIRS) {
        ry_pair_free(p, p->of[0]);
        take_out(p, 0);
    }
    p->of[p->n++] = pair;
    return 0;
}

struct ry_pair *ry_pairs_take(struct ry_pairs *p, uint64_t number)
{
    for (int i = 0; i < p->n; i++) {
        struct ry_pair *pair = p->of[i];
        if (pair->number != number)
            continue;
        take_out(p, i);
        return pair;
    }
    return NULL;
}

void ry_pairs_free(struct ry_pairs *p)
{
    while (p->n)
        ry_pair_free(p, p->of[--p->n]);
}

/* ---- the rule ---- */

uint32_t ry_pairs_wanted(const struct ry_pairs *p)
{
    return p->combine.copies ? p->combine.copies : p->learned ? p->learned : p->guess;
}

/* NULL: every row that may be summed went out `wanted` times. */
static const char *unequal(const struct ry_copies *c, uint32_t wanted)
{
    if (c->zero)
        return "some rows were all zeros";
    if (c->least < 2 || c->least > RY_COPIES_MOST)
        return "rows went out once";
    if (c->least != c->most && !(c->apart && c->times == wanted))
        return "not all rows went out equally often";
    return c->least != wanted ? "rows went out another number of times than tokens do" : NULL;
}

bool ry_pairs_learn(struct ry_pairs *p, const struct ry_copies *copies)
{
    if (!copies->rows)
        return true;
    bool possible = !copies->zero && copies->least >= 2 && copies->least <= RY_COPIES_MOST;
    uint32_t least = (uint32_t)copies->least;
    if (possible && copies->least == copies->most && (!p->learned || p->learned % least == 0))
        p->learned = least;
    else if (possible && copies->least != copies->most && (!p->guess || p->guess > least))
        p->guess = least;
    return !unequal(copies, ry_pairs_wanted(p));
}

const char *ry_pairs_copies(const struct ry_pairs *p, const struct ry_pair *pair, uint32_t *copies)
{
    *copies = 0;
    if (!pair->copies.rows)
        return NULL;
    const char *why = unequal(&pair->copies, ry_pairs_wanted(p));
    if (!why)
        *copies = ry_pairs_wanted(p);
    return why;
}

static uint64_t type_bytes(int type)
{
    return type == FLOAT32 ? 4 : type == FLOAT16 || type == BFLOAT16 ? 2 : 0;
}

const char *ry_pair_refuses(const struct ry_pair *pair, const struct ry_cluster *map, const uint64_t *send,
                            const uint64_t *recv, int type)
{
    size_t n = (size_t)map->nranks;
    uint64_t bytes = type_bytes(type);
    if (!bytes)
        return "its type is none that is summed";
    if (type != pair->type)
        return "what it answers was of another type";
    if (memcmp(pair->send, recv, n * sizeof *recv) || memcmp(pair->recv, send, n * sizeof *send))
        return "its counts are not those of what it answers";
    for (int i = 0; i < map->nnodes; i++)
        if (pair->repeats[i].row_bytes % bytes)
            return "rows are no whole number of elements";
    for (int i = 0; pair->slice.repeats && i < pair->slice.nrows; i++)
        if (pair->slice.repeats[i].row_bytes % bytes)
            return "rows are no whole number of elements";
    return NULL;
}
