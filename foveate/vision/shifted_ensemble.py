"""Shifted-window learning (DITO): a windowed ViT run on the grid and on the rolled grid, both results averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import DropPath, Mlp, drop_path_rates, init_, interpolate_map
from foveate.vision.windows import Pair, attend, merge, pair, partition


class ShiftedWindowEnsemble(nn.Module):
    """A module on maps, run on the map and on the rolled map; the second result is rolled back, both are averaged.

        f(t) = (g(t) + T^-1 g(T t)) / 2,   T = roll by (-s, +s) along (height, width)

    Both passes have the same weights, in training and inference. Nothing is masked: what the roll brings together
    from opposite borders counts as neighbours. Costs two passes.

    Args:
        module: g, (B, H, W, C) -> (B, H, W, C'); positions added inside it stay in the rolled frame.
        shift: s, or (s_h, s_w), in cells, usually half a window. 0: g alone, one pass.
        mode: "average"; or "random": in train mode one of the two passes, drawn for the whole batch, at half the cost;
            the average in eval mode.
        roll_sign: the directions of the roll, each -1 or 1.

    Source: Detection-Oriented Image-Text Pretraining for Open-Vocabulary Detection (2023), whose released roll has
    opposite signs along the two axes. Differs: "random" is not in the paper.

    >>> f = ShiftedWindowEnsemble(nn.Linear(4, 4), shift=2)  # without windows and positions the passes are equal
    >>> x = torch.randn(1, 8, 8, 4)
    >>> torch.allclose(f(x), f.module(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        module: nn.Module,
        shift: int | Pair = 8,
        *,
        mode: str = "average",
        roll_sign: tuple[int, int] = (-1, 1),
    ) -> None:
        super().__init__()
        if mode not in ("average", "random"):
            raise ValueError(f"ShiftedWindowEnsemble: mode must be 'average' or 'random', got {mode!r}")
        if len(roll_sign) != 2 or any(sign not in (-1, 1) for sign in roll_sign):
            raise ValueError(f"ShiftedWindowEnsemble: roll_sign must be two of -1 and 1, got {roll_sign!r}")
        self.module, self.shift = module, pair("ShiftedWindowEnsemble", "shift", shift, 0)
        self.mode, self.roll_sign = mode, tuple(roll_sign)

    def rolled(self, x: Tensor, shift: Pair) -> Tensor:
        """T^-1 g(T x)."""
        by = [sign * s for sign, s in zip(self.roll_sign, shift, strict=True)]
        return self.module(x.roll(by, (1, 2))).roll([-n for n in by], (1, 2))

    def forward(self, x: Tensor, *, shift: int | Pair | None = None) -> Tensor:
        """f(x) for x (B, H, W, C); shift: instead of the one that the module was made with."""
        if x.ndim != 4:
            raise ValueError(f"ShiftedWindowEnsemble: x must be (B, H, W, C), got {tuple(x.shape)}")
        by = self.shift if shift is None else pair("ShiftedWindowEnsemble", "shift", shift, 0)
        if by == (0, 0):
            return self.module(x)
        if self.mode == "random" and self.training:
            return self.rolled(x, by) if bool(torch.rand(()) < 0.5) else self.module(x)
        return 0.5 * (self.module(x) + self.rolled(x, by))

    def extra_repr(self) -> str:
        return f"shift={self.shift}, mode={self.mode!r}, roll_sign={self.roll_sign}"


class ViTLayer(nn.Module):
    """Pre-norm attention among all tokens and an MLP: (B, n, C) -> (B, n, C). ViT (2020).

    Args:
        dim: C; heads: H, divides it; mlp_ratio: width of the MLP over dim; drop_path: of both branches.

    >>> ViTLayer(16, heads=2)(torch.randn(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"ViTLayer: dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        qkv = (
            self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (3, B, H, n, D)
        out = attend(qkv[0], qkv[1], qkv[2]).transpose(1, 2).flatten(2)  # (B, n, C)
        x = x + self.drop_path(self.proj(out))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Foreign(nn.Module):
    """A layer of a transformers model, called as (B, n, C) -> (B, n, C)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x, None)
        return out[0] if isinstance(out, tuple) else out


class WindowedLayers(nn.Module):
    """Positions, then layers that see one window each, but for a few that see the whole map.

    A layer knows nothing of windows: those of all images are the rows of its batch.

    Args:
        layers: each (B, n, C) -> (B, n, C).
        positions: learned, (1, h, w, C); resized bilinearly to the map.
        windows_per_side: K; windows have H/K x W/K cells.
        global_layers: indices of the layers that see everything.
        norm: on what the first layer gets.

    Shape: (B, H, W, C) -> (B, H, W, C); ValueError unless K divides H and W.

    >>> layers = [ViTLayer(8, 2), ViTLayer(8, 2)]
    >>> g = WindowedLayers(layers, torch.zeros(1, 4, 4, 8), windows_per_side=2, global_layers=[1])
    >>> g(torch.randn(1, 6, 4, 8)).shape
    torch.Size([1, 6, 4, 8])
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        positions: Tensor,
        *,
        windows_per_side: int = 4,
        global_layers: Sequence[int] = (),
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.windows_per_side = pair("WindowedLayers", "windows_per_side", windows_per_side)[0]
        self.global_layers = frozenset(global_layers)
        if not self.global_layers <= set(range(len(self.layers))):
            raise ValueError(
                f"WindowedLayers: global_layers must be indices below {len(self.layers)}, got {tuple(global_layers)}"
            )
        if positions.ndim != 4 or positions.shape[0] != 1:
            raise ValueError(f"WindowedLayers: positions must be (1, h, w, C), got {tuple(positions.shape)}")
        self.positions = nn.Parameter(positions.detach().clone())
        self.norm = norm

    def window(self, grid: Pair) -> Pair:
        """Cells of a window on a map of this size."""
        k = self.windows_per_side
        if grid[0] % k or grid[1] % k:
            raise ValueError(
                f"WindowedLayers: windows_per_side = {k} must divide the map's sides, got {tuple(grid)}"
            )
        return grid[0] // k, grid[1] // k

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1], x.shape[2]
        window = self.window(grid)
        x = x + interpolate_map(self.positions, grid, "bilinear")
        if self.norm is not None:
            x = self.norm(x)
        for i, layer in enumerate(self.layers):
            cut = grid if i in self.global_layers else window
            x = merge(layer(partition(x, cut)), cut, grid)
        return x

    def extra_repr(self) -> str:
        return f"windows_per_side={self.windows_per_side}, global_layers={sorted(self.global_layers)}"


def spaced(depth: int, count: int = 4) -> tuple[int, ...]:
    """Indices of `count` evenly spaced layers, the last one among them.

    >>> spaced(12), spaced(24), spaced(3)
    ((2, 5, 8, 11), (5, 11, 17, 23), (0, 1, 2))
    """
    count = min(count, depth)
    return tuple(sorted({depth * (i + 1) // count - 1 for i in range(count)}))


class WindowedViT(Backbone):
    """A plain ViT for large images, with windows and shifted-window learning: images to one map.

        f(x) = LN((g(t) + T^-1 g(T t)) / 2),   t = patch convolution of x

    Args:
        dim, heads, depth: of the ViT.
        patch: side of the patches.
        grid: (h, w) of the learned positions, resized bilinearly to any other.
        windows_per_side: K; windows have H / (patch K) cells a side.
        global_layers: layers that see everything; None: four, evenly spaced, the last one among them.
        shift: in cells; None: half a window; 0: one pass, without shifted windows.
        mode: of `ShiftedWindowEnsemble`.
        mlp_ratio: width of the MLPs over dim.
        num_classes, in_channels, drop_path, features_only: as of every `Backbone`.

    Shape: (B, in_channels, H, W) -> (B, num_classes), or the map (B, dim, H / patch, W / patch), normed; image sides
    are multiples of patch K, else a ValueError.

    Source: Detection-Oriented Image-Text Pretraining for Open-Vocabulary Detection (2023). Differs: there is no class
    token; the head on pooled cells is ours.

    >>> model = WindowedViT(16, 2, 4, patch=4, grid=(8, 8), windows_per_side=2, num_classes=3)
    >>> model(torch.randn(2, 3, 32, 48)).shape, model.ensemble.module.global_layers == {0, 1, 2, 3}
    (torch.Size([2, 3]), True)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        *,
        patch: int = 16,
        grid: Pair = (14, 14),
        windows_per_side: int = 4,
        global_layers: Sequence[int] | None = None,
        shift: int | Pair | None = None,
        mode: str = "average",
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__(
            channels=(dim,),
            strides=(patch,),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        (rates,) = drop_path_rates(drop_path, (depth,))
        layers = [ViTLayer(dim, heads, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates]
        patches = nn.Conv2d(in_channels, dim, patch, stride=patch)
        positions = nn.init.trunc_normal_(torch.empty(1, *grid, dim), std=0.02, a=-0.04, b=0.04)
        body = WindowedLayers(
            layers,
            positions,
            windows_per_side=windows_per_side,
            global_layers=spaced(depth) if global_layers is None else global_layers,
        )
        self._assemble(patches, body, nn.LayerNorm(dim, eps=1e-6), shift, mode)
        init_(self)

    def _assemble(
        self, patches: nn.Conv2d, body: WindowedLayers, norm: nn.Module, shift: int | Pair | None, mode: str
    ) -> None:
        self.patches = patches
        self.ensemble = ShiftedWindowEnsemble(body, 0 if shift is None else shift, mode=mode)
        self.by_half_window = shift is None
        self.last_norm = norm  # of the map, before it is given out
        self.make_head()

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """[(B, dim, H / patch, W / patch)], normed."""
        self.check(images)
        body: Any = self.ensemble.module
        multiple = self.strides[0] * body.windows_per_side
        if images.shape[2] % multiple or images.shape[3] % multiple:
            raise ValueError(
                f"{type(self).__name__}: image sides must be multiples of {multiple}, got {tuple(images.shape[2:])}"
            )
        x = self.patches(images).permute(0, 2, 3, 1)  # (B, h, w, C)
        window = body.window((x.shape[1], x.shape[2]))
        x = self.ensemble(x, shift=(window[0] // 2, window[1] // 2) if self.by_half_window else None)
        return [self.last_norm(x).permute(0, 3, 1, 2)]


def windowed_vit(
    model: nn.Module,
    *,
    windows_per_side: int = 4,
    global_layers: Sequence[int] | None = None,
    shift: int | Pair | None = None,
    mode: str = "average",
) -> WindowedViT:
    """A transformers ViT or CLIP vision model, made for large images: windows, shifted-window learning, maps.

    The result shares the layers, patches and norms of the model, and has a copy of its positions. The class token is
    left out. It has `features_only`: call it with images to get [(B, C, h, w)], normed.

    Args:
        model: ViTModel, CLIPVisionModel, or a model that holds one as `.vit` or `.vision_model`.
        windows_per_side, global_layers, shift, mode: as of `WindowedViT`.

    Errors: TypeError for a model without the parts of either.

    Source: Detection-Oriented Image-Text Pretraining for Open-Vocabulary Detection (2023).
    """
    core: Any = model
    for name in ("vit", "vision_model"):
        core = getattr(core, name, core)
    embeddings: Any = getattr(core, "embeddings", None)
    if hasattr(embeddings, "patch_embeddings") and hasattr(core, "layernorm"):  # ViT
        patches, norm, first = embeddings.patch_embeddings.projection, core.layernorm, None
        table, layers = embeddings.position_embeddings, core.layers
        table = table[0]
    elif hasattr(embeddings, "patch_embedding") and hasattr(core, "post_layernorm"):  # CLIP
        patches, norm, first = embeddings.patch_embedding, core.post_layernorm, core.pre_layrnorm
        table, layers = embeddings.position_embedding.weight, core.encoder.layers
    else:
        raise TypeError(f"windowed_vit: model must be a ViT or CLIP vision model, got {type(model).__name__}")
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side != table.shape[0] - 1:
        raise ValueError(
            f"windowed_vit: positions must be a class token's and a square's, got {table.shape[0]}"
        )
    made = WindowedViT.__new__(WindowedViT)
    Backbone.__init__(
        made,
        channels=(patches.out_channels,),
        strides=(patches.stride[0],),
        in_channels=patches.in_channels,
        features_only=True,
    )
    foreign = [_Foreign(layer) for layer in layers]
    body = WindowedLayers(
        foreign,
        table[1:].detach().unflatten(0, (side, side))[None],
        windows_per_side=windows_per_side,
        global_layers=spaced(len(foreign)) if global_layers is None else global_layers,
        norm=first,
    )
    made._assemble(patches, body, norm, shift, mode)
    return made.train(model.training)


def window_bias(features: Tensor, window: int | Pair) -> float:
    """Share of the features' variance that the place inside the window explains, 0 on average where it says nothing.

        1 - (SS_within / (N - P)) / (SS_total / (N - 1))

    SS: sums over all channels of squared deviations from the mean of all N cells, and of those with equal
    (y mod wh, x mod ww), P of them. Corrected for chance, so it may be slightly negative.

    Args:
        features: (B, H, W, C).
        window: (wh, ww) or one int; divides H and W.

    >>> y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    >>> window_bias((y % 4 + x % 4).float()[None, :, :, None], 4)
    1.0
    """
    wh, ww = pair("window_bias", "window", window)
    cells = partition(features.double(), (wh, ww))  # (G, P, C)
    n, p = cells.shape[0] * cells.shape[1], cells.shape[1]
    if n <= p or p < 2:
        raise ValueError(f"window_bias: features must hold several windows of {wh} x {ww} cells, at least 2 each, got "
                         f"{tuple(features.shape)}")  # fmt: skip
    within = (cells - cells.mean(0)).square().sum()
    total = (cells - cells.mean((0, 1))).square().sum()
    return float(1 - (within / (n - p)) / (total / (n - 1)).clamp_min(torch.finfo(torch.float64).tiny))


def roll_similarity(model: Callable[[Tensor], Tensor], x: Tensor, shift: int | Pair) -> float:
    """Mean cosine, cell by cell, of f(x) and f(roll(x)) rolled back: 1 for a module that commutes with the roll.

    Args:
        model: f, (B, H, W, C) -> (B, H, W, C'); x: (B, H, W, C); shift: cells along the two axes.

    >>> roll_similarity(nn.Identity(), torch.randn(1, 4, 4, 8), 1) > 0.999
    True
    """
    by = pair("roll_similarity", "shift", shift, 0)
    with torch.no_grad():
        moved = model(x.roll(by, (1, 2))).roll((-by[0], -by[1]), (1, 2))
        return float(F.cosine_similarity(model(x), moved, dim=-1).mean())
