"""The jobs that placement compares: what each is told, what they all begin with, and how many bytes of theirs crossed nodes.

Owns: command lines and settings of the jobs, learning (weights from nothing, unshaped, on as few ranks as share no GPU), recording routing
with these weights, the planner's call, reading traces. Not: who runs when, what is compared (placement, same_training.py).
"""
import glob
import json
import os
import shutil
import subprocess
import sys
import time

from turns import HERE, Emulated, Failed, Job, cluster

NAME = "placement"
FRAMEWORKS = {"megatron": "megatron_moe.py", "deepspeed": "deepspeed_moe.py"}
PARTS = {"megatron": ("samples", "experts", "sum", "layer", "rides", "netmoe"), "deepspeed": ("samples", "experts")}
LEARNED = ("framework", "top_k", "experts", "layers", "hidden", "ffn", "seq")  # what weights are of
PLANNED = ("shape",)  # what the map is for, too


# What is redirected passes through memory of Railyard's, twice, beside the packed messages' own: more than four times an exchange in all.
REDIRECTING = "RAILYARD_STAGING=1G"


def say(text):
    print("placement: " + text, file=sys.stderr, flush=True)


class Standing:
    """A cluster while its jobs run."""

    def __init__(self, a, nodes, gpus, nic):
        self.emulated = a.emulated  # each job brings its own
        self.argv = ["up", "--name", NAME, "--nodes", str(nodes), "--gpus", str(gpus), *(["--nic", nic] if nic != "none" else []),
                     *(["--devices", a.devices] if a.devices else [])]

    def __enter__(self):
        if not self.emulated:
            cluster(*self.argv)

    def shape(self, nic):
        if not self.emulated:
            cluster("shape", "--name", NAME, *(["--nic", nic] if nic != "none" else []))

    def __exit__(self, *error):
        if self.emulated:
            return
        try:
            cluster("down", "--name", NAME)
        except Failed as e:
            say(str(e))


def command(a, out, batch, more):
    return [a.python, os.path.join(HERE, FRAMEWORKS[a.framework]), "--out", out, "--loader", a.text,
            "--top-k", str(a.top_k), "--experts", str(a.experts), "--batch", str(batch), "--seq", str(a.seq), "--layers", str(a.layers),
            "--hidden", str(a.hidden), "--ffn", str(a.ffn), *(["--emulated"] if a.emulated else ["--cpu"] if a.cpu else []),
            *(["--balance", str(a.balance)] if a.framework == "megatron" else ["--engine"]), *a.train.split(), *more]


def tool(a):
    return os.path.abspath(os.path.join(a.build, "tools", "railyard", "railyard"))


def job(a, label, nodes, gpus, folder, argv, env, preload, end, **more):
    """A job on the cluster that is up, or emulated."""
    return Job(NAME, label, nodes, gpus, folder, argv, env, preload, a.pin, max(60, end - time.monotonic()), patience=a.patience,
               emulated=Emulated(tool(a), []) if a.emulated else None, **more)


def adapter():
    path = [os.path.join(os.path.dirname(os.path.dirname(HERE)), "plugin", "python")] + os.environ.get("PYTHONPATH", "").split(":")
    return "PYTHONPATH=" + ":".join(p for p in path if p)


def homes(folder, label, name):
    """A copy of a home model for one job, which goes on learning and saves it."""
    path = os.path.join(folder, "homes-" + label.replace(" ", "").replace("+", "").replace(",", "-"))
    shutil.copyfile(os.path.join(folder, name), path)
    return "RAILYARD_HOME_MODEL=" + path


def exchanging(a, fp32=False):
    """The environment of every job that Railyard is preloaded in."""
    env = ["RAILYARD_STRATEGY=" + a.strategy, "RAILYARD_LOG=info", *(["RY_TEST_LATE=60"] if a.emulated else [])]
    if a.framework == "deepspeed":
        env.append("RAILYARD_ROW_BYTES=%d" % ((4 if "--fp32" in a.train or fp32 else 2) * a.hidden))  # equal splits: nothing else tells how wide a row is
    return env


def settings(a, folder):
    """{job: its environment}, in the order of the table; None: no Railyard."""
    base = exchanging(a)
    batch = base + ["RAILYARD_PLACEMENT=batch"]
    experts = batch + ["RAILYARD_EXPERTS=" + os.path.join(folder, "plan.json")]
    also = [v if not v.startswith("RAILYARD_STRATEGY=") else "RAILYARD_STRATEGY=" + str(a.also) for v in base]
    jobs = {"plain": None, a.strategy: base}
    if a.also:
        jobs[a.also] = also
    if "samples" in a.parts:
        jobs["+ samples"] = batch + [homes(folder, "+ samples", "homes-unmoved")]
    if "experts" in a.parts:
        jobs["+ experts"] = experts + [homes(folder, "+ experts", "homes-planned")]
    if "sum" in a.parts:
        jobs["+ sum"] = experts + [homes(folder, "+ sum", "homes-planned"), "RAILYARD_COMBINE=sum:%d" % a.top_k]
        if a.also:
            label = "+ sum, " + a.also
            jobs[label] = also + experts[len(base):] + [homes(folder, label, "homes-planned"), "RAILYARD_COMBINE=sum:%d" % a.top_k]
    layer = base + ["RAILYARD_PLACEMENT=layer", REDIRECTING]
    if "layer" in a.parts:
        jobs[a.strategy + ", layer"] = layer
    if "rides" in a.parts:
        jobs[a.strategy + ", layer, rides"] = layer + ["RAILYARD_RESIDUAL=rides"]
    if "netmoe" in a.parts:  # whoever would be nearer to the experts moves, as if that were free
        jobs[a.strategy + ", layer, moves free"] = layer + ["RY_TEST_FARE=0"]
    return jobs


def finish(a, job, told):
    try:
        job.finish()
        return [m for m in job.remarks() if any(w in m for w in told)]
    finally:
        job.close()


def learn(a, folder, end):
    """The weights to begin with: from nothing, unwatched, where nothing slows it down."""
    nodes, gpus = (int(v) for v in a.learn_shape.split("x"))
    batch, began = max(1, a.learn_batch // (nodes * gpus)), time.monotonic()
    more = ["--steps", str(a.learn_steps), "--lr", str(a.learn_lr), "--lr-warmup", str(max(1, a.learn_steps // 20)),
            "--lr-decay", str(a.learn_steps), "--save", os.path.join(folder, "weights"), *a.learn_train.split()]
    learning = job(a, "learn", nodes, gpus, folder, command(a, os.path.join(folder, "learn"), batch, more), a.env, None, end, turns=False)
    finish(a, learning, ())
    r = learning.result("train.json")
    losses = [float.fromhex(v) for v in r["losses"]]
    say("learned in %.0f s: %d steps of %d samples, loss %.3f -> %.3f, median step %.0f ms, %.1f GiB at most" % (
        time.monotonic() - began, len(losses), batch * nodes * gpus, losses[0], losses[-1], sorted(r["step_ms"])[len(losses) // 2],
        r["peak_gib"][1]))


def record(a, folder, end):
    """Routing under these weights, of samples in another order. What was said of it."""
    nodes, gpus = (int(v) for v in a.learn_shape.split("x"))
    batch, began = max(1, a.learn_batch // (nodes * gpus)), time.monotonic()
    env = [adapter(), "RAILYARD_STRATEGY=observe", "RAILYARD_PLACEMENT=watch", "RAILYARD_ROUTING=" + os.path.join(folder, "routing"),
           "RAILYARD_LOG=info"]
    steps = 2 + -(-a.record // (batch * nodes * gpus))  # the last ones are not read any more
    recording = job(a, "record", nodes, gpus, folder, command(a, os.path.join(folder, "record"), batch, [
        "--steps", str(steps), "--lr", str(a.lr / 100), "--seed", "2", "--load", os.path.join(folder, "weights")]),
        a.env + env, a.preload, end, turns=False)
    told = finish(a, recording, ("placement", "routing", "warning", "error", "place"))
    samples = 0
    if os.path.isfile(os.path.join(folder, "routing", "meta.json")):
        with open(os.path.join(folder, "routing", "meta.json")) as f:
            samples = json.load(f)["samples"]
    say("recorded %d samples in %.0f s" % (samples, time.monotonic() - began))
    if samples < 64:
        raise Failed("only %d samples were recorded: %s" % (samples, "; ".join(told) or "Railyard said nothing"))


def plan(a, folder):
    """The experts' map and both home models. What the planner said."""
    began = time.monotonic()
    with open(os.path.join(folder, "routing", "meta.json")) as f:
        samples = json.load(f)["samples"]
    batch = a.batch * a.nodes * a.gpus
    held = min(samples // 2, max(samples // 8, batch))  # batches are drawn from these
    argv = [tool(a), "plan", "--compare", "--map", os.path.join(folder, "plan.json"), "--homes", os.path.join(folder, "homes-planned"),
            "--homes-unmoved", os.path.join(folder, "homes-unmoved"), "--nodes", str(a.nodes), "--gpus", str(a.gpus),
            "--fit", str(samples - held), "--batch", str(min(batch, held)), os.path.join(folder, "routing")]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Failed("railyard plan: " + done.stdout.strip())
    say("planned in %.0f s" % (time.monotonic() - began))
    return done.stdout


def prepare(a, folder, end):
    """Weights, record, map and homes in `folder`, made or taken from --learned. What the planner said."""
    now = {k: getattr(a, k) for k in LEARNED + PLANNED}
    if a.learned:
        found = os.path.abspath(a.learned)
        try:
            with open(os.path.join(found, "learned.json")) as f:
                then = json.load(f)
        except OSError as e:
            raise Failed("--learned: %s; an earlier run with --keep leaves it" % e)
        other = [k for k in LEARNED if then[k] != now[k]]
        if other:
            raise Failed("--learned %s is of %s" % (found, ", ".join("%s %s, not %s" % (k, then[k], now[k]) for k in other)))
        if found != folder:
            for name in ("weights", "routing"):
                if not os.path.exists(os.path.join(folder, name)):
                    os.symlink(os.path.join(found, name), os.path.join(folder, name))
    else:
        nodes, gpus = (int(v) for v in a.learn_shape.split("x"))
        with Standing(a, nodes, gpus, a.learn_nic):
            learn(a, folder, end)
            record(a, folder, end)
        with open(os.path.join(folder, "learned.json"), "w") as f:
            json.dump(now, f, indent=1)
    return plan(a, folder)


def crossed(trace, since, until=1 << 63):
    """(bytes that exchanges from the time `since` to `until` had for other nodes, bytes that crossed, exchanges of a rank, how many by which
    strategy by all ranks), over all ranks and communicators of a trace."""
    asked, saved, exchanges, strategies, node = 0, 0, {}, {}, {}
    paths = glob.glob(os.path.join(trace, "trace-*.jsonl"))

    def lines(path):
        with open(path, errors="replace") as f:
            for text in f:
                try:
                    yield json.loads(text)
                except ValueError:
                    pass  # the last one of a process that was killed

    for path in paths:
        for v in lines(path):
            if v["t"] == "map" and "node" in v:
                node.update({(v["comm"], r): n for r, n in enumerate(v["node"])})
    for path in paths:
        counted, rows = set(), {}
        for v in lines(path):
            key = (v.get("comm"), v.get("rank"), v.get("n"))
            if v["t"] == "x" and since <= v["wall_ns"] < until:
                counted.add(key)
                strategies[v.get("strategy", "-")] = strategies.get(v.get("strategy", "-"), 0) + 1
                pairs = enumerate(v["send"]) if "send" in v else zip(v["send_pairs"][0::2], v["send_pairs"][1::2])
                here = node.get((v["comm"], v["rank"]))
                asked += v["type_bytes"] * sum(n for to, n in pairs if node.get((v["comm"], to), here) != here)
            elif v["t"] == "rows" and v.get("strategy") in ("dedup", "sum"):
                rows[key] = v["cross"] - v["packed"]
        saved += sum(n for key, n in rows.items() if key in counted)
        exchanges[path] = len(counted)
    return asked, asked - saved, max(exchanges.values(), default=0), strategies
