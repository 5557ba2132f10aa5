/*
 * sums_kernels.h: what the kernels of sums.cu and their twins in sums.c share, in C and in CUDA C: their parameters,
 * the lists that are kept of a message, and how numbers are widened and rounded.
 *
 * The lists are those of all messages one after the other; rows and distinct rows are numbered through. A step each:
 *   list    copy the messages' index lists and count the rows of each distinct row
 *   place   give each its range in `order`: which one is no matter
 *   fill    put the rows there, as they come
 *   order   bring each range into ascending order, which makes sums the same every time
 */
#ifndef RY_RUN_SUMS_KERNELS_H
#define RY_RUN_SUMS_KERNELS_H

#include "rows_kernels.h"

#define RY_SUMS_MESSAGES 200u /* of a launch that keeps lists */
#define RY_SUMS_JOBS 100u     /* messages of a launch that sums */
#define RY_SUMS_SHORT 32u     /* rows that one thread brings into order */
#define RY_SUMS_DEEP 4u       /* rows that a thread reads at once, */
#define RY_SUMS_WIDE 1u       /* so many words of each: 2 need registers that then keep warps away */

/* ncclDataType_t */
#define RY_SUMS_FP16 6u
#define RY_SUMS_FP32 7u
#define RY_SUMS_BF16 9u

/* All addresses are the device's. Rows in `order` are counted from their message's first. */
struct ry_sums_lists {
    uint64_t index;  /* uint32_t[rows]: the messages' own */
    uint64_t order;  /* uint32_t[rows]: the rows of each distinct row, ascending */
    uint64_t end;    /* uint32_t[distinct]: where its range there ends */
    uint64_t count;  /* uint32_t[distinct]: its length; zero at first */
    uint64_t placed; /* uint64_t: of `order`, given away; zero at first */
};

struct ry_sums_keep {
    struct ry_sums_lists lists;
    uint64_t errors; /* uint64_t, pinned */
    uint32_t n;
    uint32_t first_row[RY_SUMS_MESSAGES + 1], first_distinct[RY_SUMS_MESSAGES + 1];
    uint64_t list[RY_SUMS_MESSAGES]; /* of the message */
};

struct ry_sums_add {
    struct ry_sums_lists lists;
    uint64_t row_bytes;
    uint32_t type;
    uint32_t words; /* rows are whole words of 16 bytes, at such addresses */
    uint32_t n, lanes;
    uint32_t first_row[RY_SUMS_JOBS + 1];                         /* of this launch, */
    uint32_t first_unit[RY_SUMS_JOBS + 1];                        /* a unit for each distinct row and the zero row */
    uint32_t kept_row[RY_SUMS_JOBS], kept_distinct[RY_SUMS_JOBS]; /* in the lists */
    uint64_t from[RY_SUMS_JOBS], to[RY_SUMS_JOBS];
};

RY_ROWS_BOTH uint32_t ry_sums_bytes(uint32_t type)
{
    return type == RY_SUMS_FP32 ? 4 : type == RY_SUMS_FP16 || type == RY_SUMS_BF16 ? 2 : 0;
}

/* ---- numbers ---- */

RY_ROWS_BOTH float ry_float_of(uint32_t bits)
{
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
#endif
}

RY_ROWS_BOTH uint32_t ry_bits_of(float f)
{
#ifdef __CUDA_ARCH__
    return __float_as_uint(f);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    return bits;
#endif
}

RY_ROWS_BOTH float ry_float_of_fp16(uint32_t half)
{
#ifdef __CUDA_ARCH__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)half));
    return f;
#else
    uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (!exponent) /* 2^-24 each: exact */
        return ry_float_of(sign | ry_bits_of((float)fraction * 5.9604644775390625e-8f));
    return ry_float_of(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
#endif
}

/* To the nearest, ties to even. A NaN becomes the one that hardware gives. */
RY_ROWS_BOTH uint32_t ry_fp16_of(float f)
{
#ifdef __CUDA_ARCH__
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(f));
    return half;
#else
    uint32_t bits = ry_bits_of(f), sign = bits >> 16 & 0x8000, a = bits & 0x7fffffff;
    if (a > 0x7f800000)
        return 0x7fff;
    if (a >= 0x47800000) /* 65536 and beyond */
        return sign | 0x7c00;
    if (a >= 0x38800000) { /* normal in fp16; what is rounded up may become infinite */
        a -= 112u << 23;
        return sign | (a + 0xfff + (a >> 13 & 1)) >> 13;
    }
    if (a < 0x33000000) /* less than half of the least */
        return sign;
    uint32_t shift = 126 - (a >> 23), m = (a & 0x7fffff) | 0x800000, rest = m & ((1u << shift) - 1),
             half = 1u << (shift - 1);
    m >>= shift;
    return sign | (m + (rest > half || (rest == half && (m & 1)) ? 1 : 0));
#endif
}

RY_ROWS_BOTH uint32_t ry_bf16_of(float f)
{
    uint32_t bits = ry_bits_of(f);
    return f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* An element's bits, in the low ones of a word. */
RY_ROWS_BOTH float ry_sums_widen(uint32_t type, uint32_t bits)
{
    return type == RY_SUMS_BF16   ? ry_float_of(bits << 16)
           : type == RY_SUMS_FP16 ? ry_float_of_fp16(bits)
                                  : ry_float_of(bits);
}

RY_ROWS_BOTH uint32_t ry_sums_round(uint32_t type, float f)
{
    if (type == RY_SUMS_FP32)
        return f != f ? 0x7fffffff : ry_bits_of(f);
    return type == RY_SUMS_BF16 ? ry_bf16_of(f) : ry_fp16_of(f);
}

#endif
