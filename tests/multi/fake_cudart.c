/* fake_cudart.c: stands in for the CUDA runtime where a test looks at when the job's calls get there. */
#include <stddef.h>

#include "fake_cudart.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT void (*fake_cudart_entered)(const char *name);

#define FAKE(name)                                                                                                     \
    EXPORT int name(void *p);                                                                                          \
    EXPORT int name(void *p)                                                                                           \
    {                                                                                                                  \
        (void)p;                                                                                                       \
        if (fake_cudart_entered)                                                                                       \
            fake_cudart_entered(#name);                                                                                \
        return 17;                                                                                                     \
    }
FAKE(cudaFree)
FAKE(cudaFreeHost)
FAKE(cudaHostUnregister)
FAKE(cuMemFreeHost)
