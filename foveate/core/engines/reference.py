"""The reference engine: dense, plain, differentiable to any order. It is the definition; every other engine is tested
against it in float64.

    s = scale q k^T  (-> scores)        p = normaliser over the allowed keys and the sink        out = dropout(p) v
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.dropout import keep_mask
from foveate.core.layout import TILE, BlockLayout
from foveate.core.normalizers import Normalizer, ReLU, Sigmoid, Softmax, all_sinks
from foveate.core.request import AttentionRequest

name = "reference"
LIMIT = 1 << 28  # logits (B * H * N * M) it computes without being told to


def why_not(request: AttentionRequest, *, limit: int = LIMIT) -> str | None:
    """The reason why this engine declines, or None."""
    batch, heads, n, m = request.shape
    size = batch * heads * n * m
    if size > limit:
        return (
            f"it is dense and would hold {size} logits (B*H*N*M); its guard is {limit}. Call "
            "foveate.core.engines.reference.dense_attention(..., limit=None) to lift it"
        )
    return None


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    allowed = None if request.kind == "full" else _allowed(request)
    return dense_attention(
        request.q,
        request.k,
        request.v,
        allowed,
        scores=request.scores,
        sinks=request.sinks,
        normalizer=request.normalizer,
        scale=request.scale,
        dropout_p=request.dropout_p,
        dropout_seed=request.dropout_seed,
        limit=None,
    )


def _allowed(request: AttentionRequest) -> Tensor:
    _, _, n, m = request.shape
    if request.kind == "causal":
        rows = torch.arange(n, device=request.q.device)[:, None] + (m - n)
        return (torch.arange(m, device=request.q.device)[None, :] <= rows)[None, None]
    return _dense(request.layout)


def _dense(layout: BlockLayout) -> Tensor:
    """`layout.to_dense()` by torch alone: under a transform such as `torch.func.jvp` no tensor turns into an array."""
    words = torch.cat([layout.dictionary.new_full((1, TILE), -1), layout.dictionary])
    bits = torch.arange(TILE, device=layout.device)
    bitmaps = (words.unsqueeze(-1) >> bits) & 1 != 0  # (n + 1, 64, 64)
    planes, nq, nk = layout.batch * layout.heads, layout.q_tiles, layout.k_tiles
    counts = layout.row_ptr.diff()
    rows = torch.repeat_interleave(torch.arange(planes * nq, device=layout.device), counts)
    tiles = torch.zeros(planes * nq * nk, TILE, TILE, dtype=torch.bool, device=layout.device)
    tiles = tiles.index_copy(0, rows * nk + layout.tile_idx, bitmaps[layout.tile_id.long()])
    dense = (
        tiles.view(layout.batch, layout.heads, nq, nk, TILE, TILE).transpose(3, 4).flatten(4).flatten(2, 3)
    )
    return dense[:, :, : layout.q_len, : layout.k_len]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    *,
    scores: tuple = (),
    sinks: Tensor | None = None,
    normalizer: Normalizer | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    limit: int | None = LIMIT,
) -> tuple[Tensor, Tensor | None]:
    """Attention by its definition.

    Args:
        q, k, v: (B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv).
        allowed: bool, broadcastable to (B, H, N, M), True = may attend; None = everything.
        normalizer: None = Softmax().
        dropout_seed: needed with dropout_p > 0.
        limit: refuse to compute more logits than this; None = no guard.

    Returns:
        out (B, H, N, Dv) in q's dtype, lse (B, H, N) in float32 (float64 for float64 inputs); None with Sigmoid
        and ReLU, which have none.

    Masked keys and values are replaced before any product, so NaN or Inf in them reaches neither the result nor a
    gradient - a masked logit alone would not stop 0 * NaN in p v.
    """
    batch, heads, n, dim = q.shape
    kv_heads, m = k.shape[1], k.shape[2]
    if limit is not None and batch * heads * n * m > limit:
        raise ValueError(
            f"the reference engine would hold {batch * heads * n * m} logits; the limit is {limit}"
        )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = float(dim**-0.5 if scale is None else scale)
    groups = heads // kv_heads
    qw = q.to(wide).unflatten(1, (kv_heads, groups))  # (B, Hkv, G, N, D)
    kw, vw = k.to(wide).unsqueeze(2), v.to(wide).unsqueeze(2)  # (B, Hkv, 1, M, D)
    poisoned = allowed is not None and not (
        torch.isfinite(kw).all() and torch.isfinite(vw).all() and torch.isfinite(qw).all()
    )
    logits = (_products(qw, kw) if poisoned else torch.matmul(qw, kw.transpose(-1, -2))) * scale
    logits = logits.flatten(1, 2)  # (B, H, N, M)
    for score in scores:
        logits = score.apply(_visible(logits, allowed, 0.0))
    p, lse = _weigh(logits, allowed, normalizer or Softmax(), sinks)
    if dropout_p:
        if dropout_seed is None:
            raise ValueError("dropout_p > 0 needs a dropout_seed, got None")
        kept = keep_mask(dropout_seed, dropout_p, batch, heads, n, m, q.device)
        p = torch.where(kept, p / (1 - dropout_p), 0.0)
    grouped = p.unflatten(1, (kv_heads, groups))
    out = torch.matmul(grouped, vw).flatten(1, 2)
    if poisoned and allowed is not None:
        out = _exact_product(p, v.to(wide).repeat_interleave(groups, 1), allowed)
    return out.to(q.dtype), lse


def _weigh(
    logits: Tensor, allowed: Tensor | None, normalizer: Normalizer, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weights (B, H, N, M), exactly 0 where not allowed, and lse (B, H, N) where the normaliser has one."""
    if isinstance(normalizer, Sigmoid):
        shifted = _visible(logits, allowed, 0.0) + normalizer.bias
        return _visible(torch.sigmoid(shifted), allowed, 0.0), None
    if isinstance(normalizer, ReLU):
        return torch.relu(_visible(logits, allowed, 0.0)), None
    sinks = all_sinks(normalizer, None if sinks is None else sinks.to(logits.dtype), logits)
    logits = _visible(logits, allowed, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.view(1, -1, 1, 1))
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top).detach()
    weights = _visible((logits - top).exp(), allowed, 0.0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.view(1, -1, 1, 1) - top).exp()
    blank = total == 0
    safe_total = torch.where(blank, torch.ones_like(total), total)
    lse = torch.where(blank, -torch.inf, top + safe_total.log()).squeeze(-1)
    return weights / safe_total, lse


def _visible(values: Tensor, allowed: Tensor | None, other: float) -> Tensor:
    """`values` where allowed, else `other`; neither values nor their gradients leak from where they are not allowed."""
    return values if allowed is None else torch.where(allowed, values, other)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q k^T whose backward multiplies no NaN or Inf of q or k: 0 * NaN of a masked pair would reach a gradient."""
    clean_q, clean_k = (torch.where(torch.isfinite(t).all(-1, keepdim=True), t, 0.0) for t in (q, k))
    broken = ~torch.isfinite(q).all(-1).unsqueeze(-1) | ~torch.isfinite(k).all(-1).unsqueeze(-2)
    true = torch.matmul(q.detach(), k.detach().transpose(-1, -2))
    return torch.where(broken, true, torch.matmul(clean_q, clean_k.transpose(-1, -2)))


def _exact_product(p: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """p v over allowed pairs only, key by key where v is not finite: 0 * NaN never enters. Not fast; rarely needed."""
    broken = ~torch.isfinite(v).all(-1)  # (B, H, M)
    out = torch.matmul(p.masked_fill(broken.unsqueeze(2), 0.0), v.masked_fill(broken.unsqueeze(-1), 0.0))
    for j in broken.any(0).any(0).nonzero().flatten().tolist():
        sees = torch.broadcast_to(allowed, p.shape)[..., j] & broken[..., j].unsqueeze(-1)  # (B, H, N)
        out = out + p[..., j : j + 1] * torch.where(sees.unsqueeze(-1), v[..., j : j + 1, :], 0.0)
    return out
