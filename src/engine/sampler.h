/*
 * sampler.h: how long exchanges took on the device, and when they began.
 *
 * Owns: pairs of device events around exchanges, the clock of a device that they are read by, and the thread that waits for them. Not: which exchanges are timed (engine)
 * nor where durations go (record/, through the callback).
 *
 * The job's thread takes a free pair, records two events, and goes on: no lock, no wait, and when all pairs are in flight the
 * exchange simply is not timed. Events are made at first use, one pair per exchange in flight and device.
 */
#ifndef RY_ENGINE_SAMPLER_H
#define RY_ENGINE_SAMPLER_H

#include <stdint.h>

#include "device/device.h"

struct ry_sampler;
struct ry_sample;

/** Called on the sampler's thread. began_us: when, on a clock that all samples of one device share; NAN: not known
 * (ry_sampler_clock()). */
typedef void (*ry_sampler_done)(void *context, uint64_t number, double began_us, double us);

struct ry_sampler *ry_sampler_start(const struct ry_device *device, struct ry_err *err);
/** [job] From now on samples are to know when they began. The thread keeps an event per device for that, on a stream of its own. */
void ry_sampler_clock(struct ry_sampler *s);
/** [job] Before the exchange: NULL if it cannot be timed (stream under capture, all pairs in flight, a driver error). */
struct ry_sample *ry_sampler_begin(struct ry_sampler *s, int ordinal, void *stream);
/** [job] After it was issued; `ok` false gives the pair back unused. */
void ry_sampler_end(struct ry_sampler *s, struct ry_sample *sample, void *stream, int ok, ry_sampler_done done,
                    void *context, uint64_t number);
/** Forget samples of `context`, after a last look at those already done: when this returns `done` is not called any more. */
void ry_sampler_forget(struct ry_sampler *s, void *context);
/** Stop the thread, after a last look. Pairs still held by other threads stay valid (the process is about to end). */
void ry_sampler_stop(struct ry_sampler *s);

#endif
