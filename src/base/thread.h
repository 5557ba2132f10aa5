/*
 * thread.h: starting a thread inside somebody else's process.
 *
 * Owns: that no signal is handled on it: those sent to the process are for the job's threads, whatever mask the thread
 * that happens to start ours has.
 */
#ifndef RY_BASE_THREAD_H
#define RY_BASE_THREAD_H

#include <pthread.h>
#include <signal.h>

/** pthread_create() with all signals blocked: 0 or an errno. */
static inline int ry_thread_start(pthread_t *thread, void *(*run)(void *), void *arg)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int e = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return e;
}

#endif
