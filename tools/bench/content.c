/* content.c: see content.h. */
#include "content.h"

#include <stdlib.h>
#include <string.h>

#include "random.h"

const char *ry_flow_name(enum ry_flow flow)
{
    static const char *const names[] = {"dispatch",         "probs",          "combine",
                                        "combine-gradient", "probs-gradient", "dispatch-gradient"};
    return names[flow];
}

bool ry_flow_is_back(enum ry_flow flow)
{
    return flow == RY_FLOW_COMBINE || flow == RY_FLOW_PROBS_GRAD || flow == RY_FLOW_DISPATCH_GRAD;
}

size_t ry_rows_list(struct ry_row *rows, uint64_t *count, const uint16_t *choice, int tokens, int top_k, int owner,
                    int first, int last, size_t capacity)
{
    size_t n = 0;
    int experts = last - first;
    size_t *at = calloc((size_t)experts + 1, sizeof *at), *end = calloc((size_t)experts + 1, sizeof *end);
    if (!at || !end)
        abort(); /* a few hundred bytes */
    size_t copies = (size_t)tokens * (size_t)top_k;
    for (size_t i = 0; i < copies; i++)
        if (choice[i] >= first && choice[i] < last)
            at[choice[i] - first + 1]++;
    for (int e = 0; e < experts; e++)
        at[e + 1] = at[e] + (capacity ? capacity : at[e + 1]);
    n = at[experts];
    memcpy(end, at, ((size_t)experts + 1) * sizeof *end);
    for (size_t i = 0; i < copies; i++) {
        if (choice[i] < first || choice[i] >= last)
            continue;
        int e = choice[i] - first;
        if (end[e] < at[e + 1]) /* else over the capacity: dropped */
            rows[end[e]++] = (struct ry_row){owner, (int32_t)(i / (size_t)top_k), choice[i]};
    }
    for (int e = 0; e < experts; e++) {
        if (count)
            count[e] = at[e + 1] - at[e];
        while (end[e] < at[e + 1])
            rows[end[e]++] = (struct ry_row){owner, RY_PADDING, e + first};
    }
    free(at);
    free(end);
    return n;
}

/*
 * What tells one row's content from another's. Copies of one token have one key where frameworks send exact copies.
 * Padding, as DeepSpeed has it: zero rows (false), but what an expert makes of a zero row on the way back from it.
 */
static bool row_key(const struct ry_content *c, const struct ry_row *row, uint64_t *key)
{
    bool copies = c->flow == RY_FLOW_DISPATCH || c->flow == RY_FLOW_COMBINE_GRAD;
    uint64_t owner = (uint64_t)row->owner, token = (uint64_t)row->token,
             expert = copies ? 0 : (uint64_t)row->expert + 1;
    if (row->token == RY_PADDING) {
        if (c->flow != RY_FLOW_COMBINE)
            return false;
        owner = token = UINT64_MAX;
    }
    *key = ry_key(c->seed, 'c', c->iteration, (uint64_t)c->layer, (uint64_t)c->flow, owner, token, expert);
    return true;
}

static void fill_row(const struct ry_content *c, const struct ry_row *row, unsigned char *out)
{
    uint64_t key;
    if (!row_key(c, row, &key)) {
        memset(out, 0, c->row_bytes);
        return;
    }
    size_t words = c->row_bytes / 8, rest = c->row_bytes % 8;
    for (size_t i = 0; i < words; i++) {
        uint64_t v = ry_random_at(key, i) & ~c->mask;
        memcpy(out + 8 * i, &v, 8);
    }
    if (rest) {
        uint64_t v = ry_random_at(key, words) & ~c->mask;
        memcpy(out + 8 * words, &v, rest);
    }
}

void ry_content_fill(const struct ry_content *c, const struct ry_row *rows, size_t n, void *out)
{
    for (size_t i = 0; i < n; i++)
        fill_row(c, rows + i, (unsigned char *)out + i * c->row_bytes);
}

bool ry_content_check(const struct ry_content *c, const struct ry_row *rows, size_t n, const void *got,
                      struct ry_wrong *wrong)
{
    *wrong = (struct ry_wrong){0};
    unsigned char *want = malloc(c->row_bytes ? c->row_bytes : 1);
    if (!want)
        abort();
    for (size_t i = 0; i < n; i++) {
        const unsigned char *row = (const unsigned char *)got + i * c->row_bytes;
        fill_row(c, rows + i, want);
        if (!memcmp(row, want, c->row_bytes))
            continue;
        for (size_t b = 0; b < c->row_bytes; b++) {
            if (row[b] == want[b])
                continue;
            if (!wrong->bytes++) {
                wrong->first = i * c->row_bytes + b;
                wrong->got = row[b];
                wrong->expected = want[b];
            }
        }
    }
    free(want);
    return !wrong->bytes;
}
