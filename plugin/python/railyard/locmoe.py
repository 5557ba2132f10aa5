"""LocMoE's router and losses as torch modules, for those who can change their model. Nothing of Railyard imports this; under
`railyard run` (or with PYTHONPATH as `railyard run --print` shows it) a model says

    from railyard.locmoe import GrapRouter, balance_loss, locality_loss

Owns: the grouped-average-pooling router, its capacity, the load-balancing loss and the locality loss of LocMoE (arXiv 2401.13920),
the bound of LocMoE+ (arXiv 2406.00023). Not: dispatch, experts, communication: each rank looks at its own tokens only. This changes
what a model computes; what keeps results as they are is Railyard's placement (README).
"""

import math
from typing import NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a router decides for tokens [T]."""

    probs: Tensor  # [T, experts], softmax
    expert: Tensor  # [T, top_k], int64, the likeliest first
    weight: Tensor  # [T, top_k], their probabilities
    kept: Tensor  # [T, top_k], bool: there was room at the expert


def grap_weight(experts: int, hidden: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[experts, hidden]: experts / hidden where i · hidden / experts <= j < (i + 1) · hidden / experts, else 0. Rows are orthogonal;
    x @ weight.T is the mean of each expert's own part of x."""
    if not 1 <= experts <= hidden:
        raise ValueError(f"{hidden} numbers cannot be grouped for {experts} experts")
    owner = torch.arange(hidden) * experts // hidden
    return (owner[None, :] == torch.arange(experts)[:, None]).to(dtype) * (experts / hidden)


def affinity(x: Tensor, weight: Tensor) -> Tensor:
    """cos(token, gate), [T, experts]; 0 for tokens that are all zero."""
    return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(weight, dim=-1).T


def capacity_bound(delta: float, hidden: int, experts: int) -> float:
    """LocMoE's lower bound on the capacity factor (1: room for an even share), for large `hidden`: 1 / erfc(sqrt(delta² d / (2 - delta²))),
    delta being the greatest affinity of a token for its expert; at most `experts`, which is room for every token. It assumes
    orthogonal gates and tokens all around: `railyard capacity` says whether yours are so."""
    if not 0 <= delta <= 1:
        raise ValueError(f"delta is a cosine from 0 to 1, not {delta}")
    tail = math.erfc(math.sqrt(delta * delta * hidden / (2 - delta * delta)))
    return min(1 / tail, float(experts)) if tail > 0 else float(experts)


def within_capacity(expert: Tensor, experts: int, capacity: int) -> Tensor:
    """Which of the choices expert[T, k] find room, `capacity` for each expert: all first choices come before all second ones, and
    tokens in order."""
    flat = expert.T.reshape(-1)  # choice by choice
    chosen = nn.functional.one_hot(flat, experts)
    place = (chosen.cumsum(0) * chosen).sum(-1)  # 1: the first to come
    return (place <= capacity).reshape(expert.shape[1], expert.shape[0]).T


class GrapRouter(nn.Module):
    """Grouped average pooling: expert i's logit is the mean of the i-th part of the token. No parameters: gates are fixed and
    orthogonal. `capacity_factor` None: every choice is kept; a number: times the even share; "first": LocMoE's bound from the first
    batch that is seen, and kept (in state_dict). `scale` multiplies the logits; 1 is the paper's."""

    def __init__(self, hidden: int, experts: int, top_k: int = 1, capacity_factor: Union[None, float, str] = None, scale: float = 1.0):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is from 1 to {experts}, not {top_k}")
        if isinstance(capacity_factor, str) and capacity_factor != "first":
            raise ValueError(f"capacity_factor is None, a number or 'first', not {capacity_factor!r}")
        self.hidden, self.experts, self.top_k, self.scale = hidden, experts, top_k, scale
        self.limited = capacity_factor is not None
        self.register_buffer("weight", grap_weight(experts, hidden), persistent=False)
        fixed = 0.0 if capacity_factor in (None, "first") else float(capacity_factor)
        self.register_buffer("capacity_factor", torch.tensor(fixed, dtype=torch.float64))  # 0: not known yet

    def capacity(self, tokens: int) -> int:
        return max(1, math.ceil(float(self.capacity_factor) * tokens * self.top_k / self.experts))

    @torch.no_grad()
    def _learn(self, x: Tensor) -> None:
        delta = float(affinity(x.float(), self.weight.float()).max().clamp(0, 1)) if x.numel() else 0.0
        self.capacity_factor.fill_(capacity_bound(delta, self.hidden, self.experts))

    def forward(self, x: Tensor) -> Routing:
        """x[T, hidden]."""
        if x.dim() != 2 or x.shape[1] != self.hidden:
            raise ValueError(f"tokens are [T, {self.hidden}], not {list(x.shape)}")
        probs = torch.softmax(self.scale * (x @ self.weight.to(x.dtype).T), dim=-1)
        weight, expert = probs.topk(self.top_k, dim=-1)
        kept = torch.ones_like(expert, dtype=torch.bool)
        if self.limited:
            if float(self.capacity_factor) == 0:
                self._learn(x.detach())
            kept = within_capacity(expert, self.experts, self.capacity(x.shape[0]))
        return Routing(probs, expert, weight, kept)


def balance_loss(probs: Tensor, expert: Tensor, alpha: float = 0.01) -> Tensor:
    """alpha · n · Σ f_i P_i: f_i the share of the choices that fell on expert i, P_i its mean probability. Least, alpha, where both are
    even."""
    n = probs.shape[-1]
    share = torch.bincount(expert.reshape(-1), minlength=n).to(probs.dtype) / max(1, expert.numel())
    return alpha * n * (share * probs.mean(0)).sum()


def locality_loss(probs: Tensor, expert_node: Union[Tensor, Sequence[int]], node: int, mu: float = 0.01, spread: float = 0.01,
                  per: str = "expert", mask: Optional[Tensor] = None) -> Tensor:
    """mu · KL(D_c ‖ D_l): D_c is where this rank's tokens go (the mean of probs[T, experts]), D_l where they would if all stayed on their
    node `node`, evenly over its experts; expert_node[e] is the node of expert e. D_l is 0 for all others, and the distance infinite:
    so `spread` of it lies evenly on all experts, as in the report's KL. per="node": experts of one node are alike to it, and only the
    node matters. mask[T]: tokens that count."""
    where = torch.as_tensor(expert_node, device=probs.device)
    if where.shape != (probs.shape[-1],):
        raise ValueError(f"expert_node has the node of each of {probs.shape[-1]} experts, not {list(where.shape)}")
    if not 0 < spread < 1:
        raise ValueError(f"spread is between 0 and 1, not {spread}")
    here = (where == node).to(probs.dtype)
    if not bool(here.any()):
        raise ValueError(f"no expert is on node {node}: LocMoE needs at least one on each")
    if mask is None:
        current = probs.mean(0)
    else:
        m = mask.to(probs.dtype)
        current = (probs * m[:, None]).sum(0) / m.sum().clamp(min=1)
    local = (1 - spread) * here / here.sum() + spread / probs.shape[-1]
    if per == "node":
        _, index = torch.unique(where, return_inverse=True)
        nodes = int(index.max()) + 1
        current = torch.zeros(nodes, dtype=probs.dtype, device=probs.device).index_add(0, index, current)
        local = torch.zeros(nodes, dtype=probs.dtype, device=probs.device).index_add(0, index, local)
    elif per != "expert":
        raise ValueError(f"per is 'expert' or 'node', not {per!r}")
    return mu * (torch.special.xlogy(current, current) - current * local.log()).sum()
