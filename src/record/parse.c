/* parse.c: see parse.h. The scanner works on the NUL-terminated line of getline(3): no comparison runs past its end. */
#include "parse.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *blanks(const char *p)
{
    while (*p == ' ' || *p == '\t')
        p++;
    return p;
}

bool ry_parse_is_frequent(const char *line, size_t n)
{
    const char *p = blanks(line);
    if (*p != '{' || strncmp(p = blanks(p + 1), "\"t\"", 3) || *(p = blanks(p + 3)) != ':')
        return false;
    p = blanks(p + 1);
    return !strncmp(p, "\"x\"", 3) || !strncmp(p, "\"us\"", 4) || !strncmp(p, "\"rows\"", 6);
}

void ry_parsed_free(struct ry_parsed *x)
{
    free(x->send); /* one block with recv */
    x->send = x->recv = NULL;
    x->room = 0;
}

static bool make_room(struct ry_parsed *x, int nranks)
{
    if (nranks > x->room) {
        uint64_t *p = realloc(x->send, 2 * (size_t)nranks * sizeof *p);
        if (!p)
            return false;
        x->send = p;
        x->room = nranks;
    }
    x->recv = x->send + nranks;
    return true;
}

static void clear(struct ry_parsed *x)
{
    x->number = x->wall_ns = x->type_bytes = x->row = x->gather_count = 0;
    x->type[0] = x->row_by[0] = x->gather_comm[0] = x->strategy[0] = 0;
    x->one_call = x->captured = x->verify = false;
    x->us = x->waited_us = x->late_us = x->plain_us = 0;
    x->way[0] = 0;
    x->row_bytes = x->rows = x->distinct = x->zero = x->cross = x->packed = 0;
}

/* Counts times bytes must fit; then everything that is computed from one line does. */
static bool sane(const struct ry_parsed *x, int nranks)
{
    uint64_t top = x->row;
    for (int i = 0; i < nranks; i++) {
        top = x->send[i] > top ? x->send[i] : top;
        top = x->recv[i] > top ? x->recv[i] : top;
    }
    uint64_t product;
    return x->type_bytes && x->number < UINT64_MAX && !__builtin_mul_overflow(top, x->type_bytes, &product);
}

/* ---- scanning the writer's own spelling ---- */

#define EAT(p, literal) (!strncmp(p, literal, sizeof literal - 1) && (p += sizeof literal - 1, true))

static bool eat_number(const char **p, uint64_t *out)
{
    const char *s = *p;
    uint64_t v = 0;
    for (; *s >= '0' && *s <= '9'; s++)
        v = v * 10 + (uint64_t)(*s - '0');
    if (s == *p || s - *p > 18)
        return false; /* none, or so many digits that jansson should look at it */
    *p = s;
    *out = v;
    return true;
}

/* A string without escapes, up to its closing quote. */
static bool eat_text(const char **p, char *out, size_t size)
{
    const char *s = *p;
    size_t n = 0;
    for (; *s && *s != '"'; s++) {
        if (*s == '\\' || n + 1 == size)
            return false;
        out[n++] = *s;
    }
    if (!*s)
        return false;
    out[n] = 0;
    *p = s + 1;
    return true;
}

static bool eat_counts(const char **at, uint64_t *counts, int nranks)
{
    const char *p = *at;
    if (EAT(p, "\":[")) {
        for (int i = 0; i < nranks; i++)
            if ((i && *p++ != ',') || !eat_number(&p, &counts[i]))
                return false;
    } else if (EAT(p, "_pairs\":[")) {
        memset(counts, 0, (size_t)nranks * sizeof *counts);
        for (bool first = true; *p != ']'; first = false) {
            uint64_t peer;
            if ((!first && *p++ != ',') || !eat_number(&p, &peer) || peer >= (uint64_t)nranks || *p++ != ',' ||
                !eat_number(&p, &counts[peer]))
                return false;
        }
    } else {
        return false;
    }
    if (*p != ']')
        return false;
    *at = p + 1;
    return true;
}

/* Microseconds as the writer spells them: three decimals. */
static bool eat_us(const char **at, double *us)
{
    const char *p = *at;
    uint64_t whole, part;
    if (!eat_number(&p, &whole) || *p++ != '.')
        return false;
    const char *from = p;
    if (!eat_number(&p, &part) || p - from != 3)
        return false;
    *us = (double)whole + (double)part / 1000;
    *at = p;
    return true;
}

static bool eat_exchange(struct ry_parsed *x, const char **at, int nranks)
{
    const char *p = *at;
    if (!EAT(p, ",\"wall_ns\":"))
        return false;
    uint64_t wall = 0; /* 19 digits */
    for (; *p >= '0' && *p <= '9' && wall < UINT64_MAX / 10 - 9; p++)
        wall = wall * 10 + (uint64_t)(*p - '0');
    x->wall_ns = wall;
    if (!EAT(p, ",\"type\":\"") || !eat_text(&p, x->type, sizeof x->type) || !EAT(p, ",\"type_bytes\":") ||
        !eat_number(&p, &x->type_bytes) || !EAT(p, ",\"send") || !eat_counts(&p, x->send, nranks) ||
        !EAT(p, ",\"recv") || !eat_counts(&p, x->recv, nranks))
        return false;
    if (EAT(p, ",\"row\":") &&
        (!eat_number(&p, &x->row) || !EAT(p, ",\"row_by\":\"") || !eat_text(&p, x->row_by, sizeof x->row_by)))
        return false;
    if (EAT(p, ",\"way\":\"") && !eat_text(&p, x->way, sizeof x->way))
        return false;
    if (EAT(p, ",\"gather_comm\":\"") && (!eat_text(&p, x->gather_comm, sizeof x->gather_comm) ||
                                          !EAT(p, ",\"gather_count\":") || !eat_number(&p, &x->gather_count)))
        return false;
    x->one_call = EAT(p, ",\"one_call\":true");
    x->captured = EAT(p, ",\"captured\":true");
    if (EAT(p, ",\"strategy\":\"") &&
        (!eat_text(&p, x->strategy, sizeof x->strategy) || !EAT(p, ",\"waited_us\":") || !eat_us(&p, &x->waited_us) ||
         !EAT(p, ",\"late_us\":") || !eat_us(&p, &x->late_us)))
        return false;
    if (EAT(p, ",\"plain_us\":") && !eat_us(&p, &x->plain_us))
        return false;
    x->verify = EAT(p, ",\"verify\":true");
    if (EAT(p, ",\"name\":\"")) {
        while (*p && *p != '"')
            p += *p == '\\' && p[1] ? 2 : 1;
        if (*p++ != '"')
            return false;
    }
    *at = p;
    return true;
}

static bool eat_rows(struct ry_parsed *x, const char **at)
{
    const char *p = *at;
    if (!EAT(p, ",\"way\":\"") || !eat_text(&p, x->way, sizeof x->way) || !EAT(p, ",\"row_bytes\":") ||
        !eat_number(&p, &x->row_bytes) || !EAT(p, ",\"rows\":") || !eat_number(&p, &x->rows) ||
        !EAT(p, ",\"distinct\":") || !eat_number(&p, &x->distinct) || !EAT(p, ",\"zero\":") ||
        !eat_number(&p, &x->zero) || !EAT(p, ",\"cross\":") || !eat_number(&p, &x->cross) ||
        !EAT(p, ",\"packed\":") || !eat_number(&p, &x->packed) ||
        (EAT(p, ",\"strategy\":\"") && !eat_text(&p, x->strategy, sizeof x->strategy)))
        return false;
    *at = p;
    return true;
}

/* BAD: not the writer's spelling, or damaged: jansson shall tell. */
static enum ry_parsed_kind scan(struct ry_parsed *x, const char *p, const char *end,
                                int (*pick)(void *ctx, const char *id, uint64_t rank), void *ctx)
{
    char id[17];
    uint64_t rank;
    enum ry_parsed_kind kind = EAT(p, "{\"t\":\"x\"")      ? RY_PARSED_EXCHANGE
                               : EAT(p, "{\"t\":\"us\"")   ? RY_PARSED_DURATION
                               : EAT(p, "{\"t\":\"rows\"") ? RY_PARSED_ROWS
                                                           : RY_PARSED_BAD;
    if (kind == RY_PARSED_BAD || !EAT(p, ",\"comm\":\"") || !eat_text(&p, id, sizeof id) || !EAT(p, ",\"rank\":") ||
        !eat_number(&p, &rank) || !EAT(p, ",\"n\":") || !eat_number(&p, &x->number))
        return RY_PARSED_BAD;
    int nranks = pick(ctx, id, rank);
    if (!nranks)
        return RY_PARSED_ORPHAN;
    if (kind == RY_PARSED_EXCHANGE ? !make_room(x, nranks) || !eat_exchange(x, &p, nranks)
        : kind == RY_PARSED_ROWS   ? !eat_rows(x, &p)
                                   : !EAT(p, ",\"us\":") || !eat_us(&p, &x->us))
        return RY_PARSED_BAD;
    if (*p++ != '}' || p != end || (kind == RY_PARSED_EXCHANGE && !sane(x, nranks)))
        return RY_PARSED_BAD;
    return kind;
}

/* ---- any spelling ---- */

static bool get(const json_t *o, const char *key, bool must, uint64_t *out)
{
    const json_t *v = json_object_get(o, key);
    if (!v)
        return !must;
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return false;
    *out = (uint64_t)json_integer_value(v);
    return true;
}

static bool get_us(const json_t *o, const char *key, bool must, double *out)
{
    const json_t *v = json_object_get(o, key);
    *out = json_number_value(v);
    return v ? json_is_number(v) && *out >= 0 && isfinite(*out) : !must;
}

static void get_text(const json_t *o, const char *key, char *out, size_t size)
{
    const char *s = json_string_value(json_object_get(o, key));
    snprintf(out, size, "%s", s ? s : "");
}

static bool get_counts(const json_t *o, const char *key, uint64_t *counts, int nranks)
{
    char pairs_key[16];
    const json_t *list = json_object_get(o, key), *v;
    snprintf(pairs_key, sizeof pairs_key, "%s_pairs", key);
    const json_t *pairs = json_object_get(o, pairs_key);
    size_t i;
    if (json_is_array(list) && json_array_size(list) == (size_t)nranks) {
        json_array_foreach(list, i, v)
        {
            if (!json_is_integer(v) || json_integer_value(v) < 0)
                return false;
            counts[i] = (uint64_t)json_integer_value(v);
        }
        return true;
    }
    if (!json_is_array(pairs) || json_array_size(pairs) % 2)
        return false;
    memset(counts, 0, (size_t)nranks * sizeof *counts);
    for (i = 0; i < json_array_size(pairs); i += 2) {
        const json_t *peer = json_array_get(pairs, i), *count = json_array_get(pairs, i + 1);
        if (!json_is_integer(peer) || !json_is_integer(count) || json_integer_value(peer) < 0 ||
            json_integer_value(peer) >= nranks || json_integer_value(count) < 0)
            return false;
        counts[json_integer_value(peer)] = (uint64_t)json_integer_value(count);
    }
    return true;
}

static enum ry_parsed_kind load(struct ry_parsed *x, const json_t *o,
                                int (*pick)(void *ctx, const char *id, uint64_t rank), void *ctx)
{
    const char *t = json_string_value(json_object_get(o, "t")), *id = json_string_value(json_object_get(o, "comm"));
    uint64_t rank;
    if (!t || !id || strlen(id) > 16 || !get(o, "rank", true, &rank) || !get(o, "n", true, &x->number))
        return RY_PARSED_BAD;
    int nranks = pick(ctx, id, rank);
    if (!nranks)
        return RY_PARSED_ORPHAN;
    if (!strcmp(t, "us")) {
        return get_us(o, "us", true, &x->us) ? RY_PARSED_DURATION : RY_PARSED_BAD;
    }
    get_text(o, "way", x->way, sizeof x->way);
    get_text(o, "strategy", x->strategy, sizeof x->strategy);
    if (!strcmp(t, "rows"))
        return get(o, "row_bytes", true, &x->row_bytes) && get(o, "rows", true, &x->rows) &&
                       get(o, "distinct", true, &x->distinct) && get(o, "zero", true, &x->zero) &&
                       get(o, "cross", true, &x->cross) && get(o, "packed", true, &x->packed)
                   ? RY_PARSED_ROWS
                   : RY_PARSED_BAD;
    if (strcmp(t, "x") || !make_room(x, nranks) || !get(o, "wall_ns", false, &x->wall_ns) ||
        !get(o, "type_bytes", true, &x->type_bytes) || !get_counts(o, "send", x->send, nranks) ||
        !get_counts(o, "recv", x->recv, nranks) || !get(o, "row", false, &x->row) ||
        !get(o, "gather_count", false, &x->gather_count) || !get_us(o, "waited_us", false, &x->waited_us) ||
        !get_us(o, "late_us", false, &x->late_us) || !get_us(o, "plain_us", false, &x->plain_us) || !sane(x, nranks))
        return RY_PARSED_BAD;
    get_text(o, "type", x->type, sizeof x->type);
    get_text(o, "row_by", x->row_by, sizeof x->row_by);
    get_text(o, "gather_comm", x->gather_comm, sizeof x->gather_comm);
    x->one_call = json_is_true(json_object_get(o, "one_call"));
    x->captured = json_is_true(json_object_get(o, "captured"));
    x->verify = json_is_true(json_object_get(o, "verify"));
    return RY_PARSED_EXCHANGE;
}

enum ry_parsed_kind ry_parse_frequent(struct ry_parsed *x, const char *line, size_t n,
                                      int (*pick)(void *ctx, const char *id, uint64_t rank), void *ctx)
{
    clear(x);
    enum ry_parsed_kind kind = scan(x, line, line + n, pick, ctx);
    if (kind != RY_PARSED_BAD)
        return kind;
    clear(x);
    json_t *o = json_loadb(line, n, JSON_REJECT_DUPLICATES, NULL);
    kind = json_is_object(o) ? load(x, o, pick, ctx) : RY_PARSED_BAD;
    json_decref(o);
    return kind;
}
