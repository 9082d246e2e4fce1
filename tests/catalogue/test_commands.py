"""`foveate list`, `search`, `show` and `reproduce`: what they print, refuse and import."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from foveate.catalogue import load, record
from foveate.catalogue.lab import HOLDS, OPEN, Figure, Finding
from foveate.catalogue.vocabulary import STATUSES
from foveate.cli import app

PLANNED = next(entry.key for entry in load() if not entry.implementation)

runner = CliRunner()


def foveate(*arguments, ok=True):
    done = runner.invoke(app, list(arguments), env={"COLUMNS": "80"})
    if ok:
        assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def catalogue():
    return load()


@pytest.fixture
def evidence(tmp_path, catalogue):
    """A directory with one record that holds, one that does not, and one that is older than the code."""
    implemented = [entry.key for entry in catalogue if entry.evidence]
    sources = {"catalogue/record.py": record.digests(record.PACKAGE / "catalogue" / "record.py")}
    base = record.Record(
        key="",
        quick=False,
        question="Does it?",
        counts_if="it does.",
        verdict=HOLDS,
        summary="It did.",
        figures=(Figure("share", 0.75, 0.5, 1.0, 3),),
        seeds=(0, 1, 2),
        seconds=1.0,
        environment={
            "date": "2026-01-02T03:04:05+00:00",
            "device": "cpu",
            "cpu": "a cpu",
            "threads": 2,
            "commit": "0" * 12,
        },
        sources=sources,
    )  # fmt: skip
    good, unclear, stale = implemented[:3]
    record.write(dataclasses.replace(base, key=good), tmp_path)
    record.write(dataclasses.replace(base, key=unclear, verdict=OPEN), tmp_path)
    record.write(dataclasses.replace(base, key=stale, sources={"catalogue/record.py": ("0", "0")}), tmp_path)
    return tmp_path, good, unclear, stale, implemented[3:]


def test_quick_commands_import_nothing_heavy():
    heavy = ("torch", "numpy", "transformers", "matplotlib", "pydantic", "rich", "jinja2")
    for arguments in (
        ["list"],
        ["list", "--status", "--json"],
        ["search", "windows", "that", "move"],
        ["show", "swin"],
    ):
        code = f"""
import sys
from foveate.cli import app
try:
    app({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
print([m for m in {heavy!r} if m in sys.modules])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", arguments


def test_list_status_json_has_every_paper_with_its_state(catalogue):
    papers = json.loads(foveate("list", "--status", "--json").output)["papers"]
    assert len(papers) == len(catalogue) == 169
    for paper in papers:
        assert {"key", "title", "family", "status"} <= set(paper)
        assert paper["status"] in STATUSES
        assert paper["title"] == catalogue[paper["key"]].title
        assert (paper["status"] == "planned") == (not catalogue[paper["key"]].implemented)


def test_the_states_follow_the_records(evidence):
    folder, good, unclear, stale, others = evidence
    papers = json.loads(foveate("list", "--status", "--json", "--evidence", str(folder)).output)["papers"]
    states = {paper["key"]: paper["status"] for paper in papers}
    assert (states[good], states[unclear], states[stale]) == ("works", "not-reproduced", "implemented")
    assert {states[key] for key in others} == {"implemented"}
    shown = foveate("list", "--status", "--evidence", str(folder)).output
    assert f"1 works · 1 not-reproduced · {1 + len(others)} implemented" in shown
    only = foveate("list", "--status", "works", "--evidence", str(folder)).output
    assert good in only
    assert unclear not in only
    page = foveate("show", good, "--evidence", str(folder)).output
    assert "share: 0.75 (0.5 to 1)" in page
    assert "the code has changed since" in foveate("show", stale, "--evidence", str(folder)).output


@pytest.mark.parametrize(
    "command", [("list",), ("list", "--status"), ("search", "sparse", "prefill"), ("search", "vlm")]
)
def test_lines_fit_80_columns(command):
    lines = foveate(*command).output.splitlines()
    assert len(lines) > 5
    assert [line for line in lines if len(line) > 80] == []


def test_every_page_fits_80_columns(catalogue):
    from foveate.catalogue import show

    for entry in catalogue:
        lines = list(show.page(catalogue, entry))
        wide = [line for line in lines if len(line) > 80 and " " in line.strip()]  # an address is one word
        assert wide == [], entry.key
        text = "\n".join(lines)
        assert entry.idea.split()[0] in text
        assert "EQUATION" in text
        assert "\\" not in "\n".join(lines[lines.index("EQUATION") : lines.index("WHAT IT DOES")]), entry.key


def test_filters(catalogue):
    papers = json.loads(foveate("list", "--family", "selector,cache", "--tag", "causal", "--json").output)[
        "papers"
    ]
    assert papers
    for paper in papers:
        assert paper["family"] in ("selector", "cache")
        assert "causal" in paper["tags"]
    assert (
        f"{len(papers)} of 169 papers"
        in foveate("list", "--family", "selector,cache", "--tag", "causal").output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--family", "selecter"], "did you mean 'selector'"),
        (["list", "--tag", "casual"], "did you mean 'causal'"),
        (["list", "--status", "wroks"], "did you mean 'works'"),
        (["list", "--evidence", "no/such/place"], "no such directory"),
        (["search", "?!"], "at least one word"),
        (["search", "swin", "--limit", "0"], "limit"),
        (["search", "swin", "--embeddings", "no/such/place"], "no such directory"),
        (["show", "swinn"], "near it: swin"),
        (["show", PLANNED, "--picture", "x.png"], "has none yet"),
        (["reproduce"], "nothing to run"),
        (["reproduce", "swim"], "no paper has this key"),
        (["reproduce", PLANNED], "no experiment yet"),
        (["reproduce", "swin", "--all"], "--all runs every entry"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_exit_2(arguments, message):
    done = foveate(*arguments, ok=False)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_search_json():
    results = json.loads(foveate("search", "swin transformer", "--json", "--limit", "3").output)["results"]
    assert [set(result) for result in results] == [{"key", "title", "score"}] * 3
    assert results[0]["key"] == "swin"
    assert results[0]["score"] > results[1]["score"]


def test_search_without_a_hit_says_so():
    done = foveate("search", "zzqx", ok=False)
    assert (done.exit_code, "nothing found" in done.output) == (1, True)
    assert json.loads(foveate("search", "zzqx", "--json").output) == {"results": []}


def test_show_takes_a_key_a_name_or_a_title(catalogue):
    for asked in ("swin", "Swin Transformer", catalogue["swin"].title):
        assert json.loads(foveate("show", asked, "--json").output)["key"] == "swin"


def test_show_json_is_the_whole_entry(catalogue):
    shown = json.loads(foveate("show", "based", "--json").output)
    assert shown["mechanism"] == catalogue["based"].mechanism
    assert shown["status"] in STATUSES
    assert shown["source"].startswith("https://")


def finding(lab):
    lab.once("step", lambda: 1)
    return Finding("Q?", "always.", HOLDS, "Yes.", (Figure("one", 1.0),))


def failing(lab):
    raise RuntimeError("broken on purpose")


def test_reproduce_writes_reports_and_goes_on_after_a_failure(monkeypatch, tmp_path, catalogue):
    keys = [entry.key for entry in catalogue if entry.evidence][:2]
    first, second = keys
    entries = dict(catalogue.entries)
    for key, function in ((first, "failing"), (second, "finding")):
        entries[key] = dataclasses.replace(
            entries[key], evidence=f"foveate.cli.catalogue.{function}", picture=""
        )
    import foveate.cli.catalogue as commands

    monkeypatch.setattr(commands, "failing", failing, raising=False)
    monkeypatch.setattr(commands, "finding", finding, raising=False)
    monkeypatch.setattr(commands, "_load", lambda *_: dataclasses.replace(catalogue, entries=entries))
    monkeypatch.setattr(
        "foveate.catalogue.resolve.source_file", lambda found: record.PACKAGE / "cli" / "catalogue.py"
    )
    done = foveate("reproduce", first, second, "--out", str(tmp_path), ok=False)
    assert done.exit_code == 1
    assert f"[1/2] {first}: FAILED, RuntimeError: broken on purpose" in done.output
    assert f"[2/2] {second}: holds" in done.output
    assert record.read(tmp_path / f"{second}.json").verdict == HOLDS
    assert not (tmp_path / f"{first}.json").exists()
    again = foveate("reproduce", second, "--resume", "--out", str(tmp_path), "--json")
    results = json.loads(again.stdout)["results"]
    assert results == [{"key": second, "verdict": HOLDS, "summary": "Yes."}]
    assert "(kept)" in again.stderr
