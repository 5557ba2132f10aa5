/*
 * routing_writer.h: a routing folder (routing.h) written sample by sample while a job runs: counts and token ids.
 *
 * Owns: the growing arrays, their headers, meta.json; taking up a folder where an earlier job left it. Not: reading
 * (routing.h), which samples there are.
 *
 * Samples are appended behind what the arrays' headers tell of; flushing writes the headers, then meta.json, which says
 * "growing". So a reader finds whole samples at any time after the first flush, during the next one too, and a job that
 * dies loses what it did not flush, nothing else. counts.npy is uint16, as all readers want it: a sample in which one
 * expert of a layer got more than 65,535 tokens is left out, and counted in meta.json as `left_out`. tokens.npy is
 * uint32.
 *
 * Errors name the file. Threads: one at a time. A folder is locked (fcntl) against other processes' writers.
 */
#ifndef RY_PLACE_ROUTING_WRITER_H
#define RY_PLACE_ROUTING_WRITER_H

#include <stdint.h>

#include "base/error.h"

struct ry_routing_shape {
    int layers, experts, topk, tokens_per_sample;
};

struct ry_routing_writer;

/** Make the folder (its parent must exist), or go on with one that holds a recording of this shape; NULL with `err` for
 * anything else in it. */
struct ry_routing_writer *ry_routing_writer_open(const char *dir, const struct ry_routing_shape *shape,
                                                 struct ry_err *err);

/** One sample: tokens[tokens_per_sample], counts[layers][experts]. 1: written; 0: left out, as above. */
int ry_routing_writer_add(struct ry_routing_writer *writer, const uint32_t *tokens, const uint32_t *counts,
                          struct ry_err *err);

/** A sample that the caller leaves out. */
void ry_routing_writer_left_out(struct ry_routing_writer *writer);

/** Samples in the folder, those of earlier jobs included. */
int64_t ry_routing_writer_samples(const struct ry_routing_writer *writer);

/** Let readers see all samples. */
int ry_routing_writer_flush(struct ry_routing_writer *writer, struct ry_err *err);

/** Flush and free; -1 with `err` if flushing fails. NULL is fine. */
int ry_routing_writer_close(struct ry_routing_writer *writer, struct ry_err *err);

#endif
