#!/usr/bin/env python3
"""Check agree.pml with spin: all schedules of a few settings, that nothing goes on for ever, and that mistakes are found.

Usage: check.py WORKING_FOLDER. Needs spin and a C compiler (CC); skips (77) without spin.
"""
import os
import re
import shutil
import subprocess
import sys
import time

MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "agree.pml")
NONE = {"CUTS": 0, "LEAVES": 0, "STRAYS": 0, "NOT_MES": 0}
# What may happen, at most: ranks, exchanges of each, proposals, and mishaps of each kind.
SETTINGS = [
    ({"N": 2, "X": 3, "EPOCHS": 2, **NONE, "NOT_MES": 1}, "safety"),
    ({"N": 2, "X": 3, "EPOCHS": 1, **NONE, "STRAYS": 1, "NOT_MES": 2}, "safety"),
    ({"N": 2, "X": 2, "EPOCHS": 2, **NONE, "CUTS": 1}, "safety"),
    ({"N": 2, "X": 2, "EPOCHS": 1, "CUTS": 1, "LEAVES": 1, "STRAYS": 1, "NOT_MES": 1}, "safety"),
    ({"N": 3, "X": 2, "EPOCHS": 1, **NONE, "NOT_MES": 1}, "safety"),
    ({"N": 3, "X": 2, "EPOCHS": 1, **NONE, "LEAVES": 1}, "safety"),
    ({"N": 2, "X": 2, "EPOCHS": 1, **NONE, "CUTS": 1, "STRAYS": 1, "NOT_MES": 1}, "ends"),
]
# The fewest exchanges, epochs and mishaps in which all mistakes show: in more, the search for one only takes longer.
BROKEN_SETTINGS = {"N": 2, "X": 2, "EPOCHS": 2, **NONE, "NOT_MES": 1}
# Mistakes, each of which must be found: its number in agree.pml, what is wrong, and in which words pan says so.
BROKEN = {
    "MISSING": (1, "agreed although a manifest is missing", r"path"),
    "OVERTAKEN": (6, "an END that overtakes a verdict is believed", r"path"),
    "EPOCH": (2, "what comes from an earlier epoch counts", r"path"),
    "LATE": (3, "only those who wait hear of the END", r"waiting"),
    "UNANSWERED": (4, "END forgets who is behind a decision by 'not me'", r"waiting"),
    "PATIENCE": (5, "no end to patience", r"waiting"),
}


def verifier(folder, n, x, kind, made={}):
    """The verifier for so many ranks and exchanges: made once, for that takes as long as a search. (Optimizing takes longer than it
    saves.) What else may happen, the model reads when it starts."""
    name = f"pan-{n}-{x}-{kind}"
    if name not in made:
        subprocess.run(["spin", f"-DN={n}", f"-DX={x}", "-a", MODEL], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        # -DNP looks for cycles without progress; with no progress label in the model, for any cycle at all.
        flag = "-DNP" if kind == "ends" else "-DSAFETY"
        subprocess.run([os.environ.get("CC", "cc"), "-w", "-O0", "-DNOFAIR", "-DSFH", flag, "-o", name, "pan.c"], cwd=folder, check=True)
        made[name] = os.path.join(folder, name)
    return made[name]


def pan(folder, settings, kind="safety", broken=0):
    """Runs the verifier. Returns its output."""
    env = {**os.environ, "BROKEN": str(broken), **{k: str(v) for k, v in settings.items() if k not in ("N", "X")}}
    return subprocess.run([verifier(folder, settings["N"], settings["X"], kind), "-m100000", "-w21"] + (["-l"] if kind == "ends" else []),
                          cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def main():
    if not shutil.which("spin"):
        print("SKIP: spin is not installed (Debian: apt-get install spin)")
        return 77
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    failed = 0
    for settings, kind in SETTINGS:
        start = time.time()
        out = pan(folder, settings, kind)
        states = re.search(r"(\d+) states, stored", out)
        ok = "errors: 0" in out and "Search not completed" not in out and "max search depth too small" not in out
        # A search of nothing would pass as well.
        ok = ok and states and int(states[1]) > 10000
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {kind:6} {' '.join(f'{k}={v}' for k, v in settings.items())}: "
              f"{states[1] if states else '?'} states, {time.time() - start:.1f} s", flush=True)
        if not ok:
            print(out)
    for name, (number, what, words) in BROKEN.items():
        start = time.time()
        out = pan(folder, BROKEN_SETTINGS, broken=number)
        found = re.search(r"pan:1: assertion violated (.*)", out)
        ok = found is not None and re.search(words, found[1]) is not None
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} found  BROKEN_{name}: {what} ({time.time() - start:.1f} s)", flush=True)
        if not ok:
            print(out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
