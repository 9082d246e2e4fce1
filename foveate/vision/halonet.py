"""HaloNet: all queries of a block share one key window, the block and a margin around it; ResNets made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import ConvNorm, DropPath, SqueezeExcite, drop_path_rates
from foveate.vision.windows import attend, merge, pad_to, partition

EDGES = ("zero", "mask")
POSITIONS = ("pixels", "cells")


class HaloAttention(nn.Module):
    """Blocked local attention: the b x b queries of a block see the (b + 2 h) x (b + 2 h) keys around it.

        K(y) = { t : Y - h <= t < Y + b + h },   Y = b floor(y / b),   likewise in x
        a_ij = q_i . k_j / sqrt(d) + q_i . (r[ky - iy + win - 1] + c[kx - ix + win - 1]),   win = b + 2 h

    with the query's place (iy, ix) in its block and the key's place (ky, kx) in the window. r and c are shared by the
    heads; their first 2 h rows are never used. Projections have no bias, so that with edge="zero" a cell outside
    the image is a key 0 with value 0, which takes weight; edge="mask" leaves such cells out.

    With stride 2 only every second query per axis is computed; keys stay at full resolution. Where 2 does not divide b,
    all are computed and averaged 2 x 2.

    Scaling Local Self-Attention for Parameter Efficient Visual Backbones (2021). Differs: sizes that b does not divide
    are padded right and below by cells outside the image.

    Args:
        dim: C of the input.
        heads: divides the widths of queries and of values.
        out: width of the values and of the result; default dim.
        head_dim: width of a query head; default out / heads.
        block, halo: b >= 1 and h >= 0.
        stride: 1 or 2.
        edge: "zero" or "mask".
        scale_positions: also divide the position term by sqrt(d).
        positions: where a strided query stands: "pixels", iy = 0, 2, ..., or "cells", iy = 0, 1, ..., as timm counts.

    Shape: (B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out).

    Raises:
        ValueError: widths that heads do not divide, or another value than those listed.

    >>> HaloAttention(16, 2, block=4, halo=1)(torch.randn(2, 5, 7, 16)).shape
    torch.Size([2, 5, 7, 16])
    >>> HaloAttention(16, 2, out=24, block=4, stride=2)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 4, 4, 24])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        out: int | None = None,
        head_dim: int | None = None,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        edge: str = "zero",
        scale_positions: bool = False,
        positions: str = "pixels",
    ) -> None:
        super().__init__()
        out = dim if out is None else out
        if out % heads:
            raise ValueError(f"HaloAttention: heads must divide out, got {heads} for {out}")
        if block < 1 or halo < 0:
            raise ValueError(f"HaloAttention: block must be >= 1 and halo >= 0, got {block} and {halo}")
        if stride not in (1, 2):
            raise ValueError(f"HaloAttention: stride must be 1 or 2, got {stride}")
        if edge not in EDGES:
            raise ValueError(f"HaloAttention: edge {edge!r}; accepted: {', '.join(EDGES)}")
        if positions not in POSITIONS:
            raise ValueError(f"HaloAttention: positions {positions!r}; accepted: {', '.join(POSITIONS)}")
        self.dim, self.heads, self.out = dim, heads, out
        self.head_dim = out // heads if head_dim is None else head_dim
        self.block, self.halo, self.stride, self.edge = block, halo, stride, edge
        self.window = block + 2 * halo
        self.step = stride if block % stride == 0 else 1  # from query to query
        self.scale_positions, self.positions = scale_positions, positions
        self.q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.kv = nn.Linear(dim, heads * self.head_dim + out, bias=False)  # per head its key, then its value
        self.rows = nn.Parameter(torch.empty(2 * self.window - 1, self.head_dim))
        self.columns = nn.Parameter(torch.empty(2 * self.window - 1, self.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections of standard deviation dim ** -0.5, tables of head_dim ** -0.5."""
        for weight in (self.q.weight, self.kv.weight):
            nn.init.trunc_normal_(weight, std=self.dim**-0.5)
        for table in (self.rows, self.columns):
            nn.init.normal_(table, std=self.head_dim**-0.5)

    def position_logits(self, q: Tensor) -> Tensor:
        """Queries (G, heads, n, d) of whole blocks -> (G, heads, n, win * win)."""
        side = self.block // self.step
        place = torch.arange(side, device=q.device) * (self.step if self.positions == "pixels" else 1)
        key = torch.arange(self.window, device=q.device)
        index = self.window - 1 + key - place[:, None]  # (side, win)
        q = q.unflatten(2, (side, side))  # (G, heads, y, x, d)
        rows = torch.einsum("ghyxd,ykd->ghyxk", q, self.rows[index])[..., :, None]
        columns = torch.einsum("ghyxd,xkd->ghyxk", q, self.columns[index])[..., None, :]
        logits = (rows + columns).flatten(4).flatten(2, 3)  # (G, heads, n, win win)
        return logits * self.head_dim**-0.5 if self.scale_positions else logits

    def inside(self, grid: tuple[int, int], blocks: tuple[int, int], device: torch.device) -> Tensor:
        """bool (blocks, win * win): which keys of each block's window are cells of the image."""
        axes = []
        for cells, count in zip(grid, blocks, strict=True):
            first = torch.arange(count, device=device)[:, None] * self.block - self.halo
            at = first + torch.arange(self.window, device=device)  # (count, win)
            axes.append((at >= 0) & (at < cells))
        both = axes[0][:, None, :, None] & axes[1][None, :, None, :]  # (nH, nW, win, win)
        return both.flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"HaloAttention: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}")
        batch, height, width, _ = x.shape
        x = pad_to(x, self.block)  # (B, H', W', C)
        blocks = (x.shape[1] // self.block, x.shape[2] // self.block)
        side = self.block // self.step
        q = partition(self.q(x[:, :: self.step, :: self.step]), (side, side))  # (B blocks, n, heads d)
        q = q.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)  # (B blocks, heads, n, d)
        kv = F.pad(self.kv(x), (0, 0) + 4 * (self.halo,))
        kv = kv.unfold(1, self.window, self.block).unfold(
            2, self.window, self.block
        )  # (B, nH, nW, C, win, win)
        kv = (
            kv.flatten(4).unflatten(3, (self.heads, -1)).flatten(0, 2).transpose(2, 3)
        )  # (.., heads, win win, d + e)
        k, v = kv.split([self.head_dim, self.out // self.heads], 3)
        bias = self.position_logits(q)
        if self.edge == "mask":
            inside = self.inside((height, width), blocks, x.device)[:, None, None]  # (blocks, 1, 1, win win)
            bias = bias.unflatten(0, (batch, -1)).masked_fill(~inside, -torch.inf).flatten(0, 1)
        y = attend(q, k, v, bias=bias)  # (B blocks, heads, n, e)
        grid = (blocks[0] * side, blocks[1] * side)
        y = merge(y.transpose(1, 2).flatten(2), (side, side), grid)  # (B, H' / step, W' / step, out)
        y = y[:, : -(-height // self.step), : -(-width // self.step)]
        if self.step == self.stride:
            return y
        pooled = F.avg_pool2d(y.permute(0, 3, 1, 2), 2, ceil_mode=True, count_include_pad=False)
        return pooled.permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, block={self.block}, halo={self.halo}, stride={self.stride}"


@dataclass(frozen=True)
class HaloStage:
    """One stage of a `HaloNet`.

    Args:
        kinds: one letter per block: "a" attention, "c" a 3 x 3 convolution.
        mid: width inside the blocks. out: width of their results.
        values: width of the values; default mid.
        stride: of the first block.
        heads, block, halo: of the attention.
    """

    kinds: str
    mid: int
    out: int
    values: int | None = None
    stride: int = 2
    heads: int = 8
    block: int = 8
    halo: int = 3

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set("ac"):
            raise ValueError(f"HaloStage: kinds must be letters a and c, one per block, got {self.kinds!r}")


class HaloBlock(nn.Module):
    """Residual bottleneck on (B, C, H, W): 1 x 1, halo attention or a 3 x 3 convolution, 1 x 1.

        y = act(shortcut(x) + BN(W_3 act(BN(mix(act(BN(W_1 x)))))))

    The shortcut is x itself, or a 1 x 1 convolution and BN where stride or width changes.

    Args:
        dim: C of the input.
        stage: widths and attention; its kinds and stride are not read here.
        kind: "a" or "c". stride: of the mixer and the shortcut.
        squeeze: hidden width of a squeeze-and-excite after a convolution, or None.
        positions: see `HaloAttention`.
    """

    def __init__(
        self,
        dim: int,
        stage: HaloStage,
        kind: str,
        *,
        stride: int = 1,
        act: Callable[[], nn.Module] = nn.SiLU,
        drop_path: float = 0.0,
        squeeze: int | None = None,
        edge: str = "zero",
        positions: str = "pixels",
    ) -> None:
        super().__init__()
        values = stage.mid if stage.values is None or kind == "c" else stage.values
        self.conv1 = ConvNorm(dim, stage.mid, 1, act=act)
        if kind == "a":
            self.attention = HaloAttention(
                stage.mid,
                stage.heads,
                out=values,
                head_dim=stage.mid // stage.heads,
                block=stage.block,
                halo=stage.halo,
                stride=stride,
                edge=edge,
                positions=positions,
            )
            self.norm = nn.BatchNorm2d(values)
        else:
            self.conv2 = ConvNorm(stage.mid, stage.mid, 3, stride, act=act)
            self.squeeze = nn.Identity() if squeeze is None else SqueezeExcite(stage.mid, squeeze)
        self.conv3 = ConvNorm(values, stage.out, 1, norm_init=0.0)
        same = stride == 1 and dim == stage.out
        self.shortcut = nn.Identity() if same else ConvNorm(dim, stage.out, 1, stride)
        self.drop_path = DropPath(drop_path)
        self.kind, self.act = kind, act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.kind == "a":
            y = self.attention(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = self.act(self.norm(y))
        else:
            y = self.squeeze(self.conv2(y))
        return self.act(self.shortcut(x) + self.drop_path(self.conv3(y)))


class HaloNet(Backbone):
    """A ResNet whose 3 x 3 convolutions are halo attention, in all blocks or in some.

    Stem and max pooling (4 pixels per cell), stages, an optional 1 x 1 convolution before the mean, the head.

    Args:
        stages: `HaloStage`s.
        stem: "7x7" (one convolution) or "tiered" (three of 3 x 3, widths 24, 32, 64).
        pool: max pooling after the stem; without it the last convolution of a tiered stem has stride 2.
        width: of the 1 x 1 convolution before the mean, or None.
        act: makes the activation.
        squeeze: squeeze-and-excite by 16 in the convolutional blocks.
        edge, positions: see `HaloAttention`.
        num_classes, in_channels, drop_path, features_only: see `Backbone`.

    >>> net = HaloNet((HaloStage("a", 16, 32, stride=1), HaloStage("ca", 16, 32)), num_classes=5)
    >>> net(torch.randn(2, 3, 33, 40)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        stages: Sequence[HaloStage],
        *,
        stem: str = "7x7",
        pool: bool = True,
        width: int | None = None,
        act: Callable[[], nn.Module] = nn.SiLU,
        squeeze: bool = False,
        edge: str = "zero",
        positions: str = "pixels",
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.0,
        features_only: bool = False,
    ) -> None:
        if stem not in ("7x7", "tiered"):
            raise ValueError(f"HaloNet: stem {stem!r}; accepted: 7x7, tiered")
        if not pool and stem == "7x7":
            raise ValueError("HaloNet: pool must be True with stem '7x7', got False")
        strides = [4]
        for stage in stages:
            strides.append(strides[-1] * stage.stride)
        super().__init__(
            channels=[stage.out for stage in stages],
            strides=strides[1:],
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        if stem == "7x7":
            convs = [ConvNorm(in_channels, 64, 7, 2, act=act)]
        else:
            convs = [
                ConvNorm(in_channels, 24, 3, 2, act=act),
                ConvNorm(24, 32, 3, act=act),
                ConvNorm(32, 64, 3, 1 if pool else 2, act=act),
            ]
        self.stem = nn.Sequential(*convs)
        self.stem_pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        rates = drop_path_rates(drop_path, [len(stage.kinds) for stage in stages])
        self.stages, dim = nn.ModuleList(), 64
        for stage, drops in zip(stages, rates, strict=True):
            blocks = nn.Sequential()
            for i, (kind, drop) in enumerate(zip(stage.kinds, drops, strict=True)):
                hidden = max(8, (stage.mid + 64) // 128 * 8) if squeeze else None  # mid / 16, a multiple of 8
                stride = stage.stride if i == 0 else 1
                block = HaloBlock(
                    dim,
                    stage,
                    kind,
                    stride=stride,
                    act=act,
                    drop_path=drop,
                    squeeze=hidden,
                    edge=edge,
                    positions=positions,
                )
                blocks.append(block)
                dim = stage.out
            self.stages.append(blocks)
        self.final = None if width is None or features_only else ConvNorm(dim, width, 1, act=act)
        self.make_head(width=dim if width is None else width)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        x = self.stem_pool(self.stem(images))  # (B, 64, H / 4, W / 4)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pool(self, maps: list[Tensor]) -> Tensor:
        x = maps[-1] if self.final is None else self.final(maps[-1])
        return x.mean((2, 3))


FAMILY = {  # block, halo, r_v, r_b, blocks of the third stage, width of the last convolution
    "h0": (8, 3, 1, 0.5, 7, None),
    "h1": (8, 3, 1, 1, 10, None),
    "h2": (8, 3, 1, 1.25, 11, None),
    "h3": (10, 3, 1, 1.5, 12, 1024),
    "h4": (12, 2, 1, 3, 12, 1280),
    "h5": (14, 2, 2.5, 2, 23, 1536),
    "h6": (8, 4, 3, 2.75, 24, 1536),
    "h7": (10, 3, 4, 3.5, 26, 2048),
}


def _family(
    name: str, edge: str, num_classes: int, in_channels: int, drop_path: float, features_only: bool
) -> HaloNet:
    block, halo, values, outs, third, width = FAMILY[name]
    stages = [
        HaloStage("a" * depth, mid, int(outs * mid), int(values * mid), stride, heads, block=block, halo=halo)
        for mid, depth, stride, heads in zip(
            (64, 128, 256, 512), (3, 3, third, 3), (1, 2, 2, 2), (4, 8, 8, 8), strict=True
        )
    ]
    return HaloNet(
        stages,
        width=width,
        edge=edge,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def halonet_h0(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """HaloNet-H0: 5.5 million parameters, images of 256 pixels."""
    return _family("h0", edge, num_classes, in_channels, drop_path, features_only)


def halonet_h1(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """HaloNet-H1: 8.1 million parameters, images of 256 pixels."""
    return _family("h1", edge, num_classes, in_channels, drop_path, features_only)


def halonet_h2(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """HaloNet-H2: 9.4 million parameters, images of 256 pixels."""
    return _family("h2", edge, num_classes, in_channels, drop_path, features_only)


def halonet_h3(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """HaloNet-H3: 11.8 million parameters, images of 320 pixels."""
    return _family("h3", edge, num_classes, in_channels, drop_path, features_only)


def halonet_h4(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """HaloNet-H4: 19.1 million parameters, images of 384 pixels."""
    return _family("h4", edge, num_classes, in_channels, drop_path, features_only)


def halonet_h5(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """HaloNet-H5: 30.7 million parameters, images of 448 pixels."""
    return _family("h5", edge, num_classes, in_channels, drop_path, features_only)


def halonet_h6(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """HaloNet-H6: 43.4 million parameters, images of 512 pixels."""
    return _family("h6", edge, num_classes, in_channels, drop_path, features_only)


def halonet_h7(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """HaloNet-H7: 67.4 million parameters, images of 600 pixels."""
    return _family("h7", edge, num_classes, in_channels, drop_path, features_only)


def _timm(
    stages: Sequence[HaloStage],
    act: Callable[[], nn.Module],
    edge: str,
    num_classes: int,
    in_channels: int,
    drop_path: float,
    features_only: bool,
    *,
    pool: bool = True,
    width: int | None = None,
    squeeze: bool = False,
) -> HaloNet:
    return HaloNet(
        stages,
        stem="tiered",
        pool=pool,
        width=width,
        act=act,
        squeeze=squeeze,
        edge=edge,
        positions="cells",
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def halonet26t(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """ResNet-26-T of timm with halo attention (halo 2) in the last two stages: 12.5 million parameters."""
    stages = (
        HaloStage("cc", 64, 256, stride=1),
        HaloStage("cc", 128, 512),
        HaloStage("ca", 256, 1024, halo=2),
        HaloStage("aa", 512, 2048, halo=2),
    )
    return _timm(stages, nn.ReLU, edge, num_classes, in_channels, drop_path, features_only)


def halonet50ts(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """ResNet-50-T of timm with SiLU and halo attention in every second block of the last two stages: 22.7 million."""
    stages = (
        HaloStage("ccc", 64, 256, stride=1),
        HaloStage("ccca", 128, 512, heads=4),
        HaloStage("cacaca", 256, 1024),
        HaloStage("cac", 512, 2048),
    )
    return _timm(stages, nn.SiLU, edge, num_classes, in_channels, drop_path, features_only)


def sehalonet33ts(
    *,
    edge: str = "zero",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> HaloNet:
    """ResNet-33-T of timm: squeeze-and-excite in the blocks without halo attention; 13.7 million parameters."""
    stages = (
        HaloStage("cc", 64, 256, stride=1),
        HaloStage("cca", 128, 512),
        HaloStage("cca", 256, 1024),
        HaloStage("aa", 512, 1536),
    )
    return _timm(
        stages,
        nn.SiLU,
        edge,
        num_classes,
        in_channels,
        drop_path,
        features_only,
        pool=False,
        width=1280,
        squeeze=True,
    )


RENAMED = (  # patterns of names in timm, and what they are called here
    (r"^stem\.conv(\d)", lambda m: f"stem.{int(m[1]) - 1}"),
    (r"\bbn\b", "norm"),
    (r"conv1_1x1", "conv1"),
    (r"conv2_kxk", "conv2"),
    (r"conv3_1x1", "conv3"),
    (r"post_attn", "norm"),
    (r"self_attn\.pos_embed\.height_rel", "attention.rows"),
    (r"self_attn\.pos_embed\.width_rel", "attention.columns"),
    (r"self_attn", "attention"),
    (r"attn\.fc1", "squeeze.reduce"),
    (r"attn\.fc2", "squeeze.expand"),
    (r"^final_conv", "final"),
    (r"^head\.fc", "head"),
)


def halonet_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of timm's halonet26t, halonet50ts or sehalonet33ts, for the factory of the same name here.

    >>> name = "stages.2.1.self_attn.q.weight"
    >>> halonet_from_timm({name: torch.zeros(8, 4, 1, 1)})["stages.2.1.attention.q.weight"].shape
    torch.Size([8, 4])
    """
    made = {}
    for name, value in state.items():
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        made[name] = value.flatten(1) if ".attention." in name and value.ndim == 4 else value
    return made
