/*
 * emulate.cpp: see emulate.h. Includes the kernels' source and gives it what of CUDA C it uses. The kernels have no
 * barriers of a block and no shared memory, so warps may run one after the other; a sanitizer then sees what each
 * thread reads. Threads of a warp talk to each other in rows.cu: there each is a fiber (warp.h). Blocks and warps take
 * turns in another order at every launch, so a result that depends on it does not stay the same.
 */
#include "emulate.h"

#include <cstdint>
#include <cstring>

#include "warp.h"

namespace
{

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim {
    unsigned x;
};
dim threadIdx, blockIdx, gridDim;

uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return uint4{x, y, z, w};
}

uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift)
{
    return (uint32_t)(((uint64_t)high << 32 | low) >> (shift & 31));
}

int __ffs(uint32_t x)
{
    return __builtin_ffs((int)x);
}

int __popc(uint32_t x)
{
    return __builtin_popcount(x);
}

void atomicMin(unsigned long long *at, unsigned long long value)
{
    if (value < *at)
        *at = value;
}

void atomicMax(unsigned *at, unsigned value)
{
    if (value > *at)
        *at = value;
}

template <class T> T atomicAdd(T *at, T value)
{
    T was = *at;
    *at += value;
    return was;
}

unsigned long long atomicCAS(unsigned long long *at, unsigned long long from, unsigned long long to)
{
    unsigned long long was = *at;
    if (was == from)
        *at = to;
    return was;
}

template <class T> T __shfl_sync(uint32_t mask, T v, int from)
{
    uint64_t bits = (uint64_t)v;
    return (T)warp_exchange(mask, bits)[from % 32];
}

template <class T> T __shfl_xor_sync(uint32_t mask, T v, uint32_t with)
{
    return __shfl_sync(mask, v, (int)(threadIdx.x % 32 ^ with));
}

uint32_t __ballot_sync(uint32_t mask, bool v)
{
    const uint64_t *of = warp_exchange(mask, v);
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; lane++)
        votes |= mask >> lane & 1 && of[lane] ? 1u << lane : 0;
    return votes;
}

void __syncwarp(uint32_t mask)
{
    warp_exchange(mask, 0);
}

} // namespace

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDACC__
#include "run/kernels.cu"
#include "run/rows.cu"
#undef DEEP
#include "run/sums.cu"

/* Every number below n once, in an order that is another one each time. */
template <class F> static void in_any_order(unsigned n, F what)
{
    static uint32_t random = 12345;
    unsigned all = 1;
    while (all < n)
        all *= 2;
    random = random * 1664525 + 1013904223;
    for (unsigned i = 0, step = (random >> 8) | 1, at = random >> 16; i < all; i++, at += step)
        if ((at & (all - 1)) < n)
            what(at & (all - 1));
}

template <void (*kernel)(const ry_segments)> static void run(unsigned grid, unsigned block, const void *param)
{
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++)
            kernel(*static_cast<const ry_segments *>(param));
}

/* In warps whose threads may wait for each other. */
template <class P, void (*kernel)(const P)> static void run_warps(unsigned grid, unsigned block, const void *param)
{
    const P copy = *static_cast<const P *>(param);
    gridDim.x = grid;
    in_any_order(grid, [&](unsigned b) {
        in_any_order(block / 32, [&](unsigned warp) {
            blockIdx.x = b;
            warp_run([](const void *p) { kernel(*static_cast<const P *>(p)); }, &copy, &threadIdx.x, warp * 32);
        });
    });
}

void (*emulated(const char *name))(unsigned, unsigned, const void *)
{
    static const struct {
        const char *name;
        void (*run)(unsigned, unsigned, const void *);
    } kernels[] = {
        {"ry_copy_segments", run<ry_copy_segments>},
        {"ry_compare_segments", run<ry_compare_segments>},
        {"ry_digest_segments", run_warps<ry_segments, ry_digest_segments>},
        {"ry_put_words", run_warps<struct ry_rows_put, ry_put_words>},
        {"ry_sample_rows", run_warps<ry_rows_scan, ry_sample_rows>},
        {"ry_compare_rows", run_warps<ry_rows_scan, ry_compare_rows>},
        {"ry_recompare_rows", run_warps<ry_rows_scan, ry_recompare_rows>},
        {"ry_count_rows", run_warps<ry_rows_scan, ry_count_rows>},
        {"ry_number_rows", run_warps<ry_rows_scan, ry_number_rows>},
        {"ry_tally_rows", run_warps<ry_rows_scan, ry_tally_rows>},
        {"ry_extremes_of_rows", run_warps<ry_rows_scan, ry_extremes_of_rows>},
        {"ry_list_rows", run_warps<struct ry_sums_keep, ry_list_rows>},
        {"ry_place_rows", run_warps<struct ry_sums_keep, ry_place_rows>},
        {"ry_fill_rows", run_warps<struct ry_sums_keep, ry_fill_rows>},
        {"ry_order_rows", run_warps<struct ry_sums_keep, ry_order_rows>},
        {"ry_sum_rows", run_warps<struct ry_sums_add, ry_sum_rows>},
        {"ry_pack_rows", run_warps<struct ry_rows_pack, ry_pack_rows>},
        {"ry_expand_rows", run_warps<struct ry_rows_expand, ry_expand_rows>},
    };
    for (const auto &k : kernels)
        if (!strcmp(name, k.name))
            return k.run;
    return nullptr;
}
