"""Normalisers: their formulas pair by pair, limits that coincide, blank rows, gradients."""

from __future__ import annotations

import math

import pytest
import torch

import foveate as fv
from foveate.core import engines
from foveate.core.request import make_request

GENERATOR = torch.Generator().manual_seed(4)
Q, K, V = (
    torch.randn(s, generator=GENERATOR, dtype=torch.float64)
    for s in ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 2))
)
MASK = torch.rand(2, 4, 5, 7, generator=GENERATOR) < 0.6
MASK[:, :, 2] = False
FORMULAS = {
    "sigmoid": (fv.Sigmoid(), lambda s, all_: 1 / (1 + math.exp(-s))),
    "sigmoid with bias": (fv.Sigmoid(-1.5), lambda s, all_: 1 / (1 + math.exp(-(s - 1.5)))),
    "relu": (fv.ReLU(), lambda s, all_: max(s, 0.0)),
    "softmax": (fv.Softmax(), lambda s, all_: math.exp(s) / sum(map(math.exp, all_))),
    "softmax_plus_one": (fv.SoftmaxPlusOne(), lambda s, all_: math.exp(s) / (1 + sum(map(math.exp, all_)))),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("capped", [False, True])
def test_formulas(name, capped):
    normalizer, weight = FORMULAS[name]
    options = {"score": fv.SoftCap(0.7)} if capped else {}
    got = fv.attention(Q, K, V, MASK, normalizer=normalizer, engine="reference", **options)
    for at in torch.cartesian_prod(*map(torch.arange, (2, 4, 5))).tolist():
        b, h, i = at
        seen = MASK[b, h, i].nonzero().flatten().tolist()
        logits = {j: float(Q[b, h, i] @ K[b, h // 2, j]) / math.sqrt(3) for j in seen}
        if capped:
            logits = {j: 0.7 * math.tanh(s / 0.7) for j, s in logits.items()}
        want = torch.zeros(2, dtype=torch.float64)
        for j, s in logits.items():
            want = want + weight(s, logits.values()) * V[b, h // 2, j]
        torch.testing.assert_close(got[b, h, i], want)
    assert (got[:, :, 2] == 0).all()


@pytest.mark.parametrize("name", ["softmax", "softmax_plus_one", "sigmoid", "relu"])
def test_names_stand_for_instances(name):
    request = make_request(Q, K, V, normalizer=name)
    assert request.normalizer == FORMULAS[name][0]
    named = fv.attention(Q, K, V, MASK, normalizer=name, engine="reference")
    assert torch.equal(named, fv.attention(Q, K, V, MASK, normalizer=FORMULAS[name][0], engine="reference"))


def test_plus_one_is_a_sink_of_zero_and_counts_beside_others():
    options = {"return_lse": True, "engine": "reference"}
    zeros = torch.zeros(4, dtype=torch.float64)
    for pattern in (None, MASK):
        got = fv.attention(Q, K, V, pattern, normalizer="softmax_plus_one", **options)
        want = fv.attention(Q, K, V, pattern, sinks=zeros, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    sinks = torch.tensor([0.3, -math.inf, 4.0, -2.0], dtype=torch.float64)
    out, lse = fv.attention(Q, K, V, MASK, normalizer="softmax_plus_one", sinks=sinks, **options)
    both = fv.attention(Q, K, V, MASK, sinks=(1 + sinks.exp()).log(), **options)
    torch.testing.assert_close(out, both[0])
    torch.testing.assert_close(lse, both[1])
    torch.testing.assert_close(lse[:, :, 2], (1 + sinks.exp()).log().expand(2, 4))


def test_the_sinks_that_an_engine_sees():
    assert make_request(Q, K, V).all_sinks is None
    sinks = torch.tensor([0.3, -1.0, 4.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    assert make_request(Q, K, V, sinks=sinks).all_sinks is sinks
    alone = make_request(Q.bfloat16(), K.bfloat16(), V.bfloat16(), normalizer="softmax_plus_one").all_sinks
    assert alone.dtype == torch.float32
    assert torch.equal(alone, torch.zeros(4))
    both = make_request(Q, K, V, sinks=sinks, normalizer="softmax_plus_one").all_sinks
    assert both.dtype == torch.float32
    torch.testing.assert_close(both, (1 + sinks.float().exp()).log())
    assert torch.autograd.grad(both.sum(), sinks)[0].shape == (4,)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradcheck(name):
    normalizer = FORMULAS[name][0]
    softmax = name.startswith("softmax")
    sinks = torch.tensor([0.1, -1.0, 2.0, 0.4], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (Q, K, V, *([sinks] if softmax else []))]

    def run(q, k, v, sinks=None):
        return fv.attention(
            q, k, v, MASK, sinks=sinks, normalizer=normalizer, return_lse=softmax, engine="reference"
        )

    assert torch.autograd.gradcheck(run, leaves)
    if name != "relu":
        assert torch.autograd.gradgradcheck(run, leaves)
    grads = torch.autograd.grad(run(*leaves)[0].sum() if softmax else run(*leaves).sum(), leaves)
    assert (grads[0][:, :, 2] == 0).all()


@pytest.mark.parametrize("name", ["sigmoid", "relu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_poison_reaches_nothing(name, bad):
    mask = MASK.clone()
    mask[..., 4] = False
    results = []
    for value in (0.5, bad):
        k, v = K.clone(), V.clone()
        k[:, :, 4] = v[:, :, 4] = value
        leaves = [t.requires_grad_() for t in (Q.clone(), k, v)]
        out = fv.attention(*leaves, mask, normalizer=name, engine="reference")
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_extreme_logits():
    for name in ("sigmoid", "relu"):
        out = fv.attention(Q * 1e4, K, V, MASK, normalizer=name, engine="reference")
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("bias", [math.nan, math.inf, "1", None])
def test_the_bias_of_sigmoid_is_finite(bias):
    with pytest.raises(ValueError, match=r"Sigmoid\.bias must be a finite number"):
        fv.Sigmoid(bias)


def test_engines_say_what_they_do_not_normalise():
    q, k, v = (t.float() for t in (Q, K, V))
    for name in ("sdpa", "flex"):
        request = make_request(q, k, v, normalizer="sigmoid")
        assert "not with Sigmoid(bias=0.0)" in engines.refusal(name, request, False)
    request = make_request(q, k, v, normalizer="softmax_plus_one")
    assert "not with SoftmaxPlusOne()" in engines.refusal("sdpa", request, False)
    assert "sinks need the log-sum-exp" in engines.refusal("flex", request, False)
    request = make_request(q, k, v, score=fv.Temperature(torch.ones(5)))
    assert "takes SoftCap and Bias" in engines.refusal("flex", request, False)
