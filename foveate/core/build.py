"""Pattern -> BlockLayout: exact, by hierarchical descent, in time and memory proportional to what is found.

1. Descent. Large aligned squares are classified first (16 tiles wide, or 256, ... so that there are few of
   them).
   EMPTY ones are dropped, FULL ones written at once, PARTIAL ones cut into 16 x 16 smaller ones, down to
   single tiles.
2. PARTIAL tiles are grouped by the pattern's `signature` and by how the plane's ragged edges cut them; one
   representative of each group is evaluated, element by element, in chunks of bounded size.
3. The evaluated tiles are packed into 64-bit words; empty ones are dropped, full ones recognised, equal
   ones joined.

The state of the tiles is kept in a grid of one number per tile, for a band of query tiles at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from foveate.core.layout import TILE, BlockLayout, pack_bits, tail_word, tiles
from foveate.core.patterns.base import FULL, PARTIAL, Extent, Pattern, tile_bounds

FAN = 16  # a PARTIAL square is cut into FAN x FAN
BAND_CELLS = 1 << 22  # tiles whose state is held at once
FIRST_SQUARES = 1 << 12  # the descent starts at the level with at most this many squares
CHUNK_PARENTS = 1 << 10  # PARTIAL squares that are cut at once
CHUNK_TILES = 1 << 7  # tiles evaluated at once: 2**19 elements


def build_layout(pattern: Pattern, q_len: int, k_len: int) -> BlockLayout:
    """The exact canonical layout of `pattern` on `q_len` queries and `k_len` keys; not cached.

    Raises:
        ValueError: when the pattern cannot live on these lengths.

    >>> from foveate.core.patterns import Causal, SlidingWindow
    >>> build_layout(Causal() & SlidingWindow(64), 256, 256).nnz
    7
    """
    ext = Extent(q_len, k_len)
    pattern.check(ext)
    pool = _Bitmaps(ext)
    planes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    known: dict[tuple[Pattern, int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for b in range(pattern.batch):
        for h in range(pattern.heads):
            one = pattern.at(b, h)
            key = (one, b if one.batch > 1 else 0, h if one.heads > 1 else 0)
            if key not in known:
                known[key] = _plane(one, ext, key[1], key[2], pool)
            planes.append(known[key])
    counts, idx, ids = (
        np.concatenate(part) if len(planes) > 1 else part[0] for part in zip(*planes, strict=True)
    )
    row_ptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=row_ptr[1:])
    dictionary, number = pool.canonical()
    ids = number[ids]
    with torch.inference_mode(False):  # a cached layout may be used for training later
        return BlockLayout(
            ext.q_len,
            ext.k_len,
            torch.from_numpy(row_ptr),
            torch.from_numpy(idx),
            torch.from_numpy(ids),
            torch.from_numpy(dictionary),
            pattern.batch,
            pattern.heads,
            checked=True,
        )


class _Bitmaps:
    """The distinct partial bitmaps met so far. Codes: 0 empty, 1 full, n >= 2 the (n - 2)-th bitmap."""

    def __init__(self, ext: Extent):
        self._known: dict[bytes, int] = {}
        # in-range bits by clip class: inner, ragged bottom, ragged right, corner
        self.bounds = np.full((4, TILE), -1, np.int64)
        self.bounds[1, ext.q_len % TILE or TILE :] = 0
        self.bounds[2] = tail_word(ext.k_len).astype(np.int64)
        self.bounds[3] = self.bounds[1] & self.bounds[2]

    def codes(self, words: np.ndarray, clip: np.ndarray) -> np.ndarray:
        """int32 code of each bitmap, int64 (n, 64), cut by its clip class."""
        bounds = self.bounds[clip]
        words = words & bounds
        out = (words == bounds).all(axis=1).astype(np.int32)
        for i in np.flatnonzero((out == 0) & words.any(axis=1)):
            out[i] = self._known.setdefault(words[i].tobytes(), len(self._known) + 2)
        return out

    def canonical(self) -> tuple[np.ndarray, np.ndarray]:
        """Bitmaps in the order of their content, int64 (n, 64), and the layout id of each code, int32."""
        words = np.frombuffer(b"".join(self._known), np.int64).reshape(-1, TILE)
        order = np.lexsort(words.T[::-1]) if len(words) else np.zeros(0, np.int64)
        number = np.zeros(len(words) + 2, np.int32)
        number[order + 2] = np.arange(1, len(words) + 1)
        return np.ascontiguousarray(words[order]), number


def _plane(pattern: Pattern, ext: Extent, b: int, h: int, pool: _Bitmaps):
    """One batch row and head: (tiles per row int64, key tiles int32, codes int32)."""
    nq, nk = tiles(ext.q_len), tiles(ext.k_len)
    size = 1  # of the first squares, in tiles
    band = max(1, min(nq, BAND_CELLS // nk))
    while -(-band // size) * -(-nk // size) > FIRST_SQUARES:
        size *= FAN
    band = min(-(-band // size), -(-nq // size)) * size
    counts, idx, ids = [], [], []
    for first in range(0, nq, band):
        rows = min(band, nq - first)
        grid = np.zeros((-(-rows // size) * size, -(-nk // size) * size), np.int32)
        r, c = np.indices((grid.shape[0] // size, grid.shape[1] // size)).reshape(2, -1)
        _descend(pattern, ext, b, h, pool, grid, first, r, c, size)
        live = grid[:rows, :nk]
        row, col = np.nonzero(live)
        counts.append(np.bincount(row, minlength=rows))
        idx.append(col.astype(np.int32))
        ids.append(live[row, col])
    return np.concatenate(counts), np.concatenate(idx), np.concatenate(ids)


def _descend(
    pattern: Pattern,
    ext: Extent,
    b: int,
    h: int,
    pool: _Bitmaps,
    grid: np.ndarray,
    first: int,
    r: np.ndarray,
    c: np.ndarray,
    size: int,
) -> None:
    """Write into `grid` the codes of the squares (r, c), `size` tiles wide, counted from tile row `first`."""
    side = size * TILE
    q0, k0 = first * TILE + r * side, c * side
    q1, k1 = np.minimum(q0 + side, ext.q_len), np.minimum(k0 + side, ext.k_len)
    state = pattern.classify(ext, b, h, q0, q1, k0, k1)
    full, mixed = state == FULL, state == PARTIAL
    if size == 1:
        grid[r[full], c[full]] = 1
        r, c = r[mixed], c[mixed]
        if len(r):
            grid[r, c] = _evaluate(pattern, ext, b, h, pool, r + first, c)
        return
    squares = grid.reshape(grid.shape[0] // size, size, grid.shape[1] // size, size)
    squares[r[full], :, c[full], :] = 1
    r, c = r[mixed], c[mixed]
    step = np.arange(FAN)
    small = size // FAN
    for start in range(0, len(r), CHUNK_PARENTS):
        part = slice(start, start + CHUNK_PARENTS)
        rr = (r[part, None, None] * FAN + step[:, None] + np.zeros_like(step)).ravel()
        cc = (c[part, None, None] * FAN + np.zeros_like(step)[:, None] + step).ravel()
        inside = ((first + rr * small) * TILE < ext.q_len) & (cc * small * TILE < ext.k_len)
        _descend(pattern, ext, b, h, pool, grid, first, rr[inside], cc[inside], small)


def _evaluate(
    pattern: Pattern, ext: Extent, b: int, h: int, pool: _Bitmaps, qt: np.ndarray, kt: np.ndarray
) -> np.ndarray:
    """int32 codes of the tiles (qt, kt), from one representative of each group of tiles known to be equal."""
    clip = 1 * ((qt == tiles(ext.q_len) - 1) & (ext.q_len % TILE != 0))
    clip = clip + 2 * ((kt == tiles(ext.k_len) - 1) & (ext.k_len % TILE != 0))
    key = _joined((clip, *pattern.signature(ext, b, h, qt, kt)))
    _, chosen, member = np.unique(key, return_index=True, return_inverse=True)
    qt, kt, clip = qt[chosen], kt[chosen], clip[chosen]
    codes = np.empty(len(chosen), np.int32)
    lane = np.arange(TILE)
    for start in range(0, len(chosen), CHUNK_TILES):
        part = slice(start, start + CHUNK_TILES)
        q0, _, k0, _ = tile_bounds(ext, qt[part], kt[part])
        q = np.minimum(q0[:, None] + lane, ext.q_len - 1)[:, :, None]  # (n, 64, 1)
        k = np.minimum(k0[:, None] + lane, ext.k_len - 1)[:, None, :]  # (n, 1, 64)
        seen = pattern.contains(ext, b, h, q, k)
        words = pack_bits(np.broadcast_to(seen, (len(q), TILE, TILE)))  # (n, 64)
        codes[part] = pool.codes(words, clip[part])
    return codes[member.reshape(-1)]


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """One int64 per row, equal exactly where all columns are equal."""
    key, span = np.zeros(len(columns[0]), np.int64), 1
    for column in columns:
        column = np.asarray(column, np.int64)
        low, high = int(column.min()), int(column.max())
        if low == high:
            continue
        width = high - low + 1
        if span * width >= 1 << 62:
            key = np.unique(key, return_inverse=True)[1].reshape(-1)
            column = np.unique(column, return_inverse=True)[1].reshape(-1)
            span, low, width = int(key.max()) + 1, 0, int(column.max()) + 1
        key = key * width + (column - low)
        span *= width
    return key
