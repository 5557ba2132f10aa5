/*
 * reduce.c: sums, products, extremes and means of every NCCL type.
 *
 * Inputs are combined in the order given (rank order), so that a result does not depend on timing. Floating-point types
 * narrower than 32 bits are summed in float and rounded once; integers wrap as NCCL's do, except that a mean is taken
 * before the sum is cut to its type.
 */
#include "emu.h"

#include <math.h>
#include <string.h>

size_t ry_emu_type_bytes(ncclDataType_t type)
{
    static const unsigned char bytes[ncclNumTypes] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return (unsigned)type < ncclNumTypes ? bytes[type] : 0;
}

/* A small IEEE-like format: exponent and mantissa bits; e4m3 has no infinity and one NaN. */
struct format {
    int exp, man;
    bool has_inf;
};
static const struct format half = {5, 10, true}, bf16 = {8, 7, true}, e4m3 = {4, 3, false}, e5m2 = {5, 2, true};

static float widen(unsigned v, const struct format *f)
{
    int bias = (1 << (f->exp - 1)) - 1;
    unsigned man = v & ((1u << f->man) - 1), exp = v >> f->man & ((1u << f->exp) - 1), top = (1u << f->exp) - 1;
    float sign = v >> (f->exp + f->man) & 1 ? -1.0f : 1.0f;
    if (f->has_inf && exp == top)
        return man ? NAN : sign * INFINITY;
    if (!f->has_inf && exp == top && man == (1u << f->man) - 1)
        return NAN;
    if (!exp)
        return sign * ldexpf((float)man, 1 - bias - f->man);
    return sign * ldexpf((float)(man | 1u << f->man), (int)exp - bias - f->man);
}

/* Round to nearest, ties to even. Beyond the largest finite value: infinity, or NaN where there is none. */
static unsigned narrow(float x, const struct format *f)
{
    int bias = (1 << (f->exp - 1)) - 1, top = (1 << f->exp) - 1;
    unsigned sign = (unsigned)(signbit(x) != 0) << (f->exp + f->man);
    unsigned nan = f->has_inf ? (unsigned)top << f->man | 1u << (f->man - 1) : (1u << (f->exp + f->man)) - 1;
    unsigned inf = f->has_inf ? (unsigned)top << f->man : nan;
    if (isnan(x))
        return sign | nan;
    if (isinf(x))
        return sign | inf;
    if (x == 0)
        return sign;
    int e;
    frexpf(x, &e); /* |x| in [2^(e-1), 2^e) */
    int scale = e - 1;
    if (scale < 1 - bias)
        scale = 1 - bias; /* subnormal: the smallest exponent */

    unsigned man = (unsigned)rintf(ldexpf(fabsf(x), f->man - scale)); /* exact scaling, then one rounding */
    /* man has f->man + 1 bits unless subnormal; a carry moves on into the exponent by plain addition */
    unsigned v = man + ((unsigned)(scale + bias - 1) << f->man);
    return sign | (v > inf || v == nan ? inf : v);
}

static float load_half(uint16_t v)
{
    return widen(v, &half);
}
static uint16_t store_half(float x)
{
    return (uint16_t)narrow(x, &half);
}
static float load_bf16(uint16_t v)
{
    uint32_t u = (uint32_t)v << 16;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}
static uint16_t store_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if (isnan(x) || isinf(x))
        return (uint16_t)narrow(x, &bf16);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static float load_e4m3(uint8_t v)
{
    return widen(v, &e4m3);
}
static uint8_t store_e4m3(float x)
{
    return (uint8_t)narrow(x, &e4m3);
}
static float load_e5m2(uint8_t v)
{
    return widen(v, &e5m2);
}
static uint8_t store_e5m2(float x)
{
    return (uint8_t)narrow(x, &e5m2);
}

/* Sums and products of integers are made unsigned, so that they wrap instead of overflowing. */
#define WRAP_i(a, op, b) ((int64_t)((uint64_t)(a)op(uint64_t)(b)))
#define WRAP_u(a, op, b) ((a)op(b))
#define WRAP_f(a, op, b) ((a)op(b))
#define LESS_i(a, b) ((a) < (b))
#define LESS_u(a, b) ((a) < (b))
#define LESS_f(a, b) ((a) < (b) || isnan(a)) /* a NaN wins, whether a minimum or a maximum is sought */
#define MORE_i(a, b) ((a) > (b))
#define MORE_u(a, b) ((a) > (b))
#define MORE_f(a, b) ((a) > (b) || isnan(a))

#define BLOCK 512

/* ELEM in memory, ACC to calculate with, CLASS i, u or f. */
#define REDUCER(name, ELEM, ACC, CLASS, LOAD, STORE)                                                                   \
    static void reduce_##name(ELEM *dst, const ELEM *const *src, int n, size_t count, ncclRedOp_t op,                  \
                              const ELEM *scalar)                                                                      \
    {                                                                                                                  \
        ACC acc[BLOCK], by = scalar ? LOAD(*scalar) : 1;                                                               \
        for (size_t at = 0; at < count; at += BLOCK) {                                                                 \
            size_t m = count - at < BLOCK ? count - at : BLOCK;                                                        \
            for (size_t i = 0; i < m; i++)                                                                             \
                acc[i] = LOAD(src[0][at + i]);                                                                         \
            if (scalar)                                                                                                \
                for (size_t i = 0; i < m; i++)                                                                         \
                    acc[i] = WRAP_##CLASS(acc[i], *, by);                                                              \
            for (int r = 1; r < n; r++) {                                                                              \
                const ELEM *s = src[r] + at;                                                                           \
                switch (op) {                                                                                          \
                case ncclProd:                                                                                         \
                    for (size_t i = 0; i < m; i++)                                                                     \
                        acc[i] = WRAP_##CLASS(acc[i], *, LOAD(s[i]));                                                  \
                    break;                                                                                             \
                case ncclMax:                                                                                          \
                    for (size_t i = 0; i < m; i++)                                                                     \
                        acc[i] = MORE_##CLASS(LOAD(s[i]), acc[i]) ? LOAD(s[i]) : acc[i];                               \
                    break;                                                                                             \
                case ncclMin:                                                                                          \
                    for (size_t i = 0; i < m; i++)                                                                     \
                        acc[i] = LESS_##CLASS(LOAD(s[i]), acc[i]) ? LOAD(s[i]) : acc[i];                               \
                    break;                                                                                             \
                default: /* sum, mean, sum of products */                                                              \
                    if (scalar)                                                                                        \
                        for (size_t i = 0; i < m; i++)                                                                 \
                            acc[i] = WRAP_##CLASS(acc[i], +, WRAP_##CLASS((ACC)LOAD(s[i]), *, by));                    \
                    else                                                                                               \
                        for (size_t i = 0; i < m; i++)                                                                 \
                            acc[i] = WRAP_##CLASS(acc[i], +, LOAD(s[i]));                                              \
                }                                                                                                      \
            }                                                                                                          \
            if (op == ncclAvg)                                                                                         \
                for (size_t i = 0; i < m; i++)                                                                         \
                    acc[i] = acc[i] / (ACC)n;                                                                          \
            for (size_t i = 0; i < m; i++)                                                                             \
                dst[at + i] = STORE(acc[i]);                                                                           \
        }                                                                                                              \
    }

REDUCER(i8, int8_t, int64_t, i, , (int8_t))
REDUCER(u8, uint8_t, uint64_t, u, , (uint8_t))
REDUCER(i32, int32_t, int64_t, i, , (int32_t))
REDUCER(u32, uint32_t, uint64_t, u, , (uint32_t))
REDUCER(i64, int64_t, int64_t, i, , )
REDUCER(u64, uint64_t, uint64_t, u, , )
REDUCER(f16, uint16_t, float, f, load_half, store_half)
REDUCER(f32, float, float, f, , )
REDUCER(f64, double, double, f, , )
REDUCER(bf16, uint16_t, float, f, load_bf16, store_bf16)
REDUCER(e4m3, uint8_t, float, f, load_e4m3, store_e4m3)
REDUCER(e5m2, uint8_t, float, f, load_e5m2, store_e5m2)

void ry_emu_reduce(void *dst, const void *const *src, int n, size_t count, ncclDataType_t type, ncclRedOp_t op,
                   const void *scalar)
{
    switch (type) {
#define CASE(nccl, name, ELEM)                                                                                         \
    case nccl:                                                                                                         \
        reduce_##name(dst, (const ELEM *const *)src, n, count, op, scalar);                                            \
        return;
        CASE(ncclInt8, i8, int8_t)
        CASE(ncclUint8, u8, uint8_t)
        CASE(ncclInt32, i32, int32_t)
        CASE(ncclUint32, u32, uint32_t)
        CASE(ncclInt64, i64, int64_t)
        CASE(ncclUint64, u64, uint64_t)
        CASE(ncclFloat16, f16, uint16_t)
        CASE(ncclFloat32, f32, float)
        CASE(ncclFloat64, f64, double)
        CASE(ncclBfloat16, bf16, uint16_t)
        CASE(ncclFloat8e4m3, e4m3, uint8_t)
        CASE(ncclFloat8e5m2, e5m2, uint8_t)
#undef CASE
    default:
        return; /* the caller checked the type */
    }
}
