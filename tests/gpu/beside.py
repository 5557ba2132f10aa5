#!/usr/bin/env python3
"""Short exchanges beside long ones on another communicator, on the virtual GPU cluster: what they wait, and what the long ones lose.

  tests/gpu/beside.py --build build --nic 25gbit --long 64M --short 64K --seconds 90

One job, two communicators of all ranks: long exchanges on one, each waited for before the next, on a stream and a thread of their own; short ones
meanwhile on the other, likewise, from the main thread. Ways in turns: "plain" (railyard_pause), strategies by name (railyard_strategy,
for both communicators), and, on two more communicators that nothing is ever forced on, "auto" and "plain-auto" beside it. Of the long
ones' rows --dup are repeated. Three arrangements:
  alone     the short ones with nothing beside them
  threads   as said
  chained   one thread: a long one enqueued, right behind it short ones on their own stream, each waited for; then the long one is waited for.
            Whoever holds the thread for the long one's sake holds up the first short one: "first" is from the long one's call to its end
An exchange's time is from its call to its end, on the host; of short ones in `threads` only those that began while the long ones went on. Figures are
medians over rounds of a turn's 50, 90 and 99 %, over all ranks; ratios are to plain on the same communicators, with the 95 % interval of a bootstrap over
rounds. After every turn the bytes of both are compared.

--control runs the same without Railyard and needs no GPU. Exits 1 where bytes differ, or where short exchanges by auto certainly take --most times what
they take with plain, beside long ones; 2 if it could not be run.
Owns: both sides of it. Not: what is sent (grid_job.py), the cluster, the job's life (turns.py).
"""
import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time

NAME = "beside"
HOWS = ("alone", "threads", "chained")


def rank_main(a):
    """One rank: told "go HOW WAY LONGS SHORTS", answers with JSON."""
    import ctypes

    import torch
    import torch.distributed as dist

    import job_rank
    from grid_job import Exchange
    rank, world, per_node = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    line = job_rank.Line(a.turns)
    cuda = torch.cuda.is_available()
    device, wait = job_rank.join("nccl" if cuda else "gloo")
    railyard = None if a.control else ctypes.CDLL(None)
    everybody = list(range(world))
    groups = {(kind, what): dist.new_group(everybody, group_desc="beside %s %s" % (kind, what)) for kind in ("forced", "free") for what in ("long", "short")}
    rows = {"long": Exchange({"skew": "even", "size": a.long, "dup": a.dup}, rank, world, per_node, device),
            "short": Exchange({"skew": "even", "size": a.short, "dup": 0.0}, rank, world, per_node, device)}
    streams = {what: torch.cuda.Stream() if cuda else None for what in rows}

    def switch(way):
        if not railyard:
            return
        railyard.railyard_pause(int(way.startswith("plain")))
        if not way.startswith("plain") and railyard.railyard_strategy(ctypes.c_char_p(way.encode())):
            raise SystemExit("beside: rank %d: railyard_strategy(\"%s\") refused" % (rank, way))

    def issue(what, kind):
        x = rows[what]
        if not cuda:
            return dist.all_to_all_single(x.y, x.x, x.outs, x.ins, group=groups[kind, what])
        with torch.cuda.stream(streams[what]):
            return dist.all_to_all_single(x.y, x.x, x.outs, x.ins, group=groups[kind, what])

    def finish(what):
        if cuda:
            streams[what].synchronize()

    def timed(what, kind, began=None):
        began = began or time.perf_counter()
        issue(what, kind)
        finish(what)
        return time.perf_counter() - began

    def turn(how, way, longs, shorts):
        kind = "free" if way in ("auto", "plain-auto") else "forced"
        switch(way)
        for x in rows.values():
            x.y.view(torch.int16).fill_(-1)
        wait()
        dist.barrier()
        wait()
        long_took, short_took, first = [], [], []
        if how == "threads":
            over = threading.Event()

            def go():
                if cuda:
                    torch.cuda.set_device(device)
                for _ in range(longs):
                    long_took.append(timed("long", kind))
                over.set()
            thread = threading.Thread(target=go)
            thread.start()
            for _ in range(shorts):
                meanwhile = not over.is_set()
                took = timed("short", kind)
                if meanwhile:
                    short_took.append(took)
            thread.join()
        elif how == "chained":
            each = max(1, shorts // max(1, longs))
            for _ in range(longs):
                began = time.perf_counter()
                issue("long", kind)
                first.append(timed("short", kind, began))
                short_took += [timed("short", kind) for _ in range(each - 1)]
                finish("long")
                long_took.append(time.perf_counter() - began)
        else:
            short_took = [timed("short", kind) for _ in range(shorts)]
            timed("long", kind)  # so that there are bytes to compare
        wait()
        return {"right": all(x.right() for x in rows.values()), "long": [round(v * 1e6) for v in long_took], "short": [round(v * 1e6, 1) for v in short_took],
                "first": [round(v * 1e6, 1) for v in first], "device": torch.cuda.get_device_name() if cuda else "cpu"}

    switch("direct")
    for kind in ("forced", "free"):
        switch("direct" if kind == "forced" else "auto")
        for _ in range(8):
            for what in rows:
                timed(what, kind)
    line.say("ready")
    while True:
        told = line.told()
        if len(told) != 5 or told[0] != "go":
            break
        line.say("ready " + json.dumps(turn(told[1], told[2], int(told[3]), int(told[4])), separators=(",", ":")))
    dist.destroy_process_group()


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * q))]


def figures_of(said):
    """Of a turn, from all ranks' answers."""
    short, first = ([v for s in said for v in s[k]] for k in ("short", "first"))
    found = {"p50": quantile(short, 0.5), "p90": quantile(short, 0.9), "p99": quantile(short, 0.99)} if short else {}
    found.update({"long": statistics.fmean(v for s in said for v in s["long"])} if said[0]["long"] else {})
    found.update({"first": quantile(first, 0.5)} if first else {})
    return found


def parse(argv=None):
    p = argparse.ArgumentParser(prog="beside", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.replace("%", "%%"))
    p.add_argument("--turns", help=argparse.SUPPRESS)
    p.add_argument("--build", default="build")
    p.add_argument("--nodes", type=int, default=2)
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--nic", default="25gbit")
    p.add_argument("--devices")
    p.add_argument("--long", default="64M", help="bytes of a rank")
    p.add_argument("--short", default="64K")
    p.add_argument("--dup", type=float, default=0.75, help="share of the long ones' rows that are repeated")
    p.add_argument("--ways", default="plain,dedup,hierarchical", help="of the communicators that strategies are forced on")
    p.add_argument("--longs", type=int, default=6, help="in a turn")
    p.add_argument("--seconds", type=float, default=90, help="for all of it, the job's start included")
    p.add_argument("--most", type=float, default=1.25, metavar="TIMES")
    p.add_argument("--control", action="store_true", help="no preload: every way is plain")
    p.add_argument("--env", action="append", default=[], metavar="K=V")
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--keep", metavar="DIR", help="keep the job's output there")
    a = p.parse_args(argv)
    for k in ("long", "short"):
        text = str(getattr(a, k))
        if not text.rstrip("KM").isdigit():
            p.error("--%s: 65536, 64K, 8M" % k)
        setattr(a, k, int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
    return a


def measure(a, job, end, say):
    """{(how, way): [figures of each round]}."""
    ways = a.ways.split(",") + ["plain-auto", "auto"]
    found = {(h, w): [] for h in HOWS for w in ways}

    def turn(how, way, longs, shorts):
        said = [json.loads(s) for s in job.turn("%s %s %d %d" % (how, way, longs, shorts))]
        from turns import Failed
        if not all(s["right"] for s in said):
            raise Failed("%s, %s: wrong bytes received" % (how, way))
        return said
    for way in ways:  # staging memory, communicators of the nodes' ranks; auto finds out
        turn("chained", way, 12 if way != "auto" else 40, 24 if way != "auto" else 120)
        turn("threads", way, 2 if way != "auto" else 20, 20 if way != "auto" else 200)
    slow = figures_of(turn("alone", "plain", 0, 20))["p50"]
    long_us = figures_of(turn("chained", "plain", 3, 3))["long"]
    shorts = int(max(20, min(600, a.longs * long_us / max(slow, 1))))
    say("a short one takes %.0f us alone, a long one %.0f us: %d and %d of them in a turn" % (slow, long_us, shorts, a.longs))
    rounds = 0
    while rounds < 3 or time.monotonic() < end:
        for how in HOWS:
            order = ways[rounds % len(ways):] + ways[:rounds % len(ways)]
            for way in order if rounds % 2 else order[::-1]:
                found[how, way].append(figures_of(turn(how, way, 0 if how == "alone" else a.longs, min(shorts, 12 * a.longs) if how == "chained" else shorts)))
        rounds += 1
    return found


def main():
    a = parse()
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    if a.turns:
        return rank_main(a)
    import figures
    from turns import Failed, Job, cluster
    preload = None if a.control else os.path.abspath(os.path.join(a.build, "plugin", "librailyard.so"))
    if preload and not os.path.exists(preload):
        print("beside: there is no %s" % preload, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    folder, job, began = os.path.abspath(a.keep) if a.keep else tempfile.mkdtemp(prefix="beside-"), None, time.monotonic()

    def say(text):
        print("beside: %3.0f s: %s" % (time.monotonic() - began, text), file=sys.stderr, flush=True)
    command = [a.python, os.path.abspath(__file__), "--long", str(a.long), "--short", str(a.short), "--dup", str(a.dup)] + (["--control"] if a.control else [])
    env = [] if a.control else ["RAILYARD_STRATEGY=direct", "RAILYARD_LOG=info", "RAILYARD_ROW_BYTES=2048"]
    remarks = []
    try:
        cluster("up", "--name", NAME, "--nodes", str(a.nodes), "--gpus", str(a.gpus), "--nic", a.nic, *(["--devices", a.devices] if a.devices else []))
        job = Job(NAME, "beside", a.nodes, a.gpus, folder, command, env + a.env, preload, timeout=a.seconds + 120, patience=120)
        job.connect()
        job.wait_ready()
        say("the job is up")
        found = measure(a, job, began + a.seconds, say)
        job.finish()
        remarks = [m for m in job.remarks() if "agreed on" in m or " warning: " in m or " error: " in m]
    except Failed as e:
        print("beside: %s" % e, file=sys.stderr)
        return 1 if "wrong bytes" in str(e) else 2
    finally:
        if job:
            job.close()
        try:
            cluster("down", "--name", NAME)
        except Failed as e:
            print("beside: %s" % e, file=sys.stderr)
        if not a.keep:
            shutil.rmtree(folder, ignore_errors=True)
    rows, failed, ratios = [("arrangement", "way", "short us: half", "90 %", "99 %", "to plain", "first us", "to plain", "long us", "to plain")], [], {}
    for (how, way), turns in found.items():
        base = found[how, "plain-auto" if way == "auto" else "plain"]

        def median(k):
            return "%.0f" % statistics.median([t[k] for t in turns]) if turns and k in turns[0] else ""

        def to_plain(k):
            if k not in turns[0] or way == "plain":
                return None
            return figures.bootstrap(list(zip((t[k] for t in turns), (t[k] for t in base))), lambda r: statistics.median(x for x, _ in r) / statistics.median(y for _, y in r))

        def text(v):
            return "%.2f [%.2f, %.2f]" % tuple(v) if v else ""
        ratios[how + " " + way] = {k: to_plain(k) for k in ("p50", "p99", "first", "long")}
        r = ratios[how + " " + way]
        rows.append((how, way, median("p50"), median("p90"), median("p99"), text(r["p50"]), median("first"), text(r["first"]), median("long"), text(r["long"])))
        if way == "auto" and how != "alone" and r["p50"] and r["p50"][1] > a.most:
            failed.append("%s: short exchanges by auto take %s times what they take with plain NCCL" % (how, text(r["p50"])))
    print("%dx%d, long %.0f MiB (%g %% repeated), short %.0f KiB, NIC %s; %d rounds, all ranks; bytes right after each turn%s" % (
        a.nodes, a.gpus, a.long / 2 ** 20, 100 * a.dup, a.short / 1024, a.nic, len(found["alone", "plain"]), "; CONTROL: every way is plain" if a.control else ""))
    print(figures.table(rows))
    for m in remarks:
        print(m)
    for f in failed:
        print("beside: " + f, file=sys.stderr)
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"options": {k: v for k, v in vars(a).items() if k != "turns"}, "rounds": {" ".join(k): v for k, v in found.items()}, "ratios": ratios, "remarks": remarks}, f)
    return 1 if failed and not a.control else 0


if __name__ == "__main__":
    sys.exit(main())
