"""How well a viewer finds, names and counts: on scenes of digits that it never saw.

python -m foveate.organisms.viewer.evaluate [--weights DIR]    # prints JSON; evaluation.json when DIR is given
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from foveate.organisms.viewer.model import Viewer, overlap
from foveate.organisms.viewer.scenes import Scenes

SEED = 10_000_000  # training uses smaller ones


@torch.no_grad()
def evaluate(viewer: Viewer, scenes: Scenes, *, number: int = 500, seed: int = SEED) -> dict[str, float]:
    """Figures over `number` scenes of held-out digits.

    found: share of the digits for which a box with intersection over union of at least 0.5 was found; named: with the
    right class, too; precision: share of the boxes found that are such; overlap: mean intersection over union of the
    digits found; counted: share of the scenes whose number of digits is right.
    """
    there = boxes_found = hit = named = counted = 0
    shared = 0.0
    for start in range(0, number, 50):
        scene = scenes.sample((seed, start), min(50, number - start), held_out=True)
        counted += int((viewer(scene.images).counts.argmax(1) == scene.counts).sum())
        for b, mine in enumerate(viewer.find(scene.images)):
            open_ = {
                i: tuple(scene.boxes[b, i].tolist())
                for i in (scene.classes[b] >= 0).nonzero().flatten().tolist()
            }
            there += len(open_)
            boxes_found += len(mine)
            for digit, _, box in mine:
                best = max(open_, key=lambda i: overlap(box, open_[i]), default=None)
                if best is None or (area := overlap(box, open_[best])) < 0.5:
                    continue
                hit, shared = hit + 1, shared + area
                named += int(scene.classes[b, best]) == digit
                del open_[best]
    return {
        "scenes": number,
        "digits": there,
        "found": hit / there,
        "named": named / there,
        "precision": named / max(boxes_found, 1),
        "overlap": shared / max(hit, 1),
        "counted": counted / number,
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m foveate.organisms.viewer.evaluate", description=__doc__)
    p.add_argument("--weights", type=Path, help="folder of a viewer; its figures are written there")
    p.add_argument("--number", type=int, default=500, help="scenes (default %(default)s)")
    a = p.parse_args(argv)
    from foveate import organisms
    from foveate.organisms.viewer.train import load, write_text

    folder = organisms.path("viewer") if a.weights is None else a.weights
    viewer, scenes = load(folder)
    settings = {
        "shipped: 48 pixels": scenes,
        "96 pixels, up to 24 digits": Scenes(side=96, most=24, sizes=scenes.sizes, noise=scenes.noise),
        "noise twice as strong": Scenes(
            side=48, most=scenes.most, sizes=scenes.sizes, noise=2 * scenes.noise
        ),
    }
    found = {
        name: evaluate(viewer, source, number=a.number if source.side == 48 else a.number // 4)
        for name, source in settings.items()
    }
    text = json.dumps(found, indent=1)
    print(text)
    if a.weights is not None:
        write_text(folder / "evaluation.json", text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
