"""Attention of new queries to a ragged store, and to the new tokens themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.cache.store import RaggedStore


def attend(
    q: Tensor,
    store: RaggedStore,
    *,
    scale: float,
    allowed: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slots: Tensor | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Exact softmax attention of q (B, H, Q, D) to the tokens of a store; the groups of query heads share a segment
    and nothing is expanded.

    Args:
        scale: factor on the logits.
        allowed: bool (B, H or Hkv or 1, Q, S), entries as in `RaggedStore.padded`; True = may attend. Default: all.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: (H,) logits of a sink that takes weight and gives nothing.
        slots: int64 (B, Hkv, K): attend to these slots of each segment only; -1 = none. ``allowed`` is then
            (B, H or Hkv or 1, Q, K).
        weights: also return the softmax weights.

    Returns:
        (B, H, Q, Dv) in q's dtype, and the weights (B, H, Q, S or K) in the type of the computation, or None. A
        query that may attend to nothing gets 0.
    """
    batch, heads, n, dim = q.shape
    hkv = store.heads
    group = heads // hkv
    exact = working(q.dtype)
    rows = q.reshape(batch * hkv, group * n, dim).to(exact) * scale  # (R, G*Q, D)
    width = store.longest() if slots is None else slots.shape[2]
    may = None
    if allowed is not None:
        may = per_query_head(allowed, heads, hkv).expand(batch, heads, n, width)
        may = may.reshape(batch * hkv, group * n, width)
    sink = None
    if sinks is not None:
        sink = sinks.to(exact).view(1, hkv, group, 1).expand(batch, hkv, group, n).reshape(batch * hkv, -1, 1)
    finish = _Softmax(softcap)
    if slots is not None:
        at, real = _places(store, slots)
        may = real[:, None, :] if may is None else may & real[:, None, :]
        keys, values = store.keys[at].to(exact), store.values[at].to(exact)  # (R, K, D)
        logits = rows @ keys.transpose(1, 2)
        p = finish(logits, may, sink)
        out = p @ values
    elif store.even and width:
        keys, values = (store.rectangle(name).to(exact) for name in ("keys", "values"))
        p = finish(rows @ keys.transpose(1, 2), may, sink)
        out = p @ values
    else:
        p = rows.new_zeros(batch * hkv, group * n, width) if weights else None
        out = rows.new_zeros(batch * hkv, group * n, store.values.shape[1])
        for r in range(batch * hkv):
            span = store.span(r)
            held = span.stop - span.start
            if held == 0:
                continue
            logits = rows[r] @ store.keys[span].to(exact).T  # (G*Q, S_r)
            mine = finish(
                logits, None if may is None else may[r, :, :held], None if sink is None else sink[r]
            )
            out[r] = mine @ store.values[span].to(exact)
            if p is not None:
                p[r, :, :held] = mine
    out = out.view(batch, heads, n, -1).to(q.dtype)
    return out, p.view(batch, heads, n, width) if weights and p is not None else None


def working(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_query_head(mask: Tensor, heads: int, kv_heads: int) -> Tensor:
    """(B, H or Hkv or 1, Q, S) -> (B, H or 1, Q, S)."""
    if mask.shape[1] in (1, heads):
        return mask
    return mask.repeat_interleave(heads // kv_heads, 1)


class _Softmax:
    """Logits to weights, as asked."""

    def __init__(self, softcap: float | None):
        self.softcap = softcap

    def __call__(self, logits: Tensor, may: Tensor | None, sink: Tensor | None) -> Tensor:
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if may is not None:
            logits = logits.masked_fill(~may, -torch.inf)
        if sink is not None:
            return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
        p = torch.softmax(logits, -1)
        return p if may is None else p.nan_to_num(0.0)


def _places(store: RaggedStore, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Flat places (R, K) and which of them are real."""
    each = slots.reshape(len(store.count), -1)
    count = store.count.to(each.device)[:, None]
    real = (each >= 0) & (each < count)
    return store.start.to(each.device)[:, None] + each.clamp(min=0).where(real, 0), real
