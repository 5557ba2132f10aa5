/* cost_file.c: see cost_file.h. */
#include "cost_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#define FORMAT "railyard cost"
#define VERSION 1

/* ---- fingerprint ---- */

/* Ranks of a node, and nodes, are added up, so that their order does not matter. */
uint64_t ry_cluster_fingerprint(const struct ry_cluster *cluster)
{
    uint64_t sum = 0;
    for (int n = 0; n < cluster->nnodes; n++) {
        struct {
            uint64_t size, ranks;
        } node = {(uint64_t)cluster->node_size[n], 0};
        for (int r = cluster->node_first[n]; r < cluster->nranks; r++) {
            if (cluster->node[r] != n)
                continue;
            const struct ry_seat *s = &cluster->seats[r];
            char text[256];
            /* Speeds to 1 %: a driver that says 26.562 today may say 26.56 tomorrow. */
            snprintf(text, sizeof text, "%.64s|%.64s|%.3g|%.3g", s->gpu_name, s->nic, s->nvlink_gbs, s->nic_gbs);
            node.ranks += XXH64(text, strlen(text), 1);
        }
        sum += XXH64(&node, sizeof node, 2);
    }
    return XXH64(&sum, sizeof sum, (uint64_t)cluster->nnodes);
}

int ry_cost_path(uint64_t fingerprint, char *out, size_t size, struct ry_err *err)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n;
    if (cache && *cache == '/') /* others are to be ignored, the specification says */
        n = snprintf(out, size, "%s/railyard/cost-%016" PRIx64 ".json", cache, fingerprint);
    else if (home && *home == '/')
        n = snprintf(out, size, "%s/.cache/railyard/cost-%016" PRIx64 ".json", home, fingerprint);
    else
        return ry_fail(err, "no folder for measured costs: set XDG_CACHE_HOME or HOME to an absolute path");
    if (n < 0 || (size_t)n >= size)
        return ry_fail(err, "XDG_CACHE_HOME or HOME is too long a path");
    return 0;
}

/* ---- fields: one list for reading and writing ---- */

struct field {
    const char *object, *name; /* object NULL: top level */
    size_t at;
    double least; /* what is smaller is damage */
};
#define LINK(which, label)                                                                                             \
    {label, "alpha_us", offsetof(struct ry_cost_model, link[which].alpha_us), 0},                                      \
        {label, "bytes_per_us", offsetof(struct ry_cost_model, link[which].bytes_per_us), 1e-3},                       \
    {                                                                                                                  \
        label, "message_us", offsetof(struct ry_cost_model, link[which].message_us), 0                                 \
    }
#define MOST 1e12
#define UCX "ucx" /* the NIC by way of UCX */

static const struct field fields[] = {
    LINK(RY_LINK_SELF, "self"),
    LINK(RY_LINK_LOCAL, "local"),
    LINK(RY_LINK_NIC, "nic"),
    LINK(RY_LINK_NODE, "node"),
    {"nic", "rank_bytes_per_us", offsetof(struct ry_cost_model, nic_rank_bytes_per_us), 1e-3},
    {UCX, "alpha_us", offsetof(struct ry_cost_model, ucx.alpha_us), 0},
    {UCX, "bytes_per_us", offsetof(struct ry_cost_model, ucx.bytes_per_us), 1e-3},
    {UCX, "message_us", offsetof(struct ry_cost_model, ucx.message_us), 0},
    {UCX, "rank_bytes_per_us", offsetof(struct ry_cost_model, ucx_rank_bytes_per_us), 1e-3},
    {"copy", "each_us", offsetof(struct ry_cost_model, copy_us), 0},
    {"copy", "bytes_per_us", offsetof(struct ry_cost_model, copy_bytes_per_us), 1e-3},
    {NULL, "group_us", offsetof(struct ry_cost_model, group_us), 0},
    {NULL, "agreement_us", offsetof(struct ry_cost_model, agreement_us), 0},
    {NULL, "plan_us_per_rank", offsetof(struct ry_cost_model, plan_us_per_rank), 0},
};
#define NFIELDS (sizeof fields / sizeof *fields)

static double *value_of(struct ry_cost_model *m, const struct field *f)
{
    return (double *)((char *)m + f->at);
}

/* ---- reading ---- */

/* `fingerprint` NULL: any cluster's. */
static int from_json(struct ry_cost_model *m, const json_t *root, const uint64_t *fingerprint, const char *path,
                     struct ry_err *err)
{
    char mine[17];
    const char *format = json_string_value(json_object_get(root, "format"));
    const char *print = json_string_value(json_object_get(root, "fingerprint"));
    if (!format || strcmp(format, FORMAT) || json_integer_value(json_object_get(root, "version")) != VERSION)
        return ry_fail(err,
                       "%s: its format and version are not \"" FORMAT "\", %d: delete it and run railyard calibrate",
                       path, VERSION);
    snprintf(mine, sizeof mine, "%016" PRIx64, fingerprint ? *fingerprint : 0);
    if (fingerprint && (!print || strcmp(print, mine)))
        return ry_fail(
            err, "%s: fingerprint is %.32s, not %s: it was renamed or damaged; delete it and run railyard calibrate",
            path, print ? print : "missing", mine);
    *m = (struct ry_cost_model){.measured = true};
    const char *node = ry_link_name(RY_LINK_NODE);
    bool has_node = json_object_get(root, node) != NULL; /* files of Railyard before it knew of such links have none */
    bool has_ucx = json_object_get(root, UCX) != NULL;   /* nor where UCX was not measured */
    for (size_t i = 0; i < NFIELDS; i++) {
        const struct field *f = &fields[i];
        if (f->object && ((!has_node && !strcmp(f->object, node)) || (!has_ucx && !strcmp(f->object, UCX))))
            continue;
        const json_t *o = f->object ? json_object_get(root, f->object) : root, *v = json_object_get(o, f->name);
        double x = json_number_value(v);
        if (!json_is_number(v) || !isfinite(x) || x < f->least || x > MOST)
            return ry_fail(
                err, "%s: %s%s%s is missing or not a number from %g to %g: delete the file and run railyard calibrate",
                path, f->object ? f->object : "", f->object ? "." : "", f->name, f->least, MOST);
        *value_of(m, f) = x;
    }
    for (int l = 0; l < RY_LINKS; l++)
        m->link[l].measured =
            json_is_true(json_object_get(json_object_get(root, ry_link_name((enum ry_link)l)), "measured"));
    m->ucx.measured = json_is_true(json_object_get(json_object_get(root, UCX), "measured"));
    if (!has_ucx) {
        m->ucx = m->link[RY_LINK_NIC];
        m->ucx.measured = false;
        m->ucx_rank_bytes_per_us = m->nic_rank_bytes_per_us;
    }
    if (!has_node) {
        m->link[RY_LINK_NODE] = m->link[RY_LINK_LOCAL];
        m->link[RY_LINK_NODE].measured = false;
    }
    return 0;
}

/* 1: there is no such file. */
static int load(struct ry_cost_model *model, const char *path, const uint64_t *fingerprint, struct ry_err *err)
{
    json_error_t why;
    struct ry_cost_model m;
    FILE *f = fopen(path, "re");
    if (!f && (errno == ENOENT || errno == ENOTDIR))
        return 1;
    if (!f)
        return ry_fail(err, "cannot read %s: %s", path, strerror(errno));
    json_t *root = json_loadf(f, JSON_REJECT_DUPLICATES, &why);
    fclose(f);
    if (!root)
        return ry_fail(err, "%s: line %d: %s: delete it and run railyard calibrate", path, why.line, why.text);
    int bad = from_json(&m, root, fingerprint, path, err);
    json_decref(root);
    if (!bad)
        *model = m;
    return bad;
}

int ry_cost_load(struct ry_cost_model *model, uint64_t fingerprint, struct ry_err *err)
{
    char path[4096];
    return ry_cost_path(fingerprint, path, sizeof path, err) ? -1 : load(model, path, &fingerprint, err);
}

int ry_cost_read(struct ry_cost_model *model, const char *path, struct ry_err *err)
{
    int r = load(model, path, NULL, err);
    return r > 0 ? ry_fail(err, "cannot read %s: there is no such file: railyard calibrate writes one", path) : r;
}

/* ---- writing ---- */

static int make_folders(char *path, struct ry_err *err)
{
    for (char *p = strchr(path + 1, '/'); p; p = strchr(p + 1, '/')) {
        *p = 0;
        int bad = mkdir(path, 0777) && errno != EEXIST;
        if (bad)
            return ry_fail(err, "cannot make the folder %s: %s", path, strerror(errno));
        *p = '/';
    }
    return 0;
}

/* For people: "2 nodes, 8 ranks, NVIDIA H200, mlx5_0". */
static json_t *describe(const struct ry_cluster *c)
{
    const struct ry_seat *s = &c->seats[0];
    return json_sprintf("%d nodes, %d ranks, %s, %s", c->nnodes, c->nranks, *s->gpu_name ? s->gpu_name : "unknown GPU",
                        *s->nic ? s->nic : "unknown NIC");
}

static json_t *to_json(const struct ry_cost_model *model, const struct ry_cluster *cluster)
{
    struct ry_cost_model m = *model;
    char when[32] = "";
    time_t now = time(NULL);
    struct tm tm;
    if (gmtime_r(&now, &tm))
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &tm);
    json_t *root = json_pack("{s:s,s:i,s:o,s:o?,s:s,s:s}", "format", FORMAT, "version", VERSION, "fingerprint",
                             json_sprintf("%016" PRIx64, ry_cluster_fingerprint(cluster)), "cluster", describe(cluster),
                             "made", when, "railyard", RAILYARD_VERSION);
    for (int l = 0; root && l < RY_LINKS; l++)
        json_object_set_new(root, ry_link_name((enum ry_link)l), json_pack("{s:b}", "measured", m.link[l].measured));
    if (root && m.ucx.measured)
        json_object_set_new(root, UCX, json_pack("{s:b}", "measured", true));
    if (root)
        json_object_set_new(root, "copy", json_object());
    for (size_t i = 0; root && i < NFIELDS; i++) {
        const struct field *f = &fields[i];
        if (f->object && !strcmp(f->object, UCX) && !m.ucx.measured)
            continue;
        json_object_set_new(f->object ? json_object_get(root, f->object) : root, f->name, json_real(*value_of(&m, f)));
    }
    return root;
}

int ry_cost_save(const struct ry_cost_model *model, const struct ry_cluster *cluster, struct ry_err *err)
{
    char path[4096], tmp[4096 + 16];
    if (ry_cost_path(ry_cluster_fingerprint(cluster), path, sizeof path, err) || make_folders(path, err))
        return -1;
    json_t *root = to_json(model, cluster);
    char *text = root ? json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(root);
    if (!text)
        return ry_fail(err, "out of memory for %s", path);
    snprintf(tmp, sizeof tmp, "%s.XXXXXX", path);
    int fd = mkostemp(tmp, O_CLOEXEC), bad = -1;
    FILE *f = fd >= 0 ? fdopen(fd, "w") : NULL;
    if (f) {
        bad = fprintf(f, "%s\n", text) < 0;
        bad |= fchmod(fd, 0644);
        bad |= fclose(f);
        bad = bad || rename(tmp, path);
    }
    if (bad) {
        int e = errno;
        if (fd >= 0)
            unlink(tmp);
        ry_fail(err, "cannot write %s: %s", path, strerror(e));
    }
    free(text);
    return bad ? -1 : 0;
}
