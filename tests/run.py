#!/usr/bin/env python3
"""Everything that CI runs, in order; prints what failed and, last, one line 'N passed, N failed, N skipped'.

  werror     the plain build with warnings as errors, and all its tests
  asan       the same under AddressSanitizer and UndefinedBehaviorSanitizer (gcc warns falsely there: no warnings), but for what
             is Python (scripts of the virtual GPU cluster, the frameworks' adapter), the planner's long commands, and most of the
             exchanges once more with RAILYARD_HOLD=no
  tsan       what has threads, under ThreadSanitizer
  docs       tables and man page against the code
  install    `meson install` into an empty folder, and the tool and libraries working from there

Tests that judge durations (suite timed) say nothing where others had the processors: those that fail are asked once more after all
else, one at a time with nothing beside them, and only that answer counts; the output says which. No other test gets a second try.

Names of stages as arguments run only those. Build folders (build-ci*, ignored by git) are kept between runs. While the tests of
one build run, many of which wait, the next ones compile beside them at low priority.
"""
import json
import os
import subprocess
import sys
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
passed = failed = skipped = 0
failures = []
again = []  # (build folder, test) that failed, and judge durations


def count(name, ok, seconds, output=""):
    global passed, failed
    print(f"  {'ok  ' if ok else 'FAIL'} {name} ({seconds:.1f} s)", flush=True)
    if ok:
        passed += 1
    else:
        failed += 1
        failures.append(name)
        print("\n".join("       " + line for line in output.splitlines()[-60:]), flush=True)


def command(name, argv, env=None):
    start = time.time()
    p = subprocess.run(argv, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                       env={**os.environ, **(env or {})})
    count(name, p.returncode == 0, time.time() - start, p.stdout)
    return p.returncode == 0


# Under sanitizers: -Og, and lines without variables' places (-g1), take a third of the time to compile and hardly longer to run;
# reports name the same functions and lines. (-Og does not inline enough for xxhash's hints.) Warnings are the plain build's affair,
# and so are the GPU's kernels, which no sanitizer changes.
SANITIZED = ("-Db_lundef=false", "-Doptimization=g", "-Dc_args=-g1 -w -DXXH_NO_INLINE_HINTS=1", "-Dcpp_args=-g1 -w",
             f"-Dfatbins={TOP}/build-ci/src/run")
BUILDS = {"werror": ("build-ci", "-Dwerror=true"),
          "asan": ("build-ci-asan", "-Db_sanitize=address,undefined", *SANITIZED),
          "tsan": ("build-ci-tsan", "-Db_sanitize=thread", *SANITIZED)}
# Which tests of a build are run. Under AddressSanitizer not the scripts of the GPU cluster and the adapter's, which are Python.
TESTS = {"werror": (),
         "asan": ("--no-suite", "gpu", "--no-suite", "live", "--no-suite", "long"),
         "tsan": ("--suite", "unit", "--suite", "threads", "--no-suite", "place", "--no-suite", "sequential")}


def configure(stage):
    folder, *options = BUILDS[stage]
    if os.path.exists(os.path.join(TOP, folder, "build.ninja")):
        return []
    return [(f"{folder}: configure", lambda: ["meson", "setup", folder, *options])]


def needed(stage):
    """What is to be built for the stage's tests: everything in the plain build, what these tests name under sanitizers."""
    if not TESTS[stage]:
        return []
    folder = os.path.join(TOP, BUILDS[stage][0])
    subprocess.run(["ninja", "-C", folder, "build.ninja"], stdout=subprocess.DEVNULL)  # tests that have come since it was set up

    def introspect(what):
        return json.loads(subprocess.run(["meson", "introspect", folder, what], stdout=subprocess.PIPE, check=True).stdout)
    options = list(zip(TESTS[stage][::2], TESTS[stage][1::2]))
    suites = {o: {s for option, s in options if option == o} for o in ("--suite", "--no-suite")}
    names = set()
    for test in introspect("--tests"):
        of = {s.split(":")[-1] for s in test["suite"]}
        if not of & suites["--no-suite"] and (of & suites["--suite"] or not suites["--suite"]):
            names |= set(test["depends"])
    return sorted(os.path.relpath(f, folder) for t in introspect("--targets") if t["id"] in names for f in t["filename"])


class Builder(threading.Thread):
    """Makes the builds of these stages, one after the other; the first one in front, for nobody else has anything to do then."""

    def __init__(self, stages):
        super().__init__(daemon=True)
        self.stages = stages
        self.done = {name: threading.Event() for name in stages}
        self.steps = {name: [] for name in stages}
        self.start()

    def run(self):
        for i, stage in enumerate(self.stages):
            folder, *options = BUILDS[stage]
            steps = configure(stage) + [(f"{folder}: build", lambda f=folder, s=stage: ["ninja", "-C", f, "--quiet", *needed(s)])]
            if stage != "werror":
                plain = BUILDS["werror"][0]
                steps = configure("werror") + [(f"{plain}: kernels", lambda: ["ninja", "-C", plain, "--quiet", "src/run/libry_run.a"])] + steps
            for name, argv in steps:
                start = time.time()
                argv = argv()
                p = subprocess.run((["nice", "-n", "19"] if i else []) + argv, cwd=TOP, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, errors="replace")
                self.steps[stage].append((name, p.returncode == 0, time.time() - start, p.stdout))
                if p.returncode:
                    break
            self.done[stage].set()

    def wait(self, stage):
        """Is it built? Waits until that is known."""
        self.done[stage].wait()
        for step in self.steps[stage]:
            count(*step)
        return all(ok for _, ok, _, _ in self.steps[stage])


def ask(folder, at_a_time, which):
    """Run them, and what became of each: meson's records, or None and what it printed."""
    log = os.path.join(TOP, folder, "meson-logs", "testlog.json")
    if os.path.exists(log):
        os.unlink(log)
    # A test that hangs is ended all the same after ten times its limit; one on a slow and busy machine is not.
    ran = subprocess.run(["meson", "test", "-C", folder, "--no-rebuild", "--quiet", "--num-processes", str(at_a_time),
                          "-t", "10", *which], cwd=TOP, env={**os.environ, "CK_TIMEOUT_MULTIPLIER": "10"},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if not os.path.exists(log):
        return None, ran.stdout
    with open(log) as f:
        return [json.loads(line) for line in f], ran.stdout


def meson_tests(stage):
    """The tests of a stage, each counted."""
    global skipped
    folder = BUILDS[stage][0]
    # Many tests wait more than they compute: two more at a time than there are CPUs.
    results, said = ask(folder, len(os.sched_getaffinity(0)) + 2, TESTS[stage])
    if results is None:
        return count(f"{folder}: tests ran", False, 0, "meson test wrote no log:\n" + said[-2000:])
    for t in results:
        name, output = f"{folder}: {t['name']}", t.get("stdout", "") + t.get("stderr", "")
        if t["result"] == "SKIP":
            skipped += 1
            print(f"  skip {name}", flush=True)
        elif t["result"] != "OK" and "+timed" in t["name"].split(" / ")[0]:
            again.append((folder, t["name"]))
            print(f"  late {name} ({t['duration']:.1f} s): asked again when nothing else runs", flush=True)
            print("\n".join("       " + line for line in output.splitlines()[-60:]), flush=True)
        else:
            count(name, t["result"] == "OK", t["duration"], output)
        for text in t.get("stdout", "").splitlines():
            if text.startswith("SKIP"):
                print(f"       {text}", flush=True)


def ask_again():
    """Those that may have failed only because others had the processors."""
    for folder, name in again:
        results, said = ask(folder, 1, [name.split(" / ")[-1]])
        t = (results or [{"result": "FAIL", "duration": 0, "stdout": said}])[0]
        count(f"{folder}: {name}, alone", t["result"] == "OK", t["duration"], t.get("stdout", "") + t.get("stderr", ""))


def stage_werror():
    builder.wait("werror") and meson_tests("werror")


def stage_asan():
    builder.wait("asan") and meson_tests("asan")


def stage_tsan():
    builder.wait("tsan") and meson_tests("tsan")


def stage_docs():
    command("docs", [sys.executable, "tests/check_docs.py", "build-ci"])


def stage_install():
    command("install", [sys.executable, "tests/check_install.py", "build-ci"])


def main():
    global builder
    stages = {k[6:]: v for k, v in globals().items() if k.startswith("stage_")}
    chosen = sys.argv[1:] or list(stages)
    for name in chosen:
        if name not in stages:
            sys.exit(f"tests/run.py: no stage '{name}'; there are: {', '.join(stages)}")
    start = time.time()
    builder = Builder([name for name in chosen if name in BUILDS])
    for name in chosen:
        print(f"== {name}", flush=True)
        stages[name]()
    if again:
        print("== again", flush=True)
        ask_again()
    print(f"{time.time() - start:.0f} s")
    if failures:
        print("failed: " + ", ".join(failures))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
