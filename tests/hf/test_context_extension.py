"""Longer contexts of rotary models: the formulas, a float64 model written out, caches, and giving the model back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import foveate as fv
from foveate.hf import (
    ABF,
    NTK,
    EntropyABF,
    PositionInterpolation,
    YaRN,
    apply_context_extension,
    entropy_by_length,
    log_length_scale,
    rotary_rates,
    row_entropy,
)

METHODS = [PositionInterpolation(4.0), NTK(4.0), YaRN(4.0), ABF(), EntropyABF()]
SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8,
}  # fmt: skip


def llama(dtype: torch.dtype = torch.float64, **more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | more))).eval().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 if p.ndim == 1 else 20.0)  # attention that is far from uniform
    return model


def ids_of(n: int, batch: int = 2, vocab: int = 31) -> Tensor:
    return torch.randint(vocab, (batch, n), generator=torch.Generator().manual_seed(n))


def logits(model, ids, **more) -> Tensor:
    return model(input_ids=ids, **more).logits


# ------------------------------------------------------------------------------------------------------ formulas
def test_the_query_factor():
    position = torch.tensor([1, 2, 4095, 4096, 16384, 4096**2])
    found = log_length_scale(position, 4096)
    expected = [max(1.0, math.log(i) / math.log(4096)) for i in position.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-14)
    assert [round(x, 4) for x in found.tolist()[3:]] == [1.0, 1.1667, 2.0]


@pytest.mark.parametrize("width", [8, 32, 128])
@pytest.mark.parametrize("base", [10_000.0, 50_000.0])
def test_rates_are_those_of_transformers(width, base):
    def theirs(kind: str, length: int | None = None, **more) -> tuple[Tensor, float]:
        config = LlamaConfig(**(SIZES | {"head_dim": width, "max_position_embeddings": 4096}),
                             rope_parameters={"rope_type": kind, "rope_theta": base, **more})  # fmt: skip
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)

    cases = [
        (PositionInterpolation(4.0), theirs("linear", factor=4.0)),
        (YaRN(4.0), theirs("yarn", factor=4.0, original_max_position_embeddings=4096)),
        (YaRN(8.0, 16.0, 2.0), theirs("yarn", factor=8.0, beta_fast=16.0, beta_slow=2.0,
                                      original_max_position_embeddings=4096)),
        (NTK(4.0), theirs("dynamic", 4 * 4096, factor=1.0)),
    ]  # fmt: skip
    for method, (theta, magnitude) in cases:
        ours, factor = method.rates(base, width, 4096)
        torch.testing.assert_close(ours.float(), theta, rtol=3e-6, atol=0)
        assert factor == pytest.approx(magnitude)


def test_a_larger_base_is_a_model_of_that_base():
    model, ids = llama(), ids_of(23)
    other = llama(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    with apply_context_extension(model, ABF(500_000.0)):
        torch.testing.assert_close(logits(model, ids), logits(other, ids), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------- the model, written out
def written(model: LlamaForCausalLM, ids: Tensor, base: float, c: int | None, skip: int) -> Tensor:
    """Logits of a Llama with another rotary base and lambda_i on the logits, one query at a time."""
    config, trunk = model.config, model.model
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    rates = torch.tensor([base ** (-2 * r / d) for r in range(d // 2)], dtype=torch.float64)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turned(x: Tensor, at: int) -> Tensor:  # (d,)
        a, b = x[: d // 2], x[d // 2 :]
        return torch.cat(
            [a * (at * rates).cos() - b * (at * rates).sin(), a * (at * rates).sin() + b * (at * rates).cos()]
        )

    rows = []
    for row in ids:
        x = trunk.embed_tokens.weight[row]  # (n, dim)
        for number, layer in enumerate(trunk.layers):
            y, heads, at = norm(x, layer.input_layernorm.weight), layer.self_attn, range(len(row))
            mixed = []
            for h in range(config.num_attention_heads):
                own, shared = slice(h * d, h * d + d), slice(h // group * d, h // group * d + d)
                q = [turned(t, i) for i, t in zip(at, y @ heads.q_proj.weight[own].T, strict=True)]
                k = torch.stack(
                    [turned(t, i) for i, t in zip(at, y @ heads.k_proj.weight[shared].T, strict=True)]
                )
                v = y @ heads.v_proj.weight[shared].T
                out = []
                for i in at:
                    scale = 1.0 if c is None or number < skip else max(1.0, math.log(i + 1) / math.log(c))
                    out.append((scale * (k[: i + 1] @ q[i]) / math.sqrt(d)).softmax(0) @ v[: i + 1])
                mixed.append(torch.stack(out))
            x = x + torch.cat(mixed, 1) @ heads.o_proj.weight.T
            y, mlp = norm(x, layer.post_attention_layernorm.weight), layer.mlp
            inner = torch.nn.functional.silu(y @ mlp.gate_proj.weight.T) * (y @ mlp.up_proj.weight.T)
            x = x + inner @ mlp.down_proj.weight.T
        rows.append(norm(x, trunk.norm.weight) @ model.lm_head.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["sdpa", "foveate"])
def test_entropy_abf_is_the_model_written_out(attention):
    model, ids = llama(), ids_of(23)
    model.set_attn_implementation("sdpa")
    expected = written(model, ids, 500_000.0, 8, 2)
    with apply_context_extension(model, EntropyABF()):
        if attention == "foveate":
            with fv.hf.apply(model, "dense"):
                found = logits(model, ids)
        else:
            found = logits(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # transformers rotates in float32
    assert (written(model, ids, 500_000.0, None, 2) - expected)[:, 8:].abs().max() > 1e-2
    assert (written(model, ids, 500_000.0, 8, 1) - expected)[:, 8:].abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_are_those_of_the_model_written_out():
    model, ids = llama(), ids_of(13, 1)
    weights = [model.model.layers[3].self_attn.q_proj.weight, model.model.layers[1].self_attn.k_proj.weight]
    expected = torch.autograd.grad(written(model, ids, 500_000.0, 4, 2).square().sum(), weights)
    with apply_context_extension(model, EntropyABF(), train_length=4):
        found = torch.autograd.grad(logits(model, ids).square().sum(), weights)
        model.gradient_checkpointing_enable()
        model.train()
        again = torch.autograd.grad(logits(model, ids, use_cache=False).square().sum(), weights)
    for a, b, e in zip(found, again, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))
        torch.testing.assert_close(b, a)


# ----------------------------------------------------------------------------------------------------- invariants
def test_its_own_base_within_the_trained_window_changes_no_bit():
    model, ids = llama(torch.float32), ids_of(13)
    before = logits(model, ids)
    with apply_context_extension(model, EntropyABF(10_000.0)):
        after = logits(model, ids)
        assert torch.equal(after[:, :8], before[:, :8])
        assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-3


def test_the_first_layers_have_the_weights_of_plain_abf():
    model, ids = llama(), ids_of(13)
    model.set_attn_implementation("eager")
    maps = []
    for method in (ABF(), EntropyABF()):
        with apply_context_extension(model, method):
            maps.append(model(input_ids=ids, output_attentions=True).attentions)
    assert all(torch.equal(maps[0][layer], maps[1][layer]) for layer in (0, 1))
    plain, sharp = maps[0][2], maps[1][2]  # equal inputs: a' is proportional to a ** lambda
    powered = plain[:, :, 12] ** float(log_length_scale(torch.tensor(13), 8))
    torch.testing.assert_close(sharp[:, :, 12], powered / powered.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert torch.equal(plain[:, :, :8], sharp[:, :, :8])
    assert not torch.allclose(plain[:, :, 12], sharp[:, :, 12])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("foveated", [False, True])
def test_cached_decoding_is_the_whole(method, foveated):
    model, ids = llama(), ids_of(23)
    with apply_context_extension(model, method), fv.hf.apply(model, "dense") if foveated else torch.no_grad():
        whole, cache, parts = logits(model, ids), None, []
        for piece in (ids[:, :5], ids[:, 5:12], *(ids[:, i : i + 1] for i in range(12, 23))):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_rows_with_padding_count_from_their_own_first_token():
    model, ids = llama(), ids_of(19, 1)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with apply_context_extension(model, EntropyABF()):
        found = logits(model, padded, attention_mask=mask, position_ids=position)[:, 6:]
        torch.testing.assert_close(found, logits(model, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_removing_gives_the_model_back(method):
    model, ids = llama(torch.float32), ids_of(17)
    names, before = list(model.state_dict()), logits(model, ids)
    handle = apply_context_extension(model, method)
    assert not torch.equal(logits(model, ids), before)
    assert list(model.state_dict()) == names
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, ids), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError), apply_context_extension(model, method):
        raise RuntimeError
    assert torch.equal(logits(model, ids), before)


def test_a_norm_of_queries_does_not_undo_the_factor():
    torch.manual_seed(0)
    model, ids = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval().double(), ids_of(13)
    model.set_attn_implementation("eager")
    maps: list[Tensor] = []
    for method in (ABF(), EntropyABF(skip=0)):
        with apply_context_extension(model, method):
            maps.append(model(input_ids=ids, output_attentions=True).attentions[0][:, :, 12])
    powered = maps[0] ** float(log_length_scale(torch.tensor(13), 8))
    torch.testing.assert_close(maps[1], powered / powered.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_reader_takes_every_method():
    model, tokenizer = fv.organisms.load("reader")
    ids = torch.tensor([tokenizer.encode("def main(argv):\n    return 0\n")])
    before = logits(model, ids)
    for method in METHODS:
        with apply_context_extension(model, method, train_length=16):
            assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


# -------------------------------------------------------------------------------------------------------- entropy
@pytest.mark.parametrize("method", [None, EntropyABF()])
def test_entropy_is_that_of_the_maps(method):
    model, ids, lengths = llama(), ids_of(23, 3), (1, 7, 8, 23)
    model.set_attn_implementation("eager")
    handle = apply_context_extension(model, method) if method else None
    found = entropy_by_length(model, ids, lengths)
    assert (found.layers, found.entropy.shape) == ((0, 1, 2, 3), (4, 4, 4))
    for at, n in enumerate(lengths):
        maps = model(input_ids=ids[:, :n], output_attentions=True).attentions
        for layer, a in enumerate(maps):
            row = a[:, :, -1]  # (B, H, n)
            expected = -(row * row.clamp(min=1e-300).log()).sum(-1).mean(0)
            torch.testing.assert_close(found.entropy[at, layer], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.below_uniform[3], math.log(23) - found.by_layer[3])
    assert entropy_by_length(model, ids, lengths, layers=[2]).layers == (2,)
    if handle:
        handle.remove()


def test_entropy_of_rows_known_by_hand():
    k = torch.zeros(1, 1, 9, 4)
    assert row_entropy(torch.ones(1, 2, 4), k).tolist() == [pytest.approx([math.log(9)] * 2)]
    k[0, 0, 3] = 1e4  # one key takes it all
    assert row_entropy(torch.ones(1, 2, 4), k).tolist() == [[0.0, 0.0]]


# --------------------------------------------------------------------------------------------------------- errors
def test_methods_do_not_stack():
    model = llama()
    handle = apply_context_extension(model, ABF())
    with pytest.raises(ValueError, match=r"extended by ABF.*already"):
        apply_context_extension(model, NTK(2.0))
    handle.remove()
    with pytest.raises(ValueError, match="removed"), handle:
        pass


def test_models_that_do_not_fit_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        apply_context_extension(torch.nn.Linear(2, 2), ABF())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="ContextExtension"):
        apply_context_extension(llama(), 4.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="plain rotary positions"):
        apply_context_extension(
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=5)), ABF()
        )
    scaled = llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="linear"):
        apply_context_extension(scaled, ABF())
    with pytest.raises(ValueError, match="train_length must be an int >= 2, got 1"):
        apply_context_extension(llama(), ABF(), train_length=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NTK(0.5), "NTK: factor must be a number >= 1, got 0.5"),
        (lambda: PositionInterpolation(True), "factor must be"),
        (lambda: YaRN(4.0, 1.0, 2.0), "fast > slow > 0"),
        (lambda: ABF(0.0), "ABF: base must be a number > 0"),
        (lambda: EntropyABF(-1.0), "EntropyABF: base must be"),
        (lambda: EntropyABF(skip=-1), "skip must be an int >= 0"),
        (lambda: NTK(2.0).rates(1e4, 2, 16), "more than one rotary pair"),
        (lambda: log_length_scale(torch.tensor([0]), 16), "integers >= 1"),
        (lambda: log_length_scale(torch.tensor([1.0]), 16), "integers >= 1"),
        (lambda: log_length_scale(torch.tensor([1]), 1), "train_length must be an int >= 2"),
        (lambda: entropy_by_length(llama(), ids_of(5), [6]), "tokens >= 6"),
        (lambda: entropy_by_length(llama(), ids_of(5), []), "not empty"),
        (lambda: entropy_by_length(llama(), ids_of(5), [0]), "lengths must be an int >= 1"),
    ],
)  # fmt: skip
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rates_start_at_one_and_fall():
    assert rotary_rates(10_000.0, 8).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
