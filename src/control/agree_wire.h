/*
 * agree_wire.h: what ranks and yardmaster say to each other, as bytes.
 *
 * Owns: the layout and its validation. Not: what a message means at a given moment (agree_rank.c, agree_yard.c).
 *
 * Every message is a head of RY_AGREE_HEAD bytes and a body, all integers little-endian:
 *   0 kind u8 | 1 flags u8 | 2 value u8 | 3 reason u8 | 4 nranks u32 | 8 epoch u64 | 16 number u64 | 24 a u64 | 32 b
 * u64
 *
 *   to the yardmaster        number          a                 body
 *   SEEN                     exchange        -                 the policy's
 *   PROMISE                  m               -                 -
 *   REFUSE                   m               next number       -
 *   MANIFEST (value: type)   exchange        ordinal           not_me: -; else send u64[n], recv u64[n],
 *                                                              with P2P sent u32[n], received u32[n], then the policy's
 *   STRAY, LEAVE             next number     -                 -
 *   to a rank
 *   PROPOSE                  m               -                 -
 *   VERDICT (value: strategy) exchange       watch             b: nanoseconds waited; the policy's, none on direct
 *   END                      first unanswered watch             -
 *
 * `watch` is the number from which SEEN is wanted again (RY_AGREE_NEVER: no more). The policy's part always begins at a
 * multiple of 8.
 */
#ifndef RY_CONTROL_AGREE_WIRE_H
#define RY_CONTROL_AGREE_WIRE_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/error.h"

#define RY_AGREE_HEAD 40
#define RY_AGREE_NEVER UINT64_MAX
#define RY_AGREE_NUMBERS (UINT64_C(1) << 62) /* numbers of exchanges are below this: room for sums */

enum ry_agree_kind {
    RY_SAY_SEEN = 'S',
    RY_SAY_PROMISE = 'P',
    RY_SAY_REFUSE = 'R',
    RY_SAY_MANIFEST = 'M',
    RY_SAY_STRAY = 'X',
    RY_SAY_LEAVE = 'L',
    RY_SAY_PROPOSE = 'p',
    RY_SAY_VERDICT = 'v',
    RY_SAY_END = 'e',
};
enum { RY_FLAG_NOT_ME = 1, RY_FLAG_ONE_CALL = 2, RY_FLAG_P2P = 4, RY_FLAG_VERIFY = 8, RY_FLAG_LAST = 16 };

/* Why an exchange goes direct although ranks were waiting for something better. */
enum ry_agree_reason {
    RY_WHY_NONE,
    RY_WHY_CHOSEN,
    RY_WHY_NOT_ME,
    RY_WHY_NEVER_ABLE,
    RY_WHY_REFUSED,
    RY_WHY_NO_ANSWER,
    RY_WHY_PATIENCE,
    RY_WHY_MISMATCH,
    RY_WHY_STRAY,
    RY_WHY_LOST,
    RY_WHY_LEFT,
    RY_WHY_ORDER,
    RY_WHY_APART,
    RY_WHY_MEMORY,
    RY_WHYS
};
const char *ry_agree_why(enum ry_agree_reason reason);

struct ry_agree_msg {
    uint8_t kind, flags, value, reason;
    uint64_t epoch, number, a, b;
    /* Set by ry_agree_get(): the parts of the body, in the message; NULL where there are none. */
    const uint8_t *send, *recv, *sent, *received, *extra;
    size_t extra_bytes;
};

/** Write the head (RY_AGREE_HEAD bytes). The body's parts are the caller's to append. */
void ry_agree_put(uint8_t *head, const struct ry_agree_msg *m, int nranks);
/** Read and check a message of `nranks` ranks that goes to the yardmaster, or to a rank. -1 with `err` if anything is
 * off. */
int ry_agree_get(struct ry_agree_msg *m, const void *bytes, size_t size, int nranks, bool to_yardmaster,
                 struct ry_err *err);

/* Bytes kept beyond the call in which they came; capacity only grows until freed. */
struct ry_blob {
    uint8_t *bytes; /* as malloc() aligns */
    size_t size, room;
};
/** Room for `size` bytes; false when out of memory (the blob is then as it was). Contents are not kept. */
bool ry_blob_fit(struct ry_blob *b, size_t size);
bool ry_blob_set(struct ry_blob *b, const void *bytes, size_t size);
void ry_blob_free(struct ry_blob *b);

/**
 * When a rank tells what it saw: the first member not below `least` of the sequence that begins at `watch` and goes on
 * from n to n + 1 + min(n / 2, 1020). Dense at first, then one in 1021 (a prime, so that no rhythm of the job is missed
 * for ever).
 */
uint64_t ry_agree_next_seen(uint64_t watch, uint64_t least);

static inline uint64_t ry_get64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return le64toh(v);
}
static inline uint32_t ry_get32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return le32toh(v);
}
static inline void ry_put64(uint8_t *p, uint64_t v)
{
    v = htole64(v);
    memcpy(p, &v, sizeof v);
}
static inline void ry_put32(uint8_t *p, uint32_t v)
{
    v = htole32(v);
    memcpy(p, &v, sizeof v);
}

#endif
