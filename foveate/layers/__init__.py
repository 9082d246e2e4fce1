"""Layers: `nn.Module`s with parameters of their own (gates, predictors, centroids), built on the other rooms."""

from __future__ import annotations

from foveate.layers.hierarchical import HierarchicalSelfAttention

__all__ = ["HierarchicalSelfAttention"]
