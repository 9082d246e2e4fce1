"""The runner: failures stay alone, interrupted runs go on, records are whole, fresh ones are kept; and every experiment
of the catalogue runs in its quick form.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random

import numpy as np
import pytest
import torch
from made_up import entry, record

from foveate.catalogue import Catalogue, UnknownKey, lab, load, pictures, plots
from foveate.catalogue.lab import HOLDS, Figure, Finding, bars
from foveate.catalogue.record import path_of, read, write
from foveate.catalogue.reproduce import PARTIAL, Outcome, chosen, run_all
from foveate.catalogue.resolve import sources

SOURCE = lab.interval  # whose file stands for the experiments' own


class Experiments:
    """Made-up experiments under `foveate.catalogue.lab`, and how often each ran and did its steps."""

    def __init__(self, monkeypatch):
        self.patch, self.calls = monkeypatch, []

    def add(self, key, experiment, picture=None):
        """An entry whose experiment is a function of the lab; calls of steps are noted by name."""

        @functools.wraps(SOURCE)  # its source is then a file of the package
        def run(given):
            self.calls.append(key)
            return experiment(given)

        self.patch.setattr(lab, f"run_{key}", run, raising=False)
        paths = {"evidence": f"foveate.catalogue.lab.run_{key}"}
        if picture is not None:
            self.patch.setattr(lab, f"picture_{key}", functools.wraps(SOURCE)(lambda: picture), raising=False)
            paths["picture"] = f"foveate.catalogue.lab.picture_{key}"
        return entry(key, **paths)

    def step(self, name, value=1.0):
        def make():
            self.calls.append(name)
            return value

        return make


@pytest.fixture
def made(monkeypatch):
    return Experiments(monkeypatch)


def found(value=1.0, **fields):
    figure = Figure("gain", value)
    made = {"question": "q", "counts_if": "c", "verdict": HOLDS, "summary": "s", "figures": (figure,)}
    return Finding(**{**made, "plot": bars("t", "y", [figure]), **fields})


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ----------------------------------------------------------------------------------------- what a run leaves
def test_a_run_leaves_record_and_plot(made, tmp_path):
    picture = pictures.weights("A picture.", torch.eye(3))
    one = made.add("one", lambda given: found(), picture)
    (outcome,) = run_all([one], tmp_path / "out")
    assert outcome == Outcome("one", outcome.record)
    assert files(tmp_path / "out") == ["one.json", "one.svg"]
    back = read(path_of(tmp_path / "out", "one"))
    assert (back.key, back.quick, back.seeds, back.verdict) == ("one", False, (0, 1, 2), HOLDS)
    assert back.picture == picture
    assert back.fresh()
    assert set(back.sources) == set(sources((*one.implementation, "foveate.catalogue.lab.interval")))
    assert back.environment["device"] == "cpu"
    assert {"commit", "torch", "date", "threads"} <= set(back.environment)
    assert (tmp_path / "out" / "one.svg").read_text(encoding="utf-8").startswith("<svg")


def test_seeds_are_set_before_every_experiment(made, tmp_path):
    def draw(given):
        drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
        return found(drawn)

    entries = [made.add(key, draw) for key in ("one", "two")]
    values = [o.record.figures[0].value for o in run_all(entries, tmp_path)]
    values += [o.record.figures[0].value for o in run_all(entries[:1], tmp_path)]
    assert len(set(values)) == 1


def test_a_failure_does_not_stop_the_rest(made, tmp_path):
    def broken(given):
        raise RuntimeError("broken on purpose")

    entries = [
        made.add("one", broken),
        made.add("two", lambda given: 7),
        made.add("three", lambda given: found(plot={"kind": "pie", "title": "t"})),
        dataclasses.replace(made.add("four", lambda given: found()), evidence="foveate.catalogue.lab.gone"),
        made.add("five", lambda given: found()),
    ]
    outcomes = {o.key: o for o in run_all(entries, tmp_path)}
    assert list(outcomes) == ["one", "two", "three", "four", "five"]
    assert outcomes["one"].error.startswith("RuntimeError: broken on purpose (test_reproduce.py:")
    assert "lab.run_two returned int; accepted: a Finding" in outcomes["two"].error
    assert "kind 'pie'; accepted: lines, bars" in outcomes["three"].error
    assert "has no gone" in outcomes["four"].error
    assert [o.record is None for o in outcomes.values()] == [True, True, True, True, False]
    assert outcomes["five"].error == ""
    assert {"one.json", "two.json", "four.json"}.isdisjoint(files(tmp_path))
    assert "five.json" in files(tmp_path)


def test_a_record_is_whole_or_absent(made, tmp_path, monkeypatch):
    one = made.add("one", lambda given: found())
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    (outcome,) = run_all([one], tmp_path)
    assert "no space left" in outcome.error
    assert not path_of(tmp_path, "one").exists()
    monkeypatch.setattr(os, "replace", replace)
    (outcome,) = run_all([one], tmp_path)
    assert read(path_of(tmp_path, "one")).figures == outcome.record.figures


def test_no_plot_of_an_earlier_run_stays(made, tmp_path):
    list(run_all([made.add("one", lambda given: found())], tmp_path))
    assert "one.svg" in files(tmp_path)
    list(run_all([made.add("one", lambda given: found(plot=None))], tmp_path))
    assert files(tmp_path) == ["one.json"]


# ------------------------------------------------------------------------------------- interrupted and resumed
def stepwise(made, interrupt):
    """Three steps; the second is interrupted as long as `interrupt` holds anything."""

    def experiment(given):
        first = given.once("first", made.step("first", 1.0))

        def second():
            made.calls.append("second")
            if interrupt:
                raise interrupt.pop()
            return 2.0

        total = first + given.once("second", second) + given.once("third", made.step("third", 4.0))
        return found(total)

    return experiment


def test_an_interrupted_run_goes_on_after_its_last_step(made, tmp_path):
    interrupt = [KeyboardInterrupt()]
    entries = [made.add("one", stepwise(made, interrupt)), made.add("two", lambda given: found())]
    with pytest.raises(KeyboardInterrupt):
        list(run_all(entries, tmp_path))
    assert made.calls == ["one", "first", "second"]
    assert files(tmp_path) == [f"{PARTIAL}/one/first.json"]
    outcomes = list(run_all(entries, tmp_path, resume=True))
    assert made.calls[3:] == ["one", "second", "third", "two"]
    assert outcomes[0].record.figures[0].value == 7.0
    assert files(tmp_path) == ["one.json", "one.svg", "two.json", "two.svg"]
    assert not (tmp_path / PARTIAL).exists()


def test_without_resume_it_starts_anew(made, tmp_path):
    one = made.add("one", stepwise(made, [KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        list(run_all([one], tmp_path))
    list(run_all([one], tmp_path))
    assert made.calls[3:] == ["one", "first", "second", "third"]


def test_a_failed_run_goes_on_after_its_last_step(made, tmp_path):
    one = made.add("one", stepwise(made, [RuntimeError("no memory")]))
    (outcome,) = run_all([one], tmp_path)
    assert outcome.record is None
    list(run_all([one], tmp_path, resume=True))
    assert made.calls[3:] == ["one", "second", "third"]


def test_steps_of_quick_and_full_runs_are_apart(made, tmp_path):
    one = made.add("one", stepwise(made, [KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        list(run_all([one], tmp_path, quick=True))
    assert files(tmp_path) == [f"{PARTIAL}/one.quick/first.json"]
    list(run_all([one], tmp_path, resume=True))
    assert made.calls[3:] == ["one", "first", "second", "third"]


def test_finished_records_survive_an_interruption(made, tmp_path):
    def stop(given):
        raise KeyboardInterrupt

    entries = [made.add("one", lambda given: found()), made.add("two", stop)]
    with pytest.raises(KeyboardInterrupt):
        list(run_all(entries, tmp_path))
    assert read(path_of(tmp_path, "one")).key == "one"


def test_resume_keeps_what_is_fresh_and_of_the_same_form(made, tmp_path):
    entries = [
        made.add(key, lambda given: found(2.0)) for key in ("fresh", "stale", "quick", "spoilt", "none")
    ]
    old = {"figures": (Figure("gain", 1.0),), "sources": sources(("foveate.catalogue.lab.interval",))}
    write(record("fresh", **old), tmp_path)
    write(record("stale", **{**old, "sources": {"catalogue/plots.py": ("0" * 16, "0" * 16)}}), tmp_path)
    write(record("quick", quick=True, **old), tmp_path)
    path_of(tmp_path, "spoilt").write_text("{", encoding="utf-8")
    outcomes = list(run_all(entries, tmp_path, resume=True))
    assert [(o.key, o.kept, o.record.figures[0].value) for o in outcomes] == [
        ("fresh", True, 1.0), ("stale", False, 2.0), ("quick", False, 2.0), ("spoilt", False, 2.0), ("none", False, 2.0)
    ]  # fmt: skip
    assert made.calls == ["stale", "quick", "spoilt", "none"]
    assert not any(read(path_of(tmp_path, e.key)).quick for e in entries)
    assert [o.kept for o in run_all(entries, tmp_path, resume=True)] == [True] * 5
    assert [o.kept for o in run_all(entries[:1], tmp_path)] == [False]


def test_a_quick_run_does_not_replace_a_full_one(made, tmp_path):
    entries = [made.add(key, lambda given: found(2.0)) for key in ("one", "two")]
    full = write(record("one", figures=(Figure("gain", 1.0),)), tmp_path)
    before = full.read_bytes()
    for resume in (False, True):
        outcomes = list(run_all(entries, tmp_path, quick=True, resume=resume))
        assert "a quick run would replace; accepted: another directory" in outcomes[0].error
        assert outcomes[1].record.quick
    assert full.read_bytes() == before
    assert made.calls == ["two"]  # the resumed one kept it
    assert not next(run_all(entries[1:], tmp_path)).record.quick  # a full run replaces a quick one


def test_a_quick_record_is_no_evidence(made, tmp_path):
    one = made.add("one", lambda given: found())
    (outcome,) = run_all([one], tmp_path, quick=True)
    assert outcome.record.seeds == (0,)
    assert outcome.record.verdict == HOLDS
    assert Catalogue({"one": one}, tmp_path).status("one") == "implemented"
    list(run_all([one], tmp_path))
    assert Catalogue({"one": one}, tmp_path).status("one") == "works"


def test_the_listener_hears_every_entry(made, tmp_path):
    heard = []

    class Ears:
        def __init__(self, entry):
            self.key = entry.key

        def step(self, what, share):
            heard.append((self.key, what, share))

    entries = [made.add(key, lambda given: found(sum(given.track([1, 2], "rows")))) for key in ("one", "two")]
    list(run_all(entries, tmp_path, listen=Ears))
    assert heard == [(key, "rows", share) for key in ("one", "two") for share in (0.0, 0.5, 1.0)]


# --------------------------------------------------------------------------------------------- what is run
def test_chosen(made, tmp_path):
    one, two = (made.add(key, lambda given: found()) for key in ("one", "two"))
    bare = dataclasses.replace(entry("bare"), evidence="")
    catalogue = Catalogue({e.key: e for e in (one, two, bare)}, tmp_path)
    assert chosen(catalogue, [], True) == [one, two]
    assert chosen(catalogue, ["two", "one", "two"], False) == [two, one]
    for keys, everything, error, says in (
        ([], False, ValueError, "nothing to run"),
        (["one"], True, ValueError, "accepted: keys, or --all"),
        (["bare"], False, ValueError, "bare: implemented, it has no experiment yet"),
        (["three"], False, UnknownKey, "three: no paper has this key"),
    ):
        with pytest.raises(error, match=says):
            chosen(catalogue, keys, everything)


# --------------------------------------------------------------------------------- the catalogue's experiments
CATALOGUE = load()


@pytest.mark.parametrize("paper", [e for e in CATALOGUE if e.evidence], ids=lambda e: e.key)
def test_every_experiment_runs_in_its_quick_form(paper, tmp_path):
    (outcome,) = run_all([paper], tmp_path, quick=True)
    assert outcome.record is not None, outcome.error
    back = read(path_of(tmp_path, paper.key))
    assert (back.key, back.quick) == (paper.key, True)
    assert back.fresh()
    assert back.figures == outcome.record.figures
    for text in (back.question, back.counts_if, back.summary):
        assert text.strip()
    if back.plot is not None:
        assert plots.svg(back.plot).startswith("<svg")
        assert plots.png(back.plot).startswith(b"\x89PNG")
    if paper.picture:
        assert back.picture is not None
        assert back.picture["caption"].strip()
        assert pictures.text(back.picture).strip()
