"""The laboratory's hook into a model's attention: exact attention in it changes nothing, and it leaves no trace."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.bench.subject import load_subject
from foveate.catalogue.lab.model_heads import attending, captured


@pytest.fixture(scope="module")
def reader():
    return load_subject("reader")


def test_captured_heads_give_the_models_own_attention(reader):
    ids = torch.arange(97) % 90 + 32
    want = reader.logits(ids)
    layers = captured(reader.model, ids)
    assert [tuple(t.shape) for t in layers[0]] == [(1, 8, 97, 32), (1, 4, 97, 32), (1, 4, 97, 32)]
    assert len(layers) == reader.model.config.num_hidden_layers
    turn = iter(layers)

    def replay(q, k, v, scale):
        kept = next(turn)
        for got, known in zip((q, k, v), kept, strict=True):
            torch.testing.assert_close(got, known, atol=1e-5, rtol=1e-5)
        return fv.attention(*kept, is_causal=True, scale=scale)

    with attending(reader.model, replay):
        torch.testing.assert_close(reader.logits(ids), want, atol=1e-4, rtol=1e-4)
    with attending(reader.model, lambda q, k, v, scale: torch.zeros_like(q)):
        assert (reader.logits(ids) - want).abs().max() > 1


def test_the_model_attends_as_before_afterwards_even_after_an_error(reader):
    ids = torch.arange(40)
    before, name = reader.logits(ids), reader.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attending(reader.model, lambda q, k, v, scale: 1 // 0):
        reader.logits(ids)
    assert reader.model.config._attn_implementation == name
    assert torch.equal(reader.logits(ids), before)
