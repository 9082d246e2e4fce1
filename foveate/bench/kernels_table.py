"""The CSV of the kernel benchmark: one row per case and engine, on disk as soon as the case is measured.

The first column, `case`, names what was measured, so that files of different machines join on `case` and `engine`;
the columns after it follow timm's benchmark files (`batch_size`, `*_step_time` in milliseconds). Every row carries its
environment. A row is written with its line end and flushed to the disk; a line without an end (the power went) is
dropped when the file is read again.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from foveate.bench.errors import CompareError
from foveate.bench.results import write_atomic

CASE_COLUMNS = (
    "case", "engine", "mask", "direction", "dtype", "batch_size", "heads", "kv_heads", "q_len", "k_len", "head_dim",
)  # fmt: skip
MEASURED_COLUMNS = (
    "status",  # ok; or refused, skipped, differs, failed: and why
    "step_time",  # ms, median of the rounds
    "step_time_q1",
    "step_time_q3",
    "rounds",
    "gflops",  # of the allowed pairs only: 4 D area H, times 3.5 with the backward
    "gflops_per_sec",
    "area",  # allowed pairs of one head
    "density",  # share of all pairs that are allowed
    "tile_share",  # share of the 64 x 64 tiles that hold an allowed pair
    "matmul_size",
    "matmul_gflops_per_sec",  # square matrix product of this size and dtype, in the same rounds
    "share_of_matmul",  # gflops_per_sec / matmul_gflops_per_sec, median over rounds
    "dense_step_time",  # the same engine without a mask, in the same rounds
    "share_of_block_bound",  # dense time x tile_share / time, median over rounds
    "mask_time",  # ms to build the mask or layout
    "first_step_time",  # ms of the first call in this process: compilation, if any, included
    "inputs_mem",  # MiB of q, k, v and the gradient of the result
    "peak_mem",  # MiB that one call adds at its highest point, its results included
    "process_mem",  # MiB of the whole process (CPU) or of all tensors (CUDA) at that point
    "mem_method",
    "difference",  # largest difference from the first engine's results, relative to their largest magnitude
)
ENVIRONMENT_COLUMNS = (
    "device", "cpu", "cores", "threads", "isa", "native_isa", "memory_bytes", "os", "python", "torch", "cuda",
    "foveate", "commit", "date",
)  # fmt: skip
COLUMNS = CASE_COLUMNS + MEASURED_COLUMNS + ENVIRONMENT_COLUMNS
SAME_MACHINE = ("device", "cpu", "threads", "isa", "torch")
"""Columns that must not change when a file is continued: figures of one file are compared with one another."""

Row = dict[str, str]


def cell_text(value: object) -> str:
    """A value as it stands in the CSV: floats with six significant digits, None empty, text on one line.

    >>> cell_text(0.1234567), cell_text(None), cell_text("a\\n b")
    ('0.123457', '', 'a b')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return " ".join(str(value).split())


def number(row: Mapping[str, str], column: str) -> float | None:
    """A numeric field, None where it is empty."""
    return float(row[column]) if row.get(column) else None


@dataclass
class Table:
    """The rows of one file, by (case, engine)."""

    path: Path
    rows: dict[tuple[str, str], Row]

    @staticmethod
    def open(path: Path, environment: Mapping[str, object], *, resume: bool) -> Table:
        """A new table at `path`, or with `resume` the one that is there.

        Raises:
            CompareError: `path` exists and not `resume`; it has other columns or is of another machine; it cannot
                be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            exists = path.exists()
            if not exists:
                write_atomic(path, _line(COLUMNS))
        except OSError as error:
            raise CompareError(
                f"--out {path.parent}: cannot be written: {error.strerror or error}"
            ) from error
        if not exists:
            return Table(path, {})
        rows = read(path)
        if not resume:
            raise CompareError(
                f"--out {path.parent}: {path.name} is there with {len(rows)} rows; add --resume to continue "
                "it, or give another --out"
            )
        for row in rows.values():
            changed = [
                f"{name} was {row[name]!r}, now {cell_text(environment[name])!r}"
                for name in SAME_MACHINE
                if row[name] != cell_text(environment[name])
            ]
            if changed:
                raise CompareError(
                    f"--resume: {path} was measured elsewhere ({'; '.join(changed)}); give another --out"
                )
        table = Table(path, rows)
        table._rewrite()  # without a torn last line
        return table

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Write rows, replacing those of the same case and engine; they are on the disk when this returns."""
        fresh = {}
        for row in rows:
            unknown = set(row) - set(COLUMNS)
            if unknown:
                raise ValueError(f"row: unknown columns {sorted(unknown)}")
            fresh[str(row["case"]), str(row["engine"])] = {name: cell_text(row.get(name)) for name in COLUMNS}
        replaced = fresh.keys() & self.rows.keys()
        for key in replaced:
            del self.rows[key]
        self.rows.update(fresh)
        if replaced:
            self._rewrite()
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write("".join(_line(row.values()) for row in fresh.values()))
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self) -> None:
        write_atomic(self.path, _line(COLUMNS) + "".join(_line(row.values()) for row in self.rows.values()))


def read(path: Path) -> dict[tuple[str, str], Row]:
    """The complete rows of a file, by (case, engine), in their order.

    Raises:
        CompareError: it cannot be read, or its columns are not those of this version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompareError(f"{path}: cannot be read: {error}") from error
    complete = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(complete, newline="")))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise CompareError(f"{path}: its columns are not those of this version of foveate bench kernels")
    broken = [number for number, line in enumerate(lines[1:], 2) if len(line) != len(COLUMNS)]
    if broken:
        raise CompareError(
            f"{path}: line {broken[0]} has another number of fields than the {len(COLUMNS)} columns"
        )
    rows: list[Row] = [dict(zip(COLUMNS, line, strict=True)) for line in lines[1:]]
    return {(row["case"], row["engine"]): row for row in rows}


def _line(values: Iterable[object]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerow(list(values))
    return out.getvalue()
