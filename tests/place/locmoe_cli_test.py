#!/usr/bin/env python3
"""`railyard capacity` and `railyard plan --locality` as a user meets them, on files made here: text, JSON, errors.
usage: locmoe_cli_test.py RAILYARD"""
import array
import json
import math
import os
import random
import sys
import tempfile

from cli import Cli

cli = Cli(sys.argv[1], "capacity")
run, check, wants = cli.run, cli.check, cli.wants
plan = Cli(sys.argv[1], "plan")
plan.bad = cli.bad
seed = int(os.environ.get("RY_TEST_SEED", random.randrange(1 << 30)))
print(f"RY_TEST_SEED={seed}")
rng = random.Random(seed)
tmp = tempfile.TemporaryDirectory()


def save(name, values, shape, kind="f"):
    """A .npy file: kind f float32, d float64, H uint16, B uint8."""
    path = os.path.join(tmp.name, name)
    head = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }" % ({"f": "<f4", "d": "<f8", "H": "<u2", "B": "|u1"}[kind], tuple(shape))
    head = head.ljust(117) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + array.array(kind, values).tobytes())
    return path


def holds(layer):
    return {a["name"]: not a["violated"] for a in layer["assumptions"]}


# Tokens all around and gates at right angles: what is assumed holds. Few numbers, so that the bounds say something.
N, D, T = 4, 64, 600
eye = [float(j // (D // N) == i) for i in range(N) for j in range(D)]
gates = save("gates.npy", eye, (N, D))
even = [rng.gauss(0, 1) for _ in range(T * D)]
tokens = save("tokens.npy", even, (T, D), "d")
one = json.loads(run("--gates", gates, "--tokens", tokens, "--json", "-").stdout)["bounds"][0]
check(f"what holds is not seen to hold: {holds(one)}", all(holds(one).values()))
delta = max(sum(even[t * D + j] for j in range(D) if j // (D // N) == i) / math.sqrt(sum(v * v for v in even[t * D:(t + 1) * D])) / math.sqrt(D // N)
            for t in range(T) for i in range(N))
check(f"delta {one['delta']}, by hand {delta}", abs(one["delta"] - delta) < 1e-5)
x = D * delta ** 2 / (2 - delta ** 2)
check("erfc", abs(one["erfc"]["log"] + math.log(math.erfc(math.sqrt(x)))) < 1e-4 * x)
check("exp", abs(one["exp"]["log"] - x) < 1e-4 * x)
text = run("--gates", gates, "--tokens", tokens).stdout
check("nothing is violated, but the text says so", "does not hold" not in text and "sphere" in text)
grap = json.loads(run("--grap", str(N), "--tokens", tokens, "--json", "-").stdout)["bounds"][0]
check("grouped average pooling is not the gates that it is", grap["delta"] == one["delta"])

# Layers; the second one's tokens have a direction in common, and fewer dimensions.
odd = [rng.gauss(0, 1) + 3 if k % D < 6 else 0.0 for k in range(T * D)]
both = save("both.npy", even + odd, (2, T, D))
layers = json.loads(run("--gates", gates, "--tokens", both, "--json", "-").stdout)["bounds"]
check("two layers", len(layers) == 2 and all(holds(layers[0]).values()))
check(f"what is violated is not seen: {holds(layers[1])}", not any(holds(layers[1])[k] for k in ("tokens_centred", "tokens_even", "affinity_shape")))
text = run("--gates", gates, "--tokens", both).stdout
check("the text does not warn", "tokens have a direction in common" in text and "assumptions do not hold here" in text)
check("bounds that say nothing are shown as if they did", "says nothing" in text)

wants("nothing to do", status=2)
wants("both gates", "--tokens", tokens, status=2)
wants("take one", "--gates", gates, "--grap", "3", "--tokens", tokens, status=2)
wants("--batch takes a whole number", "--batch", "0", "--routing", "x", status=2)
wants("numbers a token", "--gates", gates, "--tokens", save("narrow.npy", even[:60], (2, 30)))
wants("save it as float32", "--gates", save("whole.npy", [1, 2, 3, 4], (2, 2), "H"), "--tokens", tokens)
wants("dimensions", "--gates", save("flat.npy", even[:60], (60,)), "--tokens", tokens)
wants("not finite", "--gates", gates, "--tokens", save("nan.npy", [math.nan] + even[1:D], (1, D)))
wants("cannot be grouped", "--grap", "65", "--tokens", tokens)
wants("cannot be opened", "--gates", "/nonexistent.npy", "--tokens", tokens)
wants("cannot be written", "--gates", gates, "--tokens", tokens, "--json", os.path.join(tmp.name, "none", "x.json"))

# Routing: 8 samples of 4 tokens, top-1, 4 experts, 2 layers. In the first sample s goes to expert s / 2 (so to its own rank on 4 ranks),
# in the second all to expert 0.
S, L, E, K = 8, 2, 4, 4
where = [[s // 2 for s in range(S)], [0] * S]
save("counts.npy", [K * (where[l][s] == e) for s in range(S) for l in range(L) for e in range(E)], (S, L, E), "H")
save("choices.npy", [where[l][s] for s in range(S) for l in range(L) for _ in range(K)], (S, L, K, 1), "B")
with open(os.path.join(tmp.name, "meta.json"), "w", encoding="utf-8") as f:
    json.dump({"samples": S, "layers": L, "experts": E, "topk": 1, "tokens_per_sample": K, "counts": "counts.npy", "choices": "choices.npy"}, f)
used = json.loads(run("--routing", tmp.name, "--batch", "8", "--json", "-").stdout)["used"]
check(f"loads {used}", [l["most"] for l in used["layers"]] == [1, 4] and used["most"] == 4 and used["layers"][1]["dropped_at_1"] == 0.75)
check("the text lacks the factor", "nothing to be dropped: 4.00" in run("--routing", tmp.name).stdout)
wants("8 samples do not fill one batch of 9", "--routing", tmp.name, "--batch", "9")
local = json.loads(plan.run("--locality", "-n", "2", "-g", "2", "--batch", "8", "--json", "-", tmp.name).stdout)["locality"]["clusters"][0]
first, second = local["layers"]
check(f"all stays: {first}", first["on_rank"] == first["on_node"] == first["distinct_on_node"] == 1 and first["kl"] < 0.01)
check(f"a quarter and a half stay: {second}", (second["on_rank"], second["on_node"], second["distinct_on_node"]) == (0.25, 0.5, 0.5))
check("the distance", abs(second["kl"] - (math.log(1 / 0.995) + math.log(1 / 0.005)) / 2) < 1e-4)
small = json.loads(plan.run("--locality", "-n", "2", "-g", "2", "--batch", "4", "--json", "-", tmp.name).stdout)["locality"]["clusters"][0]["layers"][1]
check("two windows", [w["from_sample"] for w in small["over_time"]] == [0, 4])
check("the text lacks the layers", "KL to local" in plan.run("--locality", "-n", "2", "-g", "2", "--batch", "8", tmp.name).stdout)
plan.wants("one each", "--locality", "--ablate", tmp.name, status=2)
plan.wants("take a smaller --batch", "--locality", "-n", "2", "-g", "2", tmp.name)
cli.end()
