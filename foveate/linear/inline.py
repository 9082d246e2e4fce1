"""InLine attention: linear attention that subtracts the mean score instead of dividing by the sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.linear.scan import CHUNK, LinearState, linear_attention

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leakyrelu": F.leaky_relu,  # slope 0.01
    "exp": lambda x: (0.2 * x).exp(),
}


def inline_attention(
    q: Tensor, k: Tensor, v: Tensor, *, feature: str = "identity", scale: float | None = None
) -> Tensor:
    """Injective linear attention of every query to all keys, in linear time.

        w_ij = (c / M) phi(q_i) . (phi(k_j) - kbar) + 1 / M,   kbar = mean of phi(k)
        o_i = sum_j w_ij v_j = vbar + phi(q_i) S,   S = (c / M) sum_j (phi(k_j) - kbar)^T v_j

    Every row of w sums to 1; weights may be negative. With the identity o is an affine function of q, so that different
    queries get different weights where the centred keys span the head; linear attention that divides by the sum cannot
    tell q from 2 q, if phi is homogeneous.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, E), H a multiple of Hkv.
        feature: phi: "identity", "relu", "leakyrelu" or "exp", exp(0.2 x).
        scale: c, default D ** -0.5.

    Returns:
        (B, H, N, E) in q's dtype, computed in at least float32.

    Raises:
        ValueError: shapes that do not fit, an unknown feature.

    Source: Bridging the Divide: Reconsidering Softmax and Linear Attention (2024). Differs: keys are centred before
    they are summed, which is the same and rounds less; grouped heads, and more or fewer keys than queries.

    >>> q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    >>> torch.allclose(inline_attention(q, k, v), inline_weights(q, k) @ v, atol=1e-5)
    True
    """
    phi = _feature(feature)
    _shapes(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    c = q.shape[3] ** -0.5 if scale is None else scale
    queries = phi(q.to(wide)).unflatten(1, (k.shape[1], -1))  # (B, Hkv, H / Hkv, N, D)
    keys, values = phi(k.to(wide)), v.to(wide)
    centred = keys - keys.mean(2, keepdim=True)
    s = (centred * (c / k.shape[2])).mT @ values  # (B, Hkv, D, E)
    out = values.mean(2, keepdim=True).unsqueeze(2) + queries @ s.unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype)


def inline_weights(q: Tensor, k: Tensor, *, feature: str = "identity", scale: float | None = None) -> Tensor:
    """The weights of `inline_attention`, (B, H, N, M): for probes and tests, as they are N x M numbers.

    >>> w = inline_weights(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 7, 4))
    >>> torch.allclose(w.sum(-1), torch.ones(5), atol=1e-5)
    True
    """
    phi = _feature(feature)
    _shapes(q, k, k)
    keys = phi(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    c = q.shape[3] ** -0.5 if scale is None else scale
    return (1 + c * phi(q) @ (keys - keys.mean(2, keepdim=True)).mT) / k.shape[2]


@dataclass(frozen=True, eq=False)
class InLineState:
    """What causal InLine attention remembers of the tokens so far. Immutable.

    Attributes:
        products: sums of phi(k)^T v, (B, Hkv, D, E), and the number of tokens seen.
        k: (B, Hkv, D), sum of phi(k); v: (B, Hkv, E), sum of v.
    """

    products: LinearState
    k: Tensor
    v: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self.products.nbytes + self.k.nbytes + self.v.nbytes


@dataclass(frozen=True)
class CausalInLine:
    """InLine attention of every query to the keys up to its own, from running means; not in the paper.

        w_ij = (c / i) phi(q_i) . (phi(k_j) - kbar_i) + 1 / i,   j <= i,   kbar_i = mean of the first i phi(k)
        o_i = (V_i + c (phi(q_i) S_i - (phi(q_i) . kbar_i) V_i)) / i,   S_i, V_i: running sums of phi(k)^T v and of v

    Args:
        feature, scale: as in `inline_attention`.
        chunk: tokens of a chunk of the scan; no part of the result.

    Called with q (B, H, N, D), k (B, Hkv, N, D) and v (B, Hkv, N, E).

    >>> op, (q, k, v) = CausalInLine(), (torch.randn(1, 2, 50, 8) for _ in range(3))
    >>> out, state = op(q[:, :, :30], k[:, :, :30], v[:, :, :30], state=op.initial_state(q, k, v))
    >>> rest, state = op(q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], state=state)
    >>> torch.allclose(rest[:, :, -1:], inline_attention(q[:, :, -1:], k, v), atol=1e-5), state.nbytes
    (True, 640)
    """

    feature: str = "identity"
    scale: float | None = None
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        _feature(self.feature)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: InLineState | None = None
    ) -> Tensor | tuple[Tensor, InLineState]:
        """out (B, H, N, E); with the state of the tokens before, (out, state after these)."""
        phi = _feature(self.feature)
        _shapes(q, k, v, 0)
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"CausalInLine: as many queries as keys are accepted, got {q.shape[2]} and {k.shape[2]}"
            )
        before = self.initial_state(q, k, v) if state is None else state
        wide = before.k.dtype
        c = q.shape[3] ** -0.5 if self.scale is None else self.scale
        queries, keys, values = phi(q.to(wide)), phi(k.to(wide)), v.to(wide)
        found = linear_attention(
            queries, keys, values, state=before.products, return_state=True, chunk=self.chunk
        )
        products, after = cast("tuple[Tensor, LinearState]", found)
        group = (k.shape[1], -1)
        seen = (
            before.products.position + torch.arange(1, q.shape[2] + 1, device=q.device, dtype=wide)[:, None]
        )
        ksum = before.k.unsqueeze(2) + keys.cumsum(2)  # (B, Hkv, N, D)
        vsum = (before.v.unsqueeze(2) + values.cumsum(2)).unsqueeze(2)  # (B, Hkv, 1, N, E)
        score = (queries.unflatten(1, group) * (ksum / seen).unsqueeze(2)).sum(-1, keepdim=True)
        out = (vsum + c * (products.unflatten(1, group) - score * vsum)) / seen
        out = out.flatten(1, 2).to(q.dtype)
        if state is None:
            return out
        return out, InLineState(after, before.k + keys.sum(2), before.v + values.sum(2))

    def initial_state(self, q: Tensor, k: Tensor, v: Tensor) -> InLineState:
        """The state before the first token, for tensors like q, k and v."""
        products = LinearState.empty(k, v)
        made = products.kv
        return InLineState(
            products, made.new_zeros(*k.shape[:2], k.shape[3]), made.new_zeros(*v.shape[:2], v.shape[3])
        )


def query_confusion(weights: Tensor, eps: float = 1e-6) -> float:
    """Share of the pairs of queries of a head whose rows of weights differ by at most eps, summed over the keys.

    Queries should differ: equal ones are confused by any attention.

    Args:
        weights: (B, H, N, M), N >= 2.

    >>> query_confusion(torch.eye(3)[[0, 1, 1]][None, None])  # one pair of three
    0.3333333333333333
    """
    if weights.ndim != 4 or weights.shape[2] < 2:
        raise ValueError(
            f"query_confusion: weights must be (B, H, N, M) with N >= 2, got {tuple(weights.shape)}"
        )
    n = weights.shape[2]
    apart = torch.cdist(weights, weights, p=1.0)  # (B, H, N, N)
    above = torch.ones(n, n, dtype=torch.bool, device=weights.device).triu(1)
    return float((apart[..., above] <= eps).double().mean())


def local_mass(weights: Tensor, grid: tuple[int, int], radius: int = 1) -> float:
    """Mean total weight that a query gives to the keys at most `radius` rows and columns away, itself included.

    Args:
        weights: (B, H, h w, h w) over a grid in row-major order; they may be negative.
        grid: (h, w).

    >>> round(local_mass(torch.full((1, 1, 16, 16), 1 / 16), (4, 4)), 4)  # (4 * 4 + 8 * 6 + 4 * 9) / 16 of 16 keys
    0.3906
    """
    n = grid[0] * grid[1]
    if weights.ndim != 4 or weights.shape[2:] != (n, n):
        raise ValueError(
            f"local_mass: weights must be (B, H, {n}, {n}) for grid {tuple(grid)}, got {tuple(weights.shape)}"
        )
    if radius < 0:
        raise ValueError(f"local_mass: radius must be >= 0, got {radius}")
    at = torch.arange(n, device=weights.device)
    y, x = at // grid[1], at % grid[1]
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    return float((weights.double() * near).sum(-1).mean())


def _feature(name: str) -> Callable[[Tensor], Tensor]:
    if name not in FEATURES:
        raise ValueError(f"feature must be one of {', '.join(FEATURES)}, got {name!r}")
    return FEATURES[name]


def _shapes(q: Tensor, k: Tensor, v: Tensor, least: int = 1) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or v.ndim != 4
        or q.shape[0] != k.shape[0]
        or q.shape[1] % k.shape[1]
        or q.shape[3] != k.shape[3]
        or k.shape[:3] != v.shape[:3]
        or k.shape[2] < least
    ):
        raise ValueError(
            "q must be (B, H, N, D), k (B, Hkv, M, D) and v (B, Hkv, M, E) with H a multiple of Hkv and "
            f"M >= {least}; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
