/* settings.c: see settings.h. Everything is made from the one table in settings.def. */
#include "settings.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static bool parse_bool(const char *s, bool *out)
{
    static const char *const yes[] = {"1", "yes", "on", "true"}, *const no[] = {"0", "no", "off", "false"};
    for (size_t i = 0; i < 4; i++) {
        if (!strcasecmp(s, yes[i]))
            return *out = true, true;
        if (!strcasecmp(s, no[i]))
            return *out = false, true;
    }
    return false;
}

static bool parse_count(const char *s, uint64_t *out)
{
    char *end;
    if (*s < '0' || *s > '9') /* strtoull would take a sign or blanks */
        return false;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 10);
    if (errno || *end)
        return false;
    return *out = v, true;
}

static bool parse_size(const char *s, uint64_t *out)
{
    char *end;
    if (*s < '0' || *s > '9')
        return false;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 10);
    if (errno)
        return false;
    unsigned shift = 0;
    if (*end) {
        static const char units[] = "KMGT";
        const char *u = strchr(units, *end & ~0x20);
        if (!u || (end[1] && strcasecmp(end + 1, "B") && strcasecmp(end + 1, "iB")))
            return false;
        shift = 10 * (unsigned)(u - units + 1);
    }
    if (v > UINT64_MAX >> shift)
        return false;
    return *out = (uint64_t)v << shift, true;
}

static bool parse_seconds(const char *s, double *out)
{
    char *end;
    double v = strtod(s, &end);
    if (end == s || (*end && strcasecmp(end, "s")) || !isfinite(v) || v < 0)
        return false;
    return *out = v, true;
}

static bool parse_text(const char *s, const char **out)
{
    return *out = s, true;
}

static bool parse_level(const char *s, enum ry_log_level *out)
{
    static const char *const names[] = {"error", "warn", "info", "plan", "debug"};
    for (int i = 0; i <= RY_LOG_DEBUG; i++)
        if (!strcasecmp(s, names[i]))
            return *out = (enum ry_log_level)i, true;
    return false;
}

static const char *const placements[] = {"off", "watch", "batch", "layer"};

static bool parse_placement(const char *s, enum ry_placement *out)
{
    for (int i = 0; i <= RY_PLACEMENT_LAYER; i++)
        if (!strcasecmp(s, placements[i]))
            return *out = (enum ry_placement)i, true;
    return false;
}

static void show_bool(bool v, char *buf, size_t n)
{
    snprintf(buf, n, "%d", v);
}
static void show_count(uint64_t v, char *buf, size_t n)
{
    snprintf(buf, n, "%" PRIu64, v);
}
static void show_size(uint64_t v, char *buf, size_t n)
{
    static const char *const units[] = {"", "K", "M", "G", "T"};
    int u = 0;
    while (v && !(v & 1023) && u < 4)
        v >>= 10, u++;
    snprintf(buf, n, "%" PRIu64 "%s", v, units[u]);
}
static void show_seconds(double v, char *buf, size_t n)
{
    snprintf(buf, n, "%g", v);
}
static void show_text(const char *v, char *buf, size_t n)
{
    snprintf(buf, n, "%s", v);
}
static void show_level(enum ry_log_level v, char *buf, size_t n)
{
    static const char *const names[] = {"error", "warn", "info", "plan", "debug"};
    snprintf(buf, n, "%s", names[v]);
}

static void show_placement(enum ry_placement v, char *buf, size_t n)
{
    snprintf(buf, n, "%s", placements[v]);
}

/* What each type accepts, for the message about a malformed value. */
#define EXPECT_bool "0 or 1"
#define EXPECT_count "a whole number"
#define EXPECT_size "bytes, such as 4096 or 64M"
#define EXPECT_seconds "seconds, such as 10 or 0.5"
#define EXPECT_text "text"
#define EXPECT_level "error, warn, info, plan or debug"
#define EXPECT_placement "off, watch, batch or layer"

static void add_problem(char *problems, size_t size, int *n, const char *text)
{
    size_t used = strlen(problems);
    if (used + 1 < size)
        snprintf(problems + used, size - used, "%s%s", *n ? "; " : "", text);
    ++*n;
}

/* Levenshtein distance, for "did you mean"; names are short, so two rows on the stack do. */
static size_t distance(const char *a, size_t na, const char *b)
{
    size_t nb = strlen(b), row[2][64];
    if (nb >= 64)
        return nb;
    for (size_t j = 0; j <= nb; j++)
        row[0][j] = j;
    for (size_t i = 1; i <= na; i++) {
        size_t *prev = row[(i - 1) & 1], *cur = row[i & 1];
        cur[0] = i;
        for (size_t j = 1; j <= nb; j++) {
            size_t best = prev[j - 1] + (a[i - 1] != b[j - 1]);
            if (prev[j] + 1 < best)
                best = prev[j] + 1;
            if (cur[j - 1] + 1 < best)
                best = cur[j - 1] + 1;
            cur[j] = best;
        }
    }
    return row[na & 1][nb];
}

static const char *nearest_name(const char *name, size_t len)
{
    const char *best = NULL;
    size_t least = 6; /* further than this is no misspelling */
#define RY_SETTING(field, env_name, type, def, help)                                                                   \
    if (distance(name, len, env_name) < least)                                                                         \
        least = distance(name, len, env_name), best = env_name;
#include "settings.def"
#undef RY_SETTING
    return best;
}

static bool name_is(const char *var, size_t len, const char *name)
{
    return strlen(name) == len && !memcmp(var, name, len);
}

int ry_settings_parse(struct ry_settings *out, char *const *env, char *problems, size_t size)
{
    int n = 0;
    if (size)
        problems[0] = 0;
#define RY_SETTING(field, name, type, def, help)                                                                       \
    if (!parse_##type(def, &out->field))                                                                               \
        abort(); /* a default in the table that its own type refuses: settings' unit test runs this */
#include "settings.def"
#undef RY_SETTING
    for (char *const *e = env; e && *e; e++) {
        const char *eq = strchr(*e, '=');
        if (!eq || strncmp(*e, "RAILYARD_", 9))
            continue;
        size_t len = (size_t)(eq - *e);
        const char *value = eq + 1;
        char text[256];
#define RY_SETTING(field, name, type, def, help)                                                                       \
    if (name_is(*e, len, name)) {                                                                                      \
        ry_type_##type v;                                                                                              \
        if (parse_##type(value, &v)) {                                                                                 \
            out->field = v;                                                                                            \
        } else {                                                                                                       \
            snprintf(text, sizeof text, name "='%s' is not %s: using %s", value, EXPECT_##type, *def ? def : "none");  \
            add_problem(problems, size, &n, text);                                                                     \
        }                                                                                                              \
        continue;                                                                                                      \
    }
#include "settings.def"
#undef RY_SETTING
        const char *near = nearest_name(*e, len);
        snprintf(text, sizeof text, "unknown %.*s%s%s%s", (int)len, *e, near ? " (did you mean " : "", near ? near : "",
                 near ? "?)" : "");
        add_problem(problems, size, &n, text);
    }
    return n;
}

int ry_settings_get(const char *name, char *const *env, char *out, size_t size, struct ry_err *err)
{
    const char *value = NULL;
    size_t len = strlen(name);
    for (char *const *e = env; e && *e && !value; e++)
        if (!strncmp(*e, name, len) && (*e)[len] == '=')
            value = *e + len + 1;
    char now[4096]; /* longer than any path can be */
#define RY_SETTING(field, env_name, type, def, help)                                                                   \
    if (!strcmp(name, env_name)) {                                                                                     \
        ry_type_##type v;                                                                                              \
        if (!parse_##type(value ? value : def, &v))                                                                    \
            return ry_fail(err, env_name "='%s' is not %s", value ? value : def, EXPECT_##type);                       \
        show_##type(v, now, sizeof now);                                                                               \
        if (strlen(now) >= size || (value && strlen(value) >= sizeof now))                                             \
            return ry_fail(err, env_name " is longer than %zu bytes", size < sizeof now ? size : sizeof now);          \
        memcpy(out, now, strlen(now) + 1);                                                                             \
        return (int)strlen(now);                                                                                       \
    }
#include "settings.def"
#undef RY_SETTING
    return ry_fail(err, "there is no setting %s", name);
}

void ry_settings_print(const struct ry_settings *s, FILE *f, bool markdown)
{
    char now[256];
    if (markdown)
        fprintf(f, "| setting | type | default | what it does |\n|---|---|---|---|\n");
#define RY_SETTING(field, name, type, def, help)                                                                       \
    show_##type(s->field, now, sizeof now);                                                                            \
    if (markdown)                                                                                                      \
        fprintf(f, "| `%s` | %s | %s | %s |\n", name, #type, *def ? "`" def "`" : "", help);                           \
    else                                                                                                               \
        fprintf(f, "%-22s %-8s default %-6s now %-10s %s\n", name, #type, *def ? def : "-", *now ? now : "-", help);
#include "settings.def"
#undef RY_SETTING
}
