/*
 * where.h: finds Railyard's own files from the running tool, installed or in a build folder.
 *
 * Owns: the layout. Installed: PREFIX/bin/railyard, LIBDIR/librailyard.so beside librailyard-engine.so,
 * LIBDIR/railyard/emu/libnccl.so.2, LIBDIR/railyard/python with sitecustomize.py, LIBEXECDIR/railyard/railyard-bench and railyard-calibrate, relative to the tool so that a moved prefix works.
 */
#ifndef RY_TOOLS_WHERE_H
#define RY_TOOLS_WHERE_H

#include "base/error.h"

enum ry_where { RY_WHERE_PRELOAD, RY_WHERE_EMU_DIR, RY_WHERE_BENCH, RY_WHERE_CALIBRATE, RY_WHERE_TOOL_DIR, RY_WHERE_PYTHON };

/** Absolute path of `what` into out[4096]; -1 with `err` naming every place that was tried. */
int ry_where(enum ry_where what, char out[4096], struct ry_err *err);

#endif
