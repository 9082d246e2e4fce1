"""Partial attention is a monoid: (out, lse) states over disjoint key sets combine exactly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]  # out (..., N, Dv), lse (..., N) natural logarithm


def merge(states: Iterable[State]) -> State:
    """Combine partial attention results over disjoint sets of keys.

        lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

    Args:
        states: one or more (out, lse) pairs, out (..., N, Dv), lse (..., N), as `attention(..., return_lse=True)`
            returns them. lse = -inf marks a row that saw nothing; its out never contributes, whatever it holds.

    Returns:
        (out, lse) with the dtype of the first out and lse in float32 (float64 for float64 states).

    Raises:
        ValueError: no state, or shapes that do not match.

    Source: the log-sum-exp merge of FlashAttention (2022) and Ring Attention (2023). Stable for any magnitude of lse
    because only differences to the largest one are exponentiated.

    >>> import torch, foveate as fv
    >>> q, k, v = (torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    >>> left = fv.attention(q, k[:, :, :2], v[:, :, :2], return_lse=True)
    >>> right = fv.attention(q, k[:, :, 2:], v[:, :, 2:], return_lse=True)
    >>> torch.allclose(fv.merge([left, right])[0], fv.attention(q, k, v), atol=1e-6)
    True
    """
    items = list(states)
    if not items:
        raise ValueError("merge needs at least one (out, lse) state, got none")
    first_out, first_lse = items[0]
    for number, (out, lse) in enumerate(items):
        if out.shape != first_out.shape or lse.shape != first_lse.shape or out.shape[:-1] != lse.shape:
            raise ValueError(
                f"state {number} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; expected "
                f"{tuple(first_out.shape)} and {tuple(first_out.shape[:-1])}"
            )
    wide = torch.float64 if first_out.dtype == torch.float64 else torch.float32
    lses = torch.stack([lse.to(wide) for _, lse in items])  # (S, ..., N)
    top = lses.amax(0)
    safe = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    weights = (lses - safe).exp()  # (S, ..., N); 0 where a state saw nothing
    total = weights.sum(0)
    mixed = torch.zeros(first_out.shape, dtype=wide, device=first_out.device)
    for (out, _), weight in zip(items, weights, strict=True):
        kept = (weight > 0).unsqueeze(-1)
        mixed = mixed + torch.where(kept, weight.unsqueeze(-1) * out.to(wide), 0.0)
    blank = total == 0
    mixed = mixed / torch.where(blank, torch.ones_like(total), total).unsqueeze(-1)
    lse = torch.where(blank, top, safe + torch.where(blank, torch.ones_like(total), total).log())
    return mixed.to(first_out.dtype), lse
