#!/usr/bin/env python3
"""Train a small language model whose mixture of experts is DeepSpeed's MoE layer (PyPI, unmodified), expert parallel over all ranks.

Started as one rank of many with torchrun's environment (tests/gpu/cluster; tests/gpu/frameworks drives it with and without Railyard).
Needs deepspeed and what it imports (tests/gpu/wheels); none of its compiled operations is used. Around the layer it is train_moe.py's
decoder: attention, norms and embedding are data parallel.

The layer exchanges equal splits: every expert has as many places for each rank's tokens, and those that stay free are rows of
zeros. No second exchange tells how wide a row is, so Railyard has to be told: RAILYARD_ROW_BYTES = 2 x hidden.
"""
import moe_job  # before torch: what must be set first

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import deepspeed
from deepspeed.moe.layer import MoE

from train_moe import Attention, reduce_gradients, seeded


class Expert(nn.Module):
    """Weights in fp32, computed in the dtype of what comes in."""

    def __init__(self, hidden, ffn):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(ffn, hidden)), nn.Parameter(torch.empty(hidden, ffn))

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.up.to(x.dtype))), self.down.to(x.dtype))


class Layer(nn.Module):
    def __init__(self, a, rank, world, key):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(a.hidden), nn.LayerNorm(a.hidden)
        self.attention = Attention(a.hidden, max(1, a.hidden // 64), key)
        self.moe = MoE(a.hidden, Expert(a.hidden, a.ffn), num_experts=a.experts, ep_size=world, k=a.top_k, capacity_factor=a.capacity,
                       eval_capacity_factor=a.capacity, drop_tokens=not a.no_drop, use_rts=False, top2_2nd_expert_sampling=False)
        if not a.engine:  # which does it itself
            self.moe.set_deepspeed_parallelism()
        # DeepSpeed copies one expert; each shall be its own, whichever rank holds it, and the gate everybody's.
        inner = self.moe.deepspeed_moe
        with torch.no_grad():
            inner.gate.wg.weight.copy_(seeded((a.experts, a.hidden), a.hidden ** -0.5, key, "router"))
            for i, expert in enumerate(inner.experts.deepspeed_experts):
                e = rank * (a.experts // world) + i
                expert.up.copy_(seeded((a.ffn, a.hidden), a.hidden ** -0.5, key, "up", e))
                expert.down.copy_(seeded((a.hidden, a.ffn), a.ffn ** -0.5 / 2, key, "down", e))
        self.experts = list(inner.experts.parameters())

    def forward(self, x):
        x = x + self.attention(self.norm1(x).to(torch.bfloat16)).float()
        y, balance, _ = self.moe(self.norm2(x).to(torch.bfloat16))
        return x + y.float(), balance


class Model(nn.Module):
    def __init__(self, a, rank, world):
        super().__init__()
        self.embed = nn.Parameter(seeded((moe_job.vocabulary(a), a.hidden), 0.02, a.seed, "embed"))
        self.place = nn.Parameter(seeded((a.seq, a.hidden), 0.02, a.seed, "place"))
        self.layers = nn.ModuleList([Layer(a, rank, world, (a.seed, i)) for i in range(a.layers)])
        self.norm = nn.LayerNorm(a.hidden)

    def forward(self, tokens):
        x, total = F.embedding(tokens, self.embed) + self.place, 0.0
        for layer in self.layers:
            x, balance = layer(x)
            total = total + balance
        return F.linear(self.norm(x).to(torch.bfloat16), self.embed.to(torch.bfloat16)).float(), total


def main():
    p = moe_job.options(__doc__.splitlines()[0], top_k=2)
    p.add_argument("--capacity", type=float, default=2.0, help="DeepSpeed's capacity factor: 2 leaves about half of the places free")
    p.add_argument("--no-drop", action="store_true", help="as much capacity as the fullest expert needs, instead")
    p.add_argument("--engine", action="store_true", help="let DeepSpeed's engine run the model, reduce gradients and step")
    a = p.parse_args()
    rank, world, device = moe_job.begin(a)
    dist.init_process_group("nccl", device_id=device)
    deepspeed.init_distributed(dist_backend="nccl")
    model = Model(a, rank, world).to(device)
    experts = [e for layer in model.layers for e in layer.experts]
    ids = {id(e) for e in experts}
    shared = [q for q in model.parameters() if id(q) not in ids]
    moe_job.load(a, rank, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95))

    if a.engine:
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": a.batch, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 0}})[0]

    def step_of_engine(tokens, labels, place):
        logits, balance = engine(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1))
        engine.backward(loss + 0.01 * balance)
        engine.step()
        return loss

    def step(tokens, labels, place):
        logits, balance = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.01 * balance).backward()
        for e in experts:
            if e.grad is None:  # no token came
                e.grad = torch.zeros_like(e)
        reduce_gradients(shared, experts, world)
        optimizer.step()
        return loss

    if rank == 0:
        print("deepspeed_moe: DeepSpeed %s, %d experts over %d ranks" % (deepspeed.__version__, a.experts, world), flush=True)
    moe_job.train("deepspeed_moe", a, rank, world, device, step_of_engine if a.engine else step, model.parameters(), optimizer.param_groups)
    moe_job.save(a, rank, model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
