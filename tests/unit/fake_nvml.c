/*
 * fake_nvml.c: a libnvidia-ml.so.1 for machines without GPUs: test_topo loads it first, so that discovery finds it.
 * RY_FAKE_NVML picks the machine. "switch": 4 GPUs on hidden NVSwitches. "mesh": 3 GPUs in a chain of NVLinks, the last
 * with links of an unknown generation. "lost": as mesh, but GPU 1 does not answer. Anything else: the driver is not there.
 */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

struct pci {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char text[32];
};
struct field {
    unsigned id, scope;
    long long time, latency;
    int type, rc;
    union {
        double d;
        unsigned u;
        unsigned long long ull;
    } value;
};

static const struct {
    unsigned from, to, version, speed;
} mesh[] = {{0, 1, 2, 25781}, {0, 1, 2, 25781}, {1, 2, 99, 0}}; /* no speed, and a version from the future */

static int users;

static int is(const char *what)
{
    const char *s = getenv("RY_FAKE_NVML");
    return s && !strcmp(s, what);
}

EXPORT int nvmlInit_v2(void);
EXPORT int nvmlShutdown(void);
EXPORT int nvmlDeviceGetCount_v2(unsigned *n);
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **dev);
EXPORT int nvmlDeviceGetName(void *dev, char *out, unsigned n);
EXPORT int nvmlDeviceGetUUID(void *dev, char *out, unsigned n);
EXPORT int nvmlDeviceGetPciInfo_v3(void *dev, struct pci *out);
EXPORT int nvmlDeviceGetNvLinkState(void *dev, unsigned link, int *on);
EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *dev, unsigned link, struct pci *out);
EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(void *dev, unsigned link, int *type);
EXPORT int nvmlDeviceGetNvLinkVersion(void *dev, unsigned link, unsigned *version);
EXPORT int nvmlDeviceGetFieldValues(void *dev, int n, struct field *f);
EXPORT int nvmlDeviceGetTopologyCommonAncestor(void *a, void *b, int *level);
EXPORT int fake_nvml_users(void);

/* handles are 1 + index */
static unsigned index_of(void *dev)
{
    return (unsigned)(size_t)dev - 1;
}

static int edge(unsigned gpu, unsigned link)
{
    unsigned seen = 0;
    for (unsigned i = 0; i < sizeof mesh / sizeof *mesh; i++)
        if ((mesh[i].from == gpu || mesh[i].to == gpu) && seen++ == link)
            return (int)i;
    return -1;
}

int fake_nvml_users(void)
{
    return users;
}

int nvmlInit_v2(void)
{
    if (!is("switch") && !is("mesh") && !is("lost"))
        return 9; /* driver not loaded */
    users++;
    return 0;
}

int nvmlShutdown(void)
{
    users--;
    return 0;
}

int nvmlDeviceGetCount_v2(unsigned *n)
{
    *n = is("switch") ? 4 : 3;
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **dev)
{
    *dev = (void *)(size_t)(i + 1);
    return is("lost") && i == 1 ? 15 : 0;
}

int nvmlDeviceGetName(void *dev, char *out, unsigned n)
{
    snprintf(out, n, "Fake GPU <%u>", index_of(dev));
    return 0;
}

int nvmlDeviceGetUUID(void *dev, char *out, unsigned n)
{
    snprintf(out, n, "GPU-fa4e0000-0000-0000-0000-00000000000%u", index_of(dev));
    return 0;
}

int nvmlDeviceGetPciInfo_v3(void *dev, struct pci *out)
{
    memset(out, 0, sizeof *out);
    out->domain = 0xfa;
    out->bus = 0xe0 + index_of(dev);
    snprintf(out->text, sizeof out->text, "000000FA:%02X:00.0", out->bus);
    return 0;
}

int nvmlDeviceGetNvLinkState(void *dev, unsigned link, int *on)
{
    *on = is("switch") || edge(index_of(dev), link) >= 0;
    return link < (is("switch") ? 18 : 6) ? 0 : 2; /* invalid argument */
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *dev, unsigned link, struct pci *out)
{
    if (is("switch"))
        return 3; /* not supported: hidden */
    int e = edge(index_of(dev), link);
    unsigned other = mesh[e].from == index_of(dev) ? mesh[e].to : mesh[e].from;
    return nvmlDeviceGetPciInfo_v3((void *)(size_t)(other + 1), out);
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void *dev, unsigned link, int *type)
{
    *type = is("switch") ? 2 : 0;
    return 0;
}

int nvmlDeviceGetNvLinkVersion(void *dev, unsigned link, unsigned *version)
{
    *version = is("switch") ? 6 : mesh[edge(index_of(dev), link)].version;
    return 0;
}

int nvmlDeviceGetFieldValues(void *dev, int n, struct field *f)
{
    for (int i = 0; i < n; i++) {
        f[i].rc = f[i].id == 164 ? 0 : 3;
        f[i].value.u = is("switch") ? 26562 : mesh[edge(index_of(dev), f[i].scope)].speed;
    }
    return 0;
}

int nvmlDeviceGetTopologyCommonAncestor(void *a, void *b, int *level)
{
    unsigned distance = index_of(a) > index_of(b) ? index_of(a) - index_of(b) : index_of(b) - index_of(a);
    *level = distance == 1 ? 20 : 50;
    return 0;
}
