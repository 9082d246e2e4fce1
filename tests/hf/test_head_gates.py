"""Learning DuoAttention's gates on tiny models."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES

import foveate as fv
from foveate.hf import HeadGates, train_head_gates


def made(name="llama"):
    torch.manual_seed(0)
    return FAMILIES[name].make().eval()


def examples(count=3, n=40, last=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        supervised = torch.zeros(1, n, dtype=torch.bool)
        supervised[:, -last:] = True
        out.append((torch.randint(2, 60, (1, n), generator=g), supervised))
    return out


def mixed(model, gates, ids, **window):
    with torch.no_grad(), fv.hf.apply(model, fv.patterns.SlidingWindow(5) | fv.patterns.Sinks(2)) as handle:
        handle._job.mix = gates.mix
        return model(ids).logits


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gates_of_one_are_the_model_and_of_zero_the_streaming_model(name):
    model, ids = made(name), examples()[0][0]
    gates = HeadGates(2, 2)
    with torch.no_grad():
        plain = model(ids).logits
        with fv.hf.apply(model, fv.patterns.SlidingWindow(5) | fv.patterns.Sinks(2)):
            streaming = model(ids).logits
    torch.testing.assert_close(mixed(model, gates, ids), plain, atol=1e-5, rtol=1e-5)
    gates.alpha.data.zero_()
    torch.testing.assert_close(mixed(model, gates, ids), streaming, atol=1e-5, rtol=1e-5)
    assert (plain - streaming).abs().max() > 1e-3


def test_a_binary_gate_is_a_head_of_one_kind():
    """Gates of 0 and 1 give what duo_pattern gives layer by layer."""
    model, ids = made(), examples()[0][0]
    gates = HeadGates(2, 2)
    gates.alpha.data = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    pattern = fv.cache.duo_pattern([True, False], 4, sink=2, recent=5)
    with torch.no_grad(), fv.hf.apply(model, pattern):
        wanted = model(ids).logits
    torch.testing.assert_close(mixed(model, gates, ids), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("teacher_forced", [False, True])
def test_only_the_gates_learn(teacher_forced):
    model = made()
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    gates = train_head_gates(
        model,
        examples(),
        sink=2,
        recent=5,
        steps=6,
        teacher_forced=teacher_forced,
        progress=lambda step, loss: losses.append(loss),
    )
    assert len(losses) == 6
    assert losses[0] == pytest.approx(0.05, abs=1e-6)  # gates of 1: no distance, only the penalty
    assert (gates.alpha < 1).all()
    assert ((gates.alpha >= 0) & (gates.alpha <= 1)).all()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad
    assert model.config._attn_implementation != "foveate"


def test_a_head_whose_branches_coincide_only_feels_the_penalty():
    """A window longer than the text: every gate falls at the same pace, whatever the head does."""
    gates = train_head_gates(made(), examples(n=20), sink=2, recent=20, steps=12, lr=0.1)
    assert gates.alpha.std() < 1e-5
    assert gates.alpha.max() < 0.5


def test_a_head_that_matters_keeps_its_gate():
    """Layer 0's second KV head is made to look far and to matter; the first one's values are 0."""
    model = made()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[:8] = 0  # the first KV head of two (head_dim 8) gives nothing
            layer.self_attn.v_proj.weight[8:] *= 30
    gates = train_head_gates(model, examples(6), sink=1, recent=3, steps=40, lr=0.05, reg=0.02)
    assert (gates.alpha[:, 0] < 0.3).all()
    assert (gates.alpha[:, 1] > gates.alpha[:, 0] + 0.3).all()


def test_sparsity_counts_heads_over_the_whole_model(tmp_path):
    gates = HeadGates(3, 4)
    gates.alpha.data = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.0, 0.25, 0.5, 0.6, 1.0):
        heads = gates.binarize(sparsity=sparsity)
        assert int((~heads).sum()) == round(12 * sparsity)
        if 0 < sparsity < 1:
            assert gates.alpha[heads].min() > gates.alpha[~heads].max()
    assert int((~HeadGates(2, 4).binarize(sparsity=0.5)).sum()) == 4  # ties
    gates.save(tmp_path / "gates.safetensors")
    assert torch.equal(HeadGates.load(tmp_path / "gates.safetensors").alpha, gates.alpha)
    assert [f.name for f in tmp_path.iterdir()] == ["gates.safetensors"]
    policy = gates.policy(sparsity=0.5, sink=4, recent=16)
    assert policy.share == 0.5


def test_the_policy_runs_in_generate():
    model = made()
    ids = examples()[0][0]
    common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **common)
    gates = HeadGates(2, 2)
    whole = fv.hf.Cache(model, gates.policy(threshold=0.5, sink=2, recent=8))
    assert torch.equal(model.generate(ids, past_key_values=whole, **common), wanted)
    half = fv.hf.Cache(model, gates.policy(sparsity=0.5, sink=2, recent=8))
    model.generate(ids, past_key_values=half, prefill_chunk_size=7, **common)
    counts = [n for layer in half.held().layers for n in layer.tokens[0]]
    assert sorted(counts) == [9, 9, 47, 47]


def test_errors():
    gates = HeadGates(2, 2)
    with pytest.raises(ValueError, match="sparsity or threshold"):
        gates.binarize()
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], got 2"):
        gates.binarize(sparsity=2)
    with pytest.raises(TypeError, match="no argument sinks"):
        gates.policy(threshold=0.5, sinks=3)
    with pytest.raises(ValueError, match="data has no examples"):
        train_head_gates(made(), [])
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        train_head_gates(made(), examples(), steps=0)
    with pytest.raises(ValueError, match="the model has 2 of 2"):
        fv.hf.Cache(made(), HeadGates(3, 2).policy(threshold=0.5))
