/*
 * carrier.c: the streams' side of carrier.h: words, staging memory, what is enqueued, and the end of it all.
 *
 * All of an exchange is enqueued at once, and the calling thread never waits (but on the emulated cluster, where it is
 * the stream). Staging memory is not a ring: it holds all that a group sends and receives, since a stream that waited
 * for room to send before it took in what has come could wait in a circle with its peers'.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/thread.h"
#include "internal.h"
#include "run/run.h"

#define ALIGNMENT 256
#define SMALL_CHUNK (UINT64_C(1) << 20) /* of messages up to 16 times that, */
#define LARGE_CHUNK (UINT64_C(4) << 20) /* and of larger ones: a few calls less */
#define TOGETHER (UINT64_C(256) << 10)  /* copies of less than that are told of together */
#define LEAST_BLOCK (UINT64_C(1) << 20)
#define WORDS_BYTES 4096

/* Equal for sender and receiver. */
static uint64_t chunk_of(const struct ry_carrier *c, uint64_t bytes)
{
    return !c->staged ? bytes : bytes > 16 * SMALL_CHUNK ? LARGE_CHUNK : SMALL_CHUNK;
}

/* ---- the hub's thread ---- */

void ry_carrier_done(struct ry_carrier *c, uint32_t value)
{
    pthread_mutex_lock(&c->lock);
    if (!atomic_load(&c->aborted)) {
        atomic_store_explicit(&c->word[DONE], value, memory_order_release);
        if (c->at_once)
            pthread_cond_broadcast(&c->changed);
    }
    pthread_mutex_unlock(&c->lock);
}

void ry_carrier_fail(struct ry_carrier *c, uint64_t number, int peer, const char *why)
{
    pthread_mutex_lock(&c->lock);
    bool first = !c->failed && !atomic_load(&c->aborted);
    if (first) {
        c->failed = true;
        c->failed_peer = peer;
        snprintf(c->why, sizeof c->why, "%s", why ? why : "it is gone");
        pthread_cond_broadcast(&c->changed);
        atomic_store(&c->state, RY_CROSS_CANNOT);
        c->failed_at = ry_now_ns();
        c->failed_number = number;
        if (!c->at_once && c->config.failed)
            c->config.failed(c->config.context, number, peer, c->why);
    }
    pthread_mutex_unlock(&c->lock);
}

void ry_carrier_give_up(struct ry_carrier *c)
{
    pthread_mutex_lock(&c->lock);
    if (!c->at_once && c->config.hopeless && !atomic_load(&c->aborted))
        c->config.hopeless(c->config.context, c->failed_number);
    pthread_mutex_unlock(&c->lock);
}

/* ---- staging memory ---- */

struct growing {
    struct ry_carrier *c;
    uint64_t bytes;
};

static uint64_t generous(uint64_t bytes)
{
    uint64_t n = LEAST_BLOCK, want = bytes + bytes / 4;
    while (n < want && n <= UINT64_MAX / 2)
        n *= 2;
    return n;
}

static struct block *take_block(struct ry_carrier *c, uint64_t bytes, struct ry_err *err)
{
    if (!ry_run_staging_reserve(bytes)) {
        ry_fail(err, "%llu more bytes of staging memory are needed: raise RAILYARD_STAGING", (unsigned long long)bytes);
        return NULL;
    }
    struct block *b = calloc(1, sizeof *b);
    if (b && !c->config.device->pinned_alloc(&b->memory, bytes, err)) {
        b->bytes = bytes;
        return b;
    }
    free(b);
    ry_run_staging_unreserve(bytes);
    return NULL;
}

static void own_device(const struct ry_carrier *c)
{
    if (c->config.device->relax_thread) /* the job may capture a graph meanwhile */
        c->config.device->relax_thread();
    c->config.device->use(c->config.ordinal, NULL);
}

static void *grow(void *arg)
{
    struct growing *g = arg;
    struct ry_carrier *c = g->c;
    struct ry_err err = {""};
    own_device(c);
    struct block *b = take_block(c, generous(g->bytes), NULL);
    if (!b)
        b = take_block(c, g->bytes, &err);
    if (!b)
        ry_log(RY_LOG_PLAN, "communicator %s: %s", c->name, err.msg);
    pthread_mutex_lock(&c->lock);
    if (b) { /* those before it stay: nobody asks whether a stream is through with them */
        b->next = c->block;
        c->block = b;
    }
    c->growing = false;
    pthread_mutex_unlock(&c->lock);
    ry_carrier_unref(c);
    free(g);
    return NULL;
}

uint64_t ry_carrier_held(const struct ry_carrier *carrier)
{
    struct ry_carrier *c = (struct ry_carrier *)carrier;
    if (!c->staged)
        return UINT64_MAX;
    pthread_mutex_lock(&c->lock);
    uint64_t bytes = c->block ? c->block->bytes : 0;
    pthread_mutex_unlock(&c->lock);
    return bytes;
}

void ry_carrier_want(struct ry_carrier *c, uint64_t bytes)
{
    pthread_t thread;
    if (!c->staged || bytes <= ry_carrier_held(c))
        return;
    pthread_mutex_lock(&c->lock);
    bool busy = c->growing;
    c->growing = true;
    pthread_mutex_unlock(&c->lock);
    struct growing *g = busy ? NULL : malloc(sizeof *g);
    if (!g)
        return;
    *g = (struct growing){c, bytes};
    atomic_fetch_add(&c->owners, 1);
    if (!ry_thread_start(&thread, grow, g)) {
        pthread_detach(thread);
        return;
    }
    free(g);
    atomic_fetch_sub(&c->owners, 1);
    pthread_mutex_lock(&c->lock);
    c->growing = false;
    pthread_mutex_unlock(&c->lock);
}

/* ---- an exchange ---- */

static int refuse(struct ry_carrier *c, struct ry_err *err)
{
    pthread_mutex_lock(&c->lock);
    int rc = atomic_load(&c->aborted) ? ry_fail(err, "the communicator is being aborted")
             : !c->failed             ? ry_fail(err, "a rank of another node cannot be reached over UCX any more")
             : c->failed_peer < 0     ? ry_fail(err, "UCX: %s", c->why)
                                      : ry_fail(err, "rank %d: %s", c->failed_peer, c->why);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static uint64_t pieces(const struct ry_carrier *c, uint64_t bytes)
{
    uint64_t chunk = chunk_of(c, bytes);
    return (bytes + chunk - 1) / chunk;
}

static bool room_to_land(struct ry_carrier *c, int n)
{
    if (n <= c->landings_room)
        return true;
    struct copied *more = realloc(c->landing, (size_t)n * sizeof *more);
    if (!more)
        return false;
    c->landing = more;
    c->landings_room = n;
    return true;
}

/* The pieces of all messages, the first of each, then the second of each, and so on: so that what comes from one peer
   need not wait for all of another's. `sends` or the others; op[i].at is staging memory, or the job's own; copies[i]
   from or to it. */
static int lay_out(struct ry_carrier *c, struct op *op, const struct ry_cross_transfer *list, int n, bool sends,
                   char *stage, const uint64_t *at, struct copied *copies)
{
    int made = 0;
    bool more = true;
    for (uint64_t k = 0; more; k++) {
        more = false;
        for (int i = 0; i < n; i++) {
            const struct ry_cross_transfer *t = &list[i];
            uint64_t chunk = chunk_of(c, t->bytes), from = k * chunk;
            if (t->send != sends || from >= t->bytes)
                continue;
            struct peer *p = &c->peer[t->peer];
            uint64_t bytes = t->bytes - from < chunk ? t->bytes - from : chunk;
            char *own = (char *)t->at + from, *staged = stage ? stage + at[i] + from : own;
            op[made] = (struct op){.c = c,
                                   .send = sends,
                                   .peer = t->peer,
                                   .tag = ry_hub_tag(c, sends, t->peer, sends ? ++p->out : ++p->in),
                                   .at = staged,
                                   .bytes = bytes};
            copies[made++] = (struct copied){sends ? staged : own, sends ? own : staged, bytes, 0};
            more = true;
        }
    }
    return made;
}

/* What is to be sent is copied out, and told of: copies[i].value once it is there, if that is the last with this value.
 */
static int copy_out(struct ry_carrier *c, const struct copied *copies, int n, void *stream, struct ry_err *err)
{
    const struct ry_device *d = c->config.device;
    for (int i = 0; i < n; i++) {
        if (d->copy(copies[i].to, copies[i].from, copies[i].bytes, stream, err))
            return -1;
        if ((i + 1 == n || copies[i + 1].value != copies[i].value) &&
            d->stream_write_value(stream, (uint32_t *)&c->word[READY], copies[i].value, err))
            return -1;
    }
    return 0;
}

/* Where each message lies in staging memory. */
static int place(struct ry_carrier *c, const struct ry_cross_transfer *list, int n, uint64_t *at, char **stage,
                 struct ry_err *err)
{
    uint64_t used = 0;
    pthread_mutex_lock(&c->lock);
    const struct block *block = c->block;
    pthread_mutex_unlock(&c->lock);
    for (int i = 0; i < n; i++) {
        at[i] = used;
        used += (list[i].bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    *stage = c->staged && block ? block->memory : NULL;
    if (c->staged && used > (block ? block->bytes : 0))
        return ry_fail(err, "transfers between nodes need %llu bytes of staging memory, %llu are held",
                       (unsigned long long)used, (unsigned long long)(block ? block->bytes : 0));
    return 0;
}

/* At which value of READY each of them begins, and at which of DONE it is over. Returns the first: the stream has come.
 */
static uint32_t number(struct ry_carrier *c, struct job *j, struct copied *out)
{
    uint32_t first = ++c->ready_next;
    uint64_t together = 0;
    j->before = c->last_done;
    for (int i = 0; i < j->nops; i++) {
        struct op *op = &j->op[i];
        op->ready = first;
        if (!op->send)
            c->landing[i].value = j->before + (uint32_t)i + 1;
        if (!op->send || !c->staged)
            continue;
        if (i == j->nrecv || together >= TOGETHER) {
            together = 0;
            ++c->ready_next;
        }
        together += op->bytes;
        op->ready = out[i - j->nrecv].value = c->ready_next;
    }
    c->last_done = j->before + (uint32_t)j->nrecv + 1;
    return first;
}

static void hand_over(struct ry_carrier *c, struct job *j)
{
    pthread_mutex_lock(&c->lock);
    c->done_given = c->last_done;
    if (atomic_load(&c->aborted)) /* who aborts did not know of this one */
        atomic_store_explicit(&c->word[DONE], c->done_given, memory_order_release);
    *c->jobs_end = j;
    c->jobs_end = &j->next;
    pthread_mutex_unlock(&c->lock);
    ry_hub_tell(c);
}

static int begin(struct ry_cross *face, const struct ry_cross_transfer *list, int n, void *stream, struct ry_err *err)
{
    struct ry_carrier *c = (struct ry_carrier *)face;
    size_t nrecv = 0, nsend = 0;
    char *stage = NULL;
    c->nlandings = 0;
    if (atomic_load(&c->state) != RY_CROSS_HAS)
        return refuse(c, err);
    for (int i = 0; i < n; i++) {
        *(list[i].send ? &nsend : &nrecv) += pieces(c, list[i].bytes);
        c->sent += list[i].send ? list[i].bytes : 0;
    }
    uint64_t *at = malloc((size_t)n * sizeof *at);
    struct job *j = calloc(1, sizeof *j + (nrecv + nsend) * sizeof *j->op);
    struct copied *out = malloc((nsend + 1) * sizeof *out);
    bool good = at && j && out && room_to_land(c, (int)nrecv + 1) ? !place(c, list, n, at, &stage, err)
                                                                  : !ry_fail(err, "out of memory for %d transfers", n);
    if (good) {
        j->number = face->number;
        j->nrecv = lay_out(c, j->op, list, n, false, stage, at, c->landing);
        j->nops = j->nrecv + lay_out(c, j->op + j->nrecv, list, n, true, stage, at, out);
        uint32_t first = number(c, j, out);
        c->nlandings = c->staged ? j->nrecv : 0;
        hand_over(c, j);
        j = NULL;
        good = !c->config.device->stream_write_value(stream, (uint32_t *)&c->word[READY], first, err) &&
               !(c->staged && copy_out(c, out, (int)nsend, stream, err));
        if (!good)
            ry_carrier_abort(c); /* the device refuses: nothing that the hub waits for will come */
    }
    free(at);
    free(j);
    free(out);
    return good ? 0 : -1;
}

/* The caller is the stream. */
static int wait_here(struct ry_carrier *c, uint32_t value, struct ry_err *err)
{
    pthread_mutex_lock(&c->lock);
    while ((int32_t)(atomic_load(&c->word[DONE]) - value) < 0 && !c->failed && !atomic_load(&c->aborted))
        pthread_cond_wait(&c->changed, &c->lock);
    bool bad = atomic_load(&c->aborted) || (int32_t)(atomic_load(&c->word[DONE]) - value) < 0;
    pthread_mutex_unlock(&c->lock);
    return bad ? refuse(c, err) : 0;
}

static int wait_for(struct ry_carrier *c, uint32_t value, void *stream, struct ry_err *err)
{
    return c->at_once ? wait_here(c, value, err)
                      : c->config.device->stream_wait_value(stream, (const uint32_t *)&c->word[DONE], value, err);
}

static int end(struct ry_cross *face, void *stream, struct ry_err *err)
{
    struct ry_carrier *c = (struct ry_carrier *)face;
    for (int i = 0, last; i < c->nlandings; i = last + 1) {
        uint64_t bytes = c->landing[last = i].bytes;
        while (last + 1 < c->nlandings && bytes + c->landing[last + 1].bytes <= TOGETHER)
            bytes += c->landing[++last].bytes;
        if (wait_for(c, c->landing[last].value, stream, err))
            return -1;
        for (int k = i; k <= last; k++)
            if (c->config.device->copy(c->landing[k].to, c->landing[k].from, c->landing[k].bytes, stream, err))
                return -1;
    }
    return wait_for(c, c->last_done, stream, err);
}

/* ---- meeting ---- */

const void *ry_carrier_card(const struct ry_carrier *c, size_t *size)
{
    *size = c->card_size;
    return c->card;
}

int ry_carrier_meet(struct ry_carrier *c, int rank, const void *bytes, size_t size, struct ry_err *err)
{
    struct card card;
    if (rank < 0 || rank >= c->config.nranks || size < sizeof card)
        return ry_fail(err, "a UCX address of rank %d in %zu bytes", rank, size);
    memcpy(&card, bytes, sizeof card);
    if (!card.port || !card.size || card.size != size - sizeof card)
        return ry_fail(err, "rank %d sent a UCX address of %u bytes in %zu", rank, card.size, size);
    if (!c->config.with[rank])
        return 0;
    struct card *copy = malloc(size);
    if (!copy)
        return ry_fail(err, "out of memory");
    memcpy(copy, bytes, size);
    pthread_mutex_lock(&c->lock);
    if (c->peer[rank].card) { /* twice */
        free(copy);
    } else {
        c->peer[rank].card = copy;
        c->cards++;
    }
    pthread_mutex_unlock(&c->lock);
    ry_hub_tell(c);
    return 0;
}

void ry_carrier_lost(struct ry_carrier *c, int rank, const char *why)
{
    if (rank < 0 || rank >= c->config.nranks)
        return;
    pthread_mutex_lock(&c->lock);
    if (!c->peer[rank].gone)
        c->peer[rank].gone = strdup(why);
    pthread_mutex_unlock(&c->lock);
    atomic_store(&c->state, RY_CROSS_CANNOT);
    ry_hub_tell(c);
}

enum ry_cross_state ry_carrier_state(const struct ry_carrier *c)
{
    return c ? (enum ry_cross_state)atomic_load(&c->state) : RY_CROSS_CANNOT;
}

struct ry_cross *ry_carrier_face(struct ry_carrier *c)
{
    return &c->face;
}

uint64_t ry_carrier_sent(const struct ry_carrier *c)
{
    return c->sent;
}

/* ---- coming and going ---- */

/* Can the device's streams wait for a word, and write one? */
static int try_words(struct ry_carrier *c, struct ry_err *err)
{
    const struct ry_device *d = c->config.device;
    void *stream;
    if (d->stream_create(&stream, err))
        return -1;
    int rc = d->stream_write_value(stream, (uint32_t *)&c->word[READY], 0, err) ||
                     d->stream_wait_value(stream, (const uint32_t *)&c->word[DONE], 0, err)
                 ? -1
                 : 0;
    d->stream_destroy(stream, NULL);
    return rc;
}

static void free_all(struct ry_carrier *c)
{
    for (struct block *b; (b = c->block);) {
        c->block = b->next;
        c->config.device->pinned_free(b->memory, NULL);
        ry_run_staging_unreserve(b->bytes);
        free(b);
    }
    if (c->word)
        c->config.device->pinned_free((void *)c->word, NULL);
    for (int r = 0; c->peer && r < c->config.nranks; r++) {
        free(c->peer[r].card);
        free(c->peer[r].gone);
    }
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->changed);
    free((void *)c->config.with);
    free(c->peer);
    free(c->card);
    free(c->landing);
    free(c);
}

/* Which may wait for the device, where streams may still copy from staging memory. */
static void *free_apart(void *arg)
{
    own_device(arg);
    free_all(arg);
    return NULL;
}

void ry_carrier_unref(struct ry_carrier *c)
{
    pthread_t thread;
    if (atomic_fetch_sub(&c->owners, 1) > 1)
        return;
    if (c->at_once)
        free_all(c);
    else if (!ry_thread_start(&thread, free_apart, c))
        pthread_detach(thread);
}

struct ry_carrier *ry_carrier_new(const struct ry_carrier_config *config, struct ry_err *err)
{
    struct ry_carrier *c = calloc(1, sizeof *c);
    struct ry_hub *h = config->hub;
    size_t n = (size_t)config->nranks;
    bool *with = malloc(n * sizeof *with);
    void *words = NULL;
    struct ry_err why = {"out of memory"};
    if (!c || !with) {
        free(with);
        free(c);
        ry_fail(err, "out of memory");
        return NULL;
    }
    memcpy(with, config->with, n * sizeof *with);
    c->config = *config;
    c->config.with = with;
    snprintf(c->name, sizeof c->name, "%s", config->name);
    c->face = (struct ry_cross){.with = with, .begin = begin, .end = end};
    c->at_once = config->device == ry_device_host();
    c->memory_type = c->at_once ? UCS_MEMORY_TYPE_HOST : UCS_MEMORY_TYPE_CUDA;
    c->staged = config->staged || (!c->at_once && (!h->direct || h->ordinal != config->ordinal ||
                                                   !(h->memory_types >> UCS_MEMORY_TYPE_CUDA & 1)));
    if (c->staged)
        c->memory_type = UCS_MEMORY_TYPE_HOST;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    c->jobs_end = &c->jobs;
    c->end = &c->first;
    atomic_store(&c->owners, 2);
    atomic_store(&c->state, RY_CROSS_COULD);
    for (size_t r = 0; r < n; r++)
        c->npeers += with[r];
    c->port = ry_hub_port(h);
    c->made_at = ry_now_ns();
    c->card_size = sizeof *c->card + h->ucx.address_size;
    if (!c->port || !(c->peer = calloc(n, sizeof *c->peer)) || !(c->card = malloc(c->card_size)) ||
        config->device->pinned_alloc(&words, WORDS_BYTES, &why))
        goto failed;
    memset(words, 0, WORDS_BYTES);
    c->word = words;
    if (try_words(c, &why))
        goto failed;
    *c->card = (struct card){h->uid, c->port, (uint32_t)h->ucx.address_size};
    memcpy(c->card + 1, h->ucx.address, h->ucx.address_size);
    ry_hub_add(c);
    return c;
failed:
    ry_fail(err, "%s", why.msg);
    free_all(c);
    return NULL;
}

void ry_carrier_abort(struct ry_carrier *c)
{
    if (!c)
        return;
    pthread_mutex_lock(&c->lock);
    atomic_store(&c->aborted, true);
    atomic_store(&c->state, RY_CROSS_CANNOT);
    atomic_store_explicit(&c->word[DONE], c->done_given, memory_order_release);
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    ry_hub_tell(c);
}

void ry_carrier_end(struct ry_carrier *c, bool leak)
{
    if (!c || leak)
        return; /* it is the hub's, which stays */
    pthread_mutex_lock(&c->lock);
    c->ended = true;
    c->config.failed = NULL; /* whose context goes */
    c->config.hopeless = NULL;
    pthread_mutex_unlock(&c->lock);
    ry_hub_tell(c);
    ry_carrier_unref(c);
}
