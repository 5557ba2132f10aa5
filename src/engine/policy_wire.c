/* policy_wire.c: what ranks tell the yardmaster and it tells them, as bytes: see policy.h. */
#include <string.h>

#include "chooser.h"

/* Number `i` of a list of them. There are no more rows than 2^31. */
void ry_counts_put(char *list, int i, const struct ry_repeats *r)
{
    uint32_t word[RY_CHUNKS] = {0};
    for (int k = 0; r && k < RY_CHUNKS - 1; k++)
        word[k] = (uint32_t)r->early[k];
    word[RY_CHUNKS - 1] = r ? (uint32_t)r->distinct : 0;
    memcpy(list + (size_t)i * sizeof word, word, sizeof word);
}

static void get_counts(const char *list, int i, struct ry_repeats *r)
{
    uint32_t word[RY_CHUNKS];
    memcpy(word, list + (size_t)i * sizeof word, sizeof word);
    for (int k = 0; k < RY_CHUNKS - 1; k++)
        r->early[k] = word[k];
    r->distinct = word[RY_CHUNKS - 1];
}

size_t ry_side_pack(void *out, const struct ry_side *side, int nnodes, const struct ry_repeats *repeats)
{
    struct ry_side s = *side;
    s.row_bytes = repeats ? s.row_bytes : 0;
    memcpy(out, &s, sizeof s);
    if (!s.row_bytes)
        return sizeof s;
    for (int n = 0; n < nnodes; n++)
        ry_counts_put((char *)out + sizeof s, n, repeats[n].row_bytes ? &repeats[n] : NULL);
    return ry_side_most(nnodes);
}

int ry_side_unpack(struct ry_side *side, struct ry_repeats *repeats, int nnodes, const void *extra, size_t bytes)
{
    if (bytes < sizeof *side)
        return -1;
    memcpy(side, extra, sizeof *side);
    if (bytes != (side->row_bytes ? ry_side_most(nnodes) : sizeof *side))
        return -1;
    for (int n = 0; n < nnodes; n++) {
        repeats[n] = (struct ry_repeats){0};
        if (!side->row_bytes)
            continue;
        repeats[n].row_bytes = side->row_bytes;
        repeats[n].parts = side->parts;
        get_counts((const char *)extra + sizeof *side, n, &repeats[n]);
    }
    return 0;
}

static size_t cells_bytes(const struct ry_slice *s)
{
    return (size_t)s->nrows * (size_t)s->ncols * sizeof *s->cells;
}

size_t ry_order_bytes(const struct ry_slice *slice)
{
    return sizeof(struct ry_order) + (slice ? cells_bytes(slice) + slice->nwords * sizeof *slice->words : 0) +
           (slice && slice->repeats ? (size_t)slice->nrows * (sizeof(uint64_t) + RY_CHUNKS * sizeof(uint32_t)) : 0);
}

int ry_order_unpack(struct ry_slice *slice, const void *extra, size_t bytes, struct ry_err *err)
{
    size_t expected = ry_order_bytes(slice), cells = cells_bytes(slice), order = sizeof(struct ry_order);
    if (bytes != expected)
        return ry_fail(err, "the verdict holds %zu bytes instead of %zu", bytes, expected);
    if (cells)
        memcpy(slice->cells, (const char *)extra + order, cells);
    if (slice->nwords)
        memcpy(slice->words, (const char *)extra + order + cells, slice->nwords * sizeof *slice->words);
    const char *widths = (const char *)extra + order + cells, *list = widths + (size_t)slice->nrows * sizeof(uint64_t);
    for (int i = 0; slice->repeats && i < slice->nrows; i++) {
        uint64_t width;
        memcpy(&width, widths + (size_t)i * sizeof width, sizeof width);
        slice->repeats[i].row_bytes = width & ~(UINT64_C(0xFF) << RY_PARTS_AT);
        slice->repeats[i].parts = width >> RY_PARTS_AT;
        get_counts(list, i, &slice->repeats[i]);
    }
    return 0;
}
