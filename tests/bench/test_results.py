from __future__ import annotations

import json

import pytest

from foveate.bench import results
from foveate.bench.errors import CompareError, unknown
from foveate.bench.machine import environment
from foveate.bench.memory import peak_of

IDENTITY = {"settings": {"lengths": (512,), "seed": 0}, "model": {"fingerprint": "a"}}


def start(directory, identity=IDENTITY, resume=False):
    return results.open_results(directory, identity, "foveate compare", {}, resume)


def test_resume_takes_the_cells_and_refuses_other_settings(tmp_path):
    first = start(tmp_path)
    first.cells.append({"mechanism": "dense", "length": 512})
    first.save()
    assert start(tmp_path, resume=True).cell("dense", 512) is not None
    other = {"settings": {"lengths": (512,), "seed": 7}, "model": {"fingerprint": "a"}}
    with pytest.raises(CompareError, match=r"other settings.*seed was 0, now 7"):
        start(tmp_path, other, resume=True)
    assert len(json.loads(first.path.read_text())["cells"]) == 1


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    first = start(tmp_path)
    first.save()
    with pytest.raises(CompareError, match=r"unfinished run.*--resume"):
        start(tmp_path)


def test_a_finished_run_is_set_aside(tmp_path):
    first = start(tmp_path)
    first.finish()
    (tmp_path / "report.html").write_text("old")
    again = start(tmp_path)
    assert not again.path.exists()
    kept = list(tmp_path.glob("previous-*"))
    assert len(kept) == 1
    assert sorted(p.name for p in kept[0].iterdir()) == ["report.html", "results.json"]


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    results.write_atomic(path, "old")

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr(results.os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        results.write_atomic(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as results"),
        ('{"kind": "else"}', "not a file of foveate compare"),
        ('{"kind": "foveate.compare", "schema": 99}', "schema 99, this version reads schema 1"),
    ],
)
def test_foreign_results_are_refused(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(CompareError, match=message):
        start(tmp_path, resume=True)
    assert (tmp_path / "results.json").read_text() == content


def test_environment_is_json_and_complete():
    row = json.loads(json.dumps(environment()))
    wanted = {
        "cpu",
        "cores",
        "threads",
        "isa",
        "os",
        "python",
        "torch",
        "transformers",
        "foveate",
        "commit",
        "date",
    }
    assert wanted <= set(row)
    assert row["cpu"]


def test_peak_memory_sees_what_a_call_adds_and_only_that():
    import torch

    def call() -> None:
        pieces = [torch.ones(1 << 18) for _ in range(32)]  # 32 MiB that the allocator likes to keep
        assert len(pieces) == 32

    first, second = peak_of(call), peak_of(call)
    if first.bytes is None:
        pytest.skip(first.method)
    assert second.bytes is not None
    for peak in (first.bytes, second.bytes):
        assert 30 << 20 <= peak <= 60 << 20


def test_unknown_names_get_the_nearest():
    message = str(unknown("mechanism", ["slidng", "zzz"], ["dense", "sliding_sinks"]))
    assert "'slidng' (did you mean 'sliding_sinks'?), 'zzz'; accepted: dense, sliding_sinks" in message
