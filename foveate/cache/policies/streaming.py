"""StreamingLLM: the first tokens and the latest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.cache.budget import Budget, top
from foveate.cache.policy import Kept, Policy
from foveate.cache.view import View


@dataclass(frozen=True)
class Streaming(Policy):
    """Sinks and a window: every head keeps the budget's ``sinks`` first tokens and, of the others, the latest.

    Efficient Streaming Language Models with Attention Sinks (2023). Differs: tokens keep the positions they had in the
    sequence; the paper renumbers them within the cache.

    >>> Streaming()
    Streaming()
    """

    name: ClassVar[str] = "streaming"
    schedule: ClassVar[str | int] = 1
    by_age: ClassVar[bool] = True

    def default_recent(self, amount: int | float, sinks: int) -> int:
        return 1

    def first(self, view: View, budget: Budget) -> Kept:
        limit = budget.tokens(view.seen)[:, None].expand(view.keys.shape[:2])
        return sinks_and_recent(view, budget, limit)

    def limit(self, layer: int, seen: Tensor, limit: Tensor, budget: Budget) -> Tensor:
        return budget.tokens(seen)[:, None].expand_as(limit)


def sinks_and_recent(view: View, budget: Budget, limit: Tensor) -> Kept:
    """Sinks pinned, and the latest tokens up to ``limit`` (B, Hkv); -1 = everything."""
    sink, _ = budget.protect(view.positions, view.valid, view.first, view.last)
    room = limit.where(limit >= 0, view.keys.shape[2])
    keep = top(view.positions, sink, view.valid, room)
    return Kept(keep, sink, limit)
