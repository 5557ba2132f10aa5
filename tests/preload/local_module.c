/*
 * local_module.c: what PyTorch's wheels look like to the preload: a module that links NCCL, opened in a local scope by a
 * program that does not, so that dlsym(RTLD_NEXT) finds nothing. Exports run(): one exchange on a communicator of one rank.
 */
#include <nccl.h>
#include <string.h>

int run(void);

__attribute__((visibility("default"))) int run(void)
{
    ncclUniqueId id;
    ncclComm_t comm;
    int out = 42, in = 0;
    if (ncclGetUniqueId(&id) != ncclSuccess || ncclCommInitRank(&comm, 1, id, 0) != ncclSuccess)
        return 1;
    if (ncclGroupStart() != ncclSuccess || ncclSend(&out, 1, ncclInt32, 0, comm, NULL) != ncclSuccess ||
        ncclRecv(&in, 1, ncclInt32, 0, comm, NULL) != ncclSuccess || ncclGroupEnd() != ncclSuccess)
        return 2;
    if (ncclCommDestroy(comm) != ncclSuccess)
        return 3;
    return in == 42 ? 0 : 4;
}
