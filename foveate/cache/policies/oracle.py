"""The top-k oracle: each step reads the keys that matter most to its own query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.cache.attend import attend, per_query_head
from foveate.cache.policy import Reader
from foveate.cache.store import RaggedStore
from foveate.cache.view import View


@dataclass(frozen=True)
class OracleTopK(Reader):
    """Looks at the whole cache and then uses, per KV head, only the budget's number of keys with the largest weight
    (summed over the head's group). An upper bound for all that choose keys per step; saves neither memory nor time.

    >>> OracleTopK().reads
    True
    """

    name: ClassVar[str] = "oracle"

    def default_recent(self, amount: int | float, sinks: int) -> int:
        return 1

    def attend(
        self, state: Any, q: Tensor, store: RaggedStore, view: View, tokens: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, Any, int]:
        _, p = attend(q, store, weights=True, **arguments)
        assert p is not None
        batch, heads, n, width = p.shape
        mass = p.view(batch, store.heads, -1, width).sum(2)  # (B, Hkv, S); 0 where nothing is
        mass = mass.masked_fill(~store.valid(), -1.0)
        k = int(tokens.max().clamp(max=width))
        best = mass.topk(k, -1)
        enough = torch.arange(k, device=q.device) < tokens[:, None, None]
        slots = best.indices.where(enough & (best.values >= 0), -1)
        allowed = arguments.get("allowed")
        if allowed is not None:
            at = slots.clamp(min=0).repeat_interleave(heads // store.heads, 1)[:, :, None]  # (B, H, 1, K)
            allowed = per_query_head(allowed, heads, store.heads).expand(batch, heads, n, width).gather(3, at)
        out, _ = attend(q, store, slots=slots, **{**arguments, "allowed": allowed})
        return out, None, int(store.count.sum())

    def reorder(self, state: Any, rows: Tensor) -> Any:
        return state
