"""Recycled attention: a full step now and then, and in between the keys that it attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from foveate.cache.attend import attend, per_query_head
from foveate.cache.policy import Reader
from foveate.cache.store import RaggedStore
from foveate.cache.view import View


@dataclass(frozen=True)
class _State:
    slots: Tensor  # (B, Hkv, K) int64, -1 = none: the recycled keys
    query: Tensor  # (B, H, D): of the last full step
    step: int


@dataclass(frozen=True)
class Recycled(Reader):
    """Nothing is evicted. Every ``stride``-th step attends to the whole cache and notes the budget's number of keys
    with the largest weight; the steps in between attend to those and to the new token, which joins them while the
    one with the least weight leaves. A token that left comes back at the next full step if it matters again.

        full step:      C = top-K of  max over the group's query heads of softmax(q k^T)
        recycled step:  attend to C and the new token;  C <- C + new - argmin weight

    Recycled Attention: Efficient inference for long-context language models (2024). Memory is not reduced, what is read
    per step is (`foveate.hf.Held.keys_read`). The paper's GQA reduction is not known; this takes the maximum, or the
    mean.

    Args:
        stride: a full step every so many ("fixed").
        when: "fixed", or "dynamic": every ``check_every`` steps the layer's query is compared with that of its last
            full step, and a mean cosine over the heads below ``similarity`` makes the step a full one. The layers
            decide by themselves; in a batch one row below is enough.
        gqa: "max" or "mean" over the query heads of a group.

    >>> Recycled(stride=10).stride
    10
    """

    name: ClassVar[str] = "recycled"
    stride: int = 50
    when: Literal["fixed", "dynamic"] = "fixed"
    check_every: int = 5
    similarity: float = 0.8
    gqa: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        for name in ("stride", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.when not in ("fixed", "dynamic"):
            raise ValueError(f"when must be 'fixed' or 'dynamic', got {self.when!r}")
        if self.gqa not in ("max", "mean"):
            raise ValueError(f"gqa must be 'max' or 'mean', got {self.gqa!r}")

    @property
    def window(self) -> int:
        return 1

    def default_recent(self, amount: int | float, sinks: int) -> int:
        return 1

    def begin(self, view: View, store: RaggedStore, tokens: Tensor) -> _State:
        """The row of the last prompt token is the first full step. Slots of the view are those of the store."""
        p = view.weights(1)[:, :, :, 0]  # (B, Hkv, G, S)
        return _State(self._top(self._reduce(p), view.valid, tokens), view.queries[:, :, -1], 0)

    def attend(
        self, state: Any, q: Tensor, store: RaggedStore, view: View, tokens: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, Any, int]:
        batch, heads = q.shape[:2]
        step = state.step + 1
        if self._full(state, q, step):
            out, p = attend(q, store, weights=True, **arguments)
            assert p is not None
            slots = self._top(self._reduce(p.view(batch, store.heads, -1, p.shape[3])), store.valid(), tokens)
            return out, _State(slots, q[:, :, 0], step), int(store.count.sum())
        newest = (store.count.view(batch, store.heads, 1) - 1).to(q.device)
        slots = torch.cat([state.slots, newest], 2)
        allowed = arguments.get("allowed")
        if allowed is not None:
            at = slots.clamp(min=0).repeat_interleave(heads // store.heads, 1)[:, :, None]
            whole = per_query_head(allowed, heads, store.heads)
            allowed = whole.expand(batch, heads, 1, whole.shape[3]).gather(3, at)
        out, p = attend(q, store, slots=slots, weights=True, **{**arguments, "allowed": allowed})
        assert p is not None
        mass = self._reduce(p.view(batch, store.heads, -1, p.shape[3]))
        read = int((slots >= 0).sum())
        mass = mass.masked_fill(slots < 0, -1.0)
        mass[:, :, -1] = torch.inf  # never the token just added
        room = tokens.clamp(min=1)[:, None].to(q.device) >= (slots >= 0).sum(
            2
        )  # (B, Hkv): nobody has to leave
        out_at = mass.masked_fill(slots < 0, torch.inf).argmin(2, keepdim=True)
        slots = torch.where(room[:, :, None], slots, slots.scatter(2, out_at, -1))
        return out, _State(_packed(slots, int(tokens.max())), state.query, step), read

    def reorder(self, state: Any, rows: Tensor) -> Any:
        if state is None:
            return None
        rows = rows.to(state.slots.device)
        return _State(state.slots[rows], state.query[rows], state.step)

    def _full(self, state: _State, q: Tensor, step: int) -> bool:
        if self.when == "fixed":
            return step % self.stride == 0
        if step % self.check_every:
            return False
        cosine = torch.nn.functional.cosine_similarity(q[:, :, 0].float(), state.query.float(), dim=2).mean(1)
        return bool((cosine < self.similarity).any())

    def _reduce(self, p: Tensor) -> Tensor:
        """(B, Hkv, G, S) -> (B, Hkv, S)."""
        return p.amax(2) if self.gqa == "max" else p.mean(2)

    def _top(self, mass: Tensor, valid: Tensor, tokens: Tensor) -> Tensor:
        """(B, Hkv, K) slots of the largest, -1 behind them."""
        k = int(tokens.max().clamp(max=mass.shape[2]))
        best = mass.masked_fill(~valid, -1.0).topk(k, 2)
        enough = torch.arange(k, device=mass.device) < tokens[:, None, None].to(mass.device)
        return best.indices.where(enough & (best.values >= 0), -1)


def _packed(slots: Tensor, width: int) -> Tensor:
    """Real slots first, at most ``width`` of them."""
    order = (slots < 0).to(torch.int8).argsort(stable=True, dim=2)[:, :, : max(width, 1)]
    return slots.gather(2, order)


def recycled_mask(q: Tensor, k: Tensor, keep: int, stride: int, *, scale: float | None = None) -> Tensor:
    """Bool (B, H, N, N): what each row of a sequence may see under recycling, for training and teaching (N x N).

    Rows at multiples of ``stride`` see everything before them; row i sees the ``keep`` largest columns of row
    floor(i / stride) * stride and the tokens after that row. (While generating, tokens also leave between full steps.)

    >>> q = k = torch.randn(1, 1, 9, 4)
    >>> recycled_mask(q, k, 2, 4)[0, 0].sum(1).tolist()
    [1, 2, 3, 4, 5, 3, 4, 5, 9]
    """
    batch, heads, n, dim = q.shape
    group = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().expand(batch, heads, n, n).clone()
    for full in range(0, n, stride):
        end = min(full + stride, n)
        rows = q[:, :, full].reshape(batch, k.shape[1], group, dim).float() @ k[
            :, :, : full + 1
        ].float().transpose(2, 3)
        best = (rows * scale).reshape(batch, heads, full + 1).topk(min(keep, full + 1), 2).indices  # pyright: ignore[reportOperatorIssue]
        kept = torch.zeros(batch, heads, full + 1, dtype=torch.bool, device=q.device).scatter_(2, best, True)
        mask[:, :, full + 1 : end, : full + 1] = kept[:, :, None]
    return mask
