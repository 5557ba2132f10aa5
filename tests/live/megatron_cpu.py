"""Megatron-core on CPUs, over gloo, for tests: what stands in for the device, and a rank with models, optimizers and a schedule.

Megatron-core has no CPU mode: `on_cpu` stands in for streams, events, current_device and type names, for the RNG tracker of a
GPU, and for Transformer Engine's absence. Routers, dispatchers, experts (SequentialMLP), DDP buffers, optimizers, schedules and
checkpoints are Megatron-core's own.
"""

import contextlib
import importlib
import os
import random
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "plugin", "python"))
from railyard import board, experts, job  # noqa: E402

PATIENCE = 6.0


def check(right, what):
    if not right:
        raise AssertionError(what)


def close(a, b, most):
    check(len(a) == len(b) and all(abs(x - y) <= most for x, y in zip(a, b)), f"{a}\n{b}")


def on_cpu():
    """What a GPU would be asked, answered for a CPU."""
    import torch
    import torch.distributed as dist

    class Stream:
        cuda_stream = 0

        def __init__(self, *_, **__):
            pass

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *_, **__: Stream()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = torch.cuda.stream = lambda *_: Stream()
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.set_device = torch.cuda.synchronize = lambda *_: None
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    kind = torch.Tensor.type

    def cuda_type(self, *args, **kwargs):
        name = kind(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.") if isinstance(name, str) else name

    torch.Tensor.type = cuda_type
    for name in ("tensor", "zeros", "empty", "ones", "full", "arange"):

        def make(*args, original=getattr(torch, name), **kwargs):
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return original(*args, **kwargs)

        setattr(torch, name, make)
    exchange = dist.all_to_all_single

    def lists(output, given, output_split_sizes=None, input_split_sizes=None, **kwargs):  # a GPU's splits come as lists already
        sizes = [s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes)]
        return exchange(output, given, *sizes, **kwargs)

    dist.all_to_all_single = torch.distributed.all_to_all_single = lists
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    tracker = importlib.import_module("megatron.core.tensor_parallel.random").CudaRNGStatesTracker
    tracker.fork = lambda self, name=None: contextlib.nullcontext()


def patched(name, but=()):
    """One of the adapter's modules, its patches applied as hook.py applies them."""
    adapter = importlib.import_module("railyard." + name)
    for module, function in adapter.WATCHES.items():
        if module not in but:
            function(importlib.import_module(module))
    return adapter


class Place:
    """One rank: the process group, a board, the mover."""

    LAYERS, EXPERTS = 3, 8

    def __init__(self, rank, world, port, seed):
        import torch
        import torch.distributed as dist

        self.rank, self.world, self.seed, self.scenarios = rank, world, seed, 0
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
        )
        self.store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
        dist.init_process_group("gloo", store=self.store, rank=rank, world_size=world)
        self.torch, self.dist = torch, dist

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def some_order(self, salt=0, layers=None):
        pick = random.Random(self.seed + salt)
        return [pick.sample(range(self.EXPERTS), self.EXPERTS) for _ in range(layers or self.LAYERS)]

    def goodbye(self, ranks=None):
        """Rank 0, where the store is, ends last."""
        self.store.add("goodbye", 1)
        while self.rank == 0 and self.store.add("goodbye", 0) < (ranks or self.world):
            time.sleep(0.02)
        os._exit(0)

    def scenario(self, want=None, read=None, patience=PATIENCE, path="plan.json"):
        """A fresh mover on a board of its own, as a process that starts has it."""
        self.scenarios += 1
        job.install(
            job.Job(self.rank, self.world, board.StoreBoard(self.dist.PrefixStore(f"scenario{self.scenarios}", self.store)), {})
        )
        experts.mover = experts.Mover(path, read or (lambda *_: [list(row) for row in want]), patience)
        return experts.mover


class Rank(Place):
    """One rank of Megatron-core: groups, models, training."""

    HIDDEN, LENGTH, VOCABULARY = 32, 12, 48

    def __init__(self, rank, world, port, seed, parallel):
        super().__init__(rank, world, port, seed)
        from megatron.core import parallel_state

        self.parallel, self.state = parallel, parallel_state
        parallel_state.initialize_model_parallel(1, parallel.get("pp", 1), expert_model_parallel_size=parallel["ep"])
        self.group = parallel_state.get_expert_model_parallel_group()

    def model(self, bf16=False, sharded=False, seed=5, **more):
        """(model in DDP, optimizer): the same weights for the same seed, replicas equal, experts all different."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import Float16Module

        torch = self.torch
        torch.manual_seed(seed)
        dtype = torch.bfloat16 if bf16 else torch.float32
        config = TransformerConfig(
            **{
                **dict(
                    num_layers=self.LAYERS,
                    hidden_size=self.HIDDEN,
                    num_attention_heads=2,
                    num_moe_experts=self.EXPERTS,
                    moe_router_topk=3,
                    expert_model_parallel_size=self.parallel["ep"],
                    pipeline_model_parallel_size=self.parallel.get("pp", 1),
                    pipeline_dtype=dtype,
                    moe_token_dispatcher_type="alltoall",
                    moe_ffn_hidden_size=40,
                    add_bias_linear=False,
                    moe_router_load_balancing_type="none",
                    moe_router_dtype="fp32",
                    moe_router_score_function="sigmoid",
                    moe_router_enable_expert_bias=True,
                    hidden_dropout=0.0,
                    attention_dropout=0.0,
                    use_cpu_initialization=True,
                    masked_softmax_fusion=False,
                    gradient_accumulation_fusion=False,
                    bias_dropout_fusion=False,
                    apply_rope_fusion=False,
                    bf16=bf16,
                    params_dtype=dtype,
                    gated_linear_unit=True,
                ),
                **more,
            }
        )
        stage, stages = self.state.get_pipeline_model_parallel_rank(), self.parallel.get("pp", 1)
        frequency = more.get("moe_layer_freq")
        spec = (
            get_gpt_decoder_block_spec(config, use_transformer_engine=False)
            if frequency
            else get_gpt_layer_local_spec(num_experts=self.EXPERTS, moe_grouped_gemm=False)
        )
        module = GPTModel(
            config,
            spec,
            vocab_size=self.VOCABULARY,
            max_sequence_length=self.LENGTH,
            position_embedding_type="rope",
            pre_process=stage == 0,
            post_process=stage == stages - 1,
        )
        for name, moe in self.layers(module):
            for local, expert in enumerate(moe.experts.local_experts):
                number = moe.local_expert_indices[local]
                for i, p in enumerate(expert.parameters()):
                    generator = torch.Generator().manual_seed(seed * 1000003 + moe.layer_number * 10007 + number * 101 + i)
                    p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
            generator = torch.Generator().manual_seed(seed * 7919 + moe.layer_number)
            moe.router.weight.data.copy_(torch.randn(moe.router.weight.shape, generator=generator) * 0.3)
            if moe.router.expert_bias is not None:
                moe.router.expert_bias.copy_(torch.randn(moe.router.expert_bias.shape, generator=generator) * 0.01)
        config.finalize_model_grads_func = finalize_model_grads
        if bf16:
            module = Float16Module(config, module)
        ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=sharded), module)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=3e-3, clip_grad=1.0, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=sharded
            ),
            [ddp],
        )
        return ddp, optimizer

    def layers(self, model):
        return [(name, m) for name, m in model.named_modules() if type(m).__name__ == "MoELayer"]

    def batch(self, step):
        torch = self.torch
        replica = self.state.get_data_parallel_rank()
        generator = torch.Generator().manual_seed(self.seed % 1000 + step * 1000 + replica)
        return torch.randint(0, self.VOCABULARY, (2, self.LENGTH), generator=generator)

    def train(self, model, optimizer, steps, first=0):
        """Losses of these steps, through Megatron's own schedule."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        losses = []
        positions = self.torch.arange(self.LENGTH)[None].expand(2, -1)
        for step in range(first, first + steps):
            tokens = self.batch(step)

            def forward_step(_, module):
                output = module(tokens, positions, None, labels=tokens)
                return output, lambda x: (x.float().mean(), {"loss": x.detach().float().mean()})

            model.zero_grad_buffer()
            optimizer.zero_grad()
            out = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=None,
                model=model,
                num_microbatches=1,
                seq_length=self.LENGTH,
                micro_batch_size=2,
            )
            optimizer.step()
            losses += [float(one["loss"]) for one in out]
        return losses

    def logits(self, model, step=1000):
        model.eval()
        with self.torch.no_grad():
            out = model(self.batch(step), self.torch.arange(self.LENGTH)[None].expand(2, -1), None)
        model.train()
        return out.float()

    def tensors(self, model, optimizer):
        """{layer: (by local slot, by row)} of everything that belongs to experts: independent of the adapter's own looking."""
        main, state = {}, {}
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            for ours, theirs in zip(getattr(one, "float16_groups", []), getattr(one, "fp32_from_float16_groups", [])):
                main.update({id(p): m for p, m in zip(ours, theirs)})
            state.update({id(p): s for p, s in one.optimizer.state.items()})

        def of(p):
            m = main.get(id(p), p)
            return (
                [p.data]
                + ([m.data] if m is not p else [])
                + [v for k, v in sorted(state.get(id(m), {}).items()) if k.startswith("exp_avg")]
            )

        result = {}
        for _, moe in self.layers(model):
            slots = [[t.clone() for p in one.parameters() for t in of(p)] for one in moe.experts.local_experts]
            rows = [t.clone() for t in of(moe.router.weight)] + [moe.router.expert_bias.clone()]
            result[moe.layer_number] = (slots, rows)
        return result

    def everything(self, model, optimizer):
        """The same with the slots of the whole expert-parallel group."""
        result = {}
        for number, (slots, rows) in self.tensors(model, optimizer).items():
            parts = [None] * self.parallel["ep"]
            self.dist.all_gather_object(parts, slots, group=self.group)
            result[number] = ([slot for part in parts for slot in part], rows)
        return result

    def step(self, model, mover):
        """What the adapter does before a step, without the step."""
        mover.due = True
        model.zero_grad_buffer()  # as every step begins
        experts.before_step(lambda: importlib.import_module("railyard.megatron_experts").look(model))

    def equal(self, a, b, order=None, most=0.0):
        """b is a, moved by order."""
        check(a.keys() == b.keys() and a, "no layers")
        for number in sorted(a):
            slots, row = range(len(a[number][0])), order[number - 1] if order else list(range(self.EXPERTS))
            for slot, expert in zip(slots, row):
                check(len(a[number][0][expert]) == len(b[number][0][slot]), "other tensors")
                for x, y in zip(a[number][0][expert], b[number][0][slot]):
                    right = (
                        self.torch.equal(x, y) if not most else self.torch.allclose(x.float(), y.float(), rtol=1e-3, atol=most)
                    )
                    check(
                        right, f"layer {number}, slot {slot}: not expert {expert}: off by {(x.float() - y.float()).abs().max()}"
                    )
            for x, y in zip(a[number][1], b[number][1]):
                x = x[self.torch.tensor(row)]
                check(
                    self.torch.equal(x, y) if not most else self.torch.allclose(x.float(), y.float(), rtol=1e-3, atol=most),
                    f"layer {number}: router rows",
                )
