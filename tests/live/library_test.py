#!/usr/bin/env python3
"""plugin/python/railyard/library.py: the C library as Python sees it: learning, dealing, recordings that `railyard plan` reads,
errors as exceptions, where the engine is found. Standard library only; what concerns NumPy runs where there is one.

usage: library_test.py RAILYARD ENGINE PRELOAD
"""
import array
import ctypes
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PACKAGES = os.path.join(TOP, "plugin", "python")
sys.path.insert(0, PACKAGES)
sys.dont_write_bytecode = True
from railyard import library  # noqa: E402

RAILYARD, ENGINE, PRELOAD = (os.path.abspath(a) for a in sys.argv[1:4])
os.environ["RAILYARD_ENGINE"] = ENGINE
SEED = int(os.environ.get("RY_TEST_SEED", time.time()))
rng = random.Random(SEED)
print(f"RY_TEST_SEED={SEED}")
work = tempfile.mkdtemp(prefix="ry-library-")
bad = []


def check(what, ok):
    if not ok:
        bad.append(what)
        print(f"WRONG: {what}", flush=True)


def refused(text, function, *args, **more):
    try:
        function(*args, **more)
        check(f"taken, rather than refused with '{text}'", False)
    except library.Error as e:
        check(f"'{e}' does not say '{text}'", text in str(e))


TOKENS, LAYERS, EXPERTS, PLACES = 48, 3, 8, 2
JOB = {"ranks": 4, "samples": 4, "layers": LAYERS, "experts": EXPERTS, "topk": 2, "places": PLACES, "distinct": 1,
       "rank_place": [0, 1, 1, 0], "expert_place": [[(e + layer) % PLACES for e in range(EXPERTS)] for layer in range(LAYERS)]}


def sample(home):
    """Tokens beyond 16 bits that tell the home; three quarters of the copies go there."""
    tokens = array.array("I", ((rng.randrange(60) if rng.random() < 0.3 else 30 * home + rng.randrange(30)) << 16 for _ in range(TOKENS)))
    counts, distinct = array.array("I", bytes(4 * LAYERS * EXPERTS)), array.array("I", bytes(4 * LAYERS * PLACES))
    for layer in range(LAYERS):
        for _ in range(TOKENS):
            place = home if rng.random() < 0.7 else 1 - home
            chosen = rng.sample([e for e in range(EXPERTS) if JOB["expert_place"][layer][e] == place], 2)
            if rng.random() < 0.3:
                chosen[1] = rng.choice([e for e in range(EXPERTS) if e != chosen[0]])
            for e in chosen:
                counts[layer * EXPERTS + e] += 1
            for p in {JOB["expert_place"][layer][e] for e in chosen}:
                distinct[layer * PLACES + p] += 1
    return tokens, counts, distinct


def place_of(slot):
    return JOB["rank_place"][slot // JOB["samples"]]


def check_deals(live, wrap=lambda tokens: tokens):
    right = moved = 0
    for _ in range(10):
        homes = [place_of(slot) for slot in range(16)]
        rng.shuffle(homes)
        order, plan = live.place([wrap(sample(h)[0]) for h in homes])
        check(f"{order} is no permutation", sorted(order) == list(range(16)))
        right += sum(homes[s] == place_of(slot) for slot, s in enumerate(order))
        check(f"{plan}: moved, but {order}", plan.moved == sum(s // 4 != slot // 4 for slot, s in enumerate(order)))
        check(f"{plan}", 0 < plan.placed <= plan.dealt < 1 and ("change ranks" in plan.why) == (plan.moved > 0))
        moved += plan.moved
    check(f"only {right} of 160 samples are at home", right >= 156)
    check("nothing ever moved", moved > 20)


def loading():
    """The engine brings UCX along, which must leave no trace in the process."""
    def handlers():
        with open("/proc/self/status", encoding="ascii") as f:
            return [line for line in f if line.startswith("SigCgt")]
    before, environment = handlers(), dict(os.environ)
    check(f"RAILYARD_PLACEMENT is {library.setting('RAILYARD_PLACEMENT')}", library.setting("RAILYARD_PLACEMENT") == "off")
    check("loading took signals over", handlers() == before)
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    check("loading left variables behind", dict(os.environ) == environment and libc.getenv(b"UCX_MEM_EVENTS") == os.environb.get(b"UCX_MEM_EVENTS"))
    os.environ["RAILYARD_PLACEMENT"] = "Watch"
    os.environ["RAILYARD_ROUTING"] = "/tmp/ä"
    check("a setting made later is not seen", library.setting("RAILYARD_PLACEMENT") == "watch")
    check("a setting's text is another one", library.setting("RAILYARD_ROUTING") == "/tmp/ä")
    os.environ["RAILYARD_PLACEMENT"] = "on"
    refused("RAILYARD_PLACEMENT='on' is not off, watch, batch or layer", library.setting, "RAILYARD_PLACEMENT")
    refused("there is no setting RAILYARD_NONE", library.setting, "RAILYARD_NONE")
    del os.environ["RAILYARD_PLACEMENT"], os.environ["RAILYARD_ROUTING"]


def finding():
    def path(folder, **env):
        code = "import sys; sys.path.insert(0, sys.argv[1]); from railyard import library; print(library.engine_path())"
        clean = {k: v for k, v in os.environ.items() if k != "RAILYARD_ENGINE"}
        p = subprocess.run([sys.executable, "-B", "-c", code, folder], env={**clean, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
        return p.stdout.strip() or p.stderr.strip().rpartition("\n")[2]
    libdir = os.path.join(work, "lib", "x86_64-linux-gnu")
    installed = os.path.join(libdir, "railyard", "python")
    shutil.copytree(os.path.join(PACKAGES, "railyard"), os.path.join(installed, "railyard"), ignore=shutil.ignore_patterns("__pycache__"))
    got = path(installed)
    check(f"without an engine: {got}", "librailyard-engine.so is not at " + libdir in got)
    os.symlink(ENGINE, os.path.join(libdir, "librailyard-engine.so"))
    check("not found where it is installed", path(installed) == os.path.join(libdir, "librailyard-engine.so"))
    check("RAILYARD_ENGINE is not obeyed", path(installed, RAILYARD_ENGINE=RAILYARD) == RAILYARD)
    got = path(installed, RAILYARD_ENGINE=RAILYARD, LD_PRELOAD=PRELOAD)
    check(f"{got} is not beside the preloaded library", os.path.samefile(got, ENGINE))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from railyard import library; library.setting('RAILYARD_LOG')"
    p = subprocess.run([sys.executable, "-B", "-c", code, PACKAGES], env={**os.environ, "RAILYARD_ENGINE": PRELOAD}, stderr=subprocess.PIPE,
                       text=True)
    check(f"another library as the engine: {p.stderr}", "library.Error" in p.stderr and "railyard_live_abi" in p.stderr)


def learning():
    folder, model = os.path.join(work, "routing"), os.path.join(work, "model")
    with library.Live(JOB) as live:
        live.record(folder, TOKENS, 250)
        order, plan = live.place([sample(i % 2)[0] for i in range(16)])
        check(f"{plan} before anything is known", order == list(range(16)) and plan.moved == 0 and "not sure" in plan.why)
        kept = []
        for i in range(300):
            tokens, counts, distinct = sample(rng.randrange(PLACES))
            kept.append((tokens, counts))
            form = i % 5  # the same in every form that is taken
            if form == 1:
                tokens, counts = tokens.tobytes(), bytearray(counts.tobytes())
            elif form == 2:
                tokens, counts = list(tokens), [list(counts[EXPERTS * y:EXPERTS * (y + 1)]) for y in range(LAYERS)]
            elif form == 3:
                tokens, counts = memoryview(tokens), array.array("Q", counts)
            elif form == 4:
                both = array.array("i", (t for t in tokens for _ in range(2)))
                tokens, counts = memoryview(both)[::2], memoryview(counts.tobytes())
            live.observe(tokens, counts, None if i % 7 == 0 else distinct, i % PLACES)
        state = live.state()
        check(f"{state}", state.sure and state.samples == 300 and state.captured > 0.8 and abs(state.crossed - state.even) < 0.05 and "sure" in state.why)
        check_deals(live)
        live.save(model)
        refused("/nowhere/x: cannot be written", live.save, "/nowhere/x")
        live.flush()
        plan_reads(folder, 250)
        recorded(folder, kept[:250])
    with library.Live(**JOB) as live:
        refused("No such file", live.load, os.path.join(work, "none"))
        live.load(model)
        check("a loaded model is not sure", live.state().sure)
        check_deals(live)
        refused("'tokens_per_sample' is 48, but this job has 47", live.record, folder, 47)
        refused("nothing is being recorded", live.flush)
        live.record(folder, TOKENS)
        tokens, counts, distinct = sample(0)
        live.observe(tokens, counts, distinct, 0)
    plan_reads(folder, 251)
    with library.Live({**JOB, "expert_place": [[0, 0, 0, 0, 1, 1, 1, 1]] * LAYERS}) as live:
        refused("another expert map", live.load, model)


def plan_reads(folder, samples):
    p = subprocess.run([RAILYARD, "plan", "-n", "2", "--gpus", "2", "--fit", "128", "--batch", "32", "--batches", "4", folder],
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    check(f"railyard plan: {p.stdout}{p.stderr}", p.returncode == 0 and f"{samples} samples of {TOKENS} tokens, {LAYERS} layers of {EXPERTS} experts" in p.stdout)


def recorded(folder, kept):
    """Byte for byte what was observed, in NumPy's format."""
    for name, each, want in (("tokens.npy", "I", [t for t, _ in kept]), ("counts.npy", "H", [c for _, c in kept])):
        with open(os.path.join(folder, name), "rb") as f:
            data = f.read()
        check(f"{name} is no .npy file", data[:8] == b"\x93NUMPY\x01\x00")
        got = array.array(each, data[10 + int.from_bytes(data[8:10], "little"):])
        check(f"{name} holds something else", got.tolist() == [x for row in want for x in row])


def refusals():
    refused("missing ['topk']", library.Live, {k: v for k, v in JOB.items() if k != "topk"})
    refused("unknown ['colour']", library.Live, JOB, colour=1)
    refused("rank_place has 3 elements, 4 are needed", library.Live, {**JOB, "rank_place": [0, 1, 1]})
    refused("expert_place has 16 elements, 24", library.Live, {**JOB, "expert_place": JOB["expert_place"][:2]})
    refused("no rank is at place 1", library.Live, {**JOB, "rank_place": [0] * 4})
    live = library.Live(JOB)
    tokens, counts, distinct = sample(0)
    refused("counts has 23 elements, 24 are needed", live.observe, tokens, counts[1:], None, 0)
    refused("distinct has 24 elements, 6 are needed", live.observe, tokens, counts, counts, 0)
    refused("at place 2 of 2", live.observe, tokens, counts, distinct, 2)
    refused("no 32-bit integers", live.observe, [-1] * TOKENS, counts, None, 0)
    refused("no 32-bit integers", live.observe, [0.5] * TOKENS, counts, None, 0)
    refused("no 32-bit integers", live.observe, array.array("f", tokens), counts, None, 0)
    refused("no 32-bit integers", live.observe, array.array("Q", [1 << 32] * TOKENS), counts, None, 0)
    refused("no 32-bit integers", live.observe, None, counts, None, 0)
    refused("7 bytes", live.observe, b"1234567", counts, None, 0)
    refused("0 tokens", live.observe, [], counts, None, 0)
    refused("copies of a sample of 24 tokens", live.observe, tokens[:24], counts, None, 0)
    refused("the list has 15 elements, 16", live.place, [tokens] * 15)
    refused("tokens of sample 3", live.place, [tokens] * 3 + ["text"] + [tokens] * 12)
    check("something was learned from refused samples", live.state().samples == 0)
    live.place([[]] * 16)  # lists of nothing are lists
    pid = os.fork()
    if pid == 0:
        try:
            live.state()
        except library.Error as e:
            live.close()
            os._exit("another process" not in str(e))
        os._exit(2)
    check("a forked child may use it", os.waitpid(pid, 0)[1] == 0)
    live.state()
    live.close()
    live.close()
    refused("closed", live.state)
    refused("closed", live.observe, tokens, counts, None, 0)


def fares():
    """Samples that want a little more of the other node than of their own stay: going there costs more. Where moves count as free
    (RY_TEST_FARE), as NetMoE has it, they go."""
    moved = {}
    for fare in ("1", "0"):
        os.environ["RY_TEST_FARE"] = fare
        layers = library.Layers(ranks=4, samples=8, tokens=100, layers=3, experts=8, topk=1, places=2, distinct=0,
                                rank_place=[0, 0, 1, 1], expert_place=[0] * 4 + [1] * 4)
        moved[fare] = 0
        for _ in range(40):
            any_moved, kinds, sample = False, [rng.randrange(2) for _ in range(32)], list(range(32))
            for layer in range(3):
                counts = array.array("I", [n for s in sample for n in ([15] * 4 + [10] * 4)[:: 1 if kinds[s] else -1]])
                order, plan = layers.next(layer, sample, counts, array.array("I", [0] * 64))
                sample = list(order) if plan.moved else sample
                any_moved |= plan.moved > 0
            moved[fare] += any_moved
    del os.environ["RY_TEST_FARE"]
    check("micro-batches with moves, by what these are said to cost: %s" % moved, moved["1"] == 0 and moved["0"] > 24)


def threads():
    live = library.Live(JOB)
    samples = [sample(i % 2) for i in range(16)]
    wrong = []

    def hammer(kind):
        try:
            for i in range(40):
                if kind % 2:
                    live.observe(*samples[i % 16], 0)
                elif sorted(live.place([s[0] for s in samples])[0]) != list(range(16)):
                    wrong.append("no permutation")
        except library.Error as e:  # the last thread closes it
            if "closed" not in str(e):
                wrong.append(str(e))
        if kind == 3:
            live.close()
    all_ = [threading.Thread(target=hammer, args=(k,)) for k in range(4)]
    for t in all_:
        t.start()
    for t in all_:
        t.join()
    check(f"threads: {wrong}", not wrong)


def with_numpy(numpy):
    with library.Live(JOB) as live:
        for i in range(200):
            tokens, counts, distinct = (numpy.array(x, dtype=numpy.uint32) for x in sample(i % 2))
            if i % 3 == 1:
                tokens, counts = tokens.astype(numpy.int64), counts.reshape(LAYERS, EXPERTS).astype(numpy.int32)
            elif i % 3 == 2:
                tokens, counts = numpy.repeat(tokens, 2)[::2], numpy.asfortranarray(counts.reshape(LAYERS, EXPERTS))
            tokens.setflags(write=False)
            live.observe(tokens, counts, distinct, 0)
        check_deals(live, lambda tokens: numpy.array(tokens, dtype=numpy.int64 if rng.randrange(2) else numpy.uint32))
        refused("no 32-bit integers", live.observe, numpy.zeros(TOKENS), counts, None, 0)
        order, _ = live.place(numpy.array([sample(i % 2)[0] for i in range(16)], dtype=numpy.uint32))
        check("a matrix is no list", sorted(order) == list(range(16)))
    p = library.Live({**JOB, "rank_place": numpy.array(JOB["rank_place"]), "expert_place": numpy.array(JOB["expert_place"])})
    p.close()


try:
    if "--numpy" in sys.argv:
        import numpy
        with_numpy(numpy)
    else:
        for part in (loading, finding, learning, refusals, fares, threads):
            part()
        try:
            import numpy
            with_numpy(numpy)
        except ImportError:
            other = os.environ.get("RY_TEST_PYTHON")
            argv = [other or "", "-B", os.path.abspath(__file__), RAILYARD, ENGINE, PRELOAD, "--numpy"]
            if other and not subprocess.run([other, "-c", "import numpy"], stderr=subprocess.DEVNULL).returncode:
                check("with NumPy", subprocess.run(argv).returncode == 0)
            else:
                print("SKIPPED in part: no NumPy here, nor in RY_TEST_PYTHON")
finally:
    shutil.rmtree(work)
sys.exit(1 if bad else 0)
