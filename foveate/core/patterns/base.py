"""Patterns: static sets of (query, key) pairs, and the three-valued algebra that combines them.

A pattern answers two vectorised questions. `contains` is exact, per element. `classify` is about whole
rectangles and three-valued: EMPTY (no pair allowed), FULL (every pair allowed) or PARTIAL (unknown or
mixed). Combination is Kleene's strong logic on the values 0, 1, 2:

    A & B = min(a, b)        A | B = max(a, b)        ~A = 2 - a

so an expression is classified from its parts without looking at elements, and `pattern.layout(q_len,
k_len)` evaluates elements only in the tiles that stay PARTIAL. Nothing is ever N x N.

Conventions, for every pattern of this package:

* Index arguments are NumPy int64 arrays; `contains` returns a NumPy bool array, `classify` int8. (`MaskMod`
  hands torch
  tensors to the function it wraps.) `b` and `h` are Python ints.
* `q` and `k` are raw indices 0..q_len-1 and 0..k_len-1. A query's *position* is `q + ext.offset` with
  `offset = k_len - q_len`: the last query stands at the last key (bottom-right alignment).
* `window=w` means w keys including the query's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.core.layout import TILE

if TYPE_CHECKING:
    from foveate.core.layout import BlockLayout

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class Extent:
    """The plane on which a pattern is laid out: `q_len` queries by `k_len` keys.

    >>> Extent(3, 5).offset  # query 0 stands at position 2
    2
    """

    q_len: int
    k_len: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "q_len", integer("Extent", "q_len", self.q_len, 1))
        object.__setattr__(self, "k_len", integer("Extent", "k_len", self.k_len, 1))

    @property
    def offset(self) -> int:
        """Position of query 0: the last query is aligned with the last key."""
        return self.k_len - self.q_len


class Pattern:
    """A static set of (query, key) pairs, the same or different per batch row and head.

    Subclasses are frozen dataclasses. `contains` is the only method that they must write; `classify` makes
    the layout fast, `signature` makes it faster. `batch` and `heads` are 1 when the set does not depend on
    them.
    """

    batch: int = 1
    heads: int = 1

    # ------------------------------------------------------------ to be written by subclasses
    def check(self, ext: Extent) -> None:
        """Raise ValueError when the pattern cannot live on `ext`."""

    def contains(self, ext: Extent, b: int, h: int, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Whether query `q` may attend to key `k`, elementwise.

        Args:
            b, h: batch row and head (ignored along axes of size 1).
            q, k: int64 arrays that broadcast, with 0 <= q < q_len and 0 <= k < k_len.

        Returns:
            bool array that broadcasts to the common shape of `q` and `k`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define contains()")

    def classify(
        self,
        ext: Extent,
        b: int,
        h: int,
        q0: np.ndarray,
        q1: np.ndarray,
        k0: np.ndarray,
        k1: np.ndarray,
    ) -> np.ndarray:
        """int8 EMPTY, PARTIAL or FULL per rectangle [q0, q1) x [k0, k1), each inside the plane and not empty.

        EMPTY and FULL are promises; PARTIAL is always allowed.
        """
        return np.full(np.shape(q0), PARTIAL, np.int8)

    def signature(
        self, ext: Extent, b: int, h: int, qt: np.ndarray, kt: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """int64 columns: tiles with equal columns have equal content (if cut by the same edges of the plane).

        The default knows nothing but the class, so every PARTIAL tile is its own.
        """
        c = self.classify(ext, b, h, *tile_bounds(ext, qt, kt))
        return (np.where(c == PARTIAL, qt * (1 << 31) + kt, -1 - c),)

    def at(self, b: int, h: int) -> Pattern:
        """The pattern of one batch row and head, simplified; equal results are laid out once."""
        return self

    @property
    def cacheable(self) -> bool:
        """False when equal patterns may mean different sets at different times."""
        return True

    # -------------------------------------------------------------------------------- for users
    def layout(self, q_len: int, k_len: int | None = None) -> BlockLayout:
        """The exact `BlockLayout` on `q_len` queries and `k_len` (default `q_len`) keys.

        Equal patterns on equal lengths return the same object from a cache; see `LayoutCache`.

        >>> from foveate.core.patterns import Causal
        >>> Causal().layout(100).area
        5050
        """
        return CACHE.get(self, integer("layout()", "q_len", q_len, 1), _k_len(q_len, k_len))

    def plot(self, q_len: int, k_len: int | None = None, **options: Any):
        """Element and tile view, a matplotlib figure; options: `foveate.core.patterns.plot.plot_pattern`."""
        from foveate.core.patterns.plot import plot_pattern

        return plot_pattern(self, q_len, k_len, **options)

    def __and__(self, other: Any) -> Pattern:
        return _combined(And, self, other)

    def __rand__(self, other: Any) -> Pattern:
        return _combined(And, other, self)

    def __or__(self, other: Any) -> Pattern:
        return _combined(Or, self, other)

    def __ror__(self, other: Any) -> Pattern:
        return _combined(Or, other, self)

    def __repr__(self) -> str:
        """The call that makes it: the first argument, and the others where they are not the default."""
        told = []
        for i, field in enumerate(dataclasses.fields(self)):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if i == 0 and value is not None:
                told.append(repr(value))
            elif value != field.default:
                told.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(told)})"

    def __invert__(self) -> Pattern:
        return self.part if isinstance(self, Not) else Not(self)


# ---------------------------------------------------------------------------------------- algebra
@dataclass(frozen=True, repr=False)
class And(Pattern):
    """Pairs that every part allows. Written `a & b`; nested ones are flattened."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _flatten(And, self.parts))

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _common(self.parts, "batch")

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _common(self.parts, "heads")

    @property
    def cacheable(self) -> bool:
        return all(p.cacheable for p in self.parts)

    def check(self, ext):
        for part in self.parts:
            part.check(ext)

    def contains(self, ext, b, h, q, k):
        seen = self.parts[0].contains(ext, b, h, q, k)
        for part in self.parts[1:]:
            seen = seen & part.contains(ext, b, h, q, k)
        return seen

    def classify(self, ext, b, h, q0, q1, k0, k1):
        c = self.parts[0].classify(ext, b, h, q0, q1, k0, k1)
        for part in self.parts[1:]:
            c = np.minimum(c, part.classify(ext, b, h, q0, q1, k0, k1))
        return c

    def signature(self, ext, b, h, qt, kt):
        return _signatures(self.parts, ext, b, h, qt, kt)

    def at(self, b, h):
        return And(tuple(p.at(b, h) for p in self.parts))

    def __repr__(self) -> str:
        return "(" + " & ".join(map(repr, self.parts)) + ")"


@dataclass(frozen=True, repr=False)
class Or(Pattern):
    """Pairs that some part allows. Written `a | b`; nested ones are flattened."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _flatten(Or, self.parts))

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _common(self.parts, "batch")

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _common(self.parts, "heads")

    @property
    def cacheable(self) -> bool:
        return all(p.cacheable for p in self.parts)

    def check(self, ext):
        for part in self.parts:
            part.check(ext)

    def contains(self, ext, b, h, q, k):
        seen = self.parts[0].contains(ext, b, h, q, k)
        for part in self.parts[1:]:
            seen = seen | part.contains(ext, b, h, q, k)
        return seen

    def classify(self, ext, b, h, q0, q1, k0, k1):
        c = self.parts[0].classify(ext, b, h, q0, q1, k0, k1)
        for part in self.parts[1:]:
            c = np.maximum(c, part.classify(ext, b, h, q0, q1, k0, k1))
        return c

    def signature(self, ext, b, h, qt, kt):
        return _signatures(self.parts, ext, b, h, qt, kt)

    def at(self, b, h):
        return Or(tuple(p.at(b, h) for p in self.parts))

    def __repr__(self) -> str:
        return "(" + " | ".join(map(repr, self.parts)) + ")"


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Pairs that the part does not allow. Written `~a`."""

    part: Pattern

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", as_pattern(self.part))

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.part.batch

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.part.heads

    @property
    def cacheable(self) -> bool:
        return self.part.cacheable

    def check(self, ext):
        self.part.check(ext)

    def contains(self, ext, b, h, q, k):
        return ~self.part.contains(ext, b, h, q, k)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return np.int8(2) - self.part.classify(ext, b, h, q0, q1, k0, k1)

    def signature(self, ext, b, h, qt, kt):
        return self.part.signature(ext, b, h, qt, kt)

    def at(self, b, h):
        return Not(self.part.at(b, h))

    def __repr__(self) -> str:
        return f"~{self.part!r}"


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """One pattern per head: head h follows `parts[h]`. Where a pattern is accepted, a tuple means this.

    >>> from foveate.core.patterns import Causal, Sinks, SlidingWindow
    >>> (Causal() & (SlidingWindow(4), Sinks(2))).heads
    2
    """

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        parts = tuple(as_pattern(p) for p in self.parts)
        if not parts:
            raise ValueError("per_head() needs at least one pattern, got none")
        for i, part in enumerate(parts):
            if part.heads != 1:
                raise ValueError(
                    f"per_head() takes patterns of one head each; number {i} has {part.heads} heads"
                )
        object.__setattr__(self, "parts", parts)
        _common(parts, "batch")

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _common(self.parts, "batch")

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.parts)

    @property
    def cacheable(self) -> bool:
        return all(p.cacheable for p in self.parts)

    def check(self, ext):
        for part in self.parts:
            part.check(ext)

    def contains(self, ext, b, h, q, k):
        return self._of(h).contains(ext, b, 0, q, k)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return self._of(h).classify(ext, b, 0, q0, q1, k0, k1)

    def signature(self, ext, b, h, qt, kt):
        return self._of(h).signature(ext, b, 0, qt, kt)

    def at(self, b, h):
        return self._of(h).at(b, 0)

    def _of(self, h: int) -> Pattern:
        return self.parts[h if len(self.parts) > 1 else 0]

    def __repr__(self) -> str:
        return f"per_head({', '.join(map(repr, self.parts))})"


def per_head(*parts: Any) -> PerHead:
    """One pattern per head: `per_head(p0, p1, ...)`; head h follows the h-th."""
    return PerHead(tuple(parts))


def as_pattern(value: Any) -> Pattern:
    """`value` as a pattern: a Pattern itself, or a tuple or list of patterns (one per head)."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (tuple, list)):
        return PerHead(tuple(value))
    raise TypeError(f"expected a Pattern or a tuple of patterns (one per head), got {type(value).__name__}")


def _combined(kind: type, left: Any, right: Any) -> Pattern:
    if not all(isinstance(side, (Pattern, tuple, list)) for side in (left, right)):
        return NotImplemented
    return kind((as_pattern(left), as_pattern(right)))


def _flatten(kind: type, parts: Iterable[Any]) -> tuple[Pattern, ...]:
    flat: list[Pattern] = []
    for part in map(as_pattern, parts):
        nested = getattr(part, "parts", ()) if type(part) is kind else (part,)
        flat.extend(nested)
    if not flat:
        raise ValueError(f"{kind.__name__} needs at least one pattern, got none")
    for axis in ("batch", "heads"):
        _common(flat, axis)
    return tuple(flat)


def _common(parts: Iterable[Pattern], axis: str) -> int:
    """The common size of an axis, where 1 broadcasts."""
    sizes = sorted({getattr(p, axis) for p in parts} - {1})
    if len(sizes) > 1:
        raise ValueError(
            f"patterns of different {axis} do not combine: got {sizes}; accepted: equal sizes or 1"
        )
    return sizes[0] if sizes else 1


def _signatures(parts: Sequence[Pattern], ext: Extent, b: int, h: int, qt: np.ndarray, kt: np.ndarray):
    """The parts' signatures side by side; a part that is decided on a tile says only how."""
    columns: list[np.ndarray] = []
    bounds = tile_bounds(ext, qt, kt)
    for part in parts:
        c = part.classify(ext, b, h, *bounds)
        mixed = c == PARTIAL
        columns.append(c.astype(np.int64))
        if mixed.any():
            columns.extend(np.where(mixed, s, 0) for s in part.signature(ext, b, h, qt, kt))
    return tuple(columns)


class Derived(Pattern):
    """Base of patterns that name an expression: subclasses define `rule`, everything else follows."""

    @property
    def rule(self) -> Pattern:
        raise NotImplementedError(f"{type(self).__name__} does not define rule")

    def check(self, ext):
        self.rule.check(ext)

    def contains(self, ext, b, h, q, k):
        return self.rule.contains(ext, b, h, q, k)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return self.rule.classify(ext, b, h, q0, q1, k0, k1)

    def signature(self, ext, b, h, qt, kt):
        return self.rule.signature(ext, b, h, qt, kt)

    def at(self, b, h):
        return self.rule.at(b, h)


# -------------------------------------------------------------------------------- helpers of all patterns
def tile_bounds(ext: Extent, qt: np.ndarray, kt: np.ndarray):
    """(q0, q1, k0, k1) of tiles, cut to the plane."""
    q0, k0 = qt * TILE, kt * TILE
    return q0, np.minimum(q0 + TILE, ext.q_len), k0, np.minimum(k0 + TILE, ext.k_len)


def verdict(empty: np.ndarray, full: np.ndarray) -> np.ndarray:
    """int8 classes from two promises that exclude each other."""
    return (1 + full.astype(np.int8) - empty).astype(np.int8)


def distances(ext: Extent, q0: np.ndarray, q1: np.ndarray, k0: np.ndarray, k1: np.ndarray):
    """Smallest and largest `position - key` in each rectangle; every integer between occurs."""
    return q0 + ext.offset - (k1 - 1), (q1 - 1) + ext.offset - k0


def diagonal(ext: Extent, qt: np.ndarray, kt: np.ndarray, low: int, high: int) -> np.ndarray:
    """Signature of sets of distances d = position - key that are constant below `low` and above `high`."""
    return np.clip(TILE * (qt - kt) + ext.offset, low - TILE, high + TILE)


def integer(owner: str, name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int in [least, most], or an error that names the argument."""
    accepted = (
        "an int"
        + (f" >= {least}" if least is not None else "")
        + (f" and <= {most}" if most is not None else "")
    )
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{owner}: {name} must be {accepted}, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be {accepted}, got {value!r}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{owner}: {name} must be {accepted}, got {number}")
    return number


def _k_len(q_len: int, k_len: int | None) -> int:
    return operator.index(q_len) if k_len is None else integer("layout()", "k_len", k_len, 1)


class Values:
    """An immutable array that is equal and hashable by content, so that patterns which hold one are too.

    The data are copied; later changes of the original have no effect. `array` is a read-only NumPy array.
    """

    __slots__ = ("array", "digest")

    def __init__(self, data: Any, dtype: Any = None):
        if isinstance(data, Values):
            data = data.array
        elif isinstance(data, torch.Tensor):
            data = data.detach().cpu().numpy()
        array = np.array(data, dtype=dtype, order="C", copy=True)
        array.setflags(write=False)
        head = f"{array.dtype.str}{array.shape}".encode()
        self.array: np.ndarray = array
        digest = hashlib.blake2b(head + b"|", digest_size=16)
        digest.update(array.reshape(-1).view(np.uint8).data)
        self.digest: bytes = digest.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        array = self.array
        if array.size <= 8:
            return repr(array.tolist())
        return f"<{array.dtype} {list(array.shape)} #{self.digest[:3].hex()}>"


def values(owner: str, name: str, data: Any, ndims: tuple[int, ...], kind: str = "int") -> Values:
    """`data` as `Values` of int64 or bool with an accepted number of dimensions."""
    wanted = (
        f"{'a bool' if kind == 'bool' else 'an integer'} tensor of {' or '.join(map(str, ndims))} dimensions"
    )
    if not isinstance(data, (Values, torch.Tensor, np.ndarray, list, tuple, range, int)):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {type(data).__name__}")
    held = data if isinstance(data, Values) else Values(data)
    array = held.array
    if array.size == 0:
        raise ValueError(f"{owner}: {name} must not be empty, got shape {tuple(array.shape)}")
    if array.dtype.kind not in ("b" if kind == "bool" else "iu") or array.ndim not in ndims:
        raise TypeError(f"{owner}: {name} must be {wanted}, got {array.dtype} of shape {tuple(array.shape)}")
    return held if kind == "bool" or array.dtype == np.int64 else Values(array, np.int64)


# ------------------------------------------------------------------------------------------------ cache
class LayoutCache:
    """Least-recently-used layouts, by the value of (pattern, q_len, k_len); bounded, shared by threads.

    At most `max_entries` layouts of together at most `max_bytes` are kept; a layout larger than that alone
    is returned and not kept. Layouts are immutable, so sharing one is safe. Patterns whose `cacheable` is
    False are never kept.
    """

    def __init__(self, max_bytes: int = 256 << 20, max_entries: int = 128):
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.nbytes = 0
        self._kept: OrderedDict[tuple[Pattern, int, int], BlockLayout] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, pattern: Pattern, q_len: int, k_len: int) -> BlockLayout:
        """The layout, from the cache or built now."""
        from foveate.core.build import build_layout

        if not pattern.cacheable:
            return build_layout(pattern, q_len, k_len)
        key = (pattern, q_len, k_len)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = build_layout(pattern, q_len, k_len)
        with self._lock:
            if key not in self._kept and made.nbytes <= self.max_bytes:
                self._kept[key] = made
                self.nbytes += made.nbytes
                while self.nbytes > self.max_bytes or len(self._kept) > self.max_entries:
                    self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return made

    def clear(self) -> None:
        """Forget every layout."""
        with self._lock:
            self._kept.clear()
            self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)


CACHE = LayoutCache()
