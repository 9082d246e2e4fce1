"""The queries, keys and values of a transformers model's own layers, and another function in place of its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v, scale -> out (B, H, N, Dv)
NAME = "foveate-laboratory"


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """Run the causal layers of a model on `attend`, given rotated queries (B, H, N, D) and keys (B, Hkv, N, D).

    For prompts without padding and without a cache: the model's mask is not looked at.
    """
    from transformers import AttentionInterface

    def forward(module, query, key, value, attention_mask, scaling=None, **_):
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, scale).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, forward)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def captured(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of every layer for ids (n,), in order; the layers run exact causal attention."""
    from foveate.core.attention import attention

    found = []

    def listen(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        found.append((q, k, v))
        out = attention(q, k, v, is_causal=True, scale=scale)
        assert isinstance(out, Tensor)
        return out

    with attending(model, listen):
        model(input_ids=ids[None], use_cache=False)
    return found
