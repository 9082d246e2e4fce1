"""PowerAttention: keys at power-of-two block distances; reachability of a pattern over layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from foveate.core.layout import TILE
from foveate.core.patterns.band import Causal
from foveate.core.patterns.base import Pattern, as_pattern, diagonal, distances, integer, verdict
from foveate.core.patterns.blocks import Blocked, block_distances, phase
from foveate.core.patterns.columns import Sinks

REACH_LIMIT = 8192


@dataclass(frozen=True, repr=False)
class PowerOfTwo(Pattern):
    """Causal, keys whose *block* distance to the query is a power of two.

    With e = floor(position / block) - floor(key / block), bottom-right aligned:

        allowed  <=>  key <= position  and  e & (e - 1) == 0,    that is e = 0, 1, 2, 4, 8, ...

    Every distance d is reached after popcount(d) layers, and about log2(N / block) blocks are read per query.
    PowerAttention (2025); block = 1 is its token-level form.

    Args:
        block: positions per block, >= 1.
        include_self: whether distance 0, the query's own block, is allowed.

    >>> PowerOfTwo().layout(7).to_dense()[0, 0, 6].int().tolist()
    [0, 0, 1, 0, 1, 1, 1]
    """

    block: int = 1
    include_self: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", integer("PowerOfTwo", "block", self.block, 1))

    def contains(self, ext, b, h, q, k):
        i = q + ext.offset
        e = i // self.block - k // self.block
        seen = (k <= i) & ((e & (e - 1)) == 0)
        return seen if self.include_self else seen & (e > 0)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = distances(ext, q0, q1, k0, k1)
        first, last = block_distances(ext, self.block, q0, q1, k0, k1)
        found = self._members(last) - self._members(first - 1)
        return verdict((high < 0) | (found == 0), (low >= 0) & (found == last - first + 1))

    def _members(self, most: np.ndarray) -> np.ndarray:
        """Allowed block distances <= `most`: one for 0, then one per power of two."""
        bits = np.frexp(np.maximum(most, 0))[1].astype(np.int64)  # of x > 0: floor(log2 x) + 1
        return bits + (most >= 0) if self.include_self else bits

    def signature(self, ext, b, h, qt, kt):
        i, j = TILE * qt + ext.offset, TILE * kt
        e = i // self.block - j // self.block
        return phase(i, self.block), phase(j, self.block), e, diagonal(ext, qt, kt, 0, 0)


def power_attention(block: int = 256, window_blocks: int = 5, sink_blocks: int = 1) -> Pattern:
    """PowerAttention as the paper runs it: power-of-two blocks, a window and sinks, causal.

    Causal() & (PowerOfTwo(block) | window of `window_blocks` blocks | Sinks(sink_blocks * block)). The
    window is counted in blocks (block distance < window_blocks), as in the paper (2025); 32K tokens: 256,
    5, 1.

    >>> power_attention(2, 1, 1).layout(12).to_dense()[0, 0, 11].int().tolist()
    [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    """
    block = integer("power_attention", "block", block, 1)
    window_blocks = integer("power_attention", "window_blocks", window_blocks, 1)
    sink_blocks = integer("power_attention", "sink_blocks", sink_blocks, 0)
    near = Blocked(block, before=window_blocks - 1)
    return Causal() & (PowerOfTwo(block) | near | Sinks(sink_blocks * block))


def reachability(pattern: Pattern, n: int, layers: int) -> torch.Tensor:
    """Who can be reached in `layers` layers: the boolean power of the pattern, bool (batch, heads, n, n).

    A tool for small n (it is n x n by definition, at most 8192).

    >>> from foveate.core.patterns import SlidingWindow
    >>> reachability(SlidingWindow(2), 4, 2)[0, 0, 3].int().tolist()
    [0, 1, 1, 1]
    """
    n = integer("reachability", "n", n, 1, REACH_LIMIT)
    layers = integer("reachability", "layers", layers, 1)
    one = as_pattern(pattern).layout(n).to_dense(limit=1 << 33).float()
    reach = one
    for _ in range(layers - 1):
        reach = (reach @ one > 0).float()
    return reach > 0
