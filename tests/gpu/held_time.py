#!/usr/bin/env python3
"""What the calling thread spends inside an exchange, held and not (RAILYARD_HOLD), on the virtual GPU cluster, in one run.

  tests/gpu/held_time.py --build build --nic 25gbit

Two preloaded jobs stand side by side on one cluster, one with RAILYARD_HOLD=yes, one with no, and take turns. In each, per round and
way ("plain": railyard_pause; "direct": agreed on, then plain NCCL; "dedup"), a rank does steps of some work on the GPU and one
dispatch behind it, all enqueued without waiting, as training does. Reported are, over all ranks and steps,
  call    microseconds in all_to_all_single, median and 90th percentile: what holding costs the host
  pace    microseconds per step, the GPU's work included: what the job feels
  freeing the same step with a torch.cuda.empty_cache() after the call (a cudaFree, which has to let pending exchanges go first)
After every turn the received bytes are compared with plain NCCL's. With no the calls of both ways must take less time than with yes,
and the engine must say that it gave exchanges away; else, or where bytes differ, the exit status is 1 (2: it could not be run).

Owns: the ranks' loop (--turns), the turns, the table. Not: the rows (dedup_job.py), the cluster, the jobs' life (turns.py).
"""
import argparse
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time

WAYS = ("plain", "direct", "dedup")
NAME = "held"


def rank_main(a):
    """One rank: told "go WAY STEPS FREEING", answers with JSON."""
    import ctypes

    import torch
    import torch.distributed as dist

    import job_rank
    from dedup_job import POISON, Row
    rank, world = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE"))
    line = job_rank.Line(a.turns)
    cuda = torch.cuda.is_available()
    device, wait = job_rank.join("nccl" if cuda else "gloo")
    railyard = None if a.control else ctypes.CDLL(None)

    def switch(way):
        if not railyard:
            return
        railyard.railyard_pause(int(way == "plain"))
        if way != "plain" and railyard.railyard_strategy(ctypes.c_char_p(way.encode())):
            raise SystemExit("held_time: rank %d: railyard_strategy(\"%s\") refused" % (rank, way))

    row = Row({"kind": "dispatch", "seed": 1, "tokens": a.tokens, "hidden": a.hidden, "experts": a.experts, "topk": a.topk}, rank, world, device)
    left = torch.randn(a.work, a.work, device=device)

    def exchange(y, x):
        began = time.perf_counter()
        dist.all_to_all_single(y, x, row.outs, row.ins)
        return time.perf_counter() - began

    def step(freeing):
        if a.work:
            torch.mm(left, left)
        spare = torch.empty(64 << 20, dtype=torch.uint8, device=device) if freeing and cuda else None
        took = exchange(row.y, row.x)
        if spare is not None:
            del spare
            torch.cuda.empty_cache()
        return took

    switch("direct")
    for _ in range(20):  # until the ranks agree; all connections are made
        exchange(row.y, row.x)
        exchange(row.q, row.p)
    wait()
    switch("dedup")
    for _ in range(30):  # the nodes' communicators are made and used, the stream is tried
        exchange(row.y, row.x)
        exchange(row.q, row.p)
    wait()
    switch("plain")
    exchange(row.y, row.x)
    wait()
    expected = row.y.clone()
    line.say("ready")
    while True:
        told = line.told()
        if len(told) != 4 or told[0] != "go":
            break
        way, steps, freeing = told[1], int(told[2]), int(told[3])
        switch(way)
        row.y.view(torch.uint8).fill_(POISON)
        dist.barrier()
        wait()
        began = time.perf_counter()
        calls = [step(freeing) for _ in range(steps)]
        wait()
        pace = (time.perf_counter() - began) / steps
        line.say("ready " + json.dumps({"right": torch.equal(row.y.view(torch.int16), expected.view(torch.int16)), "pace": pace * 1e6,
                                   "calls": [round(c * 1e6, 1) for c in calls], "bytes": row.x.numel() * row.x.element_size(),
                                   "device": torch.cuda.get_device_name() if cuda else "cpu"}))
    dist.destroy_process_group()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--turns", help=argparse.SUPPRESS)
    p.add_argument("--build", default="build")
    p.add_argument("--nodes", type=int, default=2)
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--nic", default="25gbit")
    p.add_argument("--devices")
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--experts", type=int, default=64)
    p.add_argument("--topk", type=int, default=8)
    p.add_argument("--work", type=int, default=4096, help="side of the square matrices (fp32) that are multiplied before each exchange; 0: none")
    p.add_argument("--steps", type=int, default=20, help="in a turn")
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--control", action="store_true", help="nothing is preloaded: shows what the figures are worth, and needs no GPU")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--keep", metavar="DIR", help="keep the jobs' output there")
    a = p.parse_args()
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    if a.turns:
        return rank_main(a)
    import figures
    from turns import Failed, Job, cluster
    preload = None if a.control else os.path.abspath(os.path.join(a.build, "plugin", "librailyard.so"))
    if preload and not os.path.exists(preload):
        print("held_time: there is no %s" % preload, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    folder, jobs, found, remarks = os.path.abspath(a.keep) if a.keep else tempfile.mkdtemp(prefix="held-"), {}, [], {}
    began = time.monotonic()

    def say(text):
        print("held_time: %3.0f s: %s" % (time.monotonic() - began, text), file=sys.stderr, flush=True)

    command = [sys.executable, os.path.abspath(__file__)] + ["--%s=%d" % (k, getattr(a, k)) for k in ("tokens", "hidden", "experts", "topk", "work")]
    try:
        cluster("up", "--name", NAME, "--nodes", str(a.nodes), "--gpus", str(a.gpus), "--nic", a.nic, *(["--devices", a.devices] if a.devices else []))
        for hold in ("yes", "no"):
            env = [] if a.control else ["RAILYARD_STRATEGY=direct", "RAILYARD_LOG=info", "RAILYARD_HOLD=" + hold]
            jobs[hold] = Job(NAME, hold, a.nodes, a.gpus, folder, command + (["--control"] if a.control else []), env + a.env, preload, patience=120)
            jobs[hold].connect()
            jobs[hold].wait_ready()
            say("the job with RAILYARD_HOLD=%s is up" % hold)
        for number in range(a.rounds):
            for way in WAYS:
                for freeing in (0, 1):
                    for hold in ("yes", "no") if number % 2 else ("no", "yes"):
                        said = [json.loads(s) for s in jobs[hold].turn("%s %d %d" % (way, a.steps, freeing))]
                        found.append({"hold": hold, "way": way, "freeing": freeing, "round": number, "ranks": said})
            say("round %d of %d" % (number + 1, a.rounds))
        for hold, job in jobs.items():
            job.finish()
            remarks[hold] = job.remarks()
    except Failed as e:
        print("held_time: %s" % e, file=sys.stderr)
        return 2
    finally:
        for job in jobs.values():
            job.close()
        try:
            cluster("down", "--name", NAME)
        except Failed as e:
            print("held_time: %s" % e, file=sys.stderr)
        if not a.keep:
            shutil.rmtree(folder, ignore_errors=True)
    some = found[0]["ranks"][0]
    print("%dx%d, %d x %d bf16, top-%d of %d: %.1f MiB from rank 0, NIC %s, %s; %d rounds of %d steps" % (
        a.nodes, a.gpus, a.tokens, a.hidden, a.topk, a.experts, some["bytes"] / 2 ** 20, a.nic, some["device"], a.rounds, a.steps))
    rows, failed, call = [("way", "hold", "call us", "90 %", "pace us", "call us, freeing", "pace us, freeing", "bytes")], [], {}
    for way in WAYS:
        for hold in ("yes", "no"):
            def of(freeing, what):
                return [v for f in found if (f["way"], f["hold"], f["freeing"]) == (way, hold, freeing) for r in f["ranks"] for v in what(r)]
            calls, paces = of(0, lambda r: r["calls"]), of(0, lambda r: [r["pace"]])
            right = all(of(0, lambda r: [r["right"]]) + of(1, lambda r: [r["right"]]))
            call[way, hold] = statistics.median(calls)
            rows.append((way, hold, "%.0f" % call[way, hold], "%.0f" % sorted(calls)[len(calls) * 9 // 10], "%.0f" % statistics.median(paces),
                         "%.0f" % statistics.median(of(1, lambda r: r["calls"])), "%.0f" % statistics.median(of(1, lambda r: [r["pace"]])),
                         "right" if right else "WRONG"))
            if not right:
                failed.append("%s, hold %s: received bytes differ from plain NCCL's" % (way, hold))
        if way != "plain" and not a.control and call[way, "no"] >= call[way, "yes"]:
            failed.append("%s: calls take %.0f us without holding, %.0f us with it" % (way, call[way, "no"], call[way, "yes"]))
    print(figures.table(rows))
    given = [int(n) for text in remarks.get("no", []) for n in re.findall(r"; (\d+) after their calls had returned", text)]
    if not a.control:
        print("exchanges given away, by communicator: %s" % (sorted(given) or "none"))
    if not a.control and sum(given) < a.rounds * a.steps:
        failed.append("hardly anything was given away:\n  " + "\n  ".join(remarks.get("no", [])))
    for hold, said in remarks.items():
        failed += ["hold %s: %s" % (hold, text) for text in said if " warning: " in text or " error: " in text]
    for text in failed:
        print("held_time: " + text, file=sys.stderr)
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"options": {k: v for k, v in vars(a).items() if k != "turns"}, "turns": found, "remarks": remarks}, f)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
