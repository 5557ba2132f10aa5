/* where.c: see where.h. */
#include "where.h"

#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int ry_where(enum ry_where what, char out[4096], struct ry_err *err)
{
    /* relative to the folder of the tool: as installed, then as built */
    static const char *const places[][2] = {
        [RY_WHERE_PRELOAD] = {RY_BIN_TO_LIB "/librailyard.so", "../../plugin/librailyard.so"},
        [RY_WHERE_EMU_DIR] = {RY_BIN_TO_LIB "/railyard/emu", "../emu"},
        [RY_WHERE_BENCH] = {RY_BIN_TO_LIBEXEC "/railyard/railyard-bench", "../bench/railyard-bench"},
        [RY_WHERE_CALIBRATE] = {RY_BIN_TO_LIBEXEC "/railyard/railyard-calibrate", "../calibrate/railyard-calibrate"},
        [RY_WHERE_TOOL_DIR] = {".", "."},
        [RY_WHERE_PYTHON] = {RY_BIN_TO_LIB "/railyard/python", RY_SOURCES "/plugin/python"}, /* in a build: of the sources */
    };
    char dir[PATH_MAX], tried[2][PATH_MAX + 128];
    ssize_t n = readlink("/proc/self/exe", dir, sizeof dir - 1);
    if (n < 0)
        return ry_fail(err, "cannot read /proc/self/exe, to find Railyard's own files from it");
    dir[n] = 0;
    *strrchr(dir, '/') = 0;
    for (int i = 0; i < 2; i++) {
        bool absolute = places[what][i][0] == '/';
        snprintf(tried[i], sizeof tried[i], "%s%s%s", absolute ? "" : dir, absolute ? "" : "/", places[what][i]);
        char real[PATH_MAX];
        if (realpath(tried[i], real) && !access(real, R_OK)) {
            snprintf(out, 4096, "%s", real);
            return 0;
        }
    }
    return ry_fail(err, "neither %.200s nor %.200s exists: is the installation complete?", tried[0], tried[1]);
}
