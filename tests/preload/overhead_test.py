#!/usr/bin/env python3
"""What a call costs that is intercepted and passed on: instructions, which are the same on every run, and nanoseconds.

usage: overhead_test.py OVERHEAD_PROGRAM LIBRAILYARD
Fails when a call takes more than MAX_INSTRUCTIONS more than the real one, or more than MAX_NS (median, against calls of the
real function made in turns in the same run). Exits 77 where valgrind is missing or the build is sanitized.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

MAX_INSTRUCTIONS, MAX_NS, N = 250, 100, 2000
PROGRAM, PRELOAD = sys.argv[1:]
CALLS = {"group": 2, "exchange": 4, "plain": 6, "collective": 1}


def instructions(case, preload, n):
    with tempfile.NamedTemporaryFile() as out:
        env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        if preload:
            env["LD_PRELOAD"] = PRELOAD
        p = subprocess.run(["valgrind", "--tool=callgrind", "--toggle-collect=ry_overhead_calls", f"--callgrind-out-file={out.name}",
                            PROGRAM, "--case", case, "--callgrind", str(n)], env=env, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, timeout=900)
        found = re.search(r"Collected : (\d+)", p.stdout)
        if p.returncode or not found:
            sys.exit(f"overhead_test: callgrind failed:\n{p.stdout}")
        return int(found.group(1))


def main():
    linked = subprocess.run(["ldd", PRELOAD], stdout=subprocess.PIPE, text=True).stdout
    if "libasan" in linked or "libtsan" in linked:
        print("SKIP overhead: a sanitized build says nothing about speed")
        sys.exit(77)
    if not shutil.which("valgrind"):
        print("SKIP overhead: no valgrind")
        sys.exit(77)
    bad = []
    print(f"{'operation':12} calls   instructions per call, plain / preloaded / added")
    for case in ("group", "exchange"):  # the others enter NCCL's own threads, whose instructions vary
        # two lengths, so that what happens once cancels out
        plain, loaded = ((instructions(case, on, 2 * N) - instructions(case, on, N)) / N / CALLS[case] for on in (False, True))
        print(f"{case:12} {CALLS[case]:5}   {plain:.1f} / {loaded:.1f} / {loaded - plain:.1f}")
        if loaded - plain > MAX_INSTRUCTIONS:
            bad.append(f"{case}: {loaded - plain:.1f} instructions per call")
        if loaded - plain < 3:
            bad.append(f"{case}: the preload seems not to be there")
    with tempfile.NamedTemporaryFile() as out:
        p = subprocess.run([PROGRAM, "--json", out.name], env={**os.environ, "LD_PRELOAD": PRELOAD}, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, timeout=900)
        print(p.stdout)
        if p.returncode:
            sys.exit("overhead_test: the measurement failed")
        result = json.load(open(out.name))
    for name, case in result["cases"].items():
        if case["difference_per_call_ns"] > MAX_NS:
            bad.append(f"{name}: {case['difference_per_call_ns']:.1f} ns per call")
    if bad:
        sys.exit("overhead_test: too much: " + "; ".join(bad))


main()
