/* lines.c: see lines.h. What is written once per communicator goes through jansson; once per exchange, by hand. */
#include "lines.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

const char *ry_type_text(int type)
{
    static const char *const names[] = {"int8",    "uint8",   "int32",   "uint32",   "int64",      "uint64",
                                        "float16", "float32", "float64", "bfloat16", "float8e4m3", "float8e5m2"};
    return type >= 0 && type < (int)(sizeof names / sizeof *names) ? names[type] : NULL;
}

static char *room(struct ry_text *t, size_t n)
{
    if (t->failed)
        return NULL;
    if (t->room - t->len < n) {
        size_t want = t->room ? t->room : 4096;
        while (want - t->len < n)
            want *= 2;
        char *p = realloc(t->at, want);
        if (!p) {
            t->failed = true;
            return NULL;
        }
        t->at = p;
        t->room = want;
    }
    return t->at + t->len;
}

void ry_text_add(struct ry_text *text, const char *s, size_t n)
{
    char *p = room(text, n);
    if (p) {
        memcpy(p, s, n);
        text->len += n;
    }
}

static int add_piece(const char *s, size_t n, void *text)
{
    ry_text_add(text, s, n);
    return 0;
}

void ry_text_line(struct ry_text *text, json_t *object)
{
    if (!object || json_dump_callback(object, add_piece, text, JSON_COMPACT))
        text->failed = true;
    json_decref(object);
    ry_text_add(text, "\n", 1);
}

json_t *ry_json_text(const char *s, size_t max)
{
    size_t n = strnlen(s, max);
    json_t *j = json_stringn(s, n);
    if (j)
        return j;
    char *copy = strndup(s, n);
    if (!copy)
        return NULL;
    for (size_t i = 0; i < n; i++)
        if (copy[i] & 0x80)
            copy[i] = '?';
    j = json_string(copy);
    free(copy);
    return j;
}

/* An environment variable that holds a rank or a size, as PyTorch's and MPI's launchers set it; else JSON null. */
static json_t *env_number(const char *name)
{
    const char *s = getenv(name);
    char *end;
    long v = s ? strtol(s, &end, 10) : -1;
    return s && *s && !*end && v >= 0 ? json_integer(v) : json_null();
}

json_t *ry_line_head(const struct ry_record_config *config, const char *host, int pid)
{
    return json_pack("{s:s,s:s,s:i,s:o,s:i,s:I,s:I,s:s,s:i,s:o?,s:o,s:o}", "t", "head", "schema", RY_TRACE_SCHEMA,
                     "version", RY_TRACE_VERSION, "host", ry_json_text(host, SIZE_MAX), "pid", pid, "wall_ns",
                     (json_int_t)ry_wall_ns(), "mono_ns", (json_int_t)ry_now_ns(), "railyard", RAILYARD_VERSION, "nccl",
                     config->nccl_version, "nccl_path",
                     config->nccl_path ? ry_json_text(config->nccl_path, SIZE_MAX) : NULL, "env_rank",
                     env_number("RANK"), "env_world_size", env_number("WORLD_SIZE"));
}

static json_t *seat_object(const struct ry_seat *s)
{
#define TEXT(field) ry_json_text(s->field, sizeof s->field)
    return json_pack("{s:o,s:o,s:o,s:o,s:o,s:o,s:f,s:f,s:o,s:I}", "node", TEXT(node), "host", TEXT(host), "gpu",
                     TEXT(gpu_name), "gpu_pci", TEXT(gpu_pci), "gpu_uuid", TEXT(gpu_uuid), "nic", TEXT(nic),
                     "nvlink_gbs", isfinite(s->nvlink_gbs) ? s->nvlink_gbs : 0.0, "nic_gbs",
                     isfinite(s->nic_gbs) ? s->nic_gbs : 0.0, "railyard", TEXT(railyard), "settings_hash",
                     (json_int_t)s->settings_hash);
#undef TEXT
}

json_t *ry_line_comm(const struct ry_record_comm_info *info, const char *matrix_file)
{
    return json_pack("{s:s,s:o,s:i,s:i,s:o,s:o?,s:s,s:i,s:I,s:o,s:o}", "t", "comm", "comm",
                     ry_json_text(info->id, sizeof info->id), "rank", info->rank, "nranks", info->nranks, "parent",
                     ry_json_text(info->parent, sizeof info->parent), "name",
                     info->name ? ry_json_text(info->name, SIZE_MAX) : NULL, "birth",
                     info->birth ? info->birth : "init", "device", info->device, "wall_ns", (json_int_t)ry_wall_ns(),
                     "matrix", ry_json_text(matrix_file, SIZE_MAX), "seat", seat_object(&info->seat));
}

json_t *ry_line_map(const char *id, int rank, const struct ry_cluster *map, const char *why)
{
    json_t *line = json_pack("{s:s,s:s,s:i}", "t", "map", "comm", id, "rank", rank);
    if (!line)
        return NULL;
    if (!map) {
        json_object_set_new(line, "missing", ry_json_text(why ? why : "not known", SIZE_MAX));
        return line;
    }
    json_t *node = json_array(), *hosts = json_array();
    for (int r = 0; r < map->nranks; r++)
        json_array_append_new(node, json_integer(map->node[r]));
    for (int n = 0; n < map->nnodes; n++) {
        const struct ry_seat *s = &map->seats[map->node_first[n]];
        json_array_append_new(hosts, ry_json_text(s->host, sizeof s->host));
    }
    json_object_set_new(line, "nodes", json_integer(map->nnodes));
    json_object_set_new(line, "node", node);
    json_object_set_new(line, "hosts", hosts);
    return line;
}

static inline char *put_number(char *p, uint64_t v)
{
    char digits[20];
    int n = 0;
    do
        digits[n++] = (char)('0' + v % 10);
    while (v /= 10);
    while (n)
        *p++ = digits[--n];
    return p;
}

#define PUT(p, literal) ((char *)memcpy(p, literal, sizeof literal - 1) + sizeof literal - 1)

static char *put_text(char *p, const char *s)
{
    size_t n = strlen(s);
    memcpy(p, s, n);
    return p + n;
}

/* A zero costs two characters in full, a pair about two for the peer's number and commas: sparse from 3/4 zeros on. */
static char *put_counts(char *p, const char *key, const uint64_t *counts, int nranks)
{
    int used = 0;
    for (int r = 0; r < nranks; r++)
        used += counts[r] != 0;
    bool sparse = used < nranks / 4;
    *p++ = ',';
    *p++ = '"';
    p = put_text(p, key);
    p = sparse ? PUT(p, "_pairs\":[") : PUT(p, "\":[");
    char *first = p;
    for (int r = 0; r < nranks; r++) {
        if (sparse && !counts[r])
            continue;
        if (p != first)
            *p++ = ',';
        if (sparse) {
            p = put_number(p, (uint64_t)r);
            *p++ = ',';
        }
        p = put_number(p, counts[r]);
    }
    *p++ = ']';
    return p;
}

static char *put_start(char *p, const char *t, const char *id, int rank, uint64_t number)
{
    p = PUT(p, "{\"t\":\"");
    p = put_text(p, t);
    p = PUT(p, "\",\"comm\":\"");
    p = put_text(p, id);
    p = PUT(p, "\",\"rank\":");
    p = put_number(p, (uint64_t)rank);
    p = PUT(p, ",\"n\":");
    return put_number(p, number);
}

/* Microseconds with three decimals; by hand, since the job's locale may have a decimal comma. */
static char *put_us(char *p, double us)
{
    uint64_t ns = us > 0 && us < 1e15 ? (uint64_t)(us * 1000 + 0.5) : 0;
    p = put_number(p, ns / 1000);
    *p++ = '.';
    for (uint64_t digit = 100, rest = ns % 1000; digit; digit /= 10)
        *p++ = (char)('0' + rest / digit % 10);
    return p;
}

void ry_line_exchange(struct ry_text *text, const char *id, int rank, int nranks, const char *name,
                      const struct ry_record_exchange *x)
{
    char *p = room(text, 640 + (name ? strlen(name) : 0) + 2 * 21 * (size_t)nranks);
    if (!p)
        return;
    p = put_start(p, "x", id, rank, x->number);
    p = PUT(p, ",\"wall_ns\":");
    p = put_number(p, x->wall_ns);
    const char *type = ry_type_text(x->type);
    p = PUT(p, ",\"type\":\"");
    p = type ? put_text(p, type) : p + sprintf(p, "%d", x->type);
    p = PUT(p, "\",\"type_bytes\":");
    p = put_number(p, x->type_bytes);
    p = put_counts(p, "send", x->send_count, nranks);
    p = put_counts(p, "recv", x->recv_count, nranks);
    if (x->row_elems) {
        p = PUT(p, ",\"row\":");
        p = put_number(p, x->row_elems);
        p = PUT(p, ",\"row_by\":\"");
        p = put_text(p, x->row_source ? x->row_source : "set");
        *p++ = '"';
    }
    if (x->direction) {
        p = PUT(p, ",\"way\":\"");
        p = put_text(p, x->direction);
        *p++ = '"';
    }
    if (x->gather_count) {
        p = PUT(p, ",\"gather_comm\":\"");
        p = put_text(p, x->gather_comm);
        p = PUT(p, "\",\"gather_count\":");
        p = put_number(p, x->gather_count);
    }
    if (x->one_call)
        p = PUT(p, ",\"one_call\":true");
    if (x->captured)
        p = PUT(p, ",\"captured\":true");
    if (x->strategy) {
        p = PUT(p, ",\"strategy\":\"");
        p = put_text(p, x->strategy);
        p = PUT(p, "\",\"waited_us\":");
        p = put_us(p, x->waited_us);
        p = PUT(p, ",\"late_us\":");
        p = put_us(p, x->late_us);
        if (x->plain_us > 0) {
            p = PUT(p, ",\"plain_us\":");
            p = put_us(p, x->plain_us);
        }
        if (x->verify)
            p = PUT(p, ",\"verify\":true");
    }
    if (name) {
        p = PUT(p, ",\"name\":");
        p = put_text(p, name);
    }
    *p++ = '}';
    *p++ = '\n';
    text->len = (size_t)(p - text->at);
}

void ry_line_duration(struct ry_text *text, const char *id, int rank, uint64_t number, double us)
{
    char *p = room(text, 512);
    if (!p)
        return;
    p = put_start(p, "us", id, rank, number);
    p = PUT(p, ",\"us\":");
    p = put_us(p, us);
    p = PUT(p, "}\n");
    text->len = (size_t)(p - text->at);
}

void ry_line_rows(struct ry_text *text, const char *id, int rank, const struct ry_record_rows *rows)
{
    char *p = room(text, 640);
    if (!p)
        return;
    p = put_start(p, "rows", id, rank, rows->number);
    p = PUT(p, ",\"way\":\"");
    p = put_text(p, rows->direction);
    p = PUT(p, "\",\"row_bytes\":");
    p = put_number(p, rows->row_bytes);
    p = PUT(p, ",\"rows\":");
    p = put_number(p, rows->rows);
    p = PUT(p, ",\"distinct\":");
    p = put_number(p, rows->distinct);
    p = PUT(p, ",\"zero\":");
    p = put_number(p, rows->zero);
    p = PUT(p, ",\"cross\":");
    p = put_number(p, rows->cross);
    p = PUT(p, ",\"packed\":");
    p = put_number(p, rows->packed);
    if (rows->strategy) {
        p = PUT(p, ",\"strategy\":\"");
        p = put_text(p, rows->strategy);
        *p++ = '"';
    }
    p = PUT(p, "}\n");
    text->len = (size_t)(p - text->at);
}
