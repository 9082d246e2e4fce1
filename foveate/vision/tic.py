"""TiC: self-attention over the stencil of each pixel, packaged as a convolution; shifts and pooled keys for reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.merge import State, merge
from foveate.core.patterns import Neighborhood, Stencil
from foveate.vision.windows import Pair, pair

EDGES = ("zero", "mask", "clamp", "wrap")
DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def stencil_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: int | Pair = 3,
    *,
    dilation: int | Pair = 1,
    edge: str = "zero",
    scale: float | None = None,
    dropout: float = 0.0,
) -> State:
    """Softmax attention of each pixel over kernel x kernel pixels around it, with the log-sum-exp of each row.

        N(i) = { i + r (u, t) : |u|, |t| <= (k - 1) / 2 },   out_i = sum_{j in N(i)} softmax_j(scale q_i . k_j) v_j

    With edge="zero" a cell outside the map is a key with logit 0 and value 0, as after zero padding. All m_i of row i
    together weigh m_i, so they need no keys: with out and lse over the cells of the map,

        out_i <- out_i e^lse_i / (e^lse_i + m_i) = out_i sigmoid(lse_i - log m_i),   lse_i <- log(e^lse_i + m_i).

    TiC: Exploring Vision Transformer in Convolution (2023).

    Args:
        q, k: (B, heads, H, W, d). v: (B, heads, H, W, e).
        kernel: odd, one int or (rows, columns). dilation: r, the same.
        edge: "zero"; "mask": cells outside do not exist; "clamp": the window moves inwards and keeps its size;
            "wrap": the map is a torus.
        scale: default d ** -0.5.
        dropout: on the weights.

    Returns:
        out (B, heads, H, W, e), lse (B, heads, H, W).

    Raises:
        ValueError: an even kernel, an unknown edge, or a map too small for "clamp" or "wrap".

    >>> q = k = v = torch.ones(1, 1, 4, 4, 2)
    >>> stencil_attention(q, k, v, edge="mask")[0][0, 0, 0, 0].tolist()
    [1.0, 1.0]
    """
    kernel, dilation = (
        pair("stencil_attention", "kernel", kernel),
        pair("stencil_attention", "dilation", dilation),
    )
    if any(n % 2 == 0 for n in kernel):
        raise ValueError(f"stencil_attention: kernel must be odd, got {kernel}")
    if edge not in EDGES:
        raise ValueError(f"stencil_attention: edge {edge!r}; accepted: {', '.join(EDGES)}")
    height, width = grid = q.shape[2:4]
    reach = [r * (n // 2) for n, r in zip(kernel, dilation, strict=True)]
    if edge == "wrap":
        if any(n < 2 * far + 1 for n, far in zip(grid, reach, strict=True)):
            raise ValueError(
                f"stencil_attention: edge 'wrap' needs a map of at least {tuple(2 * n + 1 for n in reach)}, "
                f"got {tuple(grid)}"
            )
        q, k, v = (_wrapped(x, reach) for x in (q, k, v))
        grid = q.shape[2:4]
    pattern: Any = Stencil(tuple(grid), kernel, dilation)
    if edge == "clamp":
        pattern = Neighborhood(tuple(grid), kernel, dilation=dilation)
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))  # (B, heads, cells, d)
    made = attention(q, k, v, pattern, scale=scale, dropout_p=dropout, return_lse=True)
    out, lse = (x.unflatten(2, tuple(grid)) for x in made)
    if edge == "wrap":
        rows, columns = (slice(far, far + n) for far, n in zip(reach, (height, width), strict=True))
        return out[:, :, rows, columns], lse[:, :, rows, columns]
    if edge != "zero":
        return out, lse
    real = [
        _real(n, side, r, lse.device) for n, side, r in zip(kernel, (height, width), dilation, strict=True)
    ]
    outside = kernel[0] * kernel[1] - real[0][:, None] * real[1]  # (H, W)
    log_outside = outside.to(lse.dtype).log()  # -inf where all cells are real
    return out * torch.sigmoid(lse - log_outside)[..., None].to(out.dtype), torch.logaddexp(lse, log_outside)


def _wrapped(x: Tensor, reach: Sequence[int]) -> Tensor:
    """A map (B, heads, H, W, d) with `reach` cells of its other end on each side."""
    for axis, far in zip((2, 3), reach, strict=True):
        if far:
            x = torch.cat([x.narrow(axis, x.shape[axis] - far, far), x, x.narrow(axis, 0, far)], axis)
    return x


def _real(kernel: int, side: int, dilation: int, device: torch.device) -> Tensor:
    """How many of a stencil's cells on one axis are on the map, int64 (side,)."""
    at = torch.arange(side, device=device)
    behind, ahead = at // dilation, (side - 1 - at) // dilation
    return behind.clamp(max=kernel // 2) + ahead.clamp(max=kernel // 2) + 1


def shifts(heads: int, kernel: int = 3, *, depth: int = 0) -> tuple[Pair, ...]:
    """Shifts of eight groups of heads in the eight directions, by s = floor(kernel / 2) + 1 + depth.

    >>> shifts(8, 3)[:3]
    ((-2, 0), (2, 0), (0, -2))
    """
    if heads < 1:
        raise ValueError(f"shifts: heads must be >= 1, got {heads}")
    step = kernel // 2 + 1 + depth
    group = -(-heads // len(DIRECTIONS))
    return tuple((step * DIRECTIONS[h // group][0], step * DIRECTIONS[h // group][1]) for h in range(heads))


class SelfAttentionConv2d(nn.Module):
    """MSA-Conv: attention over the stencil of each pixel, a residual, a convolution and ReLU, on (B, C, H, W).

        y = ReLU(Conv_{k x k}(x + stencil_attention(q, k, v)))

    In place of `nn.Conv2d(dim, out, kernel, stride, padding=kernel // 2)`; without positions, so any H and W. TiC:
    Exploring Vision Transformer in Convolution (2023). The paper's two aids for reach have no public code; here:
    `head_shifts` rolls keys and values of a head, so that the stencil of pixel i lies around i - shift (on a torus),
    and `pooled` appends the means of keys and values over a grid of p x p to the keys of every pixel.

    Args:
        dim, out: channels before and after; out: as dim.
        kernel: odd; of attention and convolution. One int or (rows, columns).
        stride: of the convolution.
        dilation: of the attention.
        heads: dim = heads * head_dim; heads = dim is the depthwise form.
        edge: see `stencil_attention`.
        residual: add x before the convolution.
        convolve: convolution and ReLU; without them out must be dim and stride 1.
        dropout: on the weights, in train mode.
        head_kernels, head_dilations, head_shifts: one pair per head, in place of kernel, dilation and (0, 0).
        pooled: p, or 0 for none.

    Raises:
        ValueError: sizes that do not fit, an even kernel, or lists that do not have one entry per head.

    >>> SelfAttentionConv2d(16, 24, 3, stride=2, heads=2)(torch.randn(1, 16, 9, 7)).shape
    torch.Size([1, 24, 5, 4])
    """

    def __init__(
        self,
        dim: int,
        out: int | None = None,
        kernel: int | Pair = 3,
        *,
        stride: int = 1,
        dilation: int | Pair = 1,
        heads: int = 1,
        edge: str = "zero",
        residual: bool = True,
        convolve: bool = True,
        dropout: float = 0.1,
        head_kernels: Sequence[int | Pair] | None = None,
        head_dilations: Sequence[int | Pair] | None = None,
        head_shifts: Sequence[Pair] | None = None,
        pooled: int = 0,
    ) -> None:
        super().__init__()
        name, out = type(self).__name__, dim if out is None else out
        if heads < 1 or dim % heads:
            raise ValueError(f"{name}: heads must divide dim, got {heads} for {dim}")
        if edge not in EDGES:
            raise ValueError(f"{name}: edge {edge!r}; accepted: {', '.join(EDGES)}")
        if not convolve and (out != dim or stride != 1):
            raise ValueError(
                f"{name}: without convolution out must be {dim} and stride 1, got {out} and {stride}"
            )
        if pooled < 0 or not 0 <= dropout < 1:
            raise ValueError(f"{name}: pooled must be >= 0 and dropout in [0, 1), got {pooled} and {dropout}")
        kernel = pair(name, "kernel", kernel)
        lists = {"head_kernels": head_kernels, "head_dilations": head_dilations, "head_shifts": head_shifts}
        for argument, values in lists.items():
            if values is not None and len(values) != heads:
                raise ValueError(
                    f"{name}: {argument} must have one entry per head, {heads}, got {len(values)}"
                )
        kernels = [pair(name, "head_kernels", n) for n in head_kernels or [kernel] * heads]
        if any(n % 2 == 0 for both in (kernel, *kernels) for n in both):
            raise ValueError(f"{name}: kernels must be odd, got {kernel} and {kernels}")
        dilations = [pair(name, "dilation", n) for n in head_dilations or [dilation] * heads]
        moves = [(int(y), int(x)) for y, x in head_shifts or [(0, 0)] * heads]
        self.groups: dict[tuple[Pair, Pair], list[int]] = {}  # (kernel, dilation) -> heads
        for head, setting in enumerate(zip(kernels, dilations, strict=True)):
            self.groups.setdefault(setting, []).append(head)
        self.dim, self.out, self.heads, self.edge, self.moves = dim, out, heads, edge, moves
        self.residual, self.dropout, self.pooled = residual, dropout, pooled
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(dim, out, kernel, stride, padding, bias=False) if convolve else None

    def moved(self, x: Tensor) -> Tensor:
        """Each head of (B, heads, d, H, W) rolled by its shift."""
        if not any(map(any, self.moves)):
            return x
        return torch.stack([x[:, h].roll(move, (2, 3)) for h, move in enumerate(self.moves)], 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, heads, H, W, d) -> the same shape."""
        dropout = self.dropout if self.training else 0.0
        parts, places = [], []
        for (kernel, dilation), heads in self.groups.items():
            some = slice(None) if len(heads) == self.heads else heads
            out, lse = stencil_attention(
                q[:, some], k[:, some], v[:, some], kernel, dilation=dilation, edge=self.edge, dropout=dropout
            )
            parts.append((out.flatten(2, 3), lse.flatten(2)))
            places += heads
        out, lse = (torch.cat(part, 1) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
        if self.pooled:
            far = attention(
                q[:, places].flatten(2, 3), self._pool(k)[:, places], self._pool(v)[:, places],
                dropout_p=dropout, return_lse=True,
            )  # fmt: skip
            out, _ = merge([(out, lse), (far[0], far[1])])
        if len(parts) > 1:
            out = out[:, torch.tensor(places, device=out.device).argsort()]
        return out.unflatten(2, q.shape[2:4])

    def _pool(self, x: Tensor) -> Tensor:
        """(B, heads, H, W, d) -> (B, heads, p p, d), p at most the side."""
        size = min(self.pooled, x.shape[2]), min(self.pooled, x.shape[3])
        cells = F.adaptive_avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), size)  # (B heads, d, p, p)
        return cells.flatten(2).mT.unflatten(0, x.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"{type(self).__name__}: x must be (B, {self.dim}, H, W), got {tuple(x.shape)}")
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, heads, d, H, W)
        q, k, v = (t.permute(0, 1, 3, 4, 2) for t in (q, self.moved(k), self.moved(v)))
        y = self.attend(q, k, v).permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, C, H, W)
        if self.residual:
            y = y + x
        return y if self.conv is None else self.conv(y).relu()
