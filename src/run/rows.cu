/*
 * rows.cu: finding, packing and expanding equal rows at memory bandwidth. What the steps are is in rows_kernels.h, the
 * twins for host memory in rows_host.c.
 *
 * Threads of a warp share rows (`lanes` of them a row), and talk through the warp only: there is no shared memory and
 * no barrier of a block. Nothing that one thread does first shows in the result: the table keeps the least row of each
 * key wherever its slot came to lie, and the list of pending rows is worked off in any order.
 */
#include "rows.cuh"

#define DEEP RY_ROWS_DEEP

/* A row, and its segment's ends, beyond which nothing may be read. */
struct span {
    const byte *at, *from, *to;
    uint64_t bytes, node, told;
};

static __device__ span span_of(const ry_rows_scan &s, uint64_t row)
{
    const ry_rows_segment *segment = AT(const ry_rows_segment, s.segments);
    uint32_t low = 0, high = s.nsegments;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (segment[middle].first_row <= row)
            low = middle;
        else
            high = middle;
    }
    const byte *from = AT(const byte, segment[low].at), *to = from + segment[low].bytes;
    const byte *at = from + (row - segment[low].first_row) * s.row_bytes;
    uint64_t left = (uint64_t)(to - at);
    return span{at, from, to, left < s.row_bytes ? left : s.row_bytes, segment[low].node,
                segment[low].told + (row - segment[low].first_row)};
}

/* The 16 bytes at `p`, all of them between `from` and `to`. */
static __device__ uint4 word_at(const byte *p, const byte *from, const byte *to)
{
    uint32_t shift = (uint32_t)((uint64_t)p % WORD);
    const uint4 *aligned = (const uint4 *)(p - shift);
    if (!shift)
        return *aligned;
    if ((const byte *)aligned >= from && (const byte *)(aligned + 2) <= to)
        return joined(aligned[0], aligned[1], shift);
    return by_bytes(p);
}

/* The first n < 16 bytes at `p`, then zeros. */
static __device__ uint4 cut_word(const byte *p, uint32_t n)
{
    uint32_t w[4] = {0, 0, 0, 0};
    for (uint32_t i = 0; i < 15; i++)
        if (i < n)
            w[i / 4] |= (uint32_t)p[i] << i % 4 * 8;
    return make_uint4(w[0], w[1], w[2], w[3]);
}

static __device__ uint64_t share(uint4 v, uint64_t i)
{
    return ry_rows_hash_word((uint64_t)v.y << 32 | v.x, (uint64_t)v.w << 32 | v.z, i);
}

static __device__ uint32_t insert(const ry_rows_scan &s, uint64_t key, uint64_t row)
{
    ry_rows_slot *table = AT(ry_rows_slot, s.table);
    uint64_t mask = (1ull << s.table_bits) - 1, i = ry_rows_home(key, s.table_bits);
    for (;; i = (i + 1) & mask) {
        /* Most of many equal rows find their key there, and a row before them: they need no atomic operation. */
        uint64_t there = *(volatile uint64_t *)&table[i].key;
        if (there == RY_ROWS_EMPTY)
            there = atomicCAS((ull *)&table[i].key, (ull)RY_ROWS_EMPTY, (ull)key);
        if (there == RY_ROWS_EMPTY || there == key)
            break;
    }
    if (*(volatile uint64_t *)&table[i].row > row)
        atomicMin((ull *)&table[i].row, (ull)row);
    return (uint32_t)i;
}

/* ---- the threads of a launch ---- */

/* The lanes that share a row with this one. */
static __device__ uint32_t mates(uint32_t lanes)
{
    uint32_t lane = threadIdx.x % 32;
    return (lanes == 32 ? FULL : (1u << lanes) - 1) << lane / lanes * lanes;
}

template <class T> static __device__ T sum(uint32_t mask, T v, uint32_t lanes)
{
    for (uint32_t x = lanes / 2; x; x /= 2)
        v += __shfl_xor_sync(mask, v, x);
    return v;
}

/* ---- kernels ---- */

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_put_words(const __grid_constant__ ry_rows_put p)
{
    for (uint64_t i = thread_of(); i < p.n; i += threads())
        AT(uint64_t, p.to)[i] = p.word[i];
    for (uint64_t i = thread_of(); i < p.nfill; i += threads())
        AT(uint4, p.fill)[i] = make_uint4(FULL, FULL, FULL, FULL);
}

/* Row number `told` is of several tokens with the same bytes, and goes by itself. */
static __device__ bool alone(const ry_rows_scan &s, uint64_t told)
{
    uint32_t times = AT(const uint32_t, s.told_times)[AT(const uint32_t, s.told_where)[told]];
    return times && times != s.copies;
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_sample_rows(const __grid_constant__ ry_rows_scan s)
{
    uint32_t i = threadIdx.x % RY_ROWS_SAMPLE;
    uint64_t offset = ry_rows_sample_at(s.row_bytes, i), step = threads() / RY_ROWS_SAMPLE;
    bool apart = false;
    if (s.told_where) {
        ry_rows_extremes e = *AT(const ry_rows_extremes, s.told_extremes);
        apart = ry_rows_apart(e.odd, e.many, s.told_rows) && e.many;
    }
    for (uint64_t first = thread_of() / 32 * (32 / RY_ROWS_SAMPLE); first < s.nrows; first += step) {
        uint64_t row = first + threadIdx.x % 32 / RY_ROWS_SAMPLE, hash = 0, node = 0;
        bool whole = false; /* and may have equals */
        uint32_t any = 0;
        if (row < s.nrows) {
            span a = span_of(s, row);
            whole = a.bytes == s.row_bytes && !(apart && alone(s, a.told));
            node = a.node;
            if (whole && offset < a.bytes) {
                uint4 v = a.bytes - offset < WORD ? cut_word(a.at + offset, (uint32_t)(a.bytes - offset))
                                                  : word_at(a.at + offset, a.from, a.to);
                hash = share(v, i);
                any = v.x | v.y | v.z | v.w;
            }
        }
        hash = sum(FULL, hash, RY_ROWS_SAMPLE);
        any = __ballot_sync(FULL, any != 0) & mates(RY_ROWS_SAMPLE);
        if (i || row >= s.nrows)
            continue;
        AT(uint8_t, s.state)[row] = !whole ? RY_ROWS_PARTIAL : any ? 0 : RY_ROWS_LOOK;
        if (whole && any)
            AT(uint32_t, s.where)
        [row] = insert(s, ry_rows_sample_key(ry_rows_hash_end(hash), s.sample_mask, node), row);
    }
}

struct finding {
    bool differs, any;
    uint64_t hash;
};

/* All of row `a`, by `lanes` threads: does it differ from `b` (of as many bytes; b.at NULL: no), is it zero, its hash.
 */
static __device__ finding examine(const span &a, const span &b, uint32_t lanes)
{
    uint32_t lane = threadIdx.x % lanes, mask = mates(lanes), differ = 0, any = 0;
    uint64_t hash = 0, words = a.bytes / WORD;
    for (uint64_t w = lane; w < words; w += DEEP * lanes) {
        uint4 x[DEEP], y[DEEP];
#pragma unroll
        for (uint32_t k = 0; k < DEEP; k++)
            if (w + k * lanes < words)
                x[k] = word_at(a.at + (w + k * lanes) * WORD, a.from, a.to);
#pragma unroll
        for (uint32_t k = 0; k < DEEP; k++)
            if (w + k * lanes < words)
                y[k] = b.at ? word_at(b.at + (w + k * lanes) * WORD, b.from, b.to) : x[k];
#pragma unroll
        for (uint32_t k = 0; k < DEEP; k++)
            if (w + k * lanes < words) {
                hash += share(x[k], w + k * lanes);
                any |= x[k].x | x[k].y | x[k].z | x[k].w;
                differ |= (x[k].x ^ y[k].x) | (x[k].y ^ y[k].y) | (x[k].z ^ y[k].z) | (x[k].w ^ y[k].w);
            }
    }
    uint32_t tail = (uint32_t)(a.bytes % WORD);
    if (tail && words % lanes == lane) {
        uint4 x = cut_word(a.at + words * WORD, tail), y = b.at ? cut_word(b.at + words * WORD, tail) : x;
        hash += share(x, words);
        any |= x.x | x.y | x.z | x.w;
        differ |= (x.x ^ y.x) | (x.y ^ y.y) | (x.z ^ y.z) | (x.w ^ y.w);
    }
    return finding{(__ballot_sync(mask, differ != 0) & mask) != 0, (__ballot_sync(mask, any != 0) & mask) != 0,
                   sum(mask, hash, lanes)};
}

static __device__ void compare_one(const ry_rows_scan &s, uint64_t row, uint64_t leader)
{
    uint8_t state = AT(uint8_t, s.state)[row];
    span a = span_of(s, row), b = span{NULL, NULL, NULL, 0, 0, 0};
    if (!state)
        b = span_of(s, leader);
    finding f = examine(a, b, s.lanes);
    if (threadIdx.x % s.lanes)
        return;
    uint32_t where;
    if (!state && !f.differs) {
        where = (uint32_t)leader;
    } else if (state == RY_ROWS_PARTIAL) {
        where = (uint32_t)row;
        state = f.any ? 0 : RY_ROWS_ZERO;
    } else if (!f.any) {
        where = insert(s, ry_rows_zero_key(a.node), row);
        state = RY_ROWS_ZERO | RY_ROWS_SLOT;
    } else {
        where = insert(s, ry_rows_full_key(ry_rows_hash_end(f.hash), s.full_mask, a.node), row);
        state = 0;
        AT(uint32_t, s.order)[atomicAdd(AT(ull, s.npending), 1ull)] = (uint32_t)row;
    }
    AT(uint32_t, s.where)[row] = where;
    AT(uint8_t, s.state)[row] = state;
}

/* A warp takes `batch` rows: which of them need a look is found by all at once, the looking is done in turn. */
extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_compare_rows(const __grid_constant__ ry_rows_scan s)
{
    uint32_t lane = threadIdx.x % 32, groups = 32 / s.lanes, group = lane / s.lanes;
    const ry_rows_slot *table = AT(const ry_rows_slot, s.table);
    for (uint64_t first = thread_of() / 32 * s.batch; first < s.nrows; first += threads() / 32 * s.batch) {
        uint64_t row = first + lane;
        uint32_t leader = 0;
        bool look = false;
        if (lane < s.batch && row < s.nrows) {
            look = AT(uint8_t, s.state)[row] != 0;
            if (!look) {
                leader = (uint32_t)table[AT(uint32_t, s.where)[row]].row;
                look = leader != row;
                if (!look)
                    AT(uint32_t, s.where)[row] = leader;
            }
        }
        uint32_t todo = __ballot_sync(FULL, look);
        for (uint32_t k = 0; k < s.batch; k += groups) {
            if (!(todo >> k)) /* the same for the warp */
                break;
            uint32_t i = k + group, of_i = __shfl_sync(FULL, leader, (int)(i % 32));
            if (i < s.batch && todo >> i & 1)
                compare_one(s, first + i, of_i);
        }
    }
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_recompare_rows(const __grid_constant__ ry_rows_scan s)
{
    const ry_rows_slot *table = AT(const ry_rows_slot, s.table);
    uint32_t *where = AT(uint32_t, s.where);
    uint64_t n = *AT(const uint64_t, s.npending);
    for (uint64_t i = thread_of() / s.lanes; i < n; i += threads() / s.lanes) {
        uint64_t row = AT(const uint32_t, s.order)[i], leader = table[where[row]].row;
        bool differs = leader != row && examine(span_of(s, row), span_of(s, leader), s.lanes).differs;
        __syncwarp(mates(s.lanes)); /* all have read where[row] */
        if (threadIdx.x % s.lanes == 0)
            where[row] = (uint32_t)(differs ? row : leader);
    }
}

/* A node's rows [from, to) that are a tile. */
struct tile {
    uint64_t from, to;
    uint32_t node, part;
};

static __device__ tile tile_of(const ry_rows_scan &s, uint64_t t)
{
    uint32_t node = (uint32_t)(t / s.tiles_per_node), part = (uint32_t)(t % s.tiles_per_node);
    ry_rows_node n = AT(const ry_rows_node, s.nodes)[node];
    uint64_t each = (n.rows + s.tiles_per_node - 1) / s.tiles_per_node, from = part * each, to = from + each;
    return tile{n.first_row + (from < n.rows ? from : n.rows), n.first_row + (to < n.rows ? to : n.rows), node, part};
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_count_rows(const __grid_constant__ ry_rows_scan s)
{
    const ry_rows_slot *table = AT(const ry_rows_slot, s.table);
    uint64_t ntiles = (uint64_t)s.nnodes * s.tiles_per_node;
    for (uint64_t t = thread_of() / 32; t < ntiles; t += threads() / 32) {
        tile tile = tile_of(s, t);
        uint64_t counts = 0;
        for (uint64_t row = tile.from + threadIdx.x % 32; row < tile.to; row += 32) {
            uint8_t state = AT(uint8_t, s.state)[row];
            uint32_t where = AT(uint32_t, s.where)[row];
            if (state & RY_ROWS_SLOT)
                AT(uint32_t, s.where)[row] = where = (uint32_t)table[where].row;
            counts += (where == row ? 1ull : 0) + (state & RY_ROWS_ZERO ? 1ull << 32 : 0);
        }
        counts = sum(FULL, counts, 32u);
        if (threadIdx.x % 32 == 0)
            AT(uint64_t, s.tiles)[t] = counts;
    }
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_number_rows(const __grid_constant__ ry_rows_scan s)
{
    uint32_t lane = threadIdx.x % 32;
    uint64_t ntiles = (uint64_t)s.nnodes * s.tiles_per_node;
    for (uint64_t t = thread_of() / 32; t < ntiles; t += threads() / 32) {
        tile tile = tile_of(s, t);
        ry_rows_node *node = AT(ry_rows_node, s.nodes) + tile.node;
        const uint64_t *counts = AT(const uint64_t, s.tiles) + (t - tile.part);
        uint64_t before = 0, first_row = node->first_row;
        if (node->rows)
            for (uint32_t i = lane; i < tile.part; i += 32)
                before += counts[i];
        before = sum(FULL, before, 32u);
        if (tile.part + 1 == s.tiles_per_node && !lane) {
            uint64_t all = node->rows ? before + counts[tile.part] : 0;
            node->distinct = AT(uint64_t, s.found)[tile.node] = (uint32_t)all;
            AT(uint64_t, s.found)[s.nnodes + tile.node] = all >> 32;
        }
        uint32_t n = (uint32_t)before;
        for (uint64_t some = tile.from; some < tile.to; some += 32) {
            uint64_t row = some + lane;
            bool distinct = row < tile.to && AT(const uint32_t, s.where)[row] == row;
            uint32_t which = __ballot_sync(FULL, distinct);
            if (distinct) {
                uint32_t i = n + (uint32_t)__popc(which & ((1u << lane) - 1));
                AT(uint32_t, s.index)[row] = i;
                AT(uint32_t, s.order)[first_row + i] = (uint32_t)row;
            }
            if (lane < RY_ROWS_PARTS - 1) {
                uint64_t begin = first_row + node->part[lane]; /* in one tile, if it is not the end */
                if (begin >= some && begin < some + 32 && begin < tile.to)
                    AT(uint64_t, s.found)
                [(2 + lane) * s.nnodes + tile.node] =
                    n + (uint32_t)__popc(which & ((1u << (uint32_t)(begin - some)) - 1));
            }
            n += (uint32_t)__popc(which);
        }
    }
}

/* How often each distinct row occurs, where the table was: zeros yet. Those of zero bytes are not counted. */
extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_tally_rows(const __grid_constant__ ry_rows_scan s)
{
    for (uint64_t row = thread_of(); row < s.nrows; row += threads())
        if (!(AT(const uint8_t, s.state)[row] & RY_ROWS_ZERO))
            atomicAdd(AT(uint32_t, s.table) + AT(const uint32_t, s.where)[row], 1u);
}

/* struct ry_rows_extremes of them, where the tiles were. */
extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_extremes_of_rows(const __grid_constant__ ry_rows_scan s)
{
    ry_rows_extremes *all = AT(ry_rows_extremes, s.tiles);
    uint32_t most = 0, not_least = 0, odd = 0, many = 0;
    for (uint64_t row = thread_of(); row < s.nrows; row += threads()) {
        uint32_t times = AT(const uint32_t, s.table)[row];
        if (times) { /* the first of its equals */
            most = times > most ? times : most;
            not_least = ~times > not_least ? ~times : not_least;
            if (s.copies && times % s.copies)
                odd += times;
            else if (s.copies && times != s.copies)
                many += times;
        }
    }
    odd = sum(FULL, odd, 32u);
    many = sum(FULL, many, 32u);
    for (uint32_t x = 16; x; x /= 2) {
        uint32_t a = __shfl_xor_sync(FULL, most, x), b = __shfl_xor_sync(FULL, not_least, x);
        most = a > most ? a : most;
        not_least = b > not_least ? b : not_least;
    }
    if (threadIdx.x % 32 == 0 && most) {
        atomicMax(&all->most, most);
        atomicMax(&all->not_least, not_least);
        if (odd)
            atomicAdd(&all->odd, odd);
        if (many)
            atomicAdd(&all->many, many);
    }
}

/* n bytes by `lanes` threads; `from` may be read between `low` and `high`. */
static __device__ void copy(byte *to, const byte *from, uint32_t n, const byte *low, const byte *high, uint32_t lanes)
{
    uint32_t lane = threadIdx.x % lanes, head = (uint32_t)(-(uint64_t)to % WORD);
    head = head < n ? head : n;
    uint32_t words = (n - head) / WORD;
    for (uint32_t i = lane; i < head; i += lanes)
        to[i] = from[i];
    for (uint32_t i = head + words * WORD + lane; i < n; i += lanes)
        to[i] = from[i];
    to += head, from += head;
    for (uint32_t w = lane; w < words; w += DEEP * lanes) {
        uint4 v[DEEP];
#pragma unroll
        for (uint32_t k = 0; k < DEEP; k++)
            if (w + k * lanes < words)
                v[k] = word_at(from + (w + k * lanes) * WORD, low, high);
#pragma unroll
        for (uint32_t k = 0; k < DEEP; k++)
            if (w + k * lanes < words)
                ((uint4 *)to)[w + k * lanes] = v[k];
    }
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_pack_rows(const __grid_constant__ struct ry_rows_pack p)
{
    const ry_rows_scan &s = p.scan;
    const ry_rows_node *nodes = AT(const ry_rows_node, s.nodes);
    const uint32_t *order = AT(const uint32_t, s.order);
    uint32_t chunks = (uint32_t)((s.row_bytes + RY_ROWS_CHUNK - 1) / RY_ROWS_CHUNK);
    uint64_t units = (uint64_t)p.first_distinct[p.n] * chunks;
    for (uint64_t i = thread_of() / s.lanes; i < units; i += threads() / s.lanes) {
        uint32_t unit = (uint32_t)(chunks == 1 ? i : i / chunks), k = range_of(p.first_distinct, p.n, unit);
        uint64_t d = unit - p.first_distinct[k], at = (i - (uint64_t)unit * chunks) * RY_ROWS_CHUNK;
        const ry_rows_node *node = nodes + p.node[k];
        if (d >= node->distinct)
            continue;
        uint64_t left = s.row_bytes - at;
        uint32_t n = left < RY_ROWS_CHUNK ? (uint32_t)left : RY_ROWS_CHUNK, here = n;
        span row = span_of(s, order[node->first_row + d]);
        if (row.bytes < at + n) /* a shorter last row */
            here = row.bytes > at ? (uint32_t)(row.bytes - at) : 0;
        byte *to = AT(byte, p.message[k]) + d * s.row_bytes + at;
        if (here)
            copy(to, row.at + at, here, row.from, row.to, s.lanes);
        for (uint32_t j = here + threadIdx.x % s.lanes; j < n; j += s.lanes)
            to[j] = 0;
    }
    for (uint64_t i = thread_of(); i < p.n * WORD; i += threads()) {
        uint64_t distinct = nodes[p.node[i / WORD]].distinct, at = distinct * s.row_bytes + i % WORD;
        if (at < ry_rows_list_at(s.row_bytes, distinct))
            AT(byte, p.message[i / WORD])[at] = 0;
    }
    for (uint64_t i = thread_of(); i < p.first_row[p.n]; i += threads()) {
        uint32_t k = range_of(p.first_row, p.n, (uint32_t)i);
        ry_rows_node node = nodes[p.node[k]];
        uint64_t row = i - p.first_row[k];
        AT(uint32_t, p.message[k] + ry_rows_list_at(s.row_bytes, node.distinct))
        [row] = AT(const uint32_t, s.index)[AT(const uint32_t, s.where)[node.first_row + row]];
    }
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK)
    ry_expand_rows(const __grid_constant__ struct ry_rows_expand e)
{
    uint32_t chunks = (uint32_t)((e.row_bytes + RY_ROWS_CHUNK - 1) / RY_ROWS_CHUNK);
    uint64_t units = (uint64_t)e.first_row[e.n] * chunks;
    for (uint64_t i = thread_of() / e.lanes; i < units; i += threads() / e.lanes) {
        uint32_t unit = (uint32_t)(chunks == 1 ? i : i / chunks), k = range_of(e.first_row, e.n, unit);
        uint64_t row = unit - e.first_row[k], at = (i - (uint64_t)unit * chunks) * RY_ROWS_CHUNK;
        uint64_t distinct = e.distinct[k], list_at = ry_rows_list_at(e.row_bytes, distinct);
        const byte *message = AT(const byte, e.message[k]);
        uint64_t d = ((const uint32_t *)(message + list_at))[e.skip[k] + row];
        uint64_t to = row * e.row_bytes + at, end = (row + 1) * e.row_bytes;
        if (d >= distinct) {
            if (!at && threadIdx.x % e.lanes == 0)
                atomicAdd(AT(ull, e.errors), 1ull);
            continue;
        }
        end = end < e.bytes[k] ? end : e.bytes[k];
        if (to < end)
            copy(AT(byte, e.to[k]) + to, message + d * e.row_bytes + at,
                 end - to < RY_ROWS_CHUNK ? (uint32_t)(end - to) : RY_ROWS_CHUNK, message, message + list_at, e.lanes);
    }
}
