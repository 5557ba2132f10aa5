/*
 * across.c: see across.h. A rank sends the yardmaster its card; with all in, the yardmaster sends each rank those of
 * its peers. Whoever is lost to the yardmaster is lost to all, at once: UCX may notice late.
 */
#include "across.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define LINE 0x5563785f64617461ull /* added to the communicator's key */
#define ALL_PAIRS 128              /* ranks up to which every rank knows those of all other nodes */

enum say { CARDS, LOST };
struct said {
    uint32_t say, count; /* CARDS: so many follow; LOST: the rank */
};
struct entry {
    uint32_t rank, size;
};

struct ry_across {
    struct comm *c;
    const struct ry_cluster *map;
    struct ry_carrier *carrier;
    _Atomic(struct ry_line *) line;
    struct {
        void *bytes;
        size_t size;
    } * cards; /* [nranks], on the yardmaster */
    int ncards;
};

enum ry_transport ry_transport_read(const char *value, bool *staged)
{
    *staged = !strcmp(value, "ucx-staged");
    if (!strcmp(value, "ucx") || *staged)
        return RY_BY_UCX;
    if (!strcmp(value, "auto"))
        return RY_BY_FASTER;
    if (strcmp(value, "nccl"))
        ry_warn("RAILYARD_TRANSPORT: \"%s\" is none of nccl, ucx, ucx-staged and auto. Taken as nccl", value);
    return RY_BY_NCCL;
}

/* Do these two know each other? In large communicators relays only, or there would be too many connections. */
static bool are_peers(const struct ry_cluster *map, int a, int b)
{
    return map->node[a] != map->node[b] &&
           (map->nranks <= ALL_PAIRS || ry_relay(map, a, map->node[b]) == b || ry_relay(map, b, map->node[a]) == a);
}

/* ---- cards ---- */

static void send_cards(struct ry_across *a, int to)
{
    size_t size = sizeof(struct said);
    struct said said = {.say = CARDS};
    for (int r = 0; r < a->map->nranks; r++)
        if (are_peers(a->map, to, r))
            size += sizeof(struct entry) + a->cards[r].size;
    char *bytes = malloc(size), *at = bytes + sizeof said;
    if (!bytes)
        return ry_warn("communicator %s: out of memory for UCX addresses: NCCL carries everything", a->c->id);
    for (int r = 0; r < a->map->nranks; r++) {
        if (!are_peers(a->map, to, r))
            continue;
        struct entry e = {(uint32_t)r, (uint32_t)a->cards[r].size};
        memcpy(at, &e, sizeof e);
        memcpy(at + sizeof e, a->cards[r].bytes, e.size);
        at += sizeof e + e.size;
        said.count++;
    }
    memcpy(bytes, &said, sizeof said);
    ry_line_send(atomic_load(&a->line), to, bytes, size);
    free(bytes);
}

static void take_card(struct ry_across *a, int from, const void *card, size_t size)
{
    if (!a->cards || a->cards[from].bytes || !(a->cards[from].bytes = malloc(size + 1)))
        return;
    memcpy(a->cards[from].bytes, card, size);
    a->cards[from].size = size;
    if (++a->ncards < a->map->nranks)
        return;
    for (int r = 0; r < a->map->nranks; r++)
        send_cards(a, r);
    for (int r = 0; r < a->map->nranks; r++)
        free(a->cards[r].bytes);
    free(a->cards);
    a->cards = NULL;
}

static void meet(struct ry_across *a, uint32_t count, const char *at, size_t size)
{
    struct ry_err err = {"an address is cut short"};
    struct entry e;
    for (; count; count--, at += sizeof e + e.size, size -= sizeof e + e.size) {
        if (size < sizeof e)
            break;
        memcpy(&e, at, sizeof e);
        if (e.size > size - sizeof e || ry_carrier_meet(a->carrier, (int)e.rank, at + sizeof e, e.size, &err))
            break;
    }
    if (count)
        ry_warn("communicator %s: NCCL carries everything: %s", a->c->id, err.msg);
}

/* On the control thread, or another one that lends it a hand; not before all is set up (ry_across_open()). */
static void message(void *context, int from, const void *bytes, size_t size)
{
    struct ry_across *a = context;
    struct said said;
    struct entry e;
    const char *rest = (const char *)bytes + sizeof said;
    if (size < sizeof said)
        return;
    memcpy(&said, bytes, sizeof said);
    size -= sizeof said;
    if (said.say == LOST) {
        ry_carrier_lost(a->carrier, (int)said.count, "its process ended, or cannot be reached");
    } else if (said.count == 1 && size >= sizeof e && (memcpy(&e, rest, sizeof e), e.rank == (uint32_t)from) &&
               a->cards && e.size == size - sizeof e) {
        take_card(a, from, rest + sizeof e, e.size);
    } else if (from == 0) {
        meet(a, said.count, rest, size);
    }
}

static void lost(void *context, int peer, const char *why)
{
    struct ry_across *a = context;
    struct said said = {.say = LOST, .count = (uint32_t)peer};
    struct ry_line *line = atomic_load(&a->line); /* NULL: it is being opened */
    if (why == ry_line_left)
        return;
    ry_carrier_lost(a->carrier, peer, why);
    for (int r = 1; a->c->info.rank == 0 && line && r < a->map->nranks; r++)
        if (r != peer)
            ry_line_send(line, r, &said, sizeof said);
}

/* ---- what fails after the call has returned ---- */

static void failed(void *context, uint64_t number, int peer, const char *why)
{
    const struct comm *c = context;
    ry_log(RY_LOG_ERROR,
           "communicator %s, exchange %" PRIu64
           ": rank %d: %s: what UCX was to bring from it or take to it never ends, and the job's "
           "stream waits for that. Unless the job aborts the communicator, this process ends in %g s",
           c->id, number, peer, why, ry_engine.settings.patience);
}

/* As in later.c: the stream must not go on without its bytes. */
static void hopeless(void *context, uint64_t number)
{
    const struct comm *c = context;
    if (atomic_load(&ry_engine.closed))
        return;
    ry_log(RY_LOG_ERROR,
           "communicator %s, exchange %" PRIu64 ": nobody has aborted the communicator: this process ends", c->id,
           number);
    abort();
}

/* ---- coming and going ---- */

static int introduce(struct ry_across *a)
{
    size_t size;
    const void *card = ry_carrier_card(a->carrier, &size);
    struct said said = {.say = CARDS, .count = 1};
    struct entry e = {(uint32_t)a->c->info.rank, (uint32_t)size};
    char *bytes = malloc(sizeof said + sizeof e + size);
    if (!bytes)
        return -1;
    memcpy(bytes, &said, sizeof said);
    memcpy(bytes + sizeof said, &e, sizeof e);
    memcpy(bytes + sizeof said + sizeof e, card, size);
    ry_line_send(atomic_load(&a->line), 0, bytes, sizeof said + sizeof e + size);
    free(bytes);
    return 0;
}

static struct ry_carrier *make_carrier(struct comm *c, const struct ry_cluster *map, struct ry_err *err)
{
    bool *with = malloc((size_t)map->nranks * sizeof *with);
    if (!with) {
        ry_fail(err, "out of memory");
        return NULL;
    }
    for (int r = 0; r < map->nranks; r++)
        with[r] = are_peers(map, c->info.rank, r);
    if (ry_engine.device->relax_thread) /* the rendezvous's own thread, and the job may capture a graph meanwhile */
        ry_engine.device->relax_thread();
    if (ry_engine.device->use(c->info.device, err)) {
        free(with);
        return NULL;
    }
    struct ry_carrier_config config = {.hub = ry_engine.hub,
                                       .device = ry_engine.device,
                                       .ordinal = c->info.device,
                                       .nranks = map->nranks,
                                       .rank = c->info.rank,
                                       .with = with,
                                       .staged = ry_engine.staged,
                                       .patience = ry_engine.settings.patience,
                                       .name = c->id,
                                       .failed = failed,
                                       .hopeless = hopeless,
                                       .context = c};
    struct ry_carrier *carrier = ry_carrier_new(&config, err);
    free(with);
    return carrier;
}

struct ry_across *ry_across_open(struct comm *c, const struct ry_cluster *map, const void *address, size_t size)
{
    struct ry_err err = {"out of memory"};
    if (!ry_engine.hub || map->nnodes < 2)
        return NULL;
    struct ry_across *a = calloc(1, sizeof *a);
    if (!a)
        return NULL;
    a->c = c;
    a->map = map;
    struct ry_line_handlers on = {.context = a, .message = message, .lost = lost};
    if ((c->info.rank || (a->cards = calloc((size_t)map->nranks, sizeof *a->cards))) &&
        (a->carrier = make_carrier(c, map, &err))) {
        struct ry_line *line =
            ry_line_open(ry_engine.control, c->key + LINE, map->nranks, c->info.rank, address, size, &on, &err);
        atomic_store(&a->line, line);
        if (line && !introduce(a))
            return a;
    }
    ry_warn("communicator %s: NCCL carries what crosses nodes, not UCX: %s", c->id, err.msg);
    ry_across_close(a, false);
    return NULL;
}

enum ry_cross_state ry_across_state(const struct ry_across *a)
{
    return a ? ry_carrier_state(a->carrier) : RY_CROSS_CANNOT;
}

uint64_t ry_across_held(const struct ry_across *a)
{
    return a ? ry_carrier_held(a->carrier) : 0;
}

void ry_across_want(struct ry_across *a, uint64_t bytes)
{
    if (a)
        ry_carrier_want(a->carrier, bytes);
}

struct ry_cross *ry_across_face(struct ry_across *a, uint64_t number)
{
    struct ry_cross *face = a ? ry_carrier_face(a->carrier) : NULL;
    if (face)
        face->number = number;
    return face;
}

uint64_t ry_across_sent(const struct ry_across *a)
{
    return a ? ry_carrier_sent(a->carrier) : 0;
}

void ry_across_abort(struct ry_across *a)
{
    if (a)
        ry_carrier_abort(a->carrier);
}

void ry_across_close(struct ry_across *a, bool leak)
{
    if (!a)
        return;
    if (atomic_load(&a->line))
        ry_line_close_with_all(atomic_load(&a->line));
    ry_carrier_end(a->carrier, leak);
    for (int r = 0; a->cards && r < a->map->nranks; r++)
        free(a->cards[r].bytes);
    free(a->cards);
    free(a);
}
