"""Selective temperatures beside a transformers model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import foveate as fv
from foveate.hf import apply_selective_temperature
from foveate.patterns import SlidingWindow

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.arange(26).view(2, 13)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()


def stir(handle):
    torch.manual_seed(1)
    for p in handle.parameters():
        p.data += 0.5 * torch.randn(p.shape)


def test_zero_weights_without_position_change_nothing_and_removal_restores(model):
    names = set(model.state_dict())
    with torch.no_grad():
        plain = model(IDS).logits
        with apply_selective_temperature(model, position=None) as handle:
            torch.testing.assert_close(model(IDS).logits, plain, atol=0, rtol=0)
            assert len(set(model.state_dict()) - names) == 8
            stir(handle)
            assert (model(IDS).logits - plain).abs().max() > 1e-2
        handle.remove()
        assert torch.equal(model(IDS).logits, plain)
    assert set(model.state_dict()) == names


def test_the_released_form_multiplies_the_logits(model):
    """Position only: every attention layer with its scale times 1 + exp(-exp(b)) log n in the rows."""
    seen = {}
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_hook(lambda m, a, out: seen.update(out=out))
    with torch.no_grad(), apply_selective_temperature(model, token=False, init=0.0) as handle:
        assert len(handle.parameters()) == 2  # one scalar per layer
        model.set_attn_implementation("eager")
        model(IDS, output_attentions=True)
        got = seen["out"][1]
    with torch.no_grad():
        model(IDS, output_attentions=True)
        plain = seen["out"][1]
    hook.remove()
    factor = 1 + torch.exp(torch.tensor(-1.0)) * torch.arange(1, 14).log()
    want = plain.log() * factor[:, None]
    torch.testing.assert_close(got, want.softmax(-1), atol=1e-5, rtol=0)


def test_decoding_and_a_policy_besides(model):
    with torch.no_grad(), apply_selective_temperature(model, position="sigmoid") as handle:
        stir(handle)
        full = model(IDS).logits
        first = model(IDS[:, :9], use_cache=True)
        rest = model(IDS[:, 9:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), full, atol=1e-4, rtol=0)
        with fv.hf.apply(model, SlidingWindow(50)):
            torch.testing.assert_close(model(IDS).logits, full, atol=1e-4, rtol=0)


def test_only_the_new_parameters_learn_in_a_frozen_model(model):
    model.requires_grad_(False)
    with apply_selective_temperature(model) as handle:
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in handle.parameters())


def test_errors_name_the_argument(model):
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        apply_selective_temperature(torch.nn.Linear(2, 2))
    with (
        apply_selective_temperature(model),
        pytest.raises(ValueError, match="already applied to LlamaForCausalLM"),
    ):
        apply_selective_temperature(model)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM normalises its queries after q_proj"):
        apply_selective_temperature(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)))
