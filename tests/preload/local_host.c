/* local_host.c: opens the module named by its argument in a local scope and runs it; with no argument does nothing at all. */
#include <dlfcn.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    if (argc < 2)
        return 0;
    void *module = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    int (*run)(void) = module ? (int (*)(void))dlsym(module, "run") : NULL;
    if (!run) {
        fprintf(stderr, "%s\n", dlerror());
        return 99;
    }
    return run();
}
