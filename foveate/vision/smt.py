"""Scale-aware modulation: values weighted by a map from growing convolutions, and SMT, where attention takes over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.vision.backbone import Backbone
from foveate.vision.blocks import DropPath, LayerScale, drop_path_rates

MIXERS = ("sam", "attn")
STAGES = ("sam", "hybrid", "attn")


class ScaleAwareModulation(nn.Module):
    """A value path, multiplied by a map in which every channel group has seen four scales.

        s_hat_n = DW_{3+2n}(s_n),  n = 0 .. heads - 1;   (s_0, s_1, ...) = split(W_s x),   v = W_v x
        M = W_2 GELU(BN(W_1 mix(s_hat_0, s_hat_1, ...)))
        y = W_o (v * M)

    DW_k is a depthwise k x k convolution; mix places the j-th channels of all heads side by side, so that W_1, a
    grouped 1 x 1 convolution of C/heads groups, reads one channel of every scale per group. W_2 is dense. No sigmoid
    and no softmax: the modulator has any sign and size. The depthwise convolutions of four heads take 41 multiply-adds
    per token and channel; all work is linear in the tokens.

    Args:
        dim: C, a multiple of heads.
        heads: channel heads; head n has a kernel of side 3 + 2 n.
        expand: width of the hidden map over C.
        bias: of W_v and W_s; the other maps always have one.

    Shape: (B, H, W, C) -> the same.

    Raises:
        ValueError: dim that is no multiple of heads, other shapes of x.

    Source: Scale-Aware Modulation Meet Transformer (2023).

    >>> ScaleAwareModulation(32)(torch.randn(2, 7, 5, 32)).shape
    torch.Size([2, 7, 5, 32])
    """

    def __init__(self, dim: int, heads: int = 4, *, expand: int = 2, bias: bool = True) -> None:
        super().__init__()
        divides("ScaleAwareModulation", dim, heads)
        if isinstance(expand, bool) or not isinstance(expand, int) or expand < 1:
            raise ValueError(f"ScaleAwareModulation: expand must be an int >= 1, got {expand!r}")
        self.dim, self.heads = dim, heads
        part = dim // heads
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.s_proj = nn.Linear(dim, dim, bias=bias)
        self.scales = nn.ModuleList(
            nn.Conv2d(part, part, 3 + 2 * n, padding=1 + n, groups=part) for n in range(heads)
        )
        self.fuse = nn.Conv2d(dim, expand * dim, 1, groups=part)
        self.norm = nn.BatchNorm2d(expand * dim)
        self.mix = nn.Conv2d(expand * dim, dim, 1)
        self.o_proj = nn.Linear(dim, dim)
        init_smt_(self)

    def convolved(self, s: Tensor) -> Tensor:
        """mix(s_hat) (B, C, H, W) of s (B, C, H, W): channel j * heads + n is channel j of head n."""
        heads = [scale(part) for scale, part in zip(self.scales, s.chunk(self.heads, 1), strict=True)]
        return torch.stack(heads, 2).flatten(1, 2)

    def modulator(self, x: Tensor) -> Tensor:
        """M (B, H, W, C) of x (B, H, W, C)."""
        s = self.s_proj(x).permute(0, 3, 1, 2)  # (B, C, H, W)
        return self.mix(F.gelu(self.norm(self.fuse(self.convolved(s))))).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """y (B, H, W, C) of x (B, H, W, C)."""
        check_map("ScaleAwareModulation", x, self.dim)
        return self.o_proj(self.v_proj(x) * self.modulator(x))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class ConvValueAttention(nn.Module):
    """Softmax attention over the whole grid, and a depthwise convolution of the values beside it.

        y = W_o (softmax(q k^T / sqrt(D)) v + DW_3(v))

    Args:
        dim: C, a multiple of heads; heads: H.
        bias: of the query, key and value maps.

    Shape: (B, H, W, C) -> the same. Work grows as the square of the tokens: for coarse grids.

    Source: Scale-Aware Modulation Meet Transformer (2023).

    >>> ConvValueAttention(32, 4)(torch.randn(2, 7, 5, 32)).shape
    torch.Size([2, 7, 5, 32])
    """

    def __init__(self, dim: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        divides("ConvValueAttention", dim, heads)
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=bias)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.o_proj = nn.Linear(dim, dim)
        init_smt_(self)

    def forward(self, x: Tensor) -> Tensor:
        """y (B, H, W, C) of x (B, H, W, C)."""
        check_map("ConvValueAttention", x, self.dim)
        split = lambda t: t.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        k, v = self.kv_proj(x).chunk(2, -1)  # (B, H, W, C)
        out = cast(Tensor, attention(split(self.q_proj(x)), split(k), split(v)))  # (B, heads, N, D)
        near = self.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape) + near)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class ConvMlp(nn.Module):
    """W_2 GELU(h + DW_3(h)), h = W_1 x. Shape: (B, H, W, C) -> the same.

    >>> ConvMlp(8, 16)(torch.randn(1, 4, 3, 8)).shape
    torch.Size([1, 4, 3, 8])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwc = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        init_smt_(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(F.gelu(h + self.dwc(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


class SMTBlock(nn.Module):
    """x + mixer(LN(x)), then x + ConvMlp(LN(x)); the mixer is modulation or attention.

    Args:
        dim: C.
        mixer: "sam": `ScaleAwareModulation`; "attn": `ConvValueAttention`.
        heads: of the mixer.
        mlp_ratio: hidden width of the MLP over C.
        bias: of the mixer's first maps.
        drop_path: share of branches dropped per image in train mode.
        layer_scale: start of a factor per channel on both branches; None: none.

    Shape: (B, H, W, C) -> the same.

    >>> SMTBlock(32, mixer="attn", heads=2)(torch.randn(2, 7, 5, 32)).shape
    torch.Size([2, 7, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: str = "sam",
        heads: int = 4,
        mlp_ratio: float = 4.0,
        bias: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"SMTBlock: mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
        made = ScaleAwareModulation if mixer == "sam" else ConvValueAttention
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mixer = made(dim, heads, bias=bias)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class SMT(Backbone):
    """Stages of modulation first, of modulation and attention in turn, of attention last.

    Stem: convolution of stride 2, batch norm, ReLU, 2 x 2 convolution of stride 2, layer norm; between stages a 3 x 3
    convolution of stride 2 and a layer norm; at the end of every stage a layer norm. Head: mean, linear.

    Args:
        dims, depths, mlp_ratios: per stage.
        mixers: per stage "sam", "attn" or "hybrid" (even blocks "sam", odd ones "attn"); None: "sam", "sam", "hybrid",
            "attn".
        sam_heads: channel heads of the modulation; heads: of the attention, per stage; None where a stage has none.
        stem_kernel: side of the first convolution, odd.
        layer_scale: see `SMTBlock`.
        num_classes, in_channels, drop_path, features_only: see `Backbone`; drop_path grows linearly over the blocks.

    Shape: images (B, in_channels, H, W) of at least 4 x 4 pixels; strides 4, 8, 16, 32, sides rounded up but for the
    second convolution of the stem.

    Source: Scale-Aware Modulation Meet Transformer (2023).

    >>> model = SMT((16, 32), (1, 2), (2, 2), mixers=("sam", "hybrid"), heads=(None, 2), num_classes=10)
    >>> model(torch.randn(2, 3, 32, 24)).shape, [m.shape[1:] for m in model.forward_features(torch.randn(2, 3, 32, 24))]
    (torch.Size([2, 10]), [torch.Size([16, 8, 6]), torch.Size([32, 4, 3])])
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 2),
        *,
        mixers: Sequence[str] | None = None,
        sam_heads: int = 4,
        heads: Sequence[int | None] = (None, None, 8, 16),
        stem_kernel: int = 3,
        layer_scale: float | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.1,
        features_only: bool = False,
    ) -> None:
        mixers = ("sam", "sam", "hybrid", "attn") if mixers is None else tuple(mixers)
        n = len(dims)
        for name, given in (
            ("depths", depths),
            ("mlp_ratios", mlp_ratios),
            ("mixers", mixers),
            ("heads", heads),
        ):
            if len(given) != n:
                raise ValueError(f"SMT: {name} must have one value per stage ({n}), got {tuple(given)}")
        if any(m not in STAGES for m in mixers):
            raise ValueError(f"SMT: mixers must be of {', '.join(STAGES)}, got {mixers}")
        if stem_kernel < 1 or stem_kernel % 2 == 0:
            raise ValueError(f"SMT: stem_kernel must be odd, got {stem_kernel}")
        super().__init__(
            channels=tuple(dims),
            strides=tuple(4 * 2**i for i in range(n)),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, dims[0], stem_kernel, stride=2, padding=stem_kernel // 2, bias=False),
            nn.BatchNorm2d(dims[0]),
            nn.ReLU(),
            nn.Conv2d(dims[0], dims[0], 2, stride=2),
        )
        self.reduce = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(dims)
        )
        self.embed_norms = nn.ModuleList(nn.LayerNorm(d) for d in dims)
        self.stages, self.norms = nn.ModuleList(), nn.ModuleList(nn.LayerNorm(d, eps=1e-6) for d in dims)
        for i, rates in enumerate(drop_path_rates(drop_path, depths)):
            blocks = []
            for j, rate in enumerate(rates):
                mixer = mixers[i] if mixers[i] != "hybrid" else ("sam", "attn")[j % 2]
                chosen = sam_heads if mixer == "sam" else heads[i]
                if chosen is None:
                    raise ValueError(
                        f"SMT: heads[{i}] is None, but stage {i} has attention; accepted: an int"
                    )
                blocks.append(
                    SMTBlock(
                        dims[i],
                        mixer=mixer,
                        heads=chosen,
                        mlp_ratio=mlp_ratios[i],
                        drop_path=rate,
                        layer_scale=layer_scale,
                    )
                )
            self.stages.append(nn.Sequential(*blocks))
        self.make_head()
        init_smt_(self)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The maps (B, C_i, H_i, W_i) at the end of every stage, normalised."""
        self.check(images)
        if min(images.shape[2:]) < 4:
            raise ValueError(f"SMT: images must have sides >= 4, got {tuple(images.shape[2:])}")
        x, maps = images, []
        for i, (stage, before, after) in enumerate(
            zip(self.stages, self.embed_norms, self.norms, strict=True)
        ):
            x = self.stem(x) if i == 0 else self.reduce[i - 1](x)
            x = after(stage(before(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
            maps.append(x)
        return maps


def init_smt_(module: nn.Module) -> None:
    """Linear weights: truncated normal of std 0.02; convolutions: normal of std sqrt(2 / fan out per group)."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
        elif isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2.0 / fan_out))
        if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None:
            nn.init.zeros_(m.bias)


def divides(owner: str, dim: int, heads: int) -> None:
    """Refuse widths that do not split into heads."""
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"{owner}: dim must be a multiple of heads >= 1, got {dim} and {heads!r}")


def check_map(owner: str, x: Tensor, dim: int) -> None:
    """Refuse what is not (B, H, W, dim)."""
    if x.ndim != 4 or x.shape[-1] != dim:
        raise ValueError(f"{owner}: x must be (B, H, W, {dim}), got {tuple(x.shape)}")


def smt_tiny(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> SMT:
    """SMT-T: 11,506,536 parameters."""
    return SMT(
        num_classes=num_classes, in_channels=in_channels, drop_path=drop_path, features_only=features_only
    )


def smt_small(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.2, features_only: bool = False
) -> SMT:
    """SMT-S as released: 22,550,952 parameters (the paper prints 20.5 M)."""
    return SMT(
        depths=(3, 4, 18, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def smt_base(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.3, features_only: bool = False
) -> SMT:
    """SMT-B: 32,037,352 parameters."""
    return SMT(
        depths=(4, 6, 28, 2),
        mlp_ratios=(8, 6, 4, 2),
        stem_kernel=7,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def smt_large(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.4, features_only: bool = False
) -> SMT:
    """SMT-L: 80,589,544 parameters."""
    return SMT(
        (96, 192, 384, 768),
        (4, 6, 28, 4),
        (8, 6, 4, 2),
        stem_kernel=7,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
