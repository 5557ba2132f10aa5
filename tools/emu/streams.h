/*
 * streams.h: waiting for an emulated stream.
 *
 * Owns: the stand-in for cudaStreamSynchronize. The emulated NCCL is done when its calls return, so there is nothing to wait for
 * but what Railyard's engine puts before a stream (RAILYARD_HOLD=no). Found by name in libnccl.so.2, like
 * railyard_emu_version(). Any thread.
 */
#ifndef RY_EMU_STREAMS_H
#define RY_EMU_STREAMS_H

/** By the engine: `sync` waits for a stream. */
void railyard_emu_streams(int (*sync)(void *stream));
/** Wait until everything that was enqueued on `stream` is done. */
void railyard_emu_synchronize(void *stream);

#endif
