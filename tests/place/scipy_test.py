#!/usr/bin/env python3
"""The exact solver against SciPy's linear_sum_assignment on the expanded square matrix: equal totals, and how much faster.

usage: scipy_test.py LIBRARY [--json FILE]     LIBRARY: place_ctypes.so of the build

Times are this thread's CPU time (whoever else is busy), of one run: each round draws a new problem and solves it by all in turns. Kuhn-Munkres is ours, the textbook's; its time
holds the making of the square matrix, SciPy's does not. Fails if a total differs, or if at 384 samples on 16 nodes the exact
solver is not 10 times faster than SciPy, 50 times faster than Kuhn-Munkres, and under 1 ms.
"""
import argparse
import ctypes
import json
import os
import statistics
import sys
import time

try:
    import numpy as np
    from scipy.optimize import linear_sum_assignment
except ImportError as e:
    print(f"SKIPPED: {e}")
    sys.exit(77)

KUHN_MUNKRES, EXACT = 4, 5
SIZES = [(60, 7, 0), (128, 4, 0), (128, 8, 0), (129, 8, 7), (384, 16, 0), (1000, 31, 24), (2048, 64, 0)]
SQUARE_MOST = 400  # Kuhn-Munkres takes seconds beyond

parser = argparse.ArgumentParser()
parser.add_argument("library")
parser.add_argument("--json")
parser.add_argument("--rounds", type=int, default=9)
args = parser.parse_args()
lib = ctypes.CDLL(os.path.abspath(args.library))
lib.wrap_new.restype = ctypes.c_void_p
lib.wrap_solve.restype = ctypes.c_longlong
seed = int(os.environ.get("RY_TEST_SEED", time.time_ns() % 2**32))
print(f"RY_TEST_SEED={seed}")
rng = np.random.default_rng(seed)


def problem(kind, samples, places, slack):
    """Costs of several characters; capacities as even as can be, with `slack` slots too many."""
    slots = samples + slack
    capacity = np.array([(r + 1) * slots // places - r * slots // places for r in range(places)], dtype=np.int32)
    if kind == "uniform":
        cost = rng.integers(0, 1 << 24, (samples, places))
    elif kind == "ties":
        cost = rng.integers(0, 4, (samples, places))
    else:  # tokens of samples that prefer nodes unevenly, and some nodes are preferred by most
        share = rng.dirichlet(np.linspace(0.3, 1.2, places), samples)
        cost = 64 * (2048 - np.array([rng.multinomial(2048, s) for s in share]))
    return np.ascontiguousarray(cost, dtype=np.int32), capacity


def solve(ws, solver, cost, capacity, place):
    samples, places = cost.shape
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (cost, capacity, place)]
    ws = ctypes.c_void_p(ws)
    t0 = time.thread_time_ns()
    total = lib.wrap_solve(ws, solver, samples, places, *pointers)
    return total, (time.thread_time_ns() - t0) / 1e3


rows, bad = [], []
print(f"{'samples x nodes':>16} {'costs':8} {'exact us':>22} {'SciPy us':>26} {'ratio':>7} {'Kuhn-Munkres us':>28} {'ratio':>7}")
for samples, places, slack in SIZES:
    square = samples + slack <= SQUARE_MOST
    ws = lib.wrap_new(samples, places, samples + slack if square else 0)
    place = np.zeros(samples, dtype=np.int32)
    for kind in ("uniform", "routing", "ties"):
        times = {"exact": [], "scipy": [], "km": []}
        for _ in range(args.rounds if samples < 1000 else 3):
            cost, capacity = problem(kind, samples, places, slack)
            total, us = solve(ws, EXACT, cost, capacity, place)
            times["exact"].append(us)
            load = np.bincount(place, minlength=places)
            if (load > capacity).any() or cost[np.arange(samples), place].sum() != total:
                bad.append(f"{samples} x {places}, {kind}: no solution")
            expanded = np.repeat(cost, capacity, axis=1).astype(np.float64)
            t0 = time.thread_time_ns()
            i, j = linear_sum_assignment(expanded)
            times["scipy"].append((time.thread_time_ns() - t0) / 1e3)
            if int(expanded[i, j].sum()) != total:
                bad.append(f"{samples} x {places}, {kind}: SciPy's total is {int(expanded[i, j].sum())}, ours {total}")
            if square:
                same, us = solve(ws, KUHN_MUNKRES, cost, capacity, place)
                times["km"].append(us)
                if same != total:
                    bad.append(f"{samples} x {places}, {kind}: Kuhn-Munkres' total is {same}, the exact solver's {total}")
        row = {"samples": samples, "nodes": places, "slack": slack, "costs": kind}
        for name, t in times.items():
            if t:
                row[name] = {"median_us": statistics.median(t), "min_us": min(t), "max_us": max(t)}
        rows.append(row)
        text = f"{samples:>8} x {places:<5} {kind:8}"
        for name in times:
            if times[name]:
                r = row[name]
                text += f" {r['median_us']:>10.1f} ({r['min_us']:.0f} .. {r['max_us']:.0f})"
                if name != "exact":
                    row[f"{name}_ratio"] = r["median_us"] / row["exact"]["median_us"]
                    text += f" {row[f'{name}_ratio']:>6.0f}x"
        print(text)
        if (samples, places) == (384, 16):
            if row["scipy_ratio"] < 10:
                bad.append(f"384 x 16, {kind}: {row['scipy_ratio']:.1f} times faster than SciPy, not 10")
            if row["km_ratio"] < 50:
                bad.append(f"384 x 16, {kind}: {row['km_ratio']:.1f} times faster than Kuhn-Munkres, not 50")
            if row["exact"]["min_us"] >= 1000:  # a shared machine runs at half its pace at times
                bad.append(f"384 x 16, {kind}: {row['exact']['min_us']:.0f} us")
if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
        json.dump({"seed": seed, "rows": rows, "bad": bad}, f, indent=1)
for text in bad:
    print(text)
sys.exit(1 if bad else 0)
