"""MQAR on CPU with the published protocol: recall of attention, windows, Based, gated linear attention and DeltaNet.

    .venv/bin/python benchmarks/mqar.py train --length 64 --pairs 4 --dim 64 --mixer attention
    .venv/bin/python benchmarks/mqar.py train --mix --device cuda --dim 128 --mixer deltanet  # recall-memory figure
    .venv/bin/python benchmarks/mqar.py plot

`train` adds a row to benchmarks/results/mqar.csv; an interrupted run goes on from its last epoch. A published run is
the best of four learning rates (1e-4 to 1e-2); each row here is one. `plot` draws all rows beside the published points.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import nn

from foveate import layers
from foveate.bench.machine import cpu_model
from foveate.bench.mqar import FIGURE_MIX, FIGURE_TESTS, MQAR, Segments, learn, published_model
from foveate.bench.results import write_atomic

RESULTS = Path(__file__).parent / "results"
CSV = RESULTS / "mqar.csv"
FIELDS = ["mixer", "length", "pairs", "dim", "lr", "seed", "examples", "schedule", "epochs", "accuracy", "best",
          "state_bytes", "seconds", "curve", "torch", "device"]  # fmt: skip
WINDOWS = (8, 16, 32)
PUBLISHED = {  # bytes of state -> recall, read off the figure in the README of Zoology's code (+-0.02)
    "sliding window": list(zip((2 * w * 128 * 4 for w in (8, 16, 32, 64, 128, 256, 512, 1024)),
                               (0.09, 0.15, 0.32, 0.52, 0.66, 0.80, 0.94, 1.0), strict=True)),
    "Based": [(9.3e3, 0.67), (12e3, 0.72), (24e3, 0.84), (40e3, 0.92), (80e3, 0.99), (290e3, 1.0)],
    "DeltaNet": [(8.8e3, 0.80), (34e3, 0.97), (140e3, 1.0)],
    "gated linear": [(4.8e3, 0.53), (18e3, 0.77), (68e3, 0.95)],
}  # fmt: skip


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


@click.group()
def main() -> None:
    """MQAR with the published protocol."""


@main.command()
@click.option("--mixer", default="attention", show_default=True)
@click.option("--length", default=64, show_default=True)
@click.option("--pairs", default=4, show_default=True)
@click.option(
    "--mix", is_flag=True, help="The five training and seven test configurations of the recall-memory figure."
)
@click.option("--dim", default=64, show_default=True)
@click.option("--lr", default=10**-2.6666667, show_default=True)
@click.option("--seed", default=123, show_default=True)
@click.option("--examples", default=100_000, show_default=True)
@click.option("--epochs", default=64, show_default=True)
@click.option("--most", default=64, show_default=True, help="End after this many of the epochs.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), default=Path("out/mqar"), show_default=True)
def train(
    mixer: str, length: int, pairs: int, mix: bool, dim: int, lr: float, seed: int, examples: int, epochs: int,
    most: int, device: str, keep: Path,
) -> None:  # fmt: skip
    """Train one mixer on one configuration and note what it recalls."""
    known = mixers(dim)
    if mixer not in known:
        raise click.BadParameter(f"{mixer!r}; known: {', '.join(known)}", param_hint="--mixer")
    make, state, positions = known[mixer]
    task = MQAR(length, pairs)
    given: tuple[Segments, Segments] = (
        (FIGURE_MIX, FIGURE_TESTS) if mix else ([(task, examples)], [(task, 3_000)])
    )
    torch.manual_seed(seed)
    longest = max(t.length for t, _ in given[1])
    model = published_model(task.vocab, dim, make, positions=longest if positions else 0).to(device)
    what = "mix" if mix else f"{length}-{pairs}"
    where = keep / f"{mixer}-{what}-{dim}-{lr:.2e}-{seed}-{examples}-{epochs}".replace(" ", "_")
    resumed, started = where.exists(), time.perf_counter()

    def told(epoch: int, loss: float, found: list[float]) -> None:
        said, spent = " ".join(f"{a:.4f}" for a in found), time.perf_counter() - started
        click.echo(f"{mixer} ({what}) epoch {epoch}: loss {loss:.3f}, accuracy {said}, {spent:.0f} s")

    curve = learn(
        model,
        *given,
        lr=lr,
        seed=seed,
        epochs=epochs,
        most=most,
        batch=256 if mix else 512,
        keep=where,
        told=told,
    )
    means = [sum(found) / len(found) for found in curve]
    add({
        "mixer": mixer, "length": "mix" if mix else length, "pairs": "mix" if mix else pairs, "dim": dim,
        "lr": f"{lr:.3g}", "seed": seed, "examples": sum(count for _, count in given[0]),
        "schedule": epochs, "epochs": len(curve),
        "accuracy": f"{means[-1]:.4f}", "best": f"{max(means):.4f}", "state_bytes": state,
        "seconds": "" if resumed else round(time.perf_counter() - started),
        "curve": " ".join(f"{m:.3f}" for m in means),
        "torch": torch.__version__, "device": cpu_model() if device == "cpu" else torch.cuda.get_device_name(device),
    })  # fmt: skip


def add(row: dict) -> None:
    """One more row, written aside and then renamed."""
    rows: list[dict] = list(csv.DictReader(CSV.open())) if CSV.exists() else []
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows([*rows, row])
    write_atomic(CSV, text.getvalue())


@main.command()
def plot() -> None:
    """Draw all rows, what a window can know, and the published points, over bytes of state."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in csv.DictReader(CSV.open()) if row["length"] != "mix"]
    figure, (ours, published) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    task, g = MQAR(64, 4), torch.Generator()
    reach = range(1, 64)
    ours.plot([2 * w * 64 * 4 for w in reach], [task.within(w, g.manual_seed(0)) for w in reach], color="0.7",
              label="all that a window can know")  # fmt: skip
    for name in dict.fromkeys(row["mixer"] for row in rows):
        mine = [row for row in rows if row["mixer"] == name and row["dim"] == "64"]
        for (length, pairs), marker in (((64, 4), "o"), ((128, 8), "s")):
            found = [row for row in mine if (row["length"], row["pairs"]) == (str(length), str(pairs))]
            if not found:
                continue
            best = max(found, key=lambda row: float(row["best"]))
            state = int(best["state_bytes"])
            x = 2 * length * 64 * 4 * 2 if state < 0 else state  # a cache of both layers, at its longest
            ours.scatter(
                [x], [float(best["best"])], marker=marker, zorder=3, label=f"{name} ({length}, {pairs})"
            )
    ours.set(
        xscale="log", xlabel="bytes of state", ylabel="recall", ylim=(0, 1.07), title="Measured here, dim 64"
    )
    windows = [8 * 2**i for i in range(8)]
    known = [
        sum(t.within(w, g.manual_seed(0), 2000) for t, _ in FIGURE_TESTS) / len(FIGURE_TESTS) for w in windows
    ]
    published.plot(
        [2 * w * 128 * 4 for w in windows], known, color="0.7", label="all that a window can know, computed"
    )
    for name, points in PUBLISHED.items():
        published.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4,
                       linestyle="" if name == "sliding window" else ":", label=f"{name}, published")  # fmt: skip
    published.set(
        xscale="log", xlabel="bytes of state", title="Recall-memory figure: published points (digitised)"
    )
    for axes in (ours, published):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    figure.savefig(CSV.with_suffix(".png"), dpi=130)
    for w, a, (_, b) in zip(windows, known, PUBLISHED["sliding window"], strict=True):
        click.echo(f"window {w}: computed {a:.3f}, published {b:.2f}")


if __name__ == "__main__":
    main()
