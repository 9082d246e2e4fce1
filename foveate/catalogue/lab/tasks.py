"""Seeded synthetic tasks. Every batch is (ids, targets): int64 (batch, length), targets -100 where nothing is asked."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator from any number of seeds; another tuple gives another stream."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (2**63)
    return torch.Generator().manual_seed(mixed)


def recall(batch: int, length: int, pairs: int, vocab: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Associative recall: `pairs` (key, value) pairs at the start, filler 0, then every key again at the end.

    Keys from [1, vocab/2), values from [vocab/2, vocab), without repetition in a row. The target at a repeated key is
    its value. length >= 3 * pairs.

    >>> ids, targets = recall(1, 12, 2, 16, generator(0))
    >>> ids.shape, (targets != IGNORE).sum().item(), ids[0, 4:10].tolist()
    (torch.Size([1, 12]), 2, [0, 0, 0, 0, 0, 0])
    """
    half = vocab // 2
    if length < 3 * pairs or pairs > half - 1:
        raise ValueError(f"recall: {pairs} pairs in {length} tokens of {vocab} kinds; accepted: 3 * pairs <= length, "
                         "pairs < vocab / 2")  # fmt: skip
    keys = 1 + torch.rand(batch, half - 1, generator=g).argsort(1)[:, :pairs]  # (batch, pairs)
    values = half + torch.rand(batch, vocab - half, generator=g).argsort(1)[:, :pairs]
    ids = torch.zeros(batch, length, dtype=torch.int64)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    order = torch.rand(batch, pairs, generator=g).argsort(1)
    ids[:, length - pairs :] = keys.gather(1, order)
    targets = torch.full_like(ids, IGNORE)
    targets[:, length - pairs :] = values.gather(1, order)
    return ids, targets


def passkey(
    batch: int, length: int, distance: Tensor | int, vocab: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A marked symbol `distance` tokens before the end must be repeated at the end.

    Token 1 marks (the symbol follows it), token 2 asks (the last token), symbols are [3, 3 + vocab/4), filler the
    rest. distance: one int, or one per row; from the symbol to the asking token, 1 <= distance <= length - 2.
    """
    symbols = max(2, vocab // 4)
    ids = 3 + symbols + torch.randint(vocab - 3 - symbols, (batch, length), generator=g)
    row = torch.arange(batch)
    at = length - 1 - torch.as_tensor(distance).expand(batch)
    if bool((at < 1).any()) or bool((at >= length - 1).any()):
        raise ValueError(f"passkey: distance {distance}; accepted: 1 to {length - 2}")
    answer = 3 + torch.randint(symbols, (batch,), generator=g)
    ids[row, at], ids[row, at - 1], ids[:, -1] = answer, 1, 2
    targets = torch.full_like(ids, IGNORE)
    targets[:, -1] = answer
    return ids, targets


def reminders(batch: int, length: int, vocab: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training rows of `passkey`: the marked symbol stands anywhere and is asked for at many later places.

    In each row every place after the symbol asks with the same probability, drawn from [0, 1); the last one always
    does. So one row teaches many distances, and in rows that ask seldom only filler lies between.

    >>> ids, targets = reminders(2, 9, 12, generator(0))
    >>> ((targets != IGNORE) == (ids == 2)).all().item(), (targets[:, -1] >= 3).all().item()
    (True, True)
    """
    symbols = max(2, vocab // 4)
    if length < 3 or vocab < 4 + symbols:
        raise ValueError(
            f"reminders: {length} tokens of {vocab} kinds; accepted: at least 3 tokens of 6 kinds"
        )
    ids = 3 + symbols + torch.randint(vocab - 3 - symbols, (batch, length), generator=g)
    row, at = torch.arange(batch), torch.randint(1, length - 1, (batch,), generator=g)
    answer = 3 + torch.randint(symbols, (batch,), generator=g)
    ids[row, at], ids[row, at - 1] = answer, 1
    asked = torch.rand(batch, length, generator=g) < torch.rand(batch, 1, generator=g)
    asked[:, -1] = True
    asked &= torch.arange(length) > at[:, None]
    return ids.masked_fill(asked, 2), torch.where(asked, answer[:, None], IGNORE)


def structured_qkv(
    n: int,
    heads: int,
    kv_heads: int,
    dim: int,
    g: torch.Generator,
    *,
    hitters: int = 16,
    local: float = 6.0,
    strength: float = 6.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, heads, n, dim), k, v (1, kv_heads, n, dim) whose causal attention has local mass and planted heavy hitters.

    Keys carry a slow rotation, so that a query's logits fall off over about `32` positions (`local` sets how far
    above the rest they are), and `hitters` random positions per key/value head have a key direction that every query
    of the head shares (`strength`, in logits). The rest is noise of one logit.
    """  # fmt: skip
    rep = heads // kv_heads
    k = torch.randn(1, kv_heads, n, dim, generator=g)
    v = torch.randn(1, kv_heads, n, dim, generator=g)
    q = torch.randn(1, heads, n, dim, generator=g)
    half = dim // 2
    place = torch.arange(n)[:, None] / 24.0 / torch.logspace(0, 1.5, half // 2)[None]
    wave = torch.cat([place.cos(), place.sin()], 1) * (2 * local / half) ** 0.5 * dim**0.25  # (n, half)
    k[..., : wave.shape[1]] = wave
    q[..., : wave.shape[1]] = wave
    shared = torch.nn.functional.normalize(torch.randn(1, kv_heads, 1, dim - half, generator=g), dim=-1)
    scale = (strength * dim**0.5) ** 0.5
    q[..., half:] = q[..., half:] * 0.5 + scale * shared.repeat_interleave(rep, 1)
    for h in range(kv_heads):
        at = torch.randperm(n, generator=g)[:hitters]
        k[0, h, at, half:] += scale * shared[0, h]
    return q, k, v
