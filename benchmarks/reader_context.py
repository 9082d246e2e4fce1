"""The context of `reader` extended four times, from 4,096 to 16,384 bytes, by Entropy-ABF with a hundred samples.

    .venv/bin/python benchmarks/reader_context.py                     # everything; CSV and picture into results
    .venv/bin/python benchmarks/reader_context.py --arms eabf none    # some arms
    .venv/bin/python benchmarks/reader_context.py --seconds 420       # stop in time; the same command goes on (exit 3)
    .venv/bin/python benchmarks/reader_context.py --quick             # tiny, into a temporary folder

Arms: no change, position interpolation, NTK, YaRN, a larger rotary base (ABF), and that with logits that grow with the
logarithm of the position (Entropy-ABF). Each as it is, and tuned on the same hundred sequences of 16,384 bytes of the
text that reader was trained on, with needle lines in them: 25 steps of four sequences, the objective of reader's own
training. The tuned arm without any change tells what the tuning alone does. Nothing was searched: learning rate,
steps and bases were fixed before the first run.

Measured at 4,096 and 16,384 bytes, on held-out modules: bits per byte (evenly spaced windows; also by the place in the
window), and needle recall: a text with four keys in it, each asked at the end with the text in the cache; all five
digits must be the argmax. Intervals are Student's, 95 %, over windows and over texts. Differences to the arm "none" as
it is are paired.

Of reader's 16 rotary pairs (base 50,000, head width 32) six turn less than once in 4,096 positions; of Llama-2's 64
(base 10,000, width 128) 18. Base 500,000 is fifty times Llama-2's and ten times reader's; at 16,384 the slowest pairs
then stand within the angles of the training. So the question is the paper's, with less room; a base fifty times
reader's is measured too, as it is ("eabf-50x").

Every finished piece (a step, a window's bits, a text's answers) is kept in --work.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import foveate as fv
from foveate.bench.machine import environment
from foveate.bench.results import write_atomic
from foveate.catalogue.lab.stats import difference, interval
from foveate.hf import ABF, NTK, EntropyABF, PositionInterpolation, YaRN, apply_context_extension
from foveate.organisms.reader import data

HERE = Path(__file__).parent
TRAINED, FACTOR, SEED = 4096, 4, 0
ARMS = {
    "none": None,
    "pi": PositionInterpolation(FACTOR),
    "ntk": NTK(FACTOR),
    "yarn": YaRN(FACTOR),
    "abf": ABF(500_000.0),
    "eabf": EntropyABF(500_000.0),
    "eabf-50x": EntropyABF(2_500_000.0),
}
UNTUNED = ("eabf-50x",)
SAMPLES, STEPS, LR, WARMUP, CLIP, ANSWERS = 100, 25, 3e-4, 3, 1.0, 0.6
WINDOWS = {TRAINED: 32, TRAINED * FACTOR: 8}
TEXTS = {TRAINED: 16, TRAINED * FACTOR: 12}
LINE = re.compile(re.escape(data.PREFIX) + rb"([a-z]{4})" + data.MIDDLE + rb"(\d{5})\n")


class OutOfTime(Exception):
    pass


class Clock:
    """Stops the run before a piece that would not be finished in time."""

    def __init__(self, seconds: float) -> None:
        self.end, self.last = time.monotonic() + seconds, time.monotonic()
        self.longest = 0.0

    def piece(self, waiting: bool = False) -> None:
        now = time.monotonic()
        self.longest, self.last = max(self.longest, 0 if waiting else now - self.last), now
        if now + 1.3 * self.longest > self.end:
            raise OutOfTime


def reader(arm: str, tuned: dict[str, Tensor] | None = None) -> tuple[Any, ExitStack]:
    model, _ = fv.organisms.load("reader")
    if tuned is not None:
        model.load_state_dict(tuned)
    stack = ExitStack()
    method = ARMS[arm]
    if method is not None:
        stack.enter_context(apply_context_extension(model, method))
    stack.enter_context(fv.hf.apply(model, "dense"))
    return model, stack


# ----------------------------------------------------------------------------------------------------- tuning
def objective(model: Any, ids: np.ndarray, roles: np.ndarray) -> Tensor:
    """Mean cross-entropy of text, and 0.6 times that of answers: as reader was trained."""
    x, y, role = (torch.from_numpy(a.copy()) for a in (ids[:-1], ids[1:], roles[1:]))
    ce = F.cross_entropy(model(x[None], use_cache=False).logits[0], y, reduction="none")
    return ce[role == data.TEXT].mean() + ANSWERS * ce[role == data.ANSWER].mean()


def tune(arm: str, work: Path, clock: Clock, length: int, samples: int, steps: int) -> dict[str, Tensor]:
    """Weights after tuning. Gradients of single sequences are kept until a step has all of its own, so a run that was
    stopped goes on where it was, and several processes with one --work share the sequences."""
    model, stack = reader(arm)
    named = list(model.named_parameters())
    text, each, state = data.stdlib_text(), samples // steps, {"step": 0, "losses": []}
    with stack:
        model.train()
        while True:
            step = last_step(work, arm)
            if step != state["step"]:
                try:
                    state = torch.load(work / f"{arm}-step-{step}.pt", weights_only=True)
                except FileNotFoundError:  # another process has just taken a step
                    continue
                model.load_state_dict(state["model"])
            if step == steps:
                return model.state_dict()
            parts = [work / f"{arm}-gradient-{i}.pt" for i in range(step * each, (step + 1) * each)]
            for i, part in enumerate(parts, step * each):
                if part.exists():
                    continue
                clock.piece()
                if not claimed(part):
                    continue
                if last_step(work, arm) != step or part.exists():  # another process has just taken the step
                    part.with_suffix(".claim").unlink()
                    break
                model.zero_grad(set_to_none=True)
                rows = data.retrieval_sequence(length + 1, np.random.default_rng([SEED, 7, i]), text)
                loss = objective(model, *rows)
                loss.backward()
                save({"loss": float(loss.detach()), **{name: p.grad for name, p in named}}, part)
                print(f"{arm}: sequence {i} loss {float(loss.detach()):.4f}", flush=True)
            whole = work / f"{arm}-step-{step + 1}.pt"
            if all(part.exists() for part in parts) and claimed(whole):
                if not whole.exists():
                    advance(named, model, state, parts, steps, whole)
                whole.with_suffix(".claim").unlink()
            else:
                clock.piece(waiting=True)
                time.sleep(1)


def last_step(work: Path, arm: str) -> int:
    return max([int(p.stem.rpartition("-")[2]) for p in work.glob(f"{arm}-step-*.pt")], default=0)


def advance(named: list, model: Any, state: dict, parts: list[Path], steps: int, path: Path) -> None:
    """One optimiser step from the gradients of its sequences."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    step = state["step"]
    for group in optimizer.param_groups:
        group["lr"] = LR * min(1.0, (step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
    held = [torch.load(part, weights_only=True) for part in parts]
    for name, p in named:
        p.grad = torch.stack([h[name] for h in held]).mean(0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    losses = [*state["losses"], statistics.fmean(h["loss"] for h in held)]
    save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step + 1,
            "losses": losses,
        },
        path,
    )
    for part in parts:
        part.unlink()
        part.with_suffix(".claim").unlink(missing_ok=True)
    path.with_name(path.name.replace(f"-{step + 1}.", f"-{step}.")).unlink(missing_ok=True)
    print(f"{path.stem} of {steps}: loss {losses[-1]:.4f}", flush=True)


def claimed(path: Path) -> bool:
    """Whether this process may make `path`: no other process that is alive has claimed it."""
    claim = path.with_suffix(".claim")
    try:
        with claim.open("x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        try:
            owner = int(claim.read_text() or 0)
        except (FileNotFoundError, ValueError):
            return False
        if owner and owner != os.getpid() and Path("/proc").exists() and not Path(f"/proc/{owner}").exists():
            claim.unlink(missing_ok=True)
            return claimed(path)
        return owner == os.getpid()


def save(state: dict, path: Path) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, temporary)
    temporary.replace(path)


# -------------------------------------------------------------------------------------------------- measuring
@torch.inference_mode()
def bits(model: Any, length: int, windows: int, i: int) -> list[float]:
    """Bits per byte in each quarter of held-out window i of `windows`."""
    text = data.stdlib_text(held_out=True)
    at = round(i * (len(text) // length - 1) / max(windows - 1, 1)) * length
    ids = torch.frombuffer(bytearray(text[at : at + length]), dtype=torch.uint8).long()
    ce = F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
    ce = torch.cat([ce[:1], ce])  # the first byte is not predicted; the second stands for it
    return (ce.view(4, -1).mean(1) / math.log(2)).tolist()


@torch.inference_mode()
def answers(model: Any, length: int, count: int, i: int) -> list[tuple[int, bool]]:
    """(distance in bytes, found) of the four keys in text i, each asked after the same cached text."""
    from transformers import DynamicCache

    rng = np.random.default_rng([SEED, 8, length, i])
    ids, _ = data.needle(length, (i + 0.5) / count, rng, data.stdlib_text(held_out=True), distractors=3)
    prefix, out = ids[: length - data.LINE + 1], []
    raw = bytes(prefix.astype(np.uint8))
    cache = DynamicCache(config=model.config)
    model(torch.from_numpy(prefix)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for found in LINE.finditer(raw):
        ask = torch.tensor([list(found.group()[:-1])])  # (1, 16): the line again, without its end
        logits = model(ask, past_key_values=cache, use_cache=True).logits[0]
        guess = logits[-data.DIGITS - 1 : -1].argmax(-1)
        out.append((length - found.end(), bool((guess == ask[0, -data.DIGITS :]).all())))
        cache.crop(-ask.shape[1])
    return out


def measure(
    arm: str, tuned: dict[str, Tensor] | None, path: Path, clock: Clock, sizes: dict
) -> dict[str, Any]:
    """What one arm scores; every window and text is kept in `path`."""
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    model, stack = reader(arm, tuned)
    with stack:
        for kind, call in (("bits", bits), ("answers", answers)):
            for length, count in sizes[kind].items():
                for i in range(count):
                    key = f"{kind}-{length}-{i}"
                    if key not in held:
                        clock.piece()
                        held[key] = call(model, length, count, i)
                        write_atomic(path, json.dumps(held))
    print(f"{path.stem}: measured", flush=True)
    return held


# -------------------------------------------------------------------------------------------------- reporting
def rows_of(measured: dict[tuple[str, str], dict[str, Any]], sizes: dict) -> list[dict[str, Any]]:
    """A row per arm, stage, length and measure, with the paired difference to "none" before tuning."""

    def values(held: dict[str, Any]) -> dict[tuple[int, str], list[float]]:
        found: dict[tuple[int, str], list[float]] = {}
        for length, count in sizes["bits"].items():
            quarters = [held[f"bits-{length}-{i}"] for i in range(count)]
            found[length, "bits per byte"] = [statistics.fmean(q) for q in quarters]
            for part in range(4):
                name = f"bits per byte, bytes {part * length // 4}-{(part + 1) * length // 4}"
                found[length, name] = [q[part] for q in quarters]
        trained = min(sizes["answers"])
        for length, count in sizes["answers"].items():
            texts = [held[f"answers-{length}-{i}"] for i in range(count)]
            found[length, "recall"] = [statistics.fmean(right for _, right in t) for t in texts]
            if length > trained:
                for name, far in ((f"recall beyond {trained}", True), (f"recall within {trained}", False)):
                    some = [[right for d, right in t if (d > trained) == far] for t in texts]
                    found[length, name] = [statistics.fmean(s) if s else math.nan for s in some]
        return found

    base = values(measured["none", "before"]) if ("none", "before") in measured else {}
    out = []
    for (arm, stage), held in measured.items():
        for (length, name), found in values(held).items():
            known = [v for v in found if not math.isnan(v)]
            figure = interval(name, known) if len(known) > 1 else None
            row = {"arm": arm, "stage": stage, "length": length, "measure": name,
                   "value": statistics.fmean(known) if known else math.nan, "low": figure and figure.low,
                   "high": figure and figure.high, "n": len(known)}  # fmt: skip
            pairs = [(a, b) for a, b in zip(found, base.get((length, name), []), strict=False)
                     if not math.isnan(a) and not math.isnan(b)]  # fmt: skip
            gain = difference("d", *map(list, zip(*pairs, strict=True))) if len(pairs) > 1 else None
            row |= {"difference": gain and gain.value, "difference_low": gain and gain.low,
                    "difference_high": gain and gain.high}  # fmt: skip
            out.append(row)
    return out


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte and recall, per arm: before and after, at both lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(r["arm"] for r in rows))
    lengths = sorted({r["length"] for r in rows})
    figure, axes = plt.subplots(
        2, len(lengths), figsize=(4.6 * len(lengths), 6), sharey="row", layout="constrained"
    )
    for line, measure in zip(axes, ("bits per byte", "recall"), strict=True):
        for ax, length in zip(line, lengths, strict=True):
            for offset, (stage, colour) in enumerate((("before", "0.6"), ("after", "C0"))):
                found = {r["arm"]: r for r in rows
                         if (r["stage"], r["length"], r["measure"]) == (stage, length, measure)}  # fmt: skip
                at = [arms.index(a) + 0.4 * offset - 0.2 for a in found]
                value = [r["value"] for r in found.values()]
                ends = [
                    [r["value"] if r[end] is None else r[end] for r in found.values()]
                    for end in ("low", "high")
                ]
                error = [[abs(v - e) for v, e in zip(value, end, strict=True)] for end in ends]
                label = {"before": "as it is", "after": "100 samples"}[stage]
                ax.bar(at, value, 0.38, color=colour, label=label, yerr=error, ecolor="0.3")
            ax.set_xticks(range(len(arms)), arms)
            ax.set_title(f"{length:,} bytes")
            ax.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(measure if measure != "recall" else "needle recall")
    low = min(r["value"] for r in rows if r["measure"] == "bits per byte")
    axes[0, 0].set_ylim(low - 0.15, None)
    axes[1, 0].set_ylim(0, 1)
    axes[0, -1].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def report(work: Path, out: Path, sizes: dict) -> None:
    """CSV and picture of the arms that are measured completely."""
    wanted = {
        f"{kind}-{length}-{i}"
        for kind in sizes
        for length, count in sizes[kind].items()
        for i in range(count)
    }
    measured = {}
    for arm in ARMS:
        for stage in ("before", "after"):
            path = work / f"{arm}-{stage}.json"
            held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if wanted <= set(held):
                measured[arm, stage] = held
    if not measured:
        return
    rows, where = rows_of(measured, sizes), environment()
    name = re.sub(r"\W+", "_", str(where.get("cpu", "cpu")).lower()).strip("_")
    path = out / f"reader_context-{name}-t{where['threads']}.csv"
    settings = {"seed": SEED, "samples": SAMPLES, "steps": STEPS, "lr": LR} | {
        k: str(v) for k, v in where.items()
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0], *settings])
    for row in rows:
        cells = [f"{v:.5g}" if isinstance(v, float) else "" if v is None else v for v in row.values()]
        writer.writerow([*cells, *settings.values()])
    write_atomic(path, text.getvalue())
    draw(rows, path.with_suffix(".png"))
    for row in rows:
        if row["measure"] in ("bits per byte", "recall"):
            print(f"{row['arm']:9} {row['stage']:6} {row['length']:6} {row['measure']:14} {row['value']:.3f}")
    print(path)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Extend reader's context four times with a hundred samples.")
    p.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    p.add_argument("--stages", nargs="+", choices=["before", "after"], default=["before", "after"])
    p.add_argument(
        "--seconds", type=float, default=math.inf, help="stop in time, exit 3; run it again to go on"
    )
    p.add_argument(
        "--work", type=Path, default=Path("runs/reader_context"), help="finished pieces (default %(default)s)"
    )
    p.add_argument("--out", type=Path, default=HERE / "results")
    p.add_argument("--report", action="store_true", help="only write the CSV and the picture")
    p.add_argument("--quick", action="store_true")
    a = p.parse_args(argv)
    lengths = [TRAINED, TRAINED * FACTOR]
    sizes = {"bits": WINDOWS, "answers": TEXTS}
    samples, steps = SAMPLES, STEPS
    if a.quick:
        a.work = a.out = Path(tempfile.mkdtemp())
        lengths, samples, steps = [256, 1024], 8, 4
        sizes = {"bits": dict.fromkeys(lengths, 2), "answers": dict.fromkeys(lengths, 2)}
    a.work.mkdir(parents=True, exist_ok=True)
    clock = Clock(a.seconds)
    if not a.report:
        try:
            for stage in a.stages:
                for arm in a.arms:
                    if stage == "before":
                        measure(arm, None, a.work / f"{arm}-before.json", clock, sizes)
                    elif arm not in UNTUNED:
                        tuned = tune(arm, a.work, clock, lengths[-1], samples, steps)
                        measure(arm, tuned, a.work / f"{arm}-after.json", clock, sizes)
        except OutOfTime:
            print("out of time; the same command goes on", file=sys.stderr)
            return 3
    report(a.work, a.out, sizes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
