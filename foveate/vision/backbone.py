"""The shell of all backbones: what goes in, the maps that come out, the head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Backbone(nn.Module):
    """Base of backbones: images to maps, and to class scores.

    A subclass writes `forward_features`, which gives one map per stage, fine to coarse, and may set `norm` (on
    (B, H, W, C) of the last map) before its `head`. Isotropic models give one map.

    Args:
        channels: C of each map.
        strides: pixels per cell of each map.
        num_classes: width of the scores; 0: `forward` gives the pooled features.
        in_channels: of the images.
        features_only: `forward` gives the maps, as necks of detectors take them; there is no head.

    Shape: images (B, in_channels, H, W) -> (B, num_classes), or maps (B, C_i, H_i, W_i).
    """

    norm: nn.Module | None
    head: nn.Module | None

    def __init__(
        self,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != len(strides):
            raise ValueError(f"{type(self).__name__}: one stride per map, got {strides} for {channels}")
        if num_classes < 0:
            raise ValueError(f"{type(self).__name__}: num_classes must be >= 0, got {num_classes}")
        if in_channels < 1:
            raise ValueError(f"{type(self).__name__}: in_channels must be >= 1, got {in_channels}")
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.num_classes, self.in_channels, self.features_only = num_classes, in_channels, features_only

    def make_head(self, norm: nn.Module | None = None, width: int | None = None) -> None:
        """Set `norm` and a linear `head` on the pooled last map; neither with features_only."""
        width = self.channels[-1] if width is None else width
        self.norm = None if self.features_only else norm
        self.head = (
            nn.Linear(width, self.num_classes) if self.num_classes and not self.features_only else None
        )

    def check(self, images: Tensor) -> None:
        """Raise unless images are (B, in_channels, H, W), floating."""
        name = type(self).__name__
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"{name}: images must be (B, {self.in_channels}, H, W), got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise TypeError(f"{name}: images must be floating, got {images.dtype}")

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C_i, H_i, W_i), one per stage, fine to coarse."""
        raise NotImplementedError

    def pool(self, maps: list[Tensor]) -> Tensor:
        """(B, C): `norm` of the last map, averaged over its cells."""
        x = maps[-1].permute(0, 2, 3, 1)  # (B, H, W, C)
        return (x if self.norm is None else self.norm(x)).mean((1, 2))

    def forward_head(self, maps: list[Tensor]) -> Tensor:
        """(B, num_classes), or (B, C) when num_classes is 0."""
        pooled = self.pool(maps)
        return pooled if self.head is None else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        maps = self.forward_features(images)
        return maps if self.features_only else self.forward_head(maps)


def parameters_of(model: nn.Module) -> int:
    """Number of learned values; buffers do not count.

    >>> parameters_of(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters())
