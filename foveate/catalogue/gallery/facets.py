"""The facets of the index: their values with labels and meanings, and the values of each entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.catalogue import vocabulary as words
from foveate.catalogue.entry import Entry
from foveate.catalogue.store import Catalogue

DIRECTIONS = {
    "causal": "has a form in which a query never reads a later key",
    "bidirectional": "has a form without order",
    "either": "has both forms",
    "none": "no direction is stated",
}
NOT_YET = "none"
SHOWN = {
    ("verification", NOT_YET): "not yet",
    ("complexity", "none"): "not stated",
    ("direction", "none"): "not stated",
    ("status", "not-reproduced"): "not reproduced",
}


@dataclass(frozen=True)
class Value:
    name: str
    label: str
    meaning: str
    count: int


@dataclass(frozen=True)
class Facet:
    name: str
    title: str
    values: tuple[Value, ...]


def label(facet: str, value: str) -> str:
    """The word shown for a value.

    >>> label("status", "not-reproduced"), label("family", "window")
    ('not reproduced', 'window')
    """
    return SHOWN.get((facet, value), value.replace("-", " ") if facet == "verification" else value)


def values_of(entry: Entry, status: str) -> dict[str, list[str]]:
    """{facet: the entry's values}."""
    return {
        "family": [entry.family],
        "modality": sorted(entry.modality),
        "direction": [entry.direction],
        "complexity": [entry.complexity],
        "year": [str(entry.year)],
        "status": [status],
        "verification": [entry.verification or NOT_YET],
        "tag": sorted(entry.tags),
    }


def facets(catalogue: Catalogue) -> tuple[Facet, ...]:
    """The facets in the order of the page, each value with the number of entries that have it.

    Values that no entry has are left out, except those of status: its zeros say something.
    """
    years = sorted({str(entry.year) for entry in catalogue}, reverse=True)
    vocabularies: Sequence[tuple[str, str, dict[str, str]]] = (
        ("status", "Status", words.STATUSES),
        ("family", "Family", words.FAMILIES),
        ("modality", "Modality", words.MODALITIES),
        ("direction", "Direction", DIRECTIONS),
        ("complexity", "Complexity", words.COMPLEXITIES),
        ("verification", "Verification", {**words.VERIFICATIONS, NOT_YET: "nothing to verify yet"}),
        ("year", "Year", dict.fromkeys(years, "")),
    )
    have = [values_of(entry, catalogue.status(entry.key)) for entry in catalogue]
    made = []
    for name, title, meanings in vocabularies:
        counted = [(v, sum(v in one[name] for one in have)) for v in meanings]
        values = [Value(v, label(name, v), meanings[v], n) for v, n in counted if n or name == "status"]
        made.append(Facet(name, title, tuple(values)))
    return tuple(made)
