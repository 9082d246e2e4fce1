"""`viewer`: a small Swin that finds, names and counts the digits of a scene."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision.swin import Swin

CLASSES = 10


@dataclass(frozen=True)
class ViewerConfig:
    """Sizes of a viewer."""

    dim: int = 32
    depths: tuple[int, ...] = (2, 2, 2)
    heads: tuple[int, ...] = (2, 4, 8)
    window: int = 6
    patch: int = 2
    neck: int = 64
    most: int = 6

    def as_dict(self) -> dict[str, object]:
        """JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


@dataclass(frozen=True)
class Seen:
    """What a viewer says of a batch of images.

    Args:
        classes: logits (B, 11, h, w) per cell of 4 x 4 pixels: the digit whose middle lies there, the last: none.
        boxes: (B, 4, h, w): where the middle lies inside the cell (rows, columns, in cells, 0 to 1), and the logarithm
            of height and width over 8 pixels.
        counts: logits (B, most + 1).
    """

    classes: Tensor
    boxes: Tensor
    counts: Tensor


class Viewer(nn.Module):
    """Images (B, 1, H, W) of any size to the digits in them.

    A `Swin` with patches of two pixels; its maps of strides 4 and 8 meet at stride 4 (1 x 1 convolutions, nearest
    enlargement, sum), where each cell says which digit has its middle there and how large it is; the number of digits
    is read from the mean of the last map.

    >>> viewer = Viewer(ViewerConfig(dim=8, heads=(1, 2, 4)))
    >>> seen = viewer(torch.rand(1, 1, 48, 40))
    >>> seen.classes.shape, seen.counts.shape
    (torch.Size([1, 11, 12, 10]), torch.Size([1, 7]))
    """

    stride = 4

    def __init__(self, config: ViewerConfig | None = None) -> None:
        super().__init__()
        self.config = c = ViewerConfig() if config is None else config
        self.body = Swin(
            dim=c.dim,
            depths=c.depths,
            heads=c.heads,
            window=c.window,
            patch=c.patch,
            drop_path=0.0,
            in_channels=1,
            features_only=True,
            map_norms=True,
        )
        wide = self.body.channels
        self.neck = nn.ModuleList(nn.Conv2d(width, c.neck, 1) for width in wide[1:])
        self.mix = nn.Conv2d(c.neck, c.neck, 3, padding=1)
        self.classes = nn.Conv2d(c.neck, CLASSES + 1, 1)
        self.boxes = nn.Conv2d(c.neck, 4, 1)
        self.counts = nn.Linear(wide[-1], c.most + 1)

    def forward(self, images: Tensor) -> Seen:
        maps = self.body.forward_features(images)[1:]
        grid = maps[0].shape[2:]
        x = sum(
            F.interpolate(lateral(m), grid, mode="nearest") if m.shape[2:] != grid else lateral(m)
            for lateral, m in zip(self.neck, maps, strict=True)
        )
        x = F.gelu(self.mix(F.gelu(torch.as_tensor(x))))  # (B, neck, h, w)
        return Seen(self.classes(x), self.boxes(x), self.counts(maps[-1].mean((2, 3))))

    @torch.no_grad()
    def find(self, images: Tensor, least: float = 0.5) -> list[list[tuple[int, float, tuple[float, ...]]]]:
        """Per image, the digits found: (digit, probability, (top, left, height, width)), the surest first.

        A cell says so where its probability of being the middle of some digit is at least `least` and no less than that
        of its eight neighbours; of two boxes that share half their area the surer one stays.
        """
        self.eval()
        seen = self(images)
        probability = seen.classes.softmax(1)
        some = 1 - probability[:, CLASSES]  # (B, h, w)
        peak = (some == F.max_pool2d(some[:, None], 3, 1, 1)[:, 0]) & (some >= least)
        found = []
        for b in range(len(images)):
            mine: list[tuple[int, float, tuple[float, ...]]] = []
            for row, column in peak[b].nonzero().tolist():
                dy, dx, height, width = seen.boxes[b, :, row, column].tolist()
                sides = [8 * float(torch.tensor(n).exp()) for n in (height, width)]
                middle = self.stride * (row + dy), self.stride * (column + dx)
                box = (middle[0] - sides[0] / 2, middle[1] - sides[1] / 2, *sides)
                digit = int(probability[b, :CLASSES, row, column].argmax())
                mine.append((digit, float(some[b, row, column]), box))
            mine.sort(key=lambda item: -item[1])
            kept: list[tuple[int, float, tuple[float, ...]]] = []
            for item in mine:
                if all(overlap(item[2], other[2]) < 0.5 for other in kept):
                    kept.append(item)
            found.append(kept)
        return found


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (top, left, height, width).

    >>> overlap((0, 0, 2, 2), (0, 1, 2, 2))
    0.3333333333333333
    """
    sides = [min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    return both / (one[2] * one[3] + other[2] * other[3] - both)


def losses(seen: Seen, classes: Tensor, boxes: Tensor, counts: Tensor, stride: int = 4) -> dict[str, Tensor]:
    """Cross-entropy of the cells (those with a digit count five-fold), L1 of the boxes there, cross-entropy of counts.

    Args:
        classes (B, most), boxes (B, most, 4), counts (B,): of `scenes.Scene`.
    """
    b, _, h, w = seen.classes.shape
    target = torch.full((b, h, w), CLASSES, device=classes.device)
    rows, slots = (classes >= 0).nonzero(as_tuple=True)
    box = boxes[rows, slots]  # (digits, 4)
    middle = (box[:, :2] + box[:, 2:] / 2) / stride
    cell = middle.long()
    y, x = cell[:, 0].clamp(max=h - 1), cell[:, 1].clamp(max=w - 1)
    target[rows, y, x] = classes[rows, slots]
    weight = torch.ones(CLASSES + 1, device=classes.device)
    weight[:CLASSES] = 5
    want = torch.cat([middle - torch.stack([y, x], 1), (box[:, 2:] / 8).log()], 1)
    got = seen.boxes[rows, :, y, x]
    return {
        "cells": F.cross_entropy(seen.classes, target, weight=weight),
        "boxes": (got - want).abs().mean() if len(rows) else seen.boxes.sum() * 0,
        "counts": F.cross_entropy(seen.counts, counts),
    }
