#!/usr/bin/env python3
"""The preload against real NCCL releases, without a GPU: headers, symbols, unique ids, refused calls.

    tests/nccl_versions.py [--build BUILD] [--cuda INCLUDE] [--markdown] FOLDER...

Each FOLDER is an unpacked NCCL: include/nccl.h and lib/libnccl.so.2, as in NVIDIA's wheels. For example
    pip download --no-deps -d /tmp/w nvidia-nccl-cu12==2.21.5 && python3 -m zipfile -e /tmp/w/*.whl /tmp/w
leaves one in /tmp/w/nvidia/nccl. BUILD (default: build) is a built folder of this project, made with any header; INCLUDE
(default: /usr/local/cuda/include) holds cuda_runtime.h. Needs cc and nm. Nothing is downloaded here. For each release:

  header     plugin/*.c compiles with it, warnings being errors; ncclConfig_t and the enums lie as plugin/nccl_abi.h says
  symbols    each function of RY_NCCL_FUNCTIONS is there, under both names, exactly from the release on that the list says
  not ours   functions of the header that take a communicator, which Railyard does not stand in front of
  unique id  of real ncclGetUniqueId: address after 8 bytes, nothing after byte 40; with the preload our ticket from byte 64
             on, with NCCL_COMM_ID nothing; over IPv4 and, where the machine has an address, IPv6
  calls      with a NULL communicator give the same result with and without the preload; those that the release lacks are
             done another way or refused as invalid usage

Prints a table and each thing that is not so; exits 1 if there was one.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ["-std=gnu17", "-D_GNU_SOURCE", '-DRAILYARD_VERSION="x"', "-Wall", "-Wextra", "-Werror", "-Wstrict-prototypes",
         "-Wmissing-prototypes", "-Wshadow", "-Wpointer-arith", "-Wvla", "-Wno-unused-parameter", "-fvisibility=hidden", "-fPIC"]
LAYOUT = r"""
#include "nccl_abi.h"
#define SAME(a, b) _Static_assert(offsetof(ncclConfig_t, a) == offsetof(struct ry_nccl_config, b), #a)
SAME(size, size); SAME(magic, magic); SAME(version, version); SAME(blocking, blocking);
SAME(cgaClusterSize, cga_cluster_size); SAME(netName, net_name); SAME(splitShare, split_share);
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 26, 0)
SAME(trafficClass, traffic_class);
#endif
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 0)
SAME(commName, comm_name);
#else
_Static_assert(sizeof(ncclConfig_t) < sizeof(struct ry_nccl_config), "a shorter config has no name");
#endif
static const ncclConfig_t example = NCCL_CONFIG_INITIALIZER;
unsigned example_magic(void);
unsigned example_magic(void) { return example.magic; }
_Static_assert(sizeof(ncclUniqueId) == 128, "unique id");
_Static_assert(ncclSuccess == 0 && ncclInvalidUsage == 5 && ncclInProgress == 7, "results");
_Static_assert(ncclInt8 == 0 && ncclUint8 == 1 && ncclInt32 == 2 && ncclUint32 == 3 && ncclInt64 == 4 && ncclUint64 == 5 &&
               ncclFloat16 == 6 && ncclFloat32 == 7 && ncclFloat64 == 8, "types");
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 24, 0)
_Static_assert(ncclBfloat16 == 9 && ncclFloat8e4m3 == 10 && ncclFloat8e5m2 == 11, "types");
_Static_assert(ncclNumTypes == 12, "a type whose size ry_nccl_type_bytes() does not know");
#endif
"""
PROBE = r"""
#include <dlfcn.h>
#include "nccl_abi.h"
#include <stdio.h>
#include <string.h>
#define TELL(name, ...) do { __typeof__(&name) f = (__typeof__(&name))dlsym(RTLD_DEFAULT, #name); \
    if (f) printf("call %s %d\n", #name, f(__VA_ARGS__)); } while (0)
/* the real ones look into the communicator before they look whether there is one */
#define TELL_LACKING(name, ...) do { if (!dlsym(RTLD_DEFAULT, "p" #name)) TELL(name, __VA_ARGS__); } while (0)
int main(void)
{
    int version = 0, x[4] = {0};
    ncclUniqueId id;
    memset(&id, 0xa5, sizeof id); /* as on the stack of a program that does not clear it */
    int failed = ncclGetVersion(&version);
    printf("version %d %d\n", failed, version);
    failed = ncclGetUniqueId(&id);
    printf("id %d ", failed);
    for (int i = 0; i < 128; i++)
        printf("%02x", (unsigned char)id.internal[i]);
    printf("\n");
    ncclComm_t none = NULL, made = NULL;
    TELL(ncclSend, x, 1, ncclInt32, 0, none, NULL);
    TELL(ncclAllGather, x, x, 1, ncclInt32, none, NULL);
    TELL(ncclAlltoAll, x, x, 1, ncclInt32, none, NULL);
    TELL(ncclGather, x, x, 1, ncclInt32, 0, none, NULL);
    TELL(ncclScatter, x, x, 1, ncclInt32, 0, none, NULL);
    TELL_LACKING(ncclCommShrink, none, x, 1, &made, NULL, 0);
    TELL_LACKING(ncclCommRevoke, none, 0);
    TELL_LACKING(ncclCommInitRankScalable, &made, 1, 0, 0, NULL, NULL);
    TELL(ncclSignal, 0, 0, 0, 0, none, NULL);
    TELL(ncclGroupStart);
    TELL(ncclGroupEnd);
    TELL(ncclCommDestroy, none);
    return 0;
}
"""
DONE_OTHERWISE = {"ncclAlltoAll", "ncclGather", "ncclScatter", "ncclCommInitRankScalable"}  # plugin/older.c
problems = []


def number(text):
    return tuple(int(n) for n in (text.split(".") + ["0", "0"])[:3])


def our_functions():
    """Name → the release that first has it, from the list in plugin/nccl_abi.h."""
    with open(os.path.join(TOP, "plugin", "nccl_abi.h"), encoding="utf-8") as f:
        text = re.search(r"#define RY_NCCL_FUNCTIONS.*?clang-format on", f.read(), re.S).group()
    since, found = (0, 0, 0), {}
    for version, name in re.findall(r"/\* (\d[\d.]*)|F\((nccl\w+)\)", text):
        if version:
            since = number(version)
        else:
            found[name] = since
    return found


def cc(folder, cuda, *args):
    p = subprocess.run(["cc", *FLAGS, "-I" + os.path.join(TOP, "plugin"), "-I" + os.path.join(TOP, "src"), "-isystem",
                        os.path.join(folder, "include"), "-isystem", cuda, *args], stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, text=True)
    return p.returncode == 0, p.stdout


def run_probe(program, folder, env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "RAILYARD_")) and k != "LD_PRELOAD"}
    p = subprocess.run([program], env={**clean, "LD_LIBRARY_PATH": os.path.join(folder, "lib"), **env}, timeout=120,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = {"rc": p.returncode, "stderr": p.stderr, "calls": {}, "id": b"", "version": 0}
    for line in p.stdout.splitlines():
        w = line.split()
        if w[0] == "call":
            seen["calls"][w[1]] = int(w[2])
        elif w[0] == "id" and w[1] == "0":
            seen["id"] = bytes.fromhex(w[2])
        elif w[0] == "version":
            seen["version"] = int(w[2])
    return seen


def has_ipv6():
    """An address other than the loopback's, which NCCL passes over."""
    try:
        with open("/proc/net/if_inet6") as f:
            return any(line.split()[-1] != "lo" for line in f)
    except OSError:
        return False


def check_ids(program, folder, preload, bad):
    """How the unique id looks; a word for the table."""
    words = []
    kinds = [("IPv4", {"NCCL_SOCKET_FAMILY": "AF_INET"}, 2)]
    if has_ipv6():
        kinds.append(("IPv6", {"NCCL_SOCKET_FAMILY": "AF_INET6"}, 10))
    for name, env, family in kinds:
        plain = run_probe(program, folder, env)["id"]
        ours = run_probe(program, folder, {**env, "LD_PRELOAD": preload})["id"]
        if not plain or not ours or int.from_bytes(plain[8:10], sys.byteorder) != family:
            bad(f"{name}: no unique id over it: {plain.hex() or 'none'}")
            continue
        tail = plain[40:]
        if tail != b"\0" * 88 and tail != b"\xa5" * 88:
            bad(f"{name}: NCCL uses bytes after 40: {plain.hex()}")
        ticket = ours[64:64 + 48]
        if ours[40:64].strip(b"\0") or ours[112:].strip(b"\0"):
            bad(f"{name}: not cleared around the ticket: {ours.hex()}")
        if ticket[:8] != b"RAILYARD" or ticket[9] != (4 if family == 2 else 6):
            bad(f"{name}: no ticket in {ours.hex()}")
        address = (ours[12:16], ticket[16:20]) if family == 2 else (ours[16:32], ticket[16:32])
        if address[0] != address[1]:
            bad(f"{name}: the ticket's address {address[1].hex()} is not NCCL's {address[0].hex()}")
        words.append(f"{name}: rest {'cleared' if not tail.strip(bytes(1)) else 'left as it was'}")
    env = {"NCCL_COMM_ID": "127.0.0.1:29517"}
    plain, ours = run_probe(program, folder, env)["id"], run_probe(program, folder, {**env, "LD_PRELOAD": preload})["id"]
    if not plain or plain[8:40] != ours[8:40] or ours[40:].strip(b"\0"):
        bad(f"NCCL_COMM_ID: {plain.hex()} became {ours.hex()}")
    return "; ".join(words)


def check(folder, args, work, row):
    with open(os.path.join(folder, "include", "nccl.h"), encoding="utf-8") as f:
        header = f.read()
    release = tuple(int(re.search(rf"#define NCCL_{k} (\d+)", header).group(1)) for k in ("MAJOR", "MINOR", "PATCH"))
    row["NCCL"] = ".".join(map(str, release))

    def bad(text):
        problems.append(f"{row['NCCL']}: {text}")

    for name in sorted(os.listdir(os.path.join(TOP, "plugin"))):
        if name.endswith(".c"):
            ok, out = cc(folder, args.cuda, "-fsyntax-only", os.path.join(TOP, "plugin", name))
            if not ok:
                bad(f"plugin/{name} does not compile:\n{out}")
    source = os.path.join(work, "layout.c")
    with open(source, "w") as f:
        f.write(LAYOUT)
    ok, out = cc(folder, args.cuda, "-fsyntax-only", source)
    if not ok:
        bad(f"not laid out as in plugin/nccl_abi.h:\n{out}")
    row["commName"] = "yes" if "commName" in header else "no"

    functions = our_functions()
    library = os.path.join(folder, "lib", "libnccl.so.2")
    symbols = {line.split()[-1] for line in subprocess.run(["nm", "-D", "--defined-only", library], check=True, text=True,
                                                         stdout=subprocess.PIPE).stdout.splitlines()}
    for name, since in functions.items():
        for symbol in (name, "p" + name):
            if (symbol in symbols) != (release >= since):
                bad(f"{symbol} is {'there' if symbol in symbols else 'not there'}, but the list says since {since}")
    row["functions"] = f"{sum(n in symbols for n in functions)} of {len(functions)}"
    declared = re.findall(r"^ *ncclResult_t +(nccl\w+) *\(([^;]*?)\);", header, re.M | re.S)
    passive = re.compile(r"Register|Deregister|RedOp|Count|CuDevice|UserRank|AsyncError|MemStats|Query|DevComm|Win|Pointer|LeInfo")
    row["not ours"] = ", ".join(sorted({n for n, a in declared if "ncclComm_t" in a and n not in functions
                                        and not passive.search(n)})) or "-"

    program = os.path.join(work, "probe")
    with open(program + ".c", "w") as f:
        f.write(PROBE)
    ok, out = cc(folder, args.cuda, program + ".c", "-o", program, "-Wl,--allow-shlib-undefined", library, "-ldl")
    if not ok:
        return bad(f"the probe does not build:\n{out}")
    preload = os.path.abspath(os.path.join(args.build, "plugin", "librailyard.so"))
    plain = run_probe(program, folder, {})
    ours = run_probe(program, folder, {"LD_PRELOAD": preload, "RAILYARD_LOG": "info"})
    if ours["rc"] or plain["rc"] or plain["version"] != ours["version"]:
        bad(f"ended with {plain['rc']} and {ours['rc']}, version {plain['version']} and {ours['version']}")
    if f"watches NCCL {plain['version']} at {library}" not in ours["stderr"]:
        bad(f"Railyard did not find {library}: {ours['stderr']}")
    lacking = 0
    for name, result in ours["calls"].items():
        if name in plain["calls"]:
            if result != plain["calls"][name]:
                bad(f"{name} gave {result} instead of {plain['calls'][name]}")
        else:
            lacking += 1
            want = 4 if name in DONE_OTHERWISE else 5  # ncclInvalidArgument (there is no communicator), ncclInvalidUsage
            if result != want:
                bad(f"{name}, which it lacks, gave {result} instead of {want}")
    row["calls alike"] = str(len(ours["calls"]) - lacking)
    row["unique id"] = check_ids(program, folder, preload, bad)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", default=os.path.join(TOP, "build"))
    parser.add_argument("--cuda", default="/usr/local/cuda/include")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("folders", nargs="+")
    args = parser.parse_args()
    columns = ["NCCL", "functions", "commName", "calls alike", "unique id", "not ours"]
    rows = []
    for folder in args.folders:
        rows.append(dict.fromkeys(columns, "?"))
        with tempfile.TemporaryDirectory() as work:
            check(os.path.abspath(folder), args, work, rows[-1])
    if args.markdown:
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in rows:
            print("| " + " | ".join(row[c] for c in columns) + " |")
    else:
        width = {c: max(len(c), *(len(r[c]) for r in rows)) for c in columns}
        for row in [{c: c for c in columns}] + rows:
            print("  ".join(row[c].ljust(width[c]) for c in columns).rstrip())
    for text in problems:
        print("NOT SO: " + text, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
