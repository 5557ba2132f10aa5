/*
 * quiet.c: librailyard-quiet.so, which the engine needs: keeps UCX's hands still where somebody else opens the engine,
 * who knows nothing of control/load.h: NCCL, as its profiler plugin.
 *
 * Owns: its place in the order of constructors. It is linked with -z initfirst, so that its own comes before those of
 * all other libraries that the same dlopen() brings along, whichever they are; the engine's comes after those of all it
 * needs, and ends the quiet (profiler.c). Where the preload opens the engine, all is quiet already and nothing is done.
 */
#include "control/load.h"

void ry_quiet_over(void);

static struct ry_quiet quiet;

__attribute__((constructor)) static void begin(void)
{
    quiet = ry_quiet_begin();
}

__attribute__((visibility("default"))) void ry_quiet_over(void)
{
    ry_quiet_end(quiet);
}
