"""MQAR, multi-query associative recall, as published: the data, the small models and their training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.layers import TransformerLM

IGNORE = -100


@dataclass(frozen=True)
class MQAR:
    """Rows of n keys with their values, then each key again, at power-law gaps; asked is its value.

        K1 V1 ... Kn Vn | queries: key i at offset 2 g_i of the rest; g without replacement, p(g) ~ (g + 1)^(a - 1)

    Keys are from [1, vocab / 2), values from [vocab / 2, vocab), without repetition in a row; the target of a query is
    its value, every other position is ignored. Positions without a token hold 0, or any token if `fill` is "random".

    Args:
        length: tokens of a row, even; pairs: n, 4 n <= length; vocab: even.
        power: a.
        fill: "zero" (Figure 2 of the paper) or "random" (its later recall-memory figure).

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (2023) and its code. Differs: the rows
    come from torch's generator, not numpy's, so the numbers differ and the distribution does not; random fill uses the
    seed (the released one does not).

    >>> ids, targets = MQAR(length=16, pairs=2, vocab=12).rows(3, torch.Generator().manual_seed(0))
    >>> ids.shape, int((targets != IGNORE).sum())
    (torch.Size([3, 16]), 6)
    """

    length: int = 64
    pairs: int = 4
    vocab: int = 8192
    power: float = 0.01
    fill: str = "zero"

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.length % 2 or 4 * self.pairs > self.length:
            raise ValueError(
                f"MQAR: length must be even and at least 4 * pairs, got length={self.length}, pairs={self.pairs}"
            )
        if self.vocab % 2 or self.vocab // 2 - 1 < self.pairs:
            raise ValueError(f"MQAR: vocab must be even and hold {self.pairs} keys, got {self.vocab}")
        if self.fill not in ("zero", "random"):
            raise ValueError(f"MQAR: fill must be 'zero' or 'random', got {self.fill!r}")

    def rows(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """(ids, targets), both int64 (count, length)."""
        half, n = self.vocab // 2, self.pairs
        keys = _distinct(count, n, 1, half, g)  # (count, n)
        values = _distinct(count, n, half, self.vocab, g)
        ids = torch.zeros(count, self.length, dtype=torch.int64)
        ids[:, 0 : 2 * n : 2], ids[:, 1 : 2 * n : 2] = keys, values
        at = 2 * n + 2 * self.gaps(count, g)
        ids.scatter_(1, at, keys)
        targets = torch.full_like(ids, IGNORE).scatter_(1, at, values)
        if self.fill == "random":
            noise = torch.randint(self.vocab, ids.shape, generator=g)
            ids = torch.where(ids == 0, noise, ids)
        return ids, targets

    def gaps(self, count: int, g: torch.Generator) -> Tensor:
        """Where each key is asked, in steps of two tokens after the pairs: (count, n), in the order of drawing."""
        space = (self.length - 2 * self.pairs) // 2
        weight = torch.arange(1, space + 1, dtype=torch.float64) ** (self.power - 1)
        # the n largest of log p + Gumbel noise, in order: drawing one by one without replacement
        noise = -torch.log(-torch.log(torch.rand(count, space, dtype=torch.float64, generator=g)))
        return (weight.log() + noise).topk(self.pairs, dim=1).indices

    def within(self, reach: int, g: torch.Generator, count: int = 20_000) -> float:
        """Share of queries whose value is at most `reach` tokens back: what a window of reach + 1 keys can know.

        >>> round(MQAR().within(63, torch.Generator().manual_seed(0)), 2)
        1.0
        """
        at = 2 * self.pairs + 2 * self.gaps(count, g)
        distance = at - (2 * torch.arange(self.pairs) + 1)
        return float((distance <= reach).double().mean())


def _distinct(count: int, n: int, low: int, high: int, g: torch.Generator) -> Tensor:
    """(count, n) numbers from [low, high), without repetition in a row, each set as likely as any other."""
    found = torch.randint(low, high, (count, n), generator=g)
    if n * n > high - low:  # repetitions are common
        return torch.rand(count, high - low, generator=g).topk(n, dim=1).indices + low
    while True:
        ordered = found.sort(1).values
        again = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if not bool(again.any()):
            return found
        found[again] = torch.randint(low, high, (int(again.sum()), n), generator=g)


def published_model(
    vocab: int, dim: int, mixer: Callable[[int], nn.Module], *, positions: int = 0, depth: int = 2
) -> TransformerLM:
    """The model of the published figures: no MLP, layer norm, tied head, normal weights of std 0.02.

    Linear maps that write to the residual (`o_proj`) start 1 / sqrt(2 depth) as large; embeddings are dropped out by
    0.1 while training (`learn`).
    """
    model = TransformerLM(vocab, dim, depth, mixer, mlp=0, norm="layer", positions=positions)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 0.02 / math.sqrt(2 * depth) if name.endswith("o_proj") else 0.02
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


Segments = Sequence[tuple[MQAR, int]]  # configurations and how many rows of each
FIGURE_MIX: Segments = (
    (MQAR(64, 4, fill="random"), 100_000),
    (MQAR(128, 8, fill="random"), 20_000),
    (MQAR(256, 16, fill="random"), 20_000),
    (MQAR(256, 32, fill="random"), 20_000),
    (MQAR(256, 64, fill="random"), 20_000),
)
"""What the models of the recall-memory figure learn from."""
FIGURE_TESTS: Segments = tuple(
    (MQAR(length, pairs, fill="random"), 1_000)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)
"""What they are tested on; the figure shows the mean over the seven."""


@torch.no_grad()
def accuracy(model: TransformerLM, rows: tuple[Tensor, Tensor], *, batch: int = 250) -> float:
    """Share of queries whose value is the largest logit."""
    model.eval()
    hits = asked = 0
    device = model.embed.weight.device
    for ids, targets in zip(rows[0].split(batch), rows[1].split(batch), strict=True):
        ids, targets = ids.to(device), targets.to(device)
        wanted = targets != IGNORE
        logits = model.hidden(ids)[wanted] @ model.embed.weight.T
        hits += int((logits.argmax(-1) == targets[wanted]).sum())
        asked += int(wanted.sum())
    return hits / asked


def learn(
    model: TransformerLM,
    train: Segments,
    tests: Segments,
    *,
    lr: float,
    seed: int = 123,
    batch: int = 512,
    epochs: int = 64,
    stop: float = 0.99,
    most: int | None = None,
    keep: Path | None = None,
    told: Callable[[int, float, list[float]], None] = lambda epoch, loss, found: None,
) -> list[list[float]]:
    """Accuracy on each test after every epoch of AdamW (decay 0.1, a cosine per epoch over `epochs`).

    It ends early once the mean accuracy is above `stop`. The model stays on its device.

    Args:
        train, tests: configurations with numbers of rows; a batch is of one configuration.
        epochs: of the cosine; most: end after this many of them, None: all.
        keep: a directory for checkpoints, one per epoch, from which an interrupted run goes on.
        told: called with epoch, mean loss and accuracies.
    """
    made = [
        task.rows(count, torch.Generator().manual_seed(seed + i)) for i, (task, count) in enumerate(train)
    ]
    asked = [
        task.rows(count, torch.Generator().manual_seed(seed + 1_000_003 + i))
        for i, (task, count) in enumerate(tests)
    ]
    device = model.embed.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    drop = nn.Dropout(0.1)
    hook = model.embed.register_forward_hook(lambda m, a, out: drop(out) if model.training else None)
    found = _resumed(model, optimizer, keep)
    for epoch in range(len(found), min(epochs, most or epochs)):
        if found and sum(found[-1]) / len(found[-1]) > stop:
            break
        torch.manual_seed(seed * 1000 + epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        model.train()
        total = 0.0
        batches = [(i, at) for i, (ids, _) in enumerate(made) for at in torch.randperm(len(ids)).split(batch)]
        for place in torch.randperm(len(batches)).tolist():
            i, at = batches[place]
            ids, targets = (t[at].to(device) for t in made[i])
            wanted = targets != IGNORE
            logits = model.hidden(ids)[wanted] @ model.embed.weight.T  # only where something is asked
            loss = nn.functional.cross_entropy(logits, targets[wanted])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(at)
        found.append([accuracy(model, rows) for rows in asked])
        _kept(model, optimizer, keep, found)
        told(epoch, total / sum(len(ids) for ids, _ in made), found[-1])
    hook.remove()
    return found


def _kept(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: Path | None, found: list[list[float]]
) -> None:
    """Weights, moments and accuracies so far, written aside and then renamed."""
    if keep is None:
        return
    keep.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": t.detach() for name, t in model.state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(t) for name, t in entry.items()}
    new = keep / "checkpoint.new"
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, new, {"accuracy": json.dumps(found)})
    os.replace(new, keep / "checkpoint.safetensors")


def _resumed(model: nn.Module, optimizer: torch.optim.Optimizer, keep: Path | None) -> list[list[float]]:
    path = None if keep is None else keep / "checkpoint.safetensors"
    if path is None or not path.exists():
        return []
    from safetensors import safe_open

    tensors = load_file(path)
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if name.startswith("optimizer."):
            _, i, what = name.split(".")
            state.setdefault(int(i), {})[what] = t
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["accuracy"])
