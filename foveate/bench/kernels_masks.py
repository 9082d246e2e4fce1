"""The masks of the kernel benchmark, each as a pattern of this library and as a FlexAttention `mask_mod`.

Names and shapes follow the static masks of the long-context attention benchmark (LongCA-bench, 2025; FlashMask, 2024),
with the conventions of this library: `window=w` counts keys, the query's own included. To these come the window of 512
that this project's targets are about, neighbourhoods on grids of two and three axes, blocks kept at random, and
decoding. The `mask_mod` says the same in the way a user of FlexAttention would write it; peers get it, and tests
compare the two.

Document lengths are drawn once per sequence length: see `document_lengths`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from foveate.core.layout import TILE
from foveate.core.patterns import (
    Causal,
    Documents,
    Full,
    GlobalTokens,
    KeyPadding,
    Neighborhood,
    Order,
    Pattern,
    PrefixLM,
    Random,
    Regions,
    SharedQuestion,
    SlidingWindow,
    tile_major,
)

WINDOW = 1024  # keys on one side, the query's own included, as in LongCA-bench
TARGET_WINDOW = 512
GLOBALS = 16
DOCUMENTS = 16
ANSWERS = 4
DENSITIES = (0.05, 0.1, 0.25, 0.5, 1.0)
RANDOM_BLOCK = TILE

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Both = tuple[Pattern, MaskMod | None]
"""A pattern, and the same as `mask_mod(b, h, q_idx, kv_idx)`; None where every pair is allowed."""


def document_lengths(n: int, documents: int = DOCUMENTS, *, seed: int = 0) -> list[int]:
    """Lengths (>= 1, summing to `n`) of packed documents: shares drawn from a log-normal with sigma 1.

    >>> document_lengths(1024)[:4], sum(document_lengths(1024))
    ([67, 52, 111, 66], 1024)
    """
    documents = min(documents, n)
    shares = np.random.default_rng(seed).lognormal(sigma=1.0, size=documents).cumsum()
    ends = np.round(shares / shares[-1] * (n - documents)).astype(int)
    return (np.diff(ends, prepend=0) + 1).tolist()


def grid_of(n: int, axes: int) -> tuple[int, ...]:
    """The most even grid of `n` cells, shorter axes first.

    >>> grid_of(4096, 2), grid_of(8192, 2), grid_of(8192, 3)
    ((64, 64), (64, 128), (16, 16, 32))
    """
    if axes == 1:
        return (n,)
    side = max(d for d in range(1, round(n ** (1 / axes)) + 1) if n % d == 0)
    return side, *grid_of(n // side, axes - 1)


# -------------------------------------------------------------------------------------------- the masks
def full(n: int, device: str) -> Both:
    """Every query sees every key."""
    return Full(), None


def causal(n: int, device: str) -> Both:
    """Every query sees the keys up to its own."""
    return Causal(), lambda b, h, q, k: q >= k


def sliding_window(n: int, device: str) -> Both:
    """Window of 1024 on either side, not causal: keys at a distance of at most 1023."""
    reach = WINDOW - 1
    return SlidingWindow(before=reach, after=reach), lambda b, h, q, k: (q - k).abs() <= reach


def sliding_window_causal(n: int, device: str, *, window: int = WINDOW) -> Both:
    """Window of 1024, causal: the query's own key and the 1023 before it."""
    return Causal() & SlidingWindow(window), lambda b, h, q, k: (q >= k) & (q - k < window)


def sliding_window_causal_512(n: int, device: str) -> Both:
    """Window of 512, causal: the query's own key and the 511 before it."""
    return sliding_window_causal(n, device, window=TARGET_WINDOW)


def document_full(n: int, device: str) -> Both:
    """16 packed documents, lengths log-normal (sigma 1, seed 0): every query sees its whole document."""
    ids = _document_ids(n)
    at = torch.from_numpy(ids).to(device)
    return Documents(ids), lambda b, h, q, k: at[q] == at[k]


def document_causal(n: int, device: str) -> Both:
    """The same 16 documents; every query sees its document up to its own key."""
    ids = _document_ids(n)
    at = torch.from_numpy(ids).to(device)
    return Causal() & Documents(ids), lambda b, h, q, k: (q >= k) & (at[q] == at[k])


def share_question(n: int, device: str) -> Both:
    """A question of a quarter of the tokens, four answers (log-normal lengths): each sees the question and itself,
    causally.
    """
    lengths = [max(1, n // 4), *document_lengths(n - max(1, n // 4), ANSWERS)]
    part = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
    return SharedQuestion(lengths), lambda b, h, q, k: (q >= k) & ((part[q] == part[k]) | (part[k] == 0))


def blockwise_causal(n: int, device: str) -> Both:
    """The same 16 documents as demonstrations, each causal in itself; the last one, the test, sees all before it."""
    ids = _document_ids(n)
    last = int(ids[-1])
    table = np.eye(last + 1, dtype=bool)
    table[last] = True
    at = torch.from_numpy(ids).to(device)
    pattern = Causal() & Regions(ids, table)
    return pattern, lambda b, h, q, k: (q >= k) & ((at[q] == at[k]) | (at[q] == last))


def prefix_lm_causal(n: int, device: str) -> Both:
    """A prefix of a quarter of the tokens that every query sees; causal after it."""
    prefix = n // 4
    return PrefixLM(prefix), lambda b, h, q, k: (q >= k) | (k < prefix)


def prefix_lm_document(n: int, device: str) -> Both:
    """The same 16 documents, each a prefix LM: its first half is seen by all its queries, the rest is causal."""
    lengths = document_lengths(n)
    inside = np.concatenate([np.arange(size) < size // 2 for size in lengths])
    ids = _document_ids(n)
    at, prefix = torch.from_numpy(ids).to(device), torch.from_numpy(inside).to(device)
    pattern = Documents(ids) & (Causal() | KeyPadding(torch.from_numpy(inside)))
    return pattern, lambda b, h, q, k: (at[q] == at[k]) & ((q >= k) | prefix[k])


def global_sliding(n: int, device: str) -> Both:
    """16 leading global tokens, which see and are seen by all, and the window of 1024 on either side."""
    count, reach = min(GLOBALS, n), WINDOW - 1
    pattern = GlobalTokens(count) | SlidingWindow(before=reach, after=reach)
    return pattern, lambda b, h, q, k: ((q - k).abs() <= reach) | (q < count) | (k < count)


def block_causal_document(n: int, device: str) -> Both:
    """The same 16 documents, each cut into blocks of N / 64 tokens (at least 16) from its start: a query sees the
    blocks of its document up to and including its own.
    """
    size = max(16, n // 64)
    lengths = document_lengths(n)
    ids = _document_ids(n)
    within = np.concatenate([np.arange(length) for length in lengths]) // size  # block in the document
    first = np.cumsum([0] + [-(-length // size) for length in lengths[:-1]])
    block = first[ids] + within
    owner = np.repeat(np.arange(len(lengths)), [-(-length // size) for length in lengths])
    number = np.arange(len(owner))
    table = (owner[:, None] == owner[None, :]) & (number[:, None] >= number[None, :])
    at, part = torch.from_numpy(ids).to(device), torch.from_numpy(block).to(device)
    return Regions(block, table), lambda b, h, q, k: (at[q] == at[k]) & (part[q] >= part[k])


def neighborhood_2d(n: int, device: str) -> Both:
    """Neighbourhood of 13 x 13 cells on the most even 2-D grid of N cells (64 x 64 for 4096), in 8 x 8 tile order."""
    return _neighborhood("neighborhood_2d", n, device)


def neighborhood_3d(n: int, device: str) -> Both:
    """Neighbourhood of 7 x 7 x 7 cells on the most even 3-D grid of N cells, in 4 x 4 x 4 tile order."""
    return _neighborhood("neighborhood_3d", n, device)


def random_blocks(n: int, device: str, *, density: float) -> Both:
    """Blocks of 64 x 64 kept at random (seed 0), the same for all heads, and those on the diagonal."""
    pattern = Random(density, block=RANDOM_BLOCK)
    layout = pattern.layout(n)
    kept = torch.zeros(layout.q_tiles, layout.k_tiles, dtype=torch.bool)
    kept[layout.rows, layout.tile_idx.long()] = True
    kept = kept.to(device)
    return pattern, lambda b, h, q, k: kept[q // RANDOM_BLOCK, k // RANDOM_BLOCK]


def decode(n: int, device: str) -> Both:
    """One query over N keys."""
    return full(n, device)


def neighborhood_grid(name: str, n: int) -> tuple[tuple[int, ...], tuple[int, ...], Order]:
    """(grid, window, token order) of `neighborhood_2d` or `neighborhood_3d` on `n` tokens."""
    axes, window, tile = (2, 13, 8) if name == "neighborhood_2d" else (3, 7, 4)
    shape = grid_of(n, axes)
    order = tile_major(shape, tuple(min(tile, side) for side in shape))
    return shape, tuple(min(window, side) for side in shape), order


def _neighborhood(name: str, n: int, device: str) -> Both:
    shape, windows, order = neighborhood_grid(name, n)
    place = torch.from_numpy(order.coordinates())  # (axes, n)
    size = torch.tensor(windows)[:, None]
    start = (place - size // 2).clamp(min=0).minimum(torch.tensor(shape)[:, None] - size)
    low, high, at = start.to(device), (start + size).to(device), place.to(device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (at[0][k] >= low[0][q]) & (at[0][k] < high[0][q])
        for axis in range(1, len(shape)):
            seen = seen & (at[axis][k] >= low[axis][q]) & (at[axis][k] < high[axis][q])
        return seen

    return Neighborhood(shape, windows, order=order), mask_mod


def _document_ids(n: int) -> np.ndarray:
    lengths = document_lengths(n)
    return np.repeat(np.arange(len(lengths)), lengths)


MASKS: dict[str, Callable[[int, str], Both]] = {
    build.__name__: build
    for build in (
        full, causal, sliding_window, sliding_window_causal, sliding_window_causal_512, document_full,
        document_causal, share_question, blockwise_causal, prefix_lm_causal, prefix_lm_document, global_sliding,
        block_causal_document, neighborhood_2d, neighborhood_3d,
    )
} | {f"random_{d:g}": partial(random_blocks, density=d) for d in DENSITIES} | {"decode": decode}  # fmt: skip
"""Every mask by name: `MASKS[name](n, device)` gives the pattern and the `mask_mod` on `n` tokens."""

SWEEP = tuple(name for name in MASKS if name != "decode")
"""The masks that are measured when none is named: all but decoding."""


def describe(name: str) -> str:
    """What a mask is, in one line.

    >>> describe("causal")
    'Every query sees the keys up to its own.'
    >>> describe("random_0.25")
    'Blocks of 64 x 64 kept at random (seed 0), the same for all heads, and those on the diagonal. Density 0.25.'
    """
    build = MASKS[name]
    if isinstance(build, partial):
        return f"{_told(build.func)} Density {build.keywords['density']:g}."
    return _told(build)


def _told(build: Callable) -> str:
    return " ".join((build.__doc__ or "").split())
