#!/usr/bin/env python3
"""Placed data loaders in real PyTorch jobs of four processes (gloo, TCPStore): samples end at the ranks where their experts
are, and nothing else changes.

usage: torch_test.py RAILYARD_ENGINE [CASE ...]

Samples have a domain, which their tokens tell; domains' tokens go to experts of their own. Observations are told to the
leader directly, hellos are said by the test: the data loaders, the board, the leader and the library are the real ones. The
interpreter is RY_TEST_PYTHON's (else python3's); without PyTorch the test is skipped.
"""

import atexit
import collections
import faulthandler
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
PYTHON_DIR = os.path.join(HERE, "..", "..", "plugin", "python")
WORLD, MBS, TOKENS, LISTS = 4, 2, 32, 120
N = WORLD * MBS
LIMIT = float(os.environ.get("RY_TEST_LIMIT", "200"))  # seconds for one job


# ---- a rank ----


class Samples:
    """Sample k belongs to domain(k), and has that domain's tokens."""

    def __init__(self, n, fails=()):
        self.n, self.fails = n, set(fails)

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        import torch

        if k in self.fails:
            raise ValueError(f"sample {k} cannot be read")
        r = random.Random(k)
        return {
            "tokens": torch.tensor([100 * domain(k) + r.randrange(50) for _ in range(TOKENS)], dtype=torch.int64),
            "number": torch.tensor(k),
        }


def domain(k):
    return random.Random(1000003 * k + 1).randrange(2)


def teach(live):
    """As many observations as the model wants to be sure: domain d's tokens go to the experts of place d."""
    import numpy as np

    data = Samples(1 << 20)
    for k in range(500000, 501200):
        counts = np.zeros((2, 4), dtype=np.uint32)
        d = domain(k)
        counts[:, 2 * d : 2 * d + 2] = TOKENS
        live.observe(data[k]["tokens"].numpy().astype(np.uint32), counts, None, k % 2)


def loader(case, rank, workers, consumed):
    import torch
    from torch.utils.data import DataLoader

    more = {"num_workers": workers, **({"persistent_workers": True} if workers else {})}
    if case.startswith("distributed"):
        data = Samples(LISTS * 2 // 3 * N + 3)  # the last list is short, and padded
        sampler = torch.utils.data.distributed.DistributedSampler(data, num_replicas=WORLD, rank=rank, shuffle=True, seed=5)
        return DataLoader(data, batch_size=MBS, sampler=sampler, **more), sampler
    sys.path.insert(0, HERE)
    import samplers

    data = Samples(LISTS * N + 5)
    if case.startswith("shuffled"):
        sampler = samplers.Shuffled(data, len(data), consumed, MBS, rank, WORLD, case.endswith("sharded"))
    else:
        sampler = samplers.Sequential(len(data), consumed, MBS, rank, WORLD)
    return DataLoader(data, batch_sampler=sampler, **more), sampler


def rank_main(case, workers, consumed, trouble, out):
    rank = int(os.environ["RANK"])
    faulthandler.dump_traceback_later(0.8 * LIMIT)  # where it hangs, if it does
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader

    dist.init_process_group("gloo")
    torch.manual_seed(7 + rank)
    if os.environ.get("RAILYARD_PLACEMENT"):
        from railyard import job

        if trouble == "adapter raises" and rank == 2:
            from railyard import batch

            original, calls = batch.Iteration._look_ahead, []

            def raises(self):
                calls.append(0)
                if len(calls) > 8:
                    raise RuntimeError("made to fail")
                original(self)

            batch.Iteration._look_ahead = raises
        if trouble != "no adapter" or rank != 1:
            # Ranks 0 and 2 are on one node, 1 and 3 on the other; two expert-parallel groups that span them alike.
            job.current().describe(
                dp=rank,
                dp_size=WORLD,
                ep_ranks=[rank // 2 * 2, rank // 2 * 2 + 1],
                experts=[2 * (rank % 2), 2 * (rank % 2) + 1],
                layers=2,
                n_experts=4,
                topk=2,
                framework="a test",
            )
    made, sampler = loader(case, rank, workers, consumed)
    assert (made.batch_sampler is sampler) or made.sampler is sampler
    drawn, at, taught = [], time.time(), rank != 0 or not os.environ.get("RAILYARD_PLACEMENT")
    count = torch.zeros(1)
    for epoch in range(2 if case.startswith("distributed") else 1):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        for k, batch in enumerate(made):
            drawn.append([epoch, k, batch["number"].tolist(), [domain(i) for i in batch["number"].tolist()]])
            assert (batch["tokens"] // 100 == torch.tensor(drawn[-1][3])[:, None]).all()
            if trouble == "killed" and rank == 3 and k == 60:
                os.kill(os.getpid(), signal.SIGKILL)
            if not taught and job.current().leader is not None and job.current().leader.live is not None:
                teach(job.current().leader.live)
                taught = True
            dist.all_reduce(count)  # a training step: ranks go on together
            time.sleep(0.004)
    with open(f"{out}.{rank}", "w") as f:
        json.dump(
            {
                "drawn": drawn,
                "random": torch.rand(3).tolist(),
                "len": len(made),
                "consumed": getattr(sampler, "consumed_samples", 0),
                "seconds": time.time() - at,
            },
            f,
        )
    with torch.no_grad():  # an evaluation is left alone
        data = Samples(64)
        plain = torch.utils.data.distributed.DistributedSampler(data, num_replicas=WORLD, rank=rank, shuffle=True)
        assert [b["number"].item() for b in DataLoader(data, sampler=plain)] == list(plain)
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


# ---- the test ----


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def job(case, workers=0, consumed=0, trouble="", placed=True, record="", patience="5"):
    """Runs four ranks: what each of them wrote, and what all said. Forked off this process, where PyTorch is imported already; the
    first case has interpreters of its own, into which the adapter comes as into a user's."""
    with tempfile.TemporaryDirectory(prefix="ry-live-") as folder:
        out, port, ranks = os.path.join(folder, "rank"), free_port(), []
        for r in range(WORLD):
            env = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(r),
                "WORLD_SIZE": str(WORLD),
                "NCCL_HOSTID": f"node{r % 2}",
                "OMP_NUM_THREADS": "1",
            }
            if placed and not (trouble == "no adapter" and r == 1):
                env.update(RAILYARD_PLACEMENT="batch", RAILYARD_LOG="debug", RAILYARD_PATIENCE=patience, RAILYARD_ENGINE=ENGINE)
                env["PYTHONPATH"] = PYTHON_DIR
                if record:
                    env["RAILYARD_ROUTING"] = record
            ranks.append(start(env, [case, str(workers), str(consumed), trouble, out], f"{out}.{r}.said", fresh=bool(record)))
        codes, end = [None] * WORLD, time.time() + LIMIT
        while None in codes and time.time() < end:
            for r, pid in enumerate(ranks):
                if codes[r] is None:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    codes[r] = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.02)
        for r, pid in enumerate(ranks):
            if codes[r] is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        text = ""
        for r in range(WORLD):
            with open(f"{out}.{r}.said", errors="replace") as f:
                text += f.read()
        if None in codes:
            fail(case, "it hangs:\n" + text)
        if trouble != "killed" and any(codes):
            fail(case, f"ranks ended with {codes}:\n{text}")
        results = []
        for r in range(WORLD):
            try:
                with open(f"{out}.{r}") as f:
                    results.append(json.load(f))
            except FileNotFoundError:
                results.append(None)
        return results, text, codes


def start(env, args, said, fresh):
    pid = os.fork()
    if pid:
        return pid
    try:
        atexit._clear()  # what is the parent's to tidy up
        for name in [k for k in os.environ if k.startswith("RAILYARD_") or k == "PYTHONPATH"]:
            del os.environ[name]
        os.environ.update(env)
        fd = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        if fresh:
            os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), "rank", *args])
        if "RAILYARD_PLACEMENT" in env:
            sys.path.insert(0, PYTHON_DIR)
            from railyard import hook

            hook.start()
        rank_main(args[0], int(args[1]), int(args[2]), *args[3:])
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def fail(case, text):
    sys.exit(f"torch_test: {case}: {text}")


def at_home(results, first, last):
    """Share of samples of these lists that are at the rank of their domain's place."""
    seen = [
        rank % 2 == d for rank, r in enumerate(results) for _, k, _, domains in r["drawn"] if first <= k < last for d in domains
    ]
    return sum(seen) / len(seen)


def same_lists(case, plain, placed, text):
    for k in range(max(len(r["drawn"]) for r in plain)):
        a, b = (
            collections.Counter(x for r in results for x in (r["drawn"][k][2] if k < len(r["drawn"]) else []))
            for results in (plain, placed)
        )
        if a != b:
            fail(case, f"list {k} has {sorted(b.elements())} instead of {sorted(a.elements())}:\n{text}")
    for r, (a, b) in enumerate(zip(plain, placed)):
        for key in ("random", "len", "consumed"):
            if a[key] != b[key]:
                fail(case, f"rank {r}'s {key} is {b[key]} instead of {a[key]}:\n{text}")


def moved(case, results, text, at_least, first):
    share = at_home(results, first, 10**9)
    print(f"  {case}: {100 * share:.0f} % of samples at home from list {first} on")
    if share < at_least:
        fail(case, f"only {share:.2f} of samples are at home:\n{text}")


def main():
    cases = sys.argv[2:] or ["sequential", "workers", "shuffled", "sharded", "distributed", "resumed", "trouble"]
    for case in cases:
        began = time.time()
        if case == "trouble":
            for trouble in ("adapter raises", "no adapter", "killed"):
                plain = job("sequential", placed=False)[0]
                results, text, codes = job("sequential", trouble=trouble)
                if trouble == "killed":
                    if codes[3] != -signal.SIGKILL or 0 in codes[:3]:
                        fail(trouble, f"ranks ended with {codes}:\n{text}")
                    continue
                same_lists(trouble, plain, results, text)
                if trouble == "adapter raises":
                    if text.count("made to fail") < 1 or "; placement is off" not in text or not 0.65 < at_home(results, 40, 64):
                        fail(trouble, f"not as it should be ({at_home(results, 40, 60)}):\n{text}")
                    if at_home(results, 90, 10**9) > 0.65:
                        fail(trouble, f"placement goes on:\n{text}")
                elif "rank 1 said no hello" not in text or at_home(results, 0, 10**9) > 0.6:
                    fail(trouble, f"not as it should be:\n{text}")
        elif case == "resumed":
            consumed = 20 * N
            plain, placed = job("sequential", consumed=consumed, placed=False)[0], job("sequential", consumed=consumed)
            same_lists(case, plain, placed[0], placed[1])
            whole = job("sequential", placed=False)[0]
            if [d[2] for d in whole[0]["drawn"][20:]] != [d[2] for d in plain[0]["drawn"]]:
                fail(case, "the test's sampler does not resume")
            moved(case, placed[0], placed[1], 0.75, 60)
        else:
            workers = 2 if case in ("workers", "distributed") else 0
            kind = {"workers": "sequential", "sharded": "shuffled-sharded"}.get(case, case)
            with tempfile.TemporaryDirectory() as record:
                plain = job(kind, workers, placed=False)[0]
                placed, text, _ = job(kind, workers, record=record if case == "sequential" else "")
                same_lists(case, plain, placed, text)
                moved(case, placed, text, 0.75, 60)
                if case == "sequential":
                    recoverable(case, plain, placed, os.path.join(record, "placed.jsonl"))
        print(f"  {case}: {time.time() - began:.1f} s", flush=True)


def recoverable(case, plain, placed, path):
    """From placed.jsonl and what each rank got: what it would have got."""
    orders = {}
    with open(path) as f:
        for line in f:
            w = json.loads(line)
            for i in range(w["lists"]):
                orders[w["first"] + i] = w["order"][i] if w["order"] else None
    back = [[None] * len(plain[0]["drawn"]) for _ in range(WORLD)]
    for k in range(len(plain[0]["drawn"])):
        got = [x for r in placed for x in r["drawn"][k][2]]
        dealt = [None] * N
        for slot, sample in enumerate(orders.get(k) or range(N)):
            dealt[sample] = got[slot]
        for r in range(WORLD):
            back[r][k] = dealt[r * MBS : (r + 1) * MBS]
    if any(back[r] != [d[2] for d in plain[r]["drawn"]] for r in range(WORLD)) or not any(orders.values()):
        fail(case, "the order as dealt cannot be told from placed.jsonl")


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank_main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6])
        sys.exit(0)
    wanted = os.environ.pop("RY_TEST_PYTHON", None)
    if wanted and os.path.exists(wanted):
        os.execv(wanted, [wanted, os.path.abspath(__file__), *sys.argv[1:]])
    try:
        import numpy  # noqa: F401
        import torch.distributed  # noqa: F401
        import torch.utils.data  # noqa: F401
    except ImportError as e:
        print(f"SKIP: {sys.executable} has no PyTorch ({e}; RY_TEST_PYTHON names one that has)")
        sys.exit(77)
    ENGINE = os.path.abspath(sys.argv[1])
    main()
