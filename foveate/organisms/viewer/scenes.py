"""Scenes made of scikit-learn's handwritten digits: several of them on a canvas, anywhere, of several sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HELD_OUT = 360  # digits that are never trained on


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """(float32 (1797, 8, 8) in [0, 1], int64 labels), in a fixed random order whose first 360 are held out.

    Errors: ImportError without scikit-learn, the extra `foveate[cli]`.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'foveate[cli]'") from error
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32) / 16  # pyright: ignore[reportAttributeAccessIssue]
    y = torch.tensor(found.target)  # pyright: ignore[reportAttributeAccessIssue]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000006))
    return x[order], y[order]


@dataclass(frozen=True)
class Scene:
    """A batch of scenes.

    Args:
        images: float32 (B, 1, side, side), the brightness of ink and of noise, about 0 to 1.
        classes: int64 (B, most), -1 where there is no digit.
        boxes: float32 (B, most, 4), top, left, height, width in pixels.
        counts: int64 (B,).
    """

    images: Tensor
    classes: Tensor
    boxes: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Scenes:
    """A source of scenes: 1 to `most` digits that do not overlap, with contrast, a slope of brightness and noise.

    Args:
        side: pixels of a canvas.
        most: digits of a scene; with large digits on a small canvas the last may not find a place.
        sizes: smallest and largest side of a digit.
        noise: standard deviation of what is added to every pixel.

    >>> scene = Scenes().sample(0, 2)
    >>> scene.images.shape, bool((scene.classes[0] >= 0).sum() == scene.counts[0])
    (torch.Size([2, 1, 48, 48]), True)
    """

    side: int = 48
    most: int = 6
    sizes: tuple[int, int] = (8, 16)
    noise: float = 0.08

    def __post_init__(self) -> None:
        if not 1 <= self.sizes[0] <= self.sizes[1] <= self.side:
            raise ValueError(f"Scenes: sizes must rise and fit a side of {self.side}, got {self.sizes}")
        if self.most < 1:
            raise ValueError(f"Scenes: most must be at least 1, got {self.most}")

    def sample(self, seed: int | tuple[int, ...], batch: int, *, held_out: bool = False) -> Scene:
        """A batch; equal seeds give equal scenes. held_out: of digits that are never trained on."""
        rng = np.random.default_rng(seed)
        x, y = digits()
        low, high = (0, HELD_OUT) if held_out else (HELD_OUT, len(x))
        side = self.side
        slope = torch.linspace(-0.5, 0.5, side)
        images = torch.zeros(batch, side, side)
        classes = torch.full((batch, self.most), -1)
        boxes = torch.zeros(batch, self.most, 4)
        for b in range(batch):
            placed: list[tuple[int, int, int]] = []
            for _ in range(int(rng.integers(1, self.most + 1))):
                size = int(rng.integers(self.sizes[0], self.sizes[1] + 1))
                for _ in range(20):
                    top, left = (int(n) for n in rng.integers(0, side - size + 1, 2))
                    if all(
                        top >= t + s or t >= top + size or left >= l_ + s or l_ >= left + size
                        for t, l_, s in placed
                    ):
                        break
                else:
                    continue
                which = int(rng.integers(low, high))
                ink = F.interpolate(x[which][None, None], (size, size), mode="bilinear", align_corners=False)
                images[b, top : top + size, left : left + size] = float(rng.uniform(0.5, 1)) * ink[0, 0]
                classes[b, len(placed)] = y[which]
                boxes[b, len(placed)] = torch.tensor([top, left, size, size])
                placed.append((top, left, size))
            across, down = (0.3 * float(n) for n in rng.uniform(-1, 1, 2))
            images[b] += across * slope + down * slope[:, None]
        images += self.noise * torch.from_numpy(rng.standard_normal(images.shape, np.float32))
        return Scene(images[:, None], classes, boxes, (classes >= 0).sum(1))
