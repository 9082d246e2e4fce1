"""Combiner: near tokens one by one, each far region through one summary, so that every token is reached."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.compress.regions import check_pool, check_tokens, region_summaries
from foveate.core.attention import attention
from foveate.core.layout import TILE
from foveate.core.merge import State, merge
from foveate.core.patterns import Packed, Pattern
from foveate.core.patterns.base import verdict
from foveate.core.scores.bias import Bias

PATTERNS = ("fixed", "logsparse", "axial_row", "axial_col")


def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: str = "fixed",
    segment: int | None = None,
    grid: tuple[int, int] | None = None,
    causal: bool = True,
    pool: str = "max",
    size_term: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention whose support is everything, at the cost of a sparse pattern.

    The tokens that query i may see are split into a direct set D_i and regions, each read through its summary
    (kappa_r, u_r) of `region_summaries`:

        o_i = (sum_{j in D_i} e^{s q_i.k_j} v_j + sum_r e^{s q_i.kappa_r} u_r) / Z_i
        Z_i = sum_{j in D_i} e^{s q_i.k_j} + sum_r e^{s q_i.kappa_r}

    that is, token j of region r gets the weight e^{s q_i.kappa_r} / Z_i times its share of u_r.

    Args:
        q: (B, H, N, D); k: (B, Hkv, N, D); v: (B, Hkv, N, Dv), H a multiple of Hkv. Region keys are made per key
            head, region values per query head.
        pattern: which D_i and regions.
            "fixed": segments of `segment` tokens, by default ceil(sqrt N); one's own is direct, the others are
            regions. N sqrt N.
            "logsparse": leaves of `segment` tokens, by default 1; one's own is direct. The others are joined to blocks
            of 1, 2, 4, .. leaves, one for each binary digit 1 of the leaf's number (without a mask: of every digit,
            the block beside one's own). N log N.
            "axial_row": tokens are a grid in row-major order; "fixed" with rows as segments.
            "axial_col": one's own column is direct; every other column is a region, as far as it has been written.
        segment: of "fixed" and "logsparse".
        grid: (rows, columns) of the axial patterns; under a causal mask its last row need not be full.
        causal: token i sees 0 .. i; else all. Segments are then cut at the end of the sequence.
        pool: "max" or "mean", of the keys and queries of a region.
        size_term: add log(tokens of the region) to a region's logit, so that equal keys weigh what they do in full
            attention. Not the paper's.
        scale: s, default D ** -0.5.

    Returns:
        (B, H, N, Dv) in the dtype of q, with gradients to q, k and v.

    Memory is that of q, k and v and of the summaries, logits aside: "logsparse" and causal "axial_col" have as many
    summaries as tokens, and repeat their keys for the query heads of a group.

    Raises:
        ValueError: shapes that do not fit, an unknown pattern or pool, a segment or grid that does not apply.

    Source: Combiner: Full Attention Transformer with Sparse Computation Cost (2021). "fixed" and "logsparse" are the
    released code's; the axial patterns are simpler ones than its axial layers, without weights of their own. Differs:
    mean pooling and `size_term`; segments of any length; the leaves of "logsparse"; no cache for generation.

    >>> q = k = v = torch.randn(1, 2, 100, 8, generator=torch.Generator().manual_seed(0))
    >>> combiner_attention(q, k, v).shape
    torch.Size([1, 2, 100, 8])
    >>> full = attention(q, k, v, is_causal=True)
    >>> torch.allclose(combiner_attention(q, k, v, segment=1), full, atol=1e-5)
    True
    """
    check_tokens(q, k, v)
    check_pool(pool)
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    for name, flag in (("causal", causal), ("size_term", size_term)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be a bool, got {flag!r}")
    n = q.shape[2]
    how = _How(causal, pool, size_term, q.shape[3] ** -0.5 if scale is None else scale)
    if pattern in ("fixed", "logsparse"):
        if grid is not None:
            raise ValueError(f"grid applies to the axial patterns, got {grid!r} with {pattern!r}")
        if segment is None:
            segment = math.isqrt(n - 1) + 1 if pattern == "fixed" else 1
        if type(segment) is not int or segment < 1:
            raise ValueError(f"segment must be a positive int (tokens), got {segment!r}")
        return (_fixed if pattern == "fixed" else _logsparse)(q, k, v, min(segment, n), how)
    if segment is not None:
        raise ValueError(f"segment applies to fixed and logsparse, got {segment!r} with {pattern!r}")
    rows, columns = _grid(grid, n, causal)
    if pattern == "axial_row":
        return _fixed(q, k, v, min(columns, n), how)
    if causal:
        return _written_columns(q, k, v, rows, columns, how)
    q, k, v = (x.unflatten(2, (rows, columns)).transpose(2, 3).flatten(2, 3) for x in (q, k, v))
    out = _fixed(q, k, v, rows, how)
    return out.unflatten(2, (columns, rows)).transpose(2, 3).flatten(2, 3)


@dataclass(frozen=True)
class _How:
    causal: bool
    pool: str
    size_term: bool
    scale: float


@dataclass(frozen=True, repr=False)
class OtherSegments(Pattern):
    """Query i may see summary r iff r is not the segment floor(i / segment); with `causal` iff it is earlier.

    >>> OtherSegments(2, True).layout(5, 2).to_dense()[0, 0].int().tolist()
    [[0, 0], [0, 0], [1, 0], [1, 0], [1, 1]]
    """

    segment: int
    causal: bool

    def contains(self, ext, b, h, q, k):
        own = q // self.segment
        return k < own if self.causal else k != own

    def classify(self, ext, b, h, q0, q1, k0, k1):
        first, last = q0 // self.segment, (q1 - 1) // self.segment  # segments of the queries
        if self.causal:
            return verdict(k0 >= last, k1 <= first)
        return verdict((first == last) & (k0 == first) & (k1 == k0 + 1), (k1 <= first) | (k0 > last))


def _state(q: Tensor, k: Tensor, v: Tensor, who: Pattern | Tensor | None, how: _How, **rest) -> State:
    found = attention(q, k, v, who, scale=how.scale, return_lse=True, **rest)
    assert isinstance(found, tuple)
    return found


def _own(q: Tensor, k: Tensor, v: Tensor, size: int, how: _How) -> State:
    """Attention inside the segments of `size` tokens."""
    ends = np.append(np.arange(0, q.shape[2], size), q.shape[2])
    return _state(q, k, v, Packed(ends, is_causal=how.causal), how)


def _segments(q: Tensor, k: Tensor, v: Tensor, size: int, how: _How) -> tuple[Tensor, Tensor, Tensor]:
    """Summaries of the segments of `size` tokens, and log(tokens) of each; the last one may be shorter."""
    starts = torch.arange(0, q.shape[2], size)
    lengths = (q.shape[2] - starts).clamp_max(size)
    kappa, u = region_summaries(q, k, v, starts, lengths, pool=how.pool, scale=how.scale)
    return kappa, u, lengths.to(q.device, torch.float64 if q.dtype == torch.float64 else torch.float32).log()


# ------------------------------------------------------------------------------------------------------- segments
def _fixed(q: Tensor, k: Tensor, v: Tensor, size: int, how: _How) -> Tensor:
    own = _own(q, k, v, size, how)
    read = (
        (q.shape[2] - 1) // size * size if how.causal else q.shape[2]
    )  # tokens that some query reads summed up
    if read <= (0 if how.causal else size):
        return own[0]
    kappa, u, sizes = _segments(q[:, :, :read], k[:, :, :read], v[:, :, :read], size, how)
    kappa = _per_query_head(kappa, q.shape[1])
    score = Bias(sizes.view(1, 1, 1, -1)) if how.size_term else None
    far = _state(q, kappa, u, OtherSegments(size, how.causal), how, score=score)
    return merge([own, far])[0]


def _per_query_head(kappa: Tensor, heads: int) -> Tensor:
    return kappa.repeat_interleave(heads // kappa.shape[1], 1)


# ---------------------------------------------------------------------------------------------------------- dyadic
def _logsparse(q: Tensor, k: Tensor, v: Tensor, leaf: int, how: _How) -> Tensor:
    """Blocks smaller than a tile of queries are read under a mask, the same one for every tile; of larger ones all
    queries of a tile read the same."""
    n, tile = q.shape[2], leaf
    while tile < TILE:
        tile *= 2
    levels = []  # (size, kappa, u, log sizes)
    size = leaf
    while size < n:
        levels.append((size, *_segments(q, k, v, size, how)))
        size *= 2
    own, own_lse = _own(q, k, v, leaf, how)
    parts = []
    whole = n // tile
    for first, count, length in ((0, whole, tile), (whole, 1, n - whole * tile)):
        if not count * length:
            continue
        cut = slice(first * tile, first * tile + count * length)
        x = q[:, :, cut].unflatten(2, (count, length))  # (B, H, tiles, length, D)
        small = _small(x, [level for level in levels if level[0] < tile], first * tile, how)
        large = _large(x, [level for level in levels if level[0] >= tile], tile, first, how)
        mine = own[:, :, cut].unflatten(2, (count, length)), own_lse[:, :, cut].unflatten(2, (count, length))
        parts.append(_mix([mine, *small], large).flatten(2, 3))
    return torch.cat(parts, 2).to(q.dtype)


def _small(q: Tensor, levels: list, start: int, how: _How) -> list[State]:
    """What tiles of queries (B, H, tiles, length, D) read in blocks inside the same tile, the first at token start."""
    heads, tiles, length = q.shape[1:4]
    keys, values, seen, sizes = [], [], [], []
    i = torch.arange(length)
    for size, kappa, u, log_size in levels:
        blocks = -(-length // size)
        if blocks == 1:
            continue
        step = 2 if how.causal else 1  # under a causal mask only left halves are read
        at = slice(start // size, start // size + tiles * blocks)
        keys.append(_per_query_head(kappa, heads)[:, :, at].unflatten(2, (tiles, blocks))[:, :, :, ::step])
        values.append(u[:, :, at].unflatten(2, (tiles, blocks))[:, :, :, ::step])
        sizes.append(log_size[at][:blocks:step])
        beside = (i // size) ^ 1
        seen.append(beside[:, None] == torch.arange(0, blocks, step))
    if not keys:
        return []
    x, y, z = (t.transpose(1, 2).flatten(1, 2) for t in (q, torch.cat(keys, 3), torch.cat(values, 3)))
    score = Bias(torch.cat(sizes).view(1, 1, 1, -1)) if how.size_term else None
    out, lse = _state(x, y, z, torch.cat(seen, 1)[None, None].to(q.device), how, score=score)
    return [
        (out.unflatten(1, (tiles, heads)).transpose(1, 2), lse.unflatten(1, (tiles, heads)).transpose(1, 2))
    ]


def _large(q: Tensor, levels: list, tile: int, first: int, how: _How) -> tuple[Tensor, Tensor] | None:
    """Logits (B, H, tiles, length, levels) and values (B, H, tiles, levels, Dv) of blocks of one or more tiles."""
    at = first + torch.arange(q.shape[2])
    keys, values, bias = [], [], []
    for size, kappa, u, log_size in levels:
        beside = (at // (size // tile)) ^ 1
        seen = beside < (at // (size // tile) if how.causal else kappa.shape[2])
        beside = beside.clamp_max(kappa.shape[2] - 1).to(q.device)
        keys.append(kappa[:, :, beside])
        values.append(u[:, :, beside])
        bias.append((log_size[beside] * how.size_term).masked_fill(~seen.to(q.device), -torch.inf))
    if not keys:
        return None
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    x = q.to(wide).unflatten(1, (keys[0].shape[1], -1)) * how.scale  # (B, Hkv, H / Hkv, tiles, length, D)
    logits = torch.einsum("bgetid,bgtrd->bgetir", x, torch.stack(keys, 3).to(wide)).flatten(1, 2)
    return logits + torch.stack(bias, -1)[:, None], torch.stack(values, 3).to(wide)


def _mix(states: list[State], large: tuple[Tensor, Tensor] | None) -> Tensor:
    """Merge states (B, H, tiles, length, ..), the first with a key in every row, and the blocks of `_large`."""
    lses = torch.stack([lse for _, lse in states], -1)
    weights = torch.cat([lses, large[0]] if large else [lses], -1).softmax(-1)
    mixed = sum(out.to(weights.dtype) * weights[..., i : i + 1] for i, (out, _) in enumerate(states))
    if large:
        mixed = mixed + torch.einsum("bhtir,bhtrd->bhtid", weights[..., len(states) :], large[1])
    assert isinstance(mixed, Tensor)
    return mixed


# --------------------------------------------------------------------------------------------------------- columns
def _grid(grid: tuple[int, int] | None, n: int, causal: bool) -> tuple[int, int]:
    if (
        not isinstance(grid, (tuple, list))
        or len(grid) != 2
        or any(type(x) is not int or x < 1 for x in grid)
    ):
        raise ValueError(f"grid must be (rows, columns), positive ints, for the axial patterns; got {grid!r}")
    rows, columns = grid
    if not (rows - 1) * columns < n <= rows * columns if causal else n != rows * columns:
        wanted = f"{(rows - 1) * columns + 1} to {rows * columns}" if causal else f"{rows * columns}"
        raise ValueError(f"a grid of {rows} x {columns} needs {wanted} tokens, got {n}")
    return rows, columns


def _written_columns(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, how: _How) -> Tensor:
    """Causal axial_col. Row r has written r + 1 cells of the columns to its left, and r of those to its right."""
    heads, n = q.shape[1:3]

    def in_columns(x: Tensor) -> Tensor:
        """(B, h, N, d) -> (B, columns * h, rows, d)."""
        x = F.pad(x, (0, 0, 0, rows * columns - n)).unflatten(2, (rows, columns))
        return x.permute(0, 3, 1, 2, 4).flatten(1, 2)

    def in_rows(x: Tensor) -> Tensor:
        """(B, columns * h, rows, ..) -> (B, rows, H, columns, ..)."""
        x = x.unflatten(1, (columns, -1)).movedim((3, 2, 1), (1, 2, 3))
        return x.repeat_interleave(heads // x.shape[2], 2)

    x, y, z = (in_columns(t) for t in (q, k, v))
    out, lse = _state(x, y, z, None, how, is_causal=True)
    states = [(in_rows(out), in_rows(lse))]
    if columns > 1:
        rho, kappa = (_running(t, how.pool) for t in (x, y))
        u = _state(rho, y, z, None, how, is_causal=True)[0]  # each beginning of a column is a region
        x, kappa, u = (in_rows(t) for t in (x, kappa, u))
        side = torch.ones(columns, columns, dtype=torch.bool, device=q.device)
        for missing, seen in ((0, side.tril(-1)), (1, side.triu(1))):  # to the left, to the right
            if rows == missing:
                continue
            parts = x[:, missing:], kappa[:, : rows - missing], u[:, : rows - missing]
            out, lse = _state(*(t.flatten(1, 2) for t in parts), seen[None, None], how)
            out, lse = (t.unflatten(1, (-1, heads)) for t in (out, lse))
            if how.size_term:
                lse = lse + torch.arange(1, rows - missing + 1).to(lse).log().view(-1, 1, 1)
            pad = (0, 0, 0, 0, missing, 0)  # nothing is written to the right of the first row
            states.append((F.pad(out, (0, 0, *pad)), F.pad(lse, pad, value=-torch.inf)))
    out = merge(states)[0]  # (B, rows, H, columns, Dv)
    return out.transpose(1, 2).flatten(2, 3)[:, :, :n]


def _running(x: Tensor, pool: str) -> Tensor:
    """Maximum or mean of the entries so far, along the third axis."""
    if pool == "max":
        return x.cummax(2).values
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = torch.arange(1, x.shape[2] + 1, device=x.device, dtype=wide)
    return (x.to(wide).cumsum(2) / count[:, None]).to(x.dtype)
