/*
 * rows_host.c: the kernels of rows.cu once more, for host memory.
 *
 * Owns: the same results in the same memory, written so that they are easy to believe. Not: which kernel runs when
 * (rows.c).
 */
#include <string.h>

#include "rows_internal.h"

#define AT(type, address) ((type *)(uintptr_t)(address))

struct span {
    const unsigned char *at;
    uint64_t bytes, node, told;
};

static struct span span_of(const struct ry_rows_scan *s, uint64_t row)
{
    const struct ry_rows_segment *segment = AT(const struct ry_rows_segment, s->segments);
    uint32_t low = 0, high = s->nsegments;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (segment[middle].first_row <= row)
            low = middle;
        else
            high = middle;
    }
    segment += low;
    uint64_t skip = (row - segment->first_row) * s->row_bytes, left = segment->bytes - skip;
    return (struct span){AT(const unsigned char, segment->at) + skip, left < s->row_bytes ? left : s->row_bytes,
                         segment->node, segment->told + (row - segment->first_row)};
}

/* Add the word at `at` (cut at the row's end) as number `i` to a hash. */
static void add_word(struct span row, uint64_t at, uint64_t i, uint64_t *sum, uint64_t *any)
{
    uint64_t w[2] = {0, 0};
    if (at >= row.bytes)
        return;
    memcpy(w, row.at + at, row.bytes - at < sizeof w ? row.bytes - at : sizeof w);
    *sum += ry_rows_hash_word(w[0], w[1], i);
    *any |= w[0] | w[1];
}

static uint32_t insert(const struct ry_rows_scan *s, uint64_t key, uint64_t row)
{
    struct ry_rows_slot *table = AT(struct ry_rows_slot, s->table);
    uint64_t mask = (UINT64_C(1) << s->table_bits) - 1, i = ry_rows_home(key, s->table_bits);
    while (table[i].key != RY_ROWS_EMPTY && table[i].key != key)
        i = (i + 1) & mask;
    table[i].key = key;
    if (row < table[i].row)
        table[i].row = row;
    return (uint32_t)i;
}

static void host_put(const void *param)
{
    const struct ry_rows_put *p = param;
    memcpy(AT(void, p->to), p->word, p->n * sizeof *p->word);
    if (p->nfill)
        memset(AT(void, p->fill), 0xff, p->nfill * 16);
}

/* Row number `told` is of several tokens with the same bytes, and goes by itself. */
static bool alone(const struct ry_rows_scan *s, uint64_t told)
{
    const struct ry_rows_extremes *e = AT(const struct ry_rows_extremes, s->told_extremes);
    if (!s->told_where || !ry_rows_apart(e->odd, e->many, s->told_rows))
        return false;
    uint32_t times = AT(const uint32_t, s->told_times)[AT(const uint32_t, s->told_where)[told]];
    return times && times != s->copies;
}

static void host_sample(const void *param)
{
    const struct ry_rows_scan *s = param;
    uint32_t *where = AT(uint32_t, s->where);
    uint8_t *state = AT(uint8_t, s->state);
    for (uint64_t r = 0; r < s->nrows; r++) {
        struct span row = span_of(s, r);
        uint64_t sum = 0, any = 0;
        for (uint32_t i = 0; i < RY_ROWS_SAMPLE; i++)
            add_word(row, ry_rows_sample_at(s->row_bytes, i), i, &sum, &any);
        state[r] = row.bytes < s->row_bytes || alone(s, row.told) ? RY_ROWS_PARTIAL : any ? 0 : RY_ROWS_LOOK;
        if (!state[r])
            where[r] = insert(s, ry_rows_sample_key(ry_rows_hash_end(sum), s->sample_mask, row.node), r);
    }
}

static void host_compare(const void *param)
{
    const struct ry_rows_scan *s = param;
    const struct ry_rows_slot *table = AT(struct ry_rows_slot, s->table);
    uint32_t *where = AT(uint32_t, s->where), *pending = AT(uint32_t, s->order);
    uint8_t *state = AT(uint8_t, s->state);
    uint64_t *npending = AT(uint64_t, s->npending);
    for (uint64_t r = 0; r < s->nrows; r++) {
        struct span row = span_of(s, r);
        uint64_t sum = 0, any = 0;
        if (!state[r]) {
            uint64_t leader = table[where[r]].row;
            if (leader == r || !memcmp(row.at, span_of(s, leader).at, row.bytes)) {
                where[r] = (uint32_t)leader;
                continue;
            }
        }
        for (uint64_t i = 0; i * 16 < row.bytes; i++)
            add_word(row, i * 16, i, &sum, &any);
        if (state[r] == RY_ROWS_PARTIAL) {
            where[r] = (uint32_t)r;
            state[r] = any ? 0 : RY_ROWS_ZERO;
        } else if (!any) {
            where[r] = insert(s, ry_rows_zero_key(row.node), r);
            state[r] = RY_ROWS_ZERO | RY_ROWS_SLOT;
        } else {
            where[r] = insert(s, ry_rows_full_key(ry_rows_hash_end(sum), s->full_mask, row.node), r);
            state[r] = 0;
            pending[(*npending)++] = (uint32_t)r;
        }
    }
}

static void host_recompare(const void *param)
{
    const struct ry_rows_scan *s = param;
    const struct ry_rows_slot *table = AT(struct ry_rows_slot, s->table);
    const uint32_t *pending = AT(uint32_t, s->order);
    uint32_t *where = AT(uint32_t, s->where);
    uint64_t n = *AT(uint64_t, s->npending);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t r = pending[i], leader = table[where[r]].row;
        struct span row = span_of(s, r);
        where[r] = (uint32_t)(memcmp(row.at, span_of(s, leader).at, row.bytes) ? r : leader);
    }
}

/* There is no need for tiles here: `number` does it all. */
static void host_count(const void *param)
{
    const struct ry_rows_scan *s = param;
    const struct ry_rows_slot *table = AT(struct ry_rows_slot, s->table);
    const uint8_t *state = AT(uint8_t, s->state);
    uint32_t *where = AT(uint32_t, s->where);
    for (uint64_t r = 0; r < s->nrows; r++)
        if (state[r] & RY_ROWS_SLOT)
            where[r] = (uint32_t)table[where[r]].row;
}

static void host_number(const void *param)
{
    const struct ry_rows_scan *s = param;
    const uint32_t *where = AT(uint32_t, s->where);
    const uint8_t *state = AT(uint8_t, s->state);
    uint32_t *index = AT(uint32_t, s->index), *order = AT(uint32_t, s->order);
    uint64_t *found = AT(uint64_t, s->found);
    for (uint32_t n = 0; n < s->nnodes; n++) {
        struct ry_rows_node *node = AT(struct ry_rows_node, s->nodes) + n;
        uint64_t distinct = 0, zero = 0;
        for (uint64_t r = node->first_row; r < node->first_row + node->rows; r++) {
            for (uint32_t k = 0; k < RY_ROWS_PARTS - 1; k++)
                if (r == node->first_row + node->part[k])
                    found[(2 + k) * s->nnodes + n] = distinct;
            zero += state[r] & RY_ROWS_ZERO ? 1 : 0;
            if (where[r] == r) {
                index[r] = (uint32_t)distinct;
                order[node->first_row + distinct++] = (uint32_t)r;
            }
        }
        node->distinct = found[n] = distinct;
        found[s->nnodes + n] = zero;
    }
}

static void host_tally(const void *param)
{
    const struct ry_rows_scan *s = param;
    for (uint64_t r = 0; r < s->nrows; r++)
        if (!(AT(const uint8_t, s->state)[r] & RY_ROWS_ZERO))
            AT(uint32_t, s->table)[AT(const uint32_t, s->where)[r]]++;
}

static void host_extremes(const void *param)
{
    const struct ry_rows_scan *s = param;
    struct ry_rows_extremes *all = AT(struct ry_rows_extremes, s->tiles);
    for (uint64_t r = 0; r < s->nrows; r++) {
        uint32_t times = AT(const uint32_t, s->table)[r];
        if (times && times > all->most)
            all->most = times;
        if (times && ~times > all->not_least)
            all->not_least = ~times;
        if (s->copies && times % s->copies)
            all->odd += times;
        else if (s->copies && times != s->copies)
            all->many += times;
    }
}

static void pack_one(const struct ry_rows_scan *s, const struct ry_rows_node *node, uint64_t message)
{
    const uint32_t *where = AT(uint32_t, s->where), *index = AT(uint32_t, s->index), *order = AT(uint32_t, s->order);
    unsigned char *to = AT(unsigned char, message);
    uint64_t list_at = ry_rows_list_at(s->row_bytes, node->distinct);
    for (uint64_t d = 0; d < node->distinct; d++, to += s->row_bytes) {
        struct span row = span_of(s, order[node->first_row + d]);
        memcpy(to, row.at, row.bytes);
        memset(to + row.bytes, 0, s->row_bytes - row.bytes);
    }
    memset(to, 0, list_at - node->distinct * s->row_bytes);
    uint32_t *list = AT(uint32_t, message + list_at);
    for (uint64_t i = 0; i < node->rows; i++)
        list[i] = index[where[node->first_row + i]];
}

static void host_pack(const void *param)
{
    const struct ry_rows_pack *p = param;
    for (uint32_t i = 0; i < p->n; i++)
        pack_one(&p->scan, AT(const struct ry_rows_node, p->scan.nodes) + p->node[i], p->message[i]);
}

static void host_expand(const void *param)
{
    const struct ry_rows_expand *e = param;
    for (uint32_t p = 0; p < e->n; p++) {
        const unsigned char *from = AT(const unsigned char, e->message[p]);
        const uint32_t *list = AT(const uint32_t, e->message[p] + ry_rows_list_at(e->row_bytes, e->distinct[p]));
        for (uint64_t i = 0; i < e->first_row[p + 1] - e->first_row[p]; i++) {
            uint64_t d = list[e->skip[p] + i], at = i * e->row_bytes, left = e->bytes[p] - at;
            if (d < e->distinct[p])
                memcpy(AT(unsigned char, e->to[p]) + at, from + d * e->row_bytes,
                       left < e->row_bytes ? left : e->row_bytes);
            else
                ++*AT(uint64_t, e->errors);
        }
    }
}

struct ry_kernel rows_put = {.name = "ry_put_words", .host = host_put};
struct ry_kernel rows_sample = {.name = "ry_sample_rows", .host = host_sample};
struct ry_kernel rows_compare = {.name = "ry_compare_rows", .host = host_compare};
struct ry_kernel rows_recompare = {.name = "ry_recompare_rows", .host = host_recompare};
struct ry_kernel rows_count = {.name = "ry_count_rows", .host = host_count};
struct ry_kernel rows_number = {.name = "ry_number_rows", .host = host_number};
struct ry_kernel rows_tally = {.name = "ry_tally_rows", .host = host_tally};
struct ry_kernel rows_extremes = {.name = "ry_extremes_of_rows", .host = host_extremes};
struct ry_kernel rows_pack = {.name = "ry_pack_rows", .host = host_pack};
struct ry_kernel rows_expand = {.name = "ry_expand_rows", .host = host_expand};

#ifdef RY_HAVE_FATBIN
extern const unsigned long long ry_rows_fatbin[]; /* made from rows.cu by nvcc */
#else
#define ry_rows_fatbin NULL
#endif

const struct ry_kernels rows_kernels = {
    .image = ry_rows_fatbin,
    .kernel = (struct ry_kernel *const[]){&rows_put, &rows_sample, &rows_compare, &rows_recompare, &rows_count,
                                          &rows_number, &rows_tally, &rows_extremes, &rows_pack, &rows_expand},
    .n = 10,
};
