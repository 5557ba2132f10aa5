/*
 * rows.cuh: what the kernels of rows.cu and sums.cu share: the threads of a launch, and tables of ranges.
 */
#ifndef RY_RUN_ROWS_CUH
#define RY_RUN_ROWS_CUH

#include "rows_kernels.h"

#include "words.cuh"

#define FULL 0xffffffffu

typedef unsigned long long ull;

#define AT(type, address) ((type *)(address))

static __device__ uint64_t thread_of(void)
{
    return (uint64_t)blockIdx.x * RY_ROWS_BLOCK + threadIdx.x;
}

static __device__ uint64_t threads(void)
{
    return (uint64_t)gridDim.x * RY_ROWS_BLOCK;
}

/* Which of `n` ranges, the first of each given in order, `i` lies in. */
static __device__ uint32_t range_of(const uint32_t *first, uint32_t n, uint32_t i)
{
    uint32_t low = 0, high = n;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (first[middle] <= i)
            low = middle;
        else
            high = middle;
    }
    return low;
}

#endif
