"""Presets of the kernel benchmark, and the project's targets read from the rows that a preset writes.

A target is a ratio of figures of one run, never seconds: the machines it is measured on drift and differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from foveate.bench.kernels_peers import Cell
from foveate.bench.kernels_table import Row, number

LINEAR_MASK = "sliding_window_causal_512"
LINEAR_LENGTHS = tuple(8192 << i for i in range(8))  # 8k .. 1M
DECODE_KEYS = 131072
DENSE_LENGTH = 8192
SPARSE_MASKS = ("sliding_window_causal_512", "document_full", "prefix_lm_causal")
SPARSE_LENGTHS = (4096, 8192)
GRID_LENGTH = 4096  # 64 x 64
ALONE = ("native",)

Plan = list[tuple[Cell, tuple[str, ...]]]
"""What a run measures: cases, each with its engines."""


@dataclass(frozen=True)
class Target:
    """One line of the issue: what is compared with which figure.

    `value` reads the measured figure from the rows, None where one of its cases was not measured; `cells` are the
    cases it reads. `low` and `high` bound what is accepted (None: not bounded on that side).
    """

    what: str
    cells: Plan
    value: Callable[[Rows], float | None]
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def met(self, measured: float | None) -> bool | None:
        """Whether a measured figure meets the target; None if there is none."""
        if measured is None:
            return None
        return (self.low is None or measured >= self.low) and (self.high is None or measured <= self.high)

    @property
    def wanted(self) -> str:
        """The bound as text.

        >>> Target("x", [], lambda rows: 1.0, low=2.0, unit="x").wanted
        'at least 2x'
        """
        if self.low is not None and self.high is not None:
            return f"{self.low:g}{self.unit} to {self.high:g}{self.unit}"
        bound, word = (self.low, "at least") if self.low is not None else (self.high, "at most")
        return f"{word} {bound:g}{self.unit}"


class Rows:
    """Rows of one run, found by case and engine; only those that were measured."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(row["case"], row["engine"]): row for row in rows if row["status"] == "ok"}

    def get(self, cell: Cell, engine: str, column: str) -> float | None:
        row = self._rows.get((cell.name, engine))
        return None if row is None else number(row, column)

    def ratio(self, cell: Cell, engine: str, other: str) -> float | None:
        """How many times as fast as `other` an engine is: ratio of the medians of the same rounds."""
        mine, theirs = self.get(cell, engine, "step_time"), self.get(cell, other, "step_time")
        return None if mine is None or theirs is None else theirs / mine


def slope(lengths: Iterable[float], values: Iterable[float]) -> float:
    """Exponent of the growth: least-squares slope of log(value) over log(length).

    >>> round(slope([1, 2, 4], [3, 6, 12]), 6)
    1.0
    """
    return float(np.polyfit(np.log(list(lengths)), np.log(list(values)), 1)[0])


# ------------------------------------------------------------------------------------------- targets
def _share(cell: Cell, column: str, low: float, what: str, engines: tuple[str, ...] = ALONE) -> Target:
    return Target(
        what,
        [(cell, engines)],
        lambda rows: _percent(rows.get(cell, "native", column)),
        low=low,
        unit=" %",
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _faster(cell: Cell, other: str, low: float, what: str) -> Target:
    return Target(
        what, [(cell, ("native", other))], lambda rows: rows.ratio(cell, "native", other), low=low, unit="x"
    )


def _linear_cells() -> list[Cell]:
    return [Cell(LINEAR_MASK, n) for n in LINEAR_LENGTHS]


def _growth(column: str, times: str | None = None) -> Callable[[Rows], float | None]:
    """Slope of a column over the lengths, or of its product with another one."""

    def value(rows: Rows) -> float | None:
        found: dict[int, float] = {}
        for cell in _linear_cells():
            y = rows.get(cell, "native", column)
            factor = 1.0 if times is None else rows.get(cell, "native", times)
            if not y or not factor:
                return None
            found[cell.length] = y * factor
        return slope(found, found.values())

    return value


def _memory_at_most(gigabytes: float) -> Target:
    """The whole process: inputs, result, and Python with torch."""
    cell = _linear_cells()[-1]

    def value(rows: Rows) -> float | None:
        mib = rows.get(cell, "native", "process_mem")
        return None if mib is None else mib * 2**20 / 1e9

    return Target(
        f"window 512: peak memory of the process at {LINEAR_LENGTHS[-1]} tokens",
        [(cell, ALONE)],
        value,
        high=gigabytes,
        unit=" GB",
    )


def linear_targets() -> list[Target]:
    """Time and memory proportional to the length, 8k to 1M tokens."""
    plan: Plan = [(cell, ALONE) for cell in _linear_cells()]
    span = f"{LINEAR_LENGTHS[0]} to {LINEAR_LENGTHS[-1]} tokens"
    return [
        Target(f"window 512: growth of time, {span}", plan, _growth("step_time"), low=0.9, high=1.1),
        # lengths are measured one after the other: counted in matrix products of its own rounds, a time does not
        # drift with the machine
        Target(
            f"window 512: growth of time in matrix products, {span}",
            plan,
            _growth("step_time", "matmul_gflops_per_sec"),
            low=0.9,
            high=1.1,
        ),
        Target(f"window 512: growth of added memory, {span}", plan, _growth("peak_mem"), low=0.9, high=1.1),
        _memory_at_most(12),
    ]


def targets() -> list[Target]:
    """Every speed and memory target of the native engine, in the order of the issue.

    >>> [target.what for target in targets()][0]
    'dense forward float32, D=64: share of the matrix-product rate'
    """
    found = []
    for dtype, low in (("float32", 85), ("bfloat16", 60)):
        for dim in (64, 128):
            cell = Cell("full", DENSE_LENGTH, dim, dtype)
            what = f"dense forward {dtype}, D={dim}: share of the matrix-product rate"
            found.append(_share(cell, "share_of_matmul", low, what, ("native", "sdpa")))
    for mask, dtype, low in (
        ("full", "float32", 1.15),
        ("causal", "float32", 2.0),
        ("full", "bfloat16", 1.4),
    ):
        cell = Cell(mask, DENSE_LENGTH, 64, dtype, "fwd_bwd")
        peer = "SDPA" if mask == "full" else "SDPA is_causal"
        name = "dense" if mask == "full" else "causal"
        found.append(_faster(cell, "sdpa", low, f"{name} forward+backward {dtype}: over {peer}"))
    for direction, low in (("fwd", 85), ("fwd_bwd", 75)):
        said = "forward" if direction == "fwd" else "forward+backward"
        for mask, lengths in (
            *((m, SPARSE_LENGTHS) for m in SPARSE_MASKS),
            ("neighborhood_2d", (GRID_LENGTH,)),
        ):
            for n in lengths:
                cell = Cell(mask, n, direction=direction)
                what = f"{mask} {said}, N={n}: share of the block bound"
                found.append(_share(cell, "share_of_block_bound", low, what))
    cell = Cell(LINEAR_MASK, DENSE_LENGTH, direction="fwd_bwd")
    found.append(_faster(cell, "sdpa_mask", 10, "window 512 forward+backward, N=8192: over SDPA with a mask"))
    found += linear_targets()
    for kv_heads in (8, 2):
        cell = Cell("decode", DECODE_KEYS, kv_heads=kv_heads)
        heads = "8 heads" if kv_heads == 8 else f"8 heads on {kv_heads}"
        found.append(_faster(cell, "sdpa", 1.0, f"decoding over {DECODE_KEYS} keys, {heads}: over SDPA"))
    return found


PRESETS: dict[str, Callable[[], list[Target]]] = {"targets": targets, "linear": linear_targets}


def plan_of(chosen: Iterable[Target]) -> Plan:
    """The cases that targets read, each once."""
    plan: dict[str, tuple[Cell, tuple[str, ...]]] = {}
    for target in chosen:
        for cell, engines in target.cells:
            known = plan.get(cell.name, (cell, ()))[1]
            plan[cell.name] = (cell, tuple(dict.fromkeys((*known, *engines))))
    return list(plan.values())
