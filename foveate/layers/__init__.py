"""Layers: `nn.Module`s with parameters of their own (gates, predictors, centroids), built on the other rooms."""

from __future__ import annotations

from foveate.layers.boundary import BoundaryPredictor, boundary_loss, boundary_targets

__all__ = ["BoundaryPredictor", "boundary_loss", "boundary_targets"]
