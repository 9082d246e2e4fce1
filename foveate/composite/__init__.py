"""Composite: mechanisms made of several attention calls whose results are merged."""

from __future__ import annotations

from foveate.composite.halves import causal_by_halves
from foveate.composite.hyperattention import HyperAttention

__all__ = ["HyperAttention", "causal_by_halves"]
