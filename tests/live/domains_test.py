#!/usr/bin/env python3
"""Text of several domains as jobs get it: tokens spell the text, windows cover it once, ranks share an epoch's samples and
nothing else."""
import os
import sys
import tempfile

import watch_help as help

help.needs("torch", "numpy")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "gpu"))
import domains
import numpy as np

r = help.seeded()
texts = domains.find(200000)
print("domains: %s" % ", ".join(sorted(texts)))
if len(texts) < 2:
    print("skipped: this machine has text of fewer than two domains")
    sys.exit(77)
pieces = domains.build(texts, 1024)
numbers = {p: 256 + i for i, p in enumerate(pieces)}
assert len(numbers) == len(pieces) == 768
with tempfile.TemporaryDirectory() as folder:
    domains.write(folder, 200000, 1024)
    for name, text in texts.items():
        tokens = np.load(os.path.join(folder, name + ".npy"))
        spelled = b"".join(bytes([t]) if t < 256 else pieces[t - 256].encode() for t in tokens.tolist())
        assert spelled == text.encode(), name
        assert len(tokens) < 0.9 * len(spelled), "%s: tokens as many as bytes" % name
    world, batch, seq = r.randint(2, 4), r.randint(1, 4), r.choice([64, 100])
    drawn = []
    for rank in range(world):
        dataset, batches = domains.batches(folder, seq, batch, rank, world, 7)
        steps = len(dataset) // world // batch
        mine = [next(batches) for _ in range(steps)]
        again = next(batches)["sample"].tolist()
        drawn.append([b["sample"].tolist() for b in mine])
        for b in mine[:3]:
            assert b["tokens"].shape == b["labels"].shape == (batch, seq) and (b["tokens"][:, 1:] == b["labels"][:, :-1]).all()
            for i, s in enumerate(b["sample"].tolist()):
                d, at = dataset.at[s]
                assert np.array_equal(b["tokens"][i].numpy(),
                                      np.load(os.path.join(folder, dataset.names[d] + ".npy"))[at:at + seq])
        assert again != drawn[rank][0], "a second epoch in the first one's order"
    flat = [s for rank in drawn for b in rank for s in b]
    assert len(set(flat)) == len(flat) and len(flat) > 0.9 * len(dataset), "samples twice, or left out"
    held = domains.Windows(folder, seq, held_out=True)
    assert len(held) and held.vocabulary == 1024 == dataset.vocabulary
print("domains: as it must be")
