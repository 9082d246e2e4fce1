"""DuoFormer: a frozen pyramid, read from its last level, by scale attention, and by attention among all its tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.canvas import pasted
from foveate.catalogue.lab.tiny import train
from foveate.vision import ScalePatchAttention, ScaleTokens

SIDE, SIZES, REGIONS = 32, (8, 20), 4  # pixels; of a digit; cells a side of the last level: 16
CHANNELS, DIM, HEADS, DEPTH = (16, 24, 32), 32, 2, 1
STEPS, BATCH, RATE, TESTS = 250, 16, 4e-3, 360  # chosen on the last level alone
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 test images of one digit of any size. Gate: the readout from the last "
    "level recognises between 0.3 and 0.95 of them, else open. Then all of: scale attention over three levels "
    "recognises more than the same readout of the last level alone, and more than scale attention over three levels "
    "of which the finer two are the last one repeated (equal parameters and cost, nothing finer to read); it "
    "recognises at least the share of attention among all tokens less 0.02; and it visits at most a tenth of its pairs"
)
ARMS = ("last level", "scale attention", "last level repeated", "all tokens")


class Pyramid(nn.Module):
    """Images (B, 32, 32) -> maps of 16 x 16, 8 x 8 and 4 x 4 cells; `forward` classifies from the last."""

    def __init__(self) -> None:
        super().__init__()
        made = []
        for a, b in zip((1, *CHANNELS), CHANNELS, strict=False):
            parts = (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.Conv2d(b, b, 3, padding=1))
            made.append(nn.Sequential(*(m for conv in parts for m in (conv, nn.BatchNorm2d(b), nn.ReLU()))))
        self.levels, self.head = nn.ModuleList(made), nn.Linear(CHANNELS[-1], 10)

    def maps(self, images: Tensor) -> list[Tensor]:
        x, found = images[:, None], []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images)[-1].mean((2, 3)))


class AllTokens(ScalePatchAttention):
    """The same parameters, but the layers over scales see the tokens of all regions, with the regions' positions."""

    def over_scales(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x.flatten(1, 3)).view(x.shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + self.region_positions[:, :, :, None])


class Reader(nn.Module):
    """Images -> classes, from a frozen pyramid."""

    def __init__(self, pyramid: Pyramid, arm: str) -> None:
        super().__init__()
        self.pyramid, self.arm = pyramid.requires_grad_(False), arm
        scales = 1 if arm == "last level" else 3
        channels = (CHANNELS[-1],) * 3 if arm == "last level repeated" else CHANNELS
        self.tokens = ScaleTokens(channels, DIM, scales)
        kind = AllTokens if arm == "all tokens" else ScalePatchAttention
        self.attention = kind(DIM, HEADS, DEPTH, scales=scales, regions=REGIONS, mlp_ratio=2.0)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.pyramid.eval().maps(images)
        if self.arm == "last level repeated":
            maps = [maps[-1].repeat_interleave(s, 2).repeat_interleave(s, 3) for s in (4, 2, 1)]
        return self.head(self.attention(self.tokens(maps))[0])


def trained(lab: Lab, seed: int) -> dict[str, float]:
    """Share recognised by each arm, all on one pyramid."""
    torch.manual_seed(seed)
    pyramid = Pyramid()
    tests, labels, _ = pasted(0, lab.pick(TESTS, 8), side=SIDE, sizes=SIZES, test=True)

    def learn(model: nn.Module, what: str, part: int) -> float:
        def batch(step: int) -> tuple[Tensor, Tensor]:
            found = pasted(1 + 1000 * (10 * seed + part) + step, lab.pick(BATCH, 2), side=SIDE, sizes=SIZES)
            return found[0], found[1]

        train(lab, model, batch, steps=lab.pick(STEPS, 2), lr=RATE, what=f"{what}, seed {seed}")
        with torch.no_grad():
            said = model.eval()(tests.to(lab.device)).argmax(-1).cpu()
        return float((said == labels).double().mean())

    found = {"pyramid": learn(pyramid, "pyramid", 0)}
    for arm in ARMS:  # all arms see the same images
        torch.manual_seed(seed)
        found[arm] = learn(Reader(pyramid, arm), arm, 1)
    return found


def pairs_of(scales: int, joined: bool) -> int:
    """Pairs that one layer of either kind visits: over scales and over regions."""
    regions, tokens = REGIONS**2, (4**scales - 1) // 3 + 1
    over = (regions * tokens) ** 2 if joined else regions * tokens**2
    return over + (regions + 1) ** 2


def run(lab: Lab) -> Finding:
    """Does scale attention read more from a frozen pyramid than its last level holds, at a fraction of the pairs?"""
    found = [lab.once(f"seed-{seed}", partial(trained, lab, seed)) for seed in lab.seeds]
    of = lambda arm: [one[arm] for one in found]  # noqa: E731
    mean = {arm: interval(f"recognised: {arm}", of(arm)) for arm in ("pyramid", *ARMS)}
    gains = [
        difference(f"scale attention - {arm}", of("scale attention"), of(arm))
        for arm in ARMS
        if arm != ARMS[1]
    ]
    share = Figure(
        "pairs of scale attention over those among all tokens", pairs_of(3, False) / pairs_of(3, True)
    )
    verdict = OPEN
    if 0.3 <= mean["last level"].value <= 0.95:
        verdict = all_of(*(judge(gain, above) for gain, above in zip(gains, (0, 0, -0.02), strict=True)),
                         judge(Figure("", -share.value), -0.1))  # fmt: skip
    return Finding(
        question="Does scale attention read more from a frozen pyramid than its last level holds, at a fraction of the "
        "pairs of attention among all tokens?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Digits of any size recognised from a frozen pyramid: "
        + ", ".join(f"{arm} {mean[arm].value:.3f}" for arm in ARMS)
        + f", its own head {mean['pyramid'].value:.3f}; pairs visited: scale attention {pairs_of(3, False):,}, all "
        + f"tokens {pairs_of(3, True):,}, last level {pairs_of(1, False):,}.",
        figures=(*mean.values(), *gains, share),
        plot=bars(
            "One digit of 8 to 20 pixels, frozen pyramid of three levels",
            "share recognised",
            [Figure(arm, mean[arm].value, mean[arm].low, mean[arm].high, mean[arm].n) for arm in ARMS],
            [arm for arm in ARMS if arm != "scale attention"],
        ),
        quality=mean["scale attention"].value / max(mean["all tokens"].value, 1e-9),
        cost=share.value,
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """The pairs of both stages for four regions of three levels."""
    regions, tokens = 4, 22
    region = torch.arange(regions * tokens) // tokens
    first = torch.arange(regions * tokens) % tokens == 0
    frames = [
        ({"stage": "over scales"}, region[:, None] == region, "ScalePatchAttention.over_scales"),
        ({"stage": "over regions"}, first[:, None] & first, "the scale tokens of all regions"),
    ]
    return pictures.pairs(
        "Four regions, each with a scale token and 1 + 4 + 16 tokens of three levels: first every token sees its "
        "region, then the scale tokens see each other.",
        frames,
    )
