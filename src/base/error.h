/*
 * error.h: how functions of Railyard tell what went wrong.
 *
 * Owns: the error text. Not: where it is printed (the caller decides: log.h in the engine, stderr in the tools).
 *
 * A function that can fail takes a `struct ry_err *` last and returns -1 (or NULL) after filling it by ry_fail(). The
 * text is one line without a full stop or newline and names the file, rank or peer concerned and, where there is one,
 * the remedy. Callers may pass NULL when they do not care. Nothing here allocates.
 */
#ifndef RY_BASE_ERROR_H
#define RY_BASE_ERROR_H

struct ry_err {
    char msg[512];
};

/** Fill `err` (may be NULL) with a printf-style text; longer text is cut. Always returns -1, to be returned on. */
int ry_fail(struct ry_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
