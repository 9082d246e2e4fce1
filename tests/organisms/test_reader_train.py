"""The training script: schedule, resume, atomic checkpoints, export to transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from foveate.organisms.reader import data
from foveate.organisms.reader.evaluate import bits_per_byte, induction_scores, needle_recall
from foveate.organisms.reader.model import Reader, ReaderConfig
from foveate.organisms.reader.train import TrainConfig, Trainer, export, last_checkpoint, main, run

TINY = ReaderConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=256)
TEXT = b"def function(argument):\n    return argument + 1\n\n" * 200


def tiny(**changes) -> TrainConfig:
    base = {"steps": 12, "tokens": 128, "lengths": (64, 128, 256), "forced": (0.3, 0.6), "warmup": 2}
    base |= {"compile": False, "held_out_bytes": 1024}
    return TrainConfig(**(base | changes))


def test_resume_takes_the_same_steps(tmp_path):
    whole = Trainer(TINY, tiny(), tmp_path / "a", TEXT)
    expected = [whole.step()["loss_text_bits"] for _ in range(10)]

    first = Trainer(TINY, tiny(), tmp_path / "b", TEXT)
    losses = [first.step()["loss_text_bits"] for _ in range(5)]
    first.save()
    second = Trainer.resume(tmp_path / "b", TEXT)
    losses += [second.step()["loss_text_bits"] for _ in range(5)]
    assert losses == expected
    assert second.state.stage == whole.state.stage > 0
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_are_whole_and_pruned(tmp_path):
    trainer = Trainer(TINY, tiny(), tmp_path, TEXT)
    for _ in range(4):
        trainer.step()
        trainer.save()
    folders = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert folders == ["checkpoint-0000003", "checkpoint-0000004"]
    folder, payload = last_checkpoint(tmp_path)
    assert folder.name == folders[-1]
    assert payload["state"]["step"] == 4
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "checkpoint-0000005.tmp").mkdir()  # a kill while writing leaves this; it is not read
    assert Trainer.resume(tmp_path, TEXT).state.step == 4
    with pytest.raises(ValueError, match="no checkpoint"):
        Trainer.resume(tmp_path / "nowhere", TEXT)


def test_schedule(tmp_path):
    trainer = Trainer(TINY, tiny(steps=100, decay=0.2, lr=1.0, warmup=4), tmp_path, TEXT)
    assert trainer.lr(0.0) == 0.25
    trainer.state.step = 50
    assert trainer.lr(0.7) == 1.0
    assert trainer.lr(0.9) == pytest.approx(0.5)
    assert trainer.lr(1.0) == 0.02
    trainer.advance(0.31)  # forced
    assert trainer.state.stage == 1
    trainer.state.recall[1], trainer.state.answers[1], trainer.state.stage_step = 0.95, 200.0, 40
    trainer.advance(0.32)  # learned
    assert trainer.state.stage == 2
    with pytest.raises(ValueError, match="forced"):
        TrainConfig(forced=(0.1,))


def test_learning_lowers_the_loss(tmp_path):
    trainer = Trainer(TINY, tiny(steps=60, lr=1e-2, tokens=128), tmp_path, TEXT)
    losses = [trainer.step()["loss_text_bits"] for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_run_logs_and_exports(tmp_path):
    pytest.importorskip("transformers")
    from transformers import LlamaForCausalLM

    out = tmp_path / "run"
    run(Trainer(TINY, tiny(steps=6), out, TEXT), log_every=2)
    entries = [json.loads(s) for s in (out / "log.jsonl").read_text().splitlines()]
    assert entries[0]["parameters"] == sum(p.numel() for p in Reader(TINY).parameters())
    assert any("held_out_bpb" in e for e in entries)
    assert [e["step"] for e in entries if "lr" in e][-1] == 6
    export(out, tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    own = Trainer.resume(out, TEXT).model
    own.load_state_dict({k: v.half().float() for k, v in own.state_dict().items()})  # as stored
    ids = torch.from_numpy(data.needle(128, 0.5, np.random.default_rng(0), TEXT)[0])[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, own(ids), atol=2e-5, rtol=1e-4)
    assert 5 < bits_per_byte(model, 256, windows=2) < 9
    assert needle_recall(model, 128, 4)["recall"] == 0.0
    match, previous = induction_scores(model, half=16, rows=2)
    assert match.shape == previous.shape == (2, 4)
    assert 0 < float(match.max()) < 0.5


def test_command_refuses_to_overwrite(tmp_path, capsys):
    trainer = Trainer(TINY, tiny(), tmp_path, TEXT)
    trainer.save()
    assert main(["--out", str(tmp_path)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_command_needs_a_checkpoint_to_go_on(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--resume"]) == 2
    assert main(["--out", str(tmp_path), "--export", str(tmp_path / "hf")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
