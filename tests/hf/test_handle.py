"""Life of a handle: restoring, exceptions, sharing, refusals, keyword arguments, ready-made masks,
gradients."""

from __future__ import annotations

import copy
import gc
import sys

import families
import pytest
import torch
import transformers as tf
from oracle import oracle

import foveate as fv
from foveate.hf import forward as forward_module
from foveate.patterns import SlidingWindow

apply_module = sys.modules["foveate.hf.apply"]  # the name foveate.hf.apply is the function


def tiny(config=None):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config or tf.LlamaConfig(**families._GROUPED)).eval()


IDS = families.inputs("llama")["input_ids"]


# ------------------------------------------------------------------------------------- apply and remove
@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_remove_restores_everything(before):
    model = tiny()
    model.set_attn_implementation(before)
    logits = model(IDS).logits
    handle = fv.hf.apply(model, SlidingWindow(3))
    assert handle.active
    assert not torch.equal(model(IDS).logits, logits)
    handle.remove()
    handle.remove()
    assert not handle.active
    assert model.config._attn_implementation == before
    assert torch.equal(model(IDS).logits, logits)
    assert not [m for m in model.modules() if m in forward_module.SITES]
    assert not apply_module._HELD
    assert handle.report().layers[0].calls == 1
    with pytest.raises(ValueError, match="removed"):
        handle.check(IDS)
    with pytest.raises(ValueError, match="removed"), handle:
        pass


def test_remove_restores_mixed_implementations():
    model = families.FAMILIES["bart"].make().eval()
    model.set_attn_implementation("sdpa")
    configs = apply_module._configs(model)
    configs[-1]._attn_implementation_internal = "eager"
    names = [c._attn_implementation for c in configs]
    with fv.hf.apply(model, "dense"):
        assert {c._attn_implementation for c in configs} == {"foveate"}
    assert [c._attn_implementation for c in configs] == names


def test_an_exception_inside_the_block_restores():
    model = tiny()
    with pytest.raises(KeyError), fv.hf.apply(model, SlidingWindow(3)):
        raise KeyError("user error")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="mystery"), fv.hf.apply(model, SlidingWindow(3)):
        model(IDS, mystery=1)
    assert model.config._attn_implementation == "sdpa"
    assert not apply_module._HELD


def test_a_failure_inside_apply_leaves_no_trace(monkeypatch):
    model = tiny()

    def broken(name):
        model.config._attn_implementation_internal = name
        raise RuntimeError("half way")

    monkeypatch.setattr(model, "set_attn_implementation", broken)
    with pytest.raises(RuntimeError, match="half way"):
        fv.hf.apply(model, SlidingWindow(3))
    assert model.config._attn_implementation == "sdpa"
    assert not [m for m in model.modules() if m in forward_module.SITES]
    assert not apply_module._HELD


def test_policies_do_not_nest():
    model = tiny()
    with fv.hf.apply(model, SlidingWindow(3)):
        with pytest.raises(ValueError, match="already applied"):
            fv.hf.apply(model, "dense")
        with pytest.raises(ValueError, match="already applied"):
            fv.hf.apply(model.model, "dense")
        assert model.config._attn_implementation == "foveate"
    with fv.hf.apply(model, "dense"):
        pass


def test_models_do_not_leak_into_each_other():
    config = tf.LlamaConfig(**families._GROUPED)
    first, second = tiny(config), tiny(config)
    assert first.config is second.config
    plain = second(IDS).logits
    a = fv.hf.apply(first, SlidingWindow(3))
    copied = copy.deepcopy(first)
    assert (second(IDS).logits - plain).abs().max() < 1e-5  # shares the config, not the policy
    assert (copied(IDS).logits - plain).abs().max() < 1e-5  # so does a copy
    b = fv.hf.apply(second, SlidingWindow(5))
    five = second(IDS).logits
    a.remove()  # in the "wrong" order
    assert torch.equal(second(IDS).logits, five)
    assert b.report().layers[0].calls == 2
    b.remove()
    assert config._attn_implementation == "sdpa"


def test_a_forgotten_model_gives_its_config_back():
    config = tf.LlamaConfig(**families._GROUPED)
    model, other = tiny(config), tiny(config)
    handle = fv.hf.apply(model, SlidingWindow(3))
    del model
    gc.collect()
    assert other.config._attn_implementation == "sdpa"
    handle.remove()
    assert not apply_module._HELD


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)),
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        ),
        lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2)),
        lambda: tf.GPTJForCausalLM(
            tf.GPTJConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
        ),
    ],
    ids=["bloom", "falcon", "mpt", "gptj"],
)
def test_unswitchable_models_raise(make):
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot switch") as error:
        fv.hf.apply(model, "dense")
    assert "Attention compute attention inside their own forward" in str(error.value)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"policy": "sparse"}, TypeError, "policy must be"),
        ({"policy": 3}, TypeError, "policy must be"),
        ({"phase": "training"}, ValueError, "phase must be one of"),
        ({"layers": [2]}, ValueError, r"layers must lie in \[0, 1\]"),
        ({"layers": []}, ValueError, "layers must be a non-empty"),
        ({"layers": [-1]}, ValueError, "layers must be"),
        ({"layers": [0.5]}, TypeError, "layers must be"),
        ({"layers": 1}, TypeError, "layers must be"),
        ({"heads": [4]}, ValueError, r"heads must lie in \[0, 4\)"),
        ({"heads": "01"}, TypeError, "heads must be"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    model = tiny()
    with pytest.raises(error, match=text):
        fv.hf.apply(model, arguments.pop("policy", "dense"), **arguments)
    assert model.config._attn_implementation == "sdpa"


def test_not_a_model():
    with pytest.raises(TypeError, match="PreTrainedModel"):
        fv.hf.apply(torch.nn.Linear(2, 2), "dense")


@pytest.mark.parametrize("name", ["indices", "block_indices", "mystery", "cache"])
def test_keywords_that_cannot_be_honoured_raise(name):
    model = tiny()
    with fv.hf.apply(model, "dense"), pytest.raises(ValueError, match=name):
        model(IDS, **{name: torch.zeros(1)})
    with fv.hf.apply(model, "dense"):
        model(IDS, **{name: None})


def test_attention_maps_cannot_be_had():
    model = tiny()
    with fv.hf.apply(model, "dense"), pytest.raises(ValueError, match="output_attentions"):
        model(IDS, output_attentions=True)


@pytest.mark.parametrize(
    ("name", "keyword"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("t5", "position_bias")]
)
def test_honoured_keywords_matter(name, keyword, monkeypatch):
    """Were they dropped, the fifteen-family test would notice."""
    model, given = families.model(name), families.inputs(name)
    eager = families.outputs(model, given)
    real = forward_module.read
    monkeypatch.setattr(forward_module, "read", lambda kw, owner: real({**kw, keyword: None}, owner))
    with fv.hf.apply(model, "dense"):
        assert (families.outputs(model, given) - eager).abs().max() > 1e-3


def test_packed_sequences_by_lengths_and_by_positions():
    model = tiny()
    lengths = [5, 9, 7]
    ids = IDS[:1]
    cu = torch.tensor([0, 5, 14, 21], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with fv.hf.apply(model, SlidingWindow(4)) as handle, torch.no_grad():
        alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        handle.reset()
        by_length = model(
            ids,
            position_ids=positions,
            use_cache=False,
            cu_seq_lens_q=cu,
            cu_seq_lens_k=cu,
            max_length_q=9,
            max_length_k=9,
        ).logits
        density = handle.report().density
        by_position = model(ids, position_ids=positions, use_cache=False).logits
        with pytest.raises(ValueError, match="rise from 0 to 21"):
            model(ids, cu_seq_lens_q=cu[:3], cu_seq_lens_k=cu[:3])
        with pytest.raises(ValueError, match="together"):
            model(ids, cu_seq_lens_q=cu)
    assert (by_length - alone).abs().max() < 1e-5
    assert (by_position - alone).abs().max() < 1e-5
    assert density == pytest.approx(sum(4 * n - 6 for n in lengths) / sum(n * (n + 1) / 2 for n in lengths))


# -------------------------------------------------------------------------------------- ready-made masks
@pytest.mark.parametrize("kind", ["bool", "float", "biased"])
def test_ready_made_masks(kind):
    model = tiny()
    model.set_attn_implementation("eager")
    n = IDS.shape[1]
    seen = torch.ones(n, n).tril().bool()[None, None].expand(3, 1, n, n).clone()
    seen[1, :, :, 2:4] = False
    seen[1, :, range(n), range(n)] = True
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    if kind == "biased":
        additive = additive + torch.where(seen, torch.linspace(-1, 1, n), 0.0)
    given = {"input_ids": IDS, "attention_mask": seen if kind == "bool" else additive}
    eager = families.outputs(model, {**given, "attention_mask": additive})
    with fv.hf.apply(model, "dense"):
        assert (families.outputs(model, given) - eager).abs().max() < 1e-5
    window = torch.ones(n, n).tril().triu(-3).bool()
    masked = additive.masked_fill(~window, torch.finfo(torch.float32).min)
    eager = families.outputs(model, {**given, "attention_mask": masked})
    with fv.hf.apply(model, SlidingWindow(4)) as handle:
        assert (families.outputs(model, given) - eager).abs().max() < 1e-5
    assert handle.report().density == pytest.approx(int((seen & window).sum()) / int(seen.sum()))


# ------------------------------------------------------------------------------------------------- check
def test_check_catches_a_wrong_model(monkeypatch):
    model = tiny()
    with fv.hf.apply(model, SlidingWindow(3)) as handle:
        assert handle.check(IDS).max_error < 1e-5
        real = forward_module.attention
        monkeypatch.setattr(
            forward_module, "attention", lambda *a, **k: real(*a, **{**k, "scale": 2.0 * k["scale"]})
        )
        with pytest.raises(fv.hf.CheckError, match="logits differs"):
            handle.check(IDS)
        assert handle.active
        assert not handle._job.suspended
    with pytest.raises(ValueError, match="removed"):
        handle.check(IDS)


def test_check_restores_training_mode_and_survives_failures(monkeypatch):
    model = tiny()
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    with fv.hf.apply(model, "dense") as handle:
        handle.check(IDS)
        assert [m.training for m in model.modules()] == modes

        def broken(*a, **k):
            raise RuntimeError("engine")

        monkeypatch.setattr(forward_module, "attention", broken)
        with pytest.raises(RuntimeError, match="engine"):
            handle.check(IDS)
        assert [m.training for m in model.modules()] == modes
        assert model.config._attn_implementation == "foveate"
        assert not handle._job.suspended


def test_check_looks_at_real_positions_only():
    given = families.inputs("llama", padded=True)
    with fv.hf.apply(families.model("llama"), "dense") as handle:
        assert handle.check(given).positions == int(given["attention_mask"].sum())


# --------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_eager(checkpointing):
    model = tiny().train()
    model.set_attn_implementation("eager")
    model(IDS, labels=IDS).loss.backward()
    eager = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with fv.hf.apply(model, "dense"):
        model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - eager[name]).abs().max() < 1e-5, name


def test_bfloat16():
    model = tiny().to(torch.bfloat16)
    with fv.hf.apply(model, "dense") as handle:
        assert handle.check(IDS).max_error < 0.1


def test_oracle_itself_is_eager_without_a_policy():
    model, given = families.model("llama"), families.inputs("llama", padded=True)
    eager = families.outputs(model, given)
    with oracle(model, lambda i, j: j == j):
        assert (families.outputs(model, given) - eager)[families.real(given, eager)].abs().max() < 1e-6
