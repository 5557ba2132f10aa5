#!/usr/bin/env python3
"""`railyard plan` as a user meets it: text, JSON, errors. usage: plan_test.py RAILYARD [--no-speed]"""
import json
import os
import sys
import tempfile

from cli import Cli

cli = Cli(sys.argv[1], "plan")
run, check, wants = cli.run, cli.check, cli.wants


wants("meta.json: cannot be opened", "/nonexistent")
wants("which folder", status=2)
wants("--nodes takes a whole number", "-n", "2,x", "d", status=2)
wants("no solver 'magic'", "--solver", "magic", "d", status=2)
wants("do not go together", "--busiest", "--max-moved", "3", "d", status=2)
check("help does not tell what DIR holds", "counts.npy" in run("--help").stdout)
if "--no-speed" not in sys.argv:  # sanitized builds tell nothing of it
    speed = json.loads(run("--speed", "--json", "-").stdout)["speed"]
    check("no growth up to 16,384 samples on 512 nodes", any(s["samples"] == 16384 and s["nodes"] == 512 for s in speed))
    for s in speed:
        if (s["samples"], s["nodes"]) == (384, 16):
            check(f"384 x 16: {s['ratio']:.0f} times faster than Kuhn-Munkres, not 50", s["ratio"] >= 50)

trace = os.path.join(os.environ.get("RY_SHARED", ""), "traces", "gpt-e32-k2")
if not os.path.isdir(trace):
    print("SKIPPED in part: no routing traces in RY_SHARED")
    cli.end(77)

wants("32 experts cannot be dealt out evenly to 12 ranks", "-n", "3", trace)
wants("with 3000 to learn from, 72 are left, but a batch has 128", "--fit", "3000", trace)
wants("256 samples are recorded with token-level choices", "--count", "distinct", trace)
distinct = json.loads(run("--count", "distinct", "--fit", "128", "--batch", "64", "--batches", "4", "-n", "4", "--json", "-", trace).stdout)["clusters"][0]["rows"]
copies = json.loads(run("--fit", "128", "--batch", "64", "--batches", "4", "-n", "4", "--json", "-", trace).stdout)["clusters"][0]["rows"]
check("distinct pairs are not fewer than copies", distinct[0]["cross_rows"] < 0.95 * copies[0]["cross_rows"])
check("placing does not save distinct pairs", distinct[2]["cross"] < 0.95)
with tempfile.TemporaryDirectory() as tmp:
    out = os.path.join(tmp, "plan.json")
    text = run("--json", out, "-n", "2,4", trace).stdout
    with open(out, encoding="utf-8") as f:
        whole = json.load(f)
    for c in whole["clusters"]:
        rows = {r["placement"]: r for r in c["rows"]}
        check("the text lacks a row", all(name in text for name in rows))
        check("in order is not 1", rows["samples in order"]["cross"] == 1)
        order = [rows[n]["cross"] for n in ("NetMoE, next layer known", "NetMoE, next layer predicted", "NetMoE, gather only", "samples in order")]
        check(f"{c['nodes']} nodes: {order} do not ascend", order == sorted(order))
        check(f"{c['nodes']} nodes: declined", c["worth"]["place"] and "worth while" in text)
    wants("cannot be written", "--json", os.path.join(tmp, "none", "x.json"), "-n", "2", trace)

shuffled = json.loads(run("--shuffle", "3", "-n", "2,4", "--batches", "4", "--json", "-", trace).stdout)
for c in shuffled["clusters"]:
    check(f"shuffled, {c['nodes']} nodes: not declined", not c["worth"]["place"] and "as alike as chance" in c["worth"]["why"])
    check("declined, but samples move", c["rows"][-1]["moved"] == 0 and c["rows"][-1]["cross"] == 1)

ablation = json.loads(run("--ablate", "-n", "4", "--batches", "4", "--json", "-", trace).stdout)["clusters"][0]["rows"]
rows = {r["placement"]: r for r in ablation}
check("exact and Kuhn-Munkres differ by more than ties do", abs(rows["exact"]["cross"] - rows["kuhn-munkres"]["cross"]) < 0.002)
check("greedy is better than exact", rows["greedy"]["cross"] > rows["exact"]["cross"])
check("removing placement costs nothing", rows["never: placement removed"]["cross"] == 1)

short = ("-n", "4", "--batches", "4")
few = json.loads(run("--max-moved", "8", *short, "--json", "-", trace).stdout)["clusters"][0]["rows"]
many = json.loads(run(*short, "--json", "-", trace).stdout)["clusters"][0]["rows"]
check("8 moves a layer save as much as any number", many[2]["cross"] < few[2]["cross"] < 1)
even = json.loads(run("--busiest", *short, "--json", "-", trace).stdout)["clusters"][0]["rows"]
check("--busiest does not relieve the busiest NIC", even[3]["busiest_nic"] < many[3]["busiest_nic"])
again = json.loads(run(*short, "--json", "-", trace).stdout)["clusters"][0]["rows"]
check("two runs with one seed differ", [r["cross_rows"] for r in again] == [r["cross_rows"] for r in many])
for row in few + many + even:
    print(f"{row['placement']:32} cross {row['cross']:.3f} busiest NIC {row['busiest_nic']:.3f} moved {row['moved']:.2f}")
cli.end()
