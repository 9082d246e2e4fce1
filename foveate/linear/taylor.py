"""Linear attention with the second-order Taylor series of exp as its kernel: feature map and chunked form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.linear.scan import LinearState

SPAN = 8192  # tokens whose features are held at a time


@dataclass(frozen=True)
class TaylorFeatures:
    """A map under which an inner product is the Taylor series of exp to its second order.

        phi(x) = [1, x / f^(1/4), x x^T / sqrt(2 f)],   phi(q) . phi(k) = 1 + z + z^2 / 2,   z = q . k / sqrt(f)

    Args:
        packed: hold each product of two channels once, the mixed ones times sqrt(2): 1 + f + f (f + 1) / 2 numbers
            with the same inner product. False: all f^2 products, in the order of the matrix.

    Source: Simple linear attention language models balance the recall-throughput tradeoff (2024).

    >>> q, k = torch.randn(2, 5, 16)
    >>> features, z = TaylorFeatures(), (q * k).sum(-1) / 4
    >>> torch.allclose((features(q) * features(k)).sum(-1), 1 + z + z**2 / 2, atol=1e-5)
    True
    >>> features(q).shape[-1], TaylorFeatures(packed=False).width(16)
    (153, 273)
    """

    packed: bool = True

    def width(self, dim: int) -> int:
        """Numbers that f = dim channels become."""
        return 1 + dim + (dim * (dim + 1) // 2 if self.packed else dim * dim)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., f) -> (..., width), in at least float32."""
        f = x.shape[-1]
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * f**-0.25
        if self.packed:
            i, j = torch.triu_indices(f, f, device=x.device)  # (f (f + 1) / 2,)
            second = x[..., i] * x[..., j] * x.new_ones(len(i)).masked_fill(i == j, 0.5**0.5)
        else:
            second = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 0.5**0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, second], -1)


def taylor_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-12,
    chunk: int = 64,
    state: LinearState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearState]:
    """Causal attention with weights 1 + z + z^2 / 2 in place of exp(z), in time and memory linear in the tokens.

        o_t = sum_{j <= t} w_tj v_j / (sum_{j <= t} w_tj + eps),   w = 1 + z + z^2 / 2 >= 1/2,   z = q_t . k_j / sqrt(f)

    Inside a chunk the weights are computed as written, from z; what lies before it is read from the state
    S = sum phi(k_j) v_j^T, n = sum phi(k_j), see `TaylorFeatures`. Chunks of one token are the recurrent form, one
    chunk of all tokens the quadratic one. float32 inside for shorter types.

    Args:
        q: (B, H, N, f); k: (B, Hkv, N, f); v: (B, Hkv, N, E); H a multiple of Hkv.
        eps: added to the normaliser.
        chunk: tokens per chunk.
        state: of the tokens before; it is not changed.
        return_state: also return the state after these tokens (always when a state is given).

    Returns:
        (B, H, N, E), or with the state.

    Raises:
        ValueError: shapes that do not fit, chunk < 1.

    Source: Simple linear attention language models balance the recall-throughput tradeoff (2024).

    >>> q, k, v = torch.randn(3, 1, 2, 100, 8)
    >>> whole = taylor_linear_attention(q, k, v)
    >>> first, state = taylor_linear_attention(q[:, :, :70], k[:, :, :70], v[:, :, :70], return_state=True)
    >>> rest, state = taylor_linear_attention(q[:, :, 70:], k[:, :, 70:], v[:, :, 70:], state=state)
    >>> torch.allclose(torch.cat([first, rest], 2), whole, atol=1e-4), state.kv.shape, state.position
    (True, torch.Size([1, 2, 45, 8]), 100)
    """
    if (
        q.ndim != 4
        or k.ndim != 4
        or v.shape[:-1] != k.shape[:-1]
        or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:])
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "taylor_linear_attention: q must be (B, H, N, f), k (B, Hkv, N, f) and v (B, Hkv, N, E) with H a multiple "
            f"of Hkv, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"taylor_linear_attention: chunk must be an int >= 1, got {chunk!r}")
    features = TaylorFeatures()
    want = (*k.shape[:2], features.width(k.shape[3]), v.shape[3])
    if state is not None and (state.kv.shape != want or state.k is None):
        raise ValueError(
            f"taylor_linear_attention: state must hold a normaliser, and state.kv have shape {want}, "
            f"got {tuple(state.kv.shape)}" + ("" if state.k is not None else " without one")
        )
    kept, fresh = state is not None or return_state, state is None
    state = LinearState.empty(features(k[:, :, :0]), v, normalize=True) if state is None else state
    assert state.k is not None
    wide = state.kv.dtype
    total = torch.cat([state.kv, state.k.unsqueeze(-1)], 3)  # (B, Hkv, P, E + 1): S beside n
    parts = []
    for start in range(0, q.shape[2], SPAN):
        span = slice(start, start + SPAN)
        ones = torch.ones_like(v[:, :, span, :1])
        values = torch.cat([v[:, :, span], ones], 3).to(
            wide
        )  # (B, Hkv, n, E + 1): the sum of weights is one more
        query = q[:, :, span].to(wide).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, n, f)
        ends = fresh and start == 0, kept or start + SPAN < q.shape[2]
        out, total = _span(query, k[:, :, span].to(wide), values, total, min(chunk, query.shape[3]), *ends)
        parts.append((out[..., :-1] / (out[..., -1:] + eps)).flatten(1, 2).to(q.dtype))
    out = torch.cat(parts, 2) if parts else v.new_zeros(*q.shape[:3], v.shape[3])
    if not kept:
        return out
    return out, LinearState(total[..., :-1], total[..., -1], state.position + q.shape[2])


def _span(
    q: Tensor, k: Tensor, v: Tensor, before: Tensor, chunk: int, first: bool, last: bool
) -> tuple[Tensor, Tensor]:
    """sum_j w_tj v_j for q (B, Hkv, G, n, f), k (B, Hkv, n, f), v (B, Hkv, n, E), before (B, Hkv, P, E); the sum after.

    first: nothing comes before; last: the sum after is needed.
    """
    n, features = k.shape[2], TaylorFeatures()
    chunks = -(-n // chunk)
    q, k, v = (F.pad(t, (0, 0, 0, chunks * chunk - n)).unflatten(-2, (chunks, chunk)) for t in (q, k, v))
    k, v = k.unsqueeze(2), v.unsqueeze(2)  # (B, Hkv, 1, chunks, c, .)
    z = q @ k.mT * k.shape[-1] ** -0.5  # (B, Hkv, G, chunks, c, c)
    out = (1 + z + z * z / 2).tril() @ v  # (B, Hkv, G, chunks, c, E)
    if chunks == 1 and first and not last:
        return out[..., 0, :n, :], before
    sums = features(k).mT @ v  # (B, Hkv, 1, chunks, P, E); padding has values of 0
    sums = torch.cat([before[:, :, None, None], sums], 3).cumsum(3)
    out = out + features(q) @ sums[:, :, :, :-1]
    return out.flatten(-3, -2)[..., :n, :], sums[:, :, 0, -1]
