"""TNL: the layer and the model against their formulas, and decoding with a state of one size."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from foveate.layers import SimpleGLU, TNLAttention, TransformerLM, TransNormerLLM
from foveate.linear import alibi_decay


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def srms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def formula(layer, x, decay):
    """The layer from its parameters, with the N x N map."""
    n, heads, d = x.shape[1], layer.heads, layer.head_dim
    q, k, v = (
        F.silu(x @ p.weight.T).view(len(x), n, heads, d) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if layer.angles is not None:
        for t, h, i in itertools.product(range(n), range(heads), range(d // 2)):
            turn = torch.exp(1j * t * layer.angles[h, i].to(torch.complex128))
            for y in (q, k):
                z = torch.complex(y[:, t, h, i].clone(), y[:, t, h, i + d // 2].clone()) * turn
                y[:, t, h, i], y[:, t, h, i + d // 2] = z.real, z.imag
    apart = torch.arange(n)[:, None] - torch.arange(n)
    mask = torch.exp(-decay.double()[:, None, None] * apart) * (apart >= 0)  # (H, N, N)
    o = torch.einsum("bihd,bjhd,hij,bjhe->bihe", q, k, mask, v).flatten(2)
    first, second = layer.gate
    return srms(o) * torch.sigmoid(x @ first.weight.T @ second.weight.T) @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    ("at", "of", "form"), [(0, 1, "slopes"), (0, 3, "text"), (2, 3, "slopes"), (0, 2, "none")]
)
def test_the_layer_is_the_formula(at, of, form):
    torch.manual_seed(0)
    layer = TNLAttention(24, 4, at, of, decay=form, gate_rank=5, block=4).double()
    assert (layer.angles is not None) == (at == 0)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = normal(2, 13, 24)
    decay = torch.zeros(4) if form == "none" else alibi_decay(4, at, of, form=form)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), formula(layer, x, decay), atol=1e-10, rtol=0)


def test_the_rotation_starts_as_rotary_positions():
    from foveate.core.rotary import Rotary

    layer = TNLAttention(32, 2).double()
    x = normal(1, 2, 9, 16)
    torch.testing.assert_close(layer._rotated(x, 5), Rotary()(x, torch.arange(5, 14)), atol=1e-6, rtol=0)
    layer(normal(1, 9, 32)).square().sum().backward()
    assert layer.angles.grad.any()
    assert TNLAttention(32, 2, 1, 2).angles is None
    assert TNLAttention(32, 2, 1, 2, rotation=True).angles is not None


@pytest.mark.parametrize("variant", ["chunk_loop", "parallel"])
def test_decoding_continues_a_prefix_with_a_state_of_one_size(variant):
    torch.manual_seed(0)
    model = TransNormerLLM(11, 24, 3, 4, block=8, variant=variant).double()
    ids = torch.randint(11, (2, 37))
    full = model(ids)
    for cuts in (list(range(38)), [0, 20, 37], [0, 1, 30, 31, 37]):
        state, parts = model.initial_state(ids), []
        size = sum(s.nbytes for s in state)
        for a, b in itertools.pairwise(cuts):
            out, state = model.step(ids[:, a:b], state)
            parts.append(out)
            assert {s.position for s in state} == {b}
            assert sum(s.nbytes for s in state) == size == 3 * 2 * 4 * 6 * 6 * 8
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=0)


def test_the_model_is_the_formula():
    torch.manual_seed(0)
    model = TransNormerLLM(11, 24, 2, 4, inner=10).double()
    ids = torch.randint(11, (2, 9))
    with torch.no_grad():
        x = model.embed.weight[ids]
        for i, block in enumerate(model.blocks):
            x = x + formula(block.mixer, srms(x), alibi_decay(4, i, 2))
            y = srms(x)
            glu = block.glu
            x = x + ((y @ glu.value.weight.T) * (y @ glu.up.weight.T)) @ glu.down.weight.T
        torch.testing.assert_close(model(ids), srms(x) @ model.head.weight.T, atol=1e-10, rtol=0)
    assert model.head.weight is not model.embed.weight
    assert (
        sum(p.numel() for p in model.parameters())
        == 2 * 11 * 24 + 2 * (4 * 24**2 + 2 * 24 * 6 + 3 * 24 * 10) + 12
    )


def test_it_mixes_any_language_model_and_learns():
    torch.manual_seed(0)
    model = TransformerLM(7, 16, 2, lambda layer: TNLAttention(16, 2, layer, 2))
    ids = torch.randint(7, (4, 6)).repeat(1, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(ids)[:, 6:-1].flatten(0, 1), ids[:, 7:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7  # guessing: 1.95
    out, _ = model.step(ids, model.initial_state(ids))
    torch.testing.assert_close(out, model(ids), atol=1e-4, rtol=0)


def test_bfloat16():
    torch.manual_seed(0)
    layer = TNLAttention(32, 4)
    x = torch.randn(2, 100, 32)
    want = layer(x)
    low, state = layer.bfloat16()(x.bfloat16(), state=layer.initial_state(x.bfloat16()))
    assert low.dtype == torch.bfloat16
    assert state.kv.dtype == torch.float32
    assert (low - want).norm() < 0.05 * want.norm()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim=30, heads=4"):
        TNLAttention(30, 4)
    with pytest.raises(ValueError, match="decay must be one of slopes, text, none; got 'x'"):
        TNLAttention(32, 4, decay="x")
    with pytest.raises(ValueError, match="the rotation needs an even dim / heads, got 12 / 4"):
        TNLAttention(12, 4)
    with pytest.raises(ValueError, match="0 <= layer < layers"):
        TNLAttention(32, 4, 2, 2)
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        TransNormerLLM(11, 32, 0, 4)
    assert SimpleGLU(4, 3)(torch.zeros(2, 4)).shape == (2, 4)
