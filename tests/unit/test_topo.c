/*
 * test_topo.c: topologies: known facts of real and made-up machines, every format, round trips, this machine, a machine
 * with a fake NVIDIA driver, and files that are broken in every way.
 */
#include <check.h>
#include <dlfcn.h>
#include <libgen.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>
#include <libxml/parser.h>

#include "base/clock.h"
#include "topo.h"

static unsigned seed;
static const char *data, *shared;

/* --- helpers --- */

static const char *in(const char *dir, const char *name)
{
    static char path[4][2048];
    static int k;
    snprintf(path[k = (k + 1) % 4], sizeof *path, "%s/%s", dir, name);
    return path[k];
}

static struct ry_topo *open_ok(const char *path)
{
    struct ry_err err = {""};
    struct ry_topo *t = ry_topo_open_file(path, &err);
    ck_assert_msg(t != NULL, "%s", err.msg);
    ck_assert_str_eq(ry_topo_source(t), path);
    return t;
}

/* A file of RY_SHARED/topologies, or NULL, told once, where the folder is absent. */
static struct ry_topo *open_shared(const char *name)
{
    char folder[1024];
    snprintf(folder, sizeof folder, "%s/topologies", shared);
    if (access(folder, R_OK)) {
        printf("SKIPPED %s: no folder %s (set RY_SHARED)\n", name, folder);
        return NULL;
    }
    return open_ok(in(folder, name));
}

static char *written(const struct ry_topo *t, enum ry_topo_format format)
{
    struct ry_err err = {""};
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);
    ck_assert_msg(!ry_topo_write(t, format, f, &err), "%s", err.msg);
    fclose(f);
    ck_assert_uint_gt(n, 0);
    ck_assert_uint_eq(strlen(text), n); /* no stray NUL */
    return text;
}

static char *temp_file(const char *text, size_t n)
{
    static char path[64];
    const char *dir = access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm"; /* thousands of them: not on a disk */
    snprintf(path, sizeof path, "%s/ry-test-topo.%d.xml", dir, (int)getpid());
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(text, 1, n, f), n);
    fclose(f);
    return path;
}

static void same(const struct ry_topo *a, const struct ry_topo *b)
{
    int g = ry_topo_ngpus(a), n = ry_topo_nnics(a);
    ck_assert_int_eq(g, ry_topo_ngpus(b));
    ck_assert_int_eq(n, ry_topo_nnics(b));
    for (int i = 0; i < g; i++) {
        const struct ry_topo_gpu *x = ry_topo_gpu(a, i), *y = ry_topo_gpu(b, i);
        ck_assert_str_eq(x->name, y->name);
        ck_assert_str_eq(x->pci, y->pci);
        ck_assert_str_eq(x->uuid, y->uuid);
        ck_assert_int_eq(x->numa, y->numa);
        ck_assert_int_eq(x->nearest_nic, y->nearest_nic);
        ck_assert_int_eq(x->nic_path, y->nic_path);
        ck_assert_double_eq(x->nvlink_gbs, y->nvlink_gbs);
        for (int j = 0; j < g; j++) {
            ck_assert_int_eq(ry_topo_gpu_path(a, i, j), ry_topo_gpu_path(b, i, j));
            ck_assert_double_eq(ry_topo_gpu_gbs(a, i, j), ry_topo_gpu_gbs(b, i, j));
        }
        for (int j = 0; j < n; j++)
            ck_assert_int_eq(ry_topo_nic_path(a, i, j), ry_topo_nic_path(b, i, j));
    }
    for (int i = 0; i < n; i++) {
        const struct ry_topo_nic *x = ry_topo_nic(a, i), *y = ry_topo_nic(b, i);
        ck_assert_str_eq(x->name, y->name);
        ck_assert_str_eq(x->pci, y->pci);
        ck_assert_str_eq(x->kind, y->kind);
        ck_assert_int_eq(x->numa, y->numa);
        ck_assert_double_eq(x->gbs, y->gbs);
    }
}

/* What must hold of any topology, in every format. Closes it. */
static void check_and_close(struct ry_topo *t)
{
    int g = ry_topo_ngpus(t), n = ry_topo_nnics(t);
    for (int i = 0; i < g; i++) {
        const struct ry_topo_gpu *x = ry_topo_gpu(t, i);
        ck_assert_int_eq(x->index, i);
        ck_assert_ptr_eq(ry_topo_gpu_by_pci(t, x->pci), x);
        ck_assert_int_eq(ry_topo_gpu_path(t, i, i), RY_PATH_LOC);
        for (int j = 0; j < g; j++) {
            ck_assert_int_eq(ry_topo_gpu_path(t, i, j), ry_topo_gpu_path(t, j, i));
            ck_assert_double_eq(ry_topo_gpu_gbs(t, i, j), ry_topo_gpu_gbs(t, j, i));
            if (ry_topo_gpu_gbs(t, i, j) > 0)
                ck_assert_int_eq(ry_topo_gpu_path(t, i, j), RY_PATH_NVL);
        }
        if (!n) {
            ck_assert_int_eq(x->nearest_nic, -1);
            continue;
        }
        ck_assert_int_ge(x->nearest_nic, 0);
        ck_assert_int_eq(x->nic_path, ry_topo_nic_path(t, i, x->nearest_nic));
    }
    ck_assert_ptr_null(ry_topo_gpu(t, -1));
    ck_assert_ptr_null(ry_topo_gpu(t, g));
    ck_assert_ptr_null(ry_topo_nic(t, n));
    ck_assert_int_eq(ry_topo_gpu_path(t, g, 0), RY_PATH_UNKNOWN);

    char *text = written(t, RY_TOPO_TEXT), *json = written(t, RY_TOPO_JSON), *svg = written(t, RY_TOPO_SVG),
         *xml = written(t, RY_TOPO_XML);
    json_error_t jerr;
    json_t *j = json_loads(json, JSON_REJECT_DUPLICATES, &jerr);
    ck_assert_msg(j != NULL, "%s", jerr.text);
    ck_assert_str_eq(json_string_value(json_object_get(j, "schema")), "railyard-topology");
    ck_assert_int_eq((int)json_integer_value(json_object_get(j, "version")), 1);
    ck_assert_int_eq((int)json_array_size(json_object_get(j, "gpus")), g);
    ck_assert_int_eq((int)json_array_size(json_object_get(j, "nics")), n);
    ck_assert_int_eq((int)json_array_size(json_object_get(j, "gpu_paths")), g);
    ck_assert_int_eq((int)json_array_size(json_object_get(j, "nic_paths")), g);
    for (int i = 0; i < g; i++) {
        ck_assert_int_eq((int)json_array_size(json_array_get(json_object_get(j, "gpu_paths"), (size_t)i)), g);
        ck_assert_int_eq((int)json_array_size(json_array_get(json_object_get(j, "nic_paths"), (size_t)i)), n);
        ck_assert_ptr_nonnull(strstr(text, ry_topo_gpu(t, i)->pci));
        ck_assert_ptr_nonnull(strstr(svg, ry_topo_gpu(t, i)->pci));
    }
    for (int i = 0; i < n; i++) {
        ck_assert_ptr_nonnull(strstr(text, ry_topo_nic(t, i)->name));
        ck_assert_ptr_nonnull(strstr(svg, ry_topo_nic(t, i)->name));
    }
    json_decref(j);
    xmlDoc *doc = xmlReadMemory(svg, (int)strlen(svg), NULL, NULL, XML_PARSE_NOERROR | XML_PARSE_NOWARNING);
    ck_assert_msg(doc != NULL, "the SVG is not well-formed");
    xmlFreeDoc(doc);
    ck_assert_ptr_null(strstr(svg, "nan"));
    ck_assert_ptr_null(strstr(svg, "inf"));

    struct ry_topo *again = open_ok(temp_file(xml, strlen(xml)));
    same(t, again);
    ry_topo_close(again);
    unlink(temp_file("", 0));
    free(text);
    free(json);
    free(svg);
    free(xml);
    ry_topo_close(t);
}

static int64_t unknown_devices(const struct ry_topo *t)
{
    char *json = written(t, RY_TOPO_JSON);
    json_t *j = json_loads(json, 0, NULL);
    int64_t n = json_integer_value(json_object_get(j, "unknown_pci_devices"));
    json_decref(j);
    free(json);
    return n;
}

/* --- real machines --- */

START_TEST(dgx2)
{
    struct ry_topo *t = open_shared("nvidiaDGX2.xml");
    if (!t)
        return;
    ck_assert_int_eq(ry_topo_ngpus(t), 16);
    ck_assert_int_eq(ry_topo_nnics(t), 0);
    for (int i = 0; i < 16; i++) {
        const struct ry_topo_gpu *g = ry_topo_gpu(t, i);
        ck_assert_str_eq(g->name, "Tesla V100-SXM3-32GB-H");
        ck_assert_double_eq(g->nvlink_gbs, 150); /* 6 links of 25 GB/s, one to each switch of its board */
        ck_assert_int_eq(g->numa, i / 8);
        for (int j = 0; j < 16; j++)
            if (i != j) {
                ck_assert_int_eq(ry_topo_gpu_path(t, i, j), RY_PATH_NVL);
                ck_assert_double_eq(ry_topo_gpu_gbs(t, i, j), 150);
            }
    }
    ck_assert_str_eq(ry_topo_gpu(t, 0)->pci, "0000:34:00.0");
    ck_assert_str_eq(ry_topo_gpu(t, 0)->uuid, "GPU-d3977428-7a30-086b-2e20-5c1eeed647c6");
    ck_assert_ptr_eq(ry_topo_gpu_by_pci(t, "00000000:E7:00.0"), ry_topo_gpu(t, 15));
    ck_assert_ptr_eq(ry_topo_gpu_by_pci(t, "e7:00.0"), ry_topo_gpu(t, 15));
    ck_assert_ptr_null(ry_topo_gpu_by_pci(t, "0001:e7:00.0"));
    ck_assert_ptr_null(ry_topo_gpu_by_pci(t, "nonsense"));
    ck_assert_ptr_null(ry_topo_gpu_by_pci(t, ""));
    char *text = written(t, RY_TOPO_TEXT);
    ck_assert_ptr_nonnull(strstr(text, "16 GPUs, 12 NVSwitches, 0 NICs"));
    free(text);
    check_and_close(t);
}
END_TEST

static void check_p4d(const char *file)
{
    struct ry_topo *t = open_shared(file);
    if (!t)
        return;
    ck_assert_int_eq(ry_topo_ngpus(t), 8);
    ck_assert_int_eq(ry_topo_nnics(t), 4);
    for (int i = 0; i < 8; i++) {
        const struct ry_topo_gpu *g = ry_topo_gpu(t, i);
        ck_assert_int_eq(g->nearest_nic, i / 2); /* two GPUs and a NIC on each switch */
        ck_assert_int_eq(g->nic_path, RY_PATH_PIX);
        ck_assert_int_eq(g->numa, i / 4);
        ck_assert_double_eq(g->nvlink_gbs, 0);
        for (int j = 0; j < 8; j++) {
            enum ry_path want = i == j           ? RY_PATH_LOC
                                : i / 2 == j / 2 ? RY_PATH_PIX
                                : i / 4 == j / 4 ? RY_PATH_PHB
                                                 : RY_PATH_SYS;
            ck_assert_int_eq(ry_topo_gpu_path(t, i, j), want);
        }
        for (int j = 0; j < 4; j++)
            ck_assert_int_eq(ry_topo_nic_path(t, i, j), i / 2 == j       ? RY_PATH_PIX
                                                        : i / 4 == j / 2 ? RY_PATH_PHB
                                                                         : RY_PATH_SYS);
    }
    ck_assert_int_eq(hwloc_get_nbobjs_by_type(ry_topo_hwloc(t), HWLOC_OBJ_PU), 96); /* by the affinity masks */
    ck_assert_str_eq(ry_topo_nic(t, 0)->pci, "0000:10:1b.0");
    ck_assert_str_eq(ry_topo_nic(t, 0)->kind, "unknown");
    check_and_close(t);
}

START_TEST(p4d)
{
    check_p4d("p4d-24xl-nccl-topo.xml");
    check_p4d("p4de-24xl-nccl-topo.xml");
}
END_TEST

START_TEST(g5)
{
    struct ry_topo *t = open_shared("g5.48xl-nccl-topo.xml");
    if (!t)
        return;
    /* the file gives no classes: which of the nine are GPUs only the machine knows */
    ck_assert_int_eq(ry_topo_ngpus(t), 0);
    ck_assert_int_eq(unknown_devices(t), 9);
    ck_assert_int_eq(hwloc_get_nbobjs_by_type(ry_topo_hwloc(t), HWLOC_OBJ_NUMANODE), 2);
    check_and_close(t);
}
END_TEST

START_TEST(power8)
{
    struct ry_topo *t = open_shared("power8gpudistances.xml");
    if (!t)
        return;
    ck_assert_int_eq(ry_topo_ngpus(t), 4);
    for (int i = 0; i < 4; i++) {
        ck_assert_double_eq(ry_topo_gpu(t, i)->nvlink_gbs, 80); /* 40 to its twin, 40 to its processor */
        for (int j = 0; j < 4; j++) {
            bool twins = i != j && i / 2 == j / 2;
            ck_assert_int_eq(ry_topo_gpu_path(t, i, j), i == j ? RY_PATH_LOC : twins ? RY_PATH_NVL : RY_PATH_SYS);
            ck_assert_double_eq(ry_topo_gpu_gbs(t, i, j), twins ? 40 : 0);
        }
    }
    ck_assert_str_eq(ry_topo_gpu(t, 3)->pci, "000b:01:00.0");
    ck_assert_str_eq(ry_topo_gpu(t, 3)->name, "Tesla P100-SXM2-16GB");
    check_and_close(t);
}
END_TEST

START_TEST(gb10)
{
    struct ry_topo *t = open_shared("nvidia-dgx-gb10.xml"); /* hwloc 3; saved without I/O devices */
    if (!t)
        return;
    ck_assert_int_eq(ry_topo_ngpus(t), 0);
    ck_assert_int_eq(ry_topo_nnics(t), 0);
    ck_assert_int_eq(hwloc_get_nbobjs_by_type(ry_topo_hwloc(t), HWLOC_OBJ_PU), 20);
    char *text = written(t, RY_TOPO_TEXT);
    ck_assert_ptr_nonnull(strstr(text, "NVIDIA_DGX_Spark"));
    free(text);
    check_and_close(t);
}
END_TEST

/* --- machines of our own making --- */

START_TEST(rail8)
{
    struct ry_topo *t = open_ok(in(data, "rail8-nccl.xml"));
    ck_assert_int_eq(ry_topo_ngpus(t), 8);
    ck_assert_int_eq(ry_topo_nnics(t), 8); /* eth0 is not on PCI and others are: it is left out */
    for (int i = 0; i < 8; i++) {
        char name[16];
        snprintf(name, sizeof name, "mlx5_%d", i);
        ck_assert_str_eq(ry_topo_nic(t, i)->name, name);
        ck_assert_str_eq(ry_topo_nic(t, i)->kind, "verbs");
        ck_assert_double_eq(ry_topo_nic(t, i)->gbs, 50);
        ck_assert_int_eq(ry_topo_gpu(t, i)->nearest_nic, i); /* two are equally near: GPUs share them out */
        ck_assert_int_eq(ry_topo_gpu(t, i)->nic_path, RY_PATH_PIX);
        ck_assert_double_eq(ry_topo_gpu(t, i)->nvlink_gbs, 450);
        for (int j = 0; j < 8; j++)
            ck_assert_int_eq(ry_topo_gpu_path(t, i, j), i == j ? RY_PATH_LOC : RY_PATH_NVL);
    }
    check_and_close(t);
}
END_TEST

START_TEST(mesh8)
{
    struct ry_topo *t = open_ok(in(data, "mesh8-nccl.xml"));
    static const enum ry_path nic[] = {RY_PATH_PIX, RY_PATH_PIX, RY_PATH_PXB, RY_PATH_PXB,
                                       RY_PATH_SYS, RY_PATH_SYS, RY_PATH_SYS, RY_PATH_SYS};
    ck_assert_int_eq(ry_topo_ngpus(t), 8);
    for (int i = 0; i < 8; i++) {
        ck_assert_double_eq(ry_topo_gpu(t, i)->nvlink_gbs, 150);
        ck_assert_int_eq(ry_topo_gpu(t, i)->nic_path, nic[i]);
    }
    ck_assert_double_eq(ry_topo_gpu_gbs(t, 0, 1), 25);
    ck_assert_double_eq(ry_topo_gpu_gbs(t, 0, 3), 50);
    ck_assert_double_eq(ry_topo_gpu_gbs(t, 0, 5), 0);
    ck_assert_int_eq(ry_topo_gpu_path(t, 0, 5), RY_PATH_SYS);
    ck_assert_double_eq(ry_topo_nic(t, 0)->gbs, 12.5);
    check_and_close(t);
}
END_TEST

START_TEST(numa2)
{
    struct ry_topo *t = open_ok(in(data, "numa2-hwloc3.xml"));
    ck_assert_int_eq(ry_topo_ngpus(t), 2);
    ck_assert_int_eq(ry_topo_nnics(t), 2);
    ck_assert_str_eq(ry_topo_gpu(t, 0)->name, "NVIDIA A100-PCIE-40GB");
    ck_assert_str_eq(ry_topo_gpu(t, 0)->uuid, "GPU-00000000-1111-2222-3333-444444444444");
    ck_assert_str_eq(ry_topo_gpu(t, 1)->name, "10de:20f1");
    ck_assert_int_eq(ry_topo_gpu(t, 1)->numa, 1);
    ck_assert_str_eq(ry_topo_nic(t, 0)->name, "mlx5_0"); /* and not ib0, which is the same port */
    ck_assert_str_eq(ry_topo_nic(t, 0)->kind, "verbs");
    ck_assert_str_eq(ry_topo_nic(t, 1)->kind, "net");
    ck_assert_int_eq(ry_topo_nic_path(t, 0, 0), RY_PATH_PIX); /* two ports of one real switch */
    ck_assert_int_eq(ry_topo_nic_path(t, 0, 1), RY_PATH_PHB);
    ck_assert_int_eq(ry_topo_nic_path(t, 1, 0), RY_PATH_SYS);
    ck_assert_int_eq(ry_topo_gpu(t, 1)->nearest_nic, 0); /* both are as far: verbs before net */
    check_and_close(t);
}
END_TEST

START_TEST(nogpu)
{
    struct ry_topo *t = open_ok(in(data, "nogpu-hwloc2.xml"));
    ck_assert_int_eq(ry_topo_ngpus(t), 0);
    ck_assert_int_eq(ry_topo_nnics(t), 0);
    check_and_close(t);
}
END_TEST

/* What NCCL writes in odd places: no affinity, numaid -1, short addresses, a NIC that is not on PCI, unknown speeds. */
START_TEST(nccl_oddities)
{
    static const char text[] =
        "<system version=\"1\"><cpu numaid=\"-1\" arch=\"x86_64\">"
        "<pci busid=\"0001:00:00.0\"><gpu dev=\"0\" rank=\"0\"><nvlink target=\"0002:00:00\" count=\"2\" "
        "tclass=\"0x030200\"/>"
        "<nvlink target=\"0009:00:00.0\" count=\"2\" tclass=\"0x030200\"/></gpu></pci>"
        "<pci busid=\"0002:00:00.0\" class=\"0x030200\" vendor=\"0x10de\"><gpu dev=\"1\" rank=\"1\">"
        "<nvlink target=\"0001:00:00.0\" count=\"2\" tclass=\"0x030200\"/></gpu></pci>"
        "<nic><net name=\"eth0\" speed=\"10000\"/></nic></cpu></system>";
    struct ry_topo *t = open_ok(temp_file(text, strlen(text)));
    ck_assert_int_eq(ry_topo_ngpus(t),
                     1); /* the first has neither class nor vendor: "gpu" says what it is, not whose */
    ry_topo_close(t);
    char *fixed = strdup(text), *at = strstr(fixed, "0001:00:00.0\">");
    ck_assert_ptr_nonnull(at);
    char whole[sizeof text + 64];
    snprintf(whole, sizeof whole, "%.*s0001:00:00.0\" vendor=\"0x10de\">%s", (int)(at - fixed), fixed,
             at + strlen("0001:00:00.0\">"));
    free(fixed);
    t = open_ok(temp_file(whole, strlen(whole)));
    ck_assert_int_eq(ry_topo_ngpus(t), 2);
    ck_assert_int_eq(ry_topo_gpu_path(t, 0, 1), RY_PATH_NVL);
    ck_assert_double_eq(ry_topo_gpu_gbs(t, 0, 1), 0); /* no sm: a link of unknown speed */
    ck_assert_int_eq(ry_topo_nnics(t), 1);
    ck_assert_str_eq(ry_topo_nic(t, 0)->name, "eth0");
    ck_assert_str_eq(ry_topo_nic(t, 0)->pci, "");
    ck_assert_double_eq(ry_topo_nic(t, 0)->gbs, 1.25);
    check_and_close(t);
}
END_TEST

/* --- this machine --- */

START_TEST(live)
{
    struct ry_err err = {""};
    uint64_t start = ry_now_ns();
    struct ry_topo *t = ry_topo_open_live(&err);
    ck_assert_msg(t != NULL, "%s", err.msg);
    printf("live topology: %.1f ms, %d GPUs, %d NICs\n", (double)(ry_now_ns() - start) / 1e6, ry_topo_ngpus(t),
           ry_topo_nnics(t));
    ck_assert_str_eq(ry_topo_source(t), "live");
    ck_assert_int_gt(hwloc_get_nbobjs_by_type(ry_topo_hwloc(t), HWLOC_OBJ_PU), 0);
    check_and_close(t);
}
END_TEST

static void *open_in_thread(void *arg)
{
    return ry_topo_open_live(NULL);
}

START_TEST(live_in_threads)
{
    pthread_t th[4];
    cpu_set_t before, after;
    pthread_getaffinity_np(pthread_self(), sizeof before, &before);
    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(pthread_create(&th[i], NULL, open_in_thread, NULL), 0);
    for (int i = 0; i < 4; i++) {
        void *t;
        pthread_join(th[i], &t);
        ck_assert_ptr_nonnull(t);
        ry_topo_close(t);
    }
    pthread_getaffinity_np(pthread_self(), sizeof after, &after);
    ck_assert(CPU_EQUAL(&before, &after));
}
END_TEST

/* Loaded under the real one's name, so that discovery's own dlopen finds it. Returns its count of users. */
static int (*load_fake(const char *machine))(void)
{
    char exe[1024], path[2048];
    int (*users)(void);
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    ck_assert_int_gt((int)n, 0);
    exe[n] = 0;
    snprintf(path, sizeof path, "%s/fake-nvidia-ml.so", dirname(exe));
    void *lib = dlopen(path, RTLD_NOW);
    ck_assert_msg(lib != NULL, "%s", dlerror());
    void *f = dlsym(lib, "fake_nvml_users");
    memcpy(&users, &f, sizeof users);
    ck_assert_ptr_nonnull(f);
    setenv("RY_FAKE_NVML", machine, 1);
    return users;
}

START_TEST(fake_switch)
{
    int (*users)(void) = load_fake("switch");
    struct ry_topo *t = ry_topo_open_live(NULL);
    ck_assert_ptr_nonnull(t);
    ck_assert_int_eq(users(), 0); /* NVML was let go */
    ck_assert_int_eq(ry_topo_ngpus(t), 4);
    for (int i = 0; i < 4; i++) {
        char pci[32];
        const struct ry_topo_gpu *g = ry_topo_gpu(t, i);
        snprintf(pci, sizeof pci, "00fa:e%d:00.0", i);
        ck_assert_str_eq(g->pci, pci);
        ck_assert_double_eq(g->nvlink_gbs, 450); /* 18 links of 25, not of the 26.562 that NVML counts on the wire */
        ck_assert_ptr_eq(ry_topo_gpu_by_pci(t, pci), g);
        for (int j = 0; j < 4; j++) {
            ck_assert_int_eq(ry_topo_gpu_path(t, i, j), i == j ? RY_PATH_LOC : RY_PATH_NVL);
            ck_assert_double_eq(ry_topo_gpu_gbs(t, i, j), i == j ? 0 : 450);
        }
    }
    ck_assert_str_eq(ry_topo_gpu(t, 2)->name, "Fake GPU <2>");
    ck_assert_str_eq(ry_topo_gpu(t, 2)->uuid, "GPU-fa4e0000-0000-0000-0000-000000000002");
    check_and_close(t);
}
END_TEST

START_TEST(fake_mesh)
{
    load_fake("mesh");
    struct ry_topo *t = ry_topo_open_live(NULL);
    ck_assert_ptr_nonnull(t);
    ck_assert_int_eq(ry_topo_ngpus(t), 3);
    ck_assert_double_eq(ry_topo_gpu_gbs(t, 0, 1), 50); /* two links */
    ck_assert_int_eq(ry_topo_gpu_path(t, 1, 2), RY_PATH_NVL);
    ck_assert_double_eq(ry_topo_gpu_gbs(t, 1, 2), 0);         /* of unknown speed */
    ck_assert_int_eq(ry_topo_gpu_path(t, 0, 2), RY_PATH_SYS); /* by the driver's word: the tree does not hold them */
    check_and_close(t);
}
END_TEST

START_TEST(fake_lost)
{
    int (*users)(void) = load_fake("lost");
    struct ry_topo *t = ry_topo_open_live(NULL);
    ck_assert_ptr_nonnull(t);
    ck_assert_int_eq(ry_topo_ngpus(t), 2); /* 0 and 2; their links lead to the lost one */
    ck_assert_int_eq(ry_topo_gpu_path(t, 0, 1), RY_PATH_SYS);
    ck_assert_double_eq(ry_topo_gpu(t, 0)->nvlink_gbs, 0);
    check_and_close(t);
    ck_assert_int_eq(users(), 0);
    load_fake("no driver");
    t = ry_topo_open_live(NULL);
    ck_assert_ptr_nonnull(t);
    ck_assert_int_eq(users(), 0);
    ry_topo_close(t);
}
END_TEST

/* --- broken files --- */

static void refused(const char *path, const char *word)
{
    struct ry_err err = {""};
    struct ry_topo *t = ry_topo_open_file(path, &err);
    ck_assert_msg(t == NULL, "%s was taken", path);
    ck_assert_msg(strstr(err.msg, path) && strstr(err.msg, word), "%s: '%s' lacks '%s'", path, err.msg, word);
    ck_assert_ptr_null(strchr(err.msg, '\n'));
    ck_assert_ptr_null(ry_topo_open_file(path, NULL));
}

static void refused_text(const char *text, const char *word)
{
    refused(temp_file(text, strlen(text)), word);
    unlink(temp_file("", 0));
}

START_TEST(broken_files)
{
    refused("/nonexistent/topology.xml", "No such file");
    refused(data, "folder");
    refused(in(data, "truncated-hwloc.xml"), "complete?");
    refused(in(data, "not-a-topology.xml"), "<html>");
    refused_text("", "empty");
    refused_text("hello", "no readable XML");
    refused_text("<?xml version=\"1.0\" encoding=\"UTF-7\"?>\n<topology version=\"2.0\"/>", "UTF-8");
    refused_text("<?xml version=\"1.0\" encoding", "XML");
    refused_text("<topology version=\"2.0\"/>", "0 objects");
    refused_text("<topology version=\"3.0\"/>", "0 objects");
    refused_text("<topology version=\"9.0\"><object type=\"Machine\"/></topology>", "version");
    refused_text("<topology version=\"x\"><object type=\"Machine\"/></topology>", "version");
    refused_text("<topology><object type=\"Machine\"/></topology>", "hwloc 1");
    refused_text("<topology version=\"2.0\"><object type=\"Machine\"/></topology>", "cpuset");
    refused_text("<topology version=\"2.0\"><object type=\"Teapot\"/></topology>", "Teapot");
    refused_text("<system version=\"1\"/>", "no <cpu>");
    refused_text("<system version=\"1\"><cpu numaid=\"0\"><pci busid=\"here\"/></cpu></system>", "busid");
    refused_text("<system version=\"1\"><cpu numaid=\"0\"/><cpu numaid=\"0\"/></system>", "several hosts");
    refused_text("<system version=\"1\"><cpu numaid=\"0\"/><cpu/></system>", "numaid");
}
END_TEST

START_TEST(formats_by_name)
{
    static const char *const names[] = {"text", "json", "xml", "svg"};
    struct ry_err err = {""};
    enum ry_topo_format f;
    for (int i = 0; i < 4; i++) {
        ck_assert_int_eq(ry_topo_format_parse(names[i], &f, &err), 0);
        ck_assert_int_eq(f, i);
    }
    ck_assert_int_eq(ry_topo_format_parse("png", &f, &err), -1);
    ck_assert_ptr_nonnull(strstr(err.msg, "'png'"));
    ck_assert_ptr_nonnull(strstr(err.msg, "svg"));
    ck_assert_str_eq(ry_path_name(RY_PATH_NVL), "NVL");
    ck_assert_str_eq(ry_path_name(RY_PATH_UNKNOWN), "?");
    ck_assert_str_eq(ry_path_name((enum ry_path)99), "?");
}
END_TEST

START_TEST(full_disk)
{
    struct ry_topo *t = open_ok(in(data, "rail8-nccl.xml"));
    for (int i = 0; i < 4; i++) {
        struct ry_err err = {""};
        FILE *f = fopen("/dev/full", "w");
        ck_assert_ptr_nonnull(f);
        ck_assert_int_eq(ry_topo_write(t, (enum ry_topo_format)i, f, &err), -1);
        ck_assert_str_ne(err.msg, "");
        fclose(f);
    }
    ry_topo_close(t);
}
END_TEST

static char *slurp(const char *path, size_t *n)
{
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    char *buf = malloc(1 << 20);
    *n = fread(buf, 1, 1 << 20, f);
    fclose(f);
    return buf;
}

/* Opened or refused with a reason, and what is opened can be written: never a crash. */
static void survives(const char *bytes, size_t n)
{
    struct ry_err err = {""};
    struct ry_topo *t = ry_topo_open_file(temp_file(bytes, n), &err);
    if (!t) {
        ck_assert_str_ne(err.msg, "");
        return;
    }
    for (int i = 0; i < 4; i++)
        free(written(t, (enum ry_topo_format)i));
    ry_topo_close(t);
}

static const char *const to_corrupt[] = {"numa2-hwloc3.xml", "nogpu-hwloc2.xml", "rail8-nccl.xml", "mesh8-nccl.xml"};

START_TEST(every_truncation)
{
    size_t n;
    char *bytes = slurp(in(data, to_corrupt[_i]), &n);
    size_t step = n < 5000 ? 1 : 5; /* every one of the shorter files */
    for (size_t cut = 0; cut < n; cut += step)
        survives(bytes, cut);
    free(bytes);
    unlink(temp_file("", 0));
}
END_TEST

/* hwloc leaks what it had read of a file when it refuses the rest; that is not ours to report. Sanitizer builds have
 * these. */
void __lsan_disable(void) __attribute__((weak));

START_TEST(random_damage)
{
    size_t n;
    if (__lsan_disable)
        __lsan_disable();
    char *bytes = slurp(in(data, to_corrupt[_i]), &n), *copy = malloc(n);
    srandom(seed + (unsigned)_i);
    for (int round = 0; round < 150; round++) {
        memcpy(copy, bytes, n);
        for (long k = random() % 4; k >= 0; k--) {
            size_t at = (size_t)random() % n;
            if (random() % 3) {
                while (at < n && (copy[at] < '0' || copy[at] > '9'))
                    at++;
                if (at < n)
                    copy[at] = (char)('0' + random() % 10); /* stays XML, tells something else */
            } else {
                copy[at] = (char)(copy[at] ^ 1 << random() % 8);
            }
        }
        survives(copy, n);
    }
    free(bytes);
    free(copy);
    unlink(temp_file("", 0));
}
END_TEST

/* What random damage has found: hwloc would crash. */
START_TEST(found_damage)
{
    static const char *const damage[][2] = {{"allowed_nodeset=\"0x00000003\"", "allowed_nodeset=\"6x00000003\""},
                                            {"allowed_cpuset=\"0x000000ff\"", "allowed_cpuset=\"0xff000000\""}};
    size_t n;
    char *bytes = slurp(in(data, "nogpu-hwloc2.xml"), &n);
    bytes[n] = 0;
    for (size_t i = 0; i < sizeof damage / sizeof *damage; i++) {
        char *copy = strdup(bytes), *at = strstr(copy, damage[i][0]);
        struct ry_err err = {""};
        ck_assert_ptr_nonnull(at);
        memcpy(at, damage[i][1], strlen(damage[i][1]));
        ck_assert_ptr_null(ry_topo_open_file(temp_file(copy, n), &err));
        ck_assert_msg(strstr(err.msg, "of which nothing is allowed"), "%s", err.msg);
        free(copy);
    }
    free(bytes);
    unlink(temp_file("", 0));
}
END_TEST

int main(void)
{
    const char *set = getenv("RY_TEST_SEED");
    seed = set ? (unsigned)strtoul(set, NULL, 0) : (unsigned)time(NULL);
    printf("RY_TEST_SEED=%u\n", seed);
    data = getenv("RY_TEST_DATA") ? getenv("RY_TEST_DATA") : "tests/data";
    shared = getenv("RY_SHARED") ? getenv("RY_SHARED") : "../shared";
    Suite *suite = suite_create("topo");
    TCase *t = tcase_create("machines");
    tcase_add_test(t, dgx2);
    tcase_add_test(t, p4d);
    tcase_add_test(t, g5);
    tcase_add_test(t, power8);
    tcase_add_test(t, gb10);
    tcase_add_test(t, rail8);
    tcase_add_test(t, mesh8);
    tcase_add_test(t, numa2);
    tcase_add_test(t, nogpu);
    tcase_add_test(t, nccl_oddities);
    tcase_set_timeout(t, 60);
    suite_add_tcase(suite, t);
    t = tcase_create("live");
    tcase_add_test(t, live);
    tcase_add_test(t, live_in_threads);
    tcase_add_test(t, fake_switch);
    tcase_add_test(t, fake_mesh);
    tcase_add_test(t, fake_lost);
    tcase_set_timeout(t, 60);
    suite_add_tcase(suite, t);
    t = tcase_create("broken");
    tcase_add_test(t, broken_files);
    tcase_add_test(t, formats_by_name);
    tcase_add_test(t, full_disk);
    int files = (int)(sizeof to_corrupt / sizeof *to_corrupt);
    tcase_add_loop_test(t, every_truncation, 0, files);
    tcase_add_loop_test(t, random_damage, 0, files);
    tcase_add_test(t, found_damage);
    tcase_set_timeout(t, 110);
    suite_add_tcase(suite, t);
    SRunner *r = srunner_create(suite);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
