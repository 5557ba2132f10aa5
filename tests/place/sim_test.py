#!/usr/bin/env python3
"""`railyard sim` as a user meets it: text, JSON, picture, errors, size. usage: sim_test.py RAILYARD [--small]"""
import json
import os
import resource
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from cli import Cli

cli = Cli(sys.argv[1], "sim")
run, check, wants = cli.run, cli.check, cli.wants


def points(*args):
    return json.loads(run(*args, "--json", "-").stdout)["clusters"]


def by_name(point):
    return {p["placement"]: p for p in point["placements"]}


def us(point, placement, strategy):
    return next(s for s in by_name(point)[placement]["strategies"] if s["strategy"] == strategy)["us_per_step"]


wants("no preset 'tpu': there are netmoe, h100-pod, ethernet", "--preset", "tpu", status=2)
wants("no placement 'best'", "--placements", "in-order,best", status=2)
wants("--locality takes a number from 0 to 1", "--locality", "1.2", status=2)
wants("are for made-up routing", "--locality", "0.5", "d", status=2)
wants("meta.json: cannot be opened", "/nonexistent")
wants("more than the 4096 GPUs", "-n", "513", "-p", "h100-pod")
wants("3 NICs", "-n", "2", "-g", "2", "--nics", "3")
wants("there is no such file", "--cost", "/nonexistent.json")
wants("too small for top-40", "--groups", "2", "--topk", "40", "-n", "2", "-g", "2", "--experts", "3")
wants("5 groups do not divide 8 experts", "--groups", "5", "-n", "2", "-g", "2")
check("help does not tell of presets", "netmoe, h100-pod or ethernet" in run("--help").stdout)

small = ("--tokens", "64", "--layers", "2", "--fit", "256", "--steps", "2")
two = points("-p", "netmoe", "-n", "2,4", "-g", "4", *small)
again = points("-p", "netmoe", "-n", "2,4", "-g", "4", *small)
check("two runs with one seed differ", two == again)
check("another seed changes nothing", two != points("-p", "netmoe", "-n", "2,4", "-g", "4", "--seed", "2", *small))
for p in two:
    names = by_name(p)
    check("netmoe-predicted was not left out", "left out" in names["netmoe-predicted"]["note"])
    for n in names.values():
        for s in n["strategies"]:
            check(f"{s['strategy']}: parts do not add up", abs(sum(s["us"].values()) - s["us_per_step"]) < 1e-3 * s["us_per_step"])
            check("modelled strategies are not marked", s["modelled_only"] == (s["strategy"] in ("dedup", "sum")))
crosses = [by_name(points("-n", "4", "--locality", str(k / 4), "--placements", "in-order,coplaced", *small)[0])["coplaced"]["cross"] for k in range(5)]
check(f"co-placed bytes do not fall with locality: {crosses}", crosses == sorted(crosses, reverse=True) and crosses[-1] < 0.1)
# A fast network inside and a slow one outside: fewer bytes are worth more; messages cost most where they are many.
slow = points("-p", "ethernet", "-n", "4", "--topk", "6", *small)[0]
check("sum is not faster than plain over 25 Gbit/s at top-6", us(slow, "in-order", "sum") < 0.8 * us(slow, "in-order", "plain"))
rails = points("-p", "h100-pod", "-n", "4", "--placements", "in-order", *small)[0]
check("h100-pod has no rails", rails["cluster"]["rails"] and rails["model"]["nic_rank_bytes_per_us"] * 8 == rails["model"]["nic_bytes_per_us"])

with tempfile.TemporaryDirectory() as tmp:
    out, pic = os.path.join(tmp, "sim.json"), os.path.join(tmp, "sim.svg")
    text = run("-n", "2", "-g", "2", *small, "--json", out, "--svg", pic).stdout
    with open(out, encoding="utf-8") as f:
        p = json.load(f)["clusters"][0]
    check("no text beside the file", "samples in order" in text and "have no plan in this version" in text)
    check("the text has no fastest", text.count("<- fastest") == 1)
    drawn = ElementTree.parse(pic).getroot()
    rects = sum(e.tag.endswith("rect") for e in drawn.iter())
    shown = sum(len(q["strategies"]) for q in p["placements"])
    check(f"{rects} bars for {shown} rows", rects == 1 + 5 + shown)
    run("-n", "2,4", "-g", "2", *small, "--svg", pic)
    lines = ElementTree.parse(pic).getroot()
    check("no panels", any("modelled: has no plan yet" in (e.text or "") for e in lines.iter()))
    # One skewed exchange: rails of their own are evened out, and where many senders to a node slow it down, stages help.
    rows = {}
    for incast in ("0", "0.5"):
        for line in run("-p", "h100-pod", "-n", "4", "-g", "8", "--exchange", "512", "--skew", "1", "--incast", incast).stdout.splitlines():
            f = line.split()
            if len(f) > 4 and f[0] == "32":
                rows[incast, f[1]] = [float(v) for v in f[2:5]]
    check("balanced is not faster by even rails", rows["0", "pairs"][2] < 0.9 * min(rows["0", "pairs"][:2]))
    check("incast makes no difference to stages", all(rows["0", m][2] == rows["0.5", m][2] for m in ("popular", "pairs")))
    check("incast does not slow others down", all(rows["0.5", m][i] > 1.2 * rows["0", m][i] for m in ("popular", "pairs") for i in (0, 1)))
    check("--exchange takes --json", "instead of a job" in run("--exchange", "1", "--json", out, status=2).stderr)
    wants("instead of a job", "--exchange", "1", "--json", out, status=2)
    wants("are more than the 1024", "-n", "200", "-g", "8", "--exchange", "1")
    wants("cannot be written", "-n", "2", "-g", "2", *small, "--svg", os.path.join(tmp, "none", "x.svg"))
    # Measured costs take the place of the data sheets.
    cost = {"format": "railyard cost", "version": 1, "fingerprint": "0", "copy": {"each_us": 3, "bytes_per_us": 3e5}, "group_us": 15, "agreement_us": 50, "plan_us_per_rank": 0.2}
    for link, speed in (("self", 1e5), ("local", 3e5), ("nic", 1000)):
        cost[link] = {"alpha_us": 5, "bytes_per_us": speed, "message_us": 1, "measured": True}
    cost["nic"]["rank_bytes_per_us"] = 1000
    path = os.path.join(tmp, "cost.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(cost, f)
    measured = points("-n", "2", "-g", "2", *small, "--cost", path)[0]
    check("--cost is not used", measured["model"]["nic_bytes_per_us"] == 1000 and us(measured, "in-order", "plain") > 10 * us(p, "in-order", "plain"))

if "--small" not in sys.argv:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    big = points("-p", "h100-pod", "-n", "512", "--layers", "1", "--tokens", "256", "--placements", "in-order,homes")[0]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"4,096 GPUs, one layer, two placements: {used.ru_utime - before:.1f} s of CPU, at most {used.ru_maxrss / 1e6:.2f} GB")
    check("4,096 GPUs take more than 30 s of CPU", used.ru_utime - before < 30)
    check("4,096 GPUs take more than 1 GB", used.ru_maxrss < 1e6)
    spread = us(rails, "in-order", "plain") / rails["routing"]["layers"]
    check("thousands of messages cost no more than dozens", us(big, "in-order", "plain") > 10 * spread)

trace = os.path.join(os.environ.get("RY_SHARED", ""), "traces", "gpt-e32-k2")
skipped = not os.path.isdir(trace)
if skipped:
    print("SKIPPED in part: no routing traces in RY_SHARED")
else:
    wants("3 GPUs with 5 each make 15", "-n", "1", "-g", "3", "--experts", "5", trace)
    wants("to learn from are too many", "--fit", "3000", trace)
    p = points("--steps", "2", "--fit", "256", "--placements", "in-order,netmoe-gather,netmoe-predicted,netmoe-known", trace)[0]
    names = by_name(p)
    order = [names[n]["cross"] for n in ("netmoe-known", "netmoe-predicted", "netmoe-gather", "in-order")]
    check(f"{order} do not ascend", order == sorted(order) and order[-1] == 1)
    check("the scaling is not told", p["routing"]["expert_stands_for"] == 2 and "stands for 2" in p["routing"]["scaled"])
    check("the paper's figures are not there", p["netmoe"]["here"]["placement"] == "netmoe-predicted" and p["netmoe"]["differs"])
    check("samples hardly move", p["netmoe"]["here"]["moved"] > 0.7)
cli.end(77 if skipped else 0)
