"""HyperAttention: error at equal keys per query on planted clusters and in a trained model, and growth of the pairs."""

from __future__ import annotations

import statistics
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.bench.subject import load_subject
from foveate.bench.texts import load_text
from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    Figure,
    Finding,
    Lab,
    all_of,
    banded,
    difference,
    interval,
    judge,
    lines,
    slope,
)
from foveate.catalogue.lab.model_heads import attending, captured
from foveate.catalogue.lab.tasks import generator
from foveate.composite import HyperAttention
from foveate.composite.halves import partial
from foveate.composite.hyperattention import hash_codes

OURS, PIECE = "HyperAttention", 512
PAPERS = HyperAttention(is_causal=True)
WIDTHS = (64, 128, 256)  # b = m; every arm computes b + m keys a query
ARMS = {
    OURS: lambda w: {"block": w, "samples": w},
    "samples alone": lambda w: {"block": 0, "samples": 2 * w},
    "unsorted blocks": lambda w: {"block": 2 * w, "samples": 0, "n_proj": 0},
    "sorted blocks": lambda w: {"block": 2 * w, "samples": 0},
    "unsorted blocks + samples": lambda w: {"block": w, "samples": w, "n_proj": 0},
}
RIVALS = ("samples alone", "unsorted blocks")
COUNTS_IF = (
    "4,096 tokens, relative error of the output (Frobenius norm), mean over b = m = 64, 128, 256: on planted clusters "
    "without a mask, and on the q, k, v of reader's layers with a causal mask (pieces of 512), HyperAttention errs "
    "less than samples alone and than unsorted blocks, all with b + m keys a query (95 % interval of the paired "
    "difference over three seeds above 0 in all four cases). With a causal mask and the paper's settings the pairs "
    "that it computes (masked samples included) grow from 8,192 to 131,072 tokens with an exponent below 1.3, and are "
    "less than a third of exact attention's at 32,768 tokens"
)
reader = cache(lambda: load_subject("reader"))


def planted(n: int, seed: int, heads: int = 4, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of 64 tokens in random order: logits of 6 inside, about a normal's outside, values in common."""
    g = generator(seed, 4)
    of = torch.randperm(n, generator=g) % max(1, n // 64)  # cluster of each token
    centre = torch.nn.functional.normalize(torch.randn(1, heads, n, dim, generator=g), dim=-1)[:, :, of]
    noisy = lambda x: x + 0.3 * torch.randn(x.shape, generator=g)  # noqa: E731
    q, k = (noisy(centre * (6 * dim**0.5) ** 0.5) for _ in range(2))
    shared = torch.randn(1, heads, n, dim, generator=g)[:, :, of]
    return q, k, shared + torch.randn(shared.shape, generator=g)


def errors(
    layers: list[tuple[Tensor, Tensor, Tensor]], causal: bool, widths: tuple[int, ...], seed: int
) -> dict[str, list]:
    """Arm -> relative error of the output at each width, mean over layers."""
    found: dict[str, list] = {name: [] for name in ARMS}
    wants = [partial(q, k, v, is_causal=causal)[0] for q, k, v in layers]
    for w in widths:
        for name, arm in ARMS.items():
            hyper = HyperAttention(**arm(w), min_seq_len=PIECE if causal else 0, is_causal=causal, seed=seed)
            pairs = zip(layers, wants, strict=True)
            found[name].append(
                statistics.mean(float((hyper(*qkv) - want).norm() / want.norm()) for qkv, want in pairs)
            )
    return found


def window(seed: int, n: int) -> Tensor:
    """n bytes of the standard library's text; every seed has its own."""
    data = load_text("stdlib").data
    return torch.tensor(list(data[seed * n : (seed + 1) * n]))


def language(seed: int, n: int) -> dict[str, float]:
    """Bits per byte of reader with exact attention, and with HyperAttention or a rival in all its layers."""
    ids, found = window(seed, n), {}
    hyper = {
        name: HyperAttention(**ARMS[name](256), min_seq_len=PIECE, is_causal=True, seed=seed) for name in ARMS
    }
    for name in ("exact", OURS, *RIVALS):

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, name: str = name) -> Tensor:
            if name == "exact":
                return partial(q, k, v, is_causal=True, scale=scale)[0]
            return hyper[name](q, k, v, scale=scale)

        with attending(reader().model, attend):
            logits = reader().logits(ids)[0, :-1]
        found[name] = float(torch.nn.functional.cross_entropy(logits, ids[1:])) / 0.6931471805599453
    return found


def hardness(q: Tensor, k: Tensor) -> tuple[float, float]:
    """Means over heads of the two parameters of the theory: n max_j |column j of the weights|^2, and the decimal
    logarithm of the ratio of the largest row sum to the least without the entries of the sorted blocks."""
    columns, spreads = [], []
    projections = torch.randn(q.shape[3], 7, generator=generator(0))
    for h in range(q.shape[1]):
        x, y = q[0, h].double(), k[0, h * k.shape[1] // q.shape[1]].double()
        s = x @ y.T * x.shape[1] ** -0.5
        columns.append(float(len(x) * torch.softmax(s, -1).square().sum(0).max()))
        place = [hash_codes(t, projections).argsort(stable=True).argsort() // 256 for t in (x, y)]
        rest = s.masked_fill(place[0][:, None] == place[1], -torch.inf).logsumexp(-1)
        spreads.append(float(rest.max() - rest.min()) / 2.302585092994046)
    return statistics.mean(columns), statistics.mean(spreads)


def run(lab: Lab) -> Finding:
    """At equal keys per query, does hashing and sampling err less than either alone, with near-linear pairs?"""
    n, widths = lab.pick(4096, 1024), lab.pick(WIDTHS, WIDTHS[:1])
    found: dict[str, list[dict[str, Any]]] = {"clusters": [], "reader": [], "bits": []}
    with torch.no_grad():
        for seed in lab.track(lab.seeds, "errors"):
            made = {
                "clusters": lambda s=seed: errors([planted(n, s)], False, widths, s),
                "reader": lambda s=seed: errors(captured(reader().model, window(s, n)), True, widths, s),
                "bits": lambda s=seed: language(s, n),
            }
            for what, make in made.items():
                found[what].append(lab.once(f"{what}-{seed}", make))
        hard = lab.once("hardness", lambda: {"clusters": hardness(*planted(n, 0)[:2]), "reader": halves(n)})
    data = {what: found[what] for what in ("clusters", "reader")}
    means = {
        (what, name): [statistics.mean(r[name]) for r in runs] for what, runs in data.items() for name in ARMS
    }
    error = {key: interval(f"relative error, {key[0]}: {key[1]}", values) for key, values in means.items()}
    gains = [
        difference(f"error more than {OURS}'s, {what}: {rival}", means[what, rival], means[what, OURS])
        for what in data
        for rival in RIVALS
    ]
    exact = [b["exact"] for b in found["bits"]]
    loss = {
        name: difference(f"bits per byte more than exact: {name}", [b[name] for b in found["bits"]], exact)
        for name in (OURS, *RIVALS)
    }
    lengths = [2**e for e in range(13, 18)]
    growth = slope("exponent of the counted pairs, causal", lengths, [PAPERS.pairs(m) for m in lengths])
    share = Figure("share of the causal pairs at 32,768 tokens", PAPERS.pairs(32_768) / (32_768 * 32_769 / 2))
    few = judge(Figure("1.3 - exponent", 1.3 - growth.value), 0.0), judge(Figure("", 1 / share.value), 3.0)
    shown = lambda what: ", ".join(f"{error[what, name].value:.3g} ({name})" for name in ARMS)  # noqa: E731
    return Finding(
        question="At equal keys per query, does HyperAttention err less than samples or blocks alone, and do its "
        "pairs grow almost linearly?",
        counts_if=COUNTS_IF,
        verdict=all_of(*(judge(gain, 0.0) for gain in gains), *few),
        summary=f"Relative error on clusters {shown('clusters')}, in reader {shown('reader')}; with it reader needs "
        f"{loss[OURS]} bits per byte more. Causal pairs grow as n to the {growth.value:.2f}; {share.value:.2g} of them "
        "at 32,768 tokens.",
        figures=(
            *error.values(),
            *gains,
            growth,
            share,
            interval("bits per byte of reader: exact", exact),
            *loss.values(),
            *(Figure(f"largest column of the weights, {what}", alpha) for what, (alpha, _) in hard.items()),
            *(
                Figure(f"spread of the other row sums (log10), {what}", kappa)
                for what, (_, kappa) in hard.items()
            ),
        ),
        plot=lines(
            f"Planted clusters, {n:,} tokens",
            "keys computed per query",
            "relative error of the output",
            [banded(name, [2 * w for w in widths], [r[name] for r in found["clusters"]]) for name in ARMS],
            log_x=True,
        ),
        quality=statistics.mean(exact) / (statistics.mean(exact) + loss[OURS].value),
        cost=share.value,
    )


def halves(n: int) -> tuple[float, float]:
    """Hardness of what the second half of a text reads in the first, mean over reader's layers."""
    layers = captured(reader().model, window(0, n))
    each = [hardness(q[:, :, n // 2 :], k[:, :, : n // 2]) for q, k, _ in layers]
    return statistics.mean(a for a, _ in each), statistics.mean(b for _, b in each)


def picture() -> dict[str, Any]:
    """Which pairs are computed where every eighth token is alike; values that name their key tell."""
    g, n = generator(3), 64
    centre = torch.randn(8, 16, generator=g)[torch.arange(n) % 8] * 2
    q, k = (centre + 0.3 * torch.randn(n, 16, generator=g) for _ in range(2))
    names = torch.eye(n)
    frames = []
    for causal in (False, True):
        for block, samples in ((8, 0), (8, 4), (16, 0), (16, 4)):
            for n_proj in (0, 1, 2, 3, 4, 6):
                settings = (
                    f"block={block}, samples={samples}, n_proj={n_proj}, min_seq_len=16, is_causal={causal}"
                )
                hyper = HyperAttention(block, samples, n_proj, 16, causal)
                seen = hyper(*(t[None, None] for t in (q, k, names)))[0, 0] > 0
                at = {"causal": causal, "block": block, "samples": samples, "n_proj": n_proj}
                frames.append((at, seen, f"HyperAttention({settings})"))
    return pictures.pairs(
        "Pairs that are computed when every eighth token is alike: more bits of the hash (n_proj) bring alike tokens "
        "into one block; samples are columns that whole pieces share.",
        frames,
    )
