#!/usr/bin/env python3
"""bench_test.py CASE RAILYARD: `railyard bench` on the emulated cluster, its figures checked against each other.

What is checked here and not by the benchmark itself: exchange and byte numbers against the formula, the matrix against
the totals, digests of equal and of different runs, and that errors come out as an exit status and one clear text.
Exit status 77 means skipped.
"""
import json
import os
import re
import struct
import subprocess
import sys
import tempfile

railyard = sys.argv[2]
scratch = tempfile.TemporaryDirectory(prefix="railyard-bench-")


def bench(nodes, gpus, *options, status=0, nccl=None, preload=None):
    """`preload`: settings of Railyard, which is then preloaded."""
    command = [railyard, "emu", "-n", str(nodes), "-g", str(gpus), *(["--preload"] if preload else []), "--"]
    if nccl:
        command += ["env", f"LD_LIBRARY_PATH={nccl}"]
    command += ["railyard", "bench", *options]  # found by PATH
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("RAILYARD_")}, **(preload or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    text = done.stdout + done.stderr
    assert done.returncode == status, f"{' '.join(command)}: status {done.returncode} instead of {status}\n{text}"
    return text


def read_matrix(path):
    with open(path, "rb") as f:
        data = f.read()
    assert data[:6] == b"\x93NUMPY", path
    end = 10 + struct.unpack("<H", data[8:10])[0]
    header = data[10:end].decode()
    assert "'<u8'" in header, header
    rows, columns = map(int, re.search(r"\((\d+), (\d+)\)", header).groups())
    values = struct.unpack(f"<{rows * columns}Q", data[end:])
    return [list(values[r * columns : (r + 1) * columns]) for r in range(rows)]


def measured(nodes, gpus, *options):
    """Run with JSON and matrix, check what must hold for any run, return both."""
    out, matrix_file = os.path.join(scratch.name, "out.json"), os.path.join(scratch.name, "out.npy")
    bench(nodes, gpus, "--digest", f"--json={out}", f"--matrix={matrix_file}", *options)
    with open(out) as f:
        result = json.load(f)
    matrix = read_matrix(matrix_file)
    o, ranks = result["options"], nodes * gpus
    steps = o["iterations"] + o["warmup"]
    flows = 4 if o["pad"] else 6
    assert (result["nodes"], result["ranks"], result["errors"]) == (nodes, ranks, 0), result
    assert result["rank_node"] == [r // gpus for r in range(ranks)], result["rank_node"]
    assert result["exchanges"] == steps * o["layers"] * flows, result["exchanges"]
    assert len(result["time_us"]) == flows
    for flow in result["time_us"].values():
        assert flow["n"] == o["iterations"] * o["layers"]
        assert 0 < flow["min"] <= flow["p10"] <= flow["median"] <= flow["p90"] <= flow["max"], flow
    assert sum(flow["bytes"] for flow in result["time_us"].values()) == result["bytes_total"]
    assert sum(map(sum, matrix)) == result["bytes_total"]
    assert sum(matrix[r][r] for r in range(ranks)) == result["bytes_self"]
    cross = sum(matrix[a][b] for a in range(ranks) for b in range(ranks) if a // gpus != b // gpus)
    assert cross == result["bytes_cross_node"]
    assert result["bytes_self"] + result["bytes_in_node"] + result["bytes_cross_node"] == result["bytes_total"]
    if not o["pad"]:
        rows = steps * o["layers"] * ranks * o["tokens"] * o["top_k"]
        size = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "int8": 1, "uint8": 1, "int32": 4, "int64": 8}
        expected = rows * (4 * o["hidden"] * size[o["type"]] + 2 * size[o["probs_type"]])
        assert result["bytes_total"] == expected, (result["bytes_total"], expected)
    if o["check"] == "every":
        assert result["checked_bytes"] == result["bytes_total"]
    return result, matrix


def uniform():
    small = ["--tokens=64", "--hidden=256"]
    first, matrix = measured(2, 2, *small)
    again, same = measured(2, 2, *small)
    assert first["digest"] == again["digest"] and matrix == same
    other, _ = measured(2, 2, "--seed=2", *small)
    assert first["digest"] != other["digest"]
    assert first["imbalance"] < 1.2
    share = first["bytes_cross_node"] / first["bytes_total"]
    assert 0.45 < share < 0.55, share  # half of the experts are on the other node
    # looking less closely must not change what is sent
    once, _ = measured(2, 2, "--check=first", *small)
    never, _ = measured(2, 2, "--check=none", "--barrier", *small)
    assert first["digest"] == once["digest"] == never["digest"]
    assert never["checked_bytes"] == 0
    assert once["checked_bytes"] * 4 < first["bytes_total"] < once["checked_bytes"] * 6


def zipf():
    result, _ = measured(2, 4, "--routing=zipf:1.2", "--experts=32", "--top-k=4", "--tokens=128", "--layers=1")
    assert result["imbalance"] > 1.3, result["imbalance"]


def padded():
    result, matrix = measured(2, 2, "--pad=1.25", "--experts=8", "--tokens=100", "--routing=zipf:0.8")
    equal = {value for row in matrix for value in row}
    # ceil(1.25 * 100 * 2 / 8) = 32 rows for each of 2 experts; 5 steps of 2 layers of 4 exchanges
    assert equal == {5 * 2 * 4 * 2 * 32 * 512 * 2}, equal
    # an NCCL that has no ncclAlltoAll: groups instead, of the same bytes
    old = os.path.join(os.path.dirname(railyard), "..", "emu", "old")
    text = bench(2, 2, "--pad=1.25", "--experts=8", "--tokens=100", "--routing=zipf:0.8", "--digest", nccl=old)
    assert "NCCL 2.18" in text and f"digest {result['digest']}" in text, text


def types():
    for kind in ("fp16", "fp32", "fp64", "int8", "uint8", "int32", "int64"):
        measured(1, 2, f"--type={kind}", f"--probs-type={kind}", "--hidden=7", "--tokens=33", "--iterations=1", "--layers=1")
    # one rank, one token, one expert, one element; and many splits of nothing
    measured(1, 1, "--experts=1", "--top-k=1", "--tokens=1", "--hidden=1", "--warmup=0", "--iterations=1")
    measured(1, 4, "--experts=64", "--top-k=1", "--tokens=1", "--iterations=2")


def trace():
    shared = os.environ.get("RY_SHARED", "")
    folder = os.path.join(shared, "traces", "gpt-e32-k2")
    if not shared or not os.path.isdir(folder):
        print(f"SKIP: no recorded routing at {folder}")
        sys.exit(77)
    result, _ = measured(2, 4, f"--routing=trace:{folder}", "--tokens=128", "--hidden=64", "--iterations=1")
    o = result["options"]
    assert (o["experts"], o["top_k"], o["layers"]) == (32, 2, 8), o


def agreed():
    """16 ranks agree on every exchange: how long that takes, by the report. Figures, not limits: the machine is shared."""
    job = ["--tokens=64", "--hidden=64", "--experts=32", "--top-k=4", "--layers=2", "--iterations=12", "--digest"]
    folder = os.path.join(scratch.name, "trace")
    text = bench(4, 4, *job, preload={"RAILYARD_STRATEGY": "hierarchical", "RAILYARD_TRACE": folder, "RAILYARD_VERIFY": "10"})
    plain = bench(4, 4, *job)
    digest = re.search("digest [0-9a-f]+", text).group()
    assert digest in plain, (text, plain)
    shown = subprocess.run([railyard, "report", folder], capture_output=True, text=True, check=True).stdout
    print(shown.partition("  bytes from rank")[0])
    done = subprocess.run([railyard, "report", folder, "--json", "-"], capture_output=True, text=True, check=True)
    (c,) = json.loads(done.stdout)["communicators"]
    a, waits = c["agreed_on"], c["agreed_on"]["waits"]
    # the first exchanges pass while the ranks meet, and one more for staging memory; after that all are reissued
    assert c["exchanges"] == 13 * 2 * 6, c["exchanges"]
    assert c["exchanges"] / 2 < a["exchanges"] < c["exchanges"], a
    assert a["by_strategy"]["hierarchical"] >= a["exchanges"] - 5, a
    assert sum(a["by_strategy"].values()) == a["exchanges"]
    assert a["verified"] == -(-a["by_strategy"]["hierarchical"] // 10) and not a["verify_differs"], a
    counters = c["counters"]
    assert counters["agreed"] == 16 * a["exchanges"] == waits["n"], (counters, a)
    assert counters["agreed.hierarchical"] == 16 * a["by_strategy"]["hierarchical"]
    # a comparison may still be under way when the communicator ends
    assert 16 * (a["verified"] - 1) <= counters["verified"] <= 16 * a["verified"], counters
    for column in ("waits", "messages"):
        assert sum(bin[column] for bin in waits["histogram"]) == waits["n"], waits
    for part in ("in_all", "messages", "late_ranks"):
        assert 0 <= waits[part]["median_us"] <= waits[part]["p90_us"] <= waits[part]["p99_us"], waits
    for quantile in ("median_us", "p90_us", "p99_us"):
        for part in ("messages", "late_ranks"):
            assert waits[part][quantile] <= waits["in_all"][quantile] * 1.02, waits  # classes are 1.6 % wide
    assert {d["strategy"] for d in a["durations"]} >= {"hierarchical"}, a["durations"]
    # observed only: nothing of it in the trace
    folder = os.path.join(scratch.name, "observed")
    bench(2, 2, "--tokens=16", "--hidden=16", preload={"RAILYARD_STRATEGY": "observe", "RAILYARD_TRACE": folder})
    for name in os.listdir(folder):
        if name.endswith(".jsonl"):
            with open(os.path.join(folder, name)) as f:
                lines = f.read()
            assert '"t":"x"' in lines and not re.search("strategy|waited|agreed", lines), lines


def errors():
    def refused(says, *options, status=2, nodes=1):
        text = bench(nodes, 2, *options, status=status)
        assert len(re.findall(re.escape(says), text)) == 1, f"expected once: {says}\nin: {text}"

    refused("3 experts cannot be shared evenly by 2 ranks", "--experts=3")
    refused("--top-k=9", "--experts=8", "--top-k=9")
    refused("--tokens=many: expected a whole number", "--tokens=many")
    refused("--tokens=0: expected a whole number from 1", "--tokens=0")
    refused("--type=fp8", "--type=fp8")
    refused("--routing=random is not known", "--routing=random")
    refused("--routing=zipf:x", "--routing=zipf:x")
    refused("/nonexistent/meta.json", "--routing=trace:/nonexistent")
    refused("--check=sometimes: expected every, first or none", "--check=sometimes")
    refused("--pad=-1", "--pad=-1")
    refused("unrecognized option '--nonsense'", "--nonsense")
    refused("unexpected argument 'word'", "word")
    refused("cannot write /nonexistent/out.json: No such file or directory", "--json=/nonexistent/out.json", status=1)
    refused("--experts", "--experts=6", nodes=2)  # fits one node's ranks, not both nodes'
    text = bench(1, 2, "--help")
    assert text.count("Usage:") == 1 and "torchrun" in text and "--capacity" not in text
    # the check can fail, and tells exchange, peer and offset
    small = ["--tokens=16", "--hidden=16", "--layers=1", "--iterations=1", "--warmup=0", "--experts=4"]
    text = bench(1, 2, "--corrupt=2", *small, status=1)
    told = re.search(r"rank 1: exchange 2 \(combine, iteration 0, layer 0\): 1 bytes from rank \d are wrong, the first at "
                     r"offset \d+: 0x.. instead of 0x..", text)
    assert told, text
    assert "1 wrong" in text, text
    bench(1, 2, "--corrupt=6", *small)  # there is no exchange 6 in this run
    # started as no rank of a job
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([railyard, "bench"], capture_output=True, text=True, timeout=200, env=alone)
    assert done.returncode == 2 and "railyard emu -n 2 -g 4 -- railyard bench" in done.stderr, done
    done = subprocess.run([railyard, "bench"], capture_output=True, text=True, timeout=200, env={**alone, "RANK": "x"})
    assert done.returncode == 2 and "RANK" in done.stderr, done


def overhead():
    program = os.path.join(os.path.dirname(railyard), "..", "bench", "railyard-overhead")
    out = os.path.join(scratch.name, "overhead.json")

    def run(*options, status=0):
        done = subprocess.run([program, *options], capture_output=True, text=True, timeout=500)
        assert done.returncode == status, (options, done)
        return done.stdout + done.stderr

    run("--rounds=30", f"--json={out}")
    with open(out) as f:
        result = json.load(f)
    assert not result["preloaded"] and set(result["cases"]) == {"group", "exchange", "plain", "collective"}
    for case in result["cases"].values():
        for way in ("public_ns", "direct_ns"):
            assert 0 < case[way]["p10"] <= case[way]["median"] <= case[way]["p90"], case
        difference = case["difference_ns"]
        assert difference["low95"] <= difference["median"] <= difference["high95"], case
        # both ways are the same code here: more than half of it in difference would be a broken method
        assert abs(difference["median"]) < case["direct_ns"]["median"] / 2, case
    assert run("--case=exchange", "--callgrind=100") == ""
    assert "expected group, exchange, plain or collective" in run("--case=none", status=2)
    assert "no usable number" in run("--rounds=1", status=2)
    assert "cannot write: /nonexistent/x" in run("--rounds=3", "--case=group", "--json=/nonexistent/x", status=1)


cases = {f.__name__: f for f in (uniform, zipf, padded, types, trace, agreed, errors, overhead)}
cases[sys.argv[1]]()
