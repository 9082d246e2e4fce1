"""Shifted-window learning: a small windowed ViT on mosaics of digits, and how much its windows show in its features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.digits import split
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.patterns import Windows
from foveate.vision import WindowedViT, roll_similarity, window_bias

SIDE, PATCH, WINDOW, DIM = 24, 2, 4, 32  # pixels, pixels, cells, channels: 12 x 12 cells, nine windows
CLASSES = 2  # digits 0 and 1
STEPS, BATCH, RATE, TESTS = 220, 16, 4e-3, 64  # chosen on one pass alone
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 64 test mosaics. Gate: one pass names the digit (0 or 1) of at least 0.7 of "
    "the inked cells, else open. Then all of: with shifted windows (half a window) the cosine of features before and "
    "after a roll of one cell is higher than with one pass, and higher than with two passes rolled by a whole window, "
    "which cost as much and see the same windows; and the share of the features' variance that the place inside the "
    "window explains is lower than with either"
)
SHIFTS = {"one pass": 0, "shifted windows": WINDOW // 2, "two passes, same windows": WINDOW}


class Mosaic(nn.Module):
    """(B, 24, 24) -> logits (B, 12, 12, 2) of the digit that each cell belongs to."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.vit = WindowedViT(DIM, 2, 3, patch=PATCH, grid=(SIDE // PATCH, SIDE // PATCH), windows_per_side=3,
                               mlp_ratio=2.0, global_layers=(2,), shift=shift, in_channels=1,
                               features_only=True)  # fmt: skip
        self.read = nn.Linear(DIM, CLASSES)

    def features(self, cells: Tensor) -> Tensor:
        """Normed features of embedded cells, (B, 12, 12, C)."""
        return self.vit.last_norm(self.vit.ensemble(cells))

    def forward(self, images: Tensor) -> Tensor:
        return self.read(self.features(self.vit.patches(images[:, None]).permute(0, 2, 3, 1)))


def mosaics(seed: int, batch: int, test: bool = False) -> tuple[Tensor, Tensor]:
    """(images (B, 24, 24), labels (B, 12, 12), -100 where a cell has no ink): nine digits, rolled as a whole."""
    x, y = split()[int(test)]
    g = generator(seed)
    x, y = x[y < CLASSES], y[y < CLASSES]
    at = torch.randint(0, len(x), (batch, 3, 3), generator=g)
    images = x[at].permute(0, 1, 3, 2, 4).reshape(batch, SIDE, SIDE)
    labels = y[at].repeat_interleave(8, 1).repeat_interleave(8, 2)  # of each pixel
    by = torch.randint(0, 8, (batch, 2), generator=g).tolist()
    images, labels = (
        torch.stack([one.roll(shift, (0, 1)) for one, shift in zip(all_, by, strict=True)]) for all_ in (images, labels)
    )  # fmt: skip
    ink = images.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).amax((2, 4)) > 0
    return images, torch.where(ink, labels[:, ::PATCH, ::PATCH], -100)


def trained(lab: Lab, name: str, seed: int) -> dict[str, float]:
    """Cells named rightly; cosines under rolls of one and two cells; variance explained by the place in a window."""
    torch.manual_seed(seed)
    model = Mosaic(SHIFTS[name])
    train(lab, model, lambda step: mosaics(1 + seed * 10_000 + step, lab.pick(BATCH, 2)), steps=lab.pick(STEPS, 3),
          lr=RATE, what=f"{name}, seed {seed}")  # fmt: skip
    model.eval()
    images, labels = (t.to(lab.device) for t in mosaics(0, lab.pick(TESTS, 4), test=True))
    with torch.no_grad():
        right = (model(images).argmax(-1) == labels)[labels != -100]
        cells = model.vit.patches(images[:, None]).permute(0, 2, 3, 1)
        found = {"right": float(right.double().mean()), "bias": window_bias(model.features(cells), WINDOW)}
        found |= {f"roll {t}": roll_similarity(model.features, cells, t) for t in (1, 2)}
        if SHIFTS[name] == 0:  # the same weights, averaged over both grids afterwards
            model.vit.ensemble.shift = (WINDOW // 2, WINDOW // 2)
            found |= {"bias later": window_bias(model.features(cells), WINDOW),
                      "roll 1 later": roll_similarity(model.features, cells, 1)}  # fmt: skip
    return found


def run(lab: Lab) -> Finding:
    """Do features depend less on where windows end when two grids of windows are averaged?"""
    found = {
        name: [lab.once(f"shift{SHIFTS[name]}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in SHIFTS
    }  # fmt: skip
    of = lambda name, what: [one[what] for one in found[name]]  # noqa: E731
    right, bias, one, two = (
        {name: interval(f"{text}: {name}", of(name, what)) for name in SHIFTS}
        for what, text in (("right", "cells named"), ("bias", "variance from the place in the window"),
                           ("roll 1", "cosine after a roll by 1"), ("roll 2", "cosine after a roll by 2"))
    )  # fmt: skip
    ours, others = "shifted windows", ("one pass", "two passes, same windows")
    gains = [
        *(
            difference(f"cosine, roll by 1: {ours} - {b}", of(ours, "roll 1"), of(b, "roll 1"))
            for b in others
        ),
        *(difference(f"variance: {b} - {ours}", of(b, "bias"), of(ours, "bias")) for b in others),
    ]
    later = [
        interval(
            "variance from the place in the window: shifted only after training", of("one pass", "bias later")
        ),
        interval("cosine after a roll by 1: shifted only after training", of("one pass", "roll 1 later")),
    ]
    verdict = all_of(*(judge(gain, 0) for gain in gains)) if right["one pass"].value >= 0.6 else OPEN
    return Finding(
        question="Do features depend less on where windows end when two grids of windows are averaged?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Cosine of features before and after a roll of one cell: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in one.items())
        + f", shifted only after training {later[1].value:.3f}; variance explained by the place in the window: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in bias.items())
        + f", shifted only after training {later[0].value:.3f}; cells named rightly: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in right.items())
        + ".",
        figures=(*one.values(), *two.values(), *bias.values(), *right.values(), *gains, *later),
        plot=bars(
            "Mosaics of digits, windows of 4 x 4 cells",
            "share of the features' variance explained by the place in the window",
            [*bias.values(), later[0]],
            [bias[name].name for name in others],
        ),
    )


def picture() -> dict[str, Any]:
    """The windows of the two passes, and what either of them sees."""
    plain, moved = (Windows((8, 8), 4, shift=s, cyclic=True).layout(64).to_dense()[0, 0] for s in (0, 2))
    # the released roll goes up and to the right: rows shifted by 2, columns by -2, the same windows modulo 4
    frames = [
        ({"pass": "first"}, plain, "g(t)"),
        ({"pass": "second"}, moved, "g(t.roll((-2, 2), (1, 2))).roll((2, -2), (1, 2))"),
        ({"pass": "either"}, plain | moved, "ShiftedWindowEnsemble(g, shift=2)(t)"),
    ]
    return pictures.pairs(
        "Windows of 4 x 4 cells on an 8 x 8 map, and those of the pass over the rolled map: features averaged over "
        "both passes depend on more than one window.",
        frames,
        grid=(8, 8),
    )
