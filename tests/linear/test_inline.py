"""InLine attention against its explicit weights, its causal form against a loop, and the probes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from foveate.linear import (
    CausalInLine,
    inline_attention,
    inline_weights,
    local_mass,
    query_confusion,
)

PHI = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "exp": lambda x: torch.exp(x / 5),
}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(n=37, m=41, heads=4, kv_heads=2, dim=8, dv=6, batch=2):
    return (
        normal(batch, heads, n, dim, seed=1),
        normal(batch, kv_heads, m, dim, seed=2),
        normal(batch, kv_heads, m, dv, seed=3),
    )


def explicit(q, k, feature="identity", scale=None):
    """w_ij, one number after another."""
    c = q.shape[-1] ** -0.5 if scale is None else scale
    phi = PHI[feature]
    heads = q.shape[1] // k.shape[1]
    w = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = phi(k[b, h // heads])
        scores = c * keys @ phi(q[b, h, i])
        w[b, h, i] = (scores - scores.mean() + 1) / len(keys)
    return w


# -------------------------------------------------------------------------------------------------- the operator
@pytest.mark.parametrize("feature", list(PHI))
@pytest.mark.parametrize(("n", "m"), [(7, 11), (1, 5), (5, 1)])
def test_linear_time_equals_the_explicit_weights(n, m, feature):
    q, k, v = inputs(n, m)
    w = explicit(q, k, feature)
    torch.testing.assert_close(inline_weights(q, k, feature=feature), w, atol=1e-13, rtol=0)
    want = w @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(inline_attention(q, k, v, feature=feature), want, atol=1e-13, rtol=0)
    other = explicit(q, k, feature, 0.7) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(
        inline_attention(q, k, v, feature=feature, scale=0.7), other, atol=1e-13, rtol=0
    )
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]), atol=1e-13, rtol=0)


def test_a_constant_added_to_the_keys_changes_nothing():
    q, k, v = inputs()
    shift = normal(1, 2, 1, 8, seed=7)
    want = inline_attention(q, k, v)
    torch.testing.assert_close(inline_attention(q, k + shift, v), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(inline_weights(q, k + shift), inline_weights(q, k), atol=1e-12, rtol=0)
    far = inline_attention(q.float(), k.float() + 1000 * shift.float(), v.float()).double()
    assert (far - want).abs().max() < 1e-3  # keys far from 0 lose what float32 loses there, no more


def test_constant_values_give_themselves_and_no_query_the_mean():
    q, k, v = inputs()
    same = v[:, :, :1].expand_as(v)
    want = same[:, :, :1].repeat_interleave(2, 1).expand(2, 4, 37, 6)
    torch.testing.assert_close(inline_attention(q, k, same), want, atol=1e-13, rtol=0)
    mean = v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 37, 6)
    torch.testing.assert_close(inline_attention(0 * q, k, v), mean, atol=1e-13, rtol=0)


def divisive(q, k):
    """Weights of linear attention with a ReLU map that divides by their sum."""
    scores = q.clamp(min=0) @ k.clamp(min=0).mT
    return scores / scores.sum(-1, keepdim=True)


def test_a_longer_query_gets_other_weights_unlike_with_division():
    q, k, _ = inputs(kv_heads=4)
    w, longer = inline_weights(q, k), inline_weights(2 * q, k)
    assert ((longer - w).abs().amax(-1) > 1e-3).all()
    torch.testing.assert_close(divisive(2 * q, k), divisive(q, k), atol=1e-14, rtol=0)
    flat = k.clone()
    flat[..., 0] = 3.0  # centred keys are orthogonal to the first axis
    along = torch.zeros_like(q)
    along[..., 0] = q[..., 0]
    torch.testing.assert_close(
        inline_weights(2 * along, flat), inline_weights(along, flat), atol=1e-14, rtol=0
    )


def test_bfloat16_sums_in_float32():
    q, k, v = (t.bfloat16() for t in inputs(16, 20_000, heads=2))
    k = k + 3  # a mean that bfloat16 sums would lose
    want = inline_attention(q.double(), k.double(), v.double())
    got = inline_attention(q, k, v)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=2**-8)  # one rounding, at the end


@pytest.mark.parametrize("feature", ["identity", "exp"])
def test_gradients(feature):
    leaves = [t.requires_grad_() for t in inputs(5, 7, batch=1)]
    torch.autograd.gradcheck(
        lambda q, k, v: inline_attention(q, k, v, feature=feature), leaves, fast_mode=True
    )
    leaves = [t.detach().requires_grad_() for t in inputs(7, 7, batch=1)]
    torch.autograd.gradcheck(CausalInLine(feature, chunk=3), leaves, fast_mode=True)


# ----------------------------------------------------------------------------------------------- the causal form
@pytest.mark.parametrize("feature", list(PHI))
@pytest.mark.parametrize(("n", "chunk"), [(1, 64), (37, 64), (67, 16)])
def test_every_prefix_is_the_whole_form_of_its_keys(n, chunk, feature):
    q, k, v = inputs(n, n)
    got = CausalInLine(feature, 0.4, chunk)(q, k, v)
    for i in range(n):
        seen = slice(0, i + 1)
        w = explicit(q[:, :, i : i + 1], k[:, :, seen], feature, 0.4) if i < 3 else None
        want = inline_attention(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen], feature=feature, scale=0.4)
        torch.testing.assert_close(got[:, :, i : i + 1], want, atol=1e-12, rtol=0)
        if w is not None:
            torch.testing.assert_close(
                got[:, :, i : i + 1], w @ v[:, :, seen].repeat_interleave(2, 1), atol=1e-12, rtol=0
            )


@pytest.mark.parametrize("cuts", [[0, 20, 37], list(range(38)), [0, 1, 1, 30, 37]])
def test_segments_equal_the_whole_with_a_state_of_fixed_size(cuts):
    q, k, v = inputs(37, 37)
    op = CausalInLine()
    state, parts = op.initial_state(q, k, v), []
    size = state.nbytes
    for a, b in itertools.pairwise(cuts):
        out, after = op(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state=state)
        assert torch.equal(op(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state=state)[0], out)
        state = after
        parts.append(out)
        assert state.products.position == b
        assert state.nbytes == size == 8 * 2 * 2 * (8 * 6 + 8 + 6)
    torch.testing.assert_close(torch.cat(parts, 2), op(q, k, v), atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------- the probes
def test_confusion_finds_the_pairs_that_share_their_weights():
    q, k, _ = inputs(6, 41, kv_heads=4)
    scaled = torch.cat([q, 2 * q, 5 * q], 2)  # of 18 queries, 3 pairs of each of 6 directions
    assert query_confusion(divisive(scaled, k)) == pytest.approx(18 / math.comb(18, 2))
    assert query_confusion(inline_weights(scaled, k)) == 0
    w = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.0, 1.0]], dtype=torch.float64)[None, None]
    assert query_confusion(w, 0.19) == 0
    assert query_confusion(w, 0.21) == pytest.approx(1 / 3)
    assert query_confusion(w, 1.01) == 1


@pytest.mark.parametrize(("grid", "radius"), [((5, 7), 1), ((4, 4), 0), ((3, 6), 2)])
def test_local_mass_counts_neighbours(grid, radius):
    n = grid[0] * grid[1]
    w, total = normal(2, 3, n, n), 0.0
    for b, h, i, j in itertools.product(range(2), range(3), range(n), range(n)):
        (y, x), (s, t) = divmod(i, grid[1]), divmod(j, grid[1])
        total += float(w[b, h, i, j]) if max(abs(y - s), abs(x - t)) <= radius else 0.0
    assert local_mass(w, grid, radius) == pytest.approx(total / (6 * n))


def test_errors_name_the_argument():
    q, k, v = inputs()
    for call in (lambda: inline_attention(q, k, v, feature="tanh"), lambda: CausalInLine("tanh")):
        with pytest.raises(
            ValueError, match="feature must be one of identity, relu, leakyrelu, exp, got 'tanh'"
        ):
            call()
    for wrong in ((q[:, :3], k, v), (q, k, v[:, :, 1:]), (q[..., :4], k, v), (q, k[:, :, :0], v[:, :, :0])):
        with pytest.raises(ValueError, match=r"q must be \(B, H, N, D\), k \(B, Hkv, M, D\)"):
            inline_attention(*wrong)
    with pytest.raises(ValueError, match="as many queries as keys are accepted, got 37 and 41"):
        CausalInLine()(q, k, v)
    with pytest.raises(ValueError, match=r"weights must be .* with N >= 2, got"):
        query_confusion(torch.ones(1, 1, 1, 4))
    with pytest.raises(
        ValueError, match=r"weights must be \(B, H, 6, 6\) for grid \(2, 3\), got \(1, 1, 6, 5\)"
    ):
        local_mass(torch.ones(1, 1, 6, 5), (2, 3))
    with pytest.raises(ValueError, match="radius must be >= 0, got -1"):
        local_mass(torch.ones(1, 1, 6, 6), (2, 3), -1)
