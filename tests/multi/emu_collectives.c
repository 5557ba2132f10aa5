/*
 * emu_collectives.c: every collective of the emulated NCCL, every data type, every reduction, in place and not, held
 * against a reference that each rank calculates for itself from what all ranks are known to have sent.
 */
#include <math.h>

#include "emu_common.h"

static ncclComm_t comm;
static int me, n;

static const struct {
    const char *name;
    size_t bytes;
} types[ncclNumTypes] = {
    [ncclInt8] = {"int8", 1},     [ncclUint8] = {"uint8", 1},     [ncclInt32] = {"int32", 4},
    [ncclUint32] = {"uint32", 4}, [ncclInt64] = {"int64", 8},     [ncclUint64] = {"uint64", 8},
    [ncclFloat16] = {"half", 2},  [ncclFloat32] = {"float", 4},   [ncclFloat64] = {"double", 8},
    [ncclBfloat16] = {"bf16", 2}, [ncclFloat8e4m3] = {"e4m3", 1}, [ncclFloat8e5m2] = {"e5m2", 1},
};

/* All finite values of a small float, by their definition; the reference for conversions is a search among them. */
static double small_value(unsigned v, int exp, int man, bool inf)
{
    int e = (int)(v >> man & ((1u << exp) - 1)), bias = (1 << (exp - 1)) - 1, top = (1 << exp) - 1;
    double m = (double)(v & ((1u << man) - 1)) / (double)(1 << man);
    double x = e ? ldexp(1 + m, e - bias) : ldexp(m, 1 - bias);
    if (inf && e == top)
        x = m != 0 ? NAN : INFINITY;
    if (!inf && e == top && (v & ((1u << man) - 1)) == (1u << man) - 1)
        x = NAN;
    return v >> (exp + man) & 1 ? -x : x;
}

static double get(ncclDataType_t t, const void *p, size_t i)
{
    switch (t) {
    case ncclInt8:
        return ((const int8_t *)p)[i];
    case ncclUint8:
        return ((const uint8_t *)p)[i];
    case ncclInt32:
        return ((const int32_t *)p)[i];
    case ncclUint32:
        return ((const uint32_t *)p)[i];
    case ncclInt64:
        return (double)((const int64_t *)p)[i];
    case ncclUint64:
        return (double)((const uint64_t *)p)[i];
    case ncclFloat32:
        return ((const float *)p)[i];
    case ncclFloat64:
        return ((const double *)p)[i];
    case ncclFloat16:
        return small_value(((const uint16_t *)p)[i], 5, 10, true);
    case ncclBfloat16:
        return small_value(((const uint16_t *)p)[i], 8, 7, true);
    case ncclFloat8e4m3:
        return small_value(((const uint8_t *)p)[i], 4, 3, false);
    case ncclFloat8e5m2:
        return small_value(((const uint8_t *)p)[i], 5, 2, true);
    default:
        abort();
    }
}

/* The finite value nearest to x among all of a small type's; an even pattern wins a tie. */
static unsigned nearest(double x, int exp, int man, bool inf)
{
    unsigned low = 0, sign = 1u << (exp + man), high = sign - 2 - (inf ? (1u << man) - 1 : 0);
    while (low < high) { /* the last one that is not above |x| */
        unsigned mid = (low + high + 1) / 2;
        if (small_value(mid, exp, man, inf) <= fabs(x))
            low = mid;
        else
            high = mid - 1;
    }
    double below = fabs(x) - small_value(low, exp, man, inf), above = small_value(low + 1, exp, man, inf) - fabs(x);
    if (above < below || (above == below && low & 1))
        low++;
    return low | (signbit(x) ? sign : 0);
}

static void put(ncclDataType_t t, void *p, size_t i, double x)
{
    switch (t) {
    case ncclInt8:
        ((int8_t *)p)[i] = (int8_t)(int64_t)x;
        return;
    case ncclUint8:
        ((uint8_t *)p)[i] = (uint8_t)(int64_t)x;
        return;
    case ncclInt32:
        ((int32_t *)p)[i] = (int32_t)x;
        return;
    case ncclUint32:
        ((uint32_t *)p)[i] = (uint32_t)(int64_t)x;
        return;
    case ncclInt64:
        ((int64_t *)p)[i] = (int64_t)x;
        return;
    case ncclUint64:
        ((uint64_t *)p)[i] = (uint64_t)(int64_t)x;
        return;
    case ncclFloat32:
        ((float *)p)[i] = (float)x;
        return;
    case ncclFloat64:
        ((double *)p)[i] = x;
        return;
    case ncclFloat16:
        ((uint16_t *)p)[i] = (uint16_t)nearest(x, 5, 10, true);
        return;
    case ncclBfloat16:
        ((uint16_t *)p)[i] = (uint16_t)nearest(x, 8, 7, true);
        return;
    case ncclFloat8e4m3:
        ((uint8_t *)p)[i] = (uint8_t)nearest(x, 4, 3, false);
        return;
    case ncclFloat8e5m2:
        ((uint8_t *)p)[i] = (uint8_t)nearest(x, 5, 2, true);
        return;
    default:
        abort();
    }
}

static bool is_unsigned(ncclDataType_t t)
{
    return t == ncclUint8 || t == ncclUint32 || t == ncclUint64;
}

static bool is_whole(ncclDataType_t t)
{
    return t <= ncclUint64;
}

/* What rank r puts at place i: small, so that sums and products stay exact in every type where they can. */
static double sent(int r, size_t i, ncclDataType_t t)
{
    int v = (int)((i * 7 + (size_t)r * 3) % 5);
    return is_unsigned(t) ? v : v - 2;
}

/* Room for elements plus a canary. */
static void *room(size_t count, ncclDataType_t t)
{
    char *p = malloc(count * types[t].bytes + 8);
    memset(p, 0xa5, count * types[t].bytes + 8);
    return p;
}

static void check_canary(const void *p, size_t count, ncclDataType_t t)
{
    for (int i = 0; i < 8; i++)
        CHECK(((const uint8_t *)p)[count * types[t].bytes + (size_t)i] == 0xa5, "%s: written past the end",
              types[t].name);
}

static void fill(void *p, size_t at, size_t count, ncclDataType_t t, int r, size_t from)
{
    for (size_t i = 0; i < count; i++)
        put(t, p, at + i, sent(r, from + i, t));
}

static void expect(const char *what, const void *p, size_t at, size_t count, ncclDataType_t t, int r, size_t from)
{
    for (size_t i = 0; i < count; i++)
        CHECK(get(t, p, at + i) == sent(r, from + i, t), "%s of %s: element %zu of rank %d is %g, not %g", what,
              types[t].name, i, r, get(t, p, at + i), sent(r, from + i, t));
}

static void moving(ncclDataType_t t, size_t count)
{
    size_t all = count * (size_t)n, b = types[t].bytes;
    char *in = room(all, t), *out = room(all, t);
    int step = n > 1 ? n - 1 : 1; /* the first and the last rank as root */
    for (int r = 0; r < n; r++)
        fill(in, count * (size_t)r, count, t, me, (size_t)r * 11);
    NCCL(ncclAlltoAll(in, out, count, t, comm, NULL));
    for (int r = 0; r < n; r++)
        expect("AlltoAll", out, count * (size_t)r, count, t, r, (size_t)me * 11);
    for (int root = 0; root < n; root += step) {
        NCCL(ncclScatter(me == root ? in : NULL, out, count, t, root, comm, NULL));
        expect("Scatter", out, 0, count, t, root, (size_t)me * 11);
    }

    fill(in, 0, count, t, me, 0);
    NCCL(ncclAllGather(in, out, count, t, comm, NULL));
    for (int r = 0; r < n; r++)
        expect("AllGather", out, count * (size_t)r, count, t, r, 0);
    memset(out, 0, all * b);
    fill(out, count * (size_t)me, count, t, me, 0);
    NCCL(ncclAllGather(out + count * (size_t)me * b, out, count, t, comm, NULL));
    for (int r = 0; r < n; r++)
        expect("AllGather in place", out, count * (size_t)r, count, t, r, 0);

    for (int root = 0; root < n; root += step) {
        memset(out, 0, all * b);
        NCCL(ncclGather(in, me == root ? out : NULL, count, t, root, comm, NULL));
        for (int r = 0; r < n && me == root; r++)
            expect("Gather", out, count * (size_t)r, count, t, r, 0);
        memset(out, 0, all * b);
        NCCL(ncclBroadcast(in, out, count, t, root, comm, NULL));
        expect("Broadcast", out, 0, count, t, root, 0);
        fill(out, 0, count, t, me, 5);
        NCCL(ncclBcast(out, count, t, root, comm, NULL));
        expect("Bcast", out, 0, count, t, root, 5);
    }
    check_canary(in, all, t);
    check_canary(out, all, t);
    free(in);
    free(out);
}

static double reduced(size_t i, ncclDataType_t t, ncclRedOp_t op)
{
    double x = sent(0, i, t);
    for (int r = 1; r < n; r++) {
        double y = sent(r, i, t);
        x = op == ncclProd ? x * y : op == ncclMax ? fmax(x, y) : op == ncclMin ? fmin(x, y) : x + y;
    }
    if (op == ncclAvg)
        x = is_whole(t) ? trunc(x / n) : x / n;
    return x;
}

static void check_reduced(const char *what, const void *p, size_t count, size_t from, ncclDataType_t t, ncclRedOp_t op)
{
    char one[8];
    for (size_t i = 0; i < count; i++) {
        put(t, one, 0, reduced(from + i, t, op));
        double want = get(t, one, 0), got = get(t, p, i);
        CHECK(got == want, "%s, op %d of %s: element %zu is %g, not %g", what, (int)op, types[t].name, from + i, got,
              want);
    }
}

static void reducing(ncclDataType_t t, ncclRedOp_t op, size_t count)
{
    size_t all = count * (size_t)n, b = types[t].bytes;
    char *in = room(all, t), *out = room(all, t);
    fill(in, 0, all, t, me, 0);
    NCCL(ncclAllReduce(in, out, count, t, op, comm, NULL));
    check_reduced("AllReduce", out, count, 0, t, op);
    memcpy(out, in, count * b);
    NCCL(ncclAllReduce(out, out, count, t, op, comm, NULL));
    check_reduced("AllReduce in place", out, count, 0, t, op);
    NCCL(ncclReduceScatter(in, out, count, t, op, comm, NULL));
    check_reduced("ReduceScatter", out, count, count * (size_t)me, t, op);
    memcpy(out, in, all * b);
    NCCL(ncclReduceScatter(out, out + count * (size_t)me * b, count, t, op, comm, NULL));
    check_reduced("ReduceScatter in place", out + count * (size_t)me * b, count, count * (size_t)me, t, op);
    NCCL(ncclReduce(in, me == n - 1 ? out : NULL, count, t, op, n - 1, comm, NULL));
    if (me == n - 1)
        check_reduced("Reduce", out, count, 0, t, op);
    check_canary(in, all, t);
    check_canary(out, all, t);
    free(in);
    free(out);
}

/* Results that do not fit exactly must be rounded to nearest, once: against the search among all values. */
static void rounding(ncclDataType_t t, int exp, int man, bool inf)
{
    float a[4] = {1.0f, 0.3f, 17.0f, 0.001f};
    size_t count = 4;
    char in[16], out[16];
    for (size_t i = 0; i < count; i++)
        put(t, in, i, a[i]);
    NCCL(ncclAllReduce(in, out, count, t, ncclAvg, comm, NULL));
    for (size_t i = 0; i < count; i++) { /* the mean of n equal numbers may still be off in the last place of float */
        double x = get(t, in, i);
        CHECK(fabs(get(t, out, i) - x) <= fabs(x) * ldexp(1, -man - 1), "%s: mean of %g is %g", types[t].name, x,
              get(t, out, i));
    }
    /* x * 1.5 on each of n ranks, summed */
    char scalar[8];
    ncclRedOp_t op;
    put(t, scalar, 0, 1.5);
    NCCL(ncclRedOpCreatePreMulSum(&op, scalar, t, ncclScalarHostImmediate, comm));
    memset(scalar, 0, sizeof scalar); /* it was read */
    NCCL(ncclAllReduce(in, out, count, t, op, comm, NULL));
    for (size_t i = 0; i < count; i++) {
        float sum = 0;
        for (int r = 0; r < n; r++)
            sum += (float)get(t, in, i) * 1.5f;
        char want[8];
        bool high =
            fabs((double)sum) > small_value((1u << (exp + man)) - 2u - (inf ? (1u << man) - 1u : 0u), exp, man, inf);
        put(t, want, 0, sum);
        CHECK(high || !memcmp(want, out + i * types[t].bytes, types[t].bytes), "%s: %g from %g", types[t].name,
              get(t, out, i), (double)sum);
    }
    NCCL(ncclRedOpDestroy(op, comm));
}

static void extremes(void)
{
    /* infinities and NaN go through, overflow becomes one of them */
    uint16_t h[3] = {0x7bff /* largest half */, 0xfc00 /* -inf */, 0x7e00 /* NaN */}, r[3];
    NCCL(ncclAllReduce(h, r, 3, ncclFloat16, ncclSum, comm, NULL));
    CHECK(r[0] == (n > 1 ? 0x7c00 : 0x7bff) && r[1] == 0xfc00 && (r[2] & 0x7fff) > 0x7c00, "%x %x %x", r[0], r[1],
          r[2]);
    uint8_t f[2] = {0x7e /* 448, the largest e4m3 */, 0x7f /* NaN */}, g[2];
    NCCL(ncclAllReduce(f, g, 2, ncclFloat8e4m3, ncclSum, comm, NULL));
    CHECK(g[0] == (n > 1 ? 0x7f : 0x7e) && (g[1] & 0x7f) == 0x7f, "%x %x", g[0], g[1]);
    float x[2] = {me == 0 ? NAN : 1, (float)me}, y[2];
    NCCL(ncclAllReduce(x, y, 2, ncclFloat32, ncclMax, comm, NULL));
    CHECK(isnan(y[0]) && y[1] == (float)(n - 1), "%g %g", (double)y[0], (double)y[1]);
    /* integers wrap */
    int8_t i8 = 127, w;
    NCCL(ncclAllReduce(&i8, &w, 1, ncclInt8, ncclSum, comm, NULL));
    CHECK(w == (int8_t)(uint8_t)(127 * n), "%d", w);
    uint64_t u = UINT64_MAX - 1, v;
    NCCL(ncclAllReduce(&u, &v, 1, ncclUint64, ncclSum, comm, NULL));
    CHECK(v == (uint64_t)n * (UINT64_MAX - 1), "%llu", (unsigned long long)v);
}

static void premul(void)
{
    double scalar = me + 1, x = 2, y, want = 0;
    ncclRedOp_t op;
    NCCL(ncclRedOpCreatePreMulSum(&op, &scalar, ncclFloat64, ncclScalarDevice, comm));
    scalar = me + 10; /* read when the collective runs. Every rank's own scalar: but one rank sums, with its own */
    EXPECT(ncclInvalidArgument, ncclAllReduce(&x, &y, 1, ncclFloat32, op, comm, NULL));
    scalar = 10;
    for (int r = 0; r < n; r++)
        want += 20;
    NCCL(ncclAllReduce(&x, &y, 1, ncclFloat64, op, comm, NULL));
    CHECK(y == want, "%g, not %g", y, want);
    NCCL(ncclRedOpDestroy(op, comm));
    EXPECT(ncclInvalidArgument, ncclRedOpDestroy(op, comm));
    EXPECT(ncclInvalidArgument, ncclAllReduce(&x, &y, 1, ncclFloat64, op, comm, NULL));
}

/* Sums of floats must not depend on timing, and must be the same bits on all ranks. */
static void same_bits(void)
{
    enum { N = 5000 };
    float *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y), *z = malloc(N * sizeof *z);
    for (int i = 0; i < N; i++)
        x[i] = sinf((float)(i * (me + 1))) * 1e3f;
    NCCL(ncclAllReduce(x, y, N, ncclFloat32, ncclSum, comm, NULL));
    for (int k = 0; k < 5; k++) {
        NCCL(ncclAllReduce(x, z, N, ncclFloat32, ncclSum, comm, NULL));
        CHECK(!memcmp(y, z, N * sizeof *y), "differs between runs");
    }
    memcpy(z, y, N * sizeof *y);
    NCCL(ncclBcast(z, N, ncclFloat32, 0, comm, NULL));
    CHECK(!memcmp(y, z, N * sizeof *y), "differs between ranks");
    free(x), free(y), free(z);
}

/* Many collectives in one group, of all kinds. */
static void grouped(void)
{
    enum { N = 3000 };
    int64_t *x = malloc(N * sizeof *x), *sum = malloc(N * sizeof *x), *all = malloc((size_t)n * N * sizeof *x),
            mine[2] = {0};
    for (int i = 0; i < N; i++)
        x[i] = i + me;
    NCCL(ncclGroupStart());
    NCCL(ncclAllReduce(x, sum, N, ncclInt64, ncclSum, comm, NULL));
    NCCL(ncclAllGather(x, all, N, ncclInt64, comm, NULL));
    for (int r = 0; r < n; r++) /* as PyTorch does uneven all-gathers */
        NCCL(ncclReduce(x, r == me ? mine : NULL, 2, ncclInt64, ncclMax, r, comm, NULL));
    NCCL(ncclGroupEnd());
    for (int i = 0; i < N; i++)
        CHECK(sum[i] == (int64_t)i * n + n * (n - 1) / 2, "%lld at %d", (long long)sum[i], i);
    for (int r = 0; r < n; r++)
        CHECK(all[(size_t)r * N + 7] == 7 + r, "%lld", (long long)all[(size_t)r * N + 7]);
    CHECK(mine[0] == n - 1 && mine[1] == n, "%lld", (long long)mine[0]);
    free(x), free(sum), free(all);
}

int main(void)
{
    start_rank();
    comm = world_comm();
    me = who.rank;
    n = who.world;
    int v = 0;
    for (int t = 0; t < ncclNumTypes; t++) {
        moving((ncclDataType_t)t, 1);
        moving((ncclDataType_t)t, 777);
        moving((ncclDataType_t)t, 0);
        for (int op = 0; op < ncclNumOps; op++) {
            if (op == ncclProd && types[t].bytes == 1)
                reducing((ncclDataType_t)t, (ncclRedOp_t)op, 3); /* more would overflow the type */
            else
                reducing((ncclDataType_t)t, (ncclRedOp_t)op, 300);
            if (types[t].bytes >= 4)
                reducing((ncclDataType_t)t, (ncclRedOp_t)op, 5003); /* beyond the one-phase size, not divisible */
        }
    }
    rounding(ncclFloat16, 5, 10, true);
    rounding(ncclBfloat16, 8, 7, true);
    rounding(ncclFloat8e4m3, 4, 3, false);
    rounding(ncclFloat8e5m2, 5, 2, true);
    extremes();
    premul();
    same_bits();
    grouped();
    EXPECT(ncclInvalidArgument, ncclAllReduce(&v, &v, 1, ncclInt32, (ncclRedOp_t)-1, comm, NULL));
    EXPECT(ncclInvalidArgument, ncclBroadcast(&v, &v, 1, ncclInt32, n, comm, NULL));
    NCCL(ncclCommFinalize(comm));
    EXPECT(ncclInvalidArgument, ncclAllReduce(&v, &v, 1, ncclInt32, ncclSum, comm, NULL));
    NCCL(ncclCommDestroy(comm));
    return 0;
}
