"""Counter-based dropout: the published generator, which weights it keeps, and how attention uses it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate.catalogue.conformance.oracle import loop_keep_mask, loop_philox
from foveate.core.dropout import keep_mask, philox, threshold
from foveate.core.request import make_request

PI = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers_of_philox(counter, key, words):
    """kat_vectors of Random123, "philox4x32 10"."""
    got = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in got) == words


@settings(max_examples=30, deadline=None)
@given(
    seed=st.one_of(st.integers(0, 9), st.integers(0, 2**63 - 1)),
    p=st.floats(0.0, 1.0, exclude_max=True),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    n=st.integers(1, 5),
    m=st.integers(1, 9),
)
def test_the_mask_is_its_definition(seed, p, batch, heads, n, m):
    kept = keep_mask(seed, p, batch, heads, n, m)
    assert kept.shape == (batch, heads, n, m)
    assert torch.equal(kept, loop_keep_mask(seed, p, batch, heads, n, m))
    for form in (torch.tensor(seed), torch.tensor([seed])):
        assert torch.equal(keep_mask(form, p, batch, heads, n, m), kept)


def test_all_64_bits_of_a_tensor_seed_count():
    masks = [keep_mask(torch.tensor(seed), 0.5, 1, 1, 8, 64) for seed in (-1, 2**32 - 1, -(2**63), 0)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    words = loop_philox((0, 0, 0, 0), (2**32 - 1, 2**32 - 1))
    assert masks[0][0, 0, 0, :4].tolist() == [word >= 2**31 for word in words]


def test_the_threshold_reaches_neither_end():
    assert threshold(0.0) == 0
    assert threshold(1 - 1e-16) == 2**32 - 1
    assert keep_mask(3, 0.0, 1, 1, 9, 9).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_and_the_independence_of_neighbours(p):
    kept = keep_mask(11, p, 2, 4, 300, 301).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * sigma / kept.numel() ** 0.5
    centred = (kept - (1 - p)) / sigma
    for dim in range(4):
        length = kept.shape[dim] - 1
        product = centred.narrow(dim, 0, length) * centred.narrow(dim, 1, length)
        assert abs(product.mean()) < 4 / product.numel() ** 0.5, dim


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 9, 3), (2, 2, 11, 3), (2, 2, 11, 5)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("normalizer", ["softmax", "softmax_plus_one", "sigmoid", "relu"])
def test_dropout_acts_on_the_weights_after_normalisation(normalizer):
    q, k, v = inputs()
    eye = torch.eye(11, dtype=torch.float64).expand(2, 2, 11, 11)
    weights = fv.attention(q, k, eye, is_causal=True, normalizer=normalizer, engine="reference")
    kept = keep_mask(5, 0.3, 2, 4, 9, 11)
    want = (weights * kept / 0.7) @ v.repeat_interleave(2, 1)
    options = {"is_causal": True, "normalizer": normalizer, "dropout_p": 0.3, "engine": "reference"}
    for seed in (5, torch.tensor(5), torch.tensor([5])):
        torch.testing.assert_close(fv.attention(q, k, v, dropout_seed=seed, **options), want)
    if normalizer.startswith("softmax"):
        _, lse = fv.attention(q, k, v, dropout_seed=5, return_lse=True, **options)
        options["dropout_p"] = 0.0
        assert torch.equal(lse, fv.attention(q, k, v, return_lse=True, **options)[1])


def test_a_seed_is_drawn_from_the_default_generator():
    q, k, v = inputs()
    torch.manual_seed(7)
    first = make_request(q, k, v, dropout_p=0.5).dropout_seed
    second = make_request(q, k, v, dropout_p=0.5).dropout_seed
    torch.manual_seed(7)
    again = make_request(q, k, v, dropout_p=0.5).dropout_seed
    assert first.dtype == torch.int64
    assert first.shape == (1,)
    assert first.device.type == "cpu"
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert make_request(q, k, v).dropout_seed is None
    assert make_request(q, k, v, dropout_seed=3).dropout_seed is None
    given_one = make_request(q, k, v, dropout_p=0.5, dropout_seed=3).dropout_seed
    assert torch.equal(given_one, torch.tensor([3]))
    assert torch.equal(state, torch.get_rng_state())


def test_gradients_pass_the_same_mask():
    q, k, v = (t.requires_grad_() for t in inputs())

    def run(*xs):
        return fv.attention(*xs, is_causal=True, dropout_p=0.4, dropout_seed=2, engine="reference")

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.slow
def test_traced_as_one_graph():
    q, k, v = inputs(torch.float32)

    @torch.compile(fullgraph=True, backend="eager")
    def run(q, k, v, seed=None):
        return fv.attention(q, k, v, dropout_p=0.5, dropout_seed=seed, engine="reference")

    want = fv.attention(q, k, v, dropout_p=0.5, dropout_seed=9, engine="reference")
    torch.testing.assert_close(run(q, k, v, torch.tensor([9])), want)
    torch.manual_seed(1)
    first = run(q, k, v)
    torch.manual_seed(1)
    assert torch.equal(first, run(q, k, v))
    assert not torch.equal(first, run(q, k, v))
