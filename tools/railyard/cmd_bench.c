/*
 * cmd_bench.c: `railyard bench` and `railyard calibrate`: become railyard-bench and railyard-calibrate, which are programs of
 * their own since they link NCCL and this tool does not. Options, help and the advice on how to start them are all there.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "command.h"
#include "where.h"

static int become(enum ry_where program, char **argv)
{
    char path[4096], emu[4096];
    struct ry_err err;
    if (ry_where(program, path, &err))
        return command_fail(argv[0], "%s", err.msg);
    /*
     * Started as no rank of a job, it gives help or advice. That must not fail for lack of an NCCL to load: let it find
     * the emulator's. A rank of a job meets whatever NCCL the job has.
     */
    if (!getenv("RANK") && !ry_where(RY_WHERE_EMU_DIR, emu, NULL)) {
        const char *old = getenv("LD_LIBRARY_PATH");
        char *all;
        if (asprintf(&all, "%s%s%s", old ? old : "", old && *old ? ":" : "", emu) < 0)
            return command_fail(argv[0], "out of memory");
        setenv("LD_LIBRARY_PATH", all, 1);
        free(all);
    }
    execv(path, argv);
    return command_fail(argv[0], "cannot run %s: %s", path, strerror(errno));
}

int cmd_bench(int argc, char **argv)
{
    return become(RY_WHERE_BENCH, argv);
}

int cmd_calibrate(int argc, char **argv)
{
    return become(RY_WHERE_CALIBRATE, argv);
}
