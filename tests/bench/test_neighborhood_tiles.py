"""The tile simulator of neighbourhoods against tiles counted on dense masks and on layouts."""

from __future__ import annotations

import math
import random

import pytest
import torch

from foveate.bench.neighborhood_tiles import simulate, strides
from foveate.patterns import Neighborhood, tile_major


def touched(pattern: Neighborhood, tile_q, tile_k) -> int:
    """Pairs of tiles that hold an allowed pair, counted on the dense mask."""
    shape = pattern.shape
    dense = pattern.layout(math.prod(shape)).to_dense()[0, 0]
    place = torch.from_numpy(pattern.order.coordinates())
    tiles = [[tuple(c // t for c, t in zip(cell, tile, strict=True)) for cell in place.T.tolist()]
             for tile in (tile_q, tile_k)]  # fmt: skip
    return len({(tiles[0][i], tiles[1][j]) for i, j in dense.nonzero().tolist()})


def drawn(count: int):
    rng = random.Random(1)
    for i in range(count):
        axes = 1 + i % 3
        shape = tuple(rng.randint(2, (40, 12, 6)[axes - 1]) for _ in range(axes))
        window = tuple(rng.randint(1, n) for n in shape)
        stride = tuple(rng.randint(1, k) for k in window)
        causal = tuple(rng.random() < 0.3 for _ in shape)
        tiles = [tuple(rng.randint(1, min(5, n)) for n in shape) for _ in range(2)]
        yield Neighborhood(shape, window, stride, causal=causal), *tiles


def test_visited_tiles_are_those_that_the_mask_touches():
    for pattern, tile_q, tile_k in drawn(120):
        report = simulate(pattern, tile_q, tile_k)
        assert report.visited == touched(pattern, tile_q, tile_k), (pattern, tile_q, tile_k)
        n = math.prod(pattern.shape)
        cut = [
            math.prod(math.ceil(x / t) for x, t in zip(pattern.shape, tile, strict=True))
            for tile in (tile_q, tile_k)
        ]
        assert report.dense == cut[0] * cut[1]
        assert report.flop_bound == pytest.approx(n * n / pattern.layout(n).area)
        if not any(n % t for tile in (tile_q, tile_k) for n, t in zip(pattern.shape, tile, strict=True)):
            assert 1 <= report.bound <= report.flop_bound * (1 + 1e-12)


@pytest.mark.parametrize(
    ("shape", "window", "tile"),
    [((64, 64), 24, 8), ((16, 24), (7, 16), 8), ((8, 16, 12), (5, 8, 4), 4), ((448,), 100, 64)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_64_are_those_of_the_layout(shape, window, tile, causal):
    order, n = tile_major(shape, tile), math.prod(shape)
    for stride in (1, 3, 4):
        layout = Neighborhood(shape, window, stride, causal=causal, order=order).layout(n)
        report = simulate(Neighborhood(shape, window, stride, causal=causal), tile)
        assert (report.visited, report.dense) == (layout.nnz, layout.q_tiles * layout.k_tiles)
        if report.perfect:
            assert len(layout.dictionary) == 0  # every tile is full


def test_settings_that_waste_nothing():
    """A 4k image with 91 % sparsity, and a video: stride 1 wastes, the stride of the tiles does not."""
    for shape, window, stride, tile, bounds in (
        ((256, 256), 80, 16, (16, 8), (7.51, 10.24)),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (5.44, 11.11)),
    ):
        sliding, strided = (simulate(Neighborhood(shape, window, s), tile) for s in (1, stride))
        assert (round(sliding.bound, 2), round(strided.bound, 2)) == bounds
        assert strided.perfect
        assert not sliding.perfect
        assert strided.flop_bound == pytest.approx(bounds[1], abs=0.005)
        assert sliding.waste == pytest.approx(1 - bounds[0] / bounds[1], abs=1e-3)


def test_strides_are_all_there_and_sorted():
    found = strides((8, 12), (4, 6), 4, (2, 4), causal=(True, False))
    assert sorted(s for s, _ in found) == [(a, b) for a in range(1, 5) for b in range(1, 7)]
    assert all(
        r == simulate(Neighborhood((8, 12), (4, 6), s, causal=(True, False)), 4, (2, 4)) for s, r in found
    )
    keys = [(-r.bound, s[0] * s[1]) for s, r in found]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: simulate(Neighborhood(8, 2, dilation=2), 4), ValueError, r"dilation must be 1, got \(2,\)"),
        (lambda: simulate(Neighborhood(8, 2), 0), ValueError, "tile_q must be an int >= 1, got 0"),
        (lambda: simulate(Neighborhood((8, 8), 2), 4, (2, 2, 2)), ValueError, "tile_k must be one int or 2"),
        (lambda: simulate(tile_major(8, 2), 4), TypeError, "pattern must be a Neighborhood, got Order"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
