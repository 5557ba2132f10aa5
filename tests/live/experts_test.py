#!/usr/bin/env python3
"""Experts moved at start: the agreement (no torch needed), and real Megatron-core models, optimizers, schedules and checkpoints
(megatron_cpu.py).

Other layouts of experts, and DeepSpeed: experts_elsewhere.py.

usage: experts_test.py CASE [librailyard-engine.so]
"""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
CASE = sys.argv[1] if len(sys.argv) > 1 else "agreement"
if len(sys.argv) > 2:
    os.environ["RAILYARD_ENGINE"] = sys.argv[2]
WANTED = os.environ.get("RY_TEST_PYTHON")
if (
    __name__ == "__main__"
    and CASE != "agreement"
    and WANTED
    and os.path.abspath(WANTED) != sys.executable
    and "RY_TEST_AGAIN" not in os.environ
):
    os.environ["RY_TEST_AGAIN"] = "1"
    os.execv(WANTED, [WANTED] + sys.argv)
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("RAILYARD_LOG", "info")
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
sys.path.insert(0, os.path.join(HERE, "..", "..", "plugin", "python"))

from railyard import experts  # noqa: E402
from railyard.board import MemoryBoard  # noqa: E402
from experts_elsewhere import run_deepspeed, run_layouts  # noqa: E402
from megatron_cpu import Place, Rank, check, close, on_cpu, patched  # noqa: E402

SEED = int(os.environ.get("RY_TEST_SEED", random.SystemRandom().randrange(1 << 30)))
FOLDER = ""  # of the case


# ---- the agreement, without torch


def an_offer(layers=(0, 1), group=(0, 1), tensor=0, signature="s", **more):
    return {
        "no": "",
        "model": [2, 8, 2],
        "want": "w",
        "have": "h",
        "moves": True,
        "layers": {str(i): [list(group), tensor, signature] for i in layers},
        **more,
    }


def case_agreement():
    four = {r: an_offer(group=(0, 1) if r < 2 else (2, 3)) for r in range(4)}
    check(experts.judge(four, 4) == {"move": True, "why": ""}, experts.judge(four, 4))
    stages = {r: an_offer(layers=(r // 2,), group=(r // 2 * 2, r // 2 * 2 + 1)) for r in range(4)}
    check(experts.judge(stages, 4)["move"], "pipeline stages")
    none = {r: an_offer(group=(0, 1) if r < 2 else (2, 3), moves=False, layers=()) for r in range(4)}
    check(experts.judge(none, 4) == {"move": False, "why": "", "there": True}, "nothing to move")
    for what, rank, bad in (
        ("rank 2 did not come", 2, None),
        ("rank 1: --use", 1, an_offer(no="--use-distributed-optimizer")),
        ("another expert map", 3, an_offer(group=(2, 3), want="x")),
        ("another order", 3, an_offer(group=(2, 3), have="x")),
        ("other numbers", 1, an_offer(model=[2, 8, 4])),
        ("not the same for all", 1, an_offer(group=(1, 0))),
        ("not the same for all", 2, an_offer(group=(2,))),
        ("tensor-parallel positions", 1, an_offer(tensor=1)),
        ("other tensors", 3, an_offer(group=(2, 3), signature="t")),
        ("not the same for all", 3, an_offer(layers=(0,), group=(2, 3))),
    ):
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

    verdict, took = together([0, 1, 2, 3], four, patience=30)
    check(verdict["move"] and took < 20, f"{verdict} after {took:.2f} s")
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
    threads = [
        threading.Thread(target=lambda r=r: said.update({r: experts.agree(board, r, 4, 0, four[r], 0.5)})) for r in range(4)
    ]
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
            self.say(
                f"{kind or 'fp32'}: losses {plain[0]:.4f} to {plain[-1]:.4f}, differ by at most {max(abs(a - b) for a, b in zip(plain, moved)):.1e}"
            )


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
    stays(
        "groups",
        "--moe-router-num-groups",
        config={"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        want=[[0, 2, 1, 3, 4, 5, 6, 7]] * self.LAYERS,
    )
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
    stays(
        "an optimizer that was not seen",
        "no optimizer that Railyard has seen",
        undo=lambda: expert_tensors.torch_optimizers.update(seen),
    )
    p = next(moe.experts.parameters())
    inner = next(o for o in seen if any(q is p for g in o.param_groups for q in g["params"]))
    keep = dict(inner.state[p])
    if self.rank == 1:
        inner.state[p]["factor"] = torch.zeros(3)
    stays("a factored state", "not of the parameter's shape", undo=lambda: inner.state[p].pop("factor", None))
    if self.rank == 1:
        inner.state[p]["step"] = torch.tensor(77.0)
    stays(
        "another step on one rank",
        "not at the same step" if self.EXPERTS // self.parallel["ep"] > 1 else "other tensors",
        undo=lambda: inner.state[p].update(keep),
    )
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
    self.equal(
        end, self.everything(model, optimizer), order, most=2e-2
    )  # copies that were not renewed would bring the old order back
    self.say(
        f"fresh: losses {plain[0]:.4f} to {plain[-1]:.4f}, differ by at most {max(abs(a - b) for a, b in zip(plain, moved)):.1e}"
    )
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
            json.dump(
                {
                    "version": 1,
                    "layers": self.LAYERS,
                    "experts": self.EXPERTS,
                    "ranks": self.parallel["ep"],
                    "permutation": order,
                    "more": 1,
                },
                file,
            )
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

    faulthandler.dump_traceback_later(200, exit=True)
    os.setpgid(0, 0)  # with it goes what Megatron starts to write checkpoints
    try:
        place = Rank(rank, world, port, SEED, parallel) if parallel else Place(rank, world, port, SEED)
        place.folder = FOLDER
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
            ends = time.monotonic() + 210
            while time.monotonic() < ends and any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
                time.sleep(0.05)
            bad = [r for r, p in enumerate(ranks) if p.exitcode]
            alive = [r for r, p in enumerate(ranks) if p.is_alive()]
            for p in ranks:
                try:
                    os.killpg(p.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            [p.kill() for p in ranks if p.is_alive()]
            if bad or alive:
                sys.exit(f"experts_test: {CASE}: ranks {bad} failed, {alive} were still running")
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":  # checkpoints are written by processes that import this file
    main()
