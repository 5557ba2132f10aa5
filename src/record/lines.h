/*
 * lines.h: the text of a trace: how each kind of line is spelled.
 *
 * Owns: the JSON of docs/trace-format.md as written (trace.c reads it), and the text buffer it is collected in.
 * Not: when lines are written, or to which file. Used by the writer thread, and by callers that prepare a line for it.
 */
#ifndef RY_RECORD_LINES_H
#define RY_RECORD_LINES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "record.h"

#define RY_TRACE_SCHEMA "railyard-trace"
#define RY_TRACE_VERSION 1

struct ry_text {
    char *at;
    size_t len, room;
    bool failed; /* out of memory: what follows is lost */
};

void ry_text_add(struct ry_text *text, const char *s, size_t n);
/** Append a JSON object as one line; releases it. NULL (a failed json_pack) counts as out of memory. */
void ry_text_line(struct ry_text *text, json_t *object);

/** A JSON string from any bytes: what is not UTF-8 becomes '?'. `max`: the size of the array it lies in, or SIZE_MAX.
 */
json_t *ry_json_text(const char *s, size_t max);

json_t *ry_line_head(const struct ry_record_config *config, const char *host, int pid);
json_t *ry_line_comm(const struct ry_record_comm_info *info, const char *matrix_file);
json_t *ry_line_map(const char *id, int rank, const struct ry_cluster *map, const char *why);

/**
 * The line of one exchange. `x`'s count arrays have `nranks` elements. `name` is NULL or JSON text with its quotes.
 * Counts are written in full or, where that is shorter, as pairs of peer and count, zeros left out.
 */
void ry_line_exchange(struct ry_text *text, const char *id, int rank, int nranks, const char *name,
                      const struct ry_record_exchange *x);
void ry_line_duration(struct ry_text *text, const char *id, int rank, uint64_t number, double us);
void ry_line_rows(struct ry_text *text, const char *id, int rank, const struct ry_record_rows *rows);

/** Name of an ncclDataType_t ("bfloat16"), or NULL where it is unknown. */
const char *ry_type_text(int type);

#endif
