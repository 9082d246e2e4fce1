"""The mechanism that CONTRIBUTING.md adds from scratch: every step of it works as it is printed there."""

from __future__ import annotations

import doctest
import functools
import re
import sys
import types
from pathlib import Path

import pytest

import foveate.core.patterns
import foveate.patterns
from foveate.catalogue import pictures
from foveate.catalogue.conformance import checks_for
from foveate.catalogue.entry import (
    from_dict,
    tomllib,  # pyright: ignore[reportPrivateImportUsage]
)
from foveate.catalogue.record import HOLDS
from foveate.catalogue.reproduce import run_all
from foveate.catalogue.resolve import UnresolvedPath, resolve, source_file

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|toml)\n(.*?)```", PAGE, re.DOTALL)
CODE, ENTRY, EXPERIMENT, TESTS = (text for _, text in BLOCKS)
NAMES = {
    "code": "foveate.core.patterns.stepped",
    "experiment": "foveate.catalogue.experiments.stepping_stones",
    "tests": "test_stepped",
}


def module(name: str, text: str, monkeypatch) -> types.ModuleType:
    """The text as a module of that name."""
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(text, name, "exec"), made.__dict__)
    return made


@pytest.fixture
def example(monkeypatch):
    """The example's modules, in the places where the page puts them."""
    code = module(NAMES["code"], CODE, monkeypatch)
    for package in (foveate.core.patterns, foveate.patterns):
        monkeypatch.setattr(package, "Stepped", code.Stepped, raising=False)
    experiment = module(NAMES["experiment"], EXPERIMENT, monkeypatch)
    return types.SimpleNamespace(
        code=code, experiment=experiment, tests=module(NAMES["tests"], TESTS, monkeypatch)
    )


def entry():
    return from_dict(tomllib.loads(ENTRY), "stepping_stones.toml")


def test_the_page_holds_the_four_files():
    assert [kind for kind, _ in BLOCKS] == ["python", "toml", "python", "python"]


def test_the_docstring_runs(example):
    assert doctest.testmod(example.code) == (0, 1)


def test_the_entry_is_good_and_points_at_the_code(example):
    paper = entry()
    assert paper.key == "stepping_stones"
    for path in (*paper.implementation, paper.evidence, paper.picture):
        assert callable(resolve(path))
    with pytest.raises(UnresolvedPath, match="has no source file"):  # it lives in no file here
        source_file(resolve(paper.implementation[0]))


def test_the_common_suite_passes(example):
    paper = entry()
    steps = checks_for(paper, paper.checks[0])
    assert {"no_later_key", "prefix_causality", "limits"} <= {step.name for step in steps}
    for step in steps:
        if not step.slow:
            step()


def test_the_experiment_runs_and_shows_the_claim(example, tmp_path, monkeypatch):
    monkeypatch.setattr("foveate.catalogue.reproduce.sources", lambda paths: {"patterns.py": ("0", "0")})
    (outcome,) = run_all([entry()], tmp_path)
    assert outcome.record is not None, outcome.error
    assert outcome.record.verdict == HOLDS
    assert outcome.record.figures[0].value == 1.0
    assert outcome.record.figures[1].value < 0.2
    assert len(pictures.text(outcome.record.picture).splitlines()) == 24
    assert (tmp_path / "stepping_stones.svg").exists()


def test_the_snippet_runs(example, capsys):
    exec(entry().snippet, {})
    assert capsys.readouterr().out == "torch.Size([1, 4, 1000, 32])\n"


def test_the_tests_pass(example):
    ran = 0
    for name, function in vars(example.tests).items():
        if not name.startswith("test_"):
            continue
        marks = getattr(function, "pytestmark", [])
        (names, cases) = marks[0].args if marks else ((), [()])
        names = (names,) if isinstance(names, str) else names
        for case in cases:
            functools.partial(
                function, **dict(zip(names, case if len(names) != 1 else (case,), strict=True))
            )()
            ran += 1
    assert ran == 8


def test_the_files_and_commands_are_named():
    for path in ("foveate/core/patterns/stepped.py", "foveate/catalogue/papers/stepping_stones.toml",
                 "foveate/catalogue/experiments/stepping_stones.py", "tests/core/test_stepped.py"):  # fmt: skip
        assert path in PAGE
        assert (Path(__file__).parents[2] / path).parent.is_dir()
