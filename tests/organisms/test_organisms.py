"""load(), path(), names(), and the shipped reader's figures on a small sample."""

from __future__ import annotations

import json

import pytest
import torch

from foveate import organisms
from foveate.organisms.reader.data import stdlib_text
from foveate.organisms.reader.evaluate import (
    ALPHANUMERIC,
    bits_per_byte,
    induction_scores,
    needle_recall,
    repeat_gain,
)

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def reader():
    return organisms.load("reader")


def test_names_and_errors():
    assert organisms.names() == ("reader", "viewer")
    with pytest.raises(ValueError, match="'writer', accepted one of reader, viewer"):
        organisms.path("writer")


def test_weights_are_small_and_described():
    folder = organisms.path("reader")
    assert (folder / "model.safetensors").stat().st_size < 20e6
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["vocab_size"] == 256
    assert config["max_position_embeddings"] == 4096
    assert config["num_attention_heads"] > config["num_key_value_heads"]


def test_load_gives_logits_and_generates(reader):
    model, tokenizer = reader
    ids = torch.tensor([tokenizer.encode("import os\nimport sys\n\n\ndef main(argv=None):\n    ")])
    with torch.inference_mode():
        logits = model(ids).logits
        more = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert logits.shape == (1, ids.shape[1], 256)
    assert logits.isfinite().all()
    assert more.shape == (1, ids.shape[1] + 8)
    assert not model.training


def test_reads_held_out_text(reader):
    assert 1.4 < bits_per_byte(reader[0], 1024, windows=4) < 2.2


def test_finds_needles(reader):
    assert needle_recall(reader[0], 512, 8, distractors=0)["recall"] >= 0.8
    assert needle_recall(reader[0], 512, 8)["recall"] >= 0.5
    assert needle_recall(reader[0], 4096, 3, distractors=0)["recall"] >= 0.5


def test_recall_needs_the_needle(reader):
    model, tokenizer = reader
    text = stdlib_text(held_out=True)[:400]
    answer = "48213"
    right = tokenizer.encode(b"# key kapo=48213\n" + text + b"# key kapo=" + answer.encode())
    wrong = tokenizer.encode(b"# key kapo=97560\n" + text + b"# key kapo=" + answer.encode())
    with torch.inference_mode():
        for ids, expected in ((right, True), (wrong, False)):
            guess = model(torch.tensor([ids])).logits[0, -6:-1].argmax(-1).tolist()
            assert (tokenizer.decode(guess) == answer) is expected


def test_has_an_induction_head(reader):
    match, _ = induction_scores(reader[0], half=64, rows=2, alphabet=ALPHANUMERIC)
    first, second = repeat_gain(reader[0], half=64, rows=2, alphabet=ALPHANUMERIC)
    assert float(match.max()) > 0.5
    assert second < 0.3 * first
