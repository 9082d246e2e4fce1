"""The `Lab` an experiment runs in: seeds, quick form, device, progress, and steps that survive an interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from foveate.bench.results import write_atomic

T = TypeVar("T")


class Stopped(Exception):
    """The run was interrupted; finished steps are kept."""


class Listener(Protocol):
    """Hears where an experiment is: `share` of `what` is done, or None where the end is not known."""

    def step(self, what: str, share: float | None) -> None: ...


class _Silence:
    def step(self, what: str, share: float | None) -> None: ...


@dataclass
class Lab:
    """What `run(lab)` is given.

    Args:
        key: the paper.
        quick: the short form: fewer seeds and steps, for checking that the experiment runs; its verdict is shown
            as quick and never counts for the status.
        seeds: seeds of the repetitions; the quick form has one.
        device: torch device.
        folder: where `once` keeps finished steps; None keeps nothing.
        listener: hears the progress.
    """

    key: str
    quick: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"
    folder: Path | None = None
    listener: Listener = field(default_factory=_Silence)

    def __post_init__(self) -> None:
        if self.quick:
            self.seeds = self.seeds[:1]

    def pick(self, full: T, quick: T) -> T:
        """One of two settings: the full run's, or the quick run's."""
        return quick if self.quick else full

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Pass items on and tell the listener how far it is."""
        total = len(items) if isinstance(items, Sequence) else None
        for i, item in enumerate(items):
            self.listener.step(what, None if total is None else i / total)
            yield item
        self.listener.step(what, 1.0)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value of a step. A resumed run takes it from disk, so long steps are not done twice.

        Use it around each arm and seed: `acc = lab.once(f"window-{seed}", lambda: train(...))`. What the name leaves
        out must not change the value.
        """
        if not re.fullmatch(r"[\w.,=+-]+", name):
            raise ValueError(f"once: name {name!r}; accepted: letters, digits, and . , = + - _")
        if self.folder is None:
            return json.loads(json.dumps(make()))
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        value = json.loads(json.dumps(make(), allow_nan=False))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(value))
        return value
