#!/usr/bin/env python3
"""Samples moved inside combine: real Megatron-core models on the emulated cluster, librailyard.so preloaded. Expert-parallel exchanges go
over the emulated NCCL, as PyTorch would issue them; everything else over gloo. Losses and gradients must be those of training without
moves but for the order of sums.

usage: combine_test.py CASE railyard [librailyard-engine.so]
"""

import ctypes
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
WANTED = os.environ.get("RY_TEST_PYTHON")
if __name__ == "__main__" and WANTED and os.path.abspath(WANTED) != sys.executable and "RY_TEST_AGAIN" not in os.environ:
    os.environ["RY_TEST_AGAIN"] = "1"
    os.execv(WANTED, [WANTED] + sys.argv)
RAILYARD = sys.argv.pop(2)  # layers_test reads the rest

import layers_test  # noqa: E402
from layers_test import MICRO, Rank, Trainer, check, forced, layers, waits  # noqa: E402

FLOATS = {"torch.float32": 7, "torch.bfloat16": 9, "torch.int32": 2, "torch.int64": 4, "torch.float64": 8}  # ncclDataType_t


class Id(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


class Nccl:
    """A group's communicator on the emulated NCCL, behind torch.distributed.all_to_all_single."""

    def __init__(self, place, group):
        dist, self.torch, self.group = place.dist, place.torch, group
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.exchanges = 0
        self.call = ctypes.CDLL(None)  # librailyard.so, which is in front
        one = Id()
        if self.rank == 0:
            self._good(self.call.ncclGetUniqueId(ctypes.byref(one)))
        told = [bytes(one) if self.rank == 0 else None]
        dist.broadcast_object_list(told, dist.get_global_rank(group, 0), group=group)
        one = Id.from_buffer_copy(told[0])
        self.comm = ctypes.c_void_p()
        self.call.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, Id, ctypes.c_int]
        self._good(self.call.ncclCommInitRank(ctypes.byref(self.comm), self.n, one, self.rank))
        for name in ("ncclSend", "ncclRecv"):
            getattr(self.call, name).argtypes = [
                ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
            ]
        theirs = dist.all_to_all_single

        def all_to_all_single(output, given, output_split_sizes=None, input_split_sizes=None, group=None, **more):
            if group is not self.group:
                return theirs(output, given, output_split_sizes, input_split_sizes, group=group, **more)
            self.exchange(output, given, output_split_sizes, input_split_sizes)

        dist.all_to_all_single = self.torch.distributed.all_to_all_single = all_to_all_single

    @staticmethod
    def _good(result):
        check(result == 0, f"NCCL gave {result}")

    def exchange(self, output, given, takes, gives):
        check(output.is_contiguous() and given.is_contiguous() and output.dtype == given.dtype, "not as NCCL wants it")
        each, kind = output[:1].numel() or given[:1].numel(), FLOATS[str(output.dtype)]
        takes, gives = ([int(n) for n in s] if s is not None else [len(given) // self.n] * self.n for s in (takes, gives))
        out, into, size = given.data_ptr(), output.data_ptr(), output.element_size()
        self._good(self.call.ncclGroupStart())
        for p in range(self.n):
            self._good(self.call.ncclSend(out, gives[p] * each, kind, p, self.comm, None))
            self._good(self.call.ncclRecv(into, takes[p] * each, kind, p, self.comm, None))
            out, into = out + gives[p] * each * size, into + takes[p] * each * size
        self._good(self.call.ncclGroupEnd())
        self.exchanges += 1

    def end(self):
        self.call.ncclCommDestroy.argtypes = [ctypes.c_void_p]
        self._good(self.call.ncclCommDestroy(self.comm))


def both(t, what, steps=4, planner=forced, **config):
    """Trained without and with moves: the same. The Mover."""
    plain = t.train(*t.model(**config), steps)
    placed = t.train(*t.model(planner, **config), steps)
    check(t.mover is not None and t.mover.over is None and t.mover.why is None, f"{what}: {t.mover and (t.mover.over, t.mover.why)}")
    t.same(plain, placed, what)
    return t.mover


def inside(mover, what, share=1.0):
    """Samples moved, `share` of the times inside combine."""
    check(mover.combine is not None, f"{what}: outside")
    ways = mover.combine.carried
    check(ways > 5, f"{what}: {ways} combines were redirected")
    if mover.rank == 0:
        check(mover.counted["moves"] > 5 and not mover.counted["late"], f"{what}: {mover.counted}")
        check(mover.counted["inside"] >= share * mover.counted["moves"], f"{what}: {mover.counted}")
        if share < 1:
            check(0 < mover.counted["inside"] < mover.counted["moves"], f"{what}: {mover.counted}")


def run_forced(rank):
    """Any permutation at each layer."""
    t = Trainer(rank)
    waits(t)
    Rank.LAYERS = 4
    cases = {
        "two samples": {},
        "one sample": {"b": 1},
        "dense layers": {"moe_layer_freq": [1, 0, 1, 1]},
        "top 1": {"moe_router_topk": 1, "b": 3},
        "full, uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe", "layernorm"]},
        "dropout off, losses of balance": {
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 1e-2,
            "moe_z_loss_coeff": 1e-3,
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
        },
    }
    if rank.world > 2:
        cases = {what: cases[what] for what in ("two samples", "selective")}
    for what, config in cases.items():
        mover = both(t, what, **config)
        inside(mover, what)
    if rank.world == 2:
        mover = both(t, "shared experts", moe_shared_expert_intermediate_size=24)
        check(mover.combine is None and mover.moved, "shared experts' results were left behind")


def run_bits(rank):
    """One move, to the bit: what combine brings is what it brings without moves, and samples then moved by hand."""
    from railyard import combining, moving

    torch = rank.torch
    n, b, s, experts, k, h = rank.world, 3, 7, 4 * rank.world, 3, 10
    generator = torch.Generator().manual_seed(layers_test.SEED)
    held = experts // n
    for _ in range(40):
        chosen = [torch.rand(s * b, experts, generator=generator).argsort(1)[:, :k] for _ in range(n)]
        chosen = [torch.zeros(s * b, experts, dtype=bool).scatter_(1, c, True) for c in chosen]
        counts = torch.stack([c.view(s, b, experts).sum(0) for c in chosen]).view(n * b, experts).numpy()
        now, then = (torch.randperm(n * b, generator=generator).tolist() for _ in range(2))
        at = {sample: slot for slot, sample in enumerate(then)}
        to = [at[sample] for sample in now]
        values = torch.randn(n, s * b, experts, h, generator=generator)  # of each rank's token, by each expert
        mine = [[(a, t, e) for e in range(r * held, (r + 1) * held) for t in range(s * b) if chosen[a][t, e]] for a in range(n) for r in [rank.rank]]
        got = [[(rank.rank, t, e) for e in range(r * held, (r + 1) * held) for t in range(s * b) if chosen[rank.rank][t, e]] for r in range(n)]
        sends, receives = [len(x) for x in mine], [len(x) for x in got]
        tokens = torch.tensor([t for part in got for _, t, _ in part], dtype=torch.int64)
        rows = torch.stack([values[x] for part in mine for x in part]).contiguous().requires_grad_()
        c = combining.Combine(rank.group, rank.rank, n, b)
        c.saw(rows)
        c.begin()
        check(not c.ready(sends, receives, rows), "ready, and no exchange was seen")
        rank.dist.all_to_all_single(torch.empty(sum(sends), h), torch.empty(sum(receives), h), sends, receives, group=rank.group)
        check(c.ready(sends, receives, rows), "not ready")
        every = combining.matrix(counts, now, then, n, b)
        way = c.way(sends, receives, tokens, to, every, moving.route(now, then, rank.rank, b))

        class Plain(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                out = x.new_empty(sum(receives), h)
                rank.dist.all_to_all_single(out, x, receives, sends, group=rank.group)
                return out

            @staticmethod
            def backward(ctx, x):
                out = x.new_empty(sum(sends), h)
                rank.dist.all_to_all_single(out, x.contiguous(), sends, receives, group=rank.group)
                return out

        out = c.carry(way, rows, Plain.apply)
        place = [0] * (s * b)
        for i, t in enumerate(tokens.tolist()):  # ascending in experts: the r-th of its token
            slot = rank.rank * b + t % b
            source = to.index(slot)
            a, old = source // b, t // b * b + source % b
            e = [e for e in range(experts) if chosen[a][old, e]][place[t]]
            check(torch.equal(out[i], values[a, old, e]), f"row {i}, token {t}: not that of rank {a}, token {old}, expert {e}")
            place[t] += 1
        check(place == [k] * (s * b), "rows of tokens")
        # the gradient: of position i on rank r
        everyone = [torch.randn(sum(int(chosen[r].sum()) for _ in [0]), h, generator=generator) for r in range(n)]
        (gradient,) = torch.autograd.grad(out, rows, everyone[rank.rank])
        i = 0
        for part in mine:
            for a, t, e in part:
                slot = to[a * b + t % b]
                home, there = slot // b, t // b * b + slot % b
                r = [x for x in range(experts) if chosen[a][t, x]].index(e)
                expert = [x for x in range(experts) if chosen[home][there, x]][r]
                position = [(x, y) for x in range(experts) for y in range(s * b) if chosen[home][y, x]].index((expert, there))
                check(torch.equal(gradient[i], everyone[home][position]), f"gradient of row {i} of rank {a}, token {t}, expert {e}")
                i += 1
    rank.say("combines and their gradients to the bit")


def run_mixed(rank):
    """A rank that now and then cannot redirect: all move at the block's boundary then."""
    from railyard import combining

    t = Trainer(rank)
    waits(t)
    Rank.LAYERS = 5
    own, pick = combining.Combine.ready, layers_test.random.Random(layers_test.SEED + rank.rank)
    combining.Combine.ready = lambda self, *args: own(self, *args) and pick.random() < 0.8
    inside(both(t, "sometimes", steps=6), "sometimes", 0.2)


def run_learned(rank):
    """The library's own decisions."""
    t = Trainer(rank)
    made = t.train
    movers = []
    t.train = lambda *args, **more: (made(*args, **more), movers.append(t.mover))[0]
    layers_test.run_learned.__globals__["Trainer"] = lambda _: t
    layers_test.run_learned(rank)
    check(movers[-1].combine is not None and movers[-1].combine.carried > 5, "no combine was redirected")


CASES = {
    "bits": (2, 1, {}, run_bits),
    "bits_four": (2, 2, {"RAILYARD_STRATEGY": "dedup"}, run_bits),
    "forced": (2, 1, {"RAILYARD_STRATEGY": "hierarchical"}, run_forced),
    "four": (2, 2, {"RAILYARD_STRATEGY": "dedup", "RAILYARD_VERIFY": "3"}, run_forced),
    "mixed": (2, 1, {}, run_mixed),
    "joint": (2, 1, {}, layers_test.run_joint),
    "failing": (2, 1, {}, layers_test.run_failing),
    "left_alone": (2, 1, {}, layers_test.run_left_alone),
    "learned": (2, 1, {}, run_learned),
}


def one_rank(scenario):
    import faulthandler

    layers_test.prepare()
    faulthandler.dump_traceback_later(200, exit=True)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        place = Rank(rank, world, int(os.environ["RY_TEST_PORT"]), layers_test.SEED, {"ep": world})
        nccl = Nccl(place, place.group)
        if scenario is not run_bits:
            import railyard.megatron_layers as adapter

            check(not adapter.outside(place.model()[0].module.config, lambda name: "exact"), "combines cannot be redirected")
        scenario(place)
        check(nccl.exchanges > 10, "nothing went over NCCL")
        nccl.end()
        place.goodbye()
    except BaseException:
        print(f"rank {rank} (seed {layers_test.SEED}):\n{layers_test.traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


def main():
    case = sys.argv[1]
    nodes, ranks, env, scenario = CASES[case]
    if "RY_TEST_PORT" in os.environ:
        return one_rank(scenario)
    try:
        import megatron.core  # noqa: F401
        import torch  # noqa: F401
    except ImportError as e:
        print(f"skipped: {e} (RY_TEST_PYTHON names an interpreter that has torch and megatron-core)")
        sys.exit(77)
    print(f"{case}: seed {layers_test.SEED}", flush=True)
    more = {"RY_TEST_PORT": str(layers_test.free_port()), "RY_TEST_SEED": str(layers_test.SEED), "OMP_NUM_THREADS": "1", **env}
    more["PYTHONWARNINGS"], more["RY_TEST_AGAIN"] = "ignore", "1"
    emulated = os.path.join(os.path.dirname(os.path.abspath(RAILYARD)), "..", "emu", "libnccl.so.2")
    more["RAILYARD_NCCL"] = emulated  # not the one that PyTorch brings
    arguments = [sys.executable, "-W", "ignore", os.path.abspath(__file__), case, RAILYARD, *sys.argv[2:]]
    command = [RAILYARD, "emu", "-n", str(nodes), "-g", str(ranks), "--preload", "--", *arguments]
    done = subprocess.run(command, env={**os.environ, **more}, timeout=230, check=False)
    if done.returncode:
        sys.exit(f"combine_test: {case}: ended with {done.returncode}")


if __name__ == "__main__":
    main()
