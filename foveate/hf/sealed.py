"""Keys and values on their way from a `foveate.hf.Cache` to the attention function: shapes, and nothing to compute
with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foveate.hf.cache import CachedLayer

_SAME = {Tensor.contiguous, Tensor.detach, Tensor.to, Tensor.clone}
_SIZES = {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.stride, Tensor.is_contiguous}
_SIZES |= {
    Tensor.element_size,
    Tensor.get_device,
    Tensor.is_floating_point,
    Tensor.__len__,
    Tensor.untyped_storage,
}


class Sealed(Tensor):
    """A zero-storage tensor (B, Hkv, tokens seen, D) that stands for what a layer's cache holds.

    Heads hold different tokens, so no dense tensor of this shape exists. foveate's attention opens it; anything else
    that tries to compute with it gets a RuntimeError instead of wrong numbers.
    """

    layer: CachedLayer
    fresh: Tensor
    """The tokens of this call alone, (B, Hkv, Q, D)."""

    @staticmethod
    def of(layer: CachedLayer, fresh: Tensor, length: int) -> Sealed:
        batch, heads, _, dim = fresh.shape
        one = torch.zeros((), dtype=fresh.dtype, device=fresh.device)
        sealed = one.expand(batch, heads, length, dim).as_subclass(Sealed)
        sealed.layer, sealed.fresh = layer, fresh
        return sealed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAME and isinstance(args[0], Sealed):
            return args[0]
        if func in _SIZES or getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            "the keys and values of a foveate.hf.Cache can only be read by foveate's attention (each head holds other "
            f"tokens), but {getattr(func, '__name__', func)} was asked of them. Was the model's attention "
            "implementation changed, or the cache released?"
        )

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Sealed(shape={tuple(self.shape)})"
