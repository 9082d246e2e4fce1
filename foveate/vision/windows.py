"""Cutting maps into windows and grids, attention inside the cells, and the bias by relative place."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from foveate.core.attention import attention
from foveate.core.engines.native_library import MAX_DIM
from foveate.core.layout import BlockLayout
from foveate.core.scores import Bias, RelativeBias

Pair = tuple[int, int]


def pair(owner: str, name: str, value: int | Pair, least: int = 1) -> Pair:
    """(rows, columns) of one int or two, each >= least, or a ValueError that names the argument.

    >>> pair("Layer", "window", 7)
    (7, 7)
    """
    got = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(got) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in got):
        raise ValueError(f"{owner}: {name} must be an int >= {least} or two of them, got {value!r}")
    return got


# --------------------------------------------------------------------------------------------------- cutting
def pad_to(x: Tensor, multiple: int | Pair) -> Tensor:
    """(B, H, W, C) with zeros after the last row and column, so that `multiple` divides both sides.

    >>> pad_to(torch.ones(1, 5, 8, 2), (4, 4)).shape
    torch.Size([1, 8, 8, 2])
    """
    rows, columns = pair("pad_to", "multiple", multiple)
    more = -x.shape[1] % rows, -x.shape[2] % columns
    return F.pad(x, (0, 0, 0, more[1], 0, more[0])) if any(more) else x


def partition(x: Tensor, window: int | Pair) -> Tensor:
    """(B, H, W, C) -> (B nH nW, wh ww, C): windows of one image stay together, in row-major order.

    >>> partition(torch.arange(16).view(1, 4, 4, 1), 2)[1].flatten().tolist()
    [2, 3, 6, 7]
    """
    wh, ww = pair("partition", "window", window)
    b, h, w, c = _divided("partition", "window", x, (wh, ww))
    return x.view(b, h // wh, wh, w // ww, ww, c).transpose(2, 3).reshape(-1, wh * ww, c)


def merge(cells: Tensor, window: int | Pair, grid: Pair) -> Tensor:
    """The inverse of `partition`: (B nH nW, wh ww, C) -> (B, H, W, C), grid = (H, W)."""
    (wh, ww), (h, w) = pair("merge", "window", window), grid
    c = cells.shape[2]
    return cells.view(-1, h // wh, w // ww, wh, ww, c).transpose(2, 3).reshape(-1, h, w, c)


def grid_partition(x: Tensor, grid: int | Pair) -> Tensor:
    """(B, H, W, C) -> (B (H/gh) (W/gw), gh gw, C): groups of gh gw cells spread evenly over the map. MaxViT (2022).

    >>> grid_partition(torch.arange(16).view(1, 4, 4, 1), 2)[1].flatten().tolist()
    [1, 3, 9, 11]
    """
    gh, gw = pair("grid_partition", "grid", grid)
    b, h, w, c = _divided("grid_partition", "grid", x, (gh, gw))
    return x.view(b, gh, h // gh, gw, w // gw, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, gh * gw, c)


def grid_merge(cells: Tensor, grid: int | Pair, shape: Pair) -> Tensor:
    """The inverse of `grid_partition`: (B (H/gh) (W/gw), gh gw, C) -> (B, H, W, C), shape = (H, W)."""
    (gh, gw), (h, w) = pair("grid_merge", "grid", grid), shape
    c = cells.shape[2]
    return cells.view(-1, h // gh, w // gw, gh, gw, c).permute(0, 3, 1, 4, 2, 5).reshape(-1, h, w, c)


def _divided(owner: str, name: str, x: Tensor, cell: Pair) -> tuple[int, int, int, int]:
    if x.ndim != 4:
        raise ValueError(f"{owner}: x must be (B, H, W, C), got {tuple(x.shape)}")
    b, h, w, c = x.shape
    if h % cell[0] or w % cell[1]:
        raise ValueError(f"{owner}: {name} {cell} must divide the map of {h} x {w}; see pad_to")
    return b, h, w, c


# ------------------------------------------------------------------------------------------------- attention
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | RelativeBias | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Softmax attention in many small groups at once.

        out_g = softmax(scale q_g k_g^T + bias, over keys that mask allows) v_g

    Args:
        q: (G, heads, n, d), k: (G, heads, m, d), v: (G, heads, m, e); G counts windows, those of one image together.
        bias: (heads, n, m), the same for all groups, or (G, heads, n, m), or a `RelativeBias` of a window, which
            saves writing it out.
        mask: bool (W, n, m), True = may be seen; W divides G and group g takes mask[g % W]. A row that sees nothing
            gives 0. Keep the tensor where it is used again: its layout is made once.
        scale: default d^-0.5.
        engine: "native": `foveate.attention`, first derivatives only; "dense": batched matrix products; "auto": native
            on CPU in float32 and bfloat16 from nine keys on, where it is measured faster, else dense, as for groups of
            one query.

    Returns:
        (G, heads, n, e)
    """
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 3 or q.shape[0] % mask.shape[0]):
        raise ValueError(
            f"attend: mask must be bool (W, n, m) with W a divisor of {q.shape[0]} groups, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if engine not in ("auto", "native", "dense"):
        raise ValueError(f"attend: engine must be 'auto', 'native' or 'dense', got {engine!r}")
    if engine == "auto":
        known = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)
        fits = max(q.shape[3], v.shape[3]) <= MAX_DIM and not torch.compiler.is_compiling()
        pays = k.shape[2] >= 9 and q.shape[2] > 1  # one query fills no tile
        engine = "native" if known and fits and pays else "dense"
    return (_native if engine == "native" else _dense)(q, k, v, bias, mask, scale)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | RelativeBias | None,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    logits = (q * (q.shape[3] ** -0.5 if scale is None else scale)) @ k.mT  # (G, heads, n, m)
    if isinstance(bias, RelativeBias):
        logits = bias.apply(logits)
    elif bias is not None:
        logits = logits + bias
    if mask is None:
        return logits.softmax(3) @ v
    some = mask.any(2, keepdim=True)  # (W, n, 1)
    groups = logits.unflatten(0, (-1, mask.shape[0]))  # (G / W, W, heads, n, m)
    weights = groups.masked_fill((some & ~mask)[:, None], -torch.inf).softmax(4) * some[:, None]
    return weights.flatten(0, 1) @ v


def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | RelativeBias | None,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """A layout has a set per batch row or per head: with a mask the W windows of an image become heads."""
    if mask is None:
        score = Bias(bias if bias.ndim == 4 else bias[None]) if isinstance(bias, Tensor) else bias
        return cast(Tensor, attention(q, k, v, score=score, scale=scale, engine="native"))
    w, heads = mask.shape[0], q.shape[1]
    as_heads = lambda t: t.unflatten(0, (-1, w)).flatten(1, 2)  # noqa: E731  (G / W, W heads, tokens, d)
    if isinstance(bias, RelativeBias):
        score = replace(bias, table=bias.table.expand(heads, -1, -1).repeat(w, 1, 1))
    elif bias is None:
        score = None
    else:
        score = Bias(as_heads(bias) if bias.ndim == 4 else bias.repeat(w, 1, 1)[None])
    layout = _layout(mask, heads)
    out = attention(as_heads(q), as_heads(k), as_heads(v), layout, score=score, scale=scale, engine="native")
    return cast(Tensor, out).unflatten(1, (w, heads)).flatten(0, 1)


_layouts = WeakIdKeyDictionary()  # mask -> (its version, heads, layout)


def _layout(mask: Tensor, heads: int) -> BlockLayout:
    """The layout of a mask (W, n, m) for W heads each; kept while the tensor lives and is not written to."""
    known = None if mask.is_inference() else _layouts.get(mask)
    if known is None or known[:2] != (mask._version, heads):
        known = (0, heads, BlockLayout.from_mask(mask.repeat_interleave(heads, 0)))
        if not mask.is_inference():
            known = (mask._version, *known[1:])
            _layouts[mask] = known
    return known[2]


@lru_cache(maxsize=64)
def _index(window: Pair) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # kept for others, whoever asks first
        sides = (torch.arange(n) for n in window)
        at = torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1)  # (2, n)
        apart = at[:, :, None] - at[:, None]  # query - key
        return (apart[0] + window[0] - 1) * (2 * window[1] - 1) + apart[1] + window[1] - 1


def relative_index(window: int | Pair, device: torch.device | str | None = None) -> Tensor:
    """The row of the bias table of each pair in a window, int64 (n, n), n = wh ww. Swin Transformer (2021).

        index = (y_q - y_k + wh - 1) (2 ww - 1) + x_q - x_k + ww - 1

    >>> relative_index((1, 3)).tolist()
    [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    """
    return _index(pair("relative_index", "window", window)).to(device)


class RelativePositionBias2d(nn.Module):
    """A learned bias per head and distance inside a window: `forward()` -> (heads, n, n). Swin Transformer (2021).

    Args:
        window: (wh, ww) or one int.
        heads: number of heads.
        std: of the table's first values, a normal cut off at two deviations.

    `table` is ((2 wh - 1) (2 ww - 1), heads), as in released checkpoints.

    >>> bias = RelativePositionBias2d(7, heads=3)
    >>> bias().shape, bias.resize_(12).table.shape
    (torch.Size([3, 49, 49]), torch.Size([529, 3]))
    """

    def __init__(self, window: int | Pair, heads: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.window = pair("RelativePositionBias2d", "window", window)
        rows, columns = (2 * n - 1 for n in self.window)
        self.table = nn.Parameter(torch.empty(rows * columns, heads))
        nn.init.trunc_normal_(self.table, std=std, a=-2 * std, b=2 * std)

    def forward(self, window: int | Pair | None = None) -> Tensor:
        """(heads, n, n) for the window of the table, or for a smaller one inside it."""
        mine, table = self._inside(window)
        n = mine[0] * mine[1]
        index = relative_index(mine, table.device).flatten()
        return table.index_select(0, index).view(n, n, -1).permute(2, 0, 1)  # (heads, n, n)

    def score(self, window: int | Pair | None = None) -> RelativeBias:
        """The same as a score for `attend` and `foveate.attention`, which read the table without writing it out."""
        mine, table = self._inside(window)
        return RelativeBias(table.T.unflatten(1, (2 * mine[0] - 1, 2 * mine[1] - 1)), shape=mine)

    def _inside(self, window: int | Pair | None) -> tuple[Pair, Tensor]:
        mine = self.window if window is None else pair("RelativePositionBias2d", "window", window)
        if any(n > most for n, most in zip(mine, self.window, strict=True)):
            raise ValueError(
                f"RelativePositionBias2d: window must be at most {self.window}, got {mine}; see resize_"
            )
        table = self.table
        if mine != self.window:
            rows, columns = (slice(most - n, most + n - 1) for n, most in zip(mine, self.window, strict=True))
            table = table.unflatten(0, (2 * self.window[0] - 1, -1))[rows, columns].flatten(0, 1)
        return mine, table

    @torch.no_grad()
    def resize_(self, window: int | Pair) -> RelativePositionBias2d:
        """The table interpolated bicubically for another window, in place."""
        made = pair("RelativePositionBias2d", "window", window)
        old = self.table.T.unflatten(1, (2 * self.window[0] - 1, -1))[None]  # (1, heads, rows, columns)
        size = [2 * n - 1 for n in made]
        new = F.interpolate(old.float(), size, mode="bicubic", align_corners=False)[0].flatten(1).T
        self.table = nn.Parameter(new.to(self.table.dtype).contiguous())
        self.window = made
        return self

    def extra_repr(self) -> str:
        return f"window={self.window}, heads={self.table.shape[1]}"


class WindowAttention(nn.Module):
    """Attention inside windows that do not overlap, on (B, H, W, C).

    Args:
        dim, heads: C, and into how many heads it is cut.
        window: (wh, ww) or one int; on a map whose side is smaller, the side.
        bias: of the query, key and value map; the output map always has one.
        relative_bias: with a `RelativePositionBias2d`.
        edge: sides that the window does not divide are padded with zeros; "zero": padded cells are attended to, "mask":
            they are not.

    >>> WindowAttention(32, heads=2, window=4)(torch.randn(1, 10, 7, 32)).shape
    torch.Size([1, 10, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | Pair = 7,
        *,
        bias: bool = True,
        relative_bias: bool = True,
        edge: str = "mask",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"WindowAttention: dim must be a multiple of heads, got {dim} and {heads}")
        if edge not in ("mask", "zero"):
            raise ValueError(f"WindowAttention: edge must be 'mask' or 'zero', got {edge!r}")
        self.heads, self.window, self.edge = heads, pair("WindowAttention", "window", window), edge
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.relative = RelativePositionBias2d(self.window, heads) if relative_bias else None

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        window = min(self.window[0], h), min(self.window[1], w)
        padded = pad_to(x, window)
        grid = padded.shape[1], padded.shape[2]
        qkv = partition(self.qkv(padded), window).unflatten(2, (3, self.heads, -1))  # (G, n, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = None if self.relative is None else self.relative.score(window)
        mask = None
        if self.edge == "mask" and grid != (h, w):
            real = F.pad(x.new_ones(1, h, w, 1), (0, 0, 0, grid[1] - w, 0, grid[0] - h))
            mask = partition(real, window)[:, None, :, 0] > 0  # (W, 1, n)
            mask = mask.expand(-1, window[0] * window[1], -1)
        out = attend(q, k, v, bias=bias, mask=mask).transpose(1, 2).flatten(2)
        return self.proj(merge(out, window, grid)[:, :h, :w])

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, edge={self.edge!r}"
