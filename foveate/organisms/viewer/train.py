"""Train the organism `viewer`.

    python -m foveate.organisms.viewer.train --out runs/viewer
    python -m foveate.organisms.viewer.train --out runs/viewer --resume        # goes on after a kill
    python -m foveate.organisms.viewer.train --out runs/viewer --export DIR    # weights, log and curve to ship

Objective per step: cross-entropy of the cells + 2 * L1 of the boxes + 0.5 * cross-entropy of the counts
(`model.losses`). AdamW, warm-up, cosine to zero. All randomness of a step comes from (seed, step), so that a resumed
run takes the same steps. Every file is written under a temporary name and renamed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.organisms.viewer.evaluate import evaluate
from foveate.organisms.viewer.model import Viewer, ViewerConfig, losses, overlap
from foveate.organisms.viewer.scenes import Scenes

WEIGHTS = {"cells": 1.0, "boxes": 2.0, "counts": 0.5}


@dataclass(frozen=True)
class TrainConfig:
    """What a run is made of; stored with its checkpoints."""

    seed: int = 0
    steps: int = 3000
    batch: int = 32
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    checkpoint: int = 100
    evaluate: int = 250


def write_text(path: Path, text: str) -> None:
    """The whole file or nothing."""
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(text, encoding="utf-8")
    os.replace(temp, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The whole file or nothing."""
    temp = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temp)
    temp.chmod(0o644)
    os.replace(temp, path)


class Trainer:
    """One run in one folder."""

    def __init__(self, config: TrainConfig, model: ViewerConfig, scenes: Scenes, out: Path) -> None:
        torch.manual_seed(config.seed)
        self.config, self.scenes, self.out = config, scenes, out
        self.viewer = Viewer(model)
        wide = [p for p in self.viewer.parameters() if p.ndim > 1]
        thin = [p for p in self.viewer.parameters() if p.ndim == 1]
        groups = [
            {"params": wide, "weight_decay": config.weight_decay},
            {"params": thin, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
        self.params = wide + thin
        self.step_number, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []

    def step(self) -> dict[str, float]:
        """One optimiser step; its losses."""
        c, began = self.config, time.time()
        rate = min(1.0, (self.step_number + 1) / c.warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * self.step_number / c.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * rate
        scene = self.scenes.sample((c.seed, self.step_number), c.batch)
        parts = losses(self.viewer.train()(scene.images), scene.classes, scene.boxes, scene.counts)
        loss = torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, c.clip)
        self.optimizer.step()
        self.step_number += 1
        self.seconds += time.time() - began
        return {name: float(part.detach()) for name, part in parts.items()}

    def run(self) -> None:
        """To the end, with a line in the log every 25 steps, figures and checkpoints now and then."""
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("training shows its progress with tqdm: pip install foveate[hf]") from error
        c = self.config
        sums: dict[str, float] = {}
        for _ in tqdm(range(self.step_number, c.steps), initial=self.step_number, total=c.steps):
            for name, value in self.step().items():
                sums[name] = sums.get(name, 0.0) + value / 25
            n = self.step_number
            if n % 25 == 0:
                self.log.append({"step": n, **sums})
                sums = {}
            if n % c.evaluate == 0 or n == c.steps:
                self.log.append({"step": n, "held out": evaluate(self.viewer, self.scenes, number=100)})
            if n % c.checkpoint == 0 or n == c.steps:
                self.save()

    def save(self) -> None:
        """One file of tensors, then one that says what they are; older ones are overwritten last."""
        self.out.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.viewer.state_dict().items()}
        for i, p in enumerate(self.params):
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer.{i}.{key}"] = value
        name = f"checkpoint-{self.step_number}.safetensors"
        write_tensors(self.out / name, tensors)
        about = {
            "checkpoint": name,
            "step": self.step_number,
            "seconds": self.seconds,
            "train": asdict(self.config),
            "model": self.viewer.config.as_dict(),
            "scenes": asdict(self.scenes),
            "log": self.log,
        }
        write_text(self.out / "last.json", json.dumps(about))
        for old in self.out.glob("checkpoint-*.safetensors"):
            if old.name != name:
                old.unlink()

    @classmethod
    def resume(cls, out: Path) -> Trainer:
        """The run in `out` as its last checkpoint left it."""
        about = json.loads((out / "last.json").read_text(encoding="utf-8"))
        self = cls(TrainConfig(**about["train"]), _model(about["model"]), _scenes(about["scenes"]), out)
        tensors = load_file(out / about["checkpoint"])
        self.viewer.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                self.optimizer.state[self.params[int(number)]][name] = value
        self.step_number, self.seconds, self.log = about["step"], about["seconds"], about["log"]
        return self


def _model(about: dict[str, Any]) -> ViewerConfig:
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items()}
    return ViewerConfig(**made)


def _scenes(about: dict[str, Any]) -> Scenes:
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about.items()}
    return Scenes(**made)


def export(out: Path, folder: Path) -> None:
    """config.json, model.safetensors (float16), log.json, curve.png and scenes.png of the last checkpoint."""
    trainer = Trainer.resume(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", {k: v.half() for k, v in trainer.viewer.state_dict().items()})
    config = {
        "model_type": "viewer",
        "architectures": ["foveate.organisms.viewer.model.Viewer"],
        "model": trainer.viewer.config.as_dict(),
        "scenes": asdict(trainer.scenes),
        "train": asdict(trainer.config) | {"taken": trainer.step_number, "seconds": round(trainer.seconds)},
    }
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    write_text(folder / "log.json", "[\n" + ",\n".join(json.dumps(e) for e in trainer.log) + "\n]\n")
    draw(trainer.log, folder / "curve.png")
    picture(*load(folder), folder / "scenes.png")


def picture(viewer: Viewer, scenes: Scenes, path: Path, number: int = 5, seed: int = 10_000_001) -> None:
    """Scenes of held-out digits with what the viewer found: named rightly (blue), wrongly (orange)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    scene = scenes.sample(seed, number, held_out=True)
    figure = Figure(figsize=(2.3 * number, 2.7), layout="constrained")
    counts = viewer(scene.images).counts.argmax(1).tolist()
    for b, (axes, mine) in enumerate(zip(figure.subplots(1, number), viewer.find(scene.images), strict=True)):
        axes.imshow(scene.images[b, 0].numpy(), cmap="gray_r", interpolation="nearest")
        there = [tuple(box) for box in scene.boxes[b].tolist()]
        for kind, _, box in mine:
            best = max(range(len(there)), key=lambda i: overlap(box, there[i]))
            right = overlap(box, there[best]) >= 0.5 and int(scene.classes[b, best]) == kind
            colour = "#1a407a" if right else "#d97b16"
            corner = (box[1] - 0.5, box[0] - 0.5)
            axes.add_patch(Rectangle(corner, box[3], box[2], fill=False, color=colour, lw=1.2))
            axes.text(box[1], box[0] - 1, str(kind), color=colour, fontsize=9, va="bottom")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"says {counts[b]}, {int(scene.counts[b])} there", fontsize=9)
    temp = path.with_name("tmp-" + path.name)
    figure.savefig(temp, dpi=100)
    temp.replace(path)


def draw(log: list[dict[str, Any]], path: Path) -> None:
    """Losses, and figures on held-out digits, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    train = [e for e in log if "held out" not in e]
    for name in WEIGHTS:
        left.plot([e["step"] for e in train], [e[name] for e in train], lw=1, label=name)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="training scenes")
    held = [e for e in log if "held out" in e]
    for name in ("found", "named", "precision", "counted"):
        right.plot([e["step"] for e in held], [e["held out"][name] for e in held], "o-", ms=3, label=name)
    right.set(xlabel="step", ylabel="share", ylim=(0, 1.02), title="100 scenes of held-out digits")
    for axes in (left, right):
        axes.legend(frameon=False)
    temp = path.with_name("tmp-" + path.name)
    figure.savefig(temp, dpi=110)
    temp.replace(path)


def load(folder: Path) -> tuple[Viewer, Scenes]:
    """A viewer in eval mode, float32, and the scenes that it was trained on."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    viewer = Viewer(_model(about["model"]))
    viewer.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return viewer.eval(), _scenes(about["scenes"])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m foveate.organisms.viewer.train", description="Train the organism viewer."
    )
    p.add_argument(
        "--out", type=Path, default=Path("runs/viewer"), help="folder of the run (default %(default)s)"
    )
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    p.add_argument(
        "--export", type=Path, metavar="DIR", help="write weights, log and curve of the run, and stop"
    )
    p.add_argument("--steps", type=int, default=TrainConfig.steps)
    p.add_argument("--seed", type=int, default=TrainConfig.seed)
    a = p.parse_args(argv)
    exists = (a.out / "last.json").is_file()
    if (a.export or a.resume) and not exists:
        print(f"{a.out} holds no checkpoint", file=sys.stderr)
        return 2
    if a.export:
        export(a.out, a.export)
        return 0
    if exists and not a.resume:
        print(f"{a.out} already holds a run: --resume it or name another --out", file=sys.stderr)
        return 2
    if a.resume:
        trainer = Trainer.resume(a.out)
    else:
        trainer = Trainer(TrainConfig(seed=a.seed, steps=a.steps), ViewerConfig(), Scenes(), a.out)
    trainer.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
