"""Layouts in which every key is seen by a run of queries."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout, pack_bits, tiles


def interval_layout(enter: Tensor, leave: Tensor, q_len: int, heads: int) -> BlockLayout:
    """Layout in which query r sees key s when enter[s] <= r < leave[s].

    Args:
        enter, leave: int64 (B, Hkv, M), within [0, q_len]; a key with leave <= enter is seen by nobody.
        q_len: queries; heads: query heads, a multiple of Hkv.

    Memory: B Hkv q_len M / 64 bytes; meant for the short lengths of gathered attention.

    >>> interval_layout(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[3, 2, 3]]]), 3, 1).to_dense()[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    batch, kv_heads, slots = enter.shape
    nq, nk = tiles(q_len), tiles(slots)
    both = np.zeros((2, batch, kv_heads, nk * TILE), np.int64)
    both[..., :slots] = torch.stack([enter, leave]).cpu().numpy()
    lo, hi = both.reshape(2, batch, kv_heads, 1, nk, TILE)  # (B, Hkv, 1, nk, 64)
    top = np.arange(nq)[:, None] * TILE
    some = ((lo < top[..., None] + TILE) & (hi > np.maximum(lo, top[..., None]))).any(-1)  # (B, Hkv, nq, nk)
    rest = slots - np.arange(nk)[:, None] * TILE <= np.arange(TILE)  # slots beyond the last
    full = (((lo <= top[..., None]) & (hi >= np.minimum(top[..., None] + TILE, q_len))) | rest).all(-1)
    b, h, i, j = np.nonzero(some & ~full)
    r = (i[:, None] * TILE + np.arange(TILE))[:, :, None]  # (partial tiles, 64, 1)
    words = pack_bits((lo[b, h, 0, j][:, None] <= r) & (r < hi[b, h, 0, j][:, None]))
    number = np.where(some, -1, -2)  # of the bitmap; -2: no pair
    number[b, h, i, j] = np.arange(len(words))
    number = number.repeat(heads // kv_heads, 1).reshape(batch * heads * nq, nk)
    rows, columns = np.nonzero(number > -2)
    made = BlockLayout.from_tiles(
        q_len, slots, rows, columns, words, batch=batch, heads=heads, which=number[rows, columns]
    )
    return made.to(enter.device)
