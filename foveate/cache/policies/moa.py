"""MoA: sinks and a span of its own for every head, by rules that grow with the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.cache.budget import Budget, top
from foveate.cache.moa import MoAPlan, SpanRule
from foveate.cache.policy import Kept, Policy
from foveate.cache.view import View


@dataclass(frozen=True)
class MoA(Policy):
    """Every KV head keeps ``sink`` first tokens and span(N) latest ones, N the tokens of the prompt.

        span(N) = block * max(1, ceil((alpha + beta N) / block))      (`foveate.cache.SpanRule`)

    MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (2024). The rules are found by
    `foveate.cache.search_spans`; the span counts the query itself and stays what it was for the prompt while tokens
    are generated.

    Args:
        rules: (alpha, beta) of each KV head, [layer][KV head].
        sink, block: as in the plan.

    >>> MoA((((0.0, 0.25), (64.0, 0.0)),), block=1).spans(0, 400)
    [100, 64]
    """

    name: ClassVar[str] = "moa"
    schedule: ClassVar[str | int] = 1
    by_age: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    rules: tuple[tuple[tuple[float, float], ...], ...]
    sink: int = 64
    block: int = 64

    def __post_init__(self) -> None:
        if not self.rules or not self.rules[0] or len({len(row) for row in self.rules}) > 1:
            raise ValueError(f"rules must be a table [layer][KV head] of (alpha, beta), got {self.rules!r}")
        for row in self.rules:
            for rule in row:
                SpanRule(*rule, self.sink, self.block)

    @classmethod
    def of(cls, plan: MoAPlan) -> MoA:
        """The policy of a plan whose rules share sinks and block."""
        flat = [rule for row in plan.rules for rule in row]
        sizes = {(rule.sink, rule.block) for rule in flat}
        if len(sizes) > 1:
            raise ValueError(f"MoA.of: rules with one sink and one block expected, got {sorted(sizes)}")
        ((sink, block),) = sizes
        return cls(tuple(tuple((r.alpha, r.beta) for r in row) for row in plan.rules), sink, block)

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        shape = (len(self.rules), len(self.rules[0]))
        if shape != (layers, kv_heads):
            raise ValueError(
                f"policy 'moa': its plan is for {shape[0]} layers of {shape[1]} KV heads, the model has {layers} of "
                f"{kv_heads}"
            )

    def spans(self, layer: int, n: int) -> list[int]:
        """Latest tokens that each KV head of a layer sees after a prompt of n tokens."""
        return [SpanRule(*rule, self.sink, self.block).span(n) for rule in self.rules[layer]]

    def first_tokens(self, budget: Budget) -> int:
        return self.sink

    def first(self, view: View, budget: Budget) -> Kept:
        spans = [self.spans(view.layer, int(n)) for n in view.seen]
        limit = torch.tensor(spans, device=view.keys.device) + self.sink - 1  # the next query comes on top
        sink = view.valid & (view.positions < view.first[:, None, None] + self.sink)
        return Kept(top(view.positions, sink, view.valid, limit), sink, limit)
