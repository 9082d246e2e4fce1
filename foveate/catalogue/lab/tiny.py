"""A transformer of a few dozen lines with an exchangeable mixer, and its trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.catalogue.lab.lab import Lab
from foveate.catalogue.lab.tasks import IGNORE

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (batch, heads, tokens, head_dim) -> out


class Block(nn.Module):
    """Pre-norm attention and MLP; `attend` is a plain function of q, k, v, rotated by rotary positions."""

    def __init__(self, dim: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (b, h, n, d)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions on (.., n, d): halves (a, b) -> (a cos - b sin, a sin + b cos)."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)  # (n, d/2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class TinyLM(nn.Module):
    """Token embedding, blocks, tied head: ids (batch, n) -> logits (batch, n, vocab).

    Args:
        attend: one function for all layers, or one per layer.
        positions: "rotary", or "none" for mixers that bring their own.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        heads: int,
        layers: int,
        attend: Attend | Sequence[Attend],
        *,
        positions: str = "rotary",
        base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if positions not in ("rotary", "none"):
            raise ValueError(f"TinyLM: positions {positions!r}; accepted: rotary, none")
        attends = [attend] * layers if callable(attend) else list(attend)
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, a) for a in attends)
        self.norm = nn.LayerNorm(dim)
        self.pairs = dim // heads // 2 if positions == "rotary" else 0
        self.base = base
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        rotary = None
        if self.pairs:
            rates = self.base ** (-torch.arange(self.pairs, device=ids.device) / self.pairs)
            rotary = torch.arange(ids.shape[1], device=ids.device)[:, None] * rates  # (n, d/2)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, rotary)
        return self.norm(x) @ self.embed.weight.T


def train(
    lab: Lab,
    model: nn.Module,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    what: str = "training",
    stop: float | None = None,
) -> list[float]:
    """AdamW with warm-up (a tenth) and a cosine to zero; the losses of all steps.

    Args:
        batch: step -> (ids, targets), on any device.
        stop: end early once the mean loss of 20 steps is below this.
    """
    model.to(lab.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    losses: list[float] = []
    for step in lab.track(range(steps), what):
        rate = min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        ids, targets = (t.to(lab.device) for t in batch(step))
        loss = F.cross_entropy(model(ids).flatten(0, -2), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if stop is not None and len(losses) >= 20 and sum(losses[-20:]) / 20 < stop:
            break
    return losses


@torch.no_grad()
def accuracy(lab: Lab, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Share of asked positions at which the largest logit is the target."""
    model.to(lab.device).eval()
    hits = asked = 0
    for ids, targets in batches:
        targets = targets.to(lab.device)
        seen = targets != IGNORE
        hits += int((model(ids.to(lab.device)).argmax(-1)[seen] == targets[seen]).sum())
        asked += int(seen.sum())
    return hits / asked
