#!/usr/bin/env python3
"""LocMoE's modules against plain loops, and their gradients. usage: locmoe_test.py

The interpreter is RY_TEST_PYTHON's (else python3's); without PyTorch the test is skipped."""

import math
import os
import random
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PYTHON_DIR = os.path.join(HERE, "..", "..", "plugin", "python")


def close(a, b, tol=1e-9):
    assert abs(a - b) <= tol * max(1, abs(b)), f"{a!r} is not {b!r}"


def softmax(row):
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


def router(torch, rng):
    from railyard.locmoe import GrapRouter, affinity, grap_weight

    for hidden, experts, top_k in ((12, 3, 1), (16, 4, 2), (10, 3, 3), (7, 7, 1), (64, 8, 2)):
        x = torch.tensor([[rng.gauss(0, 1) for _ in range(hidden)] for _ in range(23)], dtype=torch.float64)
        r = GrapRouter(hidden, experts, top_k, scale=3.0)
        assert not list(r.parameters()), "the gates are fixed"
        out = r(x)
        w = grap_weight(experts, hidden, torch.float64)
        for j in range(hidden):  # as the paper writes it
            for i in range(experts):
                mine = i * hidden / experts <= j < (i + 1) * hidden / experts
                close(float(w[i, j]), experts / hidden if mine else 0)
        for t in range(len(x)):
            logits = [sum(float(x[t, j]) for j in range(hidden) if i * hidden / experts <= j < (i + 1) * hidden / experts) * experts / hidden
                      for i in range(experts)]
            want = softmax([3.0 * v for v in logits])
            for i in range(experts):
                close(float(out.probs[t, i]), want[i], 1e-6)
            order = sorted(range(experts), key=lambda i: -want[i])[:top_k]
            assert out.expert[t].tolist() == order
            for k in range(top_k):
                close(float(out.weight[t, k]), want[order[k]], 1e-6)
        assert bool(out.kept.all())
        a = affinity(x, w)
        gram = affinity(w, w)
        assert float((gram - torch.eye(experts, dtype=torch.float64)).abs().max()) < 1e-12, "gates are orthogonal"
        norm = math.sqrt(sum(float(v) ** 2 for v in x[0]))
        close(float(a[0, 0]), float((x[0] * w[0]).sum()) / norm / math.sqrt(float((w[0] ** 2).sum())))
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: GrapRouter(12, 3, 2).double()(v).weight, (x,))


def capacity(torch, rng):
    from railyard.locmoe import GrapRouter, affinity, capacity_bound, within_capacity

    # the published example, and that nothing beyond room for all is asked
    close(capacity_bound(0.03, 4096, 1000), 1 / math.erfc(math.sqrt(4096 * 0.0009 / (2 - 0.0009))), 1e-12)
    close(capacity_bound(0.0, 4096, 16), 1)
    close(capacity_bound(0.9, 4096, 16), 16)
    assert capacity_bound(0.03, 4096, 1000) >= math.exp(4096 * 0.0009 / (2 - 0.0009)), "LocMoE+'s form is the weaker one"
    for _ in range(30):
        tokens, experts, k, room = rng.randrange(1, 40), rng.randrange(2, 9), rng.randrange(1, 3), rng.randrange(1, 12)
        expert = torch.tensor([rng.sample(range(experts), k) for _ in range(tokens)])
        kept, seen = within_capacity(expert, experts, room), [0] * experts
        for c in range(k):
            for t in range(tokens):
                e = int(expert[t, c])
                assert bool(kept[t, c]) == (seen[e] < room), (t, c)
                seen[e] += 1
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    r = GrapRouter(64, 8, 1, capacity_factor=1.0)
    out = r(x)
    assert r.capacity(512) == 64
    got = torch.bincount(out.expert[out.kept], minlength=8)
    asked = torch.bincount(out.expert.reshape(-1), minlength=8)
    assert got.tolist() == [min(64, int(v)) for v in asked]
    first = GrapRouter(64, 8, 1, capacity_factor="first")
    first(x)
    learned = float(first.capacity_factor)
    delta = float(affinity(x, first.weight).max())
    close(learned, capacity_bound(delta, 64, 8), 1e-6)
    first(x * 0 + 1)  # another batch, of which the bound would be another: the first one's is kept
    close(float(first.capacity_factor), learned)
    again = GrapRouter(64, 8, 1, capacity_factor="first")
    again.load_state_dict(first.state_dict())
    close(float(again.capacity_factor), learned)


def losses(torch, rng):
    from railyard.locmoe import balance_loss, locality_loss

    for _ in range(20):
        tokens, nodes, per_node = rng.randrange(1, 30), rng.randrange(1, 5), rng.randrange(1, 4)
        experts, spread, mu = nodes * per_node, rng.uniform(0.001, 0.2), rng.uniform(0.01, 2)
        where = [e // per_node for e in range(experts)]
        rng.shuffle(where)
        rows = [softmax([rng.gauss(0, 2) for _ in range(experts)]) for _ in range(tokens)]
        probs = torch.tensor(rows, dtype=torch.float64)
        home = rng.randrange(nodes)
        mean = [sum(r[e] for r in rows) / tokens for e in range(experts)]
        here = [e for e in range(experts) if where[e] == home]
        goal = [(1 - spread) * (e in here) / len(here) + spread / experts for e in range(experts)]
        want = mu * sum(p * math.log(p / q) for p, q in zip(mean, goal))
        close(float(locality_loss(probs, where, home, mu, spread)), want)
        by_node = [[sum(v[e] for e in range(experts) if where[e] == n) for n in range(nodes)] for v in (mean, goal)]
        close(float(locality_loss(probs, torch.tensor(where), home, mu, spread, per="node")),
              mu * sum(p * math.log(p / q) for p, q in zip(*by_node)))
        mask = [rng.random() < 0.6 for _ in range(tokens)]
        if any(mask):
            close(float(locality_loss(probs, where, home, mu, spread, mask=torch.tensor(mask))),
                  float(locality_loss(probs[torch.tensor(mask)], where, home, mu, spread)))
        choice = torch.tensor([[max(range(experts), key=r.__getitem__)] for r in rows])
        share = [sum(int(c) == e for c in choice.reshape(-1)) / tokens for e in range(experts)]
        close(float(balance_loss(probs, choice, 0.3)), 0.3 * experts * sum(f * p for f, p in zip(share, mean)))
    even = torch.full((8, 4), 0.25, dtype=torch.float64)
    close(float(balance_loss(even, torch.arange(8).reshape(-1, 1) % 4)), 0.01)  # its least value
    # least where it is local and even, more the more leaves
    stay = [float(locality_loss(torch.tensor([[0.5 - a, 0.5 - a, a, a]], dtype=torch.float64), [0, 0, 1, 1], 0)) for a in (0.0025, 0.1, 0.25, 0.45)]
    assert stay == sorted(stay) and abs(stay[0]) < 1e-9, stay
    assert float(locality_loss(torch.tensor([[1.0, 0.0]]), [0, 1], 1)) > 0, "a probability of zero is no NaN"
    for per in ("expert", "node"):
        logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v: locality_loss(torch.softmax(v, -1), [0, 1, 0, 1], 1, 0.7, per=per), (logits,))
    assert torch.autograd.gradcheck(lambda v: balance_loss(torch.softmax(v, -1), torch.tensor([[0], [1], [1], [3], [2], [0]])), (logits,))
    for bad in (lambda: locality_loss(even, [0, 0, 0], 0), lambda: locality_loss(even, [0, 0, 1, 1], 2), lambda: locality_loss(even, [0, 0, 1, 1], 0, per="rank")):
        try:
            bad()
        except ValueError:
            continue
        raise AssertionError("taken as it is")


def trains(torch, rng):
    """Down the loss's gradient, tokens of a rank come to the experts of its node, whatever they liked first."""
    from railyard.locmoe import GrapRouter, balance_loss, locality_loss

    torch.manual_seed(rng.randrange(1 << 30))
    x, dense, r = torch.randn(256, 32), torch.nn.Linear(32, 32), GrapRouter(32, 8, scale=8.0)
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.01)
    where, before, after = [e // 4 for e in range(8)], None, None
    for _ in range(150):
        out = r(dense(x))
        after = float((out.expert >= 4).float().mean())
        before = after if before is None else before
        loss = locality_loss(out.probs, where, 1, mu=1.0) + balance_loss(out.probs, out.expert)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.9 and after > 0.95, f"{before:.2f} of the tokens stayed on their node before, {after:.2f} after"
    print(f"tokens that stay on their node: {before:.2f} before, {after:.2f} after 150 steps")


def main():
    python = os.environ.get("RY_TEST_PYTHON", sys.executable)
    if os.environ.get("RY_LOCMOE_INNER") != "1":
        if subprocess.run([python, "-c", "import torch"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            print(f"SKIPPED: {python} has no PyTorch; set RY_TEST_PYTHON to one that has")
            return 77
        return subprocess.run([python, os.path.abspath(__file__)], env={**os.environ, "RY_LOCMOE_INNER": "1"}).returncode
    import torch

    sys.path.insert(0, PYTHON_DIR)
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    seed = int(os.environ.get("RY_TEST_SEED", random.randrange(1 << 30)))
    print(f"RY_TEST_SEED={seed}")
    for case in (router, capacity, losses, trains):
        torch.manual_seed(seed)
        case(torch, random.Random(seed))
        print(f"{case.__name__}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
