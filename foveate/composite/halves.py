"""Causal attention from an estimator that knows no mask: halve the sequence again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.core.attention import attention
from foveate.core.layout import BlockLayout
from foveate.core.merge import State
from foveate.core.patterns import Pattern
from foveate.core.scores import Score

Estimate = Callable[[Tensor, Tensor, Tensor], State]


def causal_by_halves(
    q: Tensor, k: Tensor, v: Tensor, estimate: Estimate, *, leaf: int, scale: float | None = None
) -> State:
    """Causal attention whose far part is estimated.

        causal(x1 x2) = causal(x1), merge(causal(x2), estimate(q2, k1, v1))

    The halves x1 and x2 are treated alike, until they are shorter than `leaf`: pieces of leaf to 2 leaf - 1 tokens
    are computed exactly. All pairs of one level are one call of `estimate`, side by side as further heads.

    Args:
        q: (B, H, N, D); k: (B, Hkv, N, D); v: (B, Hkv, N, Dv), H a multiple of Hkv.
        estimate: (q, k, v) -> (out, lse) without a mask, for any number of heads; S queries and S keys.
        leaf: least length of a piece, >= 1.
        scale: factor on q k^T in the exact pieces; default D ** -0.5.

    Returns:
        (out (B, H, N, Dv), lse (B, H, N)), out in float32 (float64 for float64).

    The last N mod 2^levels tokens, with which the halves would not be equal, attend exactly to everything before
    them.

    Source: HyperAttention (2023). Differs: these last tokens, where the paper's code pads with zeros.

    >>> import torch, foveate as fv
    >>> q = k = v = torch.randn(1, 2, 37, 8, generator=torch.Generator().manual_seed(0))
    >>> exact = lambda q, k, v: fv.attention(q, k, v, return_lse=True)
    >>> out, lse = causal_by_halves(q, k, v, exact, leaf=4)
    >>> torch.allclose(out, fv.attention(q, k, v, is_causal=True), atol=1e-5)
    True
    """
    if not isinstance(leaf, int) or leaf < 1:
        raise ValueError(f"leaf must be a positive int (tokens), got {leaf!r}")
    n = q.shape[2]
    if k.shape[2] != n:
        raise ValueError(f"halving needs as many keys as queries, got {n} queries and {k.shape[2]} keys")
    pieces = piece_count(n, leaf)
    even = n - n % pieces
    body = [t[:, :, :even].unflatten(2, (pieces, -1)) for t in (q, k, v)]  # (B, h, pieces, S, d)
    out, lse = partial(*(_as_heads(t) for t in body), is_causal=True, scale=scale)
    out = out.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    while pieces > 1:
        far = estimate(*(_as_heads(t[:, :, i::2]) for t, i in zip(body, (1, 0, 0), strict=True)))
        (out1, out2), (lse1, lse2) = (_alternate(t, pieces) for t in (out, lse))
        out2, lse2 = blend((out2, lse2), far)  # (B, pieces / 2 * h, S, ...)
        out, lse = torch.cat([out1, out2], 2), torch.cat([lse1, lse2], 2)  # (B, pieces / 2 * h, 2 S, ...)
        pieces //= 2
        body = [t.unflatten(2, (pieces, 2)).flatten(3, 4) for t in body]
    if even < n:
        tail, tail_lse = partial(q[:, :, even:], k, v, is_causal=True, scale=scale)
        out, lse = torch.cat([out, tail.to(out.dtype)], 2), torch.cat([lse, tail_lse], 2)
    return out, lse


def partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    who: Pattern | BlockLayout | None = None,
    is_causal: bool = False,
    score: Score | None = None,
    scale: float | None = None,
) -> State:
    """`attention` that returns (out, lse)."""
    found = attention(q, k, v, who, is_causal=is_causal, score=score, scale=scale, return_lse=True)
    assert isinstance(found, tuple)
    return found


def piece_count(n: int, leaf: int) -> int:
    """The power of two by which n tokens are divided: pieces of leaf to 2 leaf - 1 tokens, one where n < 2 leaf.

    >>> [piece_count(n, 4) for n in (3, 7, 8, 15, 16)]
    [1, 1, 2, 2, 4]
    """
    return 1 << max(0, (n // leaf).bit_length() - 1)


def blend(first: State, second: State) -> State:
    """`merge` of two states whose results are finite, in one pass; `first` has seen a key in every row."""
    (out1, lse1), (out2, lse2) = first, second
    share = torch.sigmoid(lse2 - lse1).unsqueeze(-1)
    return torch.lerp(out1, out2.to(out1.dtype), share.to(out1.dtype)), torch.logaddexp(lse1, lse2)


def _as_heads(t: Tensor) -> Tensor:
    """(B, h, pieces, ...) -> (B, pieces * h, ...): grouped heads stay grouped."""
    return t.transpose(1, 2).flatten(1, 2)


def _alternate(t: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """(B, pieces * h, S, ...) -> the even and the odd pieces, (B, pieces / 2 * h, S, ...) each."""
    t = t.unflatten(1, (pieces // 2, 2, -1))
    return t[:, :, 0].flatten(1, 2), t[:, :, 1].flatten(1, 2)
