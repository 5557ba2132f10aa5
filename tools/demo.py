#!/usr/bin/env python3
"""./yard demo: what Railyard shows of an MoE job, on an emulated cluster of 2 nodes with 4 ranks each.

The job is `railyard bench`: dispatch, combine and their gradients for a few MoE layers, every received byte checked. It runs
without and with the preload in turns; the table says what was seen, whether the results are the same, and what it cost.
"""
import argparse
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

NODES, RANKS_PER_NODE = 2, 4
LINKS = ["--nic", "5", "--nvlink", "50"]  # Gbit/s: ten to one, slow enough for the emulation to keep up on two cores
JOB = ["--layers", "2", "--tokens", "192", "--hidden", "1024", "--experts", "32", "--top-k", "4", "--iterations", "5",
       "--routing", "zipf:0.6", "--digest"]


def run(railyard, out, name, preload):
    """One run of the job; its own account of it as JSON."""
    result = os.path.join(out, f"bench-{name}.json")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAILYARD_")}
    if preload:
        env["RAILYARD_TRACE"] = os.path.join(out, "trace")
        shutil.rmtree(env["RAILYARD_TRACE"], ignore_errors=True)
    argv = [railyard, "emu", "-n", str(NODES), "-g", str(RANKS_PER_NODE), *LINKS] + (["--preload"] if preload else []) + \
        ["--", railyard, "bench", *JOB, "--json", result]
    p = subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    if p.returncode:
        sys.exit(f"demo: the job failed ({' '.join(argv)}):\n{p.stdout}")
    with open(result) as f:
        return json.load(f)


def human(n):
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.3g} {unit}"
        n /= 1000


def main():
    a = argparse.ArgumentParser(prog="./yard demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--build", default="build", help=argparse.SUPPRESS)
    a.add_argument("--json", metavar="FILE", help="write the same figures as JSON")
    a.add_argument("--pairs", type=int, default=6, help="runs of each kind (default: %(default)s)")
    args = a.parse_args()
    railyard = os.path.abspath(os.path.join(args.build, "tools", "railyard", "railyard"))
    out = os.path.abspath(os.path.join(args.build, "demo"))
    os.makedirs(out, exist_ok=True)
    for old in glob.glob(os.path.join(out, "*.json")):
        os.unlink(old)
    start = time.time()
    print(f"An MoE job on {NODES} emulated nodes x {RANKS_PER_NODE} ranks, plain and with LD_PRELOAD=librailyard.so, in turns", end="",
          flush=True)
    plain, watched = [], []
    for i in range(args.pairs):
        for preload in ((False, True), (True, False))[i % 2]:
            (watched if preload else plain).append(run(railyard, out, f"{i}-{'preload' if preload else 'plain'}", preload))
            print(".", end="", flush=True)
    print(f" {time.time() - start:.0f} s\n")
    trace = os.path.join(out, "trace")
    svg, text = os.path.join(out, "report.svg"), os.path.join(out, "report.txt")
    report = json.loads(subprocess.run([railyard, "report", trace, "--json", "-"], stdout=subprocess.PIPE, check=True).stdout)
    with open(text, "w") as f:
        subprocess.run([railyard, "report", trace, "--svg", svg], stdout=f, check=True)

    equal = len({r["digest"] for r in plain + watched}) == 1 and not any(r["errors"] for r in plain + watched)
    step = [[r["step_us"]["median"] for r in rs] for rs in (plain, watched)]
    added = [w / p - 1 for p, w in zip(*step)]
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
        ("step, preload", f"{result['step_ms_preload']:.1f} ms"),
        ("time added", f"{100 * result['time_added']:+.1f} % (pairs: {100 * min(added):+.1f} to {100 * max(added):+.1f} %; "
                       "an emulation on a shared CPU: noise)"),
    ]
    for name, value in rows:
        print(f"  {name:18} {value}")
    print(f"\n  report   {text}\n  picture  {svg}\n  trace    {trace}   (railyard report TRACE)")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)
            f.write("\n")
    return 0 if equal and result["job_counted_the_same"] else 1


if __name__ == "__main__":
    sys.exit(main())
