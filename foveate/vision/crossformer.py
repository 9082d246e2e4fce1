"""CrossFormer: windows and strided groups in turn, biases from a small MLP of the offset, patches of several sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision import windows
from foveate.vision.backbone import Backbone
from foveate.vision.blocks import DropPath, Mlp, drop_path_rates


class DynamicPositionBias(nn.Module):
    """A bias per head from the offset of two tokens, by a small MLP: one for any size of group.

        f(dy, dx) = W3 r(W2 r(W1 r(W0 (dy, dx)))),  r(x) = ReLU(LN(x))

    Each W has a bias. Offsets are plain numbers, in steps of the group, so a table for larger groups holds that for
    smaller ones.

    Args:
        dim: C of the attention.
        heads: biases per offset.
        hidden: p, width of the MLP; default C / 16 as in the released models (the paper's text has C / 4).
        residual: W1 and W2 are added to what they read.

    Shape: offsets (M, 2) float -> (M, heads).

    Source: CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (2021).

    >>> bias = DynamicPositionBias(64, heads=2)
    >>> bias(torch.tensor([[0.0, 0.0], [1.0, -3.0]])).shape, bias.table((3, 2)).shape
    (torch.Size([2, 2]), torch.Size([2, 6, 6]))
    """

    def __init__(self, dim: int, heads: int, *, hidden: int | None = None, residual: bool = False) -> None:
        super().__init__()
        width = dim // 16 if hidden is None else hidden
        if width < 1:
            raise ValueError(f"DynamicPositionBias: hidden (default dim / 16) must be >= 1, got {width}")
        self.residual = residual
        self.first = nn.Linear(2, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.maps = nn.ModuleList(nn.Linear(width, out) for out in (width, width, heads))

    def forward(self, offsets: Tensor) -> Tensor:
        """(M, heads) for offsets (M, 2) in steps of the group: rows and columns, query less key."""
        x = self.first(offsets)
        for norm, linear in zip(self.norms, self.maps, strict=True):
            y = linear(F.relu(norm(x)))
            x = x + y if self.residual and linear is not self.maps[-1] else y
        return x

    def table(self, group: tuple[int, int]) -> Tensor:
        """(heads, n, n) for the n tokens of a group of (rows, columns): the MLP runs once per offset that occurs."""
        rows, columns = (torch.arange(1 - n, n) for n in group)
        offsets = torch.cartesian_prod(rows, columns).to(
            self.first.weight
        )  # ((2 rows - 1)(2 columns - 1), 2)
        n = group[0] * group[1]
        index = windows.relative_index(group, offsets.device).flatten()
        return self(offsets).index_select(0, index).view(n, n, -1).permute(2, 0, 1)


class LSDAttention(nn.Module):
    """Long short distance attention: among G x G tokens that stand I apart.

        group(t) = (floor(t / (G I)), t mod I)  on each axis,  place in the group = floor((t mod G I) / I)
        o = softmax(q k^T / sqrt(d) + f(dy, dx)) v   within a group,  out = o W_O

    I = 1 is attention in windows (short distance). f is a `DynamicPositionBias` of the offset of the places. A token
    reads G^2 tokens, within a tile of G I tokens a side; `foveate.patterns.Grid` is the case of one tile.

    Args:
        dim: C, width of the tokens.
        heads: heads of width d = C / heads.
        group: G.
        interval: I.
        bias: of the query, key and value map.
        position: with f; hidden: its width, default C / 16.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W: groups that reach beyond the map have fewer tokens. Where
    min(H, W) <= G the layer attends in windows of min(H, W) tokens a side, whatever the interval.
    Errors: ValueError for dim, group, interval and shapes that do not fit.

    Source: CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (2021). Differs: any size at
    each call.

    >>> LSDAttention(32, heads=2, group=3, interval=2)(torch.randn(2, 12, 13, 32)).shape
    torch.Size([2, 12, 13, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        group: int = 7,
        interval: int = 1,
        bias: bool = True,
        position: bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"LSDAttention: dim must be a multiple of heads, got {dim} and {heads}")
        for name, value in (("group", group), ("interval", interval)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"LSDAttention: {name} must be an int >= 1, got {value!r}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.group, self.interval = group, interval
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.position = DynamicPositionBias(dim, heads, hidden=hidden) if position else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"LSDAttention: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}")
        h, w = x.shape[1:3]
        most, interval = self.group, self.interval
        if min(h, w) <= most:
            most, interval = min(h, w), 1
        rows, columns = (
            min(most, -(-n // interval)) for n in (h, w)
        )  # places that no group fills are left out
        group, tile = (rows, columns), (rows * interval, columns * interval)
        padded = windows.pad_to(x, tile)
        grid = padded.shape[1], padded.shape[2]
        mask = None
        if grid != (h, w):  # cells beyond the map are no keys
            mask = _inside((h, w), group, interval, x.device)
        cells = gather_groups(padded, group, interval)  # (groups B, n, C)
        q, k, v = (
            self.qkv(cells).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (.., heads, n, d)
        bias = None if self.position is None else self.position.table(group)
        out = windows.attend(q, k, v, bias=bias, mask=mask)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return scatter_groups(out, group, interval, grid)[:, :h, :w]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, group={self.group}, interval={self.interval}"


@lru_cache(maxsize=64)
def _inside(shape: windows.Pair, group: windows.Pair, interval: int, device: torch.device) -> Tensor:
    """Keys that are on the map, bool (groups, n, n), for a map of (H, W) that is padded before it is gathered."""
    with torch.inference_mode(False), torch.device("cpu"):  # kept for others, whoever asks first
        real = windows.pad_to(torch.ones(1, *shape, 1), (group[0] * interval, group[1] * interval))
        real = gather_groups(real, group, interval)[:, None, :, 0] > 0  # (groups, 1, n)
        return real.repeat(1, real.shape[2], 1).to(device)


def gather_groups(x: Tensor, group: windows.Pair, interval: int) -> Tensor:
    """(B, H, W, C) -> (B g, n, C), n = rows * columns of a group; the g groups of one image stay together.

    rows * interval divides H, columns * interval divides W.

    >>> gather_groups(torch.arange(64).view(1, 8, 8, 1), (2, 2), 2)[1].flatten().tolist()
    [1, 3, 17, 19]
    """
    (rows, columns), (b, h, w, c) = group, x.shape
    x = x.view(b, h // (rows * interval), rows, interval, w // (columns * interval), columns, interval, c)
    return x.permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(
        -1, rows * columns, c
    )  # tiles, then places in an interval


def scatter_groups(cells: Tensor, group: windows.Pair, interval: int, grid: windows.Pair) -> Tensor:
    """The inverse of `gather_groups`: (B g, n, C) -> (B, H, W, C), grid = (H, W)."""
    (rows, columns), (h, w), c = group, grid, cells.shape[2]
    tiles = h // (rows * interval), w // (columns * interval)
    cells = cells.view(-1, *tiles, interval, interval, rows, columns, c)
    return cells.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(-1, h, w, c)


class CrossScaleEmbed(nn.Module):
    """Convolutions of several kernels with one stride, side by side: every token mixes patches of several sizes.

        out = concat_i conv_{k_i, stride s, padding (k_i - s) / 2}(x),  widths dim / 2, dim / 4, ..., the last one twice

    Args:
        in_channels, dim: widths before and after.
        kernels: at least stride, with its parity.
        stride: s.

    Shape: (B, in_channels, H, W) -> (B, dim, ceil(H / s), ceil(W / s)); sides that s does not divide are padded with
    zeros at their ends.

    Source: CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (2021).

    >>> CrossScaleEmbed(3, 16)(torch.randn(2, 3, 32, 41)).shape
    torch.Size([2, 16, 8, 11])
    """

    def __init__(
        self, in_channels: int, dim: int, *, kernels: Sequence[int] = (4, 8, 16, 32), stride: int = 4
    ) -> None:
        super().__init__()
        if not kernels or any(k < stride or (k - stride) % 2 for k in kernels):
            raise ValueError(
                f"CrossScaleEmbed: kernels must be at least stride, with its parity, got {tuple(kernels)} and {stride}"
            )
        parts = [dim >> (i + 1) for i in range(len(kernels) - 1)]
        parts.append(dim >> (len(kernels) - 1))
        if sum(parts) != dim:
            raise ValueError(
                f"CrossScaleEmbed: dim must be a multiple of {2 ** (len(kernels) - 1)} for {len(kernels)} kernels, "
                f"got {dim}"
            )
        self.stride = stride
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, width, kernel, stride, (kernel - stride) // 2)
            for width, kernel in zip(parts, kernels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))
        return torch.cat([conv(x) for conv in self.convs], 1)


class CrossFormerBlock(nn.Module):
    """x + LSDA(LN x), then x + MLP(LN x), on (B, H, W, C); then LN(depthwise 3 x 3) in place of x, where asked for.

    Args:
        dim, heads, group, interval: as of `LSDAttention`.
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: rate.
        convolution: ends with the amplitude cooling layer of CrossFormer++, a convolution and a norm without shortcut.

    Shape: (B, H, W, C) -> (B, H, W, C).

    Source: CrossFormer (2021), CrossFormer++: A Versatile Vision Transformer Hinging on Cross-scale Attention (2023).

    >>> CrossFormerBlock(32, heads=2, group=4, interval=2)(torch.randn(1, 9, 8, 32)).shape
    torch.Size([1, 9, 8, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        group: int = 7,
        interval: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        convolution: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = LSDAttention(dim, heads, group=group, interval=interval)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop = DropPath(drop_path)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if convolution else None
        self.conv_norm = nn.LayerNorm(dim) if convolution else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        x = x + self.drop(self.mlp(self.norm2(x)))
        if self.conv is not None and self.conv_norm is not None:
            x = self.conv_norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x


class CrossFormer(Backbone):
    """Stages of short and long distance blocks in turn, with cross-scale embeddings before and between them.

    Args:
        dim: C of the first stage; each next one has twice as many channels.
        depths, heads: blocks and heads per stage.
        group: G, per stage or one for all.
        interval: I of the long distance blocks (every second one), per stage. (8, 4, 2, 1) with G = 7 makes one tile of
            the map of a 224 x 224 image in every stage.
        mlp_ratio: of the MLPs.
        cooling: CrossFormer++: every third block but the last of its stage ends with a convolution and a norm.
        num_classes, in_channels, drop_path, features_only: as for every backbone.

    Shape: (B, in_channels, H, W) -> (B, num_classes), any H and W. Maps at strides 4, 8, 16 and 32.

    Source: CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (2021). Differs: any size at
    each call; odd sides are padded before they are halved.

    >>> model = CrossFormer(16, (1, 2), (1, 2), group=3, interval=(2, 1), num_classes=3).eval()
    >>> images = torch.randn(2, 3, 31, 40)
    >>> model(images).shape, [tuple(m.shape) for m in model.forward_features(images)]
    (torch.Size([2, 3]), [(2, 16, 8, 10), (2, 32, 4, 5)])
    """

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        *,
        group: int | Sequence[int] = 7,
        interval: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        cooling: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.0,
        features_only: bool = False,
    ) -> None:
        stages = len(depths)
        groups = (group,) * stages if isinstance(group, int) else tuple(group)
        if not depths or min(depths) < 1 or {len(heads), len(groups), len(interval)} != {stages}:
            raise ValueError(
                "CrossFormer: depths, heads, group and interval must be as many, each depth >= 1, "
                f"got {tuple(depths)}, {tuple(heads)}, {groups} and {tuple(interval)}"
            )
        super().__init__(
            channels=tuple(dim << i for i in range(stages)),
            strides=tuple(4 << i for i in range(stages)),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        self.embeds = nn.ModuleList([CrossScaleEmbed(in_channels, dim)])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in (dim, *self.channels[:-1]))
        self.embeds.extend(
            CrossScaleEmbed(width, 2 * width, kernels=(2, 4), stride=2) for width in self.channels[:-1]
        )
        rates = drop_path_rates(drop_path, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    CrossFormerBlock(
                        self.channels[i],
                        heads[i],
                        group=groups[i],
                        interval=interval[i] if j % 2 else 1,
                        mlp_ratio=mlp_ratio,
                        drop_path=rates[i][j],
                        convolution=cooling and j % 3 == 2 and j < depths[i] - 1,
                    )
                    for j in range(depths[i])
                )
            )
            for i in range(stages)
        )
        self.make_head(nn.LayerNorm(self.channels[-1]))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """One map (B, dim 2^i, H / s, W / s) per stage, s = 4, 8, ..., rounded up."""
        self.check(images)
        x, maps = images, []
        for i, (norm, embed, stage) in enumerate(zip(self.norms, self.embeds, self.stages, strict=True)):
            if i:  # norm, then convolutions; the first time the other way round
                x = embed(norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            else:
                x = norm(embed(x).permute(0, 2, 3, 1))
            x = stage(x)  # (B, H, W, C)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


_OFFICIAL = (
    (r"^patch_embed\.projs\.", "embeds.0.convs."),
    (r"^patch_embed\.norm\.", "norms.0."),
    (r"^layers\.(\d+)\.downsample\.reductions\.", lambda m: f"embeds.{int(m[1]) + 1}.convs."),
    (r"^layers\.(\d+)\.downsample\.norm\.", lambda m: f"norms.{int(m[1]) + 1}."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.attn\.pos\.pos_proj\.", ".attention.position.first."),
    (r"\.attn\.pos\.pos(\d)\.0\.", lambda m: f".attention.position.norms.{int(m[1]) - 1}."),
    (r"\.attn\.pos\.pos(\d)\.2\.", lambda m: f".attention.position.maps.{int(m[1]) - 1}."),
    (r"\.attn\.", ".attention."),
    (r"\.ex_conv\.", ".conv."),
    (r"\.ex_ln\.", ".conv_norm."),
)


def crossformer_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `CrossFormer` from that of the released code, whose parameters have other names.

    >>> list(crossformer_from_official({"layers.0.downsample.reductions.1.bias": torch.zeros(1)}))
    ['embeds.1.convs.1.bias']
    """
    made = {}
    for name, value in state.items():
        for old, new in _OFFICIAL:
            name = re.sub(old, new, name)
        made[name] = value
    return made


def crossformer_tiny(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> CrossFormer:
    """CrossFormer-T: 27,776,794 parameters."""
    return CrossFormer(
        64,
        (1, 1, 8, 6),
        (2, 4, 8, 16),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def crossformer_small(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.2, features_only: bool = False
) -> CrossFormer:
    """CrossFormer-S: 30,657,394 parameters."""
    return CrossFormer(
        96,
        (2, 2, 6, 2),
        (3, 6, 12, 24),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def crossformer_base(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.3, features_only: bool = False
) -> CrossFormer:
    """CrossFormer-B: 51,971,554 parameters."""
    return CrossFormer(
        96,
        (2, 2, 18, 2),
        (3, 6, 12, 24),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def crossformer_large(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.5, features_only: bool = False
) -> CrossFormer:
    """CrossFormer-L: 91,971,184 parameters."""
    return CrossFormer(
        128,
        (2, 2, 18, 2),
        (4, 8, 16, 32),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def crossformer_pp_small(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.2, features_only: bool = False
) -> CrossFormer:
    """CrossFormer++ S: 23,325,340 parameters."""
    return CrossFormer(
        64,
        (2, 2, 18, 2),
        (2, 4, 8, 16),
        group=(4, 4, 14, 7),
        interval=(4, 2, 1, 1),
        cooling=True,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
