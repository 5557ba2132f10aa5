/* cost_file.c: see cost_file.h. */
#include "cost_file.h"

#include <ctype.h>
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

/* Speeds to 1 %: a driver that says 26.562 today may say 26.56 tomorrow. */
static uint64_t hardware(const struct ry_seat *s, const char *nic)
{
    char text[256];
    snprintf(text, sizeof text, "%.64s|%.64s|%.3g|%.3g", s->gpu_name, nic, s->nvlink_gbs, s->nic_gbs);
    return XXH64(text, strlen(text), 1);
}

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
            node.ranks += hardware(&cluster->seats[r], cluster->seats[r].nic);
        }
        sum += XXH64(&node, sizeof node, 2);
    }
    return XXH64(&sum, sizeof sum, (uint64_t)cluster->nnodes);
}

/* Each sort that there is, once. */
uint64_t ry_cluster_kind(const struct ry_cluster *cluster)
{
    enum { MOST_SORTS = 64 }; /* of more, those that come later do not count */
    uint64_t sorts[MOST_SORTS], sum = 0;
    int nsorts = 0;
    for (int r = 0; r < cluster->nranks; r++) {
        char nic[sizeof cluster->seats->nic] = "";
        size_t n = 0;
        for (const char *p = cluster->seats[r].nic; *p && n < sizeof nic - 1; p++) /* mlx5_3 is as good as mlx5_0 */
            if (!isdigit((unsigned char)*p))
                nic[n++] = *p;
        uint64_t mine = hardware(&cluster->seats[r], nic);
        int same = 0;
        while (same < nsorts && sorts[same] != mine)
            same++;
        if (same < nsorts || nsorts == MOST_SORTS)
            continue;
        sorts[nsorts++] = mine;
        sum += mine;
    }
    return XXH64(&sum, sizeof sum, 3);
}

#define KIND "kind-" /* prefix of files for a kind; those for a fingerprint have none */

static int path_of(const char *prefix, uint64_t number, char *out, size_t size, struct ry_err *err)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n;
    if (cache && *cache == '/') /* others are to be ignored, the specification says */
        n = snprintf(out, size, "%s/railyard/cost-%s%016" PRIx64 ".json", cache, prefix, number);
    else if (home && *home == '/')
        n = snprintf(out, size, "%s/.cache/railyard/cost-%s%016" PRIx64 ".json", home, prefix, number);
    else
        return ry_fail(err, "no folder for measured costs: set XDG_CACHE_HOME or HOME to an absolute path");
    if (n < 0 || (size_t)n >= size)
        return ry_fail(err, "XDG_CACHE_HOME or HOME is too long a path");
    return 0;
}

int ry_cost_path(uint64_t fingerprint, char *out, size_t size, struct ry_err *err)
{
    return path_of("", fingerprint, out, size, err);
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

/* The file's `field` must be `value`; `field` NULL: any cluster's. */
static int from_json(struct ry_cost_model *m, const json_t *root, const char *field, uint64_t value, const char *path,
                     struct ry_err *err)
{
    char mine[17];
    const char *format = json_string_value(json_object_get(root, "format"));
    const char *print = field ? json_string_value(json_object_get(root, field)) : NULL;
    if (!format || strcmp(format, FORMAT) || json_integer_value(json_object_get(root, "version")) != VERSION)
        return ry_fail(err,
                       "%s: its format and version are not \"" FORMAT "\", %d: delete it and run railyard calibrate",
                       path, VERSION);
    snprintf(mine, sizeof mine, "%016" PRIx64, value);
    if (field && (!print || strcmp(print, mine)))
        return ry_fail(err, "%s: %s is %.32s, not %s: it was renamed or damaged; delete it and run railyard calibrate",
                       path, field, print ? print : "missing", mine);
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
static int open_json(json_t **root, const char *path, struct ry_err *err)
{
    json_error_t why;
    FILE *f = fopen(path, "re");
    if (!f && (errno == ENOENT || errno == ENOTDIR))
        return 1;
    if (!f)
        return ry_fail(err, "cannot read %s: %s", path, strerror(errno));
    *root = json_loadf(f, JSON_REJECT_DUPLICATES, &why);
    fclose(f);
    return *root ? 0 : ry_fail(err, "%s: line %d: %s: delete it and run railyard calibrate", path, why.line, why.text);
}

/* 1: there is no such file. cluster[128]: what it says that it was measured on; NULL: nobody asks. */
static int load(struct ry_cost_model *model, const char *path, const char *field, uint64_t value, char *cluster,
                struct ry_err *err)
{
    struct ry_cost_model m;
    json_t *root;
    int bad = open_json(&root, path, err);
    if (bad)
        return bad;
    bad = from_json(&m, root, field, value, path, err);
    const char *text = json_string_value(json_object_get(root, "cluster"));
    if (!bad && cluster)
        snprintf(cluster, 128, "%s", text ? text : "another cluster");
    json_decref(root);
    if (!bad)
        *model = m;
    return bad;
}

int ry_cost_load(struct ry_cost_model *model, uint64_t fingerprint, struct ry_err *err)
{
    char path[4096];
    return ry_cost_path(fingerprint, path, sizeof path, err) ? -1
                                                             : load(model, path, "fingerprint", fingerprint, NULL, err);
}

int ry_cost_find(struct ry_cost_model *model, const struct ry_cluster *cluster, char other[128], struct ry_err *err)
{
    char path[4096];
    uint64_t kind = ry_cluster_kind(cluster);
    other[0] = 0;
    int bad = ry_cost_load(model, ry_cluster_fingerprint(cluster), err);
    if (bad <= 0)
        return bad;
    return path_of(KIND, kind, path, sizeof path, err) ? -1 : load(model, path, "kind", kind, other, err);
}

int ry_cost_read(struct ry_cost_model *model, const char *path, struct ry_err *err)
{
    int r = load(model, path, NULL, 0, NULL, err);
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

#define RANKS "ranks_of_node" /* of the largest */

static int ranks_of_node(const struct ry_cluster *c)
{
    int most = 0;
    for (int n = 0; n < c->nnodes; n++)
        most = c->node_size[n] > most ? c->node_size[n] : most;
    return most;
}

static json_t *to_json(const struct ry_cost_model *model, const struct ry_cluster *cluster)
{
    struct ry_cost_model m = *model;
    char when[32] = "";
    time_t now = time(NULL);
    struct tm tm;
    if (gmtime_r(&now, &tm))
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &tm);
    json_t *root = json_pack("{s:s,s:i,s:o,s:o,s:o?,s:i,s:s,s:s}", "format", FORMAT, "version", VERSION, "fingerprint",
                             json_sprintf("%016" PRIx64, ry_cluster_fingerprint(cluster)), "kind",
                             json_sprintf("%016" PRIx64, ry_cluster_kind(cluster)), "cluster", describe(cluster), RANKS,
                             ranks_of_node(cluster), "made", when, "railyard", RAILYARD_VERSION);
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

static int write_file(const char *path, const char *text, struct ry_err *err)
{
    char tmp[4096 + 16];
    snprintf(tmp, sizeof tmp, "%s.XXXXXX", path);
    int fd = mkostemp(tmp, O_CLOEXEC), bad = -1;
    FILE *f = fd >= 0 ? fdopen(fd, "w") : NULL;
    if (f) {
        bad = fprintf(f, "%s\n", text) < 0;
        bad |= fchmod(fd, 0644);
        bad |= fclose(f);
        bad = bad || rename(tmp, path);
    }
    if (!bad)
        return 0;
    int e = errno;
    if (fd >= 0)
        unlink(tmp);
    return ry_fail(err, "cannot write %s: %s", path, strerror(e));
}

/* Does the file for this kind of hardware tell more than what was measured now? A damaged one does not. */
static bool tells_more(const char *path, uint64_t kind, const struct ry_cost_model *now,
                       const struct ry_cluster *cluster)
{
    struct ry_cost_model before;
    struct ry_err err;
    json_t *root;
    if (open_json(&root, path, &err))
        return false;
    bool good = !from_json(&before, root, "kind", kind, path, &err);
    json_int_t ranks = json_integer_value(json_object_get(root, RANKS));
    json_decref(root);
    bool nic = good && before.link[RY_LINK_NIC].measured, nic_now = now->link[RY_LINK_NIC].measured;
    return good && (nic != nic_now ? nic : ranks > ranks_of_node(cluster));
}

int ry_cost_save(const struct ry_cost_model *model, const struct ry_cluster *cluster, struct ry_err *err)
{
    char path[4096], of_kind[4096];
    uint64_t kind = ry_cluster_kind(cluster);
    if (ry_cost_path(ry_cluster_fingerprint(cluster), path, sizeof path, err) ||
        path_of(KIND, kind, of_kind, sizeof of_kind, err) || make_folders(path, err))
        return -1;
    json_t *root = to_json(model, cluster);
    char *text = root ? json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(root);
    if (!text)
        return ry_fail(err, "out of memory for %s", path);
    int bad =
        write_file(path, text, err) || (!tells_more(of_kind, kind, model, cluster) && write_file(of_kind, text, err));
    free(text);
    return bad ? -1 : 0;
}
