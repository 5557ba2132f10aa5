/* fake_cudart.h: calls that free memory and return 17, after telling the test. */
#ifndef RY_TESTS_FAKE_CUDART_H
#define RY_TESTS_FAKE_CUDART_H

extern void (*fake_cudart_entered)(const char *name);
int cudaFree(void *p);
int cudaFreeHost(void *p);
int cudaHostUnregister(void *p);
int cuMemFreeHost(void *p);

#endif
