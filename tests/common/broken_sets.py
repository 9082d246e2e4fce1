"""Patterns, selectors, scores and normalisers: good ones, and ones with a single flaw each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from foveate.core import normalizers, scores
from foveate.core.layout import TILE, BlockLayout
from foveate.core.patterns import EMPTY, FULL, PARTIAL, Pattern
from foveate.core.patterns.base import distances
from foveate.core.selectors.base import Selector


# ------------------------------------------------------------------------------------------------- patterns
@dataclass(frozen=True, repr=False)
class Band(Pattern):
    """Good: the `width` keys up to the query."""

    width: int

    def contains(self, ext, b, h, q, k):
        d = q + ext.offset - k
        return (d >= 0) & (d < self.width)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = distances(ext, q0, q1, k0, k1)
        empty, full = (high < 0) | (low >= self.width), (low >= 0) & (high < self.width)
        return np.where(empty, EMPTY, np.where(full, FULL, PARTIAL)).astype(np.int8)


@dataclass(frozen=True, repr=False)
class EagerBand(Band):
    """Calls a tile FULL where some of it is allowed: the layout, and so attention, has pairs too many."""

    def classify(self, ext, b, h, q0, q1, k0, k1):
        kinds = super().classify(ext, b, h, q0, q1, k0, k1)
        return np.where(kinds == PARTIAL, FULL, kinds).astype(np.int8)


@dataclass(frozen=True, repr=False)
class LazyBand(Band):
    """Calls a tile EMPTY where some of it is allowed."""

    def classify(self, ext, b, h, q0, q1, k0, k1):
        kinds = super().classify(ext, b, h, q0, q1, k0, k1)
        return np.where(kinds == PARTIAL, EMPTY, kinds).astype(np.int8)


@dataclass(frozen=True, repr=False, eq=False)
class Unequal(Band):
    """Equal only to itself."""

    __eq__, __hash__ = object.__eq__, object.__hash__


@dataclass(frozen=True, repr=False)
class Mumbling(Band):
    """Its repr makes another pattern."""

    def __repr__(self) -> str:
        return f"Band({self.width + 1})"


@dataclass(frozen=True, repr=False)
class Ahead(Band):
    """Sees one key ahead."""

    def contains(self, ext, b, h, q, k):
        d = q + ext.offset - k
        return (d >= -1) & (d < self.width)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return np.full(np.shape(q0), PARTIAL, np.int8)


@dataclass(frozen=True, repr=False)
class Stretching(Pattern):
    """Its window grows with the length of the sequence: a longer text changes what early queries see."""

    def contains(self, ext, b, h, q, k):
        d = q + ext.offset - k
        return (d >= 0) & (d < max(1, ext.k_len // 8))


@dataclass(frozen=True, repr=False)
class Blocks(Pattern):
    """Causal within blocks: not the same offsets for every query."""

    def contains(self, ext, b, h, q, k):
        return (q >= k) & (q // 8 == k // 8)


# ------------------------------------------------------------------------------------------------ selectors
@dataclass(frozen=True)
class Strongest(Selector):
    """Good: the diagonal, and for every row of tiles the earlier tile with the strongest mean key."""

    keep: int = 1

    def blocks(self, q, k):
        n, m = q.shape[2], k.shape[2]
        nq, nk, first = -(-n // TILE), -(-m // TILE), (m - n) // TILE
        groups = q.shape[1] // k.shape[1]
        rest = -m % TILE
        means = torch.nn.functional.pad(k.double(), (0, 0, 0, rest)).unflatten(2, (nk, TILE)).sum(3)
        strength = means.norm(dim=-1).repeat_interleave(groups, 1)  # (B, H, nk)
        at = torch.arange(nq)[:, None] + first
        past = torch.arange(nk) < at
        order = torch.where(past, strength.unsqueeze(2), -1).argsort(-1, descending=True)[..., : self.keep]
        chosen = torch.zeros(*strength.shape[:2], nq, nk, dtype=torch.bool).scatter(-1, order, True)
        return (chosen & past) | (torch.arange(nk) == at)

    def layout(self, q, k, *, scale=None, is_causal=True):
        n, m = q.shape[2], k.shape[2]
        if n > m or ((m - n) % TILE and n > 1):
            raise ValueError(f"k_len - q_len must be a multiple of {TILE}, got {m - n}")
        if n == 1:
            return BlockLayout.from_mask(torch.ones(1, m, dtype=torch.bool))
        return BlockLayout.from_blocks(self.blocks(q, k), n, m, causal=is_causal)


class Misfit(Strongest):
    """A layout for one key less."""

    def layout(self, q, k, *, scale=None, is_causal=True):
        return super().layout(q[:, :, :-1], k[:, :, :-1], is_causal=is_causal)


class Untidy(Strongest):
    """Keeps a bitmap that no tile uses."""

    def layout(self, q, k, *, scale=None, is_causal=True):
        it = super().layout(q, k, is_causal=is_causal)
        words = torch.cat([it.dictionary, torch.full((1, TILE), 5, dtype=torch.int64)])
        return BlockLayout(it.q_len, it.k_len, it.row_ptr, it.tile_idx, it.tile_id, words, it.batch, it.heads)


class Fickle(Strongest):
    """Every second call keeps everything."""

    calls = itertools.count()

    def layout(self, q, k, *, scale=None, is_causal=True):
        it = super().layout(q, k, is_causal=is_causal)
        if next(self.calls) % 2:
            return it
        every = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        return BlockLayout.from_mask(every.tril(k.shape[2] - q.shape[2]))


class Scribbling(Strongest):
    """Normalises the queries in place."""

    def layout(self, q, k, *, scale=None, is_causal=True):
        q /= q.norm(dim=-1, keepdim=True)
        return super().layout(q, k, is_causal=is_causal)


class Voting(Strongest):
    """All rows of the batch share the first one's selection."""

    def layout(self, q, k, *, scale=None, is_causal=True):
        return super().layout(q, k[:1].expand_as(k).flip(2), is_causal=is_causal)


class Raw(Strongest):
    """Reads the memory of the keys as if it were contiguous."""

    def layout(self, q, k, *, scale=None, is_causal=True):
        steps = (k[0].numel(), k[0, 0].numel(), k.shape[3], 1)
        return super().layout(q, torch.as_strided(k, k.shape, steps, 0), is_causal=is_causal)


class PerKeyHead(Strongest):
    """A set per key head instead of one per query head."""

    def layout(self, q, k, *, scale=None, is_causal=True):
        return super().layout(q[:, : k.shape[1]], k, is_causal=is_causal)


class Acausal(Strongest):
    """Ignores is_causal."""

    def layout(self, q, k, *, scale=None, is_causal=True):
        return super().layout(q, k, is_causal=False)


# --------------------------------------------------------------------------------- scores and normalisers
class Bias(scores.SoftCap):
    """Says that it adds nothing, and caps the logits."""

    tensor = torch.zeros(1)


class Stretched(scores.SoftCap):
    """Sharpens by the length of the sequence, so that what comes later changes what came before."""

    def apply(self, logits):
        return logits * logits.shape[-1] ** 0.5


@dataclass(frozen=True)
class ReLU(normalizers.Softmax):
    """Says that it is a ReLU, and is a softmax."""


class Restless(normalizers.Sigmoid):
    """Another bias every time it is read."""

    turns = itertools.count()

    def __getattribute__(self, name):
        if name == "bias":
            return -0.1 * (next(Restless.turns) % 7)
        return super().__getattribute__(name)
