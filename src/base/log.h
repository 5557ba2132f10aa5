/*
 * log.h: the lines Railyard prints on stderr.
 *
 * Owns: the format "railyard[HOST:PID] LEVEL: text" and the level set by RAILYARD_LOG (error < warn < info < plan < debug).
 * Not: the texts of errors (error.h), nor what is recorded (record/).
 *
 * A job is not ours to spam: at the default level (warn) a healthy run prints nothing; "plan" tells of every exchange how it is carried out and why. Every function is thread-safe
 * and writes its line with one write(2), so that the lines of many ranks do not mix. errno is kept.
 */
#ifndef RY_BASE_LOG_H
#define RY_BASE_LOG_H

#include <stdbool.h>

enum ry_log_level { RY_LOG_ERROR, RY_LOG_WARN, RY_LOG_INFO, RY_LOG_PLAN, RY_LOG_DEBUG };

void ry_log_set_level(enum ry_log_level level);
bool ry_log_enabled(enum ry_log_level level);

/** Print one line if `level` is enabled. */
void ry_log(enum ry_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define ry_warn(...) ry_log(RY_LOG_WARN, __VA_ARGS__)
#define ry_info(...) ry_log(RY_LOG_INFO, __VA_ARGS__)
#define ry_debug(...) ry_log(RY_LOG_DEBUG, __VA_ARGS__)

/** Warn the first time this place is reached in the process, whatever the thread, and never again. */
#define ry_warn_once(...)                                                                                              \
    do {                                                                                                               \
        static _Atomic bool ry_warned_;                                                                                \
        if (!atomic_exchange(&ry_warned_, true))                                                                       \
            ry_warn(__VA_ARGS__);                                                                                      \
    } while (0)

#endif
