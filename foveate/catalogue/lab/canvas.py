"""Scenes made of scikit-learn's digits, and a small classifier around any layer on maps (B, H, W, dim)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.catalogue.lab.digits import TEST, images
from foveate.catalogue.lab.tasks import generator

Sampler = Callable[[int], tuple[Tensor, Tensor]]  # step -> (images (B, side, side), labels (B,))


@functools.cache
def _by_class(test: bool) -> tuple[Tensor, ...]:
    """The digits of each class, float32 (n, 8, 8) in [0, 1], of the part to train on or the part held out."""
    x, y = images()
    x = (x - x.min()) / (x.max() - x.min())
    part = slice(0, TEST) if test else slice(TEST, None)
    return tuple(x[part][y[part] == digit] for digit in range(10))


def digit(label: int, g: torch.Generator, *, test: bool = False, size: int = 8) -> Tensor:
    """One image (size, size) in [0, 1] of a class, enlarged bilinearly."""
    pool = _by_class(test)[label]
    found = pool[int(torch.randint(len(pool), (), generator=g))]
    if size == 8:
        return found
    return F.interpolate(found[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]


def same_different(
    seed: int,
    batch: int,
    *,
    side: int = 24,
    classes: int = 10,
    test: bool = False,
    corners: tuple[str, str] = ("top left", "bottom right"),
) -> tuple[Tensor, Tensor]:
    """(images (batch, side, side), labels): two digits in two corners of an empty canvas; label 1: of the same class.

    Half of the labels are 1. Whoever sees one corner knows nothing of the label.

    Args:
        classes: digits below this number are used.
        test: digits held out from training.

    >>> x, y = same_different(0, 4)
    >>> x.shape, bool(x[:, :8, :8].any()), bool(x[:, :8, 8:].any())
    (torch.Size([4, 24, 24]), True, False)
    """
    if side < 16:
        raise ValueError(f"same_different: side must be at least 16 for two digits, got {side}")
    g = generator(seed)
    places = {
        "top left": (0, 0),
        "top right": (0, side - 8),
        "bottom left": (side - 8, 0),
        "bottom right": (side - 8, side - 8),
    }
    x, labels = torch.zeros(batch, side, side), torch.randint(0, 2, (batch,), generator=g)
    for row, label in zip(x, labels.tolist(), strict=True):
        one = int(torch.randint(classes, (), generator=g))
        other = one if label else (one + 1 + int(torch.randint(classes - 1, (), generator=g))) % classes
        for kind, corner in zip((one, other), corners, strict=True):
            top, left = places[corner]
            row[top : top + 8, left : left + 8] = digit(kind, g, test=test)
    return x, labels


def pasted(
    seed: int, batch: int, *, side: int = 28, sizes: tuple[int, int] = (8, 20), test: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(images (batch, side, side), classes, boxes (batch, 4) of top, left, height, width): one digit of any size.

    >>> x, y, boxes = pasted(0, 2)
    >>> x.shape, bool(((boxes[:, 2] >= 8) & (boxes[:, 2] <= 20)).all())
    (torch.Size([2, 28, 28]), True)
    """
    g = generator(seed)
    x, classes = torch.zeros(batch, side, side), torch.randint(0, 10, (batch,), generator=g)
    boxes = torch.zeros(batch, 4, dtype=torch.int64)
    for i, label in enumerate(classes.tolist()):
        size = int(torch.randint(sizes[0], sizes[1] + 1, (), generator=g))
        top, left = (int(torch.randint(side - size + 1, (), generator=g)) for _ in range(2))
        x[i, top : top + size, left : left + size] = digit(label, g, test=test, size=size)
        boxes[i] = torch.tensor([top, left, size, size])
    return x, classes, boxes


def several(
    seed: int, batch: int, *, side: int = 32, most: int = 4, test: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(images (batch, side, side), classes (batch, 4), counts): 1 to `most` digits in the quarters of a canvas.

    classes: of each quarter in row-major order, -1 where it is empty. Each digit stands anywhere inside its quarter.

    >>> x, classes, counts = several(0, 3)
    >>> x.shape, bool(((classes >= 0).sum(1) == counts).all())
    (torch.Size([3, 32, 32]), True)
    """
    g = generator(seed)
    half = side // 2
    if half < 8:
        raise ValueError(f"several: side must be at least 16, got {side}")
    if not 1 <= most <= 4:
        raise ValueError(f"several: most must be 1 to 4, got {most}")
    x, counts = torch.zeros(batch, side, side), torch.randint(1, most + 1, (batch,), generator=g)
    classes = torch.full((batch, 4), -1)
    for i, count in enumerate(counts.tolist()):
        for quarter in torch.randperm(4, generator=g)[:count].tolist():
            label = int(torch.randint(10, (), generator=g))
            dy, dx = (int(torch.randint(half - 8 + 1, (), generator=g)) for _ in range(2))
            top, left = quarter // 2 * half + dy, quarter % 2 * half + dx
            x[i, top : top + 8, left : left + 8] = digit(label, g, test=test)
            classes[i, quarter] = label
    return x, classes, counts


class MapClassifier(nn.Module):
    """(B, side, side) -> (B, classes): patches as a map, learned positions, pre-norm blocks, one place read out.

    Args:
        mixer: number of the layer -> a module (B, h, w, dim) -> the same, h = w = side / patch.
        readout: "mean" of all cells, or the cell in the top left "corner", which knows only what reached it.
        positions: add a learned vector per cell.
    """

    def __init__(
        self,
        mixer: Callable[[int], nn.Module],
        *,
        side: int,
        patch: int = 1,
        dim: int = 32,
        depth: int = 2,
        classes: int = 2,
        readout: str = "mean",
        mlp_ratio: int = 2,
        positions: bool = True,
    ) -> None:
        super().__init__()
        if readout not in ("mean", "corner"):
            raise ValueError(f"MapClassifier: readout must be 'mean' or 'corner', got {readout!r}")
        if side % patch:
            raise ValueError(f"MapClassifier: patch must divide side {side}, got {patch}")
        self.readout = readout
        self.embed = nn.Conv2d(1, dim, patch, stride=patch)
        self.positions = (
            nn.Parameter(0.02 * torch.randn(side // patch, side // patch, dim)) if positions else None
        )
        self.mixers = nn.ModuleList(mixer(layer) for layer in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1))
        wide = mlp_ratio * dim
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, wide), nn.GELU(), nn.Linear(wide, dim)) for _ in range(depth)
        )
        self.head = nn.Linear(dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, h, w, dim): the last map, normed."""
        y = self.embed(x[:, None]).permute(0, 2, 3, 1)  # (B, h, w, dim)
        if self.positions is not None:
            y = y + self.positions
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            y = y + mixer(self.norms[2 * i](y))
            y = y + mlp(self.norms[2 * i + 1](y))
        return self.norms[-1](y)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.head(y[:, 0, 0] if self.readout == "corner" else y.mean((1, 2)))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor, batch: int = 128) -> float:
    """Share of the images whose label is the highest score, in eval mode."""
    model.eval()
    right = [
        (model(part).argmax(-1) == y) for part, y in zip(x.split(batch), labels.split(batch), strict=True)
    ]
    return float(torch.cat(right).double().mean())


def reached(model: MapClassifier, side: int, place: tuple[int, int] = (0, 0), seed: int = 0) -> Tensor:
    """bool (side, side): which pixels move the feature of one cell, by the gradient at a random image."""
    x = torch.rand(1, side, side, generator=generator(seed)).requires_grad_()
    feature = model.eval().features(x)[0, place[0], place[1]]
    weights = torch.randn(feature.shape, generator=generator(seed, 1))
    (feature * weights).sum().backward()
    assert x.grad is not None
    return x.grad[0] != 0
