"""Complex-vector heads in a trained rotary model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.layers.complex_attention import complex_turn


class ComplexHeads(nn.Module):
    """The learnt angles of one attention module: delta (key heads, D/2), 1 at first, and angle (heads, D/2), 0."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.delta = nn.Parameter(torch.ones(kv_heads, head_dim // 2, dtype=like.dtype, device=like.device))
        self.angle = nn.Parameter(torch.zeros(heads, head_dim // 2, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor, queries: bool) -> Tensor:
        """What a projection returns, (B, N, heads * D) or (B, N, heads, D), turned."""
        delta = self.delta.repeat_interleave(self.heads // self.kv_heads, 0) if queries else self.delta
        turned = complex_turn(
            x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2), delta, self.angle if queries else None
        )
        return turned.transpose(1, 2).reshape(x.shape)


def convert_rope_model(model: PreTrainedModel) -> list[ComplexHeads]:
    """Give every attention module of a rotary model complex-vector heads that change nothing at first.

    Queries and keys are turned behind their projections (or norms), before the model's own rotation of halves, with
    which the turn commutes. The angles become parameters of the model (`self_attn.complex_heads`): they are in its
    state_dict, and are trained with it, or alone by the parameters of the returned modules.

    Raises:
        TypeError: not a transformers model. ValueError: no attention modules with `q_proj`, `k_proj` and `head_dim`, or
            one that was converted before.

    Source: ComplexFormer (2025).

    >>> from foveate import organisms
    >>> model, tokenizer = organisms.load("reader")
    >>> ids = torch.tensor([tokenizer.encode("import os")])
    >>> before = model(ids).logits
    >>> heads = convert_rope_model(model)
    >>> torch.allclose(model(ids).logits, before, atol=1e-3), sum(p.numel() for p in heads[0].parameters())
    (True, 192)
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    found = [m for m in model.modules() if all(hasattr(m, name) for name in ("q_proj", "k_proj", "head_dim"))]
    if not found or not any(path.split(".")[-1] == "rotary_emb" for path, _ in model.named_modules()):
        raise ValueError(
            f"{type(model).__name__} has no rotary attention modules with q_proj, k_proj and head_dim"
        )
    if any(hasattr(m, "complex_heads") for m in found):
        raise ValueError(f"{type(model).__name__} has complex heads already")
    return [_convert(m) for m in found]


def _convert(module: Any) -> ComplexHeads:
    like, d = module.q_proj.weight, module.head_dim
    heads = ComplexHeads(like.shape[0] // d, module.k_proj.weight.shape[0] // d, d, like)
    module.complex_heads = heads
    for name, queries in (("q", True), ("k", False)):
        last = getattr(module, f"{name}_norm", None) or getattr(module, f"{name}_proj")
        last.register_forward_hook(lambda _, args, out, queries=queries: heads(out, queries))
    return heads
