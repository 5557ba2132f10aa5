/*
 * cmd_run.c: `railyard run`: starts a job with Railyard in it: LD_PRELOAD and PYTHONPATH, and settings given as
 * options.
 *
 * Owns: these variables of the command's environment, what RAILYARD_HOLD=no needs besides, and saying why a command cannot be started. The command takes
 * this process' place: nothing of the tool stays between a launcher and its job.
 */
#include <argp.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/settings.h"
#include "command.h"
#include "where.h"

enum { OPT_PRINT = 256, OPT_SETTING };

/* Options that set a variable, in the order of the keys from OPT_SETTING on. */
static const char *const variables[] = {
    "RAILYARD_PLACEMENT", "RAILYARD_EXPERTS", "RAILYARD_STRATEGY", "RAILYARD_COMBINE",
    "RAILYARD_TRACE",     "RAILYARD_ROUTING", "RAILYARD_LOG",
};
enum { NVARIABLES = sizeof variables / sizeof *variables };

static const struct argp_option options[] = {
    {"placement", OPT_SETTING + 0, "off|watch|batch", 0, "Which rank gets which sample (RAILYARD_PLACEMENT)", 1},
    {"experts", OPT_SETTING + 1, "FILE", 0, "Move experts before the first step by this map (RAILYARD_EXPERTS)", 1},
    {"strategy", OPT_SETTING + 2, "NAME", 0, "How exchanges are carried out (RAILYARD_STRATEGY)", 1},
    {"combine", OPT_SETTING + 3, "exact|sum", 0, "Whether rows may be added up on their way back (RAILYARD_COMBINE)",
     1},
    {"trace", OPT_SETTING + 4, "DIR", 0, "Write a trace for railyard report (RAILYARD_TRACE)", 1},
    {"record", OPT_SETTING + 5, "DIR", 0, "Record routing for railyard plan (RAILYARD_ROUTING)", 1},
    {"log", OPT_SETTING + 6, "LEVEL", 0, "error, warn, info, plan or debug (RAILYARD_LOG)", 1},
    {"print", OPT_PRINT, 0, 0, "Print the variables for a shell instead of running anything", 2},
    {0}};

static struct {
    const char *values[NVARIABLES];
    bool print;
    char **command;
} opt;

static error_t parse(int key, char *arg, struct argp_state *state)
{
    if (key >= OPT_SETTING && key < OPT_SETTING + NVARIABLES) {
        opt.values[key - OPT_SETTING] = arg;
        return 0;
    }
    switch (key) {
    case OPT_PRINT:
        opt.print = true;
        return 0;
    case ARGP_KEY_ARGS:
        opt.command = state->argv + state->next;
        return 0;
    case ARGP_KEY_END:
        if (!opt.command && !opt.print)
            argp_error(state, "which command? Write it after --");
        if (opt.command && opt.print)
            argp_error(state, "--print runs nothing: leave '%s' out", opt.command[0]);
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

/* Are the options' values such as the settings take? What else is in the environment is the job's own to be told of. */
static int check_values(char *problems, size_t size)
{
    char *entries[NVARIABLES + 1];
    int n = 0;
    for (int i = 0; i < NVARIABLES; i++)
        if (opt.values[i] && asprintf(&entries[n++], "%s=%s", variables[i], opt.values[i]) < 0)
            abort();
    entries[n] = NULL;
    struct ry_settings s;
    int bad = ry_settings_parse(&s, entries, problems, size);
    while (n)
        free(entries[--n]);
    return bad;
}

/* `name` with `first` in front of what it has, and not a second time. */
static void put_in_front(const char *name, const char *first)
{
    const char *old = getenv(name);
    char *all;
    const char *end;
    size_t n = strlen(first), size;
    FILE *f = open_memstream(&all, &size);
    if (!f)
        abort();
    fputs(first, f);
    for (const char *p = old && *old ? old : NULL; p; p = *end ? end + 1 : NULL) {
        end = strchrnul(p, ':');
        if ((size_t)(end - p) != n || memcmp(p, first, n))
            fprintf(f, ":%.*s", (int)(end - p), p); /* an empty one, too: on PYTHONPATH it is a folder */
    }
    if (fclose(f) || setenv(name, all, 1))
        abort();
    free(all);
}

/* What RAILYARD_HOLD=no needs; CUDA reads it when it starts. The preload does the same, where the launcher does not pass this on. */
static bool load_eagerly(void)
{
    struct ry_settings s;
    char ignored[1024];
    ry_settings_parse(&s, environ, ignored, sizeof ignored);
    return !s.hold && !getenv("CUDA_MODULE_LOADING") && !setenv("CUDA_MODULE_LOADING", "EAGER", 1);
}

static void print_variable(const char *name, const char *value)
{
    printf("export %s='", name);
    for (const char *p = value; *p; p++)
        *p == '\'' ? (void)fputs("'\\''", stdout) : (void)putchar(*p);
    puts("'");
}

int cmd_run(int argc, char **argv)
{
    static const struct argp argp = {
        options,
        parse,
        "-- COMMAND [ARG...]",
        "Run COMMAND, a job's launcher or a rank of it, with Railyard preloaded, and Python's part of it where a "
        "setting asks for "
        "that.\v"
        "Sets LD_PRELOAD and PYTHONPATH, in front of what they have, and the settings that are given; others may be "
        "set as variables as "
        "ever (railyard env). For launchers that do not pass their environment on to the ranks, "
        "eval \"$(railyard run --print ...)\" where the ranks start.\n\n"
        "The status is COMMAND's; 127 if there is no such command, 126 if it cannot be run.",
        0,
        0,
        0};
    memset(&opt, 0, sizeof opt);
    if (argp_parse(&argp, argc, argv, ARGP_IN_ORDER, 0, 0))
        return 2;
    char problems[1024], library[4096], python[4096];
    if (check_values(problems, sizeof problems)) {
        char *instead = strstr(problems, ": using"); /* nothing is used instead here */
        if (instead)
            *instead = 0;
        command_fail(argv[0], "%s", problems);
        return 2;
    }
    struct ry_err err;
    if (ry_where(RY_WHERE_PRELOAD, library, &err) || ry_where(RY_WHERE_PYTHON, python, &err))
        return command_fail(argv[0], "%s", err.msg);
    if (strpbrk(library, " :"))
        return command_fail(
            argv[0], "%s cannot be preloaded: LD_PRELOAD takes no path with a space or a colon; install it elsewhere",
            library);
    if (strchr(python, ':'))
        return command_fail(
            argv[0], "%s cannot be on PYTHONPATH, which takes no path with a colon; install it elsewhere", python);
    put_in_front("LD_PRELOAD", library);
    put_in_front("PYTHONPATH", python);
    for (int i = 0; i < NVARIABLES; i++)
        if (opt.values[i])
            setenv(variables[i], opt.values[i], 1);
    bool eagerly = load_eagerly();
    if (!opt.print) {
        execvp(opt.command[0], opt.command);
        int why = errno;
        command_fail(argv[0], "cannot run %s: %s", opt.command[0], strerror(why));
        return why == ENOENT ? 127 : 126;
    }
    print_variable("LD_PRELOAD", getenv("LD_PRELOAD"));
    print_variable("PYTHONPATH", getenv("PYTHONPATH"));
    if (eagerly)
        print_variable("CUDA_MODULE_LOADING", getenv("CUDA_MODULE_LOADING"));
    for (int i = 0; i < NVARIABLES; i++)
        if (opt.values[i])
            print_variable(variables[i], opt.values[i]);
    return 0;
}
