/*
 * collective.c: every operation as phases of sends and receives.
 *
 * Owns: the algorithms. They are flat (every rank talks to every other), which at the emulator's sizes costs less than
 * the wake-ups of a ring; sums are made by one rank per slice, in rank order, so that all ranks get the same bits.
 */
#include "emu.h"

#include <stdlib.h>
#include <string.h>

#define SMALL_BYTES 8192 /* an all-reduce of no more than this is done in one phase, by everybody for itself */

static void add(struct ry_emu_op *op, bool is_send, int peer, const void *buf, size_t bytes)
{
    op->reqs[op->nreqs++] =
        (struct ry_emu_req){.op = op, .is_send = is_send, .peer = peer, .buf = (char *)buf, .bytes = bytes};
}

static void copy(void *to, const void *from, size_t bytes)
{
    if (bytes && to != from)
        memmove(to, from, bytes);
}

/* The op's ranks: i-th member of n, and which of them is this rank. */
struct view {
    const struct ry_emu_op *op;
    int n, me;
};

static int rank_of(const struct view *v, int i)
{
    return v->op->members ? v->op->members[i] : i;
}

static struct view view_of(const struct ry_emu_op *op)
{
    struct view v = {op, op->members ? op->nmembers : op->comm->nranks, op->comm->rank};
    for (int i = 0; op->members && i < v.n; i++)
        if (op->members[i] == op->comm->rank)
            v.me = i;
    return v;
}

/* Receive block i into `to` from member i and send it block i of `from` (stride 0: the same bytes to all). */
static void swap_blocks(struct ry_emu_op *op, const struct view *v, char *to, const char *from, size_t stride,
                        size_t bytes)
{
    for (int k = 1; k < v->n; k++) {
        int i = (v->me + v->n - k) % v->n;
        add(op, false, rank_of(v, i), to + (size_t)i * bytes, bytes);
    }
    for (int k = 1; k < v->n; k++) {
        int i = (v->me + k) % v->n;
        add(op, true, rank_of(v, i), from + (size_t)i * stride, bytes);
    }
}

static bool combine(const struct ry_emu_op *op, const struct view *v, void *to, const void *own, const char *scratch,
                    size_t stride, size_t count)
{
    const void **src = calloc((size_t)v->n, sizeof *src);
    if (!src)
        return false;
    for (int i = 0; i < v->n; i++)
        src[i] = i == v->me ? own : scratch + (size_t)i * stride;
    const void *scalar = !op->scaled ? NULL : op->scalar.on_device ? op->scalar.where : &op->scalar.value;
    ry_emu_reduce(to, src, v->n, count, op->type, op->redop, scalar);
    free(src);
    return true;
}

/* Slice i of an all-reduce, in elements. */
static size_t slice_start(const struct ry_emu_op *op, int i, int n)
{
    return op->count / (size_t)n * (size_t)i + op->count % (size_t)n * (size_t)i / (size_t)n;
}

static bool grab(struct ry_emu_op *op, size_t bytes)
{
    free(op->scratch);
    return (op->scratch = malloc(bytes ? bytes : 1)) != NULL;
}

static bool allreduce(struct ry_emu_op *op, const struct view *v, size_t size)
{
    size_t all = op->count * size;
    const char *send = op->send;
    char *recv = op->recv;
    if (all <= SMALL_BYTES) {
        if (op->phase == 0) {
            if (!grab(op, all * (size_t)v->n))
                return false;
            swap_blocks(op, v, op->scratch, send, 0, all);
        } else {
            op->last = true;
            return combine(op, v, recv, send, op->scratch, all, op->count);
        }
        return true;
    }
    size_t mine = slice_start(op, v->me, v->n), own = slice_start(op, v->me + 1, v->n) - mine;
    if (op->phase == 0) { /* everybody's part of my slice to me */
        if (!grab(op, own * size * (size_t)v->n))
            return false;
        for (int k = 1; k < v->n; k++) {
            int i = (v->me + v->n - k) % v->n;
            add(op, false, i, op->scratch + own * size * (size_t)i, own * size);
        }
        for (int k = 1; k < v->n; k++) {
            int i = (v->me + k) % v->n;
            size_t at = slice_start(op, i, v->n);
            add(op, true, i, send + at * size, (slice_start(op, i + 1, v->n) - at) * size);
        }
    } else { /* my slice of the result to everybody */
        if (!combine(op, v, recv + mine * size, send + mine * size, op->scratch, own * size, own))
            return false;
        for (int k = 1; k < v->n; k++) {
            int i = (v->me + v->n - k) % v->n;
            size_t at = slice_start(op, i, v->n);
            add(op, false, i, recv + at * size, (slice_start(op, i + 1, v->n) - at) * size);
        }
        for (int k = 1; k < v->n; k++)
            add(op, true, (v->me + k) % v->n, recv + mine * size, own * size);
        op->last = true;
    }
    return true;
}

static bool reduce_scatter(struct ry_emu_op *op, const struct view *v, size_t block)
{
    const char *send = op->send;
    if (op->phase == 0) {
        if (!grab(op, block * (size_t)v->n))
            return false;
        swap_blocks(op, v, op->scratch, send, block, block);
        return true;
    }
    op->last = true;
    return combine(op, v, op->recv, send + block * (size_t)v->me, op->scratch, block, op->count);
}

static bool reduce(struct ry_emu_op *op, const struct view *v, size_t block)
{
    if (v->me != op->root) {
        add(op, true, op->root, op->send, block);
        op->last = true;
        return true;
    }
    if (op->phase == 0) {
        if (!grab(op, block * (size_t)v->n))
            return false;
        for (int i = 0; i < v->n; i++)
            if (i != v->me)
                add(op, false, i, op->scratch + block * (size_t)i, block);
        return true;
    }
    op->last = true;
    return combine(op, v, op->recv, op->send, op->scratch, block, op->count);
}

static bool fill(struct ry_emu_op *op, size_t size)
{
    struct view v = view_of(op);
    size_t block = op->count * size;
    const char *send = op->send;
    char *recv = op->recv;
    switch (op->kind) {
    case RY_EMU_SEND:
    case RY_EMU_RECV:
        add(op, op->kind == RY_EMU_SEND, op->root, op->kind == RY_EMU_SEND ? op->send : op->recv, block);
        break;
    case RY_EMU_ALLTOALL:
        copy(recv + block * (size_t)v.me, send + block * (size_t)v.me, block);
        swap_blocks(op, &v, recv, send, block, block);
        break;
    case RY_EMU_ALLGATHER:
        copy(recv + block * (size_t)v.me, send, block);
        swap_blocks(op, &v, recv, send, 0, block);
        break;
    case RY_EMU_BROADCAST:
        if (v.me != op->root) {
            add(op, false, op->root, recv, block);
            break;
        }
        copy(recv, send, block);
        for (int k = 1; k < v.n; k++)
            add(op, true, (v.me + k) % v.n, send, block);
        break;
    case RY_EMU_GATHER:
        if (v.me != op->root) {
            add(op, true, op->root, send, block);
            break;
        }
        copy(recv + block * (size_t)v.me, send, block);
        for (int i = 0; i < v.n; i++)
            if (i != v.me)
                add(op, false, i, recv + block * (size_t)i, block);
        break;
    case RY_EMU_SCATTER:
        if (v.me != op->root) {
            add(op, false, op->root, recv, block);
            break;
        }
        copy(recv, send + block * (size_t)v.me, block);
        for (int i = 0; i < v.n; i++)
            if (i != v.me)
                add(op, true, i, send + block * (size_t)i, block);
        break;
    case RY_EMU_ALLREDUCE:
        return allreduce(op, &v, size);
    case RY_EMU_REDUCESCATTER:
        return reduce_scatter(op, &v, block);
    case RY_EMU_REDUCE:
        return reduce(op, &v, block);
    }
    op->last = true;
    return true;
}

ncclResult_t ry_emu_prepare(struct ry_emu_op *op)
{
    op->nreqs = 0;
    if (op->kind <= RY_EMU_RECV) {
        op->reqs = &op->one;
    } else {
        if (!op->count) { /* as NCCL: a collective of nothing does nothing, and does not meet */
            op->last = true;
            return ncclSuccess;
        }
        if (!op->reqs)
            op->reqs = calloc(2 * (size_t)op->comm->nranks, sizeof *op->reqs);
        if (!op->reqs)
            return ry_emu_error(ncclSystemError, "out of memory");
    }
    if (!fill(op, ry_emu_type_bytes(op->type)))
        return ry_emu_error(ncclSystemError, "out of memory for a collective's scratch space");
    op->phase++;
    return ncclSuccess;
}

void ry_emu_op_free(struct ry_emu_op *op)
{
    free(op->scratch);
    if (op->reqs != &op->one)
        free(op->reqs);
    op->scratch = NULL;
    op->reqs = NULL;
}
