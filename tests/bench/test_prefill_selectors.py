"""The benchmark of prefill selectors: its measures against definitions, its arithmetic, and going on after a kill."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import prefill_selectors as ps

import foveate as fv
from foveate.patterns import Causal, SlidingWindow

QUICK = ("window + sinks", "blocks by bounds")


def tensors(n=300):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, h, n, ps.DIM, generator=g) for h in (ps.HEADS, ps.KV_HEADS, ps.KV_HEADS))


def test_dense_rows_are_rows_of_attention():
    q, k, v = tensors()
    rows = torch.tensor([0, 77, 299])
    out, lse = ps.dense_rows(q, k, v, rows)
    want, whole = fv.attention(q, k, v, is_causal=True, return_lse=True)
    assert (out - want[:, :, rows]).abs().max() < 1e-5
    assert (lse - whole[:, :, rows]).abs().max() < 1e-5


def test_a_layout_and_its_log_sum_exp_give_the_same_recall():
    q, k, v = tensors()
    who = Causal() & SlidingWindow(40)
    direct = ps.quality(ps.pattern(who), q, k, v, 0)
    gathered = ps.in_one_call(
        lambda q, k, v: fv.attention(q, k, v, who),
        lambda q, k, v: fv.attention(q, k, v, who, return_lse=True)[1],
        lambda q, k: ps.HEADS * who.layout(300).area,
    )
    found = ps.quality(gathered, q, k, v, 0)
    for key in ("recall", "recall_least_head", "output_error", "density_pairs"):
        assert found[key] == pytest.approx(direct[key], abs=1e-5)
    assert 0 < direct["recall"] < 1
    assert direct["density_tiles"] == pytest.approx(9 / 15)
    nothing = ps.quality(ps.in_one_call(lambda q, k, v: fv.attention(q, k, v, who)), q, k, v, 0)
    assert nothing["recall"] is None
    assert nothing["output_error"] == pytest.approx(direct["output_error"], abs=1e-5)


def test_dense_has_no_error():
    q, k, v = tensors()
    found = ps.quality(ps.pattern(Causal()), q, k, v, 0)
    assert found["recall"] == found["density_pairs"] == found["density_tiles"] == 1.0
    assert found["output_error"] < 1e-5


@pytest.mark.parametrize("arm", [arm for arm in ps.ARMS if not arm.missing()], ids=lambda arm: arm.name)
def test_every_arm_that_is_there_runs_and_is_causal(arm):
    n = 1024
    q, k, v = ps.structured_qkv(n, ps.HEADS, ps.KV_HEADS, ps.DIM, ps.generator(0))
    way = arm.make(n)
    found = ps.quality(way, q, k, v, 0)
    assert found["recall"] is None or 0 < found["recall"] <= 1.0 + 1e-6
    out = way.attend(q, k, v, way.choose(q, k))
    v2 = v.clone()
    v2[:, :, 700:] += 100  # nothing before reads it
    assert (way.attend(q, k, v2, way.choose(q, k))[:, :, :640] - out[:, :, :640]).abs().max() < 1e-4


def test_what_this_version_lacks_is_named():
    assert ps.Arm("x", lambda n: None, needs="foveate.selectors:NoSuchThing").missing()
    assert ps.Arm("x", lambda n: None, needs="foveate.no_such_room:X").missing()
    assert not ps.Arm("x", lambda n: None, needs="foveate.selectors:FlexPrefill").missing()


def state(lengths=(1000, 2000, 4000)):
    """A mechanism that is 4 times as fast as dense with exponent 1; dense has 2."""
    rounds = [
        {"n": n, "round": r, "seconds": {"dense": [0, (n / 1000) ** 2 * (1 + r)], "window + sinks": [
            0.1, n / 4000 * (1 + r)]}}
        for n in lengths for r in range(3)
    ]  # fmt: skip
    found = dict.fromkeys(("recall", "recall_least_head", "density_pairs", "density_tiles"), 0.97)
    quality = {str(n): {**found, "first_seconds": 1.0, "output_error": 0.1} for n in lengths}
    return {"quality": {"window + sinks": quality}, "rounds": rounds, "settings": {}}


def test_rows_have_medians_of_paired_ratios_and_the_exponent():
    s = ps.Settings((1000, 2000, 4000), ("window + sinks",), (3, 3, 3))
    rows = ps.rows_of(s, state())
    assert [(r["mechanism"], r["n"]) for r in rows][3:] == [("window + sinks", n) for n in (1000, 2000, 4000)]
    assert [r["speedup"] for r in rows[3:]] == pytest.approx([4, 8, 16])
    assert rows[3]["seconds"] == pytest.approx(0.5)
    assert (rows[3]["seconds_least"], rows[3]["seconds_most"]) == pytest.approx((0.25, 0.75))
    assert rows[0]["exponent"] == pytest.approx(2.0)
    assert rows[3]["exponent"] == pytest.approx(1.0)
    assert rows[3]["exponent_low"] == pytest.approx(1.0)
    assert rows[0]["recall"] == 1.0


def test_the_verdict_counts_what_was_aimed_at():
    s = ps.Settings((8192, 16384, 32768), ("window + sinks",), (3, 3, 3))
    made = state((8192, 16384, 32768))
    assert ps.verdict(ps.rows_of(s, made))[0].startswith("1 of 1 mechanisms are at least 3 times as fast")
    made["quality"]["window + sinks"]["32768"]["recall"] = 0.94
    assert ps.verdict(ps.rows_of(s, made))[0].startswith("0 of 1")
    made["quality"]["window + sinks"]["32768"]["recall"] = None
    assert ps.verdict(ps.rows_of(s, made))[0].startswith("0 of 1")
    assert "exponent of window + sinks: 1.00 [1.00, 1.00]: below 1.5" in ps.verdict(ps.rows_of(s, made))
    for r in made["rounds"]:
        r["seconds"]["window + sinks"] = r["seconds"]["dense"]
    assert any("NOT below 1.5" in line for line in ps.verdict(ps.rows_of(s, made)))


def run(tmp_path, *more):
    names = ",".join(QUICK)
    return ps.main(["--lengths", "1024", "--arms", names, "--rounds", "2", "--out", str(tmp_path), *more])


def test_it_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    calls = []
    whole = ps.timed

    def killed(way, q, k, v):
        calls.append(1)
        if len(calls) == 5:  # in the second round of three calls
            raise KeyboardInterrupt
        return whole(way, q, k, v)

    monkeypatch.setattr(ps, "timed", killed)
    assert run(tmp_path) == 130
    (path,) = tmp_path.glob("prefill_selectors-*.json")
    kept = json.loads(path.read_text())
    assert len(kept["rounds"]) == 1
    assert set(kept["quality"]) == set(QUICK)
    monkeypatch.setattr(ps, "timed", whole)
    with pytest.raises(SystemExit):
        run(tmp_path, "--resume", "--seed", "1")
    assert "made with other seed" in capsys.readouterr().err
    assert run(tmp_path, "--resume") == 0
    done = json.loads(path.read_text())
    assert done["rounds"][0] == kept["rounds"][0]
    assert len(done["rounds"]) == 2
    assert done["quality"] == kept["quality"]
    table = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert [(r["mechanism"], r["n"]) for r in table] == [(name, "1024") for name in ("dense", *QUICK)]
    assert float(table[2]["recall"]) > 0.9
    assert table[0]["cpu"]
    assert table[0]["kv_heads"] == "2"
    assert run(tmp_path, "--resume") == 0  # nothing is left to do, and nothing changes
    assert json.loads(path.read_text()) == done
    monkeypatch.setattr(ps, "commit", lambda _: "another")
    assert run(tmp_path, "--resume") == 0
    assert "made with another commit: starting anew" in capsys.readouterr().out
    assert json.loads(path.read_text())["rounds"][0] != kept["rounds"][0]
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--lengths", "x"], "accepted whole numbers"),
        (["--lengths", "512"], "at least 1024"),
        (["--arms", "nothing"], "accepted window + sinks"),
        (["--rounds", "-1"], "0 or more"),
    ],
)
def test_wrong_arguments(wrong, message, capsys):
    with pytest.raises(SystemExit):
        ps.main(wrong)
    assert message in capsys.readouterr().err
