#!/usr/bin/env python3
"""`railyard plan --compare` on routing made here: the table, its JSON, maps, decisions, errors. usage: compare_test.py RAILYARD"""
import json
import os
import pathlib
import random
import struct
import sys
import tempfile

from cli import Cli

SAMPLES, LAYERS, EXPERTS, TOPK, TOKENS, CHOICES, DOMAINS = 512, 2, 8, 2, 24, 64, 4
PROTOCOL = ["--fit", "384", "--batches", "2", "--batch", "32", "-g", "2"]
KEYS = ["netmoe_gather", "netmoe_predicted", "netmoe_known", "coplaced_known", "coplaced_tokens", "coplaced_node_load", "coplaced_seconds",
        "bounded_known", "bounded_tokens", "bounded_node_load", "bounded_seconds", "contiguous_node_load", "fit", "least",
        "distinct_alone", "distinct_tokens", "distinct_node_load", "distinct_bounded_tokens", "distinct_bounded_node_load"]
cli = Cli(sys.argv[1], "plan", "--compare")
run, check, wants = cli.run, cli.check, cli.wants


def npy(path, shape, kind, values):
    head = f"{{'descr': '{ {'H': '<u2', 'B': '|u1'}[kind]}', 'fortran_order': False, 'shape': {shape}, }}"
    head += " " * (-(len(head) + 11) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + struct.pack(f"<{len(values)}{kind}", *values))


def folder(path, local=True, **without):
    """Samples of four kinds; a kind's tokens have ids of their own and choose two experts that do not lie together. Some of all choose
    experts 0 and 1, so that contiguous blocks are uneven, and leave room below the loads' bound."""
    rng = random.Random(5)
    os.mkdir(path)
    counts, choices, tokens = [0] * (SAMPLES * LAYERS * EXPERTS), [], []
    for s in range(SAMPLES):
        kind = rng.randrange(DOMAINS)
        tokens += [kind * 50 + rng.randrange(50) for _ in range(TOKENS)]
        for layer in range(LAYERS):
            for _ in range(TOKENS):
                luck = rng.random()
                pair = [0, 1] if luck < 0.2 else [kind, kind + DOMAINS] if local and luck < 0.95 else rng.sample(range(EXPERTS), TOPK)
                for e in pair:
                    counts[(s * LAYERS + layer) * EXPERTS + e] += 1
                if s < CHOICES:
                    choices += pair
    meta = {"samples": SAMPLES, "layers": LAYERS, "experts": EXPERTS, "topk": TOPK, "tokens_per_sample": TOKENS, "vocabulary": 200,
            "counts": "counts.npy", "choices": "choices.npy", "choice_samples": CHOICES, "tokens": "tokens.npy"}
    npy(f"{path}/counts.npy", (SAMPLES, LAYERS, EXPERTS), "H", counts)
    npy(f"{path}/choices.npy", (CHOICES, LAYERS, TOKENS, TOPK), "B", choices)
    npy(f"{path}/tokens.npy", (SAMPLES, TOKENS), "H", tokens)
    with open(f"{path}/meta.json", "w", encoding="utf-8") as f:
        json.dump({k: v for k, v in meta.items() if k not in without.get("without", ())}, f)
    return path


with tempfile.TemporaryDirectory() as tmp:
    local, even = folder(f"{tmp}/local"), folder(f"{tmp}/even", local=False)
    bare = folder(f"{tmp}/bare", without=("tokens", "choices", "choice_samples"))

    p = run(*PROTOCOL, "-n", "2,4", "--json", f"{tmp}/out.json", local, even)
    with open(f"{tmp}/out.json", encoding="utf-8") as f:
        out = json.load(f)
    check("schema", (out["schema"], out["version"]) == ("railyard-plan", 1))
    check("protocol", out["protocol"] == {"fit": 384, "batches": 2, "batch": 32, "seed": 1, "count": "copies"})
    check("folders", [t["dir"] for t in out["traces"]] == [local, even])
    first, second = out["traces"]
    check("numbers of nodes", first["nodes"] == [2, 4])
    check(f"keys: {[r['key'] for r in first['rows']]}", [r["key"] for r in first["rows"]] == KEYS)
    rows = {r["key"]: r["values"] for r in first["rows"]}
    for r in first["rows"]:
        check(f"the text lacks '{r['name']}'", r["name"] in p.stdout)
        check(f"{r['key']}: {r['values']}", len(r["values"]) == 2 and all(v is not None and 0 <= v < 60 for v in r["values"]))
    for k, nodes in enumerate((2, 4)):
        at = {key: v[k] for key, v in rows.items()}
        check(f"{nodes} nodes: prediction does not help", at["netmoe_known"] <= at["netmoe_predicted"] + 0.01 <= at["netmoe_gather"] + 0.02)
        check(f"{nodes} nodes: co-placed {at['coplaced_tokens']}", at["coplaced_tokens"] < 0.6 * at["netmoe_gather"])
        check(f"{nodes} nodes: known worse than told", at["coplaced_known"] <= at["coplaced_tokens"] + 1e-9)
        check(f"{nodes} nodes: below the bound", at["least"] <= at["fit"] + 1e-6)
        check(f"{nodes} nodes: dedup costs", at["distinct_tokens"] < at["distinct_alone"] < 1)
        d, s = first["decisions"][k], first["shuffled"][k]
        check(f"{nodes} nodes: {d}", d["nodes"] == nodes and d["move_experts"] and d["move_samples"] and d["loads_held"] and d["homes"].startswith("sure"))
        for declined in (s, second["decisions"][k], second["shuffled"][k]):
            check(f"not declined: {declined}", not declined["move_experts"] and not declined["move_samples"] and "nothing is moved" in declined["experts"])
        same = {r["key"]: r["values"][k] for r in second["rows"]}
        check("declined, but what crosses changes", abs(same["bounded_known"] - same["bounded_tokens"]) < 0.1 and
              same["bounded_node_load"] == same["contiguous_node_load"])
    check("the text does not tell that shuffled tokens are declined", p.stdout.count("tokens shuffled among samples") == 4)

    again = json.loads(run(*PROTOCOL, "-n", "4", "--json", "-", local).stdout)["traces"][0]
    one = {r["key"]: r["values"][0] for r in again["rows"]}
    differ = [k for k in KEYS if "seconds" not in k and one[k] != rows[k][1]]
    check(f"two runs with one seed differ: {differ}", not differ)

    half = {r["key"]: r["values"] for r in json.loads(run(*PROTOCOL, "-n", "2", "--json", "-", bare).stdout)["traces"][0]["rows"]}
    check(f"without tokens and choices: {sorted(half)}", "coplaced_known" in half and not any("tokens" in k or "distinct" in k for k in half))

    run(*PROTOCOL, "-n", "4", "--map", f"{tmp}/map.json", local)
    with open(f"{tmp}/map.json", encoding="utf-8") as f:
        placed = json.load(f)
    check(f"{placed}: no permutations", placed["ranks"] == 8 and all(sorted(l) == list(range(EXPERTS)) for l in placed["permutation"]))
    pairs = [sorted(l[i:i + 2]) for l in placed["permutation"] for i in range(0, EXPERTS, 2)]
    check(f"experts that tokens choose together are apart: {pairs}", all(b - a == DOMAINS for a, b in pairs))

    # Homes for jobs: the model under the map is not the one for experts where they are; each names its map, so loads only there.
    run(*PROTOCOL, "-n", "4", "--map", f"{tmp}/map.json", "--homes", f"{tmp}/homes", "--homes-unmoved", f"{tmp}/unmoved", local)
    models = [pathlib.Path(f"{tmp}/{name}").read_bytes() for name in ("homes", "unmoved")]
    check("one home model for two maps", models[0] != models[1] and min(map(len, models)) > 1000)
    run(*PROTOCOL, "-n", "4", "--homes-unmoved", f"{tmp}/alone", local)
    check("the home model depends on what else is written", pathlib.Path(f"{tmp}/alone").read_bytes() == models[1])
    wants("--homes are those under the map that --map writes", *PROTOCOL, "-n", "4", "--homes", f"{tmp}/homes", local, status=2)
    wants("the recording has no tokens to tell homes from", *PROTOCOL, "-n", "2", "--homes-unmoved", f"{tmp}/none", bare)

    wants("--map is what --compare learned from one folder", *PROTOCOL, "-n", "2,4", "--map", f"{tmp}/map", local, status=2)
    wants("meta.json: cannot be opened", *PROTOCOL, f"{tmp}/none")
    wants("8 experts cannot be dealt out evenly to 6 ranks", *PROTOCOL, "-n", "3", local)
    wants("with 492 to learn from, 20 are left, but a batch has 32", *PROTOCOL, "--fit", "492", local)
    with open(f"{local}/tokens.npy", "r+b") as f:
        f.truncate(200)
    wants("tokens.npy", *PROTOCOL, "-n", "2", local)
cli.end()
