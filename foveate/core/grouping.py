"""Grouped heads in another order: models that interleave the query heads of a key head.

`attention` and every mechanism here read key head h // G with query head h = kv G + g ("grouped", G = H / Hkv). Where a
model numbers its query heads h = g Hkv + kv ("interleaved"), they are put in groups before and back after:

    out = to_interleaved(attention(from_interleaved(q, Hkv), k, v, FlexPrefill()), Hkv)
"""

from __future__ import annotations

from torch import Tensor


def from_interleaved(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, ...) with head g Hkv + kv -> the same heads at kv G + g.

    >>> import torch
    >>> from_interleaved(torch.arange(6).view(1, 6), 2).tolist()  # 0, 2, 4 read key head 0
    [[0, 2, 4, 1, 3, 5]]
    """
    return _turned(x, kv_heads, "from_interleaved", (-1, kv_heads))


def to_interleaved(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, ...) with head kv G + g -> the same heads at g Hkv + kv, the inverse of `from_interleaved`.

    >>> import torch
    >>> to_interleaved(from_interleaved(torch.arange(6).view(1, 6), 2), 2).tolist()
    [[0, 1, 2, 3, 4, 5]]
    """
    return _turned(x, kv_heads, "to_interleaved", (kv_heads, -1))


def _turned(x: Tensor, kv_heads: int, owner: str, sizes: tuple[int, int]) -> Tensor:
    if x.ndim < 2 or kv_heads < 1 or x.shape[1] % kv_heads:
        raise ValueError(
            f"{owner}: shape {tuple(x.shape)} and kv_heads {kv_heads}; accepted: (batch, heads, ...) with heads a "
            "multiple of kv_heads"
        )
    return x.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)
