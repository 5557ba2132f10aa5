/* cmd_topo.c: `railyard topo`: this machine's topology, or a saved one, in the format asked for. */
#include <argp.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "command.h"
#include "topo.h"

struct options {
    const char *input, *output;
    enum ry_topo_format format;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *o = state->input;
    struct ry_err err;
    switch (key) {
    case 'i':
        o->input = arg;
        return 0;
    case 'o':
        o->output = arg;
        return 0;
    case 'f':
        if (ry_topo_format_parse(arg, &o->format, &err))
            argp_error(state, "%s", err.msg);
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "does not know what to do with '%s': a saved topology is read by --input %s", arg, arg);
        return EINVAL;
    }
    return ARGP_ERR_UNKNOWN;
}

/* A file appears under its name only when it is complete. What is no regular file (a pipe, /dev/stdout) is written to as it is. */
static int write_file(const char *argv0, const struct ry_topo *t, const struct options *o)
{
    struct ry_err err = {""};
    struct stat st;
    bool direct = !stat(o->output, &st) && !S_ISREG(st.st_mode);
    char temp[4096 + 16];
    if ((size_t)snprintf(temp, sizeof temp, direct ? "%s" : "%s.XXXXXX", o->output) >= sizeof temp)
        return command_fail(argv0, "cannot write %.100s…: the name is too long", o->output);
    int fd = direct ? open(temp, O_WRONLY | O_CLOEXEC) : mkostemp(temp, O_CLOEXEC);
    if (fd < 0)
        return command_fail(argv0, "cannot write %s: %s", o->output, strerror(errno));
    mode_t mask = umask(0);
    umask(mask);
    if (!direct)
        fchmod(fd, 0666 & ~mask); /* mkostemp makes them private */
    FILE *f = fdopen(fd, "w");
    int rc = f ? ry_topo_write(t, o->format, f, &err) : ry_fail(&err, "no memory");
    if (f ? fclose(f) : close(fd))
        rc = rc ? rc : ry_fail(&err, "%s", strerror(errno));
    if (!rc && !direct && rename(temp, o->output))
        rc = ry_fail(&err, "%s", strerror(errno));
    if (!rc)
        return 0;
    if (!direct)
        unlink(temp);
    return command_fail(argv0, "cannot write %s: %s", o->output, err.msg);
}

int cmd_topo(int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"input", 'i', "FILE", 0, "Read a saved topology instead of this machine: hwloc XML (of version 2 or 3) or NCCL topology XML", 0},
        {"format", 'f', "FORMAT", 0, "text (the default), json, xml (hwloc's own: lstopo opens it) or svg (a picture)", 0},
        {"output", 'o', "FILE", 0, "Write to FILE instead of standard output", 0},
        {0}};
    static const struct argp argp = {
        options, parse, 0,
        "Show what a node is made of: NUMA nodes, GPUs, NVLinks, NICs, and how far they are from each other.\v"
        "Path classes, fastest first: NVL is NVLink, direct or through NVSwitch; PIX is one PCIe switch; PXB several; PHB "
        "the processor's PCIe host bridge; SYS from one processor to another. Bandwidths are GB/s in one direction; what "
        "is not known is shown as '-' (null in JSON).\n\n"
        "A saved topology is what 'lstopo FILE.xml' writes, or a file for NCCL_TOPO_FILE or from NCCL_TOPO_DUMP_FILE. "
        "Nothing is written to FILE unless all went well.\n\n"
        "Examples:\n"
        "  railyard topo\n"
        "  railyard topo --format svg --output node.svg\n"
        "  railyard topo --input p4d-24xl-nccl-topo.xml --format xml | lstopo -i - --if xml",
        0, 0, 0};
    struct options o = {NULL, NULL, RY_TOPO_TEXT};
    struct ry_err err = {""};
    if (argp_parse(&argp, argc, argv, 0, 0, &o))
        return 2;
    setenv("HWLOC_HIDE_ERRORS", "2", 0); /* one line of ours says what is wrong, not a banner of hwloc's */
    struct ry_topo *t = o.input ? ry_topo_open_file(o.input, &err) : ry_topo_open_live(&err);
    if (!t)
        return command_fail(argv[0], "%s", err.msg);
    int rc = 0;
    if (o.output)
        rc = write_file(argv[0], t, &o);
    else if (ry_topo_write(t, o.format, stdout, &err))
        rc = command_fail(argv[0], "%s", err.msg);
    ry_topo_close(t);
    return rc;
}
