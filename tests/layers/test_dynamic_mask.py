"""Dynamic mask attention against loops over its formulas in float64, and what must hold of its kept sets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.core.scores import Bias
from foveate.layers import (
    DMACache,
    DynamicMaskAttention,
    dma_attention,
    dma_bias,
    topw_prefix_selector,
)
from foveate.layers import prefix_top as module

SIZES = [(1, 1), (7, 3), (5, 9), (131, 1), (131, 5), (199, 63), (200, 64), (211, 65), (389, 131), (300, 299)]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(n, m=None, heads=4, kv_heads=2, batch=2, dim=8, dtype=torch.float64, rounded=False):
    m = n if m is None else m
    q, k = normal(batch, heads, n, dim, seed=1), normal(batch, kv_heads, m, dim, seed=2)
    v, bias = normal(batch, kv_heads, m, dim, seed=3), 2 * normal(batch, kv_heads, m, seed=4)
    bias = bias.round() if rounded else bias  # many equal ones
    return [t.to(dtype) for t in (q, k, v, bias)]


# ------------------------------------------------------------------------------------------------ the oracle
def best(bias, i, w):
    """The w keys up to i of largest bias, newer ones first where equal."""
    return set(sorted(range(i + 1), key=lambda j: (-bias[j], -j))[:w])


def oracle(q, k, v, bias, w):
    """One batch row and query head, lists of numbers: q (N, D), k (M, D), v (M, Dv), bias (M,)."""
    out = []
    for r, query in enumerate(q):
        i = len(k) - len(q) + r
        logits = {
            j: math.fsum(a * b for a, b in zip(query, k[j], strict=True)) / math.sqrt(len(query)) + bias[j]
            for j in best(bias, i, w)
        }
        top = max(logits.values())
        p = {j: math.exp(s - top) for j, s in logits.items()}
        total = math.fsum(p.values())
        out.append([math.fsum(p[j] * v[j][d] for j in p) / total for d in range(len(v[0]))])
    return torch.tensor(out, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ kept sets
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("n", "w"), SIZES)
def test_kept_sets_are_those_of_sorting_every_prefix(n, w, rounded):
    bias = inputs(n, rounded=rounded)[3]
    kept = topw_prefix_selector(bias, w)
    for b, h in ((0, 1), (1, 0)):
        row, before = bias[b, h].tolist(), set()
        for i in range(n):
            now = set(kept.at(i)[b, h].nonzero().flatten().tolist())
            assert now == best(row, i, w)
            assert len(now) == min(w, i + 1)
            assert max(now) <= i
            assert now <= before | {i}
            assert len(before - now) <= 1  # adds i (or not), removes at most one
            before = now
    assert kept.area == bias.shape[0] * bias.shape[1] * sum(min(w, i + 1) for i in range(n))


@pytest.mark.parametrize("step", [1, 7, 64])
def test_thresholds_in_any_steps(step, monkeypatch):
    monkeypatch.setattr(module, "STEP", step)
    rank = torch.stack([torch.randperm(97, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    for w in (1, 2, 6, 7, 8, 63, 65, 97, 98):
        found = module.prefix_threshold(rank, w)
        for row, got in zip(rank.tolist(), found.tolist(), strict=True):
            assert got == [sorted(row[: i + 1])[-w] if i + 1 >= w else -1 for i in range(97)]


def test_rising_and_falling_biases():
    rising = torch.arange(200.0).expand(1, 2, 200)
    assert topw_prefix_selector(rising, 70).at(199)[0, 0].nonzero().flatten().tolist() == list(
        range(130, 200)
    )
    assert topw_prefix_selector(-rising, 70).at(199)[0, 0].nonzero().flatten().tolist() == list(range(70))


def test_equal_biases_are_a_sliding_window():
    kept = topw_prefix_selector(torch.zeros(1, 1, 131), 17)
    assert kept.layout(1) == (fv.patterns.Causal() & fv.patterns.SlidingWindow(17)).layout(131)


@pytest.mark.parametrize(("n", "offset", "w"), [(199, 0, 20), (199, 61, 20), (199, 198, 20), (131, 64, 200)])
def test_the_layout_is_the_set(n, offset, w):
    bias = inputs(n, rounded=True)[3]
    kept = topw_prefix_selector(bias, w, offset)
    assert kept.q_len == n - offset
    dense = kept.layout(4).to_dense()
    want = torch.stack([kept.at(i) for i in range(offset, n)], 2).repeat_interleave(2, 1)
    assert torch.equal(dense, want)
    assert kept.area * 2 == int(want.sum())
    assert kept.area <= kept.gathered <= kept.area + 4 * kept.q_len * 2 * kept.block


def test_padding_is_never_kept():
    bias = inputs(131)[3]
    bias[0, :, :40] = -torch.inf
    kept = topw_prefix_selector(bias, 7)
    for i in (3, 39, 40, 44, 46, 47, 130):
        at = kept.at(i)
        assert at.sum(-1).tolist() == [[max(0, min(7, i - 39))] * 2, [min(7, i + 1)] * 2]
        assert not at[0, :, :40].any()
    q, k, v, _ = inputs(131)
    for w in (7, 500):
        out = dma_attention(q, k, v, bias, w)
        assert not out[0, :, :40].any()
        alone = dma_attention(q[:1, :, 40:], k[:1, :, 40:], v[:1, :, 40:], bias[:1, :, 40:], w)
        torch.testing.assert_close(out[:1, :, 40:], alone, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------- the bias
@pytest.mark.parametrize("form", ["linear", "exp"])
def test_the_bias_is_the_formula(form):
    v, weight, a = normal(2, 3, 5, 4, seed=1), normal(3, 12, seed=2), [0.5, -1.5, 2.0]
    found = dma_bias(v, _linear(weight), torch.tensor(a, dtype=torch.float64), form).tolist()
    for b, h, j in itertools.product(range(2), range(3), range(5)):
        flat = [x for head in range(3) for x in v[b, head, j].tolist()]
        z = math.fsum(x * y for x, y in zip(flat, weight[h].tolist(), strict=True))
        want = a[h] * math.log1p(math.exp(z))
        assert math.isclose(found[b][h][j], math.exp(want) if form == "exp" else want, rel_tol=1e-12)


# ------------------------------------------------------------------------------------------------ attention
@pytest.mark.parametrize(("n", "m", "w"), [(13, 13, 4), (31, 31, 40), (7, 23, 5), (1, 17, 6), (75, 75, 1)])
def test_equals_the_oracle(n, m, w):
    q, k, v, bias = inputs(n, m)
    out = dma_attention(q, k, v, bias, w)
    for b, h in ((0, 0), (0, 3), (1, 2)):
        want = oracle(*(t[b, h // g].tolist() for t, g in ((q, 1), (k, 2), (v, 2), (bias, 2))), w)
        torch.testing.assert_close(out[b, h], want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [1, 700, 1 << 17])  # a block of queries at a time, a few, all
@pytest.mark.parametrize(("n", "m", "w"), [(389, 389, 131), (300, 389, 20), (1, 200, 64), (500, 500, 600)])
def test_gathered_equals_tiles(n, m, w, rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    q, k, v, bias = inputs(n, m, dtype=torch.float32)
    layout = topw_prefix_selector(bias, w, m - n).layout(4)
    want = fv.attention(q, k, v, layout, score=Bias(bias.repeat_interleave(2, 1).unsqueeze(2)))
    torch.testing.assert_close(dma_attention(q, k, v, bias, w), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["linear", "exp"])
@pytest.mark.parametrize("w", [131, 2048])
def test_untrained_and_all_kept_it_is_plain_attention(form, w):
    q, k, v, _ = inputs(131, dtype=torch.float32)
    bias = dma_bias(v, nn.Linear(16, 2, bias=False), torch.zeros(2), form)
    assert (bias == (form == "exp")).all()
    want = fv.attention(q, k, v, is_causal=True)
    torch.testing.assert_close(dma_attention(q, k, v, bias, w), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("w", [20, 500])
def test_a_constant_on_all_biases_changes_nothing(w):
    q, k, v, bias = inputs(131)
    moved = dma_attention(q, k, v, bias + torch.tensor([3.0, -8.0])[:, None], w)
    torch.testing.assert_close(moved, dma_attention(q, k, v, bias, w), atol=1e-12, rtol=0)


def test_bfloat16_and_strides():
    q, k, v, bias = inputs(131, dtype=torch.float32)
    want = dma_attention(q, k, v, bias, 20)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, bias)]
    assert torch.equal(dma_attention(*turned, 20), want)
    low = dma_attention(*(t.bfloat16() for t in (q, k, v)), bias, 20)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("form", ["linear", "exp"])
def test_gradients_are_finite_differences(form):
    q, k, v, _ = inputs(9, batch=1, dim=3)
    weight, a = 0.5 * normal(2, 6, seed=7), torch.tensor([0.7, -0.4], dtype=torch.float64)

    def run(q, k, v, weight, a):
        proj = nn.Linear(6, 2, bias=False).double()
        out = torch.func.functional_call(_Bias(proj, form), {"proj.weight": weight, "a": a}, (v,))
        return dma_attention(q, k, v, out, 4)

    assert topw_prefix_selector(dma_bias(v, _linear(weight), a, form), 4).area < 2 * 45
    leaves = [t.requires_grad_() for t in (q, k, v, weight, a)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


class _Bias(nn.Module):
    def __init__(self, proj, form):
        super().__init__()
        self.proj, self.form, self.a = proj, form, nn.Parameter(torch.zeros(2).double())

    def forward(self, v):
        return dma_bias(v, self.proj, self.a, self.form)


def _linear(weight):
    made = nn.Linear(*reversed(weight.shape), bias=False).double()
    made.weight.data = weight.detach()
    return made


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_keys_never_kept_get_no_gradient_and_others_do(engine):
    q, k, v, bias = (t.requires_grad_() for t in inputs(131, dtype=torch.float32))
    kept = topw_prefix_selector(bias, 7)
    seen = torch.stack([kept.at(i) for i in range(131)]).any(0)  # (B, Hkv, M)
    assert not seen.all()
    (dma_attention(q, k, v, bias, 7, engine=engine) * normal(2, 4, 131, 8, seed=9).float()).sum().backward()
    for t in (k, v, bias):
        assert not t.grad[~seen].any()
    assert (bias.grad[seen] != 0).float().mean() > 0.9


def test_the_native_engine_gives_the_bias_the_reference_gradient():
    found = []
    for dtype, engine in ((torch.float32, "native"), (torch.float64, "reference")):
        q, k, v, bias = (t.requires_grad_() for t in inputs(200, dtype=dtype))
        (
            dma_attention(q, k, v, bias, 40, engine=engine) * normal(2, 4, 200, 8, seed=9).to(dtype)
        ).sum().backward()
        found.append([t.grad.double() for t in (q, k, v, bias)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-4)


def test_training_reaches_every_parameter():
    torch.manual_seed(0)
    layer = DynamicMaskAttention(32, 4, 2, keep_window=10)
    x = torch.randn(2, 50, 32)
    layer(x).square().sum().backward()
    assert layer.A.grad.all()
    assert not layer.dt_proj.weight.grad.any()  # A = 0: only A learns at first
    layer.zero_grad()
    nn.init.constant_(layer.A, 0.5)
    layer(x).square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


# ------------------------------------------------------------------------------------------------ decoding
@pytest.mark.parametrize("form", ["linear", "exp"])
@pytest.mark.parametrize("w", [1, 8, 40])
def test_decoding_equals_the_parallel_form(form, w):
    torch.manual_seed(1)
    layer = DynamicMaskAttention(24, 4, 2, keep_window=w, form=form).double()
    nn.init.normal_(layer.A)
    x, rope = normal(2, 37, 24), torch.arange(37)[:, None] / torch.tensor([1.0, 10.0, 100.0])
    full = layer(x, rope)
    for cuts in (list(range(38)), [0, 20, 37], [0, 1, 30, 31, 37]):
        state, parts = layer.initial_state(x), []
        for a, b in itertools.pairwise(cuts):
            out, state = layer(x[:, a:b], rope[a:b], state)
            parts.append(out)
            assert state.seen == b
            assert state.k.shape[2] == min(w, b)
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=0)
        v = layer.v_proj(x).unflatten(2, (2, 6)).transpose(1, 2)
        last = topw_prefix_selector(layer.bias(v), w).at(36)
        assert torch.equal(state.positions, last.nonzero()[:, 2].view(2, 2, -1))


def test_the_cache_holds_w_keys():
    k, bias = normal(1, 2, 300, 16, dtype=torch.float32), normal(1, 2, 300, dtype=torch.float32)
    cache = DMACache.empty(k, k, bias, 32)
    before = cache.update(k[:, :, :100], k[:, :, :100], bias[:, :, :100])
    cache = before.update(k[:, :, 100:], k[:, :, 100:], bias[:, :, 100:])
    assert cache.nbytes == before.nbytes == 2 * 32 * (2 * 16 * 4 + 4 + 8)
    for h in range(2):
        at = cache.positions[0, h]
        assert torch.equal(cache.k[0, h], k[0, h, at])
        assert torch.equal(cache.bias[0, h], bias[0, h, at])
        assert set(at.tolist()) == best(bias[0, h].tolist(), 299, 32)


# --------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_argument():
    q, k, v, bias = inputs(9)
    with pytest.raises(TypeError, match=r"bias must be a floating point tensor .* got torch.int64"):
        topw_prefix_selector(bias.long(), 3)
    for w in (0, 2.0, True):
        with pytest.raises(ValueError, match="w must be an int >= 1, got"):
            topw_prefix_selector(bias, w)
    with pytest.raises(ValueError, match="offset must be an int, 0 <= offset < 9 keys, got 9"):
        topw_prefix_selector(bias, 3, 9)
    with pytest.raises(ValueError, match=r"bias must be \(B, Hkv, M\).*N <= M; got \(2, 2, 8\)"):
        dma_attention(q, k, v, bias[:, :, 1:], 3)
    with pytest.raises(ValueError, match="got q"):
        topw_prefix_selector(bias, 3).attend(q[:, :, 1:], k, v, bias)
    with pytest.raises(ValueError, match="multiple of 2 key/value heads, got 3"):
        topw_prefix_selector(bias, 3).layout(3)
    with pytest.raises(ValueError, match="form must be one of linear, exp, got 'log'"):
        dma_bias(v, nn.Linear(16, 2), torch.zeros(2), "log")
    for arguments, says in (
        ({"heads": 3, "kv_heads": 2}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"heads": 5}, "d_model must be a multiple of heads, got 32 and 5"),
        ({"heads": 4, "keep_window": 0}, "keep_window must be an int >= 1, got 0"),
        ({"heads": 4, "form": "x"}, "form must be one of linear, exp, got 'x'"),
    ):
        with pytest.raises(ValueError, match=says):
            DynamicMaskAttention(32, **arguments)
    with pytest.raises(ValueError, match=r"rope must have shape \(9, 4\)"):
        DynamicMaskAttention(32, 4)(torch.randn(1, 9, 32), torch.zeros(8, 4))
