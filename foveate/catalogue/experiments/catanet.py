"""CATANet: how much of full attention far away over a photograph lies in slices sorted by learned centres."""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

import foveate as fv
from foveate.catalogue import pictures
from foveate.catalogue.lab import Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.patterns import Neighborhood
from foveate.vision import SortedClusters, TokenCentres

SIDE, PATCH, NOISE = 48, 5, 0.03
# tokens: the 5 x 5 x 3 pixels around each pixel of a noisy crop, normed, 75 numbers
GROUP, CENTRES, WINDOW = 32, 32, 9  # 64 keys in the slices of a token, 81 in the window
STEPS, BATCH, CROPS = 40, 4, 12
COUNTS_IF = (
    "three seeds, paired, 95 % intervals; centres learned on crops of one photograph, everything else measured on 12 "
    "crops of another; queries and keys are the normed noisy patches themselves, the scale is d^-0.5. Token "
    "aggregation stands beside local attention, so what counts are the weights of full attention outside the 9 x 9 "
    "window around a token. All of: of these the 64 keys of sorted slices hold more than slices of a random order; "
    "more than slices sorted by centres that were not learned; and the mean of the keys' pixels under attention is "
    "nearer to the pixel without noise (PSNR) with sorted slices than with a random order"
)
ARMS = ("learned", "unlearned", "random")


@functools.cache
def photograph(name: str) -> Tensor:
    """(3, 427, 640) in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError("the photographs come with scikit-learn: pip install foveate[cli]") from error
    return torch.tensor(load_sample_image(f"{name}.jpg")).permute(2, 0, 1).float() / 255


def crop(name: str, *seeds: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens (N, 75), noisy pixels (N, 3), pixels (N, 3)) of a random crop, N = 48 x 48."""
    g, whole, wide = generator(*seeds), photograph(name), SIDE + PATCH - 1
    top, left = (int(torch.randint(n - wide + 1, (), generator=g)) for n in whole.shape[1:])
    clean = whole[:, top : top + wide, left : left + wide]
    noisy = clean + NOISE * torch.randn(clean.shape, generator=g)
    patches = F.unfold(noisy[None], PATCH)[0].T  # (N, 75)
    inner = slice(PATCH // 2, PATCH // 2 + SIDE)
    pixels = [t[:, inner, inner].flatten(1).T for t in (noisy, clean)]
    return F.layer_norm(patches, patches.shape[1:]), pixels[0], pixels[1]


def psnr(made: Tensor, wanted: Tensor) -> float:
    return -10 * math.log10(float((made - wanted).square().mean()))


def centred(lab: Lab, seed: int) -> tuple[TokenCentres, Tensor]:
    """Centres after some steps on crops of the first photograph, and what they were before."""
    torch.manual_seed(seed)
    centres = TokenCentres(CENTRES, 3 * PATCH**2, decay=0.9).train()
    before = centres.means.clone()
    for step in lab.track(range(lab.pick(STEPS, 2)), f"centres, seed {seed}"):
        x = torch.stack([crop("china", seed, step, i)[0] for i in range(lab.pick(BATCH, 1))])
        centres.store(centres(x))
    return centres.eval(), before


@torch.no_grad()
def measured(lab: Lab, seed: int) -> dict[str, float]:
    """Of each arm, the share of full attention's far weights and the PSNR of its mean, averaged over crops."""
    (centres, before), slices = centred(lab, seed), SortedClusters(GROUP)
    n = SIDE * SIDE
    found: dict[str, list[float]] = {}
    near = Neighborhood((SIDE, SIDE), WINDOW).layout(n)
    far = ~near.to_dense()[0, 0]
    for number in lab.track(range(lab.pick(CROPS, 1)), f"crops, seed {seed}"):
        x, noisy, clean = crop("flower", seed, 1000 + number)
        q, v = x[None, None], noisy[None, None]
        weights = (x @ x.T * x.shape[1] ** -0.5).softmax(1)  # (N, N)
        distant = weights * far / (weights * far).sum(1, keepdim=True)
        orders = {
            "learned": slices.order(x[None], centres(x[None])),
            "unlearned": slices.order(x[None], before),
            "random": torch.randperm(n, generator=generator(seed, 2000 + number))[None],
        }
        made = {
            "full": weights @ noisy,
            "window": cast(Tensor, fv.attention(q, q, v, near))[0, 0],
            "noisy": noisy,
        }
        for name, order in orders.items():
            made[name] = slices.attend(q, q, v, order)[0, 0]
            share = (distant * listed(slices, order[0])).sum(1).mean()
            found.setdefault(f"share: {name}", []).append(float(share))
        found.setdefault("in the window", []).append(float((weights * ~far).sum(1).mean()))
        for name, image in made.items():
            found.setdefault(f"PSNR: {name}", []).append(psnr(image, clean))
    return {name: sum(values) / len(values) for name, values in found.items()}


def listed(slices: SortedClusters, order: Tensor) -> Tensor:
    """bool (N, N): which tokens see which, for the order (N,) of the tokens of one image."""
    n = len(order)
    places = order[slices.places(n)]  # (slices, 2 group): the tokens that a slice sees
    rows = torch.arange(n) // min(slices.group, n)  # the slice of each sorted place
    seen = torch.zeros(n, n, dtype=torch.bool)
    seen[order] = torch.zeros(len(places), n, dtype=torch.bool).scatter_(1, places, True)[rows]
    return seen


def run(lab: Lab) -> Finding:
    """Do slices sorted by learned centres find what full attention reads far away?"""
    found = [lab.once(f"photograph-{seed}", partial(measured, lab, seed)) for seed in lab.seeds]
    column = {name: [f[name] for f in found] for name in found[0]}
    share = [interval(f"share of the far weights: {arm}", column[f"share: {arm}"]) for arm in ARMS]
    window = interval("share of all weights in the window", column["in the window"])
    quality = [interval(name, column[name], "dB") for name in column if name.startswith("PSNR")]
    gains = [
        difference(f"{what}: learned - {other}", column[f"{what}: learned"], column[f"{what}: {other}"])
        for what, other in (("share", "random"), ("share", "unlearned"), ("PSNR", "random"))
    ]
    tokens = SIDE * SIDE
    pairs = Figure("pairs with slices and centres over full attention's", (2 * GROUP + CENTRES) / tokens)
    return Finding(
        question="Do slices sorted by learned centres find what full attention reads far away?",
        counts_if=COUNTS_IF,
        verdict=all_of(*(judge(gain, 0) for gain in gains)),
        summary=f"Of full attention's weights outside a window of 81 keys, 64 of {tokens} keys in slices hold "
        + ", ".join(f"{f.value:.3f} ({arm})" for arm, f in zip(ARMS, share, strict=True))
        + f"; the window holds {window.value:.3f} of all. PSNR of the means: "
        + ", ".join(f"{f.name.removeprefix('PSNR: ')} {f.value:.2f}" for f in quality)
        + " dB.",
        figures=(*share, window, *quality, *gains, pairs),
        plot=bars(
            f"Patches of a photograph: {2 * GROUP} of {tokens} keys in slices",
            "share of full attention's far weights",
            [Figure(arm, f.value, f.low, f.high, f.n) for arm, f in zip(ARMS, share, strict=True)],
            ["unlearned", "random"],
        ),
        cost=pairs.value,
    )


def picture() -> dict[str, Any]:
    """Which tokens of a map of four textures see which, in slices of growing size."""
    kinds = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 1], [3, 2, 2, 3], [3, 3, 0, 0]])
    kinds = kinds.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()  # (64,)
    x = torch.eye(4)[kinds] + 0.2 * torch.randn(64, 4, generator=generator(3))
    frames = []
    for group in (4, 8, 16, 32):
        slices = SortedClusters(group)
        seen = listed(slices, slices.order(x[None], torch.eye(4))[0])
        frames.append(({"group": group}, seen, f"SortedClusters({group})"))
    return pictures.pairs(
        "An 8 x 8 map of four textures, one centre for each: tokens sorted by their centre see their slice of the "
        "order and the next one, wherever they stand.",
        frames,
        grid=(8, 8),
    )
