"""A small catalogue of made-up papers in a directory, and records for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foveate.catalogue.entry import Entry, from_dict
from foveate.catalogue.record import HOLDS, Figure, Record
from foveate.catalogue.resolve import sources

PLANNED: dict[str, Any] = {
    "key": "made_up", "title": "Made Up Attention", "name": "Made up", "date": "2024-01-31", "family": "pattern",
    "kind": "operator", "idea": "An idea.", "contribution": "A contribution.", "mechanism": "A mechanism.",
    "equation": ["x = y"], "symbols": {"x": "a thing"}, "claim": "A claim.", "invariants": ["one"],
    "experiment": "An experiment.", "modality": ["text"], "complexity": "linear", "tags": ["causal", "static"],
    "phrases": ["a phrase"],
}  # fmt: skip
IMPLEMENTED: dict[str, Any] = {
    **PLANNED, "implementation": ["foveate.patterns.SlidingWindow"], "verification": "equations",
    "verified_by": "A comparison.", "differs": "Nothing.", "snippet": "print(1)",
    "tests": ["tests/core/test_patterns.py"],
    "evidence": "foveate.catalogue.lab.interval",
    "checks": [{"make": "foveate.patterns.SlidingWindow", "use": "pattern", "arguments": {"window": 5}}],
}  # fmt: skip


def changed(base: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The fields of an entry with some replaced; None takes one out."""
    made = {**base, **fields}
    return {name: value for name, value in made.items() if value is not None}


def entry(key: str = "made_up", **fields: Any) -> Entry:
    """An implemented entry."""
    return from_dict(changed(IMPLEMENTED, key=key, title=f"Title of {key}", **fields), f"{key}.toml")


def toml(fields: dict[str, Any]) -> str:
    """The text of a TOML file; JSON strings, lists and numbers are TOML too."""

    def told(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{json.dumps(k)} = {told(v)}" for k, v in value.items()) + " }"
        if isinstance(value, list):
            return "[" + ", ".join(map(told, value)) + "]"
        return json.dumps(value)

    return "\n".join(f"{name} = {told(value)}" for name, value in fields.items()) + "\n"


def papers(folder: Path, *entries: dict[str, Any]) -> Path:
    """A directory with a TOML file for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for fields in entries:
        (folder / f"{fields['key']}.toml").write_text(toml(fields), encoding="utf-8")
    return folder


def record(key: str = "made_up", **fields: Any) -> Record:
    """A full record that is fresh."""
    made: dict[str, Any] = {
        "key": key, "quick": False, "question": "Is it so?", "counts_if": "more than 1", "verdict": HOLDS,
        "summary": "It is.", "figures": (Figure("gain", 2.0, 1.5, 2.5, 3, "x"), Figure("loss", 0.1)),
        "seeds": (0, 1, 2), "seconds": 1.5, "environment": {"device": "cpu", "commit": None},
        "sources": sources(("foveate.patterns.SlidingWindow", "foveate.catalogue.lab.interval")),
    }  # fmt: skip
    return Record(**{**made, **fields})
