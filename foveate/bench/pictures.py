"""Small PNG pictures of layouts, drawn from the tiles alone (no N x N, no plotting library)."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

from foveate.core.layout import TILE, BlockLayout, unpack_bits

CELLS = 256
"""A picture has at most about this many cells per side."""


def coverage(layout: BlockLayout) -> np.ndarray:
    """Share of allowed pairs in each cell of a square grid over the plane, (cells, cells) in 0..1.

    Cells are 64 / s positions wide, s a power of two with about `CELLS` cells per side; longer layouts get
    cells of several tiles. Averaged over the layout's batch rows and heads.

    >>> import torch
    >>> grid = coverage(BlockLayout.from_mask(torch.ones(128, 128, dtype=torch.bool).tril()))
    >>> grid.shape, float(grid[0, -1]), float(grid[-1, 0])
    ((128, 128), 0.0, 1.0)
    """
    nq, nk = layout.q_tiles, layout.k_tiles
    sub = TILE
    while sub > 1 and max(nq, nk) * sub > CELLS:
        sub //= 2
    words = layout.dictionary.cpu().numpy()
    bitmaps = np.concatenate([np.ones((1, TILE, TILE), bool), unpack_bits(words)])  # (1 + n, 64, 64)
    step = TILE // sub
    small = bitmaps.reshape(-1, sub, step, sub, step).mean((2, 4), dtype=np.float32)  # (1 + n, sub, sub)
    rows = layout.rows.cpu().numpy()
    i, j, which = rows % nq, layout.tile_idx.cpu().numpy(), layout.tile_id.cpu().numpy()
    grid = np.zeros((nq, nk, sub, sub), np.float32)
    np.add.at(grid, (i, j), small[which])
    grid = grid.transpose(0, 2, 1, 3).reshape(nq * sub, nk * sub) / (layout.batch * layout.heads)
    fold = -(-max(nq, nk) // CELLS) if sub == 1 else 1
    if fold > 1:
        pad = [(0, -grid.shape[0] % fold), (0, -grid.shape[1] % fold)]
        grid = np.pad(grid, pad)
        grid = grid.reshape(grid.shape[0] // fold, fold, grid.shape[1] // fold, fold).mean((1, 3))
    return np.clip(grid, 0.0, 1.0)


def png(grid: np.ndarray, rgb: tuple[int, int, int]) -> bytes:
    """One colour, opacity from the grid in 16 steps: a palette PNG that sits on light and dark pages alike.

    >>> png(np.ones((2, 2)), (255, 0, 0))[:4]
    b'\\x89PNG'
    """
    height, width = grid.shape
    # a single allowed pair in a cell must not vanish: the square root lifts thin lines
    level = np.ceil(np.sqrt(grid) * 15).astype(np.uint8)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    lines = np.concatenate([np.zeros((height, 1), np.uint8), level], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    alpha = bytes(round(255 * step / 15) for step in range(16))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"PLTE", bytes(rgb) * 16)
        + chunk(b"tRNS", alpha)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def data_uri(layouts: list[BlockLayout], colour: str) -> str:
    """``data:image/png;base64,...`` of layouts of one size, averaged, in a ``#rrggbb`` colour."""
    grid = np.mean([coverage(layout) for layout in layouts], axis=0)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "data:image/png;base64," + base64.b64encode(png(grid, (red, green, blue))).decode("ascii")
