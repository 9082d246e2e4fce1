"""What selectors recall of the attention of `reader` at equal density, against window + sinks and random blocks.

    .venv/bin/python benchmarks/reader_recall.py            # 9 held-out texts of 4,096 bytes; CSV into results
    .venv/bin/python benchmarks/reader_recall.py --quick    # 4 of 1,024 bytes, nothing written

Queries and keys are those of all layers of the dense model. Attention recall is the share of the dense softmax on the
kept pairs, in rows drawn by seed, mean over layers and heads. Window + sinks and random blocks have the density asked
for; every selector keeps at most as many: on the first text its knob is bisected on one layer, and from there, or from
where it stood on the text before, it is turned down until all layers together keep few enough.

The first third of the texts names the best selector (the oracle, which computes the whole map, does not take part); the
others compare it with the controls. Differences are paired by text, with Student's 95 % interval.

Two CSV files: a row per text, density and mechanism; and a row per difference. Environment columns in both.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.bench import mechanisms as mechs
from foveate.bench.machine import environment
from foveate.bench.recall import Sample, attention_recall, sampled_rows, samples
from foveate.bench.results import write_atomic
from foveate.bench.subject import Subject, load_subject
from foveate.bench.texts import load_text
from foveate.catalogue.lab.stats import difference, interval
from foveate.core.layout import BlockLayout
from foveate.core.patterns import Pattern
from foveate.core.selectors.base import Selector

HERE = Path(__file__).parent
CONTROLS = ("sliding_sinks", "random")
ORACLE = "oracle"
ROWS, SLACK = 128, 1.005  # a selector may keep half a percent more than was asked for


def layouts_of(policy: Any, taken: list[Sample]) -> list[BlockLayout]:
    """One layout per layer."""
    if isinstance(policy, Pattern):
        return [policy.layout(taken[0].q.shape[2])] * len(taken)
    return [policy.layout(s.q, s.k, scale=s.scale, is_causal=True) for s in taken]


def density_of(layouts: list[BlockLayout]) -> float:
    return statistics.fmean(mechs.density_of(layout) for layout in layouts)


def at_most(
    built: mechs.Built, density: float, taken: list[Sample], start: float | None = None
) -> tuple[mechs.Built, list[BlockLayout], float] | None:
    """A setting of a selector that keeps at most the density, its layouts, and where its knob stands.

    The knob is turned down from ``start``, or from a little above what a bisection on the first layer gives. Where the
    knob is a number of blocks, it is the largest. None where none is found.
    """
    if built.tune is not None:
        tune = built.tune
        step = (tune.high - tune.low) / 64
        if start is None:
            low, high = tune.low, tune.high
            for _ in range(tune.steps):
                middle = (low + high) / 2
                few = density_of(layouts_of(tune.make(middle).policy, taken[:1])) <= density
                low, high = (middle, high) if few else (low, middle)
            start = low + 2 * step
        for setting in (start - i * step for i in range(12)):
            made = tune.make(min(max(setting, tune.low), tune.high))
            layouts = layouts_of(made.policy, taken)
            if density_of(layouts) <= density * SLACK:
                return made, layouts, setting
        return None
    for keep in range(built.policy.keep, 0, -1):  # as many blocks whatever the content and the score
        cheap = replace(built.policy, keep=keep, score="mean")
        if density_of(layouts_of(cheap, taken[:1])) <= density * SLACK:
            policy = replace(built.policy, keep=keep)
            return mechs.Built(policy, repr(policy), {"keep": keep}), layouts_of(policy, taken), 0.0
    return None


def one_text(
    subject: Subject,
    ids: torch.Tensor,
    names: list[str],
    densities: list[float],
    seed: int,
    settings: dict[tuple[str, float], float] | None = None,
) -> list[dict[str, Any]]:
    """Rows of all mechanisms at all densities on one text; ``settings`` of the knobs are read and kept for the next."""
    settings = {} if settings is None else settings
    n = len(ids)
    taken = samples(subject.model, ids, 1 << 10, seed)
    rows, out = sampled_rows(n, ROWS, seed), []
    tiles = mechs.causal_tiles(n)
    for density in densities:
        for name in names:
            built = mechs.policy(name, n, density, subject.shape, seed)
            if isinstance(built.policy, Selector):
                found = at_most(built, density, taken, settings.get((name, density)))
                if found is None:
                    continue
                built, layouts, settings[name, density] = found
            else:
                layouts = layouts_of(built.policy, taken)
            kept = [
                float(attention_recall(s.q, s.k, layout, rows=rows, scale=s.scale).mean())
                for s, layout in zip(taken, layouts, strict=True)
            ]
            out.append(
                {
                    "density_asked": density,
                    "mechanism": name,
                    "recall": statistics.fmean(kept),
                    "density": density_of(layouts),
                    "tiles": statistics.fmean(x.nnz / (x.batch * x.heads * tiles) for x in layouts),
                    "least_layer": min(kept),
                    "policy": built.text,
                }
            )
    return out


def compared(rows: list[dict[str, Any]], densities: list[float]) -> list[dict[str, Any]]:
    """Paired differences of the best selector (named on the texts "choose") to the others on the texts "test"."""
    out = []
    for density in densities:
        held_by: dict[tuple[str, str], list[float]] = {}
        for r in sorted(rows, key=lambda r: r["text"]):
            if r["density_asked"] == density:
                held_by.setdefault((r["mechanism"], r["role"]), []).append(r["recall"])
        names = list(dict.fromkeys(name for name, _ in held_by))
        clever = [
            name
            for name in names
            if name not in (*CONTROLS, ORACLE)
            # on every text: some have no setting with so few pairs
            and all(
                len(held_by.get((name, x), [])) == len(held_by[CONTROLS[0], x]) for x in ("choose", "test")
            )
        ]
        if not clever:
            continue
        best = max(clever, key=lambda name: statistics.fmean(held_by[name, "choose"]))
        held = held_by[best, "test"]
        level = interval(best, held)
        for other in [name for name in names if name != best]:
            theirs = held_by.get((other, "test"), [])
            if len(theirs) != len(held):
                continue
            gain = difference(f"{best} - {other}", held, theirs)
            out.append(
                {
                    "density_asked": density,
                    "best": best,
                    "best_recall": level.value,
                    "other": other,
                    "other_recall": statistics.fmean(theirs),
                    "difference": gain.value,
                    "low": gain.low,
                    "high": gain.high,
                    "texts": len(held),
                    "wins": sum(a > b for a, b in zip(held, theirs, strict=True)),
                }
            )
    return out


def write_csv(rows: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    where = {key: " ".join(value) if isinstance(value, list) else value for key, value in where.items()}
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*rows[0], *where])
    for row in rows:
        cells = [f"{x:.6f}" if isinstance(x, float) else "" if x is None else x for x in row.values()]
        writer.writerow([*cells, *where.values()])
    write_atomic(path, out.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="bytes per text, default %(default)s")
    parser.add_argument(
        "--texts", type=int, default=9, help="default %(default)s; a third names the best selector"
    )
    parser.add_argument(
        "--densities", default="0.12,0.25", help="shares of the causal pairs, default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument(
        "--quick", action="store_true", help="4 texts of 1,024 bytes at 30 %%, nothing written"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="two CSV files")
    a = parser.parse_args(argv)
    try:
        densities = [float(x) for x in a.densities.split(",")]
    except ValueError:
        parser.error(f"--densities {a.densities}: accepted numbers, as in 0.12,0.25")
    length, texts = (1024, 4) if a.quick else (a.length, a.texts)
    densities = [0.3] if a.quick else densities
    if texts < 4 or not 512 <= length <= 4096 or min(densities) < 0.05 or max(densities) > 0.9:
        parser.error("accepted: --texts 4 or more, --length 512 to 4096, --densities 0.05 to 0.9")
    if a.threads:
        torch.set_num_threads(a.threads)
    began = time.perf_counter()
    subject, data = load_subject("reader"), load_text("stdlib").data
    names = [
        m.name for m in mechs.MECHANISMS
        if m.name in CONTROLS
        or (m.name != "dense" and isinstance(mechs.policy(m.name, length, 0.25, subject.shape).policy, Selector))
    ]  # fmt: skip
    starts = (
        np.random.default_rng([a.seed, length]).choice(len(data) // length, size=texts, replace=False)
        * length
    )
    rows: list[dict[str, Any]] = []
    settings: dict[tuple[str, float], float] = {}
    for number, start in enumerate(starts.tolist()):
        ids = torch.tensor(list(data[start : start + length]))
        role = "choose" if number < texts // 3 else "test"
        head = {"text": number, "role": role, "start": start, "length": length, "seed": a.seed + number}
        rows += [
            {**head, **row} for row in one_text(subject, ids, names, densities, a.seed + number, settings)
        ]
        print(f"text {number + 1}/{texts}, {time.perf_counter() - began:.0f} s", flush=True)
    found = compared(rows, densities)
    for density in densities:
        for name in names:
            mine = [r for r in rows if (r["density_asked"], r["mechanism"]) == (density, name)]
            if mine:
                shares = ", ".join(
                    f"{key} {statistics.fmean(r[key] for r in mine):.4f}"
                    for key in ("recall", "density", "tiles")
                )
                print(f"{density:.0%} {name:<16} {shares}")
    for row in found:
        print(
            f"{row['density_asked']:.0%} {row['best']} - {row['other']}: {row['difference']:+.4f} "
            f"[{row['low']:+.4f}, {row['high']:+.4f}] on {row['texts']} texts"
        )
    if not a.quick:
        where = environment()
        name = re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((r|tm|c)\)", " ", where["cpu"].lower())).strip("_")
        a.out.mkdir(parents=True, exist_ok=True)
        path = a.out / f"reader_recall-{name}-t{where['threads']}.csv"
        write_csv(rows, where, path)
        write_csv(found, where, path.with_name(path.name.replace("recall-", "recall_differences-", 1)))
        print(f"written: {path} and its differences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
