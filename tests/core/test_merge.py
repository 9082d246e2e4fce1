"""merge: splitting the keys anywhere, any number of times, and merging gives what one call gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv


def softmax_state(logits, v):
    """The state of one key set by its definition, in float64: out (N, Dv), lse (N)."""
    lse = torch.logsumexp(logits, -1)
    p = torch.softmax(logits, -1).nan_to_num(0.0)
    return p @ v, lse


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 7),
    m=st.integers(1, 40),
    parts=st.integers(1, 6),
    magnitude=st.sampled_from([0.1, 1.0, 30.0, 1e4, 1e300]),
    hidden=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_random_splits_in_float64(seed, n, m, parts, magnitude, hidden):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, m, generator=generator, dtype=torch.float64) * magnitude
    logits[torch.rand(n, m, generator=generator) < hidden] = -math.inf
    v = torch.randn(m, 3, generator=generator, dtype=torch.float64)
    owner = torch.randint(parts, (m,), generator=generator)
    owner[: min(m, 1)] = 0
    states = []
    for part in range(parts):
        mine = owner == part
        if mine.any():
            states.append(softmax_state(logits[:, mine], v[mine]))
        else:
            states.append(
                (torch.full((n, 3), math.nan, dtype=torch.float64), torch.full((n,), -math.inf).double())
            )
    out, lse = fv.merge(states)
    want_out, want_lse = softmax_state(logits, v)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, want_out, rtol=1e-10, atol=1e-12)
    assert out.dtype == lse.dtype == torch.float64


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(1, 99), grouped=st.booleans())
def test_split_keys_of_attention(seed, cut, grouped):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 30, 8, generator=generator)
    k, v = (torch.randn(2, 2 if grouped else 4, 100, 8, generator=generator) for _ in range(2))
    mask = torch.rand(30, 100, generator=generator) < 0.3
    mask[3] = False
    mask[4, :cut] = False
    pieces = [slice(0, cut), slice(cut, 100)]
    states = [
        fv.attention(q, k[:, :, s], v[:, :, s], mask[:, s], return_lse=True, engine="reference")
        for s in pieces
    ]
    out, lse = fv.merge(states)
    want, want_lse = fv.attention(q, k, v, mask, return_lse=True, engine="reference")
    torch.testing.assert_close(out, want, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=2e-6, rtol=0)
    assert (out[:, :, 3] == 0).all()
    assert torch.isneginf(lse[:, :, 3]).all()


def test_grouping_and_order_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    states = []
    for _ in range(5):
        lse = torch.randn(2, 9, generator=generator) * 20
        lse[torch.rand(2, 9, generator=generator) < 0.3] = -math.inf
        states.append((torch.randn(2, 9, 4, generator=generator), lse))
    whole = fv.merge(states)
    pairwise = states[0]
    for state in states[1:]:
        pairwise = fv.merge([pairwise, state])
    nested = fv.merge([fv.merge(states[:2]), fv.merge(states[2:])])
    turned = fv.merge(states[::-1])
    for other in (pairwise, nested, turned):
        torch.testing.assert_close(other[0], whole[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(other[1], whole[1], atol=1e-5, rtol=1e-6)


def test_one_state_is_itself_and_an_empty_one_is_neutral():
    out, lse = torch.randn(3, 5), torch.tensor([1.0, -math.inf, 1e30])
    out[1] = 0
    nothing = (torch.full((3, 5), math.nan), torch.full((3,), -math.inf))
    for states in ([(out, lse)], [nothing, (out, lse)], [(out, lse), nothing, nothing]):
        merged, merged_lse = fv.merge(states)
        torch.testing.assert_close(merged, out, rtol=1e-7, atol=0)
        torch.testing.assert_close(merged_lse, lse, rtol=1e-7, atol=0)


def test_all_empty_gives_zero_and_minus_infinity():
    nothing = (torch.full((2, 3, 4), math.nan), torch.full((2, 3), -math.inf))
    out, lse = fv.merge([nothing, nothing])
    assert torch.equal(out, torch.zeros(2, 3, 4))
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("shift", [-3e38, -1e4, 0.0, 1e4, 3e38])
def test_extreme_lse(shift):
    """Only differences to the largest lse are exponentiated."""
    ones, lse = torch.ones(1, 2), torch.zeros(1) + shift
    out, merged = fv.merge(
        [(ones, lse), (3 * ones, lse), (5 * ones, lse - 1e5 if abs(shift) < 1e5 else lse * 0 - 3.3e38)]
    )
    torch.testing.assert_close(out, 2 * ones)
    torch.testing.assert_close(merged, lse + math.log(2))


def test_dtypes():
    state = (torch.randn(3, 4).bfloat16(), torch.randn(3))
    out, lse = fv.merge(state for _ in range(2))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, state[0])
    double = (torch.randn(3, 4).double(), torch.randn(3).double())
    assert fv.merge([double, double])[1].dtype == torch.float64


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    leaves = []
    for _ in range(2):
        leaves.append(torch.randn(3, 2, dtype=torch.float64, generator=generator, requires_grad=True))
        leaves.append(torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True))
    assert torch.autograd.gradcheck(lambda a, x, b, y: fv.merge([(a, x), (b, y)]), leaves)


def test_the_gradient_of_rows_that_saw_nothing_is_zero():
    out = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    lse = [
        torch.tensor([-math.inf, 0.5], requires_grad=True),
        torch.tensor([-math.inf, -math.inf], requires_grad=True),
    ]
    merged, _ = fv.merge(list(zip(out, lse, strict=True)))
    merged.sum().backward()
    for leaf in (*out, *lse):
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad[0] == 0).all()
    assert (out[0].grad[1] == 1).all()
    assert (out[1].grad == 0).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least one"):
        fv.merge([])
    good = (torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"state 1 has out \(2, 4\)"):
        fv.merge([good, (torch.zeros(2, 4), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"state 0 has out \(2, 3\) and lse \(3,\)"):
        fv.merge([(torch.zeros(2, 3), torch.zeros(3))])
