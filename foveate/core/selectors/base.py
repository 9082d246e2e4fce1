"""A selector computes who may look at whom from the queries and keys themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from foveate.core.layout import BlockLayout


class Selector(ABC):
    """Content -> layout. Subclasses are frozen dataclasses of their settings and hold no state."""

    @abstractmethod
    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        """The layout for q (B, H, N, D) and k (B, Hkv, M, D); `scale` as in `attention` (default D ** -0.5)."""

    def at_layer(self, layer: int) -> Selector:
        """The selector for one layer of a model: the same one, unless it has weights of its own for each layer."""
        return self
