/*
 * sim_device.h: a device whose streams run late, in any order that the waits between them allow, and an NCCL on top.
 *
 * Owns: queues of what was enqueued, a scheduler that draws which stream goes on, and the rules that a GPU would not
 * enforce: memory is used only between its allocation and its release in stream order, a destroyed stream is not named
 * again, segments of one launch are done in any order. Breaking one ends the test. NCCL's groups: sends leave when the
 * group's turn on its communicator comes, and the group ends when all its receives are there. One thread; ranks take
 * turns. Everything that is allocated lives until sim_end().
 */
#ifndef RY_TESTS_SIM_DEVICE_H
#define RY_TESTS_SIM_DEVICE_H

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "device/device.h"
#include "run/internal.h"
#include "run/rows_kernels.h"

enum sim_kind { SIM_COPY, SIM_FILL, SIM_ALLOC, SIM_FREE, SIM_RECORD, SIM_WAIT, SIM_LAUNCH, SIM_GROUP };

struct sim_block { /* memory of the device */
    struct sim_block *next;
    char *at;
    size_t bytes;
    bool pinned, ready, gone;
};

struct ry_event {
    uint64_t recorded;    /* how often */
    bool happened[65536]; /* each of those times; [0]: never recorded */
};

struct sim_part { /* a send or a receive */
    bool send;
    void *at;
    size_t bytes;
    int peer;
};

struct sim_comm {
    int rank, world;
    uint64_t issued, ran; /* groups */
    bool aborted;
    struct { /* a byte that arrives wrong: in group number `group`, from `peer` */
        uint64_t group, offset;
        int peer;
    } corrupt;
};

struct sim_op {
    struct sim_op *next;
    enum sim_kind kind;
    void *to;
    const void *from;
    size_t bytes;
    unsigned char value;
    struct ry_event *event;
    uint64_t version;
    struct sim_block *block;
    struct ry_kernel *kernel;
    union { /* the kernel's parameter */
        struct ry_segments table;
        struct ry_rows_put put;
        struct ry_rows_scan scan;
        struct ry_rows_pack pack;
        struct ry_rows_expand expand;
    };
    struct sim_comm *comm;
    uint64_t group;
    bool posted;
    int nparts;
    struct sim_part *parts;
};

struct sim_stream {
    struct sim_stream *next;
    struct sim_op *first, *last;
    bool destroyed;
};

struct sim_message {
    struct sim_message *next;
    int world, from, to; /* `world` tells communicators of different size apart, which is enough here */
    size_t bytes;
    char *data;
};

static struct {
    uint64_t seed;
    struct sim_stream *streams;
    struct sim_block *blocks;
    struct sim_message *messages;
    struct ry_event *events[4096];
    int nevents;
    struct sim_stream *freeing;
    bool no_kernels;
    size_t most; /* bytes that one allocation may have; 0: any */
    struct {
        int depth, nparts;
        struct sim_part parts[1024];
        struct sim_comm *comm;
        struct sim_stream *stream;
    } group;
} sim;

static inline uint64_t draw(uint64_t below)
{
    sim.seed ^= sim.seed << 13, sim.seed ^= sim.seed >> 7, sim.seed ^= sim.seed << 17;
    return sim.seed % below;
}

#define sim_check(cond, ...)                                                                                           \
    do {                                                                                                               \
        if (!(cond))                                                                                                   \
            ck_abort_msg(__VA_ARGS__);                                                                                 \
    } while (0)

static inline struct sim_op *sim_push(void *stream, enum sim_kind kind)
{
    struct sim_stream *s = stream;
    struct sim_op *op = calloc(1, sizeof *op);
    sim_check(s && !s->destroyed, "a destroyed stream is used again");
    op->kind = kind;
    if (s->last)
        s->last->next = op;
    else
        s->first = op;
    s->last = op;
    return op;
}

/* Memory that is the device's must be there; other memory is the test's. */
static inline void sim_access(const void *at, size_t bytes)
{
    for (struct sim_block *b = sim.blocks; b; b = b->next)
        if ((const char *)at >= b->at && (const char *)at < b->at + b->bytes) {
            sim_check((const char *)at + bytes <= b->at + b->bytes, "%zu bytes run over the end of a block", bytes);
            sim_check(b->ready && !b->gone, "memory is used %s",
                      b->gone ? "after it was given back" : "before it is there");
        }
}

static inline bool sim_group(struct sim_op *op)
{
    struct sim_comm *c = op->comm;
    if (c->ran != op->group)
        return false;
    for (int i = 0; i < op->nparts && !op->posted && !c->aborted; i++) {
        const struct sim_part *p = &op->parts[i];
        if (!p->send)
            continue;
        struct sim_message *m = calloc(1, sizeof *m), **end = &sim.messages;
        *m = (struct sim_message){NULL, c->world, c->rank, p->peer, p->bytes, malloc(p->bytes)};
        sim_access(p->at, p->bytes);
        memcpy(m->data, p->at, p->bytes);
        while (*end)
            end = &(*end)->next;
        *end = m;
    }
    op->posted = true;
    for (int i = 0; i < op->nparts && !c->aborted; i++) { /* is the k-th message from each peer there? */
        struct sim_part *p = &op->parts[i];
        if (p->send)
            continue;
        int before = 0, there = 0;
        for (int k = 0; k < i; k++)
            before += !op->parts[k].send && op->parts[k].peer == p->peer;
        for (struct sim_message *m = sim.messages; m; m = m->next)
            there += m->world == c->world && m->to == c->rank && m->from == p->peer;
        if (there <= before)
            return false;
    }
    for (int i = 0; i < op->nparts && !c->aborted; i++) {
        struct sim_part *p = &op->parts[i];
        if (p->send)
            continue;
        struct sim_message **at = &sim.messages, *m;
        while ((*at)->world != c->world || (*at)->to != c->rank || (*at)->from != p->peer)
            at = &(*at)->next;
        m = *at;
        *at = m->next;
        sim_check(m->bytes == p->bytes, "rank %d expects %zu bytes from rank %d, which sends %zu", c->rank, p->bytes,
                  m->from, m->bytes);
        if (op->group + 1 == c->corrupt.group && p->peer == c->corrupt.peer)
            m->data[c->corrupt.offset] ^= 0x10;
        sim_access(p->at, p->bytes);
        memcpy(p->at, m->data, p->bytes);
        free(m->data);
        free(m);
    }
    c->ran++;
    return true;
}

static inline void sim_at(uint64_t at, uint64_t bytes)
{
    sim_access((void *)(uintptr_t)at, bytes);
}

/* Pieces in any order, like segments. */
static inline void sim_expand(struct sim_op *op)
{
    struct ry_rows_expand *e = &op->expand,
                          one = {.row_bytes = e->row_bytes, .errors = e->errors, .n = 1, .lanes = e->lanes};
    bool done[RY_ROWS_PIECES] = {false};
    for (uint32_t left = e->n; left; left--) {
        uint32_t i = 0;
        for (uint64_t skip = draw(left); skip || done[i]; i++)
            skip -= !done[i];
        done[i] = true;
        one.first_row[1] = e->first_row[i + 1] - e->first_row[i];
        one.distinct[0] = e->distinct[i], one.skip[0] = e->skip[i], one.message[0] = e->message[i];
        one.to[0] = e->to[i], one.bytes[0] = e->bytes[i];
        sim_at(one.to[0], one.bytes[0]);
        sim_at(one.message[0], ry_rows_message_bytes(e->row_bytes, one.distinct[0], one.skip[0] + one.first_row[1]));
        op->kernel->host(&one);
    }
}

/* The kernels of rows.c; false if it is none of them. */
static inline bool sim_launch_rows(struct sim_op *op)
{
    const char *name = op->kernel->name;
    if (!strcmp(name, "ry_expand_rows")) {
        sim_expand(op);
        return true;
    }
    if (strstr(name, "segments"))
        return false;
    if (!strcmp(name, "ry_put_words")) {
        sim_at(op->put.to, op->put.n * 8);
        if (op->put.nfill)
            sim_at(op->put.fill, op->put.nfill * 16);
    } else { /* a pack begins with the scan that it is of */
        sim_at(op->scan.nodes, op->scan.nnodes * sizeof(struct ry_rows_node));
        sim_at(op->scan.where, op->scan.nrows * 4);
        if (!strcmp(name, "ry_pack_rows"))
            for (uint32_t i = 0; i < op->pack.n; i++)
                sim_at(op->pack.message[i], 4 * (uint64_t)(op->pack.first_row[i + 1] - op->pack.first_row[i]));
    }
    op->kernel->host(&op->table);
    return true;
}

static inline void sim_launch(struct sim_op *op)
{
    if (sim_launch_rows(op))
        return;
    struct ry_segments *t = &op->table, one = {.n = 1, .answer = t->answer};
    for (uint32_t left = t->n; left; left--) { /* in any order */
        uint32_t i = (uint32_t)draw(left);
        one.a[0] = t->a[i], one.b[0] = t->b[i], one.bytes[0] = t->bytes[i], one.tag[0] = t->tag[i];
        sim_access((void *)(uintptr_t)one.a[0], one.bytes[0]);
        sim_access((void *)(uintptr_t)one.b[0], one.bytes[0]);
        if (one.answer)
            sim_access((void *)(uintptr_t)one.answer, 8);
        op->kernel->host(&one);
        t->a[i] = t->a[left - 1], t->b[i] = t->b[left - 1], t->bytes[i] = t->bytes[left - 1],
        t->tag[i] = t->tag[left - 1];
    }
}

/* The first op of a stream, if it can be done now. */
static inline bool sim_step(struct sim_stream *s)
{
    struct sim_op *op = s->first;
    switch (op->kind) {
    case SIM_COPY:
        sim_access(op->to, op->bytes);
        sim_access(op->from, op->bytes);
        memmove(op->to, op->from, op->bytes);
        break;
    case SIM_FILL:
        sim_access(op->to, op->bytes);
        memset(op->to, op->value, op->bytes);
        break;
    case SIM_ALLOC:
        op->block->ready = true;
        break;
    case SIM_FREE:
        sim_check(op->block->ready && !op->block->gone, "given back twice");
        op->block->gone = true;
        memset(op->block->at, 0xdd, op->block->bytes);
        break;
    case SIM_RECORD:
        op->event->happened[op->version] = true;
        break;
    case SIM_WAIT:
        if (!op->event->happened[op->version])
            return false;
        break;
    case SIM_LAUNCH:
        sim_launch(op);
        break;
    case SIM_GROUP:
        if (!sim_group(op))
            return false;
        break;
    }
    if (!(s->first = op->next))
        s->last = NULL;
    free(op->parts);
    free(op);
    return true;
}

/* Up to `steps` ops; true if nothing is left. Stuck: false. */
static inline bool sim_run(uint64_t steps)
{
    while (true) {
        struct sim_stream *busy[512];
        int n = 0;
        for (struct sim_stream *s = sim.streams; s; s = s->next)
            if (s->first)
                busy[n++] = s;
        if (!n)
            return true;
        bool moved = false;
        for (; n && !moved && steps; n--) {
            int i = (int)draw((uint64_t)n);
            moved = sim_step(busy[i]);
            busy[i] = busy[n - 1];
        }
        if (!moved || !steps--)
            return false;
    }
}

/* ---- the device ---- */

static int sim_use(int ordinal, struct ry_err *e)
{
    return 0;
}

static int sim_copy(void *dst, const void *src, size_t bytes, void *stream, struct ry_err *e)
{
    struct sim_op *op = sim_push(stream, SIM_COPY);
    op->to = dst, op->from = src, op->bytes = bytes;
    return 0;
}

static int sim_fill(void *dst, unsigned char value, size_t bytes, void *stream, struct ry_err *e)
{
    struct sim_op *op = sim_push(stream, SIM_FILL);
    op->to = dst, op->value = value, op->bytes = bytes;
    return 0;
}

static inline struct sim_block *sim_block(size_t bytes)
{
    struct sim_block *b = calloc(1, sizeof *b);
    *b = (struct sim_block){.next = sim.blocks, .at = aligned_alloc(256, (bytes + 255) / 256 * 256), .bytes = bytes};
    memset(b->at, 0xcc, bytes);
    return sim.blocks = b;
}

static int sim_alloc_async(void **out, size_t bytes, void *stream, struct ry_err *e)
{
    *out = NULL;
    if (sim.most && bytes > sim.most)
        return ry_fail(e, "out of simulated memory");
    struct sim_op *op = sim_push(stream, SIM_ALLOC);
    op->block = sim_block(bytes);
    *out = op->block->at;
    return 0;
}

static inline struct sim_block *sim_block_at(const void *p)
{
    for (struct sim_block *b = sim.blocks; b; b = b->next)
        if (b->at == p)
            return b;
    ck_abort_msg("%p was never allocated", p);
    return NULL;
}

static int sim_free_async(void *p, void *stream, struct ry_err *e)
{
    sim_push(stream, SIM_FREE)->block = sim_block_at(p);
    return 0;
}

static int sim_stream_wait(void *stream, struct ry_event *ev, struct ry_err *e)
{
    struct sim_op *op = sim_push(stream, SIM_WAIT);
    op->event = ev, op->version = ev->recorded;
    return 0;
}

static int sim_free_after(void *p, struct ry_event *ev, struct ry_err *e)
{
    sim_stream_wait(sim.freeing, ev, e);
    return sim_free_async(p, sim.freeing, e);
}

static int sim_pinned_alloc(void **out, size_t bytes, struct ry_err *e)
{
    struct sim_block *b = sim_block(bytes);
    b->pinned = b->ready = true;
    *out = b->at;
    return 0;
}

static int sim_prepare(int ordinal, const struct ry_kernels *kernels, struct ry_err *e)
{
    return kernels && sim.no_kernels ? ry_fail(e, "no kernels in this simulation") : 0;
}

static int sim_launch_later(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *stream,
                            struct ry_err *e)
{
    struct sim_op *op = sim_push(stream, SIM_LAUNCH);
    bool segments = strstr(kernel->name, "segments"), put = !strcmp(kernel->name, "ry_put_words"),
         pack = !strcmp(kernel->name, "ry_pack_rows"), expand = !strcmp(kernel->name, "ry_expand_rows");
    op->kernel = kernel;
    memcpy(&op->table, param,
           segments ? sizeof op->table
           : put    ? sizeof op->put
           : pack   ? sizeof op->pack
           : expand ? sizeof op->expand
                    : sizeof op->scan);
    sim_check(grid > 0 && grid <= RY_GRID && block == RY_BLOCK && (!segments || op->table.n > 0),
              "a launch of %u x %u for %s", grid, block, kernel->name);
    return 0;
}

static int sim_stream_create(void **stream, struct ry_err *e)
{
    struct sim_stream *s = calloc(1, sizeof *s);
    s->next = sim.streams;
    *stream = sim.streams = s;
    return 0;
}

static int sim_stream_destroy(void *stream, struct ry_err *e)
{
    ((struct sim_stream *)stream)->destroyed = true; /* what is in its queue is still done */
    return 0;
}

static int sim_event_create(struct ry_event **ev, struct ry_err *e)
{
    sim_check(sim.nevents < 4096, "too many events");
    *ev = sim.events[sim.nevents++] = calloc(1, sizeof **ev);
    (*ev)->happened[0] = true;
    return 0;
}

static int sim_event_record(struct ry_event *ev, void *stream, struct ry_err *e)
{
    struct sim_op *op = sim_push(stream, SIM_RECORD);
    op->event = ev, op->version = ++ev->recorded;
    sim_check(ev->recorded < sizeof ev->happened, "an event is recorded too often");
    return 0;
}

static int sim_event_done(struct ry_event *ev, bool *done, struct ry_err *e)
{
    *done = ev->happened[ev->recorded];
    return 0;
}

static void sim_event_destroy(struct ry_event *ev)
{
}

static const struct ry_device sim_device = {
    .name = "sim",
    .use = sim_use,
    .copy = sim_copy,
    .fill = sim_fill,
    .alloc_async = sim_alloc_async,
    .free_async = sim_free_async,
    .free_after = sim_free_after,
    .pinned_alloc = sim_pinned_alloc,
    .prepare = sim_prepare,
    .launch = sim_launch_later,
    .stream_create = sim_stream_create,
    .stream_destroy = sim_stream_destroy,
    .stream_wait = sim_stream_wait,
    .event_create_untimed = sim_event_create,
    .event_record = sim_event_record,
    .event_done = sim_event_done,
    .event_destroy = sim_event_destroy,
};

/* ---- NCCL ---- */

static int sim_group_start(void)
{
    sim.group.depth++;
    return 0;
}

static int sim_transfer(bool send, void *at, size_t bytes, int type, int peer, void *comm, void *stream)
{
    sim_check(sim.group.depth == 1 && type == 1 && bytes && at, "a transfer of type %d, %zu bytes in %d groups", type,
              bytes, sim.group.depth);
    sim_check(!sim.group.nparts || (sim.group.comm == comm && sim.group.stream == stream), "a group of two streams");
    sim.group.comm = comm;
    sim.group.stream = stream;
    sim.group.parts[sim.group.nparts++] = (struct sim_part){send, at, bytes, peer};
    return 0;
}

static int sim_send(const void *buf, size_t bytes, int type, int peer, void *comm, void *stream)
{
    return sim_transfer(true, (void *)(uintptr_t)buf, bytes, type, peer, comm, stream);
}

static int sim_recv(void *buf, size_t bytes, int type, int peer, void *comm, void *stream)
{
    return sim_transfer(false, buf, bytes, type, peer, comm, stream);
}

static int sim_group_end(void)
{
    sim_check(sim.group.depth-- == 1, "a group ends that did not begin");
    if (!sim.group.nparts)
        return 0;
    struct sim_op *op = sim_push(sim.group.stream, SIM_GROUP);
    op->comm = sim.group.comm;
    op->group = sim.group.comm->issued++;
    op->nparts = sim.group.nparts;
    op->parts = malloc((size_t)op->nparts * sizeof *op->parts);
    memcpy(op->parts, sim.group.parts, (size_t)op->nparts * sizeof *op->parts);
    sim.group.nparts = 0;
    return 0;
}

static const struct ry_nccl sim_nccl = {
    .group_start = sim_group_start, .group_end = sim_group_end, .send = sim_send, .recv = sim_recv};

static inline void sim_begin(void)
{
    const char *given = getenv("RY_TEST_SEED");
    sim.seed = given ? strtoull(given, NULL, 0) | 1 : (uint64_t)getpid() * 2654435761u | 1;
    printf("seed %llu\n", (unsigned long long)sim.seed);
    fflush(stdout);
    sim_stream_create((void **)&sim.freeing, NULL);
}

/* Everything must have come to its end: nothing queued, no memory kept but pinned, no message lost. */
static inline void sim_end(void)
{
    sim_check(sim_run(UINT64_MAX), "streams wait for each other, or for what never comes");
    sim_check(!sim.messages, "a message was never received");
    for (struct sim_block *b = sim.blocks, *next; b; b = next) {
        sim_check(b->gone || b->pinned, "%zu bytes were never given back", b->bytes);
        next = b->next;
        free(b->at);
        free(b);
    }
    for (struct sim_stream *s = sim.streams, *next; s; s = next) {
        next = s->next;
        free(s);
    }
    for (int i = 0; i < sim.nevents; i++)
        free(sim.events[i]);
}

#endif
