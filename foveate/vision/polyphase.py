"""Polyphase anchoring: the grid starts where the content is strongest, so cutting it commutes with circular shifts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import ConvPositionEncoding, DropPath, Mlp, drop_path_rates
from foveate.vision.windows import WindowAttention, attend, pair


class _Roll(torch.autograd.Function):
    """Every image rolled by its own (-a, -b); the gradient is rolled back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor) -> Tensor:
        ctx.save_for_backward(by)
        b, h, w, _ = x.shape
        rows = (torch.arange(h, device=x.device) + by[:, :1]) % h  # (B, H)
        columns = (torch.arange(w, device=x.device) + by[:, 1:]) % w  # (B, W)
        return x[torch.arange(b, device=x.device)[:, None, None], rows[:, :, None], columns[:, None]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (by,) = ctx.saved_tensors
        rolled: Any = _Roll.apply(grads[0], -by)
        return rolled, None


def polyphase_anchor(x: Tensor, stride: int | tuple[int, int], *, return_index: bool = False) -> Any:
    """Roll every image so that its strongest polyphase component starts at the origin.

        (a*, b*) = argmax_{0 <= a, b < s} sum over c, i, j of X[a + s i, b + s j, c]^2     (the first on ties)
        out[y, x] = X[(y + a*) mod H, (x + b*) mod W]

    For every circular shift T there is a shift T' by multiples of s with Anchor(T X) = T' Anchor(X), so what cuts the
    map into s x s cells afterwards (patches, windows, strided convolutions) gives the same cells in another order. Two
    components of equal norm break this, as does a blank image. The choice has no gradient, the values have.

    Args:
        x: (B, H, W, C). Sums of squares are taken in float32 within a cell, or in x's dtype if that is wider, and in
            float64 over the map.
        stride: s, or (s_h, s_w); divides H and W.
        return_index: also return (a*, b*) as int64 (B, 2).

    Errors: ValueError where the stride does not divide the map.

    Source: Reviving Shift Equivariance in Vision Transformers (2023). Differs: a gather instead of a sampled grid, so
    that values are exact in any dtype; maps need not be square.

    >>> x = torch.zeros(1, 4, 6, 1)
    >>> x[0, 1, 4] = 1.0
    >>> out, at = polyphase_anchor(x, 2, return_index=True)
    >>> at.tolist(), out.nonzero()[0].tolist()
    ([[1, 0]], [0, 0, 4, 0])
    """
    sh, sw = pair("polyphase_anchor", "stride", stride)
    if x.ndim != 4 or x.shape[1] % sh or x.shape[2] % sw or 0 in x.shape:
        raise ValueError(
            f"polyphase_anchor: x must be (B, H, W, C) with H a multiple of {sh} and W of {sw}, got {tuple(x.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    energy = x.detach().to(wide).square().sum(-1).double()  # (B, H, W)
    energy = energy.unflatten(2, (-1, sw)).unflatten(1, (-1, sh)).sum((1, 3))  # (B, s_h, s_w)
    best = energy.flatten(1).argmax(1)  # (B,)
    by = torch.stack([best // sw, best % sw], 1)  # (B, 2)
    out: Any = _Roll.apply(x, by)
    return (out, by) if return_index else out


class Anchored(nn.Module):
    """A module behind polyphase anchoring: module(Anchor(x)). The result is not rolled back.

    What adds the input again (a residual block) belongs inside, so that both see the same frame.

    Args:
        module: takes the anchored map.
        stride: side of the cells that the module cuts (patch, window or subsampling ratio), or two.
        channels_first: maps are (B, C, H, W), as convolutions take them, instead of (B, H, W, C).

    >>> embed = Anchored(nn.Conv2d(3, 8, 4, stride=4), 4, channels_first=True)
    >>> image = torch.randn(1, 3, 12, 16)
    >>> a, b = embed(image), embed(image.roll((5, 2), (2, 3)))
    >>> torch.allclose(a.flatten().sort()[0], b.flatten().sort()[0])
    True
    """

    def __init__(
        self, module: nn.Module, stride: int | tuple[int, int], *, channels_first: bool = False
    ) -> None:
        super().__init__()
        self.module, self.stride = module, pair("Anchored", "stride", stride)
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        if not self.channels_first:
            return self.module(polyphase_anchor(x, self.stride))
        return self.module(polyphase_anchor(x.permute(0, 2, 3, 1), self.stride).permute(0, 3, 1, 2))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, channels_first={self.channels_first}"


class SubsampledAttention(nn.Module):
    """Every token attends to keys and values of a map that a strided convolution made smaller (Twins, PVT).

        Y = LN(conv_{r x r, stride r}(X)),   out = softmax(Q(X) K(Y)^T / sqrt(D)) V(Y) W_O

    Args:
        dim: C; heads: H, divides it.
        reduction: r, divides the sides of the map; 1: no convolution, full attention.
        bias: of the query, key and value maps.

    Shape: (B, H, W, C) -> (B, H, W, C). ValueError where the reduction does not divide the map.

    >>> SubsampledAttention(16, heads=2, reduction=2)(torch.randn(1, 6, 4, 16)).shape
    torch.Size([1, 6, 4, 16])
    """

    def __init__(self, dim: int, heads: int, reduction: int = 1, *, bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"SubsampledAttention: dim must be a multiple of heads, got {dim} and {heads}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.reduction = pair("SubsampledAttention", "reduction", reduction)[0]
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.smaller = nn.Conv2d(dim, dim, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        r = self.reduction
        if x.ndim != 4 or x.shape[1] % r or x.shape[2] % r or x.shape[3] != self.dim:
            raise ValueError(
                f"SubsampledAttention: x must be (B, H, W, {self.dim}) with H and W multiples of {r}, "
                f"got {tuple(x.shape)}"
            )
        split = lambda t: t.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B, H, N, D)
        read = x
        if self.smaller is not None and self.norm is not None:
            read = self.norm(self.smaller(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, H/r, W/r, C)
        k, v = self.kv(read).chunk(2, -1)
        out = attend(split(self.q(x)), split(k), split(v))  # (B, H, N, D)
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))


class PolyTwinsBlock(nn.Module):
    """A pre-norm block of Twins behind polyphase anchoring: attention in windows, or to subsampled keys, then an MLP.

    The map is anchored before the block, so the shortcut and the attention see the same frame; it stays in that frame.

    Args:
        dim: C; heads: H, divides it.
        window: side of the windows; None: global attention to subsampled keys.
        reduction: of the keys where window is None.
        mlp_ratio: width of the MLP over dim; drop_path: share of dropped branches in training.
        anchor: False: the block of Twins.

    Shape: (B, H, W, C) -> (B, H, W, C), sides multiples of the window or the reduction.

    >>> block = PolyTwinsBlock(16, heads=2, window=3).eval()
    >>> x = torch.randn(1, 6, 6, 16)
    >>> a, b = block(x), block(x.roll((2, 4), (1, 2)))
    >>> any(torch.allclose(a.roll((i, j), (1, 2)), b, atol=1e-5) for i in (0, 3) for j in (0, 3))
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int | None = 7,
        reduction: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        anchor: bool = True,
    ) -> None:
        super().__init__()
        self.stride = reduction if window is None else window
        pair("PolyTwinsBlock", "reduction" if window is None else "window", self.stride)
        self.anchor = anchor
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attention = (
            SubsampledAttention(dim, heads, reduction)
            if window is None
            else WindowAttention(dim, heads, window, relative_bias=False)
        )
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.anchor and self.stride > 1:
            x = polyphase_anchor(x, self.stride)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, anchor={self.anchor}"


class PolyTwins(Backbone):
    """Twins-SVT with polyphase anchoring and circular padding: logits do not change under any circular shift.

    A stage: patches (patch x patch in the first, 2 x 2 later) and a LayerNorm; blocks that alternate between windows
    and keys subsampled by the stage's reduction; after the first block x + depthwise 3 x 3 convolution (positions).
    The image is anchored before the first patches, each map before every block; before later patches only where the
    last block's reduction is odd, for otherwise the map is already settled to a multiple of two. The head reads the
    mean of the normed tokens. Maps are in the frame of the last anchor: equivariant up to a roll.

    Args:
        dims, heads, depths, reductions: per stage.
        window: side of the windows of all stages; patch: side of the first patches.
        mlp_ratio: width of the MLPs over dim.
        anchor: False: nothing is anchored; padding: of the convolutions for positions, "circular" or "zeros". Both
            changed give Twins-SVT.
        num_classes, in_channels, drop_path, features_only: as of every `Backbone`.

    Shape: (B, in_channels, H, W) -> (B, num_classes). Image sides must be multiples of `multiple` (224 for
    `polytwins_base`), else a ValueError: padding would not commute with shifts.

    Source: Reviving Shift Equivariance in Vision Transformers (2023); layout: Twins: Revisiting the Design of Spatial
    Attention in Vision Transformers (2021).

    >>> model = PolyTwins((16, 32), (1, 2), (2, 2), reductions=(2, 1), window=2, patch=2, num_classes=3).eval()
    >>> image = torch.randn(1, 3, 16, 24)
    >>> torch.allclose(model(image), model(image.roll((3, 5), (2, 3))), atol=1e-5)
    True
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        heads: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        reductions: tuple[int, ...],
        window: int = 7,
        patch: int = 4,
        mlp_ratio: float = 4.0,
        anchor: bool = True,
        padding: str = "circular",
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.0,
        features_only: bool = False,
    ) -> None:
        if not dims or not len(dims) == len(heads) == len(depths) == len(reductions):
            raise ValueError(
                "PolyTwins: dims, heads, depths and reductions must have one entry per stage, got "
                f"{len(dims)}, {len(heads)}, {len(depths)} and {len(reductions)}"
            )
        if padding not in ("circular", "zeros"):
            raise ValueError(f"PolyTwins: padding must be 'circular' or 'zeros', got {padding!r}")
        strides = tuple(patch * 2**i for i in range(len(dims)))
        super().__init__(
            channels=tuple(dims),
            strides=strides,
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        self.anchor, self.patch = anchor, patch
        # every stage cuts its map into windows and, from the second block on, into cells of its reduction
        self.multiple = math.lcm(
            *(
                s * math.lcm(window, r if n > 1 else 1)
                for s, r, n in zip(strides, reductions, depths, strict=True)
            )
        )
        rates = drop_path_rates(drop_path, depths)
        self.embeds, self.norms, self.stages, self.positions = (nn.ModuleList() for _ in range(4))
        self.settled = []  # whether a stage's patches fall on cells that an anchor before has settled
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            side = patch if i == 0 else 2
            self.embeds.append(nn.Conv2d(in_channels if i == 0 else dims[i - 1], dim, side, stride=side))
            self.norms.append(nn.LayerNorm(dim))
            self.positions.append(ConvPositionEncoding(dim, padding_mode=padding))
            self.stages.append(
                nn.ModuleList(
                    PolyTwinsBlock(
                        dim,
                        heads[i],
                        window=None if j % 2 else window,
                        reduction=reductions[i],
                        mlp_ratio=mlp_ratio,
                        drop_path=rates[i][j],
                        anchor=anchor,
                    )
                    for j in range(depth)
                )
            )
            last = 1 if i == 0 else (window if depths[i - 1] % 2 else reductions[i - 1])
            self.settled.append(last % side == 0)
        self.make_head(nn.LayerNorm(dims[-1], eps=1e-6))
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def load_timm(self, state: Mapping[str, Tensor]) -> PolyTwins:
        """Take the weights of timm's `Twins` in the same layout (and of the authors' PolyTwins); returns self."""
        self.load_state_dict({_from_timm(name): value for name, value in state.items()})
        return self

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """One (B, C_i, H / stride_i, W / stride_i) per stage, each in the frame of its last anchor."""
        self.check(images)
        if images.shape[2] % self.multiple or images.shape[3] % self.multiple:
            raise ValueError(
                f"PolyTwins: image sides must be multiples of {self.multiple}, got {tuple(images.shape[2:])}"
            )
        maps, x = [], images.permute(0, 2, 3, 1)  # (B, H, W, C)
        for i, blocks in enumerate(self.stages):
            if self.anchor and not self.settled[i]:
                x = polyphase_anchor(x, self.patch if i == 0 else 2)
            x = self.norms[i](self.embeds[i](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            for j, block in enumerate(blocks):  # type: ignore[arg-type]
                x = block(x)
                if j == 0:
                    x = self.positions[i](x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


def _from_timm(name: str) -> str:
    """blocks.0.1.attn.sr.weight -> stages.0.1.attention.smaller.weight

    >>> _from_timm("patch_embeds.2.norm.bias"), _from_timm("pos_block.0.proj.0.weight")
    ('norms.2.bias', 'positions.0.conv.weight')
    """
    for pattern, new in (
        (r"^patch_embeds\.(\d+)\.proj\.", r"embeds.\1."),
        (r"^patch_embeds\.(\d+)\.norm\.", r"norms.\1."),
        (r"^pos_block\.(\d+)\.proj\.0\.", r"positions.\1.conv."),
        (r"^blocks\.", "stages."),
        (r"\.attn\.sr\.", ".attention.smaller."),
        (r"\.attn\.", ".attention."),
    ):
        name = re.sub(pattern, new, name)
    return name


def polytwins_base(
    *,
    anchor: bool = True,
    padding: str = "circular",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.3,
    features_only: bool = False,
) -> PolyTwins:
    """PolyTwins in the layout of Twins-SVT-B: 56,070,952 parameters, image sides multiples of 224."""
    return PolyTwins(
        (96, 192, 384, 768),
        (3, 6, 12, 24),
        (2, 2, 18, 2),
        reductions=(8, 4, 2, 1),
        anchor=anchor,
        padding=padding,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


@torch.no_grad()
def shifted_predictions(
    model: nn.Module, images: Tensor, shifts: str | int = "all", mode: str = "circular"
) -> tuple[Tensor, Tensor]:
    """What a classifier says of shifted images.

    Args:
        model: (B, C, H, W) -> (B, classes); it is left in the mode it is in.
        images: (B, C, H, W).
        shifts: n: all (dy, dx) with |dy|, |dx| <= n; "all": all H W circular shifts.
        mode: "circular": images are rolled; "crop": the model sees (H - 2 n, W - 2 n) pixels from row n + dy and column
            n + dx on, so new content enters.

    Returns: (shifts int64 (S, 2), labels int64 (S, B)).

    >>> shifts, labels = shifted_predictions(nn.Flatten(), torch.eye(3).view(1, 1, 3, 3), 1)
    >>> shifts.shape, labels[4]
    (torch.Size([9, 2]), tensor([0]))
    """
    if mode not in ("circular", "crop"):
        raise ValueError(f"shifted_predictions: mode must be 'circular' or 'crop', got {mode!r}")
    if images.ndim != 4:
        raise ValueError(f"shifted_predictions: images must be (B, C, H, W), got {tuple(images.shape)}")
    h, w = images.shape[2:]
    if shifts == "all" and mode == "circular":
        offsets = [(dy, dx) for dy in range(h) for dx in range(w)]
    elif isinstance(shifts, int) and not isinstance(shifts, bool) and 1 <= shifts < (min(h, w) + 1) // 2:
        offsets = [(dy, dx) for dy in range(-shifts, shifts + 1) for dx in range(-shifts, shifts + 1)]
    else:
        raise ValueError(
            "shifted_predictions: shifts must be an int >= 1 and less than half the image, or 'all' where mode is "
            f"'circular', got {shifts!r}"
        )
    labels = []
    for dy, dx in offsets:
        if mode == "circular":
            moved = images.roll((dy, dx), (2, 3))
        else:
            n = int(shifts)
            moved = images[:, :, n + dy : h - n + dy, n + dx : w - n + dx]
        labels.append(model(moved).argmax(-1))
    return torch.tensor(offsets), torch.stack(labels)


def shift_consistency(
    model: nn.Module, images: Tensor, shifts: str | int = "all", mode: str = "circular"
) -> float:
    """Share of (image, shift) pairs, the zero shift apart, with the label that the unshifted image has.

    Arguments as of `shifted_predictions`.

    >>> shift_consistency(nn.Flatten(), torch.eye(3)[None, None])
    0.25
    """
    offsets, labels = shifted_predictions(model, images, shifts, mode)
    moved = (offsets != 0).any(1)
    return float((labels[moved.to(labels.device)] == labels[~moved.to(labels.device)]).double().mean())
