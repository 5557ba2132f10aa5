/*
 * write_svg.c: a topology as a picture.
 *
 * Owns: the drawing. One box per package, below it the PCIe tree with a bar for each host bridge and switch, GPUs and
 * NICs in one row, and under them the NVLinks: an NVSwitch bar, or arcs between GPUs. Then the matrix of path classes.
 * Bridges that only pass through (root ports, switch ports) are left out: a bar stands for a place where paths part.
 */
#include "topo_internal.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

enum kind { ROOT, PACKAGE, NUMA, BAR, GPU, NIC, OTHER };

struct box {
    enum kind kind;
    hwloc_obj_t obj;
    int index; /* of the GPU or NIC; of the package or NUMA node */
    double x, y, w, h;
    struct box *child, *last, *next;
};

struct picture {
    const struct ry_topo *t;
    FILE *f;
    struct box root;
    struct box **gpu; /* [ngpus] */
    int levels;       /* of bars, at most */
    double leaf_h;
    double width, height;
    bool no_memory;
};

/* Sizes in pixels */
#define EDGE 24
#define LEAF_W 106
#define LEAF_H 76
#define LEAF_H_SHORT 57 /* where no device has a fourth line */
#define GAP 10
#define PAD 14
#define BAR_H 22
#define BAR_STEP 44
#define PACKAGE_HEAD 40
#define NUMA_HEAD 26

/* --- text --- */

/* jansson takes only UTF-8. (libxml2 would tell too, but the engine links this file, and a job needs no libxml2.) */
static bool is_utf8(const char *s)
{
    json_t *j = json_string(s);
    json_decref(j);
    return j;
}

/* Text content: escaped, and "?" in place of what XML cannot hold. */
static void put(FILE *f, const char *s)
{
    bool utf8 = is_utf8(s);
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '<' || c == '>' || c == '&' || c == '"')
            fprintf(f, "&#%d;", c);
        else
            fputc(c < 0x20 || c == 0x7f || (c >= 0x80 && !utf8) ? '?' : c, f);
    }
}

__attribute__((format(printf, 5, 6))) static void label(struct picture *p, double x, double y, const char *class,
                                                        const char *fmt, ...)
{
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    fprintf(p->f, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">", x, y, class);
    put(p->f, text);
    fprintf(p->f, "</text>\n");
}

static void rect(struct picture *p, double x, double y, double w, double h, const char *class)
{
    fprintf(p->f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" rx=\"5\" class=\"%s\"/>\n", x, y, w, h,
            class);
}

static void line(struct picture *p, double x1, double y1, double x2, double y2, const char *class)
{
    fprintf(p->f, "<path d=\"M%.1f %.1fL%.1f %.1f\" class=\"%s\"/>\n", x1, y1, x2, y2, class);
}

/* `s` without the maker's name, which is on every box alike, cut to what fits in `chars`. */
static void shorten(const char *s, int chars, char *out, size_t size)
{
    static const char *const noise[] = {"NVIDIA ", "Tesla ", "AMD ", "Instinct ", "GeForce "};
    for (size_t i = 0; i < sizeof noise / sizeof *noise; i++)
        if (!strncmp(s, noise[i], strlen(noise[i])))
            s += strlen(noise[i]);
    if ((int)strlen(s) <= chars)
        snprintf(out, size, "%s", s);
    else
        snprintf(out, size, "%.*s…", chars - 1, s);
}

/* --- the tree of boxes --- */

static struct box *new_box(struct picture *p, enum kind kind, hwloc_obj_t obj, int index)
{
    struct box *b = calloc(1, sizeof *b);
    if (!b) {
        p->no_memory = true;
        return NULL;
    }
    b->kind = kind;
    b->obj = obj;
    b->index = index;
    return b;
}

static void adopt(struct box *parent, struct box *b)
{
    if (!b)
        return;
    if (parent->last)
        parent->last->next = b;
    else
        parent->child = b;
    parent->last = b;
}

static void free_children(struct box *b)
{
    for (struct box *c = b->child, *next; c; c = next) {
        next = c->next;
        free_children(c);
        free(c);
    }
}

static int index_in(hwloc_obj_t *list, int n, hwloc_obj_t obj)
{
    for (int i = 0; i < n; i++)
        if (list[i] == obj)
            return i;
    return -1;
}

/* The box of a device worth drawing, or NULL. */
static struct box *device_box(struct picture *p, hwloc_obj_t obj)
{
    const struct ry_topo *t = p->t;
    int g = index_in(t->gpu_obj, t->ngpus, obj), n = index_in(t->nic_obj, t->nnics, obj);
    if (g >= 0)
        return p->gpu[g] = new_box(p, GPU, obj, g);
    if (n >= 0)
        return new_box(p, NIC, obj, n);
    if (obj->type == HWLOC_OBJ_PCI_DEVICE && !obj->attr->pcidev.class_id && !obj->attr->pcidev.vendor_id &&
        !ry_topo_is_nvswitch(obj))
        return new_box(p, OTHER, obj, 0);
    return NULL;
}

/* The boxes of an I/O object and all below it, NULL if there is nothing worth drawing. */
static struct box *io_box(struct picture *p, hwloc_obj_t obj)
{
    if (obj->type != HWLOC_OBJ_BRIDGE)
        return device_box(p, obj);
    struct box *b = new_box(p, BAR, obj, 0);
    for (hwloc_obj_t c = obj->io_first_child; b && c; c = c->next_sibling)
        adopt(b, io_box(p, c));
    bool host = obj->attr->bridge.upstream_type != HWLOC_OBJ_BRIDGE_PCI;
    bool whole = obj->subtype && !strcmp(obj->subtype, "PCISwitch");
    if (b && b->child && (host || whole || b->child->next))
        return b;
    struct box *only = b ? b->child : NULL;
    free(b);
    return only;
}

static struct box *cpu_box(struct picture *p, hwloc_obj_t home)
{
    struct box *package = NULL;
    hwloc_obj_t po =
        home->type == HWLOC_OBJ_PACKAGE ? home : hwloc_get_ancestor_obj_by_type(p->t->hw, HWLOC_OBJ_PACKAGE, home);
    for (struct box *b = p->root.child; b; b = b->next)
        if (b->obj == po || !p->root.child->next)
            package = b;
    if (!package && home->nodeset &&
        hwloc_bitmap_weight(home->nodeset) == 1) /* tied to a NUMA node above the package */
        for (struct box *b = p->root.child; b; b = b->next)
            if (b->obj && hwloc_bitmap_isequal(b->obj->nodeset, home->nodeset))
                package = b;
    if (!package) {
        for (struct box *b = p->root.child; b; b = b->next)
            if (!b->obj)
                return b;
        package = new_box(p, PACKAGE, NULL, -1);
        adopt(&p->root, package);
        return package;
    }
    for (struct box *n = package->child; n; n = n->next)
        if (n->kind == NUMA && home->nodeset && hwloc_bitmap_isequal(n->obj->nodeset, home->nodeset))
            return n;
    return package;
}

static void add_cpus(struct picture *p)
{
    hwloc_topology_t hw = p->t->hw;
    for (hwloc_obj_t o = NULL; (o = hwloc_get_next_obj_by_type(hw, HWLOC_OBJ_PACKAGE, o));) {
        struct box *b = new_box(p, PACKAGE, o, (int)o->logical_index);
        adopt(&p->root, b);
        int numa = o->nodeset ? hwloc_bitmap_weight(o->nodeset) : 0;
        for (hwloc_obj_t n = NULL; b && numa > 1 && (n = hwloc_get_next_obj_by_type(hw, HWLOC_OBJ_NUMANODE, n));)
            if (hwloc_bitmap_isset(o->nodeset, n->os_index))
                adopt(b, new_box(p, NUMA, n, (int)n->os_index));
    }
    if (!p->root.child)
        adopt(&p->root, new_box(p, PACKAGE, hwloc_get_root_obj(hw), 0));
}

/* Every device hangs from some processor object; Misc GPUs and what hangs from the machine included. */
static void add_devices(struct picture *p, hwloc_obj_t obj)
{
    for (hwloc_obj_t c = obj->io_first_child; c; c = c->next_sibling) {
        struct box *b = io_box(p, c);
        if (b)
            adopt(cpu_box(p, obj), b);
    }
    for (hwloc_obj_t c = obj->misc_first_child; c; c = c->next_sibling) {
        struct box *b = device_box(p, c);
        if (b)
            adopt(cpu_box(p, obj), b);
    }
    for (hwloc_obj_t c = obj->first_child; c; c = c->next_sibling)
        add_devices(p, c);
    for (hwloc_obj_t c = obj->memory_first_child; c; c = c->next_sibling)
        add_devices(p, c);
}

/* --- layout --- */

static bool is_cpu(const struct box *b)
{
    return b->kind == PACKAGE || b->kind == NUMA;
}

static int count_levels(const struct box *b)
{
    int most = 0;
    for (const struct box *c = b->child; c; c = c->next) {
        int n = count_levels(c);
        most = n > most ? n : most;
    }
    return most + (b->kind == BAR);
}

static double min_width(const struct box *b)
{
    return b->kind == PACKAGE ? 350 : b->kind == NUMA ? 240 : b->kind == BAR ? 92 : LEAF_W;
}

/* Children side by side; a box is as wide as they are together. */
static void place_x(struct box *b, double x)
{
    double pad = is_cpu(b) ? PAD : 0, at = x + pad;
    b->x = x;
    for (struct box *c = b->child; c; c = c->next) {
        place_x(c, at);
        at += c->w + GAP;
    }
    b->w = b->child ? at - GAP + pad - x : 0;
    if (b->kind != ROOT && b->w < min_width(b)) {
        double shift = b->child ? (min_width(b) - b->w) / 2 : 0;
        b->w = min_width(b);
        if (shift > 0)
            for (struct box *c = b->child; c; c = c->next)
                place_x(c, c->x + shift);
    }
}

/* Bars from the top down by their depth, devices all in one row. `y` is where the box may begin. */
static void place_y(struct box *b, double y, double row, double leaf_h, double bottom)
{
    b->y = y;
    if (is_cpu(b)) {
        b->h = bottom - y;
        y += b->kind == PACKAGE ? PACKAGE_HEAD : NUMA_HEAD;
    } else if (b->kind == BAR) {
        b->h = BAR_H;
        y += BAR_STEP;
    } else if (b->kind != ROOT) {
        b->y = row;
        b->h = leaf_h;
    }
    for (struct box *c = b->child; c; c = c->next)
        place_y(c, y, row, leaf_h, is_cpu(c) && is_cpu(b) ? bottom - PAD / 2.0 : bottom);
}

static double middle(const struct box *b)
{
    return b->x + b->w / 2;
}

/* --- drawing --- */

/* GB/s as a person writes them: "25", "12.5" */
static void number(double gbs, char out[24])
{
    snprintf(out, 24, gbs < 99.95 ? "%.3g" : "%.0f", gbs);
}

static void nic_name(const struct ry_topo *t, int i, char out[64])
{
    if (strcmp(t->nics[i].name, t->nics[i].pci))
        snprintf(out, 64, "%s", t->nics[i].name);
    else
        snprintf(out, 64, "NIC %d", i); /* no name but its address, which stands below */
}

static void draw_gpu(struct picture *p, const struct box *b)
{
    const struct ry_topo_gpu *g = &p->t->gpus[b->index];
    char name[80], nic[64], text[96];
    rect(p, b->x, b->y, b->w, b->h, "gpu");
    label(p, middle(b), b->y + 18, "t1", "GPU %d", b->index);
    shorten(g->name, 17, name, sizeof name);
    label(p, middle(b), b->y + 33, "t2", "%s", name);
    label(p, middle(b), b->y + 47, "t3", "%s", g->pci);
    if (g->nearest_nic >= 0) {
        nic_name(p->t, g->nearest_nic, nic);
        snprintf(text, sizeof text, "%.12s · %s", nic, ry_path_name(g->nic_path));
        label(p, middle(b), b->y + 65, "near", "→ %s", text);
    }
}

static void draw_nic(struct picture *p, const struct box *b)
{
    const struct ry_topo_nic *n = &p->t->nics[b->index];
    char name[64], title[80], bw[24];
    rect(p, b->x, b->y, b->w, b->h, "nic");
    nic_name(p->t, b->index, name);
    shorten(name, 13, title, sizeof title);
    label(p, middle(b), b->y + 18, "t1", "%s", title);
    if (strcmp(n->kind, "unknown"))
        label(p, middle(b), b->y + 33, "t2", "NIC, %s", n->kind);
    else
        label(p, middle(b), b->y + 33, "t2", "network device");
    if (*n->pci)
        label(p, middle(b), b->y + 47, "t3", "%s", n->pci);
    if (n->gbs > 0) {
        number(n->gbs, bw);
        label(p, middle(b), b->y + 65, "near", "%s GB/s", bw);
    }
}

static void draw_other(struct picture *p, const struct box *b)
{
    rect(p, b->x, b->y, b->w, b->h, "other");
    label(p, middle(b), b->y + 18, "t1", "?");
    label(p, middle(b), b->y + 33, "t2", "PCI device");
    label(p, middle(b), b->y + 47, "t3", "%04x:%02x:%02x.%x", b->obj->attr->pcidev.domain, b->obj->attr->pcidev.bus,
          b->obj->attr->pcidev.dev, b->obj->attr->pcidev.func);
}

static double link_speed(hwloc_obj_t obj)
{
    while (obj && obj->type != HWLOC_OBJ_PCI_DEVICE && obj->type != HWLOC_OBJ_BRIDGE)
        obj = obj->parent;
    bool pci = obj && (obj->type == HWLOC_OBJ_PCI_DEVICE || obj->attr->bridge.upstream_type == HWLOC_OBJ_BRIDGE_PCI);
    return pci ? obj->attr->pcidev.linkspeed : 0;
}

/* Lines from a bar to what hangs from it, with the speed of the PCIe link where there is room to write it. */
static void draw_wires(struct picture *p, const struct box *b)
{
    for (const struct box *c = b->child; c; c = c->next) {
        if (b->kind == BAR) {
            char bw[24];
            double speed = link_speed(c->obj);
            line(p, middle(c), b->y + b->h, middle(c), c->y, "pcie");
            if (speed > 0) {
                number(speed, bw);
                label(p, middle(c) + 4, c->y - 5, "wire", "%s", bw);
            }
        }
        draw_wires(p, c);
    }
}

static void draw_cpu_text(struct picture *p, const struct box *b)
{
    double y = b->y + (b->kind == PACKAGE ? 25 : 18);
    if (!b->obj) {
        label(p, b->x + PAD, y, "head", "Not tied to a processor");
        return;
    }
    char memory[48] = "", text[128], what[32];
    uint64_t bytes = b->obj->type == HWLOC_OBJ_NUMANODE ? b->obj->attr->numanode.local_memory : b->obj->total_memory;
    if (bytes)
        snprintf(memory, sizeof memory, " · %.0f GiB", (double)bytes / (1 << 30));
    int numa = hwloc_bitmap_weight(b->obj->nodeset), threads = hwloc_bitmap_weight(b->obj->cpuset);
    if (b->kind == NUMA || numa != 1)
        snprintf(what, sizeof what, b->kind == NUMA ? "NUMA %d" : "Package %d", b->index);
    else
        snprintf(what, sizeof what, "Package %d · NUMA %d", b->index, hwloc_bitmap_first(b->obj->nodeset));
    snprintf(text, sizeof text, "%s · %d thread%s%s", what, threads, threads == 1 ? "" : "s", memory);
    label(p, b->x + PAD, y, b->kind == PACKAGE ? "head" : "head2", "%s", text);
}

static void draw_boxes(struct picture *p, const struct box *b)
{
    switch (b->kind) {
    case ROOT:
        break;
    case PACKAGE:
    case NUMA:
        draw_cpu_text(p, b);
        if (!b->child && b->kind == PACKAGE)
            label(p, b->x + PAD, b->y + 58, "t2l", "no GPUs or NICs here");
        break;
    case BAR:
        rect(p, b->x, b->y, b->w, b->h, "bar");
        label(p, middle(b), b->y + 15, "bartext", "%s",
              b->obj->attr->bridge.upstream_type == HWLOC_OBJ_BRIDGE_PCI ? "PCIe switch" : "host bridge");
        break;
    case GPU:
        draw_gpu(p, b);
        break;
    case NIC:
        draw_nic(p, b);
        break;
    case OTHER:
        draw_other(p, b);
    }
    for (const struct box *c = b->child; c; c = c->next)
        draw_boxes(p, c);
}

static void draw_cpus(struct picture *p, const struct box *b)
{
    if (is_cpu(b))
        rect(p, b->x, b->y, b->w, b->h, b->kind == PACKAGE ? "package" : "numa");
    for (const struct box *c = b->child; c; c = c->next)
        draw_cpus(p, c);
}

/* --- NVLinks --- */

/* NVLinks from a GPU to its processor (POWER): up along the left edge of the GPU, behind the bars. */
static void draw_cpu_links(struct picture *p, const struct box *b)
{
    for (int i = 0; is_cpu(b) && i < p->t->ngpus; i++) {
        const struct box *g = p->gpu[i], *own = NULL;
        char bw[24];
        for (const struct box *c = g ? b->child : NULL; c; c = c->next)
            if (!is_cpu(c) && g->x >= c->x && g->x + g->w <= c->x + c->w + 1)
                own = b;
        if (!own || !(p->t->cpu_gbs[i] > 0))
            continue;
        line(p, g->x + 14, b->y + 30, g->x + 14, g->y, "nvlink");
        number(p->t->cpu_gbs[i], bw);
        label(p, g->x + 19, g->y - 5, "nvtext", "%s", bw);
    }
    for (const struct box *c = b->child; c; c = c->next)
        draw_cpu_links(p, c);
}

static double switch_bar(struct picture *p, double y)
{
    double lo = 1e9, hi = 0;
    bool any = false;
    for (int i = 0; i < p->t->ngpus; i++)
        if (p->gpu[i] && p->t->switch_linked[i]) {
            lo = p->gpu[i]->x < lo ? p->gpu[i]->x : lo;
            hi = p->gpu[i]->x + p->gpu[i]->w > hi ? p->gpu[i]->x + p->gpu[i]->w : hi;
            any = true;
        }
    if (!any)
        return y;
    double top = y + 34;
    for (int i = 0; i < p->t->ngpus; i++) {
        const struct box *g = p->gpu[i];
        char bw[24];
        if (!g || !p->t->switch_linked[i])
            continue;
        line(p, middle(g), g->y + g->h, middle(g), top, "nvlink");
        if (p->t->switch_gbs[i] > 0) {
            number(p->t->switch_gbs[i], bw);
            label(p, middle(g) + 6, top - 9, "nvtext", "%s", bw);
        }
    }
    rect(p, lo, top, hi - lo, 28, "nvswitch");
    label(p, (lo + hi) / 2, top + 19, "nvswitchtext", p->t->nswitches > 1 ? "NVSwitch × %d" : "NVSwitch",
          p->t->nswitches);
    return top + 28;
}

#define SHADES 3

/* Whether an NVLink between two GPUs is drawn as an arc: it is, unless both of them are on NVSwitches. */
static bool is_arc(const struct ry_topo *t, int a, int b)
{
    return t->gpu_path[a * t->ngpus + b] == RY_PATH_NVL && !(t->switch_linked[a] && t->switch_linked[b]);
}

/* The different bandwidths of arcs, rising; returns how many, SHADES + 1 for too many to tell apart by colour. */
static int arc_speeds(const struct ry_topo *t, double out[SHADES])
{
    int n = 0;
    for (int a = 0; a < t->ngpus; a++)
        for (int b = a + 1; b < t->ngpus; b++) {
            double v = t->gpu_gbs[a * t->ngpus + b];
            int at = 0;
            if (!is_arc(t, a, b))
                continue;
            while (at < n && out[at] < v - 0.05)
                at++;
            if (at < n && out[at] < v + 0.05)
                continue;
            if (n == SHADES)
                return SHADES + 1;
            memmove(out + at + 1, out + at, (size_t)(n++ - at) * sizeof *out);
            out[at] = v;
        }
    return n;
}

static const char *arc_class(const double *speeds, int n, double gbs)
{
    static const char *const shades[SHADES + 1][SHADES] = {
        {"arc1"}, {"arc1", "arc1", "arc1"}, {"arc0", "arc2", "arc2"}, {"arc0", "arc1", "arc2"}};
    for (int i = 0; n <= SHADES && i < n; i++)
        if (fabs(speeds[i] - gbs) < 0.06)
            return shades[n][i];
    return "arc1";
}

/* Direct NVLinks as arcs below the GPUs: the farther apart, the deeper. While they are few, each has its bandwidth on
 * it. */
static double arcs(struct picture *p, double y)
{
    const struct ry_topo *t = p->t;
    int edges = 0;
    double deepest = y, speeds[SHADES];
    int nspeeds = arc_speeds(t, speeds);
    for (int a = 0; a < t->ngpus; a++)
        for (int b = a + 1; b < t->ngpus; b++)
            edges += is_arc(t, a, b);
    for (int a = 0; a < t->ngpus; a++)
        for (int b = a + 1; b < t->ngpus; b++) {
            const struct box *ga = p->gpu[a], *gb = p->gpu[b];
            double gbs = t->gpu_gbs[a * t->ngpus + b];
            if (!ga || !gb || !is_arc(t, a, b))
                continue;
            double x1 = middle(ga) + 8, x2 = middle(gb) - 8, top = ga->y + ga->h;
            if (x1 > x2) { /* PCI order need not be the order of the drawing */
                double x = x1;
                x1 = x2 + 16, x2 = x - 16;
            }
            double depth = (y - top) + 26 + (x2 - x1) * 0.14, low = top + depth * 0.75;
            fprintf(p->f, "<path d=\"M%.1f %.1fC%.1f %.1f %.1f %.1f %.1f %.1f\" class=\"%s\"/>\n", x1, top, x1,
                    top + depth, x2, top + depth, x2, top, arc_class(speeds, nspeeds, gbs));
            if (gbs > 0 && edges <= 10) {
                char bw[24];
                number(gbs, bw);
                label(p, (x1 + x2) / 2, low + 13, "nvtextc", "%s", bw);
                low += 12;
            }
            deepest = low > deepest ? low : deepest;
        }
    return deepest;
}

/* --- legend and matrix --- */

static bool have(const struct box *b, enum kind kind)
{
    if (b->kind == kind)
        return true;
    for (const struct box *c = b->child; c; c = c->next)
        if (have(c, kind))
            return true;
    return false;
}

static double legend_item(struct picture *p, double x, double y, const char *class, const char *text)
{
    if (!strcmp(class, "pcie") || !strcmp(class, "nvlink") || !strncmp(class, "arc", 3))
        line(p, x, y - 4, x + 22, y - 4, class);
    else
        rect(p, x, y - 11, 22, 14, class);
    label(p, x + 29, y, "t2l", "%s", text);
    double right = x + 29 + (double)strlen(text) * 6.3; /* a guess that errs on the wide side */
    p->width = right + EDGE > p->width ? right + EDGE : p->width;
    return right + 26;
}

static double legend(struct picture *p, double y)
{
    double x = EDGE;
    bool nv = false;
    for (int i = 0; i < p->t->ngpus; i++)
        nv |= p->t->gpus[i].nvlink_gbs > 0 || p->t->switch_linked[i];
    y += 26;
    if (p->t->ngpus)
        x = legend_item(p, x, y, "gpu", p->t->nnics ? "GPU, with its nearest NIC and the way there" : "GPU");
    if (p->t->nnics)
        x = legend_item(p, x, y, "nic", "NIC");
    if (have(&p->root, OTHER))
        x = legend_item(p, x, y, "other", "PCI device of which the file does not say what it is");
    if (x > 700)
        x = EDGE, y += 22;
    if (have(&p->root, BAR))
        x = legend_item(p, x, y, "pcie", "PCIe, GB/s in one direction where known");
    double speeds[SHADES];
    int n = arc_speeds(p->t, speeds);
    for (int i = 0; n > 1 && n <= SHADES && i < n; i++) {
        char bw[24], text[48];
        number(speeds[i], bw);
        snprintf(text, sizeof text, speeds[i] > 0 ? "NVLink, %s GB/s in one direction" : "NVLink of unknown speed", bw);
        x = legend_item(p, x, y, arc_class(speeds, n, speeds[i]), text);
    }
    if (nv && (n < 2 || n > SHADES))
        x = legend_item(p, x, y, "nvlink", "NVLink, GB/s in one direction");
    if (x <= EDGE)
        y -= 22;
    const char *note = ry_topo_note(p->t);
    if (note)
        label(p, EDGE, y += 22, "t2l", "Note: %s", note);
    return y;
}

static const char *const path_class[] = {"pLOC", "pNVL", "pPIX", "pPXB", "pPHB", "pSYS", "pUNK"};

static double matrix(struct picture *p, double y)
{
    static const char *const meaning[] = {[RY_PATH_NVL] = "NVLink, direct or through NVSwitch",
                                          [RY_PATH_PIX] = "one PCIe switch",
                                          [RY_PATH_PXB] = "several PCIe switches",
                                          [RY_PATH_PHB] = "the processor's PCIe host bridge",
                                          [RY_PATH_SYS] = "from processor to processor",
                                          [RY_PATH_UNKNOWN] = "not known"};
    const struct ry_topo *t = p->t;
    const double cw = 34, ch = 20, x0 = EDGE + 50;
    int columns = t->ngpus + t->nnics;
    bool used[RY_PATH_UNKNOWN + 1] = {false};
    if (!t->ngpus || columns < 2 || columns > 64)
        return y;
    label(p, EDGE, y + 34, "head2", "How devices reach each other");
    y += 64;
    for (int j = 0; j < columns; j++)
        label(p, x0 + (j + 0.5) * cw, y - 6, "t3", j < t->ngpus ? "G%d" : "N%d", j < t->ngpus ? j : j - t->ngpus);
    for (int i = 0; i < t->ngpus; i++) {
        label(p, x0 - 8, y + i * ch + 14, "rowname", "GPU %d", i);
        for (int j = 0; j < columns; j++) {
            enum ry_path c = j < t->ngpus ? t->gpu_path[i * t->ngpus + j] : t->nic_path[i * t->nnics + j - t->ngpus];
            used[c] = true;
            fprintf(p->f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" class=\"%s\"/>\n",
                    x0 + j * cw + 1, y + i * ch + 1, cw - 2, ch - 2, path_class[c]);
            if (c != RY_PATH_LOC)
                label(p, x0 + (j + 0.5) * cw, y + i * ch + 14, c == RY_PATH_NVL || c == RY_PATH_SYS ? "cellw" : "cell",
                      "%s", ry_path_name(c));
        }
    }
    double kx = x0 + columns * cw + 34, ky = y + 14;
    for (int c = RY_PATH_NVL; c <= RY_PATH_UNKNOWN; c++)
        if (used[c]) {
            fprintf(p->f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" class=\"%s\"/>\n", kx, ky - 13,
                    cw - 2, ch - 2, path_class[c]);
            label(p, kx + cw / 2 - 1, ky, c == RY_PATH_NVL || c == RY_PATH_SYS ? "cellw" : "cell", "%s",
                  ry_path_name((enum ry_path)c));
            label(p, kx + cw + 6, ky, "t2l", "%s", meaning[c]);
            ky += 23;
        }
    double right = kx + cw + 6 + 200;
    p->width = right > p->width ? right : p->width;
    double bottom = y + t->ngpus * ch;
    return bottom > ky ? bottom : ky;
}

/* --- the whole --- */

static const char style[] =
    "text{font-family:Helvetica,Arial,sans-serif;fill:#222}\n"
    ".title{font-size:19px;font-weight:bold}\n"
    ".sub{font-size:12px;fill:#555}\n"
    ".head{font-size:13px;font-weight:bold;fill:#333}\n"
    ".head2{font-size:12px;font-weight:bold;fill:#444}\n"
    ".t1{font-size:13px;font-weight:bold;text-anchor:middle}\n"
    ".t2{font-size:9.5px;text-anchor:middle}\n"
    ".t2l{font-size:11px;fill:#444}\n"
    ".t3{font-size:10px;text-anchor:middle;fill:#666}\n"
    ".near{font-size:10px;text-anchor:middle;fill:#1f5aa6}\n"
    ".bartext{font-size:10.5px;text-anchor:middle;fill:#444}\n"
    ".wire{font-size:9px;fill:#777}\n"
    ".nvtext{font-size:10px;fill:#3f6600}\n"
    ".nvtextc{font-size:10px;fill:#3f6600;text-anchor:middle}\n"
    ".nvswitchtext{font-size:12px;font-weight:bold;fill:#fff;text-anchor:middle}\n"
    ".rowname{font-size:10px;text-anchor:end;fill:#444}\n"
    ".cell{font-size:9.5px;text-anchor:middle;fill:#333}\n"
    ".cellw{font-size:9.5px;text-anchor:middle;fill:#fff}\n"
    ".package{fill:#f4f5f7;stroke:#b9c0ca;stroke-width:1.2}\n"
    ".numa{fill:#fbfbfc;stroke:#c9ced6;stroke-dasharray:4 3}\n"
    ".bar{fill:#dde2ea;stroke:#9aa5b5}\n"
    ".gpu{fill:#e6f3d2;stroke:#5f9400;stroke-width:1.2}\n"
    ".nic{fill:#dceafc;stroke:#3b78c2;stroke-width:1.2}\n"
    ".other{fill:#f0eeea;stroke:#aaa49a;stroke-dasharray:3 2}\n"
    ".nvswitch{fill:#4f7d00;stroke:none}\n"
    ".pcie{stroke:#8793a3;stroke-width:1.4;fill:none}\n"
    ".nvlink{stroke:#6aa300;stroke-width:2.6;fill:none}\n"
    ".arc0{stroke:#b3d77c;stroke-width:2.2;fill:none}.arc1{stroke:#6aa300;stroke-width:2.6;fill:none}"
    ".arc2{stroke:#3f6600;stroke-width:3;fill:none}\n"
    ".pLOC{fill:#f1f1f1}.pNVL{fill:#5f9400}.pPIX{fill:#b9dcf2}.pPXB{fill:#d9cdea}.pPHB{fill:#fbe3a6}"
    ".pSYS{fill:#c2603f}.pUNK{fill:#e4e0ea}\n";

static void draw(struct picture *p)
{
    const struct ry_topo *t = p->t;
    hwloc_obj_t machine = hwloc_get_root_obj(t->hw);
    const char *product = hwloc_obj_get_info_by_name(machine, "DMIProductName");
    if (!product)
        product = hwloc_obj_get_info_by_name(machine, "PlatformModel");
    const char *host = hwloc_obj_get_info_by_name(machine, "HostName");
    const char *slash = strrchr(t->source, '/'), *source = slash ? slash + 1 : t->source;
    const char *title = product ? product : strcmp(source, "live") ? source : host ? host : "this machine";
    label(p, EDGE, 40, "title", "%s", title);
    char counts[128], switches[32] = "";
    if (t->nswitches)
        snprintf(switches, sizeof switches, ", %d NVSwitch%s", t->nswitches, t->nswitches == 1 ? "" : "es");
    snprintf(counts, sizeof counts, "%d GPU%s%s, %d NIC%s", t->ngpus, t->ngpus == 1 ? "" : "s", switches, t->nnics,
             t->nnics == 1 ? "" : "s");
    char where[200] = "";
    if (host && strcmp(host, title))
        snprintf(where, sizeof where, "  ·  %.80s", host);
    if (strcmp(source, title))
        snprintf(where + strlen(where), sizeof where - strlen(where), "  ·  %.80s", source);
    label(p, EDGE, 60, "sub", "%s%s", counts, where);

    double top = 80, row = top + PACKAGE_HEAD + 6 + p->levels * BAR_STEP, bottom;
    bool nested = have(&p->root, NUMA), any = t->ngpus + t->nnics > 0 || have(&p->root, OTHER);
    p->leaf_h = LEAF_H_SHORT;
    for (int i = 0; i < t->nnics; i++)
        if (t->ngpus || t->nics[i].gbs > 0)
            p->leaf_h = LEAF_H;
    if (nested)
        row += NUMA_HEAD + 4;
    bottom = row + p->leaf_h + PAD + (nested ? PAD / 2.0 : 0);
    if (!any)
        bottom = top + PACKAGE_HEAD + 34;
    place_y(&p->root, top, row, p->leaf_h, bottom);
    draw_cpus(p, &p->root);
    draw_cpu_links(p, &p->root);
    draw_wires(p, &p->root);
    draw_boxes(p, &p->root);
    double y = switch_bar(p, bottom);
    y = arcs(p, y);
    if (any)
        y = legend(p, y);
    y = matrix(p, y);
    p->height = y + EDGE;
}

int ry_topo_write_svg(const struct ry_topo *t, FILE *f, struct ry_err *err)
{
    struct picture p = {.t = t, .gpu = calloc((size_t)t->ngpus + 1, sizeof *p.gpu)};
    char *body = NULL;
    size_t len = 0;
    /* The size is known only when all is drawn, and it stands first. */
    p.f = open_memstream(&body, &len);
    if (p.f && p.gpu) {
        add_cpus(&p);
        if (p.root.child)
            add_devices(&p, hwloc_get_root_obj(t->hw));
        p.levels = count_levels(&p.root);
        place_x(&p.root, EDGE);
        p.width = p.root.w + 2 * EDGE > 640 ? p.root.w + 2 * EDGE : 640;
        draw(&p);
    }
    bool ok = p.f && !fclose(p.f) && p.gpu && !p.no_memory;
    if (ok) {
        fprintf(f,
                "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\">\n"
                "<style>\n%s</style>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
                p.width, p.height, p.width, p.height, style);
        fwrite(body, 1, len, f);
        fputs("</svg>\n", f);
    }
    free_children(&p.root);
    free(p.gpu);
    free(body);
    return ok ? 0 : ry_fail(err, "topology of %s: no memory for the picture", t->source);
}
