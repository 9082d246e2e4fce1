"""`foveate reproduce`: run the experiments of entries, keep what they found, one after another.

Each record is written as soon as its experiment ends; an experiment that fails is reported and the rest goes on.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveate.bench.results import write_atomic
from foveate.catalogue import plots
from foveate.catalogue.entry import Entry
from foveate.catalogue.lab import Finding, Lab
from foveate.catalogue.record import Record, RecordError, path_of, read, write
from foveate.catalogue.resolve import resolve, sources
from foveate.catalogue.store import Catalogue

PARTIAL = ".partial"


@dataclass(frozen=True)
class Outcome:
    """What became of one entry: its record, or the error that stopped it. `kept`: an earlier record was good."""

    key: str
    record: Record | None
    error: str = ""
    kept: bool = False


def chosen(catalogue: Catalogue, keys: Sequence[str], everything: bool) -> list[Entry]:
    """The entries to run: those named, or all that have an experiment.

    Raises:
        UnknownKey: no such paper.
        ValueError: nothing asked for, or an entry without an experiment.
    """
    if everything:
        if keys:
            raise ValueError("--all runs every entry that has an experiment; accepted: keys, or --all")
        return [entry for entry in catalogue if entry.evidence]
    if not keys:
        raise ValueError("nothing to run; accepted: keys of papers, or --all")
    entries = [catalogue[key] for key in dict.fromkeys(keys)]
    for entry in entries:
        if not entry.evidence:
            state = catalogue.status(entry.key)
            raise ValueError(
                f"{entry.key}: {state}, it has no experiment yet; `foveate list --status` shows those that have"
            )
    return entries


def run_all(
    entries: Sequence[Entry],
    out: Path,
    *,
    quick: bool = False,
    resume: bool = False,
    device: str = "cpu",
    listen: Callable[[Entry], object] | None = None,
) -> Iterator[Outcome]:
    """Run experiments into a directory; an outcome each, as they end.

    Args:
        quick: the short form, which checks that an experiment runs. It never replaces the record of a full run.
        resume: keep fresh records of the same form, and continue interrupted experiments after their last step.
        device: torch device.
        listen: entry -> a `lab.Listener`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        old = _kept(out, entry.key, quick) if resume else None
        if old is not None:
            yield Outcome(entry.key, old, kept=True)
            continue
        if quick and _has_full(out, entry.key):
            yield Outcome(
                entry.key,
                None,
                f"{out} holds its full record, which a quick run would replace; accepted: another directory",
            )
            continue
        folder = out / PARTIAL / f"{entry.key}{'.quick' if quick else ''}"
        if not resume and folder.exists():
            shutil.rmtree(folder)
        lab = Lab(entry.key, quick=quick, device=device, folder=folder)
        if listen is not None:
            lab.listener = listen(entry)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            record = run(entry, lab)
            write(record, out)
            _draw(record, out)
        except Exception as error:  # the rest must still run; the error is shown, with its place
            last = traceback.extract_tb(error.__traceback__)[-1]
            yield Outcome(
                entry.key, None, f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            )
            continue
        shutil.rmtree(folder, ignore_errors=True)
        yield Outcome(entry.key, record)
    if (out / PARTIAL).exists() and not any((out / PARTIAL).iterdir()):
        (out / PARTIAL).rmdir()


def _kept(out: Path, key: str, quick: bool) -> Record | None:
    path = path_of(out, key)
    if not path.exists():
        return None
    try:
        record = read(path)
    except RecordError:
        return None
    return record if record.quick == quick and record.fresh() else None


def _has_full(out: Path, key: str) -> bool:
    path = path_of(out, key)
    try:
        return path.exists() and not read(path).quick
    except RecordError:
        return False


def run(entry: Entry, lab: Lab) -> Record:
    """Run one experiment, seeded, and make its record. The digests are taken before it runs."""
    import numpy as np
    import torch

    from foveate.bench.machine import commit, environment

    paths = (*entry.implementation, entry.evidence, *((entry.picture,) if entry.picture else ()))
    used = sources(paths)
    experiment = resolve(entry.evidence)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # for code that uses the global state
    torch.manual_seed(0)
    start = time.perf_counter()
    found = experiment(lab)
    if not isinstance(found, Finding):
        raise TypeError(f"{entry.evidence} returned {type(found).__name__}; accepted: a Finding")
    seconds = time.perf_counter() - start
    picture = resolve(entry.picture)() if entry.picture else None
    return Record(
        key=entry.key,
        quick=lab.quick,
        seeds=lab.seeds,
        seconds=round(seconds, 1),
        environment={
            "device": _device(lab.device),
            **environment(),
            "commit": commit(apart_from="foveate/catalogue/evidence"),
        },
        sources=used,
        picture=picture,
        **{f.name: getattr(found, f.name) for f in dataclasses.fields(found)},
    )


def _device(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def _draw(record: Record, out: Path) -> None:
    """The plot beside the record, as SVG; nothing without a plot or without matplotlib, not even an earlier one."""
    path = out / f"{record.key}.svg"
    path.unlink(missing_ok=True)
    if record.plot is None:
        return
    try:
        write_atomic(path, plots.svg(record.plot))
    except ImportError:
        return
