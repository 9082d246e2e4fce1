"""Selective temperatures against loops over the formulas in float64, and what must hold of the rows they change."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from foveate.layers import (
    SelectiveSelfAttention,
    SelectiveTemperature,
    SelfAttention,
    TransformerLM,
    selective_attention,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def taus(*shape, seed=0):
    return 0.2 + 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(layer, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.5 * torch.randn(p.shape)
    return layer.double()


# ------------------------------------------------------------------------------------------------ the operator
@pytest.mark.parametrize(("n", "m", "heads", "kv"), [(13, 13, 4, 2), (5, 17, 2, 2), (31, 31, 3, 1)])
def test_it_is_the_formula(n, m, heads, kv):
    q, k, v = normal(2, heads, n, 6, seed=1), normal(2, kv, m, 6, seed=2), normal(2, kv, m, 5, seed=3)
    tq, tk, tv = taus(2, heads, n, seed=4), taus(2, kv, m, seed=5), taus(2, kv, m, seed=6)
    out = selective_attention(q, k, v, tq, tk, tv)
    for b, h in itertools.product(range(2), range(heads)):
        g = h // (heads // kv)
        logits = (tq[b, h, :, None] * q[b, h]) @ (tk[b, g, :, None] * k[b, g]).T / math.sqrt(6)
        logits = logits.masked_fill(torch.ones(n, m).triu(m - n + 1).bool(), -torch.inf)
        torch.testing.assert_close(
            out[b, h], logits.softmax(-1) @ (tv[b, g, :, None] * v[b, g]), atol=1e-12, rtol=0
        )


def test_factors_of_1_are_plain_attention():
    q, k, v = (normal(2, 4, 67, 8, seed=s, dtype=torch.float32) for s in (1, 2, 3))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    one = torch.ones(2, 4, 67)
    for factors in ((), (one, one, one)):
        torch.testing.assert_close(selective_attention(q, k, v, *factors), want, atol=1e-6, rtol=0)


def test_a_rows_factor_changes_its_row_only_and_sharpens_it():
    q, k = normal(1, 2, 31, 8, seed=1), normal(1, 2, 31, 8, seed=2)
    v = torch.eye(31).double().expand(1, 2, 31, 31)  # the output is the weights
    plain, before = selective_attention(q, k, v), None
    for t in (0.0, 0.3, 1.0, 1.7, 4.0, 40.0):
        tau = torch.ones(1, 2, 31).double()
        tau[:, :, 20] = t
        weights = selective_attention(q, k, v, tau)
        others = torch.arange(31) != 20
        torch.testing.assert_close(weights[:, :, others], plain[:, :, others], atol=1e-12, rtol=0)
        entropy = torch.special.entr(weights[:, :, 20]).sum(-1)
        assert before is None or (entropy <= before + 1e-12).all()
        before = entropy
        if t == 0:
            torch.testing.assert_close(weights[0, 0, 20, :21], torch.full((21,), 1 / 21).double())


def test_values_factors_scale_contributions_and_not_weights():
    q, k, v = (normal(1, 2, 19, 8, seed=s) for s in (1, 2, 3))
    a, b = taus(1, 2, 19, seed=4), taus(1, 2, 19, seed=5)
    one, two = selective_attention(q, k, v, tau_v=a), selective_attention(q, k, v, tau_v=b)
    torch.testing.assert_close(
        selective_attention(q, k, v, tau_v=2 * a - 3 * b), 2 * one - 3 * two, atol=1e-12, rtol=0
    )
    ones = torch.ones_like(v)
    found = selective_attention(q, k, ones, taus(1, 2, 19, seed=6), taus(1, 2, 19, seed=7))
    torch.testing.assert_close(found, ones, atol=1e-12, rtol=0)  # rows add up to 1


# --------------------------------------------------------------------------------------------- the temperature
@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("position", ["loglog", "sigmoid", None])
def test_the_temperature_is_the_formula(position, token):
    tau = stirred(SelectiveTemperature(3, 5, token=token, position=position)).requires_grad_(False)
    y, at = normal(2, 3, 7, 5, seed=1), torch.tensor([0, 1, 2, 3, 10, 100, 1023])
    got = tau(y, at)
    b = None if tau.b is None else float(tau.b)
    rate = {
        "loglog": lambda: math.exp(-math.exp(b)),
        "sigmoid": lambda: 1 / (1 + math.exp(-b)),
        None: lambda: 0.0,
    }
    for r, h, i in itertools.product(range(2), range(3), range(7)):
        want = 1 + rate[position]() * math.log(int(at[i]) + 1)
        if token:
            gelu = [0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in y[r, h, i].tolist()]
            f = math.fsum(a * w for a, w in zip(gelu, tau.weight[h].tolist(), strict=True)) + float(
                tau.bias[h]
            )
            want += math.tanh(f)
        assert math.isclose(float(got[r, h, i]), want, rel_tol=1e-12)
    rows = torch.stack([at, at.flip(0)])
    assert torch.equal(tau(y, rows)[1], tau(y, at.flip(0))[1])
    assert (got > 0).all()


def test_starts():
    y, at = normal(1, 2, 1024, 4, dtype=torch.float32), torch.arange(1024)
    for init, at_1024, rate in ((2.0, 1.0043, 0.0006), (1.5, 1.078, 0.011)):
        tau = SelectiveTemperature(2, 4, init=init).requires_grad_(False)(y, at)
        assert (tau[..., 0] == 1).all()
        assert abs(float(tau[0, 0, -1]) - at_1024) < 6e-4
        assert abs(math.exp(-math.exp(init)) - rate) < 5e-4
        slope = (tau[0, 0, 1:] - 1) / torch.arange(2, 1025).log()
        torch.testing.assert_close(slope, slope[-1:].expand(1023), atol=1e-6, rtol=0.01)
    assert (SelectiveTemperature(2, 4, position=None)(y, at) == 1).all()
    half = SelectiveTemperature(2, 4, position="sigmoid")(y, at)
    torch.testing.assert_close(half[0, 1], 1 + 0.5 * torch.arange(1, 1025).log())


# --------------------------------------------------------------------------------------------------- the layer
def both(**arguments):
    torch.manual_seed(0)
    layer = SelectiveSelfAttention(24, 4, 2, **arguments).double()
    plain = SelfAttention(24, 4, 2, window=arguments.get("window")).double()
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if "proj" in n})
    return layer, plain


def test_it_starts_as_the_plain_layer():
    x = normal(2, 37, 24)
    for window in (None, 9):
        layer, plain = both(position=None, key=True, window=window)
        torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=0)
        assert not torch.equal(stirred(layer)(x), plain(x))


def test_the_layer_is_the_formula():
    layer = stirred(SelectiveSelfAttention(24, 4, 2, key=True, rotary=False, position="sigmoid"))
    x, at = normal(2, 11, 24), torch.arange(11)
    q, k, v = (p(x).unflatten(2, (-1, 6)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    tq, tk, tv = layer.tau_q(q, at), layer.tau_k(k, at), layer.tau_v(v, at)
    out = selective_attention(q, k, v, tq, tk, tv).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.o_proj(out), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_equals_the_whole(window):
    layer = stirred(SelectiveSelfAttention(24, 4, 2, key=True, window=window, position="sigmoid"))
    x = normal(2, 23, 24)
    full = layer(x)
    for cuts in ([0, 11, 23], range(24)):
        state, parts = layer.initial_state(x), []
        for a, b in itertools.pairwise(cuts):
            out, state = layer(x[:, a:b], state=state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=0)
        assert state.k.shape[2] == (23 if window is None else 4)


def test_gradients_bfloat16_and_strides():
    tau = stirred(SelectiveTemperature(2, 3, position="sigmoid"))
    q, k, v = (normal(1, 2, 7, 3, seed=s).requires_grad_() for s in (1, 2, 3))
    weights = [p.detach().requires_grad_() for p in tau.parameters()]
    names = [n for n, _ in tau.named_parameters()]

    def run(q, k, v, *weights):
        t = torch.func.functional_call(tau, dict(zip(names, weights, strict=True)), (q, torch.arange(7)))
        return selective_attention(q, k, v, t, tau_v=t)

    assert torch.autograd.gradcheck(run, (q, k, v, *weights), fast_mode=True)
    layer = stirred(SelectiveSelfAttention(32, 4, position="sigmoid")).float()
    x = normal(2, 67, 32, dtype=torch.float32)
    want = layer(x).detach()
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(layer(turned), want, atol=1e-6, rtol=0)
    low = layer.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, atol=0.06 * float(want.abs().max()), rtol=0)


def test_in_a_language_model_every_parameter_learns():
    torch.manual_seed(0)
    model = TransformerLM(11, 32, 2, lambda layer: SelectiveSelfAttention(32, 4, key=True))
    model(torch.arange(40).remainder(11)[None]).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_errors_name_the_argument():
    q = normal(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"tau_v must broadcast to \(1, 2, 5\), got \(1, 2, 4\)"):
        selective_attention(q, q, q, tau_v=torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match=r"tau_q must broadcast to \(1, 2, 5\), got \(1, 1, 2, 5\)"):
        selective_attention(q, q, q, torch.ones(1, 1, 2, 5))
    with pytest.raises(ValueError, match="position must be one of loglog, sigmoid or None, got 'log'"):
        SelectiveTemperature(2, 4, position="log")
    with pytest.raises(ValueError, match="dim must be a multiple of heads"):
        SelectiveSelfAttention(30, 4)
