"""The training comparison at tiny size: same start, same data, resumable, and a verdict that can say no."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_window as tw

from foveate.organisms.reader.model import Reader

TINY = tw.Settings(engine="reference", steps=6, context=96, window=16, layers=1, dim=16, seeds=2)
TEXT = bytes(range(32, 127)) * 40
ARGUMENTS = [
    "--engine", "reference", "--steps", "8", "--context", "64", "--window", "16", "--layers", "1", "--dim", "16",
    "--seeds", "2", "--smooth", "2", "--checkpoint", "3",
]  # fmt: skip


def test_both_engines_attend_to_the_window_and_the_sinks():
    s = replace(TINY, context=70, window=9, sinks=3)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 70, 8, generator=g) for heads in (4, 2, 2))
    i = torch.arange(70)
    seen = (i[:, None] >= i) & ((i[:, None] - i < 9) | (i < 3))
    logits = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 8**-0.5
    want = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    for engine in ("native", "reference", "sdpa_mask"):
        torch.testing.assert_close(tw.attend_with(engine, s)(q, k, v), want, atol=1e-5, rtol=0)


def test_runs_of_one_seed_start_alike_and_see_the_same_bytes():
    first, peer, other = tw.runs_of(TINY, TEXT)
    assert (first.engine, peer.engine, other.engine) == ("reference", "sdpa_mask", "reference")
    for a, b in zip(first.model.parameters(), peer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(0)
    organism = Reader(first.model.cfg).state_dict()  # its own initialisation, not that of a fresh nn.Linear
    assert all(torch.equal(value, organism[name]) for name, value in first.model.state_dict().items())
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))
    for run in (first, peer, other):
        run.step()
        run.step()
    assert first.losses == pytest.approx(peer.losses, abs=1e-5)
    assert first.losses[0] != other.losses[0]


def test_training_reduces_the_loss():
    run = tw.Run("sdpa_mask", 0, replace(TINY, steps=40, lr=1e-2), TEXT)
    for _ in range(40):
        run.step()
    assert run.losses[-1] < run.losses[0] - 0.5


def test_a_resumed_run_takes_the_same_steps(tmp_path):
    whole = tw.runs_of(TINY, TEXT)
    tw.train(whole, TINY, tmp_path / "whole", every=100)
    part = tw.runs_of(TINY, TEXT)
    tw.train(part, replace(TINY, steps=4), tmp_path / "part", every=2)
    assert [p.name for p in (tmp_path / "part").glob("checkpoint-*")] == ["checkpoint-00004"]
    again = tw.runs_of(TINY, TEXT)
    tw.load(again, TINY, tmp_path / "part")
    assert len(again[0].losses) == 4
    tw.train(again, TINY, tmp_path / "part", every=100)
    for a, b in zip(whole, again, strict=True):
        assert a.losses == b.losses
        for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
            assert torch.equal(x, y)


def test_resuming_under_other_settings_is_refused(tmp_path):
    runs = tw.runs_of(TINY, TEXT)
    tw.train(runs, replace(TINY, steps=4), tmp_path, every=4)
    with pytest.raises(ValueError, match=r"other settings \(window was 16, now 8\)"):
        tw.load(runs, replace(TINY, window=8), tmp_path)


class Told:
    def __init__(self, losses, seconds):
        self.losses, self.seconds = losses, seconds


def test_the_verdict_is_about_noise_and_speed():
    noise = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)) * 0.05
    curve = torch.linspace(8, 4, 40)
    first, *others = (Told((curve + e).tolist(), [0.5] * 40) for e in noise[:3])
    near = Told([x + 1e-4 for x in first.losses], [2.0] * 40)
    far = Told([x + 0.5 * (i > 30) for i, x in enumerate(first.losses)], [2.0] * 40)
    found = tw.verdict([first, near, *others], 5)
    assert found["same"] is True
    assert found["difference"] == pytest.approx(1e-4, rel=1e-6)
    assert found["speedup"] == pytest.approx(4.0)
    assert (found["step_ms"], found["peer_step_ms"]) == (500.0, 2000.0)
    assert tw.verdict([first, far, *others], 5)["same"] is False
    assert tw.verdict([first, Told([float("nan")] * 40, [1.0] * 40), *others], 5)["same"] is False
    alike = [
        Told(list(first.losses), [0.5] * 40) for _ in others
    ]  # no spread between seeds: nothing is within it
    assert tw.verdict([first, near, *alike], 5)["same"] is False


def test_the_script_writes_csv_and_picture_and_goes_on(tmp_path, capsys):
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert tw.main([*ARGUMENTS, *places]) == 0
    paths = sorted(p.suffix for p in (tmp_path / "out").iterdir())
    assert paths == [".csv", ".png"]
    with next((tmp_path / "out").glob("*.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 3
    assert {row["engine"] for row in rows} == {"reference", "sdpa_mask"}
    assert {"loss_bits_per_byte", "train_step_time", "context", "cpu", "threads", "torch", "commit"} <= set(
        rows[0]
    )
    assert "speedup" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        tw.main([*ARGUMENTS, *places])
    assert error.value.code == 2
    assert "holds a run: add --resume" in capsys.readouterr().err
    longer = [a if a != "8" else "9" for a in ARGUMENTS]
    assert tw.main([*longer, *places, "--resume"]) == 0
    with next((tmp_path / "out").glob("*.csv")).open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9 * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2"], "--steps 2: accepted whole numbers of at least 4"),
        (["--smooth", "9"], "--smooth 9: accepted at most half of --steps 8"),
        (["--resume"], "holds no checkpoint"),
    ],
)
def test_what_the_user_can_put_right(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        tw.main([*ARGUMENTS, "--work", str(tmp_path), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
