"""What the templates show of each entry, computed from the entry, its record and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from foveate.catalogue import vocabulary as words
from foveate.catalogue.entry import Entry
from foveate.catalogue.gallery import formulas, plot, thumbnails
from foveate.catalogue.gallery.equations import Equation, equation
from foveate.catalogue.gallery.places import Place, place
from foveate.catalogue.record import HOLDS, OPEN, Record
from foveate.catalogue.store import Catalogue

CARD_EQUATION = 38  # characters of an equation that fit a card


@dataclass(frozen=True)
class Relative:
    """Another entry, and how this one relates to it."""

    how: str
    entry: Entry


@dataclass(frozen=True)
class Evidence:
    """A record as a page shows it. `tone`: good, bad or open."""

    record: Record
    fresh: bool
    tone: str
    drawing: Markup | None
    numbers: tuple[list[str], list[list[str]]] | None
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Paper:
    """One entry with all that its page and its card show."""

    entry: Entry
    status: str
    evidence: Evidence | None
    picture: Mapping[str, Any] | None
    equations: tuple[Equation, ...]
    symbols: tuple[tuple[Equation, str], ...]
    formulas: tuple[formulas.Formula, ...]
    formula_symbols: tuple[formulas.Symbol, ...]
    example: tuple[tuple[int, float, float], ...]
    relatives: tuple[Relative, ...]
    places: tuple[tuple[str, Place | None], ...]
    before: Entry | None
    after: Entry | None

    @property
    def card_equation(self) -> Equation | None:
        """The first equation short enough for a card, else the shortest; none where none could be converted."""
        drawn = [e for e in self.equations if e.mathml]
        short = [e for e in drawn if e.length <= CARD_EQUATION]
        return short[0] if short else min(drawn, key=lambda e: e.length, default=None)

    @property
    def thumbnail(self) -> Markup | None:
        return None if self.picture is None else thumbnails.drawing(self.picture)

    @property
    def first(self) -> int:
        """The frame of the picture that is shown first."""
        assert self.picture is not None
        return thumbnails.first(self.picture)

    @property
    def still(self) -> Markup:
        """The picture without scripts."""
        assert self.picture is not None
        return thumbnails.drawing(self.picture, self.description)

    @property
    def example_values(self) -> list[tuple[str, str]]:
        """The values behind the example, as text."""
        used = {name for f in self.formulas if f.field == "flops" for name in f.symbols}
        return [
            (s.name, f"{s.value:g}") for s in self.formula_symbols if s.name in used and s.value is not None
        ]

    @property
    def description(self) -> str:
        """The text alternative of the picture: its caption and how much of it is filled."""
        if self.picture is None:
            return ""
        caption = str(self.picture["caption"]).rstrip(".")
        if self.picture["kind"] == "pairs":
            frame = self.picture["frames"][thumbnails.first(self.picture)]
            at = ", ".join(f"{name} {value}" for name, value in frame["setting"].items())
            share = f"{frame['density']:.1%} of the {frame['queries']} × {frame['keys']} pairs are seen"
            return f"{caption}. {share}{f' with {at}' if at else ''}."
        n, m = self.picture["shape"]
        return f"{caption}. A map of {n} × {m} weights, the largest {self.picture['largest']:.3g}."


def papers(catalogue: Catalogue) -> list[Paper]:
    """The pages of a catalogue in the order of its keys."""
    kin = relatives(catalogue)
    beside = neighbours(list(catalogue))
    return [_paper(catalogue, entry, kin[entry.key], beside[entry.key]) for entry in catalogue]


def _paper(
    catalogue: Catalogue,
    entry: Entry,
    kin: Sequence[Relative],
    beside: tuple[Entry | None, Entry | None],
) -> Paper:
    record = catalogue.records.get(entry.key)
    return Paper(
        entry=entry,
        status=catalogue.status(entry.key),
        evidence=None if record is None else _evidence(catalogue, record),
        picture=None if record is None else record.picture,
        equations=tuple(equation(latex, block=True) for latex in entry.equation),
        symbols=tuple((equation(latex), meaning) for latex, meaning in entry.symbols.items()),
        formulas=tuple(formulas.formulas(entry.cost)),
        formula_symbols=tuple(formulas.symbols(entry)),
        example=tuple(formulas.example(entry)),
        relatives=tuple(kin),
        places=tuple((path, place(path)) for path in entry.implementation),
        before=beside[0],
        after=beside[1],
    )


def relatives(catalogue: Catalogue) -> dict[str, list[Relative]]:
    """{key: relatives}, those that the entry names and those that name it, each once, in the order of wordings."""
    found: dict[str, dict[tuple[str, str], None]] = {entry.key: {} for entry in catalogue}
    for entry in catalogue:
        for relation in entry.relations:
            found[entry.key][relation.how, relation.to] = None
            found[relation.to][words.RELATIONS[relation.how], entry.key] = None
    wordings = list(dict.fromkeys([*words.RELATIONS, *words.RELATIONS.values()]))
    return {
        key: [
            Relative(how, catalogue[to])
            for how, to in sorted(
                pairs, key=lambda p: (wordings.index(p[0]), catalogue[p[1]].name.casefold())
            )
        ]
        for key, pairs in found.items()
    }


def neighbours(entries: Sequence[Entry]) -> dict[str, tuple[Entry | None, Entry | None]]:
    """{key: (the entry before it, the one after it)} within its family, by date."""
    made: dict[str, tuple[Entry | None, Entry | None]] = {}
    for family in words.FAMILIES:
        mine = sorted((e for e in entries if e.family == family), key=lambda e: (e.date, e.key))
        for i, entry in enumerate(mine):
            before = mine[i - 1] if i else None
            made[entry.key] = (before, mine[i + 1] if i + 1 < len(mine) else None)
    return made


def _evidence(catalogue: Catalogue, record: Record) -> Evidence:
    drawn = catalogue.evidence / f"{record.key}.svg"
    title = "" if record.plot is None else str(record.plot.get("title", ""))
    return Evidence(
        record=record,
        fresh=record.fresh(),
        tone="good" if record.verdict == HOLDS else "open" if record.verdict == OPEN else "bad",
        drawing=plot.inline(drawn, f"Plot: {title}") if record.plot is not None and drawn.exists() else None,
        numbers=None if record.plot is None else plot.table(record.plot),
        facts=tuple(_facts(record)),
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    """Where and when a record was made; what it does not say is left out."""
    found = record.environment
    threads = f", {found['threads']} threads" if found.get("threads") else ""
    device = str(found.get("device", ""))
    if found.get("cpu"):
        device = f"{device}: {found['cpu']}{threads}" if device else f"{found['cpu']}{threads}"
    facts = [
        ("date", str(found.get("date") or "")[:10]),
        ("device", device),
        ("commit", str(found.get("commit") or "")),
        ("versions", ", ".join(f"{name} {found[name]}" for name in ("torch", "python") if found.get(name))),
        ("seeds", ", ".join(map(str, record.seeds))),
        ("seconds", f"{record.seconds:g}"),
        ("form", "quick: it checks that the experiment runs, and does not count" if record.quick else "full"),
    ]
    return [(name, value) for name, value in facts if value]
