"""Measuring one case: peers take turns within a round, so that a machine whose speed drifts slows all of them alike.

Order for each peer: build the mask (timed), a first call (timed, it may compile), a call whose memory is watched; then
the rounds, in each of which every peer, its dense run and a square matrix product are timed once. Figures are medians
over rounds; shares are medians of the rounds' own ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foveate.bench.kernels_masks import MASKS
from foveate.bench.kernels_peers import DTYPES, PEERS, Cell, Peer, Ready, Task
from foveate.bench.kernels_table import Row, number
from foveate.bench.memory import peak_of
from foveate.core.engines import EngineRefusal
from foveate.core.layout import BlockLayout

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest accepted difference between two peers' results, relative to the largest magnitude of each result. It tells
another mask from another order of summation; the engines' accuracy is the business of the tests."""
LEAST_ROUNDS = 3
WARM_BELOW = 2.0  # seconds; calls longer than this get no further warm-up


@dataclass(frozen=True)
class Guards:
    """When a peer is left out of a case, and how long the rounds go on."""

    rounds: int = 7
    budget: float = 60.0  # seconds for the rounds of one case; at least LEAST_ROUNDS are made
    call_seconds: float = (
        20.0  # a peer whose call takes longer is timed once; one that is expected to, not at all
    )
    mask_gib: float = 8.0  # memory of a mask


@dataclass
class _Contestant:
    """Somebody whose runs are timed in the rounds."""

    run: Callable[[], object]
    times: list[float] = field(default_factory=list)
    in_rounds: bool = True
    warm: bool = False


@dataclass
class _Entry:
    """A peer in one case: what is known of it, and its contestants."""

    peer: Peer
    row: dict[str, object]
    own: _Contestant | None = None
    dense: _Contestant | None = None


def measure(
    cell: Cell,
    engines: tuple[str, ...],
    known: list[Row],
    *,
    device: str = "cpu",
    guards: Guards = Guards(),
    step: Callable[[str], None] = lambda what: None,
) -> list[dict[str, object]]:
    """Rows of one case, one per engine, in the order of `engines` (names of `PEERS`).

    Args:
        known: rows measured before; from those of shorter lengths the time of a call is foreseen.
        step: told what is going on.

    A peer that refuses, is skipped by a guard or fails gets a row that says so.
    """
    pattern, mask_mod = MASKS[cell.mask](cell.length, device)
    layout = pattern.layout(cell.q_len, cell.length)
    q, k, v, grad = cell.inputs(device)
    task = Task(cell, device, q, k, v, pattern, mask_mod)
    base = {**_identity(cell), **_sizes(cell, layout)}
    base["inputs_mem"] = sum(t.nbytes for t in (q, k, v, grad)) / 2**20
    first_results: list[Tensor] = []
    entries = []
    for name in engines:
        entry = _Entry(PEERS[name], {**base, "engine": name})
        entries.append(entry)
        reason = _left_out(entry.peer, cell, base, known, device, guards)
        if reason is not None:
            entry.row["status"] = reason
            continue
        step(f"{cell.name}: {name}")
        try:
            _prepare(entry, task, grad, first_results, known, guards, len(engines) > 1)
        except EngineRefusal as error:
            entry.row["status"] = f"refused: {_reason(error)}"
        except Exception as error:  # of a peer; ours make the command fail in the end
            entry.row["status"] = f"failed: {type(error).__name__}: {_reason(error)}"
        if "status" in entry.row:
            entry.own = entry.dense = None
    first_results.clear()
    step(f"{cell.name}: rounds")
    matmul = _rounds(entries, DTYPES[cell.dtype], device, guards)
    for entry in entries:
        _finish(entry, cell, layout, matmul, device)
    return [entry.row for entry in entries]


def _identity(cell: Cell) -> dict[str, object]:
    return {
        "case": cell.name, "mask": cell.mask, "direction": cell.direction, "dtype": cell.dtype,
        "batch_size": cell.batch, "heads": cell.heads, "kv_heads": cell.kv_heads, "q_len": cell.q_len,
        "k_len": cell.length, "head_dim": cell.dim,
    }  # fmt: skip


def _sizes(cell: Cell, layout: BlockLayout) -> dict[str, object]:
    """Counts of one head; the benchmark's masks are the same for all heads and rows of the batch."""
    assert layout.batch == layout.heads == 1
    return {
        "gflops": cell.gflops(layout.area),
        "area": layout.area,
        "density": layout.density,
        "tile_share": layout.nnz / (layout.q_tiles * layout.k_tiles),
    }


def _left_out(
    peer: Peer, cell: Cell, base: dict[str, object], known: list[Row], device: str, guards: Guards
) -> str | None:
    """The status of a peer that does not get to run, or None."""
    if not peer.installed:
        return f"refused: {peer.package} is not installed"
    if device not in peer.devices and not (device == "cpu" and peer.name == "flex"):
        return f"refused: it does not run on {device}"
    reason = peer.refuses(cell, device)
    if reason is not None:
        return f"refused: {reason}"
    mask = peer.mask_bytes(cell) * cell.q_len * cell.length / 2**30
    if mask > guards.mask_gib:
        return f"skipped: its mask needs about {mask:.1f} GiB, the guard is {guards.mask_gib:g} GiB"
    share = 1.0 if peer.dense_work else float(str(base["tile_share"]))
    foreseen = _foreseen(peer.name, cell, share, known, "step_time")
    if foreseen is not None and foreseen > guards.call_seconds:
        return f"skipped: a call would take about {foreseen:.0f} s, the guard is {guards.call_seconds:g} s"
    return None


def _foreseen(engine: str, cell: Cell, share: float, known: list[Row], column: str) -> float | None:
    """Seconds of a call, from the longest shorter case of the same kind, by the number of visited tiles."""
    same = {**_identity(cell), "engine": engine}
    for varying in ("case", "q_len", "k_len"):
        del same[varying]
    best: Row | None = None
    for row in known:
        alike = all(row[name] == str(value) for name, value in same.items())
        if alike and row["status"] == "ok" and row[column] and int(row["k_len"]) < cell.length:
            best = row if best is None or int(row["k_len"]) > int(best["k_len"]) else best
    if best is None:
        return None
    dense_work = PEERS[engine].dense_work or column == "dense_step_time"
    then = (1.0 if dense_work else float(best["tile_share"])) * int(best["q_len"]) * int(best["k_len"])
    return (number(best, column) or 0.0) / 1e3 * share * cell.q_len * cell.length / then


def _prepare(
    entry: _Entry,
    task: Task,
    grad: Tensor,
    first_results: list[Tensor],
    known: list[Row],
    guards: Guards,
    several: bool,
) -> None:
    """Mask, first call, comparison of results, memory; sets the contestants, or a status when results differ."""
    cell, row, device = task.cell, entry.row, task.device
    ready = entry.peer.prepare(task)
    row["mask_time"] = None if ready.mask_time is None else ready.mask_time * 1e3
    run = _run(ready.call, task, grad)
    start = time.perf_counter()
    results = run()
    _synchronize(device)
    row["first_step_time"] = (time.perf_counter() - start) * 1e3
    if entry.peer.comparable:
        if not first_results:
            first_results.extend(results if several else ())
        else:
            row["difference"] = difference(results, first_results)
            if not row["difference"] <= TOLERANCE[cell.dtype]:  # NaN differs too
                row["status"] = f"differs: by {row['difference']:.2g} from the first engine's results"
                return
    del results
    _memory(row, run, device)
    entry.own = _Contestant(run)
    once = _seconds(run, device)
    _admit(entry.own, once, guards)
    if ready.dense is not None:
        _prepare_dense(entry, ready, task, grad, known, guards)


def _prepare_dense(
    entry: _Entry, ready: Ready, task: Task, grad: Tensor, known: list[Row], guards: Guards
) -> None:
    assert ready.dense is not None
    """The dense run is taken along unless it would eat up half of the budget, or more."""
    foreseen = _foreseen(entry.peer.name, task.cell, 1.0, known, "dense_step_time")
    if foreseen is not None and (
        foreseen > guards.call_seconds or foreseen * LEAST_ROUNDS > guards.budget / 2
    ):
        return
    run = _run(ready.dense, task, grad)
    run()  # it may compile
    dense = _Contestant(run)
    _admit(dense, _seconds(run, task.device), guards)
    entry.dense = dense


def _admit(contestant: _Contestant, once: float, guards: Guards) -> None:
    """Into the rounds, or, if one call is past the guard, with that one time."""
    contestant.in_rounds = once <= guards.call_seconds
    contestant.warm = once > WARM_BELOW
    if not contestant.in_rounds:
        contestant.times = [once]


def _run(call: Callable[[], Tensor], task: Task, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The call without gradients, or with its backward: the result and, then, the gradients of q, k and v."""
    inputs = (task.q, task.k, task.v)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (call(),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = call()
        given = torch.autograd.grad(out, inputs, grad.reshape(out.shape) if out.shape != grad.shape else grad)
        return (out.detach(), *given)

    return forward if task.cell.direction == "fwd" else forward_backward


def difference(results: tuple[Tensor, ...] | list[Tensor], others: list[Tensor]) -> float:
    """Largest difference of two lists of results, each relative to the largest magnitude of the other one.

    >>> import torch
    >>> difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])])
    0.5
    """
    worst = 0.0
    for one, other in zip(results, others, strict=True):
        gap = (one.float() - other.float()).abs().max()
        worst = max(worst, float(gap / other.float().abs().max().clamp(min=1e-30)), key=_nan_first)
    return worst


def _nan_first(value: float) -> float:
    return float("inf") if value != value else value


def _memory(row: dict[str, object], run: Callable[[], object], device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        high = torch.cuda.max_memory_allocated()
        row |= {
            "peak_mem": (high - before) / 2**20,
            "process_mem": high / 2**20,
            "mem_method": "cuda allocator",
        }
        return
    peak = peak_of(run)
    row["peak_mem"] = None if peak.bytes is None else peak.bytes / 2**20
    row["process_mem"] = _high_water_mib() if peak.method == "high-water mark" else None
    row["mem_method"] = peak.method


def _high_water_mib() -> float | None:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def _rounds(entries: list[_Entry], dtype: torch.dtype, device: str, guards: Guards) -> list[float]:
    """Time every contestant once per round; the times of the matrix product."""
    contestants = [c for e in entries for c in (e.own, e.dense) if c is not None]
    if not contestants:
        return []
    size = MATMUL_SIZE[device]
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(1)).to(dtype)
    matmul = _Contestant(lambda: a @ a)
    going = [matmul, *(c for c in contestants if c.in_rounds)]
    for contestant in going:
        if not contestant.warm:
            contestant.run()
    start = time.perf_counter()
    for done in range(guards.rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > guards.budget:
            break
        for contestant in going:
            contestant.times.append(_seconds(contestant.run, device))
    return matmul.times


def _finish(entry: _Entry, cell: Cell, layout: BlockLayout, matmul: list[float], device: str) -> None:
    """The figures of a peer that ran."""
    row, own = entry.row, entry.own
    if own is None:
        return
    times = np.array(own.times)
    gflops = cell.gflops(layout.area)
    low, middle, high = np.percentile(times, [25, 50, 75]) * 1e3
    size = MATMUL_SIZE[device]
    product = 2 * size**3 / 1e9
    rate = product / np.array(matmul)
    row |= {
        "status": "ok",
        "step_time": float(middle),
        "step_time_q1": float(low),
        "step_time_q3": float(high),
        "rounds": len(times),
        "gflops_per_sec": float(gflops / middle * 1e3),
        "matmul_size": size,
        "matmul_gflops_per_sec": float(np.median(rate)),
        "share_of_matmul": _ratio(gflops / times, rate),
    }
    if entry.dense is not None:
        dense = np.array(entry.dense.times)
        row["dense_step_time"] = statistics.median(entry.dense.times) * 1e3
        row["share_of_block_bound"] = _ratio(dense, times) * float(str(row["tile_share"]))


def _ratio(over: np.ndarray, under: np.ndarray) -> float:
    """Median of the rounds' ratios; ratio of medians where one of the two was timed once and not in the rounds."""
    if len(over) == len(under):
        return float(np.median(over / under))
    return float(np.median(over) / np.median(under))


def _reason(error: BaseException) -> str:
    """The first line of an error, without the words that name the engine again."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return line.split(" cannot run this: ", 1)[-1][:300]


def _seconds(run: Callable[[], object], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
