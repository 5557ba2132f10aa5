"""DeepSpeed: where a micro-batch begins and ends, what its gates chose, who holds what, and which options forbid placing.

Owns: wrapping DeepSpeedEngine.__init__ (the job is known) and .forward (a micro-batch), MoE.forward and TopKGate.forward (a
layer of the classic kind), AutoEPMoELayer.forward and TokenChoiceTopKRouter.forward (one of AutoEP); the findings. Not: data
(batch.py), counting (observe.py). Jobs that use MoE layers without DeepSpeed's engine are not seen.

DeepSpeed knows neither layers' numbers nor which dimension samples lie along: layers are numbered in the order in which the
first watched forward pass uses them, and the dimension is told by the shapes of tokens and hidden states.
"""

import weakref
from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import adapt, say
from .adapt import BLIND, REFUSE, WARN, Finding, Unknown

NAMES = ("input_ids", "tokens", "text")  # under which tokens are given by name, where they are

_watch = adapt.Watch()
_engine: Any = None  # the one that is watched (weak)
_gates: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()  # gate -> number of its layer, by first use
_tokens: Tuple[int, int] = (0, 0)  # shape of the open micro-batch's
_hidden: Optional[Sequence[int]] = None  # shape of what the MoE layer at work was given
_warnings: List[Finding] = []


# --- What an option means for placing samples ---


def findings(facts: Dict[str, Any]) -> List[Finding]:
    """facts: dp, ep (size, or list of sizes), experts (list: of each layer), topk (list), pipeline, sequence (sizes), autoep,
    tp, random_ltd, curriculum, compiled, drop_tokens. docs/live-placement.md has the table."""
    found = []

    def find(kind: str, option: str, why: str) -> None:
        found.append(Finding(kind, option, why))

    if facts.get("pipeline", 1) > 1 or facts.get("pipeline_engine"):
        find(REFUSE, "pipeline parallelism", "its engine draws micro-batches and runs layers by a schedule of its own")
    if facts.get("sequence", 1) > 1:
        find(REFUSE, "sequence parallelism", "which ranks share a sample is the model's own affair there")
    if facts.get("autoep") and facts.get("tp", 1) > 1:
        find(REFUSE, "AutoEP folded with tensor parallelism", "its layout of experts is not known here")
    if facts["dp"] == 1:
        find(REFUSE, "data-parallel size 1", "there is nobody to swap samples with")
    for what, key in (("expert-parallel sizes", "ep"), ("numbers of experts", "experts"), ("k", "topk")):
        if len(set(facts[key])) > 1:
            find(REFUSE, "MoE layers of several " + what, "only layers alike are known here")
    if set(facts["ep"]) == {1}:
        find(REFUSE, "ep_size=1", "tokens stay where they are wherever a sample is")
    if facts.get("random_ltd"):
        find(BLIND, "random_ltd", "layers see only some of a sample's tokens")
    if facts.get("curriculum"):
        find(BLIND, "curriculum_learning", "micro-batches have no fixed shape")
    if facts.get("compiled"):
        find(BLIND, "deepcompile", "layers do not run in Python")
    # One sample per rank: none of these matters.
    if facts.get("drop_tokens"):
        find(WARN, "drop_tokens=True",
             "which tokens are dropped depends on the samples of a rank's micro-batch, and alike ones now share it")
    if not facts.get("autoep"):
        find(WARN, "l_aux", "DeepSpeed's balance loss is not linear in the samples of a rank's micro-batch")
    return found


# --- The job ---


def _moe_modules(root: Any) -> List[Tuple[str, Any]]:
    """("classic" | "autoep", module): MoE layers anywhere in a model."""
    import sys
    found = []
    for kind, module, name in (("classic", "deepspeed.moe.layer", "MoE"),
                               ("autoep", "deepspeed.module_inject.auto_ep_layer", "AutoEPMoELayer")):
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None:
            found += [(kind, m) for m in root.modules() if isinstance(m, cls)]
    return found


def _asked(engine: Any, question: str) -> bool:
    """A question that not every version's engine can be asked."""
    method = getattr(engine, question, None)
    try:
        return bool(method()) if callable(method) else False
    except Exception as e:  # a configuration without that section
        say.debug("%s: %s" % (question, e))
        return False


def describe(engine: Any) -> Optional[Tuple[Dict[str, Any], Dict[str, Any]]]:
    """(facts of findings(), what Job.describe() takes and under "observer" what Observer takes); None for a model without
    experts."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import groups
    from deepspeed.utils.bwc import (bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_rank,
                                     bwc_tensor_model_parallel_world_size)
    moes = _moe_modules(engine.module)
    if not moes:
        return None
    tps = bwc_tensor_model_parallel_world_size(groups.mpu)
    tp = bwc_tensor_model_parallel_rank(groups.mpu) if tps > 1 else 0
    experts, topk, eps, drops = [], [], [], False
    for kind, moe in moes:
        inner = moe.deepspeed_moe if kind == "classic" else moe
        experts.append(moe.num_experts)
        topk.append(inner.gate.k if kind == "classic" else moe.top_k)
        eps.append(moe.ep_size)
        drops = drops or (kind == "classic" and inner.gate.drop_tokens)
    dp, dp_size = groups._get_data_parallel_rank(), groups._get_data_parallel_world_size()
    facts = {"dp": dp_size, "ep": eps, "experts": experts, "topk": topk, "drop_tokens": drops, "tp": tps,
             "pipeline": bwc_pipeline_parallel_world_size(groups.mpu),
             "pipeline_engine": type(engine).__name__ == "PipelineEngine",
             "sequence": groups._get_sequence_parallel_world_size(), "autoep": any(kind == "autoep" for kind, _ in moes),
             "random_ltd": _asked(engine, "random_ltd_enabled"), "curriculum": _asked(engine, "curriculum_enabled_legacy"),
             "compiled": _asked(engine, "is_deepcompile_enabled")}
    kind, moe = moes[0]
    group = moe.deepspeed_moe.ep_group if kind == "classic" else moe.ep_group
    if group is None and moe.ep_size > 1:
        raise Unknown("an MoE layer without its expert-parallel group")
    ep_ranks = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
    ep, held = ep_ranks.index(dist.get_rank()), moe.num_local_experts
    description = {
        "dp": dp, "dp_size": dp_size, "share": (tp, tps), "ep_ranks": ep_ranks, "experts": [ep * held + i for i in range(held)],
        "layers": len(moes), "n_experts": moe.num_experts, "topk": topk[0], "framework": "deepspeed " + deepspeed.__version__,
        # Tensor-parallel peers have all tokens and route them alike: one counts.
        "observer": {"gives_counts": tp == 0, "gives_tokens": tp == 0},
    }
    return facts, description


def _built(engine: Any) -> None:
    global _engine
    if _engine is not None and _engine() is not None:
        return say.info("a second DeepSpeed engine in this process is left alone")
    known = describe(engine)
    if known is None:
        return say.info("a model without DeepSpeed's MoE layers: nothing to place in it")
    facts, description = known
    from . import job as jobs
    job = jobs.current()
    if job is None:
        raise Unknown("torch.distributed is not set up")
    _engine = weakref.ref(engine)
    found = findings(facts)
    _warnings[:] = [f for f in found if f.kind == WARN] if job.rank == 0 and job.setting("RAILYARD_PLACEMENT") == "batch" else []
    observer = description.pop("observer")
    _watch.observer = adapt.join(job, found, description, **observer)


# --- The micro-batch ---


def find_tokens(args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
    """The tokens among a forward pass' inputs: by name, else the first tensor of integers with two dimensions; None where
    there is none."""
    import torch

    def is_tokens(x):
        return isinstance(x, torch.Tensor) and x.dim() == 2 and x.dtype in (torch.int64, torch.int32, torch.int16)

    mappings = [kwargs] + [a for a in args if isinstance(a, dict) or hasattr(a, "keys")]
    for mapping in mappings:
        for name in NAMES:
            if name in mapping and is_tokens(mapping[name]):
                return mapping[name]
    for a in args:
        if not isinstance(a, (list, tuple)):
            a = a.values() if hasattr(a, "keys") else [a]
        for x in a:
            if is_tokens(x):
                return x
    for x in kwargs.values():
        if is_tokens(x):
            return x
    return None


def samples_along(tokens: Sequence[int], hidden: Sequence[int]) -> Tuple[bool, bool]:
    """(batch first, sure) of hidden states [..., H], for tokens [b, s]. Unknown where neither fits."""
    b, s = tokens
    lead = list(hidden[:-1])
    if lead == [b, s]:
        return True, b != s or b == 1
    if lead == [s, b]:
        return False, True
    if lead == [b * s]:
        return True, b == 1 or s == 1
    raise Unknown("hidden states of shape %s for tokens of shape %s: which are whose?" % (list(hidden), [b, s]))


def _begin(engine: Any, args: Sequence[Any], kwargs: Dict[str, Any]) -> bool:
    global _tokens
    import torch
    if _engine is None or _engine() is not engine or not engine.module.training or not torch.is_grad_enabled():
        return False
    tokens = find_tokens(args, kwargs)
    if tokens is None:
        raise Unknown("no tokens (integers of two dimensions) among a forward pass' inputs")
    _tokens = (tokens.shape[0], tokens.shape[1])
    if _tokens[0] > 1:
        while _warnings:
            f = _warnings.pop()
            say.warn_once(f.option, "placed training differs slightly from unplaced: " + f.text())
    return _watch.open(tokens)


def _routed(gate: Any, routing: Any, total: int) -> None:
    batch_first, sure = samples_along(_tokens, _hidden if _hidden is not None else [total, 0])
    if not sure:
        say.warn_once("batch first",
                      "samples are taken to lie along the first dimension of MoE layers' inputs: shapes do not tell")
    number = _gates.get(gate)
    if number is None:
        number = _gates[gate] = len(_gates)
    _watch.layer(number, routing, _tokens[0], batch_first)


def _active() -> bool:
    observer = _watch.observer
    return observer is not None and not adapt.compiling() and observer.opened


# --- Wrapping ---


def patch_engine(module: Any) -> None:
    """deepspeed.runtime.engine"""
    engine = module.DeepSpeedEngine

    adapt.wrap(engine, "__init__", adapt.built("DeepSpeed", _built))
    adapt.wrap(engine, "forward", adapt.watched(_watch, _begin))


def _inside(where: Dict[str, int], original: Any) -> Any:
    """An MoE layer's forward, during which the gate's wrapper knows the shape of what came in."""
    def forward(self, *args, **kwargs):
        global _hidden
        if not _active():
            return original(self, *args, **kwargs)
        hidden = adapt.argument(where, "hidden_states", args, kwargs)
        before, _hidden = _hidden, getattr(hidden, "shape", None)
        try:
            return original(self, *args, **kwargs)
        finally:
            _hidden = before
    return forward


def patch_layer(module: Any) -> None:
    """deepspeed.moe.layer"""
    where = adapt.positions(module.MoE.forward, "hidden_states")
    adapt.wrap(module.MoE, "forward", lambda original: _inside(where, original))


def patch_autoep_layer(module: Any) -> None:
    """deepspeed.module_inject.auto_ep_layer"""
    where = adapt.positions(module.AutoEPMoELayer.forward, "hidden_states")
    adapt.wrap(module.AutoEPMoELayer, "forward", lambda original: _inside(where, original))


def patch_gate(module: Any) -> None:
    """deepspeed.moe.sharded_moe"""
    gate = module.TopKGate
    adapt.positions(gate.forward, "input")

    def make_forward(original):
        def forward(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            if _active():
                try:
                    _routed(self, *chosen(result))
                except Exception as e:
                    _watch.failed(e)
            return result
        return forward

    adapt.wrap(gate, "forward", make_forward)


def chosen(result: Any) -> Tuple[Any, int]:
    """(what a gate decided, as Observer.layer() takes it; tokens) of a gate's result: (l_aux, capacity, experts, indices[k,
    T], …), from 0.19.4 on and of Tutel, or (l_aux, weights[T, E, C], mask[T, E, C], counts)."""
    import torch
    if len(result) >= 6:
        indices = result[3]
        indices = torch.stack(list(indices)) if isinstance(indices, (list, tuple)) else indices
        return indices, indices.shape[1]
    if len(result) == 4 and result[2].dim() == 3:
        return result[2].any(dim=2), result[2].shape[0]
    raise Unknown("a gate with a result of %d parts" % len(result))


def patch_router(module: Any) -> None:
    """deepspeed.moe.ep_router"""
    router = module.TokenChoiceTopKRouter

    def make_forward(original):
        def forward(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            if _active():
                try:
                    _routed(self, result[1].t(), result[1].shape[0])
                except Exception as e:
                    _watch.failed(e)
            return result
        return forward

    adapt.wrap(router, "forward", make_forward)


WATCHES = {
    "deepspeed.runtime.engine": patch_engine,
    "deepspeed.moe.layer": patch_layer,
    "deepspeed.moe.sharded_moe": patch_gate,
    "deepspeed.module_inject.auto_ep_layer": patch_autoep_layer,
    "deepspeed.moe.ep_router": patch_router,
}
