/* row_width.c: see row_width.h. */
#include "row_width.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define NARROW 64          /* bytes: no row is narrower, as far as the gcd goes */
#define WIDE (16u << 10)   /* bytes: a gcd beyond that is hardly a single row */
#define PIECE 1024         /* bytes */

int ry_row_width_init(struct ry_row_width *w, int nranks, uint64_t set_bytes)
{
    *w = (struct ry_row_width){.nranks = nranks, .set_bytes = set_bytes};
    w->last = calloc(2 * (size_t)nranks, sizeof *w->last);
    return w->last ? 0 : -1;
}

void ry_row_width_free(struct ry_row_width *w)
{
    free(w->last);
    w->last = NULL;
}

static uint64_t gcd(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t t = a % b;
        a = b;
        b = t;
    }
    return a;
}

/* H such that big[i] == H * small[i] for all 2n counts; 0 if there is none above 1. */
static uint64_t ratio(const uint64_t *big_send, const uint64_t *big_recv, const uint64_t *small_send,
                      const uint64_t *small_recv, int n)
{
    uint64_t h = 0;
    for (int i = 0; i < 2 * n; i++) {
        uint64_t b = i < n ? big_send[i] : big_recv[i - n], s = i < n ? small_send[i] : small_recv[i - n];
        if (!b && !s)
            continue;
        if (!b || !s || b % s || (h && b / s != h))
            return 0;
        h = b / s;
    }
    return h > 1 ? h : 0;
}

void ry_row_width_note(struct ry_row_width *w, const uint64_t *send, const uint64_t *recv)
{
    size_t n = (size_t)w->nranks;
    memcpy(w->last, send, n * sizeof *send);
    memcpy(w->last + n, recv, n * sizeof *recv);
    w->has_last = 1;
}

uint64_t ry_row_width_see(struct ry_row_width *w, const uint64_t *send, const uint64_t *recv, uint32_t type_bytes,
                          const char **source)
{
    int n = w->nranks;
    uint64_t own = 0, elems = 0;
    *source = NULL;
    for (int i = 0; i < n; i++)
        own = gcd(recv[i], gcd(send[i], own)); /* in this order one division each, as a rule */
    bool narrow = false; /* the exchange of probabilities itself: one element per row */
    if (w->has_last) {
        uint64_t h = ratio(w->last, w->last + n, send, recv, n);
        if (h) {
            w->learned = h;
            narrow = true;
        } else if ((h = ratio(send, recv, w->last, w->last + n, n)) > 1) {
            w->learned = h; /* probabilities before tokens, as in a backward pass */
        }
    }
    ry_row_width_note(w, send, recv);

    if (w->set_bytes && type_bytes && w->set_bytes % type_bytes == 0 && own % (w->set_bytes / type_bytes) == 0) {
        elems = w->set_bytes / type_bytes;
        *source = "set";
    } else if (narrow) {
        elems = 1;
        *source = "ratio";
    } else if (w->learned && own % w->learned == 0) { /* also when nothing at all is sent */
        elems = w->learned;
        *source = "ratio";
    } else if (own) {
        if (own * type_bytes >= NARROW) { /* swapping a few numbers says nothing of rows */
            uint64_t common = gcd(w->gcd, own);
            w->gcd = common * type_bytes >= NARROW ? common : own; /* else this is of another sort than the ones before */
            own = w->gcd;
        }
        elems = own;
        *source = "gcd";
    }
    return elems;
}

uint64_t ry_row_width_search(uint64_t row_bytes, const char *source)
{
    if (row_bytes <= WIDE || !source || strcmp(source, "gcd"))
        return row_bytes;
    uint64_t piece = row_bytes & -row_bytes; /* the largest power of 2 that divides it */
    return piece < NARROW ? row_bytes : piece < PIECE ? piece : PIECE;
}
