"""BlockLayout: all that an engine sees of *who may look at whom*.

The (query, key) plane is cut into square tiles of `TILE` = 64. For every (batch, head, query tile) the layout lists the
key tiles that hold at least one allowed pair (compressed sparse rows) and for each of them an id: 0 means that every
pair of the tile is allowed, n >= 1 names the n-th bitmap of a small *tile dictionary*. Equal bitmaps are stored once -
causal attention needs one, a sliding window two - so any mask is exact and compact and nothing is ever N x N.

One row of a bitmap is 64 keys and therefore one 64-bit word; this is why the tile size is fixed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 64
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
DENSE_LIMIT = 1 << 28  # elements that to_dense() produces without being told to


def tiles(length: int) -> int:
    """Number of tiles that cover `length` positions."""
    return -(-length // TILE)


def tail_word(length: int) -> np.uint64:
    """The 64-bit word whose bits are the in-range columns of the last key tile."""
    rest = length % TILE
    return _ALL if rest == 0 else np.uint64((1 << rest) - 1)


def pack_bits(bits: np.ndarray) -> np.ndarray:
    """Bool (..., 64) -> int64 (...): bit c of the word is column c."""
    packed = np.packbits(np.ascontiguousarray(bits), axis=-1, bitorder="little")
    return packed.view("<i8")[..., 0].astype(np.int64, copy=False)


def unpack_bits(words: np.ndarray) -> np.ndarray:
    """int64 (...) -> bool (..., 64), the inverse of `pack_bits`."""
    as_bytes = np.ascontiguousarray(words.astype("<i8", copy=False)).view(np.uint8).reshape(*words.shape, 8)
    return np.unpackbits(as_bytes, axis=-1, bitorder="little").astype(bool)


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """An exact, immutable set of allowed (query, key) pairs, as tiles with a dictionary.

    Attributes:
        q_len, k_len: lengths N and M of the plane.
        batch, heads: leading sizes; 1 broadcasts.
        row_ptr: int64 (batch * heads * q_tiles + 1,), where each (batch, head, query tile) row starts in `tile_idx`.
        tile_idx: int32 (nnz,), key tile numbers, strictly ascending within a row.
        tile_id: int32 (nnz,), 0 = every in-range pair allowed, n >= 1 = `dictionary[n - 1]`.
        dictionary: int64 (n, 64), bit c of word r: row r of the tile may attend to its key column c.

    Raises:
        ValueError, TypeError: on construction, when the arrays contradict each other.

    Layouts made by this library are *canonical* (no empty tile listed, full tiles have id 0, no bit out of range, no
    bitmap twice or unused), so equal sets have equal arrays; `==` compares them.

    >>> import torch
    >>> layout = BlockLayout.from_mask(torch.ones(100, 100, dtype=torch.bool).tril())
    >>> layout.nnz, len(layout.dictionary), layout.area
    (3, 2, 5050)
    """

    q_len: int
    k_len: int
    row_ptr: Tensor
    tile_idx: Tensor
    tile_id: Tensor
    dictionary: Tensor
    batch: int = 1
    heads: int = 1
    checked: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("q_len", "k_len", "batch", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"BlockLayout.{name} must be a positive int, got {getattr(self, name)!r}")
        wanted = {
            "row_ptr": torch.int64,
            "tile_idx": torch.int32,
            "tile_id": torch.int32,
            "dictionary": torch.int64,
        }
        for name, dtype in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype or not value.is_contiguous():
                got = f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"BlockLayout.{name} must be a contiguous {dtype} tensor, got {got}")
        if not self.checked:
            self._validate()
            object.__setattr__(self, "checked", True)

    def _validate(self) -> None:
        rows = self.batch * self.heads * self.q_tiles
        ptr, idx, ids = (t.detach().cpu().numpy() for t in (self.row_ptr, self.tile_idx, self.tile_id))
        if ptr.shape != (rows + 1,):
            raise ValueError(f"BlockLayout.row_ptr must have {rows + 1} entries, got shape {ptr.shape}")
        if idx.ndim != 1 or idx.shape != ids.shape:
            raise ValueError(
                f"BlockLayout.tile_idx and tile_id must be 1-D and equal in length, got {idx.shape}, {ids.shape}"
            )
        if self.dictionary.ndim != 2 or self.dictionary.shape[1] != TILE:
            raise ValueError(
                f"BlockLayout.dictionary must have shape (n, {TILE}), got {tuple(self.dictionary.shape)}"
            )
        if ptr[0] != 0 or ptr[-1] != len(idx) or (np.diff(ptr) < 0).any():
            raise ValueError("BlockLayout.row_ptr must rise from 0 to len(tile_idx)")
        if len(idx):
            if idx.min() < 0 or idx.max() >= self.k_tiles:
                raise ValueError(f"BlockLayout.tile_idx must lie in [0, {self.k_tiles})")
            if ids.min() < 0 or ids.max() > len(self.dictionary):
                raise ValueError(f"BlockLayout.tile_id must lie in [0, {len(self.dictionary)}]")
            rising = np.diff(idx) > 0
            rising[ptr[1:-1][(ptr[1:-1] > 0) & (ptr[1:-1] < len(idx))] - 1] = (
                True  # a new row may start lower
            )
            if not rising.all():
                raise ValueError("BlockLayout.tile_idx must be strictly ascending within each row")

    # ------------------------------------------------------------------ sizes
    @property
    def q_tiles(self) -> int:
        return tiles(self.q_len)

    @property
    def k_tiles(self) -> int:
        return tiles(self.k_len)

    @property
    def nnz(self) -> int:
        """Number of listed tiles."""
        return self.tile_idx.shape[0]

    @property
    def device(self) -> torch.device:
        return self.row_ptr.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.row_ptr, self.tile_idx, self.tile_id, self.dictionary))

    @cached_property
    def rows(self) -> Tensor:
        """int64 (nnz,): which row of `row_ptr` each listed tile belongs to."""
        return torch.repeat_interleave(self.row_ptr.diff())

    @cached_property
    def row_area(self) -> Tensor:
        """int64 (batch, heads, q_tiles): allowed pairs per row of tiles."""
        words = self.dictionary.cpu().numpy()
        ones = unpack_bits(words).sum(axis=(1, 2)).astype(np.int64) if len(words) else np.zeros(0, np.int64)
        rows = self.rows.cpu().numpy()
        ids, idx = self.tile_id.cpu().numpy(), self.tile_idx.cpu().numpy()
        height = np.minimum(TILE, self.q_len - TILE * (rows % self.q_tiles))
        width = np.minimum(TILE, self.k_len - TILE * idx.astype(np.int64))
        area = height * width
        partial = ids > 0
        area[partial] = ones[ids[partial] - 1]
        total = np.bincount(rows, weights=area, minlength=self.batch * self.heads * self.q_tiles)
        return torch.from_numpy(total.astype(np.int64)).view(self.batch, self.heads, self.q_tiles)

    @cached_property
    def area(self) -> int:
        """Allowed pairs, summed over the layout's own batch and heads."""
        return int(self.row_area.sum())

    @property
    def density(self) -> float:
        """Share of all pairs that are allowed."""
        return self.area / (self.batch * self.heads * self.q_len * self.k_len)

    # ------------------------------------------------------------- conversions
    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        if torch.device(device) == self.device:
            return self
        return self._with(
            *(t.to(device) for t in (self.row_ptr, self.tile_idx, self.tile_id, self.dictionary))
        )

    def _with(self, row_ptr: Tensor, tile_idx: Tensor, tile_id: Tensor, dictionary: Tensor) -> BlockLayout:
        return BlockLayout(
            self.q_len,
            self.k_len,
            row_ptr,
            tile_idx,
            tile_id,
            dictionary,
            self.batch,
            self.heads,
            checked=True,
        )

    def to_dense(self, *, limit: int = DENSE_LIMIT) -> Tensor:
        """Bool (batch, heads, q_len, k_len), True = may attend. Refuses above `limit` elements."""
        size = self.batch * self.heads * self.q_len * self.k_len
        if size > limit:
            raise ValueError(
                f"to_dense() would allocate {size} elements; the limit is {limit}. Pass limit= to allow it."
            )
        nq, nk = self.q_tiles, self.k_tiles
        out = np.zeros((self.batch * self.heads * nq, nk, TILE, TILE), dtype=bool)
        bitmaps = np.concatenate([np.ones((1, TILE, TILE), bool), unpack_bits(self.dictionary.cpu().numpy())])
        out[self.rows.cpu().numpy(), self.tile_idx.cpu().numpy()] = bitmaps[self.tile_id.cpu().numpy()]
        full = out.reshape(self.batch, self.heads, nq, nk, TILE, TILE).transpose(0, 1, 2, 4, 3, 5)
        full = full.reshape(self.batch, self.heads, nq * TILE, nk * TILE)[:, :, : self.q_len, : self.k_len]
        return torch.from_numpy(np.ascontiguousarray(full)).to(self.device)

    @staticmethod
    def from_mask(mask: Tensor) -> BlockLayout:
        """The exact layout of a bool tensor (N, M), (H, N, M) or (B, H, N, M); True = may attend."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim not in (2, 3, 4):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor of 2, 3 or 4 dimensions, got {got}")
        if 0 in mask.shape:
            raise ValueError(f"mask must not have an empty dimension, got shape {tuple(mask.shape)}")
        dense = mask.detach().cpu().numpy()
        dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
        batch, heads, n, m = (int(size) for size in dense.shape)
        nq, nk = tiles(n), tiles(m)
        rows_parts, idx_parts, word_parts = [], [], []
        for b in range(batch):
            for h in range(heads):
                for i in range(nq):
                    strip = np.zeros((TILE, nk * TILE), dtype=bool)
                    piece = dense[b, h, i * TILE : (i + 1) * TILE]
                    strip[: piece.shape[0], :m] = piece
                    words = pack_bits(strip.reshape(TILE, nk, TILE)).T  # (nk, 64)
                    seen = np.flatnonzero(words.any(axis=1))
                    idx_parts.append(seen)
                    word_parts.append(words[seen])
                    rows_parts.append(np.full(len(seen), (b * heads + h) * nq + i, dtype=np.int64))
        return BlockLayout.from_tiles(
            n,
            m,
            np.concatenate(rows_parts),
            np.concatenate(idx_parts),
            np.concatenate(word_parts),
            batch=batch,
            heads=heads,
        ).to(mask.device)

    @staticmethod
    def from_tiles(
        q_len: int,
        k_len: int,
        rows: np.ndarray,
        idx: np.ndarray,
        words: np.ndarray,
        *,
        batch: int = 1,
        heads: int = 1,
        which: np.ndarray | None = None,
    ) -> BlockLayout:
        """Canonical layout from tiles sorted by (row, key tile).

        Args:
            rows: int64 (nnz,), (b * heads + h) * q_tiles + query tile.
            idx: int (nnz,), key tile.
            words: int64 (n, 64) bitmaps; bits out of range are ignored.
            which: int (nnz,), the bitmap of each tile (-1 = full); default: bitmap i belongs to tile i.
        """
        nq, nk = tiles(q_len), tiles(k_len)
        rows, idx = np.asarray(rows, np.int64), np.asarray(idx, np.int64)
        which = np.arange(len(rows)) if which is None else np.asarray(which, np.int64)
        words = np.asarray(words, np.int64).reshape(-1, TILE)
        # 1. the clip class of each tile: inner, ragged bottom, ragged right, corner
        clip = ((rows % nq == nq - 1) & (q_len % TILE != 0)).astype(np.int64)
        clip += 2 * ((idx == nk - 1) & (k_len % TILE != 0))
        # 2. clip each (bitmap, class) pair once
        pair, inverse = np.unique(which * 4 + clip, return_inverse=True)
        pair_word, pair_clip = pair >> 2, pair & 3
        table = np.full((len(pair), TILE), -1, dtype=np.int64)
        if len(words):
            table[pair_word >= 0] = words[pair_word[pair_word >= 0]]
        bounds = np.full((4, TILE), -1, dtype=np.int64)
        bounds[1, q_len % TILE :] = 0
        bounds[2] = tail_word(k_len).astype(np.int64)
        bounds[3] = bounds[1] & bounds[2]
        table &= bounds[pair_clip]
        full = np.all(table == bounds[pair_clip], axis=1)
        empty = np.logical_not(table.any(axis=1))
        # 3. number the distinct partial bitmaps, in the order of their content
        partial = np.flatnonzero(~full & ~empty)
        dictionary, number = (
            np.unique(table[partial], axis=0, return_inverse=True) if len(partial) else (table[:0], partial)
        )
        code = np.zeros(len(pair), dtype=np.int64)
        code[partial] = number.reshape(-1) + 1
        keep = ~empty[inverse]
        ids = code[inverse][keep]
        rows, idx = rows[keep], idx[keep]
        row_ptr = np.zeros(batch * heads * nq + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=batch * heads * nq), out=row_ptr[1:])
        return BlockLayout(
            q_len,
            k_len,
            torch.from_numpy(row_ptr),
            torch.from_numpy(idx.astype(np.int32)),
            torch.from_numpy(ids.astype(np.int32)),
            torch.from_numpy(np.ascontiguousarray(dictionary)),
            batch,
            heads,
            checked=True,
        )

    @staticmethod
    def from_blocks(
        blocks: Tensor, q_len: int, k_len: int, *, block: int = TILE, causal: bool = False
    ) -> BlockLayout:
        """Layout of a block map.

        Args:
            blocks: bool (nq, nk), (H, nq, nk) or (B, H, nq, nk); block (i, j) covers queries [i*block, (i+1)*block) and
                keys [j*block, (j+1)*block).
            block: block size, a multiple of 64.
            causal: also require key <= query, bottom-right aligned (the last query sees the last key).
        """
        if block < TILE or block % TILE:
            raise ValueError(f"block must be a positive multiple of {TILE}, got {block}")
        if blocks.dtype != torch.bool or blocks.ndim not in (2, 3, 4):
            raise TypeError(
                f"blocks must be a bool tensor of 2 to 4 dimensions, got {blocks.dtype} {tuple(blocks.shape)}"
            )
        wanted = (-(-q_len // block), -(-k_len // block))
        if tuple(blocks.shape[-2:]) != wanted:
            raise ValueError(
                f"blocks must end in {wanted} for block={block}, got shape {tuple(blocks.shape)}"
            )
        grid = blocks.detach().cpu().numpy()
        batch, heads = (int(size) for size in (1, 1, *grid.shape)[-4:-2])
        grid = grid.reshape(batch, heads, *grid.shape[-2:])
        nq, nk, times = tiles(q_len), tiles(k_len), block // TILE
        grid = grid.repeat(times, axis=2).repeat(times, axis=3)[:, :, :nq, :nk]
        which = np.broadcast_to(np.int64(-1), (nq, nk))
        words = np.zeros((0, TILE), np.int64)
        if causal:
            # tile (i, j) holds q + offset >= k  <=>  r - c >= 64 (j - i) - offset
            shift = TILE * (np.arange(nk)[None, :] - np.arange(nq)[:, None]) - (k_len - q_len)
            r, c = np.arange(TILE)[:, None], np.arange(TILE)[None, :]
            shifts = np.unique(shift[(shift > -(TILE - 1)) & (shift < TILE)])
            words = pack_bits(r - c >= shifts[:, None, None]) if len(shifts) else words
            which = np.where(shift <= -(TILE - 1), -1, -2)
            if len(shifts):
                inside = (shift > -(TILE - 1)) & (shift < TILE)
                which[inside] = np.searchsorted(shifts, shift[inside])
            grid = grid & (which != -2)
        b, h, i, j = np.nonzero(grid)
        return BlockLayout.from_tiles(
            q_len, k_len, (b * heads + h) * nq + i, j, words, batch=batch, heads=heads, which=which[i, j]
        ).to(blocks.device)

    # ------------------------------------------------------------- set algebra
    def _tiles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sort keys row * k_tiles + tile, ids, bitmaps with the full one first) as numpy arrays."""
        keys = self.rows.cpu().numpy() * self.k_tiles + self.tile_idx.cpu().numpy()
        table = np.concatenate([np.full((1, TILE), -1, np.int64), self.dictionary.cpu().numpy()])
        return keys, self.tile_id.cpu().numpy(), table

    def expand(self, batch: int, heads: int) -> BlockLayout:
        """The same set with its broadcast axes made explicit."""
        if (batch, heads) == (self.batch, self.heads):
            return self
        if self.batch not in (1, batch) or self.heads not in (1, heads):
            raise ValueError(
                f"a layout of batch {self.batch} and heads {self.heads} does not expand to {batch} and {heads}"
            )
        source = (
            torch.arange(self.batch * self.heads)
            .view(self.batch, self.heads)
            .expand(batch, heads)
            .reshape(-1)
        )
        counts = self.row_ptr.diff().cpu().view(-1, self.q_tiles)[source].reshape(-1)
        row_ptr = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=row_ptr[1:])
        starts = self.row_ptr[:-1].cpu().view(-1, self.q_tiles)[source].reshape(-1)
        take = torch.arange(int(row_ptr[-1])) + torch.repeat_interleave(starts - row_ptr[:-1], counts)
        take = take.to(self.device)
        return BlockLayout(
            self.q_len,
            self.k_len,
            row_ptr.to(self.device),
            self.tile_idx[take],
            self.tile_id[take],
            self.dictionary,
            batch,
            heads,
            checked=True,
        )

    def _combine(self, other: BlockLayout, union: bool) -> BlockLayout:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if (self.q_len, self.k_len) != (other.q_len, other.k_len):
            raise ValueError(
                f"layouts of {self.q_len} x {self.k_len} and {other.q_len} x {other.k_len} do not combine"
            )
        batch, heads = max(self.batch, other.batch), max(self.heads, other.heads)
        a, b = self.expand(batch, heads), other.expand(batch, heads)
        (ka, ia, ta), (kb, ib, tb) = a._tiles(), b._tiles()
        keys = np.union1d(ka, kb) if union else np.intersect1d(ka, kb)
        missing = len(ta) + len(tb)  # both tables joined, then one empty bitmap
        table = np.concatenate([ta, tb, np.zeros((1, TILE), np.int64)])
        left, right = np.full(len(keys), missing), np.full(len(keys), missing)
        at, found = _lookup(ka, keys)
        left[found] = ia[at[found]]
        at, found = _lookup(kb, keys)
        right[found] = ib[at[found]] + len(ta)
        pair, which = np.unique(left * (missing + 1) + right, return_inverse=True)
        first, second = table[pair // (missing + 1)], table[pair % (missing + 1)]
        words = first | second if union else first & second
        return BlockLayout.from_tiles(
            self.q_len,
            self.k_len,
            keys // self.k_tiles,
            keys % self.k_tiles,
            words,
            batch=batch,
            heads=heads,
            which=which.reshape(-1),
        ).to(self.device)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        return self._combine(other, union=False)

    def __or__(self, other: BlockLayout) -> BlockLayout:
        return self._combine(other, union=True)

    def __invert__(self) -> BlockLayout:
        """The complement: lists every tile that is not full, so it is as large as the plane has tiles."""
        total = self.batch * self.heads * self.q_tiles * self.k_tiles
        if total > 1 << 26:
            raise ValueError(f"the complement would list up to {total} tiles; complement the pattern instead")
        keys, ids, table = self._tiles()
        which = np.full(total, len(table))
        which[keys] = ids
        words = ~np.concatenate([table, np.zeros((1, TILE), np.int64)])
        every = np.arange(total)
        return BlockLayout.from_tiles(
            self.q_len,
            self.k_len,
            every // self.k_tiles,
            every % self.k_tiles,
            words,
            batch=self.batch,
            heads=self.heads,
            which=which,
        ).to(self.device)

    def __repr__(self) -> str:
        lead = "".join(f", {n}={getattr(self, n)}" for n in ("batch", "heads") if getattr(self, n) != 1)
        return (
            f"BlockLayout({self.q_len} x {self.k_len}{lead}, {self.nnz} tiles, {len(self.dictionary)} bitmaps, "
            f"density {self.density:.4g})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        mine = (self.q_len, self.k_len, self.batch, self.heads)
        theirs = (other.q_len, other.k_len, other.batch, other.heads)
        return mine == theirs and all(
            torch.equal(getattr(self, name).cpu(), getattr(other, name).cpu())
            for name in ("row_ptr", "tile_idx", "tile_id", "dictionary")
        )

    __hash__ = object.__hash__

    # -------------------------------------------------------------- exchange
    def to_flex(self) -> BlockMask:
        """A torch `BlockMask` whose mask_mod reads the same dictionary, so one compilation serves all masks."""
        from foveate.core.engines.flex import to_flex

        return to_flex(self)

    @staticmethod
    def from_flex(block_mask: BlockMask) -> BlockLayout:
        """The exact layout of a torch `BlockMask` (its mask_mod is evaluated on the partial blocks)."""
        from foveate.core.engines.flex import from_flex

        return from_flex(block_mask)

    def plot(self, **options):
        """Draw the tiles; see `foveate.core.patterns.plot.plot_layout`."""
        from foveate.core.patterns.plot import plot_layout

        return plot_layout(self, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout as safetensors (to a temporary file, then renamed)."""
        from safetensors.torch import save_file

        path = Path(path)
        meta = {name: str(getattr(self, name)) for name in ("q_len", "k_len", "batch", "heads")}
        arrays = {
            name: getattr(self, name).cpu() for name in ("row_ptr", "tile_idx", "tile_id", "dictionary")
        }
        temporary = path.with_name(path.name + ".tmp")
        save_file(arrays, temporary, metadata={"format": "foveate.BlockLayout/1", **meta})
        os.replace(temporary, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> BlockLayout:
        """Read a layout written by `save`; everything in the file is validated."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != "foveate.BlockLayout/1":
                raise ValueError(f"{path} is not a saved BlockLayout (format {meta.get('format')!r})")
            arrays = {
                name: file.get_tensor(name) for name in ("row_ptr", "tile_idx", "tile_id", "dictionary")
            }
        sizes = {name: int(meta[name]) for name in ("q_len", "k_len", "batch", "heads")}
        return BlockLayout(**sizes, **arrays)


def _lookup(haystack: np.ndarray, needles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `needles` in the sorted `haystack`, and whether each was found."""
    at = np.searchsorted(haystack, needles)
    found = at < len(haystack)
    found[found] = haystack[at[found]] == needles[found]
    return at, found
