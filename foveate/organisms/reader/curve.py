"""The training log of a run, thinned for shipping, and its picture.

python -m foveate.organisms.reader.curve --run runs/reader --out foveate/organisms/reader/weights
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from foveate.organisms.reader.train import write_text


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl in order of steps; where a run was resumed from an earlier step, the later
    pass counts.
    """
    entries = [json.loads(s) for s in path.read_text(encoding="utf-8").splitlines() if s.strip()]
    kept: list[dict[str, Any]] = []
    for entry in entries:
        step = entry.get("step", entry.get("start", 0))
        while kept and kept[-1].get("step", kept[-1].get("start", 0)) > step:
            kept.pop()
        kept.append(entry)
    return kept


def thin(entries: list[dict[str, Any]], most: int = 900) -> list[dict[str, Any]]:
    """At most about `most` entries: all starts and evaluations, and every n-th of the others."""
    ordinary = [e for e in entries if "lr" in e]
    every = -(-len(ordinary) // most)
    keep = {id(e) for e in ordinary[::every]} | {id(e) for e in ordinary[-1:]}
    return [e for e in entries if "lr" not in e or id(e) in keep]


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Three panels over tokens: bits per byte (training, held out), running recall, sequence length and
    learning rate.
    """
    from matplotlib.figure import Figure

    steps = [e for e in entries if "lr" in e]
    held = [e for e in entries if "held_out_bpb" in e]
    tokens = [e["tokens"] / 1e6 for e in steps]
    figure = Figure(figsize=(8, 7), layout="constrained")
    bits, recall, length = figure.subplots(3, 1, sharex=True)
    bits.plot(
        tokens,
        [e["loss_text_bits"] for e in steps],
        lw=0.8,
        label="training text, rows with inserted lines too",
    )
    bits.plot(
        [e["tokens"] / 1e6 for e in held],
        [e["held_out_bpb"] for e in held],
        "o-",
        ms=3,
        label="held-out text",
    )
    bits.axhline(1.8, color="grey", ls=":", lw=1)
    bits.set(ylabel="bits per byte", ylim=(1, 4))
    bits.legend(frameon=False)
    recall.plot(tokens, [e["recall"] for e in steps], lw=1, color="C2")
    recall.axhline(0.9, color="grey", ls=":", lw=1)
    recall.set(ylabel="running recall\nat the current length", ylim=(0, 1.02))
    length.step(tokens, [e["length"] for e in steps], where="post", color="C3")
    length.set_yscale("log", base=2)
    length.set(ylabel="sequence length", xlabel="million bytes read")
    rate = length.twinx()
    rate.plot(tokens, [e["lr"] for e in steps], color="grey", lw=0.8)
    rate.set(ylabel="learning rate (grey)")
    temp = path.with_name("tmp-" + path.name)
    figure.savefig(temp, dpi=110)
    temp.replace(path)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m foveate.organisms.reader.curve", description="Thin a training log and draw it."
    )
    p.add_argument("--run", type=Path, default=Path("runs/reader"))
    p.add_argument("--out", type=Path, required=True, help="folder for log.jsonl and curve.png")
    a = p.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    entries = thin(read_log(a.run / "log.jsonl"))
    write_text(a.out / "log.jsonl", "".join(json.dumps(e) + "\n" for e in entries))
    draw(entries, a.out / "curve.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
