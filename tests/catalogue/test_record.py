"""Records of evidence: written whole, read strictly, and older than the code when the code changes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest
from made_up import record

from foveate.catalogue import record as records
from foveate.catalogue.record import FAILS, HOLDS, OPEN, VERDICTS, Figure, RecordError, digests, read, write


@pytest.fixture(autouse=True)
def _no_memory():
    records._unchanged.cache_clear()


# -------------------------------------------------------------------------------------------- files
def test_a_record_comes_back(tmp_path):
    made = record(plot={"kind": "bars"}, picture={"kind": "map"}, quality=0.9, cost=0.25)
    path = write(made, tmp_path / "new")
    assert path == records.path_of(tmp_path / "new", "made_up")
    back = read(path)
    assert json.loads(json.dumps(back.as_dict())) == json.loads(path.read_text(encoding="utf-8"))
    assert dataclasses.replace(back, sources=made.sources) == made
    assert {name: tuple(pair) for name, pair in back.sources.items()} == made.sources
    assert [p.name for p in path.parent.iterdir()] == ["made_up.json"]


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write(record(), tmp_path)
    before = path.read_bytes()

    def stop(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="no space left"):
        write(record(summary="Another."), tmp_path)
    assert path.read_bytes() == before


def test_numbers_that_are_not_numbers_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write(record(quality=float("nan")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def spoilt(change):
    data = record().as_dict()
    data["sources"] = dict(data["sources"])
    change(data)
    return json.dumps(data)


UNREADABLE = [
    ("", "cannot be read as evidence"),
    ("[]", "not a file of foveate reproduce"),
    (spoilt(lambda d: d.update(kind="foveate.compare")), "not a file of foveate reproduce"),
    (spoilt(lambda d: d.update(schema=0)), "evidence of schema 0, this version reads schema 1"),
    (spoilt(lambda d: d.update(mood="good")), "unexpected keyword argument 'mood'"),
    (spoilt(lambda d: d.pop("verdict")), "verdict"),
    (spoilt(lambda d: d.pop("figures")), "figures"),
    (spoilt(lambda d: d["figures"][0].update(size=1)), "unexpected keyword argument 'size'"),
    (spoilt(lambda d: d.update(verdict="yes")), f"verdict 'yes'; accepted: {HOLDS}"),
    (spoilt(lambda d: d.update(key="other")), "key is 'other'; accepted: the file's name"),
]


@pytest.mark.parametrize(("text", "says"), UNREADABLE, ids=[says[:30] for _, says in UNREADABLE])
def test_other_files_are_refused(tmp_path, text, says):
    path = tmp_path / "made_up.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=rf"made_up.json: .*{says}"):
        read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecordError, match="cannot be read as evidence"):
        read(tmp_path / "made_up.json")


def test_verdicts_are_three():
    assert set(VERDICTS) == {HOLDS, FAILS, OPEN}
    assert len(set(VERDICTS)) == 3


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure("a", 0.98123), "0.9812"),
        (Figure("a", 2.0, 1.5, 2.5, 3, "x"), "2x (1.5 to 2.5)"),
        (Figure("a", 12.0, unit="%"), "12%"),
        (Figure("a", 1.25, 1.0, 1.5, unit="s"), "1.25 s (1 to 1.5)"),
    ],
)
def test_figures_are_told_with_unit_and_interval(figure, text):
    assert str(figure) == text


# -------------------------------------------------------------------------------------------- freshness
CODE = '''"""What it does."""


def run(lab):
    """Run."""
    # a remark
    return [1, "text"]  # another
'''
SAME = [
    CODE.replace("# a remark", "# something else\n\n    # and more"),
    CODE.replace('"""What it does."""', '"""What it does now,\nin two lines."""'),
    CODE.replace('"""Run."""\n', "'Run it.'\n"),
    CODE.replace("  # another", "").replace("\n\n\n", "\n"),
    CODE.replace('[1, "text"]', '[\n        1, "text"]'),
]
OTHER = [
    CODE.replace("1,", "2,"),
    CODE.replace('"text"', '"Text"'),
    CODE.replace("run", "walk"),
    CODE.replace("(lab)", "(lab, *rest)"),
    CODE.replace("    return", "    if lab:\n        return"),
    CODE.replace('    return [1, "text"]', '    x = "text"\n    return [1, x]'),
    "",
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def of(source):
    return record(sources={str(source): digests(source)})  # an absolute path stays itself under the package


def test_fresh_until_the_code_changes(source):
    made = of(source)
    assert made.fresh()
    for text in SAME:
        records._unchanged.cache_clear()
        source.write_text(text, encoding="utf-8")
        assert made.fresh(), text
    for text in OTHER:
        records._unchanged.cache_clear()
        source.write_text(text, encoding="utf-8")
        assert not made.fresh(), text
    records._unchanged.cache_clear()
    source.write_text(CODE, encoding="utf-8")
    assert made.fresh()


def test_indentation_counts(source):
    source.write_text("if a:\n    b\nc\n", encoding="utf-8")
    made = of(source)
    source.write_text("if a:\n    b\n    c\n", encoding="utf-8")
    assert not made.fresh()


def test_one_stale_file_of_several_is_enough(source, tmp_path):
    second = shutil.copy(source, tmp_path / "other.py")
    made = record(sources={str(source): digests(source), str(second): ("0" * 16, "0" * 16)})
    assert not made.fresh()


def test_a_file_that_is_gone_is_stale(source):
    made = of(source)
    source.unlink()
    assert not made.fresh()


def test_sources_are_named_from_the_package():
    assert all((records.PACKAGE / name).is_file() for name in record().sources)
    assert set(record().sources) == {"core/patterns/band.py", "catalogue/lab/stats.py"}
    assert record().fresh()
