"""Distilling SeerAttention's gates from a transformers model: the model stays as it was, the gates learn its map."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import foveate as fv
from foveate.core.statistics import block_pool
from foveate.hf.seer_attention import (
    distill_gates,
    gate_lessons,
    lesson_loss,
    make_gates,
    rotary_of,
)
from foveate.layers import BlockGate, SeerAttention, pooled_attention_target


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches(count, n=300, rows=1):
    return list(torch.randint(50, (count, rows, n), generator=torch.Generator().manual_seed(1)))


def test_gates_fit_the_model(model):
    gates = make_gates(model, block=32, k_pool=("max", "min"))
    want = {"heads": 4, "kv_heads": 2, "head_dim": 8, "block": 32, "width": 8, "theta": 500.0}
    for gate in gates.values():
        assert want.items() <= gate.settings().items()
        assert gate.k_pool == ("max", "min")
    assert sorted(gates) == [0, 1]


def test_a_lesson_is_the_pooled_projections_and_the_target(model):
    ids, gates = batches(1, 100, rows=2)[0], make_gates(model, block=16)
    lessons = gate_lessons(model, ids, gates)
    seen = {}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _, __, out, key=(number, name): seen.__setitem__(key, out.detach())
        )
        for number, layer in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    for layer in (0, 1):
        q = seen[layer, "q_proj"].unflatten(-1, (4, 8)).transpose(1, 2)
        k = seen[layer, "k_proj"].unflatten(-1, (2, 8)).transpose(1, 2)
        torch.testing.assert_close(lessons[layer].q, block_pool(q, 16), atol=1e-4, rtol=1e-4)
        want = torch.cat([block_pool(k, 16, how) for how in ("max", "min", "mean")], -1)
        torch.testing.assert_close(lessons[layer].k, want, atol=1e-4, rtol=1e-4)
        cos, sin = rotary_of(model)(q, torch.arange(100)[None])
        turn = lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1)  # noqa: E731
        q, k = (x * cos[:, None] + turn(x) * sin[:, None] for x in (q, k))
        torch.testing.assert_close(
            lessons[layer].target, pooled_attention_target(q, k, 16), atol=1e-4, rtol=1e-3
        )
        assert lessons[layer].tokens == 100


def test_distilling_changes_gates_only(model):
    data = batches(2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    asked = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        dense = model(data[0]).logits
    torch.manual_seed(0)
    gates = make_gates(model, block=32)
    untrained = {i: gate.mask_linear_k.weight.detach().clone() for i, gate in gates.items()}
    losses = []
    found = distill_gates(
        model, data, 40, 0.02, gates=gates, warm_up=5, log=lambda _, loss: losses.append(loss)
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(data[0]).logits, dense)  # nothing is left on the model
    assert losses[-1] < 0.8 * losses[0]
    for layer, gate in found.items():
        assert not torch.equal(gate.mask_linear_k.weight, untrained[layer])
        assert not gate.training


def test_the_model_runs_densely_while_it_teaches(model, monkeypatch):
    """Its output is that of its own attention."""
    ids = batches(1)[0]
    logits = []
    hook = model.register_forward_hook(lambda _, __, out: logits.append(out.logits))
    with torch.no_grad():
        model(ids)
    gate_lessons(model, ids, make_gates(model))
    hook.remove()
    torch.testing.assert_close(logits[1][:, -1], logits[0][:, -1], atol=1e-4, rtol=1e-4)


def test_each_sequence_is_run_once(model):
    runs = []
    hook = model.register_forward_hook(lambda *_: runs.append(1))
    distill_gates(model, batches(3, 70), 7)
    hook.remove()
    assert len(runs) == 3
    with pytest.raises(ValueError, match="data ended after 2 of 5 batches"):
        distill_gates(model, iter(batches(2, 70)), 5)
    with pytest.raises(ValueError, match="steps must be an int >= 1, got 0"):
        distill_gates(model, batches(1), 0)


def test_some_layers_and_a_loss_per_layer(model):
    gates = {1: make_gates(model)[1]}
    lessons = gate_lessons(model, batches(1)[0], gates)
    assert list(lessons) == [1]
    assert lesson_loss(gates, lessons) > 0
    with pytest.raises(ValueError, match=r"has no layers \[7\]"):
        gate_lessons(model, batches(1)[0], {7: gates[1]})
    with pytest.raises(ValueError, match=r"ids must be token numbers \(batch, tokens\), got torch.float32"):
        gate_lessons(model, torch.ones(1, 5), gates)


def test_gates_choose_in_the_model(model):
    ids = batches(1, 512)[0]
    torch.manual_seed(1)
    gates = {i: BlockGate(4, 2, 8, 64, 8, std=1.0, theta=500.0) for i in (0, 1)}
    seer = SeerAttention(gates, "ratio", 0.5, 1, rotary_of(model))
    with torch.no_grad():
        dense = model(ids).logits
        with fv.hf.apply(model, seer) as handle:
            sparse = model(ids).logits
            shares = [layer.density for layer in handle.report().layers]
        assert all(0.3 < share < 0.8 for share in shares)
        assert not torch.allclose(sparse, dense, atol=1e-3)
        with fv.hf.apply(model, SeerAttention(gates, "threshold", -1.0, 1, rotary_of(model))):
            torch.testing.assert_close(model(ids).logits, dense, atol=1e-4, rtol=1e-4)
        with fv.hf.apply(model, SeerAttention({1: gates[1]}, "ratio", 0.5, 1, rotary_of(model))) as handle:
            model(ids)
            assert [layer.density for layer in handle.report().layers] == [1.0, shares[1]]


def test_a_batch_with_left_padding_and_generation(model):
    ids = batches(1, 200)[0]
    gates = {i: BlockGate(4, 2, 8, 64, 8, std=1.0, theta=500.0) for i in (0, 1)}
    seer = SeerAttention(gates, "ratio", 0.5, 0, rotary_of(model))
    padded = torch.cat([torch.zeros(1, 13, dtype=torch.int64), ids], 1)
    mask = (torch.arange(213) >= 13)[None].long()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with fv.hf.apply(model, seer):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, -3:]
        behind = model.generate(padded, attention_mask=mask, **options)[0, -3:]
    assert alone.tolist() == behind.tolist()


def test_a_model_with_other_rotary_tables_is_refused(model):
    with pytest.raises(ValueError, match="has 0 modules named rotary_emb; accepted: one"):
        rotary_of(model.lm_head)
