"""What a check is given: how to make the object, its tags, and seeded inputs; and what it says when something is wrong.

`arguments` of a check come from TOML, so they are plain data. On the way to the constructor

* a list becomes a tuple, at every depth;
* a table `{ tensor = [[1.0, 2.0]] }` becomes a float32 tensor of these numbers;
* a table `{ normal = [2, 5], seed = 0 }` becomes a float32 tensor of that shape, drawn from a standard normal;
* a table `{ make = "foveate.patterns.Causal", arguments = {} }` becomes the object that the dotted path makes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from foveate.catalogue.entry import Check, Cost
from foveate.catalogue.resolve import resolve

CUTS = (2, 5, 7, 13, 29, 61)  # prime places at which sequences are cut
ODD = (3, 7, 63, 75)  # sizes that a mechanism must take, or refuse with a ValueError


def demand(holds: object, message: str) -> None:
    """Raise AssertionError with the message unless `holds`; unlike `assert` it also works under `python -O`."""
    if not holds:
        raise AssertionError(message)


def value(data: Any) -> Any:
    """An argument from its TOML form; see the top.

    >>> value([1, [2, 3]])
    (1, (2, 3))
    >>> value({"make": "foveate.patterns.SlidingWindow", "arguments": {"window": 5}})
    SlidingWindow(5)
    """
    if isinstance(data, list | tuple):
        return tuple(value(item) for item in data)
    if not isinstance(data, Mapping):
        return data
    if set(data) == {"tensor"}:
        return torch.tensor(data["tensor"], dtype=torch.float32)
    if set(data) in ({"normal"}, {"normal", "seed"}):
        g = torch.Generator().manual_seed(data.get("seed", 0))
        return torch.randn(tuple(data["normal"]), generator=g)
    if set(data) in ({"make"}, {"make", "arguments"}):
        return make(data["make"], "", data.get("arguments", {}))
    return {name: value(item) for name, item in data.items()}


def make(path: str, use: str, arguments: Mapping[str, Any]) -> Any:
    """The object that a check is about.

    A class or a function is called with the arguments. An operator that is a plain function is itself the object, with
    the arguments bound by name.
    """
    found = resolve(path)
    given = {name: value(item) for name, item in arguments.items()}
    if use == "operator" and not inspect.isclass(found):
        return functools.partial(found, **given)
    return found(**given)


@dataclass(frozen=True)
class Subject:
    """One object under check.

    Args:
        check: its table of the entry.
        tags: those of the check, or of the entry.
        cost: the entry's formulas.
        maker: arguments -> the object.
    """

    check: Check
    tags: frozenset[str] = frozenset()
    cost: Cost = field(default_factory=Cost)
    maker: Callable[[Mapping[str, Any]], Any] | None = None

    def build(self, **other: Any) -> Any:
        """A new object; `other` replaces arguments of the check, as its limits do."""
        arguments = {**self.check.arguments, **other}
        if self.maker is not None:
            return self.maker(arguments)
        return make(self.check.make, self.check.use, arguments)

    @property
    def dim(self) -> int:
        """Width of a layer's tokens, channels of a gate's maps: heads * head_dim."""
        return self.check.heads * self.check.head_dim

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """A tensor from a standard normal; the same shape and seed give the same numbers in every dtype."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)

    def qkv(
        self,
        n: int,
        m: int | None = None,
        *,
        batch: int = 2,
        heads: int | None = None,
        kv_heads: int | None = None,
        v_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (batch, heads, n, D), k (batch, kv_heads, m, D), v (batch, kv_heads, m, v_dim)."""
        m = n if m is None else m
        heads = self.check.heads if heads is None else heads
        kv_heads = heads if kv_heads is None else kv_heads
        dim = self.check.head_dim
        q = self.normal(batch, heads, n, dim, dtype=dtype, seed=3 * seed)
        k = self.normal(batch, kv_heads, m, dim, dtype=dtype, seed=3 * seed + 1)
        return q, k, self.normal(batch, kv_heads, m, v_dim or dim, dtype=dtype, seed=3 * seed + 2)


def refused(call: Callable[[], Any]) -> tuple[Any, str]:
    """(what the call returns, ""), or (None, the message) of a ValueError, TypeError or NotImplementedError."""
    try:
        return call(), ""
    except (ValueError, TypeError, NotImplementedError) as error:
        return None, f"{type(error).__name__}: {error}"


def places(wrong: Tensor, limit: int = 3) -> str:
    """The first places where a bool tensor is True, and how many there are."""
    found = wrong.nonzero()[:limit].tolist()
    return f"{', '.join(str(tuple(p)) for p in found)} ({int(wrong.sum())} of {wrong.numel()})"


def same(what: str, got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    """Equal shapes, and values to a share of the largest magnitude; for float64, whose rounding is far below 1e-9."""
    demand(
        isinstance(got, Tensor) and got.shape == want.shape,
        f"{what}: shape {tuple(got.shape) if isinstance(got, Tensor) else got}; expected {tuple(want.shape)}",
    )
    if want.numel() == 0:
        return
    scale = max(float(torch.nan_to_num(want.detach()).abs().max()), 1e-30)
    got, want = got.detach(), want.detach()
    error = (got - want).abs()
    wrong = ~(error <= tolerance * scale)  # NaN is wrong
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        fail(
            f"{what}: differs at {places(wrong)}; at {at} got {float(got[at]):.6g}, expected {float(want[at]):.6g} "
            f"(tolerance {tolerance * scale:.2g})"
        )


def fail(message: str) -> NoReturn:
    raise AssertionError(message)
