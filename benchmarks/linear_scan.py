"""The chunked scan of linear attention on this machine: against the recurrence and the N x N form, and over lengths.

    .venv/bin/python benchmarks/linear_scan.py --quick      # small, nothing written
    .venv/bin/python benchmarks/linear_scan.py

B=1, H=4, D=64, float32, forward and backward, all gradients. Two questions:

1. From 1,024 to 262,144 tokens: seconds per token, and the slope of log seconds over log tokens with its 95 % interval
   (Student, over the lengths); bytes of the state.
2. At 8,192 tokens: `linear_attention` against the naive token loop (written below as in the papers), the N x N form
   (products, mask, products; the mask is built in the call) and causal softmax attention (SDPA). The figure is the
   quotient of medians. The first call is kept apart.

Writes linear_scan-<cpu>.csv and .png beside the other results.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.bench.machine import commit, cpu_model, usable_cores
from foveate.bench.results import write_atomic
from foveate.catalogue.lab.stats import slope
from foveate.linear import lightning_attention, linear_attention

RESULTS = Path(__file__).parent / "results"
HEADS, DIM = 4, 64
Call = Callable[[dict[str, Tensor]], Tensor]


def inputs(n: int) -> dict[str, Tensor]:
    """q, k (of norm 1), v, decays and strengths of n tokens."""
    g = torch.Generator().manual_seed(n)
    made = {name: torch.randn(1, HEADS, n, DIM, generator=g) for name in "qkv"}
    made["k"] = F.normalize(made["k"], dim=-1)
    made["head"] = -torch.rand(HEADS, generator=g) * 0.1
    made["token"] = -torch.rand(1, HEADS, n, generator=g) * 0.1
    made["channel"] = -torch.rand(1, HEADS, n, DIM, generator=g) * 0.1
    made["beta"] = torch.rand(1, HEADS, n, generator=g)
    return {name: t.requires_grad_(name != "head") for name, t in made.items()}


def chunked(decay: str | None = None, beta: bool = False) -> Call:
    return lambda x: linear_attention(
        x["q"], x["k"], x["v"], log_decay=x[decay] if decay else None, beta=x["beta"] if beta else None
    )  # type: ignore[return-value]


def loop(decay: str | None = None, beta: bool = False) -> Call:
    """The recurrence of the papers, token by token."""

    def call(x: dict[str, Tensor]) -> Tensor:
        q, k, v, out = x["q"], x["k"], x["v"], []
        s = q.new_zeros(1, HEADS, DIM, DIM)
        rate = None if decay is None else x[decay].exp()
        for t in range(q.shape[2]):
            if rate is not None:
                a = rate.view(1, -1, 1, 1) if rate.ndim == 1 else rate[:, :, t].reshape(1, HEADS, -1, 1)
                s = a * s
            u = v[:, :, t]
            if beta:
                u = x["beta"][:, :, t, None] * (u - (k[:, :, t, None] @ s).squeeze(2))
            s = s + k[:, :, t, :, None] * u[:, :, None]
            out.append((q[:, :, t, None] @ s).squeeze(2))
        return torch.stack(out, 2)

    return call


def square(decay: str | None = None) -> Call:
    """All weights at once."""

    def call(x: dict[str, Tensor]) -> Tensor:
        n = x["q"].shape[2]
        weights = x["q"] @ x["k"].transpose(-1, -2)
        if decay is None:
            return weights.tril() @ x["v"]
        if decay == "head":
            ahead = torch.arange(n)[:, None] - torch.arange(n)
            gone = ahead.clamp(min=0) * x["head"].view(-1, 1, 1)
        else:
            total = x["token"].cumsum(-1)
            gone = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp(max=0)
        return (weights * gone.exp()).tril() @ x["v"]

    return call


def softmax(x: dict[str, Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)


def lightning(x: dict[str, Tensor]) -> Tensor:
    return lightning_attention(x["q"], x["k"], x["v"], -x["head"])  # type: ignore[return-value]


# name -> (chunked, {what it is compared with: (name of that computation, the call)})
Others = dict[str, tuple[str, Call]]
WAYS: dict[str, tuple[Call, Others]] = {
    "no decay": (chunked(), {"loop": ("loop", loop()), "square": ("square", square())}),
    "decay per head": (
        chunked("head"),
        {"loop": ("loop head", loop("head")), "square": ("square head", square("head"))},
    ),
    "decay per head (lightning)": (
        lightning,
        {"loop": ("loop head", loop("head")), "square": ("square head", square("head"))},
    ),
    "decay per token": (
        chunked("token"),
        {"loop": ("loop token", loop("token")), "square": ("square token", square("token"))},
    ),
    "decay per channel": (chunked("channel"), {"loop": ("loop channel", loop("channel"))}),
    "delta rule": (chunked(beta=True), {"loop": ("loop delta", loop(beta=True))}),
    "delta rule, decay per token": (chunked("token", True), {"loop": ("loop both", loop("token", True))}),
}


def seconds(call: Call, x: dict[str, Tensor]) -> float:
    """Forward and backward."""
    started = time.perf_counter()
    out = call(x)
    torch.autograd.grad(out.sum(), [t for t in x.values() if t.requires_grad], allow_unused=True)
    return time.perf_counter() - started


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes, nothing written.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of the comparison.")
def main(quick: bool, rounds: int) -> None:
    """Compare, then grow."""
    n = 512 if quick else 8192
    lengths = [256, 512, 1024] if quick else [2**e for e in range(10, 19)]
    machine = {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "torch": torch.__version__,
        "commit": commit() or "",
    }
    rows: list[dict[str, object]] = []

    stem = (
        "linear_scan-"
        + "_".join(machine["cpu"].lower().replace("(r)", "").split()[:2])
        + f"-t{machine['cores']}"
    )

    def keep() -> None:
        """All rows so far."""
        if quick:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, [*dict.fromkeys(key for row in rows for key in row), *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
        write_atomic(RESULTS / f"{stem}.csv", text.getvalue())

    curves: dict[str, list[float]] = {}
    for name, call in [*((name, way[0]) for name, way in WAYS.items()), ("softmax (SDPA)", softmax)]:
        most = 2**14 if call is softmax else lengths[-1]
        used = [length for length in lengths if length <= most]
        curves[name] = []
        for length in used:
            x = inputs(length)
            repeats = max(2, min(9, round(2**16 / length)))
            curves[name].append(statistics.median([seconds(call, x) for _ in range(repeats + 1)][1:]))
        grown = slope(name, used, curves[name])
        per = [1e6 * s / length for s, length in zip(curves[name], used, strict=True)]
        click.echo(f"{name}: exponent {grown.value:.3f} ({grown.low:.3f} to {grown.high:.3f}); us per token "
                   + ", ".join(f"{length}: {p:.2f}" for length, p in zip(used, per, strict=True)))  # fmt: skip
        for length, s in zip(used, curves[name], strict=True):
            rows.append({
                "way": name, "tokens": length, "seconds": f"{s:.4g}", "us_per_token": f"{1e6 * s / length:.3g}",
                "exponent": f"{grown.value:.3f}", "low": f"{grown.low:.3f}", "high": f"{grown.high:.3f}",
            })  # fmt: skip
    keep()
    if not quick:
        draw(curves, lengths, RESULTS / f"{stem}.png", f"{machine['cpu']}, {machine['cores']} threads")

    x = inputs(n)
    naive: dict[str, list[float]] = {}  # of ways that share a loop or a square, measured once
    softmax_times = [seconds(softmax, x) for _ in range(rounds + 1)][1:]
    for name, (fast, others) in WAYS.items():
        first = seconds(fast, x)
        times = [seconds(fast, x) for _ in range(2 * rounds + 1)]
        for label, call in others.values():
            if label not in naive:
                naive[label] = [seconds(call, x) for _ in range(rounds)]
        typical = statistics.median(times)
        found: dict[str, object] = {
            "way": name, "tokens": n, "seconds": f"{typical:.4g}", "first_call": f"{first:.4g}",
            "sdpa_over_chunked": f"{statistics.median(softmax_times) / typical:.3g}",
            "state_bytes": HEADS * DIM * DIM * 4,
        }  # fmt: skip
        for who, (label, _) in others.items():
            found[f"{who}_over_chunked"] = f"{statistics.median(naive[label]) / typical:.3g}"
        rows.append(found)
        click.echo(", ".join(f"{key} {value}" for key, value in found.items()))
        keep()


def draw(curves: dict[str, list[float]], lengths: list[int], path: Path, where: str) -> None:
    """Microseconds per token over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, times in curves.items():
        used = lengths[: len(times)]
        style = {"color": "0.6", "linestyle": "--"} if name.startswith("softmax") else {}
        per = [1e6 * s / length for s, length in zip(times, used, strict=True)]
        axes.plot(used, per, marker="o", markersize=3, label=name, **style)  # type: ignore[arg-type]
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds per token, forward and backward",
             title=f"Linear attention by chunks, {HEADS} heads of {DIM}, float32\n{where}")  # fmt: skip
    ticks = [length for length in lengths if math.log2(length) % 2 == 0]
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
