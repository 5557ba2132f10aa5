/* log.c: see log.h. */
#include "log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static _Atomic int log_level = RY_LOG_WARN;

void ry_log_set_level(enum ry_log_level level)
{
    atomic_store_explicit(&log_level, (int)level, memory_order_relaxed);
}

bool ry_log_enabled(enum ry_log_level level)
{
    return (int)level <= atomic_load_explicit(&log_level, memory_order_relaxed);
}

void ry_log(enum ry_log_level level, const char *fmt, ...)
{
    static const char *const names[] = {"error", "warning", "info", "plan", "debug"};
    if (!ry_log_enabled(level))
        return;
    int saved = errno;
    char host[64] = "?", line[1024];
    gethostname(host, sizeof host - 1);
    int n = snprintf(line, sizeof line, "railyard[%s:%d] %s: ", host, (int)getpid(), names[level]);
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof line - (size_t)n, fmt, ap);
    va_end(ap);
    size_t len = (size_t)n + (m > 0 ? (size_t)m : 0);
    if (len > sizeof line - 2)
        len = sizeof line - 2;
    line[len++] = '\n';
    ssize_t done = write(STDERR_FILENO, line, len);
    (void)done; /* nowhere left to complain */
    errno = saved;
}
