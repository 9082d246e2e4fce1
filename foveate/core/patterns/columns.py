"""Rows and columns: sinks, key padding, global tokens, prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from foveate.core.layout import TILE
from foveate.core.patterns.band import Full
from foveate.core.patterns.base import (
    EMPTY,
    PARTIAL,
    Pattern,
    Values,
    diagonal,
    distances,
    integer,
    tile_bounds,
    values,
    verdict,
)


@dataclass(frozen=True, repr=False)
class Sinks(Pattern):
    """The first `n` keys, for every query. Not causal by itself. StreamingLLM (2023), attention sinks.

    >>> from foveate.core.patterns import Causal
    >>> (Causal() & Sinks(1)).layout(3).to_dense()[0, 0].int().tolist()
    [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", integer("Sinks", "n", self.n, 0))

    def contains(self, ext, b, h, q, k):
        return k < self.n

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return verdict(k0 >= self.n, k1 <= self.n)

    def signature(self, ext, b, h, qt, kt):
        return (np.clip(self.n - TILE * kt, 0, TILE) + 0 * qt,)


@dataclass(frozen=True, repr=False)
class KeyPadding(Pattern):
    """Only real keys: `mask[b, k]` True = real token. Queries are not restricted.

    Args:
        mask: bool (M,) or (B, M), as the attention mask of a tokenizer.

    >>> import torch
    >>> KeyPadding(torch.tensor([[True, True, False]])).layout(2, 3).to_dense()[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 0]]
    """

    mask: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", values("KeyPadding", "mask", self.mask, (1, 2), "bool"))

    @cached_property
    def _bits(self) -> np.ndarray:
        return np.atleast_2d(self.mask.array)

    @cached_property
    def _counts(self) -> np.ndarray:
        return counts_before(self._bits)

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self._bits)

    def check(self, ext):
        if self._bits.shape[1] != ext.k_len:
            raise ValueError(
                f"KeyPadding: mask must have k_len = {ext.k_len} columns, got {self._bits.shape[1]}"
            )

    def at(self, b, h):
        if self.batch == 1:
            return self
        row = self._bits[b]
        return Full() if row.all() else KeyPadding(row)

    def _row(self, b: int) -> int:
        return b if self.batch > 1 else 0

    def contains(self, ext, b, h, q, k):
        return self._bits[self._row(b)][k]

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return counted(self._counts[self._row(b)], k0, k1)

    def signature(self, ext, b, h, qt, kt):
        c = self.classify(ext, b, h, *tile_bounds(ext, qt, kt))
        return (np.where(c == PARTIAL, kt, -1 - c),)


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    """Global tokens: they see every key, and every query sees them. Longformer (2020), BigBird (2020).

    A query is global when its *position* (bottom-right aligned) is one of the tokens. Not causal by itself.

    Args:
        tokens: how many leading tokens are global, or their positions (ints >= 0).
        rows: global queries see every key.
        columns: every query sees the global keys.

    >>> GlobalTokens([1]).layout(3).to_dense()[0, 0].int().tolist()
    [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """

    tokens: Any
    rows: bool = True
    columns: bool = True

    def __post_init__(self) -> None:
        tokens = self.tokens
        if isinstance(tokens, (int, np.integer)) and not isinstance(tokens, bool):
            tokens = range(integer("GlobalTokens", "tokens", tokens, 1))
        held = values("GlobalTokens", "tokens", tokens, (1,)).array
        if held.min() < 0:
            raise ValueError(f"GlobalTokens: tokens must be positions >= 0, got {int(held.min())}")
        object.__setattr__(self, "tokens", Values(np.unique(held)))
        if not (self.rows or self.columns):
            raise ValueError(
                "GlobalTokens: rows and columns cannot both be False; accepted: at least one True"
            )

    def check(self, ext):
        last = int(self.tokens.array[-1])
        if last >= ext.k_len:
            raise ValueError(f"GlobalTokens: tokens must be positions < k_len = {ext.k_len}, got {last}")

    def _count(self, below: np.ndarray) -> np.ndarray:
        """Global tokens at positions < `below`."""
        return np.searchsorted(self.tokens.array, below)

    def _is_global(self, position: np.ndarray) -> np.ndarray:
        return self._count(position + 1) > self._count(position)

    def _axis(self, start: np.ndarray, stop: np.ndarray, on: bool) -> np.ndarray:
        if not on:
            return np.full(np.shape(start), EMPTY, np.int8)
        found = self._count(stop) - self._count(start)
        return verdict(found == 0, found == stop - start)

    def contains(self, ext, b, h, q, k):
        seen = self._is_global(q + ext.offset) if self.rows else np.False_
        return seen | self._is_global(k) if self.columns else seen

    def classify(self, ext, b, h, q0, q1, k0, k1):
        by_row = self._axis(q0 + ext.offset, q1 + ext.offset, self.rows)
        return np.maximum(by_row, self._axis(k0, k1, self.columns))

    def signature(self, ext, b, h, qt, kt):
        q0, q1, k0, k1 = tile_bounds(ext, qt, kt)
        row, column = (
            self._axis(q0 + ext.offset, q1 + ext.offset, self.rows),
            self._axis(k0, k1, self.columns),
        )
        return np.where(row == PARTIAL, qt, -1 - row), np.where(column == PARTIAL, kt, -1 - column)


@dataclass(frozen=True, repr=False)
class PrefixLM(Pattern):
    """A prefix that all may see, causal after it: key < prefix or key <= position (bottom-right aligned).

    Args:
        prefix: length of the prefix, an int >= 0, or one per batch row (int (B,)).

    T5 (2019), UniLM (2019). The prefix is the half-open range [0, prefix).

    >>> PrefixLM(2).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """

    prefix: Any

    def __post_init__(self) -> None:
        held = values("PrefixLM", "prefix", self.prefix, (0, 1))
        if held.array.min() < 0:
            raise ValueError(f"PrefixLM: prefix must be >= 0, got {int(held.array.min())}")
        object.__setattr__(self, "prefix", held)

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.prefix.array.size

    def _length(self, b: int) -> int:
        return int(self.prefix.array.reshape(-1)[b if self.batch > 1 else 0])

    def at(self, b, h):
        return PrefixLM(self._length(b)) if self.batch > 1 else self

    def contains(self, ext, b, h, q, k):
        return (k < self._length(b)) | (q + ext.offset >= k)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = distances(ext, q0, q1, k0, k1)
        n = self._length(b)
        return verdict((k0 >= n) & (high < 0), (k1 <= n) | (low >= 0))

    def signature(self, ext, b, h, qt, kt):
        return diagonal(ext, qt, kt, 0, 0), np.clip(self._length(b) - TILE * kt, 0, TILE) + 0 * qt


def counts_before(bits: np.ndarray) -> np.ndarray:
    """Bool (..., n) -> int64 (..., n + 1): how many are True before each place."""
    out = np.zeros((*bits.shape[:-1], bits.shape[-1] + 1), np.int64)
    np.cumsum(bits, axis=-1, out=out[..., 1:])
    return out


def counted(before: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Class of the ranges [start, stop) of a bool vector with the given `counts_before`."""
    found = before[stop] - before[start]
    return verdict(found == 0, found == stop - start)
