/*
 * nccl_abi.h: the part of NCCL's binary interface that the preload stands in front of, for NCCL 2.18 to 2.30, whatever
 * nccl.h it is built with.
 *
 * Owns: the list of intercepted functions (RY_NCCL_FUNCTIONS, with the release that first has each:
 * tests/nccl_versions.py checks them against real libraries), and declarations of what an older header lacks. C allows a
 * function to be declared twice alike, so functions are simply declared again; types need a version check.
 */
#ifndef RY_PLUGIN_NCCL_ABI_H
#define RY_PLUGIN_NCCL_ABI_H

#include <nccl.h>
#include <stddef.h>

#if NCCL_VERSION_CODE < NCCL_VERSION(2, 18, 0)
#error "nccl.h is older than 2.18"
#endif
#if NCCL_VERSION_CODE < NCCL_VERSION(2, 22, 0)
typedef struct ncclSimInfo ncclSimInfo_t;
#endif
#if NCCL_VERSION_CODE < NCCL_VERSION(2, 27, 0)
typedef struct ncclWindow_vidmem *ncclWindow_t;
#endif

/* clang-format off */
#define RY_NCCL_FUNCTIONS(F)                                                                                            \
    /* 2.18 or before */                                                                                                \
    F(ncclGetUniqueId) F(ncclCommInitRank) F(ncclCommInitRankConfig) F(ncclCommInitAll) F(ncclCommSplit)                \
    F(ncclCommFinalize) F(ncclCommDestroy) F(ncclCommAbort) F(ncclCommGetAsyncError) F(ncclGroupStart) F(ncclGroupEnd)  \
    F(ncclSend) F(ncclRecv) F(ncclAllGather) F(ncclAllReduce) F(ncclBroadcast) F(ncclBcast) F(ncclReduce)               \
    F(ncclReduceScatter)                                                                                                \
    /* 2.22 */ F(ncclGroupSimulateEnd)                                                                                  \
    /* 2.23 */ F(ncclCommInitRankScalable)                                                                              \
    /* 2.27 */ F(ncclCommShrink)                                                                                        \
    /* 2.28.3 */ F(ncclAlltoAll) F(ncclGather) F(ncclScatter)                                                           \
    /* 2.28.7 */ F(ncclCommRevoke)                                                                                      \
    /* 2.29 */ F(ncclPutSignal) F(ncclSignal) F(ncclWaitSignal)
/* clang-format on */

/* declared with () in nccl.h, which in C is no prototype */
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);
ncclResult_t ncclGroupSimulateEnd(ncclSimInfo_t *info);
ncclResult_t ncclCommInitRankScalable(ncclComm_t *newcomm, int nranks, int rank, int nids, ncclUniqueId *ids,
                                      ncclConfig_t *config);
ncclResult_t ncclCommShrink(ncclComm_t comm, int *exclude, int nexclude, ncclComm_t *newcomm, ncclConfig_t *config,
                            int flags);
ncclResult_t ncclCommRevoke(ncclComm_t comm, int flags);
ncclResult_t ncclAlltoAll(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                          cudaStream_t stream);
ncclResult_t ncclGather(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                        cudaStream_t stream);
ncclResult_t ncclScatter(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                         cudaStream_t stream);
ncclResult_t ncclPutSignal(const void *local, size_t count, ncclDataType_t type, int peer, ncclWindow_t window,
                           size_t offset, int signal, int ctx, unsigned int flags, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclSignal(int peer, int signal, int ctx, unsigned int flags, ncclComm_t comm, cudaStream_t stream);
struct ry_nccl_wait_signal; /* ncclWaitSignalDesc_t, of which only the address passes through here */
#if NCCL_VERSION_CODE < NCCL_VERSION(2, 29, 0)
typedef struct ry_nccl_wait_signal ncclWaitSignalDesc_t;
#endif
ncclResult_t ncclWaitSignal(int n, ncclWaitSignalDesc_t *descs, ncclComm_t comm, cudaStream_t stream);

/* The head of ncclConfig_t as laid out since 2.27: what we read of the job's config, whatever header it was built with. */
struct ry_nccl_config {
    size_t size;
    unsigned int magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share, traffic_class;
    const char *comm_name;
};
#define RY_NCCL_CONFIG_MAGIC 0xcafebeefu

/* Bytes of one element; 0 for a type that is newer than we are. */
static inline unsigned ry_nccl_type_bytes(int type)
{
    /* int8 uint8 int32 uint32 int64 uint64 fp16 fp32 fp64 bf16 fp8e4m3 fp8e5m2 */
    static const unsigned char bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return (unsigned)type < sizeof bytes ? bytes[type] : 0;
}

#endif
