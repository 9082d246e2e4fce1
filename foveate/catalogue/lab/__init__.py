"""A small laboratory for evidence: what an experiment needs beyond the mechanism.

An experiment is a function `run(lab: Lab) -> Finding` in a module of `foveate.catalogue.experiments`, 20 to 60 lines.
Seeds, progress,
the quick form and what survives an interruption come from the `Lab`; tasks, models, timing and intervals from here.
"""

from __future__ import annotations

from foveate.catalogue.lab.finding import Finding, banded, bars, lines, series
from foveate.catalogue.lab.lab import Lab, Stopped
from foveate.catalogue.lab.stats import all_of, difference, interval, judge, proportion, slope, spearman
from foveate.catalogue.lab.timing import Times, paired_times
from foveate.catalogue.record import FAILS, HOLDS, OPEN, Figure

__all__ = [
    "FAILS",
    "HOLDS",
    "OPEN",
    "Figure",
    "Finding",
    "Lab",
    "Stopped",
    "Times",
    "all_of",
    "banded",
    "bars",
    "difference",
    "interval",
    "judge",
    "lines",
    "paired_times",
    "proportion",
    "series",
    "slope",
    "spearman",
]
