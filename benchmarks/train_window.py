"""Train one small language model with window attention twice: on the native engine, and on SDPA with a boolean mask.

    .venv/bin/python benchmarks/train_window.py                      # 60 steps at context 8192
    .venv/bin/python benchmarks/train_window.py --resume             # goes on after a kill

The model is `reader` (2.4 M parameters, byte level) on its training text, with `Causal() & (SlidingWindow(512) |
Sinks(4))` in every layer. Runs with the same seed start from the same weights and see the same bytes in the same order;
only the attention call differs. The runs take turns, step by step, so that a machine whose speed drifts slows both.

Two more seeds on the native engine say how much a loss curve varies by chance. The two engines' curves count as the
same when the largest difference of their smoothed losses, over all steps, is below both of

* the spread between seeds: the smallest over the same steps of the standard deviation of the native seeds' smoothed
  losses, averaged over a window of steps;
* the step-to-step noise: the standard deviation of the first run's losses around its smoothed curve, second half.

Losses are bits per byte; smoothed means the running mean over `--smooth` steps. Results: a CSV with one row per step
and run, environment columns included, and a PNG.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import foveate as fv
from foveate.bench.machine import environment
from foveate.bench.results import write_atomic
from foveate.organisms.reader import data
from foveate.organisms.reader.model import Attention, Reader, ReaderConfig, rotate
from foveate.patterns import Causal, Sinks, SlidingWindow

HERE = Path(__file__).parent
ENGINES = ("native", "sdpa_mask", "reference")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What makes two runs comparable; a resumed run must have the same."""

    engine: str = "native"  # against sdpa_mask
    steps: int = 60
    context: int = 8192
    window: int = 512
    sinks: int = 4
    seeds: int = 3
    lr: float = 1.5e-3
    warmup: int = 10
    layers: int = 4
    dim: int = 256
    threads: int = 0


def attend_with(engine: str, s: Settings) -> Attend:
    """Window attention on one engine: q (B, H, N, D), k and v (B, Hkv, N, D) -> (B, H, N, D)."""
    pattern = Causal() & (SlidingWindow(s.window) | Sinks(s.sinks))
    if engine != "sdpa_mask":
        return lambda q, k, v: fv.attention(q, k, v, pattern, engine=engine)
    mask = pattern.layout(s.context).to_dense()[0, 0]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class WindowAttention(Attention):
    """The organism's attention with another call in its middle."""

    def __init__(self, cfg: ReaderConfig, attend: Attend) -> None:
        super().__init__(cfg)
        self.attend = attend

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, _ = x.shape
        d = self.cfg.head_dim
        q = self.q_proj(x).view(b, n, -1, d).transpose(1, 2)  # (B, H, N, D)
        k = self.k_proj(x).view(b, n, -1, d).transpose(1, 2)  # (B, Hkv, N, D)
        v = self.v_proj(x).view(b, n, -1, d).transpose(1, 2)
        out = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))


class Run:
    """One training run: model, optimiser, losses in bits per byte and seconds per step so far."""

    def __init__(self, engine: str, seed: int, s: Settings, text: bytes) -> None:
        self.engine, self.seed, self.settings, self.text = engine, seed, s, text
        torch.manual_seed(seed)
        cfg = ReaderConfig(context=s.context, layers=s.layers, dim=s.dim, ffn=2 * s.dim)
        self.model = Reader(cfg)
        attend = attend_with(engine, s)
        for layer in self.model.model.layers:
            mine = WindowAttention(cfg, attend)
            mine.load_state_dict(layer.self_attn.state_dict())
            layer.self_attn = mine
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=0.05
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    @property
    def name(self) -> str:
        return f"{self.engine}-seed{self.seed}"

    def step(self) -> None:
        """One optimiser step on the bytes that (seed, step) name."""
        s, number = self.settings, len(self.losses)
        rng = np.random.default_rng([self.seed, number])
        ids = torch.from_numpy(data.text_sequence(s.context + 1, rng, self.text)[0])[None]
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (number + 1) / s.warmup)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(ids[:, :-1])  # (1, N, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item() / math.log(2))

    def save(self, folder: Path) -> None:
        """Weights, optimiser state, losses and times, into an existing folder."""
        save_file(
            {k: v.contiguous() for k, v in self.model.state_dict().items()},
            folder / f"{self.name}.safetensors",
        )
        moments = {
            f"{i}.{key}": value.contiguous()
            for i, p in enumerate(self.model.parameters())
            for key, value in self.optimizer.state[p].items()
        }
        save_file(moments, folder / f"{self.name}.optimizer.safetensors")
        figures = {"losses": self.losses, "seconds": self.seconds}
        (folder / f"{self.name}.json").write_text(json.dumps(figures), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """What `save` wrote."""
        self.model.load_state_dict(load_file(folder / f"{self.name}.safetensors"))
        parameters = list(self.model.parameters())
        for key, value in load_file(folder / f"{self.name}.optimizer.safetensors").items():
            i, name = key.split(".", 1)
            self.optimizer.state[parameters[int(i)]][name] = value
        figures = json.loads((folder / f"{self.name}.json").read_text(encoding="utf-8"))
        self.losses, self.seconds = figures["losses"], figures["seconds"]


def runs_of(s: Settings, text: bytes) -> list[Run]:
    """The two that are compared, then the other seeds of the first engine."""
    pair = [Run(s.engine, 0, s, text), Run("sdpa_mask", 0, s, text)]
    return pair + [Run(s.engine, seed, s, text) for seed in range(1, s.seeds)]


# ------------------------------------------------------------------------------------- checkpoints
def save(runs: list[Run], s: Settings, work: Path) -> None:
    """checkpoint-<step>/ written aside and renamed; `last.json` then points at it, and older ones go."""
    name = f"checkpoint-{len(runs[0].losses):05d}"
    aside = work / f"{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for run in runs:
        run.save(aside)
    shutil.rmtree(work / name, ignore_errors=True)
    os.replace(aside, work / name)
    write_atomic(work / "last.json", json.dumps({"checkpoint": name, "settings": asdict(s)}))
    for old in work.glob("checkpoint-*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)


def load(runs: list[Run], s: Settings, work: Path) -> None:
    """Continue from the last whole checkpoint. More steps than before are allowed; other settings are not.

    Raises:
        ValueError: made under other settings.
    """
    last = json.loads((work / "last.json").read_text(encoding="utf-8"))
    mine = asdict(s)
    changed = [
        f"{key} was {last['settings'].get(key)!r}, now {value!r}"
        for key, value in mine.items()
        if key != "steps" and last["settings"].get(key) != value
    ]
    if changed:
        raise ValueError(f"--resume: {work} was made under other settings ({'; '.join(changed)})")
    for run in runs:
        run.load(work / last["checkpoint"])


# ----------------------------------------------------------------------------------------- verdict
def smoothed(losses: list[float], width: int) -> np.ndarray:
    """Running mean over `width` steps: (len - width + 1,).

    >>> smoothed([1.0, 2.0, 3.0], 2).tolist()
    [1.5, 2.5]
    """
    return np.convolve(losses, np.full(width, 1 / width), mode="valid")


def verdict(runs: list[Run], width: int) -> dict[str, float | bool]:
    """Speed of the first run over the second, and whether their loss curves are the same within noise.

    Keys: step_ms (first), peer_step_ms, speedup (median of the steps' ratios, the first two steps left out),
    difference, seed_spread, step_noise (bits per byte), same.
    """
    first, peer, *others = runs
    skip = min(2, len(first.seconds) - 1)
    mine, theirs = np.array(first.seconds[skip:]), np.array(peer.seconds[skip:])
    curves = [smoothed(run.losses, width) for run in (first, *others)]
    difference = float(np.abs(curves[0] - smoothed(peer.losses, width)).max())
    spread = np.std(curves, axis=0, ddof=1)
    seed_spread = float(smoothed(spread.tolist(), min(width, len(spread))).min())
    half = len(curves[0]) // 2
    around = np.array(first.losses[width - 1 :]) - curves[0]
    step_noise = float(np.std(around[half:]))
    return {
        "step_ms": 1e3 * statistics.median(mine.tolist()),
        "peer_step_ms": 1e3 * statistics.median(theirs.tolist()),
        "speedup": float(np.median(theirs / mine)),
        "difference": difference,
        "seed_spread": seed_spread,
        "step_noise": step_noise,
        "same": difference < min(seed_spread, step_noise),
    }


# ----------------------------------------------------------------------------------------- results
def write_csv(runs: list[Run], s: Settings, where: dict, path: Path) -> None:
    """One row per step and run."""
    where = {key: " ".join(value) if isinstance(value, list) else value for key, value in where.items()}
    for unused in ("transformers", "numpy"):
        where.pop(unused, None)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    given = {"context": s.context, "window": s.window, "sinks": s.sinks, "layers": s.layers, "dim": s.dim}
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    given["param_count"] = parameters
    writer.writerow(["engine", "seed", "step", "loss_bits_per_byte", "train_step_time", *given, *where])
    for run in runs:
        for number, (loss, seconds) in enumerate(zip(run.losses, run.seconds, strict=True)):
            row = [run.engine, run.seed, number, f"{loss:.6f}", f"{1e3 * seconds:.6g}"]
            writer.writerow([*row, *given.values(), *where.values()])
    write_atomic(path, out.getvalue())


def draw(
    runs: list[Run], s: Settings, found: dict[str, float | bool], where: dict, width: int, path: Path
) -> None:
    """Loss against step and against time, and milliseconds per step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first, peer, *others = runs
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for at, axis in enumerate(axes):
        for run, colour, label in (
            *((run, "#bcd0e5", "other seeds" if i == 0 else None) for i, run in enumerate(others)),
            (peer, "#b5467f", "SDPA with the mask"),
            (first, "#1f5fa8", first.engine),
        ):
            if at == 1 and colour == "#bcd0e5":
                continue
            curve = smoothed(run.losses, width)
            steps = np.arange(width - 1, len(run.losses)) + 1
            x = steps if at == 0 else np.cumsum(run.seconds)[width - 1 :]
            style = (0, (5, 2)) if run is first and at == 0 else "-"
            axis.plot(x, curve, color=colour, lw=1.8, ls=style, label=label)
        axis.set_xlabel("step" if at == 0 else "seconds of training")
        axis.set_ylabel(f"bits per byte (mean of {width} steps)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
        axis.legend(frameon=False, fontsize=9)
    same = "the same within noise" if found["same"] else "NOT the same within noise"
    axes[0].set_title(
        f"loss curves {same}: largest difference {found['difference']:.1e},\n"
        f"spread of seeds {found['seed_spread']:.1e}, step noise {found['step_noise']:.1e}",
        fontsize=9.5, loc="left",
    )  # fmt: skip
    axes[1].set_title(
        f"{found['step_ms']:.0f} ms a step, SDPA {found['peer_step_ms']:.0f} ms: {found['speedup']:.2f} times as fast",
        fontsize=9.5, loc="left",
    )  # fmt: skip
    figure.suptitle(
        f"context {s.context}, causal window {s.window} and {s.sinks} sinks, {where['cpu']}, {where['threads']} "
        f"threads, torch {where['torch']}, {where['date'][:10]}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=140)
    plt.close(figure)
    os.replace(temporary, path)


def machine_name(where: dict) -> str:
    name = re.sub(r"\((r|tm|c)\)", " ", where["cpu"].lower())
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") + f"-t{where['threads']}"


def train(runs: list[Run], s: Settings, work: Path, every: int) -> None:
    """Step all runs in turn up to `s.steps`, saving every `every` steps and at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=s.steps, completed=len(runs[0].losses))
        while len(runs[0].losses) < s.steps:
            for run in runs:
                bar.update(task, description=run.name)
                run.step()
            done = len(runs[0].losses)
            first, peer = runs[:2]
            bar.update(task, completed=done)
            if done % 5 == 0 or done == s.steps:
                console.print(
                    f"step {done}: {first.engine} {first.losses[-1]:.4f} bits, {first.seconds[-1]:.2f} s; "
                    f"sdpa_mask {peer.losses[-1]:.4f} bits, {peer.seconds[-1]:.2f} s",
                    highlight=False,
                )
            if done % every == 0 or done == s.steps:
                save(runs, s, work)


def main(argv: list[str] | None = None) -> int:
    d = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=d.steps, help="default %(default)s")
    parser.add_argument("--context", type=int, default=d.context, help="default %(default)s")
    parser.add_argument("--window", type=int, default=d.window, help="default %(default)s")
    parser.add_argument("--sinks", type=int, default=d.sinks, help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=d.seeds, help="of the first engine, default %(default)s")
    parser.add_argument("--layers", type=int, default=d.layers, help="default %(default)s")
    parser.add_argument("--dim", type=int, default=d.dim, help="default %(default)s")
    parser.add_argument(
        "--engine", choices=ENGINES, default=d.engine, help="against sdpa_mask; default native"
    )
    parser.add_argument(
        "--smooth", type=int, default=10, help="steps of the running mean, default %(default)s"
    )
    parser.add_argument(
        "--checkpoint", type=int, default=10, help="steps between checkpoints, default %(default)s"
    )
    parser.add_argument("--threads", type=int, default=d.threads, help="0: torch's default")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/train_window"), help="checkpoints, %(default)s"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="CSV and PNG")
    a = parser.parse_args(argv)
    for name, least in (
        ("steps", 4), ("context", 16), ("window", 1), ("sinks", 0), ("seeds", 2), ("layers", 1), ("dim", 8),
        ("smooth", 1), ("checkpoint", 1), ("threads", 0),
    ):  # fmt: skip
        if getattr(a, name) < least:
            parser.error(f"--{name} {getattr(a, name)}: accepted whole numbers of at least {least}")
    if a.smooth * 2 > a.steps:
        parser.error(f"--smooth {a.smooth}: accepted at most half of --steps {a.steps}")
    exists = (a.work / "last.json").is_file()
    if exists != a.resume:
        what = "holds a run: add --resume, or name another --work" if exists else "holds no checkpoint"
        parser.error(f"--work {a.work}: {what}")
    if a.threads:
        torch.set_num_threads(a.threads)
    s = Settings(
        engine=a.engine, steps=a.steps, context=a.context, window=a.window, sinks=a.sinks, seeds=a.seeds,
        layers=a.layers, dim=a.dim, threads=a.threads,
    )  # fmt: skip
    runs = runs_of(s, data.stdlib_text())
    if a.resume:
        try:
            load(runs, s, a.work)
        except ValueError as error:
            parser.error(str(error))
    try:
        train(runs, s, a.work, a.checkpoint)
    except KeyboardInterrupt:
        print(f"stopped; continue with --resume from the last checkpoint in {a.work}", file=sys.stderr)
        return 130
    found = verdict(runs, a.smooth)
    where = environment()
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / f"train_window-{machine_name(where)}.csv"
    write_csv(runs, s, where, path)
    draw(runs, s, found, where, a.smooth, path.with_suffix(".png"))
    for key, value in found.items():
        print(f"{key:<14} {value if isinstance(value, bool) else f'{value:.6g}'}")
    print(f"written: {path}, {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
