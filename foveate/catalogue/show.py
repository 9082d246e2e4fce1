"""Entries as text for a terminal: the table of `foveate list`, the hits of `search`, the page of `show`."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from foveate.catalogue import formula, pictures
from foveate.catalogue import vocabulary as vocab
from foveate.catalogue.entry import SYMBOLS, Entry
from foveate.catalogue.record import Record
from foveate.catalogue.search import Hit
from foveate.catalogue.store import Catalogue

WIDTH = 80
MARKS = {"works": "●", "not-reproduced": "◐", "implemented": "○", "planned": "·"}


def summary(catalogue: Catalogue, entry: Entry) -> dict[str, Any]:
    """An entry in short, for machines."""
    record = catalogue.records.get(entry.key)
    return {
        "key": entry.key,
        "title": entry.title,
        "name": entry.name,
        "family": entry.family,
        "status": catalogue.status(entry.key),
        "date": entry.date,
        "kind": entry.kind,
        "idea": entry.idea,
        "modality": list(entry.modality),
        "direction": entry.direction,
        "complexity": entry.complexity,
        "tags": list(entry.tags),
        "verification": entry.verification,
        "verdict": record.verdict if record else "",
        "evidence_date": record.environment["date"][:10] if record else "",
    }


def full(catalogue: Catalogue, entry: Entry) -> dict[str, Any]:
    """Everything about an entry, for machines."""
    import dataclasses

    record = catalogue.records.get(entry.key)
    return {
        **dataclasses.asdict(entry),
        "status": catalogue.status(entry.key),
        "source": entry.source,
        "record": record.as_dict() if record else None,
    }


def score(catalogue: Catalogue) -> dict[str, int]:
    """How many entries are in each state."""
    counts = Counter(catalogue.status(key) for key in catalogue.entries)
    return {status: counts[status] for status in vocab.STATUSES}


def score_line(catalogue: Catalogue) -> str:
    counts = score(catalogue)
    return " · ".join(f"{n} {status}" for status, n in counts.items()) + f" · {len(catalogue)} papers"


def table(catalogue: Catalogue, entries: Iterable[Entry], states: bool = False) -> Iterator[str]:
    """One line per paper; with `states` its state, how it was verified and when its experiment ran."""
    for entry in entries:
        status = catalogue.status(entry.key)
        start = f"{MARKS[status]} {entry.key:<36}{entry.family:<9}"
        if states:
            record = catalogue.records.get(entry.key)
            ran = record.environment["date"][:10] if record else ""
            yield f"{start}{status:<15}{ran:<11}".rstrip()
        else:
            yield _cut(f"{start}{entry.year}  {entry.name}")


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"


def hits(catalogue: Catalogue, found: Sequence[Hit]) -> Iterator[str]:
    """Two or three lines per hit."""
    for hit in found:
        entry = catalogue[hit.key]
        yield _cut(f"{MARKS[catalogue.status(hit.key)]} {entry.key}  {entry.name}, {entry.year}")
        yield from textwrap.wrap(entry.idea, WIDTH, initial_indent="    ", subsequent_indent="    ")


def page(catalogue: Catalogue, entry: Entry) -> Iterator[str]:
    """Everything worth reading about an entry, at most 80 columns wide."""
    status, record = catalogue.status(entry.key), catalogue.records.get(entry.key)
    yield from textwrap.wrap(entry.title, WIDTH)
    yield from textwrap.wrap(f"{entry.key} · {entry.date} · {entry.family}, {entry.kind} · {status}", WIDTH)
    if entry.aliases:
        yield from textwrap.wrap("also: " + ", ".join(entry.aliases), WIDTH)
    yield ""
    yield from textwrap.wrap(entry.idea, WIDTH)

    if record is not None and record.picture is not None:
        yield from _section("Picture")
        yield from ("  " + line for line in pictures.text(record.picture).splitlines())
        yield from _text(record.picture["caption"] + " (Queries downwards, keys to the right.)")
    yield from _section("Equation")
    for latex in entry.equation:
        yield from textwrap.wrap(formula.text(latex), WIDTH, initial_indent="  ", subsequent_indent="      ")
    for symbol, meaning in entry.symbols.items():
        shown = formula.text(symbol)
        yield from textwrap.wrap(
            f"{shown}: {meaning}", WIDTH, initial_indent="    ", subsequent_indent="      "
        )
    yield from _section("What it does")
    yield from _text(entry.contribution)
    yield from _text("Claim: " + entry.claim)
    if entry.snippet:
        yield from _section("Try it")
        yield from ("  " + line for line in entry.snippet.splitlines())
    yield from _section("Kind")
    yield from _text(", ".join(entry.tags) + f"; {entry.complexity} in the number of tokens"
                     if entry.complexity != "none" else ", ".join(entry.tags))  # fmt: skip
    yield from _cost(entry)
    yield from _section("Evidence")
    yield from _evidence(entry, record, status)
    if entry.implemented:
        yield from _section("Implementation")
        for path in entry.implementation:
            yield f"  {path}"
        yield from _text(f"Verified ({entry.verification}): {entry.verified_by}")
        yield from _text(f"Differs: {entry.differs}")
        yield from _text("Tests: " + ", ".join(entry.tests))
    if entry.relations:
        yield from _section("Relatives")
        for relation in entry.relations:
            yield from _text(f"{relation.how} {catalogue[relation.to].name} ({relation.to})")
    yield from _section("Source")
    yield f"  {entry.source}"
    if entry.code:
        yield f"  {entry.code}"


def _section(title: str) -> Iterator[str]:
    yield ""
    yield title.upper()


def _text(text: str) -> list[str]:
    out: list[str] = []
    for line in text.splitlines():
        out += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="  ") or [""]
    return out


def _cost(entry: Entry) -> Iterator[str]:
    cost = entry.cost
    formulas = [("flops", cost.flops), ("state", cost.state_bytes), ("parameters", cost.parameters)]
    formulas = [(name, f) for name, f in formulas if f]
    if not formulas:
        return
    yield from _section("Cost")
    for name, text in formulas:
        yield from textwrap.wrap(f"{name:<11}{text}", WIDTH, initial_indent="  ", subsequent_indent=" " * 13)
    import re

    used = {word for _, text in formulas for word in re.findall(r"[A-Za-z_]\w*", text)}
    meanings = [f"{s} {m}" for s, m in {**SYMBOLS, **cost.where}.items() if s in used]
    yield from _text("; ".join(meanings))


def _evidence(entry: Entry, record: Record | None, status: str) -> Iterator[str]:
    if record is None:
        yield from _text(vocab.STATUSES[status].capitalize() + ". What is to be measured:")
        yield from _text(entry.experiment)
        return
    yield from _text(f"{record.question}")
    yield from _text(f"Counts if {record.counts_if}")
    stale = "" if record.fresh() else "; the code has changed since"
    yield from _text(f"-> {record.verdict}{' (quick run)' if record.quick else ''}{stale}: {record.summary}")
    for figure in record.figures:
        yield from textwrap.wrap(
            f"{figure.name}: {figure}", WIDTH, initial_indent="    ", subsequent_indent="      "
        )
    e = record.environment
    yield from _text(
        f"{e['date'][:10]}, {e['device']} ({e['cpu']}, {e['threads']} threads), {record.seconds:.0f} s, "
        f"seeds {', '.join(map(str, record.seeds))}, commit {e['commit']}"
    )


def verdict_line(outcome: Any, number: int, count: int) -> Iterator[str]:
    """What became of one experiment, for the progress of `foveate reproduce`."""
    start = f"[{number}/{count}] {outcome.key}: "
    if outcome.record is None:
        yield f"{start}FAILED, {outcome.error}"
        return
    record = outcome.record
    told = " (quick run, does not count)" if record.quick else ""
    kept = " (kept)" if outcome.kept else ""
    yield f"{start}{record.verdict}{told}{kept}, {record.seconds:.0f} s"
    yield from textwrap.wrap(record.summary, WIDTH, initial_indent="    ", subsequent_indent="    ")
