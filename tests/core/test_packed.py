"""Sequences of different lengths one after another: the pattern, and attention with cu_seqlens."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate.core import patterns as P
from foveate.core.build import build_layout
from foveate.core.layout import BlockLayout
from foveate.core.request import make_request
from foveate.core.selectors import FlexPrefill


@st.composite
def lengths(draw, most=90):
    """Lengths of queries and keys of a few sequences, some of them empty."""
    one = st.lists(st.integers(0, most), min_size=1, max_size=4)
    q = draw(one.filter(sum))
    if draw(st.booleans()):
        return q, q
    k = draw(st.lists(st.integers(0, most), min_size=len(q), max_size=len(q)).filter(sum))
    return q, k


def ends(parts):
    return torch.tensor([0, *parts]).cumsum(0)


def loops(q, k, causal):
    """The set of pairs, sequence by sequence."""
    seen = torch.zeros(sum(q), sum(k), dtype=torch.bool)
    at, key = 0, 0
    for n, m in zip(q, k, strict=True):
        for i in range(n):
            for j in range(m):
                seen[at + i, key + j] = not causal or j <= i + m - n
        at, key = at + n, key + m
    return seen


@settings(max_examples=60, deadline=None)
@given(parts=lengths(), causal=st.booleans())
def test_the_set_of_pairs(parts, causal):
    q, k = parts
    pattern = P.Packed(ends(q), ends(k), causal)
    assert torch.equal(pattern.layout(sum(q), sum(k)).to_dense()[0, 0], loops(q, k, causal))
    window = P.SlidingWindow(before=7, after=2)
    both = (pattern & window).layout(sum(q), sum(k)).to_dense()
    assert torch.equal(both, loops(q, k, causal) & window.layout(sum(q), sum(k)).to_dense())


def make(q, k, dtype=torch.float64, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, heads, sum(q), 5), (1, kv_heads, sum(k), 5), (1, kv_heads, sum(k), 3)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@settings(max_examples=25, deadline=None)
@given(parts=lengths(most=20), causal=st.booleans(), windowed=st.booleans())
def test_it_is_attention_in_each_sequence_alone(parts, causal, windowed):
    q_lens, k_lens = parts
    q, k, v = (t.requires_grad_() for t in make(q_lens, k_lens))
    pattern = P.SlidingWindow(3) if windowed and q_lens == k_lens else None
    cu = ends(q_lens) if q_lens == k_lens else (ends(q_lens), ends(k_lens))
    got, lse = fv.attention(
        q, k, v, pattern, cu_seqlens=cu, is_causal=causal, return_lse=True, engine="reference"
    )
    wanted, wanted_lse = torch.zeros_like(got), torch.full_like(lse, -torch.inf)
    at, key = 0, 0
    for n, m in zip(q_lens, k_lens, strict=True):
        if n and m:
            alone = q[:, :, at : at + n], k[:, :, key : key + m], v[:, :, key : key + m]
            wanted[:, :, at : at + n], wanted_lse[:, :, at : at + n] = fv.attention(
                *alone, pattern, is_causal=causal, return_lse=True, engine="reference"
            )
        at, key = at + n, key + m
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (q, k, v)),
        torch.autograd.grad(wanted.square().sum(), (q, k, v))
        if wanted.requires_grad
        else [0 * t for t in (q, k, v)],
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_engines_run_it(engine):
    parts = [70, 0, 131, 5, 64]
    q, k, v = make(parts, parts, torch.float32)
    want = fv.attention(*(t.double() for t in (q, k, v)), loops(parts, parts, True), engine="reference")
    got = fv.attention(q, k, v, cu_seqlens=ends(parts), is_causal=True, engine=engine)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_every_form_of_a_pattern_combines_with_it():
    parts = [40, 0, 30]
    q, k, v = make(parts, parts)
    mask = torch.rand(70, 70, generator=torch.Generator().manual_seed(1)) < 0.5
    want = fv.attention(q, k, v, mask & loops(parts, parts, True), engine="reference")
    cu = ends(parts).to(torch.int32)
    for form in (mask, BlockLayout.from_mask(mask), P.Mask(mask), lambda b, h, q, k: mask[q, k]):
        for given_ in (cu, (cu, cu), cu.tolist(), tuple(cu.tolist()), cu.numpy()):
            got = fv.attention(q, k, v, form, cu_seqlens=given_, is_causal=True, engine="reference")
            assert torch.equal(got, want)
    causal = fv.attention(q, k, v, loops(parts, parts, True), engine="reference")
    for pattern in (P.Causal(), P.Packed(cu, is_causal=True)):
        assert torch.equal(fv.attention(q, k, v, pattern, cu_seqlens=cu, engine="reference"), causal)


def test_one_sequence_needs_no_layout():
    q, k, v = make([9], [9])
    for causal, kind in ((False, "full"), (True, "causal")):
        assert make_request(q, k, v, cu_seqlens=[0, 9], is_causal=causal).kind == kind
    assert make_request(q, k, v, cu_seqlens=[0, 4, 9]).kind == "layout"


def test_equal_ones_share_a_layout():
    cu = ends([3, 4])
    assert P.Packed(cu) == P.Packed(cu.clone(), cu.to(torch.int32))
    assert P.Packed(cu) != P.Packed(cu, is_causal=True)
    assert P.Packed(cu).layout(7) is P.Packed(cu.tolist()).layout(7)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_long_ones_lay_out_fast(causal, cross):
    """131,072 tokens in sequences of 1 to 4000: the area is right and no time is spent on what is empty."""
    generator = np.random.default_rng(0)
    lengths_ = []
    while sum(lengths_) < 131072:
        lengths_.append(min(int(generator.integers(1, 4000)), 131072 - sum(lengths_)))
    cu = ends(lengths_)
    pattern = P.Packed(cu, ends(lengths_[::-1]) if cross else None, causal)
    begin = time.perf_counter()
    layout = build_layout(pattern, 131072, 131072)
    assert time.perf_counter() - begin < 5  # about 0.2 s on an idle core
    if not cross:
        assert layout.area == sum(n * (n + 1) // 2 if causal else n * n for n in lengths_)
    elif not causal:
        assert layout.area == sum(n * m for n, m in zip(lengths_, lengths_[::-1], strict=True))


Q, K = torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 9, 4)


@pytest.mark.parametrize(
    ("cu", "options", "error", "words"),
    [
        ([0, 7], {}, ValueError, "cu_seqlens_k ends at 7; there are 9 keys"),
        ([0, 9], {}, ValueError, "cu_seqlens ends at 9; there are 7 queries"),
        (([0, 7], [0, 8]), {}, ValueError, "cu_seqlens_k ends at 8; there are 9 keys"),
        (([0, 3, 7], [0, 9]), {}, ValueError, "as many entries, one per sequence + 1; got 3 and 2"),
        (([0, 8, 7], [0, 3, 9]), {}, ValueError, "cu_seqlens must rise from 0 to the number of tokens"),
        (([0, 3, 7], [1, 3, 9]), {}, ValueError, "cu_seqlens_k must rise from 0"),
        (torch.tensor([0.0, 7.0]), {}, TypeError, "cu_seqlens must be an integer tensor of 1 dim"),
        (torch.tensor([[0, 7]]), {}, TypeError, "cu_seqlens must be an integer tensor of 1 dim"),
        (7, {}, TypeError, "cu_seqlens must be an integer tensor of 1 dim"),
        (
            ([0, 3, 7], [0, 3, 9]),
            {"pattern": FlexPrefill()},
            ValueError,
            "does not combine with the selector FlexPrefill",
        ),
    ],
)
def test_mistakes_are_named(cu, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        fv.attention(Q, K, K, cu_seqlens=cu, **options)


def test_more_mistakes_are_named():
    with pytest.raises(ValueError, match="needs batch 1, the sequences one after another; got batch 2"):
        fv.attention(
            Q.repeat(2, 1, 1, 1),
            K.repeat(2, 1, 1, 1),
            K.repeat(2, 1, 1, 1),
            cu_seqlens=([0, 3, 7], [0, 3, 9]),
        )
    with pytest.raises(TypeError, match="Packed: is_causal must be a bool, got 1"):
        P.Packed([0, 3], is_causal=1)


@pytest.mark.slow
def test_compiled_code_takes_the_pattern_instead():
    parts = [4, 5]
    q, k, v = make(parts, parts, torch.float32)

    @torch.compile(fullgraph=True, backend="eager")
    def run(cu):
        return fv.attention(q, k, v, cu_seqlens=cu)

    with pytest.raises(Exception, match=r"cu_seqlens cannot be read under torch\.compile"):
        run(ends(parts))
    pattern = P.Packed(ends(parts))
    compiled = torch.compile(lambda q: fv.attention(q, k, v, pattern), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q), fv.attention(q, k, v, cu_seqlens=ends(parts)))
