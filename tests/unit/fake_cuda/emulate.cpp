/*
 * emulate.cpp: see emulate.h. Includes the kernels' source and gives it what of CUDA C it uses. The kernels have no
 * barriers and no shared memory, so threads may run one after the other; a sanitizer then sees what each of them reads.
 */
#include "emulate.h"

#include <cstdint>
#include <cstring>

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

void atomicMin(unsigned long long *at, unsigned long long value)
{
    if (value < *at)
        *at = value;
}

} // namespace

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
#include "run/kernels.cu"

template <void (*kernel)(const ry_segments)> static void run(unsigned grid, unsigned block, const void *param)
{
    gridDim.x = grid;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++)
            kernel(*static_cast<const ry_segments *>(param));
}

void (*emulated(const char *name))(unsigned, unsigned, const void *)
{
    return !strcmp(name, "ry_copy_segments")      ? run<ry_copy_segments>
           : !strcmp(name, "ry_compare_segments") ? run<ry_compare_segments>
                                                  : nullptr;
}
