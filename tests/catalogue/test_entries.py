"""The 169 entries: read strictly, true to the code they point at, evaluable, drawable; and what their status says."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import IMPLEMENTED, PLANNED, changed, papers, record, toml

from foveate.catalogue import Catalogue, EntryError, UnknownKey, load
from foveate.catalogue import record as records
from foveate.catalogue import vocabulary as words
from foveate.catalogue.entry import SYMBOLS, Cost, from_dict, read
from foveate.catalogue.record import FAILS, OPEN, write
from foveate.catalogue.resolve import UnresolvedPath, resolve, source_file, sources
from foveate.catalogue.store import EVIDENCE

ROOT = Path(__file__).parents[2]
CATALOGUE = load()
ALL = list(CATALOGUE)
DONE = [entry for entry in ALL if entry.implemented]


def by_key(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.key)


# ---------------------------------------------------------------------------------------------- the schema
def test_every_paper_is_there():
    assert len(CATALOGUE) >= 169
    assert [entry.key for entry in ALL] == sorted(entry.key for entry in ALL)
    assert {CATALOGUE.status(entry.key) for entry in ALL} <= set(words.STATUSES)


REFUSED = [  # (fields to change, base, the field and what the message must say)
    ({"colour": "red"}, PLANNED, "colour: unknown field; accepted: key, title"),
    ({"title": None}, PLANNED, "title: is required"),
    ({"title": ""}, PLANNED, "title: is required"),
    ({"invariants": []}, PLANNED, "invariants: is required"),
    ({"title": 3}, PLANNED, "title: must be a string, got int"),
    ({"tags": "causal"}, PLANNED, "tags: must be a list, got str"),
    ({"tags": ["causal", 1]}, PLANNED, "tags: must be a list of strings"),
    ({"tags": ["causal", "causal"]}, PLANNED, "tags: says something twice"),
    ({"tags": ["fast"]}, PLANNED, "tags: got 'fast'; accepted: causal"),
    ({"symbols": ["x"]}, PLANNED, "symbols: must be a table of strings"),
    ({"family": "mask"}, PLANNED, "family: got 'mask'; accepted: pattern"),
    ({"also": ["mask"]}, PLANNED, "also: got 'mask'"),
    ({"kind": "thing"}, PLANNED, "kind: got 'thing'"),
    ({"modality": ["smell"]}, PLANNED, "modality: got 'smell'"),
    ({"complexity": "cubic"}, PLANNED, "complexity: got 'cubic'"),
    ({"key": "Made-Up"}, PLANNED, "key: got 'Made-Up'; accepted: lower-case"),
    ({"date": "2024"}, PLANNED, "date: got '2024'; accepted: YYYY-MM"),
    ({"name": "x" * 41}, PLANNED, "name: has 41 characters"),
    ({"idea": "x" * 201}, PLANNED, "idea: has 201 characters"),
    ({"code": "http://x.org"}, PLANNED, "code: got 'http://x.org'; accepted: an https address"),
    ({"paper": "https://x.org/<b>"}, PLANNED, "paper: got"),
    ({"relations": [{"how": "extends"}]}, PLANNED, "relations[0].to: is required"),
    ({"relations": [{"how": "extends", "to": 3}]}, PLANNED, "relations[0].to: must be str"),
    ({"relations": [{"how": "likes", "to": "x"}]}, PLANNED, "relations: got 'likes'"),
    ({"relations": [{"how": "extends", "to": "x", "why": "y"}]}, PLANNED, "relations[0].why: unknown field"),
    ({"relations": ["x"]}, PLANNED, "relations[0]: must be a table"),
    ({"cost": {"flops": "4*N*w"}}, PLANNED, "cost.flops: 4*N*w: cost.flops = 4*N*w: no value for w"),
    ({"cost": {"flops": "4*N*"}}, PLANNED, "cost.flops: 4*N*"),
    ({"cost": {"flops": "open('x')"}}, PLANNED, "cost.flops: open('x')"),
    ({"cost": {"flops": "N if N else M"}}, PLANNED, "cost.flops"),
    ({"cost": {"flops": "max(N, M, key=N)"}}, PLANNED, "cost.flops: max(N, M, key=N): max(N, M, key=N): accepted: +"),
    ({"cost": {"flops": "N.real"}}, PLANNED, "cost.flops: N.real: N.real: accepted: +"),
    ({"cost": {"where": {"N": "mine"}}}, PLANNED, "cost.where: N = 'mine'; accepted: new names"),
    ({"cost": {"where": "w"}}, PLANNED, "cost.where: must be a table"),
    ({"cost": {"memory": "N"}}, PLANNED, "cost.memory: unknown field"),
    ({"snippet": "print(1)"}, PLANNED, "snippet: is given, but there is no implementation"),
    ({"evidence": "foveate.x.run"}, PLANNED, "evidence: is given, but there is no implementation"),
    ({"picture": "foveate.x.picture"}, PLANNED, "picture: is given, but there is no implementation"),
    *(({name: None}, IMPLEMENTED, f"{name}: is required of an implemented entry")
      for name in ("verified_by", "differs", "snippet", "tests", "checks", "verification")),
    ({"verification": "trust"}, IMPLEMENTED, "verification: got 'trust'"),
    ({"implementation": ["torch.nn.Linear"]}, IMPLEMENTED, "implementation: got 'torch.nn.Linear'; accepted: a dotted"),
    ({"evidence": "run"}, IMPLEMENTED, "evidence: got 'run'; accepted: a dotted path below foveate"),
    ({"picture": "foveate"}, IMPLEMENTED, "picture: got 'foveate'"),
]  # fmt: skip
CHECKS_REFUSED = [  # (fields of the check to change, what the message must say)
    ({"make": "foveate.patterns.Causal"}, "make = 'foveate.patterns.Causal'; accepted: one of implementation"),
    ({"make": None}, "checks[0].make: is required"),
    ({"use": "mask"}, "use = 'mask'; accepted: pattern"),
    ({"use": None}, "checks[0].use: is required"),
    ({"size": 3}, "checks[0].size: unknown field"),
    ({"tokens": "131"}, "checks[0].tokens: must be int, got '131'"),
    ({"tokens": 0}, "tokens = 0; accepted: at least 1"),
    ({"arguments": [5]}, "checks[0].arguments: must be a table, got list"),
    ({"tags": ["fast"]}, "tags ['fast']"),
    ({"limits": {"window": 5}}, "checks[0].limits: must be a list"),
    ({"limits": [{"window": 5}]}, "limits {'window': 5}; accepted: arguments, and equals"),
    ({"limits": [{"arguments": {}, "equals": "dense"}]}, "accepted: arguments, and equals = 'full' or 'causal'"),
    ({"use": "layer", "limits": [{"arguments": {}, "equals": "full"}]}, "limits of a layer; accepted"),
    ({"symbols": {"N": 3}}, "symbols of a pattern; accepted: symbols of layer, map, backbone, gate"),
    ({"grid": [8, 8]}, "grid of a pattern; accepted: grid of map, backbone"),
    ({"use": "map", "grid": [8]}, "grid = [8]; accepted: two sides, each at least 1"),
    ({"use": "layer", "symbols": {"N": 3}}, "there is no cost.parameters"),
    ({"use": "layer", "symbols": {"w": 3}}, "symbols: w = 3; accepted: numbers for B"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "base", "says"), REFUSED, ids=[says[:40] for *_, says in REFUSED])
def test_broken_entries_are_refused(fields, base, says):
    from_dict(base, "x.toml")  # without the change it is good
    with pytest.raises(EntryError, match=re.escape(f"x.toml: {says}")):
        from_dict(changed(base, **fields), "x.toml")


@pytest.mark.parametrize(("fields", "says"), CHECKS_REFUSED, ids=[says[:40] for _, says in CHECKS_REFUSED])
def test_broken_checks_are_refused(fields, says):
    check = changed(IMPLEMENTED["checks"][0], **fields)
    with pytest.raises(EntryError, match=r"x.toml: .*" + re.escape(says)):
        from_dict(changed(IMPLEMENTED, checks=[check]), "x.toml")


def test_symbols_must_evaluate_the_cost():
    cost = {"parameters": "C*C/w", "where": {"w": "window"}}
    check = {"make": "foveate.patterns.SlidingWindow", "use": "layer", "symbols": {"C": 4, "w": 2}}
    entry = from_dict(changed(IMPLEMENTED, cost=cost, checks=[check]), "x.toml")
    assert entry.cost.evaluate("parameters", **entry.checks[0].symbols) == 8
    for symbols in ({"C": 4}, {"C": 4, "w": 0}):
        with pytest.raises(EntryError, match=r"x.toml: checks: symbols"):
            from_dict(changed(IMPLEMENTED, cost=cost, checks=[{**check, "symbols": symbols}]), "x.toml")


def test_files_that_are_refused(tmp_path):
    path = papers(tmp_path, PLANNED) / "made_up.toml"
    assert read(path).key == "made_up"
    path.write_text("key = ", encoding="utf-8")
    with pytest.raises(EntryError, match=r"made_up.toml: not TOML"):
        read(path)
    path.write_text(toml({**PLANNED, "key": "other"}), encoding="utf-8")
    with pytest.raises(
        EntryError, match=r"made_up.toml: key is 'other'; accepted: the file's name, 'made_up'"
    ):
        read(path)


@pytest.mark.parametrize("to", ["nobody", "made_up"])
def test_dangling_relations_are_refused(tmp_path, to):
    other = {**PLANNED, "key": "other", "title": "Another"}
    fine = {**PLANNED, "relations": [{"how": "extends", "to": "other"}]}
    assert len(load(papers(tmp_path / "a", fine, other))) == 2
    bad = {**PLANNED, "relations": [{"how": "extends", "to": to}]}
    with pytest.raises(EntryError, match=f"made_up.toml: relations: '{to}' is no other paper's key"):
        load(papers(tmp_path / "b", bad, other))


def test_two_entries_of_one_paper_are_refused(tmp_path):
    twin = {**PLANNED, "key": "twin", "title": PLANNED["title"].upper()}
    with pytest.raises(EntryError, match=r"twin.toml: title: made_up has the same one"):
        load(papers(tmp_path, PLANNED, twin))


def test_unknown_keys_say_what_is_near():
    with pytest.raises(UnknownKey, match=r"flexprefil: no paper has this key; near it: flexprefill"):
        CATALOGUE["flexprefil"]


# ------------------------------------------------------------------------------ what the entries point at
@by_key(DONE)
def test_dotted_paths_resolve(entry):
    for path in entry.implementation:
        assert source_file(resolve(path)).is_file()
    for path in (entry.evidence, entry.picture):
        if path:
            assert callable(resolve(path)), path
    for check in entry.checks:
        assert callable(resolve(check.make)), check.make


@pytest.mark.parametrize(
    ("path", "says"),
    [("foveate.patterns.Nothing", "has no Nothing"), ("foveate.nothing.at_all", "has no nothing"),
     ("nothing.at_all", "no module nothing")],
)  # fmt: skip
def test_dotted_paths_that_lead_nowhere(path, says):
    with pytest.raises(UnresolvedPath, match=f"{path}: .*{says}"):
        resolve(path)


def test_objects_of_others_have_no_source_here():
    with pytest.raises(UnresolvedPath, match="outside of the package"):
        source_file(json.dumps)


def names_in(path: Path) -> set[str]:
    """The tests of a file: functions, classes and `Class::method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


@by_key(DONE)
def test_tests_exist(entry):
    for test in entry.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), f"{entry.key}: there is no {path}"
        if name:
            assert name.split("[")[0] in names_in(ROOT / path), f"{entry.key}: {path} has no test {name}"


def test_names_in_a_file():
    assert "test_names_in_a_file" in names_in(Path(__file__))
    assert "test_nothing" not in names_in(Path(__file__))


@by_key(DONE)
def test_snippets_run(entry):
    done = subprocess.run(
        [sys.executable, "-c", entry.snippet],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{entry.key}: {done.stderr}"
    assert done.stdout.strip(), f"{entry.key}: the snippet prints nothing"


@by_key(DONE)
def test_evidence_is_full_and_fresh(entry):
    assert entry.evidence, f"{entry.key} is implemented and has no experiment"
    path = records.path_of(EVIDENCE, entry.key)
    assert path.exists(), f"no evidence: run `foveate reproduce {entry.key}`"
    found = records.read(path)
    assert not found.quick, f"{path.name} is from a quick run"
    changed_files = [name for name in found.sources if not (records.PACKAGE / name).exists()]
    assert found.fresh(), (
        f"{path.name} is older than the code {sorted(found.sources)} (gone: {changed_files})"
    )
    paths = (*entry.implementation, *filter(None, (entry.evidence, entry.picture)))
    assert set(found.sources) == set(sources(paths)), f"{path.name} does not cover the files of {paths}"
    assert entry.picture == "" or found.picture is not None


def test_evidence_belongs_to_entries():
    found = {path.stem for path in EVIDENCE.glob("*.json")}
    assert found <= {entry.key for entry in DONE}, "evidence of entries that are not implemented"


# ------------------------------------------------------------------------------------------------- status
def statuses(tmp_path, made):
    """The status of an implemented paper whose record is `made`, or that has none."""
    evidence = tmp_path / "evidence"
    if made is not None:
        write(made, evidence)
    return load(papers(tmp_path / "papers", IMPLEMENTED), evidence).status("made_up")


def test_planned(tmp_path):
    write(record(), tmp_path)
    assert load(papers(tmp_path / "papers", PLANNED), tmp_path).status("made_up") == "planned"


@pytest.mark.parametrize(
    ("made", "status"),
    [(None, "implemented"), (record(), "works"), (record(verdict=OPEN), "not-reproduced"),
     (record(verdict=FAILS), "not-reproduced"), (record(quick=True), "implemented"),
     (record(sources={"catalogue/lab/stats.py": ["0" * 16, "0" * 16]}), "implemented")],
    ids=["no record", "holds", "open", "fails", "quick", "stale"],
)  # fmt: skip
def test_status_follows_the_record(tmp_path, made, status):
    assert statuses(tmp_path, made) == status


def test_without_an_experiment_a_record_says_nothing(tmp_path):
    write(record(), tmp_path)
    fields = changed(IMPLEMENTED, evidence=None)
    assert load(papers(tmp_path / "papers", fields), tmp_path).status("made_up") == "implemented"


def test_record_of_an_unknown_paper_is_not_read(tmp_path):
    write(record("stranger"), tmp_path)
    assert load(papers(tmp_path / "papers", PLANNED), tmp_path).records == {}
    assert isinstance(load(), Catalogue)


# ----------------------------------------------------------------------------------- formulas, words, text
SENSIBLE = {"B": 2, "H": 8, "G": 2, "N": 4096, "M": 4096, "D": 64, "C": 512, "L": 12, "e": 2}


@by_key([entry for entry in ALL if entry.cost != Cost()])
def test_costs_are_numbers(entry):
    for name in ("flops", "state_bytes", "parameters"):
        if getattr(entry.cost, name):
            for least in (2, 8):  # own symbols: different values, the first one's the largest
                own = {symbol: least * 2**i for i, symbol in enumerate(reversed(entry.cost.where))}
                cost = entry.cost.evaluate(name, **SENSIBLE, **own)
                assert math.isfinite(cost), f"{entry.key}: {name} is {cost} for {own}"
                assert cost >= 0, f"{entry.key}: {name} is {cost} for {own}"
    names = {n.id for f in ("flops", "state_bytes", "parameters") if getattr(entry.cost, f)
             for n in ast.walk(ast.parse(getattr(entry.cost, f))) if isinstance(n, ast.Name)}  # fmt: skip
    assert set(entry.cost.where) <= names, (
        f"{entry.key}: where explains {set(entry.cost.where) - names}, unused"
    )


def test_cost_evaluates():
    cost = Cost(flops="2*N**2 - max(1, w)//2", where={"w": "window"})
    assert cost.evaluate("flops", N=3, w=4) == 16
    assert Cost(flops="-N + ceil(N/2) + log2(8) + sqrt(4) + floor(2.5)").evaluate("flops", N=3) == 6
    with pytest.raises(ValueError, match=r"cost.flops = .*: no value for w"):
        cost.evaluate("flops", N=3)
    assert set(SENSIBLE) == set(SYMBOLS)


@by_key(ALL)
def test_equations_convert(entry):
    from latex2mathml.converter import convert

    for text in (*entry.equation, *entry.symbols):
        made = convert(text)
        assert made.startswith("<math"), f"{entry.key}: {text}"
        assert "\\" not in made, f"{entry.key}: {text} has a command that does not convert"


TOLD = re.compile(
    r"snapshot|not re-?read|\(memory\)|from memory|/home/|/tmp/|our catalogue|this entry",
    re.IGNORECASE,
)


@by_key(ALL)
def test_no_word_about_how_it_was_made(entry):
    for name in entry.__dataclass_fields__:
        value = getattr(entry, name)
        text = value if isinstance(value, str) else repr(value)
        found = TOLD.search(text)
        assert found is None, f"{entry.key}.{name}: {text[max(0, found.start() - 40) : found.end() + 40]}"  # pyright: ignore


def test_the_word_list_finds_words():
    assert TOLD.search("as of the snapshot, not re-read")
    assert TOLD.search("agents attend, prompts are re-read, memory is saved") is None
