"""What a run of an experiment found, as JSON: read, checked, written whole; and whether it is older than the code."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.bench.results import write_atomic

SCHEMA = 1
KIND = "foveate.evidence"
HOLDS = "holds"
FAILS = "does not hold"
OPEN = "not reproduced at this scale"
VERDICTS = (HOLDS, FAILS, OPEN)
PACKAGE = Path(__file__).resolve().parents[1]


class RecordError(ValueError):
    """A file that is no record of this schema."""


@dataclass(frozen=True)
class Figure:
    """One measured number: `value`, its 95 % interval [low, high] over `n` seeds or rounds (None where there is none).

    `unit` is a word or sign printed after the number ("", "%", "x", "s", "bits/byte").
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    unit: str = ""

    def __str__(self) -> str:
        """
        >>> str(Figure("accuracy", 0.981, 0.95, 1.0, n=3))
        '0.981 (0.95 to 1)'
        """
        text = f"{self.value:.4g}{self.unit if self.unit in ('%', 'x') else ''}"
        if self.unit and self.unit not in ("%", "x"):
            text += f" {self.unit}"
        return text if self.low is None else f"{text} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Record:
    """One run. `question`, what would count (`counts_if`), what was found (`summary`, `figures`) and the `verdict`.

    plot: the specification that `plots.draw` draws. picture: the frames that show the mechanism (`pictures`).
    quality, cost: share of dense attention's quality and of its work, for the gallery's scatter, or None.
    sources: {file of the package: [digest of its text, digest of its code]} of the implementation and the experiment.
    """

    key: str
    quick: bool
    question: str
    counts_if: str
    verdict: str
    summary: str
    figures: tuple[Figure, ...]
    seeds: tuple[int, ...]
    seconds: float
    environment: Mapping[str, Any]
    sources: Mapping[str, Sequence[str]]
    plot: Mapping[str, Any] | None = None
    picture: Mapping[str, Any] | None = None
    quality: float | None = None
    cost: float | None = None

    def fresh(self) -> bool:
        """Whether the code that was run is the code that is here (comments and docstrings apart)."""
        return all(_unchanged(PACKAGE / name, *digests) for name, digests in self.sources.items())

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": KIND, **dataclasses.asdict(self)}


def path_of(directory: Path, key: str) -> Path:
    return directory / f"{key}.json"


def write(record: Record, directory: Path) -> Path:
    """Write a record into a directory, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    path = path_of(directory, record.key)
    text = json.dumps(record.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, text)
    return path


def read(path: Path) -> Record:
    """A record from its file.

    Raises:
        RecordError: unreadable, another kind or schema, unknown or missing fields, an unknown verdict.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as evidence: {error}") from error
    if not isinstance(found, dict) or found.pop("kind", None) != KIND:
        raise RecordError(f"{path}: not a file of foveate reproduce")
    if (schema := found.pop("schema", None)) != SCHEMA:
        raise RecordError(f"{path}: evidence of schema {schema}, this version reads schema {SCHEMA}")
    try:
        found["figures"] = tuple(Figure(**figure) for figure in found["figures"])
        found["seeds"] = tuple(found["seeds"])
        record = Record(**found)
    except (TypeError, KeyError) as error:
        raise RecordError(f"{path}: {error}") from None
    if record.verdict not in VERDICTS:
        raise RecordError(f"{path}: verdict {record.verdict!r}; accepted: {', '.join(VERDICTS)}")
    if record.key != path.stem:
        raise RecordError(f"{path}: key is {record.key!r}; accepted: the file's name")
    return record


# ------------------------------------------------------------------------------------------ freshness
def digests(path: Path) -> tuple[str, str]:
    """(digest of a Python file's text, digest of its code without comments, docstrings and layout)."""
    text = path.read_text(encoding="utf-8")
    return _digest(text), _digest(_code(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _code(text: str) -> str:
    """The code's tokens, one after another; a string that stands alone as a statement (a docstring) is left out."""
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in skip]
    line_breaks = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    kept = []
    for i, token in enumerate(tokens):
        begins = i == 0 or tokens[i - 1].type in line_breaks
        ends = i + 1 == len(tokens) or tokens[i + 1].type in line_breaks
        if token.type == tokenize.STRING and begins and ends:
            continue
        kept.append(f"{tokenize.tok_name[token.type]} " if token.type in line_breaks else token.string)
    return "\0".join(kept)


@functools.cache
def _unchanged(path: Path, text_digest: str, code_digest: str) -> bool:
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8")
    return _digest(text) == text_digest or _digest(_code(text)) == code_digest
