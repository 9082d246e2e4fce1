"""`foveate compare`: what restricting attention costs a real model in quality, and saves in time and memory.

A *cell* is one mechanism at one length. Each is measured against dense in the same minutes:

- prefill: dense and mechanism forwards alternate in one loop (the first of each pair alternates too);
  seconds are medians, `ratio` is the median over pairs of mechanism / dense, `speedup` its inverse. The
  mechanism's very first call, layout building included, is kept apart as `first_seconds`.
- memory: resident memory one prefill adds at its highest point (`foveate.bench.memory`).
- density: pairs the mechanism lets through over the pairs the model's own rule (causal, mostly) lets
  through, measured over all layers, heads and text windows (without the text task: over one prefill);
  `tiles` is the same count in 64 x 64 tiles, against causal attention: what an engine computes.
- bits per byte, on the same windows as dense, with the paired difference and its bootstrap interval.
- needle recall by depth, and (`tasks="all"`) the questions of `foveate.bench.ruler`.
- attention recall: the share of the dense model's attention that the kept pairs hold, on the queries and keys of the
  dense model, in `RECALL_LAYERS` layers, all heads and `RECALL_ROWS` rows drawn by seed (`foveate.bench.recall`).
  Soft-caps and learned sinks of a model do not enter; None where no layer is plainly causal.

Every cell is saved as soon as it is done.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from foveate.bench import mechanisms as mechs
from foveate.bench import recall, ruler, tasks
from foveate.bench.errors import CompareError, unknown
from foveate.bench.machine import environment
from foveate.bench.memory import peak_of
from foveate.bench.results import Results, open_results
from foveate.bench.subject import Subject, load_subject
from foveate.bench.texts import Text, load_text
from foveate.core.selectors.base import Selector

TASKS = ("bpb", "needle", *ruler.TASKS)
USUAL_TASKS = ("bpb", "needle")
QUESTIONS = 4  # questions of each of ruler's tasks, per needle asked at each depth
RECALL_LAYERS, RECALL_ROWS = 3, 128


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers; part of the results' identity."""

    model: str = "reader"
    text: str = "stdlib"
    lengths: tuple[int, ...] = (2048, 4096)
    mechanisms: tuple[str, ...] = mechs.USUAL
    tasks: tuple[str, ...] = USUAL_TASKS
    density: float = 0.25
    tokens: int = 24576
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needles: int = 3
    repeats: int = 4
    gate: float = 0.5
    seed: int = 0
    dtype: str = "float32"
    threads: int = 0

    def windows(self, length: int) -> int:
        """Text windows at a length: about ``tokens`` tokens, at least 4."""
        return max(4, self.tokens // length)

    def quick(self) -> Settings:
        """The same comparison with a third of the text, one needle per depth and two timed pairs."""
        return replace(self, tokens=self.tokens // 3, needles=1, repeats=2)

    def check(self) -> Settings:
        """Validated, dense first and nothing twice; "all" as a mechanism or task becomes all of them.

        Raises:
            CompareError: an unknown mechanism or task, a length or budget out of range.
        """
        bad = [name for name in self.mechanisms if name not in (*mechs.NAMES, "all")]
        if bad:
            raise unknown("mechanism", bad, (*mechs.NAMES, "all"))
        bad = [name for name in self.tasks if name not in (*TASKS, "all")]
        if bad:
            raise unknown("task", bad, (*TASKS, "all"))
        if not self.lengths or not self.mechanisms or not self.tasks:
            raise CompareError("--lengths, --mechanisms and --tasks each need at least one entry")
        for length in self.lengths:
            if length < mechs.SHORTEST:
                raise CompareError(f"--lengths {length}: accepted {mechs.SHORTEST} or more tokens")
        if not 0.02 <= self.density <= 0.9:
            raise CompareError(f"--density {self.density}: accepted 0.02 to 0.9 of the causal pairs")
        for name in ("tokens", "needles", "repeats"):
            if getattr(self, name) < 1:
                raise CompareError(f"--{name} {getattr(self, name)}: accepted 1 or more")
        if not 0.0 <= self.gate <= 1.0:
            raise CompareError(f"--gate {self.gate}: accepted 0 to 1")
        if self.threads < 0:
            raise CompareError(f"--threads {self.threads}: accepted 0 (torch's default) or more")
        if self.seed < 0:
            raise CompareError(f"--seed {self.seed}: accepted 0 or more")
        asked = mechs.NAMES if "all" in self.mechanisms else self.mechanisms
        names = ("dense", *(n for n in dict.fromkeys(asked) if n != "dense"))
        return replace(
            self,
            mechanisms=names,
            lengths=tuple(dict.fromkeys(self.lengths)),
            tasks=TASKS if "all" in self.tasks else tuple(t for t in TASKS if t in self.tasks),
        )


class Listener(Protocol):
    """Hears what happens; the command line draws a bar or prints lines."""

    def start(self, cells: int, done: int) -> None: ...
    def step(self, mechanism: str, length: int, what: str, share: float) -> None: ...
    def cell(self, cell: dict[str, Any], number: int, cells: int) -> None: ...
    def say(self, line: str) -> None: ...


class Quiet:
    """A listener that keeps nothing."""

    def start(self, cells: int, done: int) -> None: ...
    def step(self, mechanism: str, length: int, what: str, share: float) -> None: ...
    def cell(self, cell: dict[str, Any], number: int, cells: int) -> None: ...
    def say(self, line: str) -> None: ...


def run(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    listener: Listener | None = None,
) -> Results:
    """Measure every missing cell; returns the finished results (also in ``out/results.json``).

    Raises:
        CompareError: anything the user can put right; cells measured before it stay saved.
    """
    listener = listener or Quiet()
    settings = settings.check()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    text = load_text(settings.text)
    subject = load_subject(settings.model, settings.dtype)
    work = _Work(settings, subject, text, listener)
    work.check()
    here = environment()
    machine = {key: here[key] for key in ("cpu", "threads", "torch", "transformers", "foveate")}
    identity = {
        "settings": asdict(settings),
        "model": subject.facts,
        "text": text.facts(),
        "machine": machine,
    }
    results = open_results(out, identity, command, here, resume)
    wanted = [(name, length) for length in settings.lengths for name in settings.mechanisms]
    missing = [pair for pair in wanted if results.cell(*pair) is None]
    listener.start(len(wanted), len(wanted) - len(missing))
    if not missing and results.cells:
        results.finish()
        return results
    for length in settings.lengths:
        todo = [name for name, n in missing if n == length]
        if not todo:
            continue
        plan = work.plan(length)
        for name in todo:
            dense = None if name == "dense" else results.cell("dense", length)
            cell = work.cell(name, plan, dense)
            closed = work.gates(cell, plan) if name == "dense" else []
            results.gates += closed
            results.cells.append(_without_gated(cell, results.gates))
            results.save()
            listener.cell(results.cells[-1], len(results.cells), len(wanted))
            for gate in closed:
                listener.say(describe_gate(gate))
    results.finish()
    return results


def _without_gated(cell: dict[str, Any], gates: list[dict[str, Any]]) -> dict[str, Any]:
    closed = {gate["task"] for gate in gates if gate["length"] == cell["length"]}
    return {key: (None if key in closed else value) for key, value in cell.items()}


@dataclass
class _Plan:
    """The inputs every mechanism of one length is measured on."""

    length: int
    windows: list[tasks.Window]
    questions: list[tasks.Question]
    more: dict[str, list[tasks.Question]]
    ids: torch.Tensor
    samples: list[recall.Sample]


class _Work:
    def __init__(self, settings: Settings, subject: Subject, text: Text, listener: Listener) -> None:
        self.settings, self.subject, self.text, self.listener = settings, subject, text, listener

    # -------------------- before measuring

    def check(self) -> None:
        """Everything that can be refused is refused before the first measurement."""
        import foveate.hf as hf

        context = self.subject.context
        for length in self.settings.lengths:
            if context is not None and length > context:
                raise CompareError(f"--lengths {length}: beyond the model's context of {context} tokens")
            self._windows(length, 1)
        try:
            with hf.apply(self.subject.model, "dense", phase="prefill") as handle:
                handle.check(self._windows(min(self.settings.lengths), 1)[0].ids[None, : mechs.SHORTEST])
        except (ValueError, TypeError, hf.CheckError) as error:
            raise CompareError(f"--model {self.settings.model}: {error}") from error
        for length in self.settings.lengths:
            for name in self.settings.mechanisms:
                try:
                    mechs.policy(name, length, self.settings.density, self.subject.shape, self.settings.seed)
                except ValueError as error:
                    raise CompareError(f"mechanism {name} at --lengths {length}: {error}") from error

    def _windows(self, length: int, count: int) -> list[tasks.Window]:
        return tasks.token_windows(self.subject, self.text, length, count)

    def plan(self, length: int) -> _Plan:
        s = self.settings
        windows = self._windows(length, s.windows(length))
        asked = []
        if "needle" in s.tasks:
            asked = tasks.questions(self.subject, self.text, length, s.depths, s.needles, s.seed)
        more = {
            task: ruler.questions(task, self.subject, self.text, length, QUESTIONS * s.needles, s.seed)
            for task in ruler.TASKS
            if task in s.tasks
        }
        ids = windows[0].ids
        samples = recall.samples(self.subject.model, ids, RECALL_LAYERS, s.seed)
        return _Plan(length, windows if "bpb" in s.tasks else windows[:1], asked, more, ids, samples)

    # -------------------- one cell

    def cell(self, name: str, plan: _Plan, dense: dict[str, Any] | None) -> dict[str, Any]:
        began = time.perf_counter()
        s, n = self.settings, plan.length

        def step(what: str, share: float) -> None:
            self.listener.step(name, n, what, share)

        step("prefill", 0.0)
        built = mechs.policy(name, n, s.density, self.subject.shape, s.seed)
        if built.tune is not None:
            built = self._tuned(built, plan.ids)
        first, density, watched = self._first_call(built.policy, plan.ids)
        cell: dict[str, Any] = {
            "mechanism": name,
            "length": n,
            "policy": built.text,
            "parameters": built.parameters,
            "density": density,
            "tiles": watched.tiles(),
            "picture": watched.picture(mechs.COLOURS[name]),
            "prefill": {"first_seconds": first, **self._prefill(name, built.policy, plan.ids, step)},
            "memory": self._memory(built.policy, plan.ids),
            "attention_recall": self._attention_recall(built.policy, plan),
            "bpb": None,
            "needle": None,
            **{task: None for task in ruler.TASKS if task in s.tasks},
        }
        if "bpb" in s.tasks and not _closed(dense, "bpb"):
            cell["bpb"] = self._bpb(built.policy, plan, dense, step)
            cell["density"] = cell["bpb"]["density"]
        if "needle" in s.tasks and not _closed(dense, "needle"):
            cell["needle"] = self._needle(built.policy, plan, step)
        for task in plan.more:
            if not _closed(dense, task):
                cell[task] = self._questions(task, built.policy, plan, step)
        cell["seconds"] = time.perf_counter() - began
        return cell

    def _tuned(self, built: mechs.Built, ids: torch.Tensor) -> mechs.Built:
        """Bisect the knob of a content-dependent mechanism until its measured density is the wanted one."""
        assert built.tune is not None
        asked, low, high = self.settings.density, built.tune.low, built.tune.high
        tried: list[tuple[float, mechs.Built]] = []  # (how far from the asked density, candidate)
        for _ in range(built.tune.steps):
            middle = (low + high) / 2
            candidate = built.tune.make(middle)
            _, density, _ = self._first_call(candidate.policy, ids)
            tried.append((abs(density - asked), candidate))
            if density > asked:
                high = middle
            else:
                low = middle
        return min(tried, key=lambda pair: pair[0])[1]

    def _forward(self, ids: torch.Tensor) -> float:
        began = time.perf_counter()
        self.subject.logits(ids, keep=1, use_cache=True)
        return time.perf_counter() - began

    def _first_call(self, policy: Any, ids: torch.Tensor) -> tuple[float, float, mechs.Watched]:
        """Seconds of a forward that builds its layouts, the measured density, and what was laid out."""
        watched = mechs.Watched(policy, len(ids))
        mechs.forget_layouts()
        with self._applied(watched.policy) as handle:
            seconds = self._forward(ids)
            return seconds, handle.report().density, watched

    def _applied(self, policy: Any) -> Any:
        import foveate.hf as hf

        return hf.apply(self.subject.model, policy, phase="prefill")

    def _prefill(
        self, name: str, policy: Any, ids: torch.Tensor, step: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """Alternate dense and mechanism forwards; dense itself alternates with the model's own attention."""

        def under(what: Any) -> float:
            if what is None:
                return self._forward(ids)
            with self._applied(what):
                return self._forward(ids)

        other = None if name == "dense" else "dense"
        under(other)  # warm; the policy is, by the first call
        pairs = []  # (other, mechanism)
        for i in range(self.settings.repeats):
            step("prefill", 0.3 * (i + 1) / self.settings.repeats)
            if i % 2:
                mine = under(policy)
                pairs.append((under(other), mine))
            else:
                theirs = under(other)
                pairs.append((theirs, under(policy)))
        ratio = statistics.median(mine / theirs for theirs, mine in pairs)
        seconds = statistics.median(mine for _, mine in pairs)
        against = statistics.median(theirs for theirs, _ in pairs)
        measured: dict[str, Any] = {
            "seconds": seconds,
            "pairs": [[round(a, 6), round(b, 6)] for a, b in pairs],
        }
        if name == "dense":
            own = str(getattr(self.subject.model.config, "_attn_implementation", "own"))
            return {
                **measured,
                "dense_seconds": seconds,
                "ratio": 1.0,
                "speedup": 1.0,
                "own": {"attention": own, "seconds": against, "ratio": 1 / ratio},
            }
        return {**measured, "dense_seconds": against, "ratio": ratio, "speedup": 1 / ratio}

    def _memory(self, policy: Any, ids: torch.Tensor) -> dict[str, Any]:
        with self._applied(policy):
            peak = peak_of(lambda: self._forward(ids))
        return {"peak_bytes": peak.bytes, "method": peak.method}

    def _bpb(
        self, policy: Any, plan: _Plan, dense: dict[str, Any] | None, step: Callable[[str, float], None]
    ) -> dict[str, Any]:
        rows = []
        with self._applied(policy) as handle:
            for i, window in enumerate(plan.windows):
                step("bits per byte", 0.3 + 0.35 * i / len(plan.windows))
                rows.append(tasks.window_bits(self.subject.logits(window.ids)[0], window))
        bits = tasks.Bits(np.stack([b for b, _ in rows]), np.stack([n for _, n in rows]))
        if not math.isfinite(bits.per_byte):
            raise CompareError(
                f"the model's logits are not finite at {plan.length} tokens; try --dtype float32"
            )
        cell: dict[str, Any] = {
            "value": bits.per_byte,
            "density": handle.report().density,
            "windows": len(rows),
            "bytes": int(bits.bytes.sum()),
            "by_position": (bits.bits.sum(0) / np.maximum(bits.bytes.sum(0), 1)).tolist(),
            "bits": np.round(bits.bits, 3).tolist(),
            "bytes_of": bits.bytes.tolist(),
            "difference": None,
        }
        if dense is not None:
            base = tasks.Bits(np.array(dense["bpb"]["bits"]), np.array(dense["bpb"]["bytes_of"]))
            value, low, high = tasks.paired_difference(bits, base, self.settings.seed)
            lost = (bits.bits - base.bits).sum(0) / np.maximum(base.bytes.sum(0), 1)
            cell["difference"] = {"value": value, "low": low, "high": high, "by_position": lost.tolist()}
        return cell

    def _needle(self, policy: Any, plan: _Plan, step: Callable[[str, float], None]) -> dict[str, Any]:
        found: dict[float, list[bool]] = {depth: [] for depth in self.settings.depths}
        with self._applied(policy):
            for i, question in enumerate(plan.questions):
                step("needle", 0.65 + 0.35 * i / len(plan.questions))
                logits = self.subject.logits(question.ids, keep=question.answer_len + 1)[0]
                found[question.depth].append(tasks.is_recalled(logits, question))
        hits, n = sum(map(sum, found.values())), sum(map(len, found.values()))
        low, high = tasks.wilson(hits, n)
        depths = [{"depth": d, "hits": sum(hit), "n": len(hit)} for d, hit in found.items()]
        return {"recall": hits / n, "hits": hits, "n": n, "low": low, "high": high, "by_depth": depths}

    def _questions(
        self, task: str, policy: Any, plan: _Plan, step: Callable[[str, float], None]
    ) -> dict[str, Any]:
        """Mean over questions of the share of parts that are right. Its interval is Wilson's for as many yes or no
        answers as there are questions, which is wide enough for shares.
        """
        found: list[list[bool]] = []
        with self._applied(policy):
            for i, question in enumerate(plan.more[task]):
                step(task, 0.65 + 0.35 * i / len(plan.more[task]))
                logits = self.subject.logits(question.ids, keep=question.answer_len + 1)[0]
                found.append(tasks.recalled(logits, question))
        value = statistics.fmean(sum(parts) / len(parts) for parts in found)
        low, high = tasks.wilson(value * len(found), len(found))
        hits, n = sum(map(sum, found)), sum(map(len, found))
        return {"recall": value, "hits": hits, "n": n, "questions": len(found), "low": low, "high": high}

    def _attention_recall(self, policy: Any, plan: _Plan) -> dict[str, Any] | None:
        if not plan.samples:
            return None
        rows = recall.sampled_rows(plan.length, RECALL_ROWS, self.settings.seed)
        by_layer = []
        for sample in plan.samples:
            if policy == "dense":
                by_layer.append([1.0] * sample.q.shape[1])
                continue
            layout = (
                policy.layout(sample.q, sample.k, scale=sample.scale, is_causal=True)
                if isinstance(policy, Selector)
                else policy.layout(plan.length)
            )
            kept = recall.attention_recall(sample.q, sample.k, layout, rows=rows, scale=sample.scale)
            by_layer.append([round(x, 6) for x in kept.mean((0, 2)).tolist()])
        return {
            "value": statistics.fmean(map(statistics.fmean, by_layer)),
            "least": min(map(min, by_layer)),
            "layers": [sample.layer for sample in plan.samples],
            "heads": by_layer,
            "rows": len(rows),
        }

    # -------------------- the gates

    def gates(self, dense: dict[str, Any], plan: _Plan) -> list[dict[str, Any]]:
        """The tasks the dense model cannot do at this length: they are named, not shown."""
        if self.settings.gate == 0:
            return []
        closed = []
        if dense["bpb"] is not None:
            entropy = self.text.facts()["byte_entropy"]
            if dense["bpb"]["value"] >= entropy:
                closed.append(
                    {
                        "task": "bpb",
                        "length": plan.length,
                        "dense": dense["bpb"]["value"],
                        "needed": entropy,
                        "rule": "below the order-0 entropy of the text's bytes",
                    }
                )
        for task in ("needle", *ruler.TASKS):
            asked = dense.get(task)
            if asked is not None and asked["recall"] < self.settings.gate:
                closed.append(
                    {
                        "task": task,
                        "length": plan.length,
                        "dense": asked["recall"],
                        "needed": self.settings.gate,
                        "rule": "recall of",
                    }
                )
        return closed


def describe_gate(gate: dict[str, Any]) -> str:
    """One line on a task that is not shown.

    >>> gate = {"task": "needle", "length": 4096, "dense": 0.1, "needed": 0.5, "rule": "recall of"}
    >>> describe_gate(gate)
    'needle at 4096 tokens is not shown: dense reaches 0.10, needed: recall of 0.50'
    """
    return (
        f"{gate['task']} at {gate['length']} tokens is not shown: dense reaches {gate['dense']:.2f}, "
        f"needed: {gate['rule']} {gate['needed']:.2f}"
    )


def _closed(dense: dict[str, Any] | None, task: str) -> bool:
    return dense is not None and dense[task] is None
