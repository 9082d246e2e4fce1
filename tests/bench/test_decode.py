"""`foveate caches` on the shipped organism, small."""

from __future__ import annotations

import csv
import io
import json

import pytest
from click.testing import CliRunner

from foveate.bench import decode
from foveate.bench.errors import CompareError
from foveate.cli import app

SMALL = decode.Settings(
    length=384,
    policies=("streaming", "oracle"),
    budgets=(0.5,),
    needles=1,
    depths=(0.3,),
    windows=2,
    decoded=8,
)


def test_cells_are_measured_saved_and_resumed(tmp_path):
    results = decode.run(SMALL, tmp_path)
    dense, streaming, oracle = results["cells"]
    assert (dense["policy"], dense["bits_per_byte_lost"]) == ("dense", None)
    assert dense["tokens_per_head"] == pytest.approx(383)
    assert streaming["tokens_per_head"] == pytest.approx(192)
    assert streaming["bytes"] < 0.65 * streaming["bytes_full"]
    assert oracle["tokens_per_head"] == dense["tokens_per_head"]
    assert oracle["needles"] == dense["needles"]
    assert abs(oracle["bits_per_byte_lost"]) < 0.05
    assert streaming["keys_read_per_token"] == pytest.approx(192 * 4, rel=0.03)  # of four KV heads
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [row["policy"] for row in rows] == ["dense", "streaming", "oracle"]
    assert rows[0]["cpu"]
    assert (tmp_path / "caches.png").read_bytes().startswith(b"\x89PNG")

    data = json.loads((tmp_path / "results.json").read_text())
    data["cells"].pop()
    data["complete"] = False
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(CompareError, match="unfinished run; add --resume"):
        decode.run(SMALL, tmp_path)
    seen = []
    again = decode.run(SMALL, tmp_path, resume=True, say=lambda what, share: seen.append(what))
    assert again["cells"][1] == json.loads(json.dumps(streaming))
    assert again["cells"][2]["bits_per_byte"] == pytest.approx(oracle["bits_per_byte"])
    with pytest.raises(CompareError, match="other settings"):
        decode.run(decode.Settings(length=512), tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--policies", "lru"], "--policies lru: accepted h2o, oracle"),
        (["--policies", "task_kv"], "--policies task_kv: accepted"),
        (["--budgets", "2"], "--budgets 2.0: accepted fractions in (0, 1]"),
        (["--budgets", "few"], "--budgets few: accepted numbers"),
        (["--length", "16"], "--length 16: accepted 256 or more"),
        (["--decoded", "1"], "--decoded 1: accepted 2 to half"),
        (["--before", "-1"], "--before -1: accepted 0 to half"),
        (["--model", "nowhere"], "--model nowhere: no such directory"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, text, tmp_path):
    result = CliRunner().invoke(app, ["caches", "--out", str(tmp_path / "x"), *options])
    assert result.exit_code == 2
    assert text in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_the_command_prints_a_table(tmp_path):
    sizes = {"length": 384, "budgets": 0.5, "needles": 1, "windows": 1, "decoded": 4, "gate": 0}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["caches", "--policies", "random", *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "random" in result.output
    assert "bits lost" in result.output
