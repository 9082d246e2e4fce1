"""Labels: packed documents, a question shared by answers, regions with a table of who may see whom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from foveate.core.patterns.band import Causal
from foveate.core.patterns.base import Derived, Extent, Pattern, Values, integer, values, verdict
from foveate.core.patterns.boxes import FAR, Boxes, _shapes
from foveate.core.patterns.columns import Sinks, counts_before

RECTANGLES = 1 << 14  # classified at once


def _both(owner: str, name: str, first: Any, second: Any) -> tuple[Any, Any]:
    first = values(owner, name, first, (1, 2))
    if second is None:
        return first, None
    second = values(owner, f"k_{name}", second, (1, 2))
    rows = {x.array.shape[0] for x in (first, second) if x.array.ndim == 2} - {1}
    if len(rows) > 1:
        raise ValueError(f"{owner}: {name} and k_{name} must have equal batch rows, got {sorted(rows)}")
    return first, second


def _check_both(owner: str, name: str, first: Any, second: Any, ext: Extent) -> None:
    n = first.array.shape[-1]
    if second is None:
        if n != ext.k_len:
            raise ValueError(f"{owner}: {name} must have k_len = {ext.k_len} entries, got {n}")
        if ext.q_len > ext.k_len:
            raise ValueError(
                f"{owner}: {name} alone needs q_len <= k_len (the queries are the last keys), got "
                f"{ext.q_len} > {ext.k_len}; give k_{name} as well"
            )
        return
    m = second.array.shape[-1]
    if (n, m) != (ext.q_len, ext.k_len):
        raise ValueError(
            f"{owner}: {name} and k_{name} must have q_len = {ext.q_len} and k_len = {ext.k_len} entries, "
            f"got {n} and {m}"
        )


def _rows_of(first: Any, second: Any, ext: Extent, b: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the queries (q_len,) and of the keys (k_len,) of one batch row."""

    def row(x):
        array = np.atleast_2d(x.array)
        return array[b if len(array) > 1 else 0]

    if second is None:
        k = row(first)
        return k[ext.offset :], k
    return row(first), row(second)


def _batch_of(first: Any, second: Any) -> int:
    return max(1 if x is None or x.array.ndim == 1 else len(x.array) for x in (first, second))


@dataclass(frozen=True, repr=False)
class Documents(Boxes):
    """Packed sequences: a query sees the keys of its own document. Not causal by itself.

    Args:
        ids: document of every token, int (N,) or (B, N), in any order. A negative id is padding: it belongs
        to no
            document, sees nothing and is seen by nobody.
        k_ids: documents of the keys, int (M,) or (B, M), when the keys are other tokens (cross attention);
        `ids` are
            then those of the queries. Without it `ids` are those of the keys and the queries are the last
            of them.

    >>> Documents([0, 0, 1, -1]).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    >>> Documents.from_cu_seqlens([0, 2, 3]) == Documents([0, 0, 1])
    True
    """

    ids: Any
    k_ids: Any = None

    def __post_init__(self) -> None:
        for name, value in zip(
            ("ids", "k_ids"), _both("Documents", "ids", self.ids, self.k_ids), strict=True
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Any, cu_seqlens_k: Any = None) -> Documents:
        """From cumulative lengths [0, n1, n1 + n2, ...]; `cu_seqlens_k` for the keys (cross attention)."""
        made = [None if cu is None else _ids_of(cu) for cu in (cu_seqlens, cu_seqlens_k)]
        if made[1] is not None and len(np.ravel(cu_seqlens)) != len(np.ravel(cu_seqlens_k)):
            raise ValueError(
                "Documents: cu_seqlens and cu_seqlens_k must have as many entries, one per document + 1"
            )
        return cls(*made)

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _batch_of(self.ids, self.k_ids)

    def check(self, ext):
        _check_both("Documents", "ids", self.ids, self.k_ids, ext)

    def at(self, b, h):
        if self.batch == 1:
            return self
        ids, k_ids = (None if x is None else np.atleast_2d(x.array) for x in (self.ids, self.k_ids))
        rows = [None if x is None else x[b if len(x) > 1 else 0] for x in (ids, k_ids)]
        return Documents(rows[0], rows[1])

    def boxes(self, ext, b):
        q, k = _rows_of(self.ids, self.k_ids, ext, b)
        none = q < 0
        return np.where(none, FAR, q)[None], np.where(none, -FAR, q)[None], k[None]


def _ids_of(cu_seqlens: Any) -> np.ndarray:
    lengths = np.diff(_ends("Documents", "cu_seqlens", cu_seqlens).array)
    return np.repeat(np.arange(len(lengths)), lengths)


def _ends(owner: str, name: str, cu_seqlens: Any) -> Values:
    held = values(owner, name, cu_seqlens, (1,))
    ends = held.array
    if len(ends) < 2 or ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] < 1:
        raise ValueError(f"{owner}: {name} must rise from 0 to the number of tokens, got {ends.tolist()[:8]}")
    return held


@dataclass(frozen=True, repr=False)
class Packed(Boxes):
    """Sequences one after another: attention stays inside each; with `is_causal` each is causal by itself.

    Sequence s owns the queries cu_seqlens[s] .. cu_seqlens[s + 1] - 1 and the keys of the same numbers in
    `cu_seqlens_k`. In each, the last query is aligned with the last key (bottom-right), as in a batch of requests that
    each append some tokens to a cache. Sequences may be empty.

    Relative patterns that are combined with it see global positions, not those inside a sequence: `SlidingWindow(512) &
    Packed(cu)` is the window inside each sequence when queries and keys have the same lengths (one `cu_seqlens`), since
    distances are the same then; with different ones it is not.

    FlashAttention's variable-length interface (2022).

    Args:
        cu_seqlens: cumulative lengths of the queries [0, n1, n1 + n2, ...], int (sequences + 1,).
        cu_seqlens_k: those of the keys, as many; None = the same.
        is_causal: key position <= query position inside each sequence.

    >>> Packed([0, 1, 3], is_causal=True).layout(3).to_dense()[0, 0].int().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    >>> Packed([0, 1, 2], [0, 2, 5], is_causal=True).layout(2, 5).to_dense()[0, 0].int().tolist()
    [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    """

    cu_seqlens: Any
    cu_seqlens_k: Any = None
    is_causal: bool = False

    def __post_init__(self) -> None:
        held = _ends("Packed", "cu_seqlens", self.cu_seqlens)
        object.__setattr__(self, "cu_seqlens", held)
        if not isinstance(self.is_causal, (bool, np.bool_)):
            raise TypeError(f"Packed: is_causal must be a bool, got {self.is_causal!r}")
        if self.cu_seqlens_k is None:
            return
        held_k = _ends("Packed", "cu_seqlens_k", self.cu_seqlens_k)
        if len(held_k.array) != len(held.array):
            raise ValueError(
                "Packed: cu_seqlens and cu_seqlens_k must have as many entries, one per sequence + 1; got "
                f"{len(held.array)} and {len(held_k.array)}"
            )
        object.__setattr__(self, "cu_seqlens_k", None if held_k == held else held_k)

    @property
    def sequences(self) -> int:
        """How many sequences are packed."""
        return len(self.cu_seqlens.array) - 1

    def check(self, ext):
        for name, length in (("cu_seqlens", ext.q_len), ("cu_seqlens_k", ext.k_len)):
            held = getattr(self, name) or self.cu_seqlens
            if held.array[-1] != length:
                kind = "queries" if name == "cu_seqlens" else "keys"
                raise ValueError(f"Packed: {name} ends at {held.array[-1]}; there are {length} {kind}")

    def boxes(self, ext, b):
        q_ends = self.cu_seqlens.array
        k_ends = q_ends if self.cu_seqlens_k is None else self.cu_seqlens_k.array
        of = np.repeat(np.arange(self.sequences), np.diff(q_ends))  # sequence of each query
        low, high = k_ends[of], k_ends[of + 1] - 1
        if self.is_causal:
            high = high - (q_ends[of + 1] - 1 - np.arange(ext.q_len))
        none = high < low
        return np.where(none, FAR, low)[None], np.where(none, -FAR, high)[None], np.arange(ext.k_len)[None]


@dataclass(frozen=True, repr=False)
class SharedQuestion(Derived):
    """One question, several answers: an answer sees the question and itself, never another answer.

    Everything is causal; the question sees only itself. Used to score several answers (reward models, DPO
    pairs) without repeating the question. Long-Context Attention Benchmark (2025), "share question".

    Args:
        lengths: (question, answer 1, answer 2, ...), ints >= 1; their sum is k_len.

    >>> SharedQuestion((1, 1, 2)).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    """

    lengths: Any

    def __post_init__(self) -> None:
        held = values("SharedQuestion", "lengths", self.lengths, (1,)).array.tolist()
        object.__setattr__(self, "lengths", tuple(integer("SharedQuestion", "lengths", n, 1) for n in held))

    @cached_property
    def rule(self) -> Pattern:  # pyright: ignore[reportIncompatibleVariableOverride]
        ids = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return Causal() & (Documents(ids) | Sinks(self.lengths[0]))

    def check(self, ext):
        if sum(self.lengths) != ext.k_len:
            raise ValueError(
                f"SharedQuestion: lengths must sum to k_len = {ext.k_len}, got {sum(self.lengths)}"
            )
        self.rule.check(ext)


@dataclass(frozen=True, repr=False)
class Regions(Pattern):
    """Labelled tokens and a table of who may see whom: allowed iff `table[label of query, label of key]`.

    Args:
        labels: label of every token, int (N,) or (B, N) in [0, rows of the table).
        table: bool (labels of queries, labels of keys).
        k_labels: labels of the keys, int (M,) or (B, M), when the keys are other tokens; `labels` are then
        those of the
            queries. Without it `labels` are those of the keys and the queries are the last of them.

    >>> import torch
    >>> below = torch.tensor([[True, False], [True, True]])
    >>> Regions([0, 1, 1], below).layout(3).to_dense()[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    """

    labels: Any
    table: Any
    k_labels: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", values("Regions", "table", self.table, (2,), "bool"))
        labels, k_labels = _both("Regions", "labels", self.labels, self.k_labels)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "k_labels", k_labels)
        rows, columns = self.table.array.shape
        most_k = columns if k_labels is not None else min(rows, columns)
        for name, held, most in (
            ("labels", labels, rows if k_labels is not None else most_k),
            ("k_labels", k_labels, most_k),
        ):
            if held is not None and (held.array.min() < 0 or held.array.max() >= most):
                raise ValueError(
                    f"Regions: {name} must lie in [0, {most}) for a table of {rows} x {columns}, got "
                    f"{int(held.array.min())} .. {int(held.array.max())}"
                )

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _batch_of(self.labels, self.k_labels)

    def check(self, ext):
        _check_both("Regions", "labels", self.labels, self.k_labels, ext)

    def contains(self, ext, b, h, q, k):
        q_labels, k_labels = _rows_of(self.labels, self.k_labels, ext, b)
        return self.table.array[q_labels[q], k_labels[k]]

    def classify(self, ext, b, h, q0, q1, k0, k1):
        q_before, k_before = self._counts(ext, b)
        table = self.table.array.astype(np.float32)
        out = np.empty(np.shape(q0), np.int8)
        for start in range(0, len(out), RECTANGLES):
            s = slice(start, start + RECTANGLES)
            q_has = (q_before[q1[s]] > q_before[q0[s]]).astype(np.float32)  # (n, query labels)
            k_has = (k_before[k1[s]] > k_before[k0[s]]).astype(np.float32)
            allowed = ((q_has @ table) * k_has).sum(axis=1)
            out[s] = verdict(allowed == 0, allowed == q_has.sum(axis=1) * k_has.sum(axis=1))
        return out

    def _counts(self, ext: Extent, b: int) -> tuple[np.ndarray, np.ndarray]:
        """How often each label occurs before each token: int (q_len + 1, rows), (k_len + 1, columns)."""
        return _label_counts(self, ext, b if self.batch > 1 else 0)

    def signature(self, ext, b, h, qt, kt):
        q, k = _rows_of(self.labels, self.k_labels, ext, b)
        names = []
        for x, t in ((q, qt), (k, kt)):
            number, base = _shapes(x[None])
            names += [number[t], base[0, t]]
        return tuple(names)


@lru_cache(maxsize=16)
def _label_counts(pattern: Regions, ext: Extent, b: int) -> tuple[np.ndarray, np.ndarray]:
    q, k = _rows_of(pattern.labels, pattern.k_labels, ext, b)
    rows, columns = pattern.table.array.shape

    def count(labels: np.ndarray, kinds: int) -> np.ndarray:
        return counts_before(labels == np.arange(kinds)[:, None]).T.astype(np.int32, order="C")

    return count(q, rows), count(k, columns)
