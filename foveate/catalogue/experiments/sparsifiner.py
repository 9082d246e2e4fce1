"""Sparsifiner: attention captured and digits recognised with guessed links, against near and random ones."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.digits import batches, split
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import LowRankConnectivity, Sparsifiner, reconstruct_attention
from foveate.vision.sparsifiner import SparsifinerBlock

SIDE, PATCH, DIM, HEADS, DEPTH, KEEP = 16, 2, 32, 2, 3, 0.25  # 64 patches and the class token, 17 keys a row
CELLS = SIDE // PATCH
STEPS, BATCH, RATE, POSITIONS = 500, 32, 5e-3, 0.5  # chosen on dense attention alone
FIT, FIT_RATE = 200, 1e-2  # chosen by the reconstruction error
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 test digits; no training after the predictors are fitted. Gate: dense "
    "attention recognises at least 0.85 of them, else open. Then all of: 17 of 65 guessed keys per row hold more of "
    "the dense weights than the 16 nearest patches and the class token, and than 17 random keys; with the guessed "
    "keys the model recognises more than with the near ones; and more than dense attention's share less 0.01"
)
ARMS = ("guessed", "near", "random")


class Dense(nn.Module):
    """A model with full attention, on (B, side, side)."""

    def __init__(self, model: Sparsifiner) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.dense(x[:, None])[0]


class Fixed(LowRankConnectivity):
    """Keys that do not depend on the image: the near ones, or random ones for each row, head and image."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__(DIM // HEADS, CELLS, keep=KEEP)
        self.kind, self.seed = kind, seed

    def select(self, q: Tensor, k: Tensor, *, grid: Any = None, alive: Tensor | None = None) -> Tensor:
        most = self.budget(k.shape[2])
        if self.kind == "random":
            noise = torch.rand(*q.shape[:2], q.shape[2] - 1, k.shape[2], generator=generator(self.seed, 7))
            return noise.argsort(dim=-1)[..., :most]
        at = torch.stack([torch.arange(CELLS**2) // CELLS, torch.arange(CELLS**2) % CELLS], 1).double()
        near = torch.cdist(at, at).argsort(dim=1, stable=True)[:, : most - 1] + 1
        listed = torch.cat([torch.zeros_like(near[:, :1]), near], 1)  # the class token, then patches
        return listed.expand(*q.shape[:2], -1, -1)


@torch.no_grad()
def tested(model: Sparsifiner, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(share of the dense weights inside the kept links, share of the images recognised with them)."""
    tokens, held = model.embed(x)[0], []
    for block in model.blocks:
        block = cast(SparsifinerBlock, block)
        q, k, _ = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        tokens, weights = block.dense(tokens)
        held.append(float(weights[:, :, 1:].gather(3, block.attn.predictor.select(q, k)).sum(3).mean()))
    right = cast(Tensor, model(x)).argmax(1) == y
    return sum(held) / len(held), float(right.double().mean())


def trained(lab: Lab, seed: int) -> dict[str, float]:
    """Of one seed: recognised by dense attention, and weights held and digits recognised with each arm's links."""
    torch.manual_seed(seed)
    model = Sparsifiner(
        dim=DIM, depth=DEPTH, heads=HEADS, image=SIDE, patch=PATCH, keep=KEEP, in_channels=1, num_classes=10
    )
    nn.init.normal_(model.positions, std=POSITIONS, generator=generator(seed, 1))
    draw = batches(seed, lab.pick(BATCH, 4), SIDE)
    train(lab, Dense(model), draw, steps=lab.pick(STEPS, 4), lr=RATE, what=f"dense, seed {seed}")
    model.eval()
    reconstruct_attention(
        model, lambda step: draw(10_000 + step)[0][:, None], steps=lab.pick(FIT, 4), lr=FIT_RATE
    )
    _, (x, y) = split(SIDE)
    x, y = x[: lab.pick(len(x), 16), None], y[: lab.pick(len(x), 16)]
    with torch.no_grad():
        found = {"dense": float((model.dense(x)[0].argmax(1) == y).double().mean())}
    for arm in ARMS:
        if arm != "guessed":
            for number, block in enumerate(model.blocks):
                cast(SparsifinerBlock, block).attn.predictor = Fixed(arm, 100 * seed + number)
        found[f"held: {arm}"], found[f"recognised: {arm}"] = tested(model, x, y)
    return found


def run(lab: Lab) -> Finding:
    """Do guessed links hold more of dense attention than near or random ones, and keep what the model recognises?"""
    found = [lab.once(f"digits-{seed}", partial(trained, lab, seed)) for seed in lab.seeds]
    column = {name: [f[name] for f in found] for name in found[0]}
    dense = interval("recognised: dense", column["dense"])
    held = [interval(f"share of the dense weights: {arm}", column[f"held: {arm}"]) for arm in ARMS]
    right = [interval(f"recognised: {arm}", column[f"recognised: {arm}"]) for arm in ARMS]
    gains = [
        difference(f"{what}guessed - {other}", column[f"{what}guessed"], column[f"{what}{other}"])
        for what, other in (("held: ", "near"), ("held: ", "random"), ("recognised: ", "near"))
    ]
    gains.append(difference("recognised: guessed - dense", column["recognised: guessed"], column["dense"]))
    verdict = OPEN
    if dense.value >= 0.85:
        verdict = all_of(*(judge(gain, above) for gain, above in zip(gains, (0, 0, 0, -0.01), strict=True)))
    return Finding(
        question="Do guessed links hold more of dense attention than near or random ones, and keep what is recognised?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="17 of 65 keys a row, share of the dense weights and of the digits recognised: "
        + ", ".join(f"{a} {h.value:.3f} and {r.value:.3f}" for a, h, r in zip(ARMS, held, right, strict=True))
        + f"; dense attention recognised {dense.value:.3f}.",
        figures=(dense, *held, *right, *gains),
        plot=bars(
            "Digits, three layers, 17 of 65 keys a row",
            "share of the dense weights",
            [Figure(arm, f.value, f.low, f.high, f.n) for arm, f in zip(ARMS, held, strict=True)],
            ["near", "random"],
        ),
        quality=right[0].value / dense.value if dense.value else None,
        cost=KEEP,
    )


def picture() -> dict[str, Any]:
    """The links of one head on a map of 5 x 5 patches whose content repeats."""
    torch.manual_seed(2)
    made = LowRankConnectivity(8, 5, reduce_n=2)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    kinds = torch.tensor([0, 1, 1, 2, 2, 2, 1, 1, 0, 0, 2, 2, 1, 1, 3, 3, 3, 1, 0, 0, 3, 2, 2, 0, 1, 1])
    tokens = (
        2 * torch.randn(4, 8, generator=generator(1))[kinds][None, None]
    )  # the class token and 25 patches
    frames = []
    for keep in (0.1, 0.25, 0.5, 1.0):
        made.keep = keep
        frames.append(
            ({"keep": keep}, made.mask(tokens, tokens)[0, 0], f"LowRankConnectivity(8, 5, keep={keep})")
        )
    return pictures.pairs(
        "The class token (first row) sees all; each patch the keys of the highest guessed weights, the same ones where "
        "patches look alike.",
        frames,
    )
