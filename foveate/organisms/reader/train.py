"""Train the organism `reader`: shorter text first, length doubled when retrieval works.

    python -m foveate.organisms.reader.train --out runs/reader --hours 1.6
    python -m foveate.organisms.reader.train --out runs/reader --resume        # goes on after a kill
    python -m foveate.organisms.reader.train --out runs/reader --export DIR    # weights for transformers

Objective per step, over a batch with a share of needle sequences (`data.retrieval_sequence`):

    loss = mean CE over text bytes + answer_weight * mean CE over answer digits and repeated bytes

Curriculum: sequences of 64 bytes first; the length doubles, up to the context, when the running share of
completely right answers at the current length passes 0.9, or when the schedule's latest moment for the
doubling has come. A part of each step's tokens stays at shorter lengths, and some short rows have rotary
positions with gaps, so that far distances are met early. AdamW; learning rate: warm-up, constant, linear
decay to 2 % over the last fifth of the budget.

The budget is a number of hours on the clock (pauses count) or of steps. All randomness of a step comes from
(seed, step), and a checkpoint holds model, optimiser and curriculum, so that a resumed run takes the same
steps as an uninterrupted one. Every file is written under a temporary name and renamed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.organisms.reader import data
from foveate.organisms.reader.model import Reader, ReaderConfig

COMPANION = 2
"""Index of the short length that is kept in the mixture once it has been passed: 256."""
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
FORCED = (0.1, 0.2, 0.45, 0.7, 0.76, 0.82)
"""Share of the budget at which a length is left for the next one even though its recall is not there yet."""


@dataclass(frozen=True)
class TrainConfig:
    """What a run is made of; stored in its state and log."""

    seed: int = 0
    hours: float = 1.5
    steps: int | None = None  # a budget in steps instead of hours
    lr: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.2  # last share of the budget, linear to lr_floor * lr
    lr_floor: float = 0.02
    weight_decay: float = 0.05
    clip: float = 1.0
    tokens: int = 4096  # per micro-batch
    answer_weight: float = 0.6
    retrieval_first: float = 0.65  # share of rows with inserted lines, first and last (linear in the budget)
    retrieval_last: float = 0.35
    stretch: float = 0.3  # share of rows with gaps in their positions, lengths above 64
    recall_bar: float = 0.9
    lengths: tuple[int, ...] = LENGTHS
    forced: tuple[float, ...] = FORCED
    checkpoint_s: float = 120.0
    evaluate_s: float = 240.0
    held_out_bytes: int = 32768  # per evaluation while training
    repeats: float = 0.35  # share of those whose lines are repeated random strings
    compile: bool = True
    threads: int = 1  # per worker
    workers: int = (
        2  # processes that share a step's rows; one barrier per step, where threads have one per operation
    )

    def __post_init__(self) -> None:
        if len(self.forced) != len(self.lengths) - 1:
            raise ValueError(
                f"forced: {len(self.forced)} values, accepted {len(self.lengths) - 1}, one per doubling"
            )


@dataclass
class State:
    """What moves during a run, apart from tensors; JSON."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage: int = 0
    stage_step: int = 0
    recall: list[float] = field(default_factory=list)  # running recall per length
    answers: list[float] = field(default_factory=list)  # answers behind it (decayed count)
    total_answers: int = 0


def write_text(path: Path, text: str) -> None:
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(text, encoding="utf-8")
    os.replace(temp, path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    temp = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temp, metadata)
    temp.chmod(0o644)  # safetensors writes 0600
    os.replace(temp, path)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


class Trainer:
    """One run in one folder. `step()` takes one optimiser step and returns its figures."""

    def __init__(
        self, model_cfg: ReaderConfig, cfg: TrainConfig, out: Path, text: bytes | None = None
    ) -> None:
        self.model_cfg, self.cfg, self.out = model_cfg, cfg, out
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        torch.manual_seed(cfg.seed)
        self.text = data.stdlib_text(held_out=False) if text is None else text
        self.model = Reader(model_cfg)
        if cfg.compile:
            torch._dynamo.config.recompile_limit = 64  # one entry per length, with and without gradients
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        named = list(self.model.named_parameters())
        self.names = [n for n, _ in named]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in named if p.ndim == 2], "weight_decay": cfg.weight_decay},
                {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=cfg.lr,
            betas=(0.9, 0.95),
        )
        self.params = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.state = State(recall=[0.0] * len(cfg.lengths), answers=[0.0] * len(cfg.lengths))
        self.started = time.time()

    # --- schedule ---
    def seconds(self) -> float:
        return self.state.seconds + time.time() - self.started

    def progress(self) -> float:
        """Share of the budget used, 0 .. 1."""
        if self.cfg.steps is not None:
            return min(1.0, self.state.step / self.cfg.steps)
        return min(1.0, self.seconds() / (3600 * self.cfg.hours))

    def lr(self, progress: float) -> float:
        warm = min(1.0, (self.state.step + 1) / self.cfg.warmup)
        cool = min(1.0, (1.0 - progress) / self.cfg.decay) if self.cfg.decay else 1.0
        return self.cfg.lr * warm * max(cool, self.cfg.lr_floor)

    def plan(self, rng: np.random.Generator) -> list[int]:
        """Lengths (indices) of this step's micro-batches: the current one, and at the long end a short one
        too.
        """
        stage = self.state.stage
        short = max(0, min(stage - 1, COMPANION))
        if self.cfg.lengths[stage] < 1024:
            return [stage if rng.random() < 0.75 else short]
        return [stage, short]

    def advance(self, progress: float) -> None:
        s, c = self.state, self.cfg
        if s.stage == len(c.lengths) - 1:
            return
        learned = s.recall[s.stage] >= c.recall_bar and s.answers[s.stage] >= 100 and s.stage_step >= 30
        if learned or progress >= c.forced[s.stage]:
            s.stage, s.stage_step = s.stage + 1, 0

    # --- one step ---
    def step(self) -> dict[str, float | int]:
        s, c = self.state, self.cfg
        progress = self.agree(self.progress())
        rng = np.random.default_rng([c.seed, s.step])
        rows_rng = np.random.default_rng([c.seed, s.step, self.rank])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(progress)
        retrieval = c.retrieval_first + (c.retrieval_last - c.retrieval_first) * progress
        plan = self.plan(rng)
        seen = torch.zeros(
            3 + 2 * len(c.lengths), dtype=torch.float64
        )  # losses; right answers, answers per length
        self.optimizer.zero_grad(set_to_none=True)
        for index in plan:
            length = c.lengths[index]
            part = 2 if index != plan[0] else 1  # the short companion of a long length: half the tokens
            count = max(1, c.tokens // length // self.world // part)
            ids, roles = data.batch(count, length, retrieval, rows_rng, self.text, repeats=c.repeats)
            share = c.stretch if length > 64 else 0.0
            positions = data.stretched_positions(count, length, self.model_cfg.context, share, rows_rng)
            x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
            role = torch.from_numpy(roles[:, 1:].copy())
            logits = self.model(x, torch.from_numpy(positions))  # (B, N, vocab)
            ce = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
            text, answer, repeat = role == data.TEXT, role == data.ANSWER, role == data.REPEAT
            loss = _mean(ce, text) + c.answer_weight * _mean(ce, answer | repeat)
            (loss / len(plan)).backward()
            with torch.no_grad():
                losses = torch.stack([_mean(ce, m) for m in (text, answer, repeat)]) / len(plan)
                seen[:3] += losses
                right = (logits.argmax(-1) == y)[answer]
                whole = right[: right.numel() // data.DIGITS * data.DIGITS].view(-1, data.DIGITS).all(-1)
                seen[3 + 2 * index] += whole.sum()
                seen[4 + 2 * index] += whole.numel()
            s.tokens += x.numel() * self.world
        self.average_gradients()
        if self.world > 1:
            dist.all_reduce(seen)
        norm = torch.nn.utils.clip_grad_norm_(self.params, c.clip)
        self.optimizer.step()
        s.step += 1
        s.stage_step += 1
        for index in set(plan):
            self._count(index, float(seen[3 + 2 * index]), float(seen[4 + 2 * index]))
        bits = (seen[:3] / self.world / math.log(2)).tolist()
        figures = {
            "step": s.step,
            "tokens": s.tokens,
            "length": c.lengths[s.stage],
            "loss_text_bits": bits[0],
            "loss_answer_bits": bits[1],
            "loss_repeat_bits": bits[2],
            "recall": s.recall[s.stage],
            "grad_norm": float(norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            "progress": progress,
            "seconds": self.seconds(),
        }
        self.advance(progress)
        return figures

    def agree(self, value: float) -> float:
        """Worker 0's value, on every worker."""
        if self.world > 1:
            shared = torch.tensor([value], dtype=torch.float64)
            dist.broadcast(shared, 0)
            return float(shared)
        return value

    def average_gradients(self) -> None:
        """Mean of the workers' gradients, in one message."""
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in self.params if p.grad is not None])
            dist.all_reduce(flat)
            flat /= self.world
            at = 0
            for p in self.params:
                if p.grad is not None:
                    p.grad.copy_(flat[at : at + p.numel()].view_as(p))
                    at += p.numel()

    def _count(self, index: int, right: float, n: float) -> None:
        """Running recall: the share of answers whose five digits are all the argmax; memory of about 300
        answers.
        """
        if n:
            s = self.state
            weight = s.answers[index] * max(0.0, 1.0 - n / 300)
            s.recall[index] = (s.recall[index] * weight + right) / (weight + n)
            s.answers[index] = weight + n
            s.total_answers += int(n)

    # --- held-out text ---
    @torch.no_grad()
    def held_out_bits(self, length: int) -> float:
        """Bits per byte on evenly spaced held-out windows of `length` bytes."""
        text = np.frombuffer(data.stdlib_text(held_out=True), dtype=np.uint8).astype(np.int64)
        rows = max(1, self.cfg.held_out_bytes // length)
        starts = np.linspace(0, len(text) - length - 2, rows).astype(int)
        ids = torch.from_numpy(np.stack([text[a : a + length + 1] for a in starts]))
        sums = torch.zeros(2, dtype=torch.float64)
        for block in ids.split(max(1, self.cfg.tokens // length // self.world))[self.rank :: self.world]:
            with torch.compiler.set_stance("force_eager"):  # not worth another compilation
                logits = self.model(block[:, :-1])
            sums[0] += F.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="sum")
            sums[1] += block[:, 1:].numel()
        if self.world > 1:
            dist.all_reduce(sums)
        return float(sums[0] / sums[1]) / math.log(2)

    # --- checkpoints ---
    def save(self) -> None:
        """checkpoint-<step>/ written aside and renamed, then `last.json` points at it; one older stays."""
        self.out.mkdir(parents=True, exist_ok=True)
        name = f"checkpoint-{self.state.step:07d}"
        temp = self.out / (name + ".tmp")
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, temp / "model.safetensors")
        moments = {}
        for i, p in enumerate(self.params):
            for key, value in self.optimizer.state[p].items():
                moments[f"{i}.{key}"] = value.contiguous()
        save_file(moments, temp / "optimizer.safetensors")
        state = replace(self.state, seconds=self.seconds())
        payload = {"model": self.model_cfg.as_dict(), "train": asdict(self.cfg), "state": asdict(state)}
        (temp / "state.json").write_text(json.dumps(payload, indent=1), encoding="utf-8")
        final = self.out / name
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temp, final)
        write_text(self.out / "last.json", json.dumps({"checkpoint": name}))
        for old in sorted(self.out.glob("checkpoint-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def resume(
        cls, out: Path, text: bytes | None = None, change: Callable[[TrainConfig], TrainConfig] = lambda c: c
    ) -> Trainer:
        """The run in `out` as its last checkpoint left it; `change` may edit the configuration (another
        budget, say).
        """
        folder, payload = last_checkpoint(out)
        train = payload["train"]
        train["lengths"], train["forced"] = tuple(train["lengths"]), tuple(train["forced"])
        self = cls(ReaderConfig(**payload["model"]), change(TrainConfig(**train)), out, text)
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        for key, value in load_file(folder / "optimizer.safetensors").items():
            i, name = key.split(".", 1)
            self.optimizer.state[self.params[int(i)]][name] = value
        self.state = State(**payload["state"])
        return self


def last_checkpoint(out: Path) -> tuple[Path, dict]:
    """Folder and contents of state.json of the newest whole checkpoint of a run."""
    pointer = out / "last.json"
    if not pointer.is_file():
        raise ValueError(f"out: no checkpoint in {out}")
    folder = out / json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
    return folder, json.loads((folder / "state.json").read_text(encoding="utf-8"))


def export(out: Path, folder: Path) -> None:
    """The last checkpoint as a Hugging Face folder: config.json, generation_config.json, model.safetensors.

    Weights are stored in float16 (half the bytes), the configuration says float32, which loading gives.
    """
    checkpoint, payload = last_checkpoint(out)
    cfg = ReaderConfig(**payload["model"])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(cfg.hf() | {"dtype": "float32"}, indent=2) + "\n")
    generation = {"do_sample": False}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    weights = {k: v.half() for k, v in load_file(checkpoint / "model.safetensors").items()}
    write_tensors(folder / "model.safetensors", weights, {"format": "pt"})


def run(trainer: Trainer, log_every: int = 25) -> None:
    """Train until the budget is used or SIGTERM arrives; JSON lines to log.jsonl, plain ones to stdout."""
    cfg, out, first = trainer.cfg, trainer.out, trainer.rank == 0
    out.mkdir(parents=True, exist_ok=True)

    def emit(entry: dict) -> None:
        if not first:
            return
        entry = {k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}
        with (out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        plain = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items())
        print(" ".join(plain), flush=True)

    start = {"start": trainer.state.step, "parameters": sum(p.numel() for p in trainer.model.parameters())}
    start |= {"torch": torch.__version__, "python": sys.version.split()[0], "text_bytes": len(trainer.text)}
    emit(start | {"seed": cfg.seed, "hours": cfg.hours, "workers": trainer.world, "threads": cfg.threads})
    stop: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    saved = evaluated = time.time()
    sums: dict[str, float] = {}
    n = 0
    done = trainer.agree(float(trainer.progress() >= 1.0))
    while not done:
        stage = trainer.state.stage
        figures = trainer.step()
        n += 1
        for key in ("loss_text_bits", "loss_answer_bits", "loss_repeat_bits", "grad_norm"):
            sums[key] = sums.get(key, 0.0) + float(figures[key])
        grown = trainer.state.stage != stage
        done = trainer.agree(float(trainer.progress() >= 1.0))
        stopped = trainer.agree(float(bool(stop)))
        if n == log_every or grown or done:
            emit(figures | {k: v / n for k, v in sums.items()})
            sums, n = {}, 0
        if trainer.agree(float(time.time() - evaluated > cfg.evaluate_s or grown or done)):
            bits = trainer.held_out_bits(cfg.lengths[stage])
            entry = {"step": trainer.state.step, "tokens": trainer.state.tokens, "length": cfg.lengths[stage]}
            emit(entry | {"held_out_bpb": bits, "seconds": trainer.seconds()})
            lengths = zip(cfg.lengths, trainer.state.recall, strict=True)
            emit({"step": trainer.state.step, **{f"recall_{a}": r for a, r in lengths if r}})
            evaluated = time.time()
        if first and (time.time() - saved > cfg.checkpoint_s or grown):
            trainer.save()
            saved = time.time()
        if stopped:
            break
    if first:
        trainer.save()
    signal.signal(signal.SIGTERM, before)


def _worker(rank: int, a: argparse.Namespace, store: str) -> None:
    """One process of a run; worker 0 is the process the user started."""
    torch.set_num_threads(a.threads)
    if a.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=a.workers)
    given = {k: v for k in ("hours", "steps", "lr", "tokens") if (v := getattr(a, k)) is not None}
    given |= {"compile": not a.no_compile, "threads": a.threads, "workers": a.workers}
    if a.resume:
        trainer = Trainer.resume(a.out, change=lambda c: replace(c, **given))
    else:
        trainer = Trainer(ReaderConfig(), TrainConfig(seed=a.seed, **given), a.out)
    run(trainer)
    if a.workers > 1:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    d = TrainConfig()
    p = argparse.ArgumentParser(
        prog="python -m foveate.organisms.reader.train", description="Train the organism reader."
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reader"),
        help="folder of checkpoints and log (default %(default)s)",
    )
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    p.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="write the last checkpoint as a Hugging Face folder and stop",
    )
    p.add_argument("--hours", type=float, help=f"budget on the clock (default {d.hours})")
    p.add_argument("--steps", type=int, help="budget in steps instead of hours")
    p.add_argument("--seed", type=int, default=d.seed)
    p.add_argument("--lr", type=float, help=f"peak learning rate (default {d.lr})")
    p.add_argument("--tokens", type=int, help=f"tokens per micro-batch (default {d.tokens})")
    p.add_argument("--workers", type=int, default=d.workers, help="processes (default %(default)s)")
    p.add_argument("--threads", type=int, default=d.threads, help="threads per process (default %(default)s)")
    p.add_argument("--no-compile", action="store_true", help="do not torch.compile the layers")
    p.add_argument("--pid", type=Path, help="write the process number to this file")
    a = p.parse_args(argv)
    exists = (a.out / "last.json").is_file()
    if (a.export or a.resume) and not exists:
        print(f"{a.out} holds no checkpoint", file=sys.stderr)
        return 2
    if a.export:
        export(a.out, a.export)
        return 0
    if not a.resume and exists:
        print(f"{a.out} already holds a run: --resume it or name another --out", file=sys.stderr)
        return 2
    if a.pid:
        write_text(a.pid, f"{os.getpid()}\n")
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        context = torch.multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_worker, args=(r, a, store), daemon=True) for r in range(1, a.workers)
        ]
        for process in others:
            process.start()
        _worker(0, a, store)
        for process in others:
            process.join()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
