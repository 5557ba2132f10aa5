#!/usr/bin/env python3
"""What Python does at its start with the adapter's folder on PYTHONPATH, and what happens to modules that are waited for: in
real interpreters, with packages written to a temporary folder. usage: hook_test.py"""

import os
import subprocess
import sys
import tempfile
import textwrap
import time

HERE = os.path.dirname(os.path.abspath(__file__))
OURS = os.path.abspath(os.path.join(HERE, "..", "..", "plugin", "python"))
bad = 0


def python(code, *options, env=None, path=(), exe=sys.executable, status=0):
    e = {k: v for k, v in os.environ.items() if not k.startswith("RAILYARD_") and k != "PYTHONPATH"}
    e["PYTHONPATH"] = os.pathsep.join([OURS, *path])
    e.update(env or {})
    p = subprocess.run(
        [exe, *options, "-c", textwrap.dedent(code)], env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60
    )
    return p.stdout.strip(), p.stderr.strip(), p.returncode


def check(name, got, want):
    global bad
    if got != want:
        bad += 1
        print(f"{name}: {got!r} instead of {want!r}")


def write(folder, name, text):
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write(textwrap.dedent(text))


BATCH = {"RAILYARD_PLACEMENT": "batch"}


def start(folder):
    loaded = "import sys; print('railyard' in sys.modules, any(type(f).__module__ == 'railyard.hook' for f in sys.meta_path))"
    check("nothing asked", python(loaded), ("False False", "", 0))
    check("off", python(loaded, env={"RAILYARD_PLACEMENT": "off"}), ("False False", "", 0))
    for env in (BATCH, {"RAILYARD_PLACEMENT": "watch"}, {"RAILYARD_ROUTING": "/tmp/x"}, {"RAILYARD_EXPERTS": "x.json"}):
        check(f"{env}", python(loaded, env=env), ("True True", "", 0))
    check("disabled", python(loaded, env={**BATCH, "RAILYARD_DISABLE": "1"}), ("False False", "", 0))
    for option in ("-I", "-S", "-E"):
        check(option, python(loaded, option, env=BATCH), ("False False", "", 0))
    check(
        "child",
        python("import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', %r]).returncode)" % loaded, env=BATCH),
        ("True True", "", 0),
    )
    check(
        "no new names",
        python(
            "import sys; print(sorted(set(m.split('.')[0] for m in sys.modules) & {'torch', 'numpy', 'ctypes', 'json'}))",
            env=BATCH,
        ),
        ("[]", "", 0),
    )
    # another sitecustomize
    other = os.path.join(folder, "other")
    write(other, "sitecustomize.py", "import sys\nsys.was_here = __file__\nname = 'the other one'\n")
    for env in ({}, BATCH):
        check(
            "hidden sitecustomize",
            python(
                "import sys, sitecustomize; print(sys.was_here == sitecustomize.__file__, sitecustomize.name)",
                path=[other],
                env=env,
            ),
            ("True the other one", "", 0),
        )
    raising = os.path.join(folder, "raising")
    write(raising, "sitecustomize.py", "raise RuntimeError('of its own')\n")
    out, err, code = python("print(5)", path=[raising], env=BATCH)
    check("a sitecustomize that raises", (out, "of its own" in err, code), ("5", True, 0))
    # ours that cannot start ends nothing
    out, err, code = python("print(5)", env={**BATCH, "PYTHONPATH": folder + "/broken"})
    write(folder, "broken/railyard/__init__.py", "VERSION = 1\n")
    write(folder, "broken/railyard/hook.py", "raise RuntimeError('broken')\n")
    with open(os.path.join(OURS, "sitecustomize.py")) as f:
        write(folder, "broken/sitecustomize.py", f.read())
    out, err, code = python("print(5)", path=[other], env={**BATCH, "PYTHONPATH": os.path.join(folder, "broken")})
    check("an adapter that cannot start", (out, err.count("\n"), "placement is off" in err, code), ("5", 0, True, 0))
    # a virtual environment, with a sitecustomize in its site-packages
    venv = os.path.join(folder, "venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    exe = os.path.join(venv, "bin", "python")
    site = subprocess.run(
        [exe, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    write(site, "sitecustomize.py", "import sys\nsys.of_venv = True\n")
    check(
        "venv",
        python("import sys; print(sys.of_venv, sys.prefix != sys.base_prefix, 'railyard' in sys.modules)", exe=exe, env=BATCH),
        ("True True True", "", 0),
    )


PACKAGE = {
    "frame/__init__.py": "order = ['frame']\n",
    "frame/core/__init__.py": "import frame; frame.order.append('core')\nfrom frame.core import layers\n",
    "frame/core/layers.py": "import frame; frame.order.append('layers')\nclass Layer:\n"
    "    def forward(self, x):\n        return x + 1\n",
    "frame/data.py": "class Loader:\n    pass\n",
    "frame/breaks.py": "import frame\nframe.tries = getattr(frame, 'tries', 0) + 1\nif frame.tries == 1:\n"
    "    raise OSError('the first time')\nvalue = 3\n",
}
ADAPTER = """
    import sys
    from railyard import hook
    import types
    adapter = types.ModuleType("railyard.fake")
    def wrap(module):
        original = module.Layer.forward
        def forward(self, x):
            return 10 * original(self, x)
        module.Layer.forward = forward
    def data(module):
        module.Loader.patched = True
    adapter.WATCHES = {"frame.core.layers": wrap, "frame.data": data}
    sys.modules["railyard.fake"] = adapter
    hook.start({"frame.core": [("fake", ("batch",)), ("absent", ("batch",))]})
"""


def waiting(folder):
    for name, text in PACKAGE.items():
        write(folder, name, text)

    def run(code, env=BATCH, before=""):
        return python(
            before + textwrap.dedent(ADAPTER) + textwrap.dedent(code),
            env={"RAILYARD_LOG": "info", "RAILYARD_PLACEMENT": "batch"},
            path=[folder],
        )

    check(
        "patched",
        run("""
        import frame.core, frame.data
        from frame.core.layers import Layer
        print(Layer().forward(1), frame.data.Loader.patched, frame.order)
        import inspect
        module = frame.core.layers
        print(type(module.__loader__).__name__, module.__spec__.loader is module.__loader__, 'class Layer' in inspect.getsource(Layer))
        ours = [f for f in sys.meta_path if type(f).__module__ == 'railyard.hook']
        print([f for f in ours if 'frame.core' in hook._triggers or hook._waiting])
    """),
        ("20 True ['frame', 'core', 'layers']\nSourceFileLoader True True\n[]", "", 0),
    )
    check(
        "already imported",
        run(
            "import frame.core, frame.data\nprint(frame.core.layers.Layer().forward(1), frame.data.Loader.patched)",
            before="import frame.core, frame.data\n",
        ),
        ("20 True", "", 0),
    )
    out, err, code = run("""
        def broken(module): raise KeyError("missing")
        hook.when_imported("frame.data", broken)
        import frame.data
        print(frame.data.Loader)
    """)
    check(
        "a patch that raises",
        (
            out,
            err.count("\n"),
            "the patch of frame.data failed: KeyError: 'missing'" in err and "; placement is off" in err,
            code,
        ),
        ("<class 'frame.data.Loader'>", 0, True, 0),
    )
    check(
        "a module that raises at first",
        run("""
        got = []
        hook.when_imported("frame.breaks", lambda m: got.append(m.value))
        try:
            import frame.breaks
        except OSError as e:
            print(e, got)
        import frame.breaks
        print(got)
    """),
        ("the first time []\n[3]", "", 0),
    )
    check(
        "a module that is not there",
        run("""
        hook.when_imported("frame.nothing", print)
        try:
            import frame.nothing
        except ModuleNotFoundError as e:
            print(e)
    """),
        ("No module named 'frame.nothing'", "", 0),
    )
    check(
        "threads",
        run("""
        import threading, importlib
        calls = []
        hook.when_imported("frame.data", calls.append)
        ts = [threading.Thread(target=importlib.import_module, args=("frame.data",)) for _ in range(8)]
        [t.start() for t in ts]; [t.join() for t in ts]
        print(len(calls))
    """),
        ("1", "", 0),
    )


def cost():
    """Of sitecustomize where nothing is asked: in a process of its own, over many times."""
    code = f"""
        import os, sys, time
        sys.modules.pop('sitecustomize', None)
        with open({os.path.join(OURS, 'sitecustomize.py')!r}) as f:
            code = compile(f.read(), {os.path.join(OURS, 'sitecustomize.py')!r}, 'exec')
        times = []
        for _ in range(50):
            began = time.perf_counter()
            exec(code, {{'__name__': 'sitecustomize', '__file__': {os.path.join(OURS, 'sitecustomize.py')!r}}})
            times.append(time.perf_counter() - began)
        print(min(times))
    """
    out, err, _ = python(code)
    print(f"sitecustomize takes {1e6 * float(out):.0f} us where nothing is asked for")
    if float(out) > 1e-3:
        check("cost", out, "< 1 ms")


with tempfile.TemporaryDirectory(prefix="ry-hook-") as tmp:
    began = time.time()
    start(tmp)
    waiting(os.path.join(tmp, "packages"))
    cost()
    print(f"{time.time() - began:.1f} s")
sys.exit(1 if bad else 0)
