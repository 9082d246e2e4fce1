"""TiC: how far shifts and pooled keys see, and another resolution than that of training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    OPEN,
    Figure,
    Finding,
    Lab,
    all_of,
    bars,
    difference,
    interval,
    judge,
)
from foveate.catalogue.lab.digits import TinyViT, batches, score
from foveate.catalogue.lab.image_mixers import ImageMixer
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.patterns import Stencil
from foveate.vision import SelfAttentionConv2d, shifts

SIDE, TILE, SYMBOLS, DIM, HEADS = 12, 3, 2, 32, 8
SMALL, LARGE = 16, 24
STEPS, BATCH, RATE = 160, 16, 1e-2  # chosen on the plain layers with neighbouring tiles, and on the ViT
QUESTION = (
    "Do shifted heads and pooled keys let two MSA-Conv layers compare opposite corners, and does MSA-Conv keep more "
    "at another resolution than a vision transformer with positions?"
)
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Corners: two tiles of 2 symbols are the same or not, read out at the first, "
    "chance 0.5. Gate: plain layers tell at least 0.9 when the tiles are neighbours, else open. Then with the tiles in "
    "opposite corners, shifted heads and pooled keys each tell at least 0.25 more than plain layers of as many "
    "parameters. Resolution: digits of 16 x 16, tested at 24 x 24. Gate: "
    "both models recognise at least 0.85 at 16, else open. Then MSA-Conv loses at 24 less than the transformer whose "
    "positions are interpolated"
)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifts": {"head_shifts": True},
    "pooled": {"pooled": 5},
}


class Mean(nn.Module):
    """(B, C, H, W) -> (B, C): of all cells, or of those of the first tile."""

    def __init__(self, corner: bool) -> None:
        super().__init__()
        self.corner = corner

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, :TILE, :TILE] if self.corner else x).mean((2, 3))


def layers(
    widths: tuple[int, ...], strides: tuple[int, ...], corner: bool = False, **options: Any
) -> nn.Sequential:
    """1 x 1 embedding, MSA-Conv layers, mean of the cells that `corner` keeps, linear; (B, C, H, W) -> (B, 10)."""
    made: list[nn.Module] = [nn.LazyConv2d(widths[0], 1)]
    moved = options.pop("head_shifts", False)
    for depth, stride in enumerate(strides):
        moves = shifts(HEADS, 3, depth=depth) if moved else None
        made.append(
            SelfAttentionConv2d(
                widths[depth],
                widths[depth + 1],
                stride=stride,
                heads=HEADS,
                dropout=0.0,
                head_shifts=moves,
                **options,
            )
        )
    return nn.Sequential(*made, Mean(corner), nn.Linear(widths[-1], 10))


def tiles(seed: int, batch: int, apart: bool, step: int) -> tuple[Tensor, Tensor]:
    """(B, symbols, side, side) with two tiles, in opposite corners or side by side, and 1 where they are equal."""
    g = generator(seed, step)
    one = torch.randint(0, SYMBOLS, (batch,), generator=g)
    same = torch.randint(0, 2, (batch,), generator=g)
    other = torch.where(same == 1, one, (one + torch.randint(1, SYMBOLS, (batch,), generator=g)) % SYMBOLS)
    x = 0.1 * torch.randn(batch, SYMBOLS, SIDE, SIDE, generator=g)
    x[:, :, :TILE, :TILE] += F.one_hot(one, SYMBOLS)[:, :, None, None]
    at = slice(SIDE - TILE, SIDE) if apart else slice(TILE, 2 * TILE)
    x[:, :, at if apart else slice(0, TILE), at] += F.one_hot(other, SYMBOLS)[:, :, None, None]
    return x, same


def corners(lab: Lab, arm: str, apart: bool, seed: int) -> float:
    """Share of pairs of tiles told right."""
    torch.manual_seed(seed)
    model = layers((DIM,) * 3, (1, 1), corner=True, **ARMS[arm])
    batch = partial(tiles, seed, lab.pick(BATCH, 2), apart)
    model(batch(0)[0])
    train(lab, model, batch, steps=lab.pick(STEPS, 2), lr=RATE, what=f"{arm}, seed {seed}")
    x, same = tiles(seed, lab.pick(512, 8), apart, 1 << 20)
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == same).double().mean())


class AsMap(nn.Module):
    """(B, H, W) -> (B, 1, H, W) for a model on maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[:, None])


def resolution(lab: Lab, arm: str, seed: int) -> tuple[float, float]:
    """Share of the test digits recognised at 16 x 16, on which the model was trained, and at 24 x 24."""
    torch.manual_seed(seed)
    if arm == "msa":
        model: nn.Module = AsMap(layers((16, 32, 32, 32), (2, 1, 1)))
    else:
        model = TinyViT(lambda _: ImageMixer(32, 2, "softmax"), size=SMALL, patch=2, dim=32)
        nn.init.normal_(model.positions, std=0.5, generator=generator(seed, 1))
    draw = batches(seed, lab.pick(2 * BATCH, 2), SMALL)
    model(draw(0)[0])
    train(lab, model, draw, steps=lab.pick(200, 2), lr=RATE, what=f"{arm}, seed {seed}")
    small = score(model, SMALL)
    if isinstance(model, TinyViT):
        old = model.positions.detach().T.unflatten(1, (SMALL // 2, -1))[None]  # (1, dim, 8, 8)
        new = F.interpolate(old, (LARGE // 2, LARGE // 2), mode="bicubic", align_corners=False)
        model.positions = nn.Parameter(new[0].flatten(1).T)
    return small, score(model, LARGE)


def reached(arm: str) -> Figure:
    """Share of the canvas that the corner's result depends on after two layers."""
    torch.manual_seed(0)
    model = layers((DIM,) * 3, (1, 1), corner=True, **ARMS[arm])[:3]
    x = torch.randn(1, SYMBOLS, SIDE, SIDE, generator=generator(4)).requires_grad_()
    model.eval()(x)[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    return Figure(f"reached from the corner: {arm}", float((x.grad[0].abs().sum(0) > 0).double().mean()))


def run(lab: Lab) -> Finding:
    """Reach, and another resolution."""
    told = {
        arm: [lab.once(f"{arm}-{seed}", partial(corners, lab, arm, True, seed)) for seed in lab.seeds]
        for arm in ARMS
    }
    near = [lab.once(f"near-{seed}", partial(corners, lab, "plain", False, seed)) for seed in lab.seeds]
    sizes = {
        arm: [lab.once(f"{arm}-{seed}", partial(resolution, lab, arm, seed)) for seed in lab.seeds]
        for arm in ("msa", "vit")
    }
    neighbours = interval("told, neighbours: plain", near)
    figures = {arm: interval(f"told, corners: {arm}", values) for arm, values in told.items()}
    gains = [difference(f"{arm} - plain", told[arm], told["plain"]) for arm in ("shifts", "pooled")]
    at = {
        f"{arm} {size}": interval(f"recognised at {size}: {arm}", [pair[i] for pair in sizes[arm]])
        for arm in sizes
        for i, size in enumerate((SMALL, LARGE))
    }
    lost = {arm: [a - b for a, b in sizes[arm]] for arm in sizes}
    kept = difference("loss of the transformer - loss of MSA-Conv", lost["vit"], lost["msa"])
    verdict = OPEN
    if neighbours.value >= 0.9 and min(at[f"msa {SMALL}"].value, at[f"vit {SMALL}"].value) >= 0.85:
        verdict = all_of(*(judge(gain, 0.25) for gain in gains), judge(kept, 0))
    return Finding(
        question=QUESTION,
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Tiles in opposite corners told: "
        + ", ".join(f"{arm} {figure.value:.3f}" for arm, figure in figures.items())
        + f"; neighbours, plain {neighbours.value:.3f}. Digits at {SMALL} and {LARGE}: MSA-Conv "
        f"{at[f'msa {SMALL}'].value:.3f} and {at[f'msa {LARGE}'].value:.3f}, transformer "
        f"{at[f'vit {SMALL}'].value:.3f} and {at[f'vit {LARGE}'].value:.3f}.",
        figures=(neighbours, *figures.values(), *gains, *map(reached, ARMS), *at.values(), kept),
        plot=bars(
            f"Two layers: same or different, tiles in opposite corners of {SIDE} x {SIDE}",
            "share told",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in figures.items()],
            ["plain"],
        ),
    )


def picture() -> dict[str, Any]:
    """Stencils of a map of 12 x 12."""
    frames = [
        (
            {"kernel": k, "dilation": r},
            Stencil((12, 12), k, r),
            f"Stencil((12, 12), kernel={k}, dilation={r})",
        )
        for k in (3, 5)
        for r in (1, 2)
    ]
    return pictures.pairs(
        "Each pixel sees the pixels that a convolution would read around it; at the border there are fewer.",
        frames,
        tokens=144,
        grid=(12, 12),
    )
