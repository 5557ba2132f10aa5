#!/usr/bin/env python3
"""What the drivers of tests/gpu conclude from, without GPUs: bytes read from traces, curves held against curves, pictures of them; and, where
there is torch, weights dealt to another number of ranks and samples dealt in another order."""
import json
import os
import random
import sys
import tempfile
import xml.dom.minidom

import watch_help as help

r = help.seeded()
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "gpu"))
import placement_jobs
import same_training


def traces(folder):
    """Two ranks on two nodes. Bytes for other nodes, what dedup and sums leave out, and nothing that was before `since`."""
    asked = saved = 0
    for rank in (0, 1):
        lines = [{"t": "head"}, {"t": "comm", "comm": "c", "rank": rank}]
        if rank == 0:  # once, and for all of the communicator
            lines.append({"t": "map", "comm": "c", "rank": 0, "nodes": 2, "node": [0, 1]})
        for n in range(40):
            sent = [r.randrange(1000), r.randrange(1000)]
            x = {"t": "x", "comm": "c", "rank": rank, "n": n, "wall_ns": 100 + n, "type_bytes": 2, "strategy": "dedup" if n % 3 else "direct"}
            x.update({"send": sent} if n % 2 else {"send_pairs": [1 - rank, sent[1 - rank]]})
            cross, packed = sent[1 - rank] * 2, sent[1 - rank] // 2
            rows = {"t": "rows", "comm": "c", "rank": rank, "n": n, "cross": cross, "packed": packed, "strategy": ["direct", "dedup", "sum"][n % 3]}
            lines += [rows, x] if n % 5 == 0 else [x, rows]
            if n >= 10:
                asked += cross
                saved += cross - packed if n % 3 else 0
        with open(os.path.join(folder, "trace-h-%d.jsonl" % rank), "w") as f:
            f.write("\n".join(map(json.dumps, lines)) + '\n{"t":"x","comm')  # cut off
    found = placement_jobs.crossed(folder, 110)
    assert found == (asked, asked - saved, 30, {"dedup": 40, "direct": 20}), (found, asked, saved)


def walk(steps, size):
    """A curve with noise that grows, as that of runs which drift apart."""
    at, out = 0.0, []
    for s in range(steps):
        at += r.gauss(0, size)
        out.append(5 - 2 * s / steps + at)
    return out


def curves(folder):
    inside = shifted = steeper = 0
    for _ in range(60):
        losses = {"plain %d" % i: walk(300, 1e-3) for i in range(5)}
        losses["same"] = walk(300, 1e-3)
        losses["above"] = [v + 0.2 for v in walk(300, 1e-3)]
        losses["slower"] = [v + 0.2 * s / 300 for s, v in enumerate(walk(300, 1e-3))]
        found = same_training.judge(losses, ["plain %d" % i for i in range(5)])
        inside, shifted, steeper = inside + found["same"]["ok"], shifted + found["above"]["ok"], steeper + found["slower"]["ok"]
    print("measuring: of 60 curves alike %d lie within, of 60 shifted ones %d, of 60 that lag %d" % (inside, shifted, steeper))
    assert inside >= 50 and not shifted and not steeper
    equal = {"plain %d" % i: [1.0] * 20 for i in range(3)}
    found = same_training.judge({**equal, "same": [1.0] * 20, "other": [1.0] * 19 + [1.1]}, list(equal))
    assert found["same"]["ok"] and not found["other"]["ok"]
    peaks = {"plain %d" % i: [float(k // same_training.BIN % 5 == i) for k in range(100)] for i in range(5)}  # each alone at the top in turn
    found = same_training.judge({**peaks, "same": [0.0] * 100, "edge": [1.9] * 100}, list(peaks))
    assert found["same"]["ok"] and found["edge"]["inside"] == 1 and not found["edge"]["ok"]
    path = os.path.join(folder, "c.svg")
    same_training.picture(path, {k: same_training.means(v) for k, v in losses.items()}, ["plain %d" % i for i in range(5)])
    assert len(xml.dom.minidom.parse(path).getElementsByTagName("polyline")) == 11


FAKE = """#!/bin/sh
# Stands in for the interpreter that runs placement: notes its call, leaves a folder, prints a table, fails when told to.
echo "$@" >> calls
while [ $# -gt 0 ]; do [ "$1" = --keep ] && keep=$2; shift; done
part=$(basename "$keep")
[ -e "$keep/old" ] && echo "an earlier try's folder is there" && exit 9
mkdir -p "$keep/table/plain"; touch "$keep/old"; echo weights > "$keep/weights"; echo said > "$keep/table/plain/output"
printf 'placement: noise\\nwhat it is\\n| table of %s |\\n' "$part"
[ -e "fail-$part" ] && exit 2
[ -e "odd-$part" ] && exit 1
exit 0
"""


def all_parts(folder):
    """placement_all: what it passes on is what placement knows; parts are run in order, once, and only while there is time; a failed one
    again when asked to, from nothing; what comes back has tables and logs, and no weights."""
    import importlib.machinery
    import importlib.util
    import subprocess
    import tarfile
    import types

    def loaded(name):
        path = os.path.join(os.path.dirname(same_training.__file__), name)
        spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, path))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    sys.dont_write_bytecode = True
    placement, every = loaded("placement"), loaded("placement_all")
    for dry in (False, True):
        for part, (_, needs, _, _) in every.PARTS.items():
            a = types.SimpleNamespace(python="py", into="/i", build="b", text="/t", dry=dry, more=["--close", "0.5"])
            parsed = placement.parse(every.argv(a, part)[2:] + ["--budget", "99"])
            assert parsed.emulated == dry and parsed.close == 0.5 and parsed.keep == "/i/" + part
            assert parsed.learned == (needs and "/i/" + needs) and (needs is None or list(every.PARTS).index(needs) < list(every.PARTS).index(part))
            if needs:  # weights are of the same model
                other = placement.parse(every.argv(a, needs)[2:])
                assert all(getattr(parsed, k) == getattr(other, k) for k in placement_jobs.LEARNED), part

    fake, into = os.path.join(folder, "fake"), os.path.join(folder, "into")
    with open(fake, "w") as f:
        f.write(FAKE)
    os.chmod(fake, 0o755)

    def call(status, parts, budget=10000, more=()):
        done = subprocess.run([sys.executable, every.__file__, "--into", into, "--text", "t", "--python", fake, "--parts", parts, "--budget", str(budget),
                               "--out", os.path.join(folder, "out"), *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == status, (done.returncode, status, done.stdout)
        with open(os.path.join(folder, "calls")) as f:
            return done.stdout, [os.path.basename(line.split(" --keep ")[1].split()[0]) for line in f]
    open(os.path.join(folder, "fail-k2"), "w").close()
    open(os.path.join(folder, "odd-curve"), "w").close()
    out, calls = call(3, "learn,k2,gradients", budget=270)  # no time for k2
    assert calls == ["learn", "gradients"], calls
    assert "k2 is left" in out and "left for the next call: k2" in out and "| table of gradients |" in out and "noise\n== " not in out, out
    out, calls = call(1, "learn,k2,gradients,curve,k8")
    assert calls[2:] == ["k2", "curve"] and "failed: k2 curve" in out and "k8 is left: learn-k8 is not there" in out, out
    assert call(1, "learn,k2,curve")[1] == calls, "what failed was run again unasked"
    os.unlink(os.path.join(folder, "fail-k2"))
    out, calls = call(1, "learn,k2,curve", more=["--again", "--", "--samples"])
    assert calls[4:] == ["k2"] and "done: learn k2 curve; failed: curve;" in out, out
    out, calls = call(0, "learn,k2")
    assert len(calls) == 5
    names = tarfile.open(os.path.join(folder, "out", "results.tgz")).getnames()
    assert "k2.txt" in names and "k2/table/plain/output" in names and not any("weights" in n for n in names), names


def dealt(folder):
    """Experts keep their numbers, and everything else its value, whoever holds it."""
    import moe_job
    import torch
    whole = [{"w": torch.randn(3), **{"moe.local_experts.%d.fc" % i: torch.full((2,), 2.0 * rank + i) for i in range(2)}} for rank in range(2)]
    for rank in range(2):
        whole[rank]["w"] = whole[0]["w"]
        torch.save(whole[rank], os.path.join(folder, "rank%d.pt" % rank))
    for world in (1, 2, 4):
        for rank in range(world):
            got = moe_job.weights(folder, rank, world)
            n = 4 // world
            assert torch.equal(got["w"], whole[0]["w"]) and len(got) == 1 + n
            assert [got["moe.local_experts.%d.fc" % i][0].item() for i in range(n)] == [float(rank * n + i) for i in range(n)], (world, rank)


def reordered(folder):
    import domains
    import numpy as np
    for name in ("a", "b"):
        np.save(os.path.join(folder, name + ".npy"), np.arange(2000, dtype=np.uint16) % 256)
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump({"vocabulary": 256, "domains": {"a": 2000, "b": 2000}, "pieces": []}, f)

    def steps(order):
        ranks = [domains.batches(folder, 16, 5, rank, 3, 7, reorder=order)[1] for rank in range(3)]
        return [[next(rank)["sample"].tolist() for rank in ranks] for _ in range(20)]  # into a third epoch
    plain, other, again, third = steps(None), steps(1), steps(1), steps(2)
    assert other == again and other != third
    assert all(sorted(sum(x, [])) == sorted(sum(y, [])) for x, y in zip(plain, other)), "other samples in a step"
    assert sum(x != y for p, o in zip(plain, other) for x, y in zip(p, o)) > 50, "nothing was dealt otherwise"


with tempfile.TemporaryDirectory() as folder:
    traces(folder)
with tempfile.TemporaryDirectory() as folder:
    curves(folder)
with tempfile.TemporaryDirectory() as folder:
    all_parts(folder)
try:
    import numpy  # noqa: F401
    import torch  # noqa: F401
except ImportError:
    print("measuring: no torch here: weights and orders of samples are not looked at")
    sys.exit(0)
with tempfile.TemporaryDirectory() as folder:
    dealt(folder)
with tempfile.TemporaryDirectory() as folder:
    reordered(folder)
print("measuring: as it must be")
