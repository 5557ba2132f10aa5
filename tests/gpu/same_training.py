"""That training with placement is the same training: curves of losses, and the gradients of one step.

curves: jobs from the same weights with the same samples in every step. Plain ones deal each step's samples to ranks and slots in
different orders; placed ones let Railyard do so. What sums are made of is the same, their order is not, and training carries the last
bits on: so plain runs drift apart, and placed ones should neither more nor less. Losses are means over ten steps. A run is held against plain
runs, at each of these means: is it within their least and greatest, widened by that spread on both sides? It lies within where
that is so for four of five means, and where it is, on average, no further from the plain runs than 1.5 times what the two plain runs farthest
apart are from each other. (Of random walks held against five of their kind one in forty is taken for another; tests/live/measuring_test.py.) Each plain run is held against the other plain ones by the same rule: that says what the rule is worth.

gradients: one sample per rank, fp32, weights that stay (rate 0): the gradient of a step is the same whoever has which sample, up to the
order of sums. Each parameter's greatest difference, over its greatest gradient; beside it, the same between two plain runs that deal the
samples otherwise.

Owns: these jobs, the statistics, the picture. Not: weights and plans (placement_jobs.py), the cluster.
"""
import glob
import json
import os
import statistics
import time

import figures
from placement_jobs import adapter, command, exchanging, homes, job, say
from turns import Failed

BIN = 10  # steps
TOLD = ("windows", "moves", "changed ranks", "warn", "error", " off")


def options(p):
    p.add_argument("--curve", type=int, nargs="?", const=300, default=0, metavar="STEPS", help="curves of losses of so many steps (300)")
    p.add_argument("--curve-batch", type=int, default=4, help="samples per rank and step there")
    p.add_argument("--curve-lr", type=float, default=3e-4)
    p.add_argument("--at-once", type=int, metavar="N", help="so many of these jobs at a time; default: all, on CPUs one")
    p.add_argument("--curve-plain", type=int, default=5, metavar="N", help="plain runs, 3 at least")
    p.add_argument("--svg", metavar="FILE", help="the curves")
    p.add_argument("--gradients", action="store_true", help="gradients of one step, placed against unplaced")
    p.add_argument("--gradients-close", type=float, default=1e-3, help="how far a parameter's may be apart, as a part of its greatest")


def placed(a, folder, label, kind, fp32=False):
    env = [*exchanging(a, fp32), adapter(), *a.railyard_env]
    if kind in ("layer", "rides"):  # anywhere, whatever it costs: else it would hardly move anybody
        return env + ["RAILYARD_PLACEMENT=layer", "RY_TEST_LAYERS=1"] + (["RAILYARD_RESIDUAL=rides"] if kind == "rides" else [])
    env.append("RAILYARD_PLACEMENT=batch")
    if kind == "batch":
        return env + [homes(folder, label, "homes-unmoved")]
    return env + [homes(folder, label, "homes-planned"), "RAILYARD_EXPERTS=" + os.path.join(folder, "plan.json")]


def kinds(a):
    return ["batch", "experts"] + (["layer", "rides"] if a.framework == "megatron" else [])


def run(a, folder, wanted, batch, more, end):
    """As many as may at the same time: {label: (job's folder, result, remarks)}. wanted: {label: (further arguments, environment or
    None)}."""
    jobs, done, left = {}, {}, list(wanted.items())
    try:
        while left or jobs:
            while left and len(jobs) < a.at_once:
                label, (extra, env) = left.pop(0)
                out = os.path.join(folder, label)
                jobs[label] = job(a, label, a.nodes, a.gpus, folder, command(a, out, batch, [
                    "--load", os.path.join(os.path.dirname(folder), "weights"), "--seed", "4", *more, *extra]), a.env + (env or []),
                    a.preload if env else None, end, turns=False)
            label = next(iter(jobs))
            one = jobs[label]
            one.finish()
            done[label] = (one.folder, one.result("train.json"), one.remarks())
            del jobs[label]
    finally:
        for one in jobs.values():
            one.close()
    return {label: done[label] for label in wanted}


# ------------------------------------------------------------------------------------------------------------- curves

def means(losses):
    return [statistics.fmean(losses[i:i + BIN]) for i in range(0, len(losses) // BIN * BIN, BIN)]


def distance(x, y):
    return statistics.fmean(abs(p - q) for p, q in zip(x, y))


def within(curve, plains):
    """{"inside": share of the means within the widened spread, "far": mean distance to plain runs over the farthest two's, "ok"}."""
    inside = 0
    for k, v in enumerate(curve):
        low, high = min(p[k] for p in plains), max(p[k] for p in plains)
        inside += low - (high - low) <= v <= high + (high - low)
    apart = max(distance(p, q) for i, p in enumerate(plains) for q in plains[:i])
    far = statistics.fmean(distance(curve, p) for p in plains)
    return {"inside": inside / len(curve), "distance": far, "far": far / apart if apart else 0.0 if far == 0 else float("inf"),
            "ok": inside >= 0.8 * len(curve) and far <= 1.5 * apart}


def judge(losses, plain):
    """{label: within()}; plain runs are held against the others."""
    curves = {label: means(v) for label, v in losses.items()}
    return {label: within(curve, [curves[p] for p in plain if p != label]) for label, curve in curves.items()}


def curve(a, folder, end):
    here, began = os.path.join(folder, "curves"), time.monotonic()
    os.makedirs(here, exist_ok=True)
    plain = ["plain %d" % i for i in range(max(3, a.curve_plain))]
    wanted = {label: (["--reorder", str(i)] if i else [], None) for i, label in enumerate(plain)}
    for kind in kinds(a):
        wanted[kind] = ([], placed(a, folder, "curve-" + kind, kind))
    done = run(a, here, wanted, a.curve_batch, ["--steps", str(a.curve), "--lr", str(a.curve_lr), "--lr-warmup", "10", "--show-samples"], end)
    losses = {label: [float.fromhex(v) for v in r["losses"]] for label, (_, r, _) in done.items()}
    found, ok, rows = judge(losses, plain), True, [["", "first", "last ten", "means inside", "from plain runs", "of the farthest two", "within", "dealt otherwise"]]
    first = done[plain[0]][1]["samples"]
    for label, v in found.items():
        # Of all samples, those on another rank than in the first plain run. Layers' moves are within a step.
        other, count, same = 0, 0, True
        for s in range(a.curve):
            step = [rank[s] for rank in done[label][1]["samples"]]
            same = same and sorted(sum(step, [])) == sorted(sum((rank[s] for rank in first), []))
            other += sum(len(set(mine) - set(theirs[s])) for mine, theirs in zip(step, first))
            count += sum(map(len, step))
        v["otherwise"], v["same_samples"] = other / count, same
        ok = ok and same and (v["ok"] or label in plain)
        rows.append([label, "%.4f" % losses[label][0], "%.4f" % means(losses[label])[-1], "%.0f %%" % (100 * v["inside"]), "%.2e" % v["distance"],
                     "%.2f" % v["far"], "yes" if v["ok"] else "NO", "%.0f %%%s" % (100 * v["otherwise"], "" if same else ", OTHER SAMPLES")])
    said = ["%s: %s" % (label, m) for label in kinds(a) for m in done[label][2] if any(w in m for w in TOLD)]
    text = "\n".join(said[:12] + ["%d steps of %d samples a rank, %s, rate %g, %.0f s for all of them; means over %d steps" % (
        a.curve, a.curve_batch, a.shape, a.curve_lr, time.monotonic() - began, BIN), figures.table(rows)])
    if a.svg:
        picture(a.svg, {label: means(v) for label, v in losses.items()}, plain)
    return {"losses": losses, "judged": found, "ok": ok, "text": text}


def picture(path, curves, plain):
    """Above, the means of all runs; below, each less the plain runs' mean, where their spread is the grey band."""
    w, h, left, n = 760, 470, 70, len(next(iter(curves.values())))
    base = [statistics.fmean(curves[p][k] for p in plain) for k in range(n)]
    colors = ["#d1495b", "#00798c", "#edae49", "#6a4c93"]
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12" fill="#1f2933">' % (w, h),
           '<rect width="100%" height="100%" fill="white"/>']

    def panel(top, height, lines, band, title):
        values = [v for line in lines.values() for v in line] + [v for line in band for v in line]
        low, high = min(values), max(values)
        high = high if high > low else low + 1e-9

        def points(line):
            return ["%.1f,%.1f" % (left + k * (w - left - 150) / max(1, n - 1), top + (high - v) / (high - low) * height) for k, v in enumerate(line)]
        if band:
            out.append('<polygon fill="#d9dee3" points="%s"/>' % " ".join(points(band[1]) + points(band[0])[::-1]))
        for i, (label, line) in enumerate(lines.items()):
            color, wide = ("#9aa5b1", 1) if label in plain else (colors[[k for k in lines if k not in plain].index(label) % 4], 1.6)
            out.append('<polyline fill="none" stroke="%s" stroke-width="%g" points="%s"/>' % (color, wide, " ".join(points(line))))
            if top < 50:
                out.append('<text x="%d" y="%d" fill="%s">%s</text>' % (w - 140, top + 14 + 16 * i, color, label))
        out.append('<text x="%d" y="%d">%s</text><text x="4" y="%d">%.4g</text><text x="4" y="%d">%.4g</text>' % (
            left, top - 6, title, top + 10, high, top + height, low))

    panel(30, 190, curves, [], "loss, mean over %d steps" % BIN)
    least = [min(curves[p][k] for p in plain) - base[k] for k in range(n)]
    most = [max(curves[p][k] for p in plain) - base[k] for k in range(n)]
    panel(260, 180, {c: [v - b for v, b in zip(line, base)] for c, line in curves.items() if c not in plain}, [least, most],
          "less the plain runs' mean (grey: their spread)")
    out.append('<text x="%d" y="%d">%d steps</text></svg>' % (left, h - 8, n * BIN))
    with open(path, "w") as f:
        f.write("\n".join(out))


# ---------------------------------------------------------------------------------------------------------- gradients

def gathered(folder, step, world, order=None):
    """{parameter: gradient} of a step, experts by the checkpoint's number (order[layer][slot])."""
    import torch
    from moe_job import EXPERT
    found, layers = {}, []
    for rank in range(world):
        part = torch.load(os.path.join(folder, "gradients-step%d-rank%d.pt" % (step, rank)))
        local = 1 + max(int(m.group(2)) for m in map(EXPERT.fullmatch, part) if m)
        for name, g in part.items():
            m = EXPERT.fullmatch(name)
            if m:
                if m.group(1) not in layers:
                    layers.append(m.group(1))  # in the model's order
                slot = rank * local + int(m.group(2))
                expert = order[layers.index(m.group(1))][slot] if order else slot
                found["%s%d%s" % (m.group(1), expert, m.group(3))] = g
            elif rank == 0:
                if order and name.endswith(("router.weight", "gate.wg.weight")):
                    row = order[sum(n.endswith(("router.weight", "gate.wg.weight")) for n in found)]
                    back = torch.empty_like(g)
                    back[torch.tensor(row)] = g
                    g = back
                found[name] = g
            elif not torch.equal(g, part[name]):
                raise Failed("rank %d holds another gradient of %s than rank 0" % (rank, name))
    return found


def apart(x, y):
    """[(greatest difference over greatest gradient, parameter)], the farthest first."""
    if x.keys() != y.keys():
        raise Failed("other parameters: %s" % sorted(x.keys() ^ y.keys())[:4])
    found = []
    for name in x:
        most = max(float(x[name].abs().max()), float(y[name].abs().max()))
        found.append((float((x[name] - y[name]).abs().max()) / most if most else 0.0, name))
    return sorted(found, reverse=True)


def gradients(a, folder, end):
    """Steps 26 to 31, in a window of lists that is surely planned; of these for each job the two in which most ranks have other samples."""
    here, steps, kept, world, began = os.path.join(folder, "gradients"), 32, 6, a.nodes * a.gpus, time.monotonic()
    os.makedirs(here, exist_ok=True)
    wanted = {"plain": ([], None), "plain, dealt otherwise": (["--reorder", "1"], None)}
    for kind in kinds(a):
        wanted[kind] = ([], placed(a, folder, "gradients-" + kind, kind, True))
    done = run(a, here, wanted, 1, ["--steps", str(steps), "--lr", "0", "--fp32", "--gradients", str(kept), "--show-samples"], end)
    with open(os.path.join(folder, "plan.json")) as f:
        order = json.load(f)["permutation"]
    samples = {label: [[rank[s] for rank in r["samples"]] for s in range(steps)] for label, (_, r, _) in done.items()}
    found, ok, plain = {}, True, {}
    rows = [["", "steps", "ranks with other samples", "median parameter", "farthest parameter", "", "loss apart", "within"]]
    for label in list(done)[1:]:
        moved = {s: sum(x != y for x, y in zip(samples[label][s], samples["plain"][s])) for s in range(steps - kept, steps)}
        worst, chosen = [], sorted(sorted(moved, key=lambda s: -moved[s])[:2])
        for s in chosen:
            plain[s] = plain.get(s) or gathered(done["plain"][0], s, world)
            worst += apart(gathered(done[label][0], s, world, order if label == "experts" else None), plain[s])
        worst.sort(reverse=True)
        losses = [abs(float.fromhex(done[label][1]["losses"][s]) / float.fromhex(done["plain"][1]["losses"][s]) - 1) for s in chosen]
        same = all(sorted(sum(samples[label][s], [])) == sorted(sum(samples["plain"][s], [])) for s in range(steps))
        good = same and worst[0][0] <= a.gradients_close
        found[label] = {"steps": chosen, "worst": worst[:20], "median": worst[len(worst) // 2][0], "moved": moved, "losses": losses,
                        "same_samples": same, "ok": good}
        ok = ok and good
        rows.append([label, " and ".join(map(str, chosen)),
                     " and ".join("%d of %d" % (moved[s], world) for s in chosen) if label not in ("layer", "rides") else "moved between layers",
                     "%.1e" % found[label]["median"], "%.1e" % worst[0][0], worst[0][1] if worst[0][0] else "", "%.1e" % max(losses),
                     "yes" if good else "NO" if same else "NO: OTHER SAMPLES"])
    said = ["%s: %s" % (label, m) for label in kinds(a) for m in done[label][2] if any(w in m for w in TOLD)]
    text = "\n".join(said[:12] + ["gradients of single steps, one sample of %d tokens a rank, fp32, %s, %.0f s; differences by each parameter's greatest gradient" % (
        a.seq, a.shape, time.monotonic() - began), figures.table(rows)])
    for label in done:
        for path in glob.glob(os.path.join(done[label][0], "gradients-*.pt")):
            os.unlink(path)  # gigabytes
    return {"found": found, "ok": ok, "text": text}


def show(a, folder, end):
    """Whatever of both is asked for."""
    result = {"ok": True, "text": ""}
    for name, wanted, what in (("gradients", a.gradients, gradients), ("curve", a.curve, curve)):
        if wanted:
            result[name] = what(a, folder, end)
            say("%s: %s" % (name, "as it must be" if result[name]["ok"] else "NOT as it must be"))
            result["ok"] = result["ok"] and result[name]["ok"]
            result["text"] += result[name]["text"] + "\n"
    return result
