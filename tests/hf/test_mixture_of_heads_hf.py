"""Head choice by query norms inside a transformers model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.hf import apply_mixture_of_heads
from foveate.layers import route_heads_by_query_norm


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(26).view(2, 13)


def test_all_heads_change_nothing_and_removal_restores(model):
    with torch.no_grad():
        plain = model(IDS).logits
        with apply_mixture_of_heads(model, shared=3, k=5):
            torch.testing.assert_close(model(IDS).logits, plain, atol=0, rtol=0)
        mixture = apply_mixture_of_heads(model)
        changed = model(IDS).logits
        mixture.remove()
        mixture.remove()
        assert (changed - plain).abs().max() > 1e-4
        assert torch.equal(model(IDS).logits, plain)
    assert [g.sum(-1).unique().tolist() for g in mixture.gates.values()] == [[6.0], [6.0]]
    assert all((g[..., :4] == 1).all() for g in mixture.gates.values())


def test_a_head_that_is_off_adds_nothing(model):
    """The first layer's output equals a sum over the heads that its token uses."""
    attention = model.model.layers[0].self_attn
    kept = {}
    hooks = [
        attention.q_proj.register_forward_hook(lambda m, a, out: kept.update(q=out)),
        attention.o_proj.register_forward_pre_hook(lambda m, a: kept.update(heads=a[0])),
        attention.o_proj.register_forward_hook(lambda m, a, out: kept.update(out=out)),
    ]
    with torch.no_grad(), apply_mixture_of_heads(model, shared=2, k=3, layers=[0]) as mixture:
        model(IDS)
    for hook in hooks:
        hook.remove()
    gates = route_heads_by_query_norm(kept["q"].unflatten(-1, (8, 4)).transpose(1, 2), shared=2, k=3)
    assert torch.equal(gates, mixture.gates[0])
    assert list(mixture.gates) == [0]
    heads = kept["heads"].unflatten(-1, (8, 4))  # before this choice: hooks run in the order of registration
    want = sum(
        gates[..., h, None] * (heads[..., h, :] @ attention.o_proj.weight[:, 4 * h : 4 * h + 4].T)
        for h in range(8)
    )
    torch.testing.assert_close(kept["out"], want, atol=1e-6, rtol=0)


def test_decoding_chooses_token_by_token(model):
    with torch.no_grad(), apply_mixture_of_heads(model):
        full = model(IDS).logits
        first = model(IDS[:, :9], use_cache=True)
        rest = model(IDS[:, 9:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), full, atol=1e-5, rtol=0)


def test_queries_learn_through_the_choice(model):
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight[12:16] *= 1e-3  # head 3 is never chosen
    with apply_mixture_of_heads(model, shared=0, k=1) as mixture:
        model(IDS, labels=IDS).loss.backward()
    assert not mixture.gates[0][..., 3].any()
    assert attention.q_proj.weight.grad[12:16].any()


def test_errors_name_the_argument(model):
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        apply_mixture_of_heads(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"shared \+ k must lie in \[1, 8\], both >= 0; got 7 and 2"):
        apply_mixture_of_heads(model, shared=7, k=2)
    with pytest.raises(ValueError, match=r"layers must lie in \[0, 1\], got \[5\]"):
        apply_mixture_of_heads(model, layers=[5])
