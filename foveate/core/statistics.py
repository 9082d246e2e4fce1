"""What selectors and measures ask of the attention map, without ever holding it: its block maxima and sums, its columns
and diagonals, its largest entries, and the share of it that a layout keeps.

    P_ij = exp(scale q_i . k_j - lse_i),  lse_i = log sum_j exp(scale q_i . k_j) over the keys that i sees

The log-sum-exp of every row comes from `attention` first; after it any piece of P can be computed by itself. Pieces of
at most `CHUNK` elements (at least one block, or one row where whole rows are needed) are made one after another and
reduced at once; exp is monotone, so a block's maximum needs one exponential. Time grows with N * M, memory with N + M
and the result.

Shapes are those of `attention`: q (B, H, N, D), k (B, Hkv, M, D), query head h reads key head h // (H / Hkv); grouped
keys are never copied to their query heads. Causal maps align the last query with the last key (bottom-right). Numbers
are float32 (float64 for float64 inputs). Nothing here has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.core.attention import attention

if TYPE_CHECKING:
    from foveate.core.request import Who

CHUNK = 1 << 18  # elements of the map that are held at once: what a core's cache holds
HEIGHT = 256  # rows of a piece, where there is a choice
HIDDEN = 1e30  # the log-sum-exp given to a row that sees nothing, so that its entries are 0


# ----------------------------------------------------------------------------------------------- the map in blocks
@torch.no_grad()
def block_map(
    q: Tensor,
    k: Tensor,
    block: int,
    *,
    reduce: str = "max",
    scale: float | None = None,
    is_causal: bool = True,
    lse: Tensor | None = None,
) -> Tensor:
    """The attention map reduced to blocks.

        T_IJ = max (or sum) of P_ij over i in [I c, (I + 1) c), j in [J c, (J + 1) c)

    Blocks count from the first query and the first key, as in `BlockLayout.from_blocks`; the last ones may be short.

    Args:
        block: c, any size >= 1; reduce: "max" or "sum".
        scale, is_causal: as in `attention`.
        lse: (B, H, N), as `attention(..., return_lse=True)` gave it for these q and k; computed when not given.

    Returns:
        (B, H, ceil(N / c), ceil(M / c)), 0 where no pair is seen. Sums of a row of blocks add up to its seeing rows.

    >>> q = k = torch.eye(4)[None, None]
    >>> block_map(q, k, 2, scale=100.0)[0, 0].round().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if reduce not in ("max", "sum"):
        raise ValueError(f"block_map: reduce must be 'max' or 'sum', got {reduce!r}")
    c = _positive("block_map", "block", block)
    q, k, scale = _checked(q, k, scale)
    b, h, n, _ = q.shape
    kv_heads, m = k.shape[1:3]
    out = q.new_zeros(b, kv_heads, h // kv_heads, -(-n // c), -(-m // c))
    for at, row, key, logits in _pieces(q, k, scale, is_causal, lse, c):
        if reduce == "sum":
            small = _pooled(_pooled(logits.exp_(), 2, c, "sum"), 3, c, "sum")  # (h, G, rows / c, keys / c)
        else:
            small = _pooled(_pooled(logits, 2, c, "max"), 3, c, "max").exp_()
        _part(out[at], row // c, key // c, small).copy_(small)
    return out.flatten(1, 2)


def block_pool(x: Tensor, block: int, how: str = "mean") -> Tensor:
    """(..., N, D) -> (..., ceil(N / block), D): mean, max or min of each block; the last one of its real tokens.

    >>> block_pool(torch.tensor([[1.0], [3.0], [7.0]]), 2).flatten().tolist()
    [2.0, 7.0]
    """
    if how not in ("mean", "max", "min"):
        raise ValueError(f"block_pool: how must be 'mean', 'max' or 'min', got {how!r}")
    return _pooled(x, x.ndim - 2, _positive("block_pool", "block", block), how)


def block_scores(
    q: Tensor,
    k: Tensor,
    block: int,
    *,
    scale: float | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Pooled block scores: scale mean(q over block I) . mean(k over block J), -inf where no pair of the blocks is seen.

    Costs (N / block) (M / block) D; blocks as in `block_map`. Has gradients.

    Returns:
        (B, H, ceil(N / block), ceil(M / block)).

    >>> q = k = torch.ones(1, 1, 4, 1)
    >>> block_scores(q, k, 2)[0, 0].tolist()
    [[1.0, -inf], [1.0, 1.0]]
    """
    c = _positive("block_scores", "block", block)
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // max(k.shape[1], 1)
    q, k, scale = _checked(q, k, scale)
    grouped = block_pool(q, c).unflatten(1, (-1, groups)).flatten(2, 3)  # (B, Hkv, G nq, D)
    scores = scale * grouped @ block_pool(k, c).transpose(-1, -2)
    scores = scores.unflatten(2, (groups, -1)).flatten(1, 2)
    return scores.masked_fill(~block_causal(n, m, c, q.device), -torch.inf) if is_causal else scores


def block_causal(n: int, m: int, block: int, device: torch.device | str | None = None) -> Tensor:
    """Bool (ceil(n / block), ceil(m / block)): pairs of blocks in which some query sees some key, bottom-right.

    >>> block_causal(3, 5, 2).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    last = (torch.arange(-(-n // block), device=device) + 1) * block - 1 + m - n
    return last[:, None] >= torch.arange(-(-m // block), device=device) * block


# ------------------------------------------------------------------------------------------- columns and diagonals
@torch.no_grad()
def column_sums(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    lse: Tensor | None = None,
) -> Tensor:
    """How much attention each key gets: sum over i of P_ij, (B, H, M).

    Pass the last queries alone (`q[:, :, -64:]`) to probe with them.

    >>> column_sums(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))[0, 0].tolist()
    [1.5, 0.5]
    """
    return _lines(q, k, scale, is_causal, lse, slashes=False)[0]


@torch.no_grad()
def vertical_slash_sums(
    q: Tensor, k: Tensor, *, scale: float | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Column sums and diagonal (slash) sums of the causal map in one pass.

        vertical_j = sum_i P_ij        slash_d = sum over i of P_ij at distance d = (M - N + i) - j >= 0

    Returns:
        vertical (B, H, M) and slash (B, H, M); each adds up to the number of queries that see a key.

    >>> vertical, slash = vertical_slash_sums(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    >>> vertical[0, 0].tolist(), slash[0, 0].tolist()
    ([1.5, 0.5], [1.5, 0.5])
    """
    return _lines(q, k, scale, True, lse, slashes=True)


def diagonal_sums(strip: Tensor) -> Tensor:
    """(..., R, M) -> (..., R + M - 1): sums over pairs of equal distance d = (M - R + i) - j, from d = 1 - R to M - 1.

    With R - 1 zeros on both sides of each row, key j of row i lies at flat index i W + (R - 1) + j, W = M + 2 (R - 1),
    and the pairs of one distance are W + 1 apart: the diagonals are rows of a strided view.

    >>> diagonal_sums(torch.tensor([[1.0, 2.0, 0.0], [4.0, 8.0, 16.0]]))  # distances -1, 0, 1, 2
    tensor([ 0., 18.,  9.,  4.])
    """
    r, m = strip.shape[-2:]
    count, width = m + r - 1, m + 2 * (r - 1)
    padded = pad(strip, (r - 1, r - 1)).reshape(-1, r, width).contiguous()
    shifted = padded.as_strided((len(padded), r, count), (r * width, width + 1, 1))
    return shifted.sum(1).flip(-1).view(*strip.shape[:-2], count)


# --------------------------------------------------------------------------------------------------- single entries
@torch.no_grad()
def top_keys(
    q: Tensor,
    k: Tensor,
    count: int,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys that weigh most for every query.

    Args:
        count: keys per query, >= 1; at most M are returned.

    Returns:
        keys int64 (B, H, N, min(count, M)), the largest weight first, -1 where a query sees fewer, and their weights P
        (0 there). Which of equally heavy keys comes first is not specified.

    >>> keys, weights = top_keys(torch.ones(1, 1, 3, 1), torch.tensor([5.0, 1.0, 9.0]).view(1, 1, 3, 1), 2)
    >>> keys[0, 0].tolist()
    [[0, -1], [0, 1], [2, 0]]
    """
    count = min(_positive("top_keys", "count", count), k.shape[2])
    q, k, scale = _checked(q, k, scale)
    kv_heads, shape = k.shape[1], (*q.shape[:3], count)
    keys = torch.full(shape, -1, dtype=torch.int64, device=q.device).unflatten(1, (kv_heads, -1))
    weights = q.new_zeros(shape).unflatten(1, (kv_heads, -1))
    for at, row, _, logits in _pieces(q, k, scale, is_causal, lse, 1, whole_rows=True):
        found = logits.topk(min(count, logits.shape[3]))
        seen = found.values > -HIDDEN / 2
        _part(keys[at], row, 0, seen).copy_(torch.where(seen, found.indices, -1))
        _part(weights[at], row, 0, seen).copy_(torch.where(seen, found.values.exp(), 0.0))
    return keys.flatten(1, 2), weights.flatten(1, 2)


# ------------------------------------------------------------------------------------------------- what a layout keeps
@torch.no_grad()
def kept_mass(
    q: Tensor,
    k: Tensor,
    who: Who,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    lse: Tensor | None = None,
) -> Tensor:
    """The share of each query's attention that lies on the pairs of `who`: sum of P_ij over them, (B, H, N).

        kept_i = exp(lse_i over the pairs of `who` - lse_i over all pairs)

    so it costs attention over the layout, and a dense one where no lse is given. A query that sees nothing at all keeps
    all of it (1); one that sees keys of which none are in `who` keeps 0.

    Args:
        who: what `attention` takes as a pattern: a `BlockLayout`, a `Pattern`, a `Selector`, ...; with is_causal only
            its causal pairs count.
        lse: of the dense map, as in `block_map`.
    """
    q, k, scale = _checked(q, k, scale)
    dense = row_lse(q, k, scale=scale, is_causal=is_causal) if lse is None else _lse(q, lse)
    kept = row_lse(q, k, who, scale=scale, is_causal=is_causal)
    mass = (kept - dense).exp().clamp(max=1.0)
    return torch.where(torch.isneginf(dense), torch.ones_like(mass), mass)


def attention_recall(
    q: Tensor,
    k: Tensor,
    who: Who,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    lse: Tensor | None = None,
) -> Tensor:
    """Share of the dense attention map's mass that `who` keeps, per head: the mean of `kept_mass` over queries, (B, H).

    >>> from foveate.core.patterns import SlidingWindow
    >>> q = k = torch.zeros(1, 2, 4, 8)  # uniform attention: 1 + 1 + 2/3 + 1/2 of 4
    >>> [round(share, 4) for share in attention_recall(q, k, SlidingWindow(2))[0].tolist()]
    [0.7917, 0.7917]
    """
    return kept_mass(q, k, who, scale=scale, is_causal=is_causal, lse=lse).mean(-1)


@torch.no_grad()
def row_lse(
    q: Tensor, k: Tensor, who: Who = None, *, scale: float | None = None, is_causal: bool = True
) -> Tensor:
    """log sum_j exp(scale q_i . k_j) over the keys that query i sees, (B, H, N); -inf where it sees none."""
    q, k, scale = _checked(q, k, scale)
    return attention(q, k, k[..., :1], who, is_causal=is_causal, scale=scale, return_lse=True)[1]


# ------------------------------------------------------------------------------------------------------------ pieces
Place = tuple[int, slice, slice]  # batch row, key heads, query heads within each group


def _pieces(
    q: Tensor,
    k: Tensor,
    scale: float,
    is_causal: bool,
    lse: Tensor | None,
    multiple: int,
    *,
    whole_rows: bool = False,
) -> Iterator[tuple[Place, int, int, Tensor]]:
    """(where, first row, first key, scale q k^T - lse as (key heads, group, rows, keys)), -inf at pairs not seen.

    Pieces start at multiples of `multiple`; those in which nothing is seen are left out. The subtraction is part of the
    product: queries have a further element -lse, keys a further 1.
    """
    batch, heads, n, _ = q.shape
    kv_heads, m = k.shape[1:3]
    groups, offset = heads // kv_heads, m - n
    lse = row_lse(q, k, scale=scale, is_causal=is_causal) if lse is None else _lse(q, lse)
    lse = torch.where(torch.isneginf(lse), HIDDEN, lse)
    wider = torch.cat([q * scale, -lse.unsqueeze(-1)], -1).unflatten(
        1, (kv_heads, -1)
    )  # (B, Hkv, G, N, D + 1)
    step = min(kv_heads, max(1, CHUNK // (groups * n * m)))
    share = groups if groups * n * m <= CHUNK else 1
    height = _multiple(
        CHUNK // m if whole_rows else min(HEIGHT, max(CHUNK // m, math.isqrt(CHUNK))), multiple
    )
    width = m if whole_rows else _multiple(CHUNK // min(height, n), multiple)
    for b, head in ((b, head) for b in range(batch) for head in range(0, kv_heads, step)):
        own = slice(head, min(head + step, kv_heads))
        keys = torch.cat([k[b, own], k.new_ones(own.stop - head, m, 1)], -1)  # (h, M, D + 1)
        for g, row in ((g, row) for g in range(0, groups, share) for row in range(0, n, height)):
            queries = wider[b, own, g : g + share, row : row + height]  # (h, g, rows, D + 1)
            rows = queries.shape[2]
            seen = min(m, max(0, -(-(row + rows + offset) // multiple) * multiple)) if is_causal else m
            for key in range(0, seen, width):
                there = keys[:, key : min(key + width, seen)]
                logits = (queries.flatten(1, 2) @ there.transpose(-1, -2)).unflatten(1, (-1, rows))
                low = max(row + offset + 1, key)  # the first key that the first row does not see
                if is_causal and low < key + there.shape[1]:
                    edge = torch.arange(low, key + there.shape[1], device=q.device)
                    at = torch.arange(row + offset, row + offset + rows, device=q.device)
                    logits[..., low - key :].masked_fill_(edge > at[:, None], -torch.inf)
                yield (b, own, slice(g, g + share)), row, key, logits


def _part(whole: Tensor, row: int, column: int, like: Tensor) -> Tensor:
    """The view of `whole` (.., rows, columns) where a piece as large as `like` goes."""
    return whole[..., row : row + like.shape[-2], column : column + like.shape[-1]]


def _multiple(size: int, of: int) -> int:
    return max(of, size // of * of)


def _lines(
    q: Tensor, k: Tensor, scale: float | None, is_causal: bool, lse: Tensor | None, *, slashes: bool
) -> tuple[Tensor, Tensor]:
    q, k, scale = _checked(q, k, scale)
    kv_heads, m, offset = k.shape[1], k.shape[2], k.shape[2] - q.shape[2]
    columns = q.new_zeros(q.shape[0], kv_heads, q.shape[1] // kv_heads, m)
    diagonals = torch.zeros_like(columns)
    for at, row, key, logits in _pieces(q, k, scale, is_causal, lse, 1):
        weights, width = logits.exp_(), logits.shape[3]
        columns[at][..., key : key + width] += weights.sum(2)
        if slashes:
            nearest = row + offset - (key + width - 1)  # distance of the first row and the last key
            skipped = max(0, -nearest)  # distances below 0 hold nothing
            found = diagonal_sums(weights)[..., skipped : m - nearest]
            diagonals[at][..., nearest + skipped : nearest + skipped + found.shape[-1]] += found
    return columns.flatten(1, 2), diagonals.flatten(1, 2)


def _pooled(x: Tensor, dim: int, block: int, how: str) -> Tensor:
    """Blocks along one dimension reduced by "max", "min", "sum" or "mean"; the last one of what it has."""
    reduce = {"max": torch.amax, "min": torch.amin, "sum": torch.sum, "mean": torch.mean}[how]
    whole = x.shape[dim] // block * block
    parts = []
    if whole:
        parts.append(reduce(x.narrow(dim, 0, whole).unflatten(dim, (-1, block)), dim + 1))
    if whole < x.shape[dim]:
        parts.append(reduce(x.narrow(dim, whole, x.shape[dim] - whole), dim, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _lse(q: Tensor, lse: Tensor) -> Tensor:
    if not isinstance(lse, Tensor) or lse.shape != q.shape[:3]:
        got = tuple(lse.shape) if isinstance(lse, Tensor) else type(lse).__name__
        raise ValueError(f"lse must be a tensor {tuple(q.shape[:3])} (batch, heads, queries), got {got}")
    return lse.to(q.dtype)


def _positive(owner: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {name} must be an int >= 1, got {value!r}")
    return value


def _checked(q: Tensor, k: Tensor, scale: float | None) -> tuple[Tensor, Tensor, float]:
    """q and k in float32 (float64 for float64), and the scale."""
    for name, t in (("q", q), ("k", k)):
        if not isinstance(t, Tensor) or t.ndim != 4 or not t.is_floating_point():
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a float tensor (batch, heads, length, dim), got {got}")
    if (
        0 in (*q.shape, *k.shape)
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "q (B, H, N, D) and k (B, Hkv, M, D) must share B and D, with H a multiple of Hkv and no empty dimension; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale must be finite, got {scale}")
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32
    return q.to(wide), k.to(wide), factor
