/*
 * capture.h: a stream captured into a graph, as far as NCCL is concerned.
 *
 * Owns: the emulated cluster's stand-in for cudaStreamBeginCapture and what follows it, which a CUDA runtime would
 * offer. Between begin and end, NCCL's operations on that stream are noted, not run: the calls return at once, whatever
 * other ranks do. Launching the graph runs them, group by group, as often as wanted. Found by name in libnccl.so.2,
 * like railyard_emu_version(). Any thread.
 */
#ifndef RY_EMU_CAPTURE_H
#define RY_EMU_CAPTURE_H

#include <stdbool.h>

struct railyard_emu_graph;

/** From now on operations on `stream` (any pointer but NULL) are captured. -1: it is being captured, or no memory. */
int railyard_emu_capture_begin(void *stream);
bool railyard_emu_capturing(void *stream);
/** NULL: it is not being captured. */
struct railyard_emu_graph *railyard_emu_capture_end(void *stream);
/** Returns an ncclResult_t once all is done. */
int railyard_emu_graph_launch(const struct railyard_emu_graph *graph);
void railyard_emu_graph_free(struct railyard_emu_graph *graph);

#endif
