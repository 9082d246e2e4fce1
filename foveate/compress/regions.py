"""Summaries of regions: one pooled key each, and the attention of a pooled query inside the region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POOLS = ("max", "mean")


def region_summaries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | Sequence[int],
    lengths: Tensor | Sequence[int],
    *,
    pool: str = "max",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A key and a value for each run of tokens R_r = starts[r] .. starts[r] + lengths[r] - 1.

        kappa_r = pool_{j in R_r} k_j        rho_r = pool_{j in R_r} q_j        (elementwise)
        u_r = sum_{j in R_r} softmax_j(scale rho_r . k_j) v_j

    A query that reads (kappa_r, u_r) as one key and value reaches every token of the region, at the price of one.

    Args:
        q: (B, H, N, D); k: (B, Hkv, N, D); v: (B, Hkv, N, Dv), H a multiple of Hkv; floating point.
        starts, lengths: int (R,), R >= 1; regions lie inside the tokens, hold at least one, and may overlap.
        pool: "max" or "mean".
        scale: factor on rho k^T; default D ** -0.5.

    Returns:
        kappa (B, Hkv, R, D) in the dtype of k, u (B, H, R, Dv) in the dtype of v. Both carry gradients.

    Cost: the tokens of all regions together, in time and memory. Regions of one length that follow each other are
    read in place; others are gathered. Logits and weights are float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, regions outside the tokens, an unknown pool.

    Source: Combiner: Full Attention Transformer with Sparse Computation Cost (2021).

    >>> q = k = torch.tensor([0.0, 0.0, 3.0]).view(1, 1, 3, 1)
    >>> v = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 3, 1)
    >>> kappa, u = region_summaries(q, k, v, [0, 2], [2, 1])
    >>> kappa.flatten().tolist(), u.flatten().tolist()
    ([0.0, 3.0], [1.5, 5.0])
    """
    check_tokens(q, k, v)
    check_pool(pool)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    start, length = (_ints(name, x) for name, x in (("starts", starts), ("lengths", lengths)))
    if len(start) != len(length):
        raise ValueError(f"starts and lengths must be as many, got {len(start)} and {len(length)}")
    if int(length.min()) < 1 or int(start.min()) < 0 or int((start + length).max()) > q.shape[2]:
        raise ValueError(
            f"regions must hold at least 1 of the {q.shape[2]} tokens and lie inside them; got starts from "
            f"{int(start.min())}, lengths from {int(length.min())}, ends up to {int((start + length).max())}"
        )
    found, order = [], []
    for size in length.unique().tolist():
        at = (length == size).nonzero().squeeze(1)
        cells = [_cells(x, start[at], size) for x in (q, k, v)]
        found.append(_summaries(cells[0], cells[1], cells[2], pool, factor))
        order.append(at)
    back = torch.cat(order).argsort().to(q.device)
    kappa, u = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return (kappa, u) if len(found) == 1 else (kappa[:, :, back], u[:, :, back])


def _summaries(q: Tensor, k: Tensor, v: Tensor, pool: str, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, R, L, D), k and v (B, Hkv, R, L, ..) -> kappa (B, Hkv, R, D), u (B, H, R, Dv)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rho, kappa = (x.amax(3) if pool == "max" else x.to(wide).mean(3) for x in (q, k))
    rho = rho.to(wide).unflatten(1, (k.shape[1], -1)) * scale  # (B, Hkv, H / Hkv, R, D)
    p = torch.einsum("bgerd,bgrld->bgrel", rho, k.to(wide)).softmax(-1)
    u = torch.einsum("bgrel,bgrld->bgerd", p, v.to(wide)).flatten(1, 2)
    return kappa.to(k.dtype), u.to(v.dtype)


def _cells(x: Tensor, starts: Tensor, size: int) -> Tensor:
    """(B, h, N, d) -> (B, h, R, size, d), a view where the regions follow each other."""
    first, count = int(starts[0]), len(starts)
    if torch.equal(starts, first + size * torch.arange(count)):
        return x.narrow(2, first, size * count).unflatten(2, (count, size))
    index = starts[:, None] + torch.arange(size)
    return x.index_select(2, index.flatten().to(x.device)).unflatten(2, (count, size))


def _ints(name: str, x: Tensor | Sequence[int]) -> Tensor:
    x = torch.as_tensor(x)
    if x.ndim != 1 or not len(x) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(
            f"{name} must be integers (R,), R >= 1; got shape {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}"
        )
    return x.long().cpu()


def check_pool(pool: str) -> None:
    """ValueError unless it is one of `POOLS`."""
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q, k and v belong to the same tokens, with grouped heads."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.ndim != 4 or 0 in t.shape or not t.is_floating_point():
            got = f"{tuple(t.shape)}, {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"{name} must be a floating-point tensor (batch, heads, length, dim), none 0; got {got}"
            )
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q (B, H, N, D) and k (B, Hkv, N, D) must share B, N and D, with heads H a multiple of Hkv; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must share batch, heads and length; got {tuple(k.shape)} and {tuple(v.shape)}"
        )
