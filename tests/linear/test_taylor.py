"""Taylor linear attention against loops over its weights in float64: feature map, chunks, state."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from foveate.linear import LinearState, TaylorFeatures, taylor, taylor_linear_attention


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(n, batch=2, heads=4, kv_heads=2, f=5, width=3, dtype=torch.float64):
    shapes = ((heads, n, f), (kv_heads, n, f), (kv_heads, n, width))
    return [normal(batch, *shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def empty(k, v):
    return LinearState.empty(TaylorFeatures()(k), v, normalize=True)


def oracle(q, k, v):
    """One batch row and head, lists of numbers: q, k (N, f), v (N, E); also the weights, each row summing to 1."""
    out, weights = [], []
    for t, query in enumerate(q):
        z = [
            math.fsum(a * b for a, b in zip(query, k[j], strict=True)) / math.sqrt(len(query))
            for j in range(t + 1)
        ]
        w = [1 + x + x * x / 2 for x in z]
        weights.append([x / math.fsum(w) for x in w])
        out.append([math.fsum(p * v[j][d] for j, p in enumerate(weights[-1])) for d in range(len(v[0]))])
    return torch.tensor(out, dtype=torch.float64), weights


# ------------------------------------------------------------------------------------------------ feature map
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("f", [1, 2, 7, 16])
def test_the_inner_product_is_the_series(f, packed):
    q, k, features = normal(11, f, seed=1), normal(11, f, seed=2), TaylorFeatures(packed)
    z = (q * k).sum(-1) / math.sqrt(f)
    torch.testing.assert_close((features(q) * features(k)).sum(-1), 1 + z + z**2 / 2, atol=1e-11, rtol=0)
    assert features(q).shape == (11, features.width(f))
    single = (features(q.float()) * features(k.float())).sum(-1)
    torch.testing.assert_close(single.double(), 1 + z + z**2 / 2, atol=1e-5, rtol=1e-6)


def test_widths_and_the_unpacked_order():
    assert (TaylorFeatures().width(16), TaylorFeatures(packed=False).width(16)) == (153, 273)
    x = normal(3, seed=4)
    want = [1.0, *(x / 3**0.25).tolist(), *(float(a * b) / math.sqrt(6) for a in x for b in x)]
    torch.testing.assert_close(TaylorFeatures(packed=False)(x), torch.tensor(want, dtype=torch.float64))
    assert TaylorFeatures()(x.bfloat16()).dtype == torch.float32


# -------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("chunk", [1, 4, 31, 64])
@pytest.mark.parametrize("n", [1, 13, 31])
def test_equals_the_oracle(n, chunk):
    q, k, v = inputs(n)
    out = taylor_linear_attention(q, k, v, chunk=chunk)
    for b, h in ((0, 0), (0, 3), (1, 1), (1, 2)):
        want, weights = oracle(q[b, h].tolist(), k[b, h // 2].tolist(), v[b, h // 2].tolist())
        torch.testing.assert_close(out[b, h], want, atol=1e-11, rtol=0)
        assert all(min(row) > 0 and math.isclose(sum(row), 1) for row in weights)


def test_the_weights_it_uses_are_positive_and_sum_to_one():
    """Values that are unit vectors show the weights."""
    q, k, _ = inputs(37, batch=1)
    weights = taylor_linear_attention(3 * q, 3 * k, torch.eye(37).double().expand(1, 2, 37, 37), chunk=8)
    assert (weights.tril() == weights).all()
    assert (weights[:, :, torch.ones(37, 37).tril() > 0] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 37).double(), atol=1e-11, rtol=0)


def test_chunked_quadratic_and_recurrent_agree_in_float32():
    q, k, v = inputs(389, dtype=torch.float32, f=16, width=8)
    whole = taylor_linear_attention(q, k, v, chunk=389)
    for chunk in (1, 7, 64):
        torch.testing.assert_close(taylor_linear_attention(q, k, v, chunk=chunk), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [4, 100])
def test_equal_logits_give_the_running_mean(chunk):
    q, k, v = inputs(75)
    mean = (v.cumsum(2) / torch.arange(1, 76).double()[:, None]).repeat_interleave(2, 1)
    torch.testing.assert_close(taylor_linear_attention(q, 0 * k, v, chunk=chunk), mean, atol=1e-11, rtol=0)
    torch.testing.assert_close(taylor_linear_attention(0 * q, k, v, chunk=chunk), mean, atol=1e-11, rtol=0)


def test_spans_change_nothing(monkeypatch):
    q, k, v = inputs(131)
    whole, state = taylor_linear_attention(q, k, v, chunk=8, return_state=True)
    monkeypatch.setattr(taylor, "SPAN", 40)
    out, after = taylor_linear_attention(q, k, v, chunk=8, return_state=True)
    torch.testing.assert_close(out, whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(after.kv, state.kv, atol=1e-11, rtol=0)
    for chunk in (8, 64):
        torch.testing.assert_close(taylor_linear_attention(q, k, v, chunk=chunk), whole, atol=1e-11, rtol=0)


def test_bfloat16_and_strides():
    q, k, v = inputs(131, dtype=torch.float32)
    want = taylor_linear_attention(q, k, v)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(taylor_linear_attention(*turned), want)
    low, state = taylor_linear_attention(*(t.bfloat16() for t in (q, k, v)), return_state=True)
    assert (low.dtype, state.kv.dtype) == (torch.bfloat16, torch.float32)
    rounded = taylor_linear_attention(*(t.bfloat16().float() for t in (q, k, v)))
    assert torch.equal(low, rounded.bfloat16())  # rounds once, at the end


def test_gradients_are_finite_differences_also_of_the_state():
    q, k, v = (t.requires_grad_() for t in inputs(9, batch=1, f=3, width=2))
    first = normal(1, 2, TaylorFeatures().width(3), 3, seed=9).requires_grad_()

    def run(q, k, v, first):
        state = LinearState(first[..., :2], first[..., 2].abs() + 5, 4)
        out, after = taylor_linear_attention(q, k, v, chunk=4, state=state)
        return out, after.kv, after.k

    assert torch.autograd.gradcheck(run, (q, k, v, first), fast_mode=True)


# ------------------------------------------------------------------------------------------------------ state
@pytest.mark.parametrize("cuts", [[0, 20, 37], list(range(38)), [0, 0, 1, 30, 31, 37]])
def test_pieces_give_what_the_whole_gives(cuts):
    q, k, v = inputs(37)
    whole, final = taylor_linear_attention(q, k, v, return_state=True)
    state, parts = empty(k, v), []
    for a, b in itertools.pairwise(cuts):
        before = state.kv.clone()
        out, after = taylor_linear_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], chunk=8, state=state)
        assert torch.equal(state.kv, before)
        assert after.nbytes == state.nbytes == 2 * 2 * 21 * (3 + 1) * 8
        parts.append(out)
        state = after
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(state.kv, final.kv, atol=1e-11, rtol=0)
    torch.testing.assert_close(state.k, final.k, atol=1e-11, rtol=0)
    assert state.position == 37


def test_the_state_is_the_sums():
    q, k, v = inputs(23)
    _, state = taylor_linear_attention(q, k, v, chunk=4, return_state=True)
    features = TaylorFeatures()(k)
    torch.testing.assert_close(state.kv, torch.einsum("bhnp,bhne->bhpe", features, v), atol=1e-11, rtol=0)
    torch.testing.assert_close(state.k, features.sum(2), atol=1e-11, rtol=0)


# ----------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_argument():
    q, k, v = inputs(9)
    for wrong in (
        (q[:, :3], k, v),
        (q[:, :, 1:], k, v),
        (q, k[..., 1:], v),
        (q, k, v[:, :, 1:]),
        (q[0], k[0], v[0]),
    ):
        with pytest.raises(ValueError, match=r"q must be \(B, H, N, f\), k .* multiple of Hkv, got \("):
            taylor_linear_attention(*wrong)
    for chunk in (0, 2.0, True):
        with pytest.raises(ValueError, match="chunk must be an int >= 1, got"):
            taylor_linear_attention(q, k, v, chunk=chunk)
    with pytest.raises(ValueError, match=r"state must hold a normaliser.*without one"):
        taylor_linear_attention(q, k, v, state=LinearState.empty(TaylorFeatures()(k), v))
    with pytest.raises(ValueError, match=r"state.kv have shape \(2, 2, 21, 3\), got \(2, 2, 15, 3\)"):
        taylor_linear_attention(q, k, v, state=empty(k[..., 1:], v))
