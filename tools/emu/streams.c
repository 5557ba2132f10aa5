/* streams.c: see streams.h. */
#include "streams.h"

#include <stdatomic.h>
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

static int (*_Atomic engine_sync)(void *stream);

EXPORT void railyard_emu_streams(int (*sync)(void *stream))
{
    atomic_store(&engine_sync, sync);
}

EXPORT void railyard_emu_synchronize(void *stream)
{
    int (*sync)(void *) = atomic_load(&engine_sync);
    if (sync)
        sync(stream);
}
