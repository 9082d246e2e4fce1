"""DuoAttention: the whole context for the heads that retrieve, sinks and recent tokens for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.budget import Budget, top
from foveate.cache.policy import Kept, Policy
from foveate.cache.view import View
from foveate.core.attention import attention
from foveate.core.patterns import Causal, Pattern, PerHead, Sinks, SlidingWindow


@dataclass(frozen=True)
class DuoAttention(Policy):
    """Retrieval heads keep every token, streaming heads ``sink`` first and ``recent`` last ones.

    DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024). Which heads retrieve
    is learned (`foveate.hf.train_head_gates`) or read from a published table (`head_table`). ``recent`` counts the
    query itself, while decoding as in training (the release differs by one between the two). A prompt given in one
    call is attended to densely, as in the release; chunks (`generate(prefill_chunk_size=)`) let streaming heads see
    sinks, recent tokens and their chunk.

    Args:
        retrieval: True for retrieval heads, [layer][KV head].
        sink, recent: tokens of the streaming heads.

    Raises:
        ValueError: not a table of that form; at the cache, a table for another model.

    >>> DuoAttention(((True, False), (False, False)), sink=4, recent=32).share
    0.25
    """

    name: ClassVar[str] = "duo"
    schedule: ClassVar[str | int] = 1
    by_age: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    retrieval: tuple[tuple[bool, ...], ...]
    sink: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        table = tuple(tuple(bool(x) for x in row) for row in self.retrieval)
        if not table or not table[0] or len({len(row) for row in table}) > 1:
            raise ValueError(f"retrieval must be a table [layer][KV head], got {self.retrieval!r}")
        object.__setattr__(self, "retrieval", table)
        if self.sink < 0 or self.recent < 1:
            raise ValueError(f"sink must be >= 0 and recent >= 1, got {self.sink} and {self.recent}")

    @property
    def share(self) -> float:
        """Share of retrieval heads."""
        return sum(map(sum, self.retrieval)) / (len(self.retrieval) * len(self.retrieval[0]))

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        shape = (len(self.retrieval), len(self.retrieval[0]))
        if shape != (layers, kv_heads):
            raise ValueError(
                f"policy 'duo': its table is for {shape[0]} layers of {shape[1]} KV heads, the model has {layers} of "
                f"{kv_heads}"
            )

    def first_tokens(self, budget: Budget) -> int:
        return self.sink

    def first(self, view: View, budget: Budget) -> Kept:
        row = torch.tensor(self.retrieval[view.layer], device=view.keys.device)
        sink = view.valid & (view.positions < view.first[:, None, None] + self.sink)
        limit = torch.where(row, -1, self.sink + self.recent - 1).expand(
            view.keys.shape[:2]
        )  # the next query comes on top
        room = limit.where(limit >= 0, view.keys.shape[2])
        return Kept(top(view.positions, sink, view.valid, room), sink, limit)


def duo_pattern(is_retrieval: Sequence[bool], heads: int, *, sink: int = 64, recent: int = 256) -> Pattern:
    """Causal attention per query head: everything for the groups of retrieval KV heads, else sinks and a window.

    >>> duo_pattern([True, False], 4, sink=2, recent=3).heads
    4
    """
    group = heads // len(is_retrieval)
    if group * len(is_retrieval) != heads:
        raise ValueError(f"heads must be a multiple of {len(is_retrieval)} KV heads, got {heads}")
    streaming = Causal() & (SlidingWindow(recent) | Sinks(sink))
    return PerHead(tuple(Causal() if flag else streaming for flag in is_retrieval for _ in range(group)))


def duo_attention(
    q: Tensor, k: Tensor, v: Tensor, is_retrieval: Sequence[bool], *, sink: int = 64, recent: int = 256
) -> Tensor:
    """(B, H, N, Dv): one call of attention under `duo_pattern`; q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv).

    >>> q, k = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8)
    >>> duo_attention(q, k, k, [True, False], sink=2, recent=8).shape
    torch.Size([1, 4, 50, 8])
    """
    if len(is_retrieval) != k.shape[1]:
        raise ValueError(f"is_retrieval must name {k.shape[1]} KV heads, got {len(is_retrieval)}")
    out = attention(q, k, v, duo_pattern(is_retrieval, q.shape[1], sink=sink, recent=recent))
    assert isinstance(out, Tensor)
    return out


def head_table(text: str, *, threshold: float = 0.5) -> tuple[tuple[bool, ...], ...]:
    """A table of gates, one line per layer and one number per KV head (the form in which the authors publish them), as
    `DuoAttention.retrieval`: True where the gate is at least ``threshold``.

    >>> head_table("0.1 0.9\\n0.7 0.2\\n")
    ((False, True), (True, False))
    """
    rows = [
        [float(x) for x in line.replace(",", " ").split()]
        for line in text.strip().splitlines()
        if line.strip()
    ]
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError("head_table: lines of one length expected, one number per KV head")
    return tuple(tuple(x >= threshold for x in row) for row in rows)
