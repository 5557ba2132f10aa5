/*
 * words.cuh: 16-byte words from any address, for kernels.
 *
 * Owns: putting a word together from the two aligned ones that it straddles, and byte by byte where those may not be
 * read. Both aligned words are read coalesced; the second comes out of the cache, since the neighbouring thread reads it
 * as its first.
 */
#ifndef RY_RUN_WORDS_CUH
#define RY_RUN_WORDS_CUH

#define WORD 16u

typedef unsigned char byte;

/* Bytes `shift` to `shift` + 15 of the 32 in (low, high), shift = 4 words + bits / 8. */
template <uint32_t words> static __device__ uint4 straddle(uint4 low, uint4 high, uint32_t bits)
{
    const uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    return make_uint4(__funnelshift_r(w[words], w[words + 1], bits), __funnelshift_r(w[words + 1], w[words + 2], bits),
                      __funnelshift_r(w[words + 2], w[words + 3], bits),
                      __funnelshift_r(w[words + 3], words == 3 ? w[7] : w[(words + 4) % 8], bits));
}

static __device__ uint4 joined(uint4 low, uint4 high, uint32_t shift)
{
    uint32_t bits = shift % 4 * 8;
    switch (shift / 4) { /* the same for a whole block, or for all that read one row */
    case 0:
        return straddle<0>(low, high, bits);
    case 1:
        return straddle<1>(low, high, bits);
    case 2:
        return straddle<2>(low, high, bits);
    default:
        return straddle<3>(low, high, bits);
    }
}

static __device__ uint4 by_bytes(const byte *b)
{
    uint32_t w[4];
    for (int i = 0; i < 4; i++)
        w[i] = b[4 * i] | b[4 * i + 1] << 8 | b[4 * i + 2] << 16 | (uint32_t)b[4 * i + 3] << 24;
    return make_uint4(w[0], w[1], w[2], w[3]);
}

#endif
