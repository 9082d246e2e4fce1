"""Swin: attention inside windows, whose grid moves by half a window in every second block of a pyramid."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import DropPath, Mlp, drop_path_rates, init_
from foveate.vision.windows import Pair, RelativePositionBias2d, attend, merge, pad_to, pair, partition

Window = int | tuple[int, int]
MakeBlock = Callable[[int, int, int, float], nn.Module]  # dim, heads, place in the stage, drop path


@lru_cache(maxsize=64)
def _mask(grid: Pair, window: Pair, shift: Pair, inside: bool, device: torch.device) -> Tensor:
    """Pairs of the same region in each window, bool (windows, n, n); inside: no key outside the map."""
    axes = []
    with torch.inference_mode(False), torch.device("cpu"):  # kept for others, whoever asks first
        for n, w, s in zip(grid, window, shift, strict=True):
            padded = -(-n // w) * w
            at = (torch.arange(padded) + s) % padded  # the cell that the roll brought here
            label = torch.div(at - s, w, rounding_mode="floor").view(-1, w)
            same = label[:, :, None] == label[:, None, :]  # (windows of the axis, w, w)
            axes.append(same & (at < n).view(-1, 1, w) if inside else same)
        rows, columns = axes
        both = (
            rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
        )  # (nH, nW, wh, ww, wh, ww)
        return both.flatten(4).flatten(2, 3).flatten(0, 1).to(device)


class ShiftedWindowAttention(nn.Module):
    """Attention inside the windows of a partition that is moved by `shift` cells down and right.

        y sees y'  <=>  floor((y - s) / w) = floor((y' - s) / w),  columns alike
        out = softmax(q k^T / sqrt(d) + T[y - y' + w - 1, x - x' + w - 1]) v W

    Where the shifted grid ends, windows are smaller; nothing wraps around. Computed on whole windows: the map is
    padded at its right and bottom, rolled by -s, cut, and rolled back; pairs that the roll brought together are masked.
    Costs w^2 pairs per query and head.

    Args:
        dim: C, a multiple of heads.
        heads: H.
        window: w, cells of a window, one int or (rows, columns).
        shift: s, 0 <= s < w, alike.
        edge: what cells outside the map are to those inside. "mask": nothing; "zero": keys whose input is zero, so that
            they have the biases of keys and values, as in the released code.
        bias: of the query, key and value maps; the output map always has one.
        relative_bias: with T.
        always_partition: whole windows and the shift also on an axis of at most w cells; otherwise such an axis is one
            window, without shift.

    Shape: (B, h, w, C) -> the same, any h and w.

    Source: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (2021). Differs: the released code
    adds -100 where this masks, has edge="zero", and leaves out the shift of both axes where one has at most w cells.

    >>> layer = ShiftedWindowAttention(32, heads=2, window=4, shift=2)
    >>> layer(torch.randn(2, 13, 11, 32)).shape
    torch.Size([2, 13, 11, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Window = 7,
        *,
        shift: Window = 0,
        edge: str = "mask",
        bias: bool = True,
        relative_bias: bool = True,
        always_partition: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if heads < 1 or dim % heads:
            raise ValueError(f"{name}: dim must be a multiple of heads, got {dim} and {heads}")
        if edge not in ("mask", "zero"):
            raise ValueError(f'{name}: edge must be "mask" or "zero", got {edge!r}')
        self.dim, self.heads, self.head_dim, self.edge = dim, heads, dim // heads, edge
        self.window, self.shift = pair(name, "window", window, 1), pair(name, "shift", shift, 0)
        if any(s >= w for s, w in zip(self.shift, self.window, strict=True)):
            raise ValueError(f"{name}: shift must be less than window, got {self.shift} for {self.window}")
        self.always_partition = always_partition
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.position = RelativePositionBias2d(self.window, heads) if relative_bias else None
        self.proj = nn.Linear(dim, dim)
        init_(self)

    def partition_of(self, grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(window, shift) on a map of this size."""
        if self.always_partition:
            return self.window, self.shift
        window = tuple(min(n, w) for n, w in zip(grid, self.window, strict=True))
        shift = tuple(s if n > w else 0 for n, w, s in zip(grid, self.window, self.shift, strict=True))
        return (window[0], window[1]), (shift[0], shift[1])

    def mask(self, grid: tuple[int, int], *, device: torch.device | str | None = None) -> Tensor | None:
        """Which keys of its window a query sees, bool (windows, n, n); None: all of them."""
        window, shift = self.partition_of(grid)
        ragged = self.edge == "mask" and any(n % w for n, w in zip(grid, window, strict=True))
        if not ragged and not any(shift):
            return None
        return _mask(grid, window, shift, self.edge == "mask", torch.device(device or "cpu"))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"{type(self).__name__}: x must be (B, h, w, {self.dim}), got {tuple(x.shape)}")
        h, w = x.shape[1:3]
        window, shift = self.partition_of((h, w))
        x = pad_to(x, window)
        padded = (x.shape[1], x.shape[2])
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        qkv = self.qkv(partition(x, window))  # (B windows, n, 3 C)
        q, k, v = qkv.unflatten(2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        bias = None if self.position is None else self.position.score(window)
        out = attend(q, k, v, bias=bias, mask=self.mask((h, w), device=x.device))
        out = merge(out.transpose(1, 2).flatten(2), window, padded)  # (B, h', w', C)
        if any(shift):
            out = out.roll(shift, (1, 2))
        return self.proj(out[:, :h, :w])

    @torch.no_grad()
    def resize_window_(self, window: Window) -> ShiftedWindowAttention:
        """Change the window in place: T is resized bicubically, a shift becomes half the new window."""
        new = pair(type(self).__name__, "window", window, 1)
        if self.position is not None:
            self.position.resize_(new)
        self.shift = (new[0] // 2 if self.shift[0] else 0, new[1] // 2 if self.shift[1] else 0)
        self.window = new
        return self

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, shift={self.shift}, edge={self.edge!r}"


class SwinBlock(nn.Module):
    """x + Attention(LN x), then x + MLP(LN x), each branch under drop path.

    Args:
        dim, heads, window, shift, edge, bias, always_partition: of `ShiftedWindowAttention`.
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: rate of both branches.
        attention: another module on (B, h, w, C) in its place.

    Shape: (B, h, w, C) -> the same.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Window = 7,
        *,
        shift: Window = 0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        edge: str = "mask",
        bias: bool = True,
        always_partition: bool = False,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = (
            ShiftedWindowAttention(
                dim, heads, window, shift=shift, edge=edge, bias=bias, always_partition=always_partition
            )
            if attention is None
            else attention
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        init_(self.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Every 2 x 2 cells into one: their channels side by side, LayerNorm, a linear map to `out`.

    The order is (0, 0), (1, 0), (0, 1), (1, 1), rows first. Odd sides get a row or column of zeros.

    Args:
        dim: C; out: 2 C by default.

    Shape: (B, h, w, C) -> (B, ceil(h / 2), ceil(w / 2), out).

    >>> PatchMerging(8)(torch.randn(1, 7, 4, 8)).shape
    torch.Size([1, 4, 2, 16])
    """

    def __init__(self, dim: int, out: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim if out is None else out, bias=False)
        init_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(x, 2)
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], 3)
        return self.reduction(self.norm(x))


class Swin(Backbone):
    """Swin Transformer: patches, and stages of blocks with and without shift in turn, with patch merging between them.

    Args:
        dim: C of the first stage; each further stage has twice as many.
        depths, heads: blocks and heads per stage.
        window: of all stages, one int or (rows, columns); odd blocks are shifted by half of it.
        patch: side of a patch; images are padded to its multiples with zeros.
        mlp_ratio, edge, bias, always_partition: of the blocks.
        drop_path: rate of the last block, growing linearly from 0.
        num_classes, in_channels, features_only: see `Backbone`.
        map_norms: with features_only, a LayerNorm over the channels of each map, as detectors use.
        block: makes other blocks: block(dim, heads, index in the stage, drop path rate) -> module on (B, h, w, C).

    Shape: images (B, in_channels, H, W) of any size -> (B, num_classes), or maps of strides 4, 8, 16, 32.

    Source: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (2021). Differs: see
    `ShiftedWindowAttention`; no absolute position embedding; no dropout but drop path.

    >>> model = Swin(dim=16, depths=(2, 2), heads=(1, 2), window=4, num_classes=10)
    >>> model(torch.randn(2, 3, 61, 47)).shape
    torch.Size([2, 10])

    With `features_only` it gives one map per stage, for a neck of a detector:

    >>> body = Swin(dim=16, depths=(2, 2), heads=(1, 2), window=4, features_only=True)
    >>> [tuple(x.shape) for x in body(torch.randn(2, 3, 61, 47))], body.channels, body.strides
    ([(2, 16, 16, 12), (2, 32, 8, 6)], (16, 32), (4, 8))
    """

    def __init__(
        self,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: Window = 7,
        patch: int = 4,
        mlp_ratio: float = 4.0,
        edge: str = "mask",
        bias: bool = True,
        always_partition: bool = False,
        drop_path: float = 0.2,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
        map_norms: bool = False,
        block: MakeBlock | None = None,
    ) -> None:
        if len(depths) != len(heads) or not depths:
            raise ValueError(f"Swin: one number of heads per stage, got {tuple(heads)} for {tuple(depths)}")
        if map_norms and not features_only:
            raise ValueError("Swin: map_norms needs features_only=True")
        widths = [dim * 2**i for i in range(len(depths))]
        super().__init__(
            channels=widths,
            strides=[patch * 2**i for i in range(len(depths))],
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        half = tuple(n // 2 for n in pair("Swin", "window", window, 1))

        def shifted(width: int, h: int, index: int, rate: float) -> nn.Module:
            return SwinBlock(
                width,
                h,
                window,
                shift=(half[0], half[1]) if index % 2 else 0,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                edge=edge,
                bias=bias,
                always_partition=always_partition,
            )

        made = shifted if block is None else block
        self.patch = patch
        self.embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.embed_norm = nn.LayerNorm(dim)
        self.stages = nn.ModuleList(
            nn.Sequential(*(made(width, h, i, rate) for i, rate in enumerate(rates)))
            for width, h, rates in zip(widths, heads, drop_path_rates(drop_path, depths), strict=True)
        )
        self.merges = nn.ModuleList(PatchMerging(width) for width in widths[:-1])
        self.map_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths) if map_norms else None
        self.make_head(nn.LayerNorm(widths[-1]))
        init_(self.embed)
        if self.head is not None:
            init_(self.head)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        h, w = images.shape[2:]
        images = F.pad(images, (0, -w % self.patch, 0, -h % self.patch))
        x = self.embed_norm(self.embed(images).permute(0, 2, 3, 1))  # (B, h, w, C)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.merges[i - 1](x))
            y = x if self.map_norms is None else self.map_norms[i](x)
            maps.append(y.permute(0, 3, 1, 2))
        return maps

    def resize_window_(self, window: Window) -> Swin:
        """Change the window of all blocks in place, resizing their tables bicubically, as for larger images."""
        for part in self.modules():
            if isinstance(part, ShiftedWindowAttention):
                part.resize_window_(window)
        return self


def swin_tiny(
    *,
    window: Window = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
    map_norms: bool = False,
    edge: str = "mask",
    always_partition: bool = False,
) -> Swin:
    """Swin-T: 96 channels, 2-2-6-2 blocks; 28,288,354 parameters."""
    return Swin(
        dim=96,
        depths=(2, 2, 6, 2),
        heads=(3, 6, 12, 24),
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
        map_norms=map_norms,
        edge=edge,
        always_partition=always_partition,
    )


def swin_small(
    *,
    window: Window = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.3,
    features_only: bool = False,
    map_norms: bool = False,
    edge: str = "mask",
    always_partition: bool = False,
) -> Swin:
    """Swin-S: 96 channels, 2-2-18-2 blocks; 49,606,258 parameters."""
    return Swin(
        dim=96,
        depths=(2, 2, 18, 2),
        heads=(3, 6, 12, 24),
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
        map_norms=map_norms,
        edge=edge,
        always_partition=always_partition,
    )


def swin_base(
    *,
    window: Window = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.5,
    features_only: bool = False,
    map_norms: bool = False,
    edge: str = "mask",
    always_partition: bool = False,
) -> Swin:
    """Swin-B: 128 channels, 2-2-18-2 blocks; 87,768,224 parameters, 87,903,584 with a window of 12."""
    return Swin(
        dim=128,
        depths=(2, 2, 18, 2),
        heads=(4, 8, 16, 32),
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
        map_norms=map_norms,
        edge=edge,
        always_partition=always_partition,
    )


def swin_large(
    *,
    window: Window = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
    map_norms: bool = False,
    edge: str = "mask",
    always_partition: bool = False,
) -> Swin:
    """Swin-L: 192 channels, 2-2-18-2 blocks; 196,532,476 parameters, 196,735,516 with a window of 12."""
    return Swin(
        dim=192,
        depths=(2, 2, 18, 2),
        heads=(6, 12, 24, 48),
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
        map_norms=map_norms,
        edge=edge,
        always_partition=always_partition,
    )


_TIMM = (
    (r"^patch_embed\.proj\.", "embed."),
    (r"^patch_embed\.norm\.", "embed_norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.attn\.relative_position_bias_table$", ".attention.position.table"),
    (r"\.attn\.", ".attention."),
    (r"^head\.fc\.", "head."),
)
_TRANSFORMERS = (
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "embed."),
    (r"^embeddings\.norm\.", "embed_norm."),
    (r"^encoder\.layers\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^encoder\.layers\.(\d+)\.downsample\.", r"merges.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (
        r"\.attention\.(self|relative_position_bias)\.relative_position_bias_table$",
        ".attention.position.table",
    ),
    (r"\.attention\.self\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attention.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attention.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(stages\.\d+\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^hidden_states_norms\.stage(\d+)\.", lambda m: f"map_norms.{int(m[1]) - 1}."),
)
_BUFFERS = re.compile(r"(relative_position_index|attn_mask)$")


def _renamed(state: Mapping[str, Tensor], rules: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
    """The parameters under this library's names."""
    found = {}
    for name, value in state.items():
        if _BUFFERS.search(name):
            continue
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


def _build(owner: str, state: dict[str, Tensor], edge: str, always_partition: bool, drop_path: float) -> Swin:
    """A Swin with these weights; its configuration follows from their shapes."""
    if not {"embed.weight", "stages.0.0.attention.position.table"} <= set(state):
        raise ValueError(f"{owner}: no weights of a Swin, got {sorted(state)[:4]}")
    depths = [
        1 + max(int(name.split(".")[2]) for name in state if name.startswith(f"stages.{i}."))
        for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("stages.")))
    ]
    tables = [state[f"stages.{i}.0.attention.position.table"] for i in range(len(depths))]
    side = math.isqrt(tables[0].shape[0])
    if any(table.shape[0] != side**2 for table in tables):
        rows = [table.shape[0] for table in tables]
        raise ValueError(
            f"{owner}: windows must be square and equal in all stages, got tables of {rows} rows"
        )
    dim, in_channels, patch = (state["embed.weight"].shape[n] for n in (0, 1, 2))
    maps = any(name.startswith("map_norms.") for name in state)
    if maps:
        state = {name: value for name, value in state.items() if not name.startswith(("norm.", "head."))}
    model = Swin(
        dim=dim,
        depths=depths,
        heads=[table.shape[1] for table in tables],
        window=(side + 1) // 2,
        patch=patch,
        mlp_ratio=state["stages.0.0.mlp.fc1.weight"].shape[0] / dim,
        edge=edge,
        bias="stages.0.0.attention.qkv.bias" in state,
        always_partition=always_partition,
        drop_path=drop_path,
        num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
        in_channels=in_channels,
        features_only=maps,
        map_norms=maps,
    )
    model.to(state["embed.weight"]).load_state_dict(state)
    return model.eval()


def swin_from_transformers(
    source: nn.Module | Mapping[str, Tensor], *, edge: str = "zero", drop_path: float = 0.0
) -> Swin:
    """A `Swin`, in eval mode, with the weights of transformers' SwinModel, SwinForImageClassification or SwinBackbone.

    A SwinModel gives num_classes=0, a SwinBackbone with all stages the maps with `map_norms` and always_partition. Its
    padding comes before its roll and is not masked: edge="zero".

    Args:
        source: the model or its state_dict, under the names of any version.

    Errors: ValueError where it is no Swin; RuntimeError of load_state_dict where something has no place here, such
    as absolute position embeddings.
    """
    state = _renamed(source.state_dict() if isinstance(source, nn.Module) else source, _TRANSFORMERS)
    for name in [name for name in state if re.search(r"\.attention\.(q|query)\.", name)]:
        long = ".query." in name
        parts = ("query", "key", "value") if long else ("q", "k", "v")
        own = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        joined = torch.cat([state.pop(part) for part in own])
        state[name.replace(f".{parts[0]}.", ".qkv.")] = joined
    maps = any(name.startswith("map_norms.") for name in state)
    return _build("swin_from_transformers", state, edge, maps, drop_path)


def swin_from_timm(
    state_dict: Mapping[str, Tensor],
    *,
    edge: str = "zero",
    always_partition: bool = False,
    drop_path: float = 0.0,
) -> Swin:
    """A `Swin`, in eval mode, with weights under timm's names, which are also those of the authors.

    In timm's newer files a stage begins with its merging and the head is `head.fc`; in older ones and the authors' a
    stage ends with it. timm rolls before it pads, so results are the same where windows divide the maps.

    Args:
        state_dict: parameters, or the authors' file with a "model" in it.

    Errors: as of `swin_from_transformers`.
    """
    inner: Any = state_dict.get("model", state_dict)
    new = any(name.startswith("head.fc.") for name in inner) or not any(
        name.startswith("layers.0.downsample.") for name in inner
    )
    merges = (r"^layers\.(\d+)\.downsample\.", lambda m: f"merges.{int(m[1]) - new}.")
    return _build("swin_from_timm", _renamed(inner, (*_TIMM, merges)), edge, always_partition, drop_path)
