/*
 * cmd_bench.c: `railyard bench`: becomes railyard-bench, which is a program of its own since it links NCCL and this
 * tool does not. Options, help and the advice on how to start it are all there.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "command.h"
#include "where.h"

int cmd_bench(int argc, char **argv)
{
    char path[4096];
    struct ry_err err;
    if (ry_where(RY_WHERE_BENCH, path, &err))
        return command_fail(argv[0], "%s", err.msg);
    execv(path, argv);
    return command_fail(argv[0], "cannot run %s: %s", path, strerror(errno));
}
