/*
 * nccl_profiler.h: the part of NCCL's profiler interface, versions 4 to 6, that profiler.c speaks.
 *
 * Owns: the layouts, written down from the documented ABI (NCCL's plugins/profiler/README.md), as far as they are read
 * here. NCCL opens the library that NCCL_PROFILER_PLUGIN names and takes the newest of ncclProfiler_v6 (2.29 on), _v5
 * (2.28) and _v4 (2.26, 2.27) that both know. Types of NCCL appear as plain integers and pointers: nothing of its
 * headers is needed.
 *
 * Version 4 tells of point-to-point calls when they are launched: with peer and count, in groups of what one kernel
 * does. Version 5 tells before that of the job's own groups and calls (the stream, but no peer), and every later event
 * names the one that it belongs to. Version 6 adds what copy engines do.
 */
#ifndef RY_PLUGIN_NCCL_PROFILER_H
#define RY_PLUGIN_NCCL_PROFILER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum ry_prof_type {
    RY_PROF_GROUP = 1 << 0, /* what one kernel does */
    RY_PROF_COLL = 1 << 1,
    RY_PROF_P2P = 1 << 2,
    RY_PROF_GROUP_API = 1 << 8, /* since version 5: the job's outermost group */
    RY_PROF_COLL_API = 1 << 9,
    RY_PROF_P2P_API = 1 << 10,
    RY_PROF_CE_COLL = 1 << 12, /* since version 6 */
};

/* An event that starts. The three versions lay it out alike as far as it is described here. */
struct ry_prof_event {
    union {
        uint8_t v4; /* what follows it is not initialized */
        uint64_t v5;
    } type;
    void *parent; /* what the plugin returned for the event above: v4 GROUP over P2P; v5 GROUP_API over P2P_API over P2P
                   */
    int rank;
    union {
        struct {
            bool captured;
            int depth;
        } group_api;
        struct {
            const char *func;
            size_t count;
            const char *type;
            int root;
            void *stream;
            bool captured;
        } coll_api;
        struct {
            const char *func;
            size_t count;
            const char *type;
            void *stream;
            bool captured;
        } p2p_api;
        struct {
            uint64_t number;
            const char *func;
            const void *send;
            void *recv;
            size_t count;
            int root;
            const char *type;
        } coll; /* and CE_COLL */
        struct {
            const char *func;
            void *buf;
            const char *type;
            size_t count;
            int peer;
        } p2p;
    };
};
_Static_assert(sizeof(void *) != 8 ||
                   (offsetof(struct ry_prof_event, parent) == 8 && offsetof(struct ry_prof_event, p2p) == 24 &&
                    offsetof(struct ry_prof_event, p2p.peer) == 56 &&
                    offsetof(struct ry_prof_event, p2p_api.stream) == 48),
               "laid out as NCCL does");

/* Results are ncclResult_t: 0 is success. The logger is not used. Strings and descriptors are valid during the call. */
struct ry_prof_v4 {
    const char *name;
    int (*init)(void **context, int *mask, const char *comm_name, uint64_t comm_id, int nnodes, int nranks, int rank,
                void *logger);
    int (*start)(void *context, void **handle, struct ry_prof_event *event);
    int (*stop)(void *handle);
    int (*record)(void *handle, int state, void *args);
    int (*finalize)(void *context);
};

struct ry_prof_v5 { /* 6 has the same functions */
    const char *name;
    int (*init)(void **context, uint64_t comm_id, int *mask, const char *comm_name, int nnodes, int nranks, int rank,
                void *logger);
    int (*start)(void *context, void **handle, struct ry_prof_event *event);
    int (*stop)(void *handle);
    int (*record)(void *handle, int state, void *args);
    int (*finalize)(void *context);
};

extern struct ry_prof_v4 ncclProfiler_v4;
extern struct ry_prof_v5 ncclProfiler_v5, ncclProfiler_v6;

#endif
