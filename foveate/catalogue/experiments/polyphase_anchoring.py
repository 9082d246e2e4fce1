"""Polyphase anchoring: a tiny Twins on digits in the middle of a canvas, asked at all 256 circular shifts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.digits import split
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import PolyTwins, polyphase_anchor, shifted_predictions

SIDE, IMAGES = 16, 60  # canvas; test images that are shifted
STEPS, BATCH, RATE = 200, 32, 4e-3  # chosen on Twins alone
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 60 test images at all 256 circular shifts. Gate: Twins (zero padding, no "
    "anchors) recognises at least 0.85 of the 360 unshifted images, else open. Then all of: for PolyTwins, every seed "
    "and every (image, shift) pair has the label of the unshifted image (share exactly 1); Twins with circular padding and "  # noqa: E501
    "without anchors, of equal parameters, has it for less than 0.99; and at its worst shift PolyTwins recognises at "
    "least 0.1 more than either of the others and than Twins trained on randomly rolled images"
)
ARMS: dict[str, dict[str, Any]] = {
    "PolyTwins": {"anchor": True, "padding": "circular"},
    "Twins": {"anchor": False, "padding": "zeros"},
    "Twins, circular": {"anchor": False, "padding": "circular"},
    "Twins, rolled": {"anchor": False, "padding": "zeros"},  # trained on images rolled at random
}


def canvas(x: Tensor) -> Tensor:
    """Digits (B, 8, 8) in the middle of a (B, 1, 16, 16) canvas of background."""
    return F.pad(x[:, None], (4, 4, 4, 4), value=float(split()[0][0].min()))


def trained(lab: Lab, name: str, seed: int) -> dict[str, float]:
    """Recognised as it is, at the worst shift and on average, and the share of pairs with an unchanged label."""
    torch.manual_seed(seed)
    model = PolyTwins(
        (24, 48), (2, 4), (2, 2), reductions=(2, 1), window=4, patch=2, in_channels=1, num_classes=10, **ARMS[name]
    )  # fmt: skip
    (x, y), (tests, labels) = split()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        g = generator(seed, step)
        at = torch.randint(0, len(x), (lab.pick(BATCH, 4),), generator=g)
        images = canvas(x[at])
        if name == "Twins, rolled":
            by = torch.randint(0, SIDE, (len(at), 2), generator=g).tolist()
            images = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, by, strict=True)])
        return images, y[at]

    train(lab, model, batch, steps=lab.pick(STEPS, 3), lr=RATE, what=f"{name}, seed {seed}")
    model.eval()
    n, count = lab.pick(len(tests), 20), lab.pick(IMAGES, 6)
    unshifted = model(canvas(tests[:n]).to(lab.device)).argmax(-1).cpu() == labels[:n]
    shifts, said = shifted_predictions(model, canvas(tests[:count]).to(lab.device), lab.pick("all", 1))
    right = (said.cpu() == labels[:count]).double().mean(1)  # of each shift
    moved = (shifts != 0).any(1)
    return {
        "unshifted": float(unshifted.double().mean()),
        "worst": float(right.min()),
        "mean": float(right.mean()),
        "same": float((said[moved] == said[~moved]).double().mean()),
    }


def run(lab: Lab) -> Finding:
    """Does anchoring make a window transformer's answers the same at every circular shift?"""
    found = {
        name: [lab.once(f"{name.replace(', ', '-')}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in ARMS
    }  # fmt: skip
    of = lambda name, what: [one[what] for one in found[name]]  # noqa: E731
    same = {name: interval(f"label kept: {name}", of(name, "same")) for name in ARMS}
    worst = {name: interval(f"worst shift: {name}", of(name, "worst")) for name in ARMS}
    plain = {name: interval(f"unshifted: {name}", of(name, "unshifted")) for name in ARMS}
    gains = [
        difference(f"worst shift: PolyTwins - {name}", of("PolyTwins", "worst"), of(name, "worst"))
        for name in list(ARMS)[1:]
    ]
    loss = Figure("label changed: Twins, circular", 1 - same["Twins, circular"].value)
    if same["Twins, circular"].high is not None and same["Twins, circular"].low is not None:
        loss = Figure(
            loss.name, loss.value, 1 - same["Twins, circular"].high, 1 - same["Twins, circular"].low
        )
    exact = Figure("least share of labels kept: PolyTwins", min(of("PolyTwins", "same")))
    verdict = OPEN
    if plain["Twins"].value >= 0.85:
        verdict = all_of(judge(exact, 1 - 1e-9), judge(loss, 0.01), *(judge(gain, 0.1) for gain in gains))
    return Finding(
        question="Does anchoring make a window transformer's answers the same at every circular shift?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Labels kept over all circular shifts: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in same.items())
        + "; recognised at the worst shift: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in worst.items())
        + "; unshifted: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in plain.items())
        + ".",
        figures=(*same.values(), *worst.values(), *plain.values(), *gains, loss, exact),
        plot=bars(
            "Digits on a canvas of 16 x 16, the worst of 256 circular shifts",
            "share recognised",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in worst.items()],
            list(ARMS)[1:],
        ),
    )


def picture() -> dict[str, Any]:
    """Where the windows of one image lie, before and after it is shifted."""
    g = generator(7)
    image = torch.rand(1, 8, 8, 1, generator=g)
    cell = (torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4)[
        None, :, :, None
    ].float()  # window of a place

    def seen(shift: int, anchor: bool) -> Tensor:
        moved = image.roll((shift, shift), (1, 2))
        at = polyphase_anchor(moved, 4, return_index=True)[1][0].tolist() if anchor else [0, 0]
        label = cell.roll(
            (at[0] - shift, at[1] - shift), (1, 2)
        ).flatten()  # of the pixels of the unshifted image
        return label[:, None] == label

    frames = [
        ({"shift": shift, "anchored": anchor}, seen(shift, anchor), "polyphase_anchor(x.roll((t, t), (1, 2)), 4)")
        for shift in range(4)
        for anchor in (True, False)
    ]  # fmt: skip
    return pictures.pairs(
        "Which pixels of an 8 x 8 image share a window of 4 x 4 when the image is shifted: with anchoring always "
        "the same ones.",
        frames,
        grid=(8, 8),
    )
