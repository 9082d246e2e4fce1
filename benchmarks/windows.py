"""Window and neighbourhood attention on this machine, forward and backward.

    .venv/bin/python benchmarks/windows.py --quick      # small, nothing written
    .venv/bin/python benchmarks/windows.py

1. A stage of Swin-T (two blocks, one shifted; 56 x 56 cells, window 7, 3 heads of 32, 8 images): `foveate.vision`
   against transformers' SwinStage with the same weights, with its default attention (SDPA) and eager; outputs first.
2. Swin-T as a whole on 2 images of 224 pixels: `fv.vision.swin_tiny` against transformers' SwinForImageClassification
   (left out with --quick).
3. Neighbourhood attention (Neighborhood, 13 x 13 on 64 x 64 cells, 3 heads of 32): `fv.attention` against SDPA with the
   same set as a boolean mask. The first call, which builds the layout or the mask, is kept apart.
4. One stage over sides from 28 to 224 cells: seconds per cell, and the slope of log seconds over log cells.

Arms of a comparison take turns; figures are medians and their quotients. Writes windows-<cpu>.csv and .png.
"""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foveate as fv
from foveate.bench.machine import commit, cpu_model, usable_cores
from foveate.bench.results import write_atomic
from foveate.catalogue.lab.stats import slope
from foveate.patterns import Neighborhood
from foveate.vision.swin import SwinBlock, swin_from_transformers

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Tensor]


def seconds(call: Call, wanted: list[Tensor]) -> float:
    """Forward and backward."""
    started = time.perf_counter()
    torch.autograd.grad(call().sum(), wanted)
    return time.perf_counter() - started


def compare(
    question: str, arms: Mapping[str, tuple[Call, list[Tensor]]], rounds: int
) -> list[dict[str, object]]:
    """Rows of one comparison; ratios are to the first arm."""
    first = {name: seconds(*arm) for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            times[name].append(seconds(*arm))
    base = statistics.median(next(iter(times.values())))
    rows: list[dict[str, object]] = []
    for name, mine in times.items():
        typical = statistics.median(mine)
        rows.append({
            "question": question, "arm": name, "seconds": f"{typical:.4g}", "first": f"{first[name]:.4g}",
            "low": f"{min(mine):.4g}", "high": f"{max(mine):.4g}", "ratio": f"{typical / base:.3g}", "rounds": rounds,
        })  # fmt: skip
        click.echo(
            f"{question}: {name} {typical:.4f} s, first call {first[name]:.3f} s, ratio {typical / base:.2f}"
        )
    return rows


def swin_models(
    dim: int, depths: list[int], heads: list[int], size: int, labels: int
) -> dict[str, nn.Module]:
    """transformers' Swin with either attention, and ours with its weights."""
    from transformers import SwinConfig, SwinForImageClassification

    made: dict[str, nn.Module] = {}
    for kind in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = SwinConfig(
            embed_dim=dim,
            depths=depths,
            num_heads=heads,
            image_size=size,
            window_size=7,
            num_labels=labels,
            drop_path_rate=0.0,
        )
        config._attn_implementation = kind
        made[f"transformers, {kind}"] = SwinForImageClassification(config).eval()
    ours = swin_from_transformers(made["transformers, sdpa"])
    return {"foveate": ours, **made}


def stage(side: int, batch: int, rounds: int) -> list[dict[str, object]]:
    """Question 1."""
    models = swin_models(96, [2, 2], [3, 6], 4 * side, 10)
    x = torch.randn(batch, side, side, 96)
    arms: dict[str, tuple[Call, list[Tensor]]] = {}
    outs = {}
    for name, model in models.items():
        own = x.clone().requires_grad_()
        if name == "foveate":
            part: nn.Module = model.stages[0]  # type: ignore[index,assignment]

            def call(part: nn.Module = part, own: Tensor = own) -> Tensor:
                return part(own)
        else:
            part = model.swin.encoder.layers[0].blocks  # type: ignore[union-attr,assignment]

            def call(part: nn.Module = part, own: Tensor = own) -> Tensor:
                y = own.flatten(1, 2)
                for block in part:  # type: ignore[attr-defined]
                    y = block(y, (side, side))
                    y = y[0] if isinstance(y, tuple) else y
                return y.unflatten(1, (side, side))

        with torch.no_grad():
            outs[name] = call()
        arms[name] = (call, [own, *part.parameters()])
    for name, out in outs.items():
        apart = float((out - outs["foveate"]).abs().max())
        if apart > 1e-4:
            raise RuntimeError(f"{name} differs by {apart}")
    return compare(f"stage {side}x{side}, window 7, 3 heads, batch {batch}", arms, rounds)


def whole(size: int, batch: int, rounds: int) -> list[dict[str, object]]:
    """Question 2."""
    models = swin_models(96, [2, 2, 6, 2], [3, 6, 12, 24], size, 1000)
    images = torch.randn(batch, 3, size, size)
    arms: dict[str, tuple[Call, list[Tensor]]] = {}
    for name, model in models.items():

        def call(model: nn.Module = model) -> Tensor:
            out = model(images)
            return out if isinstance(out, Tensor) else out.logits

        arms[name] = (call, list(model.parameters()))
    with torch.no_grad():
        ours, theirs = arms["foveate"][0](), arms["transformers, sdpa"][0]()
    if not torch.allclose(ours, theirs, atol=1e-4):
        raise RuntimeError(f"logits differ by {float((ours - theirs).abs().max())}")
    return compare(f"Swin-T, {batch} images of {size}", arms, rounds)


def neighbourhood(side: int, window: int, rounds: int) -> list[dict[str, object]]:
    """Question 3."""
    qkv = [torch.randn(1, 3, side * side, 32).requires_grad_() for _ in range(3)]
    pattern = Neighborhood((side, side), window)
    kept: dict[str, Tensor] = {}

    def masked() -> Tensor:
        if "mask" not in kept:
            kept["mask"] = pattern.layout(side * side).to_dense()[0, 0]
        return F.scaled_dot_product_attention(*qkv, attn_mask=kept["mask"])

    arms: dict[str, tuple[Call, list[Tensor]]] = {
        "foveate": (lambda: fv.attention(*qkv, pattern), qkv),  # type: ignore[dict-item,return-value]
        "SDPA with a mask": (masked, qkv),
    }
    rows = compare(f"neighbourhood {window}x{window} on {side}x{side}, 3 heads", arms, rounds)
    with torch.no_grad():
        apart = float((arms["foveate"][0]() - masked()).abs().max())
    if apart > 1e-4:
        raise RuntimeError(f"neighbourhood attention differs by {apart}")
    return rows


def growth(sides: list[int], rounds: int) -> tuple[list[dict[str, object]], dict[str, list[float]]]:
    """Question 4."""
    block = nn.Sequential(SwinBlock(96, 3, 7), SwinBlock(96, 3, 7, shift=3))
    curve = []
    for side in sides:
        x = torch.randn(1, side, side, 96).requires_grad_()
        wanted = [x, *block.parameters()]
        curve.append(
            statistics.median([seconds(lambda x=x: block(x), wanted) for _ in range(rounds + 1)][1:])
        )
    cells = [side**2 for side in sides]
    found = slope("stage", cells, curve)
    click.echo(
        f"exponent of seconds over cells {found.value:.3f} ({found.low:.3f} to {found.high:.3f}), sides {sides}"
    )
    rows: list[dict[str, object]] = [
        {"question": "growth of a stage", "arm": f"{side}x{side}", "seconds": f"{s:.4g}", "rounds": rounds,
         "ratio": f"{found.value:.3f}"} for side, s in zip(sides, curve, strict=True)
    ]  # fmt: skip
    return rows, {"cells": [float(c) for c in cells], "seconds": curve}


def draw(rows: list[dict[str, object]], grown: dict[str, list[float]], path: Path, machine: str) -> None:
    """Bars of seconds per comparison, and the growth."""
    from matplotlib.figure import Figure

    questions = [q for q in dict.fromkeys(str(row["question"]) for row in rows) if not q.startswith("growth")]
    figure = Figure(figsize=(4 * (len(questions) + 1), 4.2), layout="constrained")
    axes = figure.subplots(1, len(questions) + 1)
    for place, question in zip(axes, questions, strict=False):
        mine = [row for row in rows if row["question"] == question]
        bars = place.bar(
            [str(row["arm"]).replace(", ", "\n") for row in mine],
            [float(str(row["seconds"])) for row in mine],
            color=["#1a407a", "#a9c4e6", "#c9c9c6"][: len(mine)],
        )
        place.bar_label(bars, [f"{float(str(row['ratio'])):.2f}x" for row in mine], fontsize=9)
        place.set_title(question.replace(", ", "\n", 1), fontsize=9)
        place.set_ylabel("seconds, forward and backward")
    place = axes[-1]
    place.loglog(grown["cells"], grown["seconds"], "o-", color="#1a407a")
    place.set(xlabel="cells", ylabel="seconds", title="a stage over the size of the map")
    place.title.set_fontsize(9)
    figure.suptitle(machine, fontsize=9)
    temp = path.with_name("tmp-" + path.name)
    figure.savefig(temp, dpi=110)
    temp.replace(path)


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes, nothing written.")
@click.option("--rounds", default=9, show_default=True, help="Rounds of each comparison.")
def main(quick: bool, rounds: int) -> None:
    """All four questions."""
    torch.manual_seed(0)
    rounds = 1 if quick else rounds
    rows = stage(14 if quick else 56, 1 if quick else 8, rounds)
    rows += [] if quick else whole(224, 2, rounds)
    rows += neighbourhood(16 if quick else 64, 5 if quick else 13, rounds)
    more, grown = growth([7, 14, 21] if quick else [28, 56, 112, 224], rounds)
    if quick:
        return
    machine = {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "torch": torch.__version__,
        "commit": commit() or "",
    }
    import transformers

    machine["transformers"] = transformers.__version__
    text = io.StringIO()
    rows += more
    writer = csv.DictWriter(text, [*dict.fromkeys(key for row in rows for key in row), *machine])
    writer.writeheader()
    writer.writerows({**row, **machine} for row in rows)
    stem = (
        "windows-" + "_".join(machine["cpu"].lower().replace("(r)", "").split()[:2]) + f"-t{machine['cores']}"
    )
    write_atomic(RESULTS / f"{stem}.csv", text.getvalue())
    draw(
        rows,
        grown,
        RESULTS / f"{stem}.png",
        f"{machine['cpu']}, {machine['cores']} threads, torch {torch.__version__}",
    )


if __name__ == "__main__":
    main()
