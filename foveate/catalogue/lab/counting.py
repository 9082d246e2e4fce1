"""Costs that are counted, not timed: multiply-adds of matrix products and the peak of allocated bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # name -> which argument is the left factor


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            self.total += left.numel() * right.shape[-1]
        elif any(word in name for word in ("attention", "conv", "mv", "dot")):
            raise NotImplementedError(f"multiply_adds does not know how to count {func}")
        return func(*args, **(kwargs or {}))


def multiply_adds(call: Callable[[], Any]) -> int:
    """Multiply-adds of all matrix products of a call, its backward pass included where it makes one.

    Element-wise work does not count. Fused attention, convolutions and vector products raise NotImplementedError.

    >>> a, b = torch.ones(2, 3), torch.ones(3, 5)
    >>> multiply_adds(lambda: a @ b)
    30
    """
    with _Products() as counter:
        call()
    return counter.total


class _Peak(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._add(t.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known or key in given:  # a view, or written in place
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made during a call hold at one time, beyond what was there before it.

    What a kernel allocates and frees inside itself is not seen.

    >>> peak_bytes(lambda: (torch.ones(10) + 1) * 2)  # of three tensors of 40 bytes, two at a time
    80
    """
    with _Peak() as peak:
        call()
    return peak.most
