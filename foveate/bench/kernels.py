"""`foveate bench kernels`: engines and peers side by side over masks, lengths, dtypes and directions.

A run is a plan of cases; each is measured whole, peers taking turns, and written before the next begins. See
`kernels_masks` for the masks, `kernels_peers` for who takes part, `kernels_measure` for how, `kernels_table` for the
columns and `kernels_targets` for the presets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch

from foveate.bench.errors import CompareError, unknown
from foveate.bench.kernels_masks import MASKS, SWEEP
from foveate.bench.kernels_measure import Guards, measure
from foveate.bench.kernels_peers import DIRECTIONS, DTYPES, PEERS, Cell, defaults
from foveate.bench.kernels_table import Row, Table, number
from foveate.bench.kernels_targets import PRESETS, Plan, Target, plan_of
from foveate.bench.machine import environment
from foveate.core.engines import EngineRefusal, native


@dataclass(frozen=True)
class Settings:
    """What to measure. Empty `engines` means all that are installed for the device."""

    preset: str = ""
    masks: tuple[str, ...] = SWEEP
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    directions: tuple[str, ...] = DIRECTIONS
    engines: tuple[str, ...] = ()
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0  # 0: as many as heads
    rounds: int = 7
    budget: float = 60.0
    call_seconds: float = 20.0
    mask_gib: float = 8.0
    device: str = "auto"
    threads: int = 0  # 0: torch's default

    def quick(self) -> Settings:
        """A look within a minute: five masks, two short lengths, one dim and dtype, three rounds, nothing compiled."""
        return replace(
            self,
            masks=("full", "causal", "sliding_window_causal_512", "document_full", "neighborhood_2d"),
            lengths=(1024, 2048),
            dims=(64,),
            dtypes=("float32",),
            engines=self.engines or ("native", "sdpa", "sdpa_mask"),
            rounds=3,
        )

    def check(self) -> Settings:
        """The same with the device and engines filled in.

        Raises:
            CompareError: a value that is not accepted; the message names the option.
        """
        for option, given, accepted in (
            ("--masks", self.masks, MASKS),
            ("--dtypes", self.dtypes, DTYPES),
            ("--directions", self.directions, DIRECTIONS),
            ("--engines", self.engines, PEERS),
        ):
            wrong = [name for name in given if name not in accepted]
            if wrong:
                raise unknown(f"name in {option}", wrong, list(accepted))
        if self.preset and self.preset not in PRESETS:
            raise unknown("name in --preset", [self.preset], list(PRESETS))
        for option, values in (
            ("--masks", self.masks),
            ("--lengths", self.lengths),
            ("--dims", self.dims),
            ("--dtypes", self.dtypes),
            ("--directions", self.directions),
        ):
            if not values:
                raise CompareError(f"{option}: nothing named; accepted: at least one")
        for option, numbers, least in (
            ("--lengths", self.lengths, 64),
            ("--dims", self.dims, 1),
            ("--batch", (self.batch,), 1),
            ("--heads", (self.heads,), 1),
            ("--kv-heads", (self.kv_heads,), 0),
            ("--rounds", (self.rounds,), 1),
            ("--threads", (self.threads,), 0),
        ):
            for value in numbers:
                if value < least:
                    raise CompareError(f"{option} {value}: accepted whole numbers of at least {least}")
        for option, value in (
            ("--budget", self.budget), ("--call-seconds", self.call_seconds), ("--mask-gib", self.mask_gib),
        ):  # fmt: skip
            if not value > 0:
                raise CompareError(f"{option} {value:g}: accepted numbers above 0")
        if self.kv_heads and self.heads % self.kv_heads:
            raise CompareError(
                f"--kv-heads {self.kv_heads}: accepted divisors of --heads {self.heads}, or 0 for as many"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise unknown("name in --device", [self.device], ["auto", "cpu", "cuda"])
        if self.device == "cuda" and not torch.cuda.is_available():
            raise CompareError("--device cuda: torch sees no CUDA device; accepted: cpu, auto")
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return replace(self, device=device, engines=self.engines or defaults(device))

    @property
    def guards(self) -> Guards:
        return Guards(self.rounds, self.budget, self.call_seconds, self.mask_gib)

    def plan(self) -> Plan:
        """The cases in the order in which they are measured: short lengths first."""
        if self.preset:
            return plan_of(PRESETS[self.preset]())
        kv_heads = self.kv_heads or self.heads
        combinations = product(self.lengths, self.dims, self.dtypes, self.directions, self.masks)
        return [
            (Cell(mask, n, dim, dtype, direction, self.batch, self.heads, kv_heads), self.engines)
            for n, dim, dtype, direction, mask in combinations
            if not (mask == "decode" and direction == "fwd_bwd")
        ]


class Listener(Protocol):
    """Who is told how a run goes on."""

    def say(self, line: str) -> None: ...
    def start(self, cells: int, done: int) -> None: ...
    def step(self, what: str) -> None: ...
    def cell(self, rows: Sequence[Row], number: int, cells: int) -> None: ...


class Silent:
    """A listener that does not listen."""

    def say(self, line: str) -> None: ...
    def start(self, cells: int, done: int) -> None: ...
    def step(self, what: str) -> None: ...
    def cell(self, rows: Sequence[Row], number: int, cells: int) -> None: ...


Measure = Callable[..., list[dict[str, object]]]


def run(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    measure: Measure = measure,
) -> Table:
    """Measure what is not in the file yet; the table of `file_name(...)` in `out`, complete.

    Raises:
        CompareError: settings that are not accepted; the file is there and not `resume`, or of another machine.
    """
    settings = settings.check()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    listener = listener or Silent()
    where = surroundings(settings.device)
    table = Table.open(out / file_name(settings, where), where, resume=resume)
    plan = settings.plan()
    waiting = [
        (cell, engines) for cell, engines in plan if any((cell.name, e) not in table.rows for e in engines)
    ]
    done = len(plan) - len(waiting)
    older = sorted({row["commit"] for row in table.rows.values()} - {str(where["commit"])})
    if older:
        listener.say(
            f"{table.path.name} holds rows measured at {', '.join(older)}, now {where['commit']}: "
            "delete the file to measure anew"
        )
    listener.start(len(plan), done)
    for cell, engines in waiting:
        rows = measure(
            cell, engines, list(table.rows.values()), device=settings.device, guards=settings.guards,
            step=listener.step,
        )  # fmt: skip
        date = environment()["date"]
        table.append({**where, **row, "date": date} for row in rows)
        done += 1
        listener.cell([table.rows[cell.name, engine] for engine in engines], done, len(plan))
    return table


def surroundings(device: str) -> dict[str, Any]:
    """The environment columns of a row: `machine.environment` and what this benchmark adds."""
    found = environment()
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found["cuda"] = torch.version.cuda if device == "cuda" else None
    try:
        found["native_isa"] = native.best_isa()
    except EngineRefusal:  # not built here; its rows say so
        found["native_isa"] = None
    del found["transformers"], found["numpy"]
    return found


def file_name(settings: Settings, where: dict[str, Any]) -> str:
    """In timm's manner: what, torch, device, threads.

    >>> file_name(Settings(device="cpu"), {"torch": "2.13.0+cpu", "cpu": "Intel(R) Xeon(R) Processor", "threads": 2})
    'benchmark-kernels-pt2130-cpu-intel_xeon_processor-t2.csv'
    """
    version = "pt" + "".join(re.findall(r"\d+", where["torch"].split("+")[0]))
    preset = f"-{settings.preset}" if settings.preset else ""
    if settings.device == "cuda":
        cuda = "cu" + "".join(re.findall(r"\d+", str(where["cuda"])))
        return f"benchmark-kernels{preset}-{version}-{cuda}-{_plain(where['device'])}.csv"
    return f"benchmark-kernels{preset}-{version}-cpu-{_plain(where['cpu'])}-t{where['threads']}.csv"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((r|tm|c)\)", " ", name.lower())).strip("_") or "unknown"


def failures(rows: Iterable[Row]) -> list[str]:
    """What must not happen: an engine of this library that failed, or results that differ."""
    return [
        f"{row['case']}: {row['engine']}: {row['status']}"
        for row in rows
        if row["status"].startswith("differs")
        or (PEERS[row["engine"]].ours and row["status"].startswith("failed"))
    ]


# --------------------------------------------------------------------------------------------- tables
def milliseconds(value: float | None) -> str:
    """A time for people, from milliseconds.

    >>> milliseconds(0.1234), milliseconds(48.21), milliseconds(12345.0), milliseconds(None)
    ('0.123 ms', '48.2 ms', '12.3 s', '')
    """
    if value is None:
        return ""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def summary(rows: Sequence[Row]) -> str:
    """One line about a finished case."""
    parts = []
    for row in rows:
        if row["status"] == "ok":
            parts.append(f"{row['engine']} {milliseconds(number(row, 'step_time'))}")
        else:
            parts.append(f"{row['engine']} {row['status'].split(':', 1)[0]}")
    return f"{rows[0]['case']}: " + ", ".join(parts)


def results_table(rows: Iterable[Row]) -> Any:
    """Everything measured, as a rich table: one line per case and engine that ran."""
    from rich.table import Table as RichTable

    table = RichTable(box=None, pad_edge=False, header_style="bold")
    table.add_column("case", overflow="fold")
    table.add_column("engine", no_wrap=True)
    for name in ("time", "GFLOP/s", "of matmul", "of block bound", "mask", "first call", "memory"):
        table.add_column(name, justify="right", no_wrap=name == "time")
    last = ""
    for row in rows:
        if row["status"] != "ok":
            continue
        rate, memory = number(row, "gflops_per_sec"), number(row, "peak_mem")
        table.add_row(
            row["case"] if row["case"] != last else "",
            row["engine"],
            milliseconds(number(row, "step_time")),
            f"{rate:.0f}" if rate is not None else "",
            _share(row, "share_of_matmul"),
            _share(row, "share_of_block_bound"),
            milliseconds(number(row, "mask_time")),
            milliseconds(number(row, "first_step_time")),
            f"{memory:.0f} MiB" if memory is not None else "",
        )
        last = row["case"]
    return table


def _share(row: Row, column: str) -> str:
    value = number(row, column)
    return "" if value is None else f"{value:.0%}"


def judged(preset: str, rows: Iterable[Row]) -> list[tuple[Target, float | None]]:
    """The targets of a preset, each with the figure that the rows hold."""
    from foveate.bench.kernels_targets import Rows

    found = Rows(rows)
    return [(target, target.value(found)) for target in PRESETS[preset]()]


def targets_table(found: Iterable[tuple[Target, float | None]]) -> Any:
    """Each target beside what was measured, as a rich table."""
    from rich.table import Table as RichTable

    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for name in ("target", "wanted", "measured", ""):
        table.add_column(name, justify="right" if name == "measured" else "left", overflow="fold")
    words = {True: "met", False: "missed", None: "not measured"}
    for target, value in found:
        shown = "" if value is None else f"{value:.3g}{target.unit}"
        table.add_row(target.what, target.wanted, shown, words[target.met(value)])
    return table
