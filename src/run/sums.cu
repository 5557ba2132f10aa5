/*
 * sums.cu: sums of equal rows, at memory bandwidth. What the steps are is in sums_kernels.h, the twins for host memory
 * in sums.c.
 *
 * As in rows.cu, threads talk through the warp only, and nothing that one of them does first shows in the result.
 */
#include "sums_kernels.h"

#include "rows.cuh"

#define DEEP RY_SUMS_DEEP
#define WIDE RY_SUMS_WIDE

/* ---- lists ---- */

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_list_rows(const __grid_constant__ struct ry_sums_keep s)
{
    for (uint64_t i = s.first_row[0] + thread_of(); i < s.first_row[s.n]; i += threads()) {
        uint32_t k = range_of(s.first_row, s.n, (uint32_t)i);
        uint32_t d = AT(const uint32_t, s.list[k])[i - s.first_row[k]], first = s.first_distinct[k];
        AT(uint32_t, s.lists.index)[i] = d;
        if (d < s.first_distinct[k + 1] - first)
            atomicAdd(AT(uint32_t, s.lists.count) + first + d, 1u);
        else
            atomicAdd(AT(ull, s.errors), 1ull);
    }
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_place_rows(const __grid_constant__ struct ry_sums_keep s)
{
    uint32_t lane = threadIdx.x % 32, end = s.first_distinct[s.n];
    for (uint64_t some = s.first_distinct[0] + thread_of() - lane; some < end; some += threads()) {
        uint64_t d = some + lane;
        uint32_t up_to = d < end ? AT(const uint32_t, s.lists.count)[d] : 0;
        uint32_t own = up_to;
        for (uint32_t x = 1; x < 32; x *= 2) {
            uint32_t before = __shfl_sync(FULL, up_to, (int)((lane - x) % 32));
            up_to += lane >= x ? before : 0;
        }
        uint64_t base = lane == 31 && up_to ? atomicAdd(AT(ull, s.lists.placed), (ull)up_to) : 0;
        base = __shfl_sync(FULL, base, 31);
        if (d < end) /* where it begins, and in the end ends */
            AT(uint32_t, s.lists.end)[d] = (uint32_t)base + up_to - own;
    }
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_fill_rows(const __grid_constant__ struct ry_sums_keep s)
{
    for (uint64_t i = s.first_row[0] + thread_of(); i < s.first_row[s.n]; i += threads()) {
        uint32_t k = range_of(s.first_row, s.n, (uint32_t)i), first = s.first_distinct[k];
        uint32_t d = AT(const uint32_t, s.lists.index)[i];
        if (d < s.first_distinct[k + 1] - first)
            AT(uint32_t, s.lists.order)
        [atomicAdd(AT(uint32_t, s.lists.end) + first + d, 1u)] = (uint32_t)i - s.first_row[k];
    }
}

/* A long range anew, by a warp that looks through the whole index list. */
static __device__ void find_all(const struct ry_sums_keep &s, uint32_t distinct, uint32_t lane)
{
    uint32_t k = range_of(s.first_distinct, s.n, distinct), rows = s.first_row[k + 1] - s.first_row[k];
    uint32_t left = AT(const uint32_t, s.lists.count)[distinct];
    uint32_t *order = AT(uint32_t, s.lists.order) + AT(const uint32_t, s.lists.end)[distinct] - left;
    const uint32_t *index = AT(const uint32_t, s.lists.index) + s.first_row[k];
    for (uint64_t some = 0; some < rows && left; some += 32) {
        bool its = some + lane < rows && index[some + lane] == distinct - s.first_distinct[k];
        uint32_t which = __ballot_sync(FULL, its);
        if (its)
            order[__popc(which & ((1u << lane) - 1))] = (uint32_t)some + lane;
        order += __popc(which);
        left -= (uint32_t)__popc(which);
    }
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_order_rows(const __grid_constant__ struct ry_sums_keep s)
{
    uint32_t lane = threadIdx.x % 32, end = s.first_distinct[s.n];
    for (uint64_t some = s.first_distinct[0] + thread_of() - lane; some < end; some += threads()) {
        uint32_t d = (uint32_t)some + lane, n = some + lane < end ? AT(const uint32_t, s.lists.count)[d] : 0;
        if (n > 1 && n <= RY_SUMS_SHORT) {
            uint32_t *order = AT(uint32_t, s.lists.order) + AT(const uint32_t, s.lists.end)[d] - n;
            for (uint32_t i = 1; i < n; i++) {
                uint32_t row = order[i], to = i;
                for (; to && order[to - 1] > row; to--)
                    order[to] = order[to - 1];
                order[to] = row;
            }
        }
        for (uint32_t many = __ballot_sync(FULL, n > RY_SUMS_SHORT); many; many &= many - 1)
            find_all(s, (uint32_t)some + (uint32_t)__ffs((int)many) - 1, lane);
    }
}

/* ---- sums ---- */

/* A distinct row: its rows in ascending order. */
struct group {
    const uint32_t *order;
    uint32_t n;
    const byte *from;
    uint64_t row_bytes;
};

/* Elements of a word of 32 bits. */
template <uint32_t type> static __device__ void widen(uint32_t w, float *to)
{
    if (type == RY_SUMS_FP32) {
        to[0] = ry_sums_widen(type, w);
    } else {
        to[0] = ry_sums_widen(type, w & 0xffff);
        to[1] = ry_sums_widen(type, w >> 16);
    }
}

template <uint32_t type> static __device__ uint32_t rounded(const float *f)
{
    return type == RY_SUMS_FP32 ? ry_sums_round(type, f[0])
                                : ry_sums_round(type, f[0]) | ry_sums_round(type, f[1]) << 16;
}

/* Bytes [at, at + n) of the sum, whole aligned words, by `lanes` threads. */
template <uint32_t type>
static __device__ void sum_words(byte *to, const group &g, uint64_t at, uint32_t n, uint32_t lanes)
{
    const uint32_t per = type == RY_SUMS_FP32 ? 1 : 2; /* elements of 32 bits */
    uint32_t words = n / WORD;
    for (uint32_t w = threadIdx.x % lanes; w < words; w += WIDE * lanes) {
        float sum[WIDE][4 * per];
        uint4 v[DEEP][WIDE];
        for (uint32_t c = 0; c < g.n; c += DEEP) {
#pragma unroll
            for (uint32_t k = 0; k < DEEP; k++) {
                const uint4 *row = (const uint4 *)(g.from + (c + k < g.n ? g.order[c + k] : 0) * g.row_bytes + at);
#pragma unroll
                for (uint32_t h = 0; h < WIDE; h++)
                    if (c + k < g.n && w + h * lanes < words)
                        v[k][h] = row[w + h * lanes];
            }
#pragma unroll
            for (uint32_t k = 0; k < DEEP; k++)
#pragma unroll
                for (uint32_t h = 0; h < WIDE; h++)
                    if (c + k < g.n && w + h * lanes < words) {
                        const uint32_t x[4] = {v[k][h].x, v[k][h].y, v[k][h].z, v[k][h].w};
                        float f[2];
#pragma unroll
                        for (uint32_t i = 0; i < 4; i++) {
                            widen<type>(x[i], f);
#pragma unroll
                            for (uint32_t j = 0; j < per; j++)
                                sum[h][i * per + j] = c + k ? sum[h][i * per + j] + f[j] : f[j];
                        }
                    }
        }
#pragma unroll
        for (uint32_t h = 0; h < WIDE; h++)
            if (w + h * lanes < words)
                ((uint4 *)to)[w + h * lanes] =
                    g.n == 1 ? v[0][h]
                             : make_uint4(rounded<type>(sum[h]), rounded<type>(sum[h] + per),
                                          rounded<type>(sum[h] + 2 * per), rounded<type>(sum[h] + 3 * per));
    }
}

static __device__ uint32_t element(const byte *p, uint32_t size)
{
    uint32_t bits = 0;
    for (uint32_t i = 0; i < size; i++)
        bits |= (uint32_t)p[i] << 8 * i;
    return bits;
}

/* The same at any address, element by element. */
static __device__ void sum_elements(uint32_t type, byte *to, const group &g, uint64_t at, uint32_t n, uint32_t lanes)
{
    uint32_t size = ry_sums_bytes(type);
    for (uint32_t i = threadIdx.x % lanes * size; i < n; i += lanes * size) {
        uint32_t bits = element(g.from + g.order[0] * g.row_bytes + at + i, size);
        float sum = ry_sums_widen(type, bits);
        for (uint32_t c = 1; c < g.n; c++)
            sum += ry_sums_widen(type, element(g.from + g.order[c] * g.row_bytes + at + i, size));
        if (g.n > 1)
            bits = ry_sums_round(type, sum);
        for (uint32_t j = 0; j < size; j++)
            to[i + j] = (byte)(bits >> 8 * j);
    }
}

extern "C" __global__ void __launch_bounds__(RY_ROWS_BLOCK) ry_sum_rows(const __grid_constant__ struct ry_sums_add s)
{
    uint32_t chunks = (uint32_t)((s.row_bytes + RY_ROWS_CHUNK - 1) / RY_ROWS_CHUNK);
    uint64_t units = (uint64_t)s.first_unit[s.n] * chunks;
    for (uint64_t i = thread_of() / s.lanes; i < units; i += threads() / s.lanes) {
        uint32_t unit = (uint32_t)(chunks == 1 ? i : i / chunks), k = range_of(s.first_unit, s.n, unit);
        uint32_t d = unit - s.first_unit[k], distinct = s.first_unit[k + 1] - s.first_unit[k] - 1;
        uint64_t at = (i - (uint64_t)unit * chunks) * RY_ROWS_CHUNK, left = s.row_bytes - at;
        uint32_t n = left < RY_ROWS_CHUNK ? (uint32_t)left : RY_ROWS_CHUNK;
        byte *to = AT(byte, s.to[k]) + d * s.row_bytes + at;
        group g = {NULL, 0, AT(const byte, s.from[k]), s.row_bytes};
        if (d < distinct) {
            uint32_t its = s.kept_distinct[k] + d;
            g.n = AT(const uint32_t, s.lists.count)[its];
            g.order = AT(const uint32_t, s.lists.order) + AT(const uint32_t, s.lists.end)[its] - g.n;
        }
        if (!g.n) /* the row of zeros; or of a damaged message */
            for (uint32_t j = threadIdx.x % s.lanes; j < n; j += s.lanes)
                to[j] = 0;
        else if (!s.words)
            sum_elements(s.type, to, g, at, n, s.lanes);
        else if (s.type == RY_SUMS_BF16)
            sum_words<RY_SUMS_BF16>(to, g, at, n, s.lanes);
        else if (s.type == RY_SUMS_FP16)
            sum_words<RY_SUMS_FP16>(to, g, at, n, s.lanes);
        else
            sum_words<RY_SUMS_FP32>(to, g, at, n, s.lanes);
    }
    for (uint64_t i = thread_of(); i < s.n * WORD; i += threads()) {
        uint64_t k = i / WORD, nrows = s.first_unit[k + 1] - s.first_unit[k], at = nrows * s.row_bytes + i % WORD;
        if (at < ry_rows_list_at(s.row_bytes, nrows))
            AT(byte, s.to[k])[at] = 0;
    }
    for (uint64_t i = thread_of(); i < s.first_row[s.n]; i += threads()) {
        uint32_t k = range_of(s.first_row, s.n, (uint32_t)i), row = (uint32_t)i - s.first_row[k];
        uint32_t nrows = s.first_unit[k + 1] - s.first_unit[k], its;
        uint32_t d = AT(const uint32_t, s.lists.index)[s.kept_row[k] + row], out = nrows - 1;
        if (d < nrows - 1) {
            its = s.kept_distinct[k] + d;
            uint32_t first = AT(const uint32_t, s.lists.end)[its] - AT(const uint32_t, s.lists.count)[its];
            out = AT(const uint32_t, s.lists.order)[first] == row ? d : out;
        }
        AT(uint32_t, s.to[k] + ry_rows_list_at(s.row_bytes, nrows))[row] = out;
    }
}
