#!/usr/bin/env python3
"""`meson install` into an empty folder, and everything working from there, the build folder forgotten. usage: check_install.py BUILD"""
import json
import os
import shutil
import subprocess
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
work = tempfile.mkdtemp(prefix="ry-install-")
root = os.path.join(work, "root")


def run(argv, **more):
    p = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, **more)
    if p.returncode:
        sys.exit(f"{' '.join(argv)} gave {p.returncode}:\n{p.stdout}")
    return p.stdout


def find(name):
    for folder, _, files in os.walk(root):
        if name in files:
            return os.path.join(folder, name)
    sys.exit(f"{name} is not installed; there is:\n" + run(["find", root]))


run(["meson", "install", "-C", os.path.join(TOP, sys.argv[1]), "--no-rebuild", "--destdir", root])
railyard, preload = find("railyard"), find("librailyard.so")
if os.path.dirname(find("librailyard-engine.so")) != os.path.dirname(preload):
    sys.exit("the engine does not lie beside librailyard.so")
find("libnccl.so.2"), find("railyard-bench"), find("railyard.1")
program = os.path.join(work, "pauses.c")  # a program that knows of Railyard runs without it, too
with open(program, "w") as f:
    f.write("#include <railyard.h>\nint main(void) { return railyard_pause ? 10 + railyard_pause(1) : 3; }\n")
run(["cc", "-Wall", "-Werror", "-I", os.path.dirname(find("railyard.h")), program, "-o", program[:-2]])
for env, want in (({}, 3), ({"LD_PRELOAD": preload}, 10)):
    got = subprocess.run([program[:-2]], env={**os.environ, **env}).returncode
    if got != want:
        sys.exit(f"railyard_pause with {env}: {got} instead of {want}")
prefix = os.path.dirname(os.path.dirname(railyard))
pc = find("railyard.pc")
version = run(["pkg-config", "--modversion", pc]).strip()
if run([railyard, "--version"]).strip() != f"railyard {version}":
    sys.exit("the tool and railyard.pc are of different versions")
# the prefix was moved by --destdir, so it is said again
path = run(["pkg-config", f"--define-variable=prefix={prefix}", "--variable=preload", pc]).strip()
if os.path.realpath(path) != os.path.realpath(preload):
    sys.exit(f"railyard.pc says {path}, but librailyard.so is {preload}")
out = run([railyard, "run", "--print"], env={k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "PYTHONPATH")})
if os.path.realpath(preload) not in out or os.path.dirname(os.path.realpath(find("sitecustomize.py"))) not in out:
    sys.exit(f"railyard run finds something else than what is installed:\n{out}")
trace = os.path.join(work, "trace")
out = run([railyard, "emu", "-n", "2", "-g", "2", "--preload", "--", railyard, "bench", "--iterations", "2"],
          env={**os.environ, "RAILYARD_TRACE": trace})
report = json.loads(run([railyard, "report", trace, "--json", "-"]))
if report["ranks"] != 4 or not report["exchanges"]:
    sys.exit(f"the installed preload saw nothing:\n{out}")
with open(os.path.join(trace, [f for f in os.listdir(trace) if f.endswith(".jsonl")][0])) as f:
    if root not in f.readline():
        sys.exit("the installed bench met an NCCL from outside the installation")
package = os.path.join(os.path.dirname(preload), "railyard", "python")
setting = run([sys.executable, "-B", "-c", "from railyard import library; print(library.setting('RAILYARD_PLACEMENT'), library.engine_path())"],
              cwd=work, env={**{k: v for k, v in os.environ.items() if not k.startswith("RAILYARD_")}, "PYTHONPATH": package})
if setting.strip() != f"off {os.path.dirname(preload)}/librailyard-engine.so":
    sys.exit(f"the installed Python package says: {setting}")
if subprocess.run(["find", root, "-name", "__pycache__"], stdout=subprocess.PIPE, text=True).stdout:
    sys.exit("__pycache__ is installed")
shutil.rmtree(work)
print("installed, and working from there")
