/*
 * device.h: the small interface through which Railyard touches a device: memory, copies, streams, events, identity.
 *
 * Owns: the two backends. CUDA goes through the driver API, opened at run time (libcuda.so.1), so that nothing of CUDA
 * is needed to load us. Host memory is the other: the "device" of the emulated cluster, whose NCCL finishes every call
 * before it returns, so its streams are always idle and its events are time stamps.
 * Not: what kernels compute (they come as struct ry_kernels from whoever needs them), NCCL.
 *
 * All functions return 0, or -1 with `err` filled (which names the failing driver call). Streams are the caller's
 * cudaStream_t / CUstream, NULL being the legacy default stream. Thread-safety: all functions may be called from any
 * thread; `use` acts on the calling thread only.
 */
#ifndef RY_DEVICE_DEVICE_H
#define RY_DEVICE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* Who a device is, as far as topology wants to know; "" or zeros where the backend cannot say. */
struct ry_device_id {
    char name[64];
    char pci[16];  /* "0000:19:00.0", lower case; "" on host memory */
    char uuid[48]; /* "GPU-xxxxxxxx-…" as nvidia-smi prints it; "" on host memory */
};

struct ry_event; /* owned by whoever created it */

#define RY_DEVICES 64 /* CUDA ordinals that are served */

/*
 * A kernel takes one parameter, a structure of at most 4096 bytes, by value: the driver copies it at the launch, so it
 * needs no memory that would have to outlive the call. `host` does the same on host memory.
 */
struct ry_kernel {
    const char *name;
    void (*host)(const void *param);
    _Atomic(void *) loaded[RY_DEVICES]; /* the CUDA backend's */
};
#define RY_KERNELS 16
/* Up to RY_KERNELS kernels that travel together. Static: once loaded they stay so. */
struct ry_kernels {
    const void *image; /* fatbin; NULL where the build had no nvcc: cannot be loaded on CUDA then */
    struct ry_kernel *const *kernel;
    int n;
};

struct ry_device {
    const char *name; /* "cuda" or "host" */

    /** Number of devices that this process sees. */
    int (*count)(int *n, struct ry_err *err);
    /** Identity of device `ordinal` (CUDA's numbering in this process, after CUDA_VISIBLE_DEVICES). */
    int (*identify)(int ordinal, struct ry_device_id *out, struct ry_err *err);
    /** Make `ordinal` the calling thread's device (its primary context becomes current). */
    int (*use)(int ordinal, struct ry_err *err);
    /** The calling thread's device; -1 it has none. NULL in a backend that cannot say. */
    int (*current)(void);

    int (*alloc)(void **out, size_t bytes, struct ry_err *err); /* on the thread's device; bytes 0 gives NULL */
    int (*release)(void *p, struct ry_err *err);
    /** Copy between any of host and device memory, in stream order; host memory must stay until the stream is there. */
    int (*copy)(void *dst, const void *src, size_t bytes, void *stream, struct ry_err *err);
    int (*fill)(void *dst, unsigned char value, size_t bytes, void *stream, struct ry_err *err);

    /**
     * Memory in stream order, from a pool that is ours alone: usable by what `stream` does after the call, and handed
     * back when `stream` gets there. The job's own pools and their statistics are not touched; what is handed back goes
     * to the driver at the next synchronization, so that the job's allocator can have it. Fails, without waiting, when
     * out of memory.
     */
    int (*alloc_async)(void **out, size_t bytes, void *stream, struct ry_err *err);
    int (*free_async)(void *p, void *stream, struct ry_err *err);
    /** Hand back once `ev` has come to pass, whatever became of the stream it was recorded on. Never waits. */
    int (*free_after)(void *p, struct ry_event *ev, struct ry_err *err);
    /** Host memory that every device can reach at the same address. Both calls may wait for the device. */
    int (*pinned_alloc)(void **out, size_t bytes, struct ry_err *err);
    int (*pinned_free)(void *p, struct ry_err *err);

    /**
     * Get device `ordinal` (-1: the thread's own) ready for alloc_async and for launching `kernels` (may be NULL). May
     * wait for the device, which is why neither of the two ever does this by itself. Repeating it is cheap.
     */
    int (*prepare)(int ordinal, const struct ry_kernels *kernels, struct ry_err *err);
    int (*launch)(struct ry_kernel *kernel, unsigned grid, unsigned block, const void *param, void *stream,
                  struct ry_err *err);

    int (*stream_create)(void **stream, struct ry_err *err);
    int (*stream_destroy)(void *stream, struct ry_err *err);
    int (*stream_sync)(void *stream, struct ry_err *err);
    /** *capturing: the stream is being captured into a graph, or might be (then keep your hands off it). */
    int (*stream_capturing)(void *stream, bool *capturing, struct ry_err *err);

    /** What `stream` does after the call waits for the event as last recorded; for nothing if it never was. */
    int (*stream_wait)(void *stream, struct ry_event *ev, struct ry_err *err);
    /**
     * What `stream` does after the call waits until *word, in memory of pinned_alloc(), is `value` or, by the sign of the 32-bit
     * difference, beyond. Whoever holds the word may let it go by writing it, a stream or the host. -1 where the driver cannot:
     * nothing was enqueued then.
     */
    int (*stream_wait_value)(void *stream, const uint32_t *word, uint32_t value, struct ry_err *err);
    /** Write the word when the stream gets there: all that it did before is seen by what waited for it. */
    int (*stream_write_value)(void *stream, uint32_t *word, uint32_t value, struct ry_err *err);

    int (*event_create)(struct ry_event **ev, struct ry_err *err); /* on the thread's device, with timing */
    /** For order only: cheaper, and event_elapsed() refuses it. May be called by a thread without a device. */
    int (*event_create_untimed)(struct ry_event **ev, struct ry_err *err);
    int (*event_record)(struct ry_event *ev, void *stream, struct ry_err *err);
    /** *done: everything before the event has finished. Never blocks. */
    int (*event_done)(struct ry_event *ev, bool *done, struct ry_err *err);
    /** Microseconds from `a` to `b`, both done. */
    int (*event_elapsed)(struct ry_event *a, struct ry_event *b, double *us, struct ry_err *err);
    void (*event_destroy)(struct ry_event *ev);

    /** Allow the calling thread's driver calls while another thread captures a graph (a watcher thread calls it once).
     */
    void (*relax_thread)(void);
};

/** The host-memory backend: one device, ordinal 0 (any ordinal is taken); never fails. */
const struct ry_device *ry_device_host(void);

/** Its streams are captured when `capturing` says so (the emulated cluster's capture.h); NULL: never. */
void ry_device_host_captures(bool (*capturing)(void *stream));

/** The CUDA backend, or NULL with `err` saying why (no libcuda.so.1, no device, a driver call missing). Opened once. */
const struct ry_device *ry_device_cuda(struct ry_err *err);

#endif
