"""torch's scaled_dot_product_attention: full and top-left-equal causal attention without extras.

It never receives a mask: with one it does all the dense work, which is what this library exists to avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.normalizers import Softmax
from foveate.core.request import AttentionRequest

name = "sdpa"


def why_not(request: AttentionRequest) -> str | None:
    """The reason why this engine declines, or None."""
    _, _, n, m = request.shape
    if request.kind == "layout":
        return "it runs full and causal attention only (a mask would make it do all the dense work)"
    if request.kind == "causal" and n != m:
        return f"its causal mask is top-left aligned, which differs from ours for {n} queries and {m} keys"
    if request.scores or request.sinks is not None:
        return "it takes no score and no sinks"
    if not isinstance(request.normalizer, Softmax):
        return f"it normalises with Softmax, not with {request.normalizer}"
    if request.dropout_p:
        return "its dropout draws its own mask, not that of dropout_seed"
    return None


def run(request: AttentionRequest) -> tuple[Tensor, None]:
    out = torch.nn.functional.scaled_dot_product_attention(
        request.q,
        request.k,
        request.v,
        is_causal=request.kind == "causal",
        scale=request.scale,
        enable_gqa=request.groups > 1,
    )
    return out, None
