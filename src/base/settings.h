/*
 * settings.h: Railyard's settings, read from RAILYARD_* environment variables.
 *
 * Owns: names, types, defaults and help (settings.def), parsing, and telling unknown or malformed variables.
 * Not: what a setting does.
 *
 * Parsing never fails: a malformed value keeps its default and is named in the problems text, an unknown RAILYARD_*
 * name likewise with the nearest known one. Thread-safety: settings are parsed once, before threads, and read-only then.
 */
#ifndef RY_BASE_SETTINGS_H
#define RY_BASE_SETTINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "error.h"
#include "log.h"

typedef bool ry_type_bool;
typedef uint64_t ry_type_count;
typedef uint64_t ry_type_size;
typedef double ry_type_seconds;
typedef const char *ry_type_text; /* points into the environment given to ry_settings_parse, or at the default */
typedef enum ry_log_level ry_type_level;
typedef enum ry_placement { RY_PLACEMENT_OFF, RY_PLACEMENT_WATCH, RY_PLACEMENT_BATCH, RY_PLACEMENT_LAYER } ry_type_placement;

struct ry_settings {
#define RY_SETTING(field, name, type, def, help) ry_type_##type field;
#include "settings.def"
#undef RY_SETTING
};

/**
 * Parse `env` (NULL-terminated NAME=VALUE strings, as environ) into `out`.
 * Problems are joined by "; " into `problems` (cut at `size`), which is "" when there are none.
 * Returns the number of problems.
 */
int ry_settings_parse(struct ry_settings *out, char *const *env, char *problems, size_t size);

/** One setting, by its RAILYARD_ name, as text into out[size]: its value in `env`, else its default. Returns the text's
 * length; -1 with `err` where there is no such setting, `env` has a malformed value, or the text does not fit. */
int ry_settings_get(const char *name, char *const *env, char *out, size_t size, struct ry_err *err);

/** Print the table (name, type, default, value in force, help) of `s` to `f`: as aligned text, or as Markdown rows. */
void ry_settings_print(const struct ry_settings *s, FILE *f, bool markdown);

#endif
