#!/usr/bin/env python3
"""Experts moved at start: the agreement (no torch needed), and real Megatron-core models, optimizers, schedules and checkpoints (megatron_cpu.py).

TEGroupedMLP and GroupedMLP need a GPU to be made: modules of ours have their parameters' names and layouts, and compute what they compute in plain torch.

usage: experts_test.py CASE [librailyard-engine.so]
"""
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
import types

HERE = os.path.dirname(os.path.abspath(__file__))
CASE = sys.argv[1] if len(sys.argv) > 1 else "agreement"
if len(sys.argv) > 2:
    os.environ["RAILYARD_ENGINE"] = sys.argv[2]
WANTED = os.environ.get("RY_TEST_PYTHON")
if __name__ == "__main__" and CASE != "agreement" and WANTED and os.path.abspath(WANTED) != sys.executable and "RY_TEST_AGAIN" not in os.environ:
    os.environ["RY_TEST_AGAIN"] = "1"
    os.execv(WANTED, [WANTED] + sys.argv)
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("RAILYARD_LOG", "info")
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
sys.path.insert(0, os.path.join(HERE, "..", "..", "plugin", "python"))

from railyard import experts  # noqa: E402
from railyard.board import MemoryBoard  # noqa: E402
from megatron_cpu import Place, Rank, check, on_cpu, patched  # noqa: E402

SEED = int(os.environ.get("RY_TEST_SEED", random.SystemRandom().randrange(1 << 30)))
FOLDER = ""  # of the case


# ---- the agreement, without torch

def an_offer(layers=(0, 1), group=(0, 1), tensor=0, signature="s", **more):
    return {"no": "", "model": [2, 8, 2], "want": "w", "have": "h", "moves": True,
            "layers": {str(i): [list(group), tensor, signature] for i in layers}, **more}


def case_agreement():
    four = {r: an_offer(group=(0, 1) if r < 2 else (2, 3)) for r in range(4)}
    check(experts.judge(four, 4) == {"move": True, "why": ""}, experts.judge(four, 4))
    stages = {r: an_offer(layers=(r // 2,), group=(r // 2 * 2, r // 2 * 2 + 1)) for r in range(4)}
    check(experts.judge(stages, 4)["move"], "pipeline stages")
    none = {r: an_offer(group=(0, 1) if r < 2 else (2, 3), moves=False, layers=()) for r in range(4)}
    check(experts.judge(none, 4) == {"move": False, "why": "", "there": True}, "nothing to move")
    for what, rank, bad in (
            ("rank 2 did not come", 2, None), ("rank 1: --use", 1, an_offer(no="--use-distributed-optimizer")),
            ("another expert map", 3, an_offer(group=(2, 3), want="x")), ("another order", 3, an_offer(group=(2, 3), have="x")),
            ("other numbers", 1, an_offer(model=[2, 8, 4])), ("not the same for all", 1, an_offer(group=(1, 0))),
            ("not the same for all", 2, an_offer(group=(2,))), ("tensor-parallel positions", 1, an_offer(tensor=1)),
            ("other tensors", 3, an_offer(group=(2, 3), signature="t")), ("not the same for all", 3, an_offer(layers=(0,), group=(2, 3)))):
        verdict = experts.judge({**four, rank: bad}, 4)
        check(not verdict["move"] and what in verdict["why"], f"{what}: {verdict}")
    verdict = experts.judge({r: an_offer(layers=(0,), group=(0, 1) if r < 2 else (2, 3)) for r in range(4)}, 4)
    check("no rank holds the 2. layer" in verdict["why"], verdict)

    def together(ranks, offers, patience=0.6, board=None, late=()):
        board, said = board or MemoryBoard(), {}

        def one(rank):
            if rank in late:
                time.sleep(2 * patience)
            said[rank] = experts.agree(board, rank, 4, 0, offers[rank], patience)
        threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
        began = time.monotonic()
        for t in threads:
            t.start()
        for t in threads:
            t.join(20)
        check(len(said) == len(ranks), "somebody hangs")
        check(all(verdict == said[ranks[0]] for verdict in said.values()), f"not all do the same: {said}")
        return said[ranks[0]], time.monotonic() - began

    verdict, took = together([0, 1, 2, 3], four)
    check(verdict["move"] and took < 0.5, f"{verdict} after {took:.2f} s")
    check("rank 1 did not come" in together([0, 2, 3], four)[0]["why"], "a rank that is not there")
    check("for rank 0 in vain" in together([1, 2, 3], four)[0]["why"], "no rank 0")
    check(not together([0, 1, 2, 3], four, late=(0,))[0]["move"], "rank 0 comes too late")
    check(not together([0, 1, 2, 3], four, late=(2,))[0]["move"], "rank 2 comes too late")

    class Broken(MemoryBoard):
        def put(self, key, value):
            if key == "experts/0/2":
                raise OSError("the board cannot be reached")
            super().put(key, value)
    board, said = Broken(), {}
    threads = [threading.Thread(target=lambda r=r: said.update({r: experts.agree(board, r, 4, 0, four[r], 0.5)})) for r in range(4)]
    [t.start() for t in threads], [t.join(20) for t in threads]
    check(len(said) == 4 and not any(v["move"] for v in said.values()), f"a board that one rank cannot write to: {said}")

    class Deaf(MemoryBoard):
        def wait(self, key, seconds):
            raise OSError("the board cannot be reached")

        claim = wait
    try:
        experts.agree(Deaf(), 1, 4, 0, four[1], 0.2)
        check(False, "a rank that said yes and hears nothing must not go on")
    except experts.Doubt as e:
        check("cannot learn" in str(e), e)

    pick = random.Random(SEED)
    for _ in range(50):
        layers, number = pick.randint(1, 4), pick.choice([2, 4, 8, 12])
        have, want = ([pick.sample(range(number), number) for _ in range(layers)] for _ in range(2))
        source = experts.sources(have, want)
        check([[now[s] for s in row] for now, row in zip(have, source)] == want, "sources")
        folder = tempfile.mkdtemp(dir=FOLDER)
        check(experts.write_note(folder, want, 2) and experts.read_note(folder) == (want, 2), "note")
        check(experts.write_note(folder, None, 2) and experts.read_note(folder) == (None, 0), "no note")
        check(os.listdir(folder) == [], "something is left")
    check(not experts.write_note(os.path.join(FOLDER, "nowhere"), want, 2), "a folder that is not there")
    with open(os.path.join(folder, experts.NOTE), "w", encoding="utf-8") as file:
        file.write('{"version": 1, "layers": 1, "experts": 2, "ranks": 1, "permutation": [[0, 0]]}')
    mover = experts.Mover("plan.json", None, 1)
    mover.loaded(folder)
    check(mover.due and mover.order is None and "not 1 permutations" in mover.trouble, mover.trouble)


def close(a, b, most):
    check(len(a) == len(b) and all(abs(x - y) <= most for x, y in zip(a, b)), f"{a}\n{b}")


def run_function(self: Rank):
    """The same logits before and after, to the last bits; everything where the map wants it; and back again, bit by bit."""
    for kind in (dict(), dict(bf16=True), dict(moe_layer_freq=[0, 1, 1])):
        model, optimizer = self.model(**kind)
        moe = [moe.layer_number for _, moe in self.layers(model)]
        self.train(model, optimizer, 2)
        before, weights = self.logits(model), self.everything(model, optimizer)
        want = self.some_order(layers=len(moe))
        mover = self.scenario(want)
        self.step(model, mover)
        after = self.logits(model)
        by_number = dict(zip(moe, want))
        order = [by_number.get(n + 1, list(range(self.EXPERTS))) for n in range(self.LAYERS)]
        self.equal(weights, self.everything(model, optimizer), order)
        check(mover.order == want, "the order is not remembered")
        most = (before - after).abs().max().item()
        check(most < (0.05 if kind.get("bf16") else 1e-5) and before.std() > 0.01, f"logits differ by {most}")
        self.say(f"{kind or 'fp32'}: logits differ by at most {most:.2e}, {mover.sent} bytes sent by rank 0")
        mover.read = lambda *_, n=len(moe): experts.identity(n, self.EXPERTS)
        self.step(model, mover)
        self.equal(weights, self.everything(model, optimizer))
        check(mover.order is None, "home again")


def run_training(self: Rank):
    """Moved amid training, with what Adam remembers: the same losses and the same weights in the end as without."""
    for kind in (dict(), dict(bf16=True)):
        model, optimizer = self.model(**kind)
        self.scenario(self.some_order(), path="")
        plain = self.train(model, optimizer, 9)
        end = self.everything(model, optimizer)
        model, optimizer = self.model(**kind)
        mover = self.scenario(self.some_order(), path="")
        moved = self.train(model, optimizer, 4)
        check(moved == plain[:4], "not deterministic")
        mover = self.scenario(self.some_order(1))
        moved += self.train(model, optimizer, 5, first=4)
        check(mover.order == self.some_order(1) and not mover.due and mover.sent > 0, "nothing was moved")
        close(plain, moved, 2e-2 if kind.get("bf16") else 2e-5)
        if self.parallel.get("pp", 1) == 1 or plain:
            check(self.parallel.get("pp", 1) > 1 or plain[-1] < plain[0] - 0.1, f"nothing is learned: {plain}")
        if not kind.get("bf16"):
            self.equal(end, self.everything(model, optimizer), self.some_order(1), most=2e-5)
        if plain:
            self.say(f"{kind or 'fp32'}: losses {plain[0]:.4f} to {plain[-1]:.4f}, differ by at most {max(abs(a - b) for a, b in zip(plain, moved)):.1e}")


def run_refusals(self: Rank):
    """Where one rank cannot, or something is not known, nobody moves anything."""
    from megatron.core.optimizer import optimizer as megatron_optimizer
    from railyard import expert_tensors
    torch = self.torch
    model, optimizer = self.model()
    self.train(model, optimizer, 1) if self.scenario(path="", want=None) else None
    weights = self.everything(model, optimizer)
    order = self.some_order()

    def stays(what, expected, want=order, config=None, read=None, undo=None):
        lines = []
        real, experts.say.warn = experts.say.warn, lambda text: lines.append(text)
        saved = {key: getattr(self.layers(model)[0][1].config, key) for key in (config or {})}
        try:
            for key, value in (config or {}).items():
                setattr(self.layers(model)[0][1].config, key, value)
            mover = self.scenario(want, read=read)
            self.step(model, mover)
        finally:
            experts.say.warn = real
            for key, value in saved.items():
                setattr(self.layers(model)[0][1].config, key, value)
            if undo:
                undo()
        self.equal(weights, self.everything(model, optimizer))
        check(mover.order is None and not mover.due, what)
        check(self.rank or (len(lines) == 1 and expected in lines[0]), f"{what}: {lines}")

    stays("fp8", "--fp8-format", config={"fp8": "e4m3"} if self.rank == self.world - 1 else None)
    stays("replay", "--moe-enable-routing-replay", config={"moe_enable_routing_replay": True})
    stays("groups", "--moe-router-num-groups", config={"moe_router_num_groups": 4, "moe_router_group_topk": 2},
          want=[[0, 2, 1, 3, 4, 5, 6, 7]] * self.LAYERS)
    stays("another map on one rank", "another expert map", want=self.some_order(self.rank == 1))

    def unreadable(*_):
        raise OSError("plan.json: no such file")
    stays("a map that is not there", "no such file", read=unreadable if self.rank == 1 else None)
    stays("no permutation", "not 3 permutations", want=[[0] * 8] * 3)
    moe = self.layers(model)[0][1]
    moe.router.register_parameter("odd", torch.nn.Parameter(torch.zeros(self.EXPERTS)))
    stays("something unknown in the router", "the router has odd", undo=lambda: moe.router.__delattr__("odd"))
    moe.experts.linear = torch.nn.Linear(2, 2)
    stays("something unknown in the experts", "some of its own", undo=lambda: moe.experts.__delattr__("linear"))
    seen = list(expert_tensors.torch_optimizers)
    expert_tensors.torch_optimizers.clear()
    stays("an optimizer that was not seen", "no optimizer that Railyard has seen", undo=lambda: expert_tensors.torch_optimizers.update(seen))
    p = next(moe.experts.parameters())
    inner = next(o for o in seen if any(q is p for g in o.param_groups for q in g["params"]))
    keep = dict(inner.state[p])
    if self.rank == 1:
        inner.state[p]["factor"] = torch.zeros(3)
    stays("a factored state", "not of the parameter's shape", undo=lambda: inner.state[p].pop("factor", None))
    if self.rank == 1:
        inner.state[p]["step"] = torch.tensor(77.0)
    stays("another step on one rank", "not at the same step" if self.EXPERTS // self.parallel["ep"] > 1 else "other tensors",
          undo=lambda: inner.state[p].update(keep))
    zero, model.zero_grad_buffer = model.zero_grad_buffer, lambda: p.main_grad[0].fill_(1)
    stays("gradients", "in the midst of a step")
    model.zero_grad_buffer = zero
    # The same, but what changes is within the groups: not refused.
    config = moe.config
    config.moe_router_num_groups, config.moe_router_group_topk = 4, 2
    mover = self.scenario([[6, 7, 1, 0, 2, 3, 5, 4]] * self.LAYERS)
    self.step(model, mover)
    check(mover.order is not None, "whole groups may move")
    config.moe_router_num_groups = config.moe_router_group_topk = None
    # An optimizer of a kind that is not known.
    model, optimizer = self.model(seed=6)
    weights = self.everything(model, optimizer)

    class Unheard(megatron_optimizer.FP32Optimizer):
        pass
    others = [Unheard(one.optimizer, one.config, None) for one in optimizer.chained_optimizers]
    stays("an unknown wrapper", "Unheard keeps")
    check(others, "kept until here")


def run_sharded(self: Rank):
    """The distributed optimizer: moved while it is fresh, its copies made anew; refused once it remembers something; nothing to do, nothing refused."""
    order = self.some_order(3)
    model, optimizer = self.model(bf16=True, sharded=True)
    self.scenario(path="")
    plain = self.train(model, optimizer, 5)
    end = self.everything(model, optimizer)
    model, optimizer = self.model(bf16=True, sharded=True)
    mover = self.scenario(order)
    moved = self.train(model, optimizer, 5)
    check(mover.order == order and mover.sent > 0, "nothing was moved")
    close(plain, moved, 2e-2)
    self.equal(end, self.everything(model, optimizer), order, most=2e-2)  # copies that were not renewed would bring the old order back
    self.say(f"fresh: losses {plain[0]:.4f} to {plain[-1]:.4f}, differ by at most {max(abs(a - b) for a, b in zip(plain, moved)):.1e}")
    lines = []
    real, experts.say.warn = experts.say.warn, lambda text: lines.append(text)
    mover = self.scenario(self.some_order(4))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    self.step(model, mover)
    experts.say.warn = real
    check(all(self.torch.equal(before[n], p) for n, p in model.named_parameters()), "something was moved")
    check(self.rank or "--use-distributed-optimizer" in lines[0], lines)
    mover = self.scenario(order)
    mover.order = order
    self.step(model, mover)
    check(mover.order == order and not hasattr(mover, "sent"), "a job that is resumed in the right order")


def run_checkpoints(self: Rank):
    """Saved, the checkpoint has a note; loaded again, nothing is moved twice; without the note it is moved; another map moves the difference."""
    from megatron.core import dist_checkpointing
    dist = self.dist

    def save(model, optimizer, folder):
        if self.rank == 0:
            os.makedirs(folder)
        dist.barrier()
        state = model.module.sharded_state_dict()
        dist_checkpointing.save({"model": state, "optimizer": optimizer.sharded_state_dict(state)}, folder)
        dist.barrier()

    def load(model, optimizer, folder):
        state = model.module.sharded_state_dict()
        got = dist_checkpointing.load({"model": state, "optimizer": optimizer.sharded_state_dict(state, is_loading=True)}, folder)
        model.module.load_state_dict(got["model"])
        optimizer.load_state_dict(got["optimizer"])

    order, other, folder = self.some_order(5), self.some_order(6), os.path.join(FOLDER, "moved")
    os.environ["LOCAL_RANK"] = str(self.rank)
    plan = os.path.join(FOLDER, "plan.json")
    if self.rank == 0:
        with open(plan, "w", encoding="utf-8") as file:
            json.dump({"version": 1, "layers": self.LAYERS, "experts": self.EXPERTS, "ranks": self.parallel["ep"], "permutation": order, "more": 1}, file)
    dist.barrier()
    from railyard import library
    read = library.expert_map if os.environ.get("RAILYARD_ENGINE") else None  # the C reader where there is one
    model, optimizer = self.model()
    self.scenario(path="")
    self.train(model, optimizer, 2)
    own = os.path.join(FOLDER, "own")
    save(model, optimizer, own)
    check(not os.path.exists(os.path.join(own, experts.NOTE)), "a note without anything moved")
    weights = self.everything(model, optimizer)
    plain = self.train(model, optimizer, 4, first=2)

    model, optimizer = self.model(seed=9)
    mover = self.scenario(order, read=read, path=plan)
    load(model, optimizer, own)
    check(mover.order is None and mover.due, "its own order")
    moved = self.train(model, optimizer, 2, first=2)
    check(mover.order == order, "not moved after loading")
    save(model, optimizer, folder)
    moved += self.train(model, optimizer, 2, first=4)
    close(plain, moved, 2e-5)
    check(experts.read_note(folder) == (order, self.parallel["ep"]), "the note")

    model, optimizer = self.model(seed=10)
    mover = self.scenario(order, read=read, path=plan)
    load(model, optimizer, folder)
    check(mover.order == order and mover.due, "the note was not read")
    resumed = self.train(model, optimizer, 2, first=4)
    check(mover.order == order and not hasattr(mover, "sent"), "moved twice")
    close(plain[2:], resumed, 2e-5)

    model, optimizer = self.model(seed=11)
    mover = self.scenario(other)
    load(model, optimizer, folder)
    resumed = self.train(model, optimizer, 2, first=4)
    check(mover.order == other and mover.sent > 0, "another map")
    close(plain[2:], resumed, 2e-5)

    model, optimizer = self.model(seed=12)  # loaded without Railyard's knowing: a valid model, renumbered
    self.scenario(path="")
    load(model, optimizer, folder)
    close(plain[2:], self.train(model, optimizer, 2, first=4), 2e-5)
    model, optimizer = self.model(seed=13)
    mover = self.scenario(experts.identity(self.LAYERS, self.EXPERTS))
    load(model, optimizer, own)
    self.step(model, mover)
    self.equal(weights, self.everything(model, optimizer))
    self.say("saved, resumed with the note, with another map, and without Railyard")


def run_killed(self: Rank):
    """A rank that dies before it has offered anything: the others go on as they are, soon."""
    model, optimizer = self.model()
    weights = self.tensors(model, optimizer)
    mover = self.scenario(self.some_order(), patience=2.0)
    self.dist.barrier()
    if self.rank == 1:
        os._exit(0)
    began = time.monotonic()
    self.step(model, mover)
    took = time.monotonic() - began
    check(mover.order is None and took < 6, f"{took:.1f} s")
    self.equal(weights, self.tensors(model, optimizer))  # each rank for itself: whoever asks a dead one hangs
    self.say(f"went on after {took:.1f} s")
    self.goodbye(self.world - 1)


def run_layouts(self: Rank):
    """TEGroupedMLP's and GroupedMLP's layouts, plain torch Adam, a training loop without schedules: everything is where it must be."""
    from railyard import megatron_experts
    torch = self.torch
    each, hidden, ffn = self.EXPERTS // self.parallel["ep"], 16, 24
    position = self.dist.get_rank(self.group)
    config = types.SimpleNamespace(num_moe_experts=self.EXPERTS, num_layers=2, moe_layer_freq=1, expert_model_parallel_size=self.parallel["ep"],
                                   pipeline_model_parallel_size=1)

    class TEGroupedMLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear_fc1, self.linear_fc2 = torch.nn.Module(), torch.nn.Module()
            for i in range(each):
                self.linear_fc1.register_parameter(f"weight{i}", torch.nn.Parameter(torch.empty(ffn, hidden)))
                self.linear_fc1.register_parameter(f"bias{i}", torch.nn.Parameter(torch.empty(ffn)))
                self.linear_fc2.register_parameter(f"weight{i}", torch.nn.Parameter(torch.empty(hidden, ffn)))

        def expert(self, i):
            return [getattr(self.linear_fc1, f"weight{i}"), getattr(self.linear_fc1, f"bias{i}"), getattr(self.linear_fc2, f"weight{i}")]

        def compute(self, i, x):
            w1, b1, w2 = self.expert(i)
            return torch.relu(x @ w1.t() + b1) @ w2.t()

    class GroupedMLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight1 = torch.nn.Parameter(torch.empty(hidden, each * ffn))
            self.weight2 = torch.nn.Parameter(torch.empty(each * ffn, hidden))

        def expert(self, i):  # as GroupedMLP.forward cuts them
            return [self.weight1.view(each, hidden, -1)[i], self.weight2.view(each, -1, hidden)[i]]

        def compute(self, i, x):
            w1, w2 = self.expert(i)
            return torch.relu(x @ w1) @ w2

    class BaseMoELayer(torch.nn.Module):
        def __init__(self, number, group, kind):
            super().__init__()
            self.layer_number, self.ep_group, self.num_local_experts, self.config = number, group, each, config
            self.experts, self.router = kind(), torch.nn.Module()
            self.router.weight = torch.nn.Parameter(torch.randn(config.num_moe_experts, hidden, generator=torch.Generator().manual_seed(number)))
            for i in range(each):
                generator = torch.Generator().manual_seed(number * 100 + position * each + i)
                for t in self.experts.expert(i):
                    t.data.copy_(torch.randn(t.shape, generator=generator) * 0.2)

    def forward(layer, x):
        """A mixture of experts in plain torch: every rank's tokens go to all ranks, each adds what its experts make of them."""
        probs = torch.softmax(x @ layer.router.weight.t(), dim=-1)
        weight, chosen = probs.topk(2, dim=-1)
        gates = torch.zeros_like(probs).scatter(1, chosen, weight)
        from torch.distributed.nn.functional import all_gather, reduce_scatter
        tokens, all_gates = torch.cat(all_gather(x, group=self.group)), torch.cat(all_gather(gates, group=self.group))
        out = sum(layer.experts.compute(i, tokens) * all_gates[:, position * each + i:position * each + i + 1] for i in range(each))
        parts = torch.distributed.nn.functional.all_reduce(out, group=self.group)
        check(reduce_scatter is not None, "")
        return x + parts[position * len(x):(position + 1) * len(x)]

    class Model(torch.nn.Module):
        def __init__(self, group, kind):
            super().__init__()
            self.config = config
            self.one, self.two = BaseMoELayer(1, group, kind), BaseMoELayer(2, group, kind)

        def forward(self, x):
            return forward(self.two, forward(self.one, x))

    gpt = types.SimpleNamespace(GPTModel=Model)
    megatron_experts.watch_model(gpt)
    for kind in (TEGroupedMLP, GroupedMLP):
        def train(steps, order_at=None, order=None):
            mover = self.scenario(order, path="")
            model = Model(self.group, kind)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            losses = []
            for step in range(steps):
                if step == order_at:
                    mover = self.scenario(order)
                x = torch.randn(10, hidden, generator=torch.Generator().manual_seed(step * 10 + self.rank))
                optimizer.zero_grad()
                loss = (model(x) - x.roll(1, 1)).square().mean()
                loss.backward()
                for layer in (model.one, model.two):
                    self.dist.all_reduce(layer.router.weight.grad)
                optimizer.step()
                losses.append(float(loss))
            return losses, mover, model, optimizer
        order = self.some_order(8, 2)
        plain, _, _, _ = train(8)
        moved, mover, model, optimizer = train(8, 3, order)
        check(mover.order == order and mover.sent > 0, "nothing was moved")
        close(plain, moved, 1e-4)
        check(plain[-1] < plain[0], "nothing is learned")
        weights = [[t.detach().clone() for i in range(each) for t in layer.experts.expert(i)] for layer in (model.one, model.two)]
        states = [v.clone() for p in model.parameters() for v in optimizer.state[p].values()]
        swap = [[1, 0, 3, 2, 7, 6, 5, 4], [7, 6, 5, 4, 3, 2, 1, 0]]  # an involution, applied twice
        for again in (False, True):
            self.scenario(swap)
            optimizer.zero_grad()
            model(torch.zeros(4, hidden))
            now = [[t.detach().clone() for i in range(each) for t in layer.experts.expert(i)] for layer in (model.one, model.two)]
            same = all(torch.equal(a, b) for x, y in zip(weights, now) for a, b in zip(x, y))
            check(same == again, f"twice the same swap: {same}")
        check(all(torch.equal(a, b) for a, b in zip(states, [v for p in model.parameters() for v in optimizer.state[p].values()])), "states")
        self.say(f"{kind.__name__}: losses {plain[0]:.4f} to {plain[-1]:.4f}, differ by at most {max(abs(a - b) for a, b in zip(plain, moved)):.1e}")
    size, experts.STAGING = experts.STAGING, 4096  # pieces
    try:
        staging = experts.exchange.__defaults__
        experts.exchange.__defaults__ = (1 << 10,)
        close(train(8)[0], train(8, 3, order)[0], 1e-4)
    finally:
        experts.STAGING, experts.exchange.__defaults__ = size, staging


def run_deepspeed(self: Place):
    """DeepSpeed's MoE layers: fp32 without ZeRO amid training, ZeRO-1 and bf16 while fresh, refused later; saved, loaded, not moved twice."""
    torch, dist = self.torch, self.dist
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    hidden, number, layers = 16, 8, 2

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moes = torch.nn.ModuleList(MoE(hidden, torch.nn.Sequential(torch.nn.Linear(hidden, 24), torch.nn.ReLU(), torch.nn.Linear(24, hidden)),
                                                num_experts=number, ep_size=self_world, k=2, drop_tokens=False, use_rts=False,
                                                top2_2nd_expert_sampling=False) for _ in range(layers))

        def forward(self, x):
            y = x
            for moe in self.moes:
                y = y + moe(y)[0]
            return (y - x.roll(1, 1)).float().square().mean()

    self_world = self.world

    def engine(stage=0, bf16=False):
        torch.manual_seed(3)
        model = Model()
        for at, moe in enumerate(model.moes):
            for local, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
                generator = torch.Generator().manual_seed(at * 100 + self.rank * moe.num_local_experts + local)
                for p in expert.parameters():
                    p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "parameters"})
        optimizer = torch.optim.Adam(groups, lr=1e-2)
        config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
                  "bf16": {"enabled": bf16}}
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def train(one, steps, first=0):
        losses = []
        for step in range(first, first + steps):
            x = torch.randn(8, hidden, generator=torch.Generator().manual_seed(step * 10 + self.rank))
            loss = one(x.to(next(one.parameters()).dtype))
            one.backward(loss)
            one.step()
            losses.append(float(loss))
        return losses

    def weights(one):
        return [[torch.cat([p.detach().float().flatten() for p in e.parameters()]) for e in moe.deepspeed_moe.experts.deepspeed_experts]
                for moe in one.module.moes]

    for kind, at in ((dict(), 3), (dict(stage=1, bf16=True), 0), (dict(bf16=True), 0)):
        self.scenario(path="")
        plain = train(engine(**kind), 7)
        one = engine(**kind)
        self.scenario(path="")
        moved = train(one, at)
        order = self.some_order(9 + at, layers)
        mover = self.scenario(order)
        before = weights(one)
        moved += train(one, 1, at)
        check(mover.order == order and mover.sent > 0 and not all(torch.equal(a, b) for x, y in zip(before, weights(one)) for a, b in zip(x, y)),
              f"{kind}: nothing was moved")
        moved += train(one, 6 - at, at + 1)
        close(plain, moved, 0.05 if kind else 1e-4)
        check(plain[-1] < plain[0], f"nothing is learned: {plain}")
        self.say(f"DeepSpeed {kind}: losses {plain[0]:.4f} to {plain[-1]:.4f}, differ by at most {max(abs(a - b) for a, b in zip(plain, moved)):.1e}")
        lines, before = [], weights(one)
        real, experts.say.warn = experts.say.warn, lambda text: lines.append(text)
        mover = self.scenario(self.some_order(1, layers))
        mover.order = order
        one.module.train()
        with torch.enable_grad():
            one(torch.zeros(8, hidden, dtype=next(one.parameters()).dtype))
        experts.say.warn = real
        if kind:
            check(mover.order == order and (self.rank or ("zero_optimization.stage 1" if "stage" in kind else "bf16") in lines[0]), lines)
            check(all(torch.equal(a, b) for x, y in zip(before, weights(one)) for a, b in zip(x, y)), "something was moved")
        elif not lines:
            folder, order = os.path.join(FOLDER, "deepspeed"), self.some_order(1, layers)
            os.environ["LOCAL_RANK"] = str(self.rank)
            one.save_checkpoint(folder)
            other = engine()
            mover = self.scenario(order)
            other.load_checkpoint(folder)
            check(mover.order == order and mover.due, "the note was not read")
            close(train(one, 2, 7), train(other, 2, 7), 1e-5)
            check(not mover.due and not hasattr(mover, "sent"), "moved twice")
    dist.barrier()


# ---- running it

CASES = {  # name: [(world, parallelism, scenario)]
    "agreement": None,
    "function": [(2, {"ep": 2}, run_function)],
    "training": [(2, {"ep": 2}, run_training)],
    "replicas": [(4, {"ep": 2}, run_training)],
    "four": [(4, {"ep": 4}, run_function)],
    "pipeline": [(4, {"ep": 2, "pp": 2}, run_training)],
    "refusals": [(2, {"ep": 2}, run_refusals)],
    "sharded": [(4, {"ep": 2}, run_sharded)],
    "checkpoints": [(2, {"ep": 2}, run_checkpoints)],
    "layouts": [(2, {"ep": 2}, run_layouts), (4, {"ep": 4}, run_layouts)],
    "deepspeed": [(2, None, run_deepspeed)],
    "killed": [(3, {"ep": 3}, run_killed)],
}


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(rank, world, port, parallel, scenario):
    import faulthandler
    faulthandler.dump_traceback_later(120, exit=True)
    try:
        place = Rank(rank, world, port, SEED, parallel) if parallel else Place(rank, world, port, SEED)
        scenario(place)
        place.goodbye()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        print(f"rank {rank} (seed {SEED}):\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


def main():
    global FOLDER
    if CASE not in CASES:
        sys.exit(f"experts_test: no case {CASE!r}: {', '.join(CASES)}")
    FOLDER = tempfile.mkdtemp(prefix="railyard-experts-")
    print(f"{CASE}: seed {SEED}", flush=True)
    try:
        if CASE == "agreement":
            case_agreement()
            return
        framework = "deepspeed" if CASE == "deepspeed" else "megatron"
        try:
            import torch
            importlib.import_module("deepspeed" if CASE == "deepspeed" else "megatron.core")
        except ImportError as e:
            print(f"skipped: {e} (RY_TEST_PYTHON names an interpreter that has torch and {framework})")
            sys.exit(77)
        import warnings
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        if not os.environ.get("RAILYARD_ENGINE"):
            from railyard import library
            library.setting = {"RAILYARD_EXPERTS": "", "RAILYARD_PATIENCE": "30"}.__getitem__
        if framework == "megatron":
            on_cpu()
        else:
            importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # C++, compiled when first asked for
        patched(framework + "_experts", but=("megatron.training.checkpointing",))
        for world, parallel, scenario in CASES[CASE]:
            if scenario is run_killed:
                Rank.EXPERTS = 6
            Rank.LAYERS = 4 if parallel and "pp" in parallel else 3
            port = free_port()
            fork = multiprocessing.get_context("fork")
            ranks = [fork.Process(target=child, args=(rank, world, port, parallel, scenario)) for rank in range(world)]
            [p.start() for p in ranks]
            ends = time.monotonic() + 150
            while time.monotonic() < ends and any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
                time.sleep(0.05)
            bad = [r for r, p in enumerate(ranks) if p.exitcode]
            alive = [r for r, p in enumerate(ranks) if p.is_alive()]
            [p.kill() for p in ranks if p.is_alive()]
            if bad or alive:
                sys.exit(f"experts_test: {CASE}: ranks {bad} failed, {alive} were still running")
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":  # checkpoints are written by processes that import this file
    main()
