/*
 * npy.h: NumPy's .npy files: reading (memory-mapped) and writing.
 *
 * Owns: the header (versions 1.0 and 2.0, read; 1.0 is written), the element types below, C order, up to 4 dimensions,
 * little-endian. Not: structured or text types, Fortran order, .npz; they are refused with an error that says so.
 * Not either: what an array means (the caller checks type and shape).
 *
 * Threads: no state; an opened array is read-only and may be shared. A mapped file that somebody else shortens later
 * raises SIGBUS in the reader, as with any mmap: ry_npy_save() never does that, it replaces the file by rename.
 */
#ifndef RY_BASE_NPY_H
#define RY_BASE_NPY_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

enum ry_npy_type { RY_NPY_U8, RY_NPY_U16, RY_NPY_U32, RY_NPY_U64, RY_NPY_I32, RY_NPY_I64, RY_NPY_F32, RY_NPY_F64 };
#define RY_NPY_DIMS 4

struct ry_npy {
    enum ry_npy_type type;
    int ndim;                  /* 0: one single element */
    size_t shape[RY_NPY_DIMS]; /* [ndim] */
    size_t count;              /* elements: the product of the shape */
    const void *data;          /* `count` elements, aligned for the type; NULL only after ry_npy_close() */
    void *map;                 /* the mapping and its size; private */
    size_t map_size;
};

const char *ry_npy_type_name(enum ry_npy_type type); /* "uint8", … as NumPy says */
size_t ry_npy_type_bytes(enum ry_npy_type type);

/** Map the array in `path`. -1 with `err`, which names the file and what is wrong with it; `out` is then empty. */
int ry_npy_open(struct ry_npy *out, const char *path, struct ry_err *err);
/** Unmap; safe on an empty (zeroed) or already closed array. */
void ry_npy_close(struct ry_npy *npy);

/** Element `i` (in C order) as an unsigned number, for any integer type; negative ones and floats give 0. */
uint64_t ry_npy_get(const struct ry_npy *npy, size_t i);

/**
 * Write an array to `path`, relative to the folder `dirfd` (AT_FDCWD: the working folder). Readers see the old or the
 * new file, never a part: it is written to PATH.tmp and renamed. On failure -1, `err` names the file, errno says what,
 * and neither a part nor the .tmp is left.
 */
int ry_npy_save(int dirfd, const char *path, enum ry_npy_type type, int ndim, const size_t *shape, const void *data,
                struct ry_err *err);
/* Headers written here have this length, whatever the shape: one can be written over when an array has grown. */
#define RY_NPY_HEADER_BYTES 192

/** The header of an array, for who writes elements in pieces. */
void ry_npy_header(char out[RY_NPY_HEADER_BYTES], enum ry_npy_type type, int ndim, const size_t *shape);

/** Bytes of the file that ry_npy_save() makes. */
size_t ry_npy_file_bytes(enum ry_npy_type type, int ndim, const size_t *shape);

#endif
