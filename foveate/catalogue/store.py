"""The catalogue as it lies on disk: entries, and what their last evidence run found. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from foveate.catalogue import record as records
from foveate.catalogue.entry import Entry, EntryError, read

HOME = Path(__file__).resolve().parent
PAPERS = HOME / "papers"
EVIDENCE = HOME / "evidence"


class UnknownKey(KeyError):
    """No such paper; the message names near ones."""

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Catalogue:
    """All entries by key, in the order of their keys, with the records of their evidence.

    >>> catalogue = load()
    >>> catalogue["flexprefill"].family
    'selector'
    >>> catalogue.status("flexprefill") in ("works", "not-reproduced", "implemented", "planned")
    True
    """

    entries: dict[str, Entry]
    evidence: Path

    def __getitem__(self, key: str) -> Entry:
        """The entry of a key.

        Raises:
            UnknownKey: no such key.
        """
        try:
            return self.entries[key]
        except KeyError:
            import difflib

            near = difflib.get_close_matches(key.lower(), self.entries, 3, 0.5)
            hint = f"; near it: {', '.join(near)}" if near else "; `foveate search` finds keys"
            raise UnknownKey(f"{key}: no paper has this key{hint}") from None

    def __iter__(self):
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def records(self) -> dict[str, records.Record]:
        """What the last runs found, of the entries that have a record."""
        found = {}
        for key in self.entries:
            path = records.path_of(self.evidence, key)
            if path.exists():
                found[key] = records.read(path)
        return found

    def status(self, key: str) -> str:
        """works, not-reproduced, implemented or planned: `vocabulary.STATUSES` says what each means."""
        entry, record = self[key], self.records.get(key)
        if not entry.implemented:
            return "planned"
        if record is None or record.quick or not entry.evidence or not record.fresh():
            return "implemented"
        return "works" if record.verdict == records.HOLDS else "not-reproduced"


def load(papers: Path = PAPERS, evidence: Path = EVIDENCE) -> Catalogue:
    """Read every entry of a directory.

    Raises:
        EntryError: a file breaks the schema, a relation points nowhere, two entries share a title.
    """
    entries = {path.stem: read(path) for path in sorted(papers.glob("*.toml"))}
    titles: dict[str, str] = {}
    for entry in entries.values():
        for relation in entry.relations:
            if relation.to not in entries or relation.to == entry.key:
                raise EntryError(f"{entry.key}.toml: relations: {relation.to!r} is no other paper's key")
        title = entry.title.casefold()
        if title in titles:
            raise EntryError(f"{entry.key}.toml: title: {titles[title]} has the same one")
        titles[title] = entry.key
    return Catalogue(entries, evidence)
