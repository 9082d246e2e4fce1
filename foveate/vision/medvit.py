"""MedViTV2: blocks of (dilated) neighbourhood attention, blocks of attention to pooled keys with KAN feed-forwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.patterns import Neighborhood
from foveate.core.scores import RelativeBias
from foveate.vision.backbone import Backbone
from foveate.vision.blocks import ConvNorm, DropPath, SqueezeExcite, drop_path_rates, init_
from foveate.vision.windows import Pair, pair

LAYOUTS = ("map", "release")
DILATIONS = ("alternate", "release")


class NeighborhoodAttention2d(nn.Module):
    """Attention of each cell to exactly k x k cells around it, dilated by r, with a bias by relative place.

        c_i = min(max(i_r - floor(k / 2), 0), L - k),   keys c_i, ..., c_i + k - 1 of i's residue grid, on each axis
        a_ij = softmax_j(q_i . k_j / sqrt(d) + b[(j - i) / r])

    The residue grid of i are the L cells with the same coordinate mod r; i_r = floor(i / r) is i's place there. The r r
    residue grids are attended to one by one, since they do not see each other. On an axis of fewer than k cells the
    kernel is the axis.

    Neighborhood Attention Transformer (2022), Dilated Neighborhood Attention Transformer (2022), as in Medical Image
    Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention (2025).

    Args:
        dim, heads: C, and into how many heads it is cut.
        kernel: odd.
        dilation: r, an int or (rows, columns), with r * kernel at most the side; or "widest", floor(side / kernel).
        bias: of the query, key and value map; the output map always has one.
        relative_bias: with `table` (heads, 2 k - 1, 2 k - 1), indexed by key - query.

    Shape: (B, H, W, dim) -> the same.

    Raises:
        ValueError: heads that do not divide dim, an even kernel, a dilation too wide for the map.

    >>> NeighborhoodAttention2d(32, 2, kernel=3, dilation="widest")(torch.randn(1, 10, 7, 32)).shape
    torch.Size([1, 10, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel: int = 7,
        *,
        dilation: int | Pair | str = 1,
        bias: bool = True,
        relative_bias: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"NeighborhoodAttention2d: heads must divide dim, got {heads} for {dim}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"NeighborhoodAttention2d: kernel must be odd, got {kernel}")
        if isinstance(dilation, str):
            if dilation != "widest":
                raise ValueError(
                    f"NeighborhoodAttention2d: dilation {dilation!r}; accepted: 'widest', an int or two of them"
                )
            self.dilation: Pair | None = None
        else:
            self.dilation = pair("NeighborhoodAttention2d", "dilation", dilation)
        self.dim, self.heads, self.kernel = dim, heads, kernel
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.table = (
            nn.Parameter(torch.empty(heads, 2 * kernel - 1, 2 * kernel - 1)) if relative_bias else None
        )
        self.proj = nn.Linear(dim, dim)
        init_(self)
        if self.table is not None:
            nn.init.trunc_normal_(self.table, std=0.02, a=-0.04, b=0.04)

    def steps(self, grid: tuple[int, int]) -> tuple[Pair, Pair]:
        """Kernel and dilation on a map of this size, per axis."""
        kernel = (min(self.kernel, grid[0]), min(self.kernel, grid[1]))
        widest = (max(1, grid[0] // self.kernel), max(1, grid[1] // self.kernel))
        dilation = widest if self.dilation is None else self.dilation
        if any(n < self.kernel * r for n, r in zip(grid, dilation, strict=True) if r > 1):
            raise ValueError(
                f"NeighborhoodAttention2d: dilation {dilation} needs a map of at least "
                f"{tuple(self.kernel * r for r in dilation)} cells, got {tuple(grid)}"
            )
        return kernel, dilation

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(
                f"NeighborhoodAttention2d: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}"
            )
        height, width = x.shape[1:3]
        kernel, dilation = self.steps((height, width))
        qkv = self.qkv(x)  # (B, H, W, 3 C)
        if dilation == (1, 1):
            return self.proj(self._near(qkv, kernel))
        out = torch.empty_like(x)
        for rows in _residues(height, dilation[0], x.device):  # (residues, L)
            for columns in _residues(width, dilation[1], x.device):
                at = rows[:, None, :, None], columns[None, :, None, :]
                grids = qkv[:, at[0], at[1]]  # (B, residues, residues, L, L', 3 C)
                near = self._near(grids.flatten(0, 2), kernel)
                out = out.index_put((torch.arange(len(x), device=x.device)[:, None, None, None, None], *at),
                                    near.view(*grids.shape[:5], -1).to(out.dtype))  # fmt: skip
        return self.proj(out)

    def _near(self, qkv: Tensor, kernel: Pair) -> Tensor:
        """Neighbourhood attention without dilation: (G, L, L', 3 C) -> (G, L, L', C)."""
        _, height, width, _ = qkv.shape
        q, k, v = (
            qkv.flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (G, heads, n, d)
        score = None
        if self.table is not None:  # RelativeBias counts query - key
            score = RelativeBias(self.table.flip(1, 2), shape=(height, width))
        out = attention(q, k, v, Neighborhood((height, width), kernel), score=score)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(2).unflatten(1, (height, width))

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, kernel={self.kernel}, dilation={self.dilation or 'widest'}"


def _residues(side: int, dilation: int, device: torch.device) -> list[Tensor]:
    """Coordinates of the residue grids of an axis, those of equal length together: int64 (residues, length) each."""
    longer = side % dilation  # residues below it have one cell more
    made = []
    for first, last in ((0, longer), (longer, dilation)):
        if last > first:
            start = torch.arange(first, last, device=device)[:, None]
            length = -(-(side - first) // dilation)
            made.append(start + dilation * torch.arange(length, device=device))
    return made


class PooledKeyAttention(nn.Module):
    """Attention of all cells to means of sr * sr consecutive cells, row-major; those left over at the end drop out.

        k, v = maps of BN(AvgPool1d(x, sr^2));  sr = 1: of x itself

    E-MHSA of Next-ViT (2022), as in MedViTV2 (2025): the pooling is along the sequence, not over squares. On maps of
    fewer than sr * sr cells there is one mean.

    Shape: (B, H, W, dim) -> the same.

    >>> PooledKeyAttention(32, 1, sr=2)(torch.randn(2, 5, 3, 32)).shape
    torch.Size([2, 5, 3, 32])
    """

    def __init__(self, dim: int, heads: int, *, sr: int = 1) -> None:
        super().__init__()
        if heads < 1 or dim % heads or sr < 1:
            raise ValueError(
                f"PooledKeyAttention: heads must divide dim and sr be >= 1, got {heads} for {dim} and {sr}"
            )
        self.heads, self.sr = heads, sr
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.BatchNorm1d(dim) if sr > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = x.flatten(1, 2)  # (B, N, C)
        few = x
        if self.norm is not None:
            few = self.norm(F.avg_pool1d(x.mT, min(self.sr**2, x.shape[1]))).mT  # (B, N / sr^2, C)
        q, k, v = (
            m(t).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for m, t in ((self.q, x), (self.k, few), (self.v, few))
        )
        out = attention(q, k, v)
        assert isinstance(out, Tensor)
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, (height, width))


class FasterKAN(nn.Module):
    """Kolmogorov-Arnold layers with fixed knots, on the last axis.

        KAN(x) = W phi(LN(x)),   phi_g(u) = 1 - tanh^2((u - t_g) / 0.33),   t = -2, ..., 2

    for each pair of neighbouring widths; W has no bias and starts as Xavier's uniform. FasterKAN (2024), as in MedViTV2
    (2025).

    Args:
        widths: at least two.
        knots: number of t_g.

    >>> FasterKAN((4, 8, 3))(torch.randn(2, 5, 4)).shape
    torch.Size([2, 5, 3])
    """

    knots: Tensor

    def __init__(self, widths: Sequence[int], *, knots: int = 8) -> None:
        super().__init__()
        if len(widths) < 2 or knots < 1:
            raise ValueError(f"FasterKAN: at least two widths and one knot, got {tuple(widths)} and {knots}")
        self.register_buffer("knots", torch.linspace(-2, 2, knots), persistent=False)
        pairs = list(pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim, _ in pairs)
        self.maps = nn.ModuleList(nn.Linear(dim * knots, out, bias=False) for dim, out in pairs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's uniform for all maps."""
        for part in self.maps:
            nn.init.xavier_uniform_(part.weight)  # type: ignore[arg-type]

    def basis(self, u: Tensor) -> Tensor:
        """phi: (..., C) -> (..., C, knots), in (0, 1]."""
        return 1 - torch.tanh((u[..., None] - self.knots.to(u.dtype)) / 0.33).square()

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, self.maps, strict=True):
            x = part(self.basis(norm(x)).flatten(-2))
        return x


def _embed(dim: int, out: int, stride: int) -> nn.Module:
    """Means of 2 x 2 with stride 2, then 1 x 1 convolution and BN where stride or width changes."""
    if stride == 1:
        return nn.Identity() if dim == out else ConvNorm(dim, out, 1)
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, ConvNorm(dim, out, 1))


class MedViTLocalBlock(nn.Module):
    """LFP: x + NA(BN x), then x + n + F(n) with n = BN x and a convolutional feed-forward F; on (B, C, H, W).

        F = BN W_2 SE hswish BN DW_{k x k} hswish BN W_1,   widths C, 3 C, C

    Args:
        layout: "release" hands the (B, C, H, W) memory to attention as if it were (B, H, W, C), as the released code
            does by a reshape, for its weights only.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        stride: int = 1,
        kernel: int = 7,
        depthwise: int = 3,
        dilation: int | str = 1,
        head_dim: int = 32,
        drop_path: float = 0.0,
        layout: str = "map",
    ) -> None:
        super().__init__()
        if out % head_dim:
            raise ValueError(f"MedViTLocalBlock: head_dim must divide out, got {head_dim} for {out}")
        self.layout = layout
        self.embed = _embed(dim, out, stride)
        self.norm1 = nn.BatchNorm2d(out)
        self.attention = NeighborhoodAttention2d(out, out // head_dim, kernel, dilation=dilation)
        self.drop_path = DropPath(drop_path)
        self.feed = nn.Sequential(
            ConvNorm(out, 3 * out, 1, act=nn.Hardswish),
            ConvNorm(3 * out, 3 * out, depthwise, groups=3 * out, act=nn.Hardswish),
            SqueezeExcite(3 * out, 3, gate=nn.Hardsigmoid),
            ConvNorm(3 * out, out, 1),
        )
        self.norm2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        if self.layout == "release":
            b, c, h, w = y.shape
            y = self.attention(y.reshape(b, h, w, c)).reshape(b, c, h, w)
        else:
            y = self.attention(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.drop_path(y)
        y = self.norm2(x)
        return x + y + self.feed(y)


class MedViTGlobalBlock(nn.Module):
    """GFP: attention to pooled keys on three quarters of the channels, convolutions for the others, KAN; (B, C, H, W).

        a = e + MHSA(BN e);   b = W a;   b <- b + W' relu(BN conv_{3 x 3, groups of head_dim}(b))
        x = [a, b];   x <- x + KAN(BN x)

    Args:
        layout: "release" cuts the (B, C, H, W) memory into rows of C values for the KAN, as the released code does.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        stride: int = 1,
        sr: int = 1,
        head_dim: int = 32,
        drop_path: float = 0.0,
        layout: str = "map",
    ) -> None:
        super().__init__()
        self.layout = layout
        wide = _divisible(int(0.75 * out), head_dim)
        rest = out - wide
        if rest < 1 or rest % head_dim:
            raise ValueError(
                f"MedViTGlobalBlock: out must exceed {wide}, its three quarters in heads of {head_dim}, by a multiple "
                f"of {head_dim}, got {out}"
            )
        self.embed = _embed(dim, wide, stride)
        self.norm1 = nn.BatchNorm2d(wide)
        self.attention = PooledKeyAttention(wide, wide // head_dim, sr=sr)
        self.drop1 = DropPath(0.75 * drop_path)
        self.projection = _embed(wide, rest, 1)
        self.local = nn.Sequential(
            ConvNorm(rest, rest, 3, groups=rest // head_dim, act=nn.ReLU),
            nn.Conv2d(rest, rest, 1, bias=False),
        )
        self.drop2 = DropPath(0.25 * drop_path)
        self.norm2 = nn.BatchNorm2d(out)
        self.kan = FasterKAN((out, 2 * out, out))
        self.drop3 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.attention(self.norm1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.drop1(y)
        y = self.projection(x)
        x = torch.cat([x, y + self.drop2(self.local(y))], 1)
        y = self.norm2(x)
        if self.layout == "release":
            y = self.kan(y.reshape(-1, y.shape[1])).reshape(y.shape)
        else:
            y = self.kan(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.drop3(y)


def _divisible(value: int, by: int) -> int:
    """The nearest multiple, not more than a tenth below."""
    made = max(by, (value + by // 2) // by * by)
    return made + by if made < 0.9 * value else made


class MedViTV2(Backbone):
    """Stem of four convolutions, then stages of local (L) and global (G) blocks: LL, L..LG, LLG LLG .., G..

    Args:
        dims: C per stage. depths: blocks per stage, that of the third a multiple of 3.
        kernel: side of the neighbourhoods.
        dilation: "alternate": local blocks of a stage take dilation 1 and floor(side / kernel) in turn; "release": 1
            everywhere, as the released code.
        head_dim: of all heads, and channels per group of the grouped convolutions.
        layout: "map", or "release" for the released weights, whose blocks reshape where they should permute.
        num_classes, in_channels, drop_path, features_only: see `Backbone`.

    Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention (2025). Differs:
    the convolutional feed-forward that the released global blocks hold and never use is left out.

    >>> net = MedViTV2((16, 32, 32, 32), (1, 1, 3, 1), kernel=3, head_dim=8, num_classes=5)
    >>> net(torch.randn(2, 3, 45, 64)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        *,
        kernel: int = 7,
        dilation: str = "alternate",
        head_dim: int = 32,
        layout: str = "map",
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.1,
        features_only: bool = False,
    ) -> None:
        if len(dims) != 4 or len(depths) != 4 or min(depths) < 1 or depths[2] % 3:
            raise ValueError(
                f"MedViTV2: dims and depths must be four each, the third depth a multiple of 3, got {dims} and {depths}"
            )
        if dilation not in DILATIONS:
            raise ValueError(f"MedViTV2: dilation {dilation!r}; accepted: {', '.join(DILATIONS)}")
        if layout not in LAYOUTS:
            raise ValueError(f"MedViTV2: layout {layout!r}; accepted: {', '.join(LAYOUTS)}")
        super().__init__(
            channels=dims,
            strides=(4, 8, 16, 32),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        self.stem = nn.Sequential(
            ConvNorm(in_channels, 64, 3, 2, act=nn.ReLU),
            ConvNorm(64, 32, 3, act=nn.ReLU),
            ConvNorm(32, 64, 3, act=nn.ReLU),
            ConvNorm(64, 64, 3, 2, act=nn.ReLU),
        )
        kinds = ("L" * depths[0], "L" * (depths[1] - 1) + "G", "LLG" * (depths[2] // 3), "G" * depths[3])
        rates = drop_path_rates(drop_path, depths)
        self.stages, width = nn.ModuleList(), 64
        for number, (out, letters, drops) in enumerate(zip(dims, kinds, rates, strict=True)):
            blocks, local = nn.Sequential(), 0
            for i, (letter, drop) in enumerate(zip(letters, drops, strict=True)):
                stride = 2 if i == 0 and number else 1
                if letter == "L":
                    widest = dilation == "alternate" and local % 2
                    local += 1
                    block: nn.Module = MedViTLocalBlock(
                        width,
                        out,
                        stride=stride,
                        kernel=kernel,
                        depthwise=3 if number else 7,
                        dilation="widest" if widest else 1,
                        head_dim=head_dim,
                        drop_path=drop,
                        layout=layout,
                    )
                else:
                    sr = (8, 4, 2, 1)[number]
                    block = MedViTGlobalBlock(
                        width, out, stride=stride, sr=sr, head_dim=head_dim, drop_path=drop, layout=layout
                    )
                blocks.append(block)
                width = out
            self.stages.append(blocks)
        self.make_head(nn.BatchNorm2d(width))
        init_(self)
        for part in self.modules():
            if isinstance(part, FasterKAN):
                part.reset_parameters()

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        x = self.stem(images)  # (B, 64, H / 4, W / 4)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pool(self, maps: list[Tensor]) -> Tensor:
        x = maps[-1] if self.norm is None else self.norm(maps[-1])
        return x.mean((2, 3))


def medvit_v2_tiny(
    *,
    dilation: str = "alternate",
    layout: str = "map",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> MedViTV2:
    """MedViTV2-T: dims (64, 128, 192, 384), depths (2, 2, 6, 1)."""
    return MedViTV2(
        (64, 128, 192, 384),
        (2, 2, 6, 1),
        dilation=dilation,
        layout=layout,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def medvit_v2_small(
    *,
    dilation: str = "alternate",
    layout: str = "map",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> MedViTV2:
    """MedViTV2-S: dims (64, 128, 256, 512), depths (2, 2, 6, 2)."""
    return MedViTV2(
        (64, 128, 256, 512),
        (2, 2, 6, 2),
        dilation=dilation,
        layout=layout,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def medvit_v2_base(
    *,
    dilation: str = "alternate",
    layout: str = "map",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
) -> MedViTV2:
    """MedViTV2-B: dims (96, 192, 384, 768), depths (2, 2, 6, 2)."""
    return MedViTV2(
        (96, 192, 384, 768),
        (2, 2, 6, 2),
        dilation=dilation,
        layout=layout,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def medvit_v2_large(
    *,
    dilation: str = "alternate",
    layout: str = "map",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
) -> MedViTV2:
    """MedViTV2-L: dims (96, 256, 512, 1024), depths (2, 2, 6, 2)."""
    return MedViTV2(
        (96, 256, 512, 1024),
        (2, 2, 6, 2),
        dilation=dilation,
        layout=layout,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
