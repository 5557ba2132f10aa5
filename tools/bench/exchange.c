/*
 * exchange.c: one exchange, from filled send buffer to checked receive buffer.
 *
 * Owns: how it is asked of NCCL, as PyTorch asks: without splits one ncclAlltoAll (NCCL ≥ 2.28), else one group of a
 * send to and a receive from every rank in rank order, itself and zero counts included. Not: what is in the rows
 * (content.c).
 */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

/* What buffers hold before an exchange, and the guard behind them after it as well. */
#define POISON 0xa5
#define GUARD 256
#define MAX_COMPLAINTS 8

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
/* Weak: the NCCL that is met at run time may be older and lack it. */
#pragma weak ncclAlltoAll
static bool all_to_all(struct ry_bench *b, const void *send, void *recv, size_t count, ncclDataType_t type)
{
    if (!ncclAlltoAll)
        return false;
    RY_NCCL(b, ncclAlltoAll, send, recv, count, type, b->comm, b->stream);
    return true;
}
#else
static bool all_to_all(struct ry_bench *b, const void *send, void *recv, size_t count, ncclDataType_t type)
{
    return false;
}
#endif

void ry_bench_reserve(struct ry_bench *b, struct ry_buffer *buffer, size_t size)
{
    if (size <= buffer->size && buffer->host)
        return;
    size += size / 4 + 4096; /* splits differ a little each time */
    free(buffer->host);
    buffer->host = ry_bench_memory(b, size, 1);
    RY_DEVICE(b, release, buffer->device);
    RY_DEVICE(b, alloc, &buffer->device, size);
    buffer->size = size;
}

void ry_bench_gather(struct ry_bench *b, const void *mine, size_t bytes, void *all)
{
    size_t total = bytes * (size_t)b->ranks;
    ry_bench_reserve(b, &b->small, bytes + total);
    char *device = b->small.device;
    RY_DEVICE(b, copy, device, mine, bytes, b->stream);
    RY_NCCL(b, ncclAllGather, device, device + bytes, bytes, ncclUint8, b->comm, b->stream);
    RY_DEVICE(b, copy, all, device + bytes, total, b->stream);
    RY_DEVICE(b, stream_sync, b->stream);
}

void ry_bench_swap_counts(struct ry_bench *b, uint64_t iteration, int layer, const struct ry_layer *rows)
{
    size_t experts = (size_t)b->options.routing.experts, total = experts * (size_t)b->ranks;
    ry_bench_reserve(b, &b->small, (experts + total) * sizeof(int64_t));
    int64_t *device = b->small.device, *all = (int64_t *)b->small.host;
    RY_DEVICE(b, copy, device, rows->expert_count, experts * sizeof *device, b->stream);
    RY_NCCL(b, ncclAllGather, device, device + experts, experts, ncclInt64, b->comm, b->stream);
    RY_DEVICE(b, copy, all, device + experts, total * sizeof *device, b->stream);
    RY_DEVICE(b, stream_sync, b->stream);
    for (int r = 0; r < b->ranks; r++) {
        uint64_t n = 0;
        for (int e = 0; e < b->per_rank; e++)
            n += (uint64_t)all[(size_t)r * experts + (size_t)(b->rank * b->per_rank + e)];
        if (n != rows->from[r])
            ry_bench_die(
                b,
                "iteration %llu, layer %d: the gathered counts say that rank %d has %llu rows for me, its routing "
                "says %llu: the all-gather is broken, or the ranks were given different options",
                (unsigned long long)iteration, layer, r, (unsigned long long)n, (unsigned long long)rows->from[r]);
    }
}

static void barrier(struct ry_bench *b)
{
    ry_bench_reserve(b, &b->small, 4);
    RY_NCCL(b, ncclAllReduce, b->small.device, b->small.device, 1, ncclInt32, ncclSum, b->comm, b->stream);
    RY_DEVICE(b, stream_sync, b->stream);
}

/* Hand the rows, `width` elements each, to NCCL: in one call if all splits are equal by design, else as a group. */
static void issue(struct ry_bench *b, const uint64_t *send_rows, const uint64_t *recv_rows, size_t width,
                  const struct ry_bench_type *type)
{
    const char *send = b->send.device;
    char *recv = b->recv.device;
    if (b->capacity && all_to_all(b, send, recv, send_rows[0] * width, type->nccl))
        return;
    RY_NCCL(b, ncclGroupStart);
    for (int r = 0; r < b->ranks; r++) {
        size_t to = send_rows[r] * width, from = recv_rows[r] * width;
        RY_NCCL(b, ncclSend, send, to, type->nccl, r, b->comm, b->stream);
        RY_NCCL(b, ncclRecv, recv, from, type->nccl, r, b->comm, b->stream);
        send += to * type->bytes;
        recv += from * type->bytes;
    }
    RY_NCCL(b, ncclGroupEnd);
}

static void complain(struct ry_bench *b, const struct ry_content *c, int peer, const struct ry_wrong *wrong)
{
    b->wrong += wrong->bytes;
    if (b->complaints++ < MAX_COMPLAINTS)
        fprintf(
            stderr,
            "railyard-bench: rank %d: exchange %llu (%s, iteration %llu, layer %d): %llu bytes from rank %d are wrong, "
            "the first at offset %zu: 0x%02x instead of 0x%02x%s\n",
            b->rank, (unsigned long long)b->exchanges, ry_flow_name(c->flow), (unsigned long long)c->iteration,
            c->layer, (unsigned long long)wrong->bytes, peer, wrong->first, wrong->got, wrong->expected,
            b->complaints == MAX_COMPLAINTS ? " (this rank tells of no more)" : "");
}

static void check(struct ry_bench *b, const struct ry_content *c, const struct ry_row *rows, const uint64_t *count,
                  size_t bytes)
{
    struct ry_wrong wrong;
    const unsigned char *at = b->recv.host;
    for (int r = 0; r < b->ranks; r++) {
        if (!ry_content_check(c, rows, count[r], at, &wrong))
            complain(b, c, r, &wrong);
        rows += count[r];
        at += count[r] * c->row_bytes;
    }
    b->checked += bytes;
    for (size_t i = 0; i < GUARD; i++)
        if (at[i] != POISON) {
            b->wrong++;
            if (b->complaints++ < MAX_COMPLAINTS)
                fprintf(stderr,
                        "railyard-bench: rank %d: exchange %llu (%s) wrote byte %zu behind its receive buffer\n",
                        b->rank, (unsigned long long)b->exchanges, ry_flow_name(c->flow), i);
            break;
        }
}

void ry_bench_exchange(struct ry_bench *b, enum ry_flow flow, uint64_t iteration, int layer,
                       const struct ry_layer *rows, double *us)
{
    const struct ry_bench_options *o = &b->options;
    bool back = ry_flow_is_back(flow), narrow = flow == RY_FLOW_PROBS || flow == RY_FLOW_PROBS_GRAD;
    const struct ry_bench_type *type = narrow ? o->probs_type : o->type;
    size_t width = narrow ? 1 : (size_t)o->hidden;
    const struct ry_content content = {.seed = o->routing.seed,
                                       .iteration = iteration,
                                       .layer = layer,
                                       .flow = flow,
                                       .row_bytes = width * type->bytes,
                                       .mask = type->mask};
    const struct ry_row *send_rows = back ? rows->theirs : rows->mine, *recv_rows = back ? rows->mine : rows->theirs;
    const uint64_t *to = back ? rows->from : rows->to, *from = back ? rows->to : rows->from;
    size_t send_bytes = (back ? rows->n_theirs : rows->n_mine) * content.row_bytes;
    size_t recv_bytes = (back ? rows->n_mine : rows->n_theirs) * content.row_bytes;

    ry_bench_reserve(b, &b->send, send_bytes + 1);
    ry_bench_reserve(b, &b->recv, recv_bytes + GUARD);
    ry_content_fill(&content, send_rows, send_bytes / content.row_bytes, b->send.host);
    RY_DEVICE(b, copy, b->send.device, b->send.host, send_bytes, b->stream);
    RY_DEVICE(b, fill, b->recv.device, POISON, recv_bytes + GUARD, b->stream);
    if (o->barrier)
        barrier(b);

    RY_DEVICE(b, event_record, b->before, b->stream);
    issue(b, to, from, width, type);
    RY_DEVICE(b, event_record, b->after, b->stream);
    RY_DEVICE(b, stream_sync, b->stream);
    if (us)
        RY_DEVICE(b, event_elapsed, b->before, b->after, us);

    for (int r = 0; r < b->ranks; r++)
        b->sent[r] += to[r] * content.row_bytes;
    b->flow_sent[flow] += send_bytes;
    if (flow == RY_FLOW_DISPATCH)
        b->dispatched += recv_bytes;
    bool must_check = o->check == RY_CHECK_EVERY || (o->check == RY_CHECK_FIRST && iteration == 0);
    if (must_check || o->digest) {
        RY_DEVICE(b, copy, b->recv.host, b->recv.device, recv_bytes + GUARD, b->stream);
        RY_DEVICE(b, stream_sync, b->stream);
        if (o->corrupt == b->exchanges + 1 && b->rank == b->ranks - 1 && recv_bytes)
            b->recv.host[recv_bytes / 2] ^= 0x10;
    }
    if (must_check)
        check(b, &content, recv_rows, from, recv_bytes);
    if (o->digest)
        XXH3_128bits_update(b->digest, b->recv.host, recv_bytes);
    b->exchanges++;
}
