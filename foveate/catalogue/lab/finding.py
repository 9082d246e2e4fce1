"""What an experiment returns, and the two plots it may ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.catalogue.lab.stats import interval
from foveate.catalogue.record import VERDICTS, Figure


@dataclass(frozen=True)
class Finding:
    """The result of an experiment.

    Args:
        question: what is measured, one sentence.
        counts_if: what had to come out for the claim to count as shown, with its numbers; fixed before the run.
        verdict: `HOLDS`, `FAILS` (measured well, and it says otherwise) or `OPEN` (this scale cannot tell).
        summary: what came out, one sentence with its numbers.
        figures: the numbers.
        plot: made by `lines` or `bars`.
        quality, cost: as shares of dense attention on the same task, for the gallery's scatter; None where that
            says nothing.
    """

    question: str
    counts_if: str
    verdict: str
    summary: str
    figures: tuple[Figure, ...]
    plot: dict[str, Any] | None = None
    quality: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"Finding: verdict {self.verdict!r}; accepted: {', '.join(VERDICTS)}")
        if not self.figures:
            raise ValueError("Finding: figures is empty; accepted: at least one measured number")
        for figure in self.figures:
            if not math.isfinite(figure.value):
                raise ValueError(
                    f"Finding: figure {figure.name!r} is {figure.value}; accepted: finite numbers"
                )
        object.__setattr__(self, "figures", tuple(self.figures))


def series(
    label: str,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    reference: bool = False,
) -> dict[str, Any]:
    """One line of `lines`, with a band where low and high are given; a reference (dense, chance) is drawn dashed."""
    if (
        len(x) != len(y)
        or (low is not None and len(low) != len(x))
        or (high is not None and len(high) != len(x))
    ):
        raise ValueError(
            f"series {label!r}: x, y, low and high must have one length, got {len(x)} and {len(y)}"
        )
    as_list = lambda v: None if v is None else [float(a) for a in v]  # noqa: E731
    return {"label": label, "x": as_list(x), "y": as_list(y), "low": as_list(low), "high": as_list(high),
            "reference": reference}  # fmt: skip


def banded(
    label: str,
    x: Sequence[float],
    runs: Sequence[Sequence[float]],
    *,
    most: float = math.inf,
    reference: bool = False,
) -> dict[str, Any]:
    """The mean of repeated runs (a list of y for each seed) as a `series`, with its 95 % band within [0, most].

    >>> banded("found", [1, 2], [[0.5, 1.0], [0.7, 1.0]], most=1.0)["high"]
    [1.0, 1.0]
    """
    figures = [interval(label, values) for values in zip(*runs, strict=True)]
    low = [f.value if f.low is None else max(0.0, f.low) for f in figures]
    high = [f.value if f.high is None else min(most, f.high) for f in figures]
    return series(label, x, [f.value for f in figures], low, high, reference)


def lines(
    title: str, x: str, y: str, lines: Sequence[dict[str, Any]], *, log_x: bool = False, log_y: bool = False
) -> dict[str, Any]:
    """A line plot: axis names and `series`."""
    return {
        "kind": "lines",
        "title": title,
        "x": x,
        "y": y,
        "log_x": log_x,
        "log_y": log_y,
        "series": list(lines),
    }


def bars(title: str, y: str, figures: Sequence[Figure], references: Sequence[str] = ()) -> dict[str, Any]:
    """One bar per figure with its interval; figures named in `references` are drawn as controls."""
    return {
        "kind": "bars",
        "title": title,
        "y": y,
        "bars": [
            {
                "label": f.name,
                "value": f.value,
                "low": f.low,
                "high": f.high,
                "reference": f.name in references,
            }
            for f in figures
        ],
    }
