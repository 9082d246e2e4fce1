"""Layers: `nn.Module`s with parameters of their own (gates, predictors, centroids), built on the other rooms."""

from __future__ import annotations

from foveate.layers.boundary import BoundaryPredictor, boundary_loss, boundary_targets
from foveate.layers.hierarchical import HierarchicalSelfAttention

__all__ = [
    "BoundaryPredictor",
    "HierarchicalSelfAttention",
    "boundary_loss",
    "boundary_targets",
]
