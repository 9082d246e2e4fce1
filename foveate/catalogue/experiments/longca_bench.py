"""The kernel half of LongCA-bench: one harness over its masks, run several times, on two engines."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from foveate import patterns
from foveate.bench.kernels_masks import MASKS, SWEEP
from foveate.bench.kernels_measure import Guards, measure
from foveate.bench.kernels_peers import Cell, boolean_mask
from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    FAILS,
    HOLDS,
    Figure,
    Finding,
    Lab,
    all_of,
    interval,
    lines,
    series,
    spearman,
)

ENGINES = ("sdpa_mask", "native")
NAMES = tuple(name for name in SWEEP if name not in ("full", "causal"))  # SDPA needs no mask for these two
COUNTS_IF = (
    "Over 18 masks of 4096 tokens, forward, in each of three passes: both engines run every mask and give the same "
    "result (the run stops otherwise); the pairs counted from the layout are those of the dense mask; the block-sparse "
    "engine's speed-up over SDPA with the dense mask ranks like 1 / density (Spearman above 0.9); and any two passes "
    "rank the block-sparse engine's times alike (Spearman above 0.95)."
)


def run(lab: Lab) -> Finding:
    """Does one harness compare attention kernels over mask shapes reproducibly, so that a mask's speed-up follows from
    its density? (Kernels only; context parallelism is not built.)"""
    n = lab.pick(4096, 1024)
    names = lab.pick(NAMES, NAMES[::5])
    rounds, passes = lab.pick(5, 3), []
    for turn in range(len(lab.seeds)):
        listed = lab.track(names, f"pass {turn + 1}")
        passes.append([lab.once(f"{name}-{turn}", lambda name=name: one(name, n, rounds)) for name in listed])
    sparse = [1 / row["density"] for row in passes[0]]
    speed = [[row["sdpa_mask"] / row["native"] for row in rows] for rows in passes]
    times = [[row["native"] for row in rows] for rows in passes]
    follows = [
        spearman(f"rank correlation of speed-up and 1 / density, pass {i + 1}", sparse, found)
        for i, found in enumerate(speed)
    ]
    again = [
        spearman(f"rank correlation of times, passes {a + 1} and {b + 1}", times[a], times[b])
        for a, b in combinations(range(len(passes)), 2)
    ]
    counted = sum(row["counted"] for rows in passes for row in rows)
    met = [
        counted == len(passes) * len(names),
        *(f.value > 0.9 for f in follows),
        *(f.value > 0.95 for f in again),
    ]
    order = sorted(range(len(names)), key=lambda i: (sparse[i], names[i]))  # densest first
    shown = [interval(f"speed-up, {names[i]}", [found[i] for found in speed], "x") for i in order]
    low, high = ([edge for f in shown if (edge := getattr(f, side)) is not None] for side in ("low", "high"))
    agree = f"passes agree with {min(f.value for f in again):.3f} or more" if again else "one pass was made"
    return Finding(
        question="Does one harness compare attention kernels over mask shapes reproducibly, so that a mask's speed-up "
        "follows from its density? (Kernels only: context parallelism is not built.)",
        counts_if=COUNTS_IF,
        verdict=all_of(*(HOLDS if ok else FAILS for ok in met)),
        summary=f"Over {len(names)} masks the speed-up ranks like 1 / density (Spearman "
        f"{min(f.value for f in follows):.3f} or more), from {shown[0].value:.1f} to {shown[-1].value:.1f} times; "
        f"{agree}.",
        figures=(
            *follows,
            *again,
            Figure("masks whose pairs are counted right, of all passes", counted, n=len(passes) * len(names)),
            spearman(
                "rank correlation of speed-up and 1 / share of tiles visited",
                [1 / passes[0][i]["tile_share"] for i in order],
                [f.value for f in shown],
            ),
            *shown,
        ),
        plot=lines(
            f"{n} tokens, {len(names)} masks, mean of {len(passes)} passes",
            "1 / density of the mask",
            "times as fast as SDPA with the dense mask",
            [
                series(
                    "block-sparse engine",
                    [sparse[i] for i in order],
                    [f.value for f in shown],
                    low or None,
                    high or None,
                ),
                series("in proportion", [1, 32], [shown[0].value, 32 * shown[0].value], reference=True),
            ],
            log_x=True,
            log_y=True,
        ),
    )


def one(name: str, n: int, rounds: int) -> dict[str, Any]:
    """One mask in the harness: milliseconds of both engines, and whether the pairs are counted right."""
    cell = Cell(name, n, heads=2, kv_heads=2)
    rows: dict[str, dict[str, Any]] = {}
    for engine, row in zip(ENGINES, measure(cell, ENGINES, [], guards=Guards(rounds=rounds)), strict=True):
        if row["status"] != "ok":
            raise RuntimeError(f"{cell.name}: {engine}: {row['status']}")
        rows[engine] = row
    mask_mod = MASKS[name](n, "cpu")[1]
    assert mask_mod is not None
    pairs = int(boolean_mask(mask_mod, n, n, "cpu").sum())
    about = {column: rows["native"][column] for column in ("density", "tile_share")}
    times = {engine: row["step_time"] for engine, row in rows.items()}
    return {"counted": rows["native"]["area"] == pairs, **about, **times}


SHOWN = {  # mask: code, of a line of 64 tokens; ids, prefix, blocks and the tables are made in `picture`
    "causal": "Causal()",
    "sliding window": "SlidingWindow(before=7, after=7)",
    "causal sliding window": "Causal() & SlidingWindow(8)",
    "documents": "Documents(ids)",
    "causal documents": "Causal() & Documents(ids)",
    "shared question": "SharedQuestion([17, 9, 12, 26])",
    "causal blockwise": "Causal() & Regions(ids, last_sees_all)",
    "prefix LM": "PrefixLM(16)",
    "prefix LM in documents": "Documents(ids) & (Causal() | KeyPadding(prefix))",
    "global and sliding": "GlobalTokens(4) | SlidingWindow(before=7, after=7)",
    "block-causal documents": "Regions(blocks, earlier_blocks)",
    "neighbourhood, 8 x 8": "Neighborhood((8, 8), 3)",
    "neighbourhood, 4 x 4 x 4": "Neighborhood((4, 4, 4), 3)",
    "random blocks": "Random(0.25, block=4)",
}


def picture() -> dict[str, Any]:
    """The masks, small: documents of 17, 9, 12 and 26 tokens, half of each its prefix, in blocks of 4."""
    places = [(document, i, length) for document, length in enumerate((17, 9, 12, 26)) for i in range(length)]
    of_block = sorted({(document, i // 4) for document, i, _ in places})
    names = vars(patterns) | {
        "ids": [document for document, _, _ in places],
        "prefix": [i < length // 2 for _, i, length in places],
        "blocks": [of_block.index((document, i // 4)) for document, i, _ in places],
        "last_sees_all": [[q in (k, 3) for k in range(4)] for q in range(4)],
        "earlier_blocks": [[q[0] == k[0] and q >= k for k in of_block] for q in of_block],
    }
    return pictures.pairs(
        "The masks of the benchmark on 64 tokens; documents have 17, 9, 12 and 26 tokens, half of each is its prefix, "
        "blocks have 4.",
        [({"mask": name}, eval(code, dict(names)), code) for name, code in SHOWN.items()],
        tokens=64,
    )
