"""The results of a comparison: versioned, written whole after every cell, resumed by the same settings."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.bench.errors import CompareError

SCHEMA = 1
KIND = "foveate.compare"
NAME = "results.json"


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write to a temporary file in the same directory, then rename over ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    if isinstance(data, str):
        data = data.encode("utf-8")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass
class Results:
    """What is known so far. ``identity`` (settings, model and text fingerprints) must match to resume.

    Fields of the file: schema, kind, complete, command, started, finished, identity {settings, model, text},
    environment, gates [..], cells [..]; a cell is documented in `foveate.bench.compare`.
    """

    directory: Path
    identity: dict[str, Any]
    command: str
    environment: dict[str, Any]
    started: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )
    finished: str | None = None
    gates: list[dict[str, Any]] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.directory / NAME

    def cell(self, mechanism: str, length: int) -> dict[str, Any] | None:
        """The finished cell, or None."""
        return next((c for c in self.cells if c["mechanism"] == mechanism and c["length"] == length), None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "complete": self.finished is not None,
            "command": self.command,
            "started": self.started,
            "finished": self.finished,
            "identity": self.identity,
            "environment": self.environment,
            "gates": self.gates,
            "cells": self.cells,
        }

    def save(self) -> None:
        write_atomic(
            self.path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )

    def finish(self) -> None:
        self.finished = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.save()


def read(path: Path) -> dict[str, Any]:
    """A results file, checked to be one of ours and of this schema.

    Raises:
        CompareError: unreadable, not JSON, another kind or schema.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompareError(f"{path}: cannot be read as results: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise CompareError(f"{path}: not a file of foveate compare")
    if found.get("schema") != SCHEMA:
        raise CompareError(
            f"{path}: results of schema {found.get('schema')}, this version reads schema {SCHEMA}"
        )
    return found


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in {**old, **new}:
            out += _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
        return out
    return [] if old == new else [f"{at.split('.', 1)[-1]} was {old!r}, now {new!r}"]


def open_results(
    directory: Path, identity: dict[str, Any], command: str, environment: dict[str, Any], resume: bool
) -> Results:
    """Start or continue the results in ``directory``.

    An earlier complete run is kept: its files move to ``previous-<date>/``. An unfinished one is continued
    with ``resume`` and refused without.

    Raises:
        CompareError: unfinished and not ``resume``; ``resume`` under other settings; the directory cannot be
        made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CompareError(f"--out {directory}: cannot be written: {error.strerror or error}") from error
    identity = json.loads(json.dumps(identity))  # tuples become lists, as they come back from the file
    results = Results(directory, identity, command, environment)
    if not results.path.exists():
        return results
    old = read(results.path)
    if resume:
        different = _differences(old["identity"], identity)
        if different:
            raise CompareError(
                f"--resume: {results.path} was measured under other settings ({'; '.join(different[:4])}); "
                "repeat them, or give another --out"
            )
        results.cells, results.gates, results.started = old["cells"], old["gates"], old["started"]
        return results
    if not old["complete"]:
        raise CompareError(
            f"--out {directory}: holds an unfinished run with {len(old['cells'])} cells; "
            "add --resume to continue it, or give another --out"
        )
    _set_aside(directory, old["finished"])
    return results


def _set_aside(directory: Path, finished: str) -> None:
    stamp = "".join(c if c.isalnum() else "-" for c in finished[:19])
    keep = directory / f"previous-{stamp}"
    count = 1
    while keep.exists():
        count += 1
        keep = directory / f"previous-{stamp}.{count}"
    keep.mkdir()
    for name in (NAME, "report.html", "tradeoff.png"):
        if (directory / name).exists():
            os.replace(directory / name, keep / name)
