/*
 * main.c: the `railyard` tool: picks the subcommand. Owns the list of commands and their one-line help, nothing else.
 */
#include <argp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "command.h"

static const struct command {
    const char *name, *help;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"bench", "exchange as mixture-of-experts layers do, check every byte, time it", cmd_bench},
    {"calibrate", "measure what the cluster's links cost, and keep it for jobs that run there", cmd_calibrate},
    {"capacity", "how much room experts need: LocMoE's bounds, and what recorded routing took", cmd_capacity},
    {"emu", "run a program on an emulated cluster", cmd_emu},
    {"env", "print every setting, its default and the value in force", cmd_env},
    {"plan", "what placing samples where their experts are would save, on recorded routing", cmd_plan},
    {"run", "run a job with Railyard preloaded, and with its part in Python: torchrun and the like", cmd_run},
    {"sim", "what a job's exchanges would take on another cluster, by placement and strategy", cmd_sim},
    {"topo", "show this node's topology, or a saved one: text, JSON, hwloc XML or a picture", cmd_topo},
    {"explain", "show the plan of an exchange in words and as a picture, and what it changes", cmd_explain},
    {"report", "report what a job recorded: who sent how much to whom", cmd_report},
};

int command_fail(const char *argv0, const char *fmt, ...)
{
    fprintf(stderr, "%s: ", argv0);
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    return 1;
}

static void usage(FILE *f)
{
    fprintf(f, "Usage: railyard COMMAND [OPTION...]\n\nSee every all-to-all of an NCCL job, and what the machine is made of.\n\n");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fprintf(f, "  %-9s %s\n", commands[i].name, commands[i].help);
    fprintf(f, "\n'railyard COMMAND --help' tells more. The library itself is used by LD_PRELOAD: see the README.\n");
}

int main(int argc, char **argv)
{
    argp_err_exit_status = 2;
    if (argc < 2)
        return usage(stderr), 2;
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help"))
        return usage(stdout), 0;
    if (!strcmp(argv[1], "--version"))
        return puts("railyard " RAILYARD_VERSION), 0;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(argv[1], commands[i].name))
            continue;
        char name[64];
        snprintf(name, sizeof name, "railyard %s", argv[1]);
        argv[1] = name;
        return commands[i].run(argc - 1, argv + 1);
    }
    fprintf(stderr, "railyard: no command '%s'\n\n", argv[1]);
    return usage(stderr), 2;
}
