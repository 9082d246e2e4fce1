"""The paired comparison of selectors on `reader`: equal density, the best one named on other texts, honest pairs."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import reader_recall as rr

from foveate.bench import mechanisms as mechs
from foveate.bench.recall import Sample, attention_recall
from foveate.selectors import TopBlocks

SHAPE = mechs.Shape(4, 2)


def taken(n=1024, layers=2):
    g = torch.Generator().manual_seed(0)
    return [
        Sample(i, torch.randn(1, 4, n, 16, generator=g) * 2, torch.randn(1, 2, n, 16, generator=g), 0.25)
        for i in range(layers)
    ]


@pytest.mark.parametrize("name", ["flexprefill", "blocks_bounds", "oracle"])
def test_a_selector_keeps_at_most_the_density_and_no_setting_keeps_more(name):
    found = rr.at_most(mechs.policy(name, 1024, 0.3, SHAPE), 0.3, taken())
    assert found is not None
    built, layouts, setting = found
    assert len(layouts) == 2
    assert rr.density_of(layouts) <= 0.3 * rr.SLACK
    assert layouts == rr.layouts_of(built.policy, taken())
    if name == "flexprefill":
        policy = mechs.policy(name, 1024, 0.3, SHAPE)
        step = (policy.tune.high - policy.tune.low) / 64
        again = rr.at_most(policy, 0.3, taken(), setting + 3 * step)
        assert again[2] == pytest.approx(setting)  # turned down to where it fits, and no further
        assert rr.density_of(rr.layouts_of(policy.tune.make(setting + step).policy, taken())) > 0.3 * rr.SLACK
        assert rr.at_most(mechs.policy(name, 1024, 0.3, SHAPE), 0.3, taken(), setting)[2] == setting
    else:
        more = TopBlocks(64, built.parameters["keep"] + 1, built.policy.score)
        assert rr.density_of(rr.layouts_of(more, taken())) > 0.3 * rr.SLACK


def test_a_selector_that_cannot_keep_so_few_is_left_out():
    assert rr.at_most(mechs.policy("blocks_mean", 1024, 0.3, SHAPE), 0.05, taken()) is None


def rows(recalls):
    """One row per (mechanism, text); texts 0 and 1 choose."""
    return [
        {
            "text": t, "role": "choose" if t < 2 else "test", "density_asked": 0.25, "mechanism": name, "recall": r,
        }
        for name, held in recalls.items()
        for t, r in enumerate(held)
    ]  # fmt: skip


def test_the_best_is_named_on_the_first_texts_and_compared_on_the_others_in_pairs():
    made = rows(
        {
            "sliding_sinks": [0.80, 0.80, 0.70, 0.80, 0.90],
            "random": [0.10, 0.10, 0.20, 0.10, 0.30],
            "flexprefill": [0.90, 0.90, 0.71, 0.83, 0.89],
            "blocks_mean": [0.50, 0.50, 0.99, 0.99, 0.99],  # better where it is not asked
            "oracle": [0.99, 0.99, 0.99, 0.99, 0.99],
        }
    )
    found = {row["other"]: row for row in rr.compared(made[::-1], [0.25])}
    assert set(found) == {"sliding_sinks", "random", "blocks_mean", "oracle"}
    row = found["sliding_sinks"]
    assert row["best"] == "flexprefill"
    assert row["difference"] == pytest.approx(0.01)
    assert row["texts"] == 3
    assert row["wins"] == 2
    half = 4.303 * 0.02 / 3**0.5  # differences 0.01, 0.03, -0.01 have a standard deviation of 0.02
    assert (row["low"], row["high"]) == (pytest.approx(0.01 - half), pytest.approx(0.01 + half))
    assert found["oracle"]["difference"] < 0


def test_who_is_not_there_on_every_text_is_not_the_best():
    made = rows(
        {"sliding_sinks": [0.5] * 5, "random": [0.1] * 5, "flexprefill": [0.9] * 4, "blocks_mean": [0.6] * 5}
    )
    assert {row["best"] for row in rr.compared(made, [0.25])} == {"blocks_mean"}
    assert rr.compared(rows({"sliding_sinks": [0.5] * 5, "random": [0.1] * 5}), [0.25]) == []


def test_one_text_measures_all_layers_at_equal_density(follower):
    from foveate.bench.subject import load_subject

    subject = load_subject(str(follower))
    ids = torch.randint(97, 123, (700,), generator=torch.Generator().manual_seed(0)) % 60
    made = rr.one_text(subject, ids, ["sliding_sinks", "random", "blocks_bounds"], [0.4], 0)
    assert [row["mechanism"] for row in made] == ["sliding_sinks", "random", "blocks_bounds"]
    assert made[0]["density"] == pytest.approx(0.4, rel=0.01)
    assert made[1]["density"] == pytest.approx(0.4, rel=0.01)
    assert made[2]["density"] <= 0.4 * rr.SLACK
    window = mechs.policy("sliding_sinks", 700, 0.4, subject.shape).policy.layout(700)
    layers = rr.samples(subject.model, ids, 2, 0)
    held = [float(attention_recall(s.q, s.k, window, scale=s.scale).mean()) for s in layers]
    assert made[0]["recall"] == pytest.approx(sum(held) / 2, abs=0.05)  # all rows and 128 of them


def test_csv_files_have_the_environment(tmp_path):
    rr.write_csv(
        [{"text": 0, "recall": 0.5, "low": None}], {"cpu": "x", "isa": ["a", "b"]}, tmp_path / "x.csv"
    )
    (row,) = csv.DictReader((tmp_path / "x.csv").open())
    assert row == {"text": "0", "recall": "0.500000", "low": "", "cpu": "x", "isa": "a b"}


@pytest.mark.parametrize("wrong", [["--texts", "3"], ["--length", "9000"], ["--densities", "x"]])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit):
        rr.main(wrong)
    assert "accepted" in capsys.readouterr().err
