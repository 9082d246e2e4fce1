"""The common suite: what every mechanism must satisfy, decided by its interface and its tags.

Works on any object, not only on those of the catalogue:

    from foveate.catalogue.conformance import checks_of_object

    for step in checks_of_object(lambda: MyPattern(3), use="pattern", tags=["causal"]):
        step()  # raises AssertionError that says what is wrong, with what values

`vocabulary.CHECKS` says what each check demands, and `vocabulary.CHECKED` which tags bring which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from foveate.catalogue import vocabulary as words
from foveate.catalogue.conformance import modules, operators, patterns, scores, selectors
from foveate.catalogue.conformance.subject import Subject, demand
from foveate.catalogue.entry import Check, Cost, Entry
from foveate.catalogue.resolve import resolve

SLOW = ("flex_engine",)  # compiles for seconds


def resolves(s: Subject) -> None:
    """The check of tools."""
    if s.maker is None:
        demand(resolve(s.check.make) is not None, f"{s.check.make} is None")


FUNCTIONS: dict[str, Mapping[str, Callable[[Subject], None]]] = {
    "pattern": patterns.CHECKS,
    "selector": selectors.CHECKS,
    "score": scores.CHECKS,
    "normalizer": scores.CHECKS,
    "operator": operators.CHECKS,
    "layer": modules.LAYERS,
    "map": modules.MAP_LAYERS,
    "backbone": modules.BACKBONES,
    "gate": modules.GATES,
    "tool": {"resolves": resolves},
}


@dataclass(frozen=True)
class Step:
    """One check on one object; calling it raises AssertionError when the object fails. `slow`: takes many seconds."""

    name: str
    subject: Subject
    run: Callable[[Subject], None]
    slow: bool = False

    def __call__(self) -> None:
        """Run the check.

        Raises:
            AssertionError: what is wrong, with what values; also when the object raises an error of its own.
        """
        what = f"{self.subject.check.use}, {self.name}"
        try:
            self.run(self.subject)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{what}: the object raised {type(error).__name__}: {error}") from error


def checks_for(entry: Entry, check: Check) -> list[Step]:
    """The steps of one object of an entry, by its interface and the tags of the check, else of the entry."""
    tags = entry.tags if check.tags is None else check.tags
    return _steps(Subject(check, frozenset(tags), entry.cost))


def checks_of_object(
    make: Callable[..., Any],
    use: str,
    tags: Iterable[str] = (),
    *,
    arguments: Mapping[str, Any] | None = None,
    cost: Cost | None = None,
    **check: Any,
) -> list[Step]:
    """The steps of an object that is in no catalogue.

    Args:
        make: called as `make(**arguments)`, gives a new object each time.
        use: a key of `vocabulary.INTERFACES`; tags: of `vocabulary.TAGS`.
        check: tokens, heads, head_dim, grid, limits and symbols of `entry.Check`.

    Raises:
        ValueError: an unknown interface or tag.

    >>> from foveate.patterns import SlidingWindow
    >>> steps = checks_of_object(SlidingWindow, "pattern", ["causal"], arguments={"window": 5}, tokens=31)
    >>> steps[0].name, steps[0]()
    ('layout_is_contains', None)
    """
    if use not in words.INTERFACES:
        raise ValueError(f"use must be one of {', '.join(words.INTERFACES)}; got {use!r}")
    tags = frozenset(tags)
    if not tags <= set(words.TAGS):
        raise ValueError(
            f"tags {sorted(tags - set(words.TAGS))} are unknown; accepted: {', '.join(words.TAGS)}"
        )
    made = Check(make="", use=use, arguments=dict(arguments or {}), **check)
    return _steps(Subject(made, tags, cost or Cost(), lambda given: make(**given)))


def _steps(subject: Subject) -> list[Step]:
    check = subject.check
    names = words.checks_of(check.use, subject.tags)
    skip = {
        name for name, given in (("limits", check.limits), ("parameter_count", check.symbols)) if not given
    }
    functions = FUNCTIONS[check.use]
    return [Step(name, subject, functions[name], name in SLOW) for name in names if name not in skip]


__all__ = ["FUNCTIONS", "Step", "Subject", "checks_for", "checks_of_object"]
