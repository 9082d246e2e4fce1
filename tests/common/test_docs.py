"""docs/catalogue.md names every field, interface, check, tag and status that there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from foveate.catalogue import vocabulary as words
from foveate.catalogue.entry import Check, Cost, Entry
from foveate.catalogue.record import Figure, Record

PAGE = (Path(__file__).parents[2] / "docs" / "catalogue.md").read_text(encoding="utf-8")
TAGGED = {name: tag for tag, names in words.CHECKED.items() for name in names}


@pytest.mark.parametrize("kind", [Entry, Check, Cost, Record, Figure], ids=lambda kind: kind.__name__)
def test_every_field_is_explained(kind):
    missing = [f.name for f in dataclasses.fields(kind) if f"`{f.name}`" not in PAGE]
    assert missing == []


@pytest.mark.parametrize("use", words.INTERFACES)
def test_every_check_of_an_interface_is_explained(use):
    assert f"**{use}**: {words.INTERFACES[use]}" in PAGE
    start = PAGE.index(f"**{use}**")
    section = re.split(r"\n\*\*|\nThe protocols", PAGE[start + 2 :])[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    assert set(rows) == set(words.CHECKS[use])
    for name, sentence in words.CHECKS[use].items():
        says, when = (
            rows[name].rsplit(" | ", 1) if " | " in rows[name] else (rows[name].removesuffix(" |"), "")
        )
        assert says.strip() == sentence, name
        tag = None if name in words.ALWAYS.get(use, ()) else TAGGED.get(name)
        assert (f"tag `{tag}`" in when) == (tag is not None), name


def test_tags_and_statuses():
    for tag, names in words.CHECKED.items():
        row = re.search(rf"^\| `{tag}` \| (.*) \|$", PAGE, re.MULTILINE)
        assert row is not None, tag
        assert [name for name in re.findall(r"`(\w+)`", row[1]) if name in TAGGED] == list(names)
    for status in words.STATUSES:
        assert f"| `{status}` |" in PAGE
