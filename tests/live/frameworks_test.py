#!/usr/bin/env python3
"""The adapters of Megatron-core and DeepSpeed. One case per run: frameworks_test.py CASE.

Pure: numbering, findings (each is in the table of docs/live-placement.md, and the other way round), shapes. With the real
frameworks, on the CPU: Megatron's GPTModel and TopKRouter, with the allgather dispatcher, since the alltoall one needs CUDA
streams (what routers choose is the same with either); DeepSpeed's engine, MoE and TopKGate over gloo. What only a GPU can
show: alltoall, pinned buffers and events, CUDA graphs being noticed.
"""
import contextlib
import copy
import faulthandler
import importlib
import inspect
import os
import re
import sys
import tempfile
import types
import warnings

import watch_help as help

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.filterwarnings("ignore")

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")


class Job:
    """A job as job.py has it, as far as adapters know it."""

    def __init__(self, rank, board, **settings):
        self.rank, self.board, self.settings = rank, board, dict(RAILYARD_PLACEMENT="batch", RAILYARD_ROUTING="", **settings)
        self.described, self.stops = [], []

    def setting(self, name):
        return self.settings[name]

    def describe(self, **what):
        self.described.append(what)

    def stop(self, why):
        self.stops.append(why)

    def stopped(self, now=False):
        return self.stops[0] if self.stops else None


def install(job):
    """In place of railyard.job, which needs a board that all reach and the library."""
    fake = types.ModuleType("railyard.job")
    fake.current, fake.stop = lambda: job, job.stop
    sys.modules["railyard.job"] = fake
    import railyard
    railyard.job = fake


# --- Pure ---


def numbering():
    from railyard.megatron import moe_layers
    assert moe_layers(1, 4) == [0, 1, 2, 3]
    assert moe_layers(2, 5) == [0, 2, 4]
    assert moe_layers([0, 1, 1, 0, 1], 5) == [1, 2, 4]
    try:
        moe_layers([1, 1], 3)
    except Exception as e:
        assert "3 layers" in str(e)
    else:
        raise SystemExit("a pattern of another length was taken")


MEGATRON = dict(moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0,
                cuda_graph_impl="none",
                cuda_graph_scope=[], moe_expert_capacity_factor=None, moe_pad_expert_input_to_capacity=False,
                variable_seq_lengths=False)
MEGATRON_FACTS = {"version": (0, 16, 1), "ep": 4, "dp": 4}
# What is changed, and what must be found: kind and option (None: nothing).
MEGATRON_CASES = [
    ({}, {}, None), ({}, {"version": (0, 13, 0)}, None), ({}, {"version": (1, 0, 0)}, None),
    ({}, {"version": (0, 12, 3)}, ("refuse", "megatron-core 0.12.3")),
    ({}, {"ep": 1}, ("refuse", "expert_model_parallel_size=1")), ({}, {"dp": 1}, ("refuse", "data-parallel size 1")),
    ({"moe_token_dispatcher_type": "allgather"}, {}, ("refuse", "moe_token_dispatcher_type=allgather")),
    ({"moe_token_dispatcher_type": "flex"}, {}, None),
    ({"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}, {},
     ("refuse", "moe_pad_expert_input_to_capacity")),
    ({"moe_router_force_load_balancing": True}, {}, ("refuse", "moe_router_force_load_balancing")),
    ({"hybrid_context_parallel": True}, {}, ("refuse", "hybrid_context_parallel")),
    ({"moe_enable_routing_replay": True}, {}, ("refuse", "moe_enable_routing_replay")),
    ({"cuda_graph_impl": "local"}, {}, ("blind", "cuda_graph_impl")),
    ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn", "moe_router"]}, {}, ("blind", "cuda_graph_impl")),
    ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ["attn"]}, {}, None),
    ({"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": "full"}, {}, ("blind", "cuda_graph_impl")),
    ({"cuda_graph_impl": None, "enable_cuda_graph": True}, {}, ("blind", "cuda_graph_impl")),
    ({"overlap_moe_expert_parallel_comm": True}, {}, ("blind", "overlap_moe_expert_parallel_comm")),
    ({"variable_seq_lengths": True}, {}, ("blind", "variable_seq_lengths")),
    ({"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}, {},
     ("warn", "moe_router_load_balancing_type=aux_loss")),
    ({"moe_router_load_balancing_type": ["seq_aux_loss", "aux_loss"], "moe_aux_loss_coeff": [0.1, 0.1]}, {},
     ("warn", "moe_router_load_balancing_type=aux_loss")),
    ({"moe_router_load_balancing_type": "aux_loss"}, {}, None),
    ({"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1}, {}, None),
    ({"moe_router_load_balancing_type": "sinkhorn"}, {}, ("warn", "moe_router_load_balancing_type=sinkhorn")),
    ({"moe_expert_capacity_factor": 1.25}, {}, ("warn", "moe_expert_capacity_factor")),
]
DEEPSPEED_FACTS = {"dp": 4, "ep": [2, 2], "experts": [8, 8], "topk": [2, 2], "autoep": True}
DEEPSPEED_CASES = [
    ({}, None), ({"dp": 1}, ("refuse", "data-parallel size 1")), ({"ep": [1, 1]}, ("refuse", "ep_size=1")),
    ({"pipeline": 2}, ("refuse", "pipeline parallelism")), ({"pipeline_engine": True}, ("refuse", "pipeline parallelism")),
    ({"sequence": 2}, ("refuse", "sequence parallelism")), ({"tp": 2}, ("refuse", "AutoEP folded with tensor parallelism")),
    ({"experts": [8, 16]}, ("refuse", "MoE layers of several numbers of experts")),
    ({"ep": [2, 4]}, ("refuse", "MoE layers of several expert-parallel sizes")),
    ({"topk": [1, 2]}, ("refuse", "MoE layers of several k")), ({"random_ltd": True}, ("blind", "random_ltd")),
    ({"curriculum": True}, ("blind", "curriculum_learning")), ({"compiled": True}, ("blind", "deepcompile")),
    ({"drop_tokens": True}, ("warn", "drop_tokens=True")), ({"autoep": False}, ("warn", "l_aux")),
]


def findings():
    """Each option alone gives its finding and no other; strict refuses what is else warned about; the documentation's table
    has these rows."""
    from railyard import adapt, deepspeed, megatron
    seen = set()

    def check(found, want, framework, what):
        assert [(f.kind, f.option) for f in found] == ([want] if want else []), (what, found)
        for f in found:
            assert "\n" not in f.text() and f.option in f.text() and len(f.text()) < 200
            seen.add((framework, re.sub(r"megatron-core 0\.12\.3", "megatron-core < 0.13",
                                        re.sub(r"several .*", "several kinds", f.option)), f.kind))
        assert adapt.refusals(found) == [f.text() for f in found if f.kind == "refuse"]
        assert adapt.refusals(found, strict=True) == [f.text() for f in found if f.kind in ("refuse", "warn")]

    for change, facts, want in MEGATRON_CASES:
        check(megatron.findings(types.SimpleNamespace(**{**MEGATRON, **change}), {**MEGATRON_FACTS, **facts}), want,
              "Megatron-core", change or facts)
    for facts, want in DEEPSPEED_CASES:
        check(deepspeed.findings({**DEEPSPEED_FACTS, **facts}), want, "DeepSpeed", facts)
    rows = set()
    with open(os.path.join(ROOT, "docs", "live-placement.md"), encoding="utf-8") as f:
        for line in f:
            cells = [c.strip() for c in line.strip().strip("|").split("|")]
            if len(cells) == 4 and cells[2] in ("refused", "not watched", "warned"):
                kind = {"refused": "refuse", "not watched": "blind", "warned": "warn"}[cells[2]]
                rows.add((cells[0], cells[1].replace("`", ""), kind))
    assert rows == seen, "docs/live-placement.md and the adapters differ: %s" % sorted(rows ^ seen)
    print("%d options, all in the documentation" % len(seen))


def shapes():
    from railyard.deepspeed import samples_along
    assert samples_along((2, 16), (2, 16, 64)) == (True, True)
    assert samples_along((2, 16), (16, 2, 64)) == (False, True)
    assert samples_along((2, 16), (32, 64)) == (True, False)
    assert samples_along((4, 4), (4, 4, 64)) == (True, False)
    assert samples_along((1, 16), (16, 64)) == (True, True)
    for hidden in ((2, 8, 64), (3, 64), (2, 2, 8, 64)):
        try:
            samples_along((2, 16), hidden)
        except Exception as e:
            assert "whose" in str(e)
        else:
            raise SystemExit("samples were found in %s" % (hidden,))


# --- Megatron-core ---


def no_gpu():
    """Megatron on the CPU: its current device is the CPU, and no random states of a GPU are kept (no dropout here, so none are
    used)."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import moe_utils
    torch.cuda.current_device = lambda: "cpu"
    random = tensor_parallel.random
    random.get_cuda_rng_tracker().fork = lambda *a: contextlib.nullcontext()
    random._get_all_rng_states = lambda: (None, None, None)
    random._set_all_rng_states = lambda *a: None
    random._fork_rng = contextlib.nullcontext
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def megatron_config(**more):
    from megatron.core.transformer.transformer_config import TransformerConfig
    return TransformerConfig(**{**dict(
        num_layers=3, hidden_size=32, num_attention_heads=2, ffn_hidden_size=32, num_moe_experts=8, moe_router_topk=2,
        moe_ffn_hidden_size=32,
        moe_token_dispatcher_type="allgather", moe_layer_freq=[0, 1, 1], add_bias_linear=False,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32", hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False, persist_layer_norm=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False,
        use_cpu_initialization=True), **more})


def megatron_model(config, seed, **more):
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    torch.manual_seed(seed)
    return GPTModel(config, get_gpt_decoder_block_spec(config, use_transformer_engine=False), vocab_size=100,
                    max_sequence_length=16,
                    position_embedding_type="rope", **more)


def forward(model, tokens, **more):
    import torch
    s = tokens.shape[1]
    return model(tokens, torch.arange(s).expand(tokens.shape[0], -1), torch.triu(torch.ones(1, 1, s, s), 1).bool(), labels=tokens,
                 **more)


def alone():
    import torch.distributed as dist
    handle, path = tempfile.mkstemp(prefix="railyard-store")
    os.close(handle)
    os.unlink(path)
    dist.init_process_group("gloo", init_method="file://" + path, rank=0, world_size=1)


def patch_megatron():
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer.moe import router
    from railyard import megatron
    assert set(megatron.WATCHES) == {gpt_model.__name__, router.__name__}
    before = {c: inspect.signature(getattr(*c))
              for c in ((gpt_model.GPTModel, "forward"), (gpt_model.GPTModel, "__init__"), (router.TopKRouter, "forward"))}
    originals = {c: getattr(*c) for c in before}
    for _ in range(2):  # twice is as once
        megatron.patch_model(gpt_model)
        megatron.patch_router(router)
    for c, signature in before.items():
        patched = getattr(*c)
        assert inspect.signature(patched) == signature and patched.__wrapped__ is originals[c]
        assert patched.__qualname__ == originals[c].__qualname__
    return megatron


def training(model, batches):
    """Losses and gradients of each batch: what a patch must not change by a bit."""
    out = []
    for tokens in batches:
        model.zero_grad()
        loss = forward(model, tokens)
        loss.mean().backward()
        out.append((loss.detach().clone(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    return out


def equal(a, b):
    import torch
    for (la, ga), (lb, gb) in zip(a, b):
        assert torch.equal(la, lb) and ga.keys() == gb.keys() and all(torch.equal(ga[n], gb[n]) for n in ga)


def recorded(routers):
    """Plain hooks on routers: what they chose, by layer, in order."""
    taken = []
    for layer, router in enumerate(routers):
        router.register_forward_hook(lambda m, i, o, layer=layer: taken.append((layer, o[1].clone())))
    return taken


def check_seen(board, n_messages, batches, taken, places, expert_place, at_layer_and_batch):
    """Messages of rank 0 against what plain hooks took: counts and distinct, summed the slow way."""
    import numpy as np
    from railyard.observe import Seen
    import observe_test
    for n in range(n_messages):
        seen = Seen.decode(board.get("seen/0/%d" % n))
        tokens = batches[seen.n]
        b = tokens.shape[0]
        assert seen.n == n and np.array_equal(seen.tokens, tokens.numpy())
        for row, layer in enumerate(seen.layers):
            routing = at_layer_and_batch(taken, layer, n)
            counts, distinct = observe_test.reference(routing.numpy(), b, False, expert_place, places)
            assert np.array_equal(seen.counts[row], counts), (seen.counts[row], counts)
            if seen.distinct is not None:
                assert np.array_equal(seen.distinct[row], distinct)
            assert seen.positions[row] == tokens.shape[1]
    assert board.get("seen/0/%d" % n_messages) is None


def megatron():
    """The real model unpatched and patched: bit-equal; what is seen is what routers chose; recomputation, evaluation,
    inference are not seen."""
    help.needs("torch", "numpy", "megatron")
    import torch
    torch.set_num_threads(1)
    r = help.seeded()
    seed = r.randrange(1 << 30)
    from megatron.core import parallel_state
    no_gpu()
    alone()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 100, (r.randint(1, 3), 16), generator=generator) for _ in range(3)]
    configs = [{}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
               {"recompute_granularity": "selective", "recompute_modules": ["moe"]}]
    plain = [training(megatron_model(megatron_config(**c), seed), batches) for c in configs]
    adapter = patch_megatron()
    expert_place = [e % 2 for e in range(8)]
    for c, want in zip(configs, plain):
        board = help.Board()
        job = Job(0, board)
        job.settings["RAILYARD_PLACEMENT"] = "watch"
        install(job)
        adapter._facts.clear()
        adapter._chunks.clear()
        model = megatron_model(megatron_config(**c), seed)
        assert not job.stops and len(job.described) == 1, job.stops
        d = job.described[0]
        assert (d["dp"], d["dp_size"], d["share"], d["ep_ranks"], d["experts"], d["layers"], d["n_experts"], d["topk"]) == (
            0, 1, (0, 1), [0], list(range(8)), 2, 8, 2) and d["framework"].startswith("megatron-core 0."), d
        from railyard import observe
        observer = adapter._watch.observer
        observer._told = observe.places_of(observe.places_text(2, [expert_place]), 2, 8)
        taken = recorded([model.decoder.layers[i].mlp.router for i in (1, 2)])
        equal(training(model, batches), want)
        with torch.no_grad():
            forward(model, batches[0])  # no gradients
        model.eval()
        forward(model, batches[0])  # evaluation
        model.train()
        other = megatron_model(megatron_config(), seed)  # a second model: left alone
        forward(other, batches[0])
        observer.finish()
        assert observer.over is None and observer.forgone == 0
        passes = len(taken) // (2 * (len(batches) + 2))
        first = [t for t in taken[:len(taken)]]
        # By hooks: per batch, layers in order in forward; recomputed ones come in backward, after both.
        per = (len(taken) - 4) // len(batches)
        assert per == (4 if c else 2), (per, passes)
        check_seen(board, len(batches), batches, first, 2, expert_place,
                   lambda t, layer, n: [x for l, x in t[n * per:n * per + 2] if l == layer][0])
        del model, other
    # What must be refused is, by the real configuration, with the option's name.
    job = Job(0, help.Board())
    install(job)
    adapter._facts.clear()
    adapter._chunks.clear()
    adapter._watch.observer = None
    model = megatron_model(megatron_config(), seed)
    assert any("expert_model_parallel_size=1" in s for s in job.stops) and any("allgather" in s for s in job.stops), job.stops
    assert adapter._watch.observer is None
    equal(training(model, batches[:1]), plain[0][:1])
    # An adapter whose own code fails: one line, and training goes on as ever.
    class Failing:
        opened = True

        def open(self, *a):
            raise RuntimeError("by the test")
        layer = close = open
    lines = help.Say()
    adapter.adapt.say, kept = lines, adapter.adapt.say
    adapter._watch.observer = Failing()
    equal(training(model, batches[:1]), plain[0][:1])
    assert len(lines.lines) == 1 and "by the test" in lines.lines[0] and adapter._watch.observer is None, lines.lines
    adapter.adapt.say = kept
    # A forward pass that raises does so as ever, and what was seen of it is thrown away.
    job.settings["RAILYARD_PLACEMENT"] = "watch"
    job.stops.clear()
    adapter._facts.clear()
    adapter._chunks.clear()
    model = megatron_model(megatron_config(), seed)
    try:
        forward(model, torch.full((1, 16), 1000))
    except IndexError:
        pass
    assert not adapter._watch.observer.opened
    training(model, batches[:1])
    adapter._watch.observer.finish()
    assert adapter._watch.observer.sent == 1


def ranks(n, work):
    """work(rank) in n forked processes, joined by gloo; each must end well."""
    store = tempfile.mktemp(prefix="railyard-store")
    children = []
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            code = 1
            faulthandler.dump_traceback_later(60, exit=True)
            try:
                import torch.distributed as dist
                os.environ["LOCAL_RANK"] = str(rank)
                dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=n)
                work(rank)
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if os.path.exists(store):
        os.unlink(store)
    assert codes == [0] * n, codes


def megatron_groups():
    """What describe() says in a job of 4 ranks: pipeline of 2, data- and expert-parallel 2; and which numbers the stages'
    routers have."""
    help.needs("torch", "numpy", "megatron")
    import torch
    torch.set_num_threads(1)
    from megatron.core import parallel_state
    no_gpu()

    def work(rank):
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, expert_model_parallel_size=2,
                                                 create_gloo_process_groups=False)
        adapter = patch_megatron()
        job = Job(rank, help.Board())
        job.settings["RAILYARD_PLACEMENT"] = "watch"
        install(job)
        stage, dp = rank // 2, rank % 2
        config = megatron_config(num_layers=4, moe_layer_freq=[0, 1, 1, 1], pipeline_model_parallel_size=2,
                                 expert_model_parallel_size=2,
                                 pipeline_dtype=torch.float32)
        model = megatron_model(config, 1, pre_process=stage == 0, post_process=stage == 1)
        assert not job.stops, job.stops
        d = job.described[0]
        want = dict(dp=dp, dp_size=2, share=(stage, 2), ep_ranks=[2 * stage, 2 * stage + 1],
                    experts=[4 * dp + i for i in range(4)], layers=3,
                    n_experts=8, topk=2)
        assert {k: d[k] for k in want} == want, (d, want)
        numbers = [adapter._numbers.get(layer.mlp.router) for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
        assert numbers == ([0] if stage == 0 else [1, 2]), numbers
        observer = adapter._watch.observer
        assert observer.gives_counts and observer.gives_tokens == (stage == 0) and observer.piece == (0, 1)

    ranks(4, work)


# --- DeepSpeed ---


def deepspeed():
    """The real engine with classic MoE layers on 2 ranks over gloo: patched bit-equal to unpatched, and what is seen is what
    gates chose."""
    help.needs("torch", "numpy", "deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    torch.set_num_threads(1)
    r = help.seeded()
    seed = r.randrange(1 << 30)
    import deepspeed as ds
    from deepspeed.moe.layer import MoE
    from torch import nn
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # an optional extension, whose compiling takes minutes
    ds.utils.logger.setLevel("ERROR")

    class Model(nn.Module):
        def __init__(self, k, sequence_first):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.moes = nn.ModuleList([MoE(16, nn.Linear(16, 16), num_experts=4, ep_size=2, k=k, capacity_factor=1.0,
                                           min_capacity=1, use_rts=False,
                                           drop_tokens=k < 3, top2_2nd_expert_sampling=False) for _ in range(2)])
            self.sequence_first = sequence_first

        def forward(self, mask, input_ids):
            x = self.embed(input_ids)
            x = x.transpose(0, 1) if self.sequence_first else x
            total = 0.0
            for moe in reversed(self.moes):  # used in another order than made in
                y, l_aux, _ = moe(x)
                x, total = x + y, total + l_aux
            return x.square().mean() + 0.01 * total

    def work(rank):
        from railyard import deepspeed as adapter
        from railyard import observe
        import observe_test
        import numpy as np
        generator = torch.Generator().manual_seed(seed + rank)
        batches = [torch.randint(0, 50, (3, 8), generator=generator) for _ in range(3)]
        config = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1,
                  "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                  "zero_optimization": {"stage": 0}}

        def run(k, sequence_first):
            torch.manual_seed(seed)
            model = Model(k, sequence_first)
            engine, _, _, _ = ds.initialize(model=model, model_parameters=[p for p in model.parameters()],
                                            config=copy.deepcopy(config))
            taken = []
            for i, moe in enumerate(model.moes):
                moe.deepspeed_moe.gate.register_forward_hook(lambda m, a, o, i=i: taken.append((1 - i, o[3].clone())))
            losses = []
            for tokens in batches:
                loss = engine(torch.ones_like(tokens), input_ids=tokens)
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach().clone())
            engine.eval()
            with torch.no_grad():
                engine(torch.ones_like(batches[0]), input_ids=batches[0])
            return engine, losses, {n: p.detach().clone() for n, p in model.named_parameters()}, taken

        cases = [(1, False), (2, True), (3, False)]
        plain = [run(*c)[1:3] for c in cases]
        importlib.import_module("deepspeed.moe.ep_router")
        importlib.import_module("deepspeed.module_inject.auto_ep_layer")
        methods = [(ds.runtime.engine.DeepSpeedEngine, "forward"), (ds.runtime.engine.DeepSpeedEngine, "__init__"),
                   (MoE, "forward"),
                   (ds.moe.sharded_moe.TopKGate, "forward"), (ds.module_inject.auto_ep_layer.AutoEPMoELayer, "forward"),
                   (ds.moe.ep_router.TokenChoiceTopKRouter, "forward")]
        before = [(getattr(*m), inspect.signature(getattr(*m))) for m in methods]
        for _ in range(2):
            for name, patch in adapter.WATCHES.items():
                patch(sys.modules[name])
        for m, (original, signature) in zip(methods, before):
            assert getattr(*m).__wrapped__ is original and inspect.signature(getattr(*m)) == signature, m
        for c, (losses, weights) in zip(cases, plain):
            job = Job(rank, help.Board())
            install(job)
            adapter._engine = None
            adapter._gates.clear()
            engine, patched_losses, patched_weights, taken = run(*c)
            assert not job.stops and len(job.described) == 1, job.stops
            d = job.described[0]
            want = dict(dp=rank, dp_size=2, share=(0, 1), ep_ranks=[0, 1], experts=[2 * rank, 2 * rank + 1], layers=2,
                        n_experts=4, topk=c[0])
            assert {k: d[k] for k in want} == want, d
            assert all(torch.equal(a, b) for a, b in zip(losses, patched_losses))
            assert all(torch.equal(weights[n], patched_weights[n]) for n in weights)
            observer = adapter._watch.observer
            observer.finish()
            assert observer.over is None and observer.sent == 3, (observer.over, observer.sent)
            dropped = 0
            for n in range(3):
                seen = observe.Seen.decode(job.board.get("seen/%d/%d" % (rank, n)))
                assert np.array_equal(seen.tokens, batches[n].numpy()) and seen.layers == [0, 1]
                for layer, indices in taken[2 * n:2 * n + 2]:
                    routing = np.zeros((24, 4), bool)
                    for row in indices.numpy():
                        for t, e in enumerate(row):
                            if e >= 0:
                                routing[t, e] = True
                            else:
                                dropped += 1
                    counts, _ = observe_test.reference(routing, 3, not c[1], [0] * 4, 1)
                    assert np.array_equal(seen.counts[layer], counts), (seen.counts[layer], counts)
            print("rank %d, k=%d: %d choices dropped for want of capacity" % (rank, c[0], dropped))
            del engine

    ranks(2, work)


def autoep():
    """The real engine with layers that its AutoEP put in the place of a model's own, on 2 ranks over gloo."""
    help.needs("torch", "numpy", "deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    torch.set_num_threads(1)
    r = help.seeded()
    seed = r.randrange(1 << 30)
    import deepspeed as ds
    from torch import nn
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    ds.utils.logger.setLevel("ERROR")

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(0.1 * torch.randn(4, 32, 16))
            self.down_proj = nn.Parameter(0.1 * torch.randn(4, 16, 16))

    class Block(nn.Module):  # by its names AutoEP knows it for Mixtral's; it is replaced, and never run
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(16, 4, bias=False), Experts()

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Block()

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Embedding(50, 16), nn.ModuleList([Layer() for _ in range(2)])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Inner()
            self.config = types.SimpleNamespace(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, hidden_size=16,
                                                intermediate_size=16)

        def forward(self, input_ids, attention_mask):
            x = self.model.embed(input_ids)
            for layer in self.model.layers:
                y = layer.mlp(x)
                x = x + (y[0] if isinstance(y, tuple) else y)
            return x.square().mean()

    def work(rank):
        import numpy as np
        from railyard import deepspeed as adapter
        from railyard import observe
        import observe_test
        generator = torch.Generator().manual_seed(seed + rank)
        batches = [torch.randint(0, 50, (3, 8), generator=generator) for _ in range(3)]

        def run():
            torch.manual_seed(seed)
            engine = ds.initialize(model=Model(), config={
                "train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "zero_optimization": {"stage": 0},
                "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "mixtral", "use_grouped_mm": False}})[0]
            taken, losses = [], []
            for layer, module in enumerate(engine.module.model.layers):
                module.mlp.router.register_forward_hook(lambda m, a, o, layer=layer: taken.append((layer, o[1].clone())))
            for tokens in batches:
                loss = engine(tokens, attention_mask=torch.ones_like(tokens))
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach().clone())
            return losses, {n: p.detach().clone() for n, p in engine.module.named_parameters()}, taken

        losses, weights, _ = run()
        for name, patch in adapter.WATCHES.items():
            patch(sys.modules[name])
        job = Job(rank, help.Board())
        install(job)
        patched_losses, patched_weights, taken = run()
        assert not job.stops and len(job.described) == 1, job.stops
        want = dict(dp=rank, dp_size=2, share=(0, 1), ep_ranks=[0, 1], experts=[2 * rank, 2 * rank + 1], layers=2, n_experts=4,
                    topk=2)
        assert {k: job.described[0][k] for k in want} == want, job.described
        assert all(torch.equal(a, b) for a, b in zip(losses, patched_losses))
        assert all(torch.equal(weights[n], patched_weights[n]) for n in weights)
        observer = adapter._watch.observer
        observer.finish()
        assert observer.over is None and observer.sent == 3, (observer.over, observer.sent)
        for n in range(3):
            seen = observe.Seen.decode(job.board.get("seen/%d/%d" % (rank, n)))
            assert np.array_equal(seen.tokens, batches[n].numpy()) and seen.layers == [0, 1]
            for layer, selected in taken[2 * n:2 * n + 2]:
                routing = np.zeros((24, 4), bool)
                routing[np.arange(24)[:, None], selected.numpy()] = True
                counts, _ = observe_test.reference(routing, 3, True, [0] * 4, 1)
                assert np.array_equal(seen.counts[layer], counts)

    ranks(2, work)


if __name__ == "__main__":
    {f.__name__: f for f in (numbering, findings, shapes, megatron, megatron_groups, deepspeed, autoep)}[sys.argv[1]]()
    print("%s: as it must be" % sys.argv[1])
