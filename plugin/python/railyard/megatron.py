"""Megatron-core 0.13 and later: where a micro-batch begins and ends, what its routers chose, who holds what, and which options
forbid placing.

Owns: wrapping GPTModel.__init__ (the job is known), GPTModel.forward (a micro-batch) and TopKRouter.forward (a layer's
routing); the findings. Not: data (batch.py wraps PyTorch's loader, and Megatron's sampler through it), counting (observe.py).

A micro-batch is a forward pass of a model in training with gradients on. What runs inside without gradients is part of it
(full recomputation's first pass); what runs outside of it is not (recomputation in backward, evaluation, inference).
docs/live-placement.md has the findings in a table.
"""

import weakref
from typing import Any, Dict, List, Optional, Sequence

from . import adapt, say
from .adapt import BLIND, REFUSE, WARN, Finding, Unknown

OLDEST = (0, 13)

_watch = adapt.Watch()
_numbers: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()  # router -> number among layers with experts
_chunks: Dict[int, Any] = {}  # virtual pipeline stage -> the model that is watched there (weak)
_facts: Dict[str, Any] = {}  # of the job, once a model was built
_warnings: List[Finding] = []  # to be said once a micro-batch of several samples is seen


# --- What an option means for placing samples ---


def moe_layers(moe_layer_freq: Any, num_layers: int) -> List[int]:
    """Numbers (from 0, of all layers of all pipeline stages) of the layers with experts."""
    if isinstance(moe_layer_freq, int):
        return [i for i in range(num_layers) if i % moe_layer_freq == 0]
    pattern = list(moe_layer_freq)
    if len(pattern) != num_layers:
        raise Unknown("moe_layer_freq has %d entries for %d layers" % (len(pattern), num_layers))
    return [i for i, moe in enumerate(pattern) if moe]


def graphed(config: Any) -> bool:
    """Whether routers, or whole layers, run from CUDA graphs, where Python is not."""
    implementation = getattr(config, "cuda_graph_impl", None) or "none"
    if getattr(config, "enable_cuda_graph", False) or getattr(config, "external_cuda_graph", False):
        implementation = "local"
    if implementation == "none":
        return False
    scope = getattr(config, "cuda_graph_scope", None)
    scope = [scope] if isinstance(scope, str) or not hasattr(scope, "__iter__") else list(scope)
    names = {str(getattr(s, "name", s)) for s in scope if s}
    return not names or not names <= {"attn", "mlp", "mamba"}  # none named: all of a layer


def findings(config: Any, facts: Dict[str, Any]) -> List[Finding]:
    """All that this configuration (a TransformerConfig) has of what docs/live-placement.md lists. facts: version (tuple), ep,
    dp (sizes)."""
    found = []

    def get(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    def find(kind: str, option: str, why: str) -> None:
        found.append(Finding(kind, option, why))

    if tuple(facts["version"][:2]) < OLDEST:
        find(REFUSE, "megatron-core %s" % ".".join(map(str, facts["version"])),
             "older than %d.%d, whose parts this adapter knows" % OLDEST)
    # Nothing to gain.
    if facts["ep"] == 1:
        find(REFUSE, "expert_model_parallel_size=1", "tokens stay where they are wherever a sample is")
    if facts["dp"] == 1:
        find(REFUSE, "data-parallel size 1", "there is nobody to swap samples with")
    if get("moe_token_dispatcher_type") == "allgather":
        find(REFUSE, "moe_token_dispatcher_type=allgather", "it sends every token to every rank wherever its experts are")
    if get("moe_expert_capacity_factor") is not None and get("moe_pad_expert_input_to_capacity"):
        find(REFUSE, "moe_pad_expert_input_to_capacity", "every rank sends as much to every expert wherever samples are")
    if get("moe_router_force_load_balancing"):
        find(REFUSE, "moe_router_force_load_balancing", "routing is random")
    # Something depends on the rank that has the sample.
    if get("hybrid_context_parallel"):
        find(REFUSE, "hybrid_context_parallel", "samples are dealt by length, by a scheduler of its own, not by the loader")
    if get("moe_enable_routing_replay"):
        find(REFUSE, "moe_enable_routing_replay", "what a rank replays belongs to the samples it had before")
    # Samples may change ranks, but what the routers choose cannot be seen from Python.
    if graphed(config):
        find(BLIND, "cuda_graph_impl", "routers run from CUDA graphs; with cuda_graph_scope=attn they would not")
    if get("overlap_moe_expert_parallel_comm"):
        find(BLIND, "overlap_moe_expert_parallel_comm", "layers run by a schedule that passes GPTModel.forward by")
    if get("variable_seq_lengths"):
        find(BLIND, "variable_seq_lengths", "micro-batches have no fixed shape")
    # Who shares a rank's micro-batch matters to the framework itself, a little; with one sample in it nobody does.
    kinds = get("moe_router_load_balancing_type", "none")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if "aux_loss" in kinds and _any(get("moe_aux_loss_coeff", 0)):
        find(WARN, "moe_router_load_balancing_type=aux_loss",
             "it is not linear in the samples of a rank's micro-batch; seq_aux_loss and global_aux_loss do not mind")
    if "sinkhorn" in kinds:
        find(WARN, "moe_router_load_balancing_type=sinkhorn", "it routes by all samples of a rank's micro-batch")
    if get("moe_expert_capacity_factor") is not None and not get("moe_pad_expert_input_to_capacity"):
        find(WARN, "moe_expert_capacity_factor",
             "which tokens are dropped depends on the samples of a rank's micro-batch, and alike ones now share it")
    return found


def _any(coefficient: Any) -> bool:
    return any(coefficient) if isinstance(coefficient, (list, tuple)) else bool(coefficient)


# --- The job ---


def version() -> Sequence[int]:
    from megatron.core import package_info
    return (package_info.MAJOR, package_info.MINOR, package_info.PATCH)


def describe(config: Any) -> Dict[str, Any]:
    """What Job.describe() takes, and, under "observer", what Observer takes, of this rank: from parallel_state and the model's
    configuration."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    if not ps.is_initialized():
        raise Unknown("megatron.core.parallel_state is not initialized; process groups of the job's own are not known here")
    tp, cp, pp = ps.get_tensor_model_parallel_rank(), ps.get_context_parallel_rank(), ps.get_pipeline_model_parallel_rank()
    tps, cps, pps = (ps.get_tensor_model_parallel_world_size(), ps.get_context_parallel_world_size(),
                     ps.get_pipeline_model_parallel_world_size())
    group = ps.get_expert_model_parallel_group()
    ep_ranks = dist.get_process_group_ranks(group)
    ep = ep_ranks.index(dist.get_rank())
    n_experts = config.num_moe_experts
    held = n_experts // len(ep_ranks)
    return {
        "dp": ps.get_data_parallel_rank(), "dp_size": ps.get_data_parallel_world_size(),  # without context-parallel peers
        "share": ((pp * cps + cp) * tps + tp, tps * cps * pps),
        "ep_ranks": ep_ranks, "experts": [ep * held + i for i in range(held)],
        "layers": len(moe_layers(config.moe_layer_freq, config.num_layers)), "n_experts": n_experts,
        "topk": config.moe_router_topk,
        "framework": "megatron-core " + ".".join(map(str, version())),
        "observer": {
            # With tensor parallelism in training Megatron demands sequence parallelism: peers route different tokens. Without
            # it they would all route the same, and one counts.
            "gives_counts": tp == 0 or bool(config.sequence_parallel), "gives_tokens": tp == 0 and pp == 0,
            "piece": (cp, cps), "deal": "zigzag",
        },
    }


def _built(model: Any) -> None:
    """A GPTModel was made: the first one describes the job, others of it (virtual pipeline stages) only bring their routers."""
    config = model.config
    if not getattr(config, "num_moe_experts", None):
        return say.info("a model without experts: nothing to place in it")
    chunk = getattr(model, "vp_stage", None) or 0
    if chunk in _chunks and _chunks[chunk]() is not None:
        return say.info("a second model in this process is left alone")
    numbers = {layer: i for i, layer in enumerate(moe_layers(config.moe_layer_freq, config.num_layers))}
    for layer in model.decoder.layers:  # not those of multi-token prediction, whose numbers begin anew
        router = getattr(getattr(layer, "mlp", None), "router", None)
        if router is not None:
            if layer.layer_number - 1 not in numbers:
                raise Unknown("layer %d has experts, moe_layer_freq says that it has none" % layer.layer_number)
            _numbers[router] = numbers[layer.layer_number - 1]
    _chunks[chunk] = weakref.ref(model)
    if _facts:
        return
    from . import job as jobs
    job = jobs.current()
    if job is None:
        raise Unknown("torch.distributed is not set up")
    description = describe(config)
    _facts.update(version=version(), ep=len(description["ep_ranks"]), dp=description["dp_size"])
    found = findings(config, _facts)
    _warnings[:] = [f for f in found if f.kind == WARN] if job.rank == 0 and job.setting("RAILYARD_PLACEMENT") == "batch" else []
    observer = description.pop("observer")
    _watch.observer = adapt.join(job, found, description, **observer)


def _samples() -> Optional[int]:
    """Samples of a micro-batch where Megatron's own calculator was told."""
    try:
        from megatron.core import num_microbatches_calculator
        return num_microbatches_calculator.get_micro_batch_size()
    except Exception:  # it was not: a job with a loop of its own
        return None


# --- Wrapping ---


def patch_model(module: Any) -> None:
    """megatron.core.models.gpt.gpt_model"""
    if tuple(version()[:2]) < OLDEST:
        raise Unknown("megatron-core %s is older than %d.%d" % (".".join(map(str, version())), *OLDEST))
    model = module.GPTModel
    where = adapt.positions(model.forward, "input_ids", "inference_context", "packed_seq_params", "inference_params")

    def begin(self, args, kwargs) -> bool:
        import torch
        if not self.training or not torch.is_grad_enabled():
            return False
        if any(argument(where, name, args, kwargs) is not None for name in ("inference_context", "inference_params")):
            return False
        chunk = getattr(self, "vp_stage", None) or 0
        mine = _chunks.get(chunk)
        if mine is None or mine() is not self:
            return False
        tokens = argument(where, "input_ids", args, kwargs)
        if argument(where, "packed_seq_params", args, kwargs) is not None and (_samples() or 0) != 1:
            # Several samples of the loader in one row: whose tokens are whose is not to be seen. One sample is one row as ever.
            say.warn_once("packed", "routing is not watched: packed sequences, of micro-batches of more than one sample")
            _watch.observer = None
            return False
        if tokens is not None and tokens.shape[0] > 1:
            while _warnings:
                f = _warnings.pop()
                say.warn_once(f.option, "placed training differs slightly from unplaced: " + f.text())
        return _watch.open(tokens, chunk)

    argument = adapt.argument

    adapt.wrap(model, "__init__", adapt.built("Megatron-core", _built))
    adapt.wrap(model, "forward", adapt.watched(_watch, begin))


def patch_router(module: Any) -> None:
    """megatron.core.transformer.moe.router"""
    router = module.TopKRouter
    where = adapt.positions(router.forward, "input")

    def make_forward(original):
        def forward(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            observer = _watch.observer
            if observer is not None and not adapt.compiling() and observer.opened:
                try:
                    number = _numbers.get(self)
                    if number is not None:
                        routing, hidden = result[1], adapt.argument(where, "input", args, kwargs)  # [T, E]; [s, b, H]
                        _watch.layer(number, routing, hidden.shape[1])
                except Exception as e:
                    _watch.failed(e)
            return result
        return forward

    adapt.wrap(router, "forward", make_forward)


WATCHES = {"megatron.core.models.gpt.gpt_model": patch_model, "megatron.core.transformer.moe.router": patch_router}
