"""scikit-learn's handwritten digits (8 x 8, 1,797 images) as tokens, and a small ViT around any mixer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.catalogue.lab.tasks import generator

TEST = 360  # images held out


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """(float32 (1797, 8, 8) of mean 0 and standard deviation 1, int64 labels), in a fixed random order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install foveate[cli]") from error
    found: Any = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=generator(5))
    x = x[order]
    return (x - x.mean()) / x.std(), y[order]


def split(size: int = 8) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, to test on); images (n, size, size), enlarged bilinearly."""
    x, y = images()
    if size != 8:
        x = F.interpolate(x[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
    return (x[TEST:], y[TEST:]), (x[:TEST], y[:TEST])


class TinyViT(nn.Module):
    """(B, size, size) -> (B, 10): patches in row-major order, learned positions, pre-norm blocks, mean pooling.

    Args:
        mixer: index of the layer -> a module (B, N, dim) -> (B, N, dim), N = (size / patch)^2, no class token.
    """

    def __init__(
        self,
        mixer: Callable[[int], nn.Module],
        *,
        size: int = 8,
        patch: int = 1,
        dim: int = 64,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch, dim)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, dim))
        self.mixers = nn.ModuleList(mixer(layer) for layer in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch
        tokens = x.unfold(1, p, p).unfold(2, p, p).flatten(3).flatten(1, 2)  # (B, N, p p)
        y = self.embed(tokens) + self.positions
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            y = y + mixer(self.norms[2 * i](y))
            y = y + mlp(self.norms[2 * i + 1](y))
        return self.head(self.norms[-1](y).mean(1))


def batches(seed: int, batch: int, size: int = 8) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> (images, labels) drawn from the training part."""
    (x, y), _ = split(size)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(0, len(x), (batch,), generator=generator(seed, step))
        return x[at], y[at]

    return draw


@torch.no_grad()
def score(model: nn.Module, size: int = 8) -> float:
    """Share of the 360 test images that are recognised."""
    _, (x, y) = split(size)
    model.eval()
    return float((model(x).argmax(-1) == y).double().mean())
