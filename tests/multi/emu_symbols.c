/*
 * emu_symbols.c: the emulated library's symbols: every public function is weak and has a strong pnccl twin that is the
 * same code, ncclCommInitAll calls public functions where somebody in front sees them, and the variant that poses as
 * NCCL 2.18 lacks what that lacked. Run alone with the path of each library; links neither.
 */
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <nccl.h>

static const char *const since_2_18[] = {"CommInitRank",
                                         "CommInitRankConfig",
                                         "CommInitAll",
                                         "CommSplit",
                                         "CommFinalize",
                                         "CommDestroy",
                                         "CommAbort",
                                         "CommCount",
                                         "CommCuDevice",
                                         "CommUserRank",
                                         "CommGetAsyncError",
                                         "GetVersion",
                                         "GetUniqueId",
                                         "GetErrorString",
                                         "GetLastError",
                                         "GroupStart",
                                         "GroupEnd",
                                         "Send",
                                         "Recv",
                                         "AllGather",
                                         "AllReduce",
                                         "ReduceScatter",
                                         "Reduce",
                                         "Broadcast",
                                         "Bcast",
                                         "RedOpCreatePreMulSum",
                                         "RedOpDestroy"};
static const char *const later[] = {"CommInitRankScalable",
                                    "CommShrink",
                                    "CommRevoke",
                                    "CommRegister",
                                    "CommDeregister",
                                    "CommWindowRegister",
                                    "CommWindowDeregister",
                                    "MemAlloc",
                                    "MemFree",
                                    "GroupSimulateEnd",
                                    "AlltoAll",
                                    "Gather",
                                    "Scatter"};

static int failures, seen_ids, seen_starts;
static void *lib;

#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #cond);                                                          \
            printf(__VA_ARGS__);                                                                                       \
            putchar('\n');                                                                                             \
            failures++;                                                                                                \
        }                                                                                                              \
    } while (0)

/* In front of the library's own, as a preloaded library would be (the program is linked with -rdynamic). */
__attribute__((visibility("default"))) ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    ncclResult_t (*real)(ncclUniqueId *);
    *(void **)&real = dlsym(lib, "pncclGetUniqueId");
    seen_ids++;
    return real(id);
}

#pragma GCC diagnostic ignored "-Wmissing-prototypes"
__attribute__((visibility("default"))) ncclResult_t ncclGroupStart(void)
{
    ncclResult_t (*real)(void);
    *(void **)&real = dlsym(lib, "pncclGroupStart");
    seen_starts++;
    return real();
}

static void twins(const char *const *names, size_t n, bool wanted)
{
    char name[64];
    for (size_t i = 0; i < n; i++) {
        snprintf(name, sizeof name, "pnccl%s", names[i]);
        void *p = dlsym(lib, name), *w = dlsym(lib, name + 1);
        CHECK(wanted ? p && w : !p && !w, "%s: %p and %p", name, p, w);
        CHECK(p == w, "%s is other code than its twin", name);
    }
}

int main(int argc, char **argv)
{
    if (argc != 3 || !(lib = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL)))
        return printf("%s: %s\n", argv[0], argc == 3 ? dlerror() : "usage: LIBRARY VERSION"), 2;
    int version = 0, n = 0, (*emu)(void), want = 0;
    sscanf(argv[2], "%d", &want);
    ncclResult_t (*get_version)(int *), (*init_all)(ncclComm_t *, int, const int *), (*count)(ncclComm_t, int *),
        (*destroy)(ncclComm_t);
    *(void **)&emu = dlsym(lib, "railyard_emu_version");
    *(void **)&get_version = dlsym(lib, "pncclGetVersion");
    *(void **)&init_all = dlsym(lib, "pncclCommInitAll");
    *(void **)&count = dlsym(lib, "ncclCommCount");
    *(void **)&destroy = dlsym(lib, "ncclCommDestroy");
    CHECK(emu && emu() == 1, "railyard_emu_version");
    CHECK(get_version && !get_version(&version) && version == want, "version %d", version);
    twins(since_2_18, sizeof since_2_18 / sizeof *since_2_18, true);
    twins(later, sizeof later / sizeof *later, want > 22800);
    CHECK(!dlsym(lib, "ry_emu_run"), "an inner function is exported");
    ncclComm_t comms[2];
    CHECK(init_all && !init_all(comms, 2, NULL), "ncclCommInitAll failed");
    CHECK(seen_ids == 1 && seen_starts == 1, "the public functions were called %d and %d times", seen_ids, seen_starts);
    CHECK(!failures && !count(comms[1], &n) && n == 2, "%d ranks", n);
    for (int i = 0; i < 2 && !failures; i++)
        CHECK(!destroy(comms[i]), "ncclCommDestroy failed");
    return failures != 0;
}
