"""`foveate caches`: what a key/value cache under a policy keeps of a model's abilities while it decodes.

A *cell* is one policy at one budget. The prompt is read densely; the cache is cut `before` tokens before the answer (so
that it does not see the question, unless `before` is 0); the rest goes in token by token.

- needle: share of questions whose answer tokens are each the likeliest one, given those before; Wilson interval.
- bits per byte of the last `decoded` tokens of each text window; the difference to dense is paired over windows.
- tokens per KV head, bytes held and their share of a full cache's, at the end of a window; keys read per token.
- seconds per decoded token, dense and policy alternating; medians, the first token apart.

Every cell is saved as soon as it is done.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.bench.errors import CompareError
from foveate.bench.machine import environment
from foveate.bench.results import write_atomic
from foveate.bench.subject import Subject, load_subject
from foveate.bench.tasks import Question, is_recalled, questions, token_windows, wilson
from foveate.bench.texts import load_text

DENSE = "dense"
DEFAULT = ("streaming", "h2o", "snapkv", "recycled", "oracle", "random")
KIND = "foveate.caches"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers; part of the results' identity."""

    model: str = "reader"
    text: str = "stdlib"
    length: int = 2048
    policies: tuple[str, ...] = DEFAULT
    budgets: tuple[float, ...] = (0.125, 0.25)
    per: str = "head"
    before: int = 32
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    needles: int = 2
    windows: int = 4
    decoded: int = 64
    gate: float = 0.5
    seed: int = 0
    dtype: str = "float32"
    threads: int = 0

    def check(self) -> Settings:
        """Validated.

        Raises:
            CompareError: an unknown policy, or a number out of range.
        """
        from foveate.cache import POLICIES

        for name in self.policies:
            cls = POLICIES.get(name)
            if cls is None or not cls.needs_budget:
                known = sorted(n for n, c in POLICIES.items() if c.needs_budget)
                raise CompareError(f"--policies {name}: accepted {', '.join(known)}")
        for budget in self.budgets:
            if not 0.0 < budget <= 1.0:
                raise CompareError(f"--budgets {budget}: accepted fractions in (0, 1]")
        if self.length < 256:
            raise CompareError(f"--length {self.length}: accepted 256 or more tokens")
        for name in ("needles", "windows"):
            if getattr(self, name) < 1:
                raise CompareError(f"--{name} {getattr(self, name)}: accepted 1 or more")
        if not 2 <= self.decoded <= self.length // 2:
            raise CompareError(f"--decoded {self.decoded}: accepted 2 to half of --length")
        if not 0 <= self.before <= self.length // 2:
            raise CompareError(f"--before {self.before}: accepted 0 to half of --length")
        return self


class Decoder:
    """A model that reads prompts and goes on token by token under a cache."""

    def __init__(self, subject: Subject):
        self.model = subject.model
        self.keeps = subject.keeps_logits

    def cache(self, policy: str, budget: float, per: str) -> Any:
        import foveate as fv

        if policy == DENSE:
            return fv.hf.Cache(self.model, "streaming", 1.0)
        return fv.hf.Cache(self.model, policy, budget, per=per)

    @torch.no_grad()
    def read_on(self, ids: torch.Tensor, start: int, cache: Any) -> tuple[torch.Tensor, list[float]]:
        """Logits (n - start, vocabulary) that predict ``ids[start:]``, and the seconds of each single token."""
        few = {"logits_to_keep": 1} if self.keeps else {}
        out = [self.model(ids[None, :start], past_key_values=cache, **few).logits[0, -1]]
        seconds = []
        for at in range(start, len(ids) - 1):
            then = time.perf_counter()
            out.append(self.model(ids[None, at : at + 1], past_key_values=cache).logits[0, -1])
            seconds.append(time.perf_counter() - then)
        return torch.stack(out), seconds


def run(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    command: str = "",
    say: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, Any]:
    """Measure every cell; returns the results, also in ``out``/results.json, results.csv and caches.png.

    Args:
        resume: continue unfinished results of the same settings.
        say: hears what is done and the share of all cells that is.

    Raises:
        CompareError: settings out of range, a model or text that cannot be loaded, other results in ``out``.
    """
    settings = settings.check()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    subject, text = load_subject(settings.model, settings.dtype), load_text(settings.text)
    identity = json.loads(json.dumps({"settings": asdict(settings), "model": subject.facts}))
    results = _open(out, identity, command, resume)
    decoder = Decoder(subject)
    asked = questions(subject, text, settings.length, settings.depths, settings.needles, settings.seed)
    found = token_windows(subject, text, settings.length, settings.windows)
    windows = [w.ids for w in found]
    sizes = [float(w.bytes_of[-settings.decoded :].sum()) for w in found]
    todo = [(DENSE, 1.0), *((name, b) for name in settings.policies for b in settings.budgets)]
    for number, (policy, budget) in enumerate(todo):
        say(f"{policy} {budget:g}", number / len(todo))
        if any(c["policy"] == policy and c["budget"] == budget for c in results["cells"]):
            continue
        results["cells"].append(
            _cell(decoder, settings, policy, budget, asked, windows, sizes, results["cells"])
        )
        _save(out, results)
    results["complete"] = True
    _save(out, results)
    write_atomic(out / "results.csv", as_csv(results))
    with contextlib.suppress(ModuleNotFoundError):  # a picture needs matplotlib; the numbers do not
        write_atomic(out / "caches.png", picture(results))
    say("done", 1.0)
    return results


def _cell(
    decoder: Decoder,
    settings: Settings,
    policy: str,
    budget: float,
    asked: Sequence[Question],
    windows: Sequence[torch.Tensor],
    sizes: Sequence[float],
    done: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    hits = 0
    for question in asked:
        cache = decoder.cache(policy, budget, settings.per)
        start = len(question.ids) - question.answer_len - settings.before
        logits, _ = decoder.read_on(question.ids, start, cache)
        hits += is_recalled(logits[-question.answer_len :], question)
        cache.release()
    bits, times, dense_times, held = [], [], [], None
    for ids, size in zip(windows, sizes, strict=True):
        start = len(ids) - settings.decoded
        cache = decoder.cache(policy, budget, settings.per)
        logits, seconds = decoder.read_on(ids, start, cache)
        held = cache.held()
        cache.release()
        nats = torch.nn.functional.cross_entropy(logits.float(), ids[start:], reduction="sum")
        bits.append(float(nats) / np.log(2) / max(size, 1.0))
        times += seconds[1:]
        if policy != DENSE:
            plain = decoder.cache(DENSE, 1.0, "head")
            _, seconds = decoder.read_on(ids, start, plain)
            plain.release()
            dense_times += seconds[1:]
    assert held is not None
    low, high = wilson(hits, len(asked))
    dense = next((c for c in done if c["policy"] == DENSE), None)
    lost = (
        None if dense is None else [b - d for b, d in zip(bits, dense["bits_per_byte_windows"], strict=True)]
    )
    seconds = statistics.median(times)
    steps = max(1, settings.decoded - 1)
    return {
        "policy": policy,
        "budget": budget,
        "needles": hits / len(asked),
        "needles_low": low,
        "needles_high": high,
        "needles_asked": len(asked),
        "bits_per_byte": statistics.fmean(bits),
        "bits_per_byte_lost": None if lost is None else statistics.fmean(lost),
        "bits_per_byte_windows": bits,
        "tokens_per_head": held.tokens,
        "bytes": held.nbytes,
        "bytes_full": held.full_bytes,
        "keys_read_per_token": held.keys_read / steps / len(held.layers),
        "seconds_per_token": seconds,
        "speedup": statistics.median(dense_times) / seconds if dense_times else 1.0,
    }


# -------------------- files
def _open(out: Path, identity: dict[str, Any], command: str, resume: bool) -> dict[str, Any]:
    path = out / "results.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompareError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CompareError(f"{path}: cannot be read as results: {error}") from error
        if old.get("kind") != KIND:
            raise CompareError(f"{path}: not a file of foveate caches")
        if old["identity"] != identity:
            raise CompareError(f"--out {out}: holds results of other settings; give another --out")
        if not resume and not old["complete"]:
            raise CompareError(
                f"--out {out}: holds an unfinished run; add --resume to continue it, or give another --out"
            )
        return old
    return {
        "kind": KIND,
        "complete": False,
        "command": command,
        "identity": identity,
        "environment": environment(),
        "cells": [],
    }


def _save(out: Path, results: dict[str, Any]) -> None:
    write_atomic(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")


def as_csv(results: dict[str, Any]) -> str:
    """One line per cell, with the environment's columns behind."""
    text = io.StringIO()
    plain = [{k: v for k, v in c.items() if k != "bits_per_byte_windows"} for c in results["cells"]]
    kept = {k: v for k, v in results["environment"].items() if isinstance(v, (str, int, float)) or v is None}
    writer = csv.DictWriter(text, [*plain[0], *kept], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**cell, **kept} for cell in plain)
    return text.getvalue()


def shown(results: dict[str, Any]) -> bool:
    """Whether dense finds enough needles for the others' to mean anything."""
    return results["cells"][0]["needles"] >= results["identity"]["settings"]["gate"]


def picture(results: dict[str, Any]) -> bytes:
    """Needles found (where dense finds them) and bits per byte lost, against the share of bytes held; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    fields = (("needles", "needles found"), ("bits_per_byte_lost", "bits per byte lost"))
    panels = [f for f in fields if f[0] != "needles" or shown(results)]
    cells = results["cells"][1:]
    for place, (field, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for name in dict.fromkeys(c["policy"] for c in cells):
            mine = sorted((c["keys_read_per_token"], c[field]) for c in cells if c["policy"] == name)
            style = "--" if name in ("random", "oracle") else "-"
            axes.plot(*zip(*mine, strict=True), style, marker="o", label=name)
        if field == "needles":
            axes.axhline(results["cells"][0]["needles"], color="#7d848a", linewidth=1)
            axes.set_ylim(-0.03, 1.05)
        else:
            axes.axhline(0, color="#7d848a", linewidth=1)
        axes.set_xlabel("keys read per token and layer")
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
