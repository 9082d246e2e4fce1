"""Complex-vector attention against the cosine sum of every pair, and what must hold of its angles."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from foveate.core.rotary import Rotary
from foveate.hf import convert_rope_model
from foveate.layers import (
    ComplexAttention,
    SelfAttention,
    TransformerLM,
    complex_rotate,
    complex_turn,
    near_branch_cut,
)


def normal(*shape, seed=0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cosine_sum(
    q: Tensor, k: Tensor, delta: Tensor, bias: Tensor, m: int, n: int, base: float = 10_000.0
) -> float:
    """The score of one pair from the entry's first formula; q, k (D,), delta, bias (D/2,)."""
    h = len(q) // 2
    total = 0.0
    for c in range(h):
        a, b = complex(q[c], q[c + h]), complex(k[c], k[c + h])
        angle = delta[c] * (cmath.phase(a) - cmath.phase(b)) + bias[c] + (m - n) * base ** (-c / h)
        total += abs(a) * abs(b) * math.cos(angle)
    return total


def written(layer: ComplexAttention, x: Tensor, scale: float) -> Tensor:
    """The layer on one row x (N, dim), pair by pair."""
    d, group, n = layer.head_dim, layer.heads // layer.kv_heads, len(x)
    out = []
    for h in range(layer.heads):
        g = h // group
        q, k, v = (x @ p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k, v = q[:, h * d : h * d + d], k[:, g * d : g * d + d], v[:, g * d : g * d + d]
        rows = []
        for i in range(n):
            seen = [j for j in range(n) if j <= i or not layer.causal]
            if layer.window is not None:
                seen = [j for j in seen if j > i - layer.window]
            scores = [
                scale * cosine_sum(q[i], k[j], layer.delta[g], layer.angle[h], i, j, layer.rotary.base)
                for j in seen
            ]
            rows.append(torch.tensor(scores, dtype=torch.float64).softmax(0) @ v[seen])
        out.append(torch.stack(rows))
    return torch.cat(out, 1) @ layer.o_proj.weight.T


# ------------------------------------------------------------------------------------------------ the factorised form
@pytest.mark.parametrize("dim", [2, 6, 16])
def test_the_product_of_turned_vectors_is_the_cosine_sum(dim):
    q, k = normal(1, 3, 7, dim, seed=1), normal(1, 3, 11, dim, seed=2)
    delta, bias = 1 + normal(3, dim // 2, seed=3), normal(3, dim // 2, seed=4)
    at, to = torch.arange(40, 47), torch.arange(30, 41)
    scores = complex_rotate(q, delta, at, bias) @ complex_rotate(k, delta, to).transpose(-1, -2)
    for h in range(3):
        for i in range(7):
            for j in range(11):
                expected = cosine_sum(q[0, h, i], k[0, h, j], delta[h], bias[h], 40 + i, 30 + j)
                assert float(scores[0, h, i, j]) == pytest.approx(expected, abs=1e-6)


def test_one_and_zero_are_rotary_attention():
    x, at = normal(2, 3, 13, 8), torch.arange(100, 113)
    one, zero = torch.ones(3, 4), torch.zeros(3, 4)
    torch.testing.assert_close(complex_rotate(x, one, at, zero), Rotary()(x, at), rtol=0, atol=1e-7)
    torch.manual_seed(0)
    ours, plain = ComplexAttention(24, 3).double(), SelfAttention(24, 3).double()
    plain.load_state_dict({n: p for n, p in ours.state_dict().items() if "proj" in n})
    x = normal(2, 13, 24)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-6)


def test_only_distances_count():
    q, k, delta = normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, 8, seed=2), normal(2, 4, seed=3)
    near, far = (
        complex_rotate(q, delta, at) @ complex_rotate(k, delta, at).transpose(-1, -2)
        for at in (torch.arange(5), torch.arange(100, 105))
    )
    torch.testing.assert_close(near, far)
    moved = complex_rotate(q, delta, torch.arange(1, 6)) @ complex_rotate(
        k, delta, torch.arange(5)
    ).transpose(-1, -2)
    assert not torch.allclose(near, moved, atol=0.1)


def test_without_delta_phases_do_not_count():
    x, at, zero = normal(1, 2, 5, 8), torch.arange(5), torch.zeros(2, 4)
    a, b = x.chunk(2, -1)
    spun = torch.cat([a * math.cos(1.3) - b * math.sin(1.3), a * math.sin(1.3) + b * math.cos(1.3)], -1)
    torch.testing.assert_close(complex_rotate(x, zero, at), complex_rotate(spun, zero, at))
    assert not torch.allclose(complex_rotate(x, zero + 0.5, at), complex_rotate(spun, zero + 0.5, at))


@pytest.mark.parametrize("factor", [0.01, 3.0, 100.0])
def test_scaled_queries_scale_scores(factor):
    x, delta = normal(1, 2, 5, 8), normal(2, 4, seed=3)
    torch.testing.assert_close(
        complex_turn(factor * x, delta), factor * complex_turn(x, delta), rtol=1e-5, atol=1e-6
    )


# ----------------------------------------------------------------------------------------------------------- the layer
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kv_heads": 2},
        {"window": 4, "scale": 1.0},
        {"causal": False, "base": 100.0},
        {"start": "random", "kv_heads": 1},
    ],
)
def test_the_layer_is_its_formula(more):
    torch.manual_seed(1)
    layer = ComplexAttention(24, 4, **more).double()
    with torch.no_grad():
        layer.delta.add_(0.3 * normal(*layer.delta.shape, seed=5))
        layer.angle.add_(normal(*layer.angle.shape, seed=6))
        x = normal(2, 11, 24, seed=7)
        for row, out in zip(x, layer(x), strict=True):
            torch.testing.assert_close(
                out, written(layer, row, more.get("scale", 6**-0.5)), rtol=1e-6, atol=1e-6
            )


def test_gradients_are_finite_differences():
    layer = ComplexAttention(8, 2, kv_heads=1, start="random").double()
    x = normal(1, 5, 8, seed=8)
    names = ["delta", "angle", "q_proj.weight", "k_proj.weight"]
    values = [p.detach().clone().requires_grad_() for name, p in layer.named_parameters() if name in names]
    keys = [name for name, _ in layer.named_parameters() if name in names]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(keys, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values))


def test_zero_tokens_have_finite_gradients():
    x = torch.zeros(1, 2, 3, 8, requires_grad=True)
    complex_turn(x, torch.full((2, 4), 0.7)).sum().backward()
    assert bool(x.grad is not None and torch.isfinite(x.grad).all())


@pytest.mark.parametrize("window", [None, 1, 5])
def test_token_by_token_is_the_whole(window):
    layer = ComplexAttention(16, 2, start="random", window=window).double()
    x = normal(2, 17, 16)
    state, parts = layer.initial_state(x), []
    for piece in (x[:, :7], x[:, 7:9], *x[:, 9:].split(1, 1)):
        out, state = layer(piece, state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x))
    assert state.position == 17
    assert state.k.shape[2] == (17 if window is None else window - 1)


def test_it_mixes_in_a_language_model():
    model = TransformerLM(11, 16, 2, lambda layer: ComplexAttention(16, 2))
    ids = torch.arange(9)[None] % 11
    model(ids).square().mean().backward()
    assert all(block.mixer.delta.grad.abs().max() > 0 for block in model.blocks)  # pyright: ignore


def test_starts():
    torch.manual_seed(0)
    layer = ComplexAttention(256, 4, start="random")
    assert 0.8 < float(layer.delta.detach().std() * 32**0.5) < 1.2
    assert float(layer.angle.abs().max()) == 0
    assert bool((ComplexAttention(8, 2).delta == 1).all())


def test_low_precision_is_computed_in_float32():
    x, delta = normal(1, 2, 9, 8), 1 + 0.3 * normal(2, 4, seed=3)
    low = complex_rotate(x.bfloat16(), delta.float(), torch.arange(1000, 1009))
    exact = complex_rotate(x.bfloat16().double(), delta, torch.arange(1000, 1009))
    assert low.dtype == torch.bfloat16
    assert float((low.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


# -------------------------------------------------------------------------------------------------------- conversion
@pytest.mark.parametrize("kind", [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_a_converted_model_is_the_same_until_its_angles_move(kind):
    config = kind[0](vocab_size=17, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8)  # fmt: skip
    torch.manual_seed(0)
    model, ids = kind[1](config).eval().double(), torch.arange(13)[None]
    before = model(ids).logits
    heads = convert_rope_model(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)
    torch.nn.init.normal_(heads[1].delta)
    torch.nn.init.normal_(heads[1].angle)
    changed = model(ids).logits
    assert float((changed - before)[:, 1:].abs().max()) > 1e-4
    changed.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for h in heads for p in h.parameters())
    assert "model.layers.0.self_attn.complex_heads.delta" in model.state_dict()
    cached = model(ids[:, :9], use_cache=True)
    last = model(ids[:, 9:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(last, changed[:, 9:], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="already"):
        convert_rope_model(model)


def test_a_converted_layer_is_the_layer():
    config = LlamaConfig(vocab_size=5, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=6)  # fmt: skip
    model = LlamaForCausalLM(config).eval().double()
    (heads,) = convert_rope_model(model)
    layer = ComplexAttention(24, 4, kv_heads=2).double()
    torch.nn.init.normal_(heads.delta)
    torch.nn.init.normal_(heads.angle)
    theirs = model.model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    layer.load_state_dict({f"{n}.weight": getattr(theirs, n).weight for n in names}
                          | {"delta": heads.delta, "angle": heads.angle})  # fmt: skip
    x = normal(1, 11, 24)
    cos_sin = model.model.rotary_emb(x, torch.arange(11)[None])
    torch.testing.assert_close(
        theirs(x, position_embeddings=cos_sin, attention_mask=None)[0], layer(x), rtol=0, atol=1e-5
    )


# ------------------------------------------------------------------------------------------------------------ errors
def test_near_the_cut():
    phase = torch.tensor([3.14, -3.14, 3.0, 0.0])
    x = torch.cat([phase.cos(), phase.sin()]).view(1, 1, 1, 8)
    assert near_branch_cut(x).tolist() == [0.5]
    assert near_branch_cut(x, 0.2).tolist() == [0.75]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ComplexAttention(12, 4), r"multiple of 2 \* heads"),
        (lambda: ComplexAttention(16, 4, kv_heads=3), "heads of kv_heads"),
        (lambda: ComplexAttention(16, 4, start="ones"), "start must be one of rope, random, got 'ones'"),
        (lambda: ComplexAttention(16, 4, window=3, causal=False), "needs causal=True"),
        (lambda: complex_turn(torch.zeros(1, 2, 3, 4), torch.zeros(2, 4)), "delta"),
        (lambda: complex_turn(torch.zeros(1, 2, 3, 4), torch.zeros(2, 2), torch.zeros(1, 2)), "bias"),
        (lambda: near_branch_cut(torch.zeros(1, 2, 3, 5)), "D even"),
        (lambda: near_branch_cut(torch.zeros(1, 2, 3, 4), 0.0), "within"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_models_without_rotary_attention_are_refused():
    with pytest.raises(TypeError, match="got Linear"):
        convert_rope_model(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    layer = ComplexAttention(8, 2, causal=False)
    x = torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="state needs causal"):
        layer(x, state=layer.initial_state(x))
