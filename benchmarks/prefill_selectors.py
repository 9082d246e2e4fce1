"""Ways of restricting a long prefill, end to end: seconds with the selection included, and attention recall.

    .venv/bin/python benchmarks/prefill_selectors.py --quick      # 1k and 2k tokens, nothing written
    .venv/bin/python benchmarks/prefill_selectors.py --resume     # 4k ... 128k tokens; goes on after a kill

B=1, 8 query heads on 2 key/value heads, D=64, float32, causal. Queries and keys are made up: a near band and, for each
key/value head, 16 heavy keys at random places that every query of the head wants (`structured_qkv`).

Every round runs the dense native causal engine once and every mechanism once, each round in another order, so that a
machine whose speed drifts slows all alike; the speed-up is the median over rounds of dense / mechanism. Seconds are
those of a call from q, k, v to the output, choosing included; the very first call of each is kept apart. Patterns that
do not depend on the content keep their layout from the first call on.

Recall: the share of the dense softmax on the kept pairs, in rows drawn by seed, against exact whole rows. The output
error is that of the same rows, |out - dense| / |dense|. Density: kept pairs and visited 64 x 64 tiles over the causal
ones. The exponent is the slope of log seconds over log tokens with its 95 % interval (Student, over the lengths).

A new mechanism is one line of `ARMS`. What this version of the library does not have is left out and named.
Results, saved after every round: JSON (everything), CSV (a row per mechanism and length), PNG.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import io
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.bench.machine import commit, environment
from foveate.bench.recall import attention_recall, sampled_rows
from foveate.bench.results import write_atomic
from foveate.catalogue.lab.stats import slope
from foveate.catalogue.lab.tasks import generator, structured_qkv
from foveate.core.layout import BlockLayout
from foveate.patterns import Causal, PowerOfTwo, Random, Shards, Sinks, SlidingWindow
from foveate.selectors import FlexPrefill, TopBlocks

HERE = Path(__file__).parent
HEADS, KV_HEADS, DIM = 8, 2, 64
HITTERS, LOCAL, STRENGTH = 16, 10.0, 14.0
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
ROUNDS = {4096: 7, 8192: 7, 16384: 5, 32768: 5, 65536: 3, 131072: 2}
ROWS = 64
TARGET_AT, TARGET_SPEED, TARGET_RECALL, TARGET_EXPONENT = 32768, 3.0, 0.95, 1.5


# -------------------- the table


@dataclass(frozen=True)
class Arm:
    """A mechanism.

    ``make(n)``: a `Way` for n tokens. ``linear``: it claims a cost that grows less than quadratically. ``needs``: names
    that must exist, as "module:name". ``most``: the longest length at which it is run. ``note``: what to know of it.
    """

    name: str
    make: Callable[[int], Way]
    linear: bool = True
    needs: str = ""
    most: int = 1 << 40
    note: str = ""

    def missing(self) -> bool:
        if not self.needs:
            return False
        module, _, name = self.needs.partition(":")
        try:
            return not hasattr(importlib.import_module(module), name)
        except ImportError:
            return True


@dataclass(frozen=True)
class Way:
    """``choose(q, k)`` gives what ``attend(q, k, v, chosen)`` needs; both are timed, the first also by itself.

    ``kept(q, k, v, chosen)``: a layout, or the log sum exp (1, H, N) of the kept logits, or None where no set of pairs
    is kept; and the pairs and tiles that are computed (None: those of the layout).
    """

    choose: Callable[[Tensor, Tensor], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    kept: Callable[[Tensor, Tensor, Tensor, Any], tuple[BlockLayout | Tensor | None, int | None, int | None]]


def by_layout(choose: Callable[[Tensor, Tensor], Any]) -> Way:
    """What `foveate.attention` does with a pattern or a layout."""

    def kept(q: Tensor, k: Tensor, v: Tensor, chosen: Any):
        return chosen if isinstance(chosen, BlockLayout) else chosen.layout(q.shape[2]), None, None

    return Way(choose, lambda q, k, v, who: fv.attention(q, k, v, who, engine="native"), kept)


def pattern(who) -> Way:
    return by_layout(lambda q, k: who)


def selector(chosen) -> Way:
    return by_layout(chosen.layout)


def in_one_call(
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    lse: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    pairs: Callable[[Tensor, Tensor], int] | None = None,
) -> Way:
    """A mechanism with its own way to compute, which gathers keys: choosing is not timed apart."""

    def kept(q: Tensor, k: Tensor, v: Tensor, _: Any):
        return None if lse is None else lse(q, k, v), None if pairs is None else pairs(q, k), None

    return Way(lambda q, k: None, lambda q, k, v, _: call(q, k, v), kept)


def _of(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def random_blocks(n: int) -> Way:
    """As many tiles in every row as `blocks_mean` has, at random places."""
    g = generator(0)
    q, k = (torch.randn(1, 1, n, 1, generator=g) for _ in range(2))
    return pattern(Causal() & Random.matching(TopBlocks(64, KEEP).layout(q, k).expand(1, HEADS), seed=0))


def anchor(n: int) -> Way:
    choose, call = _of("foveate.selectors:AnchorAttention"), _of("foveate.selectors:anchor_attention")
    settings = {"block": 64, "step": 4, "theta": 3.0, "init": 64}
    chooser = choose(**settings)

    def pairs(q: Tensor, k: Tensor) -> int:
        return chooser.stripes(q, k).area + HEADS * chooser.anchors.layout(n).area

    return in_one_call(
        lambda q, k, v: call(q, k, v, **settings),
        lambda q, k, v: call(q, k, v, return_lse=True, **settings)[1],
        pairs,
    )


def hyper(n: int) -> Way:
    return in_one_call(_of("foveate.composite:HyperAttention")(is_causal=True, min_seq_len=2048))


def hip(n: int) -> Way:
    chooser = _of("foveate.selectors:HiP")(
        keys=1024, block_q=256, stride_q=16, block_k=8, sink=64, window=512
    )
    call = _of("foveate.selectors:hip_attention")
    return in_one_call(
        lambda q, k, v: call(q, k, v, chooser), lambda q, k, v: call(q, k, v, chooser, return_lse=True)[1]
    )


def dhsa(n: int) -> Way:
    chooser = _of("foveate.selectors:DHSA")(
        budget=1024, local=128, sink=64, chunk=2, per_head="kv", instruction=0
    )
    call = _of("foveate.selectors:dhsa_attention")
    return in_one_call(
        lambda q, k, v: call(q, k, v, chooser), lambda q, k, v: call(q, k, v, chooser, return_lse=True)[1]
    )


KEEP = 24
NEAR = Causal() & (SlidingWindow(512) | Sinks(64))
ARMS = (
    Arm("window + sinks", lambda n: pattern(NEAR), note="control"),
    Arm("random blocks", random_blocks, note="control, as many tiles as blocks by mean"),
    Arm(
        "power of two",
        lambda n: pattern(Causal() & (PowerOfTwo(64) | SlidingWindow(512) | Sinks(64))),
    ),
    Arm(
        "shards",
        lambda n: pattern(
            Causal() & (Shards(64, 1, 16, layouts=HEADS, require_coverage=False) | SlidingWindow(512))
        ),
        linear=False,
    ),
    Arm("FlexPrefill", lambda n: selector(FlexPrefill(64, gamma=0.95, min_budget=3072)), linear=False),
    Arm("blocks by mean", lambda n: selector(TopBlocks(64, KEEP, "mean", local=2)), linear=False),
    Arm("blocks by bounds", lambda n: selector(TopBlocks(64, KEEP, "bounds", local=2)), linear=False),
    Arm("blocks by peak", lambda n: selector(TopBlocks(64, KEEP, "peak", local=2)), linear=False),
    Arm("AnchorAttention", anchor, linear=False, needs="foveate.selectors:anchor_attention"),
    Arm(
        "HyperAttention",
        hyper,
        needs="foveate.composite:HyperAttention",
        note="estimates the rest: no recall",
    ),
    Arm("DHSA", dhsa, linear=False, needs="foveate.selectors:dhsa_attention"),
    Arm("HiP", hip, needs="foveate.selectors:hip_attention"),
    Arm(
        "oracle blocks",
        lambda n: selector(TopBlocks(64, KEEP, "mass", local=2)),
        linear=False,
        most=8192,
        note="upper bound, computes the whole map",
    ),
)
BY_NAME = {arm.name: arm for arm in ARMS}


# -------------------- measuring


@dataclass(frozen=True)
class Settings:
    """What makes two runs one; a resumed run must have the same."""

    lengths: tuple[int, ...]
    arms: tuple[str, ...]
    rounds: tuple[int, ...]
    seed: int = 0
    threads: int = 2


@functools.lru_cache(maxsize=1)
def data(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return structured_qkv(
        n, HEADS, KV_HEADS, DIM, generator(seed), hitters=HITTERS, local=LOCAL, strength=STRENGTH
    )


def timed(way: Way, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float]:
    """(seconds of choosing, seconds of the whole call)"""
    start = time.perf_counter()
    chosen = way.choose(q, k)
    middle = time.perf_counter()
    way.attend(q, k, v, chosen)
    return middle - start, time.perf_counter() - start


DENSE = Way(
    lambda q, k: None,
    lambda q, k, v, _: fv.attention(q, k, v, is_causal=True, engine="native"),
    lambda q, k, v, _: (None, None, None),
)


def dense_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Exact causal attention of some rows, in float64 from float32 logits: out (1, H, R, D), lse (1, H, R)."""
    groups = q.shape[1] // k.shape[1]
    out, lse = [], []
    for h in range(q.shape[1]):
        logits = (q[:, h, rows] @ k[:, h // groups].mT * q.shape[3] ** -0.5).double()  # (1, R, M)
        logits.masked_fill_(torch.arange(k.shape[2]) > rows[:, None], -torch.inf)
        lse.append(logits.logsumexp(-1))
        out.append(logits.softmax(-1) @ v[:, h // groups].double())
    return torch.stack(out, 1), torch.stack(lse, 1)


def quality(way: Way, q: Tensor, k: Tensor, v: Tensor, seed: int) -> dict[str, float | None]:
    """Recall (mean, least head), output error, densities; and the seconds of the first call."""
    n = q.shape[2]
    start = time.perf_counter()
    chosen = way.choose(q, k)
    out = way.attend(q, k, v, chosen)
    first = time.perf_counter() - start
    rows = sampled_rows(n, ROWS, seed)
    want, whole = dense_rows(q, k, v, rows)
    error = float((out[:, :, rows].double() - want).norm() / want.norm())
    held, pairs, tiles = way.kept(q, k, v, chosen)
    recall = None
    if isinstance(held, BlockLayout):
        recall = attention_recall(q, k, held, rows=rows)
        share = HEADS / (held.batch * held.heads)
        pairs, tiles = round(held.area * share), round(held.nnz * share)
    elif held is not None:
        recall = (held[:, :, rows].double() - whole).exp()
    t = -(-n // 64)
    return {
        "first_seconds": first,
        "recall": None if recall is None else float(recall.mean()),
        "recall_least_head": None if recall is None else float(recall.mean((0, 2)).min()),
        "output_error": error,
        "density_pairs": None if pairs is None else pairs / (HEADS * n * (n + 1) / 2),
        "density_tiles": None if tiles is None else tiles / (HEADS * t * (t + 1) / 2),
    }


def measure(s: Settings, state: dict[str, Any], save: Callable[[], None], say: Callable[[str], None]) -> None:
    """Fill in what is missing of `state`: {"quality": {name: {n: ..}}, "rounds": [{n, round, seconds}]}."""
    for n, rounds in zip(s.lengths, s.rounds, strict=True):
        arms = [BY_NAME[name] for name in s.arms if BY_NAME[name].most >= n]
        done = sum(r["n"] == n for r in state["rounds"])
        missing = [arm for arm in arms if str(n) not in state["quality"].setdefault(arm.name, {})]
        if done == rounds and not missing:
            continue
        q, k, v = data(n, s.seed)
        ways = {arm.name: arm.make(n) for arm in arms}
        for arm in missing:
            found = state["quality"][arm.name][str(n)] = quality(ways[arm.name], q, k, v, s.seed)
            save()
            say(f"{n} {arm.name}: {describe(found)}")
        warm = [name for name in ways if BY_NAME[name] not in missing]
        for name in warm:  # after a restart the caches are cold
            timed(ways[name], q, k, v)
        every = {"dense": DENSE, **ways}
        names = list(every)
        for number in range(done, rounds):
            turn = number * 3 % len(names)
            seconds = {name: timed(every[name], q, k, v) for name in names[turn:] + names[:turn]}
            state["rounds"].append({"n": n, "round": number, "seconds": seconds})
            save()
            say(f"{n} round {number + 1}/{rounds}: dense {seconds['dense'][1]:.3g} s")


def describe(found: dict[str, float | None]) -> str:
    parts = [f"first call {found['first_seconds']:.3g} s"]
    for key, name in (("recall", "recall"), ("output_error", "error"), ("density_tiles", "tiles")):
        if found[key] is not None:
            parts.append(f"{name} {found[key]:.3f}")
    return ", ".join(parts)


# -------------------- results


def rows_of(s: Settings, state: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per mechanism and length; the exponent is that of the mechanism, over all its lengths."""
    out = []
    for name in ("dense", *s.arms):
        mine = []
        for n in s.lengths:
            rounds = [r["seconds"] for r in state["rounds"] if r["n"] == n and name in r["seconds"]]
            if not rounds:
                continue
            total = [r[name][1] for r in rounds]
            ratio = [r["dense"][1] / r[name][1] for r in rounds]
            found = state["quality"].get(name, {}).get(str(n), {})
            mine.append(
                {
                    "mechanism": name,
                    "n": n,
                    "seconds": statistics.median(total),
                    "seconds_least": min(total),
                    "seconds_most": max(total),
                    "select_seconds": statistics.median(r[name][0] for r in rounds),
                    "first_seconds": found.get("first_seconds"),
                    "dense_seconds": statistics.median(r["dense"][1] for r in rounds),
                    "speedup": statistics.median(ratio),
                    "speedup_least": min(ratio),
                    "speedup_most": max(ratio),
                    "recall": 1.0 if name == "dense" else found.get("recall"),
                    "recall_least_head": 1.0 if name == "dense" else found.get("recall_least_head"),
                    "output_error": 0.0 if name == "dense" else found.get("output_error"),
                    "density_pairs": 1.0 if name == "dense" else found.get("density_pairs"),
                    "density_tiles": 1.0 if name == "dense" else found.get("density_tiles"),
                    "rounds": len(rounds),
                }
            )
        fit = None
        if len(mine) >= 3:
            fit = slope(name, [row["n"] for row in mine], [row["seconds"] for row in mine])
        for row in mine:
            row["exponent"] = None if fit is None else fit.value
            row["exponent_low"] = None if fit is None else fit.low
            row["exponent_high"] = None if fit is None else fit.high
            row["claims_below_quadratic"] = name != "dense" and BY_NAME[name].linear
        out += mine
    return out


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What was aimed at, and whether it was reached, in lines."""
    at = [r for r in rows if r["n"] == TARGET_AT and r["mechanism"] != "dense"]
    good = [r for r in at if (r["recall"] or 0) >= TARGET_RECALL and r["speedup"] >= TARGET_SPEED]
    lines = [
        f"{len(good)} of {len(at)} mechanisms are at least {TARGET_SPEED:g} times as fast as dense at {TARGET_AT} "
        f"tokens with a recall of at least {TARGET_RECALL:g} (aimed at: 5)"
    ]
    lines += [f"  {r['mechanism']}: {r['speedup']:.1f} times, recall {r['recall']:.3f}" for r in good]
    fits = {r["mechanism"]: r for r in rows if r["exponent"] is not None}
    for name, r in fits.items():
        claim = ""
        if r["claims_below_quadratic"]:
            claim = ": below 1.5" if r["exponent"] < TARGET_EXPONENT else ": NOT below 1.5"
        lines.append(
            f"exponent of {name}: {r['exponent']:.2f} [{r['exponent_low']:.2f}, {r['exponent_high']:.2f}]{claim}"
        )
    return lines


def write_csv(rows: list[dict[str, Any]], s: Settings, where: dict[str, Any], path: Path) -> None:
    where = {key: " ".join(value) if isinstance(value, list) else value for key, value in where.items()}
    where.pop("transformers", None)
    given = {
        "batch": 1, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "dtype": "float32", "hitters": HITTERS,
        "local": LOCAL, "strength": STRENGTH, "seed": s.seed,
    }  # fmt: skip
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*rows[0], *given, *where])
    for row in rows:
        cells = [f"{x:.6g}" if isinstance(x, float) else "" if x is None else x for x in row.values()]
        writer.writerow([*cells, *given.values(), *where.values()])
    write_atomic(path, out.getvalue())


def draw(rows: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """Seconds against tokens, and recall against speed-up at the length that was aimed at (or the longest)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["mechanism"] for r in rows))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(n for n in names if n != "dense")}
    colours["dense"] = "0.2"
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    for name in names:
        mine = [r for r in rows if r["mechanism"] == name]
        slope_text = f"  {mine[0]['exponent']:.2f}" if mine[0]["exponent"] is not None else ""
        left.plot(
            [r["n"] for r in mine], [r["seconds"] for r in mine], "o-", ms=4, lw=2 if name == "dense" else 1.3,
            color=colours[name], label=name + slope_text,
        )  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("tokens")
    left.set_ylabel("seconds, choosing included (legend: exponent)")
    left.legend(frameon=False, fontsize=8)
    lengths = sorted({r["n"] for r in rows})
    at = TARGET_AT if TARGET_AT in lengths else lengths[-1]
    shown = sorted((r for r in rows if r["n"] == at and r["recall"] is not None), key=lambda r: r["speedup"])
    for place, r in enumerate(shown):
        right.scatter(r["speedup"], r["recall"], color=colours[r["mechanism"]], zorder=3)
        right.annotate(  # neighbours' names at four heights, so that they do not meet
            r["mechanism"],
            (r["speedup"], r["recall"]),
            xytext=(0, (-14, 16, -26, 7)[place % 4]),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    right.margins(x=0.12, y=0.1)
    right.axhline(TARGET_RECALL, color="#c44e52", lw=0.8)
    right.axvline(TARGET_SPEED, color="#c44e52", lw=0.8)
    right.set_xscale("log")
    right.set_xlabel(f"times as fast as dense at {at} tokens (red: what was aimed at)")
    right.set_ylabel("attention recall")
    for axis in (left, right):
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"B=1, {HEADS} heads on {KV_HEADS}, D={DIM}, float32, {where['cpu']}, {where['threads']} threads, torch "
        f"{where['torch']}, {where['date'][:10]}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=140)
    plt.close(figure)
    os.replace(temporary, path)


def machine_name(where: dict[str, Any]) -> str:
    name = re.sub(r"\((r|tm|c)\)", " ", where["cpu"].lower())
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") + f"-t{where['threads']}"


def open_state(path: Path, s: Settings, where: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The results so far; none without ``resume``, or where another commit or torch made them.

    Raises:
        ValueError: --resume of a run with other settings.
    """
    fresh = {"settings": json.loads(json.dumps(asdict(s))), "environment": where, "quality": {}, "rounds": []}
    if not (resume and path.is_file()):
        return fresh
    old = json.loads(path.read_text(encoding="utf-8"))
    moved = [key for key in ("commit", "torch") if old["environment"][key] != where[key]]
    if moved:
        print(f"{path} was made with another {' and '.join(moved)}: starting anew")
        return fresh
    changed = [key for key, value in fresh["settings"].items() if old["settings"].get(key) != value]
    if changed:
        raise ValueError(f"--resume: {path} was made with other {', '.join(changed)}")
    return old


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="", help="tokens, e.g. 4096,8192; default 4k to 128k")
    parser.add_argument("--arms", default="", help="comma-separated names; default all that are there")
    parser.add_argument("--rounds", type=int, default=0, help="rounds at every length; default 7 to 2")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="1k and 2k tokens, two rounds, nothing written")
    parser.add_argument("--resume", action="store_true", help="go on with the file in --out, if there is one")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="JSON, CSV and PNG")
    a = parser.parse_args(argv)
    try:
        asked = tuple(int(x) for x in a.lengths.split(",") if x)
    except ValueError:
        parser.error(f"--lengths {a.lengths}: accepted whole numbers, as in 4096,8192")
    lengths = asked or ((1024, 2048) if a.quick else LENGTHS)
    if min(lengths) < 1024 or list(lengths) != sorted(set(lengths)):
        parser.error(f"--lengths {a.lengths}: accepted rising numbers of at least 1024")
    if a.rounds < 0 or a.threads < 1 or a.seed < 0:
        parser.error("--rounds and --seed: accepted 0 or more; --threads: 1 or more")
    names = tuple(x.strip() for x in a.arms.split(",") if x.strip())
    wrong = [name for name in names if name not in BY_NAME]
    if wrong:
        parser.error(f"--arms {', '.join(wrong)}: accepted {', '.join(BY_NAME)}")
    absent = [arm.name for arm in ARMS if arm.missing() and (not names or arm.name in names)]
    if absent:
        print(f"not in this version, left out: {', '.join(absent)}")
    arms = tuple(name for name in names or BY_NAME if name not in absent)
    rounds = tuple(a.rounds or (2 if a.quick else ROUNDS.get(n, 3)) for n in lengths)
    torch.set_num_threads(a.threads)
    s = Settings(lengths, arms, rounds, a.seed, a.threads)
    where = {**environment(), "commit": commit("benchmarks/results")}
    path = a.out / f"prefill_selectors-{machine_name(where)}.json"
    try:
        state = open_state(path, s, where, a.resume and not a.quick)
    except ValueError as error:
        parser.error(str(error))
    where = state["environment"]

    def save() -> None:
        if not a.quick:
            a.out.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(state, indent=1) + "\n")

    try:
        with torch.no_grad():
            measure(s, state, save, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("stopped; continue with --resume", file=sys.stderr)
        return 130
    rows = rows_of(s, state)
    for r in rows:
        recall = "   –" if r["recall"] is None else f"{r['recall']:.3f}"
        tiles = "   –" if r["density_tiles"] is None else f"{r['density_tiles']:.3f}"
        print(
            f"{r['n']:>7} {r['mechanism']:<18} {r['seconds']:8.3f} s  choosing {r['select_seconds']:7.3f} s  "
            f"{r['speedup']:6.2f}x  recall {recall}  error {r['output_error']:.3f}  tiles {tiles}"
        )
    for line in verdict(rows):
        print(line)
    if not a.quick:
        save()
        write_csv(rows, s, where, path.with_suffix(".csv"))
        draw(rows, where, path.with_suffix(".png"))
        print(f"written: {path}, {path.with_suffix('.csv').name}, {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
