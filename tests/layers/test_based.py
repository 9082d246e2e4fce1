"""Based: its layers against loops in float64, the layer plan, and the bytes that decoding holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from foveate.layers import (
    BasedLinearAttention,
    BasedLM,
    GatedShortConv,
    TransformerLM,
    based_layout,
    state_bytes,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pieces(layer, x, cuts):
    """The outputs of a layer that is given the tokens in pieces, together."""
    state, parts = layer.initial_state(x), []
    for a, b in itertools.pairwise(cuts):
        out, state = layer(x[:, a:b], state=state)
        parts.append(out)
    return torch.cat(parts, 1), state


# ----------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_linear_layer_is_its_formula(kv_heads):
    torch.manual_seed(0)
    layer = BasedLinearAttention(20, 4, kv_heads, feature_dim=3, chunk=8).double()
    x = normal(2, 37, 20)
    with torch.no_grad():
        q, k, v = (p(x).unflatten(2, (heads, -1)) for p, heads in
                   ((layer.q_proj, 4), (layer.k_proj, kv_heads), (layer.v_proj, kv_heads)))  # fmt: skip
        rows = []
        for b, t in itertools.product(range(2), range(37)):
            heads = []
            for h in range(4):
                g = h // (4 // kv_heads)
                z = (k[b, : t + 1, g] @ q[b, t, h]) / 3**0.5
                w = 1 + z + z**2 / 2
                heads.append((w / w.sum()) @ v[b, : t + 1, g])
            rows.append(layer.o_proj.weight @ torch.cat(heads))
        torch.testing.assert_close(layer(x), torch.stack(rows).view(2, 37, 20), atol=1e-11, rtol=0)


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_the_convolution_is_a_grouped_one(kernel):
    torch.manual_seed(0)
    layer = GatedShortConv(6, kernel=kernel, expand=3).double()
    x = normal(2, 17, 6).transpose(0, 1).contiguous().transpose(0, 1)
    u, gate = layer.in_proj(x).chunk(2, -1)
    mixed = F.conv1d(F.pad(u.mT, (kernel - 1, 0)), layer.conv.weight[:, None], groups=18).mT
    torch.testing.assert_close(layer(x), layer.out_proj(F.silu(mixed) * gate), atol=1e-11, rtol=0)


@pytest.mark.parametrize("cuts", [[0, 1, 2, 30, 37], list(range(38)), [0, 37]])
@pytest.mark.parametrize(
    "make", [lambda: BasedLinearAttention(16, 4, 2, feature_dim=5), lambda: GatedShortConv(16)]
)
def test_layers_in_pieces(make, cuts):
    torch.manual_seed(1)
    layer, x = make().double(), normal(2, 37, 16)
    out, state = pieces(layer, x, cuts)
    torch.testing.assert_close(out, layer(x), atol=1e-11, rtol=0)
    assert state.nbytes == layer.initial_state(x).nbytes


def test_it_mixes_in_a_language_model():
    mixers = lambda layer: GatedShortConv(64) if layer == 0 else BasedLinearAttention(64, 2, feature_dim=8)  # noqa: E731
    model = TransformerLM(50, 64, 2, mixers, mlp=0)
    ids = torch.randint(50, (3, 29))
    logits = model(ids)
    assert logits.shape == (3, 29, 50)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ model
def test_the_released_plans():
    plan = based_layout(27)
    assert [i for i, kind in enumerate(plan) if kind == "linear"] == [1, 6, 11, 16, 21, 26]
    assert [i for i, kind in enumerate(plan) if kind == "window"] == [2, 7, 12, 17, 22]
    plan = based_layout(36)
    assert [i for i, kind in enumerate(plan) if kind == "window"] == [2, 7, 12, 17, 22, 28, 34]
    assert [based_layout(n) for n in (1, 2)] == [("conv",), ("conv", "linear")]


@pytest.mark.parametrize("window", [1, 4, 9])
def test_a_window_layer_depends_on_window_plus_one_tokens(window):
    torch.manual_seed(0)
    mixer = BasedLM(9, 8, 1, heads=2, layout=["window"], window=window).double().blocks[0].mixer
    x = normal(1, 23, 8).requires_grad_()
    for t in (0, 3, 9, 22):
        (grad,) = torch.autograd.grad(mixer(x)[0, t].square().sum(), x)
        seen = grad[0].abs().sum(-1).nonzero().flatten().tolist()
        assert seen == list(range(max(0, t - window), t + 1))
        assert len(seen) == min(t, window) + 1


@pytest.mark.parametrize("layout", ["auto", ["linear", "window"], ["window", "conv", "linear", "linear"]])
def test_decoding_gives_the_logits_and_holds_the_bytes_it_says(layout):
    torch.manual_seed(0)
    depth = 4 if layout == "auto" else len(layout)
    model = BasedLM(50, 24, depth, heads=3, layout=layout, window=5, feature_dim=4)
    ids = torch.randint(50, (2, 41))
    whole, state, parts, held = model(ids), model.initial_state(ids), [], []
    for i in range(41):
        logits, state = model.step(ids[:, i : i + 1], state)
        parts.append(logits)
        held.append(state_bytes(state))
        tensors = [t for s in state[1] for t in ([s] if isinstance(s, torch.Tensor) else vars(s).values())]
        own = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        assert held[-1] == model.state_bytes(i + 1, batch=2) == own
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    assert len(set(held[5:])) == 1  # full windows: nothing grows


def test_bytes_are_the_entrys():
    model = BasedLM(50, 1024, 1, heads=16, layout=["linear"], feature_dim=16, mlp=0)
    assert model.state_bytes(10) == model.state_bytes(10**6) == 16 * 153 * (64 + 1) * 4
    model = BasedLM(50, 64, 1, heads=4, layout=["window"], window=128, mlp=0).bfloat16()
    assert model.state_bytes(10**6) == 2 * 128 * 64 * 2
    assert BasedLM(50, 64, 1, heads=4, layout=["linear"], mlp=0).bfloat16().state_bytes(1) == 153 * 68 * 4


def test_errors_name_the_argument():
    for arguments, says in (
        ({"heads": 5}, "dim must be a multiple of heads, and heads of kv_heads; got dim=32, heads=5"),
        ({"heads": 4, "kv_heads": 3}, "got dim=32, heads=4, kv_heads=3"),
        ({"heads": 4, "feature_dim": 0}, "feature_dim must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=says):
            BasedLinearAttention(32, **arguments)
    with pytest.raises(ValueError, match="kernel and expand must be >= 1, got kernel=0"):
        GatedShortConv(8, kernel=0)
    for layout in ("conv", ["conv"], ["conv", "gru"]):
        with pytest.raises(ValueError, match='layout must be "auto" or 2 of linear, window, conv, got'):
            BasedLM(50, 32, 2, heads=2, layout=layout)
    for window in (0, 2.0, True):
        with pytest.raises(ValueError, match="window must be an int >= 1, got"):
            BasedLM(50, 32, 2, heads=2, window=window)
