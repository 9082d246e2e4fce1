"""Attention by its definition, twice: element by element in Python, and dense in float64. Shares nothing with
foveate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def loop_attention(q, k, v, allowed=None, *, scale=None, change=None, sinks=None):
    """One weight at a time.

    Args:
        q, k, v: (B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv); computed in Python floats.
        allowed: bool, broadcastable to (B, H, N, M); None = every pair.
        change: function (logit, b, h, i, j) -> logit, applied to the scaled logit.
        sinks: one float per head.

    Returns:
        out (B, H, N, Dv), lse (B, H, N), float64.
    """
    (batch, heads, n, dim), (_, kv_heads, m, _) = q.shape, k.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    seen = torch.ones(1, dtype=torch.bool) if allowed is None else allowed
    seen = torch.broadcast_to(seen, (batch, heads, n, m)).tolist()
    q, k, v = (t.detach().double().tolist() for t in (q, k, v))
    out = torch.zeros(batch, heads, n, len(v[0][0][0]), dtype=torch.float64)
    lse = torch.full((batch, heads, n), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n):
                logits = {}
                for j in range(m):
                    if seen[b][h][i][j]:
                        logit = scale * math.fsum(x * y for x, y in zip(q[b][h][i], k[b][g][j], strict=True))
                        logits[j] = logit if change is None else change(logit, b, h, i, j)
                every = list(logits.values()) + ([] if sinks is None else [float(sinks[h])])
                top = max(every, default=-math.inf)
                if top == -math.inf:
                    continue
                total = math.fsum(math.exp(x - top) for x in every)
                lse[b, h, i] = top + math.log(total)
                for d in range(out.shape[3]):
                    terms = [
                        math.exp(x - top) / total * v[b][g][j][d] for j, x in logits.items() if x > -math.inf
                    ]
                    out[b, h, i, d] = math.fsum(terms)
    return out, lse


def logits64(q: Tensor, k: Tensor, scale: float, scores: tuple = ()) -> Tensor:
    """Scaled and changed logits in float64, (B, H, N, M)."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return change(torch.einsum("bhnd,bhmd->bhnm", q.double(), k) * scale, scores)


def change(logits: Tensor, scores: tuple) -> Tensor:
    """Apply scores, read by their fields only: `cap` (soft-cap) or `tensor` (bias)."""
    for score in scores:
        if hasattr(score, "cap"):
            logits = score.cap * torch.tanh(logits / score.cap)
        else:
            logits = logits + score.tensor.detach().to(logits.dtype)
    return logits


def weights(logits: Tensor, allowed: Tensor | None, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax weights (B, H, N, M), 0 in rows that see nothing, and lse (B, H, N); in the dtype of the
    logits.
    """
    if allowed is not None:
        logits = torch.where(allowed, logits, -math.inf)
    if sinks is not None:
        column = sinks.detach().to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    lse = torch.logsumexp(logits, -1)
    p = (
        torch.softmax(logits, -1).nan_to_num(0.0)
        if bool(torch.isneginf(lse).any())
        else torch.softmax(logits, -1)
    )
    return (p if sinks is None else p[..., :-1]), lse
