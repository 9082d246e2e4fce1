"""Every mask of the kernel benchmark against a dense one written from its description, pair by pair."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import pytest
import torch

from foveate.bench.kernels_masks import MASKS, SWEEP, describe, document_lengths, grid_of, neighborhood_grid
from foveate.bench.kernels_peers import boolean_mask

N = 320  # several tiles; 16 x 20 and 5 x 8 x 8 cells


@lru_cache
def documents(n: int) -> list[tuple[int, int]]:
    """(document, place in it) of every token."""
    return [(d, place) for d, length in enumerate(document_lengths(n)) for place in range(length)]


@lru_cache
def ends_of_parts(n: int) -> list[int]:
    """Where the question and each of the four answers end."""
    return list(accumulate([n // 4, *document_lengths(n - n // 4, 4)]))


@lru_cache
def in_prefix(n: int) -> list[bool]:
    """Whether a token is in the first half of its document."""
    return [place < length // 2 for length in document_lengths(n) for place in range(length)]


def allowed(name: str, n: int, i: int, j: int) -> bool:
    """Whether query i sees key j, from the words of the mask."""
    (doc_i, place_i), (doc_j, place_j) = documents(n)[i], documents(n)[j]
    last = documents(n)[-1][0]
    if name == "full":
        return True
    if name == "causal":
        return j <= i
    if name == "sliding_window":
        return -1023 <= j - i <= 1023
    if name == "sliding_window_causal":
        return i - 1023 <= j <= i
    if name == "sliding_window_causal_512":
        return i - 511 <= j <= i
    if name == "document_full":
        return doc_i == doc_j
    if name == "document_causal":
        return doc_i == doc_j and place_j <= place_i
    if name == "share_question":
        part_i, part_j = (sum(x >= end for end in ends_of_parts(n)) for x in (i, j))
        return j <= i and (part_j == 0 or part_i == part_j)
    if name == "blockwise_causal":
        return j <= i and doc_i in (doc_j, last)
    if name == "prefix_lm_causal":
        return j < n // 4 or j <= i
    if name == "prefix_lm_document":
        return doc_i == doc_j and (in_prefix(n)[j] or j <= i)
    if name == "global_sliding":
        return i < 16 or j < 16 or abs(i - j) <= 1023
    if name == "block_causal_document":
        size = max(16, n // 64)
        return doc_i == doc_j and place_j // size <= place_i // size
    raise AssertionError(name)


BY_WORDS = [name for name in SWEEP if not name.startswith(("neighborhood", "random"))]


@pytest.mark.parametrize("name", BY_WORDS)
def test_mask_is_what_its_description_says(name):
    pattern, mask_mod = MASKS[name](N, "cpu")
    want = torch.tensor([[allowed(name, N, i, j) for j in range(N)] for i in range(0, N, 3)])
    assert torch.equal(pattern.layout(N).to_dense()[0, 0][::3], want)
    if mask_mod is not None:
        assert torch.equal(boolean_mask(mask_mod, N, N, "cpu")[::3], want)


@pytest.mark.parametrize(
    "name", ["sliding_window", "sliding_window_causal", "sliding_window_causal_512", "global_sliding"]
)
def test_windows_end_where_they_should(name):
    n = 2200
    pattern, mask_mod = MASKS[name](n, "cpu")
    dense = pattern.layout(n).to_dense()[0, 0]
    rows = (0, 17, 700, 1100, 2199)
    want = torch.tensor([[allowed(name, n, i, j) for j in range(n)] for i in rows])
    assert not want.all(1).all()
    assert torch.equal(dense[list(rows)], want)
    assert torch.equal(boolean_mask(mask_mod, n, n, "cpu"), dense)


@pytest.mark.parametrize("name", ["neighborhood_2d", "neighborhood_3d"])
def test_neighbourhoods_cell_by_cell(name):
    pattern, mask_mod = MASKS[name](N, "cpu")
    shape, window, order = neighborhood_grid(name, N)
    cells = [tuple(c) for c in order.coordinates().T.tolist()]
    assert len(set(cells)) == N

    def near(a: int, b: int, size: int, length: int) -> bool:
        first = min(max(a - size // 2, 0), length - size)  # a window keeps its size at the border
        return first <= b < first + size

    def sees(i: int, j: int) -> bool:
        axes = zip(cells[i], cells[j], window, shape, strict=True)
        return all(near(a, b, size, length) for a, b, size, length in axes)

    want = torch.tensor([[sees(i, j) for j in range(N)] for i in range(N)])
    assert torch.equal(pattern.layout(N).to_dense()[0, 0], want)
    assert torch.equal(boolean_mask(mask_mod, N, N, "cpu"), want)
    size = 1
    for side in window:
        size *= side
    assert (want.sum(1) == size).all()


@pytest.mark.parametrize("density", ["0.05", "0.25", "1"])
def test_random_blocks_are_whole_and_as_dense_as_said(density):
    n = 64 * 40
    pattern, mask_mod = MASKS[f"random_{density}"](n, "cpu")
    dense = pattern.layout(n).to_dense()[0, 0]
    blocks = dense.view(40, 64, 40, 64).float().mean((1, 3))
    assert set(blocks.unique().tolist()) <= {0.0, 1.0}
    assert blocks.diagonal().all()
    off = blocks[~torch.eye(40, dtype=torch.bool)].mean().item()
    assert off == pytest.approx(float(density), abs=0.03)
    assert torch.equal(boolean_mask(mask_mod, n, n, "cpu"), dense)


@pytest.mark.parametrize("n", [64, 331, 1000])
def test_odd_lengths(n):
    for name in SWEEP:
        pattern, mask_mod = MASKS[name](n, "cpu")
        if mask_mod is not None:
            assert torch.equal(boolean_mask(mask_mod, n, n, "cpu"), pattern.layout(n).to_dense()[0, 0]), name


def test_document_lengths_are_seeded_and_sum_up():
    for n in (1, 5, 16, 17, 1000, 8192):
        lengths = document_lengths(n)
        assert sum(lengths) == n
        assert min(lengths) >= 1
        assert len(lengths) == min(16, n)
    assert document_lengths(8192) == document_lengths(8192)
    assert document_lengths(8192) != document_lengths(8192, seed=1)


def test_grids_are_even():
    assert grid_of(4096, 2) == (64, 64)
    assert grid_of(7, 2) == (1, 7)
    assert grid_of(32768, 3) == (32, 32, 32)


def test_every_mask_says_what_it_is():
    for name in MASKS:
        assert len(describe(name)) > 15, name
