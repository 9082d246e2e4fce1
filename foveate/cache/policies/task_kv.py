"""Task-KV: the whole prompt for the heads that stand apart, sinks, recent and shared tokens for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.cache.budget import Budget, top
from foveate.cache.policy import Kept, Policy
from foveate.cache.view import View


@dataclass(frozen=True)
class TaskKV(Policy):
    """Splits the heads of each layer, prompt by prompt, by how far their output lies from the layer's mean.

        s_h = mean_i(o_ih) W_O[h]      d_h = || s_h - mean_h s_h ||      (i: the last ``obs_window`` queries)

    The far heads ("heterogeneous") keep every token. The others keep ``n_sink`` first tokens, ``n_recent`` last ones
    and the ``n_mid`` tokens in between that all of them together attend to most: one set for all of them.

    Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads (2025). Fixed here,
    because the abstract leaves it open: o_h is the mean over the observation window; the far heads are the shortest
    list, far first, that holds ``beta`` of all distances (or a fixed fraction, or all before the largest gap); the
    split is over KV heads, by the farthest query head of a group.

    Args:
        obs_window: last queries that are looked at.
        n_sink, n_recent, n_mid: tokens of the heads that are not heterogeneous.
        mode: "cumulative" (``beta``), "fraction" (``head_fraction``) or "gap".

    Raises:
        ValueError: an argument is out of range; at the first prefill, no output projection is found in the model.

    >>> TaskKV(n_mid=64).mode
    'cumulative'
    """

    name: ClassVar[str] = "task_kv"
    schedule: ClassVar[str | int] = 1
    by_age: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = True
    obs_window: int = 32
    n_sink: int = 4
    n_recent: int = 128
    n_mid: int = 128
    mode: Literal["cumulative", "fraction", "gap"] = "cumulative"
    beta: float = 0.5
    head_fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.obs_window < 1:
            raise ValueError(f"obs_window must be >= 1, got {self.obs_window}")
        for name in ("n_sink", "n_recent", "n_mid"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.n_recent < 1:
            raise ValueError("n_recent must be >= 1: the token itself is recent")
        if self.mode not in ("cumulative", "fraction", "gap"):
            raise ValueError(f"mode must be 'cumulative', 'fraction' or 'gap', got {self.mode!r}")
        for name in ("beta", "head_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    @property
    def window(self) -> int:
        return self.obs_window

    def split(self, distances: Tensor) -> Tensor:
        """Bool (B, Hkv): the heterogeneous KV heads, from distances (B, Hkv). Where all distances are 0 the fixed
        fraction decides."""
        order = distances.argsort(stable=True, dim=1, descending=True)
        line = distances.gather(1, order).double()  # far first
        heads = line.shape[1]
        rank = torch.arange(heads, device=line.device)
        by_fraction = (rank < round(self.head_fraction * heads)).expand_as(line)
        if self.mode == "fraction":
            chosen = by_fraction
        elif self.mode == "cumulative":
            reached = line.cumsum(1) - line  # what the heads before hold
            chosen = (reached < self.beta * line.sum(1, keepdim=True)) & (self.beta > 0)
        elif heads > 1:
            gap = (line[:, :-1] - line[:, 1:]).argmax(1, keepdim=True)
            chosen = rank <= gap
        else:
            chosen = by_fraction
        if self.mode != "fraction":
            chosen = torch.where(line.sum(1, keepdim=True) > 0, chosen, by_fraction)
        return torch.zeros_like(chosen).scatter_(1, order, chosen)

    def first_tokens(self, budget: Budget) -> int:
        return self.n_sink

    def first(self, view: View, budget: Budget) -> Kept:
        if view.out_weight is None or view.outputs is None:
            raise ValueError(
                "policy 'task_kv' compares what heads add to the model's state: it needs the layer's output "
                "projection, and none was found under the names o_proj, out_proj, dense, c_proj, wo"
            )
        there = view.query_positions >= 0
        distances = semantic_distances(view.outputs, view.out_weight, there)  # (B, H)
        batch, hkv, slots = view.valid.shape
        far = self.split(distances.view(batch, hkv, -1).amax(2))  # (B, Hkv)
        sink = view.valid & (view.positions < view.first[:, None, None] + self.n_sink)
        recent = view.valid & (view.positions > view.last[:, None, None] - self.n_recent)
        weights = view.weights().sum((2, 3))  # (B, Hkv, S)
        mass = (weights * ~far[:, :, None]).sum(1, keepdim=True).expand(batch, hkv, slots)
        between = view.valid & ~sink & ~recent
        middle = top(
            mass, torch.zeros_like(between), between, torch.full((batch,), self.n_mid, device=mass.device)
        )
        keep = torch.where(far[:, :, None], view.valid, sink | recent | middle)
        pinned = torch.where(far[:, :, None], view.valid, (sink | middle) & ~recent | sink)
        limit = torch.where(far, -1, self.n_sink + self.n_mid + self.n_recent)
        return Kept(keep, pinned, limit)


def semantic_distances(head_out: Tensor, w_o: Tensor, there: Tensor | None = None) -> Tensor:
    """(B, H): distance of each head's contribution from the mean contribution.

    Args:
        head_out: (B, H, W, Dv) outputs of the heads at the last positions. w_o: (H, Dv, d_model).
        there: bool (B, W): positions that exist. A bias of the projection belongs to no head and is left out.
    """
    head_out = head_out.float()
    if there is None:
        mean = head_out.mean(2)
    else:
        count = there.sum(1).clamp(min=1)[:, None, None]
        mean = (head_out * there[:, None, :, None]).sum(2) / count  # (B, H, Dv)
    s = torch.einsum("bhd,hdm->bhm", mean, w_o.float())
    return (s - s.mean(1, keepdim=True)).norm(dim=2)
