#!/usr/bin/env python3
"""`railyard run`: what it sets, what it starts, what it says. usage: run_test.py RAILYARD"""

import os
import shlex
import subprocess
import sys
import tempfile

RAILYARD = os.path.abspath(sys.argv[1])
PRELOAD = os.path.realpath(os.path.join(os.path.dirname(RAILYARD), "..", "..", "plugin", "librailyard.so"))
OURS = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "plugin", "python"))
# Under a sanitizer the library brings a runtime along that wants to be first.
SANITIZED = any(
    name in subprocess.run(["ldd", PRELOAD], stdout=subprocess.PIPE, text=True, check=False).stdout
    for name in ("libasan", "libtsan")
)
bad = 0


def run(*args, env=None, command=("true",)):
    e = {k: v for k, v in os.environ.items() if not k.startswith("RAILYARD_") and k not in ("LD_PRELOAD", "PYTHONPATH", "CUDA_MODULE_LOADING")}
    e.update(env or {})
    p = subprocess.run([RAILYARD, "run", *args], env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60)
    return p.returncode, p.stdout, p.stderr.strip()


def check(name, got, want):
    global bad
    if got != want:
        bad += 1
        print(f"{name}: {got!r} instead of {want!r}")


def variables(text):
    """As a shell has them that evaluates the text."""
    out = (
        subprocess.run(
            ["env", "-i", "/bin/sh", "-c", text + "\n/usr/bin/env -0"], stdout=subprocess.PIPE, text=True, check=True, env={}
        ).stdout
        if not SANITIZED
        else "\0".join(shlex.split(line)[1] for line in text.splitlines())
    )
    return {
        k: v
        for k, v in (e.split("=", 1) for e in out.split("\0") if e)
        if k.startswith("RAILYARD_") or k in ("LD_PRELOAD", "PYTHONPATH")
    }


both = {"LD_PRELOAD": PRELOAD, "PYTHONPATH": OURS}
check("print", variables(run("--print")[1]), both)
check(
    "in front",
    variables(run("--print", env={"LD_PRELOAD": "/lib/none.so", "PYTHONPATH": "/a:/b"})[1]),
    (
        {"LD_PRELOAD": PRELOAD + ":/lib/none.so", "PYTHONPATH": OURS + ":/a:/b"}
        if not SANITIZED
        else {"LD_PRELOAD": PRELOAD + ":/lib/none.so", "PYTHONPATH": OURS + ":/a:/b"}
    ),
)
check("twice", variables(run("--print", env={"PYTHONPATH": f"/a:{OURS}:/b"})[1])["PYTHONPATH"], OURS + ":/a:/b")
check(
    "options",
    variables(
        run(
            "--print",
            "--placement",
            "batch",
            "--experts",
            "it's $HOME.json",
            "--strategy=dedup",
            "--combine",
            "sum",
            "--trace",
            "/t",
            "--record",
            "/r",
            "--log",
            "info",
        )[1]
    ),
    {
        **both,
        "RAILYARD_PLACEMENT": "batch",
        "RAILYARD_EXPERTS": "it's $HOME.json",
        "RAILYARD_STRATEGY": "dedup",
        "RAILYARD_COMBINE": "sum",
        "RAILYARD_TRACE": "/t",
        "RAILYARD_ROUTING": "/r",
        "RAILYARD_LOG": "info",
    },
)
check(
    "a wrong value",
    run("--placement", "batc", "--", "true"),
    (2, "", "railyard run: RAILYARD_PLACEMENT='batc' is not off, watch, batch or layer"),
)
check("no command", run()[0], 2)
check("a command and --print", run("--print", "--", "true")[0], 2)
check(
    "no such command",
    run("--", "no-such-command-here"),
    (127, "", "railyard run: cannot run no-such-command-here: No such file or directory"),
)
with tempfile.NamedTemporaryFile() as f:
    check("no program", run("--", f.name), (126, "", f"railyard run: cannot run {f.name}: Permission denied"))
hold = {"RAILYARD_HOLD": "no"}
eager = "export CUDA_MODULE_LOADING='EAGER'\n"
check("eager loading", run("--print", env=hold)[1].endswith(eager), True)
check("eager loading, held", "CUDA_MODULE" in run("--print")[1], False)
check("lazy loading is the job's to choose", "CUDA_MODULE" in run("--print", env={**hold, "CUDA_MODULE_LOADING": "LAZY"})[1], False)
if not SANITIZED:
    show = 'echo "$CUDA_MODULE_LOADING"'
    check("eager for the command", run("--", "sh", "-c", show, env=hold)[1], "EAGER\n")
    for value, said in (("no", "EAGER\n"), ("OFF", "EAGER\n"), ("yes", "\n")):  # by the preload, where no launcher does
        e = {"PATH": os.environ["PATH"], "LD_PRELOAD": PRELOAD, "RAILYARD_HOLD": value}
        p = subprocess.run(["sh", "-c", "/usr/bin/env sh -c '%s'" % show], env=e, stdout=subprocess.PIPE, text=True)
        check(f"eager by the preload, {value}", p.stdout, said)
    queues = 'echo "$CUDA_DEVICE_MAX_CONNECTIONS"'
    for more, said in (({}, "32\n"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "1\n"), ({"CUDA_MPS_PIPE_DIRECTORY": "/x"}, "\n"), ({"RAILYARD_HOLD": "yes"}, "\n")):
        if not os.path.exists("/tmp/nvidia-mps/control"):
            e = {"PATH": os.environ["PATH"], "LD_PRELOAD": PRELOAD, "RAILYARD_HOLD": "no", **more}
            p = subprocess.run(["sh", "-c", "/usr/bin/env sh -c '%s'" % queues], env=e, stdout=subprocess.PIPE, text=True)
            check(f"hardware queues, {more}", p.stdout, said)
    check("status", run("--", "sh", "-c", "exit 7")[0], 7)
    check("signal", run("--", "sh", "-c", "kill -9 $$")[0], -9)
    check(
        "arguments",
        run("--log", "warn", "--", "sh", "-c", 'printf "%s|" "$@" "$RAILYARD_LOG"', "sh", "a b", "--print", "")[1],
        "a b|--print||warn|",
    )
    check("the options end where the command begins", run("--log", "warn", "printf", "%s", "--log")[1], "--log")
    check("preloaded", run("--", "grep", "-c", "librailyard.so", "/proc/self/maps")[0], 0)
    check(
        "the adapter",
        run(
            "--placement",
            "batch",
            "--",
            sys.executable,
            "-c",
            "import sys; print('railyard.hook' in sys.modules, sys.modules['railyard'].__file__)",
        )[1],
        f"True {OURS}/railyard/__init__.py\n",
    )
    check(
        "within itself", run("--", RAILYARD, "run", "--", "sh", "-c", 'echo "$LD_PRELOAD $PYTHONPATH"')[1], f"{PRELOAD} {OURS}\n"
    )
sys.exit(1 if bad else 0)
