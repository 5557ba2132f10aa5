#!/usr/bin/env python3
"""Run one case of preload_cases under the preload and compare what was recorded with what the program did.

usage: preload_check.py RAILYARD PROGRAM CASE NODES GPUS
"""
import ast
import glob
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile


def fail(text):
    sys.exit(f"preload_check: {text}")


def npy(path):
    """A two-dimensional uint64 .npy as nested lists; the header is parsed here so that nothing of ours checks itself."""
    with open(path, "rb") as f:
        data = f.read()
    if data[:6] != b"\x93NUMPY":
        fail(f"{path} is no .npy file")
    n = struct.unpack("<H", data[8:10])[0]
    head = ast.literal_eval(data[10:10 + n].decode())
    rows, columns = head["shape"]
    flat = struct.unpack(f"<{rows * columns}Q", data[10 + n:])
    return [list(flat[i * columns:(i + 1) * columns]) for i in range(rows)]


def load(trace):
    """comm lines by (pid, comm id), each with its exchanges, end and map."""
    comms = {}
    for path in glob.glob(os.path.join(trace, "trace-*.jsonl")):
        pid = None
        for line in open(path):
            x = json.loads(line)  # a cleanly ended run leaves whole lines only
            if x["t"] == "head":
                pid = x["pid"]
            elif x["t"] == "comm":
                x.update(x=[], us={}, end=None, map=None, pid=pid, path=path)
                comms[pid, x["comm"], x["rank"]] = x
            elif "comm" in x:
                c = comms[pid, x["comm"], x["rank"]]
                if x["t"] == "x":
                    c["x"].append(x)
                elif x["t"] == "comm_end":
                    c["end"] = x
                elif x["t"] == "map":
                    c["map"] = x
                elif x["t"] == "us":
                    c["us"][x["n"]] = x["us"]
    return list(comms.values())


def dense(counts, nranks):
    """Counts are written in full, or as [peer, count] pairs without the zeros."""
    if counts and isinstance(counts[0], list) or not counts:
        full = [0] * nranks
        for peer, n in counts:
            full[peer] = n
        return full
    return counts


def check(want, got):
    where = f"communicator {want['name'] or got['comm']!r} rank {want['rank']}"

    def same(what, a, b):
        if a != b:
            fail(f"{where}: {what} is {b}, should be {a}")

    n = want["nranks"]
    same("exchanges recorded", want["exchanges"], len(got["x"]))
    same("exchange numbers", list(range(want["exchanges"])), [x["n"] for x in got["x"]])
    for side, key in (("sent", "send"), ("received", "recv")):
        total = [0] * n
        for x in got["x"]:
            for r, c in enumerate(dense(x[key], n)):
                total[r] += c * x["type_bytes"]
        same(f"bytes {side}", want[side], total)
    if not got["end"]:
        fail(f"{where}: no comm_end line")
    same("end", want["end"], got["end"]["how"])
    same("counted exchanges", want["exchanges"], got["end"]["counters"]["exchanges"])
    same("counted plain groups", want["plain_groups"], got["end"]["counters"]["plain_groups"])
    path = os.path.join(os.path.dirname(got["path"]), got["matrix"])
    if want["exchanges"] or os.path.exists(path):  # where nothing was exchanged there is nothing to save
        matrix = npy(path)
        same("matrix row sent", want["sent"], matrix[0])
        same("matrix row received", want["received"], matrix[1])
    for number in got["us"]:
        if not 0 <= number < want["exchanges"]:
            fail(f"{where}: a duration of exchange {number}, which there was not")
    # a communicator of short life may end before all its ranks' seats have come in
    if want["end"] == "exit" or want["exchanges"] > 50:
        if not got["map"] or got["map"].get("node") is None or len(got["map"]["node"]) != n:
            fail(f"{where}: no cluster map: {got['map']}")


def main():
    railyard, program, case, nodes, gpus = sys.argv[1:]
    work = tempfile.mkdtemp(prefix="ry-preload-")
    trace, expected = os.path.join(work, "trace"), os.path.join(work, "expected")
    os.mkdir(expected)
    env = {**os.environ, "RAILYARD_TRACE": trace, "RAILYARD_SAMPLE": "1", "RY_EXPECTED": expected}
    p = subprocess.run([railyard, "emu", "-n", nodes, "-g", gpus, "--preload", "--", program, case], env=env,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    if p.returncode:
        fail(f"the program failed with {p.returncode}:\n{p.stdout}")
    if p.stdout.strip():
        fail(f"output where none was due:\n{p.stdout}")
    recorded = load(trace)
    ids = {}
    total = 0
    for path in sorted(glob.glob(os.path.join(expected, "expected-*.json"))):
        with open(path) as f:
            wanted = json.load(f)
        wanted.reverse()  # the program lists them newest first
        for want in wanted:
            match = [c for c in recorded if c["pid"] == want["pid"] and (c["name"] or "") == want["name"] and
                     c["birth"] == want["birth"] and c["rank"] == want["rank"] and c["nranks"] == want["nranks"]]
            if not match:
                fail(f"{want['name']!r} (made by {want['birth']}, rank {want['rank']}) is not in the trace")
            # several of one kind are listed in the order in which the recorder came to them, on a busy machine not always theirs
            got = min(match, key=lambda c: (c["end"] or {}).get("how") != want["end"])
            recorded.remove(got)
            check(want, got)
            key = want["name"], want["birth"], want["nranks"]
            if want["name"] and ids.setdefault(key, got["comm"]) != got["comm"]:
                fail(f"{want['name']!r} has two ids on two ranks: {ids[key]} and {got['comm']}")
            total += 1
    if recorded:
        fail(f"recorded, but never made: {recorded[0]['name'] or recorded[0]['comm']}")
    if len(set(ids.values())) != len(ids):
        fail(f"two communicators with one id: {ids}")
    if not total:
        fail("nothing was expected, so nothing was checked")
    report = subprocess.run([railyard, "report", trace, "--json", "-"], stdout=subprocess.PIPE, text=True, check=True)
    json.loads(report.stdout)
    print(f"{case}: {total} ranks of communicators as expected")
    shutil.rmtree(work)


main()
