"""Four small tasks, one for each use of attention, in place of CAB's data sets; a minute on a CPU, not a benchmark."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bench.cab import AttentionPattern, Factory, Operator

Batch = tuple[Tensor, "Tensor | None", Tensor]  # features (B, N, F), memory (B, M, G) or None, targets
SYMBOLS, LENGTH = 8, 24  # of the reversed sequences
WAVES = 4


@dataclass(frozen=True)
class MiniTask:
    """One small task.

    Attributes:
        pattern: the use of attention that it needs.
        name, metric, lower: what is asked, how it is scored, whether lower is better.
        draw: (size, generator, held out) -> a batch.
        outputs: numbers per token (or per sequence, if pooled).
        ordered: whether queries and memory get learnt positions.
        pooled: whether the mean over tokens is read.
    """

    pattern: AttentionPattern
    name: str
    metric: str
    lower: bool
    draw: Callable[[int, torch.Generator, bool], Batch]
    outputs: int
    ordered: bool = True
    pooled: bool = False

    def loss(self, out: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats, or the squared error of numbers."""
        if targets.is_floating_point():
            return F.mse_loss(out[..., 0], targets)
        return F.cross_entropy(out.flatten(0, -2), targets.flatten())

    def score(self, out: Tensor, targets: Tensor) -> float:
        """The metric on one batch."""
        if self.metric == "accuracy":
            return float((out.argmax(-1) == targets).double().mean())
        loss = float(self.loss(out, targets))
        return loss / math.log(2) if self.metric == "bits per byte" else loss


class MiniModel(nn.Module):
    """Pre-norm blocks around one operator: features (B, N, F), memory (B, M, G) -> (B, N, outputs) or (B, outputs).

    Args:
        op: q (B, H, N, D), k, v (B, H, M, D) -> (B, H, N, D).
        task: what it is for; example: a batch of it, for the shapes.
        dim, heads, depth: of the blocks.

    In the cross uses keys and values come from the embedded memory, and there is no self attention: what a query needs
    it must get from the memory.
    """

    def __init__(
        self, op: Operator, task: MiniTask, example: Batch, *, dim: int, heads: int, depth: int
    ) -> None:
        super().__init__()
        x, memory, _ = example
        self.op, self.heads, self.pooled = op, heads, task.pooled
        self.embed = nn.Linear(x.shape[2], dim)
        self.place = nn.Parameter(0.5 * torch.randn(x.shape[1], dim)) if task.ordered else None
        self.memory = nn.Linear(memory.shape[2], dim) if memory is not None else None
        placed = memory is not None and task.ordered
        self.there = nn.Parameter(0.5 * torch.randn(memory.shape[1], dim)) if placed else None  # pyright: ignore
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 2))
        self.q = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(depth))
        self.kv = nn.ModuleList(nn.Linear(dim, 2 * dim, bias=False) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )
        self.head = nn.Linear(dim, task.outputs)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y, seen = self.embed(x), None
        if self.place is not None:
            y = y + self.place
        if self.memory is not None and memory is not None:
            seen = self.memory(memory)
            seen = self.norms[-1](seen if self.there is None else seen + self.there)
        for i, (q, kv, out, mlp) in enumerate(zip(self.q, self.kv, self.out, self.mlp, strict=True)):
            z = self.norms[2 * i](y)
            parts = (q(z), *kv(z if seen is None else seen).chunk(2, -1))
            mixed = self.op(
                *(t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in parts)
            )  # (B, H, N, D)
            y = y + out(mixed.transpose(1, 2).flatten(2))
            y = y + mlp(self.norms[2 * i + 1](y))
        y = self.norms[-2](y)
        return self.head(y.mean(1) if self.pooled else y)


# ------------------------------------------------------------------------------------------------ the tasks
@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install foveate[cli]") from error
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)  # pyright: ignore
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    return ((x - x.mean()) / x.std())[order], y[order]


def digits(size: int, g: torch.Generator, held_out: bool) -> Batch:
    """An 8 x 8 digit as 16 patches of 2 x 2 pixels; which digit. The last 360 images are held out, and given all."""
    x, y = _digits()
    at = (
        torch.arange(len(x) - 360, len(x))
        if held_out
        else torch.randint(0, len(x) - 360, (size,), generator=g)
    )
    patches = x[at].view(-1, 8, 8).unfold(1, 2, 2).unfold(2, 2, 2)  # (B, 4, 4, 2, 2)
    return patches.reshape(len(at), 16, 4), None, y[at]


@functools.cache
def _text(held_out: bool) -> Tensor:
    from foveate.organisms.reader.data import stdlib_text

    data = torch.frombuffer(bytearray(stdlib_text(held_out=held_out)), dtype=torch.uint8)
    return data[data < 128]


def text(size: int, g: torch.Generator, held_out: bool) -> Batch:
    """64 bytes of the standard library; the byte that follows each."""
    data = _text(held_out)
    at = torch.randint(0, len(data) - 65, (size, 1), generator=g) + torch.arange(65)
    ids = data[at].long()
    return F.one_hot(ids[:, :-1], 128).float(), None, ids[:, 1:]


def _waves(x: Tensor) -> Tensor:
    """x (...,) in [0, 1] -> its sines and cosines (..., 2 WAVES)."""
    angles = x[..., None] * math.pi * 2.0 ** torch.arange(WAVES)
    return torch.cat([angles.sin(), angles.cos()], -1)


def curve(size: int, g: torch.Generator, held_out: bool) -> Batch:
    """256 noisy points of a random curve, in no order; its value at 16 other places."""
    x = torch.rand(size, 272, generator=g)
    phase, height = torch.rand(2, size, 3, 1, generator=g)
    y = (height * torch.sin(2 * math.pi * (x[:, None] * torch.tensor([1.0, 2.0, 3.0])[:, None] + phase))).sum(
        1
    )
    noisy = y[:, :256] + 0.1 * torch.randn(size, 256, generator=g)
    memory = torch.cat([_waves(x[:, :256]), noisy[..., None]], -1)
    return _waves(x[:, 256:]), memory, y[:, 256:]


def reverse(size: int, g: torch.Generator, held_out: bool) -> Batch:
    """A memory of 24 symbols; the same from the last to the first, each given the one before it."""
    ids = torch.randint(0, SYMBOLS, (size, LENGTH), generator=g)
    back = ids.flip(1)
    given = torch.cat([torch.full((size, 1), SYMBOLS), back[:, :-1]], 1)
    return F.one_hot(given, SYMBOLS + 1).float(), F.one_hot(ids, SYMBOLS).float(), back


@dataclass(frozen=True)
class CabMini:
    """The four uses of attention on one small task each: digits, text, points of a curve, reversed sequences.

    Every operator gets the same model, data, steps and seeds.

    Args:
        steps, batch, rate: of AdamW with a warm-up over a tenth and a cosine to zero.
        dim, heads, depth: of the model.

    Source: the protocol of CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (2022), on stand-ins for
    its data sets, which are large: scores are not comparable with the paper's.

    >>> softmax = torch.nn.functional.scaled_dot_product_attention
    >>> mini = CabMini(steps=2, batch=2)
    >>> [p.name for p in mini.run(lambda p: softmax if p is AttentionPattern.NC else None)]
    ['NC']
    """

    steps: int = 300
    batch: int = 16
    rate: float = 3e-3
    dim: int = 32
    heads: int = 2
    depth: int = 2

    def tasks(self) -> dict[AttentionPattern, MiniTask]:
        """One task for each use."""
        ns, cs, nc, cc = AttentionPattern
        return {
            ns: MiniTask(ns, "digits", "accuracy", False, digits, 10, pooled=True),
            cs: MiniTask(cs, "text", "bits per byte", True, text, 128),
            nc: MiniTask(nc, "curve", "squared error", True, curve, 1, ordered=False),
            cc: MiniTask(cc, "reverse", "accuracy", False, reverse, SYMBOLS),
        }

    def run(self, factory: Factory, *, seed: int = 0) -> dict[AttentionPattern, float]:
        """The metric of every use for which the factory has an operator."""
        found = {}
        for pattern in AttentionPattern:
            op = factory(pattern)
            if op is not None:
                found[pattern] = self.trained(op, pattern, seed)
        return found

    def trained(self, op: Operator, pattern: AttentionPattern, seed: int) -> float:
        """The metric on held-out data of a model trained with this operator."""
        task, g = self.tasks()[pattern], torch.Generator().manual_seed(1000 + seed)
        batch = task.draw(self.batch, g, False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MiniModel(op, task, batch, dim=self.dim, heads=self.heads, depth=self.depth)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, betas=(0.9, 0.98))
        for step in range(self.steps):
            rate = min(1.0, 10 * (step + 1) / self.steps) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            for group in optimizer.param_groups:
                group["lr"] = self.rate * rate
            x, memory, targets = task.draw(self.batch, g, False)
            loss = task.loss(model(x, memory), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            x, memory, targets = task.draw(64, torch.Generator().manual_seed(7), True)
            return task.score(model.eval()(x, memory), targets)
