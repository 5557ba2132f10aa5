#!/usr/bin/env python3
"""From end to end, on the CPU: a job that knows nothing of Railyard (DeepSpeed's engine and MoE layers, PyTorch's DataLoader
and DistributedSampler, 4 ranks over gloo on two nodes by NCCL_HOSTID) is run as it is, and with the adapter: watched,
recorded, and placed once homes can be told.

Its gates send tokens below 32 to the first node's experts and others to the second's, and each sample is mostly of one kind:
what should come of that is known. Usage: watched_job.py; RAILYARD_ENGINE names the engine.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile

import watch_help as help

RANKS, BATCH, SEQ, STEPS, SAMPLES = 4, 4, 32, 130, 4096


def job(out):
    """The job. Forked after the imports: four interpreters that import as much take long on a small machine."""
    import torch
    torch.set_num_threads(1)
    import deepspeed
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # an optional extension, whose compiling takes minutes
    deepspeed.utils.logger.setLevel("ERROR")
    children = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), NCCL_HOSTID="node%d" % (rank // 2))
                train(rank, out)
            except BaseException:
                import traceback
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            import atexit
            atexit._run_exitfuncs()  # a forked process would leave without them
            os._exit(0)
        children.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in children))


def train(rank, out):
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.moe.layer import MoE
    from torch import nn
    from torch.utils.data import DataLoader, Dataset, DistributedSampler

    class Text(Dataset):
        def __len__(self):
            return SAMPLES

        def __getitem__(self, i):
            g = torch.Generator().manual_seed(i)
            kind, share = i % 2, 0.9
            mine = torch.rand(SEQ, generator=g) < share
            tokens = torch.randint(0, 32, (SEQ,), generator=g) + 32 * (mine == bool(kind))
            return {"input_ids": tokens, "sample": i}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 16)
            self.moes = nn.ModuleList([MoE(16, nn.Linear(16, 16), num_experts=8, ep_size=RANKS, k=2, drop_tokens=False,
                                           use_rts=False,
                                           top2_2nd_expert_sampling=False) for _ in range(2)])
            with torch.no_grad():
                self.embed.weight.mul_(0.1)
                self.embed.weight[:, 0] = torch.where(torch.arange(64) < 32, 4.0, -4.0)
                for moe in self.moes:
                    moe.deepspeed_moe.gate.wg.weight[:, 0] = torch.where(torch.arange(8) < 4, 2.0, -2.0)

        def forward(self, input_ids):
            x, total = self.embed(input_ids), 0.0
            for moe in self.moes:
                y, l_aux, _ = moe(x)
                x, total = x + 0.01 * y, total + l_aux
            return x.square().mean(), total

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + os.environ["MASTER_PORT"], rank=rank, world_size=RANKS)
    torch.manual_seed(1)
    dataset = Text()
    sampler = DistributedSampler(dataset, num_replicas=RANKS, rank=rank, shuffle=True, seed=3)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler, drop_last=True)
    model = Model()
    engine = deepspeed.initialize(model=model, model_parameters=[p for p in model.parameters()], config={
        "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-4}}})[0]
    had, step = [], 0
    epoch = 0
    while step < STEPS:
        sampler.set_epoch(epoch)
        for batch in loader:
            loss, _ = engine(batch["input_ids"])
            engine.backward(loss)
            engine.step()
            had.append(batch["sample"].tolist())
            step += 1
            if step == STEPS:
                break
        epoch += 1
    with open("%s.%d" % (out, rank), "w") as f:
        json.dump(had, f)
    dist.barrier()
    dist.destroy_process_group()


def run(work, name, **settings):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1",
               PYTHONWARNINGS="ignore",
               RAILYARD_LOG="info", **settings)
    if settings:
        env["PYTHONPATH"] = help.ADAPTER + os.pathsep + os.environ.get("PYTHONPATH", "")
    out = os.path.join(work, name)
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "job", out], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=150)
    text = done.stdout.decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.startswith("railyard:")]
    print("--- %s\n%s" % (name, "\n".join(lines)))
    if done.returncode:
        raise SystemExit("%s ended with %d:\n%s" % (name, done.returncode, text))
    had = []
    for rank in range(RANKS):
        with open("%s.%d" % (out, rank)) as f:
            had.append(json.load(f))
    return had, lines


def at_home(had, first, last):
    """Share of samples on the node whose experts most of their tokens go to: the second one's for odd samples."""
    good = all_ = 0
    for rank in range(RANKS):
        for batch in had[rank][first:last]:
            for i in batch:
                good += (i % 2 == 1) == (rank // 2 == 1)
                all_ += 1
    return good / all_


def main():
    help.needs("torch", "numpy", "deepspeed")
    import numpy as np
    from railyard import library
    try:
        library.setting("RAILYARD_PLACEMENT")
    except library.Error as e:
        print("skipped: %s" % e)
        sys.exit(77)
    with tempfile.TemporaryDirectory() as work:
        plain, lines = run(work, "plain")
        assert not lines, lines
        routing = os.path.join(work, "routing")
        placed, lines = run(work, "placed", RAILYARD_PLACEMENT="batch", RAILYARD_ROUTING=routing)
        for step in range(STEPS):
            assert sorted(sum((plain[r][step] for r in range(RANKS)), [])) == sorted(sum((placed[r][step] for r in range(RANKS)),
                                                                                         [])), step
        last = STEPS - 50
        print("samples at home in the last 50 steps: %.2f plain, %.2f placed" %
              (at_home(plain, last, STEPS), at_home(placed, last, STEPS)))
        assert any("samples are placed" in line for line in lines)
        assert at_home(placed, last, STEPS) > at_home(plain, last, STEPS) + 0.2
        counts = np.load(os.path.join(routing, "counts.npy")).astype(int)
        tokens = np.load(os.path.join(routing, "tokens.npy"))
        assert counts.shape[1:] == (2, 8) and tokens.shape == (len(counts),
                                                               SEQ) and len(counts) >= 0.7 * RANKS * BATCH * STEPS, counts.shape
        for c, t in zip(counts, tokens):
            low = int((t < 32).sum())
            assert c[0].sum() == c[1].sum() == 2 * SEQ and c[0][:4].sum() == 2 * low, (c, low)
        print("%d samples recorded, each as its tokens say" % len(counts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        job(sys.argv[2])
    main()
    print("watched_job: as it must be")
