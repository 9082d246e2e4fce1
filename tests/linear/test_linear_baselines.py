"""Feature maps and the standard linear mixers: the common suite, and the language model around them."""

from __future__ import annotations

import pytest
import torch

from foveate.catalogue.conformance import checks_of_object
from foveate.layers import (
    BaseConv,
    DeltaNet,
    GatedLinearAttention,
    KernelAttention,
    SelfAttention,
    ShortConv,
    TransformerLM,
)
from foveate.linear import LinearAttention, RandomFeatures, elu_plus_one, linear_attention

LAYERS = {
    "self-attention": lambda: SelfAttention(32, 2),
    "grouped": lambda: SelfAttention(32, 4, 2, bias=True, rotary=False),
    "window": lambda: SelfAttention(32, 2, window=7),
    "gated linear": lambda: GatedLinearAttention(32, 2),
    "deltanet": lambda: DeltaNet(32, 2),
    "deltanet without convolution": lambda: DeltaNet(32, 2, conv=0),
    "gated deltanet": lambda: DeltaNet(32, 2, gated=True),
    "elu+1": lambda: KernelAttention(32, 2),
    "random features": lambda: KernelAttention(32, 2, feature="random"),
    "base conv": lambda: BaseConv(32),
    "short conv": lambda: ShortConv(32, 4, bias=True, activation="silu"),
}
OPERATORS = {
    "elu+1": {},
    "relu, decaying": {"feature": "relu", "log_decay": -0.1},
    "identity": {"feature": "identity", "normalize": False, "chunk": 16},
}


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, id=f"{name}-{step.name}")
        for name, made in LAYERS.items()
        for step in checks_of_object(made, "layer", ["causal", "stateful"], tokens=67)
    ],
)
def test_layers(step):
    step()


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, id=f"{name}-{step.name}")
        for name, arguments in OPERATORS.items()
        for step in checks_of_object(
            LinearAttention, "operator", ["causal", "stateful"], arguments=arguments, tokens=37
        )
    ],
)
def test_operators(step):
    step()


def test_random_features_estimate_the_softmax_kernel():
    q, k = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1)).unbind()
    q, k = 0.6 * q / 8**0.25, 0.6 * k / 8**0.25
    want = (q @ k.T).exp()
    errors = []
    for m in (16, 4096):
        draws = [RandomFeatures.draw(m, 8, seed=s) for s in range(3)]
        errors.append(sum(float(((phi(q) @ phi(k).T - want) / want).abs().median()) for phi in draws) / 3)
    assert errors[1] < min(0.1, errors[0] / 3)
    w = RandomFeatures.draw(16, 8, seed=3).directions
    gram = (w[:8] / w[:8].norm(dim=1, keepdim=True)) @ (w[:8] / w[:8].norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(gram, torch.eye(8), atol=1e-5, rtol=0)
    phi = RandomFeatures.draw(32, 8)
    v = torch.randn(1, 1, 50, 4)
    plain = linear_attention(phi(q)[None, None], phi(k)[None, None], v, normalize=True, eps=0.0)
    shifted = linear_attention(
        phi(q, queries=True)[None, None], phi(k)[None, None], v, normalize=True, eps=0.0
    )
    torch.testing.assert_close(plain, shifted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="features and dim"):
        RandomFeatures.draw(0, 8)


def test_elu_plus_one_is_positive():
    assert bool((elu_plus_one(torch.linspace(-9, 20, 101)) > 0).all())


def test_gated_linear_attention_equals_its_formula():
    layer = GatedLinearAttention(12, 2).double()
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    out = []
    q, k, v = layer.q_proj(x)[0], layer.k_proj(x)[0], layer.v_proj(x)[0]
    a = torch.sigmoid(layer.a_proj(x)[0]) ** (1 / 16)
    for h in range(2):
        s = torch.zeros(3, 6, dtype=torch.float64)
        rows = []
        for t in range(9):
            s = a[t, 3 * h : 3 * h + 3, None] * s + torch.outer(
                k[t, 3 * h : 3 * h + 3], v[t, 6 * h : 6 * h + 6]
            )
            rows.append(q[t, 3 * h : 3 * h + 3] @ s / 3**0.5)
        rows = torch.stack(rows)
        out.append(rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    want = layer.o_proj(torch.cat(out, -1) * torch.nn.functional.silu(layer.g_proj(x)[0]))
    torch.testing.assert_close(layer(x)[0], want)


@pytest.mark.parametrize("gated", [False, True])
def test_deltanet_equals_its_formula(gated):
    layer = DeltaNet(8, 2, conv=3, gated=gated).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    given = []
    for proj, conv in zip(layer.projections, layer.convs, strict=True):
        y = torch.cat([torch.zeros(2, 8, dtype=torch.float64), proj(x)[0]])
        y = torch.stack([sum(conv.weight[:, i] * y[t + i] for i in range(3)) for t in range(9)])
        given.append(torch.nn.functional.silu(y))
    beta = torch.sigmoid(layer.b_proj(x)[0])
    rate = torch.ones(9, 2, dtype=torch.float64)
    if gated:
        rate = (-layer.A.exp() * torch.nn.functional.softplus(layer.a_proj(x)[0])).exp()
    out = []
    for h in range(2):
        q, k, v = (t[:, 4 * h : 4 * h + 4] for t in given)
        q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
        s, rows = torch.zeros(4, 4, dtype=torch.float64), []
        for t in range(9):
            s = rate[t, h] * s
            s = s + beta[t, h] * torch.outer(k[t], v[t] - k[t] @ s)
            rows.append(q[t] @ s / 2)
        rows = torch.stack(rows)
        out.append(rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(layer(x)[0], layer.o_proj(torch.cat(out, -1)))


@pytest.mark.parametrize("name", ["self-attention", "window", "gated linear", "deltanet", "elu+1"])
def test_language_model_steps_equal_the_whole(name):
    torch.manual_seed(0)
    model = TransformerLM(50, 32, 2, lambda layer: LAYERS[name](), norm="layer", positions=40).double()
    ids = torch.randint(50, (2, 31))
    state, parts = model.initial_state(ids), []
    for a, z in ((0, 1), (1, 20), (20, 31)):
        part, state = model.step(ids[:, a:z], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="positions=40"):
        model(torch.randint(50, (1, 41)))


def test_language_model_learns_and_refuses():
    torch.manual_seed(0)
    model = TransformerLM(8, 32, 1, lambda layer: GatedLinearAttention(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.arange(33).remainder(5).repeat(4, 1)
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3
    with pytest.raises(ValueError, match="norm must be"):
        TransformerLM(8, 32, 1, lambda layer: BaseConv(32), norm="batch")
    with pytest.raises(ValueError, match="2 mixers"):
        TransformerLM(8, 32, 1, [BaseConv(32), BaseConv(32)])
    with pytest.raises(ValueError, match="depth"):
        TransformerLM(8, 32, 0, lambda layer: BaseConv(32))
    with pytest.raises(TypeError, match="carries no state"):
        TransformerLM(8, 32, 1, lambda layer: torch.nn.Linear(32, 32)).initial_state(ids)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SelfAttention(32, 3), "multiple of heads"),
        (lambda: GatedLinearAttention(30, 4), "multiples of heads"),
        (lambda: DeltaNet(30, 4), "multiple of heads"),
        (lambda: KernelAttention(30, 4), "multiple of heads"),
        (lambda: KernelAttention(32, 4, feature="cos"), "feature must be"),
        (lambda: ShortConv(8, 0), "kernel"),
        (lambda: LinearAttention("exp"), "feature must be"),
        (lambda: LinearAttention("identity"), "normalize=False"),
        (lambda: LinearAttention(log_decay=0.1), "log_decay"),
    ],
)
def test_wrong_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()
