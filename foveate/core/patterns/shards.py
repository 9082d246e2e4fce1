"""S2-Attention: every head keeps another shard of the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from foveate.core.layout import TILE
from foveate.core.patterns.base import Pattern, diagonal, distances, integer, values, verdict
from foveate.core.patterns.blocks import block_distances, phase


@dataclass(frozen=True, repr=False)
class Shards(Pattern):
    """Causal: a local band for all heads and, per head, every `stride`-th block of the context.

    With query block Q and key block K (bottom-right aligned positions), head h of layout l = h // group:

        allowed  <=>  key <= position  and  ( Q - K < local_blocks  or  (K + offset[l] + 1) mod stride = 0 )

    offset[l] = l * max(1, stride // layouts) by default, 0 for all when `homogeneous`. Whether a block is
    in a head's shard does not depend on the query, so a key that left the band and is not in the shard is
    never needed again (`kv_keep`). "Efficient LLM Training and Serving with Heterogeneous Context Sharding
    among Attention Heads" (2024). Differs from the paper: heads must together cover every block unless told
    otherwise. This is the numbering of Phi-3-small; the released kernels count without the + 1 (head 0 keeps
    block 0), which is `offsets=[-1, 0, 1, ...]`.

    Args:
        block: positions per block.
        local_blocks: blocks of the local band, including the query's own; 0 = none.
        stride: every `stride`-th block is kept.
        layouts: number of different layouts; default `stride`. With grouped heads use the number of kv heads.
        group: consecutive query heads that share a layout, so the pattern has layouts * group heads.
        homogeneous: all heads keep the same shard (the paper's baseline); gives up coverage.
        offsets: one int per layout instead of the rule above.
        require_coverage: raise when some block is in no head's shard.

    >>> Shards(block=1, local_blocks=1, stride=2).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    """

    block: int = 64
    local_blocks: int = 16
    stride: int = 8
    layouts: int | None = None
    group: int = 1
    homogeneous: bool = False
    offsets: Any = None
    require_coverage: bool = True

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("local_blocks", 0), ("stride", 1), ("group", 1)):
            object.__setattr__(self, name, integer("Shards", name, getattr(self, name), least))
        if self.homogeneous and self.offsets is not None:
            raise ValueError("Shards: offsets cannot be given with homogeneous=True; accepted: one of them")
        layouts = self.stride if self.layouts is None else integer("Shards", "layouts", self.layouts, 1)
        if self.offsets is not None:
            offsets = tuple(values("Shards", "offsets", self.offsets, (1,)).array.tolist())
            if self.layouts is not None and len(offsets) != layouts:
                raise ValueError(f"Shards: offsets must have layouts = {layouts} entries, got {len(offsets)}")
            layouts = len(offsets)
            object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "layouts", layouts)
        missing = sorted(set(range(self.stride)) - {o % self.stride for o in self._offsets()})
        if self.require_coverage and not self.homogeneous and missing:
            raise ValueError(
                f"Shards: {layouts} layouts with stride {self.stride} leave blocks in no shard "
                f"(residues {missing[:8]}); accepted: layouts >= stride, offsets that cover every residue, "
                "or require_coverage=False"
            )

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.layouts or 1) * self.group

    def _offsets(self) -> tuple[int, ...]:
        if self.offsets is not None:
            return self.offsets
        layouts = self.layouts or 1
        step = 0 if self.homogeneous else max(1, self.stride // layouts)
        return tuple(h * step for h in range(layouts))

    def _offset(self, h: int) -> int:
        return self._offsets()[h // self.group if self.heads > 1 else 0]

    def at(self, b, h):
        offset = self._offset(h) % self.stride
        return Shards(self.block, self.local_blocks, self.stride, offsets=(offset,), require_coverage=False)

    def contains(self, ext, b, h, q, k):
        i, key_block = q + ext.offset, k // self.block
        strided = (key_block + (self._offset(h) + 1)) % self.stride == 0
        local = i // self.block - key_block < self.local_blocks
        return (k <= i) & (local | strided)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = distances(ext, q0, q1, k0, k1)
        first, last = block_distances(ext, self.block, q0, q1, k0, k1)
        local = verdict(first >= self.local_blocks, last < self.local_blocks)
        shift = self._offset(h) + 1
        start, stop = k0 // self.block + shift, (k1 - 1) // self.block + shift
        kept = stop // self.stride - (start - 1) // self.stride
        strided = verdict(kept == 0, kept == stop - start + 1)
        return np.minimum(verdict(high < 0, low >= 0), np.maximum(local, strided))

    def signature(self, ext, b, h, qt, kt):
        i, j = TILE * qt + ext.offset, TILE * kt
        e = np.clip(i // self.block - j // self.block, -TILE, self.local_blocks + TILE)
        residue = (j // self.block + self._offset(h) + 1) % self.stride
        return phase(i, self.block), phase(j, self.block), e, residue, diagonal(ext, qt, kt, 0, 0)

    def kv_keep(self, head: int, length: int) -> torch.Tensor:
        """Positions < `length` that head `head` may still need for queries at positions >= `length`; int64.

        >>> Shards(block=1, local_blocks=2, stride=4).kv_keep(0, 8).tolist()
        [3, 7]
        """
        head = integer("Shards.kv_keep", "head", head, 0, self.heads - 1)
        key = np.arange(integer("Shards.kv_keep", "length", length, 0))
        kept = (key // self.block + self._offset(head) + 1) % self.stride == 0
        local = length // self.block - key // self.block < self.local_blocks
        return torch.from_numpy(key[kept | local])
