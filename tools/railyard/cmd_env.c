/* cmd_env.c: `railyard env`: the table of settings, as text or as the Markdown rows that the README holds. */
#include <argp.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/settings.h"
#include "command.h"

static bool markdown;

static error_t parse(int key, char *arg, struct argp_state *state)
{
    switch (key) {
    case 'm':
        markdown = true;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "takes no argument, but got '%s'", arg);
    }
    return key == ARGP_KEY_ARG ? EINVAL : ARGP_ERR_UNKNOWN;
}

int cmd_env(int argc, char **argv)
{
    static const struct argp_option options[] = {{"markdown", 'm', 0, 0, "Print a Markdown table, without the values in force", 0},
                                                 {0}};
    static const struct argp argp = {options, parse, 0, "Print every setting of Railyard, its default and its value now.\v"
                                     "Settings are environment variables; set them for all ranks alike. "
                                     "man railyard, under REISSUED EXCHANGES, tells what the strategies do.", 0, 0, 0};
    if (argp_parse(&argp, argc, argv, 0, 0, 0))
        return 2;
    struct ry_settings s;
    char problems[1024];
    int n = ry_settings_parse(&s, environ, problems, sizeof problems);
    ry_settings_print(&s, stdout, markdown);
    if (n)
        return command_fail(argv[0], "%s", problems);
    return 0;
}
