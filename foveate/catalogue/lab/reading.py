"""The shipped reader with its attention taken over by a function, to look at its queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Attending = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v (batch, heads, tokens, D) -> out


@cache
def reader() -> Any:
    """The model alone; its tokens are bytes."""
    from foveate import organisms

    return organisms.load("reader")[0].requires_grad_(False)


@contextmanager
def attending(model: Any, attend: Attending) -> Iterator[None]:
    """Run a transformers model with `attend` in place of its attention; q and k are rotated, heads grouped."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def run(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        return attend(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register("foveate_lab", run)
    AttentionMaskInterface.register("foveate_lab", lambda *_, **__: None)
    model.set_attn_implementation("foveate_lab")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def excerpts(count: int, tokens: int, seed: int) -> Tensor:
    """Held-out text of the standard library from the start of a line: int64 (count, tokens)."""
    from foveate.organisms.reader import data

    text = np.frombuffer(data.stdlib_text(held_out=True), np.uint8)
    starts = np.flatnonzero(text[: len(text) - tokens - 1] == 10) + 1
    picked = np.random.default_rng([seed, tokens]).choice(starts, count, replace=False)
    return torch.from_numpy(np.stack([text[s : s + tokens] for s in picked]).astype(np.int64))
