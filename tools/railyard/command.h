/*
 * command.h: the subcommands of the `railyard` tool.
 *
 * Each command is one function in a file cmd_NAME.c: argv[0] is "railyard NAME", options are parsed by argp, which
 * also prints --help. It returns the exit status: 0 success, 1 the command's own failure (told on stderr in one line,
 * naming the file and the remedy), 2 wrong usage (set argp_err_exit_status to 2).
 */
#ifndef RY_TOOLS_COMMAND_H
#define RY_TOOLS_COMMAND_H

int cmd_bench(int argc, char **argv);
int cmd_calibrate(int argc, char **argv);
int cmd_capacity(int argc, char **argv);
int cmd_emu(int argc, char **argv);
int cmd_env(int argc, char **argv);
int cmd_plan(int argc, char **argv);
int cmd_run(int argc, char **argv);
int cmd_sim(int argc, char **argv);
int cmd_topo(int argc, char **argv);
int cmd_explain(int argc, char **argv);
int cmd_report(int argc, char **argv);

/* Print "railyard NAME: text" on stderr; returns 1, to be returned on. */
int command_fail(const char *argv0, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
