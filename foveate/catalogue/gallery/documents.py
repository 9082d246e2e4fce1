"""What the index searches and filters, as a script that assigns a global: pages opened from files cannot fetch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from foveate.catalogue import vocabulary as words
from foveate.catalogue.gallery.facets import values_of
from foveate.catalogue.store import HOME, Catalogue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

SYNONYMS = HOME / "synonyms.toml"


def script(variable: str, value: Any) -> str:
    """A script that assigns JSON to a global; no text in it can end the script.

    >>> script("x", "</script>")
    'window.x = "\\\\u003c/script>";\\n'
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    for character in "<\u2028\u2029":  # inside of strings: JSON has these characters nowhere else
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"window.{variable} = {text};\n"


def documents(catalogue: Catalogue, synonyms: Path = SYNONYMS) -> dict[str, Any]:
    """Entries with their searched fields, facet values and sort keys; groups of synonyms; what tags mean."""
    return {
        "papers": [
            {
                "key": e.key,
                "name": e.name,
                "title": e.title,
                "aliases": " · ".join(e.aliases),
                "idea": e.idea,
                "phrases": " · ".join(e.phrases),
                "contribution": e.contribution,
                "mechanism": e.mechanism,
                "claim": e.claim,
                "tags": " ".join([*e.tags, e.family, *e.also, *e.modality]),
                "date": e.date,
                "facets": values_of(e, catalogue.status(e.key)),
            }
            for e in catalogue
        ],
        "synonyms": groups(synonyms),
        "tags": words.TAGS,
        "order": {"status": list(words.STATUSES), "family": list(words.FAMILIES)},
    }


def groups(path: Path) -> list[list[str]]:
    """The groups of a synonyms file, `[[group]] words = [...]`; none where the file is missing.

    Raises:
        ValueError: a file of another form.
    """
    if not path.exists():
        return []
    found = tomllib.loads(path.read_text(encoding="utf-8")).get("group", [])
    made = [group.get("words") if isinstance(group, dict) else None for group in found]
    for i, group in enumerate(made):
        if not isinstance(group, list) or not all(isinstance(word, str) and word for word in group):
            raise ValueError(f"{path.name}: group {i}: words is {group!r}; accepted: a list of strings")
    return made  # pyright: ignore[reportReturnType]
