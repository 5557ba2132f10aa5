/* direction.c: see direction.h. */
#include "direction.h"

#include <string.h>
#include <xxhash.h>

const char *ry_direction_name(enum ry_direction direction)
{
    return direction == RY_RETURN ? "return" : "go";
}

enum ry_direction ry_directions_see(struct ry_directions *d, uint64_t number, const uint64_t *send,
                                    const uint64_t *recv, int nranks, uint32_t type_bytes, struct ry_answered *answered)
{
    /* The same counts of other elements are other bytes: probabilities do not answer tokens. */
    uint64_t sent = XXH64(send, (size_t)nranks * sizeof *send, type_bytes);
    uint64_t received = XXH64(recv, (size_t)nranks * sizeof *recv, type_bytes);
    bool doubtful = false;
    *answered = (struct ry_answered){0};
    for (int i = d->n - 1; i >= 0; i--) {
        if (d->gone[i].sent != received || d->gone[i].received != sent)
            continue;
        *answered = (struct ry_answered){true, d->gone[i].doubtful, d->gone[i].number};
        d->n--;
        memmove(&d->gone[i], &d->gone[i + 1], (size_t)(d->n - i) * sizeof d->gone[0]);
        return RY_RETURN;
    }
    for (int i = 0; i < d->n; i++)
        if (d->gone[i].sent == sent && d->gone[i].received == received)
            doubtful = d->gone[i].doubtful = true;
    if (d->n == RY_GONE) {
        d->n--;
        memmove(&d->gone[0], &d->gone[1], (size_t)d->n * sizeof d->gone[0]);
    }
    d->gone[d->n].number = number;
    d->gone[d->n].sent = sent;
    d->gone[d->n].doubtful = doubtful;
    d->gone[d->n++].received = received;
    return RY_GO;
}
