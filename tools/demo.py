#!/usr/bin/env python3
"""./yard demo: what Railyard shows of an MoE job, on an emulated cluster of 2 nodes with 4 ranks each.

The job is `railyard bench`: dispatch, combine and their gradients for a few MoE layers, every received byte checked. It runs
without the preload, watched, and with its exchanges reissued, equal rows crossing once, in turns; the table says what was seen,
whether the results are the same, what watching cost, and how many messages and bytes between nodes reissuing saved. It cannot
show time won: the links are emulated, and all ranks share this machine's CPU.
"""
import argparse
import glob
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time

NODES, RANKS_PER_NODE = 2, 4
LINKS = ["--nic", "5", "--nvlink", "50"]  # Gbit/s: ten to one, slow enough for the emulation to keep up on two cores
JOB = ["--layers", "2", "--tokens", "192", "--hidden", "1024", "--experts", "32", "--top-k", "4", "--iterations", "5",
       "--routing", "zipf:0.6", "--digest"]


KINDS = {"plain": None, "preload": "observe", "reissued": "dedup"}  # name: RAILYARD_STRATEGY, None: without Railyard
ENOUGH = 40  # seconds, after which no further turn begins


def run(railyard, out, name, kind):
    """One run of the job; its own account of it as JSON."""
    result = os.path.join(out, f"bench-{name}.json")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAILYARD_")}
    if KINDS[kind]:
        env["RAILYARD_STRATEGY"] = KINDS[kind]
        env["RAILYARD_TRACE"] = trace_of(out, kind)
        shutil.rmtree(env["RAILYARD_TRACE"], ignore_errors=True)
    argv = [railyard, "emu", "-n", str(NODES), "-g", str(RANKS_PER_NODE), *LINKS] + (["--preload"] if KINDS[kind] else []) + \
        ["--", railyard, "bench", *JOB, "--json", result]
    p = subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    if p.returncode:
        sys.exit(f"demo: the job failed ({' '.join(argv)}):\n{p.stdout}")
    with open(result) as f:
        return json.load(f)


def trace_of(out, kind):
    return os.path.join(out, "trace" if kind == "preload" else f"trace-{kind}")


def report_of(railyard, out, kind):
    """The report on the latest run of this kind, as JSON; text and picture go into files."""
    trace, base = trace_of(out, kind), os.path.join(out, "report" if kind == "preload" else f"report-{kind}")
    report = subprocess.run([railyard, "report", trace, "--json", "-"], stdout=subprocess.PIPE, check=True).stdout
    with open(f"{base}.txt", "w") as f:
        subprocess.run([railyard, "report", trace, "--svg", f"{base}.svg"], stdout=f, check=True)
    return json.loads(report), f"{base}.txt", f"{base}.svg"


def messages_across(railyard, trace):
    """Messages between nodes in the job's average exchange, as plain NCCL sends it and reissued."""
    text = subprocess.run([railyard, "explain", "--strategy", "hierarchical", trace], stdout=subprocess.PIPE, text=True, check=True).stdout
    return [int(n) for n in re.search(r"across nodes +(\d+), \S+ \S+ +(\d+),", text).groups()]


def human(n):
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.3g} {unit}"
        n /= 1000


def main():
    a = argparse.ArgumentParser(prog="./yard demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--build", default="build", help=argparse.SUPPRESS)
    a.add_argument("--json", metavar="FILE", help="write the same figures as JSON")
    a.add_argument("--turns", "--pairs", type=int, default=5, help=f"runs of each kind (default: %(default)s; fewer once {ENOUGH} s have passed)")
    args = a.parse_args()
    railyard = os.path.abspath(os.path.join(args.build, "tools", "railyard", "railyard"))
    out = os.path.abspath(os.path.join(args.build, "demo"))
    os.makedirs(out, exist_ok=True)
    for old in glob.glob(os.path.join(out, "*.json")):
        os.unlink(old)
    start = time.time()
    print(f"An MoE job on {NODES} emulated nodes x {RANKS_PER_NODE} ranks: plain, with LD_PRELOAD=librailyard.so watching, and reissuing, "
          "in turns", end="", flush=True)
    runs = {kind: [] for kind in KINDS}
    for i in range(args.turns):
        if i > 1 and time.time() - start > ENOUGH:
            break  # a slow machine
        for kind in (list(KINDS), list(KINDS)[::-1])[i % 2]:
            runs[kind].append(run(railyard, out, f"{i}-{kind}", kind))
            print(".", end="", flush=True)
    print(f" {time.time() - start:.0f} s\n")
    plain, watched, reissued = runs.values()
    trace = trace_of(out, "preload")
    report, text, svg = report_of(railyard, out, "preload")
    again, text_again, svg_again = report_of(railyard, out, "reissued")
    agreed = again["communicators"][0]["agreed_on"] or {"by_strategy": {}, "waits": None}  # of most bytes: bench has one only
    waits = agreed["waits"]
    direct, hierarchical = messages_across(railyard, trace_of(out, "reissued"))
    saved = sum(d["bytes_saved"] for d in again["communicators"][0]["directions"])

    every = plain + watched + reissued
    equal = len({r["digest"] for r in every}) == 1 and not any(r["errors"] for r in every)
    step = [[r["step_us"]["median"] for r in rs] for rs in (plain, watched, reissued)]
    added = [w / p - 1 for p, w in zip(*step[:2])]
    result = {
        "nodes": report["nodes"],
        "ranks": report["ranks"],
        "exchanges": report["exchanges"],
        "bytes_total": report["bytes_total"],
        "bytes_cross_node": report["bytes_cross_node"],
        "bytes_in_node": report["bytes_in_node"],
        "bytes_self": report["bytes_self"],
        "bitwise_equal": equal,
        "job_counted_the_same": [report["exchanges"], report["bytes_total"], report["bytes_cross_node"]] ==
                                [watched[-1]["exchanges"], watched[-1]["bytes_total"], watched[-1]["bytes_cross_node"]],
        "step_ms_plain": statistics.median(step[0]) / 1000,
        "step_ms_preload": statistics.median(step[1]) / 1000,
        "time_added": statistics.median(added),
        "time_added_low": min(added),
        "time_added_high": max(added),
        "trace": trace,
        "report": svg,
        "exchanges_reissued": sum(n for strategy, n in agreed["by_strategy"].items() if strategy != "direct"),
        "bytes_saved_cross_node": saved,
        "messages_cross_node_direct": direct,
        "messages_cross_node_reissued": hierarchical,
        "verdict_wait_us_median": waits and waits["in_all"]["median_us"],
        "verdict_messages_us_median": waits and waits["messages"]["median_us"],
        "step_ms_reissued": statistics.median(step[2]) / 1000,
        "trace_reissued": trace_of(out, "reissued"),
        "report_reissued": svg_again,
    }
    total = result["bytes_total"]
    rows = [
        ("ranks", f"{result['ranks']} on {result['nodes']} nodes"),
        ("exchanges seen", f"{result['exchanges']} ({'the number that the job made' if result['job_counted_the_same'] else 'NOT what the job counted'})"),
        ("bytes", f"{human(total)}"),
        ("  to itself", f"{human(result['bytes_self'])} ({100 * result['bytes_self'] / total:.0f} %)"),
        ("  in-node", f"{human(result['bytes_in_node'])} ({100 * result['bytes_in_node'] / total:.0f} %)"),
        ("  cross-node", f"{human(result['bytes_cross_node'])} ({100 * result['bytes_cross_node'] / total:.0f} %)"),
        ("results identical", f"{'yes' if equal else 'NO'} (digest {watched[-1]['digest']}, {human(watched[-1]['checked_bytes'])} checked a run)"),
        ("step, plain", f"{result['step_ms_plain']:.1f} ms"),
        ("step, watched", f"{result['step_ms_preload']:.1f} ms"),
        ("time added", f"{100 * result['time_added']:+.1f} % (pairs: {100 * min(added):+.1f} to {100 * max(added):+.1f} %; "
                       "an emulation on a shared CPU: noise)"),
        ("reissued", f"{result['exchanges_reissued']} of {again['exchanges']} exchanges (RAILYARD_STRATEGY=dedup)"),
        ("  across nodes", f"{hierarchical} messages an exchange instead of {direct}; {human(again['bytes_cross_node'] - saved)} in all instead of "
                           f"{human(again['bytes_cross_node'])}: rows equal to others crossed once"),
        ("  verdicts", f"waited for {waits['in_all']['median_us'] / 1000:.2f} ms (median), {waits['messages']['median_us'] / 1000:.2f} ms without "
                       "late ranks" if waits else "none"),
        ("  step", f"{result['step_ms_reissued']:.1f} ms (says nothing: emulated messages are cheap, and eight ranks share this CPU)"),
    ]
    for name, value in rows:
        print(f"  {name:18} {value}")
    print(f"\n  watched   {text}\n            {svg}\n            {trace}   (railyard report TRACE)"
          f"\n  reissued  {text_again}\n            {svg_again}\n            {trace_of(out, 'reissued')}   (railyard explain TRACE)")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)
            f.write("\n")
    return 0 if equal and result["job_counted_the_same"] and result["exchanges_reissued"] and saved else 1


if __name__ == "__main__":
    sys.exit(main())
