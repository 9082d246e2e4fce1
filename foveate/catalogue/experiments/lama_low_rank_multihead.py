"""LAMA: which package a docstring is from, read by a GRU under three kinds of pooling."""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.catalogue import pictures
from foveate.catalogue.lab import Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.layers import GRULamaClassifier

PACKAGES = ("asyncio", "email", "logging", "multiprocessing", "unittest", "xml")
WORDS, VOCAB, DIM, HEADS = 32, 1000, 64, 8
STEPS, BATCH, LR = 150, 32, 3e-3
ARMS = ("mean", "mean, hidden layer", "transformer", "LAMA")
COUNTS_IF = (
    "The first 32 words of the docstrings of six packages of the standard library, a fifth held out, three seeds: a "
    "bidirectional GRU pooled by LAMA with 8 heads names the package more often than the same GRU with mean "
    "pooling, by more than 0.02, and its attention has at most a tenth of the parameters of the attention of a "
    "Transformer layer with 8 heads in its place. The mean's accuracy must leave room (below 0.95)."
)


def run(lab: Lab) -> Finding:
    """Does low-rank multi-head pooling of a recurrent text encoder gain over its mean, at few parameters?"""
    file = lambda name, seed: f"{name}-{seed}".replace(", ", "_").replace(" ", "_")  # noqa: E731
    found = {name: [lab.once(file(name, seed), lambda n=name, s=seed: one(lab, n, s)) for seed in lab.seeds]
             for name in ARMS}  # fmt: skip
    shown = [interval(name, [r["accuracy"] for r in found[name]]) for name in ARMS]
    score = {name: [r["accuracy"] for r in found[name]] for name in ARMS}
    gain = difference("LAMA - mean", score["LAMA"], score["mean"])
    others = [difference(f"LAMA - {name}", score["LAMA"], score[name]) for name in ARMS[1:3]]
    share = Figure("attention parameters, of a Transformer layer's",
                   found["LAMA"][0]["attention"] / found["transformer"][0]["attention"])  # fmt: skip
    room = Figure("room above the mean", 1 - shown[0].value)
    return Finding(
        question="Does low-rank multi-head pooling of a recurrent text encoder gain over its mean, at few parameters?",
        counts_if=COUNTS_IF,
        verdict=all_of(judge(gain, above=0.02), judge(Figure("", -share.value), above=-0.1), judge(room, above=0.05)),
        summary=f"LAMA names the package of {shown[3]} of the docstrings, the mean of {shown[0]} ({shown[1]} with a "
        f"hidden layer), a Transformer layer of {shown[2]}; its attention has {share} of that layer's parameters.",
        figures=(*shown, gain, *others, share,
                 *(Figure(f"parameters, {name}", found[name][0]["parameters"]) for name in ARMS)),
        plot=bars("Which package is a docstring from?", "share named rightly, of docstrings held out", shown,
                  list(ARMS[:3])),
    )  # fmt: skip


@functools.cache
def docstrings() -> tuple[Tensor, Tensor]:
    """(ids (texts, 32), package (texts,)) in a fixed random order; 0 is padding, 1 any rare word."""
    library, texts = Path(sysconfig.get_paths()["stdlib"]), []
    for label, package in enumerate(PACKAGES):
        kept = set()
        for path in sorted((library / package).rglob("*.py")):
            if "test" in path.relative_to(library / package).parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    words = tuple(re.findall(r"[a-z]+", (ast.get_docstring(node) or "").lower()))[:WORDS]
                    if len(words) >= 5:
                        kept.add(words)
        texts += [(label, words) for words in sorted(kept)]
    counts = Counter(word for _, words in texts for word in words)
    common = sorted(counts, key=lambda word: (-counts[word], word))[: VOCAB - 2]
    number = {word: i + 2 for i, word in enumerate(common)}
    ids = torch.zeros(len(texts), WORDS, dtype=torch.int64)
    for row, (_, words) in zip(ids, texts, strict=True):
        row[: len(words)] = torch.tensor([number.get(word, 1) for word in words])
    order = torch.randperm(len(texts), generator=generator(6))
    return ids[order], torch.tensor([label for label, _ in texts])[order]


class Other(GRULamaClassifier):
    """The same encoder with a mean over the tokens, after a Transformer layer or before a hidden layer."""

    def __init__(self, arm: str) -> None:
        super().__init__(VOCAB, len(PACKAGES), DIM)
        self.pool = None  # type: ignore[assignment]
        self.mixer = None
        if arm == "transformer":
            self.mixer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.2, batch_first=True)
        self.out = nn.Linear(DIM, len(PACKAGES))  # pyright: ignore[reportAttributeAccessIssue]
        if arm == "mean, hidden layer":  # as many parameters as LAMA and its linear map
            inner = (2 * DIM + HEADS * DIM) * HEADS // (2 * DIM)
            self.out = nn.Sequential(nn.Linear(DIM, inner), nn.ReLU(), nn.Linear(inner, len(PACKAGES)))  # pyright: ignore

    def forward(self, ids: Tensor) -> Tensor:
        h, mask = self.encode(ids)
        if self.mixer is not None:
            h = self.mixer(h, src_key_padding_mask=~mask)
        h = h.masked_fill(~mask.unsqueeze(2), 0.0).sum(1) / mask.sum(1, keepdim=True)
        return self.out(self.dropout(h))


def one(lab: Lab, name: str, seed: int) -> dict[str, float]:
    """Train an arm and test it; every arm sees the same texts in the same order."""
    torch.manual_seed(seed)
    ids, label = docstrings()
    held = len(ids) // 5
    model = GRULamaClassifier(VOCAB, len(PACKAGES), DIM, HEADS) if name == "LAMA" else Other(name)
    optimizer, g = torch.optim.Adam(model.parameters(), LR), generator(seed, 4)
    for _ in lab.track(range(lab.pick(STEPS, 3)), f"{name}, seed {seed}"):
        at = torch.randint(held, len(ids), (BATCH,), generator=g)
        loss = F.cross_entropy(model(ids[at]), label[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        hits = (model(ids[:held]).argmax(-1) == label[:held]).double().mean()
    attention = model.mixer.self_attn if isinstance(model, Other) and model.mixer is not None else model.pool
    count = lambda m: 0 if m is None else sum(p.numel() for p in m.parameters())  # noqa: E731
    return {"accuracy": float(hits), "parameters": count(model), "attention": count(attention)}


def picture() -> dict[str, Any]:
    """Weights of the heads over the words of one text, before training."""
    torch.manual_seed(0)
    model = GRULamaClassifier(VOCAB, len(PACKAGES), DIM, HEADS).eval()
    return pictures.weights(
        "Each head has one distribution over the words of a text: a row. All come from one thin bilinear form, and "
        "their weighted means are what the classifier sees.",
        model.weights(torch.randint(2, VOCAB, (1, WORDS), generator=generator(1)))[0].detach(),
        rows="head",
        columns="word",
        code="GRULamaClassifier(1000, 6).weights(ids)[0]",
    )
