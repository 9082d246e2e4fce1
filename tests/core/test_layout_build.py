"""Building: nothing is N x N, levels of the descent agree, work follows what is found."""

import tracemalloc

import numpy as np
import pytest
import torch
from pattern_strategies import truth

from foveate.core import build
from foveate.core import patterns as P
from foveate.core.build import build_layout
from foveate.core.layout import BlockLayout
from foveate.core.patterns.boxes import RangeTable

LONG = 131_072
SPARSE = P.Causal() & (P.SlidingWindow(4096) | P.Sinks(64))


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (SPARSE, 100 << 20),
        (P.Causal(), 200 << 20),
        (P.Causal() & P.Documents(np.repeat(np.arange(64), LONG // 64)), 100 << 20),
        (P.power_attention(), 100 << 20),
        (P.Neighborhood((256, 512), 13, order=P.tile_major((256, 512), 8)), 200 << 20),
    ],
    ids=["sliding+sinks", "causal", "documents", "power", "neighborhood"],
)
def test_no_n_by_n(pattern, most):
    """131,072 tokens: N x N would be 17 GB of bools; even one number per tile and head stays small."""
    tracemalloc.start()
    layout = build_layout(pattern, LONG, LONG)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most
    assert layout.nnz > 0
    layout._validate()


def test_long_layout_by_formula():
    layout = build_layout(SPARSE, LONG, LONG)
    i = np.arange(LONG)
    window_start = np.maximum(i - 4095, 0)
    want = (i - window_start + 1) + np.minimum(64, window_start)  # keys of the window, sinks before it
    assert layout.area == int(want.sum())
    assert len(layout.dictionary) == 2
    assert build_layout(P.Causal(), LONG, LONG).area == LONG * (LONG + 1) // 2


def test_few_elements_are_evaluated():
    """Tiles are evaluated once per distinct content, not once per tile."""
    elements = 0

    class Watched(P.SlidingWindow):
        def contains(self, ext, b, h, q, k):
            nonlocal elements
            elements += q.size * k.shape[-1]
            return super().contains(ext, b, h, q, k)

    build_layout(P.Causal() & Watched(4096), LONG, LONG)
    assert 0 < elements <= 8 * 64 * 64


def test_unknown_patterns_are_evaluated_in_bounded_chunks():
    largest = 0

    def rule(b, h, q, k):
        nonlocal largest
        made = (q + k) % 3 == 0
        largest = max(largest, made.numel())
        return made

    layout = build_layout(P.MaskMod(rule), 2048, 2048)
    assert largest <= 1 << 21
    assert len(layout.dictionary) == 3
    assert layout.nnz == 32 * 32


PATTERNS = [
    SPARSE,
    ~SPARSE,
    P.Causal() & P.Documents(np.repeat(np.arange(7), [500, 3, 800, 1, 1500, 700, 896])),
    P.Shards(64, 2, 4),
    P.Random(0.2, block=128, seed=2),
    P.GlobalTokens([5, 2000, 2001]) | P.Dilated(30, 17),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: repr(p)[:30])
@pytest.mark.parametrize(
    "setting", [{"FIRST_SQUARES": 1}, {"BAND_CELLS": 700}, {"CHUNK_PARENTS": 1, "CHUNK_TILES": 3}]
)
def test_the_result_does_not_depend_on_levels_bands_or_chunks(monkeypatch, pattern, setting):
    n = 4400
    want = build_layout(pattern, n, n)
    for name, value in setting.items():
        monkeypatch.setattr(build, name, value)
    assert build_layout(pattern, n, n) == want


@pytest.mark.parametrize("pattern", PATTERNS[3:], ids=lambda p: repr(p)[:30])
def test_large_descents_are_exact(pattern):
    n = 4400
    dense = truth(pattern, n, n)
    assert build_layout(pattern, n, n) == BlockLayout.from_mask(dense)


def test_several_levels_and_bands_at_once(monkeypatch):
    """A ragged rectangle through three levels of the descent and many bands."""
    monkeypatch.setattr(build, "FAN", 2)
    monkeypatch.setattr(build, "FIRST_SQUARES", 3)
    for n, m in ((1500, 900), (900, 1500), (64, 2000), (2000, 64), (1, 1500)):
        pattern = P.SlidingWindow(300) | P.Sinks(70) | P.Strided(300)
        assert build_layout(pattern, n, m) == BlockLayout.from_mask(truth_of(pattern, n, m))
    monkeypatch.setattr(build, "BAND_CELLS", 40)
    for n, m in ((1500, 900), (900, 1500), (64, 2000)):
        pattern = P.SlidingWindow(300) | P.Sinks(70)
        assert build_layout(pattern, n, m) == BlockLayout.from_mask(truth_of(pattern, n, m))


def truth_of(pattern, n, m):
    return torch.stack([truth(p, n, m) for p in pattern.parts]).any(0)


def test_range_tables_bound_every_range():
    """Exact over whole tiles, of any number of tiles; never too narrow otherwise."""
    rng = np.random.default_rng(0)
    values = rng.integers(-1000, 1000, (2, 64 * 37 + 5))
    table = RangeTable(values)
    first, last = np.sort(rng.integers(0, 37, (2, 500)), axis=0)
    start, stop = 64 * first, np.minimum(64 * (last + 1), values.shape[1])
    least, most = table(start, stop)
    for i in range(500):
        piece = values[:, start[i] : stop[i]]
        assert (least[:, i] == piece.min(1)).all()
        assert (most[:, i] == piece.max(1)).all()
    start, stop = np.sort(rng.integers(0, values.shape[1], (2, 500)), axis=0)
    least, most = table(start, stop + 1)
    for i in range(500):
        piece = values[:, start[i] : stop[i] + 1]
        assert (least[:, i] <= piece.min(1)).all()
        assert (most[:, i] >= piece.max(1)).all()


@pytest.mark.parametrize("stride", [1, 3, 7, 15, 31, 63, 64, 65, 127, 128, 129, 200])
def test_strides_next_to_divisors_of_a_tile(stride):
    for pattern in (P.Strided(stride), P.Dilated(200, stride), P.Blocked(stride), P.PowerOfTwo(stride)):
        for n, m in ((500, 500), (300, 471)):
            assert build_layout(pattern, n, m) == BlockLayout.from_mask(truth(pattern, n, m))


def test_a_layout_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        layout = build_layout(P.Causal() & P.SlidingWindow(70), 200, 200)
    assert not any(
        t.is_inference() for t in (layout.row_ptr, layout.tile_idx, layout.tile_id, layout.dictionary)
    )


def test_a_pattern_that_allows_nothing():
    layout = build_layout(P.Causal() & ~P.Causal(), 200, 300)
    assert layout.nnz == 0
    assert layout.area == 0
    assert not layout.to_dense().any()
    assert build_layout(~P.Full(), 200, 300) == layout
