/*
 * blocked_launches.cu: which CUDA calls of a job's thread keep another thread from launching, while a stream waits for
 * a value (cuStreamWaitValue32) that only those launches release.
 *
 *   nvcc -O2 -arch=native -o blocked_launches tests/gpu/blocked_launches.cu -lcuda && ./blocked_launches
 *   CUDA_MODULE_LOADING=EAGER ./blocked_launches
 *   CUDA_DEVICE_MAX_CONNECTIONS=1 ./blocked_launches queues     (and 32: which streams such a wait keeps from running)
 *
 * Each case is a process of its own with an alarm of 4 s: one that hangs would hang a job whose exchanges are carried
 * out by a thread of Railyard's while the job's stream waits for them. What was found is in docs/holding-the-host.md.
 */
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>
#define CK(x)                                                                                                          \
    do {                                                                                                               \
        cudaError_t e_ = (x);                                                                                          \
        if (e_) {                                                                                                      \
            fprintf(stderr, "%s: %s\n", #x, cudaGetErrorString(e_));                                                   \
            exit(3);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define CU(x)                                                                                                          \
    do {                                                                                                               \
        CUresult e_ = (x);                                                                                             \
        if (e_) {                                                                                                      \
            fprintf(stderr, "%s: %d\n", #x, e_);                                                                       \
            exit(3);                                                                                                   \
        }                                                                                                              \
    } while (0)
__global__ void work(int *p)
{
    atomicAdd(p, 1);
}
__global__ void first(int *p)
{
    atomicAdd(p, 2);
}
template <int N> __global__ void lazy(int *p)
{
    atomicAdd(p, N);
}
static double now()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
static int *d, *big;
static volatile unsigned *flag;
static CUdeviceptr dflag;
static cudaStream_t job, own;
static void *host, *pageable, *other_pageable, *pooled;
static volatile int started;
static double t_launch;
static void *worker(void *)
{
    cudaSetDevice(0);
    while (!started)
        usleep(100);
    usleep(100000); // the other thread sits in its call by now
    double t = now();
    for (int i = 0; i < 20; i++)
        work<<<8, 128, 0, own>>>(d);
    CK(cudaGetLastError());
    t_launch = (now() - t) * 1e6;
    CU(cuStreamWriteValue32(own, dflag, 1, 0));
    return 0;
}
static void call(const char *w)
{
    if (!strcmp(w, "cudaMalloc")) {
        void *p;
        CK(cudaMalloc(&p, 64 << 20));
    } else if (!strcmp(w, "cudaFree"))
        CK(cudaFree(big));
    else if (!strcmp(w, "cudaDeviceSynchronize"))
        CK(cudaDeviceSynchronize());
    else if (!strcmp(w, "cudaStreamSynchronize"))
        CK(cudaStreamSynchronize(job));
    else if (!strcmp(w, "cudaMemcpy_pageable"))
        CK(cudaMemcpy(pageable, d, 4, cudaMemcpyDeviceToHost));
    else if (!strcmp(w, "cudaMemcpyAsync_job_pageable"))
        CK(cudaMemcpyAsync(pageable, d, 1 << 20, cudaMemcpyDeviceToHost, job));
    else if (!strcmp(w, "cudaMemcpyAsync_job_pinned_sync")) {
        CK(cudaMemcpyAsync(host, d, 1 << 20, cudaMemcpyDeviceToHost, job));
        CK(cudaStreamSynchronize(job));
    } else if (!strcmp(w, "cudaHostAlloc")) {
        void *p;
        CK(cudaHostAlloc(&p, 16 << 20, 0));
    } else if (!strcmp(w, "cudaFreeHost"))
        CK(cudaFreeHost(host));
    else if (!strcmp(w, "cudaEventSynchronize")) {
        cudaEvent_t e;
        CK(cudaEventCreate(&e));
        CK(cudaEventRecord(e, job));
        CK(cudaEventSynchronize(e));
    } else if (!strcmp(w, "cudaEventSynchronize_blocking")) {
        cudaEvent_t e;
        CK(cudaEventCreateWithFlags(&e, cudaEventBlockingSync));
        CK(cudaEventRecord(e, job));
        CK(cudaEventSynchronize(e));
    } else if (!strcmp(w, "lazy_kernel_job")) {
        lazy<7><<<1, 1, 0, job>>>(d);
        CK(cudaGetLastError());
        CK(cudaStreamSynchronize(job));
    } else if (!strcmp(w, "legacy_stream_kernel")) {
        first<<<1, 1>>>(d);
        CK(cudaGetLastError());
        CK(cudaStreamSynchronize(0));
    } else if (!strcmp(w, "many_launches_job")) {
        for (int i = 0; i < 20000; i++)
            work<<<1, 1, 0, job>>>(d);
        CK(cudaStreamSynchronize(job));
    } else if (!strcmp(w, "cudaMallocAsync_job")) {
        void *p;
        CK(cudaMallocAsync(&p, 512u << 20, job));
        CK(cudaFreeAsync(p, job));
        CK(cudaStreamSynchronize(job));
    } else if (!strcmp(w, "cudaMemset_sync")) {
        CK(cudaMemset(d, 0, 4));
        CK(cudaDeviceSynchronize());
    } else if (!strcmp(w, "cudaStreamCreate_Destroy")) {
        cudaStream_t s;
        CK(cudaStreamCreate(&s));
        CK(cudaStreamDestroy(s));
    } else if (!strcmp(w, "cudaStreamDestroy_job"))
        CK(cudaStreamDestroy(job));
    else if (!strcmp(w, "cudaHostUnregister"))
        CK(cudaHostUnregister(pageable));
    else if (!strcmp(w, "cudaHostRegister"))
        CK(cudaHostRegister(other_pageable, 1 << 20, 0));
    else if (!strcmp(w, "cudaFreeAsync_other")) {
        CK(cudaFreeAsync(pooled, own));
        cudaMemPool_t pool;
        CK(cudaDeviceGetDefaultMemPool(&pool, 0));
        CK(cudaMemPoolTrimTo(pool, 0));
    } else if (!strcmp(w, "cudaFuncSetAttribute"))
        CK(cudaFuncSetAttribute(lazy<9>, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536));
    else if (!strcmp(w, "cudaMemGetInfo")) {
        size_t a, b;
        CK(cudaMemGetInfo(&a, &b));
    } else if (!strcmp(w, "cudaEventQuery_spin")) {
        cudaEvent_t e;
        CK(cudaEventCreate(&e));
        CK(cudaEventRecord(e, job));
        while (cudaEventQuery(e) == cudaErrorNotReady)
            ;
    } else
        exit(4);
}
static void one(const char *w)
{
    alarm(4);
    CK(cudaSetDevice(0));
    CK(cudaMalloc(&d, 4 << 20));
    CK(cudaMalloc(&big, 256 << 20));
    CK(cudaHostAlloc(&host, 1 << 20, 0));
    pageable = aligned_alloc(4096, 1 << 20);
    other_pageable = aligned_alloc(4096, 1 << 20);
    void *f;
    CK(cudaHostAlloc(&f, 4096, cudaHostAllocMapped));
    flag = (volatile unsigned *)f;
    *flag = 0;
    CU(cuMemHostGetDevicePointer(&dflag, f, 0));
    CK(cudaStreamCreateWithFlags(&job, cudaStreamNonBlocking));
    CK(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
    if (!strcmp(w, "cudaHostUnregister"))
        CK(cudaHostRegister(pageable, 1 << 20, 0));
    CK(cudaMallocAsync(&pooled, 64 << 20, own));
    work<<<1, 1, 0, own>>>(d);
    work<<<1, 1, 0, job>>>(d);
    CK(cudaDeviceSynchronize());
    pthread_t t;
    pthread_create(&t, 0, worker, 0);
    double a = now();
    CU(cuStreamWaitValue32(job, dflag, 1, CU_STREAM_WAIT_VALUE_GEQ));
    double gate = (now() - a) * 1e6;
    work<<<8, 128, 0, job>>>(d);
    started = 1;
    double b = now();
    call(w);
    double took = now() - b;
    pthread_join(t, 0);
    printf("%-34s ok      call %8.1f ms, 20 launches of the other thread %8.1f us, enqueueing the wait %.1f us\n", w,
           took * 1e3, t_launch, gate);
    fflush(stdout);
    _exit(0);
}
/* Of 64 streams, how many, and which in the order of their making, a wait on one of them keeps from running: those that share its
   hardware queue. Nothing is at stake, the host ends the wait. `high`: the waiting stream has the default priority, the others the
   highest; `legacy`: it is the one that launches without a stream go to. */
static void queues(bool high, bool legacy)
{
    enum { N = 64 };
    int least, most, held = 0;
    cudaStream_t s[N], waits = 0;
    void *f;
    alarm(20);
    CK(cudaSetDevice(0));
    CK(cudaDeviceGetStreamPriorityRange(&least, &most));
    CK(cudaHostAlloc(&f, 4096, cudaHostAllocMapped));
    memset(f, 0, 4096);
    volatile unsigned *word = (volatile unsigned *)f;
    CU(cuMemHostGetDevicePointer(&dflag, f, 0));
    if (!legacy)
        CK(cudaStreamCreateWithFlags(&waits, cudaStreamNonBlocking));
    for (int i = 0; i < N; i++)
        CK(cudaStreamCreateWithPriority(&s[i], cudaStreamNonBlocking, high ? most : least));
    CU(cuStreamWaitValue32(waits, dflag, 1, CU_STREAM_WAIT_VALUE_GEQ));
    for (int i = 0; i < N; i++)
        CU(cuStreamWriteValue32(s[i], dflag + 4 * (i + 1), 1, 0));
    usleep(200000);
    char which[8 * N] = "";
    for (int i = 0; i < N; i++)
        if (!word[i + 1]) {
            held++;
            sprintf(which + strlen(which), " %d", i);
        }
    *word = 1;
    CK(cudaDeviceSynchronize());
    const char *n = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
    printf("a wait on %s keeps %d of %d other streams %sfrom running (CUDA_DEVICE_MAX_CONNECTIONS %s):%s\n",
           legacy ? "the legacy stream" : "one stream", held, N, high ? "of the highest priority " : "", n ? n : "not set",
           which);
    fflush(stdout);
    _exit(0);
}
int main(int argc, char **argv)
{
    for (int i = 0; i < 4; i++) {
        fflush(stdout);
        pid_t p = fork();
        if (!p)
            queues(i & 1, i & 2);
        waitpid(p, 0, 0);
    }
    if (argc > 1 && !strcmp(argv[1], "queues"))
        return 0;
    const char *all[] = {"cudaMalloc",
                         "cudaFree",
                         "cudaDeviceSynchronize",
                         "cudaStreamSynchronize",
                         "cudaMemcpy_pageable",
                         "cudaMemcpyAsync_job_pageable",
                         "cudaMemcpyAsync_job_pinned_sync",
                         "cudaHostAlloc",
                         "cudaFreeHost",
                         "cudaEventSynchronize",
                         "cudaEventSynchronize_blocking",
                         "lazy_kernel_job",
                         "legacy_stream_kernel",
                         "many_launches_job",
                         "cudaMallocAsync_job",
                         "cudaMemset_sync",
                         "cudaStreamCreate_Destroy",
                         "cudaStreamDestroy_job",
                         "cudaMemGetInfo",
                         "cudaEventQuery_spin",
                         "cudaHostUnregister",
                         "cudaHostRegister",
                         "cudaFreeAsync_other",
                         "cudaFuncSetAttribute"};
    for (const char *w : all) {
        fflush(stdout);
        pid_t p = fork();
        if (!p)
            one(w);
        int st;
        waitpid(p, &st, 0);
        if (WIFSIGNALED(st))
            printf("%-34s HANGS (signal %d)\n", w, WTERMSIG(st));
        else if (WEXITSTATUS(st))
            printf("%-34s failed %d\n", w, WEXITSTATUS(st));
    }
}
