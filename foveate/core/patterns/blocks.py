"""Blocks of positions: which block distances e = floor(position / block) - floor(key / block) are allowed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foveate.core.layout import TILE
from foveate.core.patterns.base import Extent, Pattern, integer, verdict


@dataclass(frozen=True, repr=False)
class Blocked(Pattern):
    """Block-local attention: the query's own block of positions, and `before` / `after` blocks next to it.

    Not causal by itself. Blocks are counted in positions (bottom-right aligned), so block 0 starts at key 0.

    >>> Blocked(2).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    block: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("before", 0), ("after", 0)):
            object.__setattr__(self, name, integer("Blocked", name, getattr(self, name), least))

    def contains(self, ext, b, h, q, k):
        e = (q + ext.offset) // self.block - k // self.block
        return (e <= self.before) & (e >= -self.after)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = block_distances(ext, self.block, q0, q1, k0, k1)
        empty = (low > self.before) | (high < -self.after)
        return verdict(empty, (low >= -self.after) & (high <= self.before))

    def signature(self, ext, b, h, qt, kt):
        i, j = TILE * qt + ext.offset, TILE * kt
        e = i // self.block - j // self.block
        return phase(i, self.block), phase(j, self.block), np.clip(e, -self.after - TILE, self.before + TILE)


def block_distances(ext: Extent, block: int, q0, q1, k0, k1) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest block distance in each rectangle; every integer between occurs."""
    first, last = (q0 + ext.offset) // block, (q1 - 1 + ext.offset) // block
    return first - (k1 - 1) // block, last - k0 // block


def phase(start: np.ndarray, block: int) -> np.ndarray:
    """What decides how the 64 positions from `start` fall into blocks, but for the first block's number."""
    return start % block if block < TILE else np.minimum(block - start % block, TILE)
