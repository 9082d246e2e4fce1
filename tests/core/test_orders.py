"""Token orders: permutations, their inverses, and the curves' own properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.patterns import Neighborhood, Order, Windows, hilbert, morton, row_major, tile_major

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


def every(shape, tile):
    return row_major(shape), hilbert(shape), morton(shape), tile_major(shape, tile)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 4))
def test_permutations_and_inverses(shape, tile):
    for order in every(shape, tile):
        n = int(np.prod(shape))
        assert order.size == n
        assert sorted(order.permutation.tolist()) == list(range(n))
        assert torch.equal(order.permutation[order.inverse], torch.arange(n))
        assert torch.equal(order.inverse[order.permutation], torch.arange(n))
        x = torch.randn(2, n, 3)
        assert torch.equal(order.undo(order.apply(x)), x)
        assert torch.equal(order.apply(x), x[:, order.permutation])
        assert torch.equal(order.apply(x.transpose(0, 1), 0), x[:, order.permutation].transpose(0, 1))
        cells = torch.from_numpy(order.coordinates())
        back = sum(c * int(np.prod(shape[a + 1 :])) for a, c in enumerate(cells))
        assert torch.equal(back, order.permutation)


@pytest.mark.parametrize("shape", [(2,), (8, 8), (32, 32), (4, 4, 4), (16, 16, 16)])
def test_hilbert_neighbours_touch(shape):
    steps = np.abs(np.diff(hilbert(shape).coordinates(), axis=1)).sum(axis=0)
    assert (steps == 1).all()


def test_hilbert_keeps_aligned_squares_together():
    """64 aligned cells of an 8 x 8 square are 64 consecutive indices: a square is a tile."""
    squares = hilbert((32, 32)).coordinates() // 8
    assert (squares.reshape(2, 16, 64) == squares.reshape(2, 16, 64)[:, :, :1]).all()


def test_morton_by_hand():
    def code(y, x):
        return sum(((x >> b & 1) << 2 * b) | ((y >> b & 1) << 2 * b + 1) for b in range(4))

    for shape in ((8, 8), (5, 3), (2, 9)):
        want = sorted((code(y, x), y * shape[1] + x) for y in range(shape[0]) for x in range(shape[1]))
        assert morton(shape).permutation.tolist() == [cell for _, cell in want]


def test_tile_major_by_hand():
    shape, tile = (5, 7), (2, 3)
    want = [
        y * 7 + x
        for ty in range(0, 5, 2)
        for tx in range(0, 7, 3)
        for y in range(ty, min(ty + 2, 5))
        for x in range(tx, min(tx + 3, 7))
    ]
    assert tile_major(shape, tile).permutation.tolist() == want


def test_order_is_part_of_the_pattern():
    """A pattern in another order is the row-major one with rows and columns permuted."""
    shape = (9, 14)
    plain = Neighborhood(shape, (3, 5)).layout(126).to_dense()[0, 0]
    for order in every(shape, (4, 4)):
        moved = Neighborhood(shape, (3, 5), order=order).layout(126).to_dense()[0, 0]
        p = order.permutation
        assert torch.equal(moved, plain[p][:, p])
    assert Neighborhood(shape, 3, order="hilbert") == Neighborhood(shape, (3, 3), order=hilbert(shape))


def test_window_major_order_makes_full_tiles():
    windows = Windows((64, 64), 8, order=tile_major((64, 64), 8)).layout(4096)
    assert len(windows.dictionary) == 0
    assert windows.nnz == 64


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Order("spiral", (2,)), "row_major, tile_major, hilbert, morton.*spiral"),
        (lambda: Order("tile_major", (2,)), "tile"),
        (lambda: Order("hilbert", (2,), (1,)), "tile"),
        (lambda: tile_major((4, 4), (2, 2, 2)), "tile must be one int or 2"),
        (lambda: row_major(()), "shape"),
        (lambda: row_major((0, 3)), "shape must be an int >= 1, got 0"),
        (lambda: row_major((2, 3)).apply(torch.zeros(1, 5, 1)), "6 tokens.*got 5"),
        (lambda: Windows((4, 4), 2, order="tile_major"), "order must be"),
        (lambda: Windows((4, 4), 2, order=hilbert((4, 5))), "order must be of grid"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="order"):
        Windows((4, 4), 2, order=3)
    with pytest.raises(TypeError, match="shape"):
        row_major((2.5,))
