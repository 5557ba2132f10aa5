/* nvidia.c: see nvidia.h. The few types and numbers of NVML and CUDA used here are their stable ABI. */
#include "nvidia.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* --- NVML ---------------------------------------------------------------------------------------------------------- */

typedef struct nvml_device *nvml_device;

struct nvml_pci {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char text[32];
};

struct nvml_field {
    unsigned id, scope;
    long long time, latency;
    int type, rc;
    union {
        double d;
        unsigned u;
        unsigned long long ull;
    } value;
};

enum { NVML_OK = 0, NVML_NOT_SUPPORTED = 3 };
enum { NVML_ENABLED = 1 };
enum { NVML_END_GPU = 0, NVML_END_CPU = 1, NVML_END_SWITCH = 2 };
enum { NVML_FIELD_LINK_SPEED = 164 };

struct nvml {
    int (*init)(void);
    int (*shutdown)(void);
    int (*count)(unsigned *);
    int (*handle)(unsigned, nvml_device *);
    int (*name)(nvml_device, char *, unsigned);
    int (*uuid)(nvml_device, char *, unsigned);
    int (*pci)(nvml_device, struct nvml_pci *);
    /* the rest may be missing in old drivers */
    int (*link_state)(nvml_device, unsigned, int *);
    int (*link_pci)(nvml_device, unsigned, struct nvml_pci *);
    int (*link_end)(nvml_device, unsigned, int *);
    int (*link_version)(nvml_device, unsigned, unsigned *);
    int (*fields)(nvml_device, int, struct nvml_field *);
    int (*ancestor)(nvml_device, nvml_device, int *);
};

/* dlsym's void * is made a function pointer by way of memory, which is what POSIX blesses. */
static bool find(void *lib, const char *name, void *slot)
{
    void *f = dlsym(lib, name);
    memcpy(slot, &f, sizeof f);
    return f;
}

static bool nvml_open(struct nvml *m)
{
    void *lib = dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL); /* stays: others in the process may use it too */
    if (!lib)
        return false;
    find(lib, "nvmlDeviceGetNvLinkState", &m->link_state);
    find(lib, "nvmlDeviceGetNvLinkRemotePciInfo_v2", &m->link_pci);
    find(lib, "nvmlDeviceGetNvLinkRemoteDeviceType", &m->link_end);
    find(lib, "nvmlDeviceGetNvLinkVersion", &m->link_version);
    find(lib, "nvmlDeviceGetFieldValues", &m->fields);
    find(lib, "nvmlDeviceGetTopologyCommonAncestor", &m->ancestor);
    return find(lib, "nvmlInit_v2", &m->init) && find(lib, "nvmlShutdown", &m->shutdown) &&
           find(lib, "nvmlDeviceGetCount_v2", &m->count) && find(lib, "nvmlDeviceGetHandleByIndex_v2", &m->handle) &&
           find(lib, "nvmlDeviceGetName", &m->name) && find(lib, "nvmlDeviceGetUUID", &m->uuid) &&
           find(lib, "nvmlDeviceGetPciInfo_v3", &m->pci);
}

/*
 * One link's data rate. NVML's speed counts the framing on the wire (26562 MB/s on an H100), the published one does not
 * (25000); the generation alone does not tell cards with half-speed links. So: the smaller one.
 */
static unsigned link_mbs(const struct nvml *m, nvml_device dev, unsigned link)
{
    static const unsigned published[] = {0, 20000, 25000, 25000, 25000, 25000, 25000, 50000}; /* by NVML's version number */
    unsigned version = 0, by_version = 0, told = 0;
    if (m->link_version && m->link_version(dev, link, &version) == NVML_OK && version < sizeof published / sizeof *published)
        by_version = published[version];
    struct nvml_field f = {.id = NVML_FIELD_LINK_SPEED, .scope = link};
    if (m->fields && m->fields(dev, 1, &f) == NVML_OK && f.rc == NVML_OK)
        told = f.value.u;
    if (!told || !by_version)
        return told ? told : by_version;
    return told < by_version ? told : by_version;
}

static void read_links(const struct nvml *m, nvml_device dev, struct ry_nv_gpu *g)
{
    if (!m->link_state)
        return;
    for (unsigned l = 0; l < RY_NV_LINKS; l++) {
        int on = 0, end = -1;
        int rc = m->link_state(dev, l, &on);
        if (rc != NVML_OK && rc != NVML_NOT_SUPPORTED)
            return; /* past the last link */
        if (rc != NVML_OK || on != NVML_ENABLED)
            continue;
        struct ry_nv_link *link = &g->link[g->nlinks++];
        struct nvml_pci pci = {.domain = 0};
        if (m->link_pci && m->link_pci(dev, l, &pci) == NVML_OK && pci.bus <= 0xff && pci.domain != UINT32_MAX) {
            link->has_pci = !(pci.bus == 0xff && pci.device == 0x1f) && (pci.domain || pci.bus || pci.device);
            link->pci = (struct ry_pci){pci.domain, pci.bus, pci.device};
        }
        if (m->link_end && m->link_end(dev, l, &end) != NVML_OK)
            end = -1;
        link->end = end == NVML_END_GPU ? RY_LINK_GPU : end == NVML_END_CPU ? RY_LINK_CPU : RY_LINK_SWITCH;
        link->mbs = link_mbs(m, dev, l);
    }
}

static enum ry_path path_of(int level)
{
    switch (level) {
    case 0:
    case 10:
        return RY_PATH_PIX;
    case 20:
        return RY_PATH_PXB;
    case 30:
        return RY_PATH_PHB;
    case 40: /* host bridges of one NUMA node */
        return RY_PATH_PHB;
    case 50:
        return RY_PATH_SYS;
    }
    return RY_PATH_UNKNOWN;
}

static bool alloc_gpus(struct ry_nv *out, int n)
{
    out->gpu = calloc((size_t)n, sizeof *out->gpu);
    out->path = malloc((size_t)n * (size_t)n * sizeof *out->path);
    if (out->gpu && out->path) {
        for (int i = 0; i < n * n; i++)
            out->path[i] = RY_PATH_UNKNOWN;
        return true;
    }
    ry_nv_free(out);
    return false;
}

static void read_nvml(struct ry_nv *out)
{
    struct nvml m = {0};
    unsigned n = 0;
    if (!nvml_open(&m) || m.init() != NVML_OK)
        return;
    out->backend = "NVML";
    nvml_device *dev = NULL;
    if (m.count(&n) == NVML_OK && n && n < 4096 && (dev = calloc(n, sizeof *dev)) && alloc_gpus(out, (int)n)) {
        for (unsigned i = 0; i < n; i++) {
            struct ry_nv_gpu *g = &out->gpu[out->n];
            struct nvml_pci pci = {.domain = 0};
            if (m.handle(i, &dev[out->n]) != NVML_OK || m.pci(dev[out->n], &pci) != NVML_OK)
                continue; /* a lost GPU, or one that we may not look at */
            g->pci = (struct ry_pci){pci.domain, pci.bus, pci.device};
            if (m.name(dev[out->n], g->name, sizeof g->name) != NVML_OK)
                g->name[0] = 0;
            if (m.uuid(dev[out->n], g->uuid, sizeof g->uuid) != NVML_OK)
                g->uuid[0] = 0;
            read_links(&m, dev[out->n], g);
            out->n++;
        }
        for (int a = 0; a < out->n; a++)
            for (int b = 0; b < out->n; b++) {
                int level = -1;
                if (a == b)
                    out->path[a * out->n + b] = RY_PATH_LOC;
                else if (m.ancestor && m.ancestor(dev[a], dev[b], &level) == NVML_OK)
                    out->path[a * out->n + b] = path_of(level);
            }
    }
    free(dev);
    m.shutdown(); /* counted: the job's own use of NVML goes on */
}

/* --- CUDA driver --------------------------------------------------------------------------------------------------- */

static void read_cuda(struct ry_nv *out)
{
    int (*init)(unsigned), (*count)(int *), (*get)(int *, int), (*name)(char *, int, int), (*bus)(char *, int, int);
    int (*uuid)(unsigned char *, int);
    int n = 0;
    void *lib = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (!lib || !find(lib, "cuInit", &init) || !find(lib, "cuDeviceGetCount", &count) ||
        !find(lib, "cuDeviceGet", &get) || !find(lib, "cuDeviceGetName", &name) ||
        !find(lib, "cuDeviceGetPCIBusId", &bus))
        return;
    find(lib, "cuDeviceGetUuid", &uuid);
    if (init(0) || count(&n) || n <= 0 || n > 4096 || !alloc_gpus(out, n))
        return;
    out->backend = "CUDA";
    for (int i = 0; i < n; i++) {
        struct ry_nv_gpu *g = &out->gpu[out->n];
        char text[32] = "";
        unsigned char u[16];
        int dev;
        if (get(&dev, i) || bus(text, sizeof text, dev) ||
            sscanf(text, "%x:%x:%x", &g->pci.domain, &g->pci.bus, &g->pci.device) != 3)
            continue;
        if (name(g->name, sizeof g->name, dev))
            g->name[0] = 0;
        if (uuid && !uuid(u, dev))
            snprintf(g->uuid, sizeof g->uuid, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
                     u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
        out->n++;
    }
}

void ry_nv_read(struct ry_nv *out)
{
    *out = (struct ry_nv){0};
    read_nvml(out);
    if (!out->n) {
        ry_nv_free(out);
        read_cuda(out);
    }
}

void ry_nv_free(struct ry_nv *nv)
{
    free(nv->gpu);
    free(nv->path);
    *nv = (struct ry_nv){0};
}
