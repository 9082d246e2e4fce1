"""MQAR on CPU with the published protocol: recall of attention, windows, Based, gated linear attention and DeltaNet.

    python benchmarks/mqar.py --length 64 --pairs 4 --dim 64 --mixer attention --lr 2.15e-3

Adds one row per run to benchmarks/results/mqar-cpu.csv; an interrupted run goes on from its last epoch. `--plot` draws
all rows. A published run is the best of four learning rates; each row here is one.
"""

from __future__ import annotations

import csv
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import nn

from foveate import layers
from foveate.bench.mqar import MQAR, learn, published_model

RESULTS = Path(__file__).parent / "results"
CSV = RESULTS / "mqar-cpu.csv"
FIELDS = ["mixer", "length", "pairs", "dim", "lr", "seed", "examples", "epochs", "accuracy", "best", "state_bytes",
          "seconds", "curve", "torch", "cpu"]  # fmt: skip
WINDOWS = (8, 16, 32)


def mixers(dim: int) -> dict[str, tuple[Callable[[int], nn.Module], int, bool]]:
    """name -> (mixer of a layer, state bytes of the recall layer at float32 (-1: grows), learned positions)."""

    def after_conv(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
        return lambda layer: make() if layer % 2 else layers.BaseConv(dim)

    def dense(heads: int) -> nn.Module:
        return layers.SelfAttention(dim, heads, rotary=False, bias=True, dropout=0.1)

    found: dict[str, tuple[Callable[[int], nn.Module], int, bool]] = {
        "attention": (lambda layer: dense(1), -1, True),
        "conv+attention": (after_conv(lambda: dense(2)), -1, False),
        "gated linear": (after_conv(lambda: layers.GatedLinearAttention(dim, 2)), dim * dim // 4 * 4, False),
        "deltanet": (after_conv(lambda: layers.DeltaNet(dim, 2)), (dim * dim // 2 + 9 * dim) * 4, False),
        "linear elu+1": (after_conv(lambda: layers.KernelAttention(dim, 2)), (dim * dim // 2 + dim) * 4, False),
    }  # fmt: skip
    for w in WINDOWS:  # the published window of w sees w keys before its own
        make = lambda w=w: layers.SelfAttention(dim, 1, window=w + 1, rotary=False, bias=True)  # noqa: E731
        found[f"window {w}"] = (after_conv(make), 2 * w * dim * 4, False)
    if hasattr(layers, "BasedLinearAttention"):
        for f in (8, 16):
            make = lambda f=f: layers.BasedLinearAttention(dim, 1, feature_dim=f)  # noqa: E731
            found[f"based {f}"] = (after_conv(make), (1 + f + f * (f + 1) // 2) * (dim + 1) * 4, False)
    return found


@click.command()
@click.option("--mixer", default="attention", show_default=True)
@click.option("--length", default=64, show_default=True)
@click.option("--pairs", default=4, show_default=True)
@click.option("--dim", default=64, show_default=True)
@click.option("--lr", default=10**-2.6666667, show_default=True)
@click.option("--seed", default=123, show_default=True)
@click.option("--examples", default=100_000, show_default=True)
@click.option("--epochs", default=64, show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), default=Path("out/mqar"), show_default=True)
def main(mixer, length, pairs, dim, lr, seed, examples, epochs, keep) -> None:
    """Train one mixer on one configuration and note what it recalls."""
    known = mixers(dim)
    if mixer not in known:
        raise click.BadParameter(f"{mixer!r}; known: {', '.join(known)}", param_hint="--mixer")
    make, state, positions = known[mixer]
    task = MQAR(length, pairs)
    torch.manual_seed(seed)
    model = published_model(task, dim, make, positions=positions)
    where = keep / f"{mixer}-{length}-{pairs}-{dim}-{lr:.2e}-{seed}-{examples}-{epochs}".replace(" ", "_")
    started = time.perf_counter()

    def told(epoch: int, loss: float, accuracy: float) -> None:
        spent = time.perf_counter() - started
        click.echo(
            f"{mixer} ({length},{pairs}) epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.4f}, {spent:.0f} s"
        )

    curve = learn(
        model, task, lr=lr, seed=seed, examples=examples, epochs=epochs, batch=512, keep=where, told=told
    )
    row = {
        "mixer": mixer, "length": length, "pairs": pairs, "dim": dim, "lr": f"{lr:.3g}", "seed": seed,
        "examples": examples, "epochs": len(curve), "accuracy": f"{curve[-1]:.4f}", "best": f"{max(curve):.4f}", "state_bytes": state,
        "seconds": round(time.perf_counter() - started), "curve": " ".join(f"{c:.3f}" for c in curve),
        "torch": torch.__version__, "cpu": platform.processor() or platform.machine(),
    }  # fmt: skip
    add(row)


def add(row: dict) -> None:
    """One more row, written aside and then renamed."""
    rows: list[dict] = list(csv.DictReader(CSV.open())) if CSV.exists() else []
    new = CSV.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows([*rows, row])
    os.replace(new, CSV)


if __name__ == "__main__":
    main()
