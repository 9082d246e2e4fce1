"""Every expression's layout equals its definition bit for bit; classes and signatures keep their promises."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pattern_strategies import expressions, tree

from foveate.core import patterns as P
from foveate.core.build import build_layout
from foveate.core.layout import TILE, BlockLayout, tiles
from foveate.core.patterns.base import tile_bounds

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=250, **QUIET)
@given(expressions())
def test_layout_equals_the_definition_and_is_canonical(case):
    pattern, n, m, dense = case
    layout = build_layout(pattern, n, m)
    assert (layout.batch, layout.heads) == (pattern.batch, pattern.heads) == tuple(dense.shape[:2])
    assert torch.equal(layout.to_dense(), dense)
    assert layout == BlockLayout.from_mask(dense)  # equal sets have equal arrays
    layout._validate()


@settings(max_examples=120, **QUIET)
@given(expressions(depth=2), st.integers(0, 2**31))
def test_classes_are_sound_on_any_rectangle(case, seed):
    pattern, n, m, dense = case
    rng = np.random.default_rng(seed)
    q = np.sort(rng.integers(0, n + 1, (60, 2)), axis=1)
    k = np.sort(rng.integers(0, m + 1, (60, 2)), axis=1)
    keep = (q[:, 0] < q[:, 1]) & (k[:, 0] < k[:, 1])
    (q0, q1), (k0, k1) = q[keep].T, k[keep].T
    ext = P.Extent(n, m)
    for b in range(pattern.batch):
        for h in range(pattern.heads):
            got = pattern.classify(ext, b, h, q0, q1, k0, k1)
            assert got.dtype == np.int8
            assert got.shape == q0.shape
            for c, *r in zip(got, q0, q1, k0, k1, strict=True):
                inside = dense[b, h, r[0] : r[1], r[2] : r[3]]
                assert c != P.EMPTY or not inside.any(), (pattern, n, m, r)
                assert c != P.FULL or inside.all(), (pattern, n, m, r)


@settings(max_examples=120, **QUIET)
@given(expressions(depth=2, sizes=(130, 257, 500)))
def test_equal_signatures_mean_equal_tiles(case):
    pattern, n, m, dense = case
    nq, nk = tiles(n), tiles(m)
    qt, kt = np.indices((nq, nk)).reshape(2, -1)
    padded = np.zeros((*dense.shape[:2], nq * TILE, nk * TILE), bool)
    padded[:, :, :n, :m] = dense.numpy()
    cut = padded.reshape(*dense.shape[:2], nq, TILE, nk, TILE).swapaxes(3, 4)
    edge = 2 * (qt == nq - 1) + (kt == nk - 1)
    for b in range(pattern.batch):
        for h in range(pattern.heads):
            columns = pattern.signature(P.Extent(n, m), b, h, qt, kt)
            seen = {}
            for key, i, j in zip(zip(edge, *columns, strict=True), qt, kt, strict=True):
                tile = cut[b, h, i, j]
                assert (seen.setdefault(key, tile) == tile).all(), (pattern, n, m, key)


@settings(max_examples=40, **QUIET)
@given(st.data(), st.sampled_from([65, 130]))
def test_algebra_is_boolean_algebra(data, n):
    (a, dense_a), (b, dense_b) = (tree(data.draw, n, n, 1) for _ in range(2))

    def same(pattern, dense):
        assert torch.equal(pattern.layout(n).to_dense().broadcast_to(dense.shape), dense)

    same(~(a & b), ~dense_a | ~dense_b)
    same(~(a | b), ~dense_a & ~dense_b)
    same(a & ~a, torch.zeros_like(dense_a))
    same(a | ~a, torch.ones_like(dense_a))
    assert ~~a == a
    assert (a & b).layout(n) == a.layout(n) & b.layout(n)
    assert (a | b).layout(n) == a.layout(n) | b.layout(n)


@settings(max_examples=40, **QUIET)
@given(expressions(depth=2, sizes=(65, 130)))
def test_at_is_the_pattern_of_one_row_and_head(case):
    pattern, n, m, dense = case
    for b in range(pattern.batch):
        for h in range(pattern.heads):
            one = pattern.at(b, h)
            got = build_layout(one, n, m).to_dense()
            assert torch.equal(got[b if one.batch > 1 else 0, h if one.heads > 1 else 0], dense[b, h])


def test_kleene_tables():
    """min, max and 2 - c on all nine pairs of classes."""
    ext = P.Extent(256, 256)
    one = [np.array([x]) for x in (0, 64, 0, 64)]
    by_class = {P.EMPTY: ~P.Full(), P.PARTIAL: P.Causal(), P.FULL: P.Full()}
    for x, a in by_class.items():
        assert (~a).classify(ext, 0, 0, *one)[0] == 2 - x
        for y, b in by_class.items():
            assert (a & b).classify(ext, 0, 0, *one)[0] == min(x, y)
            assert (a | b).classify(ext, 0, 0, *one)[0] == max(x, y)


def test_nested_operators_are_flattened_and_printed():
    a, b, c = P.Causal(), P.SlidingWindow(8), P.Sinks(2)
    assert (a & b) & c == a & (b & c) == P.And((a, b, c))
    assert (a | b) | c == P.Or((a, b, c))
    assert (a & (b | c)).parts == (a, b | c)
    assert repr(a & (b | ~c)) == "(Causal() & (SlidingWindow(8) | ~Sinks(2)))"
    assert repr(P.per_head(a, b)) == "per_head(Causal(), SlidingWindow(8))"
    assert repr(P.Random(0.25, seed=3)) == "Random(0.25, seed=3)"


def test_tuples_mean_one_pattern_per_head():
    a, b = P.SlidingWindow(3), P.Sinks(2)
    for made in (P.Causal() & (a, b), (a, b) & P.Causal(), P.Causal() & P.per_head(a, b)):
        dense = made.layout(70).to_dense()
        assert torch.equal(dense[0, 0], (P.Causal() & a).layout(70).to_dense()[0, 0])
        assert torch.equal(dense[0, 1], (P.Causal() & b).layout(70).to_dense()[0, 0])
    assert (P.Causal() | (a, b)).heads == ((a, b) | P.Causal()).heads == 2
    with pytest.raises(ValueError, match="heads"):
        P.per_head(a, b) & P.per_head(a, a, b)
    with pytest.raises(ValueError, match="one head each"):
        P.per_head(P.per_head(a, b), a)
    with pytest.raises(ValueError, match="at least one"):
        P.per_head()
    with pytest.raises(TypeError):
        P.Causal() & 3
    with pytest.raises(TypeError, match="Pattern or a tuple"):
        P.as_pattern("causal")
    with pytest.raises(ValueError, match="batch"):
        P.PrefixLM([1, 2]) & P.PrefixLM([1, 2, 3])


def test_equal_heads_are_laid_out_once():
    calls = []

    class Counting(P.Pattern):
        def contains(self, ext, b, h, q, k):
            calls.append(1)
            return q >= k

    one = Counting()
    layout = build_layout(P.PerHead((one,) * 5), 64, 64)
    assert len(calls) == 1
    assert layout.heads == 5
    assert tile_bounds(P.Extent(70, 64), np.array([1]), np.array([0]))[1] == 70
