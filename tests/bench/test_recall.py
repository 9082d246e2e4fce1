"""Attention recall against whole maps computed pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.bench import recall
from foveate.bench.recall import Sample, attention_recall, row_masks, sampled_rows, samples
from foveate.core.layout import BlockLayout
from foveate.patterns import Causal, Random, Sinks, SlidingWindow
from foveate.selectors import FlexPrefill


def tensors(batch=1, heads=4, kv_heads=2, n=150, m=None, dim=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64) * 2
    k = torch.randn(batch, kv_heads, n if m is None else m, dim, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def oracle(q, k, mask, causal=True, scale=None):
    """One softmax at a time, in Python floats."""
    batch, heads, n, dim = q.shape
    m, groups = k.shape[2], heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, n, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                seen = range(min(m, i + m - n + 1) if causal else m)
                logits = [scale * float(q[b, h, i].double() @ k[b, h // groups, j].double()) for j in seen]
                mass = [math.exp(x - max(logits)) for x in logits]
                kept = mask[b % len(mask), h % mask.shape[1], i]
                out[b, h, i] = sum(w for w, j in zip(mass, seen, strict=True) if kept[j]) / sum(mass)
    return out


@pytest.mark.parametrize(
    ("n", "m", "causal"), [(131, None, True), (67, None, False), (61, 131, True), (130, 70, False)]
)
def test_recall_is_the_share_of_every_softmax(n, m, causal):
    q, k = tensors(2, 4, 2, n, m)
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 4, n, k.shape[2], generator=g) < 0.4
    got = attention_recall(q, k, BlockLayout.from_mask(mask), is_causal=causal)
    assert (got - oracle(q, k, mask, causal)).abs().max() < 1e-6


def test_layouts_broadcast_and_scale_counts():
    q, k = tensors(2, 4, 1, 70)
    layout = (Causal() & (SlidingWindow(9) | Sinks(2))).layout(70)
    want = oracle(q, k, layout.to_dense(), scale=1.3)
    assert (attention_recall(q, k, layout, scale=1.3) - want).abs().max() < 1e-6


def test_rows_are_picked_and_chunks_do_not_matter(monkeypatch):
    q, k = tensors(n=200)
    layout = (Causal() & Random(0.5, block=64, heads=4)).layout(200)
    whole = attention_recall(q, k, layout)
    rows = torch.tensor([199, 3, 64])
    assert (attention_recall(q, k, layout, rows=rows) - whole[:, :, rows]).abs().max() < 1e-6
    monkeypatch.setattr(recall, "CHUNK", 1)
    assert (attention_recall(q, k, layout) - whole).abs().max() < 1e-6


def test_everything_recalls_all_and_nothing_none():
    q, k = tensors(n=100)
    assert torch.equal(
        attention_recall(q, k, Causal().layout(100)), torch.ones(1, 4, 100, dtype=torch.float64)
    )
    nothing = BlockLayout.from_mask(torch.zeros(100, 100, dtype=torch.bool))
    assert attention_recall(q, k, nothing).abs().max() == 0


def test_large_logits_do_not_overflow():
    q, k = tensors(n=100)
    got = attention_recall(q * 1e4, k, Causal().layout(100))
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("n", [64, 129, 300])
def test_row_masks_are_rows_of_the_dense_mask(n):
    layout = (Causal() & (Random(0.3, block=64, heads=3, seed=1) | SlidingWindow(5))).layout(n)
    rows = sampled_rows(n, 17, 4)
    assert torch.equal(row_masks(layout, rows), layout.to_dense()[:, :, rows])


def test_what_does_not_fit_is_refused():
    q, k = tensors(n=100)
    with pytest.raises(ValueError, match=r"layout is 1 x 1 of 90 x 90; q and k need 1 x 4 of 100 x 100"):
        attention_recall(q, k, Causal().layout(90))
    with pytest.raises(ValueError, match="do not fit each other"):
        attention_recall(q, k[..., :4], Causal().layout(100))


def test_sampled_rows_are_spread_different_and_seeded():
    rows = sampled_rows(1000, 100, 7)
    assert (rows // 10).tolist() == list(range(100))
    assert torch.equal(rows, sampled_rows(1000, 100, 7))
    assert not torch.equal(rows, sampled_rows(1000, 100, 8))


def test_samples_hold_what_the_layers_of_a_model_attend_with(follower):
    """The recorded q and k are those of eager attention: its weights, formed here, are the same."""
    from foveate.bench.subject import load_subject

    subject = load_subject(str(follower))
    ids = torch.arange(90) % 50
    found = samples(subject.model, ids, 5, 0)
    assert [s.layer for s in found] == [0, 1]
    subject.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = subject.model(input_ids=ids[None], output_attentions=True).attentions
    for sample, weights in zip(found, maps, strict=True):
        k = sample.k.repeat_interleave(sample.q.shape[1] // sample.k.shape[1], 1)
        logits = sample.q @ k.mT * sample.scale
        mine = logits.masked_fill(torch.ones(90, 90).triu(1).bool(), -torch.inf).softmax(-1)
        assert (mine - weights).abs().max() < 1e-4
    drawn = [samples(subject.model, ids, 1, seed) for seed in range(6)]
    assert all(len(d) == 1 and isinstance(d[0], Sample) for d in drawn)
    assert {d[0].layer for d in drawn} == {0, 1}


def test_layers_with_a_window_of_their_own_are_left_out():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=40, attn_implementation="sdpa",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    assert samples(model, torch.arange(60), 2, 0) == []
    assert len(samples(model, torch.arange(30), 2, 0)) == 2


def test_a_selector_recalls_more_than_it_would_by_chance():
    q, k = tensors(n=1024, dim=16)
    layout = FlexPrefill(block=64, gamma=0.5, min_budget=64).layout(q, k)
    share = layout.area / (4 * Causal().layout(1024).area)
    assert 0 < share < 1
    assert float(attention_recall(q, k, layout).mean()) > share
