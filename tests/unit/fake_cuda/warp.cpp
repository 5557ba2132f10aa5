/*
 * warp.cpp: see warp.h. Fibers are started with makecontext() and switched with _setjmp(), which needs no system call.
 */
#include "warp.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define LEAVING(keep, stack, size) __sanitizer_start_switch_fiber(keep, stack, size)
#define ENTERED(keep, stack, size) __sanitizer_finish_switch_fiber(keep, stack, size)
#else
#define LEAVING(keep, stack, size) ((void)(keep), (void)(stack), (void)(size))
#define ENTERED(keep, stack, size) LEAVING(keep, stack, size)
#endif

namespace
{

enum { LANES = 32, STACK = 256 << 10 };
struct fiber {
    jmp_buf env;
    void *stack, *keep;
    bool begun, done;
    uint32_t mask; /* waits for these; 0: can go on */
    unsigned side; /* which of its two sets of values the next exchange uses */
    uint64_t got[2][LANES];
    uint64_t value;
} fibers[LANES];
jmp_buf scheduler;
void *scheduler_keep;
const void *scheduler_stack;
size_t scheduler_size;
unsigned lane;

void (*work)(const void *);
const void *work_param;

void to_scheduler(fiber &f)
{
    if (_setjmp(f.env) == 0) {
        LEAVING(&f.keep, scheduler_stack, scheduler_size);
        _longjmp(scheduler, 1);
    }
    ENTERED(f.keep, &scheduler_stack, &scheduler_size);
}

void fiber_main()
{
    fiber &f = fibers[lane];
    ENTERED(nullptr, &scheduler_stack, &scheduler_size);
    for (;;) {
        work(work_param);
        f.done = true;
        to_scheduler(f);
    }
}

void go_on(unsigned i)
{
    fiber &f = fibers[i];
    lane = i;
    if (_setjmp(scheduler) == 0) {
        LEAVING(&scheduler_keep, f.stack, STACK);
        if (f.begun)
            _longjmp(f.env, 1);
        f.begun = true;
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = f.stack;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, fiber_main, 0);
        setcontext(&context);
    }
    ENTERED(scheduler_keep, nullptr, nullptr);
}

/* All that `mask` names wait for just these, or have ended: hand the values round. */
bool complete(uint32_t mask)
{
    bool all = true;
    for (unsigned i = 0; i < LANES; i++)
        if (mask >> i & 1)
            all = all && !fibers[i].done && fibers[i].mask == mask;
    return all;
}

} // namespace

void warp_run(void (*what)(const void *), const void *param, unsigned *thread, unsigned first)
{
    work = what;
    work_param = param;
    for (fiber &f : fibers) {
        if (!f.stack)
            f.stack = malloc(STACK);
        f.done = false;
        f.mask = 0;
    }
    for (unsigned left = LANES; left;) {
        bool moved = false;
        for (unsigned i = 0; i < LANES; i++) {
            fiber &f = fibers[i];
            if (f.done || (f.mask && !complete(f.mask)))
                continue;
            if (uint32_t mask = f.mask)
                for (unsigned a = 0; a < LANES; a++)
                    if (mask >> a & 1) {
                        for (unsigned b = 0; b < LANES; b++)
                            fibers[a].got[fibers[a].side][b] = mask >> b & 1 ? fibers[b].value : 0;
                        fibers[a].mask = 0;
                    }
            *thread = first + i;
            go_on(i);
            moved = true;
            left -= f.done;
        }
        if (!moved) {
            fprintf(stderr, "threads of a warp wait for others that do not come\n");
            abort();
        }
    }
}

const uint64_t *warp_exchange(uint32_t mask, uint64_t value)
{
    fiber &f = fibers[lane];
    if (!(mask >> lane & 1)) {
        fprintf(stderr, "lane %u is not in its own mask %08x\n", lane, mask);
        abort();
    }
    f.side ^= 1;
    f.value = value;
    f.mask = mask;
    to_scheduler(f);
    return f.got[f.side];
}
