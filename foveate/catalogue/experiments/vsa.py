"""VSA: digits of any size, with windows that vary and with the same layers held at their fixed windows."""

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
    spearman,
)
from foveate.catalogue.lab.canvas import MapClassifier, accuracy
from foveate.catalogue.lab.digits import split
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import VariedSizeWindowAttention

SIDE, PATCH, DIM, HEADS, WINDOW, DEPTH = 24, 4, 32, 2, 3, 2
GRID = SIDE // PATCH  # 6 x 6 cells, four windows
SIZES = (8, 20)  # pixels
STEPS, BATCH, RATE, POSITIONS = 300, 32, 1e-2, 0.5  # chosen on full attention alone
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 digits held out, each 8 to 20 pixels large in the middle of 24 x 24, so "
    "that the borders of four windows cut it; the cell in one corner names it. Gate: full attention names at least "
    "0.7, else open. Then all of: varied windows name more than the same layers with regressors held at zero, which "
    "are fixed windows, plus 0.05; and the regressed scale of the corner's window, averaged over heads, axes and both "
    "layers, has a rank correlation of more than 0.2 with the digit's side"
)
ARMS = {"full attention": (GRID, False), "fixed windows": (WINDOW, False), "varied windows": (WINDOW, True)}


def attention(window: int, varied: bool) -> VariedSizeWindowAttention:
    """The layer; held still, its windows are fixed."""
    made = VariedSizeWindowAttention(DIM, HEADS, window)
    for part in (made.offset, made.scale):
        part.requires_grad_(varied)
    return made


def scenes(digits: Tensor, sizes: Tensor) -> Tensor:
    """Images of digits (n, 8, 8), enlarged bilinearly to their sizes, in the middle."""
    x = digits.new_zeros(len(digits), SIDE, SIDE)
    for size in sizes.unique().tolist():
        own, first = sizes == size, (SIDE - size) // 2
        large = F.interpolate(digits[own, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        x[own, first : first + size, first : first + size] = large
    return x


def sides(seed: int, step: int, n: int) -> Tensor:
    """Even sides, so that digits lie in the middle."""
    return 2 * torch.randint(SIZES[0] // 2, SIZES[1] // 2 + 1, (n,), generator=generator(seed, 3, step))


@torch.no_grad()
def regressed(made: MapClassifier, images: Tensor) -> list[float]:
    """Per scene the scale of the corner's window, averaged over heads, axes and layers."""
    found: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, VariedSizeWindowAttention)
        found.append(layer.predict_windows(inputs[0])["scale"][:, :, 0, 0].mean((1, 2)))  # (B,)

    hooks = [mixer.register_forward_pre_hook(keep) for mixer in made.mixers]
    made.eval()(images)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).mean(0).tolist()


def trained(lab: Lab, name: str, seed: int) -> dict[str, float]:
    """Share of the held-out digits that are named, the mean scale, and its rank correlation with the side."""
    (x, y), (test, labels) = split()
    test, labels = test[: lab.pick(360, 24)], labels[: lab.pick(360, 24)]
    torch.manual_seed(seed)
    made = MapClassifier(
        lambda _: attention(*ARMS[name]),
        side=SIDE,
        patch=PATCH,
        dim=DIM,
        depth=DEPTH,
        classes=10,
        readout="corner",
    )
    assert made.positions is not None
    nn.init.normal_(made.positions, std=POSITIONS, generator=generator(seed, 1))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        n = lab.pick(BATCH, 4)
        at = torch.randint(0, len(x), (n,), generator=generator(seed, 2, step))
        return scenes(x[at], sides(seed, step, n)), y[at]

    train(lab, made, batch, steps=lab.pick(STEPS, 4), lr=RATE, what=f"{name}, seed {seed}")
    size = sides(99, 0, len(test))
    images = scenes(test, size)
    scales = regressed(made, images)
    rank = spearman("rank", size.tolist(), scales).value if len(set(scales)) > 1 else 0.0
    return {"named": accuracy(made, images, labels), "rank": rank, "scale": sum(scales) / len(scales)}


def run(lab: Lab) -> Finding:
    """Do windows that vary take in an object that fixed windows cut, and grow with it?"""
    found = {
        name: [lab.once(f"{name.split()[0]}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in ARMS
    }
    named = {name: [one["named"] for one in runs] for name, runs in found.items()}
    mean = {name: interval(f"named: {name}", values) for name, values in named.items()}
    full, fixed, varied = ARMS
    gain = difference("named: varied - fixed", named[varied], named[fixed])
    rank = interval("rank correlation of scale and side", [one["rank"] for one in found[varied]])
    scale = interval("mean scale of the corner's window", [one["scale"] for one in found[varied]])
    verdict = OPEN
    if mean[full].value >= 0.7:
        verdict = all_of(judge(gain, above=0.05), judge(rank, above=0.2))
    return Finding(
        question="Do windows that vary take in an object that fixed windows cut, and grow with it?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Named from the corner: {', '.join(f'{name} {f.value:.3f}' for name, f in mean.items())}; the rank "
        f"correlation of the regressed scale and the digit's side is {rank}.",
        figures=(*mean.values(), gain, rank, scale),
        plot=bars(
            "Digits of 8 to 20 pixels cut by four windows, two layers",
            "share named",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            [full, fixed],
        ),
        quality=mean[varied].value / mean[full].value if mean[full].value else None,
        cost=WINDOW**2 / GRID**2,
    )


@torch.no_grad()
def picture() -> dict[str, Any]:
    """Which cells the windows of a row of cells read, for several offsets and scales."""
    n, w = 12, 4
    layer = VariedSizeWindowAttention(1, 1, w, relative_bias=False).double()
    for p in layer.parameters():
        p.zero_()
    frames = []
    for offset in (0.0, 0.25, 0.5):
        for scale in (-0.5, 0.0, 1.0):
            layer.offset.bias.fill_(offset)
            layer.scale.bias.fill_(scale)
            frames.append(
                ({"offset": offset, "scale": scale}, _read(layer, n), f"offset {offset:g}, scale {scale:g}")
            )
    return pictures.pairs(
        "A 12 x 12 map in windows of 4 x 4: what a query reads when every window moves right and down by an offset and "
        "its slots are spread by a scale.",
        frames,
        grid=(n, n),
    )


def _read(layer: VariedSizeWindowAttention, n: int) -> Tensor:
    """Cells whose value reaches a query, bool (n n, n n): equal weights, so outputs are means of what is read."""
    layer.qkv.weight[2] = 1
    layer.proj.weight[0] = 1
    each = torch.eye(n * n, dtype=torch.float64).view(n * n, n, n, 1)  # one cell lit at a time
    return layer(each).flatten(1).T > 1e-9  # (queries, keys)
