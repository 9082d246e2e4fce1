"""Random, the control: blocks kept by a hash of their place, as dense as asked or as dense as a layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.core.layout import TILE, tiles
from foveate.core.patterns.base import Extent, Pattern, Values, integer, verdict

if TYPE_CHECKING:
    from foveate.core.layout import BlockLayout

NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)
ROWS_CELLS = 1 << 20  # scores held at once while the rows are matched


@dataclass(frozen=True, repr=False)
class Random(Pattern):
    """Whole blocks, kept at random: the control against which clever patterns are compared.

    Block (Q, K) of head h has a score, a 64-bit hash (splitmix64) of (seed, batch row, head, Q, K): no
    sequential generator, no N x N. It is kept when the score is in the lowest `density` share, so the same
    seed always keeps the same blocks and a lower density keeps a subset of them. Q and K are blocks of
    positions (bottom-right aligned), so a query keeps its keys whether it comes with others or alone. Not
    causal by itself.

    `Random.matching(layout)` keeps, in every row of tiles of every head, exactly as many tiles as `layout`
    lists: the control of equal density.

    Args:
        density: probability of a block to be kept, in [0, 1].
        block: positions per block.
        seed: int >= 0.
        batch, heads: how many batch rows and heads draw their own blocks.
        diagonal: always keep the blocks that hold the queries' own positions (bottom-right aligned).

    >>> layout = Random(0.25, seed=1).layout(64 * 40)
    >>> 0.2 < layout.density < 0.35
    True
    """

    density: float | None = None
    block: int = TILE
    seed: int = 0
    batch: int = 1
    heads: int = 1
    diagonal: bool = True
    causal: bool = False
    rows: Any = None

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("seed", 0), ("batch", 1), ("heads", 1)):
            object.__setattr__(self, name, integer("Random", name, getattr(self, name), least))
        if self.rows is None:
            if isinstance(self.density, bool) or not isinstance(self.density, (int, float, np.floating)):
                raise TypeError(f"Random: density must be a number in [0, 1], got {self.density!r}")
            if not 0 <= self.density <= 1:
                raise ValueError(f"Random: density must be a number in [0, 1], got {self.density!r}")
            object.__setattr__(self, "density", float(self.density))
        else:
            if self.density is not None or self.block != TILE:
                raise ValueError(
                    "Random: rows= comes from Random.matching() and excludes density= and block="
                )
            object.__setattr__(self, "rows", Values(self.rows, np.int64))
            if self.rows.array.ndim != 3 or self.rows.array.shape[:2] != (self.batch, self.heads):
                raise ValueError(
                    f"Random: rows must have shape ({self.batch}, {self.heads}, query tiles), "
                    f"got {self.rows.array.shape}"
                )

    @classmethod
    def matching(
        cls, layout: BlockLayout, *, seed: int = 0, diagonal: bool = True, causal: bool = True
    ) -> Random:
        """As many tiles in every row of tiles as `layout` lists, chosen at random.

        Args:
            layout: whose batch, heads, lengths and counts are matched.
            diagonal: the tiles of the queries' own positions are chosen first.
            causal: choose only among tiles with a key that some query of the row may see causally. Combine
            with
                `Causal()` to cut the tile on the diagonal.
        """
        rows = layout.row_ptr.diff().cpu().numpy().reshape(layout.batch, layout.heads, -1)
        return cls(
            seed=seed, batch=layout.batch, heads=layout.heads, diagonal=diagonal, causal=causal, rows=rows
        )

    def check(self, ext):
        if self.rows is not None:
            if self.rows.array.shape[2] != tiles(ext.q_len):
                raise ValueError(
                    f"Random.matching: the layout has {self.rows.array.shape[2]} rows of tiles, "
                    f"q_len = {ext.q_len} needs {tiles(ext.q_len)}"
                )
            q = np.arange(tiles(ext.q_len))
            room = np.maximum(self._last(ext, q) + 1, 0) if self.causal else np.full(len(q), tiles(ext.k_len))
            if (self.rows.array > room).any():
                raise ValueError(
                    "Random.matching: some row of the layout lists more tiles than it may choose from; "
                    + (
                        "accepted: causal=False for a layout that looks ahead"
                        if self.causal
                        else f"{room[0]} tiles"
                    )
                )

    def _row(self, ext: Extent, q: np.ndarray) -> np.ndarray:
        """Row of blocks of a query: that of its position; when a layout is matched, its row of tiles."""
        return (q + ext.offset) // self.block if self.rows is None else q // TILE

    def _first(self, ext: Extent, row: np.ndarray) -> np.ndarray:
        """Block of the first position of a row."""
        return row if self.rows is None else (row * TILE + ext.offset) // TILE

    def _last(self, ext: Extent, row: np.ndarray) -> np.ndarray:
        """Block of the last position of a row."""
        return (
            row if self.rows is None else (np.minimum((row + 1) * TILE, ext.q_len) - 1 + ext.offset) // TILE
        )

    def _scores(self, ext: Extent, b: int, h: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """uint64; the lowest are kept. Diagonal blocks come first, blocks out of reach never."""
        last = self._last(ext, row)
        b, h = b if self.batch > 1 else 0, h if self.heads > 1 else 0
        start = _mix(
            np.uint64((self.seed * 0x9E3779B97F4A7C15 + b * 0xD1B54A32D192ED03 + h + 1) & ((1 << 64) - 1))
        )
        place = row.astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7) + column.astype(np.uint64)
        score = _mix(_mix(place ^ start) + start)
        score = np.clip(score, np.uint64(1 << 16), NEVER - np.uint64(1))
        if self.causal:
            score = np.where(column > last, NEVER, score)
        if self.diagonal:
            own = (column <= last) & (column >= self._first(ext, row))
            score = np.where(own, (last - column).astype(np.uint64), score)
        return score

    def _kept(self, ext: Extent, b: int, h: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        score = self._scores(ext, b, h, row, column)
        if self.rows is None:
            assert self.density is not None
            share = max(int(self.density * float(1 << 53)) << 11, 1 << 16 if self.diagonal else 0)
            return score < np.uint64(min(share, int(NEVER)))
        limits, some = _limits(self, ext, b if self.batch > 1 else 0, h if self.heads > 1 else 0)
        return (score <= limits[row]) & some[row]

    def contains(self, ext, b, h, q, k):
        return self._kept(ext, b, h, self._row(ext, q), k // self.block)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        row, column = self._row(ext, q0), k0 // self.block
        single = (self._row(ext, q1 - 1) == row) & ((k1 - 1) // self.block == column)
        kept = self._kept(ext, b, h, row, column)
        return verdict(single & ~kept, single & kept)


def _mix(x: np.ndarray | np.uint64):
    """splitmix64's finaliser: a bijection of 64-bit words that scatters them."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def _limits(pattern: Random, ext: Extent, b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """Per row of tiles: the score of the last tile that is kept, and whether any is."""
    wanted = pattern.rows.array[b, h]
    columns = np.arange(tiles(ext.k_len))
    limits = np.zeros(len(wanted), np.uint64)
    step = max(1, ROWS_CELLS // len(columns))
    for start in range(0, len(wanted), step):
        row = np.arange(start, min(start + step, len(wanted)))
        score = np.sort(pattern._scores(ext, b, h, row[:, None], columns[None, :]), axis=1)
        limits[row] = score[np.arange(len(row)), np.maximum(wanted[row] - 1, 0)]
    return limits, wanted > 0
